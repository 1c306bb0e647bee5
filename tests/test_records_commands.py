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
    assert (one.name, two.name) == ("sin-tf1-seed0.json", "sin-tf1-seed1.json")
    assert one.read_bytes() == (runs[0] / "record.json").read_bytes()
    assert one.parent == Path("experiments/results")
    with pytest.raises(RunError, match="sin-tf1-seed1.json exists: --replace overwrites it"):
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
