"""Models as other people write them: plain Flax, nothing of ours.

`Mixer` and `ViT` are NNX, `Transformer` is Linen. Tiny, so that they compile fast.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx


class Mlp(nnx.Module):
    def __init__(self, width, hidden, rngs):
        self.up = nnx.Linear(width, hidden, rngs=rngs)
        self.down = nnx.Linear(hidden, width, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.gelu(self.up(x)))


class MixerBlock(nnx.Module):
    def __init__(self, patches, width, rngs):
        self.norm1 = nnx.LayerNorm(width, rngs=rngs)
        self.tokens = Mlp(patches, 8, rngs)
        self.norm2 = nnx.LayerNorm(width, rngs=rngs)
        self.channels = Mlp(width, 12, rngs)

    def __call__(self, x):
        y = jnp.swapaxes(self.norm1(x), 1, 2)
        x = x + jnp.swapaxes(self.tokens(y), 1, 2)
        return x + self.channels(self.norm2(x))


class Mixer(nnx.Module):
    """MLP-Mixer over `[B, patches, pixels]`; logits `[B, 3]`."""

    def __init__(self, rngs, patches=6, pixels=5, width=8, blocks=1):
        self.embed = nnx.Linear(pixels, width, rngs=rngs)
        self.blocks = nnx.List([MixerBlock(patches, width, rngs) for _ in range(blocks)])
        self.head = nnx.Linear(width, 3, rngs=rngs)

    def __call__(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


class VitBlock(nnx.Module):
    def __init__(self, width, heads, rngs):
        self.norm1 = nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(heads, width, decode=False, rngs=rngs)
        self.norm2 = nnx.LayerNorm(width, rngs=rngs)
        self.mlp = Mlp(width, 12, rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nnx.Module):
    """Vision transformer over `[B, H, W, C]` images; logits `[B, 3]`."""

    def __init__(self, rngs, width=8, heads=2):
        self.patches = nnx.Conv(2, width, (2, 2), strides=(2, 2), rngs=rngs)
        self.block = VitBlock(width, heads, rngs)
        self.head = nnx.Linear(width, 3, rngs=rngs)

    def __call__(self, x):
        x = self.patches(x)
        x = self.block(x.reshape(x.shape[0], -1, x.shape[-1]))
        return self.head(x.mean(1))


class TransformerBlock(nn.Module):
    width: int
    heads: int

    @nn.compact
    def __call__(self, x):
        h = nn.LayerNorm()(x)
        h = nn.MultiHeadDotProductAttention(num_heads=self.heads, name="attention")(h)
        x = x + h
        h = nn.Dense(12, name="up")(nn.LayerNorm()(x))
        return x + nn.Dense(self.width, name="down")(nn.gelu(h))


class Transformer(nn.Module):
    """Encoder over `[B, T]` ids; logits `[B, T, vocabulary]`. Its first block is rematerialised."""

    vocabulary: int = 7
    width: int = 8

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(self.vocabulary, self.width)(ids)
        x = nn.remat(TransformerBlock)(self.width, 2, name="block_0")(x)
        x = TransformerBlock(self.width, 2, name="block_1")(x)
        return nn.Dense(self.vocabulary, name="head")(x)


def images(rows, shape, seed=0):
    """Inputs `[rows, *shape]` and labels of three classes that depend on them."""
    key, other = jax.random.split(jax.random.key(seed))
    x = jax.random.normal(key, (rows, *shape))
    w = jax.random.normal(other, (x[0].size, 3))
    return x, jnp.argmax(x.reshape(rows, -1) @ w, axis=-1)
