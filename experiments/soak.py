"""Kill a training run again and again, or let it run for an hour, and look at what is left.

    python experiments/soak.py                            50 kills, 15 minutes or so
    python experiments/soak.py --mode load --minutes 60   memory and time per step for an hour

In the mode kill, imdb.py is trained once undisturbed. Then the same command is started over and
over: each time the process is killed (SIGKILL, which nothing can catch) at a random moment after it
has begun to train, every other time while a checkpoint is being written, and taken up again with
--resume; where a run comes to its end, another one is begun. Every one that ends must have the
parameters' hash, the metrics and the metrics.jsonl of the undisturbed one, to the bit, and after
every kill only lines since the last checkpoint may be lost.

In the mode load, imdb.py trains for so many minutes while its memory and its steps are watched from
outside; it is stopped by SIGTERM.
"""

import dataclasses
import hashlib
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import imdb
import numpy as np
from tqdm import tqdm

from lstmjax import cli, soak_plots, soak_tables
from lstmjax.checkpoint import Checkpoints
from lstmjax.records import Run, RunError, params_sha256

SCRIPT = Path(__file__).with_name("imdb.py")


@dataclasses.dataclass(frozen=True)
class Config:
    mode: Literal["kill", "load"] = "kill"
    """What is done to the run."""
    kills: int = 50
    """How often a process is killed."""
    wait: float = 4.0
    """A kill comes at a random moment within so many seconds of training."""
    minutes: float = 60.0
    """How long the run under load goes on."""
    every: float = 5.0
    """Seconds between two looks at it."""
    data: Literal["auto", "tfds", "offline"] = "auto"
    """As in imdb.py."""
    limit: int = 4_000
    """Reviews of every split that are used, in the mode kill."""
    epochs: int = 4
    """Passes over them."""
    devices: int | None = None
    """As in imdb.py."""
    seed: int = 0
    """Of the moments at which a process is killed."""
    out: str | None = None
    """Folder for the run's files, new or empty; a fresh one under runs/ when not given."""


def start(*flags: str) -> subprocess.Popen:
    """imdb.py as a process of its own."""
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *flags],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def until(process: subprocess.Popen, condition: Callable[[], bool], pause: float = 0.002) -> bool:
    """Waits for a condition; False where the process ended before it was met."""
    while not condition():
        if process.poll() is not None:
            return False
        time.sleep(pause)
    return True


def ended(process: subprocess.Popen, *codes: int) -> None:
    """Waits for the end of a process that is to end with one of these codes."""
    error = process.communicate()[1].strip()
    if process.returncode not in codes:
        raise RunError(f"imdb.py ended with {process.returncode}: {error[-300:]}")


def left(folder: Path) -> dict[str, Any]:
    """What a run that came to its end has left."""
    record = json.loads((folder / "record.json").read_text())
    lines = hashlib.sha256((folder / "metrics.jsonl").read_bytes()).hexdigest()
    return {
        "params": record["params_sha256"],
        "metrics": record["metrics"],
        "lines": lines,
        "dataset": record["dataset"],
    }


def saving(folder: Path) -> bool:
    """Whether a checkpoint is being written: it has a temporary name until it is whole."""
    return any("tmp" in path.name for path in folder.glob("checkpoints/*"))


def steps(folder: Path) -> tuple[int, int]:
    """The last step that is logged, and the last that is saved."""
    metrics = folder / "metrics.jsonl"
    whole = metrics.read_bytes().splitlines(keepends=True) if metrics.exists() else []
    logged = [json.loads(line)["step"] for line in whole if line.endswith(b"\n")]
    saved = [int(p.name) for p in folder.glob("checkpoints/*") if p.name.isdigit()]
    return max(logged, default=0), max(saved, default=0)


def kill(config: Config, folder: Run, scratch: Path) -> tuple[dict[str, Any], Any, str]:
    """The mode kill: metrics, data set and parameters' hash of the record."""
    draw = random.Random(config.seed)
    flags = [f"--data={config.data}", f"--limit={config.limit}", f"--epochs={config.epochs}"]
    flags += ["--validation-size=500", "--save-every=1"]
    flags += [f"--devices={config.devices}"] if config.devices else []
    whole = start(*flags, f"--out={scratch / 'whole'}")
    ended(whole, 0)
    expected = left(scratch / "whole")

    found = {"kills": 0, "kills_while_saving": 0, "runs": 0, "runs_identical": 0}
    lost, bar, process = [], tqdm(total=config.kills, unit=" kills", disable=None), None
    while found["kills"] < config.kills or process is not None:
        run = scratch / f"run-{found['runs']}"
        if process is None:
            process = start(*flags, f"--out={run}")
        before = steps(run)[0]
        training = until(process, lambda run=run, before=before: steps(run)[0] > before)
        if training and found["kills"] < config.kills:  # else it goes on to its end
            time.sleep(draw.random() * config.wait)
            if found["kills"] % 2:
                until(process, lambda run=run: saving(run), pause=0.0002)
            found["kills_while_saving"] += saving(run)
            process.kill()
        ended(process, 0, -signal.SIGKILL)
        if (run / "record.json").exists():
            found["runs"] += 1
            found["runs_identical"] += left(run) == expected
            process = None
        else:
            found["kills"] += 1
            logged, saved = steps(run)
            lost.append(logged - saved)
            bar.update()
            folder.log(found["kills"], logged=logged, saved=saved)
            process = start(f"--resume={run}")
    bar.close()
    numbers = {"steps_lost_most": max(lost), "steps_lost_mean": float(np.mean(lost))}
    return found | numbers, expected["dataset"], expected["params"]


def look_at(process: subprocess.Popen) -> tuple[float, float]:
    """The megabytes of memory that a process has, and the processor seconds it has used."""
    command = ["ps", "-o", "rss=", "-o", "cputime=", "-p", str(process.pid)]
    said = subprocess.run(command, capture_output=True, text=True).stdout.split()
    if len(said) != 2:
        return float("nan"), float("nan")
    days, _, clock = said[1].rpartition("-")  # [days-]hours:minutes:seconds
    seconds = 0.0
    for part in clock.split(":"):
        seconds = 60 * seconds + float(part)
    return int(said[0]) / 1024, seconds + 86_400 * int(days or 0)


def load(config: Config, folder: Run, scratch: Path) -> tuple[dict[str, Any], Any, str]:
    """The mode load: metrics, data set and parameters' hash of the record."""
    run = scratch / "run"
    flags = [f"--data={config.data}", "--epochs=1000000", f"--out={run}"]
    process = start(*flags, *([f"--devices={config.devices}"] if config.devices else []))
    if not until(process, lambda: steps(run)[0] > 0):
        ended(process)
    begun, minutes, memory, used, done = time.monotonic(), [], [], [], []
    bar = tqdm(total=config.minutes, unit=" min", disable=None)
    while not minutes or minutes[-1] < config.minutes:
        time.sleep(config.every)
        if process.poll() is not None:
            ended(process)
        minutes.append((time.monotonic() - begun) / 60)
        seen = look_at(process)
        memory.append(seen[0])
        used.append(seen[1])
        done.append(steps(run)[0])
        folder.log(done[-1], minutes=minutes[-1], megabytes=seen[0], cpu_seconds=seen[1])
        bar.update(min(minutes[-1], config.minutes) - bar.n)
    bar.close()
    process.send_signal(signal.SIGTERM)
    ended(process, cli.STOPPED)
    at, memory = np.array(minutes), np.array(memory)
    # Milliseconds a step in each tenth of the time: scoring and saving are in it.
    edges = np.linspace(at[0], at[-1], 11)
    counted = np.maximum(np.diff(np.interp(edges, at, done)), 1)
    step_ms = np.diff(edges) * 60_000 / counted
    step_cpu_ms = np.diff(np.interp(edges, at, used)) * 1000 / counted
    settled = at >= at[-1] / 4  # buffers and caches have grown to their size by then
    slope = float(np.polyfit(at[settled] / 60, memory[settled], 1)[0])
    folder.figure("load", soak_plots.load(at, memory, edges, step_ms, step_cpu_ms))
    _, arrays, _ = Checkpoints(run / "checkpoints").latest()
    return (
        {
            "minutes": at.tolist(),
            "megabytes": memory.tolist(),
            "steps": int(done[-1]),
            "megabytes_first": float(np.median(memory[: max(1, len(memory) // 10)])),
            "megabytes_last": float(np.median(memory[-max(1, len(memory) // 10) :])),
            "megabytes_most": float(np.max(memory)),
            "megabytes_an_hour": slope,
            "step_ms": step_ms.tolist(),
            "step_cpu_ms": step_cpu_ms.tolist(),
        },
        imdb.load(imdb.Config(data=config.data)),
        params_sha256(arrays),
    )


MODES = {"kill": kill, "load": load}


def run(config: Config) -> None:
    cli.check_counts(config, "kills", "limit", "epochs", "devices")
    cli.check_counts(config, "seed", least=0)
    cli.check_positive(config, "wait", "minutes", "every")
    began = time.perf_counter()
    with Run.create("soak", config, out=config.out) as folder:
        with tempfile.TemporaryDirectory() as scratch:
            metrics, dataset, sha256 = MODES[config.mode](config, folder, Path(scratch))
        folder.finish(
            dataset=dataset,
            metrics=metrics,
            seconds={"compile": 0.0, "train": time.perf_counter() - began, "eval": 0.0},
            params_sha256=sha256,
            devices=config.devices,
            seed=config.seed,
        )
    data = dataset["name"] if isinstance(dataset, dict) else dataset.name
    print(f"{soak_tables.line(config.mode, metrics)}, on {data}; record in {folder.path}")
    if config.mode == "kill" and metrics["runs_identical"] < metrics["runs"]:
        sys.exit(1)


if __name__ == "__main__":
    cli.main(lambda: run(cli.parse(Config, description=__doc__)))
