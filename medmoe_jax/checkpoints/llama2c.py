"""Small Llama models in the llama2.c format, version 0.

Axes: L layers, V vocabulary, D model, F feed-forward, H query heads, K key/value heads, h head
dimension, T positions.

The file is seven little-endian int32 (D, F, L, H, K, V, T; V is negative when the head is not
tied), then float32 tensors, of which two rotary tables are skipped. It rotates the pairs
(2i, 2i+1) of a head; the decoder rotates (i, i + h/2), so the rows of q and k are permuted.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from medmoe_jax.base import trees
from medmoe_jax.base.config import DecoderConfig
from medmoe_jax.errors import UserError

_HEADER = 7
_SKIPPED = "rope"


def read_config(path: str | Path) -> DecoderConfig:
    """The configuration in a file's header. Raises UserError: no such file, not this format."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    with open(path, "rb") as file:
        header = np.fromfile(file, "<i4", _HEADER)
    return _config(path, header)


def load(path: str | Path, dtype: DTypeLike = jnp.float32) -> tuple[DecoderConfig, dict[str, Any]]:
    """Read a llama2.c file.

    Args:
      path: the `.bin` file.
      dtype: of the parameters returned.

    Returns:
      The configuration and the parameter tree of `base.decoder`, on the default device.

    Raises:
      UserError: no such file, not this format, or a size other than the header's.
    """
    path, config = Path(path), read_config(path)
    layout = _layout(config)
    expected = 4 * (_HEADER + sum(math.prod(shape) for _, shape in layout))
    size = path.stat().st_size
    if size != expected:
        raise UserError(f"{path}: {size} bytes, but its header asks for {expected}")
    values = np.memmap(path, "<f4", "r", offset=4 * _HEADER)
    leaves, start = [], 0
    for name, shape in layout:
        stop = start + math.prod(shape)
        if name != _SKIPPED:
            tensor = _to_tree_layout(config, name, values[start:stop].reshape(shape))
            leaves.append((name, jnp.asarray(tensor, dtype)))
        start = stop
    return config, trees.unflatten(leaves)


def _config(path: Path, header: np.ndarray) -> DecoderConfig:
    if len(header) < _HEADER or min(abs(header)) < 1 or min(np.delete(header, 5)) < 1:
        raise UserError(f"{path}: not a llama2.c file of version 0: header {header.tolist()}")
    d, f, layers, heads, kv_heads, vocab, positions = (int(n) for n in header)
    if d % heads or heads % kv_heads:
        raise UserError(
            f"{path}: not a llama2.c file of version 0: width {d}, heads {heads} and {kv_heads}"
        )
    return DecoderConfig(
        vocab_size=abs(vocab),
        d_model=d,
        n_layers=layers,
        n_heads=heads,
        n_kv_heads=kv_heads,
        head_dim=d // heads,
        d_ff=f,
        norm_eps=1e-5,
        tied=vocab > 0,
        max_positions=positions,
    )


def _layout(config: DecoderConfig) -> list[tuple[str, tuple[int, ...]]]:
    """The file's tensors in order: our path and the file's shape."""
    L, D, F, V = config.n_layers, config.d_model, config.d_ff, config.vocab_size
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    rope = (_SKIPPED, (config.max_positions, config.head_dim // 2))
    return [
        ("embed", (V, D)),
        ("layers.attn_norm", (L, D)),
        ("layers.attn.q.kernel", (L, q, D)),
        ("layers.attn.k.kernel", (L, kv, D)),
        ("layers.attn.v.kernel", (L, kv, D)),
        ("layers.attn.o.kernel", (L, D, q)),
        ("layers.mlp_norm", (L, D)),
        ("layers.mlp.gate.kernel", (L, F, D)),
        ("layers.mlp.down.kernel", (L, D, F)),
        ("layers.mlp.up.kernel", (L, F, D)),
        ("final_norm", (D,)),
        rope,
        rope,
        *([] if config.tied else [("head", (V, D))]),
    ]


def _to_tree_layout(config: DecoderConfig, name: str, tensor: np.ndarray) -> np.ndarray:
    if name in ("layers.attn.q.kernel", "layers.attn.k.kernel"):
        L, rows, D = tensor.shape
        pairs = tensor.reshape(L, rows // config.head_dim, config.head_dim // 2, 2, D)
        tensor = np.swapaxes(pairs, 2, 3).reshape(L, rows, D)
    return np.swapaxes(tensor, 1, 2) if name.endswith("kernel") else tensor
