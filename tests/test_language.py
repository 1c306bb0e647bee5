"""lstmjax/language.py against NumPy in float64, in value and gradient."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracle import gradients
from test_review_model import (
    LENGTHS,
    MODELS,
    E,
    H,
    S,
    T,
    V,
    cell_by_hand,
    make_batch,
    vectors_by_hand,
)

from lstmjax import language, losses, review_model, train

MODEL = dataclasses.replace(MODELS["vectors"], adversarial=0.0)
ONE_WAY = dataclasses.replace(MODEL, both=False, normalise=False)
K = 6


def make_params(model):
    draw = np.random.default_rng(9)
    like = jax.eval_shape(lambda: language.init(model, jax.random.key(0)))
    return jax.tree.map(lambda leaf: draw.normal(size=leaf.shape), like)


def pairs_by_hand(model, params):
    """(u, target) of every word that is to be said, one by one."""
    batch, found = make_batch(), []
    xs = vectors_by_hand(model, params, batch)
    for name in model.directions:
        step = -1 if name == "backward" else 1
        for s in range(S):
            ids, x = batch["ids"][: LENGTHS[s], s][::step], xs[: LENGTHS[s], s][::step]
            hs = cell_by_hand(model, params[name], x)
            found += [(hs[t] @ params["next"][name], ids[t + 1]) for t in range(len(ids) - 1)]
    return found


def scores_by_hand(params, u):
    return (
        np.array([sum(u[e] * params["embed"][k, e] for e in range(E)) for k in range(V)])
        + (params["next_bias"])
    )


def complete_by_hand(model, params):
    each = []
    for u, target in pairs_by_hand(model, params):
        scores = scores_by_hand(params, u)
        each.append(np.log(np.exp(scores).sum()) - scores[target])
    return sum(each) / len(each)


def sampled_by_hand(model, params, drawn):
    q = [np.log((k + 2) / (k + 1)) / np.log(V + 1) for k in range(V)]
    assert abs(sum(q) - 1) < 1e-12
    each = []
    for u, target in pairs_by_hand(model, params):
        scores = scores_by_hand(params, u)
        others = sum(np.exp(scores[k]) / (K * q[k]) for k in drawn if k != target)
        each.append(np.log(np.exp(scores[target]) + others) - scores[target])
    return sum(each) / len(each)


def compare(model, by_hand, fast, params):
    """Value and gradient, by the complex step."""
    want, (loss, gradient) = by_hand(params), fast(params)
    np.testing.assert_allclose(loss, want.real, rtol=1e-11)
    (slow,) = gradients(by_hand, params)
    for own, other in zip(*map(jax.tree.leaves, (gradient, slow)), strict=True):
        np.testing.assert_allclose(own, other, rtol=1e-10, atol=1e-12)
        assert other.any()


@pytest.mark.parametrize("model", [MODEL, ONE_WAY], ids=["both", "forward"])
def test_the_loss_over_all_words(model, x64):
    def fast(params):
        run = lambda p: language.loss_fn(model, K, p, make_batch())  # noqa: E731
        (loss, metrics), gradient = jax.jit(jax.value_and_grad(run, has_aux=True))(params)
        found = pairs_by_hand(model, params)
        hits = sum(scores_by_hand(params, u).real.argmax() == y for u, y in found)
        np.testing.assert_array_equal(metrics["accuracy"], [hits, len(found)])
        np.testing.assert_allclose(losses.mean(metrics["loss"]), loss, rtol=1e-12)
        assert metrics["loss"][1] == len(found) == len(model.directions) * 9
        return loss, gradient

    compare(model, lambda p: complete_by_hand(model, p), fast, make_params(model))


@pytest.mark.parametrize("model", [MODEL, ONE_WAY], ids=["both", "forward"])
def test_the_loss_over_words_that_are_drawn(model, x64):
    key = jax.random.key(4)
    share = jnp.asarray(language.zipf(V))
    drawn = np.asarray(jax.random.choice(review_model.other_key(key), V, (K,), p=share))
    assert len(set(drawn)) > 2

    def fast(params):
        run = lambda p: language.loss_fn(model, K, p, make_batch(), key)  # noqa: E731
        (loss, metrics), gradient = jax.jit(jax.value_and_grad(run, has_aux=True))(params)
        assert sorted(metrics) == ["loss"]
        return loss, gradient

    compare(model, lambda p: sampled_by_hand(model, p, drawn), fast, make_params(model))


def test_many_words_drawn_stand_for_all(x64):
    """The loss over drawn words tends to that over all."""
    draw = np.random.default_rng(0)
    table, u = draw.normal(size=(40, E)), draw.normal(size=(25, E))
    bias, target = draw.normal(size=40), draw.integers(0, 40, 25)
    exact, _ = language.complete(*map(jnp.asarray, (table, bias, u, target)), at_once=7)
    errors = []
    for samples in (200, 200_000):
        own = language.sampled(
            *map(jnp.asarray, (table, bias, u, target)), samples, jax.random.key(1)
        )
        errors.append(np.abs(np.asarray(own - exact)).max())
    assert errors[1] < 0.03 and errors[0] > 0.1


def test_words_are_drawn_as_often_as_zipf_says(x64):
    share = language.zipf(50)
    np.testing.assert_allclose(share.sum(), 1, rtol=1e-12)
    np.testing.assert_allclose(share[:3], np.log([2, 1.5, 4 / 3]) / np.log(51), rtol=1e-12)


def test_weights_that_labels_teach_are_not_there():
    params = language.init(MODEL, jax.random.key(0))
    assert sorted(params) == ["backward", "embed", "forward", "next", "next_bias"]
    assert params["next"]["backward"].shape == (H, E) and params["next_bias"].shape == (V,)
    assert not np.array_equal(params["next"]["forward"], params["next"]["backward"])


def test_dropout_is_drawn_in_training_alone(x64):
    model = dataclasses.replace(MODEL, dropout=0.5, word_dropout=0.3)
    params, batch = make_params(model), make_batch()
    drawn = [language.loss_fn(model, K, params, batch, jax.random.key(k))[0] for k in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    np.testing.assert_allclose(
        language.loss_fn(model, K, params, batch)[0], complete_by_hand(MODEL, params).real
    )


def test_it_learns_what_follows_what():
    """Of a text in which every word has one that follows it, all are told in the end."""
    model = dataclasses.replace(MODEL, embedding_size=8, hidden_size=8, normalise=False)
    follows = np.array([0, 0, 0, 0, 5, 6, 7, 8, 4])
    ids = np.zeros((T, 12), np.int32)
    ids[0] = np.arange(12) % 5 + 4
    for t in range(1, T):
        ids[t] = follows[ids[t - 1]]
    batch = {"ids": ids, "length": np.full(12, T, np.int32), "frequency": np.full(V, 1 / V)}
    batch = {k: v.astype(np.float32) if v.dtype == float else v for k, v in batch.items()}
    tx = optax.adam(0.05)
    step = train.make_train_step(lambda p, b, k: language.loss_fn(model, K, p, b, k), tx)
    state = train.init_state(language.init(model, jax.random.key(0)), tx, jax.random.key(1))
    with jax.numpy_dtype_promotion("standard"):
        run = jax.jit(step)
        for _ in range(150):
            state, _ = run(state, batch)
    _, metrics = language.loss_fn(model, K, state.params, batch)
    assert losses.mean(metrics["accuracy"]) > 0.99


def test_h_is_dropped_before_words_are_told(monkeypatch):
    """By its own key, and what is dropped is what words are told from."""
    model = dataclasses.replace(MODEL, dropout=0.5)
    params, key = jax.tree.map(jnp.float32, make_params(model)), jax.random.key(3)
    asked, drawn = [], jax.random.normal(key, (T, S, H * len(model.directions)))

    def dropout(own, hs, rate):
        asked.append((hs.shape, rate, own is not None))
        return drawn

    def loss(**changes):
        own = dataclasses.replace(model, **changes)
        return float(language.loss_fn(own, K, params, make_batch(), key)[0])

    monkeypatch.setattr(language, "dropout", dropout)
    told = loss()
    assert asked == [(drawn.shape, 0.5, True)]
    drawn = 2 * drawn
    assert abs(loss() - told) > 1e-3
