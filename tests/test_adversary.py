"""lstmjax/adversary.py and reviews without labels, against NumPy in float64 (complex step)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import COMPLEX_STEP, gradients
from test_review_model import (
    LABEL,
    LENGTHS,
    MODELS,
    SLOT,
    WEIGHT,
    E,
    R,
    S,
    T,
    deep_by_hand,
    loss_by_hand,
    make_batch,
    make_params,
    vectors_by_hand,
)

from lstmjax import adversary, review_model

VIRTUAL = dataclasses.replace(MODELS["vectors"], adversarial=0.0, virtual=0.8)
KNOWN = np.array([True, False, True, True])
SHARE = 0.4


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def kl(z, other):
    p, q = sigmoid(z), sigmoid(other)
    return p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))


def by_review(array, length):
    """Scaled to a length over all segments of a review."""
    scaled = np.zeros(array.shape)
    for review in range(R):
        own = array[:, SLOT == review]
        if own.any():
            scaled[:, SLOT == review] = length * own / np.sqrt((own**2).sum())
    return scaled


def test_the_divergence(x64):
    z, other = np.random.default_rng(0).normal(0, 3, (2, 50))
    np.testing.assert_allclose(adversary.divergence(z, other), kl(z, other), rtol=1e-12, atol=1e-14)
    np.testing.assert_array_equal(adversary.divergence(z, z), 0)
    far = adversary.divergence(jnp.array([40.0, -800.0]), jnp.array([-40.0, 800.0]))
    np.testing.assert_allclose(far, [40, 800], rtol=1e-12)


def test_a_step_has_its_length_over_all_segments_of_a_review(x64):
    g = np.random.default_rng(0).normal(size=(T, S, E))
    g[:, SLOT == 0] = 0
    batch = {"slot": SLOT, "label": LABEL}
    found = adversary.scaled(jnp.asarray(g), 1.7, batch)
    inside = SLOT < R
    np.testing.assert_allclose(found[:, inside], by_review(g, 1.7)[:, inside], rtol=1e-12)
    assert not np.asarray(found)[:, SLOT == 0].any()


def unlabelled_batch():
    label = np.where(KNOWN, LABEL, -1).astype(np.int32)
    return make_batch() | {"label": label, "labelled_share": np.float64(SHARE)}


def step_by_hand(params, key):
    """r', from the same draw."""
    batch = make_batch()
    xs = vectors_by_hand(VIRTUAL, params, batch)
    drawn = np.asarray(jax.random.normal(key, xs.shape, jnp.float64))
    valid = np.arange(T)[:, None] < LENGTHS
    trial = by_review(drawn * valid[:, :, None], 0.1)
    said, g = deep_by_hand(VIRTUAL, params, xs).real, np.zeros(xs.shape)
    for place in np.ndindex(xs.shape):
        moved = (xs + trial).astype(complex)
        moved[place] += 1j * COMPLEX_STEP
        g[place] = kl(said, deep_by_hand(VIRTUAL, params, moved)).sum().imag / COMPLEX_STEP
    return by_review(g, VIRTUAL.virtual)


def total_by_hand(params, r, said):
    """The loss; ``said`` is the answer that is to stay, or None for the one of these weights."""
    xs = vectors_by_hand(VIRTUAL, params, make_batch())
    z = deep_by_hand(VIRTUAL, params, xs)
    each = loss_by_hand(VIRTUAL, z) * KNOWN / SHARE
    far = kl(z.real if said is None else said, deep_by_hand(VIRTUAL, params, xs + r))
    return WEIGHT @ (each + far) / WEIGHT.sum(), WEIGHT @ each, z


def test_the_virtual_loss_and_its_gradient(x64):
    batch, params, key = unlabelled_batch(), make_params(VIRTUAL), jax.random.key(5)
    run = jax.jit(jax.value_and_grad(VIRTUAL.loss_fn, has_aux=True))
    (loss, metrics), gradient = run(params, batch, key)
    r = step_by_hand(params, review_model.other_key(key))
    want, clean, z = total_by_hand(params, r, None)
    np.testing.assert_allclose(loss, want.real, rtol=1e-11)
    np.testing.assert_allclose(metrics["loss"], [clean.real, 3], rtol=1e-11)
    counted = KNOWN & (WEIGHT > 0)
    hits = (((z.real > 0) == (LABEL > 0)) & counted).sum()
    np.testing.assert_array_equal(metrics["accuracy"], [hits, counted.sum()])

    (slow,) = gradients(lambda params: total_by_hand(params, r, z.real)[0], params)
    for own, other in zip(*map(jax.tree.leaves, (gradient, slow)), strict=True):
        np.testing.assert_allclose(own, other, rtol=1e-10, atol=1e-12)
        assert other.any()


def test_what_a_review_without_a_label_says_it_says_without_one(x64):
    """Whatever stands where its label would, nothing changes."""
    params, found = make_params(VIRTUAL), []
    for label in (-1, -7):
        batch = unlabelled_batch()
        batch["label"] = np.where(KNOWN, LABEL, label).astype(np.int32)
        found.append(VIRTUAL.loss_fn(params, batch, jax.random.key(5)))
    for one, other in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_array_equal(one, other)


def test_scores_are_of_labelled_reviews_by_themselves(x64):
    params, batch = make_params(VIRTUAL), make_batch()
    with_share = VIRTUAL.loss_fn(params, batch | {"labelled_share": np.float64(SHARE)})
    without = VIRTUAL.loss_fn(params, batch)
    for one, other in zip(*map(jax.tree.leaves, (with_share, without)), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("epsilon", [0.5, 2.0])
def test_a_virtual_step_changes_more_than_a_random_one(epsilon, x64):
    params, batch = make_params(VIRTUAL), make_batch()
    xs = jnp.asarray(vectors_by_hand(VIRTUAL, params, batch))
    weights = jnp.asarray(np.random.default_rng(3).normal(size=xs.shape))
    slot = jnp.asarray(SLOT)

    def outputs(xs):
        return jax.ops.segment_sum(jnp.sum(jnp.tanh(xs) * weights, axis=(0, 2)), slot, R)

    def moved(r):
        return np.asarray(adversary.divergence(outputs(xs), outputs(xs + r)))

    r = adversary.virtual(outputs, xs, epsilon, batch, jax.random.key(0))
    valid = (np.arange(T)[:, None] < LENGTHS)[:, :, None]
    for seed in range(5):
        other = jax.random.normal(jax.random.key(seed), xs.shape, xs.dtype) * valid.astype(float)
        other = adversary.scaled(other, epsilon, batch)
        assert (moved(r)[:3] > moved(other)[:3]).all()
