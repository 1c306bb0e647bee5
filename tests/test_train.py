"""The train step: one function, the same gradients however it is run.

Gradients are read off plain SGD with learning rate 1 (old minus new parameters), because Adam and
clipping hide a gradient of the wrong size. The reference is one NumPy-summed gradient over all
examples that count.
"""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from lstmjax import init_lstm, losses, lstm, train
from lstmjax.train import TrainState, init_state, make_eval_step, make_train_step

T, B, D, H = 6, 8, 3, 5


def loss_fn(params, batch, key):
    xs = jnp.swapaxes(batch["x"], 0, 1)
    _, hs = lstm(params, xs, mask=jnp.swapaxes(batch["mask"], 0, 1))
    per_example = jnp.sum(jnp.square(jnp.swapaxes(hs, 0, 1) - batch["y"]), axis=(1, 2))
    loss = losses.total(per_example, batch["weight"])
    return losses.mean(loss), {"loss": loss, "draw": (jax.random.uniform(key), 1.0)}


def make_batch(weight, seed=0):
    rng = np.random.default_rng(seed)
    batch = {
        "x": rng.normal(size=(B, T, D)),
        "y": rng.normal(size=(B, T, H)),
        "mask": rng.random((B, T)) < 0.8,
        "weight": np.asarray(weight),
    }
    return {n: jnp.asarray(a, bool if n == "mask" else jnp.float32) for n, a in batch.items()}


WEIGHTS = {
    "full": np.ones(B),
    "ragged": np.array([1, 1, 1, 1, 1, 0, 0, 0]),  # devices with 2, 2, 1 and 0 examples
    "weighted": np.array([1, 0.5, 2, 0, 0, 3, 1, 0.25]),
}


@pytest.fixture
def key():
    return jax.random.key(3)


@pytest.fixture(params=list(WEIGHTS))
def batch(request):
    return make_batch(WEIGHTS[request.param])


@pytest.fixture
def params(key):
    return init_lstm(key, D, H, peephole=True)


@jax.jit
def example_gradients(params, batch):
    """∇ loss of every example on its own: leaves [B, ...]."""
    ones = {n: a[:, None] for n, a in batch.items()} | {"weight": jnp.ones((B, 1))}
    key = jax.random.key(0)
    return jax.vmap(jax.grad(lambda p, one: loss_fn(p, one, key)[0]), (None, 0))(params, ones)


def reference_gradient(params, batch):
    """Σ w ∇ loss / Σ w, summed by NumPy in float64."""
    weight = np.float64(batch["weight"])

    def weighted_mean(g):
        return np.einsum("b,b...->...", weight, np.float64(g)) / weight.sum()

    return jax.tree.map(weighted_mean, example_gradients(params, batch))


def split(batch, parts):
    return {n: a.reshape(parts, B // parts, *a.shape[1:]) for n, a in batch.items()}


def under_jit(step, parts):
    del parts
    return jax.jit(step)


def under_vmap(step, parts):
    mapped = jax.vmap(step, (None, 0), None, axis_name="d")
    return lambda state, batch: mapped(state, split(batch, parts))


def under_pmap(step, parts):
    mapped = jax.pmap(step, "d", in_axes=(None, 0), out_axes=None, devices=jax.devices()[:parts])
    return lambda state, batch: mapped(state, split(batch, parts))


def under_shard_map(step, parts, check_vma):
    mesh = Mesh(np.array(jax.devices()[:parts]), ("d",), axis_types=(AxisType.Auto,))
    return jax.jit(
        jax.shard_map(
            step, mesh=mesh, in_specs=(P(), P("d")), out_specs=(P(), P()), check_vma=check_vma
        )
    )


WAYS = {
    "jit": (under_jit, None),
    "vmap": (under_vmap, "d"),
    "pmap": (under_pmap, "d"),
    "shard_map": (partial(under_shard_map, check_vma=True), "d"),
    "shard_map, unchecked": (partial(under_shard_map, check_vma=False), "d"),
}


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("way", list(WAYS))
def test_gradients_are_equal_however_the_step_is_run(params, batch, way, parts, key):
    wrap, axis_name = WAYS[way]
    tx = optax.sgd(1.0)
    step = make_train_step(loss_fn, tx, axis_name=axis_name)
    state = init_state(params, tx, key)
    new, metrics = wrap(step, parts)(state, batch)
    gradient = jax.tree.map(lambda a, b: np.float64(a) - b, params, new.params)
    for ours, expected in zip(gradient, reference_gradient(params, batch), strict=True):
        if expected is not None:
            np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)
    assert int(new.step) == 1
    np.testing.assert_allclose(metrics["loss"][1], np.sum(batch["weight"]), rtol=1e-6)


@pytest.mark.parametrize("way", list(WAYS))
def test_clipping_comes_after_the_mean(params, way, key):
    # One device's gradient is far larger; clipping it before averaging would change the direction.
    batch = make_batch(WEIGHTS["full"])
    batch["y"] = batch["y"].at[0].multiply(50.0)
    reference = reference_gradient(params, batch)
    norm = np.sqrt(sum(np.sum(g**2) for g in reference if g is not None))
    wrap, axis_name = WAYS[way]
    tx = optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(1.0))
    step = make_train_step(loss_fn, tx, axis_name=axis_name)
    new, _ = wrap(step, 2)(init_state(params, tx, key), batch)
    for p, q, g in zip(params, new.params, reference, strict=True):
        if g is not None:
            np.testing.assert_allclose(np.float64(p) - q, 0.5 * g / norm, rtol=1e-5, atol=1e-6)


def test_without_a_loss_metric_devices_weigh_the_same(params, key):
    def plain(params, batch, key):
        return loss_fn(params, batch, key)[0], {}

    batch = make_batch(WEIGHTS["full"])
    tx = optax.sgd(1.0)
    new, _ = under_pmap(make_train_step(plain, tx, axis_name="d"), 4)(
        init_state(params, tx, key), batch
    )
    for p, q, g in zip(params, new.params, reference_gradient(params, batch), strict=True):
        if g is not None:
            np.testing.assert_allclose(np.float64(p) - q, g, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss", [jnp.float32(1), (jnp.float32(1),) * 3, jnp.ones(3)])
def test_a_loss_without_its_count_is_told(key, loss):
    step = make_train_step(lambda p, batch, key: (p, {"loss": loss}), optax.sgd(1.0), axis_name="d")
    state = init_state(jnp.float32(0), optax.sgd(1.0), key)
    with pytest.raises(ValueError, match=r"^metrics: got .* for loss, expected \(sum, count\)"):
        jax.vmap(step, (None, 0), None, axis_name="d")(state, {"x": jnp.ones((2, 3))})


@pytest.mark.parametrize("way", list(WAYS))
def test_a_device_without_examples_adds_nothing(way, key):
    """Its mean is 0 / 0, and so is its gradient."""

    def plain(params, batch, key):
        error = jnp.sum(batch["weight"] * jnp.square(params * batch["x"] - batch["y"]))
        count = jnp.sum(batch["weight"])
        return error / count, {"loss": (error, count)}

    half = B // 2
    x, y = np.float32(np.random.default_rng(3).normal(size=(2, B)))
    batch = {"x": x, "y": y, "weight": np.float32(np.arange(B) < half)}
    wrap, axis_name = WAYS[way]
    tx = optax.sgd(0.1)
    step = wrap(make_train_step(plain, tx, axis_name=axis_name), 2)
    new, metrics = step(init_state(jnp.float32(2), tx, key), jax.tree.map(jnp.asarray, batch))
    want = 2 - 0.1 * np.mean((2 * (2 * x - y) * x)[:half])
    np.testing.assert_allclose(new.params, want, rtol=1e-6)
    assert metrics["loss"][1] == half


def test_counts_may_be_beyond_float16(key):
    """65,504 is float16's largest number; the two devices count 120,000 and 40,000."""

    def plain(params, batch, key):
        return jnp.mean(params * batch["x"]), {"loss": (jnp.float32(0), jnp.sum(batch["n"]))}

    batch = {"x": jnp.float16([1, 1, 3, 3]), "n": jnp.float32([6e4, 6e4, 2e4, 2e4])}
    tx = optax.sgd(1.0)
    step = jax.vmap(make_train_step(plain, tx, axis_name="d"), (None, 0), None, axis_name="d")
    halves = {name: a.reshape(2, 2) for name, a in batch.items()}
    new, _ = step(init_state(jnp.float16(0), tx, key), halves)
    assert new.params.dtype == jnp.float16
    np.testing.assert_allclose(-new.params, (3 * 1 + 1 * 3) / 4, rtol=1e-3)


def test_what_is_not_finite_is_skipped_by_its_loss(params, key):
    """Without a loss among the metrics that cannot be; with one, all but "gradient" are 0."""
    batch, tx = make_batch(WEIGHTS["full"]), optax.sgd(1.0)
    step = jax.jit(make_train_step(lambda *a: (loss_fn(*a)[0], {}), tx, on_nan="skip"))
    state = init_state(params, tx, key)
    with pytest.raises(
        ValueError, match="^metrics: got none, expected loss among them with on_nan"
    ):
        step(state, batch)
    step = jax.jit(make_train_step(loss_fn, tx, on_nan="skip"))
    bad = batch | {"y": batch["y"].at[0].set(jnp.nan)}
    new, metrics = step(state, bad)
    assert metrics["loss"] == (0, 0) and metrics["skipped"] == (1, 1)
    assert np.isnan(metrics["gradient"][0])
    np.testing.assert_array_equal(new.params.w_h, params.w_h)


def test_a_loss_that_is_not_finite_is_skipped_whatever_its_gradient_is(key):
    def infinite(params, batch, key):
        loss = jnp.sum(params * batch["x"]) + jax.lax.stop_gradient(batch["more"])
        return loss, {"loss": (loss, jnp.float32(1))}

    step = jax.jit(make_train_step(infinite, optax.sgd(1.0), on_nan="skip"))
    state = init_state(jnp.ones(3), optax.sgd(1.0), key)
    new, metrics = step(state, {"x": jnp.ones(3), "more": jnp.float32(np.inf)})
    np.testing.assert_array_equal(new.params, state.params)
    assert metrics["loss"] == (0, 0) and metrics["skipped"] == (1, 1)
    new, metrics = step(state, {"x": jnp.ones(3), "more": jnp.float32(2)})
    np.testing.assert_array_equal(new.params, np.zeros(3))
    assert metrics["skipped"] == (0, 1)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_the_norm_of_a_gradient_of_16_bits_is_of_float32(dtype, key):
    """300² is infinite in float16."""

    def linear(params, batch, key):
        loss = jnp.sum(params * batch)
        return loss, {"loss": (loss, jnp.ones_like(loss))}

    step = jax.jit(make_train_step(linear, optax.sgd(1.0), on_nan="skip"))
    state = init_state(jnp.zeros(2, dtype), optax.sgd(1.0), key)
    new, metrics = step(state, jnp.asarray([300.0, -400.0], dtype))
    assert metrics["gradient"] == (500, 1) and metrics["skipped"] == (0, 1)
    np.testing.assert_array_equal(np.float32(new.params), [-300, 400])


def test_a_skipped_step_leaves_carry_and_momentum_as_they_are(key):
    def carried(params, batch, key, carry):
        carry = jnp.tanh(carry + params * batch["x"])
        loss = jnp.sum(carry**2)
        return loss, ({"loss": (loss, jnp.float32(1))}, carry)

    tx = optax.sgd(0.1, momentum=0.9)
    step = jax.jit(make_train_step(carried, tx, stateful=True, on_nan="skip"))
    good, bad = ({"x": jnp.float32([1.0, x])} for x in (2.0, np.nan))
    before = step((init_state(jnp.float32([0.3, -0.2]), tx, key), jnp.float32([0.1, 0.2])), good)[0]
    after, metrics = step(before, bad)
    assert metrics["skipped"] == (1, 1) and after[0].step == before[0].step + 1
    kept = [(s.params, s.opt_state, carry) for s, carry in (before, after)]
    jax.tree.map(np.testing.assert_array_equal, *kept)
    assert np.all(np.isfinite(step(after, good)[0][1]))


def test_keys_differ_by_step_and_by_device(params, key):
    tx = optax.sgd(0.1)

    def draws(params, batch, key):
        loss, metrics = loss_fn(params, batch, key)
        slot = jnp.arange(2) == jax.lax.axis_index("d")
        return loss, {"draws": jnp.where(slot, jax.random.uniform(key), 0.0)}

    step = under_pmap(make_train_step(draws, tx, axis_name="d"), 2)
    state, seen = init_state(params, tx, key), []
    for _ in range(3):
        state, metrics = step(state, make_batch(WEIGHTS["full"]))
        seen.extend(np.asarray(metrics["draws"]).tolist())
    expected = [
        float(jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, s), d)))
        for s in range(3)
        for d in range(2)
    ]
    np.testing.assert_allclose(seen, expected, rtol=1e-6)
    assert len(set(expected)) == 6


def test_key_without_an_axis_is_the_steps_own(params, key):
    tx = optax.sgd(0.1)
    state = init_state(params, tx, key)._replace(step=jnp.int32(5))
    _, metrics = jax.jit(make_train_step(loss_fn, tx))(state, make_batch(WEIGHTS["full"]))
    expected = jax.random.uniform(jax.random.fold_in(key, 5))
    assert float(metrics["draw"][0]) == float(expected)


def test_stateful_step_carries_values_and_no_gradient(params, key):
    def carried(params, batch, key, carry):
        state, hs = lstm(params, jnp.swapaxes(batch["x"], 0, 1), carry)
        loss = losses.total(jnp.sum(hs**2, axis=(0, 2)), batch["weight"])
        return losses.mean(loss), ({"loss": loss}, state)

    tx = optax.sgd(0.05)
    step = jax.jit(make_train_step(carried, tx, stateful=True))
    batches = [make_batch(WEIGHTS["full"], seed) for seed in range(3)]
    now = (init_state(params, tx, key), None)
    weights, carry = params, None
    for batch in batches:
        if carry is None:
            carry = lstm(params, jnp.zeros((0, B, D)))[0]
            now = (now[0], carry)
        grads, (_, carry) = jax.grad(carried, has_aux=True)(weights, batch, key, carry)
        weights = jax.tree.map(lambda w, g: w - 0.05 * g, weights, grads)
        now, _ = step(now, batch)
    for ours, expected in zip(
        jax.tree.leaves((now[0].params, now[1])), jax.tree.leaves((weights, carry)), strict=True
    ):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)


def test_step_does_not_recompile(params, key):
    tx = optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.5))
    step = make_train_step(loss_fn, tx)
    traced = []
    counted = jax.jit(lambda s, b: (traced.append(1), step(s, b))[1])
    state = init_state(params, tx, key)
    for seed in range(4):
        state, _ = counted(state, make_batch(WEIGHTS["ragged"], seed))
    assert len(traced) == 1
    assert int(state.step) == 4


def test_state_is_a_named_tuple_of_four():
    assert TrainState._fields == ("step", "params", "opt_state", "key")


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("size", [1, 4, 5, 13])
def test_evaluation_scores_every_example_once(size, parts):
    # Every example has a value of its own, so one scored twice or left out shows in the sum.
    data = {"value": jnp.asarray(2.0 ** np.arange(size), jnp.float32)}

    def metric_fn(params, batch):
        return {"value": losses.total(batch["value"] * params, batch["weight"])}

    plan = train.plan_batches(np.arange(size), 5, multiple=parts)
    run = train.scan_eval(make_eval_step(metric_fn, axis_name="d"))
    mesh = Mesh(np.array(jax.devices()[:parts]), ("d",), axis_types=(AxisType.Auto,))
    run = jax.shard_map(
        run, mesh=mesh, in_specs=(P(), P(), P(None, "d")), out_specs=P(), check_vma=False
    )
    added, count = jax.jit(run)(jnp.float32(3), data, plan)["value"]
    assert float(count) == size
    assert float(added) == 3 * (2.0**size - 1)


@pytest.mark.parametrize("multiple", [1, 2, 3, 4])
def test_plan_has_the_same_batches_on_any_number_of_devices(multiple):
    order = np.random.default_rng(0).permutation(23)
    plan = train.plan_batches(order, 5, multiple=multiple)
    assert plan["rows"].shape[1] % multiple == 0
    for k in range(5):
        chosen = plan["rows"][k][plan["weight"][k] > 0]
        np.testing.assert_array_equal(chosen, order[5 * k : 5 * k + 5])


def test_a_batch_is_never_wider_than_the_data():
    plan = train.plan_batches(np.arange(3), 10**12, multiple=2)
    np.testing.assert_array_equal(plan["rows"], [[0, 1, 2, 0]])
    np.testing.assert_array_equal(plan["weight"], [[1, 1, 1, 0]])


def test_plan_can_drop_the_remainder():
    plan = train.plan_batches(np.arange(23), 5, drop_remainder=True)
    np.testing.assert_array_equal(plan["rows"], np.arange(20).reshape(4, 5))
    assert plan["weight"].min() == 1


def test_epochs_have_orders_of_their_own_and_equal_pieces():
    orders = []
    for seed, epoch in ((0, 1), (0, 2), (1, 1), (0, 1)):
        pieces = train.plan_epoch(23, 2, seed=seed, epoch=epoch, at_most=5)
        assert [p["rows"].shape for p in pieces] == [(4, 2)] * 3  # 12 batches
        rows = np.concatenate([p["rows"].ravel() for p in pieces])
        weight = np.concatenate([p["weight"].ravel() for p in pieces])
        assert sorted(rows[weight > 0]) == list(range(23))
        orders.append(tuple(rows))
    assert len(set(orders)) == 3 and orders[0] == orders[3]
    one = train.plan_epoch(23, 2, seed=0, epoch=1, multiple=3, at_most=99)
    (many,) = one
    np.testing.assert_array_equal(many["rows"][:, :2].ravel(), orders[0])


def test_metrics_of_several_calls_are_added():
    parts = [{"loss": (np.array([1.0, 2.0]), np.array([3.0, 4.0]))}] * 2
    assert train.added(parts) == {"loss": (6.0, 14.0)}
    assert losses.means(parts[0]) == {"loss": pytest.approx(3 / 7)}


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: train.plan_batches(np.arange(3), 0), "batch_size: got 0"),
        (lambda: train.plan_batches(np.arange(3), 2, multiple=0), "multiple: got 0"),
        (lambda: train.plan_batches(np.arange(3), 5, drop_remainder=True), "order: got 3 ex"),
        (lambda: train.plan_batches(np.zeros((2, 2)), 1), r"order: got shape \[2, 2\]"),
        (lambda: train.plan_batches([0.5, 1.0], 1), "order: got float64, expected integers"),
        (lambda: make_train_step(None, optax.sgd(1.0)), "loss_fn: got None, expected a function"),
        (lambda: make_train_step(loss_fn, None), "tx: got None, expected an optax transf"),
        (lambda: make_train_step(loss_fn, optax.sgd(1.0), stateful=1), "stateful: got 1"),
        (lambda: make_eval_step("loss"), "metric_fn: got 'loss', expected a function"),
        (lambda: train.plan_epoch(9, 2, seed=0, epoch=1, at_most=0), "at_most: got 0"),
    ],
)
def test_bad_arguments_are_named(call, text):
    with pytest.raises(ValueError, match=text):
        call()


def test_scanned_steps_are_single_steps(params, key):
    tx = optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.5))
    step = make_train_step(loss_fn, tx)
    whole = make_batch(WEIGHTS["full"])
    data = {n: whole[n] for n in ("x", "y", "mask")}
    order = np.random.default_rng(1).permutation(B)
    plan = train.plan_batches(order, 3)
    state, metrics = jax.jit(train.scan_steps(step))(init_state(params, tx, key), data, plan)
    expected = init_state(params, tx, key)
    for k in range(3):
        rows = order[3 * k : 3 * k + 3]
        batch = {n: a[rows] for n, a in data.items()}
        expected, one = jax.jit(step)(expected, {**batch, "weight": jnp.ones(len(rows))})
        np.testing.assert_allclose(metrics["loss"][0][k], one["loss"][0], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(expected.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


# ---- tallies ------------------------------------------------------------------------------------


def test_a_tally_goes_on_to_the_same_bits():
    draw = np.random.default_rng(0)
    steps = []
    for _ in range(4):
        loss = draw.normal(size=3).astype(np.float32), np.ones(3, np.float32)
        steps.append({"loss": loss, "words": (draw.normal(size=3), draw.integers(1, 9, 3))})
    whole, first, second = train.Tally(), train.Tally(), train.Tally()
    for metrics in steps:
        whole.add(metrics)
    for metrics in steps[:2]:
        first.add(metrics)
    second.restore(json.loads(json.dumps(first.progress())))
    for metrics in steps[2:]:
        second.add(metrics)
    for name, numbers in whole.take().items():
        for number, other in zip(numbers, second.sums[name], strict=True):
            assert (number, number.dtype) == (other, other.dtype)


@pytest.mark.parametrize("dtype", ["9" * 5000, "3,3f4", "O", "float32, int8", None, "<f4", "str"])
def test_a_tally_of_what_is_no_number_is_refused(dtype):
    with pytest.raises((TypeError, ValueError)):
        train.Tally().restore({"loss": [[dtype, 0.5], ["float32", 1.0]]})
