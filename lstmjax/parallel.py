"""Devices: how many, and how a function of (state, data, plan) is spread over them.

On a CPU every core is a device of its own. Splitting a batch over cores keeps both busy through
the small products of a recurrence, where threads inside one product cannot.

The devices may be those of several processes (``distributed``), which all make the same calls in
the same order. Each puts its own part of every array on its own devices; a batch's rows are shared
out in the order of the devices, so that nothing depends on which process a device belongs to.
"""

import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lstmjax import checks, losses, train
from lstmjax.provenance import processes

AXIS = "batch"
MAX_CPU_DEVICES = 64  # each is a thread; a collective waits for all of them
WHOLE = P()  # every device has all of it
SPLIT = P(AXIS)  # split along the first axis
BATCHES = P(None, AXIS)  # [K, B]: every batch is split


def use_devices(count: int | None = None, name: str = "devices") -> list[jax.Device]:
    """Chooses the devices of this run, the same number in each of its processes.

    Args:
      count: how many, in all processes together; None for all: every accelerator, or on a CPU every
        core that a process may use.
      name: what errors call ``count``.

    Returns:
      The devices, those of the first process first.

    Raises:
      ValueError: ``count`` below 1, or more than there are and can be made; no multiple of the
        number of processes; processes with unequal numbers of devices, and no ``count``.
    """
    share = None
    if count is not None:
        checks.positive_int(name, count)
        share, rest = divmod(count, processes())
        if rest:
            expected = f"a multiple of {processes()}, the number of processes"
            raise ValueError(f"{name}: got {count}, expected {expected}")
    try:
        # Says how many devices a CPU is taken for; JAX hears it only before its first array.
        jax.config.update("jax_num_cpu_devices", min(share or _cores(), MAX_CPU_DEVICES))
    except RuntimeError:
        pass
    devices = jax.devices()
    own = [_places(devices, process) for process in range(processes())]
    fewest, most = min(map(len, own)), max(map(len, own))
    if share is None and fewest < most:
        expected = f"a number, for processes have from {fewest} to {most}"
        raise ValueError(f"devices: got none, expected {expected}")
    if share is not None and share > fewest:
        where = "on this machine" if processes() == 1 else f"in {processes()} processes"
        most = fewest * processes()
        raise ValueError(f"{name}: got {count}, expected at most {most} {where}")
    return [devices[place] for places in own for place in places[:share]]


def _cores() -> int:
    """The processor cores that this process may use."""
    usable = getattr(os, "sched_getaffinity", None)
    return len(usable(0)) if usable else os.cpu_count() or 1


def spread(
    run: Callable, devices: Sequence[jax.Device], *, state: Any = WHOLE, out: Any = None
) -> Callable:
    """Compiles ``run(state, data, plan) -> (state, metrics)`` over devices, batches split.

    ``run`` sees its own part of every batch and the axis name ``AXIS``; state and data are whole
    on every device, and so are the metrics. The state handed in is given up to the call.

    Args:
      run: from ``train.scan_steps``, of a step with ``axis_name=AXIS``.
      devices: which ones.
      state: how the state is laid out: ``WHOLE``, ``SPLIT`` along its first axis, or a pytree
        prefix of such.
      out: how the result is laid out; ``(state, WHOLE)`` when not given.

    Returns:
      The compiled function.
    """
    mapped = jax.shard_map(
        run,
        mesh=mesh(devices),
        in_specs=(state, WHOLE, BATCHES),
        out_specs=(state, WHOLE) if out is None else out,
        check_vma=False,
    )
    return jax.jit(mapped, donate_argnums=0 if out is None else ())


def mesh(devices: Sequence[jax.Device]) -> Mesh:
    """The devices in a row, along ``AXIS``."""
    return Mesh(np.asarray(devices), (AXIS,), axis_types=(AxisType.Auto,))


def place(tree: Any, devices: Sequence[jax.Device], spec: P = WHOLE) -> Any:
    """Puts arrays on the devices: whole on each, or split (``SPLIT``, ``BATCHES``).

    Of several processes each is given the same arrays, and puts its part of them.
    """
    sharding = NamedSharding(mesh(devices), spec)
    if processes() > 1:
        return jax.tree.map(lambda a: _own_part(a, sharding), tree)
    # Copies, so that giving the placed arrays up to a compiled call never deletes the originals;
    # device_put alone shares the first device's part, whatever ``may_alias`` says.
    own = jax.tree.map(lambda a: a.copy() if isinstance(a, jax.Array) else a, tree)
    return jax.device_put(own, sharding)


def _own_part(array: Any, sharding: NamedSharding) -> jax.Array:
    """An array over the devices of all processes, of which this one places what is its own."""
    if isinstance(array, jax.Array) and jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
        data = _own_part(jax.random.key_data(array), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(array))
    array = np.asarray(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda part: array[part].copy())


def fetch(tree: Any) -> Any:
    """The arrays of a tree in this process's memory, as NumPy arrays of their whole shapes.

    What is split over the devices of several processes is gathered: all of them have to ask.

    Args:
      tree: a pytree of arrays, PRNG keys as ``jax.random.key_data``.
    """

    def whole(a):
        if not isinstance(a, jax.Array) or a.is_fully_addressable or a.is_fully_replicated:
            return a
        return multihost_utils.process_allgather(a, tiled=True)

    return jax.device_get(jax.tree.map(whole, tree))


def local(tree: Any) -> Any:
    """A tree with which this process can compute alone: itself, or of several processes fetched."""
    return tree if processes() == 1 else fetch(tree)


def agree(flag: bool) -> bool:
    """Whether any process says so: the same answer in all of them, which all have to ask."""
    return bool(from_all(np.asarray(bool(flag))).any())


def from_all(array: np.ndarray) -> np.ndarray:
    """Every process's array, of the same shape and dtype in each: [...] gives [processes, ...]."""
    if processes() == 1:
        return array[None]
    devices = jax.devices()
    split, whole = (NamedSharding(mesh(devices), spec) for spec in (SPLIT, WHOLE))
    shape = len(devices), *array.shape
    rows = jax.make_array_from_callback(shape, split, lambda part: array[None].copy())
    rows = np.asarray(jax.jit(_unchanged, out_shardings=whole)(rows))
    return np.stack([rows[_places(devices, process)[0]] for process in range(processes())])


def _unchanged(array: jax.Array) -> jax.Array:
    return array


def _places(devices: Sequence[jax.Device], process: int) -> list[int]:
    """Which of the devices are a process's own."""
    return [n for n, device in enumerate(devices) if device.process_index == process]


def runner(
    step: Callable,
    devices: Sequence[jax.Device],
    clock: train.Clock,
    *,
    state: Any = WHOLE,
    batch_of: Callable | None = None,
) -> Callable:
    """Builds ``advance(state, data, plan) -> (state, metrics)``: compiled, spread and timed.

    Args:
      step: a train step with ``axis_name=AXIS``.
      devices: which ones to split batches over.
      clock: where the seconds go, to "compile" and "train".
      state: how the state is laid out, as in ``spread``.
      batch_of: as in ``train.scan_steps``.

    Returns:
      ``advance``: ``state`` and ``data`` are on the devices (``place``), ``plan`` comes from
      ``train.plan_batches`` with ``multiple=len(devices)``, or from ``ahead``; all its K steps run
      in one call, which uses the old state up. ``metrics`` are the K steps' (sum, count), as NumPy
      arrays [K].
    """
    run = spread(train.scan_steps(step, batch_of), devices, state=state)
    compiled = {}

    def advance(state: Any, data: Any, plan: dict[str, np.ndarray]) -> tuple[Any, Any]:
        if not isinstance(plan["rows"], jax.Array):
            plan = place(plan, devices, BATCHES)
        kind = _kind((data, plan))
        if kind not in compiled:
            compiled[kind] = clock.compile(run, state, data, plan)
        with clock("train"):
            state, metrics = jax.block_until_ready(compiled[kind](state, data, plan))
        return state, jax.tree.map(np.asarray, metrics)

    return advance


def ahead(
    plans: Iterable[dict[str, np.ndarray]], devices: Sequence[jax.Device]
) -> Iterator[dict[str, jax.Array]]:
    """The plans on the devices, each put there before the one in front of it is used.

    Args:
      plans: what ``train.plan_batches`` returns, one after the other.
      devices: which ones the batches are split over.

    Yields:
      The same, as ``runner``'s ``advance`` takes them.
    """
    waiting = None
    for plan in plans:
        placed = place(plan, devices, BATCHES)  # starts the transfer and does not wait for it
        if waiting is not None:
            yield waiting
        waiting = placed
    if waiting is not None:
        yield waiting


def evaluator(
    metric_fn: Callable,
    devices: Sequence[jax.Device],
    clock: train.Clock,
    batch_size: int = 500,
    *,
    batch_of: Callable | None = None,
) -> Callable:
    """Builds ``evaluate(params, split) -> {name: mean}`` over all of a split, each example once.

    Args:
      metric_fn: ``metric_fn(params, batch) -> metrics``, a dict of (sum, count); ``batch`` has the
        split's fields and "weight".
      devices: which ones to split batches over.
      clock: where the seconds go, to "compile" and "eval".
      batch_size: examples in a batch, over all devices.
      batch_of: as in ``train.scan_steps``.

    Returns:
      ``evaluate``; ``split`` is a dict of [N, ...] arrays, N >= 1. With ``plan=``, batches of
      another kind, ``split`` is on the devices already (``place``).
    """
    step = train.make_eval_step(metric_fn, axis_name=AXIS)
    run = spread(train.scan_eval(step, batch_of), devices, out=WHOLE)
    compiled = {}

    def evaluate(params: Any, split: dict[str, Any], plan: Any = None) -> dict[str, float]:
        if plan is None:
            size = len(next(iter(split.values())))
            plan = train.plan_batches(np.arange(size), batch_size, multiple=len(devices))
            split = place(split, devices)
        arguments = params, split, place(plan, devices, BATCHES)
        kind = _kind(arguments)
        if kind not in compiled:
            compiled[kind] = clock.compile(run, *arguments)
        with clock("eval"):
            metrics = jax.block_until_ready(compiled[kind](*arguments))
        return losses.means(fetch(metrics))

    return evaluate


def _kind(arguments: Any) -> Any:
    """What a compiled program depends on: the arguments' structure, shapes and dtypes."""
    leaves, structure = jax.tree.flatten(arguments)
    return structure, tuple((np.shape(leaf), getattr(leaf, "dtype", type(leaf))) for leaf in leaves)


# ---- what a program sends -----------------------------------------------------------------------

_KINDS = "all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute|collective-broadcast"
_COLLECTIVE = re.compile(rf" = (.*?) ({_KINDS})(?:-start)?\(")
_CALLED = re.compile(r"\b(\w+)=%([\w.-]+)")  # body=%region_1, calls=%fused_computation.2


class Collective(NamedTuple):
    """An operation by which devices exchange arrays.

    Attributes:
      kind: "all-reduce" and the like.
      arrays: how many it takes at once.
      bytes: of them all, on each device.
      loops: how many loops it stands in: 1 in the steps of ``train.scan_steps``.
    """

    kind: str
    arrays: int
    bytes: int
    loops: int


def collectives(program: str) -> list[Collective]:
    """The collectives of a compiled program, from its text (``compiled.as_text()``)."""
    found, calls, name, entry = [], defaultdict(list), "", ""
    for line in program.splitlines():
        if line.endswith("{") and not line.startswith((" ", "HloModule")):
            name = line.removeprefix("ENTRY ").split()[0].removeprefix("%")
            entry = name if line.startswith("ENTRY") else entry
        calls[name] += [(called, how == "body") for how, called in _CALLED.findall(line)]
        if match := _COLLECTIVE.search(line):
            arrays = re.findall(r"([a-z]+\d*)\w*\[([\d,]*)\]", match[1])
            found.append((name, match[2], len(arrays), sum(_bytes(*array) for array in arrays)))
    loops, callers = {entry: 0}, [entry]
    while callers:
        caller = callers.pop()
        for called, is_loop in calls[caller]:
            if loops[caller] + is_loop > loops.get(called, -1):
                loops[called] = loops[caller] + is_loop
                callers.append(called)
    return [Collective(*rest, loops.get(name, 0)) for name, *rest in found]


def _bytes(dtype: str, shape: str) -> int:
    """Of an array as XLA writes it: ("f32", "2,3") is 24."""
    bits = int(re.sub(r"\D", "", dtype) or 8)
    return bits * int(np.prod([int(n) for n in shape.split(",") if n])) // 8
