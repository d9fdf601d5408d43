"""llama2.c files: a real pretrained model against its golden output, and broken files."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medmoe_jax.base import decoder
from medmoe_jax.base.loss import logits
from medmoe_jax.checkpoints import llama2c
from medmoe_jax.errors import UserError

ONES = dict(D=8, F=6, L=3, H=4, K=2, V=5, T=7)


def write(path, *, tied=True, seed=0, **sizes):
    """A random llama2.c file; returns its tensors in the file's order."""
    s = {**ONES, **sizes}
    h = s["D"] // s["H"]
    D, F, L, V, kv = s["D"], s["F"], s["L"], s["V"], s["K"] * h
    shapes = [(V, D), (L, D), (L, D, D), (L, kv, D), (L, kv, D), (L, D, D), (L, D), (L, F, D)]
    shapes += [(L, D, F), (L, F, D), (D,), (s["T"], h // 2), (s["T"], h // 2)]
    shapes += [] if tied else [(V, D)]
    rng = np.random.default_rng(seed)
    tensors = [rng.normal(size=shape).astype("<f4") for shape in shapes]
    header = [D, F, L, s["H"], s["K"], V if tied else -V, s["T"]]
    path.write_bytes(
        np.array(header, "<i4").tobytes() + b"".join(tensor.tobytes() for tensor in tensors)
    )
    return tensors


@pytest.mark.data
def test_stories260k_continues_as_published(data_dir):
    folder = data_dir / "tiny_lm_stories260K"
    golden = json.loads((folder / "derived_golden_greedy.json").read_text())
    config, params = llama2c.load(folder / "stories260K.bin")
    assert (config.n_layers, config.n_heads, config.n_kv_heads, config.d_ff) == (5, 8, 4, 172)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 260_032
    wanted = golden["token_ids"]
    tokens_BxT = jnp.asarray([[golden["start_token"], *wanted[:-1]]])
    positions_BxT = jnp.arange(tokens_BxT.shape[1])[None]
    x_BxTxD, _, _ = decoder.hidden(
        config, params, tokens_BxT, jnp.ones_like(tokens_BxT), positions_BxT
    )
    z_TxV = np.asarray(logits(config, decoder.head(params), x_BxTxD))[0]
    np.testing.assert_allclose(z_TxV[0], golden["first_step_logits"], rtol=0, atol=2e-4)
    # Fed with the continuation itself, a greedy decoder predicts each next token of it.
    assert np.argmax(z_TxV, -1).tolist() == wanted


def test_every_tensor_lands_in_its_place(tmp_path):
    tensors = write(tmp_path / "m.bin", tied=False)
    config, params = llama2c.load(tmp_path / "m.bin")
    assert not config.tied and config.vocab_size == 5 and config.max_positions == 7
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(
        lambda s: s.shape, decoder.abstract(config)
    )
    np.testing.assert_array_equal(params["embed"], tensors[0])
    np.testing.assert_array_equal(params["head"], tensors[-1])
    layers = params["layers"]
    np.testing.assert_array_equal(layers["mlp"]["gate"]["kernel"][2], tensors[7][2].T)
    np.testing.assert_array_equal(layers["mlp"]["down"]["kernel"][1], tensors[8][1].T)
    np.testing.assert_array_equal(layers["mlp"]["up"]["kernel"][0], tensors[9][0].T)
    np.testing.assert_array_equal(layers["mlp_norm"], tensors[6])


def test_rotary_pairs_become_halves(tmp_path):
    tensors = write(tmp_path / "m.bin", D=16, H=2, K=1)
    _, params = llama2c.load(tmp_path / "m.bin")
    # Head 1 of q starts at row 8; its pairs (0, 1), (2, 3), ... become (0, 4), (1, 5), ...
    rows = [8 + r for r in (0, 2, 4, 6, 1, 3, 5, 7)]
    q = params["layers"]["attn"]["q"]["kernel"]
    np.testing.assert_array_equal(q[1, :, 8:], tensors[2][1, rows].T)


def test_dtype_and_tied(tmp_path):
    write(tmp_path / "m.bin")
    config, params = llama2c.load(tmp_path / "m.bin", jnp.bfloat16)
    assert config.tied and "head" not in params
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda data: data[:-4], r"m.bin: \d+ bytes, but its header asks for \d+"),
        (lambda data: data + b"1234", r"m.bin: \d+ bytes, but its header asks for \d+"),
        (lambda data: data[:12], r"m.bin: not a llama2.c file"),
        (lambda data: b"\0" * 64, r"m.bin: not a llama2.c file"),
        (lambda data: np.array([9, 1, 1, 2, 1, 1, 1], "<i4").tobytes(), "width 9, heads 2"),
    ],
)
def test_a_broken_file_is_named(tmp_path, damage, message):
    path = tmp_path / "m.bin"
    write(path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=message):
        llama2c.load(path)


def test_an_absent_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"absent\.bin: no such file"):
        llama2c.load(tmp_path / "absent.bin")
