"""LSTM layers for Flax linen models: the same call and the same variables, computed by ``lstm``.

A layer changes sides by one word, and a checkpoint of the old model loads without renaming:

    nn.RNN(nn.OptimizedLSTMCell(H))  →  RNN(nn.OptimizedLSTMCell(H))  or  LSTM(H)
    nn.RNN(nn.LSTMCell(H))           →  RNN(nn.LSTMCell(H))           or  LSTM(H, optimized=False)
    nn.Bidirectional(...)            →  Bidirectional(...)

The cell is Flax's own. It creates the parameters and owns them wherever it would have owned them
under ``nn.RNN`` (in a ``@nn.compact`` method that is the caller, as ``OptimizedLSTMCell_0``), so
names, initial laws and random keys are Flax's; only the loop over time is this package's.

Same as Flax, up to rounding: outputs at valid steps, carries, all gradients. Different on purpose:
  - After the last valid step outputs are zero (Flax computes on), and what the padding holds, NaN
    included, changes nothing. A row of length 0 returns its initial carry (Flax returns another).
  - Lengths work with any number of batch axes, and are checked.
  - Below float32, gates and c are kept in float32 while running; returned dtypes are Flax's.
  - ``RNN`` has no options for what the loop does with variables (``variable_axes``, ``split_rngs``,
    …): only parameters are read. ``Bidirectional`` has no ``reverse`` and ``keep_order``, which
    Flax's takes and ignores.
A linen module's ``apply`` has a ``method`` of its own: there, ``method`` is set in the constructor.

Letters: T time, D input, H hidden; ``*batch`` stands for any number of axes.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from lstmjax import checks, interop, variants
from lstmjax.lstm import LSTMParams, LSTMState, lstm
from lstmjax.recurrence import resets_backward

CELLS = (nn.LSTMCell, nn.OptimizedLSTMCell)


class RNN(nn.Module):
    """``nn.RNN`` for LSTM cells. Every attribute but ``cell`` is a default of the call's.

    Attributes:
      cell: ``nn.OptimizedLSTMCell`` or ``nn.LSTMCell``.
      time_major: inputs and outputs are [T, *batch, ·] instead of [*batch, T, ·].
      return_carry: return ``(carry, outputs)`` instead of the outputs alone.
      reverse: run from the last valid step to the first.
      keep_order: with ``reverse``, outputs stand beside their inputs, not in the order of running.
      unroll: steps written out in one iteration of the scan, >= 1.
      method: as in ``lstm``; None for its default.
    """

    cell: nn.Module
    time_major: bool = False
    return_carry: bool = False
    reverse: bool = False
    keep_order: bool = False
    unroll: int = 1
    method: str | None = None

    def __call__(
        self,
        inputs: jax.Array,
        *,
        initial_carry: tuple[jax.Array, jax.Array] | None = None,
        init_key: jax.Array | None = None,
        seq_lengths: Any = None,
        return_carry: bool | None = None,
        time_major: bool | None = None,
        reverse: bool | None = None,
        keep_order: bool | None = None,
        mask: Any = None,
        resets: Any = None,
        method: str | None = None,
        unroll: int | None = None,
    ) -> Any:
        """Runs the cell over the inputs.

        Args:
          inputs: [*batch, T, D] floating; [T, *batch, D] with ``time_major``.
          initial_carry: ``(c, h)``, each [*batch, H], or None for the cell's own, which is zero
            unless it was given a ``carry_init``.
          init_key: a PRNG key for ``carry_init``; None for ``jax.random.key(0)``.
          seq_lengths: [*batch] integers in 0 … T; the first so many steps of a row are valid.
          mask: [*batch, T] ([T, *batch]), non-zero at valid steps. With ``seq_lengths`` as well, a
            step is valid where both say so.
          resets: shaped as ``mask``, non-zero where the carry is set to zero before the step.
          return_carry, time_major, reverse, keep_order, method, unroll: override the attributes.

        Returns:
          outputs [*batch, T, H] ([T, *batch, H]), or ``(carry, outputs)``, where the carry is
          ``(c, h)`` after the last valid step. With ``reverse`` and without ``keep_order`` the
          first ``seq_lengths`` outputs of a row are turned round, and padding stays at the end.

        Raises:
          ValueError: names the argument, what came and what was expected.
        """
        check_cell(self.cell, CELLS)
        inputs = checks.as_array("inputs", inputs)
        how = settings(
            self,
            {"seq_lengths": seq_lengths, "mask": mask, "resets": resets},
            return_carry=return_carry,
            time_major=time_major,
            reverse=reverse,
            keep_order=keep_order,
            method=method,
            unroll=unroll,
        )
        batch, _ = batch_and_steps(inputs, how)
        if initial_carry is None:
            init_key = jax.random.key(0) if init_key is None else init_key
            initial_carry = self.cell.initialize_carry(init_key, (*batch, inputs.shape[-1]))
        return run(self.cell, self._params(inputs), inputs, initial_carry, how)

    def _params(self, inputs: jax.Array) -> LSTMParams:
        """The cell's weights; creates them first where the model is being initialised."""
        if not self.cell.has_variable("params", "ii"):
            zeros = jnp.zeros(self.cell.features, self.cell.param_dtype)
            with jax.numpy_dtype_promotion("standard"):  # which the cell relies on
                self.cell((zeros, zeros), jnp.zeros(inputs.shape[-1:], inputs.dtype))
        return interop.load("flax_linen", nn.meta.unbox(self.cell.variables["params"]))


def LSTM(
    features: int,
    *,
    optimized: bool = True,
    time_major: bool = False,
    return_carry: bool = False,
    reverse: bool = False,
    keep_order: bool = False,
    unroll: int = 1,
    method: str | None = None,
    name: str | None = None,
    cell_name: str | None = None,
    **cell_options,
) -> RNN:
    """``RNN`` of a new cell: what ``nn.RNN(nn.OptimizedLSTMCell(features))`` stands for.

    A function and not a class, because the cell has to be made where the caller stands in order to
    be owned and named as under ``nn.RNN``.

    Args:
      features: H >= 1.
      optimized: make an ``nn.OptimizedLSTMCell``, else an ``nn.LSTMCell``. Parameters and results
        are the same; automatic names contain the class's name.
      time_major, return_carry, reverse, keep_order, unroll, method, name: as in ``RNN``.
      cell_name: the cell's name.
      **cell_options: every other option of the cell: ``gate_fn``, ``activation_fn``,
        ``kernel_init``, ``recurrent_kernel_init``, ``bias_init``, ``dtype``, ``param_dtype``,
        ``carry_init``.

    Returns:
      ``RNN``.

    Raises:
      ValueError: ``features`` below 1, an ``optimized`` that is no flag.
    """
    checks.positive_int("features", features)
    checks.flag("optimized", optimized)
    kind = nn.OptimizedLSTMCell if optimized else nn.LSTMCell
    return RNN(
        kind(features, name=cell_name, **cell_options),
        time_major=time_major,
        return_carry=return_carry,
        reverse=reverse,
        keep_order=keep_order,
        unroll=unroll,
        method=method,
        name=name,
    )


def concatenate(forward: jax.Array, backward: jax.Array) -> jax.Array:
    """The two directions' outputs side by side: [..., H], [..., H'] to [..., H + H']."""
    return jnp.concatenate([forward, backward], axis=-1)


class Bidirectional(nn.Module):
    """``nn.Bidirectional`` of two ``RNN``s (Schuster & Paliwal, 1997).

        outputs[t] = merge_fn(→h_t, ←h_t)

    Attributes:
      forward_rnn, backward_rnn: two ``RNN``s, whose own ``reverse`` and ``keep_order`` are unused.
      merge_fn: ``merge_fn(forward, backward)`` of the two outputs.
      time_major, return_carry: defaults of the call's.
    """

    forward_rnn: RNN
    backward_rnn: RNN
    merge_fn: Callable[[jax.Array, jax.Array], jax.Array] = concatenate
    time_major: bool = False
    return_carry: bool = False

    def __call__(
        self,
        inputs: jax.Array,
        *,
        initial_carry: tuple[Any, Any] | None = None,
        init_key: jax.Array | None = None,
        seq_lengths: Any = None,
        return_carry: bool | None = None,
        time_major: bool | None = None,
        mask: Any = None,
        resets: Any = None,
        method: str | None = None,
        unroll: int | None = None,
    ) -> Any:
        """Runs both directions over the inputs.

        Args:
          inputs, seq_lengths, return_carry, time_major, mask, method, unroll: as in ``RNN``.
          initial_carry: ``(forward, backward)`` of two carries ``(c, h)``, or None.
          init_key: a PRNG key, split for the two; None gives both ``jax.random.key(0)``.
          resets: as in ``RNN``: a new sequence begins there, and both directions are cut.

        Returns:
          The merged outputs, or ``((forward carry, backward carry), outputs)``.

        Raises:
          ValueError: names the argument, what came and what was expected.
        """
        keys = (None, None) if init_key is None else jax.random.split(init_key)
        given = {"seq_lengths": seq_lengths, "mask": mask, "resets": resets}
        how = settings(self, given, return_carry=return_carry, time_major=time_major)
        own = [{"init_key": key, "method": method, "unroll": unroll} for key in keys]
        return run_both(self, RNN, inputs, initial_carry, own, how)


# --- what the layers of linen and of nnx share: Flax's axes and carries around ``lstm`` -----------


def settings(layer: Any, how: dict[str, Any], **given) -> dict[str, Any]:
    """``how`` and every option as given in the call, or else as the layer has it."""
    for name, value in given.items():
        how[name] = getattr(layer, name) if value is None else value
        if name not in ("method", "unroll"):
            checks.flag(name, how[name])
    return how


def run(cell: Any, params: LSTMParams, inputs: jax.Array, carry: Any, how: dict) -> Any:
    """The layer of ``cell`` on Flax's axes, with its carries ``(c, h)`` and returned dtypes.

    ``how`` holds the arguments of ``RNN``'s call, but for those that speak of the initial carry.
    """
    size, hidden = params.w_x.shape[0], params.w_h.shape[0]
    if inputs.shape[-1] != size:
        raise ValueError(f"inputs: got shape {list(inputs.shape)}, expected [..., {size}]")
    batch, _ = batch_and_steps(inputs, how)
    c, h = pair("initial_carry", carry)
    for name, array in (("c", c), ("h", h)):
        checks.shape(f"initial_carry {name}", array, (*batch, hidden))
        checks.floating(f"initial_carry {name}", array)
    if cell.dtype is not None:  # else the layer promotes, by the same rule
        params, inputs = jax.tree.map(lambda a: a.astype(cell.dtype), (params, inputs))
    lengths = _lengths(inputs, how)
    final, hs = _layer(cell)(
        params,
        _inward(inputs, len(batch), how["time_major"]),
        LSTMState(h=h.reshape(-1, hidden), c=c.reshape(-1, hidden)),
        mask=_marks("mask", inputs, how),
        resets=_marks("resets", inputs, how),
        lengths=lengths,
        reverse=how["reverse"],
        unroll=how["unroll"],
        **({} if how["method"] is None else {"method": how["method"]}),
    )
    if how["reverse"] and not how["keep_order"]:
        hs = _turned(hs, lengths)
    with jax.numpy_dtype_promotion("standard"):  # Flax's rule: gates times carry
        dtype = jnp.promote_types(hs.dtype, jnp.result_type(c))
    carry = tuple(part.reshape(*batch, hidden).astype(dtype) for part in (final.c, final.h))
    outputs = _outward(hs.astype(dtype), batch, how["time_major"])
    return (carry, outputs) if how["return_carry"] else outputs


def run_both(layer: Any, kind: type, inputs: Any, carries: Any, own: Sequence, how: dict) -> Any:
    """The members of a ``Bidirectional``, each a ``kind`` with its ``own`` options, and merged."""
    members = layer.forward_rnn, layer.backward_rnn
    check_members(members, kind)
    inputs = checks.as_array("inputs", inputs)
    carries = (None, None) if carries is None else pair("initial_carry", carries)
    forward = how | {"return_carry": True, "reverse": False}
    backward = forward | {"reverse": True, "keep_order": True}
    backward["resets"] = _backward_resets(inputs, how)
    every = zip(members, carries, own, (forward, backward), strict=True)
    (carry, outputs), (carry_back, outputs_back) = (
        member(inputs, initial_carry=given, **more, **options)
        for member, given, more, options in every
    )
    outputs = layer.merge_fn(outputs, outputs_back)
    return ((carry, carry_back), outputs) if how["return_carry"] else outputs


def _backward_resets(inputs: jax.Array, how: dict[str, Any]) -> jax.Array | None:
    """Resets that cut the backward direction where ``resets`` cut the forward one."""
    if how["resets"] is None:
        return None
    batch, steps = batch_and_steps(inputs, how)
    resets = _marks("resets", inputs, how)
    rows = resets.shape[1]
    valid = checks.valid_steps(steps, rows, _marks("mask", inputs, how), _lengths(inputs, how))
    back = resets_backward(checks.reset_steps(steps, rows, resets), valid)
    return _outward(back, batch, how["time_major"])


def batch_and_steps(inputs: jax.Array, how: dict[str, Any]) -> tuple[tuple[int, ...], int]:
    """``(*batch), T`` of floating inputs [*batch, T, D], or [T, *batch, D]."""
    checks.floating("inputs", inputs)
    if inputs.ndim < 2:
        expected = "[T, *batch, D]" if how["time_major"] else "[*batch, T, D]"
        raise ValueError(f"inputs: got shape {list(inputs.shape)}, expected {expected}")
    shape = inputs.shape
    return (shape[1:-1], shape[0]) if how["time_major"] else (shape[:-2], shape[-2])


def pair(name: str, value: Any) -> tuple[Any, Any]:
    """``value``, checked to be a bare pair: an ``LSTMState`` has the other order."""
    if not isinstance(value, tuple | list) or hasattr(value, "_fields") or len(value) != 2:
        raise ValueError(f"{name}: got {type(value).__name__}, expected a pair")
    return tuple(value)


def check_cell(cell: Any, kinds: tuple[type, ...]) -> None:
    """Raises ``ValueError`` unless this package knows what the cell computes."""
    if type(cell) not in kinds:  # a subclass may compute anything
        names = " or ".join(kind.__name__ for kind in kinds)
        raise ValueError(f"cell: got {type(cell).__name__}, expected {names}")
    checks.function("gate_fn", cell.gate_fn)
    checks.function("activation_fn", cell.activation_fn)


def check_members(members: Sequence[Any], kind: type) -> None:
    """Raises ``ValueError`` unless both members of a ``Bidirectional`` are of ``kind``."""
    for name, member in zip(("forward_rnn", "backward_rnn"), members, strict=True):
        if not isinstance(member, kind):
            expected = f"{kind.__module__}.{kind.__name__}"
            raise ValueError(f"{name}: got {type(member).__name__}, expected {expected}")


def _layer(cell: Any) -> Callable:
    """The layer function with the cell's equations."""
    if cell.gate_fn is jax.nn.sigmoid and cell.activation_fn is jnp.tanh:
        return lstm
    return variants.activations(cell.gate_fn, cell.activation_fn, cell.activation_fn)


def _lengths(inputs: jax.Array, how: dict[str, Any]) -> Any:
    """[*batch] lengths as [B], or None; known ones stay NumPy's, so that values are checked."""
    lengths = how["seq_lengths"]
    if lengths is None:
        return None
    batch, steps = batch_and_steps(inputs, how)
    if not isinstance(lengths, jax.Array):
        checks.as_array("seq_lengths", lengths)
        lengths = np.asarray(lengths)
    checks.shape("seq_lengths", lengths, batch)
    lengths = lengths.reshape(-1)
    try:
        checks.valid_steps(steps, lengths.shape[0], None, lengths)
    except ValueError as error:
        raise ValueError(f"seq_{error}") from None  # it speaks of "lengths"
    return lengths


def _marks(name: str, inputs: jax.Array, how: dict[str, Any]) -> Any:
    """The mask or the resets, [*batch, T] or [T, *batch], as [T, B]; None stays None."""
    if how[name] is None:
        return None
    batch, steps = batch_and_steps(inputs, how)
    marks, time_major = checks.as_array(name, how[name]), how["time_major"]
    checks.shape(name, marks, (steps, *batch) if time_major else (*batch, steps))
    return _inward(marks, len(batch), time_major)


def _inward(array: jax.Array, batch_axes: int, time_major: bool) -> jax.Array:
    """[*batch, T, …], or [T, *batch, …], as [T, B, …]."""
    array = array if time_major else jnp.moveaxis(array, batch_axes, 0)
    steps, *rest = array.shape
    batch, rest = rest[:batch_axes], rest[batch_axes:]
    return array.reshape(steps, math.prod(batch), *rest)  # sizes may be symbols: see jax.export


def _outward(array: jax.Array, batch: tuple[int, ...], time_major: bool) -> jax.Array:
    """[T, B, …] as [*batch, T, …], or [T, *batch, …]."""
    array = array.reshape(array.shape[0], *batch, *array.shape[2:])
    return array if time_major else jnp.moveaxis(array, 0, len(batch))


def _turned(hs: jax.Array, lengths: Any) -> jax.Array:
    """[T, B, H] with each row's first ``lengths`` steps in the opposite order."""
    if lengths is None:
        return jnp.flip(hs, axis=0)
    times, lengths = jnp.arange(hs.shape[0])[:, None], jnp.asarray(lengths, int)[None, :]
    source = jnp.where(times < lengths, lengths - 1 - times, times)
    return jnp.take_along_axis(hs, source[:, :, None], axis=0)
