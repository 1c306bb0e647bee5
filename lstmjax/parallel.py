"""Devices: how many, and how a function of (state, data, plan) is spread over them.

On a CPU every core is a device of its own. Splitting a batch over cores keeps both busy through
the small products of a recurrence, where threads inside one product cannot.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lstmjax import checks, losses, train

AXIS = "batch"
MAX_CPU_DEVICES = 64  # each is a thread; a collective waits for all of them
WHOLE = P()  # every device has all of it
SPLIT = P(AXIS)  # split along the first axis
BATCHES = P(None, AXIS)  # [K, B]: every batch is split


def use_devices(count: int | None = None) -> list[jax.Device]:
    """Chooses the devices of this process.

    Args:
      count: how many; None for all: every accelerator, or on a CPU every core.

    Returns:
      The devices.

    Raises:
      ValueError: ``count`` below 1, or more than there are and can be made.
    """
    if count is not None:
        checks.positive_int("devices", count)
    try:
        # Says how many devices a CPU is taken for; JAX hears it only before its first array.
        jax.config.update("jax_num_cpu_devices", min(count or _cores(), MAX_CPU_DEVICES))
    except RuntimeError:
        pass
    devices = jax.devices()
    if count is not None and count > len(devices):
        raise ValueError(f"devices: got {count}, expected at most {len(devices)} on this machine")
    return devices[:count]


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
    """Puts arrays on the devices: whole on each, or split (``SPLIT``, ``BATCHES``)."""
    # Copies, so that giving the placed arrays up to a compiled call never deletes the originals;
    # device_put alone shares the first device's part, whatever ``may_alias`` says.
    own = jax.tree.map(lambda a: a.copy() if isinstance(a, jax.Array) else a, tree)
    return jax.device_put(own, NamedSharding(mesh(devices), spec))


def runner(
    step: Callable, devices: Sequence[jax.Device], clock: train.Clock, *, state: Any = WHOLE
) -> Callable:
    """Builds ``advance(state, data, plan) -> (state, metrics)``: compiled, spread and timed.

    Args:
      step: a train step with ``axis_name=AXIS``.
      devices: which ones to split batches over.
      clock: where the seconds go, to "compile" and "train".
      state: how the state is laid out, as in ``spread``.

    Returns:
      ``advance``: ``state`` and ``data`` are on the devices (``place``), ``plan`` comes from
      ``train.plan_batches`` with ``multiple=len(devices)``, or from ``ahead``; all its K steps run
      in one call, which uses the old state up. ``metrics`` are the K steps' (sum, count), as NumPy
      arrays [K].
    """
    run = spread(train.scan_steps(step), devices, state=state)
    compiled = {}

    def advance(state: Any, data: Any, plan: dict[str, np.ndarray]) -> tuple[Any, Any]:
        shape = plan["rows"].shape
        if not isinstance(plan["rows"], jax.Array):
            plan = place(plan, devices, BATCHES)
        if shape not in compiled:
            compiled[shape] = clock.compile(run, state, data, plan)
        with clock("train"):
            state, metrics = jax.block_until_ready(compiled[shape](state, data, plan))
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
    metric_fn: Callable, devices: Sequence[jax.Device], clock: train.Clock, batch_size: int = 500
) -> Callable:
    """Builds ``evaluate(params, split) -> {name: mean}`` over all of a split, each example once.

    Args:
      metric_fn: ``metric_fn(params, batch) -> metrics``, a dict of (sum, count); ``batch`` has the
        split's fields and "weight".
      devices: which ones to split batches over.
      clock: where the seconds go, to "compile" and "eval".
      batch_size: examples in a batch, over all devices.

    Returns:
      ``evaluate``; ``split`` is a dict of [N, ...] arrays, N >= 1.
    """
    step = train.make_eval_step(metric_fn, axis_name=AXIS)
    run = spread(train.scan_eval(step), devices, out=WHOLE)
    compiled = {}

    def evaluate(params: Any, split: dict[str, np.ndarray]) -> dict[str, float]:
        size = len(next(iter(split.values())))
        plan = train.plan_batches(np.arange(size), batch_size, multiple=len(devices))
        arguments = params, place(split, devices), place(plan, devices, BATCHES)
        if size not in compiled:
            compiled[size] = clock.compile(run, *arguments)
        with clock("eval"):
            metrics = jax.block_until_ready(compiled[size](*arguments))
        return losses.means(metrics)

    return evaluate
