"""A run's folder: what is written into it, when, and what is left where that fails."""

import errno
import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure
from tiny_records import DATASET, SECONDS, SHA, Config, finish

from lstmjax import folders, records
from lstmjax.records import Run, RunError

ROOT = Path(__file__).resolve().parents[1]


def events(folder):
    """Every event of the TensorBoard file, read as the TFRecord format says."""
    from tensorboardX.proto.event_pb2 import Event

    (file,) = folder.glob("events.out.tfevents.*")
    data, found = file.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        record = data[12 : 12 + length]
        assert struct.unpack("<I", data[8:12])[0] == masked_crc32c(data[:8])
        assert struct.unpack("<I", data[12 + length : 16 + length])[0] == masked_crc32c(record)
        found.append(Event.FromString(record))
        data = data[16 + length :]
    return found


def masked_crc32c(data):
    """CRC-32C (Castagnoli) bit by bit, masked as TFRecord masks it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    return ((crc >> 15) + (crc << 17 & 0xFFFFFFFF) + 0xA282EAD8) % 2**32


def test_a_whole_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(ROOT / "experiments" / "sin.py"), "--out", "a"])
    out = str(tmp_path / "a")
    with Run.create("sin", Config(out=out), out=out) as run:
        assert run.path == tmp_path / "a" and not (run.path / "record.json").exists()
        assert json.loads((run.path / "config.json").read_text())["sizes"] == [4, 5]
        run.log(1, loss=jnp.float32(0.5), count=np.int64(7))
        run.log(20, loss=float("nan"), bound=float("-inf"), half=jnp.bfloat16(1.5))
        figure = Figure(figsize=(2, 1), dpi=50)
        figure.subplots().plot([1, 3, 2])
        assert run.figure("fit", figure, step=20) == run.path / "fit.png"
        record = finish(run, row="sin-tf1", metrics={"mse": jnp.float32(0.25), "es": [1, np.nan]})

    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [
        {"step": 1, "loss": 0.5, "count": 7},
        {"step": 20, "loss": "nan", "bound": "-inf", "half": 1.5},
    ]
    first, *scalars, image = events(run.path)
    assert first.file_version == "brain.Event:2"
    read = [(e.step, {v.tag: v.simple_value for v in e.summary.value}) for e in scalars]
    assert read[0] == (1, {"loss": 0.5, "count": 7.0}) and read[1][0] == 20
    assert np.isnan(read[1][1]["loss"]) and read[1][1]["half"] == 1.5
    png = (run.path / "fit.png").read_bytes()
    (drawn,) = image.summary.value
    assert drawn.tag == "fit" and drawn.image.encoded_image_string == png
    assert (drawn.image.width, drawn.image.height) == (100, 50)

    assert json.loads((run.path / "record.json").read_text()) == record
    assert records.validate(record) == []
    assert record["metrics"] == {"mse": 0.25, "es": [1, "nan"]} and record["seed"] == 3
    assert record["dataset"] == DATASET and record["seconds"] == SECONDS
    assert record["environment"]["devices"] == 2 and record["params_sha256"] == SHA
    assert record["config"]["out"] == "a" and str(tmp_path) not in json.dumps(record)
    assert record["row"] == "sin-tf1" and record["experiment"] == "sin"
    assert record["first_steps"] == {"name": "loss", "steps": [1, 20], "loss": [0.5, "nan"]}
    assert sorted(path.name.split(".")[0] for path in run.path.iterdir()) == [
        "config", "events", "fit", "metrics", "record", "run",
    ]  # fmt: skip


def test_dataset_may_be_an_object(tmp_path):
    class Data(NamedTuple):
        name: str
        source: str
        sha256: str
        splits: dict

    with Run.create("sin", {}, out=str(tmp_path / "a")) as run:
        assert finish(run, dataset=Data("mnist", "tfds", SHA, {}))["dataset"] == {
            "name": "mnist", "source": "tfds", "sha256": SHA,
        }  # fmt: skip


def test_default_folders_never_meet(tmp_path, monkeypatch):
    class Clock:
        @staticmethod
        def now(*zone):
            return datetime_(2026, 1, 2, 3, 4, 5)

    from datetime import datetime as datetime_

    monkeypatch.setattr(folders, "datetime", Clock)
    paths = []
    for i in range(3):
        with Run.create("imdb", {"n": i}, root=tmp_path / "runs") as run:
            paths.append(run.path)
    stamp = "imdb-20260102-030405"
    assert [path.name for path in paths] == [stamp, f"{stamp}-2", f"{stamp}-3"]
    assert [json.loads((path / "config.json").read_text())["n"] for path in paths] == [0, 1, 2]


def test_out_is_never_overwritten(tmp_path):
    (tmp_path / "empty").mkdir()
    with Run.create("sin", {}, out=str(tmp_path / "empty")) as run:
        assert run.path == tmp_path / "empty"
    with pytest.raises(RunError, match=r"empty exists and is not empty: choose another --out"):
        Run.create("sin", {"other": 1}, out=str(tmp_path / "empty"))
    assert json.loads((tmp_path / "empty" / "config.json").read_text()) == {}
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RunError, match="file is a file, expected an empty folder or a new one"):
        Run.create("sin", {}, out=str(tmp_path / "file"))
    with pytest.raises(RunError, match="cannot make the folder .*file.*: Not a directory"):
        Run.create("sin", {}, out=str(tmp_path / "file" / "below"))
    assert (tmp_path / "file").read_text() == "mine"


def test_an_exception_leaves_what_was_logged_and_no_record(tmp_path):
    with pytest.raises(ZeroDivisionError), Run.create("sin", {}, out=str(tmp_path / "a")) as run:
        run.log(1, loss=2.0)
        1 / 0  # noqa: B018
    assert (run.path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 2.0}\n'
    assert not (run.path / "record.json").exists()


FULL_DISK = """
import resource
from pathlib import Path
from lstmjax import folders, records

def attempt(write):
    try:
        write()
    except records.RunError as error:
        print(error)

def log():
    for step in range(1000):
        run.log(step, loss=0.123456789)

run = records.Run.create("sin", {}, out="a")
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # files stop growing, as on a full disk
attempt(log)
attempt(lambda: records.write_file("kept.json", bytes(5000)))
attempt(lambda: run.finish(
    dataset={"name": "sin", "source": "generated", "sha256": "0" * 64}, seed=0, devices=1,
    metrics={"many": [0.5] * 1000}, seconds={"compile": 1, "train": 1, "eval": 1},
    params_sha256="0" * 64,
))
"""


def test_a_full_disk_leaves_whole_lines_and_whole_files(tmp_path):
    """In a process of its own, so that nothing of pytest's meets the limit."""
    (tmp_path / "kept.json").write_text("old")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", FULL_DISK],
        cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "cannot write to a: File too large",
        "cannot write kept.json: File too large",
        "cannot write a/record.json: File too large",
    ]
    lines = (tmp_path / "a" / "metrics.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) > 2 and all(line.endswith("}\n") for line in lines)
    assert [json.loads(line)["step"] for line in lines] == list(range(len(lines)))
    assert len(events(tmp_path / "a")) > 2  # whole ones: their checksums are right
    assert (tmp_path / "kept.json").read_text() == "old"
    assert sorted(path.name.split(".")[0] for path in (tmp_path / "a").iterdir()) == [
        "config", "events", "metrics", "run",
    ]  # fmt: skip


def test_values_that_are_no_numbers_are_refused(tmp_path):
    with Run.create("sin", {}, out=str(tmp_path / "a")) as run:
        with pytest.raises(ValueError, match=r"loss: got array.* expected one number"):
            run.log(1, loss=np.zeros(2))
        with pytest.raises(ValueError, match=r"loss: got 'x', expected one number"):
            run.log(1, loss="x")
        with pytest.raises(ValueError, match=r"config.a\[1\]: got object, expected numbers"):
            Run.create("sin", {"a": [1, object()]}, out=str(tmp_path / "b"))
        with pytest.raises(ValueError, match="config: got list, expected a dataclass or a mapping"):
            Run.create("sin", [1], out=str(tmp_path / "b"))
        assert not (tmp_path / "b").exists()
        with pytest.raises(ValueError, match="record: dataset.source: got 'internet', expected"):
            finish(run, dataset=DATASET | {"source": "internet"})
        with pytest.raises(
            ValueError, match=r"record.metrics.a\[1\]: got object, expected numbers"
        ):
            finish(run, metrics={"a": [1, object()]})
        with pytest.raises(ValueError, match=r"record: metrics.a\[1\]: got 'high', expected a num"):
            finish(run, metrics={"a": [1, "high"]})
    assert not (run.path / "record.json").exists()


def test_a_record_says_whether_bits_were_asked_for(tmp_path):
    for asked in (False, True):
        with Run.create("sin", {"deterministic": asked}, out=str(tmp_path / str(asked))) as run:
            assert finish(run)["environment"]["deterministic"] is asked
    with Run.create("sin", {}, out=str(tmp_path / "old")) as run:
        assert "deterministic" not in finish(run)["environment"]


def test_a_record_holds_the_first_losses_of_the_file(tmp_path):
    """Also those that another process has logged, before the run was taken up again."""
    with Run.create("imdb", {}, out=str(tmp_path / "a")) as run:
        for step in range(25):
            run.log(step, epoch=1, loss=1 / (step + 1), train_loss=7)
        run.log(25, validation_loss=3)
        record = finish(run)
    losses = [1 / (step + 1) for step in range(10)]
    assert record["first_steps"] == {"name": "loss", "steps": list(range(10)), "loss": losses}
    with Run.create("gpu", {}, out=str(tmp_path / "b")) as run:
        run.log(3, microseconds=2.5)
        assert "first_steps" not in finish(run)


def test_what_is_in_the_files_is_not_lost_by_two_resumptions(tmp_path):
    """The second time from a checkpoint before which the resumed run had logged nothing."""
    with Run.create("toy", {}, out=str(tmp_path / "a")) as run:
        for step in range(3):
            run.log(step, loss=step / 2)
        first = run.progress()
    folder = tmp_path / "a"
    written = [folder / "metrics.jsonl", *folder.glob("events.*")]
    sizes = {path.name: path.stat().st_size for path in written}
    with Run.reopen("toy", folder) as run:
        run.restore(first)
        second = run.progress()
    assert second == first == {"sizes": sizes}
    with Run.reopen("toy", folder) as run:
        run.restore(second)
        run.log(3, loss=1.5)
        assert run.progress()["sizes"]["metrics.jsonl"] > first["sizes"]["metrics.jsonl"]
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2, 3]


def test_a_run_ended_before_it_is_described_leaves_its_folder_free(tmp_path, monkeypatch):
    """To find the versions takes a while, and starts other processes."""

    def killed():
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(records, "_versions", killed)
        with pytest.raises(KeyboardInterrupt):
            Run.create("toy", {}, out=str(tmp_path / "a"))
    with Run.create("toy", {}, out=str(tmp_path / "a")) as run:
        assert sorted(os.listdir(run.path)) == ["config.json", "run.json"]


def test_one_of_two_processes_gets_a_folder(tmp_path, monkeypatch):
    """Both have found it empty."""
    monkeypatch.setattr(records, "empty_folder", lambda path: path)
    (tmp_path / "a").mkdir()
    with Run.create("toy", {"seed": 1}, out=str(tmp_path / "a")) as run:
        with pytest.raises(RunError, match="^--out: .*a is in use by another process$"):
            Run.create("toy", {"seed": 2}, out=str(tmp_path / "a"))
        assert json.loads((run.path / "config.json").read_text()) == {"seed": 1}
        assert sorted(os.listdir(run.path)) == ["config.json", "run.json"]


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    path, seen = tmp_path / "a", []

    def fsync(number):
        seen.append((os.fstat(number).st_size, path.exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    records.write_file(path, b"four")
    assert seen == [(4, False)] and path.read_bytes() == b"four"
    with Run.create("toy", {}, out=str(tmp_path / "run")) as run:
        run.log(1, loss=0.5)
        del seen[:]
        sizes = run.progress()["sizes"]
    assert [size for size, _ in seen] == list(sizes.values()) and len(sizes) == 2


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EIO])
def test_a_disk_that_does_not_answer(tmp_path, monkeypatch, number):
    """Where files cannot be synchronised nothing is amiss; where that fails it is told."""

    def fsync(_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    if number == errno.EINVAL:
        records.write_file(tmp_path / "a", b"four")
    else:
        with pytest.raises(RunError, match="cannot write .*a: Input/output error"):
            records.write_file(tmp_path / "a", b"four")
    assert os.listdir(tmp_path) == ["a"] * (number == errno.EINVAL)


def test_made_up_data_belong_to_no_row(tmp_path):
    for source in ("tfds", "offline"):
        out = str(tmp_path / source)
        with Run.create("sin", Config(out=out), out=out) as run:
            record = finish(run, row="imdb-tf2", dataset=DATASET | {"source": source})
        assert record.get("row") == ("imdb-tf2" if source == "tfds" else None)
