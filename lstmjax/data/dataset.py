"""What a data set is here: a name, where it came from, named NumPy arrays, and a hash of them."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

Splits = dict[str, dict[str, np.ndarray]]

SOURCES = ("auto", "tfds", "offline")

_TITLES = {
    "imdb_reviews/plain_text": "IMDB reviews (tfds imdb_reviews/plain_text)",
    "mnist": "MNIST (tfds mnist)",
    "offline_reviews": "generated reviews (offline data, not IMDB)",
    "offline_digits": "rendered digits (offline data, not MNIST)",
    "sin": "sine waves (generated)",
}


class DataError(RuntimeError):
    """Data that cannot be read or prepared. The message is one line and says what to do."""


class DownloadError(DataError):
    """Data that is not on this machine and could not be fetched."""


class Dataset(NamedTuple):
    """Arrays to train on, and what to call them.

    Fields:
      name: `"imdb_reviews/plain_text"`, `"mnist"`, `"offline_reviews"`, `"offline_digits"` or
        `"sin"`.
      source: `"tfds"`, `"offline"` or `"generated"`.
      sha256: hash of every array of every split and of the vocabulary (`content_sha256`).
      splits: split name → field name → array.
      vocabulary: text only: `vocabulary[k]` is the word of id k + 3 (`lstmjax.data.text`).
    """

    name: str
    source: str
    sha256: str
    splits: Splits
    vocabulary: tuple[str, ...] | None = None

    @property
    def title(self) -> str:
        """What to print on first and last lines and figures; offline data says that it is."""
        return _TITLES.get(self.name, f"{self.name} ({self.source})")

    def first(self, count: int | None) -> "Dataset":
        """The first `count` examples of every split, with a hash of their own; None: all."""
        if count is None:
            return self
        check_int("count", count, 1)
        splits = {
            split: {field: array[:count] for field, array in fields.items()}
            for split, fields in self.splits.items()
        }
        return make_dataset(self.name, self.source, splits, self.vocabulary)


def make_dataset(
    name: str, source: str, splits: Splits, vocabulary: Sequence[str] | None = None
) -> Dataset:
    """A `Dataset` with its hash filled in."""
    words = None if vocabulary is None else tuple(vocabulary)
    return Dataset(name, source, content_sha256(splits, words), splits, words)


def content_sha256(
    splits: Mapping[str, Mapping[str, np.ndarray]], vocabulary: Sequence[str] | None = None
) -> str:
    """Hash of names, dtypes, shapes and bytes of all arrays, and of the vocabulary; 64 hex digits.

    The order in which splits and fields were put in does not matter, nor does the memory layout.
    """
    digest = hashlib.sha256()
    for split in sorted(splits):
        for field in sorted(splits[split]):
            array = np.asarray(splits[split][field])
            array = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False)
            header = json.dumps([split, field, array.dtype.str, list(array.shape)])
            digest.update(header.encode() + b"\n")
            digest.update(array.data if array.size else b"")
    digest.update(json.dumps(None if vocabulary is None else list(vocabulary)).encode())
    return digest.hexdigest()


def check_choice(argument: str, value: object, choices: Sequence[str]) -> None:
    """Raise a `ValueError` naming `argument` unless `value` is one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(
            f"{argument}: got {value!r}, expected one of {', '.join(map(repr, choices))}"
        )


def check_int(argument: str, value: object, low: int, high: int | None = None) -> None:
    """Raise a `ValueError` naming `argument` unless `value` is an integer in [low, high]."""
    good = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not good or value < low or (high is not None and value > high):
        span = f"of {low} or more" if high is None else f"from {low} to {high}"
        raise ValueError(f"{argument}: got {value!r}, expected an integer {span}")


def one_line(error: BaseException, limit: int = 200) -> str:
    """The error's kind and its message in one line, the message cut at `limit` characters."""
    message = " ".join(str(error).split())
    if len(message) > limit:
        message = message[: limit - 1] + "…"
    return f"{type(error).__name__}: {message}" if message else type(error).__name__
