"""One layer of every framework: its own formula in its own layout, and there and back."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from foreign import B, D, H, P, T, assert_equal, params

from lstmjax import interop, lstm
from lstmjax.weight_trees import flat

sigmoid, tanh = oracle.sigmoid, np.tanh


def drawn(shapes, seed=0, dtype=np.float64):
    """Random arrays under names."""
    rng = np.random.default_rng(seed)
    return {n: (rng.integers(-64, 64, s) / 64).astype(dtype) for n, s in shapes.items()}


# --- every framework's formula, in its own layout ------------------------------------------------


def tf1(w, x, m, c, forget_bias=1.0):
    i, j, f, o = np.split(np.concatenate([x, m], 1) @ w["kernel"] + w.get("bias", 0.0), 4, axis=1)
    if "w_i_diag" in w:
        i, f = i + w["w_i_diag"] * c, f + w["w_f_diag"] * c
    c = sigmoid(f + forget_bias) * c + sigmoid(i) * tanh(j)
    if "w_o_diag" in w:
        o = o + w["w_o_diag"] * c
    m = sigmoid(o) * tanh(c)
    return (m @ w["projection/kernel"] if "projection/kernel" in w else m), c


def blocks(z, c):
    i, f, g, o = np.split(z, 4, axis=1)
    c = sigmoid(f) * c + sigmoid(i) * tanh(g)
    return sigmoid(o) * tanh(c), c


def keras(w, x, h, c):
    return blocks(x @ w["kernel"] + h @ w["recurrent_kernel"] + w.get("bias", 0.0), c)


def keras1(w, x, h, c):
    i, f, g, o = (x @ w[f"W_{k}"] + h @ w[f"U_{k}"] + w[f"b_{k}"] for k in "ifco")
    return blocks(np.concatenate([i, f, g, o], axis=1), c)


def keras1_fused(w, x, h, c):
    return blocks(x @ w["W"] + h @ w["U"] + w["b"], c)


def torch(w, x, h, c, suffix="_l0"):
    w = {name.removesuffix(suffix): array for name, array in w.items()}
    z = x @ w["weight_ih"].T + w.get("bias_ih", 0.0) + h @ w["weight_hh"].T + w.get("bias_hh", 0.0)
    h, c = blocks(z, c)
    return (h @ w["weight_hr"].T if "weight_hr" in w else h), c


def flax(w, x, h, c, forget="if"):
    names = {"i": "ii", "f": forget, "g": "ig", "o": "io"}
    z = [x @ w[f"{names[k]}/kernel"] + h @ w[f"h{k}/kernel"] + w[f"h{k}/bias"] for k in "ifgo"]
    return blocks(np.concatenate(z, axis=1), c)


def nnx_optimized(w, x, h, c):
    return blocks(x @ w["dense_i/kernel"] + h @ w["dense_h/kernel"] + w["dense_h/bias"], c)


def haiku(w, x, h, c, forget_bias=1.0):
    i, g, f, o = np.split(np.concatenate([x, h], 1) @ w["w"] + w["b"], 4, axis=1)
    c = sigmoid(f + forget_bias) * c + sigmoid(i) * tanh(g)
    return sigmoid(o) * tanh(c), c


def equinox(w, x, h, c):
    return blocks(x @ w["weight_ih"].T + h @ w["weight_hh"].T + w.get("bias", 0.0), c)


TF1 = {"kernel": (D + H, 4 * H), "bias": (4 * H,)}
DIAGONALS = {f"w_{k}_diag": (H,) for k in "ifo"}
PROJECTED = {"kernel": (D + P, 4 * H), "bias": (4 * H,), "projection/kernel": (H, P)}
KERAS = {"kernel": (D, 4 * H), "recurrent_kernel": (H, 4 * H), "bias": (4 * H,)}
KERAS1 = {f"{k}_{g}": s for g in "icfo" for k, s in zip("WUb", ((D, H), (H, H), (H,)), strict=True)}
TORCH = {"weight_ih": (4 * H, D), "weight_hh": (4 * H, H), "bias_ih": (4 * H,), "bias_hh": (4 * H,)}
FLAX = {f"i{k}/kernel": (D, H) for k in "ifgo"} | {f"h{k}/kernel": (H, H) for k in "ifgo"}
FLAX |= {f"h{k}/bias": (H,) for k in "ifgo"}
NNX = {name.replace("if/", "if_/"): shape for name, shape in FLAX.items()}
OPTIMIZED = {"dense_i/kernel": (D, 4 * H), "dense_h/kernel": (H, 4 * H), "dense_h/bias": (4 * H,)}
EQUINOX = {"weight_ih": (4 * H, D), "weight_hh": (4 * H, H), "bias": (4 * H,)}


def without(shapes, *names):
    return {name: shape for name, shape in shapes.items() if not name.startswith(names)}


def suffixed(shapes, suffix):
    return {name + suffix: shape for name, shape in shapes.items()}


FORMULAS = {
    "tf1": ("tf1", tf1, TF1, {}),
    "tf1_no_bias": ("tf1", tf1, without(TF1, "bias"), {}),
    "tf1_forget_0": ("tf1", partial(tf1, forget_bias=0.0), TF1, {"forget_bias": 0.0}),
    "tf1_peephole": ("tf1", tf1, TF1 | DIAGONALS, {}),
    "tf1_all": ("tf1", tf1, PROJECTED | DIAGONALS, {}),
    "keras": ("keras", keras, KERAS, {}),
    "keras_no_bias": ("keras", keras, without(KERAS, "bias"), {}),
    "keras1": ("keras", keras1, KERAS1, {}),
    "keras1_fused": ("keras", keras1_fused, dict(zip("WUb", KERAS.values(), strict=True)), {}),
    "torch": ("torch", torch, suffixed(TORCH, "_l0"), {}),
    "torch_cell": ("torch", torch, TORCH, {}),
    "torch_no_bias": ("torch", torch, suffixed(without(TORCH, "bias"), "_l0"), {}),
    "torch_projection": (
        "torch",
        partial(torch, suffix="_l1_reverse"),
        suffixed(TORCH | {"weight_hh": (4 * H, P), "weight_hr": (P, H)}, "_l1_reverse"),
        {},
    ),
    "flax_linen": ("flax_linen", flax, FLAX, {}),
    "flax_nnx": ("flax_nnx", partial(flax, forget="if_"), NNX, {}),
    "flax_nnx_optimized": ("flax_nnx_optimized", nnx_optimized, OPTIMIZED, {}),
    "haiku": ("haiku", haiku, {"w": (D + H, 4 * H), "b": (4 * H,)}, {}),
    "haiku_forget_half": (
        "haiku",
        partial(haiku, forget_bias=0.5),
        {"w": (D + H, 4 * H), "b": (4 * H,)},
        {"forget_bias": 0.5},
    ),
    "equinox": ("equinox", equinox, EQUINOX, {}),
    "equinox_no_bias": ("equinox", equinox, without(EQUINOX, "bias"), {}),
}
PROJECTING = ("tf1_all", "torch_projection")
ONE_BIAS = ("tf1", "tf1_all", "keras", "flax_linen", "flax_nnx", "flax_nnx_optimized", "haiku")


@pytest.mark.parametrize("case", FORMULAS)
def test_loaded_layer_computes_the_frameworks_own_formula(case, x64, values_and_gradients):
    framework, step, shapes, options = FORMULAS[case]
    weights, outputs = drawn(shapes), P if case in PROJECTING else H
    rng = np.random.default_rng(1)
    xs, loss = rng.normal(size=(T, B, D)), rng.normal(size=(T, B, outputs))

    def run(*arrays):
        w = dict(zip(weights, arrays, strict=True))
        h, c, hs = np.zeros((B, outputs)), np.zeros((B, H)), []
        for x in xs:
            h, c = step(w, x, h, c)
            hs.append(h)
        return np.stack(hs)

    got, (gradients,) = values_and_gradients(
        lambda w: lstm(interop.load(framework, w, **options), jnp.asarray(xs))[1], loss, weights
    )
    want = oracle.gradients(lambda *a: np.sum(loss * run(*a)), *weights.values())
    oracle.assert_close(got, run(*weights.values()), 1e-12)
    oracle.assert_close(tuple(gradients[name] for name in weights), want, 1e-12)


@pytest.mark.parametrize("case", ["keras", "keras_no_bias", "keras1"])
def test_keras_get_weights_lists_what_the_names_say(case):
    weights = drawn(FORMULAS[case][2])  # KERAS1 stands in the order of Keras 1's lists: i, c, f, o
    assert_equal(interop.load("keras", list(weights.values())), interop.load("keras", weights))


def test_tf1_without_bias_is_the_sources_own_cell(x64):
    kernel = drawn({"kernel": (D + H, 4 * H)})["kernel"]
    xs = np.random.default_rng(2).normal(size=(T, D))
    hs = lstm(interop.load("tf1", {"kernel": kernel}), jnp.asarray(xs[:, None]))[1]
    oracle.assert_close(hs[:, 0], np.stack(oracle.tf1_cell_sequence(kernel, list(xs))), 1e-12)


# --- there and back ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("framework", interop.FRAMEWORKS)
def test_dump_is_the_inverse_of_load(framework, dtype, x64):
    sizes = [{}]
    if framework in ("tf1", "torch"):
        sizes += [{"p": P}, {"p": H + 1}]
    if framework == "tf1":
        sizes += [{"peephole": True}, {"peephole": True, "p": P}]
    for size in sizes:
        given = params(**size, dtype=jnp.dtype(dtype))
        back = partial(interop.load, framework)(interop.dump(framework, given))
        assert_equal(back, given)
        weights = interop.dump(framework, given, forget_bias=0)
        assert_equal(interop.load(framework, weights, forget_bias=0), given)
        weights = interop.dump(framework, given, forget_bias=0.25)
        b = interop.load(framework, weights, forget_bias=0.0).b - given.b
        np.testing.assert_allclose(np.float64(b), np.repeat([0, -0.25, 0, 0], H), atol=0)


@pytest.mark.parametrize("case", [*ONE_BIAS, "haiku_forget_half", "equinox"])
def test_load_is_the_inverse_of_dump(case, x64):
    framework, _, shapes, options = FORMULAS[case]
    weights = jax.tree.map(jnp.asarray, drawn(shapes, seed=3))
    params = interop.load(framework, weights, **options)
    assert_equal(flat(interop.dump(framework, params, **options)), weights)


@pytest.mark.parametrize("case", [*ONE_BIAS, "keras1", "torch_projection", "equinox_no_bias"])
def test_load_under_jit_and_vmap(case):
    framework, _, shapes, options = FORMULAS[case]
    load = partial(interop.load, framework, **options)
    weights = drawn(shapes, seed=3, dtype=np.float32)
    assert_equal(jax.jit(load)(weights), load(weights))
    doubled = jax.tree.map(lambda a: np.float32(2) * a, weights)
    batched = jax.vmap(load)(jax.tree.map(lambda *pair: np.stack(pair), weights, doubled))
    assert_equal(jax.tree.map(lambda a: a[1], batched), load(doubled))


def test_torch_gets_one_bias_and_a_zero():
    given = params()
    dumped = interop.dump("torch", given)
    assert_equal(dumped["bias_ih_l0"], given.b)
    assert_equal(dumped["bias_hh_l0"], jnp.zeros(4 * H))


def test_weights_of_unequal_dtypes_keep_every_bit(x64):
    given = params(dtype=np.float64)._replace(w_h=params().w_h)
    both = interop.dump("tf1", given)["kernel"]
    assert both.dtype == jnp.float64
    weights = {name: np.float32(a) if "hh" in name else a for name, a in drawn(TORCH).items()}
    want = interop.load("torch", drawn(TORCH))
    assert_equal(interop.load("torch", weights), want._replace(w_h=want.w_h.astype(np.float32)))
