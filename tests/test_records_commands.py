"""The commands over records as a user types them, and what `collect` does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_records import Config, fill_benchmark_folder, finish

from lstmjax import results
from lstmjax.records import Run, RunError

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = "collect, table, verify, compare"


@pytest.fixture
def benchmark_folder(tmp_path):
    return fill_benchmark_folder(tmp_path)


def test_collect_copies_all_or_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runs = []
    for seed, row in ((0, "sin-tf1"), (1, None)):
        with Run.create("sin", Config(seed=seed), out=f"runs/{seed}") as run:
            finish(run, seed=seed, row=row)
        runs.append(Path(f"runs/{seed}"))
    one, two = results.collect(results.Collect((runs[0], runs[1])))
    assert (one.name, two.name) == ("sin-tf1-seed0.json", "sin-tf1-no-row-seed1.json")
    assert one.read_bytes() == (runs[0] / "record.json").read_bytes()
    assert one.parent == Path("experiments/results")
    with pytest.raises(RunError, match="sin-tf1-no-row-seed1.json exists: --replace overwr"):
        results.collect(results.Collect((runs[1],)))
    (named,) = results.collect(results.Collect((runs[1],), name="long run"))
    assert named.name == "sin-long-run-seed1.json"
    record = (runs[1] / "record.json").read_text()
    (runs[1] / "record.json").write_text(json.dumps(json.loads(record) | {"config": {"seeds": 8}}))
    (several,) = results.collect(results.Collect((runs[1],), name="several"))
    assert several.name == "sin-several-seeds1-8.json"
    (runs[1] / "record.json").write_text(record)
    two.write_text("changed")
    results.collect(results.Collect((runs[1],), replace=True))
    assert two.read_bytes() == (runs[1] / "record.json").read_bytes()
    into = tmp_path / "elsewhere"
    with pytest.raises(RunError, match="another of these runs is to be"):
        results.collect(results.Collect((runs[0], runs[0]), into=into))
    with pytest.raises(RunError, match="cannot read .*record.json: No such file"):
        results.collect(results.Collect((runs[0], Path("runs/9")), into=into))
    assert not into.exists()
    assert "sin-tf1-seed0.json" in capsys.readouterr().out


def test_a_rows_record_gives_way_to_one_of_that_row_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, row in (("row", "sin-tf1"), ("again", "sin-tf1"), ("none", None), ("k", "sin-keras")):
        with Run.create("sin", Config(), out=f"runs/{name}") as run:
            finish(run, row=row, metrics={"mse": len(name) / 10})
    (kept,) = results.collect(results.Collect((Path("runs/row"),), name="mine"))
    before = kept.read_bytes()
    for run, now in (("none", "no row"), ("k", "sin-keras")):
        with pytest.raises(RunError) as error:
            results.collect(results.Collect((Path(f"runs/{run}"),), name="mine", replace=True))
        complaint = f"got a run of {now}, expected one of sin-tf1: {kept}"
        assert str(error.value) == f"runs/{run}: {complaint}"
        assert kept.read_bytes() == before
    again = Path("runs/again/record.json").read_bytes()
    results.collect(results.Collect((Path("runs/again"),), name="mine", replace=True))
    assert kept.read_bytes() == again != before
    # One of no row may be replaced by any, as before.
    loose = Path("experiments/results/sin-tf1-seed3.json")
    loose.write_bytes(Path("runs/none/record.json").read_bytes())
    (target,) = results.collect(results.Collect((Path("runs/row"),), replace=True))
    assert target == loose and loose.read_bytes() == before


@pytest.mark.parametrize("check", [[], ["--check"]])
@pytest.mark.parametrize(
    ("folder", "complaint"),
    [
        ("nowhere", "cannot read nowhere: No such file or directory"),
        ("README.md", "cannot read README.md: Not a directory"),
        ("locked", "cannot read locked: Permission denied"),
        ("empty", "empty: got no record, expected a folder of records"),
    ],
)
def test_without_records_nothing_is_written(
    folder, complaint, check, benchmark_folder, monkeypatch, capsys
):
    monkeypatch.chdir(benchmark_folder)
    Path("BENCHMARKS.md").write_text("all numbers")
    Path("empty").mkdir()
    Path("empty", "notes.txt").write_text("")
    readme, iterdir = Path("README.md").read_text(), Path.iterdir

    def refusing(path):  # root may read everything
        if path.name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return iterdir(path)

    monkeypatch.setattr(Path, "iterdir", refusing)
    with pytest.raises(SystemExit) as stop:
        results.command(["table", "--results", folder, *check])
    assert (stop.value.code, capsys.readouterr().err) == (1, f"error: {complaint}\n")
    assert Path("BENCHMARKS.md").read_text() == "all numbers"
    assert Path("README.md").read_text() == readme


def test_the_command_line(benchmark_folder):
    def command(*arguments):
        return subprocess.run(
            [sys.executable, "-W", "error", "-m", "lstmjax.records", *arguments],
            cwd=benchmark_folder, capture_output=True, text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip

    checked = command("table", "--check")
    assert checked.returncode == 1
    assert checked.stderr.splitlines()[-1].startswith("error: BENCHMARKS.md is not what the")
    assert command("table").returncode == 0
    assert "0.8353 ± 0.0040" in (benchmark_folder / "BENCHMARKS.md").read_text()
    wrong = command("tabel")
    assert (wrong.returncode, wrong.stderr) == (
        2, f"error: command: got tabel, expected one of {COMMANDS}\n",
    )  # fmt: skip


def test_help_names_every_command(capsys):
    results.command(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("usage: python -m lstmjax.records {collect,table,verify,compare} ")
    assert [line.split()[0] for line in lines[1:]] == COMMANDS.split(", ")


@pytest.mark.parametrize(
    "argv, complaint",
    [
        (["table", "--chek"], "error: --chek: no such flag, did you mean --check?"),
        (["collect"], "error: runs: got none, expected at least one run folder"),
        (["collect", "nowhere"], "error: cannot read nowhere/record.json: No such file"),
        ([], f"error: command: got nothing, expected one of {COMMANDS}"),
        (["verify"], "error: Missing from "),
        (["verify", "nowhere"], "error: cannot read nowhere: No such file or directory"),
        (["verify", "nowhere", "--step", "1"], "error: --step: no such flag, did you mean --steps"),
        (["compare", "nowhere"], "error: Missing from "),
        (["compare", "nowhere", "here"], "error: cannot read nowhere: No such file or directory"),
    ],
)
def test_wrong_commands_get_one_line(argv, complaint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        results.command(argv)
    error = capsys.readouterr().err
    assert stop.value.code in (1, 2) and error.startswith(complaint) and error.count("\n") == 1
    # To these 1 means "different".
    assert stop.value.code == 2 or argv[0] == "collect"
