"""The LSTM layers of a file that Keras saved, read without Keras.

Three kinds of file are known:

    .h5           Keras 1, 2, 3 and tf.keras: weights under the layers' names and, for a whole
                  model, its configuration
    .weights.h5   Keras 3 and late tf.keras: weights under names counted by class (lstm, lstm_1)
    .keras        a zip of a .weights.h5 and the configuration
"""

import importlib.util
import itertools
import json
import re
import zipfile
import zlib
from collections import Counter, OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from lstmjax import hdf5
from lstmjax.data import files
from lstmjax.weight_trees import by_number

DAMAGE = (
    ArithmeticError,
    AttributeError,
    EOFError,
    KeyError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    zipfile.BadZipFile,
    zlib.error,
)


class KerasFile(NamedTuple):
    """What a Keras file says about its LSTM layers.

    Attributes:
      weights: a tree of NumPy arrays for ``interop.load_stack("keras", …)``: layer name → the
        layer's entries, or forward and backward entries, or the layers of a nested model.
      settings: layer name → its configuration in the file (activation, recurrent_activation,
        go_backwards, stateful, …), that of a wrapped layer or cell in the same dict; empty for
        files without configuration. A layer of a nested model that shares its name with another
        layer stands under its path ("encoder/lstm").
    """

    weights: dict
    settings: dict


def load_keras_file(path: Any) -> KerasFile:
    """Reads the LSTM layers of a Keras file; other layers are left out.

    ``LSTM``, ``Bidirectional`` of it and ``RNN`` of one or more ``LSTMCell`` are read, in nested
    models too. Layers stand in the model's order where the file knows it: a ``.weights.h5`` does
    not, nor the layers' names. Look at ``recurrent_activation`` (``inner_activation`` in Keras 1):
    Keras before 2.3 and tf.keras of TensorFlow 1 used "hard_sigmoid" in the gates.

    Args:
      path: an ``.h5``, ``.weights.h5`` or ``.keras`` file.

    Returns:
      ``KerasFile(weights, settings)``; weights have the dtype they are stored in.

    Raises:
      ValueError: no such file, a damaged one, one that is not Keras's, one without LSTM layers.
      ModuleNotFoundError: h5py is not installed (the extra ``keras-files``).
    """
    if importlib.util.find_spec("h5py") is None:
        raise ModuleNotFoundError(
            "h5py: not installed, needed to read Keras files (extra keras-files): pip install h5py"
        )
    try:
        path = Path(path)
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise ValueError("no plain file")  # a pipe or a device may never end
        with path.open("rb") as file:
            packed = file.read(4) == b"PK\x03\x04"
        weights, settings = _read_archive(path) if packed else _read_h5(hdf5.read(path))
    except DAMAGE as error:
        missing = isinstance(error, FileNotFoundError)
        reason = "no such file" if missing else str(error).partition("\n")[0]
        raise ValueError(f"{path}: got {reason}, expected a file that Keras saved") from error
    if not weights:
        raise ValueError(f"{path}: got no LSTM layer, expected one or more")
    return KerasFile(weights, settings)


def _read_archive(path: Path) -> tuple[dict, dict]:
    with zipfile.ZipFile(path) as archive:
        files.check_unpacked(archive, path.stat().st_size)
        config, stored = map(archive.read, ("config.json", "model.weights.h5"))
    layers = _layers_of(json.loads(config))
    weights = _named(_lstms(_counted(hdf5.read(stored))), layers)
    return weights, _settings(weights, layers)


def _read_h5(opened: hdf5.Group) -> tuple[dict, dict]:
    group = opened.get("model_weights", opened)
    if not any(name.startswith("layer_names") for name in group.attrs):
        return _lstms(_counted(opened)), {}
    config = json.loads(opened.attrs.get("model_config", "{}"))
    two_way, weights = set(_two_way(config)), OrderedDict()
    for layer in _names(group, "layer_names"):
        tree = {}
        for name in _names(group.at(layer), "weight_names"):
            *above, last = _parts(layer, name)
            node = tree
            for part in above:
                node = node.setdefault(part, {})
            node[last] = _array(group.at(layer).at(name))
        if found := _lstms(tree):
            weights[layer] = _directed(layer, found, two_way)
    return weights, _settings(weights, _layers_of(config))


# --- names ---------------------------------------------------------------------------------------


def _names(group: hdf5.Group, attribute: str) -> list[str]:
    """A list of names among the attributes, which Keras cuts in numbered pieces if it is long."""
    pieces = [attribute] if attribute in group.attrs else []
    if not pieces:
        numbered = (f"{attribute}{number}" for number in itertools.count())
        pieces = itertools.takewhile(lambda piece: piece in group.attrs, numbered)
    return [str(name) for piece in pieces for name in group.attrs[piece]]


def _parts(layer: str, name: str) -> list[str]:
    """The path of a weight within its layer.

    Keras 2 and 3 call it "lstm_1/lstm_cell/kernel:0", Keras 1 "lstm_1_W_i" ("forward_lstm_1_W_i"
    in a bidirectional layer).
    """
    *parts, last = name.removesuffix(":0").split("/")
    keras1 = re.fullmatch(r"(.+)_([WUb](?:_[ifco])?)", last)
    parts += keras1.groups() if keras1 else (last,)
    while len(parts) > 1 and parts[0] == layer:
        parts = parts[1:]
    return parts


def _named(weights: dict, layers: list[dict]) -> OrderedDict:
    """Weights under names counted by class, under the names and in the order of the layers."""
    weights, named, seen = dict(weights), OrderedDict(), Counter()
    for layer in layers:
        kind = re.sub(r"\W+", "", layer["class_name"].split(">")[-1])
        kind = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", kind)
        kind = re.sub("([a-z])([A-Z])", r"\1_\2", kind).lower()
        stored = f"{kind}_{seen[kind]}" if seen[kind] else kind
        seen[kind] += 1
        if stored in weights:
            found, inner = weights.pop(stored), _layers_of(layer)
            named[_name(layer) or stored] = _named(found, inner) if inner else found
    named.update(weights)  # what a model of a class of its own has besides its layers
    return named


# --- trees ---------------------------------------------------------------------------------------


def _counted(group: hdf5.Group) -> dict:
    """A ``.weights.h5`` as a tree: only cells have an LSTM's weights, and those have numbers."""
    stored = group.get("vars", {})
    if "cell" in group.name and len(stored) in (2, 3):
        entries = ("kernel", "recurrent_kernel", "bias")
        return {entries[int(number)]: _array(value) for number, value in stored.items()}
    tree = {
        name: _counted(group[name])
        for name in by_number(group)
        if isinstance(group[name], hdf5.Group) and name not in ("vars", "optimizer")
    }
    for name in ("layers", "_layer_checkpoint_dependencies"):
        if name in tree and not tree[name].keys() & tree.keys():
            tree |= tree.pop(name)
    return tree


def _lstms(tree: dict) -> dict:
    """The part of a tree that belongs to LSTM layers; one cell stands for its layer."""
    if _is_lstm(tree):
        return tree
    found = {name: _lstms(below) for name, below in tree.items() if isinstance(below, dict)}
    found = {name: below for name, below in found.items() if below}
    if len(found) == 1:
        [(name, below)] = found.items()
        if "cell" in name and _is_lstm(below):
            return below
    return found


def _directed(name: str, tree: dict, two_way: set[str]) -> dict:
    """A layer's tree, the two directions of bidirectional layers under names that say so.

    Keras 3 begins the first one's name with "forward_", but leaves a ``backward_layer`` its own.
    The configuration does not know the bidirectional layers within layers of a user's class:
    those are known by the name that Keras gives them.
    """
    if _is_lstm(tree):
        return tree
    if name in two_way or re.fullmatch(r"bidirectional(_\d+)?", name):
        sides = list(_sides(tree))
        if sorted(forward for forward, _ in sides) == [False, True]:
            both = dict(sides)
            return {"forward_layer": both[True], "backward_layer": both[False]}
    return {part: _directed(part, below, two_way) for part, below in tree.items()}


def _sides(tree: dict, forward: bool = False) -> Iterator[tuple[bool, dict]]:
    """The LSTM layers of a tree, each with whether its path names it a forward direction."""
    if _is_lstm(tree):
        yield forward, tree
        return
    for name, below in tree.items():
        yield from _sides(below, forward or name.startswith("forward_"))


def _is_lstm(tree: dict) -> bool:
    """Whether these are the weights of an LSTM: no other layer has this recurrent kernel."""
    for name, blocks in (("recurrent_kernel", 4), ("U", 4), ("U_i", 1)):
        shape = np.shape(tree.get(name))
        if len(shape) == 2 and shape[1] == blocks * shape[0]:
            return True
    return False


def _array(stored: Any) -> np.ndarray:
    if isinstance(stored, hdf5.Group):
        raise ValueError(f"a group {stored.name!r}, expected numbers")
    if stored.dtype.kind == "V":  # HDF5 has no bfloat16
        stored = stored.view(jnp.dtype(jnp.bfloat16))
    return stored


# --- configuration -------------------------------------------------------------------------------


def _layers_of(model: dict) -> list[dict]:
    """The configured layers of a model; none for another layer."""
    config = model.get("config", {})
    return config if isinstance(config, list) else config.get("layers", [])


def _name(layer: dict) -> str | None:
    """A layer's name; None in Sequential models for a class without a ``get_config`` of its own."""
    config = layer.get("config")
    own = config.get("name") if isinstance(config, dict) else None
    return own or layer.get("name")


def _two_way(config: Any) -> Iterator[str]:
    """The names of the bidirectional layers anywhere in a configuration."""
    if isinstance(config, dict):
        if config.get("class_name") == "Bidirectional":
            yield _name(config)
        config = list(config.values())
    for part in config if isinstance(config, list) else ():
        yield from _two_way(part)


def _settings(weights: dict, layers: list[dict]) -> dict:
    """Layer name, or path if others have the name → configuration, for what is in ``weights``."""
    found = dict(_configured(weights, layers, ()))
    times = Counter(name for *_, name in found)
    return {
        path[-1] if times[path[-1]] == 1 else "/".join(path): config
        for path, config in found.items()
    }


def _configured(
    weights: dict, layers: list[dict], above: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], dict]]:
    """The path and the configuration of each layer that stands in ``weights``."""
    for layer in layers:
        name = _name(layer)
        if name not in weights:
            continue
        if inner := _layers_of(layer):
            yield from _configured(weights[name], inner, (*above, name))
        else:
            yield (*above, name), _unwrapped(layer)


def _unwrapped(layer: dict) -> dict:
    """A layer's configuration, with that of the layer or the cell that it wraps."""
    config = dict(layer["config"])
    if "cells" in config:
        config["cells"] = [_unwrapped(cell) for cell in config["cells"]]
    for wrapped in ("layer", "cell"):
        if wrapped in config:
            config = _unwrapped(config.pop(wrapped)) | config
    return config
