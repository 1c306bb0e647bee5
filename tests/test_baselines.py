"""The baselines of experiments/baselines.py, against plain NumPy, and as their users run them."""

import dataclasses
import functools
import importlib.util
import json
import math
import os
import runpy
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from lstmjax import train
from lstmjax.data import imdb, ngrams
from lstmjax.records import RunError, validate

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "experiments" / "baselines.py"
needs_sklearn = pytest.mark.skipif(
    importlib.util.find_spec("sklearn") is None, reason="needs scikit-learn"
)


@pytest.fixture(scope="module")
def module():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("baselines", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["baselines"] = module  # where its dataclasses look their annotations up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["baselines"]


# ---- linear classifiers -------------------------------------------------------------------------


# LIBLINEAR ends where the objective falls by less than this part of itself, whatever it is asked
# for; near a minimum, the weights are then right to about its square root.
LEAST_FALL = 1e-12


def objective(w, x, labels, solver, c):
    """``liblinear``'s, of w [F + 1] with b at its end."""
    margin = np.where(labels > 0, 1.0, -1.0) * (x @ w[:-1] + w[-1])
    hinge = np.maximum(0, 1 - margin) ** 2
    return w @ w / 2 + c * np.sum(np.logaddexp(0, -margin) if solver == "logistic" else hinge)


def minimised(x, labels, solver, c):
    """w [F] and b of ``liblinear``'s objective by Newton's method on dense float64."""
    value = functools.partial(objective, x=x, labels=labels, solver=solver, c=c)
    x, y = np.hstack([x, np.ones((len(x), 1))]), np.where(labels > 0, 1.0, -1.0)
    w = np.zeros(x.shape[1])
    for _ in range(100):
        margin = y * (x @ w)
        if solver == "logistic":
            away = 1 / (1 + np.exp(margin))
            gradient, curvature = -away * y, away * (1 - away)
        else:
            inside = margin < 1
            gradient, curvature = -2 * (1 - margin) * inside * y, 2.0 * inside
        gradient = w + c * x.T @ gradient
        step = np.linalg.solve(np.eye(len(w)) + c * (x.T * curvature) @ x, gradient)
        size = 1.0
        while value(w - size * step) > value(w) and size > 1e-8:
            size /= 2
        w = w - size * step
        if np.linalg.norm(gradient) < 1e-13:
            break
    return w[:-1], w[-1]


@pytest.fixture
def exact(module, monkeypatch):
    """LIBLINEAR run until nothing changes."""
    run = functools.partial(module.liblinear, tol=1e-14)
    monkeypatch.setattr(module, "liblinear", run)
    return run


@needs_sklearn
@pytest.mark.parametrize("c", [0.3, 10.0])
@pytest.mark.parametrize("solver", ["logistic", "svm"])
def test_liblinear_is_the_minimum_it_is_said_to_be(exact, solver, c):
    draw = np.random.default_rng(3)
    x = draw.normal(size=(23, 7)) * (draw.random((23, 7)) < 0.6)
    labels = (x[:, 0] + draw.normal(size=23) > 0.4).astype(np.int32)
    weights, bias = exact(ngrams.csr_array(x), labels, solver, c)
    want, want_bias = minimised(x, labels, solver, c)
    found, least = (
        objective(np.append(*pair), x, labels, solver, c)
        for pair in ((weights, bias), (want, want_bias))
    )
    assert found == pytest.approx(least, rel=10 * LEAST_FALL)
    bound = LEAST_FALL**0.5 * np.linalg.norm(want)
    np.testing.assert_allclose(weights, want, rtol=0, atol=bound)
    assert bias == pytest.approx(want_bias, rel=0, abs=bound) and abs(bias) > 0.01


@needs_sklearn
def test_one_label_alone_is_one_line(module):
    with pytest.raises(RunError, match="labels: got 1 alone in 3 reviews, expected both"):
        module.liblinear(ngrams.csr_array(np.eye(3)), np.ones(3, int), "logistic", 1.0)


TRAIN = (
    ("a good film, a very good film!", 1),
    ("not good; bad", 0),
    ("not bad: not bad at all", 1),
    ("a very bad film (bad, bad)", 0),
    ("at last a good one", 1),
    ("not one good film", 0),
)
OTHERS = (("a good one!", 1), ("very bad and unheard", 0), ("bad: not good", 0), ("", 1))


def counted(orders):
    """Counters of the n-grams of both sets of sentences, and the n-grams of the first."""
    found = []
    for pairs in (TRAIN, OTHERS):
        for sentence, _ in pairs:
            tokens = ngrams.with_punctuation(sentence)
            found.append(Counter())
            for n in orders:
                found[-1].update(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))
    return found[: len(TRAIN)], found[len(TRAIN) :]


def parts_of(module, orders):
    """Both sets as the script has them."""
    train_texts, vocabulary = ngrams.index([text for text, _ in TRAIN], ngrams.with_punctuation)
    texts = [text for text, _ in OTHERS]
    others = ngrams.look_up(texts, vocabulary, ngrams.with_punctuation)
    grams = ngrams.known(train_texts, len(vocabulary), orders)
    sides = (train_texts, TRAIN), (others, OTHERS)
    return [
        module.Part(ngrams.counts(texts, grams), np.array([label for _, label in pairs]))
        for texts, pairs in sides
    ]


def by_hand(counters, others, *, ratio, min_count, solver, c, beta):
    """z of the other sentences by NB-SVM, and w's norm; dictionaries and dense arrays."""
    labels = np.array([label for _, label in TRAIN])
    documents = Counter(name for counter in counters for name in counter)
    names = sorted(name for name, count in documents.items() if count >= min_count)
    p, q = dict.fromkeys(names, 1.0), dict.fromkeys(names, 1.0)
    for counter, label in zip(counters, labels.tolist(), strict=True):
        for name in names:
            count = counter[name] if ratio == "counts" else min(counter[name], 1)
            (p if label else q)[name] += count
    r = {name: math.log(p[name] / sum(p.values()) * sum(q.values()) / q[name]) for name in names}
    x = np.array([[r[name] * (name in counter) for name in names] for counter in counters])
    weights, bias = minimised(x, labels, solver, c)
    mean = sum(map(abs, weights.tolist())) / len(names)
    mixed = {name: (1 - beta) * mean + beta * w for name, w in zip(names, weights, strict=True)}
    z = [sum(mixed[n] * r[n] for n in names if n in counter) + bias for counter in others]
    return np.array(z), float(np.linalg.norm(list(mixed.values())))


@needs_sklearn
@pytest.mark.parametrize(
    ("ratio", "min_count", "solver", "top"),
    [("counts", 1, "logistic", 2), ("binary", 1, "svm", 3), ("counts", 2, "svm", 1)],
)
def test_nbsvm_decides_as_by_hand(module, exact, ratio, min_count, solver, top):
    config = module.Config(min_count=min_count, solver=solver, ratio=ratio)
    orders = range(1, top + 1)
    (fit_to, asked), (counters, others) = parts_of(module, orders), counted(orders)
    choices = [(c, beta) for c in (0.5, 4.0) for beta in (0.25, 1.0)]
    found = list(module.tried(config, fit_to, asked, choices, train.Clock()))
    labels = np.array([label for _, label in OTHERS])
    options = {"ratio": ratio, "min_count": min_count, "solver": solver}
    assert len(found) == len(choices)
    for one, (c, beta) in zip(found, choices, strict=True):
        z, norm = by_hand(counters, others, c=c, beta=beta, **options)
        assert np.linalg.norm(one.weights) == pytest.approx(norm, rel=LEAST_FALL**0.5)
        np.testing.assert_array_equal(one.right, (z > 0) == (labels > 0))
        # The last sentence is empty.
        assert one.bias == pytest.approx(z[-1], rel=0, abs=LEAST_FALL**0.5 * norm)
        assert np.abs(z).min() > 1e-4  # no decision hangs on round-off


@needs_sklearn
def test_tf_idf_is_classified_as_by_hand(module, exact):
    config = module.Config(model="tfidf", min_count=1, solver="logistic")
    fit_to, asked = parts_of(module, (1, 2))
    (found,) = module.tried(config, fit_to, asked, [(3.0, 1.0)], train.Clock())
    dense = [part.counts.toarray() for part in (fit_to, asked)]
    idf = np.log((1 + len(TRAIN)) / (1 + (dense[0] > 0).sum(0))) + 1
    x, others = (part * idf for part in dense)
    x, others = (
        part / np.maximum(np.linalg.norm(part, axis=1), 1e-9)[:, None] for part in (x, others)
    )
    want, bias = minimised(x, fit_to.labels, "logistic", 3.0)
    bound = LEAST_FALL**0.5 * np.linalg.norm(want)
    np.testing.assert_allclose(found.weights, want, rtol=0, atol=bound)
    np.testing.assert_array_equal(found.right, (others @ want + bias > 0) == (asked.labels > 0))


# ---- the script ---------------------------------------------------------------------------------


def test_hold_outs_are_those_of_the_recurrent_networks(module):
    config = module.Config(validation_size=7, holdouts=2, seed=5)
    for seed, (rows, held) in zip((5, 6), module.hold_outs(config, 30), strict=True):
        data = {"label": np.arange(30), "ids": np.arange(30) * 2}
        kept, own = imdb.hold_out(data, 7, seed)
        np.testing.assert_array_equal(rows * 2, kept["ids"])
        np.testing.assert_array_equal(held * 2, own["ids"])
        assert len(held) == 7 and set(rows) | set(held) == set(range(30))


def test_the_best_is_the_first_with_the_highest_mean(module):
    assert module.best_of([[0.0, 1.0], [0.75, 0.5], [0.5, 0.75], [0.25, 0.5]]) == 1


def test_rows_are_the_commands_that_they_are_named_after(module):
    names = {f"baseline-{name}" for name in ("nbsvm-2", "nbsvm-3", "bag-1", "bag-2", "tfidf-2")}
    assert set(module.ROWS) == names
    for name, config in module.ROWS.items():
        _, model, order = name.split("-")
        asked = module.settled(module.Config(model=model, ngrams=int(order), test=True))
        assert config == asked and config.test and config.limit is None
        module.check(config)
        given = {field for field in module.OWN[model] if getattr(config, field) is not None}
        assert given == set(module.OWN[model])
    changed = module.settled(module.Config(model="nbsvm", c="2", ratio="binary"))
    assert (changed.c, changed.ratio, changed.solver) == ("2", "binary", "logistic")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def run(flags, cwd, cache):
    surroundings = {**os.environ, "LSTMJAX_CACHE": str(cache), "JAX_PLATFORMS": "cpu"}
    path = [str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    surroundings["PYTHONPATH"] = os.pathsep.join(path)
    arguments = [sys.executable, str(SCRIPT), *flags.split()]
    done = subprocess.run(arguments, cwd=cwd, env=surroundings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    record = json.loads((cwd / flags.split()[-1] / "record.json").read_text())
    assert validate(record) == [] and record["experiment"] == "baselines"
    first, *_, last = done.stdout.splitlines()
    assert all("generated reviews (offline data, not IMDB)" in line for line in (first, last))
    return record, last


SMALL = "--data offline --limit 300 --validation-size 100 --holdouts 2"


@needs_sklearn
def test_nbsvm_from_the_command_line(module, tmp_path, cache):
    flags = f"--ngrams 3 {SMALL} --c 2,0.1 --seed 4 --test --out here"
    record, last = run(flags, tmp_path, cache)
    metrics = record["metrics"]
    tried = {name: values for name, values in metrics.items() if name.startswith("tried|")}
    names = {f"tried|C {c}, beta {beta}" for c in ("0.1", "2") for beta in ("0.25", "1")}
    assert set(tried) == names
    assert np.mean(metrics["validation_accuracy"]) == max(map(np.mean, tried.values()))
    assert (metrics["chosen_c"], metrics["chosen_beta"]) != (2, 0.25)  # the first that is tried
    name = f"tried|C {metrics['chosen_c']:g}, beta {metrics['chosen_beta']:g}"
    assert tried[name] == metrics["validation_accuracy"]
    assert f"test accuracy {metrics['test_accuracy']:.4f}" in last and "row" not in record

    data = ngrams.load("offline", limit=300)
    found = ngrams.of_split(data, "train")
    grams = ngrams.known(found, len(data.vocabulary), (1, 2, 3))
    assert metrics["features"] == grams.size and record["dataset"]["sha256"] == data.sha256
    config = module.settled(module.Config(**record["config"]))
    fit_to, asked = (
        module.Part(ngrams.counts(ngrams.of_split(data, split), grams), data.splits[split]["label"])
        for split in ("train", "test")
    )
    chosen = metrics["chosen_c"], metrics["chosen_beta"]
    (own,) = module.tried(config, fit_to, asked, [chosen], train.Clock())
    assert metrics["test_accuracy"] == float(np.mean(own.right))
    weights = {"weights": own.weights, "bias": own.bias}
    assert record["params_sha256"] == module.params_sha256(weights)
    held_out = []  # chosen on what the fits have not seen
    for rows, held in module.hold_outs(config, 300):
        assert not set(rows) & set(held)
        pair = fit_to.rows(rows), fit_to.rows(held)
        (own,) = module.tried(config, *pair, [chosen], train.Clock())
        held_out.append(float(np.mean(own.right)))
    assert metrics["validation_accuracy"] == held_out
    lines = (tmp_path / "here" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 2 * len(names)


@needs_sklearn
def test_without_test_the_rest_is_the_same(tmp_path, cache):
    found = {}
    for name in ("--test --out scored", "--out unscored"):
        record, last = run(f"--model tfidf --ngrams 1 {SMALL} {name}", tmp_path, cache)
        found[name], metrics = record, record["metrics"]
        assert ("test_accuracy" in metrics) == ("test accuracy" in last) == ("--test" in name)
        assert "chosen_beta" not in metrics
    both = [
        {k: v for k, v in record["metrics"].items() if "accuracy" in k or "tried" in k}
        for record in found.values()
    ]
    assert both[0].pop("test_accuracy") >= 0 and both[0] == both[1] and len(both[1]) == 5
    assert len({record["params_sha256"] for record in found.values()}) == 1


def test_the_bag_from_the_command_line(tmp_path, cache):
    options = "--model bag --epochs 3 --embedding-size 6 --learning-rate 0.02 --batch-size 25"
    flags = f"{options} {SMALL} --max-length 30 --seeds 3 --devices 2 --seed 1 --test --out here"
    record, last = run(flags, tmp_path, cache)
    metrics = record["metrics"]
    epochs = metrics["validation_accuracy_epochs"]
    assert len(epochs) == 3 and metrics["chosen_epochs"] == 1 + int(np.argmax(epochs))
    assert np.mean(metrics["validation_accuracy"]) == pytest.approx(max(epochs), abs=1e-7)
    assert len(metrics["validation_accuracy"]) == 2 and len(metrics["test_accuracy"]) == 3
    assert metrics["test_accuracy_mean"] == pytest.approx(np.mean(metrics["test_accuracy"]))
    assert record["seed"] == 1 and record["environment"]["devices"] == 2

    data = ngrams.load("offline", limit=300)
    documents = ngrams.last(ngrams.of_split(data, "train"), 30)
    x = ngrams.counts(documents, ngrams.known(documents, len(data.vocabulary), (1, 2)))
    assert metrics["features"] == (ngrams.documents_with(x) >= 2).sum() < x.shape[1]
    again, _ = run(flags.replace("here", "again"), tmp_path, cache)
    assert again["params_sha256"] == record["params_sha256"]


WRONG = [
    ("--model svm", "--model: got 'svm', expected one of nbsvm, tfidf, bag"),
    ("--ngrams 4", "--ngrams: got '4', expected one of 1, 2, 3"),
    ("--model bag --ngrams 3", "--ngrams: got 3, expected 1 or 2 with --model bag"),
    ("--model bag --c 1", "--c: got 1, expected none with --model bag"),
    ("--model tfidf --beta 1", "--beta: got 1, expected none with --model tfidf"),
    ("--epochs 3", "--epochs: got 3, expected none with --model nbsvm"),
    ("--devices 2", "--devices: got 2, expected none with --model nbsvm"),
    ("--seeds 2", "--seeds: got 2, expected 1 where nothing is drawn but the hold-outs"),
    ("--c 1,x", "--c: got '1,x', expected different numbers above 0, as 0.1,1"),
    ("--c 0", "--c: got '0', expected different numbers above 0, as 0.1,1"),
    ("--c 1,1.0", "--c: got '1,1.0', expected different numbers above 0, as 0.1,1"),
    ("--c inf", "--c: got 'inf', expected different numbers above 0, as 0.1,1"),
    ("--c=", "--c: got '', expected different numbers above 0, as 0.1,1"),
    ("--beta=", "--beta: got '', expected different numbers above 0, as 0.1,1"),
    ("--beta 0.5,2", "--beta: got 0.5,2, expected numbers of at most 1"),
    ("--holdouts 0", "--holdouts: got 0, expected an integer of at least 1"),
    ("--validation-size 0", "--validation-size: got 0, expected an integer of at least 1"),
    ("--min-count 0", "--min-count: got 0, expected an integer of at least 1"),
    ("--limit 0", "--limit: got 0, expected an integer of at least 1"),
    ("--model bag --epochs 0", "--epochs: got 0, expected an integer of at least 1"),
    ("--model bag --learning-rate 0", "--learning-rate: got 0.0, expected a finite number above"),
    ("--model bag --devices 999", "--devices: got 999, expected at most"),
    ("--seed 2147483647", "--seed: got 2147483647, expected at most 2147483645"),
    ("--seed -1", "--seed: got -1, expected an integer of at least 0"),
    (
        "--model bag --data offline --limit 50 --validation-size 50",
        "--validation-size: got 50, expected an integer from 0 to 49",
    ),
]


def ended(flags, monkeypatch, capsys):
    """The exit code and what was said on standard error."""
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *flags.split()])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    captured = capsys.readouterr()
    return stop.value.code, captured.err, captured.out


@pytest.mark.parametrize(("flags", "text"), WRONG)
def test_a_wrong_value_is_one_clear_line(flags, text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, error, _ = ended(flags, monkeypatch, capsys)
    assert code == 2, error
    assert error.startswith(f"error: {text}") and error.count("\n") == 1, error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("model", ["nbsvm", "tfidf"])
def test_without_scikit_learn_one_line_names_the_extra(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("sklearn", "sklearn.linear_model", "sklearn.svm"):
        monkeypatch.setitem(sys.modules, name, None)
    code, error, out = ended(f"--model {model} --data offline", monkeypatch, capsys)
    assert (code, out) == (1, "")
    assert error == (
        "error: scikit-learn: not installed, needed for --model nbsvm and tfidf (extra baselines): "
        "pip install scikit-learn\n"
    )
    assert not list(tmp_path.iterdir())


def test_help_explains_every_flag(module, monkeypatch, capsys):
    code, _, out = ended("--help", monkeypatch, capsys)
    assert not code and "python experiments/baselines.py" in out
    for field in dataclasses.fields(module.Config):
        assert f"--{field.name.replace('_', '-')}" in out
