"""Prepare `imdb_reviews` and `mnist` for TFDS without TensorFlow.

    python -m lstmjax.data.prepare {imdb_reviews,mnist,all} [--data-dir DIR] [--manual-dir DIR]

TFDS's own builders describe the data and its own download manager fetches and checks the files;
only the steps where TFDS reaches for TensorFlow (unpacking, encoding images) are done here with the
standard library and Pillow. Keys, and so the order on disk, are TFDS's. The result is an
`array_record` data set that every TFDS reads. Files that are in the manual folder
(`DIR/downloads/manual` by default) are not downloaded.
"""

import argparse
import contextlib
import errno
import gzip
import io
import itertools
import math
import os
import shutil
import socket
import sys
import tarfile
import threading
import urllib.parse
import urllib.request
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lstmjax.data import prepared
from lstmjax.data.dataset import DataError, DownloadError, check_choice, one_line

MNIST_FILES = {
    ("train", "image"): "train-images-idx3-ubyte.gz",
    ("train", "label"): "train-labels-idx1-ubyte.gz",
    ("test", "image"): "t10k-images-idx3-ubyte.gz",
    ("test", "label"): "t10k-labels-idx1-ubyte.gz",
}
# The addresses under which TFDS has the checksums of these files on record.
MNIST_URL = "https://storage.googleapis.com/cvdf-datasets/mnist/"
REVIEWS_URL = "http://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz"

_CONNECT_SECONDS = 4.0

# Bounds on what is unpacked. The longest review takes 14 kB, the archive holds 100,000 of them; the
# largest of the idx files takes 47 MB.
REVIEW_BYTES, ARCHIVE_BYTES, ARCHIVE_MEMBERS, HEADER_BYTES = 2**20, 2**30, 2**18, 2**16
IDX_BYTES = 2**26


def prepare(
    name: str,
    data_dir: str | os.PathLike | None = None,
    manual_dir: str | os.PathLike | None = None,
) -> Path:
    """Download, check and prepare a data set, unless that has been done.

    Args:
      name: `"imdb_reviews"` or `"mnist"`.
      data_dir: where to put it; `$TFDS_DATA_DIR`, else `~/tensorflow_datasets` by default.
      manual_dir: a folder with files that need not be downloaded, under their original names.

    Returns:
      The folder of the prepared version. It appears when it is complete and not before.

    Raises:
      ValueError: an unknown name.
      DownloadError: files that are not here and cannot be fetched.
      DataError: anything else that stands in the way: a damaged file, a full disk, a folder that
        cannot be written.
    """
    check_choice("name", name, tuple(prepared.FULL_NAMES))
    root = prepared.data_folder(data_dir)
    found = prepared.find(name, root)
    if found is not None:
        return found
    downloads = root / "downloads"
    manual = Path(os.path.expanduser(manual_dir)) if manual_dir else downloads / "manual"
    if manual_dir and not manual.is_dir():
        raise DataError(
            f"the manual folder {manual} is not a folder; give one that holds the files"
        )
    _check_sources(name, downloads, manual)
    with _left_clean(root, name):
        try:
            _build(name, root, manual)
        except Exception as error:  # TFDS wraps and raises whatever went wrong below it
            found = prepared.find(name, root)  # another process may have been first
            if found is None:
                raise _explain(name, root, error) from error
    return prepared.find(name, root)


def _build(name: str, root: Path, manual: Path) -> None:
    import tensorflow_datasets as tfds

    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    config = tfds.download.DownloadConfig(manual_dir=manual, try_download_gcs=False)
    with contextlib.redirect_stdout(sys.stderr):  # TFDS announces itself on stdout
        builder = {"mnist": _mnist_builder, "imdb_reviews": _reviews_builder}[name]()(data_dir=root)
        builder.download_and_prepare(download_config=config, file_format="array_record")


def _mnist_builder() -> type:
    """TFDS's MNIST with our reader of idx files and Pillow's PNG."""
    import tensorflow_datasets as tfds

    class Mnist(tfds.image_classification.MNIST, skip_registration=True):
        name = "mnist"
        url_infos = tfds.image_classification.MNIST.url_infos  # TFDS would look beside this module

        def _split_generators(self, dl_manager):
            urls = {key: MNIST_URL + file for key, file in MNIST_FILES.items()}
            paths = dict(zip(urls, dl_manager.download(list(urls.values())), strict=True))
            return {
                split: self._generate_examples(paths[split, "image"], paths[split, "label"])
                for split in prepared.SPLITS
            }

        def _generate_examples(self, image_path, label_path):
            images, labels = read_idx(image_path), read_idx(label_path)
            if images.shape[1:] != (28, 28) or labels.shape != images.shape[:1]:
                raise DataError(
                    f"{image_path} and {label_path} hold {images.shape} and {labels.shape} "
                    "numbers, not N images of 28 × 28 and N labels; download them again"
                )
            for i, (image, label) in enumerate(zip(images, labels, strict=True)):
                yield i, {"image": _png(image), "label": int(label)}

    return Mnist


def _reviews_builder() -> type:
    """TFDS's imdb_reviews with the standard library's tar reader."""
    from etils import epath
    from tensorflow_datasets.datasets.imdb_reviews import imdb_reviews_dataset_builder as original

    class Reviews(original.Builder, skip_registration=True):
        name = "imdb_reviews"
        # TFDS would look for description, citation and checksums beside this module.
        pkg_dir_path = epath.Path(original.__file__).parent
        url_infos = original.Builder.url_infos

        def _split_generators(self, dl_manager):
            path = dl_manager.download(REVIEWS_URL)
            return {
                "train": self._generate_examples(_members(path), "aclImdb/train"),
                "test": self._generate_examples(_members(path), "aclImdb/test"),
                "unsupervised": self._generate_examples(
                    _members(path), "aclImdb/train", labeled=False
                ),
            }

    return Reviews


def _members(path: str | os.PathLike) -> Iterator[tuple[str, io.BytesIO]]:
    """(name, content) of every text file in a .tar.gz, in one pass; nothing is written to disk.

    Raises:
      DataError: a file that is no .tar.gz or is damaged; members that are neither files nor
        folders, have absolute names or names with "..", or are more or larger than the bounds above
        allow.
    """
    try:
        with gzip.open(path) as packed:
            archive = tarfile.open(fileobj=_Bounded(packed), mode="r|", tarinfo=_Member)
            for count in itertools.count():
                member = archive.next()
                archive.members.clear()  # it would keep them all
                if member is None:
                    break
                member.check(count)
                if member.isfile() and member.name.endswith(".txt"):
                    if member.size > REVIEW_BYTES:
                        raise ValueError(f"{member.name} takes {member.size:,} bytes")
                    yield member.name, io.BytesIO(archive.extractfile(member).read())
    except Exception as error:  # tarfile, gzip and zlib raise half a dozen kinds
        raise DataError(
            f"{os.fspath(path)} is no archive of reviews ({one_line(error)}); download it again"
        ) from error


class _Member(tarfile.TarInfo):
    """A header of an archive that is looked at before tarfile acts on it."""

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> "_Member":
        member = super().frombuf(buf, encoding, errors)
        describes = member.type in (
            tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE,
            tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK,
        )  # fmt: skip
        if describes and member.size > HEADER_BYTES:  # tarfile reads it into memory
            raise ValueError(f"a header of {member.size:,} bytes")
        return member

    def check(self, count: int) -> None:
        """Raises ValueError for a member that has no place in an archive of reviews."""
        if count >= ARCHIVE_MEMBERS:
            raise ValueError(f"it has more than {ARCHIVE_MEMBERS:,} members")
        if self.name.startswith("/") or ".." in self.name.split("/"):
            raise ValueError(f"{self.name} lies outside of it")
        if not (self.isdir() or self.type in (tarfile.REGTYPE, tarfile.AREGTYPE)):
            raise ValueError(f"{self.name} is neither a file nor a folder")
        if not 0 <= self.size <= ARCHIVE_BYTES:  # tarfile would look for its end for years
            raise ValueError(f"{self.name} takes {self.size:,} bytes")


class _Bounded:
    """A file that ends with an error where it has given `ARCHIVE_BYTES`."""

    def __init__(self, file: Any):
        self._file, self._left = file, ARCHIVE_BYTES

    def read(self, size: int) -> bytes:
        content = self._file.read(size)
        self._left -= len(content)
        if self._left < 0:
            raise ValueError(f"it unpacks to more than {ARCHIVE_BYTES:,} bytes")
        return content


def _png(image: np.ndarray) -> io.BytesIO:
    """A grey image, uint8 `[H, W]`, as an open PNG file: encoded, TFDS takes it as it is."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image).save(file, format="png")
    file.seek(0)
    return file


def read_idx(path: str | os.PathLike) -> np.ndarray:
    """Read a gzipped idx file of bytes, the format of the original MNIST files; uint8, any rank.

    Two zero bytes, 8 for "unsigned byte", the rank, each size as a big-endian int32, the data, of
    at most `IDX_BYTES`.

    Raises:
      DataError: a file that is truncated, no gzip file, no such idx file, or a larger one.
    """
    try:
        with gzip.open(path) as file:
            start = file.read(4)
            if len(start) < 4 or start[:3] != b"\0\0\x08" or start[3] < 1:
                raise ValueError("it does not begin like an idx file of bytes")
            sizes = file.read(4 * start[3])
            shape = tuple(int(size) for size in np.frombuffer(sizes, ">i4"))
            count = math.prod(shape)
            if len(shape) != start[3] or min(shape) < 0 or count > IDX_BYTES:
                raise ValueError(f"its sizes are {shape}, expected at most {IDX_BYTES:,} bytes")
            content = file.read(count + 1)
        return np.frombuffer(content, np.uint8).reshape(shape)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise DataError(
            f"{os.fspath(path)} is no whole idx file ({one_line(error)}); download it again"
        ) from error


def _check_sources(name: str, downloads: Path, manual: Path) -> None:
    """Raise a DownloadError at once if a file has to be fetched and its server is out of reach.

    TFDS itself would try for minutes behind a silent firewall, and leave folders behind.
    """
    urls = {"mnist": [MNIST_URL + f for f in MNIST_FILES.values()], "imdb_reviews": [REVIEWS_URL]}
    for url in urls[name]:
        file = url.rsplit("/", 1)[1]
        stem = file.split(".")[0]  # TFDS keeps it in the name that it gives to a download
        if (manual / file).exists() or any(downloads.rglob(f"*{stem}*.INFO")):
            continue
        if not _reachable(url):
            raise DownloadError(
                f"{urllib.parse.urlsplit(url).hostname} cannot be reached to fetch {file} (a copy "
                f"of it in {manual} would do)"
            )


def _reachable(url: str) -> bool:
    """Whether the server, or the proxy in front of it, accepts a connection within seconds."""
    parts = urllib.parse.urlsplit(url)
    proxy = urllib.request.getproxies().get(parts.scheme)
    if proxy and not urllib.request.proxy_bypass(parts.hostname):
        parts = urllib.parse.urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    address = parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)
    connected = []

    def connect():
        with contextlib.suppress(OSError):
            socket.create_connection(address, timeout=_CONNECT_SECONDS).close()
            connected.append(True)

    # In a thread, because looking up a name has no timeout of its own.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(_CONNECT_SECONDS)
    return bool(connected)


@contextlib.contextmanager
def _left_clean(root: Path, name: str) -> Iterator[None]:
    """On failure, remove the folders that TFDS began in `root`, and nothing that was there before.

    A data set that is complete stays, whichever process made it; where one was completed meanwhile,
    so does all the rest. Complete downloads stay: they have been checked, and the next try will use
    them.
    """
    before = _folders(root, name)
    done = False
    try:
        yield
        done = True
    finally:
        done = done or prepared.find(name, root) is not None
        begun = set() if done else _folders(root, name) - before
        for folder in sorted(begun, reverse=True):  # the deepest first
            if folder == root / name or ".tmp." in folder.name:
                shutil.rmtree(folder, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):  # not empty
                    folder.rmdir()


def _folders(root: Path, name: str) -> set[Path]:
    """The folders in which preparing may leave something, as far as they exist."""
    # Not rglob: a download in another thread may take its folder away meanwhile, which walk allows.
    downloads = {Path(folder) for folder, _, _ in os.walk(root / "downloads")}
    return {folder for folder in (root, root / name, *downloads) if folder.is_dir()}


def _explain(name: str, root: Path, error: Exception) -> DataError:
    """One line that says what went wrong while preparing, and what to do about it."""
    import requests

    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(cause)
    for cause in causes:
        if isinstance(cause, DataError):
            return cause
        # TFDS moves its exceptions from module to module; their names have stayed.
        kind = type(cause).__name__
        if kind == "NonMatchingChecksumError":
            where = str(cause).split(", has wrong checksum")[0]
            return DataError(f"{where}, has the wrong checksum; delete it and download it again")
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            return DataError(f"the disk of {root} is full; free some space and run it again")
        if kind == "DownloadError" or isinstance(cause, requests.exceptions.RequestException):
            return DownloadError(f"the download of {name} failed ({one_line(cause)})")
    return DataError(f"cannot prepare {name} in {root} ({one_line(error)})")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message}\n")


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = _Parser(
        prog="python -m lstmjax.data.prepare",
        description="Prepare data sets for tensorflow-datasets without TensorFlow.",
    )
    parser.add_argument("name", choices=[*prepared.FULL_NAMES, "all"], help="which data set")
    parser.add_argument(
        "--data-dir", help="where to put it (default: $TFDS_DATA_DIR, else ~/tensorflow_datasets)"
    )
    parser.add_argument(
        "--manual-dir",
        help="folder with files you downloaded yourself (default: DATA_DIR/downloads/manual)",
    )
    options = parser.parse_args(arguments)
    names = list(prepared.FULL_NAMES) if options.name == "all" else [options.name]
    for name in names:
        try:
            folder = prepare(name, options.data_dir, options.manual_dir)
        except DataError as error:
            print(f"{parser.prog}: {error}", file=sys.stderr)
            return 1
        print(f"{name} is in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
