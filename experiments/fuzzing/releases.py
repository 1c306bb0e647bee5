"""Readers of releases, and of images for predict."""

import dataclasses
import gzip
import hashlib
import io
import json
import struct
from pathlib import Path

import card
import jax
import mnist as digits_script
import numpy as np
from PIL import Image

from fuzzing.mutations import Files, scratch, taken, written
from fuzzing.runs import RUN, WORDS, trained
from lstmjax import checkpoint, digits_reader, releases
from lstmjax.provenance import params_sha256
from lstmjax.records import Run

DIGITS = digits_script.Config(hidden_size=2, epochs=1, devices=1)
MEASURED = [True, True, False, True, False]  # which test examples come out right

# ---- images -------------------------------------------------------------------------------------


def image_seeds() -> list[Files]:
    found = []
    for seed in range(3):
        images = np.random.default_rng(seed).integers(0, 256, (1 + seed, 28, 28), np.uint8)
        png = io.BytesIO()
        Image.fromarray(images[0]).save(png, "PNG")
        idx = digits_reader.IDX + struct.pack(">3i", *images.shape) + images.tobytes()
        found += [{"image.png": png.getvalue()}, {"image-idx": idx}]
        found.append({"image-ubyte.gz": gzip.compress(idx, mtime=0)})
    return found


def image_read(folder: Path) -> None:
    """What `predict` does with files before a model sees them."""
    found = list(digits_reader.images([str(path) for path in sorted(folder.iterdir())]))
    assert all(image.shape == (28, 28) and image.dtype == np.uint8 for _, image in found)
    even = np.full(10, 0.1)
    assert all("\n" not in f"{name}: {digits_reader.line(image, even)}" for name, image in found)


# ---- releases -----------------------------------------------------------------------------------


def release_seeds() -> list[Files]:
    """A release of a run of reviews, and one of a run of digits."""
    reviews_params = trained()[1]
    model = digits_script.make_model(DIGITS)
    zeros = np.zeros((1, 28, 28), np.float32)
    digits_params = jax.jit(model.init)(jax.random.key(0), zeros)["params"]
    return [
        _release("imdb", RUN, reviews_params, {"vocabulary.txt": "\n".join(WORDS).encode()}),
        _release("mnist", DIGITS, digits_params, {}),
    ]


def _release(experiment: str, config, params, more: Files) -> Files:
    """The files of a release as `card.py make` writes them, their numbers made up."""
    digest, count = params_sha256(params), len(MEASURED)
    with scratch() as folder:
        settings = dataclasses.replace(config, out=str(folder / "run"))
        with Run.create(experiment, settings, out=settings.out) as run:
            record = run.finish(
                dataset={"name": "made up", "source": "offline", "sha256": "0" * 64},
                metrics={"test_accuracy": sum(MEASURED) / count},
                seconds={"compile": 1.0, "train": 2.0, "eval": 0.5},
                params_sha256=digest,
                seed=0,
            )
        weights = f"{experiment}-{digest[:12]}.safetensors"
        checkpoint.save_params(folder / weights, params)
        release = {
            "format": card.FORMAT,
            "weights": weights,
            "which": None,
            "params_sha256": digest,
            "measured": {"count": count, "correct": sum(MEASURED)},
            "correct": np.packbits(MEASURED).tobytes().hex(),
        }
        kept = {"config.json": record["config"], "record.json": record, card.RELEASE: release}
        files = {name: json.dumps(value).encode() for name, value in kept.items()}
        files |= {weights: (folder / weights).read_bytes(), card.CARD: b"# made up\n"} | more
        releases.write(folder / "out", files)
        return taken(folder / "out")


def release_seal(files: Files) -> Files:
    """The hashes are right again: what the files say has to stand for itself."""
    with scratch() as folder:
        content = {name: data for name, data in files.items() if name != releases.SUMS}
        written({}, folder / "out")
        releases.write(folder / "out", content)
        sums = (folder / "out" / releases.SUMS).read_bytes()
    assert hashlib.sha256(content[card.RELEASE]).hexdigest().encode() in sums
    return content | {releases.SUMS: sums}


def release_read(folder: Path) -> None:
    """What `card.py verify` does before it loads data."""
    names = releases.check(folder)
    assert sorted([*names, releases.SUMS]) == sorted(path.name for path in folder.iterdir())
    run, release = card.opened(folder, None), card.read_release(folder)
    card.check_weights(run, release, folder)
    assert 0 <= card.recorded_accuracy(run, None) <= 1
    assert release["right"].dtype == bool
