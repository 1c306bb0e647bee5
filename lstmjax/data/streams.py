"""Streams whose targets need memory, cut into sequences that go on where they stopped.

**Bits.** What they are and what they are worth:

    x_t fair and independent,   P(y_t = 1) = 1/2 + x_{t-a}/2 − x_{t-b}/4,   a < b

After R2RT, "Recurrent neural networks in Tensorflow I" (2016), with a = 3 and b = 8. What a model
loses that knows neither bit, the nearer one or both follows from the four probabilities alone.

**Text.** The next character (`lstmjax.data.characters`).
"""

import math
import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lstmjax.data import characters
from lstmjax.data.dataset import Dataset, check_int, make_dataset

SKIPPED = 50  # steps of a test that warm the state up and do not count


class Streams(NamedTuple):
    """A task to learn, of ids among V; S seeds, N sequences of T steps and B rows.

    Attributes:
      xs, ys: int32 [S, N, T, B]: inputs and targets; row b of a sequence goes on in the next one.
      test_xs: int32 [SKIPPED + L, B'].
      test_ps: float32 [SKIPPED + L, B', V], how probable each target is.
      lags: int32 [SKIPPED + L, B'], above 0 where the target shows what was said so many steps
        before (`characters.Sentences`); None where nothing is known of that.
      levels: losses in nats a step that are known, each with what it is of.
      dataset: all of it, with its hash.
      title: for tables and figures.
    """

    xs: np.ndarray
    ys: np.ndarray
    test_xs: np.ndarray
    test_ps: np.ndarray
    lags: np.ndarray | None
    levels: tuple[tuple[float, str], ...]
    dataset: Dataset
    title: str

    @property
    def width(self) -> int:
        """V."""
        return self.test_ps.shape[-1]


def bits(
    rng: np.random.Generator, steps: int, rows: int, lags: tuple[int, int] = (3, 8)
) -> dict[str, np.ndarray]:
    """Rows of bits; what lies before the first step counts too, and is not shown.

    Args:
      rng: where they come from.
      steps: T ≥ 1.
      rows: B ≥ 1.
      lags: (a, b), 0 ≤ a < b.

    Returns:
      `{"x": int32 [T, B] in {0, 1}, "p": float64 [T, B], "y": int32 [T, B] in {0, 1}}`, with
      p = P(y = 1 | x).

    Raises:
      ValueError: naming the argument that does not fit.
    """
    check_int("steps", steps, 1)
    check_int("rows", rows, 1)
    near, far = lags
    check_int("lags[0]", near, 0)
    check_int("lags[1]", far, near + 1)
    drawn = rng.integers(0, 2, (far + steps, rows), np.int32)
    p = 0.5 + 0.5 * drawn[far - near : far - near + steps] - 0.25 * drawn[:steps]
    return {"x": drawn[far:], "p": p, "y": (rng.random(p.shape) < p).astype(np.int32)}


def levels() -> tuple[float, float, float]:
    """The entropy of y in nats: with nothing known of x, with the nearer bit, with both."""
    p = np.array([[0.5, 0.25], [1.0, 0.75]])  # P(y = 1) by the nearer and the farther bit
    return _entropy(p.mean()), _entropy(p.mean(axis=1)), _entropy(p)


def _entropy(p: np.ndarray) -> float:
    """The mean entropy in nats of bits that are 1 with probability p."""
    both = np.stack([p, 1 - p])
    logs = np.log(both, where=both > 0, out=np.zeros_like(both))
    return float(-np.sum(both * logs, axis=0).mean())


def toy(
    seeds: Sequence[int],
    size: tuple[int, int, int],
    test: tuple[int, int],
    lags: tuple[int, int] = (3, 8),
) -> Streams:
    """The bits, a stream of its own for each seed.

    Args:
      seeds: S numbers ≥ 0.
      size: (N, T, B).
      test: (L, B'), the same for all seeds; its probabilities are those of the rule, 0 to 1.
      lags: as in `bits`.

    Returns:
      The task; V = 2.

    Raises:
      ValueError: naming the argument that does not fit.
    """
    count, steps, rows = size
    each = [bits(np.random.default_rng([seed, 0]), count * steps, rows, lags) for seed in seeds]
    xs, ys = (np.stack([one[n] for one in each]).reshape(len(seeds), *size) for n in ("x", "y"))
    asked = bits(np.random.default_rng(20160711), SKIPPED + test[0], test[1], lags)
    test_ps = np.stack([1 - asked["p"], asked["p"]], axis=-1).astype(np.float32)
    splits = {"train": {"x": xs, "y": ys}, "test": {"x": asked["x"], "p": test_ps}}
    known = zip(levels(), ("neither bit", "the nearer bit", "both bits"), strict=True)
    title = f"bits that count after {lags[0]} and {lags[1]} steps"
    dataset = make_dataset("lagged_bits", "generated", splits)
    return Streams(xs, ys, asked["x"], test_ps, None, tuple(known), dataset, title)


def text(
    path: str | os.PathLike | None, seeds: int, size: tuple[int, int, int], test: tuple[int, int]
) -> Streams:
    """The next character, of the same text for all seeds.

    Args:
      path: as in `characters.load`; a file shorter than N·T·B is read again from its beginning.
      seeds: S.
      size: (N, T, B).
      test: (L, B'); fewer rows where the text does not suffice.

    Returns:
      The task.

    Raises:
      ValueError: not enough text for one row of the test.
      DataError: as `characters.load`.
    """
    count, steps, rows = size
    length = SKIPPED + test[0] + 1
    sizes = {"length": (count * steps + 1) * rows, "test_length": length * test[1]}
    dataset = characters.load(path, **sizes)
    given, asked = dataset.splits["train"], dataset.splits["test"]
    read = characters.rows(given["ids"], rows)
    read = np.resize(read, (count * steps + 1, rows))
    xs, ys = (np.broadcast_to(a.reshape(size), (seeds, *size)) for a in (read[:-1], read[1:]))
    test_rows = min(test[1], len(asked["ids"]) // length)
    if test_rows < 1:
        got = f"got {len(asked['ids'])} characters to test on"
        raise ValueError(f"text: {got}, expected at least {length}")

    def cut(name):
        return characters.rows(asked[name][: test_rows * length], test_rows)

    test_ps = np.eye(len(dataset.vocabulary), dtype=np.float32)[cut("ids")[1:]]
    lags, known = None, ()
    if "lags" in asked:
        lags = cut("lags")[1:]
        grammar = float(asked["nats"]) / len(asked["ids"])
        verbs = np.count_nonzero(asked["lags"]) / len(asked["ids"])
        known = (
            (grammar + float(verbs) * math.log(2), "the noun forgotten"),
            (grammar, "the grammar known"),
        )
    title = f"the next character of {dataset.title}"
    return Streams(xs, ys, cut("ids")[:-1], test_ps, lags, known, dataset, title)


def joined(datasets: Sequence[Dataset]) -> Dataset:
    """One data set, or several as one; generated if all of them are."""
    if len(datasets) == 1:
        return datasets[0]
    source = "generated" if all(one.source == "generated" for one in datasets) else "file"
    splits = {f"{one.name}, {split}": a for one in datasets for split, a in one.splits.items()}
    return make_dataset(" and ".join(one.name for one in datasets), source, splits)
