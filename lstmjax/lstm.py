"""The LSTM. Read this first.

    z_t         = x_t W_x + h_{t-1} W_h + b               four blocks: z_i, z_f, z_g, z_o
    i_t         = σ(z_i + p_i ⊙ c_{t-1})                   input gate
    f_t         = σ(z_f + p_f ⊙ c_{t-1})                   forget gate
    g_t         = tanh(z_g)                               candidate
    c_t         = clip(f_t ⊙ c_{t-1} + i_t ⊙ g_t)           cell state
    o_t         = σ(z_o + p_o ⊙ c_t)                       output gate
    h_t         = clip((o_t ⊙ tanh(c_t)) W_proj)           output

Peepholes p, projection W_proj and both clips are optional; without them these are the equations
of Gers, Schmidhuber & Cummins (2000), the LSTM of Hochreiter & Schmidhuber (1997) with a forget
gate. Peepholes are those of Gers, Schraudolph & Schmidhuber (2002), the projection that of Sak,
Senior & Beaufays (2014), in the order of operations of TensorFlow 1's ``LSTMCell``.

Letters: T time, B batch, D input, H hidden, P projection (P = H without one).

Conventions, because no two libraries agree on them:
  - Gates stand in the order i, f, g, o on the last axis (PyTorch's and Keras's order; TensorFlow 1
    and Haiku put the candidate second).
  - There is one bias (PyTorch has two, of which only the sum matters to the output).
  - The forget bias is part of ``b`` from the start, visible in the weights (TensorFlow 1 and Haiku
    add 1 while running). It is 1 by default, as Gers et al. (2000) and Jozefowicz, Zaremba &
    Sutskever (2015) advise; Flax and PyTorch do not do this.
  - ``W_h`` starts orthogonal in each gate's block (Keras and nnx's optimised cell make the four
    blocks orthogonal together, which leaves each one with singular values of about 1/2).
  - The state is ``LSTMState(h, c)``, never a bare pair (Flax carries (c, h), PyTorch (h, c)).
  - Sequences are time-major [T, B, D].
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lstmjax import checks
from lstmjax.initializers import glorot, orthogonal, per_gate, uniform
from lstmjax.recurrence import recur_compiled


class LSTMParams(NamedTuple):
    """The weights of one layer and direction.

    Attributes:
      w_x: [D, 4H] input kernel, gates i, f, g, o.
      w_h: [P, 4H] recurrent kernel, gates i, f, g, o.
      b: [4H] bias, gates i, f, g, o; includes the forget bias.
      peephole: [3, H] for i, f, o, or None.
      w_proj: [H, P] projection, or None (then P = H).
    """

    w_x: jax.Array
    w_h: jax.Array
    b: jax.Array
    peephole: jax.Array | None = None
    w_proj: jax.Array | None = None


class LSTMState(NamedTuple):
    """What one step hands to the next.

    Attributes:
      h: [B, P] output, in the layer's compute dtype.
      c: [B, H] cell state, never in less than float32.
    """

    h: jax.Array
    c: jax.Array


def lstm_step(
    params: LSTMParams,
    state: LSTMState,
    x_t: jax.Array,
    *,
    cell_clip: float | None = None,
    proj_clip: float | None = None,
) -> LSTMState:
    """One step of the recurrence; the equations stand at the top of this file.

    Args:
      params: ``LSTMParams``.
      state: ``LSTMState(h [..., P], c [..., H])`` before the step.
      x_t: [..., D] input of this step.
      cell_clip: bound on |c|, > 0; the gradient is zero outside.
      proj_clip: bound on |h| after the projection, > 0; needs ``w_proj``.

    Returns:
      ``LSTMState(h [..., P], c [..., H])`` after the step. Products are taken and ``h`` is
      returned in the promotion of the dtypes of ``x_t`` and ``params``; gates and ``c`` are kept
      in that dtype but never in less than float32.

    Raises:
      ValueError: shapes or dtypes that do not fit, a clip that is not above 0, ``proj_clip``
        without a projection.
    """
    compute, keep = _check(params, "x_t", x_t, cell_clip, proj_clip)
    batch = x_t.shape[:-1]
    checks.states(
        state, LSTMState, [(*batch, params.w_h.shape[0]), (*batch, params.w_h.shape[1] // 4)]
    )

    def product(a, w):
        return jnp.matmul(a.astype(compute), w.astype(compute), preferred_element_type=keep)

    def rows(v):  # a vector [·] for every element of the batch
        return jnp.broadcast_to(v.astype(keep), (*batch, v.shape[-1]))

    h_tm1, c_tm1 = state.h, state.c.astype(keep)
    z = product(x_t, params.w_x) + product(h_tm1, params.w_h) + rows(params.b)
    z_i, z_f, z_g, z_o = jnp.split(z, 4, axis=-1)
    if params.peephole is not None:
        z_i = z_i + rows(params.peephole[0]) * c_tm1
        z_f = z_f + rows(params.peephole[1]) * c_tm1
    i, f, g = jax.nn.sigmoid(z_i), jax.nn.sigmoid(z_f), jnp.tanh(z_g)
    c = f * c_tm1 + i * g
    if cell_clip is not None:
        c = jnp.clip(c, -cell_clip, cell_clip)
    if params.peephole is not None:
        z_o = z_o + rows(params.peephole[2]) * c
    h = jax.nn.sigmoid(z_o) * jnp.tanh(c)
    if params.w_proj is not None:
        h = product(h, params.w_proj)
        if proj_clip is not None:
            h = jnp.clip(h, -proj_clip, proj_clip)
    return LSTMState(h.astype(compute), c)


def lstm(
    params: LSTMParams,
    xs: jax.Array,
    state: LSTMState | None = None,
    *,
    mask: Any = None,
    lengths: Any = None,
    resets: Any = None,
    reverse: bool = False,
    cell_clip: float | None = None,
    proj_clip: float | None = None,
    method: str = "scan",
    unroll: int = 1,
) -> tuple[LSTMState, jax.Array]:
    """A layer: ``lstm_step`` over time.

        for t in 0 … T-1:  state = lstm_step(params, state, xs[t]);  hs[t] = state.h

    Args:
      params: ``LSTMParams``.
      xs: [T, B, D] inputs, floating.
      state: ``LSTMState(h [B, P], c [B, H])`` before the first step, or None for zeros.
      mask: [T, B], non-zero at valid steps.
      lengths: [B] integers in 0 … T; step t of row b is valid iff t < lengths[b].
      resets: [T, B], non-zero where the state is set to zero before step t.
      reverse: run from the last step to the first; ``hs[t]`` still belongs to ``xs[t]``.
      cell_clip, proj_clip: as in ``lstm_step``.
      method: "scan" or "unrolled" (see ``recurrence.recur``); the results are the same.
      unroll: steps written out in one iteration of the scan.

    Returns:
      ``(LSTMState, hs [T, B, P])``: the state after the last valid step, and the outputs. At
      invalid steps the state is held and the output is zero; what ``xs`` holds there, NaN
      included, changes nothing. A row without valid steps returns its initial state.

    Raises:
      ValueError: names the argument, what came and what was expected.
    """
    xs = checks.as_array("xs", xs)
    checks.shape("xs", xs, ("T", "B", "D"))
    compute, keep = _check(params, "xs", xs, cell_clip, proj_clip)
    batch, (proj, hidden4) = xs.shape[1], params.w_h.shape
    shapes = (batch, proj), (batch, hidden4 // 4)
    if state is None:
        state = LSTMState(jnp.zeros(shapes[0], compute), jnp.zeros(shapes[1], keep))
    else:
        checks.states(state, LSTMState, shapes)
        state = LSTMState(jnp.asarray(state.h, compute), jnp.asarray(state.c, keep))
    return recur_compiled(
        lstm_step,
        params,
        state,
        xs,
        traced={"cell_clip": cell_clip, "proj_clip": proj_clip},
        mask=mask,
        lengths=lengths,
        resets=resets,
        reverse=reverse,
        method=method,
        unroll=unroll,
    )


INITS = ("lstmjax", "tf1", "keras", "keras1")


def init_lstm(
    key: jax.Array,
    input_size: int,
    hidden_size: int,
    *,
    proj_size: int | None = None,
    peephole: bool = False,
    forget_bias: float = 1.0,
    init: str = "lstmjax",
    dtype: Any = jnp.float32,
) -> LSTMParams:
    """Draws the weights of one layer.

    ``init`` names the law (limits: glorot is U(±√(6/(fan_in + fan_out)))):
      - "lstmjax": ``w_x`` glorot and ``w_h`` orthogonal, each per gate.
      - "tf1": TensorFlow 1's cells: one glorot law for [w_x; w_h] as a (D+P, 4H) matrix;
        peepholes glorot as vectors, U(±√(3/H)).
      - "keras": Keras 2 and 3: ``w_x`` glorot as (D, 4H), ``w_h`` orthogonal as (P, 4H).
      - "keras1": Keras 1.2 on its default ``consume_less="cpu"``: both glorot per gate.
    Biases are zero but for the forget gate's. Peepholes start at zero except under "tf1"; the
    projection is glorot.

    Args:
      key: a PRNG key.
      input_size: D >= 1.
      hidden_size: H >= 1.
      proj_size: P >= 1, or None for no projection.
      peephole: whether to have peepholes.
      forget_bias: initial bias of the forget gate.
      init: the law's name.
      dtype: floating dtype of all weights.

    Returns:
      ``LSTMParams``.

    Raises:
      ValueError: a size below 1, a ``peephole`` that is no flag, a ``forget_bias`` that is no
        number, an unknown ``init``, a ``dtype`` that is not floating.
    """
    checks.positive_int("input_size", input_size)
    checks.positive_int("hidden_size", hidden_size)
    if proj_size is not None:
        checks.positive_int("proj_size", proj_size)
    checks.flag("peephole", peephole)
    checks.number("forget_bias", forget_bias)
    checks.one_of("init", init, INITS)
    checks.weights_dtype(dtype)
    of_kernels, of_peephole, of_proj = jax.random.split(key, 3)
    w_x, w_h = _kernels(of_kernels, input_size, proj_size or hidden_size, hidden_size, init, dtype)
    b = jnp.zeros((4, hidden_size), dtype).at[1].set(forget_bias).reshape(-1)
    weights = None
    if peephole:
        limit = (3 / hidden_size) ** 0.5 if init == "tf1" else 0.0
        weights = uniform(limit)(of_peephole, (3, hidden_size), dtype)
    w_proj = glorot(of_proj, (hidden_size, proj_size), dtype) if proj_size else None
    return LSTMParams(w_x, w_h, b, weights, w_proj)


def _kernels(key, d: int, p: int, h: int, init: str, dtype) -> tuple[jax.Array, jax.Array]:
    """w_x [D, 4H] and w_h [P, 4H] under one of ``init_lstm``'s laws."""
    of_x, of_h = jax.random.split(key)
    if init == "tf1":
        both = glorot(of_x, (d + p, 4 * h), dtype)
        return both[:d], both[d:]
    law_x, law_h = {
        "lstmjax": (per_gate(glorot, 4), per_gate(orthogonal, 4)),
        "keras": (glorot, orthogonal),
        "keras1": (per_gate(glorot, 4), per_gate(glorot, 4)),
    }[init]
    return law_x(of_x, (d, 4 * h), dtype), law_h(of_h, (p, 4 * h), dtype)


def _check(
    params: LSTMParams, name: str, x: jax.Array, cell_clip: Any, proj_clip: Any
) -> tuple[jnp.dtype, jnp.dtype]:
    """Checks weights against each other and against inputs [..., D]; returns the two dtypes."""
    if not isinstance(params, LSTMParams):
        raise ValueError(f"params: got {type(params).__name__}, expected LSTMParams")
    checks.shape("params.w_h", params.w_h, ("P", "4H"))
    proj, hidden4 = params.w_h.shape
    if hidden4 % 4:
        raise ValueError(f"params.w_h: got shape {[proj, hidden4]}, expected [P, 4H]")
    checks.shape("params.w_x", params.w_x, ("D", hidden4))
    checks.shape("params.b", params.b, (hidden4,))
    if params.peephole is not None:
        checks.shape("params.peephole", params.peephole, (3, hidden4 // 4))
    if params.w_proj is not None:
        checks.shape("params.w_proj", params.w_proj, (hidden4 // 4, proj))
    elif proj != hidden4 // 4:
        raise ValueError(
            f"params.w_h: got shape {[proj, hidden4]}, expected [{hidden4 // 4}, {hidden4}] "
            "([H, 4H]) without w_proj"
        )
    elif proj_clip is not None:
        raise ValueError(f"proj_clip: got {proj_clip!r}, expected None without params.w_proj")
    checks.positive("cell_clip", cell_clip)
    checks.positive("proj_clip", proj_clip)
    return checks.layer_inputs(name, x, params)
