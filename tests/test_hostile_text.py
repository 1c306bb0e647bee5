"""`predict` of experiments/imdb.py: any text, in bounded memory, and any folder for a run."""

import io
import json
import os
import subprocess
import sys
import tracemalloc
from itertools import repeat
from pathlib import Path

import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from hypothesis import given

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "experiments" / "imdb.py"
sys.path.append(str(ROOT / "experiments"))

from fuzzing import runs  # noqa: E402
from fuzzing.mutations import written  # noqa: E402

from lstmjax import checkpoint, reviewer  # noqa: E402
from lstmjax.data import imdb, long_text, text  # noqa: E402
from lstmjax.records import RunError  # noqa: E402

# ---- the words at one end -----------------------------------------------------------------------

ODD = st.text(alphabet="aΣΑsİ .,:^`'\n\t_-\u0301\u00ad😀\0", max_size=60)


@given(whole=ODD, cuts=st.lists(st.integers(0, 60), max_size=5), count=st.integers(1, 9))
def test_pieces_give_the_words_of_the_whole(whole, cuts, count):
    places = [0, *sorted(cuts), len(whole)]
    pieces = [whole[a:b] for a, b in zip(places, places[1:], strict=False)]
    assert "".join(pieces) == whole
    words = text.words(whole)
    assert long_text.words_at_end(pieces, count, "pre") == words[-count:]
    assert long_text.words_at_end(pieces, count, "post") == words[:count]


def test_every_blank_is_a_place_to_cut_or_is_known_not_to_be():
    """Σ ends a word as ς, also where what follows is no letter: there a text is not cut."""
    for blank in text.FILTERS + " ":
        apart = text.words("ΑΣ") + text.words("Α")
        together = text.words(f"ΑΣ{blank}Α")
        assert (apart == together) == (blank not in long_text._LOOKED_ACROSS), blank
        assert apart == text.words(f"ΑΣ,{blank}Α")
    assert sorted(long_text._BLANKS + long_text._LOOKED_ACROSS) == sorted(text.FILTERS + " ")


@given(ODD)
def test_words_are_words_again(whole):
    """What is left of a text is joined and read again to get its ids."""
    words = text.words(whole)
    assert text.words(" ".join(words)) == words


def test_words_without_an_end_are_cut_off(monkeypatch):
    monkeypatch.setattr(long_text, "PIECE", 50)
    for blank in ".,: ":
        whole = f"good{blank}film {'x' * 500}{blank}bad{blank}end"
        want = ["good", "film", None, "bad", "end"]
        got = long_text.words_at_end([whole[:70], whole[70:]], 9)
        assert [word if len(word) < 50 else None for word in got] == want
        assert long_text.words_at_end([whole], 2) == ["bad", "end"]
    dots = long_text.words_at_end(["a." * 300], 1000)
    assert dots == ["a"] * 300


def test_bytes_become_text_in_pieces():
    content = "\ufeffnaïve 😀 film".encode() + b" \xff\xfe \xed\xa0\x80 caf\xc3"
    want = content.decode("utf-8-sig", "replace")
    assert "".join(long_text.decoded(io.BytesIO(content))) == want

    class Slow(io.BytesIO):
        def read(self, size=-1):
            return super().read(1)

    assert "".join(long_text.decoded(Slow(content))) == want
    assert list(long_text.decoded(io.BytesIO())) == [""]


def test_a_text_without_an_end_is_an_error(monkeypatch):
    class Endless:
        def read(self, size):
            return b"film " * 200

    monkeypatch.setattr(long_text, "MOST_BYTES", 10_000)
    with pytest.raises(ValueError, match="text: got more than 10,000 bytes, expected fewer"):
        long_text.words_at_end(long_text.decoded(Endless()), 5)
    # The first words are there before the end is looked for.
    assert long_text.words_at_end(long_text.decoded(Endless()), 5, "post") == ["film"] * 5


@pytest.mark.parametrize("piece", ["a film, " * 2**10, "Σ😀." * 2**11, "x" * 2**13])
def test_memory_does_not_grow_with_the_text(piece, monkeypatch):
    monkeypatch.setattr(long_text, "PIECE", 2**13)
    peaks = []
    for count in (8, 64):
        tracemalloc.start()
        long_text.words_at_end(repeat(piece, count), 80)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0] and peaks[1] < 2**20, peaks


# ---- answers ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a run, of random weights."""
    folder = written(runs.run_seeds()[0], tmp_path_factory.mktemp("run") / "imdb-1")
    (folder / "record.json").write_text("{}")
    return folder


def read(folder):
    return reviewer.read(
        folder, runs.experiment.Config, runs.experiment.check, runs.experiment.make_model
    )


def by_hand(trained, whole):
    """The probability, from all the words of a text at once."""
    settings = trained.settings
    ids = imdb.encode(
        [whole], trained.vocabulary, num_words=settings.vocabulary_size,
        max_length=settings.max_length, padding=settings.padding, truncating=settings.truncating,
    )["ids"]  # fmt: skip
    logit = trained.model.apply({"params": trained.params}, ids)[1][0, 0]
    return 1 / (1 + np.exp(-float(logit)))


WORDS = list(runs.WORDS[1:])


@pytest.mark.parametrize("truncating", ["pre", "post"])
def test_a_long_text_has_the_answer_of_the_whole(folder, truncating):
    trained = read(folder)
    trained = trained._replace(
        settings=runs.dataclasses.replace(trained.settings, truncating=truncating)
    )
    rng = np.random.default_rng(0)
    seen = set()
    for length in (1, 6, 7, 8, 200, 60_000):
        whole = ", ".join(rng.choice([*WORDS, "ΟΔΟΣ", "😀", "unheard"], length))
        got, known, looked_at = reviewer.probability(trained, [whole])
        assert got == pytest.approx(by_hand(trained, whole), abs=1e-6)
        assert 0 <= known <= looked_at <= 7
        seen.add(round(got, 5))
    assert len(seen) > 3


def test_texts_of_every_kind(folder, monkeypatch, capsys):
    """What is on the command line; `-` is tested below, as a process."""
    trained = read(folder)
    monkeypatch.setattr(reviewer, "read", lambda *arguments: trained)
    monkeypatch.setattr(reviewer, "_folder", Path)

    def answer(words):
        asked = reviewer.Predict(words, str(folder))
        reviewer.predict(asked, None, None, None)
        return capsys.readouterr().out

    first = answer("a film was good")
    assert "probability of a positive review 0." in first and f"(run {folder})" in first
    assert answer("A FILM was,\ngood!!") == first
    assert "0 of 1 words known" in answer("😀")
    assert "2 of 3 words known" in answer("good \udcff film")  # a byte that is no UTF-8
    assert "0 of 1 words known" in answer("\0")
    assert answer("good film " * 100_000) == answer("good film " * 100)
    for nothing, words in (("", "got no text"), (" \n", "got no text"), ("?!.", "got no word")):
        with pytest.raises(ValueError, match=words):
            answer(nothing)


def test_predict_reads_standard_input(folder):
    def run(content):
        return subprocess.run(
            [sys.executable, str(SCRIPT), "predict", "-", "--run", str(folder)],
            input=content, capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip

    done = run(b"good film \0 \xff\xfe \xed\xa0\x80" + b" never loved it" * 70_000)
    assert done.returncode == 0 and done.stderr == b"", done.stderr
    assert b"probability of a positive review 0." in done.stdout
    want = by_hand(read(folder), "never loved it " * 9)
    assert f"{want:.3f}".encode() in done.stdout
    done = run(b"")
    assert done.returncode == 2 and done.stderr == b"error: text: got no word, expected a review\n"


# ---- the folder of a run ------------------------------------------------------------------------


def with_settings(**changes):
    return lambda folder: (folder / "config.json").write_text(
        json.dumps(json.loads((folder / "config.json").read_text()) | changes)
    )


def with_weights(change):
    def write(folder):
        path = folder / "params.safetensors"
        params = checkpoint.load_params(path, runs.trained()[1])
        path.unlink()
        checkpoint.save_params(path, jax.tree.map(change, params))

    return write


def replaced(name, content):
    return lambda folder: (folder / name).write_bytes(content)


BAD = {
    "size": (with_settings(hidden_size=2**31 - 1), "hidden_size is 2147483647, expected at most"),
    "layers": (with_settings(num_layers=10**6), "num_layers is 1000000, expected at most"),
    "steps": (with_settings(max_length=2**31 - 1), "max_length is 2147483647, expected at most"),
    "words": (with_settings(vocabulary_size=2**30), "vocabulary_size is 1073741824, expected"),
    "other size": (with_settings(hidden_size=3), "expected float32"),
    "negative": (with_settings(hidden_size=-1), "an integer of at least 1"),
    "text": (with_settings(hidden_size="2"), "hidden_size is '2'"),
    "float": (with_settings(hidden_size=2.0), "hidden_size is 2.0"),
    "choice": (with_settings(cell="elman"), "cell is 'elman'"),
    "nothing": (with_settings(dropout=None), "dropout is None"),
    "huge": (with_settings(dropout=10**400), "does not fit into 64 bits"),
    "unknown": (with_settings(hidden=2), "has the setting hidden, unknown here"),
    "rate": (with_settings(dropout=1.5), "0 <= dropout < 1"),
    "bias": (with_settings(forget_bias="chrono:0"), "chrono:T with T >= 2"),
    "list": (replaced("config.json", b"[]"), "config.json is damaged"),
    "deep": (replaced("config.json", b"[" * 10**5), "nested too deeply"),
    "no json": (replaced("config.json", b"\xff"), "config.json is damaged"),
    "vocabulary": (replaced("vocabulary.txt", b"\xff\xfe"), "is damaged: 'utf-8' codec"),
    "no words": (lambda folder: (folder / "vocabulary.txt").unlink(), "cannot read"),
    "no weights": (lambda folder: (folder / "params.safetensors").unlink(), "No such file"),
    "weights": (replaced("params.safetensors", b"x" * 99), "cannot read the weights"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_folder_that_is_no_run_is_one_line(kind, folder, tmp_path):
    change, words = BAD[kind]
    folder = written(runs.run_seeds()[0], tmp_path / "imdb-1")
    change(folder)
    with pytest.raises(RunError) as caught:
        read(folder)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
def test_weights_that_give_no_number_are_one_line(value, folder, tmp_path):
    folder = written(runs.run_seeds()[0], tmp_path / "imdb-1")
    with_weights(lambda a: np.full_like(a, value))(folder)
    with pytest.raises(RunError, match="is damaged: its weights give no number"):
        reviewer.probability(read(folder), ["a good film"])


def test_a_sure_answer_is_one(folder, tmp_path):
    folder = written(runs.run_seeds()[0], tmp_path / "imdb-1")
    for sign in (-1, 1):
        with_weights(lambda a, sign=sign: np.full_like(a, sign * 1000 * (a.shape == (1,))))(folder)
        assert reviewer.probability(read(folder), ["film"])[0] == (sign + 1) / 2
