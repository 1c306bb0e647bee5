"""Dropout as arrays: a key comes in, a masked array goes out. Nothing is remembered between calls.

All masks are inverted (kept entries are divided by 1 − rate), so evaluation needs no rescaling.
"""

import jax
import jax.numpy as jnp

from lstmjax import checks


def dropout(key: jax.Array | None, x: jax.Array, rate: float) -> jax.Array:
    """Drops each element of ``x`` on its own (Srivastava et al., 2014).

        y = x ⊙ m / (1 − rate),   m ~ Bernoulli(1 − rate), one draw per element

    On a sequence [T, B, F] this is PyTorch's ``dropout`` between layers: fresh at every step.

    Args:
      key: a PRNG key; None means evaluation.
      x: [...], floating.
      rate: probability of dropping an element, 0 <= rate < 1.

    Returns:
      [...], in the dtype of ``x``; ``x`` itself when ``key`` is None or ``rate`` is 0.

    Raises:
      ValueError: ``rate`` outside [0, 1).
    """
    checks.rate("rate", rate)
    checks.floating("x", x)
    if key is None or rate == 0:
        return x
    return _masked(key, x, rate, x.shape)


def variational_dropout(key: jax.Array | None, xs: jax.Array, rate: float) -> jax.Array:
    """Drops features of each sequence, the same ones at all its steps (Gal & Ghahramani, 2016).

        y_t = x_t ⊙ m / (1 − rate),   m ~ Bernoulli(1 − rate), one draw per (sequence, feature)

    Applied to a layer's inputs, this is ``dropout=`` of the Keras LSTM: one mask for all four
    gates and all steps, none on the recurrent path.

    Args:
      key: a PRNG key; None means evaluation.
      xs: [T, B, F], floating.
      rate: probability of dropping a feature, 0 <= rate < 1.

    Returns:
      [T, B, F], in the dtype of ``xs``; ``xs`` itself when ``key`` is None or ``rate`` is 0.

    Raises:
      ValueError: ``rate`` outside [0, 1), or ``xs`` without the three axes.
    """
    checks.rate("rate", rate)
    checks.shape("xs", xs, ("T", "B", "F"))
    checks.floating("xs", xs)
    if key is None or rate == 0:
        return xs
    return _masked(key, xs, rate, (1, *xs.shape[1:]))


def _masked(key: jax.Array, x: jax.Array, rate: float, mask_shape: tuple[int, ...]) -> jax.Array:
    """``x`` times an inverted mask of ``mask_shape``, which broadcasts against ``x``."""
    keep = jax.random.bernoulli(key, 1.0 - rate, mask_shape)
    return jnp.where(keep, x / jnp.asarray(1.0 - rate, x.dtype), jnp.zeros((), x.dtype))
