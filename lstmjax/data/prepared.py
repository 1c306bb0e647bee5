"""Prepared TFDS data on this machine: where it is, whether it can be read, and its arrays.

`array_record` files are read through `tfds.data_source` objects, without TensorFlow.
"""

import hashlib
import io
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lstmjax.data import files, shards
from lstmjax.data.dataset import SOURCES, DataError, DownloadError, check_choice, one_line

FULL_NAMES = {"imdb_reviews": "imdb_reviews/plain_text", "mnist": "mnist"}
SPLITS = ("train", "test")
UNLABELLED = "unsupervised"  # a third split of the reviews


def data_folder(data_dir: str | os.PathLike | None = None) -> Path:
    """Where TFDS keeps data: `data_dir`, else `$TFDS_DATA_DIR`, else `~/tensorflow_datasets`."""
    chosen = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return Path(os.path.expanduser(os.fspath(chosen)))


def locate(name: str, source: str) -> Path | None:
    """The folder of prepared data to read, or None for the offline data.

    Args:
      name: `"imdb_reviews"` or `"mnist"`.
      source: `"offline"` never looks; `"tfds"` insists; `"auto"` takes what is prepared, else
        prepares if the files are on this machine or the network is there, else None.

    Raises:
      DataError: `"tfds"` without data; data that is there but cannot be read or prepared.
      ValueError: an unknown source.
    """
    check_choice("source", source, SOURCES)
    if source == "offline":
        return None
    found = find(name)
    if found is not None:
        return found
    # Imported here: `python -m lstmjax.data.prepare` warns if the package had it imported before.
    from lstmjax.data import prepare

    try:
        return prepare.prepare(name)
    except DownloadError as error:
        if source == "auto":
            return None
        raise DataError(
            f"no prepared {name} in {data_folder()}, and {error}; set TFDS_DATA_DIR to a folder "
            f"that has it, or choose the offline data"
        ) from error


def find(name: str, data_dir: str | os.PathLike | None = None) -> Path | None:
    """The folder of the newest prepared version of `name`, or None where there is none.

    Raises:
      DataError: the folder cannot be listed, is damaged, or holds a format that only TensorFlow
        can read.
    """
    root = data_folder(data_dir)
    versions = root / FULL_NAMES[name]
    try:
        if root.exists() and not root.is_dir():
            raise NotADirectoryError("is not a folder")
        found = [path for path in versions.iterdir() if re.fullmatch(r"\d+\.\d+\.\d+", path.name)]
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(
            f"cannot read the data folder {root} ({one_line(error)}); set TFDS_DATA_DIR to a "
            "folder you can read"
        ) from error
    if not found:
        return None
    folder = max(found, key=lambda path: tuple(map(int, path.name.split("."))))
    _check_format(name, folder)
    return folder


def _check_format(name: str, folder: Path) -> None:
    try:
        info = files.read_json(folder / "dataset_info.json")
        file_format = info.get("fileFormat", "tfrecord")  # TFDS named no format before it had two
        missing = [split for split in SPLITS if not _shards(folder, split)]
    except (OSError, ValueError, AttributeError) as error:
        raise _damaged(name, folder, one_line(error)) from error
    if missing and file_format != "array_record":
        raise DataError(
            f"{folder} holds {name} as {file_format}, which only TensorFlow reads; prepare it as "
            f"array_record elsewhere: python -m lstmjax.data.prepare {name} --data-dir OTHER, and "
            "set TFDS_DATA_DIR=OTHER"
        )
    if missing:
        raise _damaged(name, folder, f"no files for {' and '.join(missing)}")


def _shards(folder: Path, split: str) -> list[Path]:
    found = folder.glob(f"*-{split}.array_record-*")
    return sorted(path for path in found if path.is_file())


def _damaged(name: str, folder: Path, what: str) -> DataError:
    return DataError(
        f"the {name} data in {folder} is damaged or incomplete ({what}); delete that folder and "
        f"run: python -m lstmjax.data.prepare {name}"
    )


def fingerprint(name: str, folder: Path) -> str:
    """Hash of the bytes of the train and test files; 64 hex digits, a fraction of a second."""
    digest = hashlib.sha256()
    try:
        for split in SPLITS:
            for shard in _shards(folder, split):
                with open(shard, "rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
    except OSError as error:
        raise _damaged(name, folder, one_line(error)) from error
    return digest.hexdigest()


def read_reviews(folder: Path) -> dict[str, tuple[list[str], np.ndarray]]:
    """Split name → (texts, int32 labels `[N]`: 0 negative, 1 positive), in the order on disk."""
    splits = {}
    for split, examples in _read("imdb_reviews", folder, {}).items():
        texts = [example["text"].decode("utf-8", errors="replace") for example in examples]
        splits[split] = texts, _labels("imdb_reviews", folder, examples, 2)
    return splits


def read_unlabelled(folder: Path) -> list[str]:
    """The texts of the reviews that have no label, in the order on disk.

    Raises:
      DataError: the folder has none, or is damaged.
    """
    if not _shards(folder, UNLABELLED):
        raise DataError(
            f"{folder} holds no unlabelled reviews; prepare it elsewhere, with them: python -m "
            "lstmjax.data.prepare imdb_reviews --data-dir OTHER, and set TFDS_DATA_DIR=OTHER"
        )
    examples = _read("imdb_reviews", folder, {}, (UNLABELLED,))[UNLABELLED]
    return [example["text"].decode("utf-8", errors="replace") for example in examples]


def read_digits(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Split name → (uint8 images `[N, 28, 28]`, int32 labels `[N]`), in the order on disk."""
    import tensorflow_datasets as tfds

    # TFDS would decode each image with four times the work, and advertise OpenCV on stderr.
    skip = {"image": tfds.decode.SkipDecoding()}
    splits = {}
    for split, examples in _read("mnist", folder, skip).items():
        images = np.empty((len(examples), 28, 28), np.uint8)
        try:
            for image, example in zip(images, examples, strict=True):
                image[...] = decode_png(example["image"])
        except Exception as error:  # PIL says SyntaxError of a bad PNG, and what else zlib says
            raise _damaged("mnist", folder, one_line(error)) from error
        splits[split] = images, _labels("mnist", folder, examples, 10)
    return splits


def decode_png(png: bytes) -> np.ndarray:
    """uint8 `[28, 28]`; ValueError for another size or mode, what PIL raises for other damage."""
    from PIL import Image

    with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
        if (image.size, image.mode) != ((28, 28), "L"):  # looked at before anything is decoded
            raise ValueError(f"an image of {image.size} {image.mode}, expected 28 × 28 in grey")
        return np.asarray(image)


def _labels(name: str, folder: Path, examples: list[dict], classes: int) -> np.ndarray:
    """int32 `[N]`, each in [0, classes)."""
    labels = np.array([example["label"] for example in examples], np.int64)
    if len(labels) == 0 or labels.min() < 0 or labels.max() >= classes:
        raise _damaged(name, folder, f"no examples, or labels that are not 0 to {classes - 1}")
    return labels.astype(np.int32)


def _read(
    name: str, folder: Path, decoders: dict, splits: Sequence[str] = SPLITS
) -> dict[str, list[dict]]:
    """Every example of some splits; anything that goes wrong on the way is a DataError."""
    import tensorflow_datasets as tfds

    try:
        shards.check_features(name, folder)
        info = files.read_json(folder / "dataset_info.json")
        for split in splits:
            shards.check_split(name, split, info, _shards(folder, split))
        builder = tfds.builder_from_directory(folder)
        found = {}
        for split in splits:
            source = builder.as_data_source(split=split, decoders=decoders or None)
            examples = list(source.__getitems__(range(len(source))))
            # What a truncated file has lost is read as empty records, without an error.
            if any(value is None for example in examples for value in example.values()):
                raise ValueError(f"empty examples in {split}")
            found[split] = examples
    except ImportError as error:
        raise DataError(
            f"cannot read {folder} ({one_line(error)}); install lstmjax with its dependencies"
        ) from error
    except Exception as error:  # TFDS and array_record raise what they like for damaged files
        raise _damaged(name, folder, one_line(error)) from error
    return found
