"""Many seeds in one compiled program: a result is a mean with its interval, and not one draw.

Functions are written for one seed and know of no other. Whatever differs between seeds (states,
batches, plans, metrics) gets a first axis [S]:

    states = seeds.stack([start(seed) for seed in range(5)], devices)
    advance = seeds.spread(train.scan_steps(step), devices, shared=(1,))
    states, metrics = advance(states, data, seeds.stack(plans, devices))
    seeds.unstack(metrics, 5)

Devices share the seeds and not the batches, so they never wait for each other. Where seeds are no
multiple of devices, the last one is repeated to fill the rest, and ``unstack`` leaves the copies
out. ``together`` makes one record of all seeds' numbers, and ``apart`` takes it apart again.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from scipy.special import stdtrit

from lstmjax import checks
from lstmjax.parallel import SPLIT, WHOLE, mesh, place

HOW = ("map", "vmap")


def stack(trees: Sequence[Any], devices: Sequence[jax.Device]) -> Any:
    """One tree for each seed as one tree with a first axis of seeds, on the devices.

    Args:
      trees: S pytrees of arrays of the same shapes and dtypes; S >= 1.
      devices: which ones share the seeds.

    Returns:
      The pytree with leaves [S', ...], S' the next multiple of the number of devices from S on; the
      rows from S on are copies of the last.

    Raises:
      ValueError: there is no tree.
    """
    if not trees:
        raise ValueError("trees: got none, expected one for each seed")
    filled = [*trees, *[trees[-1]] * (-len(trees) % len(devices))]

    def joined(*leaves):
        if jax.dtypes.issubdtype(leaves[0].dtype, jax.dtypes.prng_key):
            return jax.numpy.stack(leaves)
        return np.stack(leaves)

    return place(jax.tree.map(joined, *filled), devices, SPLIT)


def unstack(tree: Any, count: int) -> Any:
    """The first ``count`` rows of every leaf [S', ...], as NumPy arrays."""
    return jax.tree.map(lambda leaf: np.asarray(leaf)[:count], tree)


def spread(
    run: Callable,
    devices: Sequence[jax.Device],
    *,
    shared: Sequence[int] = (),
    how: str | None = None,
    donate: Sequence[int] = (0,),
) -> Callable:
    """Compiles a function of one seed for all seeds, the seeds shared out among devices.

    Args:
      run: ``run(*arguments)`` of one seed, without a mapped axis; for training,
        ``train.scan_steps`` of a step without ``axis_name``.
      devices: which ones share the seeds.
      shared: places of the arguments that are the same for all seeds, without an axis for them
        (``parallel.place`` puts them on the devices).
      how: "vmap": ``jax.vmap``, all seeds of a device at once; "map": ``jax.lax.map``, one after
        the other; None for what is faster: "map" on a CPU, whose products with a batch of weights
        are slow, "vmap" elsewhere. The results are the same.
      donate: places of the arguments that are given up to the call.

    Returns:
      The jitted function of arguments from ``stack`` (or shared), whose results have the axis too.

    Raises:
      ValueError: an unknown ``how``.
    """
    checks.function("run", run)
    if how is None:
        how = "map" if devices[0].platform == "cpu" else "vmap"
    checks.one_of("how", how, HOW)

    def all_seeds(*arguments):
        own = {i: a for i, a in enumerate(arguments) if i not in shared}

        def one_seed(own):
            return run(*(own.get(i, a) for i, a in enumerate(arguments)))

        return jax.vmap(one_seed)(own) if how == "vmap" else jax.lax.map(one_seed, own)

    def spread_out(*arguments):
        specs = tuple(WHOLE if i in shared else SPLIT for i in range(len(arguments)))
        return jax.shard_map(
            all_seeds, mesh=mesh(devices), in_specs=specs, out_specs=SPLIT, check_vma=False
        )(*arguments)

    return jax.jit(spread_out, donate_argnums=tuple(donate))


def interval(values: Any, level: float = 0.95, axis: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The mean over seeds, and the half-width of its confidence interval (Student, 1908).

        x̄ ± t s/√n,   s² = Σ (x − x̄)²/(n − 1),   t the (1 + level)/2 quantile, n − 1 degrees

    Args:
      values: n values along ``axis``.
      level: 0 < level < 1.
      axis: the axis of seeds.

    Returns:
      ``(mean, half_width)`` without that axis; of a single value the half-width is NaN.

    Raises:
      ValueError: no value, or a ``level`` outside (0, 1).
    """
    values = np.asarray(values, np.float64)
    count = values.shape[axis] if values.ndim else 0
    if count == 0:
        raise ValueError("values: got none, expected one for each seed")
    if not 0 < level < 1:
        raise ValueError(f"level: got {level!r}, expected 0 < level < 1")
    mean = np.mean(values, axis=axis)
    if count == 1:
        return mean, np.full_like(mean, np.nan)
    deviation = np.std(values, axis=axis, ddof=1)
    return mean, stdtrit(count - 1, (1 + level) / 2) * deviation / np.sqrt(count)


def seeds_of(record: Mapping[str, Any]) -> list[int]:
    """The seeds of a run, from its record: ``config.seeds`` many from its seed on, or the one."""
    return list(range(record["seed"], record["seed"] + record.get("config", {}).get("seeds", 1)))


# ---- records of many seeds ----------------------------------------------------------------------


def together(runs: Sequence[Mapping[str, Any]], own: Sequence[int]) -> dict[str, Any]:
    """The metrics of each seed's record as those of one record.

    Args:
      runs: S dicts of the same names, of numbers and lists of numbers.
      own: the S seeds.

    Returns:
      Of a number: ``name`` [S], ``name_mean``, ``name_std`` (the sample's, n − 1) and
      ``name_ci95``, the half-width of ``interval``; the last two are NaN of a single seed. Of a
      list: ``name_seed3`` for each seed.
    """
    found = {}
    for name, value in runs[0].items():
        values = [run[name] for run in runs]
        if isinstance(value, list):
            found |= {f"{name}_seed{seed}": v for seed, v in zip(own, values, strict=True)}
            continue
        with np.errstate(invalid="ignore"):  # of a seed whose number is infinite
            mean, half = interval(values)
            deviation = float(np.std(values, ddof=1)) if len(values) > 1 else np.nan
        found |= {name: values, f"{name}_mean": float(mean)}
        found |= {f"{name}_std": deviation, f"{name}_ci95": float(half)}
    return found


def apart(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The records of single seeds that a record of ``together`` stands for.

    Returns:
      One for each seed, with its seed and metrics (its own, and those that the seeds have in
      common), an equal share of the seconds, and ``together``: how many they are. A record of one
      seed is returned as it is.
    """
    own, metrics = seeds_of(record), record["metrics"]
    numbers = [name for name in metrics if f"{name}_mean" in metrics]
    if len(own) == 1 or not numbers:
        return [dict(record)]
    # What all have in common is left when each one's own and what sums it up are taken away.
    sums = {f"{name}{end}" for name in numbers for end in ("", "_mean", "_std", "_ci95")}
    ends = tuple(f"_seed{seed}" for seed in own)
    aside = [n for n in metrics if n in sums or n.endswith(ends) or n.startswith("sweep_")]
    shared = {name: value for name, value in metrics.items() if name not in aside}
    found = []
    for number, seed in enumerate(own):
        mine = shared | {name: metrics[name][number] for name in numbers}
        end = f"_seed{seed}"
        mine |= {n.removesuffix(end): v for n, v in metrics.items() if n.endswith(end)}
        changed = {
            "seed": seed,
            "config": {**record["config"], "seeds": 1},
            "metrics": mine,
            "seconds": {name: t / len(own) for name, t in record["seconds"].items()},
            "together": len(own),
        }
        found.append({**record, **changed})
    return found
