"""Whole reviews: their ids, chops, batches and pairs, against plain loops and dictionaries."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from lstmjax.data import chops, ngrams, reviews

TEXTS = {
    "train": ["A good film, a very good film!", "", "bad; not good", "good bad", "so good, so bad"],
    "test": ["unheard of, but good", "", "not bad"],
}
LABELS = {"train": np.array([1, 0, 0, 1, 1], np.int32), "test": np.array([1, 0, 1], np.int32)}


@pytest.fixture
def texts(monkeypatch):
    """`TEXTS` in the place of the offline reviews."""
    monkeypatch.setattr(
        ngrams.offline, "reviews", lambda: {split: (TEXTS[split], LABELS[split]) for split in TEXTS}
    )


# ---- ids ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", ["punctuation", "words"])
@pytest.mark.parametrize(("size", "length"), [(30, 100), (8, 100), (9, 4)])
def test_ids_are_ranks_by_frequency(texts, tokens, size, length):
    count, order = {}, []
    for one in TEXTS["train"]:
        for token in ngrams.TOKENS[tokens](one):
            count[token] = count.get(token, 0) + 1
            order.append(token)
    ranked = sorted(count, key=lambda token: (-count[token], order.index(token)))[: size - 4]
    id_of = {token: 4 + rank for rank, token in enumerate(ranked)}
    data = reviews.load("offline", tokens=tokens, vocabulary_size=size, max_length=length)
    assert data.vocabulary == ("<unused>", *ranked)
    for split, fields in data.splits.items():
        np.testing.assert_array_equal(fields["label"], LABELS[split])
        assert (fields["ids"].dtype, fields["offsets"].dtype) == (np.int32, np.int64)
        for n, one in enumerate(TEXTS[split]):
            want = [1, *(id_of.get(token, 2) for token in ngrams.TOKENS[tokens](one))][-length:]
            got = fields["ids"][fields["offsets"][n] : fields["offsets"][n + 1]]
            assert got.tolist() == want
    assert data.splits["train"]["ids"].max() < size and 2 in data.splits["test"]["ids"]


def test_the_first_reviews_have_a_vocabulary_of_their_own(texts):
    data = reviews.load("offline", limit=1)
    assert data.vocabulary == ("<unused>", "a", "good", "film", ",", "very", "!")
    assert [len(fields["label"]) for fields in data.splits.values()] == [1, 1]


MORE = ["very good, unheard of", "", "a bad film"]


def test_reviews_without_labels_are_trained_on_and_counted_nowhere(texts, monkeypatch):
    """Neither the vocabulary nor pairs, ratios or frequencies are theirs."""
    monkeypatch.setattr(ngrams.offline, "unlabelled", lambda: MORE)
    plain, data = reviews.load("offline"), reviews.load("offline", unlabelled=True)
    assert data.vocabulary == plain.vocabulary and data.sha256 != plain.sha256
    assert sorted(data.splits) == ["test", "train", "unlabelled"]
    fields = data.splits["unlabelled"]
    assert fields["label"].tolist() == [-1, -1, -1] and fields["label"].dtype == np.int32
    known = {word: number + 3 for number, word in enumerate(data.vocabulary)}
    for n, one in enumerate(MORE):
        want = [1, *(known.get(token, 2) for token in ngrams.TOKENS["punctuation"](one))]
        assert fields["ids"][slice(*fields["offsets"][n : n + 2])].tolist() == want

    options = {"validation_size": 2, "seed": 1, "vocabulary_size": 30, "chop": 3}
    options |= {"frequency": True, "pairs": "input", "pairs_size": 9}
    (with_more, count), (without, same) = (
        reviews.parts(found, **options) for found in (data, plain)
    )
    assert count == same > 0
    own, other = with_more["train"], without["train"]
    assert own.rows.tolist() == [*other.rows, 5, 6, 7]
    np.testing.assert_array_equal(own.arrays["frequency"], other.arrays["frequency"])
    assert own.arrays["labelled_share"] == np.float32(3 / 6)
    assert own.arrays["label"].tolist() == [*LABELS["train"], -1, -1, -1]
    for row, expected in ((5, fields["ids"][:6]), (7, fields["ids"][7:])):
        places = np.concatenate(
            [
                np.arange(own.cut.begin[k], own.cut.begin[k] + own.cut.length[k])
                for k in range(own.cut.first[row], own.cut.first[row + 1])
            ]
        )
        assert own.arrays["ids"][places].tolist() == expected.tolist()
    assert with_more["validation"].rows.tolist() == without["validation"].rows.tolist()
    assert "labelled_share" not in with_more["test"].arrays


def test_the_offline_reviews_without_labels_are_others():
    found = ngrams.offline.unlabelled()
    labelled = ngrams.offline.reviews({"train": 500})["train"][0]
    assert len(found) == 10_000 and len(set(found)) > 9_000
    assert not set(found) & set(labelled)


def test_what_is_held_out_is_drawn_by_the_seed():
    some = lambda count: {"label": np.zeros(count)}  # noqa: E731
    rows, held = reviews.held_out(some(20), 6, seed=3)
    assert len(held) == 6 and sorted([*rows, *held]) == list(range(20))
    assert held.tolist() == sorted(np.random.default_rng(3).permutation(20)[:6])
    assert (np.diff(rows) > 0).all()
    assert not np.array_equal(held, reviews.held_out(some(20), 6, seed=4)[1])
    assert reviews.held_out(some(5), 0, seed=0)[0].tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="validation_size: got 5, expected an integer from 0 to 4"):
        reviews.held_out(some(5), 5, seed=0)


# ---- chops --------------------------------------------------------------------------------------

LENGTHS = [7, 1, 23, 10, 11, 4, 30, 2, 9, 15, 16, 5]
OFFSETS = np.concatenate([[0], np.cumsum(LENGTHS)])


@pytest.mark.parametrize("chop", [0, 1, 5, 10, 100])
def test_segments_are_as_equal_as_possible(chop):
    cut = chops.segments(OFFSETS, chop)
    for n, length in enumerate(LENGTHS):
        own = slice(cut.first[n], cut.first[n + 1])
        lengths, begins = cut.length[own].tolist(), cut.begin[own].tolist()
        assert len(lengths) == (-(-length // chop) if chop else 1)
        assert max(lengths) - min(lengths) <= 1 and sorted(lengths, reverse=True) == lengths
        places = [b + t for b, m in zip(begins, lengths, strict=True) for t in range(m)]
        assert places == list(range(OFFSETS[n], OFFSETS[n + 1]))
    assert chops.tokens(cut, np.array([2, 0, 6])) == 23 + 7 + 30
    with pytest.raises(ValueError, match="chop: got -1, expected an integer of 0 or more"):
        chops.segments(OFFSETS, -1)


# ---- batches ------------------------------------------------------------------------------------


def batches_by_loop(sizes, rows, capacity):
    """The reviews of each batch."""
    found, room = [[]], capacity
    for row in rows:
        if sizes[row] > room:
            found.append([])
            room = capacity
        found[-1].append(int(row))
        room -= sizes[row]
    return found


def shares_by_loop(batch, sizes, devices):
    """The reviews of each device, in the batch's order."""
    load, own = [0] * devices, [[] for _ in range(devices)]
    for row in sorted(batch, key=lambda row: -sizes[row]):
        least = load.index(min(load))
        own[least].append(row)
        load[least] += sizes[row]
    return [sorted(part, key=batch.index) for part in own]


def check_plan(rows, chop, capacity, devices, spare):
    """Reads a plan back, segment by segment."""
    cut = chops.segments(OFFSETS, chop)
    sizes = np.diff(cut.first)
    packed = chops.pack(cut, rows, capacity, devices)
    wide = chops.width([packed]) + spare
    plan = chops.lay_out(cut, packed, wide)
    want = batches_by_loop(sizes, rows, capacity)
    assert all(array.shape == (len(want), devices * wide) for array in plan.values())
    loads = []
    for k, batch in enumerate(want):
        assert packed.rows[packed.batch == k].tolist() == batch
        shares = shares_by_loop(batch, sizes, devices)
        for d, share in enumerate(shares):
            part = {name: array[k, d * wide : (d + 1) * wide] for name, array in plan.items()}
            assert part["rows"][: len(share)].tolist() == share
            assert part["weight"].tolist() == [1.0] * len(share) + [0.0] * (wide - len(share))
            segments, places = [], {row: [] for row in share}
            for begin, length, slot in zip(
                part["begin"], part["length"], part["slot"], strict=True
            ):
                segments.append(int(slot))
                if slot < wide:
                    assert 1 <= length <= (chop or 30)
                    places[share[slot]] += range(begin, begin + length)
                else:
                    assert (length, slot) == (0, wide)
            loads.append(sum(sizes[row] for row in share))
            assert segments == sorted(segments)  # in front, review by review
            for row, found in places.items():
                assert found == list(range(OFFSETS[row], OFFSETS[row + 1]))
    assert packed.load.ravel().tolist() == loads and max(loads) + spare == wide
    counted = plan["rows"][plan["weight"] > 0]
    assert sorted(counted.tolist()) == sorted(int(row) for row in rows)
    return plan


@pytest.mark.parametrize("devices", [1, 2, 3])
@pytest.mark.parametrize(("chop", "capacity"), [(5, 6), (5, 8), (4, 20), (0, 3), (5, 500)])
def test_a_plan_read_back(chop, capacity, devices):
    rows = chops.order(np.arange(1, 12), seed=4, epoch=2)
    plan = check_plan(rows, chop, capacity, devices, spare=0)
    if devices == 1 and capacity < 500:
        assert plan["length"].shape[1] <= capacity


@hypothesis.given(
    st.permutations(range(12)).flatmap(lambda p: st.integers(1, 12).map(lambda n: p[:n])),
    st.integers(0, 12),
    st.integers(30, 60),
    st.integers(1, 4),
    st.integers(0, 2),
)
def test_any_plan_read_back(rows, chop, capacity, devices, spare):
    check_plan(np.array(rows), chop, capacity, devices, spare)


def test_a_batch_is_the_same_on_any_number_of_devices():
    cut, rows = chops.segments(OFFSETS, 5), chops.order(np.arange(12), seed=1, epoch=1)
    batches = []
    for devices in (1, 2, 3):
        packed = chops.pack(cut, rows, 9, devices)
        plan = chops.lay_out(cut, packed, chops.width([packed]))
        batches.append(
            [sorted(r[w > 0]) for r, w in zip(plan["rows"], plan["weight"], strict=True)]
        )
    assert batches[0] == batches[1] == batches[2] and len(batches[0]) > 2


def test_the_order_is_that_of_seed_and_epoch():
    rows = np.array([3, 5, 8, 9, 11, 20])
    got = [chops.order(rows, seed=seed, epoch=epoch) for seed, epoch in ((1, 1), (1, 2), (2, 1))]
    for own in got:
        assert sorted(own) == rows.tolist()
    assert len({tuple(own) for own in got}) == 3
    assert np.array_equal(got[0], rows[np.random.default_rng([1, 1]).permutation(6)])


def test_pieces_have_two_shapes_at_most():
    plan = {"rows": np.arange(14).reshape(7, 2), "weight": np.ones((7, 2))}
    found = chops.pieces(plan, 3)
    assert [len(piece["rows"]) for piece in found] == [3, 3, 1]
    np.testing.assert_array_equal(np.concatenate([p["rows"] for p in found]), plan["rows"])
    assert [len(piece["rows"]) for piece in chops.pieces(plan, 4)] == [4, 1, 1, 1]
    assert [len(piece["weight"]) for piece in chops.pieces(plan, 8)] == [1] * 7


def test_what_does_not_fit_is_named():
    cut = chops.segments(OFFSETS, 5)
    with pytest.raises(ValueError, match="capacity: got 5, expected at least 6"):
        chops.pack(cut, np.arange(12), 5)
    with pytest.raises(ValueError, match="rows: got no reviews, expected 1 or more"):
        chops.pack(cut, np.arange(0), 5)
    packed = chops.pack(cut, np.arange(12), 8)
    with pytest.raises(ValueError, match="width: got 7, expected at least 8"):
        chops.lay_out(cut, packed, 7)
