"""The figure of experiments/seconds.py: validation accuracy against seconds of training.

As in plots.py: lines in, a matplotlib Figure out that belongs to nobody else; the colours of Okabe
and Ito (2008), and a marker of its own for each framework.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lstmjax.seconds_tables import Line

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
_MARKERS = ("o", "s", "^", "D")
_INK, _GRID = "#222222", "#E3E3E3"


def curves(title: str, lines: Sequence[Line], levels: Sequence[float] = ()) -> Figure:
    """A curve for each framework, a point for the end of each epoch.

    A curve is the mean over seeds, of seconds and of accuracy, and its band the range of the seeds'
    accuracies. Dashed is the same with the seconds until the first batches had come out.

    Args:
      title: what was trained.
      lines: one for each framework.
      levels: accuracies to be marked.

    Returns:
      The figure.

    Raises:
      ValueError: no lines, or seeds of unequal numbers of epochs.
    """
    if not lines:
        raise ValueError("lines: got none, expected at least one")
    figure = Figure(figsize=(7, 4.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for level in levels:
        axes.axhline(level, color=_INK, linewidth=0.7, linestyle=":")
    for number, line in enumerate(lines):
        epochs = {len(values) for values in (*line.seconds, *line.accuracy)}
        if len(epochs) > 1:
            got = f"got {sorted(epochs)} epochs of {line.framework}"
            raise ValueError(f"lines: {got}, expected the same number for every seed")
        seconds, accuracy = np.mean(line.seconds, 0), np.array(line.accuracy)
        colour, marker = (both[number % len(both)] for both in (_COLOURS, _MARKERS))
        mean = accuracy.mean(0)
        axes.plot(seconds, mean, color=colour, marker=marker, ms=5, label=line.versions)
        axes.plot(seconds + np.mean(line.compile), mean, color=colour, lw=1, ls="--", alpha=0.8)
        if len(accuracy) > 1:
            low, high = accuracy.min(0), accuracy.max(0)
            axes.fill_between(seconds, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.set_xlim(left=0)
    axes.set_xlabel("seconds of training")
    axes.set_ylabel("validation accuracy")
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, loc="left", fontsize="medium", color=_INK)
    handles, labels = axes.get_legend_handles_labels()
    handles.append(Line2D([], [], color=_INK, linewidth=1, linestyle="--"))
    place = {"loc": "outside lower center", "ncols": 2, "frameon": False, "fontsize": "small"}
    figure.legend(handles, [*labels, "with compiling"], **place)
    return figure
