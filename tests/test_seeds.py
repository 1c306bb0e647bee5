"""Many seeds in one program: each comes out as it would alone."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest

from lstmjax import LSTMParams, losses, lstm, parallel, seeds, train


def loss_fn(params, batch, key):
    state, _ = lstm(params, jnp.swapaxes(batch["x"], 0, 1))
    noisy = state.h + 0.1 * jax.random.normal(key, state.h.shape, state.h.dtype)
    loss = losses.total(losses.squared_error(noisy, batch["y"]), batch["weight"])
    return losses.mean(loss), {"loss": loss}


TX = optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.5, momentum=0.9))
RUN = train.scan_steps(train.make_train_step(loss_fn, TX))


def start(seed):
    rng = np.random.default_rng(seed)
    params = LSTMParams(*(rng.normal(size=shape) for shape in ((2, 16), (4, 16), (16,))))
    params = jax.tree.map(jnp.asarray, params)
    return train.init_state(params, TX, jax.random.key(seed + 100))


def plan(seed):
    order = np.random.default_rng(seed).permutation(11)
    whole = train.plan_batches(order, 4)
    return whole | {"weight": whole["weight"].astype(np.float64)}


def a_problem():
    rng = np.random.default_rng(0)
    return {"x": rng.normal(size=(11, 6, 2)), "y": rng.normal(size=(11, 4))}


def plainly(state):
    """Keys as numbers, so that they can be compared."""
    return jax.tree.map(np.asarray, state._replace(key=jax.random.key_data(state.key)))


@pytest.mark.parametrize(
    ("how", "devices", "count"), [("map", 1, 3), ("vmap", 1, 3), ("map", 2, 3), ("vmap", 4, 5)]
)
def test_each_seed_comes_out_as_it_would_alone(how, devices, count, x64):
    devices, data = jax.devices()[:devices], a_problem()
    own = range(7, 7 + count)
    states = seeds.stack([start(seed) for seed in own], devices)
    plans = seeds.stack([plan(seed) for seed in own], devices)
    advance = seeds.spread(RUN, devices, shared=(1,), how=how)
    given = states, parallel.place(data, devices), plans
    advance = advance.lower(*given).compile(problems.QUICK)
    states, metrics = advance(*given)
    assert len(states.step) == -(-count // len(devices)) * len(devices)
    together = seeds.unstack((plainly(states), metrics), count)
    alone = jax.jit(RUN, compiler_options=problems.QUICK)
    params = []
    for number, seed in enumerate(own):
        state, sums = alone(start(seed), data, plan(seed))
        params.append(np.asarray(state.params.w_h))
        leaves = jax.tree.leaves((plainly(state), sums))
        for got, want in zip(jax.tree.leaves(together), leaves, strict=True):
            assert len(got) == count
            np.testing.assert_allclose(got[number], want, rtol=1e-12, atol=1e-12)
    apart = [np.abs(a - b).max() for i, a in enumerate(params) for b in params[:i]]
    assert min(apart) > 0.1  # or the comparison would say nothing


def test_devices_have_seeds_of_their_own():
    devices = jax.devices()[:3]
    stacked = seeds.stack([{"a": np.full(2, seed)} for seed in range(4)], devices)
    shards = sorted(stacked["a"].addressable_shards, key=lambda shard: shard.index)
    assert [shard.data[:, 0].tolist() for shard in shards] == [[0, 1], [2, 3], [3, 3]]
    np.testing.assert_array_equal(seeds.unstack(stacked, 4)["a"][:, 1], [0, 1, 2, 3])


def test_only_what_is_to_be_given_up_is_given_up():
    devices = jax.devices()[:1]
    given = [seeds.stack([np.ones(3), np.zeros(3)], devices) for _ in range(2)]
    kept = seeds.spread(lambda a, b: (a + b, a - b), devices, donate=())
    gone = seeds.spread(lambda a, b: (a + b, a - b), devices, donate=(1,))
    kept(*given)
    for total in (kept(*given)[0], gone(*given)[0]):
        np.testing.assert_array_equal(total, [[2] * 3, [0] * 3])
    assert [array.is_deleted() for array in given] == [False, True]


def test_cpus_take_seeds_one_after_the_other():
    devices = jax.devices()[:1]
    ones = seeds.stack([np.ones(3), np.ones(3)], devices)
    text = {
        how: seeds.spread(lambda a: a + 1, devices, how=how).lower(ones).as_text()
        for how in (None, *seeds.HOW)
    }
    assert text[None] == text["map"] and "while" in text["map"] and "while" not in text["vmap"]


@pytest.mark.parametrize(("count", "quantile"), [(2, 12.706204736), (5, 2.776445105)])
def test_interval_is_students(count, quantile):
    values = np.random.default_rng(0).normal(size=(count, 3))
    mean, half = seeds.interval(values)
    for column in range(3):
        own = values[:, column].tolist()
        average = math.fsum(own) / count
        variance = math.fsum((v - average) ** 2 for v in own) / (count - 1)
        assert mean[column] == pytest.approx(average, abs=1e-12)
        assert half[column] == pytest.approx(quantile * math.sqrt(variance / count), rel=1e-8)
    turned = seeds.interval(values.T, axis=1)
    np.testing.assert_array_equal(turned, (mean, half))
    wider = seeds.interval(values, 0.99)[1]
    assert np.all(wider > half)


def test_interval_holds_the_truth_as_often_as_it_says():
    drawn = np.random.default_rng(1).normal(2.0, 3.0, (4, 20_000))
    for level in (0.5, 0.95):
        mean, half = seeds.interval(drawn, level)
        assert np.mean(np.abs(mean - 2.0) < half) == pytest.approx(level, abs=0.012)


def test_interval_of_one_seed_is_not_known():
    mean, half = seeds.interval([[1.5, 2.5]])
    np.testing.assert_array_equal(mean, [1.5, 2.5])
    assert np.isnan(half).all() and half.shape == (2,)
    assert seeds.interval([3.0])[0] == 3.0 and np.isnan(seeds.interval([3.0])[1])


def test_seeds_of_a_record():
    assert seeds.seeds_of({"seed": 3, "config": {"seeds": 4}}) == [3, 4, 5, 6]
    assert seeds.seeds_of({"seed": 3, "config": {}}) == [3] == seeds.seeds_of({"seed": 3})


def test_one_record_of_many_seeds_and_back():
    runs = [
        {"mse": 0.5, "test_loss": 2.0, "mse_epochs": [0.75, 0.5], "skipped": 0},
        {"mse": 0.25, "test_loss": math.inf, "mse_epochs": [0.5, 0.25], "skipped": 3},
        {"mse": 1.5, "test_loss": 1.0, "mse_epochs": [2.0, 1.5], "skipped": 0},
    ]
    own = [9, 10, 11]
    metrics = seeds.together(runs, own)
    assert metrics["mse"] == [0.5, 0.25, 1.5] and metrics["mse_epochs_seed10"] == [0.5, 0.25]
    assert metrics["mse_mean"] == 0.75 and metrics["skipped_mean"] == 1.0
    assert metrics["mse_std"] == pytest.approx(math.sqrt(0.875 / 2), rel=1e-12)
    half = 4.302652730 * metrics["mse_std"] / math.sqrt(3)
    assert metrics["mse_ci95"] == pytest.approx(half, rel=1e-8)
    assert metrics["test_loss_mean"] == math.inf and math.isnan(metrics["test_loss_ci95"])
    assert {type(v) for k, v in metrics.items() if k.endswith(("_mean", "_std", "_ci95"))} == {
        float
    }

    seconds = {"compile": 3.0, "train": 30.0, "eval": 0.0}
    record = {"seed": 9, "config": {"seeds": 3, "cell": "gru"}, "metrics": metrics, "x": 1}
    parts = seeds.apart({**record, "seconds": seconds})
    assert [part["metrics"] for part in parts] == runs
    for part, seed in zip(parts, own, strict=True):
        assert seeds.seeds_of(part) == [seed] and part["config"]["cell"] == "gru"
        assert part["seconds"] == {"compile": 1.0, "train": 10.0, "eval": 0.0}
        assert part["x"] == 1 and part["together"] == 3


def test_what_a_sweep_says_is_no_seeds_number():
    metrics = seeds.together([{"mse": 1.0}, {"mse": 3.0}], [10, 11])
    swept = {"sweep_lr": [0.1, 0.2], "sweep_mse_mean": [2.0, 5.0], "sweep_mse_ci95": [0.1, 0.2]}
    record = {"seed": 10, "config": {"seeds": 2}, "metrics": metrics | swept, "seconds": {}}
    assert [part["metrics"] for part in seeds.apart(record)] == [{"mse": 1.0}, {"mse": 3.0}]


def test_what_seeds_have_in_common_is_each_ones():
    """What was chosen or counted once for all of them: hold-outs, n-grams."""
    metrics = seeds.together([{"acc": 1.0, "curve": [1]}, {"acc": 3.0, "curve": [2]}], [4, 5])
    shared = {"features": 49_242, "validation": [0.9, 0.8]}
    record = {"seed": 4, "config": {"seeds": 2}, "metrics": metrics | shared, "seconds": {}}
    assert [part["metrics"] for part in seeds.apart(record)] == [
        shared | {"acc": 1.0, "curve": [1]}, shared | {"acc": 3.0, "curve": [2]},
    ]  # fmt: skip


def test_a_record_of_one_seed_stays_as_it_is():
    one = {"seed": 3, "config": {}, "metrics": {"mse": 1.0}}
    assert seeds.apart(one) == [one]
    alone = seeds.together([{"mse": 1.0, "curve": [1.0]}], [3])
    assert alone["mse"] == [1.0] and alone["curve_seed3"] == [1.0]
    assert math.isnan(alone["mse_std"]) and math.isnan(alone["mse_ci95"])
    several = {"seed": 3, "config": {"seeds": 2}, "metrics": {"lstm_loss": [1.0, 2.0]}}
    assert seeds.apart(several) == [several]  # of another form, as those of long_lag


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: seeds.stack([], jax.devices()), "trees: got none, expected one for each seed"),
        (lambda: seeds.interval([]), "values: got none, expected one for each seed"),
        (lambda: seeds.interval([1.0], 1), "level: got 1, expected 0 < level < 1"),
        (
            lambda: seeds.spread(RUN, jax.devices(), how="loop"),
            "how: got 'loop', expected one of 'map', 'vmap'",
        ),
        (lambda: seeds.spread(3, jax.devices()), "run: got 3, expected a function"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        call()
