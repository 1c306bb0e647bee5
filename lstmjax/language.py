"""Each word from those around it: what a model over chops can learn without a label.

The forward layer says which word comes next in its segment, the backward one which came before:

    u_t = h_t W              [E], W of each direction's own
    s_k = u_t · e_k + b_k    for word k, e its vector (tied: Press & Wolf, 2017)
    L   = log Σ_k exp(s_k) − s_y

A model begun with such weights learns to tell reviews from each other sooner (Dai & Le, 2015, who
read them forwards). In training, the sum goes over y and over words drawn at random, each share
corrected by how often it is drawn (Bengio & Senécal, 2008), with one draw for the whole batch.

Letters: T steps of a chop, S segments, E size of a vector, H hidden, V words, K words drawn.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lstmjax import losses, review_model
from lstmjax.dropout import dropout
from lstmjax.models import glorot
from lstmjax.review_model import ReviewModel


def init(model: ReviewModel, key: jax.Array) -> dict[str, Any]:
    """Draws the weights.

    Returns:
      Those of ``review_model.init`` but for "kernel" and "bias", which only labels teach; "next",
      W [H, E] of each direction, glorot; "next_bias" [V], zero.
    """
    of_model, *keys = jax.random.split(key, 1 + len(model.directions))
    params = review_model.init(model, of_model)
    del params["kernel"], params["bias"]
    shape = model.hidden_size, model.embedding_size
    drawn = zip(model.directions, keys, strict=True)
    params["next"] = {name: glorot(own, shape, jnp.float32) for name, own in drawn}
    return params | {"next_bias": jnp.zeros(model.vocabulary_size, jnp.float32)}


def loss_fn(
    model: ReviewModel, samples: int, params: dict, batch: dict, key: jax.Array | None = None
) -> tuple[jax.Array, dict]:
    """The mean loss of all words of a batch, both directions', for ``train.make_train_step``.

    Args:
      model: the model, whose dropout applies, its ``dropout`` to h.
      samples: K. With a key, the loss is that of ``sampled``; without, of all V words.
      params: from ``init``.
      batch: as in ``review_model``.
      key: what is drawn from, or None.

    Returns:
      The loss, and {"loss": (sum, count)}; without a key also "accuracy", of the likeliest word.
    """
    keys = review_model.split_keys(key)
    xs = review_model.inputs(model, params, batch, keys)
    hs = review_model.outputs(model, params, xs, batch["length"])
    u, target, weight = predictions(model, params, dropout(keys.pooled, hs, model.dropout), batch)
    tables = params["embed"], params["next_bias"]
    if key is None:
        loss, correct = complete(*tables, u, target)
        metrics = {"accuracy": losses.total(correct, weight)}
    else:
        loss, metrics = sampled(*tables, u, target, samples, review_model.other_key(key)), {}
    average = losses.total(loss, weight)
    return losses.mean(average), {"loss": average, **metrics}


def predictions(
    model: ReviewModel, params: dict, hs: jax.Array, batch: dict
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What says each word, the word, and whether there is one.

    Args:
      hs: [T, S, 2H] or [T, S, H].

    Returns:
      u [N, E], targets int32 [N] and weights [N], N = (T − 1) S, and as many again with a backward
      layer: h_t and x_{t+1}; h_t and x_{t−1}. The weight is 1 where a segment has both of the two.
    """
    ids = batch["ids"]
    steps = jnp.arange(1, len(ids), dtype=batch["length"].dtype)
    both = (steps[:, None] < batch["length"][None]).ravel()  # steps t − 1 and t
    found, size = [], model.hidden_size
    for number, name in enumerate(model.directions):
        u = hs[:, :, number * size : (number + 1) * size] @ params["next"][name]
        u, target = (u[:-1], ids[1:]) if name == "forward" else (u[1:], ids[:-1])
        found.append((u.reshape(-1, u.shape[-1]), target.ravel(), both.astype(hs.dtype)))
    return tuple(jnp.concatenate(parts) for parts in zip(*found, strict=True))


def complete(
    table: jax.Array, bias: jax.Array, u: jax.Array, target: jax.Array, at_once: int = 512
) -> tuple[jax.Array, jax.Array]:
    """The loss over all words, and whether the right one is the likeliest: [N] and [N].

    Args:
      table: e, [V, E].
      bias: b, [V].
      u: [N, E].
      target: y, [N].
      at_once: rows whose V scores are there at the same time.
    """

    def one(own):
        u, target = own
        scores = u @ table.T + jnp.broadcast_to(bias, (len(table),))
        right = jnp.take_along_axis(scores, target[None], axis=0)[0]
        best = (jnp.argmax(scores).astype(target.dtype) == target).astype(u.dtype)
        return jax.nn.logsumexp(scores) - right, best

    return jax.lax.map(one, (u, target), batch_size=at_once)


def sampled(
    table: jax.Array,
    bias: jax.Array,
    u: jax.Array,
    target: jax.Array,
    samples: int,
    key: jax.Array,
) -> jax.Array:
    """The loss over the right word and K others, drawn with replacement: [N].

        L = log (exp s_y + Σ_{k drawn, k ≠ y} exp(s_k) / (K q_k)) − s_y

    with q of ``zipf``: the mean of the inner sum over all draws is the sum over all words but y.
    """
    share = jnp.asarray(zipf(len(table)), u.dtype)
    drawn = jax.random.choice(key, len(table), (samples,), p=share).astype(target.dtype)
    right = jnp.sum(u * table[target], axis=1) + bias[target]
    others = u @ table[drawn].T + (bias[drawn] - jnp.log(samples * share[drawn]))[None]
    others = jnp.where(drawn[None] == target[:, None], -jnp.inf, others)
    every = jnp.logaddexp(right, jax.nn.logsumexp(others, axis=1))
    return every - right


def zipf(size: int) -> np.ndarray:
    """q_k = log((k + 2)/(k + 1)) / log(V + 1): float64 [V]. Ids are ranks by frequency."""
    k = np.arange(size, dtype=np.float64)
    return np.log((k + 2) / (k + 1)) / np.log(size + 1)
