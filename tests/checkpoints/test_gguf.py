"""GGUF files in: every tensor's place and value, shardings, memory, and files that lie."""

import struct
import tempfile
import tracemalloc
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medmoe_jax.base import decoder, quantised, trees
from medmoe_jax.checkpoints import families, gguf_models, placing
from medmoe_jax.checkpoints.bases import open_base
from medmoe_jax.checkpoints.gguf_file import KINDS, open_gguf
from medmoe_jax.checkpoints.hf_config import config_from_hf, differences
from medmoe_jax.errors import UserError
from medmoe_jax.parallel.mesh import make_mesh
from medmoe_jax.parallel.rules import BASE_RULES, shardings
from tests.gguf_files import HF, hf_config, quantise, write


def leaves_by_hand(name, tensors):
    """The tree that a Hugging Face checkpoint of these tensors gives."""
    hf = hf_config(name)
    config = config_from_hf(hf)
    leaves = {path: np.zeros(shape, np.float32) for path, shape in decoder.shapes(config).items()}
    for tensor in families.tensors(config, hf["model_type"]):
        for part in tensor.parts:
            x = tensors[tensor.name][part.start : part.stop]
            x = x.T if part.path.endswith("kernel") else x
            leaves[part.path][... if part.layer is None else part.layer] = x
    return config, leaves


@pytest.mark.parametrize("name", HF)
def test_every_tensor_lands_in_its_place(name, tmp_path):
    tensors = write(tmp_path / "m.gguf", name)
    want_config, want = leaves_by_hand(name, tensors)
    config, params = gguf_models.load(tmp_path / "m.gguf", jnp.float32)
    assert not list(differences(config, want_config))
    assert dict(trees.flatten(params)).keys() == want.keys()
    for path, leaf in trees.flatten(params):
        # Gemma's norms come with 1 added in float32.
        np.testing.assert_allclose(leaf, want[path], rtol=0, atol=2e-7, err_msg=path)
    base = open_base(str(tmp_path / "m.gguf"), "", {}, 0)
    assert base.family == hf_config(name)["model_type"]
    assert base.config == config


# Those that the package cannot make are any bytes, with a small scale where a block has its own.
SCALES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
SCALES |= dict.fromkeys((kind for kind in KINDS if kind.startswith("IQ")), (0,))


def any_bytes(x, kind):
    number = gguf.GGMLQuantizationType[kind]
    shape = gguf.quant_shape_to_byte_shape(x.shape, number)
    data = np.random.default_rng(1).integers(0, 256, shape, np.uint8)
    blocks = data.reshape(-1, gguf.GGML_QUANT_SIZES[number][1])
    for at in SCALES[kind]:
        blocks[:, at : at + 2] = np.array([0.01], np.float16).view(np.uint8)
    return data


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_values_of_the_package(kind, tmp_path):
    number, stored = gguf.GGMLQuantizationType[kind], {}

    def store(x, kind):
        data = any_bytes(x, kind) if kind in SCALES else quantise(x, kind)
        stored[x.tobytes()] = gguf.quants.dequantize(data, number)
        return data

    wide = dict(hidden_size=256, intermediate_size=256)
    tensors = write(tmp_path / "m.gguf", "qwen2", kind, store, **wide)
    config, params = gguf_models.load(tmp_path / "m.gguf", jnp.float32)
    for tensor in families.tensors(config, "qwen2"):
        (part,) = tensor.parts
        x = tensors[tensor.name]
        got = np.asarray(trees.get(params, part.path))
        got = got if part.layer is None else got[part.layer]
        got = got.T if part.path.endswith("kernel") else got
        np.testing.assert_array_equal(got, stored[x.tobytes()] if x.ndim > 1 else x)
    # Columns that begin and end within a block.
    up = open_gguf(tmp_path / "m.gguf").tensors["blk.1.ffn_up.weight"]
    some = up.rows(np.array([7, 3]), slice(33, 131))
    np.testing.assert_array_equal(some, up.rows(slice(None))[[7, 3], 33:131])


def test_what_stands_in_for_k_quants_in_rows_that_do_not_fit_them(tmp_path):
    """IQ4_NL, in files of Q2_K and Q3_K: a number is one of 16 values."""
    values = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]
    write(tmp_path / "m.gguf", "qwen2", "IQ4_NL", any_bytes, hidden_size=96)
    up = open_gguf(tmp_path / "m.gguf").tensors["blk.1.ffn_up.weight"]
    assert up.shape[1] == 96
    blocks = up.bytes_RxN.reshape(-1, 18)
    signs = np.concatenate([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], axis=1)
    want = np.float32(np.float16(0.01)) * np.array(values, np.float32)[signs]
    np.testing.assert_array_equal(up.rows(slice(None)), want.reshape(up.shape))


def test_leaves_are_born_in_their_shardings(tmp_path):
    tensors = write(tmp_path / "m.gguf", "llama", "Q8_0")
    config, whole = gguf_models.load(tmp_path / "m.gguf", jnp.float32)
    mesh = make_mesh({"data": 1, "fsdp": 4, "expert": 1, "tensor": 2})
    wanted = shardings(decoder.abstract(config), mesh, BASE_RULES)
    _, params = gguf_models.load(tmp_path / "m.gguf", jnp.float32, wanted)
    for path, leaf in trees.flatten(params):
        assert leaf.sharding == trees.get(wanted, path), path
        np.testing.assert_array_equal(leaf, trees.get(whole, path), err_msg=path)
    assert np.abs(whole["embed"] - tensors["model.embed_tokens.weight"]).max() < 0.02
    kernels = gguf_models.load(tmp_path / "m.gguf", jnp.float32, quantise="int8")[1]
    want = quantised.quantise(whole, "int8")
    jax.tree.map(np.testing.assert_array_equal, kernels, want)


def test_the_host_never_holds_the_model(tmp_path, monkeypatch):
    """No more than a few tensors of 12 layers at once, and some rows of an embedding."""
    sizes = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=24, vocab_size=4096)
    write(tmp_path / "m.gguf", "llama", "Q8_0", **sizes)
    monkeypatch.setattr(placing, "_PIECE_BYTES", 2**17)
    gguf_models.load(tmp_path / "m.gguf", jnp.float32)  # compilation happens here
    tracemalloc.start()
    gguf_models.load(tmp_path / "m.gguf", jnp.float32)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    model = 4 * (2 * 4096 * 128 + 24 * 128 * (3 * 256 + 3 * 128))
    assert peak < model / 10


def config_of(path):
    return gguf_models.describe(open_gguf(path))[1]


def test_divisors_of_rotary_frequencies(tmp_path):
    """Llama 3's, as a tensor, and Phi-3's two, with the factor on cos and sin."""
    ones = np.linspace(1, 8, 8, dtype=np.float32)

    def add(name, values):
        return lambda writer: writer.add_tensor(name, np.asarray(values, np.float32))

    write(tmp_path / "llama.gguf", "llama", more=add("rope_freqs.weight", ones))
    scaling = config_of(tmp_path / "llama.gguf").rope_scaling
    assert (scaling.kind, scaling.attention_factor) == ("longrope", 1.0)
    assert scaling.short_factor == scaling.long_factor == tuple(map(float, ones))

    def phi(writer):
        add("rope_factors_long.weight", 3 * ones)(writer)
        add("rope_factors_short.weight", 2 * ones)(writer)
        writer.add_rope_scaling_orig_ctx_len(16)
        writer.add_rope_scaling_attn_factors(1.25)

    write(tmp_path / "phi.gguf", "phi3", more=phi)
    scaling = config_of(tmp_path / "phi.gguf").rope_scaling
    assert (scaling.original_max_positions, scaling.attention_factor) == (16, 1.25)
    assert scaling.short_factor == tuple(2.0 * ones) and scaling.long_factor == tuple(3.0 * ones)


def test_a_factor_alone_scales_all_frequencies_alike(tmp_path):
    """As llama.cpp reads it: without a type it is linear, and 0 is as good as none."""
    found = {}
    for factor in (0.0, 1.0, 4.0):
        path = tmp_path / f"{factor}.gguf"
        write(path, "llama", more=lambda w, x=factor: w.add_rope_scaling_factor(x))
        found[factor] = config_of(path).rope_scaling
    write(tmp_path / "no.gguf", "llama", more=lambda w: w.add_rope_scaling_type(LINEAR))
    assert found[0.0] is found[1.0] is config_of(tmp_path / "no.gguf").rope_scaling is None
    assert (found[4.0].kind, found[4.0].factor) == ("linear", 4.0)


@pytest.mark.parametrize("field", ["attention.sliding_window_pattern", "rope.freq_base_swa"])
@pytest.mark.parametrize("name", ["gemma2", "phi3"])
def test_fields_that_the_architecture_does_not_read(name, field, tmp_path):
    write(tmp_path / "m.gguf", name, more=lambda w: w.add_uint32(f"{name}.{field}", 3))
    refused(tmp_path / "m.gguf", f"{name}.{field}: 3 is not supported")


def test_yarn_and_a_pattern_of_windows(tmp_path):
    def yarn(writer):
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(16)

    write(tmp_path / "yarn.gguf", "qwen2", more=yarn)
    scaling = config_of(tmp_path / "yarn.gguf").rope_scaling
    assert (scaling.kind, scaling.factor, scaling.original_max_positions) == ("yarn", 4.0, 16)
    pattern = "gemma3.attention.sliding_window_pattern"
    write(tmp_path / "two.gguf", "gemma3", more=lambda w: w.add_uint32(pattern, 2))
    assert config_of(tmp_path / "two.gguf").windows == (5, 0) * 3
    listed = [True, False, False, True, True, False]
    write(tmp_path / "list.gguf", "gemma3", more=lambda w: w.add_array(pattern, listed))
    assert config_of(tmp_path / "list.gguf").windows == (5, 0, 0, 5, 5, 0)


def refused(path, message):
    with pytest.raises(UserError, match=message) as error:
        open_base(str(path), "", {}, 0)
    assert str(error.value).startswith(str(path))
    with pytest.raises(UserError):
        gguf_models.load(path)


LINEAR = gguf.RopeScalingType.LINEAR
FIELD = {
    "another-architecture": (
        lambda w: w.add_key_value("general.architecture", "mamba", gguf.GGUFValueType.STRING),
        "general.architecture: 'mamba' is none of llama, qwen2",
    ),
    "experts": (lambda w: w.add_expert_count(8), "llama.expert_count: 8 is not supported"),
    "absurd-layers": (
        lambda w: w.add_key_value("llama.block_count", 2**31, gguf.GGUFValueType.UINT32),
        "num_hidden_layers: 2147483648 is absurd",
    ),
    "unlike-heads": (
        lambda w: w.add_key_value("llama.attention.value_length", 8, gguf.GGUFValueType.UINT32),
        "llama.attention.value_length: must be attention.key_length, 16",
    ),
    "no-number": (
        lambda w: w.add_key_value("llama.block_count", "3", gguf.GGUFValueType.STRING),
        "llama.block_count: '3' is not of the type",
    ),
    "half-rotated": (lambda w: w.add_rope_dimension_count(8), "partial_rotary_factor: 0.5"),
    "split": (lambda w: w.add_uint16("split.count", 3), "split.count: one of several files"),
    "later-part": (
        lambda w: (w.kv_data[0].clear(), w.add_uint16("split.count", 3)),
        "split.count: one of several files",
    ),
    "both-ways": (
        lambda w: w.add_causal_attention(False),
        "llama.attention.causal: False is not supported",
    ),
    "no-heads": (
        lambda w: w.add_key_value("llama.attention.head_count", 0, gguf.GGUFValueType.UINT32),
        "llama.attention.head_count: 0 is below 1",
    ),
    "no-width": (
        lambda w: w.add_key_value("llama.attention.key_length", 0, gguf.GGUFValueType.UINT32),
        "llama.attention.key_length: 0 is below 1",
    ),
    "divisors-of-rows": (
        lambda w: w.add_tensor("rope_freqs.weight", np.ones((2, 8), np.float32)),
        "rope_freqs.weight: 2 dimensions, not one",
    ),
    "divisors-of-nothing": (
        lambda w: w.add_tensor("rope_freqs.weight", np.array([1, 0] * 4, np.float32)),
        "rope_freqs.weight: its values must be finite and above 0",
    ),
    "divisors-and-scaling": (
        lambda w: (w.add_tensor("rope_freqs.weight", np.ones(8, np.float32)),
                   w.add_rope_scaling_factor(4.0)),
        r"rope.scaling.type: 'linear' beside divisors",
    ),
    "scaled-attention": (
        lambda w: w.add_rope_scaling_attn_factors(1.5),
        "rope.scaling.attn_factor: 1.5 with 'none'",
    ),
    "pattern-of-another": (
        lambda w: w.add_uint32("llama.attention.sliding_window_pattern", 3),
        "llama.attention.sliding_window_pattern: 3 is not supported",
    ),
    "strange-scaling": (
        lambda w: w.add_string("llama.rope.scaling.type", "ntk"),
        "rope_scaling: 'ntk' is none of",
    ),
    "more-layers": (
        lambda w: w.add_key_value("llama.block_count", 4, gguf.GGUFValueType.UINT32),
        "9 problems\n  blk.3.attn_q.weight: missing",
    ),
    "wider": (
        lambda w: w.add_key_value("llama.feed_forward_length", 128, gguf.GGUFValueType.UINT32),
        r"blk.0.ffn_gate.weight: shape \(96, 64\), the fields ask for \(128, 64\)",
    ),
    "unknown-tensor": (
        lambda w: w.add_tensor("blk.0.extra.weight", np.ones((4, 32), np.float32)),
        "blk.0.extra.weight: unknown to this architecture",
    ),
    "unknown-kind": (
        lambda w: w.add_tensor("x", np.zeros((4, 50), np.uint8),
                               raw_dtype=gguf.GGMLQuantizationType.IQ1_S),
        "tensor x is of kind IQ1_S, which is none of F32",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FIELD)
def test_files_that_are_not_understood(name, tmp_path):
    more, message = FIELD[name]

    def replace(writer):
        writer.add_key_value = lambda key, *rest: (
            [fields.pop(key, None) for fields in writer.kv_data],
            gguf.GGUFWriter.add_key_value(writer, key, *rest),
        )
        more(writer)

    write(tmp_path / "m.gguf", "llama", more=replace)
    refused(tmp_path / "m.gguf", message)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    write(path, "llama", hidden_size=32, intermediate_size=32, num_hidden_layers=1, vocab_size=8)
    return path.read_bytes()


def at(content, name, skip):
    """The place so many bytes behind a text of the header."""
    return content.index(name.encode()) + len(name) + skip


LIES = {
    "magic": (lambda c: b"GGML" + c[4:], "not a GGUF file"),
    "empty": (lambda c: b"", "not a GGUF file"),
    "version": (lambda c: c[:4] + struct.pack("<I", 1) + c[8:], "GGUF version 1 is none of"),
    "other-byte-order": (lambda c: c[:4] + struct.pack(">I", 3) + c[8:], "GGUF version 50331648"),
    "tensors": (lambda c: c[:8] + struct.pack("<Q", 2**61) + c[16:], "more than the file can hold"),
    "fields": (lambda c: c[:16] + struct.pack("<Q", 2**40) + c[24:], "more than the file can hold"),
    "header-cut": (lambda c: c[:200], "truncated or damaged"),
    "numbers-cut": (lambda c: c[:-5], r"tensor \S+ ends at byte \d+ of \d+"),
    "text-length": (
        lambda c: c[:24] + struct.pack("<Q", 2**50) + c[32:],
        "1125899906842624 bytes are announced",
    ),
    "offset": (
        lambda c: put(c, at(c, "blk.0.ffn_up.weight", 4 + 8 + 8 + 4), "<Q", 2**40),
        "tensor blk.0.ffn_up.weight ends at byte",
    ),
    "offset-between": (
        lambda c: put(c, at(c, "blk.0.ffn_up.weight", 4 + 8 + 8 + 4), "<Q", 7),
        "tensor blk.0.ffn_up.weight of kind F32: shape .* offset 7",
    ),
    "offset-shared": (
        lambda c: put(c, at(c, "blk.0.ffn_up.weight", 4 + 8 + 8 + 4), "<Q", 0),
        "tensors .* share bytes",
    ),
    "shape": (
        lambda c: put(c, at(c, "blk.0.ffn_up.weight", 4), "<Q", 2**62),
        "blk.0.ffn_up.weight ends at byte",
    ),
    "no-rows": (
        lambda c: put(c, at(c, "blk.0.ffn_up.weight", 4), "<Q", 0),
        r"blk.0.ffn_up.weight of kind F32: shape \(32, 0\)",
    ),
    "dimensions": (
        lambda c: put(c, at(c, "blk.0.ffn_up.weight", 0), "<I", 2**31),
        "ffn_up.weight has 2147483648 dimensions",
    ),
    "kind": (
        lambda c: put(c, at(c, "blk.0.ffn_up.weight", 4 + 16), "<I", 77),
        "blk.0.ffn_up.weight is of kind 77",
    ),
    "twice": (
        lambda c: c.replace(b"blk.0.ffn_up.weight", b"output_norm.weight\0"[:19]),
        "there twice|missing",
    ),
    "field-type": (
        lambda c: put(c, at(c, "llama.block_count", 0), "<I", 99),
        "a field of type 99",
    ),
    "not-utf8": (lambda c: c.replace(b"llama.block_count", b"\xff" * 17), "is not UTF-8"),
}


def put(content, where, code, value):
    return content[:where] + struct.pack(code, value) + content[where + struct.calcsize(code) :]


@pytest.mark.parametrize("name", LIES)
def test_files_that_lie(name, small, tmp_path):
    change, message = LIES[name]
    (tmp_path / "m.gguf").write_bytes(change(small))
    refused(tmp_path / "m.gguf", message)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 1500), st.integers(1, 8), st.binary(min_size=8, max_size=8))
def test_damage_anywhere_in_a_header_is_an_error_or_harmless(small, where, size, noise):
    content = small[:where] + noise[:size] + small[where + size :]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.gguf"
        path.write_bytes(content)
        try:
            open_base(str(path), "", {}, 0)
        except UserError as error:
            assert "\n\n" not in str(error)


def test_nothing_there(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        open_base(str(tmp_path / "absent.gguf"), "", {}, 0)
