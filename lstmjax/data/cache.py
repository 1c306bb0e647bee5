"""Arrays that took seconds to make, kept as .npz: a convenience, never a condition.

A cache that cannot be written is done without; a file that does not hash to what it says, or does
not hold what it should, is made again. Files are named by the hash of what they were made from.
"""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from lstmjax.data import files
from lstmjax.data.dataset import content_sha256

Arrays = dict[str, np.ndarray]


def folder(cache_dir: str | os.PathLike | None = None) -> Path:
    """The cache folder: `cache_dir`, else `$LSTMJAX_CACHE`, else `~/.cache/lstmjax`."""
    chosen = cache_dir or os.environ.get("LSTMJAX_CACHE") or "~/.cache/lstmjax"
    return Path(os.path.expanduser(os.fspath(chosen)))


def cached(
    kind: str,
    key: str,
    make: Callable[[], Arrays],
    cache_dir: str | os.PathLike | None = None,
    fits: Callable[[Arrays], bool] = lambda arrays: True,
) -> Arrays:
    """The arrays of `make()`, from the cache where they are there and whole.

    Args:
      kind: first part of the file name, for people.
      key: hash of everything the arrays are made from.
      make: makes the arrays; called only when the cache has none.
      cache_dir: see `folder`.
      fits: whether arrays are such as `make` could have made: a file's hash says that it is whole,
        not who wrote it.
    """
    path = folder(cache_dir) / f"{kind}-{key[:24]}.npz"
    arrays = _read(path, key, fits)
    if arrays is None:
        arrays = make()
        _write(path, key, arrays)
    return arrays


def _read(path: Path, key: str, fits: Callable[[Arrays], bool]) -> Arrays | None:
    try:
        arrays = files.read_arrays(path)
        sha256 = str(arrays.pop("sha256"))
        whole = sha256 == content_sha256({key: arrays}) and fits(arrays)
    except Exception:  # whatever a damaged file raises, the answer is to make it again
        return None
    return arrays if whole else None


def _write(path: Path, key: str, arrays: Arrays) -> None:
    sha256 = np.array(content_sha256({key: arrays}))
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            np.savez(file, sha256=sha256, **arrays)
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
