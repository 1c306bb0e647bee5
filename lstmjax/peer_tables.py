"""The section of BENCHMARKS.md on single layers, from a record of experiments/peers.py layers.

What such a record holds, by keys that end in the name of a layer ("torch", "lstmjax fused x2"):

    metrics["kept|imdb|float32|torch|forward"]      [median, first quartile, third, calls]; seconds
    metrics["kept|imdb|float32|torch|value_error"]  and "gradient_error", relative to float64
    config["failed"]["kept|imdb|float32|torch"]     why there are no such numbers
    config["sizes"]["imdb"]                         [B, T, D, H]
    config["layers"]["torch"]                       {"versions", "how", "bfloat16"}
    config["load"]                                  of the machine, when the run began

A name that begins with lstmjax is ours, and one that ends in xN is spread over N devices.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

KINDS = {"forward": "forward", "train": "forward + backward"}
ERRORS = ("value_error", "gradient_error")
ON_JAX = ("linen", "nnx", "haiku", "equinox", "keras-jax")
MEMORY = {
    "as-installed": (
        "Memory as installed",
        "The C library treats freed memory as it does by itself: large pieces may go back to the "
        "system at once, and come anew, page by page, with the next call.",
    ),
    "kept": (
        "Memory kept",
        "In every process alike the C library keeps what is freed and asks for huge pages: what "
        "each layer costs without the page faults.",
    ),
}

# What each layer took: its median, and the first and the third quartile.
Times = Mapping[str, Sequence[float]]


def is_ours(name: str) -> bool:
    """Whether the layer of this name is one of lstmjax."""
    return name.split()[0] == "lstmjax"


def fastest(times: Times, names: Iterable[str]) -> str | None:
    """The name among ``names`` with the smallest median; None where none was timed."""
    timed = [name for name in names if name in times]
    return min(timed, key=lambda name: times[name][0], default=None)


def ratio(times: Times, name: str, other: str | None) -> float | None:
    """How many times as long ``name`` takes as ``other``; None where one was not timed."""
    if name not in times or other not in times:
        return None
    return times[name][0] / times[other][0]


def ahead(times: Times, name: str, other: str) -> bool:
    """Whether ``name`` is clearly faster: its third quartile lies below the other's first."""
    return times[name][2] < times[other][1]


def _best_two(times: Times) -> tuple[str | None, str | None]:
    """The fastest layer of lstmjax and the fastest of all others."""
    others = [name for name in times if not is_ours(name)]
    return fastest(times, filter(is_ours, times)), fastest(times, others)


def verdict(times: Times) -> str:
    """Who is fastest, in words: the best of lstmjax against the best of all others.

    Args:
      times: of one kind, by the layers' names.

    Returns:
      A sentence; "" where one side has no times.
    """
    ours, other = _best_two(times)
    if ours is None or other is None:
        return ""
    if ahead(times, ours, other):
        text = f"{ours} is the fastest; {other} takes {_factor(times, other, ours)} as long"
    elif ahead(times, other, ours):
        text = f"**{other}** is the fastest; {ours} takes {_factor(times, ours, other)} as long"
    else:
        text = f"{ours} and {other} are equally fast within their quartiles"
    single = fastest(times, [name for name in times if is_ours(name) and " x" not in name])
    if single not in (None, ours) and ahead(times, other, single):
        text += (
            f" (on one device {single} takes {_factor(times, single, other)} as long as {other})"
        )
    return text + "."


def _has_less(times: Times) -> bool:
    """Whether the fastest of the others has a smaller median than every layer of lstmjax."""
    ours, other = _best_two(times)
    return None not in (ours, other) and times[other][0] < times[ours][0]


def beaten_by(times: Times) -> str | None:
    """The fastest of the others, where it is ahead of every layer of lstmjax."""
    ours, other = _best_two(times)
    if ours is None or other is None or not ahead(times, other, ours):
        return None
    return other


def section(record: Mapping[str, Any]) -> list[str]:
    """The lines of the section, without those on where the record comes from.

    Args:
      record: of ``python experiments/peers.py layers``.

    Returns:
      Lines of Markdown.
    """
    layers = record["config"]["layers"]
    lines = [
        f"## layers: one LSTM layer in every framework, {record['config']['dtypes']}", "",
        "The same weights and inputs in one run, each framework in a process of its own, taking "
        "turns; medians over all turns with the quartiles in parentheses. Forward gives all "
        "outputs; forward + backward gives the gradients of the mean of their squares with "
        "respect to weights and inputs. × PyTorch and × JAX: the time divided by PyTorch's, and "
        "by that of the fastest layer of another library that runs on JAX (above 1 is slower). "
        "An x and a number after our name: so many devices with the batch split between them; "
        "every other layer has all cores for its own threads. Differences are from lstmjax's "
        "scan in float64, the largest of an array relative to its largest entry: of the outputs, "
        "and the worst of the gradients. The machine's load was "
        f"{record['config']['load']} when the run began.", "",
    ]  # fmt: skip
    for name, about in layers.items():
        versions = ", ".join(" ".join(pair) for pair in about["versions"].items())
        lines.append(f"- {name} ({versions}): {about['how']}; with bfloat16, {about['bfloat16']}")
    keys = [*record["metrics"], *record["config"]["failed"]]
    for memory in _distinct(key.split("|")[0] for key in keys):
        cells = _distinct("|".join(key.split("|")[:3]) for key in keys)
        cells = [cell for cell in cells if cell.startswith(f"{memory}|")]
        title, text = MEMORY[memory]
        lines += ["", f"### {title}", "", f"{text} {_losses(record, cells)}"]
        for cell in cells:
            lines += ["", *_cell(record, cell)]
    return lines


def _losses(record: Mapping[str, Any], cells: Sequence[str]) -> str:
    """In how many comparisons another layer is ahead of all of ours, and which."""
    compared, less, lost = 0, 0, {}
    for cell in cells:
        for kind, label in KINDS.items():
            times = _times(record, cell, kind)
            compared += bool(verdict(times))
            less += _has_less(times)
            if other := beaten_by(times):
                _, shape, dtype = cell.split("|")
                lost.setdefault(other, []).append(f"{shape} {dtype} {label}")
    said = (
        f"In {less or 'none'} of {compared} comparisons another layer has a smaller median than "
        "the best of ours, of all methods and numbers of devices"
    )
    if not lost:
        return f"{said}; in none are the quartiles apart."
    texts = [f"{other} ({', '.join(where)})" for other, where in lost.items()]
    return f"{said}; in {sum(map(len, lost.values()))} the quartiles are apart: {'; '.join(texts)}."


def _cell(record: Mapping[str, Any], cell: str) -> list[str]:
    """The table of one shape and dtype, and who is fastest."""
    _, shape, dtype = cell.split("|")
    batch, steps, inputs, hidden = record["config"]["sizes"][shape]
    heads = [f"{label} ms | × PyTorch | × JAX" for label in KINDS.values()]
    lines = [
        f"**{shape}, {dtype}**: batch {batch}, {steps} steps, {inputs} inputs, {hidden} units.", "",
        f"| layer | {' | '.join(heads)} | values | gradients |", "|---" * 9 + "|",
    ]  # fmt: skip
    by_kind = {kind: _times(record, cell, kind) for kind in KINDS}
    for name in _distinct([*by_kind["forward"], *_failures(record, cell)]):
        if name in by_kind["forward"]:
            cells = [text for times in by_kind.values() for text in _timed(times, name)]
            metrics = record["metrics"]
            cells += [f"{float(metrics[f'{cell}|{name}|{error}']):.0e}" for error in ERRORS]
        else:
            reason = _failures(record, cell)[name].replace("|", "/")
            cells = [f"not timed: {reason}", *["–"] * 7]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    found = [(label, verdict(by_kind[kind])) for kind, label in KINDS.items()]
    lines += ["", *(f"- {label[0].upper()}{label[1:]}: {text}" for label, text in found if text)]
    return lines


def _timed(times: Times, name: str) -> list[str]:
    """Time, ratio to PyTorch, ratio to the fastest other layer on JAX."""
    median, low, high = (_milliseconds(seconds) for seconds in times[name][:3])
    rivals = [other for other in ON_JAX if other != name]
    ratios = [ratio(times, name, other) for other in ("torch", fastest(times, rivals))]
    texts = ["–" if value is None else f"{value:.2f}" for value in ratios]
    return [f"{median} ({low}–{high})", *texts]


def _times(record: Mapping[str, Any], cell: str, kind: str) -> dict[str, Sequence[float]]:
    """The times of one kind, by the layers' names."""
    keys = [key for key in record["metrics"] if key.startswith(f"{cell}|")]
    return {key.split("|")[3]: record["metrics"][key] for key in keys if key.split("|")[4] == kind}


def _failures(record: Mapping[str, Any], cell: str) -> dict[str, str]:
    """Why a layer was not timed, by its name."""
    failed = record["config"]["failed"].items()
    return {key.split("|")[3]: why for key, why in failed if key.startswith(f"{cell}|")}


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.0f}" if seconds >= 0.0995 else f"{1e3 * seconds:.3g}"


def _factor(times: Times, name: str, other: str) -> str:
    return f"{ratio(times, name, other):.2f} times"


def _distinct(items: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(items))
