"""Words in a row and their ratios, against plain loops and dictionaries."""

import itertools
import math

import numpy as np
import pytest

from lstmjax.data import word_runs


@pytest.fixture
def some():
    """Ids (1 to 3 are no words), offsets with an empty document, labels, training rows."""
    draw = np.random.default_rng(2)
    lengths = [9, 0, 14, 6, 11, 1, 12]
    ids = draw.choice([1, 2, 3, 4, 5, 6, 7], sum(lengths), p=[0.05, 0.1, 0.05, 0.2, 0.2, 0.2, 0.2])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    label = np.array([1, 0, 1, 0, 0, 1, 1], np.int32)
    return ids.astype(np.int32), offsets, label, np.array([0, 2, 3, 6, 1])


def documents(ids, offsets):
    return [ids[a:b].tolist() for a, b in zip(offsets[:-1], offsets[1:], strict=True)]


def runs_of(document, order):
    """At each place, the runs of 2 to so many words that end there, or None for each."""
    found = []
    for end in range(1, len(document) + 1):
        runs = [tuple(document[max(end - n, 0) : end]) for n in range(2, order + 1)]
        whole = [len(run) == n and min(run) >= 4 for n, run in enumerate(runs, 2)]
        found.append([run if ok else None for run, ok in zip(runs, whole, strict=True)])
    return found


def words_in(code, size):
    """The words of a code, the last one last."""
    found = []
    while code:
        code, word = divmod(code, size)
        found.insert(0, word)
    return tuple(found)


@pytest.mark.parametrize("order", [2, 3, 4])
@pytest.mark.parametrize(("least", "most"), [(1, 100), (2, 100), (2, 3), (3, 1)])
def test_runs_are_those_of_most_training_reviews(some, least, most, order):
    ids, offsets, _, rows = some
    every = [runs_of(document, order) for document in documents(ids, offsets)]
    count = {}
    for row in rows:
        for run in {run for runs in every[row] for run in runs} - {None}:
            count[run] = count.get(run, 0) + 1
    known = [run for run in count if count[run] >= least]
    by_code = lambda run: (len(run), run)  # noqa: E731
    known = sorted(sorted(known, key=lambda p: (-count[p], by_code(p)))[:most], key=by_code)
    assert {len(run) for run in known} >= set(range(2, order + 1)) or most < 100 or least > 1
    codes = word_runs.run_codes(ids, offsets, 50, order)
    got = word_runs.known_runs(codes, offsets, rows, least, most)
    assert (codes.dtype, codes.shape) == (np.int64, (len(ids), order - 1))
    assert [words_in(code, 50) for code in got.tolist()] == known
    number = {run: place + 1 for place, run in enumerate(known)}
    want = [[number.get(run, 0) for run in runs] for document in every for runs in document]
    assert word_runs.numbers(codes, got).tolist() == want and np.max(want) == len(known)


@pytest.mark.parametrize("order", [2, 3, 4])
def test_known_runs_of_the_largest_vocabulary(some, order):
    """The last words of as many as fit, in place of the first of 8."""
    ids, offsets, _, rows = some
    size = int((2**63 - 1) ** (1 / order)) - 1
    last = np.where(ids >= 4, ids.astype(np.int64) + (size - 8), ids)
    known = word_runs.known_runs(word_runs.run_codes(ids, offsets, 8, order), offsets, rows, 2, 9)
    codes = word_runs.run_codes(last, offsets, size, order)
    assert codes.max() > 0.9 * 2**63
    got = word_runs.known_runs(codes, offsets, rows, 2, 9)
    want = [tuple(word + (size - 8) for word in words_in(code, 8)) for code in known.tolist()]
    assert [words_in(code, size) for code in got.tolist()] == want and len(want) > 5


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 1], [1, 2]])
def test_runs_of_reviews_that_are_too_short(lengths):
    ids, offsets = np.full(sum(lengths), 5, np.int32), np.concatenate([[0], np.cumsum(lengths)])
    codes = word_runs.run_codes(ids, offsets.astype(np.int64), 10, 3)
    want = [[55, -1] if at == 1 else [-1, -1] for n in lengths for at in range(n)]
    assert codes.tolist() == want


def counts_by_hand(has, label, rows, size):
    """1 + how many positive and how many negative ones of some reviews have each feature."""
    return [
        np.array([1 + sum(f in has[n] for n in rows if label[n] == sign) for f in range(size)])
        for sign in (1, 0)
    ]


@pytest.mark.parametrize("order", [2, 3])
def test_features_and_their_ratios(some, order):
    ids, offsets, label, rows = some
    size = 50
    codes = word_runs.run_codes(ids, offsets, size, order)
    known = word_runs.known_runs(codes, offsets, rows, 2, 100)
    assert 2 < len(known) < 30
    got = word_runs.with_runs("path", ids, offsets, known, size, order)["path"]
    name = {words_in(code, size): size + place for place, code in enumerate(known.tolist())}
    assert {len(run) for run in name} == set(range(2, order + 1))
    has, want, every = [], [], []
    for document in documents(ids, offsets):
        seen = set()
        for word, runs in zip(document, runs_of(document, order), strict=True):
            own = [word if word >= 4 else 0, *(name.get(run, 0) for run in runs)]
            want.append([0 if f in seen else f for f in own])
            every.append(own)
            seen |= set(own)
        has.append(seen - {0})
    both = word_runs.with_runs("path", ids, offsets, known, size, order, True)
    features = both.pop("features")
    assert list(both) == ["path"] and np.array_equal(both["path"], got)
    assert got.tolist() == want and features.tolist() == every
    assert got.dtype == features.dtype == np.int32
    size += len(known)
    ratio, without = word_runs.log_count_ratio(got, offsets, label, rows, size)
    assert (ratio.dtype, without.dtype, ratio.shape) == (np.float32, np.float32, (size,))

    p, q = counts_by_hand(has, label, rows, size)
    sums = p[1:].sum() / q[1:].sum()
    np.testing.assert_allclose(ratio[1:], np.log(p / q / sums)[1:], rtol=1e-5)
    assert np.ptp(ratio) > 1 and ratio[0] == 0 and not without[:, 0].any()
    for row in rows:
        p, q = counts_by_hand(has, label, rows[rows != row], size)
        for f in has[row]:
            want = np.log(p[f] / q[f] / sums)
            np.testing.assert_allclose(without[label[row], f], want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("folds", [2, 3, 5])
def test_a_review_reads_ratios_that_other_parts_were_counted_for(some, folds):
    ids, offsets, label, rows = some
    codes = word_runs.run_codes(ids, offsets, 50, 3)
    known = word_runs.known_runs(codes, offsets, rows, 1, 100)
    size = 50 + len(known)
    features = word_runs.with_runs("none", ids, offsets, known, 50, 3, True)["features"]
    given = features, offsets, label, rows, size, folds
    ratio, got = word_runs.crossed_ratios(*given, 4)
    assert (ratio.dtype, got.dtype, got.shape) == (np.float32, np.float32, (len(ids), 3))
    has = [set(features[a:b].ravel().tolist()) - {0} for a, b in itertools.pairwise(offsets)]

    def by_hand(counted):
        p, q = counts_by_hand(has, label, counted, size)
        own = np.log(p / q / (p[1:].sum() / q[1:].sum()))
        own[0] = 0
        return own

    np.testing.assert_allclose(ratio, by_hand(rows), rtol=1e-5, atol=1e-7)
    part = np.random.default_rng(4).permutation(len(rows)) % folds
    for n, (begin, end) in enumerate(itertools.pairwise(offsets)):
        counted = rows[part != part[list(rows).index(n)]] if n in rows else rows
        assert n not in counted or n not in rows
        want = by_hand(counted)[features[begin:end]]
        np.testing.assert_allclose(got[begin:end], want, rtol=1e-5, atol=1e-7)
    assert np.ptp(got, axis=0).min() > 0.5  # of words, pairs and triples
    _, others = word_runs.crossed_ratios(*given, 5)
    assert np.array_equal(got, others) == (folds == len(rows))  # each by itself, whatever the seed


def test_places_by_hand():
    lengths = [3, 0, 1, 50]
    got = word_runs.places(np.concatenate([[0], np.cumsum(lengths)]))
    want = [
        [math.exp(-t / 20), math.exp(-(n - 1 - t) / 20), t / n, math.log(n / 150)]
        for n in lengths
        for t in range(n)
    ]
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-7)
    assert (got.dtype, word_runs.places(np.zeros(1, int)).shape) == (np.float32, (0, 4))
