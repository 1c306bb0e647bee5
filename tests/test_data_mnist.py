"""lstmjax.data.mnist on a prepared data set of 13 + 7 images, and on the real one where it is."""

import gzip
import hashlib
import shutil

import numpy as np
import pytest
import tiny_data

from lstmjax.data import DataError, mnist, prepare, prepared

REAL = tiny_data.SHARED / "tensorflow_datasets"
ORIGINAL = tiny_data.SHARED / "mnist_original"

# sha256 of the 784 little-endian int64 numbers. That of torch12008 was computed by torch 2.13.0
# itself: torch.manual_seed(12008); torch.randperm(784).
PERMUTATION_SHA256 = {
    "RandomState(92916)": "96240fe27409981c3ed3e92c20d995f7103a94c2282307bc776923030113be74",
    "torch12008": "f4113bc8ae78902146fba54feaff34c7de185249d3b85ce9584e3d76ca98b3bd",
    "RandomState(0)": "fe62e3fef305ce16e55f08cd0056a8b237e12af6c9523ff3fb35395f6ec55222",
    "bit_reversal": "30d91dc29f161321971bfea6ba16c735e4b5fe678d607efb470896d9de75ef44",
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(TFDS folder, split → (images, labels) in the order on disk)."""
    with pytest.MonkeyPatch.context() as patch:
        root, splits = tiny_data.prepare_digits(tmp_path_factory.mktemp("mnist"), patch)
    stored = prepared.read_digits(prepared.find("mnist", root))
    for split, (images, labels) in splits.items():
        place = {image.tobytes(): i for i, image in enumerate(images)}
        order = [place[image.tobytes()] for image in stored[split][0]]
        assert sorted(order) == list(range(len(images)))
        np.testing.assert_array_equal(stored[split][1], labels[order])
    return root, stored


@pytest.fixture
def here(tiny, tmp_path, monkeypatch):
    root = tmp_path / "tfds"
    shutil.copytree(tiny[0], root)
    monkeypatch.setenv("TFDS_DATA_DIR", str(root))
    monkeypatch.setenv("LSTMJAX_CACHE", str(tmp_path / "cache"))
    return root


@pytest.mark.parametrize("source", ["auto", "tfds"])
def test_rows_and_the_split(here, tiny, source):
    data = mnist.load(source, validation_size=4)
    images, labels = tiny[1]["train"]
    want = {
        "train": (images[4:], labels[4:]),
        "validation": (images[:4], labels[:4]),
        "test": tiny[1]["test"],
    }
    for split, (image, label) in want.items():
        np.testing.assert_array_equal(data.splits[split]["image"], image)
        np.testing.assert_array_equal(data.splits[split]["label"], label)
        assert data.splits[split]["image"].dtype == np.uint8
        assert data.splits[split]["label"].dtype == np.int32
    assert (data.name, data.source, data.vocabulary) == ("mnist", "tfds", None)
    assert data.title == "MNIST (tfds mnist)"


def test_pixels_and_permuted_pixels(here, tiny):
    image = tiny[1]["test"][0]
    pixels = mnist.load(layout="pixels", validation_size=0).splits["test"]["image"]
    assert pixels.shape == (7, 784, 1)
    for t in (0, 27, 28, 400, 783):
        np.testing.assert_array_equal(pixels[:, t, 0], image[:, t // 28, t % 28])
    for name in mnist.PERMUTATIONS:
        data = mnist.load(layout="permuted", permutation=name, validation_size=0)
        order = mnist.permutation(name)
        for t in (0, 1, 500, 783):
            source = order[t]
            got = data.splits["test"]["image"][:, t, 0]
            np.testing.assert_array_equal(got, image[:, source // 28, source % 28])


def test_the_hash_depends_on_layout_and_split(here):
    hashes = {
        mnist.load(validation_size=4).sha256,
        mnist.load(validation_size=5).sha256,
        mnist.load(layout="pixels", validation_size=4).sha256,
        mnist.load(layout="permuted", permutation="bit_reversal", validation_size=4).sha256,
        mnist.load(layout="permuted", permutation="torch12008", validation_size=4).sha256,
    }
    assert len(hashes) == 5


def test_decoded_images_are_cached(here, monkeypatch):
    first = mnist.load(validation_size=4)
    monkeypatch.setattr(prepared, "read_digits", lambda folder: pytest.fail("read again"))
    assert mnist.load(validation_size=4).sha256 == first.sha256


@pytest.mark.parametrize("name", PERMUTATION_SHA256)
def test_permutations_never_change(name):
    order = mnist.permutation(name)
    assert order.dtype == np.int64
    np.testing.assert_array_equal(np.sort(order), np.arange(784))
    digest = hashlib.sha256(order.astype("<i8").tobytes()).hexdigest()
    assert digest == PERMUTATION_SHA256[name]


def test_every_permutation_has_its_constant():
    assert set(PERMUTATION_SHA256) == set(mnist.PERMUTATIONS)


def test_bit_reversal_is_that_of_1024_with_the_rest_left_out():
    reversed_bits = [0]
    for _ in range(10):  # double: even numbers first, then odd ones
        reversed_bits = [2 * i for i in reversed_bits] + [2 * i + 1 for i in reversed_bits]
    want = [i for i in reversed_bits if i < 784]
    np.testing.assert_array_equal(mnist.permutation("bit_reversal"), want)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "web"}, "source: got 'web'"),
        ({"layout": "columns"}, "layout: got 'columns'"),
        ({"layout": "permuted"}, "permutation: got None"),
        ({"layout": "permuted", "permutation": "random"}, "permutation: got 'random'"),
        (
            {"layout": "rows", "permutation": "torch12008"},
            "permutation: got 'torch12008' with layout",
        ),
        ({"validation_size": -1}, "validation_size: got -1"),
        ({"validation_size": 13}, "validation_size: got 13"),
        ({"validation_size": True}, "validation_size: got True"),
    ],
)
def test_wrong_options_are_named(here, options, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        mnist.load(**options)


def test_unknown_permutation_is_named():
    with pytest.raises(ValueError, match="permutation: got 'x', expected one of 'RandomState"):
        mnist.permutation("x")


def test_an_image_that_is_no_png_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "_png", lambda image: __import__("io").BytesIO(b"no png"))
    root, _ = tiny_data.prepare_digits(tmp_path, monkeypatch)
    monkeypatch.setenv("TFDS_DATA_DIR", str(root))
    with pytest.raises(DataError, match="damaged .*delete that folder") as caught:
        mnist.load(cache_dir=tmp_path / "cache")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", ["auto", "tfds"])
def test_no_data_and_no_network(tmp_path, monkeypatch, source):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "nowhere"))
    monkeypatch.setattr(prepare, "MNIST_URL", tiny_data.closed_address())
    if source == "tfds":
        with pytest.raises(DataError, match="no prepared mnist in .*nowhere.*offline"):
            mnist.load(source)
    else:
        data = mnist.load(source, cache_dir=tmp_path / "cache")
        assert (data.name, data.source) == ("offline_digits", "offline")
        assert "not MNIST" in data.title
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.skipif(not (REAL / "mnist").is_dir(), reason="the real digits are not here")
def test_the_real_digits(tmp_path, monkeypatch):
    """Sizes of source 004, and the images of the original files in another order."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(REAL))
    data = mnist.load(cache_dir=tmp_path)
    shapes = {split: arrays["image"].shape for split, arrays in data.splits.items()}
    assert shapes == {
        "train": (55000, 28, 28),
        "validation": (5000, 28, 28),
        "test": (10000, 28, 28),
    }
    want = prepare.read_idx(ORIGINAL / "t10k-images-idx3-ubyte.gz")
    labels = prepare.read_idx(ORIGINAL / "t10k-labels-idx1-ubyte.gz")
    got = data.splits["test"]
    assert not np.array_equal(got["image"], want)  # TFDS shuffled them
    pairs = [(image.tobytes(), int(label)) for image, label in zip(want, labels, strict=True)]
    found = zip(got["image"], got["label"], strict=True)
    assert sorted((image.tobytes(), int(label)) for image, label in found) == sorted(pairs)
    with gzip.open(ORIGINAL / "t10k-images-idx3-ubyte.gz") as file:
        assert want.tobytes() == file.read()[16:]
