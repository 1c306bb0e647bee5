"""What a run leaves to go on from, and the weights of a trained model.

``Checkpoints`` keeps the last few states of a run in a folder, written by Orbax in the background,
each with a hash of all that is in it. ``save_params`` writes weights alone into one file in the
safetensors format, which any framework can read.

In both, names are the paths of the tree, joined by dots: "layer_0.weights.w_x".
"""

import hashlib
import json
import logging
import math
import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from lstmjax.data import files
from lstmjax.provenance import processes
from lstmjax.records import RunError, params_sha256, write_file

FORMAT = 1  # of what stands in a checkpoint
SUMS = "sha256sums"


# ---- the states of a run ------------------------------------------------------------------------


class Damaged(RunError):
    """A checkpoint that does not hold what was saved."""


class Checkpoints:
    """The last states of a run, and the one with the best score, in a folder.

    A checkpoint is a flat dict of arrays and a JSON value, under the number of its step. Orbax
    writes it under another name and renames it when it is whole, so that one which was cut off by
    the end of the process is never taken for a checkpoint. The hashes of its files (``sha256sums``,
    as the tool of that name reads them) and of all that is in it tell when something was changed
    afterwards.
    """

    def __init__(self, folder: str | os.PathLike, keep: int = 3):
        """Opens the folder, or makes it.

        Args:
          folder: of the checkpoints and nothing else.
          keep: how many of the last ones stay, >= 1; older ones are deleted, but for the best.

        Raises:
          RunError: the folder cannot be made or read.
        """
        self.folder = Path(folder).absolute()
        self._kept = _Kept(keep)
        self._saving = -1  # the step that is being written
        self._manager = self._open()

    def _open(self) -> Any:
        """Orbax's manager of the folder."""
        import orbax.checkpoint as ocp  # a second to import: only a run needs it

        # Of a full disk Orbax logs hundreds of lines, and raises it: one line is made of that.
        for name in ("absl", "orbax"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        # What is in a checkpoint's own metadata may be damaged; nothing here depends on it.
        # Of several processes only the first comes here: Orbax is not to wait for the others.
        alone = {"active_processes": {0}, "barrier_sync_key_prefix": "checkpoints"}
        alone = alone if processes() > 1 else {}
        options = ocp.CheckpointManagerOptions(
            create=False,
            preservation_policy=self._kept,
            cleanup_tmp_directories=True,
            lightweight_initialize=True,
            save_root_metadata=False,
            multiprocessing_options=ocp.options.MultiprocessingOptions(**alone),
            async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
        )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            return ocp.CheckpointManager(self.folder, options=options)
        except Exception as error:  # of the file system, in any of Orbax's clothes
            raise RunError(f"cannot use the folder {self.folder}: {_line(error)}") from error

    def save(
        self, step: int, arrays: Mapping[str, np.ndarray], progress: Any, *, best: bool = False
    ) -> None:
        """Starts to write a checkpoint, after the one before it is written.

        Args:
          step: >= 0, more than that of every checkpoint in the folder.
          arrays: NumPy arrays by name; they must not change until ``wait``.
          progress: a value that JSON can hold.
          best: whether no state before it was better, so that it is kept as well.

        Raises:
          RunError: this one or the one before it cannot be written; those written stay as they are.
        """
        import orbax.checkpoint as ocp

        self.wait()
        self._saving = step
        if best:
            self._kept.best = step
        said = {"format": FORMAT, "step": step, "best": self._kept.best, "progress": progress}
        said = {"said": said, "sha256": _sha256(arrays, said)}
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    arrays=ocp.args.StandardSave(dict(arrays)), said=ocp.args.JsonSave(said)
                ),
            )
        except Exception as error:
            raise RunError(f"cannot save a checkpoint in {self.folder}: {_line(error)}") from error

    def mark_best(self, step: int) -> None:
        """Keeps a checkpoint that is there already as the best."""
        self._kept.best = step

    def _seal(self) -> None:
        """Writes the hashes of a checkpoint's files into it: Orbax calls this when all are there.

        They lie in the folder that gets the checkpoint's own name afterwards.
        """
        path = next(self.folder.glob(f"{self._saving}.*tmp*"))
        lines = [f"{_file_sha256(path / name)}  {name}\n" for name in _files(path)]
        write_file(path / SUMS, "".join(lines).encode())

    def wait(self) -> None:
        """Returns when the last checkpoint is written; raises RunError as ``save`` does."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise RunError(f"cannot save a checkpoint in {self.folder}: {_line(error)}") from error

    def close(self) -> None:
        """Waits and ends Orbax's threads; raises RunError as ``save`` does."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def steps(self) -> list[int]:
        """The steps of the checkpoints in the folder, in ascending order."""
        return sorted(self._manager.all_steps())

    def latest(self) -> tuple[int, dict[str, np.ndarray], Any] | None:
        """The last checkpoint that is whole.

        Damaged ones that are newer are named on standard error and moved aside, to
        ``damaged-<step>``.

        Returns:
          ``(step, arrays, progress)``, or None where there is no checkpoint at all.

        Raises:
          RunError: there are checkpoints and every one of them is damaged.
        """
        damaged, steps = [], self.steps()
        for step in reversed(steps):
            try:
                arrays, said = self.read(step)
            except Damaged as error:
                before = "; the one before it is used" if step > steps[0] else ""
                print(f"warning: {error}{before}", file=sys.stderr)
                damaged.append(step)
                continue
            self._set_aside(damaged)
            self._kept.best = said["best"]
            return step, arrays, said["progress"]
        if damaged:
            raise RunError(f"{self.folder}: all {len(damaged)} checkpoints are damaged")
        return None

    def read(self, step: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """One checkpoint's arrays and what is said of them.

        Raises:
          Damaged: it is not what was saved.
        """
        import orbax.checkpoint as ocp

        where = f"the checkpoint {self.folder / str(step)} is damaged"
        if changed := _changed(self.folder / str(step)):
            raise Damaged(f"{where} ({changed} is not as it was written)")
        try:
            _check_size(self.folder / str(step))
            read = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    arrays=ocp.args.StandardRestore(), said=ocp.args.JsonRestore()
                ),
            )
            arrays, said = read.arrays, read.said["said"]
            same = _sha256(arrays, said) == read.said["sha256"]
            said = {name: said[name] for name in ("format", "step", "best", "progress")}
        except Exception as error:
            raise Damaged(f"{where} ({_line(error)})") from error
        if not same:
            raise Damaged(f"{where} (what it holds is not what was saved)")
        if said["format"] != FORMAT or said["step"] != step:
            raise Damaged(f"{where} (it is of step {said['step']}, format {said['format']})")
        return arrays, said

    def _set_aside(self, steps: list[int]) -> None:
        """Gives damaged checkpoints another name, so that their steps can be saved again."""
        for step in steps:
            aside, number = self.folder / f"damaged-{step}", 1
            while aside.exists():
                number += 1
                aside = self.folder / f"damaged-{step}-{number}"
            try:
                os.rename(self.folder / str(step), aside)
            except OSError as error:
                raise RunError(f"cannot rename {error.filename}: {error.strerror}") from error
        if steps:
            self._manager.close()
            self._manager = self._open()


class _Kept:
    """Orbax's question which checkpoints stay, answered: the last few, and the best."""

    def __init__(self, last: int):
        self.last = last
        self.best: int | None = None

    def should_preserve(self, checkpoints: Any, *, context: Any) -> list[bool]:
        steps = [info.step for info in checkpoints]
        return [step in steps[-self.last :] or step == self.best for step in steps]


def _check_size(path: Path) -> None:
    """Raises ValueError where arrays claim to be far larger than the files of a checkpoint."""
    import orbax.checkpoint as ocp
    from etils import epath

    found = ocp.StandardCheckpointHandler().metadata(epath.Path(path / "arrays"))
    arrays = jax.tree.leaves(getattr(found, "tree", found))
    claimed = sum(math.prod(a.shape) * np.dtype(a.dtype).itemsize for a in arrays)
    held = sum((path / name).stat().st_size for name in _files(path))
    if claimed > files.unpacked(held):
        raise ValueError(f"{held:,} bytes that unpack to {claimed:,}")


def _sha256(arrays: Mapping[str, np.ndarray], said: Any) -> str:
    """Of the arrays, with their names, shapes and dtypes, and of what is said of them."""
    text = params_sha256(arrays) + json.dumps(said, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _files(path: Path) -> list[str]:
    """The files of a checkpoint, as paths within it."""
    found = [p for p in path.rglob("*") if p.is_file() and not p.is_symlink()]
    files = [p.relative_to(path).as_posix() for p in found]
    return sorted(name for name in files if name not in (SUMS, "_CHECKPOINT_METADATA"))


def _file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _changed(path: Path) -> str | None:
    """The first file of a checkpoint that is missing or changed; None where all are as written.

    None as well where the hashes are missing: what the checkpoint holds has a hash of its own.
    """
    try:
        sums = (path / SUMS).read_text(encoding="ascii").splitlines()
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return SUMS
    there = _files(path)
    for line in sums:
        digest, _, name = line.partition("  ")
        try:
            if name not in there or _file_sha256(path / name) != digest:
                return name or SUMS
        except OSError:
            return name
    return None if sums else SUMS


def _line(error: BaseException) -> str:
    """An error's own words in one line, not too long a one."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    text = re.sub(r"\s*\[[^\]]*source[^\]]*\]", "", " ".join(text.split()))
    return text if len(text) <= 200 else f"{text[:200]} …"


def named(tree: Any) -> dict[str, Any]:
    """A pytree's leaves by the names of their places."""
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


# ---- weights alone ------------------------------------------------------------------------------


def save_params(path: str | os.PathLike, params: Mapping[str, Any]) -> None:
    """Writes a nested dict of arrays; the file appears whole or not at all.

    Args:
      path: the file, which must not exist, or hold the same already.
      params: nested dicts with string keys (without dots) and arrays as leaves.

    Raises:
      RunError: the file exists or cannot be written.
    """
    # In C's order: safetensors writes memory as it lies.
    data = save(_flat(params, leaf=lambda a: np.asarray(a, order="C")))
    # A run that was cut off while it ended finds the same weights written already.
    if Path(path).exists() and Path(path).read_bytes() != data:
        raise RunError(f"{path} exists already: weights are never written over")
    write_file(path, data)


def read_arrays(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file by name, whatever they are.

    Raises:
      RunError: the file cannot be read or is damaged.
    """
    try:
        if Path(path).exists() and not (Path(path).is_file() or Path(path).is_dir()):
            raise ValueError("it is no plain file")  # a pipe or a device may never end
        if Path(path).is_file():
            open(path, "rb").close()  # safetensors calls a file that may not be read a missing one
        return load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        text = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise RunError(f"cannot read the weights in {path}: {text}") from error


def load_params(path: str | os.PathLike, like: Mapping[str, Any]) -> dict[str, Any]:
    """Reads what ``save_params`` wrote, checked against the parameters of a model.

    Args:
      path: the file.
      like: the model's parameters, or their shapes (``jax.eval_shape``).

    Returns:
      A nested dict of NumPy arrays of the structure of ``like``.

    Raises:
      RunError: the file cannot be read, is damaged, or an entry is missing, left over, or of
        another shape or dtype than in ``like``; the first such entry is named.
    """
    stored = read_arrays(path)
    expected = _flat(like, leaf=lambda a: a)
    for name in sorted(expected.keys() | stored.keys()):
        if name not in stored:
            raise RunError(f"{path}: the weights {name} are missing")
        if name not in expected:
            raise RunError(f"{path}: the weights {name} have no place in this model")
        got, want = stored[name], expected[name]
        if got.shape != want.shape or got.dtype != want.dtype:
            raise RunError(
                f"{path}: {name} is {got.dtype}{list(got.shape)}, "
                f"expected {want.dtype}{list(want.shape)}"
            )
    paths, tree = jax.tree_util.tree_flatten_with_path(like)
    return jax.tree.unflatten(tree, [stored[_name(path)] for path, _ in paths])


def _flat(params: Mapping[str, Any], leaf: Callable) -> dict[str, Any]:
    """{"a.b": array} of {"a": {"b": array}}."""
    paths = jax.tree_util.tree_flatten_with_path(params)[0]
    return {_name(path): leaf(value) for path, value in paths}


def _name(path: tuple) -> str:
    """The path of a leaf, joined by dots: "layer_0.weights.w_x"."""
    return ".".join(jax.tree_util.keystr((key,), simple=True) for key in path)
