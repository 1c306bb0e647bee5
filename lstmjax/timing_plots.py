"""Figures of timings: heat maps over sizes, and times along an axis.

As in plots.py: arrays in, a matplotlib Figure out that belongs to nobody else, colours that
colour-blind readers can tell apart, and every colour beside a number or a dash that says the same.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Colormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator
from numpy.typing import ArrayLike

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
_DASHES = ("-", "--", "-.", ":")
_INK, _GRID, _NEVER = "#222222", "#E3E3E3", "#BBBBBB"
_ACROSS = 4  # panels side by side


def relative_times(
    title: str,
    steps: Sequence[int],
    hidden_sizes: Sequence[int],
    panels: Mapping[str, ArrayLike],
) -> Figure:
    """Times as multiples of a reference, over T and H: blue where faster, brown where slower.

    Args:
      title: what was timed, and where.
      steps: T values.
      hidden_sizes: H values.
      panels: [H, T] multiples by method, positive; NaN where it was not run.

    Returns:
      The figure: a panel for each method, in which each field bears its number.

    Raises:
      ValueError: no panels, or one of another shape.
    """
    grids = _grids(panels, steps, hidden_sizes)
    found = np.concatenate([grid[np.isfinite(grid)] for grid in grids.values()])
    furthest = float(np.exp(np.max(np.abs(np.log(found)), initial=math.log(1.25))))
    norm = LogNorm(1 / furthest, furthest)  # 1 in the middle: neither colour
    return _heat_map(title, steps, hidden_sizes, grids, "BrBG_r", norm, lambda v: f"{v:.2g}")


def pays_after(
    title: str,
    steps: Sequence[int],
    hidden_sizes: Sequence[int],
    panels: Mapping[str, ArrayLike],
) -> Figure:
    """Training steps until a method's longer compiling is won back, over T and H.

    Args:
      title: what was timed, and where.
      steps: T values.
      hidden_sizes: H values.
      panels: [H, T] numbers of steps by method, not below 0; infinite where it never pays (grey),
        NaN where it was not run.

    Returns:
      The figure, as of ``relative_times``.

    Raises:
      ValueError: no panels, or one of another shape.
    """
    grids = _grids(panels, steps, hidden_sizes)
    found = np.concatenate([grid[np.isfinite(grid)] for grid in grids.values()])
    norm = LogNorm(1, max(10.0, float(np.max(found, initial=0))), clip=True)  # 0 looks like 1
    return _heat_map(title, steps, hidden_sizes, grids, "YlGnBu", norm, _in_short)


def times_along(
    title: str, panels: Mapping[str, tuple[str, Mapping[tuple[str, str], tuple]]]
) -> Figure:
    """Times against sizes, both logarithmic: a panel for each axis, a line for each program.

    Args:
      title: what was timed, and where.
      panels: by the axis's label, what is fixed along it, and by (method, pass) the line
        ``(x [N], seconds [N])``. Methods differ in colour, passes in their dashes.

    Returns:
      The figure.

    Raises:
      ValueError: no panels, or an ``x`` and its seconds differ in length.
    """
    if not panels:
        raise ValueError("panels: got none, expected at least one")
    figure, axes = _panels(len(panels), 2, 3.6, 3.0)
    lines = list(dict.fromkeys(key for _, curves in panels.values() for key in curves))
    methods, passes = (list(dict.fromkeys(key[i] for key in lines)) for i in (0, 1))
    style = {
        key: {
            "color": _COLOURS[methods.index(key[0]) % len(_COLOURS)],
            "linestyle": _DASHES[passes.index(key[1]) % len(_DASHES)],
        }
        for key in lines
    }
    for place, (label, (fixed, curves)) in zip(axes, panels.items(), strict=True):
        for key, (x, seconds) in curves.items():
            if len(x) != len(seconds):
                got = f"got {len(x)} and {len(seconds)} values for {key}"
                raise ValueError(f"panels: {got}, expected as many")
            place.plot(x, np.asarray(seconds, float) * 1e3, marker="o", ms=4, **style[key])
        _log_axes(place, {value for x, _ in curves.values() for value in x})
        place.set_xlabel(label)
        place.set_ylabel("ms")
        place.grid(color=_GRID, linewidth=0.8)
        place.set_axisbelow(True)
        place.spines[["top", "right"]].set_visible(False)
        place.set_title(fixed, loc="left", fontsize="small", color=_INK)
    handles = [Line2D([], [], marker="o", ms=4, **style[key]) for key in lines]
    names = [f"{method}, {passed}" for method, passed in lines]
    figure.legend(
        handles, names, loc="outside lower center", ncols=2, frameon=False, fontsize="small"
    )
    figure.suptitle(title, x=0.01, ha="left", fontsize="medium", color=_INK)
    return figure


def _log_axes(axes: Axes, values: set[float]) -> None:
    """Both axes logarithmic, in plain numbers; x is ticked where there is something to see."""
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(sorted(values), [f"{value:,}" for value in sorted(values)])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:,g}")
    # Within less than a decade there may be no power of ten to be read off.
    axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    axes.yaxis.set_minor_formatter("{x:,g}")
    axes.tick_params(which="both", labelsize="small")


def _grids(
    panels: Mapping[str, ArrayLike], steps: Sequence[int], hidden_sizes: Sequence[int]
) -> dict[str, np.ndarray]:
    if not panels:
        raise ValueError("panels: got none, expected at least one")
    grids = {name: np.asarray(grid, float) for name, grid in panels.items()}
    expected = len(hidden_sizes), len(steps)
    for name, grid in grids.items():
        if grid.shape != expected:
            raise ValueError(f"panels: got shape {grid.shape} for {name!r}, expected {expected}")
    return grids


def _heat_map(
    title: str,
    steps: Sequence[int],
    hidden_sizes: Sequence[int],
    grids: Mapping[str, np.ndarray],
    colours: str,
    norm: LogNorm,
    text: Callable[[float], str],
) -> Figure:
    """A panel for each grid [H, T]; a field bears its number, “∞” (grey) or “–” (white)."""
    across = min(_ACROSS, len(grids))
    figure, axes = _panels(
        len(grids), across, 0.9 + 0.55 * len(steps), 1.0 + 0.4 * len(hidden_sizes)
    )
    for axis, (name, grid) in zip(axes, grids.items(), strict=True):
        shown = np.ma.masked_invalid(np.where(grid == 0, 1, grid))
        image = axis.imshow(shown, cmap=colours, norm=norm, aspect="auto", origin="lower")
        for row, column in np.ndindex(grid.shape):
            _mark(axis, (row, column), grid[row, column], text, image.cmap, norm)
        axis.set_xticks(range(len(steps)), map(str, steps))
        axis.set_yticks(range(len(hidden_sizes)), map(str, hidden_sizes))
        axis.tick_params(length=0, labelsize="small")
        axis.spines[:].set_visible(False)
        axis.set_title(name, loc="left", fontsize="small", color=_INK)
        axis.set_xlabel("T", fontsize="small")
        axis.set_ylabel("H", fontsize="small")
    figure.suptitle(title, x=0.01, ha="left", fontsize="medium", color=_INK)
    return figure


def _mark(
    axis: Axes,
    place: tuple[int, int],
    value: float,
    text: Callable[[float], str],
    colours: Colormap,
    norm: LogNorm,
) -> None:
    """Writes a field's number in ink that can be read on its colour."""
    row, column = place
    ink, said = _INK, "–"
    if math.isinf(value):
        said = "∞"
        axis.fill_between([column - 0.5, column + 0.5], row - 0.5, row + 0.5, color=_NEVER, lw=0)
    elif not math.isnan(value):
        said = text(value)
        red, green, blue, _ = colours(norm(max(value, norm.vmin)))
        if 0.299 * red + 0.587 * green + 0.114 * blue < 0.5:
            ink = "white"
    axis.text(column, row, said, ha="center", va="center", fontsize="small", color=ink)


def _in_short(number: float) -> str:
    """A whole number of at most four characters: 950, 9.5k, 950k, 9.5M."""
    power = 0
    while number >= 999.5 and power < 4:
        number, power = number / 1000, power + 1
    digits = 1 if power and number < 9.95 else 0
    return f"{number:.{digits}f}{['', 'k', 'M', 'G', 'T'][power]}"


def _panels(count: int, across: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """An empty figure of so many panels, each of that size in inches, rows of ``across``."""
    across = min(across, count)
    down = math.ceil(count / across)
    size = max(5.0, across * width), 0.5 + down * height
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(down, across, squeeze=False).flat)
    for spare in axes[count:]:
        spare.remove()
    return figure, axes[:count]
