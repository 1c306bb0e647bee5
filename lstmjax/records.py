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

import numpy as np

from lstmjax import events
from lstmjax.data import files
from lstmjax.folders import (
    RunError,
    RunStopped,
    claim,
    empty_folder,
    fresh_folder,
    hold,
    to_disk,
    write_file,
)
from lstmjax.provenance import (
    command_line,
    environment,
    first_steps,
    git_state,
    params_sha256,
    read_lines,
    without_folders,
)
from lstmjax.schema import DATASET, plain, to_json, validate

__all__ = [
    "Run",
    "RunError",
    "RunStopped",
    "command_line",
    "described",
    "environment",
    "params_sha256",
    "plain",
    "read_config",
    "to_json",
    "validate",
    "write_file",
]


# Settings in which runs of one row of BENCHMARKS.md may differ.
_FREE = ("seed", "out", "devices", "live", "save_every", "keep", "resume", "deterministic")
# Settings that say how the processes find each other. They are not kept: a run may go on in others,
# and how many they were is part of a record's environment.
_MEETING = ("distributed", "coordinator", "num_processes", "process_id")
# What the last bits of a run depend on: a run that is taken up again warns of changes.
_BITS = ("git commit", "jax", "jaxlib", "numpy", "device", "processor")


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
        self._command, self._resumed = command_line(), 0
        self._metrics = None
        self._events = None
        self._event_file = None
        self._lock = None
        self._opened: list[dict[str, Any]] = []  # with which versions, each time
        self._sizes: dict[str, int] = {}  # of the files that were not written to since `restore`

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
        settings = {name: value for name, value in settings.items() if name not in _MEETING}
        try:
            path = (
                empty_folder(Path(os.path.expanduser(out)))
                if out
                else fresh_folder(Path(root), experiment)
            )
        except OSError as error:
            raise RunError(f"cannot make the folder {error.filename}: {error.strerror}") from error
        run = cls(path, experiment, settings)
        versions = _versions()  # before anything is written: it takes a while
        claim(path / "config.json", to_json(settings))
        run._hold()
        run._opened = [versions]
        run.write_story()
        return run

    @classmethod
    def open(cls, experiment: str, config: Any) -> "Run":
        """The run that a configuration asks for: `config.resume` again, or a new one.

        Args:
          experiment: as in `create`.
          config: a dataclass with `out` and `resume`, each a folder or None.

        Raises:
          RunError: as `create` and `reopen`.
        """
        if config.resume is None:
            return cls.create(experiment, config, out=config.out)
        run = cls.reopen(experiment, os.path.expanduser(config.resume))
        if "on_nan" in run.config:  # which may be another one from here on
            run.config["on_nan"] = config.on_nan
        return run

    @classmethod
    def reopen(cls, experiment: str, folder: str | os.PathLike) -> "Run":
        """Opens the folder of a run that did not come to its end; `restore` goes on in its files.

        Raises:
          RunError: it is no folder of such a run, has come to its end, is of another experiment, or
            is in use by another process.
        """
        path = Path(folder)
        if (path / "record.json").exists():
            raise RunError(f"--resume: {path} has come to its end, its record is there")
        settings = read_config(path)
        try:
            story = files.read_json(path / "run.json")
            whose, command, states = story["experiment"], story["command"], story["opened"]
            then, command = dict(states[-1]), str(command)
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise RunError(f"--resume: {path}/run.json cannot be read or is damaged") from error
        if whose != experiment:
            raise RunError(f"--resume: {path} is a run of {whose}, expected one of {experiment}")
        run = cls(path, experiment, settings)
        run._command = command
        run._hold()
        now = _versions()
        if changed := [name for name in _BITS if then.get(name, now[name]) != now[name]]:
            print(
                f"warning: {', '.join(changed)} changed since {path} was started: what follows may "
                "differ in the last bits from what it would have been",
                file=sys.stderr,
            )
        if then.get("devices", now["devices"]) != now["devices"]:
            print(
                f"warning: {path} had {then['devices']} devices and goes on with {now['devices']}: "
                "what is dropped at random is dropped elsewhere, and all else may differ in the "
                "last bits",
                file=sys.stderr,
            )
        run._resumed = len(states)
        run._opened = [*states, now]  # not written yet: only what goes on has been resumed
        return run

    def _hold(self) -> None:
        """Makes sure that no other process writes into the folder as long as this one lives."""
        try:
            self._lock = hold(self.path)
        except RunError:
            self.close()
            raise

    def write_story(self) -> None:
        """Writes with which versions the folder was opened, before and now.

        Of a run that was reopened this counts as a resume: `restore` does it, or else who goes on.
        """
        story = {"experiment": self.experiment, "command": self._command, "opened": self._opened}
        write_file(self.path / "run.json", to_json(story))

    def progress(self) -> dict[str, Any]:
        """How far the files of the folder are written, for `restore`; so far they are on disk."""
        sizes = dict(self._sizes)
        for file in (self._metrics, self._events):
            if file is not None:
                if os.fstat(file.fileno()).st_nlink == 0:
                    raise RunError(f"{self.path} has gone: {Path(file.name).name} was deleted")
                try:
                    to_disk(file.fileno())
                except OSError as error:
                    raise RunError(f"cannot write to {self.path}: {error.strerror}") from error
                sizes[Path(file.name).name] = file.seek(0, os.SEEK_END)
        return {"sizes": sizes}

    def restore(self, progress: Mapping[str, Any]) -> None:
        """Cuts the files off where they stood at a `progress`; what follows is written again.

        Raises:
          RunError: a file is shorter than it was, or cannot be written.
        """
        sizes = dict(progress["sizes"]) if progress else {}
        self._sizes = dict(sizes)
        self._event_file = next((name for name in sizes if name != "metrics.jsonl"), None)
        for path in [self.path / "metrics.jsonl", *sorted(self.path.glob("events.out.tfevents.*"))]:
            size = sizes.pop(path.name, 0)
            if not path.exists():
                if size:
                    raise RunError(f"{path} is missing")
                continue
            try:
                if path.stat().st_size < size:
                    raise RunError(f"{path} is shorter than when the checkpoint was saved")
                os.truncate(path, size)
            except OSError as error:
                raise RunError(f"cannot cut off {path}: {error.strerror}") from error
        if sizes:
            raise RunError(f"{self.path / next(iter(sizes))} is missing")
        self.write_story()

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
            events.append_whole(self._metrics, json.dumps(line, allow_nan=False).encode() + b"\n")
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
        parameters: int | None = None,
        updates: int | None = None,
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
            A run on offline data belongs to none: it is not IMDB, whatever was asked for.
          parameters: how many numbers are trained, of one model; None where there is no one model.
          updates: steps that were made, those that were skipped among them.

        Returns:
          The record.

        Raises:
          ValueError: the record would not be valid.
        """
        from lstmjax import __version__  # the package itself is never imported before its parts

        dataset = described(dataset)
        row = None if dataset.get("source") == "offline" else row
        first = first_steps(read_lines(self.path / "metrics.jsonl"))
        asked = {k: v for k, v in self.config.items() if k == "deterministic"}
        size = {"parameters": parameters, "updates": updates}
        record = {
            "experiment": self.experiment,
            **({} if row is None else {"row": row}),
            "version": __version__,
            "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "command": self._command,
            "config": {k: _publishable(v) for k, v in self.config.items()},
            "dataset": dataset,
            "metrics": metrics,
            **({} if first is None else {"first_steps": first}),
            "seconds": seconds,
            "params_sha256": params_sha256,
            **{name: int(value) for name, value in size.items() if value is not None},
            "environment": environment(devices) | self._code | asked,
            "seed": int(seed),
            **({"resumed": self._resumed} if self._resumed else {}),
        }
        record = plain(record, "record")
        if problems := validate(record):
            raise ValueError(f"record: {'; '.join(problems)}")
        self.close()
        write_file(self.path / "record.json", to_json(record))
        return record

    def close(self) -> None:
        """Closes metrics.jsonl and the events; `finish` and the end of a `with` block do it."""
        files = self._metrics, self._events, self._lock
        self._metrics = self._events = self._lock = None
        for file in files:
            with suppress(OSError):  # what could not be written was reported when it was written
                if file is not None:
                    file.close()

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _write_events(self, step: int, values: list[dict[str, Any]]) -> None:
        """Appends TensorBoard summary values to the event file, which the first of them opens."""
        if not values:
            return
        if self._events is None:
            name = self._event_file or f"events.out.tfevents.{time.time():.0f}.lstmjax"
            self._events = open(self.path / name, "ab", buffering=0)
            if self._event_file is None:
                events.append_whole(self._events, events.first())
        events.append_whole(self._events, events.summary(step, values))


def read_config(folder: str | os.PathLike) -> dict[str, Any]:
    """The configuration that a run's folder holds.

    Raises:
      RunError: the folder is not there or is no run's, or its config.json is damaged.
    """
    path = Path(os.path.expanduser(folder)) / "config.json"
    try:
        settings = files.read_json(path)
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise RunError(f"{path} is damaged: {files.reason(error)}") from error
    if not isinstance(settings, dict):
        raise RunError(f"{path} is damaged: it holds no settings")
    return settings


def described(dataset: Any) -> dict[str, Any]:
    """What a record says of a dataset: `name`, `source` and `sha256` of a mapping or an object."""
    if not isinstance(dataset, Mapping):
        return {key: getattr(dataset, key) for key in DATASET}
    return {key: dataset.get(key) for key in DATASET}


def _versions() -> dict[str, Any]:
    """What the bits of a run depend on beside its settings."""
    seen = environment()
    return {name: seen[name] for name in (*_BITS, "devices")}


def matching_row(config: Any, rows: Mapping[str, Any]) -> str | None:
    """The row of BENCHMARKS.md that a configuration belongs to, or None.

    Args:
      config: a dataclass.
      rows: each row's configuration, of the same class; settings that do not change a program's
        numbers (`seed`, `out`, `devices`, `keep` …) do not make another row, and neither does
        `data`, where the row takes what it can get and the real data is insisted on.
    """
    free = {n: getattr(config, n) for n in _FREE + _MEETING if hasattr(config, n)}
    insists = getattr(config, "data", None) == "tfds"
    for row, settings in rows.items():
        real = {"data": "tfds"} if insists and settings.data == "auto" else {}
        if dataclasses.replace(settings, **free, **real) == config:
            return row
    return None


def _publishable(setting: Any) -> Any:
    """A configuration's value as a record shows it: without the folders of this machine."""
    return without_folders(setting) if isinstance(setting, str) else setting


if __name__ == "__main__":
    from lstmjax.results import command

    command()
