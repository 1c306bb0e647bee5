"""IMDB film reviews as word ids, for telling positive from negative (Maas et al., 2011).

25,000 reviews to train on and 25,000 to test on, balanced; the ids are those of Keras
(`lstmjax.data.text`), from the vocabulary of all 25,000 training reviews. Whole reviews are cached
as ids, so that other lengths and vocabulary sizes cost nothing.
"""

import hashlib
import os
from collections.abc import Sequence

import numpy as np

from lstmjax.data import cache, offline, prepared, text
from lstmjax.data.dataset import Dataset, check_int, make_dataset


def load(
    source: str = "auto",
    *,
    num_words: int = 10000,
    max_length: int = 80,
    padding: str = "pre",
    truncating: str = "pre",
    validation_size: int = 2500,
    seed: int = 0,
    cache_dir: str | os.PathLike | None = None,
) -> Dataset:
    """Load the reviews as ids; the defaults are those of the TensorFlow 2 tutorial.

    Args:
      source: `"auto"`, `"tfds"` or `"offline"` (`lstmjax.data.prepared.locate`).
      num_words: ids lie in [0, num_words); 4 of them are no words (`lstmjax.data.text`).
      max_length: L, tokens per review.
      padding: `"pre"` or `"post"`: where zeros go.
      truncating: `"pre"` keeps the end of long reviews, `"post"` the beginning.
      validation_size: V, reviews held out from train by `seed`; 0 leaves empty arrays.
      seed: of the hold-out alone.
      cache_dir: see `lstmjax.data.cache.folder`.

    Returns:
      Splits train `[25000 − V]`, validation `[V]`, test `[25000]`, each
      `{"ids": int32 [N, L], "lengths": int32 [N] in [1, L], "label": int32 [N] in {0, 1}}`.
      Both parts of the training split keep its order. `vocabulary[k]` has id k + 3.

    Raises:
      ValueError: naming an option that is wrong.
      DataError: data that cannot be read or prepared.
    """
    text.check_options(num_words, max_length, padding, truncating)
    check_int("validation_size", validation_size, 0)
    check_int("seed", seed, 0)
    folder = prepared.locate("imdb_reviews", source)
    if folder is None:
        name, origin, content = "offline_reviews", "offline", offline.REVIEWS_VERSION
    else:
        name, origin = prepared.FULL_NAMES["imdb_reviews"], "tfds"
        content = prepared.fingerprint("imdb_reviews", folder)
    key = hashlib.sha256(f"{text.VERSION}\n{name}\n{content}".encode()).hexdigest()
    stored = cache.cached("reviews", key, lambda: _tokenise(folder), cache_dir, _fits)

    vocabulary = stored["vocabulary"].tobytes().decode().split("\n")[: num_words - text.INDEX_FROM]
    whole = {}
    for split in prepared.SPLITS:
        reviews = text.Ragged(stored[f"{split}_ids"], stored[f"{split}_offsets"])
        whole[split] = text.pad(
            reviews,
            num_words=num_words,
            max_length=max_length,
            padding=padding,
            truncating=truncating,
        )
        whole[split]["label"] = stored[f"{split}_label"]
    train, validation = hold_out(whole["train"], validation_size, seed)
    splits = {"train": train, "validation": validation, "test": whole["test"]}
    return make_dataset(name, origin, splits, vocabulary)


def encode(
    texts: Sequence[str],
    vocabulary: Sequence[str],
    *,
    num_words: int = 10000,
    max_length: int = 80,
    padding: str = "pre",
    truncating: str = "pre",
) -> dict[str, np.ndarray]:
    """Ids of new texts, made exactly as those of `load`.

    Args:
      texts: N texts.
      vocabulary: `Dataset.vocabulary`.
      num_words, max_length, padding, truncating: as given to `load`.

    Returns:
      `{"ids": int32 [N, L], "lengths": int32 [N]}`.

    Raises:
      ValueError: naming an option that is wrong; `texts` that is one string.
    """
    if isinstance(texts, str) or not all(isinstance(one, str) for one in texts):
        raise ValueError(f"texts: got {type(texts).__name__}, expected a list of strings")
    text.check_options(num_words, max_length, padding, truncating)
    return text.pad(
        text.look_up(texts, vocabulary),
        num_words=num_words,
        max_length=max_length,
        padding=padding,
        truncating=truncating,
    )


def _tokenise(folder) -> cache.Arrays:
    """Whole reviews as flat ids in the vocabulary of train: what the cache keeps."""
    raw = offline.reviews() if folder is None else prepared.read_reviews(folder)
    train, vocabulary = text.index(raw["train"][0])
    arrays = {"vocabulary": np.frombuffer("\n".join(vocabulary).encode(), np.uint8)}
    for split, reviews in ("train", train), ("test", text.look_up(raw["test"][0], vocabulary)):
        arrays[f"{split}_ids"], arrays[f"{split}_offsets"] = reviews
        arrays[f"{split}_label"] = raw[split][1]
    return arrays


def _fits(arrays: cache.Arrays) -> bool:
    """Whether these are arrays as `_tokenise` makes them."""
    vocabulary = arrays["vocabulary"]
    words = vocabulary.tobytes().decode().split("\n")
    good = len(arrays) == 7 and vocabulary.dtype == np.uint8 and words[0] == text.UNUSED
    for split in prepared.SPLITS:
        ids, offsets, label = (arrays[f"{split}_{name}"] for name in ("ids", "offsets", "label"))
        good = good and (ids.dtype, offsets.dtype, label.dtype) == (np.int32, np.int64, np.int32)
        good = good and ids.ndim == label.ndim == 1 and offsets.shape == (len(label) + 1,)
        good = good and len(label) > 0 and set(label.tolist()) <= {0, 1}
        good = good and (offsets[0], offsets[-1]) == (0, len(ids)) and (np.diff(offsets) > 0).all()
        good = good and text.START <= ids.min() and ids.max() < len(words) + text.INDEX_FROM
    return bool(good)


def hold_out(train: dict, size: int, seed: int) -> tuple[dict, dict]:
    """`train` without, and only, `size` rows chosen by `seed`; both in the order of `train`.

    `train` is a dict of [N, ...] arrays, "label" among them; a `size` of N or more is a ValueError.
    """
    count = len(train["label"])
    check_int("validation_size", size, 0, count - 1)
    held_out = np.zeros(count, bool)
    held_out[np.random.default_rng(seed).permutation(count)[:size]] = True
    rest = {name: array[~held_out] for name, array in train.items()}
    return rest, {name: array[held_out] for name, array in train.items()}
