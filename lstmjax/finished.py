"""The folder of a finished run, whatever is in it: which one, whose weights, and the model.

A run of one seed leaves `params.safetensors`, one of many lanes `params-<lane>.safetensors` for
each of them; the folder of a release (experiments/card.py) holds one such file under a name of its
own.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from lstmjax import checkpoint, cli
from lstmjax.data import files
from lstmjax.records import RunError

WEIGHTS = "params.safetensors"
NAMED = 12  # lanes that an error names


class Trained(NamedTuple):
    """A trained model.

    Attributes:
      settings: the configuration of its run.
      model: the module.
      params: the trained parameters.
    """

    settings: Any
    model: Any
    params: dict[str, Any]


def folder(run: str | None, experiment: str) -> Path:
    """The folder that was asked for, or the newest one of an experiment under runs/.

    Raises:
      RunError: it is not the folder of a finished run, or there is none.
    """
    records = Path("runs").glob(f"{experiment}-*/record.json")
    newest = max(records, key=lambda path: path.stat().st_mtime, default=None)
    if run is None and newest is None:
        raise RunError("--run: there is no finished run under runs/, train one first or name one")
    if run == "":  # of a variable of the shell that is not set
        raise RunError("--run: got no name, expected the folder of a finished run")
    found = newest.parent if run is None else Path(run)
    if not (found / "record.json").exists():
        raise RunError(f"--run: got {found}, expected the folder of a finished run")
    return found


def lanes(folder: Path) -> dict[str, Path]:
    """The files of weights in a run's folder by lane: "seed0", "lr0.001-seed3", …"""
    paths = folder.glob("params-*.safetensors")
    found = {path.name.removeprefix("params-").removesuffix(".safetensors"): path for path in paths}
    return {name: found[name] for name in sorted(found, key=lambda name: (len(name), name))}


def weights(folder: Path, which: str | None = None) -> Path:
    """The file of weights in a folder.

    Args:
      folder: of a run or a release.
      which: a lane, where there are several; None where there is nothing to choose.

    Raises:
      RunError: there are several and none is chosen, or one that is not there.
    """
    names = lanes(folder)
    every = sorted(folder.glob("*.safetensors"))
    listed = ", ".join(list(names)[:NAMED]) + ", …" * (len(names) > NAMED)
    if which is not None and which not in names:
        expected = f"one of {listed}" if names else f"none: {folder} holds the weights of one run"
        raise RunError(f"--which: got {which}, expected {expected}")
    if which is not None:
        return names[which]
    if (folder / WEIGHTS).exists() or not every:  # the reader says that it is missing
        return folder / WEIGHTS
    if len(every) > 1:
        expected = f"one of {listed or ', '.join(path.name for path in every[:NAMED])}"
        raise RunError(f"--which: got none, expected {expected}: {folder} holds all their weights")
    return every[0]


def read(
    folder: Path,
    config_class: type,
    check: Callable,
    make_model: Callable,
    example: Callable,
    *,
    which: str | None = None,
    sizes: Sequence[str] = (),
    most: Mapping[str, int] | None = None,
) -> Trained:
    """Reads a run's model, whatever is in its folder.

    Args:
      folder: of the run.
      config_class: the dataclass of its settings.
      check: raises ValueError for settings that cannot be used.
      make_model: the module of some settings.
      example: the inputs of some settings, as a ``jax.ShapeDtypeStruct`` of one row.
      which: as in ``weights``.
      sizes: settings that no model can have larger than its weights have numbers.
      most: further settings, with their largest values.

    Returns:
      The model, its method the plain one, which every machine has.

    Raises:
      RunError: a file cannot be read, is damaged, or does not fit the others.
    """
    settings = cli.stored_config(config_class, folder, "run")
    path = weights(folder, which)
    arrays = checkpoint.read_arrays(path)
    # What a model takes is what its weights take: no larger one is begun.
    bounds = dict.fromkeys(sizes, sum(array.size for array in arrays.values()))
    bounds |= {"num_layers": len(arrays)} | dict(most or {})
    for name, bound in bounds.items():
        if getattr(settings, name) > bound:
            got = f"{name} is {getattr(settings, name)}, expected at most {bound}"
            raise RunError(f"--run: {folder}/config.json does not fit: {got}")
    try:
        check(settings)
        settings = dataclasses.replace(settings, method="fused", unroll=1)
        model = make_model(settings)
        like = jax.eval_shape(model.init, jax.random.key(0), example(settings))
    except ValueError as error:
        raise RunError(f"--run: {folder} is damaged: {files.reason(error)}") from error
    return Trained(settings, model, checkpoint.load_params(path, like["params"]))


def outputs(
    trained: Any, inputs: np.ndarray, mask: np.ndarray | None = None, at_once: int = 500
) -> np.ndarray:
    """What a model gives for many rows, a piece at a time.

    Args:
      trained: with ``model`` and ``params``.
      inputs: [N, T] or [N, T, D].
      mask: [N, T] or None.
      at_once: rows of a piece.

    Returns:
      float64 [N, O].
    """
    # The parameters are an argument: as constants they would be part of the program.
    apply = jax.jit(
        lambda params, xs, mask: trained.model.apply({"params": params}, xs, mask=mask)[1]
    )
    pieces = [slice(start, start + at_once) for start in range(0, len(inputs), at_once)]
    found = [
        np.asarray(apply(trained.params, inputs[s], None if mask is None else mask[s]), np.float64)
        for s in pieces
    ]
    return np.concatenate(found)
