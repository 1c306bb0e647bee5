"""Mixed precision: products of bfloat16 factors, everything else in float32."""

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp

from lstmjax import checks
from lstmjax.bptt import check_inputs
from lstmjax.dropout import Noise, has_other_masks, zoneout_alone
from lstmjax.fused import RESIDUALS
from lstmjax.lstm import lstm
from lstmjax.recurrence import recur_compiled
from lstmjax.variants import init_learned_state


def in_bfloat16(
    layer: Callable,
    params: Any,
    xs: jax.Array,
    state: Any = None,
    **options,
) -> tuple[Any, jax.Array]:
    """A layer whose products have bfloat16 factors, on weights that stay float32.

    Products are summed in float32, gates and the cell state kept in it: mixed precision as of
    Micikevicius et al. (2018), but with bfloat16, whose range is float32's, so that no loss has to
    be scaled. All weights are rounded where they are used, biases, peepholes and gains too.

    A weight's gradient is summed over the steps in float32. (Weights rounded once, before the
    loop, would have it summed in bfloat16 by any loop that JAX differentiates: over 784 steps a
    bias's gradient is then wrong by half.)

    Args:
      layer: ``lstm``, ``gru``, ``rnn``, a variant, or a ``functools.partial`` of one.
      params: its weights, float32.
      xs: [T, B, D], floating.
      **options: the layer's own, numbers and names; all others as in ``lstm``. They go before those
        of a ``partial``.

    Returns:
      ``(state, hs [T, B, P])``: ``hs`` and ``state.h`` bfloat16, the rest of the state float32, so
      that it can be handed in again as it is.

    Raises:
      ValueError: as ``layer``; ``residuals`` where there is no derivative by hand.
    """
    layer, options = checks.opened(layer, options)
    return _run(layer, params, xs, state, **options)


def _run(
    layer: Callable,
    params: Any,
    xs: jax.Array,
    state: Any,
    *,
    mask: Any = None,
    lengths: Any = None,
    resets: Any = None,
    reset_to: Any = None,
    reverse: bool = False,
    noise: Noise | None = None,
    method: str = "fused",
    unroll: int = 1,
    truncation: Any = None,
    **options,
) -> tuple[Any, jax.Array]:
    """``in_bfloat16`` of a layer that is no ``partial``."""
    check_inputs(xs, truncation)
    checks.floating("xs", xs)
    xs = xs.astype(jnp.bfloat16)
    over_time = {"mask": mask, "lengths": lengths, "resets": resets, "reverse": reverse}
    how = {"method": method, "unroll": unroll, "truncation": truncation}
    noise = noise if jax.tree.leaves(noise) else None  # Noise() drops nothing
    known = noise is None or (method == "fused" and zoneout_alone(noise))
    if layer is lstm and method not in ("scan", "unrolled") and known:
        # A derivative by hand takes a weight's gradient in one product after the loop.
        options |= {"reset_to": reset_to, "noise": noise} | over_time | how
        return layer(_rounded(params), xs, state, **options)
    first = init_learned_state(params).state
    first = jax.tree.map(lambda part: jnp.zeros((xs.shape[-2], *part.shape), part.dtype), first)
    if state is not None:
        checks.states(state, type(first), [part.shape for part in first])
    start = _kept(first if state is None else state)
    if reset_to is not None:
        checks.states(reset_to, type(first), [part.shape for part in first], "reset_to")
        reset_to = _kept(reset_to)
    residuals, by_hand = options.pop("residuals", "gates"), layer is lstm and method == "fused"
    checks.one_of("residuals", residuals, RESIDUALS)
    if residuals != "gates" and (not by_hand or has_other_masks(noise)):
        expected = "expected 'gates' without a derivative by hand"
        raise ValueError(f"residuals: got {residuals!r}, {expected}")
    clips = {name: options.pop(name) for name in ("cell_clip", "proj_clip") if name in options}
    step = _step_in_bfloat16(layer, **options)
    given = {"noise": noise, "reset_to": reset_to, "traced": clips}
    return recur_compiled(step, params, start, xs, **given, **over_time, **how)


@cache  # one function for each layer, so that it is compiled once
def _step_in_bfloat16(layer: Callable, **options) -> Callable:
    """The step of a layer: the layer over one step, on weights that are rounded there."""

    def step(params, state, x_t, *, x_mask=None, h_mask=None, **clips):
        noise = None if x_mask is None and h_mask is None else Noise(x_mask, h_mask)
        given = {"noise": noise, "method": "unrolled"} | clips | options
        return layer(_rounded(params), x_t[None], state, **given)[0]

    return step


def _rounded(params: Any) -> Any:
    """Weights in bfloat16; the gradient that reaches them is float32."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)


def _kept(state: Any) -> Any:
    """A state as a layer in bfloat16 keeps it."""
    state = jax.tree.map(lambda part: jnp.asarray(part, jnp.float32), state)
    return state._replace(h=state.h.astype(jnp.bfloat16))


def bfloat16_dot(a: jax.Array, w: jax.Array, dimensions: Any, precision: Any) -> jax.Array:
    """``jax.lax.dot_general`` of bfloat16 factors, summed in float32."""
    a, w = a.astype(jnp.bfloat16), w.astype(jnp.bfloat16)
    options = {"precision": precision, "preferred_element_type": jnp.float32}
    return jax.lax.dot_general(a, w, dimensions, **options)
