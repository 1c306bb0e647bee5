"""One LSTM layer in every framework: the same weights and inputs, in one run, taking turns.

    pip install -e '.[peers]'
    python experiments/peers.py layers                              everything, about 1 1/2 hours
    python experiments/peers.py layers --shapes imdb --dtypes float32 --memory as-installed

Timed are the layer's outputs (forward), and the gradients of the mean of their squares with respect
to weights and inputs (forward + backward). Each framework's layer is a process of its own, called
as its users call it and in the layout that it takes by default (`FRAMEWORKS`). lstmjax runs on one
device, and again on a device per core (the batch split, gradients averaged); the others run on one
device, with all cores for the taking. What lstmjax's scan gives in float64 is the measure of what
each layer computes: the largest difference of an array, divided by its largest entry, stands beside
its times. A layer that is not installed or fails is a line that says why.

Run it where nothing else runs: threads that wait for one another inside every step, as PyTorch's
do, lose most to a busy neighbour. The record keeps the machine's load at the start.

`--memory`: where a machine is slow to give out fresh memory, much of a call's time may go into page
faults, because the C library hands freed memory back to the system; "kept" tells it not to, in
every process alike (`KEPT`).
"""

import itertools
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from peer_workers import FRAMEWORKS, STARTED

import lstmjax
from lstmjax import cli, interop, onednn, timings
from lstmjax.lstm import LSTMParams
from lstmjax.provenance import version
from lstmjax.records import Run, RunError, params_sha256
from lstmjax.schema import SECONDS

SHAPES = {  # B, T, D, H
    "sin": (50, 20, 10, 10),
    "imdb": (128, 80, 100, 64),
    "mnist": (50, 28, 28, 100),
    "smnist": (100, 784, 1, 128),
    "big": (64, 128, 512, 512),
}
DTYPES = ("float32", "bfloat16")
METHODS = ("fused", "scan", "onednn")  # of lstmjax
KINDS = {"forward": "eval", "train": "train"}  # what is timed, and what a record calls that
KEPT = "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=9999999999:glibc.malloc.hugetlb=1"
SEED = 0
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
PATIENCE = 900.0  # seconds to wait for an answer


@dataclass(frozen=True)
class Config:
    shapes: str = ",".join(SHAPES)
    """Which ones, with commas between: (B, T, D, H) in the table."""
    dtypes: str = ",".join(DTYPES)
    """Of weights and inputs."""
    frameworks: str = ",".join(FRAMEWORKS)
    """Which ones, with commas between."""
    memory: Literal["as-installed", "kept", "both"] = "both"
    """How the C library treats freed memory: as it does by itself, kept in the process, or both."""
    seconds: float = 2.0
    """For each layer, forward and again forward + backward, over all rounds."""
    rounds: int = 5
    """How often each layer's turn comes."""
    out: str | None = None
    """Folder for the run's files, new or empty; a fresh one under runs/ when not given."""


class Row(NamedTuple):
    """A line of a table: a layer in a process of its own."""

    framework: str
    method: str = ""
    devices: int = 1

    def __str__(self) -> str:
        spread = f"x{self.devices}" if self.devices > 1 else ""
        return " ".join(filter(None, (self.framework, self.method, spread)))


class Failed(Exception):
    """Why there is no number: one line, without folders."""

    def __init__(self, reason: str):
        super().__init__(re.sub(r"(?<![\w.~:/])(/[\w.+-]+)+/", "", " ".join(reason.split()))[:200])


# ---- what is asked ------------------------------------------------------------------------------


def chosen(config: Config, name: str, known: Iterable[str]) -> list[str]:
    """The names in a flag with commas, each of them known; in the order of ``known``."""
    names = getattr(config, name).split(",")
    cli.check(config, name, set(names) <= set(known), f"some of {', '.join(known)}")
    return [each for each in known if each in names]


def rows(frameworks: Iterable[str], batch: int, cores: int) -> list[Row]:
    """The lines of a table; of the devices per core as many as split the batch evenly."""
    devices = max(n for n in range(1, cores + 1) if batch % n == 0)
    found = []
    for framework in frameworks:
        if framework == "lstmjax":
            counts = (1, devices) if devices > 1 else (1,)
            found += [Row(framework, method, n) for n in counts for method in METHODS]
        else:
            found.append(Row(framework))
    return found


def problem(sizes: tuple[int, int, int, int], dtype: str) -> dict[str, np.ndarray]:
    """xs [T, B, D] and the weights of ``LSTMParams``: float32 arrays of values of ``dtype``."""
    batch, steps, inputs, hidden = sizes
    random, limit = np.random.default_rng(SEED), hidden**-0.5
    drawn = {
        "w_x": random.uniform(-limit, limit, (inputs, 4 * hidden)),
        "w_h": random.uniform(-limit, limit, (hidden, 4 * hidden)),
        "b": random.uniform(-limit, limit, 4 * hidden),
        "xs": random.normal(size=(steps, batch, inputs)),
    }
    return {name: a.astype(jnp.dtype(dtype)).astype(np.float32) for name, a in drawn.items()}


def in_layout_of(framework: str, given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The problem under the framework's names, {"x", "weights|…"}."""
    about = FRAMEWORKS[framework]
    weights = {name: given[name] for name in ("w_x", "w_h", "b")}
    if about.layout:
        weights = flatten_dict(interop.dump(about.layout, LSTMParams(**weights)), sep="|")
    x = given["xs"].swapaxes(0, 1) if about.batch_major else given["xs"]
    return {"x": x} | {f"weights|{name}": np.asarray(w) for name, w in weights.items()}


def in_our_layout(framework: str, found: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What a worker found: {"hs", "w_x", "w_h", "b", "xs"}, all but the first gradients."""
    about = FRAMEWORKS[framework]
    hs, xs = (found[n].swapaxes(0, 1) if about.batch_major else found[n] for n in ("hs", "x"))
    weights = {n.removeprefix("weights|"): a for n, a in found.items() if n.startswith("weights|")}
    if about.layout:
        if about.layout == "torch":  # each of two biases has the gradient that our only one has
            weights["bias_hh_l0"] = np.zeros_like(weights["bias_hh_l0"])
        read = interop.load(about.layout, unflatten_dict(weights, sep="|"), forget_bias=0.0)
        weights = {n: np.asarray(a) for n, a in read._asdict().items() if a is not None}
    return {"hs": hs, "xs": xs, **weights}


def differences(got: Mapping[str, np.ndarray], want: Mapping[str, np.ndarray]) -> dict[str, float]:
    """max|got − want| / max|want| of the outputs, and the largest such of the four gradients."""
    if {n: a.shape for n, a in got.items()} != {n: a.shape for n, a in want.items()}:
        raise Failed("outputs or gradients of another shape than lstmjax's")
    # Not max: that would pass over NaN.
    each = {n: float(np.max(abs(got[n] - w)) / np.max(abs(w))) for n, w in want.items()}
    gradients = np.max([value for name, value in each.items() if name != "hs"])
    return {"value_error": each["hs"], "gradient_error": float(gradients)}


# ---- workers ------------------------------------------------------------------------------------


class Worker:
    """A process with one layer; it answers every line of JSON with one."""

    def __init__(self, memory: str, keras_backend: str | None):
        variables = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
        package = str(Path(timings.__file__).resolve().parents[1])
        path = os.pathsep.join(filter(None, (package, variables.get("PYTHONPATH"))))
        variables |= {
            "PYTHONPATH": path,
            "JAX_PLATFORMS": "cpu",
            "CUDA_VISIBLE_DEVICES": "",
            "TF_CPP_MIN_LOG_LEVEL": "3",
        }
        if keras_backend:
            variables["KERAS_BACKEND"] = keras_backend
        if memory == "kept":
            variables["GLIBC_TUNABLES"] = KEPT
        self.errors = tempfile.TemporaryFile("w+", errors="replace")
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("peer_workers.py")), STARTED],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors,
            text=True, encoding="utf-8", env=variables,
        )  # fmt: skip

    def ask(self, **question: Any) -> dict[str, Any]:
        """Its answer. Raises ``Failed`` with the worker's own words, or for one that has died."""
        alarm = threading.Timer(PATIENCE, self.process.kill)
        alarm.start()
        try:
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            alarm.cancel()
        if not line:
            raise Failed(f"the process ended with code {self.process.wait()}: {self._last_words()}")
        answer = json.loads(line)
        if "failed" in answer:
            raise Failed(answer["failed"])
        return answer

    def _last_words(self) -> str:
        self.errors.seek(0)
        lines = [line for line in self.errors.read().splitlines() if line.strip()]
        return lines[-1] if lines else "it said nothing"

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.errors):
            try:
                pipe.close()
            except BrokenPipeError:  # a question that it never read
                pass


def prepare(
    worker: Worker, row: Row, given: Mapping[str, np.ndarray], dtype: str, folder: Path
) -> dict[str, np.ndarray]:
    """Has the worker build its layer and compute once: outputs and gradients in our layout."""
    asked, found = folder / f"{row} asked.npz", folder / f"{row} found.npz"
    np.savez(asked, **in_layout_of(row.framework, given))
    sizes = given["xs"].shape[-1], len(given["w_h"])
    files = {"asked": str(asked), "found": str(found)}
    worker.ask(**row._asdict(), sizes=sizes, dtype=dtype, cores=CORES, **files)
    with np.load(found, allow_pickle=False) as file:
        arrays = in_our_layout(row.framework, dict(file))
    asked.unlink()
    found.unlink()
    return arrays


def reference(given: Mapping[str, np.ndarray], folder: Path) -> dict[str, np.ndarray]:
    """Outputs and gradients in float64."""
    worker = Worker("as-installed", None)
    try:
        return prepare(worker, Row("lstmjax", "scan"), given, "float64", folder)
    except Failed as failed:
        raise RunError(f"no float64 to compare with: {failed}") from failed
    finally:
        worker.close()


def in_turns(
    workers: Mapping[Row, Worker], config: Config, spent: dict[str, float]
) -> dict[Row, dict[str, timings.Timing] | str]:
    """Times every worker in turns: by row the two ``Timing``s, or why there are none."""
    times = {row: {kind: [] for kind in KINDS} for row in workers}
    failed = {}
    for _ in range(config.rounds):
        for row, kind in itertools.product(workers, KINDS):
            if row in failed:
                continue
            start = time.perf_counter()
            try:
                answer = workers[row].ask(run=kind, seconds=config.seconds / config.rounds)
                times[row][kind] += answer["seconds"]
            except Failed as reason:
                failed[row] = str(reason)
            spent[KINDS[kind]] += time.perf_counter() - start
    able = [row for row in workers if row not in failed]
    return {row: {k: timings.summary(t) for k, t in times[row].items()} for row in able} | failed


def compare(
    shape: str, dtype: str, memory: str, config: Config, spent: dict[str, float]
) -> dict[Row, dict[str, Any] | str]:
    """One table: by row its errors and times, or why there are none."""
    given, workers = problem(SHAPES[shape], dtype), {}

    def ready(row: Row) -> dict[str, float] | str:
        try:
            workers[row] = Worker(memory, FRAMEWORKS[row.framework].keras_backend)
            return differences(prepare(workers[row], row, given, dtype, Path(folder)), want)
        except Failed as reason:
            return str(reason)

    with ExitStack() as stack:
        stack.callback(lambda: [worker.close() for worker in workers.values()])
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        start = time.perf_counter()
        want = reference(given, Path(folder))
        lines = rows(chosen(config, "frameworks", FRAMEWORKS), SHAPES[shape][0], CORES)
        pool = ThreadPoolExecutor(CORES)
        stack.callback(pool.shutdown, cancel_futures=True)
        found = dict(zip(lines, pool.map(ready, lines), strict=True))
        spent["compile"] += time.perf_counter() - start
        able = {row: workers[row] for row in lines if not isinstance(found[row], str)}
        for row, times in in_turns(able, config, spent).items():
            found[row] = times if isinstance(times, str) else found[row] | times
        return found


# ---- the run ------------------------------------------------------------------------------------


def check(config: Config) -> None:
    for name, known in (("shapes", SHAPES), ("dtypes", DTYPES), ("frameworks", FRAMEWORKS)):
        chosen(config, name, known)
    cli.check_positive(config, "seconds")
    cli.check_counts(config, "rounds")
    glibc = platform.libc_ver()[0] == "glibc"
    cli.check(config, "memory", glibc or config.memory == "as-installed", "as-installed: no glibc")


def layers_of(frameworks: Iterable[str]) -> dict[str, dict[str, Any]]:
    """What a record says of the frameworks: versions, how each is called, what bfloat16 is."""
    found = {}
    for name in frameworks:
        about = FRAMEWORKS[name]
        versions = {}
        if name == "lstmjax":
            versions[name] = lstmjax.__version__
            if onednn.available() is None:
                versions["oneDNN"] = onednn.loaded()
        for package in about.packages:  # TensorFlow comes under two names
            versions[package] = version(package) or version(f"{package}-cpu") or "missing"
        found[name] = {"versions": versions, "how": about.how, "bfloat16": about.bfloat16}
    return found


def warn_of(load: float) -> None:
    """Says on standard error that other work has more than half of the cores."""
    cores = os.cpu_count() or 1
    if load > cores / 2:
        told = "times taken beside other work are no comparison"
        print(f"warning: the machine's load is {load} on {cores} cores: {told}", file=sys.stderr)


def run(config: Config) -> None:
    check(config)
    jax.config.update("jax_platforms", "cpu")
    load = round(os.getloadavg()[0], 2)
    shapes, dtypes = chosen(config, "shapes", SHAPES), chosen(config, "dtypes", DTYPES)
    conditions = ["as-installed", "kept"] if config.memory == "both" else [config.memory]
    metrics, failed, spent = {}, {}, dict.fromkeys(SECONDS, 0.0)
    with Run.create("peer-layers", config, out=config.out) as folder:
        warn_of(load)
        for memory, shape, dtype in itertools.product(conditions, shapes, dtypes):
            print(f"{shape} {dtype}, memory {memory}", flush=True)
            for row, found in compare(shape, dtype, memory, config, spent).items():
                key = f"{memory}|{shape}|{dtype}|{row}"
                print(f"  {row}: {described(found)}", flush=True)
                if isinstance(found, str):
                    failed[key] = found
                    continue
                for name, value in found.items():
                    timing = isinstance(value, timings.Timing)
                    value = [value.median, *value.quartiles, value.calls] if timing else value
                    metrics[f"{key}|{name}"] = value
        if not metrics:
            raise RunError(f"no layer could be timed: {next(iter(failed.values()))}")
        folder.config |= {
            "sizes": {shape: SHAPES[shape] for shape in shapes},
            "layers": layers_of(chosen(config, "frameworks", FRAMEWORKS)),
            "failed": failed,
            "load": load,
            "libc": " ".join(platform.libc_ver()),
        }
        finish(folder, metrics, spent)
    print(f"record in {folder.path}")


def described(found: Mapping[str, Any] | str) -> str:
    """A row as it is printed."""
    if isinstance(found, str):
        return f"not timed: {found}"
    times = [f"{kind} {1e3 * found[kind].median:.3g} ms" for kind in KINDS]
    errors = [f"{name} {found[f'{name}_error']:.0e}" for name in ("value", "gradient")]
    return ", ".join(times + errors)


def finish(folder: Run, metrics: Mapping[str, Any], spent: Mapping[str, float]) -> None:
    """Writes the record."""
    problems = {shape: problem(sizes, "float32") for shape, sizes in SHAPES.items()}
    xs = {shape: given.pop("xs") for shape, given in problems.items()}
    folder.finish(
        dataset={"name": "random inputs", "source": "generated", "sha256": params_sha256(xs)},
        metrics=metrics,
        seconds=spent,
        params_sha256=params_sha256(problems),
        seed=SEED,
        devices=jax.devices("cpu")[:1],
    )


def main() -> None:
    run(cli.parse(Config, argv=sys.argv[2:], description=__doc__))


if __name__ == "__main__":
    import peers

    peers.no_script(__file__)
