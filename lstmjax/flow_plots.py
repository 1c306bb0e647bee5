"""Figures of gradients through time: norms over lags, the paths they take, and Pascanu's wall.

As in plots.py: arrays in, a matplotlib Figure out that belongs to nobody else, colours that
colour-blind readers can tell apart (Okabe & Ito, 2008), and dashes that say the same.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from numpy.typing import ArrayLike

from lstmjax.flow_tables import log_interval

_COLOURS = (
    "#000000", "#7F7F7F", "#D55E00", "#E69F00", "#56B4E9", "#0072B2", "#009E73", "#CC79A7",
)  # fmt: skip
_DASHES = (":", ":", "-", "-", (0, (5, 1)), "-", "--", "-.")
_PATHS = {"flow": ("#000000", "-"), "direct": ("#0072B2", "--"), "rest": ("#D55E00", ":")}
_INK, _GRID = "#222222", "#E3E3E3"


def gradient_flow(
    title: str, panels: Mapping[str, Mapping[str, ArrayLike]], floor: float = 1e-16
) -> Figure:
    """Norms of gradients against the lag, on a logarithmic axis: what is exponential is straight.

    Args:
      title: what was measured.
      panels: by the panel's name, by model norms [S, K] at lags 0 … K-1, S seeds; NaN leaves a gap.
      floor: the smallest norm that is drawn.

    Returns:
      The figure: panels side by side; geometric means over the seeds, with bands of 95 %.

    Raises:
      ValueError: no panels, or norms of another shape.
    """
    figure, axes = _panels(panels, 1, 5.0)
    models = list(dict.fromkeys(model for curves in panels.values() for model in curves))
    styles = {
        model: {"color": _COLOURS[n % len(_COLOURS)], "linestyle": _DASHES[n % len(_DASHES)]}
        for n, model in enumerate(models)
    }
    for place, (name, curves) in zip(axes, panels.items(), strict=True):
        for model, norms in curves.items():
            _band(place, norms, styles[model], model)
        _dress(place, name)
    _limit(axes, floor)
    axes[0].set_ylabel("norm of the gradient, relative to lag 0")
    handles = {}
    for place in axes:
        handles |= dict(zip(*reversed(place.get_legend_handles_labels()), strict=True))
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=3, frameon=False,
        fontsize="small",
    )  # fmt: skip
    figure.suptitle(title, x=0.01, ha="left", fontsize="medium", color=_INK)
    return figure


def cell_paths(
    title: str, panels: Mapping[str, Mapping[str, ArrayLike]], floor: float = 1e-16
) -> Figure:
    """The gradient along the cell state and the rest, against the lag.

    Args:
      title: what was measured.
      panels: by the panel's name, norms [S, K] at lags 0 … K-1 by "flow" (the whole), "direct"
        and "rest".
      floor: the smallest norm that is drawn.

    Returns:
      The figure: two panels side by side in each row; means and bands as in ``gradient_flow``.

    Raises:
      ValueError: no panels, or norms of another shape.
    """
    figure, axes = _panels(panels, -(-len(panels) // 2), 2.5)
    labels = {
        "flow": "whole gradient",
        "direct": "along the cell state alone: product of forget gates",
        "rest": "all paths through some h",
    }
    for place, (name, curves) in zip(axes, panels.items(), strict=False):
        for kind, (colour, dash) in _PATHS.items():
            _band(place, curves[kind], {"color": colour, "linestyle": dash}, labels[kind])
        _dress(place, name)
    _limit(axes, floor)
    for place in axes[::2]:
        place.set_ylabel("norm, relative to lag 0")
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False,
        fontsize="small",
    )  # fmt: skip
    figure.suptitle(title, x=0.01, ha="left", fontsize="medium", color=_INK)
    return figure


class Descent(NamedTuple):
    """Gradient descent on a surface.

    Attributes:
      points: [U+1, 2] (w, b) before each update and after the last.
      losses: [U+1] there.
      norms: [U] of the gradients, before clipping.
    """

    points: ArrayLike
    losses: ArrayLike
    norms: ArrayLike


def wall(
    title: str, w: ArrayLike, b: ArrayLike, losses: ArrayLike, descents: Mapping[str, Descent]
) -> Figure:
    """A loss over two parameters with the ways of gradient descent on it.

    Args:
      title: what was trained.
      w, b: [W] and [B] values of the two parameters.
      losses: [B, W].
      descents: one or two, by label.

    Returns:
      The figure: the surface, and on its right the loss and the gradient's norm at every update.

    Raises:
      ValueError: ``losses`` of another shape, or none or too many descents.
    """
    losses = np.asarray(losses, float)
    if losses.shape != (len(b), len(w)):
        raise ValueError(f"losses: got shape {losses.shape}, expected {(len(b), len(w))}")
    if not 1 <= len(descents) <= 2:
        raise ValueError(f"descents: got {len(descents)}, expected one or two")
    figure = Figure(figsize=(7, 4.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 2, width_ratios=(1.5, 1))
    surface = figure.add_subplot(grid[:, 0])
    loss, norm = (figure.add_subplot(grid[n, 1]) for n in range(2))
    levels = np.linspace(np.min(losses), np.max(losses), 25)
    filled = surface.contourf(w, b, losses, levels, cmap="viridis")
    ticks = MaxNLocator(5).tick_values(0, np.max(losses))
    ticks = [tick for tick in ticks if tick <= np.max(losses)]
    figure.colorbar(filled, ax=surface, label="loss", location="bottom", ticks=ticks)
    styles = (
        {"color": "#D55E00", "marker": "X", "linestyle": "--"},
        {"color": "#000000", "marker": "o", "linestyle": "-"},
    )
    for (label, descent), style in zip(descents.items(), styles, strict=False):
        points = np.asarray(descent.points, float)
        edge = {"markeredgecolor": "white", "markeredgewidth": 0.3}
        surface.plot(*points.T, ms=4.5, lw=1, label=label, **edge, **style)
        loss.plot(descent.losses, ms=2.5, lw=1, **style)
        norm.plot(descent.norms, ms=2.5, lw=1, **style)
    surface.plot(*points[0], marker="*", ms=13, color="white", markeredgecolor="black", zorder=3)
    surface.set_xlim(np.min(w), np.max(w))
    surface.set_ylim(np.min(b), np.max(b))
    surface.set_xlabel("recurrent weight w")
    surface.set_ylabel("bias b")
    surface.set_title("loss surface; the star is the start", loc="left", fontsize="small")
    loss.set_title("loss", loc="left", fontsize="small")
    norm.set_title("norm of the gradient", loc="left", fontsize="small")
    norm.set_xlabel("update")
    for place in (loss, norm):
        place.set_yscale("log")
        _plain(place)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize="small")
    figure.suptitle(title, x=0.01, ha="left", fontsize="medium", color=_INK)
    return figure


def _band(axes: Axes, norms: ArrayLike, style: Mapping[str, Any], label: str) -> None:
    norms = np.asarray(norms, float)
    if norms.ndim != 2:
        raise ValueError(f"panels: got norms of shape {norms.shape} for {label!r}, expected [S, K]")
    mean, low, high = log_interval(norms)
    lags = np.arange(norms.shape[1])
    axes.plot(lags, np.where(mean > 0, mean, np.nan), lw=1.8, label=label, **style)
    axes.fill_between(lags, low, high, color=style["color"], alpha=0.18, linewidth=0)


def _limit(axes: Sequence[Axes], floor: float) -> None:
    """The axes that panels share, once everything is drawn."""
    axes[0].set_ylim(bottom=max(floor, axes[0].get_ylim()[0]))
    axes[0].set_xlim(left=0)


def _dress(axes: Axes, name: str) -> None:
    axes.set_yscale("log")
    # A tick at every fourth power or so; those between would be a wall of lines.
    axes.yaxis.set_major_locator(LogLocator(numticks=9))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("lag k, steps")
    axes.label_outer(remove_inner_ticks=False)
    axes.set_title(name, loc="left", fontsize="small", color=_INK)
    _plain(axes)


def _plain(axes: Axes) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize="small")


def _panels(panels: Mapping[str, Any], rows: int, height: float) -> tuple[Figure, list[Axes]]:
    """An empty figure, 7 inches wide, of enough panels in so many rows, their axes shared."""
    if not panels:
        raise ValueError("panels: got none, expected at least one")
    figure = Figure(figsize=(7, height * rows), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    across = -(-len(panels) // rows)
    axes = figure.subplots(rows, across, sharex=True, sharey=True, squeeze=False).ravel()
    for place in axes[len(panels) :]:
        place.set_visible(False)
    return figure, list(axes)
