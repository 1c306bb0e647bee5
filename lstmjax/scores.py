"""A run's losses and accuracies, split by split and epoch by epoch."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from lstmjax import checkpoint, distributed, losses, plots
from lstmjax.provenance import count_parameters
from lstmjax.records import Run, params_sha256


def say(epoch: int, split: str, values: Mapping[str, str]) -> None:
    """Prints a split's values, by metric, after an epoch: one process does, above its bar."""
    if distributed.is_main():
        shown = ", ".join(f"{name} {value}" for name, value in values.items())
        tqdm.write(f"epoch {epoch}: {split} {shown}")


def means(metrics: Mapping[str, Any]) -> dict[str, float]:
    """``losses.means`` of training steps: NaN where all of them were skipped, and none counts."""
    counted = {name: np.sum(count) > 0 for name, (_, count) in metrics.items()}
    found = losses.means(metrics)
    return {name: value if counted[name] else math.nan for name, value in found.items()}


class Scores:
    """Collects the means of each split after each epoch, and logs and prints them as they come.

    Attributes:
      epochs: {split: {metric: [(epoch, value), …]}} so far.
      updates: when scores were last added; None before.
    """

    def __init__(self, folder: Run):
        """Args: folder: the run whose metrics.jsonl gets a line for every split and epoch."""
        self._folder = folder
        self.updates: int | None = None
        self.epochs: dict[str, dict[str, list[tuple[int, float]]]] = {}

    def add(self, split: str, step: int, epoch: int, means: Mapping[str, float]) -> None:
        """Adds one split's means after an epoch.

        Args:
          split: "train", "validation" or "test".
          step: updates so far.
          epoch: epochs so far.
          means: value by metric.
        """
        self.updates = step
        for name, value in means.items():
            self.epochs.setdefault(split, {}).setdefault(name, []).append((epoch, value))
        line = {f"{split}_{name}": value for name, value in means.items()}
        self._folder.log(step, epoch=epoch, **line)
        say(epoch, split, {name: f"{value:.4f}" for name, value in means.items()})

    def last(self, split: str, name: str = "accuracy") -> float | None:
        """The newest value of a split's metric; None where the split is not scored."""
        points = self.epochs.get(split, {}).get(name)
        return points[-1][1] if points else None

    def metrics(self) -> dict[str, float | list[float]]:
        """{"test_accuracy": last value, "test_accuracy_epochs": [all values], …} for a record."""
        flat = {}
        for split, metrics in self.epochs.items():
            for name, points in metrics.items():
                values = [float(value) for _, value in points]  # from a checkpoint, NaN is a text
                flat |= {f"{split}_{name}": values[-1], f"{split}_{name}_epochs": values}
        return flat

    def curves(self, name: str) -> dict[str, tuple[list[int], list[float]]]:
        """{split: (epochs, values)} of one metric, for ``plots.learning_curve``."""
        drawn = {}
        for split, metrics in self.epochs.items():
            if name in metrics:
                epochs, values = zip(*metrics[name], strict=True)
                drawn[split] = (list(epochs), [float(value) for value in values])
        return drawn


def finish(
    folder: Run,
    scores: Scores,
    params: Any,
    *,
    title: str,
    dataset: Any,
    seconds: Mapping[str, float],
    seed: int,
    devices: Sequence[jax.Device],
    row: str | None,
    more: Mapping[str, Any] | None = None,
    updates: int | None = None,
) -> None:
    """Leaves what a classifier's run leaves, and prints its last line.

    Args:
      folder: the run.
      scores: with the metric "accuracy", of "test" among others.
      params: the final parameters.
      title: of the figure: which model, on which data.
      dataset: with ``title``, ``name``, ``source`` and ``sha256``.
      seconds, seed, devices, row: as in ``Run.finish``.
      more: further metrics for the record, or None.
      updates: as in ``Run.finish``. None: those of when scores were last added, which a run that
        was taken up again after its last epoch does not know.
    """
    params = jax.tree.map(np.asarray, params)
    checkpoint.save_params(folder.path / "params.safetensors", params)
    curves = scores.curves("accuracy")
    folder.figure("accuracy", plots.learning_curve(title, curves, "accuracy", xlabel="epoch"))
    metrics = scores.metrics() | dict(more or {})
    folder.finish(
        dataset=dataset,
        metrics=metrics,
        seconds=seconds,
        params_sha256=params_sha256(params),
        parameters=count_parameters(params),
        updates=scores.updates if updates is None else updates,
        seed=seed,
        devices=devices,
        row=row,
    )
    epochs = scores.epochs["test"]["accuracy"][-1][0]
    print(
        f"test accuracy {metrics['test_accuracy']:.4f} after {epochs} epochs on {dataset.title}, "
        f"{seconds['train']:.0f} s of training; record in {folder.path}"
    )
