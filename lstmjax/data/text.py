"""Text to ids as Keras does it.

Words: lower case, every character of `FILTERS` becomes a blank, split at blanks (Keras
`text_to_word_sequence`, 2015). HTML is not special: `<br />` leaves the word `br`.

Ids, as in `keras.datasets.imdb.load_data`:

| id    | meaning                                                            |
|-------|--------------------------------------------------------------------|
| 0     | padding                                                            |
| 1     | start of a review                                                  |
| 2     | a word outside the vocabulary                                      |
| 3     | never used: Keras adds 3 to ranks that start at 1                  |
| 3 + r | the word of frequency rank r = 1, 2, …; ties by first appearance   |

A limit of `num_words` ids therefore leaves num_words − 4 words (9,996 of 10,000).
`vocabulary[k]` is the word of id k + 3, so `vocabulary[0]` is the placeholder `UNUSED`.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import repeat
from typing import NamedTuple

import numpy as np

from lstmjax.data.dataset import check_choice, check_int

FILTERS = '!"#$%&()*+,-./:;<=>?@[\\]^_`{|}~\t\n'
PADDING, START, UNKNOWN, INDEX_FROM = 0, 1, 2, 3
UNUSED = "<unused>"  # id 3; the filter removes < and >, so no word of a text is ever equal to it
VERSION = "keras words 1"  # part of cache keys: change it whenever ids change

_BLANKS = str.maketrans(FILTERS, " " * len(FILTERS))


class Ragged(NamedTuple):
    """Reviews of different lengths end to end: review n is `ids[offsets[n]:offsets[n + 1]]`.

    Fields:
      ids: int32 `[sum of lengths]`, no limit on the vocabulary, each review beginning with START.
      offsets: int64 `[N + 1]`.
    """

    ids: np.ndarray
    offsets: np.ndarray


def words(text: str) -> list[str]:
    """The words of one text, in order; other white space than `FILTERS` has stays in the words."""
    return [word for word in text.lower().translate(_BLANKS).split(" ") if word]


def index(texts: Iterable[str]) -> tuple[Ragged, tuple[str, ...]]:
    """Build the vocabulary of `texts` by frequency, and their ids in it.

    Returns:
      The ids of all reviews, and the vocabulary with `UNUSED` first.
    """
    seen: defaultdict[str, int] = defaultdict()
    seen.default_factory = seen.__len__  # a new word gets the next number: order of appearance
    reviews = [np.fromiter(map(seen.__getitem__, words(text)), np.int32) for text in texts]
    everything = np.concatenate([np.empty(0, np.int32), *reviews])
    counts = np.bincount(everything, minlength=len(seen))
    order = np.argsort(-counts, kind="stable")
    id_of = np.empty(len(seen), np.int32)
    id_of[order] = np.arange(1, len(seen) + 1, dtype=np.int32) + INDEX_FROM
    spelling = list(seen)
    vocabulary = (UNUSED, *(spelling[number] for number in order))
    return _ragged([id_of[review] for review in reviews]), vocabulary


def look_up(texts: Iterable[str], vocabulary: Sequence[str]) -> Ragged:
    """The ids of `texts` in a given vocabulary; words that are not in it get UNKNOWN."""
    id_of = {word: k + INDEX_FROM for k, word in enumerate(vocabulary)}
    return _ragged(
        [np.fromiter(map(id_of.get, words(text), repeat(UNKNOWN)), np.int32) for text in texts]
    )


def _ragged(reviews: list[np.ndarray]) -> Ragged:
    start = np.array([START], np.int32)
    lengths = np.array([len(review) + 1 for review in reviews], np.int64)
    pieces = [piece for review in reviews for piece in (start, review)]
    ids = np.concatenate(pieces) if pieces else np.empty(0, np.int32)
    return Ragged(ids, np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]))


def check_options(num_words: int, max_length: int, padding: str, truncating: str) -> None:
    """Raise a `ValueError` naming the first option of `pad` that is wrong."""
    check_int("num_words", num_words, INDEX_FROM + 2)
    check_int("max_length", max_length, 1)
    check_choice("padding", padding, ("pre", "post"))
    check_choice("truncating", truncating, ("pre", "post"))


def pad(
    reviews: Ragged,
    *,
    num_words: int,
    max_length: int,
    padding: str = "pre",
    truncating: str = "pre",
) -> dict[str, np.ndarray]:
    """Cut or fill every review to `max_length` ids (Keras `pad_sequences`).

    Args:
      reviews: N reviews.
      num_words: ids of this and above become UNKNOWN.
      max_length: L.
      padding: `"pre"` puts zeros before the words, `"post"` after them.
      truncating: `"pre"` drops the beginning of a long review (its START too), `"post"` the end.

    Returns:
      `{"ids": int32 [N, L] in [0, num_words), "lengths": int32 [N] in [1, L]}`; lengths count
      what is not padding.
    """
    check_options(num_words, max_length, padding, truncating)
    begin, end = reviews.offsets[:-1], reviews.offsets[1:]
    kept = np.minimum(end - begin, max_length)
    first = end - kept if truncating == "pre" else begin
    blank = max_length - kept if padding == "pre" else np.zeros_like(kept)
    column = np.arange(max_length) - blank[:, None]  # [N, L] position within what is kept
    inside = (column >= 0) & (column < kept[:, None])
    ids = np.zeros((len(kept), max_length), np.int32)
    ids[inside] = reviews.ids[(first[:, None] + column)[inside]]
    ids[ids >= num_words] = UNKNOWN
    return {"ids": ids, "lengths": kept.astype(np.int32)}
