"""Dropout: what is dropped together, how often, and by how much the rest grows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lstmjax import dropout, variational_dropout

T, B, F = 30, 20, 40
RATE = 0.3


@pytest.fixture
def xs():
    """Random numbers, none of them 0, so that a zero in the output was dropped."""
    values = np.random.default_rng(50).uniform(0.5, 1.5, size=(T, B, F)).astype(np.float32)
    return values * np.where(np.arange(F) % 2 == 0, 1, -1).astype(np.float32)


def assert_share(kept, expected):
    """The share of independent draws that came out true, within 4.5 standard deviations."""
    deviation = np.sqrt(expected * (1 - expected) / kept.size)
    assert abs(kept.mean() - expected) < 4.5 * deviation, (kept.mean(), expected)


@pytest.mark.parametrize("drop", [dropout, variational_dropout])
def test_elements_are_zero_or_scaled(drop, xs):
    ys = np.asarray(drop(jax.random.key(0), xs, RATE))
    assert ys.shape == xs.shape and ys.dtype == xs.dtype
    kept = ys != 0
    assert 0.6 < kept.mean() < 0.8
    np.testing.assert_allclose(ys[kept], (xs / (1 - RATE))[kept], rtol=1e-6)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_draws_every_element_on_its_own(rate, xs):
    kept = np.asarray(dropout(jax.random.key(1), xs, rate)) != 0
    assert_share(kept, 1 - rate)
    for axis in range(3):  # neighbours along each axis are kept together as often as chance says
        both = np.delete(kept, 0, axis) & np.delete(kept, -1, axis)
        assert_share(both, (1 - rate) ** 2)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_variational_dropout_draws_one_mask_for_all_steps(rate, xs):
    kept = np.asarray(variational_dropout(jax.random.key(2), xs, rate)) != 0
    assert np.array_equal(kept, np.broadcast_to(kept[0], kept.shape))
    assert_share(kept[0], 1 - rate)
    for axis in range(2):
        both = np.delete(kept[0], 0, axis) & np.delete(kept[0], -1, axis)
        assert_share(both, (1 - rate) ** 2)


@pytest.mark.parametrize("drop", [dropout, variational_dropout])
def test_the_mean_is_kept(drop, xs):
    keys = jax.random.split(jax.random.key(3), 400)
    mean = jnp.mean(jax.vmap(lambda key: drop(key, xs[:2, :3], RATE))(keys), axis=0)
    # One draw of y/x has the standard deviation √(rate/(1 − rate)) = 0.65; 400 of them 0.033.
    np.testing.assert_allclose(mean / xs[:2, :3], 1.0, atol=5 * 0.033)


@pytest.mark.parametrize("drop", [dropout, variational_dropout])
def test_no_key_or_no_rate_changes_nothing(drop, xs):
    assert drop(None, xs, RATE) is xs
    assert drop(jax.random.key(4), xs, 0.0) is xs
    assert drop(None, xs, 0) is xs


@pytest.mark.parametrize("drop", [dropout, variational_dropout])
def test_the_key_decides(drop, xs):
    one, same, other = (drop(jax.random.key(k), xs, RATE) for k in (5, 5, 6))
    assert np.array_equal(one, same)
    assert np.mean((one == 0) != (other == 0)) > 0.3  # 2·0.3·0.7 = 0.42 of independent masks
    compiled = jax.jit(drop, static_argnums=2)(jax.random.key(5), xs, RATE)
    assert np.array_equal(compiled == 0, one == 0)
    np.testing.assert_allclose(compiled, one, rtol=1e-6)


@pytest.mark.parametrize("drop", [dropout, variational_dropout])
def test_the_gradient_is_the_mask(drop, xs):
    key = jax.random.key(7)
    mask = jax.grad(lambda xs: drop(key, xs, RATE).sum())(xs)
    kept = np.asarray(drop(key, xs, RATE)) != 0
    np.testing.assert_allclose(mask, kept / (1 - RATE), rtol=1e-6)
    assert not np.any(mask[~kept])


@pytest.mark.parametrize("drop", [dropout, variational_dropout])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_the_dtype_is_kept(drop, dtype, xs, x64):
    xs = xs.astype(jnp.dtype(dtype))
    ys = drop(jax.random.key(8), xs, 0.5)
    assert ys.dtype == dtype
    kept = np.asarray(ys) != 0
    assert np.array_equal(np.asarray(ys)[kept], (2 * xs)[kept])  # doubling is exact


@pytest.mark.parametrize("drop", [dropout, variational_dropout])
def test_a_dropped_nan_is_gone(drop):
    """A mask that multiplies would leave NaN behind; one that selects does not."""
    xs = np.full((T, B, F), np.nan, np.float32)
    ys = np.asarray(drop(jax.random.key(9), xs, RATE))
    assert 0.2 < np.mean(ys == 0) < 0.4
