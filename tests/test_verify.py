"""Verifying a record: what is compared, with what outcome, and which run is started for it.

That all four training experiments can be verified is tested in test_reproducible.py.
"""

import dataclasses
import json
import math
import re
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tiny_records import SHA, write_record

from lstmjax import __version__, records, results, verify
from lstmjax.cli import ConfigError

ROOT = Path(__file__).resolve().parents[1]
FIRST = {"name": "loss", "steps": [5, 10, 15], "loss": [0.75, 0.5, 0.25]}


def committed(name):
    return json.loads((ROOT / "experiments" / "results" / f"{name}.json").read_text())


@pytest.fixture
def record(tmp_path):
    """A record of this machine, whose new run logs what a test wants it to."""
    here = {**records.environment(2), "devices": 2}
    return write_record(
        tmp_path, 0, 0.8, [0.8], 1.0, first_steps=FIRST, environment=here, version=__version__
    )


@pytest.fixture
def rerun(monkeypatch):
    """``rerun(lines, sha256)``: the next new run logs these lines, with such data."""

    def prepare(lines, sha256=SHA):
        def instead(record, wanted):
            found = verify.logged(lines)
            assert set(wanted) <= set(found)
            return found, sha256[:12]

        monkeypatch.setattr(verify, "rerun", instead)

    return prepare


def lines(*losses):
    return [{"step": 5 * i, "epoch": 1, "loss": loss} for i, loss in enumerate(losses, 1)]


def verified(tmp_path, record, *flags):
    """The exit code of the command."""
    (tmp_path / "record.json").write_text(json.dumps(record))
    with pytest.raises(SystemExit) as stop:
        results.command(["verify", str(tmp_path / "record.json"), *flags])
    return stop.value.code


# ---- outcomes -----------------------------------------------------------------------------------


def test_equal_in_every_bit(record, rerun, tmp_path, capsys):
    rerun(lines(0.75, 0.5, 0.25, 0.125))
    assert verified(tmp_path, record) == 0
    text = capsys.readouterr().out
    assert "result    equal in every bit: 3 losses\n" in text
    assert "changed   nothing: code, versions and machine are the same\n" in text
    assert f"data      imdb_reviews, sha256 {SHA[:12]}: the same\n" in text
    assert "          loss of step 10: 0.5, now 0.5\n" in text


def test_equal_within_the_tolerance(record, rerun, tmp_path, capsys):
    rerun(lines(0.75, 0.5 * (1 + 3e-7), 0.25))
    assert verified(tmp_path, record) == 0
    text = capsys.readouterr().out
    assert "now 0.50000015 (3.0e-07 apart)\n" in text
    assert (
        "result    equal within 0.001, but not in every bit: 3 losses, largest relative "
        "difference 3e-07, loss of step 10\n" in text
    )
    assert verified(tmp_path, record, "--tolerance", "1e-7") == 1
    assert "result    different by more than 1e-07: 3 losses, largest" in capsys.readouterr().out
    assert verified(tmp_path, record, "--tolerance", "0", "--steps", "1") == 0
    assert "result    equal in every bit: 1 loss\n" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [0.26, -0.25, "nan", "inf", 0.0])
def test_another_loss_is_different(record, rerun, tmp_path, capsys, wrong):
    rerun(lines(0.75, 0.5, wrong))
    assert verified(tmp_path, record) == 1
    assert "result    different by more than 0.001: 3 losses" in capsys.readouterr().out
    rerun(lines(0.75, 0.5, 0.25))
    record["first_steps"] = FIRST | {"loss": [0.75, 0.5, wrong]}
    assert verified(tmp_path, record) == 1


def test_a_run_that_diverged_is_verified_too(record, rerun, tmp_path):
    record["first_steps"] = FIRST | {"loss": [0.75, "inf", "nan"]}
    rerun(lines(0.75, "inf", "nan"))
    assert verified(tmp_path, record) == 0
    rerun(lines(0.75, "-inf", "nan"))
    assert verified(tmp_path, record) == 1


def test_other_data_are_different_whatever_the_losses(record, rerun, tmp_path, capsys):
    rerun(lines(0.75, 0.5, 0.25), sha256="f" * 64)
    assert verified(tmp_path, record) == 1
    text = capsys.readouterr().out
    assert f"data      imdb_reviews, sha256 {'f' * 12}: the record's is {SHA[:12]}\n" in text
    assert text.endswith("result    different data\n")


def test_what_has_changed_since_is_said(record, rerun, tmp_path, capsys):
    rerun(lines(0.75, 0.5, 0.25))
    then = {"jax": "0.9", "device": "Processor X", "git commit": "abcdef7890" * 4}
    record["environment"] = record["environment"] | then
    del record["environment"]["driver"]  # not known of older records, and so no difference
    assert verified(tmp_path, record | {"version": "0.0.1"}) == 0
    (line,) = re.findall("^changed   (.*)$", capsys.readouterr().out, re.M)
    now = records.environment(2)
    assert line.split("; ") == [
        f"device was 'Processor X', is {now['device']!r}",
        f"git commit was 'abcdef7890', is {now['git commit'][:10]!r}",
        f"jax was '0.9', is {now['jax']!r}",
        f"lstmjax was '0.0.1', is {__version__!r}",
    ]


# ---- misuse -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, complaint",
    [
        ("scaling-seed0", "the record is of scaling, which measures and trains nothing: verify "),
        ("scan-vs-unrolled-seed0", "the record is of scan_vs_unrolled, which measures and trains"),
        ("peer-layers-seed0", "the record is of peer-layers, which measures and trains nothing"),
        ("parity-seed1997", "the record is of parity, which measures and trains nothing"),
        ("long-lag-copy-seed0", "the record is of long_lag: verify runs sin, forecast, mnist"),
        ("truncation-seed0", "the record is of truncation: verify runs sin, forecast"),
        ("peers-sin-tf1-seed0", "the record is of keras 3.15.1 / tensorflow 2.21.0: verify runs"),
    ],
)
def test_records_that_cannot_be_verified_say_why(name, complaint, capsys):
    with pytest.raises(SystemExit) as stop:
        results.command(["verify", str(ROOT / "experiments" / "results" / f"{name}.json")])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith(f"error: {complaint}")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "changes, flags, complaint",
    [
        ({}, ["--steps", "0"], "--steps: got 0, expected 1 to 3, the losses it holds"),
        ({}, ["--steps", "4"], "--steps: got 4, expected 1 to 3, the losses it holds"),
        ({}, ["--tolerance", "-1"], "--tolerance: got -1.0, expected a number not below 0"),
        ({}, ["--tolerance", "nan"], "--tolerance: got nan, expected a number not below 0"),
        ({}, ["--stepps", "4"], "--stepps: no such flag, did you mean --steps?"),
        ({"first_steps": FIRST | {"steps": [1]}}, [], "first_steps: got lists of different leng"),
        ({"config": {"a b": 1}}, [], "config: got a setting 'a b', expected names of flags"),
        ({"config": {"--out": 1}}, [], "config: got a setting '--out', expected names of flags"),
        ({"seed": "x"}, [], "{} is no valid record: seed: got 'x', expected an integer"),
    ],
)
def test_misuse_is_one_line_and_runs_nothing(
    record, tmp_path, monkeypatch, capsys, changes, flags, complaint
):
    monkeypatch.setattr(verify, "rerun", None)
    assert verified(tmp_path, record | changes, *flags) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {complaint.format(tmp_path / 'record.json')}")
    assert error.count("\n") == 1


def test_without_a_checkout_there_is_nothing_to_run(record, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(verify, "ROOT", tmp_path)
    assert verified(tmp_path, record) == 2
    assert "experiments/imdb.py is not there: verify needs a checkout" in capsys.readouterr().err


# ---- what is compared ---------------------------------------------------------------------------


def test_first_losses_of_a_record(record):
    assert verify.losses(record) == {
        "loss of step 5": 0.75, "loss of step 10": 0.5, "loss of step 15": 0.25,
    }  # fmt: skip
    assert verify.losses(record, 2) == {"loss of step 5": 0.75, "loss of step 10": 0.5}


@pytest.mark.parametrize(
    "name, expected",
    [
        ("sin-tf1-seed0", ["mse of step 0"]),
        ("forecast-rnn-seed1", ["train_mse of epoch 100"]),
        ("imdb-tf2-seed0", ["train_loss of epoch 1", "validation_loss of epoch 1"]),
        ("imdb-tf2-source-seed2", ["train_loss of epoch 1"]),
        ("mnist-tf1-seed0", ["train_loss of epoch 1", "validation_loss of epoch 1"]),
    ],
)
def test_older_records_have_other_numbers_to_offer(name, expected):
    record = committed(name)
    del record["first_steps"]  # those that were made before it was kept
    found = verify.losses(record)
    assert list(found) == expected
    metrics = record["metrics"]
    kinds = {"mse": metrics.get("mse_first"), "train_mse": metrics.get("train_mse")}
    for kind in ("train_loss", "validation_loss"):
        kinds[kind] = metrics.get(f"{kind}_epochs", [None])[0]
    assert [found[n] for n in expected] == [kinds[n.split(" of ")[0]] for n in expected]


def test_a_record_without_any_loss_is_refused(record):
    del record["first_steps"]
    record["metrics"] = {"accuracy": 0.5, "train_loss_epochs": [1.0, 2.0]}
    record["config"]["epochs"] = 3  # the list is not one value for each epoch
    others = [{"train_loss_epochs": 1.0}, {"mse_first": [1.0]}, {"train_mse": 10**400}]
    for metrics in (record["metrics"], *others):
        with pytest.raises(ConfigError, match="the record holds no loss that could be compared"):
            verify.losses(record | {"metrics": metrics})


def test_logged_numbers_are_found_by_step_and_by_epoch():
    found = verify.logged(
        [
            {"step": 5, "epoch": 1, "loss": 0.75},
            {"step": 10, "epoch": 1, "loss": "nan"},
            {"step": 10, "epoch": 1, "train_loss": 0.5},
            {"step": 15, "epoch": 2, "loss": 0.25, "train_loss": 8},
        ]
    )
    assert found["loss of step 5"] == found["loss of epoch 1"] == 0.75  # the first of the epoch
    assert math.isnan(found["loss of step 10"]) and found["loss of step 15"] == 0.25
    assert found["train_loss of epoch 1"] == 0.5 and found["train_loss of epoch 2"] == 8


@pytest.mark.parametrize(
    "a, b, expected",
    [
        (1.0, 1.0, 0.0), (0.0, 0.0, 0.0), (2.0, 1.5, 0.25), (-1.5, -2.0, 0.25), (1.0, -1.0, 2.0),
        (0.0, 1e-300, 1.0), (math.nan, math.nan, 0.0), (math.inf, math.inf, 0.0),
        (math.nan, 1.0, math.inf), (1.0, math.nan, math.inf), (math.inf, 1.0, math.inf),
        (math.inf, -math.inf, math.inf),
    ],
)  # fmt: skip
def test_how_far_two_losses_are_apart(a, b, expected):
    assert verify.distance(a, b) == verify.distance(b, a) == expected


def test_one_bit_is_not_equal_in_every_bit():
    next_one = float(np.nextafter(0.5, 1))
    assert verify.judged({"a": 0.5}, {"a": 0.5}, 0.0) == (True, "equal in every bit: 1 loss")
    equal, said = verify.judged({"a": 0.5}, {"a": next_one}, 0.0)
    assert not equal and said.startswith("different by more than 0: 1 loss, largest relative")


# ---- the run that is started --------------------------------------------------------------------


def test_the_settings_become_a_command_line(record):
    record["config"] = {
        "preset": "tf2", "cell": "gru", "forget_bias": None, "mask": False, "drop_remainder": True,
        "dropout": 0.1, "clip_norm": -1e-05, "sweep": "lr=1e-3,3e-3", "data": "auto", "out": "x",
        "live": True, "resume": "y", "devices": None, "seed": 7, "num_processes": 4,
        "distributed": True, "coordinator": "host:1", "process_id": 2,
    }  # fmt: skip
    assert verify.flags(record) == [
        "--preset=tf2", "--cell=gru", "--forget-bias=None", "--no-mask", "--drop-remainder",
        "--dropout=0.1", "--clip-norm=-1e-05", "--sweep=lr=1e-3,3e-3", "--data=tfds",
        "--devices=2", "--seed=7",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["sin-keras", "forecast-rnn", "imdb-tf2-gru", "mnist-tf1"])
def test_an_experiment_reads_its_own_record_back(name):
    """The flags of a committed record, through the experiment's own command line."""
    import importlib.util

    from lstmjax import cli

    record = committed(f"{name}-seed2")
    path = ROOT / "experiments" / f"{record['experiment']}.py"
    spec = importlib.util.spec_from_file_location(f"experiment_{record['experiment']}", path)
    experiment = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = experiment  # dataclasses ask for it
    try:
        spec.loader.exec_module(experiment)
        config = cli.parse(experiment.Config, presets=experiment.PRESETS, argv=verify.flags(record))
    finally:
        del sys.modules[spec.name]
    found = {k: v for k, v in dataclasses.asdict(config).items() if k in record["config"]}
    asked = {"out": None, "devices": record["environment"]["devices"]}
    asked |= {"data": record["dataset"]["source"]} if "data" in found else {}
    assert found == record["config"] | asked


SCRIPT = """
import json, sys, time
from pathlib import Path
folder = Path(sys.argv[-1].removeprefix("--out="))
folder.mkdir()
print("training on something, sha256 0123456789ab")
with open(folder / "metrics.jsonl", "a", buffering=1) as file:
    for step, loss in enumerate({losses}):
        file.write(json.dumps({{"step": step, "loss": loss}}) + "\\n")
{then}
"""


@pytest.fixture
def script(record, tmp_path, monkeypatch):
    """``script(losses, then)``: an experiment that logs losses; returns its record."""
    (tmp_path / "experiments").mkdir()
    monkeypatch.setattr(verify, "ROOT", tmp_path)

    def write(losses, then):
        text = SCRIPT.format(losses=losses, then=then)
        (tmp_path / "experiments" / "imdb.py").write_text(text)
        return record

    return write


def test_a_run_is_stopped_as_soon_as_it_has_logged_enough(script):
    record = script([0.5, 0.25, 0.125], "time.sleep(60)")
    start = time.monotonic()
    found, sha256 = verify.rerun(record, ["loss of step 1"])
    assert time.monotonic() - start < 20
    assert (found["loss of step 0"], found["loss of step 1"]) == (0.5, 0.25)
    assert sha256 == "0123456789ab"


def test_what_a_short_run_logs_at_its_end_is_seen(script):
    found, _ = verify.rerun(script([0.5, 0.25], ""), ["loss of step 1"])
    assert found["loss of step 1"] == 0.25


def test_a_run_that_fails_says_why(script):
    record = script([0.5], "sys.exit('error: no data')")
    with pytest.raises(ConfigError) as error:
        verify.rerun(record, ["loss of step 1"])
    assert str(error.value) == (
        "the run ended (exit code 1) before its first losses: error: no data"
    )


def test_the_run_is_ended_with_the_command(script, tmp_path, monkeypatch):
    """Ctrl-C while it is waited for: no process is left behind."""
    record = script([], "import os; Path('pid').write_text(str(os.getpid())); time.sleep(60)")
    monkeypatch.chdir(tmp_path)
    pid = tmp_path / "pid"

    def interrupted(seconds):
        if pid.exists() and pid.read_text():
            raise KeyboardInterrupt

    monkeypatch.setattr(verify.time, "sleep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        verify.rerun(record, ["loss of step 1"])
    assert not Path("/proc", pid.read_text()).exists()
