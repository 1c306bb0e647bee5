"""Where a number comes from: the hash of parameters, commit, versions, device and command."""

import hashlib
import struct
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lstmjax import provenance, records

ROOT = Path(__file__).resolve().parents[1]


class Weights(NamedTuple):
    w: object
    b: object
    peephole: object = None


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
    assert found["driver"] == "cpu"


X86 = "processor\t: 0\nmodel name\t: A maker's\ncpu family\t: 25\nmodel\t\t: 17\n\nmodel\t: 1\n"
ARM = "processor\t: 0\nCPU implementer\t: 0x41\nCPU part\t: 0xd40\n\nCPU part\t: 0x1\n"


@pytest.mark.parametrize(
    ("text", "name", "kind"),
    [
        (X86, "A maker's", "family 25, model 17"),
        (ARM, "x86_64", "implementer 0x41, part 0xd40"),
        ("processor : 0\ncpu family : 6\n", "x86_64", None),
        (None, "x86_64", None),
    ],
)
def test_two_processors_of_one_name_are_told_apart(text, name, kind, monkeypatch):
    """Linux says it of the first one; without it, Python's word is taken and the kind not known."""

    def read_text(path, **_):
        if text is None:
            raise FileNotFoundError(path)
        return text

    monkeypatch.setattr(provenance.Path, "read_text", read_text)
    monkeypatch.setattr(provenance.platform, "processor", lambda: "")
    monkeypatch.setattr(provenance.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(provenance, "git_state", dict)
    found = records.environment()
    assert (found["device"], found["processor"]) == (name, kind)


def test_onednn_is_named_where_it_was_loaded(monkeypatch):
    for version, expected in ((None, {}), ("3.2.0", {"onednn": "3.2.0"})):
        monkeypatch.setattr(provenance.onednn, "loaded", lambda version=version: version)
        found = records.environment()
        assert {k: v for k, v in found.items() if k == "onednn"} == expected


def test_the_driver_is_what_the_runtime_says_in_one_line(monkeypatch):
    class Backend:
        platform_version = "PJRT C API\ncuda 13000\n"

    monkeypatch.setattr(provenance.jax.extend.backend, "get_backend", Backend)
    assert records.environment()["driver"] == "PJRT C API cuda 13000"
    Backend.platform_version = None
    assert records.environment()["driver"] is None


# ---- the first losses ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lines, expected",
    [
        ([], None),
        ([{"step": 1, "accuracy": 0.5}], None),
        ([{"step": 3, "mse": 0.5}, {"step": 4, "mse": "nan"}], ("mse", [3, 4], [0.5, "nan"])),
        (
            [{"step": 5, "epoch": 1, "train_mse": 2.0, "gradient": 1}, {"step": 6, "loss": 1.0},
             {"step": 9, "train_mse": 1.5}],
            ("train_mse", [5, 9], [2.0, 1.5]),
        ),
        (
            [{"step": 1, "skipped": 1}, {"step": 2, "accuracy": 0.25, "loss": 0.75, "loss/s3": 8},
             {"step": 2, "train_loss": 0.5}, {"step": 4, "loss": 0.25}],
            ("loss", [2, 4], [0.75, 0.25]),
        ),
    ],
)  # fmt: skip
def test_first_losses_are_those_of_one_name(lines, expected):
    found = provenance.first_steps(lines)
    assert found == (expected and dict(zip(("name", "steps", "loss"), expected, strict=True)))


def test_no_more_losses_than_asked_for_are_read():
    lines = iter([{"step": i, "loss": i / 2} for i in range(30)])
    found = provenance.first_steps(lines, 4)
    assert (found["steps"], found["loss"]) == ([0, 1, 2, 3], [0, 0.5, 1, 1.5])
    assert next(lines)["step"] == 4
    assert len(provenance.first_steps(lines)["steps"]) == 10


def test_a_line_that_is_being_written_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert list(provenance.read_lines(path)) == []
    path.write_text('{"step": 1}\n{"step": 2}\n{"step"')
    assert list(provenance.read_lines(path)) == [{"step": 1}, {"step": 2}]


# ---- commit and command -------------------------------------------------------------------------


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
