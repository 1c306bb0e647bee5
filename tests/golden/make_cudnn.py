"""Golden vectors in cuDNN's weight layout, from ``jax.experimental.rnn.lstm_ref`` on the CPU.

``lstm_ref`` is JAX's own statement of what cuDNN computes. The weights are the flat vector that
cuDNN takes; unlike cuDNN, and like all cases here, x and the outputs are stored time first.
"""

import jax.numpy as jnp
from golden import write
from jax.experimental import rnn
from problem import HIDDEN, LENGTHS, SEED, problem, versions
from with_jax import record


def case(name, *, layers=1, bidirectional=False, lengths=None):
    """One case: (arrays, manifest entry)."""
    sizes = {"input_size": 3, "hidden_size": HIDDEN, "num_layers": layers}
    sizes["bidirectional"] = bidirectional
    shapes = {"weights": (rnn.get_num_params_in_lstm(**sizes),)}
    states = [[(HIDDEN, HIDDEN)] * (1 + bidirectional)] * layers
    arrays = problem(name, shapes, states, lengths=lengths)
    steps, batch = arrays["x"].shape[:2]
    until = jnp.asarray(lengths or (steps,) * batch, jnp.int32)

    def run(weights, x, state):
        h, c = (jnp.stack([part[name] for part in state.values()]) for name in "hc")
        unpacked = rnn.unpack_lstm_weights(weights["weights"], **sizes)
        options = {**sizes, "dropout": 0.0}
        hs, h, c = rnn.lstm_ref(jnp.swapaxes(x, 0, 1), h, c, *unpacked, until, *in_order(options))
        return jnp.swapaxes(hs, 0, 1), {n: {"h": h[int(n)], "c": c[int(n)]} for n in state}

    entry = {"load": "cudnn", "stack": "stack", "options": {}, **sizes}
    return record(run, arrays), entry


def in_order(options):
    """``lstm_ref``'s static arguments have to come by position."""
    names = "input_size", "hidden_size", "num_layers", "dropout", "bidirectional"
    return [options[name] for name in names]


def main():
    both = {"layers": 2, "bidirectional": True}
    cases = {
        "plain": case("plain"),
        "lengths": case("lengths", lengths=LENGTHS),
        "two_layers_bidirectional": case("two_layers_bidirectional", **both),
        "bidirectional_lengths": case("bidirectional_lengths", bidirectional=True, lengths=LENGTHS),
    }
    found = versions("numpy", "jax", "jaxlib")
    write("cudnn", cases, script="make_cudnn.py", versions=found, seed=SEED)


if __name__ == "__main__":
    main()
