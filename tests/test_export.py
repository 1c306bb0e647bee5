"""Programs for any batch and any number of steps, as ``jax.export`` makes them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax import export
from problems import NAMES, problem

from lstmjax import Bidirectional, bidirectional, linen, recurrent_noise, stack
from lstmjax.models import SequenceModel


def numbers(name, steps, batch):
    """``(layer, params, xs, state, rng)``."""
    layer, _, params, xs, state, _ = problem(name)
    rng = np.random.default_rng(steps * batch)
    state = oracle.tree_map(lambda s: rng.normal(size=(batch, s.shape[-1])), state)
    return layer, params, rng.normal(size=(steps, batch, xs.shape[-1])), state, rng


def check(run, *cases):
    """Exports ``run(*whole, *arrays)`` and compares it with itself on arrays of several sizes.

    Args:
      run: called with weights and with arrays whose shapes are told by their text.
      cases: ``(whole, shapes, arrays)`` each; the first one's whole and shapes are exported.
    """
    whole, shapes, arrays = cases[0]
    scope = export.SymbolicScope()
    specs = [
        jax.ShapeDtypeStruct(export.symbolic_shape(shape, scope=scope), array.dtype)
        for shape, array in zip(shapes, arrays, strict=True)
    ]
    exported = export.export(jax.jit(run))(*whole, *specs)
    for whole, _, arrays in cases:
        oracle.assert_close(exported.call(*whole, *arrays), run(*whole, *arrays), 1e-12)


@pytest.mark.parametrize("method", ["fused", "scan"])
@pytest.mark.parametrize("name", NAMES)
def test_a_layer_for_any_batch_and_any_number_of_steps(name, method, x64):
    def run(params, xs, mask, resets, lengths):
        options = {"mask": mask, "resets": resets, "lengths": lengths, "method": method}
        both = [layer(params, xs, reverse=reverse, **options) for reverse in (False, True)]
        return tuple(both)

    layer = problem(name).layer
    cases = []
    for steps, batch in ((7, 4), (3, 1), (20, 5)):
        _, params, xs, _, rng = numbers(name, steps, batch)
        marks = rng.random((2, steps, batch)) < 0.6
        lengths = rng.integers(0, steps + 1, batch)
        shapes = f"t, b, {xs.shape[-1]}", "t, b", "t, b", "b"
        cases.append(((params,), shapes, (xs, *marks, lengths)))
    check(run, *cases)


@pytest.mark.parametrize("shape", ["t, 4", "7, b", "t, b"])
def test_gradients(shape, x64):
    layer, params, xs, _, _ = numbers("lstm", 7, 4)

    def run(params, xs):
        return jax.grad(lambda *a: jnp.sum(layer(*a)[1] ** 2), (0, 1))(params, xs)

    check(run, ((params,), (f"{shape}, {xs.shape[-1]}",), (xs,)))


def test_larger_layers(x64):
    """Both directions; a stack; zoneout as in evaluation."""
    layer, params, xs, state, rng = numbers("lstm", 7, 4)
    above = params._replace(w_x=rng.normal(size=(state.h.shape[-1], params.w_x.shape[1])))

    def run(params, above, xs, lengths):
        noise = recurrent_noise(None, params, xs, zoneout_h=0.2, zoneout_c=0.3)
        two_ways = bidirectional(layer, Bidirectional(params, params), xs, lengths=lengths)
        return two_ways, stack(layer, (params, above), xs), layer(params, xs, noise=noise)

    cases = []
    for steps, batch in ((7, 4), (12, 3)):
        xs, rng = numbers("lstm", steps, batch)[2], np.random.default_rng(1)
        arrays = xs, rng.integers(0, steps + 1, batch)
        cases.append(((params, above), (f"t, b, {xs.shape[-1]}", "b"), arrays))
    check(run, *cases)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_a_model(cell, x64):
    model = SequenceModel(
        cell=cell, hidden_size=4, num_layers=2, output_size=3, vocabulary_size=20, input_size=5
    )
    cases = []
    for steps, batch in ((7, 4), (12, 3)):
        rng = np.random.default_rng(steps)
        words, mask = rng.integers(0, 20, (batch, steps)), rng.random((batch, steps)) < 0.7
        params = model.init(jax.random.key(0), words)["params"]
        cases.append(((jax.tree.map(np.float64, params),), ("b, t", "b, t"), (words, mask)))

    def run(params, words, mask):
        return model.apply({"params": params}, words, mask=mask)[1]

    check(run, *cases)


def test_a_layer_in_the_place_of_flax_s(x64):
    layer = linen.Bidirectional(linen.LSTM(features=4), linen.LSTM(features=4))
    cases = []
    for steps, batch in ((7, 4), (12, 3)):
        rng = np.random.default_rng(steps)
        xs, lengths = rng.normal(size=(batch, steps, 3)), rng.integers(0, steps + 1, batch)
        params = jax.tree.map(np.float64, layer.init(jax.random.key(0), xs))
        cases.append(((params,), ("b, t, 3", "b"), (xs, lengths)))
    check(lambda params, xs, lengths: layer.apply(params, xs, seq_lengths=lengths), *cases)


def test_a_truncation_needs_to_know_the_steps(x64):
    layer, params, xs, *_ = numbers("lstm", 7, 4)
    run = functools.partial(layer, truncation=(2, 4))
    spec = jax.ShapeDtypeStruct(export.symbolic_shape(f"t, 4, {xs.shape[-1]}"), xs.dtype)
    with pytest.raises(ValueError, match="^truncation: got .2, 4. with a symbol for T, expected"):
        export.export(jax.jit(run))(params, spec)
