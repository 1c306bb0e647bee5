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

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lstmjax import checks
from lstmjax.dropout import Noise
from lstmjax.initializers import INITS, GateBias, gated_biases, gated_kernels, glorot, uniform
from lstmjax.recurrence import product, recur_compiled


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
    x_mask: jax.Array | None = None,
    h_mask: jax.Array | None = None,
) -> LSTMState:
    """One step of the recurrence; the equations stand at the top of this file.

    Args:
      params: ``LSTMParams``.
      state: ``LSTMState(h [..., P], c [..., H])`` before the step.
      x_t: [..., D] input of this step.
      cell_clip: bound on |c|, > 0; the gradient is zero outside.
      proj_clip: bound on |h| after the projection, > 0; needs ``w_proj``.
      x_mask: [4, ..., D], what each gate's product multiplies x_t with (see ``dropout.Noise``).
      h_mask: [4, ..., P], the same for h_{t-1}.

    Returns:
      ``LSTMState(h [..., P], c [..., H])`` after the step. Products are taken and ``h`` is
      returned in the promotion of the dtypes of ``x_t`` and ``params``; gates and ``c`` are kept
      in that dtype but never in less than float32.

    Raises:
      ValueError: shapes or dtypes that do not fit, a clip that is not above 0, ``proj_clip``
        without a projection.
    """
    clips = {"cell_clip": cell_clip, "proj_clip": proj_clip}
    (z_i, z_f, z_g, z_o), c_tm1 = preactivations(params, state, x_t, x_mask, h_mask, **clips)
    i = jax.nn.sigmoid(peep(params, 0, z_i, c_tm1))
    f = jax.nn.sigmoid(peep(params, 1, z_f, c_tm1))
    g = jnp.tanh(z_g)
    c = clipped(f * c_tm1 + i * g, cell_clip)
    o = jax.nn.sigmoid(peep(params, 2, z_o, c))
    return emit(params, x_t, o * jnp.tanh(c), c, proj_clip)


# The parts of a step that the variants of the LSTM share with it (variants.py).


def preactivations(
    params: LSTMParams,
    state: LSTMState,
    x_t: jax.Array,
    x_mask: jax.Array | None = None,
    h_mask: jax.Array | None = None,
    *,
    gates: int = 4,
    peepholes: int = 3,
    kind: type = LSTMParams,
    state_kind: type = LSTMState,
    cell_clip: float | None = None,
    proj_clip: float | None = None,
) -> tuple[list[jax.Array], jax.Array]:
    """Checks the arguments of a step; x_t W_x + h_{t-1} W_h + b and c_{t-1}, in float32 or more.

    Args:
      params, state, x_t, x_mask, h_mask, cell_clip, proj_clip: as in ``lstm_step``.
      gates: G, blocks in the kernels; every state array after ``h`` is [..., H].
      peepholes: rows of ``params.peephole``.
      kind, state_kind: the NamedTuples that ``params`` and ``state`` must be.

    Returns:
      ``(z, c_tm1)``: G blocks [..., H], and the cell state [..., H].

    Raises:
      ValueError: as ``lstm_step``.
    """
    kinds = check_cell(
        params, "x_t", x_t, cell_clip, proj_clip, gates=gates, peepholes=peepholes, kind=kind
    )
    batch, hidden = x_t.shape[:-1], params.b.shape[0] // gates
    shapes = [(*batch, params.w_h.shape[0])] + [(*batch, hidden)] * (len(state_kind._fields) - 1)
    checks.states(state, state_kind, shapes)
    for name, mask, width in (("x_mask", x_mask, x_t.shape[-1]), ("h_mask", h_mask, shapes[0][-1])):
        if mask is not None:
            checks.shape(name, mask, (gates, *batch, width))
    z = product(x_t, params.w_x, kinds, x_mask) + product(state.h, params.w_h, kinds, h_mask)
    z = z + jnp.broadcast_to(params.b.astype(kinds.keep), z.shape)
    return jnp.split(z, gates, axis=-1), state.c.astype(kinds.keep)


def peep(params: LSTMParams, row: int, z: jax.Array, c: jax.Array) -> jax.Array:
    """z + p ⊙ c with row ``row`` of the peepholes; z [..., H] itself where there are none."""
    if params.peephole is None:
        return z
    return z + jnp.broadcast_to(params.peephole[row].astype(c.dtype), c.shape) * c


def clipped(value: jax.Array, bound: float | None) -> jax.Array:
    """``value`` held within ±bound, with gradient 0 outside; None holds nothing."""
    return value if bound is None else jnp.clip(value, -bound, bound)


def emit(
    params: LSTMParams, x_t: jax.Array, m: jax.Array, c: jax.Array, proj_clip: float | None
) -> LSTMState:
    """The state after a step from o ⊙ tanh(c) [..., H] and c [..., H]: projects, clips, casts h."""
    kinds = checks.dtypes(x_t, params)
    if params.w_proj is not None:
        m = clipped(product(m, params.w_proj, kinds), proj_clip)
    return LSTMState(m.astype(kinds.compute), c)


def lstm(
    params: LSTMParams,
    xs: jax.Array,
    state: LSTMState | None = None,
    *,
    mask: Any = None,
    lengths: Any = None,
    resets: Any = None,
    reset_to: LSTMState | None = None,
    reverse: bool = False,
    cell_clip: float | None = None,
    proj_clip: float | None = None,
    noise: Noise | None = None,
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
      resets: [T, B], non-zero where the state is set to ``reset_to`` before step t.
      reset_to: ``LSTMState(h [B, P], c [B, H])``, or None for zeros.
      reverse: run from the last step to the first; ``hs[t]`` still belongs to ``xs[t]``.
      cell_clip, proj_clip: as in ``lstm_step``.
      noise: masks of recurrent dropout and zoneout (``dropout.recurrent_noise``), or None.
      method: "scan" or "unrolled" (see ``recurrence.recur``); the results are the same.
      unroll: steps written out in one iteration of the scan.

    Returns:
      ``(LSTMState, hs [T, B, P])``: the state after the last valid step, and the outputs. At
      invalid steps the state is held and the output is zero; what ``xs`` holds there, NaN
      included, changes nothing. A row without valid steps returns its initial state.

    Raises:
      ValueError: names the argument, what came and what was expected.
    """
    clips = {"cell_clip": cell_clip, "proj_clip": proj_clip}
    over_time = {"mask": mask, "lengths": lengths, "resets": resets, "reset_to": reset_to}
    how = {"reverse": reverse, "noise": noise, "method": method, "unroll": unroll}
    return run_cell(lstm_step, params, xs, state, clips, **over_time, **how)


def run_cell(
    step: Callable,
    params: LSTMParams,
    xs: jax.Array,
    state: LSTMState | None,
    clips: dict[str, Any],
    *,
    gates: int = 4,
    peepholes: int = 3,
    kind: type = LSTMParams,
    state_kind: type = LSTMState,
    reset_to: LSTMState | None = None,
    static: tuple[tuple[str, Any], ...] = (),
    **over_time,
) -> tuple[LSTMState, jax.Array]:
    """``lstm`` with any step of its kind.

    Args:
      step: a function with ``lstm_step``'s signature.
      params, xs, state, reset_to: as in ``lstm``.
      clips: ``cell_clip`` and ``proj_clip``.
      gates, peepholes, kind, state_kind: as in ``preactivations``.
      static: further options of ``step``, which choose the program.
      **over_time: every other option of ``lstm``.

    Returns:
      As ``lstm``.

    Raises:
      ValueError: as ``lstm``.
    """
    xs = checks.as_array("xs", xs)
    checks.shape("xs", xs, ("T", "B", "D"))
    kinds = check_cell(
        params, "xs", xs, *clips.values(), gates=gates, peepholes=peepholes, kind=kind
    )
    batch, hidden = xs.shape[1], params.b.shape[0] // gates
    inner = len(state_kind._fields) - 1
    shapes = [(batch, params.w_h.shape[0])] + [(batch, hidden)] * inner
    dtypes = [kinds.compute] + [kinds.keep] * inner

    def whole(name, given):  # the given state in the layer's dtypes
        checks.states(given, state_kind, shapes, name)
        return state_kind(*map(jnp.asarray, given, dtypes))

    zeros = state_kind(*map(jnp.zeros, shapes, dtypes))
    return recur_compiled(
        step,
        params,
        zeros if state is None else whole("state", state),
        xs,
        traced=clips,
        static=static,
        reset_to=None if reset_to is None else whole("reset_to", reset_to),
        **over_time,
    )


def init_lstm(
    key: jax.Array,
    input_size: int,
    hidden_size: int,
    *,
    proj_size: int | None = None,
    peephole: bool = False,
    forget_bias: float | GateBias | None = None,
    init: str = "lstmjax",
    dtype: Any = jnp.float32,
) -> LSTMParams:
    """Draws the weights of one layer.

    ``init`` names the law (limits: glorot is U(±√(6/(fan_in + fan_out)))):
      - "lstmjax": ``w_x`` glorot and ``w_h`` orthogonal, each per gate. "haste" is the same law.
      - "tf1": TensorFlow 1's cells: one glorot law for [w_x; w_h] as a (D+P, 4H) matrix;
        peepholes glorot as vectors, U(±√(3/H)).
      - "keras": Keras 2 and 3: ``w_x`` glorot as (D, 4H), ``w_h`` orthogonal as (P, 4H).
      - "keras1": Keras 1.2 on its default ``consume_less="cpu"``: both glorot per gate.
      - "torch": everything U(±1/√H), the bias a sum of two such draws; no forget bias.
      - "equinox": everything U(±1/√H), the bias one such draw; no forget bias.
      - "flax": Flax linen and nnx ``LSTMCell``: ``w_x`` lecun normal, ``w_h`` orthogonal per gate;
        no forget bias.
      - "nnx_fused": nnx ``OptimizedLSTMCell``: ``w_x`` lecun normal, ``w_h`` orthogonal as
        (P, 4H); no forget bias.
      - "haiku": both kernels normal with σ = 1/√(D + P), truncated at ±2σ.
    Biases are zero where nothing else is said. Peepholes start at zero except under "tf1"; the
    projection is glorot except under "torch".

    Args:
      key: a PRNG key.
      input_size: D >= 1.
      hidden_size: H >= 1.
      proj_size: P >= 1, or None for no projection.
      peephole: whether to have peepholes.
      forget_bias: the forget gate's initial bias: a number (1 is the unit forget bias of
        Jozefowicz, Zaremba & Sutskever, 2015); a law of ``initializers``, ``chrono(max_lag)`` or
        ``uniform_gate``; or None for the framework's own, which is 1 unless said otherwise above.
      init: the law's name.
      dtype: floating dtype of all weights.

    Returns:
      ``LSTMParams``.

    Raises:
      ValueError: a size below 1, a ``peephole`` that is no flag, a ``forget_bias`` that is no
        number and no law, an unknown ``init``, a ``dtype`` that is not floating.
    """
    options = {"proj_size": proj_size, "peephole": peephole, "forget_bias": forget_bias}
    blocks = ("i", "f", "g", "o")
    return draw_cell(key, input_size, hidden_size, blocks, **options, init=init, dtype=dtype)


def draw_cell(
    key: jax.Array,
    input_size: int,
    hidden_size: int,
    blocks: tuple[str, ...],
    *,
    proj_size: int | None,
    peephole: bool,
    forget_bias: float | GateBias | None,
    init: str,
    dtype: Any,
    peepholes: int = 3,
) -> LSTMParams:
    """``init_lstm`` for any number of gates.

    Args:
      blocks: what the bias of each of the G blocks is drawn as: "i" and "f" as the input and the
        forget gate's, "-f" as minus the forget gate's, anything else as zero.
      peepholes: rows of the peepholes.
      key, input_size, …: as in ``init_lstm``.

    Returns:
      ``LSTMParams`` with kernels [D, GH] and [P, GH].

    Raises:
      ValueError: as ``init_lstm``.
    """
    checks.positive_int("input_size", input_size)
    checks.positive_int("hidden_size", hidden_size)
    if proj_size is not None:
        checks.positive_int("proj_size", proj_size)
    checks.flag("peephole", peephole)
    checks.one_of("init", init, INITS)
    checks.weights_dtype(dtype)
    of_kernels, of_peephole, of_proj = jax.random.split(key, 3)
    of_bias = jax.random.fold_in(key, 3)
    sizes = input_size, proj_size or hidden_size, hidden_size
    w_x, w_h = gated_kernels(init, of_kernels, *sizes, len(blocks), dtype)
    b = gated_biases(init, of_bias, hidden_size, blocks, forget_bias, dtype)
    weights = None
    if peephole:
        limit = (3 / hidden_size) ** 0.5 if init == "tf1" else 0.0
        weights = uniform(limit)(of_peephole, (peepholes, hidden_size), dtype)
    law = uniform(hidden_size**-0.5) if init == "torch" else glorot
    w_proj = law(of_proj, (hidden_size, proj_size), dtype) if proj_size else None
    return LSTMParams(w_x, w_h, b, weights, w_proj)


def check_cell(
    params: LSTMParams,
    name: str,
    x: jax.Array,
    cell_clip: Any,
    proj_clip: Any,
    *,
    gates: int = 4,
    peepholes: int = 3,
    kind: type = LSTMParams,
) -> checks.Dtypes:
    """Checks weights against each other and against inputs [..., D]; returns the two dtypes."""
    if not isinstance(params, kind):
        raise ValueError(f"params: got {type(params).__name__}, expected {kind.__name__}")
    checks.shape("params.w_h", params.w_h, ("P", f"{gates}H"))
    proj, width = params.w_h.shape
    if width % gates:
        raise ValueError(f"params.w_h: got shape {[proj, width]}, expected [P, {gates}H]")
    hidden = width // gates
    checks.shape("params.w_x", params.w_x, ("D", width))
    checks.shape("params.b", params.b, (width,))
    if params.peephole is not None:
        checks.shape("params.peephole", params.peephole, (peepholes, hidden))
    if params.w_proj is not None:
        checks.shape("params.w_proj", params.w_proj, (hidden, proj))
    elif proj != hidden:
        raise ValueError(
            f"params.w_h: got shape {[proj, width]}, expected [{hidden}, {width}] "
            f"([H, {gates}H]) without w_proj"
        )
    elif proj_clip is not None:
        raise ValueError(f"proj_clip: got {proj_clip!r}, expected None without params.w_proj")
    checks.positive("cell_clip", cell_clip)
    checks.positive("proj_clip", proj_clip)
    return checks.layer_inputs(name, x, params)
