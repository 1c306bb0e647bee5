"""Data sets of a few examples in the formats of the real ones, for the tests of lstmjax.data."""

import contextlib
import functools
import gzip
import http.server
import io
import random
import socket
import struct
import tarfile
import threading
from pathlib import Path

import numpy as np

from lstmjax.data import prepare, prepared

SHARED = Path(__file__).parents[2] / "shared"  # the real data, where a developer has it
WORDS = (
    "film plot It's Good, bad... <br />naïve (dull) great! never not loved hated cast a the".split(
        " "
    )
)
REVIEW_COUNTS = {("train", "neg"): 9, ("train", "pos"): 8, ("test", "neg"): 5, ("test", "pos"): 6}


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@contextlib.contextmanager
def serve(folder):
    """A server of the files in `folder` on this machine; yields its address, ending in /."""
    handler = functools.partial(QuietHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/"
        finally:
            server.shutdown()
            thread.join()


def closed_address():
    """An address on this machine where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}/"


def write_reviews(path, seed=0):
    """An archive laid out like aclImdb_v1.tar.gz; returns {member name: text}."""
    draw = random.Random(seed)
    counts = {**REVIEW_COUNTS, ("train", "unsup"): 3}
    members = {
        f"aclImdb/{split}/{kind}/{i}_{draw.randrange(1, 11)}.txt": " ".join(
            draw.choices(WORDS, k=draw.randrange(1, 30))
        )
        for (split, kind), count in counts.items()
        for i in range(count)
    }
    with tarfile.open(path, "w:gz") as archive:
        for name, text in {"aclImdb/README": "read me", **members}.items():
            content = text.encode()
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return members


def write_idx(path, array):
    """`array` of bytes as a gzipped idx file."""
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}i", *array.shape)
    with gzip.open(path, "wb") as file:
        file.write(header + array.tobytes())


def write_digits(folder, sizes=(13, 7), seed=0):
    """Four files like those of MNIST; returns split → (images, labels)."""
    generator = np.random.default_rng(seed)
    splits = {}
    for split, size in zip(prepared.SPLITS, sizes, strict=True):
        images = generator.integers(0, 256, (size, 28, 28), dtype=np.uint8)
        labels = generator.integers(0, 10, size, dtype=np.uint8)
        write_idx(folder / prepare.MNIST_FILES[split, "image"], images)
        write_idx(folder / prepare.MNIST_FILES[split, "label"], labels)
        splits[split] = images, labels
    return splits


def prepare_reviews(folder, monkeypatch):
    """Prepare the tiny reviews in `folder`/tfds; returns that, and {member name: text}."""
    served = folder / "served"
    served.mkdir()
    members = write_reviews(served / "reviews.tar.gz")
    with serve(served) as address, monkeypatch.context() as patch:
        patch.setattr(prepare, "REVIEWS_URL", address + "reviews.tar.gz")
        prepare.prepare("imdb_reviews", folder / "tfds")
    return folder / "tfds", members


def prepare_digits(folder, monkeypatch):
    """Prepare the tiny digits in `folder`/tfds; returns that, and split → (images, labels)."""
    served = folder / "served"
    served.mkdir()
    splits = write_digits(served)
    with serve(served) as address, monkeypatch.context() as patch:
        patch.setattr(prepare, "MNIST_URL", address)
        prepare.prepare("mnist", folder / "tfds")
    return folder / "tfds", splits


def tree(folder):
    """Every path below `folder`, relative, in order."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
