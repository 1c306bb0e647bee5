"""Model cards: intervals, calibration, groups, and the text."""

import json

import numpy as np
import pytest
from scipy import stats

from lstmjax import cards
from lstmjax.data import text

# ---- intervals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("correct", "count", "low", "high"),
    # Newcombe (1998), table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611),
     (1, 29, 0.0061, 0.1718)],
)  # fmt: skip
def test_wilson_as_published(correct, count, low, high):
    assert cards.wilson(correct, count) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize("level", [0.5, 0.95, 0.999])
def test_wilson_ends_where_the_score_test_does(level):
    """|k/n − p| = z √(p (1 − p)/n) at both ends, which are the roots of a quadratic."""
    z = stats.norm.ppf((1 + level) / 2)
    for correct, count in ((1, 2), (3, 7), (24_999, 25_000), (700, 1_000)):
        share = correct / count
        roots = np.roots([1 + z**2 / count, -2 * share - z**2 / count, share**2])
        assert cards.wilson(correct, count, level) == pytest.approx(sorted(roots), rel=1e-9)
        low, high = cards.wilson(count - correct, count, level)
        assert (1 - high, 1 - low) == pytest.approx(sorted(roots), rel=1e-9)
    assert cards.wilson(0, 9, level)[0] == 0 and cards.wilson(9, 9, level)[1] == 1


def test_wilson_of_what_is_no_share():
    for arguments, words in (
        ((0, 0), "count: got 0, expected at least 1"),
        ((5, 4), "correct: got 5, expected 0 to 4"),
        ((-1, 4), "correct: got -1, expected 0 to 4"),
        ((1, 4, 1.0), "level: got 1.0, expected 0 < level < 1"),
    ):
        with pytest.raises(ValueError, match=words):
            cards.wilson(*arguments)


# ---- calibration --------------------------------------------------------------------------------


def test_calibration_by_hand():
    confidence = np.array([0.55, 0.6, 0.61, 0.7, 0.95, 1.0])
    correct = np.array([1, 0, 1, 1, 0, 1], bool)
    error, bins = cards.calibration(confidence, correct)
    # In (0.5, 0.6] 1 of 2 at 0.575; in (0.6, 0.7] both at 0.655; in (0.9, 1] 1 of 2 at 0.975.
    assert error == pytest.approx((0.075 + 0.345 + 0.475) / 3, abs=1e-12)
    assert [(b["low"], b["high"], b["count"], b["correct"]) for b in bins] == [
        (0.5, 0.6, 2, 1), (0.6, 0.7, 2, 2), (0.9, 1.0, 2, 1)
    ]  # fmt: skip
    assert [b["confidence"] for b in bins] == pytest.approx([0.575, 0.655, 0.975], abs=1e-12)


def test_calibration_by_a_loop():
    draw = np.random.default_rng(0)
    confidence, correct = draw.uniform(size=500) ** 0.5, draw.uniform(size=500) < 0.6
    confidence[:10] = np.arange(1, 11) / 10  # an upper end belongs to its bin
    for bins in (1, 3, 10):
        expected = 0.0
        for m in range(1, bins + 1):
            own = [i for i, c in enumerate(confidence) if (m - 1) / bins < c <= m / bins]
            if own:
                right = sum(bool(correct[i]) for i in own) / len(own)
                mean = sum(confidence[i] for i in own) / len(own)
                expected += len(own) / 500 * abs(right - mean)
        error, found = cards.calibration(confidence, correct, bins)
        assert error == pytest.approx(expected, abs=1e-12) and error > 0.01
        assert sum(one["count"] for one in found) == 500
    sure = cards.calibration(np.array([1.0, 1.0, 0.0]), np.array([True, True, False]))
    assert sure[0] == 0 and [one["low"] for one in sure[1]] == [0, 0.9]


def test_calibration_of_nothing():
    with pytest.raises(ValueError, match=r"got \[0\] and \[0\], expected \[N\] twice, N at least"):
        cards.calibration(np.zeros(0), np.zeros(0, bool))
    with pytest.raises(ValueError, match=r"got \[3\] and \[1\]"):
        cards.calibration(np.zeros(3), np.zeros(1, bool))


# ---- groups -------------------------------------------------------------------------------------


def test_quartiles_by_hand():
    groups = cards.quartiles(np.array([80, 3, 1_200, 7, 5, 9, 40, 11]))
    assert [name for name, _ in groups] == ["3 to 5", "7 to 9", "11 to 40", "80 to 1,200"]
    assert [np.flatnonzero(own).tolist() for _, own in groups] == [[1, 4], [3, 5], [6, 7], [0, 2]]
    assert [name for name, _ in cards.quartiles(np.array([0.25, 0.5]), ".2f")] == [
        "0.25 to 0.25", "0.50 to 0.50"
    ]  # fmt: skip


def test_equal_values_stay_together():
    groups = cards.quartiles(np.array([5, 5, 5, 5, 5, 2, 9, 5]))
    assert [(name, own.sum()) for name, own in groups] == [("2 to 5", 7), ("9 to 9", 1)]
    draw = np.random.default_rng(0)
    for size in (1, 3, 50):
        values = draw.integers(0, 20, size)
        masks = np.array([own for _, own in cards.quartiles(values)])
        np.testing.assert_array_equal(masks.sum(axis=0), np.ones(size))  # each in one of them
        ends = [(values[own].min(), values[own].max()) for own in masks]
        assert all(a[1] < b[0] for a, b in zip(ends, ends[1:], strict=False))


@pytest.mark.parametrize(
    ("review", "expected"),
    [("I did NOT like it", True), ("Isn't it good?", True), ("it can’t be", True),
     ("nothing, nobody. Never!", True), ("a knot, noted by Norman: nt", False), ("", False),
     ("cannot", True), ("no-one", True), ("don t", False), ("without doubt", True)],
)  # fmt: skip
def test_negations(review, expected):
    assert cards.negated(text.words(review)) is expected


def test_confusions_by_hand():
    label = np.array([4, 4, 4, 9, 9, 1, 1, 7, 0])
    predicted = np.array([9, 9, 4, 4, 4, 7, 1, 1, 0])
    found = cards.confusions(label, predicted, 3)
    assert [tuple(pair.values()) for pair in found] == [(4, 9, 2, 3), (9, 4, 2, 2), (1, 7, 1, 2)]
    assert list(found[0]) == ["label", "predicted", "wrong", "count"]
    assert cards.confusions(label, label) == []


# ---- a card -------------------------------------------------------------------------------------


def scored():
    label = np.array([0, 0, 1, 2, 2, 2])
    predicted = np.array([0, 1, 1, 2, 0, 0])
    probabilities = np.full((6, 3), 0.1)
    probabilities[np.arange(6), predicted] = 0.8
    groups = {"size": [("small", label < 2), ("large", label == 2), ("none", label > 2)]}
    return cards.Scored(label, probabilities, ("a", "b", "c"), groups)


def test_the_numbers_of_a_card():
    measured = cards.measure(scored())
    assert (measured["count"], measured["correct"]) == (6, 3)
    assert measured["groups"] == {
        "size": [
            {"name": "small", "count": 3, "correct": 2},
            {"name": "large", "count": 3, "correct": 1},
        ]
    }
    assert measured["ece"] == pytest.approx(0.3, abs=1e-12)  # 0.5 right at a confidence of 0.8
    assert measured["confusions"] == [
        {"label": 2, "predicted": 0, "wrong": 2, "count": 3},
        {"label": 0, "predicted": 1, "wrong": 1, "count": 2},
    ]
    assert json.loads(json.dumps(measured)) == measured


def test_the_text_of_a_card():
    about = cards.Text("Does it.", "things", "Use.", ["One.", "Two."], "python do.py")
    facts = {"Model": {"file": "a|b\nc"}}
    made = cards.card("m", about, facts, "One run.", scored().classes, cards.measure(scored()))
    lines = made.splitlines()
    for line in (
        "# Model card: m",
        "| file | a\\|b c |",
        "Test accuracy **0.5000** (3 of 6 things, 95 % interval 0.1876 to 0.8124). One run.",
        "| size | things | accuracy | 95 % interval |",
        "| small | 3 | 0.6667 | 0.2077 to 0.9385 |",
        "| c as a | 2 of 3 | 0.6667 | 0.2077 to 0.9385 |",
        "Expected calibration error in 10 bins of equal width: **0.3000**. Confidence is the "
        "probability of the class that was predicted.",
        "| 0.7 to 0.8 | 6 | 0.8000 | 0.5000 | 0.1876 to 0.8124 |",
        "- Two.",
        "    python do.py",
    ):
        assert line in lines, line
    two = cards.tables(cards.measure(scored()), ("a", "b"), "x")
    assert " as " not in two  # of two classes, the classes say the same
