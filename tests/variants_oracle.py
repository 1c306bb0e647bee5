"""The variants of the LSTM once more, in NumPy: loops over batch, time and unit, as in oracle.py.

One formula for all of them, with the exceptions of each: i, f, g, o from the blocks that there are,
c = f c + i g, h = o tanh(c). Runs on complex numbers too, for ``oracle.gradients``.
"""

import numpy as np
from oracle import clip, sigmoid

BLOCKS = {"cifg": "igo", "nig": "fgo", "nfg": "igo", "nog": "ifg", "refine": "rfgo"}
PEEPHOLES = {"cifg": "io", "nig": "fo", "nfg": "io", "nog": "if", "refine": "rfo"}


def bounded(x, low, high):
    """x within low … high; outside, the derivative is 0."""
    return low if x.real < low else high if x.real > high else x


def identity(x):
    return x


# (gate, candidate, output) where they are not (sigmoid, tanh, tanh)
FUNCTIONS = {
    "niaf": (sigmoid, identity, np.tanh),
    "noaf": (sigmoid, np.tanh, identity),
    "hard_sigmoid": (lambda x: bounded(x + 3.0, 0.0, 6.0) / 6.0, np.tanh, np.tanh),
    "keras1": (lambda x: bounded(0.2 * x + 0.5, 0.0, 1.0), np.tanh, np.tanh),
    "mixed": (
        lambda x: bounded(x + 3.0, 0.0, 6.0) / 6.0,
        lambda x: x if x.real > 0 else 0.0,
        identity,
    ),
}


def normalised(a, gain):
    mean = sum(a) / len(a)
    variance = sum((a - mean) ** 2) / len(a)
    return gain * (a - mean) / np.sqrt(variance + 1e-5)


def step(name, params, state, x_t, x_masks, h_masks, cell_clip=None, proj_clip=None):
    """One step of one row: x_t [D], state (h [P], c [H], …), masks [G, D] and [G, P]."""
    h_tm1, c_tm1, *gates_tm1 = state
    hidden, blocks = len(c_tm1), BLOCKS.get(name, "ifgo")
    columns = range(len(blocks) * hidden)
    of_x = np.array([(x_t * x_masks[j // hidden]) @ params.w_x[:, j] for j in columns])
    of_h = np.array([(h_tm1 * h_masks[j // hidden]) @ params.w_h[:, j] for j in columns])
    if name == "layer_norm":
        of_x, of_h = normalised(of_x, params.gain_x), normalised(of_h, params.gain_h)
    sums = of_x + of_h + params.b
    z = {gate: sums[n * hidden : (n + 1) * hidden] for n, gate in enumerate(blocks)}
    if name == "fgr":
        before = np.concatenate(gates_tm1)
        for n, gate in enumerate("ifo"):
            into = params.w_gates[:, n * hidden : (n + 1) * hidden]
            z[gate] = z[gate] + np.array([before @ into[:, k] for k in range(hidden)])
    on, candidate, output = FUNCTIONS.get(name, (sigmoid, np.tanh, np.tanh))
    rows = {gate: n for n, gate in enumerate(PEEPHOLES.get(name, "ifo"))}

    def gate(which, k, c):
        seen = 0.0 if params.peephole is None else params.peephole[rows[which], k] * c[k]
        return on(z[which][k] + seen)

    c_t, o_t = np.zeros_like(sums[:hidden]), np.ones_like(sums[:hidden])
    i_t, f_t = np.ones_like(c_t), np.ones_like(c_t)
    for k in range(hidden):
        if "i" in blocks:
            i_t[k] = gate("i", k, c_tm1)
        if "f" in blocks:
            f_t[k] = gate("f", k, c_tm1)
        if name == "cifg":
            f_t[k] = 1.0 - i_t[k]
        if name == "refine":
            f, r = f_t[k], gate("r", k, c_tm1)
            f_t[k] = f + f * (1.0 - f) * (2.0 * r - 1.0)
            i_t[k] = 1.0 - f_t[k]
        c_t[k] = clip(f_t[k] * c_tm1[k] + i_t[k] * candidate(z["g"][k]), cell_clip)
    for k in range(hidden):
        if "o" in blocks:
            o_t[k] = gate("o", k, c_t)
    seen = normalised(c_t, params.gain_c) + params.bias_c if name == "layer_norm" else c_t
    h_t = np.array([o_t[k] * output(seen[k]) for k in range(hidden)])
    if params.w_proj is not None:
        width = params.w_proj.shape[1]
        h_t = np.array([clip(h_t @ params.w_proj[:, p], proj_clip) for p in range(width)])
    return (h_t, c_t, i_t, f_t, o_t) if name == "fgr" else (h_t, c_t)


def layer(name, params, xs, state, *, mask=None, resets=None, reset_to=None, reverse=False,
          noise=None, **clips):  # fmt: skip
    """xs [T, B, D], state (h [B, P], c [B, H], …) -> (final state, hs [T, B, P])."""
    steps, batch, inputs = xs.shape
    parts = [part for part in params if part is not None]
    dtype = np.result_type(*parts, xs, *state, *(reset_to or ()))
    finals = [np.array(part, dtype) for part in state]
    hs = np.zeros((steps, *finals[0].shape), dtype)
    gates, proj = len(BLOCKS.get(name, "ifgo")), finals[0].shape[1]
    x_masks = np.ones((gates, batch, inputs)) if noise is None else noise.x
    h_masks = np.ones((gates, batch, proj)) if noise is None else noise.h
    for b in range(batch):
        for t in reversed(range(steps)) if reverse else range(steps):
            if mask is not None and not mask[t, b]:
                continue
            old = [final[b].copy() for final in finals]
            if resets is not None and resets[t, b]:
                old = [np.zeros_like(v) if reset_to is None else v[b] for v in reset_to or old]
            seen = old if noise is None else [old[0] * noise.state[t, b], *old[1:]]
            masks = x_masks[:, b], h_masks[:, b]
            new = list(step(name, params, seen, xs[t, b], *masks, **clips))
            if noise is not None:
                new[0] = np.where(noise.zoneout_h[t, b], old[0], new[0])
                new[1] = np.where(noise.zoneout_c[t, b], old[1], new[1])
            for final, part in zip(finals, new, strict=True):
                final[b] = part
            hs[t, b] = new[0]
    return tuple(finals), hs
