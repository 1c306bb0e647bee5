"""A folder of files with their hashes: written whole, never over anything, and checked strictly.

`SHA256SUMS` is written last, so that a folder without it is one that was not finished. Its form is
that of the tool sha256sum, one line for each file.
"""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

from lstmjax.data import files
from lstmjax.records import RunError, write_file

SUMS = "SHA256SUMS"
SUMS_BYTES = 2**20
_LINE = re.compile(r"([0-9a-f]{64})  ([A-Za-z0-9_][A-Za-z0-9._-]*)")


def check_empty(out: Path) -> None:
    """Raises RunError unless a folder is empty or not there."""
    if out.exists() and not out.is_dir():
        raise RunError(f"--out: {out} is a file, expected a folder, new or empty")
    if out.is_dir() and any(out.iterdir()):
        raise RunError(f"--out: {out} exists and is not empty: choose another --out")


def write(out: Path, content: Mapping[str, bytes]) -> None:
    """Writes files, by name, into an empty folder, and their hashes when they are all there.

    Raises:
      RunError: something is in the folder, or it cannot be written.
    """
    check_empty(out)
    out.mkdir(parents=True, exist_ok=True)
    for name, data in content.items():
        write_file(out / name, data)
    write_file(
        out / SUMS, _text({n: hashlib.sha256(data).hexdigest() for n, data in content.items()})
    )


def check(folder: Path) -> list[str]:
    """The files of a folder, every one of them as it was written, and no others.

    Raises:
      RunError: a file is missing, was changed, was added, or is no plain file; it is named.
    """
    hashes = _hashes(folder)
    there = {path.name: path for path in folder.iterdir() if path.name != SUMS}
    for name in sorted(hashes.keys() | there.keys()):
        if name not in there:
            raise RunError(f"{folder}: {name} is missing")
        if name not in hashes:
            raise RunError(f"{folder}: {name} is not in {SUMS}")
        path = there[name]
        if path.is_symlink() or not path.is_file():
            raise RunError(f"{path} is no plain file")
        with open(path, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != hashes[name]:
                raise RunError(f"{path} is not as it was written: its sha256 differs")
    return list(hashes)


def _hashes(folder: Path) -> dict[str, str]:
    """What `SHA256SUMS` says: the hash of each file."""
    path = folder / SUMS
    try:
        content = files.read_bytes(path, SUMS_BYTES)
        lines = [_LINE.fullmatch(line) for line in content.decode("ascii").splitlines()]
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise RunError(f"{path} is damaged: {files.reason(error)}") from error
    found = {line[2]: line[1] for line in lines if line}
    if not found or content != _text(found):
        raise RunError(f"{path} is damaged: expected a hash and a name in each line, and no more")
    return found


def _text(hashes: Mapping[str, str]) -> bytes:
    return "".join(f"{digest}  {name}\n" for name, digest in hashes.items()).encode()
