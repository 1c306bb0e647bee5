"""Figures of truncated backpropagation: losses, how far gradients reach, and what it costs.

As in plots.py: lines in, a matplotlib Figure out that belongs to nobody else; the colours of Okabe
and Ito (2008), and a marker of its own for each style.
"""

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from lstmjax.seeds import interval
from lstmjax.truncation_tables import STYLES, Line, relative_time

_COLOURS = dict(zip(STYLES, ("#0072B2", "#D55E00", "#009E73", "#666666"), strict=True))
_MARKERS = dict(zip(STYLES, ("o", "s", "^", ""), strict=True))
_ASIDE = dict(zip(STYLES, (1.0, 1.04, 0.96, 1.0), strict=True))  # so that bars do not overlap
_INK, _GRID = "#222222", "#E3E3E3"


def losses(
    title: str, lines: Sequence[Line], levels: Sequence[tuple[float, str]], *, at_verb: bool = False
) -> Figure:
    """Losses against n: a column for each cell, a row for one and for several updates a sequence.

    Args:
      title: what was trained.
      lines: of one task.
      levels: losses that are known, each with what it is of.
      at_verb: whether to draw the loss at the characters that show a verb's number.

    Returns:
      The figure; bars are 95 % confidence intervals over the seeds.

    Raises:
      ValueError: no lines.
    """
    often = {
        "one update a sequence": [one for one in lines if one.policy == "per_sequence"],
        "an update every k1 steps": [
            one for one in lines if one.policy != "per_sequence" or one.style == "full"
        ],
    }
    if all(one.style == "full" for one in often["an update every k1 steps"]):
        del often["an update every k1 steps"]

    def draw(axes, _, here):
        _curves(axes, here, lambda one: interval(one.agreement if at_verb else one.loss))
        lowest = min((level for level, _ in levels), default=0.0)
        for level, name in levels:
            axes.axhline(level, color=_INK, linewidth=0.9, linestyle=":")
            below = level == lowest  # where nothing can be drawn
            axes.annotate(
                name, (0.99, level), xycoords=("axes fraction", "data"), ha="right",
                va="top" if below else "bottom", fontsize="x-small", color=_INK,
                xytext=(0, -2 if below else 1), textcoords="offset points",
            )  # fmt: skip
        axes.set_ylabel("test loss (nats)")

    return _grid(title, often, draw)


def costs(title: str, lines: Sequence[Line]) -> Figure:
    """How far errors reach by gradient, and the time, of one update a sequence; a column a cell.

    Args:
      title: what was trained.
      lines: of one task.

    Returns:
      The figure: above, the depth with its 95 % confidence interval, and as thin lines what it is
      by definition; below, the time as a multiple of full backpropagation's.

    Raises:
      ValueError: no lines.
    """
    here = [one for one in lines if one.policy == "per_sequence"]
    depth, time = "by gradient (thin: by definition)", "time of a sequence"

    def draw(axes, name, here):
        if name == depth:
            _curves(axes, here, lambda one: (one.window, 0.0), thin=True)
            _curves(axes, here, lambda one: interval(one.depth))
            axes.set_ylabel("steps reached")
        else:
            _curves(axes, here, lambda one: (relative_time(lines, one), 0.0))
            axes.set_ylabel("time, × full")
        axes.update_datalim([(here[0].n, 0.0)])

    return _grid(title, {depth: here, time: here}, draw)


def _curves(
    axes: Axes, lines: Sequence[Line], value: Callable[[Line], tuple], thin: bool = False
) -> None:
    """A curve for each style against n; full backpropagation, which has no n, from side to side."""
    for style in STYLES:
        here = sorted((one for one in lines if one.style == style), key=lambda one: one.n)
        if not here:
            continue
        middle, half = np.array([value(one) for one in here], float).T
        half = np.nan_to_num(half)
        look = {"color": _COLOURS[style]}
        if thin:
            look |= {"linewidth": 0.8, "alpha": 0.6}
        if style == "full":
            axes.axhline(middle[0], linestyle="--", label=None if thin else style, **look)
            if not thin:
                axes.axhspan(middle[0] - half[0], middle[0] + half[0], alpha=0.15, lw=0, **look)
            continue
        places = np.array([one.n for one in here]) * (1.0 if thin else _ASIDE[style])
        if thin:
            axes.plot(places, middle, **look)
        else:
            axes.errorbar(
                places, middle, half, marker=_MARKERS[style], ms=5, capsize=2, label=style, **look
            )


def _grid(
    title: str, rows: dict[str, Sequence[Line]], draw: Callable[[Axes, str, Sequence[Line]], None]
) -> Figure:
    """Axes with a row for each entry and a column for each cell, n along all of them."""
    cells = list(dict.fromkeys(one.cell for of_row in rows.values() for one in of_row))
    if not cells:
        raise ValueError("lines: got none, expected at least one")
    size = 0.6 + 3.3 * max(2, len(cells)), 1.0 + 2.4 * len(rows)
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(rows), len(cells), squeeze=False, sharex=True, sharey="row")
    for place, (name, of_row) in zip(grid, rows.items(), strict=True):
        for axes, cell in zip(place, cells, strict=True):
            here = [one for one in of_row if one.cell == cell]
            draw(axes, name, here)
            depths = sorted({one.n for one in here if one.style != "full"})
            axes.set_xscale("log")
            axes.margins(x=0.09, y=0.1)
            axes.set_xticks(depths, [str(n) for n in depths])
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_xlabel("n (steps)")
            axes.grid(color=_GRID, linewidth=0.8)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(labelsize="small")
            axes.label_outer()
            axes.set_title(f"{cell.upper()}, {name}", loc="left", fontsize="small", color=_INK)
    shown = {}
    for axes in grid.flat:
        handles, labels = axes.get_legend_handles_labels()
        shown |= dict(zip(labels, handles, strict=True))
    names = [style for style in STYLES if style in shown]
    place = {"loc": "outside lower center", "ncols": 4, "frameon": False, "fontsize": "small"}
    figure.legend([shown[name] for name in names], names, **place)
    figure.suptitle(title, x=0.01, ha="left", fontsize="medium", color=_INK)
    return figure
