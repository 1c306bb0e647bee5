"""`predict` of experiments/reviews.py, and releases of its runs."""

import dataclasses
import io
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_reviews import FAST, MORE, RUNS, SMALL, WORDS, read, with_settings, write_run
from tiny_reviews import experiment as reviews

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "experiments"
sys.path.insert(0, str(SCRIPTS))
import card  # noqa: E402

from lstmjax import finished, review_model, reviewer, whole_reviewer  # noqa: E402
from lstmjax.data import chops, long_text, ngrams, offline  # noqa: E402
from lstmjax.records import RunError, params_sha256  # noqa: E402

KINDS = {
    "none": {},
    "input": {
        "pairs": "input", "normalise_embeddings": True, "virtual": 0.5, "unlabelled": True,
        **RUNS,
    },
    "ratios": {
        "ratio_inputs": True, "path_order": 3, "folds": 3, "place_inputs": True, "epochs": 16,
        **RUNS,
    },
    "path": {
        "pairs": "path", "path_order": 3, "path_loss": 0.5, "tokens": "words", "epochs": 4,
        "validation_size": 12, "select": "best", "directions": "forward", "ratio_inputs": True,
        "hold_out": "alike", **RUNS,
    },
    "gates": {
        "embedding": "gates", "cell": "cifg", "loss": "squared", "pooling": "max", "chop": 0,
        "directions": "forward",
    },
}  # fmt: skip
FEATURES = {"none": set(), "input": {"known", "frequency"}}
FEATURES |= dict.fromkeys(("ratios", "path"), {"known", "ratio"})


@pytest.fixture(scope="module", autouse=True)
def small():
    """A few of the offline reviews in the place of all of them."""
    assert len(jax.devices()) > 1  # before a run asks for a single one
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(offline, "reviews", lambda: SMALL)
        patch.setattr(offline, "unlabelled", lambda: MORE)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """``made(kind)``: the settings and the folder of a run; made when first asked for."""
    root, done = tmp_path_factory.mktemp("runs"), {}

    def make(kind):
        if kind not in done:
            done[kind] = dataclasses.replace(FAST, **KINDS[kind], out=str(root / kind))
            with jax.numpy_dtype_promotion("standard"):  # optax's Adam needs it
                reviews.run(done[kind])
        return done[kind], root / kind

    return make


@pytest.mark.parametrize("tokens", ["punctuation", "words"])
@pytest.mark.parametrize("length", [1, 20, 500])
def test_ids_are_those_that_a_run_reads(tokens, length):
    config = dataclasses.replace(FAST, tokens=tokens, max_length=length, batch_segments=80)
    data = reviews.load(config)
    fields = data.splits["test"]
    for n, text in enumerate(SMALL["test"][0]):
        found = long_text.words_at_end([text], length, tokens=tokens)
        got = whole_reviewer.encode(found, data.vocabulary, length)
        want = fields["ids"][slice(*fields["offsets"][n : n + 2])]
        np.testing.assert_array_equal(got, want)
        assert got.dtype == np.int32


@pytest.mark.parametrize(("sizes", "want"), [((50, 7, 11), 50), ((50, 7, 3), 21), ((50, 0, 3), 50)])
def test_how_much_of_a_review_is_read(sizes, want):
    """What has room in a batch, as a run has it."""
    names = ("max_length", "chop", "batch_segments")
    config = dataclasses.replace(FAST, **dict(zip(names, sizes, strict=True)))
    assert whole_reviewer.longest(config) == want
    fields = reviews.load(config).splits["test"]
    assert np.diff(fields["offsets"]).max() == want


def test_the_placeholder_of_the_vocabulary_is_no_word():
    got = whole_reviewer.encode(["<unused>", "film", "it"], ["<unused>", "film"], 9)
    assert got.tolist() == [1, 2, 4, 2]


# ---- the answers are those that were scored -----------------------------------------------------


def scored(config, params):
    """z of every test review as the run has scored it: from its loss with either label."""
    parts, pairs = reviews.make_parts(config, reviews.load(config))
    model, part = reviews.make_model(config, pairs), parts["test"]
    steps = max(int(each.cut.length.max()) for each in parts.values())
    take = review_model.chops(steps)
    packed = chops.pack(part.cut, part.rows, config.batch_segments)
    plan = chops.lay_out(part.cut, packed, chops.width([packed]))
    arrays, params = jax.tree.map(jnp.asarray, (part.arrays, params))

    @jax.jit
    def losses(pick, label):
        batch = take(arrays, pick) | {"label": jnp.full_like(pick["rows"], label)}

        def whole(weight):
            return model.loss_fn(params, batch | {"weight": weight})[1]["loss"][0]

        return jax.grad(whole)(pick["weight"])  # one for each review

    found = np.empty((2, len(part.rows)))
    for k in range(len(plan["rows"])):
        pick = {name: jnp.asarray(array[k]) for name, array in plan.items()}
        own = np.asarray(pick["weight"]) > 0
        for label in (0, 1):
            each = np.asarray(losses(pick, label), np.float64)
            found[label, plan["rows"][k][own]] = each[own]
    # log(1 + e^z) − log(1 + e^−z) = z, and (z + 1)² − (z − 1)² = 4 z.
    z = (found[0] - found[1]) / (4 if config.loss == "squared" else 1)
    return z, found, part.arrays["label"], len(plan["rows"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_review_has_the_answer_that_was_scored(kind, made):
    config, folder = made(kind)
    trained, record = read(folder), json.loads((folder / "record.json").read_text())
    assert params_sha256(trained.params) == record["params_sha256"]
    want, losses, label, batches = scored(config, trained.params)
    assert batches >= 3 and want.min() < -0.1 and want.max() > 0.1
    accuracy, loss = ((want > 0) == label).mean(), losses[label, range(30)].mean()
    assert record["metrics"]["test_accuracy"] == pytest.approx(accuracy, abs=1e-6)
    assert record["metrics"]["test_loss"] == pytest.approx(loss, abs=1e-6)

    test = reviews.load(config).splits["test"]
    got = whole_reviewer.logits(trained, test["ids"], test["offsets"])
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
    few = whole_reviewer.logits(trained, test["ids"], test["offsets"], 8)
    np.testing.assert_allclose(few, want[:8], rtol=1e-6, atol=1e-6)

    texts = SMALL["test"][0]
    order = np.argsort([len(one) for one in texts])
    assert len(ngrams.TOKENS[config.tokens](texts[order[-1]])) > config.max_length
    likely = np.clip((1 + want) / 2, 0, 1) if kind == "gates" else 1 / (1 + np.exp(-want))
    for n in order[[0, -1]]:
        positive, known, words = whole_reviewer.probability(trained, [texts[n]])
        assert positive == pytest.approx(likely[n], abs=1e-6)
        ids = test["ids"][slice(*test["offsets"][n : n + 2])]
        assert (known, words) == ((ids > 3).sum(), (ids != 1).sum())


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_leaves_what_it_counted(kind, made):
    config, folder = made(kind)
    parts, pairs = reviews.make_parts(config, reviews.load(config))
    trained, names = read(folder), FEATURES.get(kind, set())
    assert trained.features.keys() == names == parts["train"].counted.keys()
    assert (folder / "features.npz").exists() == bool(names)
    there = whole_reviewer.file_names(config)
    assert there == ("vocabulary.txt", *["features.npz"] * bool(names))
    if "known" in names:
        codes = trained.features["known"]
        assert len(codes) == pairs == 30 and codes[0] < config.vocabulary_size**2
        assert (codes[-1] > config.vocabulary_size**2) == (kind != "input")  # a triple
    for name in names - {"known"}:
        np.testing.assert_array_equal(trained.features[name], parts["test"].arrays[name])
    text = b"".join((folder / name).read_bytes() for name in there)
    again = folder.parent / f"{kind}-again"
    again.mkdir(exist_ok=True)
    whole_reviewer.leave(again, trained.vocabulary, trained.features)
    assert b"".join((again / name).read_bytes() for name in there) == text


def test_pairs_of_reviews_without_labels_are_read_too():
    config = dataclasses.replace(FAST, **KINDS["input"])
    parts, _ = reviews.make_parts(config, reviews.load(config))
    train = parts["train"]
    assert len(train.rows) == 72 and len(train.arrays["pairs"]) == len(train.arrays["ids"])
    known = {code: number for number, code in enumerate(train.known.tolist(), 1)}
    first, end = (int(train.cut.begin[train.cut.first[row]]) for row in (60, 61))
    ids = train.arrays["ids"][first:end].tolist()
    want = [0]
    for before, word in zip(ids[:-1], ids[1:], strict=True):
        want.append(known.get(80 * before + word, 0) if min(before, word) > 3 else 0)
    assert train.arrays["pairs"][first:end].tolist() == want and max(want) > 0
    config = dataclasses.replace(config, pairs="none", ratio_inputs=True, place_inputs=True)
    parts, _ = reviews.make_parts(config, reviews.load(config))
    arrays = parts["train"].arrays
    assert [len(arrays[name]) for name in ("ratios", "places")] == [len(arrays["ids"])] * 2
    words = [arrays["ratio"][word] if word > 3 else 0 for word in ids]
    assert arrays["ratios"][first:end, 0].tolist() == words and np.ptp(words) > 0.1
    pairs = [arrays["ratio"][n + 79] if n else 0 for n in want]
    assert arrays["ratios"][first:end, 1].tolist() == pairs and np.ptp(pairs) > 0.1


def test_what_a_logit_says():
    z = np.array([-3.0, -1.0, 0.0, 0.5, 2.0])
    squared, logistic = (
        whole_reviewer.positive(dataclasses.replace(FAST, loss=loss), z)
        for loss in ("squared", "logistic")
    )
    assert squared.tolist() == [0, 0, 0.5, 0.75, 1]
    np.testing.assert_allclose(logistic, 1 / (1 + np.exp(-z)), rtol=1e-12)


# ---- any text -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("hand") / "reviews-1", pairs="path")


@pytest.fixture
def seen(monkeypatch):
    """The ids of every text that is asked for, which are not looked at."""
    ids = []
    monkeypatch.setattr(
        whole_reviewer, "logits", lambda trained, own, offsets: ids.append(own) or np.zeros(1)
    )
    return ids


@pytest.mark.parametrize("tokens", ["punctuation", "words"])
def test_of_a_long_text_the_end_is_read(tokens, folder, seen):
    trained = read(folder)
    trained = trained._replace(settings=dataclasses.replace(trained.settings, tokens=tokens))
    draw = np.random.default_rng(0)
    id_of = {word: number for number, word in enumerate(WORDS[1:], 4)}
    for length in (1, 11, 12, 13, 300, 200_000):
        whole = " ".join(["film", *draw.choice([*WORDS, "ΟΔΟΣ,", "😀", "a.b", "<br />"], length)])
        found = ngrams.TOKENS[tokens](whole)
        _, known, words = whole_reviewer.probability(trained, [whole])
        want = [1, *(id_of.get(token, 2) for token in found)][-12:]
        assert seen[-1].tolist() == want and words == min(12, len(found))
        assert known == sum(k > 3 for k in want)
    assert len(seen[-1]) == 12


def test_texts_of_every_kind(folder, seen, monkeypatch, capsys):
    trained = read(folder)
    monkeypatch.setattr(whole_reviewer, "read", lambda *arguments: trained)

    def answer(words):
        asked = whole_reviewer.Predict(words, str(folder))
        whole_reviewer.predict(asked, None, None, None)
        return capsys.readouterr().out

    first = answer("A FILM was,\ngood.")
    assert first == f"negative: probability of a positive review 0.500 (run {folder})\n"
    assert seen[-1].tolist() == [1, 5, 6, 7, 17, 8, 16]
    assert "0 of 1 words known" in answer("😀") and "2 of 3 words known" in answer("good \udcff it")
    assert "0 of 1 words known" in answer("\0") and "1 of 2 words known" in answer("good !")
    assert "words known" not in answer("good film " * 100_000)
    for nothing, words in (("", "got no text"), (" \n", "got no text"), ("<br />", "got no word")):
        with pytest.raises(ValueError, match=words):
            answer(nothing)


def test_a_megabyte_on_standard_input(folder):
    """It is read piece by piece, and its last words alone by the model."""
    content = b"\xff\xfe \0 \xed\xa0\x80" + "naïve <br /> ".encode() * 70_000
    content += b"I never, never loved it. " * 9
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / "reviews.py"), "predict", "-", "--run", str(folder)],
        input=content, capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b""), done.stderr
    want, *_ = whole_reviewer.probability(read(folder), ["I never, never loved it. " * 9])
    assert f"review {want:.3f} (run {folder})".encode() in done.stdout


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_give_no_number_are_one_line(value, tmp_path):
    trained = read(write_run(tmp_path / "reviews-1", value))
    with pytest.raises(RunError, match="is damaged: its weights give no number"):
        whole_reviewer.probability(trained, ["a good film"])


# ---- as its users run it ------------------------------------------------------------------------


def begin(name, argv, monkeypatch, capsys):
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", [str(SCRIPTS / f"{name}.py"), *argv])
    code = 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as stop:
        code = stop.code or 0
    return code, *capsys.readouterr()


WRONG = [
    ([], 2, "got no text, expected a review in quotes"),
    (["-", "--run", "run"], 2, "text: got no word, expected a review"),
    (["good", "--run", "nowhere"], 1, "--run: got nowhere, expected the folder of a finished run"),
    (["good"], 1, "--run: there is no finished run under runs/"),
    (["good", "--which", "seed0"], 2, "--which: no such flag"),
    (["good", "--run", "words"], 1, "--run: words is a run of --task language, expected sentiment"),
    (["good", "--run", "lost"], 1, "--run: cannot read lost/features.npz: No such file"),
]


@pytest.mark.parametrize(("argv", "code", "words"), WRONG)
def test_a_wrong_call_is_one_line(argv, code, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run")
    write_run(tmp_path / "words")
    with_settings(task="language")(tmp_path / "words")
    write_run(tmp_path / "lost", pairs="input")
    (tmp_path / "lost" / "features.npz").unlink()
    monkeypatch.setattr(sys, "stdin", type("Stdin", (), {"buffer": io.BytesIO()}))
    got, out, error = begin("reviews", ["predict", *argv], monkeypatch, capsys)
    assert (got, out) == (code, "") and error.startswith(f"error: {words}"), error
    assert error.count("\n") == 1


def test_predict_takes_the_newest_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, time in (("reviews-1", 5), ("reviews-2", 9), ("imdb-3", 11)):
        write_run(tmp_path / "runs" / name)
        os.utime(tmp_path / "runs" / name / "record.json", (time, time))
    code, out, error = begin("reviews", ["predict", "good film"], monkeypatch, capsys)
    assert (code, error) == (0, "") and out.endswith("(run runs/reviews-2)\n")
    want, *_ = whole_reviewer.probability(read(Path("runs/reviews-2")), ["good film"])
    assert f"review {want:.3f} " in out


def test_help(monkeypatch, capsys):
    code, out, _ = begin("reviews", ["predict", "--help"], monkeypatch, capsys)
    assert code == 0 and "--run" in out and "so many tokens at" in " ".join(out.split())


# ---- releases -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["none", "ratios", "path", "gates"])
def test_a_release_is_made_and_verified(kind, made, tmp_path, capsys):
    config, run = made(kind)
    release = tmp_path / "release"
    card.make(card.Make(str(run), str(release)))
    names = {path.name for path in release.iterdir()}
    own = set(whole_reviewer.file_names(config))
    assert own == names & {"vocabulary.txt", "features.npz"}
    assert all((release / name).read_bytes() == (run / name).read_bytes() for name in own)
    assert finished.weights(release).read_bytes() == (run / "params.safetensors").read_bytes()
    text = (release / "MODEL_CARD.md").read_text()
    for name in own:
        assert f"{name} sha256 " in text
    held = 12 if kind == "path" else 0
    assert f"| examples | train {52 - held}, validation {held}, test 30 |" in text
    way = "" if config.directions == "forward" else " in each direction"
    assert f"| cell | {config.cell}, 1 x 3 units{way} |" in text
    assert ("how much more often" in text) == (kind in ("ratios", "path"))
    assert ("wide path" in text) == (kind == "path") and ("(1 + z) / 2" in text) == (
        kind == "gates"
    )
    capsys.readouterr()
    card.verify(card.Verify(str(release)))
    accuracy = json.loads((run / "record.json").read_text())["metrics"]["test_accuracy"]
    said = capsys.readouterr().out
    assert f"{accuracy:.4f} of all 30 test reviews, none otherwise than when" in said
    words = ["a great film, i loved it"]
    assert whole_reviewer.probability(read(release), words) == whole_reviewer.probability(
        read(run), words
    )
    for name in sorted(own):
        content = (release / name).read_bytes()
        (release / name).write_bytes(content + b"\n")
        with pytest.raises(RunError, match=f"{name} is not as it was written"):
            card.verify(card.Verify(str(release)))
        (release / name).write_bytes(content)


def test_the_answers_and_groups_of_a_card(made):
    config, run = made("input")
    opened = card.opened(run, None)
    found = opened.subject.score(opened.script, opened.trained, opened.settings, 17)
    want, _, label, _ = scored(config, opened.trained.params)
    np.testing.assert_allclose(found.probabilities[:, 1], 1 / (1 + np.exp(-want[:17])), atol=1e-6)
    np.testing.assert_allclose(found.probabilities.sum(axis=1), 1, rtol=1e-12)
    np.testing.assert_array_equal(found.label, label[:17])
    words = [re.sub("[^a-z']", " ", one.lower()).split() for one in SMALL["test"][0][:17]]
    negative = [{"not", "never", "no", "nobody", "nothing"} & set(one) != set() for one in words]
    assert 0 < sum(negative) < 17
    np.testing.assert_array_equal(
        dict(found.groups["negation anywhere in the review"])["yes"], negative
    )
    lengths = np.array([len(one) for one in words])
    quarters = found.groups["words of the review, quartiles"]
    assert len(quarters) == 4 and sum(own.sum() for _, own in quarters) == 17
    for (_, shorter), (_, longer) in zip(quarters, quarters[1:], strict=False):
        assert lengths[shorter].max() < lengths[longer].min()
    for name, sign in (("negative", 0), ("positive", 1)):
        np.testing.assert_array_equal(dict(found.groups["true class"])[name], label[:17] == sign)


def test_what_is_not_released(made, tmp_path):
    _, run = made("path")
    with pytest.raises(RunError, match="--which: got seed0, expected none"):
        card.make(card.Make(str(run), str(tmp_path / "out"), "seed0"))
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "features.npz").unlink()
    with pytest.raises(RunError, match="features.npz: No such file"):
        card.make(card.Make(str(tmp_path / "run"), str(tmp_path / "out")))
    shutil.copy(run / "features.npz", tmp_path / "run")
    record = json.loads((run / "record.json").read_text())
    record["metrics"]["test_accuracy"] -= 2 / 30  # a single review may come out otherwise
    (tmp_path / "run" / "record.json").write_text(json.dumps(record))
    with pytest.raises(RunError, match="test accuracy .*, expected the record's"):
        card.make(card.Make(str(tmp_path / "run"), str(tmp_path / "out"), tolerance=0.0))
    assert not (tmp_path / "out").exists()


def test_from_the_run_to_the_answer(tmp_path):
    """Processes of their own: run, make, verify, predict."""
    surroundings = os.environ | {"PYTHONPATH": str(ROOT), "LSTMJAX_CACHE": str(tmp_path / "cache")}

    def do(command, *more):
        name, *flags = command.split()
        done = subprocess.run(
            [sys.executable, str(SCRIPTS / f"{name}.py"), *flags, *more],
            cwd=tmp_path, env=surroundings, capture_output=True, text=True,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout.splitlines()[-1]

    do(
        "reviews --data offline --limit 40 --epochs 1 --validation-size 0 --select last --chop 10 "
        "--hidden-size 3 --embedding-size 4 --vocabulary-size 60 --max-length 60 --devices 1 "
        "--batch-segments 24 --pairs input --normalise-embeddings --out here"
    )
    data = "generated reviews (offline data, not IMDB)"
    assert do("card make here --out there").endswith(f" of 40 reviews of {data}; release in there")
    assert "of the first 9 test reviews, none otherwise" in do("card verify there --limit 9")
    texts = ["predict", "I loved it, but the plot was not good.", "--run"]
    want = reviewer.said(*whole_reviewer.probability(read(tmp_path / "here"), [texts[1]]), "there")
    assert do("reviews", *texts, "there") == want
