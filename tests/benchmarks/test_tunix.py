"""google-tunix's step is ours: the same loss and gradient from the same weights."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from benchmarks import variants
from medmoe_jax.base.execution import Execution
from tests.naive import TINY, random_params, rel

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("qkv_bias", [True, False], ids=["qwen2", "llama"])
def test_the_frozen_steps_agree(qkv_bias):
    from benchmarks.tunix_peer import tunix_variant

    config = dataclasses.replace(TINY, tied=True, qkv_bias=qkv_bias)
    params, batch = random_params(config), variants.make_batch(config, 2, 8)
    run, carry, theirs = tunix_variant(config, params, (2, 8))
    with jax.numpy_rank_promotion("allow"):
        grad, loss = run(carry, theirs, batch)
    want_grad, want = variants.frozen_step(
        config, Execution(), jnp.zeros((2, 8, config.d_model)), params, batch
    )
    assert rel(loss, want) < 1e-5
    assert rel(grad, want_grad) < 1e-4
