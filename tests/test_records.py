"""A run's folder, its record, and the tables made from records."""

import dataclasses
import hashlib
import json
import os
import re
import shutil
import statistics
import struct
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure

from lstmjax import provenance, records, results, tables
from lstmjax.records import Run, RunError

ROOT = Path(__file__).resolve().parents[1]
SHA = "0123456789abcdef" * 4
DATASET = {"name": "sin", "source": "generated", "sha256": SHA}
SECONDS = {"compile": 1.5, "train": 2.25, "eval": 0.5}


@dataclasses.dataclass(frozen=True)
class Config:
    preset: str = "tf1"
    seed: int = 3
    sizes: tuple[int, ...] = (4, 5)
    learning_rate: float = 0.006
    out: str | None = None


class Weights(NamedTuple):
    w: object
    b: object
    peephole: object = None


def finish(run, **changes):
    values = {"dataset": DATASET, "metrics": {"mse": 0.25}, "seconds": SECONDS, "seed": 3}
    return run.finish(params_sha256=SHA, devices=2, **values | changes)


# ---- hashes -------------------------------------------------------------------------------------


def test_hash_of_parameters_is_what_it_says():
    """Against the definition written out by hand: path, shape, dtype, little-endian bytes."""
    w = np.arange(6, dtype=np.float32).reshape(2, 3) - 1.5
    expected = hashlib.sha256()
    expected.update(b'[["a", 0], [], "int32"]' + (7).to_bytes(4, "little"))
    expected.update(b'[["w"], [2, 3], "float32"]' + struct.pack("<6f", *w.reshape(-1)))
    tree = {"w": jnp.asarray(w), "a": [np.int32(7), None], "n": None}
    assert records.params_sha256(tree) == expected.hexdigest()


def test_hash_forgets_containers_order_and_memory_layout():
    w, b = np.random.default_rng(0).normal(size=(3, 4)), np.float32([1, -2])
    base = records.params_sha256({"w": w, "b": b})
    assert base == records.params_sha256({"b": b, "w": w})
    assert base == records.params_sha256(Weights(w, b))
    assert base == records.params_sha256({"w": np.asfortranarray(w), "b": b})
    assert base == records.params_sha256({"w": w.astype(">f8"), "b": b.astype(">f4")})
    assert base == records.params_sha256({"w": w, "b": jnp.asarray(b)})


def test_hash_sees_every_other_change():
    w = np.arange(6, dtype=np.float32)
    changed = w.copy()
    changed[3] = np.nextafter(changed[3], np.float32(9))
    trees = [
        {"w": w}, {"v": w}, {"w": w.reshape(2, 3)}, {"w": w.reshape(3, 2)}, {"w": w.astype(float)},
        {"w": changed}, {"w": w.view(np.int32)}, {"w": {"w": w}}, {"w": [w]}, {"w/w": w},
        {"w": w, "x": w}, {"w": jnp.asarray(w, jnp.bfloat16)}, {"w": np.asarray(w, np.float16)},
    ]  # fmt: skip
    assert len({records.params_sha256(tree) for tree in trees}) == len(trees)


def test_hash_of_keys_and_of_sharded_parameters():
    key = jax.random.key(5)
    assert records.params_sha256({"key": key}) == records.params_sha256(
        {"key": jax.random.key_data(key)}
    )
    w = jnp.arange(8.0)
    mesh = jax.make_mesh((4,), ("batch",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("batch"))
    assert records.params_sha256([jax.device_put(w, sharding)]) == records.params_sha256([w])
    with pytest.raises(ValueError, match=r"tree: got str at \['name'\], expected numeric"):
        records.params_sha256({"name": "lstm"})


# ---- the surroundings ---------------------------------------------------------------------------


def test_environment_has_every_field(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_a=1 --xla_dump_to=/somewhere/dump")
    found = records.environment()
    assert found["jax"] == jax.__version__ and found["numpy"] == np.__version__
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["devices"] == len(jax.devices()) == 4
    assert found["XLA_FLAGS"] == "--xla_a=1 --xla_dump_to=dump"
    assert found["device"] and found["platform"] == "cpu" and found["cores"] >= 1
    for package in ("jaxlib", "flax", "optax"):
        assert found[package] == provenance.version(package) is not None
    assert provenance.version("no-such-distribution") is None
    assert records.environment(jax.devices()[:3])["devices"] == 3
    assert records.environment(2)["devices"] == 2
    assert {"git commit", "dirty"} <= set(found)


def test_commit_and_dirty_flag(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
        done = subprocess.run(["git", *identity, *arguments], cwd=tmp_path, capture_output=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.decode().strip()

    def write(name, text):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    monkeypatch.setattr(provenance, "ROOT", tmp_path.resolve())
    nothing = {"git commit": None, "dirty": None}
    assert provenance.git_state() == nothing  # no checkout
    git("init", "-q")
    assert provenance.git_state() == nothing  # no commit
    write("lstmjax/lstm.py", "a")
    write("README.md", "a")
    write("pyproject.toml", "a")
    git("add", ".")
    git("commit", "-q", "-m", "one")
    clean = {"git commit": git("rev-parse", "HEAD"), "dirty": False}
    assert provenance.git_state() == clean and len(clean["git commit"]) == 40
    write("notes.txt", "an untracked file that is no code")
    write("notes.py", "an untracked script outside the package")
    write("experiments/results/sin-seed0.json", "{}")
    write("README.md", "a new table")
    assert provenance.git_state() == clean
    write("experiments/new.py", "an untracked script")
    assert provenance.git_state() == clean | {"dirty": True}
    (tmp_path / "experiments/new.py").unlink()
    write("lstmjax/lstm.py", "b")
    assert provenance.git_state() == clean | {"dirty": True}
    write("lstmjax/lstm.py", "a")
    assert provenance.git_state() == clean
    write("pyproject.toml", "b")
    assert provenance.git_state() == clean | {"dirty": True}
    # Installed inside somebody else's checkout: their commit is not ours.
    monkeypatch.setattr(provenance, "ROOT", (tmp_path / "lstmjax").resolve())
    assert provenance.git_state() == nothing
    monkeypatch.setenv("GIT_DIR", str(tmp_path / ".git"))
    assert provenance.git_state() == nothing
    monkeypatch.delenv("GIT_DIR")
    monkeypatch.setattr(provenance, "ROOT", tmp_path.resolve())
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.git_state() == nothing  # no git at all


def test_command_line_holds_no_folder_of_this_machine(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    script = str(ROOT / "experiments" / "imdb.py")
    argv = [script, "--cell", "gru", "--out", "/far/away/run 1", f"--data={tmp_path}/d", "a b"]
    expected = "python experiments/imdb.py --cell gru --out 'run 1' --data=d 'a b'"
    assert records.command_line(argv) == expected
    assert records.command_line([f"{tmp_path}/own/script.py"]) == "python own/script.py"
    assert records.command_line(["/elsewhere/script.py", "~/x"]) == "python script.py x"


# ---- the run folder -----------------------------------------------------------------------------


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
    assert sorted(path.name.split(".")[0] for path in run.path.iterdir()) == [
        "config", "events", "fit", "metrics", "record",
    ]  # fmt: skip


def test_dataset_may_be_an_object(tmp_path):
    class Data(NamedTuple):
        name: str
        source: str
        sha256: str
        splits: dict

    run = Run.create("sin", {}, out=str(tmp_path / "a"))
    assert finish(run, dataset=Data("mnist", "tfds", SHA, {}))["dataset"] == {
        "name": "mnist", "source": "tfds", "sha256": SHA,
    }  # fmt: skip


def test_default_folders_never_meet(tmp_path, monkeypatch):
    class Clock:
        @staticmethod
        def now(*zone):
            return datetime_(2026, 1, 2, 3, 4, 5)

    from datetime import datetime as datetime_

    monkeypatch.setattr(records, "datetime", Clock)
    paths = [Run.create("imdb", {"n": i}, root=tmp_path / "runs").path for i in range(3)]
    stamp = "imdb-20260102-030405"
    assert [path.name for path in paths] == [stamp, f"{stamp}-2", f"{stamp}-3"]
    assert [json.loads((path / "config.json").read_text())["n"] for path in paths] == [0, 1, 2]


def test_out_is_never_overwritten(tmp_path):
    (tmp_path / "empty").mkdir()
    assert Run.create("sin", {}, out=str(tmp_path / "empty")).path == tmp_path / "empty"
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
from lstmjax import records

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
        "config", "events", "metrics",
    ]  # fmt: skip


def test_values_that_are_no_numbers_are_refused(tmp_path):
    run = Run.create("sin", {}, out=str(tmp_path / "a"))
    with pytest.raises(ValueError, match=r"loss: got array.* expected one number"):
        run.log(1, loss=np.zeros(2))
    with pytest.raises(ValueError, match=r"loss: got 'x', expected one number"):
        run.log(1, loss="x")
    with pytest.raises(ValueError, match=r"config.a\[1\]: got object, expected numbers"):
        Run.create("sin", {"a": [1, object()]}, out=str(tmp_path / "b"))
    with pytest.raises(ValueError, match="config: got list, expected a dataclass or a mapping"):
        Run.create("sin", [1], out=str(tmp_path / "b"))
    assert not (tmp_path / "b").exists()
    with pytest.raises(ValueError, match="record: dataset: got .*expected name and source"):
        finish(run, dataset=DATASET | {"source": "internet"})
    assert not (run.path / "record.json").exists()


# ---- the record's form --------------------------------------------------------------------------


@pytest.fixture
def record(tmp_path):
    return finish(Run.create("sin", Config(), out=str(tmp_path / "valid")), row="sin-tf1")


@pytest.mark.parametrize(
    "key, value, complaint",
    [
        ("command", 3, "command: got 3, expected text"),
        ("config", [1], "config: got [1], expected an object"),
        ("dataset", {"name": "x"}, "dataset: got {'name': 'x'}, expected name and source"),
        ("dataset", DATASET | {"sha256": "abc"}, "dataset: got no sha256, expected 64"),
        ("metrics", {}, "metrics: got {}, expected numbers or lists of numbers"),
        ("metrics", {"a": "high"}, "metrics: got {'a': 'high'}, expected numbers"),
        ("metrics", {"a": True}, "metrics: got {'a': True}, expected numbers"),
        ("metrics", {"a": []}, "metrics: got {'a': []}, expected numbers"),
        ("seconds", {"train": 1, "eval": 1}, "seconds: got"),
        ("seconds", SECONDS | {"eval": -1}, "seconds: got"),
        ("params_sha256", SHA.upper(), "params_sha256: got"),
        ("seed", 1.5, "seed: got 1.5, expected an integer"),
        ("seed", True, "seed: got True, expected an integer"),
        ("row", None, "row: got None, expected text"),
    ],
)
def test_validate_names_what_is_wrong(record, key, value, complaint):
    (problem,) = records.validate(record | {key: value})
    assert problem.startswith(complaint)


def test_validate_names_what_is_missing(record):
    needed = set(record) - {"row"}
    for key in needed:
        problems = records.validate({k: v for k, v in record.items() if k != key})
        assert f"{key} is missing" in problems
    assert needed == {
        "experiment", "version", "date", "command", "config", "dataset", "metrics", "seconds",
        "params_sha256", "environment", "seed",
    }  # fmt: skip
    assert records.validate([1]) == ["expected a JSON object, got list"]


def test_a_configuration_finds_its_row_whatever_its_seed_and_folder():
    rows = {"a": Config(), "b": Config(preset="keras")}
    assert records.matching_row(Config(seed=9, out="x"), rows) == "a"
    assert records.matching_row(Config(preset="keras", seed=1), rows) == "b"
    assert records.matching_row(Config(learning_rate=0.007), rows) is None


# ---- tables -------------------------------------------------------------------------------------

ENVIRONMENT = {
    "git commit": "1234567890" * 4, "dirty": False, "python": "3.11.7", "jax": "0.10.2",
    "device": "Processor X", "devices": 2, "cores": 2,
}  # fmt: skip


def write_record(folder, seed, accuracy, epochs, train, **changes):
    record = {
        "experiment": "imdb", "row": "imdb-tf2", "version": "0.1.0", "date": "2026-01-02",
        "command": f"python experiments/imdb.py --seed {seed} --out runs/{seed}",
        "config": {"preset": "tf2", "seed": seed, "out": f"runs/{seed}"},
        "dataset": {"name": "imdb_reviews", "source": "tfds", "sha256": SHA},
        "metrics": {"test_accuracy": accuracy, "test_accuracy_epochs": epochs},
        "seconds": {"compile": 2.0, "train": train, "eval": 1.0}, "params_sha256": SHA,
        "environment": ENVIRONMENT, "seed": seed,
    }  # fmt: skip
    record |= changes
    name = f"{record['experiment']}-{changes.get('file', '')}{seed}.json"
    record.pop("file", None)
    (folder / name).write_text(json.dumps(record))
    return record


@pytest.fixture
def benchmark_folder(tmp_path):
    """Three seeds of ours and one run of a peer, with a README to write into."""
    folder = tmp_path / "experiments" / "results"
    folder.mkdir(parents=True)
    write_record(folder, 0, 0.8312, [0.81, 0.8312], 10.0)
    write_record(folder, 1, 0.8391, [0.83, 0.8391], 14.0)
    write_record(folder, 2, 0.8355, [0.84, 0.8355], 11.0)
    peer = {"row": "imdb-tf2", "framework": "keras 3.15 / tensorflow 2.21"}
    metrics = {"test_accuracy": 0.82}
    write_record(folder, 7, 0, [], 80.0, experiment="peers", peer=peer, metrics=metrics)
    (tmp_path / "README.md").write_text(f"# x\n\n{results.BEGIN}\nold\n{results.END}\nend\n")
    return tmp_path


def test_tables_hold_the_numbers_of_the_records(benchmark_folder, monkeypatch, capsys):
    monkeypatch.chdir(benchmark_folder)
    results.table(results.Table())
    text = Path("BENCHMARKS.md").read_text()
    accuracies = [0.8312, 0.8391, 0.8355]
    spread = f"{statistics.mean(accuracies):.4f} ± {np.std(accuracies, ddof=1):.4f}"
    assert spread == "0.8353 ± 0.0040"
    ours, theirs = (line for line in text.splitlines() if "imdb_reviews (tfds) |" in line)
    assert ours == (
        f"| lstmjax | {spread} (0.8312–0.8391) | 0.827 0.835 (± ≤ 0.015) | 3 | 2 | 11 | 1 | 14 | "
        "imdb_reviews (tfds) |"
    )
    assert theirs == (
        "| keras 3.15 / tensorflow 2.21 | 0.8200 | – | 1 | 2 | 80 | 1 | 83 | imdb_reviews (tfds) |"
    )
    assert "`python experiments/imdb.py` with seeds 0, 1, 2" in text
    assert "on Processor X, 2 devices, 2 cores; python 3.11.7, jax 0.10.2" in text
    assert "commit 1234567890; data sha256 0123456789ab" in text
    assert "records: `imdb-0.json`, `imdb-1.json`, `imdb-2.json`" in text
    # Without a record of a GPU, its section says that nothing was measured.
    assert re.findall(r"\n## (\S+): ", text) == ["imdb-tf2", "gpu"]
    assert "| sin | 50, 20, 10, 10 | not measured | not measured |" in text
    assert Path("README.md").read_text() == (
        f"# x\n\n{results.BEGIN}\n"
        "| program | metric | lstmjax | elsewhere | train s | elsewhere | seeds | data |\n"
        "| --- | --- | --- | --- | --- | --- | --- | --- |\n"
        f"| imdb-tf2 | test accuracy | {spread} | 0.8200 (keras 3.15 / tensorflow 2.21) | 11 | 80 "
        f"| 3 | imdb_reviews (tfds) |\n{results.END}\nend\n"
    )
    assert "note: imdb-tf2, keras 3.15 / tensorflow 2.21: 1 of at least 3" in capsys.readouterr()[1]


def test_check_tells_and_changes_nothing(benchmark_folder, monkeypatch):
    monkeypatch.chdir(benchmark_folder)
    with pytest.raises(RunError, match="BENCHMARKS.md is not what the records say"):
        results.table(results.Table(check=True))
    assert not Path("BENCHMARKS.md").exists() and "\nold\n" in Path("README.md").read_text()
    results.table(results.Table())
    before = {p: (p.read_text(), p.stat().st_mtime_ns) for p in Path().glob("*.md")}
    results.table(results.Table(check=True))
    results.table(results.Table())
    assert before == {p: (p.read_text(), p.stat().st_mtime_ns) for p in Path().glob("*.md")}
    Path("README.md").write_text(Path("README.md").read_text().replace("0.8353", "0.9353"))
    with pytest.raises(RunError, match="README.md is not what the records say"):
        results.table(results.Table(check=True))
    Path("README.md").write_text("no markers")
    with pytest.raises(RunError, match="README.md: expected the lines"):
        results.table(results.Table())


def write_parity(folder, name="parity", **changes):
    errors = {"float64_value": 3.14e-16, "float64_gradient": 2e-15, "float32_value": 1.5e-7,
              "float32_gradient": 2.5e-6}  # fmt: skip
    steps = {"torch_float64_train": 4.5e-16, "torch_float32_train": 9.5e-6}
    metrics = {f"{f}_{key}": value for f in ("cudnn", "torch") for key, value in errors.items()}
    versions = {"cudnn": {"jax": "0.10.2"}, "torch": {"python": "3.11.7", "torch": "2.13.0+cpu"}}
    record = {
        "experiment": "parity", "version": "0.1.0", "date": "2026-01-02",
        "command": "python experiments/parity.py --out runs/a",
        "config": {"vectors": {f: {"seed": 1997, "versions": v} for f, v in versions.items()}},
        "dataset": {"name": "golden vectors", "source": "generated", "sha256": SHA},
        "metrics": {"cudnn_cases": 4, "torch_cases": 17, **metrics, **steps},
        "seconds": SECONDS, "params_sha256": SHA, "environment": ENVIRONMENT, "seed": 1997,
    }  # fmt: skip
    (folder / f"{name}.json").write_text(json.dumps(record | changes))


def test_timed_layers_have_their_sections(benchmark_folder, monkeypatch):
    """From the records of this checkout: a layer in every framework, scan against unrolled."""
    committed = Path(__file__).resolve().parents[1] / "experiments" / "results"
    monkeypatch.chdir(benchmark_folder)
    for name in ("peer-layers-seed0", "scan-vs-unrolled-seed0"):
        shutil.copy(committed / f"{name}.json", "experiments/results")
    results.table(results.Table())
    text = Path("BENCHMARKS.md").read_text()
    titles = [line for line in text.splitlines() if line.startswith("## ")]
    starts = ("imdb-tf2: ", "layers: ", "scan against unrolled", "gpu: ")
    assert len(titles) == len(starts)
    assert all(t.startswith(f"## {s}") for t, s in zip(titles, starts, strict=True))
    record = json.loads((committed / "peer-layers-seed0.json").read_text())
    assert re.sub(r" --out \S+$", "", record["command"]) in text
    assert text.count("  - records: `peer-layers-seed0.json`") == 1


def test_parity_is_a_line_for_each_framework(benchmark_folder, monkeypatch, capsys):
    monkeypatch.chdir(benchmark_folder)
    folder = Path("experiments/results")
    results.table(results.Table())
    before = Path("BENCHMARKS.md").read_text()
    assert "parity" not in before
    write_parity(folder)
    with pytest.raises(RunError, match="BENCHMARKS.md is not what the records say"):
        results.table(results.Table(check=True))
    results.table(results.Table())
    results.table(results.Table(check=True))
    text = Path("BENCHMARKS.md").read_text()
    head, mark, gpu = before.partition("\n## gpu: ")
    assert text.startswith(head) and text.endswith(mark + gpu) and gpu
    assert "parity" not in Path("README.md").read_text()
    lines = text.removeprefix(head).removesuffix(mark + gpu).splitlines()
    assert lines[1].startswith("## parity: ") and lines[4:] == [
        "",
        "| vectors | made with | cases | float64 values | float64 gradients | float64 20 steps | "
        "float32 values | float32 gradients | float32 20 steps |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        "| cudnn | jax 0.10.2 | 4 | 3.1e-16 | 2.0e-15 | – | 1.5e-07 | 2.5e-06 | – |",
        "| torch | python 3.11.7, torch 2.13.0+cpu | 17 | 3.1e-16 | 2.0e-15 | 4.5e-16 | 1.5e-07 | "
        "2.5e-06 | 9.5e-06 |",
        "",
        "- **lstmjax**: `python experiments/parity.py` with seeds 1997",
        "  - on Processor X, 2 devices, 2 cores; python 3.11.7, jax 0.10.2; commit 1234567890; "
        "data sha256 0123456789ab",
        "  - records: `parity.json`",
    ]
    assert "note: parity" not in capsys.readouterr().err
    write_parity(folder, "parity-b", environment=ENVIRONMENT | {"device": "Accelerator Z"})
    results.table(results.Table())
    text = Path("BENCHMARKS.md").read_text()
    assert text.count("| torch |") == 2 and "on Accelerator Z" in text  # a table for each record
    write_parity(folder, config={})
    with pytest.raises(RunError, match="parity.json: config.vectors is missing"):
        results.table(results.Table())


def test_only_runs_that_differ_in_their_seed_are_averaged(benchmark_folder):
    folder = benchmark_folder / "experiments" / "results"
    assert [len(g.records) for g in tables.load_groups(folder)] == [3, 1]
    offline = {"name": "offline_reviews", "source": "offline", "sha256": SHA}
    write_record(folder, 3, 0.9, [0.9], 1.0, dataset=offline)
    write_record(folder, 4, 0.9, [0.9], 1.0, config={"preset": "tf2", "epochs": 9})
    write_record(folder, 5, 0.9, [0.9], 1.0, environment=ENVIRONMENT | {"device": "Processor Y"})
    write_record(folder, 6, 0.9, [0.9], 1.0, row="imdb-tf2-gru")
    groups = tables.load_groups(folder)
    found = sorted((g.row, g.name == "lstmjax", [r["seed"] for r in g.records]) for g in groups)
    assert found == [
        ("imdb-tf2", False, [7]), ("imdb-tf2", True, [0, 1, 2]), ("imdb-tf2", True, [3]),
        ("imdb-tf2", True, [4]), ("imdb-tf2", True, [5]), ("imdb-tf2-gru", True, [6]),
    ]  # fmt: skip
    write_record(folder, 1, 0.9, [0.9], 1.0, file="again")
    with pytest.raises(RunError, match="imdb-1.json and imdb-again1.json are two runs of the same"):
        tables.load_groups(folder)


def test_records_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(RunError, match="a.json is no JSON"):
        tables.load_groups(tmp_path)
    (tmp_path / "a.json").write_text('{"experiment": "sin"}')
    with pytest.raises(RunError, match="a.json is no valid record: command is missing"):
        tables.load_groups(tmp_path)
    (tmp_path / "a.json").unlink()
    write_record(tmp_path, 1, 0.5, [0.5], 1.0, row="imbd")
    with pytest.raises(RunError, match="got the row 'imbd', expected one of sin-tf1"):
        tables.load_groups(tmp_path)


def test_summary_of_numbers_and_lists():
    assert tables.summary([], ".3f") == "–"
    assert tables.summary([0.5], ".3f") == "0.500"
    assert tables.summary([1.0, 2.0, 6.0], ".2f") == "3.00 ± 2.65 (1.00–6.00)"
    assert tables.summary([1.0, "nan"], ".2f").startswith("nan ± nan")
    assert tables.summary([[1.0, 5.0], [3.0, 5.5]], ".1f") == "2.0 5.2 (± ≤ 1.4)"
    with pytest.raises(RunError, match="lists of different lengths"):
        tables.summary([[1.0], [1.0, 2.0]], ".1f")


def test_every_row_can_be_written(tmp_path):
    """Each row's metrics and formats, through the whole text of both tables."""
    for i, (row, spec) in enumerate(tables.ROWS.items()):
        values = {key: [0.125 + i, 0.5] if "epochs" in key else 0.25 for key, *_ in spec.metrics}
        write_record(tmp_path, i, 0, [], 1.0, row=row, metrics=values)
    groups = tables.load_groups(tmp_path)
    assert [group.row for group in groups] == list(tables.ROWS)
    text, short = tables.benchmarks(groups), tables.readme_table(groups)
    for row, spec in tables.ROWS.items():
        assert f"## {row}: {spec.title}" in text and f"| {row} | {spec.metrics[0][1]} |" in short
        assert all(label in text for _, label, _ in spec.metrics)
    assert " nan" not in text and "None" not in text


# ---- commands -----------------------------------------------------------------------------------


def test_collect_copies_all_or_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runs = []
    for seed, row in ((0, "sin-tf1"), (1, None)):
        run = Run.create("sin", Config(seed=seed), out=f"runs/{seed}")
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
        2, "error: command: got tabel, expected one of collect, table\n",
    )  # fmt: skip


@pytest.mark.parametrize(
    "argv, complaint",
    [
        (["table", "--chek"], "error: --chek: no such flag, did you mean --check?"),
        (["collect"], "error: runs: got none, expected at least one run folder"),
        (["collect", "nowhere"], "error: cannot read nowhere/record.json: No such file"),
        ([], "error: command: got nothing, expected one of collect, table"),
    ],
)
def test_wrong_commands_get_one_line(argv, complaint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        results.command(argv)
    error = capsys.readouterr().err
    assert stop.value.code in (1, 2) and error.startswith(complaint) and error.count("\n") == 1
