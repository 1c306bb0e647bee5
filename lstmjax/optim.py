"""Optimisers, from optax: clipped Adam, and TensorFlow's relatives of it.

TensorFlow and Keras differ from optax and PyTorch in two ways that change a run from its first
step: Adam's ε is added before the bias correction of the second moment, and ``clip_by_norm``
bounds every tensor by itself.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lstmjax import checks


def clipped_adam(
    learning_rate: Any,
    max_norm: float | None = 1.0,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
) -> optax.GradientTransformation:
    """Adam (Kingma & Ba, 2015) on gradients clipped by global norm (Pascanu et al., 2013).

        g ← g · min(1, max_norm / ‖g‖),  ‖g‖ over all parameters together
        m ← β₁m + (1−β₁)g,  v ← β₂v + (1−β₂)g²,  θ ← θ − α m̂ / (√v̂ + ε)

    In a parallel step the gradients are averaged over devices first and clipped after
    (``train.make_train_step`` does so).

    Args:
      learning_rate: α > 0, or an optax schedule.
      max_norm: bound on the global norm, > 0; None for no clipping.
      b1, b2, eps: β₁, β₂ and ε.

    Returns:
      An optax transformation.

    Raises:
      ValueError: a learning rate or ``max_norm`` that is not above 0, b1 or b2 outside [0, 1),
        eps below 0.
    """
    _check_adam(learning_rate, b1, b2, eps)
    return in_float32(clipped(optax.adam(learning_rate, b1, b2, eps), max_norm))


def clipped(
    tx: optax.GradientTransformation, max_norm: float | None
) -> optax.GradientTransformation:
    """Clips gradients by global norm before an optimiser sees them.

    Args:
      tx: the optimiser.
      max_norm: bound on the norm over all parameters together, > 0; None for no clipping.

    Returns:
      An optax transformation.

    Raises:
      ValueError: ``max_norm`` that is not above 0.
    """
    checks.transformation("tx", tx)
    checks.positive("max_norm", max_norm)
    if max_norm is None:
        return tx
    # In float16 the square of 256 is infinite, and what is divided by it is 0.
    return optax.chain(in_float32(optax.clip_by_global_norm(max_norm)), tx)


def in_float32(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """An optimiser that keeps its state in float32 where parameters have 16 bits.

    In bfloat16 β₂ = 0.999 is 1, and a second moment would never fall again.

    Args:
      tx: the optimiser.

    Returns:
      An optax transformation: the same where no parameter is of 16 bits.

    Raises:
      ValueError: ``tx`` is none.
    """
    checks.transformation("tx", tx)
    tx = optax.with_extra_args_support(tx)

    def wide(tree):
        return jax.tree.map(lambda a: jnp.asarray(a, checks.wide(jnp.result_type(a))), tree)

    def update(updates, state, params=None, **more):
        params = None if params is None else wide(params)
        new, state = tx.update(wide(updates), state, params, **more)
        return jax.tree.map(lambda n, old: n.astype(jnp.result_type(old)), new, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: tx.init(wide(params)), update)


def tf_adam(
    learning_rate: Any, *, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-7
) -> optax.GradientTransformation:
    """Adam as TensorFlow and Keras compute it.

        θ ← θ − α √(1 − β₂ᵗ) / (1 − β₁ᵗ) · m / (√v + ε)

    This is the form of the paper's section 2, with its ε̂: optax's form has ε √(1 − β₂ᵗ) there,
    1/31.6 of it at the first step, which shows where gradients are tiny.

    Args:
      learning_rate: α > 0, or an optax schedule.
      b1, b2: β₁ and β₂.
      eps: ε; Keras 2 and 3 have 1e-7, TensorFlow 1's ``AdamOptimizer`` and Keras 1 have 1e-8.

    Returns:
      An optax transformation.

    Raises:
      ValueError: a learning rate that is not above 0, b1 or b2 outside [0, 1), eps below 0.
    """
    _check_adam(learning_rate, b1, b2, eps)

    def init(params):
        # Two sets of zeros: one shared set could not be donated to a compiled step.
        mu, nu = (jax.tree.map(jnp.zeros_like, params) for _ in range(2))
        return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), mu, nu)

    def update(updates, state, params=None):
        del params
        count = optax.safe_increment(state.count)
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, updates)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * jnp.square(g), state.nu, updates)
        t = count.astype(jnp.result_type(float))  # 64 bits where they are switched on
        factor = jnp.sqrt(_one_minus_power(b2, t)) / _one_minus_power(b1, t)

        def scaled(m, v):
            return factor.astype(m.dtype) * m / (jnp.sqrt(v) + eps)

        return jax.tree.map(scaled, mu, nu), optax.ScaleByAdamState(count, mu, nu)

    adam = optax.GradientTransformation(init, update)
    return in_float32(optax.chain(adam, optax.scale_by_learning_rate(learning_rate)))


def _one_minus_power(b: Any, t: jax.Array) -> jax.Array:
    """1 − bᵗ; the difference itself would lose four of float32's seven digits at b = 0.999."""
    if isinstance(b, jax.Array):  # of optax.inject_hyperparams
        return jnp.where(b > 0, -jnp.expm1(t * jnp.log(b).astype(t.dtype)), jnp.ones_like(t))
    return -jnp.expm1(t * math.log(b)) if b > 0 else jnp.ones_like(t)


def clip_by_norm(max_norm: float) -> optax.GradientTransformation:
    """TensorFlow's ``clip_by_norm``: each tensor by its own norm, its direction kept.

        g ← g · min(1, max_norm / ‖g‖),  for every parameter array g on its own

    Args:
      max_norm: bound on each tensor's norm, > 0.

    Returns:
      An optax transformation without state.

    Raises:
      ValueError: ``max_norm`` that is not above 0.
    """
    checks.positive("max_norm", max_norm, or_none=False)

    def clip(g):
        # The norm only appears where it exceeds the bound, so g = 0 gives no 0/0.
        norm = jnp.sqrt(jnp.sum(jnp.square(g)))
        return g * (max_norm / jnp.maximum(norm, max_norm)).astype(g.dtype)

    return in_float32(optax.stateless(lambda updates, params: jax.tree.map(clip, updates)))


def _check_adam(learning_rate: Any, b1: Any, b2: Any, eps: Any) -> None:
    # optax.inject_hyperparams builds an optimiser anew in each step, from traced numbers.
    for name, value in (("b1", b1), ("b2", b2)):
        if not isinstance(value, jax.core.Tracer):
            checks.rate(name, value)
    checks.number("eps", eps)
    if not isinstance(eps, jax.core.Tracer) and eps < 0:
        raise ValueError(f"eps: got {eps!r}, expected a number >= 0")
    if learning_rate is None:
        raise ValueError("learning_rate: got None, expected a number > 0 or a schedule")
    if not callable(learning_rate):
        checks.positive("learning_rate", learning_rate, or_none=False)
