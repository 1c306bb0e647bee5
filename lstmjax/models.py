"""Models: thin flax.linen modules that own parameters and call the functions of the core.

Letters: T time, B batch, D input, H hidden, V vocabulary, O outputs.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp

from lstmjax import checks, sharded
from lstmjax.dropout import (
    embedding_dropout,
    locked_dropout,
    recurrent_noise,
    variational_dropout,
    weight_drop,
    word_dropout,
)
from lstmjax.gru import GRUParams, gru, init_gru
from lstmjax.initializers import GateBias, chrono, log_uniform, uniform_gate
from lstmjax.precision import bfloat16_dot, in_bfloat16
from lstmjax.rnn import RNNParams, init_rnn, rnn
from lstmjax.variants import VARIANTS, LearnedState, Variant, init_learned_state, learned_state

glorot = jax.nn.initializers.glorot_uniform()
zeros = jax.nn.initializers.zeros

CELLS = {
    "lstm": VARIANTS["lstm"],
    "gru": Variant(GRUParams, init_gru, gru),
    "rnn": Variant(RNNParams, init_rnn, rnn),
    "linear_rnn": Variant(
        RNNParams, partial(init_rnn, bias=False), partial(rnn, activation="linear")
    ),
    **VARIANTS,
}

# For command lines: the same names, the laws of init_lstm, what products are taken of, methods.
Cell = Literal[
    "lstm", "gru", "rnn", "linear_rnn", "peephole", "cifg", "nig", "nfg", "nog", "niaf", "noaf",
    "fgr", "layer_norm", "refine", "hard_sigmoid", "keras1",
]  # fmt: skip
Init = Literal[
    "lstmjax", "tf1", "keras1", "keras", "torch", "flax", "nnx_fused", "haiku", "equinox", "haste"
]  # fmt: skip
Precision = Literal["float32", "bfloat16"]
Method = Literal["fused", "scan", "unrolled", "onednn", "cudnn"]

# The laws of a forget gate's bias that know the longest lag.
LAGS = {"chrono": chrono, "log_uniform": log_uniform}


def gate_bias(
    forget_bias: str | None, cell: str, steps: int | None = None
) -> float | GateBias | None:
    """What a text says of the forget gate's initial bias.

    Args:
      forget_bias: a number, "chrono:T" or "log_uniform:T" (dependencies of up to T steps),
        "uniform_gate", or None.
      cell: one of ``CELLS``.
      steps: T where the text is "chrono" or "log_uniform" alone.

    Returns:
      What ``init_lstm`` takes as ``forget_bias``.

    Raises:
      ValueError: another text, T below 2, or a cell that has no such gate.
    """
    if forget_bias is None:
        return None
    if forget_bias in LAGS and steps is not None:
        forget_bias = f"{forget_bias}:{steps}"
    if cell not in VARIANTS:
        raise ValueError(f"forget_bias: got {forget_bias}, expected None with the cell {cell}")
    if forget_bias == "uniform_gate":
        return uniform_gate
    law, colon, number = forget_bias.rpartition(":")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or bool(colon) != bool(law) or (law and law not in LAGS):
        expected = "a number, chrono:T, log_uniform:T or uniform_gate"
        raise ValueError(f"forget_bias: got {forget_bias}, expected {expected}")
    if law and value < 2:
        raise ValueError(f"forget_bias: got {forget_bias}, expected {law}:T with T >= 2")
    if not law and cell == "nfg":
        raise ValueError(f"forget_bias: got {forget_bias}, expected a law with the cell nfg")
    return LAGS[law](value) if law else value


# ---- modules ------------------------------------------------------------------------------------


class Recurrent(nn.Module):
    """One recurrent layer.

    Attributes:
      cell: "lstm", "gru", "rnn" (tanh), "linear_rnn" (no activation, no bias), or any other of
        ``variants.VARIANTS``.
      hidden_size: H.
      cell_init: the cell's initial law, as ``init`` of ``init_lstm``, ``init_gru``, ``init_rnn``.
      method: as in ``lstm``.
      unroll: steps written out in one iteration of the scan.
      forget_bias: as in ``init_lstm``; None with a GRU or an RNN.
      recurrent_dropout: rate of masks on h_{t-1}, one for each gate, the same at all steps.
      weight_drop: rate of dropping weights of the recurrent kernel.
      zoneout: probability of keeping an element of the old h, and of the old c if there is one.
      learned_state: whether the initial state is learned (zero at the start), or zero.
      precision: "float32": the layer's own dtypes; "bfloat16": as ``in_bfloat16``.
    """

    cell: str
    hidden_size: int
    cell_init: str = "lstmjax"
    method: str = "fused"
    unroll: int = 1
    forget_bias: float | GateBias | None = None
    recurrent_dropout: float = 0.0
    weight_drop: float = 0.0
    zoneout: float = 0.0
    learned_state: bool = False
    precision: str = "float32"

    @nn.compact
    def __call__(
        self, xs: jax.Array, state: Any = None, *, key: jax.Array | None = None, **options
    ) -> tuple[Any, jax.Array]:
        """[T, B, D] to ``(state, hs [T, B, H])``.

        Without ``key`` nothing is dropped, and zoneout is its expectation; ``options`` are the
        layer function's.
        """
        checks.one_of("cell", self.cell, tuple(CELLS))
        checks.one_of("precision", self.precision, get_args(Precision))
        kind, init, layer = CELLS[self.cell]
        law = {} if self.forget_bias is None else {"forget_bias": self.forget_bias}
        if law and self.cell not in VARIANTS:
            got = f"forget_bias: got {self.forget_bias!r}"
            raise ValueError(f"{got}, expected None for the cell {self.cell!r}")

        def weights(key):
            drawn = init(key, xs.shape[-1], self.hidden_size, init=self.cell_init, **law)
            return {name: w for name, w in drawn._asdict().items() if w is not None}

        params = kind(**dict.fromkeys(kind._fields) | self.param("weights", weights))
        of_weights, of_noise = (None, None) if key is None else jax.random.split(key)
        rates = {"recurrent_dropout": self.recurrent_dropout, "zoneout_h": self.zoneout}
        if self.cell in VARIANTS:
            rates["zoneout_c"] = self.zoneout
        noise = recurrent_noise(of_noise, params, xs, **rates)
        options |= {"noise": noise} if any(part is not None for part in noise) else {}
        params = weight_drop(of_weights, params, self.weight_drop)
        layer = layer if self.precision == "float32" else partial(in_bfloat16, layer)
        if self.learned_state:
            first = init_learned_state(params).state
            start = self.param("state", lambda _: first._asdict())
            params, layer = LearnedState(params, type(first)(**start)), learned_state(layer)
        return layer(params, xs, state, method=self.method, unroll=self.unroll, **options)


class SequenceModel(nn.Module):
    """inputs → (embedding, or dense layer, or nothing) → recurrent layers → dense head.

    Attributes:
      cell, hidden_size, cell_init, forget_bias, method, unroll, recurrent_dropout, weight_drop,
        zoneout, learned_state: of every recurrent layer (see ``Recurrent``).
      precision: "float32", or "bfloat16": every product, of the dense layers too, has bfloat16
        factors and is summed in float32. Parameters, their gradients, dense biases and outputs
        are float32 as ever.
      output_size: O.
      num_layers: recurrent layers.
      every_step: the head reads every output of the top layer, or only its final h.
      vocabulary_size: V: inputs are ids and are embedded; None: inputs are numbers.
      input_size: size of the embedding, or of a dense layer before the first cell; None for no
        such layer.
      dropout: rate of variational dropout on every recurrent layer's inputs.
      locked_dropout: rate of locked dropout on every recurrent layer's outputs.
      embedding_dropout: rate of dropping a word's vector, wherever the word occurs.
      word_dropout: rate of replacing a word by ``unknown_id``, at each place on its own.
      unknown_id, padding_id: for ``word_dropout``: ids of the unknown word, and of the one that is
        never replaced (or None).
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
    method: str = "fused"
    unroll: int = 1
    forget_bias: float | GateBias | None = None
    recurrent_dropout: float = 0.0
    weight_drop: float = 0.0
    zoneout: float = 0.0
    learned_state: bool = False
    locked_dropout: float = 0.0
    embedding_dropout: float = 0.0
    word_dropout: float = 0.0
    unknown_id: int | None = None
    padding_id: int | None = None
    precision: str = "float32"

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
          states: each layer's state before the first step, or None for zeros (or the learned one).
          mask: [B, T], non-zero at valid steps, or None.
          key: a PRNG key for all that is dropped; None means evaluation.

        Returns:
          ``(states, outputs)``: each layer's final state; [B, T, O], or [B, O] of the final h.

        Raises:
          ValueError: ``inputs`` or ``mask`` of another shape, a size that is none, a rate outside
            [0, 1), words to be dropped without a vocabulary, not as many ``states`` as layers; what
            the layers raise.
        """
        for name in ("num_layers", "output_size"):
            checks.positive_int(name, getattr(self, name))
        checks.one_per_layer("states", states, self.num_layers)
        checks.prng_key("key", key, or_none=True)
        inputs = checks.as_array("inputs", inputs)
        checks.shape("inputs", inputs, ("B", "T") + ("D",) * (self.vocabulary_size is None))
        if mask is not None:
            mask = checks.as_array("mask", mask)
            checks.shape("mask", mask, inputs.shape[:2])
        hs = self._first(jnp.swapaxes(inputs, 0, 1), key)  # the core is time-major
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
                self.forget_bias,
                self.recurrent_dropout,
                self.weight_drop,
                self.zoneout,
                self.learned_state,
                self.precision,
                name=f"layer_{number}",
            )
            final, hs = layer(hs, state, mask=mask, key=_key(key, "recurrent", number))
            finals.append(final)
            if number + 1 == self.num_layers and not self.every_step:
                hs = final.h[None]  # as one step: its mask is the one of all steps
            hs = locked_dropout(_key(key, "locked_dropout", number), hs, self.locked_dropout)
        read = jnp.swapaxes(hs, 0, 1) if self.every_step else hs[0]
        return tuple(finals), self._dense(
            self.output_size, self.head_init, self.head_bias, "head", read
        )

    def _first(self, inputs: jax.Array, key: jax.Array | None) -> jax.Array:
        """[T, B] ids or [T, B, D] numbers to what the first recurrent layer reads."""
        if self.vocabulary_size is None:
            for name in ("embedding_dropout", "word_dropout"):
                if rate := getattr(self, name):
                    raise ValueError(f"{name}: got {rate!r}, expected 0 without a vocabulary")
            if self.input_size is None:
                return inputs
            checks.positive_int("input_size", self.input_size)
            return self._dense(self.input_size, self.input_init, self.input_bias, "input", inputs)
        for name in ("vocabulary_size", "input_size"):
            checks.positive_int(name, getattr(self, name))
        embed = nn.Embed(
            self.vocabulary_size, self.input_size, embedding_init=self.input_init, name="embed"
        )
        if self.word_dropout:
            of_words, ids = _key(key, "word_dropout"), (self.unknown_id, self.padding_id)
            inputs = word_dropout(of_words, inputs, self.word_dropout, ids[0], keep_id=ids[1])
        if not self.embedding_dropout and not sharded.is_spread(inputs):
            return embed(inputs)
        of_table = _key(key, "embedding_dropout")
        table = embedding_dropout(of_table, embed.embedding, self.embedding_dropout)
        return sharded.take(table, inputs)

    def _dense(self, size: int, kernel_init: Callable, bias_init: Callable, name: str, x):
        inits = {"kernel_init": kernel_init, "bias_init": bias_init}
        if self.precision == "bfloat16":  # dtype is that of the sums
            inits |= {"dtype": jnp.float32, "dot_general": bfloat16_dot}
        return nn.Dense(size, **inits, name=name)(x)


# The numbers of layers are folded into a key as they are, so these start above any of them.
_KINDS = {"recurrent": 2**20, "locked_dropout": 2**20 + 1}
_KINDS |= {"embedding_dropout": 2**20 + 2, "word_dropout": 2**20 + 3}


def _key(key: jax.Array | None, kind: str, number: int = 0) -> jax.Array | None:
    """The key of a kind of dropout in a layer; None stays None."""
    if key is None:
        return None
    return jax.random.fold_in(jax.random.fold_in(key, _KINDS[kind]), number)
