"""The gates of every cell by name: their activations, saturation, and the memory they make.

``lstm.py``, ``variants.py`` and ``gru.py`` have the equations; a step keeps its gates to itself, so
they are computed here once more, from the states between which it stepped.
Letters: T time, B batch, D input, H hidden.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lstmjax import checks, variants
from lstmjax.cells import hard_sigmoid_keras1
from lstmjax.gated import peep, preactivations
from lstmjax.gru import GRUParams, GRUState
from lstmjax.lstm import LSTMState
from lstmjax.recurrence import product

# Blocks of the kernels; all but the candidate g are gates, and have peepholes in this order.
_BLOCKS = dict.fromkeys(
    ("lstm", "peephole", "niaf", "noaf", "layer_norm", "hard_sigmoid", "keras1"), "ifgo"
)
_BLOCKS |= {"cifg": "igo", "nig": "fgo", "nfg": "igo", "nog": "ifg", "refine": "rfgo"}
_SQUASH = {"hard_sigmoid": jax.nn.hard_sigmoid, "keras1": hard_sigmoid_keras1}
GATED = (*_BLOCKS, "fgr", "gru")


def gates(cell: str, params: Any, states: Any, xs: jax.Array) -> dict[str, jax.Array]:
    """The activations of a cell's gates.

    Args:
      cell: a name of ``models.CELLS`` that has gates, one of ``GATED``.
      params: its weights.
      states: [T+1, B, ·] from ``states_of``.
      xs: [T, B, D] inputs.

    Returns:
      [T, B, H] for each gate the cell has: i, f and o of the LSTM and its variants, r and z of the
      GRU (z weighs the old state, as f does). f is what multiplies c_{t-1}: 1 − i in ``cifg``, and
      the refined gate beside r in ``refine``.

    Raises:
      ValueError: a cell without gates; weights, states or inputs that do not fit.
    """
    checks.one_of("cell", cell, GATED)
    checks.shape("xs", xs, ("T", "B", "D"))
    check_states(states, xs)
    for name, got, kind in zip(("params", "states"), (params, states), _kinds(cell), strict=True):
        if not isinstance(got, kind):
            found = type(got).__name__
            raise ValueError(f"{name}: got {found}, expected {kind.__name__} with cell {cell!r}")
    before = jax.tree.map(lambda a: a[:-1], states)
    if cell == "fgr":  # whose gates are part of its state
        return {name: getattr(states, name)[1:] for name in "ifo"}
    if cell == "gru":
        return _gates_of_gru(params, before, xs)
    return _gates_of_lstm(cell, params, before, states.c[1:], xs)


def check_states(states: Any, xs: jax.Array) -> None:
    """Raises ``ValueError`` unless ``states`` are [T+1, B, ·] arrays, as from ``states_of``."""
    if not hasattr(states, "_fields"):
        got = type(states).__name__
        raise ValueError(f"states: got {got}, expected a state of [T+1, B, H] arrays")
    for name, part in states._asdict().items():
        checks.shape(f"states.{name}", part, (len(xs) + 1, xs.shape[1], "H"))


def _kinds(cell: str) -> tuple[type, type]:
    """Of the weights and of the states of a cell."""
    if cell == "gru":
        return GRUParams, GRUState
    if cell == "fgr":
        return variants.FGRParams, variants.FGRState
    return variants.VARIANTS[cell].params, LSTMState


def _gates_of_lstm(cell, params, before, c_t, xs) -> dict[str, jax.Array]:
    blocks, squash = _BLOCKS[cell], _SQUASH.get(cell, jax.nn.sigmoid)
    rows = blocks.replace("g", "")
    sizes = {"gates": len(blocks), "peepholes": len(rows)}
    sizes |= {"kind": variants.VARIANTS[cell].params, "state_kind": type(before)}
    z, c_tm1 = preactivations(params, before, xs, None, None, **sizes)
    if cell == "layer_norm":
        z = variants.normalised_sums(params, before, xs, None, None, z)
    z = dict(zip(blocks, z, strict=True))
    seen = {name: c_t.astype(c_tm1.dtype) if name == "o" else c_tm1 for name in rows}
    found = {n: squash(peep(params, k, z[n], seen[n])) for k, n in enumerate(rows)}
    if cell == "cifg":
        found["f"] = 1 - found["i"]
    if cell == "refine":
        r, f = found["r"], found["f"]
        found["f"] = r * (1 - (1 - f) ** 2) + (1 - r) * f**2
    return found


def _gates_of_gru(params, before, xs) -> dict[str, jax.Array]:
    both = 2 * params.w_h.shape[0]  # the blocks r and z
    kinds = checks.layer_inputs("xs", xs, params)
    z = product(xs, params.w_x[:, :both], kinds) + product(before.h, params.w_h[:, :both], kinds)
    z = z + jnp.broadcast_to(params.b[:both].astype(kinds.keep), z.shape)
    return dict(zip("rz", jnp.split(jax.nn.sigmoid(z), 2, axis=-1), strict=True))


class Saturation(NamedTuple):
    """How often each unit of a gate is nearly shut or open.

    Attributes:
      left: [H] share of activations below 0.1.
      right: [H] share of activations above 0.9.
    """

    left: jax.Array
    right: jax.Array


def gate_saturation(gates: Mapping[str, jax.Array]) -> dict[str, Saturation]:
    """Shares of saturated activations (Karpathy, Johnson & Fei-Fei, 2015).

    Args:
      gates: [..., H] activations by the gate's name, as from ``gates``.

    Returns:
      ``Saturation(left [H], right [H])`` by name, over all leading axes; the mean over the units
      is the gate's.
    """
    found = {}
    for name, a in gates.items():
        a = a.reshape(-1, a.shape[-1])
        found[name] = Saturation(*(jnp.mean(s, 0, a.dtype) for s in (a < 0.1, a > 0.9)))
    return found


def memory_half_life(f: jax.Array) -> jax.Array:
    """Steps until the product of a unit's forget gates has fallen to 1/2.

        ln 2 / −mean(ln f)

    Args:
      f: [..., H] activations of the gate that multiplies the old state (f of an LSTM, z of a GRU),
        in 0 … 1.

    Returns:
      [H], over all leading axes; infinite where f is 1, and 0 where an f is 0.

    Raises:
      ValueError: an ``f`` that is no floating array with an axis of units.
    """
    f = checks.as_array("f", f)
    checks.floating("f", f)
    if f.ndim == 0:
        raise ValueError("f: got a number, expected [..., H]")
    mean = jnp.mean(jnp.log(f.reshape(-1, f.shape[-1])), axis=0)
    return math.log(2) / jnp.abs(mean)
