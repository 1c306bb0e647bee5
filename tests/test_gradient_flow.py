"""experiments/gradient_flow.py: what it measures, trains and draws, against NumPy."""

import importlib.util
import json
import math
import os
import runpy
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import problems
import pytest
import scipy.stats
from oracle import assert_close, sigmoid

from lstmjax import diagnostics, flow_plots, flow_tables, tables
from lstmjax.flow_tables import PHASES, Row
from lstmjax.lstm import LSTMParams, LSTMState
from lstmjax.records import plain, validate

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "experiments" / "gradient_flow.py"
NAN = math.nan

_spec = importlib.util.spec_from_file_location("gradient_flow", SCRIPT)
experiment = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(experiment)
SYMBOLS, CLASSES = experiment.SYMBOLS, experiment.CLASSES
H, B = 3, 2


def weights_of(seed=3):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.normal(size=shape)  # noqa: E731
    cell = LSTMParams(normal(SYMBOLS, 4 * H), normal(H, 4 * H), normal(4 * H))
    return experiment.Weights(cell, normal(H, CLASSES), normal(CLASSES))


def run(function, *arguments):
    return jax.jit(function, compiler_options=problems.QUICK)(*arguments)


# ---- the task, and training on it ---------------------------------------------------------------


def test_sequences_begin_with_what_is_asked_for_and_never_repeat_it():
    symbols = experiment.sequences(3, 5, 40, 11)
    assert symbols.shape == (5, 11, 40)
    assert set(np.unique(symbols[:, 0])) == set(range(CLASSES))
    assert set(np.unique(symbols[:, 1:])) == set(range(CLASSES, SYMBOLS))
    assert np.ptp(symbols[:, 1:], axis=(0, 2)).min() == SYMBOLS - CLASSES - 1
    np.testing.assert_array_equal(symbols, experiment.sequences(3, 5, 40, 11))
    assert np.mean(symbols == experiment.sequences(4, 5, 40, 11)) < 0.4


def slow_entropies(h, weights, asked):
    """[B] cross-entropies of the logits that read h [B, H]."""
    logits = h @ weights.w + weights.b
    size = np.log(np.sum(np.exp(logits), axis=-1))
    return size - logits[np.arange(len(asked)), asked]


def slow_loss(weights, symbols):
    zeros = np.zeros((symbols.shape[1], H))
    _, hs = oracle.lstm(weights.cell, np.eye(SYMBOLS)[symbols], (zeros, zeros))
    return np.mean([slow_entropies(h, weights, symbols[0]) for h in hs])


def test_training_is_clipped_adam_on_the_mean_cross_entropy(x64):
    weights, symbols = weights_of(), experiment.sequences(0, 3, B, 4)
    fit = partial(experiment.fit, experiment.LSTM, learning_rate=0.02, max_norm=0.6)
    with jax.numpy_dtype_promotion("standard"):  # which optax counts on
        got, reports = run(fit, weights, symbols)
    weights, count = (*weights.cell[:3], *weights[1:]), 5
    means, squares = [0.0] * count, [0.0] * count

    def loss(*leaves, batch):
        cell = LSTMParams(*leaves[:3])
        return slow_loss(experiment.Weights(cell, *leaves[3:]), batch)

    for n, batch in enumerate(symbols):
        grads = oracle.gradients(partial(loss, batch=batch), *weights)
        norm = np.sqrt(sum(np.sum(g**2) for g in grads))
        np.testing.assert_allclose(reports.before[n], norm, rtol=1e-10)
        np.testing.assert_allclose(reports.after[n], min(norm, 0.6), rtol=1e-10)
        assert reports.clipped[n] == (norm > 0.6)
        grads = [g * min(1, 0.6 / norm) for g in grads]
        means = [0.9 * m + 0.1 * g for m, g in zip(means, grads, strict=True)]
        squares = [0.999 * v + 0.001 * g**2 for v, g in zip(squares, grads, strict=True)]
        corrected = [
            (m / (1 - 0.9 ** (n + 1)), np.sqrt(v / (1 - 0.999 ** (n + 1))))
            for m, v in zip(means, squares, strict=True)
        ]
        weights = tuple(
            w - 0.02 * m / (v + 1e-8) for w, (m, v) in zip(weights, corrected, strict=True)
        )
    assert_close((*got.cell[:3], got.w, got.b), weights, 1e-9)
    assert len(set(map(bool, reports.clipped))) == 2  # some are clipped and some are not


# ---- what is measured ---------------------------------------------------------------------------


def test_measure(x64):
    steps, weights = 22, weights_of(5)
    symbols = experiment.sequences(1, 1, B, steps)[0]
    got = run(partial(experiment.measure, experiment.LSTM, lag=7), weights, symbols)
    xs, zeros = np.eye(SYMBOLS)[symbols], np.zeros((B, H))
    states = [(zeros, zeros)]
    for x_t in xs:
        states.append(oracle.lstm(weights.cell, x_t[None], states[-1])[0])

    def loss_from(t, state):  # of the last step, as a function of the state before step t
        (h, _), _ = oracle.lstm(weights.cell, xs[t:], state)
        return np.sum(slow_entropies(h, weights, symbols[0]))

    size = np.mean(
        np.linalg.norm(oracle.gradients(partial(loss_from, steps), states[-1])[0][0], axis=-1)
    )
    for k in (1, 2, 9, steps - 1):
        t = steps - k
        of_c = oracle.gradients(partial(loss_from, t), states[t])[0][1]
        wanted = np.mean(np.linalg.norm(of_c, axis=-1)) / size
        np.testing.assert_allclose(got["flow"][k], wanted, rtol=1e-10)
    assert math.isnan(got["flow"][0])
    # One step back there is the direct path alone; two steps back there is more.
    np.testing.assert_allclose(got["direct"][1], got["flow"][1], rtol=1e-12)
    assert got["rest"][1] == 0 < got["rest"][2]

    z = np.stack([x @ weights.cell.w_x + h @ weights.cell.w_h + weights.cell.b
                  for x, (h, _) in zip(xs, states, strict=False)])  # fmt: skip
    f = sigmoid(z[..., H : 2 * H])
    lives = -np.log(2) / np.mean(np.log(f), axis=(0, 1))
    np.testing.assert_allclose(got["half_life"], np.median(lives), rtol=1e-11)
    np.testing.assert_allclose(got["longest"], np.max(lives), rtol=1e-11)

    stacked = LSTMState(*map(np.stack, zip(*states, strict=True)))
    step = diagnostics.STEPS["lstm"]
    radii = run(partial(diagnostics.jacobian_radius, step), weights.cell, stacked, xs)
    wanted = np.exp(np.mean(np.log(np.asarray(radii)[::20])))  # steps 0 and 20
    np.testing.assert_allclose(got["radius"], wanted, rtol=1e-11)

    for name, t in (("right", 7), ("right_reach", steps - 1)):
        logits = states[t + 1][0] @ weights.w + weights.b
        assert float(got[name]) == np.mean(np.argmax(logits, axis=-1) == symbols[0])


def test_the_rulers_are_powers_whatever_the_data_and_the_seed():
    programs = experiment.Programs(experiment.Config(lag=5), experiment.train.Clock())
    symbols = np.stack([experiment.sequences(seed, 1, B, 31)[0] for seed in (0, 1)])
    for radius in (0.9, 1.1):
        kind, init = experiment.models(5)[f"linear RNN, radius {radius}"]
        draw = jax.vmap(partial(experiment.draw, init, H))
        got = programs.measure(kind, draw(jnp.arange(2)), symbols)
        # The kernel is orthogonal in float32.
        wanted = np.broadcast_to(radius ** np.arange(31.0), (2, 31))
        np.testing.assert_allclose(got["flow"], wanted, rtol=1e-5)
        np.testing.assert_allclose(got["radius"], radius, rtol=1e-6)
        assert np.all(np.isnan(got["direct"])) and np.all(np.isnan(got["longest"]))
    assert len(programs._compiled) == 1  # one program for both


# ---- the wall -----------------------------------------------------------------------------------


def slow_wall(w, b, steps):
    h = 0.5
    for _ in range(steps):
        h = np.tanh(w * h + b)
    return (h - 0.2) ** 2


def test_the_wall_and_the_descents(x64):
    run(partial(experiment.wall_loss, 3), jnp.array([0.7, -0.2]))
    step = 1j * oracle.COMPLEX_STEP
    # 12 updates come to the wall; what follows there multiplies rounding errors too.
    for bound, updates in ((None, 12), (0.4, 12)):
        points, losses, reports = run(partial(experiment.descend, 50, updates, bound))
        w, b = 1.8, 0.0
        for n in range(updates):
            np.testing.assert_allclose(points[n], [w, b], rtol=1e-9, atol=1e-10)
            np.testing.assert_allclose(losses[n], slow_wall(w, b, 50), rtol=1e-9)
            grads = np.array([slow_wall(w + step, b, 50), slow_wall(w, b + step, 50)])
            grads = grads.imag / oracle.COMPLEX_STEP
            norm = np.linalg.norm(grads)
            np.testing.assert_allclose(reports.before[n], norm, rtol=1e-8)
            share = 1 if bound is None else min(1, bound / norm)
            w, b = np.array([w, b]) - 0.05 * share * grads
    assert 0 < np.sum(reports.clipped) < updates


# ---- numbers and text ---------------------------------------------------------------------------

MODELS = ["a ruler", "an LSTM"]


def rows():
    rng = np.random.default_rng(6)
    made = []
    for model, phase in (("a ruler", 0), ("an LSTM", 0), ("an LSTM", 1)):
        for seed in (4, 5, 6):
            found = {lag: float(10 ** rng.normal()) for lag in (1, 10)}
            direct = {1: 1.0, 10: 0.25 * (seed - 3)} if model == "an LSTM" else {1: NAN, 10: NAN}
            after = (0.5, 1.0, 0.25 * (seed - 4)) if phase else (0.25, 0.25, NAN)
            made.append(
                Row(model, PHASES[phase], seed, found, direct, 2.0 * seed, 99.0, 0.9, *after)
            )
    return made


def record_of(made):
    wall = {"wall_loss": [1.4, 0.0391], "wall_largest": [51.1, 130], "wall_clip_rate": [0, 0.9]}
    config = {"models": MODELS, "reach": 20, "hidden_size": 3, "updates": 5, "lag": 12}
    config |= {"wall_steps": 50, "wall_updates": 80, "wall_clip": 0.5}
    metrics = flow_tables.columns(made, MODELS) | wall
    return json.loads(json.dumps(plain({"config": config, "metrics": metrics})))


def test_rows_come_back_from_a_record():
    made = rows()
    assert str(flow_tables.rows_of(record_of(made))) == str(made)  # NaN is no equal of NaN


def test_log_interval():
    values = 10 ** np.random.default_rng(7).normal(size=(5, 3))
    mean, low, high = flow_tables.log_interval(values)
    logs = np.log(values)
    np.testing.assert_allclose(mean, scipy.stats.gmean(values), rtol=1e-12)
    wanted = scipy.stats.t.interval(0.95, 4, np.mean(logs, 0), scipy.stats.sem(logs))
    np.testing.assert_allclose((low, high), np.exp(wanted), rtol=1e-12)
    mean, low, high = flow_tables.log_interval([0.0, 1.0, 2.0])
    assert mean == 0 and math.isnan(low) and math.isnan(high)


def test_the_section():
    made = rows()

    class Group:
        records = (record_of(made),)

    lines = flow_tables.section([Group], lambda group: ["- from here"])
    text = "\n".join(lines)
    assert "H = 3, 3 seeds." in text and "5 updates on lags up to 12." in text
    after = lines[lines.index("After training:") + 2 :]
    head = "|  | lag 1 | lag 10 | half-life, steps | longest | radius | right answers | "
    assert after[0] == head + "at the longest lag | clip rate |"
    flows = [[row.flow[lag] for row in made[6:]] for lag in (1, 10)]
    spans = ["{:.1e} ({:.1e}–{:.1e})".format(*flow_tables.log_interval(f)) for f in flows]
    half_life = "{:.2g} ({:.2g}–{:.2g})".format(*flow_tables.log_interval([8.0, 10.0, 12.0]))
    wanted = (
        f"| an LSTM | {spans[0]} | {spans[1]} | {half_life} | 99 | 0.900 | 0.50 | 1.00 | 0.25 |"
    )
    assert after[2] == wanted
    assert "| a ruler |" in text and text.count("| a ruler |") == 1  # it is not trained
    low = "{:.2g} ({:.2g}–{:.2g})".format(*flow_tables.log_interval([0.25, 0.5, 0.75]))
    assert f"| an LSTM, before training | 1 | {low} |" in lines
    assert f"| an LSTM, after training | 1 | {low} |" in lines
    assert "ends at 1.4 without clipping and at 0.039 with norms clipped at 0.5, which 90 %" in text
    assert "largest norms met: 51.1, 130." in text and lines[-1] == "- from here"


# ---- figures ------------------------------------------------------------------------------------


def test_figures_draw_the_means_and_bands():
    rng = np.random.default_rng(8)
    flow = {p: {m: 10 ** rng.normal(size=(4, 9)) for m in MODELS} for p in PHASES}
    figure = flow_plots.gradient_flow("title", flow)
    for axes, curves in zip(figure.axes, flow.values(), strict=True):
        assert axes.get_yscale() == "log" and "steps" in axes.get_xlabel()
        for line, band, values in zip(axes.lines, axes.collections, curves.values(), strict=True):
            mean, low, high = flow_tables.log_interval(values)
            np.testing.assert_allclose(line.get_ydata(), mean)
            ys = band.get_paths()[0].vertices[:, 1]
            np.testing.assert_allclose([ys.min(), ys.max()], [low.min(), high.max()])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == MODELS
    kinds = {kind: 10 ** rng.normal(size=(4, 9)) for kind in ("flow", "direct", "rest")}
    figure = flow_plots.cell_paths("title", {"a": kinds, "b": kinds, "c": kinds})
    for line, values in zip(figure.axes[2].lines, kinds.values(), strict=True):
        np.testing.assert_allclose(line.get_ydata(), flow_tables.log_interval(values)[0])
    assert [axes.get_visible() for axes in figure.axes] == [True, True, True, False]
    w, b = np.linspace(0, 1, 5), np.linspace(-1, 0, 4)
    way = flow_plots.Descent(rng.random((4, 2)), rng.random(4), rng.random(3))
    figure = flow_plots.wall("title", w, b, rng.random((4, 5)), {"one": way})
    surface, loss, norm = (axes for axes in figure.axes if axes.lines)
    np.testing.assert_array_equal(surface.lines[0].get_xydata(), way.points)
    np.testing.assert_array_equal(loss.lines[0].get_ydata(), way.losses)
    np.testing.assert_array_equal(norm.lines[0].get_ydata(), way.norms)
    wrong = [
        (lambda: flow_plots.gradient_flow("t", {}), "panels: got none"),
        (lambda: flow_plots.gradient_flow("t", {"a": {"b": w}}), "panels: got norms of shape"),
        (lambda: flow_plots.wall("t", b, w, rng.random((4, 5)), {"one": way}), "losses: got shape"),
        (lambda: flow_plots.wall("t", w, b, rng.random((4, 5)), {}), "descents: got 0"),
    ]
    for call, message in wrong:
        with pytest.raises(ValueError) as raised:
            call()
        assert str(raised.value).startswith(message)


# ---- the command --------------------------------------------------------------------------------


def test_a_run_leaves_everything_it_should(tmp_path):
    flags = "--quick --hidden-size 3 --lag 4 --reach 11 --updates 2 --wall-updates 5 --seed 7 "
    flags += "--out here"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(SCRIPT), *flags.split()]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    folder = tmp_path / "here"
    record = json.loads((folder / "record.json").read_text())
    assert validate(record) == []
    assert record["command"] == f"python experiments/gradient_flow.py {flags}"
    assert record["seed"] == 7 and record["config"]["seeds"] == 2
    found = flow_tables.rows_of(record)
    names = list(experiment.models(4))
    assert [(row.model, row.phase, row.seed) for row in found] == [
        (name, phase, seed)
        for name in names
        for phase in PHASES[: 1 if "linear" in name else 2]
        for seed in (7, 8)
    ]
    for row in found:
        assert set(row.flow) == {1, 10} and all(0 < v < 10 for v in row.flow.values())
        if "radius" in row.model:
            np.testing.assert_allclose(row.flow[10], float(row.model[-3:]) ** 10, rtol=1e-5)
        assert math.isnan(row.clip_rate) == (row.phase == PHASES[0])
    bias = {row.model: row.half_life for row in found if row.phase == PHASES[0]}
    assert bias["LSTM, forget bias 0"] < bias["LSTM, forget bias 1"] < 5
    assert bias["LSTM, forget bias 5"] > 30
    assert done.stdout.splitlines()[-2] == flow_tables.wall_text(record)
    for name in ("gradient-flow", "cell-path-before", "cell-path-after", "wall"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    curves = json.loads((folder / "curves.json").read_text())
    (row,) = (r for r in found if r[:3] == ("GRU", PHASES[1], 8))
    assert curves["flow"]["GRU"][PHASES[1]]["flow"][1][10] == row.flow[10]
    (tmp_path / "one.json").write_bytes((folder / "record.json").read_bytes())
    text = tables.benchmarks([], [], tables.load_timed(tmp_path))
    assert "\n".join(flow_tables.section([tables.load_timed(tmp_path)["gradient-flow"][0]],
                                         tables._provenance)) in text  # fmt: skip


WRONG = [
    ("--seeds 1", "--seeds: got 1, expected at least 2"),
    ("--seeds 0", "--seeds: got 0, expected an integer of at least 1"),
    ("--reach 0", "--reach: got 0, expected an integer of at least 1"),
    ("--wall-clip 0", "--wall-clip: got 0.0, expected a finite number above 0"),
    ("--learning-rate nan", "--learning-rate: got nan, expected a finite number above 0"),
    ("--seed -1", "--seed: got -1, expected an integer of at least 0"),
    ("--seed 2147483647", "--seeds: got 5, expected so many that the last seed is below"),
    ("--lags 3", "--lags: no such flag"),
]


@pytest.mark.parametrize(("flags", "text"), WRONG)
def test_a_wrong_value_is_one_clear_line(flags, text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *flags.split()])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    error = capsys.readouterr().err
    assert stop.value.code == 2, error
    assert error.startswith(f"error: {text}") and error.count("\n") == 1, error
    assert not list(tmp_path.iterdir())  # nothing was begun
