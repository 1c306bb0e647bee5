"""Checkpoints: what is read is what was saved, or it is said to be damaged."""

import json
import os
import random
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lstmjax import checkpoint
from lstmjax.checkpoint import SUMS, Checkpoints, Damaged
from lstmjax.records import RunError

rng = np.random.default_rng(0)


def tree(step):
    return {
        "params.w": rng.normal(size=(40, 30)).astype("float32"),
        "params.b": rng.normal(size=7),
        "step": np.int32(step),
        "key": rng.integers(0, 2**32, 2, dtype=np.uint32),
        "half": rng.normal(size=5).astype("float16"),
    }


def same(a, b):
    assert a.keys() == b.keys()
    for name, value in a.items():
        other = np.asarray(b[name])
        assert value.dtype == other.dtype and value.shape == other.shape
        assert value.tobytes() == other.tobytes()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with the checkpoints 10 (the best), 30 and 40, and what is in them."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    trees = {step: tree(step) for step in (10, 20, 30, 40)}
    checkpoints = Checkpoints(folder, keep=2)
    for step, arrays in trees.items():
        progress = {"epoch": step, "parts": {"mse": [0.1, 1e-300]}}
        checkpoints.save(step, arrays, progress, best=step == 10)
    checkpoints.close()
    return folder, trees


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of it, to be damaged."""
    copy = tmp_path / "checkpoints"
    subprocess.run(["cp", "-r", saved[0], copy], check=True)
    return copy


def test_what_is_read_is_what_was_saved(saved):
    folder, trees = saved
    checkpoints = Checkpoints(folder, keep=2)
    step, arrays, progress = checkpoints.latest()
    assert step == 40
    same(arrays, trees[40])
    assert progress == {"epoch": 40, "parts": {"mse": [0.1, 1e-300]}}
    for step in (10, 30):
        same(checkpoints.read(step)[0], trees[step])
    checkpoints.close()


def test_the_last_few_stay_and_the_best(saved, folder):
    assert Checkpoints(saved[0]).steps() == [10, 30, 40]
    checkpoints = Checkpoints(folder, keep=2)
    checkpoints.latest()  # from here it is known again which one is the best
    checkpoints.save(50, tree(50), {})
    checkpoints.save(60, tree(60), {}, best=True)
    checkpoints.wait()
    assert checkpoints.steps() == [50, 60]
    checkpoints.save(70, tree(70), {})
    checkpoints.save(80, tree(80), {})
    checkpoints.close()
    assert Checkpoints(folder).steps() == [60, 70, 80]


def test_a_checkpoint_that_is_there_can_become_the_best(folder):
    checkpoints = Checkpoints(folder, keep=1)
    checkpoints.latest()
    checkpoints.mark_best(30)
    checkpoints.save(50, tree(50), {})
    checkpoints.close()
    assert Checkpoints(folder).steps() == [30, 50]


def test_no_checkpoint_is_none(tmp_path):
    assert Checkpoints(tmp_path / "new").latest() is None


def test_sha256sum_can_check_it(folder):
    done = subprocess.run(["sha256sum", "-c", SUMS], cwd=folder / "40", capture_output=True)
    assert done.returncode == 0 and done.stdout.count(b": OK") > 5


def files(folder):
    return sorted(p for p in (folder / "40").rglob("*") if p.is_file())


def damaged(data, how, random):
    """The bytes of a file, changed in one of three ways."""
    if how == "flipped":
        place = random.randrange(len(data))
        return data[:place] + bytes([data[place] ^ 1 << random.randrange(8)]) + data[place + 1 :]
    return data[: random.randrange(len(data))] if how == "cut" else data + b"\0"


@pytest.mark.parametrize("seed", range(24))
def test_whatever_is_changed_the_one_before_it_is_used(saved, folder, capfd, seed):
    draw = random.Random(seed)
    path = draw.choice(files(folder))
    how = draw.choice(["flipped", "cut", "lengthened", "deleted"])
    if how == "deleted":
        path.unlink()
    else:
        path.write_bytes(damaged(path.read_bytes(), how, draw))
    checkpoints = Checkpoints(folder, keep=2)
    step, arrays, _ = checkpoints.latest()
    same(arrays, saved[1][step])  # never anything but what was saved
    printed = capfd.readouterr().err
    if step == 40:  # a file that is not needed, Orbax's own notes
        assert printed == ""
        assert path.name in ("commit_success.txt", "_CHECKPOINT_METADATA", SUMS)
    else:
        assert step == 30
        assert printed.startswith(f"warning: the checkpoint {folder}/40 is damaged (")
        assert printed.endswith("the one before it is used\n") and printed.count("\n") == 1
        assert (folder / "damaged-40").is_dir() and not (folder / "40").exists()
        checkpoints.save(40, tree(40), {})  # its step can be saved again
        checkpoints.wait()
        assert checkpoints.steps() == [10, 30, 40]
    checkpoints.close()


def test_without_the_sums_the_hash_inside_tells(folder, monkeypatch):
    """Other numbers in well-formed files: no file is malformed, and yet they are not taken."""
    (folder / "30" / SUMS).unlink()
    (folder / "40" / SUMS).unlink()
    checkpoints = Checkpoints(folder)
    assert checkpoints.read(40)[1]["step"] == 40
    for name in ("arrays", "said"):
        os.rename(folder / "40" / name, folder / f"{name}-40")
        os.rename(folder / "30" / name, folder / "40" / name)
        with pytest.raises(Damaged, match="40 is damaged"):
            checkpoints.read(40)
        os.rename(folder / "40" / name, folder / "30" / name)
        os.rename(folder / f"{name}-40", folder / "40" / name)
    assert checkpoints.read(40)[1]["step"] == 40
    os.rename(folder / "40", folder / "50")
    with pytest.raises(Damaged, match=r"50 is damaged \(it is of step 40, format 1\)"):
        Checkpoints(folder).read(50)
    os.rename(folder / "50", folder / "40")
    monkeypatch.setattr(checkpoint, "FORMAT", 2)
    with pytest.raises(Damaged, match=r"format 1\)"):
        Checkpoints(folder).read(40)


def test_sums_cannot_point_outside(folder):
    (folder / "40" / SUMS).write_text(f"{'0' * 64}  ../../../../../dev/zero\n")
    with pytest.raises(Damaged, match="dev/zero is not as it was written"):
        Checkpoints(folder).read(40)


def test_all_of_them_damaged_is_an_error(folder, capfd):
    for step in (10, 30, 40):
        (folder / str(step) / "said" / "metadata").write_text("{")
    with pytest.raises(RunError, match=r"checkpoints: all 3 checkpoints are damaged"):
        Checkpoints(folder).latest()
    lines = capfd.readouterr().err.splitlines()
    assert [line.split(" (")[0] for line in lines] == [
        f"warning: the checkpoint {folder}/{step} is damaged" for step in (40, 30, 10)
    ]
    # There is none before the first one.
    assert [line.endswith("; the one before it is used") for line in lines] == [True, True, False]
    assert lines[2].endswith("(said/metadata is not as it was written)")
    assert Checkpoints(folder).steps() == [10, 30, 40]  # nothing was moved


def test_one_that_was_cut_off_while_it_was_written_is_none(folder):
    os.rename(folder / "40", folder / "40.orbax-checkpoint-tmp-17")
    (folder / "40.orbax-checkpoint-tmp-17" / "said" / "metadata").unlink()
    assert Checkpoints(folder).latest()[0] == 30


def test_a_folder_that_is_a_file_or_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot use the folder .*file"):
        Checkpoints(tmp_path / "file" / "checkpoints")


FULL = """
import resource, signal, sys
import numpy as np
from lstmjax.checkpoint import Checkpoints
from lstmjax.records import RunError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
checkpoints = Checkpoints(sys.argv[1])
checkpoints.save(1, {"a": np.arange(100.0)}, {})
checkpoints.wait()
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
try:
    checkpoints.save(2, {"a": np.random.default_rng(0).normal(size=100_000)}, {})
    checkpoints.wait()
except RunError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(Checkpoints(sys.argv[1]).latest()[0])
"""


def test_a_disk_that_is_full(tmp_path):
    """A limit on the size of files stands in for it: writing fails in the same place."""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path / "c")], capture_output=True, text=True
    )
    assert done.stderr == ""  # of all that Orbax logs
    first, second = done.stdout.splitlines()
    assert first.startswith(f"cannot save a checkpoint in {tmp_path}/c: ")
    assert second == "1"


def test_names_are_the_places_of_leaves():
    from lstmjax.lstm import LSTMState

    nested = {"a": [LSTMState(1, 2), 3], "b": {"c": 4}}
    assert checkpoint.named(nested) == {"a.0.h": 1, "a.0.c": 2, "a.1": 3, "b.c": 4}


def test_weights_written_twice(tmp_path):
    params = {"layer": {"w": np.arange(3.0, dtype=np.float32)}}
    checkpoint.save_params(tmp_path / "p", params)
    checkpoint.save_params(tmp_path / "p", params)  # the same: nothing is lost
    with pytest.raises(RunError, match="never written over"):
        checkpoint.save_params(tmp_path / "p", {"layer": {"w": np.zeros(3, np.float32)}})
    assert json.dumps(checkpoint.load_params(tmp_path / "p", params)["layer"]["w"].tolist()) == (
        "[0.0, 1.0, 2.0]"
    )
    assert Path(tmp_path / "p").exists()
