"""Every cell with random numbers, for the tests of what all cells share."""

import functools
import os
from typing import Any, NamedTuple

import jax
import numpy as np
import oracle

from lstmjax import GRUParams, GRUState, LSTMParams, LSTMState, RNNParams, RNNState, gru, lstm, rnn

T, B, D, H, P = 7, 4, 3, 5, 2
NAMES = ["lstm", "rnn", "gru"]

# Compiler options: in most tests compiling takes nearly all the time, and running none.
QUICK = {"xla_backend_optimization_level": 0, "xla_cpu_parallel_codegen_split_count": 1}
OPTIMISED = {"xla_backend_optimization_level": 3}
if jax.__version_info__ < (0, 11):  # later ones do not know it; it compiles three times as fast
    QUICK["xla_cpu_use_fusion_emitters"] = False
    OPTIMISED["xla_cpu_use_fusion_emitters"] = True
QUICK_FLAGS = " ".join(f"--{name}={str(value).lower()}" for name, value in QUICK.items())


def as_users_do():
    """The environment of a process in which XLA optimises, as it does by default."""
    flags = os.environ.get("XLA_FLAGS", "").replace(QUICK_FLAGS, "").strip()
    return {**os.environ, "XLA_FLAGS": flags}


class Problem(NamedTuple):
    """A cell with random numbers: the layer, the oracle's, and what they are run on."""

    layer: Any
    oracle_layer: Any
    params: Any
    xs: np.ndarray
    state: Any
    weights: tuple  # of a loss on (state, hs)


def problem(name, steps=T, batch=B, inputs=D, seed=60):
    """The LSTM with everything it has: peepholes, projection and both clips."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.normal(size=shape)  # noqa: E731
    xs = normal(steps, batch, inputs)
    if name == "lstm":
        clips = {"cell_clip": 0.8, "proj_clip": 0.6}
        layer, slow = functools.partial(lstm, **clips), functools.partial(oracle.lstm, **clips)
        of_x, of_h = normal(inputs, 4 * H), normal(P, 4 * H)
        params = LSTMParams(of_x, of_h, normal(4 * H), normal(3, H), normal(H, P))
        state, final = (LSTMState(normal(batch, P), normal(batch, H)) for _ in range(2))
    elif name == "rnn":
        layer, slow = rnn, oracle.rnn
        params = RNNParams(normal(inputs, H), normal(H, H), normal(H))
        state, final = (RNNState(normal(batch, H)) for _ in range(2))
    else:
        layer, slow = gru, oracle.gru
        params = GRUParams(normal(inputs, 3 * H), normal(H, 3 * H), normal(3 * H), normal(H))
        state, final = (GRUState(normal(batch, H)) for _ in range(2))
    return Problem(layer, slow, params, xs, state, (final, normal(steps, *state.h.shape)))


def holes_and_resets():
    """A mask with holes, padding left and right, and an empty row; resets in- and outside it."""
    mask = np.array(
        [[1, 1, 0, 1, 1, 0, 1], [0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0], [0] * 7], bool
    ).T
    resets = np.array(
        [
            [0, 0, 1, 1, 0, 0, 0],
            [1, 0, 0, 0, 1, 1, 0],
            [1, 0, 0, 0, 1, 0, 0],
            [0, 1, 0, 0, 0, 1, 0],
        ],
        bool,
    ).T
    return mask, resets
