"""Sharding rules: every leaf has one, and optimiser states follow their parameters."""

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import PartitionSpec as P

from medmoe_jax.adapters import bank
from medmoe_jax.adapters.bank import BankSpec
from medmoe_jax.base import decoder
from medmoe_jax.base.config import DecoderConfig, site_shapes
from medmoe_jax.errors import UserError
from medmoe_jax.mesh_axes import AXES
from medmoe_jax.parallel.mesh import make_mesh
from medmoe_jax.parallel.rules import (
    BANK_RULES,
    BASE_RULES,
    RULES,
    describe,
    path_name,
    placed,
    row_parallel,
    rules_for,
    shardings,
    spec_for,
    state_shardings,
    undivided,
)
from medmoe_jax.training.summary import print_undivided

CONFIG = DecoderConfig(
    vocab_size=32, d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=4, d_ff=24,
    qkv_bias=True, o_bias=True, mlp_bias=True, qk_norm=True, post_norms=True,
)  # fmt: skip
SPEC = BankSpec(
    "noise", tuple(site_shapes(CONFIG)), 0, 2, experts=4, rank=2, gate="token", learned_scale=True
)
SHARD = ("fsdp", "expert", "sequence")
REST = ("fsdp", "sequence")


@pytest.fixture(scope="module")
def mesh():
    return make_mesh({"data": 1, "fsdp": 4, "expert": 1, "tensor": 2})


@pytest.mark.parametrize(
    ("name", "shape", "want"),
    [
        ("embed", (32, 16), P(("tensor",), SHARD)),
        ("head", (32, 16), P(("tensor",), SHARD)),
        ("base.head", (32, 16), P(("tensor",), SHARD)),
        ("final_norm", (16,), P()),
        ("layers.attn_post_norm", (2, 16), P()),
        ("layers.attn.q_norm", (2, 4), P()),
        ("layers.attn.q.kernel", (2, 16, 16), P(None, SHARD, ("tensor",))),
        ("layers.attn.k.bias", (2, 8), P(None, ("tensor",))),
        ("layers.mlp.up.bias", (2, 24), P(None, ("tensor",))),
        ("layers.mlp.down.bias", (2, 16), P()),
        ("layers.mlp.up.kernel", (2, 16, 24), P(None, SHARD, ("tensor",))),
        ("layers.attn.o.kernel", (2, 16, 16), P(None, ("tensor",), SHARD)),
        ("layers.mlp.up.kernel.codes", (2, 32, 24), P(None, SHARD, ("tensor",))),
        ("layers.mlp.up.kernel.scale", (2, 1, 24), P(None, None, ("tensor",))),
        ("layers.mlp.down.kernel.scale", (2, 2, 16), P(None, ("tensor",), SHARD)),
        ("layers.mlp.down.kernel", (2, 24, 16), P(None, ("tensor",), SHARD)),
        ("banks.b.attn.q.lora_a", (2, 16, 4, 2), P(None, SHARD, None, None)),
        ("banks.b.mlp.gate.lora_b", (2, 4, 2, 24), P(None, None, None, ("tensor", *SHARD))),
        ("banks.b.mlp.down.lora_a", (2, 24, 4, 2), P(None, ("tensor", *SHARD), None, None)),
        ("banks.b.attn.o.lora_b", (2, 4, 2, 16), P(None, None, None, SHARD)),
        ("banks.b.mlp.down.scale", (2, 4, 2), P()),
        ("banks.b.mlp.up.router.kernel", (2, 16, 4), P()),
        # 6 does not divide by fsdp 4, 5 not by tensor 2: left whole.
        ("layers.attn.q.kernel", (2, 6, 5), P(None, None, None)),
        ("embed", (31, 16), P(None, SHARD)),
    ],
)
def test_specs(name, shape, want, mesh):
    assert spec_for(name, shape, mesh, RULES) == want


@pytest.mark.parametrize(
    ("site", "a", "b"),
    [
        ("attn.q", (REST, "expert", None), ("expert", None, ("tensor", *REST))),
        ("mlp.gate", (REST, "expert", None), ("expert", None, ("tensor", *REST))),
        ("attn.o", (("tensor", *REST), "expert", None), ("expert", None, REST)),
        ("mlp.down", (("tensor", *REST), "expert", None), ("expert", None, REST)),
    ],
)
def test_experts_that_tokens_travel_to_lie_on_the_expert_axis(site, a, b):
    mesh = make_mesh({"data": 1, "fsdp": 2, "expert": 2, "tensor": 2})
    wrapped = [
        P(None, *((axis,) if isinstance(axis, str) else axis for axis in axes)) for axes in (a, b)
    ]
    shapes = {"lora_a": (2, 16, 4, 2), "lora_b": (2, 4, 2, 16)}
    for (leaf, shape), want in zip(shapes.items(), wrapped, strict=True):
        name = f"banks.b.{site}.{leaf}"
        assert spec_for(name, shape, mesh, rules_for("all_to_all")) == want
        for other in ("stacked", "grouped", "auto"):
            assert spec_for(name, shape, mesh, rules_for(other)) == spec_for(
                name, shape, mesh, RULES
            )
    assert row_parallel(site) == ("tensor" in a[0])
    kernel = f"layers.{site}.kernel"
    rules = rules_for("all_to_all")
    assert spec_for(kernel, (2, 16, 16), mesh, rules) == spec_for(kernel, (2, 16, 16), mesh, RULES)


def test_trailing_axes_are_left_off_first():
    mesh = make_mesh({"data": 1, "fsdp": 2, "expert": 4, "tensor": 1})
    spec = spec_for("layers.mlp.up.kernel", (2, 6, 24), mesh, RULES)
    assert spec == P(None, ("fsdp",), ("tensor",))


def test_every_leaf_has_a_rule(mesh):
    for config in (CONFIG, CONFIG.replace(tied=True)):
        tree = decoder.abstract(config)
        table = list(describe(tree, shardings(tree, mesh, BASE_RULES)))
        assert len(table) == len(jax.tree.leaves(tree))
        small = ("norm", "o.bias", "down.bias")
        big = [path for path, shape, _ in table if len(shape) > 1 and not path.endswith(small)]
        whole = [path for path, _, spec in table if "fsdp" not in spec and "tensor" not in spec]
        assert not set(big) & set(whole)
    banks = {"noise": bank.abstract(SPEC, CONFIG)}
    table = list(describe(banks, shardings(banks, mesh, BANK_RULES)))
    assert {p.rsplit(".", 1)[1] for p, _, _ in table} == {
        "lora_a", "lora_b", "scale", "kernel", "bias",
    }  # fmt: skip


def test_an_unknown_leaf_is_an_error(mesh):
    with pytest.raises(
        UserError, match=r"no sharding rule matches parameter 'layers\.mlp\.gate\.wat'"
    ):
        shardings({"layers": {"mlp": {"gate": {"wat": jnp.zeros(2)}}}}, mesh, RULES)


def test_optimiser_state_follows_its_parameter(mesh):
    base = decoder.abstract(CONFIG)
    tree = {
        "banks": {"noise": bank.abstract(SPEC, CONFIG)},
        "base": {"embed": base["embed"], "layers": {"mlp": base["layers"]["mlp"]}},
    }
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(lambda step: 1e-3))
    state = jax.eval_shape(optimiser.init, tree)
    placed = state_shardings(state, mesh, RULES)
    of_parameter = {
        path_name(path): s.spec
        for path, s in jax.tree_util.tree_leaves_with_path(shardings(tree, mesh, RULES))
    }
    seen = 0
    for path, sharding in jax.tree_util.tree_leaves_with_path(placed):
        name = path_name(path)
        for moment in (".mu.", ".nu."):
            if moment in name:
                assert sharding.spec == of_parameter[name.split(moment)[1]], name
                seen += 1
        if "count" in name:
            assert sharding.spec == P()
    assert seen == 2 * len(of_parameter)
    assert any(len(spec) for spec in of_parameter.values())
    assert set(mesh.axis_names) == set(AXES)


def test_what_is_whole_for_want_of_a_divisor(mesh):
    shapes = {
        "embed": (31, 16),  # a vocabulary that tensor 2 does not divide: twice 31 x 16 / 8
        "layers": {
            "attn": {"q": {"kernel": (2, 16, 16)}},  # divides
            "mlp": {"up": {"kernel": (2, 6, 5)}},  # neither does: all eight parts of 60
            "attn_norm": (2, 16),  # meant to be whole
        },
    }
    tree = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )
    tree = placed(tree, shardings(tree, mesh, RULES))
    bf16 = 2
    embed = bf16 * (31 * 16 // 4 - 31 * 16 // 8)
    kernel = bf16 * (60 - 60 / 8)
    assert undivided(tree, RULES) == {"embed": embed, "layers.mlp.up.kernel": kernel}


@pytest.mark.parametrize(("rows", "told"), [(2**21, False), (2**22 + 2**20, True)])
def test_a_large_one_is_told_of(rows, told, mesh, capsys):
    tree = {"embed": jax.ShapeDtypeStruct((rows, 9), jnp.float32)}  # 4 does not divide 9
    tree = placed(tree, shardings(tree, mesh, RULES))
    print_undivided(tree, RULES)
    said = " ".join(capsys.readouterr().err.split())
    assert said.startswith("run.mesh: 0.07 GiB a device are widths") == told
    assert ("most of all embed" in said) == told
