"""Losses and averages against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lstmjax import losses


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def test_squared_error(rng):
    a, b = rng.normal(size=(2, 5, 3, 2)).astype(np.float32)
    expected = ((a.astype(np.float64) - b) ** 2).reshape(5, -1).mean(1)
    np.testing.assert_allclose(losses.squared_error(a, b), expected, rtol=1e-5)


def test_cross_entropy_wants_logits_and_classes(rng):
    logits = rng.normal(size=(5, 3))
    for labels in (np.zeros(5), np.zeros(5, bool)):
        with pytest.raises(ValueError, match=r"^labels: got dtype \w+, expected an integer dtype$"):
            losses.cross_entropy(logits, labels)
    with pytest.raises(ValueError, match="^logits: got dtype int32, expected a floating point"):
        losses.cross_entropy(np.ones((5, 3), np.int32), np.zeros(5, int))


def test_squared_error_refuses_other_shapes(rng):
    with pytest.raises(ValueError, match=r"targets: got shape \[5\], expected \[5, 1\]"):
        losses.squared_error(np.zeros((5, 1)), np.zeros(5))


def test_cross_entropy_and_its_doubled_form(rng):
    z = 3 * rng.normal(size=(6, 10))
    y = rng.integers(0, 10, 6)
    single = -np.log(softmax(z)[np.arange(6), y])
    double = -np.log(softmax(softmax(z))[np.arange(6), y])
    z, y = jnp.float32(z), jnp.int32(y)
    np.testing.assert_allclose(losses.cross_entropy(z, y), single, rtol=1e-5)
    np.testing.assert_allclose(losses.double_softmax_cross_entropy(z, y), double, rtol=1e-5)


def test_double_softmax_has_a_floor():
    z = jnp.array([[1e4] + [0.0] * 9])
    loss = losses.double_softmax_cross_entropy(z, jnp.array([0]))
    np.testing.assert_allclose(loss, np.log(1 + 9 / np.e), rtol=1e-6)
    np.testing.assert_allclose(losses.cross_entropy(z, jnp.array([0])), 0, atol=1e-6)


def test_binary_cross_entropy(rng):
    z, y = 4 * rng.normal(size=9), rng.integers(0, 2, 9)
    p = 1 / (1 + np.exp(-z))
    expected = -(y * np.log(p) + (1 - y) * np.log(1 - p))
    ours = losses.binary_cross_entropy(jnp.float32(z), jnp.int32(y))
    np.testing.assert_allclose(ours, expected, rtol=2e-5, atol=1e-6)
    far = losses.binary_cross_entropy(jnp.float32([-200.0]), jnp.int32([1]))
    np.testing.assert_allclose(far, [200.0], rtol=1e-6)  # where log(σ(z)) would be −∞


def test_correct():
    z = jnp.array([[1.0, 2.0, 0.0], [5.0, 2.0, 0.0], [0.0, 0.0, 1.0]])
    np.testing.assert_array_equal(losses.correct(z, jnp.array([1, 1, 2])), [1, 0, 1])
    z = jnp.array([0.1, -0.1, 3.0, -3.0])
    np.testing.assert_array_equal(losses.binary_correct(z, jnp.array([1, 1, 0, 0])), [1, 0, 0, 1])


def test_total_ignores_what_padding_holds(rng):
    values = jnp.array([1.0, jnp.nan, 3.0, jnp.inf])
    weight = jnp.array([1.0, 0.0, 2.0, 0.0])
    added, count = losses.total(values, weight)
    assert (float(added), float(count)) == (7.0, 3.0)
    gradient = jax.grad(lambda v: losses.mean(losses.total(v, weight)))(values)
    np.testing.assert_allclose(gradient, [1 / 3, 0, 2 / 3, 0], rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_totals_of_16_bits_are_of_float32(dtype):
    ones = jnp.ones(70_001, dtype)
    assert [(a.dtype, float(a)) for a in losses.total(ones, ones)] == [(jnp.float32, 70_001)] * 2


@pytest.mark.parametrize(
    ("values", "weight", "expected"),
    [
        (np.array([2, 2, 2]), np.array([0.5, 0.5, 0.25], "f4"), (2.5, 1.25)),
        (np.array([100, 100], "i1"), np.array([2, 1], "i1"), (300, 3)),
        (np.array([True, False]), np.array([True, True]), (1, 2)),
        (np.full(3, 60_000, "f2"), np.full(3, 2, "f2"), (360_000, 6)),
    ],
)
def test_totals_of_any_dtype_are_of_float32(values, weight, expected):
    found = losses.total(jnp.asarray(values), jnp.asarray(weight))
    assert [(a.dtype, float(a)) for a in found] == [(jnp.float32, n) for n in expected]


def test_mean_of_nothing_is_zero_and_has_a_finite_gradient():
    def loss(v):
        return losses.mean(losses.total(v, jnp.zeros(2)))

    assert float(loss(jnp.ones(2))) == 0.0
    np.testing.assert_array_equal(jax.grad(loss)(jnp.ones(2)), [0, 0])


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda a: losses.cross_entropy(a(3, 2), a(4)), r"labels: got shape \[4\], expected \[3\]"),
        (lambda a: losses.correct(a(3, 2), a(3, 1)), r"labels: got shape \[3, 1\], expected \[3\]"),
        (lambda a: losses.binary_cross_entropy(a(3), a(3, 1)), r"labels: got shape \[3, 1\]"),
        (
            lambda a: losses.binary_correct(a(3, 1), a(3)),
            r"labels: got shape \[3\], expected \[3, 1",
        ),
        (lambda a: losses.total(a(3), a(3, 1)), r"weight: got shape \[3, 1\], expected \[3\]"),
    ],
)
def test_shapes_that_would_broadcast_are_refused(call, text):
    # [3] against [3, 1] makes [3, 3] without a word, and a loss that looks like one.
    with pytest.raises(ValueError, match=text):
        call(lambda *shape: jnp.ones(shape))


def test_a_logit_of_0_says_no():
    """σ(0) is 1/2, and not above it."""
    found = losses.binary_correct(jnp.zeros(2), jnp.array([0, 1]))
    np.testing.assert_array_equal(found, [1, 0])
