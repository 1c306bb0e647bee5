"""How other frameworks lay out the weights of one LSTM layer, and the way there and back.

    framework           entries of one layer                                       gates
    tf1                 kernel [D+P, 4H], bias [4H], w_i_diag, w_f_diag,           i, j, f, o
                        w_o_diag [H], projection/kernel [H, P]
    keras               kernel [D, 4H], recurrent_kernel [H, 4H], bias [4H]        i, f, c, o
                        (Keras 1: W, U, b, or W_i, U_i, b_i, W_c, … per gate)
    torch               weight_ih_l0 [4H, D], weight_hh_l0 [4H, P],                i, f, g, o
                        bias_ih_l0, bias_hh_l0 [4H], weight_hr_l0 [P, H]
    flax_linen          ii, if, ig, io: kernel [D, H];                             by name
                        hi, hf, hg, ho: kernel [H, H], bias [H]
    flax_nnx            the same, with if_ for if                                  by name
    flax_nnx_optimized  dense_i: kernel [D, 4H]; dense_h: kernel [H, 4H],          i, f, g, o
                        bias [4H]
    haiku               w [D+H, 4H], b [4H]                                        i, g, f, o
    equinox             weight_ih [4H, D], weight_hh [4H, H], bias [4H]            i, f, g, o

j, c and g are the same gate, the candidate. Two biases are summed. A layer of tf1, keras, torch or
equinox may have no bias: then it is zero. PyTorch's ``LSTMCell`` has the names of ``nn.LSTM``
without ``_l0``. TensorFlow 1 and Haiku add 1 to the forget gate's bias while running; in
``LSTMParams`` that is part of ``b``.
"""

import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from lstmjax import checks
from lstmjax.lstm import LSTMParams
from lstmjax.weight_trees import Entries, flat, separator

FRAMEWORKS = (
    "tf1",
    "keras",
    "torch",
    "flax_linen",
    "flax_nnx",
    "flax_nnx_optimized",
    "haiku",
    "equinox",
)
ADDED_WHILE_RUNNING = {"tf1": 1.0, "haiku": 1.0}
DIAGONALS = ("w_i_diag", "w_f_diag", "w_o_diag")
LINEN, NNX = ("i", "f", "g", "o"), ("i", "f_", "g", "o")


# --- from each framework -------------------------------------------------------------------------


def swap_middle(w: jax.Array) -> jax.Array:
    """The second and third of four blocks on the last axis exchanged: i, j, f, o and back."""
    i, j, f, o = jnp.split(w, 4, axis=-1)
    return jnp.concatenate([i, f, j, o], axis=-1)


def _one_kernel(entries: Entries, kernel: str, b: jax.Array, proj: int) -> LSTMParams:
    """TensorFlow 1's and Haiku's kernel, rows [x; h], gates i, j, f, o."""
    both, hidden = entries.take_gates(kernel, "D + P")
    if both.shape[0] <= proj:
        got = list(both.shape)
        raise ValueError(
            f"{entries.label(kernel)}: got shape {got}, expected [D + {proj}, {4 * hidden}]"
        )
    both = swap_middle(both)
    return LSTMParams(both[:-proj], both[-proj:], swap_middle(b))


def _from_tf1(entries: Entries) -> LSTMParams:
    kernel, hidden = entries.take_gates("kernel", "D + P")
    w_proj = peephole = None
    if "projection/kernel" in entries:
        w_proj = entries.take("projection/kernel", hidden, "P")
    b = entries.bias_or_zero(hidden, kernel.dtype, "bias")
    params = _one_kernel(entries, "kernel", b, hidden if w_proj is None else w_proj.shape[1])
    if any([name in entries for name in DIAGONALS]):
        peephole = jnp.stack([entries.take(name, hidden) for name in DIAGONALS])
    return params._replace(peephole=peephole, w_proj=w_proj)


def _from_haiku(entries: Entries) -> LSTMParams:
    hidden = entries.take_gates("w", "D + H")[1]
    return _one_kernel(entries, "w", entries.take("b", 4 * hidden), hidden)


def _two_kernels(entries: Entries, kernel: str, recurrent: str) -> tuple[jax.Array, jax.Array, int]:
    """Kernels [D, 4H] and [H, 4H], gates i, f, g, o, and H."""
    w_h, hidden = entries.take_gates(recurrent, "H")
    entries.take(recurrent, hidden, 4 * hidden)
    return entries.take(kernel, "D", 4 * hidden), w_h, hidden


def _from_keras(entries: Entries) -> LSTMParams:
    if "U" in entries.layer:
        w_x, w_h, hidden = _two_kernels(entries, "W", "U")
        return LSTMParams(w_x, w_h, entries.take("b", 4 * hidden))
    if "U_i" in entries.layer:
        return _eight_kernels(entries, [(f"W_{k}", f"U_{k}", f"b_{k}") for k in "ifco"])
    w_x, w_h, hidden = _two_kernels(entries, "kernel", "recurrent_kernel")
    return LSTMParams(w_x, w_h, entries.bias_or_zero(hidden, w_h.dtype, "bias"))


def _from_nnx_optimized(entries: Entries) -> LSTMParams:
    w_x, w_h, hidden = _two_kernels(entries, "dense_i/kernel", "dense_h/kernel")
    return LSTMParams(w_x, w_h, entries.take("dense_h/bias", 4 * hidden))


def _eight_kernels(entries: Entries, names: list[tuple[str, str, str]]) -> LSTMParams:
    """Kernels [D, H], [H, H] and biases [H] for each gate, named in the order i, f, g, o."""
    hidden = entries.take(names[0][1], "H", "H").shape[1]
    w_h = [entries.take(name, hidden, hidden) for _, name, _ in names]
    size = entries.take(names[0][0], "D", hidden).shape[0]
    w_x = [entries.take(name, size, hidden) for name, _, _ in names]
    b = [entries.take(name, hidden) for _, _, name in names]
    return LSTMParams(*(jnp.concatenate(blocks, axis=-1) for blocks in (w_x, w_h, b)))


def _from_flax(gates: tuple[str, ...], entries: Entries) -> LSTMParams:
    return _eight_kernels(
        entries,
        [(f"i{k}/kernel", f"h{k[0]}/kernel", f"h{k[0]}/bias") for k in gates],
    )


def _from_torch(entries: Entries) -> LSTMParams:
    """One direction of nn.LSTM (its layer and direction follow the names) or an nn.LSTMCell."""
    first = next(iter(entries.layer), "weight_ih_l0")
    suffix = re.search(r"(_l\d+(_reverse)?)?$", first).group()
    ih, hh, hr = (f"weight_{kind}{suffix}" for kind in ("ih", "hh", "hr"))
    w_h, hidden = entries.take_gates(hh, "P", axis=0)
    proj = w_h.shape[1]
    w_proj = entries.take(hr, proj, hidden).T if hr in entries else None
    if w_proj is None:
        entries.take(hh, 4 * hidden, hidden)
    w_x = entries.take(ih, 4 * hidden, "D")
    b = entries.bias_or_zero(hidden, w_h.dtype, f"bias_ih{suffix}", f"bias_hh{suffix}")
    return LSTMParams(w_x.T, w_h.T, b, None, w_proj)


def _from_equinox(entries: Entries) -> LSTMParams:
    w_h, hidden = entries.take_gates("weight_hh", "H", axis=0)
    entries.take("weight_hh", 4 * hidden, hidden)
    w_x = entries.take("weight_ih", 4 * hidden, "D")
    return LSTMParams(w_x.T, w_h.T, entries.bias_or_zero(hidden, w_h.dtype, "bias"))


# --- to each framework ---------------------------------------------------------------------------


def _to_tf1(params: LSTMParams) -> dict:
    both = jnp.concatenate([params.w_x, params.w_h])
    weights = {"kernel": swap_middle(both), "bias": swap_middle(params.b)}
    if params.peephole is not None:
        weights |= dict(zip(DIAGONALS, params.peephole, strict=True))
    if params.w_proj is not None:
        weights["projection/kernel"] = params.w_proj
    return weights


def _to_keras(params: LSTMParams) -> dict:
    return {"kernel": params.w_x, "recurrent_kernel": params.w_h, "bias": params.b}


def _to_torch(params: LSTMParams) -> dict:
    weights = {
        "weight_ih_l0": params.w_x.T,
        "weight_hh_l0": params.w_h.T,
        "bias_ih_l0": params.b,
        "bias_hh_l0": jnp.zeros_like(params.b),
    }
    if params.w_proj is not None:
        weights["weight_hr_l0"] = params.w_proj.T
    return weights


def _to_flax(gates: tuple[str, ...], params: LSTMParams) -> dict:
    w_x, w_h, b = (jnp.split(w, 4, axis=-1) for w in (params.w_x, params.w_h, params.b))
    of_x = {f"i{k}": {"kernel": w} for k, w in zip(gates, w_x, strict=True)}
    of_h = {
        f"h{k[0]}": {"kernel": w, "bias": bias} for k, w, bias in zip(gates, w_h, b, strict=True)
    }
    return of_x | of_h


def _to_nnx_optimized(params: LSTMParams) -> dict:
    return {
        "dense_i": {"kernel": params.w_x},
        "dense_h": {"kernel": params.w_h, "bias": params.b},
    }


def _to_haiku(params: LSTMParams) -> dict:
    both = jnp.concatenate([params.w_x, params.w_h])
    return {"w": swap_middle(both), "b": swap_middle(params.b)}


def _to_equinox(params: LSTMParams) -> dict:
    return {"weight_ih": params.w_x.T, "weight_hh": params.w_h.T, "bias": params.b}


RECURRENT = {  # an entry that every LSTM layer has, and no other layer but those of TF1 and Haiku
    "tf1": ("kernel",),
    "keras": ("recurrent_kernel", "U", "U_i"),
    "torch": ("weight_hh",),
    "flax_linen": ("hi",),
    "flax_nnx": ("hi",),
    "flax_nnx_optimized": ("dense_h",),
    "haiku": ("w",),
    "equinox": ("weight_hh",),
}
READERS = {
    "tf1": _from_tf1,
    "keras": _from_keras,
    "torch": _from_torch,
    "flax_linen": partial(_from_flax, LINEN),
    "flax_nnx": partial(_from_flax, NNX),
    "flax_nnx_optimized": _from_nnx_optimized,
    "haiku": _from_haiku,
    "equinox": _from_equinox,
}
WRITERS = {
    "tf1": _to_tf1,
    "keras": _to_keras,
    "torch": _to_torch,
    "flax_linen": partial(_to_flax, LINEN),
    "flax_nnx": partial(_to_flax, NNX),
    "flax_nnx_optimized": _to_nnx_optimized,
    "haiku": _to_haiku,
    "equinox": _to_equinox,
}


# --- both ways ----------------------------------------------------------------------------------


def read(framework: str, tree: dict, path: tuple[str, ...], forget_bias: Any) -> LSTMParams:
    """``LSTMParams`` from the entries of one layer, which stands at ``path`` of a larger tree."""
    prefix = "".join(part + separator(framework) for part in path)
    entries = Entries(flat(tree), prefix)
    with jax.numpy_dtype_promotion("standard"):  # for layers whose weights differ in dtype
        params = READERS[framework](entries)
    entries.finish(framework)
    return add_forget_bias(params, framework, forget_bias, 1)


def add_forget_bias(params: LSTMParams, framework: str, forget_bias: Any, sign: int) -> LSTMParams:
    """Adds ``sign`` times what the framework adds while running, or ``forget_bias``."""
    if forget_bias is None:
        forget_bias = ADDED_WHILE_RUNNING.get(framework, 0.0)
    checks.number("forget_bias", forget_bias)
    hidden = params.b.shape[0] // 4
    added = jnp.asarray(forget_bias).astype(params.b.dtype) * sign
    return params._replace(b=params.b.at[hidden : 2 * hidden].add(added))


def check(name: str, params: Any) -> None:
    """Raises ``ValueError`` unless ``params`` is ``LSTMParams`` whose weights fit one another."""
    if not isinstance(params, LSTMParams):
        raise ValueError(f"{name}: got {type(params).__name__}, expected LSTMParams")
    for field, array in zip(params._fields, params, strict=True):
        if array is not None or field in ("w_x", "w_h", "b"):
            checks.floating(f"{name}.{field}", array)
    checks.shape(f"{name}.w_h", params.w_h, ("P", "4H"))
    proj, hidden = params.w_h.shape[0], params.w_h.shape[1] // 4
    rows = hidden if params.w_proj is None else "P"
    checks.shape(f"{name}.w_h", params.w_h, (rows, 4 * hidden))
    checks.shape(f"{name}.w_x", params.w_x, ("D", 4 * hidden))
    checks.shape(f"{name}.b", params.b, (4 * hidden,))
    if params.peephole is not None:
        checks.shape(f"{name}.peephole", params.peephole, (3, hidden))
    if params.w_proj is not None:
        checks.shape(f"{name}.w_proj", params.w_proj, (hidden, proj))
