"""Banks inside a Linen transformer that imports nothing of ours."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

from medmoe_jax.adapters import foreign, linen_models
from medmoe_jax.adapters.bank import BankSpec
from medmoe_jax.base import trees
from medmoe_jax.base.seam import Context
from medmoe_jax.errors import UserError
from medmoe_jax.parallel.mesh import make_mesh, replicated
from tests.adapters import foreign_twin
from tests.adapters.other_models import Transformer
from tests.naive import rel, tree_rel

EXPERTS = BankSpec("experts", experts=4, rank=2, gate="token", top_k=2)
PLAIN = BankSpec("plain", rank=3, alpha=3.0)
MODEL = Transformer()
MESH = make_mesh({"data": 2, "fsdp": 4})
IDS = jax.device_put(np.random.default_rng(0).integers(0, 7, (8, 5)), replicated(MESH))


def naive(banks, specs, variables):
    """The model with every layer completed by a loop over experts."""

    def complete(call, args, kwargs, context):
        y, module = call(*args, **kwargs), context.module
        if isinstance(module, nn.Dense | nn.DenseGeneral):
            axes = np.size(getattr(module, "axis", -1))
            y = foreign_twin.of_layer(specs, banks, ".".join(module.path), *args, y, axes)
        return y

    with nn.intercept_methods(complete):
        return MODEL.apply(variables, IDS)


def loss_of(z):
    """The loss of telling which id comes next."""
    ids = jnp.roll(IDS, -1, axis=1)
    return optax.softmax_cross_entropy_with_integer_labels(z, ids).mean()


@pytest.fixture(scope="module")
def transformer():
    """Experts on three layers, one of them with two contracted axes, and a plain bank on all of a
    block; trained for some steps on eight devices."""
    variables = jax.device_put(jax.jit(MODEL.init)(jax.random.key(0), IDS), replicated(MESH))
    run = {"dispatch": "auto", "execution": foreign.on_mesh(MESH)}
    patterns = ("block_0.attention.out", "*.up")
    adapted, banks = linen_models.adapt(MODEL, patterns, EXPERTS, jax.random.key(1), IDS, **run)
    adapted, banks = adapted.add(banks, "block_1.*", PLAIN, jax.random.key(2))
    fresh = banks
    rng = np.random.default_rng(3)
    draw = lambda v: jax.device_put(  # noqa: E731
        0.4 * rng.standard_normal(v.shape).astype(np.float32), v.sharding
    )
    banks = jax.tree.map(draw, banks)
    adapted = adapted.freeze("plain")
    optimiser = optax.adam(3e-3)

    @jax.jit
    def step(trained, state, frozen, variables):
        def loss(trained):
            with adapted.on(trees.overlay(frozen, trained)):
                z, seen = MODEL.apply(variables, IDS, mutable=[linen_models.STATISTICS])
            return loss_of(z), (z, foreign.statistics(seen[linen_models.STATISTICS]))

        (value, aux), grads = jax.value_and_grad(loss, has_aux=True)(trained)
        updates, state = optimiser.update(grads, state)
        return optax.apply_updates(trained, updates), state, value, aux, grads

    frozen, trained = adapted.split(banks)
    state = jax.device_put(optimiser.init(trained), replicated(MESH))
    done = []
    for _ in range(5):
        trained, state, *rest = step(trained, state, frozen, variables)
        done.append(rest)
    return adapted, variables, fresh, banks, (frozen, trained), done


@pytest.mark.slow
def test_forward_and_gradient_are_those_of_a_loop(transformer):
    adapted, variables, _, banks, _, done = transformer
    specs = [spec for spec, _ in adapted.roster]

    @jax.jit
    def grad(trained):
        def loss(trained):
            z = naive({**banks, **trained}, specs, variables)
            return loss_of(z), z

        return jax.grad(loss, has_aux=True)(trained)

    want, z = grad({"experts": banks["experts"]})
    value, (got, stats), grads = done[0]
    assert rel(got, z) < 1e-5 and rel(jax.jit(MODEL.apply)(variables, IDS), z) > 0.1
    assert tree_rel(grads, want) < 1e-4
    assert all(np.any(leaf) for leaf in jax.tree.leaves(want))
    assert done[-1][0] < value
    layers = ("block_0.attention.out", "block_0.up", "block_1.up")
    assert set(stats) == {f"experts/{layer}" for layer in layers}
    one = stats["experts/block_0.up"]  # inside of nn.remat
    assert one.tokens == 40 and one.use_E.sum() == 80


def test_split_parts_are_the_whole(transformer):
    _, _, _, banks, (frozen, trained), _ = transformer
    assert set(frozen) == {"plain"} and set(trained) == {"experts"}
    assert tree_rel(frozen["plain"], banks["plain"]) == 0
    assert tree_rel(trained["experts"], banks["experts"]) > 0


def test_at_first_and_merged(transformer):
    """Fresh banks add nothing; merged, folded or applied, a bank is the same function."""
    adapted, variables, fresh, banks, *_ = transformer

    @functools.partial(jax.jit, static_argnums=0)
    def run(adapted, variables, banks):
        with adapted.on(banks):
            return MODEL.apply(variables, IDS)

    bare = jax.jit(MODEL.apply)
    want = bare(variables, IDS)
    assert rel(run(adapted, variables, fresh), want) < 1e-6
    with pytest.raises(UserError, match="'experts' has gate 'token'"):
        adapted.fold(variables, banks)
    off = adapted.set_state("experts", "off")
    merged = run(off, variables, banks)
    assert rel(merged, want) > 0.1
    assert rel(bare(off.fold(variables, banks), IDS), merged) < 1e-5
    dropped, left = adapted.drop(banks, "experts")
    empty, none, folded = dropped.merge(variables, left, "plain")
    assert empty.roster == () and none == {}
    assert rel(bare(folded, IDS), merged) < 1e-5
    assert jax.tree.structure(folded) == jax.tree.structure(variables)


def test_through_the_bridge_to_nnx():
    """A Linen model inside an NNX one: its layers are met the same."""
    x = jnp.ones((2, 3))
    dense = nn.Sequential([nn.Dense(4), nn.Dense(2)])
    bridged = nnx.bridge.ToNNX(dense, rngs=nnx.Rngs(0)).lazy_init(x)
    adapted, banks = linen_models.adapt(dense, "layers_1", PLAIN, jax.random.key(0), x)
    banks = jax.tree.map(lambda v: jnp.full_like(v, 0.3), banks)
    with adapted.on(banks):
        got = bridged(x)
    seen = x @ bridged.layers_0["kernel"][...]
    want = foreign_twin.of_layer([PLAIN], banks, "layers_1", seen, bridged(x))
    assert rel(got, want) < 1e-5 and rel(got, bridged(x)) > 0.1


class Stacked(nn.Module):
    """Two layers of one, by nn.scan, and one that is no matrix."""

    @nn.compact
    def __call__(self, x):
        body = nn.scan(Body, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        x, _ = body(name="layers")(x, None)
        return nn.Conv(4, (1,), name="conv")(nn.Dense(4, name="last")(x))


class Body(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.Dense(4, name="dense")(x), None


class Repeated(nn.Module):
    """One layer, rematerialised, in a loop, which lets the collections of `axes` out."""

    axes: tuple[str, ...] = ()

    @nn.compact
    def __call__(self, x):
        body = nn.scan(
            nn.remat(Body),
            variable_broadcast="params",
            variable_axes=dict.fromkeys(self.axes, 0),
            split_rngs={"params": False},
            length=2,
        )
        return body(name="loop")(x, None)[0]


def test_statistics_of_a_loop_add_up_or_are_refused():
    x = jax.random.normal(jax.random.key(0), (3, 4))
    variables = Repeated().init(jax.random.key(1), x)
    adapted, banks = linen_models.adapt(Repeated(), "*", EXPERTS, jax.random.key(2), x)
    banks = jax.tree.map(lambda v: jax.random.normal(jax.random.key(v.size), v.shape), banks)

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def run(model, mutable, x):
        with adapted.on(banks):
            return model.apply(variables, x, mutable=mutable)

    with pytest.raises(UserError, match=r"layer 'loop\.dense': .* drops its statistics; give that"):
        run(Repeated(), (linen_models.STATISTICS,), x)
    y, seen = run(Repeated((linen_models.STATISTICS,)), (linen_models.STATISTICS,), x)
    stacked = seen[linen_models.STATISTICS]["loop"]["dense"]["experts/loop.dense"]
    stats = foreign.statistics(seen[linen_models.STATISTICS])["experts/loop.dense"]
    assert stacked.tokens.shape == (2, 1) and stats.tokens == 6 and stats.use_E.shape == (1, 4)
    assert all(np.array_equal(a, b.sum(0)) for a, b in zip(stats, stacked, strict=True))
    assert not np.array_equal(stacked.prob_E[0], stacked.prob_E[1])
    for mutable in (False, True):  # asks for none
        out = run(Repeated(), mutable, x)
        assert np.array_equal(out[0] if mutable else out, y)


def test_a_layer_in_a_loop_is_merged():
    model, x = Repeated(), jax.random.normal(jax.random.key(0), (3, 4))
    variables = model.init(jax.random.key(1), x)
    adapted, banks = linen_models.adapt(model, "*", PLAIN, jax.random.key(2), x)
    banks = jax.tree.map(lambda v: jnp.full_like(v, 0.3), banks)

    @jax.jit
    def run(banks):
        with adapted.on(banks):
            return model.apply(variables, x)

    assert rel(model.apply(adapted.fold(variables, banks), x), run(banks)) < 1e-5


@pytest.mark.parametrize(
    "patterns, options, message",
    [
        ("layers.dense", {}, r"'layers.dense' has a kernel \(2, 4, 4\): layers that are stacked"),
        ("conv", {}, "patterns: 'conv' matches 'conv', which is of Conv, and no linear"),
        ("nothing", {}, "'nothing' matches no layer; linear are layers.dense, last"),
        ("last", {"dispatch": "all_to_all",
                  "execution": foreign.on_mesh(make_mesh({"data": 1, "expert": 8}))},
         "the 8 devices of the mesh axis expert do not divide the 4 experts of bank 'experts'"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_clear_error(patterns, options, message):
    with pytest.raises(UserError, match=message):
        linen_models.adapt(
            Stacked(), patterns, EXPERTS, jax.random.key(0), jnp.ones((2, 4)), **options
        )


def test_a_block_that_has_no_effect_is_an_error():
    x = jnp.ones((2, 3))
    model = nn.Sequential([nn.Dense(4), nn.Dense(2)])
    adapted, banks = linen_models.adapt(model, "layers_1", PLAIN, jax.random.key(0), x)
    variables = model.init(jax.random.key(0), x)
    with pytest.raises(UserError, match="outside of a compiled function"), adapted.on(banks):
        jax.eval_shape(model.apply, variables, x)
    with pytest.raises(UserError, match="no layer with banks was called"), adapted.on(banks):
        pass
    for part in ({}, {"plain": {"layers_1": {"lora_a": banks["plain"]["layers_1"]["lora_a"]}}}):
        with pytest.raises(UserError, match="not all parameters of bank 'plain'"), adapted.on(part):
            model.apply(variables, x)
    with (
        pytest.raises(UserError, match=r"segment_ids_BxT is \(2, 5\), but layer 'layers_1'"),
        adapted.on(banks),
        foreign.given(Context(segment_ids_BxT=np.ones((2, 5)))),
    ):
        model.apply(variables, x)


def test_variables_made_within_hold_no_statistics():
    """Calls would begin with them, and count the tokens of `init` too."""
    model, x = nn.Sequential([nn.Dense(4)]), jnp.ones((2, 3, 5))
    adapted, banks = linen_models.adapt(model, "*", EXPERTS, jax.random.key(0), x)
    with adapted.on(banks):
        variables = model.init(jax.random.key(1), x)
        assert set(variables) == {"params"}
        _, seen = model.apply(variables, x, mutable=[linen_models.STATISTICS])
    (stats,) = foreign.statistics(seen[linen_models.STATISTICS]).values()
    assert stats.tokens == 6
