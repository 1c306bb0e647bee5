"""What the golden scripts of the JAX frameworks share: outputs, gradients and training in float64.

A framework comes in as ``run(weights, x, state) -> (hs [T, B, ·], final)``, with ``state`` and
``final`` as in the files: {"0": {"h", "c"}, …}.
"""

import jax
import jax.numpy as jnp
import optax
from problem import target

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_platforms", "cpu")

STEPS = 20
ADAM = {"optimizer": "adam", "learning_rate": 1e-2, "b1": 0.9, "b2": 0.999, "eps": 1e-8}


def record(run, arrays, train=None):
    """Adds to the given arrays what the framework computes of them.

    Args:
      run: the framework, as above.
      arrays: from ``problem.problem``.
      train: None or the optimiser's settings as in the manifest.

    Returns:
      The nested dict of all arrays of the case.
    """

    def loss(weights, x, state):
        hs, final = run(weights, x, state)
        products = jax.tree.map(lambda a, b: jnp.sum(a * b), arrays["loss"], {"hs": hs, **final})
        return sum(jax.tree.leaves(products)), (hs, final)

    given = arrays["weights"], arrays["x"], arrays["state"]
    gradients, (hs, final) = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*given)
    grad = dict(zip(("weights", "x", "state"), gradients, strict=True))
    out = {**arrays, "hs": hs, "final": final, "grad": grad}
    return out if train is None else {**out, "train": _train(run, arrays, train)}


def _train(run, arrays, settings):
    goal = target(arrays)
    clip = settings.get("clip_norm")
    numbers = (settings[name] for name in ("learning_rate", "b1", "b2", "eps"))
    adam = optax.adam(*numbers)
    tx = adam if clip is None else optax.chain(optax.clip_by_global_norm(clip), adam)

    def loss(weights):
        hs, _ = run(weights, arrays["x"], arrays["state"])
        return jnp.mean((hs - goal) ** 2)

    @jax.jit
    def step(weights, opt_state):
        value, gradient = jax.value_and_grad(loss)(weights)
        updates, opt_state = tx.update(gradient, opt_state, weights)
        return optax.apply_updates(weights, updates), opt_state, value, optax.global_norm(gradient)

    weights = jax.tree.map(jnp.asarray, arrays["weights"])
    opt_state, losses, norms = tx.init(weights), [], []
    for _ in range(STEPS):
        weights, opt_state, value, norm = step(weights, opt_state)
        losses.append(value)
        norms.append(norm)
    # Adam does not see a gradient that is always scaled alike, so only some steps may be clipped.
    assert clip is None or min(norms) < clip < max(norms), (min(norms), max(norms))
    return {"target": goal, "loss": jnp.stack(losses), "weights": weights}
