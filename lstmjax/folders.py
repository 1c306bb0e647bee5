"""What a run owns: files written whole or not at all, folders new or empty and held by one process.

Nothing here overwrites what a user has made: a folder that is not empty is refused, and of two
processes that are given the same new folder one gets it.
"""

import errno
import os
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any


class RunError(RuntimeError):
    """A run folder or a record that cannot be written or read; the message is one clear line."""


class RunStopped(RuntimeError):
    """A run that was asked to end and has saved itself; the message says how to go on."""


# ---- files ---------------------------------------------------------------------------------------


def write_file(path: str | os.PathLike, data: bytes) -> None:
    """Writes a whole file or none: to a temporary name beside it, then renamed over it.

    The content is on the disk before it gets its name: a power cut leaves the old or the new file.

    Raises:
      RunError: the folder cannot be written to, the disk is full; a file that was there stays as it
        was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            to_disk(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise RunError(f"cannot write {path}: {error.strerror}") from error
        raise


def to_disk(number: int) -> None:
    """Waits until what was written to an open file is on the disk, where files can say so."""
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise


# ---- folders -------------------------------------------------------------------------------------


def fresh_folder(root: Path, experiment: str) -> Path:
    """Makes `root/<experiment>-<date>-<time>`, or the first of `-2`, `-3` … not yet taken."""
    root.mkdir(parents=True, exist_ok=True)
    name = f"{experiment}-{datetime.now():%Y%m%d-%H%M%S}"
    number = 1
    while True:
        path = root / (name if number == 1 else f"{name}-{number}")
        with suppress(FileExistsError):
            path.mkdir()
            return path
        number += 1


def hold(folder: Path) -> Any:
    """Locks a folder by its config.json, for as long as the file that is returned stays open.

    Raises:
      RunError: another process holds it.
    """
    try:
        import fcntl
    except ImportError:  # not on Windows
        return None
    lock = open(folder / "config.json", "rb")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.close()
        raise RunError(f"{folder} is in use by another process") from error
    except OSError:  # a file system without locks
        pass
    return lock


def claim(path: Path, data: bytes) -> None:
    """Writes a file that must not be there yet: of two processes one gets the folder.

    Raises:
      RunError: it is there, or cannot be written.
    """
    own = path.with_name(f".{path.name}.{os.getpid()}.claim")
    write_file(own, data)
    try:
        os.link(own, path)
    except FileExistsError as error:
        raise RunError(f"--out: {path.parent} is in use by another process") from error
    except OSError:  # a file system without links
        write_file(path, data)
    finally:
        own.unlink(missing_ok=True)


def empty_folder(path: Path) -> Path:
    """Makes the folder the user asked for; what is in it already is never touched."""
    if path.exists() and not path.is_dir():
        raise RunError(f"--out: {path} is a file, expected an empty folder or a new one")
    if path.is_dir() and any(path.iterdir()):
        raise RunError(f"--out: {path} exists and is not empty: choose another --out")
    path.mkdir(parents=True, exist_ok=True)
    return path
