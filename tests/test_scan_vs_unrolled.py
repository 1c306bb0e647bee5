"""experiments/scan_vs_unrolled.py: what it times is right, and so is what it says of the times."""

import importlib.util
import json
import math
import os
import runpy
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import oracle
import problems
import pytest

from lstmjax import timing_plots, timing_tables
from lstmjax.records import plain, validate
from lstmjax.timing_tables import Cell, Pass
from lstmjax.train import Clock

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "experiments" / "scan_vs_unrolled.py"
NAN, INF = math.nan, math.inf

_spec = importlib.util.spec_from_file_location("scan_vs_unrolled", SCRIPT)
experiment = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(experiment)


# ---- what is timed ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "devices"), [("scan", 1), ("fused", 2), ("scan unroll=4", 2), ("unrolled", 2)]
)
def test_the_timed_functions_are_the_lstm_the_mean_square_and_its_gradients(method, devices, x64):
    config = experiment.Config(batch_size=4, input_size=3)
    devices = jax.devices()[:devices]
    given = experiment.arguments(config, devices, 5, 4)
    given = jax.tree.map(lambda a: a.astype(np.float64), given)
    functions = experiment.functions(method, devices, 5 * 4 * 4)
    got = {
        kind: jax.jit(function, compiler_options=problems.QUICK)(*given)
        for kind, function in functions.items()
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


def test_error_is_the_largest_of_any_array_relative_to_its_own_size():
    want = np.array([10.0, -20.0]), np.array([[0.1]])
    got = np.array([10.0, -20.5]), np.array([[0.104]])
    assert experiment.error(got, want) == pytest.approx(0.04)
    assert experiment.error((np.array([NAN]),), (np.array([1.0]),)) == INF
    assert experiment.error((np.array([3e-9]),), (np.array([0.0]),)) == pytest.approx(3e-9)


def test_only_an_unrolled_program_is_left_uncompiled_where_it_is_predicted_to_take_long(
    monkeypatch,
):
    assert experiment.predicted({}, 80) == 0
    assert experiment.predicted({20: 2.0, 5: 1.0}, 80) == 2.0 * 4**1.5
    monkeypatch.setattr(experiment, "PROBE", 1)
    config, devices = experiment.Config(batch_size=2, input_size=3), jax.devices()[:1]
    given = experiment.arguments(config, devices, 4, 3)
    found = {}
    for limit in (1e-9, 1e9):
        compiler = experiment.Compiler(limit, Clock())
        for method in ("scan", "unrolled"):
            function = experiment.functions(method, devices, 24)["forward"]
            found[limit, method] = compiler("forward", method, function, given, 1)
    assert found[1e-9, "unrolled"] is None
    assert found[1e-9, "scan"] is not None and found[1e9, "unrolled"] is not None
    np.testing.assert_allclose(
        found[1e9, "unrolled"].run(*given), found[1e-9, "scan"].run(*given), rtol=1e-5, atol=1e-7
    )


def test_a_backend_is_left_out_with_its_reason(monkeypatch):
    class Backend:
        why = "no such kernel"

        @classmethod
        def available(cls):
            return cls.why

    assert experiment.why_not("scan unroll=4") is None
    monkeypatch.setitem(sys.modules, "lstmjax.onednn", Backend)
    assert experiment.why_not("onednn") == "no such kernel"
    Backend.why = None
    assert experiment.why_not("onednn") is None


# ---- what follows from the times ----------------------------------------------------------------


def one_pass(median, compile_seconds=1.0, spread=0.01, memory=2e6):
    return Pass(compile_seconds, median, median * (1 - spread), median * (1 + spread), memory)


def cell(method, backward, steps=20, hidden=10, forward=0.5, error=1e-7, **changes):
    forward = forward and one_pass(forward)
    errors = (NAN if forward is None else error / 2), (NAN if backward is None else error)
    return Cell(steps, 32, hidden, 1, method, forward, backward, *errors)._replace(**changes)


def test_pays_after():
    base = one_pass(3.0, compile_seconds=2.0)
    # 10 more seconds to compile, 1 second less a call.
    assert timing_tables.pays_after(one_pass(2.0, compile_seconds=12.0), base) == 10
    assert timing_tables.pays_after(one_pass(2.0, compile_seconds=12.5), base) == 11
    assert timing_tables.pays_after(one_pass(2.0, compile_seconds=1.5), base) == 0
    assert timing_tables.pays_after(one_pass(4.0, compile_seconds=0.1), base) == INF
    assert timing_tables.pays_after(base, base) == INF
    # Faster, but not beyond the spread of either.
    assert timing_tables.pays_after(one_pass(2.5, spread=0.3), base) == INF
    assert timing_tables.pays_after(one_pass(2.5), one_pass(3.0, spread=0.3)) == INF
    assert math.isnan(timing_tables.pays_after(None, base))
    assert math.isnan(timing_tables.pays_after(base, None))


def sizes_of(*methods):
    """Cells at two sizes; each method as (name, seconds, seconds, seconds to compile)."""
    return [
        cell(name, time and one_pass(time, compiling), hidden=hidden, error=3e-7)
        for hidden, at in ((10, 1), (64, 2))
        for name, *times, compiling in methods
        for time in [times[at - 1]]
    ]


def test_recommendation_of_the_fastest_method_and_unrolling_that_never_paid():
    cells = sizes_of(
        ("scan", 2.0, 3.0, 1), ("fused", 1.0, 2.0, 1), ("unrolled", 2.5, None, 50),
        ("scan unroll=4", 4.0, 3.75, 2),
    )  # fmt: skip
    assert timing_tables.speedups(cells) == {
        "fused": [2.0, 1.5], "unrolled": [0.8], "scan unroll=4": [0.5, 0.8],
    }  # fmt: skip
    assert timing_tables.recommendation(cells) == (
        "fused: 1.73 times as fast as scan here, forward and backward (1.5 to 2 over 2 sizes; "
        "gradients within 3e-07 of scan's). Unrolling (unrolled not run at 1 of 2 sizes: too long "
        "to compile): against scan it never paid; against fused it never paid."
    )


def test_unrolling_that_pays_against_scan_alone_is_said_to():
    """It is not said that it never paid where the table's column says that it did."""
    cells = sizes_of(("scan", 2.0, 3.0, 1), ("fused", 1.0, 2.0, 1), ("scan unroll=4", 4.0, 2.5, 6))
    text = timing_tables.recommendation(cells)
    assert text.endswith(
        " Unrolling: against scan it paid at 1 of 2 sizes, soonest scan unroll=4 at T = 20, "
        "H = 64, after 10 training steps; against fused it never paid."
    )
    waits = [row[-1] for row in timing_tables.comparison_rows(cells, 300.0)]
    assert waits == ["–", "0", "∞", "–", "0", "10"]


def test_recommendation_where_unrolling_pays():
    cells = sizes_of(
        ("scan", 2.0, 3.0, 1), ("fused", 1.6, 2.4, 1), ("unrolled", 1.5, None, 51),
        ("scan unroll=4", 4.0, 2.0, 2),
    )  # fmt: skip
    text = timing_tables.recommendation(cells)
    assert text.startswith("fused: 1.25 times as fast as scan here")
    # At H = 10, unrolled saves 0.1 s a step for 50 s, of scan's 0.5; at H = 64, unroll=4 saves
    # 0.4 s for 1 s, of scan's 1.
    assert text.endswith(
        "Unrolling (unrolled not run at 1 of 2 sizes: too long to compile): against scan it paid "
        "at 2 of 2 sizes, soonest scan unroll=4 at T = 20, H = 64, after 1 training step; against "
        "fused it paid at 2 of 2 sizes, soonest scan unroll=4 at T = 20, H = 64, after 3 training "
        "steps."
    )


def test_recommendation_of_an_unrolled_method_is_held_against_scan():
    cells = sizes_of(("scan", 2.0, 3.0, 1), ("fused", 1.9, 2.9, 1), ("scan unroll=4", 1.0, 2.0, 41))
    text = timing_tables.recommendation(cells)
    assert text.startswith("scan unroll=4: 1.73 times as fast as scan here")
    assert text.endswith(
        " Unrolling: against scan it paid at 2 of 2 sizes, soonest scan unroll=4 at T = 20, "
        "H = 10, after 40 training steps."
    )


def test_recommendation_of_nothing_new():
    # Twice as fast at one size, where alone it ran, is not enough; nor is 4 % at every size.
    cells = sizes_of(("scan", 2.0, 3.0, 1), ("fused", 1.93, 2.88, 1), ("unrolled", 1.0, None, 1))
    text = timing_tables.recommendation(cells)
    assert text.startswith("scan: nothing else was 1.05 times as fast here over all sizes. ")
    assert text.count("against") == 1 and ": against scan it paid at 1 of 2 sizes, " in text
    cells = sizes_of(("scan", 2.0, 3.0, 1), ("fused", 2.0, 3.0, 1))
    assert timing_tables.recommendation(cells).endswith(" Unrolling was not tried.")


# ---- records, tables, figures -------------------------------------------------------------------


def made_up():
    return [
        cell("scan", one_pass(0.002), error=0.0),
        cell("unrolled", None, forward=1.0, error=4e-7),
        cell("fused", one_pass(0.001, 1.1), forward=None, error=5e-8),
        cell("scan", one_pass(0.2), hidden=64, error=0.0),
        cell("unrolled", one_pass(0.3, 9.0, memory=NAN), hidden=64, error=2e-7),
        cell("fused", one_pass(0.1, 9.0), hidden=64, error=3e-7),
    ]


METHODS = ("scan", "unrolled", "fused")


def test_cells_come_back_from_a_record_as_they_were():
    cells = made_up()
    metrics = plain(timing_tables.columns(cells, METHODS))
    record = json.loads(json.dumps({"metrics": metrics, "config": {"methods": METHODS}}))
    found = timing_tables.cells_of(record)
    assert [repr(one) for one in found] == [repr(one) for one in cells]  # NaN is not itself


class Group:
    """What tables.Group gives to a section."""

    def __init__(self, config, cells, methods=METHODS):
        config = {"methods": methods, "input_size": 8, **config}
        metrics = plain(timing_tables.columns(cells, methods))
        self.records = ({"metrics": metrics, "config": config},)


def test_the_section_of_benchmarks():
    config = {"batch_size": 32, "devices": 1, "compile_limit": 300.0}
    group = Group({**config, "unavailable": {"cudnn": "no GPU"}}, made_up())
    lines = timing_tables.comparison_section([group], lambda g: [f"- from {g is group}"])
    assert lines[0] == "## scan against unrolled" and lines[1] == lines[3] == lines[5] == ""
    assert timing_tables.LEGEND in lines[2]
    assert lines[4] == "B = 32, D = 8, 1 device. Not on this machine: cudnn (no GPU)."
    assert lines[6].startswith("**fused: 2 times as fast as scan here")
    assert lines[8].startswith("| T | H | method | compile s | forward ms | × scan | compile s |")
    rows = [
        "| 20 | 10 | scan | 1 | 500 (495–505) | 1 | 1 | 2 (1.98–2.02) | 1 | 2 | – | – | – |",
        "| 20 | 10 | unrolled | 1 | 1,000 (990–1,010) | 2 | – | not run: more than 300 s to "
        "compile | – | – | 2e-07 | – | – |",
        "| 20 | 10 | fused | – | not run: more than 300 s to compile | – | 1.1 | 1 (0.99–1.01) | "
        "0.5 | 2 | – | 5e-08 | 101 |",
        "| 20 | 64 | scan | 1 | 500 (495–505) | 1 | 1 | 200 (198–202) | 1 | 2 | – | – | – |",
        "| 20 | 64 | unrolled | 1 | 500 (495–505) | 1 | 9 | 300 (297–303) | 1.5 | – | 1e-07 | "
        "2e-07 | ∞ |",
        "| 20 | 64 | fused | 1 | 500 (495–505) | 1 | 9 | 100 (99–101) | 0.5 | 2 | 1e-07 | 3e-07 | "
        "80 |",
    ]
    assert lines[10:] == [*rows, "", "- from True"]


def texts(axes):
    return [item.get_text() for item in axes.texts]


def test_figures_bear_the_numbers():
    panels = {"unrolled": [[1.5, NAN, 0.25]], "fused": [[0.5, 1.0, 2.0]]}
    figure = timing_plots.relative_times("title", (20, 80, 200), (10,), panels)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["unrolled", "fused"]
    assert [texts(axes) for axes in figure.axes] == [["1.5", "–", "0.25"], ["0.5", "1", "2"]]
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["20", "80", "200"]
    (image,) = figure.axes[1].get_images()
    # The middle of the colours is 1, and both ends are as far from it.
    assert image.norm(1.0) == pytest.approx(0.5)
    assert image.norm(0.25) == pytest.approx(1 - image.norm(4.0)) == pytest.approx(0)

    waits = {"a": [[0.0, 7.0], [12_345.0, INF]], "b": [[NAN, INF], [999.7, 2e6]]}
    figure = timing_plots.pays_after("title", (20, 80), (10, 64), waits)
    first, second = figure.axes
    assert texts(first) == ["0", "7", "12k", "∞"] and texts(second) == ["–", "∞", "1.0k", "2.0M"]
    assert first.get_images()[0].norm(0.0) == 0.0  # 0 has a colour, that of 1
    figure.canvas.draw()
    with pytest.raises(ValueError, match="panels: got none, expected at least one"):
        timing_plots.pays_after("title", (20,), (10,), {})
    with pytest.raises(ValueError, match=r"panels: got shape \(1, 2\) for 'a', expected \(2, 2\)"):
        timing_plots.relative_times("title", (20, 80), (10, 64), {"a": [[1.0, 2.0]]})


def test_figures_of_nothing_that_ran():
    never = {"unrolled": [[NAN, INF]]}
    assert texts(timing_plots.pays_after("t", (1, 2), (3,), never).axes[0]) == ["–", "∞"]
    assert texts(timing_plots.relative_times("t", (1,), (3,), {"a": [[NAN]]}).axes[0]) == ["–"]


# ---- the command --------------------------------------------------------------------------------


def test_a_run_leaves_everything_it_should(tmp_path):
    flags = "--steps 6 --hidden-sizes 4 --batch-size 4 --input-size 3 --devices 2 --seed 3 "
    flags += "--seconds 0.01 --rounds 2 --out here"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(SCRIPT), *flags.split()]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    first, *_, last = done.stdout.splitlines()
    assert first.startswith("LSTM, B = 4, D = 3, 2 devices; ")

    folder = tmp_path / "here"
    record = json.loads((folder / "record.json").read_text())
    assert validate(record) == []
    assert record["command"] == f"python experiments/scan_vs_unrolled.py {flags}"
    assert record["seed"] == 3 and record["environment"]["devices"] == 2
    assert record["config"] == json.loads((folder / "config.json").read_text())
    cells = timing_tables.cells_of(record)
    assert last == timing_tables.recommendation(cells)
    methods = record["config"]["methods"]
    assert methods[:4] == ["scan", "scan unroll=4", "unrolled", "fused"]
    assert {*methods, *record["config"]["unavailable"]} == set(experiment.QUICK.methods)
    assert [one.method for one in cells] == methods
    assert {one.size for one in cells} == {(6, 4, 4, 2)}
    for one in cells:
        assert one.value_error < 1e-5 and one.gradient_error < 1e-5
        for timed in (one.forward, one.backward):
            assert 0 < timed.low <= timed.median <= timed.high and timed.compile_seconds > 0
    assert any(one.gradient_error > 0 for one in cells)  # it is no comparison with itself
    as_json = json.loads((folder / "cells.json").read_text())
    assert [one["method"] for one in as_json] == methods
    assert as_json[0]["backward"]["median"] == cells[0].backward.median
    for name in ("relative-time", "pays-after"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


WRONG = [
    ("--steps 5 0", "--steps: got (5, 0), expected integers of at least 1"),
    ("--hidden-sizes -1", "--hidden-sizes: got (-1,), expected integers of at least 1"),
    ("--steps five", "Error parsing --steps"),
    ("--quick --full", "--quick: got True, expected it alone, without --full"),
    ("--devices 3", "--batch-size: got 32, expected a multiple of --devices 3"),
    ("--batch-size 999 --devices 999", "--devices: got 999, expected at most"),
    ("--seconds 0", "--seconds: got 0.0, expected a finite number above 0"),
    ("--compile-limit -5", "--compile-limit: got -5.0, expected a finite number above 0"),
    ("--rounds 0", "--rounds: got 0, expected an integer of at least 1"),
    ("--method scan", "--method: no such flag"),
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
