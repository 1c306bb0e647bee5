"""A process that reads an HDF5 file and writes down what is in it: see hdf5.py, which starts it.

It is run by its path, and imports neither the package nor JAX: it starts in a fraction of a second.
What it writes to standard output is a line of JSON for each group, {"group", "attrs"}, and for
each data set of numbers, {"array", "dtype", "shape"}, followed by its bytes; at last {"end"}, or
{"error"} where there was something wrong.
"""

import contextlib
import io
import json
import mmap
import os
import re
import sys
from typing import Any, BinaryIO

import h5py
import numpy as np

ATTRIBUTES = re.compile(r"(layer_names|weight_names)\d*|model_config")  # all that is asked for
_SIGNATURE, _HEAP = b"\x89HDF\r\n\x1a\n", b"GCOL\x01\0\0\0"


def limit(megabytes: int, seconds: int) -> None:
    """Bounds the memory that this process may add to what it has, and its processor time."""
    with contextlib.suppress(ImportError):  # Windows knows no such limits
        import resource

        with contextlib.suppress(OSError, ValueError):
            with open("/proc/self/statm", encoding="ascii") as file:
                pages = int(file.read().split()[0])
            most = pages * resource.getpagesize() + megabytes * 2**20
            resource.setrlimit(resource.RLIMIT_AS, (most, most))
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def check_content(content: bytes | mmap.mmap) -> None:
    """Raises ValueError for bytes on which the HDF5 library might not end.

    Text of any length stands in global heaps: the signature "GCOL", a version, the heap's size, and
    objects of a number, a count, 4 bytes unused, the size in 8 bytes and the content, filled up to
    a multiple of 8; number 0 is what is free, to the end (HDF5 file format specification, III.E).
    An object that claims a size of 0, or more than there is, makes the library read in a circle.
    """
    if content[:8] != _SIGNATURE:
        raise ValueError("file signature not found")
    sizes = content[13:15] if content[8:9] in (b"\0", b"\1") else content[9:11]
    if sizes != b"\x08\x08":
        raise ValueError("addresses and sizes that do not take 8 bytes")
    place = content.find(_HEAP)
    while place >= 0:
        _check_heap(content, place)
        place = content.find(_HEAP, place + 1)


def _check_heap(content: bytes | mmap.mmap, place: int) -> None:
    size = int.from_bytes(content[place + 8 : place + 16], "little")
    end, position = place + size, place + 16
    if end > len(content):
        raise ValueError(f"a damaged heap at byte {place}: truncated")
    while position + 16 <= end:
        number = int.from_bytes(content[position : position + 2], "little")
        length = int.from_bytes(content[position + 8 : position + 16], "little")
        position += 16 + -(-length // 8) * 8 if number else length
        if position > end or (number == 0 and position != end):
            raise ValueError(f"a damaged heap at byte {place}")


def write_tree(opened: Any, most: int, out: BinaryIO) -> None:
    """Writes all groups and arrays of a file.

    Args:
      opened: the file.
      most: bytes that all arrays may take.
      out: where to.

    Raises:
      ValueError: links elsewhere, something in two places, data in other files, or too many of it.
    """
    groups, seen = [opened], set()
    while groups:
        group = groups.pop()
        names = [name for name in group.attrs if ATTRIBUTES.fullmatch(name)]
        attributes = {name: _text(group.attrs[name]) for name in names}
        _say(out, group=group.name, attrs=attributes, members=list(group))
        for name in group:
            if not isinstance(group.get(name, getlink=True), h5py.HardLink):
                raise ValueError(f"a link to elsewhere at {name!r}")
            below = group[name]
            address = h5py.h5o.get_info(below.id).addr
            if address in seen:
                raise ValueError(f"the same at {name!r} as in another place")
            seen.add(address)
            if isinstance(below, h5py.Group):
                groups.append(below)
            elif isinstance(below, h5py.Dataset):
                most -= _write_array(below, most, out)


def _write_array(stored: Any, most: int, out: BinaryIO) -> int:
    """Writes a data set of numbers, or of 2 opaque bytes (bfloat16); returns how many bytes."""
    dtype = stored.dtype
    if not (dtype.kind in "fiu" or (dtype.kind, dtype.itemsize) == ("V", 2)):
        return 0
    if stored.external or stored.is_virtual:
        raise ValueError(f"{stored.name} in another file")
    held = max(stored.size or 0, int(np.prod(stored.chunks or (), dtype=float))) * dtype.itemsize
    if held > most:
        raise ValueError(f"{stored.name} of {held:,} bytes, expected at most {most:,}")
    array = np.ascontiguousarray(stored)
    _say(out, array=stored.name, dtype=dtype.str, shape=array.shape)
    out.write(array.tobytes())
    return held


def _text(value: Any) -> str | list[str]:
    """An attribute of text, or of many."""
    if isinstance(value, (bytes, np.bytes_)):
        return value.decode()
    if isinstance(value, np.ndarray):
        return [_text(item) for item in value.ravel()]
    return str(value)


def _say(out: BinaryIO, **words: Any) -> None:
    out.write(json.dumps(words).encode() + b"\n")


def main() -> None:
    """Arguments: a path, or - for standard input; megabytes; seconds; bytes of all arrays."""
    path, *numbers = sys.argv[1:]
    megabytes, seconds, most = map(int, numbers)
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no part of the answer
    limit(megabytes, seconds)
    try:
        with open(path, "rb") if path != "-" else io.BytesIO(sys.stdin.buffer.read()) as file:
            if path == "-":
                check_content(file.getbuffer().tobytes())
            elif os.fstat(file.fileno()).st_size == 0:
                check_content(b"")
            else:
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                    check_content(content)
            with h5py.File(file if path == "-" else path, "r") as opened:
                write_tree(opened, most, out)
        _say(out, end=True)
    except MemoryError:
        _say(out, error=f"more memory than {megabytes:,} MiB")
    except Exception as error:  # h5py raises what it likes
        _say(out, error=str(error).partition("\n")[0] or type(error).__name__)
    out.flush()
    os._exit(0)  # a damaged file may keep the library from closing


if __name__ == "__main__":
    main()
