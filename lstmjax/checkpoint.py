"""The weights of a trained model in one file, in the safetensors format.

Names are the paths of the nested dict, joined by dots: "layer_0.weights.w_x". Any framework that
reads safetensors can read the file.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from lstmjax.records import RunError, write_file


def save_params(path: str | os.PathLike, params: Mapping[str, Any]) -> None:
    """Writes a nested dict of arrays; the file appears whole or not at all.

    Args:
      path: the file, which must not exist.
      params: nested dicts with string keys (without dots) and arrays as leaves.

    Raises:
      RunError: the file exists or cannot be written.
    """
    if Path(path).exists():
        raise RunError(f"{path} exists already: weights are never written over")
    write_file(path, save(_flat(params)))


def load_params(path: str | os.PathLike, like: Mapping[str, Any]) -> dict[str, Any]:
    """Reads what ``save_params`` wrote, checked against the parameters of a model.

    Args:
      path: the file.
      like: the model's parameters, or their shapes (``jax.eval_shape``).

    Returns:
      A nested dict of NumPy arrays of the structure of ``like``.

    Raises:
      RunError: the file cannot be read, is damaged, or an entry is missing, left over, or of
        another shape or dtype than in ``like``; the first such entry is named.
    """
    try:
        stored = load_file(path)
    except (OSError, SafetensorError) as error:
        text = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise RunError(f"cannot read the weights in {path}: {text}") from error
    expected = _flat(like, leaf=lambda a: a)
    for name in sorted(expected.keys() | stored.keys()):
        if name not in stored:
            raise RunError(f"{path}: the weights {name} are missing")
        if name not in expected:
            raise RunError(f"{path}: the weights {name} have no place in this model")
        got, want = stored[name], expected[name]
        if got.shape != want.shape or got.dtype != want.dtype:
            raise RunError(
                f"{path}: {name} is {got.dtype}{list(got.shape)}, "
                f"expected {want.dtype}{list(want.shape)}"
            )
    paths, tree = jax.tree_util.tree_flatten_with_path(like)
    return jax.tree.unflatten(tree, [stored[_name(path)] for path, _ in paths])


def _flat(params: Mapping[str, Any], leaf=np.asarray) -> dict[str, Any]:
    """{"a.b": array} of {"a": {"b": array}}."""
    paths = jax.tree_util.tree_flatten_with_path(params)[0]
    return {_name(path): leaf(value) for path, value in paths}


def _name(path: tuple) -> str:
    return ".".join(str(key.key) for key in path)
