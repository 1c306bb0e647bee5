"""N-grams as sparse counts, against collections.Counter and plain loops."""

import math
from collections import Counter

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from lstmjax.data import ngrams, offline, text

SENTENCES = (
    "a good film, a very good film!",
    "",
    "bad; not good",
    "good",
    "a bad film (a very bad film)",
    "not bad: not bad at all",
    "unheard words alone",
)
LABELS = np.array([1, 0, 0, 1, 0, 1, 0], np.int32)


def grams_of(tokens, orders):
    """{n-gram as a tuple of tokens: how often} of one document."""
    found = Counter()
    for n in orders:
        found.update(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))
    return found


def names_of(grams, vocabulary):
    """The n-grams as tuples of tokens, in the order of their numbers."""
    names = []
    for order, codes in zip(grams.orders, grams.codes, strict=True):
        for code in codes.tolist():
            places = []
            for _ in range(order):
                code, place = divmod(code, grams.base)
                places.append(vocabulary[place - 1])
            names.append(tuple(reversed(places)))
    return names


def table(tokens, names):
    """Counts [N, F] by hand."""
    known = [grams_of(one, {len(name) for name in names}) for one in tokens]
    return np.array([[own[name] for name in names] for own in known], float)


# ---- tokens -------------------------------------------------------------------------------------


def test_punctuation_marks_are_tokens_of_their_own():
    string = 'It\'s "so-so"...<br /><br />Well?! (He\tSAID: no;yes, 3/4 <b>É</b>)'
    want = string.lower().replace("<br />", " ")
    for mark in '.",()!?;:':
        want = want.replace(mark, f" {mark} ")
    assert ngrams.with_punctuation(string) == want.split()
    assert ngrams.with_punctuation(string)[:8] == ["it's", '"', "so-so", '"', ".", ".", ".", "well"]


def test_a_vocabulary_is_by_first_appearance_and_others_have_no_place():
    found, vocabulary = ngrams.index(SENTENCES[:3], ngrams.with_punctuation)
    assert vocabulary == ("a", "good", "film", ",", "very", "!", "bad", ";", "not")
    assert found.offsets.tolist() == [0, 9, 9, 13]
    assert found.ids.tolist() == [0, 1, 2, 3, 0, 4, 1, 2, 5, 6, 7, 8, 1]
    others = ngrams.look_up(["very odd", "", "film !"], vocabulary, ngrams.with_punctuation)
    assert others.ids.tolist() == [4, -1, 2, 5] and others.offsets.tolist() == [0, 2, 2, 4]
    assert others.ids.dtype == found.ids.dtype == np.int32


# ---- counts -------------------------------------------------------------------------------------

words = st.lists(st.lists(st.sampled_from("abcde"), max_size=9), min_size=1, max_size=6)


@hypothesis.given(words, words, st.sampled_from([(1,), (2,), (1, 2), (3, 1), (1, 2, 3)]))
def test_counts_are_those_of_a_counter(train, test, orders):
    train, test = ([" ".join(one) for one in side] for side in (train, test))
    found, vocabulary = ngrams.index(train, str.split)
    grams = ngrams.known(found, len(vocabulary), orders)
    names = names_of(grams, vocabulary)
    assert set(names) == set().union(*(grams_of(one.split(), orders) for one in train))
    assert len(names) == len(set(names)) == grams.size
    others = ngrams.look_up(test, vocabulary, str.split)
    for documents, strings in ((found, train), (others, test)):
        x = ngrams.counts(documents, grams)
        tokens = [one.split() for one in strings]
        want = table(tokens, names) if names else np.zeros((len(strings), 0))
        np.testing.assert_array_equal(x.toarray(), want)
        np.testing.assert_array_equal(ngrams.binary(x).toarray(), want > 0)
        np.testing.assert_array_equal(ngrams.documents_with(x), (want > 0).sum(0))
        assert x.has_canonical_format and (x.data > 0).all() and x.indices.dtype == np.int32

        ids = ngrams.padded(documents, grams)
        assert ids.shape == (len(strings), max(1, int(want.sum(1).max())))
        for row, own in zip(ids, want, strict=True):
            length = int(own.sum())
            assert not row[length:].any()
            np.testing.assert_array_equal(
                np.bincount(row[:length], minlength=1 + len(own))[1:], own
            )

    # What has a token without a place is no n-gram.
    names = set(names_of(ngrams.known(others, len(vocabulary), orders), (*vocabulary, None)))
    assert all(None not in name for name in names)

    keep = np.arange(grams.size) % 3 != 1
    fewer = ngrams.counts(others, grams.select(keep))
    np.testing.assert_array_equal(fewer.toarray(), ngrams.counts(others, grams).toarray()[:, keep])


@hypothesis.given(words, st.integers(1, 10))
def test_last_keeps_the_last_tokens(strings, count):
    found, vocabulary = ngrams.index([" ".join(one) for one in strings], str.split)
    cut = ngrams.last(found, count)
    for n, tokens in enumerate(strings):
        own = cut.ids[cut.offsets[n] : cut.offsets[n + 1]]
        assert [vocabulary[place] for place in own] == tokens[-count:]


def test_orders_that_cannot_be_told_apart_are_refused():
    found, vocabulary = ngrams.index(["a b c"], str.split)
    with pytest.raises(ValueError, match="orders: got 0, expected an integer of 1 or more"):
        ngrams.known(found, len(vocabulary), [1, 0])
    limit = 2_097_151  # base³ is 2⁶³
    assert ngrams.known(found, limit - 1, [3]).size == 1
    with pytest.raises(ValueError, match=f"orders: got 3, expected fewer with {limit} tokens"):
        ngrams.known(found, limit, [3])
    with pytest.raises(ValueError, match="count: got 0, expected an integer of 1 or more"):
        ngrams.last(found, 0)


def test_the_largest_codes_are_exact():
    size = 2_097_150
    documents = ngrams.Documents(np.array([size - 1] * 3, np.int32), np.array([0, 3]))
    (code,) = ngrams.known(documents, size, [3]).codes[0].tolist()
    assert code == size * (size + 1) ** 2 + size * (size + 1) + size


# ---- weights ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small():
    """Counts of ``SENTENCES`` as a sparse array and as a list of Counters, and the n-grams."""
    found, vocabulary = ngrams.index(SENTENCES, ngrams.with_punctuation)
    grams = ngrams.known(found, len(vocabulary), (1, 2))
    counters = [grams_of(ngrams.with_punctuation(one), (1, 2)) for one in SENTENCES]
    return ngrams.counts(found, grams), counters, names_of(grams, vocabulary)


@pytest.mark.parametrize("alpha", [1.0, 0.3])
@pytest.mark.parametrize("binary", [False, True])
def test_log_count_ratio(small, alpha, binary):
    x, counters, names = small
    totals = {0: Counter(), 1: Counter()}
    for counter, label in zip(counters, LABELS.tolist(), strict=True):
        totals[label].update(dict.fromkeys(counter, 1) if binary else counter)
    p, q = ({name: alpha + totals[label][name] for name in names} for label in (1, 0))
    want = [math.log((p[n] / sum(p.values())) / (q[n] / sum(q.values()))) for n in names]
    seen = ngrams.binary(x) if binary else x
    got = ngrams.log_count_ratio(seen, LABELS, alpha)
    np.testing.assert_allclose(got, want, rtol=1e-13, atol=1e-14)
    np.testing.assert_allclose(ngrams.log_count_ratio(seen, 1 - LABELS, alpha), -got, rtol=1e-13)
    assert len(set(np.round(want, 6))) > 4


def test_interpolated_lies_between_naive_bayes_and_the_classifier():
    weights = np.random.default_rng(0).normal(size=7)
    mean = sum(abs(w) for w in weights.tolist()) / 7
    np.testing.assert_array_equal(ngrams.interpolated(weights, 1), weights)
    np.testing.assert_allclose(ngrams.interpolated(weights, 0), np.full(7, mean), rtol=1e-15)
    want = [0.75 * mean + 0.25 * w for w in weights.tolist()]
    np.testing.assert_allclose(ngrams.interpolated(weights, 0.25), want, rtol=1e-14)


def test_tf_idf(small):
    x, counters, names = small
    size = len(counters)
    idf = {
        name: math.log((1 + size) / (1 + sum(name in counter for counter in counters))) + 1
        for name in names
    }
    got_idf = ngrams.inverse_document_frequency(x)
    np.testing.assert_allclose(got_idf, [idf[name] for name in names], rtol=1e-14)
    rows = [[counter[name] * idf[name] for name in names] for counter in counters]
    want = [[value / (math.hypot(*row) or 1) for value in row] for row in rows]
    found = ngrams.tf_idf(x, got_idf)
    np.testing.assert_allclose(found.toarray(), want, rtol=1e-13)
    norms = np.linalg.norm(found.toarray(), axis=1)
    np.testing.assert_allclose(norms, [1, 0, 1, 1, 1, 1, 1], rtol=1e-14)
    assert x.data.max() == 2  # the counts stay as they were
    np.testing.assert_array_equal(x.toarray(), table_of(counters, names))


def table_of(counters, names):
    return np.array([[counter[name] for name in names] for counter in counters], float)


def test_scaled_multiplies_columns(small):
    x, counters, names = small
    factors = np.random.default_rng(1).normal(size=len(names))
    want = table_of(counters, names) * factors
    np.testing.assert_array_equal(ngrams.scaled(x, factors).toarray(), want)


# ---- reviews ------------------------------------------------------------------------------------


SIZE = 4  # so few that the test reviews have words of their own


@pytest.fixture(scope="module")
def raw():
    return offline.reviews()


@pytest.mark.parametrize("tokens", list(ngrams.TOKENS))
def test_reviews_are_loaded_whole(tokens, raw):
    data = ngrams.load("offline", tokens=tokens, limit=SIZE)
    tokenise = {"words": text.words, "punctuation": ngrams.with_punctuation}[tokens]
    for split in ("train", "test"):
        found = ngrams.of_split(data, split)
        np.testing.assert_array_equal(data.splits[split]["label"], raw[split][1][:SIZE])
        assert len(found.offsets) == SIZE + 1
        for n in range(SIZE):
            own = found.ids[found.offsets[n] : found.offsets[n + 1]].tolist()
            want = tokenise(raw[split][0][n])
            known = [token if token in data.vocabulary else None for token in want]
            assert [data.vocabulary[k] if k >= 0 else None for k in own] == known
    assert (ngrams.of_split(data, "test").ids < 0).any()
    assert (data.name, data.source) == ("offline_reviews", "offline")


def test_options_change_the_hash_and_wrong_ones_are_named():
    hashes = {
        ngrams.load("offline", tokens=tokens, limit=limit).sha256
        for tokens in ngrams.TOKENS
        for limit in (5, 6)
    }
    assert len(hashes) == 4
    with pytest.raises(ValueError, match="tokens: got 'letters', expected one of"):
        ngrams.load("offline", tokens="letters")
    with pytest.raises(ValueError, match="limit: got 0, expected"):
        ngrams.load("offline", limit=0)
