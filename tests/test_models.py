"""The models: sizes of the source programs, and what they compute, against the core's functions."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lstmjax import GRUParams, LSTMParams, LSTMState, RNNParams, gru, lstm, rnn, variational_dropout
from lstmjax.models import SequenceModel

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
