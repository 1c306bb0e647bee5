"""A moving average of the weights that an optimiser leads to, kept in its state."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lstmjax import checks


class Averaged(NamedTuple):
    """The state of ``averaged``: that of the optimiser, its updates [], and the mean weights."""

    inner: Any
    count: jax.Array
    mean: Any


def averaged(tx: optax.GradientTransformation, decay: float) -> optax.GradientTransformation:
    """An optimiser that also keeps a moving average of the weights it leads to.

        m_t = d_t m_{t-1} + (1 − d_t) θ_t,   d_t = min(decay, (t − 1)/t)

    The first 1/(1 − decay) weights are averaged evenly, the later ones exponentially, so that
    nothing of the initial ones is left (after Polyak & Juditsky, 1992). ``state.mean`` is for
    evaluation, in float32 where weights have 16 bits, whose 0.999 is 1 or near it; the updates are
    those of ``tx``.

    Args:
      tx: the optimiser.
      decay: 0 <= decay < 1.

    Returns:
      An optax transformation, whose ``update`` needs the weights.

    Raises:
      ValueError: ``decay`` outside [0, 1).
    """
    checks.transformation("tx", tx)
    checks.rate("decay", decay)

    def init(params):
        zeros = jax.tree.map(lambda p: jnp.zeros_like(p, checks.wide(p.dtype)), params)
        return Averaged(tx.init(params), jnp.zeros((), jnp.int32), zeros)

    def update(updates, state, params=None):
        updates, inner = tx.update(updates, state.inner, params)
        count = state.count + 1
        t = count.astype(jnp.result_type(float))
        keep = jnp.minimum(decay, (t - 1) / t)

        def moved(m, p):
            d = keep.astype(m.dtype)
            return d * m + (1 - d) * p.astype(m.dtype)

        mean = jax.tree.map(moved, state.mean, optax.apply_updates(params, updates))
        return updates, Averaged(inner, count, mean)

    return optax.GradientTransformation(init, update)
