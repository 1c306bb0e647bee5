"""Models with random numbers, and what ``diagnose`` says of them computed from the model itself."""

import jax
import jax.numpy as jnp
import numpy as np
from problems import QUICK

from lstmjax import diagnose, losses
from lstmjax.models import SequenceModel

B, T = 3, 6


def quick(function):
    return jax.jit(function, compiler_options=QUICK)


def random_model(rng, cell, dtype=np.float64, **options):
    """A model with random numbers, what it reads, and the loss of its last step."""
    options = {"num_layers": 1, "cell_init": "keras"} | options
    model = SequenceModel(cell, 4, 2, **options)
    ids = model.vocabulary_size
    inputs = rng.integers(0, ids, size=(B, T)) if ids else rng.normal(size=(B, T, 3)).astype(dtype)
    small = jnp.asarray(inputs if ids else inputs.astype(np.float32))
    like = jax.eval_shape(lambda: model.init(jax.random.key(0), small)["params"])
    params = jax.tree.map(lambda leaf: jnp.array(rng.normal(size=leaf.shape), dtype), like)
    targets = jnp.array(rng.normal(size=(B, 2)), dtype)
    return model, params, jnp.asarray(inputs), lambda y: losses.squared_error(y, targets)


def one_step(model, params, states, inputs_t, mask_t):
    """The model itself, over a sequence of one step: ``(states, outputs [B, O])``."""
    mask = None if mask_t is None else mask_t[:, None]
    states, y = model.apply({"params": params}, inputs_t[:, None], states, mask=mask)
    return states, y[:, 0] if model.every_step else y


def directly(model, params, inputs, loss, mask=None):
    """{field: [K]} of each layer, and all states [T+1, B, ·]: the gradient with respect to a
    number that is added to each state of the model's own run."""
    first = model.apply({"params": params}, inputs[:, :1], mask=jnp.zeros((len(inputs), 1), bool))
    over_time = jnp.swapaxes(inputs, 0, 1), None if mask is None else mask.T
    steps = inputs.shape[1]
    zeros = jax.tree.map(lambda s: jnp.zeros((steps, *s.shape), s.dtype), first[0])

    def run(added):
        def body(states, step):
            states, y = one_step(model, params, states, *step[1])
            states = jax.tree.map(jnp.add, states, step[0])
            return states, (y, states)

        _, (ys, states) = jax.lax.scan(body, first[0], (added, over_time))
        return jnp.sum(loss(ys[-1])), (ys[-1], states)

    gradients, (y, states) = quick(jax.grad(run, has_aux=True))(zeros)
    of_y = np.asarray(jax.grad(lambda y: jnp.sum(loss(y)))(y), np.float64)
    norms = []
    for number, layer in enumerate(gradients):
        found = {}
        for name, of_field in layer._asdict().items():
            of_field = np.array(of_field, np.float64)
            if name == "h" and number == len(gradients) - 1:  # read by the head, a matrix
                of_field[-1] = of_y @ np.asarray(params["head"]["kernel"], np.float64).T
            found[name] = np.linalg.norm(of_field, axis=-1).mean(axis=1)[::-1]
        norms.append(found)
    states = jax.tree.map(lambda a, s: np.concatenate([a[None], s]), first[0], states)
    return norms, states


def flow_of(model, params, inputs, loss, mask=None):
    run = quick(lambda p, x, m: diagnose.flow(model, p, x, loss, mask=m))
    return jax.tree.map(np.asarray, run(params, inputs, mask))


def radii(model, params, inputs, states, number):
    """[T, B]: NumPy's eigenvalues of the Jacobian of one layer's state in the model's own step."""
    step = quick(
        jax.jacrev(
            lambda s, x: jax.tree.map(lambda a: a[0], one_step(model, params, s, x, None)[0])
        )
    )
    found = np.zeros((inputs.shape[1], len(inputs)))
    for t, b in np.ndindex(found.shape):
        row = jax.tree.map(lambda a, t=t, b=b: jnp.asarray(a[t, b : b + 1]), states)
        blocks = step(row, inputs[b : b + 1, t])[number]
        rows = [np.concatenate([p[:, 0] for p in block[number]], axis=1) for block in blocks]
        found[t, b] = np.abs(np.linalg.eigvals(np.concatenate(rows))).max()
    return found


def dense(params, inputs):
    return inputs @ params["input"]["kernel"] + params["input"]["bias"][None, None]


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def lstm_gates(weights, xs, run):
    z = xs @ weights["w_x"] + run.h[:-1] @ weights["w_h"] + weights["b"]
    return {name: sigmoid(np.split(z, 4, -1)[k]) for name, k in (("i", 0), ("f", 1), ("o", 3))}


def gru_gates(weights, xs, run):
    z = xs @ weights["w_x"] + run.h[:-1] @ weights["w_h"] + weights["b"]
    return {name: sigmoid(np.split(z, 3, -1)[k]) for name, k in (("r", 0), ("z", 1))}
