"""Words in a row: which pairs and triples are known, and what a review's say of its label.

    codes = run_codes(ids, offsets, vocabulary_size, order=3)
    known = known_runs(codes, offsets, rows, min_count=2, at_most=1_000_000)
    path = with_runs("path", ids, offsets, known, vocabulary_size, 3)["path"]

Letters: N reviews, V words, P known runs of 2 to K words, F features.
"""

import numpy as np

from lstmjax.data import text

FIRST_WORD = text.INDEX_FROM + 1  # ids below are no words
PLACES = 4  # numbers of a place


def run_codes(ids: np.ndarray, offsets: np.ndarray, vocabulary_size: int, order: int) -> np.ndarray:
    """The pair, triple and so on that ends at each place, as a number to the base of V.

    Args:
      ids, offsets: `[total]` and `[N + 1]`.
      vocabulary_size: V.
      order: K, words of the longest, 2 or more; V^K has to be within int64.

    Returns:
      int64 `[total, K - 1]`: of 2 to K words; -1 where one of them is no word or of another review.
      No number stands for runs of two lengths, because that of a run's first word is not 0.
    """
    words = ids.astype(np.int64)
    codes = np.full((len(ids), order - 1), -1, np.int64)
    place = np.arange(len(ids)) - offsets[review_of(offsets)]  # in its review
    fits, code = words >= FIRST_WORD, words
    for back in range(1, order):
        before = np.concatenate([np.zeros(back, np.int64), words[: max(len(ids) - back, 0)]])
        before = before[: len(ids)]
        fits = fits & (place >= back) & (before >= FIRST_WORD)
        code = before * vocabulary_size**back + code
        codes[fits, back - 1] = code[fits]
    return codes


def known_runs(
    codes: np.ndarray, offsets: np.ndarray, rows: np.ndarray, min_count: int, at_most: int
) -> np.ndarray:
    """The codes of the runs that most of the reviews `rows` have, sorted: int64 `[P]`.

    Args:
      codes, offsets: from `run_codes`.
      rows: the reviews that are counted, those to train on.
      min_count: in how many of them a run has to be.
      at_most: the most runs; of those in equally many reviews, the smaller codes first.
    """
    counted = np.zeros(len(offsets) - 1, bool)
    counted[rows] = True
    review = np.broadcast_to(review_of(offsets)[:, None], codes.shape)
    counted = (codes >= 0) & counted[review]
    codes, review = codes[counted], review[counted]
    # Equal codes side by side, those of one review too: each counts once for a review.
    order = np.argsort(codes, kind="stable")
    codes, review = codes[order], review[order]
    first = np.ones(len(codes), bool)
    first[1:] = (codes[1:] != codes[:-1]) | (review[1:] != review[:-1])
    found, count = np.unique(codes[first], return_counts=True)
    found, count = found[count >= min_count], count[count >= min_count]
    return np.sort(found[np.argsort(-count, kind="stable")[:at_most]])


def numbers(codes: np.ndarray, known: np.ndarray) -> np.ndarray:
    """1 + the place of each code in `known` [P], 0 where it is not there: int32 of codes' shape."""
    place = np.searchsorted(known, codes)
    hit = place < len(known)
    hit[hit] = known[place[hit]] == codes[hit]
    return np.where(hit, place + 1, 0).astype(np.int32)


def features_at(ids: np.ndarray, runs: np.ndarray, vocabulary_size: int) -> np.ndarray:
    """The word at every place and the known runs that end with it: int32 `[total, K]`.

    Args:
      ids: [total]; words are features under their ids, those below the first word's are none, 0.
      runs: [total, K - 1], from `numbers`; known run 1 is feature `vocabulary_size`.
      vocabulary_size: V.
    """
    words = np.where(ids >= FIRST_WORD, ids, 0)
    runs = np.where(runs > 0, runs + (vocabulary_size - 1), 0)
    return np.concatenate([words[:, None], runs], axis=1).astype(np.int32)


def with_runs(
    kind: str,
    ids: np.ndarray,
    offsets: np.ndarray,
    known: np.ndarray,
    vocabulary_size: int,
    order: int,
    ratio_inputs: bool = False,
) -> dict[str, np.ndarray]:
    """What a model reads of the runs of words in some reviews.

    Args:
      kind: "none", "input" or "path".
      ids, offsets: [total] and [N + 1].
      known: [P], from `known_runs`.
      vocabulary_size: V.
      order: K, 2 of "input".
      ratio_inputs: whether the ratios of all places are wanted.

    Returns:
      Of "input", "pairs" [total] from `numbers`; of "path", "path" [total, K], `distinct`; with
      `ratio_inputs`, "features" [total, K] from `features_at`.
    """
    if kind == "none" and not ratio_inputs:
        return {}
    own = numbers(run_codes(ids, offsets, vocabulary_size, order), known)
    if kind == "input":
        return {"pairs": own[:, 0]}
    features = features_at(ids, own, vocabulary_size)
    found = {"path": distinct(features, offsets)} if kind == "path" else {}
    return found | ({"features": features} if ratio_inputs else {})


def distinct(features: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Features [total, K] where a review has them for the first time in their column, else 0."""
    size, once = int(features.max(initial=0)) + 1, np.zeros_like(features)
    for column, own in enumerate(features.T):
        _, first = np.unique(review_of(offsets) * size + own, return_index=True)
        once[first, column] = own[first]
    return once


def log_count_ratio(
    once: np.ndarray, offsets: np.ndarray, label: np.ndarray, rows: np.ndarray, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """How much more often positive reviews have a feature (Wang & Manning, 2012), α = 1.

        r = log( (p/‖p‖₁) / (q/‖q‖₁) ),   p, q = 1 + how many positive, negative reviews have it

    Args:
      once: [total, ·] features, each once a review (`distinct`), or 0.
      offsets: [N + 1].
      label: [N], 0 or 1.
      rows: the reviews that are counted.
      size: features, 0 among them.

    Returns:
      r, float32 `[size]`, 0 of feature 0; and what r is for a counted review of label 0 or 1 that
      has the feature if it is left out of the count itself, float32 `[2, size]` (‖p‖₁ and ‖q‖₁
      stay). By r itself, a rare feature tells a review that is trained on its own label.
    """
    review, use = review_of(offsets), np.zeros(len(label), bool)
    use[rows] = True
    logs, without = [], []
    for sign in (0, 1):
        own = once[(use & (label == sign))[review]]
        count = 1.0 + np.bincount(own.ravel(), minlength=size)
        count[0] = 1  # no feature
        total = count[1:].sum()
        logs.append(np.log(count / total))
        without.append(np.log(np.maximum(count - 1, 1) / total))
    ratios = np.stack([logs[1] - logs[0], logs[1] - without[0], without[1] - logs[0]])
    ratios[:, 0] = 0
    return ratios[0].astype(np.float32), ratios[1:].astype(np.float32)


def crossed_ratios(
    features: np.ndarray,
    offsets: np.ndarray,
    label: np.ndarray,
    rows: np.ndarray,
    size: int,
    folds: int,
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:
    """The log-count ratio at every place, in a training review as counted in other ones.

    The training reviews are divided at random into parts; what a review of one part reads was
    counted in the other parts. By a count with the review in it, a rare feature would tell the
    review's own label, and by one without this review alone it would tell the other label, which
    has one more in what is left.

    Args:
      features: [total, K], from `features_at`.
      offsets, label, rows, size: as in `log_count_ratio`.
      folds: parts, 2 or more.
      seed: draws them.

    Returns:
      r as counted in all of `rows`, float32 `[size]`; the ratios, float32 `[total, K]`, those of
      reviews that are not in `rows` from r.
    """
    once, part = distinct(features, offsets), np.full(len(label), folds)
    part[rows] = np.random.default_rng(seed).permutation(len(rows)) % folds
    part_at, ratios = part[review_of(offsets)], np.empty(features.shape, np.float32)
    for k in range(folds + 1):  # last, what no part is left out of
        ratio, _ = log_count_ratio(once, offsets, label, rows[part[rows] != k], size)
        ratios[part_at == k] = ratio[features[part_at == k]]
    return ratio, ratios


def places(offsets: np.ndarray) -> np.ndarray:
    """Where in its review each place is, which a chop does not tell: float32 `[total, 4]`.

        e^(−t / 20),  e^(−(n − 1 − t) / 20),  t / n,  log(n / 150)      for t = 0 … n − 1

    Near the beginning, near the end (where an opinion is summed up), in between; and how long the
    review is, beside one of about 150 tokens, which half of them have.
    """
    n = np.diff(offsets).repeat(np.diff(offsets))
    t = np.arange(len(n)) - offsets[review_of(offsets)]
    every = [np.exp(-t / 20), np.exp(-(n - 1 - t) / 20), t / n, np.log(n / 150)]
    return np.stack(every, axis=1).astype(np.float32)


def review_of(offsets: np.ndarray) -> np.ndarray:
    """The review of every place: int64 `[total]`."""
    return np.arange(len(offsets) - 1).repeat(np.diff(offsets))
