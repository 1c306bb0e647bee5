"""Records in, tables out: the text of BENCHMARKS.md and of the results table in README.md.

Runs that differ in nothing but their seed (and folder) are one line: mean ± sample standard
deviation (n - 1) over the seeds, and the range. What is written depends on the records alone, so
that the same records always give the same files.
"""

import contextlib
import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lstmjax import (
    flow_tables,
    gpu_tables,
    long_lag_tables,
    overview_tables,
    peer_tables,
    seconds_tables,
    soak_tables,
    timing_tables,
)
from lstmjax.data import files
from lstmjax.data.dataset import one_line
from lstmjax.provenance import with_value, without_flags
from lstmjax.records import RunError, validate
from lstmjax.rows import GOES_ON, ROWS, SOURCES, Row
from lstmjax.schema import SECONDS
from lstmjax.seeds import apart, seeds_of
from lstmjax.truncation_tables import section as truncation_section
from lstmjax.what_matters_tables import section as what_matters_section

_VERSIONS = (
    "python", "jax", "jaxlib", "flax", "optax", "tensorflow", "keras", "torch", "numpy", "onednn",
)  # fmt: skip
# Settings that make no other program (what the wish for `data` came to is in the record's dataset);
# and what older records do not have.
_NO_SETTINGS = (
    "seed", "out", "live", "seeds", "sweep", "save_every", "keep", "resume", "deterministic",
    "pretrained", "pretrained_sha256", "teacher", "teacher_sha256", "data",
)  # fmt: skip
_LATER = {"on_nan": "stop", "confidence": 0.9}

# What the metrics of experiments/parity.py are called, and how a column is headed.
_DTYPES = ("float64", "float32")
_ERRORS = {"value": "values", "gradient": "gradients", "train": "20 steps"}


@dataclass(frozen=True)
class Group:
    """Runs that differ only in their seeds, in the order of their seeds.

    Attributes:
      row: a key of ROWS, "parity", or an experiment that times layers.
      name: "lstmjax", or the peer's framework and version.
      records: the records.
      files: the records' file names.
    """

    row: str
    name: str
    records: tuple[Mapping[str, Any], ...]
    files: tuple[str, ...]

    def values(self, key: str) -> list[Any]:
        """A metric of every record that has it."""
        return [r["metrics"][key] for r in self.records if key in r["metrics"]]

    @property
    def label(self) -> str:
        """The name, and whether all its seeds were one program."""
        at_once = self.records[0].get("together")
        return f"{self.name}, {at_once} seeds at once" if at_once else self.name

    def seconds(self, key: str) -> str:
        """The median of `compile`, `train`, `eval` or `total` over the records, as text."""
        totals = [sum(r["seconds"][k] for k in SECONDS) for r in self.records]
        times = totals if key == "total" else [r["seconds"][key] for r in self.records]
        median = statistics.median(times)
        return f"{median:.0f}" if median >= 99.5 else f"{median:.3g}"


# ---- reading ------------------------------------------------------------------------------------


def load(path: str | Path) -> dict[str, Any]:
    """Reads and checks a record. Raises RunError, in one line, for a file that is none."""
    try:
        record = files.read_json(path)
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise RunError(f"{path} is no JSON: {files.reason(error)}") from error
    if problems := validate(record):
        raise RunError(f"{path} is no valid record: {'; '.join(problems)}")
    return record


def load_groups(results: str | Path) -> list[Group]:
    """Every record below a folder that belongs to a row, grouped; in the order of ROWS, ours first.

    Raises:
      RunError: a file is no record, names no known row, or repeats another one's seed.
    """
    gathered: dict[tuple, list[tuple[int, str, dict]]] = {}
    for path in sorted(Path(results).glob("*.json")):
        record = load(path)
        row = _row_of(record)
        if row is None:
            continue
        if row not in ROWS:
            raise RunError(f"{path}: got the row {row!r}, expected one of {', '.join(ROWS)}")
        for own in apart(record):
            gathered.setdefault(_group_key(row, own), []).append((own["seed"], path.name, own))
    groups = []
    for (row, name, *_), runs in sorted(gathered.items()):
        runs.sort(key=lambda run: run[:2])
        for (seed, file, _), (next_seed, next_file, _) in zip(runs, runs[1:], strict=False):
            if seed == next_seed:
                raise RunError(f"{file} and {next_file} are two runs of the same seed {seed}")
        seeds, files, records = zip(*runs, strict=True)
        groups.append(Group(row, name, records, files))
    order = list(ROWS)
    return sorted(groups, key=lambda g: (order.index(g.row), g.name != "lstmjax"))


def load_parity(results: str | Path) -> list[Group]:
    """Every record of experiments/parity.py below a folder, each a group of its own.

    Raises:
      RunError: a file is no record, or does not say what made the vectors.
    """
    groups = []
    for path in sorted(Path(results).glob("*.json")):
        record = load(path)
        if record["experiment"] == "parity":
            if not isinstance(record["config"].get("vectors"), dict):
                raise RunError(f"{path}: config.vectors is missing: what made the golden vectors")
            groups.append(Group("parity", "lstmjax", (record,), (path.name,)))
    return groups


def load_timed(results: str | Path) -> dict[str, list[Group]]:
    """Every record of the experiments with sections of their own, by experiment, a group each.

    Raises:
      RunError: a file is no record.
    """
    found = {experiment: [] for experiment in _TIMED}
    for path in sorted(Path(results).glob("*.json")):
        record = load(path)
        experiment = record["experiment"]
        if experiment in found:
            found[experiment].append(Group(experiment, "lstmjax", (record,), (path.name,)))
    return found


def _row_of(record: Mapping[str, Any]) -> str | None:
    return record["peer"]["row"] if "peer" in record else record.get("row")


def _group_key(row: str, record: Mapping[str, Any]) -> tuple[str, ...]:
    """What runs must share to be averaged: program, framework, data, settings and device."""
    later = {} if "peer" in record else _LATER
    settings = later | record.get("config", {})
    settings = {k: v for k, v in settings.items() if k not in _NO_SETTINGS}
    name = record["peer"]["framework"] if "peer" in record else "lstmjax"
    # The hash is left out: what is held out for validation, and so the content, goes by the seed.
    data = {key: record["dataset"].get(key) for key in ("name", "source")}
    parts = [data, settings, _device(record), record.get("together", 1)]
    return row, name, *(json.dumps(part, sort_keys=True) for part in parts)


# ---- writing ------------------------------------------------------------------------------------


def benchmarks(
    groups: Sequence[Group],
    parity: Sequence[Group] = (),
    timed: Mapping[str, Sequence[Group]] | None = None,
) -> str:
    """The whole text of BENCHMARKS.md, from ``load_groups``, ``load_parity``, ``load_timed``."""
    lines = [
        "# Benchmarks", "",
        "Written by `python -m lstmjax.records table` from the records in experiments/results/; "
        "edits by hand are overwritten.", "",
        "Every line is one program over as many seeds as it says: mean ± sample standard deviation "
        "(n − 1), and the range in parentheses. Lists over epochs show the mean of each epoch and "
        "the largest standard deviation. Seconds are medians over the seeds; total = compile + "
        "train + eval. Those to train are of the compiled steps, of other frameworks of the whole "
        "loop. Where a section says of some runs alone which processor they had, their seconds are "
        "of different ones. “–”: not measured.",
    ]  # fmt: skip
    if groups:
        with _shown(groups):
            long_lag = (timed or {}).get("long_lag", ())
            lines += ["", *overview_tables.section(groups, long_lag)]
    for row, spec in ROWS.items():
        members = [group for group in groups if group.row == row]
        beside = [group for group in groups if group.row == spec.beside]
        if members:
            with _shown(members + beside):
                lines += ["", *_section(row, spec, members, beside)]
    if parity:
        with _shown(parity):
            lines += ["", *_parity_section(parity)]
    for experiment, members in (timed or {}).items():
        if members or experiment == "gpu":  # whose section says what is not measured
            with _shown(members):
                lines += ["", *_TIMED[experiment](members)]
    return "\n".join(lines) + "\n"


@contextlib.contextmanager
def _shown(groups: Sequence[Group]) -> Iterator[None]:
    """What valid records lack for their table becomes one line that names them."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        names = ", ".join(file for group in groups for file in group.files)
        raise RunError(f"{names}: not what the table shows ({one_line(error)})") from error


def _section(row: str, spec: Row, groups: Sequence[Group], beside: Sequence[Group]) -> list[str]:
    """One program's table, and below it where each of its lines comes from.

    Those ``beside`` are of the section of ``spec.beside``, which says where they come from.
    """
    labels = [label for _, label, _ in spec.metrics]
    head = ["", *labels, "seeds", "compile s", "train s", "eval s", "total s", "data"]
    kind = "Source program" if row in SOURCES or spec.beside else "Source:"
    lines = [f"## {row}: {spec.title}", "", f"{kind} {spec.source}. {spec.note}", ""]
    lines += [_line(head), _line(["---"] * len(head))]
    for group in [*groups, *beside]:
        cells = [summary(group.values(key), form) for key, _, form in spec.metrics]
        times = [group.seconds(key) for key in (*SECONDS, "total")]
        label = group.label if group.row == row else f"{spec.beside}: {group.label}"
        lines.append(_line([label, *cells, str(len(group.records)), *times, _data(group)]))
    for group in groups:
        lines += ["", *_provenance(group)]
    return lines


def _parity_section(groups: Sequence[Group]) -> list[str]:
    """How far our numbers are from other frameworks', a table for each record."""
    lines = [
        "## parity: the numbers of other frameworks", "",
        "Golden vectors that each framework computed in float64, against what lstmjax computes "
        "from the same weights: outputs and final states, gradients, and the losses and weights of "
        "20 optimiser steps. The largest error of any array of any case, as max|got − want| / "
        "max|want|; the run fails above 1e-10 in float64 and 1e-5 in float32.",
    ]  # fmt: skip
    kinds = [(dtype, key) for dtype in _DTYPES for key in _ERRORS]
    head = ["vectors", "made with", "cases", *(f"{d} {_ERRORS[key]}" for d, key in kinds)]
    for group in groups:
        (record,) = group.records
        lines += ["", _line(head), _line(["---"] * len(head))]
        for name, made in record["config"]["vectors"].items():
            errors = [record["metrics"].get(f"{name}_{dtype}_{key}") for dtype, key in kinds]
            cells = ["–" if error is None else f"{float(error):.1e}" for error in errors]
            versions = ", ".join(" ".join(pair) for pair in made["versions"].items())
            lines.append(_line([name, versions, str(record["metrics"][f"{name}_cases"]), *cells]))
        lines += ["", *_provenance(group)]
    return lines


def _each(section: Callable, groups: Sequence[Group]) -> list[str]:
    """The section of every record, and where it comes from."""
    return sum(([*section(g.records[0]), "", *_provenance(g), ""] for g in groups), [])[:-1]


_TIMED = {
    "peer-layers": lambda groups: _each(peer_tables.section, groups),
    "scan_vs_unrolled": lambda groups: timing_tables.comparison_section(groups, _provenance),
    "scaling": lambda groups: timing_tables.scaling_section(groups, _provenance),
    "long_lag": lambda groups: long_lag_tables.section(groups, _provenance),
    "gradient-flow": lambda groups: flow_tables.section(groups, _provenance),
    "truncation": lambda groups: truncation_section(groups, _provenance),
    "seconds": lambda groups: seconds_tables.section(groups, _provenance),
    "what_matters": lambda groups: what_matters_section(groups, _provenance),
    "soak": lambda groups: soak_tables.section(groups, _provenance),
    "gpu": lambda groups: _each(gpu_tables.section, groups) or gpu_tables.section(None),
}


def _provenance(group: Group) -> list[str]:
    """Command, device, versions, commit, data and files of a group."""
    environments = [record["environment"] for record in group.records]
    commands = _distinct(
        with_value(without_flags(record["command"], "--seed", "--out"), "DIR", *GOES_ON)
        for record in group.records
    )
    versions = _distinct(
        ", ".join(f"{name} {e[name]}" for name in _VERSIONS if e.get(name)) for e in environments
    )
    commits = _distinct(_commit(e) for e in environments)
    kinds = _processors(environments)
    hashes = _distinct((r["dataset"].get("sha256") or "–")[:12] for r in group.records)
    seeds = ", ".join(str(seed) for record in group.records for seed in seeds_of(record))
    if group.label != group.name:
        seeds += ", each with an equal share of the seconds"
    return [
        f"- **{group.label}**: {' and '.join(f'`{c}`' for c in commands)} with seeds {seeds}",
        f"  - on {_device(group.records[0])}{f' ({kinds})' * bool(kinds)}; "
        f"{' and '.join(versions)}; "
        f"commit {' and '.join(commits)}; data sha256 {' and '.join(hashes)}",
        f"  - records: {', '.join(f'`{file}`' for file in _distinct(group.files))}",
    ]


def _processors(environments: Sequence[Mapping[str, Any]]) -> str:
    """Which kinds of processor there were, and of how many runs, where some records do not say."""
    said = [e["processor"] for e in environments if e.get("processor")]
    some = f"said of {len(said)} of {len(environments)} runs: "
    return some * (0 < len(said) < len(environments)) + " and ".join(_distinct(said))


def readme_table(groups: Sequence[Group]) -> str:
    """The short table of README.md: a line for each of our groups, beside its peers."""
    head = ["program", "metric", "lstmjax", "elsewhere", "train s", "elsewhere", "seeds", "data"]
    lines = [_line(head), _line(["---"] * len(head))]
    for group in groups:
        if group.name != "lstmjax":
            continue
        same = (group.row, ROWS[group.row].beside)
        peers = [peer for peer in groups if peer.row in same and peer.name != "lstmjax"]
        key, label, form = ROWS[group.row].metrics[0]
        program = group.label.replace(group.name, group.row, 1)
        with _shown([group, *peers]):
            names = [p.name if p.row == group.row else f"{p.row}: {p.name}" for p in peers]
            theirs = [
                f"{summary(p.values(key), form, short=True)} ({name})"
                for p, name in zip(peers, names, strict=True)
            ]
            times = [
                p.seconds("train") + f" ({p.name.split()[0]})" * (len(peers) > 1) for p in peers
            ]
            ours = summary(group.values(key), form, short=True)
        lines.append(
            _line(
                [program, label, ours, "; ".join(theirs) or "–", group.seconds("train"),
                 "; ".join(times) or "–", str(len(group.records)), _data(group)]
            )
        )  # fmt: skip
    return "\n".join(lines)


def summary(values: Sequence[Any], form: str, short: bool = False) -> str:
    """`mean ± std (min–max)` of numbers, or the mean of each place of equally long lists.

    The standard deviation is the sample's (n - 1); of a single value there is none. An empty
    sequence is “–”.
    """
    if not values:
        return "–"
    if isinstance(values[0], list):
        if len({len(value) for value in values}) != 1:
            raise RunError(f"lists of different lengths cannot be averaged: {values}")
        columns = [[float(item) for item in column] for column in zip(*values, strict=True)]
        means = " ".join(f"{statistics.fmean(column):{form}}" for column in columns)
        if len(values) == 1:
            return means
        return f"{means} (± ≤ {max(map(_deviation, columns)):{form}})"
    numbers = [float(value) for value in values]
    mean = f"{statistics.fmean(numbers):{form}}"
    if len(numbers) == 1:
        return mean
    spread = f"{mean} ± {_deviation(numbers):{form}}"
    return spread if short else f"{spread} ({min(numbers):{form}}–{max(numbers):{form}})"


def _deviation(numbers: Sequence[float]) -> float:
    """The sample standard deviation; NaN where a number is not finite."""
    finite = all(map(math.isfinite, numbers))
    return statistics.stdev(numbers) if finite else math.nan


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _data(group: Group) -> str:
    data = group.records[0]["dataset"]
    return f"{data['name']} ({data['source']})"


def _device(record: Mapping[str, Any]) -> str:
    environment = record["environment"]
    devices, cores = environment.get("devices"), environment.get("cores")
    counts = [f"{devices} device{'s' * (devices != 1)}"] if devices else []
    counts += [f"{cores} cores"] if cores else []
    return ", ".join([str(environment.get("device", "an unnamed device")), *counts])


def _commit(environment: Mapping[str, Any]) -> str:
    commit = str(environment.get("git commit") or "unknown")[:10]
    return commit + " (with changes)" * bool(environment.get("dirty"))


def _distinct(items: Any) -> list[str]:
    return list(dict.fromkeys(items))
