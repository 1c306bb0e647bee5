"""lstmjax/overview_tables.py: a line for every row, from records with known numbers."""

import json

import numpy as np
import pytest
from scipy import stats
from tiny_records import SHA, write_record

from lstmjax import overview_tables, rows, tables

LONG = {
    "task": "adding", "length": 1000, "cells": "lstm,gru", "seeds": 3, "seed": 0,
    "eval_every": 200, "batch_size": 50, "updates": 6000,
}  # fmt: skip


def half(values):
    """Of the 95 % interval, by SciPy."""
    low, high = stats.t.interval(
        0.95, len(values) - 1, loc=np.mean(values), scale=stats.sem(values)
    )
    return (high - low) / 2


@pytest.fixture
def folder(tmp_path):
    """Records of two programs, one of them with two hold-outs for each seed, and of a peer."""
    for seed, accuracy, held in ((0, 0.81, 0.80), (1, 0.85, 0.83), (2, 0.82, 0.84)):
        metrics = {"test_accuracy": accuracy, "validation_accuracy": held}
        size = {"parameters": 1_234_567, "updates": 700 + seed}
        write_record(tmp_path, seed, 0, [], 10.0 + seed, metrics=metrics, **size)
        metrics = {"test_accuracy": 0.9, "validation_accuracy": [0.5 + seed / 10, 0.6]}
        command = f"python experiments/baselines.py --seed {seed} --ngrams 3 --out x"
        other = {"experiment": "baselines", "row": "baseline-nbsvm-3", "command": command}
        write_record(tmp_path, seed, 0, [], 1.0, metrics=metrics, **other)
    peer = {"row": "imdb-tf2", "framework": "keras 3.15"}
    metrics = {"test_accuracy": 0.7}
    write_record(tmp_path, 5, 0, [], 80.0, experiment="peers", peer=peer, metrics=metrics)
    return tmp_path


def long_lag(folder):
    metrics = {
        "lstm_solved_at": [float("inf")] * 3, "lstm_updates": [200, 6000],
        "lstm_train_seconds": 30.0, "lstm_test_loss": [0.2, 0.2, 0.1], "lstm_test_wrong": [0.9] * 3,
        "gru_solved_at": [1000, 1400, float("inf")], "gru_updates": [200, 4000],
        "gru_train_seconds": 6.0, "gru_test_loss": [0.009, 0.011, 0.2],
        "gru_test_wrong": [0.3, 0.3, 0.9], "baseline_loss": 1 / 6,
    }  # fmt: skip
    command = "python experiments/long_lag.py --preset adding-1000 --seeds 3"
    record = write_record(
        folder, 9, 0, [], 36.0, experiment="long_lag", config=LONG, metrics=metrics, command=command
    )
    return [tables.Group("long_lag", "lstmjax", (json.loads(json.dumps(record)),), ("l.json",))]


def cells_of(lines, start):
    (line,) = [line for line in lines if line.startswith(f"| {start} |")]
    names = [cell.strip() for cell in lines[4].strip("|").split("|")]
    return dict(zip(names, [cell.strip() for cell in line.strip("|").split("|")], strict=True))


def test_every_row_has_its_line(folder):
    lines = overview_tables.section(tables.load_groups(folder), [])
    assert lines[0] == "## all rows" and len(lines) == 8
    found = cells_of(lines, "imdb-tf2")
    assert found == {
        "row": "imdb-tf2",
        "command": "`python experiments/imdb.py`",
        "parameters": "1,234,567",
        "updates": "700–702",
        "seeds": "3",
        "validation": f"0.8233 ± {half([0.80, 0.83, 0.84]):.4f}",
        "test, ± 95 %": f"0.8267 ± {half([0.81, 0.85, 0.82]):.4f}",
        "published": "–",
        "train s": "11",
        "device": "Processor X",
        "records": "[imdb-0](experiments/results/imdb-0.json) to imdb-2",
    }
    found = cells_of(lines, "baseline-nbsvm-3")
    assert found["validation"] == f"0.6000 ± {half([0.55, 0.6, 0.65]):.4f}"
    assert found["test, ± 95 %"] == "0.9000 ± 0.0000"
    assert found["command"] == "`python experiments/baselines.py --ngrams 3`"
    assert (found["parameters"], found["published"]) == ("–", "0.9182 (Mesnil et al., 2014)")


def test_one_seed_has_no_interval(tmp_path):
    metrics = {"test_accuracy": 0.7, "validation_accuracy": 0.2, "best_validation_accuracy": 0.8}
    write_record(tmp_path, 4, 0, [], 10.0, metrics=metrics)
    found = cells_of(overview_tables.section(tables.load_groups(tmp_path), []), "imdb-tf2")
    assert (found["validation"], found["test, ± 95 %"]) == ("0.8000", "0.7000")
    assert found["records"] == "[imdb-4](experiments/results/imdb-4.json)"


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({}, "5.250"),
        ({"best_epoch": 2, "validation_loss_epochs": [5.5, 5.125, 5.25]}, "5.125"),
        ({"best_epoch": 2, "best_validation_loss": 5.0}, "5.000"),
    ],
)
def test_validation_is_of_the_metric_that_is_tested(more, expected, tmp_path):
    metrics = {
        "test_loss": 5.0625, "test_accuracy": 0.2, "validation_loss": 5.25,
        "validation_accuracy": 0.1, "best_validation_accuracy": 0.15,
    }  # fmt: skip
    write_record(tmp_path, 0, 0, [], 1.0, row="reviews-language", metrics=metrics | more)
    found = cells_of(overview_tables.section(tables.load_groups(tmp_path), []), "reviews-language")
    assert (found["validation"], found["test, ± 95 %"]) == (expected, "5.062")
    own = {"mse": 0.5, "validation_loss": 0.25, "validation_accuracy": 0.75}
    write_record(tmp_path, 0, 0, [], 1.0, row="sin-tf1", experiment="sin", metrics=own)
    found = cells_of(overview_tables.section(tables.load_groups(tmp_path), []), "sin-tf1")
    assert (found["validation"], found["test, ± 95 %"]) == ("–", "0.50000")


def test_long_lags_are_solved_or_not(folder):
    lines = overview_tables.section([], long_lag(folder))
    title = "l: adding problem, T = 1,000"
    found = cells_of(lines, f"{title}, lstm")
    assert found["validation"] == found["test, ± 95 %"] == "solved by 0 of 3"
    assert found["updates"] == "6,000"
    assert found["train s"] == "10" and found["command"].endswith("--preset adding-1000`")
    assert found["published"].startswith("1 of 2,560 wrong after 853,000 (Hochreiter")
    found = cells_of(lines, f"{title}, gru")
    assert found["test, ± 95 %"] == "solved by 1 of 3"
    assert found["validation"] == f"solved by 2 of 3 at 1,200 ± {half([1000, 1400]):,.0f}"
    assert (found["train s"], found["updates"]) == ("2", "4,000")


def test_the_best_rows_are_those_that_were_run(folder, monkeypatch):
    groups = tables.load_groups(folder)
    text = overview_tables.best(groups, long_lag(folder))
    assert len(text.splitlines()) == 3  # the other one is none of the first rows
    title = rows.ROWS["imdb-tf2"].title
    assert f": {title}, test accuracy | 3 | 0.8267 ± " in text.splitlines()[2]
    assert text.endswith("| 11 | [imdb-0](experiments/results/imdb-0.json) |")
    first = ("adding problem, T = 1,000", "baseline-nbsvm-3", "sin-tf1", "imdb-tf2")
    monkeypatch.setattr(overview_tables, "FIRST", first)
    lines = overview_tables.best(groups, []).splitlines()[2:]
    assert [line[3:].partition("]")[0] for line in lines] == ["baseline-nbsvm-3", "imdb-tf2"]
    assert len(overview_tables.best(groups, [], count=1).splitlines()) == 3


def test_generated_data_is_none_of_the_best(tmp_path):
    offline = {"name": "offline_reviews", "source": "offline", "sha256": "1" * 64}
    write_record(tmp_path, 0, 0.83, [0.83], 9.0)
    write_record(tmp_path, 1, 0.99, [0.99], 9.0, dataset=offline)
    groups = tables.load_groups(tmp_path)
    assert len(groups) == 2
    for ordered in (groups, groups[::-1]):
        (line,) = overview_tables.best(ordered, []).splitlines()[2:]
        assert "0.83" in line and "0.99" not in line


def test_the_first_rows_are_rows():
    assert set(rows.FIRST) <= set(rows.ROWS) and len(set(rows.FIRST)) == len(rows.FIRST)


def test_headings_are_found_by_their_links(folder):
    """As GitHub makes anchors: lower case, blanks to hyphens, marks away."""
    groups = tables.load_groups(folder)
    text = tables.benchmarks(groups)
    assert f"## baseline-nbsvm-3: {rows.ROWS['baseline-nbsvm-3'].title}" in text
    assert overview_tables._anchor("sin-tf1", "cos from sin, one LSTM(10), 1 × 2") == (
        "sin-tf1-cos-from-sin-one-lstm10-1--2"
    )
    assert SHA[:12] in text
