"""Keras's files: the committed ones against what Keras had in memory; what is refused."""

import json
import sys
import zipfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from lstmjax import Bidirectional, bidirectional, interop, lstm

h5py = pytest.importorskip("h5py")

FOLDER = Path(__file__).resolve().parent / "golden" / "keras_files"
MODEL = ["reader", "inner", "both"]
LAYERS = {
    "keras3.keras": MODEL,
    "keras3.h5": MODEL,
    "keras3.weights.h5": ["lstm", "lstm_1"],
    "tf_keras.keras": MODEL,
    "tf_keras.h5": MODEL,
    "tf_keras_weights.h5": ["cells"],
    "keras1.h5": ["lstm_1", "lstm_2", "bidirectional_1"],
}


@pytest.fixture(scope="module")
def expected():
    with np.load(FOLDER / "expected.npz") as arrays:
        return dict(arrays)


def run(layers, xs):
    for layer in layers:
        both = isinstance(layer, Bidirectional)
        xs = (bidirectional(lstm, layer, xs) if both else lstm(layer, xs))[1]
    return xs


@pytest.mark.parametrize("name", LAYERS)
def test_the_weights_are_those_that_keras_had(name, expected):
    file = interop.load_keras_file(FOLDER / name)
    assert list(file.weights) == LAYERS[name]
    got = {}
    for k, layer in enumerate(interop.load_stack("keras", file.weights)):
        for side, params in enumerate(layer if isinstance(layer, Bidirectional) else [layer]):
            got |= {f"{name}|{k}|{side}|kernel": params.w_x}
            got |= {f"{name}|{k}|{side}|recurrent_kernel": params.w_h}
            got |= {f"{name}|{k}|{side}|bias": params.b}
    want = {n: a for n, a in expected.items() if n.startswith(f"{name}|") and n.count("|") == 3}
    assert len(want) >= 6
    for entry, array in got.items():
        without_bias = entry.endswith("bias") and entry not in want
        np.testing.assert_array_equal(
            array, np.zeros(array.shape) if without_bias else want.pop(entry)
        )
    assert not want


@pytest.mark.parametrize("name", ["keras3.keras", "keras3.h5"])
def test_the_layers_compute_what_keras_computed(name, expected):
    layers = interop.load_stack("keras", interop.load_keras_file(FOLDER / name).weights)
    hs = run(layers, jnp.asarray(expected[f"{name}|x"].swapaxes(0, 1)))
    oracle.assert_close(hs.swapaxes(0, 1), expected[f"{name}|y"], 1e-5)


@pytest.mark.parametrize(
    ("name", "gate", "value"),
    [
        ("keras3.keras", "recurrent_activation", "sigmoid"),
        ("keras3.h5", "recurrent_activation", "sigmoid"),
        ("tf_keras.keras", "recurrent_activation", "hard_sigmoid"),
        ("tf_keras.h5", "recurrent_activation", "hard_sigmoid"),
        ("keras1.h5", "inner_activation", "hard_sigmoid"),
    ],
)
def test_settings(name, gate, value):
    settings = interop.load_keras_file(str(FOLDER / name)).settings
    names = {"inner": "deep"}  # a nested model has no settings, its layer has
    assert list(settings) == [names.get(layer, layer) for layer in LAYERS[name]]
    assert [layer[gate] for layer in settings.values()] == [value] * 3
    assert [layer["name"] for layer in settings.values()] == list(settings)
    both = list(settings.values())[-1]
    assert both["merge_mode"] == "concat"
    assert both["stateful"] is False
    if "deep" in settings:
        assert [layer["use_bias"] for layer in settings.values()] == [True, False, True]


@pytest.mark.parametrize("name", ["keras3.weights.h5", "tf_keras_weights.h5"])
def test_files_without_configuration_have_no_settings(name):
    assert interop.load_keras_file(FOLDER / name).settings == {}


# --- files made here -----------------------------------------------------------------------------


def legacy(path, layers, pieces=1):
    """A file as Keras 2 writes weights: ``layers``: name → {weight name: array}."""
    with h5py.File(path, "w") as file:
        names = [name.encode() for name in layers]
        if pieces == 1:
            file.attrs["layer_names"] = names
        else:
            for k, piece in enumerate(np.array_split(np.array(names), pieces)):
                file.attrs[f"layer_names{k}"] = piece
        for name, weights in layers.items():
            group = file.create_group(name)
            group.attrs["weight_names"] = [weight.encode() for weight in weights]
            for weight, array in weights.items():
                group[weight] = array


def kernels(d, h, gates=4, seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"kernel:0": (d, gates * h), "recurrent_kernel:0": (h, gates * h)}
    return {name: rng.normal(size=shape) for name, shape in shapes.items()}


def under(scope, weights):
    return {f"{scope}/{name}": array for name, array in weights.items()}


def test_other_layers_are_left_out(tmp_path, x64):
    layers = {
        "embed": {"embed/embeddings:0": np.ones((4, 4))},
        "gru": under("gru", kernels(3, 2, gates=3)),
        "rnn": under("rnn/simple_rnn_cell", kernels(3, 2, gates=1)),
        "lstm_1": under("lstm_1_2/lstm_1", kernels(3, 2)),
        "attention": {"attention/kernel:0": np.ones((2, 8)), "attention/U:0": np.ones((2, 2))},
    }
    legacy(tmp_path / "a.h5", layers)
    weights = interop.load_keras_file(tmp_path / "a.h5").weights
    assert list(weights) == ["lstm_1"]
    [params] = interop.load_stack("keras", weights)
    np.testing.assert_array_equal(params.w_x, kernels(3, 2)["kernel:0"])


def test_long_lists_of_names_come_in_pieces(tmp_path):
    sizes = [3, 2, 4, 2, 3, 2, 3]
    layers = {
        f"{'cba'[k % 3]}{k}": under(f"{'cba'[k % 3]}{k}", kernels(*sizes[k : k + 2]))
        for k in range(6)
    }
    legacy(tmp_path / "a.h5", layers, pieces=4)
    weights = interop.load_keras_file(tmp_path / "a.h5").weights
    assert list(weights) == list(layers)
    assert len(interop.load_stack("keras", weights)) == 6


def counted(file, path, weights):
    group = file.create_group(path)
    for k, array in enumerate(weights.values()):
        group[f"vars/{k}"] = array


def test_counted_names_stand_in_the_order_of_their_numbers(tmp_path):
    with h5py.File(tmp_path / "a.weights.h5", "w") as file:
        for k in range(12):
            counted(file, f"layers/lstm{f'_{k}' if k else ''}/cell", kernels(3 if k == 0 else 2, 2))
        file["layers/lstm_3/vars/0"] = np.ones((2, 8))  # the states of a stateful layer
        file["layers/lstm_3/vars/1"] = np.ones((2, 8))
        counted(file, "layers/gru/cell", kernels(3, 2, gates=3))
        counted(file, "optimizer/cell", kernels(9, 2))
    weights = interop.load_keras_file(tmp_path / "a.weights.h5").weights
    assert list(weights) == ["lstm", *(f"lstm_{k}" for k in range(1, 12))]
    for k, params in enumerate(interop.load_stack("keras", weights)):
        want = kernels(3 if k == 0 else 2, 2)["kernel:0"].astype(np.float32)
        np.testing.assert_array_equal(params.w_x, want)


def test_bfloat16(tmp_path):
    bfloat16 = {n: a.astype(jnp.bfloat16).view("V2") for n, a in kernels(3, 2).items()}
    legacy(tmp_path / "a.h5", {"lstm": under("lstm", bfloat16)})
    [params] = interop.load_stack("keras", interop.load_keras_file(tmp_path / "a.h5").weights)
    assert params.w_x.dtype == jnp.bfloat16
    want = kernels(3, 2)["kernel:0"].astype(jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(params.w_x), want)


def archive(path, config, weights):
    """A .keras file of this configuration and these cells: path → weights."""
    with h5py.File(path.with_suffix(".h5"), "w") as file:
        for name, arrays in weights.items():
            counted(file, f"{name}/cell", arrays)
    with zipfile.ZipFile(path, "w") as members:
        members.writestr("config.json", json.dumps(config))
        members.write(path.with_suffix(".h5"), "model.weights.h5")
    return interop.load_keras_file(path)


def test_the_configuration_names_and_orders_the_layers(tmp_path):
    layers = [
        {"class_name": kind, "config": {"name": name, "activation": activation}}
        for kind, name, activation in (
            ("LSTM", "z", "relu"),
            ("Dense", "d", "relu"),
            ("my_package>LSTM", "a", "tanh"),
            ("MyLSTM2Layer", "b", "elu"),
        )
    ]
    stored = {
        "layers/lstm": kernels(3, 2, seed=1),
        "layers/lstm_1": kernels(2, 2, seed=2),
        "layers/my_lstm2_layer": kernels(2, 2, seed=3),
        "decoder": kernels(2, 2, seed=4),  # a model of a class of its own has such, too
    }
    file = archive(tmp_path / "a.keras", {"config": {"layers": layers}}, stored)
    assert list(file.weights) == ["z", "a", "b", "decoder"]
    for k, got in enumerate(file.weights.values()):
        want = kernels(3 if k == 0 else 2, 2, seed=k + 1)
        np.testing.assert_array_equal(got["kernel"], want["kernel:0"])
    activations = {name: layer["activation"] for name, layer in file.settings.items()}
    assert activations == {"z": "relu", "a": "tanh", "b": "elu"}
    file = archive(tmp_path / "b.keras", {"class_name": "Mine", "config": {}}, stored)
    assert list(file.weights) == ["decoder", "lstm", "lstm_1", "my_lstm2_layer"]
    assert file.settings == {}


# --- what is refused -----------------------------------------------------------------------------


def written(path, content):
    path.write_bytes(content)
    return path


def zipped(path, **members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name.replace("_", "."), content)
    return path


def test_bad_files_are_one_line_that_names_them(tmp_path):
    whole = {name: (FOLDER / name).read_bytes() for name in LAYERS}
    (tmp_path / "folder.h5").mkdir()
    legacy(tmp_path / "dense.h5", {"dense": {"dense/kernel:0": np.ones((3, 8))}})
    legacy(tmp_path / "gone.h5", {"lstm": under("lstm", kernels(3, 2))})
    with h5py.File(tmp_path / "gone.h5", "a") as file:
        del file["lstm/lstm/kernel:0"]
    with h5py.File(tmp_path / "config.h5", "w") as file:
        file.attrs["layer_names"] = []
        file.attrs["model_config"] = "{"
    h5py.File(tmp_path / "empty.h5", "w").close()
    bad = {
        tmp_path / "missing.h5": "got no such file",
        tmp_path / "folder.h5": "got .*directory",
        tmp_path / "dense.h5": "got no LSTM layer, expected one or more",
        tmp_path / "empty.h5": "got no LSTM layer, expected one or more",
        tmp_path / "gone.h5": "got .*kernel:0",
        tmp_path / "config.h5": "got Expecting property name",
        written(tmp_path / "text.h5", b"hello"): "got .*signature not found",
        written(tmp_path / "none.h5", b""): "got .*signature not found",
        written(tmp_path / "half.h5", whole["keras3.h5"][:9000]): "got .*truncated",
        written(tmp_path / "half.keras", whole["keras3.keras"][:9000]): "got File is not a zip",
        zipped(tmp_path / "alone.keras", config_json="{}"): "got .*model.weights.h5",
        zipped(tmp_path / "other.keras", readme="{}"): "got .*config.json",
        zipped(tmp_path / "list.keras", config_json="[]", model_weights_h5=b""): "got ",
    }
    for path, message in bad.items():
        with pytest.raises(ValueError, match=f"{path.name}: {message}") as caught:
            interop.load_keras_file(path)
        assert "\n" not in str(caught.value)
        assert str(caught.value).endswith(("a file that Keras saved", "one or more"))
    with pytest.raises(ValueError, match="None: got .*, expected a file that Keras saved"):
        interop.load_keras_file(None)


def test_files_damaged_anywhere_never_end_in_a_trace(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("keras3.keras", "keras3.weights.h5", "tf_keras.h5"):
        whole = (FOLDER / name).read_bytes()
        for _ in range(20):
            content = bytearray(whole)
            start = int(rng.integers(len(content) // 4))
            content[start : start + 64] = rng.bytes(64)
            path = written(tmp_path / name, bytes(content))
            try:
                interop.load_keras_file(path)
            except ValueError as error:
                assert str(error).startswith(f"{path}: got ")


def test_without_h5py_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ModuleNotFoundError, match=r"\(extra keras-files\): pip install h5py$"):
        interop.load_keras_file(FOLDER / "keras3.h5")
