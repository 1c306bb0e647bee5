"""Losses and metrics, one number per example, and their averages as (sum, count).

Averages are kept as a sum and a count and divided once, at the very end. Means of means would
weigh the examples of a short last batch, or of a device with fewer of them, too heavily.

All raise ``ValueError`` where labels, targets or weights have not the shape that is stated.

Letters: B batch, C classes.
"""

import jax
import jax.numpy as jnp
import optax

from lstmjax import checks

Average = tuple[jax.Array, jax.Array]


def squared_error(predictions: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean squared error of each example: [B, ...] against [B, ...] gives [B].

    Raises:
      ValueError: the shapes differ.
    """
    checks.shape("targets", targets, predictions.shape)
    return jnp.mean(jnp.square(predictions - targets), axis=tuple(range(1, targets.ndim)))


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """−log softmax(logits)[label]: logits [B, C] and integer labels [B] give [B].

    Raises:
      ValueError: logits that are not floating, labels that are no integers.
    """
    checks.floating("logits", logits)
    checks.shape("labels", labels, logits.shape[:-1])
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"labels: got dtype {labels.dtype}, expected an integer dtype")
    # Optax's selects the label in a way that jax 0.12 cannot transpose on an explicit mesh.
    of_label = jnp.take_along_axis(logits, jnp.asarray(labels)[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - of_label


def double_softmax_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """−log softmax(softmax(logits))[label]: logits [B, C] and integer labels [B] give [B].

    A common mistake: probabilities handed to a loss that expects logits. It cannot fall below
    ln(1 + (C − 1)/e), 1.4612 for ten classes, and its gradients are small. Kept to repeat a
    published program that does it; use ``cross_entropy``.
    """
    return cross_entropy(jax.nn.softmax(logits), labels)


def binary_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """−y log σ(z) − (1 − y) log(1 − σ(z)): logits [B] and labels [B] in {0, 1} give [B]."""
    checks.shape("labels", labels, logits.shape)
    return optax.sigmoid_binary_cross_entropy(logits, labels.astype(logits.dtype))


def correct(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """1 where the largest logit is the label's: logits [B, C], labels [B] give float32 [B]."""
    checks.shape("labels", labels, logits.shape[:-1])
    return (jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32)


def binary_correct(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """1 where σ(z) > 1/2 says the label: logits [B], labels [B] in {0, 1} give float32 [B]."""
    checks.shape("labels", labels, logits.shape)
    return ((logits > 0) == (labels > 0)).astype(jnp.float32)


def total(values: jax.Array, weight: jax.Array) -> Average:
    """(Σ wᵢ vᵢ, Σ wᵢ) of values [B] and weights [B]; a weight of 0 marks padding.

    What a row of weight 0 holds, NaN included, changes neither the sums nor their gradients with
    respect to ``values``. Both sums are floating point numbers of at least 32 bits.
    """
    checks.shape("weight", weight, values.shape)
    # 16 bits do not count to 2,049, float16 ends at 65,504, and integers hold no half.
    values, weight = jnp.asarray(values), jnp.asarray(weight)
    double = 8 in (values.dtype.itemsize, weight.dtype.itemsize)
    weight = weight.astype(jnp.float64 if double else jnp.float32)
    counted = jnp.where(weight != 0, values, jnp.zeros_like(values)).astype(weight.dtype)
    return jnp.sum(weight * counted), jnp.sum(weight)


def mean(average: Average) -> jax.Array:
    """Sum over count; 0 where nothing was counted."""
    added, count = average
    return added / jnp.where(count == 0, jnp.ones_like(count), count)


def means(metrics: dict[str, Average]) -> dict[str, float]:
    """The mean of each metric, as Python numbers; sums [K] and counts [K] of K steps are added."""
    return {
        name: float(mean((jnp.sum(added), jnp.sum(count))))
        for name, (added, count) in metrics.items()
    }
