"""What ``--diagnose`` adds to a run: how gradients flow through its model, before and after.

The experiments make a ``Diagnosis`` of their model and a few of their examples. It looks at the
model at initialisation and at the end with the instruments of ``diagnostics``, and hears of every
logged step how large the gradient was and whether it was clipped; at the end it leaves figures and
numbers. What is dropped in training is not dropped here.

Letters: T time, B batch, D input, H hidden, O outputs, K lags.
"""

from collections import namedtuple
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lstmjax import checks, diagnostic_plots, diagnostics
from lstmjax.models import CELLS, Recurrent, SequenceModel
from lstmjax.precision import bfloat16_dot
from lstmjax.records import Run
from lstmjax.scores import means

ROWS = 64  # examples that are looked at, at most
_STEPS = 25  # steps at which Jacobians are taken, at most
_WIDTH = 512  # rows of a Jacobian times examples at which it is taken, about
_ORDER = "hcrifzo"  # of a state's fields and of gates: dicts come sorted out of a compiled program
_NORMS = ("gradient_norm", "clipped_norm", "clipped")
_DROPPED = (
    "dropout", "recurrent_dropout", "weight_drop", "locked_dropout", "embedding_dropout",
    "word_dropout",
)  # fmt: skip


# ---- one look -----------------------------------------------------------------------------------


class Flow(NamedTuple):
    """What is seen of one layer.

    Attributes:
      gradients: [K] by field of the state, as of ``diagnostics.gradient_norms``; of the whole
        model: the gradient goes through the layers above, too.
      steps: [S] the steps at which the radius was taken.
      radius: [S, R] of the Jacobian of the layer's state, for R rows, its inputs held.
      gates: [T, B, H] by name; none of a cell without gates.
    """

    gradients: dict[str, jax.Array]
    steps: np.ndarray
    radius: jax.Array
    gates: dict[str, jax.Array]


def flow(
    model: SequenceModel,
    params: Any,
    inputs: jax.Array,
    loss: Callable,
    *,
    mask: jax.Array | None = None,
) -> list[Flow]:
    """Looks at a model that reads a batch.

    Args:
      model: without zoneout.
      params: its parameters.
      inputs: [B, T] ids or [B, T, D] numbers, T >= 1.
      loss: the error of the last step, ``loss(outputs [B, O]) -> [B]``.
      mask: [B, T], non-zero at valid steps, or None.

    Returns:
      A ``Flow`` for each layer, from the lowest on. Gates at invalid steps are those of a step that
      was not taken.

    Raises:
      ValueError: a model with zoneout, whose steps are not those of its cell; what the model
        raises.
    """
    if model.zoneout:
        raise ValueError(f"zoneout: got {model.zoneout}, expected 0 to be diagnosed")
    model = model.clone(method="scan", unroll=1, **dict.fromkeys(_DROPPED, 0.0))
    xs = _read(model, params, inputs)
    if mask is not None:  # travels with the inputs, as a last column
        xs = jnp.concatenate([xs, mask.astype(bool).T[:, :, None].astype(xs.dtype)], axis=-1)
    states = _first_states(model, params, inputs)
    weights = [params[f"layer_{number}"] for number in range(model.num_layers)]
    masked = mask is not None
    step = _step(model, masked)

    def of_output(h):
        return loss(_head(model, params["head"], h))

    norms = _gradient_norms(step, weights, states, xs, of_output, masked)
    seen = []
    for layer, state, of_layer in zip(weights, states, norms, strict=True):
        run = diagnostics.states_of(step, layer, state, xs)
        radius = _radius(step, layer, run, xs)
        seen.append(Flow(of_layer, *radius, _gates(model, layer, run, xs, masked)))
        xs = _above(run.h[1:], xs, masked)
    return seen


def _read(model: SequenceModel, params: Any, inputs: jax.Array) -> jax.Array:
    """[T, B, D]: what the lowest layer reads."""
    name = "input" if model.vocabulary_size is None else "embed"
    if name == "input" and model.input_size is None:
        return jnp.swapaxes(inputs, 0, 1)
    found = {"capture_intermediates": lambda module, _: module.name == name}
    _, seen = model.apply({"params": params}, inputs, mutable=["intermediates"], **found)
    return seen["intermediates"][name]["__call__"][0]


def _first_states(model: SequenceModel, params: Any, inputs: jax.Array) -> tuple:
    """Each layer's state before the first step: what is left of it by a step that is not valid."""
    none = jnp.zeros((len(inputs), 1), bool)
    return model.apply({"params": params}, inputs[:, :1], mask=none)[0]


def _step(model: SequenceModel, masked: bool) -> Callable:
    """``step(params, state, x_t) -> state`` of the model's layers; masked: x_t [B, D+1]."""
    options = {"learned_state": model.learned_state, "precision": model.precision}
    layer = Recurrent(model.cell, model.hidden_size, model.cell_init, "unrolled", **options)

    def step(params, state, x_t):
        xs, mask = (x_t[None, :, :-1], x_t[None, :, -1]) if masked else (x_t[None], None)
        return layer.apply({"params": params}, xs, state, mask=mask)[0]

    return step


def _above(hs: jax.Array, xs: jax.Array, masked: bool) -> jax.Array:
    """What a layer hands to the one above it, with the mask that came with its inputs."""
    return jnp.concatenate([hs, xs[..., -1:].astype(hs.dtype)], axis=-1) if masked else hs


@cache
def _joint(fields: tuple[tuple[str, ...], ...]) -> type:
    """All layers' states side by side: ``h``, ``c`` of the top layer, ``h_0``, ``c_0`` below."""
    top = len(fields) - 1
    return namedtuple("Joint", [n if k == top else f"{n}_{k}" for k, f in enumerate(fields)
                                for n in f])  # fmt: skip


def _gradient_norms(step, weights, states, xs, loss, masked) -> list[dict[str, jax.Array]]:
    """Each layer's [K] by field: the norms of the whole model, all layers being one cell."""
    kinds = [type(state) for state in states]
    joint = _joint(tuple(kind._fields for kind in kinds))

    def step_of_all(weights, state, x_t):
        rest, new = list(state), []
        for kind, layer in zip(kinds, weights, strict=True):
            own, rest = kind(*rest[: len(kind._fields)]), rest[len(kind._fields) :]
            new.append(step(layer, own, x_t))
            x_t = _above(new[-1].h, x_t, masked)
        return joint(*(part for of_layer in new for part in of_layer))

    start = joint(*(part for state in states for part in state))
    norms = diagnostics.gradient_norms(step_of_all, weights, start, xs, loss)
    found = iter(norms.values())
    return [{name: next(found) for name in kind._fields} for kind in kinds]


def _head(model: SequenceModel, head: Any, h: jax.Array) -> jax.Array:
    """[B, H] to [B, O], as the model's last layer does."""
    dot = bfloat16_dot if model.precision == "bfloat16" else jax.lax.dot_general
    outputs = dot(h, head["kernel"], (((1,), (0,)), ((), ())), None)
    return outputs + jnp.broadcast_to(head["bias"], outputs.shape)


def _radius(step: Callable, layer: Any, states: Any, xs: jax.Array) -> tuple[np.ndarray, jax.Array]:
    """The spectral radius at a few steps and rows: it costs far more than the rest."""
    width, count = sum(part.shape[-1] for part in states), len(xs)
    steps = np.unique(np.linspace(0, count - 1, min(count, _STEPS)).round().astype(int))
    rows = max(1, min(xs.shape[1], 8, _WIDTH // width))
    before = jax.tree.map(lambda part: part[np.append(steps, count), :rows], states)
    return steps, diagnostics.jacobian_radius(step, layer, before, xs[steps, :rows])


def _gates(model: SequenceModel, layer: Any, states: Any, xs: jax.Array, masked: bool) -> dict:
    if model.cell not in diagnostics.GATED:
        return {}
    weights, xs = layer["weights"], xs[..., :-1] if masked else xs
    if model.precision == "bfloat16":
        weights, xs = jax.tree.map(lambda a: a.astype(jnp.bfloat16), (weights, xs))
    kind = CELLS[model.cell].params
    return diagnostics.gates(model.cell, kind(**dict.fromkeys(kind._fields) | weights), states, xs)


# ---- gradients of updates -----------------------------------------------------------------------


def gradient_metrics(max_norm: float | None) -> Callable:
    """``of_gradient`` of ``train.make_train_step``: a gradient's global norm, and its clipping.

    Args:
      max_norm: as of ``optim.clipped``; None for no clipping.

    Returns:
      ``metrics(grads)``: (sum, count) of "gradient_norm", of "clipped_norm", the norm that is left
      after clipping, and of "clipped", 1 where the gradient is changed.

    Raises:
      ValueError: ``max_norm`` is not above 0.
    """
    checks.positive("max_norm", max_norm)

    def metrics(grads):
        report = diagnostics.clip_report(grads, max_norm)
        values = (value.astype(report.before.dtype) for value in report)
        return {n: (v, jnp.ones_like(v)) for n, v in zip(_NORMS, values, strict=True)}

    return metrics


# ---- a run --------------------------------------------------------------------------------------


class Diagnosis:
    """Looks at a model before and after its training; does nothing where it is off.

    Attributes:
      of_gradient: for ``train.make_train_step``; None where it is off.
      norms: {step: {"gradient_norm", "clipped_norm", "clipped"}}, means of what was logged.
    """

    def __init__(
        self,
        on: bool,
        model: SequenceModel,
        loss: Callable,
        inputs: Any,
        targets: Any,
        *,
        mask: Any = None,
        clip_norm: float | None = None,
    ):
        """Makes ready; compiles nothing yet.

        Args:
          on: whether to look at all.
          model: as of ``flow``.
          loss: the error of the last step, ``loss(outputs [B, O], targets [B, ...]) -> [B]``.
          inputs, mask: as of ``flow``; of more than 64 rows the first 64.
          targets: [B, ...].
          clip_norm: the bound on the gradient's global norm, or None.
        """
        self.of_gradient = gradient_metrics(clip_norm) if on else None
        self.norms: dict[int, dict[str, float]] = {}
        self._clip_norm = clip_norm
        self._looks: dict[str, list[Flow]] = {}
        self._counts: dict[str, list[float]] = {name: [0.0, 0.0] for name in _NORMS}
        if not on:
            return
        batch = [None if a is None else jnp.asarray(a[:ROWS]) for a in (inputs, targets, mask)]
        self._valid = None if mask is None else np.asarray(batch[2]).T != 0

        @jax.jit
        def look(params, inputs, targets, mask):
            return flow(model, params, inputs, lambda y: loss(y, targets), mask=mask)

        self._look = lambda params: look(params, *batch)

    def look(self, when: str, params: Any) -> None:
        """Looks at the model as it is with these parameters; ``when`` is what figures call it."""
        if self.of_gradient is not None:
            params = jax.tree.map(np.asarray, params)
            self._looks[when] = jax.tree.map(np.asarray, self._look(params))

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Keeps what a step's metrics, or those of several steps, say of the gradient."""
        if self.of_gradient is None:
            return
        mine = {name: metrics[name] for name in _NORMS}
        self.norms[step] = means(mine)
        for name, (added, count) in mine.items():
            self._counts[name][0] += float(np.sum(added))
            self._counts[name][1] += float(np.sum(count))

    def progress(self) -> dict[str, Any]:
        """What has been logged, in JSON's types, for ``restore``."""
        return {"norms": list(self.norms.items()), "counts": self._counts}

    def restore(self, progress: Mapping[str, Any]) -> None:
        """Goes on from a ``progress``."""
        self.norms = {step: dict(norms) for step, norms in progress["norms"]}
        self._counts = {name: list(pair) for name, pair in progress["counts"].items()}

    def finish(self, folder: Run, title: str) -> dict[str, Any]:
        """Leaves the figures, and returns ``{"diagnostics": numbers}`` for the record's metrics.

        Args:
          folder: the run.
          title: which model, on which data.

        Returns:
          The numbers, in groups; nothing where it is off.
        """
        if self.of_gradient is None:
            return {}
        looks = {when: self._numbers(seen) for when, seen in self._looks.items()}
        self._figures(folder, title, looks)
        before, after, clipped = ([float(m[n]) for m in self.norms.values()] for n in _NORMS)
        added, count = self._counts["clipped"]
        steps = list(self.norms)
        figure = diagnostic_plots.clipping(title, steps, before, after, clipped, self._clip_norm)
        folder.figure("gradient_norm", figure)
        gradients = {"step": steps, "gradient_norm": before, "clipped_norm": after}
        return {"diagnostics": {**looks, **gradients, "clip_rate": added / max(count, 1.0)}}

    def _numbers(self, seen: list[Flow]) -> dict[str, dict[str, Any]]:
        """One look as numbers, layer by layer."""
        return {f"layer_{number}": self._of_layer(layer) for number, layer in enumerate(seen)}

    def _of_layer(self, layer: Flow) -> dict[str, Any]:
        fields = sorted(layer.gradients, key=_ORDER.index)
        numbers = {f"gradient_{name}": _short(layer.gradients[name]) for name in fields}
        radius = np.asarray(layer.radius, np.float64)
        if self._valid is not None:  # at the others the state is held
            valid = self._valid[layer.steps][:, : radius.shape[1]]
            radius = np.where(valid, radius, np.nan)
        counted = np.maximum(np.sum(~np.isnan(radius), axis=1), 1)
        some = np.any(~np.isnan(radius), axis=1)
        mean = np.where(some, np.nansum(radius, axis=1) / counted, np.nan)
        numbers |= {"radius_step": layer.steps.tolist(), "radius": _short(mean)}
        if not layer.gates:
            return numbers
        names = sorted(layer.gates, key=_ORDER.index)
        gates = {name: layer.gates[name] for name in names}
        if self._valid is not None:
            gates = {name: a[self._valid] for name, a in gates.items()}
        found = diagnostics.gate_saturation(gates)
        numbers["gates_left"] = {name: _short(of_gate.left) for name, of_gate in found.items()}
        numbers["gates_right"] = {name: _short(of_gate.right) for name, of_gate in found.items()}
        memory = gates.get("f", gates.get("z"))  # z of a GRU weighs the old state
        if memory is not None:
            numbers["half_life"] = _short(diagnostics.memory_half_life(memory))
        return numbers

    def _figures(self, folder: Run, title: str, looks: dict[str, Any]) -> None:
        figures = {
            "gradient_flow": diagnostic_plots.gradient_flow(title, looks),
            "jacobian_radius": diagnostic_plots.jacobian_radius(title, looks),
        }
        if any("gates_left" in layer for look in looks.values() for layer in look.values()):
            figures["gates"] = diagnostic_plots.gates(title, looks)
        for name, figure in figures.items():
            folder.figure(name, figure)


# For the second model of a script that looks at one.
OFF = Diagnosis(False, None, None, None, None)


def spread_out(size: int) -> np.ndarray:
    """Places of at most ``ROWS`` examples, evenly spread over ``size``: for data in an order."""
    return np.linspace(0, size - 1, min(size, ROWS)).round().astype(int)


def _short(values: Any) -> list[float]:
    """Numbers as a record keeps them: with the digits that float32 has."""
    return [float(f"{value:.7g}") for value in np.asarray(values, np.float64)]
