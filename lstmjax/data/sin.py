"""The sine tasks: y = cos from x = sin step by step, and the next value of sin from the last 50."""

import math

import numpy as np

from lstmjax.data.dataset import Dataset, check_int, make_dataset

WINDOW = 50


def stateful_batches(
    num_batches: int, *, batch_size: int = 50, num_steps: int = 20, start: int = 0
) -> dict[str, np.ndarray]:
    """Overlapping batches whose rows go on where the same row of the batch before ended.

    Batch k holds the times start + k·T … start + k·T + B·T − 1, cut into B rows of T:
      t = arange(…) / (10π),  x = sin t,  y = cos t
    The start moves by T, not by B·T: row r of batch k + 1 is row r + 1 of batch k, and begins one
    step after row r of batch k ended, so the state of every row can be carried over.

    Args:
      num_batches: K ≥ 1.
      batch_size: B ≥ 1.
      num_steps: T ≥ 1.
      start: time of the first step, ≥ 0.

    Returns:
      `{"x": float32 [K, B, T, 1], "y": float32 [K, B, T, 1], "t": float32 [K, B, T]}`, x and y in
      [−1, 1]; computed in float64.

    Raises:
      ValueError: naming the argument that is not such an integer.
    """
    check_int("num_batches", num_batches, 1)
    check_int("batch_size", batch_size, 1)
    check_int("num_steps", num_steps, 1)
    check_int("start", start, 0)
    batch = start + num_steps * np.arange(num_batches)[:, None, None]
    row = num_steps * np.arange(batch_size)[None, :, None]
    t = (batch + row + np.arange(num_steps)[None, None, :]) / (10 * math.pi)
    x = np.sin(t)[..., None].astype(np.float32)
    y = np.cos(t)[..., None].astype(np.float32)
    return {"x": x, "y": y, "t": t.astype(np.float32)}


def forecast_windows(*, corrected: bool = True) -> dict[str, np.ndarray]:
    """All windows of 50 values of a sine, each with the value that follows.

    The series is sin of 1,000 times from −100 to 100. A series of n values has n − 50 windows
    with a successor: 950. The tutorial stops one early (`range(n − 50 − 1)`) and has 949.

    Args:
      corrected: False for the 949 windows of the tutorial.

    Returns:
      `{"x": float32 [N, 50, 1], "y": float32 [N, 1], "series": float64 [1000],
      "t": float64 [1000]}`, all values of x, y and series in [−1, 1].
    """
    if not isinstance(corrected, bool):
        raise ValueError(f"corrected: got {corrected!r}, expected True or False")
    t = np.linspace(-100.0, 100.0, 1000)
    series = np.sin(t)
    count = len(series) - WINDOW - (0 if corrected else 1)
    x = np.lib.stride_tricks.sliding_window_view(series, WINDOW)[:count]
    y = series[WINDOW : WINDOW + count]
    return {
        "x": x[..., None].astype(np.float32),
        "y": y[:, None].astype(np.float32),
        "series": series,
        "t": t,
    }


def dataset(arrays: dict[str, np.ndarray]) -> Dataset:
    """The arrays of `stateful_batches` or `forecast_windows` as a `Dataset` of one split, train."""
    return make_dataset("sin", "generated", {"train": dict(arrays)})
