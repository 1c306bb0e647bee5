"""Where a number comes from: parameters' hash, first losses, commit, versions, device, command."""

import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.extend.backend
import numpy as np
from jax._src.distributed import global_state  # jax.process_count() would start the devices

from lstmjax import onednn
from lstmjax.data import files

ROOT = Path(__file__).resolve().parents[1]
FIRST = 10  # losses that a record holds
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")
# What the record commands write says nothing about the code that made a number.
_WRITTEN_FROM_RECORDS = ("experiments/results", "BENCHMARKS.md", "README.md")


def params_sha256(tree: Any) -> str:
    """SHA-256 of a pytree of arrays, the same on every machine and every device.

    For every leaf, in the order of its key path, the path, shape and dtype are hashed, then the
    values as little-endian bytes in C order. Key paths are names only: a NamedTuple and a dict of
    the same fields give the same hash. `None` is no leaf and leaves no trace.

    Args:
      tree: a pytree whose leaves are arrays or numbers (`jax.random.key` arrays count as their key
        data).

    Returns:
      64 hexadecimal digits.

    Raises:
      ValueError: a leaf is not a numeric array.
    """
    leaves = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        leaves.append(([_key_name(key) for key in path], leaf))
    digest = hashlib.sha256()
    for path, leaf in sorted(leaves, key=lambda pair: json.dumps(pair[0])):
        if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        array = np.asarray(leaf)
        if array.dtype.hasobject or array.dtype.kind in "USM":
            raise ValueError(f"tree: got {type(leaf).__name__} at {path}, expected numeric arrays")
        digest.update(json.dumps([path, array.shape, array.dtype.name]).encode())
        native = ">" if sys.byteorder == "big" else "<"
        swap = array.dtype.byteorder.replace("=", native) == ">"
        digest.update((array.byteswap() if swap else array).tobytes(order="C"))
    return digest.hexdigest()


def _key_name(key: Any) -> str | int:
    """The name of one step of a pytree's key path: a dict key, a field name or an index."""
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            name = getattr(key, attribute)
            return name if isinstance(name, int) else str(name)
    return str(key)


def without_flags(command: str, *flags: str) -> str:
    """A command line without some flags and their values, as `--seed 3` and `--seed=3`."""
    words, kept = shlex.split(command), []
    while words:
        word = words.pop(0)
        if word in flags:
            del words[:1]
        elif word.partition("=")[0] not in flags:
            kept.append(word)
    return shlex.join(kept)


def with_value(command: str, value: str, *flags: str) -> str:
    """A command line with another value of some flags, where it has them."""
    words, changed = shlex.split(command), []
    while words:
        name, equals, _ = (word := words.pop(0)).partition("=")
        if name not in flags:
            changed.append(word)
        elif equals:
            changed.append(f"{name}={value}")
        else:
            changed += [name, value]
            del words[:1]
    return shlex.join(changed)


def count_parameters(params: Any) -> int:
    """How many numbers a nested dict of arrays holds."""
    return sum(int(np.size(leaf)) for leaf in jax.tree.leaves(params))


def first_steps(lines: Iterable[Mapping[str, Any]], count: int = FIRST) -> dict[str, Any] | None:
    """The first losses of a run, by which `verify` recognises it when it is run again.

    Args:
      lines: of metrics.jsonl, as dicts.
      count: how many losses at most.

    Returns:
      `{"name", "steps": [...], "loss": [...]}`: the first values of the first number that is called
      loss or mse (train_mse), with their steps; None where there is none.
    """
    name, steps, losses = None, [], []
    for line in lines:
        if name is None:
            name = next((key for key in line if key.split("_")[-1] in ("loss", "mse")), None)
        if name is not None and name in line:
            steps.append(line["step"])
            losses.append(line[name])
            if len(steps) == count:
                break
    return {"name": name, "steps": steps, "loss": losses} if steps else None


def read_lines(path: str | os.PathLike) -> Iterator[dict[str, Any]]:
    """The whole lines of a metrics.jsonl that are there by now; none where there is no file.

    Raises:
      ValueError: a line that is no JSON object with a step.
    """
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if line.endswith(b"\n"):
                    yield _line(line, f"{path}, line {number}")
    except FileNotFoundError:
        return


def _line(text: bytes, place: str) -> dict[str, Any]:
    try:
        line = files.parse_json(text)
    except ValueError as error:
        raise ValueError(f"{place}: got {files.reason(error)}, expected JSON") from error
    if not (isinstance(line, dict) and isinstance(line.get("step"), int)):
        raise ValueError(f"{place}: got no step, expected one")
    return line


def environment(devices: Sequence[Any] | int | None = None) -> dict[str, Any]:
    """What a number depends on beside the configuration: code, versions, device.

    `git commit` and `dirty` are None outside a git checkout of lstmjax (installed from a wheel, no
    git). `dirty` is True where a tracked file differs from the commit, or an untracked Python file
    lies under lstmjax/ or experiments/. Other untracked files (notes, run folders) do not count,
    nor do the files that the record commands write (experiments/results/, BENCHMARKS.md,
    README.md): neither can change a number.

    Args:
      devices: the devices the run used, or how many; every device of the default backend where
        None.

    Returns:
      `{"git commit", "dirty", "python", "jax", "jaxlib", "flax", "optax", "numpy", "device",
      "processor", "driver", "devices", "processes", "platform", "cores", "XLA_FLAGS"}`: `device` is
      the processor's or accelerator's name, `processor` which one among those of its name it is
      (family and model, for a name may say no more than the maker; None where that cannot be
      told): its vector units, and so last bits and seconds, differ; `driver` what JAX's runtime
      says of its own version and the driver's (of a CPU no more than "cpu"), `devices` how many of
      them JAX saw in this run, in all of its `processes`, `cores` the processor cores this process
      may use. Where the process has loaded oneDNN (method "onednn"), its version is "onednn".
    """
    if devices is None or isinstance(devices, int):
        first, count = jax.devices()[0], devices or len(jax.devices())
    else:
        first, count = devices[0], len(devices)
    flags = os.environ.get("XLA_FLAGS", "").split()
    native = onednn.loaded()
    return {
        **git_state(),
        "python": platform.python_version(),
        **{package: version(package) for package in _PACKAGES},
        **({} if native is None else {"onednn": native}),
        "device": _processor_name() if first.platform == "cpu" else first.device_kind,
        "processor": _processor_kind(),
        "driver": _driver(),
        "devices": count,
        "processes": processes(),
        "platform": first.platform,
        "cores": _cores(),
        "XLA_FLAGS": " ".join(without_folders(flag) for flag in flags),
    }


def processes() -> int:
    """How many processes this run has; asking does not start JAX's devices."""
    return global_state.num_processes


def is_main() -> bool:
    """Whether this process is the first of them, the one that writes; true of the only one."""
    return global_state.process_id == 0


def version(package: str) -> str | None:
    """A distribution's installed version, without importing it; None where it is missing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    """What the runtime of the devices in use says of its version and the driver's, in one line."""
    text = getattr(jax.extend.backend.get_backend(), "platform_version", None)
    return " ".join(text.split()) if text else None


def _cores() -> int | None:
    """How many processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _told() -> dict[str, str]:
    """What Linux tells of the first processor; elsewhere nothing."""
    try:
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0]
    except OSError:
        return {}
    fields = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in fields}


def _processor_name() -> str:
    """The processor's own name where Linux tells it, else what Python knows."""
    return _told().get("model name") or platform.processor() or platform.machine()


def _processor_kind() -> str | None:
    """Family and model as their maker counts them, or maker and part; None where nobody tells."""
    told = _told()
    for names in (("cpu family", "model"), ("CPU implementer", "CPU part")):
        if all(name in told for name in names):
            return ", ".join(f"{name.split()[-1]} {told[name]}" for name in names)
    return None


def _git(*arguments: str) -> str | None:
    """Output of a git command in the repository root; None where it fails or git is missing."""
    # A git hook sets GIT_DIR and the like for *its* repository, which need not be this one.
    variables = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *arguments],
            capture_output=True, text=True, timeout=20, check=True,
            env=variables | {"GIT_OPTIONAL_LOCKS": "0"},
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def git_state() -> dict[str, Any]:
    """`{"git commit", "dirty"}` of the checkout this package lies in; both None outside of one."""
    outside = {"git commit": None, "dirty": None}
    top = _git("rev-parse", "--show-toplevel")
    # A wheel may be installed *inside* some other project's checkout: that commit is not ours.
    if top is None or Path(top.strip()).resolve() != ROOT:
        return outside
    commit = _git("rev-parse", "--verify", "HEAD")
    status = _git(
        "status", "--porcelain", "--untracked-files=all", "--", ".",
        *(f":(exclude){path}" for path in _WRITTEN_FROM_RECORDS),
    )  # fmt: skip
    if commit is None or status is None:
        return outside
    dirty = any(_counts(line) for line in status.splitlines())
    return {"git commit": commit.strip(), "dirty": dirty}


def _counts(status_line: str) -> bool:
    """Whether a line of `git status --porcelain` means a tracked file or an untracked module."""
    code, path = status_line[:2], status_line[3:].strip('"')
    return code != "??" or (path.endswith(".py") and path.startswith(("lstmjax/", "experiments/")))


def command_line(argv: Sequence[str] | None = None) -> str:
    """The command of this process, fit to publish: `python experiments/imdb.py --cell gru`.

    The script is given relative to the repository root, or to the working directory. Absolute paths
    among the arguments say more about a machine than about a run: relative where they lie below the
    working directory, else their last part.
    """
    script, *arguments = sys.argv if argv is None else argv
    spec = getattr(sys.modules["__main__"], "__spec__", None) if argv is None else None
    if spec is not None:
        start = ["-m", spec.name.removesuffix(".__main__")]
    else:
        path = str(Path(script).resolve())
        start = [without_folders(path.removeprefix(f"{ROOT}{os.sep}"))]
    return shlex.join(["python", *start, *(without_folders(argument) for argument in arguments)])


def without_folders(argument: str) -> str:
    """An argument or value without the machine's own folders: see `command_line`."""
    flag, equals, value = argument.partition("=")
    if argument.startswith("-") and equals:
        return f"{flag}={without_folders(value)}"
    path = Path(os.path.expanduser(argument))
    if not path.is_absolute():
        return argument
    if path.is_relative_to(Path.cwd()):
        return str(path.relative_to(Path.cwd()))
    return path.name or argument
