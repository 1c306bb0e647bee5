"""Figures of a diagnosed run: gradients through time, Jacobians, gates, clipping.

As in plots.py: numbers in, a matplotlib Figure out that belongs to nobody else, and colours that
colour-blind readers can tell apart, beside dashes or markers that say the same. ``looks`` are the
numbers of ``diagnose.Diagnosis``: {when: {layer: {name: numbers}}}. A panel for each layer.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from lstmjax.plots import COLOURS

_DASHES, _MARKERS = ("-", "--", "-.", ":"), ("o", "^", "s", "x")
_INK, _GRID = "#222222", "#E3E3E3"
_PREFIX = "gradient_"

Looks = Mapping[str, Mapping[str, Mapping[str, Any]]]


def gradient_flow(title: str, looks: Looks) -> Figure:
    """Norms of the last step's gradient, k steps before it; the colour says of what, the dash when.

    Args:
      title: which model, on which data.
      looks: with "gradient_h", "gradient_c" …: [K] norms. What is 0 is not drawn.

    Returns:
      The figure, its y axes logarithmic.
    """
    layers = _layers(looks)
    figure, panels = _panels(len(layers), 2.6)
    for axes, layer in zip(panels[:, 0], layers, strict=True):
        for dash, (when, look) in zip(_DASHES, looks.items(), strict=False):
            names = [name for name in look[layer] if name.startswith(_PREFIX)]
            for i, name in enumerate(names):
                field, norms = name.removeprefix(_PREFIX), np.asarray(look[layer][name], float)
                label = f"∂L/∂{field}, {when}"
                lags, style = np.arange(len(norms)), {"color": _colour(i), "linestyle": dash}
                axes.plot(lags, _above_zero(norms), label=label, **style)
        _logarithmic(axes)
        axes.set_ylabel("gradient norm")
        _dress(axes, _of_layer(title, layer, layers))
    _count(panels[-1, 0], "steps before the error, k")
    return figure


def jacobian_radius(title: str, looks: Looks) -> Figure:
    """Spectral radius of the state's Jacobian along the sequence, the mean over examples.

    Args:
      title: which model, on which data.
      looks: with "radius_step" and "radius": [S]; NaN leaves a gap.

    Returns:
      The figure; a line marks 1, above which a gradient may grow.
    """
    layers = _layers(looks)
    figure, panels = _panels(len(layers), 2.4)
    for axes, layer in zip(panels[:, 0], layers, strict=True):
        for i, (when, look) in enumerate(looks.items()):
            x, y = (np.asarray(look[layer][n], float) for n in ("radius_step", "radius"))
            style = {"color": _colour(i), "linestyle": _DASHES[i % 4], "marker": _MARKERS[i % 4]}
            axes.plot(x, y, label=when, ms=3.5, **style)
        axes.axhline(1.0, color="#888888", linewidth=0.8, linestyle=":")
        axes.set_ylabel("spectral radius")
        _dress(axes, _of_layer(title, layer, layers))
    _count(panels[-1, 0], "step of the sequence, t")
    return figure


def gates(title: str, looks: Looks) -> Figure:
    """Saturation of each unit's gates at the last look, and how long units remember at every look.

    Saturation is drawn as by Karpathy, Johnson & Fei-Fei (2015): the share of activations above 0.9
    against that below 0.1, one point for each unit.

    Args:
      title: which model, on which data.
      looks: with "gates_left" and "gates_right", [H] shares by gate, and perhaps "half_life" [H],
        in steps; units whose half-life is 0 or infinite are counted in the axis, and not drawn.

    Returns:
      The figure.
    """
    layers, last = _layers(looks), list(looks)[-1]
    remembers = any("half_life" in look[layer] for look in looks.values() for layer in layers)
    figure, panels = _panels(len(layers), 3.2, 2 if remembers else 1)
    for row, layer in zip(panels, layers, strict=True):
        _saturation(row[0], looks[last][layer])
        _dress(row[0], _of_layer(f"gates, {last}", layer, layers))
        if remembers:
            _half_lives(row[1], {when: look[layer]["half_life"] for when, look in looks.items()})
            _dress(row[1], "")
    figure.suptitle(title, x=0.01, ha="left", fontsize="medium", color=_INK)
    return figure


def _saturation(axes: Axes, look: Mapping[str, Any]) -> None:
    for i, (gate, left) in enumerate(look["gates_left"].items()):
        right, style = look["gates_right"][gate], {"color": _colour(i), "alpha": 0.7}
        axes.scatter(right, left, s=16, marker=_MARKERS[i % 4], label=gate, **style)
    axes.plot([0, 1], [1, 0], color="#888888", linewidth=0.8, linestyle=":")
    axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
    axes.set_xlabel("share of steps above 0.9")
    axes.set_ylabel("share of steps below 0.1")


def _half_lives(axes: Axes, lives: Mapping[str, Sequence[float]]) -> None:
    for i, (when, values) in enumerate(lives.items()):
        values = np.sort(np.asarray(values, float))
        share = 100 * (np.arange(len(values)) + 0.5) / len(values)
        values = _above_zero(np.where(np.isfinite(values), values, math.nan))
        style = {"color": _colour(i), "linestyle": _DASHES[i % 4]}
        axes.plot(share, values, label=when, **style)
    _logarithmic(axes)
    axes.set_xlim(0, 100)
    axes.set_xlabel("units, sorted (%)")
    axes.set_ylabel("half-life of memory (steps)")


def clipping(
    title: str,
    steps: Sequence[int],
    before: Sequence[float],
    after: Sequence[float],
    clipped: Sequence[float],
    max_norm: float | None,
) -> Figure:
    """The gradient's global norm over training, and below it how often it was clipped.

    Args:
      title: which model, on which data.
      steps: [N] updates.
      before, after: [N] norms, before and after clipping.
      clipped: [N] shares of updates that were clipped.
      max_norm: the bound; None draws the norm alone.

    Returns:
      The figure.
    """
    rows = 1 if max_norm is None else 2
    figure, panels = _panels(rows, 3.2 if rows == 1 else 2.4)
    upper, lower = panels[0, 0], panels[-1, 0]
    upper.plot(steps, _above_zero(np.asarray(before, float)), color=COLOURS[0], label="gradient")
    if max_norm is not None:
        style = {"color": COLOURS[1], "linestyle": "--", "label": f"clipped to {max_norm:g}"}
        upper.plot(steps, _above_zero(np.asarray(after, float)), **style)
        lower.plot(steps, 100 * np.asarray(clipped, float), color=COLOURS[1], drawstyle="steps-mid")
        lower.set_ylim(-3, 103)
        lower.set_ylabel("updates clipped (%)")
        _dress(lower, "", legend=False)
    _logarithmic(upper)
    upper.set_ylabel("global norm")
    _dress(upper, title, legend=rows == 2)
    _count(lower, "update")
    return figure


# ---- parts --------------------------------------------------------------------------------------


def _layers(looks: Looks) -> list[str]:
    if not looks:
        raise ValueError("looks: got none, expected at least one")
    return list(next(iter(looks.values())))


def _of_layer(title: str, layer: str, layers: Sequence[str]) -> str:
    return title if len(layers) == 1 else f"{title}, {layer.replace('_', ' ')}"


def _panels(rows: int, height: float, columns: int = 1) -> tuple[Figure, np.ndarray]:
    """An empty figure, 7 inches wide, and its axes [rows, columns]."""
    figure = Figure(figsize=(7, 1 + height * rows), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, sharex="col", squeeze=False)


def _above_zero(values: np.ndarray) -> np.ndarray:
    """What has a place on a logarithmic axis; NaN for the rest."""
    return np.where(values > 0, values, math.nan)


def _logarithmic(axes: Axes) -> None:
    """A logarithmic y axis, unless nothing is drawn that could stand on it."""
    if any(np.any(np.isfinite(np.asarray(line.get_ydata(), float))) for line in axes.get_lines()):
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        if 0.01 < low and high < 1e4:  # plain numbers, between the powers of 10 as well
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            few = FuncFormatter(lambda value, _: f"{value:g}" if high < 50 * low else "")
            axes.yaxis.set_minor_formatter(few)


def _count(axes: Axes, label: str) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.set_xlabel(label)


def _dress(axes: Axes, title: str, legend: bool = True) -> None:
    """Grid, frame, title, and the legend above the axes, where no data can be."""
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    lines = 0
    if legend:
        wide = axes.get_subplotspec().get_gridspec().ncols == 1
        columns = 3 if wide else 4
        lines = math.ceil(len(axes.get_legend_handles_labels()[0]) / columns)
        place = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0.2}
        axes.legend(ncols=columns, frameon=False, fontsize="small", **place)
    axes.set_title(title, loc="left", fontsize="medium", color=_INK, pad=8 + 15 * lines)


def _colour(i: int) -> str:
    return COLOURS[i % len(COLOURS)]
