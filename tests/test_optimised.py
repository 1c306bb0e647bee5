"""Layers as XLA optimises them by default: in other tests it optimises nothing (conftest.py)."""

import functools

import jax
import numpy as np
import oracle
import pytest
import variants_problems
from problems import NAMES, OPTIMISED, holes_and_resets, problem


def values_and_gradients(layer, weights, *arguments):
    def loss(*arguments):
        outputs = layer(*arguments)
        return oracle.weighted_sum(weights, outputs), outputs

    differentiated = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)
    (_, outputs), gradients = jax.jit(differentiated, compiler_options=OPTIMISED)(*arguments)
    return outputs, gradients


@functools.cache
def asked(name):
    """(layer, weights, arguments), and the oracle's outputs and gradients."""
    layer, slow, params, xs, state, weights = problem(name)
    mask, resets = holes_and_resets()
    options = {"mask": mask, "resets": resets}

    def loss(*arguments):
        return oracle.weighted_sum(weights, slow(*arguments, **options))

    arguments = params, xs, state
    expected = slow(*arguments, **options), oracle.gradients(loss, *arguments)
    return (functools.partial(layer, **options), weights, arguments), expected


@pytest.mark.parametrize("method", ["fused", "scan"])
@pytest.mark.parametrize("name", NAMES)
def test_a_layer_is_the_oracles(name, method, x64):
    (layer, weights, arguments), expected = asked(name)
    layer = functools.partial(layer, method=method)
    oracle.assert_close(values_and_gradients(layer, weights, *arguments), expected, 1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_a_layer_in_float32_is_the_oracles(name):
    (layer, *given), expected = asked(name)
    given = jax.tree.map(np.float32, given)
    oracle.assert_close(values_and_gradients(layer, given[0], *given[1]), expected, 1e-5)


@pytest.mark.parametrize("name", ["refine", "fgr", "layer_norm"])
def test_a_variant_is_the_oracles(name, x64):
    arguments, weights, options = variants_problems.problem(name, True)
    layer = functools.partial(variants_problems.LAYERS[name], **options)
    got = values_and_gradients(layer, weights, *arguments)
    oracle.assert_close(got, variants_problems.expected(name, True), 1e-10)
