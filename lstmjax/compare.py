"""What differs between two records: `python -m lstmjax.records compare A B`.

The exit code is that of diff: 0 where nothing differs, 1 where something does, 2 where a record
cannot be read. When a run was made, how long it took and where it was written differ between any
two runs: they are shown and do not count.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro

from lstmjax.cli import ConfigError
from lstmjax.records import RunError, to_json
from lstmjax.schema import is_cost
from lstmjax.tables import load

# The order of the table; whatever else a record holds comes last.
_SECTIONS = (
    "experiment", "row", "peer", "version", "date", "command", "seed", "resumed", "dataset",
    "config", "environment", "metrics", "first_steps", "params_sha256", "seconds",
)  # fmt: skip
# That a run was resumed does not count either: what it ends with is the same.
_ASIDE = {"date", "command", "resumed", "config.out", "config.live", "config.resume"}
_ABSENT = "absent"
_WIDEST = 32  # characters of a value


@dataclass(frozen=True)
class Compare:
    """Says what differs between two records."""

    a: Annotated[Path, tyro.conf.Positional]
    """a record, or the folder of a finished run"""
    b: Annotated[Path, tyro.conf.Positional]
    """another one"""
    json: bool = False
    """print JSON in place of a table"""


class Difference(NamedTuple):
    """One thing in which two records differ.

    Attributes:
      place: where it stands, as in "metrics.test_accuracy".
      a, b: the two values; the text "absent" where a record has none.
      absolute: b − a of two numbers, or of the places of two lists with the largest |b − a|; else
        None.
      relative: (b − a)/|a| of the same, infinite where a is 0; of seconds b/a.
      counts: whether it makes the records different ones.
    """

    place: str
    a: Any
    b: Any
    absolute: float | None
    relative: float | None
    counts: bool


def read(path: str | Path) -> dict[str, Any]:
    """A record, from its file or from the folder of a run that has one.

    Raises:
      ConfigError: there is none, or it is not valid.
    """
    path = Path(path)
    try:
        return load(path / "record.json" if path.is_dir() else path)
    except RunError as error:
        raise ConfigError(str(error)) from error


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Difference]:
    """Everything in which two records differ, by section and then by name.

    Args:
      a, b: records, as read from JSON.
    """
    one, other = dict(_flat(a)), dict(_flat(b))
    found = []
    for place in sorted(one.keys() | other.keys(), key=_rank):
        x, y = one.get(place, _ABSENT), other.get(place, _ABSENT)
        if _same(x, y):
            continue
        timed = place.startswith("seconds.")
        absolute, relative = _distance(x, y, timed)
        cost = timed or (place.startswith("metrics.") and is_cost(place))
        counts = not cost and place not in _ASIDE
        found.append(Difference(place, x, y, absolute, relative, counts))
    return found


def _flat(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Every value that is no object, under its dotted name."""
    if isinstance(value, Mapping) and (value or not place):
        for key, item in value.items():
            yield from _flat(item, f"{place}.{key}" if place else str(key))
    else:
        yield place, value


def _rank(place: str) -> tuple[int, str]:
    section = place.partition(".")[0]
    return _SECTIONS.index(section) if section in _SECTIONS else len(_SECTIONS), place


def _same(x: Any, y: Any) -> bool:
    return x == y and isinstance(x, bool) == isinstance(y, bool)


def _distance(x: Any, y: Any, timed: bool) -> tuple[float | None, float | None]:
    """The absolute and the relative difference of numbers, or of lists of numbers."""
    if isinstance(x, list) and isinstance(y, list) and len(x) == len(y):
        pairs = [_distance(u, v, timed) for u, v in zip(x, y, strict=True)]
        if any(absolute is None for absolute, _ in pairs):
            return None, None
        return max(pairs, key=lambda pair: math.inf if math.isnan(pair[0]) else abs(pair[0]))
    x, y = number(x), number(y)
    if x is None or y is None:
        return None, None
    if timed:
        return y - x, y / x if x else math.inf
    if x == y or (math.isnan(x) and math.isnan(y)):
        return 0.0, 0.0
    return y - x, (y - x) / abs(x) if x else math.copysign(math.inf, y - x)


def number(value: Any) -> float | None:
    """A record's number, of which "nan", "inf" and "-inf" are three; None for anything else."""
    known = type(value) in (int, float) or value in ("nan", "inf", "-inf")
    try:
        return float(value) if known else None
    except OverflowError:  # JSON's integers have no end
        return None


# ---- in words -----------------------------------------------------------------------------------


def table(found: Sequence[Difference]) -> str:
    """The differences as text in columns, a block for each section."""
    blocks: dict[str, list[Difference]] = {}
    for difference in found:
        section, dot, _ = difference.place.partition(".")
        blocks.setdefault(section if dot else "", []).append(difference)
    lines = []
    for section, members in blocks.items():
        of_numbers = any(one.absolute is not None for one in members)
        heads = ["B − A", "B / A" if section == "seconds" else "relative"] if of_numbers else []
        rows = [[section, "A", "B", *heads]]
        for one in members:
            name = one.place.removeprefix(f"{section}.") if section else one.place
            rows.append(
                [f"  {name}", _shown(one.a), _shown(one.b), *_distances(one)][: 3 + len(heads)]
            )
        lines += ["", *_aligned(rows)]
    return "\n".join(lines[1:])


def _distances(one: Difference) -> list[str]:
    if one.absolute is None:
        return ["", ""]
    relative = f"{one.relative:.3g}" if one.place.startswith("seconds.") else f"{one.relative:+.2e}"
    return [f"{one.absolute:+.3g}", relative]


def _shown(value: Any) -> str:
    """A value in one short piece."""
    if value is None:
        return "null"
    if type(value) is float:
        return f"{value:.10g}"
    text = f"[{', '.join(map(_shown, value))}]" if isinstance(value, list) else str(value)
    if re.fullmatch("[0-9a-f]{40,64}", text):  # a commit, a sum: it begins with other digits or not
        return f"{text[:12]}…"
    return text if len(text) <= _WIDEST else f"{text[: _WIDEST - 1]}…"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = [[cell.ljust(w) for cell, w in zip(row, widths, strict=True)] for row in rows]
    return ["  ".join(row).rstrip() for row in padded]


def compare(options: Compare) -> int:
    """Prints what differs between two records; returns the exit code."""
    found = differences(read(options.a), read(options.b))
    differ = any(one.counts for one in found)
    if options.json:
        listed = [one._asdict() for one in found]
        files = {"a": str(options.a), "b": str(options.b)}
        print(to_json({**files, "same": not differ, "differences": listed}).decode(), end="")
        return int(differ)
    print(f"A  {options.a}\nB  {options.b}\n")
    if found:
        print(f"{table(found)}\n")
    aside = " but time and place" if found else ""
    print("the records differ" if differ else f"nothing differs{aside}")
    return int(differ)
