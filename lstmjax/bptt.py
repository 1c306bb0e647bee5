"""Truncated backpropagation through time, in all its styles.

    the error L_t reaches step τ  iff  lo(t) ≤ τ ≤ t,    lo(t) = max(0, (⌊t/k1⌋ + 1) k1 − k2)

Every k1 steps, the errors of these k1 steps go back together, for k2 steps counted from the last of
them (Williams & Peng, 1990, their BPTT(k2; k1); the names are those of Sutskever's thesis, 2013).
What a layer with ``truncation=(k1, k2)`` computes does not change, only its derivative:

    (n, n)    an error goes back 1 … n steps: the sequence is cut every n steps, as in TensorFlow 1
    (1, n)    every error goes back n steps, where there are as many
    (n, 2n)   n + 1 … 2n steps (Williams & Peng)
    (k, K)    with K ≥ T: the ordinary gradient

t is counted in the order of running. Where lo(t) = 0 the error reaches the initial state too, and
the error of the final state is one of the last step's.

How it is computed. A tangent (the derivative in one direction, running forwards) is kept in
S = k2/k1 slots. Slot j holds the tangent of the state as if nothing before a step of its own had
been varied; at the first step of every block of k1 steps the oldest slot is dropped and one of
zeros is added, so that slot 0 began at lo(t) for the t of this block, and is what ``hs`` shows:

    ṡ_t[j] = ∂step/∂s ṡ_{t-1}[j] + ∂step/∂x ẋ_t + ∂step/∂W Ẇ,    ḣ_t = that of ṡ_t[0]

Turned round by JAX this is one loop backwards with S adjoints of the state, and weights read the
sum of the slots. In a stack the window is one of absolute time through all layers, so what goes
from layer to layer are arrays [T, S, B, ·], S equal copies whose tangents are those of the slots.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lstmjax import checks
from lstmjax.tangents import dense, is_zero, varying_like, zero_is_none


def window_start(steps: int, k1: int, k2: int) -> np.ndarray:
    """lo(t), the first step that the error of step t reaches: max(0, (⌊t/k1⌋ + 1) k1 − k2).

    Args:
      steps: T >= 1.
      k1: steps of a block, >= 1.
      k2: steps that the error of a block's last step goes back, itself among them; a multiple of
        k1.

    Returns:
      [T] integers, 0 <= lo(t) <= t.

    Raises:
      ValueError: a T below 1, a (k1, k2) that is no truncation.
    """
    checks.positive_int("steps", steps)
    k1, k2 = checks.truncation((k1, k2))
    return np.maximum(0, (np.arange(steps) // k1 + 1) * k1 - k2)


def depths(steps: int, k1: int, k2: int) -> np.ndarray:
    """t − lo(t) + 1, how many steps the error of step t goes through, its own among them.

    Their sum is the number of pairs (t, τ) in which an error reaches a step. Of T = 49 steps and
    n = 7, T − n + 1 = 43 errors go back n steps with (1, n), and 7 with (n, n); there are 322
    pairs, 196, and without a truncation 1225.

    Args:
      steps, k1, k2: as in ``window_start``.

    Returns:
      [T] integers from 1 to min(k2, T).

    Raises:
      ValueError: as ``window_start``.
    """
    return np.arange(steps) - window_start(steps, k1, k2) + 1


# ---- inside a layer -----------------------------------------------------------------------------


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Truncation:
    """How the derivative of a layer is truncated; a layer of a ``stack`` is handed one.

    Attributes:
      k1, k2: as in ``window_start``.
      slots_in: whether the layer's inputs come by slot, [T, S, B, D].
      slots_out: whether its outputs leave so.
    """

    k1: int
    k2: int
    slots_in: bool = False
    slots_out: bool = False

    @property
    def slots(self) -> int:
        """S."""
        return self.k2 // self.k1

    def between(self, slots_in: bool, slots_out: bool) -> "Truncation":
        """The truncation of one layer of a stack."""
        return dataclasses.replace(self, slots_in=slots_in, slots_out=slots_out)

    def begins(self, steps: int, reverse: bool) -> np.ndarray:
        """[T] bool, true at the first step of every block but the first, in order of running."""
        times = np.arange(steps)
        begins = (times % self.k1 == 0) & (times > 0)
        return begins[::-1] if reverse else begins


def as_truncation(given: Any) -> Truncation | None:
    """``truncation=`` of a layer, checked.

    Raises:
      ValueError: neither None nor (k1, k2).
    """
    if isinstance(given, Truncation):
        return given
    pair = checks.truncation(given)
    return None if pair is None else Truncation(*pair)


def within(truncation: Truncation | None, steps: int) -> Truncation | None:
    """None where a truncation cuts no error of T steps.

    Raises:
      ValueError: T is a symbol (``jax.export``), of which nobody knows.
    """
    if truncation is not None and not isinstance(steps, int):
        pair = truncation.k1, truncation.k2
        raise ValueError(f"truncation: got {pair} with a symbol for T, expected None")
    if truncation is None or truncation.slots * truncation.k1 >= steps:
        return None
    return truncation


def check_inputs(xs: jax.Array, given: Any) -> None:
    """Raises ``ValueError`` unless ``xs`` is [T, B, D]; [T, S, B, D] inside a truncated stack."""
    slots = isinstance(given, Truncation) and given.slots_in
    checks.shape("xs", xs, ("T", given.slots, "B", "D") if slots else ("T", "B", "D"))


def spread(truncation: Truncation | None, tree: Any, axis: int = 0) -> Any:
    """Arrays by slot: S equal copies along a new axis; no such axis where S is 1."""
    if truncation is None or truncation.slots == 1:
        return tree

    def copies(a):
        a = jnp.expand_dims(a, axis)
        return jnp.broadcast_to(a, (*a.shape[:axis], truncation.slots, *a.shape[axis + 1 :]))

    return jax.tree.map(copies, tree)


def oldest(truncation: Truncation | None, tree: Any, axis: int = 0) -> Any:
    """Slot 0 of arrays by slot."""
    if truncation is None or truncation.slots == 1:
        return tree
    return jax.tree.map(lambda a: jax.lax.index_in_dim(a, 0, axis, keepdims=False), tree)


def over_slots(truncation: Truncation | None, body: Callable, axes: Any) -> Callable:
    """The body of a loop over tangents, for all slots.

    Args:
      truncation: or None for the ordinary loop.
      body: ``body(state, at_t) -> (state, h)``, of one slot.
      axes: of ``at_t``, as ``in_axes`` of ``vmap``: 0 for what comes by slot, None for the rest.

    Returns:
      ``body(state, (begins_t, at_t)) -> (state, h)`` with states by slot; ``h`` is the oldest
      slot's, or by slot with ``slots_out``.
    """

    def one(state, at):
        begins_t, at_t = at
        return body(state if begins_t is None else _aged(begins_t, state, 1), at_t)

    def many(state, at):
        begins_t, at_t = at
        state = _aged(begins_t, state, truncation.slots)
        state, h = jax.vmap(body, in_axes=(0, axes))(state, at_t)
        return state, h if truncation.slots_out else h[0]

    if truncation is None or truncation.slots == 1:
        return one
    # Without it, JAX makes a loop of its own of what does not depend on tangents, be it a reshape.
    return jax.checkpoint(many, prevent_cse=False, policy=jax.checkpoint_policies.nothing_saveable)


def _aged(begins_t: jax.Array, state: Any, slots: int) -> Any:
    """Where a block begins: without the oldest slot, with a new one of zeros."""

    def shift(a):
        if slots == 1:
            return jnp.zeros_like(a)
        return jnp.concatenate([a[1:], jnp.zeros_like(a[:1])])

    return jax.tree.map(lambda a: jnp.where(begins_t, shift(a), a), state)


# ---- any cell -----------------------------------------------------------------------------------


def truncated(
    truncation: Truncation, loop: Callable, body: Callable, state: Any, inputs: Any, reverse: bool
) -> tuple[Any, jax.Array]:
    """A loop over time whose derivative is truncated, for a body that JAX differentiates.

    Args:
      truncation: how.
      loop: ``loop(body, state, inputs) -> (state, outputs)``, as ``jax.lax.scan``.
      body: ``body(state, inputs_t) -> (state, h)``; what it closes over is differentiated too.
      state: the state before the first step.
      inputs: a tuple of [T, …] arrays or None, of which the first comes by slot with ``slots_in``.
      reverse: whether ``loop`` runs from the last step to the first.

    Returns:
      As ``loop``; ``h`` by slot with ``slots_out``.
    """
    of_inputs = truncation if truncation.slots_in else None
    of_outputs = truncation if truncation.slots_out else None

    def values(inputs):
        return (oldest(of_inputs, inputs[0], 1), *inputs[1:])

    body, closed_over = jax.closure_convert(
        body, state, jax.tree.map(lambda a: a[0], values(inputs))
    )

    @jax.custom_jvp
    def run(weights, state, inputs):
        final, hs = loop(lambda state, at: body(state, at, *weights), state, values(inputs))
        return final, spread(of_outputs, hs, 1)

    def run_jvp(primals, tangents):
        weights, state, inputs = primals[0], primals[1], values(primals[2])

        def keeping(state, at):
            new, h = body(state, at, *weights)
            return new, (h, state)

        final, (hs, before) = loop(keeping, state, inputs)
        dots = jax.tree.map(zero_is_none, (tangents[0], tangents[2]), is_leaf=is_zero)
        dot_state = jax.tree.map(dense, tangents[1], is_leaf=is_zero)
        dot_state = varying_like(dot_state, (before, inputs, weights, dots, dot_state))

        def step(dot_state, at):
            dot_t, at_t, before_t = at
            given = _where(dots[0], weights), _where(dot_t, at_t)

            def of(state, given):
                return body(state, _filled(given[1], at_t), *_filled(given[0], weights))

            return jax.jvp(of, (before_t, given), (dot_state, (dots[0], dot_t)))[1]

        by_slot = (0 if truncation.slots_in else None, *[None] * (len(inputs) - 1))
        step = over_slots(truncation, step, (by_slot, None, None))
        begins = truncation.begins(len(inputs[0]), reverse)
        at = (begins, (dots[1], inputs, before))
        dot_final, dot_hs = loop(step, spread(truncation, dot_state), at)
        return (final, spread(of_outputs, hs, 1)), (oldest(truncation, dot_final), dot_hs)

    run.defjvp(run_jvp, symbolic_zeros=True)
    return run(tuple(closed_over), state, inputs)


def _where(dots: Any, values: Any) -> Any:
    """The values that have a tangent, None for the others."""
    return jax.tree.map(lambda d, v: None if d is None else v, dots, values, is_leaf=_is_none)


def _filled(given: Any, values: Any) -> Any:
    return jax.tree.map(lambda g, v: v if g is None else g, given, values, is_leaf=_is_none)


def _is_none(value: Any) -> bool:
    return value is None
