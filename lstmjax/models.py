"""Models: thin flax.linen modules that own parameters and call the functions of the core.

Letters: T time, B batch, D input, H hidden, V vocabulary, O outputs.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lstmjax import checks
from lstmjax.dropout import variational_dropout
from lstmjax.gru import GRUParams, gru, init_gru
from lstmjax.lstm import LSTMParams, init_lstm, lstm
from lstmjax.rnn import RNNParams, init_rnn, rnn

glorot = jax.nn.initializers.glorot_uniform()
zeros = jax.nn.initializers.zeros

CELLS = {
    "lstm": (LSTMParams, init_lstm, lstm),
    "gru": (GRUParams, init_gru, gru),
    "rnn": (RNNParams, init_rnn, rnn),
    "linear_rnn": (
        RNNParams,
        partial(init_rnn, bias=False),
        partial(rnn, activation="linear"),
    ),
}


class Recurrent(nn.Module):
    """One recurrent layer.

    Attributes:
      cell: "lstm", "gru", "rnn" (tanh) or "linear_rnn" (no activation, no bias).
      hidden_size: H.
      cell_init: the cell's initial law, as ``init`` of ``init_lstm``, ``init_gru``, ``init_rnn``.
      method: "scan" or "unrolled".
      unroll: steps written out in one iteration of the scan.
    """

    cell: str
    hidden_size: int
    cell_init: str = "lstmjax"
    method: str = "scan"
    unroll: int = 1

    @nn.compact
    def __call__(self, xs: jax.Array, state: Any = None, **options) -> tuple[Any, jax.Array]:
        """[T, B, D] to ``(state, hs [T, B, H])``; options are the layer function's."""
        checks.one_of("cell", self.cell, tuple(CELLS))
        kind, init, layer = CELLS[self.cell]

        def weights(key):
            drawn = init(key, xs.shape[-1], self.hidden_size, init=self.cell_init)
            return {name: w for name, w in drawn._asdict().items() if w is not None}

        params = kind(**self.param("weights", weights))
        return layer(params, xs, state, method=self.method, unroll=self.unroll, **options)


class SequenceModel(nn.Module):
    """inputs → (embedding, or dense layer, or nothing) → recurrent layers → dense head.

    Attributes:
      cell, hidden_size, cell_init, method, unroll: of every recurrent layer (see ``Recurrent``).
      output_size: O.
      num_layers: recurrent layers.
      every_step: the head reads every output of the top layer, or only its final h.
      vocabulary_size: V: inputs are ids and are embedded; None: inputs are numbers.
      input_size: size of the embedding, or of a dense layer before the first cell; None for no
        such layer.
      dropout: rate of variational dropout on every recurrent layer's inputs.
      input_init, input_bias, head_init, head_bias: initial laws of the dense layers.
    """

    cell: str
    hidden_size: int
    output_size: int
    num_layers: int = 1
    every_step: bool = False
    vocabulary_size: int | None = None
    input_size: int | None = None
    dropout: float = 0.0
    cell_init: str = "lstmjax"
    input_init: Callable = glorot
    input_bias: Callable = zeros
    head_init: Callable = glorot
    head_bias: Callable = zeros
    method: str = "scan"
    unroll: int = 1

    @nn.compact
    def __call__(
        self,
        inputs: jax.Array,
        states: tuple | None = None,
        *,
        mask: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> tuple[tuple, jax.Array]:
        """Runs the model on a batch.

        Args:
          inputs: [B, T] integer ids, or [B, T, D] numbers.
          states: each layer's state before the first step, or None for zeros.
          mask: [B, T], non-zero at valid steps, or None.
          key: a PRNG key for dropout; None means evaluation.

        Returns:
          ``(states, outputs)``: each layer's final state; [B, T, O], or [B, O] of the final h.
        """
        hs = jnp.swapaxes(inputs, 0, 1)  # the core is time-major
        if self.vocabulary_size is not None:
            hs = nn.Embed(
                self.vocabulary_size, self.input_size, embedding_init=self.input_init, name="embed"
            )(hs)
        elif self.input_size is not None:
            hs = self._dense(self.input_size, self.input_init, self.input_bias, "input", hs)
        mask = None if mask is None else jnp.swapaxes(mask, 0, 1)
        states = (None,) * self.num_layers if states is None else states
        finals = []
        for number, state in enumerate(states):
            layer_key = None if key is None else jax.random.fold_in(key, number)
            hs = variational_dropout(layer_key, hs, self.dropout)
            layer = Recurrent(
                self.cell,
                self.hidden_size,
                self.cell_init,
                self.method,
                self.unroll,
                name=f"layer_{number}",
            )
            final, hs = layer(hs, state, mask=mask)
            finals.append(final)
        read = jnp.swapaxes(hs, 0, 1) if self.every_step else finals[-1].h
        return tuple(finals), self._dense(
            self.output_size, self.head_init, self.head_bias, "head", read
        )

    def _dense(self, size: int, kernel_init: Callable, bias_init: Callable, name: str, x):
        dense = nn.Dense(size, kernel_init=kernel_init, bias_init=bias_init, name=name)
        return dense(x)
