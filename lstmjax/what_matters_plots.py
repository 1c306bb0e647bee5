"""The figure of experiments/what_matters.py: what each change of a program does, as dots.

As in plots.py: arrays in, a matplotlib Figure out that belongs to nobody else, the colours of Okabe
and Ito (2008), and a marker of its own for each series.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter
from numpy.typing import ArrayLike

from lstmjax import what_matters_tables as tables
from lstmjax.seeds import interval

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
_MARKERS = ("o", "s", "^", "D")
_INK, _GRID = "#222222", "#E3E3E3"
_TITLES = {
    "init": "Initial laws of frameworks, against the program as it is",
    "variants": "Variants of the LSTM, against the LSTM",
    "dropout": "Kinds of dropout, against none",
}


class Panel(NamedTuple):
    """One task.

    Attributes:
      title: of the task.
      xlabel: the number, with its unit where it has one.
      series: by the series' label, by name [S] values over seeds; a name may be in several.
      line: where "no difference" is, or None.
      logarithm: whether the axis is logarithmic, and means and intervals are of logarithms.
    """

    title: str
    xlabel: str
    series: Mapping[str, Mapping[str, ArrayLike]]
    logarithm: bool = False
    line: float | None = None

    @property
    def names(self) -> list[str]:
        """All names, each once."""
        return list(dict.fromkeys(name for of_one in self.series.values() for name in of_one))


def study(config: Mapping[str, Any], metrics: Mapping[str, Any]) -> Figure | None:
    """The figure of a study's record: a panel for each task, what differs in kind as series.

    None where no cell is left to be held against a reference: all of them diverged.

    Shown is each cell's difference from its task's reference (the quotient, of numbers that are
    compared as ratios), seed by seed: a seed's hold-out moves all cells of a task alike, and by
    more than most changes do. The reference's own mean stands in the panel's title.

    Args:
      config, metrics: of the record (see what_matters_tables.py).
    """
    name, panels = config["study"], []
    for task, names in tables.cells_of({"config": config}).items():
        spec, reference = tables.TASKS[task], config["references"][task]
        series, means = {}, []
        for title, own, number in _kinds(name, names, reference):
            base = tables.values(metrics, f"{task}/{reference}", number)
            if base is None:  # it diverged
                continue
            found = {n: tables.values(metrics, f"{task}/{n}", number) for n in own}
            series[title] = {
                tables.label(name, n): v / base if spec.ratio else v - base
                for n, v in found.items()
                if v is not None and n != reference
            }
            mean = np.exp(np.mean(np.log(base))) if spec.ratio else np.mean(base)
            means.append(f"{mean:{spec.form}}")
        if any(series.values()):  # not all cells of the task diverged
            means = " and ".join(dict.fromkeys(means))
            title = f"{tables.title(config, task)}; {reference}: {means}"
            xlabel = f"{spec.label}, {'quotient' if spec.ratio else 'difference'}"
            line = 1.0 if spec.ratio else 0.0
            panels.append(Panel(title, xlabel, series, spec.ratio, line))
    if not panels:
        return None
    return dots(f"{_TITLES[name]}: means of {config['seeds']} seeds, 95 % intervals", panels)


def _kinds(study: str, names: Sequence[str], reference: str) -> list[tuple]:
    """What the series of a study are: (label, names, which number or None)."""
    if study == "dropout":
        best = "best_validation_accuracy"
        return [("last epoch", names, None), ("best epoch", names, best)]
    if study == "variants":
        return [("one thing changed", names, None)]
    laws = [name for name in names if "-" not in name]
    alone = [name for name in names if name.startswith(f"{reference}-")]
    ones = [name for name in names if name not in laws and name not in alone]
    found = ("its own forget bias", laws), ("a forget bias of 1", ones)
    found = [(f"initial law with {what}", own, None) for what, own in found]
    return [*found, ("forget bias alone", alone, None)]


def dots(title: str, panels: Sequence[Panel]) -> Figure:
    """Means over seeds with 95 % intervals, a line for each name; small dots are the seeds.

    Args:
      title: what was compared.
      panels: one for each task; two stand side by side.

    Returns:
      The figure, of one axes for each panel. Names are from top to bottom in the order given; an
      axis shows all seeds, and of an interval that is wider what has room.

    Raises:
      ValueError: no panel, or one without names.
    """
    if not panels or not all(panel.names for panel in panels):
        raise ValueError("panels: got none or one without names, expected names in each")
    across = min(len(panels), 2)
    rows = [panels[n : n + across] for n in range(0, len(panels), across)]
    heights = [max(len(panel.names) for panel in row) + 3 for row in rows]
    figure = Figure(
        figsize=(7 + 1.5 * (across - 1), 0.9 + 0.23 * sum(heights)), dpi=120, layout="constrained"
    )
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(rows), across, squeeze=False, height_ratios=heights).ravel()
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    filled = [(panel, *one) for panel in panels for one in panel.series.items() if one[1]]
    labels = list(dict.fromkeys(label for _, label, _ in filled))
    shown = {}
    for axes, panel in zip(grid, panels, strict=False):
        for label in (label for label in labels if panel.series.get(label)):
            found, aside = panel.series[label], _aside(panel, label)
            shown[label] = _draw(axes, panel, labels.index(label), found, aside)
        _dress(axes, panel)
    if len(labels) > 1:
        place = {"loc": "outside lower center", "ncols": 3, "frameon": False, "fontsize": "small"}
        figure.legend(shown.values(), shown.keys(), **place)
    figure.suptitle(title, x=0.01, ha="left", fontsize="medium", color=_INK)
    return figure


def _aside(panel: Panel, label: str) -> float:
    """How far below a name's line a series is drawn: not at all where it has the line alone."""
    own = list(panel.series)
    if all(panel.series[label].keys().isdisjoint(panel.series[o]) for o in own if o != label):
        return 0.0
    return 0.36 * (own.index(label) - (len(own) - 1) / 2)


def _draw(axes: Axes, panel: Panel, number: int, found: Mapping[str, ArrayLike], aside: float):
    """One series: seeds, means and intervals; what the legend shows."""
    colour, marker = _COLOURS[number % len(_COLOURS)], _MARKERS[number % len(_MARKERS)]
    handle = None
    for name, values in found.items():
        y = panel.names.index(name) + aside
        values = np.asarray(values, float)
        mean, half = interval(np.log(values) if panel.logarithm else values)
        edges = np.array([mean - half, mean, mean + half])
        low, middle, high = np.exp(edges) if panel.logarithm else edges
        axes.plot(values, np.full(len(values), y), ".", color=colour, ms=4, alpha=0.4)
        width = [[middle - low], [high - middle]]
        handle = axes.errorbar(
            [middle], [y], xerr=width, fmt=marker, color=colour, ms=5, lw=1.4, capsize=2
        )
    return handle


def _dress(axes: Axes, panel: Panel) -> None:
    names = panel.names
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    seeds = [np.ravel(v) for of_one in panel.series.values() for v in of_one.values()]
    seeds = np.concatenate(seeds).astype(float)
    seeds = seeds[np.isfinite(seeds)]
    if seeds.size:
        low, high = seeds.min(), seeds.max()
        if panel.logarithm:
            room = (high / low) ** 0.06 if high > low else 1.06
            axes.set_xlim(low / room, high * room)
        else:
            room = 0.06 * (high - low) or 0.06 * max(abs(high), 1e-12)
            axes.set_xlim(low - room, high + room)
    if panel.logarithm:
        axes.set_xscale("log")
        spread = seeds.max() / seeds.min() if seeds.size else 1.0
        subs = (1,) if spread > 300 else (1, 3)
        wide = LogLocator(subs=subs, numticks=6)
        axes.xaxis.set_major_locator(wide if spread > 9 else MaxNLocator(3))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(4))
    if panel.line is not None:
        axes.axvline(panel.line, color=_INK, linewidth=0.8, zorder=1)
    axes.set_xlabel(panel.xlabel, fontsize="small")
    axes.set_title(panel.title, loc="left", fontsize="small", color=_INK)
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize="x-small")
