"""What `predict` of experiments/reviews.py is given: any text, and any folder for a run."""

import re
import sys
import tracemalloc
from itertools import repeat

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from tiny_reviews import read, write_run
from tiny_reviews import with_settings as settings

from lstmjax import whole_reviewer
from lstmjax.data import long_text, ngrams
from lstmjax.records import RunError

# ---- tokens, piece by piece ---------------------------------------------------------------------

ODD = st.lists(
    st.sampled_from(
        ["<br />", "<BR />", "<br", "/>", "<", " ", " ", "a", "Σ", "ΑΣ", "İ", ".", ",", '"', "(",
         ":", "'", "\n", "\x1c", "\xa0", "\u3000", "\u0301", "\u00ad", "😀", "\0"]
    ),
    max_size=40,
).map("".join)  # fmt: skip


@given(whole=ODD, cuts=st.lists(st.integers(0, 90), max_size=5), count=st.integers(1, 9))
def test_pieces_give_the_tokens_of_the_whole(whole, cuts, count):
    places = [0, *sorted(cuts), len(whole)]
    pieces = [whole[a:b] for a, b in zip(places, places[1:], strict=False)]
    tokens = ngrams.with_punctuation(whole)
    for given_as in (pieces, list(whole)):
        got = long_text.words_at_end(given_as, count, tokens="punctuation")
        assert got == tokens[-count:]
        got = long_text.words_at_end(given_as, count, "post", tokens="punctuation")
        assert got == tokens[:count]


def test_no_break_comes_of_what_is_left_of_others():
    whole = "a<br<br />/>b <BR /><br /> c<bR"
    want = ["a<br", "/>b", "c<br"]
    assert ngrams.with_punctuation(whole) == want
    for pieces in (list(whole), [whole], [whole[:7], whole[7:]]):
        assert long_text.words_at_end(pieces, 9, tokens="punctuation") == want
    for letter in "br":
        found = [c for c in map(chr, range(sys.maxunicode + 1)) if letter in c.lower()]
        assert found == [letter.upper(), letter]


def test_every_mark_and_blank_is_a_place_to_cut_or_is_known_not_to_be():
    kind = long_text._KINDS["punctuation"]
    ends = [c for c in map(chr, range(sys.maxunicode + 1)) if re.match(r'[\s.,"()!?;:]', c)]
    assert sorted(kind.blanks + kind.looked_across) == ends

    def words(text):
        return [token for token in ngrams.with_punctuation(text) if token not in ends]

    for end in ends:  # Σ ends a word as ς, also where what follows is no letter
        apart, together = words("ΑΣ") + words("Α"), words(f"ΑΣ{end}Α")
        assert (apart == together) == (end in kind.blanks), end


def test_tokens_without_an_end_are_cut_off(monkeypatch):
    monkeypatch.setattr(long_text, "PIECE", 50)
    whole = f"good. film {'x' * 500}, bad. end"
    got = long_text.words_at_end([whole[:70], whole[70:]], 9, tokens="punctuation")
    assert [t if len(t) < 50 else None for t in got] == [
        "good", ".", "film", None, ",", "bad", ".", "end"
    ]  # fmt: skip
    assert long_text.words_at_end(["a." * 300], 999, tokens="punctuation") == ["a", "."] * 300


@pytest.mark.parametrize("piece", ["a film, " * 2**10, "Σ😀.<br />" * 2**10, "x<br" * 2**11])
def test_memory_does_not_grow_with_the_text(piece, monkeypatch):
    monkeypatch.setattr(long_text, "PIECE", 2**13)
    peaks = []
    for count in (8, 64):
        tracemalloc.start()
        long_text.words_at_end(repeat(piece, count), 80, tokens="punctuation")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0] and peaks[1] < 2**21, peaks


# ---- any folder ---------------------------------------------------------------------------------


def features(**changes):
    """Other arrays; None takes one away."""

    def change(folder):
        with np.load(folder / "features.npz") as there:
            arrays = dict(there) | changes
        np.savez(folder / "features.npz", **{n: a for n, a in arrays.items() if a is not None})

    return change


def of_three(*codes):
    """Pairs and triples to the base of 20."""

    def change(folder):
        settings(path_order=3)(folder)
        features(known=np.array(codes), ratio=np.zeros(20 + len(codes), "f4"))(folder)

    return change


def replaced(name, content):
    return lambda folder: (folder / name).write_bytes(content)


RATIO, SHARES = np.zeros(25, "f4"), np.full(20, 0.05, "f4")
BAD = {
    "task": (settings(task="language", pairs="none"), "is a run of --task language, expected sent"),
    "size": (settings(hidden_size=2**31 - 1), "hidden_size is 2147483647, expected at most"),
    "words": (settings(vocabulary_size=2**30), "vocabulary_size is 1073741824, expected at most"),
    "vector": (settings(embedding_size=2**31 - 1), "embedding_size is 2147483647, expected at mo"),
    "steps": (settings(max_length=2**31 - 1), "max_length is 2147483647, expected at most 100000"),
    "other size": (settings(hidden_size=4), "expected float32"),
    "fewer words": (settings(vocabulary_size=18), "features.npz: frequency is float32[20], "),
    "chop": (settings(chop=-1), "is damaged: --chop: got -1, expected an integer of at least 0"),
    "segments": (settings(batch_segments=0), "--batch-segments: got 0, expected an integer of at"),
    "cell": (settings(cell="gru"), "cell is 'gru'"),
    "other cell": (settings(cell="cifg"), "expected float32"),
    "no vectors": (settings(normalise_embeddings=False), "frequency is float32[20], expected noth"),
    "gates": (settings(embedding="gates"), "expected none with --embedding gates"),
    "kind": (settings(hidden_size="3"), "hidden_size is '3'"),
    "unknown": (settings(hidden=2), "has the setting hidden, unknown here"),
    "bias": (settings(forget_bias="chrono:0"), "chrono:T with T >= 2"),
    "pairs": (settings(pairs="input"), "features.npz: ratio is float32[25], expected nothing"),
    "ratios": (settings(pairs="none", ratio_inputs=True), "expected float32["),
    "none": (settings(pairs="none"), "features.npz: known is int64[5], expected nothing"),
    "no json": (replaced("config.json", b"\xff"), "config.json is damaged"),
    "no features": (lambda folder: (folder / "features.npz").unlink(), "cannot read"),
    "cut off": (replaced("features.npz", b"PK\3\4"), "is damaged: features.npz: File is not a zip"),
    "text": (replaced("features.npz", b"good"), "is damaged: features.npz"),
    "no known": (features(known=None), "features.npz: known is nothing, expected int64[0]"),
    "no ratio": (features(ratio=None), "features.npz: ratio is nothing, expected float32[25]"),
    "more": (features(more=SHARES), "features.npz: more is float32[20], expected nothing"),
    "wider": (features(ratio=RATIO.astype("f8")), "features.npz: ratio is float64[25], expected f"),
    "longer": (features(known=np.arange(80, 90)), "features.npz: ratio is float32[25], expected f"),
    "square": (features(known=np.full((5, 1), 90)), "known is int64[5, 1], expected int64[5]"),
    "order": (features(known=np.array([85, 84, 86, 87, 88])), "known holds something else than r"),
    "twice": (features(known=np.array([84, 84, 86, 87, 88])), "known holds something else than r"),
    "START": (features(known=np.array([81, 84, 86, 87, 88])), "known holds something else than r"),
    "negative": (features(known=np.array([-9, 84, 86, 87, 88])), "known holds something else th"),
    "outside": (features(known=np.array([84, 85, 86, 87, 404])), "known holds something else th"),
    "triples": (features(known=np.array([84, 85, 86, 87, 1684])), "known holds something else th"),
    "order 4": (settings(path_order=4), "is damaged: path_order is 4"),
    "quadruple": (of_three(84, 1684, 32000 + 1684), "known holds something else than runs in asc"),
    "START in a triple": (of_three(84, 1684, 1600 + 24), "known holds something else than runs in"),
    "no word second": (of_three(84, 1684, 1600 + 4), "known holds something else than runs"),
    "nan": (features(ratio=RATIO + np.float32(np.nan)), "ratio holds what it cannot be"),
    "padding": (features(ratio=RATIO + np.float32(1)), "ratio of no feature is not 0"),
    "shares": (features(frequency=-SHARES), "frequency holds what it cannot be"),
    "endless": (features(frequency=SHARES + np.float32(np.inf)), "frequency holds what it cannot"),
    "object": (features(ratio=np.array([{}], object)), "features.npz: an array of object, expect"),
    "vocabulary": (replaced("vocabulary.txt", b"\xff\xfe"), "is damaged: 'utf-8' codec"),
    "many words": (replaced("vocabulary.txt", b"<unused>" + b"\na" * 17), "has 18 lines, expected"),
    "other first": (replaced("vocabulary.txt", b"the\na"), "has 2 lines, expected <unused> first"),
    "no words": (lambda folder: (folder / "vocabulary.txt").unlink(), "cannot read"),
    "no weights": (lambda folder: (folder / "params.safetensors").unlink(), "No such file"),
    "weights": (replaced("params.safetensors", b"x" * 99), "cannot read the weights"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_a_folder_that_is_no_run_is_one_line(kind, tmp_path):
    change, words = BAD[kind]
    folder = write_run(tmp_path / "reviews-1", pairs="path", normalise_embeddings=True)
    assert set(read(folder).features) == {"known", "ratio", "frequency"}
    change(folder)
    with pytest.raises(RunError) as caught:
        read(folder)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_triples_can_be_known(tmp_path):
    folder = write_run(tmp_path / "reviews-1", pairs="path")
    of_three(84, 1684, 1685, 1704, 7999)(folder)  # (4, 4), (4, 4, 4), … (19, 19, 19)
    assert read(folder).features["known"].tolist() == [84, 1684, 1685, 1704, 7999]


def test_damaged_features_are_whole_or_a_line(tmp_path):
    folder = write_run(tmp_path / "reviews-1", pairs="path", normalise_embeddings=True)
    content, draw, accepted = (folder / "features.npz").read_bytes(), np.random.default_rng(1), 0
    config = read(folder).settings
    for _ in range(300):
        changed = bytearray(content)
        for place in draw.integers(0, len(content), draw.integers(1, 4)):
            changed[place] ^= 1 << draw.integers(8)
        (folder / "features.npz").write_bytes(changed[: draw.integers(1, 2 * len(content))])
        try:
            found = whole_reviewer.read_features(folder, config)
        except ValueError as error:
            assert "\n" not in str(error) and str(error).startswith("features.npz: ")
            continue
        assert found.keys() == {"known", "ratio", "frequency"}
        accepted += 1
    assert accepted < 300
