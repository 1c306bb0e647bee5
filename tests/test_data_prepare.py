"""Preparing without TensorFlow: by HTTP from this machine, from a manual folder, and failing."""

import errno
import gzip
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections import Counter

import numpy as np
import pytest
import tiny_data

from lstmjax.data import DataError, prepare, prepared
from lstmjax.data.dataset import DownloadError

ORIGINAL = tiny_data.SHARED / "mnist_original"
REAL = tiny_data.SHARED / "tensorflow_datasets"


def fails(call, *parts, kind=DataError):
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and all(part in message for part in parts), message


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A folder with tiny digits and reviews, served at the addresses that prepare knows."""
    folder = tmp_path / "served"
    folder.mkdir()
    tiny_data.write_digits(folder)
    tiny_data.write_reviews(folder / "reviews.tar.gz")
    with tiny_data.serve(folder) as address:
        monkeypatch.setattr(prepare, "MNIST_URL", address)
        monkeypatch.setattr(prepare, "REVIEWS_URL", address + "reviews.tar.gz")
        yield folder


def test_digits_are_whole_and_a_second_call_does_nothing(served, tmp_path, monkeypatch):
    folder = prepare.prepare("mnist", tmp_path / "tfds")
    assert folder == tmp_path / "tfds" / "mnist" / "3.0.1"
    info = json.loads((folder / "dataset_info.json").read_text())
    assert info["fileFormat"] == "array_record" and info["name"] == "mnist"
    want = tiny_data.write_digits(served)
    got = prepared.read_digits(folder)
    for split, (images, labels) in want.items():
        pairs = [(i.tobytes(), int(k)) for i, k in zip(images, labels, strict=True)]
        found = [(i.tobytes(), int(k)) for i, k in zip(*got[split], strict=True)]
        assert sorted(found) == sorted(pairs)
    monkeypatch.setattr(prepare, "_build", lambda *arguments: pytest.fail("built again"))
    assert prepare.prepare("mnist", tmp_path / "tfds") == folder


def test_reviews_are_whole_with_the_unlabelled_ones(served, tmp_path):
    folder = prepare.prepare("imdb_reviews", tmp_path / "tfds")
    assert folder == tmp_path / "tfds" / "imdb_reviews" / "plain_text" / "1.0.0"
    info = json.loads((folder / "dataset_info.json").read_text())
    counts = {split["name"]: split["shardLengths"] for split in info["splits"]}
    assert counts == {"train": ["17"], "test": ["11"], "unsupervised": ["3"]}
    members = tiny_data.write_reviews(tmp_path / "again.tar.gz")
    for split, (texts, labels) in prepared.read_reviews(folder).items():
        want = [
            (text.strip(), int("/pos/" in name))
            for name, text in members.items()
            if f"/{split}/" in name and "unsup" not in name
        ]
        assert Counter(zip(texts, labels.tolist(), strict=True)) == Counter(want)
    want = [text.strip() for name, text in members.items() if "/unsup/" in name]
    assert Counter(prepared.read_unlabelled(folder)) == Counter(want) and len(want) == 3
    next(folder.glob("*unsupervised*")).unlink()
    with pytest.raises(DataError, match="holds no unlabelled reviews; prepare it elsewhere"):
        prepared.read_unlabelled(folder)


def test_tfds_itself_reads_what_was_prepared(served, tmp_path):
    import tensorflow_datasets as tfds

    prepare.prepare("imdb_reviews", tmp_path / "tfds")
    source = tfds.data_source(
        "imdb_reviews", split="test", data_dir=tmp_path / "tfds", download=False
    )
    texts = [example["text"].decode() for example in source]
    assert (
        texts == prepared.read_reviews(prepared.find("imdb_reviews", tmp_path / "tfds"))["test"][0]
    )


def test_the_real_addresses_are_those_that_tfds_has_checksums_for():
    for builder, urls in (
        (prepare._mnist_builder(), [prepare.MNIST_URL + f for f in prepare.MNIST_FILES.values()]),
        (prepare._reviews_builder(), [prepare.REVIEWS_URL]),
    ):
        for url in urls:
            assert builder.url_infos[url].filename == url.rsplit("/", 1)[1]


@pytest.mark.skipif(not ORIGINAL.is_dir(), reason="the original files are not here")
def test_the_original_files_in_the_manual_folder(tmp_path):
    """Checked against the checksums of TFDS; the arrays and their order are those of TFDS."""
    manual = tmp_path / "tfds" / "downloads" / "manual"
    manual.mkdir(parents=True)
    for file in ORIGINAL.iterdir():
        os.symlink(file.resolve(), manual / file.name)
    folder = prepare.prepare("mnist", tmp_path / "tfds")
    if not (REAL / "mnist").is_dir():
        pytest.skip("nothing to compare with")
    got, want = prepared.read_digits(folder), prepared.read_digits(prepared.find("mnist", REAL))
    for split in ("train", "test"):
        np.testing.assert_array_equal(got[split][0], want[split][0])
        np.testing.assert_array_equal(got[split][1], want[split][1])


@pytest.mark.parametrize(
    ("name", "file"), [("mnist", "-ubyte.gz"), ("imdb_reviews", "aclImdb_v1.tar.gz")]
)
def test_a_manual_file_with_the_wrong_checksum(tmp_path, name, file):
    manual = tmp_path / "manual"
    manual.mkdir()
    tiny_data.write_digits(manual)
    tiny_data.write_reviews(manual / "aclImdb_v1.tar.gz")
    call = lambda: prepare.prepare(name, tmp_path / "tfds", manual)  # noqa: E731
    fails(call, file, "wrong checksum", "download it again")
    assert not (tmp_path / "tfds").exists() and len(list(manual.iterdir())) == 5


def damage_files(served, damage):
    images = served / prepare.MNIST_FILES["train", "image"]
    labels = served / prepare.MNIST_FILES["test", "label"]
    if damage == "absent":
        labels.unlink()
    elif damage == "truncated":
        labels.write_bytes(labels.read_bytes()[:-5])
    elif damage == "not gzip":
        labels.write_bytes(gzip.decompress(labels.read_bytes()))
    elif damage == "short":
        labels.write_bytes(gzip.compress(gzip.decompress(labels.read_bytes())[:-1]))
    elif damage == "count":
        tiny_data.write_idx(labels, np.zeros(8, np.uint8))
    elif damage == "size":
        tiny_data.write_idx(images, np.zeros((13, 28, 27), np.uint8))
    elif damage == "label":
        tiny_data.write_idx(labels, np.full(7, 10, np.uint8))
    elif damage == "no archive":
        (served / "reviews.tar.gz").write_bytes(b"no archive")
    elif damage == "half archive":
        content = (served / "reviews.tar.gz").read_bytes()
        (served / "reviews.tar.gz").write_bytes(content[: len(content) // 2])
    elif damage == "other archive":
        with tarfile.open(served / "reviews.tar.gz", "w:gz") as archive:
            archive.add(images, "aclImdb/other")


@pytest.mark.parametrize(
    ("name", "damage", "part"),
    [
        ("mnist", "absent", "download of mnist failed"),
        ("mnist", "truncated", "no whole idx file"),
        ("mnist", "not gzip", "no whole idx file"),
        ("mnist", "short", "no whole idx file"),
        ("mnist", "count", "not N images"),
        ("mnist", "size", "not N images"),
        ("mnist", "label", "cannot prepare mnist"),
        ("imdb_reviews", "no archive", "is no archive of reviews"),
        ("imdb_reviews", "half archive", "is no archive of reviews"),
        ("imdb_reviews", "other archive", "cannot prepare imdb_reviews"),
    ],
)
@pytest.mark.parametrize("there_before", [False, True])
def test_bad_files_are_one_line_and_leave_nothing_half_done(
    served, tmp_path, name, damage, part, there_before
):
    root = tmp_path / "tfds"
    if there_before:  # something of the user's own beside it
        (root / name / "mine").mkdir(parents=True)
        (root / "downloads").mkdir()
        (root / "downloads" / "note.txt").write_text("mine")
    damage_files(served, damage)
    fails(lambda: prepare.prepare(name, root), part)
    left = tiny_data.tree(root) if root.exists() else []
    assert not [path for path in left if "incomplete" in path or ".tmp." in path]
    assert not [path for path in left if path.endswith(("3.0.1", "1.0.0"))]
    if there_before:
        assert {f"{name}/mine", "downloads/note.txt"} <= set(left)
    else:
        assert all(path.startswith("downloads") for path in left)
    assert prepared.find(name, root) is None


@pytest.mark.parametrize("name", ["mnist", "imdb_reviews"])
def test_a_connection_that_breaks_leaves_no_part_of_a_file(served, tmp_path, monkeypatch, name):
    def all_but_the_end(self, source, output):
        output.write(source.read()[:-10])

    monkeypatch.setattr(tiny_data.QuietHandler, "copyfile", all_but_the_end)
    call = lambda: prepare.prepare(name, tmp_path / "tfds")  # noqa: E731
    fails(call, f"download of {name} failed", kind=DownloadError)
    assert not (tmp_path / "tfds").exists()


def test_after_a_failure_the_next_try_succeeds(served, tmp_path):
    labels = served / prepare.MNIST_FILES["test", "label"]
    content = labels.read_bytes()
    labels.unlink()
    fails(lambda: prepare.prepare("mnist", tmp_path / "tfds"), "failed", kind=DownloadError)
    labels.write_bytes(content)
    assert prepare.prepare("mnist", tmp_path / "tfds").is_dir()


@pytest.mark.parametrize("when", ["first image", "info"])
def test_a_full_disk(served, tmp_path, monkeypatch, when):
    import tensorflow_datasets as tfds

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    if when == "first image":
        monkeypatch.setattr(prepare, "_png", full)
    else:
        monkeypatch.setattr(tfds.core.DatasetInfo, "write_to_directory", full)
    root = tmp_path / "tfds"
    fails(lambda: prepare.prepare("mnist", root), "disk", "full", "free some space")
    assert not (root / "mnist").exists()


def test_an_interrupted_preparation_leaves_nothing(served, tmp_path, monkeypatch):
    def interrupt(image):
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "_png", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare.prepare("mnist", tmp_path / "tfds")
    assert not (tmp_path / "tfds" / "mnist").exists()


def test_a_folder_that_vanishes_meanwhile_hides_no_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "_check_sources", lambda *arguments: None)
    going, scandir = tmp_path / "tfds" / "downloads" / "other.tmp.1", os.scandir

    def build(name, root, manual):
        going.mkdir(parents=True)
        raise DownloadError("refused")

    def gone(path):
        if not isinstance(path, int) and os.fspath(path) == str(going) and going.exists():
            going.rmdir()  # another download of TFDS, which gives up as well
        return scandir(path)

    monkeypatch.setattr(prepare, "_build", build)
    monkeypatch.setattr(os, "scandir", gone)
    fails(lambda: prepare.prepare("mnist", tmp_path / "tfds"), "refused", kind=DownloadError)
    assert not going.parent.exists()


def test_another_process_that_was_first_is_no_failure(served, tmp_path, monkeypatch):
    build = prepare._build

    def build_twice(name, root, manual):
        build(name, root, manual)
        raise FileExistsError("already there")

    monkeypatch.setattr(prepare, "_build", build_twice)
    assert prepare.prepare("mnist", tmp_path / "tfds").is_dir()


def test_what_another_process_has_completed_stays(served, tmp_path, monkeypatch):
    build = prepare._build

    def interrupted(name, root, manual):
        build(name, root, manual)  # by the other one
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "_build", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare.prepare("mnist", tmp_path / "tfds")
    monkeypatch.setattr(prepare, "_build", lambda *arguments: pytest.fail("built again"))
    assert prepare.prepare("mnist", tmp_path / "tfds").is_dir()


def test_complete_downloads_are_enough_without_a_network(served, tmp_path, monkeypatch):
    folder = prepare.prepare("mnist", tmp_path / "tfds")
    before = tiny_data.tree(folder)
    shutil.rmtree(folder.parent)
    monkeypatch.setattr(prepare, "_reachable", lambda url: False)
    assert tiny_data.tree(prepare.prepare("mnist", tmp_path / "tfds")) == before


def test_downloads_are_found_under_the_names_that_tfds_gives_them():
    from tensorflow_datasets.core.download.resource import get_dl_fname

    for url in (prepare.REVIEWS_URL, prepare.MNIST_URL + prepare.MNIST_FILES["test", "label"]):
        assert url.rsplit("/", 1)[1].split(".")[0] in get_dl_fname(url, "a" * 64)


def test_no_network_is_quick_and_touches_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "MNIST_URL", tiny_data.closed_address())
    begin = time.perf_counter()
    call = lambda: prepare.prepare("mnist", tmp_path / "tfds")  # noqa: E731
    fails(call, "127.0.0.1 cannot be reached", "train-images", kind=DownloadError)
    assert time.perf_counter() - begin < 2
    assert not (tmp_path / "tfds").exists()


def test_a_name_server_that_does_not_answer_is_given_up(monkeypatch):
    def silent(address, timeout):
        time.sleep(1.5)
        raise TimeoutError

    monkeypatch.setattr(prepare, "_CONNECT_SECONDS", 0.2)
    monkeypatch.setattr(prepare.socket, "create_connection", silent)
    begin = time.perf_counter()
    assert not prepare._reachable("http://example.invalid/x")
    assert time.perf_counter() - begin < 1


def test_with_a_proxy_it_is_the_proxy_that_must_be_reached(monkeypatch):
    asked = []

    def connect(address, timeout):
        asked.append(address)
        raise ConnectionRefusedError

    monkeypatch.setattr(prepare.socket, "create_connection", connect)
    for variable in (
        "http_proxy",
        "https_proxy",
        "no_proxy",
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "NO_PROXY",
    ):
        monkeypatch.delenv(variable, raising=False)
    assert not prepare._reachable("https://example.invalid/x")
    monkeypatch.setenv("https_proxy", "http://proxy.invalid:3128")
    assert not prepare._reachable("https://example.invalid/x")
    assert not prepare._reachable("http://example.invalid/x")
    assert asked == [
        ("example.invalid", 443),
        ("proxy.invalid", 3128),
        ("example.invalid", 80),
    ]


@pytest.mark.parametrize("shape", [(5,), (2, 3), (4, 5, 6), (0, 28, 28)])
def test_read_idx(tmp_path, shape):
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    tiny_data.write_idx(tmp_path / "file.gz", array)
    got = prepare.read_idx(tmp_path / "file.gz")
    np.testing.assert_array_equal(got, array)
    assert got.shape == shape and got.dtype == np.uint8


@pytest.mark.parametrize(
    "content",
    [b"", b"\0\0", b"\0\0\x08\0", b"\0\0\x0d\x01\0\0\0\x01\x07", b"\0\0\x08\x02\0\0\0\x01"],
)
def test_read_idx_refuses_what_is_no_idx(tmp_path, content):
    (tmp_path / "file.gz").write_bytes(gzip.compress(content))
    fails(lambda: prepare.read_idx(tmp_path / "file.gz"), "file.gz is no whole idx file")


def test_wrong_arguments(tmp_path):
    with pytest.raises(
        ValueError, match="name: got 'cifar10', expected one of 'imdb_reviews', 'mnist'"
    ):
        prepare.prepare("cifar10")
    fails(lambda: prepare.prepare("mnist", tmp_path, tmp_path / "none"), "none is not a folder")
    (tmp_path / "file").write_text("x")
    fails(lambda: prepare.prepare("mnist", tmp_path / "file"), "cannot read the data folder")


def run(*arguments, **environment):
    command = [sys.executable, "-m", "lstmjax.data.prepare", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)


def test_command_line_in_one_process(served, tmp_path, capsys):
    assert prepare.main(["all", "--data-dir", str(tmp_path / "tfds")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        f"imdb_reviews is in {tmp_path / 'tfds' / 'imdb_reviews' / 'plain_text' / '1.0.0'}",
        f"mnist is in {tmp_path / 'tfds' / 'mnist' / '3.0.1'}",
    ]
    (served / prepare.MNIST_FILES["train", "label"]).unlink()
    assert prepare.main(["mnist", "--data-dir", str(tmp_path / "other")]) == 1
    assert "download of mnist failed" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["cifar10"], "cifar10"),
        ([], "name"),
        (["mnist", "--datadir", "x"], "--datadir"),
        (["mnist", "--manual-dir", "nowhere/at/all"], "nowhere/at/all is not a folder"),
    ],
)
def test_command_line_errors_are_one_line(arguments, part, tmp_path):
    done = run(*arguments, TFDS_DATA_DIR=str(tmp_path / "tfds"))
    assert done.returncode != 0 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and part in done.stderr
    assert not (tmp_path / "tfds").exists()
