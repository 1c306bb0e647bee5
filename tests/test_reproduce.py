"""Rows that are repeated: what is run, what is compared with what, and what the budget leaves."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from scipy import stats

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "experiments"))
import reproduce  # noqa: E402

from lstmjax import cli, long_lag_tables, tables  # noqa: E402
from lstmjax.records import RunError, hold  # noqa: E402

SCORES = ("loss", "wrong")
RESULTS = ROOT / "experiments" / "results"


def script(*flags):
    return subprocess.run(
        [sys.executable, str(ROOT / "experiments" / "reproduce.py"), *map(str, flags)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


@pytest.fixture
def results(tmp_path):
    """The committed records of sin-tf1, and of one row that takes longer."""
    folder = tmp_path / "results"
    folder.mkdir()
    for row in ("sin-tf1", "sin-keras"):
        for seed in range(3):
            shutil.copy(RESULTS / f"{row}-seed{seed}.json", folder)
    return folder


def change(folder, row, **metrics):
    for seed in range(3):
        path = folder / f"{row}-seed{seed}.json"
        record = json.loads(path.read_text())
        for name, value in metrics.items():
            record["metrics"][name] = value(seed)
        path.write_text(json.dumps(record))


def test_the_interval_of_one_more_run():
    values = [0.81, 0.85, 0.83, 0.84]
    low, high = reproduce.prediction(values)
    spread = stats.tstd(values) * (1 + 1 / 4) ** 0.5
    want = stats.t.interval(0.95, 3, loc=sum(values) / 4, scale=spread)
    assert (low, high) == pytest.approx(want, rel=1e-12)
    assert reproduce.prediction([1.0]) is None
    assert reproduce.prediction([1.0, float("nan"), 2.0]) is None


@pytest.mark.parametrize(
    ("now", "recorded", "interval", "within"),
    [
        (1.0, 1.0, None, True),
        (1.0, 1.0, (2.0, 3.0), True),  # the same bits, whatever the others gave
        (1.0, 1.1, None, None),
        (1.0, 1.1, (0.9, 1.2), True),
        (1.0, 1.1, (1.05, 1.2), False),
        (float("nan"), 1.1, (1.05, 1.2), False),
    ],
)
def test_what_lies_within(now, recorded, interval, within):
    assert reproduce.Repeated("mse", recorded, now, interval).within is within


def test_rows_come_by_what_they_take(results):
    found = reproduce.rows(results)
    assert list(found) == ["sin-tf1", "sin-keras"]
    first = reproduce.seconds(found["sin-tf1"])
    totals = sorted(sum(r["seconds"].values()) for r in found["sin-tf1"].records)
    assert first == totals[1]


def test_a_row_is_held_against_its_own_seed_and_all_of_them(results):
    change(results, "sin-tf1", mse=lambda seed: 1.0 + seed, source_loss=lambda seed: 5.0)
    group = reproduce.rows(results)["sin-tf1"]
    record = {"seed": 2, "metrics": {"mse": 3.5, "source_loss": 5.5}}
    mse, loss = reproduce.compared(group, record)
    assert (mse.name, mse.recorded, mse.now, mse.within) == ("mse", 3.0, 3.5, True)
    assert mse.interval == reproduce.prediction([1.0, 2.0, 3.0])
    assert (loss.recorded, loss.interval, loss.within) == (5.0, (5.0, 5.0), False)
    other, _ = reproduce.compared(group, record | {"seed": 7})
    assert other.recorded is None and other.within


def test_what_a_run_cost_is_not_held_against_anything():
    record = tables.load(RESULTS / "reviews-ratios-seed0.json")
    group = tables.Group("reviews-ratios", "lstmjax", (record,), ())
    assert any(name == "tokens_per_second" for name, *_ in tables.ROWS["reviews-ratios"].metrics)
    slower = record | {"metrics": record["metrics"] | {"tokens_per_second": 1.0}}
    found = reproduce.compared(group, slower)
    assert "test_accuracy" in {one.name for one in found} and all(one.within for one in found)


def test_the_command_has_the_settings_of_the_record(results):
    group = tables.Group("imdb-tf2", "lstmjax", (), ())
    record = tables.load(RESULTS / "imdb-tf2-seed1.json")
    group = group.__class__("imdb-tf2", "lstmjax", (record,), ())
    words = reproduce.command(group, reproduce.Config(seed=5, devices=1), Path("x"))
    assert words[1].endswith("imdb.py") and words[-1] == "--out=x"
    assert {"--seed=5", "--devices=1", "--data=tfds", "--no-mask", "--epochs=4"} <= set(words)
    assert {"--seed=1", "--devices=2"} <= set(
        reproduce.command(group, reproduce.Config(), Path("x"))
    )
    (lanes,) = (g for g in tables.load_groups(RESULTS) if g.row == "smnist-rows")
    assert lanes.records[0]["together"] == 4
    alone = reproduce.command(lanes, reproduce.Config(), Path("x"))
    assert {"--seed=0", "--devices=1"} <= set(alone)  # as each of them had


def test_every_row_of_ours_can_be_repeated():
    """What BENCHMARKS.md has by name: the programs, the baselines and the long-lag tasks."""
    known = reproduce.rows(RESULTS)
    page = (ROOT / "BENCHMARKS.md").read_text(encoding="utf-8")
    table = page.split("\n## all rows\n")[1].split("\n## ")[0]
    names = [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines()[5:]]
    assert len(names) > 40 and {n.split(",")[0].split(":")[0] for n in names if n} == set(known)
    for name, group in known.items():
        words = reproduce.command(group, reproduce.Config(), Path("x"))
        assert Path(words[1]).exists() and words[-1] == "--out=x", name


def test_linear_baselines_are_given_no_devices():
    known = reproduce.rows(RESULTS)
    words = reproduce.command(known["baseline-nbsvm-3"], reproduce.Config(), Path("x"))
    assert words[1].endswith("baselines.py") and not [w for w in words if "devices" in w]
    assert {"--ngrams=3", "--test", "--seed=0", "--data=tfds"} <= set(words)
    words = reproduce.command(known["baseline-bag-1"], reproduce.Config(), Path("x"))
    assert {"--model=bag", "--seeds=1", "--devices=1"} <= set(words)


def long_lag(seed, **metrics):
    return {
        "experiment": "long_lag", "seed": seed, "config": {"cells": "lstm,rnn-4", "seeds": 3},
        "metrics": metrics, "seconds": {"compile": 3.0, "train": 30.0, "eval": 3.0},
        "environment": {"devices": 2},
    }  # fmt: skip


def test_a_long_lag_task_is_held_against_its_seeds():
    numbers = {"lstm_solved_at": [100.0, 300.0, 200.0], "rnn-4_solved_at": [400, "Infinity", 400]}
    numbers |= {f"{c}_test_{n}": [1.0, 2.0, 3.0] for c in ("lstm", "rnn-4") for n in SCORES}
    record = long_lag(5, **numbers, lstm_updates=[0, 100])
    alone = long_lag_tables.apart(record)
    assert [one["seed"] for one in alone] == [5, 6, 7]
    assert alone[1]["metrics"] == {
        "lstm_solved_at": 300.0, "lstm_test_loss": 2.0, "lstm_test_wrong": 2.0,
        "rnn-4_solved_at": float("inf"), "rnn-4_test_loss": 2.0, "rnn-4_test_wrong": 2.0,
    }  # fmt: skip
    group = tables.Group("long-lag-x", "lstmjax", alone, ("long-lag-x-seeds5-7.json",) * 3)
    assert reproduce.seconds(group) == pytest.approx(24.0)  # a third of it, on one device of two
    now = {"lstm_solved_at": 900.0, "rnn-4_solved_at": float("inf"), "lstm_test_loss": 2.5}
    found = {m.name: m for m in reproduce.compared(group, {"seed": 6, "metrics": now})}
    assert found["lstm_solved_at"].interval == reproduce.prediction([100.0, 300.0, 200.0])
    assert {name: m.within for name, m in found.items()} == {
        "lstm_solved_at": False, "rnn-4_solved_at": True, "lstm_test_loss": True,
    }  # fmt: skip
    other = reproduce.compared(group, {"seed": 5, "metrics": now})
    assert {m.name: m.within for m in other}["rnn-4_solved_at"] is None  # a seed has none


def test_rows_by_the_names_of_files():
    names = ("long-lag-adding-1000-seeds0-4.json", "long-lag-order-3-seed0.json", "mine.json")
    rows = ["long-lag-adding-1000", "long-lag-order-3", "mine"]
    assert [long_lag_tables.row(name) for name in names] == rows


def test_what_saves_nothing_begins_again(tmp_path, monkeypatch):
    """It would refuse the folder that it had begun."""
    group, out = reproduce.rows(RESULTS)["long-lag-order"], tmp_path / "long-lag-order"
    out.mkdir()
    (out / "run.json").write_text("{}")
    (out / "metrics.jsonl").write_text("")
    record = json.loads((RESULTS / "long-lag-order-seed0.json").read_text())
    for name, value in record["metrics"].items():
        if name.endswith(("_solved_at", "_test_loss", "_test_wrong")):
            record["metrics"][name] = value[:1]
    record["config"]["seeds"] = 1
    (tmp_path / "made.json").write_text(json.dumps(record))
    child = "import os, shutil, sys; os.mkdir(sys.argv[1]); "
    child += "shutil.copy(sys.argv[2], sys.argv[1] + '/record.json')"
    words = [sys.executable, "-c", child, str(out), str(tmp_path / "made.json")]
    monkeypatch.setattr(reproduce, "command", lambda *_: words)
    found = reproduce.repeat(group, reproduce.Config(), out, float("inf"))
    assert os.listdir(out) == ["record.json"]
    assert all(one.now == one.recorded for one in reproduce.compared(group, found))


def test_two_do_not_repeat_into_one_folder(results, tmp_path):
    """The second would take away what the first one's run has begun."""
    (tmp_path / "a").mkdir()
    asked = {"row": "sin-tf1", "results": str(results), "out": None}
    (tmp_path / "a" / "config.json").write_text(json.dumps(asked))
    held = hold(tmp_path / "a")
    done = script("--resume", tmp_path / "a")
    said = f"error: {tmp_path}/a is in use by another process\n"
    assert (done.returncode, done.stderr) == (1, said)
    assert os.listdir(tmp_path / "a") == ["config.json"]
    held.close()


def test_a_single_recorded_seed_leaves_it_open(results, tmp_path):
    """Where the numbers are others, and no interval is there, this is said."""
    for seed in (1, 2):
        (results / f"sin-tf1-seed{seed}.json").unlink()
    path = results / "sin-tf1-seed0.json"
    record = json.loads(path.read_text())
    record["metrics"]["mse"] = 7.0
    path.write_text(json.dumps(record))
    out = tmp_path / "a"
    done = script("--row", "sin-tf1", "--seed", 0, "--results", results, "--out", out)
    assert done.returncode == 0, done.stderr
    assert "recorded: 7.0; further runs: no interval; nobody can tell\n" in done.stdout
    assert "none outside of its interval; nobody can tell: sin-tf1 mse" in done.stdout


def test_a_row_is_run_again(results, tmp_path):
    """Its numbers lie within; beside records of other numbers, the same run does not."""
    done = script("--row", "sin-tf1", "--results", results, "--out", tmp_path / "a")
    assert done.returncode == 0, done.stderr
    assert "none outside of its interval" in done.stdout
    summary = json.loads((tmp_path / "a" / "sin-tf1" / "reproduced.json").read_text())
    now = {metric["name"]: metric["now"] for metric in summary["results"]}
    assert now["source_loss"] == pytest.approx(20 * now["mse"], rel=1e-5)
    recorded = tables.load(RESULTS / "sin-tf1-seed0.json")["metrics"]["mse"]
    assert now["mse"] == pytest.approx(recorded, rel=1e-2)  # other processors, other last bits

    change(results, "sin-tf1", mse=lambda seed: 7.0 + seed / 1000)
    again = script("--resume", tmp_path / "a")  # the run is there: nothing is trained
    assert again.returncode == 1
    assert "outside: sin-tf1 mse; " in again.stdout
    assert again.stdout.count("OUTSIDE") == 1


def test_the_budget_leaves_out_what_does_not_fit(results, tmp_path):
    for name in ("sin-tf1", "sin-keras"):
        for seed in range(3):
            path = results / f"{name}-seed{seed}.json"
            record = json.loads(path.read_text())
            record["seconds"]["train"] = 1e5
            path.write_text(json.dumps(record))
    done = script("--all", "--budget", "30s", "--results", results, "--out", tmp_path / "a")
    assert done.returncode == 0, done.stderr
    assert "left out for time: sin-tf1, sin-keras; --resume" in done.stdout
    assert "0 of 2 rows repeated" in done.stdout
    assert os.listdir(tmp_path / "a") == ["config.json"]


WAITS = "import signal, sys, time\n{}\ntime.sleep(60)"
ENDS = {
    "saves itself": WAITS.format("signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))"),
    "has not begun": WAITS.format(""),
}


@pytest.mark.parametrize("kind", ENDS)
def test_a_run_that_is_cut_short_goes_on(kind, results, tmp_path, monkeypatch):
    group, out = reproduce.rows(results)["sin-tf1"], tmp_path / "a" / "sin-tf1"
    words = reproduce.command(group, reproduce.Config(), out)
    with monkeypatch.context() as patch:
        patch.setattr(reproduce, "command", lambda *_: [sys.executable, "-c", ENDS[kind]])
        assert reproduce.repeat(group, reproduce.Config(), out, 3.0) is None
    assert words[-1] == f"--out={out}" and "--updates=200" in words
    out.mkdir()
    (out / "run.json").write_text("{}")
    assert reproduce.command(group, reproduce.Config(), out)[2:] == [f"--resume={out}"]


@pytest.mark.parametrize("flag", ["out", "resume"])
def test_a_home_is_found_behind_an_equals_sign(flag, tmp_path, monkeypatch):
    """As in --out=~/a, which no shell expands: a run would have its folder elsewhere."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert reproduce.folder_of(reproduce.Config(**{flag: "~/a"})) == tmp_path / "a"


def test_a_run_that_fails_says_how(results, tmp_path, monkeypatch):
    group, fails = reproduce.rows(results)["sin-tf1"], "print(1); raise SystemExit('error: no')"
    monkeypatch.setattr(reproduce, "command", lambda *_: [sys.executable, "-c", fails])
    with pytest.raises(RunError, match="^sin-tf1 ended with exit code 1: error: no$"):
        reproduce.repeat(group, reproduce.Config(), tmp_path / "a", float("inf"))


def test_of_all_rows_one_that_fails_does_not_end_the_others(results, tmp_path, monkeypatch, capsys):
    own, folder = reproduce.command, tmp_path / "a"

    def command(group, *rest):
        fails = [sys.executable, "-c", "raise SystemExit('error: no such library')"]
        return fails if group.row == "sin-tf1" else own(group, *rest)

    monkeypatch.setattr(reproduce, "command", command)
    monkeypatch.setattr(reproduce.signal, "signal", lambda *_: None)  # this process keeps its own
    change(results, "sin-keras", mse=lambda seed: seed / 10, mse_advanced=lambda seed: seed / 10)
    asked = reproduce.Config(all=True, results=str(results), out=str(folder))
    assert reproduce.run(asked) == 1  # though what could be run lies within
    said = capsys.readouterr().out
    assert "sin-tf1 ended with exit code 1: error: no such library\n" in said
    assert f"failed: sin-tf1; --resume {folder} tries again\n" in said
    assert "1 of 2 rows repeated; none outside of its interval; " in said
    assert os.listdir(folder / "sin-keras") and not (folder / "sin-tf1").exists()
    with pytest.raises(RunError, match="^sin-tf1 ended with exit code 1"):
        reproduce.run(
            reproduce.Config(row="sin-tf1", results=str(results), out=str(tmp_path / "b"))
        )


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--row", "sin"], "--row: got sin, expected one of sin-tf1, sin-keras"),
        ([], "--row: got both or none of --row and --all, expected one of them"),
        (["--all", "--row", "sin-tf1"], "got both or none"),
        (["--all", "--budget", "2 days"], "--budget: got 2 days, expected a time such as 90s"),
        (["--all", "--budget", "0s"], "--budget: got 0s, expected a time"),
        (["--all", "--out", "full"], "exists and is not empty"),
        (["--all", "--seed", "-1"], "seed: got -1"),
    ],
)
def test_what_cannot_be_asked_for(flags, said, results, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("full").mkdir()
    Path("full/x").write_text("mine")
    monkeypatch.setattr(sys, "argv", ["reproduce.py", *flags, "--results", str(results)])
    with pytest.raises((ValueError, RunError)) as ended:
        reproduce.main()
    assert said in str(ended.value) and "\n" not in str(ended.value)
    assert Path("full/x").read_text() == "mine" and not Path("runs").exists()


STOPS = f"""
import signal, sys
from pathlib import Path
sys.path.insert(0, {str(ROOT / "experiments")!r})
import reproduce
child = "import signal, sys, time; from pathlib import Path; "
child += "signal.signal(signal.SIGTERM, lambda *_: (Path('saved').touch(), sys.exit(75))); "
child += "Path('begun').touch(); time.sleep(60)"
reproduce.command = lambda *_: [sys.executable, "-c", child]
reproduce.run(reproduce.Config(row="sin-tf1", results=sys.argv[1], out="a"))
"""


def test_sigterm_reaches_the_run_that_is_under_way(results, tmp_path):
    command, own = [sys.executable, "-c", STOPS, str(results)], {"PYTHONPATH": str(ROOT)}
    child = subprocess.Popen(command, cwd=tmp_path, env=os.environ | own)
    while not (tmp_path / "begun").exists():
        assert child.poll() is None
        time.sleep(0.05)
    child.terminate()
    assert child.wait(30) == cli.STOPPED
    assert (tmp_path / "saved").exists()


def test_a_folder_without_records_is_one_line(tmp_path):
    done = script("--all", "--results", tmp_path, "--out", tmp_path / "a")
    assert (done.returncode, done.stdout) == (1, "")
    said = f"error: --results: {tmp_path} holds no record of a row that can be repeated\n"
    assert done.stderr == said and not (tmp_path / "a").exists()


def test_a_wrong_row_is_one_line(results):
    done = script("--row", "sin", "--results", results)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --row: got sin, expected one of sin-tf1, sin-keras\n"


def test_rows_are_listed(results, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["reproduce.py", "--list", "--results", str(results)])
    with pytest.raises(SystemExit) as ended:
        reproduce.main()
    assert not ended.value.code
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["sin-tf1", "sin-keras"]
    assert all(line.endswith("3 seeds") for line in lines)
