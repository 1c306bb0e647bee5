"""Scores of a run, epoch by epoch."""

import json
import math

import numpy as np

from lstmjax.records import Run
from lstmjax.scores import Scores, means


def test_scores_are_logged_recorded_and_drawn(tmp_path):
    with Run.create("x", {}, out=str(tmp_path / "run")) as folder:
        scores = Scores(folder)
        for epoch, (loss, accuracy) in enumerate([(0.7, 0.5), (0.4, 0.8)], start=1):
            scores.add("validation", 10 * epoch, epoch, {"loss": loss, "accuracy": accuracy})
        scores.add("test", 20, 2, {"accuracy": 0.75})
    assert scores.metrics() == {
        "validation_loss": 0.4,
        "validation_loss_epochs": [0.7, 0.4],
        "validation_accuracy": 0.8,
        "validation_accuracy_epochs": [0.5, 0.8],
        "test_accuracy": 0.75,
        "test_accuracy_epochs": [0.75],
    }
    assert scores.curves("accuracy") == {
        "validation": ([1, 2], [0.5, 0.8]),
        "test": ([2], [0.75]),
    }
    assert scores.curves("loss") == {"validation": ([1, 2], [0.7, 0.4])}
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 10, "epoch": 1, "validation_loss": 0.7, "validation_accuracy": 0.5},
        {"step": 20, "epoch": 2, "validation_loss": 0.4, "validation_accuracy": 0.8},
        {"step": 20, "epoch": 2, "test_accuracy": 0.75},
    ]


def test_steps_that_were_all_skipped_have_no_mean(tmp_path):
    none, one = np.zeros(2, np.float32), np.ones(2, np.float32)
    found = means({"loss": (none, none), "accuracy": (one, 2 * one)})
    assert math.isnan(found["loss"]) and found["accuracy"] == 0.5
    with Run.create("x", {}, out=str(tmp_path / "run")) as folder:
        scores = Scores(folder)
        scores.add("train", 2, 1, found)
    # As it comes back from a checkpoint, for the record and to be drawn.
    scores.epochs = {"train": {"loss": [[1, "nan"], [2, 0.5]]}}
    values = scores.metrics()["train_loss_epochs"]
    assert math.isnan(values[0]) and values[1:] == [0.5] == scores.curves("loss")["train"][1][1:]
    assert math.isnan(scores.curves("loss")["train"][1][0])
