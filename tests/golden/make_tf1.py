"""Golden vectors from TensorFlow 1's cells, BasicLSTMCell and LSTMCell, run as ``tf.compat.v1``."""

import re
import warnings

import numpy as np
from golden import write
from problem import GRID, HIDDEN, PROJECTION, SECOND, SEED, versions
from with_tensorflow import Model, assert_share, entry, record, tf

LENGTHS = (3, 7, 0, 5)
CLIP, PROJ_CLIP = {"cell_clip": 0.5}, {"proj_clip": 0.5}
PEEPHOLE, PROJECTED = {"use_peepholes": True}, {"num_proj": PROJECTION}

warnings.filterwarnings("ignore", message=".*is deprecated and will be removed")

v1 = tf.compat.v1.nn
v1_train = tf.compat.v1.train
State = v1.rnn_cell.LSTMStateTuple


# --- models --------------------------------------------------------------------------------------


def basic(**options):
    return v1.rnn_cell.BasicLSTMCell(HIDDEN, dtype=tf.float64, **options)


def full(units=HIDDEN, **options):
    return v1.rnn_cell.LSTMCell(units, dtype=tf.float64, **options)


def built(cell, inputs=3):
    """The cell's variables, by the names that they have in a checkpoint below the cell's own."""
    cell.build((None, inputs))
    return {re.sub(r"^.*lstm_cell(_\d+)?/|:0$", "", v.name): v for v in cell.variables}


def states_in(states):
    return tuple(State(states[n]["c"], states[n]["h"]) for n in sorted(states))


def states_out(states):
    return {str(n): {"h": state.h, "c": state.c} for n, state in enumerate(states)}


def one_layer(cell, lengths=None, bias=True):
    variables = built(cell)
    if not bias:
        del variables["bias"]  # TensorFlow's cells always have one: it keeps its initial zeros

    def run(x, states):
        (state,) = states_in(states)
        hs, final = v1.dynamic_rnn(cell, x, lengths, state, time_major=True)
        return hs, states_out([final])

    return Model(variables, run, [((cell.output_size, HIDDEN),)])


def two_layers():
    cells = [full(num_proj=PROJECTION), full(SECOND)]
    variables = {"cell_0": built(cells[0]), "cell_1": built(cells[1], PROJECTION)}
    both = v1.rnn_cell.MultiRNNCell(cells)

    def run(x, states):
        hs, final = v1.dynamic_rnn(both, x, None, states_in(states), time_major=True)
        return hs, states_out(final)

    return Model(variables, run, [((PROJECTION, HIDDEN),), ((SECOND, SECOND),)])


def bidirectional(lengths):
    fw, bw = (full(**PEEPHOLE, **PROJECTED) for _ in range(2))
    variables = {"fw": built(fw), "bw": built(bw)}

    def run(x, states):
        hs, final = v1.bidirectional_dynamic_rnn(
            fw, bw, x, lengths, *states_in(states), time_major=True
        )
        return tf.concat(hs, 2), states_out(final)

    return Model(variables, run, [((PROJECTION, HIDDEN),) * 2])


def cell_states(cell, arrays):
    """c after every step [T, B, H], from a plain loop over the cell."""
    (state,), states = states_in(arrays["state"]), []
    for x_t in arrays["x"]:
        _, state = cell(tf.constant(x_t), state)
        states.append(state.c)
    return np.stack(states)


# --- cases: name → (arrays, entry) ---------------------------------------------------------------


def plain_cases():
    model = one_layer(basic())
    for case in GRID:
        steps, batch = GRID[case]
        arrays = record(f"basic_{case}", model, steps=steps, batch=batch)
        yield f"basic_{case}", (arrays, entry("tf1", model, {}))
    note = "kernel alone: the cell's bias is zero, its forget bias is added as ever"
    model = one_layer(basic(), bias=False)
    yield "nobias", (record("nobias", model), entry("tf1", model, {}, note=note))
    model = two_layers()
    yield "two_layers", (record("two_layers", model), entry("tf1", model, {}))


def option_cases():
    forget = {"forget_bias": 0.7}
    table = {
        "basic": (basic(), {}),
        "basic_forget0": (basic(forget_bias=0.0), {"forget_bias": 0.0}),
        "lstmcell": (full(), {}),
        "peephole": (full(**PEEPHOLE), {}),
        "peephole_clip": (full(**PEEPHOLE, **CLIP), CLIP),
        "cell_clip": (full(**CLIP), CLIP),
        "projection": (full(**PROJECTED), {}),
        "projection_clip": (full(**PROJECTED, **PROJ_CLIP), PROJ_CLIP),
        "everything": (
            full(**PEEPHOLE, **PROJECTED, **CLIP, **PROJ_CLIP, **forget),
            CLIP | PROJ_CLIP | forget,
        ),
    }
    for case, (cell, options) in table.items():
        model = one_layer(cell)
        arrays = record(case, model)
        if "cell_clip" in options:
            c = cell_states(cell, arrays)
            np.testing.assert_allclose(c[-1], arrays["final"]["0"]["c"], rtol=1e-14)
            assert_share(f"{case} c", np.abs(c) == options["cell_clip"])
        if "proj_clip" in options:
            assert_share(f"{case} h", np.abs(arrays["hs"]) == options["proj_clip"])
        yield case, (arrays, entry("tf1", model, options))


def length_cases():
    lengths = np.array(LENGTHS, np.int64)
    note = "past its length a row's hs are zero and its state is held; length 0 keeps the initial"
    models = {
        "lengths": one_layer(full(**PEEPHOLE, **PROJECTED), lengths),
        "bidirectional_lengths": bidirectional(lengths),
    }
    for case, model in models.items():
        arrays = record(case, model, lengths=LENGTHS)
        past = np.arange(len(arrays["hs"]))[:, None] >= lengths
        assert (arrays["hs"][past] == 0).all()
        yield case, (arrays, entry("tf1", model, {}, note=note))


def train_cases():
    # Hyperparameters as tensors: these optimisers turn a Python float into a float32.
    rate = 1e-2
    of_adam = (tf.constant(number, tf.float64) for number in (rate, 0.9, 0.999, 1e-8))
    adam = v1_train.AdamOptimizer(*of_adam)
    model = one_layer(full(**PEEPHOLE))

    def step(grads, variables):
        adam.apply_gradients(zip(grads, variables, strict=True))

    how = {"optimizer": "adam", "learning_rate": rate, "b1": 0.9, "b2": 0.999, "eps": 1e-8}
    note = "Adam of TensorFlow: ε is added before the second moment's bias is corrected"
    arrays = record("train_adam", model, train=step)
    yield "train_adam", (arrays, entry("tf1", model, {}, train=how, note=note))
    yield clipped_sgd("train_sgd_clip", "clip_norm", 0.1)
    yield clipped_sgd("train_sgd_clip_each", "clip_norm_each", 0.05)


def clipped_sgd(case, kind, bound, rate=0.5):
    """20 steps of gradient descent, on gradients clipped all together or each by its own norm."""
    sgd = v1_train.GradientDescentOptimizer(tf.constant(rate, tf.float64))
    model = one_layer(full(**PEEPHOLE))
    norms = []

    def step(grads, variables):
        if kind == "clip_norm":
            norms.append(tf.linalg.global_norm(grads).numpy())
            grads, _ = tf.clip_by_global_norm(grads, bound)
        else:
            norms.extend(tf.norm(grad).numpy() for grad in grads)
            grads = [tf.clip_by_norm(grad, bound) for grad in grads]
        sgd.apply_gradients(zip(grads, variables, strict=True))

    arrays = record(case, model, train=step)
    assert_share(f"{case} norms", np.array(norms) > bound)
    how = {"optimizer": "sgd", "learning_rate": rate, kind: bound}
    note = {
        "clip_norm": "tf.clip_by_global_norm: the norm over all weights",
        "clip_norm_each": "tf.clip_by_norm: each weight's gradient by its own norm",
    }[kind]
    return case, (arrays, entry("tf1", model, {}, train=how, note=note))


if __name__ == "__main__":
    cases = dict([*plain_cases(), *option_cases(), *length_cases(), *train_cases()])
    write(
        "tf1",
        cases,
        script="make_tf1.py",
        versions=versions("numpy", "tensorflow", "tf_keras"),
        seed=SEED,
    )
