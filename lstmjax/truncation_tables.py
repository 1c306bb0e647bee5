"""What experiments/truncation.py measured, as numbers and as text: a ``Line`` for each program.

A record keeps lists of numbers, so many lines are kept as columns of equal length, one entry for
each line (``columns``, read again by ``lines_of``), with a column for each seed where a number is
one seed's. BENCHMARKS.md, the screen and the figures are all drawn from ``Line``s.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lstmjax.seeds import interval

TASKS = ("toy", "text")
STYLES = ("TensorFlow style", "true style", "Williams–Peng", "full")
POLICIES = {"per_sequence": "a sequence", "per_chunk": "a chunk", "per_step": "a step"}
_NUMBERS = ("n", "k1", "k2", "steps", "window", "seconds", "seconds_low", "seconds_high")
_BY_SEED = ("loss", "agreement", "depth", "share")


class Line(NamedTuple):
    """One cell, trained on one task in one way, over all seeds.

    Attributes:
      task, cell, style, policy: names.
      n: what the style is of, n steps; T for "full".
      k1, k2: as in ``bptt``.
      steps: T, of a sequence.
      window: the mean over t of t − lo(t) + 1, how far an error reaches by definition.
      seconds, seconds_low, seconds_high: of training one seed on one sequence: the median, the
        first and the third quartile.
      loss: nats a step on the test, of each seed.
      agreement: the same at the characters that show a verb's number; NaN where there are none.
      depth: the mean of t − τ + 1 over what reaches step τ from the error of step t, weighted by
        the gradient's norm there.
      share: of the untruncated gradient's norms, the part that lies in the windows.
    """

    task: str
    cell: str
    style: str
    policy: str
    n: int
    k1: int
    k2: int
    steps: int
    window: float
    seconds: float
    seconds_low: float
    seconds_high: float
    loss: tuple[float, ...]
    agreement: tuple[float, ...]
    depth: tuple[float, ...]
    share: tuple[float, ...]

    @property
    def updates(self) -> int:
        """Updates in a sequence."""
        return 1 if self.policy == "per_sequence" else self.steps // self.k1


class Way(NamedTuple):
    """A way to train: fields of ``Line``."""

    style: str
    policy: str
    n: int
    k1: int
    k2: int


def ways(depths: Sequence[int], policies: Sequence[str], steps: int) -> list[Way]:
    """Every style that a policy has, for every n, under every policy; and full backpropagation."""
    tensorflow, true, williams_peng, full = STYLES
    found = []
    for policy in policies:
        chunks = [(tensorflow, 1), (williams_peng, 2)] if policy != "per_step" else []
        found += [Way(style, policy, n, n, n * k) for style, k in chunks for n in depths]
        if policy != "per_chunk":
            found += [Way(true, policy, n, 1, n) for n in depths]
    return [*found, Way(full, "per_sequence", steps, steps, steps)]


# ---- numbers ------------------------------------------------------------------------------------


def effective_depth(mass: np.ndarray, starts: np.ndarray) -> tuple[float, float]:
    """How far errors reach, by the gradients that they bring along.

        depth = Σ (t − τ + 1) m_tτ / Σ m_tτ,   share = Σ m_tτ / Σ' m_tτ

    The sums are over lo(t) ≤ τ ≤ t, and Σ' over all τ ≤ t.

    Args:
      mass: [T, T], m_tτ ≥ 0, the norm of ∂L_t/∂z_τ; what has τ > t is not looked at.
      starts: [T], lo(t).

    Returns:
      ``(depth, share)``; NaN where all is 0.
    """
    steps = len(mass)
    back = np.arange(steps)[:, None] - np.arange(steps)[None, :]
    mass = np.where(back >= 0, np.asarray(mass, np.float64), 0.0)
    reached = np.where(np.arange(steps)[None, :] >= np.asarray(starts)[:, None], mass, 0.0)
    if not reached.sum() > 0:
        return math.nan, math.nan
    depth = float(np.sum((back + 1) * reached) / np.sum(reached))
    return depth, float(np.sum(reached) / np.sum(mass))


def columns(lines: Sequence[Line], cells: Sequence[str]) -> dict[str, list[float]]:
    """Lines as the metrics of a record; a name is its place in ``cells``, ``TASKS`` and so on."""
    found = {
        field: [list(names).index(getattr(line, field)) for line in lines]
        for field, names in _places(cells).items()
    }
    found |= {name: [getattr(line, name) for line in lines] for name in _NUMBERS}
    for name in _BY_SEED:
        for seed in range(len(lines[0].loss)):
            found[f"{name}_{seed}"] = [getattr(line, name)[seed] for line in lines]
    return found


def _places(cells: Sequence[str]) -> dict[str, Sequence[str]]:
    return {"task": TASKS, "cell": cells, "style": STYLES, "policy": tuple(POLICIES)}


def lines_of(record: Mapping[str, Any]) -> list[Line]:
    """The lines of a record, whose ``config.cells`` names the cells."""
    metrics, places = record["metrics"], _places(record["config"]["cells"])
    count = sum(name.startswith("loss_") for name in metrics)

    def of_seeds(name, row):
        return tuple(float(metrics[f"{name}_{seed}"][row]) for seed in range(count))

    return [
        Line(
            *(names[metrics[field][row]] for field, names in places.items()),
            *(metrics[name][row] for name in _NUMBERS[:4]),
            *(float(metrics[name][row]) for name in _NUMBERS[4:]),
            *(of_seeds(name, row) for name in _BY_SEED),
        )
        for row in range(len(metrics["task"]))
    ]


def full(lines: Sequence[Line], line: Line) -> Line | None:
    """The line of full backpropagation on the same task and cell."""
    same = (one for one in lines if one[:2] == line[:2] and one.style == "full")
    return next(same, None)


def relative_time(lines: Sequence[Line], line: Line) -> float:
    """Seconds as a multiple of full backpropagation's; NaN without that."""
    base = full(lines, line)
    return line.seconds / base.seconds if base else math.nan


# ---- text ---------------------------------------------------------------------------------------

HEAD = (
    "style", "k1, k2", "update", "loss (nats)", "at the verb (nats)", "steps reached",
    "by gradient", "share", "ms a sequence", "× full",
)  # fmt: skip
LEGEND = (
    "Loss: nats a step on the test, mean ± half the 95 % confidence interval over the seeds "
    "(Student's t). Steps reached: how many steps an error goes through, by definition, the mean "
    "over a sequence; by gradient: the same weighted by the norm of ∂L_t/∂z_τ (z: what the gates "
    "take in), measured after training; share: the part of the full gradient's norms that lies "
    "within. Milliseconds are of training one seed on one sequence, whatever the number of updates "
    "in it: medians with quartiles in parentheses, measured in turns."
)


def rows(lines: Sequence[Line]) -> list[list[str]]:
    """A line of text, as in ``HEAD``, for each line."""
    return [
        [
            line.style + f" {line.n}" * (line.style != "full"),
            f"{line.k1}, {line.k2}",
            POLICIES[line.policy],
            _spread(line.loss, 4),
            _spread(line.agreement, 3),
            f"{line.window:.1f}",
            _spread(line.depth, 2),
            _spread(line.share, 2),
            f"{line.seconds * 1e3:.3g} "
            f"({line.seconds_low * 1e3:.3g}–{line.seconds_high * 1e3:.3g})",
            f"{relative_time(lines, line):.2f}",
        ]
        for line in lines
    ]


def level_text(task: str, record: Mapping[str, Any]) -> str:
    """The losses of a task that are known, in a sentence; empty where there are none."""
    names = record["config"]["levels"][task]
    found = zip(record["metrics"].get(f"{task}_levels", ()), names, strict=True)
    known = ", ".join(f"{float(level):.4f} ({name})" for level, name in found)
    return f"Known losses in nats a step: {known}." * bool(known)


def section(groups: Sequence[Any], provenance: Callable) -> list[str]:
    """The section of BENCHMARKS.md, a table for each task and cell of each record.

    Args:
      groups: each with one record in ``records``.
      provenance: ``provenance(group) -> lines``: command, versions, device and file.

    Returns:
      Lines.
    """
    lines = ["## truncation", "", f"Truncated backpropagation through time. {LEGEND}"]
    for group in groups:
        (record,) = group.records
        found = lines_of(record)
        for task, cell in dict.fromkeys(line[:2] for line in found):
            here = [line for line in found if line[:2] == (task, cell)]
            lines += ["", " ".join(_heading(task, cell, here[0], record)), ""]
            head, *body = _without_empty([list(HEAD), *rows(here)])
            lines += [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body)]
        lines += ["", *provenance(group)]
    return lines


def _heading(task: str, cell: str, line: Line, record: Mapping[str, Any]) -> list[str]:
    config = record["config"]
    sizes = config["sizes"][task]
    what = f"**{config['titles'][task]}, {cell.upper()}({sizes['hidden_size']})**:"
    how = (
        f"{sizes['sequences']} sequences of T = {line.steps} steps, B = {sizes['batch_size']}, "
        f"{len(line.loss)} seeds."
    )
    return list(filter(None, [what, how, level_text(task, record)]))


def _without_empty(table: list[list[str]]) -> list[list[str]]:
    """The table without the columns in which nothing was measured."""
    kept = [k for k in range(len(table[0])) if any(row[k] != "–" for row in table[1:])]
    return [[row[k] for k in kept] for row in table]


def _spread(values: Sequence[float], digits: int) -> str:
    """`mean ± half-width`; the mean alone of one value, “–” where it is NaN."""
    mean, half = map(float, interval(values))
    if math.isnan(mean):
        return "–"
    return f"{mean:.{digits}f}" + f" ± {half:.{digits}f}" * (not math.isnan(half))
