"""GGUF files out: beside files that the `gguf` package's own writer makes, and back in."""

import dataclasses

import gguf
import jax.numpy as jnp
import numpy as np
import pytest

from medmoe_jax.adapters import lifecycle
from medmoe_jax.adapters.bank import BankSpec
from medmoe_jax.base import quantised, rope, trees
from medmoe_jax.base.config import RopeScaling
from medmoe_jax.checkpoints import families, gguf_export, gguf_models
from medmoe_jax.checkpoints.gguf_export import KINDS, save_gguf, save_gguf_adapter
from medmoe_jax.checkpoints.hf_config import config_from_hf, differences
from medmoe_jax.errors import UserError
from tests import naive
from tests.gguf_files import HF, hf_config, write

# A width that fills no block, so that some matrices of a quantised file stay halves.
WIDTHS = dict(hidden_size=64, intermediate_size=80)


def read(path):
    """`(fields, {name: (kind, shape, bytes)})` of a file as the package reads it."""
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {
        t.name: (t.tensor_type.name, tuple(t.shape), t.data.tobytes()) for t in reader.tensors
    }
    return fields, tensors


def model_of(name, tmp_path, **changes):
    """`(family, config, params, a file of the same model by other hands)` of a case of `HF`."""
    path = tmp_path / "theirs.gguf"
    write(path, name, **changes)
    config, params = gguf_models.load(path, jnp.float32)
    return hf_config(name)["model_type"], config, params, path


@pytest.mark.parametrize("name", HF)
def test_a_file_is_the_one_that_the_converter_makes(name, tmp_path):
    family, config, params, theirs = model_of(name, tmp_path)
    save_gguf(tmp_path / "out", config, params, family, kind="float32")
    fields, tensors = read(theirs)
    own_fields, own_tensors = read(tmp_path / "out" / "model.gguf")
    assert own_tensors.keys() == tensors.keys()
    for tensor, (kind, shape, content) in tensors.items():
        assert own_tensors[tensor][:2] == (kind, shape), tensor
        got, want = (np.frombuffer(c, "f4") for c in (own_tensors[tensor][2], content))
        # Gemma's norms went to their offset and back.
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-7, err_msg=tensor)
    assert {key: own_fields.get(key) for key in fields if not key.startswith("GGUF")} == {
        key: value for key, value in fields.items() if not key.startswith("GGUF")
    }
    # What is read back is the same model.
    back, again = gguf_models.load(tmp_path / "out" / "model.gguf", jnp.float32)
    assert not list(differences(back, config))
    for path, leaf in trees.flatten(again):
        np.testing.assert_allclose(leaf, trees.get(params, path), rtol=0, atol=3e-7, err_msg=path)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind(kind, tmp_path):
    family, config, params, theirs = model_of("qwen2", tmp_path, **WIDTHS)
    save_gguf(tmp_path / "out", config, params, family, kind=kind)
    fields, tensors = read(tmp_path / "out" / "model.gguf")
    floats = {name: np.frombuffer(data, "f4") for name, (_, _, data) in read(theirs)[1].items()}
    number = gguf.LlamaFileType(fields["general.file_type"]).name
    assert number == ("ALL_F32" if kind == "float32" else f"MOSTLY_{KINDS[kind]}")
    for name, (found, shape, content) in tensors.items():
        want = KINDS[kind] if len(shape) > 1 else "F32"
        if name in ("token_embd.weight", "output.weight") and want.startswith(("Q4", "Q5")):
            want = "Q8_0"
        if shape[0] % gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[want]][0]:
            want = "F16"  # the width 80 of ffn_down
        assert found == want, name
        x = floats[name].reshape(shape[::-1])
        data = gguf.quants.quantize(x, gguf.GGMLQuantizationType[want])
        assert content == data.tobytes(), name
    assert tensors["blk.0.ffn_down.weight"][0] == (KINDS[kind] if kind[0] != "q" else "F16")


SPECS = (
    BankSpec("attention", ("attn.q", "attn.k", "attn.o"), 0, 3, rank=3, alpha=6.0),
    BankSpec("mlp", ("mlp.up", "mlp.down"), 1, 3, experts=2, rank=2, alpha=8.0),
)


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_banks_are_folded(name, tmp_path):
    family, config, params, _ = model_of(name, tmp_path)
    banks = naive.random_banks(SPECS, config)
    members = [(spec, banks[spec.name]) for spec in SPECS]
    save_gguf(tmp_path / "out", config, params, family, kind="float32", members=members)
    _, back = gguf_models.load(tmp_path / "out" / "model.gguf", jnp.float32)
    assert naive.tree_rel(back, lifecycle.merge_into(params, members)) <= 1e-6
    assert naive.tree_rel(back, params) >= 0.1
    by_token = dataclasses.replace(SPECS[0], experts=2, gate="token", top_k=1)
    with pytest.raises(UserError, match="bank 'attention' has gate 'token'"):
        save_gguf(tmp_path / "no", config, params, family, members=[(by_token, {})])


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_an_adapter_over_the_file_of_the_base(name, tmp_path):
    """The base's tensors and B A, in the rows of the file, are the tensors of the folded model."""
    family, config, params, theirs = model_of(name, tmp_path)
    banks = naive.random_banks(SPECS, config)
    members = [(spec, banks[spec.name]) for spec in SPECS]
    save_gguf_adapter(tmp_path / "adapter", config, family, members)
    save_gguf(tmp_path / "out", config, params, family, kind="float32", members=members)
    fields, factors = read(tmp_path / "adapter" / "adapter.gguf")
    assert fields["general.architecture"] == name and fields["adapter.lora.alpha"] == 0
    assert (fields["general.type"], fields["adapter.type"]) == ("adapter", "lora")

    def array(tensors, tensor):
        kind, shape, content = tensors[tensor]
        assert kind == "F32"
        return np.frombuffer(content, "f4").reshape(shape[::-1])

    base, folded = read(theirs)[1], read(tmp_path / "out" / "model.gguf")[1]
    adapted = {tensor.rsplit(".", 1)[0] for tensor in factors}
    assert adapted == {tensor for tensor in base if base[tensor][2] != folded[tensor][2]}
    for tensor in adapted:
        a, b = (array(factors, f"{tensor}.{leaf}") for leaf in ("lora_a", "lora_b"))
        want = array(folded, tensor)
        np.testing.assert_allclose(array(base, tensor) + b @ a, want, rtol=0, atol=1e-5)


def test_a_quantised_base_is_written_as_the_values_it_stands_for(tmp_path):
    family, config, params, _ = model_of("llama", tmp_path)
    stored = quantised.quantise(params, "int8")
    save_gguf(tmp_path / "out", config, stored, family, kind="float32")
    _, back = gguf_models.load(tmp_path / "out" / "model.gguf", jnp.float32)
    assert naive.tree_rel(back, quantised.dequantise(stored, jnp.float32)) <= 1e-6


LLAMA3 = RopeScaling("llama3", 8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                     original_max_positions=16)  # fmt: skip
FACTORS = tuple(np.linspace(1, 8, 8))
SCALED = {
    "linear": ("llama", RopeScaling("linear", 4.0)),
    "yarn": ("qwen2", RopeScaling("yarn", 4.0, original_max_positions=16)),
    "llama3": ("llama", LLAMA3),
    "longrope": (
        "phi3",
        RopeScaling("longrope", 4.0, original_max_positions=16, short_factor=FACTORS,
                    long_factor=tuple(3 * f for f in FACTORS)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", SCALED)
def test_scaled_rotary_embeddings(kind, tmp_path):
    name, scaling = SCALED[kind]
    family, config, params, _ = model_of(name, tmp_path)
    config = config.replace(rope_scaling=scaling)
    save_gguf(tmp_path / "out", config, params, family)
    back, _ = gguf_models.load(tmp_path / "out" / "model.gguf")
    want, got = rope.frequencies(config, "global"), rope.frequencies(back, "global")
    for x, y in zip(want, got, strict=True):
        np.testing.assert_allclose(y, x, rtol=1e-6)
    assert np.max(
        np.abs(want[0] - rope.frequencies(config.replace(rope_scaling=None), "global")[0])
    )
    if kind == "longrope":
        assert rope.switches_at(back) == 16


def test_a_family_without_an_architecture_of_its_own(tmp_path):
    """A Mistral without a window is a Llama to llama.cpp."""
    _, config, params, theirs = model_of("llama", tmp_path)
    save_gguf(tmp_path / "out", config, params, "mistral", kind="float32")
    assert read(tmp_path / "out" / "model.gguf")[1] == read(theirs)[1]


# Family, changes of the decoder, what the error names.
LOST = {
    "granite": ("granite", {"residual_scale": 0.5}, r"'llama'.*residual_scale: 0.5 would be read"),
    "olmo": ("olmo2", {"pre_norms": False, "post_norms": True}, "'llama'.*pre_norms: False would"),
    "smollm3": ("smollm3", {"ropes": ("global", "none", "global")}, "'llama'.*ropes: "),
    "window": ("mistral", {"windows": (5, 5, 5)}, r"'llama'.*windows: \(5, 5, 5\) would be read"),
    "scaling": ("qwen2", {"rope_scaling": LLAMA3, "qkv_bias": True},
                "rope_scaling: 'llama3' has no place in a GGUF file of architecture 'qwen2'"),
    "yarn": ("llama", {"rope_scaling": RopeScaling("yarn", 4.0, 16, beta_fast=8.0)},
             "architecture 'llama' cannot express this decoder: rope_scaling: .*beta_fast=8.0"),
    "epsilon": ("llama", {"norm_eps": 1 / 3e5},
                "architecture 'llama' cannot express this decoder: norm_eps: 3.33.*e-06 would be"),
}  # fmt: skip


@pytest.mark.parametrize("name", LOST)
def test_what_a_file_cannot_express_is_refused_by_name(name, tmp_path):
    family, changes, message = LOST[name]
    config = config_from_hf(hf_config("llama")).replace(**changes)
    with pytest.raises(UserError, match=f"(?s){message}"):
        save_gguf(tmp_path / "out", config, {}, family)
    assert not list(tmp_path.iterdir())


def test_layers_that_llama_cpp_takes_otherwise(tmp_path):
    config = config_from_hf(hf_config("gemma3"))
    with pytest.raises(UserError, match=r"'gemma3' cannot express.*windows: \(5, 0, 5, 0, 5, 0\)"):
        config = config.replace(windows=(5, 0) * 3, ropes=("local", "global") * 3)
        save_gguf(tmp_path / "out", config, {}, "gemma3_text")
    with pytest.raises(UserError, match=r"'gemma3' cannot express.*query_scale: 0.1 would be read"):
        config = config_from_hf({**hf_config("gemma3"), "query_pre_attn_scalar": 100})
        save_gguf(tmp_path / "out", config, {}, "gemma3_text")


def test_numbers_beyond_float16(tmp_path):
    family, config, params, _ = model_of("llama", tmp_path)
    params = trees.overlay(params, trees.unflatten([("embed", params["embed"] * 1e7)]))
    with pytest.raises(UserError, match=r"token_embd.weight: has values beyond 65504.*bfloat16"):
        save_gguf(tmp_path / "out", config, params, family)
    assert not (tmp_path / "out").exists()
    save_gguf(tmp_path / "out", config, params, family, kind="bfloat16")


def test_nothing_is_left_when_the_disk_is_full(tmp_path, monkeypatch):
    family, config, params, theirs = model_of("llama", tmp_path)
    add = gguf_export._File.add

    def full(file, name, x, folder):
        if name == "blk.1.ffn_up.weight":
            raise OSError(28, "No space left on device")
        add(file, name, x, folder)

    monkeypatch.setattr(gguf_export._File, "add", full)
    with pytest.raises(UserError, match=r"out: cannot be written.*No space left on device"):
        save_gguf(tmp_path / "out", config, params, family)
    assert list(tmp_path.iterdir()) == [theirs]


def test_of_a_model_with_other_parts_the_decoder_is_written(tmp_path):
    _, config, params, theirs = model_of("gemma3", tmp_path)
    assert families.FAMILIES["gemma3"].within
    save_gguf(tmp_path / "out", config, params, "gemma3", kind="float32")
    assert read(tmp_path / "out" / "model.gguf")[1].keys() == read(theirs)[1].keys()
