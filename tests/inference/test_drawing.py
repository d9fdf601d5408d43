"""Draws of rows against transformers' logits processors, and rows of all laws in one batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medmoe_jax.errors import UserError
from medmoe_jax.inference import drawing
from medmoe_jax.inference.sampling import Sampling

V = 41
LAWS = (
    Sampling(),
    Sampling(repetition_penalty=1.7),
    Sampling(0.7, top_k=5),
    Sampling(1.3, 0.6),
    Sampling(0.9, min_p=0.2),
    Sampling(1.5, 0.8, top_k=11, min_p=0.1, repetition_penalty=0.6),
    Sampling(2.0, 0.9, top_k=V + 9, repetition_penalty=1.3),
)


def batch():
    rng = np.random.default_rng(0)
    z_RxV = rng.normal(0, 2, (len(LAWS), V)).astype(np.float32)
    ids_RxS = rng.integers(0, V, (len(LAWS), 9)).astype(np.int32)
    written_R = np.arange(3, 3 + len(LAWS)).astype(np.int32)
    keys = [law.keys([r])[0] for r, law in enumerate(LAWS)]
    return drawing.law(LAWS, keys), z_RxV, ids_RxS, written_R


@pytest.mark.parity
def test_transformers_processors():
    torch = pytest.importorskip("torch")
    from transformers.generation import logits_process as hf

    law, z_RxV, ids_RxS, written_R = batch()
    got = drawing.penalised(jnp.asarray(z_RxV), law.penalty_R, jnp.asarray(ids_RxS), written_R)
    warm = got / np.where(law.temperature_R > 0, law.temperature_R, 1)[:, None]
    kept = np.asarray(drawing.kept(law, warm))
    taken = 0
    for r, one in enumerate(LAWS):
        steps = [hf.RepetitionPenaltyLogitsProcessor(one.repetition_penalty)]
        if one.temperature:
            steps.append(hf.TemperatureLogitsWarper(one.temperature))
        steps += [hf.TopKLogitsWarper(min(one.top_k, V))] if one.top_k else []
        steps += [hf.TopPLogitsWarper(one.top_p)] if one.top_p < 1 else []
        steps += [hf.MinPLogitsWarper(one.min_p)] if one.min_p else []
        ids = torch.tensor(ids_RxS[r : r + 1, : written_R[r]]).long()
        want = hf.LogitsProcessorList(steps)(ids, torch.tensor(z_RxV[r : r + 1]))[0].numpy()
        np.testing.assert_array_equal(np.isinf(kept[r]), np.isinf(want))
        np.testing.assert_allclose(kept[r], want, rtol=1e-5)
        taken += np.isinf(want).any()
    assert taken == 5


def test_rows_of_all_laws_draw_as_they_do_alone():
    law, z_RxV, ids_RxS, written_R = batch()
    pick = jax.jit(drawing.pick)
    steps_R = np.arange(len(LAWS), dtype=np.int32)
    together = pick(law, z_RxV, ids_RxS, written_R, steps_R)
    for r in range(len(LAWS)):
        rows = jax.tree.map(
            lambda x, r=r: x[[r] * len(x)], (law, z_RxV, ids_RxS, written_R, steps_R)
        )
        assert pick(*rows).tolist() == [int(together[r])] * len(LAWS)
    assert pick._cache_size() == 1  # what rows ask for is data
    assert int(together[0]) == z_RxV[0].argmax()


def test_a_repeated_token_is_penalised_once():
    z = jnp.asarray([[2.0, -2.0, 1.0, 3.0]])
    ids = jnp.asarray([[0, 1, 0, 3]])
    got = drawing.penalised(z, jnp.asarray([2.0]), ids, jnp.asarray([3]))
    assert got.tolist() == [[1.0, -4.0, 1.0, 3.0]]


def test_the_ends_of_what_may_be_asked():
    """Nothing overflows: as good as cold takes the likeliest, and so does a top-k of all."""
    laws = [Sampling(1e-7), Sampling(1e-45), Sampling(1e-300), Sampling(2e-6), Sampling(1e38)]
    laws += [Sampling(1e-7, top_k=2**31 - 1), Sampling(0.0, repetition_penalty=0.01)]
    laws += [Sampling(1e3, seed=n, top_p=p) for n in range(9) for p in (1e-37, 1e-39, 5e-324, 0.0)]
    z_V = np.random.default_rng(1).normal(0, 30, V).astype(np.float32)
    z_RxV, none = np.tile(z_V, (len(laws), 1)), np.zeros((len(laws), 1), np.int32)
    law = drawing.law(laws, [one.keys([0])[0] for one in laws])
    got = drawing.pick(law, jnp.asarray(z_RxV), none, none[:, 0], none[:, 0]).tolist()
    assert [*got[:4], *got[5:]] == [int(z_V.argmax())] * 42 and 0 <= got[4] < V


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("top_k", (-1, 2**31)),
        ("min_p", (-0.1, 1.1)),
        ("repetition_penalty", (0.0, -1.0, float("nan"), 1e-30, 1e30)),
        ("temperature", (-1e-30, float("inf"))),
        ("first", (-1, 2**31)),
    ],
)
def test_numbers_that_cannot_be(name, values):
    for value in values:
        with pytest.raises(UserError, match=name):
            Sampling(**{name: value})
