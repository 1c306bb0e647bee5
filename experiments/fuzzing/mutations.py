"""Valid files made invalid: random changes to bytes, and to what a format keeps in them.

Everything comes from one `random.Random`, so that an input can be made again from its number.
"""

import contextlib
import copy
import gzip
import io
import json
import re
import struct
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

from lstmjax.records import RunError

Files = dict[str, bytes]  # a folder: the content of each file by its path

# What tends to be believed: bounds of integers, and what is no number.
NUMBERS = (0, 1, -1, 2, 255, 2**15, 2**16, 2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64)
BOMB = 2**26  # bytes that all are zero
WORDS = (
    b"", b"\0", b"../../outside", b"/etc/passwd", b"..", b"\xff\xfe", b"\xed\xa0\x80", b"nan",
    b"-1", b"[" * 5000, b"{" * 50, b'"', b"9" * 5000, b"1e999", b"NaN", b"\r\n", b"%s%n", b"\\u00",
    b"c__builtin__\neval\n", b"\x80\x04cposix\nsystem\n", "Σİ😀\u202e".encode(), b"A" * 70000,
)  # fmt: skip
VALUES = (
    None, True, False, 0, -1, 1, 7, 2**31, 2**63, 10**400, -(10**400), 0.5, -0.0, 1e308,
    float("nan"), float("inf"), "", "nan", "-inf", "a", "../../outside", "/dev/zero", "\0",
    "\ud800", "9" * 5000, "x" * 70000, [], {}, [[]], [None], [1, "a"], {"": {}}, {"a": None},
    [[[[[[[[[[[[1]]]]]]]]]]]],
)  # fmt: skip


class Again(RunError):
    """What is no error of the reader: there is nothing to be read here."""


def written(files: Files, folder: Path) -> Path:
    """Puts files into a new folder; returns the folder."""
    folder.mkdir(parents=True)
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def taken(folder: Path) -> Files:
    """What a folder holds."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """An empty folder."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def mutated(draw: Random, files: Files, others: Sequence[Files], formats: "Formats") -> Files:
    """A folder with one to three changes in it.

    Args:
      draw: where all choices come from.
      files: a valid folder.
      others: more of them, to take parts from.
      formats: what is known of the formats, by the ends of the files' names.

    Returns:
      Another folder; `files` stays as it is.
    """
    files = dict(files)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        name = draw.choice(sorted(files)) if files else "new"
        chance = draw.random()
        if chance < 0.03:
            files.pop(name, None)
        elif chance < 0.06:
            files[name] = draw.choice([*files.values(), b""])
        else:
            spare = [other[name] for other in others if name in other]
            files[name] = changed(draw, name, files.get(name, b""), spare, formats)
    return files


def changed(
    draw: Random, name: str, content: bytes, spare: Sequence[bytes], formats: "Formats"
) -> bytes:
    """A file's content with a change to what its format keeps, or to its bytes."""
    for end, (change, share) in formats.items():
        if name.endswith(end) and draw.random() < share:
            try:
                return change(draw, content)
            except Exception:  # it was changed before and is no such file any more
                break
    return changed_bytes(draw, content, spare)


def changed_bytes(draw: Random, content: bytes, spare: Sequence[bytes] = ()) -> bytes:
    """Bits flipped, numbers set, parts cut out or off, put in, doubled, or taken from elsewhere."""
    data = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 1, 2, 3, 10))):
        at = draw.randrange(len(data) + 1)
        to = min(len(data), at + draw.choice((1, 2, 8, 64, 512, 4096)))
        kind = draw.choice(
            "flip flip flip number number number cut cut off in in more from".split()
        )
        if kind == "flip" and data:
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        elif kind == "number":
            size, order = draw.choice((1, 2, 4, 8)), draw.choice(("little", "big"))
            number = draw.choice((*NUMBERS, len(data), draw.randrange(len(data) + 1)))
            data[at : at + size] = (number % 256**size).to_bytes(size, order)
        elif kind == "off":
            del data[at:]
        elif kind == "cut":
            del data[at:to]
        elif kind == "in":
            data[at:at] = draw.choice((*WORDS, draw.randbytes(draw.randrange(1, 200))))
        elif kind == "more":
            data[at:at] = data[at:to] * draw.choice((1, 2, 50))
        else:
            source = draw.choice([bytes(data), draw.randbytes(to - at), *spare])
            start = draw.randrange(len(source) + 1)
            data[at:to] = source[start : start + to - at]
    return bytes(data)


# ---- JSON ---------------------------------------------------------------------------------------


def changed_json(draw: Random, content: bytes) -> bytes:
    """A value of a JSON text replaced, taken out, put in twice or elsewhere."""
    value = json.loads(content)
    for _ in range(draw.choice((1, 1, 2, 5))):
        value = _changed_value(draw, value)
    text = json.dumps(value)
    if draw.random() < 0.03:  # deeper than any parser goes
        text = text.replace("1", "[" * 100_000, 1)
    return text.encode()


def _changed_value(draw: Random, value: Any) -> Any:
    places = list(_places(value))
    if not places:
        return copy.deepcopy(draw.choice(VALUES))
    inside, key = draw.choice(places)
    kind = draw.randrange(6)
    if kind <= 2:
        inside[key] = copy.deepcopy(draw.choice(VALUES))  # it may be changed again
    elif kind == 3:
        del inside[key]
    elif kind == 4:
        other, there = draw.choice(places)
        inside[key] = json.loads(json.dumps(other[there]))  # a copy: no value lies within itself
    elif isinstance(inside, dict):
        name = draw.choice(("", "a/b", "..", "0", "\0", str(key) + "x", "x" * 1000))
        inside[name] = inside.pop(key)
    elif isinstance(inside[key], (int, float)):
        inside[key] = draw.choice(NUMBERS)
    return value


def _places(value: Any) -> Any:
    """Every (dict or list, key or index) within a JSON value."""
    if not isinstance(value, (dict, list)):
        return
    for key, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
        yield value, key
        yield from _places(item)


# ---- archives -----------------------------------------------------------------------------------


def changed_zip(draw: Random, content: bytes, formats: "Formats") -> bytes:
    """A zip with a member changed, renamed, left out, put in twice or made huge."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    at = draw.randrange(len(members))
    name, data = members[at]
    kind = draw.randrange(20)
    if kind < 15:
        members[at] = name, changed(draw, name, data, (), formats)
    elif kind == 15:
        del members[at]
    elif kind == 16:
        members.append((name + draw.choice(("", "x")), data))
    elif kind == 17:
        members[at] = draw.choice(("../../outside", "/outside", "", name.upper())), data
    elif kind == 18 and draw.random() < 0.1:
        members[at] = name, data[:128] + bytes(BOMB)
    packing = draw.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, 12, 14))
    if any(len(data) >= BOMB for _, data in members):
        packing = zipfile.ZIP_DEFLATED
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", packing) as archive:
        for name, data in members:
            archive.writestr(zipfile.ZipInfo(name), data, packing)
    return packed.getvalue()


def changed_npy(draw: Random, content: bytes) -> bytes:
    """An .npy file whose header says something else: another shape, dtype or version."""
    size = struct.unpack_from("<H", content, 8)[0]
    header, data = content[10 : 10 + size].decode("latin1"), content[10 + size :]
    kind = draw.randrange(4)
    if kind == 0:
        shape = tuple(draw.choice(NUMBERS) for _ in range(draw.randrange(5)))
        header = re.sub(r"\([^)]*\)", str(shape), header)
    elif kind == 1:
        dtypes = ("|O", "<U999999999", "|V8", "<f8", "|b1", "<M8[s]", "|S0", ">i4", "<c16", "x", "")
        header = re.sub(r"'descr': '[^']*'", f"'descr': {draw.choice(dtypes)!r}", header)
    elif kind == 2:
        header = changed_bytes(draw, header.encode("latin1")).decode("latin1")[:60000]
    else:
        data = draw.choice((b"", data[:-1], data * 2, b"\x80\x04cos\nsystem\n(S'true'\ntR."))
    version = draw.choice((b"\1\0", b"\1\0", b"\1\0", b"\2\0", b"\3\0", b"\x09\0"))
    length = struct.pack("<H" if version == b"\1\0" else "<I", len(header))
    return content[:6] + version + length + header.encode("latin1") + data


def changed_gzip(draw: Random, content: bytes, change: Callable[[Random, bytes], bytes]) -> bytes:
    """What is packed is changed, and packed again."""
    inner = gzip.decompress(content)
    if draw.random() < 0.005:
        inner = inner[: draw.randrange(len(inner) + 1)] + bytes(BOMB)
    else:
        inner = change(draw, inner)
    return gzip.compress(inner, compresslevel=1, mtime=0)


def changed_png(draw: Random, content: bytes) -> bytes:
    """A PNG with a chunk changed, left out or put in twice, its checksum right or wrong."""
    chunks, at = [], 8
    while at < len(content):
        (size,) = struct.unpack_from(">I", content, at)
        chunks.append((content[at + 4 : at + 8], content[at + 8 : at + 8 + size]))
        at += 12 + size
    at = draw.randrange(len(chunks))
    name, data = chunks[at]
    kind = draw.randrange(8)
    if kind == 0:
        del chunks[at]
    elif kind == 1:
        chunks.insert(draw.randrange(len(chunks) + 1), (name, data))
    elif kind == 2:
        chunks[at] = draw.choice((b"IHDR", b"PLTE", b"tRNS", b"zTXt", b"iCCP", b"acTL")), data
    elif name == b"IDAT" and kind <= 5:  # what is packed is changed, and packed again
        pixels = changed_bytes(draw, zlib.decompress(data))
        chunks[at] = name, zlib.compress(bytes(BOMB) if draw.random() < 0.01 else pixels)
    else:
        chunks[at] = name, changed_bytes(draw, data)
    wrong = draw.random() < 0.1
    return content[:8] + b"".join(
        struct.pack(">I", len(data))
        + name
        + data
        + struct.pack(">I", zlib.crc32(name + data) ^ wrong)
        for name, data in chunks
    )


def changed_tar(draw: Random, content: bytes) -> bytes:
    """A tar with a header that says something else, its checksum right or wrong."""
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        at = draw.choice([member.offset for member in archive])
    header, rest = bytearray(content[at : at + 512]), content[at + 512 :]
    kind = draw.randrange(6)
    sizes = (0, 1, 511, 513, 2**20 + 1, 2**32, 8**11 - 1)
    if kind == 0:
        header[124:136] = b"%011o\0" % draw.choice(sizes)
    elif kind == 1:  # in base 256: up to 2^88, or below 0
        header[124:136] = draw.choice((b"\x80", b"\xff")) + draw.randbytes(11)
    elif kind == 2:
        header[156:157] = draw.choice((b"1", b"2", b"3", b"4", b"6", b"x", b"g", b"L", b"K", b"S"))
    elif kind == 3:
        names = (b"/etc/outside", b"../../outside", b"aclImdb/../../outside.txt", b"\xff", b"")
        header[:100] = draw.choice(names).ljust(100, b"\0")
    elif kind == 4:
        header[157:257] = draw.choice((b"/etc/passwd", b"../outside")).ljust(100, b"\0")
        header[156:157] = draw.choice((b"1", b"2"))
    else:
        header[:] = changed_bytes(draw, bytes(header)).ljust(512, b"\0")[:512]
    if draw.random() < 0.9:
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
    return content[:at] + bytes(header) + rest


def changed_safetensors(draw: Random, content: bytes) -> bytes:
    """Weights whose header, a JSON text after its size in 8 bytes, says something else."""
    (size,) = struct.unpack_from("<Q", content)
    header = changed_json(draw, content[8 : 8 + size])
    claimed = draw.choice(NUMBERS) % 2**64 if draw.random() < 0.1 else len(header)
    return struct.pack("<Q", claimed) + header + content[8 + size :]


# By the end of a file's name: what changes what it keeps, and how often that is to be done.
Formats = dict[str, tuple[Callable[[Random, bytes], bytes], float]]
