"""The LSTM's recurrence with a derivative written by hand.

Left to itself, differentiating a scan adds up the gradient of W_h inside the backward loop, one
small product and one addition of 4H² numbers per step, and keeps thirteen numbers of every unit
and step until then. Here the derivative of the whole loop is written down once, as another loop
over time that is linear in the tangents (a dot: its tangent):

    ż_t = [ẋ_t W_x + x_t Ẇ_x + h_{t-1} Ẇ_h + ḃ] + ḣ_{t-1} W_h
    ċ_t = α_t ⊙ ċ_{t-1} + k^i_t ⊙ ż^i_t + k^f_t ⊙ ż^f_t + k^g_t ⊙ ż^g_t
    ṁ_t = β_t ⊙ ċ_t + k^o_t ⊙ ż^o_t,   ḣ_t = ṁ_t W_proj + [m_t Ẇ_proj]

    k^i = g i (1 − i),   k^f = c_{t-1} f (1 − f),   k^g = i (1 − g²),   α = f + k^i p_i + k^f p_f
    k^o = tanh(c) o (1 − o),   β = o (1 − tanh²(c)) + k^o p_o

(k^i, k^f, k^g and α times the derivative of the cell's clip; with peepholes, c_{t-1} ṗ_i and
c_{t-1} ṗ_f and c_t ṗ_o are added to ż. Where f = 1 − i, there is no ż^f, and
k^i = (g − c_{t-1}) i (1 − i). Where zoneout keeps a unit's old c or h, it keeps their tangents.)
What stands in brackets does not depend on ḣ_{t-1} and is taken for many steps at once, so when JAX
turns the whole round, the backward loop holds nothing but dz_t W_hᵀ (and dh_t W_projᵀ), and the
gradients of W_h, W_x, b and x are one product or sum each after it.

``residuals`` says what waits in memory between the loops, [T, B, H] each:

    "gates"      i, f, g, o and c; the coefficients are cheap
    "recompute"  c, beside the outputs; the gates again, from one large product
    "sqrt"       the state at every √T-th step; the steps between again, one by one

A long sequence is turned round in some sixteen pieces (√T with "sqrt"), so that the coefficients
and dz exist for one piece at a time; then the gradients of weights are one product per piece.

Because it is the tangent that is written by hand, and not the gradient, forward mode, second
derivatives, ``vmap`` and ``shard_map`` need nothing else. The same idea, as a gradient, is in
cuDNN (Appleyard, Kočiský & Blunsom, 2016) and Haste; recomputing in pieces of √T steps is Chen, Xu,
Zhang & Guestrin's (2016).
"""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp

from lstmjax import checks
from lstmjax.bptt import Truncation, over_slots
from lstmjax.dropout import Noise
from lstmjax.fused_parts import (
    How,
    Inputs,
    Kept,
    Known,
    clip,
    joined,
    peep,
    rows_of,
    sums,
    written,
)
from lstmjax.pieces import (
    by_slot,
    cut,
    driven_by_slot,
    first_slot,
    flat,
    hold,
    in_parts,
    joint,
    reset,
    row_before,
    rows,
    shifted,
    steps_of_a_piece,
    with_zoneout,
)
from lstmjax.recurrence import product
from lstmjax.tangents import dense, is_zero, varying_like, zero_is_none

RESIDUALS = ("gates", "recompute", "sqrt")


def by_hand(residuals: str = "gates", coupled: bool = False) -> Callable:
    """``fused`` with these options: the same function whenever they are the same.

    Raises:
      ValueError: an unknown ``residuals``.
    """
    checks.one_of("residuals", residuals, RESIDUALS)
    return _by_hand(residuals, coupled)


@lru_cache
def _by_hand(residuals: str, coupled: bool) -> Callable:
    return partial(fused, residuals=residuals, coupled=coupled)


def fused(
    params: Any,
    state: Any,
    xs: jax.Array,
    *,
    mask: jax.Array | None = None,
    resets: jax.Array | None = None,
    reset_to: Any = None,
    cell_clip: Any = None,
    proj_clip: Any = None,
    reverse: bool = False,
    unroll: int = 1,
    truncation: Truncation | None = None,
    noise: Noise | None = None,
    residuals: str = "gates",
    coupled: bool = False,
) -> tuple[Any, jax.Array]:
    """``lstm`` by ``method="fused"``; the arguments are checked by then.

    Args:
      params: ``LSTMParams``.
      state: ``LSTMState(h [B, P], c [B, H])`` in the layer's dtypes.
      xs: [T, B, D], or by slot, [T, S, B, D].
      mask, resets: [T, B] bool, or None.
      reset_to: a state like ``state``, or None for zeros.
      cell_clip, proj_clip: bounds, or None; not differentiated with respect to.
      reverse, unroll: as in ``lstm``.
      truncation: of the derivative, one that cuts an error, or None (bptt.py).
      noise: masks of zoneout alone, or None.
      residuals: "gates", "recompute" or "sqrt"; the results are the same.
      coupled: whether f = 1 − i, with blocks i, g, o and peepholes i, o (``variants.cifg``).

    Returns:
      ``(state, hs [T, B, P])``, as ``lstm``.
    """
    piece = steps_of_a_piece(len(xs), residuals)
    kinds = checks.dtypes(xs, params)
    how = How(kinds, reverse, min(unroll, piece) or 1, residuals, coupled, truncation, piece)
    # Kept apart from their dtype, so that the gradients of pieces are summed in float32 at least.
    w_x, b, *weights = (
        None if w is None else w.astype(kinds.keep)
        for w in (params.w_x, params.b, params.w_h, params.peephole, params.w_proj)
    )

    def run(how, state, reset_to, xs, at):
        inputs = Inputs(xs, w_x, b, *weights, state, reset_to)
        return _recurrence(how, inputs, Known(*at, cell_clip, proj_clip))

    return in_parts(run, how, params, state, xs, mask, resets, reset_to, (noise,))


def _recurrence(how: How, inputs: Inputs, known: Known) -> tuple[Any, jax.Array]:
    @jax.custom_jvp
    def run(inputs, known):
        final, hs, _ = _forward(how, first_slot(how, inputs), known, keep="nothing")
        return by_slot(how, final, hs)

    def run_jvp(primals, tangents):
        inputs, known = first_slot(how, primals[0]), primals[1]
        final, hs, kept = _forward(how, inputs, known, keep=how.residuals)
        return by_slot(how, final, hs), _tangent(how, inputs, known, kept, hs, tangents[0])

    run.defjvp(run_jvp, symbolic_zeros=True)
    return run(inputs, known)


def _forward(how: How, inputs: Inputs, known: Known, keep: str) -> tuple[Any, jax.Array, Any]:
    """The recurrence itself, and what its derivative needs: for "sqrt", the state [N, B, ·] before
    each of the N pieces, otherwise ``Kept``."""
    kinds, state_kind = how.kinds, type(inputs.state)
    peephole, weights = rows_of(inputs, how), joined(inputs, kinds)
    held = known.valid is not None or known.resets is not None
    # Then hs is no stack of the loop.
    told = keep == "gates" and _is_told(inputs, known) and not held

    def body(state, at_t):
        x_t, valid_t, reset_t, noise_t = at_t
        h_tm1, c_tm1 = reset(reset_t, inputs.reset_to, state)
        z = sums(inputs, x_t, h_tm1, weights, how)
        *gates, g = written(z, c_tm1, peephole)
        i, f = gates if len(gates) == 2 else (gates[0], 1 - gates[0])
        c, _ = clip(f * c_tm1 + i * g, known.cell_clip)
        o = jax.nn.sigmoid(peep(z[-1], peephole[-1], c))
        h = o * jnp.tanh(c)
        if inputs.w_proj is not None:
            h, _ = clip(product(h, inputs.w_proj, kinds), known.proj_clip)
        old, new = state_kind(h_tm1, c_tm1), state_kind(h.astype(kinds.compute), c)
        after, h_t = hold(valid_t, with_zoneout(noise_t, old, new), old)
        gates = (*gates, g, o) if keep == "gates" else None
        none = keep not in ("gates", "recompute")
        kept = None if none else Kept(gates, after.h if held else None, after.c)
        return after, (None if told else h_t, kept)

    def piece(state, at):
        final, (hs, _) = scan(body, state, at)
        return final, (hs, state)

    scan = partial(jax.lax.scan, reverse=how.reverse)
    at = (inputs.xs, known.valid, known.resets, known.noise)
    if keep != "sqrt":
        final, (hs, kept) = scan(body, inputs.state, at, unroll=how.unroll)
        hs = _told(how, kept) if told else hs
    else:
        final, (hs, kept) = scan(piece, inputs.state, cut(at, how.piece))
        hs = joint(hs)
    return final, hs, kept


def _tangent(
    how: How, inputs: Inputs, known: Known, kept: Any, hs: jax.Array, dots: Inputs
) -> tuple[Any, jax.Array]:
    """The tangents of the final state and of hs: linear in ``dots``, the tangents of ``inputs``."""
    given = jax.tree.map(zero_is_none, dots, is_leaf=is_zero)
    states = (dots.state, dots.reset_to)
    state, reset_to = jax.tree.map(dense, states, is_leaf=is_zero)
    # The piece's own output stands for the state's h unless that is kept or told by the gates.
    known_h = how.residuals == "gates" and _is_told(inputs, known)
    outputs = None if known_h or how.residuals == "sqrt" else hs
    before = kept if how.residuals == "sqrt" else None
    kept = None if how.residuals == "sqrt" else kept
    whole = (kept, outputs)
    state, reset_to = varying_like((state, reset_to), (inputs, known, given, state, reset_to))

    def piece(state, at):
        number, x, dot_x, kept, outputs, of_steps, before = at
        before = _before(how, number, inputs, *whole) if before is None else before
        own, known = inputs._replace(xs=x, state=before), Known(*of_steps, *clips)
        steps = _again(how, own, known, kept, outputs)
        parts = _piece_of_tangent(how, own, known, steps)
        return parts(given._replace(xs=dot_x), state, reset_to)

    of_steps, clips = known.of_steps, (known.cell_clip, known.proj_clip)
    at = cut((inputs.xs, given.xs, kept, outputs, of_steps), how.piece)
    count = len(at[0])
    at = (jnp.arange(count), *at, before)
    if count != 1 or how.residuals != "gates":
        # What a piece computes of its residuals is not kept: that is what the pieces are for.
        piece = jax.checkpoint(
            piece, prevent_cse=count == 1, policy=jax.checkpoint_policies.nothing_saveable
        )
    if count == 1:
        return piece(state, jax.tree.map(lambda a: a[0], at))
    final, dot_hs = jax.lax.scan(piece, state, at, reverse=how.reverse)
    return final, joint(dot_hs)


def _piece_of_tangent(how: How, inputs: Inputs, known: Known, steps: tuple):
    """``run(given, state, reset_to)``: the loop of ``_tangent`` over steps that are known."""
    kinds, state_kind = how.kinds, type(inputs.state)
    gates, h_tm1, c_tm1, c = steps
    m = gates[-1] * jnp.tanh(c)
    within = None
    if inputs.w_proj is not None and known.proj_clip is not None:
        within = clip(flat(m, inputs.w_proj, kinds), known.proj_clip)[1]
    coefficients = _coefficients(how, inputs, known.cell_clip, gates, c_tm1, c)

    def run(given, state, reset_to):
        driven_by = partial(_driven, how, inputs, given, h_tm1, c_tm1, c)
        driven, slots = driven_by_slot(driven_by, given.xs)
        to_h = None if given.w_proj is None else flat(m, given.w_proj, kinds)

        def body(state, at_t):
            driven_t, (alpha, beta, *k, k_o), within_t, to_h_t, valid_t, reset_t, noise_t = at_t
            h_tm1, c_tm1 = reset(reset_t, reset_to, state)
            z = driven_t + product(h_tm1, inputs.w_h, kinds)
            *z, z_o = jnp.split(z, len(gates), axis=-1)
            c = sum((k_n * z_n for k_n, z_n in zip(k, z, strict=True)), alpha * c_tm1)
            h = beta * c + k_o * z_o
            if inputs.w_proj is not None:
                h = product(h, inputs.w_proj, kinds)
                h = h if to_h_t is None else h + to_h_t
                h = h if within_t is None else h * within_t
            old, new = state_kind(h_tm1, c_tm1), state_kind(h.astype(kinds.compute), c)
            return hold(valid_t, with_zoneout(noise_t, old, new), old)

        at = (driven, coefficients, within, to_h)
        at = (*at, known.valid, known.resets, known.noise)
        many = over_slots(how.truncation, body, (slots, *[None] * (len(at) - 1)))
        return jax.lax.scan(many, state, (known.begins, at), reverse=how.reverse, unroll=how.unroll)

    return run


def _driven(how: How, inputs: Inputs, given: Inputs, h_tm1, c_tm1, c, dot_xs) -> jax.Array:
    """What stands in brackets in the equation of ż, [T, B, GH], of what is given."""
    kinds = how.kinds
    driven = jnp.zeros((*c.shape[:2], inputs.w_h.shape[1]), kinds.keep)
    if dot_xs is not None:
        driven = driven + flat(dot_xs, inputs.w_x, kinds)
    if given.w_x is not None:
        driven = driven + flat(inputs.xs, given.w_x, kinds)
    if given.b is not None:
        driven = driven + jnp.broadcast_to(given.b.astype(kinds.keep), driven.shape)
    if given.w_h is not None:
        driven = driven + flat(h_tm1, given.w_h, kinds)
    if given.peephole is not None:
        *p, p_o = (rows(row, c) for row in given.peephole.astype(kinds.keep))
        parts = (*(c_tm1 * row for row in p), jnp.zeros_like(c), c * p_o)
        driven = driven + jnp.concatenate(parts, axis=-1)
    return driven


def _coefficients(how: How, inputs: Inputs, cell_clip: Any, gates: tuple, c_tm1, c) -> tuple:
    """α, β, then k of each block: what the derivative multiplies with, at all steps."""
    *p, p_o = rows_of(inputs, how)
    tanh_c = jnp.tanh(c)
    if how.coupled:
        i, g, o = gates
        f = 1 - i
        k = [(g - c_tm1) * i * f]
    else:
        i, f, g, o = gates
        k = [g * i * (1 - i), c_tm1 * f * (1 - f)]
    alpha, beta, k_o = f, o * (1 - tanh_c * tanh_c), tanh_c * o * (1 - o)
    if p_o is not None:
        alpha = sum((k_n * rows(p_n, c) for k_n, p_n in zip(k, p, strict=True)), f)
        beta = beta + k_o * rows(p_o, c)
    k = [alpha, *k, i * (1 - g * g)]
    within = clip(f * c_tm1 + i * g, cell_clip)[1]
    alpha, *k = k if within is None else [within * k_n for k_n in k]
    return (alpha, beta, *k, k_o)


# ---- what was kept, and what is computed again --------------------------------------------------


def _again(how: How, inputs: Inputs, known: Known, kept: Any, outputs: Any) -> tuple:
    """``(gates, h_{t-1}, c_{t-1}, c_t)`` of the steps of a piece, from what was kept of them; with
    zoneout, c_t is the cell's own, before any old one is put back."""
    if how.residuals == "sqrt":
        _, outputs, kept = _forward(how, inputs, known, keep="gates")
    gates, h, c = kept
    if h is None:
        h = outputs if outputs is not None else _told(how, kept)
    h_tm1, c_tm1 = jax.tree.map(partial(shifted, how), inputs.state, type(inputs.state)(h, c))
    if known.resets is not None:
        to = jax.tree.map(
            lambda a: jnp.broadcast_to(a, (*h.shape[:2], a.shape[-1])), inputs.reset_to
        )
        where = known.resets[:, :, None]
        h_tm1, c_tm1 = jnp.where(where, to.h, h_tm1), jnp.where(where, to.c, c_tm1)
    z, peephole = None, rows_of(inputs, how)
    if gates is None:
        z = sums(inputs, inputs.xs, h_tm1, joined(inputs, how.kinds), how)
        gates = written(z, c_tm1, peephole)
    if known.noise is not None and known.noise.zoneout_c is not None:
        i, *f, g = gates if z is not None else gates[:-1]
        f = f[0] if f else 1 - i
        c, _ = clip(f * c_tm1 + i * g, known.cell_clip)
    if z is not None:
        gates = (*gates, jax.nn.sigmoid(peep(z[-1], peephole[-1], c)))
    return gates, h_tm1, c_tm1, c


def _before(how: How, number: jax.Array, inputs: Inputs, kept: Kept, outputs: Any) -> Any:
    """The state before piece ``number``, from what was kept of all steps."""
    first, (kept, outputs) = row_before(how, number, (kept, outputs))
    h = kept.h if kept.h is not None else outputs if outputs is not None else _told(how, kept)
    after = type(inputs.state)(h, kept.c)
    return jax.tree.map(partial(jnp.where, first), inputs.state, after)


def _is_told(inputs: Inputs, known: Known) -> bool:
    """Whether h after a step follows from its gates and c, as ``_told`` has it."""
    return inputs.w_proj is None and known.noise is None


def _told(how: How, kept: Kept) -> jax.Array:
    """h after each step, from its gates and c, as the forward loop computed it."""
    return (kept.gates[-1] * jnp.tanh(kept.c)).astype(how.kinds.compute)
