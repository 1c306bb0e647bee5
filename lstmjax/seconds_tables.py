"""What experiments/seconds.py measured, as numbers and as text: a ``Line`` for each framework.

A record keeps it by names that begin with the framework's (``columns``, read again by
``lines_of``):

    metrics["keras_seconds_0"]     of training at the end of each epoch, of the first seed
    metrics["keras_accuracy_0"]    on validation, at the same moments
    metrics["keras_compile"]       of each seed; also keras_train, keras_eval, keras_process and
                                   keras_test_accuracy
    config["versions"]["keras"]    "keras 3.15.1 / tensorflow 2.21.0"
    config["levels"]               validation accuracies that are to be reached
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

TITLES = {
    "imdb-tf2": "IMDB reviews, two LSTMs(64) on the last 80 words, batches of 128",
    "mnist-corrected": "MNIST by rows, LSTM(100), batches of 50",
}
OFFLINE = {
    "imdb-tf2": TITLES["imdb-tf2"].replace("IMDB", "generated"),
    "mnist-corrected": TITLES["mnist-corrected"].replace("MNIST", "rendered digits"),
}
LEVELS = {"imdb-tf2": (0.80, 0.83, 0.84), "mnist-corrected": (0.90, 0.95)}
_BY_EPOCH = ("seconds", "accuracy")
_BY_SEED = ("compile", "train", "eval", "process", "test_accuracy")


class Line(NamedTuple):
    """One framework's runs of a program, of S seeds and E epochs each.

    Attributes:
      framework: its name.
      versions: its name with its version, or versions.
      seconds: [S][E], of training alone, at the end of each epoch.
      accuracy: [S][E], on validation, at the end of each epoch.
      compile: [S], seconds until the first batches of training and of scoring have come out.
      train, eval: [S], seconds of all further training, and of scoring.
      process: [S], seconds from the start of the process to its end: imports, data and all.
      test_accuracy: [S], after the last epoch.
    """

    framework: str
    versions: str
    seconds: tuple[tuple[float, ...], ...]
    accuracy: tuple[tuple[float, ...], ...]
    compile: tuple[float, ...]
    train: tuple[float, ...]
    eval: tuple[float, ...]
    process: tuple[float, ...]
    test_accuracy: tuple[float, ...]

    @property
    def epoch(self) -> list[float]:
        """Seconds of an epoch, the mean over each seed's epochs, [S]."""
        return [times[-1] / len(times) for times in self.seconds]

    def reaching(self, level: float) -> list[float]:
        """Seconds of training at the end of the first epoch that reaches an accuracy, [S].

        Infinite of a seed that never does. Nothing is interpolated: between the ends of epochs
        nobody has looked. An accuracy in float32 that is the level, rounded, reaches it.
        """
        level = min(level, float(np.float32(level)))
        found = []
        for times, accuracies in zip(self.seconds, self.accuracy, strict=True):
            pairs = zip(times, accuracies, strict=True)
            found.append(next((time for time, reached in pairs if reached >= level), math.inf))
        return found


# ---- numbers ------------------------------------------------------------------------------------


def columns(lines: Sequence[Line]) -> dict[str, list[float]]:
    """Lines as the metrics of a record."""
    found = {}
    for line in lines:
        for name in _BY_EPOCH:
            for number, values in enumerate(getattr(line, name)):
                found[f"{line.framework}_{name}_{number}"] = list(values)
        found |= {f"{line.framework}_{name}": list(getattr(line, name)) for name in _BY_SEED}
    return found


def lines_of(record: Mapping[str, Any]) -> list[Line]:
    """The lines of a record, in the order of ``config.versions``."""
    metrics, lines = record["metrics"], []
    for framework, versions in record["config"]["versions"].items():
        count = len(metrics[f"{framework}_train"])
        by_epoch = (
            tuple(_numbers(metrics[f"{framework}_{name}_{n}"]) for n in range(count))
            for name in _BY_EPOCH
        )
        by_seed = (_numbers(metrics[f"{framework}_{name}"]) for name in _BY_SEED)
        lines.append(Line(framework, versions, *by_epoch, *by_seed))
    return lines


def _numbers(values: Sequence[Any]) -> tuple[float, ...]:
    return tuple(map(float, values))


def ratios(times: Sequence[float], base: Sequence[float]) -> list[float]:
    """Times as multiples of others, seed by seed, where both are finite."""
    pairs = zip(times, base, strict=True)
    return [a / b for a, b in pairs if math.isfinite(a) and math.isfinite(b)]


def spread(values: Sequence[float]) -> str:
    """`median (lowest–highest)` of the finite ones, and how many those are where some are not."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return "–"
    text = _short(statistics.median(finite))
    if len(finite) > 1:
        text += f" ({_short(min(finite))}–{_short(max(finite))})"
    return text + f", {len(finite)} of {len(values)}" * (len(finite) < len(values))


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 99.5 else f"{value:#.3g}"


# ---- text ---------------------------------------------------------------------------------------

LEGEND = (
    "The same program in each framework, each run in a process of its own, the frameworks taking "
    "turns with every seed. Seconds of training are without compiling and scoring: of lstmjax the "
    "compiled steps, the first among them; of the others the whole loop after the first batch. An "
    "accuracy is reached at the end of the first epoch whose validation accuracy is no less, for "
    "it is looked at after each epoch. Start: until the first batches of training and scoring have "
    "come out, of lstmjax until their programs are compiled. "
    "Process: all of it, with imports and data. Test accuracy: the mean. All else: medians. With "
    "the range over the seeds in parentheses, and how many seeds reached it where not all did; × "
    "is the median over seeds of the ratio to {} with the same seed."
)


def rows(lines: Sequence[Line], levels: Sequence[float]) -> list[list[str]]:
    """The table's head and a row for each line; × is of the first line."""
    head = ["", "s an epoch", "×"]
    for level in levels:
        head += [f"s to {level:.2f}", "×"]
    table = [[*head, "start s", "process s", "×", "test accuracy"]]
    base = lines[0]
    for line in lines:
        row = [line.versions, *_compared(line.epoch, base.epoch)]
        for level in levels:
            row += _compared(line.reaching(level), base.reaching(level))
        row.append(spread(line.compile))
        row += _compared(line.process, base.process)
        accuracy = statistics.fmean(line.test_accuracy)
        row.append(f"{accuracy:.4f} ({min(line.test_accuracy):.4f}–{max(line.test_accuracy):.4f})")
        table.append(row)
    return table


def _compared(times: Sequence[float], base: Sequence[float]) -> list[str]:
    """A cell of times, and one of how many times as long as the first line they are."""
    found = ratios(times, base)
    return [spread(times), f"{statistics.median(found):.2f}" if found else "–"]


def section(groups: Sequence[Any], provenance: Callable[[Any], list[str]]) -> list[str]:
    """The section of BENCHMARKS.md, a table for each record.

    Args:
      groups: each with one record in ``records``.
      provenance: ``provenance(group) -> lines``: command, versions, device and file.

    Returns:
      Lines of Markdown.
    """
    found = [lines_of(group.records[0]) for group in groups]
    first = found[0][0].framework if found else ""
    lines = ["## seconds: accuracy against time", "", LEGEND.format(first)]
    for group, here in zip(groups, found, strict=True):
        (record,) = group.records
        config = record["config"]
        epochs, seeds = len(here[0].seconds[0]), len(here[0].train)
        title = f"**{config['program']}**: {config['title']}; {epochs} epochs, {seeds} seeds."
        head, *body = rows(here, config["levels"])
        lines += ["", title, ""]
        lines += [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body)]
        lines += ["", *provenance(group)]
    return lines
