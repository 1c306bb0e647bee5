"""What a run begins with when another one has learned its vectors and its recurrent layer."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lstmjax import checkpoint, cli
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
    if not (folder / "record.json").exists():
        raise RunError(f"--pretrained: got {folder}, expected the folder of a finished run")
    settings = cli.stored_config(config_class, folder, "pretrained")
    for name, value in expected.items():
        if getattr(settings, name) != value:
            got = f"{name} {getattr(settings, name)}"
            raise RunError(f"--pretrained: {folder} is a run with {got}, expected {value}")
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
