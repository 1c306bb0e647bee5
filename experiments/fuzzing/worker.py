"""The process that reads changed files, one after another, and says how each reading ended."""

import contextlib
import io
import json
import math
import os
import resource
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from fuzzing import arrays, folders, releases, runs
from fuzzing.mutations import (
    Files,
    changed_bytes,
    changed_gzip,
    changed_json,
    changed_npy,
    changed_png,
    changed_safetensors,
    changed_tar,
    changed_zip,
    mutated,
    scratch,
    written,
)  # fmt: skip
from lstmjax import cli, provenance, records

FORMATS = {
    "tree.json": (changed_json, 1.0),  # a tree of weights is no file
    ".json": (changed_json, 0.7),
    "said/metadata": (changed_json, 0.9),
    ".npy": (changed_npy, 0.7),
    ".png": (changed_png, 0.8),
    ".safetensors": (changed_safetensors, 0.7),
    ".tar.gz": (partial(changed_gzip, change=changed_tar), 0.9),
    "-ubyte.gz": (partial(changed_gzip, change=changed_bytes), 0.9),
    ".array_record-00000-of-00001": (folders.changed_records, 0.7),
}
FORMATS |= {end: (partial(changed_zip, formats=FORMATS), 0.8) for end in (".npz", ".keras")}


class Reader(NamedTuple):
    """One way into the package.

    Attributes:
      title: what it reads.
      seeds: makes some valid folders.
      read: reads a folder, or raises; AssertionError where it returns what is not valid.
      seal: puts checksums right again after a change.
      first: makes `read`, where that takes preparation.
    """

    title: str
    seeds: Callable[[], list[Files]]
    read: Callable[[Path], Any] | None = None
    seal: Callable[[Files], Files] = lambda files: files
    first: Callable[[], Callable[[Path], Any]] | None = None


READERS = {
    "cache": Reader(".npz of the cache", arrays.cache_seeds, arrays.cache_read, arrays.cache_seal),
    "golden": Reader(
        "golden .npz and their .json", arrays.golden_seeds, arrays.golden_read, arrays.golden_seal
    ),
    "idx": Reader("gzipped idx files of MNIST", arrays.idx_seeds, arrays.idx_read),
    "archive": Reader(".tar.gz of the reviews", folders.archive_seeds, folders.archive_read),
    "tfds_reviews": Reader(
        "TFDS folders of reviews",
        partial(folders.tfds_seeds, "imdb_reviews"),
        partial(folders.tfds_read, "imdb_reviews"),
    ),
    "tfds_digits": Reader(
        "TFDS folders of digits",
        partial(folders.tfds_seeds, "mnist"),
        partial(folders.tfds_read, "mnist"),
    ),
    "keras": Reader("Keras's .h5 and .keras", folders.keras_seeds, folders.keras_read),
    "interop": Reader("trees of weights", arrays.interop_seeds, arrays.interop_read),
    "weights": Reader(".safetensors of a model", arrays.weights_seeds, first=arrays.weights_reader),
    "run": Reader("the folder of a run, for predict", runs.run_seeds, runs.run_read),
    "resume": Reader("the folder of a run, for --resume", runs.resume_seeds, runs.resume_read),
    "checkpoint": Reader(
        "Orbax checkpoints", runs.checkpoint_seeds, runs.checkpoint_read, runs.checkpoint_seal
    ),
    "keeper": Reader(
        "the state of a run, for --resume", runs.keeper_seeds, runs.keeper_read, runs.keeper_seal
    ),
    "record": Reader("record.json", runs.record_seeds, runs.record_read),
    "review": Reader("texts for predict", runs.review_seeds, first=runs.review_reader),
    "image": Reader("images for predict", releases.image_seeds, releases.image_read),
    "release": Reader(
        "the folder of a release",
        releases.release_seeds,
        releases.release_read,
        releases.release_seal,
    ),
    "text": Reader("texts to train on", runs.text_seeds, runs.text_read),
}


class Result(NamedTuple):
    """How one reading ended.

    Attributes:
      outcome: "accepted"; "refused" in one clear line; or "failed".
      kind: the error's class, "" where there was none.
      words: what was said.
      seconds: of processor time.
      mebibytes: that the process took more than before.
    """

    outcome: str
    kind: str
    words: str
    seconds: float
    mebibytes: float


def case(reader: Reader, seeds: list[Files], name: str, seed: int, number: int) -> Files:
    """An input, by its number."""
    draw = Random(f"{name} {seed} {number}")
    files = mutated(draw, draw.choice(seeds), seeds, FORMATS)
    if draw.random() < 0.5:
        with contextlib.suppress(Exception):  # too far gone to have a checksum
            files = reader.seal(files)
    return files


def once(
    read: Callable[[Path], Any], folder: Path, limit: float = 5.0, children: float = math.inf
) -> Result:
    """Reads a folder as a command line would: an error must become one line.

    Args:
      read: the reader.
      folder: what it reads.
      limit: seconds of processor time, of this process and of those that it starts.
      children: MiB that the largest of these took for valid files.
    """
    kind = ""

    def noted() -> None:
        nonlocal kind
        try:
            read(folder)
        except BaseException as error:
            kind = type(error).__name__
            raise

    said = io.StringIO()
    outcome, words = "accepted", ""
    before, start = _memory(), _seconds()
    try:
        with contextlib.redirect_stderr(said), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cli.main(noted)
    except SystemExit:
        words = said.getvalue().rstrip("\n").split("\n")[-1]
        good = words.startswith("error: ") and kind not in ("MemoryError", "KeyboardInterrupt")
        outcome = "refused" if good else "failed"
    except BaseException as error:
        outcome, words = "failed", f"{kind}: {str(error)[:300]}"
    seconds = _seconds() - start
    if seconds > limit and outcome != "failed":
        outcome, words = "failed", f"took {seconds:.1f} s: {words}"
    most = max(_memory(most=True) - before, _children().ru_maxrss / 1024 - children)
    return Result(outcome, kind, words, seconds, most)


def _children() -> resource.struct_rusage:
    """What the processes took that this one has started and that have ended."""
    return resource.getrusage(resource.RUSAGE_CHILDREN)


def _seconds() -> float:
    """Processor time so far."""
    return time.process_time() + _children().ru_utime + _children().ru_stime


def _memory(most: bool = False) -> float:
    """The process's memory in MiB: now, or the most that it was since this was last asked for."""
    status = Path("/proc/self/status").read_text()
    found = int(status.partition("VmHWM:" if most else "VmRSS:")[2].split()[0]) / 1024
    with contextlib.suppress(OSError):  # where the mark cannot be set back, it is an upper bound
        Path("/proc/self/clear_refs").write_text("5")
    return found


def main() -> None:
    """Answers on standard output: a line when ready, one for each input, and one at the end."""
    name, seed, start, stop, megabytes, limit = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints is no answer

    def answer(*words: Any) -> None:
        print(json.dumps(words), file=answers, flush=True)

    nothing = {"git commit": None, "dirty": None}
    provenance.git_state = records.git_state = lambda: nothing  # three processes for each run
    reader = READERS[name]
    read = reader.first() if reader.first else reader.read
    seeds = reader.seeds()
    with scratch() as folder:
        # What is loaded and compiled once is not counted.
        first = [once(read, written(files, folder / str(k))) for k, files in enumerate(seeds)]
        if not any(result.outcome == "accepted" for result in first):
            raise SystemExit(f"no seed is accepted: {first}")
        children = _children().ru_maxrss / 1024
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + megabytes * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        answer("ready")
        for number in range(start, stop):
            files = case(reader, seeds, name, seed, number)
            with scratch() as own:
                written(files, own / "in")
                answer("begun", number)
                result = once(read, own / "in", limit, children)
                if os.listdir(own) != ["in"]:
                    result = result._replace(outcome="failed", words="it wrote outside")
            answer("ended", number, *result)
    answer("done")


if __name__ == "__main__":
    main()
