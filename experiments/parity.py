"""Parity: what lstmjax computes, against what nine other frameworks computed.

    python experiments/parity.py                     every case of tests/golden, about a minute

Each case is a file of numbers that TensorFlow 1, Keras, PyTorch, Flax, Haiku, Equinox or cuDNN's
reference gave in float64 (tests/golden/golden.py tells what is in it). Here the weights are read by
lstmjax.interop and run by lstmjax, as a scan, fused and, up to 28 steps, unrolled. Compared are
outputs and final states, the gradients with respect to the inputs, the initial states and the
framework's own weights, and 20 steps of its optimiser. The error of an array is

    max|got − want| / max|want|        (|got| itself where all that is wanted is 0)

and at most 1e-10 in float64 and 1e-5 in float32, or the run fails. In float32 inputs and weights
are the golden ones rounded. Outputs are compared at valid steps, where frameworks agree; at
invalid ones lstmjax's own must be 0 exactly.
"""

import dataclasses
import hashlib
import re
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import unflatten_dict

from lstmjax import cli, interop, optim, parallel, train, variants
from lstmjax.data import files
from lstmjax.data.dataset import one_line
from lstmjax.lstm import LSTMParams, LSTMState, lstm
from lstmjax.records import Run, RunError, params_sha256, to_json, write_file
from lstmjax.recurrence import Bidirectional, bidirectional, stack

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "golden"
BARS = {"float64": 1e-10, "float32": 1e-5}
UNROLLED_UP_TO = 28  # steps; compiling them takes longer than they tell

# All that a manifest may say of a case: an entry that is not understood is not passed over.
_CUDNN, _ADAM = ("input_size", "hidden_size", "num_layers", "bidirectional"), ("b1", "b2", "eps")
_ENTRY = {"sha256", "load", "stack", "options", "train", "note", *_CUDNN}
_OPTIONS = {"forget_bias", "cell_clip", "proj_clip", "reverse", "gate"}
_TRAIN = {"optimizer", "learning_rate", "clip_norm", "clip_eps", "clip_norm_each", *_ADAM}
_GIVEN = re.compile(r"x$|mask$|lengths$|train\|target$|(weights|state|loss)\|")


@dataclasses.dataclass(frozen=True)
class Config:
    golden: Path = GOLDEN
    """Folder of the golden files and their manifests."""
    out: str | None = None
    """Folder for the run's files, new or empty; a fresh one under runs/ when not given."""


class Case(NamedTuple):
    """A golden file: what it is called ("torch lengths"), its manifest's entry, its arrays."""

    name: str
    entry: Mapping[str, Any]
    arrays: Mapping[str, np.ndarray]

    @property
    def given(self) -> dict[str, np.ndarray]:
        """What was put in, as opposed to what the framework computed."""
        return {name: array for name, array in self.arrays.items() if _GIVEN.match(name)}


# ---- golden files -------------------------------------------------------------------------------


def manifests(folder: str | Path) -> dict[str, dict[str, Any]]:
    """framework → manifest of a folder.

    Raises:
      RunError: no manifests, a damaged one, or a file of numbers that no manifest names.
    """
    try:
        found = {path.stem: files.read_json(path) for path in sorted(Path(folder).glob("*.json"))}
        named = {f"{framework}-{case}" for framework, m in found.items() for case in {**m["cases"]}}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise RunError(f"{folder}: a damaged manifest ({one_line(error)})") from error
    if not found:
        raise RunError(f"{folder}: got no manifests (*.json), expected one for each framework")
    for path in sorted(Path(folder).glob("*.npz")):
        if path.stem not in named:
            raise RunError(f"{path}: no manifest names it")
    return found


def read(folder: str | Path, framework: str, case: str, entry: Mapping[str, Any]) -> Case:
    """Reads one case, and checks that it is the file and the kind of entry it should be.

    Raises:
      RunError: a file that is missing, damaged or has another SHA-256, an entry that says something
        unknown.
    """
    path, name = Path(folder) / f"{framework}-{case}.npz", f"{framework} {case}"
    try:
        parts = (entry, _ENTRY), (entry["options"], _OPTIONS), (entry.get("train", {}), _TRAIN)
        if unknown := [key for said, known in parts for key in {**said} if key not in known]:
            raise RunError(f"{name}: got {', '.join(unknown)}, expected only what is known")
        found = hashlib.sha256(files.read_bytes(path, 2**33)).hexdigest()
        if found != entry["sha256"]:
            raise RunError(f"{name}: got sha256 {found[:12]}, expected {entry['sha256']:.12}")
        return Case(name, entry, files.read_arrays(path))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        what = files.reason(error) if isinstance(error, OSError) else one_line(error)
        raise RunError(f"cannot read {path}: {what}") from error


def below(arrays: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The arrays whose names begin with a prefix, under the rest of their names."""
    return {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}


# ---- ours ---------------------------------------------------------------------------------------


def loader(entry: Mapping[str, Any]) -> tuple:
    """What reading the weights takes, hashable: (framework, "layer" or "stack", options)."""
    said = [*entry.items(), *entry["options"].items()]
    options = tuple(pair for pair in said if pair[0] in (*_CUDNN, "forget_bias"))
    return entry["load"], entry["stack"], options


def outputs(params, x, states, over_time, *, gate=None, reverse=False, method="scan"):
    """Runs a layer, a bidirectional one or a stack of either; {"hs", "final|0|h", …}."""
    layer = lstm if gate is None else variants.activations(gate=gate)
    options = {"method": method, **over_time, **({"reverse": True} if reverse else {})}
    params = [params] if isinstance(params, LSTMParams) else params
    if isinstance(params[0], Bidirectional):
        layer = partial(bidirectional, layer)
        states = [*map(Bidirectional, states[::2], states[1::2])]
    finals, hs = stack(layer, params, x, states, **options)
    finals = jax.tree.leaves(finals, is_leaf=lambda node: isinstance(node, LSTMState))
    named = {f"final|{n}|{f}": getattr(s, f) for n, s in enumerate(finals) for f in s._fields}
    return {"hs": hs, **named}


# Nearly all the time goes into compiling, so nothing is optimised, and cases of one shape share a
# program, whatever their framework: the program differentiates with respect to our parameters, and
# ``pulled`` takes the gradient on to the framework's own weights by the chain rule.
_HOW = ("gate", "reverse", "method")


def _jit(*static: str) -> Callable:
    fast = {"xla_backend_optimization_level": 0}
    return partial(jax.jit, static_argnames=static, compiler_options=fast)


def _load(weights, *, load):
    """Our parameters from a framework's weights, {"a|b": array}; ``load`` from ``loader``."""
    framework, stack, options = load
    if framework == "cudnn":
        return interop.load_cudnn(weights["weights"], **dict(options))
    read = {"layer": interop.load, "stack": interop.load_stack}[stack]
    return read(framework, unflatten_dict(weights, sep="|"), **dict(options))


def _pull(weights, gradient, *, load):
    """The gradient with respect to the framework's weights, of that with respect to ours."""
    return jax.vjp(partial(_load, load=load), weights)[1](gradient)[0]


loaded, pulled = _jit("load")(_load), _jit("load")(_pull)


@_jit(*_HOW)
def gradients(params, x, states, loss, over_time, **how):
    """Outputs, and the gradients of Σ loss·outputs with respect to params, x and states."""

    def total(params, x, states):
        found = outputs(params, x, states, over_time, **how)
        return sum(jnp.sum(loss[name] * found[name]) for name in loss), found

    return jax.grad(total, (0, 1, 2), has_aux=True)(params, x, states)[::-1]


@_jit(*_HOW)
def squared_error(params, x, states, target, over_time, **how):
    """mean((hs − target)²) and its gradient with respect to params."""

    def loss(params):
        return jnp.mean((outputs(params, x, states, over_time, **how)["hs"] - target) ** 2)

    return jax.value_and_grad(loss)(params)


@_jit("load", "settings")
def updated(weights, opt_state, gradient, *, load, settings):
    """One step of the optimiser on the framework's weights: (weights, opt_state)."""
    gradient, tx = _pull(weights, gradient, load=load), optimiser(load[0], settings)
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam asks for it
        updates, opt_state = tx.update(gradient, opt_state, weights)
    return optax.apply_updates(weights, updates), opt_state


def optimiser(framework: str, settings: tuple) -> optax.GradientTransformation:
    """The optimiser that a manifest's (name, value) pairs say, in the framework's own form."""
    settings, parts = dict(settings), []
    rate, clip_norm = settings["learning_rate"], settings.get("clip_norm")
    if "clip_norm_each" in settings:
        parts.append(optim.clip_by_norm(settings["clip_norm_each"]))
    if "clip_eps" in settings:
        parts.append(torch_clip(clip_norm, settings["clip_eps"]))
    elif clip_norm is not None:
        parts.append(optax.clip_by_global_norm(clip_norm))
    if settings["optimizer"] == "adam":
        adam = optim.tf_adam if framework in ("tf1", "keras") else optax.adam
        parts.append(adam(rate, **{n: v for n, v in settings.items() if n in _ADAM}))
    else:
        parts.append({"sgd": optax.sgd}[settings["optimizer"]](rate))
    return optax.chain(*parts)


def torch_clip(max_norm: float, eps: float) -> optax.GradientTransformation:
    """PyTorch's clip_grad_norm_: g ← g · min(1, max_norm / (‖g‖ + eps))."""

    def clip(updates, params):
        factor = jnp.minimum(1.0, max_norm / (optax.tree.norm(updates) + eps))
        return jax.tree.map(lambda g: g * factor, updates)

    return optax.stateless(clip)


def computed(case: Case, dtype: str = "float64", method: str = "scan") -> dict[str, np.ndarray]:
    """What lstmjax computes of what was given, under the names of the file's arrays.

    Args:
      case: a golden file.
      dtype: "float64" or "float32", in which everything is done.
      method: how the recurrence runs.

    Returns:
      "hs", "final|…", "grad|…" and, where the case trains and the method is "scan", "train|…".
    """
    # An accelerator's float32 products would be of fewer bits by default.
    with jax.enable_x64(dtype == "float64"), jax.default_matmul_precision("highest"):
        kinds = {np.dtype(float): dtype}  # of integers and masks JAX keeps its own
        given = {n: jnp.asarray(a, kinds.get(a.dtype)) for n, a in case.given.items()}
        weights, load, options = below(given, "weights|"), loader(case.entry), case.entry["options"]
        parts = unflatten_dict(below(given, "state|"), sep="|")
        states = [LSTMState(**parts[str(n)]) for n in range(len(parts))]
        over_time = {name: given[name] for name in ("mask", "lengths") if name in given}
        over_time |= {n: options[n] for n in ("cell_clip", "proj_clip") if n in options}
        how = {n: options[n] for n in ("gate", "reverse") if n in options} | {"method": method}

        loss = {n if n == "hs" else f"final|{n}": a for n, a in below(given, "loss|").items()}
        params = loaded(weights, load=load)
        got, of = gradients(params, given["x"], states, loss, over_time, **how)
        of_weights = pulled(weights, of[0], load=load)
        got |= {"grad|x": of[1]} | {f"grad|weights|{n}": a for n, a in of_weights.items()}
        for n, state in enumerate(of[2]):
            got |= {f"grad|state|{n}|{field}": getattr(state, field) for field in state._fields}
        if trains(case, method):
            fixed = given["x"], states, given["train|target"], over_time
            got |= trained(weights, load, case, lambda params: squared_error(params, *fixed, **how))
        return {name: np.asarray(array, np.float64) for name, array in got.items()}


def trained(weights, load: tuple, case: Case, loss_fn: Callable) -> dict[str, jax.Array]:
    """As many optimiser steps as the case has; "train|…"."""
    settings, losses = tuple(case.entry["train"].items()), []
    opt_state = optimiser(load[0], settings).init(weights)
    for _ in case.arrays["train|loss"]:
        value, gradient = loss_fn(loaded(weights, load=load))
        weights, opt_state = updated(weights, opt_state, gradient, load=load, settings=settings)
        losses.append(value)
    last = {f"train|weights|{n}": a for n, a in weights.items()}
    return {"train|loss": jnp.stack(losses), **last}


def trains(case: Case, method: str) -> bool:
    """Whether the 20 steps are taken: one method is enough, for all give the same gradients."""
    return "train" in case.entry and method == "scan"


# ---- comparing ----------------------------------------------------------------------------------


def kind(name: str) -> str:
    """What the array of this name is: "value", "gradient" or "train"."""
    return {"grad": "gradient", "train": "train"}.get(name.split("|")[0], "value")


def compare(case: Case, dtype: str = "float64", method: str = "scan") -> dict[str, float]:
    """Error of every array that the framework computed, by its name in the file.

    Raises:
      ValueError: an array of the file that lstmjax does not compute, or the reverse.
    """
    got, given = computed(case, dtype, method), case.given
    want = {name: array for name, array in case.arrays.items() if name not in given}
    if not trains(case, method):
        want = {n: a for n, a in want.items() if kind(n) != "train"}
    if got.keys() != want.keys():
        odd = ", ".join(sorted(got.keys() ^ want.keys()))
        raise ValueError(f"{case.name}: got arrays without a counterpart, expected none: {odd}")
    steps, batch = want["hs"].shape[:2]
    until = case.arrays.get("lengths", np.full(batch, steps))
    valid = case.arrays.get("mask", True) & (np.arange(steps)[:, None] < until)
    at = {"hs": valid[:, :, None]}
    return {name: error(got[name], want[name], at.get(name, True)) for name in want}


def error(got: np.ndarray, want: np.ndarray, valid: np.ndarray | bool = True) -> float:
    """max|got − want| / max|want| where valid; infinite for NaN, and if not 0 elsewhere."""
    if got.shape != want.shape:
        raise ValueError(f"got: got shape {got.shape}, expected {want.shape}")
    if not np.isfinite(got).all() or np.where(valid, 0.0, got).any():
        return np.inf
    largest = np.where(valid, abs(want), 0.0).max()
    return float(np.where(valid, abs(got - want), 0.0).max() / (largest or 1.0))


def errors(case: Case, dtype: str = "float64", method: str = "scan") -> dict[str, float]:
    """The largest error among outputs ("value"), gradients ("gradient") and training ("train")."""
    largest = {}
    for name, value in compare(case, dtype, method).items():
        largest[kind(name)] = max(value, largest.get(kind(name), 0.0))
    return largest


def methods(case: Case) -> tuple[str, ...]:
    """The methods a case is run by."""
    unrolled = ("unrolled",) * (len(case.arrays["x"]) <= UNROLLED_UP_TO)
    return ("scan", "fused", *unrolled)


# ---- the run ------------------------------------------------------------------------------------


def measured(case: Case, pool: Executor) -> dict[str, float]:
    """The largest errors over the methods: "float64_value", … "float32_train"."""
    jobs = [(dtype, method) for dtype in BARS for method in methods(case)]
    largest = {}
    # Side by side: no two of these share a program that is still to be compiled.
    for (dtype, _), found in zip(jobs, pool.map(lambda job: errors(case, *job), jobs), strict=True):
        for name, value in found.items():
            largest[f"{dtype}_{name}"] = max(value, largest.get(f"{dtype}_{name}", 0.0))
    return largest


def summary(found: Mapping[str, Mapping[str, float]], framework: str) -> dict[str, float]:
    """A framework's metrics: how many cases it has, and the largest errors among them."""
    own = [errors for name, errors in found.items() if name.split()[0] == framework]
    largest = {
        f"{framework}_{key}": max(errors[key] for errors in own if key in errors)
        for key in dict.fromkeys(key for errors in own for key in errors)
    }
    return {f"{framework}_cases": len(own), **largest}


def broken(found: Mapping[str, Mapping[str, float]]) -> list[str]:
    """A sentence for every error that is above its bar."""
    return [
        f"{name}: got {key.replace('_', ' ')} error {value:.1e}, expected at most {bar:.0e}"
        for name, errors in found.items()
        for key, value in errors.items()
        if not value <= (bar := BARS[key.split("_")[0]])
    ]


def run(config: Config) -> None:
    golden = manifests(config.golden)
    cases = [
        read(config.golden, framework, name, entry)
        for framework, manifest in golden.items()
        for name, entry in manifest["cases"].items()
    ]
    lines = "\n".join(f"{case.name} {case.entry['sha256']}" for case in cases)
    sha256 = hashlib.sha256(lines.encode()).hexdigest()
    devices, clock = parallel.use_devices(1), train.Clock()
    vectors = {f: {key: m[key] for key in ("seed", "versions")} for f, m in golden.items()}
    settings = {**dataclasses.asdict(config), "vectors": vectors}
    print(f"{len(cases)} cases; errors of values, gradients and 20 optimiser steps")
    with Run.create("parity", settings, out=config.out) as folder:
        found = {}
        with clock("eval"), ThreadPoolExecutor(2) as pool:  # compiling is part of it
            for case in cases:
                found[case.name] = measured(case, pool)
                texts = [f"{key} {value:.0e}" for key, value in found[case.name].items()]
                print(f"{case.name}:", ", ".join(texts).replace("_", " "), flush=True)
        write_file(folder.path / "errors.json", to_json(found))
        if faults := broken(found):
            raise RunError(faults[0] + f" (and {len(faults) - 1} more)" * (len(faults) > 1))
        metrics = {k: v for name in golden for k, v in summary(found, name).items()}
        folder.finish(
            dataset={"name": "golden vectors", "source": "generated", "sha256": sha256},
            metrics=metrics,
            seconds=clock.seconds,
            params_sha256=params_sha256({c.name: below(c.arrays, "weights|") for c in cases}),
            seed=min(manifest["seed"] for manifest in golden.values()),
            devices=devices,
        )
    print(f"all within {BARS['float64']:.0e} and {BARS['float32']:.0e}; record in {folder.path}")


if __name__ == "__main__":
    cli.main(lambda: run(cli.parse(Config, description=__doc__)))
