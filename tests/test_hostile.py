"""Files made to do harm: nothing is unpickled, nothing is written outside, all ends in a line."""

import ast
import importlib.util
import io
import json
import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "experiments"))  # where the readers stand that fuzz.py tries, too

from fuzzing import mutations, runs, worker  # noqa: E402
from fuzzing.mutations import written  # noqa: E402

from lstmjax import checkpoint, interop, provenance, records  # noqa: E402
from lstmjax.data import DataError, characters, files  # noqa: E402

H5PY = importlib.util.find_spec("h5py") is not None  # an extra of the package
READERS = [name for name in worker.READERS if H5PY or name != "keras"]
FEW = {"checkpoint": 25, "keeper": 25, "tfds_reviews": 50, "tfds_digits": 50, "run": 50}
FEW |= {"resume": 60, "review": 60, "record": 80, "keras": 40}

# Orbax leaves threads behind where it cannot read, which complain when their loop is closed.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def without_git(monkeypatch):
    """Three processes fewer for each run that is opened."""
    for module in (provenance, records):
        monkeypatch.setattr(module, "git_state", lambda: {"git commit": None, "dirty": None})


@pytest.fixture(scope="module")
def readers():
    """name → (function that reads a folder, valid folders), made when they are first asked for."""
    made = {}

    def get(name):
        if name not in made:
            reader = worker.READERS[name]
            made[name] = reader.first() if reader.first else reader.read, reader.seeds()
        return made[name]

    return get


def refused(call, *parts):
    """Asserts that a call ends in one line of ours with these words."""
    with pytest.raises((DataError, checkpoint.RunError, ValueError)) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and all(part in message for part in parts), message


# ---- pickles ------------------------------------------------------------------------------------

FORBIDDEN = {"pickle", "cPickle", "dill", "joblib", "shelve", "marshal", "cloudpickle", "yaml"}
CALLS = {"eval", "exec", "extract", "extractall", "unpack_archive", "load_module"}


def dangers(source):
    """What code must not do with files that it did not write: line and name."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name.split(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [(node.module or "").split(".")[0]]
        found += [(node.lineno, name) for name in names if name in FORBIDDEN]
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        if called.split(".")[-1] in CALLS and called not in ("jax.ensure_compile_time_eval",):
            found.append((node.lineno, called))
        said = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if said.get("allow_pickle", "False") != "False" or called == "torch.load":
            found.append((node.lineno, called))
        if called in ("np.load", "numpy.load") and said.get("allow_pickle") != "False":
            found.append((node.lineno, called))
    return found


@pytest.mark.parametrize("folder", ["lstmjax", "experiments"])
def test_no_code_unpickles_evaluates_or_unpacks(folder):
    sources = sorted((ROOT / folder).rglob("*.py"))
    assert len(sources) > 15
    found = {str(path): dangers(path.read_text("utf-8")) for path in sources}
    assert {path: lines for path, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from pickle import loads", "def f():\n import joblib", "eval('1')",
        "exec(x)", "np.load(f)", "np.load(f, allow_pickle=True)", "np.savez(f, allow_pickle=yes)",
        "torch.load(f)", "archive.extractall()", "tar.extract(m)", "import yaml",
    ],
)  # fmt: skip
def test_the_scan_itself(source):
    assert dangers(source)


class Evil:
    """A pickle of this makes a folder when it is loaded."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def evil_files(marker):
    objects = io.BytesIO()
    np.save(objects, np.array([Evil(marker)], object), allow_pickle=True)
    both = io.BytesIO()
    np.savez(both, sha256=np.array([Evil(marker)], object), x=np.ones(3))
    return {"pickle": pickle.dumps(Evil(marker)), "npy": objects.getvalue(), "npz": both.getvalue()}


@pytest.mark.parametrize("name", READERS)
def test_a_pickle_is_never_loaded(name, readers, tmp_path):
    marker = tmp_path / "loaded"
    read, seeds = readers(name)
    for kind, content in evil_files(marker).items():
        for number, file in enumerate(seeds[0]):
            folder = written(seeds[0] | {file: content}, tmp_path / f"{kind} {number}")
            result = worker.once(read, folder)
            assert result.outcome in ("accepted", "refused"), result
            assert not marker.exists()
    assert np.load(io.BytesIO(evil_files(marker)["npy"]), allow_pickle=True) is not None
    assert marker.exists()  # so that it would have been seen


# ---- pipes and devices --------------------------------------------------------------------------


def test_what_is_no_plain_file_is_not_waited_for(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (pipe, Path("/dev/zero")):
        for call in (
            lambda path=path: files.read_bytes(path, 100),
            lambda path=path: files.read_arrays(path),
            lambda path=path: characters.load(path),
            lambda path=path: checkpoint.load_params(path, {}),
            *[lambda path=path: interop.load_keras_file(path)] * H5PY,
        ):
            refused(call, "plain file")


def test_a_tfds_folder_with_a_pipe(readers, tmp_path):
    read, seeds = readers("tfds_reviews")
    for name in seeds[0]:
        folder = written(seeds[0], tmp_path / name)
        (folder / name).unlink()
        os.mkfifo(folder / name)
        assert worker.once(read, folder).outcome == "refused"


# ---- what a run goes on with --------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"epoch": 0}, {"epoch": 1.5}, {"epoch": "2"}, {"epoch": None}, {"piece": -1}, {"piece": []},
        {"best_score": "high"}, {"skipped": {}}, {"parts": {}}, {"parts": None}, {"files": [1]},
        {"files": {"sizes": {"metrics.jsonl": "9"}}}, {"files": {"sizes": {"../../outside": 0}}},
        {"files": {"sizes": {"metrics.jsonl": 10**9}}},
    ],
    ids=str,
)  # fmt: skip
def test_a_checkpoint_that_is_whole_and_not_of_this_run(change, readers, tmp_path):
    read, seeds = readers("keeper")
    assert worker.once(read, written(seeds[0], tmp_path / "good" / "in")).outcome == "accepted"
    value = json.loads(seeds[0][runs.SAID])
    value["said"]["progress"] |= change
    files = runs.keeper_seal(seeds[0] | {runs.SAID: json.dumps(value).encode()})
    result = worker.once(read, written(files, tmp_path / "bad" / "in"))
    assert result.outcome == "refused" and result.kind == "RunError", result
    assert os.listdir(tmp_path / "bad") == ["in"]


def test_a_checkpoint_takes_no_more_than_it_holds(tmp_path, monkeypatch):
    states = checkpoint.Checkpoints(tmp_path / "c")
    states.save(1, {"x": np.arange(4.0)}, None)
    states.save(2, {"x": np.zeros(2**20)}, None)  # 8 MiB in some hundred bytes
    states.wait()
    assert states.read(2)[0]["x"].nbytes == 2**23
    monkeypatch.setattr(files, "unpacked", lambda packed: 2**20)
    refused(lambda: states.read(2), "is damaged", "bytes that unpack to 8,388,608")
    np.testing.assert_array_equal(states.read(1)[0]["x"], np.arange(4.0))
    states.close()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("run.json", b'{"experiment": "imdb", "command": "x", "opened": [3]}'),
        ("run.json", b'{"experiment": "imdb", "command": "x", "opened": []}'),
        ("run.json", b"[" * 10**5),
        ("metrics.jsonl", b'{"step": 1, "loss": \xff}\n' * 9),
        ("metrics.jsonl", b"[1, 2]\n" * 9),
        ("metrics.jsonl", b'{"loss": 0.5}\n' * 9),
        ("config.json", b'{"seed": 1.5}'),
    ],
)
def test_a_run_with_a_file_that_is_not_its_own(name, content, readers, tmp_path):
    read, seeds = readers("resume")
    assert worker.once(read, written(seeds[0], tmp_path / "good")).outcome == "accepted"
    result = worker.once(read, written(seeds[0] | {name: content}, tmp_path / "bad"))
    assert result.outcome == "refused" and name in result.words, result


# ---- all of them --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", READERS)
def test_a_few_hundred_changed_files(name, readers):
    """A small part of what experiments/fuzz.py does; its figures are in docs/reliability.md."""
    read, seeds = readers(name)
    outcomes = []
    for number in range(FEW.get(name, 200)):
        with mutations.scratch() as folder:
            files = worker.case(worker.READERS[name], seeds, name, 0, number)
            result = worker.once(read, written(files, folder / "in"))
            assert result.outcome != "failed", (number, result)
            assert os.listdir(folder) == ["in"]
            outcomes.append(result.outcome)
    assert outcomes.count("accepted") > 0
    # A checkpoint is replaced by the one before it: few changes leave none.
    assert outcomes.count("refused") > 0 or name == "checkpoint"
