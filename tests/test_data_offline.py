"""The offline data (lstmjax.data.offline) and the cache (lstmjax.data.cache)."""

import errno
import hashlib
import re
from collections import Counter

import numpy as np
import pytest

from lstmjax.data import cache, imdb, mnist, offline, text

# Of the texts of both splits, one a line. If they are to change, REVIEWS_VERSION must change too.
REVIEWS_SHA256 = "4947f2bac8d2e57490d33e17da11300a26e38aa07a4a26a6bfbdfdc847056913"
REVIEWS_VERSION = "grammar 1 {'train': 20000, 'test': 5000} 20150814"

NEGATIONS = ("not", "never", "hardly", "far from", "nobody here", "can not say")


@pytest.fixture(scope="module")
def reviews():
    return offline.reviews()


@pytest.fixture(scope="module")
def glyphs():
    return offline.glyphs()


def sign(clause):
    """+1 or −1: the sign of the only opinion word, turned round by a negation."""
    found = [1 for word in clause.split() if word in offline._GOOD + offline._LOVED]
    found += [-1 for word in clause.split() if word in offline._BAD + offline._HATED]
    assert len(found) == 1, clause
    return -found[0] if any(f" {one} " in f" {clause} " for one in NEGATIONS) else found[0]


def verdict(review):
    """The label as the rule has it, found with regular expressions."""
    review = review.lower()
    for pattern in (
        r"although (?P<no>[^.]*), (?P<yes>[^.]*)\.",
        r"(?P<yes>[^.]*), (?:even )?though (?P<no>[^.]*)\.",
        r"(?P<no>[^.]*), (?:but|yet) (?P<yes>[^.]*)\.",
        r"(?P<no>[^.]*)\. still, (?P<yes>[^.]*)\.",
    ):
        found = re.search(pattern, review)
        if found:
            assert sign(found["no"]) == -sign(found["yes"])
            return int(sign(found["yes"]) > 0)
    raise AssertionError(review)


def test_every_label_follows_from_the_verdict(reviews):
    for texts, labels in reviews.values():
        assert [verdict(one) for one in texts[:3000]] == labels[:3000].tolist()


def test_conjunctions_alone_tell_the_order_of_the_clauses(reviews):
    conjunctions = {"although", "though", "but", "yet", "still"}
    counts = Counter(sum(w in conjunctions for w in text.words(one)) for one in reviews["test"][0])
    assert counts == {1: 5000}


def test_reviews_are_balanced_varied_and_of_real_length(reviews):
    for split, size in (("train", 20000), ("test", 5000)):
        texts, labels = reviews[split]
        assert len(texts) == len(labels) == size and labels.dtype == np.int32
        assert labels.sum() == size // 2
        lengths = np.array([len(text.words(one)) for one in texts])
        assert lengths.min() >= 10 and lengths.max() <= 125
        assert np.quantile(lengths, 0.1) < 40 and np.quantile(lengths, 0.9) > 75
        assert len(set(texts)) > 0.99 * size
    assert not set(reviews["train"][0]) & set(reviews["test"][0])


def test_reviews_are_the_same_everywhere(reviews):
    texts = reviews["train"][0] + reviews["test"][0]
    assert hashlib.sha256("\n".join(texts).encode()).hexdigest() == REVIEWS_SHA256
    assert offline.REVIEWS_VERSION == REVIEWS_VERSION
    small = {"train": 20, "test": 5}
    assert offline.reviews(small, seed=3)["train"][0] == offline.reviews(small, seed=3)["train"][0]
    assert offline.reviews(small, seed=3)["train"][0] != offline.reviews(small, seed=4)["train"][0]


def test_a_bag_of_words_is_not_enough(reviews):
    """Logistic regression on counts of words: better than chance, far from the rule."""
    train, vocabulary = text.index(reviews["train"][0][:6000])
    test = text.look_up(reviews["test"][0], vocabulary)

    def counts(ragged):
        bags = np.zeros((len(ragged.offsets) - 1, len(vocabulary) + 3))
        rows = np.repeat(np.arange(len(bags)), np.diff(ragged.offsets))
        np.add.at(bags, (rows, ragged.ids), 1)
        return bags

    x, x_test = counts(train), counts(test)
    mean, deviation = x.mean(0), x.std(0) + 1e-9
    x, x_test = (x - mean) / deviation, (x_test - mean) / deviation
    w, b, y = np.zeros(x.shape[1]), 0.0, reviews["train"][1][:6000]
    for _ in range(100):
        error = 1 / (1 + np.exp(-(x @ w + b))) - y
        w, b = w - 0.5 * x.T @ error / len(y), b - 0.5 * error.mean()
    accuracy = np.mean((x_test @ w + b > 0) == reviews["test"][1])
    assert 0.55 < accuracy < 0.8


def test_reviews_go_through_the_same_tokeniser(reviews, tmp_path):
    data = imdb.load("offline", validation_size=0, max_length=60, cache_dir=tmp_path)
    assert (data.name, data.source) == ("offline_reviews", "offline")
    again = imdb.encode(reviews["test"][0], data.vocabulary, max_length=60)
    np.testing.assert_array_equal(again["ids"], data.splits["test"]["ids"])
    np.testing.assert_array_equal(data.splits["train"]["label"], reviews["train"][1])
    assert data.splits["train"]["ids"].shape == (20000, 60)
    assert (
        imdb.load("offline", validation_size=0, max_length=60, cache_dir=tmp_path)[2] == data.sha256
    )


def test_glyphs_differ_and_sit_in_the_middle(glyphs):
    assert glyphs.shape[1:] == (10, 32, 32) and len(glyphs) >= 10
    assert glyphs.min() == 0 and glyphs.max() <= 255
    assert len({glyph.tobytes() for font in glyphs for glyph in font}) == glyphs[..., 0, 0].size
    inked = glyphs > 40
    for axis in (-1, -2):
        places = np.where(inked.any(axis), np.arange(32), np.nan)
        middle = (np.nanmin(places, -1) + np.nanmax(places, -1)) / 2
        assert np.all(np.abs(middle - 15.5) <= 2)


def test_digits_are_balanced_and_repeatable(glyphs):
    sizes = {"train": 1730, "test": 70}
    data = offline.digits(glyphs, sizes, seed=1)
    for split, size in sizes.items():
        images, labels = data[split]
        assert images.shape == (size, 28, 28) and images.dtype == np.uint8
        assert labels.dtype == np.int32 and np.all(np.bincount(labels) == size // 10)
        assert images.max((1, 2)).min() > 60  # there is something in every image
        border = np.concatenate([images[:, [0, -1]].ravel(), images[:, :, [0, -1]].ravel()])
        assert border.mean() < 2  # and little of it is cut off
    again = offline.digits(glyphs, sizes, seed=1)
    np.testing.assert_array_equal(again["train"][0], data["train"][0])
    other = offline.digits(glyphs, sizes, seed=2)["train"][0]
    assert np.mean(other != data["train"][0]) > 0.1


def test_undistorted_glyphs_come_out_as_they_went_in(monkeypatch):
    class Still:
        def uniform(self, low, high, size):
            return np.full(size, 1.0 if low > 0 else 0.0)

    drawn = np.random.default_rng(0).integers(0, 256, (2, 10, 28, 28)).astype(np.float32)
    labels, fonts = np.array([3, 7, 0]), np.array([1, 0, 1])
    got = offline._distort(drawn, fonts, labels, Still())
    np.testing.assert_array_equal(got[:, :27, :27], drawn[fonts, labels][:, :27, :27])


def test_a_nearest_mean_classifier_learns_digits_but_not_all(glyphs):
    data = offline.digits(glyphs, {"train": 3000, "test": 500}, seed=0)
    (x, y), (x_test, y_test) = (
        (images.reshape(len(images), -1) / 255.0, labels) for images, labels in data.values()
    )
    means = np.stack([x[y == k].mean(0) for k in range(10)])
    distance = ((x_test[:, None] - means) ** 2).sum(-1)
    accuracy = np.mean(distance.argmin(1) == y_test)
    assert 0.45 < accuracy < 0.9


def test_digits_load_by_name(tmp_path):
    data = mnist.load("offline", layout="pixels", cache_dir=tmp_path)
    assert (data.name, data.source) == ("offline_digits", "offline")
    shapes = {split: arrays["image"].shape for split, arrays in data.splits.items()}
    assert shapes == {
        "train": (15000, 784, 1),
        "validation": (5000, 784, 1),
        "test": (4000, 784, 1),
    }
    assert mnist.load("offline", layout="pixels", cache_dir=tmp_path).sha256 == data.sha256


ARRAYS = {"a": np.arange(600, dtype=np.int32).reshape(20, 30), "b": np.array([0.5, -2.0])}


def make_and_count(calls):
    def make():
        calls.append(1)
        return dict(ARRAYS)

    return make


def test_cache_makes_once_per_key(tmp_path):
    calls = []
    for key in ("k" * 64, "k" * 64, "m" * 64):
        arrays = cache.cached("kind", key, make_and_count(calls), tmp_path / "new")
        assert set(arrays) == {"a", "b"}
        for name, array in arrays.items():
            np.testing.assert_array_equal(array, ARRAYS[name])
            assert array.dtype == ARRAYS[name].dtype
    assert len(calls) == 2 and len(list((tmp_path / "new").iterdir())) == 2


def test_a_file_under_a_key_that_it_was_not_made_for_is_not_used(tmp_path):
    """Names hold only the beginning of a key; the hash inside holds all of it."""
    calls = []
    cache.cached("kind", "k" * 64, make_and_count(calls), tmp_path)
    cache.cached("kind", "k" * 63 + "m", make_and_count(calls), tmp_path)
    assert len(calls) == 2


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "value"])
def test_a_corrupt_cache_file_is_made_again(tmp_path, damage):
    calls = []
    cache.cached("kind", "k" * 64, make_and_count(calls), tmp_path)
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    if damage == "value":  # a sound .npz of other arrays
        with np.load(path) as stored:
            arrays = dict(stored)
        arrays["a"][3, 4] += 1
        np.savez(path, **arrays)
    else:
        changed = {"truncated": content[:-500], "empty": b"", "text": b"not an npz"}[damage]
        path.write_bytes(changed)
    for _ in range(2):
        again = cache.cached("kind", "k" * 64, make_and_count(calls), tmp_path)
        np.testing.assert_array_equal(again["a"], ARRAYS["a"])
    assert len(calls) == 2 and len(list(tmp_path.iterdir())) == 1


def test_every_flipped_byte_is_noticed_or_harmless(tmp_path):
    calls = []
    cache.cached("kind", "k" * 64, make_and_count(calls), tmp_path)
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    for place in range(0, len(content), 37):
        path.write_bytes(content[:place] + bytes([content[place] ^ 255]) + content[place + 1 :])
        arrays = cache.cached("kind", "k" * 64, make_and_count(calls), tmp_path)
        np.testing.assert_array_equal(arrays["a"], ARRAYS["a"])
        np.testing.assert_array_equal(arrays["b"], ARRAYS["b"])


def test_an_unwritable_cache_is_done_without(tmp_path):
    (tmp_path / "file").write_text("x")
    calls = []
    for _ in range(2):
        cache.cached("kind", "k" * 64, make_and_count(calls), tmp_path / "file" / "folder")
    assert len(calls) == 2 and (tmp_path / "file").read_text() == "x"


def test_a_full_disk_leaves_no_half_of_a_cache_file(tmp_path, monkeypatch):
    def full(file, **arrays):
        file.write(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    arrays = cache.cached("kind", "k" * 64, make_and_count([]), tmp_path)
    np.testing.assert_array_equal(arrays["a"], ARRAYS["a"])
    assert list(tmp_path.iterdir()) == []


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("LSTMJAX_CACHE", str(tmp_path / "env"))
    assert cache.folder() == tmp_path / "env"
    assert cache.folder(tmp_path / "given") == tmp_path / "given"
    monkeypatch.delenv("LSTMJAX_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache.folder() == tmp_path / "home" / ".cache" / "lstmjax"
