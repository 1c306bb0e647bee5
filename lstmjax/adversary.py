"""Steps in the inputs that make a review worse: by its loss, or by what the model said of it.

Inputs are xs [T, S, E], S segments of R reviews: "slot" [S] says of which one each is, "length" [S]
how many of its steps there are. A step has one length over all segments of a review.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

TRIAL = 0.1  # the length of the first trial of `virtual`, as in its authors' program


def perturbation(
    loss: Callable, xs: jax.Array, epsilon: float, batch: Mapping[str, jax.Array]
) -> jax.Array:
    """The step in which a review's loss rises fastest, of length ε over all its segments.

        r = ε g / ‖g‖,   g = ∇ₓ L     (Miyato, Dai & Goodfellow, 2017; there −g, of log p)

    Args:
      loss: of xs, the sum of the reviews' losses.
      xs: [T, S, E].
      epsilon: ε > 0.
      batch: with "slot" [S] and "label" [R].

    Returns:
      r [T, S, E]; 0 where g is.
    """
    return scaled(jax.grad(loss)(xs), epsilon, batch)


def virtual(
    outputs: Callable,
    xs: jax.Array,
    epsilon: float,
    batch: Mapping[str, jax.Array],
    key: jax.Array,
) -> jax.Array:
    """The step in which what the model says of a review changes fastest; it needs no label.

        d ~ N(0, 1),   r = ε g / ‖g‖,   g = ∇_r KL(p(x) ‖ p(x + r)) at r = ξ d / ‖d‖

    One step of the power method for the largest curvature of the divergence at r = 0, where its
    gradient is 0 (Miyato, Dai & Goodfellow, 2017, equations 5 and 6).

    Args:
      outputs: of xs, the logits [R].
      xs: [T, S, E].
      epsilon: ε > 0.
      batch: with "slot", "length" [S] and "label" [R].
      key: what d is drawn from.

    Returns:
      r [T, S, E]; 0 where g is.
    """
    valid = jnp.arange(len(xs), dtype=batch["length"].dtype)[:, None] < batch["length"][None]
    drawn = jax.random.normal(key, xs.shape, xs.dtype) * valid[:, :, None].astype(xs.dtype)
    said = jax.lax.stop_gradient(outputs(xs))
    differs = lambda r: jnp.sum(divergence(said, outputs(xs + r)))  # noqa: E731
    return scaled(jax.grad(differs)(scaled(drawn, TRIAL, batch)), epsilon, batch)


def divergence(z: jax.Array, other: jax.Array) -> jax.Array:
    """KL(p ‖ q) of Bernoulli's p = σ(z) and q = σ(other), in nats: [R] and [R] give [R].

    p (log p − log q) + (1 − p) (log (1 − p) − log (1 − q))
    """
    log = jax.nn.log_sigmoid
    p = jax.nn.sigmoid(z)
    return p * (log(z) - log(other)) + (1 - p) * (log(-z) - log(-other))


def scaled(g: jax.Array, epsilon: float, batch: Mapping[str, jax.Array]) -> jax.Array:
    """ε g / ‖g‖, the norm that of all segments of a review; no gradient goes through it.

    Where the squares of g are below float32's range (‖g‖ < 1e-19) it is smaller, and 0 where g is.
    """
    squares = jax.ops.segment_sum(jnp.sum(g * g, axis=(0, 2)), batch["slot"], len(batch["label"]))
    scale = epsilon * jax.lax.rsqrt(jnp.maximum(squares, jnp.finfo(g.dtype).tiny))
    return jax.lax.stop_gradient(g * scale[batch["slot"]][None, :, None])
