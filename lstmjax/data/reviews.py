"""Whole film reviews end to end as one array of ids, and what is trained on and scored.

    data = load(vocabulary_size=30_000, max_length=1_000)
    found, count = parts(data, validation_size=2_500, seed=0, vocabulary_size=30_000, chop=50)

Whatever is counted, runs, ratios and frequencies, is counted in the reviews that are trained on.
Words in a row and ratios are in word_runs.py; how reviews are cut and packed is in chops.py.

Letters: N reviews, V words, P known runs of 2 to K words, F features.
"""

from typing import NamedTuple

import numpy as np

from lstmjax.data import alike, chops, ngrams, text, word_runs
from lstmjax.data.dataset import Dataset, check_int, make_dataset
from lstmjax.data.word_runs import FIRST_WORD


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


def taught(data: Dataset, positive: np.ndarray, confidence: float) -> Dataset:
    """Reviews without labels, with the labels that a teacher gives those that it is sure of.

    A split "taught" takes the place of "unlabelled": `parts` counts and trains on it as on the
    reviews that came with labels, and holds none of it out (self-training: Yarowsky, 1995).

    Args:
      data: from `load`, with `unlabelled`.
      positive: [N] of the reviews without labels, how probable it is that each is positive.
      confidence: 0.5 to 1: what the more probable of the two answers has to have.

    Raises:
      ValueError: `positive` is no probability for each of them; the teacher is sure of none.
    """
    splits = dict(data.splits)
    of = splits.pop("unlabelled")
    size = len(of["label"])
    if np.shape(positive) != (size,) or not ((positive >= 0) & (positive <= 1)).all():
        got = f"shape {list(np.shape(positive))}"
        raise ValueError(f"positive: got {got}, expected [{size}] probabilities")
    sure = np.maximum(positive, 1 - positive) >= confidence
    if not sure.any():
        raise ValueError(f"confidence: got {confidence:g}, expected less: no answer is so sure")
    lengths = np.diff(of["offsets"])
    splits["taught"] = {
        "ids": of["ids"][sure.repeat(lengths)],
        "offsets": np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths[sure])]),
        "label": (positive[sure] > 0.5).astype(np.int32),
    }
    return data._replace(splits=splits)


def held_out(
    fields: dict[str, np.ndarray], size: int, seed: int, how: str = "random"
) -> tuple[np.ndarray, np.ndarray]:
    """The rows of the training reviews to train on, and `size` others drawn by `seed`.

    Args:
      fields: of the split, from `load`.
      size: fewer than there are.
      seed: 0 or more.
      how: "random", one by one, or "alike", with those of the same film as far as `alike` can tell
        from the ids that `load` has left: of another `max_length`, other reviews are held out.

    Returns:
      Both sorted.

    Raises:
      ValueError: `size` is wrong.
    """
    count = len(fields["label"])
    check_int("validation_size", size, 0, count - 1)
    if how == "alike":
        held = alike.held_out(alike.groups(fields["ids"], fields["offsets"]), size, seed)
        return np.flatnonzero(~held), np.flatnonzero(held)
    drawn = np.random.default_rng(seed).permutation(count)
    return np.sort(drawn[size:]), np.sort(drawn[:size])


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
        known = self.arrays.keys() & {"pairs", "ratios", "path"}
        return found | ({"known": self.known} if known else {})


def parts(
    data: Dataset,
    *,
    validation_size: int,
    seed: int,
    vocabulary_size: int,
    chop: int,
    hold_out: str = "random",
    frequency: bool = False,
    place_inputs: bool = False,
    ratio_inputs: bool = False,
    pairs: str = "none",
    path_order: int = 2,
    pairs_size: int = 0,
    min_count: int = 1,
    leave_out: bool = False,
    folds: int = 2,
) -> tuple[dict[str, Part], int]:
    """Reviews to train on, to validate and to test, with what is known of their words and runs.

    Reviews without labels, where the data have them, are trained on; runs, ratios and frequencies
    are counted without them, but with those that were `taught`.

    Args:
      data: from `load` or `taught`.
      validation_size, seed, hold_out: as in `held_out`, size, seed and how.
      vocabulary_size: V.
      chop: as in `chops.segments`.
      frequency: whether to add "frequency" [V], the words' shares of the running text.
      place_inputs: whether to add "places" [total, 4], from `word_runs.places`.
      ratio_inputs: whether to add "ratios" [total, K] and "ratio" [V + P], from
        `word_runs.crossed_ratios`.
      pairs: "input" adds "pairs" [total], the numbers of known pairs; "path" adds "path"
        [total, K], from `word_runs.with_runs`, and "ratio" [V + P], from
        `word_runs.log_count_ratio`.
      path_order: K, 2 of "input".
      pairs_size, min_count: as in `word_runs.known_runs`, at_most and min_count.
      leave_out: whether to add "ratio_without" [2, V + P], too, of "path".
      folds: as in `word_runs.crossed_ratios`.

    Returns:
      Parts "train", "validation" and "test", and P. Where there are reviews without labels, the
      arrays of train have "labelled_share", the share of those with a label.

    Raises:
      ValueError: naming an option that is wrong.
    """
    of_train = data.splits["train"]
    rows, held = held_out(of_train, validation_size, seed, hold_out)
    found = {split: dict(fields) for split, fields in data.splits.items()}
    if "taught" in found:
        count = len(of_train["label"])
        of_train = _joined(of_train, found.pop("taught"))
        rows = np.concatenate([rows, np.arange(count, len(of_train["label"]))])
        found["train"] = dict(of_train)
    shared, known = {}, np.empty(0, np.int64)
    if frequency:
        use = np.zeros(len(of_train["label"]), bool)
        use[rows] = True
        ids = of_train["ids"][use[word_runs.review_of(of_train["offsets"])]]
        shared["frequency"] = (np.bincount(ids, minlength=vocabulary_size) / len(ids)).astype("f4")
    if pairs != "none" or ratio_inputs:
        codes = word_runs.run_codes(
            of_train["ids"], of_train["offsets"], vocabulary_size, path_order
        )
        known = word_runs.known_runs(codes, of_train["offsets"], rows, min_count, pairs_size)
    of_runs = known, vocabulary_size, path_order, ratio_inputs
    for fields in found.values():
        fields |= word_runs.with_runs(pairs, fields["ids"], fields["offsets"], *of_runs)
        fields |= {"places": word_runs.places(fields["offsets"])} if place_inputs else {}
    of = (of_train["offsets"], of_train["label"], rows, vocabulary_size + len(known))
    if pairs == "path":
        shared["ratio"], without = word_runs.log_count_ratio(found["train"]["path"], *of)
        shared |= {"ratio_without": without} if leave_out else {}
    if ratio_inputs:
        features = {split: fields.pop("features") for split, fields in found.items()}
        shared["ratio"], crossed = word_runs.crossed_ratios(features["train"], *of, folds, seed)
        for split, own in features.items():
            found[split]["ratios"] = crossed if split == "train" else shared["ratio"][own]
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


def _joined(fields: dict[str, np.ndarray], more: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Two splits of the same fields, one after the other."""
    more = more | {"offsets": fields["offsets"][-1] + more["offsets"][1:]}
    return {name: np.concatenate([fields[name], more[name]]) for name in fields}
