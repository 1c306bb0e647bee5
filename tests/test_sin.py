"""experiments/sin.py and forecast.py: whose gradient, which window, what skipped steps count."""

import math
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "experiments"))
import forecast  # noqa: E402
import sin  # noqa: E402


def test_no_gradient_goes_through_the_pass_in_between():
    """Keras's predict leaves values: the gradient is that of the window alone, from that state."""
    config = sin.Config(loss="mean", advance_twice=True, hidden_size=4, num_steps=5)
    model, rng = sin.make_model(config), np.random.default_rng(0)
    normal = lambda shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    batch = {name: normal((3, 5, 1)) for name in ("x", "x_before", "y")}
    batch |= {"first": np.array([False, True, False]), "weight": np.ones(3, np.float32)}
    params = model.init(jax.random.key(1), jnp.asarray(batch["x"]))["params"]
    params = jax.tree.map(lambda p: normal(p.shape), params)
    zeros, _ = model.apply({"params": params}, batch["x"])
    carry = jax.tree.map(lambda s: normal(s.shape), zeros)

    again, _ = model.apply({"params": params}, batch["x_before"], carry)
    known = jax.tree.map(lambda a, c: np.where(batch["first"][:, None], c, a), again, carry)

    def alone(params):
        predictions = model.apply({"params": params}, batch["x"], known)[1]
        return jnp.mean((predictions - batch["y"]) ** 2)

    def twice(params, carry):
        return sin.make_loss(model, config, twice=True)(params, batch, None, carry)[0]

    want, of_params = jax.value_and_grad(alone)(params)
    got, (of_params_twice, of_carry) = jax.value_and_grad(twice, (0, 1))(params, carry)
    oracle.assert_close(got, want, 1e-5)
    oracle.assert_close(
        tuple(jax.tree.leaves(of_params_twice)), tuple(jax.tree.leaves(of_params)), 1e-5
    )
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(of_carry))


@pytest.mark.parametrize("twice", [False, True])
def test_the_loss_is_the_mean_or_the_sum_over_steps(twice):
    """TensorFlow 1's tutorial adds the squared errors of all steps up: 20 times the MSE."""
    rng, found = np.random.default_rng(0), {}
    batch = {name: rng.normal(size=(3, 20, 1)).astype("f4") for name in ("x", "x_before", "y")}
    batch |= {"first": np.array([False, True, False]), "weight": np.ones(3, np.float32)}
    for loss in ("mean", "sum"):
        config = sin.Config(loss=loss, num_steps=20)
        model = sin.make_model(config)
        params = model.init(jax.random.key(1), jnp.asarray(batch["x"]))["params"]
        carry = jax.tree.map(jnp.zeros_like, model.apply({"params": params}, batch["x"])[0])
        found[loss], (metrics, _) = sin.make_loss(model, config, twice)(params, batch, None, carry)
        total, count = metrics["loss"]
        assert total / count == pytest.approx(float(found["mean"]), rel=1e-6)
    assert float(found["sum"]) == pytest.approx(20 * float(found["mean"]), rel=1e-6)


def test_skipped_updates_have_no_mse_of_their_own():
    """Of a step that was left out there is no loss: not 0, and no "nan" in the mean of the rest."""
    mse = [float("nan"), *[5.0] * 30, 1.0, "nan", 3.0]  # as a checkpoint gives it back
    found = sin.numbers(sin.Config(loss="mean", advance_twice=False), [mse])
    assert math.isnan(found["mse_first"]) and found["mse"] == pytest.approx((17 * 5 + 4) / 19)
    assert math.isnan(sin.numbers(sin.Config(), [["nan"] * 30])["mse"])


@pytest.mark.parametrize(("all_windows", "begin"), [(True, 950), (False, 948)])
def test_a_forecast_begins_where_the_last_window_ends(all_windows, begin):
    """The tutorial's last window is that of the values 948 to 997."""
    config = forecast.Config(all_windows=all_windows, steps=3)
    windows = forecast.sin.forecast_windows(corrected=all_windows)
    t, known, future, truth, window = forecast.question(config, windows)
    grid = -100 + 200 / 999 * np.arange(begin, begin + 53)
    np.testing.assert_allclose(np.concatenate([t, future]), grid, atol=1e-10)
    np.testing.assert_allclose(np.concatenate([known, truth]), np.sin(grid), atol=1e-10)
    np.testing.assert_allclose(window[:, 0], np.sin(grid[:50]), atol=1e-6)
    if not all_windows:
        np.testing.assert_array_equal(window, windows["x"][-1])
