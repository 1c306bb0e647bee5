"""A step over time: what all recurrent layers share, whatever their equations.

A cell is a pure function ``step(state, x_t) -> state`` whose state is a NamedTuple with a field
``h``. Running it over a sequence is this loop, and nothing else:

    for t in 0 … T-1:                  # T-1 … 0 with reverse=True
        if resets[t]: state = reset_to  # zeros, if nothing else is said
        if valid[t]:  state = step(state, xs[t]);  hs[t] = state.h
        else:                                      hs[t] = 0

``recur`` is that loop, either compiled as a loop (``method="scan"``) or written out step by step
(``method="unrolled"``), and ``recur_compiled`` is ``recur`` as one compiled program.
``bidirectional`` and ``stack`` build larger layers from any layer with the signature
``layer(params, xs, state, **options) -> (state, hs)``.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lstmjax import bptt, checks
from lstmjax.dropout import (
    Noise,
    check_noise,
    dropped_state,
    over_time,
    times_mask,
    with_gate_masks,
    zoned_out,
    zoneout_alone,
)
from lstmjax.dropout import dropout as drop
from lstmjax.sharded import each_its_rows, rows_over
from lstmjax.tangents import varying_like


def recur(
    step: Callable[[Any, jax.Array], Any],
    state: Any,
    xs: jax.Array,
    *,
    mask: Any = None,
    lengths: Any = None,
    resets: Any = None,
    reset_to: Any = None,
    reverse: bool = False,
    noise: Noise | None = None,
    method: str = "scan",
    unroll: int = 1,
    truncation: Any = None,
) -> tuple[Any, jax.Array]:
    """Runs ``step`` over time.

    Args:
      step: ``step(state, x_t) -> state``; keeps the shapes and dtypes of the state.
      state: a NamedTuple of [B, ·] arrays with a field ``h``: the state before the first step.
      xs: [T, B, D] inputs.
      mask: [T, B] bool, integer or floating; non-zero marks a valid step.
      lengths: [B] integers in 0 … T; step t of row b is valid iff t < lengths[b]. With ``mask``
        as well, a step is valid where both say so.
      resets: [T, B]; non-zero sets the state to ``reset_to`` before step t, in the order of
        running.
      reset_to: a state like ``state``, or None for zeros.
      reverse: run from the last step to the first; ``hs[t]`` still belongs to ``xs[t]``.
      noise: masks of recurrent dropout and zoneout, or None. With masks per gate, ``step`` is
        called with ``x_mask`` and ``h_mask`` too.
      method: "scan" (``jax.lax.scan``, differentiated by JAX) or "unrolled" (a Python loop that
        writes out all T steps, which compiles slowly and shows what the loop costs). "fused" is
        "scan" here: a derivative by hand is the cell's own matter.
      unroll: steps written out in one iteration of the scan, >= 1; "unrolled" writes out all.
      truncation: (k1, k2), that of the derivative (bptt.py), or None.

    Returns:
      ``(state, hs)``: the state after the last valid step (the initial state for a row without
      one) and the outputs [T, B, ·]. At invalid steps the state is held and the output is zero;
      inputs and resets there are never read, so NaN padding changes neither value nor gradient.

    Raises:
      ValueError: a wrong shape, dtype, length, noise, method, unroll or truncation.
    """
    checks.running(reverse, method, unroll)
    steps, batch = xs.shape[0], xs.shape[-2]
    truncation = bptt.within(bptt.as_truncation(truncation), steps)
    valid = checks.valid_steps(steps, batch, mask, lengths)
    reset = checks.reset_steps(steps, batch, resets)
    if valid is not None:
        # Zeroed first: the gradient of a NaN that is only selected away later is still NaN.
        xs = zeroed(valid, xs)
        reset = None if reset is None else reset & valid
    if noise is not None:
        check_noise(noise, xs, state)
        step = with_gate_masks(step, noise)
    if reset_to is not None:
        checks.states(reset_to, type(state), [part.shape for part in state], "reset_to")
    state = varying_like(state, (xs, valid, reset, noise, reset_to))
    fresh = jax.tree.map(jnp.zeros_like, state) if reset_to is None else reset_to

    def body(state, inputs):
        x_t, valid_t, reset_t, noise_t = inputs
        if reset_t is not None:
            state = _select(reset_t, fresh, state)
        if noise is None:
            new = step(state, x_t)
        else:
            new = zoned_out(noise, noise_t, state, step(dropped_state(noise_t, state), x_t))
        if valid_t is None:
            return new, new.h
        h_t = jnp.where(valid_t[:, None], new.h, jnp.zeros_like(new.h))
        return _select(valid_t, new, state), h_t

    inputs = (xs, valid, reset, None if noise is None else over_time(noise))
    loop = partial(_unrolled, steps=steps, reverse=reverse)
    if method != "unrolled":
        loop = partial(jax.lax.scan, reverse=reverse, unroll=min(unroll, steps) or 1)
    if truncation is None:
        return loop(body, state, inputs)
    return bptt.truncated(truncation, loop, body, state, inputs, reverse)


def zeroed(mask: jax.Array, xs: jax.Array) -> jax.Array:
    """Inputs [T, B, D], by slot [T, S, B, D], with zeros at the steps that are not valid."""
    where = mask[:, :, None] if xs.ndim == 3 else mask[:, None, :, None]
    return jnp.where(where, xs, jnp.zeros((), xs.dtype))


def _select(where: jax.Array, chosen: Any, otherwise: Any) -> Any:
    """Of two states, the first in the rows where ``where`` [B] is true."""
    return jax.tree.map(lambda a, b: jnp.where(where[:, None], a, b), chosen, otherwise)


def product(
    a: jax.Array, w: jax.Array, kinds: checks.Dtypes, gate_masks: jax.Array | None = None
) -> jax.Array:
    """a W as every cell takes it: factors in ``kinds.compute``, sums in ``kinds.keep``.

    Args:
      a: [..., F].
      w: [F, GH], G blocks.
      kinds: the layer's dtypes.
      gate_masks: [G, ..., F]: block k is that of a ⊙ gate_masks[k]; or None.

    Returns:
      [..., GH].
    """

    def one(a, w):
        a, w = a.astype(kinds.compute), w.astype(kinds.compute)
        return jnp.matmul(a, w, preferred_element_type=kinds.keep)

    if gate_masks is None:
        return one(a, w)
    blocks = jnp.split(w, gate_masks.shape[0], axis=-1)
    masked = [times_mask(a, mask) for mask in gate_masks]
    return jnp.concatenate([one(m, block) for m, block in zip(masked, blocks, strict=True)], -1)


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
    reset_to: Any = None,
    noise: Noise | None = None,
    truncation: Any = None,
    traced: dict[str, Any] | None = None,
    static: tuple[tuple[str, Any], ...] = (),
    by_hand: Mapping[str, Callable] | None = None,
    zoneout_by_hand: bool = False,
) -> tuple[Any, jax.Array]:
    """``recur`` of a cell, as one compiled program even where the caller does not compile.

    Args:
      step: ``step(params, state, x_t, **options) -> state``, a function of a module.
      params: the cell's weights.
      traced: options of ``step`` that are numbers or None.
      static: options of ``step`` that choose the program, as (name, value) pairs.
      by_hand: by method, ``run(params, state, xs, **arrays, reverse, unroll, **traced)``: the same
        recurrence by other means. They know no noise: with it "fused" is "scan", and others refuse.
        "fused" is "scan" also where T is a symbol (``jax.export``).
        "fused" is given a ``truncation`` that cuts an error, and others refuse it.
      zoneout_by_hand: whether "fused" is given the masks of zoneout, as ``noise``, where there is
        no other noise.
      state, xs, mask, lengths, resets, reset_to, reverse, noise, method, unroll, truncation: as in
        ``recur``.

    Returns:
      As ``recur``.

    Raises:
      ValueError: as ``recur``.
    """
    by_hand = by_hand or {}
    checks.running(reverse, method, unroll, tuple(by_hand))
    rows_over(xs)
    steps, batch = xs.shape[0], xs.shape[-2]
    valid = checks.valid_steps(steps, batch, mask, lengths)  # here, where lengths have values
    reset = checks.reset_steps(steps, batch, resets)
    if noise is not None:
        check_noise(noise, xs, state)
        noise = noise if jax.tree.leaves(noise) else None  # one without masks drops nothing
    arrays = {"mask": valid, "resets": reset, "reset_to": reset_to, "noise": noise}
    if noise is not None and method not in checks.METHODS:
        raise ValueError(f"noise: got masks with method {method!r}, expected None")
    truncation = bptt.as_truncation(truncation)
    if truncation is not None and method not in checks.METHODS:
        pair = truncation.k1, truncation.k2
        raise ValueError(f"truncation: got {pair} with method {method!r}, expected None")
    if (truncation := bptt.within(truncation, steps)) is not None:
        arrays["truncation"] = truncation
    knows = noise is None or (method == "fused" and zoneout_by_hand and zoneout_alone(noise))
    cuts = isinstance(steps, int)  # a derivative by hand cuts them to pieces; see jax.export
    if method in by_hand and knows and (cuts or method != "fused"):
        if noise is None:
            del arrays["noise"]
        return _compiled_by_hand(
            by_hand[method], params, state, xs, arrays, traced or {}, reverse, int(unroll)
        )
    return _compiled(
        step, params, state, xs, arrays, traced or {}, static, reverse, method, int(unroll)
    )


# inline: within a caller's jit these are no calls of their own, which would stand in XLA's way.


@partial(jax.jit, static_argnums=(0, 6, 7), inline=True)
def _compiled_by_hand(by_hand, params, state, xs, arrays, traced, reverse, unroll):
    def run(whole, state, xs, arrays):
        (params, traced), options = whole, {"reverse": reverse, "unroll": unroll}
        layer = lambda state: by_hand(params, state, xs, **arrays, **traced, **options)  # noqa: E731
        return _kept_where_unread(layer, state, arrays, reverse)

    return each_its_rows(run, (params, traced), state, xs, arrays)


@partial(jax.jit, static_argnums=(0, 6, 7, 8, 9), inline=True)
def _compiled(step, params, state, xs, arrays, traced, static, reverse, method, unroll):
    options = {"reverse": reverse, "method": method, "unroll": unroll}

    def run(whole, state, xs, arrays):
        params, traced = whole
        state = varying_like(state, (params, traced))  # whose weights differ by device
        # Narrow weights are narrowed at each step anew: a loop's derivative sums what reaches a
        # weight in the dtype that it has outside of it, and bfloat16 has no digits left for that.
        outside = jax.tree.map(lambda leaf: leaf.astype(checks.wide(leaf.dtype)), params)

        def narrow_step(state, x_t, **noise_t):
            inside = jax.tree.map(lambda kept, leaf: kept.astype(leaf.dtype), outside, params)
            return step(inside, state, x_t, **dict(static), **traced, **noise_t)

        layer = lambda state: recur(narrow_step, state, xs, **arrays, **options)  # noqa: E731
        return _kept_where_unread(layer, state, arrays, reverse)

    return each_its_rows(run, (params, traced), state, xs, arrays)


def _kept_where_unread(
    run: Callable, state: Any, arrays: dict, reverse: bool
) -> tuple[Any, jax.Array]:
    """``run(state)``, where a state that no valid step reads may be NaN.

    A step on it would be selected away, and its gradient still be NaN. Rows without a valid step
    keep theirs; a truncation cuts the errors on their way there, as in a run.
    """
    if arrays["mask"] is None:
        return run(state)
    valid = jnp.any(arrays["mask"], axis=0)
    read = valid & ~_begins_anew(arrays["mask"], arrays["resets"], reverse)
    final, hs = run(_select(read, state, jax.tree.map(jnp.zeros_like, state)))
    kept = jax.lax.stop_gradient(state) if "truncation" in arrays else state
    return _select(valid, final, kept), hs


def _begins_anew(mask: jax.Array, resets: jax.Array | None, reverse: bool) -> jax.Array:
    """[B] whether a row's first valid step, in the order of running, resets the state."""
    if resets is None or mask.shape[0] == 0:
        return jnp.zeros(mask.shape[1:], bool)
    order = slice(None, None, -1 if reverse else 1)
    first = jnp.argmax(mask[order], axis=0)
    return jnp.take_along_axis(resets[order], first[None], axis=0)[0]


def _unrolled(body, state, inputs, steps: int, reverse: bool) -> tuple[Any, jax.Array]:
    """``lax.scan`` as a Python loop: same arguments, same result, one copy of the body per step."""
    if steps == 0:
        return state, jnp.zeros((0, *state.h.shape), state.h.dtype)
    # unstack, because the gradient of T slices xs[t] would be T full-size additions.
    columns = jax.tree.map(jnp.unstack, inputs)
    outputs = [None] * steps
    for t in reversed(range(steps)) if reverse else range(steps):
        inputs_t = jax.tree.map(lambda _, column, t=t: column[t], inputs, columns)
        state, outputs[t] = body(state, inputs_t)
    return state, jax.tree.map(lambda *of_steps: jnp.stack(of_steps), *outputs)


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
    reset_to: Bidirectional | None = None,
    noise: Bidirectional | None = None,
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
      reset_to, noise: ``Bidirectional(forward, backward)`` of what ``recur`` takes, or None.
      **options: every other option of ``layer``, the same for both directions; ``truncation``
        counts steps in each one's order of running.

    Returns:
      ``(Bidirectional(forward, backward), hs [T, B, 2H])``: each direction's state after its last
      valid step (the backward one ends at the first valid step), and the outputs side by side.

    Raises:
      ValueError: ``params``, ``state``, ``reset_to`` or ``noise`` is not a ``Bidirectional``,
        ``reverse`` among the options, ``truncation`` inside a ``stack``; what ``layer`` raises.
    """
    checks.function("layer", layer)
    if isinstance(options.get("truncation"), bptt.Truncation):
        expected = "expected None: two directions have no order of running in common"
        raise ValueError(f"truncation: got a pair in a stack of bidirectional layers, {expected}")
    if "reverse" in options or checks.option(layer, "reverse"):
        raise ValueError("reverse: got a value, expected none: both directions are run")
    pairs = {"params": params, "state": state, "reset_to": reset_to, "noise": noise}
    for name, pair in pairs.items():
        if not isinstance(pair, Bidirectional) and not (name != "params" and pair is None):
            raise ValueError(
                f"{name}: got {type(pair).__name__}, expected Bidirectional(forward, backward)"
            )
    neither = Bidirectional(None, None)
    state, each = state or neither, {}
    for name in ("reset_to", "noise"):  # a layer that knows no such option is not asked about it
        if pairs[name] is not None:
            each[name] = pairs[name]
    # Of a partial's as well: what cuts the sequence cuts it for both directions.
    given = {"mask": mask, "lengths": lengths, "resets": resets}
    given = {n: checks.option(layer, n) if v is None else v for n, v in given.items()}
    mask, lengths, resets = given.values()
    back = resets
    if resets is not None:
        checks.shape("xs", xs, ("T", "B", "D"))
        steps, batch = xs.shape[:2]
        back = resets_backward(
            checks.reset_steps(steps, batch, resets),
            checks.valid_steps(steps, batch, mask, lengths),
        )
    given = {"mask": mask, "lengths": lengths, **options}
    ahead = {name: pair.forward for name, pair in each.items()}
    behind = {name: pair.backward for name, pair in each.items()}
    forward, hs_forward = layer(params.forward, xs, state.forward, resets=resets, **given, **ahead)
    backward, hs_backward = layer(
        params.backward, xs, state.backward, resets=back, reverse=True, **given, **behind
    )
    return Bidirectional(forward, backward), jnp.concatenate([hs_forward, hs_backward], axis=-1)


def resets_backward(resets: jax.Array, valid: jax.Array | None) -> jax.Array:
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
    reset_to: Sequence[Any] | None = None,
    noise: Sequence[Any] | None = None,
    truncation: tuple[int, int] | None = None,
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
      reset_to, noise: what the layer takes, one per layer, or None.
      truncation: (k1, k2) as in ``lstm``: an error reaches the same steps in all layers. (Layers
        truncated each on its own would let it go back k2 steps in every one of them.) It asks for
        layers of lstmjax that are not ``bidirectional``.
      **options: every other option of ``layer``, the same for all layers.

    Returns:
      ``(states, hs)``: a tuple with each layer's final state, and the top layer's outputs.

    Raises:
      ValueError: no layers, not as many states, ``reset_to`` or ``noise`` as layers, a bad
        ``dropout``; what ``layer`` raises.
    """
    checks.rate("dropout", dropout)
    checks.prng_key("key", key, or_none=True)
    checks.function("layer", layer)
    if not isinstance(params, list | tuple) or hasattr(params, "_fields") or not params:
        raise ValueError(f"params: got {type(params).__name__}, expected a list, one per layer")
    states = (None,) * len(params) if states is None else states
    each = {"states": states, "reset_to": reset_to, "noise": noise}
    each = {name: given for name, given in each.items() if given is not None}
    for name, given in each.items():
        checks.one_per_layer(name, given, len(params))
    window, finals, hs = bptt.as_truncation(truncation), [], xs
    for number, weights in enumerate(params):
        own = {name: given[number] for name, given in each.items()}
        slots = number > 0 and hs.ndim == 4  # between layers of a truncated stack
        if number > 0 and key is not None:
            dropped = partial(drop, jax.random.fold_in(key, number), rate=dropout)
            hs = jax.vmap(dropped, 1, 1)(hs) if slots else dropped(hs)
        if window is not None:
            own["truncation"] = window.between(slots, number + 1 < len(params))
        final, hs = layer(weights, hs, own.pop("states"), **own, **options)
        finals.append(final)
    return tuple(finals), hs
