"""A bag of vectors: the mean of a text's vectors, and a logistic layer (fastText).

    z = v · (1/n) Σ u_f + b,   f the text's n n-grams          (Joulin et al., 2016; two classes)

It knows of no order but that within an n-gram: what an LSTM has to beat. Several are trained in one
program, each with rows and a seed of its own.

Letters: B batch, L n-grams of the longest text, F known n-grams, E size of a vector, S seeds.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from lstmjax import lanes, losses, optim, train
from lstmjax.initializers import uniform
from lstmjax.models import glorot
from lstmjax.records import RunError


def logits(params: Mapping, ids: jax.Array, seen: jax.Array | None = None) -> jax.Array:
    """z of each text, [B].

    Args:
      params: "vectors" [F + 1, E], "kernel" [E, 1] and "bias" [1].
      ids: int32 [B, L], an n-gram's number plus 1, or 0 for none; from ``data.ngrams.padded``.
      seen: bool [F]: the n-grams that count; all when not given.

    Returns:
      [B] in the parameters' dtype; b of a text without n-grams.
    """
    vectors, ids = jnp.asarray(params["vectors"]), jnp.asarray(ids)
    counted = ids > 0 if seen is None else (ids > 0) & jnp.asarray(seen)[ids - 1]
    weight = counted.astype(vectors.dtype)
    count = jnp.sum(weight, axis=1, keepdims=True)
    mean = jnp.einsum("bl,ble->be", weight, vectors[ids]) / jnp.maximum(count, 1)
    return (mean @ params["kernel"])[:, 0] + params["bias"]


def loss_fn(
    params: Mapping, batch: Mapping, key: Any = None, seen: jax.Array | None = None
) -> tuple[jax.Array, dict]:
    """Binary cross-entropy and accuracy of a batch of "ids", "label" and "weight"."""
    z = logits(params, batch["ids"], seen)
    loss = losses.total(losses.binary_cross_entropy(z, batch["label"]), batch["weight"])
    accuracy = losses.total(losses.binary_correct(z, batch["label"]), batch["weight"])
    return losses.mean(loss), {"loss": loss, "accuracy": accuracy}


@dataclass(frozen=True)
class Bag:
    """How bags are made and trained; with what ``lanes.Program`` reads of a configuration.

    Attributes:
      features: F.
      embedding_size: E.
      learning_rate: Adam's step size.
      batch_size: texts in a batch.
      seed: of the first one's parameters and order of batches.
      seeds: S, how many, with the seeds from ``seed`` on.
    """

    features: int
    embedding_size: int
    learning_rate: float
    batch_size: int
    seed: int = 0
    seeds: int = 1
    sweep: None = None
    deterministic: bool = False

    def start(self) -> train.TrainState:
        """The state before the first step: Keras's laws for embeddings and dense layers."""
        of_vectors, of_kernel, key = jax.random.split(jax.random.key(self.seed), 3)
        size = self.embedding_size
        params = {
            "vectors": uniform(0.05)(of_vectors, (self.features + 1, size), jnp.float32),
            "kernel": glorot(of_kernel, (size, 1), jnp.float32),
            "bias": jnp.zeros(1, jnp.float32),
        }
        return train.init_state(params, optim.tf_adam(self.learning_rate), key)

    def program(
        self, data: Mapping[str, np.ndarray], devices: Sequence[jax.Device], clock: train.Clock
    ) -> lanes.Program:
        """The training of all seeds on ``data``, "ids" [N, L] and "label" [N]."""

        def make_step(settings):
            return train.make_train_step(loss_fn, optim.tf_adam(settings.learning_rate))

        return lanes.Program(self, devices, clock, start=Bag.start, make_step=make_step, data=data)

    def train(
        self, program: lanes.Program, rows: Sequence[np.ndarray], epochs: int, name: str
    ) -> Iterator[float]:
        """Trains each seed on its rows; yields the mean loss of every epoch when it is over.

        Args:
          program: from ``program``.
          rows: [S] arrays of as many rows.
          epochs: how many.
          name: for the progress bar, which is there where somebody watches.

        Raises:
          RunError: a loss is not finite.
        """
        size = sum(map(len, rows))
        with tqdm(total=epochs * size, unit=" reviews", desc=name, disable=None) as bar:
            for epoch in range(1, epochs + 1):
                seen = train.Tally()
                for plans in lanes.pieces(program.lanes, rows, epoch, self.batch_size):
                    for metrics in program.advance(plans):
                        seen.add(metrics)
                        bar.update(int(metrics["loss"][1].sum()))
                loss = losses.means(seen.take())["loss"]
                if not math.isfinite(loss):
                    raise RunError(f"the loss of epoch {epoch} is {loss}: train in smaller steps")
                yield loss


def evaluator(clock: train.Clock) -> Callable:
    """Builds ``score(program, arrays, rows, seen=None) -> [accuracy of each seed]``.

    Args:
      clock: where the seconds go.

    Returns:
      ``score``: ``arrays`` and ``rows`` as in ``lanes.evaluator``; ``seen`` is bool [F] of each
      seed, the n-grams that its bag has met in training; all when not given.
    """

    def metrics(pair, batch):
        params, seen = pair
        return loss_fn(params, batch, seen=seen)[1]

    evaluate = lanes.evaluator(metrics, clock)

    def score(program, arrays, rows, seen=None):
        every = [np.ones(len(params["vectors"]) - 1, bool) for params in program.params()]
        pairs = list(zip(program.params(), every if seen is None else seen, strict=True))
        return [means["accuracy"] for means in evaluate(program, pairs, arrays, rows)]

    return score
