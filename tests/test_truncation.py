"""experiments/truncation.py: what it trains, measures, draws and says."""

import importlib.util
import json
import math
import os
import runpy
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import problems
import pytest

from lstmjax import rnn, truncation_plots, truncation_tables
from lstmjax.bptt import depths, window_start
from lstmjax.data import streams
from lstmjax.records import plain, validate
from lstmjax.train import Clock
from lstmjax.truncation_tables import Line, Way, ways

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "experiments" / "truncation.py"
NAN = math.nan

_spec = importlib.util.spec_from_file_location("truncation", SCRIPT)
experiment = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(experiment)

CONFIG = experiment.Config(
    tasks=("toy",), cells=("rnn",), depths=(2,), policies=("per_sequence",), steps=6, batch_size=3,
    hidden_size=4, sequences=12, learning_rate=0.5, clip_norm=0.3, seeds=2, seed=5, seconds=0.001,
    rounds=1, lags=(1, 2),
)  # fmt: skip
SIZES = experiment.settled(CONFIG)["toy"]._replace(test_rows=3, test_steps=20)


@pytest.fixture(scope="module")
def data():
    return experiment.read("toy", CONFIG, SIZES)


def start_of(cell, width=2, seed=5):
    return experiment.initial(jax.random.key(seed), cell, width, SIZES, optax.sgd(0.5))


def slow_losses(params, data, slow, states):
    """The test loss once more: the oracle's recurrence, and −Σ p log softmax."""
    xs = np.eye(data.width)[data.test_xs]
    hs = slow(params.cell, xs, states)[1]
    logits = hs @ params.head[0] + params.head[1]
    logs = logits - np.log(np.sum(np.exp(logits), -1, keepdims=True))
    return -np.sum(data.test_ps * logs, -1)[streams.SKIPPED :]


# ---- what is measured ---------------------------------------------------------------------------


@pytest.mark.parametrize("cell", ["rnn", "lstm"])
def test_the_loss_the_loss_at_verbs_and_the_mass_are_what_they_are_called(cell, data):
    lags = np.where(np.random.default_rng(0).random(data.test_xs.shape) < 0.2, 5, 0)
    state, _ = start_of(cell)
    head = state.params.head[0], jnp.asarray([0.3, -0.5])
    params = state.params._replace(head=head)
    test = experiment.tester(cell, SIZES, data._replace(lags=lags))
    loss, at_verb, mass = jax.jit(test, compiler_options=problems.QUICK)(params)

    params = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    slow = {"rnn": oracle.rnn, "lstm": oracle.lstm}[cell]
    zeros = tuple(np.zeros((3, 4)) for _ in range({"rnn": 1, "lstm": 2}[cell]))
    each = slow_losses(params, data, slow, zeros)
    assert loss == pytest.approx(each.mean(), abs=1e-6)
    assert at_verb == pytest.approx(each[lags[streams.SKIPPED :] > 0].mean(), abs=1e-6)

    # ∂L_t/∂z_τ by the complex step: z enters as further inputs.
    xs = np.eye(2)[data.test_xs]
    begin = slow(params.cell, xs[: streams.SKIPPED], zeros)[0]
    xs, ps = (a[streams.SKIPPED :][:6] for a in (xs, data.test_ps))
    w_x = params.cell.w_x
    wide = params.cell._replace(w_x=np.concatenate([w_x, np.eye(w_x.shape[1])]))
    assert mass.shape == (6, 6)
    for t in (0, 3, 5):

        def loss_t(z, t=t):
            hs = slow(wide, np.concatenate([xs, z], -1), begin)[1]
            logits = hs[t] @ params.head[0] + params.head[1]
            logs = logits - np.log(np.sum(np.exp(logits), -1, keepdims=True))
            return -np.sum(ps[t] * logs)

        (gradient,) = oracle.gradients(loss_t, np.zeros((6, 3, w_x.shape[1])))
        want = np.linalg.norm(gradient, axis=-1).mean(-1)
        np.testing.assert_allclose(mass[t], want, rtol=1e-4, atol=1e-8)
        assert np.all(want[: t + 1] > 0)


def test_training_is_plain_gradient_descent_on_the_sequences_in_their_order(data, monkeypatch):
    """Full backpropagation of every seed, by a loop of its own with clipping written out."""

    def clipped(rate, norm):  # Adam would hide gradients of the wrong size
        assert (rate, norm) == (0.5, 0.3)
        return optax.chain(optax.clip_by_global_norm(norm), optax.sgd(rate))

    monkeypatch.setattr(experiment.optim, "clipped_adam", clipped)
    lines, _ = experiment.measure(CONFIG, "toy", "rnn", SIZES, data, jax.devices()[:2], Clock())
    assert [(line.style, line.n, line.k1, line.k2) for line in lines] == [
        ("TensorFlow style", 2, 2, 2), ("Williams–Peng", 2, 2, 4), ("true style", 2, 1, 2),
        ("full", 6, 6, 6),
    ]  # fmt: skip

    def loss(params, xs, ys, carry):
        carry, hs = rnn(params.cell, xs, carry)
        logits = hs @ params.head[0] + jnp.broadcast_to(params.head[1], (6, 3, 2))
        logs = jnp.log(jax.nn.softmax(logits))
        return -jnp.mean(jnp.sum(ys * logs, -1)), carry

    gradient = jax.jit(jax.grad(loss, has_aux=True))
    clips = 0
    for seed in range(2):
        state, carry = start_of("rnn", seed=5 + seed)
        params = state.params
        for xs, ys in zip(data.xs[seed], data.ys[seed], strict=True):
            one_hot = (np.eye(2, dtype=np.float32)[a] for a in (xs, ys))
            grads, carry = gradient(params, *one_hot, carry)
            norm = math.sqrt(sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(grads)))
            scale, clips = 0.5 * min(1.0, 0.3 / norm), clips + (norm > 0.3)
            params = jax.tree.map(lambda p, g, scale=scale: p - scale * g, params, grads)
        params = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
        want = slow_losses(params, data, oracle.rnn, (np.zeros((3, 4)),)).mean()
        assert lines[-1].loss[seed] == pytest.approx(want, abs=5e-6)
        assert len({line.loss[seed] for line in lines}) == 4  # and the others are others
    assert 0 < clips < 24  # of 24 updates
    for line in lines:
        assert line.window == depths(6, line.k1, line.k2).mean()
        assert all(1 <= depth <= line.k2 for depth in line.depth)
        assert all(0 < share <= 1 for share in line.share)
        assert 0 < line.seconds_low <= line.seconds <= line.seconds_high
        assert all(map(math.isnan, line.agreement))
    assert lines[-1].share == (1.0, 1.0) and max(lines[0].share) < 1


def test_effective_depth():
    rng = np.random.default_rng(3)
    mass = rng.random((7, 7))  # what lies above the diagonal is not looked at
    for k1, k2 in ((2, 4), (1, 3), (7, 7)):
        starts = window_start(7, k1, k2)
        weight, reached, whole = 0.0, 0.0, 0.0
        for t in range(7):
            for tau in range(t + 1):
                whole += mass[t, tau]
                if tau >= starts[t]:
                    reached += mass[t, tau]
                    weight += (t - tau + 1) * mass[t, tau]
        got = truncation_tables.effective_depth(mass, starts)
        assert got == (pytest.approx(weight / reached), pytest.approx(reached / whole))
    starts = window_start(49, 1, 7)
    assert truncation_tables.effective_depth(np.ones((49, 49)), starts)[1] == 322 / 1225
    assert all(map(math.isnan, truncation_tables.effective_depth(np.zeros((3, 3)), [0, 0, 0])))


def test_ways():
    found = ways((2, 5), ("per_sequence", "per_chunk", "per_step"), 40)
    assert len(set(found)) == len(found) == 6 + 4 + 2 + 1
    assert {way.style: (way.k1, way.k2) for way in found if way.n == 5} == {
        "TensorFlow style": (5, 5), "Williams–Peng": (5, 10), "true style": (1, 5),
    }  # fmt: skip
    assert {way.policy for way in found if way.style == "true style"} == {
        "per_sequence", "per_step",
    }  # fmt: skip
    assert found[-1] == Way("full", "per_sequence", 40, 40, 40)


# ---- records, tables, figures -------------------------------------------------------------------


def line(cell, style, policy, n, k1, k2, loss, **changes):
    loss, half = np.asarray(loss), (0.5, 0.7)
    numbers = (8, float(depths(8, k1, k2).mean()), 0.002, 0.001, 0.004)
    made = Line(
        "toy", cell, style, policy, n, k1, k2, *numbers, tuple(map(float, loss)), half, half, half
    )
    return made._replace(**changes)


def made_up():
    return [
        line("rnn", "TensorFlow style", "per_sequence", 2, 2, 2, (0.5, 0.6)),
        line("rnn", "TensorFlow style", "per_sequence", 4, 4, 4, (0.4, 0.6), agreement=(NAN, NAN)),
        line("rnn", "true style", "per_step", 2, 1, 2, (0.3, 0.32), seconds=0.008),
        line("rnn", "full", "per_sequence", 8, 8, 8, (0.2, 0.2), share=(1.0, 1.0)),
        line("lstm", "Williams–Peng", "per_chunk", 2, 2, 4, (0.1, 0.12), task="text"),
        line("lstm", "full", "per_sequence", 8, 8, 8, (0.1, 0.1), task="text", seconds=0.001),
    ]


CELLS = ("rnn", "lstm")


def record_of(lines):
    sizes = {"hidden_size": 16, "batch_size": 3, "sequences": 500}
    config = {
        "cells": CELLS,
        "sizes": {"toy": sizes, "text": sizes},
        "titles": {"toy": "bits", "text": "letters"},
        "levels": {"toy": ["nothing", "all"], "text": []},
    }
    metrics = {"toy_levels": [0.5, 0.25], **truncation_tables.columns(lines, CELLS)}
    return json.loads(json.dumps(plain({"metrics": metrics, "config": config})))


def test_lines_come_back_from_a_record_as_they_were():
    found = truncation_tables.lines_of(record_of(made_up()))
    assert [repr(plain(one)) for one in found] == [repr(plain(one)) for one in made_up()]
    assert [one.updates for one in found] == [1, 1, 8, 1, 4, 1]


def test_the_section_of_benchmarks():
    class Group:
        records = (record_of(made_up()),)

    lines = truncation_tables.section([Group], lambda group: [f"- from {group is Group}"])
    assert lines[0] == "## truncation" and truncation_tables.LEGEND in lines[2]
    assert lines[4] == (
        "**bits, RNN(16)**: 500 sequences of T = 8 steps, B = 3, 2 seeds. Known losses in nats a "
        "step: 0.5000 (nothing), 0.2500 (all)."
    )
    # Student's t for two values: 12.706 · s/√2, with s = 0.0707 here.
    assert lines[8] == (
        "| TensorFlow style 2 | 2, 2 | a sequence | 0.5500 ± 0.6353 | 0.600 ± 1.271 | 1.5 | "
        "0.60 ± 1.27 | 0.60 ± 1.27 | 2 (1–4) | 1.00 |"
    )
    assert lines[9].startswith("| TensorFlow style 4 | 4, 4 | a sequence | 0.5000 ± 1.2706 | – |")
    assert lines[10].startswith("| true style 2 | 1, 2 | a step | ")
    assert lines[10].endswith("| 8 (1–4) | 4.00 |")
    assert lines[11].startswith("| full | 8, 8 | a sequence | 0.2000 ± 0.0000 |")
    assert lines[13] == "**letters, LSTM(16)**: 500 sequences of T = 8 steps, B = 3, 2 seeds."
    assert lines[17].endswith("| 2 (1–4) | 2.00 |") and lines[-1] == "- from True"


def test_a_column_without_numbers_is_left_out():
    blank = [one._replace(agreement=(NAN, NAN)) for one in made_up()[:4]]

    class Group:
        records = (record_of(blank),)

    head = truncation_tables.section([Group], lambda _: [])[6]
    assert "at the verb" not in head and "| loss (nats) | steps reached |" in head


def bars(axes, label):
    """(x, y, half) of the error bars with a label."""
    (found,) = (c for c in axes.containers if c.get_label() == label)
    points, _, (segments,) = found.lines
    ends = np.array([segment[:, 1] for segment in segments.get_segments()])
    return *points.get_data(), (ends[:, 1] - ends[:, 0]) / 2


def test_the_figure_of_losses():
    lines = [*made_up()[:4], made_up()[5]._replace(task="toy")]
    figure = truncation_plots.losses("bits", lines, [(0.25, "all that is known")])
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "RNN, one update a sequence", "LSTM, one update a sequence",
        "RNN, an update every k1 steps", "LSTM, an update every k1 steps",
    ]  # fmt: skip
    first, _, third, _ = figure.axes
    x, y, half = bars(first, "TensorFlow style")
    np.testing.assert_allclose(x, [2, 4])
    np.testing.assert_allclose(y, [0.55, 0.5])
    np.testing.assert_allclose(half, 12.7062047 * np.array([0.05, 0.1]), rtol=1e-6)
    np.testing.assert_allclose(bars(third, "true style")[1], 0.31)
    flat = {tuple(one.get_ydata()) for one in first.lines if len(set(one.get_ydata())) == 1}
    assert {(0.2, 0.2), (0.25, 0.25)} <= flat  # full, and the level
    assert [item.get_text() for item in first.texts] == ["all that is known"]
    assert [item.get_text() for item in figure.legends[0].texts] == [
        "TensorFlow style", "true style", "full",
    ]  # fmt: skip

    figure.canvas.draw()
    assert first.get_ylim()[0] < 0.5 - 1.27 and first.get_ylim()[1] > 0.5 + 1.27  # whole bars
    at_verb = truncation_plots.losses("bits", lines[:1], [], at_verb=True)
    np.testing.assert_allclose(bars(at_verb.axes[0], "TensorFlow style")[1], 0.6)
    with pytest.raises(ValueError, match="lines: got none, expected at least one"):
        truncation_plots.losses("bits", [], [])


def test_the_figure_of_costs():
    lines = [*made_up()[:4], made_up()[5]._replace(task="toy")]
    upper, _, lower, _ = truncation_plots.costs("bits", lines).axes
    np.testing.assert_allclose(bars(upper, "TensorFlow style")[1], 0.6)
    by_definition = {tuple(one.get_ydata()) for one in upper.lines}
    assert (1.5, 2.5) in by_definition and (4.5, 4.5) in by_definition
    np.testing.assert_allclose(bars(lower, "TensorFlow style")[1], 1.0)
    for axes in (upper, lower):  # all of it is seen, from 0
        assert axes.get_ylim()[0] <= 0 and axes.get_ylim()[1] > 1
    assert upper.get_ylabel() == "steps reached" and lower.get_ylabel() == "time, × full"


# ---- the command --------------------------------------------------------------------------------


def test_a_run_leaves_everything_it_should(tmp_path):
    flags = "--tasks toy text --cells rnn --depths 3 --policies per_sequence --steps 6 "
    flags += "--batch-size 2 --hidden-size 3 --sequences 4 --seeds 3 --seed 2 --devices 2 "
    flags += "--seconds 0.001 --rounds 1 --quick --out here"
    quick = " ".join(f"--{name}={str(value).lower()}" for name, value in problems.QUICK.items())
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    environment["XLA_FLAGS"] = quick
    command = [sys.executable, str(SCRIPT), *flags.split()]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    first, *_, last = done.stdout.splitlines()
    assert first.startswith("training on bits that count after 3 and 8 steps, sha256 ")
    assert last == "record in here"

    folder = tmp_path / "here"
    record = json.loads((folder / "record.json").read_text())
    assert validate(record) == []
    assert record["command"] == f"python experiments/truncation.py {flags}"
    assert record["dataset"]["name"] == "lagged_bits and agreement_sentences"
    assert record["metrics"]["toy_levels"] == list(streams.levels())
    lines = truncation_tables.lines_of(record)
    assert [line[:3] for line in lines] == [
        (task, "rnn", style)
        for task in ("toy", "text")
        for style in ("TensorFlow style", "Williams–Peng", "true style", "full")
    ]
    for one in lines:
        assert len(one.loss) == 3 and all(0 < loss < 10 for loss in one.loss)
        assert all(map(math.isnan, one.agreement)) == (one.task == "toy")
    for name in ("toy-loss", "text-loss", "text-verb", "toy-cost", "text-cost"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n"), name


WRONG = [
    ("--depths 7", "--depths: got (7,), expected divisors of the 40 steps"),
    ("--depths 0", "--depths: got (0,), expected divisors of the 40 steps"),
    ("--lags 8 3", "--lags: got (8, 3), expected 0 <= nearer < farther < 1000"),
    ("--cells", "--cells: got (), expected at least one"),
    ("--seeds 0", "--seeds: got 0, expected an integer of at least 1"),
    ("--steps 600 --depths 5 --tasks toy", "--steps: got 600, expected at most 500, the test's"),
    ("--tasks toy --text a.txt", "--text: got a.txt, expected none without --tasks text"),
    ("--steps 0", "--steps: got 0, expected an integer of at least 1"),
    ("--learning-rate -1", "--learning-rate: got -1.0, expected a finite number above 0"),
    ("--tasks text --text nowhere.txt", "cannot read nowhere.txt: No such file or directory"),
    ("--norm sum", "--norm: got 'sum', expected one of mean, r2rt"),
]


@pytest.mark.parametrize(("flags", "text"), WRONG)
def test_a_wrong_value_is_one_clear_line(flags, text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *flags.split()])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    error = capsys.readouterr().err
    assert stop.value.code in (1, 2), error
    assert error.startswith(f"error: {text}") and error.count("\n") == 1, error
    assert not list(tmp_path.iterdir())  # nothing was begun
