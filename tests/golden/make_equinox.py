"""Golden vectors from Equinox: ``eqx.nn.LSTMCell``, scanned over time and mapped over the batch."""

import equinox as eqx
import jax
import jax.numpy as jnp
from golden import write
from problem import GRID, HIDDEN, SEED, problem, versions
from with_jax import ADAM, record


def case(name, *, use_bias=True, train=None, **problem_options):
    """One case: (arrays, manifest entry)."""
    cell = eqx.nn.LSTMCell(3, HIDDEN, use_bias=use_bias, dtype=jnp.float64, key=jax.random.key(0))
    names = ("weight_ih", "weight_hh", "bias") if use_bias else ("weight_ih", "weight_hh")

    def leaves(cell):
        return [getattr(cell, name) for name in names]

    def run(weights, x, state):
        filled = eqx.tree_at(leaves, cell, [weights[name] for name in names])

        def step(state, x_t):
            new = jax.vmap(filled)(x_t, state)
            return new, new[0]

        (h, c), hs = jax.lax.scan(step, (state["0"]["h"], state["0"]["c"]), x)
        return hs, {"0": {"h": h, "c": c}}

    shapes = dict(zip(names, leaves(cell), strict=True))
    arrays = record(run, problem(name, shapes, [[(HIDDEN, HIDDEN)]], **problem_options), train)
    entry = {"load": "equinox", "stack": "layer", "options": {}}
    return arrays, entry if train is None else {**entry, "train": train}


def main():
    cases = {
        "plain": case("plain"),
        "no_bias": case("no_bias", use_bias=False),
        "train_adam": case("train_adam", train=ADAM),
    }
    for name, (steps, batch) in GRID.items():
        cases[name] = case(name, steps=steps, batch=batch)
    found = versions("numpy", "jax", "jaxlib", "equinox", "optax")
    write("equinox", cases, script="make_equinox.py", versions=found, seed=SEED)


if __name__ == "__main__":
    main()
