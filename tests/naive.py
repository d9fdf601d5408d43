"""Plain float64 numpy twins of the model, written from the formulas with loops.

They share no code with the library but the configuration classes. Axes: B rows, T tokens.
"""

import jax
import jax.numpy as jnp
import numpy as np

from medmoe_jax.base import decoder
from medmoe_jax.base.config import DecoderConfig

TINY = DecoderConfig(
    vocab_size=29, d_model=16, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=6, d_ff=20
)
SWITCHES = {
    "plain": {},
    "qkv_bias": {"qkv_bias": True},
    "qk_norm": {"qk_norm": True},
    "post_norms": {"post_norms": True},
    "norm_offset": {"norm_offset": 1.0},
    "scales": {"embed_scale": 2.5, "query_scale": 0.7},
    "attn_softcap": {"attn_softcap": 1.5},
    "final_softcap": {"final_softcap": 2.0},
    "tied": {"tied": True},
    "windows": {"windows": (3, 0, 2)},
    "biases": {"o_bias": True, "mlp_bias": True},
    "norms_after": {"qk_norm": True, "qk_norm_whole": True, "pre_norms": False, "post_norms": True},
    "multipliers": {"residual_scale": 0.3, "output_scale": 0.25},
    "ropes": {"ropes": ("local", "none", "global"), "local_rope_theta": 5.0},
    "rotary_dim": {"rotary_dim": 4},
    "gelu": {"activation": "gelu_tanh"},
    "vocab_used": {"vocab_used": 23},
    "all": {
        "qkv_bias": True,
        "qk_norm": True,
        "post_norms": True,
        "norm_offset": 1.0,
        "embed_scale": 2.5,
        "query_scale": 0.7,
        "attn_softcap": 1.5,
        "final_softcap": 2.0,
        "tied": True,
        "windows": (3, 0, 2),
        "o_bias": True,
        "mlp_bias": True,
        "residual_scale": 0.6,
        "output_scale": 0.5,
        "ropes": ("local", "global", "none"),
        "local_rope_theta": 5.0,
        "rotary_dim": 4,
        "activation": "gelu_tanh",
        "vocab_used": 23,
    },
}


def rel(a, b) -> float:
    """max|a - b| / max|b|."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape, (a.shape, b.shape)
    return np.abs(a - b).max() / max(np.abs(b).max(), 1e-30)


def tree_rel(a, b) -> float:
    """The largest `rel` over the leaves of two equal trees."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(rel(x, y) for x, y in pairs)


def f64(tree):
    """A tree as float64 numpy arrays."""
    return jax.tree.map(
        lambda x: np.asarray(
            jnp.asarray(x).astype(jnp.float32) if getattr(x, "dtype", None) == jnp.bfloat16 else x,
            np.float64,
        ),
        tree,
    )


def random_params(config, seed=0, dtype=jnp.float32):
    """A base in which every leaf matters: kernels of unit gain, biases and norms off their rest."""
    rng = np.random.default_rng(seed)

    def leaf(path, struct):
        name = path[-1].key
        if "norm" in name:
            value = 1.0 - config.norm_offset + 0.3 * rng.standard_normal(struct.shape)
        elif name == "kernel":
            value = rng.standard_normal(struct.shape) * struct.shape[-2] ** -0.5
        else:
            value = 0.5 * rng.standard_normal(struct.shape)
        return jnp.asarray(value, dtype)

    return jax.tree_util.tree_map_with_path(leaf, decoder.abstract(config))


def pack(samples, rows, length):
    """Samples (lists of ids) laid one after another into rows: the four arrays of a batch.

    `rows` lists, for each row, the indices of its samples.
    """
    shape = (len(rows), length)
    batch = {k: np.zeros(shape, np.int32) for k in ("tokens", "segment_ids", "positions")}
    where = {}
    for b, members in enumerate(rows):
        start = 0
        for n, i in enumerate(members):
            span = slice(start, start + len(samples[i]))
            batch["tokens"][b, span] = samples[i]
            batch["segment_ids"][b, span] = n + 1
            batch["positions"][b, span] = np.arange(len(samples[i]))
            where[i] = (b, span)
            start += len(samples[i])
        assert start <= length
    return batch, where


def random_batch(config, rows=((5, 4, 2), (9,)), length=11, seed=1):
    """A packed batch of random ids from sample lengths a row, with padding at the ends."""
    rng = np.random.default_rng(seed)
    top = config.vocab_used or config.vocab_size
    samples, index = [], []
    for lengths in rows:
        index.append(range(len(samples), len(samples) + len(lengths)))
        samples += [rng.integers(1, top, n) for n in lengths]
    batch, _ = pack(samples, index, length)
    batch["loss_mask"] = rng.integers(0, 4, batch["tokens"].shape).clip(0, 1).astype(np.int32)
    return batch


def norm(x, weight, config):
    """RMSNorm."""
    rms = np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps)
    return x / rms * (weight + config.norm_offset)


def rotate(x_TxHxh, positions_T, inv_freq_F, factor=1.0):
    """RoPE, one pair (i, i + h/2) at a time."""
    out = np.empty_like(x_TxHxh)
    half = len(inv_freq_F)
    out[..., 2 * half :] = x_TxHxh[..., 2 * half :]
    for t, p in enumerate(positions_T):
        for i in range(half):
            c, s = factor * np.cos(p * inv_freq_F[i]), factor * np.sin(p * inv_freq_F[i])
            a, b = x_TxHxh[t, :, i], x_TxHxh[t, :, i + half]
            out[t, :, i], out[t, :, i + half] = a * c - b * s, b * c + a * s
    return out


def attention(q_TxHxh, k_TxKxh, v_TxKxh, segments_T, positions_T, window, scale, cap):
    """One row, one head, one query, one key at a time; padding queries give zero."""
    T, H, _ = q_TxHxh.shape
    out = np.zeros_like(q_TxHxh)
    for t in range(T):
        for n in range(H):
            kv = n // (H // k_TxKxh.shape[1])
            scores, values = [], []
            for s in range(T):
                if segments_T[s] != segments_T[t] or segments_T[t] == 0:
                    continue
                if positions_T[s] > positions_T[t]:
                    continue
                if window and positions_T[t] - positions_T[s] >= window:
                    continue
                z = scale * (q_TxHxh[t, n] @ k_TxKxh[s, kv])
                scores.append(cap * np.tanh(z / cap) if cap else z)
                values.append(v_TxKxh[s, kv])
            if scores:
                w = np.exp(np.array(scores) - max(scores))
                out[t, n] = (w / w.sum()) @ np.array(values)
    return out


def activate(config, x):
    """SiLU or the tanh form of GELU."""
    if config.activation == "silu":
        return x / (1 + np.exp(-x))
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def bare(layer, site, x, weight):
    """A linear layer without banks."""
    del layer, site
    return x @ weight["kernel"] + weight.get("bias", 0.0)


def logits(config, params, batch, linear=bare):
    """Logits `[B, T, V]` in float64; `linear(layer, site, x_TxD, weight)` may be replaced."""
    p = f64(params)
    out = []
    for ids, segments, positions in zip(
        batch["tokens"], batch["segment_ids"], batch["positions"], strict=True
    ):
        x = config.embed_scale * p["embed"][ids]
        for i in range(config.n_layers):
            w = jax.tree.map(lambda leaf, i=i: leaf[i], p["layers"])
            x = _block(config, w, i, x, segments, positions, linear)
        x = config.output_scale * norm(x, p["final_norm"], config)
        z = x @ (p["embed"] if config.tied else p["head"]).T
        if config.final_softcap:
            z = config.final_softcap * np.tanh(z / config.final_softcap)
        if config.vocab_used:
            z[:, config.vocab_used :] = -1e30
        out.append(z)
    return np.stack(out)


def _head_norm(x_TxHxh, weight, config):
    """Each head alone, or all of a token's as one vector."""
    if config.qk_norm_whole:
        return norm(x_TxHxh.reshape(len(x_TxHxh), -1), weight, config).reshape(x_TxHxh.shape)
    return norm(x_TxHxh, weight, config)


def _inv_freq(config, i):
    r = config.rotary_dim or config.head_dim
    kind = config.ropes[i] if config.ropes else "global"
    theta = {"global": config.rope_theta, "local": config.local_rope_theta, "none": np.inf}[kind]
    return np.array([theta ** (-2 * n / r) if np.isfinite(theta) else 0 for n in range(r // 2)])


def _block(config, w, i, x, segments, positions, linear):
    T, h = len(x), config.head_dim

    def before(x, name):
        return norm(x, w[name], config) if config.pre_norms else x

    def after(y, name):
        return config.residual_scale * (norm(y, w[name], config) if config.post_norms else y)

    u = before(x, "attn_norm")
    q, k, v = (linear(i, f"attn.{n}", u, w["attn"][n]).reshape(T, -1, h) for n in "qkv")
    if config.qk_norm:
        q, k = (_head_norm(y, w["attn"][f"{n}_norm"], config) for n, y in (("q", q), ("k", k)))
    q, k = (rotate(y, positions, _inv_freq(config, i)) for y in (q, k))
    window = config.windows[i] if config.windows else 0
    scale = config.query_scale or h**-0.5
    y = attention(q, k, v, segments, positions, window, scale, config.attn_softcap)
    x = x + after(linear(i, "attn.o", y.reshape(T, -1), w["attn"]["o"]), "attn_post_norm")
    u = before(x, "mlp_norm")
    gate, up = (linear(i, f"mlp.{n}", u, w["mlp"][n]) for n in ("gate", "up"))
    y = linear(i, "mlp.down", activate(config, gate) * up, w["mlp"]["down"])
    return x + after(y, "mlp_post_norm")


def nll(config, params, batch, linear=bare):
    """Σ −log p(next token) over the tokens whose mask is set and that do not start a segment."""
    z = logits(config, params, batch, linear)
    total = 0.0
    for b, (ids, segments, mask) in enumerate(
        zip(batch["tokens"], batch["segment_ids"], batch["loss_mask"], strict=True)
    ):
        for t in range(1, len(ids)):
            if mask[t] and segments[t] and segments[t] == segments[t - 1]:
                row = z[b, t - 1]
                top = row.max()
                total -= row[ids[t]] - top - np.log(np.exp(row - top).sum())
    return total


def router_gates(x_D, router, i, top_k, renormalise, margin):
    """Gates `[E]` of one token; asserts that the choice is not a near-tie."""
    z = x_D @ router["kernel"][i] + (router["bias"][i] if "bias" in router else 0.0)
    order = np.argsort(-z, kind="stable")
    if top_k < len(z):
        assert z[order[top_k - 1]] - z[order[top_k]] > margin, "near-tie in the test's inputs"
    p = np.exp(z - z.max())
    p /= p.sum()
    gates = np.zeros_like(z)
    gates[order[:top_k]] = p[order[:top_k]]
    return gates / gates.sum() if renormalise else gates


def adapted(specs, banks, scales=None, margin=1e-3):
    """A `linear` with banks: one token and one expert at a time.

    `scales` replaces `{bank: s}`; s is worked out here, not taken from the library. `margin` is
    the least distance between logits on either side of the top-k cut, asserted for every token.
    """
    banks = f64(banks)

    def linear(layer, site, x_TxD, weight):
        y = bare(layer, site, x_TxD, weight)
        for spec in specs:
            if site not in spec.sites or not spec.start <= layer < spec.stop:
                continue
            p, i = banks[spec.name][site], layer - spec.start
            s = spec.alpha / (np.sqrt(spec.rank) if spec.rank_stabilised else spec.rank)
            s = (scales or {}).get(spec.name, s)
            for t, x_D in enumerate(x_TxD):
                gates = np.ones(spec.experts)
                if spec.gate == "token" and np.any(x_D):
                    gates = router_gates(x_D, p["router"], i, spec.top_k, spec.renormalise, margin)
                for e in range(spec.experts):
                    h = x_D @ p["lora_a"][i, :, e]
                    h = h * p["scale"][i, e] if "scale" in p else h
                    y[t] += s * gates[e] * (h @ p["lora_b"][i, e])
        return y

    return linear


def random_banks(specs, config, seed=3, size=1.0):
    """Banks at random values, large enough to change the model's output by much."""
    from medmoe_jax.adapters import bank

    rng = np.random.default_rng(seed)

    def leaf(path, struct):
        name = path[-1].key
        if name in ("lora_a", "kernel"):
            gain = struct.shape[1] ** -0.5
        elif name == "lora_b":
            gain = size * struct.shape[2] ** -0.5 / 4
        else:
            gain = 1.0
        return jnp.asarray(gain * rng.standard_normal(struct.shape), jnp.float32)

    return {
        spec.name: jax.tree_util.tree_map_with_path(leaf, bank.abstract(spec, config))
        for spec in specs
    }


def check_gradient(function, tree, gradient, rng, step=1e-6, tolerance=1e-4):
    """Compare every leaf of `gradient` with central differences of a float64 function.

    For each leaf, one random direction: Σ g·d must be the derivative along d, relative to |g||d|.
    """
    tree, gradient = f64(tree), f64(gradient)
    leaves, structure = jax.tree.flatten(tree)
    for n, (leaf, g) in enumerate(zip(leaves, jax.tree.leaves(gradient), strict=True)):
        d = rng.standard_normal(leaf.shape)
        sides = []
        for sign in (1, -1):
            moved = [*leaves]
            moved[n] = leaf + sign * step * d
            sides.append(function(jax.tree.unflatten(structure, moved)))
        slope = (sides[0] - sides[1]) / (2 * step)
        size = np.linalg.norm(g) * np.linalg.norm(d) / np.sqrt(d.size)
        path = jax.tree_util.tree_flatten_with_path(tree)[0][n][0]
        assert size > 0 or abs(slope) < 1e-6, f"{path}: gradient 0, slope {slope}"
        assert abs(slope - (g * d).sum()) <= tolerance * max(size, abs(slope)), (
            f"{path}: {slope} against {(g * d).sum()}, size {size}"
        )
