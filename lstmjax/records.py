"""The record of a run: what was run, on what, with which versions, and what came out.

A run folder holds `config.json` (written at the start), `metrics.jsonl` (a line per logged step),
figures, TensorBoard events and, only where the run came to its end, `record.json`. Records that are
worth keeping are collected into `experiments/results/`, and every number in BENCHMARKS.md and
README.md is written from there by `lstmjax.tables`:

    python -m lstmjax.records collect runs/imdb-20260102-030405
    python -m lstmjax.records table

JSON knows neither NaN nor infinity, so they are written as the strings "nan", "inf" and "-inf"
(`float()` reads them).
"""

import dataclasses
import json
import math
import os
import struct
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lstmjax.provenance import command_line, environment, git_state, params_sha256, without_folders
from lstmjax.schema import DATASET, validate

__all__ = [
    "Run",
    "RunError",
    "command_line",
    "environment",
    "params_sha256",
    "plain",
    "to_json",
    "validate",
    "write_file",
]


# Settings in which runs of one row of BENCHMARKS.md may differ.
_FREE = ("seed", "out", "devices", "live")


class RunError(RuntimeError):
    """A run folder or a record that cannot be written or read; the message is one clear line."""


# ---- writing ------------------------------------------------------------------------------------


def write_file(path: str | os.PathLike, data: bytes) -> None:
    """Writes a whole file or none: to a temporary name beside it, then renamed over it.

    Raises:
      RunError: the folder cannot be written to, the disk is full; a file that was there stays as it
        was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise RunError(f"cannot write {path}: {error.strerror}") from error
        raise


def plain(value: Any, name: str = "value") -> Any:
    """The value in JSON's types: dataclasses and mappings to dicts, arrays to lists.

    Non-finite floats become "nan", "inf", "-inf". Raises ValueError, naming `name`, for what has no
    place in JSON.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return {f.name: plain(getattr(value, f.name), f"{name}.{f.name}") for f in fields}
    if isinstance(value, Mapping):
        return {str(key): plain(item, f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, f"{name}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, os.PathLike):
        return str(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else str(float(value))
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, (np.ndarray, np.generic, jax.Array)):
        array = np.asarray(value)
        # bfloat16 and its like are no floats to NumPy: `item` alone would leave them as they are.
        return plain(array.tolist() if array.dtype.kind in "biuf" else array.astype(float).tolist())
    raise ValueError(
        f"{name}: got {type(value).__name__}, expected numbers, text, lists or mappings"
    )


def to_json(value: Any) -> bytes:
    """The value as indented JSON in UTF-8, keys in the order given, a newline at the end."""
    return (json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


# ---- the run folder -----------------------------------------------------------------------------


class Run:
    """One run's folder, made by `Run.create`.

    A context manager: an exception leaves the folder with what was logged, and no record.json.

    Attributes:
      path: the folder.
      experiment: the experiment's name.
      config: the configuration in JSON's types.
    """

    def __init__(self, path: Path, experiment: str, config: dict[str, Any]):
        self.path = path
        self.experiment = experiment
        self.config = config
        # The code as it is now, when it has just been imported: it may be edited during a long run.
        self._code = git_state()
        self._metrics = None
        self._events = None

    @classmethod
    def create(
        cls,
        experiment: str,
        config: Any,
        *,
        out: str | None = None,
        root: str | os.PathLike = "runs",
    ) -> "Run":
        """Makes the run's folder and writes `config.json` into it.

        Args:
          experiment: a short name, part of the folder's name.
          config: a dataclass or a mapping.
          out: the folder; it must be empty or not exist. None makes
            `root/<experiment>-<date>-<time>`, with `-2`, `-3` … where that is taken.
          root: where the folders of runs without `out` go.

        Raises:
          RunError: `out` is not empty, is no folder, or cannot be written to.
        """
        settings = plain(config, "config")
        if not isinstance(settings, dict):
            kind = type(config).__name__
            raise ValueError(f"config: got {kind}, expected a dataclass or a mapping")
        try:
            path = _empty_folder(Path(out)) if out else _fresh_folder(Path(root), experiment)
        except OSError as error:
            raise RunError(f"cannot make the folder {error.filename}: {error.strerror}") from error
        write_file(path / "config.json", to_json(settings))
        return cls(path, experiment, settings)

    def log(self, step: int, **scalars: Any) -> None:
        """Adds a line `{"step": step, **scalars}` to metrics.jsonl, and to the TensorBoard events.

        Raises:
          ValueError: a value is not one number.
          RunError: the line cannot be written; the lines before it stay whole.
        """
        for name, value in scalars.items():
            if isinstance(value, str) or np.ndim(value) != 0:
                raise ValueError(f"{name}: got {value!r}, expected one number")
        line = plain({"step": int(step), **scalars})
        values = [{"tag": k, "simple_value": float(v)} for k, v in line.items() if k != "step"]
        try:
            if self._metrics is None:
                self._metrics = open(self.path / "metrics.jsonl", "ab", buffering=0)
            _append_whole(self._metrics, json.dumps(line, allow_nan=False).encode() + b"\n")
            self._write_events(step, values)
        except OSError as error:
            raise RunError(f"cannot write to {self.path}: {error.strerror}") from error

    def figure(self, name: str, fig: Any, step: int = 0) -> Path:
        """Saves a matplotlib Figure as `<name>.png` and to the TensorBoard events; closes it.

        Returns:
          The path of the image.
        """
        buffer = BytesIO()
        fig.savefig(buffer, format="png")
        png = buffer.getvalue()
        write_file(self.path / f"{name}.png", png)
        width, height = struct.unpack(">II", png[16:24])  # where a PNG file keeps its size
        image = {"encoded_image_string": png, "width": width, "height": height, "colorspace": 4}
        try:
            self._write_events(step, [{"tag": name, "image": image}])
        except OSError as error:
            raise RunError(f"cannot write to {self.path}: {error.strerror}") from error
        # Only a figure made by pyplot has anything to close, and pyplot is not imported for it.
        if "matplotlib.pyplot" in sys.modules:
            sys.modules["matplotlib.pyplot"].close(fig)
        return self.path / f"{name}.png"

    def finish(
        self,
        *,
        dataset: Any,
        metrics: Mapping[str, Any],
        seconds: Mapping[str, float],
        params_sha256: str,
        seed: int,
        devices: Sequence[Any] | int | None = None,
        row: str | None = None,
    ) -> dict[str, Any]:
        """Writes `record.json` and closes the folder.

        Args:
          dataset: a mapping or an object with `name`, `source` ("tfds", "offline" or "generated")
            and `sha256`.
          metrics: numbers, or lists of numbers (one for each epoch), by name.
          seconds: `{"compile", "train", "eval"}`.
          params_sha256: of the final parameters, from the function of that name.
          seed: the run's seed.
          devices: as in `environment`.
          row: the row of BENCHMARKS.md this run belongs to, one of `tables.ROWS`; None for none.

        Returns:
          The record.

        Raises:
          ValueError: the record would not be valid.
        """
        from lstmjax import __version__  # the package itself is never imported before its parts

        if not isinstance(dataset, Mapping):
            dataset = {key: getattr(dataset, key) for key in DATASET}
        record = {
            "experiment": self.experiment,
            **({} if row is None else {"row": row}),
            "version": __version__,
            "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "command": command_line(),
            "config": {k: _publishable(v) for k, v in self.config.items()},
            "dataset": {key: dataset.get(key) for key in DATASET},
            "metrics": metrics,
            "seconds": seconds,
            "params_sha256": params_sha256,
            "environment": environment(devices) | self._code,
            "seed": int(seed),
        }
        record = plain(record, "record")
        if problems := validate(record):
            raise ValueError(f"record: {'; '.join(problems)}")
        self.close()
        write_file(self.path / "record.json", to_json(record))
        return record

    def close(self) -> None:
        """Closes metrics.jsonl and the events; `finish` and the end of a `with` block do it."""
        metrics, events = self._metrics, self._events
        self._metrics = self._events = None
        with suppress(OSError):  # what could not be written was reported when it was written
            if metrics is not None:
                metrics.close()
            if events is not None:
                events.close()

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _write_events(self, step: int, values: list[dict[str, Any]]) -> None:
        """Appends TensorBoard summary values to the event file, which the first of them opens."""
        from tensorboardX.proto.event_pb2 import Event

        now = time.time()
        if not values:
            return
        if self._events is None:
            file = self.path / f"events.out.tfevents.{now:.0f}.lstmjax"
            self._events = open(file, "ab", buffering=0)
            first = Event(wall_time=now, file_version="brain.Event:2")
            _append_whole(self._events, _tfrecord(first.SerializeToString()))
        event = Event(wall_time=now, step=step, summary={"value": values})
        _append_whole(self._events, _tfrecord(event.SerializeToString()))


def matching_row(config: Any, rows: Mapping[str, Any]) -> str | None:
    """The row of BENCHMARKS.md that a configuration belongs to, or None.

    Args:
      config: a dataclass.
      rows: each row's configuration, of the same class; `seed`, `out`, `devices` and `live` may
        differ, for they do not make another row.
    """
    free = {name: getattr(config, name) for name in _FREE if hasattr(config, name)}
    for row, settings in rows.items():
        if dataclasses.replace(settings, **free) == config:
            return row
    return None


def _tfrecord(data: bytes) -> bytes:
    """Data framed as a TFRecord: length, the length's checksum, data, the data's checksum."""
    # Framed here because the SummaryWriter of tensorboardX writes from a thread, which dies of
    # a full disk and then blocks its caller for ever.
    from tensorboardX.crc32c import crc32c

    def masked(part: bytes) -> bytes:
        crc = crc32c(part)
        return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)

    length = struct.pack("<Q", len(data))
    return length + masked(length) + data + masked(data)


def _publishable(setting: Any) -> Any:
    """A configuration's value as a record shows it: without the folders of this machine."""
    return without_folders(setting) if isinstance(setting, str) else setting


def _fresh_folder(root: Path, experiment: str) -> Path:
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


def _empty_folder(path: Path) -> Path:
    """Makes the folder the user asked for; what is in it already is never touched."""
    if path.exists() and not path.is_dir():
        raise RunError(f"--out: {path} is a file, expected an empty folder or a new one")
    if path.is_dir() and any(path.iterdir()):
        raise RunError(f"--out: {path} exists and is not empty: choose another --out")
    path.mkdir(parents=True, exist_ok=True)
    return path


def _append_whole(file: Any, line: bytes) -> None:
    """Appends a line to an unbuffered file, whole or not at all."""
    start = file.seek(0, os.SEEK_END)
    try:
        while line:  # a disk that fills up takes half a line first, and tells with the next write
            line = line[file.write(line) :]
    except OSError:
        with suppress(OSError):
            file.truncate(start)
        raise


if __name__ == "__main__":
    from lstmjax.results import command

    command()
