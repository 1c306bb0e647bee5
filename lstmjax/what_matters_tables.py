"""What experiments/what_matters.py found, as text: on the screen, and in BENCHMARKS.md.

A cell is a run of several seeds, called "imdb/torch": a task, and what is changed there. A record
has under that name, and one number more, a list over seeds: "imdb/torch/validation_accuracy". Its
config has `references`, by task the cell that the others are held against, and `runs`, by cell the
command, the weights' hash and the data, or why the run has no numbers.

Numbers that are compared as ratios (errors, updates) are averaged and subtracted as logarithms:
"mean" and "difference" are of these then, and shown as numbers and factors again.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.special import ndtr

from lstmjax.initializers import NO_FORGET_BIAS
from lstmjax.seeds import interval


class Task(NamedTuple):
    """A task and the number by which its cells are compared.

    Attributes:
      title: in words.
      number: its name in a record, [S].
      label: its name in words.
      form: how it is written.
      ratio: whether numbers are compared as ratios.
      highest: whether more is better.
    """

    title: str
    number: str
    label: str
    form: str
    ratio: bool
    highest: bool


_ACCURACY = ("validation_accuracy", "validation accuracy", ".4f", False, True)
TASKS = {
    "sin": Task("cos from sin", "mse", "MSE", "#.2g", True, False),
    "imdb": Task("IMDB reviews", *_ACCURACY),
    "mnist": Task("MNIST by rows", *_ACCURACY),
    "adding": Task(
        "adding problem, T = 200", "updates_to_solve", "updates to solve it", ",.0f", True, False
    ),
}
_OFFLINE = {"imdb": "generated reviews", "mnist": "rendered digits by rows"}
_NOTES = {
    "sin": "The program of the row sin-tf1. There are no splits: the MSE is that of the last 20 "
    "updates, each on a batch that had not been seen before.",
    "imdb": "The program of the row imdb-tf2.",
    "mnist": "The program of the row mnist-corrected with fewer epochs.",
    "adding": "As in long-lag: the first evaluation on held-out sequences with a mean squared "
    "error below 0.01. A seed that never comes to one counts with all updates that it was given.",
}
_STUDIES = {
    "init": "The initial law of the recurrent layers alone is changed: to that of each framework "
    "with its own forget bias, to that of those without one with a forget bias of 1, and, at the "
    "program's own law, the forget bias alone: to 0, to the biases of Gu et al. (2020, "
    "uniform_gate) and to those of Tallec & Ollivier (2018, chrono) for the length of the "
    "sequences; it is 1 otherwise. Haste's law is lstmjax's. On sin the laws alone are compared.",
    "variants": "The cell alone is changed, by one thing each, as Greff et al. (2017) did. Their "
    "vanilla LSTM has peepholes and their NP is it without them. Here that NP is the reference, "
    "lstm, and no variant has peepholes but peephole, their vanilla: its difference is the "
    "opposite of their NP's, and those of the others are without what peepholes would add.",
    "dropout": "One kind of dropout at a time is added to the program, from which its own "
    "dropout of 0.2 was taken (the line dropout 0.2 is the program as it is).",
}
_PAIRED = (
    "Paired: a seed's data, hold-out and order of batches are the same in all lines, differences "
    "are taken seed by seed, and ± or what is in parentheses is the mean's 95 % interval (Student, "
    "1908) over the seeds. Of 20 changes that change nothing, one is expected to have an interval "
    "without zero. "
    "Nothing is chosen by test numbers: every run scores the test split once, after the last epoch."
)


# ---- numbers ------------------------------------------------------------------------------------


class Numbers(NamedTuple):
    """One number of a cell: its mean over seeds and the paired difference from the reference.

    Attributes:
      mean, half: with the 95 % interval's half-width; of logarithms where a task has ratios.
      difference, difference_half: likewise.
    """

    mean: float
    half: float
    difference: float
    difference_half: float


def values(metrics: Mapping[str, Any], cell: str, number: str | None = None) -> np.ndarray | None:
    """A cell's numbers [S], by default those that it is compared by; None where it has none."""
    found = metrics.get(f"{cell}/{number or TASKS[cell.partition('/')[0]].number}")
    return None if found is None else np.array([float(value) for value in found])


def compared(
    metrics: Mapping[str, Any], cell: str, reference: str, number: str | None = None
) -> Numbers | None:
    """A cell against another one of its task, seed by seed.

    Args:
      metrics: of the record.
      cell, reference: names such as "imdb/torch".
      number: which one; by default that of the task.

    Returns:
      None where the cell has no numbers; differences are NaN where the reference has none.
    """
    own, base = (values(metrics, name, number) for name in (cell, reference))
    if own is None:
        return None
    if base is None:
        base = np.full_like(own, np.nan)
    if TASKS[cell.partition("/")[0]].ratio:
        own, base = np.log(own), np.log(base)
    return Numbers(*map(float, (*interval(own), *interval(own - base))))


class Gap(NamedTuple):
    """How far cells lie apart, beside what seeds alone do (of logarithms where there are ratios).

    Attributes:
      count: how many cells have numbers, all of them finite.
      worst, best: cells with these means.
      range: between the two means.
      spread: over seeds: the square root of the cells' mean variance (n − 1).
      chance: the range that is to be expected of as many cells that are all alike, from what is
        left of each number without its cell's and its seed's mean.
    """

    count: int
    worst: str
    best: str
    range: float
    spread: float
    chance: float


def gap(metrics: Mapping[str, Any], cells: Sequence[str]) -> Gap | None:
    """The gap between cells of one task; None of fewer than two that have finite numbers."""
    task = TASKS[cells[0].partition("/")[0]]
    found = {cell: values(metrics, cell) for cell in cells}
    found = {c: np.log(v) if task.ratio else v for c, v in found.items() if v is not None}
    found = {cell: v for cell, v in found.items() if np.all(np.isfinite(v))}
    if len(found) < 2:
        return None
    means = {cell: float(np.mean(v)) for cell, v in found.items()}
    low, high = min(means, key=means.get), max(means, key=means.get)
    spread = float(np.sqrt(np.mean([np.var(v, ddof=1) for v in found.values()])))
    grid = np.array(list(found.values()))  # [cells, seeds]
    count, seeds = grid.shape
    # What a seed does to all cells alike (its data, its hold-out) moves no mean from another.
    rest = grid - grid.mean(1, keepdims=True) - grid.mean(0, keepdims=True) + grid.mean()
    alone = np.sqrt(np.sum(rest**2) / ((count - 1) * (seeds - 1)))
    chance = expected_range(count) * alone / np.sqrt(seeds)
    worst, best = (low, high) if task.highest else (high, low)
    return Gap(len(found), worst, best, means[high] - means[low], spread, float(chance))


def expected_range(count: int) -> float:
    """The mean range of k draws from N(0, 1) (Tippett, 1925).

    ∫ 1 − Φ(x)ᵏ − (1 − Φ(x))ᵏ dx
    """
    x = np.linspace(-9, 9, 20_001)
    return float(np.trapezoid(1 - ndtr(x) ** count - ndtr(-x) ** count, x))


def groups(names: Sequence[str], reference: str) -> dict[str, list[str]]:
    """The names of the study init that differ in one respect, by what it is.

    Args:
      names: of one task: laws, and laws with a forget bias, as in keras-0.
      reference: the program's law.

    Returns:
      Groups of two or more names. "initial law, forget bias 1" is there where every law is.
    """
    laws = [name for name in names if "-" not in name]
    ones = [f"{law}-1" if law in NO_FORGET_BIAS else law for law in laws]
    found = {"initial law with its own forget bias": laws}
    if ones != laws and set(ones) <= set(names):
        found["initial law, forget bias 1"] = ones
    alone = [name for name in names if name == reference or name.startswith(f"{reference}-")]
    found |= {"forget bias alone": alone}
    return {what: group for what, group in found.items() if len(group) > 1}


# ---- words --------------------------------------------------------------------------------------


def label(study: str, name: str) -> str:
    """What a cell's name says, in words: "torch, forget bias 1", "recurrent dropout 0.5"."""
    what, dash, value = name.partition("-")
    if study == "init":
        return f"{what}, forget bias {value}" if dash else what
    if study == "dropout":
        return f"{what} {value}".strip().replace("_", " ")
    return {"lstm": "lstm (Greff's NP)", "peephole": "peephole (Greff's vanilla)"}.get(name, name)


def mean_text(task: Task, mean: float, half: float, form: str | None = None) -> str:
    """`0.8312 ± 0.0040`, or `0.0051 (0.004 to 0.0065)` where numbers are compared as ratios."""
    form = form or task.form
    if task.ratio:
        edges = np.exp([mean, mean - half, mean + half])
        middle, low, high = (f"{edge:{form}}".rstrip(".") for edge in edges)  # "16.", of #.2g
        return f"{middle} ({low} to {high})"
    return f"{mean:{form}} ± {half:{form}}"


def difference_text(task: Task, difference: float, half: float) -> str:
    """`+0.0040 ± 0.0031`, or `× 1.23 (0.90 to 1.68)`; “–” where there is none."""
    if not np.isfinite(difference):
        return "–"
    if task.ratio:
        low, middle, high = np.exp([difference - half, difference, difference + half])
        return f"× {middle:.2f} ({low:.2f} to {high:.2f})"
    return f"{difference:+{task.form}} ± {half:{task.form}}"


def line(metrics: Mapping[str, Any], cell: str, reference: str) -> str:
    """One cell's result for the screen."""
    task, found = TASKS[cell.partition("/")[0]], compared(metrics, cell, reference)
    if found is None:
        return f"{cell}: diverged"
    text = f"{cell}: {task.label} {mean_text(task, found.mean, found.half)}"
    if cell == reference or not np.isfinite(found.difference):
        return text
    name = reference.partition("/")[2]
    difference = difference_text(task, found.difference, found.difference_half)
    return f"{text}, against {name} {difference}"


def title(config: Mapping[str, Any], task: str) -> str:
    """A task in words; made-up data is never called by the real one's name.

    Args:
      config: of a study's record.
    """
    runs = [run for cell, run in config["runs"].items() if cell.partition("/")[0] == task]
    sources = {run["dataset"]["source"] for run in runs if "dataset" in run}
    return _OFFLINE[task] if "offline" in sources else TASKS[task].title


def cells_of(record: Mapping[str, Any]) -> dict[str, list[str]]:
    """The names of a record's cells by task, in the order in which they were run."""
    found: dict[str, list[str]] = {}
    for cell in record["config"]["runs"]:
        task, _, name = cell.partition("/")
        found.setdefault(task, []).append(name)
    return found


def table(record: Mapping[str, Any], task: str) -> tuple[list[str], list[list[str]]]:
    """Head and lines of one task's table, a line for each cell."""
    config, metrics = record["config"], record["metrics"]
    spec, reference = TASKS[task], f"{task}/{config['references'][task]}"
    against = f"against {label(config['study'], config['references'][task])}, paired"
    head = ["", spec.label, against, *_MORE[task][0], "train s"]
    lines = []
    for name in cells_of(record)[task]:
        cell = f"{task}/{name}"
        found = compared(metrics, cell, reference)
        if found is None:
            words = [f"diverged: {config['runs'][cell]['diverged']}", *["–"] * (len(head) - 2)]
        else:
            difference = difference_text(spec, found.difference, found.difference_half)
            words = [
                mean_text(spec, found.mean, found.half),
                "–" if cell == reference else difference,
                *_MORE[task][1](metrics, cell, reference),
                f"{metrics[f'{cell}/train_seconds']:.3g}",
            ]
        lines.append([label(config["study"], name), *words])
    return head, lines


def _more_of_classifiers(metrics: Mapping[str, Any], cell: str, reference: str) -> list[str]:
    task = TASKS[cell.partition("/")[0]]
    best = compared(metrics, cell, reference, "best_validation_accuracy")
    test = compared(metrics, cell, reference, "test_accuracy")
    difference = difference_text(task, best.difference, best.difference_half)
    return [
        mean_text(task, best.mean, best.half),
        "–" if cell == reference else difference,
        f"{np.mean(values(metrics, cell, 'best_epoch')):.1f}",
        mean_text(task, test.mean, test.half),
    ]


def _more_of_adding(metrics: Mapping[str, Any], cell: str, reference: str) -> list[str]:
    solved = np.isfinite(values(metrics, cell, "solved_at"))
    loss = np.log(values(metrics, cell, "test_loss"))
    return [
        f"{np.sum(solved)} of {len(solved)}",
        mean_text(TASKS["adding"], *map(float, interval(loss)), form="#.2g"),
    ]


_BEST = ("best epoch's validation accuracy", "against it, paired", "best epoch", "test accuracy")
_MORE: dict[str, tuple[tuple[str, ...], Callable]] = {
    "sin": ((), lambda *_: []),
    "imdb": (_BEST, _more_of_classifiers),
    "mnist": (_BEST, _more_of_classifiers),
    "adding": (("solved", "test MSE"), _more_of_adding),
}
_GAPS = (
    "task", "what differs", "cells", "worst", "best", "range of means", "by chance alone",
    "spread over seeds", "range / spread",
)  # fmt: skip


def gap_table(record: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and lines of the study init's last table: what laws change beside what seeds do."""
    lines = []
    for task, names in cells_of(record).items():
        for what, group in groups(names, record["config"]["references"][task]).items():
            found = gap(record["metrics"], [f"{task}/{name}" for name in group])
            if found is None:
                continue
            worst, best = (
                label("init", cell.partition("/")[2]) for cell in (found.worst, found.best)
            )
            sizes = [_size(TASKS[task], x) for x in (found.range, found.chance, found.spread)]
            ratio = f"{found.range / found.spread:.1f}" if found.spread else "–"
            lines.append([task, what, str(found.count), worst, best, *sizes, ratio])
    return list(_GAPS), lines


def _size(task: Task, size: float) -> str:
    return f"× {np.exp(size):.2f}" if task.ratio else f"{size:{task.form}}"


# ---- BENCHMARKS.md ------------------------------------------------------------------------------


def section(groups: Sequence[Any], provenance: Callable[[Any], list[str]]) -> list[str]:
    """The section of BENCHMARKS.md: for each record its tables.

    Args:
      groups: ``tables.Group``s of one record each.
      provenance: the lines that say where a group comes from.

    Returns:
      Lines of Markdown.
    """
    lines = [
        "## what matters: initial laws, variants and dropout", "",
        "Every line is one run of an experiment of this project, all its seeds in one compiled "
        f"program, with one setting changed. {_PAIRED} Errors and numbers of updates are averaged "
        "and compared as logarithms: × is a factor.",
    ]  # fmt: skip
    for group in groups:
        (record,) = group.records
        lines += ["", *_study(record), "", *provenance(group)]
    return lines


def _study(record: Mapping[str, Any]) -> list[str]:
    config = record["config"]
    seeds = f"seeds {record['seed']} to {record['seed'] + config['seeds'] - 1}"
    tasks = cells_of(record)
    lines = [f"### {config['study']} on {', '.join(tasks)}; {seeds}", "", _STUDIES[config["study"]]]
    if config["limit"] is not None:
        lines[-1] += f" A look, and not a result: --limit {config['limit']}."
    for task, names in tasks.items():
        runs = [config["runs"][f"{task}/{name}"] for name in names]
        data = [f"{one['dataset']['name']} ({one['dataset']['source']})"
                for one in runs if "dataset" in one]  # fmt: skip
        epochs = f" {config['epochs']} epochs." if task in ("imdb", "mnist") else ""
        note = f"{_NOTES[task]}{epochs} Data: {' and '.join(dict.fromkeys(data)) or 'none'}."
        lines += ["", f"**{title(config, task)}.** {note}", "", *_markdown(*table(record, task))]
    if config["study"] == "init":
        head, gaps = gap_table(record)
        lines += [
            "", "How much of a gap between frameworks is the default initial law? The range is "
            "that of the means over the seeds; the spread is the standard deviation over the "
            "seeds of one cell, pooled over all; “by chance alone” is the range to be expected of "
            "so many cells if they were all alike: all have the same seeds, so that it is reckoned "
            "from what is left of each number without its cell's and its seed's mean.",
            "", *_markdown(head, gaps),
        ]  # fmt: skip
    return lines


def _markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    rows = [head, ["---"] * len(head), *lines]
    return [f"| {' | '.join(row)} |" for row in rows]
