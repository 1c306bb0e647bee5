"""The simple recurrent network (Elman, 1990).

    h_t = φ(x_t W_x + h_{t-1} W_h + b)

φ is tanh, relu or the identity. With the identity and without a bias it is the linear cell that
Keras's guide to custom recurrent cells calls ``MinimalRNNCell``; its gradients grow or fade
exactly as the powers of W_h do, which is what the LSTM was invented against.

Letters: T time, B batch, D input, H hidden.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lstmjax import checks
from lstmjax.bptt import check_inputs
from lstmjax.dropout import Noise
from lstmjax.fused_cells import by_hand
from lstmjax.initializers import glorot, orthogonal, uniform
from lstmjax.recurrence import product, recur_compiled

ACTIVATIONS = {"tanh": jnp.tanh, "relu": jax.nn.relu, "linear": lambda z: z}


class RNNParams(NamedTuple):
    """The weights of one layer and direction.

    Attributes:
      w_x: [D, H] input kernel.
      w_h: [H, H] recurrent kernel.
      b: [H] bias, or None.
    """

    w_x: jax.Array
    w_h: jax.Array
    b: jax.Array | None = None


class RNNState(NamedTuple):
    """What one step hands to the next.

    Attributes:
      h: [B, H] output, in the layer's compute dtype.
    """

    h: jax.Array


def rnn_step(
    params: RNNParams,
    state: RNNState,
    x_t: jax.Array,
    *,
    activation: str = "tanh",
    x_mask: jax.Array | None = None,
    h_mask: jax.Array | None = None,
) -> RNNState:
    """One step, h_t = φ(x_t W_x + h_{t-1} W_h + b).

    Args:
      params: ``RNNParams``.
      state: ``RNNState(h [..., H])`` before the step.
      x_t: [..., D] input of this step.
      activation: φ: "tanh", "relu" or "linear".
      x_mask: [1, ..., D], what x_t is multiplied with (see ``dropout.Noise``).
      h_mask: [1, ..., H], the same for h_{t-1}.

    Returns:
      ``RNNState(h [..., H])`` in the promotion of the dtypes of ``x_t`` and ``params``; sums are
      taken in that dtype but never in less than float32.

    Raises:
      ValueError: shapes or dtypes that do not fit, an unknown activation.
    """
    kinds = _check(params, "x_t", x_t, activation)
    batch, (inputs, hidden) = x_t.shape[:-1], params.w_x.shape
    checks.states(state, RNNState, [(*batch, hidden)])
    for name, mask, width in (("x_mask", x_mask, inputs), ("h_mask", h_mask, hidden)):
        if mask is not None:
            checks.shape(name, mask, (1, *batch, width))
    z = product(x_t, params.w_x, kinds, x_mask) + product(state.h, params.w_h, kinds, h_mask)
    if params.b is not None:
        z = z + jnp.broadcast_to(params.b.astype(kinds.keep), z.shape)
    return RNNState(ACTIVATIONS[activation](z).astype(kinds.compute))


def rnn(
    params: RNNParams,
    xs: jax.Array,
    state: RNNState | None = None,
    *,
    activation: str = "tanh",
    mask: Any = None,
    lengths: Any = None,
    resets: Any = None,
    reset_to: RNNState | None = None,
    reverse: bool = False,
    noise: Noise | None = None,
    method: str = "fused",
    unroll: int = 1,
    truncation: tuple[int, int] | None = None,
) -> tuple[RNNState, jax.Array]:
    """A layer: ``rnn_step`` over time.

    Args:
      params: ``RNNParams``.
      xs: [T, B, D] inputs, floating.
      state: ``RNNState(h [B, H])`` before the first step, or None for zeros.
      activation: "tanh", "relu" or "linear".
      mask, lengths, resets, reset_to, reverse, noise, unroll, truncation: as in ``lstm``.
      method: "fused" (a scan whose derivative is written by hand: fused_cells.py; with ``noise``
        other than masks of zoneout it is "scan"), "scan" or "unrolled", as in ``lstm``; the results
        are the same.

    Returns:
      ``(RNNState, hs [T, B, H])``, with the rules of ``lstm`` for invalid steps.

    Raises:
      ValueError: names the argument, what came and what was expected.
    """
    xs = checks.as_array("xs", xs)
    check_inputs(xs, truncation)
    compute, _ = _check(params, "xs", xs, activation)
    shape = (xs.shape[-2], params.w_h.shape[0])
    if state is None:
        state = RNNState(jnp.zeros(shape, compute))
    else:
        checks.states(state, RNNState, [shape])
        state = RNNState(jnp.asarray(state.h, compute))
    if reset_to is not None:
        checks.states(reset_to, RNNState, [shape], "reset_to")
        reset_to = RNNState(jnp.asarray(reset_to.h, compute))
    return recur_compiled(
        rnn_step,
        params,
        state,
        xs,
        static=(("activation", activation),),
        by_hand={"fused": by_hand(activation)},
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


INITS = ("lstmjax", "keras", "uniform")


def init_rnn(
    key: jax.Array,
    input_size: int,
    hidden_size: int,
    *,
    bias: bool = True,
    init: str = "lstmjax",
    dtype: Any = jnp.float32,
) -> RNNParams:
    """Draws the weights of one layer.

    Args:
      key: a PRNG key.
      input_size: D >= 1.
      hidden_size: H >= 1.
      bias: whether to have a bias (zero at the start).
      init: "lstmjax" and "keras" (one law): ``w_x`` glorot, ``w_h`` orthogonal; "uniform": both
        kernels U(±0.05), Keras's ``"uniform"``.
      dtype: floating dtype of all weights.

    Returns:
      ``RNNParams``.

    Raises:
      ValueError: a size below 1, an unknown ``init``, a ``dtype`` that is not floating.
    """
    checks.positive_int("input_size", input_size)
    checks.positive_int("hidden_size", hidden_size)
    checks.flag("bias", bias)
    checks.one_of("init", init, INITS)
    checks.weights_dtype(dtype)
    checks.prng_key("key", key)
    of_x, of_h = jax.random.split(key)
    law_x, law_h = (uniform(0.05),) * 2 if init == "uniform" else (glorot, orthogonal)
    return RNNParams(
        law_x(of_x, (input_size, hidden_size), dtype),
        law_h(of_h, (hidden_size, hidden_size), dtype),
        jnp.zeros(hidden_size, dtype) if bias else None,
    )


def _check(params: RNNParams, name: str, x: jax.Array, activation: str) -> checks.Dtypes:
    """Checks weights against each other and against inputs [..., D]; returns the two dtypes."""
    if not isinstance(params, RNNParams):
        raise ValueError(f"params: got {type(params).__name__}, expected RNNParams")
    checks.one_of("activation", activation, tuple(ACTIVATIONS))
    checks.shape("params.w_h", params.w_h, ("H", "H"))
    hidden = params.w_h.shape[1]
    checks.shape("params.w_h", params.w_h, (hidden, hidden))
    checks.shape("params.w_x", params.w_x, ("D", hidden))
    if params.b is not None:
        checks.shape("params.b", params.b, (hidden,))
    return checks.layer_inputs(name, x, params)
