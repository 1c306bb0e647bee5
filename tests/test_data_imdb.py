"""lstmjax.data.imdb on a prepared data set of 17 + 11 reviews, and on the real one where it is."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tiny_data

import lstmjax.data
from lstmjax.data import DataError, imdb, prepared, text

REAL = tiny_data.SHARED / "tensorflow_datasets"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(TFDS folder, split → [(text, label)] in the order on disk)."""
    with pytest.MonkeyPatch.context() as patch:
        root, members = tiny_data.prepare_reviews(tmp_path_factory.mktemp("imdb"), patch)
    folder = prepared.find("imdb_reviews", root)
    raw = {
        split: list(zip(*pair, strict=True))
        for split, pair in prepared.read_reviews(folder).items()
    }
    for split, pairs in raw.items():
        want = [
            (string.strip(), int("/pos/" in name))
            for name, string in members.items()
            if name.startswith(f"aclImdb/{split}/") and "/unsup/" not in name
        ]
        assert Counter(pairs) == Counter(want)
    return root, raw


@pytest.fixture
def here(tiny, tmp_path, monkeypatch):
    """A copy of the tiny data set that a test may damage, as TFDS_DATA_DIR; a fresh cache."""
    root = tmp_path / "tfds"
    shutil.copytree(tiny[0], root)
    monkeypatch.setenv("TFDS_DATA_DIR", str(root))
    monkeypatch.setenv("LSTMJAX_CACHE", str(tmp_path / "cache"))
    return root


def version(root):
    return root / "imdb_reviews" / "plain_text" / "1.0.0"


def expected(raw, num_words, length):
    """Ids by hand, from Keras's rules: pre-padding and pre-truncating."""
    counts = Counter(word for one, _ in raw["train"] for word in text.words(one))
    rank = {word: r for r, word in enumerate(sorted(counts, key=lambda w: -counts[w]), start=1)}
    splits = {}
    for split, pairs in raw.items():
        rows = []
        for one, _ in pairs:
            ids = [1] + [rank[w] + 3 if w in rank else 2 for w in text.words(one)]
            ids = [i if i < num_words else 2 for i in ids][-length:]
            rows.append([0] * (length - len(ids)) + ids)
        splits[split] = np.array(rows), np.array([label for _, label in pairs])
    return splits, rank


@pytest.mark.parametrize("source", ["auto", "tfds"])
def test_ids_labels_and_vocabulary(here, tiny, source):
    data = imdb.load(source, num_words=12, max_length=10, validation_size=0)
    want, rank = expected(tiny[1], 12, 10)
    for split in ("train", "test"):
        np.testing.assert_array_equal(data.splits[split]["ids"], want[split][0])
        np.testing.assert_array_equal(data.splits[split]["lengths"], (want[split][0] != 0).sum(1))
        np.testing.assert_array_equal(data.splits[split]["label"], want[split][1])
    assert data.splits["validation"]["ids"].shape == (0, 10)
    assert {array.dtype for arrays in data.splits.values() for array in arrays.values()} == {
        np.dtype(np.int32)
    }
    assert (data.name, data.source) == ("imdb_reviews/plain_text", "tfds")
    assert "tfds imdb_reviews/plain_text" in data.title
    assert len(data.vocabulary) == 9  # ids 3 … 11
    for word, r in rank.items():
        if r + 3 < 12:
            assert data.vocabulary[r + 3 - 3] == word


def test_hold_out_takes_rows_by_seed_and_keeps_the_order(here):
    whole = imdb.load("tfds", validation_size=0).splits["train"]
    rows = {one.tobytes(): i for i, one in enumerate(whole["ids"])}
    assert len(rows) == 17
    chosen = {}
    for seed in (0, 1):
        data = imdb.load("tfds", validation_size=5, seed=seed)
        places = {
            split: [rows[one.tobytes()] for one in data.splits[split]["ids"]]
            for split in ("train", "validation")
        }
        assert places["train"] == sorted(places["train"])
        assert places["validation"] == sorted(places["validation"])
        assert sorted(places["train"] + places["validation"]) == list(range(17))
        assert set(places["validation"]) == set(np.random.default_rng(seed).permutation(17)[:5])
        for split in places:
            np.testing.assert_array_equal(
                data.splits[split]["label"], whole["label"][places[split]]
            )
        chosen[seed] = places["validation"]
    assert chosen[0] != chosen[1]


def test_post_options_and_encode_agree_with_load(here, tiny):
    options = {"num_words": 14, "max_length": 7, "padding": "post", "truncating": "post"}
    data = imdb.load("tfds", validation_size=0, **options)
    for split, pairs in tiny[1].items():
        again = imdb.encode([one for one, _ in pairs], data.vocabulary, **options)
        np.testing.assert_array_equal(again["ids"], data.splits[split]["ids"])
        np.testing.assert_array_equal(again["lengths"], data.splits[split]["lengths"])
    assert np.all(data.splits["train"]["ids"][:, 0] == 1)


def test_cached_ids_serve_other_options_without_reading_again(here, monkeypatch):
    first = imdb.load("tfds", validation_size=3)
    monkeypatch.setattr(prepared, "read_reviews", lambda folder: pytest.fail("read again"))
    again = imdb.load("tfds", validation_size=3)
    assert again.sha256 == first.sha256
    shorter = imdb.load("tfds", validation_size=3, max_length=6)
    np.testing.assert_array_equal(
        shorter.splits["test"]["ids"], first.splits["test"]["ids"][:, -6:]
    )
    assert shorter.sha256 != first.sha256


def test_other_raw_data_is_not_served_from_the_cache(here):
    first = imdb.load("tfds", validation_size=0)
    test = next(version(here).glob("*-test.array_record*"))
    shutil.copy(next(version(here).glob("*-train.array_record*")), test)
    info = version(here) / "dataset_info.json"
    info.write_text(info.read_text().replace('"11"', '"17"'))
    second = imdb.load("tfds", validation_size=0)
    np.testing.assert_array_equal(second.splits["test"]["ids"], first.splits["train"]["ids"])


def one_line_error(call, *parts):
    with pytest.raises(DataError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and all(part in message for part in parts), message


@pytest.mark.parametrize("source", ["auto", "tfds"])
@pytest.mark.parametrize(
    "damage", ["truncated", "empty", "flipped", "missing", "no info", "bad info", "count"]
)
def test_damaged_data_is_an_error_and_never_replaced(here, source, damage):
    shard = next(version(here).glob("*-train.array_record*"))
    info = version(here) / "dataset_info.json"
    content = shard.read_bytes()
    if damage == "truncated":
        shard.write_bytes(content[: len(content) // 2])
    elif damage == "empty":
        shard.write_bytes(b"")
    elif damage == "flipped":
        middle = content.index(b"label") if b"label" in content else 300
        shard.write_bytes(content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :])
    elif damage == "missing":
        shard.unlink()
    elif damage == "no info":
        info.unlink()
    elif damage == "bad info":
        info.write_text(info.read_text()[:100])
    elif damage == "count":
        info.write_text(info.read_text().replace('"17"', '"18"'))
    before = tiny_data.tree(here)
    call = lambda: imdb.load(source)  # noqa: E731
    one_line_error(
        call, "damaged", "python -m lstmjax.data.prepare imdb_reviews", str(version(here))
    )
    assert tiny_data.tree(here) == before
    assert not (here.parent / "cache").exists()


@pytest.mark.parametrize("named", [True, False])
def test_tfrecord_data_is_named_and_the_way_out_told(here, named):
    for shard in version(here).glob("*.array_record*"):
        shard.rename(str(shard).replace("array_record", "tfrecord"))
    path = version(here) / "dataset_info.json"
    info = json.loads(path.read_text())
    del info["fileFormat"]
    path.write_text(json.dumps(info | ({"fileFormat": "tfrecord"} if named else {})))
    one_line_error(lambda: imdb.load("auto"), "tfrecord", "--data-dir OTHER", "TFDS_DATA_DIR=OTHER")


def test_a_file_for_a_data_folder_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "file"))
    one_line_error(lambda: imdb.load("auto"), "cannot read the data folder", "set TFDS_DATA_DIR")


def test_an_unreadable_folder_is_an_error(here, monkeypatch):
    def refuse(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "iterdir", refuse)
    one_line_error(lambda: imdb.load("auto"), "cannot read the data folder", "Permission denied")


def test_no_data_and_no_network(tmp_path, monkeypatch):
    from lstmjax.data import prepare

    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "nowhere"))
    monkeypatch.setenv("LSTMJAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(prepare, "REVIEWS_URL", tiny_data.closed_address() + "reviews.tar.gz")
    one_line_error(
        lambda: imdb.load("tfds"), "no prepared imdb_reviews", "cannot be reached", "offline"
    )
    data = imdb.load("auto", max_length=20)
    assert (data.name, data.source) == ("offline_reviews", "offline") and "not IMDB" in data.title
    assert not (tmp_path / "nowhere").exists()
    assert data.sha256 == imdb.load("offline", max_length=20).sha256


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("source", "internet"),
        ("num_words", 3),
        ("max_length", 0),
        ("padding", "both"),
        ("truncating", ""),
        ("validation_size", -1),
        ("validation_size", 17),
        ("validation_size", 0.1),
        ("seed", -1),
        ("seed", None),
    ],
)
def test_wrong_options_are_named(here, option, value):
    with pytest.raises(ValueError, match=f"{option}: got {value!r}, expected"):
        imdb.load(**{option: value})


@pytest.mark.parametrize("texts", ["one string", [b"bytes"], [None]])
def test_encode_wants_strings(texts):
    with pytest.raises(ValueError, match="texts"):
        imdb.encode(texts, (text.UNUSED, "a"))


def test_prepared_data_is_read_without_tensorflow_or_jax(here):
    """With packages of those names that cannot be imported, and write down that it was tried."""
    fakes, tried = here.parent / "fakes", here.parent / "tried"
    for name in ("tensorflow", "keras", "torch", "jax"):
        (fakes / name).mkdir(parents=True)
        line = f"open({str(tried)!r}, 'a').write({name!r}); raise ImportError({name!r})\n"
        (fakes / name / "__init__.py").write_text(line)
    program = f"""
import sys, types
sys.path.insert(0, {str(fakes)!r})
package = types.ModuleType("lstmjax")
package.__path__ = [{str(Path(lstmjax.data.__file__).parents[1])!r}]
sys.modules["lstmjax"] = package
from lstmjax.data import imdb
print(imdb.load("tfds", validation_size=4).sha256)
"""
    environment = os.environ | {"LSTMJAX_CACHE": str(here.parent / "other")}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment
    )
    want = imdb.load("tfds", validation_size=4).sha256
    assert done.stdout.strip() == want, done.stderr
    assert not tried.exists(), tried.read_text()


@pytest.mark.skipif(not (REAL / "imdb_reviews").is_dir(), reason="the real reviews are not here")
def test_the_real_reviews(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(REAL))
    data = imdb.load(cache_dir=tmp_path)
    assert data.source == "tfds" and len(data.vocabulary) == 9997
    assert data.vocabulary[1:12] == tuple("the and a of to is br in it i this".split())
    sizes = {"train": 22500, "validation": 2500, "test": 25000}
    assert {split: arrays["ids"].shape for split, arrays in data.splits.items()} == {
        split: (size, 80) for split, size in sizes.items()
    }
    labels = np.concatenate([data.splits[split]["label"] for split in ("train", "validation")])
    assert labels.mean() == data.splits["test"]["label"].mean() == 0.5
    digest = hashlib.sha256(data.splits["test"]["ids"].tobytes()).hexdigest()
    assert digest == "e8cd6bdd173124bb6c9f0a5bdfb1ee966d7f2879eea20fbab3ff1e4e35bcd8a7"
    assert imdb.load(cache_dir=tmp_path).sha256 == data.sha256
