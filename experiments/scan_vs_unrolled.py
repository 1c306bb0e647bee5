"""One LSTM layer, run by every method there is: what compiling costs, and what a call costs.

    python experiments/scan_vs_unrolled.py           some sizes and methods, in under two minutes
    python experiments/scan_vs_unrolled.py --full    all of them, about an hour

A recurrence can be compiled as a loop (scan), as a loop with some steps written out in each
iteration (scan unroll=k), with all steps written out (unrolled), or as a loop whose derivative is
written by hand (fused); where the machine has them, the kernels of oneDNN and cuDNN run it too. All
compute the same numbers: the largest difference from scan stands beside every time.

Timed are the outputs (forward), and the mean of the squared outputs with its gradients with respect
to weights and inputs (forward + backward), from inputs that lie on the device, in float32 and at
JAX's default precision of products. At each size the methods take turns in one process. What is
printed last is a recommendation, drawn from these numbers alone.

Writing all steps out compiles for minutes where there are many. How long it would take is predicted
from the largest number of steps compiled before, in proportion to T^1.5 (on CPUs, times grow with
T^1.3 to T^1.8), and where that is more than --compile-limit the program is not run.
"""

import dataclasses
import importlib
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lstmjax import cli, parallel, timing_plots, timing_tables, timings, train
from lstmjax.lstm import LSTMParams, init_lstm, lstm
from lstmjax.records import Run, params_sha256, to_json, write_file
from lstmjax.timing_tables import Cell, Pass

METHODS = {
    "scan": {"method": "scan"},
    **{f"scan unroll={n}": {"method": "scan", "unroll": n} for n in (2, 4, 8, 16)},
    **{name: {"method": name} for name in ("unrolled", "fused", "onednn", "cudnn")},
}
BACKENDS = ("onednn", "cudnn")
PROBE = 20  # steps; as many are always compiled, to predict from
PLACE = {"params": parallel.WHOLE, "xs": parallel.BATCHES}  # [T, B, D]: the batch is split


class Mode(NamedTuple):
    """What is run where nothing else is said; the names are those of ``Config``."""

    methods: tuple[str, ...]
    steps: tuple[int, ...]
    hidden_sizes: tuple[int, ...]
    seconds: float
    compile_limit: float


QUICK = Mode(
    ("scan", "scan unroll=4", "unrolled", "fused", "onednn", "cudnn"),
    (20, 80),
    (10, 128),
    0.4,
    30.0,
)
FULL = Mode(tuple(METHODS), (20, 80, 200, 784), (10, 64, 128, 512), 2.0, 300.0)


@dataclasses.dataclass(frozen=True)
class Config:
    quick: bool = False
    """Some sizes and methods, in under two minutes; so it is without --full too."""
    full: bool = False
    """All sizes and methods, about an hour."""
    steps: tuple[int, ...] = ()
    """Values of T; those of --quick or --full when not given."""
    hidden_sizes: tuple[int, ...] = ()
    """Values of H; those of --quick or --full when not given."""
    batch_size: int = 32
    """B, over all devices."""
    input_size: int = 32
    """D."""
    compile_limit: float | None = None
    """Seconds above which an unrolled program is not compiled; 30, or 300 with --full."""
    seconds: float | None = None
    """Seconds to time each program for; 0.4, or 2 with --full."""
    rounds: int = 5
    """Turns that each program gets; it runs at least once in each."""
    devices: int = 1
    """Devices to split the batch over."""
    seed: int = 0
    """Of weights and inputs."""
    out: str | None = None
    """Folder for the run's files, new or empty; a fresh one under runs/ when not given."""


def settled(config: Config) -> Config:
    """The configuration with the numbers of its mode where none were given.

    Raises:
      ConfigError: a number out of range, --quick together with --full.
    """
    cli.check(config, "quick", not (config.quick and config.full), "it alone, without --full")
    for name in ("steps", "hidden_sizes"):
        whole = all(0 < n < 2**31 for n in getattr(config, name))
        cli.check(config, name, whole, "integers of at least 1")
    cli.check_counts(config, "batch_size", "input_size", "rounds", "devices")
    cli.check_counts(config, "seed", least=0)
    cli.check_positive(config, "seconds", "compile_limit")
    fits = config.batch_size % config.devices == 0
    cli.check(config, "batch_size", fits, f"a multiple of --devices {config.devices}")
    mode = FULL if config.full else QUICK
    return dataclasses.replace(
        config,
        steps=tuple(sorted(set(config.steps or mode.steps))),
        hidden_sizes=tuple(sorted(set(config.hidden_sizes or mode.hidden_sizes))),
        seconds=config.seconds or mode.seconds,
        compile_limit=config.compile_limit or mode.compile_limit,
    )


def why_not(method: str) -> str | None:
    """Why a method cannot run on this machine; None where it can."""
    if method not in BACKENDS:
        return None
    return importlib.import_module(f"lstmjax.{method}").available()


# ---- what is timed ------------------------------------------------------------------------------


def functions(method: str, devices: list[jax.Device], size: int) -> dict[str, Any]:
    """ "forward" and "backward" as functions of ``(params, xs)``, spread over the devices.

    Args:
      method: a key of ``METHODS``.
      devices: which ones.
      size: how many outputs there are, over all devices.
    """

    def forward(params, xs):
        return lstm(params, xs, **METHODS[method])[1]

    def loss(params, xs):
        return jnp.sum(forward(params, xs) ** 2) / size

    def backward(params, xs):
        value, (of_params, of_xs) = jax.value_and_grad(loss, (0, 1))(params, xs)
        if len(devices) > 1:
            value, of_params = jax.lax.psum((value, of_params), parallel.AXIS)
        return value, of_params, of_xs

    if len(devices) == 1:
        return {"forward": forward, "backward": backward}
    how = {"mesh": parallel.mesh(devices), "in_specs": tuple(PLACE.values()), "check_vma": False}
    out = {"forward": PLACE["xs"], "backward": (parallel.WHOLE, *PLACE.values())}
    both = {"forward": forward, "backward": backward}
    return {kind: jax.shard_map(both[kind], out_specs=out[kind], **how) for kind in both}


def arguments(config: Config, devices: list[jax.Device], steps: int, hidden: int) -> tuple:
    """(params, xs [T, B, D]) on the devices: drawn weights, and normal noise."""
    of_params, of_xs = jax.random.split(jax.random.key(config.seed))
    params = init_lstm(of_params, config.input_size, hidden)
    xs = jax.random.normal(of_xs, (steps, config.batch_size, config.input_size))
    if len(devices) == 1:
        return jax.device_put((params, xs), devices[0])
    return tuple(
        parallel.place(tree, devices, spec)
        for tree, spec in zip((params, xs), PLACE.values(), strict=True)
    )


def error(got: Any, want: Any) -> float:
    """The largest max|got − want| / max|want| of the arrays of two trees; infinite for NaN."""
    worst = 0.0
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
        largest = np.max(np.abs(ours - theirs)) / (np.max(np.abs(theirs)) or 1.0)
        worst = max(worst, float(largest) if np.isfinite(largest) else np.inf)
    return worst


class Compiler:
    """Compiles, and leaves what would take too long: the time is known from fewer steps."""

    def __init__(self, limit: float, clock: train.Clock):
        self._limit = limit
        self._clock = clock
        self._known = {}  # (kind, hidden size) -> {steps: seconds}, of unrolled programs

    def __call__(
        self, kind: str, method: str, function: Any, given: tuple[LSTMParams, jax.Array], count: int
    ) -> timings.Program | None:
        """The program; None where its compiling is predicted to take more than the limit."""
        with self._clock("compile"):
            if method != "unrolled":
                return timings.compiled(function, *given, devices=count)
            params, xs = given
            known = self._known.setdefault((kind, params.w_x.shape[1]), {})
            if not known and len(xs) > PROBE:
                probe = timings.compiled(function, params, xs[:PROBE], devices=count)
                known[PROBE] = probe.compile_seconds
            if predicted(known, len(xs)) > self._limit:
                return None
            program = timings.compiled(function, *given, devices=count)
            known[len(xs)] = program.compile_seconds
            return program


def predicted(known: Mapping[int, float], steps: int) -> float:
    """Seconds to compile so many written-out steps, from those of the most steps known; else 0."""
    if not known:
        return 0.0
    most = max(known)
    return known[most] * (steps / most) ** 1.5


def measure(
    config: Config, steps: int, hidden: int, methods: list[str], devices: list, compiler: Compiler,
    clock: train.Clock,
) -> list[Cell]:  # fmt: skip
    """All methods at one size, in turns."""
    given = arguments(config, devices, steps, hidden)
    programs = {kind: {} for kind in timing_tables.PASSES}
    for method in methods:
        both = functions(method, devices, steps * config.batch_size * hidden)
        for kind, function in both.items():
            program = compiler(kind, method, function, given, len(devices))
            if program is not None:
                programs[kind][method] = program
    passes, errors = {}, {}
    for kind, compiled in programs.items():
        with clock({"forward": "eval", "backward": "train"}[kind]):
            calls = {method: partial(program.run, *given) for method, program in compiled.items()}
            found = timings.take_turns(calls, seconds=config.seconds, rounds=config.rounds)
        want = calls["scan"]()
        for method, program in compiled.items():
            passes[method, kind] = as_pass(program, found[method])
            errors[method, kind] = error(calls[method](), want)
    size = steps, config.batch_size, hidden, len(devices)
    return [
        Cell(
            *size,
            method,
            *(passes.get((method, kind)) for kind in programs),
            *(errors.get((method, kind), np.nan) for kind in programs),
        )
        for method in methods
    ]


def as_pass(program: timings.Program, timing: timings.Timing) -> Pass:
    known = program.temporary_bytes is not None
    memory = float(program.temporary_bytes) if known else np.nan
    return Pass(program.compile_seconds, timing.median, *timing.quartiles, memory)


# ---- the run ------------------------------------------------------------------------------------


def figures(config: Config, cells: list[Cell], methods: list[str], title: str) -> dict[str, Any]:
    """The figures by name: time relative to scan, and steps until compiling is won back."""

    def grid(method, number):
        return [[number(cell_at(t, h, method)) for t in config.steps] for h in config.hidden_sizes]

    def cell_at(steps, hidden, method):
        size = steps, config.batch_size, hidden, config.devices
        return timing_tables.at(cells, size, method)

    def wait(cell):
        base = timing_tables.at(cells, cell.size, "scan")
        return timing_tables.pays_after(cell.backward, base.backward)

    def times(cell):
        return timing_tables.relative(cells, cell, "backward")

    others = [method for method in methods if method != "scan"]
    sizes = config.steps, config.hidden_sizes
    return {
        "relative-time": timing_plots.relative_times(
            f"forward + backward, time as a multiple of scan's (–: not run)\n{title}",
            *sizes, {method: grid(method, times) for method in others},
        ),
        "pays-after": timing_plots.pays_after(
            "training steps until longer compiling is won back against scan "
            f"(∞: never, –: not run)\n{title}",
            *sizes, {method: grid(method, wait) for method in others},
        ),
    }  # fmt: skip


def run(config: Config) -> None:
    config = settled(config)
    devices, clock = parallel.use_devices(config.devices), train.Clock()
    jax.config.update("jax_enable_compilation_cache", False)  # what is found there costs nothing
    wanted = (FULL if config.full else QUICK).methods
    absent = {name: reason for name in wanted if (reason := why_not(name))}
    methods = [name for name in wanted if name not in absent]
    settings = {**dataclasses.asdict(config), "methods": methods, "unavailable": absent}
    count = f"{len(devices)} device" + "s" * (len(devices) > 1)
    title = f"LSTM, B = {config.batch_size}, D = {config.input_size}, {count}"
    print(f"{title}; {timing_tables.LEGEND}")
    with Run.create("scan_vs_unrolled", settings, out=config.out) as folder:
        compiler, cells, drawn = Compiler(config.compile_limit, clock), [], {}
        # The first program of its kind in a process takes longer to compile than it would later.
        for method in methods:
            first = functions(method, devices, 1)["backward"]
            timings.compiled(first, *arguments(config, devices, 1, 1))
        for hidden in config.hidden_sizes:
            for steps in config.steps:
                here = measure(config, steps, hidden, methods, devices, compiler, clock)
                cells += here
                rows = timing_tables.comparison_rows(here, config.compile_limit)
                print("\n" + timing_tables.aligned(timing_tables.HEAD, rows), flush=True)
                write_file(folder.path / "cells.json", to_json(as_json(cells)))
            drawn[str(hidden)] = arguments(config, devices, config.steps[-1], hidden)
        for name, figure in figures(config, cells, methods, title).items():
            folder.figure(name, figure)
        folder.finish(
            dataset={
                "name": "normal noise",
                "source": "generated",
                "sha256": params_sha256([xs for _, xs in drawn.values()]),
            },
            metrics=timing_tables.columns(cells, methods),
            seconds=clock.seconds,
            params_sha256=params_sha256({name: params for name, (params, _) in drawn.items()}),
            seed=config.seed,
            devices=devices,
        )
    print(f"\nrecord in {folder.path}\n{timing_tables.recommendation(cells)}")


def as_json(cells: list[Cell]) -> list[dict[str, Any]]:
    """Cells with the names of their fields."""
    passes = timing_tables.PASSES
    return [
        cell._asdict()
        | {kind: one and one._asdict() for kind in passes for one in [getattr(cell, kind)]}
        for cell in cells
    ]


if __name__ == "__main__":
    cli.main(lambda: run(cli.parse(Config, description=__doc__)))
