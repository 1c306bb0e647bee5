"""How a golden case of anything that runs on TensorFlow is set up, differentiated and trained."""

import os
from typing import Any, NamedTuple

# Read when TensorFlow is imported: tf.compat.v1's cells live in tf_keras; oneDNN reorders sums.
os.environ["TF_USE_LEGACY_KERAS"] = "1"
os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["TF_ENABLE_ONEDNN_OPTS"] = "0"

import numpy as np
import tensorflow as tf
from problem import problem, target

tf.config.threading.set_intra_op_parallelism_threads(1)  # one order of summation
tf.config.threading.set_inter_op_parallelism_threads(1)
tf.get_logger().setLevel("ERROR")

TRAIN_STEPS = 20


class Model(NamedTuple):
    """A framework's recurrence, ready to be recorded.

    Attributes:
      variables: nested dict of tf.Variable, under the framework's names.
      run: run(x [T, B, D], states) → (hs [T, B, ·], final states), states {"0": {"h", "c"}, …}.
      sizes: for each layer a tuple of (P, H), one for each direction.
    """

    variables: dict
    run: Any
    sizes: list


def record(case, model, *, valid=None, train=None, **drawn):
    """Every array of a case; sets the model's variables.

    Args:
      case: its name.
      model: a ``Model``.
      valid: [T, B] bool, the steps at which the loss looks at ``hs``; None for all.
      train: None, or a function (gradients, variables) → None, that makes one optimiser step.
      drawn: keywords of ``problem.problem``.

    Returns:
      A nested dict of arrays, as ``golden.py`` describes it.
    """
    arrays = problem(case, model.variables, model.sizes, **drawn)
    if valid is not None:
        arrays["loss"]["hs"] *= valid[:, :, None]
    tf.nest.map_structure(lambda v, value: v.assign(value), model.variables, arrays["weights"])
    x, states = tf.nest.map_structure(tf.constant, (arrays["x"], arrays["state"]))
    with tf.GradientTape() as tape:
        tape.watch((x, states))
        hs, final = model.run(x, states)
        outputs = {"hs": hs, **final}
        terms = tf.nest.map_structure(
            lambda w, out: tf.reduce_sum(w * out), arrays["loss"], outputs
        )
        loss = tf.add_n(tf.nest.flatten(terms))
    grad = tape.gradient(loss, {"x": x, "state": states, "weights": model.variables})
    arrays |= numpy_of({"hs": hs, "final": final, "grad": grad})
    if train is not None:
        arrays["train"] = trained(model, x, states, target(arrays), train)
    return arrays


def trained(model, x, states, goal, update):
    """``TRAIN_STEPS`` of ``update`` on the mean squared distance of hs from ``goal``."""
    variables, losses = tf.nest.flatten(model.variables), []
    for _ in range(TRAIN_STEPS):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model.run(x, states)[0] - goal) ** 2)
        update(tape.gradient(loss, variables), variables)
        losses.append(loss.numpy())
    assert losses[-1] < 0.9 * losses[0], losses
    return {"target": goal, "loss": np.array(losses), "weights": numpy_of(model.variables)}


def numpy_of(tree):
    return tf.nest.map_structure(lambda leaf: np.array(leaf), tree)


def entry(load, model, options, **more):
    """A case's entry in the manifest."""
    single = [len(layer) for layer in model.sizes] == [1]
    return {"load": load, "stack": "layer" if single else "stack", "options": options, **more}


def assert_share(case, values, low=0.15, high=0.85):
    """A good part, but not all, of ``values`` (bool) must be true, or a case shows nothing."""
    share = np.mean(values)
    assert low <= share <= high, f"{case}: {share:.2f} of the values, expected {low} … {high}"
