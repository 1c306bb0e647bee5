"""LSTM layers for Flax nnx models: the same call and the same state, computed by ``lstm``.

A layer changes sides by one word, and the state of the old model loads with ``nnx.update`` or
``nnx.merge``:

    nnx.RNN(nnx.OptimizedLSTMCell(D, H, rngs=rngs))  →  RNN(nnx.OptimizedLSTMCell(D, H, rngs=rngs))
                                                    or  LSTM(D, H, rngs=rngs)
    nnx.RNN(nnx.LSTMCell(D, H, rngs=rngs))           →  RNN(nnx.LSTMCell(D, H, rngs=rngs))
                                                    or  LSTM(D, H, optimized=False, rngs=rngs)
    nnx.Bidirectional(...)                           →  Bidirectional(...)

The cell is Flax's own, so parameters, initial laws and keys are Flax's; only the loop over time is
this package's. The two cells differ in their parameters: ``LSTMCell`` has ``ii, if_, …, ho``,
``OptimizedLSTMCell`` has ``dense_i`` and ``dense_h``.

What is the same as in Flax and what differs on purpose stands at the top of ``lstmjax.linen``. One
more difference: a call does not change the layer. Flax's advances the layer's own random stream
even where the initial carry is zero; here it is drawn from only for a cell with a ``carry_init``.
``state_axes`` and ``broadcast_rngs`` are not there, nor is a cell's ``promote_dtype`` other than
Flax's.

Letters: T time, D input, H hidden; ``*batch`` stands for any number of axes.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes

from lstmjax import checks, interop
from lstmjax.linen import (
    batch_and_steps,
    check_cell,
    check_members,
    concatenate,
    run,
    run_both,
    settings,
)
from lstmjax.lstm import LSTMParams

CELLS = (nnx.LSTMCell, nnx.OptimizedLSTMCell)


class RNN(nnx.Module):
    """``nnx.RNN`` for LSTM cells.

    Args:
      cell: ``nnx.OptimizedLSTMCell`` or ``nnx.LSTMCell``.
      time_major: inputs and outputs are [T, *batch, ·] instead of [*batch, T, ·].
      return_carry: return ``(carry, outputs)`` instead of the outputs alone.
      reverse: run from the last valid step to the first.
      keep_order: with ``reverse``, outputs stand beside their inputs, not in the order of running.
      unroll: steps written out in one iteration of the scan, >= 1.
      method: as in ``lstm``; None for its default.
      rngs: where a ``carry_init`` draws from: True for a stream of key 0, False for none, or
        ``nnx.Rngs``, from whose stream ``carry`` one is forked.

    Raises:
      ValueError: names the argument, what came and what was expected.
    """

    def __init__(
        self,
        cell: nnx.Module,
        *,
        time_major: bool = False,
        return_carry: bool = False,
        reverse: bool = False,
        keep_order: bool = False,
        unroll: int = 1,
        method: str | None = None,
        rngs: nnx.Rngs | bool = True,
    ):
        check_cell(cell, CELLS)
        if cell.promote_dtype is not dtypes.promote_dtype:
            raise ValueError(f"promote_dtype: got {cell.promote_dtype!r}, expected Flax's own")
        self.cell = cell
        self.time_major = time_major
        self.return_carry = return_carry
        self.reverse = reverse
        self.keep_order = keep_order
        self.unroll = unroll
        self.method = method
        self.rngs = _stream(rngs)

    def __call__(
        self,
        inputs: jax.Array,
        *,
        initial_carry: tuple[jax.Array, jax.Array] | None = None,
        seq_lengths: Any = None,
        return_carry: bool | None = None,
        time_major: bool | None = None,
        reverse: bool | None = None,
        keep_order: bool | None = None,
        rngs: nnx.Rngs | nnx.RngStream | None = None,
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
          seq_lengths: [*batch] integers in 0 … T; the first so many steps of a row are valid.
          rngs: used instead of the layer's own, and advanced as Flax advances it.
          mask: [*batch, T] ([T, *batch]), non-zero at valid steps. With ``seq_lengths`` as well, a
            step is valid where both say so.
          resets: shaped as ``mask``, non-zero where the carry is set to zero before the step.
          return_carry, time_major, reverse, keep_order, method, unroll: override the layer's.

        Returns:
          outputs [*batch, T, H] ([T, *batch, H]), or ``(carry, outputs)``, where the carry is
          ``(c, h)`` after the last valid step. With ``reverse`` and without ``keep_order`` the
          first ``seq_lengths`` outputs of a row are turned round, and padding stays at the end.

        Raises:
          ValueError: names the argument, what came and what was expected.
        """
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
        if isinstance(rngs, nnx.Rngs):
            rngs = rngs.carry.fork()
        if initial_carry is None:
            initial_carry = self._initial((*batch, inputs.shape[-1]), rngs)
        return run(self.cell, _params(self.cell), inputs, initial_carry, how)

    def _initial(self, shape: tuple[int, ...], rngs: nnx.RngStream | None) -> Any:
        """The cell's initial carry for inputs [*batch, D]; zeros cost no random number."""
        if rngs is None and self.cell.carry_init is None:
            zeros = jnp.zeros((*shape[:-1], self.cell.hidden_features), self.cell.param_dtype)
            return zeros, zeros
        return self.cell.initialize_carry(shape, self.rngs if rngs is None else rngs)


def LSTM(
    in_features: int,
    hidden_features: int,
    *,
    rngs: nnx.Rngs,
    optimized: bool = True,
    time_major: bool = False,
    return_carry: bool = False,
    reverse: bool = False,
    keep_order: bool = False,
    unroll: int = 1,
    method: str | None = None,
    **cell_options,
) -> RNN:
    """``RNN`` of a new cell: ``nnx.RNN(nnx.OptimizedLSTMCell(in_features, hidden_features, …))``.

    Args:
      in_features: D >= 1.
      hidden_features: H >= 1.
      rngs: what the parameters are drawn from.
      optimized: make an ``nnx.OptimizedLSTMCell``, else an ``nnx.LSTMCell``. They compute the same
        but have other parameters, and other initial laws (the first one's recurrent kernel is
        orthogonal as one [H, 4H] matrix, the second one's per gate).
      time_major, return_carry, reverse, keep_order, unroll, method: as in ``RNN``.
      **cell_options: every other option of the cell: ``gate_fn``, ``activation_fn``,
        ``kernel_init``, ``recurrent_kernel_init``, ``bias_init``, ``dtype``, ``param_dtype``,
        ``carry_init``, ``kernel_metadata``, ``recurrent_kernel_metadata``, ``bias_metadata``.

    Returns:
      ``RNN``.

    Raises:
      ValueError: a size below 1, an ``optimized`` that is no flag.
    """
    checks.positive_int("in_features", in_features)
    checks.positive_int("hidden_features", hidden_features)
    checks.flag("optimized", optimized)
    kind = nnx.OptimizedLSTMCell if optimized else nnx.LSTMCell
    return RNN(
        kind(in_features, hidden_features, rngs=rngs, **cell_options),
        time_major=time_major,
        return_carry=return_carry,
        reverse=reverse,
        keep_order=keep_order,
        unroll=unroll,
        method=method,
    )


class Bidirectional(nnx.Module):
    """``nnx.Bidirectional`` of two ``RNN``s (Schuster & Paliwal, 1997).

        outputs[t] = merge_fn(→h_t, ←h_t)

    Args:
      forward_rnn, backward_rnn: two ``RNN``s, whose own ``reverse`` and ``keep_order`` are unused.
      merge_fn: ``merge_fn(forward, backward)`` of the two outputs.
      time_major, return_carry: defaults of the call's.
      rngs: as in ``RNN``, for both directions.

    Raises:
      ValueError: names the argument, what came and what was expected.
    """

    def __init__(
        self,
        forward_rnn: RNN,
        backward_rnn: RNN,
        *,
        merge_fn: Callable[[jax.Array, jax.Array], jax.Array] = concatenate,
        time_major: bool = False,
        return_carry: bool = False,
        rngs: nnx.Rngs | nnx.RngStream | bool = True,
    ):
        check_members((forward_rnn, backward_rnn), RNN)
        self.forward_rnn = forward_rnn
        self.backward_rnn = backward_rnn
        self.merge_fn = merge_fn
        self.time_major = time_major
        self.return_carry = return_carry
        self.rngs = _stream(rngs)

    def __call__(
        self,
        inputs: jax.Array,
        *,
        initial_carry: tuple[Any, Any] | None = None,
        rngs: nnx.Rngs | nnx.RngStream | None = None,
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
          inputs, seq_lengths, return_carry, time_major, rngs, mask, method, unroll: as in ``RNN``.
          initial_carry: ``(forward, backward)`` of two carries ``(c, h)``, or None.
          resets: as in ``RNN``: a new sequence begins there, and both directions are cut.

        Returns:
          The merged outputs, or ``((forward carry, backward carry), outputs)``.

        Raises:
          ValueError: names the argument, what came and what was expected.
        """
        members = self.forward_rnn, self.backward_rnn
        if rngs is None and any(member.cell.carry_init is not None for member in members):
            rngs = self.rngs
        stream = rngs.carry if isinstance(rngs, nnx.Rngs) else rngs
        own = {"rngs": stream, "method": method, "unroll": unroll}
        given = {"seq_lengths": seq_lengths, "mask": mask, "resets": resets}
        how = settings(self, given, return_carry=return_carry, time_major=time_major)
        return run_both(self, RNN, inputs, initial_carry, [own, own], how)


def _params(cell: nnx.LSTMCell | nnx.OptimizedLSTMCell) -> LSTMParams:
    """The cell's weights, gates i, f, g, o side by side."""
    framework = "flax_nnx_optimized" if type(cell) is nnx.OptimizedLSTMCell else "flax_nnx"
    return interop.load(framework, nnx.to_pure_dict(nnx.state(cell, nnx.Param)))


def _stream(rngs: Any) -> Any:
    """The layer's own random stream, part of its state under the same names as Flax's."""
    if isinstance(rngs, nnx.RngStream):
        return rngs
    if isinstance(rngs, nnx.Rngs):
        return rngs.carry.fork()
    checks.flag("rngs", rngs)
    return nnx.RngStream(0, tag="carry") if rngs else nnx.data(None)
