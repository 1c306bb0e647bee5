"""experiments/fuzz.py: what fails is seen, whatever way it fails, and its inputs come again."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "experiments"))

from fuzzing import mutations, worker  # noqa: E402

from lstmjax.data import DataError  # noqa: E402
from lstmjax.records import RunError, validate  # noqa: E402


@pytest.fixture(scope="module")
def fuzz():
    spec = importlib.util.spec_from_file_location("fuzz", ROOT / "experiments" / "fuzz.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["fuzz"] = module  # where dataclasses look for their own module
    spec.loader.exec_module(module)
    return module


# ---- one reading --------------------------------------------------------------------------------


def raising(error):
    def read(folder):
        raise error

    return read


@pytest.mark.parametrize(
    ("read", "outcome", "words"),
    [
        (lambda folder: None, "accepted", ""),
        (raising(DataError("no data")), "refused", "error: no data"),
        (raising(RunError("two\nlines")), "refused", "error: two lines"),
        (raising(OSError(28, "No space", "x")), "refused", "error: x: No space"),
        (raising(KeyError("a")), "failed", "KeyError: 'a'"),
        (raising(ValueError("of another library")), "failed", "ValueError: of another library"),
        (raising(AssertionError("not valid")), "failed", "AssertionError: not valid"),
        (raising(MemoryError("too much")), "failed", "error: out of memory: too much"),
        (raising(KeyboardInterrupt()), "failed", "error: interrupted"),
        (raising(SystemExit(3)), "failed", ""),
        (raising(RecursionError("deep")), "failed", "RecursionError: deep"),
    ],
)
def test_how_a_reading_ends(read, outcome, words, tmp_path):
    result = worker.once(read, tmp_path)
    assert (result.outcome, result.words) == (outcome, words)


def test_an_error_of_ours_is_a_line(tmp_path):
    from lstmjax.data.dataset import check_int

    result = worker.once(lambda folder: check_int("count", "x", 1), tmp_path)
    assert result.outcome == "refused" and result.kind == "ValueError"
    assert result.words == "error: count: got 'x', expected an integer of 1 or more"


def test_a_slow_reading_fails(tmp_path):
    result = worker.once(lambda folder: sum(range(10**6)), tmp_path, limit=0.001)
    assert result.outcome == "failed" and result.words.startswith("took ")
    assert worker.once(lambda folder: None, tmp_path).seconds < 0.5


def test_memory_that_was_given_back_is_counted(tmp_path):
    result = worker.once(lambda folder: len(b"x" * 2**26), tmp_path)
    assert 60 < result.mebibytes < 100
    assert worker.once(lambda folder: None, tmp_path).mebibytes < 20


TAKES = """
import subprocess, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from fuzzing import worker

def read(folder):
    code = "b'x' * 2**29; sum(range(10**7))"
    subprocess.run([sys.executable, "-c", code], check=True)

for children in (0.0, 10_000.0):
    result = worker.once(read, Path("."), children=children)
    print(result.mebibytes, result.seconds)
"""


def test_what_a_process_takes_is_counted_with_its_reader():
    """Not before it has ended, and only what is more than valid files took.

    In a process of its own: a child's memory counts from what its parent had when it was started.
    """
    command = [sys.executable, "-c", TAKES, str(ROOT / "experiments")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    (took, seconds), (more, _) = (map(float, line.split()) for line in done.stdout.splitlines())
    assert 510 < took < 700 and seconds > 0.1
    assert more < 20


# ---- inputs -------------------------------------------------------------------------------------

SEEDS = [
    {"a.json": b'{"a": [1, 2, {"b": null}], "c": "text"}', "b.bin": bytes(range(200))},
    {"a.json": b'{"d": 0.5}', "b.bin": b"other" * 40},
]


def test_an_input_comes_again_by_its_number():
    reader = worker.Reader("x", lambda: SEEDS)
    made = [worker.case(reader, SEEDS, "x", 7, number) for number in range(60)]
    again = [worker.case(reader, SEEDS, "x", 7, number) for number in range(60)]
    assert made == again
    other = [worker.case(reader, SEEDS, "x", 8, number) for number in range(60)]
    assert made != other
    changed = [files for files in made if files not in SEEDS]
    assert len(changed) > 50
    assert SEEDS[0]["b.bin"] == bytes(range(200))  # the seeds stay as they are
    assert any("a.json" not in files for files in made)


def test_a_checksum_is_put_right_half_of_the_time():
    reader = worker.Reader("x", lambda: SEEDS, seal=lambda files: {"sealed": b""})
    made = [worker.case(reader, SEEDS, "x", 0, number) for number in range(200)]
    assert 70 < sum(files == {"sealed": b""} for files in made) < 130


def test_changes_of_formats_stay_within_them():
    """What is changed within a format is still of that format, most of the time."""
    parsed = 0
    for number in range(100):
        content = mutations.changed_json(Random(number), SEEDS[0]["a.json"])
        try:
            parsed += json.loads(content) != json.loads(SEEDS[0]["a.json"])
        except (ValueError, RecursionError):
            pass
    assert parsed > 60


# ---- processes ----------------------------------------------------------------------------------

ANSWERS = """
import json, os, sys, time
def say(*words):
    print(json.dumps(words), flush=True)
start, stop = {start}, {stop}
say("ready")
for number in range(start, stop):
    say("begun", number)
    if number == 2:
        os.abort()
    if number == 4:
        time.sleep(60)
    while number == 6:
        pass
    say("ended", number, "refused" if number % 2 else "accepted", "DataError", "x", 0.25, 3.5)
say("done")
"""


def test_crashes_and_hangs_are_seen_and_the_rest_is_read(fuzz, monkeypatch):
    def command(config, reader, start, stop):
        return [sys.executable, "-c", ANSWERS.format(start=start, stop=stop)]

    monkeypatch.setattr(fuzz, "command", command)
    monkeypatch.setattr(fuzz, "PATIENCE", 10)
    monkeypatch.setattr(fuzz, "TICK", 0.1)
    config = fuzz.Config(inputs=8, each=3, seconds=0.25)
    with fuzz.tqdm(disable=True) as bar:
        tally = fuzz.read_all(config, "idx", bar)
    assert tally.outcomes == {"accepted": 1, "refused": 4, "failed": 3}
    assert tally.kinds == {"DataError": 4}
    hung = "did not return"
    assert tally.failures == [(2, "crashed with -6"), (4, hung), (6, hung)]
    assert (tally.slowest, tally.peak) == (0.25, 3.5)
    metrics = tally.metrics("idx")
    assert metrics["idx_inputs"] == 8 and metrics["idx_refused_DataError"] == 4
    line = "| gzipped idx files of MNIST | 8 | 1 | 4 | 3 | 0.25 s | 4 MiB |"
    assert line in fuzz.table(metrics).splitlines()


def test_a_process_that_does_not_start_is_one_line(fuzz, monkeypatch):
    monkeypatch.setattr(fuzz, "command", lambda *asked: [sys.executable, "-c", "exit(3)"])
    with pytest.raises(RunError, match="the process for idx ended before it began: 3"):
        fuzz.read_some(fuzz.Config(), "idx", 0, 9, fuzz.Tally())


def run(*flags, cwd):
    return subprocess.run(
        [sys.executable, str(ROOT / "experiments" / "fuzz.py"), *flags],
        cwd=cwd, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def test_a_run_leaves_its_figures(fuzz, tmp_path):
    done = run("--reader", "idx", "--inputs", "60", "--each", "40", "--out", "here", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "0 of 60 inputs failed; record in here"
    record = json.loads((tmp_path / "here" / "record.json").read_text())
    assert validate(record) == []
    metrics = record["metrics"]
    assert metrics["idx_inputs"] == metrics["idx_accepted"] + metrics["idx_refused"] == 60
    assert metrics["idx_refused_DataError"] == metrics["idx_refused"] > 20
    assert (tmp_path / "here" / "table.md").read_text() == fuzz.table(metrics) + "\n"
    assert not (tmp_path / "here" / "failures").exists()


def test_the_readers_are_those_of_the_flag(fuzz):
    from typing import get_args, get_type_hints

    assert list(get_args(get_type_hints(fuzz.Config)["reader"])) == ["all", *worker.READERS]


def test_the_figures_in_the_docs_are_those_of_the_record(fuzz):
    """A record for each reader, and the numbers of all of them in one table."""
    metrics = {}
    for path in sorted((ROOT / "experiments" / "results").glob("fuzz-*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        assert validate(record) == [] and not metrics.keys() & record["metrics"].keys()
        metrics |= record["metrics"]
    text = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    assert text.count("| reader | inputs |") == 1 and fuzz.table(metrics) in text
    read = [name for name in worker.READERS if f"{name}_inputs" in metrics]
    assert all(metrics[f"{name}_inputs"] >= 10_000 for name in read)
    assert not any(metrics[f"{name}_failed"] for name in read)
    without = [entry.title for name, entry in worker.READERS.items() if name not in read]
    said = "" if not without else f"Not read so often yet: {', '.join(without)}."
    assert ("Not read so often yet" in text) == bool(without) and said in text
