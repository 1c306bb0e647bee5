"""experiments/long_lag.py: it trains what it says, scores it right, and records what it found."""

import dataclasses
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import problems
import pytest
from safetensors.numpy import load_file

from lstmjax import GRUParams, LSTMParams, RNNParams, long_lag_plots, long_lag_tables, tables
from lstmjax.data import long_lag
from lstmjax.records import params_sha256, validate
from lstmjax.seeds import interval
from lstmjax.train import Clock

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "experiments" / "long_lag.py"

_spec = importlib.util.spec_from_file_location("long_lag_experiment", SCRIPT)
experiment = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = experiment  # where its dataclass looks for its annotations
_spec.loader.exec_module(experiment)

TINY = {
    "hidden_size": 4, "batch_size": 6, "updates": 4, "eval_every": 2, "eval_size": 9, "seeds": 2,
}  # fmt: skip


class QuickClock(Clock):
    """A clock that compiles without optimising, which takes most of the time here."""

    def compile(self, run, *arguments):
        return run.lower(*arguments).compile(problems.QUICK)


def quick(function, *arguments):
    return jax.jit(function, compiler_options=problems.QUICK)(*arguments)


def fit(config, cell, task=None, devices=1, log=lambda *_: None):
    task = task or experiment.make_task(config.task, config.length)
    held = {
        split: task.draw(config.seed, 0, batch_size=config.eval_size, split=split)
        for split in ("validation", "test")
    }
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam needs it
        devices = jax.devices()[:devices]
        return experiment.fit(config, task, cell, held, devices, QuickClock(), log), held


# ---- what is measured ---------------------------------------------------------------------------


def softmax(logits):
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)


def measured(task, outputs, y):
    """Loss and share of wrong answers of each sequence, by the definitions, in NumPy."""
    if task.startswith("adding"):
        error = np.abs(outputs - y)[:, 0]
        return error**2, error >= {"adding": 0.08, "adding-hs": 0.04}[task]
    said = softmax(outputs)
    right = np.take_along_axis(said, y[..., None], -1)[..., 0]
    if task == "copy":
        asked = np.argmax(outputs[:, -10:], -1) != y[:, -10:]
        return -np.log(right).mean(axis=1), asked.mean(axis=1)
    return -np.log(right), np.abs(said - np.eye(said.shape[-1])[y]).max(axis=-1) >= 0.3


@pytest.mark.parametrize("name", ["adding", "adding-hs", "order", "order-3", "copy"])
def test_loss_and_wrong_answers_are_those_of_the_task(name, x64):
    task = experiment.make_task(name, 100)
    y = task.draw(0, 0, batch_size=300)["y"]
    rng = np.random.default_rng(1)
    if name.startswith("adding"):
        outputs = y.astype(np.float64) + rng.normal(0, 0.06, y.shape)
    else:  # about half of them confident, and most of those right
        outputs = rng.normal(size=(*y.shape, task.outputs))
        outputs += 5 * rng.integers(0, 2, y.shape)[..., None] * np.eye(task.outputs)[y]
    asked = y.astype(np.float64 if name.startswith("adding") else np.int64)
    loss, wrong = quick(task.measure, outputs, asked)
    want_loss, want_wrong = measured(name, outputs, y)
    np.testing.assert_allclose(loss, want_loss, rtol=1e-12)
    np.testing.assert_allclose(np.asarray(wrong, float), want_wrong, atol=1e-6)
    assert 0.1 < np.mean(want_wrong) < 0.9


def test_baselines_are_the_losses_of_answers_that_remember_nothing():
    # Of a task, the answer: the mean, or the probabilities of each symbol at each step.
    for name, length, base in [("adding", 50, 1 / 6), ("adding-hs", 100, 0.0392)]:
        task = experiment.make_task(name, length)
        y = task.draw(0, 0, batch_size=40_000)["y"]
        loss, _ = quick(task.measure, np.full_like(y, {"adding": 1.0}.get(name, 0.5)), y)
        assert task.baseline == pytest.approx(float(np.mean(loss)), rel=0.02)
        assert task.baseline == pytest.approx(base, rel=0.005)
    for name, classes in [("order", 4), ("order-3", 8)]:
        task = experiment.make_task(name, 100)
        y = task.draw(0, 0, batch_size=10)["y"]
        loss, _ = quick(task.measure, np.zeros((10, classes), np.float32), y)
        np.testing.assert_allclose(loss, task.baseline, rtol=1e-6)
    task = experiment.make_task("copy", 50)
    y = task.draw(0, 0, batch_size=10)["y"]
    logits = np.full((10, 70, 9), -np.inf, np.float32)
    logits[:, :60, 0] = logits[:, 60:, 1:] = 0
    loss, wrong = quick(task.measure, logits, y)
    np.testing.assert_allclose(loss, task.baseline, rtol=1e-6)
    assert task.baseline == pytest.approx(10 * math.log(8) / 70)
    assert 0.6 < np.mean(wrong) <= 1  # one in eight is right by chance


def test_solved_is_what_the_help_says():
    tasks = {
        name: experiment.make_task(name, 100).solved
        for name in ("adding", "adding-hs", "order", "order-3", "copy")
    }
    assert tasks["adding"](0.0099, 1.0) and not tasks["adding"](0.0101, 0.0)
    for name, allowed in (("adding-hs", 1), ("order", 1), ("order-3", 2)):
        loss, wrong = np.zeros(2), np.array([allowed, allowed + 1], np.float32) / 2560
        assert tasks[name](loss, wrong).tolist() == [True, False], name
    base = 10 * math.log(8) / 120
    assert tasks["copy"](base / 10.1, 1.0) and not tasks["copy"](base / 9.9, 0.0)
    # Of a record's numbers, too, which are the same float32 in more digits.
    assert tasks["order"]([0.5, 0.0], [0.0003906250058207661, 0.00040]).tolist() == [True, False]


# ---- what is trained ----------------------------------------------------------------------------


def outputs_of(params, cell, batch, task):
    """The model once more, in NumPy and float64: one layer over valid steps, and a dense head."""
    kinds = {"lstm": LSTMParams, "gru": GRUParams, "rnn": RNNParams}
    kind, slow = kinds[cell.split("-")[0]], getattr(oracle, cell.split("-")[0])
    weights = {name: np.asarray(w, np.float64) for name, w in params["layer_0"]["weights"].items()}
    xs = np.swapaxes(batch["x"] if task.kinds is None else np.eye(task.kinds)[batch["x"]], 0, 1)
    zeros = np.zeros((xs.shape[1], 4))
    state = (zeros, zeros) if kind is LSTMParams else (zeros,)
    (h, *_), hs = slow(kind(**weights), xs, state, lengths=batch.get("lengths"))
    read = np.swapaxes(hs, 0, 1) if task.measure is experiment.measure_copy else h
    return read @ np.float64(params["head"]["kernel"]) + np.float64(params["head"]["bias"])


@pytest.mark.parametrize(
    ("name", "length", "cell"),
    [("adding-hs", 20, "gru"), ("order", 100, "lstm-chrono"), ("copy", 3, "rnn")],
)
def test_scores_are_those_of_the_last_weights_on_sequences_of_their_own(name, length, cell):
    size = 3 if name == "order" else TINY["eval_size"]  # the oracle is slow
    config = experiment.Config(task=name, length=length, seed=3, **TINY | {"eval_size": size})
    task = experiment.make_task(name, length)
    result, held = fit(config, cell, task, devices=2)
    assert result.updates.tolist() == [0, 2, 4] and np.isinf(result.solved_at).all()
    assert not np.array_equal(held["validation"]["x"], held["test"]["x"])
    for number in range(2):
        params = jax.tree.map(lambda leaf, n=number: leaf[n], result.params)
        for split, loss, wrong in [
            ("test", result.test["loss"][number], result.test["wrong"][number]),
            ("validation", *(result.curves[name][number, -1] for name in ("loss", "wrong"))),
        ]:
            outputs = outputs_of(params, cell, held[split], task)
            want_loss, want_wrong = measured(name, outputs, held[split]["y"])
            assert loss == pytest.approx(np.mean(want_loss), rel=1e-5)
            assert wrong == pytest.approx(np.mean(want_wrong), abs=1e-6)


def test_forget_gates_start_as_the_cells_name_says():
    config = experiment.Config(task="copy", length=30, **TINY)
    task = experiment.make_task("copy", 30)
    biases = {}
    for cell in ("lstm", "lstm-2.5", "lstm-chrono", "lstm-log_uniform"):
        model = experiment.make_model(config, task, cell)
        x = jnp.zeros((1, 2, task.kinds))
        params = quick(model.init, jax.random.key(0), x)["params"]
        biases[cell] = np.split(np.asarray(params["layer_0"]["weights"]["b"]), 4)
    for cell, bias in (("lstm", 1), ("lstm-2.5", 2.5)):
        assert np.all(biases[cell][1] == bias) and np.all(biases[cell][0] == 0)
    for law in ("chrono", "log_uniform"):
        forget = biases[f"lstm-{law}"][1]
        assert np.all((0 < forget) & (forget < math.log(50 - 1))) and len(set(forget)) == 4
        np.testing.assert_array_equal(biases[f"lstm-{law}"][0], -forget)
    assert not np.array_equal(biases["lstm-chrono"][1], forget)


def test_a_seed_is_the_same_alone_and_among_others_and_sees_each_batch_once():
    config = experiment.Config(task="adding", length=5, **TINY | {"seeds": 3, "seed": 4})
    asked = []
    task = experiment.make_task("adding", 5)

    def draw(seed, index, split="train", **options):
        asked.append((seed, index)) if split == "train" else None
        return task.draw(seed, index, split=split, **options)

    together, _ = fit(config, "lstm", task._replace(draw=draw), devices=2)
    # The first piece's batches are drawn once more, to compile for.
    extra = [(seed, index) for seed in (4, 5, 6) for index in (0, 1)]
    want = [(seed, index) for seed in (4, 5, 6) for index in range(4)]
    assert sorted(asked) == sorted(want + extra)
    alone, _ = fit(dataclasses.replace(config, seed=5, seeds=1), "lstm")
    params = jax.tree.map(lambda leaf: leaf[1:2], together.params)
    for got, want in zip(jax.tree.leaves(params), jax.tree.leaves(alone.params), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_training_stops_where_all_seeds_have_solved_the_task():
    config = experiment.Config(task="adding", length=5, **TINY | {"updates": 10, "seeds": 3})
    task, seen = experiment.make_task("adding", 5), []

    def solved(loss, wrong):  # the first at 2 updates and never again, the others at 4 and 6
        return np.array([len(seen) == 2, len(seen) >= 3, len(seen) >= 4])

    result, _ = fit(config, "rnn", task._replace(solved=solved), log=lambda *at: seen.append(at))
    assert result.solved_at.tolist() == [2, 4, 6] and result.updates.tolist() == [0, 2, 4, 6]
    assert [update for update, _ in seen] == [0, 2, 4, 6]
    assert result.curves["loss"].shape == result.curves["wrong"].shape == (3, 4)
    for number, (_, scores) in enumerate(seen):
        np.testing.assert_array_equal(result.curves["loss"][:, number], scores["loss"])
    # Each is tested with the weights that solved the task, not with what became of them.
    for number, updates in enumerate((2, 4, 6)):
        alone = dataclasses.replace(config, seed=number, seeds=1, updates=updates)
        same, _ = fit(alone, "rnn", task._replace(solved=lambda loss, wrong: np.array([False])))
        params = jax.tree.map(lambda leaf, n=number: leaf[n : n + 1], result.params)
        pairs = zip(jax.tree.leaves(params), jax.tree.leaves(same.params), strict=True)
        for got, want in pairs:
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_an_lstm_learns_to_add():
    config = experiment.Config(
        length=4, hidden_size=16, learning_rate=0.02, batch_size=40, updates=400, eval_every=100,
        eval_size=300, seeds=2,
    )  # fmt: skip
    result, _ = fit(config, "lstm")
    assert np.all(np.isfinite(result.solved_at)) and np.all(result.test["loss"] < 0.02)
    assert np.all(result.curves["loss"][:, 0] > 0.1)


# ---- the run ------------------------------------------------------------------------------------


def run(arguments, cwd):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(SCRIPT), *arguments.split()]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """The record of a small run as its users start it."""
    folder = tmp_path_factory.mktemp("long_lag")
    flags = " ".join(f"--{name.replace('_', '-')} {n}" for name, n in TINY.items())
    done = run(f"--preset copy --length 2 {flags} --cells rnn,lstm --seed 3 --out here", folder)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    first, *lines, last = done.stdout.splitlines()
    assert first == "training on the copy problem, T = 2" and "record in here" in last
    assert lines == [f"{cell}: solved by 0 of 2 seeds; ran 4 updates" for cell in ("rnn", "lstm")]
    return json.loads((folder / "here" / "record.json").read_text()) | {"folder": folder / "here"}


def test_a_run_leaves_its_numbers(record):
    folder = record.pop("folder")
    assert validate(record) == []
    metrics = record["metrics"]
    assert metrics["baseline_loss"] == pytest.approx(10 * math.log(8) / 22)
    for cell in ("rnn", "lstm"):
        assert metrics[f"{cell}_solved_at"] == ["inf", "inf"]
        assert metrics[f"{cell}_updates"] == [0, 2, 4]
        for name in ("loss", "wrong"):
            values = metrics[f"{cell}_test_{name}"]
            mean, half = interval(values)
            assert metrics[f"{cell}_test_{name}_mean"] == pytest.approx(float(mean))
            assert metrics[f"{cell}_test_{name}_half_width"] == pytest.approx(float(half))
        logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        means = [line[f"{cell}_loss"] for line in logged if f"{cell}_loss" in line]
        curves = [metrics[f"{cell}_loss_{number}"] for number in range(2)]
        assert np.mean(curves, axis=0) == pytest.approx(means, rel=1e-3)
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    params = {}
    for name, array in load_file(folder / "params.safetensors").items():
        *path, leaf = name.split(".")
        place = params
        for part in path:
            place = place.setdefault(part, {})
        place[leaf] = array
    assert params_sha256(params) == record["params_sha256"]
    assert record["dataset"]["name"] == "copy problem, T = 2"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--cells lstm,tree", "--cells: got lstm,tree, expected known cells with commas"),
        ("--cells gru-chrono", "forget_bias: got chrono:2, expected None with the cell gru"),
        ("--cells rnn,lstm-x", "forget_bias: got x, expected a number"),
        ("--method onednn", "--method: got onednn, expected another one with cells that are no"),
        (
            "--method cudnn --cells lstm --task adding-hs",
            "--method: got cudnn, expected another one with --task adding-hs, which has lengths",
        ),
        ("--seed 2147483647", "--seeds: got 5, expected so many that the last seed is below 2147"),
        ("--cells lstm,lstm", "--cells: got lstm,lstm, expected no cell twice"),
        ("--updates 50", "--updates: got 50, expected a multiple of --eval-every 100"),
        ("--task order", "--length: got 200, expected 100 with --task order"),
        ("--task adding-hs --length 19", "--length: got 19, expected an integer of at least 20"),
        ("--cells rnn --init torch", "--init: got torch, expected keras or lstmjax with the cell"),
        ("--learning-rate 0", "--learning-rate: got 0.0, expected a finite number above 0"),
    ],
)
def test_wrong_settings_are_one_line(arguments, message, monkeypatch):
    config = experiment.cli.parse(
        experiment.Config, presets=experiment.PRESETS, argv=arguments.split()
    )
    with pytest.raises(ValueError) as caught:
        experiment.check(config)
    assert str(caught.value).startswith(message)


def test_presets_are_named_and_usable():
    for name, config in experiment.PRESETS.items():
        assert config.preset == name and config.seeds >= 5
        experiment.check(config)
    hints = experiment.Config.__annotations__
    assert set(hints["preset"].__args__) == set(experiment.PRESETS)
    assert set(hints["task"].__args__) == set(long_lag_tables.LOSSES)


# ---- tables and figures -------------------------------------------------------------------------


def test_how_often_and_when():
    inf = "inf"
    assert long_lag_tables.solved([inf, inf]) == ("0 of 2", "–")
    assert long_lag_tables.solved([inf, 1200]) == ("1 of 2", "1,200")
    # ± t s/√3 with s = 100 and t = 4.3027
    assert long_lag_tables.solved([1100, 1000, 1200, inf]) == ("3 of 4", "1,100 ± 248")
    line = long_lag_tables.line("gru", np.array([np.inf, 500.0]), 3000)
    assert line == "gru: solved by 1 of 2 seeds after 500 updates; ran 3,000 updates"


def test_a_seed_is_scored_on_the_same_sequences_by_itself(record, tmp_path):
    """So that one seed can be repeated alone, whichever others it was recorded with."""
    flags = " ".join(f"--{name.replace('_', '-')} {n}" for name, n in TINY.items() if n != "seeds")
    flags = flags.replace("--seeds 2", "--seeds 1")
    done = run(f"--preset copy --length 2 {flags} --cells rnn,lstm --seed 4 --out a", tmp_path)
    assert done.returncode == 0, done.stderr
    alone = json.loads((tmp_path / "a" / "record.json").read_text())["metrics"]
    for cell in ("rnn", "lstm"):
        for name in ("test_loss", "test_wrong"):
            want = record["metrics"][f"{cell}_{name}"][1]
            assert alone[f"{cell}_{name}"][0] == pytest.approx(want, rel=1e-4), name


def test_section_of_benchmarks():
    metrics = {
        "baseline_loss": 1 / 6, "lstm_solved_at": [300, 500, 400], "lstm_updates": [0, 100, 500],
        "lstm_train_seconds": 12.4, "lstm_test_loss_mean": 0.00512,
        "lstm_test_loss_half_width": 0.0011, "lstm_test_wrong_mean": 0.0312,
        "lstm_test_wrong_half_width": 0.01, "rnn_solved_at": ["inf"] * 3, "rnn_updates": [0, 3000],
        "rnn_train_seconds": 50.0, "rnn_test_loss_mean": "nan", "rnn_test_loss_half_width": "nan",
        "rnn_test_wrong_mean": 1.0, "rnn_test_wrong_half_width": 0.0,
        "lstm_test_loss": [0.009, 0.0101, 0.02], "lstm_test_wrong": [0.5, 0.0, 0.0],
        "rnn_test_loss": ["nan"] * 3, "rnn_test_wrong": [1.0] * 3,
    }  # fmt: skip
    config = {
        "task": "adding", "length": 1000, "cells": "lstm,rnn", "seeds": 3, "batch_size": 50,
        "eval_every": 100, "updates": 3000,
    }  # fmt: skip
    group = SimpleNamespace(
        records=[{"seed": 7, "config": config, "metrics": metrics}], files=["one-seeds7-9.json"]
    )
    text = "\n".join(long_lag_tables.section([group, group], lambda group: ["- from here"]))
    assert text.count("### one: adding problem, T = 1,000\n") == text.count("- from here") == 2
    assert "The loss is the mean squared error; without memory it is 0.167 at best." in text
    assert "wrong is an error of 0.08 or more" in text
    assert "after every 100 updates of 50 sequences, at most 3,000." in text
    assert (
        "| lstm | 7–9 | 3 of 3 | 400 ± 248 | 500 | 1 of 3 | 0.0051 ± 0.0011 | 3.12 ± 1.00 | 12 |\n"
        "| rnn | 7–9 | 0 of 3 | – | 3,000 | 0 of 3 | nan | 100.00 ± 0.00 | 50 |\n"
    ) in text


def test_a_record_gets_its_section(record, tmp_path):
    record = {key: value for key, value in record.items() if key != "folder"}
    (tmp_path / "long-lag-copy-seed3.json").write_text(json.dumps(record))
    text = tables.benchmarks([], [], tables.load_timed(tmp_path))
    assert "## long-lag: memory over many steps" in text
    assert "### long-lag-copy: copy problem, T = 2" in text and "| rnn | 3–4 | 0 of 2 |" in text
    assert "with seeds 3, 4\n" in text and "`long-lag-copy-seed3.json`" in text


def test_figure_draws_means_bands_seeds_and_the_baseline():
    rng = np.random.default_rng(0)
    updates = np.arange(4) * 100
    loss = {"lstm": (updates, rng.uniform(0.1, 1, (5, 4))), "rnn": (updates[:2], np.ones((1, 2)))}
    loss["gru"] = updates[:3], [[1.0, np.inf, np.nan]]  # it went astray
    wrong = {cell: (at, np.divide(values, 2)) for cell, (at, values) in loss.items()}
    figure = long_lag_plots.curves("a task", {"loss": loss, "wrong": wrong}, "loss (nats)", 0.3)
    upper, lower = figure.axes
    assert upper.get_yscale() == "log" and upper.get_ylabel() == "held-out loss (nats)"
    assert lower.get_ylabel() == "wrong answers (%)" and lower.get_xlabel() == "updates"
    lines = {line.get_label(): line for line in upper.lines if line.get_label()[0] != "_"}
    assert list(lines) == ["lstm", "rnn", "gru", "without memory"]
    logs = np.log(loss["lstm"][1])
    np.testing.assert_allclose(lines["lstm"].get_ydata(), np.exp(logs.mean(axis=0)))
    assert set(lines["without memory"].get_ydata()) == {0.3}
    seen = [*loss["lstm"][1].ravel(), 1.0, 0.3]
    assert upper.get_ylim() == pytest.approx((min(seen) / 1.5, max(seen) * 1.5))
    assert (
        len(upper.lines) == 5 + 1 + 2 + 2 + 1
    )  # the seeds and means of three cells, and the baseline
    (band,) = upper.collections  # of one seed there is none
    mean, half = interval(logs)
    corners = band.get_paths()[0].vertices[:, 1]
    assert corners.max() == pytest.approx(np.exp(mean + half).max())
    assert corners.min() == pytest.approx(np.exp(mean - half).min())
    np.testing.assert_allclose(lower.lines[5].get_ydata(), 50 * loss["lstm"][1].mean(axis=0))


def test_figure_of_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="^panels: got no cell, expected at least one$"):
        long_lag_plots.curves("", {"loss": {}, "wrong": {}}, "", 1.0)
    curves = {"lstm": (np.arange(3), np.ones((2, 4)))}
    with pytest.raises(ValueError, match=r"^panels: got \(2, 4\) for 'lstm', expected \[S, 3\]"):
        long_lag_plots.curves("", {"loss": curves, "wrong": curves}, "", 1.0)


def test_titles_of_all_tasks():
    assert long_lag_tables.title("adding-hs", 100) == "adding problem of 1997, T = 100"
    assert set(long_lag_tables.LOSSES) == set(long_lag_tables._TITLES)
    assert long_lag.ORDER_LENGTHS == (100, 110)  # which the titles of the orders name


def test_seeds_begin_with_weights_of_their_own():
    task = experiment.make_task("adding", 6)
    config = experiment.Config(task="adding", length=6, clip_norm=0.5, init="keras", hidden_size=3)
    _, tx, start = experiment.start_of(config, task, "lstm")
    one, other = (jax.tree.leaves(start(seed).params) for seed in (3, 4))
    assert any(np.any(a != b) for a, b in zip(one, other, strict=True))
    model = experiment.make_model(config, task, "lstm")
    assert model.cell_init == "keras"
    init_key, _ = jax.random.split(jax.random.key(3))
    want = model.init(init_key, jnp.zeros((1, 1, 2)))["params"]
    for got, expected in zip(one, jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    g = {"a": jnp.array([3.0, 0.0]), "b": jnp.array(4.0)}
    with jax.numpy_dtype_promotion("standard"):
        _, state = tx.update(g, tx.init(g), g)
    (mu,) = [part.mu for part in jax.tree.leaves(state, is_leaf=lambda s: hasattr(s, "mu"))
             if hasattr(part, "mu")]  # fmt: skip
    np.testing.assert_allclose(mu["a"], [0.03, 0.0], rtol=1e-5)  # 0.1 · 0.5 · 3/5
