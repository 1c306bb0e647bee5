"""MNIST digits (LeCun et al., 1998) as sequences: rows, pixels, or pixels in a named order.

TFDS shuffles when it prepares: its 60,000 training images are those of the original file in
another order, so the validation split here is the first 5,000 *in TFDS's order*, not the first
5,000 of the original file. The sizes 55,000/5,000/10,000 are those of the TensorFlow 1 tutorials.
"""

import hashlib
import os

import numpy as np

from lstmjax.data import cache, offline, permutations, prepared
from lstmjax.data.dataset import Dataset, check_choice, check_int, make_dataset

LAYOUTS = ("rows", "pixels", "permuted")
PIXELS = 784


def load(
    source: str = "auto",
    *,
    layout: str = "rows",
    permutation: str | None = None,
    validation_size: int = 5000,
    cache_dir: str | os.PathLike | None = None,
) -> Dataset:
    """Load the digits as sequences of bytes; scaling to [0, 1] is left to the model.

    Args:
      source: `"auto"`, `"tfds"` or `"offline"` (`lstmjax.data.prepared.locate`).
      layout: `"rows"` T = 28, D = 28; `"pixels"` T = 784, D = 1, row by row; `"permuted"` the same
        in the order of `permutation`: x'_t = x_{p(t)}.
      permutation: a name in `PERMUTATIONS`, for layout `"permuted"` and only for it.
      validation_size: V, the first images of train.
      cache_dir: see `lstmjax.data.cache.folder`.

    Returns:
      Splits train, validation, test: `{"image": uint8 [N, T, D], "label": int32 [N] in [0, 10)}`.

    Raises:
      ValueError: naming an option that is wrong.
      DataError: data that cannot be read or prepared.
    """
    check_choice("layout", layout, LAYOUTS)
    check_int("validation_size", validation_size, 0)
    if layout == "permuted":
        check_choice("permutation", permutation, tuple(PERMUTATIONS))
    elif permutation is not None:
        raise ValueError(
            f"permutation: got {permutation!r} with layout {layout!r}, expected None, or "
            "layout 'permuted'"
        )
    name, origin, stored = _load_images(source, cache_dir)
    train = {"image": stored["train_image"], "label": stored["train_label"]}
    check_int("validation_size", validation_size, 0, len(train["label"]) - 1)
    whole = {
        "train": {field: array[validation_size:] for field, array in train.items()},
        "validation": {field: array[:validation_size] for field, array in train.items()},
        "test": {"image": stored["test_image"], "label": stored["test_label"]},
    }
    splits = {
        split: {"image": _lay_out(arrays["image"], layout, permutation), "label": arrays["label"]}
        for split, arrays in whole.items()
    }
    return make_dataset(name, origin, splits)


def _load_images(source: str, cache_dir) -> tuple[str, str, cache.Arrays]:
    folder = prepared.locate("mnist", source)
    if folder is None:
        glyphs = offline.glyphs()
        key = offline.digits_key(glyphs)
        stored = cache.cached(
            "digits", key, lambda: _flatten(offline.digits(glyphs)), cache_dir, _fits
        )
        return "offline_digits", "offline", stored
    key = hashlib.sha256(b"images 1\n" + prepared.fingerprint("mnist", folder).encode()).hexdigest()
    stored = cache.cached(
        "mnist", key, lambda: _flatten(prepared.read_digits(folder)), cache_dir, _fits
    )
    return "mnist", "tfds", stored


def _flatten(splits: dict[str, tuple[np.ndarray, np.ndarray]]) -> cache.Arrays:
    arrays = {}
    for split, (images, labels) in splits.items():
        arrays |= {f"{split}_image": images, f"{split}_label": labels}
    return arrays


def _fits(arrays: cache.Arrays) -> bool:
    """Whether these are arrays as `_flatten` makes them."""
    good = len(arrays) == 4
    for split in prepared.SPLITS:
        images, labels = arrays[f"{split}_image"], arrays[f"{split}_label"]
        good = good and (images.dtype, labels.dtype) == (np.uint8, np.int32)
        good = good and labels.ndim == 1 and images.shape == (len(labels), 28, 28)
        good = good and len(labels) > 0 and set(labels.tolist()) <= set(range(10))
    return bool(good)


def _lay_out(images: np.ndarray, layout: str, permutation_name: str | None) -> np.ndarray:
    """uint8 `[N, 28, 28]` → `[N, T, D]`."""
    if layout == "rows":
        return images
    pixels = images.reshape(len(images), PIXELS)
    if layout == "permuted":
        pixels = pixels[:, permutation(permutation_name)]
    return pixels[..., None]


# In the words of the papers; experiments/smnist.py has the names that need no quotes in a shell.
PERMUTATIONS = {
    "RandomState(92916)": "numpy-92916",
    "torch12008": "torch-12008",
    "RandomState(0)": "numpy-0",
    "bit_reversal": "bit-reversal",
}


def permutation(name: str) -> np.ndarray:
    """One of the orders of `lstmjax.data.permutations`; int64 `[784]`.

    Args:
      name: "RandomState(92916)", "torch12008", "RandomState(0)" or "bit_reversal".

    Raises:
      ValueError: an unknown name.
    """
    check_choice("permutation", name, tuple(PERMUTATIONS))
    return permutations.permutation(PERMUTATIONS[name], PIXELS)
