"""What every derivative written by hand asks of JAX: tangents that are zero, and types in loops.

Tangents that are known to be zero arrive as ``SymbolicZero``.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero


def is_zero(tangent: Any) -> bool:
    """Whether a tangent is known to be zero."""
    return isinstance(tangent, SymbolicZero)


def zero_is_none(tangent: Any) -> Any:
    """A tangent, or None for one that is known to be zero."""
    return None if is_zero(tangent) else tangent


def dense(tangent: Any) -> jax.Array:
    """A tangent as an array."""
    return jnp.zeros(tangent.shape, tangent.dtype) if is_zero(tangent) else tangent


def varying_like(state: Any, inputs: Any) -> Any:
    """Marks ``state`` as varying over the mesh axes that ``inputs`` vary over.

    Inside ``jax.shard_map`` a loop's state must have one type throughout, and a fresh zero state
    does not vary over devices while the inputs do. Outside it, this does nothing.

    Args:
      state: a pytree of arrays.
      inputs: a pytree of arrays.

    Returns:
      ``state``, the same values.
    """
    axes = frozenset().union(*map(_varying_axes, jax.tree.leaves(inputs)))

    def mark(leaf):
        missing = tuple(axes - _varying_axes(leaf))
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(mark, state) if axes else state


def _varying_axes(leaf: jax.Array) -> frozenset:
    """The mesh axes that an array varies over inside ``jax.shard_map``; none outside it."""
    # The attribute's name is young (jax 0.10); without it there is nothing to mark.
    kind = getattr(jax.typeof(leaf), "manual_axis_type", None)
    return getattr(kind, "varying", frozenset())
