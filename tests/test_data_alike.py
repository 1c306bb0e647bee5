"""Reviews with rare words in common, against dictionaries, and hold-outs of whole groups."""

import math
from collections import Counter

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from lstmjax.data import alike, reviews


def flat(documents):
    offsets = np.concatenate([[0], np.cumsum([len(one) for one in documents])])
    return np.array([word for one in documents for word in one], np.int32), offsets


def similarity_by_hand(documents):
    """s(m, n) of every two documents, from their counts."""
    counts = [Counter(word for word in one if word > 3) for one in documents]
    has = Counter(word for count in counts for word in count)
    x = [
        {w: (1 + math.log(k)) * math.log(len(documents) / has[w]) for w, k in count.items()}
        for count in counts
    ]
    length = [math.sqrt(sum(v * v for v in one.values())) or 1.0 for one in x]
    found = np.zeros((len(documents), len(documents)))
    for m in range(len(documents)):
        for n in range(m + 1, len(documents)):
            rare = [w for w in x[m].keys() & x[n].keys() if has[w] <= alike.RARE]
            found[m, n] = sum(x[m][w] * x[n][w] for w in rare) / (length[m] * length[n])
    return found


def test_similarities_by_hand():
    draw = np.random.default_rng(3)
    # Ids 1 to 3 are no words, 4 and 5 are in too many reviews to be rare, and 6 is in every one.
    documents = [
        [6, *draw.choice(np.arange(1, 60), 12, p=[0.02] * 3 + [0.2] * 2 + [0.54 / 54] * 54)]
        for _ in range(100)
    ] + [[], [2, 3]]
    documents = [one if n > 99 else [*one, 4] if n < 70 else one for n, one in enumerate(documents)]
    got = alike.similarities(*flat(documents))
    want = similarity_by_hand(documents)
    np.testing.assert_allclose(got.toarray(), want, rtol=0, atol=1e-12)
    assert want.max() > 0.3 and (want > 0).mean() > 0.05
    assert sum(4 in one for one in documents) > alike.RARE  # or nothing would be left out


def test_the_most_similar_are_put_together_first(monkeypatch):
    film = lambda name, size: [[4, 5, name, name + 1] for _ in range(size)]  # noqa: E731
    others = [[4, 5] for _ in range(70)]  # these two words are in more than RARE reviews
    documents = film(40, 3) + others + film(50, 2) + [[4, 5, 40, 41, 50]]
    group = alike.groups(*flat(documents))
    assert len(set(group[[0, 1, 2, 73, 74, 75]])) == 1  # by way of the last one
    assert len(set(group)) == 1 + 70
    monkeypatch.setattr(alike, "MOST", 4)
    group = alike.groups(*flat(documents))
    assert group[0] == group[1] == group[2] == group[75] != group[73] == group[74]
    monkeypatch.setattr(alike, "MOST", 2)
    group = alike.groups(*flat(documents))
    assert np.bincount(group).max() == 2
    assert len(set(group[:3])) == 2
    monkeypatch.setattr(alike, "LEAST", 2.0)
    assert alike.groups(*flat(documents)).tolist() == list(range(len(documents)))


@hypothesis.given(
    st.lists(st.integers(1, 6), min_size=1, max_size=12), st.integers(0, 40), st.integers(0, 3)
)
def test_whole_groups_are_held_out(sizes, size, seed):
    group = np.random.default_rng(1).permutation(np.arange(len(sizes)).repeat(sizes))
    size = min(size, len(group) - 1)
    held = alike.held_out(group, size, seed)
    assert (held.dtype, held.shape, held.sum()) == (bool, group.shape, size)
    parted = [n for n in range(len(sizes)) if 0 < held[group == n].sum() < sizes[n]]
    assert len(parted) <= 1
    if parted:  # none that is held out by no review would have fitted
        left = size - sum(sizes[n] for n in range(len(sizes)) if held[group == n].all())
        assert all(sizes[n] > left for n in range(len(sizes)) if not held[group == n].all())
    np.testing.assert_array_equal(held, alike.held_out(group, size, seed))


def test_the_seed_draws_other_groups():
    group = np.arange(40).repeat(3)
    assert len({alike.held_out(group, 30, seed).tobytes() for seed in range(5)}) == 5


@pytest.mark.parametrize("how", ["random", "alike"])
def test_rows_to_train_on_and_held_out(how):
    documents = [[4, 5, 10 + n // 4, 10 + n // 4] for n in range(80)]
    ids, offsets = flat(documents)
    fields = {"ids": ids, "offsets": offsets, "label": np.zeros(80, np.int32)}
    rows, held = reviews.held_out(fields, 20, 7, how)
    assert np.array_equal(np.sort(np.concatenate([rows, held])), np.arange(80)) and len(held) == 20
    assert np.array_equal(held, np.sort(held)) and np.array_equal(rows, np.sort(rows))
    films = set((rows // 4).tolist()) & set((held // 4).tolist())
    assert (len(films) == 0) == (how == "alike")


def test_the_numbers_of_the_published_hold_out():
    assert (alike.RARE, alike.LEAST, alike.MOST) == (60, 0.06, 30)
