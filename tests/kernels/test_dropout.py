"""Dropout by counting: its equation in whole numbers, and how independent its draws are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medmoe_jax.kernels.dropout import Counter, Dropout, counter, dropped, kept

RATES = (0.05, 0.3, 0.5)


def naive_kept(token_T, column_D, rate):
    """The module's equation, with Python's whole numbers."""
    mask = np.empty((len(token_T), len(column_D)), bool)
    for t, token in enumerate(np.asarray(token_T).view(np.uint32).tolist()):
        for d, column in enumerate(np.asarray(column_D).view(np.uint32).tolist()):
            x = (token ^ column) * 0x7FEB352D % 2**32
            x = (x ^ x >> 15) * 0x846CA68B % 2**32
            mask[t, d] = x >= rate * 2**32
    return mask


def mask_of(key, shape=(2, 64, 96), rate=0.3):
    count = counter(key, shape)
    return np.asarray(kept(count.token[..., None], count.column_D[None, None], rate))


@pytest.mark.parametrize("rate", RATES)
def test_the_equation(rate):
    words = np.random.default_rng(0).integers(-(2**31), 2**31, (2, 40)).astype(np.int32)
    token_T, column_D = words[0, :17], words[1]
    got = np.asarray(kept(jnp.asarray(token_T)[:, None], jnp.asarray(column_D)[None], rate))
    np.testing.assert_array_equal(got, naive_kept(token_T, column_D, rate))


@pytest.mark.parametrize("rate", RATES)
def test_the_rate_holds_over_all_over_tokens_and_over_columns(rate):
    masks = np.stack([mask_of(jax.random.key(i), (4, 256, 384), rate) for i in range(4)])
    keep, sd = 1 - rate, (rate * (1 - rate)) ** 0.5
    assert abs(masks.mean() - keep) < 4 * sd / masks.size**0.5
    for axes in ((0, 1, 2), (0, 3), (1, 2), (3,)):
        means = masks.mean(axes)
        # As wide apart as means of independent draws: no wider, and no narrower.
        spread = means.std() / (sd / (masks.size / means.size) ** 0.5)
        assert abs(spread - 1) < 6 / (2 * means.size) ** 0.5, (axes, spread)


@pytest.mark.parametrize("shift", [(0, 0, 1), (0, 1, 0), (0, 1, 1), (1, 0, 0), (0, 0, 64)])
def test_neighbours_are_independent(shift):
    """Chance agreement at rate p is p² + (1 − p)²."""
    mask = mask_of(jax.random.key(3), (4, 256, 384))
    agree = (mask == np.roll(mask, shift, (0, 1, 2))).mean()
    assert abs(agree - 0.58) < 5 * (0.25 / mask.size) ** 0.5


def test_squares_of_a_mask_are_independent():
    """token ^ column ties corners of rectangles together; the mixing has to undo that."""
    mask = mask_of(jax.random.key(4), (1, 1024, 1024), 0.5)[0].astype(int)
    for dt, dd in ((1, 1), (2, 2), (3, 5), (512, 512)):
        corners = mask[:-dt, :-dd] + mask[dt:, :-dd] + mask[:-dt, dd:] + mask[dt:, dd:]
        odd = (corners % 2).mean()
        assert abs(odd - 0.5) < 6 * (0.25 / corners.size) ** 0.5, (dt, dd)


def test_another_key_is_another_mask():
    masks = [mask_of(jax.random.fold_in(jax.random.key(0), i)) for i in range(8)]
    for i, a in enumerate(masks):
        for b in masks[:i]:
            assert abs((a == b).mean() - 0.58) < 5 * (0.25 / a.size) ** 0.5


def test_a_part_of_the_words_makes_that_part_of_the_mask():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 8, 12)), jnp.float32)
    draw = Dropout(counter(jax.random.key(1), x.shape), 0.3)
    part = Dropout(Counter(draw.counter.token[1, 2:6], draw.counter.column_D[3:]), 0.3)
    np.testing.assert_array_equal(part(x[1, 2:6, 3:]), draw(x)[1, 2:6, 3:])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_what_is_kept_is_scaled_and_not_a_number_is_dropped(dtype):
    x = jnp.full((1, 64, 64), jnp.nan, dtype).at[..., ::2].set(2.0)
    count = counter(jax.random.key(0), x.shape)
    words = count.token[..., None], count.column_D[None, None]
    mask = np.asarray(kept(*words, 0.5))
    out = np.asarray(dropped(x, *words, 0.5), np.float32)
    assert out[~mask].tolist() == [0.0] * (~mask).sum() and set(out[..., ::2].ravel()) == {0.0, 4.0}
    assert np.isnan(out[..., 1::2][mask[..., 1::2]]).all()
