"""Timings of an LSTM layer as numbers and as text: what was measured, and what follows from it.

A record keeps lists of numbers, so many measurements are kept as columns of equal length, one entry
for each method at each size (``columns``, read again by ``cells_of``). BENCHMARKS.md, the screen
and the figures are all drawn from ``Cell``s.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import geometric_mean
from typing import Any, NamedTuple

AXES = ("steps", "batch_size", "hidden_size", "devices")
LETTERS = dict(zip(AXES, ("T", "B", "H", "devices"), strict=True))
PASSES = {"forward": "forward", "backward": "forward + backward"}
_WRITTEN_OUT = ("unrolled", "scan unroll=")
_WORTH_IT = 1.05  # times as fast; less than that is no reason to prefer a method


class Pass(NamedTuple):
    """One compiled program and its calls.

    Attributes:
      compile_seconds: tracing and compiling.
      median, low, high: seconds of a call: the median, the first and the third quartile.
      temporary_bytes: memory of intermediate results, over all devices; NaN where not known.
    """

    compile_seconds: float
    median: float
    low: float
    high: float
    temporary_bytes: float


class Cell(NamedTuple):
    """One method at one size.

    Attributes:
      steps, batch_size, hidden_size, devices: the size.
      method: its name.
      forward: the outputs; None where it was not run.
      backward: a loss and all its gradients, forward pass included; None where it was not run.
      value_error, gradient_error: the largest difference from scan, max|got − want| / max|want|
        of an array; NaN where it was not run.
    """

    steps: int
    batch_size: int
    hidden_size: int
    devices: int
    method: str
    forward: Pass | None
    backward: Pass | None
    value_error: float
    gradient_error: float

    @property
    def size(self) -> tuple[int, int, int, int]:
        """(T, B, H, devices)."""
        return self[:4]


# ---- in a record --------------------------------------------------------------------------------


def columns(cells: Sequence[Cell], methods: Sequence[str]) -> dict[str, list[float]]:
    """Cells as the metrics of a record; a method is its place in ``methods``, NaN is "not run"."""
    found = {axis: [getattr(cell, axis) for cell in cells] for axis in AXES}
    found["method"] = [list(methods).index(cell.method) for cell in cells]
    for kind in PASSES:
        passes = [getattr(cell, kind) or Pass(*[math.nan] * 5) for cell in cells]
        for field in Pass._fields:
            found[f"{kind}_{field}"] = [getattr(one, field) for one in passes]
    for name in ("value_error", "gradient_error"):
        found[name] = [getattr(cell, name) for cell in cells]
    return found


def cells_of(record: Mapping[str, Any]) -> list[Cell]:
    """The cells of a record, whose ``config.methods`` names the methods."""
    metrics, methods = record["metrics"], record["config"]["methods"]

    def one_pass(kind, row):
        numbers = Pass(*(float(metrics[f"{kind}_{field}"][row]) for field in Pass._fields))
        return None if math.isnan(numbers.median) else numbers

    return [
        Cell(
            *(metrics[axis][row] for axis in AXES),
            methods[metrics["method"][row]],
            *(one_pass(kind, row) for kind in PASSES),
            float(metrics["value_error"][row]),
            float(metrics["gradient_error"][row]),
        )
        for row in range(len(metrics["method"]))
    ]


# ---- what follows -------------------------------------------------------------------------------


def at(cells: Sequence[Cell], size: tuple, method: str) -> Cell | None:
    """The cell of a method at a size."""
    return next((c for c in cells if c.size == size and c.method == method), None)


def relative(cells: Sequence[Cell], cell: Cell, kind: str) -> float:
    """The time of a cell as a multiple of scan's at the same size; NaN where one did not run."""
    scan = at(cells, cell.size, "scan")
    ours, theirs = getattr(cell, kind), scan and getattr(scan, kind)
    return ours.median / theirs.median if ours and theirs else math.nan


def pays_after(method: Pass | None, base: Pass | None) -> float:
    """Calls until a method has won back the seconds that it compiles longer than another.

        ⌈(compile_method − compile_base) / (time_base − time_method)⌉,   at least 0

    A difference counts where the median of each lies outside the quartiles of the other.

    Returns:
      A whole number; infinity where it never does; NaN where one of them did not run.
    """
    if method is None or base is None:
        return math.nan
    if not (method.high < base.median and method.median < base.low):
        return math.inf
    extra = method.compile_seconds - base.compile_seconds
    return max(0, math.ceil(extra / (base.median - method.median)))


def speedups(cells: Sequence[Cell]) -> dict[str, list[float]]:
    """How many times as fast as scan each method is, forward and backward, at every size it ran."""
    found = {}
    for cell in cells:
        times = relative(cells, cell, "backward")
        if cell.method != "scan" and not math.isnan(times):
            found.setdefault(cell.method, []).append(1 / times)
    return found


def recommendation(cells: Sequence[Cell]) -> str:
    """What to use on this machine, in a few sentences: the fastest method, and whether to unroll.

    A method is recommended where it ran at every size and is, in the geometric mean over them, the
    fastest and at least 1.05 times as fast as scan, forward and backward. Unrolling is held against
    scan and against the recommended method: whether at any size the time it takes to compile is
    won back.
    """
    sizes = len({cell.size for cell in cells})
    means = {m: geometric_mean(s) for m, s in speedups(cells).items() if len(s) == sizes}
    best = max(means, key=means.get, default="scan")
    if means.get(best, 0) < _WORTH_IT:
        best, first = "scan", "scan: nothing else was 1.05 times as fast here over all sizes."
    else:
        each = speedups(cells)[best]
        error = max(c.gradient_error for c in cells if c.method == best)
        first = (
            f"{best}: {means[best]:.3g} times as fast as scan here, forward and backward "
            f"({min(each):.3g} to {max(each):.3g} over {sizes} sizes; gradients within "
            f"{error:.0e} of scan's)."
        )
    return f"{first} {_on_unrolling(cells, best)}"


def _on_unrolling(cells: Sequence[Cell], best: str) -> str:
    """Whether writing steps out wins back its compile time: against scan, and against ``best``."""
    itself = best.startswith(_WRITTEN_OUT)
    tried = [cell for cell in cells if cell.method.startswith((best,) if itself else _WRITTEN_OUT)]
    if not tried:
        return "Unrolling was not tried."
    sizes = {cell.size for cell in tried}
    skipped = {cell.size for cell in tried if cell.backward is None}
    but = f" (unrolled not run at {len(skipped)} of {len(sizes)} sizes: too long to compile)"
    bases = ["scan"] if itself or best == "scan" else ["scan", best]
    text = "; ".join(f"against {base} {_paid(cells, tried, base)}" for base in bases)
    return f"Unrolling{but * bool(skipped)}: {text}."


def _paid(cells: Sequence[Cell], tried: Sequence[Cell], base: str) -> str:
    """At how many sizes one of the cells ``tried`` is won back against ``base``, where first."""
    paid = {c: pays_after(c.backward, at(cells, c.size, base).backward) for c in tried}
    paid = {cell: wait for cell, wait in paid.items() if math.isfinite(wait)}
    if not paid:
        return "it never paid"
    sizes = {cell.size for cell in tried}
    soonest = min(paid, key=paid.get)
    wait = paid[soonest]
    return (
        f"it paid at {len({cell.size for cell in paid})} of {len(sizes)} sizes, soonest "
        f"{soonest.method} at T = {soonest.steps}, H = {soonest.hidden_size}, after "
        f"{_count(wait)} training step{'s' * (wait != 1)}"
    )


def along(cells: Sequence[Cell], axis: str, base: Mapping[str, int]) -> list[Cell]:
    """The cells that differ from a size in nothing but one axis, in its order.

    Args:
      cells: of any sizes.
      axis: one of ``AXES``.
      base: a size, {"steps": T, "batch_size": B, "hidden_size": H, "devices": N}.
    """
    rest = [name for name in AXES if name != axis]
    found = [c for c in cells if all(getattr(c, name) == base[name] for name in rest)]
    return sorted(found, key=lambda cell: getattr(cell, axis))


def growth(cells: Sequence[Cell], method: str, kind: str) -> float:
    """Time per step at the most steps over that at a tenth of them or fewer; NaN without both."""
    times = {c.steps: getattr(c, kind).median / c.steps for c in cells if c.method == method}
    longest = max(times)
    fewer = [steps for steps in times if steps * 10 <= longest]
    return times[longest] / times[max(fewer)] if fewer else math.nan


# ---- text ---------------------------------------------------------------------------------------

HEAD = (
    "T", "H", "method",
    "compile s", "forward ms", "× scan",
    "compile s", "forward + backward ms", "× scan",
    "MB", "value", "gradient", "pays after",
)  # fmt: skip
LEGEND = (
    "Times are medians with quartiles in parentheses; × scan: the time as a multiple of scan's; "
    "MB: memory of intermediate results, forward and backward; value, gradient: the largest "
    "difference from scan, max|got − want| / max|want| of any array; pays after: training steps "
    "until the longer compiling is won back against scan, ∞ where it never is. How long an "
    "unrolled program would compile is predicted from fewer steps before it is left out."
)


def comparison_rows(cells: Sequence[Cell], limit: float) -> list[list[str]]:
    """A line of text, as in ``HEAD``, for each cell.

    Args:
      cells: of every method, and of scan at each size.
      limit: the seconds of compiling above which a program was not run.
    """
    rows = []
    for cell in cells:
        row = [str(cell.steps), str(cell.hidden_size), cell.method]
        for kind in PASSES:
            one = getattr(cell, kind)
            if one is None:
                row += ["–", f"not run: more than {limit:g} s to compile", "–"]
            else:
                times = _digits(relative(cells, cell, kind))
                row += [_digits(one.compile_seconds), _span(one), times]
        memory = cell.backward.temporary_bytes / 1e6 if cell.backward else math.nan
        row.append(_digits(memory))
        if cell.method == "scan":
            rows.append([*row, "–", "–", "–"])
            continue
        wait = pays_after(cell.backward, at(cells, cell.size, "scan").backward)
        rows.append([*row, _error(cell.value_error), _error(cell.gradient_error), _count(wait)])
    return rows


def aligned(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for the screen: columns of equal width, two spaces between them."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [[t.ljust(w) for t, w in zip(row, widths, strict=True)] for row in (head, *rows)]
    return "\n".join("  ".join(line).rstrip() for line in lines)


def comparison_section(groups: Sequence[Any], provenance: Callable) -> list[str]:
    """The section of BENCHMARKS.md on experiments/scan_vs_unrolled.py, a table for each record.

    Args:
      groups: each with one record in ``records``.
      provenance: ``provenance(group) -> lines``: command, versions, device and file.

    Returns:
      Lines.
    """
    lines = [
        "## scan against unrolled", "",
        "One LSTM layer; backward: the gradients of the mean of its squared outputs with respect "
        f"to weights and inputs. {LEGEND}",
    ]  # fmt: skip
    for group in groups:
        (record,) = group.records
        config, cells = record["config"], cells_of(record)
        rows = comparison_rows(cells, config["compile_limit"])
        absent = [f"{name} ({why})" for name, why in config.get("unavailable", {}).items()]
        sizes = (
            f"B = {config['batch_size']}, D = {config['input_size']}, {config['devices']} device"
        )
        sizes += "s" * (config["devices"] != 1)
        lines += ["", f"{sizes}." + f" Not on this machine: {', '.join(absent)}." * bool(absent)]
        lines += ["", f"**{recommendation(cells)}**", "", *_markdown(HEAD, rows), ""]
        lines += provenance(group)
    return lines


def scaling_section(groups: Sequence[Any], provenance: Callable) -> list[str]:
    """The section of BENCHMARKS.md on experiments/scaling.py; arguments as above."""
    lines = [
        "## scaling", "",
        "The time of one LSTM layer against the number of steps T, the batch size B, the hidden "
        "size H and the devices that the batch is split over. Milliseconds are medians with "
        "quartiles in parentheses; backward: the gradients of the mean of the squared outputs with "
        "respect to weights and inputs; difference: the largest between the methods, "
        "max|got − want| / max|want| of any array of outputs or gradients.",
    ]  # fmt: skip
    for group in groups:
        (record,) = group.records
        config, cells = record["config"], cells_of(record)
        for axis, base in config["bases"].items():
            chosen = along(cells, axis, base)
            head, rows = scaling_rows(chosen, axis, config["methods"])
            lines += ["", f"{fixed(axis, base)}, D = {config['input_size']}:", ""]
            lines += _markdown(head, rows)
            if axis == "steps" and (text := growth_text(chosen, config["methods"])):
                lines += ["", text]
        lines += ["", *provenance(group)]
    return lines


def scaling_rows(
    cells: Sequence[Cell], axis: str, methods: Sequence[str]
) -> tuple[list[str], list[list[str]]]:
    """(head, rows): a line for each value of the axis, columns for each method and pass."""
    head = [LETTERS[axis], *(f"{m}, {label} ms" for m in methods for label in PASSES.values())]
    rows = []
    for size in dict.fromkeys(cell.size for cell in cells):
        here = {cell.method: cell for cell in cells if cell.size == size}
        row = [str(size[AXES.index(axis)])]
        row += [_span(getattr(here[m], kind)) for m in methods for kind in PASSES]
        error = max(max(cell.value_error, cell.gradient_error) for cell in here.values())
        rows.append([*row, _error(error)])
    return [*head, "difference"], rows


def growth_text(cells: Sequence[Cell], methods: Sequence[str]) -> str:
    """How the time per step grows with their number, in a sentence; empty where it is not known."""
    steps = max(cell.steps for cell in cells)
    texts = [
        f"{growth(cells, method, kind):.2f} ({method}, {label})"
        for method in methods
        for kind, label in PASSES.items()
        if not math.isnan(growth(cells, method, kind))
    ]
    fewer = max((cell.steps for cell in cells if cell.steps * 10 <= steps), default=0)
    ratio = f"Time per step at T = {steps:,}, as a multiple of that at T = {fewer:,}: "
    return ratio + ", ".join(texts) + "." if texts else ""


def fixed(axis: str, base: Mapping[str, int]) -> str:
    """The sizes that stay as they are along an axis: "B = 4, H = 16, devices = 1"."""
    return ", ".join(f"{LETTERS[name]} = {base[name]}" for name in AXES if name != axis)


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def _digits(number: float) -> str:
    """Three significant digits, and all digits before the point."""
    if math.isnan(number):
        return "–"
    return f"{number:,.0f}" if number >= 99.5 else f"{number:.3g}"


def _span(one: Pass) -> str:
    """Milliseconds of a call: the median, and the quartiles in parentheses."""
    return f"{_digits(one.median * 1e3)} ({_digits(one.low * 1e3)}–{_digits(one.high * 1e3)})"


def _error(error: float) -> str:
    return "–" if math.isnan(error) else f"{error:.0e}" if error else "0"


def _count(steps: float) -> str:
    if math.isnan(steps):
        return "–"
    return f"{steps:,.0f}" if math.isfinite(steps) else "∞"
