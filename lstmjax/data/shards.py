"""What can be said of a prepared TFDS folder before TFDS opens it.

TFDS imports whatever module `features.json` names and reads as many records as `dataset_info.json`
promises; the array_record library allocates what the chunks of a file claim to unpack to. So all
three are looked at first.

An array_record file consists of Riegeli chunks: a header of 40 bytes (hash of the header, size of
the data, hash of the data, kind and number of records, size of the data when unpacked; each takes 8
bytes, little-endian), then the data. At every multiple of 64 KiB a block header of 24 bytes
interrupts whatever stands there (Riegeli/records file format, 2019).
"""

import mmap
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lstmjax.data import files

TEXT_BYTES = 2**20
UNPACKED_BYTES = 2**28  # of one split; those of the reviews take 36 MB
_BLOCK, _BLOCK_HEADER, _CHUNK_HEADER = 2**16, 24, 40
_ROOM = _BLOCK - _BLOCK_HEADER
_KINDS = b"srp"  # signature, records, padding

_MODULE = "tensorflow_datasets.core.features."
_DICT = f"{_MODULE}features_dict.FeaturesDict"
_LABEL = f"{_MODULE}class_label_feature.ClassLabel"
FEATURES = {
    "imdb_reviews": {"text": f"{_MODULE}text_feature.Text", "label": _LABEL},
    "mnist": {"image": f"{_MODULE}image_feature.Image", "label": _LABEL},
}
_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"


def check_features(name: str, folder: Path) -> None:
    """Raises ValueError unless `features.json` describes the features of that data set.

    It and what else TFDS reads beside the shards must be small plain files.
    """
    for path in (*folder.glob("*.json"), *folder.glob("*.txt")):
        if not path.is_file() or path.stat().st_size > TEXT_BYTES:
            raise ValueError(f"{path.name} is no plain file of at most {TEXT_BYTES:,} bytes")
    value = files.read_json(folder / "features.json")
    try:
        inner = value["featuresDict"]["features"]
        found = {feature: entry["pythonClassName"] for feature, entry in inner.items()}
        named = [value["pythonClassName"], *found.values()]
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError("features.json does not describe features") from error
    if found != FEATURES[name] or named[0] != _DICT or len(_classes(value)) != len(named):
        raise ValueError(f"features.json does not describe {name}")


def _classes(value: Any) -> list[Any]:
    """Everything in a JSON value that TFDS might take for the name of a class."""
    if isinstance(value, list):
        return [one for item in value for one in _classes(item)]
    if not isinstance(value, dict):
        return []
    own = [value[key] for key in ("pythonClassName", "python_class_name", "type") if key in value]
    return own + _classes(list(value.values()))


def check_split(name: str, split: str, info: Any, shards: Sequence[Path]) -> None:
    """Raises ValueError unless `dataset_info.json` says of a split what its files hold.

    Args:
      name: the data set.
      split: the split.
      info: the value in `dataset_info.json`.
      shards: the files of the split.
    """
    try:
        entries = [one for one in info["splits"] if one["name"] == split]
        lengths = [int(length) for one in entries for length in one["shardLengths"]]
        template = {one.get("filepathTemplate", _TEMPLATE) for one in entries}
        said = info["name"]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"dataset_info.json does not describe {split}") from error
    if said != name or len(entries) != 1 or template != {_TEMPLATE}:
        raise ValueError(f"dataset_info.json does not describe {split} of {name}")
    if len(lengths) != len(shards) or min(lengths) < 0:
        raise ValueError(f"{split} has {len(shards)} files, and lengths for {len(lengths)}")
    held = [chunk_sizes(shard) for shard in shards]
    if sum(unpacked for _, unpacked in held) > UNPACKED_BYTES:
        raise ValueError(f"{split} unpacks to more than {UNPACKED_BYTES:,} bytes")
    for length, shard, (records, _) in zip(lengths, shards, held, strict=True):
        if length > records:
            raise ValueError(f"{shard.name} has fewer than {length} records")


def chunk_sizes(path: str | os.PathLike) -> tuple[int, int]:
    """(records, bytes of them unpacked) that the chunks of an array_record file claim to hold.

    Raises:
      OSError: it cannot be read.
      ValueError: a chunk that does not fit into the file, or is of a kind that array_record does
        not write.
    """
    records = unpacked = position = 0
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        while position < len(content):
            header = _read(content, position, _CHUNK_HEADER)
            _, size, _, kind, claimed = struct.unpack("<5Q", header)
            kind, count = kind & 0xFF, kind >> 8
            end = max(_after(position, _CHUNK_HEADER + size), _boundary(position + count))
            if kind not in _KINDS or end > len(content):
                raise ValueError(f"{Path(path).name} holds no chunk at byte {position}")
            records, unpacked, position = records + count, unpacked + claimed, end
    return records, unpacked


def _read(content: mmap.mmap, position: int, size: int) -> bytes:
    """`size` bytes from `position` on, without the block header that may interrupt them."""
    if position % _BLOCK == 0:
        position += _BLOCK_HEADER
    room = _BLOCK - position % _BLOCK
    found = content[position : position + min(size, room)]
    if size > room:
        rest = position + room + _BLOCK_HEADER
        found += content[rest : rest + size - room]
    if len(found) < size:
        raise ValueError(f"it ends within the chunk at byte {position}")
    return found


def _after(position: int, size: int) -> int:
    """Where `size` bytes end that begin at `position`, block headers among them."""
    blocks = (size + (position + _ROOM - 1) % _BLOCK) // _ROOM
    return position + size + blocks * _BLOCK_HEADER


def _boundary(position: int) -> int:
    """The first place from `position` on that does not lie within a block header."""
    inside = position % _BLOCK
    return position + (_BLOCK_HEADER - inside if 0 < inside < _BLOCK_HEADER else 0)
