"""What the programs of peers.py share in whatever framework: arrays, epochs and scores."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lstmjax.data import Dataset, imdb, mnist
from lstmjax.train import Clock

Metrics = dict[str, float | list[float]]
Result = tuple[Dataset, Metrics]
Arrays = dict[str, tuple[np.ndarray, np.ndarray]]  # split → inputs, labels
REVIEW_EPOCHS, DIGIT_EPOCHS = 4, 10


def reviews(config: Any, as_published: bool) -> tuple[Dataset, Arrays]:
    """IMDB: ids int32 [N, 80] of the last words, and labels int32 [N], by split.

    Args:
      config: with ``data``, ``seed`` and ``limit``.
      as_published: whether all training reviews train, and validation is empty.
    """
    held_out = 0 if as_published else 2_500
    dataset = imdb.load(config.data, validation_size=held_out, seed=config.seed).first(config.limit)
    return dataset, {name: (s["ids"], s["label"]) for name, s in dataset.splits.items()}


def digits(config: Any) -> tuple[Dataset, Arrays]:
    """MNIST: rows of pixels float32 [N, 28, 28] in [0, 1], labels int32 [N]; config as above."""
    dataset = mnist.load(config.data).first(config.limit)
    splits = {n: (np.float32(s["image"]) / 255, s["label"]) for n, s in dataset.splits.items()}
    return dataset, splits


def score_epochs(
    epochs: int,
    train: Callable[[], Mapping[str, float]],
    evaluate: Callable[[str], Mapping[str, float]],
    splits: Mapping[str, tuple],
    test_every_epoch: bool,
    clock: Clock,
) -> Metrics:
    """Trains; scores validation, where there is any, after every epoch, and test when it is due.

    Args:
      epochs: how many.
      train: one epoch; its mean "loss" and "accuracy".
      evaluate: the same of a split, by its name.
      splits: inputs and labels by split.
      test_every_epoch: whether test is due after every epoch, or after the last alone.
      clock: on which ``train`` and ``evaluate`` have spent their seconds.
    """
    metrics = {}
    for epoch in range(1, epochs + 1):
        scores = {"train": train()}
        clock.end_epoch()
        due = ["validation"] if len(splits["validation"][1]) else []
        due += ["test"] if test_every_epoch or epoch == epochs else []
        scores |= {split: evaluate(split) for split in due}
        for split, means in scores.items():
            for name, value in means.items():
                metrics[f"{split}_{name}"] = value
                metrics.setdefault(f"{split}_{name}_epochs", []).append(value)
        print(f"epoch {epoch}: " + ", ".join(f"{s} {m['accuracy']:.4f}" for s, m in scores.items()))
    return metrics


if __name__ == "__main__":
    import peers

    peers.no_script(__file__)
