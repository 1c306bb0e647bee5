"""The figure of experiments/long_lag.py: how cells learn a task, with bands over seeds.

As in plots.py: arrays in, a matplotlib Figure out that belongs to nobody else, colours that
colour-blind readers can tell apart, and dashes that say the same.
"""

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter
from numpy.typing import ArrayLike

from lstmjax.seeds import interval

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_DASHES = ("-", "--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)), (0, (8, 3)))
_INK, _GRID = "#222222", "#E3E3E3"
Curves = Mapping[str, tuple[ArrayLike, ArrayLike]]


def curves(title: str, panels: Mapping[str, Curves], loss: str, baseline: float) -> Figure:
    """Held-out loss and share of wrong answers over training, a colour for each cell.

    A line is the mean over seeds and its band the mean's 95 % interval, of the logarithm where the
    axis is logarithmic. Faint lines are the seeds themselves.

    Args:
      title: which task.
      panels: "loss" and "wrong": by cell, ``(updates [N], values [S, N])``; wrong is in 0 … 1.
      loss: what the loss is, with its unit.
      baseline: the loss of the best answer that remembers nothing, > 0: a dashed line.

    Returns:
      The figure, of two axes.

    Raises:
      ValueError: no cell, or values that do not fit their updates.
    """
    if not panels["loss"]:
        raise ValueError("panels: got no cell, expected at least one")
    figure = Figure(figsize=(7, 5.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, sharex=True, height_ratios=(3, 2))
    upper.set_yscale("log")
    for number, (cell, (updates, values)) in enumerate(panels["loss"].items()):
        _draw(upper, number, cell, updates, _positive(values), logarithm=True)
    upper.axhline(baseline, color=_INK, linestyle="--", linewidth=1, label="without memory")
    for number, (cell, (updates, values)) in enumerate(panels["wrong"].items()):
        _draw(lower, number, cell, updates, 100 * np.asarray(values, float), logarithm=False)
    # By the seeds: a band of few of them can be many decades wide, and would flatten all else.
    drawn = [_positive(values).ravel() for _, values in panels["loss"].values()]
    drawn = np.concatenate([*drawn, [baseline]])
    upper.set_ylim(np.nanmin(drawn) / 1.5, np.nanmax(drawn) * 1.5)
    upper.set_ylabel(f"held-out {loss}")
    lower.set_ylabel("wrong answers (%)")
    lower.set_ylim(-3, 103)
    lower.set_xlabel("updates")
    lower.xaxis.set_major_locator(MaxNLocator(integer=True))
    lower.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    for axes in (upper, lower):
        axes.grid(color=_GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    place = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0.2}
    upper.legend(ncols=3, frameon=False, fontsize="small", **place)
    rows = -(-(len(panels["loss"]) + 1) // 3)
    upper.set_title(title, loc="left", fontsize="medium", color=_INK, pad=8 + 15 * rows)
    return figure


def _positive(values: ArrayLike) -> np.ndarray:
    """Losses for a logarithmic axis, on which neither 0 nor infinity has a place."""
    values = np.asarray(values, float)
    return np.where((values > 0) & np.isfinite(values), values, np.nan)


def _draw(
    axes: Axes, number: int, cell: str, updates: ArrayLike, values: np.ndarray, logarithm: bool
) -> None:
    """The seeds of a cell, their mean and its band."""
    updates = np.asarray(updates, float)
    if values.ndim != 2 or values.shape[1:] != updates.shape:
        shapes = f"got {values.shape} for {cell!r}, expected [S, {len(updates)}]"
        raise ValueError(f"panels: {shapes}")
    colour = _COLOURS[number % len(_COLOURS)]
    for curve in values:
        axes.plot(updates, curve, color=colour, linewidth=0.6, alpha=0.35)
    mean, half = interval(np.log(values) if logarithm else values)
    low, high = mean - half, mean + half
    if logarithm:
        mean, low, high = np.exp(mean), np.exp(low), np.exp(high)
    dashes = _DASHES[number % len(_DASHES)]
    axes.plot(updates, mean, color=colour, linestyle=dashes, linewidth=2, label=cell)
    if len(values) > 1:
        axes.fill_between(updates, low, high, color=colour, alpha=0.18, linewidth=0)
