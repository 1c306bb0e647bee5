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

from lstmjax.cudnn import cudnn
from lstmjax.dropout import Noise, has_other_masks
from lstmjax.fused import by_hand
from lstmjax.gated import clipped, draw_cell, emit, peep, preactivations, run_cell
from lstmjax.initializers import GateBias
from lstmjax.onednn import onednn


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
    kinds = {"kind": LSTMParams, "state_kind": LSTMState}
    z, c_tm1 = preactivations(params, state, x_t, x_mask, h_mask, **kinds, **clips)
    z_i, z_f, z_g, z_o = z
    i = jax.nn.sigmoid(peep(params, 0, z_i, c_tm1))
    f = jax.nn.sigmoid(peep(params, 1, z_f, c_tm1))
    g = jnp.tanh(z_g)
    c = clipped(f * c_tm1 + i * g, cell_clip)
    o = jax.nn.sigmoid(peep(params, 2, z_o, c))
    return LSTMState(emit(params, x_t, o * jnp.tanh(c), proj_clip), c)


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
    method: str = "fused",
    unroll: int = 1,
    residuals: str = "gates",
    truncation: tuple[int, int] | None = None,
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
      method: "fused" (a scan whose derivative is written by hand: fused.py; with ``noise`` other
        than masks of zoneout it is "scan"), "scan" (differentiated by JAX), "unrolled" (a Python
        loop), or where they are installed "onednn" (onednn.py) or "cudnn" (cudnn.py), which know
        fewer options; the results are the same.
      unroll: steps written out in one iteration of the scan.
      residuals: what "fused" keeps in memory for its derivative: "gates" (5 arrays [T, B, H]),
        "recompute" (2, the outputs being one; the gates are computed again) or "sqrt" (the states
        at every √T-th step and the outputs; the steps between are run again).
      truncation: (k1, k2), whole numbers >= 1, k2 a multiple of k1: the derivative, not the values,
        becomes that of truncated backpropagation through time (bptt.py): the error of step t
        reaches no step before max(0, (⌊t/k1⌋ + 1) k1 − k2), in the order of running. (n, n) cuts
        the sequence every n steps, (1, n) takes every error n steps back. Invalid steps count, and
        an error of the returned state is one of step T − 1: it reaches no row that ended so long
        before. None truncates nothing.

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
    how["truncation"] = truncation
    kinds = {"kind": LSTMParams, "state_kind": LSTMState}
    hands = {"fused": by_hand(residuals), "onednn": onednn, "cudnn": cudnn}
    masked = has_other_masks(noise)  # not the probabilities of evaluation, without a gradient
    if residuals != "gates" and (method != "fused" or masked):
        given = "noise other than zoneout" if masked else f"method {method!r}"
        raise ValueError(f"residuals: got {residuals!r} with {given}, expected 'gates'")
    how |= {"by_hand": hands, "zoneout_by_hand": True}
    return run_cell(lstm_step, params, xs, state, clips, **kinds, **over_time, **how)


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
        Jozefowicz, Zaremba & Sutskever, 2015); a law of ``initializers``, ``chrono(max_lag)``,
        ``log_uniform(max_lag)`` or ``uniform_gate``; or None for the framework's own, which is 1
        unless said otherwise above.
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
    drawn = draw_cell(key, input_size, hidden_size, blocks, **options, init=init, dtype=dtype)
    return LSTMParams(*drawn)
