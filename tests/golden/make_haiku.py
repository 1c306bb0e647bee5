"""Golden vectors from Haiku: ``hk.LSTM``, alone and in ``hk.DeepRNN``, under ``hk.dynamic_unroll``.

Haiku adds its forget bias of 1 at run time: it is not in the weights.
"""

import haiku as hk
import jax
import jax.numpy as jnp
from golden import write
from problem import GRID, HIDDEN, SECOND, SEED, problem, versions
from with_jax import ADAM, record


def unroll(sizes, x, state):
    """x [T, B, D], {"0": {"h", "c"}, …} -> (hs [T, B, ·], final states)."""
    start = [hk.LSTMState(hidden=part["h"], cell=part["c"]) for part in state.values()]
    if len(sizes) == 1:
        hs, last = hk.dynamic_unroll(hk.LSTM(sizes[0]), x, start[0])
        final = [last]
    else:
        core = hk.DeepRNN([hk.LSTM(size) for size in sizes])
        hs, final = hk.dynamic_unroll(core, x, tuple(start))
    return hs, {str(n): {"h": part.hidden, "c": part.cell} for n, part in enumerate(final)}


def case(name, *, sizes=(HIDDEN,), train=None, **problem_options):
    """One case: (arrays, manifest entry)."""
    transformed = hk.without_apply_rng(hk.transform(lambda x, state: unroll(sizes, x, state)))
    zeros = {str(n): dict.fromkeys("hc", jnp.zeros((1, size))) for n, size in enumerate(sizes)}
    shapes = jax.eval_shape(transformed.init, jax.random.key(0), jnp.zeros((1, 1, 3)), zeros)
    alone = len(sizes) == 1
    if alone:
        shapes = shapes["lstm/linear"]

    def run(weights, x, state):
        return transformed.apply({"lstm/linear": weights} if alone else weights, x, state)

    states = [[(size, size)] for size in sizes]
    arrays = record(run, problem(name, shapes, states, **problem_options), train)
    entry = {"load": "haiku", "stack": "layer" if alone else "stack", "options": {}}
    return arrays, entry if train is None else {**entry, "train": train}


def main():
    cases = {
        "plain": case("plain"),
        "two_layers": case("two_layers", sizes=(HIDDEN, SECOND)),
        "train_adam": case("train_adam", train=ADAM),
    }
    for name, (steps, batch) in GRID.items():
        cases[name] = case(name, steps=steps, batch=batch)
    found = versions("numpy", "jax", "jaxlib", "dm-haiku", "optax")
    write("haiku", cases, script="make_haiku.py", versions=found, seed=SEED)


if __name__ == "__main__":
    main()
