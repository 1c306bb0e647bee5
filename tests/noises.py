"""Noise for the tests: every cell, all that can be dropped, and the loop that is given it."""

import functools

import jax
import numpy as np
import oracle
from oracle import sigmoid
from problems import QUICK, problem

from lstmjax import recurrent_noise

T, B, D = 6, 4, 2
CELLS = ["lstm", "rnn", "gru", "gru, reset before"]
DROPOUTS = {"input_dropout": 0.3, "recurrent_dropout": 0.4, "state_dropout": 0.25}
ZONEOUTS = {"zoneout_h": 0.35, "zoneout_c": 0.6}

# Random numbers take long to compile, and need no optimising.
FAST = {"compiler_options": QUICK}


def cell_problem(name, steps=T, inputs=D, seed=60):
    """``problems.problem``, with the other GRU too; the oracle's layer is of no use here."""
    found = problem(name.split(",")[0], steps, B, inputs, seed)
    if "," not in name:
        return found
    before = functools.partial(found.layer, reset_after=False)
    return found._replace(layer=before, params=found.params._replace(b_n=None))


@functools.partial(jax.jit, **FAST)
def draw(key, params, xs):
    """Everything that the cell knows, at the rates above."""
    zoneouts = {k: p for k, p in ZONEOUTS.items() if k == "zoneout_h" or hasattr(params, "w_proj")}
    return recurrent_noise(key, params, xs, **DROPOUTS, **zoneouts)


def assert_share(drawn, expected):
    """The share of independent draws that came out true, within 4.5 standard deviations."""
    deviation = np.sqrt(expected * (1 - expected) / drawn.size)
    assert abs(drawn.mean() - expected) < 4.5 * deviation, (drawn.mean(), expected)


def assert_each_on_its_own(drawn, expected):
    """Also beside its neighbours along every axis."""
    assert_share(drawn, expected)
    for axis in range(drawn.ndim):
        if drawn.shape[axis] > 1:
            both = np.delete(drawn, 0, axis) & np.delete(drawn, -1, axis)
            assert_share(both, expected**2)


# --- the loop: a row and a step at a time --------------------------------------------------------


def products(x, w, masks, gates):
    """x W for each gate, x times that gate's mask."""
    blocks = np.split(w, gates, axis=1)
    return [(x if masks is None else x * masks[k]) @ blocks[k] for k in range(gates)]


def clip(x, bound):
    return np.array([oracle.clip(value, bound) for value in x])


def slow_lstm(params, x, h, c, x_mask, h_mask, cell_clip=0.8, proj_clip=0.6):
    a, r, b = products(x, params.w_x, x_mask, 4), products(h, params.w_h, h_mask, 4), params.b
    z = [a[k] + r[k] + np.split(b, 4)[k] for k in range(4)]
    p = params.peephole
    new_c = clip(sigmoid(z[1] + p[1] * c) * c + sigmoid(z[0] + p[0] * c) * np.tanh(z[2]), cell_clip)
    m = sigmoid(z[3] + p[2] * new_c) * np.tanh(new_c)
    return clip(m @ params.w_proj, proj_clip), new_c


def slow_rnn(params, x, h, x_mask, h_mask):
    (a,), (r,) = products(x, params.w_x, x_mask, 1), products(h, params.w_h, h_mask, 1)
    return (np.tanh(a + r + params.b),)


def slow_gru(params, x, h, x_mask, h_mask):
    a, r, b = products(x, params.w_x, x_mask, 3), products(h, params.w_h, h_mask, 3), params.b
    b = np.split(b, 3)
    reset, update = (sigmoid(a[k] + r[k] + b[k]) for k in (0, 1))
    if params.b_n is None:
        of_h = products(reset * h, params.w_h, h_mask, 3)[2]
    else:
        of_h = reset * (r[2] + params.b_n)
    return ((1 - update) * np.tanh(a[2] + b[2] + of_h) + update * h,)


SLOW_STEPS = dict(zip(CELLS, (slow_lstm, slow_rnn, slow_gru, slow_gru), strict=True))


def slow(name, params, xs, state, reset_to, noise, valid, resets, reverse):
    """The layer with everything given as arrays: ((h, ...), hs)."""
    finals = [np.array(part, complex) for part in state]
    hs = np.zeros((len(xs), *finals[0].shape), complex)
    zoneouts = [noise.zoneout_h, noise.zoneout_c][: len(finals)]
    for t in reversed(range(len(xs))) if reverse else range(len(xs)):
        for b in range(xs.shape[1]):
            if not valid[t, b]:
                continue
            old = [part[b] for part in (reset_to if resets[t, b] else finals)]
            read = list(old)
            if noise.state is not None:
                read[0] = read[0] * noise.state[t, b]
            masks = (None if m is None else m[:, b] for m in (noise.x, noise.h))
            for n, part in enumerate(SLOW_STEPS[name](params, xs[t, b], *read, *masks)):
                keep = zoneouts[n]
                if keep is None:
                    finals[n][b] = part
                elif np.ndim(keep) == 0:
                    finals[n][b] = keep * old[n] + (1 - keep) * part
                else:
                    finals[n][b] = np.where(keep[t, b], old[n], part)
            hs[t, b] = finals[0][b]
    return tuple(finals), hs
