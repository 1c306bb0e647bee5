"""lstmjax.classifier: what it trains, chooses and tests, on the model of experiments/smnist.py.

The digits are random ones of six pixels, learned so fast that the best epoch is not the last.
"""

import contextlib
import dataclasses
import importlib.util
import json
import signal
import sys
from pathlib import Path

import jax
import numpy as np
import oracle
import pytest
from safetensors.numpy import load_file

from lstmjax import LSTMParams, classifier, seeds
from lstmjax.cli import ConfigError
from lstmjax.data.dataset import content_sha256, make_dataset
from lstmjax.lane_classifiers import Split
from lstmjax.records import Run, RunError, RunStopped, validate

ROOT = Path(__file__).parents[1]
T = 6


def script(name):
    """An experiment as a module."""
    spec = importlib.util.spec_from_file_location(f"{name}_here", ROOT / f"experiments/{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclass looks for its annotations
    spec.loader.exec_module(module)
    return module


smnist = script("smnist")
FAST = smnist.Config(
    hidden_size=5, batch_size=16, epochs=5, learning_rate=0.1, schedule="constant",
    seed=3, devices=1, save_every="1000",
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def as_in_a_script():
    assert len(jax.devices()) > 1  # before a run asks for a single one
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam needs it
        yield


def make_splits(shape=(T, 1), test_seed=7):
    """Images whose pixels say what they show, but for noise."""
    splits = {}
    for split, count, seed in (("train", 60, 1), ("validation", 30, 2), ("test", 45, test_seed)):
        rng = np.random.default_rng(seed)
        label = rng.integers(0, 10, count).astype(np.int32)
        noise = rng.integers(0, 700, (count, *shape))
        said = 30 * label.reshape(-1, *[1] * len(shape)) * np.arange(1, shape[0] + 1)[:, None] // 6
        splits[split] = {"image": (noise + said).astype(np.uint16), "label": label}
    return splits


def digits(**options):
    splits = make_splits(**options)
    return smnist.Digits("six pixels", "six", "generated", content_sha256(splits), splits)


def train(folder, data=None, row=None, files=None, problem=(), **settings):
    """Runs it; returns the record and the lines of metrics.jsonl."""
    config = dataclasses.replace(FAST, out=str(folder), **settings)
    data = digits() if data is None else data
    task = smnist.make_problem(config, data)._replace(**dict(problem))
    classifier.classify("smnist", config, task, data, row=row, files=files)
    return opened(config.resume or folder)


def opened(folder):
    record = json.loads((Path(folder) / "record.json").read_text())
    assert validate(record) == []
    return record, (Path(folder) / "metrics.jsonl").read_text().splitlines()


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Runs of seeds 3 and 4: (folder, record, lines) each."""
    runs, root = {}, tmp_path_factory.mktemp("alone")
    for seed in (3, 4):
        runs[seed] = root / str(seed), *train(root / str(seed), seed=seed)
    return runs


def scores_of(folder, split):
    """Accuracy and loss of a run's weights on a split, by NumPy in float64."""
    weights = load_file(folder / "params.safetensors")
    of_layer = [weights[f"layer_0.weights.{name}"].astype(float) for name in ("w_x", "w_h", "b")]
    xs = np.swapaxes(split["image"] / 1020.0, 0, 1)
    state = np.zeros((2, xs.shape[1], FAST.hidden_size))
    (h, _), _ = oracle.lstm(LSTMParams(*of_layer), xs, tuple(state))
    logits = h @ weights["head.kernel"].astype(float) + weights["head.bias"].astype(float)
    right = logits[np.arange(len(h)), split["label"]]
    loss = np.log(np.sum(np.exp(logits), axis=1)) - right
    return np.mean(np.argmax(logits, axis=1) == split["label"]), np.mean(loss)


def test_the_weights_of_the_best_epoch_are_left_and_tested_once(alone, tmp_path):
    for folder, record, lines in alone.values():
        metrics, splits = record["metrics"], digits().splits
        found, epoch = metrics["validation_accuracy_epochs"], metrics["best_epoch"]
        assert len(found) == 5 and epoch < 5  # else nothing is shown here
        assert max(found) == found[epoch - 1] == metrics["best_validation_accuracy"]
        assert max(found[: epoch - 1], default=-1) < found[epoch - 1]
        for split, prefix in (("test", "test"), ("validation", "best_validation")):
            accuracy, loss = scores_of(folder, splits[split])
            assert metrics[f"{prefix}_accuracy"] == pytest.approx(accuracy, abs=1e-6)
            assert metrics[f"{prefix}_loss"] == pytest.approx(loss, rel=1e-5)
        assert metrics["test_accuracy_epochs"] == [metrics["test_accuracy"]]
        assert sum("test_" in line for line in lines) == 1 and "test_" in lines[-1]

    # They are those of a run that ends there.
    record = alone[3][1]
    last = {"select": False}
    ended, _ = train(tmp_path / "b", problem=last, epochs=record["metrics"]["best_epoch"])
    assert ended["params_sha256"] == record["params_sha256"]
    assert ended["metrics"]["test_loss"] == record["metrics"]["test_loss"]
    assert "best_epoch" not in ended["metrics"]


def test_nothing_depends_on_the_test_images(alone, tmp_path):
    _, record, lines = alone[3]
    other, changed = train(tmp_path / "run", data=digits(test_seed=8))
    assert other["params_sha256"] == record["params_sha256"]
    assert changed[:-1] == lines[:-1] and changed[-1] != lines[-1]


def test_without_validation_the_last_weights_count(alone, tmp_path):
    data = digits()
    splits = {name: Split.whole(data.splits[name]) for name in ("train", "test")}
    record, lines = train(tmp_path / "a", problem={"splits": splits})
    _, selected, others = alone[3]
    assert "validation_accuracy" not in record["metrics"] and "best_epoch" not in record["metrics"]
    assert record["metrics"]["train_loss_epochs"] == selected["metrics"]["train_loss_epochs"]
    assert record["params_sha256"] != selected["params_sha256"]
    accuracy, _ = scores_of(tmp_path / "a", data.splits["test"])
    assert record["metrics"]["test_accuracy"] == pytest.approx(accuracy, abs=1e-6)


@pytest.mark.parametrize(
    ("accuracies", "losses", "epoch"),
    [
        ([0.1, 0.3, 0.2], [1, 1, 1], 2),
        ([0.3, 0.1, 0.3], [2, 1, 1], 1),  # of equal ones the first
        ([0.3, 0.1, 0.2], ["nan", 1, 1], 3),
        ([0.3, 0.0, 0.2], [np.nan, 1, np.inf], 2),
        ([0.3, 0.4], [np.nan, np.nan], 1),
    ],
)
def test_the_best_epoch(accuracies, losses, epoch):
    found = {"validation_accuracy_epochs": accuracies, "validation_loss_epochs": losses}
    assert classifier.best_epoch(found) == epoch


def test_updates_are_counted():
    task = smnist.make_problem(FAST, digits())
    for size, whole in ((16, 4), (15, 4), (60, 1), (61, 1), (7, 9)):
        config = dataclasses.replace(FAST, batch_size=size)
        assert task.updates(config) == 5 * whole
        full = task._replace(drop_remainder=True).updates(config)
        assert full == 5 * (60 // size)


# ---- many lanes ---------------------------------------------------------------------------------


def close(got, want):
    assert got.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def test_seeds_are_the_runs_they_stand_for(alone, tmp_path):
    record, lines = train(tmp_path / "both", seeds=2, devices=2, files={"notes.txt": b"mine"})
    assert (tmp_path / "both" / "notes.txt").read_bytes() == b"mine"
    for own in seeds.apart(record):
        folder, single, _ = alone[own["seed"]]
        close(own["metrics"], single["metrics"])
        got = load_file(tmp_path / "both" / f"params-seed{own['seed']}.safetensors")
        close(got, load_file(folder / "params.safetensors"))
    assert record["metrics"]["best_epoch"] == [
        alone[seed][1]["metrics"]["best_epoch"] for seed in (3, 4)
    ]
    assert sum("test_" in line for line in lines) == 1


def test_a_sweep_is_decided_by_the_best_epochs_on_validation(alone, tmp_path, capsys):
    """A step size of 1e-5 learns nothing, one of 3e38 comes to NaN."""
    record, lines = train(tmp_path / "run", sweep="lr=1e-5,0.1,3e38", devices=2)
    metrics, single = record["metrics"], alone[3][1]["metrics"]
    assert metrics["sweep_chosen_lr"] == 0.1 and metrics["best_epoch"] == [single["best_epoch"]]
    found = metrics["sweep_validation_accuracy_mean"]
    assert found[1] == pytest.approx(single["best_validation_accuracy"], abs=1e-6)
    assert found[0] < found[1] and found[2] == "nan"
    assert metrics["test_loss"][0] == pytest.approx(single["test_loss"], rel=1e-5)
    assert "chosen by validation_accuracy: lr 0.1" in capsys.readouterr().out
    scored = [json.loads(line) for line in lines if "test_accuracy" in line]
    assert [set(line) - {"step", "epoch"} for line in scored] == [
        {f"test_{name}{lane}" for name in ("accuracy", "loss") for lane in ("", "/lr0.1-seed3")}
    ]


# ---- going on -----------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{"devices": 2}, {"seeds": 2}])
def test_a_stopped_run_goes_on_to_the_same_bits(settings, tmp_path, monkeypatch):
    """It is stopped after its best epoch, so that the best weights have to be kept."""
    settings |= {"problem": {"at_most": 1}}  # a piece is an update, and an epoch four
    whole, lines = train(tmp_path / "whole", **settings)
    assert max(np.ravel(whole["metrics"]["best_epoch"])) < 4
    add, added = classifier.train.Tally.add, []

    def stop(tally, metrics):
        add(tally, metrics)
        added.append(metrics)
        if len(added) == 14 * settings.get("seeds", 1):  # in the fourth epoch, in the last lane
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(classifier.train.Tally, "add", stop)
    with pytest.raises(RunStopped, match="stopped at step 14 by SIGTERM and saved"):
        train(tmp_path / "run", **settings)
    assert not (tmp_path / "run" / "record.json").exists()
    monkeypatch.undo()
    again, more = train(None, resume=str(tmp_path / "run"), **settings)
    assert again["params_sha256"] == whole["params_sha256"]
    assert again["metrics"] == whole["metrics"] and more == lines
    assert again["resumed"] == 1
    if "seeds" not in settings:  # of all epochs, those before it was stopped, too
        ends = again["seconds"]["train_epochs"]
        assert len(ends) == 5 and ends == sorted(ends)
        assert ends[-1] == pytest.approx(again["seconds"]["train"])


@contextlib.contextmanager
def killed_at_its_end(monkeypatch):
    """Ends what is run before its record is written, after all else."""

    class Kill(BaseException):
        pass

    def kill(*_, **__):
        raise Kill

    with monkeypatch.context() as patch, pytest.raises(Kill):
        patch.setattr(Run, "finish", kill)
        yield


@pytest.mark.parametrize("settings", [{}, {"seeds": 2}])
def test_a_run_that_was_cut_off_at_its_end_knows_its_updates_and_its_data(
    settings, tmp_path, monkeypatch
):
    folder, settings = tmp_path / "run", settings | {"epochs": 1}
    with killed_at_its_end(monkeypatch):
        train(folder, **settings)
    other = digits(test_seed=8)
    with pytest.raises(RunError) as error:
        train(None, data=other, resume=str(folder), **settings)
    was, now = (data.sha256[:12] for data in (digits(), other))
    assert str(error.value) == (
        f"--resume: {folder} was trained on six (generated, sha256 {was}), "
        f"got six (generated, sha256 {now})"
    )
    record, _ = train(None, resume=str(folder), **settings)
    assert record["updates"] == 4 and record["resumed"] == 1


# ---- beside imdb.py -----------------------------------------------------------------------------


def reviews():
    """Reviews of six words whose ids say what they are, but for noise."""
    splits = {}
    for split, count, seed in (("train", 60, 1), ("validation", 30, 2), ("test", 45, 3)):
        rng = np.random.default_rng(seed)
        label = rng.integers(0, 2, count).astype(np.int32)
        ids = rng.integers(4, 12, (count, T)) + 4 * label[:, None]
        lengths = np.full(count, T, np.int32)
        splits[split] = {"ids": ids.astype(np.int32), "lengths": lengths, "label": label}
    return make_dataset("sin", "generated", splits, ("a", "b"))


@pytest.mark.parametrize("drop_remainder", [False, True])
def test_the_loop_is_that_of_imdb_py(drop_remainder, tmp_path, monkeypatch, capsys):
    """The same lines, metrics and weights, of its model, its loss and its settings."""
    imdb, data = script("imdb"), reviews()
    config = imdb.Config(
        vocabulary_size=20, max_length=T, embedding_size=3, hidden_size=4, batch_size=16, epochs=2,
        learning_rate=0.05, dropout=0.2, devices=2, validation_size=30, test_every_epoch=True,
        seed=4, on_nan="skip", clip_norm=1, drop_remainder=drop_remainder,
    )  # fmt: skip
    monkeypatch.setattr(imdb.imdb, "load", lambda *_, **__: data)
    imdb.run(dataclasses.replace(config, out=str(tmp_path / "a")))
    theirs = capsys.readouterr().out

    model = imdb.make_model(config)
    splits = {
        name: {field: fields[field] for field in ("ids", "label")}
        for name, fields in data.splits.items()
    }
    task = classifier.Problem(
        imdb.make_loss(model, config),
        lambda key: model.init(key, data.splits["train"]["ids"][:1])["params"],
        imdb.make_optimiser,
        {name: Split.whole(fields) for name, fields in splits.items()},
        "reviews",
        lambda few: imdb.diagnose.OFF,
        test_every_epoch=True,
        drop_remainder=drop_remainder,
    )
    here = dataclasses.replace(config, out=str(tmp_path / "b"))
    classifier.classify("imdb", here, task, data, row=None)
    (record, lines), (other, others) = (opened(tmp_path / name) for name in "ab")
    assert lines == others and record["metrics"] == other["metrics"]
    assert record["params_sha256"] == other["params_sha256"]
    assert theirs.replace(str(tmp_path / "a"), str(tmp_path / "b")) == capsys.readouterr().out


def test_imdb_py_knows_its_updates_and_its_data_too(tmp_path, monkeypatch):
    imdb, data = script("imdb"), [reviews()]
    config = imdb.Config(
        vocabulary_size=20, max_length=T, embedding_size=3, hidden_size=4, num_layers=1,
        batch_size=16, epochs=1, devices=1, validation_size=30, out=str(tmp_path / "run"),
    )  # fmt: skip
    monkeypatch.setattr(imdb.imdb, "load", lambda *_, **__: data[0])
    with killed_at_its_end(monkeypatch):
        imdb.run(config)
    again = dataclasses.replace(config, resume=config.out)
    label = 1 - data[0].splits["test"]["label"]
    splits = data[0].splits | {"test": data[0].splits["test"] | {"label": label}}
    data.insert(0, make_dataset("sin", "generated", splits, ("a", "b")))
    with pytest.raises(RunError, match=f"^--resume: {tmp_path}/run was trained on sin .generated"):
        imdb.run(again)
    data.pop(0)
    imdb.run(again)
    assert opened(tmp_path / "run")[0]["updates"] == 3


def test_a_batch_that_is_never_full_is_named(tmp_path):
    with pytest.raises(ConfigError, match="^--batch-size: got 61, expected at most 60, the train"):
        train(tmp_path / "run", problem={"drop_remainder": True}, batch_size=61)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("seeds", [1, 2])
def test_the_schedule_is_as_long_as_the_run(seeds, tmp_path):
    """A step size that falls to 0 does so after the last update, and not after an epoch."""
    seen = []

    def optimiser(config, updates):
        seen.append(updates)
        return smnist.make_optimiser(config, updates)

    settings = {"schedule": "cosine", "seeds": seeds, "problem": {"optimiser": optimiser}}
    train(tmp_path / "a", **settings)
    assert set(seen) == {5 * 4}
