"""Gradient norms over lags as numbers and as text: the tables behind experiments/gradient_flow.py.

A record keeps lists of numbers, so measurements are kept as columns of equal length, one entry for
each model, before and after training, and each seed (``columns``, read again by ``rows_of``).
Norms span many powers of ten, so their means and intervals are taken of logarithms.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lstmjax.seeds import interval

LAGS = (1, 10, 50, 100, 200, 500, 1000)
PHASES = ("before training", "after training")
_KEPT = ("half_life", "longest", "radius", "right", "right_reach", "clip_rate")


class Row(NamedTuple):
    """One model, before or after training, with one seed; NaN is "not measured".

    Attributes:
      model: its name.
      phase: one of ``PHASES``.
      seed: of weights and data.
      flow: by lag, the gradient's norm that many steps before the error, relative to ‖∂L_t/∂h_t‖.
      direct: by lag, the norm along the cell state alone, relative to ``flow``.
      half_life, longest: steps, the median and the largest over units of the half-lives of their
        forget gates (the GRU's update gates).
      radius: of the Jacobians, their geometric mean over steps and sequences.
      right, right_reach: share of right answers at the lag that is trained, and at the longest.
      clip_rate: share of updates whose gradient was clipped.
    """

    model: str
    phase: str
    seed: int
    flow: Mapping[int, float]
    direct: Mapping[int, float]
    half_life: float
    longest: float
    radius: float
    right: float
    right_reach: float
    clip_rate: float


def lags_up_to(reach: int) -> tuple[int, ...]:
    """The lags that are written down, of those that are measured."""
    return tuple(lag for lag in LAGS if lag <= reach)


def rows(
    model: str,
    phase: str,
    first_seed: int,
    lags: Sequence[int],
    found: Mapping[str, np.ndarray],
    clip_rates: Sequence[float],
) -> list[Row]:
    """A row for each seed.

    Args:
      model, phase: as in ``Row``.
      first_seed: that of the first row.
      lags: from ``lags_up_to``.
      found: ``flow`` and ``direct`` [S, K] at lags 0 … K-1, relative to lag 0 both; ``half_life``,
        ``longest``, ``radius``, ``right`` and ``right_reach`` [S].
      clip_rates: [S].
    """
    return [
        Row(
            model,
            phase,
            first_seed + n,
            {lag: found["flow"][n, lag] for lag in lags},
            {lag: found["direct"][n, lag] / found["flow"][n, lag] for lag in lags},
            *(found[key][n] for key in _KEPT[:-1]),
            clip_rates[n],
        )
        for n in range(len(clip_rates))
    ]


# ---- in a record --------------------------------------------------------------------------------


def columns(rows: Sequence[Row], models: Sequence[str]) -> dict[str, list[float]]:
    """Rows as the metrics of a record; a model and a phase are their places in their lists."""
    found = {
        "model": [list(models).index(row.model) for row in rows],
        "trained": [PHASES.index(row.phase) for row in rows],
        "seed": [row.seed for row in rows],
    }
    for name in ("flow", "direct"):
        for lag in getattr(rows[0], name):
            found[f"{name}_{lag}"] = [float(getattr(row, name)[lag]) for row in rows]
    return found | {name: [float(getattr(row, name)) for row in rows] for name in _KEPT}


def rows_of(record: Mapping[str, Any]) -> list[Row]:
    """The rows of a record, whose ``config.models`` and ``config.reach`` say what was measured."""
    metrics, models = record["metrics"], record["config"]["models"]
    lags = lags_up_to(record["config"]["reach"])

    def by_lag(name, n):
        return {lag: float(metrics[f"{name}_{lag}"][n]) for lag in lags}

    return [
        Row(
            models[metrics["model"][n]],
            PHASES[metrics["trained"][n]],
            metrics["seed"][n],
            by_lag("flow", n),
            by_lag("direct", n),
            *(float(metrics[name][n]) for name in _KEPT),
        )
        for n in range(len(metrics["model"]))
    ]


# ---- numbers ------------------------------------------------------------------------------------


def log_interval(values: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The geometric mean over seeds, and its 95 % interval: those of the logarithms.

    Args:
      values: [S, …], not below 0.

    Returns:
      ``(mean, low, high)`` [...]; where a value is 0, so is the mean, and the limits are NaN.
    """
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        mean, half = interval(np.log(np.asarray(values, np.float64)))
        return np.exp(mean), np.exp(mean - half), np.exp(mean + half)


# ---- as text ------------------------------------------------------------------------------------


def flow_head(lags: Sequence[int], phase: str) -> list[str]:
    """The head of ``flow_rows``."""
    after = ["right answers", "at the longest lag", "clip rate"] * (phase == PHASES[1])
    return ["", *(f"lag {lag}" for lag in lags), "half-life, steps", "longest", "radius", *after]


def flow_rows(rows: Sequence[Row], lags: Sequence[int], phase: str) -> list[list[str]]:
    """A line for each model: norms by lag, half-life and radius; after training, answers too."""
    lines = []
    for model, members in _by_model(rows, phase).items():
        line = [model, *(_span([row.flow[lag] for row in members]) for lag in lags)]
        for name in ("half_life", "longest"):
            line.append(_span([getattr(row, name) for row in members], _digits))
        line.append(_span([row.radius for row in members], lambda v: f"{v:.3f}"))
        if phase == PHASES[1]:
            for name in ("right", "right_reach", "clip_rate"):
                line.append(_mean([getattr(row, name) for row in members]))
        lines.append(line)
    return lines


def direct_rows(rows: Sequence[Row], lags: Sequence[int]) -> list[list[str]]:
    """A line for each LSTM and phase: how much of the gradient goes along the cell state alone."""
    return [
        [f"{model}, {phase}", *(_span([row.direct[lag] for row in members], _digits)
                                for lag in lags)]
        for phase in PHASES
        for model, members in _by_model(rows, phase).items()
        if not math.isnan(members[0].direct[lags[0]])
    ]  # fmt: skip


def section(groups: Sequence[Any], provenance: Callable) -> list[str]:
    """The section of BENCHMARKS.md on experiments/gradient_flow.py.

    Args:
      groups: records as ``tables.Group`` has them, each alone in its group.
      provenance: ``provenance(group)``, the lines that say where a record comes from.
    """
    lines = [
        "## gradient-flow", "",
        "How far gradients reach back: the norm of ∂L_t/∂c_{t−k} (of ∂L_t/∂h_{t−k} for models "
        "without a cell state) relative to that of ∂L_t/∂h_t, for the loss of the last step, in "
        "float64. Half-life: steps until the product of forget gates (update gates of the GRU) "
        "falls to 1/2, the median and the longest of the units; radius: spectral radius of a "
        "step's Jacobian ∂s_t/∂s_{t−1}. Geometric means over the seeds, with the 95 % interval "
        "(Student's t, of logarithms) in parentheses where it shows in the digits; right "
        "answers and the clip rate: the mean.",
    ]  # fmt: skip
    for group in groups:
        (record,) = group.records
        config, rows = record["config"], rows_of(record)
        lags = lags_up_to(config["reach"])
        seeds = len({row.seed for row in rows})
        task = f"H = {config['hidden_size']}, {seeds} seeds. The task: name the first symbol of a "
        task += f"sequence at every step; {config['updates']} updates on lags up to "
        lines += ["", f"{task}{config['lag']}."]
        for phase in PHASES:
            lines += ["", f"{phase.capitalize()}:", ""]
            lines += _markdown(flow_head(lags, phase), flow_rows(rows, lags, phase))
        lines += [
            "",
            "Norm of the part that goes along the cell state alone, through forget gates "
            "and no h, relative to the whole (above 1 where the rest works against it):",
            "",
        ]
        lines += _markdown(["", *(f"lag {lag}" for lag in lags)], direct_rows(rows, lags))
        lines += ["", wall_text(record), "", *provenance(group)]
    return lines


def wall_text(record: Mapping[str, Any]) -> str:
    """What happens at the wall, in a sentence."""
    metrics, config = record["metrics"], record["config"]
    free, clipped = (f"{float(loss):.2g}" for loss in metrics["wall_loss"])
    largest = ", ".join(f"{float(norm):.3g}" for norm in metrics["wall_largest"])
    return (
        f"At the wall of an RNN of one unit ({config['wall_steps']} steps, "
        f"{config['wall_updates']} updates of gradient descent) the loss ends at {free} without "
        f"clipping and at {clipped} with norms clipped at {config['wall_clip']:g}, which "
        f"{100 * float(metrics['wall_clip_rate'][1]):.0f} % of its gradients were; largest norms "
        f"met: {largest}."
    )


def aligned(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for the screen."""
    table = [head, *rows]
    widths = [max(len(row[n]) for row in table) for n in range(len(head))]
    pairs = [zip(row, widths, strict=True) for row in table]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in p).rstrip() for p in pairs)


def _by_model(rows: Sequence[Row], phase: str) -> dict[str, list[Row]]:
    chosen = [row for row in rows if row.phase == phase]
    return {name: [row for row in chosen if row.model == name] for name in
            dict.fromkeys(row.model for row in chosen)}  # fmt: skip


def _span(values: Sequence[float], form: Callable[[float], str] = lambda v: f"{v:.1e}") -> str:
    """The geometric mean, and its interval where that shows."""
    mean, low, high = (form(float(v)) for v in log_interval(values))
    return mean if low == mean == high or low == form(math.nan) else f"{mean} ({low}–{high})"


def _mean(values: Sequence[float]) -> str:
    mean = float(np.mean(values))
    return "–" if math.isnan(mean) else f"{mean:.2f}"


def _digits(number: float) -> str:
    if math.isnan(number):
        return "–"
    return f"{number:,.0f}" if number >= 99.5 else f"{number:.2g}"


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
