"""What the derivatives written by hand share: sequences in pieces, and the parts of their loops.

Tangents that are known to be zero arrive as ``SymbolicZero``.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from lstmjax import checks
from lstmjax.recurrence import product

WHOLE = 31  # sequences up to so many steps are one piece
PIECES = 16


def steps_of_a_piece(steps: int, residuals: str) -> int:
    """How many steps are turned round at a time; a divisor of ``steps`` if one lies near."""
    if residuals == "sqrt":
        aim = max(round(steps**0.5), min(steps, 1))
    elif steps <= WHOLE:
        return steps
    else:
        aim = -(-steps // PIECES)
    near = [n for n in range(max(aim // 2, 2), 2 * aim) if steps % n == 0]
    return min(near, key=lambda n: max(n / aim, aim / n), default=aim)


def cut(tree: Any, piece: int) -> Any:
    """[T, …] as [N, T/N, …]; of no steps, N is 1."""
    return jax.tree.map(
        lambda a: a.reshape(len(a) // piece if piece else 1, piece, *a.shape[1:]), tree
    )


def joint(a: jax.Array) -> jax.Array:
    """[N, T/N, …] as [T, …]."""
    return a.reshape(a.shape[0] * a.shape[1], *a.shape[2:])


def at_steps(part: slice, tree: Any) -> Any:
    """Arrays [T, …] at some of the steps."""
    return jax.tree.map(lambda a: a[part], tree)


def shifted(how: Any, before: jax.Array, after: jax.Array) -> jax.Array:
    """What was before each step, [T, B, ·], from what was before the first and after each."""
    if how.reverse:
        return jnp.concatenate([after, before[None]])[1:]
    return jnp.concatenate([before[None], after])[:-1]


def flat(a: jax.Array, w: jax.Array, kinds: checks.Dtypes) -> jax.Array:
    """a W, [..., F] times [F, G], as a product of two matrices.

    With the leading axes of ``a`` left apart, W's gradient is five times slower on XLA's CPU.
    """
    z = product(a.reshape(math.prod(a.shape[:-1]), a.shape[-1]), w, kinds)
    return z.reshape(*a.shape[:-1], w.shape[-1])


def reset(reset_t: jax.Array | None, reset_to: Any, state: Any) -> Any:
    """The state before a step: ``reset_to`` in the rows where ``reset_t`` [B] is true."""
    if reset_t is None:
        return state
    return jax.tree.map(lambda a, b: jnp.where(reset_t[:, None], a, b), reset_to, state)


def hold(valid_t: jax.Array | None, new: Any, old: Any) -> tuple[Any, jax.Array]:
    """The state after a step and its output: where it is not valid, the old one and zeros."""
    if valid_t is None:
        return new, new.h
    where = valid_t[:, None]
    after = jax.tree.map(lambda a, b: jnp.where(where, a, b), new, old)
    return after, jnp.where(where, new.h, jnp.zeros_like(new.h))


def is_zero(tangent: Any) -> bool:
    """Whether a tangent is known to be zero."""
    return isinstance(tangent, SymbolicZero)


def zero_is_none(tangent: Any) -> Any:
    """A tangent, or None for one that is known to be zero."""
    return None if is_zero(tangent) else tangent


def dense(tangent: Any) -> jax.Array:
    """A tangent as an array."""
    return jnp.zeros(tangent.shape, tangent.dtype) if is_zero(tangent) else tangent
