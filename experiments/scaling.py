"""How the time of one LSTM layer grows with steps, batch, hidden size and devices.

    python experiments/scaling.py           up to 100,000 steps, in under two minutes
    python experiments/scaling.py --full    more sizes, timed for longer: about ten minutes

Timed are the outputs (forward), and the mean of the squared outputs with its gradients with respect
to weights and inputs (forward + backward), of the methods fused and scan, which take turns. Along
each of the four axes the other sizes stay as they are: few and small ones for the steps, where the
loop is all there is to time. A recurrence takes time in proportion to T, so the time per step grows
with T only where what is kept for the gradients outgrows a cache; what is printed last is by how
much it does.
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lstmjax import cli, parallel, timing_plots, timing_tables, timings, train
from lstmjax.lstm import init_lstm, lstm
from lstmjax.records import Run, params_sha256
from lstmjax.timing_tables import Cell, Pass

METHODS = ("scan", "fused")
PLACE = {"params": parallel.WHOLE, "xs": parallel.BATCHES}  # [T, B, D]: the batch is split


class Size(NamedTuple):
    """(T, B, H, devices), the letters of ``timing_tables.AXES``."""

    steps: int
    batch_size: int
    hidden_size: int
    devices: int


class Mode(NamedTuple):
    """What is run where nothing else is said; the names are those of ``Config``."""

    steps: tuple[int, ...]
    batch_sizes: tuple[int, ...]
    hidden_sizes: tuple[int, ...]
    seconds: float
    rounds: int


QUICK = Mode((100, 1000, 10_000, 100_000), (1, 16, 256), (16, 64, 256), 0.3, 3)
FULL = Mode(
    (10, 100, 1000, 10_000, 100_000),
    (1, 4, 16, 64, 256, 1024),
    (16, 32, 64, 128, 256, 512, 1024),
    2.0,
    5,
)


@dataclasses.dataclass(frozen=True)
class Config:
    quick: bool = False
    """Some sizes, in under two minutes; so it is without --full too."""
    full: bool = False
    """More sizes, timed for longer."""
    steps: tuple[int, ...] = ()
    """Values of T; those of --quick or --full when not given."""
    batch_sizes: tuple[int, ...] = ()
    """Values of B; those of --quick or --full when not given."""
    hidden_sizes: tuple[int, ...] = ()
    """Values of H; those of --quick or --full when not given."""
    devices: int | None = None
    """The most devices to split a batch over; all accelerators or CPU cores when not given."""
    split_batch: int = 256
    """The batch that the devices split."""
    input_size: int = 16
    """D."""
    seconds: float | None = None
    """Seconds to time each program for; 0.3, or 2 with --full."""
    rounds: int | None = None
    """Turns that each program gets, at least one call in each; 3, or 5 with --full."""
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
    for name in ("steps", "batch_sizes", "hidden_sizes"):
        whole = all(0 < n < 2**31 for n in getattr(config, name))
        cli.check(config, name, whole, "integers of at least 1")
    cli.check_counts(config, "input_size", "rounds", "devices", "split_batch")
    cli.check_counts(config, "seed", least=0)
    cli.check_positive(config, "seconds")
    mode = (FULL if config.full else QUICK)._asdict()
    chosen = {name: getattr(config, name) or value for name, value in mode.items()}
    several = {n: tuple(sorted(set(v))) for n, v in chosen.items() if isinstance(v, tuple)}
    return dataclasses.replace(config, **chosen | several)


def bases(config: Config) -> dict[str, Size]:
    """What stays as it is along each axis."""
    return {
        "steps": Size(1, 4, 16, 1),
        "batch_size": Size(100, 1, 64, 1),
        "hidden_size": Size(100, 32, 1, 1),
        "devices": Size(100, config.split_batch, 128, 1),
    }


def sizes(config: Config, devices: int) -> dict[str, list[Size]]:
    """The sizes along each axis; devices are doubled until there are no more."""
    counts = {2**n for n in range(devices.bit_length())} | {devices}
    values = {
        "steps": config.steps,
        "batch_size": config.batch_sizes,
        "hidden_size": config.hidden_sizes,
        "devices": sorted(n for n in counts if config.split_batch % n == 0),
    }
    return {
        axis: [base._replace(**{axis: value}) for value in values[axis]]
        for axis, base in bases(config).items()
    }


# ---- what is timed ------------------------------------------------------------------------------


def functions(method: str, devices: list[jax.Device], size: Size) -> dict[str, Any]:
    """ "forward" and "backward" as functions of ``(params, xs)``, spread over the devices."""
    count = size.steps * size.batch_size * size.hidden_size

    def forward(params, xs):
        return lstm(params, xs, method=method)[1]

    def loss(params, xs):
        return jnp.sum(forward(params, xs) ** 2) / count

    def backward(params, xs):
        value, (of_params, of_xs) = jax.value_and_grad(loss, (0, 1))(params, xs)
        return *jax.lax.psum((value, of_params), parallel.AXIS), of_xs

    how = {"mesh": parallel.mesh(devices), "in_specs": tuple(PLACE.values()), "check_vma": False}
    return {
        "forward": jax.shard_map(forward, out_specs=PLACE["xs"], **how),
        "backward": jax.shard_map(backward, out_specs=(parallel.WHOLE, *PLACE.values()), **how),
    }


def arguments(config: Config, devices: list[jax.Device], size: Size) -> tuple:
    """(params, xs [T, B, D]) on the devices: drawn weights, and normal noise."""
    of_params, of_xs = jax.random.split(jax.random.key(config.seed))
    params = init_lstm(of_params, config.input_size, size.hidden_size)
    xs = jax.random.normal(of_xs, (size.steps, size.batch_size, config.input_size))
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


def measure(
    config: Config, size: Size, devices: list[jax.Device], clock: train.Clock
) -> list[Cell]:
    """Both methods at one size, in turns."""
    given = arguments(config, devices, size)
    passes, errors = {}, {}
    for kind, spent in (("forward", "eval"), ("backward", "train")):
        programs = {}
        with clock("compile"):
            for method in METHODS:
                function = functions(method, devices, size)[kind]
                programs[method] = timings.compiled(function, *given, devices=len(devices))
        calls = {method: partial(program.run, *given) for method, program in programs.items()}
        with clock(spent):
            found = timings.take_turns(calls, seconds=config.seconds, rounds=config.rounds)
        want = calls["scan"]()
        for method, program in programs.items():
            timing, memory = found[method], program.temporary_bytes
            memory = np.nan if memory is None else float(memory)
            times = program.compile_seconds, timing.median, *timing.quartiles
            passes[method, kind] = Pass(*times, memory)
            errors[method, kind] = error(calls[method](), want)
    kinds = timing_tables.PASSES
    return [
        Cell(*size, m, *(passes[m, kind] for kind in kinds), *(errors[m, kind] for kind in kinds))
        for m in METHODS
    ]


# ---- the run ------------------------------------------------------------------------------------


def figure(cells: list[Cell], bases: dict[str, dict], title: str) -> Any:
    """Time against each axis along which there is more than one size."""
    panels = {}
    for axis, base in bases.items():
        chosen = timing_tables.along(cells, axis, base)
        lines = {
            (method, label): tuple(
                zip(
                    *(
                        (getattr(cell, axis), getattr(cell, kind).median)
                        for cell in chosen
                        if cell.method == method
                    ),
                    strict=True,
                )
            )
            for method in METHODS
            for kind, label in timing_tables.PASSES.items()
        }
        panels[timing_tables.LETTERS[axis]] = timing_tables.fixed(axis, base), lines
    return timing_plots.times_along(title, panels)


def run(config: Config) -> None:
    config = settled(config)
    devices, clock = parallel.use_devices(config.devices), train.Clock()
    jax.config.update("jax_enable_compilation_cache", False)  # what is found there costs nothing
    fixed = {axis: base._asdict() for axis, base in bases(config).items()}
    settings = {**dataclasses.asdict(config), "methods": METHODS, "bases": fixed}
    title = f"LSTM, D = {config.input_size}"
    print(f"{title}, up to {len(devices)} devices; times are medians with quartiles in parentheses")
    with Run.create("scaling", settings, out=config.out) as folder:
        found, drawn = {}, {}
        for axis, chosen in sizes(config, len(devices)).items():
            for size in chosen:
                if size not in found:
                    found[size] = measure(config, size, devices[: size.devices], clock)
            cells = [cell for size in chosen for cell in found[size]]
            head, rows = timing_tables.scaling_rows(cells, axis, METHODS)
            print(f"\n{timing_tables.fixed(axis, fixed[axis])}")
            print(timing_tables.aligned(head, rows), flush=True)
            drawn[axis] = arguments(config, devices[:1], chosen[-1])
        cells = [cell for measured in found.values() for cell in measured]
        folder.figure("scaling", figure(cells, fixed, title))
        folder.finish(
            dataset={
                "name": "normal noise",
                "source": "generated",
                "sha256": params_sha256([xs for _, xs in drawn.values()]),
            },
            metrics=timing_tables.columns(cells, METHODS),
            seconds=clock.seconds,
            params_sha256=params_sha256({axis: params for axis, (params, _) in drawn.items()}),
            seed=config.seed,
            devices=devices,
        )
    along_steps = timing_tables.along(cells, "steps", fixed["steps"])
    print(f"\nrecord in {folder.path}\n{timing_tables.growth_text(along_steps, METHODS)}")


if __name__ == "__main__":
    cli.main(lambda: run(cli.parse(Config, description=__doc__)))
