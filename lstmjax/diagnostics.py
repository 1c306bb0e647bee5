"""Instruments for gradients through time: how far they reach, and what holds or loses them.

A cell is a pure function ``step(params, state, x_t) -> state``; its state is a NamedTuple of
[B, ·] arrays with a field ``h`` and perhaps others, such as ``c``. Rows of the batch do not see
each other. ``STEPS`` has the steps of all named cells; any other one will do.

    λ_t     = ∂L/∂s_t at the last step,   λ_{t-k} = λ_{t-k+1} ∂s_{t-k+1}/∂s_{t-k}     gradient_norms
    ρ_t     = largest |eigenvalue| of ∂s_t/∂s_{t-1}                                  jacobian_radius
    ∂c_T/∂c_t = ∏ f_τ + paths through some h_τ                                             cell_path

s is the whole state. A gradient with respect to one of its fields holds the others: ∂L/∂c_τ is what
changes if step τ+1 reads another c_τ and the same h_τ.

All functions are pure and run under ``jit`` and ``vmap``. Letters: T time, B batch, D input,
H hidden, P projection (P = H without one), K lags.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lstmjax import checks, variants
from lstmjax.gates import (
    GATED,
    Saturation,
    check_states,
    gate_saturation,
    gates,
    memory_half_life,
)
from lstmjax.gru import gru_step
from lstmjax.lstm import lstm_step
from lstmjax.rnn import rnn_step

__all__ = [
    "GATED", "STEPS", "CellPath", "ClipReport", "Saturation", "cell_path", "clip_report",
    "gate_saturation", "gates", "gradient_norms", "jacobian_radius", "memory_half_life",
    "safe_norm", "spectral_radius", "states_of",
]  # fmt: skip

# By the names of ``models.CELLS``.
STEPS = {
    "lstm": lstm_step,
    "gru": gru_step,
    "rnn": rnn_step,
    "linear_rnn": partial(rnn_step, activation="linear"),
    "peephole": lstm_step,
    "cifg": variants.cifg_step,
    "nig": variants.nig_step,
    "nfg": variants.nfg_step,
    "nog": variants.nog_step,
    "niaf": variants.niaf_step,
    "noaf": variants.noaf_step,
    "fgr": variants.fgr_step,
    "layer_norm": variants.layer_norm_step,
    "refine": variants.refine_step,
    "hard_sigmoid": variants.activations_step("hard_sigmoid"),
    "keras1": variants.activations_step("hard_sigmoid_keras1"),
}


# ---- states and gradients -----------------------------------------------------------------------


def states_of(step: Callable, params: Any, state: Any, xs: jax.Array) -> Any:
    """All states of a run.

    Args:
      step: ``step(params, state, x_t) -> state``.
      params: the cell's weights.
      state: a NamedTuple of [B, ·] arrays with a field ``h``: the state before the first step.
      xs: [T, B, D] inputs.

    Returns:
      A state of [T+1, B, ·] arrays: at t the state before step t, and at T the last one.

    Raises:
      ValueError: a ``step`` that cannot be called, a ``state`` without ``h``, ``xs`` of another
        shape; what ``step`` raises.
    """
    checks.function("step", step)
    if not hasattr(state, "_fields") or "h" not in state._fields:
        raise ValueError(f"state: got {type(state).__name__}, expected a NamedTuple with a field h")
    checks.shape("xs", xs, ("T", len(state.h), "D"))
    if len(xs) == 0:
        return jax.tree.map(lambda a: a[None], state)
    # A loop's state has one dtype throughout: that of what the step returns.
    kinds = jax.eval_shape(step, params, state, xs[0])
    state = jax.tree.map(lambda a, kind: jnp.asarray(a, kind.dtype), state, kinds)

    def body(state, x_t):
        new = step(params, state, x_t)
        return new, new

    _, after = jax.lax.scan(body, state, xs)
    return jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest]), state, after)


def gradient_norms(
    step: Callable,
    params: Any,
    state: Any,
    xs: jax.Array,
    loss: Any,
    *,
    at: int | Sequence[int] | None = None,
) -> dict[str, jax.Array]:
    """How large the gradient of a step's loss is k steps before it.

        norms[k] = mean over the batch of ‖∂L_t/∂h_{t-k}‖,   k = 0 … t       and so for c

    The norm is Euclidean, over the units. One reverse scan through the state alone; no gradient of
    weights is taken. Norms are taken without squaring what is tiny or huge, so that they are right
    down to the smallest normal number of the dtype (1e-38 in float32).

    Args:
      step, params, state, xs: as in ``states_of``, T >= 1.
      loss: L_t as a function of h_t [B, P], one number for each row [B]; or its gradient with
        respect to h_t [B, P]; or a state of gradients [B, ·] with respect to all of s_t.
      at: t, in 0 … T-1; the last step when None. Of several, the mean over those t that have a
        state k steps before.

    Returns:
      Norms [K] for each field of the state, K = t + 1 (of the largest t). ``"c"`` begins with 0
      if the loss reads h_t alone.

    Raises:
      ValueError: as ``states_of``; no steps, a ``loss`` of another shape, ``at`` out of range.
    """
    checks.shape("xs", xs, ("T", "B", "D"))
    ats = _steps_at(at, len(xs))
    xs = xs[: ats.max() + 1]
    states = states_of(step, params, state, xs)
    each = [_cotangents(loss, _row(states, t + 1)) for t in ats]
    starts = jax.tree.map(lambda *rows: jnp.stack(rows), *each)  # [A, B, ·], an error each

    def body(adjoints, inputs):
        t, before, x_t = inputs
        here = (t == ats)[:, None, None]
        adjoints = jax.tree.map(lambda a, s: jnp.where(here, s, a), adjoints, starts)
        norms = jax.tree.map(lambda a: jnp.mean(safe_norm(a), axis=-1), adjoints)
        return _pull(step, params, before, x_t, adjoints), norms

    times = jnp.arange(len(xs), dtype=ats.dtype)
    inputs = times, jax.tree.map(lambda a: a[:-1], states), xs
    _, norms = jax.lax.scan(body, jax.tree.map(jnp.zeros_like, starts), inputs, reverse=True)
    times = ats[None, :] - np.arange(len(xs))[:, None]  # [K, A], t - k
    counts = np.sum(times >= 0, axis=1)

    def along_lags(of_field):  # [T, A] over steps -> [K]
        chosen = of_field[np.maximum(times, 0), np.arange(len(ats))[None, :]]
        added = jnp.sum(jnp.where(times >= 0, chosen, jnp.zeros_like(chosen)), axis=1)
        return added / counts.astype(chosen.dtype)

    return {name: along_lags(norm) for name, norm in norms._asdict().items()}


class CellPath(NamedTuple):
    """A gradient along the cell state, by the paths it takes; all arrays [K, B, H].

    Attributes:
      direct: along c alone, through no h on the way.
      rest: all other paths.
      total: ordinary backpropagation, direct + rest up to rounding.
    """

    direct: jax.Array
    rest: jax.Array
    total: jax.Array


def cell_path(step: Callable, params: Any, state: Any, xs: jax.Array, loss: Any) -> CellPath:
    """∂L/∂c_{t-k} of the last step's loss, as a sum over two kinds of paths.

    Backpropagation multiplies Jacobians; in an LSTM (Hochreiter & Schmidhuber, 1997; Gers et al.,
    2000) each has a diagonal part that does not pass through weights, and the product becomes a
    sum:

        ∂c_t/∂c_{t-k} = f_t ⊙ f_{t-1} ⊙ … ⊙ f_{t-k+1}   +   paths through h_{t-1} … h_{t-k+1}
                                 direct                                  rest

    The three results are computed side by side, none from the other two. With peepholes, ``direct``
    has their part in ∂c_τ/∂c_{τ-1} too.

    Args:
      step, params, state, xs, loss: as in ``gradient_norms``; the state has a field ``c``. With
        ``LSTMState(zeros, v)`` as ``loss``, ``total`` is v^T ∂c_t/∂c_{t-k}.

    Returns:
      ``CellPath`` of [K, B, H], K = T: at k the gradient with respect to c after step T-1-k.

    Raises:
      ValueError: as ``gradient_norms``; a state without ``c``.
    """
    states = states_of(step, params, state, xs)
    if "c" not in states._fields:
        raise ValueError(f"state: got {type(state).__name__}, expected a state with a field c")
    _steps_at(None, len(xs))
    start = _cotangents(loss, _row(states, len(xs)))

    def body(adjoints, inputs):
        direct, rest, _ = (_row(adjoints, i) for i in range(3))
        found = adjoints.c
        before, x_t = inputs
        adjoints = _pull(step, params, before, x_t, adjoints)
        direct, rest, total = (_row(adjoints, i) for i in range(3))
        none = jax.tree.map(jnp.zeros_like, direct)
        # What has come to any h leaves the direct path for good.
        rest = jax.tree.map(jnp.add, rest, direct._replace(c=none.c))
        direct = none._replace(c=direct.c)
        return _stack(direct, rest, total), found

    starts = _stack(start, jax.tree.map(jnp.zeros_like, start), start)
    inputs = jax.tree.map(lambda a: a[:-1], states), xs
    _, found = jax.lax.scan(body, starts, inputs, reverse=True)  # [T, 3, B, H]
    return CellPath(*jnp.moveaxis(jnp.flip(found, 0), 1, 0))


def _pull(step: Callable, params: Any, before: Any, x_t: jax.Array, adjoints: Any) -> Any:
    """Several adjoints [A, B, ·] of the state after a step, to before it."""
    _, pull = jax.vjp(lambda state: step(params, state, x_t), before)
    return jax.vmap(lambda adjoint: pull(adjoint)[0])(adjoints)


def _steps_at(at: Any, steps: int) -> np.ndarray:
    """[A] int32: the steps whose errors are followed."""
    if steps == 0:
        raise ValueError("xs: got no steps, expected T >= 1")
    given = (steps - 1,) if at is None else at if isinstance(at, Sequence | np.ndarray) else (at,)
    whole = all(isinstance(t, int | np.integer) and not isinstance(t, bool) for t in given)
    if len(given) == 0 or not whole or not all(0 <= t < steps for t in given):
        raise ValueError(f"at: got {at!r}, expected whole numbers t with 0 <= t < {steps} (T)")
    return np.asarray(given, np.int32)


def _cotangents(loss: Any, state: Any) -> Any:
    """What ``loss`` says of the gradient with respect to a state of [B, ·] arrays."""
    if isinstance(loss, type(state)):
        checks.states(loss, type(state), [part.shape for part in state], "loss")
        return jax.tree.map(lambda a, b: jnp.asarray(a, b.dtype), loss, state)
    if callable(loss):
        kind = jax.eval_shape(loss, state.h)
        if jnp.shape(kind) != state.h.shape[:1]:
            got = list(jnp.shape(kind))
            raise ValueError(f"loss: got values of shape {got}, expected [{len(state.h)}] ([B])")
        of_h = jax.grad(lambda h: jnp.sum(loss(h)))(state.h)
    else:
        checks.shape("loss", loss, state.h.shape)
        of_h = jnp.asarray(loss, state.h.dtype)
    return jax.tree.map(jnp.zeros_like, state)._replace(h=of_h)


def _row(tree: Any, i: int) -> Any:
    return jax.tree.map(lambda a: a[i], tree)


def _stack(*trees: Any) -> Any:
    return jax.tree.map(lambda *parts: jnp.stack(parts), *trees)


def safe_norm(a: jax.Array) -> jax.Array:
    """Euclidean norms over the last axis; no square underflows or overflows."""
    a = a.astype(checks.wide(a.dtype))
    largest = jnp.max(jnp.abs(a), axis=-1, initial=0.0)
    usable = (largest > 0) & jnp.isfinite(largest)
    scale = jnp.where(usable, largest, jnp.ones_like(largest))
    return scale * jnp.sqrt(jnp.sum((a / scale[..., None]) ** 2, axis=-1))


# ---- the Jacobian -------------------------------------------------------------------------------


def jacobian_radius(step: Callable, params: Any, states: Any, xs: jax.Array) -> jax.Array:
    """The spectral radius of each step's Jacobian ∂s_t/∂s_{t-1}, all fields of the state together.

    By Gelfand's formula (1941), on any device and under ``jit``:

        ρ(J) = lim ‖J^m‖^(1/m),   J^2m = J^m J^m, rescaled to norm 1 after each squaring

    with m = 1/ε of the dtype (23 squarings in float32, 52 in float64). If J has N rows and
    eigenvectors of the condition number κ, the relative error is at most about ε ln(κ√N), and
    rounding, as in any method, adds about κε; so 1e-12 in float64 for all but pathological J. A
    Jacobian whose powers are exactly 0 has the radius 0.

    Args:
      step, params: as in ``states_of``.
      states: [T+1, B, ·] from ``states_of``.
      xs: [T, B, D] inputs.

    Returns:
      [T, B], in no less than float32.

    Raises:
      ValueError: ``states`` that do not fit ``xs``.
    """
    checks.shape("xs", xs, ("T", "B", "D"))
    check_states(states, xs)
    inputs = jax.tree.map(lambda a: a[:-1], states), xs
    # One step at a time: T·B Jacobians at once would be too many.
    return jax.lax.map(lambda pair: spectral_radius(_jacobians(step, params, *pair)), inputs)


def _jacobians(step: Callable, params: Any, state: Any, x_t: jax.Array) -> jax.Array:
    """[B, N, N]: each row's Jacobian, fields side by side, transposed."""
    widths = [part.shape[-1] for part in state]
    cuts, total = np.cumsum(widths)[:-1], sum(widths)
    new, pull = jax.vjp(lambda state: step(params, state, x_t), state)

    def row(of_output):  # [N], one for all rows of the batch, which do not see each other
        parts = zip(jnp.split(of_output, cuts), new, strict=True)
        like = [jnp.broadcast_to(part.astype(n.dtype), n.shape) for part, n in parts]
        (back,) = pull(type(new)(*like))
        return jnp.concatenate([part.astype(keep) for part in back], axis=-1)

    keep = max((checks.wide(part.dtype) for part in state), key=lambda dtype: dtype.itemsize)
    return jax.vmap(row, out_axes=1)(jnp.eye(total, dtype=keep))


def spectral_radius(matrices: jax.Array) -> jax.Array:
    """The largest |eigenvalue| of matrices [..., N, N], as ``jacobian_radius`` says -> [...]."""
    squarings = -round(math.log2(jnp.finfo(matrices.dtype).eps))

    def rescaled(power):
        norm = safe_norm(power.reshape(*power.shape[:-2], -1))
        divisor = jnp.where(norm > 0, norm, jnp.ones_like(norm))
        return power / divisor[..., None, None], jnp.log(norm)

    def square(carry, share):
        power, log_radius = carry
        power = jnp.matmul(power, power, precision=jax.lax.Precision.HIGHEST)
        power, log_norm = rescaled(power)
        return (power, log_radius + log_norm * share), None

    shares = jnp.asarray(0.5 ** np.arange(1, squarings + 1), matrices.dtype)
    (_, log_radius), _ = jax.lax.scan(square, rescaled(matrices), shares)
    return jnp.exp(log_radius)


# ---- clipping -----------------------------------------------------------------------------------


class ClipReport(NamedTuple):
    """What clipping by global norm does to a gradient.

    Attributes:
      before: its norm.
      after: its norm after clipping.
      clipped: whether it is changed; the mean over updates is the clip rate.
    """

    before: jax.Array
    after: jax.Array
    clipped: jax.Array


def clip_report(grads: Any, max_norm: float) -> ClipReport:
    """The global norm of a gradient before and after clipping (Pascanu, Mikolov & Bengio, 2013).

        after = min(before, max_norm)

    Args:
      grads: a pytree of arrays: one gradient, all of its arrays together.
      max_norm: > 0, as of ``optim.clipped``; None for no clipping.

    Returns:
      ``ClipReport`` of three scalars. A gradient that is not finite counts as clipped.

    Raises:
      ValueError: ``max_norm`` is not above 0, no arrays.
    """
    checks.positive("max_norm", max_norm)
    leaves = jax.tree.leaves(grads)
    if not leaves:
        raise ValueError("grads: got no arrays, expected at least one")
    before = safe_norm(jnp.stack([safe_norm(leaf.reshape(-1)) for leaf in leaves]))
    if max_norm is None:
        return ClipReport(before, before, jnp.zeros((), bool))
    return ClipReport(before, jnp.minimum(before, max_norm), ~(before <= max_norm))
