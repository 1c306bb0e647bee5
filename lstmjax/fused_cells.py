"""The recurrences of the simple RNN and of the GRU with a derivative written by hand.

As in fused.py: the derivative of the whole loop is written down as another loop over time that is
linear in the tangents (a dot: its tangent), and JAX turns it round. Here everything that does not
depend on ḣ_{t-1} ends in one array e [T, B, H], taken for many steps at once:

    simple RNN          ḣ_t = e_t + k_t ⊙ ḣ_{t-1} W_h
                        e_t = k_t ⊙ [ẋ_t W_x + x_t Ẇ_x + h_{t-1} Ẇ_h + ḃ]

    GRU, reset after    ḣ_t = e_t + z_t ⊙ ḣ_{t-1} + Σ_j κ^j_t ⊙ ḣ_{t-1} W_hj        j of r, z, n
                        e_t = Σ_j k^j_t ⊙ [ẋ_t W_xj + x_t Ẇ_xj + ḃ_j]
                            + Σ_j κ^j_t ⊙ [h_{t-1} Ẇ_hj] + κ^n_t ⊙ [ḃ_n]

    GRU, reset before   ṁ_t = r_t ⊙ ḣ_{t-1} + ρ_t ⊙ (s_t + ḣ_{t-1} W_hr),   ρ = h_{t-1} r (1 − r)
                        ḣ_t = e_t + z_t ⊙ ḣ_{t-1} + k^z_t ⊙ ḣ_{t-1} W_hz + k^n_t ⊙ ṁ_t W_hn
                        s_t = [ẋ_t W_xr + x_t Ẇ_xr + h_{t-1} Ẇ_hr + ḃ_r],   m = r ⊙ h_{t-1}
                        e_t = k^z_t ⊙ [… as s_t, of z] + k^n_t ⊙ [ẋ_t W_xn + x_t Ẇ_xn + m Ẇ_hn + ḃ]

    k = φ'                                                                       simple RNN
    k^z = (h_{t-1} − n) z (1 − z),   k^n = (1 − z) (1 − n²)                             GRU
    k^r = k^n a r (1 − r),   κ^r = k^r,   κ^z = k^z,   κ^n = k^n r,   a = h_{t-1} W_hn + b_n

So the backward loop holds one product with W_hᵀ (reset before: two), and the gradients of the
weights are one product each after it. What waits in memory between the loops is the output and,
for the GRU, r, z, n and a (reset before: r, z, n), [T, B, H] each.
"""

from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lstmjax import checks
from lstmjax.bptt import Truncation, over_slots
from lstmjax.dropout import Noise
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


class _Inputs(NamedTuple):
    """What the recurrence is differentiated with respect to; with slots, ``state`` is by slot."""

    xs: jax.Array
    w_x: jax.Array
    w_h: jax.Array
    b: jax.Array | None
    b_n: jax.Array | None
    state: Any
    reset_to: Any  # None without resets


class _Known(NamedTuple):
    """What it is not differentiated with respect to."""

    valid: jax.Array | None  # [T, B] bool
    resets: jax.Array | None  # [T, B] bool
    begins: jax.Array | None  # [T] bool, with a truncation
    noise: Noise | None  # masks of zoneout, [T, B, H] bool


class _How(NamedTuple):
    """What chooses the program."""

    kinds: checks.Dtypes
    reverse: bool
    unroll: int
    cell: str
    truncation: Truncation | None
    piece: int  # steps
    zoneout: bool


class _Kept(NamedTuple):
    """What the forward loop leaves for the derivative, [T, B, H] each."""

    gates: tuple  # of the simple RNN, its own h where the state does not tell it
    h: jax.Array | None  # after each step; None where it is the output


@lru_cache
def by_hand(cell: str):
    """``fused`` of this cell: the same function whenever it is the same cell."""
    return partial(fused, cell=cell)


def fused(
    params: Any,
    state: Any,
    xs: jax.Array,
    *,
    cell: str,
    mask: jax.Array | None = None,
    resets: jax.Array | None = None,
    reset_to: Any = None,
    reverse: bool = False,
    unroll: int = 1,
    truncation: Truncation | None = None,
    noise: Noise | None = None,
) -> tuple[Any, jax.Array]:
    """``rnn`` or ``gru`` by ``method="fused"``; the arguments are checked by then.

    Args:
      params: ``RNNParams`` or ``GRUParams``.
      state: ``RNNState(h [B, H])`` or ``GRUState(h [B, H])`` in the layer's dtype.
      xs: [T, B, D], or by slot, [T, S, B, D].
      cell: the simple RNN with this activation, "tanh", "relu" or "linear"; the GRU with the reset
        "after" or "before" the product.
      mask, resets: [T, B] bool, or None.
      reset_to: a state like ``state``, or None for zeros.
      reverse, unroll: as in ``lstm``.
      truncation: of the derivative, one that cuts an error, or None (bptt.py).
      noise: masks of zoneout alone, or None.

    Returns:
      ``(state, hs [T, B, H])``, as ``rnn`` and ``gru``.
    """
    piece = steps_of_a_piece(len(xs), "gates")
    kinds = checks.dtypes(xs, params)
    how = _How(kinds, reverse, min(unroll, piece) or 1, cell, truncation, piece, noise is not None)
    # Kept apart from their dtype, so that the gradients of pieces are summed in float32 at least.
    weights = (params.w_x, params.w_h, params.b, getattr(params, "b_n", None))
    weights = [None if w is None else w.astype(kinds.keep) for w in weights]

    def run(how, state, reset_to, xs, at):
        return _recurrence(how, _Inputs(xs, *weights, state, reset_to), _Known(*at))

    return in_parts(run, how, params, state, xs, mask, resets, reset_to, (noise,))


def _recurrence(how: _How, inputs: _Inputs, known: _Known) -> tuple[Any, jax.Array]:
    @jax.custom_jvp
    def run(inputs, known):
        final, hs, _ = _forward(how, first_slot(how, inputs), known, keep=False)
        return by_slot(how, final, hs)

    def run_jvp(primals, tangents):
        inputs, known = first_slot(how, primals[0]), primals[1]
        final, hs, kept = _forward(how, inputs, known, keep=True)
        return by_slot(how, final, hs), _tangent(how, inputs, known, kept, hs, tangents[0])

    run.defjvp(run_jvp, symbolic_zeros=True)
    return run(inputs, known)


def _forward(how: _How, inputs: _Inputs, known: _Known, keep: bool) -> tuple[Any, jax.Array, Any]:
    """The recurrence itself, and what its derivative needs."""
    kinds, state_kind = how.kinds, type(inputs.state)
    held = known.valid is not None or known.resets is not None
    step = {"after": _gru_after, "before": _gru_before}.get(how.cell, _rnn)

    def body(state, at_t):
        x_t, valid_t, reset_t, noise_t = at_t
        old = reset(reset_t, inputs.reset_to, state)
        h, gates = step(how, inputs, x_t, old.h)
        new = with_zoneout(noise_t, old, state_kind(h.astype(kinds.compute)))
        after, h_t = hold(valid_t, new, old)
        return after, (h_t, _Kept(gates, after.h if held else None) if keep else None)

    at = (inputs.xs, known.valid, known.resets, known.noise)
    final, (hs, kept) = jax.lax.scan(body, inputs.state, at, reverse=how.reverse, unroll=how.unroll)
    return final, hs, kept


def _tangent(
    how: _How, inputs: _Inputs, known: _Known, kept: _Kept, hs: jax.Array, dots: _Inputs
) -> tuple[Any, jax.Array]:
    """The tangents of the final state and of hs: linear in ``dots``, the tangents of ``inputs``."""
    given = jax.tree.map(zero_is_none, dots, is_leaf=is_zero)
    states = (dots.state, dots.reset_to)
    state, reset_to = jax.tree.map(dense, states, is_leaf=is_zero)
    state, reset_to = varying_like((state, reset_to), (inputs, known, given, state, reset_to))
    kept = kept if kept.h is not None else kept._replace(h=hs)
    after = type(inputs.state)(kept.h)

    def piece(state, at):
        number, x, dot_x, kept, known = at
        first, before = row_before(how, number, after)
        before = jax.tree.map(partial(jnp.where, first), inputs.state, before)
        own = inputs._replace(xs=x, state=before)
        run = _piece_of_tangent(how, own, known, kept)
        return run(given._replace(xs=dot_x), state, reset_to)

    at = cut((inputs.xs, given.xs, kept, known), how.piece)
    count = len(at[0])
    at = (jnp.arange(count), *at)
    if count == 1:
        return piece(state, jax.tree.map(lambda a: a[0], at))
    # What a piece computes of its residuals is not kept: that is what the pieces are for.
    piece = jax.checkpoint(
        piece, prevent_cse=False, policy=jax.checkpoint_policies.nothing_saveable
    )
    final, dot_hs = jax.lax.scan(piece, state, at, reverse=how.reverse)
    return final, joint(dot_hs)


def _piece_of_tangent(how: _How, inputs: _Inputs, known: _Known, kept: _Kept):
    """``run(given, state, reset_to)``: the loop of ``_tangent`` over steps that are known."""
    kinds, state_kind = how.kinds, type(inputs.state)
    h_tm1 = shifted(how, inputs.state.h, kept.h)
    if known.resets is not None:
        to = jnp.broadcast_to(inputs.reset_to.h, h_tm1.shape)
        h_tm1 = jnp.where(known.resets[:, :, None], to, h_tm1)
    derive = {"after": _gru_after_derivative, "before": _gru_before_derivative}
    derivative = derive.get(how.cell, _rnn_derivative)
    driven_by, coefficients, step = derivative(how, inputs, kept, h_tm1)

    def run(given, state, reset_to):
        driven, slots = driven_by_slot(lambda dot_x: driven_by(given._replace(xs=dot_x)), given.xs)

        def body(state, at_t):
            driven_t, known_t, valid_t, reset_t, noise_t = at_t
            old = reset(reset_t, reset_to, state)
            h = step(old.h, driven_t, known_t)
            new = with_zoneout(noise_t, old, state_kind(h.astype(kinds.compute)))
            return hold(valid_t, new, old)

        at = (driven, coefficients, known.valid, known.resets, known.noise)
        body = over_slots(how.truncation, body, (slots, *[None] * (len(at) - 1)))
        at = (known.begins, at)
        return jax.lax.scan(body, state, at, reverse=how.reverse, unroll=how.unroll)

    return run


# ---- the simple RNN -----------------------------------------------------------------------------


def _rnn(how: _How, inputs: _Inputs, x: jax.Array, h_tm1: jax.Array) -> tuple:
    kinds = how.kinds
    s = product(x, inputs.w_x, kinds) + product(h_tm1, inputs.w_h, kinds)
    s = s if inputs.b is None else s + rows(inputs.b, s)
    h = {"tanh": jnp.tanh, "relu": jax.nn.relu, "linear": lambda s: s}[how.cell](s)
    # The output tells the derivative, unless it was rounded or is an old one.
    rounded = how.cell == "tanh" and kinds.keep != kinds.compute
    return h, (h,) if rounded or (how.zoneout and how.cell != "linear") else ()


def _rnn_derivative(how: _How, inputs: _Inputs, kept: _Kept, h_tm1: jax.Array):
    kinds, h = how.kinds, kept.gates[0] if kept.gates else kept.h
    k = {"tanh": lambda: 1 - h * h, "relu": lambda: (h > 0).astype(kinds.keep)}
    k = k[how.cell]() if how.cell in k else None

    def driven_by(given):
        return _from_x(how, inputs, given) + _from_h(how, inputs.w_h.shape[1], h_tm1, given.w_h)

    def step(h_tm1, s_t, k_t):
        s_t = s_t + product(h_tm1, inputs.w_h, kinds)
        return s_t if k_t is None else k_t * s_t

    return driven_by, k, step


# ---- the GRU ------------------------------------------------------------------------------------


def _gru_after(how: _How, inputs: _Inputs, x: jax.Array, h_tm1: jax.Array) -> tuple:
    kinds = how.kinds
    x_r, x_z, x_n = _thirds(product(x, inputs.w_x, kinds), inputs.b)
    h_r, h_z, a = _thirds(product(h_tm1, inputs.w_h, kinds))
    a = a if inputs.b_n is None else a + rows(inputs.b_n, a)
    r, z = jax.nn.sigmoid(x_r + h_r), jax.nn.sigmoid(x_z + h_z)
    n = jnp.tanh(x_n + r * a)
    return (1 - z) * n + z * h_tm1.astype(kinds.keep), (r, z, n, a)


def _gru_before(how: _How, inputs: _Inputs, x: jax.Array, h_tm1: jax.Array) -> tuple:
    kinds, hidden = how.kinds, len(inputs.w_h)
    x_r, x_z, x_n = _thirds(product(x, inputs.w_x, kinds), inputs.b)
    h_r, h_z = jnp.split(product(h_tm1, inputs.w_h[:, : 2 * hidden], kinds), 2, axis=-1)
    r, z = jax.nn.sigmoid(x_r + h_r), jax.nn.sigmoid(x_z + h_z)
    h_tm1 = h_tm1.astype(kinds.keep)
    n = jnp.tanh(x_n + product(r * h_tm1, inputs.w_h[:, 2 * hidden :], kinds))
    return (1 - z) * n + z * h_tm1, (r, z, n)


def _gru_after_derivative(how: _How, inputs: _Inputs, kept: _Kept, h_tm1: jax.Array):
    kinds = how.kinds
    r, z, n, a = kept.gates
    k_n = (1 - z) * (1 - n * n)
    k_r, k_z = k_n * a * r * (1 - r), (h_tm1.astype(kinds.keep) - n) * z * (1 - z)
    of_x, of_h = (k_r, k_z, k_n), (k_r, k_z, k_n * r)

    def driven_by(given):
        from_x = _from_x(how, inputs, given)
        from_h = _from_h(how, inputs.w_h.shape[1], h_tm1, given.w_h)
        e = _weighted(of_x, from_x) + _weighted(of_h, from_h)
        if given.b_n is not None:
            e = e + of_h[2] * rows(given.b_n, e)
        return e

    def step(h_tm1, e_t, known_t):
        z_t, k_t = known_t
        from_h = _weighted(k_t, product(h_tm1, inputs.w_h, kinds))
        return e_t + z_t * h_tm1.astype(kinds.keep) + from_h

    return driven_by, (z, of_h), step


def _gru_before_derivative(how: _How, inputs: _Inputs, kept: _Kept, h_tm1: jax.Array):
    kinds, hidden = how.kinds, len(inputs.w_h)
    w_gates, w_n = inputs.w_h[:, : 2 * hidden], inputs.w_h[:, 2 * hidden :]
    r, z, n = kept.gates
    h_kept = h_tm1.astype(kinds.keep)
    k_z, k_n = (h_kept - n) * z * (1 - z), (1 - z) * (1 - n * n)
    m, rho = r * h_kept, h_kept * r * (1 - r)

    def driven_by(given):
        s_r, s_z, s_n = _thirds(_from_x(how, inputs, given))
        if given.w_h is not None:
            dot_gates, dot_n = given.w_h[:, : 2 * hidden], given.w_h[:, 2 * hidden :]
            h_r, h_z = jnp.split(flat(h_tm1, dot_gates, kinds), 2, axis=-1)
            s_r, s_z, s_n = s_r + h_r, s_z + h_z, s_n + flat(m, dot_n, kinds)
        return k_z * s_z + k_n * s_n, s_r

    def step(h_tm1, driven_t, known_t):
        (e_t, s_t), (z_t, r_t, rho_t, k_z_t, k_n_t) = driven_t, known_t
        h_r, h_z = jnp.split(product(h_tm1, w_gates, kinds), 2, axis=-1)
        h_tm1 = h_tm1.astype(kinds.keep)
        m = r_t * h_tm1 + rho_t * (s_t + h_r)
        return e_t + z_t * h_tm1 + k_z_t * h_z + k_n_t * product(m, w_n, kinds)

    return driven_by, (z, r, rho, k_z, k_n), step


# ---- parts of them ------------------------------------------------------------------------------


def _from_x(how: _How, inputs: _Inputs, given: _Inputs) -> jax.Array:
    """ẋ W_x + x Ẇ_x + ḃ, [T, B, GH], of what is given."""
    s = jnp.zeros((*inputs.xs.shape[:2], inputs.w_x.shape[1]), how.kinds.keep)
    if given.xs is not None:
        s = s + flat(given.xs, inputs.w_x, how.kinds)
    if given.w_x is not None:
        s = s + flat(inputs.xs, given.w_x, how.kinds)
    return s if given.b is None else s + rows(given.b, s)


def _from_h(how: _How, width: int, h_tm1: jax.Array, dot_w: jax.Array | None) -> jax.Array:
    """h_{t-1} Ẇ_h, [T, B, GH]."""
    if dot_w is None:
        return jnp.zeros((*h_tm1.shape[:2], width), how.kinds.keep)
    return flat(h_tm1, dot_w, how.kinds)


def _weighted(k: tuple, s: jax.Array) -> jax.Array:
    """Σ_j k_j ⊙ s_j over the blocks of s."""
    return sum(k_j * s_j for k_j, s_j in zip(k, jnp.split(s, len(k), axis=-1), strict=True))


def _thirds(s: jax.Array, b: jax.Array | None = None) -> list:
    return jnp.split(s if b is None else s + rows(b, s), 3, axis=-1)
