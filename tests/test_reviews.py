"""experiments/reviews.py: its settings, what it learns from, and runs of it."""

import dataclasses
import importlib.util
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

from lstmjax import review_model, review_training
from lstmjax.data import chops
from lstmjax.data import reviews as data_reviews
from lstmjax.data.dataset import make_dataset
from lstmjax.records import RunError, RunStopped, matching_row, validate

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "experiments" / "reviews.py"

_spec = importlib.util.spec_from_file_location("reviews_experiment", SCRIPT)
reviews = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = reviews  # where its dataclass looks for its annotations
_spec.loader.exec_module(reviews)

V = 14
FAST = reviews.Config(
    vocabulary_size=V, max_length=40, chop=5, batch_segments=12, embedding_size=4, hidden_size=3,
    epochs=4, learning_rate=0.05, validation_size=12, average=0.9, devices=1,
    save_every="1000", seed=2,
)  # fmt: skip
RUNS = {"pairs_size": 6, "min_count": 2}  # of what counts runs of words
PATH = {"pairs": "path", "path_loss": 0.5, **RUNS}


@pytest.fixture(scope="module", autouse=True)
def as_in_a_script():
    assert len(jax.devices()) > 1  # before a run asks for a single one
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam needs it
        yield


def make_reviews(test_seed=3, swap=(), unlabelled=False):
    """Reviews of random lengths whose words say what they are, but for noise."""
    splits = {}
    sizes = [("train", 52, 1), ("test", 30, test_seed)]
    for split, count, seed in [*sizes, *[("unlabelled", 40, 5)] * unlabelled]:
        draw = np.random.default_rng(seed)
        label = draw.integers(0, 2, count).astype(np.int32)
        lengths = draw.integers(1, 30, count)
        ids = draw.integers(4, 11, lengths.sum()) + 3 * label.repeat(lengths)
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        splits[split] = {"ids": ids.astype(np.int32), "offsets": offsets, "label": label}
    if unlabelled:
        splits["unlabelled"]["label"][:] = -1
    label = splits["train"]["label"]
    label[list(swap)] = 1 - label[list(swap)]
    return make_dataset("sin", "generated", splits, ("a", "b"))


@pytest.fixture(autouse=True)
def loads(monkeypatch):
    """Every run has these reviews."""
    monkeypatch.setattr(reviews, "load", lambda config: make_reviews(unlabelled=config.unlabelled))


def train(folder, **settings):
    """Runs it; returns the record and the lines of metrics.jsonl."""
    config = dataclasses.replace(FAST, out=None if folder is None else str(folder), **settings)
    reviews.run(config)
    folder = Path(config.resume or folder)
    record = json.loads((folder / "record.json").read_text())
    assert validate(record) == []
    return record, (folder / "metrics.jsonl").read_text().splitlines()


# ---- settings -----------------------------------------------------------------------------------


def test_rows_are_the_defaults_without_and_with_pairs():
    defaults = reviews.Config(seed=4, devices=1, out="there")
    assert matching_row(defaults, reviews.ROWS) == "reviews-lstm"
    pairs = dataclasses.replace(defaults, pairs="path", path_loss=1.0, deep_share=0.3)
    assert matching_row(pairs, reviews.ROWS) == "reviews-pairs"
    triples = {"path_order": 3, "pairs_size": 1_000_000, "min_count": 2}
    triples = dataclasses.replace(pairs, **triples)
    assert matching_row(triples, reviews.ROWS) == "reviews-triples"
    ratios = {"ratio_inputs": True, "place_inputs": True, "hold_out": "alike", "epochs": 4}
    ratios |= {"embedding_size": 64, "hidden_size": 64}
    ratios = dataclasses.replace(triples, pairs="none", path_loss=0.0, deep_share=1.0, **ratios)
    assert matching_row(ratios, reviews.ROWS) == "reviews-ratios"
    assert matching_row(dataclasses.replace(defaults, epochs=3), reviews.ROWS) is None


def test_a_row_of_an_ablation_is_another_run_and_every_row_can_be_run():
    found = set()
    for name, config in reviews.ROWS.items():
        reviews.check(config)
        assert matching_row(dataclasses.replace(config, seed=7), reviews.ROWS) == name
        found.add(dataclasses.astuple(config))
    assert len(found) == len(reviews.ROWS) == 17
    chopped, plain = reviews.ROWS["reviews-chop-200"], reviews.ROWS["reviews-lstm"]
    assert chopped.chop * chopped.batch_segments == plain.chop * plain.batch_segments


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
def test_the_step_size_of_every_update(name):
    config = reviews.Config(schedule=name, warm_up=4, learning_rate=0.2)
    rate = review_training.make_schedule(config, updates=10)
    got = [float(rate(jnp.asarray(n, jnp.int32))) for n in range(11)]
    done = [max(n - 4, 0) / 6 for n in range(11)]
    falls = {
        "constant": [1.0] * 11,
        "linear": [1 - d for d in done],
        "cosine": [(1 + np.cos(np.pi * d)) / 2 for d in done],
    }
    want = [0.2 * min((n + 1) / 4, 1) * falls[name][n] for n in range(11)]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)
    first = review_training.make_schedule(dataclasses.replace(config, warm_up=0), updates=10)
    assert float(first(jnp.zeros((), jnp.int32))) == pytest.approx(0.2)


@pytest.mark.parametrize("embeddings", [False, True])
def test_what_decays(embeddings):
    """A gradient of 0 leaves decay alone: θ − α λ θ."""
    options = {"weight_decay": 0.3, "decay_embeddings": embeddings, "average": 0.0}
    config = reviews.Config(learning_rate=0.1, schedule="constant", **options)
    own = ("embed", "pairs", "path", "next_bias")
    params = {name: jnp.full(2, 2.0) for name in (*own, "kernel", "bias")}
    of_layer = ("w_x", "w_h", "b", "gain_x", "gain_h", "gain_c", "bias_c")
    params["forward"] = {name: jnp.full(2, 2.0) for name in of_layer}
    tx = reviews.make_optimiser(config, updates=5)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    moved = optax.apply_updates(params, updates)
    for path, value in jax.tree_util.tree_leaves_with_path(moved):
        name = path[-1].key
        stays = name in ("b", "bias", "bias_c") or (name in own and not embeddings)
        np.testing.assert_allclose(value, 2.0 if stays else 2.0 * (1 - 0.03), rtol=1e-6)


def test_gradients_are_clipped_and_weights_averaged():
    config = reviews.Config(clip_norm=0.5, average=0.9)
    tx, params = reviews.make_optimiser(config, updates=5), {"kernel": jnp.zeros(2)}
    updates, state = tx.update({"kernel": jnp.array([3.0, 4.0])}, tx.init(params), params)
    (mu,) = [part.mu for part in jax.tree.leaves(state, is_leaf=lambda s: hasattr(s, "mu"))
             if hasattr(part, "mu")]  # fmt: skip
    np.testing.assert_allclose(mu["kernel"], [0.03, 0.04], rtol=1e-5)
    np.testing.assert_allclose(state.mean["kernel"], updates["kernel"], rtol=1e-6)


# ---- what is learned from -----------------------------------------------------------------------


@pytest.mark.parametrize(("pairs", "order"), [("input", 2), ("path", 2), ("path", 3), ("none", 3)])
def test_pairs_and_ratios_are_of_the_training_part(pairs, order):
    """What is held out, its labels and its words, changes none of them; training labels do.

    With triples, ratios are inputs.
    """
    config = dataclasses.replace(FAST, pairs=pairs, path_order=order, normalise_embeddings=True)
    config = dataclasses.replace(config, ratio_inputs=order == 3, **RUNS)
    parts, count = reviews.make_parts(config, make_reviews())
    assert 0 < count <= 6 and sorted(parts) == ["test", "train", "validation"]
    held = parts["validation"].rows
    assert len(held) == 12 and not set(held) & set(parts["train"].rows)
    data = make_reviews(swap=held)
    for row in held:
        own = slice(*data.splits["train"]["offsets"][row : row + 2])
        data.splits["train"]["ids"][own] = 5
    others, again = reviews.make_parts(config, data)
    assert again == count
    names = ["frequency"] + ["ratio"] * (pairs != "input")
    names += ["ratio_without"] * (pairs == "path")
    for name in names:
        np.testing.assert_array_equal(others["train"].arrays[name], parts["train"].arrays[name])
        np.testing.assert_array_equal(parts["test"].arrays[name], parts["train"].arrays[name])
    field = {"input": "pairs", "none": "ratios"}.get(pairs, pairs)
    np.testing.assert_array_equal(others["test"].arrays[field], parts["test"].arrays[field])
    if pairs != "input":
        other, _ = reviews.make_parts(config, make_reviews(swap=parts["train"].rows[:5]))
        assert not np.array_equal(other["train"].arrays["ratio"], parts["train"].arrays["ratio"])
    fields = make_reviews().splits["train"]
    used = np.concatenate(
        [fields["ids"][slice(*fields["offsets"][n : n + 2])] for n in parts["train"].rows]
    )
    want = [np.mean(used == word) for word in range(V)]
    np.testing.assert_allclose(parts["train"].arrays["frequency"], want, rtol=1e-6)


# ---- runs ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run with everything that is kept: (folder, record, lines)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reviews, "load", lambda config: make_reviews())
        patch.setattr(reviews, "PIECE", 2)
        folder = tmp_path_factory.mktemp("whole") / "run"
        return folder, *train(folder, **PATH)


def scores_of(folder, split, **settings):
    """Accuracy and loss of the weights that were left, review by review."""
    config = dataclasses.replace(FAST, **settings)
    parts, pairs = reviews.make_parts(config, make_reviews())
    model, part = reviews.make_model(config, pairs), parts[split]
    params = {}
    for name, array in load_file(folder / "params.safetensors").items():
        *outer, last = name.split(".")
        inside = params.setdefault(outer[0], {}) if outer else params
        inside[last] = jnp.asarray(array)
    steps, found = int(part.cut.length.max()), []
    score = jax.jit(lambda b: model.loss_fn(params, b)[1])
    take = review_model.chops(steps)
    for row in part.rows:
        packed = chops.pack(part.cut, [row], 12)
        plan = chops.lay_out(part.cut, packed, 12)
        metrics = score(take(part.arrays, {k: a[0] for k, a in plan.items()}))
        found.append([float(metrics[name][0]) for name in ("accuracy", "loss")])
    return np.mean(found, axis=0)


def test_the_average_of_the_best_epoch_is_tested_once(whole):
    folder, record, lines = whole
    metrics = record["metrics"]
    found, epoch = metrics["validation_accuracy_epochs"], metrics["best_epoch"]
    assert len(found) == 4 and max(found) == found[epoch - 1] and epoch < 4
    assert metrics["best_validation_accuracy"] == max(found) > found[0]
    for split, accuracy in (("test", metrics["test_accuracy"]), ("validation", max(found))):
        own = scores_of(folder, split, **PATH)
        assert own[0] == pytest.approx(accuracy, abs=1e-6)
        if split == "test":
            assert own[1] == pytest.approx(metrics["test_loss"], rel=1e-5)
    assert metrics["test_accuracy_epochs"] == [metrics["test_accuracy"]]
    for path in ("deep", "wide"):
        assert len(metrics[f"validation_accuracy_{path}_epochs"]) == 4
        assert 0.5 < metrics[f"test_accuracy_{path}"] <= 1
    assert sum("test_" in line for line in lines) == 1 and "test_" in lines[-1]
    assert (folder / "vocabulary.txt").read_text() == "a\nb"
    sizes = sum(a.size for a in load_file(folder / "params.safetensors").values())
    assert (record["parameters"], metrics["pairs"]) == (sizes, 6)
    assert record["updates"] == json.loads(lines[-1])["step"] > 30
    assert 0 < metrics["fill_share"] < 1 and metrics["tokens_per_second"] > 0


def test_the_share_of_fill(whole):
    """Counted batch by batch."""
    parts, _ = reviews.make_parts(FAST, make_reviews())
    part, slots, tokens = parts["train"], 0, 0
    lengths = np.diff(make_reviews().splits["train"]["offsets"])
    for epoch in range(1, 5):
        order = chops.order(part.rows, seed=2, epoch=epoch)
        packed = chops.pack(part.cut, order, 12)
        slots += 5 * 12 * len(packed.load)
        tokens += lengths[part.rows].sum()
    assert whole[1]["metrics"]["fill_share"] == pytest.approx(1 - tokens / slots, rel=1e-12)


def test_nothing_depends_on_the_test_reviews(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(reviews, "load", lambda config: make_reviews(test_seed=9))
    monkeypatch.setattr(reviews, "PIECE", 2)
    record, lines = train(tmp_path / "run", **PATH)
    assert record["params_sha256"] == whole[1]["params_sha256"]
    assert lines[:-1] == whole[2][:-1] and lines[-1] != whole[2][-1]


def test_a_stopped_run_goes_on_to_the_same_bits(whole, tmp_path, monkeypatch):
    """It is stopped after its best epoch, so that the best weights have to be kept."""
    _, record, lines = whole
    add, added = reviews.train.Tally.add, []
    pieces = sum('"loss"' in line and '"epoch": 4' in line for line in lines)
    before = sum('"loss"' in line and '"epoch": 4' not in line for line in lines)
    assert pieces > 3 and record["metrics"]["best_epoch"] < 4

    def stop(tally, metrics):
        add(tally, metrics)
        added.append(metrics)
        if len(added) == before + 2:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(reviews, "PIECE", 2)
    monkeypatch.setattr(reviews.train.Tally, "add", stop)
    with pytest.raises(RunStopped, match="by SIGTERM and saved"):
        train(tmp_path / "run", **PATH)
    monkeypatch.setattr(reviews.train.Tally, "add", add)
    again, more = train(None, **PATH, resume=str(tmp_path / "run"))
    assert again["params_sha256"] == record["params_sha256"] and more == lines
    del again["metrics"]["tokens_per_second"]
    assert again["metrics"] == {
        k: v for k, v in record["metrics"].items() if k != "tokens_per_second"
    }
    assert again["resumed"] == 1


def test_the_weights_are_the_mean_of_all_so_far(tmp_path, monkeypatch):
    """Of fewer updates than 1/(1 − decay) = 100, evenly."""
    after, seen = reviews.Keeper.after_piece, []

    def watch(keeper, kept):
        seen.append(jax.device_get(kept.state.params))
        after(keeper, kept)

    monkeypatch.setattr(reviews, "PIECE", 1)
    monkeypatch.setattr(reviews.Keeper, "after_piece", watch)
    train(tmp_path / "run", average=0.99, epochs=1, select="last")
    assert 5 < len(seen) < 100
    mean = jax.tree.map(lambda *steps: np.mean(steps, axis=0), *seen)
    found = load_file(tmp_path / "run" / "params.safetensors")
    for name in ("embed", "kernel", "bias"):
        np.testing.assert_allclose(found[name], mean[name], rtol=1e-5, atol=1e-7)
    assert np.abs(found["embed"] - seen[-1]["embed"]).max() > 0.01


def test_the_last_weights_without_a_hold_out(tmp_path):
    options = {"validation_size": 0, "select": "last", "epochs": 2, "average": 0.0, "chop": 0}
    options |= {"directions": "forward", "embedding": "gates", "cell": "cifg", "devices": 2}
    record, _ = train(tmp_path / "run", **options)
    metrics = record["metrics"]
    assert "best_epoch" not in metrics and "validation_accuracy" not in metrics
    own = scores_of(tmp_path / "run", "test", **options)
    assert own == pytest.approx([metrics["test_accuracy"], metrics["test_loss"]], rel=1e-5)


# ---- without labels -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A language model of all reviews: (folder, record, lines)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reviews, "load", lambda config: make_reviews(unlabelled=True))
        folder = tmp_path_factory.mktemp("words") / "run"
        return folder, *train(folder, epochs=8, task="language", unlabelled=True, samples=300)


def test_a_language_model_learns_which_words_go_together(words):
    """Half of the words are in positive reviews alone, the others in negative ones."""
    folder, record, _ = words
    metrics = record["metrics"]
    losses = metrics["validation_loss_epochs"]
    assert metrics["best_epoch"] == 1 + np.argmin(losses)
    assert metrics["test_loss"] < losses[0] < np.log(V)
    # Of ten words, seven are in a review, and four of them are in both kinds of reviews.
    share = np.array([1] * 6 + [2] * 4) / 14
    assert metrics["test_loss"] < -(share * np.log(share)).sum()
    assert "row" not in record and "train_accuracy" not in metrics
    weights = load_file(folder / "params.safetensors")
    assert "kernel" not in weights and weights["next.backward"].shape == (3, 4)


def test_a_language_model_is_scored_on_the_first_reviews(monkeypatch):
    monkeypatch.setattr(reviews, "SCORED", 9)
    config = dataclasses.replace(FAST, task="language")
    parts, _ = reviews.make_parts(config, make_reviews())
    others, _ = reviews.make_parts(FAST, make_reviews())
    for name in ("validation", "test"):
        assert parts[name].rows.tolist() == others[name].rows[:9].tolist()
        assert len(others[name].rows) > 9
    assert parts["train"].rows.tolist() == others["train"].rows.tolist()


def test_what_a_language_model_learned_is_begun_with(words, tmp_path, monkeypatch):
    """The first update starts from its weights, and the record names them."""
    folder, before, _ = words
    first, advance = [], reviews.parallel.runner

    def watched(*arguments, **named):
        run = advance(*arguments, **named)

        def watch(state, *rest):
            first.append(jax.device_get(state.params))
            return run(state, *rest)

        return watch

    monkeypatch.setattr(reviews.parallel, "runner", watched)
    record, _ = train(tmp_path / "run", pretrained=str(folder), epochs=1)
    found = load_file(folder / "params.safetensors")
    for name in ("embed", "forward.w_h", "backward.b"):
        own = first[0]
        for part in name.split("."):
            own = own[part]
        np.testing.assert_array_equal(own, found[name])
    assert record["config"]["pretrained_sha256"] == before["params_sha256"]
    other, _ = train(tmp_path / "other", epochs=1)
    assert other["params_sha256"] != record["params_sha256"]


def test_the_row_of_a_pretrained_run(words, monkeypatch):
    """It is that of the language model, with its seed and its hold-out."""
    some, other, more = np.arange(3.0), np.arange(3.0) + 9, np.arange(2.0)
    params, _, row = reviews.begin(reviews.Config(), {"a": some}, ())
    assert (params, row) == ({"a": some}, "reviews-lstm")
    language_run = dataclasses.replace(reviews.ROWS["reviews-language"], seed=3)
    for settings, expected in (
        (language_run, "reviews-pretrained"),
        (dataclasses.replace(language_run, unlabelled=False), None),
        (dataclasses.replace(language_run, epochs=3), None),
    ):
        found = reviews.pretrained.Pretrained(settings, {"embed": other, "next": more}, "e" * 64)
        monkeypatch.setattr(reviews.pretrained, "read", lambda *_, found=found: found)
        config = reviews.Config(pretrained="there", hold_out="alike", seed=3)
        params, config, row = reviews.begin(config, {"embed": some, "kernel": more}, ())
        assert params["embed"] is other and params["kernel"] is more and len(params) == 2
        assert row == expected
        assert config.pretrained_sha256 == "e" * 64


def test_what_is_read_beside_vectors_has_drawn_weights_of_its_own(words, tmp_path, monkeypatch):
    """Ratios and places come after the vector: the rows of w_x that are for them are as drawn."""
    folder, first = words[0], []
    begun = reviews.pretrained.begun

    def watch(drawn, earlier):
        first.extend([drawn, begun(drawn, earlier)])
        return first[1]

    monkeypatch.setattr(reviews.pretrained, "begun", watch)
    options = {"ratio_inputs": True, "place_inputs": True, **RUNS, "min_count": 1, "epochs": 1}
    record, _ = train(tmp_path / "run", pretrained=str(folder), **options)
    drawn, own = jax.device_get(first)
    found = load_file(folder / "params.safetensors")
    size = FAST.embedding_size
    for direction in ("forward", "backward"):
        w_x = own[direction]["w_x"]
        assert len(w_x) == size + 2 + 4 == len(drawn[direction]["w_x"])
        np.testing.assert_array_equal(w_x[:size], found[f"{direction}.w_x"])
        np.testing.assert_array_equal(w_x[size:], drawn[direction]["w_x"][size:])
        np.testing.assert_array_equal(own[direction]["b"], found[f"{direction}.b"])
    np.testing.assert_array_equal(own["kernel"], drawn["kernel"])
    assert "next" not in own and np.isfinite(record["metrics"]["test_loss"])


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"hidden_size": 4}, "is a run with hidden_size 3, expected 4"),
        ({"seed": 3}, "is a run with seed 2, expected 3"),
        ({"validation_size": 11}, "is a run with validation_size 12, expected 11"),
        ({"hold_out": "alike"}, "is a run with hold_out random, expected alike"),
        ({"limit": 40}, "is a run with limit None, expected 40"),
        ({"pretrained_sha256": "0" * 64}, "--pretrained-sha256: got 0000000"),
    ],
)
def test_what_cannot_be_begun_with(settings, text, words, tmp_path):
    with pytest.raises((RunError, reviews.cli.ConfigError), match=text):
        train(tmp_path / "run", pretrained=str(words[0]), epochs=1, **settings)
    assert not (tmp_path / "run").exists()


def test_what_was_held_out_by_other_tokens_cannot_be_begun_with(words, tmp_path):
    """Alike is told by the tokens that are read; at random, they have no say."""
    folder = tmp_path / "words"
    shutil.copytree(words[0], folder)
    config = dataclasses.replace(FAST, chop=2, pretrained=str(folder))
    assert (config.tokens_read, dataclasses.replace(config, chop=5).tokens_read) == (24, 40)
    _, begun, _ = reviews.begin(config, {}, ("a", "b"))
    assert begun.pretrained_sha256 == words[1]["params_sha256"]
    settings = json.loads((folder / "config.json").read_text()) | {"hold_out": "alike"}
    (folder / "config.json").write_text(json.dumps(settings))
    config = dataclasses.replace(config, hold_out="alike")
    told = f"^--pretrained: {folder} is a run with tokens_read 40, expected 24$"
    with pytest.raises(RunError, match=told):
        reviews.begin(config, {}, ("a", "b"))
    same = dataclasses.replace(config, chop=4)
    _, begun, _ = reviews.begin(same, {}, ("a", "b"))
    assert same.tokens_read == 40 and begun.pretrained_sha256 == words[1]["params_sha256"]


def test_a_folder_that_is_none_cannot_be_begun_with(whole, tmp_path):
    with pytest.raises(RunError, match="expected the folder of a finished run"):
        train(tmp_path / "run", pretrained=str(tmp_path), epochs=1)
    with pytest.raises(RunError, match="is a run with task sentiment, expected language"):
        train(tmp_path / "run", pretrained=str(whole[0]), epochs=1)


def test_reviews_without_labels_change_what_is_learned(tmp_path):
    """By --virtual; the losses and accuracies are those of labelled reviews."""
    options = {"virtual": 0.5, "normalise_embeddings": True, "epochs": 2}
    record, _ = train(tmp_path / "all", unlabelled=True, **options)
    other, _ = train(tmp_path / "labelled", **options)
    assert record["params_sha256"] != other["params_sha256"]
    for found in (record, other):
        assert 0.3 < found["metrics"]["train_accuracy"] < 1
        assert 0.3 < found["metrics"]["train_loss"] < 0.9
    updates = [len(chops.Batches.of(part.cut, part.rows, epochs=1, seed=2, capacity=12, devices=1)
                   .packed[0].load) for part in (
        reviews.make_parts(dataclasses.replace(FAST, **options), make_reviews(unlabelled=extra))[0]
        ["train"] for extra in (False, True))]  # fmt: skip
    assert updates[1] > 1.5 * updates[0]


# ---- as its users run it ------------------------------------------------------------------------

FLAGS = (
    "--data offline --limit 60 --epochs 2 --batch-segments 24 --chop 10 --hidden-size 4 "
    "--embedding-size 6 --validation-size 12 --devices 2 --vocabulary-size 90 --pairs input "
    "--adversarial 0.5 --normalise-embeddings --loss squared --warm-up 3 --schedule cosine "
    "--weight-decay 0.01 --word-dropout 0.1 --deterministic"
)


def test_a_run_leaves_everything_it_should(tmp_path):
    surroundings = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    surroundings["LSTMJAX_CACHE"] = str(tmp_path / "cache")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *FLAGS.split(), "--out", "here"],
        cwd=tmp_path, env=surroundings, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    first, *_, last = done.stdout.splitlines()
    for line in (first, last):
        assert "generated reviews (offline data, not IMDB)" in line
    folder = tmp_path / "here"
    record = json.loads((folder / "record.json").read_text())
    assert validate(record) == [] and record["experiment"] == "reviews" and "row" not in record
    assert record["config"] == json.loads((folder / "config.json").read_text())
    assert record["environment"]["devices"] == 2
    names = {path.name for path in folder.iterdir()}
    assert {"accuracy.png", "metrics.jsonl", "checkpoints", "vocabulary.txt"} <= names
    weights = load_file(folder / "params.safetensors")
    assert weights["backward.w_h"].shape == (4, 16) and weights["embed"].shape == (90, 6)
    assert weights["pairs"].shape == (record["metrics"]["pairs"] + 1, 6)


WRONG = [
    ("--tokens letters", "--tokens: got 'letters', expected one of punctuation, words"),
    ("--chop -1", "--chop: got -1, expected an integer of at least 0"),
    ("--batch-segments 0", "--batch-segments: got 0, expected an integer of at least 1"),
    ("--vocabulary-size 4", "--vocabulary-size: got 4, expected an integer of at least 5"),
    ("--vocabulary-size 2147483648 --pairs path", "--vocabulary-size: got 2147483648, expected an"),
    ("--cell gru", "--cell: got 'gru', expected one of lstm, peephole, cifg"),
    ("--embedding gates --cell fgr", "--cell: got fgr, expected lstm or cifg with --embedding gat"),
    ("--embedding gates --normalise-embeddings", "--normalise-embeddings: got True, expected none"),
    ("--embedding gates --precision bfloat16", "--precision: got bfloat16, expected float32 with"),
    ("--path-loss 0.5", "--path-loss: got 0.5, expected 0 without --pairs path"),
    ("--path-loss 2 --pairs path", "--path-loss: got 2.0, expected 0 <= path_loss <= 1"),
    ("--deep-share 0.5", "--deep-share: got 0.5, expected 1 without --pairs path"),
    ("--path-dropout 0.2", "--path-dropout: got 0.2, expected 0.5 without --pairs path"),
    ("--no-leave-out", "--leave-out: got False, expected yes, without --pairs path"),
    ("--folds 3", "--folds: got 3, expected 5 without --ratio-inputs"),
    ("--pretrained-sha256 ab", "--pretrained-sha256: got ab, expected none without --pretrained"),
    ("--pretrained w --init torch", "--init: got torch, expected lstmjax with --pretrained, which"),
    ("--pretrained w --forget-bias 2", "--forget-bias: got 2, expected None with --pretrained,"),
    ("--pretrained w --embedding gates", "--pretrained: got w, expected none with --embedding gat"),
    ("--decay-embeddings", "--decay-embeddings: got True, expected no, with --weight-decay 0"),
    ("--path-order 3", "--path-order: got 3, expected 2 without --pairs path or --rat"),
    ("--ratio-inputs --pairs input", "--ratio-inputs: got True, expected none with --pairs input"),
    ("--folds 1 --ratio-inputs", "--folds: got 1, expected an integer of at least 2"),
    ("--embedding gates --ratio-inputs", "--embedding: got gates, expected vectors with --ratio-"),
    ("--task language --place-inputs", "--task: got language, expected sentiment with --place-in"),
    (
        "--path-order 3 --pairs path --vocabulary-size 2097152",
        "--vocabulary-size: got 2097152, expected fewer with --pairs or --ratio-inputs",
    ),
    ("--deep-share 0 --pairs path", "--deep-share: got 0.0, expected 0 < deep_share <= 1"),
    ("--adversarial -1", "--adversarial: got -1.0, expected a finite number of at least 0"),
    ("--weight-decay nan", "--weight-decay: got nan, expected a finite number of at least 0"),
    ("--average 1", "--average: got 1.0, expected 0 <= average < 1"),
    ("--validation-size 0", "--select: got best, expected last with --validation-size 0"),
    ("--validation-size 52", "--validation-size: got 52, expected an integer from 0 to 51"),
    ("--forget-bias chrono:1", "--forget-bias: got chrono:1, expected chrono:T with T >= 2"),
    ("--save-every often", "--save-every: got 'often', expected steps, as 500, or seconds, as 60s"),
    ("--seeds 3", "--seeds: no such flag"),
    ("--virtual -1", "--virtual: got -1.0, expected a finite number of at least 0"),
    ("--unlabelled", "--unlabelled: got True, expected no, without --virtual, --teacher or --task"),
    ("--teacher x", "--teacher: got x, expected none without --unlabelled"),
    ("--teacher x --unlabelled --task language", "--teacher: got x, expected none with --task lan"),
    ("--teacher x --unlabelled --virtual 1", "--virtual: got 1.0, expected 0 with --teacher"),
    ("--teacher-sha256 ab", "--teacher-sha256: got ab, expected none without --teacher"),
    ("--confidence 0.8", "--confidence: got 0.8, expected 0.9 without --teacher"),
    ("--teacher x --unlabelled --confidence 1", "--confidence: got 1.0, expected 0.5 <= confid"),
    ("--unlabelled --virtual 1 --pairs path", "--pairs: got path, expected none or input with"),
    ("--task language --pairs input", "--pairs: got input, expected none with --task language"),
    ("--task language --adversarial 1", "--adversarial: got 1.0, expected none with --task"),
    ("--task language --embedding gates", "--embedding: got gates, expected vectors with --task"),
    ("--task language --pretrained x", "--pretrained: got x, expected none with --task language"),
    ("--samples 0", "--samples: got 0, expected an integer of at least 1"),
    ("--samples 9", "--samples: got 9, expected 1000 without --task language"),
    ("--pairs-size 9", "--pairs-size: got 9, expected 200000 without --pairs or --ratio-inputs"),
    ("--min-count 2", "--min-count: got 2, expected 3 without --pairs or --ratio-inputs"),
    ("--task language --min-count 2", "--min-count: got 2, expected 3 without --pairs or --ratio"),
    ("--task language --loss squared", "--loss: got squared, expected logistic with --task lang"),
    ("--task language --pooling max", "--pooling: got max, expected both with --task language"),
]  # fmt: skip


def begin(flags, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *flags.split()])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    return stop.value.code


@pytest.mark.parametrize(("flags", "text"), WRONG)
def test_a_wrong_value_is_one_clear_line(flags, text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data_reviews, "load", lambda *_, **__: make_reviews())
    code, error = begin(flags, monkeypatch), capsys.readouterr().err
    assert (code, error.count("\n")) == (2, 1), error
    assert error.startswith(f"error: {text}")
    assert not list(tmp_path.iterdir())  # nothing was begun


def test_help_explains_every_flag(monkeypatch, capsys):
    assert not begin("--help", monkeypatch)
    text = capsys.readouterr().out
    assert "python experiments/reviews.py" in text
    for field in dataclasses.fields(reviews.Config):
        assert f"--{field.name.replace('_', '-')}" in text


def test_every_option_of_the_parts_reaches_them(monkeypatch):
    """The hold-out, the folds of the ratios and the counts among them."""
    given = {
        "validation_size": 9, "seed": 4, "hold_out": "alike", "vocabulary_size": 8, "chop": 7,
        "place_inputs": True, "ratio_inputs": True, "pairs": "path", "path_order": 3,
        "pairs_size": 5, "min_count": 2, "leave_out": False, "folds": 4,
        "normalise_embeddings": True,
    }  # fmt: skip
    config, seen = dataclasses.replace(FAST, **given), {}
    assert all(getattr(reviews.Config(), name) != value for name, value in given.items())

    def parts(data, **options):
        seen.update(options)
        return {}, 0

    monkeypatch.setattr(reviews.reviews, "parts", parts)
    reviews.make_parts(config, make_reviews())
    given["frequency"] = given.pop("normalise_embeddings")
    assert seen == given


def test_the_best_of_a_language_model_is_that_of_the_least_loss():
    class Found:
        def last(self, split, name="accuracy"):
            assert split == "validation"
            return {"accuracy": 0.25, "loss": 3.5}[name]

        def metrics(self):
            epochs = {"accuracy": ["nan", "nan"], "loss": ["nan", "nan"]}
            return {f"validation_{name}_epochs": values for name, values in epochs.items()}

    config = reviews.Config(task="language")
    assert reviews.score_of(config, Found()) == -3.5
    assert reviews.score_of(reviews.Config(), Found()) == 0.25
    found = reviews.chosen(config, Found())  # of a resumed run without a finite loss
    assert found["best_epoch"] == 1 and np.isnan(found["best_validation_accuracy"])
