"""Bases of every kind, in floats and quantised, on eight devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medmoe_jax.base import quantised
from medmoe_jax.base.quantised import Quantised
from medmoe_jax.checkpoints.bases import open_base, open_tokenizer
from medmoe_jax.checkpoints.fingerprint import tree_fingerprint
from medmoe_jax.errors import UserError
from medmoe_jax.parallel.mesh import make_mesh
from medmoe_jax.parallel.rules import RULES, shardings
from tests import gguf_files, tiny
from tests.checkpoints import test_huggingface
from tests.checkpoints.test_llama2c import write
from tests.data.test_gguf_tokenizer import pieces_fields

RANDOM = dict(vocab_size=32, d_model=16, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=8, d_ff=150)


@pytest.fixture(params=["llama2c", "random"])
def source(request, tmp_path):
    """The first arguments of `open_base`; Hugging Face folders have a test file of their own."""
    if request.param == "random":
        return "", "", RANDOM
    write(tmp_path / "m.bin")
    return str(tmp_path / "m.bin"), "", {}


def load(source, kind):
    base = open_base(*source, 0, kind)
    mesh = make_mesh({"data": 1, "fsdp": 4, "expert": 1, "tensor": 2})
    abstract = base.abstract(jnp.float32)
    wanted = shardings(abstract, mesh, RULES)
    params = base.load(jnp.float32, wanted)
    jax.tree.map(lambda x, s: x.sharding == s or pytest.fail(f"{x.sharding}"), params, wanted)
    described = functools.partial(jax.tree.map, lambda x: (x.shape, x.dtype))
    assert described(params) == described(abstract)
    return params


@pytest.mark.parametrize("kind", sorted(quantised.KINDS))
def test_every_base_can_be_quantised(source, kind):
    params = load(source, kind)
    want = jax.jit(functools.partial(quantised.quantise, kind=kind))(load(source, ""))
    jax.tree.map(np.testing.assert_array_equal, params, want)
    assert isinstance(params["layers"]["mlp"]["down"]["kernel"], Quantised)


def test_a_tokenizer_is_named_by_the_gguf_file_that_holds_it(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    fields = pieces_fields()

    def add(writer):
        writer.add_tokenizer_model(fields["tokenizer.ggml.model"])
        writer.add_token_list(fields["tokenizer.ggml.tokens"])
        writer.add_token_scores(fields["tokenizer.ggml.scores"])
        writer.add_token_types(fields["tokenizer.ggml.token_type"])

    gguf_files.write(tmp_path / "m.gguf", more=add)
    found, text = open_tokenizer(tmp_path / "m.gguf"), "The patient has a fever."
    assert found.encode(text) == tiny.tokenizer().encode(text)
    with pytest.raises(UserError, match=r"none\.gguf: no such file"):
        open_tokenizer(tmp_path / "none.gguf")


def test_an_unknown_kind_is_refused(source):
    with pytest.raises(UserError, match=r"quantise: 'fp8' is none of int8, nf4"):
        open_base(*source, 0, "fp8")


def test_a_fingerprint_covers_codes_and_scales(tmp_path):
    write(tmp_path / "m.bin")
    bases = {kind: load((str(tmp_path / "m.bin"), "", {}), kind) for kind in ("", "int8", "nf4")}
    prints = {kind: tree_fingerprint(params) for kind, params in bases.items()}
    assert len(set(prints.values())) == 3
    for kind in ("int8", "nf4"):
        here = jax.tree.map(np.array, jax.device_get(bases[kind]))
        assert tree_fingerprint(here) == prints[kind]
        for part in ("codes", "scale"):
            array = getattr(here["layers"]["attn"]["o"]["kernel"], part)
            old = array[0, 0, 0]
            array[0, 0, 0] += 1
            assert tree_fingerprint(here) != prints[kind]
            array[0, 0, 0] = old
        assert tree_fingerprint(here) == prints[kind]


@pytest.mark.parametrize("value", [np.nan, -np.inf])
@pytest.mark.parametrize("kind", ["", *sorted(quantised.KINDS)])
def test_what_is_not_finite_is_refused_by_name(tmp_path, kind, value):
    path = tmp_path / "m.bin"
    write(path)
    content = bytearray(path.read_bytes())
    content[28:32] = np.float32(value).tobytes()  # the first value behind the header
    content[-4:] = np.float32(value).tobytes()  # rotary tables are not read
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"{path}: NaN or infinity in embed;"):
        load((str(path), "", {}), kind)


def test_a_folder_with_one_bad_value(tmp_path):
    tensors = test_huggingface.qwen2_tensors(np.random.default_rng(0))
    tensors["model.layers.2.mlp.up_proj.weight"][3, 1] = np.nan
    test_huggingface.write(tmp_path, test_huggingface.QWEN2, tensors)
    with pytest.raises(UserError, match=r"NaN or infinity in layers\.mlp\.up\.kernel;"):
        open_base(str(tmp_path), "", {}, 0).load(jnp.bfloat16, None)
