"""The bag of vectors, against plain loops, and its lanes against bags trained alone."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from lstmjax import bag, losses, optim, parallel, train
from lstmjax.records import RunError


def bag_problem(dtype):
    """Parameters, ids with rows of 5, 0 and 3 n-grams, labels and weights."""
    draw = np.random.default_rng(5)
    params = {
        "vectors": draw.normal(size=(9, 3)),
        "kernel": draw.normal(size=(3, 1)),
        "bias": draw.normal(size=1),
    }
    ids = np.array([[3, 8, 3, 1, 5], [0, 0, 0, 0, 0], [2, 7, 4, 0, 0], [6, 8, 0, 0, 0]], np.int32)
    batch = {"ids": ids, "label": np.array([1, 0, 0, 1], np.int32)}
    batch["weight"] = np.array([1, 1, 1, 0], dtype)
    return {name: array.astype(dtype) for name, array in params.items()}, batch


def bag_by_hand(params, batch, seen=None):
    """Mean loss over the weights, and its gradient, by loops."""
    gradient = {name: np.zeros_like(array) for name, array in params.items()}
    loss, kernel, count = 0.0, params["kernel"][:, 0], batch["weight"].sum()
    for ids, label, weight in zip(batch["ids"], batch["label"], batch["weight"], strict=True):
        ids = [i for i in ids.tolist() if i > 0 and (seen is None or seen[i - 1])]
        mean = sum((params["vectors"][i] for i in ids), np.zeros(3)) / max(len(ids), 1)
        z = mean @ kernel + params["bias"][0]
        probability = 1 / (1 + math.exp(-z))
        loss -= weight * math.log(probability if label else 1 - probability) / count
        error = weight * (probability - label) / count
        gradient["bias"] += error
        gradient["kernel"][:, 0] += error * mean
        for i in ids:
            gradient["vectors"][i] += error * kernel / len(ids)
    return loss, gradient


SEEN = [None, np.array([1, 1, 0, 1, 1, 0, 1, 1], bool)]


@pytest.mark.parametrize("seen", SEEN)
def test_the_bags_gradient_in_float64(x64, seen):
    params, batch = bag_problem(np.float64)

    @jax.jit
    @jax.value_and_grad
    def loss(params, batch):
        z = bag.logits(params, batch["ids"], seen)
        return losses.mean(
            losses.total(losses.binary_cross_entropy(z, batch["label"]), batch["weight"])
        )

    got, gradient = loss(params, batch)
    want, want_gradient = bag_by_hand(params, batch, seen)
    assert float(got) == pytest.approx(want, rel=1e-13)
    for name, array in want_gradient.items():
        assert gradient[name].dtype == np.float64
        np.testing.assert_allclose(gradient[name], array, rtol=1e-12, atol=1e-15)
    # Padding has no gradient, and neither has what only a review of weight 0 has.
    assert not gradient["vectors"][0].any() and not gradient["vectors"][6].any()


@pytest.mark.parametrize("seen", SEEN)
def test_the_bags_loss_and_accuracy(seen):
    params, batch = bag_problem(np.float32)
    run = jax.jit(jax.value_and_grad(lambda p, b: bag.loss_fn(p, b, seen=seen), has_aux=True))
    (loss, metrics), gradient = run(params, batch)
    exact, exact_batch = bag_problem(np.float64)
    want, want_gradient = bag_by_hand(exact, exact_batch, seen)
    assert float(loss) == pytest.approx(want, rel=1e-5)
    for name, array in want_gradient.items():
        np.testing.assert_allclose(gradient[name], array, rtol=1e-5, atol=1e-6)
    z = np.asarray(bag.logits(params, batch["ids"], seen))
    assert z[1] == params["bias"][0]  # a review without n-grams
    right = ((z > 0) == (batch["label"] > 0)) @ batch["weight"]
    assert [float(m) for m in metrics["accuracy"]] == [right, 3.0]
    assert float(metrics["loss"][0]) == pytest.approx(3 * want, rel=1e-5)


@pytest.fixture(scope="module")
def lanes_problem():
    """40 reviews of 6 n-grams, of which the first two decide, and bags of two seeds."""
    draw = np.random.default_rng(8)
    ids = draw.integers(3, 11, (40, 6)).astype(np.int32)
    label = draw.integers(0, 2, 40).astype(np.int32)
    ids[:, 2] = 1 + label
    ids[draw.random((40, 6)) < 0.2] = 0
    settings = bag.Bag(features=10, embedding_size=4, learning_rate=0.05, batch_size=8, seed=3)
    return settings, {"ids": ids, "label": label}


def test_a_lane_is_the_bag_trained_alone(lanes_problem):
    settings, data = lanes_problem
    rows, devices = [np.arange(32), np.arange(8, 40)], parallel.use_devices(2)
    both = dataclasses.replace(settings, seeds=2)
    program = both.program(data, devices, train.Clock())
    means = np.array(list(both.train(program, rows, 2, "both")))
    for lane in (0, 1):
        tx = optim.tf_adam(settings.learning_rate)
        state = dataclasses.replace(settings, seed=3 + lane).start()
        step, found = jax.jit(train.make_train_step(bag.loss_fn, tx)), []
        for epoch in (1, 2):
            for plan in train.plan_epoch(32, 8, seed=3 + lane, epoch=epoch):
                for own, weight in zip(plan["rows"], plan["weight"], strict=True):
                    batch = {name: array[rows[lane][own]] for name, array in data.items()}
                    state, metrics = step(state, batch | {"weight": weight})
                    found.append(float(metrics["loss"][0] / metrics["loss"][1]))
        for name, array in program.params()[lane].items():
            np.testing.assert_allclose(array, state.params[name], rtol=1e-5, atol=1e-7)
        means -= [np.mean(found[:4]) / 2, np.mean(found[4:]) / 2]
    np.testing.assert_allclose(means, 0, atol=1e-6)


def test_accuracy_counts_only_the_ngrams_that_were_seen(lanes_problem):
    settings, data = lanes_problem
    both = dataclasses.replace(settings, seeds=2)
    program = both.program(data, parallel.use_devices(2), train.Clock())
    (*_, last) = both.train(program, [np.arange(40)] * 2, 12, "both")
    assert last < 0.4  # of ln 2 = 0.69 at the start
    draw = np.random.default_rng(1)
    seen, rows = [draw.random(10) < 0.6 for _ in range(2)], [np.arange(5, 30), np.arange(10, 35)]
    score = bag.evaluator(train.Clock())
    for known in (None, seen):
        got = score(program, program.data, rows, known)
        for lane, params in enumerate(program.params()):
            own = {name: array[rows[lane]] for name, array in data.items()}
            z = np.asarray(bag.logits(params, own["ids"], None if known is None else known[lane]))
            assert got[lane] == pytest.approx(np.mean((z > 0) == (own["label"] > 0)), rel=1e-6)
    assert got != score(program, program.data, rows)


def test_a_loss_that_is_not_finite_ends_in_one_line(lanes_problem):
    settings, data = lanes_problem
    wild = dataclasses.replace(settings, learning_rate=1e38)
    program = wild.program(data, parallel.use_devices(1), train.Clock())
    with pytest.raises(RunError, match=r"the loss of epoch \d is (nan|inf): train in smaller"):
        list(wild.train(program, [np.arange(40)], 3, "wild"))


def test_vectors_begin_by_keras_s_law():
    table = np.abs(bag.Bag(5000, 20, 1e-3, 8, 0, 1).start().params["vectors"])
    assert 0.0499 < table.max() <= 0.05 and abs(table.mean() - 0.025) < 1e-3
