"""One LSTM layer on a GPU: every method's speed, XLA's options, and whether cuDNN is right.

    python experiments/gpu.py                    on a machine with an NVIDIA GPU, within 9 minutes
    python experiments/gpu.py --small            the same on small sizes anywhere, within a minute

Measured are the layers of ``lstmjax.gpu_tables.SHAPES`` by scan, by the derivative written by hand,
by cuDNN, and by PyTorch's nn.LSTM where PyTorch sees the GPU; in float32, in TensorFloat-32 and in
bfloat16; forward, and forward + backward (the gradients of mean(hs²) with respect to weights and
inputs). What comes first when time is short: cuDNN's errors, then scan, fused and cuDNN in every
shape, PyTorch, XLA's options, and scans written out in part. What does not fit is left out, and the
record says so.

XLA reads its options once, PyTorch brings a cuDNN of its own, and a cuDNN that fails can take a
process with it: these parts are processes of their own, this script with ``--part``.
"""

import dataclasses
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.errors import JaxRuntimeError
from jax.experimental import rnn

from lstmjax import cli, cudnn, interop, timings
from lstmjax.gpu_tables import ARRAYS, FULL, PASSES, PRECISIONS, SMALL, Plan, section
from lstmjax.lstm import LSTMParams, LSTMState, lstm
from lstmjax.records import Run, RunError, params_sha256, write_file
from lstmjax.recurrence import Bidirectional, bidirectional
from lstmjax.train import Clock

ROOT = Path(__file__).resolve().parents[1]
SEED = 0
# What jax_default_matmul_precision is in each.
PRODUCTS = {"float32": "highest", "tf32": "tensorfloat32", "bfloat16": None}

Key = tuple[str, str, str, str]  # shape, precision, method, pass


@dataclasses.dataclass(frozen=True)
class Config:
    small: bool = False
    """Small sizes: a look at what the script does, on any machine."""
    minutes: float = 8.0
    """For all of it; nothing is begun that is not likely to end in time."""
    part: Literal["all", "audit", "torch", "trials"] = "all"
    """One part, printed as a line of JSON: the processes that the whole run starts."""
    out: str | None = None
    """Folder for the run's files, new or empty; a fresh one under runs/ when not given."""


class Found:
    """What has been measured, and what has not and why, under the keys of ``gpu_tables``."""

    def __init__(self, minutes: float):
        self.metrics: dict[str, Any] = {}
        self.missing: dict[str, str] = {}
        self.left_out: list[str] = []
        self.end = time.perf_counter() + 60 * minutes
        self._longest: dict[str, float] = {}

    @property
    def left(self) -> float:
        """Seconds."""
        return self.end - time.perf_counter()

    def run(self, kind: str, name: str, part: Callable[[], None], keys: Iterable[str]) -> None:
        """Runs a part, unless the longest of its kind so far says that there is no time for it."""
        if self.left <= 1.1 * self._longest.get(kind, 0.0):
            self.left_out.append(name)
            self.missing |= dict.fromkeys(keys, "no time was left")
            return
        start = time.perf_counter()
        part()
        taken = time.perf_counter() - start
        self._longest[kind] = max(taken, self._longest.get(kind, 0.0))
        print(f"{name}: {taken:.0f} s; {max(self.left, 0) / 60:.1f} minutes left", flush=True)

    def take(self, prefix: str, times: Iterable[tuple[Key, Any]]) -> None:
        """Keeps times, and where there is text instead, why there are none."""
        for key, timing in times:
            name = "|".join((prefix, *key))
            if isinstance(timing, str):
                self.missing[name] = timing
            else:
                median, quartiles, _ = timing  # a Timing, or the list that JSON makes of it
                self.metrics[name] = [median, *quartiles]


# ---- layers -------------------------------------------------------------------------------------


def inputs(shape: tuple[int, int, int, int], precision: str) -> tuple[LSTMParams, jax.Array]:
    """Random weights and xs [T, B, D]."""
    batch, steps, size, hidden = shape
    rng, dtype = np.random.default_rng(SEED), "bfloat16" if precision == "bfloat16" else "float32"
    w_x, w_h = (rng.normal(size=(n, 4 * hidden)) / n**0.5 for n in (size, hidden))
    arrays = w_x, w_h, rng.normal(size=4 * hidden)
    params = LSTMParams(*(jnp.asarray(array, dtype) for array in arrays))
    return params, jnp.asarray(rng.normal(size=(steps, batch, size)), dtype)


def outputs(method: str, params: LSTMParams, xs: jax.Array) -> tuple[LSTMState, jax.Array]:
    """The layer by a method's name in the tables."""
    if method == "cudnn":
        zeros = jnp.zeros((xs.shape[1], params.w_h.shape[0]), jnp.float32)
        return cudnn.cudnn(params, LSTMState(zeros, zeros), xs)
    name, _, unroll = method.partition(" unroll=")
    return lstm(params, xs, method=name, unroll=int(unroll or 1))


def program(method: str, kind: str) -> Callable:
    """A function of (params, xs): the outputs, or the loss and its gradients."""
    if kind == "forward":
        return partial(outputs, method)

    def loss(params, xs):
        hs = outputs(method, params, xs)[1]
        return jnp.mean(jnp.square(hs.astype(jnp.float32)))

    return jax.value_and_grad(loss, (0, 1))


def prepared(key: Key, arguments: tuple) -> Callable[[], Any] | str:
    """A compiled program with its arguments, or why there is none."""
    _, precision, method, kind = key
    with jax.default_matmul_precision(PRODUCTS[precision]):
        if method == "cudnn" and (why := cudnn.available()) is not None:
            return why
        if method == "cudnn" and precision == "bfloat16":
            return "cuDNN is reached in float32"
        try:
            return partial(timings.compiled(program(method, kind), *arguments).run, *arguments)
        except JaxRuntimeError as failure:
            return str(failure).splitlines()[0]


def timed(plan: Plan, keys: Sequence[Key], clock: Clock) -> dict[Key, timings.Timing | str]:
    """Times of programs that are compiled side by side and then run in turns."""
    for precision in dict.fromkeys(key[1] for key in keys):
        with jax.default_matmul_precision(PRODUCTS[precision]):
            cudnn.available()  # compared here, once, and not in every thread
    given = {at: inputs(plan.shapes[at[0]], at[1]) for at in {key[:2] for key in keys}}
    with clock("compile"), ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        runs = pool.map(lambda key: prepared(key, given[key[:2]]), keys)
        found = dict(zip(keys, runs, strict=True))
    with clock("eval"):
        for key, run in found.items():
            try:
                jax.block_until_ready(run() if callable(run) else None)
            except JaxRuntimeError as failure:  # no room for it
                found[key] = str(failure).splitlines()[0]
        runs = {key: run for key, run in found.items() if callable(run)}
        return found | (timings.take_turns(runs, seconds=plan.seconds, rounds=3) if runs else {})


def methods_of(plan: Plan, shape: str, methods: Sequence[str]) -> list[Key]:
    return list(itertools.product((shape,), PRECISIONS, methods, PASSES))


# ---- cuDNN against float64 ----------------------------------------------------------------------


def audit(shape: Sequence[int], lengths: str, directions: int) -> dict[str, dict[str, float]]:
    """Errors of cuDNN as JAX calls it, by precision and by the names of ``ARRAYS``."""
    batch, steps, size, hidden = shape
    rng = np.random.default_rng(SEED)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    until = np.full(batch, steps, np.int32)
    if lengths == "ragged":
        until = rng.integers(1, steps, batch, np.int32, endpoint=True)
        until[:2] = steps, 1
    params, start, of_final = [], [], []
    for _ in range(directions):
        recurrent = draw(hidden, 4 * hidden) / np.float32(hidden**0.5)
        params.append(LSTMParams(draw(size, 4 * hidden), recurrent, draw(4 * hidden)))
        start.append(LSTMState(draw(batch, hidden), draw(batch, hidden)))
        of_final.append(LSTMState(draw(batch, hidden), draw(batch, hidden)))
    xs, of_hs = draw(steps, batch, size), draw(steps, batch, directions * hidden)
    arrays = (params, start, xs), of_final, of_hs

    def computed(layer, dtype):
        given = jax.tree.map(lambda a: jnp.asarray(a, dtype), arrays)
        return values_and_gradients(partial(layer, lengths=until), *given)

    with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
        want, found = computed(by_scan, jnp.float64), {}
    for precision in ("float32", "tf32"):
        with jax.default_matmul_precision(PRODUCTS[precision]):
            got = computed(by_cudnn, jnp.float32)
        worst = {name: np.max([*map(cudnn.error, got[name], want[name])]) for name in want}
        found[precision] = {name: float(value) for name, value in worst.items()}
    return found


def values_and_gradients(layer, arguments, of_final, of_hs) -> dict[str, list[np.ndarray]]:
    """The arrays of ``ARRAYS``, each as a list over directions, for Σ weights·outputs."""

    def loss(*arguments):
        final, hs = layer(*arguments)
        parts = jax.tree.map(lambda a, b: jnp.sum(a * b), (of_final, of_hs), (final, hs))
        return sum(jax.tree.leaves(parts)), (final, hs)

    (params, start, xs), (final, hs) = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*arguments)
    found = {"hs": [hs], "dxs": [xs]}
    found |= {n: [getattr(state, n) for state in final] for n in LSTMState._fields}
    found |= {f"d{n}0": [getattr(state, n) for state in start] for n in LSTMState._fields}
    found |= {f"d{n}": [getattr(p, n) for p in params] for n in ("w_x", "w_h", "b")}
    return {name: [np.asarray(a, np.float64) for a in found[name]] for name in ARRAYS}


def by_scan(params, start, xs, lengths):
    """([state of each direction], hs), by lstmjax."""
    how = {"lengths": lengths, "method": "scan"}
    if len(params) == 1:
        final, hs = lstm(params[0], xs, start[0], **how)
        return [final], hs
    final, hs = bidirectional(lstm, Bidirectional(*params), xs, Bidirectional(*start), **how)
    return list(final), hs


def by_cudnn(params, start, xs, lengths):
    """The same by jax.experimental.rnn, both directions in one call."""
    both, (size, _), hidden = len(params) == 2, params[0].w_x.shape, params[0].w_h.shape[0]
    flat = interop.dump_cudnn([Bidirectional(*params)] if both else params)
    h, c = (jnp.stack([getattr(state, name) for state in start]) for name in LSTMState._fields)
    layer = size, hidden, 1, 0.0, both
    y, h, c = rnn.lstm(jnp.swapaxes(xs, 0, 1), h, c, flat, jnp.asarray(lengths), *layer)
    return [LSTMState(*state) for state in zip(h, c, strict=True)], jnp.swapaxes(y, 0, 1)


def audit_part(plan: Plan) -> dict[str, Any]:
    """{"missing": reason}, or {"errors": {key: error}, "failures": {key: reason}}."""
    if (why := cudnn.absent()) is not None:
        return {"missing": why}
    errors, failures = {}, {}
    for case in itertools.product(plan.audited, ("full", "ragged"), (1, 2)):
        name = "|".join(("audit", ", ".join(map(str, case[0])), *map(str, case[1:])))
        try:
            for precision, named in audit(*case).items():
                errors |= {f"{name}|{precision}|{array}": e for array, e in named.items()}
        except JaxRuntimeError as failure:
            failures[name] = str(failure).splitlines()[0]
    return {"errors": errors, "failures": failures, "version": cudnn.version()}


# ---- parts that are processes of their own ------------------------------------------------------


def by_torch(plan: Plan, key: Key) -> Callable[[], None]:
    """PyTorch's layer on its default device, as ``program`` has ours; waits for the result."""
    import torch

    shape, precision, _, kind = key
    batch, steps, size, hidden = plan.shapes[shape]
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    layer = torch.nn.LSTM(size, hidden, dtype=dtype)
    layer.train(kind == "train")  # cuDNN's forward pass for training keeps more
    xs = torch.randn(steps, batch, size, dtype=dtype, requires_grad=True)

    def run():
        torch.backends.cudnn.allow_tf32 = precision == "tf32"
        with torch.set_grad_enabled(kind == "train"):
            hs = layer(xs)[0]
        if kind == "train":
            torch.autograd.grad(hs.float().square().mean(), [xs, *layer.parameters()])
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return run


def torch_part(plan: Plan) -> dict[str, Any]:
    """{"missing": reason} or {"version": …, "times": [[key, timing], …]}."""
    try:
        import torch
    except ImportError:
        return {"missing": "PyTorch is not installed"}
    if not torch.cuda.is_available():
        return {"missing": f"PyTorch {torch.__version__} sees no CUDA device"}
    torch.set_default_device("cuda")
    found = {}
    for shape in plan.shapes:
        runs = {key: by_torch(plan, key) for key in methods_of(plan, shape, ("torch",))}
        found |= timings.take_turns(runs, seconds=plan.seconds, rounds=3)
    version = f"{torch.__version__} with cuDNN {torch.backends.cudnn.version()}"
    return {"version": version, "times": list(found.items())}


def trials_part(plan: Plan) -> dict[str, Any]:
    return {"times": list(timed(plan, plan.trials, Clock()).items())}


PARTS = {"audit": audit_part, "torch": torch_part, "trials": trials_part}


def child(part: str, config: Config, left: float, flags: str = "") -> dict[str, Any]:
    """What a part printed that ran as a process of its own, or {"missing": why it did not}."""
    command = [sys.executable, str(Path(__file__).resolve()), "--part", part]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    environment["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
    how = {"env": environment, "capture_output": True, "text": True, "timeout": max(left, 0)}
    try:
        done = subprocess.run(command + ["--small"] * config.small, **how)
    except subprocess.TimeoutExpired:
        return {"missing": "it was stopped, for no time was left"}
    if done.returncode:
        last = [line for line in done.stderr.splitlines() if line.strip()][-1:]
        return {"missing": f"the process ended with {done.returncode}: {' '.join(last)[:200]}"}
    return json.loads(done.stdout.splitlines()[-1])


# ---- the run ------------------------------------------------------------------------------------


def measure(plan: Plan, config: Config, found: Found, clock: Clock) -> dict[str, str | None]:
    """Everything, the most important first; the versions of what was measured."""
    versions = dict.fromkeys(("cudnn", "torch"))

    def layers(shape, methods):
        keys = methods_of(plan, shape, methods)
        part = lambda: found.take("time", timed(plan, keys, clock).items())  # noqa: E731
        names = ["|".join(("time", *key)) for key in keys]
        found.run("layers", f"{shape} by {', '.join(methods)}", part, names)

    def process(part, name, keys, prefix="time", flags=""):
        def run():
            with clock("eval"):
                said = child(part, config, found.left, flags)
            found.metrics |= said.get("errors", {})
            found.missing |= said.get("failures", {})
            found.take(prefix, said.get("times", ()))
            if "missing" in said:
                found.missing |= dict.fromkeys(keys, said["missing"])
            if "version" in said:
                versions["torch" if part == "torch" else "cudnn"] = said["version"]

        found.run(part, name, run, keys)

    process("audit", "cuDNN against float64", ["audit"])
    for shape in plan.shapes:
        layers(shape, plan.methods)
    of_torch = itertools.chain(*(methods_of(plan, shape, ("torch",)) for shape in plan.shapes))
    process("torch", "PyTorch", ["|".join(("time", *key)) for key in of_torch])
    for name, flags in plan.flags.items():
        key = f"flags|{name}"
        process("trials", f"XLA_FLAGS {name}", [key], prefix=key, flags=flags)
    for shape in plan.shapes:
        layers(shape, plan.written_out)
    return versions


def run(config: Config) -> None:
    cli.check_positive(config, "minutes")
    # A part started beside this process needs memory too, which JAX would take whole.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    plan = SMALL if config.small else FULL
    if config.part != "all":
        print(json.dumps(PARTS[config.part](plan)))
        return
    found, clock = Found(config.minutes), Clock()
    device = jax.devices()[0]
    print(f"on {device.device_kind}; cuDNN: {cudnn.available() or cudnn.version()}", flush=True)
    with Run.create("gpu", config, out=config.out) as folder:
        folder.config |= {"sizes": plan.shapes, "flags": plan.flags}
        folder.config |= {"versions": measure(plan, config, found, clock)}
        folder.config |= {"missing": found.missing, "left_out": found.left_out}
        if not found.metrics:
            raise RunError(f"--minutes: nothing was measured in {config.minutes:g} minutes")
        given = {shape: inputs(sizes, "float32") for shape, sizes in plan.shapes.items()}
        record = folder.finish(
            dataset={
                "name": "random inputs", "source": "generated",
                "sha256": params_sha256({shape: xs for shape, (_, xs) in given.items()}),
            },
            metrics=found.metrics,
            seconds=clock.seconds,
            params_sha256=params_sha256({shape: params for shape, (params, _) in given.items()}),
            seed=SEED,
            devices=[device],
        )  # fmt: skip
        text = "\n".join(section(record)) + "\n"
        write_file(folder.path / "gpu.md", text.encode())
    print(f"{text}\nrecord in {folder.path}")


if __name__ == "__main__":
    cli.main(lambda: run(cli.parse(Config, description=__doc__)))
