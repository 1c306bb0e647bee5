"""The section of BENCHMARKS.md on GPUs, and what their times are measured against.

A record of ``experiments/gpu.py`` has these metrics (and, where a number is missing, a reason under
the same key in ``config.missing``):

    time|SHAPE|PRECISION|METHOD|PASS                seconds of a call: median and quartiles
    flags|TRIAL|SHAPE|PRECISION|METHOD|PASS         the same, in a process with other XLA_FLAGS
    audit|SIZE|LENGTHS|DIRECTIONS|PRECISION|ARRAY   error of cuDNN, max|got − want| / max|want|

Letters: T time, B batch, D input, H hidden.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

COMMAND = "python experiments/gpu.py"
# (B, T, D, H)
SHAPES = {
    "sin": (50, 20, 10, 10),
    "imdb": (128, 80, 100, 64),
    "mnist": (50, 28, 28, 100),
    "smnist": (100, 784, 1, 128),
    "big": (64, 128, 512, 512),
    "long": (64, 1024, 512, 512),
    "wide": (128, 1024, 1024, 1024),
}
IN_JAX = ("scan", "fused", "cudnn")
WRITTEN_OUT = ("scan unroll=2", "scan unroll=4", "scan unroll=8")
METHODS = (*IN_JAX, "torch", *WRITTEN_OUT)
PRECISIONS = {"float32": 4, "tf32": 4, "bfloat16": 2}  # bytes of a number
PASSES = {"forward": "forward", "train": "forward + backward"}
ARRAYS = ("hs", "h", "c", "dxs", "dh0", "dc0", "dw_x", "dw_h", "db")

# XLA's options that bear on loops; without them a loop's iterations are launched one by one.
_GRAPHS = "--xla_gpu_enable_command_buffer=+WHILE,+CONDITIONAL,+DYNAMIC_SLICE_FUSION"
FLAGS = {
    "none": "",
    "loops in graphs": _GRAPHS,
    "small loops in graphs": f"{_GRAPHS} --xla_gpu_graph_min_graph_size=1",
    "loops written out in graphs": f"{_GRAPHS} --xla_gpu_command_buffer_unroll_loops=true",
    "double buffering": "--xla_gpu_enable_while_loop_double_buffering=true",
    "no graphs": "--xla_gpu_enable_command_buffer=",
}


class Plan(NamedTuple):
    """What a run measures.

    Attributes:
      shapes: (B, T, D, H) by name.
      methods, written_out: those measured first, and those measured last.
      flags: XLA's options by name.
      trials: (shape, precision, method, pass) that are run under each of them.
      audited: (B, T, D, H) of cuDNN's comparisons with float64.
      seconds: of calls of each program.
    """

    shapes: Mapping[str, tuple[int, int, int, int]]
    methods: tuple[str, ...]
    written_out: tuple[str, ...]
    flags: Mapping[str, str]
    trials: tuple[tuple[str, str, str, str], ...]
    audited: tuple[tuple[int, int, int, int], ...]
    seconds: float


FULL = Plan(
    shapes=SHAPES,
    methods=IN_JAX,
    written_out=WRITTEN_OUT,
    flags=FLAGS,
    trials=tuple(product(("big", "smnist"), ("tf32",), ("scan", "fused"), PASSES)),
    audited=((8, 20, 12, 16), (32, 100, 100, 256)),
    seconds=0.3,
)
SMALL = Plan(
    shapes={"small": (3, 5, 4, 6)},
    methods=IN_JAX,
    written_out=WRITTEN_OUT[:1],
    flags={name: FLAGS[name] for name in ("none", "double buffering")},
    trials=(("small", "tf32", "fused", "forward"),),
    audited=((3, 5, 4, 6),),
    seconds=0.01,
)


class Chip(NamedTuple):
    """What a kind of GPU can do, at most.

    Attributes:
      operations: a second, by precision; products of dense matrices.
      clock: cycles a second.
      multiprocessors: how many take part in one layer, a power of 2.
      shared_memory: bytes for weights on one of them.
      special: exponentials and the like in a cycle, each.
      cache: bytes a second from the L2 cache to all of them.
      barrier: seconds for all of them to wait for one another.
      alone: seconds for one of them to get from a step to the next, waiting for nobody else.
    """

    operations: Mapping[str, float]
    clock: float
    multiprocessors: int
    shared_memory: int
    special: int
    cache: float
    barrier: float
    alone: float


# Peak rates from the vendor's data sheet (without sparsity). The clock, the cache's rate and the
# two latencies are no guarantees of anybody's: they are assumed, at values seen in practice.
_HOPPER_SXM = Chip(
    operations={"float32": 67e12, "tf32": 494e12, "bfloat16": 989e12},
    clock=1.75e9,
    multiprocessors=128,  # of 132
    shared_memory=227 * 1024,
    special=16,
    cache=5.5e12,
    barrier=1.0e-6,
    alone=0.3e-6,
)
# By the name that JAX has for them. Of others no percentages are given.
CHIPS = {"NVIDIA H200": _HOPPER_SXM, "NVIDIA H100 80GB HBM3": _HOPPER_SXM}


def operations(shape: Sequence[int], kind: str) -> float:
    """Floating point operations of a layer's matrix products.

    Forward these are x W_x and h W_h, 8·B·T·(D·H + H²); with the backward pass three times as many,
    for each product has two derivatives, the one with respect to x among them.
    """
    batch, steps, inputs, hidden = shape
    return (8 if kind == "forward" else 24) * batch * steps * (inputs * hidden + hidden**2)


def roofline(chip: Chip, shape: Sequence[int], precision: str, kind: str) -> float:
    """Seconds that the products alone would take at the chip's peak rate."""
    return operations(shape, kind) / chip.operations[precision]


def limit(chip: Chip, shape: Sequence[int], precision: str, kind: str) -> float | None:
    """Seconds that one kernel for the whole layer would need at least: a limit with latencies.

        step    = max(product, exchange) + pointwise + sync
        forward = T·step + 8·B·T·D·H / peak
        train   = 2·T·step + (24·B·T·D·H + 8·B·T·H²) / peak

    It assumes the best known plan, W_h on the chip and everything that does not wait for h_{t-1}
    outside the loop (Diamos et al., 2016; Appleyard, Kočiský & Blunsom, 2016). The fewest
    multiprocessors (a power of 2) that hold W_h between them share its columns; as many such
    groups as there is room for share the rows of the batch. Of a step,

        product   = 8·B·H² / peak
        exchange  = every multiprocessor reading h of its group's rows from the L2 cache
        pointwise = 5·B·H exponentials and the like, four gates and tanh(c)
        sync      = a barrier where several multiprocessors share W_h, or one's own latency

    The backward loop is taken to be as quick as the forward one. A kernel with a cheaper barrier
    (within a cluster of multiprocessors) can get below this limit.

    Args:
      chip: of ``CHIPS``.
      shape: (B, T, D, H).
      precision: of ``PRECISIONS``.
      kind: of ``PASSES``.

    Returns:
      Seconds, or None where W_h does not fit on the chip.
    """
    batch, steps, inputs, hidden = shape
    size, peak = PRECISIONS[precision], chip.operations[precision]
    columns = 1
    while 4 * hidden**2 * size / columns > chip.shared_memory:
        columns *= 2
    if columns > chip.multiprocessors:
        return None
    rows = math.ceil(batch / (chip.multiprocessors // columns))
    exchange = chip.multiprocessors * rows * hidden * size / chip.cache if columns > 1 else 0.0
    pointwise = 5 * batch * hidden / (chip.multiprocessors * chip.special * chip.clock)
    sync = chip.barrier if columns > 1 else chip.alone
    step = max(8 * batch * hidden**2 / peak, exchange) + pointwise + sync
    of_inputs, of_hidden = batch * steps * inputs * hidden, batch * steps * hidden**2
    if kind == "forward":
        return steps * step + 8 * of_inputs / peak
    return 2 * steps * step + (24 * of_inputs + 8 * of_hidden) / peak


# ---- the section --------------------------------------------------------------------------------


def section(record: Mapping[str, Any] | None) -> list[str]:
    """The lines of the section, without those on where the record comes from.

    Args:
      record: of ``experiments/gpu.py``, or None where there is none yet.

    Returns:
      Lines of Markdown.
    """
    title = ["## gpu: one LSTM layer on a GPU", ""]
    if record is None:
        lines = [f"`{COMMAND}` measures this on a machine with an NVIDIA GPU.", ""]
        lines += _head(["layer", "batch, steps, inputs, units", *PASSES.values()])
        for shape, sizes in SHAPES.items():
            lines.append(_line([shape, ", ".join(map(str, sizes)), *["not measured"] * 2]))
        return title + lines
    lines = [*title, *_introduction(record)]
    for shape, sizes in record["config"]["sizes"].items():
        lines += ["", *_shape(record, shape, sizes)]
    lines += ["", *_flags(record), "", *_audit(record)]
    if left_out := record["config"]["left_out"]:
        minutes = record["config"]["minutes"]
        lines += ["", f"Left out, for there were {minutes:g} minutes: {'; '.join(left_out)}."]
    return lines


def _introduction(record: Mapping[str, Any]) -> list[str]:
    device = record["environment"]["device"]
    text = (
        "Microseconds per time step, medians of calls that take turns; forward gives all outputs, "
        "forward + backward the gradients of the mean of their squares with respect to weights and "
        "inputs. float32: products of float32; tf32: of float32 rounded to TensorFloat-32; "
        "bfloat16: inputs and weights. torch is PyTorch's `nn.LSTM`, which is cuDNN's. "
    )
    versions = ", ".join(f"{name} {v}" for name, v in record["config"]["versions"].items() if v)
    text += f"Measured with {versions}. " if versions else ""
    if device in CHIPS:
        text += (
            "In parentheses: percent of the arithmetic roofline (the products at the chip's peak), "
            "and percent of a limit with latencies, which one kernel for the whole layer would "
            "need at least (`lstmjax.gpu_tables.limit` says what it assumes)."
        )
    else:
        text += f"Of {device} no peak rates are known here, so there are no percentages."
    return [text]


def _shape(record: Mapping[str, Any], shape: str, sizes: Sequence[int]) -> list[str]:
    """The table of one layer, and why something is missing from it."""
    batch, steps, inputs, hidden = sizes
    columns = [(precision, kind) for precision in PRECISIONS for kind in PASSES]
    lines = [
        f"**{shape}**: batch {batch}, {steps} steps, {inputs} inputs, {hidden} units.", "",
        *_head(["method", *(f"{precision} {PASSES[kind]}" for precision, kind in columns)]),
    ]  # fmt: skip
    reasons: dict[str, list[str]] = {}
    for method in METHODS:
        keys = [f"time|{shape}|{precision}|{method}|{kind}" for precision, kind in columns]
        cells = [_time(record, sizes, key) for key in keys]
        why = dict.fromkeys(_why(record, k) for k, c in zip(keys, cells, strict=True) if c == "–")
        if set(cells) == {"–"}:
            cells[0] = f"not measured: {'; '.join(why)}"
        else:
            for reason in why:
                reasons.setdefault(reason, []).append(method)
        lines.append(_line([method, *cells]))
    if reasons:
        parts = [f"{', '.join(methods)} ({reason})" for reason, methods in reasons.items()]
        lines += ["", f"Not all was measured of {'; '.join(parts)}."]
    return lines


def _why(record: Mapping[str, Any], key: str) -> str:
    return record["config"]["missing"].get(key, "not part of this run").replace("|", "/")


def _time(record: Mapping[str, Any], sizes: Sequence[int], key: str) -> str:
    """Microseconds per step, and the two percentages where the chip is known."""
    if key not in record["metrics"]:
        return "–"
    *_, precision, _, kind = key.split("|")
    seconds, chip = float(record["metrics"][key][0]), CHIPS.get(record["environment"]["device"])
    text = _digits(1e6 * seconds / sizes[1])
    if chip is None:
        return text
    bounds = (bound(chip, sizes, precision, kind) for bound in (roofline, limit))
    percent = [f"{_digits(100 * b / seconds)} %" if b is not None else "–" for b in bounds]
    return f"{text} ({', '.join(percent)})"


def _flags(record: Mapping[str, Any]) -> list[str]:
    """XLA's options, each in a process of its own."""
    metrics, missing = record["metrics"], record["config"]["missing"]
    found = [k for k in metrics if k.startswith("flags|")]
    columns = list(dict.fromkeys(key.split("|", 2)[2] for key in found))
    names = [column.split("|") for column in columns]
    heads = [f"{shape} {method} {PASSES[kind]}" for shape, _, method, kind in names]
    precision = f" ({names[0][1]})" if names else ""
    lines = [f"Options of XLA, each in a process of its own, µs per step{precision}:", ""]
    lines += _head(["XLA_FLAGS", *(heads or ["µs per step"])])
    for trial, flags in record["config"]["flags"].items():
        cells = []
        for column, (shape, *_) in zip(columns, names, strict=True):
            times = metrics.get(f"flags|{trial}|{column}")
            steps = record["config"]["sizes"][shape][1]
            cells.append("–" if times is None else _digits(1e6 * float(times[0]) / steps))
        if set(cells) <= {"–"}:
            key = f"flags|{trial}"
            reasons = [why for n, why in missing.items() if n == key or n.startswith(f"{key}|")]
            reason = "; ".join(dict.fromkeys(reasons)) or "not part of this run"
            reason = reason.replace("|", "/")
            cells[:1] = [f"not measured: {reason}"]
        lines.append(_line([f"`{flags}`" if flags else "none", *cells]))
    return lines


def _audit(record: Mapping[str, Any]) -> list[str]:
    """How far cuDNN is from a scan in float64."""
    versions = record["config"]["versions"]
    lines = [
        f"cuDNN {versions.get('cudnn') or ''}".rstrip() + ", as `jax.experimental.rnn` calls it, "
        "against the scan in float64 on the CPU: the largest error of an array (outputs, final "
        "states, and gradients, marked by d) relative to its largest entry.", "",
    ]  # fmt: skip
    metrics, missing = record["metrics"], record["config"]["missing"]
    found = [key.rpartition("|")[0] for key in metrics if key.startswith("audit|")]
    failed = [key for key in missing if key.startswith("audit|")]
    if not found + failed:
        return [*lines, f"Not measured: {_why(record, 'audit')}."]
    lines += _head(["batch, steps, inputs, units", "lengths", "directions", "products", *ARRAYS])
    for case in dict.fromkeys(found):
        errors = [f"{float(metrics[f'{case}|{name}']):.0e}" for name in ARRAYS]
        lines.append(_line([*case.split("|")[1:], *errors]))
    for case in failed:
        cells = [*case.split("|")[1:], "–", f"it fails: {_why(record, case)}"]
        lines.append(_line([*cells, *["–"] * (len(ARRAYS) - 1)]))
    return lines


def _digits(value: float) -> str:
    """Three digits, and never an exponent of ten."""
    return f"{value:.0f}" if value >= 99.5 else f"{value:#.3g}".rstrip(".")


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _head(names: Sequence[str]) -> list[str]:
    return [_line(names), _line(["---"] * len(names))]
