"""experiments/what_matters.py: which runs a study is, what is made of them, and how it goes on."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "experiments"))
import imdb  # noqa: E402
import long_lag  # noqa: E402
import mnist  # noqa: E402
import sin  # noqa: E402
import what_matters as experiment  # noqa: E402
from tiny_records import ENVIRONMENT, SHA  # noqa: E402

from lstmjax import cli, tables  # noqa: E402
from lstmjax import what_matters_tables as texts  # noqa: E402
from lstmjax.records import RunError, RunStopped, validate  # noqa: E402
from lstmjax.seeds import together  # noqa: E402

PROGRAMS = {"sin": sin, "imdb": imdb, "mnist": mnist, "adding": long_lag}


# ---- which runs a study is ----------------------------------------------------------------------


def settings(cell):
    """In what a cell's settings differ from its program's own."""
    program = PROGRAMS[cell.task]
    own = cli.parse(program.Config, presets=program.PRESETS, argv=list(cell.flags))
    program.check(own)
    base = dataclasses.asdict(program.Config())
    base |= {"cells": "lstm"} if cell.task == "adding" else {}
    return {name: v for name, v in dataclasses.asdict(own).items() if v != base[name]}


@pytest.mark.parametrize(("study", "count"), [("init", 57), ("variants", 27), ("dropout", 15)])
def test_every_cell_is_a_run_of_its_own(study, count):
    cells = experiment.plan(experiment.Config(study=study, seeds=3, seed=2))
    assert len({cell.key for cell in cells}) == len(cells) == count
    seen = []
    for cell in cells:
        own = settings(cell)
        assert (own.pop("seeds"), own.pop("seed")) == (3, 2) if cell.task != "adding" else True
        seen.append((cell.task, sorted(own.items(), key=str)))
    assert all(one not in seen[:n] for n, one in enumerate(seen))


@pytest.mark.parametrize(
    ("study", "key", "want"),
    [
        ("init", "sin/tf1", {}),
        ("init", "sin/haiku", {"init": "haiku"}),
        ("init", "imdb/keras", {}),
        ("init", "imdb/torch", {"init": "torch"}),
        ("init", "imdb/torch-1", {"init": "torch", "forget_bias": "1"}),
        ("init", "imdb/keras-chrono", {"forget_bias": "chrono:80"}),
        ("init", "imdb/keras-0", {"forget_bias": "0"}),
        ("init", "mnist/tf1", {"epochs": 4}),
        ("init", "mnist/tf1-chrono", {"forget_bias": "chrono:28", "epochs": 4}),
        ("init", "mnist/nnx_fused", {"init": "nnx_fused", "epochs": 4}),
        ("init", "adding/lstmjax", {}),
        ("init", "adding/flax-1", {"init": "flax", "cells": "lstm-1"}),
        ("init", "adding/lstmjax-chrono", {"cells": "lstm-chrono"}),
        ("init", "adding/lstmjax-uniform_gate", {"cells": "lstm-uniform_gate"}),
        ("variants", "sin/lstm", {}),
        ("variants", "imdb/fgr", {"cell": "fgr"}),
        ("dropout", "imdb/none", {"dropout": 0.0}),
        ("dropout", "imdb/dropout-0.2", {}),
        ("dropout", "imdb/dropout-0.5", {"dropout": 0.5}),
        ("dropout", "imdb/zoneout-0.1", {"dropout": 0.0, "zoneout": 0.1}),
        ("dropout", "imdb/word_dropout-0.3", {"dropout": 0.0, "word_dropout": 0.3}),
    ],
)
def test_a_cell_changes_what_it_says_and_nothing_else(study, key, want):
    config = experiment.Config(study=study, seeds=7, seed=3)
    (cell,) = (cell for cell in experiment.plan(config) if cell.key == key)
    # The adding problem's own settings are its preset's, which says 5,000 updates.
    preset = {"updates": 5_000} if cell.task == "adding" else {}
    assert settings(cell) == want | preset | {"seeds": 7, "seed": 3}


def test_lengths_are_those_of_the_sequences():
    assert experiment.STEPS["imdb"] == imdb.Config().max_length
    assert experiment.STEPS["mnist"] == 28 and mnist.Config().layout == "rows"
    task = long_lag.make_task("adding", long_lag.Config().length)
    assert f"T = {task.steps}" in texts.TASKS["adding"].title
    chrono = long_lag.forget_bias("lstm-uniform_gate", 200)
    assert chrono is long_lag.gate_bias("uniform_gate", "lstm")


def test_a_look_is_small_everywhere():
    config = experiment.Config(limit=150, epochs=1, data="offline", seeds=2, devices=1)
    seen = {cell.task: settings(cell) for cell in experiment.plan(config)}
    for task in ("imdb", "mnist"):
        own = seen[task]
        assert (own["limit"], own["epochs"], own["data"]) == (150, 1, "offline")
    assert seen["sin"]["updates"] == seen["adding"]["updates"] == 150
    assert seen["adding"]["eval_every"] == 150
    assert all(own["devices"] == 1 for own in seen.values())


@pytest.mark.parametrize(
    ("only", "want"),
    [
        ("mnist/torch", ["mnist/tf1", "mnist/torch"]),
        ("torch", [f"{t}/{n}" for t, ref in experiment.REFERENCES["init"].items()
                   for n in (ref, "torch")]),
        ("mnist/tf1", ["mnist/tf1"]),
        ("sin,adding/flax", [f"sin/{n}" for n in experiment.names_of("init", "sin")]
         + ["adding/lstmjax", "adding/flax"]),
    ],
)  # fmt: skip
def test_only_some_cells_and_what_they_are_held_against(only, want):
    config = experiment.Config(only=only)
    experiment.check(config)
    assert [cell.key for cell in experiment.plan(config)] == want


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"only": "imdb/cifg"}, "--only: got imdb/cifg, expected tasks (sin, imdb, mnist, adding)"),
        ({"only": "torch,"}, "--only: got torch,, expected tasks"),
        ({"study": "dropout", "only": "sin"}, "--only: got sin, expected tasks (imdb), names"),
        ({"seeds": 1}, "--seeds: got 1, expected an integer of at least 2"),
        ({"limit": 0}, "--limit: got 0, expected an integer of at least 1"),
        ({"epochs": 0}, "--epochs: got 0, expected an integer of at least 1"),
    ],
)
def test_wrong_settings_are_one_line(wrong, said):
    with pytest.raises(cli.ConfigError) as caught:
        experiment.check(experiment.Config(**wrong))
    assert str(caught.value).startswith(said)


# ---- what is made of their records --------------------------------------------------------------


def test_numbers_of_a_classifier():
    runs = [
        {"validation_accuracy": 0.7, "test_accuracy": 0.65, "test_loss": 1.0,
         "validation_accuracy_epochs": [0.6, 0.9, 0.7], "validation_loss_epochs": [1.0, 1.0, 1.0]},
        {"validation_accuracy": 0.8, "test_accuracy": 0.75, "test_loss": 2.0,
         "validation_accuracy_epochs": [0.95, 0.6, 0.8],
         "validation_loss_epochs": [float("nan"), 1.0, 1.0]},
    ]  # fmt: skip
    record = {
        "seed": 4, "config": {"seeds": 2}, "metrics": together(runs, [4, 5]),
        "seconds": {"compile": 1.0, "train": 10.5, "eval": 2.0},
    }  # fmt: skip
    cell = experiment.Cell("imdb", "torch-1", ())
    assert experiment.numbers(cell, record) == {
        "imdb/torch-1/validation_accuracy": [0.7, 0.8],
        "imdb/torch-1/test_accuracy": [0.65, 0.75],
        "imdb/torch-1/best_epoch": [2, 3],  # an epoch with a loss of NaN is never the best
        "imdb/torch-1/best_validation_accuracy": [0.9, 0.8],
        "imdb/torch-1/validation_accuracy_epochs_seed4": [0.6, 0.9, 0.7],
        "imdb/torch-1/validation_accuracy_epochs_seed5": [0.95, 0.6, 0.8],
        "imdb/torch-1/train_seconds": 10.5,
    }


def test_numbers_of_the_adding_problem():
    metrics = {"lstm-0_solved_at": [300.0, "inf"], "lstm-0_updates": [0, 100, 5000],
               "lstm-0_test_loss": [0.001, 0.1], "lstm_test_loss": [9, 9]}  # fmt: skip
    seconds = {"compile": 1.0, "train": 10.5, "eval": 2.0}
    record = {"seed": 0, "config": {"cells": "lstm-0"}, "metrics": metrics, "seconds": seconds}
    found = experiment.numbers(experiment.Cell("adding", "x", ()), record)
    assert found["adding/x/solved_at"].tolist() == [300.0, np.inf]
    assert found["adding/x/updates_to_solve"].tolist() == [300.0, 5000.0]
    assert found["adding/x/test_loss"] == [0.001, 0.1]


DATA = {"name": "imdb_reviews", "source": "tfds", "sha256": SHA}


# ---- running ------------------------------------------------------------------------------------


@pytest.fixture
def signals():
    """Puts back what SIGINT and SIGTERM did."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


CHILD = """
import json, sys
from pathlib import Path
out = Path(sys.argv[1]); out.mkdir(parents=True)
{}
"""
ENDS = {
    "diverges": "(out / 'nonfinite-seed1-40.json').touch(); sys.exit('error: the loss is nan')",
    "fails": "sys.exit('error: no room')",
    "stops": "import os, signal, time; os.kill(os.getppid(), signal.SIGINT); time.sleep(60)",
}


def made_up(seed):
    runs = [{"mse": 0.1 * n + seed} for n in (1, 2)]
    return {
        "experiment": "sin", "version": "0.1.0", "date": "2026-01-02", "command": "python sin.py",
        "config": {"seeds": 2}, "dataset": DATA, "metrics": together(runs, [0, 1]),
        "seconds": {"compile": 1.0, "train": 2.0, "eval": 0.0}, "params_sha256": SHA,
        "environment": ENVIRONMENT, "seed": 0,
    }  # fmt: skip


@pytest.fixture
def cells(tmp_path, monkeypatch, signals):
    """Four cells of which the second is as a test says, and the others come to their ends."""
    ends = {}

    def command(cell, out):
        good = f"(out / 'record.json').write_text({json.dumps(made_up(len(cell.name)))!r})"
        code = CHILD.format(ENDS.get(ends.get(cell.name), good))
        experiment.shutil.rmtree(out, ignore_errors=True)
        return [sys.executable, "-S", "-c", code, str(out)]

    monkeypatch.setattr(experiment, "command", command)
    plan = [experiment.Cell("sin", name, ()) for name in ("tf1", "torch", "keras", "flax")]
    return SimpleNamespace(ends=ends, plan=plan, run=lambda: experiment.fit_all(plan, tmp_path))


def test_a_cell_that_diverges_is_a_result(cells, capsys):
    cells.ends["torch"] = "diverges"
    found = cells.run()
    assert found["sin/torch"] == "seed1-40 is not finite"
    assert [found[f"sin/{n}"]["metrics"]["mse"][0] for n in ("tf1", "keras")] == [3.1, 5.1]
    assert "sin/torch: diverged\n" in capsys.readouterr().out
    assert experiment.summary(cells.plan[1], found["sin/torch"]) == {
        "diverged": "seed1-40 is not finite"
    }


def test_a_cell_that_fails_is_tried_again(cells, tmp_path):
    cells.ends["torch"] = "fails"
    with pytest.raises(RunError) as caught:
        cells.run()
    why = "1 of 4 cells failed, the first: sin/torch ended with exit code 1: error: no room"
    assert str(caught.value) == f"{why}; --resume {tmp_path} tries them again"
    before = (tmp_path / "sin/flax/record.json").stat().st_mtime_ns  # the others were run
    cells.ends.clear()
    assert len(cells.run()) == 4
    assert (tmp_path / "sin/flax/record.json").stat().st_mtime_ns == before


def test_a_study_that_is_stopped_keeps_what_it_has(cells, tmp_path, capsys):
    cells.ends["torch"] = "stops"
    began = time.monotonic()
    with pytest.raises(RunStopped) as caught:
        cells.run()
    assert time.monotonic() - began < 30  # the run under way was told, and none was begun
    assert str(caught.value) == f"stopped after 1 of 4 cells: go on with --resume {tmp_path}"
    assert (tmp_path / "sin/tf1/record.json").exists() and not (tmp_path / "sin/keras").exists()
    assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL  # a second one ends it at once
    cells.ends.clear()
    assert len(cells.run()) == 4
    assert capsys.readouterr().out.count("sin/keras: MSE") == 1


def test_every_resume_counts(tmp_path, monkeypatch):
    def stopped(cells, folder):
        raise RunStopped("stopped")

    folder, opened = tmp_path / "study", []
    monkeypatch.setattr(experiment, "fit_all", stopped)
    config = experiment.Config(out=str(folder))
    for _ in range(3):
        with pytest.raises(RunStopped):
            experiment.run(config)
        opened.append(len(json.loads((folder / "run.json").read_text())["opened"]))
        config = experiment.Config(resume=str(folder))
    assert opened == [1, 2, 3]


def test_what_goes_on_and_what_begins_again(tmp_path):
    cell, out = experiment.Cell("imdb", "keras", ("--init=keras",)), tmp_path / "imdb" / "keras"
    assert experiment.command(cell, out)[1:] == [
        str(ROOT / "experiments" / "imdb.py"), "--init=keras", f"--out={out}",
    ]  # fmt: skip
    out.mkdir(parents=True)
    (out / "config.json").touch()  # it was killed before it was a run
    assert experiment.command(cell, out)[2:] == ["--init=keras", f"--out={out}"]
    assert not out.exists()
    out.mkdir()
    (out / "run.json").touch()
    assert experiment.command(cell, out)[2:] == [f"--resume={out}"]
    adding = experiment.Cell("adding", "torch", ("--init=torch",))
    again = experiment.command(adding, out)  # long_lag.py cannot go on
    assert again[1].endswith("long_lag.py") and again[2:] == ["--init=torch", f"--out={out}"]
    assert not out.exists()


def test_data_of_all_cells():
    one, other = DATA, {"name": "sin", "source": "generated", "sha256": SHA[::-1]}
    found = experiment.joined([one, other, one])
    assert (found["name"], found["source"]) == ("imdb_reviews, sin", "tfds")
    assert found == experiment.joined([one, other]) | {"sha256": found["sha256"]}
    assert found["sha256"] != experiment.joined([one])["sha256"]
    assert experiment.joined([other])["source"] == "generated"


def script(cwd, cache, *flags):
    environment = {**os.environ, "LSTMJAX_CACHE": str(cache), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(ROOT / "experiments" / "what_matters.py"), *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=cwd, env=environment | {"PYTHONPATH": str(ROOT)}, **pipes)


def test_a_study_is_stopped_and_goes_on(tmp_path):
    """Two runs of digits, as its users start them; Ctrl-C during the second."""
    flags = "--study init --only mnist/torch --data offline --limit 60 --epochs 2 --seeds 2"
    child = script(tmp_path, tmp_path / "cache", *flags.split(), "--out", "here", "--seed=5")
    first = tmp_path / "here" / "mnist" / "tf1" / "record.json"
    while not (tmp_path / "here" / "mnist" / "torch.log").exists():
        assert child.poll() is None, child.stderr.read()
        time.sleep(0.1)
    child.send_signal(signal.SIGINT)
    _, said = child.communicate(timeout=120)
    assert child.returncode == cli.STOPPED, said
    assert said == "stopped after 1 of 2 cells: go on with --resume here\n"
    assert not (tmp_path / "here" / "record.json").exists()
    before = first.stat().st_mtime_ns

    child = script(tmp_path, tmp_path / "cache", "--resume", "here")
    out, said = child.communicate()
    assert (child.returncode, said) == (0, "")
    assert first.stat().st_mtime_ns == before
    assert out.splitlines()[-1] == "2 of 2 cells on offline_digits (offline); record in here"
    record = tables.load(tmp_path / "here" / "record.json")
    assert validate(record) == [] and record["resumed"] == 1
    assert record["command"].endswith(f"{flags} --out here --seed=5")
    assert (record["dataset"]["source"], record["config"]["references"]) == (
        "offline", {"mnist": "tf1"},
    )  # fmt: skip
    for name in ("tf1", "torch"):
        own = tables.load(tmp_path / "here" / "mnist" / name / "record.json")
        run = record["config"]["runs"][f"mnist/{name}"]
        assert run["params_sha256"] == own["params_sha256"]
        assert run["command"] == own["command"] and f"--init={name} " in run["command"]
        for number in ("validation_accuracy", "test_accuracy"):
            assert record["metrics"][f"mnist/{name}/{number}"] == own["metrics"][number]
    assert (tmp_path / "here" / "init.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "what-matters-init.json").write_text(json.dumps(record))
    text = tables.benchmarks([], [], tables.load_timed(tmp_path / "results"))
    assert "### init on mnist; seeds 5 to 6\n" in text and "\n| torch | " in text
    assert "with seeds 5, 6\n" in text and "`what-matters-init.json`" in text
