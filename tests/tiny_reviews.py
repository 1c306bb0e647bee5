"""A few reviews, tiny settings of experiments/reviews.py, and folders of its runs made by hand."""

import dataclasses
import importlib
import json
import sys
from pathlib import Path

import jax
import numpy as np

from lstmjax import checkpoint, review_model, whole_reviewer
from lstmjax.data import offline
from lstmjax.records import to_json

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "experiments"))
experiment = importlib.import_module("reviews")

SMALL = offline.reviews({"train": 52, "test": 30})
MORE = offline.reviews({"unlabelled": 20}, seed=7)["unlabelled"][0]
FAST = experiment.Config(
    data="offline", vocabulary_size=80, max_length=50, chop=7, batch_segments=11, embedding_size=4,
    hidden_size=3, epochs=8, learning_rate=0.05, schedule="constant", average=0.0,
    validation_size=0, select="last", devices=1, save_every="1000", word_dropout=0.0,
    embedding_dropout=0.2,
)  # fmt: skip
RUNS = {"pairs_size": 30, "min_count": 2}  # of what counts runs of words


def read(folder):
    return whole_reviewer.read(folder, experiment.Config, experiment.check, experiment.make_model)


WORDS = "<unused> the a film was good bad not it all i loved hated . , <br never".split()


def write_run(folder, value=None, **changes):
    """The folder of a run, of random weights, or weights all alike."""
    config = dataclasses.replace(FAST, vocabulary_size=20, max_length=12, **changes)
    draw = np.random.default_rng(3)
    pairs = [(4, 7), (6, 8), (8, 9), (10, 14), (19, 4)] if config.pairs != "none" else []
    counted = {"known": np.array([20 * a + b for a, b in pairs], np.int64)} if pairs else {}
    if config.pairs == "path":
        counted["ratio"] = np.append([0], draw.normal(0, 1, 24)).astype("f4")
    if config.normalise_embeddings:
        counted["frequency"] = draw.dirichlet(np.ones(20)).astype("f4")
    model = experiment.make_model(config, len(pairs))
    like = jax.eval_shape(lambda: review_model.init(model, jax.random.key(0)))
    params = jax.tree.map(lambda a: draw.normal(0, 1, a.shape).astype(a.dtype), like)
    if value is not None:
        params = jax.tree.map(lambda a: np.full_like(a, value), params)
    folder.mkdir(parents=True)
    checkpoint.save_params(folder / "params.safetensors", params)
    whole_reviewer.leave(folder, WORDS, counted)
    (folder / "config.json").write_bytes(to_json(config))
    (folder / "record.json").write_text("{}")
    return folder


def with_settings(**changes):
    """Gives the run in a folder other settings."""

    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change
