"""The LSTM's recurrence on cuDNN, NVIDIA's library of kernels: ``method="cudnn"``.

cuDNN runs a layer as one call, with the weights kept on the chip between steps (Appleyard, Kočiský
& Blunsom, 2016; Diamos et al., 2016). JAX reaches it by ``jax.experimental.rnn``: batch first, two
biases, all weights in one vector. It computes

    z_t = x_t W_x + h_{t-1} W_h + b,   c_t = σ(z_f) ⊙ c_{t-1} + σ(z_i) ⊙ tanh(z_g)
    h_t = σ(z_o) ⊙ tanh(c_t)

in float32 and nothing else: no peepholes, projection, clips, masks or resets, and no derivative
but the first one in reverse mode. Products are of TensorFloat-32 factors where JAX's own would be:
wherever ``jax_default_matmul_precision`` does not ask for more.

Versions of cuDNN have returned wrong gradients before. So the first use in a process compares
values and gradients with those of a scan, and where they differ there is no ``method="cudnn"``.
"""

import ctypes
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import sequential_vmap
from jax.errors import JaxRuntimeError
from jax.experimental import rnn

from lstmjax import checks
from lstmjax.recurrence import product, recur, varying_like

# Settings of jax_default_matmul_precision under which factors may be rounded to 11 bits or fewer.
_ROUNDED = (None, "default", "high", "bfloat16", "tensorfloat32", "TF32_TF32_F32", "BF16_BF16_F32")
# The largest error of the first use, as max|got − want| / max|want|, by ``_precision()``.
_ALLOWED = {jax.lax.Precision.HIGHEST: 1e-4, jax.lax.Precision.HIGH: 2e-2}
# (device, precision) → what ``_difference`` said.
_compared: dict[tuple[Any, jax.lax.Precision], str | None] = {}


def cudnn(
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
    """``lstm`` by ``method="cudnn"``; the arguments are checked by then.

    ``vmap`` runs one call after another. Forward mode raises JAX's own ``TypeError``.

    Args:
      params: ``LSTMParams`` without peepholes and projection.
      state: ``LSTMState(h [B, H], c [B, H])``, float32.
      xs: [T, B, D]; with ``params`` it makes a float32 layer.
      mask, resets, cell_clip, proj_clip: None.
      reset_to: a state, which without ``resets`` nothing is reset to, or None.
      reverse: as in ``lstm``.
      unroll: 1.

    Returns:
      ``(state, hs [T, B, H])``, as ``lstm``.

    Raises:
      ValueError: what cuDNN does not do, ``available()`` says why it cannot be used, or a second
        derivative is taken.
    """
    beyond = {
        "peepholes": params.peephole is not None,
        "a projection": params.w_proj is not None,
        "cell_clip": cell_clip is not None,
        "proj_clip": proj_clip is not None,
        "a mask or lengths (cuDNN knows padding on the right alone)": mask is not None,
        "resets": resets is not None,
        f"unroll={unroll}": unroll != 1,
    }
    compute = checks.dtypes(xs, params).compute
    beyond[f"dtype {compute} (cuDNN is reached in float32)"] = compute != jnp.float32
    for asked, given in beyond.items():
        if given:
            raise ValueError(f"method: got 'cudnn' with {asked}, expected 'fused' or 'scan'")
    if (why := available()) is not None:
        raise ValueError(f"method: got 'cudnn', expected 'fused' or 'scan': {why}")
    return _layer(params, state, xs, reverse)


def available() -> str | None:
    """Whether ``method="cudnn"`` can be used on JAX's default device, tried out if need be.

    Returns:
      None where it can, or why not, in a sentence without a full stop.
    """
    if (why := absent()) is not None:
        return why
    at = _device(), _precision()
    if at not in _compared:
        _compared[at] = _difference()
    return _compared[at]


def absent() -> str | None:
    """Why there is no cuDNN, right or wrong, on JAX's default device; None where there is."""
    device = _device()
    if "cuda" not in device.client.platform_version.lower():
        return f"it needs a CUDA device, and JAX's default device is {device.device_kind}"
    if not hasattr(rnn.gpu_rnn, "compute_rnn_workspace_reserve_space_sizes"):
        return "the installed jaxlib comes without cuDNN's recurrent layers"
    return None


def version() -> str | None:
    """The version of cuDNN that this process has loaded or would load; None without one."""
    for major in (9, 10):
        with suppress(OSError, AttributeError):
            number = ctypes.CDLL(f"libcudnn.so.{major}").cudnnGetVersion()
            return f"{number // 10000}.{number // 100 % 100}.{number % 100}"
    return None


def _device() -> jax.Device:
    chosen = jax.config.jax_default_device
    if chosen is None or isinstance(chosen, str):  # the name of a platform
        return jax.local_devices(backend=chosen)[0]
    return chosen


def _precision() -> jax.lax.Precision:
    rounded = jax.config.jax_default_matmul_precision in _ROUNDED
    return jax.lax.Precision.HIGH if rounded else jax.lax.Precision.HIGHEST


# ---- the call -----------------------------------------------------------------------------------


def _layer(params: Any, state: Any, xs: jax.Array, reverse: bool = False) -> tuple[Any, jax.Array]:
    """The layer; ``params`` needs w_x, w_h and b alone."""
    (steps, batch, size), hidden = xs.shape, params.w_h.shape[0]
    if not steps or not batch:  # cuDNN refuses what is empty
        return state, jnp.zeros((steps, batch, hidden), jnp.float32)
    weights = (params.w_x.T, params.w_h.T, params.b, jnp.zeros_like(params.b))  # two biases
    flat = jnp.concatenate([w.astype(jnp.float32).ravel() for w in weights])
    x = jnp.swapaxes(xs[::-1] if reverse else xs, 0, 1).astype(jnp.float32)
    # What differs between devices and what does not cannot be mixed in one call.
    arrays = varying_like((x, state.h[None], state.c[None], flat), (xs, params, state))
    y, h, c = _call(_How(size, hidden, 1, 0.0, False, _precision()), *arrays)
    hs = jnp.swapaxes(y, 0, 1)
    return type(state)(h[0], c[0]), hs[::-1] if reverse else hs


class _How(NamedTuple):
    """What chooses the program, in the order that ``jax.experimental.rnn`` takes it."""

    input_size: int
    hidden_size: int
    num_layers: int
    dropout: float
    bidirectional: bool
    precision: jax.lax.Precision  # stated, so that both directions have the same wherever they run


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _call(how: _How, *arrays: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(y [B, T, H], h and c [1, B, H]) from x [B, T, D], h, c and the vector of weights."""
    return _forward(how, *arrays)[0]


def _forward(how: _How, *arrays: jax.Array) -> tuple[Any, Any]:
    def run(x, h, c, weights):
        lengths = jnp.full(x.shape[:1], x.shape[1], jnp.int32)
        return rnn.lstm_fwd(x, h, c, weights, lengths, *how)

    # The primitive forgets to say which mesh axes its results vary over.
    return varying_like(_kernel(run)(*arrays), arrays)


def _backward(how: _How, kept: Any, cotangents: Any) -> tuple[jax.Array, ...]:
    return _kernel(lambda *both: rnn.lstm_bwd(*how, *both)[:4])(kept, cotangents)


def _kernel(run: Any) -> Any:
    """``run`` with a rule for ``vmap``, and a word to those who differentiate it once more."""
    run = jax.custom_jvp(sequential_vmap(run))

    @run.defjvp
    def no_rule(primals, tangents):
        raise ValueError("method: got 'cudnn' in a second derivative, expected 'fused' or 'scan'")

    return run


_call.defvjp(_forward, _backward)


# ---- the first use ------------------------------------------------------------------------------


class _Params(NamedTuple):
    w_x: jax.Array
    w_h: jax.Array
    b: jax.Array


class _State(NamedTuple):
    h: jax.Array
    c: jax.Array


def _step(params: _Params, state: _State, x_t: jax.Array) -> _State:
    """The equations at the top of this file: lstm.py, which has more of them, imports this one."""
    kinds = checks.dtypes(x_t, params)
    z = product(x_t, params.w_x, kinds) + product(state.h, params.w_h, kinds)
    i, f, g, o = jnp.split(z + jnp.broadcast_to(params.b, z.shape), 4, axis=-1)
    c = jax.nn.sigmoid(f) * state.c + jax.nn.sigmoid(i) * jnp.tanh(g)
    return _State(jax.nn.sigmoid(o) * jnp.tanh(c), c)


def _scan(params: _Params, state: _State, xs: jax.Array) -> tuple[_State, jax.Array]:
    return recur(partial(_step, params), state, xs)


def _difference() -> str | None:
    """What cuDNN gets wrong of a small layer, in values and every gradient; None for nothing."""
    where = f"cuDNN {version()} on {_device().device_kind}"
    allowed = _ALLOWED[_precision()]
    # The first use is in the midst of a trace, of which these numbers are to be no part.
    with jax.ensure_compile_time_eval():
        try:
            got = _values_and_gradients(_layer)
        except JaxRuntimeError as failure:
            return f"{where} fails: {str(failure).splitlines()[0]}"
        with jax.default_matmul_precision("highest"):
            want = _values_and_gradients(_scan)
    errors = {name: error(got[name], want[name]) for name in want}
    wrong = [f"{name} by {error:.0e}" for name, error in errors.items() if not error <= allowed]
    if not wrong:
        return None
    return (
        f"{where} differs from a scan in {', '.join(wrong)}, more than {allowed:.0e} of the largest"
    )


def _values_and_gradients(layer: Any) -> dict[str, np.ndarray]:
    """Of a layer of uneven sizes with random weights, by name; all in the loss."""
    steps, batch, size, hidden = 11, 6, 9, 32
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    recurrent = normal(hidden, 4 * hidden) / np.float32(hidden**0.5)
    params = _Params(normal(size, 4 * hidden), recurrent, normal(4 * hidden))
    start, of_final = (_State(normal(batch, hidden), normal(batch, hidden)) for _ in range(2))
    of_hs = normal(steps, batch, hidden)

    def loss(params, state, xs):
        final, hs = layer(params, state, xs)
        parts = jax.tree.map(lambda a, b: jnp.sum(a * b), (of_final, of_hs), (final, hs))
        return sum(jax.tree.leaves(parts)), {"hs": hs, "h": final.h, "c": final.c}

    differentiated = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))
    gradients, found = differentiated(params, start, normal(steps, batch, size))
    for part in gradients[:2]:
        found |= {f"the gradient of {name}": g for name, g in part._asdict().items()}
    found["the gradient of xs"] = gradients[2]
    return {name: np.asarray(array) for name, array in found.items()}


def error(got: np.ndarray, want: np.ndarray) -> float:
    """max|got − want| / max|want|; NaN where ``got`` has one."""
    return float(np.max(np.abs(got - want)) / np.max(np.abs(want)))
