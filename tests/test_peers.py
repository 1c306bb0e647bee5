"""The source programs in Keras: what can be told without TensorFlow, and where it is there more."""

import importlib.util
import json
import os
import runpy
import subprocess
import sys
import time
import typing
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import oracle
import peer_runs
import pytest

from lstmjax import rows, tables
from lstmjax.data import sin
from lstmjax.lstm import LSTMParams
from lstmjax.records import validate
from lstmjax.train import Clock

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
PEERS = EXPERIMENTS / "peers.py"


@pytest.fixture(scope="module")
def modules():
    """peers.py and peer_keras.py as modules."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXPERIMENTS))
        import peer_keras
        import peers

        yield peers, peer_keras
        for name in ("peers", "peer_keras", "peer_tasks"):
            del sys.modules[name]


@pytest.fixture(scope="module")
def peers(modules):
    return modules[0]


@pytest.fixture(scope="module")
def programs(modules):
    return modules[1]


@pytest.fixture
def command(monkeypatch, tmp_path, capsys):
    """``run(*flags) -> (exit code, stdout, stderr)`` of peers.py, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(EXPERIMENTS))

    def run(*flags):
        monkeypatch.setattr(sys, "argv", [str(PEERS), *flags])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(PEERS), run_name="__main__")
        return stop.value.code, *capsys.readouterr()

    return run


# --- without TensorFlow --------------------------------------------------------------------------


def test_every_row_of_the_tables_is_a_program(peers, programs):
    rows = typing.get_args(typing.get_type_hints(peers.Config)["row"])
    assert sorted(rows) == sorted(programs.PROGRAMS) == sorted(tables.SOURCES)
    assert sorted(rows) == sorted(peers.ROWS["keras"]) and set(peers.ROWS["torch"]) < set(rows)


def test_updates_and_epochs_are_those_of_our_programs(programs):
    ours = {}
    for name in ("sin", "forecast", "imdb", "mnist"):
        ours |= runpy.run_path(str(EXPERIMENTS / f"{name}.py"))["ROWS"]
    assert set(ours) - set(programs.PROGRAMS) == set(rows.FAST)
    for row, config in ours.items():
        if row in rows.FAST:
            continue  # the program of another row, in our own arithmetic
        settings = getattr(programs.PROGRAMS[row], "keywords", {})
        if row.startswith(("imdb", "mnist")):
            known = programs.peer_tasks
            epochs = known.REVIEW_EPOCHS if row.startswith("imdb") else known.DIGIT_EPOCHS
            assert config.epochs == epochs
            assert config.test_every_epoch == settings.get("as_published", False)
        elif row.startswith("sin"):
            assert settings["updates"] == config.updates
            assert settings["twice"] == config.advance_twice
            assert settings["scale"] == {"sum": config.num_steps, "mean": 1}[config.loss]
        else:
            assert settings["epochs"] == config.epochs and programs.FORECAST_STEPS == config.steps


@pytest.mark.parametrize("missing", ["keras", "tensorflow", "torch"])
def test_what_is_missing_is_named_in_one_line(missing, command, monkeypatch, tmp_path):
    monkeypatch.delitem(sys.modules, "peer_torch", raising=False)
    framework = "torch" if missing == "torch" else "keras"
    if missing == "tensorflow":  # Keras may be installed, and would look for TensorFlow itself
        monkeypatch.setitem(sys.modules, "keras", SimpleNamespace())
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.setenv("KERAS_BACKEND", "tensorflow")
    code, _, error = command("--row", "imdb-tf2", "--framework", framework)
    assert code == 1
    assert error == f"error: {missing} is not installed: pip install -e '.[peers]'\n"
    assert list(tmp_path.iterdir()) == []


WRONG = [
    ("--row mnist", "--row: got 'mnist', expected one of sin-tf1, sin-keras, forecast-rnn"),
    ("--row sin-tf1 --seed -1", "--seed: got -1, expected an integer of at least 0"),
    ("--row sin-tf1 --limit 0", "--limit: got 0, expected an integer of at least 1"),
    ("--row imdb-tf2-gru --limit 127", "--limit: got 127, expected an integer of at least 128"),
    (
        "--row imdb-tf2-gru --framework torch",
        "--row: got imdb-tf2-gru, expected one of imdb-tf2, imdb-tf2-source, mnist-tf1, "
        "mnist-corrected with --framework torch",
    ),
    ("--framework jax", "--framework: got 'jax', expected one of keras, torch"),
    ("--row sin-tf1 --data web", "--data: got 'web', expected one of auto, tfds, offline"),
    ("--row sin-tf1 --limt 3", "--limt: no such flag, did you mean --limit?"),
]


@pytest.mark.parametrize(("flags", "text"), WRONG)
def test_a_wrong_value_is_one_clear_line(flags, text, command, tmp_path):
    code, _, error = command(*flags.split())
    assert code == 2
    assert error.startswith(f"error: {text}") and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flags", [(), ("--out", "mine.json")])
def test_a_record_that_exists_is_never_overwritten(flags, command, tmp_path):
    default = Path("experiments", "results", "peers-sin-keras-seed4.json")
    old = Path(flags[1]) if flags else default
    (tmp_path / old).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / old).write_text("mine")
    code, _, error = command("--row", "sin-keras", "--seed", "4", *flags)
    assert (code, error) == (1, f"error: {old} exists: move it away, or choose another --out\n")
    assert (tmp_path / old).read_text() == "mine"


@pytest.mark.parametrize("name", ["keras", "layers", "tasks", "torch", "workers"])
def test_a_part_is_no_script(name, monkeypatch):
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    monkeypatch.setitem(sys.modules, "torch", None)  # as where it is not installed
    script = EXPERIMENTS / f"peer_{name}.py"
    for flags in ([], ["--help"]):
        monkeypatch.setattr(sys, "argv", [str(script), *flags])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(script), run_name="__main__")
        # A text is said on standard error, and the exit code is 1.
        assert stop.value.code == (
            f"error: peer_{name}.py is a part of peers.py: python experiments/peers.py --help"
        )


def test_help_explains_every_flag(command):
    code, text, _ = command("--help")
    assert not code and "python experiments/peers.py --row imdb-tf2 --seed 0" in text
    assert "python experiments/peers.py layers" in text
    for flag in ("--row", "--framework", "--seed", "--data", "--limit", "--out"):
        assert flag in text


# --- with TensorFlow -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def keras(programs):
    for package in ("tensorflow", "keras"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        programs.load(0)
        import keras
    return keras


# TensorFlow's own warnings are not ours to mend.
with_tensorflow = pytest.mark.filterwarnings("ignore")


def lstm(layer, weights, xs, state):
    """Every row of xs [B, T, D] through a Keras layer's LSTM weights, in the oracle: (h, c)."""
    w_x, w_h, b = (np.asarray(w, np.float64) for w in weights)
    params = LSTMParams(w_x, w_h, b)  # Keras's gates are in the same order
    outputs = np.zeros((*xs.shape[:2], layer.units))
    h, c = (np.array(part, np.float64) for part in state)
    for row in range(len(xs)):
        for t in range(xs.shape[1]):
            h[row], c[row] = oracle.lstm_step(params, xs[row, t].astype(float), h[row], c[row])
            outputs[row, t] = h[row]
    return outputs, (h, c)


@with_tensorflow
@pytest.mark.parametrize("twice", [False, True])
def test_the_state_moves_once_or_twice_on_a_window(twice, programs, keras, monkeypatch):
    # Keras 1's gates, which this model has.
    monkeypatch.setattr(oracle, "sigmoid", lambda z: np.clip(0.2 * z + 0.5, 0.0, 1.0))
    keras.utils.set_random_seed(3)
    model, data = programs.sin_model("sin-keras"), sin.stateful_batches(1)
    layer, head = model.layers
    before = [w.numpy() for w in layer.weights[:3]]
    kernel, bias = (w.numpy() for w in head.weights)
    mse = programs.fit_sin(model, data, 1.0, twice, Clock())
    after = [w.numpy() for w in layer.weights[:3]]

    x, y = data["x"][0], data["y"][0]
    hs, state = lstm(layer, before, x, np.zeros((2, 50, 20)))
    np.testing.assert_allclose(mse, [np.mean((hs @ kernel + bias - y) ** 2)], rtol=1e-5)
    if twice:
        _, state = lstm(layer, after, x, state)
    np.testing.assert_allclose([s.numpy() for s in layer.states], state, rtol=1e-4, atol=1e-6)
    # Adam's first step is the learning rate but where gradients are tiny.
    np.testing.assert_allclose(np.median(np.abs(after[0] - before[0])), 0.006, rtol=1e-3)


@with_tensorflow
def test_initial_laws_are_those_of_the_sources(programs, keras):
    keras.utils.set_random_seed(5)
    first, cell, head = programs.sin_model("sin-tf1").layers
    assert 0.4 < np.std(first.kernel.numpy()) < 2 and np.all(first.bias.numpy() == np.float32(0.1))
    assert 0.4 < np.std(head.kernel.numpy()) < 2 and np.all(head.bias.numpy() == np.float32(0.1))
    kernel, recurrent, bias = (w.numpy() for w in cell.weights[:3])
    for drawn, limit in ((kernel, (6 / 60) ** 0.5), (recurrent, (6 / 60) ** 0.5)):
        assert 0.97 * limit < np.abs(drawn).max() <= limit
    np.testing.assert_array_equal(bias, np.repeat([0.0, 1.0, 0.0, 0.0], 10))
    layer = programs.sin_model("sin-keras").layers[0]
    kernel, recurrent, _ = (w.numpy() for w in layer.weights[:3])
    for drawn, limit in ((kernel, (6 / 21) ** 0.5), (recurrent, (6 / 40) ** 0.5)):
        assert 0.93 * limit < np.abs(drawn).max() <= limit


@with_tensorflow
def test_the_double_softmax_survives_keras(programs, keras):
    random = np.random.default_rng(1)
    logits = random.normal(size=(37, 10)).astype(np.float32) * 3
    label = random.integers(0, 10, 37).astype(np.int32)
    softmax = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    expected = np.log(np.exp(softmax).sum(axis=1)) - softmax[np.arange(37), label]
    np.testing.assert_allclose(programs.double_softmax(label, logits), expected, rtol=1e-5)

    model = keras.Sequential([keras.Input((10,)), keras.layers.Activation("linear")])
    model.compile(loss=programs.double_softmax)
    found = model.evaluate(logits, label, batch_size=16, verbose=0)
    np.testing.assert_allclose(found, expected.mean(), rtol=1e-5)
    sure = np.where(np.arange(10) == label[:, None], 100.0, 0.0).astype(np.float32)
    found = model.evaluate(sure, label, verbose=0)
    np.testing.assert_allclose(found, np.log(1 + 9 / np.e), rtol=1e-5)  # 1.4612


@with_tensorflow
@pytest.mark.parametrize("drop_remainder", [False, True])
def test_every_pass_has_its_own_order_of_all_rows(drop_remainder, programs, keras):
    x = np.arange(53, dtype=np.float32)[:, None] + np.zeros((1, 3), np.float32)
    y = 10 * np.arange(53, dtype=np.int32)
    batches = programs.shuffled(x, y, 10, 7, drop_remainder)
    passes = [[(a.numpy(), b.numpy()) for a, b in batches] for _ in range(2)]
    orders = []
    for one in passes:
        assert [len(a) for a, _ in one] == [10] * 5 + [3] * (not drop_remainder)
        rows, labels = (np.concatenate(parts) for parts in zip(*one, strict=True))
        np.testing.assert_array_equal(10 * rows[:, 2], labels)
        assert len(set(labels.tolist())) == len(labels)
        orders.append(labels.tolist())
    assert orders[0] != orders[1] != sorted(orders[1])


@with_tensorflow
def test_both_forecasts_are_the_slow_ones(programs, keras, monkeypatch):
    monkeypatch.setattr(programs, "FORECAST_STEPS", 6)
    keras.utils.set_random_seed(2)
    layer, head = keras.layers.LSTM(5, return_state=True), keras.layers.Dense(1)
    inputs = keras.Input((7, 1))
    model = keras.Model(inputs, head(layer(inputs)[0]))
    window = np.random.default_rng(4).normal(size=(7, 1)).astype(np.float32)
    kernel, bias = (w.numpy() for w in head.weights)

    def forecast(seen):  # seen(all values so far) is what the model reads for the next one
        values = list(window[:, 0])
        for _ in range(6):
            xs = np.asarray(seen(values))[None, :, None]
            _, (h, _) = lstm(layer, layer.weights[:3], xs, np.zeros((2, 1, 5)))
            values.append((h @ kernel + bias)[0, 0])
        return values[7:]

    rerun, carried = (way(window).numpy() for way in programs.forecasters(model, layer, head))
    np.testing.assert_allclose(rerun, forecast(lambda values: values[-7:]), rtol=1e-4)
    np.testing.assert_allclose(carried, forecast(lambda values: values), rtol=1e-4)
    assert np.abs(rerun - carried).max() > 1e-3


@with_tensorflow
@pytest.mark.parametrize("row", peer_runs.ROWS)
def test_scores_are_those_that_the_tables_show(row, modules, keras, monkeypatch):
    peers, programs = modules
    config = peers.Config(row, seed=6, data="offline")
    peer_runs.check_scores(programs, config, monkeypatch, {"test": 21, "validation": 9})


@with_tensorflow
def test_the_first_batch_is_compile_and_the_rest_is_not(programs, keras):
    def run(callbacks, verbose):
        for seconds in (0.2, 0.05, 0.05):
            time.sleep(seconds)
            callbacks[0].on_test_batch_end(0)
        return "scores"

    clock = Clock()
    assert programs.timed(clock, "eval", run) == "scores"
    np.testing.assert_allclose([clock.seconds[k] for k in ("compile", "eval")], [0.2, 0.1], 0.3)
    programs.timed(clock, "eval", run)
    np.testing.assert_allclose([clock.seconds[k] for k in ("compile", "eval")], [0.2, 0.4], 0.3)
    assert clock.seconds["train"] == 0


@with_tensorflow
def test_a_run_leaves_a_valid_record(programs, keras, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(EXPERIMENTS.parent), "JAX_PLATFORMS": "cpu"}
    arguments = [sys.executable, str(PEERS), "--row", "sin-tf1", "--seed", "2"]
    done = subprocess.run(arguments, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    file = tmp_path / "experiments" / "results" / "peers-sin-tf1-seed2.json"
    assert done.stdout.endswith(f"record in {file.relative_to(tmp_path)}\n")
    record = json.loads(file.read_text())
    assert validate(record) == [] and record["experiment"] == "peers" and record["seed"] == 2
    assert record["command"] == "python experiments/peers.py --row sin-tf1 --seed 2"
    environment = record["environment"]
    versions = f"keras {environment['keras']} / tensorflow {environment['tensorflow']}"
    assert record["peer"] == {"row": "sin-tf1", "framework": versions}
    assert not {"jax", "jaxlib", "flax", "optax"} & set(environment)
    assert record["dataset"]["sha256"] == sin.dataset(sin.stateful_batches(200)).sha256
    metrics = record["metrics"]
    np.testing.assert_allclose(metrics["source_loss"], 20 * metrics["mse"], rtol=1e-12)
    assert metrics["mse"] < 0.05 < metrics["mse_first"]
    (group,) = tables.load_groups(file.parent)
    assert f"| {versions} |" in tables.benchmarks([group])
