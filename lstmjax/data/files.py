"""Files that may hold anything: read up to a bound, as bytes, as strict JSON or as arrays.

Nothing that is read here is ever unpickled, and nothing takes more memory than a bound that the
caller knows, whatever sizes the file claims to have. What is wrong with a file is an `OSError` or a
`ValueError`; `reason` says it in one line.
"""

import io
import json
import math
import os
import stat
import zipfile
from typing import Any

import numpy as np

JSON_BYTES = 2**26
ARRAY_KINDS = "biufcSU"  # numbers and text; "O" would need pickle, "V" and "mM" nobody writes here
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


def read_bytes(path: str | os.PathLike, most: int) -> bytes:
    """The content of a plain file of at most `most` bytes.

    Raises:
      OSError: it cannot be opened or read.
      ValueError: it is larger, or no plain file: a pipe or a device may never end.
    """
    if not stat.S_ISREG(os.stat(path).st_mode) and not os.path.isdir(path):
        raise ValueError("it is no plain file")
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size > most:
            raise ValueError(f"it is larger than {most:,} bytes")
        return file.read()


def read_json(path: str | os.PathLike, most: int = JSON_BYTES) -> Any:
    """The value in a JSON file, as `parse_json` reads it; raises as `read_bytes` does, too."""
    return parse_json(read_bytes(path, most))


def parse_json(content: bytes) -> Any:
    """A JSON value of finite 64-bit numbers and whole characters, in UTF-8.

    Raises:
      ValueError: anything else, however deeply it is nested.
    """
    try:
        value = json.loads(
            content.decode(), parse_int=_integer, parse_float=_float, parse_constant=_float
        )
        json.dumps(value, ensure_ascii=False).encode()  # half a character cannot be written again
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    return value


def _integer(text: str) -> int:
    if len(text) > 20 or not -(2**63) <= int(text) < 2**63:
        raise ValueError(f"the number {text[:20]}… does not fit into 64 bits")
    return int(text)


def _float(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]} is no finite number")
    return number


def read_arrays(path: str | os.PathLike, most: int = 2**33) -> dict[str, np.ndarray]:
    """The arrays of an .npz file, by name.

    An array takes the bytes that its header says it takes, and no more than there are: a header
    that promises more is an error before anything is allocated. All together they take at most
    what `unpacked` allows for the size of the file.

    Raises:
      OSError: the file cannot be read.
      ValueError: it is larger than `most` bytes, or no such file, or holds anything but numbers
        and text.
    """
    archive = io.BytesIO(read_bytes(path, most))
    try:
        with zipfile.ZipFile(archive) as members:
            check_unpacked(members, archive.getbuffer().nbytes)
            names = [info.filename.removesuffix(".npy") for info in members.infolist()]
            if len(set(names)) < len(names):
                raise ValueError("two arrays have the same name")
            return {
                name: _array(members.read(info))
                for name, info in zip(names, members.infolist(), strict=True)
            }
    # zipfile says NotImplementedError or RuntimeError of what it cannot unpack, NumPy and zlib
    # raise what they like: their words are all that is needed.
    except Exception as error:
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error


def _array(stored: bytes) -> np.ndarray:
    """The array in the bytes of an .npy file."""
    file = io.BytesIO(stored)
    version = np.lib.format.read_magic(file)
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in readers:
        raise ValueError(f"an array in format {version}, expected 1.0 or 2.0")
    shape, _, dtype = readers[version](file)
    if dtype.kind not in ARRAY_KINDS or dtype.itemsize == 0:
        raise ValueError(f"an array of {dtype}, expected numbers or text")
    held = len(stored) - file.tell()
    sizes = all(0 <= size < 2**31 for size in shape)
    if not sizes or math.prod(shape) * dtype.itemsize != held:
        raise ValueError(f"an array of {dtype}{list(shape)} in {held} bytes")
    return np.load(io.BytesIO(stored), allow_pickle=False)


def unpacked(packed: int) -> int:
    """How many bytes a file of `packed` bytes may unpack to: 16 MiB, and 20 times its size.

    Weights and ids shrink by a factor of 1 to 10; a file made to exhaust memory, by 1,000.
    """
    return 2**24 + 20 * packed


def check_unpacked(archive: zipfile.ZipFile, packed: int) -> None:
    """Raises ValueError for a zip whose members claim more than `unpacked(packed)` in all.

    None of them gives more than it claims: zipfile stops there, with the two methods allowed here.
    """
    if any(info.compress_type not in METHODS for info in archive.infolist()):
        raise ValueError("it is packed by another method than deflate")
    claimed = sum(info.file_size for info in archive.infolist())
    if claimed > unpacked(packed):
        raise ValueError(f"{packed:,} bytes that unpack to {claimed:,}")


def reason(error: BaseException) -> str:
    """What an `OSError` or a `ValueError` says, in one line."""
    return " ".join(str(getattr(error, "strerror", None) or error).split())
