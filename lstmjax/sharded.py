"""Layers on batches that are spread over devices.

A mesh as ``jax.make_mesh`` makes it has explicit axes: how an array is spread is part of its type,
and an operation on it has to say how its result is. Rows of a batch have nothing to do with each
other in a layer, so that each device can run it on its own rows; only the gradients of the weights
are summed over the devices, once for each array.

Letters: T time, B batch, D input.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

_BY_STEP = ("mask", "resets")  # arrays [T, B]; all others have their rows before their last axis


def rows_over(xs: jax.Array) -> tuple[str, ...]:
    """The explicit axes of a mesh over which the rows of ``xs`` [..., B, D] are spread, or none.

    Raises:
      ValueError: ``xs`` is spread along another axis than B.
    """
    spec = jax.typeof(xs).sharding.spec
    spread = {axis: names for axis, names in enumerate(spec, -xs.ndim) if names is not None}
    names = spread.pop(-2, ())
    if spread:
        raise ValueError(f"xs: got the sharding {spec}, expected one that spreads B alone")
    return names if isinstance(names, tuple) else (names,)


def is_spread(array: jax.Array) -> bool:
    """Whether an array is spread over explicit axes of a mesh."""
    return any(names is not None for names in jax.typeof(array).sharding.spec)


def take(table: jax.Array, ids: jax.Array) -> jax.Array:
    """The rows of ``table`` [V, E] that ids [...] name, [..., E], spread as these are."""
    if not is_spread(ids):
        return jnp.take(table, ids, axis=0)
    kind = jax.typeof(ids).sharding
    to = NamedSharding(kind.mesh, PartitionSpec(*kind.spec, None))
    return table.at[ids].get(mode="fill", out_sharding=to)


def each_its_rows(run: Callable, whole: Any, state: Any, xs: jax.Array, arrays: dict) -> Any:
    """``run(whole, state, xs, arrays)``, by each device on its own rows where they are spread.

    Args:
      run: returns ``(state, hs)``, arrays [..., B, ·].
      whole: weights and numbers, which every device is given as they are.
      state: a pytree of [B, ·] arrays.
      xs: [..., B, D], by its type whole or with the rows spread over explicit axes of a mesh.
      arrays: by name, "mask" and "resets" [T, B]; others [..., B, ·] or numbers; None for none.
        "truncation" says whether hs leaves by slot, [T, S, B, ·] (bptt.py).

    Returns:
      What ``run`` returns, its rows spread as those of ``xs``.

    Raises:
      ValueError: as ``rows_over``.
    """
    names, mesh = rows_over(xs), jax.typeof(xs).sharding.mesh
    if not names:
        return run(whole, state, xs, arrays)

    def own(whole, *rows):
        # One sum of each weight's gradient over the devices, not one wherever it is read.
        return run(jax.lax.pcast(whole, names, to="varying"), *rows)

    def by_rows(leaf):
        before = [None] * (leaf.ndim - 2)
        return PartitionSpec(*before, names) if leaf.ndim else PartitionSpec()

    def by_step(_):
        return PartitionSpec(None, names)

    many = getattr(arrays.get("truncation"), "slots_out", False)
    of_hs = PartitionSpec(*[None] * (2 if many else 1), names)
    specs = (
        jax.tree.map(lambda _: PartitionSpec(), whole),
        jax.tree.map(by_rows, state),
        by_rows(xs),
        {n: jax.tree.map(by_step if n in _BY_STEP else by_rows, a) for n, a in arrays.items()},
    )
    given = jax.tree.map(
        lambda leaf, spec: jax.sharding.reshard(leaf, NamedSharding(mesh, spec)),
        (whole, state, xs, arrays),
        specs,
    )
    mapped = jax.shard_map(
        own,
        mesh=mesh,
        in_specs=specs,
        out_specs=(PartitionSpec(names), of_hs),
        axis_names=frozenset(names),
    )
    return mapped(*given)
