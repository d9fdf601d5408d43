"""Banks inside NNX models that import nothing of ours: a Mixer and a ViT."""

import functools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from medmoe_jax.adapters import foreign, lifecycle, nnx_models
from medmoe_jax.adapters.bank import BankSpec
from medmoe_jax.adapters.nnx_models import AdaptedLinear, BankParam, FrozenBankParam
from medmoe_jax.adapters.router_loss import router_loss
from medmoe_jax.base.execution import Execution
from medmoe_jax.base.seam import Context
from medmoe_jax.errors import ParameterError, UserError
from medmoe_jax.parallel.mesh import make_mesh, replicated
from medmoe_jax.routing.dispatch import Stacked
from tests.adapters import foreign_twin
from tests.adapters.other_models import Mixer, ViT, images
from tests.naive import rel, tree_rel

EXPERTS = BankSpec("experts", experts=4, rank=2, gate="token", top_k=2, balance_loss=0.01)
PLAIN = BankSpec("plain", rank=3, alpha=3.0)
SKILLS = BankSpec("skills", experts=3, rank=2, gate="skill", mix_softmax=True, alpha=2.0)
LANGUAGES = BankSpec("languages", experts=4, rank=2, gate="language", forcing="always")


def randomise(model, seed=0):
    """Values at which every leaf of every bank matters."""
    rng = np.random.default_rng(seed)

    def draw(leaf):
        value = 0.4 * rng.standard_normal(leaf.shape)
        return jax.device_put(value.astype(np.float32), leaf.sharding)

    nnx.update(model, jax.tree.map(draw, nnx.state(model, BankParam)))


def put(node, mesh):
    """What is on one device goes to all of the mesh's, as a user places a model."""

    def place(leaf):
        alone = len(leaf.sharding.device_set) == 1
        return jax.device_put(leaf, replicated(mesh)) if alone else leaf

    nnx.update(node, jax.tree.map(place, nnx.state(node)))


def adapted(kind, patterns, *banks, **options):
    """`(the model as it was, its twin with banks, paths)`."""
    model, bare = kind(nnx.Rngs(0)), kind(nnx.Rngs(0))
    paths = nnx_models.adapt(model, patterns, banks, rngs=nnx.Rngs(1), **options)
    return bare, model, paths


@nnx.jit
def forward(model, x):
    return model(x)


def loss_of(z, labels):
    return optax.softmax_cross_entropy_with_integer_labels(z, labels).mean()


class Patched(nnx.Module):
    """A layer whose output another function completes."""

    def __init__(self, base, then):
        self.base, self.then = base, then

    def __call__(self, x, *args, **options):
        return self.then(x, self.base(x, *args, **options))


def naive(bare, specs, banks, paths, **told):
    """The bare model, every layer of which is completed by a loop over experts."""
    model = nnx.clone(bare)
    for path in paths:
        *parents, last = path.split(".")
        node = functools.reduce(
            lambda at, key: at[int(key)] if key.isdigit() else getattr(at, key), parents, model
        )
        layer = getattr(node, last)
        axes = len(layer.axis) if isinstance(layer, nnx.LinearGeneral) else 1
        then = functools.partial(foreign_twin.of_layer, specs, banks, path, axes=axes, **told)
        setattr(node, last, Patched(layer, then))
    return model


def step_of(told=None):
    """A user's training step: loss with the routers', gradient and update of the banks."""

    @nnx.jit
    def step(model, optimiser, x, labels):
        def loss(model):
            with foreign.given(told or Context()):
                z, collected = nnx.capture(model, nnx_models.RouterStatistics)(x)
            stats = foreign.statistics(collected)
            specs = [spec for spec, _ in nnx_models.roster(model).values()]
            return loss_of(z, labels), (z, stats, router_loss(specs, stats))

        grad = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, BankParam), has_aux=True)
        (value, aux), grads = grad(model)
        optimiser.update(model, grads)
        return value, aux, grads

    return step


def as_tree(model, grads):
    """Gradients as the tree of the banks."""
    twin = nnx.clone(model)
    nnx.update(twin, grads)
    return nnx_models.bank_tree(twin)


@pytest.fixture(scope="module")
def mixer():
    """A Mixer, trained for some steps on 2 x 4 devices, its experts spread over four."""
    mesh = make_mesh({"data": 2, "expert": 4})
    run = {"dispatch": "all_to_all", "execution": foreign.on_mesh(mesh)}
    bare, model, paths = adapted(Mixer, ("*.tokens.up", "*.channels.up"), PLAIN, SKILLS, **run)
    nnx_models.adapt(model, "*.tokens.up", EXPERTS, rngs=nnx.Rngs(1), **run)
    x, labels = images(16, (6, 5))
    randomise(model)
    start = nnx_models.bank_tree(model)
    optimiser = nnx.Optimizer(model, optax.adam(3e-3), wrt=BankParam)
    put(model, mesh), put(optimiser, mesh)
    step = step_of()
    x_8 = jax.device_put(x, foreign.on_mesh(mesh).activations)
    done = [step(model, optimiser, x_8, labels) for _ in range(6)]
    return bare, model, paths, start, (x, labels), done


def test_at_first_the_model_is_what_it_was():
    bare, model, _ = adapted(Mixer, "embed", PLAIN, EXPERTS)
    x, _ = images(2, (6, 5))
    assert np.array_equal(forward(model, x), forward(bare, x))


@pytest.mark.slow
def test_forward_and_gradient_are_those_of_a_loop(mixer):
    bare, model, paths, start, (x, labels), done = mixer
    specs = [spec for spec, _ in nnx_models.roster(model).values()]

    @jax.jit
    def grad(banks):
        def loss(banks):
            z = naive(bare, specs, banks, paths)(x)
            return loss_of(z, labels), z

        return jax.grad(loss, has_aux=True)(banks)

    want, z = grad(start)
    _, (got, *_), grads = done[0]
    assert rel(got, z) < 1e-5 and rel(bare(x), z) > 0.1
    assert tree_rel(as_tree(model, grads), want) < 1e-4
    assert all(np.any(leaf) for leaf in jax.tree.leaves(want))


def test_training_changes_the_banks_alone(mixer):
    bare, model, *_, done = mixer
    assert done[-1][0] < 0.9 * done[0][0]
    base = {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(nnx.state(bare))}
    held = nnx.to_flat_state(nnx.state(model, nnx.Not(BankParam)))
    held = {".".join(map(str, path)).replace("base.", ""): leaf for path, leaf in held}
    assert held.keys() == base.keys()
    assert all(np.array_equal(held[path][...], base[path][...]) for path in base)


def test_routers_tell_what_they_did(mixer):
    _, model, _, start, (x, _), done = mixer
    _, (_, stats, loss), _ = done[0]
    assert set(stats) == {"experts/blocks.0.tokens.up"}
    one = stats["experts/blocks.0.tokens.up"]
    tokens = 16 * 8  # the token-mixing layers read channels
    assert one.tokens == tokens and one.use_E.sum() == 2 * tokens and one.use_E.shape == (1, 4)
    block = model.blocks[0]
    leaves = start["experts"]["blocks.0.tokens.up"]["router"]
    seen = jnp.swapaxes(block.norm1(model.embed(x)), 1, 2)
    picked = foreign_twin.gates(EXPERTS, leaves, seen) > 0
    assert np.array_equal(one.use_E[0], picked.sum((0, 1)))
    assert 0.009 < loss < 0.04  # 0.01 where every load is even, at most E times that


def test_what_is_shared_stays_one_and_experts_lie_apart(mixer):
    _, model, *_ = mixer
    block = model.blocks[0]
    up, other = block.tokens.up.banks, block.channels.up.banks
    assert up["skills"]["mix"]["weight"] is other["skills"]["mix"]["weight"]
    a = up["experts"]["lora_a"].get_value()
    assert a.shape == (1, 6, 4, 2) and a.sharding.shard_shape(a.shape) == (1, 6, 1, 2)
    assert len(a.sharding.device_set) == 8


def test_lifecycle_of_a_trained_model(mixer):
    """Freeze, gate and off; then drop, merge and fold, after which no trace is left."""
    bare, model, _, _, (x, _), _ = mixer
    model = nnx.clone(model)
    nnx.update(model, jax.tree.map(jnp.asarray, jax.device_get(nnx.state(model))))
    for _, layer in nnx.iter_modules(model):
        if isinstance(layer, AdaptedLinear):
            layer.strategy = Stacked(Execution())
    everything = nnx_models.count(model)
    nnx_models.freeze(model, "plain")
    nnx_models.set_state(model, "skills", "gate")
    frozen = nnx.state(model, FrozenBankParam)
    assert len(jax.tree.leaves(frozen)) == 2 * 2 + 2 * 2 and nnx_models.count(model) < everything
    mix = model.blocks[0].channels.up.banks["skills"]["mix"]["weight"]
    assert (
        type(mix) is BankParam and mix is model.blocks[0].tokens.up.banks["skills"]["mix"]["weight"]
    )
    with pytest.raises(UserError, match="'experts' has gate 'token'"):
        nnx_models.fold(model)
    with_experts = forward(model, x)
    nnx_models.set_state(model, "experts", "off")
    off = forward(model, x)
    assert rel(off, with_experts) > 0.01
    nnx_models.drop(model, "experts")
    nnx_models.merge(model, "plain")
    assert set(nnx_models.roster(model)) == {"skills"} and rel(forward(model, x), off) < 1e-5
    nnx_models.fold(model)
    assert rel(forward(model, x), off) < 1e-5 and rel(forward(bare, x), off) > 0.01
    assert not [m for _, m in nnx.iter_modules(model) if isinstance(m, AdaptedLinear)]
    assert nnx.graphdef(model) == nnx.graphdef(bare)


@pytest.fixture(scope="module")
def vit():
    """A ViT with languages on its attention and MLP, trained on eight devices."""
    mesh = make_mesh({"data": 8})
    execution = foreign.on_mesh(mesh)
    bare, model, paths = adapted(
        ViT, ("*.out", "*.up"), LANGUAGES, dispatch="grouped", execution=execution
    )
    run = {"dispatch": "grouped", "execution": execution}
    more = nnx_models.adapt(model, "*.mlp.*", PLAIN, rngs=nnx.Rngs(2), **run)
    paths = tuple(dict.fromkeys((*paths, *more)))
    randomise(model)
    nnx_models.freeze(model, "plain")
    x, labels = jax.device_put(images(8, (4, 6, 2)), replicated(mesh))
    told = Context(
        language_ids_BxT=np.array([[-1], [0], [1], [2], [3], [3], [0], [-1]]),
        segment_ids_BxT=np.arange(48).reshape(8, 6) % 5,
    )
    start = nnx_models.bank_tree(model)
    optimiser = nnx.Optimizer(model, optax.adam(3e-3), wrt=BankParam)
    put(model, mesh), put(optimiser, mesh)
    step = step_of(told)
    done = [step(model, optimiser, x, labels) for _ in range(4)]
    return bare, model, paths, start, (x, labels), told, done


@pytest.mark.slow
def test_a_vit_with_languages_and_padding_is_that_of_a_loop(vit):
    bare, model, paths, start, (x, labels), told, done = vit
    specs = [spec for spec, _ in nnx_models.roster(model).values()]
    forced = jnp.broadcast_to(told.language_ids_BxT, (8, 6))
    valid = jnp.asarray(told.segment_ids_BxT > 0, jnp.float32)

    @jax.jit
    def grad(languages):
        def loss(languages):
            banks = {**start, "languages": languages}
            z = naive(bare, specs, banks, paths, forced=forced, valid=valid)(x)
            return loss_of(z, labels), z

        return jax.grad(loss, has_aux=True)(languages)

    want, z = grad(start["languages"])
    value, (got, stats, _), grads = done[0]
    assert rel(got, z) < 1e-5 and rel(bare(x), z) > 0.1
    assert tree_rel(as_tree(model, grads)["languages"], want) < 1e-4
    one = stats["languages/block.attention.out"]
    assert one.tokens == valid.sum() and one.forced > 0
    assert done[-1][0] < value


def test_a_frozen_bank_is_not_trained(vit):
    _, model, _, start, *_ = vit
    now = nnx_models.bank_tree(model)
    assert tree_rel(now["plain"], start["plain"]) == 0
    assert tree_rel(now["languages"], start["languages"]) > 0


def test_split_and_merge_of_parameters(vit):
    """As an optimiser of one's own takes them."""
    _, model, *_ = vit
    graph, banks, rest = nnx.split(model, BankParam, ...)
    assert {"lora_a", "lora_b", "kernel", "bias"} == {
        path[-1] for path, _ in nnx.to_flat_state(banks)
    }
    half = nnx.merge(graph, jax.tree.map(lambda v: 0.5 * v, banks), rest)
    got, want = nnx_models.bank_tree(half), nnx_models.bank_tree(model)
    assert tree_rel(got["languages"], jax.tree.map(lambda v: 0.5 * v, want["languages"])) == 0
    assert tree_rel(got["plain"], want["plain"]) == 0


def test_banks_are_trees_that_the_lifecycle_takes(vit):
    _, model, *_ = vit
    spec, _ = nnx_models.roster(model)["plain"]
    tree = nnx_models.bank_tree(model)["plain"]
    both, params = lifecycle.stack("both", [(spec, tree), (spec, tree)])
    site = "block.mlp.up"
    one, two = (
        lifecycle.delta(s, jax.tree.map(lambda v: v[0], p[site]))
        for s, p in ((spec, tree), (both, params))
    )
    assert rel(two, 2 * one) < 1e-6


class Corners(nnx.Module):
    """A layer used twice, one in a tuple, a stack of layers, kernels that are shared."""

    def __init__(self, rngs):
        self.first = nnx.Linear(4, 4, rngs=rngs)
        self.again = self.first
        self.pair = nnx.data((nnx.Linear(4, 4, rngs=rngs), {"in": nnx.Linear(4, 4, rngs=rngs)}))
        self.stack = nnx.vmap(lambda r: nnx.Linear(4, 4, rngs=r))(rngs.split(3))
        self.tied = nnx.Linear(4, 4, rngs=rngs)
        self.tied.kernel = self.first.kernel
        self.batch = nnx.LinearGeneral(4, 4, batch_axis={0: 2}, rngs=rngs)
        self.conv = nnx.Conv(4, 4, (1,), rngs=rngs)

    def __call__(self, x):
        return self.again(self.first(self.pair[0](self.pair[1]["in"](x))))


def test_layers_used_twice_and_in_containers():
    model = Corners(nnx.Rngs(0))
    x = jnp.ones(4)  # no rows at all
    paths = nnx_models.adapt(model, ("again", "pair.*"), PLAIN, rngs=nnx.Rngs(1))
    assert set(paths) == {"again", "pair.0", "pair.1.in"} and model.first is model.again
    randomise(model)
    tree = nnx_models.bank_tree(model)
    for path in ("pair.1.in", "pair.0", "again", "again"):
        base = functools.reduce(
            lambda at, key: (
                at[int(key) if key.isdigit() else key]
                if isinstance(at, tuple | dict)
                else getattr(at, key)
            ),
            path.split("."),
            model,
        ).base
        x = foreign_twin.of_layer([PLAIN], tree, path, x, base(x))
    assert rel(forward(model, jnp.ones(4)), x) < 1e-5
    with pytest.raises(UserError, match="share one kernel"):
        nnx_models.merge(model, "plain")


class Masked(nnx.Linear):
    """Half of its kernel counts, and no more than that half is there."""

    def __init__(self, width, rngs):
        super().__init__(width, width, rngs=rngs)
        self.kernel.set_value(jnp.tril(self.kernel[...]))

    def __call__(self, x):
        return x @ jnp.tril(self.kernel[...])


class Lookup(nnx.Module):
    """Reads a table that another layer may hold."""

    def __init__(self, weight):
        self.tables = nnx.data({"one": weight})

    def __call__(self, x):
        return x @ self.tables["one"].T


class Read(nnx.Module):
    """Layers whose kernels do more, or something else, than their product."""

    def __init__(self, rngs):
        self.encoder = nnx.Linear(4, 4, rngs=rngs)
        self.decoder = Lookup(self.encoder.kernel)
        self.masked = Masked(4, rngs)
        self.plain = nnx.Linear(4, 4, rngs=rngs)
        self.heads = nnx.LinearGeneral((2, 4), (2, 2), axis=(-2, -1), rngs=rngs)
        self.early = nnx.LinearGeneral(4, 3, axis=1, rngs=rngs)

    def __call__(self, x):
        y = self.decoder(self.plain(self.masked(self.encoder(x))))
        return self.heads(y), self.early(jnp.moveaxis(y, 1, 2))


@pytest.mark.parametrize("merge", [lambda m: nnx_models.merge(m, "plain"), nnx_models.fold])
@pytest.mark.parametrize(
    "layer, message",
    [("encoder", r"decoder\.tables.* and encoder\.base\.kernel share"), ("masked", "multiply")],
)
def test_a_kernel_that_is_no_mere_factor_is_not_merged(merge, layer, message):
    model, x = Read(nnx.Rngs(0)), jax.random.normal(jax.random.key(1), (3, 2, 4))
    nnx_models.adapt(model, (layer, "plain"), PLAIN, rngs=nnx.Rngs(1))
    randomise(model)
    before = forward(model, x)
    with pytest.raises(UserError, match=message):
        merge(model)
    assert all(rel(a, b) == 0 for a, b in zip(forward(model, x), before, strict=True))


def test_layers_of_several_axes_are_merged():
    model, x = Read(nnx.Rngs(0)), jax.random.normal(jax.random.key(1), (3, 2, 4))
    nnx_models.adapt(model, ("plain", "heads", "early"), PLAIN, rngs=nnx.Rngs(1))
    randomise(model)
    before = forward(model, x)

    @nnx.jit
    def folded(model, x):
        nnx_models.fold(model)
        return model(x)

    for after in (folded(nnx.clone(model), x), (nnx_models.fold(model), forward(model, x))[1]):
        assert all(rel(a, b) < 1e-5 for a, b in zip(after, before, strict=True))


def test_a_layer_that_adds_to_its_product_is_merged():
    """Its bias and its own factors are no reason to refuse: they stay beside the kernel."""
    layer = nnx.LoRALinear(8, 6, lora_rank=2, rngs=nnx.Rngs(0))
    layer.lora.lora_b.set_value(jax.random.normal(jax.random.key(1), (2, 6)))
    layer.bias.set_value(jnp.arange(6.0))
    model, x = nnx.Dict(layer=layer), jax.random.normal(jax.random.key(0), (3, 8))
    nnx_models.adapt(model, "layer", PLAIN, rngs=nnx.Rngs(1))
    randomise(model)
    want = model["layer"](x)
    assert rel(layer(x), want) > 0.1
    nnx_models.fold(model)
    assert model["layer"] is layer and rel(layer(x), want) < 1e-5


def test_what_is_assigned_to_an_adapted_layer_reaches_the_layer():
    model, x = Read(nnx.Rngs(0)), jax.random.normal(jax.random.key(1), (3, 2, 4))
    nnx_models.adapt(model, "plain", PLAIN, rngs=nnx.Rngs(1))
    kernel = nnx.Param(jnp.eye(4))
    model.plain.kernel, model.plain.bias = kernel, nnx.Param(jnp.zeros(4))
    assert rel(model.plain(x), x) < 1e-6 and model.plain.base.kernel is kernel
    assert {"kernel", "bias"}.isdisjoint(vars(model.plain))


def test_later_banks_run_as_those_that_are_there():
    run = {"dispatch": "grouped", "execution": foreign.on_mesh(make_mesh({"data": 8}))}
    model = Read(nnx.Rngs(0))
    nnx_models.adapt(model, "plain", EXPERTS, rngs=nnx.Rngs(1), **run)
    strategy = model.plain.strategy
    nnx_models.adapt(model, ("plain", "encoder"), PLAIN, rngs=nnx.Rngs(2))
    assert model.plain.strategy == model.encoder.strategy == strategy
    for other in ({"dispatch": "stacked"}, {"dispatch": "grouped"}, {"execution": Execution()}):
        with pytest.raises(ParameterError, match="layer 'plain' has banks that run by Grouped"):
            nnx_models.adapt(model, "plain", SKILLS, rngs=nnx.Rngs(3), **other)
    assert {*nnx_models.roster(model)} == {"experts", "plain"} and model.plain.strategy == strategy
    nnx_models.adapt(model, "plain", SKILLS, rngs=nnx.Rngs(3), **run)


def test_layers_that_cannot_be_replaced_are_not_adapted():
    @flax.struct.dataclass
    class Pair:
        one: nnx.Linear

    class Holds(nnx.Module):
        def __init__(self, rngs):
            self.pair = nnx.data(Pair(nnx.Linear(4, 4, rngs=rngs)))
            self.other = nnx.Linear(4, 4, rngs=rngs)

    model = Holds(nnx.Rngs(0))
    with pytest.raises(ParameterError, match=r"layer 'pair\.one' is held by no"):
        nnx_models.adapt(model, "*", PLAIN, rngs=nnx.Rngs(1))
    assert not nnx_models.roster(model)
    assert nnx_models.adapt(model, "other", PLAIN, rngs=nnx.Rngs(1)) == ("other",)


@pytest.mark.parametrize("norm", [nnx.WeightNorm, nnx.SpectralNorm])
def test_layers_with_normalised_weights_take_no_banks(norm):
    model = norm(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))
    with pytest.raises(ParameterError, match="normalises its weights"):
        nnx_models.adapt(model, "*", PLAIN, rngs=nnx.Rngs(1))


def test_a_frozen_bank_is_no_parameter_that_trains():
    model = Read(nnx.Rngs(0))
    nnx_models.adapt(model, "plain", PLAIN, rngs=nnx.Rngs(1))
    nnx_models.freeze(model, "plain")
    assert not [p for p, _ in nnx.to_flat_state(nnx.state(model, nnx.Param)) if "banks" in p]


class Inner(nnx.Module):
    """A layer in a function that JAX traces apart, and whose trace it keeps."""

    def __init__(self, way):
        self.layer = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
        self.way = way

    def __call__(self, x):
        return self.way(lambda layer, x: layer(x))(self.layer, x)


@pytest.mark.parametrize("way", [nnx.remat, nnx.jit], ids=["remat", "jit"])
def test_no_block_is_given_what_an_inner_function_kept_of_another(way):
    """Two blocks in one compiled function, and two compiled functions one after the other."""
    model = Inner(way)
    spec = BankSpec("e", experts=4, top_k=1, rank=2, gate="language", forcing="always")
    nnx_models.adapt(model, "*", spec, rngs=nnx.Rngs(1))
    randomise(model)
    x = jnp.ones((3, 4, 8))

    def ids(language):
        return Context(language_ids_BxT=jnp.full((3, 1), language))

    def plain(language):
        with foreign.given(ids(language)):
            return model.layer(x)

    @nnx.jit
    def both(model, x, one, other):
        with foreign.given(Context(language_ids_BxT=one)):
            y = model(x)
        with foreign.given(Context(language_ids_BxT=other)):
            return y, model(x)

    found = both(model, x, *(ids(n).language_ids_BxT for n in (0, 1)))
    for language, y in enumerate(found):
        assert rel(y, plain(language)) < 1e-6
    assert rel(found[0], found[1]) > 0.1

    for language in (2, 3):

        @nnx.jit
        def one(model, x, language_ids_BxT):
            with foreign.given(Context(language_ids_BxT=language_ids_BxT)):
                return model(x)

        y = one(model, x, ids(language).language_ids_BxT)
        assert rel(y, plain(language)) < 1e-6
    unknown, beyond = plain(-1), plain(4)
    assert rel(beyond, unknown) == 0 and np.isfinite(unknown).all()


@pytest.mark.parametrize(
    "patterns, bank, options, message",
    [
        ("nothing.*", PLAIN, {}, "patterns: 'nothing.*' matches no layer; linear are again"),
        (("tied", "conv"), PLAIN, {}, "patterns: 'conv' matches 'conv', which is of Conv"),
        ((), PLAIN, {}, "patterns: none is given"),
        ("stack", PLAIN, {}, r"the kernel of layer 'stack' is float32 \(3, 4, 4\), not floats"),
        ("batch", PLAIN, {}, "patterns: layer 'batch' has a kernel a batch entry"),
        ("tied", (PLAIN, PLAIN), {}, "bank 'plain' is added twice"),
        ("tied", BankSpec("f", ("mlp.gate", "mlp.up", "mlp.down"), form="ffn", gate="token",
                          experts=2), {}, "bank 'f'.form: 'ffn' is for our decoder"),
        ("tied", SKILLS.replace(mix_per_layer=True), {}, "bank 'skills'.mix_per_layer"),
        ("tied", SKILLS.replace(mix_softmax=False), {}, "bank 'skills'.mix_softmax"),
        ("tied", PLAIN, {"dispatch": "fast"}, "dispatch: 'fast' is none of reference"),
        ("tied", EXPERTS.replace(experts=6),
         {"dispatch": "all_to_all", "mesh": {"data": 2, "expert": 4}},
         "dispatch: the 4 devices of the mesh axis expert do not divide the 6 experts"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_clear_error(patterns, bank, options, message):
    options = dict(options)
    if "mesh" in options:
        options["execution"] = foreign.on_mesh(make_mesh(options.pop("mesh")))
    model = Corners(nnx.Rngs(0))
    banks = bank if isinstance(bank, tuple) else (bank,)
    before = nnx.graphdef(model)
    with pytest.raises(UserError, match=message):
        nnx_models.adapt(model, patterns, banks, rngs=nnx.Rngs(1), **options)
    assert nnx.graphdef(model) == before


def test_meshes_that_do_not_fit():
    mesh = jax.make_mesh((8,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    with pytest.raises(UserError, match="rows: the mesh has the axes rows; name those"):
        foreign.on_mesh(mesh)
    with pytest.raises(UserError, match="rows: 'columns' is none of the axes rows"):
        foreign.on_mesh(mesh, ("columns",))
    explicit = jax.make_mesh((8,), ("rows",), axis_types=(jax.sharding.AxisType.Explicit,))
    with pytest.raises(UserError, match="mesh: its axes must be of type Auto"):
        foreign.on_mesh(explicit, ("rows",))
    _, model, _ = adapted(Mixer, "head", PLAIN, execution=foreign.on_mesh(mesh, ("rows",)))
    with pytest.raises(
        UserError, match="8 parts, which do not divide the 3 rows that layer 'head'"
    ):
        jax.eval_shape(model, jnp.ones((3, 6, 5)))


class Tied(nnx.Module):
    """A model that reads its layer's kernel and widths itself."""

    def __init__(self, rngs):
        self.up = nnx.Linear(8, 16, rngs=rngs)

    def __call__(self, x):
        parts = self.up(x).reshape(*x.shape[:-1], 2, self.up.out_features // 2)
        return parts.reshape(*x.shape[:-1], 16) @ self.up.kernel[...].T


def test_what_a_model_reads_of_a_layer_is_still_there():
    bare, model, _ = adapted(Tied, "up", PLAIN)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 8)), jnp.float32)
    np.testing.assert_array_equal(forward(model, x), forward(bare, x))
    randomise(model)
    assert rel(forward(model, x), forward(bare, x)) > 0.01
    with pytest.raises(AttributeError, match="nothing"):
        _ = model.up.nothing


@pytest.mark.parametrize("dispatch", ["stacked", "grouped", "all_to_all", "auto"])
def test_no_rows(dispatch):
    mesh = make_mesh({"fsdp": 4, "expert": 2}, jax.devices()[:8])
    execution = foreign.on_mesh(mesh, ("fsdp", "expert"))
    _, model, _ = adapted(Tied, "up", EXPERTS, dispatch=dispatch, execution=execution)
    put(model, mesh)
    y, collected = nnx.capture(model, nnx_models.RouterStatistics)(jnp.ones((0, 5, 8)))
    assert y.shape == (0, 5, 8)
    (stats,) = foreign.statistics(collected).values()
    assert not stats.tokens.any() and not stats.use_E.any()


class Alone(nnx.Module):
    """One layer."""

    def __init__(self, rngs):
        self.up = nnx.Linear(8, 16, rngs=rngs)

    def __call__(self, x):
        return self.up(x)


@nnx.jit
def pulled(model, x):
    """Output, statistics, and the gradients of banks and of the input."""

    def loss(model, x):
        z, collected = nnx.capture(model, nnx_models.RouterStatistics)(x)
        stats = foreign.statistics(collected)
        specs = [spec for spec, _ in nnx_models.roster(model).values()]
        return (z**2).mean() + router_loss(specs, stats), (z, stats)

    argnums = (nnx.DiffState(0, BankParam), 1)
    grads, aux = nnx.grad(loss, argnums=argnums, has_aux=True)(model, x)
    return (*aux, *(nnx.to_pure_dict(g) if isinstance(g, nnx.State) else g for g in grads))


@pytest.mark.parametrize("dispatch", ["stacked", "auto"])
@pytest.mark.parametrize("cut", [("data",), ("data", "other"), ("data", None, "other"), ()])
@pytest.mark.parametrize("tokens", [64, 2])
def test_meshes_of_explicit_axes(dispatch, cut, tokens):
    """As `jax.make_mesh` makes them: the same as on Auto axes, wherever the input is cut."""
    many = EXPERTS.replace(experts=64)  # of so many, sorted is fastest, which such axes refuse
    x = jax.random.normal(jax.random.key(0), (8, tokens, 8))
    found = {}
    for kind in (jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit):
        mesh = jax.make_mesh((4, 2), ("data", "other"), axis_types=(kind, kind))
        with jax.set_mesh(mesh):
            _, model, _ = adapted(Alone, "up", many, PLAIN, LANGUAGES, SKILLS, dispatch=dispatch)
            randomise(model)
            x = jax.device_put(x, jax.NamedSharding(mesh, jax.P(*cut)))
            found[kind] = pulled(model, x)
    want, got = (jax.tree.leaves(one) for one in found.values())
    assert all(rel(a, b) < 1e-4 for a, b in zip(got, want, strict=True))
    assert all(np.any(leaf) for leaf in jax.tree.leaves(found[kind][2:]))


@pytest.mark.parametrize("dispatch", ["grouped", "all_to_all"])
def test_tokens_that_cannot_be_sorted(dispatch):
    """Named by layer; banks that sort nothing, and strategies that need not, take such inputs."""
    _, model, _ = adapted(Alone, "up", EXPERTS, dispatch=dispatch)
    model.set_attributes(dtype=jnp.float16)
    x = jnp.ones((8, 4, 8))
    with pytest.raises(UserError, match="layer 'up': it computes in float16, sorted tokens in"):
        model(x)
    mesh = jax.make_mesh((8,), ("data",))
    with jax.set_mesh(mesh):
        _, model, _ = adapted(Alone, "up", EXPERTS, dispatch=dispatch)
        with pytest.raises(UserError, match="layer 'up': tokens are not sorted over a mesh with"):
            model(jax.device_put(x, jax.NamedSharding(mesh, jax.P("data"))))
    for bank, other in ((PLAIN, dispatch), (EXPERTS, "auto"), (EXPERTS, "stacked")):
        for kernels in ("xla", "interpret"):
            run = {"dispatch": other, "execution": Execution(kernels=kernels)}
            bank = bank.replace(experts=64) if other == "auto" else bank
            _, model, _ = adapted(Alone, "up", bank, **run)
            randomise(model)
            want = model(x)
            model.set_attributes(dtype=jnp.float16)
            y = model(x)
            assert y.dtype == jnp.float16 and rel(y, want) < 0.02


def carried(c):
    layer, x = c
    return layer, layer(x)


def by_scan(layer, x):
    run = nnx.scan(carried, in_axes=(nnx.Carry,), out_axes=nnx.Carry, length=3)
    return run((layer, x))[1]


def by_fori_loop(layer, x):
    return nnx.fori_loop(0, 3, lambda _, c: carried(c), (layer, x))[1]


def by_remat(layer, x):
    return nnx.remat(lambda layer, x: layer(layer(layer(x))))(layer, x)


class Looped(nnx.Module):
    """One layer, called three times by a loop, and once more before it if `early`."""

    def __init__(self, rngs, loop, early):
        self.layer = nnx.Linear(8, 8, rngs=rngs)
        self.loop, self.early = loop, early

    def __call__(self, x):
        x = self.layer(x) if self.early else x
        return self.loop(self.layer, x)


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("loop", [by_scan, by_fori_loop, by_remat])
def test_statistics_of_all_calls_add_up(loop, early):
    model = Looped(nnx.Rngs(0), loop, early)
    nnx_models.adapt(model, "layer", (EXPERTS, PLAIN), rngs=nnx.Rngs(1))
    randomise(model)
    start = x = jax.random.normal(jax.random.key(0), (2, 5, 8))
    once = Looped(nnx.Rngs(0), lambda layer, x: layer(x), False)
    once.layer = model.layer
    want = None
    for _ in range(3 + early):
        x, seen = nnx.capture(once, nnx_models.RouterStatistics)(x)
        want = foreign.sum_of(want, foreign.statistics(seen)["experts/layer"])

    @nnx.jit
    def run(model, x):
        begin = nnx_models.no_statistics(model)
        return nnx.capture(model, nnx_models.RouterStatistics, init=begin)(x)

    y, seen = run(model, start)
    got = foreign.statistics(seen)
    assert set(got) == {"experts/layer"} and rel(y, x) < 1e-5
    assert tree_rel(got["experts/layer"], want) < 1e-5 and want.tokens == 10 * (3 + early)


def test_a_model_with_banks_is_tabulated():
    bare, model, _ = adapted(Mixer, "embed", PLAIN, EXPERTS)
    wide = {"console_kwargs": {"width": 300, "force_terminal": False}}
    tables = [nnx.tabulate(one, jnp.ones((2, 6, 5)), **wide) for one in (bare, model)]
    assert ["AdaptedLinear" in table for table in tables] == [False, True]


@pytest.mark.parametrize("dispatch", ["stacked", "grouped"])
@pytest.mark.parametrize("bank", [PLAIN, EXPERTS, LANGUAGES], ids=lambda bank: bank.name)
def test_second_derivatives_by_reverse_mode(dispatch, bank):
    """As of a loop, which forward mode can differentiate too."""
    x = jax.random.normal(jax.random.key(2), (2, 3, 8))
    bare, model, paths = adapted(Alone, "up", bank, dispatch=dispatch)
    randomise(model)
    graph, banks, rest = nnx.split(model, BankParam, ...)

    def loss(banks):
        return (jnp.sin(nnx.merge(graph, banks, rest)(x)) ** 2).mean()

    def loop(banks):
        tree = nnx_models.bank_tree(nnx.merge(graph, banks, rest))
        return (jnp.sin(naive(bare, [bank], tree, paths)(x)) ** 2).mean()

    assert tree_rel(jax.jacrev(jax.grad(loss))(banks), jax.hessian(loop)(banks)) < 1e-4
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(loss, (banks,), (banks,))


def test_a_loss_of_routers_that_told_nothing():
    with pytest.raises(UserError, match="router_loss: there are no statistics of bank 'experts'"):
        router_loss([PLAIN, EXPERTS], {})
    assert router_loss([PLAIN], {}) == 0.0


def test_what_is_told_has_to_fit_and_to_be_told_inside():
    _, model, _ = adapted(Mixer, ("embed", "head"), LANGUAGES)
    x = jnp.ones((2, 6, 5))
    told = Context(language_ids_BxT=np.zeros((2, 6), int))
    with pytest.raises(UserError, match=r"language_ids_BxT is \(2, 6\), but layer 'head' sees"):
        jax.eval_shape(lambda: _told(model, told, x))
    with foreign.given(Context(training=True)), pytest.raises(UserError, match="enter it inside"):
        jax.eval_shape(nnx.jit(lambda m, x: m(x)), model, x)


def test_dropout_acts_with_a_key():
    _, model, _ = adapted(Mixer, "embed", PLAIN.replace(dropout=0.5))
    randomise(model)
    x = jnp.ones((2, 6, 5))
    run = jax.jit(lambda key: _told(model, Context(dropout_key=key), x))
    outputs = [run(jax.random.key(seed)) for seed in (0, 0, 1)]
    assert np.array_equal(outputs[0], outputs[1]) and rel(outputs[0], outputs[2]) > 1e-3
    assert rel(outputs[0], forward(model, x)) > 1e-3


def _told(model, context, x):
    with foreign.given(context):
        return model(x)
