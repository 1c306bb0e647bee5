"""What the derivatives written by hand share: sequences in pieces, and the parts of their loops."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lstmjax import checks
from lstmjax.bptt import oldest, spread
from lstmjax.dropout import Noise, zoned_out
from lstmjax.recurrence import product, zeroed
from lstmjax.tangents import varying_like

WHOLE = 31  # sequences up to so many steps are one piece, unless memory is what is asked for
PIECES = {"gates": 16, "recompute": 40}  # more would take less memory, and a few per cent of time


def steps_of_a_piece(steps: int, residuals: str) -> int:
    """How many steps are turned round at a time; a divisor of ``steps`` if one lies near."""
    if residuals == "sqrt":
        aim = max(round(steps**0.5), min(steps, 1))
    elif steps <= WHOLE and residuals == "gates":
        return steps
    else:
        aim = max(-(-steps // PIECES[residuals]), min(steps, 2))
    near = [n for n in range(max(aim // 2, 2), 2 * aim) if steps % n == 0]
    return min(near, key=lambda n: max(n / aim, aim / n), default=aim)


def in_parts(
    run: Callable,
    how: Any,
    params: Any,
    state: Any,
    xs: jax.Array,
    mask: Any,
    resets: Any,
    to: Any,
    more: tuple = (),
) -> tuple[Any, jax.Array]:
    """A sequence in parts: all whole pieces, and the steps that fill none.

    Args:
      run: ``run(how, state, reset_to, xs, at) -> (state, hs)``, of pieces of ``how.piece`` steps,
        ``at`` being valid and reset [T, B] and where a block begins [T], bool or None, and then
        ``more``; where ``how`` has a truncation of several slots, its states are by slot.
      how: a NamedTuple with ``reverse``, ``piece`` and ``truncation``.
      params: what the state varies like.
      state, xs, mask, resets: as in a layer that is ``fused``.
      to: its ``reset_to``.
      more: further arrays [T, …], or None.

    Returns:
      ``(state, hs)`` of the whole sequence.
    """
    steps, piece = len(xs), how.piece
    if mask is not None:
        xs = zeroed(mask, xs)
        resets = None if resets is None else resets & mask
    if resets is None:
        to = None
    elif to is None:
        to = jax.tree.map(jnp.zeros_like, state)
    state, to = varying_like((state, to), (xs, params, mask, resets, to, more))
    begins = None if how.truncation is None else how.truncation.begins(steps, how.reverse)
    at = (mask, resets, begins, *more)
    whole = steps - steps % piece if piece else steps
    parts = [slice(whole)] + ([slice(whole, steps)] if whole < steps else [])
    state, outputs = spread(how.truncation, state), {}
    for part in reversed(parts) if how.reverse else parts:
        own = (xs, at) if len(parts) == 1 else at_steps(part, (xs, at))
        one = how._replace(piece=min(piece, len(own[0])))
        state, outputs[part.start] = run(one, state, to, *own)
    hs = [outputs[part.start] for part in parts]
    return oldest(how.truncation, state), hs[0] if len(hs) == 1 else jnp.concatenate(hs)


def first_slot(how: Any, inputs: Any) -> Any:
    """The values of inputs of which ``state``, and perhaps ``xs``, come by slot."""
    if how.truncation is None:
        return inputs
    of_xs = how.truncation if how.truncation.slots_in else None
    state, xs = oldest(how.truncation, inputs.state), oldest(of_xs, inputs.xs, 1)
    return inputs._replace(state=state, xs=xs)


def by_slot(how: Any, state: Any, hs: jax.Array) -> tuple[Any, jax.Array]:
    """The values of a recurrence as it returns them: the state, and perhaps ``hs``, by slot."""
    if how.truncation is None:
        return state, hs
    of_hs = how.truncation if how.truncation.slots_out else None
    return spread(how.truncation, state), spread(of_hs, hs, 1)


def driven_by_slot(driven_by: Callable, dot_xs: jax.Array | None) -> tuple[Any, int | None]:
    """``driven_by`` tangents of inputs [T, B, D] or by slot, and the axis of slots at one step."""
    if dot_xs is None or dot_xs.ndim == 3:
        return driven_by(dot_xs), None
    return jax.vmap(driven_by, 1, 1)(dot_xs), 0


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


def row_before(how: Any, number: jax.Array, tree: Any) -> tuple[jax.Array, Any]:
    """What arrays [T, …] hold of the step before a piece, read where it stands.

    (The states before all pieces, gathered, would take memory of their own.)

    Args:
      how: a NamedTuple with ``reverse`` and ``piece``.
      number: of the piece, 0 … N − 1 in time.
      tree: arrays of what there is after each step.

    Returns:
      Whether no piece comes before this one, and rows [...] that mean something where one does.
    """
    piece = max(how.piece, 1)
    steps = len(jax.tree.leaves(tree)[0])
    at = (number + 1) * piece if how.reverse else number * piece - 1
    within = jnp.clip(at, 0, max(steps - 1, 0))

    def row(a):
        return a[within] if steps else jnp.zeros(a.shape[1:], a.dtype)

    return (at >= steps) if how.reverse else (at < 0), jax.tree.map(row, tree)


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


def with_zoneout(noise_t: Noise | None, old: Any, new: Any) -> Any:
    """The state after a step, or its tangent, with the masks of zoneout at that step, or None."""
    return new if noise_t is None else zoned_out(noise_t, noise_t, old, new)


def rows(v: jax.Array, like: jax.Array) -> jax.Array:
    """A vector [H] for every row of ``like``."""
    return jnp.broadcast_to(v, like.shape)
