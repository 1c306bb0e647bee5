"""lstmjax.data.text against what Keras documents, and a slow version of it."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lstmjax.data import text

TEXTS = st.lists(st.text(alphabet="abAB É'<br/>.!\t\n\r_-0", max_size=30), max_size=6)


def slow_words(string):
    """Character by character."""
    found, word = [], ""
    for character in string.lower() + " ":
        if character in ' !"#$%&()*+,-./:;<=>?@[\\]^_`{|}~\t\n':
            if word:
                found.append(word)
            word = ""
        else:
            word += character
    return found


def slow_pad(rows, num_words, length, padding, truncating):
    """One review after the other."""
    result = []
    for row in rows:
        row = [i if i < num_words else 2 for i in row]
        row = row[-length:] if truncating == "pre" else row[:length]
        zeros = [0] * (length - len(row))
        result.append(zeros + row if padding == "pre" else row + zeros)
    return result


def rows_of(ragged):
    return [
        list(ragged.ids[a:b]) for a, b in zip(ragged.offsets[:-1], ragged.offsets[1:], strict=True)
    ]


def test_words_by_example():
    given_text = "Well,it's  <br /><br />GREAT_film (1999)!\r\nNo?\x0bYes; naïve\xa0me"
    want = [
        "well",
        "it's",
        "br",
        "br",
        "great",
        "film",
        "1999",
        "\r",
        "no",
        "\x0byes",
        "naïve\xa0me",
    ]
    assert text.words(given_text) == want
    assert text.words("") == text.words(" .,\n") == []


@given(st.text())
def test_words_equal_the_slow_ones(string):
    assert text.words(string) == slow_words(string)


def test_ids_by_example():
    texts = ["b a, c", "C b! d", "d b"]  # b 3, then c and d with 2 in order of appearance, a 1
    reviews, vocabulary = text.index(texts)
    assert vocabulary == (text.UNUSED, "b", "c", "d", "a")
    assert rows_of(reviews) == [[1, 4, 7, 5], [1, 5, 4, 6], [1, 6, 4]]
    assert reviews.ids.dtype == np.int32 and reviews.offsets.dtype == np.int64


@given(TEXTS)
def test_index_equals_the_slow_one(texts):
    reviews, vocabulary = text.index(texts)
    counts = Counter(word for one in texts for word in slow_words(one))
    ranked = sorted(counts, key=lambda word: -counts[word])  # stable: ties by first appearance
    assert vocabulary == (text.UNUSED, *ranked)
    want = [[1] + [ranked.index(word) + 4 for word in slow_words(one)] for one in texts]
    assert rows_of(reviews) == want


@given(TEXTS, TEXTS)
def test_unknown_words_get_two_and_known_ones_their_id(train, test):
    reviews, vocabulary = text.index(train)
    assert rows_of(text.look_up(train, vocabulary)) == rows_of(reviews)
    want = [
        [1] + [vocabulary.index(w) + 3 if w in vocabulary else 2 for w in slow_words(one)]
        for one in test
    ]
    assert rows_of(text.look_up(test, vocabulary)) == want


def test_the_placeholder_is_no_word():
    assert text.UNUSED not in text.words(f"a {text.UNUSED} b")
    assert rows_of(text.look_up([text.UNUSED], (text.UNUSED, "unused"))) == [[1, 4]]


@pytest.mark.parametrize("padding", ["pre", "post"])
@pytest.mark.parametrize("truncating", ["pre", "post"])
@pytest.mark.parametrize("length", [1, 4, 9, 30])
def test_pad_equals_the_slow_one(padding, truncating, length):
    generator = np.random.default_rng(length)
    rows = [[1, *generator.integers(2, 40, n)] for n in (0, 3, 8, 1, 17, 7, 25)]
    offsets = np.cumsum([0, *map(len, rows)])
    ragged = text.Ragged(np.array(sum(rows, []), np.int32), offsets)
    got = text.pad(ragged, num_words=23, max_length=length, padding=padding, truncating=truncating)
    np.testing.assert_array_equal(got["ids"], slow_pad(rows, 23, length, padding, truncating))
    np.testing.assert_array_equal(got["lengths"], [min(len(row), length) for row in rows])
    assert got["ids"].dtype == got["lengths"].dtype == np.int32


def test_pad_of_no_reviews():
    got = text.pad(text.index([])[0], num_words=9, max_length=4)
    assert got["ids"].shape == (0, 4) and got["lengths"].shape == (0,)


def test_ten_thousand_ids_are_9996_words():
    words = [f"w{i}" for i in range(11000)]
    reviews, _ = text.index([" ".join(words)])
    ids = text.pad(reviews, num_words=10000, max_length=11001)["ids"]
    known = ids[ids > 3]
    assert len(known) == len(set(known)) == 9996 and known.max() == 9999 and 3 not in ids


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("num_words", 4),
        ("num_words", 100.0),
        ("max_length", 0),
        ("max_length", None),
        ("padding", "left"),
        ("padding", None),
        ("truncating", "Pre"),
    ],
)
def test_wrong_options_are_named(option, value):
    options = {"num_words": 10, "max_length": 5, option: value}
    with pytest.raises(ValueError, match=f"{option}: got {value!r}, expected"):
        text.pad(text.index(["a b"])[0], **options)
