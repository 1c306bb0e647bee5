"""A recurrence takes time in proportion to its steps; experiments/scaling.py says so correctly."""

import importlib.util
import json
import math
import os
import runpy
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import problems
import pytest

from lstmjax import timing_plots, timing_tables
from lstmjax.lstm import init_lstm, lstm
from lstmjax.records import plain, validate
from lstmjax.timing_tables import Cell, Pass

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "experiments" / "scaling.py"

_spec = importlib.util.spec_from_file_location("scaling", SCRIPT)
experiment = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(experiment)


# ---- time is linear in T ------------------------------------------------------------------------


def growth_per_step(run, short, long, repeats=3):
    """Seconds per step of ``run(xs [T])`` over ``long`` steps, divided by those over ``short``.

    The least of several calls that take turns: other programs can only make a call slower. The
    shorter one is called more often, so that neither has the better luck. XLA optimises, as it does
    by default: how a loop treats its buffers depends on that.
    """
    inputs = {steps: jnp.linspace(-1.0, 1.0, steps) for steps in (short, long)}
    run = jax.jit(run, compiler_options=problems.OPTIMISED)
    least = dict.fromkeys(inputs, math.inf)
    for xs in inputs.values():
        jax.block_until_ready(run(xs))
    for _ in range(repeats):
        for steps in (*[short] * 3, long):
            start = time.process_time()  # what other processes do to the clock is not its fault
            jax.block_until_ready(run(inputs[steps]))
            least[steps] = min(least[steps], time.process_time() - start)
    return (least[long] / long) / (least[short] / short)


@pytest.mark.parametrize("method", ["fused", "scan"])
@pytest.mark.parametrize("kind", ["forward", "backward"])
def test_time_is_linear_in_the_number_of_steps(method, kind):
    params = init_lstm(jax.random.key(0), 3, 4)

    def forward(xs):
        return lstm(params, jnp.tile(xs[:, None, None], (1, 2, 3)), method=method)[1]

    def loss(xs, params):
        hs = lstm(params, jnp.tile(xs[:, None, None], (1, 2, 3)), method=method)[1]
        return jnp.mean(hs**2)

    run = forward if kind == "forward" else lambda xs: jax.grad(loss, (0, 1))(xs, params)
    assert growth_per_step(run, 10_000, 100_000) < 2


def test_a_quadratic_loop_would_be_found():
    def turned_over(xs):  # every step touches the whole buffer
        def body(t, buffer):
            return buffer[::-1].at[t].set(xs[t])

        return jax.lax.fori_loop(0, len(xs), body, jnp.zeros((len(xs), 4)))

    assert growth_per_step(turned_over, 2000, 20_000, repeats=1) > 2


# ---- what is timed ------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "devices"), [("scan", 1), ("fused", 2)])
def test_the_timed_functions_are_the_lstm_the_mean_square_and_its_gradients(method, devices, x64):
    size = experiment.Size(5, 4, 4, devices)
    devices = jax.devices()[:devices]
    given = experiment.arguments(experiment.Config(input_size=3), devices, size)
    given = jax.tree.map(lambda a: a.astype(np.float64), given)
    got = {
        kind: jax.jit(function, compiler_options=problems.QUICK)(*given)
        for kind, function in experiment.functions(method, devices, size).items()
    }
    params, xs = jax.tree.map(np.asarray, given)

    def outputs(params, xs):
        return oracle.lstm(params, xs, (np.zeros((4, 4)), np.zeros((4, 4))))[1]

    def loss(params, xs):
        return np.mean(outputs(params, xs) ** 2)

    oracle.assert_close(got["forward"], outputs(params, xs), 1e-12)
    value, *gradients = got["backward"]
    oracle.assert_close(value, loss(params, xs), 1e-12)
    oracle.assert_close(tuple(gradients), oracle.gradients(loss, params, xs), 1e-12)


@pytest.mark.parametrize(("devices", "counts"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4])])
def test_sizes_along_each_axis(devices, counts):
    config = experiment.settled(experiment.Config(batch_sizes=(64, 8, 8)))
    sizes = experiment.sizes(config, devices)
    assert [size.steps for size in sizes["steps"]] == [100, 1000, 10_000, 100_000]
    assert sizes["batch_size"] == [(100, 8, 64, 1), (100, 64, 64, 1)]
    # 6 devices cannot share a batch of 256 evenly.
    assert [size.devices for size in sizes["devices"]] == counts
    full = experiment.settled(experiment.Config(full=True, steps=(7,)))
    assert full.steps == (7,) and full.hidden_sizes == experiment.FULL.hidden_sizes


# ---- what is said of it -------------------------------------------------------------------------

METHODS = ("scan", "fused")
BASES = {
    "steps": {"steps": 1, "batch_size": 4, "hidden_size": 16, "devices": 1},
    "devices": {"steps": 100, "batch_size": 8, "hidden_size": 16, "devices": 1},
}


def cell(steps, method, seconds, *, batch=4, devices=1, error=1e-7):
    passes = (Pass(1.0, s, s * 0.9, s * 1.1, 1e6) for s in (seconds, seconds * 3))
    return Cell(steps, batch, 16, devices, method, *passes, error, error * 2)


def made_up():
    return [
        cell(1000, "scan", 0.002, error=0.0), cell(1000, "fused", 0.001),
        cell(100, "scan", 0.0001, error=0.0), cell(100, "fused", 0.00005),
        cell(10_000, "scan", 0.03, error=0.0), cell(10_000, "fused", 0.008, error=3e-7),
        cell(100, "scan", 0.05, batch=8, error=0.0), cell(100, "fused", 0.04, batch=8),
        cell(100, "scan", 0.03, batch=8, devices=2, error=0.0),
        cell(100, "fused", 0.02, batch=8, devices=2, error=4e-7),
    ]  # fmt: skip


def test_cells_along_an_axis_and_how_their_time_grows():
    cells = timing_tables.along(made_up(), "steps", BASES["steps"])
    assert [c.steps for c in cells] == [100, 100, 1000, 1000, 10_000, 10_000]
    assert timing_tables.growth(cells, "scan", "forward") == pytest.approx(1.5)
    assert timing_tables.growth(cells, "fused", "backward") == pytest.approx(0.8)
    assert math.isnan(timing_tables.growth(cells[:2], "scan", "forward"))
    assert timing_tables.growth_text(cells[:2], METHODS) == ""
    (text,) = {timing_tables.growth_text(cells, METHODS)}
    assert text == (
        "Time per step at T = 10,000, as a multiple of that at T = 1,000: 1.50 (scan, forward), "
        "1.50 (scan, forward + backward), 0.80 (fused, forward), 0.80 (fused, forward + backward)."
    )


class Group:
    """What tables.Group gives to a section."""

    def __init__(self):
        config = {"methods": METHODS, "bases": BASES, "input_size": 8}
        metrics = plain(timing_tables.columns(made_up(), METHODS))
        self.records = ({"metrics": metrics, "config": config},)


def test_the_section_of_benchmarks():
    group = Group()
    lines = timing_tables.scaling_section([group], lambda g: [f"- from {g is group}"])
    assert lines[0] == "## scaling"
    head = "scan, forward ms | scan, forward + backward ms | fused, forward ms | "
    head += "fused, forward + backward ms | difference |"
    assert lines[3:] == [
        "",
        "B = 4, H = 16, devices = 1, D = 8:",
        "",
        f"| T | {head}",
        "| --- | --- | --- | --- | --- | --- |",
        "| 100 | 0.1 (0.09–0.11) | 0.3 (0.27–0.33) | 0.05 (0.045–0.055) | 0.15 (0.135–0.165) | "
        "2e-07 |",
        "| 1000 | 2 (1.8–2.2) | 6 (5.4–6.6) | 1 (0.9–1.1) | 3 (2.7–3.3) | 2e-07 |",
        "| 10000 | 30 (27–33) | 90 (81–99) | 8 (7.2–8.8) | 24 (21.6–26.4) | 6e-07 |",
        "",
        "Time per step at T = 10,000, as a multiple of that at T = 1,000: 1.50 (scan, forward), "
        "1.50 (scan, forward + backward), 0.80 (fused, forward), 0.80 (fused, forward + backward).",
        "",
        "T = 100, B = 8, H = 16, D = 8:",
        "",
        f"| devices | {head}",
        "| --- | --- | --- | --- | --- | --- |",
        "| 1 | 50 (45–55) | 150 (135–165) | 40 (36–44) | 120 (108–132) | 2e-07 |",
        "| 2 | 30 (27–33) | 90 (81–99) | 20 (18–22) | 60 (54–66) | 8e-07 |",
        "",
        "- from True",
    ]


def test_the_figure_shows_every_line():
    figure = experiment.figure(made_up(), BASES, "LSTM, D = 8")
    first, second = figure.axes
    assert (first.get_xscale(), first.get_yscale()) == ("log", "log")
    assert (first.get_xlabel(), second.get_xlabel()) == ("T", "devices")
    assert second.get_title(loc="left") == "T = 100, B = 8, H = 16"
    lines = [(list(line.get_xdata()), list(line.get_ydata())) for line in first.get_lines()]
    np.testing.assert_allclose(lines[0], ([100, 1000, 10_000], [0.1, 2, 30]))
    np.testing.assert_allclose(lines[3], ([100, 1000, 10_000], [0.15, 3, 24]))
    styles = {(line.get_color(), line.get_linestyle()) for line in first.get_lines()}
    assert len(lines) == len(styles) == 4
    (legend,) = figure.legends
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels[0] == "scan, forward" and labels[3] == "fused, forward + backward"
    assert [tick.get_text() for tick in first.get_xticklabels()] == ["100", "1,000", "10,000"]
    figure.canvas.draw()
    with pytest.raises(ValueError, match="panels: got none, expected at least one"):
        timing_plots.times_along("title", {})
    with pytest.raises(ValueError, match="panels: got 2 and 1 values for .*, expected as many"):
        timing_plots.times_along("title", {"T": ("", {("scan", "forward"): ((1, 2), (3.0,))})})


# ---- the command --------------------------------------------------------------------------------


def test_a_run_leaves_everything_it_should(tmp_path):
    flags = "--steps 3 40 --batch-sizes 32 --hidden-sizes 64 --devices 2 --input-size 3 "
    flags += "--split-batch 4 --seconds 0.01 --rounds 1 --seed 5 --out here"
    quick = " ".join(f"--{name}={str(value).lower()}" for name, value in problems.QUICK.items())
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    environment["XLA_FLAGS"] = quick
    command = [sys.executable, str(SCRIPT), *flags.split()]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr

    folder = tmp_path / "here"
    record = json.loads((folder / "record.json").read_text())
    assert validate(record) == []
    assert record["command"] == f"python experiments/scaling.py {flags}"
    assert record["seed"] == 5 and record["environment"]["devices"] == 2
    assert record["config"] == json.loads((folder / "config.json").read_text())
    cells = timing_tables.cells_of(record)
    # The size that two axes share is timed once.
    sizes = [(3, 4, 16, 1), (40, 4, 16, 1), (100, 32, 64, 1), (100, 4, 128, 1)]
    sizes.append((100, 4, 128, 2))
    assert [(c.size, c.method) for c in cells] == [(s, m) for s in sizes for m in METHODS]
    for one in cells:
        assert one.value_error < 1e-5 and one.gradient_error < 1e-5
        for timed in (one.forward, one.backward):
            assert 0 < timed.low <= timed.median <= timed.high and timed.compile_seconds > 0
    assert any(c.gradient_error > 0 for c in cells)  # it is no comparison with itself
    chosen = timing_tables.along(cells, "steps", record["config"]["bases"]["steps"])
    assert done.stdout.splitlines()[-1] == timing_tables.growth_text(chosen, METHODS)
    assert (folder / "scaling.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


WRONG = [
    ("--steps 5 0", "--steps: got (5, 0), expected integers of at least 1"),
    ("--batch-sizes -1", "--batch-sizes: got (-1,), expected integers of at least 1"),
    ("--quick --full", "--quick: got True, expected it alone, without --full"),
    ("--devices 0", "--devices: got 0, expected an integer of at least 1"),
    ("--devices 999", "--devices: got 999, expected at most"),
    ("--seconds 0", "--seconds: got 0.0, expected a finite number above 0"),
    ("--rounds 0", "--rounds: got 0, expected an integer of at least 1"),
    ("--split-batch 0", "--split-batch: got 0, expected an integer of at least 1"),
    ("--size 3", "--size: no such flag"),
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
