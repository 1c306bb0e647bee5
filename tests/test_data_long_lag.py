"""lstmjax.data.long_lag: targets worked out again from the inputs, and the laws of the draws."""

import math

import numpy as np
import pytest

from lstmjax.data import long_lag

MANY = 6_000
TASKS = {
    "adding": (long_lag.adding, {"length": 25}),
    "adding_hs": (long_lag.adding_hs, {"length": 40}),
    "order": (long_lag.temporal_order, {}),
    "order 3": (long_lag.temporal_order, {"symbols": 3}),
    "copy": (long_lag.copy_memory, {"length": 12}),
}


@pytest.fixture(params=list(TASKS))
def task(request):
    draw, options = TASKS[request.param]
    return lambda *at, batch_size=8, **changes: draw(
        *at, batch_size=batch_size, **options | changes
    )


def test_a_batch_depends_on_split_seed_and_index_alone(task):
    base = task(3, 5)
    again = task(3, 5, split="train")
    for name, array in base.items():
        np.testing.assert_array_equal(array, again[name])
    others = [task(5, 3), task(3, 6), task(4, 5), task(3, 5, split="validation")]
    others.append(task(3, 5, split="test"))
    found = {batch["x"].tobytes() for batch in [base, *others]}
    assert len(found) == 6


def test_wrong_arguments_are_named(task):
    for at, changes, name in [
        ((-1, 0), {}, "seed"), ((0, 1.5), {}, "index"), ((0, 0), {"batch_size": 0}, "batch_size"),
        ((0, 0), {"split": "dev"}, "split"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=f"^{name}: got .*, expected "):
            task(*at, **changes)


@pytest.mark.parametrize(
    ("draw", "wrong"),
    [
        (long_lag.adding, {"length": 1}), (long_lag.adding_hs, {"length": 19}),
        (long_lag.copy_memory, {"length": 0}), (long_lag.temporal_order, {"symbols": 4}),
    ],
)  # fmt: skip
def test_wrong_lengths_are_named(draw, wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"^{name}: got {wrong[name]}, expected an integer"):
        draw(0, 0, batch_size=2, **wrong)


def even(counts, kinds, sigmas=5):
    """Whether counts of ``kinds`` equally likely events are as far apart as chance has them."""
    counts, total = np.asarray(counts), np.sum(counts)
    spread = math.sqrt(total / kinds * (1 - 1 / kinds))
    return len(counts) == kinds and np.all(np.abs(counts - total / kinds) < sigmas * spread)


# ---- adding -------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [2, 25, 30])
def test_adding_marks_one_value_in_each_half_and_asks_for_their_sum(length):
    batch = long_lag.adding(1, 2, batch_size=50, length=length)
    assert batch["x"].shape == (50, length, 2) and batch["y"].shape == (50, 1)
    assert batch["x"].dtype == batch["y"].dtype == np.float32
    assert batch["x"].min() >= 0 and batch["x"].max() <= 1
    for row, answer in zip(batch["x"], batch["y"][:, 0], strict=True):
        (first, second) = np.flatnonzero(row[:, 1])
        assert first < length // 2 <= second
        assert row[first, 1] == row[second, 1] == 1
        assert answer == pytest.approx(float(row[first, 0]) + float(row[second, 0]), abs=1e-6)


def test_adding_is_uniform_in_values_and_places():
    batch = long_lag.adding(0, 0, batch_size=MANY, length=8)
    values, markers = np.moveaxis(batch["x"], -1, 0)
    assert even(np.histogram(values, 10, (0, 1))[0], 10)
    assert even(markers[:, :4].sum(axis=0), 4) and even(markers[:, 4:].sum(axis=0), 4)
    # Always answering 1 has the mean squared error 1/6: two variances of 1/12.
    assert np.mean((batch["y"] - 1) ** 2) == pytest.approx(1 / 6, rel=0.06)


@pytest.mark.parametrize("length", [20, 47, 100])
def test_adding_hs_is_what_the_paper_says(length):
    longest = math.floor(1.1 * length)
    batch = long_lag.adding_hs(1, 2, batch_size=400, length=length)
    assert batch["x"].shape == (400, longest, 2) and batch["x"].dtype == np.float32
    assert batch["y"].shape == (400, 1) and batch["y"].dtype == np.float32
    assert batch["lengths"].dtype == np.int32
    assert set(batch["lengths"]) == set(range(length, longest + 1))
    assert batch["x"].min() >= -1 and batch["x"].max() <= 1
    starts = 0
    for row, answer, end in zip(batch["x"], batch["y"][:, 0], batch["lengths"], strict=True):
        values, markers = row[:, 0].astype(np.float64), row[:, 1]
        assert np.all(row[end:] == 0) and np.all(values[:end] != 0)
        assert markers[0] == markers[end - 1] == -1
        marked = np.flatnonzero(markers == 1)
        assert set(markers[1 : end - 1]) <= {0, 1} and np.all(marked < length // 2)
        # Either both, at least one of them among the first ten, or the first pair was one of them.
        assert len(marked) in (1, 2)
        assert len(marked) == 1 or marked[0] < 10
        starts += len(marked) == 1
        assert answer == pytest.approx(0.5 + np.sum(values[marked]) / 4, abs=1e-6)
        assert 0 <= answer <= 1
    left = 0.1 + 0.9 / (length // 2 - 1)  # the first pair as X₁, or as X₂
    assert abs(starts / 400 - left) < 5 * math.sqrt(left * (1 - left) / 400)


def test_adding_hs_is_uniform_in_lengths_values_and_places():
    batch = long_lag.adding_hs(0, 0, batch_size=MANY, length=40)
    values, markers = np.moveaxis(batch["x"], -1, 0)
    assert even(np.unique(batch["lengths"], return_counts=True)[1], 5)
    assert even(np.histogram(values[:, :40], 10, (-1, 1))[0], 10)
    places = np.mean(markers == 1, axis=0)
    # X₁ is at each of the first ten with 1/10, X₂ at each of the others with 1/(T/2 − 1).
    assert np.abs(places[1:10] - (0.1 + 0.9 / 19)).max() < 5 * math.sqrt(0.13 / MANY)
    assert np.abs(places[10:20] - 1 / 19).max() < 5 * math.sqrt(0.05 / MANY)
    assert np.all(places[20:] == 0)


@pytest.mark.parametrize("length", [20, 100])
def test_adding_hs_baseline_is_the_variance_of_the_target(length):
    answers = long_lag.adding_hs(7, 0, batch_size=60_000, length=length)["y"]
    error = np.mean((answers.astype(np.float64) - 0.5) ** 2)
    assert long_lag.adding_hs_baseline(length) == pytest.approx(error, rel=0.02)
    assert long_lag.adding_hs_baseline(length) < 1 / 24


# ---- temporal order -----------------------------------------------------------------------------

PLACES = {2: [(10, 20), (50, 60)], 3: [(10, 20), (33, 43), (66, 76)]}


@pytest.mark.parametrize("symbols", [2, 3])
def test_temporal_order_is_what_the_paper_says(symbols):
    batch = long_lag.temporal_order(1, 2, batch_size=MANY, symbols=symbols)
    assert {a.dtype for a in batch.values()} == {np.dtype(np.int32)}
    assert batch["x"].shape == (MANY, 110) and batch["y"].shape == (MANY,)
    spelt = np.array([*long_lag.SYMBOLS, " "])[batch["x"]]
    classes = ["XX", "XY", "YX", "YY"]
    classes = classes if symbols == 2 else [one + two for one in "XY" for two in classes]
    where = [[] for _ in range(symbols)]
    for row, label, end in zip(spelt, batch["y"], batch["lengths"], strict=True):
        text = "".join(row)
        assert text[end:] == " " * (110 - end) and " " not in text[:end]
        assert text[0] == "E" and text[end - 1] == "B"
        inside = text[1 : end - 1]
        assert set(inside) <= set("abcdXY")
        assert "".join(c for c in inside if c in "XY") == classes[label]
        for places, place in zip(where, np.flatnonzero(np.isin(row, ["X", "Y"])), strict=True):
            places.append(place + 1)  # the paper counts from 1
    for places, (low, high) in zip(where, PLACES[symbols], strict=True):
        assert (min(places), max(places)) == (low, high)
        assert even(np.unique(places, return_counts=True)[1], 11)
    assert even(np.unique(batch["lengths"], return_counts=True)[1], 11)
    assert even(np.bincount(batch["y"]), 2**symbols)
    assert even([np.sum(spelt == letter) for letter in "abcd"], 4)


# ---- copying ------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 12])
def test_copy_asks_for_the_first_ten_symbols_at_the_end(length):
    batch = long_lag.copy_memory(1, 2, batch_size=30, length=length)
    assert batch["x"].shape == batch["y"].shape == (30, length + 20)
    assert batch["x"].dtype == batch["y"].dtype == np.int32
    for seen, asked in zip(batch["x"].tolist(), batch["y"].tolist(), strict=True):
        symbols = seen[:10]
        assert set(symbols) <= set(range(1, 9))
        assert seen == symbols + [0] * (length - 1) + [9] + [0] * 10
        assert asked == [0] * (length + 10) + symbols


def test_copied_symbols_are_uniform():
    symbols = long_lag.copy_memory(0, 0, batch_size=MANY, length=1)["x"][:, :10]
    for place in symbols.T:
        assert even(np.bincount(place, minlength=9)[1:], 8)
    pairs = 8 * (symbols[:, 3] - 1) + symbols[:, 4] - 1
    assert even(np.bincount(pairs, minlength=64), 64)
