"""experiments/seconds.py: what it runs, keeps, draws and says; and where the seconds come from."""

import dataclasses
import importlib.util
import json
import math
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import problems
import pytest
from tiny_records import ENVIRONMENT, SHA, write_record

from lstmjax import keeper, seconds_plots, seconds_tables, tables
from lstmjax.records import RunError, RunStopped, read_config, validate
from lstmjax.seconds_tables import Line
from lstmjax.train import Clock

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "experiments" / "seconds.py"

_spec = importlib.util.spec_from_file_location("seconds_here", SCRIPT)
experiment = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = experiment  # where its dataclass looks for its annotations
_spec.loader.exec_module(experiment)

OURS = Line(
    "lstmjax", "lstmjax 0.1 / jax 0.10", ((7.0, 16.0, 24.0), (10.0, 20.0, 30.0)),
    ((0.79, 0.83, 0.84), (0.80, 0.82, 0.81)), (2.0, 3.0), (24.0, 30.0), (1.0, 2.0), (40.0, 50.0),
    (0.825, 0.8225),
)  # fmt: skip
THEIRS = Line(
    "keras", "keras 3 / tensorflow 2", ((20.0, 40.0, 60.0), (30.0, 60.0, 90.0)),
    ((0.81, 0.80, 0.82), (0.80, 0.83, 0.85)), (4.0, 4.0), (60.0, 90.0), (5.0, 5.0), (100.0, 150.0),
    (0.82, 0.83),
)  # fmt: skip
LEVELS = [0.8, 0.83, 0.9]


# ---- seconds at the end of each epoch -----------------------------------------------------------


def test_a_clock_notes_what_training_has_taken_after_each_epoch():
    clock = Clock()
    assert set(clock.seconds) == {"compile", "train", "eval"}
    clock.seconds["train"] = 2.5
    clock.end_epoch()
    clock.seconds |= {"train": 4.0, "compile": 7.0, "eval": 9.0}
    clock.end_epoch()
    assert clock.seconds["train_epochs"] == [2.5, 4.0]
    # A checkpoint keeps it, and what was noted after the checkpoint is noted again.
    kept = json.loads(json.dumps(keeper._progress(clock.seconds)))
    clock.end_epoch()
    keeper._restore(clock.seconds, kept)
    clock.seconds["train"] += 1.0
    clock.end_epoch()
    assert clock.seconds["train_epochs"] == [2.5, 4.0, 5.0]


def test_a_record_may_hold_them(tmp_path):
    seconds = {"compile": 1.0, "train": 3.0, "eval": 0.5}
    record = write_record(tmp_path, 1, 0.5, [0.5], 3.0, seconds=seconds | {"train_epochs": [1, 3]})
    assert validate(record) == []
    record["seconds"]["train_epochs"] = [1.0, -3.0]
    (problem,) = validate(record)
    assert problem.startswith("seconds.train_epochs[1]: got -3.0, expected a number not below 0")
    record["seconds"]["train_epochs"] = []
    assert validate(record) == [
        "seconds.train_epochs: got [], expected a list of numbers not below 0"
    ]
    (group,) = tables.load_groups(tmp_path)
    assert [group.seconds(name) for name in ("train", "total")] == ["3", "4.5"]


# ---- numbers ------------------------------------------------------------------------------------


def test_the_first_epoch_that_reaches_a_level():
    assert OURS.reaching(0.8) == [16.0, 10.0]  # not below is reached
    assert OURS.reaching(0.83) == [16.0, math.inf]
    assert THEIRS.reaching(0.81) == [20.0, 60.0]
    assert OURS.reaching(0.9) == [math.inf, math.inf]
    # Means of float32: 2,100 of 2,500 and 2,075, just below 0.84 and 0.83 as float64.
    accuracy = tuple(float(np.float32(n) / np.float32(2500)) for n in (2075, 2100))
    assert accuracy[0] < 0.83 and accuracy[1] < 0.84
    single = OURS._replace(seconds=((5.0, 9.0),), accuracy=(accuracy,))
    assert [single.reaching(level) for level in (0.83, 0.84, 0.8401)] == [[5.0], [9.0], [math.inf]]
    assert OURS.epoch == [8.0, 10.0] and THEIRS.epoch == [20.0, 30.0]


def test_ratios_and_spreads():
    assert seconds_tables.ratios([3.0, 5.0, math.inf, 8.0], [2.0, math.inf, 4.0, 4.0]) == [1.5, 2.0]
    assert seconds_tables.spread([12.0, 7.123, 110.4]) == "12.0 (7.12–110)"
    assert seconds_tables.spread([0.04567]) == "0.0457"
    assert seconds_tables.spread([8.0, math.inf, 4.0, 9.0]) == "8.00 (4.00–9.00), 3 of 4"
    assert seconds_tables.spread([math.inf, 5.0]) == "5.00, 1 of 2"
    assert seconds_tables.spread([math.inf]) == "–"


def seconds_record(**changes):
    config = {
        "program": "imdb-tf2", "seeds": 2, "levels": LEVELS, "title": "reviews by words",
        "versions": {line.framework: line.versions for line in (OURS, THEIRS)},
    }  # fmt: skip
    return {
        "experiment": "seconds", "version": "0.1.0", "date": "2026-01-02",
        "command": "python experiments/seconds.py --seeds 2", "config": config,
        "dataset": {"name": "imdb", "source": "tfds", "sha256": SHA},
        "metrics": seconds_tables.columns([OURS, THEIRS]),
        "seconds": {"compile": 13.0, "train": 204.0, "eval": 13.0}, "params_sha256": SHA,
        "environment": ENVIRONMENT, "seed": 3,
    } | changes  # fmt: skip


def test_lines_come_back_from_a_record_as_they_were():
    record = json.loads(json.dumps(seconds_record()))
    assert validate(record) == []
    assert seconds_tables.lines_of(record) == [OURS, THEIRS]


def test_the_section_of_benchmarks(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(seconds_record()))
    assert tables.load_groups(tmp_path) == []
    text = tables.benchmarks([], [], tables.load_timed(tmp_path))
    lines = text.partition("## seconds: ")[2].partition("\n## ")[0].splitlines()
    assert seconds_tables.LEGEND.format("lstmjax") in lines
    assert lines[4] == "**imdb-tf2**: reviews by words; 3 epochs, 2 seeds."
    assert lines[6] == (
        "|  | s an epoch | × | s to 0.80 | × | s to 0.83 | × | s to 0.90 | × | start s | "
        "process s | × | test accuracy |"
    )
    assert lines[8] == (
        "| lstmjax 0.1 / jax 0.10 | 9.00 (8.00–10.0) | 1.00 | 13.0 (10.0–16.0) | 1.00 | "
        "16.0, 1 of 2 | 1.00 | – | – | 2.50 (2.00–3.00) | 45.0 (40.0–50.0) | 1.00 | "
        "0.8237 (0.8225–0.8250) |"
    )
    # By seed: 20/8 and 30/10; 20/16 and 30/10; no seed reached 0.83 in both; 100/40 and 150/50.
    assert lines[9] == (
        "| keras 3 / tensorflow 2 | 25.0 (20.0–30.0) | 2.75 | 25.0 (20.0–30.0) | 2.12 | "
        "60.0, 1 of 2 | – | – | – | 4.00 (4.00–4.00) | 125 (100–150) | 2.75 | "
        "0.8250 (0.8200–0.8300) |"
    )
    assert lines[11] == "- **lstmjax**: `python experiments/seconds.py --seeds 2` with seeds 3, 4"
    (tmp_path / "a.json").write_text(json.dumps(seconds_record(metrics={"nothing": 1.0})))
    with pytest.raises(RunError, match=r"a.json: not what the table shows \(KeyError: "):
        tables.benchmarks([], [], tables.load_timed(tmp_path))


# ---- the figure ---------------------------------------------------------------------------------


def test_the_figure_shows_means_ranges_and_the_start():
    figure = seconds_plots.curves("reviews", [OURS, THEIRS], LEVELS)
    (axes,) = figure.axes
    drawn = [np.asarray(line.get_xydata(), float) for line in axes.lines if len(line.get_xdata())]
    levels, curves = drawn[:3], drawn[3:]
    assert [points[0, 1] for points in levels] == LEVELS
    mean = [[8.5, 0.795], [18, 0.825], [27, 0.825]]
    np.testing.assert_allclose(curves[0], mean)
    np.testing.assert_allclose(curves[1], np.array(mean) + [2.5, 0])  # with what came before
    np.testing.assert_allclose(curves[2], [[25, 0.805], [50, 0.815], [75, 0.835]])
    np.testing.assert_allclose(curves[3][:, 0], [29, 54, 79])
    band = axes.collections[0].get_paths()[0].vertices
    at = lambda x: band[np.isclose(band[:, 0], x), 1]  # noqa: E731
    assert (at(8.5).min(), at(8.5).max()) == (0.79, 0.80)
    assert (at(27).min(), at(27).max()) == (0.81, 0.84)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "lstmjax 0.1 / jax 0.10", "keras 3 / tensorflow 2", "with compiling",
    ]  # fmt: skip
    assert axes.get_xlabel() == "seconds of training" and axes.get_xlim()[0] == 0


@pytest.mark.parametrize(
    "lines, text",
    [
        ([], "lines: got none, expected at least one"),
        (
            [OURS._replace(seconds=((1.0,), (1.0, 2.0, 3.0)))],
            r"lines: got \[1, 3\] epochs of lstmjax, expected the same number for every seed",
        ),
    ],
)
def test_what_cannot_be_drawn(lines, text):
    with pytest.raises(ValueError, match=text):
        seconds_plots.curves("reviews", lines)


# ---- the command --------------------------------------------------------------------------------


def test_another_framework_is_first_with_every_seed():
    config = experiment.Config(seeds=4, seed=7)
    found = list(experiment.turns(["a", "b", "c"], config))
    assert "".join(name for _, name in found) == "abcbcacababc"
    assert [seed for seed, _ in found] == [7] * 3 + [8] * 3 + [9] * 3 + [10] * 3


@pytest.mark.parametrize("program", ["imdb-tf2", "mnist-corrected"])
def test_ours_is_the_program_of_the_row(program):
    config = experiment.Config(program)
    _, script, *flags = experiment.command(config, "lstmjax", 3, Path("here"))
    rows = runpy.run_path(script)["ROWS"]
    assert dataclasses.replace(rows[program]) == type(rows[program])()  # the defaults
    assert flags == ["--seed=3", "--data=auto", "--out=here"]
    config = experiment.Config(program, limit=200, data="offline")
    words = experiment.command(config, "torch", 3, Path("here"))
    assert Path(words[1]).name == "peers.py" and words[2:] == [
        f"--row={program}", "--framework=torch", "--seed=3", "--data=offline", "--limit=200",
        "--out=here/record.json",
    ]  # fmt: skip


def fake_run(words, log, data="same"):
    """Leaves what a run leaves; that of seed n takes n seconds more."""
    flags = dict(word.removeprefix("--").split("=") for word in words[2:])
    line = OURS if words[1].endswith("imdb.py") else THEIRS
    seed, place = int(flags["seed"]), Path(flags["out"])
    if line is OURS:
        place.mkdir(parents=True)
        changes = {"version": "0.1"}
    else:
        place = place.parent
        place.mkdir(parents=True)
        peer = {"row": "imdb-tf2", "framework": flags["framework"]}
        changes = {"experiment": "peers", "peer": peer}
    log.write_text("done")
    seconds = dict(zip(("compile", "train", "eval"), (2.0, 24.0 + seed, 1.0), strict=True))
    seconds["train_epochs"] = [time + seed for time in line.seconds[0]]
    accuracy = line.accuracy[0]
    metrics = {"validation_accuracy_epochs": accuracy, "validation_accuracy": accuracy[-1]}
    metrics["test_accuracy"] = line.test_accuracy[0]
    sha = SHA if data == "same" or line is THEIRS else SHA[::-1]
    changes["dataset"] = {"name": "imdb", "source": "tfds", "sha256": sha}
    record = write_record(place, seed, 0, [], 0, seconds=seconds, metrics=metrics, **changes)
    (file,) = place.glob("*.json")
    file.rename(place / "record.json")
    return 10.0 + record["seed"]


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "NEEDED", dict.fromkeys(experiment.NEEDED, ()))
    return experiment.Config(seeds=2, seed=1, out=str(tmp_path / "here"))


def test_what_is_done_stays_when_it_is_stopped(config, monkeypatch, capsys):
    folder, calls = Path(config.out), []

    def stopped_in_the_fourth(words, log):
        calls.append(log.stem)
        if len(calls) == 4:
            (log.parent / log.stem).mkdir()  # begun, and cut short
            raise KeyboardInterrupt
        return fake_run(words, log)

    monkeypatch.setattr(experiment, "execute", stopped_in_the_fourth)
    text = f"stopped after 3 of 6 runs; go on with --resume {folder}"
    with pytest.raises(RunStopped, match=text):
        experiment.run(config)
    assert not (folder / "record.json").exists()
    assert calls == ["lstmjax-seed1", "keras-seed1", "torch-seed1", "keras-seed2"]
    assert read_config(folder) == dataclasses.asdict(config)

    experiment.run(dataclasses.replace(config, resume=config.out))
    assert calls[4:] == ["keras-seed2", "torch-seed2", "lstmjax-seed2"]
    record = json.loads((folder / "record.json").read_text())
    assert validate(record) == [] and record["resumed"] == 1
    assert record["config"]["versions"] == {
        "lstmjax": "lstmjax 0.1 / jax 0.10.2", "keras": "keras", "torch": "torch"
    }  # fmt: skip
    assert record["config"]["levels"] == [0.8, 0.83, 0.84]
    ours, keras, _ = seconds_tables.lines_of(record)
    assert ours.seconds == ((8, 17, 25), (9, 18, 26)) and keras.seconds[1] == (22, 42, 62)
    assert keras.accuracy == (THEIRS.accuracy[0],) * 2 and keras.test_accuracy == (0.82, 0.82)
    assert ours.process == (11, 12) and ours.train == (25, 26) and ours.eval == (1, 1)
    assert record["seconds"] == {"compile": 12.0, "train": 153.0, "eval": 6.0}
    assert (folder / "seconds.png").exists()
    out = capsys.readouterr().out
    assert "keras, seed 2: validation 0.8200, 26.0 s of training\n" in out
    assert out.endswith(f"record in {folder}\n")


def test_frameworks_that_saw_different_data_are_not_compared(config, monkeypatch):
    monkeypatch.setattr(
        experiment, "execute", lambda words, log: fake_run(words, log, data="other")
    )
    with pytest.raises(RunError, match="seed 1: the frameworks had different data, by hash lstmj"):
        experiment.run(config)


def test_a_run_that_fails_is_named_with_its_last_words(tmp_path):
    words = [sys.executable, "-c", "print('so far'); raise SystemExit('error: no room')"]
    with pytest.raises(RunError, match="^keras-seed3 ended with exit code 1: error: no room$"):
        experiment.execute(words, tmp_path / "keras-seed3.log")


WRONG = [
    ("--frameworks keras", "--frameworks: got keras, expected lstmjax and some of keras, torch"),
    ("--frameworks lstmjax,jax", "--frameworks: got lstmjax,jax, expected lstmjax and some of"),
    (
        "--frameworks lstmjax,lstmjax",
        "--frameworks: got lstmjax,lstmjax, expected no framework twice",
    ),
    ("--frameworks lstmjax,torch", "--frameworks: got lstmjax,torch, expected torch installed: "),
    ("--seeds 0", "--seeds: got 0, expected an integer of at least 1"),
    ("--limit 127", "--limit: got 127, expected an integer of at least 128"),
    ("--program sin-tf1", "--program: got 'sin-tf1', expected one of imdb-tf2, mnist-corrected"),
]


@pytest.mark.parametrize(("flags", "text"), WRONG)
def test_a_wrong_value_is_one_clear_line(flags, text, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    find = importlib.util.find_spec
    nowhere = lambda name: None if name == "torch" else find(name)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", nowhere)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *flags.split()])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith(f"error: {text}") and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "program, limit, epochs, data",
    [("mnist-corrected", 60, 10, "offline_digits"), ("imdb-tf2", 300, 4, "offline_reviews")],
)
def test_a_small_comparison_of_what_is_installed(program, limit, epochs, data, tmp_path):
    """Ours, and of digits PyTorch's where it is there; Keras takes too long to load."""
    there = importlib.util.find_spec("torch") is not None and program == "mnist-corrected"
    frameworks = ["lstmjax", "torch"] if there else ["lstmjax"]
    flags = f"--frameworks {','.join(frameworks)} --program {program} --data offline "
    flags += f"--limit {limit} --seeds 1 --seed 5 --out here"
    quick = " ".join(f"--{name}={str(value).lower()}" for name, value in problems.QUICK.items())
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": quick}
    command = [sys.executable, str(SCRIPT), *flags.split()]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "here"
    record = json.loads((folder / "record.json").read_text())
    assert validate(record) == [] and "row" not in record
    assert record["command"] == f"python experiments/seconds.py {flags}"
    assert record["config"]["title"].endswith(f", the first {limit} of every split, on {data}")
    lines = seconds_tables.lines_of(record)
    assert [line.framework for line in lines] == frameworks
    for line in lines:
        ((*times, last),) = line.seconds
        assert len(times) == epochs - 1 and times == sorted(set(times)) and times[0] > 0
        assert times[-1] < last == line.train[0]
        assert line.process[0] > line.compile[0] + line.train[0] + line.eval[0]
        own = json.loads((folder / "runs" / f"{line.framework}-seed5/record.json").read_text())
        assert tuple(own["metrics"]["validation_accuracy_epochs"]) == line.accuracy[0]
        assert own["dataset"]["sha256"] == record["dataset"]["sha256"]
    assert (folder / "seconds.png").read_bytes().startswith(b"\x89PNG")
