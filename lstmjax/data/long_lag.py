"""Tasks whose answer lies far back: adding, temporal order and copying, drawn afresh for ever.

Every function is pure: a split, a seed and an index give a batch, the same one each time. Positions
count from 0, so the position t of a paper that counts from 1 is t − 1 here. Letters: B sequences,
T the length that was asked for, L the length of the arrays.

    adding_hs        Hochreiter & Schmidhuber (1997), experiment 4
    temporal_order   Hochreiter & Schmidhuber (1997), experiments 6a and 6b
    adding           as Le, Jaitly & Hinton (2015) and Arjovsky, Shah & Bengio (2016) pose it
    copy_memory      Arjovsky, Shah & Bengio (2016)
"""

import numpy as np

from lstmjax.data.dataset import check_choice, check_int

Batch = dict[str, np.ndarray]

SPLITS = ("train", "validation", "test")

SYMBOLS = ("E", "B", "a", "b", "c", "d", "X", "Y")  # of temporal_order: id k is the k-th
PADDING = -1
_E, _B, _FIRST, _X = 0, 1, 2, 6  # the four from _FIRST on are distractors; Y is _X + 1
# First and last position of each X or Y, counted from 1 as the paper does.
_PLACES = {2: ((10, 20), (50, 60)), 3: ((10, 20), (33, 43), (66, 76))}
ORDER_LENGTHS = (100, 110)

COPIED = 10  # symbols to remember
KINDS = 8  # of symbols, ids 1 … 8
BLANK, DELIMITER = 0, KINDS + 1


def adding_hs(
    seed: int, index: int, *, batch_size: int, length: int, split: str = "train"
) -> Batch:
    """The adding problem of the LSTM's first paper.

        y = 0.5 + (X₁ + X₂)/4

    Each step has a value from U[−1, 1] and a marker. The length is uniform among the integers T …
    ⌊1.1 T⌋. One of the first ten pairs is marked by 1; its value is X₁. Then one of the first
    T/2 − 1 pairs still unmarked is marked, its value is X₂. The first and the last marker are −1,
    all others 0; where the first pair was chosen, it keeps its −1 and counts as 0.

    Args:
      seed: of the stream, ≥ 0.
      index: which batch, ≥ 0.
      batch_size: B ≥ 1.
      length: T ≥ 20.
      split: "train", "validation" or "test": three streams of their own.

    Returns:
      `{"x": float32 [B, ⌊1.1 T⌋, 2], "y": float32 [B, 1], "lengths": int32 [B]}`: value and marker,
      zeros beyond the end; y in [0, 1].

    Raises:
      ValueError: naming the argument that cannot be used.
    """
    check_int("length", length, 20)
    rng = _stream(seed, index, batch_size, split)
    rows, longest = np.arange(batch_size), length + length // 10
    lengths = rng.integers(length, longest + 1, batch_size)
    values = rng.uniform(-1.0, 1.0, (batch_size, longest))
    first = rng.integers(0, 10, batch_size)
    # Without the pair that is marked already, T/2 − 1 of the first T/2 are left.
    second = rng.integers(0, length // 2 - 1, batch_size)
    second += second >= first
    counted = values.copy()
    counted[:, 0] = 0.0
    total = counted[rows, first] + counted[rows, second]
    markers = np.zeros_like(values)
    markers[rows, first] = markers[rows, second] = 1.0
    markers[:, 0] = markers[rows, lengths - 1] = -1.0
    x = np.stack([values, markers], axis=-1)
    x[np.arange(longest) >= lengths[:, None]] = 0.0
    y = 0.5 + total[:, None] / 4
    return {"x": _single(x), "y": _single(y), "lengths": lengths.astype(np.int32)}


def adding_hs_baseline(length: int) -> float:
    """The mean squared error of always answering 0.5, the target's mean, in ``adding_hs``."""
    check_int("length", length, 20)
    # X₁ and X₂ have the variance 1/3, or are 0 where the first pair was chosen.
    second = 0.9 / (length // 2 - 1)
    return (0.9 + 1 - second) / 48


def temporal_order(
    seed: int, index: int, *, batch_size: int, symbols: int = 2, split: str = "train"
) -> Batch:
    """Which of X and Y came first, second (and third), among distractors.

    A sequence of 100 to 110 symbols starts with E, ends with B, and has random a, b, c, d between
    but for two or three places, each X or Y: the first between the 10th and the 20th symbol, the
    second between the 50th and the 60th; of three, the second between the 33rd and the 43rd, the
    third between the 66th and the 76th. The class is the order, read as a binary number in which
    X is 0 and Y is 1, the first symbol as its highest digit.

    Args:
      seed, index, batch_size, split: as in ``adding_hs``.
      symbols: 2 (experiment 6a, four classes) or 3 (6b, eight classes).

    Returns:
      `{"x": int32 [B, 110], "y": int32 [B], "lengths": int32 [B]}`: x are places in `SYMBOLS`, −1
      beyond the end.

    Raises:
      ValueError: naming the argument that cannot be used.
    """
    check_int("symbols", symbols, 2, 3)
    rng = _stream(seed, index, batch_size, split)
    rows, (shortest, longest) = np.arange(batch_size), ORDER_LENGTHS
    lengths = rng.integers(shortest, longest + 1, batch_size)
    x = rng.integers(_FIRST, _X, (batch_size, longest))
    y = np.zeros(batch_size, int)
    for low, high in _PLACES[symbols]:
        place, is_y = rng.integers(low - 1, high, batch_size), rng.integers(0, 2, batch_size)
        x[rows, place] = _X + is_y
        y = 2 * y + is_y
    x[:, 0], x[rows, lengths - 1] = _E, _B
    x[np.arange(longest) >= lengths[:, None]] = PADDING
    return {name: a.astype(np.int32) for name, a in (("x", x), ("y", y), ("lengths", lengths))}


def adding(seed: int, index: int, *, batch_size: int, length: int, split: str = "train") -> Batch:
    """The adding problem as it is posed today: the sum of the two marked values.

    Values are from U[0, 1], and all sequences have T steps. One marker is 1 among the first ⌊T/2⌋
    steps and one among the others; all others are 0. Always answering 1, the mean, has a mean
    squared error of 1/6.

    Args:
      seed, index, batch_size, split: as in ``adding_hs``.
      length: T ≥ 2.

    Returns:
      `{"x": float32 [B, T, 2], "y": float32 [B, 1]}`: value and marker; y in [0, 2].

    Raises:
      ValueError: naming the argument that cannot be used.
    """
    check_int("length", length, 2)
    rng = _stream(seed, index, batch_size, split)
    rows, half = np.arange(batch_size), length // 2
    values = rng.uniform(0.0, 1.0, (batch_size, length))
    markers = np.zeros_like(values)
    markers[rows, rng.integers(0, half, batch_size)] = 1.0
    markers[rows, rng.integers(half, length, batch_size)] = 1.0
    y = np.sum(values * markers, axis=1, keepdims=True)
    return {"x": _single(np.stack([values, markers], axis=-1)), "y": _single(y)}


def copy_memory(
    seed: int, index: int, *, batch_size: int, length: int, split: str = "train"
) -> Batch:
    """Ten symbols, a long wait, and the same ten symbols again.

        x = s₁ … s₁₀, T − 1 blanks, the delimiter, 10 blanks
        y = T + 10 blanks, s₁ … s₁₀

    The symbols are uniform among eight. Without memory, the best mean cross-entropy over all steps
    is 10 ln 8/(T + 20) nats: sure of the blanks, and guessing the symbols.

    Args:
      seed, index, batch_size, split: as in ``adding_hs``.
      length: T ≥ 1.

    Returns:
      `{"x": int32 [B, T + 20], "y": int32 [B, T + 20]}`: the blank is 0, symbols are 1 … 8, and the
      delimiter, in x alone, is 9.

    Raises:
      ValueError: naming the argument that cannot be used.
    """
    check_int("length", length, 1)
    rng = _stream(seed, index, batch_size, split)
    symbols = rng.integers(1, KINDS + 1, (batch_size, COPIED))
    x, y = (np.full((batch_size, length + 2 * COPIED), BLANK, np.int32) for _ in range(2))
    x[:, :COPIED] = y[:, -COPIED:] = symbols
    x[:, length + COPIED - 1] = DELIMITER
    return {"x": x, "y": y}


def _stream(seed: int, index: int, batch_size: int, split: str) -> np.random.Generator:
    """The random numbers of one batch, after a look at what all tasks are asked for."""
    check_int("seed", seed, 0)
    check_int("index", index, 0)
    check_int("batch_size", batch_size, 1)
    check_choice("split", split, SPLITS)
    return np.random.default_rng([SPLITS.index(split), seed, index])


def _single(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32)
