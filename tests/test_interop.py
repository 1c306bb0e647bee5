"""Whole models and the flat vector of cuDNN, beside live Flax and lstm_ref; trees and leaves."""

from collections import OrderedDict
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx
from flax.core import freeze
from foreign import (
    BOTH,
    MIXED,
    ONE,
    TWELVE,
    TWO,
    B,
    D,
    H,
    P,
    T,
    assert_equal,
    dumped,
    numbered,
    pair,
    params,
    scoped,
)
from jax.experimental import rnn as cudnn

from lstmjax import Bidirectional, bidirectional, interop, lstm, stack
from lstmjax.weight_trees import by_number

# --- live: Flax and lstm_ref ---------------------------------------------------------------------


@pytest.fixture
def against(values_and_gradients):
    """Checks that two functions of (weights, xs) agree in value and gradient to 1e-12."""

    def check(theirs, ours, weights, xs):
        shape = jax.eval_shape(theirs, weights, xs).shape
        loss = np.random.default_rng(0).normal(size=shape)
        want, gradients = values_and_gradients(theirs, loss, weights, xs)
        got, ours = values_and_gradients(ours, loss, weights, xs)
        oracle.assert_close(got, want, 1e-12)
        assert jax.tree.structure(ours) == jax.tree.structure(gradients)
        pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(gradients), strict=True)
        for ours, theirs in pairs:
            oracle.assert_close(ours, theirs, 1e-12)

    return check


def randomised(tree, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape)), tree)


def inputs(seed=9):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(T, B, D)))


def mixed_stack(layers, xs):
    """Layers of both kinds on top of one another."""
    for layer in layers:
        if isinstance(layer, Bidirectional):
            xs = bidirectional(lstm, layer, xs)[1]
        else:
            xs = lstm(layer, xs)[1]
    return xs


def linen_model():
    cell = partial(nn.LSTMCell, param_dtype=jnp.float64)
    optimised = partial(nn.OptimizedLSTMCell, param_dtype=jnp.float64)
    return nn.Sequential(
        [
            nn.RNN(optimised(H), time_major=True),
            nn.Bidirectional(nn.RNN(cell(2)), nn.RNN(cell(3)), time_major=True),
        ]
    )


def test_a_linen_model(x64, against):
    model, xs = linen_model(), inputs()
    variables = randomised(jax.eval_shape(model.init, jax.random.key(0), xs))
    load = partial(interop.load_stack, "flax_linen")
    against(model.apply, lambda w, xs: mixed_stack(load(w), xs), variables, xs)
    assert_equal(load(freeze(variables)), load(variables))
    assert_equal({"params": interop.dump_stack("flax_linen", load(variables))}, variables)


@pytest.mark.parametrize("optimised", [False, True])
def test_an_nnx_model(optimised, x64, against):
    framework = "flax_nnx_optimized" if optimised else "flax_nnx"
    kind = nnx.OptimizedLSTMCell if optimised else nnx.LSTMCell
    rngs = nnx.Rngs(0)

    def rnn(d, h, **options):
        return nnx.RNN(kind(d, h, param_dtype=jnp.float64, rngs=rngs), rngs=rngs, **options)

    model = nnx.Sequential(
        rnn(D, H, time_major=True),
        nnx.Bidirectional(rnn(H, 2), rnn(H, 3), time_major=True, rngs=rngs),
    )
    structure, state, rest = nnx.split(model, nnx.Param, ...)
    state = randomised(state)
    load = partial(interop.load_stack, framework)
    against(
        lambda w, xs: nnx.merge(structure, w, rest, copy=True)(xs),
        lambda w, xs: mixed_stack(load(w), xs),
        state,
        inputs(),
    )
    whole = nnx.state(nnx.merge(structure, state, rest))  # with the random streams
    assert_equal(load(whole), load(state))
    assert_equal(interop.dump_stack(framework, load(state)), nnx.to_pure_dict(state))


@pytest.mark.parametrize(("layers", "both"), [(1, False), (2, True)])
def test_cudnn_vector(layers, both, x64, against):
    sizes = {"input_size": D, "hidden_size": H, "num_layers": layers, "bidirectional": both}
    count = cudnn.get_num_params_in_lstm(D, H, layers, both)
    weights = randomised(jnp.zeros(count), seed=3)
    zeros = jnp.zeros((layers * (1 + both), B, H))

    def reference(w, xs):
        parts = cudnn.unpack_lstm_weights(w, *sizes.values())
        lengths = jnp.full(B, T, jnp.int32)
        xs = xs.swapaxes(0, 1)
        ys = cudnn.lstm_ref(xs, zeros, zeros, *parts, lengths, *list(sizes.values())[:3], 0.0, both)
        return ys[0].swapaxes(0, 1)

    def ours(w, xs):
        layer = partial(bidirectional, lstm) if both else lstm
        return stack(layer, interop.load_cudnn(w, **sizes), xs)[1]

    against(reference, ours, weights, inputs())
    loaded = interop.load_cudnn(weights, **sizes)
    back = interop.dump_cudnn(loaded)
    assert back.shape == (count,)
    assert_equal(interop.load_cudnn(back, **sizes), loaded)


# --- trees ---------------------------------------------------------------------------------------


def sides(layers):
    return [side for layer in layers for side in layer]


def zipped(names, values):
    return dict(zip(names, values, strict=True))


def trees():
    tf_cells = [f"rnn/multi_rnn_cell/cell_{k}/lstm_cell" for k in range(12)]
    tf_both = [
        f"stack_bidirectional_rnn/cell_{k}/bidirectional_rnn/{side}/lstm_cell"
        for k in range(2)
        for side in ("fw", "bw")
    ]
    keras = partial(interop.dump, "keras")
    linen, optimised = partial(interop.dump, "flax_linen"), "flax_nnx_optimized"
    twelve = dumped("keras", TWELVE)
    cells = zipped(numbered("lstm"), ({"lstm_cell": w} for w in twelve))
    mixed = {
        "lstm": keras(MIXED[0]),
        "bidirectional": {
            "forward_lstm": keras(MIXED[1].forward),
            "backward_lstm": {"lstm_cell": keras(MIXED[1].backward)},
        },
        "lstm_1": keras(MIXED[2]),
    }
    backwards = OrderedDict(b=keras(TWO[0]), a_1=keras(TWO[1]))
    compact = zipped(("forward", "backward"), map(linen, BOTH[0]))
    rnns = {f"RNN_{k}": {"cell": linen(layer)} for k, layer in enumerate(TWELVE)}
    haiku = dumped("haiku", TWO)
    tf1 = scoped("tf1", tf_cells, TWELVE, end=":0")
    full = params(D, H, p=P, peephole=True)
    in_modules = scoped("torch", ["cells.0", "cells.1"], TWO, ".")
    return {
        "tf1 flat": ("tf1", tf1, TWELVE),
        "tf1 flat, sorted": ("tf1", dict(sorted(tf1.items())), TWELVE),
        "tf1 both directions": ("tf1", scoped("tf1", tf_both, sides(BOTH)), BOTH),
        "tf1 nested": ("tf1", {"rnn": {"basic_lstm_cell": interop.dump("tf1", ONE[0])}}, ONE),
        "tf1 own names": ("tf1", zipped("ab", dumped("tf1", TWO)), TWO),
        "tf1 everything": ("tf1", scoped("tf1", ["rnn/lstm_cell"], [full]), [full]),
        "keras numbers": ("keras", dict(sorted(cells.items())), TWELVE),
        "keras kinds": ("keras", mixed, MIXED),
        "keras ordered": ("keras", OrderedDict(a_2=keras(TWO[0]), a_1=keras(TWO[1])), TWO),
        "keras ordered, in two": ("keras", {"m": backwards}, TWO),
        "keras one layer": ("keras", keras(ONE[0]), ONE),
        "keras get_weights": ("keras", [list(w.values()) for w in dumped("keras", TWO)], TWO),
        "torch": ("torch", interop.dump_stack("torch", TWELVE), TWELVE),
        "torch sorted": (
            "torch",
            dict(sorted(interop.dump_stack("torch", TWELVE).items())),
            TWELVE,
        ),
        "torch cells": ("torch", {n.replace("_l0", ""): w for n, w in in_modules.items()}, TWO),
        "torch prefix": ("torch", scoped("torch", ["encoder.lstm"], ONE, "."), ONE),
        "linen compact": (
            "flax_linen",
            zipped(["LSTMCell_0", "LSTMCell_1"], dumped("flax_linen", TWO)),
            TWO,
        ),
        "linen RNN": ("flax_linen", {"params": dict(sorted(rnns.items()))}, TWELVE),
        "linen directions": ("flax_linen", compact, BOTH[:1]),
        "linen flat": ("flax_linen", scoped("flax_linen", ["RNN_0/cell"], ONE), ONE),
        "nnx numbers": (
            "flax_nnx",
            {"layers": dict(enumerate(dumped("flax_nnx", TWELVE)))},
            TWELVE,
        ),
        "nnx list": (optimised, [{"cell": w} for w in dumped(optimised, TWO)], TWO),
        "haiku": ("haiku", zipped(["lstm/linear", "lstm_1/linear"], haiku), TWO),
        "haiku methods": ("haiku", zipped(["deep_rnn/~/lstm", "deep_rnn/~/lstm_1"], haiku), TWO),
        "equinox": ("equinox", dumped("equinox", TWELVE), TWELVE),
        "equinox numbers": ("equinox", dict(enumerate(dumped("equinox", TWELVE))), TWELVE),
    }


TREES = trees()


@pytest.mark.parametrize("name", TREES)
def test_load_stack_reads(name):
    framework, weights, want = TREES[name]
    assert_equal(interop.load_stack(framework, weights), want)


@pytest.mark.parametrize("framework", interop.FRAMEWORKS)
def test_load_stack_passes_the_forget_bias_on(framework):
    weights = [interop.dump(framework, TWO[0]), interop.dump(framework, TWO[1])]
    added = 1.0 if framework in ("tf1", "haiku") else 0.0
    for got, want in zip(interop.load_stack(framework, weights, forget_bias=0.5), TWO, strict=True):
        h = want.w_h.shape[0]
        assert_equal(got, want._replace(b=want.b.at[h : 2 * h].add(0.5 - added)))


@pytest.mark.parametrize("framework", interop.STACKS)
def test_dump_stack_is_the_inverse_of_load_stack(framework):
    same = [pair(D, H, p=P, seed=1), pair(2 * P, H, p=P, seed=5)]
    for layers in (ONE, TWELVE, same[:1], same) if framework == "torch" else (ONE, BOTH, MIXED):
        weights = interop.dump_stack(framework, layers)
        assert_equal(interop.load_stack(framework, weights), list(layers))


def test_dump_stack_names():
    assert list(interop.dump_stack("torch", [pair(D, 2, p=1)]))[4:6] == [
        "weight_hr_l0",
        "weight_ih_l0_reverse",
    ]
    assert list(interop.dump_stack("keras", MIXED)) == ["lstm", "bidirectional", "lstm_1"]
    assert list(interop.dump_stack("keras", BOTH)["bidirectional_1"]) == [
        "forward_lstm",
        "backward_lstm",
    ]


def test_by_number_keeps_the_order_of_stems():
    names = ["b", "lstm_10", "a_3", "lstm_2", "lstm", "a", "0x1"]
    assert by_number(names) == ["b", "lstm", "a", "lstm_2", "lstm_10", "a_3", "0x1"]


# --- leaves of other libraries -------------------------------------------------------------------


class Tensor:
    """As much of a PyTorch tensor as matters: NumPy cannot have it before it is detached."""

    def __init__(self, array, dtype="torch.float32", free=False):
        self.array, self.dtype, self.free = array, dtype, free

    def detach(self):
        return Tensor(self.array, self.dtype, True)

    def cpu(self):
        return self

    def float(self):
        return Tensor(self.array.astype(np.float32), "torch.float32", self.free)

    def numpy(self):
        if self.dtype == "torch.bfloat16" or not self.free:
            raise TypeError("detach first; NumPy has no bfloat16")
        return np.asarray(self.array)


class Variable:
    """A Keras or TensorFlow variable: its dtype is nothing that NumPy knows."""

    dtype = "float32 of its own"

    def __init__(self, array):
        self.array = array

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.array, dtype)


@pytest.mark.parametrize("wrap", [np.asarray, Tensor, Variable, nnx.Param, jnp.asarray])
def test_leaves_of_every_library(wrap):
    weights = {name: wrap(np.asarray(a)) for name, a in interop.dump("torch", ONE[0]).items()}
    assert_equal(interop.load("torch", weights), ONE[0])


def test_bfloat16_tensors():
    given = params(dtype=jnp.bfloat16)
    weights = interop.dump("torch", given)
    tensors = {name: Tensor(np.asarray(a), "torch.bfloat16") for name, a in weights.items()}
    assert_equal(interop.load("torch", tensors), given)
