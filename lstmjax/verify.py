"""Runs a recorded run's first steps again: `python -m lstmjax.records verify RECORD`.

The experiment named in the record is started with the settings in the record, in a process of its
own and in a temporary folder, and stopped as soon as it has logged the losses that the record
holds. The exit code is 0 where these are equal (in every bit, or within a tolerance that is said),
1 where they or the data differ, and 2 where nothing can be compared.
"""

import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from lstmjax import __version__, reproducible
from lstmjax.cli import ConfigError
from lstmjax.compare import differences, number, read
from lstmjax.provenance import ROOT, environment, read_lines

TRAINING = ("sin", "forecast", "mnist", "imdb", "smnist", "reviews")
TIMING = ("scaling", "scan_vs_unrolled", "gpu", "peer-layers", "parity")
# Settings that say where and by how many processes a run was made, not what it computes.
_ELSEWHERE = (
    "out", "live", "resume", "distributed", "coordinator", "num_processes", "process_id",
)  # fmt: skip


@dataclass(frozen=True)
class Verify:
    """Runs the first steps of a recorded run again and compares the losses."""

    record: Annotated[Path, tyro.conf.Positional]
    """a record, or the folder of a finished run"""
    steps: int | None = None
    """how many of the logged losses to compare; all that the record holds when not given"""
    tolerance: float = 1e-3
    """the largest relative difference at which two losses still count as equal"""


def verify(options: Verify) -> int:
    """Prints how a record and a new run of its first steps compare; returns the exit code."""
    record = read(options.record)
    check(record)
    if not (math.isfinite(options.tolerance) and options.tolerance >= 0):
        raise ConfigError(f"--tolerance: got {options.tolerance}, expected a number not below 0")
    recorded = losses(record, options.steps)
    print(f"record    {options.record}, of {record['date']}\ncommand   {record['command']}")
    if "first_steps" not in record:
        names = ", ".join(recorded)
        print(f"note      the record holds no first losses (older ones do not): {names} instead")
    reproducible.ask(bool(record["config"].get("deterministic")))
    started = time.perf_counter()
    found, sha256 = rerun(record, recorded)
    print(f"stopped   after {time.perf_counter() - started:.0f} s")
    same_data = record["dataset"]["sha256"].startswith(sha256)
    print(f"data      {record['dataset']['name']}, sha256 {sha256}: {_data(record, same_data)}")
    for name, value in recorded.items():
        print(f"          {name}: {value!r}, now {found[name]!r}{_remark(value, found[name])}")
    print(f"changed   {changes(record)}")
    equal, said = judged(recorded, found, options.tolerance)
    print(f"result    {said if same_data else 'different data'}")
    return int(not (equal and same_data))


def check(record: Mapping[str, Any]) -> None:
    """Raises ConfigError for a record that holds no training that can be run again here."""
    experiment = record["experiment"]
    able = f"verify runs {', '.join(TRAINING[:-1])} and {TRAINING[-1]} again"
    if "peer" in record:
        raise ConfigError(f"the record is of {record['peer']['framework']}: {able}")
    if experiment in TIMING:
        raise ConfigError(
            f"the record is of {experiment}, which measures and trains nothing: {able}"
        )
    if experiment not in TRAINING:
        raise ConfigError(f"the record is of {experiment}: {able}")
    if not _script(record).exists():
        raise ConfigError(f"{_script(record)} is not there: verify needs a checkout of lstmjax")
    if wrong := [name for name in record["config"] if not re.fullmatch("[a-z][a-z_0-9]*", name)]:
        raise ConfigError(f"config: got a setting {wrong[0]!r}, expected names of flags")


def _script(record: Mapping[str, Any]) -> Path:
    return ROOT / "experiments" / f"{record['experiment']}.py"


# ---- what is compared ---------------------------------------------------------------------------


def losses(record: Mapping[str, Any], count: int | None = None) -> dict[str, float]:
    """The first losses of a record, by names such as "loss of step 25".

    A record without ``first_steps`` has the first or the last number of its kind to offer.

    Raises:
      ConfigError: it has not so many, or none at all; ``count`` is below 1.
    """
    first, metrics, held = record.get("first_steps"), record["metrics"], {}
    epochs = record["config"].get("epochs")
    if first is not None:
        if len(first["steps"]) != len(first["loss"]):
            raise ConfigError("first_steps: got lists of different lengths, expected equal ones")
        pairs = zip(first["steps"], first["loss"], strict=True)
        held = {f"{first.get('name', 'loss')} of step {step}": number(x) for step, x in pairs}
    elif "mse_first" in metrics:
        held = {"mse of step 0": number(metrics["mse_first"])}
    elif "train_mse" in metrics:
        held = {f"train_mse of epoch {epochs}": number(metrics["train_mse"])}
    else:
        for name in ("train_loss", "validation_loss"):
            values = metrics.get(f"{name}_epochs")
            if isinstance(values, list) and len(values) == epochs:
                held[f"{name} of epoch 1"] = number(values[0])
    held = {name: value for name, value in held.items() if value is not None}
    if not held:
        raise ConfigError("the record holds no loss that could be compared")
    if count is not None and not 1 <= count <= len(held):
        raise ConfigError(f"--steps: got {count}, expected 1 to {len(held)}, the losses it holds")
    return dict(list(held.items())[:count])


def logged(lines: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """The numbers of metrics.jsonl under the names that ``losses`` gives them."""
    found: dict[str, float] = {}
    for line in lines:
        for name, value in line.items():
            for place in ("step", "epoch"):
                if place in line:
                    found.setdefault(f"{name} of {place} {line[place]}", number(value))
    return found


def judged(
    recorded: Mapping[str, float], found: Mapping[str, float], tolerance: float
) -> tuple[bool, str]:
    """Whether the losses are equal, and in words how far."""
    apart = {name: distance(value, found[name]) for name, value in recorded.items()}
    worst = max(apart, key=apart.__getitem__)
    count = f"{len(apart)} {'loss' if len(apart) == 1 else 'losses'}"
    if apart[worst] == 0:
        return True, f"equal in every bit: {count}"
    largest = f"largest relative difference {apart[worst]:.2g}, {worst}"
    if apart[worst] <= tolerance:
        return True, f"equal within {tolerance:g}, but not in every bit: {count}, {largest}"
    return False, f"different by more than {tolerance:g}: {count}, {largest}"


def distance(a: float, b: float) -> float:
    """|a − b| / max(|a|, |b|); 0 of two NaNs, infinite of a NaN and a number."""
    if a == b or (math.isnan(a) and math.isnan(b)):
        return 0.0
    apart = abs(a - b) / max(abs(a), abs(b))
    return apart if math.isfinite(apart) else math.inf


def changes(record: Mapping[str, Any]) -> str:
    """In words, what of versions, code and machine is not what it was."""
    then = {"lstmjax": record["version"], **record["environment"]}
    now = {"lstmjax": __version__, **environment(then["devices"])}
    now = {name: now[name] for name in then if name in now}
    then = {name: then[name] for name in now}
    found = differences({"environment": then}, {"environment": now})
    words = [
        f"{d.place.removeprefix('environment.')} was {_brief(d.a)}, is {_brief(d.b)}" for d in found
    ]
    return "; ".join(words) or "nothing: code, versions and machine are the same"


def _brief(value: Any) -> str:
    """A value in quotes where it is text, a commit by its first digits."""
    return repr(
        value[:10] if isinstance(value, str) and re.fullmatch("[0-9a-f]{40}", value) else value
    )


def _data(record: Mapping[str, Any], same: bool) -> str:
    return "the same" if same else f"the record's is {record['dataset']['sha256'][:12]}"


def _remark(then: float, now: float) -> str:
    apart = distance(then, now)
    return "" if apart == 0 else f" ({apart:.1e} apart)"


# ---- running it again ---------------------------------------------------------------------------


def flags(record: Mapping[str, Any]) -> list[str]:
    """The command line that asks for the settings of a record, on as many devices."""
    settings = {k: v for k, v in record["config"].items() if k not in _ELSEWHERE}
    settings["devices"] = record["environment"]["devices"]
    source = record["dataset"]["source"]
    if "data" in settings and source in ("tfds", "offline"):  # and nothing else
        settings["data"] = source
    words = {name: name.replace("_", "-") for name in settings}
    return [
        (f"--{words[name]}" if value else f"--no-{words[name]}")
        if isinstance(value, bool)
        else f"--{words[name]}={value}"
        for name, value in settings.items()
    ]


def rerun(record: Mapping[str, Any], wanted: Iterable[str]) -> tuple[dict[str, float], str]:
    """Runs a record's experiment until it has logged some numbers.

    Args:
      record: of one of TRAINING.
      wanted: the numbers' names, as in ``logged``.

    Returns:
      What was logged, and the first digits of the data's sha256.

    Raises:
      ConfigError: the run ended without them.
    """
    with tempfile.TemporaryDirectory(prefix="lstmjax-verify-") as folder:
        command = [sys.executable, str(_script(record)), *flags(record), f"--out={folder}/run"]
        lines = Path(folder, "run", "metrics.jsonl")
        found: dict[str, float] = {}

        def enough() -> bool:
            found.update(logged(read_lines(lines)))
            return all(name in found for name in wanted)

        said = Path(folder, "said")
        ended = _run_until(command, said, enough)
        complete = enough()
        text = said.read_text(encoding="utf-8", errors="replace")
    sha256 = re.search(r"sha256 ([0-9a-f]{12})", text)
    if not complete or sha256 is None:
        last = (text.strip().splitlines() or ["nothing"])[-1]
        raise ConfigError(f"the run ended (exit code {ended}) before its first losses: {last}")
    return found, sha256[1]


def _run_until(command: Sequence[str], said: Path, enough: Callable[[], bool]) -> int | None:
    """Runs a command until ``enough`` or its end, its output in a file; returns its exit code."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    variables = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    with open(said, "wb") as output:
        child = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=variables)
        try:
            while child.poll() is None and not enough():
                time.sleep(0.1)
        finally:
            child.kill()  # its folder goes with it: nothing is to be saved
            child.wait()
    return child.returncode
