"""What the programs of all frameworks in peers.py have to leave, whichever trains them."""

import numpy as np

from lstmjax import tables
from lstmjax.data.dataset import make_dataset
from lstmjax.train import Clock

ROWS = ["imdb-tf2", "imdb-tf2-source", "mnist-tf1", "mnist-corrected"]


def examples(count, field, shape, high):
    """So many examples with labels: image as uint8 or ids as int32, below high."""
    random = np.random.default_rng(count)
    values = random.integers(0, high, (count, *shape))
    dtype = np.uint8 if field == "image" else np.int32
    label = random.integers(0, 10 if field == "image" else 2, count).astype(np.int32)
    return {field: values.astype(dtype), "label": label}


def check_scores(programs, config, monkeypatch, counted):
    """Trains a row on few examples and looks at all that it leaves and asks for.

    Args:
      programs: peer_keras or peer_torch.
      config: of peers.py, on offline data with seed 6.
      monkeypatch: pytest's.
      counted: by split, of how many examples an epoch's accuracy has to be a share.
    """
    row, asked = config.row, {}
    field, shape, high = ("ids", (80,), 10_000) if "imdb" in row else ("image", (28, 28), 256)

    def load(source, **options):
        asked.update(options, source=source)
        sizes = {"train": 130, "validation": options.get("validation_size", 9) and 9, "test": 21}
        splits = {name: examples(size, field, shape, high) for name, size in sizes.items()}
        return make_dataset("small", "offline", splits)

    def spy(problem, *arguments, fit_and_score=programs.fit_and_score):
        asked["loss"] = problem.loss
        return fit_and_score(problem, *arguments)

    monkeypatch.setattr(programs, "fit_and_score", spy)
    monkeypatch.setattr(getattr(programs.peer_tasks, row.partition("-")[0]), "load", load)
    clock = Clock()
    dataset, metrics = programs.PROGRAMS[row](config, clock)
    epochs = 4 if "imdb" in row else 10
    every = row in ("imdb-tf2-source", "mnist-tf1")
    for key, _, _ in tables.ROWS[row].metrics:
        assert key in metrics
    assert len(metrics["test_accuracy_epochs"]) == (epochs if every else 1)
    assert len(metrics["train_loss_epochs"]) == epochs
    assert ("validation_accuracy" in metrics) == (row != "imdb-tf2-source")
    for split, count in counted.items():  # each example counts once
        found = count * np.asarray(metrics.get(f"{split}_accuracy_epochs", 0.0))
        np.testing.assert_allclose(found, np.round(found), atol=1e-4)
    assert (asked.pop("loss") is programs.double_softmax) == (row == "mnist-tf1")
    expected = {"source": "offline"}
    if "imdb" in row:
        expected |= {"seed": 6, "validation_size": 0 if row == "imdb-tf2-source" else 2500}
    assert asked == expected and dataset.name == "small"
    after_each = clock.seconds.pop("train_epochs")
    assert after_each == sorted(set(after_each)) and len(after_each) == epochs
    assert after_each[-1] == clock.seconds["train"]
    assert all(value > 0 for value in clock.seconds.values())
