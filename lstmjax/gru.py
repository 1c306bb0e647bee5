"""The gated recurrent unit (Cho et al., 2014), in its two versions.

    r_t = σ(x_t W_xr + h_{t-1} W_hr + b_r)                           reset gate
    z_t = σ(x_t W_xz + h_{t-1} W_hz + b_z)                           update gate
    n_t = tanh(x_t W_xn + b_x + r_t ⊙ (h_{t-1} W_hn + b_n))           candidate, reset after
    n_t = tanh(x_t W_xn + b_x + (r_t ⊙ h_{t-1}) W_hn)                 candidate, reset before
    h_t = (1 − z_t) ⊙ n_t + z_t ⊙ h_{t-1}                            output

``reset_after`` is Keras's name for the choice. Reset after the product is the version of cuDNN,
PyTorch, Flax, tf.keras of TensorFlow 2 and Keras 3; reset before it is that of the first paper's
second version, TensorFlow 1, Keras 1 and, unless asked for the other, Keras 2. Gates stand in the
order r, z, n on the last axis (PyTorch's; Keras puts z first), and z weighs the old state (in some
papers it weighs the new one).

Letters: T time, B batch, D input, H hidden.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lstmjax import checks
from lstmjax.bptt import check_inputs
from lstmjax.dropout import Noise
from lstmjax.fused_cells import by_hand
from lstmjax.initializers import glorot, orthogonal, per_gate
from lstmjax.recurrence import product, recur_compiled


class GRUParams(NamedTuple):
    """The weights of one layer and direction.

    Attributes:
      w_x: [D, 3H] input kernel, gates r, z, n.
      w_h: [H, 3H] recurrent kernel, gates r, z, n.
      b: [3H] bias, gates r, z, n; its last block is b_x of the candidate.
      b_n: [H] bias of the candidate's recurrent product (reset after only), or None for zero.
    """

    w_x: jax.Array
    w_h: jax.Array
    b: jax.Array
    b_n: jax.Array | None = None


class GRUState(NamedTuple):
    """What one step hands to the next.

    Attributes:
      h: [B, H] output, in the layer's compute dtype.
    """

    h: jax.Array


def gru_step(
    params: GRUParams,
    state: GRUState,
    x_t: jax.Array,
    *,
    reset_after: bool = True,
    x_mask: jax.Array | None = None,
    h_mask: jax.Array | None = None,
) -> GRUState:
    """One step of the recurrence; the equations stand at the top of this file.

    Args:
      params: ``GRUParams``.
      state: ``GRUState(h [..., H])`` before the step.
      x_t: [..., D] input of this step.
      reset_after: whether the reset gate acts after the recurrent product, or before it.
      x_mask: [3, ..., D], what each gate's product multiplies x_t with (see ``dropout.Noise``).
      h_mask: [3, ..., H], the same for h_{t-1}.

    Returns:
      ``GRUState(h [..., H])`` in the promotion of the dtypes of ``x_t`` and ``params``; sums and
      gates are taken in that dtype but never in less than float32.

    Raises:
      ValueError: shapes or dtypes that do not fit, ``b_n`` with the reset before the product.
    """
    kinds = _check(params, "x_t", x_t, reset_after)
    batch, (inputs, hidden) = x_t.shape[:-1], (params.w_x.shape[0], params.w_h.shape[0])
    checks.states(state, GRUState, [(*batch, hidden)])
    for name, mask, width in (("x_mask", x_mask, inputs), ("h_mask", h_mask, hidden)):
        if mask is not None:
            checks.shape(name, mask, (3, *batch, width))

    def rows(v):  # a vector [·] for every element of the batch
        return jnp.broadcast_to(v.astype(kinds.keep), (*batch, v.shape[-1]))

    h_tm1 = state.h.astype(kinds.keep)
    x_r, x_z, x_n = jnp.split(product(x_t, params.w_x, kinds, x_mask) + rows(params.b), 3, axis=-1)
    if reset_after:
        h_r, h_z, h_n = jnp.split(product(h_tm1, params.w_h, kinds, h_mask), 3, axis=-1)
        if params.b_n is not None:
            h_n = h_n + rows(params.b_n)
        r, z = jax.nn.sigmoid(x_r + h_r), jax.nn.sigmoid(x_z + h_z)
        n = jnp.tanh(x_n + r * h_n)
    else:
        of_gates, of_n = (None, None) if h_mask is None else (h_mask[:2], h_mask[2:])
        w_gates, w_n = params.w_h[:, : 2 * hidden], params.w_h[:, 2 * hidden :]
        h_r, h_z = jnp.split(product(h_tm1, w_gates, kinds, of_gates), 2, axis=-1)
        r, z = jax.nn.sigmoid(x_r + h_r), jax.nn.sigmoid(x_z + h_z)
        n = jnp.tanh(x_n + product(r * h_tm1, w_n, kinds, of_n))
    return GRUState(((1 - z) * n + z * h_tm1).astype(kinds.compute))


def gru(
    params: GRUParams,
    xs: jax.Array,
    state: GRUState | None = None,
    *,
    reset_after: bool = True,
    mask: Any = None,
    lengths: Any = None,
    resets: Any = None,
    reset_to: GRUState | None = None,
    reverse: bool = False,
    noise: Noise | None = None,
    method: str = "fused",
    unroll: int = 1,
    truncation: tuple[int, int] | None = None,
) -> tuple[GRUState, jax.Array]:
    """A layer: ``gru_step`` over time.

    Args:
      params: ``GRUParams``.
      xs: [T, B, D] inputs, floating.
      state: ``GRUState(h [B, H])`` before the first step, or None for zeros.
      reset_after: as in ``gru_step``.
      mask, lengths, resets, reset_to, reverse, noise, unroll, truncation: as in ``lstm``.
      method: "fused" (a scan whose derivative is written by hand: fused_cells.py; with ``noise``
        other than masks of zoneout it is "scan"), "scan" or "unrolled", as in ``lstm``; the results
        are the same.

    Returns:
      ``(GRUState, hs [T, B, H])``, with the rules of ``lstm`` for invalid steps.

    Raises:
      ValueError: names the argument, what came and what was expected.
    """
    xs = checks.as_array("xs", xs)
    check_inputs(xs, truncation)
    compute, _ = _check(params, "xs", xs, reset_after)
    shape = (xs.shape[-2], params.w_h.shape[0])
    if state is None:
        state = GRUState(jnp.zeros(shape, compute))
    else:
        checks.states(state, GRUState, [shape])
        state = GRUState(jnp.asarray(state.h, compute))
    if reset_to is not None:
        checks.states(reset_to, GRUState, [shape], "reset_to")
        reset_to = GRUState(jnp.asarray(reset_to.h, compute))
    return recur_compiled(
        gru_step,
        params,
        state,
        xs,
        static=(("reset_after", reset_after),),
        by_hand={"fused": by_hand("after" if reset_after else "before")},
        mask=mask,
        lengths=lengths,
        resets=resets,
        reset_to=reset_to,
        reverse=reverse,
        noise=noise,
        method=method,
        unroll=unroll,
        truncation=truncation,
        zoneout_by_hand=True,
    )


INITS = ("lstmjax", "keras")


def init_gru(
    key: jax.Array,
    input_size: int,
    hidden_size: int,
    *,
    reset_after: bool = True,
    init: str = "lstmjax",
    dtype: Any = jnp.float32,
) -> GRUParams:
    """Draws the weights of one layer; all biases start at zero.

    Args:
      key: a PRNG key.
      input_size: D >= 1.
      hidden_size: H >= 1.
      reset_after: whether there is a ``b_n``.
      init: "lstmjax": ``w_x`` glorot and ``w_h`` orthogonal, each per gate; "keras": ``w_x``
        glorot as (D, 3H), ``w_h`` orthogonal as (H, 3H).
      dtype: floating dtype of all weights.

    Returns:
      ``GRUParams``.

    Raises:
      ValueError: a size below 1, an unknown ``init``, a ``dtype`` that is not floating.
    """
    checks.positive_int("input_size", input_size)
    checks.positive_int("hidden_size", hidden_size)
    checks.flag("reset_after", reset_after)
    checks.one_of("init", init, INITS)
    checks.weights_dtype(dtype)
    checks.prng_key("key", key)
    of_x, of_h = jax.random.split(key)
    law_x, law_h = (
        (glorot, orthogonal)
        if init == "keras"
        else (
            per_gate(glorot, 3),
            per_gate(orthogonal, 3),
        )
    )
    return GRUParams(
        law_x(of_x, (input_size, 3 * hidden_size), dtype),
        law_h(of_h, (hidden_size, 3 * hidden_size), dtype),
        jnp.zeros(3 * hidden_size, dtype),
        jnp.zeros(hidden_size, dtype) if reset_after else None,
    )


def _check(params: GRUParams, name: str, x: jax.Array, reset_after: bool) -> checks.Dtypes:
    """Checks weights against each other and against inputs [..., D]; returns the two dtypes."""
    if not isinstance(params, GRUParams):
        raise ValueError(f"params: got {type(params).__name__}, expected GRUParams")
    checks.flag("reset_after", reset_after)
    checks.shape("params.w_h", params.w_h, ("H", "3H"))
    hidden = params.w_h.shape[0]
    checks.shape("params.w_h", params.w_h, (hidden, 3 * hidden))
    checks.shape("params.w_x", params.w_x, ("D", 3 * hidden))
    checks.shape("params.b", params.b, (3 * hidden,))
    if params.b_n is not None:
        checks.shape("params.b_n", params.b_n, (hidden,))
        if not reset_after:
            raise ValueError("params.b_n: got an array, expected None with reset_after=False")
    return checks.layer_inputs(name, x, params)
