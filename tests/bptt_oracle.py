"""Truncated backpropagation through time by its definition: each error on its own, cut at lo(t).

Once for the plain LSTM in NumPy, and once for any network, as a run whose state is a constant
before step lo(t).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
from problems import QUICK

from lstmjax import GRUParams, GRUState, LSTMParams, LSTMState, RNNParams, RNNState, gru, lstm, rnn
from lstmjax.variants import LayerNormParams, cifg, layer_norm

B, D, H, P = 4, 3, 6, 2


def lo(t, k1, k2):
    """The first step that the error of step t contributes to."""
    return max(0, (t // k1 + 1) * k1 - k2)


def normal(seed):
    rng = np.random.default_rng(seed)
    return lambda *shape: rng.normal(size=shape)


# ---- the plain LSTM in NumPy: one reverse pass for every error ----------------------------------


def numpy_gradients(params, xs, state, weights, k1, k2):
    """Of Σ weights·(state, hs) in params, xs and state."""
    w_x, w_h, b = params[:3]
    (h, c), steps, kept = state, len(xs), []
    for x in xs:
        i, f, g, o = np.split(x @ w_x + h @ w_h + b, 4, -1)
        i, f, g, o = oracle.sigmoid(i), oracle.sigmoid(f), np.tanh(g), oracle.sigmoid(o)
        new = f * c + i * g
        kept.append((x, h, c, i, f, g, o, np.tanh(new)))
        h, c = o * np.tanh(new), new
    d_w_x, d_w_h, d_b, d_xs = (np.zeros_like(a) for a in (w_x, w_h, b, xs))
    d_state = [np.zeros_like(part) for part in state]
    for t in range(steps):
        dh, dc = weights[1][t], np.zeros_like(c)
        if t == steps - 1:
            dh, dc = dh + weights[0].h, dc + weights[0].c
        for tau in range(t, lo(t, k1, k2) - 1, -1):
            x, h, c, i, f, g, o, tanh_c = kept[tau]
            dc = dc + dh * o * (1 - tanh_c**2)
            dz = (dc * g * i * (1 - i), dc * c * f * (1 - f), dc * i * (1 - g**2))
            dz = np.concatenate([*dz, dh * tanh_c * o * (1 - o)], -1)
            d_w_x, d_w_h, d_b = d_w_x + x.T @ dz, d_w_h + h.T @ dz, d_b + dz.sum(0)
            d_xs[tau] += dz @ w_x.T
            dh, dc = dz @ w_h.T, dc * f
        if lo(t, k1, k2) == 0:
            d_state[0] += dh
            d_state[1] += dc
    return LSTMParams(d_w_x, d_w_h, d_b), d_xs, LSTMState(*d_state)


def plain(steps, seed=80, batch=B, hidden=H):
    of = normal(seed)
    params = LSTMParams(of(D, 4 * hidden), of(hidden, 4 * hidden), of(4 * hidden))
    state, final = (LSTMState(of(batch, hidden), of(batch, hidden)) for _ in range(2))
    return (params, of(steps, batch, D), state), (final, of(steps, batch, hidden))


def gradients(layer, arguments, weights):
    """Of Σ weights·outputs in every one of ``arguments``, as one program."""

    def loss(*arguments):
        return oracle.weighted_sum(weights, layer(*arguments))

    of = jax.grad(loss, tuple(range(len(arguments))))
    return jax.jit(of, compiler_options=QUICK)(*arguments)


# ---- the definition, for any network ------------------------------------------------------------


def defined(step, window, arguments, state, weights, reverse=False):
    """The gradients of Σ weights·outputs in ``arguments`` and in ``state``, by the definition.

    ``step(arguments, state, place) -> (state, h [1, …])`` is the whole network at one place, and
    ``weights`` are those of the final state and of hs [T, …].
    """
    of_final, of_hs = weights
    steps = len(of_hs)
    places = np.arange(steps)[::-1] if reverse else np.arange(steps)

    def error(arguments, state, t, start):
        def body(state, at):
            now, place = at
            cut = (now == start) & (start > 0)
            state = jax.tree.map(lambda a: jnp.where(cut, jax.lax.stop_gradient(a), a), state)
            state, h = step(arguments, state, place)
            of_h = jax.lax.dynamic_slice_in_dim(jnp.asarray(of_hs), place, 1)
            return state, jnp.where(now == t, jnp.sum(of_h * h), 0.0)

        final, errors = jax.lax.scan(body, state, (np.arange(steps), places))
        last = oracle.weighted_sum(of_final, final)  # an error of the last step's
        return jnp.sum(errors) + jnp.where(t == steps - 1, last, 0.0)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def all_errors(arguments, state, starts):
        of = jax.vmap(jax.grad(error, (0, 1)), (None, None, 0, 0))
        each = of(arguments, state, np.arange(steps), starts)
        return jax.tree.map(lambda a: jnp.sum(a, 0), each)

    return all_errors(arguments, state, np.array([lo(t, *window) for t in range(steps)]))


def at(place, tree):
    """Arrays [T, …] at one place, [1, …]."""
    return jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(jnp.asarray(a), place, 1), tree)


CELLS = {
    "lstm": functools.partial(lstm, cell_clip=0.8, proj_clip=0.6),
    "cifg": functools.partial(cifg, cell_clip=0.8, proj_clip=0.6),
    "gru after": gru,
    "gru before": functools.partial(gru, reset_after=False),
    **{f"rnn {name}": functools.partial(rnn, activation=name) for name in ("tanh", "relu")},
    "rnn linear": functools.partial(rnn, activation="linear"),
    "layer_norm": layer_norm,
}


def cell(name, inputs=D, seed=81):
    """``(layer, params, states(n))`` of a cell with everything that it has."""
    of = normal(seed)
    kind = name.split()[0]
    if kind == "rnn":
        params = RNNParams(of(inputs, H), 0.5 * of(H, H), of(H))
    elif kind == "gru":
        kernels = of(inputs, 3 * H), of(H, 3 * H), of(3 * H)
        params = GRUParams(*kernels, of(H) if name == "gru after" else None)
    else:
        blocks, rows = (3, 2) if kind == "cifg" else (4, 3)
        kernels = of(inputs, blocks * H), of(P, blocks * H), of(blocks * H)
        params = LSTMParams(*kernels, of(rows, H), of(H, P))
    if kind == "layer_norm":
        params = LayerNormParams(*params, of(4 * H), of(4 * H), of(H), of(H))

    def state():
        if kind in ("rnn", "gru"):
            return (RNNState if kind == "rnn" else GRUState)(of(B, H))
        return LSTMState(of(B, P), of(B, H))

    return CELLS[name], params, [state() for _ in range(3)], of
