"""Initial weights of recurrent kernels: the laws that the frameworks draw from.

A kernel of a gated cell holds G gates side by side on its last axis, [fan_in, G·H]. It matters
whether a law looks at each gate's block [fan_in, H] or at the whole matrix, and frameworks differ
in exactly that. Limits: glorot (Glorot & Bengio, 2010) is U(±√(6/(fan_in + fan_out))); orthogonal
(Saxe et al., 2014) has all singular values 1; lecun normal (LeCun et al., 1998) has the standard
deviation 1/√fan_in.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lstmjax import checks

Initializer = Callable[[jax.Array, tuple[int, ...], jnp.dtype], jax.Array]

glorot: Initializer = jax.nn.initializers.glorot_uniform()


def orthogonal(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """All singular values 1."""
    # The QR decomposition knows no 16-bit types.
    return jax.nn.initializers.orthogonal()(key, shape, checks.wide(dtype)).astype(dtype)


def per_gate(init: Initializer, gates: int) -> Initializer:
    """The same law for each gate's block on its own.

    Args:
      init: law of one block [fan_in, H].
      gates: number of blocks side by side on the last axis.

    Returns:
      A law for [fan_in, gates·H].
    """

    def blocks(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
        fan_in, width = shape
        keys = jax.random.split(key, gates)
        return jnp.concatenate([init(k, (fan_in, width // gates), dtype) for k in keys], axis=-1)

    return blocks


def uniform(limit: float) -> Initializer:
    """U(−limit, limit)."""

    def draw(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -limit, limit)

    return draw


# The laws of whole frameworks; lstm.init_lstm says what each one is.
INITS = (
    "lstmjax",
    "tf1",
    "keras1",
    "keras",
    "torch",
    "flax",
    "nnx_fused",
    "haiku",
    "equinox",
    "haste",
)
NO_FORGET_BIAS = ("torch", "flax", "nnx_fused", "equinox")


def gated_kernels(
    init: str, key: jax.Array, d: int, p: int, h: int, gates: int, dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array]:
    """The kernels of an LSTM under a framework's law.

    Args:
      init: one of ``INITS``.
      key: a PRNG key.
      d, p, h: D, P and H.
      gates: G, 4 for the plain LSTM.
      dtype: floating.

    Returns:
      ``(w_x [D, GH], w_h [P, GH])``.
    """
    of_x, of_h = jax.random.split(key)
    if init == "tf1":
        both = glorot(of_x, (d + p, gates * h), dtype)
        return both[:d], both[d:]
    lecun = jax.nn.initializers.lecun_normal()
    # jax's truncated_normal gives the deviation before truncation, as Haiku does.
    haiku = jax.nn.initializers.truncated_normal((d + p) ** -0.5)
    law_x, law_h = {
        "lstmjax": (per_gate(glorot, gates), per_gate(orthogonal, gates)),
        "haste": (per_gate(glorot, gates), per_gate(orthogonal, gates)),
        "keras1": (per_gate(glorot, gates), per_gate(glorot, gates)),
        "keras": (glorot, orthogonal),
        "torch": (uniform(h**-0.5),) * 2,
        "equinox": (uniform(h**-0.5),) * 2,
        "flax": (lecun, per_gate(orthogonal, gates)),
        "nnx_fused": (lecun, orthogonal),
        "haiku": (haiku, haiku),
    }[init]
    return law_x(of_x, (d, gates * h), dtype), law_h(of_h, (p, gates * h), dtype)


# What a law of the input and the forget gates' biases is: (key, H, dtype) -> (b_i [H], b_f [H]).
GateBias = Callable[[jax.Array, int, jnp.dtype], tuple[jax.Array, jax.Array]]


def chrono(max_lag: float) -> GateBias:
    """Biases for dependencies of up to ``max_lag`` steps (Tallec & Ollivier, 2018).

        b_f ~ log U(1, max_lag − 1),   b_i = −b_f

    A forget gate with the bias log(T − 1) keeps a memory for about T steps.

    Args:
      max_lag: the longest dependency that is expected, in steps, >= 2.

    Returns:
      A law for ``forget_bias=`` of ``init_lstm``.

    Raises:
      ValueError: ``max_lag`` below 2.
    """
    _check_lag(max_lag)

    def law(key: jax.Array, hidden_size: int, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
        lag = jax.random.uniform(key, (hidden_size,), checks.wide(dtype), 1.0, max_lag - 1.0)
        b_f = jnp.log(lag).astype(dtype)
        return -b_f, b_f

    return law


def log_uniform(max_lag: float) -> GateBias:
    """Biases for dependencies of every order of magnitude up to ``max_lag`` steps.

        b_f ~ U(0, log(max_lag − 1)),   b_i = −b_f

    As ``chrono``, with the logarithms of the lags evenly spread in place of the lags: half of its
    memories last for more than √max_lag steps, where half of chrono's do for more than max_lag/2.
    No paper's.

    Args:
      max_lag: the longest dependency that is expected, in steps, >= 2.

    Returns:
      A law for ``forget_bias=`` of ``init_lstm``.

    Raises:
      ValueError: ``max_lag`` below 2.
    """
    _check_lag(max_lag)

    def law(key: jax.Array, hidden_size: int, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
        longest = math.log(max_lag - 1.0)
        b_f = jax.random.uniform(key, (hidden_size,), checks.wide(dtype), 0.0, longest).astype(
            dtype
        )
        return -b_f, b_f

    return law


def _check_lag(max_lag: float) -> None:
    checks.number("max_lag", max_lag)
    if isinstance(max_lag, jax.core.Tracer):
        raise ValueError(f"max_lag: got {max_lag}, expected a number that is not traced")
    if max_lag < 2:
        raise ValueError(f"max_lag: got {max_lag!r}, expected a number >= 2")


def uniform_gate(key: jax.Array, hidden_size: int, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """Forget gates that start evenly spread over (0, 1) (Gu et al., 2020).

        b_f = σ⁻¹(u),   u ~ U(1/H, 1 − 1/H),   b_i = −b_f

    Args:
      key: a PRNG key.
      hidden_size: H >= 2.
      dtype: floating.

    Returns:
      ``(b_i [H], b_f [H])``; the function itself is a law for ``forget_bias=`` of ``init_lstm``.

    Raises:
      ValueError: H below 2.
    """
    if hidden_size < 2:
        raise ValueError(f"hidden_size: got {hidden_size}, expected >= 2 for uniform_gate")
    # Drawn wide: in 16 bits u could round to 1, and the bias would be infinite.
    low = 1 / hidden_size
    u = jax.random.uniform(key, (hidden_size,), checks.wide(dtype), low, 1 - low)
    b_f = (jnp.log(u) - jnp.log1p(-u)).astype(dtype)
    return -b_f, b_f


def gated_biases(
    init: str,
    key: jax.Array,
    h: int,
    blocks: Sequence[str],
    forget_bias: float | GateBias | None,
    dtype: Any,
) -> jax.Array:
    """The bias [GH] of an LSTM under a framework's law.

    Args:
      init: one of ``INITS``.
      key: a PRNG key.
      h: H.
      blocks: G names: "i" and "f" take the biases of the input and the forget gate, "-f" minus the
        latter's; every other one is the framework's.
      forget_bias: a number, a law, or None for the framework's own.
      dtype: floating.

    Returns:
      [GH].

    Raises:
      ValueError: a ``forget_bias`` that is neither, a law that gives no pair.
    """
    of_b, of_gates = jax.random.split(key)
    drawn = jnp.zeros((len(blocks), h), dtype)
    if init in ("torch", "equinox"):
        draws = 2 if init == "torch" else 1  # PyTorch adds two biases
        each = uniform(h**-0.5)(of_b, (draws, len(blocks), h), dtype)
        drawn = jnp.sum(each, axis=0)
    if forget_bias is None:
        if init in NO_FORGET_BIAS:
            return drawn.reshape(-1)
        forget_bias = 1.0
    if callable(forget_bias):
        drawn_biases = forget_bias(of_gates, h, dtype)
        if not (isinstance(drawn_biases, tuple) and len(drawn_biases) == 2):
            got = type(drawn_biases).__name__
            raise ValueError(f"forget_bias: got a law that gives {got}, expected (b_i, b_f)")
        b_i, b_f = drawn_biases
        given = {"i": b_i, "f": b_f, "-f": -b_f}
    else:
        checks.number("forget_bias", forget_bias)
        b_f = jnp.full(h, forget_bias, dtype)
        given = {"f": b_f, "-f": -b_f}
    rows = [given.get(block, row) for block, row in zip(blocks, drawn, strict=True)]
    return jnp.concatenate(rows)
