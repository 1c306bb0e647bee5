"""Golden vectors from Flax: linen's and nnx's LSTM cells under their own RNN, Bidirectional, scan.

Flax carries (c, h). It does not zero outputs beyond a row's length, and its final states are
those of the last valid step only where ``seq_lengths`` and ``return_carry`` are both given.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from golden import write
from problem import GRID, HIDDEN, LENGTHS, SECOND, SEED, problem, versions
from with_jax import ADAM, record

CLIPPED = {**ADAM, "clip_norm": 0.08}  # gradient · min(1, clip_norm/norm)
ONE, TWO = [[HIDDEN]], [[HIDDEN], [SECOND]]  # sizes of each layer's directions
BOTH, TWO_BOTH = [[HIDDEN] * 2], [[2, 2], [HIDDEN] * 2]  # few weights, as each is an entry


class InLine(nn.Module):
    """Layers made where they are called: the cells, not the RNNs, get names here."""

    @nn.compact
    def __call__(self, x, *, initial_carry, **options):
        carries = []
        for layer, carry in zip(TWO, initial_carry, strict=True):
            rnn = nn.RNN(nn.LSTMCell(layer[0]))
            carry, x = rnn(x, initial_carry=carry, **options)
            carries.append(carry)
        return tuple(carries), x


class FromSetup(nn.Module):
    """Layers made beforehand: {"layers_0": {"forward_rnn": {"cell": …}, …}, …}."""

    def setup(self):
        self.layers = [linen_both(sizes) for sizes in TWO_BOTH]

    def __call__(self, x, *, initial_carry, **options):
        carries = []
        for layer, carry in zip(self.layers, initial_carry, strict=True):
            carry, x = layer(x, initial_carry=carry, **options)
            carries.append(carry)
        return tuple(carries), x


def linen_both(sizes):
    return nn.Bidirectional(*(nn.RNN(nn.LSTMCell(size)) for size in sizes))


def carries_of(state, states):
    """{"0": {"h", "c"}, …} as Flax carries it: (c, h), a pair for two directions, per layer."""
    parts = iter([(state[n]["c"], state[n]["h"]) for n in state])
    layers = [tuple(next(parts) for _ in sizes) for sizes in states]
    return tuple(layer[0] if len(layer) == 1 else layer for layer in layers)


def state_of(carries):
    """The inverse, whatever the nesting."""
    c_and_h = jax.tree.leaves(carries)
    pairs = zip(c_and_h[::2], c_and_h[1::2], strict=True)
    return {str(n): {"h": h, "c": c} for n, (c, h) in enumerate(pairs)}


def case(name, make, *, sizes=ONE, options=None, train=None, **problem_options):
    """One case: (arrays, manifest entry).

    Args:
      name: of the case.
      make: function of [layer][direction] sizes -> (run_on, shapes of the weights); ``run_on``
        takes (weights, x [B, T, D], carries, lengths) and returns (carries, hs [B, T, ·]).
      sizes: [layer][direction] hidden sizes.
      options: entry of the manifest.
      train: settings of the optimiser.
      **problem_options: those of ``problem``.
    """
    run_on, shapes = make(sizes)
    states = [[(size, size) for size in layer] for layer in sizes]
    arrays = problem(name, shapes, states, **problem_options)
    lengths = arrays.get("lengths")

    def run(weights, x, state):
        carries = carries_of(state, sizes)
        carries, hs = run_on(weights, jnp.swapaxes(x, 0, 1), carries, lengths)
        return jnp.swapaxes(hs, 0, 1), state_of(carries)

    entry = {"stack": "layer" if sizes == ONE else "stack", "options": options or {}}
    if train is not None:
        entry["train"] = train
    return record(run, arrays, train), entry


def linen(make_module, inner=False):
    """``make`` for ``case``; ``inner`` cells' weights are taken out of their RNN."""

    def make(sizes):
        module = make_module(sizes)

        def call(variables, x, carries, method=module.apply, **options):
            one = not isinstance(module, InLine | FromSetup)
            carry = carries[0] if one else carries
            return method(variables, x, initial_carry=carry, return_carry=True, **options)

        def run_on(weights, x, carries, lengths):
            variables = {"params": {"cell": weights} if inner else weights}
            return call(variables, x, carries, seq_lengths=lengths)

        def init(key):
            return call(key, jnp.zeros((1, 1, 3)), zero_carries(sizes), module.init)["params"]

        shapes = jax.eval_shape(init, jax.random.key(0))
        return run_on, shapes["cell"] if inner else shapes

    return make


def zero_carries(sizes):
    flat = [size for layer in sizes for size in layer]
    zeros = {str(n): dict.fromkeys("hc", jnp.zeros((1, size))) for n, size in enumerate(flat)}
    return carries_of(zeros, sizes)


def linen_layer(cell=nn.LSTMCell, gate=nn.sigmoid, **options):
    """One nn.RNN whose cell's weights are the case's."""
    return linen(lambda sizes: nn.RNN(cell(sizes[0][0], gate_fn=gate), **options), inner=True)


def nnx_stack(cell):
    """``make`` for ``case``: an nnx.RNN, an nnx.Bidirectional, or an nnx.List of RNNs."""

    def make(sizes):
        rngs = nnx.Rngs(0)

        def rnn(features, hidden):
            return nnx.RNN(cell(features, hidden, rngs=rngs, param_dtype=jnp.float64))

        if sizes == BOTH:
            module = nnx.Bidirectional(rnn(3, HIDDEN), rnn(3, HIDDEN))
        elif sizes == TWO:
            module = nnx.List([rnn(3, HIDDEN), rnn(HIDDEN, SECOND)])
        else:
            module = rnn(3, HIDDEN)
        graph, state, rest = nnx.split(module, nnx.Param, ...)
        shapes = nnx.to_pure_dict(state)
        inner = sizes == ONE

        def run_on(weights, x, carries, lengths):
            tree = {"cell": weights} if inner else nnx.restore_int_paths(weights)
            filled = nnx.clone(state)
            nnx.replace_by_pure_dict(filled, tree)
            module = nnx.merge(graph, filled, rest)
            finals = []
            for layer, carry in zip(module if sizes == TWO else [module], carries, strict=True):
                more = {"initial_carry": carry, "seq_lengths": lengths, "return_carry": True}
                carry, x = layer(x, **more)
                finals.append(carry)
            return tuple(finals), x

        return run_on, shapes["cell"] if inner else shapes

    return make


def linen_cases():
    plain, padded, back = linen_layer(), {"lengths": LENGTHS}, {"options": {"reverse": True}}
    reverse = linen_layer(reverse=True, keep_order=True)
    both = linen(lambda sizes: linen_both(sizes[0]))
    hard = linen_layer(gate=jax.nn.hard_sigmoid)
    cases = {
        "plain": case("plain", plain),
        "optimized": case("optimized", linen_layer(nn.OptimizedLSTMCell)),
        "lengths": case("lengths", plain, **padded),
        "reverse": case("reverse", reverse, **back),
        "reverse_lengths": case("reverse_lengths", reverse, **back, **padded),
        "hard_sigmoid": case("hard_sigmoid", hard, options={"gate": "hard_sigmoid"}, scale=1.2),
        "two_layers": case("two_layers", linen(lambda sizes: InLine()), sizes=TWO),
        "bidirectional": case("bidirectional", both, sizes=BOTH),
        "bidirectional_lengths": case("bidirectional_lengths", both, sizes=BOTH, **padded),
        "two_layers_bidirectional": case(
            "two_layers_bidirectional", linen(lambda sizes: FromSetup()), sizes=TWO_BOTH, batch=6
        ),
        "train_adam": case("train_adam", plain, train=ADAM),
        "train_clipped_adam": case("train_clipped_adam", plain, train=CLIPPED),
    }
    for name, (steps, batch) in GRID.items():
        cases[name] = case(name, plain, steps=steps, batch=batch)
    assert_pieces(cases["hard_sigmoid"][0])
    return cases


def assert_pieces(arrays):
    """Some gates lie below, some within and some above the linear piece of a hard sigmoid."""
    before = np.concatenate([arrays["state"]["0"]["h"][None], arrays["hs"][:-1]])
    weights = arrays["weights"]
    for gate in "ifo":
        from_x = arrays["x"] @ weights["i" + gate]["kernel"]
        z = from_x + before @ weights["h" + gate]["kernel"] + weights["h" + gate]["bias"]
        shares = [np.mean(z < -3), np.mean(np.abs(z) < 3), np.mean(z > 3)]
        assert min(shares) > 0.02, (gate, shares)


def nnx_cases(cell):
    make, padded = nnx_stack(cell), {"lengths": LENGTHS}
    return {
        "plain": case("plain", make),
        "lengths": case("lengths", make, **padded),
        "two_layers": case("two_layers", make, sizes=TWO),
        "bidirectional": case("bidirectional", make, sizes=BOTH),
        "bidirectional_lengths": case("bidirectional_lengths", make, sizes=BOTH, **padded),
        "train_adam": case("train_adam", make, train=ADAM),
    }


def main():
    found = versions("numpy", "jax", "jaxlib", "flax", "optax")
    made = {
        "flax_linen": linen_cases(),
        "flax_nnx": nnx_cases(nnx.LSTMCell),
        "flax_nnx_optimized": nnx_cases(nnx.OptimizedLSTMCell),
    }
    for name, cases in made.items():
        cases = {key: (arrays, {"load": name, **entry}) for key, (arrays, entry) in cases.items()}
        write(name, cases, script="make_flax.py", versions=found, seed=SEED)


if __name__ == "__main__":
    main()
