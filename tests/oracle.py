"""The recurrences once more, in NumPy and float64: slow, obvious and without JAX.

Every function loops over batch, time and unit and uses nothing of lstmjax, so that an error there
is not repeated here. Parameters are any object with the field names of ``LSTMParams``,
``RNNParams`` or ``GRUParams`` holding NumPy arrays; a state is a tuple of arrays ``[B, ·]``.

Derivatives are by the complex step (Squire and Trapp 1998, "Using complex variables to estimate
derivatives of real functions"): ∂f/∂x ≈ Im f(x + iε)/ε with ε = 1e-30. A central difference
subtracts two nearly equal numbers and so keeps 1e-10 at best; here nothing is subtracted, the
truncation error is ε², and the derivative is exact to rounding. For this the functions below run
on complex numbers too, and kinks (clip, relu) look at the real part only.
"""

import numpy as np

COMPLEX_STEP = 1e-30


def sigmoid(x):
    return 1.0 / (1.0 + np.exp(-x))


def clip(x, bound):
    """x held within ±bound; a clipped value has derivative 0."""
    if bound is None or abs(x.real) <= bound:
        return x
    return bound if x.real > 0 else -bound


ACTIVATIONS = {
    "tanh": np.tanh,
    "relu": lambda x: x if x.real > 0 else 0.0,
    "linear": lambda x: x,
}


# --- one step of one row: x_t [D], h_tm1 [H] -----------------------------------------------------


def lstm_step(params, x_t, h_tm1, c_tm1, cell_clip=None, proj_clip=None):
    """TF1's order: peepholes of i and f, clip c, peephole of o, project, clip the projection."""
    hidden = len(c_tm1)
    peephole = np.zeros((3, hidden)) if params.peephole is None else params.peephole
    m_t = np.zeros(hidden, _dtype(params, x_t, h_tm1, c_tm1))
    c_t = np.zeros_like(m_t)
    for k in range(hidden):
        z_i, z_f, z_g, z_o = (
            x_t @ params.w_x[:, j] + h_tm1 @ params.w_h[:, j] + params.b[j]
            for j in (k, hidden + k, 2 * hidden + k, 3 * hidden + k)
        )
        i = sigmoid(z_i + peephole[0, k] * c_tm1[k])
        f = sigmoid(z_f + peephole[1, k] * c_tm1[k])
        c_t[k] = clip(f * c_tm1[k] + i * np.tanh(z_g), cell_clip)
        o = sigmoid(z_o + peephole[2, k] * c_t[k])
        m_t[k] = o * np.tanh(c_t[k])
    if params.w_proj is None:
        return m_t, c_t
    h_t = np.zeros(params.w_proj.shape[1], m_t.dtype)
    for p in range(len(h_t)):
        h_t[p] = clip(m_t @ params.w_proj[:, p], proj_clip)
    return h_t, c_t


def rnn_step(params, x_t, h_tm1, activation="tanh"):
    h_t = np.zeros(len(h_tm1), _dtype(params, x_t, h_tm1))
    for k in range(len(h_tm1)):
        z = x_t @ params.w_x[:, k] + h_tm1 @ params.w_h[:, k]
        if params.b is not None:
            z = z + params.b[k]
        h_t[k] = ACTIVATIONS[activation](z)
    return (h_t,)


def gru_step(params, x_t, h_tm1, reset_after=True):
    hidden = len(h_tm1)
    b_n = np.zeros(hidden) if params.b_n is None else params.b_n
    dtype = _dtype(params, x_t, h_tm1)
    r, z, h_t = np.zeros(hidden, dtype), np.zeros(hidden, dtype), np.zeros(hidden, dtype)
    for k in range(hidden):
        for gate, j in ((r, k), (z, hidden + k)):
            gate[k] = sigmoid(x_t @ params.w_x[:, j] + h_tm1 @ params.w_h[:, j] + params.b[j])
    for k in range(hidden):
        j = 2 * hidden + k
        if reset_after:
            from_h = r[k] * (h_tm1 @ params.w_h[:, j] + b_n[k])
        else:
            from_h = (r * h_tm1) @ params.w_h[:, j]
        n = np.tanh(x_t @ params.w_x[:, j] + params.b[j] + from_h)
        h_t[k] = (1.0 - z[k]) * n + z[k] * h_tm1[k]
    return (h_t,)


# --- a step over time ----------------------------------------------------------------------------


def lstm(params, xs, state, *, cell_clip=None, proj_clip=None, **over_time):
    """xs [T, B, D], state (h [B, P], c [B, H]) -> ((h, c), hs [T, B, P])."""
    return _run(lstm_step, params, xs, state, (cell_clip, proj_clip), **over_time)


def rnn(params, xs, state, *, activation="tanh", **over_time):
    """xs [T, B, D], state (h [B, H],) -> ((h,), hs [T, B, H])."""
    return _run(rnn_step, params, xs, state, (activation,), **over_time)


def gru(params, xs, state, *, reset_after=True, **over_time):
    """xs [T, B, D], state (h [B, H],) -> ((h,), hs [T, B, H])."""
    return _run(gru_step, params, xs, state, (reset_after,), **over_time)


def _run(step, params, xs, state, options, *, mask=None, lengths=None, resets=None, reverse=False):
    steps, batch = xs.shape[:2]
    dtype = _dtype(params, xs, *state)
    finals = [np.array(part, dtype) for part in state]
    hs = np.zeros((steps, *finals[0].shape), dtype)
    for b in range(batch):
        for t in reversed(range(steps)) if reverse else range(steps):
            if mask is not None and not mask[t, b]:
                continue
            if lengths is not None and t >= lengths[b]:
                continue
            row = [final[b] for final in finals]
            if resets is not None and resets[t, b]:
                row = [np.zeros_like(part) for part in row]
            row = step(params, xs[t, b], *row, *options)
            for final, part in zip(finals, row, strict=True):
                final[b] = part
            hs[t, b] = row[0]
    return tuple(finals), hs


def tf1_cell_sequence(kernel, xs, *, bias=0.0, forget_bias=1.0):
    """The LSTM as TensorFlow 1 writes it, unbatched: xs, a list of [D], -> a list of outputs [H].

    One kernel [D + H, 4H] for [x, m], gates in the order i, j, f, o, zero initial state, and a
    forget bias added at run time. The source's own cell has no bias; ``bias`` [4H] adds one.
    """
    hidden = kernel.shape[1] // 4
    c, m, outputs = np.zeros(hidden), np.zeros(hidden), []
    for x in xs:
        i, j, f, o = np.split(np.concatenate([x, m]) @ kernel + bias, 4)
        c = sigmoid(f + forget_bias) * c + sigmoid(i) * np.tanh(j)
        m = sigmoid(o) * np.tanh(c)
        outputs.append(m)
    return outputs


# --- derivatives and random values ---------------------------------------------------------------


def gradients(fun, *trees):
    """∂fun/∂every entry of (nested) tuples or dicts of arrays, ``trees``, in the same structure."""
    trees = [tree_map(lambda leaf: np.array(leaf, np.complex128), tree) for tree in trees]

    def gradient(leaf):
        out = np.zeros(leaf.shape)
        for index in np.ndindex(leaf.shape):
            value = leaf[index]
            leaf[index] = value + 1j * COMPLEX_STEP
            out[index] = np.imag(fun(*trees)) / COMPLEX_STEP
            leaf[index] = value
        return out

    return tuple(tree_map(gradient, tree) for tree in trees)


def weighted_sum(weights, values):
    """Σ weights·values over two (nested) tuples of the same structure: a loss that sees all."""
    if isinstance(weights, tuple):
        return sum(weighted_sum(w, v) for w, v in zip(weights, values, strict=True))
    return np.sum(weights * values)


def tree_map(fun, tree):
    """``fun`` on every array of nested (named) tuples and dicts; None stays None."""
    if tree is None:
        return None
    if isinstance(tree, dict):
        return {name: tree_map(fun, part) for name, part in tree.items()}
    if isinstance(tree, tuple):
        parts = [tree_map(fun, part) for part in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)
    return fun(tree)


def _dtype(params, *arrays):
    return np.result_type(*(part for part in params if part is not None), *arrays)


def assert_close(got, want, tolerance):
    """Same structure, same shapes, and |got − want| ≤ tolerance·(1 + |want|) everywhere."""
    if want is None:
        assert got is None
        return
    if isinstance(want, tuple):
        for part, wanted in zip(got, want, strict=True):
            assert_close(part, wanted, tolerance)
        return
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, (got.shape, want.shape)
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)
