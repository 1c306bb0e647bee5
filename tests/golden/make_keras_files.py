"""Small files as Keras 3, tf_keras and Keras 1 write them, for the tests of lstmjax/keras_files.py.

Run in an environment with keras, tensorflow-cpu, tf_keras and h5py (versions in the manifest):

    python tests/golden/make_keras_files.py

Keras and tf_keras write the files themselves. Keras 1 no longer runs on a current Python, so its
file is written here with h5py, names and order as its ``save_model`` and ``LSTM.build`` make them.

Beside the files: ``expected.npz``, arrays ``file|layer|direction|entry`` (layers and directions
numbered) taken from the models before saving, and for Keras 3's model ``file|x`` [B, T, D] and
``file|y`` [B, T, ·], what it gives for x in float32; and ``manifest.json`` with the versions and
sums.
"""

import hashlib
import json
import os
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import h5py
import keras
import numpy as np
import tensorflow as tf
import tf_keras

FOLDER = Path(__file__).resolve().parent / "keras_files"
SEED = 20240517
STEPS, BATCH, INPUTS = 4, 2, 3


def model(k, gate):
    """A model of ``k`` (keras or tf_keras) whose layers are not in alphabetical order."""
    inputs = k.Input((STEPS, INPUTS))
    options = {"return_sequences": True, "recurrent_activation": gate}
    inner = k.Sequential(
        [k.Input((STEPS, 4)), k.layers.LSTM(2, use_bias=False, name="deep", **options)],
        name="inner",
    )
    hs = k.layers.LSTM(4, name="reader", **options)(inputs)
    hs = inner(hs)
    hs = k.layers.Bidirectional(k.layers.LSTM(3, **options), name="both")(hs)
    return k.Model(inputs, [k.layers.Dense(1, name="head")(hs), hs])


def cells(k):
    """A model of one RNN layer of two cells."""
    stacked = [k.layers.LSTMCell(2), k.layers.LSTMCell(3)]
    return k.Sequential([k.Input((STEPS, INPUTS)), k.layers.RNN(stacked, name="cells")])


def plain(k):
    """Two layers named by Keras, and a head."""
    layers = [k.layers.LSTM(h, return_sequences=True) for h in (3, 2)]
    return k.Sequential([k.Input((STEPS, INPUTS)), *layers, k.layers.Dense(1)])


def fill(built, rng):
    built.set_weights([rng.normal(size=w.shape).astype(np.float32) for w in built.get_weights()])
    return built


def kernels(layer):
    """Per layer and direction, what get_weights lists for a recurrent layer."""
    weights = layer.get_weights()
    number = 2 if len(weights) == 2 else 3
    return [weights[k : k + number] for k in range(0, len(weights), number)]


def note(expected, name, layers):
    """``layers``: per layer a list of directions, each a list of arrays."""
    for k, directions in enumerate(layers):
        for side, arrays in enumerate(directions):
            entries = ("kernel", "recurrent_kernel", "bias")
            for entry, array in zip(entries, arrays, strict=False):
                expected[f"{name}|{k}|{side}|{entry}"] = array


def keras1(path, rng, expected):
    """LSTM (weights by gate), LSTM (``consume_less="gpu"``), Bidirectional LSTM and Dense."""
    kinds = [("lstm_1", 3, 2), ("lstm_2", 2, 4), ("bidirectional_1", 4, 3)]
    layers = []
    with h5py.File(path, "w") as file:
        config = []
        group = file.create_group("model_weights")
        group.attrs["layer_names"] = [name.encode() for name, *_ in kinds] + [b"dense_1"]
        for name, size, hidden in kinds:
            both = name.startswith("bidirectional")
            sides = ["forward_lstm_3", "backward_lstm_3"] if both else [name]
            below, names, directions = group.create_group(name), [], []
            for side in sides:
                gates = {
                    gate: [
                        rng.normal(size=s).astype(np.float32)
                        for s in ((size, hidden), (hidden, hidden), (hidden,))
                    ]
                    for gate in "icfo"
                }
                fused = [np.concatenate([gates[g][k] for g in "ifco"], axis=-1) for k in range(3)]
                stored = {f"{side}_{kind}": fused[k] for k, kind in enumerate("WUb")}
                if name != "lstm_2":
                    stored = {
                        f"{side}_{kind}_{gate}": gates[gate][k]
                        for gate in "icfo"
                        for k, kind in enumerate("WUb")
                    }
                for weight, array in stored.items():
                    below[weight] = array
                names += stored
                directions.append(fused)
            below.attrs["weight_names"] = [weight.encode() for weight in names]
            layers.append(directions)
            of_lstm = {"name": sides[0], "inner_activation": "hard_sigmoid", "stateful": False}
            layer = {"class_name": "LSTM", "config": of_lstm}
            wrapped = {"name": name, "merge_mode": "concat", "layer": layer}
            config.append({"class_name": "Bidirectional", "config": wrapped} if both else layer)
        below = group.create_group("dense_1")
        below.attrs["weight_names"] = [b"dense_1_W", b"dense_1_b"]
        below["dense_1_W"] = rng.normal(size=(6, 1)).astype(np.float32)
        below["dense_1_b"] = np.zeros(1, np.float32)
        config.append({"class_name": "Dense", "config": {"name": "dense_1"}})
        file.attrs["model_config"] = json.dumps({"class_name": "Sequential", "config": config})
        file.attrs["keras_version"] = "1.2.2"
    note(expected, path.name, layers)


def main():
    rng, expected = np.random.default_rng(SEED), {}
    FOLDER.mkdir(exist_ok=True)
    for k, gate, names in (
        (keras, "sigmoid", ("keras3.keras", "keras3.h5")),
        (tf_keras, "hard_sigmoid", ("tf_keras.keras", "tf_keras.h5")),
    ):
        built = fill(model(k, gate), rng)
        x = rng.normal(size=(BATCH, STEPS, INPUTS)).astype(np.float32)
        inner = built.get_layer("inner")
        layers = [built.get_layer("reader"), inner.get_layer("deep"), built.get_layer("both")]
        for name in names:
            built.save(FOLDER / name)
            note(expected, name, [kernels(layer) for layer in layers])
            if gate == "sigmoid":
                expected |= {f"{name}|x": x, f"{name}|y": np.asarray(built(x)[1])}
    built = fill(plain(keras), rng)
    built.save_weights(FOLDER / "keras3.weights.h5")
    note(expected, "keras3.weights.h5", [kernels(layer) for layer in built.layers[:2]])
    built = fill(cells(tf_keras), rng)
    built.save_weights(FOLDER / "tf_keras_weights.h5")
    note(expected, "tf_keras_weights.h5", [[part] for part in kernels(built.layers[0])])
    keras1(FOLDER / "keras1.h5", rng, expected)
    np.savez_compressed(FOLDER / "expected.npz", **expected)
    files = sorted(p for p in FOLDER.iterdir() if p.suffix in (".h5", ".keras", ".npz"))
    manifest = {
        "script": "make_keras_files.py",
        "versions": {
            "keras": keras.__version__,
            "tf_keras": tf_keras.__version__,
            "tensorflow": tf.__version__,
            "h5py": h5py.__version__,
            "numpy": np.__version__,
        },
        "seed": SEED,
        "sha256": {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files},
    }
    (FOLDER / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")


if __name__ == "__main__":
    main()
