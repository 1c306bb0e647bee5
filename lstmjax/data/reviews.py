"""Whole film reviews end to end as one array of ids, and pairs and triples of words in a row.

    data = load(vocabulary_size=30_000, max_length=1_000)
    found, count = parts(data, validation_size=2_500, seed=0, vocabulary_size=30_000, chop=50)

Whatever is counted, runs, ratios and frequencies, is counted in the reviews that are trained on.
How reviews are cut and packed into batches is in chops.py.

Letters: N reviews, V words, P known runs of 2 to K words, F features.
"""

from typing import NamedTuple

import numpy as np

from lstmjax.data import chops, ngrams, text
from lstmjax.data.dataset import Dataset, check_int, make_dataset

FIRST_WORD = text.INDEX_FROM + 1  # ids below are no words


def load(
    source: str = "auto",
    *,
    tokens: str = "punctuation",
    vocabulary_size: int = 30_000,
    max_length: int = 1_000,
    limit: int | None = None,
    unlabelled: bool = False,
) -> Dataset:
    """The reviews as ids by the frequency of their tokens in train, those of `lstmjax.data.text`.

    Args:
      source, tokens, limit, unlabelled: as in `ngrams.load`.
      vocabulary_size: ids in use: 4 special ones and the most frequent tokens of train.
      max_length: tokens of a review; of longer ones, the last so many stay. The id START in front
        of a review is one of them.

    Returns:
      Splits train and test, each `{"ids": int32 [total], "offsets": int64 [N + 1], "label": int32
      [N] in {0, 1}}`; review n is `ids[offsets[n]:offsets[n + 1]]`, at least one id.
      `vocabulary[k]` has id k + 3. With `unlabelled` a third split of that name, labels -1.

    Raises:
      ValueError: naming an option that is wrong.
      DataError: data that cannot be read or prepared.
    """
    check_int("vocabulary_size", vocabulary_size, FIRST_WORD + 1)
    check_int("max_length", max_length, 1)
    whole = ngrams.load(source, tokens=tokens, limit=limit, unlabelled=unlabelled)
    found = {split: ngrams.of_split(whole, split) for split in whole.splits}
    counts = np.bincount(found["train"].ids, minlength=len(whole.vocabulary))
    known = np.argsort(-counts, kind="stable")[: vocabulary_size - FIRST_WORD]
    id_of = np.full(len(whole.vocabulary) + 1, text.UNKNOWN, np.int32)  # the last one is that of -1
    id_of[known] = np.arange(FIRST_WORD, FIRST_WORD + len(known))
    splits = {}
    for split, documents in found.items():
        ids = np.insert(id_of[documents.ids], documents.offsets[:-1], text.START)
        offsets = documents.offsets + np.arange(len(documents.offsets))
        kept = ngrams.last(ngrams.Documents(ids, offsets), max_length)
        splits[split] = {**kept._asdict(), "label": whole.splits[split]["label"]}
    vocabulary = (text.UNUSED, *(whole.vocabulary[k] for k in known))
    return make_dataset(whole.name, whole.source, splits, vocabulary)


def held_out(count: int, size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows of `count` training reviews to train on, and `size` others drawn by `seed`.

    Both are sorted. A `size` of `count` or more is a ValueError.
    """
    check_int("validation_size", size, 0, count - 1)
    drawn = np.random.default_rng(seed).permutation(count)
    return np.sort(drawn[size:]), np.sort(drawn[:size])


# ---- words in a row -----------------------------------------------------------------------------


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
    place = np.arange(len(ids)) - offsets[_review_of(offsets)]  # in its review
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
    review = _review_of(offsets)[:, None]
    counted = (codes >= 0) & counted[review]
    # Once for each review.
    each = np.unique((codes * (len(offsets) - 1) + review)[counted])
    found, count = np.unique(each // (len(offsets) - 1), return_counts=True)
    found, count = found[count >= min_count], count[count >= min_count]
    return np.sort(found[np.argsort(-count, kind="stable")[:at_most]])


def numbers(codes: np.ndarray, known: np.ndarray) -> np.ndarray:
    """1 + the place of each code in `known` [P], 0 where it is not there: int32 of codes' shape."""
    place = np.searchsorted(known, codes)
    hit = place < len(known)
    hit[hit] = known[place[hit]] == codes[hit]
    return np.where(hit, place + 1, 0).astype(np.int32)


def wide_features(
    ids: np.ndarray, runs: np.ndarray, offsets: np.ndarray, vocabulary_size: int
) -> np.ndarray:
    """The words and the known runs of every review, each where it comes first: int32 `[total, K]`.

    Args:
      ids: [total]; words are features under their ids.
      runs: [total, K - 1], from `numbers`; known run 1 is feature `vocabulary_size`.
      offsets: [N + 1].
      vocabulary_size: V.

    Returns:
      The features of the word and of the runs that end with it; 0 is none, ids below the first
      word's are none.
    """
    words = np.where(ids >= FIRST_WORD, ids, 0)
    runs = np.where(runs > 0, runs + (vocabulary_size - 1), 0)
    return np.stack([distinct(words, offsets), *(distinct(own, offsets) for own in runs.T)], axis=1)


def with_runs(
    kind: str,
    ids: np.ndarray,
    offsets: np.ndarray,
    known: np.ndarray,
    vocabulary_size: int,
    order: int,
) -> dict[str, np.ndarray]:
    """What a model reads of the runs of words in some reviews.

    Args:
      kind: "none", "input" or "path".
      ids, offsets: [total] and [N + 1].
      known: [P], from `known_runs`.
      vocabulary_size: V.
      order: K, 2 of "input".

    Returns:
      Nothing, `{"pairs": [total]}` from `numbers`, or `{"path": [total, K]}` from `wide_features`.
    """
    if kind == "none":
        return {}
    own = numbers(run_codes(ids, offsets, vocabulary_size, order), known)
    if kind == "input":
        return {"pairs": own[:, 0]}
    return {"path": wide_features(ids, own, offsets, vocabulary_size)}


def distinct(features: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Features [total] where a review has them for the first time, else 0; 0 is none: int32."""
    size = int(features.max(initial=0)) + 1
    _, first = np.unique(_review_of(offsets) * size + features, return_index=True)
    once = np.zeros(len(features), np.int32)
    once[first] = features[first]
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
    review, use = _review_of(offsets), np.zeros(len(label), bool)
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


def _joined(fields: dict[str, np.ndarray], more: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Two splits of the same fields, one after the other."""
    more = more | {"offsets": fields["offsets"][-1] + more["offsets"][1:]}
    return {name: np.concatenate([fields[name], more[name]]) for name in fields}


def _review_of(offsets: np.ndarray) -> np.ndarray:
    """The review of every place: int64 `[total]`."""
    return np.arange(len(offsets) - 1).repeat(np.diff(offsets))


# ---- what is trained on and scored --------------------------------------------------------------


class Part(NamedTuple):
    """Reviews to train on or to score.

    Fields:
      rows: which of its split's.
      cut: the segments of the whole split.
      arrays: of the whole split, "ids" [total] and "label" [N] among them.
      known: the codes of known runs, int64 [P].
    """

    rows: np.ndarray
    cut: chops.Segments
    arrays: dict[str, np.ndarray]
    known: np.ndarray

    @property
    def counted(self) -> dict[str, np.ndarray]:
        """What was counted in the reviews to train on and no review can be read without: of
        "known", "ratio" and "frequency", those that there are."""
        found = {name: self.arrays[name] for name in ("ratio", "frequency") if name in self.arrays}
        return found | ({"known": self.known} if self.arrays.keys() & {"pairs", "path"} else {})


def parts(
    data: Dataset,
    *,
    validation_size: int,
    seed: int,
    vocabulary_size: int,
    chop: int,
    frequency: bool = False,
    pairs: str = "none",
    path_order: int = 2,
    pairs_size: int = 0,
    min_count: int = 1,
    leave_out: bool = False,
) -> tuple[dict[str, Part], int]:
    """Reviews to train on, to validate and to test, with what is known of their words and runs.

    Reviews without labels, where the data have them, are trained on; runs, ratios and frequencies
    are counted without them.

    Args:
      data: from `load`.
      validation_size, seed: as in `held_out`.
      vocabulary_size: V.
      chop: as in `chops.segments`.
      frequency: whether to add "frequency" [V], the words' shares of the running text.
      pairs: "input" adds "pairs" [total], the numbers of known pairs; "path" adds "path"
        [total, K], from `wide_features`, and "ratio" [V + P], from `log_count_ratio`.
      path_order: K, 2 unless of "path".
      pairs_size, min_count: as in `known_runs`, at_most and min_count.
      leave_out: whether to add "ratio_without" [2, V + P], too.

    Returns:
      Parts "train", "validation" and "test", and P. Where there are reviews without labels, the
      arrays of train have "labelled_share", the share of those with a label.

    Raises:
      ValueError: naming an option that is wrong.
    """
    of_train = data.splits["train"]
    rows, held = held_out(len(of_train["label"]), validation_size, seed)
    found = {split: dict(fields) for split, fields in data.splits.items()}
    shared, known = {}, np.empty(0, np.int64)
    if frequency:
        use = np.zeros(len(of_train["label"]), bool)
        use[rows] = True
        ids = of_train["ids"][use[_review_of(of_train["offsets"])]]
        shared["frequency"] = (np.bincount(ids, minlength=vocabulary_size) / len(ids)).astype("f4")
    if pairs != "none":
        codes = run_codes(of_train["ids"], of_train["offsets"], vocabulary_size, path_order)
        known = known_runs(codes, of_train["offsets"], rows, min_count, pairs_size)
    for fields in found.values():
        text_of = fields["ids"], fields["offsets"]
        fields |= with_runs(pairs, *text_of, known, vocabulary_size, path_order)
    if pairs == "path":
        size = vocabulary_size + len(known)
        of = (found["train"]["path"], of_train["offsets"], of_train["label"], rows, size)
        shared["ratio"], without = log_count_ratio(*of)
        shared |= {"ratio_without": without} if leave_out else {}
    more = found.pop("unlabelled", None)
    if more is not None:
        share = len(rows) / (len(rows) + len(more["label"]))
        count = len(of_train["label"])
        rows = np.concatenate([rows, np.arange(count, count + len(more["label"]))])
        found["train"] = _joined(found["train"], more) | {"labelled_share": np.float32(share)}
    cuts = {split: chops.segments(fields.pop("offsets"), chop) for split, fields in found.items()}
    arrays = {split: fields | shared for split, fields in found.items()}
    every = {"train": ("train", rows), "validation": ("train", held)}
    every["test"] = "test", np.arange(len(found["test"]["label"]))
    made = {name: Part(own, cuts[of], arrays[of], known) for name, (of, own) in every.items()}
    return made, len(known)
