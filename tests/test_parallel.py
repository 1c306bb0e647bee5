"""Devices: the same run on 1, 2 and 4 of them."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from lstmjax import init_lstm, losses, lstm, parallel, train


@pytest.fixture
def key():
    return jax.random.key(3)


def train_on(count, key, stateful):
    rng = np.random.default_rng(0)
    data = {
        "x": rng.normal(size=(23, 6, 3)).astype(np.float32),
        "y": rng.normal(size=(23, 5)).astype(np.float32),
    }
    devices = jax.devices()[:count]

    def loss_fn(params, batch, key, carry=None):
        state, _ = lstm(params, jnp.swapaxes(batch["x"], 0, 1), carry)
        loss = losses.total(losses.squared_error(state.h, batch["y"]), batch["weight"])
        metrics = {"loss": loss}
        return losses.mean(loss), (metrics, state) if stateful else metrics

    params = init_lstm(key, 3, 5)
    # Adam moves a parameter by about its rate whatever the gradient's size, so round-off in a
    # gradient near zero would show: plain SGD here, clipped Adam in the experiments' tests.
    tx = optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.5))
    step = train.make_train_step(loss_fn, tx, axis_name=parallel.AXIS, stateful=stateful)
    plan = train.plan_batches(rng.permutation(23), 5, multiple=count, drop_remainder=stateful)
    state = parallel.place(train.init_state(params, tx, key), devices)
    layout = P()
    if stateful:
        carry, _ = lstm(params, jnp.zeros((0, plan["rows"].shape[1], 3)))
        carry = jax.tree.map(lambda c: c.at[:5].set(jnp.arange(5.0)[:, None] / 5), carry)
        state = (state, parallel.place(carry, devices, P(parallel.AXIS)))
        layout = (P(), P(parallel.AXIS))
    run = parallel.spread(train.scan_steps(step), devices, state=layout)
    state, metrics = run(state, parallel.place(data, devices), plan)
    carry = None
    if stateful:
        state, carry = state
        carry = jax.tree.map(lambda c: np.asarray(c)[:5], carry)
    return jax.tree.map(np.asarray, (state.params, metrics, carry))


@pytest.mark.parametrize("stateful", [False, True])
@pytest.mark.parametrize("count", [2, 4])
def test_a_run_is_the_same_on_any_number_of_devices(count, stateful, key):
    one, many = train_on(1, key, stateful), train_on(count, key, stateful)
    leaves = zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True)
    for a, b in leaves:
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def in_a_new_process(code, **environment):
    env = {**os.environ, "JAX_PLATFORMS": "cpu", **environment}
    env.pop("XLA_FLAGS", None)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_every_core_is_a_device():
    code = "from lstmjax import parallel; print(len(parallel.use_devices()))"
    assert int(in_a_new_process(code)) == len(os.sched_getaffinity(0))


def test_devices_can_be_chosen():
    code = "from lstmjax import parallel; print(len(parallel.use_devices(3)))"
    assert int(in_a_new_process(code)) == 3


def test_too_many_devices_is_one_clear_error():
    with pytest.raises(ValueError, match=r"devices: got 99, expected at most \d+ on this machine"):
        parallel.use_devices(99)
    with pytest.raises(ValueError, match="devices: got 0, expected a whole number >= 1"):
        parallel.use_devices(0)


def test_processes_have_equally_many_devices(monkeypatch):
    monkeypatch.setattr(parallel, "processes", lambda: 3)
    expected = "devices: got 4, expected a multiple of 3, the number of processes"
    with pytest.raises(ValueError, match=expected):
        parallel.use_devices(4)
    # All four are this process's own here, and the others have none.
    with pytest.raises(ValueError, match="devices: got none, expected a number, for .* 0 to 4"):
        parallel.use_devices()
    with pytest.raises(ValueError, match="devices: got 3, expected at most 0 in 3 processes"):
        parallel.use_devices(3)


def test_one_process_asks_itself():
    rows = np.arange(8.0).reshape(4, 2)
    split = parallel.place({"rows": rows}, jax.devices()[:2], parallel.SPLIT)
    got = parallel.fetch(split)["rows"]
    assert type(got) is np.ndarray
    np.testing.assert_array_equal(got, rows)
    assert parallel.local(split) is split
    assert parallel.agree(True) is True and parallel.agree(np.False_) is False
    np.testing.assert_array_equal(parallel.from_all(rows), rows[None])


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("spec", [parallel.WHOLE, parallel.SPLIT])
def test_what_is_placed_is_a_copy(count, spec):
    given = {"a": jnp.arange(4.0), "key": jax.random.split(jax.random.key(0), 4)}
    placed = parallel.place(given, jax.devices()[:count], spec)
    jax.jit(lambda tree: jax.tree.map(lambda a: a[::-1], tree), donate_argnums=0)(placed)
    assert placed["a"].is_deleted()
    np.testing.assert_array_equal(given["a"], np.arange(4))
    assert given["key"].shape == (4,) and not given["key"].is_deleted()


def test_plans_are_on_the_devices_one_ahead():
    devices, drawn = jax.devices()[:2], []
    plans = [{"rows": np.arange(6).reshape(3, 2) + n, "weight": np.ones((3, 2))} for n in range(4)]

    def source():
        for n, plan in enumerate(plans):
            drawn.append(n)
            yield plan

    for n, plan in enumerate(parallel.ahead(source(), devices)):
        assert drawn[-1] == min(n + 1, 3)
        assert plan["rows"].sharding.device_set == set(devices)
        np.testing.assert_array_equal(plan["rows"], plans[n]["rows"])
    assert n == 3 and list(parallel.ahead([], devices)) == []


def test_other_data_is_another_program(key):
    """A program for 24 rows of float32 is not asked to read 30, nor 24 of another kind."""
    devices, tx = jax.devices()[:2], optax.sgd(0.1)

    def loss_fn(params, batch, key):
        loss = losses.total(jnp.sum(params[None] * batch["x"], -1, dtype="f4"), batch["weight"])
        return losses.mean(loss), {"loss": loss}

    advance = parallel.runner(
        train.make_train_step(loss_fn, tx, axis_name=parallel.AXIS), devices, train.Clock()
    )
    evaluate = parallel.evaluator(
        lambda p, b: loss_fn(p, b, None)[1], devices, train.Clock(), batch_size=12
    )
    plan = train.plan_batches(np.arange(20), 4, multiple=2)
    for size, dtype in ((24, np.float32), (30, np.float32), (24, np.float16)):
        data = {"x": np.random.default_rng(size).normal(size=(size, 3)).astype(dtype)}
        params = jnp.ones(3, dtype)
        state = parallel.place(train.init_state(params, tx, key), devices)
        state, metrics = advance(state, parallel.place(data, devices), plan)
        np.testing.assert_allclose(metrics["loss"][1], np.full(5, 4.0))
        mean = evaluate(params, data)["loss"]
        near = 2e-3 if dtype == np.float16 else 1e-6
        np.testing.assert_allclose(mean, data["x"].sum(-1, dtype="f8").mean(), 10 * near, near)


def test_epochs_compile_once_and_give_their_state_up(key):
    """A second compilation would be of another shape of plan; the old state's memory is reused."""

    class Counting(train.Clock):
        compilations = 0

        def compile(self, run, *arguments):
            Counting.compilations += 1
            return super().compile(run, *arguments)

    def loss_fn(params, batch, key):
        state, _ = lstm(params, jnp.swapaxes(batch["x"], 0, 1))
        loss = losses.total(losses.squared_error(state.h, batch["y"]), batch["weight"])
        return losses.mean(loss), {"loss": loss}

    rng, devices, traces = np.random.default_rng(1), jax.devices()[:2], []
    tx = optax.sgd(0.1, momentum=0.9)
    step = train.make_train_step(loss_fn, tx, axis_name=parallel.AXIS)

    def traced(state, batch):
        traces.append(batch["x"].shape)
        return step(state, batch)

    advance = parallel.runner(traced, devices, Counting())
    state = train.init_state(init_lstm(key, 3, 5), tx, key)
    data = {"x": rng.normal(size=(24, 6, 3)), "y": rng.normal(size=(24, 5))}
    data = parallel.place({n: a.astype(np.float32) for n, a in data.items()}, devices)
    state = parallel.place(state, devices)
    for epoch in range(3):
        plans = train.plan_epoch(24, 4, seed=0, epoch=epoch, multiple=2, at_most=3)
        for plan in parallel.ahead(plans, devices) if epoch else plans:
            before = state
            state, _ = advance(state, data, plan)
            assert before.params.w_h.is_deleted()
    assert int(state.step) == 18
    assert (Counting.compilations, set(traces)) == (1, {(2, 6, 3)})
