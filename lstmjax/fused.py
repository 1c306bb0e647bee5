"""The LSTM's recurrence with a derivative written by hand.

Left to itself, differentiating a scan adds up the gradient of W_h inside the backward loop, one
small product and one addition of 4H² numbers per step. Here the derivative of the whole loop is
written down once, as another loop over time that is linear in the tangents (a dot: its tangent):

    ż_t = [ẋ_t W_x + x_t Ẇ_x + h_{t-1} Ẇ_h + ḃ] + ḣ_{t-1} W_h
    ċ_t = α_t ⊙ ċ_{t-1} + k^i_t ⊙ ż^i_t + k^f_t ⊙ ż^f_t + k^g_t ⊙ ż^g_t
    ṁ_t = β_t ⊙ ċ_t + k^o_t ⊙ ż^o_t,   ḣ_t = ṁ_t W_proj + [m_t Ẇ_proj]

    k^i = g i (1 − i),   k^f = c_{t-1} f (1 − f),   k^g = i (1 − g²),   α = f + k^i p_i + k^f p_f
    k^o = tanh(c) o (1 − o),   β = o (1 − tanh²(c)) + k^o p_o

(k^i, k^f, k^g and α times the derivative of the cell's clip; with peepholes, c_{t-1} ṗ_i and
c_{t-1} ṗ_f and c_t ṗ_o are added to ż.) The forward loop leaves the six coefficients [T, B, H]
behind. What stands in brackets does not depend on ḣ_{t-1} and is taken for all t at once, so when
JAX turns the whole round, the backward loop holds nothing but dz_t W_hᵀ (and dh_t W_projᵀ), and the
gradients of W_h, W_x, b and x are one product or sum each after it.

Because it is the tangent that is written by hand, and not the gradient, forward mode, second
derivatives, ``vmap`` and ``shard_map`` need nothing else. The same idea, as a gradient, is in
cuDNN (Appleyard, Kočiský & Blunsom, 2016) and Haste.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from lstmjax import checks
from lstmjax.recurrence import product, varying_like


class _Inputs(NamedTuple):
    """What the recurrence is differentiated with respect to."""

    xs: jax.Array
    w_x: jax.Array
    b: jax.Array
    w_h: jax.Array
    peephole: jax.Array | None
    w_proj: jax.Array | None
    state: Any
    reset_to: Any  # None without resets


class _Known(NamedTuple):
    """What it is not differentiated with respect to."""

    valid: jax.Array | None  # [T, B] bool
    resets: jax.Array | None  # [T, B] bool
    cell_clip: jax.Array | None
    proj_clip: jax.Array | None


class _How(NamedTuple):
    """What chooses the program."""

    kinds: checks.Dtypes
    reverse: bool
    unroll: int


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
) -> tuple[Any, jax.Array]:
    """``lstm`` by ``method="fused"``; the arguments are checked by then.

    Args:
      params: ``LSTMParams``.
      state: ``LSTMState(h [B, P], c [B, H])`` in the layer's dtypes.
      xs: [T, B, D].
      mask, resets: [T, B] bool, or None.
      reset_to: a state like ``state``, or None for zeros.
      cell_clip, proj_clip: bounds, or None; not differentiated with respect to.
      reverse, unroll: as in ``lstm``.

    Returns:
      ``(state, hs [T, B, P])``, as ``lstm``.
    """
    how = _How(checks.dtypes(xs, params), reverse, min(unroll, len(xs)) or 1)
    if mask is not None:
        xs = jnp.where(mask[:, :, None], xs, jnp.zeros((), xs.dtype))
        resets = None if resets is None else resets & mask
    if resets is None:
        reset_to = None
    elif reset_to is None:
        reset_to = jax.tree.map(jnp.zeros_like, state)
    weights = (params.w_h, params.peephole, params.w_proj)
    state, reset_to = varying_like((state, reset_to), (xs, params, mask, resets, reset_to))
    inputs = _Inputs(xs, params.w_x, params.b, *weights, state, reset_to)
    return _recurrence(how, inputs, _Known(mask, resets, cell_clip, proj_clip))


def _recurrence(how: _How, inputs: _Inputs, known: _Known) -> tuple[Any, jax.Array]:
    @jax.custom_jvp
    def run(inputs, known):
        return _forward(how, inputs, known, keep=False)[:2]

    def run_jvp(primals, tangents):
        inputs, known = primals
        final, hs, kept = _forward(how, inputs, known, keep=True)
        return (final, hs), _tangent(how, inputs, known, kept, hs, tangents[0])

    run.defjvp(run_jvp, symbolic_zeros=True)
    return run(inputs, known)


def _forward(how: _How, inputs: _Inputs, known: _Known, keep: bool) -> tuple[Any, jax.Array, Any]:
    """The recurrence itself; with ``keep`` also what its derivative needs, stacked over time."""
    kinds, state_kind = how.kinds, type(inputs.state)
    peephole = _rows_of(inputs, kinds)

    def body(state, at_t):
        x_t, valid_t, reset_t = at_t
        h_tm1, c_tm1 = _reset(reset_t, inputs.reset_to, state)
        z = product(x_t, inputs.w_x, kinds) + product(h_tm1, inputs.w_h, kinds)
        z = jnp.split(z + jnp.broadcast_to(inputs.b.astype(kinds.keep), z.shape), 4, axis=-1)
        p_i, p_f, p_o = (jnp.broadcast_to(p, c_tm1.shape) for p in peephole)
        i = jax.nn.sigmoid(z[0] + p_i * c_tm1)
        f = jax.nn.sigmoid(z[1] + p_f * c_tm1)
        g = jnp.tanh(z[2])
        c, within = _clip(f * c_tm1 + i * g, known.cell_clip)
        o = jax.nn.sigmoid(z[3] + p_o * c)
        tanh_c = jnp.tanh(c)
        m = o * tanh_c
        h, h_within = m, None
        if inputs.w_proj is not None:
            h, h_within = _clip(product(m, inputs.w_proj, kinds), known.proj_clip)
        new = state_kind(h.astype(kinds.compute), c)
        after, h_t = _hold(valid_t, new, state_kind(h_tm1, c_tm1))
        if not keep:
            return after, (h_t, None)
        k_i, k_f, k_g = g * i * (1 - i), c_tm1 * f * (1 - f), i * (1 - g * g)
        k_o = tanh_c * o * (1 - o)
        alpha, beta = f + k_i * p_i + k_f * p_f, o * (1 - tanh_c * tanh_c) + k_o * p_o
        if within is not None:
            alpha, k_i, k_f, k_g = (within * k for k in (alpha, k_i, k_f, k_g))
        has_p, has_proj = inputs.peephole is not None, inputs.w_proj is not None
        held = valid_t is not None or reset_t is not None
        return after, (
            h_t,
            _Kept(
                (alpha, beta, k_i, k_f, k_g, k_o),
                h_tm1 if held else None,
                (c_tm1, c) if has_p else None,
                m if has_proj else None,
                h_within,
            ),
        )

    at = (inputs.xs, known.valid, known.resets)
    final, (hs, kept) = jax.lax.scan(body, inputs.state, at, reverse=how.reverse, unroll=how.unroll)
    return final, hs, kept


class _Kept(NamedTuple):
    """What the forward loop leaves for the derivative, [T, B, ·] each."""

    coefficients: tuple  # α, β, k_i, k_f, k_g, k_o
    h_tm1: jax.Array | None  # None: the outputs, moved on by one step
    c: tuple | None  # c_{t-1} and c_t, for peepholes
    m: jax.Array | None  # o ⊙ tanh(c), for a projection
    h_within: jax.Array | None  # derivative of the projection's clip


def _tangent(
    how: _How, inputs: _Inputs, known: _Known, kept: _Kept, hs: jax.Array, dots: _Inputs
) -> tuple[Any, jax.Array]:
    """The tangents of the final state and of hs: linear in ``dots``, the tangents of ``inputs``."""
    kinds, state_kind = how.kinds, type(inputs.state)
    given = jax.tree.map(_known_zero_is_none, dots, is_leaf=_is_zero)
    driven = jnp.zeros((*inputs.xs.shape[:2], inputs.w_h.shape[1]), kinds.keep)
    if given.xs is not None:
        driven = driven + product(given.xs, inputs.w_x, kinds)
    if given.w_x is not None:
        driven = driven + product(inputs.xs, given.w_x, kinds)
    if given.b is not None:
        driven = driven + jnp.broadcast_to(given.b.astype(kinds.keep), driven.shape)
    if given.w_h is not None:
        driven = driven + product(_before(kept.h_tm1, inputs, hs, how), given.w_h, kinds)
    if given.peephole is not None:
        c_tm1, c = kept.c
        p_i, p_f, p_o = (jnp.broadcast_to(p, c.shape) for p in given.peephole.astype(kinds.keep))
        parts = (c_tm1 * p_i, c_tm1 * p_f, jnp.zeros_like(c), c * p_o)
        driven = driven + jnp.concatenate(parts, axis=-1)
    to_h = None if given.w_proj is None else product(kept.m, given.w_proj, kinds)

    def body(state, at_t):
        driven_t, kept_t, h_within_t, to_h_t, valid_t, reset_t = at_t
        alpha, beta, k_i, k_f, k_g, k_o = kept_t
        h_tm1, c_tm1 = _reset(reset_t, reset_to, state)
        z_i, z_f, z_g, z_o = jnp.split(driven_t + product(h_tm1, inputs.w_h, kinds), 4, axis=-1)
        c = alpha * c_tm1 + k_i * z_i + k_f * z_f + k_g * z_g
        h = beta * c + k_o * z_o
        if inputs.w_proj is not None:
            h = product(h, inputs.w_proj, kinds)
            h = h if to_h_t is None else h + to_h_t
            h = h if h_within_t is None else h * h_within_t
        new = state_kind(h.astype(kinds.compute), c)
        return _hold(valid_t, new, state_kind(h_tm1, c_tm1))

    dense = jax.tree.map(_dense, (dots.state, dots.reset_to), is_leaf=_is_zero)
    state, reset_to = varying_like(dense, (driven, kept, known, to_h, dense))
    at = (driven, kept.coefficients, kept.h_within, to_h, known.valid, known.resets)
    return jax.lax.scan(body, state, at, reverse=how.reverse, unroll=how.unroll)


# ---- parts of both loops ------------------------------------------------------------------------


def _reset(reset_t: jax.Array | None, reset_to: Any, state: Any) -> Any:
    if reset_t is None:
        return state
    return jax.tree.map(lambda a, b: jnp.where(reset_t[:, None], a, b), reset_to, state)


def _hold(valid_t: jax.Array | None, new: Any, old: Any) -> tuple[Any, jax.Array]:
    """The state after a step and its output: where it is not valid, the old one and zeros."""
    if valid_t is None:
        return new, new.h
    where = valid_t[:, None]
    after = jax.tree.map(lambda a, b: jnp.where(where, a, b), new, old)
    return after, jnp.where(where, new.h, jnp.zeros_like(new.h))


def _clip(value: jax.Array, bound: Any) -> tuple[jax.Array, jax.Array | None]:
    """``value`` within ±bound, and the derivative of that."""
    if bound is None:
        return value, None
    return jax.jvp(lambda v: jnp.clip(v, -bound, bound), (value,), (jnp.ones_like(value),))


def _rows_of(inputs: _Inputs, kinds: checks.Dtypes) -> tuple:
    """The three peepholes [H]; zeros, which cost nothing beside a product, where there are none."""
    if inputs.peephole is None:
        zero = jnp.zeros((), kinds.keep)
        return zero, zero, zero
    return tuple(inputs.peephole.astype(kinds.keep))


def _before(h_tm1: jax.Array | None, inputs: _Inputs, hs: jax.Array, how: _How) -> jax.Array:
    """h_{t-1} for every t, [T, B, P]."""
    if h_tm1 is not None:
        return h_tm1
    first = inputs.state.h[None]
    return jnp.concatenate([hs[1:], first] if how.reverse else [first, hs[:-1]])


def _is_zero(tangent: Any) -> bool:
    return isinstance(tangent, SymbolicZero)


def _known_zero_is_none(tangent: Any) -> Any:
    return None if _is_zero(tangent) else tangent


def _dense(tangent: Any) -> jax.Array:
    return jnp.zeros(tangent.shape, tangent.dtype) if _is_zero(tangent) else tangent
