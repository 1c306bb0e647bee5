"""One line for every row that was run: BENCHMARKS.md begins with all, README.md with five."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lstmjax import long_lag_tables
from lstmjax.provenance import with_value, without_flags
from lstmjax.rows import FIRST, GOES_ON, ROWS
from lstmjax.seeds import interval, seeds_of

HEAD = (
    "row", "command", "parameters", "updates", "seeds", "validation", "test, ± 95 %", "published",
    "train s", "device", "records",
)  # fmt: skip
SHORT = ("row", "seeds", "test, ± 95 %", "published", "train s", "record")
NONE = "–"
_FLAGS = ("--seed", "--seeds", "--out")  # which do not make another program


def section(groups: Sequence[Any], long_lag: Sequence[Any]) -> list[str]:
    """The table of all rows.

    Args:
      groups: ``tables.Group``s; those of other frameworks are left out.
      long_lag: groups of one record each, of experiments/long_lag.py.

    Returns:
      Lines of Markdown.
    """
    lines = [
        "## all rows", "",
        "Test and validation: mean ± 95 % interval over the seeds (Student's t), of the metric "
        "that the row's own section names first. Whatever was chosen was chosen on validation, and "
        "the test split was scored once by each run, all of it, but where a row repeats a source "
        "that does otherwise or its section says so; what a row's notes say of earlier runs was "
        "tested, too. Training seconds are those of one seed; rows with “at once” share one "
        "program. “–”: there is none, or the record is older than the column.", "",
        _line(HEAD), _line(["---"] * len(HEAD)),
    ]  # fmt: skip
    lines += [_line([cells[name] for name in HEAD]) for cells in found(groups, long_lag)]
    return lines


def best(groups: Sequence[Any], long_lag: Sequence[Any], count: int = 5) -> str:
    """The first ``count`` rows of ``rows.FIRST`` that were run on the real data."""
    real = [group for group in groups if group.records[0]["dataset"]["source"] != "offline"]
    every = {}
    for cells in found(real, long_lag):
        every.setdefault(cells["row"].split(",")[0], cells)
    chosen = [every[row] for row in FIRST if row in every][:count]
    lines = [_line(SHORT), _line(["---"] * len(SHORT))]
    for cells in chosen:
        cells = cells | {"record": cells["records"].partition(" to ")[0], "row": cells["title"]}
        lines.append(_line([cells[name] for name in SHORT]))
    return "\n".join(lines)


def found(groups: Sequence[Any], long_lag: Sequence[Any]) -> Iterator[dict[str, str]]:
    """The cells of every row, by column; "title" is the row with what it is."""
    for group in groups:
        if group.name == "lstmjax":
            yield _program(group)
    for group in long_lag:
        yield from _task(group)


def _program(group: Any) -> dict[str, str]:
    spec, records = ROWS[group.row], group.records
    key, metric, form = spec.metrics[0]
    held_out = [_validation(record["metrics"], key) for record in records]
    validation = _numbers(value for value in held_out if value is not None)
    together = records[0].get("together")
    link = f"[{group.row}](BENCHMARKS.md#{_anchor(group.row, spec.title)})"
    return {
        "row": f"{group.row}, {together} at once" if together else group.row,
        "title": f"{link}: {spec.title}, {metric}",
        "command": _command(records[0]),
        "parameters": _size(records, "parameters"),
        "updates": _size(records, "updates"),
        "seeds": str(len(records)),
        # Seeds that were chosen together have one number in common, which has no interval.
        "validation": _spread(validation[: 1 if len(set(validation)) == 1 else None], form),
        "test, ± 95 %": _spread(_numbers(group.values(key)), form),
        "published": spec.published,
        "train s": group.seconds("train"),
        "device": str(records[0]["environment"].get("device", NONE)),
        "records": _files(group.files),
    }


def _task(group: Any) -> Iterator[dict[str, str]]:
    """A line for each cell of a long-lag task: how many seeds solved it, when, and on test."""
    (record,) = group.records
    config, metrics = record["config"], record["metrics"]
    row = long_lag_tables.row(group.files[0])
    title = long_lag_tables.title(config["task"], config["length"])
    count = len(seeds_of(record))
    for cell in config["cells"].split(","):
        solved, when = long_lag_tables.solved(metrics[f"{cell}_solved_at"])
        yield {
            "row": f"{row}: {title}, {cell}",
            "title": f"{row}: {title}, {cell}",
            "command": _command(record),
            "parameters": NONE,
            "updates": f"{metrics[f'{cell}_updates'][-1]:,}",
            "seeds": str(count),
            "validation": f"solved by {solved}" + (f" at {when}" if when != NONE else ""),
            "test, ± 95 %": f"solved by {long_lag_tables.tested(record, cell)}",
            "published": long_lag_tables.published(config["task"], config["length"]),
            "train s": f"{metrics[f'{cell}_train_seconds'] / count:.3g}",
            "device": str(record["environment"].get("device", NONE)),
            "records": _files(group.files),
        }


def _validation(metrics: Mapping[str, Any], key: str) -> Any:
    """A run's own metric ``key``, on validation: of the epoch that was chosen, where one was."""
    name = key.removeprefix("test_")
    if name == key:
        return None
    plain, best, epoch = f"validation_{name}", f"best_validation_{name}", metrics.get("best_epoch")
    if best not in metrics and isinstance(epoch, int) and f"{plain}_epochs" in metrics:
        return metrics[f"{plain}_epochs"][epoch - 1]
    return metrics.get(best, metrics.get(plain))


def _numbers(values: Iterable[Any]) -> list[float]:
    """One number for each record: of lists, as of several hold-outs, the mean."""
    return [float(np.mean(np.asarray(value, float))) for value in values]


def _spread(values: Sequence[float], form: str) -> str:
    """`mean ± half` of the 95 % interval, which a single value has not."""
    if not values:
        return NONE
    mean, half = interval(values)
    return f"{mean:{form}}" + (f" ± {half:{form}}" if np.isfinite(half) else "")


def _size(records: Sequence[Mapping[str, Any]], name: str) -> str:
    """A count that all records have in common, or its range."""
    sizes = sorted({record[name] for record in records if name in record})
    return f"{sizes[0]:,}" + (f"–{sizes[-1]:,}" if len(sizes) > 1 else "") if sizes else NONE


def _files(files: Sequence[str]) -> str:
    first, *_, last = (*files, files[-1])
    name = f"[{first.removesuffix('.json')}](experiments/results/{first})"
    return name if last == first else f"{name} to {last.removesuffix('.json')}"


def _command(record: Mapping[str, Any]) -> str:
    return f"`{with_value(without_flags(record['command'], *_FLAGS), 'DIR', *GOES_ON)}`"


def _anchor(row: str, title: str) -> str:
    """What GitHub calls the heading `row: title`."""
    text = f"{row}: {title}".lower()
    return "".join(c for c in text if c.isalnum() or c in " -_").replace(" ", "-")


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
