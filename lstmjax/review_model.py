"""One recurrent layer over the chops of whole reviews, pooled over all their steps.

    x_t  = embedding of the word (and of the pair that ends with it; or beside it the log-count
           ratios of the runs that end with it, and its place in the review)
    h_t  = a cell in one direction or both, over each segment of a review by itself
    v    = [max_t h_t ; mean_t h_t]     over all steps of all segments of the review
    z    = v · w + b                    positive where z > 0

After Johnson & Zhang (2016), whose LSTM reads one-hot words in chops and takes the maximum over
time. A batch is what ``chops`` takes from the data by a plan of ``data.chops``:

    "ids" [T, S]    "length", "slot" [S]    "label", "weight" [R]
    where the model reads them: "pairs" [T, S], "path" [T, S, K], "ratio" [F],
    "ratio_without" [2, F], "frequency" [V]

Letters: T steps of a chop, S segments, R reviews, E size of a vector, H hidden, G gates, V words,
P known runs of 2 to K words, F features of the wide path.
"""

from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from lstmjax import adversary, losses
from lstmjax.data import text
from lstmjax.data.word_runs import PLACES
from lstmjax.dropout import dropout, embedding_dropout, variational_dropout, word_dropout
from lstmjax.initializers import GateBias, uniform
from lstmjax.lstm import LSTMState
from lstmjax.models import glorot
from lstmjax.precision import in_bfloat16
from lstmjax.recurrence import Bidirectional, bidirectional, recur
from lstmjax.variants import VARIANTS

PATH_START = 0.04  # every weight of the wide path at the start: naive Bayes, scaled down


@dataclass(frozen=True)
class ReviewModel:
    """What the model is and how it is trained; its functions are below.

    Attributes:
      vocabulary_size: V.
      embedding: "vectors": words have vectors of ``embedding_size``, and the cell its W_x; "gates":
        a word has its x W_x itself, a row of all gates of both directions (Johnson & Zhang's
        one-hot words), for the cells lstm and cifg.
      embedding_size: E.
      normalise: whether words' vectors are shifted and scaled to mean 0 and variance 1 over the
        running text, by "frequency" (Miyato et al., 2017): else an adversary is outgrown.
      cell: one of ``variants.VARIANTS``.
      hidden_size: H, of each direction.
      both: both directions, or only forwards.
      pooling: "max", "mean" or "both".
      loss: "logistic", or "squared": (z − y)² with y = ±1.
      pairs: "none"; "input": the vector of a known pair is added to that of its second word;
        "path": see ``wide``.
      path_order: K.
      pairs_size: P.
      ratio_inputs: whether the log-count ratios of a word, and of the runs that end with it, are K
        more elements of its vector.
      place_inputs: whether ``data.word_runs.places`` are four more elements.
      word_dropout: rate of replacing a word by the unknown one.
      embedding_dropout: rate of dropping a word's vector, wherever it occurs in the batch.
      input_dropout: rate of dropping elements of the vectors, the same ones at all steps of a chop.
      dropout: rate on the pooled vector.
      path_dropout: rate on the terms of the wide path.
      path_loss: λ, how much the paths are trained each for itself; 0 for one sum, 1 for two models.
      deep_share: κ, by which the deep path's output is multiplied in the sum with the wide one.
      adversarial: ε of ``adversary.perturbation``, or 0.
      virtual: ε of ``adversary.virtual``, or 0.
      cell_init, forget_bias, method, unroll: as in ``lstm`` and ``init_lstm``.
      precision: "float32" or "bfloat16", of the recurrent layer's products.
    """

    vocabulary_size: int
    embedding: str = "vectors"
    embedding_size: int = 128
    normalise: bool = False
    cell: str = "lstm"
    hidden_size: int = 128
    both: bool = True
    pooling: str = "both"
    loss: str = "logistic"
    pairs: str = "none"
    path_order: int = 2
    pairs_size: int = 0
    ratio_inputs: bool = False
    place_inputs: bool = False
    word_dropout: float = 0.0
    embedding_dropout: float = 0.0
    input_dropout: float = 0.0
    dropout: float = 0.0
    path_dropout: float = 0.0
    path_loss: float = 0.0
    deep_share: float = 1.0
    adversarial: float = 0.0
    virtual: float = 0.0
    cell_init: str = "lstmjax"
    forget_bias: float | GateBias | None = None
    method: str = "fused"
    unroll: int = 1
    precision: str = "float32"

    @property
    def beside(self) -> dict[str, int]:
        """What a step reads beside the word's vector, by name in the batch: how many numbers."""
        ratios = {"ratios": self.path_order} if self.ratio_inputs else {}
        return ratios | ({"places": PLACES} if self.place_inputs else {})

    @property
    def directions(self) -> tuple[str, ...]:
        """The names of the recurrent layers' weights."""
        return ("forward", "backward") if self.both else ("forward",)

    def loss_fn(
        self, params: dict, batch: dict, key: jax.Array | None = None
    ) -> tuple[jax.Array, dict]:
        """The loss of a batch, for ``train.make_train_step``; without a key nothing is dropped.

            z = z_wide + κ z_deep
            J(x) = (1 − λ) L(z) + λ L(z_deep)
            J(x) + λ L(z_wide) + J(x + r) + KL(z ‖ z at x + r')

        Without a wide path, z = z_deep and λ = 0. r and r' are those of ``adversary``, in training
        alone; L(z) is what the metric "loss" has, too. Of two paths, "accuracy_deep" and
        "accuracy_wide" are those of their own signs. A review without a label (−1) has no L;
        those with one weigh 1 / "labelled_share", so that the mean of L is over them, that of KL
        over all.
        """
        keys = split_keys(key)
        xs = inputs(self, params, batch, keys)
        weight, label = batch["weight"].astype(xs.dtype), jnp.maximum(batch["label"], 0)
        known = (batch["label"] >= 0).astype(xs.dtype)
        if key is not None and "labelled_share" in batch:
            known = known / batch["labelled_share"].astype(xs.dtype)
        across = None
        if self.pairs == "path":
            across = wide(params, batch, len(label), keys.path, self.path_dropout)

        def answers(params, xs, across):
            alone = deep(self, params, xs, batch, keys)
            return alone, self.joined(alone, across)

        def judged(alone, z):
            loss = (1 - self.path_loss) * review_loss(self.loss, z, label)
            if self.path_loss:
                loss = loss + self.path_loss * review_loss(self.loss, alone, label)
            return known * loss

        alone, z = answers(params, xs, across)
        average = losses.total(known * review_loss(self.loss, z, label), weight)
        counted = batch["weight"] * (batch["label"] >= 0).astype(batch["weight"].dtype)
        correct = losses.total(losses.binary_correct(z, label), counted)
        loss = judged(alone, z)
        if self.path_loss:
            loss = loss + self.path_loss * known * review_loss(self.loss, across, label)
        # Nothing of how r comes about is differentiated.
        given, fixed = jax.lax.stop_gradient(((params, across), xs))
        if self.adversarial and key is not None:
            still = lambda xs: jnp.sum(weight * judged(*answers(given[0], xs, given[1])))  # noqa: E731
            r = adversary.perturbation(still, fixed, self.adversarial, batch)
            loss = loss + judged(*answers(params, xs + r, across))
        if self.virtual and key is not None:
            still = lambda xs: answers(given[0], xs, given[1])[1]  # noqa: E731
            r = adversary.virtual(still, fixed, self.virtual, batch, other_key(key))
            _, moved = answers(params, xs + r, across)
            loss = loss + adversary.divergence(jax.lax.stop_gradient(z), moved)
        mean = losses.mean(losses.total(loss, weight))
        metrics = {"loss": average, "accuracy": correct}
        if across is not None:  # what each path would be worth by itself
            for name, own in (("deep", alone), ("wide", across)):
                metrics[f"accuracy_{name}"] = losses.total(
                    losses.binary_correct(own, label), counted
                )
        return mean, metrics

    def joined(self, alone: jax.Array, across: jax.Array | None) -> jax.Array:
        """z of z_deep and z_wide, or None where there is no wide path: [R]."""
        return alone if across is None else across + self.deep_share * alone


# One key for each thing that is dropped; None drops nothing.
_Keys = namedtuple("_Keys", ("words", "embedding", "inputs", "pooled", "path"))


def split_keys(key: jax.Array | None) -> _Keys:
    """A key for each thing that is dropped, or None for all of them."""
    return _Keys(*(None,) * 5) if key is None else _Keys(*jax.random.split(key, 5))


def other_key(key: jax.Array) -> jax.Array:
    """A key for what is not dropped but drawn: none of ``split_keys``."""
    # Not fold_in(key, 1), which is split(key, n)[1] by JAX's default generator.
    return jax.random.fold_in(key, len(_Keys._fields))


def init(model: ReviewModel, key: jax.Array) -> dict[str, Any]:
    """Draws the weights.

    Returns:
      "embed" [V, E] or [V, 2GH] by Keras's law U(±0.05), "forward" and "backward" by the cell's own
      law, "kernel" [·, 1] glorot, "bias" [1] zero; "pairs" [P + 1, E] zero, "path" [F]
      ``PATH_START``, F = V + P.
    """
    of_table, of_kernel, *of_cells = jax.random.split(key, 2 + len(model.directions))
    draw = partial(VARIANTS[model.cell].init, hidden_size=model.hidden_size, init=model.cell_init)
    law = {} if model.forget_bias is None else {"forget_bias": model.forget_bias}
    size, params = model.embedding_size, {}
    read = size + sum(model.beside.values())
    for name, of_cell in zip(model.directions, of_cells, strict=True):
        weights = draw(of_cell, read, **law)._asdict()
        params[name] = {field: w for field, w in weights.items() if w is not None}
    if model.embedding == "gates":
        size = sum(len(params[name]["b"]) for name in model.directions)
        for name in model.directions:
            del params[name]["w_x"]
    pooled = len(model.directions) * model.hidden_size * (2 if model.pooling == "both" else 1)
    params["embed"] = uniform(0.05)(of_table, (model.vocabulary_size, size), jnp.float32)
    params["kernel"] = glorot(of_kernel, (pooled, 1), jnp.float32)
    params["bias"] = jnp.zeros(1, jnp.float32)
    if model.pairs == "input":
        params["pairs"] = jnp.zeros((model.pairs_size + 1, size), jnp.float32)
    if model.pairs == "path":
        params["path"] = jnp.full(model.vocabulary_size + model.pairs_size, PATH_START, jnp.float32)
    return params


# ---- batches ------------------------------------------------------------------------------------


def chops(steps: int) -> Callable:
    """Builds ``take(data, pick)``, a batch of one entry of a plan of ``data.chops.lay_out``.

    Args:
      steps: T, at least as many as any segment has.

    Returns:
      ``take``: ``data`` has "ids" [total] and "label" [N]; "pairs" [total], "ratios", "places"
      and "path" [total, ·] are cut like ids, and what else there is goes into every batch as it is.
    """

    def take(data: dict[str, jax.Array], pick: dict[str, jax.Array]) -> dict[str, jax.Array]:
        t = jnp.arange(steps, dtype=jnp.int32)[:, None]
        valid = t < pick["length"][None]
        place = jnp.where(valid, pick["begin"][None] + t, 0)
        batch = dict(data) | {name: pick[name] for name in ("length", "slot", "weight")}
        batch["label"] = data["label"][pick["rows"]]
        for name in ("ids", "pairs", "ratios", "places", "path"):
            if name in data:
                taken = data[name][place]
                where = valid.reshape(*valid.shape, *[1] * (taken.ndim - 2))
                batch[name] = jnp.where(where, taken, 0)  # 0 is the padding, and no feature
        return batch

    return take


# ---- the deep path ------------------------------------------------------------------------------


def inputs(model: ReviewModel, params: dict, batch: dict, keys: Any) -> jax.Array:
    """What the recurrent layer reads, [T, S, E + what is beside] or [T, S, 2GH]."""
    ids = batch["ids"]
    read = word_dropout(keys.words, ids, model.word_dropout, text.UNKNOWN, keep_id=text.PADDING)
    table = params["embed"]
    if model.normalise:
        table = normalised(table, batch["frequency"])
    xs = table[read]
    if keys.embedding is not None and model.embedding_dropout:
        ones = jnp.ones((len(table), 1), xs.dtype)  # a mask of words: cheaper than a whole table
        xs = xs * embedding_dropout(keys.embedding, ones, model.embedding_dropout)[read]
    if model.pairs == "input":
        gone = read != ids  # with either word of a pair, the pair
        gone = gone | jnp.concatenate([jnp.zeros_like(gone[:1]), gone[:-1]])
        there = (batch["pairs"] > 0) & ~gone
        xs = xs + params["pairs"][batch["pairs"]] * there[:, :, None].astype(xs.dtype)
    xs = variational_dropout(keys.inputs, xs, model.input_dropout)
    beside = [batch[name].astype(xs.dtype) for name in model.beside]  # nothing drops these
    return jnp.concatenate([xs, *beside], axis=2) if beside else xs


def normalised(table: jax.Array, frequency: jax.Array) -> jax.Array:
    """(v − mean) / √(variance + 1e-6) of vectors [V, E], weighted by frequency [V], of sum 1.

    Miyato, Dai & Goodfellow (2017), equation 1.
    """
    frequency = frequency.astype(table.dtype)
    mean = (frequency @ table)[None]
    variance = (frequency @ jnp.square(table - mean))[None]
    return (table - mean) * jax.lax.rsqrt(variance + 1e-6)


def deep(model: ReviewModel, params: dict, xs: jax.Array, batch: dict, keys: Any) -> jax.Array:
    """z of each review from what the recurrent layer reads: [R]."""
    hs = outputs(model, params, xs, batch["length"])
    v = pooled(model.pooling, hs, batch["length"], batch["slot"], len(batch["label"]))
    if keys.pooled is not None:  # used again on purpose: what is perturbed is dropped alike
        v = dropout(jax.random.clone(keys.pooled), v, model.dropout)
    return (v @ params["kernel"])[:, 0] + params["bias"]


def outputs(model: ReviewModel, params: dict, xs: jax.Array, lengths: jax.Array) -> jax.Array:
    """The recurrent layer's outputs, both directions side by side: [T, S, 2H], float32 or more."""
    if model.embedding == "gates":
        size = xs.shape[-1] // len(model.directions)
        parts = []
        for number, name in enumerate(model.directions):
            w_h, b = params[name]["w_h"], params[name]["b"]
            own = xs[..., number * size : (number + 1) * size]
            how = (model.cell == "cifg", name == "backward", model.unroll)
            parts.append(from_sums(how, w_h, b, own, lengths))
        return jnp.concatenate(parts, axis=-1)
    kind, _, layer = VARIANTS[model.cell]
    layer = layer if model.precision == "float32" else partial(in_bfloat16, layer)
    weights = [kind(**dict.fromkeys(kind._fields) | params[name]) for name in model.directions]
    how = {"lengths": lengths, "method": model.method, "unroll": model.unroll}
    if model.both:
        _, hs = bidirectional(layer, Bidirectional(*weights), xs, **how)
    else:
        _, hs = layer(weights[0], xs, **how)
    return hs.astype(xs.dtype)


def pooled(how: str, hs: jax.Array, lengths: jax.Array, slot: jax.Array, reviews: int) -> jax.Array:
    """The maximum, the mean, or both, over all valid steps of a review's segments.

    Args:
      how: "max", "mean" or "both".
      hs: [T, S, H].
      lengths: [S], valid steps of each segment.
      slot: [S], the review of each segment; ``reviews`` or more is none.
      reviews: R.

    Returns:
      [R, H] or [R, 2H], 0 of a review without steps.
    """
    valid = (jnp.arange(len(hs), dtype=lengths.dtype)[:, None] < lengths[None])[:, :, None]
    count = jax.ops.segment_sum(lengths, slot, reviews)[:, None]
    parts = []
    if how in ("max", "both"):
        best = jnp.max(jnp.where(valid, hs, -jnp.inf), axis=0)
        best = jax.ops.segment_max(best, slot, reviews)
        parts.append(jnp.where(count > 0, best, jnp.zeros_like(best)))
    if how in ("mean", "both"):
        added = jnp.sum(jnp.where(valid, hs, jnp.zeros_like(hs)), axis=0)
        added = jax.ops.segment_sum(added, slot, reviews)
        parts.append(added / jnp.maximum(count, 1).astype(hs.dtype))
    return jnp.concatenate(parts, axis=-1)


def review_loss(kind: str, z: jax.Array, label: jax.Array) -> jax.Array:
    """The loss of each review: z [R] and labels [R] in {0, 1} give [R]."""
    if kind == "squared":
        return jnp.square(z - (2 * label - 1).astype(z.dtype))
    return losses.binary_cross_entropy(z, label)


# ---- the wide path ------------------------------------------------------------------------------


def wide(params: dict, batch: dict, reviews: int, key: jax.Array | None, rate: float) -> jax.Array:
    """z of each review from the words and the runs of them that it has, in whatever order: [R].

        z_wide = Σ_f w_f r_f      over its distinct words and known runs f

    r are log-count ratios (Wang & Manning, 2012), w is learned: their NB-SVM as a part of the
    network, a wide path beside the deep one (Cheng et al., 2016). Each term is dropped at the
    ``rate``. What is scored is one model with one logit, z_wide + κ z_deep, trained together; but
    the closer ``path_loss`` is to 1, the closer it is to an ensemble of two models that are trained
    side by side, and what it reaches is not what a recurrent layer reaches.

    With a key, in training, "ratio_without", if there, stands for "ratio": without the review.
    """
    features, slot = batch["path"], batch["slot"]  # the ratio of feature 0, which is none, is 0
    ratio = batch["ratio"][features]
    if key is not None and "ratio_without" in batch:
        label = batch["label"][jnp.minimum(slot, reviews - 1)]
        ratio = batch["ratio_without"][label[None, :, None], features]
    terms = dropout(key, params["path"][features] * ratio.astype(params["path"].dtype), rate)
    return jax.ops.segment_sum(jnp.sum(terms, axis=(0, 2)), slot, reviews)


# ---- words straight into the gates --------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def from_sums(
    how: tuple[bool, bool, int], w_h: jax.Array, b: jax.Array, sums: jax.Array, lengths: jax.Array
) -> jax.Array:
    """The LSTM, or with coupled gates ``variants.cifg``, on x W_x that is there already.

        z_t = sums_t + h_{t-1} W_h + b

    The gradient of ``sums`` is dz; those of W_h and b are taken from it after the loop.

    Args:
      how: (coupled, reverse, unroll).
      w_h: [H, GH].
      b: [GH].
      sums: [T, S, GH].
      lengths: [S], valid steps.

    Returns:
      hs [T, S, H], 0 at invalid steps.
    """
    return _run_sums(how, w_h, b, sums, lengths)


def _run_sums(how, w_h, b, sums, lengths):
    coupled, reverse, unroll = how

    def step(state, z):
        z = z + state.h @ w_h + jnp.broadcast_to(b, z.shape)
        *gates, g, o = jnp.split(z, 3 if coupled else 4, axis=-1)
        i, f = gates if len(gates) == 2 else (gates[0], -gates[0])  # σ(−z) = 1 − σ(z)
        c = jax.nn.sigmoid(f) * state.c + jax.nn.sigmoid(i) * jnp.tanh(g)
        return LSTMState(jax.nn.sigmoid(o) * jnp.tanh(c), c)

    zeros = [jnp.zeros((sums.shape[1], len(w_h)), sums.dtype) for _ in range(2)]
    over = {"lengths": lengths, "reverse": reverse, "unroll": unroll}
    return recur(step, LSTMState(*zeros), sums, **over)[1]


def _sums_forward(how, w_h, b, sums, lengths):
    hs, pull = jax.vjp(lambda sums: _run_sums(how, w_h, b, sums, lengths), sums)
    return hs, (pull, hs)


def _sums_backward(how, kept, bar):
    pull, hs = kept
    (dz,) = pull(bar)
    # h before each step; the state is 0 before the first valid one, and so is hs at invalid ones.
    none = jnp.zeros_like(hs[:1])
    before = jnp.concatenate([hs[1:], none] if how[1] else [none, hs[:-1]])
    return jnp.einsum("tsh,tsg->hg", before, dz), jnp.sum(dz, axis=(0, 1)), dz, None


from_sums.defvjp(_sums_forward, _sums_backward)
