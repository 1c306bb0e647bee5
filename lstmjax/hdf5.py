"""What is looked at in an HDF5 file before its content is believed.

The HDF5 library follows links into other files, allocates what a data set claims to hold, and does
not come back from some damaged heaps. A file that Keras wrote is a tree of groups and plain data
sets in one file, and that can be told first.
"""

import mmap
import os
import struct
from typing import Any

import numpy as np

from lstmjax.data import files

_SIGNATURE, _HEAP = b"\x89HDF\r\n\x1a\n", b"GCOL\x01\0\0\0"


def check_file(file: Any) -> None:
    """``check_content`` of an open file, without reading all of it into memory."""
    if os.fstat(file.fileno()).st_size == 0:
        check_content(b"")
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        check_content(content)


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
        number, _, _, length = struct.unpack_from("<HHIQ", content, position)
        taken = 16 + -(-length // 8) * 8 if number else length
        position += taken  # 16 or more, or to the end
        if position > end or (number == 0 and position != end):
            raise ValueError(f"a damaged heap at byte {place}")


def check_tree(h5py: Any, opened: Any) -> None:
    """Raises ValueError unless a file is a tree: no links elsewhere, nothing in two places.

    Args:
      h5py: the module.
      opened: a group, with all that lies below it.
    """
    groups, seen = [opened], set()
    while groups:
        group = groups.pop()
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


def read_array(stored: Any) -> np.ndarray:
    """A data set as an array of numbers; one of 2 opaque bytes is left so, for bfloat16.

    Args:
      stored: an h5py data set.

    Raises:
      ValueError: it is none, not of numbers, larger, or lies in other files.
    """
    dtype = getattr(stored, "dtype", None)
    if dtype is None or not (dtype.kind in "fiu" or (dtype.kind, dtype.itemsize) == ("V", 2)):
        raise ValueError(f"{stored.name} of {dtype}, expected numbers")
    if stored.external or stored.is_virtual:
        raise ValueError(f"{stored.name} in another file")
    held = max(stored.size or 0, int(np.prod(stored.chunks or (), dtype=float))) * dtype.itemsize
    most = files.unpacked(stored.file.id.get_filesize())
    if held > most:
        raise ValueError(f"{stored.name} of {held:,} bytes, expected at most {most:,}")
    return np.asarray(stored)
