"""Damaged and hostile files for every reader: each must give a value or end in one clear line.

    python experiments/fuzz.py                       10,000 inputs for each reader, hours
    python experiments/fuzz.py --inputs 200          a look, minutes
    python experiments/fuzz.py --reader keras        one of them
    python experiments/fuzz.py --reader keras --seed 3 --first 812 --inputs 1       one input again

The inputs are valid files with bits flipped, parts cut out, doubled or put in from others, numbers
set to their bounds, and what their formats keep (headers, shapes, names, links, checksums) changed.
They are read in processes of their own, so that a library that crashes, does not return or takes
too much memory is seen as such. An input fails where the reader crashes, takes more than
`--seconds` or `--megabytes`, raises what `cli.main` does not turn into a line, returns what is not
valid, or writes outside of its folder. Those that fail are kept under `failures/`.
"""

import dataclasses
import hashlib
import json
import os
import selectors
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from fuzzing.worker import READERS, Result, case  # isort: skip
from fuzzing.mutations import written  # isort: skip
from lstmjax import cli
from lstmjax.records import Run, RunError, params_sha256, to_json, write_file

PATIENCE = 600  # seconds of the clock on the wall in which a process says something
TICK = 1.0


@dataclasses.dataclass(frozen=True)
class Config:
    reader: Literal[
        "all", "cache", "golden", "idx", "archive", "tfds_reviews", "tfds_digits", "keras",
        "interop", "weights", "run", "resume", "checkpoint", "keeper", "record", "review", "image",
        "release", "text",
    ] = "all"  # fmt: skip
    """What to try, or all of them."""
    inputs: int = 10_000
    """Inputs for each reader."""
    first: int = 0
    """The number of the first one."""
    each: int = 2_000
    """Inputs that one process reads."""
    seconds: float = 5.0
    """Processor time that a reading may take."""
    megabytes: int = 1_024
    """Address space that a process may add to what it has when it starts to read."""
    seed: int = 0
    """Of all inputs."""
    out: str | None = None
    """Folder for the run's files, new or empty; a fresh one under runs/ when not given."""


@dataclasses.dataclass
class Tally:
    """What became of the inputs of one reader.

    Attributes:
      outcomes: "accepted", "refused" and "failed", with their numbers.
      kinds: of the errors of those that were refused, with their numbers.
      slowest: seconds of processor time.
      peak: MiB that a reading took at most.
      failures: (number, what happened) of each that failed.
    """

    outcomes: Counter = dataclasses.field(default_factory=Counter)
    kinds: Counter = dataclasses.field(default_factory=Counter)
    slowest: float = 0.0
    peak: float = 0.0
    failures: list[tuple[int, str]] = dataclasses.field(default_factory=list)

    def add(self, number: int, result: Result) -> None:
        outcome, kind, words, seconds, mebibytes = result
        self.outcomes[outcome] += 1
        self.slowest, self.peak = max(self.slowest, seconds), max(self.peak, mebibytes)
        if outcome == "refused":
            self.kinds[kind] += 1
        elif outcome == "failed":
            self.failures.append((number, words))

    def metrics(self, reader: str) -> dict[str, float]:
        """For the record, each under the reader's name."""
        found = {name: self.outcomes[name] for name in ("accepted", "refused", "failed")}
        found = {"inputs": self.outcomes.total(), **found}
        found |= {f"refused_{kind}": count for kind, count in sorted(self.kinds.items())}
        found |= {"slowest_seconds": round(self.slowest, 3), "peak_mib": round(self.peak, 1)}
        return {f"{reader}_{name}": value for name, value in found.items()}


def command(config: Config, reader: str, start: int, stop: int) -> list[str]:
    """What starts a process that reads some inputs."""
    asked = [reader, config.seed, start, stop, config.megabytes, config.seconds]
    return [sys.executable, "-m", "fuzzing.worker", json.dumps(asked)]


class Worker:
    """A process that reads inputs, and what it says."""

    def __init__(self, asked: list[str]):
        here = str(Path(__file__).resolve().parent)
        path = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
        variables = {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "MALLOC_ARENA_MAX": "2"}
        variables["MALLOC_MMAP_THRESHOLD_"] = "131072"  # what is freed is given back at once
        if os.path.isdir("/dev/shm"):  # folders that live for milliseconds
            variables["TMPDIR"] = "/dev/shm"
        self.process = subprocess.Popen(
            asked,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | variables,
        )
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.process.stdout, selectors.EVENT_READ)
        os.set_blocking(self.process.stdout.fileno(), False)
        self.rest = b""

    def line(self, seconds: float) -> list[Any] | None:
        """Its next line; None where it has died or does not answer.

        Args:
          seconds: of processor time that it may take for that. The clock on the wall says less: the
            machine may be busy.
        """
        until, most = time.monotonic() + PATIENCE, self.processor_seconds() + seconds
        while b"\n" not in self.rest:
            if not self.selector.select(TICK):
                if time.monotonic() > until or self.processor_seconds() > most:
                    return None
                continue
            more = self.process.stdout.read()
            if not more:
                return None
            self.rest += more
        line, _, self.rest = self.rest.partition(b"\n")
        return json.loads(line)

    def processor_seconds(self) -> float:
        """Processor time that it has taken so far."""
        stat = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")

    def end(self) -> int | None:
        """Ends it; its exit code where it had ended by itself."""
        self.selector.close()
        self.process.stdout.close()
        try:
            return self.process.wait(0.5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            return None


def read_some(config: Config, reader: str, start: int, stop: int, tally: Tally) -> int:
    """Has a process read inputs; returns the number of the first that it did not come to.

    Raises:
      RunError: it does not start.
    """
    worker = Worker(command(config, reader, start, stop))
    ready = worker.line(PATIENCE)
    if ready is None:
        raise RunError(f"--reader: the process for {reader} ended before it began: {worker.end()}")
    at, begun = start, False
    while (line := worker.line(2 * config.seconds)) not in (None, ["done"]):
        kind, number, *result = line
        at, begun = number + (kind == "ended"), kind == "begun"
        if kind == "ended":
            tally.add(number, Result(*result))
    code = worker.end()
    if line is None:
        what = "did not return" if code is None else f"crashed with {code}"
        if not begun:
            raise RunError(f"--reader: the process for {reader} {what} between two inputs")
        tally.add(at, Result("failed", "", what, 0.0, 0.0))
        at += 1
    return at


def read_all(config: Config, reader: str, bar: tqdm) -> Tally:
    """All the inputs of one reader."""
    tally, at, stop = Tally(), config.first, config.first + config.inputs
    while at < stop:
        done = read_some(config, reader, at, min(stop, at + config.each), tally)
        bar.update(done - at)
        at = done
    return tally


def keep_failures(folder: Path, config: Config, reader: str, tally: Tally) -> None:
    """Writes the inputs that failed, each in a folder of its own, and what happened."""
    if not tally.failures:
        return
    seeds = READERS[reader].seeds()
    for number, _ in tally.failures[:100]:
        files = case(READERS[reader], seeds, reader, config.seed, number)
        written(files, folder / "failures" / f"{reader}-{number}")
    write_file(folder / f"failures-{reader}.json", to_json(tally.failures))


def table(metrics: dict[str, float]) -> str:
    """The figures of a record as a table in Markdown."""
    lines = [
        "| reader | inputs | accepted | refused in one line | failed | slowest | memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for reader, entry in READERS.items():
        if f"{reader}_inputs" in metrics:
            counts = [metrics[f"{reader}_{n}"] for n in ("inputs", "accepted", "refused", "failed")]
            cells = [entry.title, *(f"{count:,}" for count in counts)]
            cells += [f"{metrics[f'{reader}_slowest_seconds']:.2f} s"]
            cells += [f"{metrics[f'{reader}_peak_mib']:.0f} MiB"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def run(config: Config) -> None:
    cli.check_counts(config, "inputs", "each", "megabytes")
    cli.check_counts(config, "first", "seed", least=0)
    cli.check_positive(config, "seconds")
    names = list(READERS) if config.reader == "all" else [config.reader]
    code = b"".join(p.read_bytes() for p in sorted(Path(__file__).parent.glob("fuzzing/*.py")))
    started, metrics, failed = time.perf_counter(), {}, 0
    with Run.create("fuzz", config, out=config.out) as folder:
        bar = tqdm(total=config.inputs * len(names), unit=" inputs", disable=None)
        for step, name in enumerate(names):
            bar.set_postfix(reader=name)
            tally = read_all(config, name, bar)
            keep_failures(folder.path, config, name, tally)
            found = tally.metrics(name)
            folder.log(step, **found)
            print(
                f"{name}: " + ", ".join(f"{k.removeprefix(name)[1:]} {v}" for k, v in found.items())
            )
            metrics |= found
            failed += len(tally.failures)
        bar.close()
        write_file(folder.path / "table.md", f"{table(metrics)}\n".encode())
        folder.finish(
            dataset={
                "name": "changed files", "source": "generated",
                "sha256": hashlib.sha256(code + str(config.seed).encode()).hexdigest(),
            },
            metrics=metrics,
            seconds={"compile": 0.0, "train": 0.0, "eval": time.perf_counter() - started},
            params_sha256=params_sha256({}),
            seed=config.seed,
            devices=1,
        )  # fmt: skip
    print(f"{failed} of {config.inputs * len(names):,} inputs failed; record in {folder.path}")
    if failed:
        raise RunError(f"{failed} inputs failed, see {folder.path}")


if __name__ == "__main__":
    cli.main(lambda: run(cli.parse(Config, description=__doc__)))
