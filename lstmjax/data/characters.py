"""Text, character by character: a file of the user's, or sentences whose entropy is known.

**Sentences.** A sentence is a noun, up to two places, and a verb that agrees with the noun:

    cats by mills in wood sleep. owl sings. goat on hill sits. …

Nouns are in the singular or the plural, with equal chances; so are the places in between, with
which nothing agrees. Whether the verb ends in s is therefore known from one character, which lies
4 to 25 characters back, and from nothing else. All choices are independent and each sentence can be
read in one way only, so −ln P of a text is the sum over its choices: the loss of a model that knows
the grammar, which no other model can be expected to fall below. One that forgets the noun loses
ln 2 more with each verb. The text is the same on every machine: only `random.Random.random` is
used, a stream that Python promises to keep.
"""

import math
import os
import random
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lstmjax.data import files
from lstmjax.data.dataset import DataError, Dataset, check_int, make_dataset

NOUNS = ("cat", "dog", "owl", "goat")
PLACES = ("by mill", "in wood", "on hill", "at gate")
VERBS = ("sing", "sleep", "sit", "jump")
MOST_PLACES = 2
NAME = "agreement_sentences"
TEXT_BYTES = 2**30  # of a file: enwik9 has 10⁹


class Sentences(NamedTuple):
    """Generated text.

    Attributes:
      text: whole sentences, each with a blank at its end.
      lags: int32 [N]; where a character shows the verb's number (the s after the verb, or the full
        stop in its place), how many characters before it the noun showed its own; else 0.
      nats: −ln P(text) under the grammar.
    """

    text: str
    lags: np.ndarray
    nats: float


def sentences(length: int, seed: int = 0) -> Sentences:
    """Sentences until there are at least ``length`` characters.

    Args:
      length: >= 1.
      seed: >= 0.

    Returns:
      The text, with what is known of it.

    Raises:
      ValueError: naming the argument that is not such an integer.
    """
    check_int("length", length, 1)
    check_int("seed", seed, 0)
    draw = random.Random(seed).random

    def one_of(choices):
        return choices[int(draw() * len(choices))]

    pieces, lags, nats, total = [], {}, 0.0, 0
    while total < length:
        ending = one_of(("", "s"))  # of the noun; the verb has it where the noun has not
        noun, places = one_of(NOUNS), int(draw() * (MOST_PLACES + 1))
        middle = "".join(f" {one_of(PLACES)}{one_of(('', 's'))}" for _ in range(places))
        verb = one_of(VERBS)
        before = f"{noun}{ending}{middle} {verb}"
        piece = before + ("." if ending else "s.") + " "
        lags[total + len(before)] = len(before) - len(noun)
        nats += places * math.log(2 * len(PLACES)) + math.log(
            2 * len(NOUNS) * (MOST_PLACES + 1) * len(VERBS)
        )
        pieces.append(piece)
        total += len(piece)
    where = np.zeros(total, np.int32)
    where[list(lags)] = list(lags.values())
    return Sentences("".join(pieces), where, nats)


def load(
    path: str | os.PathLike | None = None, *, length: int = 200_000, test_length: int = 20_000
) -> Dataset:
    """A text as ids, to train on and to test on.

    Args:
      path: a text file in UTF-8 of at most `TEXT_BYTES`; None for generated sentences.
      length: characters of generated sentences to train on, >= 1; of a file all are used.
      test_length: characters to test on, >= 1: as many more sentences, or the end of the file,
        but no more than a tenth of it.

    Returns:
      Splits train and test, each ``{"ids": int32 [N] in [0, V)}``; of generated sentences
      ``"lags"``, as in ``Sentences``, and ``"nats": float64 []``, −ln P, too. ``vocabulary`` has
      the V characters of both splits in the order of their code points.

    Raises:
      ValueError: naming the argument that is wrong.
      DataError: a file that cannot be read, is no text, or has fewer than 20 characters.
    """
    check_int("length", length, 1)
    check_int("test_length", test_length, 1)
    if path is None:
        made = {"train": sentences(length, seed=1), "test": sentences(test_length, seed=2)}
        vocabulary = _characters(*(one.text for one in made.values()))
        splits = {
            split: {
                "ids": encode(one.text, vocabulary),
                "lags": one.lags,
                "nats": np.asarray(one.nats),
            }
            for split, one in made.items()
        }
        return make_dataset(NAME, "generated", splits, vocabulary)
    text = _read(Path(path))
    if len(text) < 20:
        raise DataError(f"{path}: got {len(text)} characters, expected 20 or more")
    cut = len(text) - min(test_length, len(text) // 10)
    vocabulary = _characters(text)
    parts = {"train": text[:cut], "test": text[cut:]}
    splits = {split: {"ids": encode(part, vocabulary)} for split, part in parts.items()}
    return make_dataset(Path(path).name, "file", splits, vocabulary)


def encode(text: str, vocabulary: tuple[str, ...]) -> np.ndarray:
    """int32 [N]: each character's place in the vocabulary; ValueError for one that has none."""
    place = {character: k for k, character in enumerate(vocabulary)}
    if unknown := sorted(set(text) - set(place)):
        raise ValueError(f"text: got {unknown[0]!r}, expected characters of the vocabulary")
    return np.fromiter(map(place.__getitem__, text), np.int32, len(text))


def rows(array: np.ndarray, batch_size: int) -> np.ndarray:
    """[N] cut into equally long rows that are read at once: [N // B, B], each row a column."""
    check_int("batch_size", batch_size, 1, max(1, len(array)))
    length = len(array) // batch_size
    return np.ascontiguousarray(array[: length * batch_size].reshape(batch_size, length).T)


def _characters(*texts: str) -> tuple[str, ...]:
    return tuple(sorted(set().union(*texts)))


def _read(path: Path) -> str:
    try:
        text = files.read_bytes(path, TEXT_BYTES).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no text in UTF-8: {error.reason}") from error
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {files.reason(error)}") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")
