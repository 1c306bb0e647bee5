"""TensorBoard's event files: what is written to them, and how, so that no half of it is left.

The framing is written out here because the SummaryWriter of tensorboardX writes from a thread,
which dies of a full disk and then blocks its caller for ever.
"""

import os
import struct
import time
from contextlib import suppress
from typing import Any


def first() -> bytes:
    """What an event file begins with."""
    from tensorboardX.proto.event_pb2 import Event

    return _tfrecord(Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString())


def summary(step: int, values: list[dict[str, Any]]) -> bytes:
    """Summary values of a step, each with a tag and a simple_value or an image."""
    from tensorboardX.proto.event_pb2 import Event

    event = Event(wall_time=time.time(), step=step, summary={"value": values})
    return _tfrecord(event.SerializeToString())


def append_whole(file: Any, line: bytes) -> None:
    """Appends a line to an unbuffered file, whole or not at all."""
    start = file.seek(0, os.SEEK_END)
    try:
        while line:  # a disk that fills up takes half a line first, and tells with the next write
            line = line[file.write(line) :]
    except OSError:
        with suppress(OSError):
            file.truncate(start)
        raise


def _tfrecord(data: bytes) -> bytes:
    """Data framed as a TFRecord: length, the length's checksum, data, the data's checksum."""
    from tensorboardX.crc32c import crc32c

    def masked(part: bytes) -> bytes:
        crc = crc32c(part)
        return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)

    length = struct.pack("<Q", len(data))
    return length + masked(length) + data + masked(data)
