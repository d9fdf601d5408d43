"""NaN and infinity are refused wherever weights come in or go out."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from medmoe_jax.checkpoints import files, gguf_export
from medmoe_jax.checkpoints.finite import check_finite
from medmoe_jax.errors import UserError


@pytest.mark.parametrize("tree", [{"a": {"b": np.float32([1, np.inf])}, "c": np.int8([1])},
                                  {"a": {"b": jnp.array([jnp.nan], jnp.bfloat16)}}])  # fmt: skip
def test_trees_that_are_not_finite(tree):
    with pytest.raises(UserError, match=r"f: NaN or infinity in a\.b; again"):
        check_finite(tree, "f", "again")
    check_finite({"a": np.ones(2)}, "f", "again")


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_an_export_holds_no_nan(tmp_path, dtype):
    for value in (np.nan, np.inf, -np.inf):
        x = np.array([1.0, value]).astype(dtype)
        with (
            pytest.raises(UserError, match=r"model\.norm\.weight: NaN or infinity"),
            files.new_folder(tmp_path / "out") as write,
        ):
            write(lambda folder, x=x: files.save_tensors(folder / "m", {"model.norm.weight": x}))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0"])
def test_a_gguf_file_holds_no_nan(tmp_path, kind):
    with gguf_export._file("x.gguf", "llama", {}) as file:
        file.begin({"a": ((1, 32), kind)}, tmp_path)
        for value in (np.nan, np.inf):
            with pytest.raises(UserError, match="a: NaN or infinity"):
                file.add("a", np.full((1, 32), value, np.float32), tmp_path)
        if kind != "F32":
            with pytest.raises(UserError, match="a: has values beyond 65504"):
                file.add("a", np.full((1, 32), 1e9, np.float32), tmp_path)
