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


def legacy(path, layers, pieces=1, config=None):
    """A file as Keras 2 writes weights: ``layers``: name → {weight name: array}."""
    with h5py.File(path, "w") as file:
        if config is not None:
            file.attrs["model_config"] = json.dumps(config)
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


def lstm_config(name, **more):
    return {"class_name": "LSTM", "config": {"name": name, **more}}


def model_config(name, layers):
    return {"class_name": "Sequential", "config": {"name": name, "layers": layers}}


def bidirectional_config(name, forward, backward):
    sides = {"layer": lstm_config(forward), "backward_layer": lstm_config(backward)}
    return {"class_name": "Bidirectional", "config": {"name": name, **sides}}


FIRST, SECOND = (
    kernels(3, 2, seed=1),
    kernels(3, 2, seed=2),
)  # of equal shapes: they could be stacked


def two_sides(path, forward="forward_lstm", backward="lstm_1"):
    """As Keras 3 names the weights of a bidirectional layer that was given a backward layer."""
    names = (
        under(f"{path}/{forward}/lstm_cell", FIRST),
        under(f"{path}/{backward}/lstm_cell", SECOND),
    )
    return {name.removesuffix(":0"): array for side in names for name, array in side.items()}


def read_one(path, layers, config=None):
    legacy(path, layers, config=config)
    file = interop.load_keras_file(path)
    return file, interop.load_stack("keras", file.weights)


def assert_both(layer):
    assert isinstance(layer, Bidirectional)
    for got, want in zip(layer, (FIRST, SECOND), strict=True):
        np.testing.assert_array_equal(got.w_x, want["kernel:0"].astype(np.float32))
        np.testing.assert_array_equal(got.w_h, want["recurrent_kernel:0"].astype(np.float32))


def test_a_backward_layer_of_any_name_is_a_direction(tmp_path):
    path, both = tmp_path / "a.h5", bidirectional_config("both", "forward_lstm", "lstm_1")
    config = model_config("m", [both])
    given = two_sides("m/both")
    file, [layer] = read_one(path, {"both": given}, config)
    assert list(file.weights["both"]) == ["forward_layer", "backward_layer"]
    assert list(file.settings) == ["both"]
    assert_both(layer)
    frozen = dict(sorted(given.items(), reverse=True))  # what is not trained comes last
    assert_both(read_one(path, {"both": frozen}, config)[1][0])
    # Built before it was given.
    elsewhere = {name.replace("m/both/lstm_1", "lstm_1"): array for name, array in given.items()}
    assert_both(read_one(path, {"both": elsewhere}, config)[1][0])
    # In a nested model, and in another wrapper.
    file, [layer] = read_one(path, {"m": given}, model_config("outer", [config]))
    assert list(file.settings) == ["both"]
    assert_both(layer)
    wrapper = {"class_name": "TimeDistributed", "config": {"name": "each", "layer": both}}
    each = two_sides("m/each/both")
    assert_both(read_one(path, {"each": each}, model_config("m", [wrapper]))[1][0])


def test_keras_own_name_for_bidirectional_layers_is_known_without_configuration(tmp_path):
    path = tmp_path / "a.h5"
    given = two_sides("m/bidirectional_12")
    assert_both(read_one(path, {"bidirectional_12": given})[1][0])
    own = two_sides("m/mine/bidirectional")  # within a layer of a user's class
    assert_both(read_one(path, {"mine": own}, model_config("m", [{"class_name": "Mine"}]))[1][0])


def test_other_pairs_of_layers_are_no_directions(tmp_path):
    sizes = {"forward_pass": kernels(3, 2), "rest": kernels(2, 2)}
    inner = {k: a for name, w in sizes.items() for k, a in under(name, w).items()}
    layers = [lstm_config(name) for name in sizes]
    for config in (None, model_config("m", [model_config("inner", layers)])):
        file, stack = read_one(tmp_path / "a.h5", {"inner": inner}, config)
        assert list(file.weights["inner"]) == ["forward_pass", "rest"]
        assert [params.w_x.shape for params in stack] == [(3, 8), (2, 8)]


NAMELESS = {"class_name": "Mine", "config": {"units": 1}}  # no get_config of its own, Sequential


def test_layers_whose_configuration_has_no_name(tmp_path):
    config = model_config("m", [lstm_config("lstm_7"), NAMELESS])
    stored = {"layers/lstm": FIRST, "layers/mine/inner": SECOND}
    file = archive(tmp_path / "a.keras", config, stored)
    assert list(file.weights) == ["lstm_7", "mine"]
    assert list(file.settings) == ["lstm_7"]
    np.testing.assert_array_equal(file.weights["mine"]["inner"]["kernel"], SECOND["kernel:0"])
    file = archive(tmp_path / "b.keras", config, {"layers/lstm": FIRST})
    assert list(file.weights) == ["lstm_7"]
    layers = {"lstm_7": under("lstm_7", FIRST), "mine": {"mine/k:0": np.ones((2, 1))}}
    file, [params] = read_one(tmp_path / "a.h5", layers, config)
    assert list(file.settings) == ["lstm_7"]
    np.testing.assert_array_equal(params.w_x, FIRST["kernel:0"].astype(np.float32))


def test_settings_of_layers_of_one_name_stand_under_their_paths(tmp_path):
    def nested(name, gate):
        gates = {"recurrent_activation": gate}
        layers = [lstm_config("lstm", **gates), lstm_config(f"{name}_own", **gates)]
        return model_config(name, layers)

    models = [nested("enc", "hard_sigmoid"), nested("dec", "sigmoid")]
    top = lstm_config("lstm", recurrent_activation="linear")
    layers = {
        name: under("lstm", kernels(2, 2)) | under(f"{name}_own", kernels(2, 2))
        for name in ("enc", "dec")
    }
    file, _ = read_one(tmp_path / "a.h5", layers, model_config("m", models))
    gates = {name: layer["recurrent_activation"] for name, layer in file.settings.items()}
    assert gates == {
        "enc/lstm": "hard_sigmoid",
        "enc_own": "hard_sigmoid",
        "dec/lstm": "sigmoid",
        "dec_own": "sigmoid",
    }
    layers["lstm"] = under("lstm", kernels(2, 2))
    file, _ = read_one(tmp_path / "b.h5", layers, model_config("m", [*models, top]))
    gates = {name: layer["recurrent_activation"] for name, layer in file.settings.items()}
    assert list(gates) == ["enc/lstm", "enc_own", "dec/lstm", "dec_own", "lstm"]
    assert [gates["enc/lstm"], gates["dec/lstm"], gates["lstm"]] == [
        "hard_sigmoid",
        "sigmoid",
        "linear",
    ]


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
