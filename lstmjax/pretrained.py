"""What a run takes from an earlier one: vectors and a recurrent layer, or answers as labels."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lstmjax import checkpoint, cli, whole_reviewer
from lstmjax.data import files
from lstmjax.provenance import params_sha256
from lstmjax.records import RunError


class Pretrained(NamedTuple):
    """A run of a language model.

    Attributes:
      settings: its configuration.
      params: its weights.
      sha256: of them.
    """

    settings: Any
    params: dict[str, Any]
    sha256: str


def read(
    folder: Path,
    config_class: type,
    expected: Mapping[str, Any],
    vocabulary: Sequence[str],
    like: Callable,
) -> Pretrained:
    """Reads a run's folder.

    Args:
      folder: of a finished run.
      config_class: the dataclass of its settings.
      expected: settings that it must have.
      vocabulary: that it must have.
      like: of its settings, the shapes of its weights.

    Raises:
      RunError: the folder is not that of a finished run, is damaged, or is of another kind.
    """
    settings = _settings(folder, config_class, expected, "pretrained")
    path = folder / "vocabulary.txt"
    try:
        words = files.read_bytes(path, files.JSON_BYTES).decode().split("\n")
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise RunError(f"{path} is damaged: {files.reason(error)}") from error
    if words != list(vocabulary):
        raise RunError(f"--pretrained: {path} is not the vocabulary of the reviews here")
    params = checkpoint.load_params(folder / "params.safetensors", like(settings))
    return Pretrained(settings, params, params_sha256(params))


def begun(drawn: Mapping[str, Any], earlier: Mapping[str, Any]) -> dict[str, Any]:
    """The first weights of a run: those of an earlier one, and as drawn what that one had not.

        w_x = [ the earlier one's ; the drawn rows of what is read beside vectors ]

    Args:
      drawn: weights by name, arrays or dictionaries of arrays, as ``review_model.init`` draws them.
      earlier: from ``read``: what bears a name of ``drawn`` has its shape, or fewer rows.

    Returns:
      As ``drawn``.
    """

    def joined(own, of_earlier):
        rest = own[len(of_earlier) :]
        return jnp.concatenate([of_earlier, rest]) if len(rest) else of_earlier

    shared = {name: earlier[name] for name in drawn if name in earlier}
    own = {name: drawn[name] for name in shared}
    return dict(drawn) | jax.tree.map(joined, own, shared)


def _settings(folder: Path, config_class: type, expected: Mapping[str, Any], flag: str) -> Any:
    """Those of a finished run, which have to be as expected."""
    if not (folder / "record.json").exists():
        raise RunError(f"--{flag}: got {folder}, expected the folder of a finished run")
    settings = cli.stored_config(config_class, folder, flag)
    for name, value in expected.items():
        if getattr(settings, name) != value:
            got = f"{name} {getattr(settings, name)}"
            raise RunError(f"--{flag}: {folder} is a run with {got}, expected {value}")
    return settings


def teacher(
    folder: Path,
    config_class: type,
    check: Callable,
    make_model: Callable,
    expected: Mapping[str, Any],
    vocabulary: Sequence[str],
) -> tuple[whole_reviewer.Trained, str]:
    """Reads the folder of a run that is to answer for reviews without labels.

    Args:
      folder, config_class, expected, vocabulary: as in ``read``.
      check, make_model: as in ``whole_reviewer.read``.

    Returns:
      The run, and the hash of its weights.

    Raises:
      RunError: as ``read``.
    """
    _settings(folder, config_class, expected, "teacher")
    trained = whole_reviewer.read(folder, config_class, check, make_model, flag="teacher")
    if trained.vocabulary != list(vocabulary):
        path = folder / whole_reviewer.VOCABULARY
        raise RunError(f"--teacher: {path} is not the vocabulary of the reviews here")
    return trained, params_sha256(trained.params)
