"""What the LSTM and its variants share: the parts of a step, a layer, a draw of the weights.

``lstm.py`` has the equations. Here G is the number of gates (blocks in the kernels), and weights
are any NamedTuple with the fields w_x [D, GH], w_h [P, GH], b [GH], peephole and w_proj.
Letters: T time, B batch, D input, H hidden, P projection (P = H without one).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lstmjax import checks
from lstmjax.bptt import check_inputs
from lstmjax.initializers import INITS, GateBias, gated_biases, gated_kernels, glorot, uniform
from lstmjax.recurrence import product, recur_compiled


def preactivations(
    params: Any,
    state: Any,
    x_t: jax.Array,
    x_mask: jax.Array | None,
    h_mask: jax.Array | None,
    *,
    kind: type,
    state_kind: type,
    gates: int = 4,
    peepholes: int = 3,
    cell_clip: float | None = None,
    proj_clip: float | None = None,
) -> tuple[list[jax.Array], jax.Array]:
    """Checks the arguments of a step; x_t W_x + h_{t-1} W_h + b and c_{t-1}, in float32 or more.

    Args:
      params, state, x_t, x_mask, h_mask, cell_clip, proj_clip: as in ``lstm_step``.
      kind, state_kind: the NamedTuples that ``params`` and ``state`` must be.
      gates: G; every state array after ``h`` is [..., H].
      peepholes: rows of ``params.peephole``.

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


def peep(params: Any, row: int, z: jax.Array, c: jax.Array) -> jax.Array:
    """z + p ⊙ c with row ``row`` of the peepholes; z [..., H] itself where there are none."""
    if params.peephole is None:
        return z
    return z + jnp.broadcast_to(params.peephole[row].astype(c.dtype), c.shape) * c


def clipped(value: jax.Array, bound: float | None) -> jax.Array:
    """``value`` held within ±bound, with gradient 0 outside; None holds nothing.

    A bound is a setting: nothing is differentiated with respect to it.
    """
    if bound is None:
        return value
    bound = jax.lax.stop_gradient(jnp.asarray(bound, value.dtype))
    return jnp.clip(value, -bound, bound)


def emit(params: Any, x_t: jax.Array, m: jax.Array, proj_clip: float | None) -> jax.Array:
    """h [..., P] from o ⊙ tanh(c) [..., H]: projected, clipped, in the dtype of outputs."""
    kinds = checks.dtypes(x_t, params)
    if params.w_proj is not None:
        m = clipped(product(m, params.w_proj, kinds), proj_clip)
    return m.astype(kinds.compute)


def run_cell(
    step: Callable,
    params: Any,
    xs: jax.Array,
    state: Any,
    clips: dict[str, Any],
    *,
    kind: type,
    state_kind: type,
    gates: int = 4,
    peepholes: int = 3,
    reset_to: Any = None,
    static: tuple[tuple[str, Any], ...] = (),
    truncation: Any = None,
    **over_time,
) -> tuple[Any, jax.Array]:
    """``lstm`` with any step of its kind.

    Args:
      step: a function with ``lstm_step``'s signature.
      params, xs, state, reset_to, truncation: as in ``lstm``.
      clips: ``cell_clip`` and ``proj_clip``.
      kind, state_kind, gates, peepholes: as in ``preactivations``.
      static: further options of ``step``, which choose the program.
      **over_time: every other option of ``lstm``.

    Returns:
      As ``lstm``.

    Raises:
      ValueError: as ``lstm``.
    """
    xs = checks.as_array("xs", xs)
    check_inputs(xs, truncation)
    kinds = check_cell(
        params, "xs", xs, *clips.values(), gates=gates, peepholes=peepholes, kind=kind
    )
    batch, hidden = xs.shape[-2], params.b.shape[0] // gates
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
        truncation=truncation,
        reset_to=None if reset_to is None else whole("reset_to", reset_to),
        **over_time,
    )


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
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None, jax.Array | None]:
    """``init_lstm`` for any number of gates.

    Args:
      blocks: what the bias of each of the G blocks is drawn as: "i" and "f" as the input and the
        forget gate's, "-f" as minus the forget gate's, anything else as zero.
      peepholes: rows of the peepholes.
      key, input_size, …: as in ``init_lstm``.

    Returns:
      ``(w_x [D, GH], w_h [P, GH], b [GH], peephole, w_proj)``.

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
    checks.prng_key("key", key)
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
    return w_x, w_h, b, weights, w_proj


def check_cell(
    params: Any,
    name: str,
    x: jax.Array,
    cell_clip: Any,
    proj_clip: Any,
    *,
    kind: type,
    gates: int = 4,
    peepholes: int = 3,
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
