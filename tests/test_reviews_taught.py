"""Reviews without labels that an earlier run of experiments/reviews.py gives labels to."""

import dataclasses
import json
import shutil
import signal
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_reviews import FAST, MORE, RUNS, SMALL, read, with_settings
from tiny_reviews import experiment as reviews

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "experiments"))
import card  # noqa: E402
import reproduce  # noqa: E402

from lstmjax import provenance, tables, whole_reviewer  # noqa: E402
from lstmjax.cli import ConfigError  # noqa: E402
from lstmjax.data import offline  # noqa: E402
from lstmjax.data import reviews as data_reviews  # noqa: E402
from lstmjax.records import RunError, RunStopped, validate  # noqa: E402

HELD = 9
SETTINGS = dataclasses.replace(
    FAST, validation_size=HELD, select="best", hold_out="alike", seed=2, epochs=6,
    ratio_inputs=True, path_order=3, folds=3, **RUNS,
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def small():
    """A few of the offline reviews in the place of all of them."""
    assert len(jax.devices()) > 1  # before a run asks for a single one
    with pytest.MonkeyPatch.context() as patch, jax.numpy_dtype_promotion("standard"):
        patch.setattr(offline, "reviews", lambda: SMALL)
        patch.setattr(offline, "unlabelled", lambda: MORE)
        yield


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The folder of a run on the labelled reviews alone."""
    folder = tmp_path_factory.mktemp("teacher") / "run"
    reviews.run(dataclasses.replace(SETTINGS, out=str(folder)))
    return folder


def train(folder, teacher, **settings):
    """A run that is taught; its record."""
    more = {"unlabelled": True, "teacher": str(teacher), "confidence": 0.6, "epochs": 2}
    reviews.run(dataclasses.replace(SETTINGS, **{"out": str(folder)} | more | settings))
    record = json.loads((folder / "record.json").read_text())
    assert validate(record) == []
    return record


def texts_of(fields):
    return np.split(fields["ids"], fields["offsets"][1:-1])


# ---- data ---------------------------------------------------------------------------------------


def test_the_reviews_that_a_teacher_is_sure_of():
    data = reviews.load(dataclasses.replace(SETTINGS, unlabelled=True))
    positive = np.random.default_rng(1).uniform(0, 1, len(MORE))
    positive[3], positive[5] = 0.8, 0.2
    found = data_reviews.taught(data, positive, 0.8)
    assert sorted(found.splits) == ["taught", "test", "train"] and found.sha256 == data.sha256
    before, after = texts_of(data.splits["unlabelled"]), texts_of(found.splits["taught"])
    sure = [n for n, p in enumerate(positive) if p >= 0.8 or p <= 0.2]
    assert {3, 5} <= set(sure) and 2 < len(sure) == len(after) < len(MORE)
    for n, own, label in zip(sure, after, found.splits["taught"]["label"], strict=True):
        np.testing.assert_array_equal(own, before[n])
        assert label == (positive[n] > 0.5)
    assert {array.dtype for array in found.splits["taught"].values()} == {
        array.dtype for array in found.splits["train"].values()
    }
    assert len(data_reviews.taught(data, positive, 0.5).splits["taught"]["label"]) == len(MORE)
    for wrong in (positive[1:], positive + 1, positive * np.nan):
        with pytest.raises(ValueError, match=r"^positive: got shape \[\d+\], expected \[20\] prob"):
            data_reviews.taught(data, wrong, 0.8)
    with pytest.raises(ValueError, match="^confidence: got 0.99, expected less: no answer is so"):
        data_reviews.taught(data, np.full(len(MORE), 0.9), 0.99)


def test_they_are_counted_and_trained_on_and_never_held_out():
    """Ratios against a count in plain loops."""
    config = dataclasses.replace(SETTINGS, unlabelled=True, normalise_embeddings=True)
    data = reviews.load(config)
    positive = np.random.default_rng(1).uniform(0, 1, len(MORE))
    found = data_reviews.taught(data, positive, 0.7)
    parts, runs = reviews.make_parts(config, found)
    plain, fewer = reviews.make_parts(SETTINGS, reviews.load(SETTINGS))
    size, more = len(SMALL["train"][0]), len(found.splits["taught"]["label"])
    assert parts["validation"].rows.tolist() == plain["validation"].rows.tolist()
    assert len(parts["validation"].rows) == HELD and runs >= fewer
    own = parts["train"]
    assert own.rows.tolist() == [*plain["train"].rows, *range(size, size + more)]
    assert "labelled_share" not in own.arrays
    fields = found.splits["train"], found.splits["taught"]
    texts = [text for one in fields for text in texts_of(one)]
    labels = np.concatenate([one["label"] for one in fields])
    assert own.arrays["label"].tolist() == labels.tolist()
    counts = np.ones((2, 80 + runs))
    for row in own.rows:
        words = [int(word) for word in texts[row]]
        seen = {word for word in words if word > 3}
        for length in (2, 3):
            for end in range(length, len(words) + 1):
                run = words[end - length : end]
                code = sum(w * 80 ** (length - 1 - k) for k, w in enumerate(run))
                place = np.searchsorted(own.known, code)
                if min(run) > 3 and place < runs and own.known[place] == code:
                    seen.add(80 + int(place))
        for feature in seen:
            counts[labels[row], feature] += 1
    counts[:, 0] = 1
    share = counts / counts[:, 1:].sum(axis=1, keepdims=True)
    want = np.log(share[1]) - np.log(share[0])
    want[0] = 0
    for part in parts.values():
        np.testing.assert_allclose(part.arrays["ratio"], want, rtol=2e-6, atol=1e-6)
    used = np.concatenate([texts[row] for row in own.rows])
    want = np.bincount(used, minlength=80) / len(used)
    np.testing.assert_allclose(own.arrays["frequency"], want, rtol=1e-6)
    assert not np.array_equal(own.arrays["frequency"], plain["train"].arrays.get("frequency"))


# ---- runs ---------------------------------------------------------------------------------------


def test_a_run_learns_from_the_answers_of_another(teacher, tmp_path, capsys, monkeypatch):
    """Its labels are what that run says of each review by itself."""
    make, seen = reviews.make_parts, []

    def watched(config, data):
        seen.append(data)
        return make(config, data)

    monkeypatch.setattr(reviews, "make_parts", watched)
    trained = read(teacher)
    answers = np.array([whole_reviewer.probability(trained, [text])[0] for text in MORE])
    confidence = float(np.mean(np.sort(np.maximum(answers, 1 - answers))[7:9]))
    record = train(tmp_path / "run", teacher, confidence=confidence)
    said = capsys.readouterr().out.splitlines()
    sure = np.maximum(answers, 1 - answers) >= confidence
    assert sure.sum() == 12
    taught = seen[0].splits["taught"]
    assert taught["label"].tolist() == (answers[sure] > 0.5).astype(int).tolist()
    assert "training on generated reviews" in said[0]
    assert said[1] == f"12 reviews without labels have those that {teacher} gives them"
    before = json.loads((teacher / "record.json").read_text())
    assert record["config"]["teacher_sha256"] == before["params_sha256"]
    assert record["params_sha256"] != before["params_sha256"] and "row" not in record
    assert record["dataset"]["sha256"] == seen[0].sha256
    other = train(tmp_path / "other", teacher, confidence=0.5)
    assert other["updates"] > record["updates"]
    # One that was taught can teach.
    again = train(tmp_path / "again", tmp_path / "run")
    assert again["config"]["teacher_sha256"] == record["params_sha256"]


def test_a_taught_run_is_given_away_without_its_teacher(teacher, tmp_path, capsys, monkeypatch):
    """docs/pretrained.md: by a path of this machine, which no record shows, and then it is away."""
    shutil.copytree(teacher, tmp_path / "runs" / "teacher")
    monkeypatch.chdir(tmp_path)
    record = train(tmp_path / "runs" / "taught", str(tmp_path / "runs" / "teacher"))
    card.make(card.Make("runs/taught", "given"))
    shutil.rmtree(tmp_path / "runs")
    capsys.readouterr()
    card.verify(card.Verify("given"))
    said = capsys.readouterr().out
    assert f"weights     params_sha256 {record['params_sha256'][:12]}: the record's" in said
    assert f"the record's {record['metrics']['test_accuracy']:.4f}" in said
    text = Path("given", "MODEL_CARD.md").read_text()
    assert f"params_sha256 {record['config']['teacher_sha256']}." in text
    assert "| examples | train 43, validation 9, test 30, unlabelled 20 |" in text
    assert "of 30 reviews, 95 % interval" in text


def test_a_stopped_run_goes_on_to_the_same_bits(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(reviews, "PIECE", 2)
    record = train(tmp_path / "whole", teacher)
    add, added = reviews.train.Tally.add, []

    def stop(tally, metrics):
        add(tally, metrics)
        added.append(metrics)
        if len(added) == 1:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(reviews.train.Tally, "add", stop)
    with pytest.raises(RunStopped, match="by SIGTERM and saved"):
        train(tmp_path / "run", teacher)
    monkeypatch.setattr(reviews.train.Tally, "add", add)
    again = train(tmp_path / "run", teacher, out=None, resume=str(tmp_path / "run"))
    assert again["params_sha256"] == record["params_sha256"] and again["resumed"] == 1


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"seed": 3}, "is a run with seed 2, expected 3"),
        ({"validation_size": 8}, "is a run with validation_size 9, expected 8"),
        ({"hold_out": "random"}, "is a run with hold_out alike, expected random"),
        ({"max_length": 49}, "is a run with max_length 50, expected 49"),
        ({"limit": 40}, "is a run with limit None, expected 40"),
        ({"batch_segments": 4}, "is a run with tokens_read 50, expected 28"),
        ({"chop": 3}, "^--teacher: .* is a run with tokens_read 50, expected 33"),
        ({"teacher_sha256": "0" * 64}, "^--teacher-sha256: got 0{64}, expected [0-9a-f]{64}, of"),
        ({"confidence": 0.999999}, "^confidence: got 0.999999, expected less"),
    ],
)
def test_who_cannot_teach(settings, text, teacher, tmp_path):
    with pytest.raises((RunError, ConfigError, ValueError), match=text):
        train(tmp_path / "run", teacher, **settings)
    assert not (tmp_path / "run").exists()


def test_alike_is_told_by_the_tokens_that_are_read():
    """So that runs that read more or less of a review hold out others."""
    held = []
    for batch_segments in (11, 4, 8):
        config = dataclasses.replace(SETTINGS, batch_segments=batch_segments)
        parts, _ = reviews.make_parts(config, reviews.load(config))
        held.append(set(parts["validation"].rows.tolist()))
    assert [len(own) for own in held] == [HELD] * 3
    assert len(held[0] & held[1]) < HELD and held[0] == held[2]


@pytest.mark.parametrize("hold_out", ["random", "alike"])
def test_who_reads_less_cannot_teach_however_is_held_out(hold_out, teacher, tmp_path):
    own = tmp_path / "short"
    shutil.copytree(teacher, own)
    with_settings(batch_segments=4, hold_out=hold_out)(own)
    with pytest.raises(RunError, match="^--teacher: .*is a run with tokens_read 28, expected 50$"):
        train(tmp_path / "run", own, hold_out=hold_out)


def test_who_reads_as_much_in_other_chops_can_teach(teacher):
    config = dataclasses.replace(SETTINGS, unlabelled=True, teacher=str(teacher), confidence=0.5)
    config = dataclasses.replace(config, chop=0, batch_segments=3)
    data, _, (of_teacher,) = reviews.answered(config, reviews.load(config))
    assert len(data.splits["taught"]["label"]) == len(MORE)
    assert (of_teacher.chop, of_teacher.tokens_read, config.tokens_read) == (7, 50, 50)


def test_recorded_runs_have_in_common_what_they_have_to():
    folder, found = Path(__file__).parents[1] / "experiments" / "results", []

    def settings(name):
        return reviews.Config(**json.loads((folder / name).read_text())["config"])

    for path in sorted(folder.glob("reviews-taught-seed*.json")):
        teacher = f"teachers/{path.name.replace('taught', 'ratios')}"
        found.append((settings(path.name), settings(teacher), reviews.HELD_OUT))
    for path in sorted(folder.glob("reviews-pretrained-seed*.json")):
        before = settings(path.name.replace("pretrained", "language"))
        found.append((settings(path.name), before, (*reviews.COMMON, "tokens_read")))
    assert len(found) >= 11
    for config, before, names in found:
        reviews.check(config)
        assert config.hold_out == "alike" and config.tokens_read == 1_000
        assert [getattr(config, name) for name in names] == [getattr(before, n) for n in names]


def test_a_folder_that_cannot_teach(teacher, tmp_path):
    def refused(folder, text):
        with pytest.raises(RunError, match=f"^--teacher: .*{text}"):
            train(tmp_path / "run", folder)
        assert not (tmp_path / "run").exists()

    refused(tmp_path / "none", "expected the folder of a finished run")
    own = tmp_path / "damaged"
    shutil.copytree(teacher, own)
    weights = load_file(own / "params.safetensors")
    save_file(weights | {"bias": weights["bias"] * np.nan}, own / "params.safetensors")
    refused(own, "is damaged: its weights give no number")
    shutil.copy(teacher / "params.safetensors", own)
    words = (own / "vocabulary.txt").read_text().split("\n")
    (own / "vocabulary.txt").write_text("\n".join([words[0], *words[:0:-1]]))
    refused(own, "is not the vocabulary of the reviews here")
    (own / "vocabulary.txt").unlink()
    refused(own, "cannot read .*vocabulary.txt: No such file")
    config = json.loads((own / "config.json").read_text()) | {"task": "language"}
    (own / "config.json").write_text(json.dumps(config | {"ratio_inputs": False, "path_order": 2}))
    refused(own, "is a run of --task language, expected sentiment")


# ---- the row ------------------------------------------------------------------------------------


def test_the_row_of_a_taught_run():
    """It is that of reviews-ratios with a teacher, who is a run of reviews-ratios."""
    ratios = dataclasses.replace(reviews.ROWS["reviews-ratios"], seed=3, out="a")
    asked = {"teacher": "a", "teacher_sha256": "e" * 64, "unlabelled": True}
    asked |= {"confidence": 0.5, "epochs": 2}
    config = dataclasses.replace(ratios, **asked | {"out": "b"})
    assert reviews.row_of(ratios, []) == "reviews-ratios"
    assert reviews.row_of(config, [ratios]) == "reviews-taught"
    assert reviews.row_of(dataclasses.replace(config, confidence=0.7), [ratios]) is None
    assert reviews.row_of(config, [dataclasses.replace(ratios, epochs=3)]) is None
    assert reviews.row_of(config, [config]) is None and reviews.row_of(config, []) is None


def test_a_command_with_a_folder_of_its_own():
    for command in ("python a.py --teacher runs/x --seed 1", "python a.py --teacher=runs/x --b"):
        found = provenance.with_value(command, "DIR", "--teacher", "--pretrained")
        assert found == command.replace("runs/x", "DIR")
    assert provenance.with_value("python a.py --teacher", "DIR", "--b") == "python a.py --teacher"


def groups(seeds=(4, 5)):
    """What reproduce.py knows: records of both rows."""
    first = dataclasses.replace(reviews.ROWS["reviews-ratios"], data="tfds")
    then = dataclasses.replace(
        first, unlabelled=True, teacher="runs/old", teacher_sha256="e" * 64, epochs=2
    )
    found = {}
    for row, config in (("reviews-ratios", first), ("reviews-taught", then)):
        records = tuple(
            {
                "experiment": "reviews", "seed": seed, "config": dataclasses.asdict(config),
                "metrics": {"test_accuracy": 0.5}, "dataset": {"source": "tfds"},
                "seconds": {"compile": 1.0, "train": 50.0, "eval": 9.0},
                "environment": {"devices": 2},
            }
            for seed in seeds
        )  # fmt: skip
        found[row] = tables.Group(row, "lstmjax", records, ())
    return found


def test_a_row_that_goes_on_is_repeated_after_the_other(tmp_path, monkeypatch):
    known, asked, done = groups(), [], []
    out = tmp_path / "reviews-taught"
    words = reproduce.command(known["reviews-taught"], reproduce.Config(seed=7), out)
    assert f"--teacher={tmp_path}/reviews-ratios-seed7" in words and "--seed=7" in words
    assert not [w for w in words if "e" * 64 in w or "runs/old" in w]

    def repeat(group, config, out, limit):
        asked.append((group.row, config.seed, out.name))
        done.append(out)
        return {} if len(done) > 1 else None

    monkeypatch.setattr(reproduce, "repeat", repeat)
    taught, end = known["reviews-taught"], float("inf")
    assert not reproduce.repeat_first(taught, known, reproduce.Config(), out, end)  # cut short
    assert reproduce.repeat_first(taught, known, reproduce.Config(), out, end)
    assert asked == [("reviews-ratios", 4, "reviews-ratios-seed4")] * 2
    assert not reproduce.repeat_first(taught, known, reproduce.Config(), out, 0.0)  # no time
    assert reproduce.repeat_first(known["reviews-ratios"], known, reproduce.Config(), out, 0.0)
    assert len(asked) == 2
    del known["reviews-ratios"]
    with pytest.raises(RunError, match="^reviews-taught goes on from reviews-ratios, of which"):
        reproduce.repeat_first(taught, known, reproduce.Config(), out, end)
