"""The nnx layers beside Flax's own: state, values, gradients, transformations, training, errors."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from flax import nnx as flax_nnx
from test_linen import (
    CARRY,
    INITS,
    INPUTS,
    LENGTHS,
    B,
    D,
    H,
    T,
    assert_same,
    drawn,
    f32,
    lean,
    marking,
)

from lstmjax import LSTMParams, LSTMState, nnx

KINDS = [flax_nnx.OptimizedLSTMCell, flax_nnx.LSTMCell]
APIS = nnx, flax_nnx


def cell(kind=0, in_features=D, hidden_features=H, **options):
    """A cell with random weights, all nowhere 0."""
    rngs = flax_nnx.Rngs(0)
    made = KINDS[kind](in_features, hidden_features, rngs=rngs, **INITS, **options)
    flax_nnx.update(made, drawn(flax_nnx.state(made, flax_nnx.Param), seed=hidden_features))
    return made


def pure(layer):
    """``(graphdef, parameters, rest)``, for functions of the parameters."""
    return flax_nnx.split(layer, flax_nnx.Param, ...)


def by_gate(made):
    """``LSTMParams`` of NumPy from an ``nnx.LSTMCell``, written out."""
    of_x, of_h = (made.ii, made.if_, made.ig, made.io), (made.hi, made.hf, made.hg, made.ho)
    kernels = (np.concatenate([d.kernel[...] for d in side], -1) for side in (of_x, of_h))
    b = np.concatenate([d.bias[...] for d in of_h])
    return LSTMParams(*(np.asarray(a, np.float64) for a in (*kernels, b)))


# --- the same state ------------------------------------------------------------------------------


class Tagger(flax_nnx.Module):
    """Embed → a layer → one in both directions → Linear, with the layers of the given module."""

    def __init__(self, api, kind, rngs):
        def layer(in_features, size):
            return api.RNN(KINDS[kind](in_features, size, rngs=rngs, **INITS))

        self.embed = flax_nnx.Embed(11, D, rngs=rngs, embedding_init=marking(1))
        self.rnn = layer(D, H)
        self.both = api.Bidirectional(layer(H, 2), layer(H, 3))
        self.head = flax_nnx.Linear(5, 2, rngs=rngs, kernel_init=marking(1))

    def __call__(self, words, lengths):
        hs = self.rnn(self.embed(words), seq_lengths=lengths)
        return self.head(self.both(hs, seq_lengths=lengths))


@pytest.mark.parametrize("kind", [0, 1])
def test_a_model_has_flax_s_state_and_loads_it(kind):
    ours, flax = (Tagger(api, kind, flax_nnx.Rngs(3)) for api in APIS)
    assert_same(flax_nnx.state(ours), flax_nnx.state(flax), 0)  # names, values, random streams
    flax_nnx.update(flax, drawn(flax_nnx.state(flax, flax_nnx.Param)))  # the old, trained model
    flax_nnx.update(ours, flax_nnx.state(flax))
    merged = flax_nnx.merge(flax_nnx.graphdef(ours), flax_nnx.state(flax))
    words, valid = np.arange(B * T).reshape(B, T) % 11, np.arange(T)[None, :] < LENGTHS[:, None]
    got, again, wanted = (
        np.asarray(model(words, LENGTHS))[valid] for model in (ours, merged, flax)
    )
    assert_same([got, again], [wanted, wanted], 1e-6)


@pytest.mark.parametrize("kind", [0, 1])
def test_lstm_makes_the_cell_that_flax_makes(kind):
    """Options of the cell and default laws; the keys are those of the same Rngs."""
    options = INITS | {"param_dtype": jnp.bfloat16}
    for how in ({}, options):
        ours = nnx.LSTM(D, 2, optimized=kind == 0, rngs=flax_nnx.Rngs(3), **how)
        flax = flax_nnx.RNN(KINDS[kind](D, 2, rngs=flax_nnx.Rngs(3), **how))
        assert_same(flax_nnx.state(ours), flax_nnx.state(flax), 0)


# --- the same numbers ----------------------------------------------------------------------------

WAYS = [  # (cell, options, whether there are lengths)
    (0, {}, True),
    (1, {"reverse": True, "time_major": True}, True),
    (0, {"reverse": True, "keep_order": True}, False),
    (1, {"gate_fn": jax.nn.hard_sigmoid, "activation_fn": jax.nn.soft_sign}, True),
]


@pytest.mark.parametrize("kind, options, padded", WAYS)
def test_values_and_gradients_are_flax_s(kind, options, padded, x64, values_and_gradients):
    options, rng = dict(options), np.random.default_rng(2)
    functions = {k: options.pop(k) for k in ("gate_fn", "activation_fn") if k in options}
    lengths = LENGTHS if padded else np.full(B, T)
    inputs, valid = INPUTS, (np.arange(T) < lengths[:, None])[:, :, None]
    if options.get("time_major"):
        inputs, valid = np.swapaxes(inputs, 0, 1), np.swapaxes(valid, 0, 1)
    weights = (tuple(rng.normal(size=(2, B, H))), rng.normal(size=(*inputs.shape[:2], H)))

    def run(api):
        layer = api.RNN(cell(kind, param_dtype=float, **functions), **options)
        graphdef, params, rest = pure(layer)

        def outputs(params, inputs, carry):
            how = {"initial_carry": carry, "seq_lengths": lengths if padded else None}
            layer = flax_nnx.merge(graphdef, params, rest)
            carry, outputs = layer(inputs, return_carry=True, **how)
            return carry, jnp.where(valid, outputs, 0)  # Flax computes on in the padding

        return values_and_gradients(outputs, weights, params, inputs, CARRY)

    assert_same(*map(run, APIS), 1e-12)


def test_bidirectional_is_flax_s(x64, values_and_gradients):
    options = {"merge_fn": lambda forward, backward: 2 * forward - backward, "time_major": True}
    inputs, valid = np.swapaxes(INPUTS, 0, 1), (np.arange(T)[:, None] < LENGTHS)[:, :, None]
    weights = ((CARRY[::-1], CARRY), np.random.default_rng(3).normal(size=(T, B, H)))

    def run(api):
        members = (api.RNN(cell(kind, param_dtype=float)) for kind in (0, 1))
        graphdef, params, rest = pure(api.Bidirectional(*members, **options))

        def outputs(params, inputs, carries):
            layer = flax_nnx.merge(graphdef, params, rest)
            how = {"initial_carry": carries, "seq_lengths": LENGTHS, "return_carry": True}
            carries, outputs = layer(inputs, **how)
            return carries, jnp.where(valid, outputs, 0)

        return values_and_gradients(outputs, weights, params, inputs, (CARRY, CARRY[::-1]))

    assert_same(*map(run, APIS), 1e-12)


@pytest.mark.parametrize("batch, time_major", [((), False), ((2, 3), False), ((2, 1, 2), True)])
def test_any_batch_axes(batch, time_major, x64):
    """As if each sequence were run alone; Flax cannot return carries for lengths here."""
    rng = np.random.default_rng(4)
    inputs, mask = rng.normal(size=(*batch, T, D)), rng.random((*batch, T)) < 0.8
    lengths = rng.integers(0, T + 1, batch)
    layer = nnx.RNN(cell(1, param_dtype=float), return_carry=True, reverse=True)
    params, zeros = by_gate(layer.cell), np.zeros((1, H))
    axes = (len(batch), 0) if time_major else (0, 0)
    how = {"mask": np.moveaxis(mask, *axes), "seq_lengths": lengths, "time_major": time_major}
    (c, h), outputs = lean(partial(layer, **how))(np.moveaxis(inputs, *axes))
    outputs = np.moveaxis(outputs, *axes[::-1])
    for row in np.ndindex(batch):
        one = {"mask": mask[row][:, None], "lengths": lengths[row][None], "reverse": True}
        wanted, hs = oracle.lstm(params, inputs[row][:, None], (zeros, zeros), **one)
        end = lengths[row]  # turned round up to there, with the padding still behind
        wanted = (*(part[0] for part in wanted), np.concatenate([hs[:end][::-1], hs[end:]])[:, 0])
        oracle.assert_close((h[row], c[row], outputs[row]), wanted, 1e-12)


def test_bidirectional_cuts_both_directions_at_resets(x64):
    """A row of two sequences is the two sequences by themselves; masked steps do not exist."""
    layer = nnx.Bidirectional(*(nnx.RNN(cell(1, D, n, param_dtype=float)) for n in (H, 2)))
    inputs = np.random.default_rng(5).normal(size=(1, 2, T, D))  # batch axes (1, 2)
    resets, mask = np.zeros((1, 2, T)), np.ones((1, 2, T))
    resets[0, :, 3], mask[0, 1, 2], lengths = 1, 0, np.array([[7, 6]])
    parts = ((0, [0, 1, 2]), (0, [3, 4, 5, 6]), (1, [0, 1]), (1, [3, 4, 5]))

    @lean
    def run():
        together = layer(inputs, resets=resets, mask=mask, seq_lengths=lengths)
        return together[0], [layer(inputs[0, row][steps]) for row, steps in parts]

    together, alone = run()
    for (row, steps), wanted in zip(parts, alone, strict=True):
        assert_same(together[row][np.array(steps)], wanted, 1e-12)
    assert np.all(together[1][np.array([2, 6])] == 0)


LOW = [("float32", "bfloat16"), ("bfloat16", None), ("float16", None)]


@pytest.mark.parametrize("param_dtype, dtype", LOW)
def test_low_precision_has_flax_s_dtypes(param_dtype, dtype):
    """Equal to rounding; and no further from the truth, because gates and c stay in float32."""
    made = cell(1, param_dtype=jnp.dtype(param_dtype), dtype=dtype and jnp.dtype(dtype))
    ours, flax = (api.RNN(made, return_carry=True, rngs=False) for api in APIS)
    inputs, rngs = jnp.asarray(INPUTS, param_dtype), flax_nnx.Rngs(0)
    ours = lean(ours)(inputs)
    with jax.numpy_dtype_promotion("standard"):  # Flax's cell mixes dtypes
        flax = flax(inputs, rngs=rngs)
    assert [a.dtype for a in jax.tree.leaves(ours)] == [a.dtype for a in jax.tree.leaves(flax)]
    xs, zeros = np.swapaxes(np.asarray(inputs, np.float64), 0, 1), np.zeros((B, H))
    _, truth = oracle.lstm(by_gate(made), xs, (zeros, zeros))
    error, flax_error = (
        np.abs(np.asarray(outputs, np.float64) - np.swapaxes(truth, 0, 1)).max()
        for _, outputs in (ours, flax)
    )
    eps = jnp.finfo(dtype or param_dtype).eps
    assert eps / 20 < error <= flax_error < 4 * eps


# --- transformations, random streams, training ---------------------------------------------------


def test_transformations_of_nnx():
    layer, inputs = nnx.RNN(cell(), reverse=True), f32(INPUTS)
    graphdef, params, rest = pure(layer)

    def loss(layer, inputs):
        return jnp.sum(layer(inputs) ** 2)

    def pure_loss(params):
        return loss(flax_nnx.merge(graphdef, params, rest), inputs)

    value, gradients = flax_nnx.jit(flax_nnx.value_and_grad(loss))(layer, inputs)
    wanted = jax.jit(jax.value_and_grad(pure_loss))(params)
    assert_same((value, gradients), wanted, 1e-6)

    @flax_nnx.split_rngs(splits=3)
    @flax_nnx.vmap
    def several(rngs):
        return nnx.LSTM(D, 2, rngs=rngs, recurrent_kernel_init=jax.nn.initializers.normal())

    layers = several(flax_nnx.Rngs(0))
    together = flax_nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))(layers, inputs)
    graphdef, state = flax_nnx.split(layers)
    for number in range(3):
        one = flax_nnx.merge(graphdef, jax.tree.map(lambda a, n=number: a[n], state))
        assert_same(together[number], one(inputs), 1e-6)
    assert np.abs(together[0] - together[1]).max() > 0.01


def test_a_call_changes_nothing():
    """So a layer may be closed over by JAX's own jit; Flax's may not."""
    inputs = f32(INPUTS)
    ours, flax = (api.RNN(cell()) for api in APIS)
    before = jax.tree.map(np.asarray, flax_nnx.to_pure_dict(flax_nnx.state(ours, flax_nnx.Param)))
    ours(inputs)
    after = flax_nnx.to_pure_dict(flax_nnx.state(ours, flax_nnx.Param))
    assert jax.tree.all(jax.tree.map(np.array_equal, before, after))
    assert int(ours.rngs.count[...]) == 0
    assert_same(jax.jit(lambda x: ours(x))(inputs), ours(inputs), 1e-6)
    assert_same(ours(inputs, initial_carry=CARRY), ours(inputs, initial_carry=f32(CARRY)), 0)
    with pytest.raises(Exception, match="trace level"):
        jax.jit(lambda x: flax(x))(inputs)


@pytest.mark.parametrize("given", [False, True])
def test_carry_init_draws_what_flax_draws(given):
    """From the layer's own stream or a given one, and both are advanced alike."""
    with pytest.warns(UserWarning, match="carry_init is provided"):
        cells = [cell(carry_init=marking(0, 0.01)) for _ in range(2)]
    inputs, results = f32(INPUTS[:, :2]), []
    for api in APIS:
        one, both = api.RNN(cells[0]), api.Bidirectional(*map(api.RNN, cells))
        rngs = flax_nnx.Rngs(7) if given else None
        outputs = [layer(inputs, rngs=rngs) for layer in (one, both, one, both)]
        streams = [layer.rngs.count[...] for layer in (one, both)]
        results.append((outputs, streams, rngs.default.count[...] if given else None))
    assert_same(*results, 1e-6)
    assert np.abs(results[0][0][0] - results[0][0][2]).max() > 1e-3  # fresh for every call


def test_given_rngs_are_advanced_as_flax_advances_them():
    """Also where the carry is zero: what the model draws next must not change."""
    counts = []
    for api in APIS:
        rngs, members = flax_nnx.Rngs(7), [api.RNN(cell(), rngs=False) for _ in range(2)]
        members[0](f32(INPUTS), rngs=rngs)
        api.Bidirectional(*members)(f32(INPUTS), rngs=rngs)
        counts.append(int(rngs.default.count[...]))
    assert counts[0] == counts[1] == 5


def test_training_is_the_same_training():
    rng = np.random.default_rng(6)
    words = rng.integers(0, 11, (B, T))
    tags = words % 2
    valid = np.arange(T)[None, :] < LENGTHS[:, None]
    start = drawn(flax_nnx.state(Tagger(nnx, 0, flax_nnx.Rngs(0)), flax_nnx.Param))

    @flax_nnx.jit
    def step(model, optimizer):
        def loss(model):
            logits = model(words, LENGTHS)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, tags)
            return jnp.sum(jnp.where(valid, losses, 0)) / float(valid.sum())

        value, gradients = flax_nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradients)
        return value

    def losses(api):
        model = Tagger(api, 0, flax_nnx.Rngs(0))
        flax_nnx.update(model, start)
        optimizer = flax_nnx.Optimizer(model, optax.sgd(1.0), wrt=flax_nnx.Param)
        return np.array([step(model, optimizer) for _ in range(8)])

    ours, flax = map(losses, APIS)
    np.testing.assert_allclose(ours, flax, rtol=1e-6, atol=1e-6)
    assert ours[-1] < 0.97 * ours[0]


# --- errors --------------------------------------------------------------------------------------

ZEROS = np.zeros((B, H), np.float32)
WRONG_CALLS = {
    "seq_lengths: got 8, expected 0 <= lengths <= 7": {"seq_lengths": [8, 1, 1, 1]},
    "seq_lengths: got shape [3], expected [4]": {"seq_lengths": [1, 1, 1]},
    "seq_lengths: got list, expected an array": {"seq_lengths": [[1], [1, 2]]},
    "seq_lengths: got dtype float": {"seq_lengths": np.ones(B)},
    "mask: got shape [7, 4], expected [4, 7]": {"mask": np.ones((T, B))},
    "resets: got shape [4, 7], expected [7, 4]": {
        "resets": np.ones((B, T)), "inputs": np.zeros((T, B, D), np.float32), "time_major": True
    },
    "initial_carry: got LSTMState, expected a pair": {"initial_carry": LSTMState(ZEROS, ZEROS)},
    "initial_carry: got tuple, expected a pair": {"initial_carry": (ZEROS, ZEROS, ZEROS)},
    "initial_carry c: got shape [4, 4], expected [4, 5]": {"initial_carry": (ZEROS[:, 1:], ZEROS)},
    "initial_carry h: got dtype int32": {"initial_carry": (ZEROS, ZEROS.astype(np.int32))},
    "inputs: got shape [3], expected [*batch, T, D]": {"inputs": np.zeros(D, np.float32)},
    "inputs: got shape [4, 7, 2], expected [..., 3]": {"inputs": np.zeros((B, T, 2), np.float32)},
    "inputs: got dtype int32": {"inputs": np.zeros((B, T, D), np.int32)},
    "inputs: got str, expected an array": {"inputs": "words"},
    "reverse: got 1, expected True or False": {"reverse": 1},
    "keep_order: got 'no', expected True or False": {"keep_order": "no"},
    "time_major: got 0, expected True or False": {"time_major": 0},
    "return_carry: got 'yes', expected True or False": {"return_carry": "yes"},
    "method: got 'fast', expected one of": {"method": "fast"},
    "unroll: got 0, expected a whole number": {"unroll": 0},
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG_CALLS)
def test_wrong_calls_are_said_in_one_line(message):
    with pytest.raises(ValueError, match=re.escape(message)):
        nnx.RNN(cell())(**({"inputs": f32(INPUTS)} | WRONG_CALLS[message]))


class OwnCell(flax_nnx.LSTMCell):
    """A subclass may compute anything."""


RNGS = flax_nnx.Rngs(0)
WRONG_LAYERS = {
    "cell: got GRUCell, expected LSTM": lambda: nnx.RNN(flax_nnx.GRUCell(1, 1, rngs=RNGS)),
    "cell: got OwnCell, expected": lambda: nnx.RNN(OwnCell(1, 1, rngs=RNGS)),
    "promote_dtype: got": lambda: nnx.RNN(cell(promote_dtype=lambda args, dtype: args)),
    "rngs: got 3, expected True or False": lambda: nnx.RNN(cell(), rngs=3),
    "in_features: got 0, expected a whole number": lambda: nnx.LSTM(0, H, rngs=RNGS),
    "hidden_features: got 0, expected a": lambda: nnx.LSTM(D, 0, rngs=RNGS),
    "optimized: got 1, expected True": lambda: nnx.LSTM(D, H, optimized=1, rngs=RNGS),
    "gate_fn: got 'relu', expected a": lambda: nnx.LSTM(D, H, gate_fn="relu", rngs=RNGS),
    "backward_rnn: got RNN, expected lstmjax.nnx.RNN":
        lambda: nnx.Bidirectional(nnx.RNN(cell()), flax_nnx.RNN(cell())),
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG_LAYERS)
def test_wrong_layers_are_said_in_one_line(message):
    with pytest.raises(ValueError, match=re.escape(message)):
        WRONG_LAYERS[message]()


@pytest.mark.parametrize(
    "options",
    [{}, {"time_major": True}, {"return_carry": True}, {"reverse": True},
     {"reverse": True, "keep_order": True}, {"method": "unrolled"}, {"unroll": 2}],
)  # fmt: skip
def test_options_of_lstm_reach_the_layer(options, x64):
    """Made in one call, it does what an ``RNN`` of its cell does with the same options."""
    made = nnx.LSTM(D, H, rngs=flax_nnx.Rngs(0), param_dtype=float, **options)
    layer = nnx.RNN(made.cell, **options)
    inputs = jnp.asarray(INPUTS)
    got, want = made(inputs), layer(inputs)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    names = ("time_major", "return_carry", "reverse", "keep_order", "method", "unroll")
    for name in names:
        assert (
            getattr(made, name) == getattr(layer, name) == options.get(name, getattr(layer, name))
        )
    plain = nnx.RNN(made.cell)(inputs)
    if set(options) - {"method", "unroll"}:
        assert jax.tree.structure(got) != jax.tree.structure(plain) or np.any(got != plain)
