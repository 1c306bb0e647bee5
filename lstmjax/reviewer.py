"""What a trained run thinks of a review: the folder of a run, and a text, of any content."""

import dataclasses
import math
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import tyro

from lstmjax import finished
from lstmjax.data import files, imdb, long_text, text
from lstmjax.records import RunError

VOCABULARY_BYTES = 2**26
MOST_TOKENS = 100_000  # of a review; a run with more of them would take minutes for one answer


@dataclasses.dataclass(frozen=True)
class Predict:
    """What can be asked of a run of experiments/imdb.py on the command line."""

    text: tyro.conf.Positional[str] = ""
    """The review, in quotes; - reads it from standard input. One that begins with - goes last,
    after --."""
    run: str | None = None
    """Folder of a finished run; the newest one under runs/ when not given."""
    which: str | None = None
    """Whose weights, where a run has several: seed3, lr0.001-seed3."""


class Trained(NamedTuple):
    """A finished run.

    Attributes:
      folder: where it lies.
      settings: its configuration.
      vocabulary: its words, as in ``Dataset``.
      model: the module.
      params: the trained parameters.
    """

    folder: Path
    settings: Any
    vocabulary: list[str]
    model: Any
    params: dict[str, Any]


def predict(asked: Predict, config_class: type, check: Callable, make_model: Callable) -> None:
    """Prints what a trained run thinks of a text.

    A run knows the texts that it was trained on: whole reviews, cut to so many words. A text of a
    few words is mostly padding to it (unless it was trained with --mask), and its answer is worth
    little; so is that to words which it does not know. Text of any length and content will do:
    bytes that are no UTF-8 count as unknown characters.
    """
    pieces = given(asked.text)
    folder = _folder(asked.run)
    trained = read(folder, config_class, check, make_model, asked.which)
    print(said(*probability(trained, pieces), trained.folder))


def given(words: str) -> Iterable[str]:
    """The text of a command line's argument, or of standard input where that is -, in pieces.

    Raises:
      ValueError: it is empty.
    """
    if not words.strip():
        raise ValueError("got no text, expected a review in quotes")
    if words == "-":
        return long_text.decoded(sys.stdin.buffer)
    # What a command line holds besides UTF-8 are half characters to Python.
    return [words.encode("utf-8", "surrogatepass").decode("utf-8", "replace")]


def said(positive: float, known: int, words: int, folder: Path) -> str:
    """The answer in one line: how probable it is, how many of the words are known, whose it is."""
    word = "positive" if positive > 0.5 else "negative"
    few = "" if known == words else f", {known} of {words} words known"
    return f"{word}: probability of a positive review {positive:.3f} (run {folder}{few})"


def _folder(run: str | None) -> Path:
    """The folder that was asked for, or the newest one."""
    return finished.folder(run, "imdb")


def read(
    folder: Path,
    config_class: type,
    check: Callable,
    make_model: Callable,
    which: str | None = None,
) -> Trained:
    """Reads a run's folder, whatever is in it.

    Args:
      folder: of the run.
      config_class: the dataclass of its settings.
      check: raises ValueError for settings that cannot be used.
      make_model: the module of some settings.
      which: whose weights, where a run has several; None where there is nothing to choose.

    Returns:
      The run.

    Raises:
      RunError: a file cannot be read, is damaged, or does not fit the others.
    """
    settings, model, params = finished.read(
        folder,
        config_class,
        check,
        make_model,
        lambda settings: jax.ShapeDtypeStruct((1, settings.max_length), "int32"),
        which=which,
        sizes=("hidden_size", "embedding_size", "vocabulary_size"),
        most={"max_length": MOST_TOKENS},
    )
    return Trained(folder, settings, read_vocabulary(folder), model, params)


def read_vocabulary(folder: Path, flag: str = "run") -> list[str]:
    """The vocabulary that a run has left; raises RunError, of a flag, where there is none."""
    try:
        vocabulary = files.read_bytes(folder / "vocabulary.txt", VOCABULARY_BYTES).decode()
    except OSError as error:
        raise RunError(f"--{flag}: cannot read {error.filename}: {error.strerror}") from error
    except ValueError as error:
        raise RunError(f"--{flag}: {folder} is damaged: {files.reason(error)}") from error
    return vocabulary.split("\n")


def probability(trained: Trained, pieces: Iterable[str]) -> tuple[float, int, int]:
    """How probable it is that a review is positive.

    Args:
      trained: the run.
      pieces: the text, as ``long_text.words_at_end`` takes it.

    Returns:
      (the probability, how many of the words that were looked at are known, how many they are).

    Raises:
      ValueError: there is no word in the text.
      RunError: the answer is no number.
    """
    settings = trained.settings
    length, truncating = settings.max_length, settings.truncating
    words = long_text.words_at_end(pieces, length, truncating)
    if not words:
        raise ValueError("text: got no word, expected a review")
    ids = imdb.encode(
        [" ".join(words)],
        trained.vocabulary,
        num_words=settings.vocabulary_size,
        max_length=length,
        padding=settings.padding,
        truncating=truncating,
    )["ids"]
    mask = ids != text.PADDING if settings.mask else None
    logit = float(trained.model.apply({"params": trained.params}, ids, mask=mask)[1][0, 0])
    if not math.isfinite(logit):
        raise RunError(f"--run: {trained.folder} is damaged: its weights give no number")
    looked_at = int(((ids != text.PADDING) & (ids != text.START)).sum())
    known = int((ids > text.INDEX_FROM).sum())
    return (1 + math.tanh(logit / 2)) / 2, known, looked_at
