"""Scores of a run, epoch by epoch."""

import json

from lstmjax.records import Run
from lstmjax.scores import Scores


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
