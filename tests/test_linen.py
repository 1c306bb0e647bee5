"""The linen layers beside Flax's own: variables, values, gradients, training, and what differs."""

import re
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest

from lstmjax import LSTMParams, LSTMState, linen

T, B, D, H = 7, 4, 3, 5
LENGTHS = np.array([7, 3, 1, 5])
KINDS = [nn.OptimizedLSTMCell, nn.LSTMCell]
INPUTS = np.random.default_rng(0).normal(size=(B, T, D))
CARRY = tuple(np.random.default_rng(1).normal(size=(2, B, H)))


def drawn(variables, seed=1):
    """Variables of the same structure that are nowhere 0, biases included."""
    normal = partial(np.random.default_rng(seed).normal, scale=0.5)
    return jax.tree.map(lambda a: jnp.asarray(normal(size=a.shape), a.dtype), variables)


def random_variables(layer, inputs):
    """Without running the initialisers, which takes longer than all the rest."""
    return drawn(jax.eval_shape(layer.init, jax.random.key(0), jnp.asarray(inputs)))


def marking(number, scale=1.0):
    """An initialiser that shows which one it is and which key came; random laws take seconds."""

    def init(key, shape, dtype):
        value = number + (jax.random.key_data(key)[0] % 2**7).astype(jnp.float32)
        return jnp.full(shape, scale * value, dtype)

    return init


LAWS = ("kernel_init", "recurrent_kernel_init", "bias_init")
INITS = {name: marking(2**7 * number) for number, name in enumerate(LAWS)}


def f32(tree):
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), tree)


def assert_same(got, want, tolerance):
    """The same structure, dtypes, and numbers."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (g.shape, g.dtype) == (w.shape, w.dtype)
        if jnp.issubdtype(g.dtype, jax.dtypes.prng_key):
            g, w = jax.random.key_data(g), jax.random.key_data(w)
        np.testing.assert_allclose(g, w, rtol=tolerance, atol=tolerance)


def by_gate(cell):
    """``LSTMParams`` of NumPy from a linen cell's parameters, written out."""
    parts = ("i", "kernel"), ("h", "kernel"), ("h", "bias")
    return LSTMParams(*(np.concatenate([cell[s + g][k] for g in "ifgo"], -1) for s, k in parts))


# Compiling takes nearly all the time of these tests, running next to none: optimise nothing.
lean = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def through(layer, variables, inputs, **call):
    """``layer.apply`` with options that ``apply`` would keep for itself (``method``)."""
    return layer.apply(variables, inputs, method=lambda layer, inputs: layer(inputs, **call))


# --- the same variables, wherever the layer stands -----------------------------------------------


def models(api, kind):
    """Every way to own a layer, with Flax's layer or with ours in it; all sizes are H."""

    def layer(cell_name=None, **options):
        if api is linen:
            options["optimized"] = kind is nn.OptimizedLSTMCell
            return linen.LSTM(H, cell_name=cell_name, **INITS, **options)
        return nn.RNN(kind(H, name=cell_name, **INITS), **options)

    def dense():
        return nn.Dense(H, kernel_init=marking(1))

    class Compact(nn.Module):
        build: str

        @nn.compact
        def __call__(self, x):
            built = {
                "named": lambda: layer(name="encoder"),
                "named cell": lambda: layer("lstm", name="encoder"),
                "cell without a parent": lambda: api.RNN(kind(H, parent=None, **INITS)),
                "bidirectional": lambda: api.Bidirectional(layer(), layer()),
                "sequential": lambda: nn.Sequential([dense(), layer(), layer()]),
            }
            return built[self.build]()(x)

    class Setup(nn.Module):
        def setup(self):
            self.rnn, self.cell = layer(), kind(H, **INITS)
            self.layers = [layer(), api.RNN(self.cell), api.RNN(self.cell)]  # a shared cell

        def __call__(self, x):
            for rnn in (self.rnn, *self.layers):
                x = rnn(x)
            return x

    class Field(nn.Module):
        rnn: nn.Module

        @nn.compact
        def __call__(self, x):
            return self.rnn(x)

    names = ("named", "named cell", "cell without a parent", "bidirectional", "sequential")
    return {f"compact, {name}": Compact(name) for name in names} | {
        "top": layer(),
        "setup": Setup(),
        "field": Field(layer()),
        "sequential": nn.Sequential([dense(), layer()]),
        "bidirectional": api.Bidirectional(layer(), layer()),
    }


def test_variables_are_flax_s_wherever_the_layer_stands():
    """Of either cell; who owns it does not depend on which one it is."""
    rng = np.random.default_rng(2)
    inputs = f32(rng.normal(size=(2, 2, H)))
    with jax.disable_jit():  # many models that are run once
        for number, place in enumerate(models(nn, KINDS[0])):
            kind = KINDS[number % 2]
            ours, flax = models(linen, kind)[place], models(nn, kind)[place]
            wanted = flax.init(jax.random.key(3), inputs)
            assert_same(ours.init(jax.random.key(3), inputs), wanted, 0)  # names and values
            old = drawn(wanted)  # a checkpoint of the old model
            assert_same(ours.apply(old, inputs), flax.apply(old, inputs), 1e-6)


@pytest.mark.parametrize("options", [{}, INITS | {"param_dtype": jnp.bfloat16}])
def test_initial_values_are_flax_s(options):
    """Of the default laws and, in another dtype, of given ones."""
    inputs = jnp.zeros((1, 2, D), options.get("param_dtype", jnp.float32))
    key = jax.random.key(0, impl="unsafe_rbg")  # compiles fastest
    layers = linen.LSTM(H, **options), nn.RNN(nn.OptimizedLSTMCell(H, **options))
    assert_same(*lean(lambda: [layer.init(key, inputs) for layer in layers])(), 0)


def test_parameters_in_boxes_are_read_and_nothing_is_left_behind():
    """``nn.with_partitioning`` makes boxes."""
    boxed = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
    inputs, layer = f32(INPUTS), linen.LSTM(H, kernel_init=boxed)
    variables = random_variables(layer, inputs)
    assert isinstance(variables["params"]["cell"]["ii"]["kernel"], nn.Partitioned)
    got, after = lean(partial(layer.apply, mutable=True))(variables, inputs)
    assert_same(got, lean(linen.LSTM(H).apply)(nn.meta.unbox(variables), inputs), 0)
    assert_same(after, variables, 0)


def test_tabulate_counts_the_cell_s_parameters():
    table = linen.LSTM(H).tabulate(jax.random.key(0), f32(INPUTS))
    assert f"Total Parameters: {4 * (D * H + H * H + H)} " in table and "cell/hg" in table


# --- the same numbers ----------------------------------------------------------------------------

WAYS = [  # (cell, options, whether there are lengths)
    (0, {}, False),
    (1, {}, True),
    (0, {"reverse": True, "keep_order": True, "unroll": 3}, False),
    (0, {"reverse": True, "time_major": True}, True),
    (1, {"reverse": True, "keep_order": True}, True),
    (0, {"gate_fn": jax.nn.hard_sigmoid, "activation_fn": jax.nn.soft_sign}, True),
    (1, {"gate_fn": jnp.cos, "keep_order": True, "time_major": True}, False),
]


@pytest.mark.parametrize("kind, options, padded", WAYS)
def test_values_and_gradients_are_flax_s(kind, options, padded, x64, values_and_gradients):
    rng, options = np.random.default_rng(3), dict(options)
    functions = {k: options.pop(k) for k in ("gate_fn", "activation_fn") if k in options}
    cell, lengths = KINDS[kind](H, param_dtype=float, **functions), LENGTHS if padded else None
    inputs, ends = INPUTS, LENGTHS if padded else np.full(B, T)
    valid = (np.arange(T) < ends[:, None])[:, :, None]
    if options.get("time_major"):
        inputs, valid = np.swapaxes(inputs, 0, 1), np.swapaxes(valid, 0, 1)
    variables = random_variables(nn.RNN(cell), inputs)
    weights = (tuple(rng.normal(size=(2, B, H))), rng.normal(size=(*inputs.shape[:2], H)))

    def run(api):
        def outputs(variables, inputs, carry):
            how = {"initial_carry": carry, "seq_lengths": lengths, "return_carry": True}
            carry, outputs = api.RNN(cell, **options).apply(variables, inputs, **how)
            return carry, jnp.where(valid, outputs, 0)  # Flax computes on in the padding

        return values_and_gradients(outputs, weights, variables, inputs, CARRY)

    assert_same(run(linen), run(nn), 1e-12)


def test_options_of_the_call_override_the_layer_s(x64):
    options = {"reverse": True, "time_major": True, "return_carry": True, "method": "unrolled"}
    layer = linen.LSTM(H, param_dtype=float, **options)
    variables, inputs = random_variables(layer, INPUTS), jnp.asarray(INPUTS)
    call = {"reverse": False, "time_major": False, "return_carry": False, "keep_order": True}

    @lean
    def run():
        flax = nn.RNN(nn.LSTMCell(H, param_dtype=float)).apply(variables, inputs)
        scan = through(layer, variables, inputs, method="scan", unroll=2, **call)
        return flax, scan, layer.apply(variables, inputs, **call)

    flax, *ours = run()
    assert_same(ours, [flax, flax], 1e-12)
    program = str(jax.make_jaxpr(run.__wrapped__)())
    assert program.count("unroll=2") == 1 and program.count(" scan[") == 2  # Flax's and the second


@pytest.mark.parametrize(
    "options",
    [{"time_major": True}, {"return_carry": True}, {"reverse": True},
     {"reverse": True, "keep_order": True}],
)  # fmt: skip
def test_options_of_lstm_reach_the_layer(options, x64):
    """Made in one call, it does what Flax's ``RNN`` of the cell does with the same options."""
    made = linen.LSTM(H, param_dtype=float, **options)
    variables, inputs = random_variables(linen.LSTM(H, param_dtype=float), INPUTS), INPUTS
    flax = nn.RNN(nn.LSTMCell(H, param_dtype=float), **options).apply(variables, inputs)
    ours = made.apply(variables, inputs)
    assert jax.tree.structure(ours) == jax.tree.structure(flax)
    assert_same([ours], [flax], 1e-12)


@pytest.mark.parametrize("reverse", [False, True])
def test_mask_and_resets_are_the_oracle_s(reverse, x64, values_and_gradients):
    """Holes in the mask, lengths as well (one of 0), resets; values and all gradients."""
    rng = np.random.default_rng(4)
    mask, resets, lengths = rng.random((B, T)) < 0.7, rng.random((B, T)) < 0.3, [6, 0, 7, 4]
    layer = linen.LSTM(H, param_dtype=float, reverse=reverse, keep_order=True, return_carry=True)
    variables = random_variables(layer, INPUTS)
    weights = (tuple(rng.normal(size=(2, B, H))), rng.normal(size=(B, T, H)))
    over_time = {"mask": mask.T, "resets": resets.T, "lengths": lengths, "reverse": reverse}

    def ours(variables, inputs, carry):
        how = {"mask": mask, "resets": resets, "seq_lengths": lengths, "initial_carry": carry}
        return layer.apply(variables, inputs, **how)

    def slow(params, inputs, carry):
        (h, c), hs = oracle.lstm(params, np.swapaxes(inputs, 0, 1), carry[::-1], **over_time)
        return (c, h), np.swapaxes(hs, 0, 1)

    params = by_gate(variables["params"]["cell"])
    got, gradients = values_and_gradients(ours, weights, variables, INPUTS, CARRY)
    oracle.assert_close(got, slow(params, INPUTS, CARRY), 1e-12)
    wanted = oracle.gradients(
        lambda *a: oracle.weighted_sum(weights, slow(*a)), params, INPUTS, CARRY
    )
    gradients = (by_gate(gradients[0]["params"]["cell"]), *gradients[1:])
    oracle.assert_close(gradients, wanted, 1e-10)


# --- what differs on purpose ---------------------------------------------------------------------


def test_padding_is_silent_and_an_empty_row_keeps_its_carry(x64):
    lengths = np.array([7, 3, 0, 5])
    padding = np.arange(T)[None, :] >= lengths[:, None]
    cell = nn.LSTMCell(H, param_dtype=float)
    variables = random_variables(linen.RNN(cell), INPUTS)

    @partial(lean, static_argnums=0)
    @partial(jax.value_and_grad, argnums=(1, 2, 3), has_aux=True)
    def run(api, variables, inputs, carry):
        how = {"initial_carry": carry, "seq_lengths": lengths, "return_carry": True}
        result = api.RNN(cell).apply(variables, inputs, **how)
        return jnp.sum(result[1]) + jnp.sum(result[0][0]), result

    holes = np.where(padding[:, :, None], np.nan, INPUTS)
    (_, ((c, h), outputs)), gradients = run(linen, variables, holes, CARRY)
    assert np.all(outputs[padding] == 0) and np.all(outputs[~padding] != 0)
    np.testing.assert_array_equal((c[2], h[2]), (CARRY[0][2], CARRY[1][2]))
    (_, clean), clean_gradients = run(linen, variables, INPUTS, CARRY)
    assert_same((((c, h), outputs), gradients), (clean, clean_gradients), 0)
    assert np.all(gradients[1][padding] == 0)

    (_, ((c, _), outputs)), _ = run(nn, variables, INPUTS, CARRY)
    assert np.all(outputs[padding] != 0) and np.all(c[2] != CARRY[0][2])  # so much for Flax


# --- both directions, initial carries, training --------------------------------------------------


def test_bidirectional_is_flax_s(x64, values_and_gradients):
    rng = np.random.default_rng(5)
    cells = [nn.LSTMCell(H, param_dtype=float) for _ in range(2)]
    options = {"merge_fn": lambda forward, backward: 2 * forward - backward, "time_major": True}
    inputs, valid = np.swapaxes(INPUTS, 0, 1), (np.arange(T)[:, None] < LENGTHS)[:, :, None]
    weights = ((CARRY[::-1], CARRY), rng.normal(size=(T, B, H)))
    variables = random_variables(nn.Bidirectional(*map(nn.RNN, cells), **options), inputs)

    def run(layer):
        def outputs(variables, inputs, carries):
            how = {"initial_carry": carries, "seq_lengths": LENGTHS, "return_carry": True}
            carries, outputs = layer.apply(variables, inputs, **how)
            return carries, jnp.where(valid, outputs, 0)

        return values_and_gradients(outputs, weights, variables, inputs, (CARRY, CARRY[::-1]))

    ours, flax = (run(api.Bidirectional(*map(api.RNN, cells), **options)) for api in (linen, nn))
    assert_same(ours, flax, 1e-12)


def test_carry_init_draws_what_flax_draws():
    """From the given key, split for both directions, or from Flax's default."""
    cells = [nn.LSTMCell(H, carry_init=marking(0, 0.01)) for _ in range(2)]
    inputs, variables = jnp.zeros((B, 2, D)), random_variables(nn.RNN(cells[0]), jnp.zeros((1, D)))
    both = {"params": {f"{way}_rnn": variables["params"] for way in ("forward", "backward")}}

    @lean
    def run():
        one, pair = [], []
        for api in (linen, nn):
            one.append(api.RNN(cells[0], return_carry=True).apply(variables, inputs))
            layer = api.Bidirectional(*map(api.RNN, cells))
            pair.append(layer.apply(both, inputs, init_key=jax.random.key(5)))
        return one, pair

    for ours, flax in run():
        assert_same(ours, flax, 1e-6)


class Classifier(nn.Module):
    """Embed → a layer → one in both directions → Dense, with the layers of the given module."""

    api: Any

    @nn.compact
    def __call__(self, words, lengths):
        first, *layers = (self.api.RNN(nn.OptimizedLSTMCell(size)) for size in (H, 2, 3))
        hs = first(nn.Embed(11, D)(words), seq_lengths=lengths)
        both = self.api.Bidirectional(*layers, return_carry=True)
        ((_, forward), (_, backward)), _ = both(hs, seq_lengths=lengths)
        return nn.Dense(2)(jnp.concatenate([forward, backward], axis=-1))


def test_training_is_the_same_training():
    rng = np.random.default_rng(6)
    words, labels = rng.integers(0, 11, (B, T)), jnp.asarray([0, 1, 1, 0])
    tx = optax.sgd(2.0)
    start = drawn(jax.eval_shape(Classifier(nn).init, jax.random.key(0), words, LENGTHS))

    @partial(lean, static_argnums=0)
    def step(model, variables, state):
        def loss(variables):
            logits = model.apply(variables, words, LENGTHS)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        value, gradients = jax.value_and_grad(loss)(variables)
        updates, state = tx.update(gradients, state)
        return optax.apply_updates(variables, updates), state, value

    def losses(model):
        variables, state, values = start, tx.init(start), []
        for _ in range(8):
            variables, state, value = step(model, variables, state)
            values.append(value)
        return np.array(values)

    ours, flax = losses(Classifier(linen)), losses(Classifier(nn))
    np.testing.assert_allclose(ours, flax, rtol=1e-6, atol=1e-6)
    assert ours[-1] < 0.97 * ours[0]


# --- errors; those of a call stand in test_nnx.py, which runs the same code ----------------------


def test_wrong_calls_are_said_in_one_line():
    variables = random_variables(linen.LSTM(H), f32(INPUTS))
    with pytest.raises(ValueError, match=re.escape("initial_carry: got LSTMState, expected a")):
        linen.LSTM(H).apply(variables, f32(INPUTS), initial_carry=LSTMState(*CARRY))
    with pytest.raises(ValueError, match=re.escape("method: got 'fast', expected one of")):
        through(linen.LSTM(H), variables, f32(INPUTS), method="fast")


class OwnCell(nn.LSTMCell):
    """A subclass may compute anything."""


WRONG_LAYERS = {
    "cell: got GRUCell, expected LSTMCell or OptimizedLSTMCell": lambda: linen.RNN(nn.GRUCell(H)),
    "cell: got OwnCell, expected": lambda: linen.RNN(OwnCell(H)),
    "features: got 0, expected a whole number >= 1": lambda: linen.LSTM(0),
    "optimized: got 'yes', expected True or False": lambda: linen.LSTM(H, optimized="yes"),
    "gate_fn: got 'relu', expected a function": lambda: linen.LSTM(H, gate_fn="relu"),
    "activation_fn: got 1, expected a function": lambda: linen.LSTM(H, activation_fn=1),
    "backward_rnn: got RNN, expected lstmjax.linen.RNN":
        lambda: linen.Bidirectional(linen.LSTM(H), nn.RNN(nn.LSTMCell(H))),
    "forward_rnn: got LSTMCell, expected lstmjax.linen.RNN":
        lambda: linen.Bidirectional(nn.LSTMCell(H), linen.LSTM(H)),
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG_LAYERS)
def test_wrong_layers_are_said_in_one_line(message):
    with pytest.raises(ValueError, match=re.escape(message)):
        WRONG_LAYERS[message]().init(jax.random.key(0), f32(INPUTS))
