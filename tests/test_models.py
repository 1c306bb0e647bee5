"""The models: sizes of the source programs, and what they compute, against the core's functions."""

import dataclasses
import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lstmjax import (
    GRUParams,
    LSTMParams,
    LSTMState,
    RNNParams,
    embedding_dropout,
    gru,
    locked_dropout,
    lstm,
    recurrent_noise,
    rnn,
    uniform_gate,
    variational_dropout,
    weight_drop,
    word_dropout,
)
from lstmjax import models as module
from lstmjax.initializers import INITS
from lstmjax.models import Cell, Init, Precision, Recurrent, SequenceModel, gate_bias
from lstmjax.variants import VARIANTS, FGRParams, fgr

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


def script(name):
    """An experiment as a module; nothing runs when it is imported."""
    spec = importlib.util.spec_from_file_location(f"experiment_{name}", EXPERIMENTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("name", "preset", "inputs", "count"),
    [  # the counts of the published programs
        ("sin", "tf1", np.zeros((1, 20, 1), np.float32), 871),
        ("sin", "keras", np.zeros((1, 20, 1), np.float32), 1_781),
        ("imdb", "tf2", np.zeros((1, 80), np.int32), 1_075_329),
        ("forecast", "rnn", np.zeros((1, 50, 1), np.float32), 4_225),
        ("forecast", "lstm", np.zeros((1, 50, 1), np.float32), 66_689),
        ("mnist", "tf1", np.zeros((1, 28, 28), np.float32), 52_610),
    ],
)
def test_presets_have_the_sources_sizes(name, preset, inputs, count):
    module = script(name)
    model = module.make_model(module.PRESETS[preset])
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), inputs)["params"])
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count


@pytest.mark.parametrize("name", ["sin", "forecast", "imdb", "mnist"])
def test_the_precision_reaches_the_model_and_makes_another_row(name):
    module = script(name)
    for settings in module.PRESETS.values():
        assert module.make_model(settings).precision == "float32"
        short = dataclasses.replace(settings, precision="bfloat16")
        assert module.make_model(short).precision == "bfloat16"
        assert module.matching_row(settings, module.ROWS) is not None
        assert module.matching_row(short, module.ROWS) is None


def test_initial_laws_reach_the_parameters():
    module = script("mnist")
    model = module.make_model(module.PRESETS["tf1"])
    params = model.init(jax.random.key(0), jnp.zeros((1, 28, 28)))["params"]
    np.testing.assert_array_equal(params["head"]["bias"], np.full(10, 0.1, np.float32))
    # A normal law cut off at two standard deviations, of 0.1 before the cut in TensorFlow 1.
    kernel = np.asarray(params["head"]["kernel"])
    assert 0.08 < kernel.std() < 0.11 and np.abs(kernel).max() < 0.25
    weights = params["layer_0"]["weights"]
    limit = np.sqrt(6 / (28 + 5 * 100))
    for name in ("w_x", "w_h"):
        assert 0.99 * limit < np.abs(weights[name]).max() <= limit
    np.testing.assert_array_equal(
        weights["b"].reshape(4, 100), np.eye(4, dtype=np.float32)[1][:, None] * np.ones(100)
    )


CELLS = {
    "lstm": lambda w, xs, **o: lstm(LSTMParams(**w), xs, **o),
    "gru": lambda w, xs, **o: gru(GRUParams(**w), xs, **o),
    "rnn": lambda w, xs, **o: rnn(RNNParams(**w), xs, **o),
    "linear_rnn": lambda w, xs, **o: rnn(RNNParams(**w), xs, activation="linear", **o),
    "peephole": lambda w, xs, **o: lstm(LSTMParams(**w), xs, **o),
    "cifg": lambda w, xs, **o: VARIANTS["cifg"].layer(LSTMParams(**w), xs, **o),
    "fgr": lambda w, xs, **o: fgr(FGRParams(**w, peephole=None, w_proj=None), xs, **o),
}


def jiggle(params, seed):
    """Every parameter away from zero, so that none can hide."""
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(seed)
    return tree.unflatten([a + jnp.float32(0.3 * rng.normal(size=a.shape)) for a in leaves])


@pytest.mark.parametrize("every_step", [False, True])
@pytest.mark.parametrize("cell", list(CELLS))
def test_a_model_is_its_layers_one_after_another(cell, every_step):
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 11, (3, 7)).astype(np.int32)
    mask = jnp.asarray(rng.random((3, 7)) < 0.7)
    model = SequenceModel(
        cell, 5, 2, num_layers=2, every_step=every_step, vocabulary_size=11, input_size=4,
        dropout=0.4,
    )  # fmt: skip
    params = jiggle(model.init(jax.random.key(1), ids)["params"], 2)
    key = jax.random.key(3)
    for dropout_key in (None, key):
        states, outputs = model.apply({"params": params}, ids, mask=mask, key=dropout_key)
        hs = jnp.swapaxes(params["embed"]["embedding"][ids], 0, 1)
        for number in range(2):
            layer_key = None if dropout_key is None else jax.random.fold_in(key, number)
            hs = variational_dropout(layer_key, hs, 0.4)
            state, hs = CELLS[cell](params[f"layer_{number}"]["weights"], hs, mask=mask.T)
            for ours, expected in zip(states[number], state, strict=True):
                np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)
        read = jnp.swapaxes(hs, 0, 1) if every_step else state.h
        head = params["head"]
        expected = np.asarray(read) @ np.asarray(head["kernel"]) + np.asarray(head["bias"])
        np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-5)


def test_a_carried_state_continues_a_sequence():
    xs = jnp.float32(np.random.default_rng(0).normal(size=(3, 9, 2)))
    model = SequenceModel("lstm", 5, 1, every_step=True, input_size=4)
    params = jiggle(model.init(jax.random.key(1), xs)["params"], 2)
    whole_states, whole = model.apply({"params": params}, xs)
    states, first = model.apply({"params": params}, xs[:, :4])
    assert isinstance(states[0], LSTMState)
    states, second = model.apply({"params": params}, xs[:, 4:], states)
    joined = jnp.concatenate([first, second], axis=1)
    np.testing.assert_allclose(joined, whole, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(states[0].c, whole_states[0].c, rtol=1e-5, atol=1e-6)


def test_unknown_cells_are_named():
    with pytest.raises(ValueError, match="cell: got 'elman', expected one of 'lstm', 'gru'"):
        SequenceModel("elman", 5, 1).init(jax.random.key(0), jnp.zeros((1, 3, 2)))


def test_every_cell_and_law_has_its_name_on_the_command_line():
    assert get_args(Cell) == tuple(module.CELLS) and set(VARIANTS) < set(module.CELLS)
    assert get_args(Init) == INITS
    assert get_args(Precision) == ("float32", "bfloat16")
    xs = jnp.ones((4, 2, 3))
    for cell in module.CELLS:
        layer = Recurrent(cell, 5)
        params = jax.eval_shape(lambda layer=layer: layer.init(jax.random.key(0), xs))["params"]
        got = jax.eval_shape(layer.apply, {"params": params}, xs)
        assert got[1].shape == (4, 2, 5) and set(params) == {"weights"}


def run_dropped(cell, key, **rates):
    """A layer of random numbers with the given rates: params, xs, and what it puts out."""
    xs = jnp.float32(np.random.default_rng(4).normal(size=(7, 3, 2)))
    layer = Recurrent(cell, 5, **rates)
    params = jiggle(layer.init(jax.random.key(1), xs)["params"], 2)
    return params, xs, layer.apply({"params": params}, xs, key=key)


@pytest.mark.parametrize("key", [None, jax.random.key(6)], ids=["evaluation", "training"])
@pytest.mark.parametrize("cell", ["cifg", "gru"])
def test_what_a_layer_drops_inside_is_the_functions_of_the_core(cell, key):
    rates = {"recurrent_dropout": 0.4, "weight_drop": 0.3, "zoneout": 0.2}
    params, xs, got = run_dropped(cell, key, **rates)
    kind, _, layer = module.CELLS[cell]
    weights = kind(**params["weights"])
    of_weights, of_noise = (None, None) if key is None else jax.random.split(key)
    zoneout = {"zoneout_h": 0.2} | ({"zoneout_c": 0.2} if cell == "cifg" else {})
    noise = recurrent_noise(of_noise, weights, xs, recurrent_dropout=0.4, **zoneout)
    want = layer(weight_drop(of_weights, weights, 0.3), xs, noise=noise)
    for ours, expected in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-6)
    plain = layer(weights, xs)[1]
    for name, rate in rates.items():  # each does something on its own, or nothing to evaluate
        change = np.abs(run_dropped(cell, key, **{name: rate})[2][1] - plain).max()
        assert change > 0.01 if key is not None or name == "zoneout" else change == 0


def test_what_a_model_drops_around_its_layers_is_the_functions_of_the_core():
    rng, key = np.random.default_rng(5), jax.random.key(7)
    ids = rng.integers(0, 11, (3, 7)).astype(np.int32)
    rates = {"locked_dropout": 0.3, "embedding_dropout": 0.2, "word_dropout": 0.4}
    around = {"unknown_id": 2, "padding_id": 0, "recurrent_dropout": 0.25, "dropout": 0.1}
    sizes = {"num_layers": 2, "vocabulary_size": 11, "input_size": 4}
    for every_step in (False, True):
        model = SequenceModel("lstm", 5, 2, **sizes, **rates, **around, every_step=every_step)
        params = jiggle(model.init(jax.random.key(1), ids)["params"], 2)
        _, got = model.apply({"params": params}, ids, key=key)

        words = word_dropout(module._key(key, "word_dropout"), ids.T, 0.4, 2, keep_id=0)
        of_table = module._key(key, "embedding_dropout")
        hs = embedding_dropout(of_table, params["embed"]["embedding"], 0.2)[words]
        for number in range(2):
            hs = variational_dropout(jax.random.fold_in(key, number), hs, 0.1)
            weights = LSTMParams(**params[f"layer_{number}"]["weights"])
            of_noise = jax.random.split(module._key(key, "recurrent", number))[1]
            noise = recurrent_noise(of_noise, weights, hs, recurrent_dropout=0.25)
            _, hs = lstm(weights, hs, noise=noise)
            hs = locked_dropout(module._key(key, "locked_dropout", number), hs, 0.3)
        read = jnp.swapaxes(hs, 0, 1) if every_step else hs[-1]
        head = jax.tree.map(np.asarray, params["head"])
        want = np.asarray(read) @ head["kernel"] + head["bias"]
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)

    plain = SequenceModel("lstm", 5, 2, **sizes, every_step=True)
    _, evaluated = model.apply({"params": params}, ids)
    _, undropped = plain.apply({"params": params}, ids, key=key)
    np.testing.assert_array_equal(evaluated, undropped)
    for name, rate in rates.items():
        one = SequenceModel("lstm", 5, 2, **sizes, **{name: rate}, unknown_id=2, every_step=True)
        assert np.abs(one.apply({"params": params}, ids, key=key)[1] - undropped).max() > 0.01


def test_no_two_things_of_a_model_draw_from_one_key():
    key = jax.random.key(8)
    kinds = ("recurrent", "locked_dropout", "embedding_dropout", "word_dropout")
    keys = [module._key(key, kind, number) for kind in kinds for number in range(3)]
    keys += [jax.random.fold_in(key, number) for number in range(3)]
    data = {tuple(np.asarray(jax.random.key_data(k))) for k in keys}
    assert len(data) == len(keys)
    assert module._key(None, "recurrent") is None


@pytest.mark.parametrize("cell", ["gru", "cifg", "fgr"])
def test_a_learned_state_is_a_parameter_that_the_gradient_reaches(cell):
    xs = jnp.float32(np.random.default_rng(9).normal(size=(3, 6, 2)))
    model = SequenceModel(cell, 5, 1, num_layers=2, learned_state=True)
    drawn = model.init(jax.random.key(1), xs)["params"]
    assert not any(np.any(part) for part in drawn["layer_1"]["state"].values())
    params = jiggle(drawn, 2)
    kind = type(model.apply({"params": params}, xs)[0][0])
    plain = SequenceModel(cell, 5, 1, num_layers=2)
    layers = [params[f"layer_{n}"] for n in range(2)]
    states = [kind(**jax.tree.map(lambda v: jnp.stack([v] * 3), p["state"])) for p in layers]
    bare = params | {f"layer_{n}": {"weights": p["weights"]} for n, p in enumerate(layers)}
    _, got = model.apply({"params": params}, xs)
    np.testing.assert_allclose(got, plain.apply({"params": bare}, xs, states)[1], rtol=1e-6)
    gradient = jax.grad(lambda p: model.apply({"params": p}, xs)[1].sum())(params)
    assert min(np.abs(v).max() for v in gradient["layer_0"]["state"].values()) > 0


def test_the_forget_bias_reaches_the_weights():
    xs = jnp.ones((1, 2, 3))
    biases = {}
    for text in ("2.5", "chrono:20", "log_uniform:20", "uniform_gate"):
        model = SequenceModel("lstm", 50, 1, forget_bias=gate_bias(text, "lstm"))
        b = model.init(jax.random.key(0), xs)["params"]["layer_0"]["weights"]["b"]
        biases[text] = np.split(np.asarray(b), 4)
    np.testing.assert_array_equal(biases["2.5"][1], np.full(50, 2.5, np.float32))
    assert (
        np.log(15) < biases["chrono:20"][1].max() <= np.log(19)
        and biases["chrono:20"][1].min() >= 0
    )
    f = biases["log_uniform:20"][1]
    assert 0 <= f.min() < 0.3 < 2.5 < f.max() <= np.log(19) < 2 * np.median(f) + 1
    for law in ("chrono:20", "log_uniform:20", "uniform_gate"):
        np.testing.assert_array_equal(biases[law][0], -biases[law][1])
    assert biases["uniform_gate"][1].min() < -1 and gate_bias("uniform_gate", "nfg") is uniform_gate
    assert gate_bias(None, "gru") is None


@pytest.mark.parametrize(
    ("text", "cell", "expected"),
    [
        ("much", "lstm", "a number, chrono:T, log_uniform:T or uniform_gate"),
        ("nan", "lstm", "a number, chrono:T, log_uniform:T or uniform_gate"),
        (":3", "lstm", "a number, chrono:T, log_uniform:T or uniform_gate"),
        ("chrono:", "lstm", "a number, chrono:T, log_uniform:T or uniform_gate"),
        ("uniform:3", "lstm", "a number, chrono:T, log_uniform:T or uniform_gate"),
        ("chrono", "lstm", "a number, chrono:T, log_uniform:T or uniform_gate"),
        ("chrono:1", "lstm", "chrono:T with T >= 2"),
        ("log_uniform:1.5", "lstm", "log_uniform:T with T >= 2"),
        ("1.0", "gru", "None with the cell gru"),
        ("1.0", "nfg", "a law with the cell nfg"),
    ],
)
def test_a_forget_bias_that_cannot_be_is_named(text, cell, expected):
    with pytest.raises(ValueError) as error:
        gate_bias(text, cell)
    assert str(error.value) == f"forget_bias: got {text}, expected {expected}"


def test_there_is_a_state_for_each_layer():
    xs, model = jnp.ones((3, 2, 4)), SequenceModel("lstm", 5, 1, num_layers=2)
    variables = model.init(jax.random.key(0), xs)
    states, _ = model.apply(variables, xs)
    with pytest.raises(ValueError, match="^states: got 1, expected 2, one per layer"):
        model.apply(variables, xs, states[:1])
    with pytest.raises(ValueError, match="^states: got LSTMState, expected a list, one per layer"):
        model.apply(variables, xs, states[0])
    with pytest.raises(ValueError, match="^num_layers: got 0, expected a whole number >= 1"):
        SequenceModel("lstm", 5, 1, num_layers=0).apply(variables, xs)


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        (np.ones((2, 5)), {}, "inputs: got shape [2, 5], expected [B, T, D]"),
        ("words", {}, "inputs: got str, expected an array"),
        (np.ones((2, 5, 3)), {"mask": np.ones((5, 2))}, "mask: got shape [5, 2], expected [2, 5]"),
        (np.ones((2, 5, 3)), {"mask": np.ones(5)}, "mask: got shape [5], expected [2, 5]"),
        (np.ones((2, 5, 3)), {"key": 3}, "key: got int, expected a PRNG key"),
    ],
)
def test_batches_that_do_not_fit_are_named(inputs, options, message):
    """As they were given, and not as the core turns them."""
    with pytest.raises(ValueError) as error:
        SequenceModel("lstm", 4, 1).init(jax.random.key(0), inputs, **options)
    assert str(error.value).startswith(message)


def test_a_mask_may_be_a_list():
    model, xs = SequenceModel("lstm", 4, 1), jax.random.normal(jax.random.key(1), (2, 3, 2))
    variables, mask = model.init(jax.random.key(0), xs), [[1, 1, 0], [1, 1, 1]]
    wanted = model.apply(variables, xs, mask=jnp.array(mask, bool))
    jax.tree.map(np.testing.assert_array_equal, model.apply(variables, xs, mask=mask), wanted)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"output_size": 0}, "output_size: got 0, expected a whole number >= 1"),
        ({"input_size": -1}, "input_size: got -1, expected a whole number >= 1"),
        ({"vocabulary_size": 7}, "input_size: got None, expected a whole number >= 1"),
        ({"vocabulary_size": 0, "input_size": 2}, "vocabulary_size: got 0, expected a whole"),
    ],
)
def test_sizes_that_are_none_are_named(sizes, message):
    inputs = np.zeros((1, 3) if "vocabulary_size" in sizes else (1, 3, 2), np.int32)
    with pytest.raises(ValueError) as error:
        SequenceModel(**{"cell": "gru", "hidden_size": 5, "output_size": 1} | sizes).init(
            jax.random.key(0), inputs
        )
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"word_dropout": 0.1}, "word_dropout: got 0.1, expected 0 without a vocabulary"),
        ({"embedding_dropout": 0.1}, "embedding_dropout: got 0.1, expected 0 without a vocabulary"),
        ({"zoneout": 1.0}, "zoneout_h: got 1.0, expected"),
        ({"weight_drop": -0.1}, "rate: got -0.1, expected"),
        ({"forget_bias": 1.0}, "forget_bias: got 1.0, expected None for the cell 'gru'"),
    ],
)
def test_options_that_do_not_fit_are_named(options, message):
    with pytest.raises(ValueError) as error:
        SequenceModel("gru", 5, 1, **options).init(jax.random.key(0), jnp.zeros((1, 3, 2)))
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("name", "preset", "inputs"),
    [("imdb", "tf2", np.zeros((1, 80), np.int32)), ("sin", "tf1", np.zeros((1, 20, 1), "f4"))],
)
def test_what_is_read_first_has_its_own_law(name, preset, inputs):
    """Keras's U(±0.05) of embeddings; TensorFlow 1's tutorial: N(0, 1) and a bias of 0.1."""
    program = script(name)
    model = program.make_model(program.PRESETS[preset])
    params = model.init(jax.random.key(3), inputs)["params"]
    if name == "imdb":
        table = np.abs(params["embed"]["embedding"])
        assert 0.0499 < table.max() <= 0.05 and abs(table.mean() - 0.025) < 1e-4
        return
    draws = [model.init(jax.random.key(n), inputs)["params"]["input"] for n in range(100)]
    assert all(np.all(drawn["bias"] == np.float32(0.1)) for drawn in draws)
    kernels = np.concatenate([drawn["kernel"].ravel() for drawn in draws])
    assert abs(kernels.std() - 1) < 4 / np.sqrt(2 * kernels.size)


def test_how_a_model_runs_reaches_its_layers():
    xs = jnp.ones((2, 6, 3))

    def program(**how):
        model = SequenceModel("lstm", 4, 1, **how)
        params = model.init(jax.random.key(0), xs)["params"]

        def total(params):
            return jnp.sum(model.apply({"params": params}, xs)[1])

        return str(jax.make_jaxpr(jax.grad(total))(params))

    assert "unroll=3" in program(unroll=3) and "unroll=3" not in program()
    assert "scan[" not in program(method="unrolled")
    assert program() == program(method="fused") != program(method="scan")


OTHERS = {
    "cell": "cifg", "hidden_size": 7, "num_layers": 3, "dropout": 0.11, "recurrent_dropout": 0.12,
    "weight_drop": 0.13, "zoneout": 0.14, "locked_dropout": 0.15, "embedding_dropout": 0.16,
    "word_dropout": 0.17, "learned_state": True, "method": "scan", "unroll": 3,
    "precision": "bfloat16", "vocabulary_size": 77,
}  # fmt: skip


@pytest.mark.parametrize("name", ["imdb", "mnist", "smnist"])
def test_every_option_of_a_model_reaches_it(name):
    module = script(name)
    fields = {field.name for field in dataclasses.fields(module.Config)}
    common = set(OTHERS) - {"embedding_dropout", "word_dropout", "vocabulary_size"}
    assert common <= fields
    for option in sorted(fields & set(OTHERS)):
        config = dataclasses.replace(module.Config(), **{option: OTHERS[option]})
        assert getattr(module.make_model(config), option) == OTHERS[option], option
    made = module.make_model(dataclasses.replace(module.Config(), init="torch", forget_bias="2.5"))
    assert (made.cell_init, made.forget_bias) == ("torch", 2.5)
    if name == "imdb":
        config = dataclasses.replace(module.Config(), embedding_size=9)
        assert module.make_model(config).input_size == 9


@pytest.mark.parametrize("every_step", [False, True])
def test_no_key_is_used_twice(every_step):
    """As JAX sees it, of all that draws."""
    rates = ("dropout", "recurrent_dropout", "weight_drop", "zoneout", "locked_dropout",
             "embedding_dropout", "word_dropout")  # fmt: skip
    model = SequenceModel(
        cell="lstm", hidden_size=3, output_size=2, num_layers=2, vocabulary_size=9, input_size=4,
        unknown_id=2, padding_id=0, every_step=every_step, **dict.fromkeys(rates, 0.2),
    )  # fmt: skip
    ids = np.arange(12).reshape(3, 4) % 9
    with jax.debug_key_reuse(True):
        params = jax.jit(model.init)(jax.random.key(0), ids)
        read = jax.jit(lambda params, key: model.apply(params, ids, key=key)[1])
        outputs = read(params, jax.random.key(1))
    assert np.isfinite(outputs).all()


@pytest.mark.parametrize("name", ["imdb", "mnist"])
def test_every_option_of_an_optimiser_reaches_it(name):
    """One update is the step size times g/(g + ε); Adam sees what was clipped."""
    module = script(name)
    epsilon = {"imdb": 1e-7, "mnist": 1e-8}[name]  # Keras's and TensorFlow 1's
    config = dataclasses.replace(module.Config(), learning_rate=0.3, clip_norm=0.5)
    asked = (dataclasses.replace(config, clip_norm=clip) for clip in (None, 0.5))
    free, bound = (module.make_optimiser(own, 4) for own in asked)
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam needs it
        g = jnp.float32(epsilon)
        updates, _ = free.update(g, free.init(g), g)
        root = np.sqrt(1 - 0.999)
        want = -0.3 * root * epsilon / (root * epsilon + epsilon)  # TensorFlow's form
        np.testing.assert_allclose(updates, want, rtol=1e-4)
        g = {"a": jnp.array([3.0, 0.0]), "b": jnp.array(4.0)}
        _, state = bound.update(g, bound.init(g), g)
    (mu,) = [part.mu for part in jax.tree.leaves(state, is_leaf=lambda s: hasattr(s, "mu"))
             if hasattr(part, "mu")]  # fmt: skip
    np.testing.assert_allclose(mu["a"], [0.03, 0.0], rtol=1e-5)  # 0.1 · 0.5 · 3/5
    np.testing.assert_allclose(mu["b"], 0.04, rtol=1e-5)


def test_the_tutorial_s_loss_has_two_softmaxes():
    module, rng = script("mnist"), np.random.default_rng(2)
    batch = {"image": rng.integers(0, 256, (5, 28, 28)).astype("u1"), "label": np.arange(5)}
    batch |= {"weight": np.ones(5, "f4")}
    for preset, twice in (("tf1", True), ("corrected", False)):
        config = dataclasses.replace(module.PRESETS[preset], hidden_size=6)
        model = module.make_model(config)
        params = model.init(jax.random.key(0), jnp.zeros((1, 28, 28)))["params"]
        z = np.float64(model.apply({"params": params}, batch["image"] / np.float32(255))[1])
        for _ in range(1 + twice):
            log_p = z - np.log(np.sum(np.exp(z), axis=1, keepdims=True))
            z = np.exp(log_p)
        want = -np.mean(log_p[np.arange(5), batch["label"]])
        got = module.make_loss(model, config)(params, batch)[0]
        assert float(got) == pytest.approx(want, rel=1e-5)


def test_padding_is_masked_where_it_is_asked_for():
    module = script("imdb")
    batch = {"ids": np.array([[0, 0, 0, 5, 6, 7], [4, 5, 6, 7, 8, 9]], np.int32)}
    batch |= {"label": np.array([1, 0]), "weight": np.ones(2, "f4")}
    config = dataclasses.replace(module.Config(), hidden_size=4, embedding_size=3)
    model = module.make_model(config)
    params = model.init(jax.random.key(0), jnp.asarray(batch["ids"]))["params"]
    for masked in (False, True):
        mask = batch["ids"] != 0 if masked else None
        z = np.float64(model.apply({"params": params}, batch["ids"], mask=mask)[1][:, 0])
        want = np.mean(np.log1p(np.exp(np.where(batch["label"] == 1, -z, z))))
        loss_fn = module.make_loss(model, dataclasses.replace(config, mask=masked))
        assert float(loss_fn(params, batch)[0]) == pytest.approx(want, rel=1e-5)
    assert masked and abs(z[0]) > 0


def test_reviews_are_cut_as_they_are_asked_for(monkeypatch):
    module, asked = script("imdb"), []
    loaded = SimpleNamespace(first=lambda limit: limit)

    def load(source, **how):
        asked.append((source, how))
        return loaded

    monkeypatch.setattr(module.imdb, "load", load)
    config = dataclasses.replace(
        module.Config(), data="offline", vocabulary_size=77, max_length=9, padding="post",
        truncating="post", validation_size=3, seed=5, limit=41,
    )  # fmt: skip
    assert module.load(config) == 41
    ((source, how),) = asked
    assert source == "offline" and how["num_words"] == 77
    names = ("max_length", "padding", "truncating", "validation_size", "seed")
    assert {name: how[name] for name in names} == {name: getattr(config, name) for name in names}
