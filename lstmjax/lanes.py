"""Many runs in one compiled program: `--seeds 8` and `--sweep lr=1e-3,3e-3` of the experiments.

A lane is one run: a seed, with one value of the setting that is swept, if one is. Lanes know of no
other; each has the initial weights, hold-out, order of batches and dropout of the run that has its
seed and one device (`--seed 3 --devices 1`), and its numbers to round-off. Devices share the lanes,
and not the batches; data lie on each device once, and a lane's plan picks the rows of its own.

    program = Program(config, devices, clock, start=start, make_step=make_step, data=data)
    metrics = program.advance(plans)            # by lane, as a single run's
    choice = choose(program.lanes, "validation_accuracy", values, highest=True)

A sweep's value is chosen on what is held out for validation, and only the lanes that have it are
scored on the test split.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np

from lstmjax import cli, losses, parallel, reproducible, train
from lstmjax import seeds as many
from lstmjax.records import RunError

SWEPT = {"lr": "learning_rate", "clip_norm": "clip_norm"}
# What makes no sense, or is not there, for many runs at once.
_ALONE = ("live", "diagnose", "distributed")
MOST = 1_000  # seeds in one program: each has its state in memory, and its file of weights


# ---- which lanes there are ----------------------------------------------------------------------


class Lane(NamedTuple):
    """One run of many.

    Attributes:
      seed: its seed.
      swept: {field of the configuration: its value}, empty without a sweep.
      name: "seed3", or "lr0.001-seed3".
    """

    seed: int
    swept: dict[str, float]
    name: str


class Sweep(NamedTuple):
    """What `--sweep` asks for: a key of ``SWEPT``, and two or more values above 0."""

    name: str
    values: tuple[float, ...]


def parse_sweep(text: str | None) -> Sweep | None:
    """Reads `lr=1e-3,3e-3`.

    Raises:
      ValueError: another name, fewer than two values, one twice, or one that is no number above 0.
    """
    if text is None:
        return None
    expected = " or ".join(f"{name}=A,B,…" for name in SWEPT)
    name, _, values = text.partition("=")
    if name not in SWEPT:
        raise ValueError(f"sweep: got {text!r}, expected {expected}: nothing else can be swept")
    try:
        numbers = tuple(float(value) for value in values.split(","))
    except ValueError:
        numbers = ()
    if len(set(numbers)) < max(2, len(numbers)) or not all(0 < n < math.inf for n in numbers):
        what = "two or more different numbers above 0"
        raise ValueError(f"sweep: got {text!r}, expected {name}=A,B,… with {what}")
    return Sweep(name, numbers)


def asked_for(config: Any) -> bool:
    """Whether a configuration asks for more than one run."""
    return config.seeds > 1 or config.sweep is not None


def check(config: Any, *, validation: bool = True) -> None:
    """Checks `seeds` and `sweep` of a configuration.

    Args:
      config: a dataclass with ``seeds``, ``sweep`` and ``seed``.
      validation: whether there is something to choose a sweep's value by.

    Raises:
      ConfigError, ValueError: one clear line.
    """
    cli.check_counts(config, "seeds")
    last = config.seed + config.seeds - 1
    cli.check(config, "seeds", last < 2**31, f"seeds below {2**31}")
    cli.check(config, "seeds", config.seeds <= MOST, f"at most {MOST} in one program")
    parse_sweep(config.sweep)
    if not asked_for(config):
        return
    which = "--sweep" if config.seeds == 1 else f"--seeds {config.seeds}"
    for flag in _ALONE:
        cli.check(config, flag, not getattr(config, flag, False), f"none with {which}")
    if config.sweep is not None:
        what = "no sweep without validation examples to choose by: see --validation-size"
        cli.check(config, "sweep", validation, what)
        scored = getattr(config, "test_every_epoch", False)
        what = "none with --sweep: only the value that is chosen is scored on the test split"
        cli.check(config, "test_every_epoch", not scored, what)


def lanes_of(config: Any) -> list[Lane]:
    """The lanes of a configuration: for each value that is swept, `seeds` of them from `seed` on"""
    own = range(config.seed, config.seed + config.seeds)
    sweep = parse_sweep(config.sweep)
    if sweep is None:
        return [Lane(seed, {}, f"seed{seed}") for seed in own]
    field = SWEPT[sweep.name]
    return [
        Lane(seed, {field: value}, f"{sweep.name}{value!r}-seed{seed}")
        for value in sweep.values
        for seed in own
    ]


# ---- training -----------------------------------------------------------------------------------


def first_device(loss_fn: Callable) -> Callable:
    """A loss whose key is what the first device of a run has: ``fold_in(key, 0)``."""

    def own(params, batch, key, *carry):
        return loss_fn(params, batch, jax.random.fold_in(key, 0), *carry)

    return own


def pieces(
    lanes: Sequence[Lane], rows: Sequence[np.ndarray], epoch: int, batch_size: int, **options: Any
) -> list[list[dict[str, np.ndarray]]]:
    """The plans of an epoch: for each piece, a plan for each lane, of its rows in its order.

    ``options`` are those of ``train.plan_epoch``.
    """

    def plans(lane, own):
        found = train.plan_epoch(len(own), batch_size, seed=lane.seed, epoch=epoch, **options)
        return [{**plan, "rows": own[plan["rows"]].astype(np.int32)} for plan in found]

    by_lane = [plans(lane, own) for lane, own in zip(lanes, rows, strict=True)]
    return [list(piece) for piece in zip(*by_lane, strict=True)]


def equal_parts(plan: Mapping[str, np.ndarray], at_most: int) -> list[dict[str, np.ndarray]]:
    """A plan of K batches cut into pieces of the largest divisor of K that is at most so many."""
    count = len(plan["rows"])
    piece = max(n for n in range(1, min(at_most, count) + 1) if count % n == 0)
    return [{n: a[k : k + piece] for n, a in plan.items()} for k in range(0, count, piece)]


class Program:
    """The training of all lanes, compiled once.

    Attributes:
      lanes: S of them.
      devices: which ones share the lanes.
      data: what was given, on each device.
      states: all lanes' states, leaves [S', ...] as from ``seeds.stack``.
    """

    def __init__(
        self,
        config: Any,
        devices: Sequence[jax.Device],
        clock: train.Clock,
        *,
        start: Callable[[Any], Any],
        make_step: Callable[[Any], Callable],
        data: Mapping[str, np.ndarray],
        how: str | None = None,
    ):
        """Places data and states; nothing is compiled yet.

        Args:
          config: with what ``lanes_of`` reads, and ``deterministic``: whether to check the first
            call, as ``reproducible.checked`` does.
          devices: which ones share the lanes; no more of them than lanes are used.
          clock: where the seconds go.
          start: ``start(config)``: the state before the first step, of a lane's configuration.
          make_step: ``make_step(config) -> step``: a train step without ``axis_name``, of a loss
            from ``first_device``; what is swept is a traced number in this configuration, and its
            seed is any lane's.
          data: arrays [N, ...] by name, the same ones for all lanes.
          how: as in ``seeds.spread``.
        """
        self.lanes = lanes_of(config)
        self.devices = list(devices)[: len(self.lanes)]
        self.data = parallel.place(dict(data), self.devices)
        # The value that is swept is no part of a state, but there must be one.
        drawn = {
            lane.seed: start(replace(config, seed=lane.seed, **lane.swept))
            for lane in self.lanes[: config.seeds]
        }
        self.states = many.stack([drawn[lane.seed] for lane in self.lanes], self.devices)
        number = functools.partial(np.asarray, dtype=jax.numpy.result_type(float))
        swept = [jax.tree.map(number, lane.swept) for lane in self.lanes]
        self._swept = many.stack(swept, self.devices)
        self._clock = clock
        self._compiled: dict[tuple, Callable] = {}

        def run(state, data, plan, swept):
            return train.scan_steps(make_step(replace(config, **swept)))(state, data, plan)

        self._run = many.spread(run, self.devices, shared=(1,), how=how)
        self._call = reproducible.checked(self._call, config.deterministic)

    @classmethod
    def of(cls, config: Any, clock: train.Clock, **of_one: Any) -> "Program":
        """A program on the devices that a configuration names."""
        return cls(config, parallel.use_devices(config.devices), clock, **of_one)

    def advance(self, plans: Sequence[dict[str, np.ndarray]]) -> list[Any]:
        """Takes the steps of a plan from ``train.plan_batches`` for each lane, all in one call.

        Args:
          plans: S plans of the same K batches' shape.

        Returns:
          The metrics of each lane's K steps, (sum [K], count [K]) by name.
        """
        plan = {"rows": plans[0]["rows"], "of each": many.stack(plans, self.devices)}
        self.states, metrics = self._call(self.states, self.data, plan)
        return split(metrics, len(self.lanes))

    def _call(self, states: Any, data: Any, plan: Mapping[str, Any]) -> tuple[Any, Any]:
        """The compiled program: new states and the metrics of all lanes."""
        shape = plan["rows"].shape
        arguments = states, data, plan["of each"], self._swept
        if shape not in self._compiled:
            self._compiled[shape] = self._clock.compile(self._run, *arguments)
        with self._clock("train"):
            return jax.block_until_ready(self._compiled[shape](*arguments))

    def step(self) -> int:
        """How many steps each lane has taken."""
        return int(np.ravel(parallel.fetch(_first(self.states).step))[0])

    def params(self) -> list[Any]:
        """Each lane's parameters, as NumPy arrays."""
        return split(_first(self.states).params, len(self.lanes))

    def pack(self, states: Any) -> Any:
        """The lanes without the copies that fill up the devices, for a ``Keeper``."""
        return jax.tree.map(lambda leaf: leaf[: len(self.lanes)], states)

    def put(self, states: Any) -> None:
        """Goes on from states, leaves [S, ...] or more, of ``pack`` and so of any devices."""
        rows = [jax.tree.map(lambda leaf, n=n: leaf[n], states) for n in range(len(self.lanes))]
        self.states = many.stack(rows, self.devices)


def _first(states: Any) -> Any:
    """The first TrainState of a lane's states, which may hold others, or what is carried."""
    while not hasattr(states, "params"):
        states = states[0]
    return states


def split(tree: Any, count: int) -> list[Any]:
    """One tree of NumPy arrays [...] for each of the first ``count`` rows of leaves [S', ...]."""
    whole = many.unstack(tree, count)
    return [jax.tree.map(lambda leaf, n=n: leaf[n], whole) for n in range(count)]


def evaluator(metric_fn: Callable, clock: train.Clock, batch_size: int = 500) -> Callable:
    """Builds ``evaluate(program, params, arrays, rows) -> [{name: mean}]``, an entry for each lane.

    Args:
      metric_fn: ``metric_fn(params, batch) -> metrics``, as in ``parallel.evaluator``.
      clock: where the seconds go, to "compile" and "eval".
      batch_size: examples in a batch.

    Returns:
      ``evaluate``: ``params`` is a list with the parameters of some lanes, ``arrays`` a dict of
      [N, ...] arrays (``program.data``, or others), ``rows`` the examples of each of those lanes.
    """
    run = train.scan_eval(train.make_eval_step(metric_fn))
    compiled = {}

    def evaluate(program, params, arrays, rows):
        devices = program.devices[: len(params)]
        plans = [train.plan_batches(own, batch_size) for own in rows]
        if arrays is not program.data or len(devices) < len(program.devices):
            arrays = parallel.place(arrays, devices)
        arguments = many.stack(params, devices), arrays, many.stack(plans, devices)
        shapes = str(jax.tree.map(jax.numpy.shape, arguments[1:]))
        if shapes not in compiled:
            spread = many.spread(run, devices, shared=(1,), donate=())
            compiled[shapes] = clock.compile(spread, *arguments)
        with clock("eval"):
            sums = jax.block_until_ready(compiled[shapes](*arguments))
        return [losses.means(own) for own in split(sums, len(params))]

    return evaluate


# ---- choosing -----------------------------------------------------------------------------------


class Choice(NamedTuple):
    """The value that a sweep ended in.

    Attributes:
      lanes: the places of the lanes that have it; without a sweep, of all.
      swept: {field: value}, empty without a sweep.
      metrics: for the record.
      line: for the screen, or "".
    """

    lanes: list[int]
    swept: dict[str, float]
    metrics: dict[str, Any]
    line: str


def choose(lanes: Sequence[Lane], name: str, values: Sequence[float], *, highest: bool) -> Choice:
    """Chooses the value with the best mean over its seeds; of equal ones, that named first.

    Args:
      lanes: S lanes, from ``lanes_of``.
      name: what ``values`` are, for the record: of a split that is not tested on.
      values: [S] by lane. A value of which one seed is not finite is never chosen.
      highest: whether more is better.

    Raises:
      RunError: every value has a seed that is not finite.
    """
    groups: dict[float, list[int]] = {}
    for place, lane in enumerate(lanes):
        for value in lane.swept.values():
            groups.setdefault(value, []).append(place)
    if not groups:
        return Choice(list(range(len(lanes))), {}, {}, "")
    with np.errstate(invalid="ignore"):  # of values that are infinite
        found = [many.interval([values[n] for n in own]) for own in groups.values()]
    means, halves = zip(*found, strict=True)
    order = np.where(np.isfinite(means), means if highest else np.negative(means), -np.inf)
    if not np.isfinite(order).any():
        raise RunError(f"--sweep: no value ended in a finite {name}, expected smaller ones")
    best = list(groups)[int(np.argmax(order))]
    (field,) = lanes[0].swept
    short = next(key for key, swept in SWEPT.items() if swept == field)
    found = {
        f"sweep_{short}": list(groups),
        f"sweep_{name}_mean": [float(mean) for mean in means],
        f"sweep_{name}_ci95": [float(half) for half in halves],
        f"sweep_chosen_{short}": best,
        "sweep_used_validation": int(name.startswith("validation_")),
    }
    each = ", ".join(
        f"{short} {value!r}: {plus_minus(m, h)}"
        for value, m, h in zip(groups, means, halves, strict=True)
    )
    without = "" if name.startswith("validation_") else " (there is no validation split)"
    line = f"chosen by {name}{without}: {short} {best!r} ({each})"
    return Choice(groups[best], {field: best}, found, line)


def plus_minus(mean: float, half: float, form: str = ".4g") -> str:
    """`0.83 ± 0.01`, the interval only where there is one."""
    return f"{mean:{form}}" + (f" ± {half:{form}}" if np.isfinite(half) else "")
