"""Variants of the LSTM: each changes a line or two of the equations at the top of lstm.py.

Greff, Srivastava, Koutník, Steunebrink & Schmidhuber ("LSTM: A Search Space Odyssey", 2017)
compare the LSTM with peepholes with eight others; all run with and without peepholes here:

    lstm, peephole    without, with peepholes (``init_lstm(peephole=True)``)
    cifg              f_t = 1 − i_t                  blocks i, g, o
    nig, nfg, nog     i_t = 1, f_t = 1, o_t = 1      blocks f, g, o; i, g, o; i, f, g
    niaf, noaf        g_t = z_g, h_t = o_t ⊙ c_t     blocks i, f, g, o
    fgr               gates read the gates of the step before    blocks i, f, g, o and w_gates

Others are ``layer_norm``, ``refine`` and ``activations`` (Keras 1's hard sigmoid and such);
``learned_state`` makes the initial state of any cell a weight.

A variant ``v`` is three functions, ``v_step``, ``v`` and ``init_v``, with the signatures of
``lstm_step``, ``lstm`` and ``init_lstm``, so it runs wherever the LSTM does: in ``stack`` and
``bidirectional``, with masks, resets, noise, peepholes, a projection and clips. A gate that a
variant lacks has no weights: kernels have fewer blocks, peepholes fewer rows, noise fewer masks.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.nn import sigmoid
from jax.numpy import tanh

from lstmjax import checks
from lstmjax.bptt import check_inputs
from lstmjax.cells import functions, linear, variant
from lstmjax.fused import by_hand
from lstmjax.gated import clipped, peep
from lstmjax.gru import GRUParams, GRUState
from lstmjax.initializers import gated_kernels
from lstmjax.lstm import LSTMParams, LSTMState, init_lstm, lstm
from lstmjax.recurrence import product
from lstmjax.rnn import RNNParams, RNNState

# ---- gates that are missing or coupled ----------------------------------------------------------
# Equations are (params, state, z, cell_clip) -> (m_t, c_t), as ``cells.variant`` takes them.


def _cifg(params, state, z, cell_clip):
    """Coupled input and forget gate (Greff et al., 2017): what is not kept is written.

        i_t = σ(z_i + p_i ⊙ c_{t-1})
        c_t = clip((1 − i_t) ⊙ c_{t-1} + i_t ⊙ g_t)

    Blocks i, g, o; peepholes i, o. To keep f and write 1 − f is the same model with the opposite
    sign in this block. Its bias starts at minus the forget bias, so that f starts at σ of it.
    """
    i = sigmoid(peep(params, 0, z[0], state.c))
    c = clipped((1 - i) * state.c + i * tanh(z[1]), cell_clip)
    return sigmoid(peep(params, 1, z[2], c)) * tanh(c), c


def _nig(params, state, z, cell_clip):
    """No input gate (Greff et al., 2017).

        c_t = clip(f_t ⊙ c_{t-1} + g_t)

    Blocks f, g, o; peepholes f, o.
    """
    f = sigmoid(peep(params, 0, z[0], state.c))
    c = clipped(f * state.c + tanh(z[1]), cell_clip)
    return sigmoid(peep(params, 1, z[2], c)) * tanh(c), c


def _nfg(params, state, z, cell_clip):
    """No forget gate (Greff et al., 2017), as in Hochreiter & Schmidhuber (1997).

        c_t = clip(c_{t-1} + i_t ⊙ g_t)

    Blocks i, g, o; peepholes i, o. Of ``forget_bias``, a law gives the input gate's bias; a number
    says nothing about it, and changes nothing.
    """
    i = sigmoid(peep(params, 0, z[0], state.c))
    c = clipped(state.c + i * tanh(z[1]), cell_clip)
    return sigmoid(peep(params, 1, z[2], c)) * tanh(c), c


def _nog(params, state, z, cell_clip):
    """No output gate (Greff et al., 2017).

        h_t = clip(tanh(c_t) W_proj)

    Blocks i, f, g; peepholes i, f.
    """
    i, f = (sigmoid(peep(params, row, z[row], state.c)) for row in (0, 1))
    c = clipped(f * state.c + i * tanh(z[2]), cell_clip)
    return tanh(c), c


def _refine(params, state, z, cell_clip):
    """A gate that refines the forget gate (Gu, Gulcehre, Paine, Hoffman & Pascanu, 2020).

        r_t = σ(z_r + p_r ⊙ c_{t-1}),   f_t = σ(z_f + p_f ⊙ c_{t-1})
        F_t = r_t ⊙ (1 − (1 − f_t)²) + (1 − r_t) ⊙ f_t²   =   f_t + f_t (1 − f_t)(2 r_t − 1)
        c_t = clip(F_t ⊙ c_{t-1} + (1 − F_t) ⊙ g_t)

    Blocks r, f, g, o; peepholes r, f, o. The bias of r starts at minus that of f. With
    ``forget_bias=initializers.uniform_gate`` this is the paper's UR-LSTM.
    """
    r, f = (sigmoid(peep(params, row, z[row], state.c)) for row in (0, 1))
    kept = r * (1 - (1 - f) ** 2) + (1 - r) * f**2
    c = clipped(kept * state.c + (1 - kept) * tanh(z[2]), cell_clip)
    return sigmoid(peep(params, 2, z[3], c)) * tanh(c), c


cifg_step, cifg, init_cifg = variant(
    "cifg", _cifg, ("-f", "g", "o"), 2, by_hand=by_hand(coupled=True)
)
nig_step, nig, init_nig = variant("nig", _nig, ("f", "g", "o"), 2)
nfg_step, nfg, init_nfg = variant("nfg", _nfg, ("i", "g", "o"), 2)
nog_step, nog, init_nog = variant("nog", _nog, ("i", "f", "g"), 2)
refine_step, refine, init_refine = variant("refine", _refine, ("-f", "f", "g", "o"))


# ---- other activations --------------------------------------------------------------------------


def activations(
    gate: str | Callable = "sigmoid",
    candidate: str | Callable = "tanh",
    output: str | Callable = "tanh",
) -> Callable:
    """The LSTM layer with other activations.

        i, f, o = gate(·),   g_t = candidate(z_g),   h_t = clip((o_t ⊙ output(c_t)) W_proj)

    Args:
      gate, candidate, output: "sigmoid", "tanh", "linear", "relu", "hard_sigmoid" clip(z/6 + 1/2,
        0, 1) (Keras 3, Flax), "hard_sigmoid_keras1" clip(z/5 + 1/2, 0, 1) (the gates of Keras 1,
        and of Keras 2 before 2.3); or a function of an array, one of a module: every new lambda
        would be compiled anew.

    Returns:
      A layer with ``lstm``'s signature, for the weights of ``init_lstm``; the same one whenever
      the activations are the same.

    Raises:
      ValueError: neither a name nor a function.
    """
    return _activated(*functions(gate=gate, candidate=candidate, output=output))[1]


def activations_step(
    gate: str | Callable = "sigmoid",
    candidate: str | Callable = "tanh",
    output: str | Callable = "tanh",
) -> Callable:
    """The step of ``activations(gate, candidate, output)``, with ``lstm_step``'s signature."""
    return _activated(*functions(gate=gate, candidate=candidate, output=output))[0]


@functools.cache
def _activated(gate: Callable, candidate: Callable, output: Callable) -> tuple[Callable, ...]:
    def equations(params, state, z, cell_clip):
        """The LSTM with other activations; see ``activations``."""
        i, f = (gate(peep(params, row, z[row], state.c)) for row in (0, 1))
        c = clipped(f * state.c + i * candidate(z[2]), cell_clip)
        return gate(peep(params, 2, z[3], c)) * output(c), c

    return variant("activations", equations)[:2]


# Without input activation function, without output activation function (Greff et al., 2017).
niaf_step, niaf, init_niaf = *_activated(sigmoid, linear, tanh), init_lstm
noaf_step, noaf, init_noaf = *_activated(sigmoid, tanh, linear), init_lstm

# ---- full gate recurrence -----------------------------------------------------------------------


class FGRParams(NamedTuple):
    """``LSTMParams``, and nine matrices between the gates.

    Attributes:
      w_x, w_h, b, peephole, w_proj: as in ``LSTMParams``.
      w_gates: [3H, 3H], from i, f, o of the step before to i, f, o.
    """

    w_x: jax.Array
    w_h: jax.Array
    b: jax.Array
    peephole: jax.Array | None
    w_proj: jax.Array | None
    w_gates: jax.Array


class FGRState(NamedTuple):
    """What one step hands to the next: ``LSTMState``'s h and c, and the gates i, f, o [B, H]."""

    h: jax.Array
    c: jax.Array
    i: jax.Array
    f: jax.Array
    o: jax.Array


def _fgr(params, state, z, cell_clip):
    """Full gate recurrence (Greff et al., 2017).

        [z_i, z_f, z_o] += [i_{t-1}, f_{t-1}, o_{t-1}] W_gates

    The rest as in ``lstm_step``. Gates before the first step are 0, and noise leaves them alone.
    ``w_gates`` starts by the law of ``w_h``.
    """
    i, f = (sigmoid(peep(params, row, z[row], state.c)) for row in (0, 1))
    c = clipped(f * state.c + i * tanh(z[2]), cell_clip)
    o = sigmoid(peep(params, 2, z[3], c))
    return o * tanh(c), c, i, f, o


def _with_gates(params, state, x_t, x_mask, h_mask, z):
    size = 3 * z[0].shape[-1]
    checks.shape("params.w_gates", params.w_gates, (size, size))
    gates = jnp.concatenate(state[2:], -1)
    of_gates = product(gates, params.w_gates, checks.dtypes(x_t, params))
    of_i, of_f, of_o = jnp.split(of_gates, 3, -1)
    return z[0] + of_i, z[1] + of_f, z[2], z[3] + of_o


def _with_gate_kernels(key: jax.Array, params: LSTMParams, init: str) -> FGRParams:
    (inputs, _), hidden, dtype = params.w_x.shape, params.b.shape[0] // 4, params.b.dtype
    return FGRParams(*params, gated_kernels(init, key, inputs, 3 * hidden, hidden, 3, dtype)[1])


_kinds = {"kind": FGRParams, "state_kind": FGRState}
fgr_step, fgr, init_fgr = variant("fgr", _fgr, sums=_with_gates, more=_with_gate_kernels, **_kinds)

# ---- layer normalisation ------------------------------------------------------------------------


class LayerNormParams(NamedTuple):
    """``LSTMParams``, and the gains and the bias of the three normalisations.

    Attributes:
      w_x, w_h, b, peephole, w_proj: as in ``LSTMParams``.
      gain_x, gain_h: [4H] gains of x_t W_x and of h_{t-1} W_h.
      gain_c, bias_c: [H] gain and bias of c_t on its way to the output.
    """

    w_x: jax.Array
    w_h: jax.Array
    b: jax.Array
    peephole: jax.Array | None
    w_proj: jax.Array | None
    gain_x: jax.Array
    gain_h: jax.Array
    gain_c: jax.Array
    bias_c: jax.Array


def _layer_norm(params, state, z, cell_clip):
    """Layer normalisation (Ba, Kiros & Hinton, 2016).

        LN(a; γ) = γ ⊙ (a − mean(a)) / √(var(a) + ε),   ε = 1e-5, over all of a
        z_t = LN(x_t W_x; γ_x) + LN(h_{t-1} W_h; γ_h) + b      one LN over the four blocks together
        h_t = clip((o_t ⊙ tanh(LN(c_t; γ_c) + β_c)) W_proj)

    The rest as in ``lstm_step``: c itself, and what peepholes read, is not normalised. The paper's
    β₁ and β₂ would add to b, and are left to it. Gains start at 1, β_c at 0.
    """
    i, f = (sigmoid(peep(params, row, z[row], state.c)) for row in (0, 1))
    c = clipped(f * state.c + i * tanh(z[2]), cell_clip)
    checks.shape("params.bias_c", params.bias_c, c.shape[-1:])
    to_output = _normalised("gain_c", params, c) + _rows(params.bias_c, c)
    return sigmoid(peep(params, 2, z[3], c)) * tanh(to_output), c


def normalised_sums(params, state, x_t, x_mask, h_mask, z):
    """The blocks of ``layer_norm``'s gates, [..., H] each, in the place of the plain sums z."""
    kinds = checks.dtypes(x_t, params)
    from_x = _normalised("gain_x", params, product(x_t, params.w_x, kinds, x_mask))
    from_h = _normalised("gain_h", params, product(state.h, params.w_h, kinds, h_mask))
    return jnp.split(from_x + from_h + _rows(params.b, from_x), 4, -1)


def _normalised(gain: str, params: LayerNormParams, a: jax.Array) -> jax.Array:
    weights = getattr(params, gain)
    checks.shape(f"params.{gain}", weights, a.shape[-1:])
    a = a - jnp.mean(a, -1, keepdims=True)
    return _rows(weights, a) * a * jax.lax.rsqrt(jnp.mean(a**2, -1, keepdims=True) + 1e-5)


def _rows(v: jax.Array, like: jax.Array) -> jax.Array:
    return jnp.broadcast_to(v.astype(like.dtype), like.shape)


def _with_gains(key: jax.Array, params: LSTMParams, init: str) -> LayerNormParams:
    of_x, of_h = (jnp.ones_like(params.b) for _ in range(2))  # one could not be donated twice
    of_c = of_x[: params.b.shape[0] // 4]
    return LayerNormParams(*params, of_x, of_h, of_c, jnp.zeros_like(of_c))


layer_norm_step, layer_norm, init_layer_norm = variant(
    "layer_norm", _layer_norm, sums=normalised_sums, more=_with_gains, kind=LayerNormParams
)

# ---- learned initial state ----------------------------------------------------------------------


class LearnedState(NamedTuple):
    """The weights of a layer whose initial state is learned.

    Attributes:
      params: the layer's own.
      state: its state without the batch axis: ``LSTMState(h [P], c [H])`` for the LSTM.
    """

    params: Any
    state: Any


def learned_state(layer: Callable) -> Callable:
    """A layer that starts from a learned state.

        state_0 = params.state for every row,   and again wherever resets say so

    Args:
      layer: ``lstm``, any other cell's layer, or a ``functools.partial`` of one.

    Returns:
      ``layer(params, xs, state=None, **options)`` with ``LearnedState`` weights. A ``state`` or a
      ``reset_to`` that is given goes before the learned one.

    Raises:
      ValueError: ``layer`` is no function. The layer: ``params`` is no ``LearnedState``, its state
        has a batch axis or does not fit.
    """
    checks.function("layer", layer)

    def learned(params, xs, state=None, *, resets=None, reset_to=None, **options):
        if not isinstance(params, LearnedState):
            got = type(params).__name__
            raise ValueError(f"params: got {got}, expected LearnedState(params, state)")
        check_inputs(xs, options.get("truncation"))
        for path, leaf in jax.tree_util.tree_leaves_with_path(params.state):
            checks.shape(f"params.state{jax.tree_util.keystr(path)}", leaf, ("H",))
        rows = jax.tree.map(lambda leaf: jnp.tile(leaf, (xs.shape[-2], 1)), params.state)
        resets = checks.option(layer, "resets") if resets is None else resets
        reset_to = checks.option(layer, "reset_to") if reset_to is None else reset_to
        if resets is not None:
            options |= {"resets": resets, "reset_to": rows if reset_to is None else reset_to}
        return layer(params.params, xs, rows if state is None else state, **options)

    return learned


_STATES = {LSTMParams: LSTMState, GRUParams: GRUState, RNNParams: RNNState}
_STATES |= {FGRParams: FGRState, LayerNormParams: LSTMState}


def init_learned_state(params: Any) -> LearnedState:
    """A learned state for drawn weights, zero at the start.

    Args:
      params: the weights of any cell of lstmjax.

    Returns:
      ``LearnedState(params, state)``, the state in the dtype of ``params.w_h``.

    Raises:
      ValueError: the weights of no such cell.
    """
    kind = _STATES.get(type(params))
    if kind is None:
        known = ", ".join(kind.__name__ for kind in _STATES)
        raise ValueError(f"params: got {type(params).__name__}, expected one of {known}")
    proj = params.w_h.shape[0]
    w_proj = getattr(params, "w_proj", None)
    sizes = [proj] + [proj if w_proj is None else w_proj.shape[0]] * (len(kind._fields) - 1)
    return LearnedState(params, kind(*(jnp.zeros(size, params.w_h.dtype) for size in sizes)))


# ---- all of them --------------------------------------------------------------------------------


class Variant(NamedTuple):
    """A cell: what its weights are, how they are drawn, and its layer."""

    params: type
    init: Callable
    layer: Callable


VARIANTS = {
    "lstm": Variant(LSTMParams, init_lstm, lstm),
    "peephole": Variant(LSTMParams, functools.partial(init_lstm, peephole=True), lstm),
    "cifg": Variant(LSTMParams, init_cifg, cifg),
    "nig": Variant(LSTMParams, init_nig, nig),
    "nfg": Variant(LSTMParams, init_nfg, nfg),
    "nog": Variant(LSTMParams, init_nog, nog),
    "niaf": Variant(LSTMParams, init_niaf, niaf),
    "noaf": Variant(LSTMParams, init_noaf, noaf),
    "fgr": Variant(FGRParams, init_fgr, fgr),
    "layer_norm": Variant(LayerNormParams, init_layer_norm, layer_norm),
    "refine": Variant(LSTMParams, init_refine, refine),
    "hard_sigmoid": Variant(LSTMParams, init_lstm, activations("hard_sigmoid")),
    "keras1": Variant(LSTMParams, init_lstm, activations("hard_sigmoid_keras1")),
}
