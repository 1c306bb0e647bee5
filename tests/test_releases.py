"""Releases: what is in them, that they hold what the run left, and what verify finds."""

import dataclasses
import hashlib
import importlib
import json
import runpy
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "experiments"
sys.path.insert(0, str(SCRIPTS))
import card  # noqa: E402
import imdb  # noqa: E402
import mnist  # noqa: E402
import smnist  # noqa: E402

from lstmjax import checkpoint, digits_reader, releases, reviewer  # noqa: E402
from lstmjax.data import mnist as digits  # noqa: E402
from lstmjax.data import offline  # noqa: E402
from lstmjax.records import RunError  # noqa: E402

# ---- a folder with hashes -----------------------------------------------------------------------

CONTENT = {"a-1.bin": bytes(range(9)), "b.txt": b"text\n"}


def test_any_changed_byte_is_found(tmp_path):
    folder = tmp_path / "some"
    releases.write(folder, CONTENT)
    assert releases.check(folder) == list(CONTENT)
    for path in folder.iterdir():
        content = path.read_bytes()
        for place in range(len(content)):
            for flipped in (1, 32):
                changed = bytearray(content)
                changed[place] ^= flipped
                path.write_bytes(changed)
                with pytest.raises(RunError) as caught:
                    releases.check(folder)
                assert "\n" not in str(caught.value)
        for changed in (content[:-1], content + b"\n", b""):
            path.write_bytes(changed)
            with pytest.raises(RunError):
                releases.check(folder)
        path.write_bytes(content)
    assert releases.check(folder) == list(CONTENT)


def outside(folder):
    (folder.parent / "secret").write_bytes(b"x")
    line = f"{hashlib.sha256(b'x').hexdigest()}  ../secret\n"
    (folder / "SHA256SUMS").write_text(line)


def linked(folder):
    (folder / "b.txt").rename(folder.parent / "moved")
    (folder / "b.txt").symlink_to(folder.parent / "moved")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: (folder / "b.txt").unlink(), "b.txt is missing"),
        (lambda folder: (folder / "c").touch(), "c is not in SHA256SUMS"),
        (lambda folder: (folder / "SHA256SUMS").unlink(), "cannot read"),
        (outside, "SHA256SUMS is damaged"),
        (linked, "b.txt is no plain file"),
        (lambda folder: shutil.rmtree(folder), "cannot read"),
    ],
)
def test_what_a_folder_has_too_much_or_too_little(change, words, tmp_path):
    releases.write(tmp_path / "some", CONTENT)
    change(tmp_path / "some")
    with pytest.raises(RunError, match=words):
        releases.check(tmp_path / "some")


def test_nothing_is_written_over(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "b.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name, words in (("full", "exists and is not empty"), ("file", "is a file, expected")):
        with pytest.raises(RunError, match=f"--out: .*{words}"):
            releases.write(tmp_path / name, CONTENT)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["b.txt", "file", "full"]
    assert (tmp_path / "full" / "b.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    releases.write(tmp_path / "empty", CONTENT)
    assert len(releases.check(tmp_path / "empty")) == 2


# ---- end to end ---------------------------------------------------------------------------------

COMMON = {"data": "offline", "epochs": 2, "batch_size": 16, "learning_rate": 0.02, "devices": 1}
RUNS = {
    "imdb": imdb.Config(
        **COMMON, limit=90, hidden_size=6, embedding_size=8, max_length=30, dropout=0, mask=True
    ),
    "mnist": mnist.Config(**COMMON, limit=120, hidden_size=8),
    "smnist": smnist.Config(
        **COMMON, limit=30, hidden_size=3, permutation="numpy-92916", seed=2
    ),
    "seeds": mnist.Config(**COMMON, limit=60, hidden_size=4, seeds=2, seed=3),
    "swept": imdb.Config(
        **{**COMMON, "epochs": 1}, limit=40, hidden_size=2, embedding_size=3, max_length=9,
        sweep="lr=1e-3,2e-2",
    ),
}  # fmt: skip
LANES = {"seeds": "seed4"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """``made(name)``: the folder of a run, and of its release; made when first asked for."""
    root = tmp_path_factory.mktemp("releases")
    done = {}

    def make(name):
        if name not in done:
            config = dataclasses.replace(RUNS[name], out=str(root / f"{name}-1"))
            script = importlib.import_module(type(config).__module__)
            with jax.numpy_dtype_promotion("standard"):  # optax's Adam needs it
                script.run(config)
            lane = LANES.get(name)
            if name == "swept":
                metrics = json.loads((root / "swept-1" / "record.json").read_text())["metrics"]
                lane = LANES[name] = f"lr{metrics['sweep_chosen_lr']!r}-seed0"
            out = str(root / f"{name}-release")
            card.make(card.Make(str(root / f"{name}-1"), out, lane))
            done[name] = root / f"{name}-1", root / f"{name}-release"
        return done[name]

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LSTMJAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield make


@pytest.mark.parametrize("name", list(RUNS))
def test_a_release_holds_what_the_run_left(name, made, capsys):
    run, release = made(name)
    record = json.loads((run / "record.json").read_text())
    weights = run / (f"params-{LANES[name]}.safetensors" if name in LANES else "params.safetensors")
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    lane = LANES.get(name, f"seed{record['seed']}")
    file = f"{record['experiment']}-{lane}-{digest[:12]}.safetensors"
    names = {file, "record.json", "config.json", "release.json", "MODEL_CARD.md", "SHA256SUMS"}
    names |= {"vocabulary.txt"} if record["experiment"] == "imdb" else set()
    assert {path.name for path in release.iterdir()} == names
    assert (release / file).read_bytes() == weights.read_bytes()
    assert (release / "record.json").read_bytes() == (run / "record.json").read_bytes()

    measured = json.loads((release / "release.json").read_text())["measured"]
    accuracy = record["metrics"]["test_accuracy"]
    accuracy = accuracy if isinstance(accuracy, float) else accuracy[-1]
    assert measured["correct"] / measured["count"] == pytest.approx(accuracy, abs=1e-6)
    assert measured["count"] == RUNS[name].limit
    for cells in measured["groups"].values():
        assert sum(cell["count"] for cell in cells) == measured["count"]
        assert sum(cell["correct"] for cell in cells) == measured["correct"]
    text = (release / "MODEL_CARD.md").read_text()
    assert record["dataset"]["sha256"] in text and digest in text and record["command"] in text
    assert ("One run, of one seed" in text) == (name != "seeds")
    assert ("The run has 2 seeds" in text) == (name == "seeds")
    assert "these numbers say nothing about real ones" in text

    capsys.readouterr()
    card.verify(card.Verify(str(release)))
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 4 and said[0] == f"files       {len(names) - 1}, as SHA256SUMS says"
    assert said[3].startswith(f"accuracy    {accuracy:.4f} of all {RUNS[name].limit} test ")
    assert said[3].endswith(f": the record's {accuracy:.4f}")
    assert ("is of all lanes" in said[1]) == (name in LANES)


def test_the_answers_are_those_of_predict_to_reviews(made):
    run, release = made("imdb")
    trained = reviewer.read(release, imdb.Config, imdb.check, imdb.make_model)
    opened = card.opened(release, None)
    scored = opened.subject.score(opened.script, opened.trained, opened.settings, 12)
    texts, label = (part[:12] for part in offline.reviews()["test"])
    positive = [reviewer.probability(trained, [one])[0] for one in texts]
    np.testing.assert_allclose(scored.probabilities[:, 1], positive, atol=1e-6)
    np.testing.assert_array_equal(scored.label, label)
    words = [one.lower().replace(".", " ").replace(",", " ").split() for one in texts]
    negative = [{"not", "never", "no", "nothing"} & set(one[-30:]) != set() for one in words]
    assert 0 < sum(negative) < 12
    groups = scored.groups["negation in the words that the model is given"]
    np.testing.assert_array_equal(dict(groups)["yes"], negative)
    (_, short), *_ = scored.groups["words of the review, quartiles"]
    assert max(len(words[i]) for i in np.flatnonzero(short)) <= min(
        len(words[i]) for i in np.flatnonzero(~short)
    )


@pytest.mark.parametrize("name", ["mnist", "smnist"])
def test_the_answers_are_those_of_predict_to_images(name, made):
    run, release = made(name)
    script = importlib.import_module(name)
    test = digits.load("offline", validation_size=5000).first(RUNS[name].limit).splits["test"]
    found = digits_reader.probabilities(script.read(release), test["image"])
    right = (found.argmax(axis=1) == test["label"]).tolist()
    stored = json.loads((release / "release.json").read_text())
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(stored["correct"]), np.uint8))
    assert bits[: len(right)].astype(bool).tolist() == right
    assert 0 < sum(right) < len(right)
    ink = test["image"].reshape(len(right), -1).mean(axis=1) / 255
    darkest = stored["measured"]["groups"]["ink (mean brightness, 0 to 1), quartiles"][0]
    assert darkest["name"].startswith(f"{ink.min():.3f} to ")
    order = np.argsort(ink)[: darkest["count"]]
    assert darkest["correct"] == sum(right[i] for i in order)


def test_a_few_examples_are_compared_one_by_one(made, capsys):
    _, release = made("mnist")
    capsys.readouterr()
    card.verify(card.Verify(str(release), limit=17))
    said = capsys.readouterr().out.splitlines()[-1]
    assert "of the first 17 test images, none otherwise than when the release was made" in said
    assert said.endswith("(the record's accuracy is of all 120)")


# ---- what verify finds --------------------------------------------------------------------------


def changed(release, folder, name, content):
    """A copy of a release in which a file was changed, and its hash as well."""
    shutil.copytree(release, folder)
    (folder / name).write_bytes(content)
    sums = folder / "SHA256SUMS"
    lines = [line.split("  ") for line in sums.read_text().splitlines()]
    hashes = {n: hashlib.sha256((folder / n).read_bytes()).hexdigest() for _, n in lines}
    sums.write_text("".join(f"{hashes[n]}  {n}\n" for _, n in lines))
    return card.Verify(str(folder))


def altered(path, **values):
    """The JSON of a file with other values, at places such as metrics.test_accuracy."""
    content = json.loads(path.read_text())
    for place, value in values.items():
        *outer, last = place.split("__")
        inner = content
        for key in outer:
            inner = inner[key]
        inner[last] = value
    return json.dumps(content).encode()


OTHER = "0" * 64
FOUND = {
    "accuracy": ("record.json", {"metrics__test_accuracy": 0.999}, "the record's is 0.9990"),
    "no accuracy": ("record.json", {"metrics__test_accuracy": "nan"}, "holds no test accuracy"),
    "no share": ("record.json", {"metrics__test_accuracy": 2**31}, "got a test accuracy of 2.147e"),
    "seeds": (
        "record.json",
        {"metrics__test_accuracy": [0.5, 0.5]},
        "is of 2 test accuracies, exp",
    ),
    "weights": ("record.json", {"params_sha256": OTHER}, "does not hold the weights of record.js"),
    "data": ("record.json", {"dataset__sha256": OTHER}, "are not those of the record"),
    "experiment": ("record.json", {"experiment": "sin"}, "is a run of sin, expected one of imdb, "),
    "settings": ("config.json", {"epochs": 3}, "config.json is not what record.json says: epochs"),
    "name": ("release.json", {"weights": "other"}, "the weights that release.json names"),
    "answers": ("release.json", {"correct": "00"}, "release.json is damaged"),
    "format": ("release.json", {"format": 2}, "release.json is damaged: its parts"),
    "count": ("release.json", {"measured__count": "many"}, "release.json is damaged"),
    "no numbers": ("release.json", {"measured": None}, "release.json is damaged"),
}


@pytest.mark.parametrize("kind", FOUND)
def test_a_release_that_says_something_else(kind, made, tmp_path):
    _, release = made("mnist")
    name, values, words = FOUND[kind]
    options = changed(release, tmp_path / "copy", name, altered(release / name, **values))
    with pytest.raises(RunError) as caught:
        card.verify(options)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_other_answers_are_found(made, tmp_path):
    """Both in release.json alone, so that no hash tells."""
    _, release = made("mnist")
    stored = json.loads((release / "release.json").read_text())
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(stored["correct"]), np.uint8))
    (right,), (wrong,) = (np.flatnonzero(bits[:120] == value)[None, :2] for value in (1, 0))
    bits[right], bits[wrong] = 0, 1  # as many right ones as before
    content = altered(release / "release.json", correct=np.packbits(bits).tobytes().hex())
    options = changed(release, tmp_path / "copy", "release.json", content)
    with pytest.raises(RunError, match="4 come out otherwise than when the release was made"):
        card.verify(options)


def test_other_weights_are_found(made, tmp_path):
    _, release = made("mnist")
    (path,) = release.glob("*.safetensors")
    params = checkpoint.read_arrays(path)
    name = next(iter(params))
    params[name] = params[name] + np.float32(1e-6)
    checkpoint.save_params(tmp_path / "other", params)
    options = changed(release, tmp_path / "copy", path.name, (tmp_path / "other").read_bytes())
    with pytest.raises(RunError, match="does not hold the weights that release.json names"):
        card.verify(options)


@pytest.mark.parametrize("name", ["imdb", "mnist"])
def test_a_changed_byte_of_a_release_is_found(name, made, tmp_path):
    _, release = made(name)
    draw = np.random.default_rng(0)
    shutil.copytree(release, tmp_path / "copy")
    for path in sorted((tmp_path / "copy").iterdir()):
        content = path.read_bytes()
        for place in draw.integers(0, len(content), 3):
            damaged = bytearray(content)
            damaged[place] ^= 1 << draw.integers(8)
            path.write_bytes(damaged)
            with pytest.raises(RunError):
                card.verify(card.Verify(str(tmp_path / "copy")))
        path.write_bytes(content)


# ---- what cannot be released --------------------------------------------------------------------


def test_make_wants_the_weights_of_the_record(made, tmp_path):
    run, _ = made("mnist")
    shutil.copytree(run, tmp_path / "run")
    params = checkpoint.read_arrays(run / "params.safetensors")
    (tmp_path / "run" / "params.safetensors").unlink()
    changed = {name: array * np.float32(0.5) for name, array in params.items()}
    checkpoint.save_params(tmp_path / "run" / "params.safetensors", changed)
    with pytest.raises(RunError, match="run are not those of its record: params_sha256 differs"):
        card.make(card.Make(str(tmp_path / "run"), str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_make_wants_the_accuracy_of_the_record(made, tmp_path):
    run, _ = made("mnist")
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run" / "record.json"
    path.write_bytes(altered(path, metrics__test_accuracy=0.999))
    with pytest.raises(RunError, match="test accuracy 0.*, expected the record's 0.9990"):
        card.make(card.Make(str(tmp_path / "run"), str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_a_few_roundings_are_allowed():
    assert card.agrees(8_312, 0.83123 * 10_000, 10_000, 0)  # one, always
    assert card.agrees(8_312, 8_313, 10_000, 0) and not card.agrees(8_312, 8_314, 10_000, 0)
    assert card.agrees(8_312, 8_317, 10_000, 5e-4) and not card.agrees(8_312, 8_318, 10_000, 5e-4)


def test_make_wants_a_lane(made, tmp_path):
    for name, which, words in (
        ("seeds", None, "--which: got none, expected one of seed3, seed4"),
        ("seeds", "seed5", "--which: got seed5, expected one of seed3, seed4"),
        ("mnist", "seed0", "--which: got seed0, expected none"),
        ("swept", "other", "no other was scored on the test split"),
    ):
        run, _ = made(name)
        if which == "other":
            which = next(f"lr{v}-seed0" for v in (0.001, 0.02) if f"lr{v}-seed0" != LANES[name])
        with pytest.raises(RunError, match=words):
            card.make(card.Make(str(run), str(tmp_path / "out"), which))
    assert not list(tmp_path.iterdir())


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


def test_make_verify_predict(made, tmp_path, monkeypatch, capsys):
    run, _ = made("imdb")
    monkeypatch.chdir(tmp_path)
    code, out, error = begin("card", ["make", str(run), "--out", "here"], monkeypatch, capsys)
    assert (code, error) == (0, "")
    where = "generated reviews (offline data, not IMDB); release in here\n"
    assert out.endswith(f" of 90 reviews of {where}")
    code, out, error = begin("card", ["verify", "here", "--limit", "5"], monkeypatch, capsys)
    assert (code, error) == (0, "") and "of the first 5 test reviews" in out
    argv = ["predict", "I loved it, a great film", "--run"]
    answers = [begin("imdb", [*argv, str(folder)], monkeypatch, capsys) for folder in (run, "here")]
    assert [code for code, _, _ in answers] == [0, 0]
    first, second = (out.split(" (run ")[0] for _, out, _ in answers)
    assert first == second and "probability of a positive review 0." in first
    before = {path.name: path.read_bytes() for path in (tmp_path / "here").iterdir()}
    code, _, error = begin("card", ["make", str(run), "--out", "here"], monkeypatch, capsys)
    assert code == 1 and "here exists and is not empty" in error
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "here").iterdir()}


def test_predict_of_several_seeds(made, monkeypatch, capsys, tmp_path):
    run, _ = made("swept")
    argv = ["predict", "a great film", "--run", str(run)]
    code, out, error = begin("imdb", argv, monkeypatch, capsys)
    assert (code, out) == (1, "") and error.count("\n") == 1
    expected = "expected one of lr0.02-seed0, lr0.001-seed0"
    assert error.startswith(f"error: --which: got none, {expected}: {run} holds all their weights")
    said = [
        begin("imdb", [*argv, "--which", f"lr{v}-seed0"], monkeypatch, capsys)[1]
        for v in (0.001, 0.02)
    ]
    assert said[0] != said[1] and all("probability of a positive" in line for line in said)


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        ([], 2, "command: got nothing, expected make or verify"),
        (["sell"], 2, "command: got sell, expected make or verify"),
        (["make"], 2, "got no run, expected the folder of a finished one"),
        (["make", "none"], 2, "--out: got None, expected a folder, new or empty"),
        (["make", "none", "--out", "there"], 1, "cannot read none/record.json: No such file"),
        (["make", "none", "--out", "there", "--tolerance", "1"], 2, "--tolerance: got 1.0, expect"),
        (["verify"], 2, "got no release, expected the folder of one"),
        (["verify", "none"], 1, "cannot read none/SHA256SUMS: No such file"),
        (["verify", "none", "--limit", "0"], 2, "--limit: got 0, expected an integer of at least"),
    ],
)
def test_a_wrong_call_is_one_line(argv, code, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    got, out, error = begin("card", argv, monkeypatch, capsys)
    assert (got, out) == (code, "") and error.startswith(f"error: {words}"), error
    assert error.count("\n") == 1 and not list(tmp_path.iterdir())


def test_help(monkeypatch, capsys):
    code, out, _ = begin("card", ["--help"], monkeypatch, capsys)
    assert code == 0 and "python experiments/card.py make" in out
    for command, options in (("make", card.Make), ("verify", card.Verify)):
        code, out, _ = begin("card", [command, "--help"], monkeypatch, capsys)
        assert code == 0
        for field in dataclasses.fields(options)[1:]:
            assert f"--{field.name}" in out
