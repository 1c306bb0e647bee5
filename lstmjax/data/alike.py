"""Which reviews may be of the same film: those that share words that few reviews have.

Test reviews are of other films than the training ones, and reviews do not say which film they are
of. But they name its actors and characters, and hardly any other review does. So a hold-out of
whole groups of reviews with rare words in common is nearer to the test reviews than one drawn
review by review.

Letters: N reviews, V words.
"""

import numpy as np
from scipy import sparse

from lstmjax.data import text

RARE = 60  # reviews that have a rare word, at most
LEAST = 0.06  # similarity below which two reviews are not said to be alike
MOST = 30  # reviews of a group; of a film, IMDB has no more


def similarities(ids: np.ndarray, offsets: np.ndarray) -> sparse.coo_array:
    """How much two reviews have in common by rare words: [N, N], above its diagonal.

        s(m, n) = Σ_w x(m, w) x(n, w) / (|x(m)| |x(n)|)      over words in 2 to ``RARE`` reviews
        x(n, w) = (1 + log count of w in n) log(N / reviews that have w)

    That is the cosine of two TF-IDF vectors, but that common words count in the lengths only.

    Args:
      ids: [total]; those below the first word's are no words.
      offsets: [N + 1].
    """
    size = len(offsets) - 1
    review, words = np.arange(size).repeat(np.diff(offsets)), ids > text.INDEX_FROM
    shape = size, int(ids.max(initial=0)) + 1
    counts = sparse.csr_array((np.ones(words.sum()), (review[words], ids[words])), shape=shape)
    counts.sum_duplicates()
    reviews = np.bincount(counts.indices, minlength=shape[1])
    weight = (1 + np.log(counts.data)) * np.log(size / np.maximum(reviews, 1))[counts.indices]
    row = np.arange(size).repeat(np.diff(counts.indptr))
    length = np.sqrt(np.bincount(row, weight**2, minlength=size))
    rare = (reviews[counts.indices] > 1) & (reviews[counts.indices] <= RARE) & (weight > 0)
    data = (weight / np.maximum(length, 1e-30)[row])[rare]
    x = sparse.csr_array((data, (row[rare], counts.indices[rare])), shape=shape)
    return sparse.triu(x @ x.T, k=1, format="coo")


def groups(ids: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Numbers of groups of reviews that are alike: int64 [N], from 0 on.

    The two most similar reviews are put together first, and so on down to ``LEAST``, as long as no
    group has more than ``MOST``. Most of a real film's reviews come together so, and some reviews
    of different films: it is a way to hold out, not to tell films.

    Args:
      ids, offsets: as in ``similarities``.
    """
    found = similarities(ids, offsets)
    alike = found.data > LEAST
    order = np.argsort(-found.data[alike], kind="stable")
    parent = list(range(len(offsets) - 1))
    size = [1] * len(parent)

    def root(n):
        while parent[n] != n:
            parent[n] = n = parent[parent[n]]
        return n

    pairs = found.row[alike][order].tolist(), found.col[alike][order].tolist()
    for m, n in zip(*pairs, strict=True):
        m, n = root(m), root(n)
        if m != n and size[m] + size[n] <= MOST:
            parent[n] = m
            size[m] += size[n]
    return np.unique([root(n) for n in range(len(parent))], return_inverse=True)[1]


def held_out(group: np.ndarray, size: int, seed: int) -> np.ndarray:
    """Reviews of whole groups, ``size`` of them together, drawn by ``seed``: bool [N].

    Groups that are larger than what is still to be filled are passed over. If that leaves room in
    the end, part of one of them fills it.

    Args:
      group: [N], from ``groups``.
      size: 0 to N - 1.
      seed: 0 or more.
    """
    count, taken, passed = np.bincount(group), [], []
    for number in np.random.default_rng(seed).permutation(len(count)).tolist():
        fits = count[number] <= size
        (taken if fits else passed).append(number)
        size -= count[number] if fits else 0
    held = np.isin(group, taken)
    if size:
        held[np.flatnonzero(group == passed[0])[:size]] = True
    return held
