"""A whole training step compiled for a TPU slice: routing and the epilogue are Mosaic kernels."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest

from medmoe_jax.adapters import bank as bank_lib
from medmoe_jax.adapters.bank import BankSpec
from medmoe_jax.adapters.model import AdaptedConfig
from medmoe_jax.base import decoder
from medmoe_jax.base.config import DecoderConfig
from medmoe_jax.base.execution import Execution
from medmoe_jax.base.quantised import quantise
from medmoe_jax.kernels.router_equations import Gates
from medmoe_jax.parallel.mesh import batch_sharding, make_mesh, replicated
from medmoe_jax.parallel.rules import RULES, placed, shardings, state_shardings
from medmoe_jax.parallel.topology import compile_for, describe
from medmoe_jax.routing.dispatch import KEPT, strategy
from medmoe_jax.training.step import Objective, TrainState, train_step
from tests import slices

pytestmark = pytest.mark.aot

CONFIG = DecoderConfig(
    vocab_size=512, d_model=256, n_layers=2, n_heads=2, n_kv_heads=2, head_dim=128, d_ff=512,
    tied=True, qkv_bias=True,
)  # fmt: skip
ATTENTION = ("attn.q", "attn.k", "attn.v", "attn.o")
MLP = ("mlp.gate", "mlp.up", "mlp.down")
SPECS = (
    BankSpec("attention", ATTENTION, 0, 2, rank=16),
    BankSpec("noise", MLP, 0, 2, experts=8, rank=16, gate="token", balance_loss=0.01),
    BankSpec("knowledge", MLP, 0, 2, rank=32),
)


@pytest.mark.parametrize(
    ("sizes", "remat", "products", "wider", "kind"),
    [
        # Forward, recomputed and backward, each once a site; the last output is not recomputed.
        # So wide that the kernels ask for more VMEM than a program has unasked.
        ({"fsdp": 8}, "full", 3 * 7 - 1, 8, ""),
        # Four chips share a row's tokens.
        ({"fsdp": 2, "sequence": 4}, "full", 3 * 7 - 1, 2, ""),
        # Kept as products are.
        ({"fsdp": 4, "tensor": 2}, "dots", 2 * 7, 1, ""),
        # A quantised base travels and is read as it is stored.
        ({"fsdp": 4, "tensor": 2}, "dots", 2 * 7, 2, "nf4"),
    ],
)
def test_a_step_holds_the_kernels(sizes, remat, products, wider, kind):
    config = CONFIG.replace(d_model=wider * CONFIG.d_model, d_ff=wider * CONFIG.d_ff)
    slice_ = describe("v5e:2x4")
    mesh = make_mesh({"data": 1, "fsdp": 1, "expert": 1, "tensor": 1, **sizes}, slice_.devices)
    execution = Execution(dtype=jnp.bfloat16, remat=remat, activations=batch_sharding(mesh, 3))
    objective = Objective(AdaptedConfig(config, SPECS, execution, "auto"), specs=SPECS)
    adamw = optax.adamw(1e-4)

    base = decoder.abstract(config, jnp.bfloat16)
    base = jax.eval_shape(functools.partial(quantise, kind=kind), base)
    trainable = {"banks": {s.name: bank_lib.abstract(s, config) for s in SPECS}, "base": {}}
    moments = jax.eval_shape(adamw.init, trainable)
    state = TrainState(
        jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(mesh)),
        placed(trainable, shardings(trainable, mesh, RULES)),
        placed(moments, state_shardings(moments, mesh, RULES)),
    )
    frozen = {"base": placed(base, shardings(base, mesh, RULES)), "banks": {}}
    ids = jax.ShapeDtypeStruct((8, 512), jnp.int32, sharding=batch_sharding(mesh))
    batch = dict.fromkeys(("tokens", "loss_mask", "segment_ids", "positions"), ids)
    step = jax.jit(functools.partial(train_step, objective, adamw), donate_argnums=0)
    calls = slices.kernels_of(compile_for(slice_, step, state, frozen, batch))
    assert calls.count("lora_linear") == products
    assert calls.count("route") == 2 * 3 and calls.count("route_gradients") == 3


@pytest.mark.parametrize(("remat", "products"), [("dots", 3 + 3), ("full", 3 + 2 + 3)])
def test_products_of_experts_are_made_once_where_they_are_kept(remat, products):
    """Forward, again for the backward pass where they are not kept, and backward."""
    slice_ = describe("v5e:1x1")
    mesh = make_mesh({}, slice_.devices)
    grouped = strategy("grouped", Execution(jnp.bfloat16, activations=batch_sharding(mesh, 3)))
    policy = jax.checkpoint_policies.save_only_these_names(*KEPT[remat])

    @functools.partial(jax.checkpoint, policy=policy)
    def layer(x_BxTxD, experts, gates):
        return grouped.ffn(x_BxTxD, gates, experts, jax.nn.silu)

    def loss(*arguments):
        return jnp.sum(layer(*arguments).astype(jnp.float32) ** 2)

    def struct(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=replicated(mesh))

    compiled = compile_for(
        slice_,
        jax.value_and_grad(loss, (0, 1)),
        struct(2, 512, 256),
        {"gate": struct(4, 256, 512), "up": struct(4, 256, 512), "down": struct(4, 512, 256)},
        Gates(
            struct(2, 512, 4, dtype=jnp.float32),
            struct(2, 512, 2, dtype=jnp.int32),
            struct(2, 512, 2, dtype=jnp.float32),
        ),
    )
    assert sum("grouped_product" in name for name in slices.kernels_of(compiled)) == products
