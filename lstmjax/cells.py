"""From a cell's equations to its step, its layer and its initial law; activations by name.

``variants.py`` says what the equations are; here is what its cells share with the LSTM.
"""

from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp

from lstmjax.dropout import Noise
from lstmjax.gated import draw_cell, emit, preactivations, run_cell
from lstmjax.initializers import GateBias
from lstmjax.lstm import LSTMParams, LSTMState


def variant(
    name: str,
    equations: Callable,
    blocks: tuple[str, ...] = ("i", "f", "g", "o"),
    peepholes: int = 3,
    *,
    sums: Callable | None = None,
    more: Callable | None = None,
    by_hand: Callable | None = None,
    **kinds: type,
) -> tuple[Callable, Callable, Callable]:
    """The three functions of a variant of the LSTM.

    Args:
      name: the layer's.
      equations: ``equations(params, state, z, cell_clip) -> (m, c)``: z are the blocks [..., H] of
        ``preactivations``, ``state.c`` is c_{t-1} in the dtype of the gates, m [..., H] is what the
        projection reads. What follows on c are the state's further fields.
      blocks: as in ``draw_cell``.
      peepholes: rows of the peepholes.
      sums: ``sums(params, state, x_t, x_mask, h_mask, z) -> z`` changes the blocks.
      more: ``more(key, params, init) -> params`` adds weights to those of ``draw_cell``.
      by_hand: what ``method="fused"`` runs, as in ``recur_compiled``, and given the masks of
        zoneout too; without it, the scan.
      **kinds: ``kind`` and ``state_kind`` of ``preactivations``, where they are not the LSTM's.

    Returns:
      ``(step, layer, init)`` with the signatures of ``lstm_step``, ``lstm`` and ``init_lstm``.
    """
    sizes = {"gates": len(blocks), "peepholes": peepholes}
    sizes |= {"kind": LSTMParams, "state_kind": LSTMState} | kinds

    def step(
        params: Any,
        state: Any,
        x_t: jax.Array,
        *,
        cell_clip: float | None = None,
        proj_clip: float | None = None,
        x_mask: jax.Array | None = None,
        h_mask: jax.Array | None = None,
    ) -> Any:
        clips = {"cell_clip": cell_clip, "proj_clip": proj_clip}
        z, c_tm1 = preactivations(params, state, x_t, x_mask, h_mask, **sizes, **clips)
        state = state._replace(c=c_tm1)
        if sums is not None:
            z = sums(params, state, x_t, x_mask, h_mask, z)
        m, c, *others = equations(params, state, z, cell_clip)
        return type(state)(emit(params, x_t, m, proj_clip), c, *others)

    step.__doc__ = f"{equations.__doc__.rstrip()}\n\n    Otherwise as ``lstm_step``."
    step.__name__ = step.__qualname__ = f"{name}_step"
    made = step, _layer(name, step, sizes, by_hand), _init(name, blocks, peepholes, more)
    for function in made:  # which pickle looks up where the equations are
        function.__module__ = equations.__module__
    return made


def _layer(name: str, step: Callable, sizes: dict[str, Any], by_hand: Callable | None) -> Callable:
    hands = {} if by_hand is None else {"fused": by_hand}
    hands = {"by_hand": hands, "zoneout_by_hand": by_hand is not None}

    def layer(
        params: Any,
        xs: jax.Array,
        state: Any = None,
        *,
        mask: Any = None,
        lengths: Any = None,
        resets: Any = None,
        reset_to: Any = None,
        reverse: bool = False,
        cell_clip: float | None = None,
        proj_clip: float | None = None,
        noise: Noise | None = None,
        method: str = "fused",
        unroll: int = 1,
        truncation: tuple[int, int] | None = None,
    ) -> tuple[Any, jax.Array]:
        clips = {"cell_clip": cell_clip, "proj_clip": proj_clip}
        over_time = {"mask": mask, "lengths": lengths, "resets": resets, "reset_to": reset_to}
        how = {"reverse": reverse, "noise": noise, "method": method, "unroll": unroll}
        how["truncation"] = truncation
        return run_cell(step, params, xs, state, clips, **hands, **sizes, **over_time, **how)

    what = f"A layer, with everything that ``lstm`` takes: ``{name}_step`` over time"
    layer.__doc__ = f"{what}." if by_hand else f'{what}; "fused" is "scan" here.'
    layer.__name__ = layer.__qualname__ = name
    return layer


def _init(name: str, blocks: tuple[str, ...], peepholes: int, more: Callable | None) -> Callable:
    def init_cell(
        key: jax.Array,
        input_size: int,
        hidden_size: int,
        *,
        proj_size: int | None = None,
        peephole: bool = False,
        forget_bias: float | GateBias | None = None,
        init: str = "lstmjax",
        dtype: Any = jnp.float32,
    ) -> Any:
        options = {"proj_size": proj_size, "peephole": peephole, "forget_bias": forget_bias}
        options |= {"init": init, "dtype": dtype, "peepholes": peepholes}
        params = LSTMParams(*draw_cell(key, input_size, hidden_size, blocks, **options))
        return params if more is None else more(jax.random.fold_in(key, 4), params, init)

    init_cell.__doc__ = f"Draws the weights of ``{name}``, with the laws of ``init_lstm``."
    init_cell.__name__ = init_cell.__qualname__ = f"init_{name}"
    return init_cell


# ---- activations by name ------------------------------------------------------------------------


def hard_sigmoid_keras1(z: jax.Array) -> jax.Array:
    """clip(z/5 + 1/2, 0, 1); Keras 3 has clip(z/6 + 1/2, 0, 1), ``jax.nn.hard_sigmoid``."""
    return jnp.clip(0.2 * z + 0.5, 0.0, 1.0)


def linear(z: jax.Array) -> jax.Array:
    """z itself."""
    return z


ACTIVATIONS = {
    "sigmoid": jax.nn.sigmoid,
    "hard_sigmoid": jax.nn.hard_sigmoid,
    "hard_sigmoid_keras1": hard_sigmoid_keras1,
    "tanh": jnp.tanh,
    "relu": jax.nn.relu,
    "linear": linear,
}


def functions(**given: Any) -> list[Callable]:
    """The activations that arguments name or are, in order.

    Raises:
      ValueError: an argument that is neither a name nor a (hashable) function.
    """
    for name, value in given.items():
        known = value in ACTIVATIONS if isinstance(value, str) else callable(value)
        if not (known and isinstance(value, Hashable)):
            names = ", ".join(map(repr, ACTIVATIONS))
            raise ValueError(f"{name}: got {value!r}, expected a function or one of {names}")
    return [value if callable(value) else ACTIVATIONS[value] for value in given.values()]
