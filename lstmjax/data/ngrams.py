"""N-grams of texts as sparse counts, and what linear baselines make of them.

Tokens get numbers, and n neighbours one number together, so that the few million distinct n-grams
of 25,000 reviews are sorted arrays of integers and no dictionary of strings:

    texts, vocabulary = index(strings, TOKENS["punctuation"])
    grams = known(texts, len(vocabulary), orders=(1, 2))
    x = counts(texts, grams)                             [N, F], sparse
    x_test = counts(look_up(others, vocabulary, TOKENS["punctuation"]), grams)

An n-gram that is not known is left out. Letters: N documents, F n-grams, L n-grams of a document.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import repeat
from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_array

from lstmjax.data import offline, prepared, text
from lstmjax.data.dataset import Dataset, check_choice, check_int, make_dataset

_TOKEN = re.compile(r"""[.,"()!?;:]|[^\s.,"()!?;:]+""")


def with_punctuation(string: str) -> list[str]:
    """Lower case, `<br />` a blank, each of . , " ( ) ! ? ; : a token, and whatever else is between
    blanks and these: the tokens of G. Mesnil's NB-SVM (Mesnil et al., 2014)."""
    return _TOKEN.findall(string.lower().replace("<br />", " "))


TOKENS: Mapping[str, Callable[[str], list[str]]] = {
    "punctuation": with_punctuation,
    "words": text.words,
}


# ---- documents ----------------------------------------------------------------------------------


def load(
    source: str = "auto",
    *,
    tokens: str = "punctuation",
    limit: int | None = None,
    unlabelled: bool = False,
) -> Dataset:
    """The IMDB reviews as `Documents`, whole, with the vocabulary of all training reviews.

    Args:
      source: `"auto"`, `"tfds"` or `"offline"` (`lstmjax.data.prepared.locate`).
      tokens: one of `TOKENS`.
      limit: only the first so many reviews of each split; None for all.
      unlabelled: whether to load the reviews without labels, too.

    Returns:
      Splits train and test, each `{"ids", "offsets", "label": int32 [N] in {0, 1}}`, the first two
      those of `Documents`. `vocabulary[k]` has id k. With `unlabelled` a third split of that name,
      whose labels are -1.

    Raises:
      ValueError: naming an option that is wrong.
      DataError: data that cannot be read or prepared.
    """
    check_choice("tokens", tokens, tuple(TOKENS))
    if limit is not None:
        check_int("limit", limit, 1)
    folder = prepared.locate("imdb_reviews", source)
    raw = offline.reviews() if folder is None else prepared.read_reviews(folder)
    name = "offline_reviews" if folder is None else prepared.FULL_NAMES["imdb_reviews"]
    train, vocabulary = index(raw["train"][0][:limit], TOKENS[tokens])
    test = look_up(raw["test"][0][:limit], vocabulary, TOKENS[tokens])
    splits = {
        split: {**found._asdict(), "label": raw[split][1][:limit]}
        for split, found in (("train", train), ("test", test))
    }
    if unlabelled:
        more = offline.unlabelled() if folder is None else prepared.read_unlabelled(folder)
        found = look_up(more[:limit], vocabulary, TOKENS[tokens])
        label = np.full(len(found.offsets) - 1, -1, np.int32)
        splits["unlabelled"] = {**found._asdict(), "label": label}
    return make_dataset(name, "offline" if folder is None else "tfds", splits, vocabulary)


class Documents(NamedTuple):
    """Texts end to end: document n is `ids[offsets[n]:offsets[n + 1]]`.

    Fields:
      ids: int32 `[sum of lengths]`, each token's place in a vocabulary, -1 where it has none.
      offsets: int64 `[N + 1]`.
    """

    ids: np.ndarray
    offsets: np.ndarray


def index(
    texts: Iterable[str], tokenise: Callable[[str], list[str]]
) -> tuple[Documents, tuple[str, ...]]:
    """The documents, and the vocabulary of all their tokens by first appearance."""
    seen: defaultdict[str, int] = defaultdict()
    seen.default_factory = seen.__len__
    found = [np.fromiter(map(seen.__getitem__, tokenise(one)), np.int32) for one in texts]
    return _joined(found), tuple(seen)


def look_up(
    texts: Iterable[str], vocabulary: Sequence[str], tokenise: Callable[[str], list[str]]
) -> Documents:
    """The documents in a given vocabulary."""
    place = {token: number for number, token in enumerate(vocabulary)}
    return _joined(
        [np.fromiter(map(place.get, tokenise(one), repeat(-1)), np.int32) for one in texts]
    )


def of_split(data: Dataset, split: str) -> Documents:
    """Those of a split that `load` has loaded."""
    return Documents(data.splits[split]["ids"], data.splits[split]["offsets"])


def _joined(found: list[np.ndarray]) -> Documents:
    lengths = np.array([0, *map(len, found)], np.int64)
    return Documents(np.concatenate([np.empty(0, np.int32), *found]), np.cumsum(lengths))


def last(documents: Documents, count: int) -> Documents:
    """The last `count` tokens of each document, count >= 1."""
    check_int("count", count, 1)
    lengths = np.diff(documents.offsets)
    before_end = documents.offsets[1:].repeat(lengths) - np.arange(len(documents.ids))
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.minimum(lengths, count))])
    return Documents(documents.ids[before_end <= count], offsets)


# ---- n-grams ------------------------------------------------------------------------------------


class Ngrams(NamedTuple):
    """Known n-grams, numbered from 0 on, order by order.

    Fields:
      base: tokens in the vocabulary, and 1.
      orders: n of each entry of `codes`.
      codes: sorted int64 arrays: `(t₁ + 1) base^(n − 1) + … + (tₙ + 1)` of the tokens t₁ … tₙ.
    """

    base: int
    orders: tuple[int, ...]
    codes: tuple[np.ndarray, ...]

    @property
    def size(self) -> int:
        """F."""
        return sum(map(len, self.codes))

    def select(self, keep: np.ndarray) -> "Ngrams":
        """Those where `keep`, bool `[F]`, is true."""
        ends = np.cumsum([len(codes) for codes in self.codes])[:-1]
        parts = zip(self.codes, np.split(keep, ends), strict=True)
        return self._replace(codes=tuple(codes[part] for codes, part in parts))


def known(documents: Documents, vocabulary_size: int, orders: Sequence[int]) -> Ngrams:
    """All n-grams of some documents.

    Args:
      documents: from `index`.
      vocabulary_size: V, tokens in its vocabulary.
      orders: n's, each 1 or more.

    Raises:
      ValueError: an order below 1, or n-grams that 63 bits do not tell apart.
    """
    base = vocabulary_size + 1
    for order in orders:
        check_int("orders", order, 1)
        if base**order >= 2**63:
            raise ValueError(f"orders: got {order}, expected fewer with {vocabulary_size} tokens")
    codes = tuple(np.unique(_windows(documents, order, base)[1]) for order in orders)
    return Ngrams(base, tuple(orders), codes)


def _windows(documents: Documents, order: int, base: int) -> tuple[np.ndarray, np.ndarray]:
    """Document and code of every n-gram without a token that has no place, as they come."""
    count = max(len(documents.ids) - order + 1, 0)
    lengths = np.diff(documents.offsets)
    row = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    whole = row[:count] == row[order - 1 :][:count]
    codes = np.zeros(count, np.int64)
    for k in range(order):
        token = documents.ids[k : k + count]
        codes = codes * base + (token + 1)
        whole &= token >= 0
    return row[:count][whole], codes[whole]


def _found(documents: Documents, grams: Ngrams) -> tuple[np.ndarray, np.ndarray]:
    """Document and number (int32) of every known n-gram, order by order as they come."""
    rows, columns, before = [], [], 0
    for order, codes in zip(grams.orders, grams.codes, strict=True):
        row, code = _windows(documents, order, grams.base)
        place = np.searchsorted(codes, code)
        hit = place < len(codes)
        hit[hit] = codes[place[hit]] == code[hit]
        rows.append(row[hit])
        columns.append((place[hit] + before).astype(np.int32))
        before += len(codes)
    return np.concatenate(rows), np.concatenate(columns)


def counts(documents: Documents, grams: Ngrams) -> csr_array:
    """How often each document has each n-gram: float64 `[N, F]`, zeros left out, columns sorted."""
    row, column = _found(documents, grams)
    shape = len(documents.offsets) - 1, grams.size
    found = csr_array((np.ones(len(row)), (row, column)), shape=shape)
    found.sum_duplicates()
    return found


def padded(documents: Documents, grams: Ngrams) -> np.ndarray:
    """The n-grams of each document, as often as it has them: int32 `[N, L]`, L that of the longest.

    Each is its number plus 1; zeros after the last fill the row up. L is 1 at least.
    """
    row, column = _found(documents, grams)
    order = np.argsort(row, kind="stable")
    row, column = row[order], column[order]
    lengths = np.bincount(row, minlength=len(documents.offsets) - 1)
    place = np.arange(len(row)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    ids = np.zeros((len(lengths), max(1, lengths.max(initial=0))), np.int32)
    ids[row, place] = column + 1
    return ids


# ---- weights ------------------------------------------------------------------------------------


def binary(x: csr_array) -> csr_array:
    """1 wherever `x` [N, F] stores something: whether a document has an n-gram."""
    return csr_array((np.ones_like(x.data), x.indices, x.indptr), shape=x.shape)


def documents_with(x: csr_array) -> np.ndarray:
    """How many documents of `counts` [N, F] have each n-gram: int64 `[F]`."""
    return np.bincount(x.indices, minlength=x.shape[1])


def log_count_ratio(x: csr_array, labels: np.ndarray, alpha: float = 1.0) -> np.ndarray:
    """How much more often positive documents have an n-gram (Wang & Manning, 2012).

        r = log( (p/‖p‖₁) / (q/‖q‖₁) ),   p = α + Σ_{y=1} x,   q = α + Σ_{y=0} x

    Args:
      x: [N, F], counts or whether there are any.
      labels: [N], 0 or 1.
      alpha: α > 0, added to every count.

    Returns:
      float64 `[F]`.
    """
    p, q = (alpha + (labels == label).astype(float) @ x for label in (1, 0))
    return np.log(p / p.sum()) - np.log(q / q.sum())


def interpolated(weights: np.ndarray, beta: float) -> np.ndarray:
    """Between naive Bayes, for which all weights of x ∘ r are the same, and the classifier's own.

        w' = (1 − β) w̄ + β w,   w̄ = ‖w‖₁ / F     (Wang & Manning, 2012)

    Args:
      weights: w [F].
      beta: 0 <= β <= 1; 1 leaves w as it is.
    """
    return (1 - beta) * np.abs(weights).mean() + beta * weights


def inverse_document_frequency(x: csr_array) -> np.ndarray:
    """log((1 + N) / (1 + n_f)) + 1, n_f of the N documents having n-gram f: float64 `[F]`.

    As scikit-learn smooths it; after Spärck Jones (1972).
    """
    return np.log((1 + x.shape[0]) / (1 + documents_with(x))) + 1


def tf_idf(x: csr_array, idf: np.ndarray) -> csr_array:
    """Counts [N, F] times `idf` [F], each row divided by its Euclidean norm; a row of 0 stays 0."""
    weighted = scaled(x, idf)
    row = np.repeat(np.arange(x.shape[0]), np.diff(x.indptr))
    norm = np.sqrt(np.bincount(row, weighted.data**2, minlength=x.shape[0]))
    weighted.data /= norm[row]
    return weighted


def scaled(x: csr_array, factors: np.ndarray) -> csr_array:
    """x [N, F] with every column times its factor [F]."""
    return csr_array((x.data * factors[x.indices], x.indices, x.indptr), shape=x.shape)
