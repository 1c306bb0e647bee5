"""Initial weights of recurrent kernels: the laws that the frameworks draw from.

A kernel of a gated cell holds G gates side by side on its last axis, [fan_in, G·H]. It matters
whether a law looks at each gate's block [fan_in, H] or at the whole matrix, and frameworks differ
in exactly that. Limits: glorot (Glorot & Bengio, 2010) is U(±√(6/(fan_in + fan_out))); orthogonal
(Saxe et al., 2014) has all singular values 1.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Initializer = Callable[[jax.Array, tuple[int, ...], jnp.dtype], jax.Array]

glorot: Initializer = jax.nn.initializers.glorot_uniform()


def orthogonal(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """All singular values 1."""
    # The QR decomposition knows no 16-bit types.
    wide = jnp.float32 if jnp.dtype(dtype).itemsize < 4 else dtype
    return jax.nn.initializers.orthogonal()(key, shape, wide).astype(dtype)


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
