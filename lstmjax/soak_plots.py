"""The figure of experiments/soak.py: memory and time per step of a long run.

As in plots.py: arrays in, a matplotlib Figure out that belongs to nobody else.
"""

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

_MEMORY, _TIME, _CPU, _GRID = "#0072B2", "#D55E00", "#009E73", "#E3E3E3"


def load(
    minutes: ArrayLike,
    megabytes: ArrayLike,
    edges: ArrayLike,
    step_ms: ArrayLike,
    step_cpu_ms: ArrayLike,
) -> Figure:
    """Memory of a process and its milliseconds per step, over the minutes that it has run.

    Args:
      minutes, megabytes: [N], one for each look at the process.
      edges: [K + 1], the minutes at which intervals begin and end.
      step_ms, step_cpu_ms: [K], the mean of each interval, by the clock and by the processor.

    Returns:
      The figure, of two axes that begin at 0, so that flat looks flat.
    """
    figure = Figure(figsize=(7, 4.4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, sharex=True)
    upper.plot(minutes, megabytes, color=_MEMORY)
    upper.set_ylabel("resident memory (MB)")
    lower.stairs(step_ms, edges, color=_TIME, linewidth=1.8, label="by the clock")
    style = {"linewidth": 1.8, "linestyle": "--", "label": "processor time of all cores"}
    lower.stairs(step_cpu_ms, edges, color=_CPU, **style)
    lower.legend(frameon=False, fontsize="small", loc="lower right")
    lower.set_ylabel("time per step (ms)")
    lower.set_xlabel("minutes")
    for axes, values in ((upper, megabytes), (lower, np.concatenate([step_ms, step_cpu_ms]))):
        axes.set_ylim(0, 1.15 * float(np.max(values)))
        axes.grid(color=_GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure
