"""A step over time: what all recurrent layers share, whatever their equations.

A cell is a pure function ``step(state, x_t) -> state`` whose state is a NamedTuple with a field
``h``. Running it over a sequence is this loop, and nothing else:

    for t in 0 … T-1:                  # T-1 … 0 with reverse=True
        if resets[t]: state = 0
        if valid[t]:  state = step(state, xs[t]);  hs[t] = state.h
        else:                                      hs[t] = 0

``recur`` is that loop, either compiled as a loop (``method="scan"``) or written out step by step
(``method="unrolled"``), and ``recur_compiled`` is ``recur`` as one compiled program.
``bidirectional`` and ``stack`` build larger layers from any layer with the signature
``layer(params, xs, state, **options) -> (state, hs)``.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lstmjax import checks
from lstmjax.dropout import dropout as drop


def recur(
    step: Callable[[Any, jax.Array], Any],
    state: Any,
    xs: jax.Array,
    *,
    mask: Any = None,
    lengths: Any = None,
    resets: Any = None,
    reverse: bool = False,
    method: str = "scan",
    unroll: int = 1,
) -> tuple[Any, jax.Array]:
    """Runs ``step`` over time.

    Args:
      step: ``step(state, x_t) -> state``; keeps the shapes and dtypes of the state.
      state: a NamedTuple of [B, ·] arrays with a field ``h``: the state before the first step.
      xs: [T, B, D] inputs.
      mask: [T, B] bool, integer or floating; non-zero marks a valid step.
      lengths: [B] integers in 0 … T; step t of row b is valid iff t < lengths[b]. With ``mask``
        as well, a step is valid where both say so.
      resets: [T, B]; non-zero sets the state to zero before step t, in the order of running.
      reverse: run from the last step to the first; ``hs[t]`` still belongs to ``xs[t]``.
      method: "scan" (``jax.lax.scan``, differentiated by JAX) or "unrolled" (a Python loop that
        writes out all T steps, which compiles slowly and shows what the loop costs).
      unroll: steps written out in one iteration of the scan, >= 1; "unrolled" writes out all.

    Returns:
      ``(state, hs)``: the state after the last valid step (the initial state for a row without
      one) and the outputs [T, B, ·]. At invalid steps the state is held and the output is zero;
      inputs and resets there are never read, so NaN padding changes neither value nor gradient.

    Raises:
      ValueError: a wrong shape, dtype, length, method or unroll.
    """
    checks.running(reverse, method, unroll)
    steps, batch = xs.shape[:2]
    valid = checks.valid_steps(steps, batch, mask, lengths)
    reset = checks.reset_steps(steps, batch, resets)
    if valid is not None:
        # Zeroed first: the gradient of a NaN that is only selected away later is still NaN.
        xs = jnp.where(valid[:, :, None], xs, jnp.zeros((), xs.dtype))
        reset = None if reset is None else reset & valid
    state = varying_like(state, (xs, valid, reset))

    def body(state, inputs):
        x_t, valid_t, reset_t = inputs
        if reset_t is not None:
            state = jax.tree.map(lambda s: jnp.where(reset_t[:, None], jnp.zeros_like(s), s), state)
        new = step(state, x_t)
        if valid_t is None:
            return new, new.h
        h_t = jnp.where(valid_t[:, None], new.h, jnp.zeros_like(new.h))
        return jax.tree.map(lambda n, s: jnp.where(valid_t[:, None], n, s), new, state), h_t

    inputs = (xs, valid, reset)
    if method == "scan":
        return jax.lax.scan(body, state, inputs, reverse=reverse, unroll=min(unroll, steps) or 1)
    return _unrolled(body, state, inputs, steps, reverse)


def recur_compiled(
    step: Callable,
    params: Any,
    state: Any,
    xs: jax.Array,
    *,
    mask: Any,
    lengths: Any,
    resets: Any,
    reverse: bool,
    method: str,
    unroll: int,
    traced: dict[str, Any] | None = None,
    static: tuple[tuple[str, Any], ...] = (),
) -> tuple[Any, jax.Array]:
    """``recur`` of a cell, as one compiled program even where the caller does not compile.

    Args:
      step: ``step(params, state, x_t, **options) -> state``, a function of a module.
      params: the cell's weights.
      traced: options of ``step`` that are numbers or None.
      static: options of ``step`` that choose the program, as (name, value) pairs.
      state, xs, mask, lengths, resets, reverse, method, unroll: as in ``recur``.

    Returns:
      As ``recur``.

    Raises:
      ValueError: as ``recur``.
    """
    checks.running(reverse, method, unroll)
    steps, batch = xs.shape[:2]
    valid = checks.valid_steps(steps, batch, mask, lengths)  # here, where lengths have values
    reset = checks.reset_steps(steps, batch, resets)
    return _compiled(
        step, params, state, xs, valid, reset, traced or {}, static, reverse, method, int(unroll)
    )


@partial(jax.jit, static_argnums=(0, 7, 8, 9, 10))
def _compiled(step, params, state, xs, mask, resets, traced, static, reverse, method, unroll):
    step = partial(step, params, **dict(static), **traced)
    how = {"reverse": reverse, "method": method, "unroll": unroll}
    return recur(step, state, xs, mask=mask, resets=resets, **how)


def _unrolled(body, state, inputs, steps: int, reverse: bool) -> tuple[Any, jax.Array]:
    """``lax.scan`` as a Python loop: same arguments, same result, one copy of the body per step."""
    if steps == 0:
        return state, jnp.zeros((0, *state.h.shape), state.h.dtype)
    # unstack, because the gradient of T slices xs[t] would be T full-size additions.
    columns = [[None] * steps if a is None else jnp.unstack(a) for a in inputs]
    hs = [None] * steps
    for t in reversed(range(steps)) if reverse else range(steps):
        state, hs[t] = body(state, tuple(column[t] for column in columns))
    return state, jnp.stack(hs)


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


class Bidirectional(NamedTuple):
    """The two directions of a layer: parameters, or states.

    Attributes:
      forward: what belongs to the direction 0 … T-1.
      backward: what belongs to the direction T-1 … 0.
    """

    forward: Any
    backward: Any


def bidirectional(
    layer: Callable,
    params: Bidirectional,
    xs: jax.Array,
    state: Bidirectional | None = None,
    *,
    mask: Any = None,
    lengths: Any = None,
    resets: Any = None,
    **options,
) -> tuple[Bidirectional, jax.Array]:
    """Runs a layer forwards and backwards over the same sequence (Schuster & Paliwal, 1997).

        hs[t] = [→h_t ; ←h_t]

    The backward direction starts at each row's own last valid step. ``resets`` mark where a new
    sequence begins: both directions are cut at the same places.

    Args:
      layer: ``lstm``, ``rnn``, ``gru`` or a ``functools.partial`` of one.
      params: ``Bidirectional(forward, backward)`` parameters of ``layer``.
      xs: [T, B, D] inputs.
      state: ``Bidirectional(forward, backward)`` initial states, or None for zeros.
      mask, lengths, resets: as in ``recur``.
      **options: every other option of ``layer``, the same for both directions.

    Returns:
      ``(Bidirectional(forward, backward), hs [T, B, 2H])``: each direction's state after its last
      valid step (the backward one ends at the first valid step), and the outputs side by side.

    Raises:
      ValueError: ``params`` or ``state`` is not a ``Bidirectional``, ``reverse`` among the options;
        what ``layer`` raises.
    """
    checks.function("layer", layer)
    if "reverse" in options:
        raise ValueError("reverse: got a value, expected none: both directions are run")
    for name, pair in (("params", params), ("state", state)):
        if not isinstance(pair, Bidirectional) and not (name == "state" and pair is None):
            raise ValueError(
                f"{name}: got {type(pair).__name__}, expected Bidirectional(forward, backward)"
            )
    state = Bidirectional(None, None) if state is None else state
    back = resets
    if resets is not None:
        checks.shape("xs", xs, ("T", "B", "D"))
        steps, batch = xs.shape[:2]
        back = _resets_backward(
            checks.reset_steps(steps, batch, resets),
            checks.valid_steps(steps, batch, mask, lengths),
        )
    given = {"mask": mask, "lengths": lengths, **options}
    forward, hs_forward = layer(params.forward, xs, state.forward, resets=resets, **given)
    backward, hs_backward = layer(
        params.backward, xs, state.backward, resets=back, reverse=True, **given
    )
    return Bidirectional(forward, backward), jnp.concatenate([hs_forward, hs_backward], axis=-1)


def _resets_backward(resets: jax.Array, valid: jax.Array | None) -> jax.Array:
    """[T, B] resets for the backward direction, cutting the sequence at the same places.

    A sequence that begins at step t ends, seen from behind, before the valid step that comes
    before t; so each step takes over the reset of the next valid step after it.
    """
    valid = jnp.ones_like(resets) if valid is None else valid

    def body(of_next, inputs):
        reset_t, valid_t = inputs
        return jnp.where(valid_t, reset_t, of_next), of_next

    start = varying_like(jnp.zeros(resets.shape[1:], bool), (resets, valid))
    return jax.lax.scan(body, start, (resets, valid), reverse=True)[1]


def stack(
    layer: Callable,
    params: Sequence[Any],
    xs: jax.Array,
    states: Sequence[Any] | None = None,
    *,
    dropout: float = 0.0,
    key: jax.Array | None = None,
    **options,
) -> tuple[tuple, jax.Array]:
    """Layers on top of one another; each reads the outputs of the one below.

        hs⁰ = xs,   hsˡ = layer(paramsˡ, drop(hsˡ⁻¹)),   drop on all inputs but xs

    Args:
      layer: ``lstm``, ``rnn``, ``gru``, or a ``functools.partial``, of ``bidirectional`` too.
      params: one entry per layer.
      xs: [T, B, D] inputs of the lowest layer.
      states: one initial state per layer (None for zeros), or None for zeros everywhere.
      dropout: rate between layers, 0 <= dropout < 1, fresh for every element and step.
      key: a PRNG key; None means evaluation: nothing is dropped.
      **options: every other option of ``layer``, the same for all layers.

    Returns:
      ``(states, hs)``: a tuple with each layer's final state, and the top layer's outputs.

    Raises:
      ValueError: no layers, as many states as layers not given, a bad ``dropout``; what ``layer``
        raises.
    """
    checks.rate("dropout", dropout)
    checks.function("layer", layer)
    if not isinstance(params, list | tuple) or hasattr(params, "_fields") or not params:
        raise ValueError(f"params: got {type(params).__name__}, expected a list, one per layer")
    states = (None,) * len(params) if states is None else states
    if len(states) != len(params):
        raise ValueError(f"states: got {len(states)}, expected {len(params)}, one per layer")
    finals, hs = [], xs
    for number, (weights, state) in enumerate(zip(params, states, strict=True)):
        if number > 0 and key is not None:
            hs = drop(jax.random.fold_in(key, number), hs, dropout)
        final, hs = layer(weights, hs, state, **options)
        finals.append(final)
    return tuple(finals), hs
