"""How experiments/reviews.py trains: step sizes, the optimiser, and which epoch's weights count.

``config`` is its configuration; what is read of it stands in each docstring.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lstmjax import train
from lstmjax.averages import averaged
from lstmjax.lane_classifiers import best_epoch
from lstmjax.scores import Scores


def make_schedule(config: Any, updates: int):
    """The step size of each update, from 0 on; at the last one it is still above 0.

    Args:
      config: with ``learning_rate``, ``schedule`` ("constant", "linear" or "cosine") and
        ``warm_up``, updates over which it rises.
      updates: how many there are.
    """
    falling = max(updates - config.warm_up, 1)

    def rate(count):
        count = count.astype(jnp.float32)
        done = jnp.clip((count - config.warm_up) / falling, 0, 1)
        left = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + jnp.cos(jnp.pi * done)) / 2}
        risen = jnp.minimum((count + 1) / max(config.warm_up, 1), 1)
        return config.learning_rate * risen * left[config.schedule]

    return rate


def make_optimiser(config: Any, updates: int) -> optax.GradientTransformation:
    """Clipping, Adam, decay, the schedule, and the average of all weights.

    Biases do not decay, and what each word or pair has of its own (vectors, weights of the wide
    path, "next_bias" of a language model) only with ``decay_embeddings``; all else does, gains of
    normalisations among it.

    Args:
      config: as for ``make_schedule``, with ``clip_norm``, ``weight_decay``, ``decay_embeddings``
        and ``average``.
      updates: how many there are.
    """

    def decays(params):
        fixed = {"bias", "b", "bias_c"}
        fixed |= set() if config.decay_embeddings else {"embed", "pairs", "path", "next_bias"}
        return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in fixed, params)

    tx = [optax.scale_by_adam()]
    if config.clip_norm is not None:
        tx.insert(0, optax.clip_by_global_norm(config.clip_norm))
    if config.weight_decay:
        tx.append(optax.add_decayed_weights(config.weight_decay, decays))
    tx = optax.chain(*tx, optax.scale_by_learning_rate(make_schedule(config, updates)))
    return averaged(tx, config.average) if config.average else tx


def scored(config: Any, state: train.TrainState) -> Any:
    """The weights that count: their average, if ``config.average`` is not 0."""
    return state.opt_state.mean if config.average else state.params


def best(config: Any, metrics: Any) -> int:
    """The best epoch on validation, from 1 on: by accuracy; of a language model by its loss."""
    if config.task == "language":
        found = np.array(metrics["validation_loss_epochs"], float)  # "nan" after a resume
        return 1 + int(np.argmin(np.where(np.isfinite(found), found, np.inf)))
    return best_epoch(metrics)


def score_of(config: Any, scores: Scores) -> float | None:
    """By which the newest epoch is the best so far, as ``best``; None without validation."""
    if config.task == "language":
        loss = scores.last("validation", "loss")
        return None if loss is None else -loss
    return scores.last("validation")


def chosen(config: Any, scores: Scores) -> dict[str, float]:
    """For the record, and said: which epoch's weights were tested."""
    if config.select == "last":
        return {}
    found = scores.metrics()
    epoch = best(config, found)
    names = ("accuracy", "loss")  # as numbers, for a resumed run may hold "nan"
    numbers = {name: float(found[f"validation_{name}_epochs"][epoch - 1]) for name in names}
    said = ", ".join(f"{name} {value:.4f}" for name, value in numbers.items())
    print(f"the weights are those of epoch {epoch}, validation {said}")
    return {"best_epoch": epoch, "best_validation_accuracy": numbers["accuracy"]}
