"""The decoder against the naive float64 one, packed against unpacked, cached against uncached."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from medmoe_jax.base import decoder, trees
from medmoe_jax.base.cache import new_cache
from medmoe_jax.base.execution import Execution
from medmoe_jax.base.loss import cross_entropy, logits, next_token_targets
from medmoe_jax.base.module import Decoder
from medmoe_jax.base.seam import LayerRange
from medmoe_jax.errors import ParameterError
from tests import naive
from tests.naive import SWITCHES, TINY, rel, tree_rel

ALL = TINY.replace(**SWITCHES["all"])


def _logits(config, params, batch, **kwargs):
    ids = (batch[k] for k in ("tokens", "segment_ids", "positions"))
    x, _, _ = decoder.hidden(config, params, *ids, **kwargs)
    return logits(config, decoder.head(params), x)


def _nll(config, execution, params, batch):
    """Σ −log p over the targets, with every leaf of the base trainable."""
    ids = (batch[k] for k in ("tokens", "segment_ids", "positions"))
    x, _, _ = decoder.hidden(config, params, *ids, execution=execution)
    targets, weights = next_token_targets(batch["tokens"], batch["loss_mask"], batch["segment_ids"])
    return cross_entropy(config, True, decoder.head(params), x, targets, weights)


@pytest.mark.parametrize("name", SWITCHES)
def test_logits(name):
    config = TINY.replace(**SWITCHES[name])
    params, batch = naive.random_params(config), naive.random_batch(config)
    got = np.asarray(jax.jit(functools.partial(_logits, config))(params, batch))
    want = naive.logits(config, params, batch)
    real, used = batch["segment_ids"] > 0, config.vocab_used or config.vocab_size
    assert rel(got[real][:, :used], want[real][:, :used]) < 1e-5
    assert np.isfinite(got).all()
    assert np.all(got[..., used:] < -1e29)
    # The switch matters to this very model; what a leaf of its own stands for, its gradient shows.
    if name not in ("plain", "tied", "vocab_used", "qkv_bias", "biases", "norms_after"):
        other = np.asarray(naive.logits(TINY.replace(tied=config.tied), params, batch))
        assert rel(other[real][:, :used], want[real][:, :used]) > 0.01


@pytest.fixture(scope="module")
def loss_and_grad():
    """The compiled loss and gradient of the decoder with every switch on, per execution."""

    @functools.cache
    def make(execution, config=ALL):
        return jax.jit(jax.value_and_grad(functools.partial(_nll, config, execution)))

    return make


@pytest.fixture(scope="module")
def params():
    return naive.random_params(ALL)


BATCH = naive.random_batch(ALL)


@pytest.mark.parametrize("name", ["all", "norms_after"])
def test_loss_and_gradient(loss_and_grad, name):
    config = TINY.replace(**SWITCHES[name])
    params = naive.random_params(config)
    loss, grads = loss_and_grad(Execution(), config)(params, BATCH)
    function = functools.partial(naive.nll, config, batch=BATCH)
    assert abs(loss / function(params) - 1) < 1e-5
    naive.check_gradient(
        function,
        params,
        grads,
        np.random.default_rng(0),
    )


@pytest.mark.parametrize(
    "execution",
    [Execution(remat="dots"), Execution(remat="full"), Execution(unroll=2)],
    ids=lambda e: f"{e.remat}-{e.unroll}",
)
def test_execution_changes_nothing(loss_and_grad, params, execution):
    want = loss_and_grad(Execution())(params, BATCH)
    got = loss_and_grad(execution)(params, BATCH)
    assert abs(got[0] / want[0] - 1) < 1e-6
    assert tree_rel(got[1], want[1]) < 1e-5


def test_ranges_change_nothing(params):
    ranges = (LayerRange(0, 1), LayerRange(1, 3))
    got = jax.jit(functools.partial(_logits, ALL, ranges=ranges))(params, BATCH)
    real = BATCH["segment_ids"] > 0
    assert rel(got[real][:, :23], naive.logits(ALL, params, BATCH)[real][:, :23]) < 1e-5


def test_trained_leaves_replace_the_base(params):
    """The given leaves are used, in every layer and at the top; the others are the base's."""
    other = naive.random_params(ALL, seed=9)
    paths = ("layers.attn.o.kernel", "layers.mlp_norm", "final_norm", "embed")
    trained = trees.unflatten((path, trees.get(other, path)) for path in paths)
    mixed = trees.overlay(params, trained)
    ids = [BATCH[k] for k in ("tokens", "segment_ids", "positions")]
    got, _, _ = decoder.hidden(
        ALL, params, *ids, trained=trained, ranges=(LayerRange(0, 2), LayerRange(2, 3))
    )
    want, _, _ = decoder.hidden(ALL, mixed, *ids)
    bare, _, _ = decoder.hidden(ALL, params, *ids)
    assert rel(got, want) < 1e-6
    assert rel(bare, want) > 0.1
    assert decoder.head(params, trained) is trained["embed"]


@settings(max_examples=8, deadline=None)
@given(lengths=st.lists(st.integers(1, 6), min_size=2, max_size=4), seed=st.integers(0, 99))
def test_packed_is_unpacked(loss_and_grad, params, lengths, seed):
    """Four rows of samples of at most eleven tokens, packed or one a row: same loss, gradient."""
    while sum(lengths) > 11:
        lengths = lengths[:-1]
    rng = np.random.default_rng(seed)
    samples = [rng.integers(1, ALL.vocab_used, n) for n in lengths]
    masks = [rng.integers(0, 2, n) for n in lengths]
    masks[0][-1] = 1
    values = []
    n = len(samples)
    packed = [range(n), [], [], []]
    alone = [[i] if i < n else [] for i in range(4)]
    for rows in (packed, alone):
        batch, where = naive.pack(samples, rows, 11)
        batch["loss_mask"] = np.zeros_like(batch["tokens"])
        for i, span in where.items():
            batch["loss_mask"][span] = masks[i]
        values.append(loss_and_grad(Execution())(params, batch))
    (a, grads_a), (b, grads_b) = values
    assert abs(a - b) <= 1e-5 * max(abs(b), 1.0)
    if a > 0:
        assert tree_rel(grads_a, grads_b) < 1e-4


def test_the_packed_comparison_can_fail(loss_and_grad, params):
    """One segment id for two samples, or positions that run on, changes the loss."""
    samples = [np.array([3, 4, 5]), np.array([6, 7, 8, 9])]
    batch, _ = naive.pack(samples, [[0, 1], [], [], []], 11)
    batch["loss_mask"] = (batch["tokens"] == 9).astype(np.int32)
    good, _ = loss_and_grad(Execution())(params, batch)
    # Copies: a call returns before it has read its arguments.
    batch = {key: array.copy() for key, array in batch.items()}
    batch["segment_ids"][batch["segment_ids"] == 2] = 1
    batch["positions"][0, :7] = np.arange(7)
    bad, _ = loss_and_grad(Execution())(params, batch)
    assert abs(bad / good - 1) > 1e-3


def _pad(samples, length, left):
    shape = (len(samples), length)
    batch = {k: np.zeros(shape, np.int32) for k in ("tokens", "segment_ids", "positions")}
    for b, sample in enumerate(samples):
        n = len(sample)
        at = slice(length - n, length) if left else slice(0, n)
        batch["tokens"][b, at], batch["segment_ids"][b, at] = sample, 1
        batch["positions"][b, at] = np.arange(n)
    return batch


@pytest.fixture(scope="module", params=["xla", "interpret"])
def cached_step(request):
    execution = Execution(kernels=request.param)

    @jax.jit
    def step(params, batch, cache):
        ids = (batch[k] for k in ("tokens", "segment_ids", "positions"))
        x, cache, _ = decoder.hidden(ALL, params, *ids, execution=execution, cache=cache)
        return logits(ALL, decoder.head(params), x), cache

    return step


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_cache_is_no_cache(cached_step, params, left):
    """A padded prompt, then tokens one by one, against whole rows computed at once."""
    rng = np.random.default_rng(5)
    samples = [rng.integers(1, 23, n) for n in (8, 5, 7)]
    prompts, steps = [s[:-3] for s in samples], 3
    cache = new_cache(ALL, 3, 10, jnp.float32)
    prompt = _pad(prompts, 5, left)
    z, cache = cached_step(params, prompt, cache)
    got = [[row for row, real in zip(z[b], prompt["segment_ids"][b], strict=True) if real]
           for b in range(3)]  # fmt: skip
    for i in range(steps):
        ids = {
            "tokens": np.array([[s[len(p) + i]] for s, p in zip(samples, prompts, strict=True)]),
            "segment_ids": np.ones((3, 1)),
            "positions": np.array([[len(p) + i] for p in prompts]),
        }
        z, cache = cached_step(params, {k: v.astype(np.int32) for k, v in ids.items()}, cache)
        for b in range(3):
            got[b].append(z[b, 0])
    assert cache.slots.written_R.tolist() == [8, 8, 8]
    for b, sample in enumerate(samples):
        want = naive.logits(ALL, params, _pad([sample], len(sample), left))[0]
        assert rel(np.stack(got[b])[:, :23], want[:, :23]) < 1e-5


@pytest.mark.parametrize("name", ["plain", "qkv_bias", "all"])
def test_abstract_is_init(name):
    config = TINY.replace(**SWITCHES[name])
    init = functools.partial(decoder.init, config, dtype=jnp.bfloat16)
    assert jax.eval_shape(init, jax.random.key(0)) == decoder.abstract(config, jnp.bfloat16)
    assert ("head" in decoder.abstract(config)) != config.tied


def test_init():
    config = TINY.replace(n_layers=1, qkv_bias=True, norm_offset=1.0, tied=True, d_ff=24)
    for path, leaf in trees.flatten(decoder.init(config, jax.random.key(0))):
        leaf = np.asarray(leaf)
        if path.endswith("norm"):
            assert np.all(leaf + config.norm_offset == 1)
        elif path.endswith("bias"):
            assert np.all(leaf == 0)
        else:
            narrow = path.endswith(("o.kernel", "down.kernel"))
            scale = leaf.shape[1] ** -0.5 / (2**0.5 if narrow else 1)
            assert leaf.std() == pytest.approx(scale, rel=0.2)


@pytest.mark.parametrize("changes", [{"remat": "some"}, {"attention": "flash"}])
def test_execution_names_the_field(changes):
    with pytest.raises(ParameterError, match=f"^{next(iter(changes))}: "):
        Execution(**changes)


def test_nnx_decoder():
    """The module gives the same logits and takes part in NNX's gradient and optimiser."""
    import optax

    params = naive.random_params(TINY)
    model = Decoder(TINY, params)
    tokens = np.array([[3, 4, 5, 6]], np.int32)
    batch = naive.pack([tokens[0]], [[0]], 4)[0]
    assert rel(nnx.jit(lambda m: m(tokens))(model), naive.logits(TINY, params, batch)) < 1e-5
    optimiser = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimiser):
        loss, grads = nnx.value_and_grad(lambda m: (m(tokens) ** 2).mean())(model)
        optimiser.update(model, grads)
        return loss, grads

    before = params
    first, grads = step(model, optimiser)
    moved = nnx.to_pure_dict(nnx.state(model, nnx.Param))["params"]
    want = jax.tree.map(lambda p, g: p - 0.1 * g, before, nnx.to_pure_dict(grads)["params"])
    assert tree_rel(moved, want) < 1e-6
    assert step(model, optimiser)[0] < first


NESTED = st.recursive(
    st.integers(),
    lambda inner: st.dictionaries(st.sampled_from("abc"), inner, min_size=1, max_size=3),
    max_leaves=6,
).filter(lambda t: isinstance(t, dict))


@settings(deadline=None)
@given(NESTED, NESTED)
def test_trees(tree, over):
    assert trees.unflatten(trees.flatten(tree)) == tree
    assert all(trees.get(tree, path) == leaf for path, leaf in trees.flatten(tree))
    joined = trees.overlay(tree, over)
    assert all(trees.get(joined, path) == leaf for path, leaf in trees.flatten(over))
    assert trees.overlay(tree, {}) == tree
    paths = dict(trees.flatten(over))
    for path, leaf in trees.flatten(tree):
        covered = any(p == path or path.startswith(p + ".") or p.startswith(path + ".")
                      for p in paths)  # fmt: skip
        assert covered or trees.get(joined, path) == leaf
