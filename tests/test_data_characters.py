"""Generated sentences against a grammar written out, text files, and the streams cut from them."""

import itertools
import math
import re

import numpy as np
import pytest

from lstmjax.data import characters, streams
from lstmjax.data.characters import NOUNS, PLACES, VERBS, sentences
from lstmjax.data.dataset import DataError

SENTENCE = re.compile(
    f"({'|'.join(NOUNS)})(s?)((?: (?:{'|'.join(PLACES)})s?)*) ({'|'.join(VERBS)})(s?)\\."
)


# ---- sentences ----------------------------------------------------------------------------------


def test_every_sentence_agrees_and_its_lag_is_counted():
    made = sentences(20_000, seed=3)
    assert len(made.text) >= 20_000 and made.lags.shape == (len(made.text),)
    read, nats, place = np.zeros(len(made.text), np.int32), 0.0, 0
    counts = {"plural": 0, "places": [0] * 3}
    for sentence in made.text.removesuffix(" ").split(". "):
        sentence = sentence.removesuffix(".") + "."
        noun, plural, middle, verb, singular = SENTENCE.fullmatch(sentence).groups()
        assert (plural == "s") != (singular == "s")  # cats sleep, cat sleeps
        # The number is shown first right after the noun, then right after the verb.
        shown = sentence.rindex(verb) + len(verb)
        read[place + shown] = shown - len(noun)
        assert made.text[place + shown] == ("." if plural else "s")
        places = re.findall(f"({'|'.join(PLACES)})", middle)
        nats += math.log(4 * 2 * 3 * 4) + len(places) * math.log(8)
        counts["plural"] += plural == "s"
        counts["places"][len(places)] += 1
        place += len(sentence) + 1
    assert place == len(made.text)
    np.testing.assert_array_equal(made.lags, read)
    assert made.nats == pytest.approx(nats, rel=1e-12)
    total = sum(counts["places"])
    assert abs(counts["plural"] / total - 0.5) < 0.06
    assert max(abs(n / total - 1 / 3) for n in counts["places"]) < 0.06
    assert {made.lags[made.lags > 0].min(), made.lags.max()} == {4, 25}


def test_no_two_choices_make_the_same_sentence():
    """So −ln P of a text is the sum over choices."""
    ones = [f" {place}{ending}" for place in PLACES for ending in ("", "s")]
    middles = ["", *ones, *map("".join, itertools.product(ones, ones))]
    made = [
        f"{noun}{'s' * plural}{middle} {verb}{'s' * (1 - plural)}."
        for noun, plural, middle, verb in itertools.product(NOUNS, (0, 1), middles, VERBS)
    ]
    assert len(set(made)) == len(made) == 4 * 2 * (1 + 8 + 64) * 4


def test_the_text_is_the_same_everywhere_and_goes_by_its_seed():
    assert sentences(60, seed=0).text.startswith(
        "goats in woods sleep. dogs on hills sit. goat in woods jumps. "
    )
    assert sentences(60, seed=1).text != sentences(60, seed=0).text
    longer = sentences(100, seed=0).text
    assert longer.startswith(sentences(60, seed=0).text)


# ---- as a data set ------------------------------------------------------------------------------


def test_generated_text_as_ids():
    data = characters.load(length=5000, test_length=1000)
    train, test = data.splits["train"], data.splits["test"]
    assert data.name == "agreement_sentences" and data.source == "generated"
    assert 5000 <= len(train["ids"]) < 5060 and 1000 <= len(test["ids"]) < 1060
    assert train["ids"].dtype == np.int32
    assert list(data.vocabulary) == sorted(set(data.vocabulary))
    text = "".join(data.vocabulary[k] for k in train["ids"])
    made = sentences(5000, seed=1)
    assert text == made.text and float(train["nats"]) == made.nats
    np.testing.assert_array_equal(train["lags"], made.lags)
    assert "".join(data.vocabulary[k] for k in test["ids"]) == sentences(1000, seed=2).text


def test_a_file_as_ids(tmp_path):
    file = tmp_path / "book.txt"
    file.write_text("ähm, so?\n" * 10, encoding="utf-8")
    data = characters.load(file)
    assert data.name == "book.txt" and data.source == "file"
    assert data.vocabulary == tuple(sorted(set("ähm, so?\n")))
    assert [len(data.splits[name]["ids"]) for name in ("train", "test")] == [81, 9]
    both = np.concatenate([data.splits[name]["ids"] for name in ("train", "test")])
    assert "".join(data.vocabulary[k] for k in both) == "ähm, so?\n" * 10
    assert set(data.splits["train"]) == {"ids"}
    assert len(characters.load(file, test_length=5).splits["test"]["ids"]) == 5


def test_what_is_no_text_is_said_in_one_line(tmp_path):
    for content, said in ((b"\xff\xfe\x00", "is no text in UTF-8"), (b"abc", "got 3 characters")):
        (tmp_path / "file").write_bytes(content)
        with pytest.raises(DataError, match=said):
            characters.load(tmp_path / "file")
    with pytest.raises(DataError, match="cannot read .*nowhere: No such file"):
        characters.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="test_length: got 0.1, expected an integer of 1 or more"):
        characters.load(test_length=0.1)
    with pytest.raises(ValueError, match="length: got 0, expected an integer of 1 or more"):
        characters.load(length=0)
    with pytest.raises(ValueError, match="seed: got -1, expected an integer of 0 or more"):
        sentences(5, seed=-1)
    with pytest.raises(ValueError, match="text: got 'x', expected characters of the vocabulary"):
        characters.encode("abxa", ("a", "b"))


def test_rows_are_read_downwards():
    got = characters.rows(np.arange(11), 3)
    np.testing.assert_array_equal(got, [[0, 3, 6], [1, 4, 7], [2, 5, 8]])


# ---- streams ------------------------------------------------------------------------------------


def test_bits_follow_their_rule():
    found = streams.bits(np.random.default_rng(0), 4000, 5, (2, 5))
    x, p, y = (found[name] for name in "xpy")
    assert x.shape == p.shape == y.shape == (4000, 5)
    for t in range(5, 4000):
        np.testing.assert_array_equal(p[t], 0.5 + 0.5 * x[t - 2] - 0.25 * x[t - 5])
    assert abs(x.mean() - 0.5) < 0.02
    for value in (0.25, 0.5, 0.75, 1.0):
        assert abs(y[p == value].mean() - value) < 0.03
    assert set(np.unique(p[:5])) <= {0.25, 0.5, 0.75, 1.0}  # the bits before the first count too


def test_levels_are_the_entropies_of_the_rule():
    def h(p):
        return -sum(q * math.log(q) for q in (p, 1 - p) if q > 0)

    neither, nearer, both = streams.levels()
    assert neither == pytest.approx(h(0.625), abs=1e-14)
    assert nearer == pytest.approx((h(0.375) + h(0.875)) / 2, abs=1e-14)
    assert both == pytest.approx((h(0.5) + h(0.25) + h(1.0) + h(0.75)) / 4, abs=1e-14)
    # The loss of the best guess on many samples, by what the guess knows.
    found = streams.bits(np.random.default_rng(1), 100_000, 2)
    x, y = found["x"], found["y"]
    near, far = x[5:-3], x[:-8]
    for known, level in (((), neither), ((near,), nearer), ((near, far), both)):
        key = sum((2**k * a for k, a in enumerate(known)), np.zeros_like(near))
        frequency = [y[8:][key == k].mean() for k in range(2 ** len(known))]
        guess = np.clip(np.asarray(frequency)[key], 1e-9, 1 - 1e-9)
        loss = -np.mean(np.log(np.where(y[8:] == 1, guess, 1 - guess)))
        assert loss == pytest.approx(level, abs=0.004)


def test_toy_sequences_go_on_where_they_stopped():
    size, test = (6, 10, 3), (30, 4)
    made = streams.toy([7, 8], size, test, (2, 5))
    assert made.xs.shape == made.ys.shape == (2, *size) and made.width == 2
    for row, seed in enumerate((7, 8)):
        whole = streams.bits(np.random.default_rng([seed, 0]), 60, 3, (2, 5))
        np.testing.assert_array_equal(made.xs[row].reshape(60, 3), whole["x"])
        np.testing.assert_array_equal(made.ys[row].reshape(60, 3), whole["y"])
    assert made.test_xs.shape == (80, 4)
    asked = 0.5 + 0.5 * made.test_xs[3:-2] - 0.25 * made.test_xs[:-5]
    np.testing.assert_array_equal(made.test_ps[5:, :, 1], asked.astype(np.float32))
    np.testing.assert_array_equal(made.test_ps.sum(-1), 1.0)
    assert made.levels[2] == (streams.levels()[2], "both bits") and made.lags is None


def test_text_asks_for_the_next_character():
    size = (10, 8, 8)
    made = streams.text(None, 3, size, (10, 1))
    data = characters.load(length=81 * 8, test_length=61)
    assert made.xs.shape == made.ys.shape == (3, *size)
    ids = data.splits["train"]["ids"]
    for seed, row in itertools.product(range(3), range(8)):
        begin = row * (len(ids) // 8)
        np.testing.assert_array_equal(made.xs[seed, :, :, row].ravel(), ids[begin : begin + 80])
        np.testing.assert_array_equal(made.ys[seed, :, :, row].ravel(), ids[begin + 1 : begin + 81])


def test_the_test_text_and_its_levels(tmp_path):
    made = streams.text(None, 1, (30, 20, 4), (60, 2))
    asked = characters.load(length=601 * 4, test_length=222).splits["test"]
    for row in range(2):
        part = slice(row * 111, row * 111 + 111)
        np.testing.assert_array_equal(made.test_xs[:, row], asked["ids"][part][:-1])
        np.testing.assert_array_equal(made.test_ps[:, row].argmax(-1), asked["ids"][part][1:])
        np.testing.assert_array_equal(made.lags[:, row], asked["lags"][part][1:])
    np.testing.assert_array_equal(made.test_ps.sum(-1), 1.0)
    (forgetful, _), (grammar, _) = made.levels
    assert grammar == pytest.approx(float(asked["nats"]) / len(asked["ids"]))
    verbs = np.count_nonzero(asked["lags"])
    assert (forgetful - grammar) * len(asked["ids"]) == pytest.approx(verbs * math.log(2))
    # A file that is too short is read again, and one without enough to test on is refused.
    file = tmp_path / "short.txt"
    file.write_text("0123456789" * 100)
    made = streams.text(file, 1, (60, 10, 2), (49, 5))
    assert made.lags is None and made.levels == () and made.test_xs.shape == (99, 1)
    read = made.xs[0, :, :, 0].ravel()
    np.testing.assert_array_equal(read, np.resize(np.arange(450) % 10, 600))
    with pytest.raises(ValueError, match="text: got 100 characters to test on, expected at least"):
        streams.text(file, 1, (60, 10, 2), (50, 5))


def test_several_data_sets_as_one():
    one, two = (streams.toy([seed], (2, 3, 1), (5, 1)).dataset for seed in (0, 1))
    text = characters.load(length=10)
    assert streams.joined([one]) is one
    both = streams.joined([one, text])
    assert both.name == "lagged_bits and agreement_sentences" and both.source == "generated"
    assert both.sha256 != streams.joined([two, text]).sha256
    assert streams.joined([one, text._replace(source="file")]).source == "file"
