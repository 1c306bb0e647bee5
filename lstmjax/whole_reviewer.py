"""What a run on whole reviews thinks of a review: what it leaves for that, its folder, a text.

A run of experiments/reviews.py leaves its weights, `vocabulary.txt`, and what it counted in the
reviews that it was trained on and no review can be read without, `features.npz`:

    "known" [P]        codes of the known runs       where it has pairs
    "ratio" [V + P]    log-count ratios              where it reads them or has a wide path
    "frequency" [V]    the words' shares             where vectors are normalised

A review has the same answer here as when the run was scored: the same tokens, ids and chops, and
nothing is dropped. Letters: V words, P runs of 2 to K words, N reviews.
"""

import dataclasses
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import tyro
from scipy.special import expit

from lstmjax import checkpoint, cli, finished, review_model, reviewer
from lstmjax.data import chops, files, long_text, text, word_runs
from lstmjax.records import RunError, write_file

VOCABULARY, FEATURES = "vocabulary.txt", "features.npz"
FEATURE_BYTES = 2**30
MOST_FEATURES = 2**20  # of a word; words that go straight into the gates have none in the weights


@dataclasses.dataclass(frozen=True)
class Predict:
    """What can be asked of a run of experiments/reviews.py on the command line."""

    text: tyro.conf.Positional[str] = ""
    """The review, in quotes; - reads it from standard input. One that begins with - goes last,
    after --."""
    run: str | None = None
    """Folder of a finished run; the newest one under runs/ when not given."""


class Trained(NamedTuple):
    """A finished run.

    Attributes:
      folder: where it lies.
      settings: its configuration.
      vocabulary: its words, as in ``Dataset``.
      features: what it counted, by name.
      model: the model.
      params: the trained parameters.
      flag: that named it.
    """

    folder: Path
    settings: Any
    vocabulary: list[str]
    features: dict[str, np.ndarray]
    model: review_model.ReviewModel
    params: dict[str, Any]
    flag: str = "run"


def predict(asked: Predict, config_class: type, check: Callable, make_model: Callable) -> None:
    """Prints what a trained run thinks of a text.

    A run knows the texts that it was trained on: whole reviews, of which it reads so many tokens at
    the end. Its answer to a text of another kind, or of words that it does not know, is worth
    little. Text of any length and content will do: bytes that are no UTF-8 count as unknown
    characters.
    """
    pieces = reviewer.given(asked.text)
    folder = finished.folder(asked.run, "reviews")
    trained = read(folder, config_class, check, make_model)
    print(reviewer.said(*probability(trained, pieces), trained.folder))


def longest(settings: Any) -> int:
    """How many tokens of a review are read, the last ones: a batch has room for so many."""
    room = settings.batch_segments * settings.chop if settings.chop else settings.max_length
    return min(settings.max_length, room)


def knows_runs(settings: Any) -> bool:
    """Whether a run has counted pairs, or pairs and triples."""
    return settings.pairs != "none" or settings.ratio_inputs


# ---- what a run leaves --------------------------------------------------------------------------


def leave(folder: Path, vocabulary: Sequence[str], counted: Mapping[str, np.ndarray]) -> None:
    """Writes the files of a run that stand beside its weights.

    Args:
      folder: of the run.
      vocabulary: as in ``Dataset``.
      counted: as in ``reviews.Part``; of nothing no file is made.
    """
    write_file(folder / VOCABULARY, "\n".join(vocabulary).encode())
    if counted:
        content = io.BytesIO()
        np.savez(content, **counted)
        write_file(folder / FEATURES, content.getvalue())


def file_names(settings: Any) -> tuple[str, ...]:
    """The files that a run of some settings leaves beside its weights, and ``read`` needs."""
    counted = knows_runs(settings) or settings.normalise_embeddings
    return (VOCABULARY, FEATURES) if counted else (VOCABULARY,)


def read(
    folder: Path,
    config_class: type,
    check: Callable,
    make_model: Callable,
    which: str | None = None,
    flag: str = "run",
) -> Trained:
    """Reads a run's folder, whatever is in it.

    Args:
      folder: of the run.
      config_class: the dataclass of its settings.
      check: raises ValueError for settings that cannot be used.
      make_model: the model of some settings and a number of runs of words.
      which: None: such a run has the weights of one seed.
      flag: that named the folder, for errors.

    Returns:
      The run, the method of its recurrence the plain one.

    Raises:
      RunError: a file cannot be read, is damaged, or does not fit the others; the run has learned
        no labels.
    """
    settings = cli.stored_config(config_class, folder, flag)
    if settings.task != "sentiment":
        told = "expected sentiment: it has learned no labels"
        raise RunError(f"--{flag}: {folder} is a run of --task {settings.task}, {told}")
    path = finished.weights(folder, which)
    # What a model takes is what its weights take: no larger one is begun.
    numbers = sum(array.size for array in checkpoint.read_arrays(path).values())
    bounds = {"vocabulary_size": numbers, "hidden_size": numbers, "embedding_size": MOST_FEATURES}
    bounds |= {"max_length": reviewer.MOST_TOKENS}
    for name, bound in bounds.items():
        if getattr(settings, name) > bound:
            got = f"{name} is {getattr(settings, name)}, expected at most {bound}"
            raise RunError(f"--{flag}: {folder}/config.json does not fit: {got}")
    try:
        check(settings)
        settings = dataclasses.replace(settings, method="fused", unroll=1)
        features = read_features(folder, settings, flag)
        model = make_model(settings, len(features.get("known", ())))
        like = jax.eval_shape(lambda: review_model.init(model, jax.random.key(0)))
    except ValueError as error:
        raise RunError(f"--{flag}: {folder} is damaged: {files.reason(error)}") from error
    vocabulary = reviewer.read_vocabulary(folder, flag)
    most = settings.vocabulary_size - text.INDEX_FROM
    if vocabulary[0] != text.UNUSED or len(vocabulary) > most:
        expected = f"expected {text.UNUSED} first, of {most} at most"
        raise RunError(f"--{flag}: {folder}/{VOCABULARY} has {len(vocabulary)} lines, {expected}")
    params = checkpoint.load_params(path, like)
    return Trained(folder, settings, vocabulary, features, model, params, flag)


def read_features(folder: Path, settings: Any, flag: str = "run") -> dict[str, np.ndarray]:
    """What a run counted, as its settings need it.

    Raises:
      RunError: the file cannot be read.
      ValueError: it holds something else.
    """
    if FEATURES not in file_names(settings):
        return {}
    try:
        found = files.read_arrays(folder / FEATURES, FEATURE_BYTES)
    except OSError as error:
        raise RunError(f"--{flag}: cannot read {folder / FEATURES}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{FEATURES}: {files.reason(error)}") from error
    size, pairs, expected = settings.vocabulary_size, np.size(found.get("known", ())), {}
    if knows_runs(settings):
        expected["known"] = np.int64, (pairs,)
    if settings.pairs == "path" or settings.ratio_inputs:
        expected["ratio"] = np.float32, (size + pairs,)
    if settings.normalise_embeddings:
        expected["frequency"] = np.float32, (size,)
    for name in sorted(found.keys() | expected.keys()):
        dtype, shape = expected.get(name, (None, ()))
        array = found.get(name)
        if array is None or dtype is None or (array.dtype, array.shape) != (dtype, shape):
            got = "nothing" if array is None else f"{array.dtype}{list(array.shape)}"
            want = "nothing" if dtype is None else f"{np.dtype(dtype)}{list(shape)}"
            raise ValueError(f"{FEATURES}: {name} is {got}, expected {want}")
    known = found.get("known", np.empty(0, np.int64))
    rest, words = known, np.ones(len(known), bool)
    for place in range(settings.path_order):  # the last word first; of a pair no third one is left
        rest, word = np.divmod(rest, size)
        words &= (word >= word_runs.FIRST_WORD) | ((place > 1) & (word == 0) & (rest == 0))
    if not (words.all() and (rest == 0).all() and (np.diff(known) > 0).all()):
        raise ValueError(f"{FEATURES}: known holds something else than runs in ascending order")
    for name, holds in (("ratio", np.isfinite), ("frequency", lambda shares: shares >= 0)):
        array = found.get(name, np.zeros(1, np.float32))
        if not (np.isfinite(array).all() and holds(array).all()):
            raise ValueError(f"{FEATURES}: {name} holds what it cannot be")
    if found.get("ratio", np.zeros(1))[0] != 0:
        raise ValueError(f"{FEATURES}: ratio of no feature is not 0")
    return found


# ---- answers ------------------------------------------------------------------------------------


def probability(trained: Trained, pieces: Iterable[str]) -> tuple[float, int, int]:
    """How probable it is that a review is positive.

    Args:
      trained: the run.
      pieces: the text, as ``long_text.words_at_end`` takes it.

    Returns:
      (the probability, how many of the tokens that were looked at are known, how many they are).

    Raises:
      ValueError: there is no word in the text.
      RunError: the answer is no number.
    """
    length = longest(trained.settings)
    tokens = long_text.words_at_end(pieces, length, tokens=trained.settings.tokens)
    if not tokens:
        raise ValueError("text: got no word, expected a review")
    ids = encode(tokens, trained.vocabulary, length)
    (z,) = logits(trained, ids, np.array([0, len(ids)], np.int64))
    known = int((ids >= word_runs.FIRST_WORD).sum())
    return float(positive(trained.settings, z)), known, len(tokens)


def encode(tokens: Sequence[str], vocabulary: Sequence[str], length: int) -> np.ndarray:
    """The ids of a review as in ``reviews.load``: START in front, and the last ``length`` stay.

    Args:
      tokens: of the review, the last ``length`` at least.
      vocabulary: as in ``Dataset``.
      length: 1 or more.

    Returns:
      int32 [at most ``length``].
    """
    places = {token: number for number, token in enumerate(vocabulary[1:], word_runs.FIRST_WORD)}
    ids = [text.START, *(places.get(token, text.UNKNOWN) for token in tokens)]
    return np.array(ids[-length:], np.int32)


def logits(
    trained: Trained, ids: np.ndarray, offsets: np.ndarray, count: int | None = None
) -> np.ndarray:
    """z of many reviews, a batch at a time: positive where z > 0.

    Args:
      trained: the run.
      ids, offsets: the reviews, int32 [total] and int64 [N + 1], as from ``reviews.load``.
      count: only of so many, the first ones; None for all.

    Returns:
      float64 [N], or as many as there are.

    Raises:
      RunError: an answer is no number.
    """
    settings, model, features = trained.settings, trained.model, dict(trained.features)
    offsets = offsets[: None if count is None else count + 1]
    ids, size = ids[: offsets[-1]], len(offsets) - 1
    known = features.pop("known", np.empty(0, np.int64))
    arrays = {"ids": ids, "label": np.zeros(size, np.int32)} | features
    of_runs = known, settings.vocabulary_size, settings.path_order, settings.ratio_inputs
    arrays |= word_runs.with_runs(settings.pairs, ids, offsets, *of_runs)
    if settings.ratio_inputs:
        arrays["ratios"] = arrays["ratio"][arrays.pop("features")]
    if settings.place_inputs:
        arrays["places"] = word_runs.places(offsets)
    cut = chops.segments(offsets, settings.chop)
    packed = chops.pack(cut, np.arange(size), settings.batch_segments)
    plan = chops.lay_out(cut, packed, chops.width([packed]))
    take = review_model.chops(int(cut.length.max()))
    answer = jax.jit(lambda params, data, pick: _logits(model, params, take(data, pick)))
    arrays, params = jax.device_put((arrays, trained.params))
    found = np.full(size, np.nan)
    for k in range(len(plan["rows"])):
        pick = {name: array[k] for name, array in plan.items()}
        own = pick["weight"] > 0
        found[pick["rows"][own]] = np.asarray(answer(params, arrays, pick), np.float64)[own]
    if not np.isfinite(found).all():
        told = f"{trained.folder} is damaged: its weights give no number"
        raise RunError(f"--{trained.flag}: {told}")
    return found


def _logits(model: review_model.ReviewModel, params: dict, batch: dict) -> jax.Array:
    """z of each review of a batch, with nothing dropped: [R]."""
    keys = review_model.split_keys(None)
    xs = review_model.inputs(model, params, batch, keys)
    across = None
    if model.pairs == "path":
        across = review_model.wide(params, batch, len(batch["label"]), keys.path, 0.0)
    return model.joined(review_model.deep(model, params, xs, batch, keys), across)


def positive(settings: Any, z: np.ndarray) -> np.ndarray:
    """How probable it is that reviews of logits z are positive, by the loss that was learned with.

    σ(z) of the logistic loss; of the squared one, which makes z the mean of ±1, (1 + z) / 2 within
    0 and 1.
    """
    if settings.loss == "squared":
        return np.clip((1 + z) / 2, 0, 1)
    return expit(z)
