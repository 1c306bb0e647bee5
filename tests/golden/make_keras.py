"""Golden vectors from Keras 3 on TensorFlow, and one from tf_keras for its older hard sigmoid."""

# First, because it sets what TensorFlow and Keras read when they are imported.
from with_tensorflow import Model, assert_share, entry, record, tf

# isort: split
import keras
import numpy as np
import tf_keras
from golden import write
from problem import GRID, HIDDEN, SECOND, SEED, versions

keras.config.set_floatx("float64")
SEQUENCES = {"return_sequences": True, "return_state": True, "dtype": "float64"}
MASKS = {  # a row of the batch each, from the first step to the last
    "left": ("1111111", "0000000", "0000111", "0011111"),
    "right": ("1111111", "0000000", "1110000", "1111100"),
    "holes": ("1111111", "0000000", "0101100", "1100011"),
}
HELD = "at invalid steps the previous output, zero before the first valid one; the state is held"
ZERO = "at invalid steps zero (Bidirectional sets zero_output_for_mask); the state is held"


# --- models --------------------------------------------------------------------------------------


def lstm(units=HIDDEN, **options):
    return keras.layers.LSTM(units, **SEQUENCES, **options)


def both_ways(units=HIDDEN):
    return keras.layers.Bidirectional(lstm(units))


def mask_of(kind):
    """[T, B] bool."""
    return np.array([[step == "1" for step in row] for row in MASKS[kind]]).T


def variables_of(layers):
    """Nested dict of tf.Variable by the names of the layers (of the weights, if there is one)."""
    tree = {}
    for layer in layers:
        if isinstance(layer, keras.layers.Bidirectional):
            parts = layer.forward_layer, layer.backward_layer
            tree[layer.name] = {part.name: weights_of(part.cell) for part in parts}
        else:
            tree[layer.name] = weights_of(layer.cell)
    ((_, only), *more) = tree.items()
    return tree if more or "kernel" not in only else only


def weights_of(cell):
    found = {name: getattr(cell, name) for name in ("kernel", "recurrent_kernel", "bias")}
    # tf_keras holds variables of TensorFlow, Keras 3 its own around them.
    return {
        name: v if isinstance(v, tf.Variable) else v.value
        for name, v in found.items()
        if v is not None
    }


def model(*layers, mask=None):
    """Layers one upon the other, each under the same mask [T, B]."""
    y = np.zeros((1, 1, 3))
    for layer in layers:
        y, *_ = layer(y)
    mask = {} if mask is None else {"mask": tf.constant(mask.T)}
    directions = [1 + isinstance(layer, keras.layers.Bidirectional) for layer in layers]

    def run(x, states):
        y, final = tf.transpose(x, (1, 0, 2)), []
        initial = [states[n][part] for n in sorted(states) for part in "hc"]
        for layer, ways in zip(layers, directions, strict=True):
            mine = slice(len(final), len(final) + 2 * ways)
            y, *last = layer(y, initial_state=initial[mine], **mask)
            final += last
            if getattr(layer, "go_backwards", False):
                y = tf.reverse(y, [1])  # Keras gives them in the order of running
        pairs = zip(final[::2], final[1::2], strict=True)
        return tf.transpose(y, (1, 0, 2)), {
            str(n): {"h": h, "c": c} for n, (h, c) in enumerate(pairs)
        }

    units = [getattr(layer, "forward_layer", layer).units for layer in layers]
    sizes = [((n, n),) * ways for n, ways in zip(units, directions, strict=True)]
    return Model(variables_of(layers), run, sizes)


# --- cases: name → (arrays, entry) ---------------------------------------------------------------


def plain_cases():
    layer = model(lstm())
    arrays = record("plain", layer)
    assert_both_implementations("plain", arrays)
    yield "plain", (arrays, entry("keras", layer, {}))
    nobias = model(lstm(use_bias=False))
    yield "nobias", (record("nobias", nobias), entry("keras", nobias, {}))
    layer = model(lstm())
    for case, (steps, batch) in GRID.items():
        arrays = record(case, layer, steps=steps, batch=batch)
        yield case, (arrays, entry("keras", layer, {}))
    layer = model(lstm(go_backwards=True))
    note = "go_backwards, with hs turned round again: hs[t] belongs to x[t]"
    yield "reverse", (record("reverse", layer), entry("keras", layer, {"reverse": True}, note=note))


def assert_both_implementations(case, arrays):
    """Keras can compute the gates together (2, its default) or one by one (1)."""
    for implementation in (1, 2):
        again = record(case, model(lstm(implementation=implementation, use_cudnn=False)))
        for a, b in zip(tf.nest.flatten(arrays), tf.nest.flatten(again), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


def hard_sigmoid_cases():
    # Keras 3: x/6 + 0.5 between ±3; before it 0.2x + 0.5 between ±2.5.
    new = lstm(recurrent_activation="hard_sigmoid")
    old = tf_keras.layers.LSTM(HIDDEN, recurrent_activation="hard_sigmoid", **SEQUENCES)
    for case, layer, edge in (("hard_sigmoid", new, 3.0), ("hard_sigmoid_keras1", old, 2.5)):
        layer = model(layer)
        arrays = record(case, layer, scale=1.6)
        z = gates_of(arrays)
        for piece in (z < -edge, np.abs(z) < edge, z > edge):
            assert_share(case, piece, 0.1, 0.8)
        assert np.abs(np.abs(z) - edge).min() > 1e-6  # nothing on a kink
        yield case, (arrays, entry("keras", layer, {"gate": case}))


def gates_of(arrays):
    """What goes into the gates i, f and o, from Keras's own outputs."""
    weights = arrays["weights"]
    h_tm1 = np.concatenate([arrays["state"]["0"]["h"][None], arrays["hs"][:-1]])
    z = arrays["x"] @ weights["kernel"] + h_tm1 @ weights["recurrent_kernel"] + weights["bias"]
    i, f, _, o = np.split(z, 4, axis=-1)
    return np.stack([i, f, o])


def mask_cases():
    for kind in MASKS:
        yield masked(f"mask_{kind}", kind)
    yield masked("mask_right_reverse", "right", reverse=True)


def masked(case, kind, reverse=False):
    mask = mask_of(kind)
    layer = model(lstm(go_backwards=reverse), mask=mask)
    arrays = record(case, layer, valid=mask) | {"mask": mask}
    expected = np.zeros_like(arrays["hs"][0])
    for t in reversed(range(len(mask))) if reverse else range(len(mask)):
        expected = np.where(mask[t, :, None], arrays["hs"][t], expected)
        np.testing.assert_array_equal(arrays["hs"][t], expected)
    options = {"reverse": True} if reverse else {}
    return case, (arrays, entry("keras", layer, options, note=HELD))


def stack_cases():
    keras.utils.clear_session()  # so that layers are called lstm, lstm_1, … again
    yield stacked("two_layers", model(lstm(), lstm(SECOND)))
    keras.utils.clear_session()
    yield stacked("bidirectional", model(both_ways()))
    keras.utils.clear_session()
    yield stacked("two_layers_bidirectional", model(both_ways(), both_ways(SECOND)))
    keras.utils.clear_session()
    case, mask = "bidirectional_mask", mask_of("holes")
    layer = model(both_ways(), mask=mask)
    arrays = record(case, layer, valid=mask) | {"mask": mask}
    assert (arrays["hs"][~mask] == 0).all()
    yield case, (arrays, entry("keras", layer, {}, note=ZERO))


def stacked(case, layers):
    return case, (record(case, layers), entry("keras", layers, {}))


def train_cases():
    adam = {"optimizer": "adam", "learning_rate": 1e-2, "b1": 0.9, "b2": 0.999, "eps": 1e-7}
    note = "Adam of Keras: ε is added before the second moment's bias is corrected"
    # As NumPy numbers: of a Python float, Keras would raise its float32 to the power of the step.
    betas = np.float64(adam["b1"]), np.float64(adam["b2"])
    yield trained("train_adam", keras.optimizers.Adam(1e-2, *betas), train=adam, note=note)
    sgd = {"optimizer": "sgd", "learning_rate": 4.0}
    yield trained("train_sgd", keras.optimizers.SGD(4.0), train=sgd)


def trained(case, optimizer, **about):
    layer = lstm()
    recurrence = model(layer)
    of_keras = {v.value.ref(): v for v in layer.trainable_variables}

    def step(grads, variables):
        optimizer.apply(grads, [of_keras[v.ref()] for v in variables])

    arrays = record(case, recurrence, train=step)
    return case, (arrays, entry("keras", recurrence, {}, **about))


if __name__ == "__main__":
    kinds = plain_cases, hard_sigmoid_cases, mask_cases, stack_cases, train_cases
    write(
        "keras",
        dict(case for kind in kinds for case in kind()),
        script="make_keras.py",
        versions=versions("numpy", "tensorflow", "keras", "tf_keras"),
        seed=SEED,
    )
