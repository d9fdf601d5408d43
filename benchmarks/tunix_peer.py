"""google-tunix's Qwen2 on our weights, and its frozen step: forward, loss and input gradient.

Axes: B rows, T tokens, D model, V vocabulary.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from tunix.models.qwen2.model import ModelConfig, Qwen2

from benchmarks.variants import Variant
from medmoe_jax.base.config import DecoderConfig


def make_model(config: DecoderConfig, base, dtype=jnp.float32) -> Qwen2:
    """tunix's module with our base's weights, so that both losses can be compared.

    A decoder of the Llama kind is one of the Qwen2 kind without biases, which stay zero.
    """
    shapes = ModelConfig(
        num_layers=config.n_layers,
        vocab_size=config.vocab_size,
        embed_dim=config.d_model,
        hidden_dim=config.d_ff,
        num_heads=config.n_heads,
        head_dim=config.head_dim,
        num_kv_heads=config.n_kv_heads,
        rope_theta=int(config.rope_theta),
        norm_eps=config.norm_eps,
        use_tied_embedding=True,
        dtype=dtype,
        param_dtype=dtype,
    )
    model = Qwen2(shapes, rngs=nnx.Rngs(0))
    model.embedder.input_embedding.value = base["embed"]
    model.final_norm.w.value = base["final_norm"]
    for i, layer in enumerate(model.layers):
        w = jax.tree.map(lambda leaf, i=i: leaf[i], base["layers"])
        layer.input_layernorm.w.value = w["attn_norm"]
        layer.post_attention_layernorm.w.value = w["mlp_norm"]
        for name in ("q", "k", "v", "o"):
            site = getattr(layer.attn, f"{name}_proj")
            site.w.value = w["attn"][name]["kernel"].reshape(site.w.value.shape)
        for name in ("q", "k", "v") if config.qkv_bias else ():
            getattr(layer.attn, f"{name}_bias").value = w["attn"][name]["bias"]
        for name in ("gate", "up", "down"):
            getattr(layer.mlp, f"{name}_proj").kernel.value = w["mlp"][name]["kernel"]
    return model


def tunix_variant(config: DecoderConfig, base, shape: tuple[int, int]) -> Variant:
    """As `variants.frozen_variant`."""
    graph, params = nnx.split(make_model(config, base))

    def loss(x_BxTxD, params, batch):
        model = nnx.merge(graph, params)
        # The module looks tokens up itself: give it what it would find.
        object.__setattr__(model.embedder, "encode", lambda tokens: x_BxTxD)
        T = x_BxTxD.shape[1]
        causal_BxTxT = jnp.broadcast_to(jnp.tril(jnp.ones((T, T), bool)), (len(x_BxTxD), T, T))
        z_BxTxV, _ = model(batch["tokens"], batch["positions"], None, causal_BxTxT)
        losses = optax.softmax_cross_entropy_with_integer_labels(
            z_BxTxV[:, :-1], batch["tokens"][:, 1:]
        )
        return losses.mean()

    @functools.partial(jax.jit, donate_argnums=0)
    def run(carry, params, batch):
        x_BxTxD = params.embedder.input_embedding.value[batch["tokens"]]
        value, grad = jax.value_and_grad(loss)(x_BxTxD, params, batch)
        return carry.at[:].set(grad), value

    return Variant(run, jnp.zeros((*shape, config.d_model)), params)
