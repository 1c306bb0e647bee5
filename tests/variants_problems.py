"""The variants of the LSTM with random numbers, for their tests."""

import functools

import jax
import numpy as np
import oracle
import variants_oracle as slow
from problems import QUICK

from lstmjax import LSTMParams, LSTMState, variants
from lstmjax.dropout import Noise
from lstmjax.variants import VARIANTS, FGRParams, FGRState, LayerNormParams

T, B, D, H, P = 5, 3, 3, 4, 2
OWN = [name for name in VARIANTS if name not in ("lstm", "peephole")]
CLIPS = {"cell_clip": 0.8, "proj_clip": 0.4}
MIXED = {"gate": "hard_sigmoid", "candidate": "relu", "output": "linear"}
LAYERS = {name: VARIANTS[name].layer for name in OWN} | {"mixed": variants.activations(**MIXED)}
STEPS = {name: getattr(variants, f"{name}_step", None) for name in OWN} | {
    "hard_sigmoid": variants.activations_step("hard_sigmoid"),
    "keras1": variants.activations_step("hard_sigmoid_keras1"),
    "mixed": variants.activations_step(**MIXED),
}


def run(function, *arguments, **options):
    """``function`` as one program."""
    return jax.jit(functools.partial(function, **options), compiler_options=QUICK)(*arguments)


def values_and_gradients(layer, weights, *arguments):
    """A layer's outputs, and the gradients of Σ weights·outputs in all ``arguments``."""

    def loss(*arguments):
        outputs = layer(*arguments)
        return oracle.weighted_sum(weights, outputs), outputs

    differentiated = jax.value_and_grad(loss, tuple(range(len(arguments))), has_aux=True)
    (_, outputs), gradients = run(differentiated, *arguments)
    return outputs, gradients


def random_params(rng, name, everything):
    gates = len(slow.BLOCKS.get(name, "ifgo"))
    rows, proj = len(slow.PEEPHOLES.get(name, "ifo")), P if everything else H
    normal = lambda *shape: rng.normal(size=shape)  # noqa: E731
    extras = (normal(rows, H), normal(H, P)) if everything else (None, None)
    params = normal(D, gates * H), normal(proj, gates * H), normal(gates * H), *extras
    if name == "fgr":
        return FGRParams(*params, normal(3 * H, 3 * H))
    if name == "layer_norm":
        return LayerNormParams(*params, normal(4 * H), normal(4 * H), normal(H), normal(H))
    return LSTMParams(*params)


def random_state(rng, name, proj):
    kind = FGRState if name == "fgr" else LSTMState
    return kind(rng.normal(size=(B, proj)), *rng.normal(size=(len(kind._fields) - 1, B, H)))


@functools.cache
def problem(name, everything):
    """(params, xs, state), weights of a loss on all outputs, and options.

    Everything: peepholes, projection, both clips, a mask with holes, resets to a state, backwards,
    masks of noise (any numbers, not only 0 and 1/(1 − rate)) and zoneout.
    """
    rng = np.random.default_rng(90)
    proj = P if everything else H
    params, xs = random_params(rng, name, everything), rng.normal(size=(T, B, D))
    state, final, reset_to = (random_state(rng, name, proj) for _ in range(3))
    weights = (final, rng.normal(size=(T, B, proj)))
    if not everything:
        return (params, xs, state), weights, {}
    gates = len(slow.BLOCKS.get(name, "ifgo"))
    masks = (rng.uniform(0.3, 1.7, size=(n, B, w)) for n, w in ((gates, D), (gates, P), (T, P)))
    noise = Noise(*masks, *(rng.random((T, B, w)) < 0.3 for w in (P, H)))
    over_time = {
        "mask": np.array([[1, 1, 0, 1, 1], [0, 1, 1, 1, 0], [1, 1, 1, 1, 1]]).T,
        "resets": np.array([[0, 0, 1, 1, 0], [1, 0, 0, 0, 1], [0, 1, 0, 0, 0]]).T,
    }
    options = {**CLIPS, **over_time, "reset_to": reset_to, "reverse": True, "noise": noise}
    return (params, xs, state), weights, options


@functools.cache
def expected(name, everything):
    """The oracle's outputs, and the gradients of Σ weights·outputs in (params, xs, state)."""
    arguments, weights, options = problem(name, everything)

    def loss(*arguments):
        return oracle.weighted_sum(weights, slow.layer(name, *arguments, **options))

    outputs = slow.layer(name, *arguments, **options)
    return outputs, oracle.gradients(loss, *arguments)


def draw(init_cell, key, inputs=D, hidden=H, **options):
    return run(lambda key: init_cell(key, inputs, hidden, **options), key)
