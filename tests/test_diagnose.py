"""What ``diagnose`` sees of a model and of its gradients, against direct computation."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from diagnose_problems import (
    T,
    dense,
    directly,
    flow_of,
    gru_gates,
    lstm_gates,
    radii,
    random_model,
)

from lstmjax import diagnose, losses, parallel, train
from lstmjax.models import CELLS, SequenceModel
from lstmjax.records import validate


def assert_norms(seen, norms, tolerance):
    for layer, expected in zip(seen, norms, strict=True):
        assert set(layer.gradients) == set(expected)
        for name, want in expected.items():
            oracle.assert_close(layer.gradients[name], want, tolerance)


@pytest.mark.parametrize("cell", list(CELLS))
def test_gradients_of_every_cell(cell, x64):
    model, params, inputs, loss = random_model(np.random.default_rng(1), cell)
    seen = flow_of(model, params, inputs, loss)
    norms, _ = directly(model, params, inputs, loss)
    assert_norms(seen, norms, 1e-10)
    assert norms[0]["h"].shape == (T,) and np.all(norms[0]["h"] > 0)


LARGER = {
    "two layers, words, a mask": ("lstm", {"num_layers": 2, "vocabulary_size": 7, "input_size": 3}),
    "three layers, learned states": (
        "gru", {"num_layers": 3, "input_size": 2, "learned_state": True, "every_step": True},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", list(LARGER))
def test_the_flow_through_stacked_layers(case, x64):
    """Gradients through the layers above too, radii, gates, saturation and half-lives."""
    cell, options = LARGER[case]
    model, params, inputs, loss = random_model(np.random.default_rng(2), cell, **options)
    mask = jnp.array([[0, 0, 1, 1, 1, 1], [1] * 6, [1, 1, 1, 1, 0, 1]], bool)
    mask = mask if model.vocabulary_size else None
    seen = flow_of(model, params, inputs, loss, mask)
    norms, states = directly(model, params, inputs, loss, mask)
    assert_norms(seen, norms, 1e-10)
    xs = params["embed"]["embedding"][inputs] if mask is not None else dense(params, inputs)
    xs = np.swapaxes(np.asarray(xs), 0, 1)
    for number, (layer, run) in enumerate(zip(seen, states, strict=True)):
        weights = {n: np.asarray(w) for n, w in params[f"layer_{number}"]["weights"].items()}
        gates = lstm_gates(weights, xs, run) if cell == "lstm" else gru_gates(weights, xs, run)
        for name, expected in gates.items():
            oracle.assert_close(layer.gates[name], expected, 1e-12)
        assert set(layer.gates) == set(gates)
        assert layer.steps.tolist() == list(range(T))
        if mask is None:
            oracle.assert_close(layer.radius, radii(model, params, inputs, states, number), 1e-10)
        xs = run.h[1:]


@pytest.mark.parametrize("cell", ["rnn", "fgr"])
def test_radii_of_states_of_one_field_and_of_five(cell, x64):
    model, params, inputs, loss = random_model(np.random.default_rng(3), cell)
    (layer,) = flow_of(model, params, inputs, loss)
    states = directly(model, params, inputs, loss)[1]
    oracle.assert_close(layer.radius, radii(model, params, inputs, states, 0), 1e-10)


def test_the_flow_in_bfloat16():
    """The states that bfloat16 has: gates as float32 knows them, gradients to its 8 digits."""
    rng = np.random.default_rng(4)
    model, params, inputs, loss = random_model(rng, "lstm", np.float32, precision="bfloat16")
    (layer,) = flow_of(model, params, inputs, loss)
    norms, (run,) = directly(model, params, inputs, loss)
    rounded = {n: np.float32(jnp.bfloat16(w)) for n, w in params["layer_0"]["weights"].items()}
    xs = np.float32(jnp.bfloat16(jnp.swapaxes(inputs, 0, 1)))
    run = jax.tree.map(np.float32, run)
    for name, expected in lstm_gates(rounded, xs, run).items():
        oracle.assert_close(layer.gates[name], expected, 1e-5)
    assert_norms([layer], norms, 2e-2)


def test_steps_and_rows_of_long_sequences():
    """25 steps from the first to the last, and as many rows as are cheap."""
    rng = np.random.default_rng(5)
    model = SequenceModel("rnn", 100, 1)
    inputs = jnp.array(rng.normal(size=(9, 60, 1)), jnp.float32)
    params = model.init(jax.random.key(0), inputs[:1])["params"]
    (layer,) = flow_of(model, params, inputs, lambda y: y[:, 0])
    assert layer.radius.shape == (25, 5)
    assert layer.steps[0] == 0 and layer.steps[-1] == 59 and np.all(np.diff(layer.steps) >= 2)


def test_zoneout_is_refused():
    model = SequenceModel("lstm", 4, 1, zoneout=0.1)
    with pytest.raises(ValueError, match="^zoneout: got 0.1, expected 0 to be diagnosed"):
        diagnose.flow(model, {}, jnp.zeros((2, 3, 1)), jnp.sum)


# ---- gradients of updates -----------------------------------------------------------------------


@pytest.mark.parametrize("max_norm, devices", [(None, 1), (0.5, 2), (100.0, 1)])
def test_gradient_metrics_are_those_of_what_the_optimiser_gets(max_norm, devices):
    """On any number of devices; and the parameters are not touched by the look."""
    rng = np.random.default_rng(6)
    data = {"x": jnp.array(rng.normal(size=(8, 3)), jnp.float32)}
    params = {"a": np.float32([0.3, -1.0, 2.0]), "b": np.float32(0.5)}

    def loss_fn(params, batch, key):
        each = jnp.square(batch["x"] @ params["a"] + params["b"])
        loss = losses.total(each, batch["weight"])
        return losses.mean(loss), {"loss": loss}

    clip = optax.identity() if max_norm is None else optax.clip_by_global_norm(max_norm)
    tx = optax.chain(clip, optax.sgd(0.01))
    plan = train.plan_batches(np.arange(8), 3, multiple=devices)
    states, found = [], None
    for of_gradient in (None, diagnose.gradient_metrics(max_norm)):
        step = train.make_train_step(loss_fn, tx, axis_name=parallel.AXIS, of_gradient=of_gradient)
        use = jax.devices()[:devices]
        start = parallel.place(train.init_state(params, tx, jax.random.key(0)), use)
        run = parallel.spread(train.scan_steps(step), use)
        state, found = run(start, parallel.place(data, use), plan)
        states.append(jax.tree.map(np.asarray, state.params))
    oracle.assert_close(tuple(states[1].values()), tuple(states[0].values()), 0)

    current, expected = params, []
    for rows, weight in zip(plan["rows"], plan["weight"], strict=True):
        x = np.asarray(data["x"])[rows]
        one = {"x": jnp.asarray(x), "weight": jnp.asarray(weight)}
        gradient = jax.grad(lambda p, one=one: loss_fn(p, one, None)[0])(current)
        after = clip.update(gradient, clip.init(current))[0]
        norms = [np.sqrt(sum(np.sum(np.float64(g) ** 2) for g in tree.values()))
                 for tree in (gradient, after)]  # fmt: skip
        expected.append([*norms, float(norms[0] > (max_norm or np.inf))])
        current = jax.tree.map(lambda p, g: p - 0.01 * g, current, after)
    names = ("gradient_norm", "clipped_norm", "clipped")
    assert set(found) == {"loss", *names}
    got = np.stack([found[name][0] for name in names], axis=1)
    oracle.assert_close(got, np.array(expected), 1e-5)
    assert all(np.all(found[name][1] == 1) for name in names)
    if max_norm == 0.5:
        assert np.all(got[:, 0] > 0.5)
    if max_norm == 100:
        assert np.all(got[:, 2] == 0)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="^max_norm: got -1, expected None or a finite number > 0"):
        diagnose.gradient_metrics(-1)
    with pytest.raises(ValueError, match="^of_gradient: got 3, expected a function"):
        train.make_train_step(jnp.sum, optax.sgd(1.0), of_gradient=3)


def test_only_diagnostics_may_stand_in_groups():
    record = {"metrics": {"mse": 0.5, "diagnostics": {"trained": {"a": [1, "inf"]}, "rate": 0.0}}}
    wrong = [
        {"mse": {"a": 1}}, {"diagnostics": {}}, {"diagnostics": {"a": {}}}, {"diagnostics": 1},
        {"diagnostics": {"a": {"b": "high"}}}, {"diagnostics": {"a": {"b": []}}},
    ]  # fmt: skip
    assert not any(problem.startswith("metrics") for problem in validate(record))
    for metrics in wrong:
        problems = [p for p in validate({"metrics": metrics}) if p.startswith("metrics")]
        assert len(problems) == 1 and ": got " in problems[0]
