"""What experiments/long_lag.py found, as text: on the screen, and in BENCHMARKS.md."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lstmjax.seeds import interval, seeds_of

_TITLES = {
    "adding": "adding problem, T = {}",
    "adding-hs": "adding problem of 1997, T = {}",
    "order": "temporal order of two symbols, T = {} to 110",
    "order-3": "temporal order of three symbols, T = {} to 110",
    "copy": "copy problem, T = {}",
}
_MSE, _ENTROPY = "mean squared error", "cross-entropy (nats)"
LOSSES = {
    "adding": _MSE,
    "adding-hs": _MSE,
    "order": _ENTROPY,
    "order-3": _ENTROPY,
    "copy": _ENTROPY,
}
_CRITERIA = {
    "adding": "wrong is an error of 0.08 or more; solved is a mean squared error below 0.01",
    "adding-hs": "wrong is an error of 0.04 or more; solved is at most 1 wrong of 2,560, what "
    "Hochreiter & Schmidhuber's network had wrong at T = 100 after 74,000 sequences",
    "order": "wrong is any output 0.3 or more from its target; solved is at most 1 wrong of 2,560",
    "order-3": "wrong is any output 0.3 or more from its target; solved is at most 2 wrong of "
    "2,560",
    "copy": "wrong are symbols; solved is a loss below a tenth of the baseline, which is that of "
    "guessing the ten symbols",
}
_ALLOWED = {"adding-hs": 1, "order": 1, "order-3": 2}  # wrong ones of 2,560
_HEAD = (
    "cell", "seeds", "solved", "at update", "updates run", "on test", "test loss", "wrong %",
    "train s",
)  # fmt: skip


SCORES = ("solved_at", "test_loss", "test_wrong")  # of each seed, after the cell's name


def row(file: str) -> str:
    """The row that a record's file name stands for: "long-lag-adding" of long-lag-adding-seed0."""
    return re.sub(r"-seeds?\d+(-\d+)?$", "", Path(file).stem)


def apart(record: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    """The records of single seeds that a record of all cells and seeds stands for.

    Returns:
      One for each seed with its seed, SCORES of every cell as its metrics, an equal share of the
      seconds, and ``together``: how many they are.
    """
    own, found = seeds_of(record), []
    for number, seed in enumerate(own):
        scores = {
            f"{cell}_{name}": float(record["metrics"][f"{cell}_{name}"][number])
            for cell in record["config"]["cells"].split(",")
            for name in SCORES
        }
        changed = {
            "seed": seed,
            "config": {**record["config"], "seeds": 1},
            "metrics": scores,
            "seconds": {name: time / len(own) for name, time in record["seconds"].items()},
            "together": len(own),
        }
        found.append({**record, **changed})
    return tuple(found)


def title(task: str, length: int) -> str:
    """A task and its length, in words."""
    return _TITLES[task].format(f"{length:,}")


def published(task: str, length: int) -> str:
    """What Hochreiter & Schmidhuber's LSTM reached there (1997), if it was tried."""
    wrong = {100: "1 of 2,560 wrong after 74,000 sequences", 1000: "1 of 2,560 wrong after 853,000"}
    if task in ("adding", "adding-hs") and length in wrong:
        by = "Hochreiter & Schmidhuber, 1997"
        return f"{wrong[length]} ({by}{', of their own task' if task == 'adding' else ''})"
    return "–"


def met(task: str, baseline: float, loss: Any, wrong: Any) -> np.ndarray:
    """Whether an evaluation meets the criterion of a task.

    Args:
      task: its name.
      baseline: its loss without memory.
      loss, wrong: [S] means over the evaluation, of each seed.

    Returns:
      [S] booleans.
    """
    # In float32, in which they were computed and one of 2,560 is what it was.
    loss, wrong = np.asarray(loss, np.float32), np.asarray(wrong, np.float32)
    if task in _ALLOWED:
        return wrong <= np.float32(_ALLOWED[task] / 2560)
    return loss < np.float32(baseline / 10 if task == "copy" else 0.01)


def tested(record: Mapping[str, Any], cell: str) -> str:
    """How many seeds of a cell meet the criterion on the test sequences, too: "1 of 5"."""
    metrics = record["metrics"]
    loss, wrong = metrics[f"{cell}_test_loss"], metrics[f"{cell}_test_wrong"]
    done = met(record["config"]["task"], float(metrics["baseline_loss"]), loss, wrong)
    return f"{done.sum()} of {len(done)}"


def solved(solved_at: Sequence[Any]) -> tuple[str, str]:
    """How many seeds solved a task, and when those did: "4 of 5" and "1,250 ± 310".

    Args:
      solved_at: updates by seed; infinite where never.

    Returns:
      The two texts; ± is the half-width of the 95 % interval of the mean, which one seed has not.
    """
    times = np.array([float(time) for time in solved_at])
    done = times[np.isfinite(times)]
    count = f"{len(done)} of {len(times)}"
    if not len(done):
        return count, "–"
    mean, half = interval(done)
    return count, f"{mean:,.0f}" + (f" ± {half:,.0f}" if len(done) > 1 else "")


def line(cell: str, solved_at: Sequence[Any], updates: int) -> str:
    """One cell's result for the screen."""
    count, when = solved(solved_at)
    after = f" after {when} updates" if when != "–" else ""
    return f"{cell}: solved by {count} seeds{after}; ran {updates:,} updates"


def section(groups: Sequence[Any], provenance: Callable[[Any], list[str]]) -> list[str]:
    """The section of BENCHMARKS.md: a table for each record.

    Args:
      groups: ``tables.Group``s of one record each.
      provenance: the lines that say where a group comes from.

    Returns:
      Lines of Markdown.
    """
    lines = [
        "## long-lag: memory over many steps", "",
        "Sequences are drawn afresh for every update, and all seeds of a cell learn in one "
        "compiled program, which stops where all have solved the task on 2,560 held-out "
        "sequences. “At update”: the first evaluation that met the criterion, mean ± 95 % "
        "interval (Student's t) over the seeds that did. It is the first of many looks: “on test” "
        "says how many seeds meet the criterion on as many other sequences, too, looked at once, "
        "with the weights of that evaluation, or the last ones where there is none. Test loss and "
        "wrong answers are of the same look: mean ± 95 % interval over all seeds. Seconds were "
        "taken one after the other on a shared machine: those of two cells are not to be compared.",
    ]  # fmt: skip
    for group in groups:
        (record,) = group.records
        lines += ["", *_table(record, row(group.files[0])), "", *provenance(group)]
    return lines


def _table(record: Mapping[str, Any], name: str) -> list[str]:
    config, metrics = record["config"], record["metrics"]
    task, every = config["task"], config["eval_every"]
    first, *_, last = seeds_of(record) * 2
    seeds = f"{first}–{last}" if last > first else str(first)
    base = f"{metrics['baseline_loss']:.3g}"
    lines = [
        f"### {name}: {title(task, config['length'])}", "",
        f"The loss is the {LOSSES[task]}; without memory it is {base} at best. Here "
        f"{_CRITERIA[task]}. Evaluated after every {every:,} updates of {config['batch_size']} "
        f"sequences, at most {config['updates']:,}.", "",
        _row(_HEAD), _row(["---"] * len(_HEAD)),
    ]  # fmt: skip
    for cell in config["cells"].split(","):
        loss, wrong = (_interval(metrics, f"{cell}_test_{name}") for name in ("loss", "wrong"))
        lines.append(
            _row(
                [cell, seeds, *solved(metrics[f"{cell}_solved_at"]),
                 f"{metrics[f'{cell}_updates'][-1]:,}", tested(record, cell),
                 _plus_minus(*loss, ".2g"), _plus_minus(*(100 * n for n in wrong), ".2f"),
                 f"{metrics[f'{cell}_train_seconds']:.0f}"]
            )
        )  # fmt: skip
    return lines


def _interval(metrics: Mapping[str, Any], name: str) -> tuple[float, float]:
    return float(metrics[f"{name}_mean"]), float(metrics[f"{name}_half_width"])


def _plus_minus(mean: float, half: float, form: str) -> str:
    """`mean ± half`, the latter only where there is one."""
    return f"{mean:{form}}" + (f" ± {half:{form}}" if np.isfinite(half) else "")


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
