"""Runs with --diagnose: their numbers against direct computation, and their figures."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from diagnose_problems import B, directly, flow_of, random_model

from lstmjax import checkpoint, diagnose, diagnostic_plots, losses
from lstmjax.data import sin
from lstmjax.records import Run, validate

ROOT = Path(__file__).resolve().parents[1]


# ---- a run --------------------------------------------------------------------------------------


def test_a_diagnosis_from_first_look_to_record(tmp_path):
    """Numbers of both looks, the mean radius and shares over valid steps, and what was logged."""
    rng = np.random.default_rng(7)
    model, params, inputs, loss = random_model(rng, "lstm", np.float32, vocabulary_size=5,
                                               input_size=3, num_layers=2)  # fmt: skip
    mask = np.array(inputs != 0)
    assert not mask.all()
    diagnosis = diagnose.Diagnosis(
        True, model, lambda y, _: loss(y), inputs, np.zeros(B), mask=mask, clip_norm=2.0
    )
    other = jax.tree.map(lambda a: 0.5 * a, params)
    diagnosis.look("initialisation", params)
    diagnosis.look("trained", other)
    counts = {"gradient_norm": ([6.0, 1.0], [2, 1]), "clipped_norm": ([4.0, 1.0], [2, 1])}
    counts |= {"clipped": ([2.0, 0.0], [2, 1]), "loss": ([9.0], [1])}
    diagnosis.log(3, jax.tree.map(np.float32, counts, is_leaf=lambda x: isinstance(x, list)))
    diagnosis.log(4, {name: (np.float32(1.5), np.float32(1)) for name in counts}
                  | {"clipped": (np.float32(0), np.float32(1))})  # fmt: skip
    skipped = dict.fromkeys(counts, (np.float32(0), np.float32(0)))
    diagnosis.log(5, skipped)  # of steps that were left out, no norm was taken
    with Run.create("look", {}, out=str(tmp_path / "run")) as folder:
        found = diagnosis.finish(folder, "lstm on words")["diagnostics"]
    figures = {path.name for path in (tmp_path / "run").glob("*.png")}
    expected = {"gradient_flow.png", "jacobian_radius.png", "gates.png", "gradient_norm.png"}
    assert figures == expected
    assert found["step"] == [3, 4, 5] and found["clip_rate"] == 0.5
    oracle.assert_close(np.array(found["gradient_norm"]), np.array([7 / 3, 1.5, np.nan]), 1e-6)
    oracle.assert_close(np.array(found["clipped_norm"]), np.array([5 / 3, 1.5, np.nan]), 1e-6)

    for when, weights in (("initialisation", params), ("trained", other)):
        seen = flow_of(model, weights, inputs, loss, jnp.asarray(mask))
        for number, layer in enumerate(seen):
            numbers, valid = found[when][f"layer_{number}"], mask.T
            for name, norms in layer.gradients.items():
                oracle.assert_close(np.array(numbers[f"gradient_{name}"]), norms, 1e-5)
            radius = [r[v].mean() if v.any() else np.nan
                      for r, v in zip(layer.radius, valid, strict=True)]  # fmt: skip
            np.testing.assert_allclose(numbers["radius"], radius, rtol=1e-5)
            for name, gate in layer.gates.items():
                kept = gate[valid]
                oracle.assert_close(
                    np.array(numbers["gates_left"][name]), (kept < 0.1).mean(0), 1e-6
                )
                oracle.assert_close(
                    np.array(numbers["gates_right"][name]), (kept > 0.9).mean(0), 1e-6
                )
            life = -np.log(2) / np.log(np.float64(layer.gates["f"][valid])).mean(0)
            oracle.assert_close(np.array(numbers["half_life"]), life, 1e-5)
    assert list(found["trained"]["layer_0"]["gates_left"]) == ["i", "f", "o"]


def test_a_diagnosis_that_is_off_does_nothing(tmp_path):
    off = diagnose.OFF
    off.look("trained", {})
    off.log(1, {})
    assert off.of_gradient is None and off.norms == {} and off.finish(None, "") == {}


# ---- figures ------------------------------------------------------------------------------------

LOOKS = {
    when: {
        "layer_0": {
            "gradient_h": [1.0 * k, 0.5, 0.0],
            "gradient_c": [0.0, 2.0, 0.1 * k],
            "radius_step": [0, 2],
            "radius": [0.9, np.nan],
            "gates_left": {"i": [0.1, 0.2], "f": [0.0, 0.3 * k]},
            "gates_right": {"i": [0.4, 0.5], "f": [0.6, 0.1]},
            "half_life": [np.inf, 3.0 * k],
        }
    }
    for k, when in enumerate(("initialisation", "trained"), 1)
}


def lines(axes):
    return {line.get_label(): np.asarray(line.get_xydata(), float) for line in axes.get_lines()}


def test_figures_hold_the_numbers():
    axes = diagnostic_plots.gradient_flow("a title", LOOKS).axes[0]
    drawn = lines(axes)
    np.testing.assert_array_equal(drawn["∂L/∂h, trained"], [[0, 2.0], [1, 0.5], [2, np.nan]])
    np.testing.assert_array_equal(drawn["∂L/∂c, initialisation"], [[0, np.nan], [1, 2], [2, 0.1]])
    assert axes.get_yscale() == "log" and axes.get_title(loc="left") == "a title"

    drawn = lines(diagnostic_plots.jacobian_radius("t", LOOKS).axes[0])
    np.testing.assert_array_equal(drawn["trained"], [[0, 0.9], [2, np.nan]])

    saturation, lives = diagnostic_plots.gates("t", LOOKS).axes
    points = {dots.get_label(): dots.get_offsets().tolist() for dots in saturation.collections}
    assert points == {"i": [[0.4, 0.1], [0.5, 0.2]], "f": [[0.6, 0.0], [0.1, 0.6]]}
    np.testing.assert_array_equal(lines(lives)["trained"], [[25, 6.0], [75, np.nan]])

    upper, lower = diagnostic_plots.clipping("t", [1, 2], [3, 1], [2, 1], [1, 0], 2.0).axes
    np.testing.assert_array_equal(lines(upper)["gradient"], [[1, 3], [2, 1]])
    np.testing.assert_array_equal(lines(upper)["clipped to 2"], [[1, 2], [2, 1]])
    np.testing.assert_array_equal(lower.get_lines()[0].get_ydata(), [100, 0])
    assert len(diagnostic_plots.clipping("t", [1], [3], [3], [0], None).axes) == 1


def test_figures_of_less():
    bare = {
        when: {f"layer_{n}": {k: v for k, v in look["layer_0"].items() if k != "half_life"}
               for n in range(2)} for when, look in LOOKS.items()
    }  # fmt: skip
    figure = diagnostic_plots.gates("t", bare)
    assert len(figure.axes) == 2  # no half-lives: one panel for each layer
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["gates, trained, layer 0", "gates, trained, layer 1"]
    assert len(diagnostic_plots.gradient_flow("t", bare).axes) == 2
    assert diagnostic_plots.clipping("t", [1], [0.0], [0.0], [0], None).axes[0].get_yscale() == (
        "linear"
    )
    with pytest.raises(ValueError, match="^looks: got none, expected at least one"):
        diagnostic_plots.gradient_flow("t", {})


# ---- the experiments ----------------------------------------------------------------------------

TINY = {
    "sin": "--updates 8 --frame-every 4 --cell gru --init keras --hidden-size 4 --clip-norm 100",
    "forecast": "--preset rnn --epochs 2 --batch-size 475 --hidden-size 4",
    "mnist": "--data offline --limit 20 --epochs 2 --batch-size 16 --hidden-size 4 --cell nfg "
    "--clip-norm 0.5 --validation-size 0",
    "imdb": "--data offline --limit 20 --epochs 1 --batch-size 10 --hidden-size 4 --max-length 40 "
    "--embedding-size 3 --vocabulary-size 30 --mask --clip-norm 0.1 --validation-size 0",
}
FIELDS = {"sin": "h", "forecast": "h", "mnist": "hc", "imdb": "hc"}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def run(name, flags, cwd, cache):
    """A run as its users start it."""
    environment = {**os.environ, "LSTMJAX_CACHE": str(cache), "JAX_PLATFORMS": "cpu"}
    environment["PYTHONPATH"] = str(ROOT)
    script = str(ROOT / "experiments" / f"{name}.py")
    arguments = [sys.executable, script, *flags.split()]
    return subprocess.run(arguments, cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("name", list(TINY))
def test_an_experiment_is_diagnosed(name, tmp_path, cache):
    done = run(name, f"{TINY[name]} --diagnose --devices 2 --out here", tmp_path, cache)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    folder = tmp_path / "here"
    record = json.loads((folder / "record.json").read_text())
    assert validate(record) == [] and record["config"]["diagnose"] is True
    found = record["metrics"]["diagnostics"]
    figures = {"gradient_flow", "jacobian_radius", "gradient_norm"}
    figures |= set() if name == "forecast" else {"gates"}
    assert figures <= {path.stem for path in folder.glob("*.png")}
    assert ("half_life" in found["trained"]["layer_0"]) == (name in ("sin", "imdb"))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "gradient_norm" in line]
    assert [line["step"] for line in logged] == found["step"]
    for key in ("gradient_norm", "clipped_norm"):
        assert [line[key] for line in logged] == found[key]
    check(name, record["config"], folder, found)


def check(name, config, folder, found):
    """The numbers of a record against direct computation from the weights in its folder."""
    script = runpy.run_path(str(ROOT / "experiments" / f"{name}.py"))
    settings = script["Config"](**config)
    model = script["make_model"](settings)
    inputs, targets, loss, mask = EXAMPLES[name](script, settings)
    like = jax.eval_shape(lambda: model.init(jax.random.key(0), inputs[:1])["params"])
    params = checkpoint.load_params(folder / "params.safetensors", like)
    norms, _ = directly(model, params, inputs, lambda y: loss(y, targets), mask)
    for number, expected in enumerate(norms):
        layer = found["trained"][f"layer_{number}"]
        assert [key for key in layer if key.startswith("gradient_")] == [
            f"gradient_{field}" for field in FIELDS[name]
        ]
        for field, want in expected.items():
            oracle.assert_close(np.array(layer[f"gradient_{field}"]), want, 1e-5)
        assert found["initialisation"][f"layer_{number}"] != layer
    bound = config["clip_norm"] or np.inf
    assert all(after <= bound * (1 + 1e-6) for after in found["clipped_norm"])
    if name == "sin":  # logged at every update
        before = np.array(found["gradient_norm"])
        oracle.assert_close(np.array(found["clipped_norm"]), np.minimum(before, bound), 1e-6)
        assert found["clip_rate"] == np.mean(before > bound) and 0 < found["clip_rate"] < 1
        data = sin.stateful_batches(settings.updates)
        params = model.init(jax.random.key(settings.seed), data["x"][0, :1])["params"]

        def sum_of_errors(params):
            y = model.apply({"params": params}, data["x"][0])[1]
            return jnp.sum(jnp.square(y - data["y"][0])) / len(y)

        squares = [jnp.sum(g**2) for g in jax.tree.leaves(jax.grad(sum_of_errors)(params))]
        first = np.sqrt(sum(squares))
        np.testing.assert_allclose(before[0], first, rtol=1e-5)


def of_sin(script, settings):
    data = sin.stateful_batches(settings.updates)
    x, y = (np.concatenate(data[n][-5:], axis=1) for n in "xy")
    return jnp.asarray(x), y[:, -1], losses.squared_error, None


def of_forecast(script, settings):
    windows = sin.forecast_windows()
    rows = np.round(np.linspace(0, 949, 64)).astype(int)
    return jnp.asarray(windows["x"][rows]), windows["y"][rows], losses.squared_error, None


def of_mnist(script, settings):
    dataset = script["mnist"].load("offline", validation_size=0).first(20)
    images = dataset.splits["train"]["image"].astype(np.float32) / 255
    labels = jnp.asarray(dataset.splits["train"]["label"])
    return jnp.asarray(images), labels, losses.cross_entropy, None


def of_imdb(script, settings):
    train_split = script["load"](settings).splits["train"]
    ids, labels = (jnp.asarray(train_split[n]) for n in ("ids", "label"))
    assert np.any(np.asarray(ids) == 0)

    def loss(y, labels):
        return losses.binary_cross_entropy(y[:, 0], labels)

    return ids, labels, loss, ids != 0


EXAMPLES = {"sin": of_sin, "forecast": of_forecast, "mnist": of_mnist, "imdb": of_imdb}


@pytest.mark.parametrize("name", ["imdb", "mnist"])
def test_zoneout_is_refused_in_one_line(name, tmp_path, cache):
    done = run(name, "--zoneout 0.1 --diagnose --data offline", tmp_path, cache)
    assert done.returncode == 2
    assert done.stderr == "error: --zoneout: got 0.1, expected 0 with --diagnose\n"
    assert not list(tmp_path.iterdir())
