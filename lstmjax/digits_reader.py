"""Which digits a trained run sees in images: the folder of a run, and files, of any content.

An image is 28 x 28 bytes, white on black as in MNIST: a grey PNG of 8 bits, or one of an idx file
of such images, the format of the original MNIST files, plain or gzipped.
"""

import dataclasses
import gzip
import io
import os
import struct
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tyro

from lstmjax import finished
from lstmjax.data import files, prepared
from lstmjax.records import RunError

SIDE = 28
MOST_IMAGES = 10_000  # of one call; they take a minute or two of the slowest models here
MOST_BYTES = 2**23  # of a file, packed and unpacked: as many images, and as much again for a header
AT_ONCE = 100  # of 784 steps, more take more memory and no less time
EXPECTED = "a grey PNG of 28 x 28 and 8 bits, white on black as in MNIST, or an idx file of such"
IDX = b"\0\0\x08\x03"  # unsigned bytes, rank 3
SHOWN = 0.005  # the second and third digit are said from this probability on


@dataclasses.dataclass(frozen=True)
class PredictDigits:
    """What can be asked of a run of mnist.py or smnist.py on the command line."""

    images: tyro.conf.Positional[tuple[str, ...]] = ()
    """Images, PNG or idx; - reads one file from standard input."""
    run: str | None = None
    """Folder of a finished run; the newest one under runs/ when not given."""
    which: str | None = None
    """Whose weights, where a run has several: seed3, lr0.001-seed3."""


class Trained(NamedTuple):
    """A finished run.

    Attributes:
      folder: where it lies.
      settings: its configuration.
      model: the module.
      params: the trained parameters.
      inputs: ``inputs(images uint8 [N, 28, 28], settings)``: what the model reads, [N, T, D].
    """

    folder: Path
    settings: Any
    model: Any
    params: dict[str, Any]
    inputs: Callable


def predict(asked: PredictDigits, experiment: str, reader: Callable) -> None:
    """Prints which digits a trained run sees in images, each with its probability.

    An image is 28 x 28 grey pixels of 8 bits, white on black, with the digit in the middle as in
    MNIST: nothing else was seen in training, and other sizes and colours are refused. A PNG file
    holds one image, an idx file (plain or gzipped) up to 10,000. What a run says of an image that
    is no digit is worth nothing: it always names one.
    """
    if not asked.images:
        raise ValueError(f"got no image, expected {EXPECTED}")
    folder = finished.folder(asked.run, experiment)
    trained = reader(folder, asked.which)
    found = list(images(asked.images))
    for (name, image), row in zip(
        found, probabilities(trained, np.stack([image for _, image in found])), strict=True
    ):
        print(f"{name}: {line(image, row)}")
    print(f"run {folder}{f', {asked.which}' if asked.which else ''}")


def line(image: np.ndarray, row: np.ndarray) -> str:
    """What is said of one image: its digit, and what else it might be.

    Args:
      image: uint8 [28, 28].
      row: the probabilities, [10].
    """
    first, *others = np.argsort(-row, kind="stable")[:3]
    also = [f"{digit} {row[digit]:.3f}" for digit in others if row[digit] >= SHOWN]
    light = " (mostly white: MNIST is white on black)" if image.mean() > 127.5 else ""
    return f"{first}, probability {row[first]:.3f}{''.join(f'; {text}' for text in also)}{light}"


def read(
    folder: Path,
    config_class: type,
    check: Callable,
    make_model: Callable,
    inputs: Callable,
    which: str | None = None,
) -> Trained:
    """Reads a run's folder, whatever is in it.

    Args:
      folder: of the run.
      config_class: the dataclass of its settings.
      check: raises ValueError for settings that cannot be used.
      make_model: the module of some settings.
      inputs: as in ``Trained``.
      which: whose weights, where a run has several; None where there is nothing to choose.

    Returns:
      The run.

    Raises:
      RunError: a file cannot be read, is damaged, or does not fit the others.
    """

    def example(settings):
        return inputs(np.zeros((1, SIDE, SIDE), np.uint8), settings)

    settings, model, params = finished.read(
        folder, config_class, check, make_model, example, which=which, sizes=("hidden_size",)
    )
    return Trained(folder, settings, model, params, inputs)


def probabilities(trained: Trained, images: np.ndarray) -> np.ndarray:
    """How probable each digit is: softmax of the model's outputs.

    Args:
      trained: the run.
      images: uint8 [N, 28, 28].

    Returns:
      float64 [N, 10]; each row sums to 1.

    Raises:
      RunError: an answer is no number.
    """
    logits = finished.outputs(trained, trained.inputs(images, trained.settings), at_once=AT_ONCE)
    if not np.isfinite(logits).all():
        raise RunError(f"--run: {trained.folder} is damaged: its weights give no number")
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


# ---- images -------------------------------------------------------------------------------------


def images(names: Sequence[str]) -> Iterator[tuple[str, np.ndarray]]:
    """The images of some files, as ``(name to print, uint8 [28, 28])``.

    Raises:
      ValueError: a file holds none, or all of them hold more than ``MOST_IMAGES``.
      OSError: a file cannot be read.
    """
    count = 0
    for name in names:
        shown = "standard input" if name == "-" else _shown(name)
        try:
            content = _standard_input() if name == "-" else files.read_bytes(name, MOST_BYTES)
            found = parse(content)
        except ValueError as error:
            raise ValueError(f"{shown}: got {files.reason(error)}, expected {EXPECTED}") from error
        count += len(found)
        if count > MOST_IMAGES:
            raise ValueError(f"images: got {count:,}, expected at most {MOST_IMAGES:,} in one call")
        for place, image in enumerate(found):
            yield (shown if len(found) == 1 else f"{shown} [{place}]"), image


def parse(content: bytes) -> np.ndarray:
    """The images in the bytes of a PNG or idx file, as uint8 [N, 28, 28] with N >= 1.

    Raises:
      ValueError: it is neither, is damaged, or holds images of another kind.
    """
    if content.startswith(b"\x1f\x8b"):
        content = _unpacked(content)
    if content.startswith(b"\x89PNG"):
        return _png(content)[None]
    if content.startswith(IDX):
        return _idx(content)
    raise ValueError("neither a PNG nor an idx file" if content else "an empty file")


def _png(content: bytes) -> np.ndarray:
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sizes that are refused in any case
            return prepared.decode_png(content)
    except Image.DecompressionBombError as error:  # by the header: it need not be damaged
        raise ValueError("an image that is too large") from error
    except ValueError as error:
        raise ValueError(files.reason(error).split(", expected")[0]) from error
    except Exception as error:  # Pillow says SyntaxError of a bad PNG, and what else zlib says
        raise ValueError("a PNG that is damaged") from error


def _idx(content: bytes) -> np.ndarray:
    if len(content) < 16:
        raise ValueError("an idx file that is cut off")
    count, *sizes = struct.unpack(">3i", content[4:16])
    if sizes != [SIDE, SIDE]:
        raise ValueError(f"an idx file of images of {sizes[0]} x {sizes[1]}")
    if count < 1 or len(content) != 16 + count * SIDE * SIDE:
        raise ValueError(f"an idx file of {len(content):,} bytes that claims {count:,} images")
    return np.frombuffer(content, np.uint8, offset=16).reshape(count, SIDE, SIDE)


def _unpacked(content: bytes) -> bytes:
    """What a gzip file holds, up to the bound."""
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(content)) as file:
            found = file.read(MOST_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError("a gzip file that is damaged") from error
    if len(found) > MOST_BYTES:
        raise ValueError(f"a gzip file that unpacks to more than {MOST_BYTES:,} bytes")
    return found


def _standard_input() -> bytes:
    content = sys.stdin.buffer.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise ValueError(f"more than {MOST_BYTES:,} bytes")
    return content


def _shown(name: str) -> str:
    """A file's name as a line can hold it: a name may be any bytes."""
    text = os.fsencode(name).decode("utf-8", "replace")
    return "".join(character if character.isprintable() else "?" for character in text)
