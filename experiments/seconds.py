"""Validation accuracy against seconds of training, of one program in lstmjax, Keras and PyTorch.

    pip install -e '.[peers]'
    python experiments/seconds.py                              reviews, 5 seeds: some 15 minutes
    python experiments/seconds.py --program mnist-corrected    digits: some 20 minutes
    python experiments/seconds.py --resume runs/seconds-20260102-030405     go on with that
    python experiments/seconds.py --limit 1000 --seeds 1       a look

The programs are those of imdb.py or mnist.py and of peers.py: the same arrays, laws, optimiser,
batches, epochs and scores. Each run is a process of its own on the machine's CPU, and the
frameworks take turns, another one first with every seed, so that a machine that slows down slows
all of them down. What has come to its end stays in the run's folder, and --resume does the rest.

Seconds of training are counted up to the end of each epoch, without compiling and scoring. Keras
and PyTorch count from the end of the first batch on what their loops do, between batches too,
lstmjax what its compiled loops take, the first among them; what all of it took, imports, data and
checkpoints included, stands beside it as the time of the process. Run it where nothing else runs.
"""

import dataclasses
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jax

from lstmjax import cli, seconds_plots, seconds_tables, tables
from lstmjax.data import files
from lstmjax.records import Run, RunError, RunStopped, to_json, write_file
from lstmjax.schema import SECONDS
from lstmjax.seconds_tables import Line

HERE = Path(__file__).parent
SCRIPTS = {"imdb-tf2": "imdb.py", "mnist-corrected": "mnist.py"}  # whose defaults are the program
NEEDED = {"lstmjax": (), "keras": ("keras", "tensorflow"), "torch": ("torch",)}
SHOWN = {"imdb-tf2": "IMDB reviews", "mnist-corrected": "MNIST by rows"}
OFFLINE = {"imdb-tf2": "generated reviews", "mnist-corrected": "rendered digits by rows"}


@dataclasses.dataclass(frozen=True)
class Config:
    program: Literal["imdb-tf2", "mnist-corrected"] = "imdb-tf2"
    """What is trained: a section of BENCHMARKS.md."""
    frameworks: str = "lstmjax,keras,torch"
    """In which ones, with commas between; lstmjax is one of them."""
    seeds: int = 5
    """How many runs in each of them."""
    seed: int = 0
    """The first of the seeds."""
    data: Literal["auto", "tfds", "offline"] = "auto"
    """The real data if they can be had, the real ones or an error, or made-up ones."""
    limit: int | None = None
    """Use only so many examples of every split: a look, not a result."""
    resume: str | None = None
    """Folder of a comparison to go on with; its settings are taken from there."""
    out: str | None = None
    """Folder for the run's files, new or empty; a fresh one under runs/ when not given."""


def check(config: Config) -> list[str]:
    """The frameworks that are asked for, lstmjax first.

    Raises:
      ConfigError: a value that cannot be used, a framework that is not installed.
    """
    cli.check_counts(config, "seeds")
    cli.check_counts(config, "seed", least=0)
    cli.check_counts(config, "limit", least=128 if config.program == "imdb-tf2" else 1)  # a batch
    asked = config.frameworks.split(",")
    fits = "lstmjax" in asked and set(asked) <= set(NEEDED)
    cli.check(config, "frameworks", fits, f"lstmjax and some of {', '.join(list(NEEDED)[1:])}")
    cli.check(config, "frameworks", len(set(asked)) == len(asked), "no framework twice")
    chosen = [name for name in NEEDED if name in asked]
    for package in (package for name in chosen for package in NEEDED[name]):
        there = importlib.util.find_spec(package) is not None
        cli.check(config, "frameworks", there, f"{package} installed: pip install -e '.[peers]'")
    return chosen


# ---- one run ------------------------------------------------------------------------------------


def command(config: Config, framework: str, seed: int, place: Path) -> list[str]:
    """What trains the program in a framework and leaves its record in a folder."""
    flags = [f"--seed={seed}", f"--data={config.data}"]
    flags += [] if config.limit is None else [f"--limit={config.limit}"]
    if framework == "lstmjax":
        return [sys.executable, str(HERE / SCRIPTS[config.program]), *flags, f"--out={place}"]
    asked = [f"--row={config.program}", f"--framework={framework}"]
    return [sys.executable, str(HERE / "peers.py"), *asked, *flags, f"--out={place}/record.json"]


def execute(words: list[str], log: Path) -> float:
    """Runs a command to its end; the seconds that it took. Its output goes to a file.

    Raises:
      RunError: it failed; its last line is in the message.
    """
    # All of them on the CPU: the peers' programs use no GPU.
    surroundings = {**os.environ, "JAX_PLATFORMS": "cpu"}
    start = time.perf_counter()
    with log.open("wb") as said:
        child = subprocess.Popen(words, stdout=said, stderr=subprocess.STDOUT, env=surroundings)
        try:
            code = child.wait()
        except BaseException:
            child.kill()
            child.wait()
            raise
    if code:
        last = log.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
        raise RunError(f"{log.stem} ended with exit code {code}: {last[-1]}")
    return time.perf_counter() - start


def measured(config: Config, framework: str, seed: int, place: Path) -> dict[str, Any]:
    """The record of a run, made now or before, with the seconds of its process."""
    end = place / "process.json"
    if not end.exists():
        shutil.rmtree(place, ignore_errors=True)  # what was cut short begins anew
        place.parent.mkdir(exist_ok=True)
        seconds = execute(command(config, framework, seed, place), place.with_suffix(".log"))
        write_file(end, to_json({"seconds": seconds}))
    return tables.load(place / "record.json") | {"process": files.read_json(end)["seconds"]}


def turns(frameworks: list[str], config: Config) -> Iterator[tuple[int, str]]:
    """(seed, framework) in the order of the runs: with every seed another one is the first."""
    for number in range(config.seeds):
        shift = number % len(frameworks)
        for framework in frameworks[shift:] + frameworks[:shift]:
            yield config.seed + number, framework


# ---- all runs -----------------------------------------------------------------------------------


def line_of(framework: str, runs: list[dict[str, Any]]) -> Line:
    """One framework's runs, in the order of their seeds."""
    peer, environment = runs[0].get("peer"), runs[0]["environment"]
    ours = f"lstmjax {runs[0].get('version')} / jax {environment.get('jax')}"
    return Line(
        framework,
        peer["framework"] if peer else ours,
        tuple(tuple(run["seconds"]["train_epochs"]) for run in runs),
        tuple(tuple(map(float, run["metrics"]["validation_accuracy_epochs"])) for run in runs),
        *(tuple(run["seconds"][name] for run in runs) for name in SECONDS),
        tuple(run["process"] for run in runs),
        tuple(float(run["metrics"]["test_accuracy"]) for run in runs),
    )


def check_same_data(seed: int, runs: dict[str, dict[str, Any]]) -> None:
    """Raises RunError unless all frameworks have trained on the same arrays."""
    hashes = {name: str(run["dataset"]["sha256"])[:12] for name, run in runs.items()}
    if len(set(hashes.values())) > 1:
        each = ", ".join(f"{name} {value}" for name, value in hashes.items())
        raise RunError(f"seed {seed}: the frameworks had different data, by hash {each}")


def train_all(
    config: Config, frameworks: list[str], folder: Path
) -> dict[int, dict[str, dict[str, Any]]]:
    """Every record by seed and framework.

    Raises:
      RunStopped: Ctrl-C or SIGTERM; what is done stays.
    """
    found = {config.seed + number: {} for number in range(config.seeds)}
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for seed, framework in turns(frameworks, config):
            record = measured(config, framework, seed, folder / f"{framework}-seed{seed}")
            found[seed][framework] = record
            accuracy = record["metrics"]["validation_accuracy"]
            seconds = f"{record['seconds']['train']:.1f} s of training"
            print(f"{framework}, seed {seed}: validation {accuracy:.4f}, {seconds}", flush=True)
    except KeyboardInterrupt:
        done = sum(map(len, found.values()))
        count = f"{done} of {config.seeds * len(frameworks)} runs"
        raise RunStopped(f"stopped after {count}; go on with --resume {folder.parent}") from None
    finally:
        signal.signal(signal.SIGTERM, before)
    for seed, runs in found.items():
        check_same_data(seed, runs)
    return found


def run(config: Config) -> None:
    frameworks = check(config)
    jax.config.update("jax_platforms", "cpu")  # what the record says of the machine, too
    with Run.open("seconds", config) as folder:
        folder.write_story()  # nothing refuses to go on from here
        found = train_all(config, frameworks, folder.path / "runs")
        lines = [line_of(name, [runs[name] for runs in found.values()]) for name in frameworks]
        ours = found[config.seed]["lstmjax"]  # which stands for the others
        few = "" if config.limit is None else f", the first {config.limit} of every split"
        made_up = ours["dataset"]["source"] == "offline"
        shown = (OFFLINE if made_up else SHOWN)[config.program]
        called = (seconds_tables.OFFLINE if made_up else seconds_tables.TITLES)[config.program]
        levels = list(seconds_tables.LEVELS[config.program])
        # What the runs have told, beside what was asked for.
        folder.config |= {
            "versions": {line.framework: line.versions for line in lines},
            "levels": levels,
            "title": f"{called}{few}, on {ours['dataset']['name']}",
        }
        data = f"{ours['dataset']['name']}{few}, {config.seeds} seeds"
        title = f"{shown} ({data})"
        folder.figure("seconds", seconds_plots.curves(title, lines, levels))
        every = [record for runs in found.values() for record in runs.values()]
        folder.finish(
            dataset=ours["dataset"],  # with other seeds other reviews are held out
            metrics=seconds_tables.columns(lines),
            seconds={name: sum(record["seconds"][name] for record in every) for name in SECONDS},
            params_sha256=ours["params_sha256"],
            seed=config.seed,
            devices=ours["environment"]["devices"],
        )
    for row in seconds_tables.rows(lines, levels):
        print(" | ".join(row))
    print(f"trained on {data}; record in {folder.path}")


if __name__ == "__main__":
    cli.main(lambda: run(cli.parse(Config, description=__doc__)))
