"""What a recurrent network has to beat on the film reviews: linear models of n-grams.

    python experiments/baselines.py --test                          NB-SVM of words and pairs
    python experiments/baselines.py --ngrams 3 --test               and triples
    python experiments/baselines.py --model tfidf --test            TF-IDF, logistic regression
    python experiments/baselines.py --model bag --seeds 5 --test    the mean of vectors

nbsvm is Wang & Manning's (2012): a linear classifier of which n-grams a review has, each weighed by
its log-count ratio r. By default it is that of Mesnil et al. (2014), whose code states 0.9155 with
pairs and 0.9182 with triples: punctuation marks are tokens, r is of how often n-grams occur, the
classifier is LIBLINEAR's logistic regression. tfidf is TF-IDF with the same classifier. Both need
scikit-learn (the extra baselines). bag is fastText's model (Joulin et al., 2016): the mean of the
vectors of a review's n-grams and a logistic layer, trained by Adam.

Everything is chosen on reviews held out from train: --c and --beta take several values, of which
those with the best mean over --holdouts are taken, and so is the bag's number of epochs. Hold-out k
is that of experiments/imdb.py --seed k. What was chosen is fitted once more, to all training
reviews, and with --test scored on the test reviews, once. The data does not say which film a review
is of. Test reviews are of other films than those of train, so a random hold-out can flatter.

Without prepared data and without a network the reviews are generated ones, and said to be so.
"""

import dataclasses
import itertools
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any, Literal, NamedTuple

import numpy as np

from lstmjax import bag, cli, parallel, train
from lstmjax import seeds as many
from lstmjax.data import Dataset, imdb, ngrams, prepared
from lstmjax.records import Run, RunError, matching_row, params_sha256


@dataclasses.dataclass(frozen=True)
class Config:
    model: Literal["nbsvm", "tfidf", "bag"] = "nbsvm"
    """Log-count ratios, TF-IDF, or the mean of vectors."""
    ngrams: Literal[1, 2, 3] = 2
    """The longest n-grams; the shorter ones are there, too."""
    data: Literal["auto", "tfds", "offline"] = "auto"
    """The real reviews if they can be had, the real ones or an error, or generated ones."""
    tokens: Literal["punctuation", "words"] = "punctuation"
    """Whether marks such as ! and ? are tokens, or blanks, as for experiments/imdb.py."""
    min_count: int | None = None
    """N-grams of fewer training reviews are left out; 1 when not given, 2 with bag."""
    solver: Literal["logistic", "svm"] | None = None
    """LIBLINEAR's logistic regression (when not given), or its L2-loss SVM."""
    c: str | None = None
    """C of the classifier, a number or several to choose from: 0.1,1,10."""
    beta: str | None = None
    """nbsvm: 1 for the classifier's weights, less for some naive Bayes in them; or several."""
    ratio: Literal["counts", "binary"] | None = None
    """nbsvm: r of how often n-grams occur (when not given), or of how many reviews have them."""
    embedding_size: int | None = None
    """bag: size of a vector; 50 when not given."""
    max_length: int | None = None
    """bag: the last so many tokens of each review; 400 when not given."""
    epochs: int | None = None
    """bag: passes over the training reviews, at most; 8 when not given."""
    batch_size: int | None = None
    """bag: reviews in a batch; 32 when not given."""
    learning_rate: float | None = None
    """bag: Adam's step size; 0.001 when not given."""
    validation_size: int = 2_500
    """Reviews of each hold-out."""
    holdouts: int = 3
    """How many hold-outs of train, each with a fit of its own to the rest."""
    test: bool = False
    """Whether to score the test reviews, once, at the end."""
    limit: int | None = None
    """Use only the first so many reviews of every split: a look, not a result."""
    devices: int | None = None
    """bag: devices to share hold-outs and seeds; all there are when not given."""
    seed: int = 0
    """Of the first hold-out, and of the bag's weights and batches."""
    seeds: int = 1
    """bag: how many fits to all training reviews, with seeds from --seed on."""
    out: str | None = None
    """Folder for the run's files, new or empty; a fresh one under runs/ when not given."""


# What is taken where a flag is not given, for the models that know it.
_LINEAR = {"min_count": 1, "solver": "logistic", "c": "0.1,0.3,1,3"}
_BAG = {"min_count": 2, "embedding_size": 50, "max_length": 400, "epochs": 8}
OWN = {
    "nbsvm": _LINEAR | {"beta": "0.25,1", "ratio": "counts"},
    "tfidf": _LINEAR | {"c": "1,3,10,30"},
    "bag": _BAG | {"batch_size": 32, "learning_rate": 1e-3},
}


def settled(config: Config) -> Config:
    """The configuration with its model's own values where none is given."""
    own = OWN[config.model]
    for name in sorted({name for values in OWN.values() for name in values} - own.keys()):
        cli.check(config, name, getattr(config, name) is None, f"none with --model {config.model}")
    given = {name: getattr(config, name) for name in own if getattr(config, name) is not None}
    return dataclasses.replace(config, **own | given)


_MODELS = (("nbsvm", 2), ("nbsvm", 3), ("bag", 1), ("bag", 2), ("tfidf", 2))
ROWS = {f"baseline-{m}-{n}": settled(Config(model=m, ngrams=n, test=True)) for m, n in _MODELS}


def check(config: Config) -> None:
    cli.check_counts(config, "validation_size", "holdouts", "min_count", "limit", "devices")
    cli.check_counts(config, "embedding_size", "max_length", "epochs", "batch_size", "seeds")
    cli.check_counts(config, "seed", least=0)
    cli.check_positive(config, "learning_rate")
    most = 2**31 - max(config.seeds, config.holdouts)
    cli.check(config, "seed", config.seed <= most, f"at most {most}, for there are several")
    if config.model == "bag":
        cli.check(config, "ngrams", config.ngrams < 3, "1 or 2 with --model bag")
        return
    cli.check(config, "devices", config.devices is None, f"none with --model {config.model}")
    cli.check(config, "seeds", config.seeds == 1, "1 where nothing is drawn but the hold-outs")
    numbers("c", config.c)
    cli.check(config, "beta", max(betas(config)) <= 1, "numbers of at most 1")


def numbers(name: str, text: str) -> tuple[float, ...]:
    """Reads `0.1,1,10`.

    Raises:
      ValueError: other than different finite numbers above 0.
    """
    try:
        values = tuple(float(value) for value in text.split(","))
    except ValueError:
        values = ()
    if not all(0 < v < math.inf for v in values) or len(set(values)) < max(len(values), 1):
        raise ValueError(f"{name}: got {text!r}, expected different numbers above 0, as 0.1,1")
    return values


def betas(config: Config) -> tuple[float, ...]:
    """The values of --beta to choose from; 1, the classifier's own weights, of a model without."""
    return numbers("beta", "1" if config.beta is None else config.beta)


def hold_outs(config: Config, size: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """The rows to fit to and the rows held out, of each hold-out of ``size`` reviews."""
    rows = {"label": np.arange(size)}
    own = range(config.seed, config.seed + config.holdouts)
    pairs = [imdb.hold_out(rows, config.validation_size, seed) for seed in own]
    return [(kept["label"], held["label"]) for kept, held in pairs]


# ---- linear classifiers -------------------------------------------------------------------------


def scikit_learn() -> tuple[Any, Any]:
    """LogisticRegression and LinearSVC.

    Raises:
      RunError: scikit-learn is not installed.
    """
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.svm import LinearSVC
    except ImportError as error:
        raise RunError(
            "scikit-learn: not installed, needed for --model nbsvm and tfidf (extra baselines): "
            "pip install scikit-learn"
        ) from error
    return LogisticRegression, LinearSVC


def liblinear(
    x: Any, labels: np.ndarray, solver: str, c: float, tol: float = 1e-4
) -> tuple[np.ndarray, float]:
    """LIBLINEAR's classifier (Fan et al., 2008), for y = ±1; the bias counts as a weight.

        min ½ (‖w‖² + b²) + C Σ log(1 + exp(−y (x w + b)))         "logistic"
        min ½ (‖w‖² + b²) + C Σ max(0, 1 − y (x w + b))²           "svm"

    Both are solved in the primal, where nothing is drawn at random.

    Args:
      x: sparse float64 [N, F].
      labels: [N], 0 or 1.
      solver: "logistic" or "svm".
      c: C > 0.
      tol: how small the gradient has to become, compared with that at 0.

    Returns:
      w [F] and b; positive is where x w + b > 0.

    Raises:
      RunError: scikit-learn is not installed, or the labels are all the same.
    """
    logistic_regression, svm = scikit_learn()
    if len(set(labels.tolist())) < 2:
        raise RunError(f"labels: got {labels[0]} alone in {len(labels)} reviews, expected both")
    if solver == "logistic":
        fitted = logistic_regression(solver="liblinear", C=c, tol=tol, max_iter=1000)
    else:
        fitted = svm(dual=False, C=c, tol=tol, max_iter=1000)
    fitted.fit(x, labels)
    return fitted.coef_[0], float(fitted.intercept_[0])


def seen_as(config: Config, x: Any, labels: np.ndarray):
    """What the classifier sees of counts: a function of them, learned from those of training."""
    if config.model == "tfidf":
        idf = ngrams.inverse_document_frequency(x)
        return lambda counts: ngrams.tf_idf(counts, idf)
    ratio = ngrams.log_count_ratio(x if config.ratio == "counts" else ngrams.binary(x), labels)
    return lambda counts: ngrams.scaled(ngrams.binary(counts), ratio)


class Part(NamedTuple):
    """Reviews: counts of n-grams, sparse [N, F], and labels [N], 0 or 1."""

    counts: Any
    labels: np.ndarray

    def rows(self, rows: Any) -> "Part":
        return Part(self.counts[rows], self.labels[rows])


class Tried(NamedTuple):
    """A classifier, and which of the reviews it was asked about it is right about, bool [N]."""

    weights: np.ndarray
    bias: float
    right: np.ndarray


def tried(
    config: Config, fit_to: Part, asked: Part, choices: Sequence[tuple], clock: train.Clock
) -> Iterator[Tried]:
    """Fits a classifier for each of ``choices``, (C, β), and asks it about other reviews.

    ``choices`` of one C stand together; ``clock`` is where the seconds go.
    """
    with clock("train"):
        known = ngrams.documents_with(fit_to.counts) >= config.min_count
        x, labels = fit_to.counts[:, known], fit_to.labels
        seen = seen_as(config, x, labels)
        x, others = seen(x), seen(asked.counts[:, known])
    for c, of_c in itertools.groupby(choices, key=lambda choice: choice[0]):
        with clock("train"):
            own, bias = liblinear(x, labels, config.solver, c)
        for _, beta in of_c:
            with clock("eval"):
                weights = ngrams.interpolated(own, beta)
                right = (others @ weights + bias > 0) == (asked.labels > 0)
            yield Tried(weights, bias, right)


def best_of(accuracies: Sequence[Sequence[float]]) -> int:
    """The place of the list with the best mean; of equal ones, the first."""
    return int(np.argmax(np.mean(accuracies, axis=1)))


def run_linear(config: Config, data: Dataset, folder: Run, clock: train.Clock, _: list) -> tuple:
    """nbsvm and tfidf, on the processor: chooses C and β, and fits with them to all of train.

    Returns:
      Metrics, weights, and what was chosen, in words.
    """
    began = time.perf_counter()
    orders = range(1, config.ngrams + 1)
    grams = ngrams.known(ngrams.of_split(data, "train"), len(data.vocabulary), orders)
    whole, test = (
        Part(ngrams.counts(ngrams.of_split(data, split), grams), data.splits[split]["label"])
        for split in prepared.SPLITS
    )
    metrics = {"counting_seconds": time.perf_counter() - began}

    choices = list(itertools.product(numbers("c", config.c), betas(config)))
    names = [f"C {c:g}" + f", beta {beta:g}" * bool(config.beta) for c, beta in choices]
    accuracies: list[list[float]] = [[] for _ in choices]
    for number, (rows, held) in enumerate(hold_outs(config, len(whole.labels)), start=1):
        parts = whole.rows(rows), whole.rows(held)
        for place, found in enumerate(tried(config, *parts, choices, clock)):
            (c, beta), accuracy = choices[place], float(np.mean(found.right))
            accuracies[place].append(accuracy)
            folder.log(number, c=c, beta=beta, validation_accuracy=accuracy)
            print(f"hold-out {number}: {names[place]}: {accuracy:.4f}", flush=True)
    for name, values in zip(names, accuracies, strict=True):
        metrics[f"tried|{name}"] = values
    chosen = choices[best := best_of(accuracies)]
    metrics |= {"validation_accuracy": accuracies[best], "chosen_c": chosen[0]}
    if config.beta:
        metrics["chosen_beta"] = chosen[1]

    asked = test if config.test else test.rows(slice(0))
    (found,) = tried(config, whole, asked, [chosen], clock)
    metrics["features"] = len(found.weights)
    if config.test:
        metrics["test_accuracy"] = float(np.mean(found.right))
    weights = {"weights": found.weights, "bias": found.bias}
    return metrics, weights, names[best]


# ---- the bag ------------------------------------------------------------------------------------


def run_bag(config: Config, data: Dataset, folder: Run, clock: train.Clock, devices: list) -> tuple:
    """bag: chooses the number of epochs, and trains on all of train for as many; as above."""
    began = time.perf_counter()
    documents, test = (
        ngrams.last(ngrams.of_split(data, s), config.max_length) for s in prepared.SPLITS
    )
    grams = ngrams.known(documents, len(data.vocabulary), range(1, config.ngrams + 1))
    counts = ngrams.counts(documents, grams)
    known = ngrams.documents_with(counts) >= config.min_count
    grams, counts = grams.select(known), counts[:, known]
    whole, test = (
        {"ids": ngrams.padded(own, grams), "label": data.splits[split]["label"]}
        for split, own in zip(prepared.SPLITS, (documents, test), strict=True)
    )
    metrics = {"features": grams.size, "counting_seconds": time.perf_counter() - began}
    bags = bag.Bag(
        features=grams.size,
        embedding_size=config.embedding_size,
        learning_rate=config.learning_rate,
        batch_size=config.batch_size,
        seed=config.seed,
        seeds=config.holdouts,
    )
    score = bag.evaluator(clock)

    rows, held = zip(*hold_outs(config, counts.shape[0]), strict=True)
    # An n-gram that none of a hold-out's training reviews has is unknown, as it would be in test.
    seen = [ngrams.documents_with(counts[own]) > 0 for own in rows]
    program, accuracies = bags.program(whole, devices, clock), []
    for epoch, loss in enumerate(bags.train(program, rows, config.epochs, "hold-outs"), start=1):
        accuracies.append(score(program, program.data, held, seen))
        mean = float(np.mean(accuracies[-1]))
        folder.log(program.step(), epoch=epoch, train_loss=loss, validation_accuracy=mean)
    epochs = 1 + (best := best_of(accuracies))
    metrics |= {"validation_accuracy": accuracies[best], "chosen_epochs": epochs}
    metrics["validation_accuracy_epochs"] = [float(np.mean(values)) for values in accuracies]

    bags = dataclasses.replace(bags, seeds=config.seeds)
    program = bags.program(whole, devices, clock)
    everything = [np.arange(counts.shape[0])] * config.seeds
    for epoch, loss in enumerate(bags.train(program, everything, epochs, "all reviews"), start=1):
        folder.log(program.step(), epoch=epoch, whole_loss=loss)
    own = range(config.seed, config.seed + config.seeds)
    if config.test:
        everything = [np.arange(len(test["label"]))] * config.seeds
        found = [{"test_accuracy": one} for one in score(program, test, everything)]
        metrics |= found[0] if config.seeds == 1 else many.together(found, own)
    weights = {f"seed{seed}": params for seed, params in zip(own, program.params(), strict=True)}
    return metrics, weights, f"{epochs} epochs"


# ---- the run ------------------------------------------------------------------------------------


def peak_memory() -> dict[str, float]:
    """The most memory that this process has held, in MiB; nothing where that is not told."""
    with suppress(ImportError):  # not on Windows
        import resource

        unit = 2**20 if sys.platform == "darwin" else 2**10
        return {"peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit}
    return {}


def run(config: Config) -> None:
    config = settled(config)
    check(config)
    if config.model != "bag":
        scikit_learn()
    devices = parallel.use_devices(config.devices if config.model == "bag" else 1)
    data = ngrams.load(config.data, tokens=config.tokens, limit=config.limit)
    hold_outs(config, len(data.splits["train"]["label"]))  # what is wrong is said before a run
    print(f"{config.model} on {data.title}, sha256 {data.sha256[:12]}", flush=True)
    clock = train.Clock()
    with Run.create("baselines", config, out=config.out) as folder:
        model = run_bag if config.model == "bag" else run_linear
        metrics, weights, chosen = model(config, data, folder, clock, devices)
        folder.finish(
            dataset=data,
            metrics=metrics | peak_memory(),
            seconds=clock.seconds,
            params_sha256=params_sha256(weights),
            seed=config.seed,
            devices=devices,
            row=matching_row(dataclasses.replace(config, seeds=1), ROWS),
        )
    mean = float(np.mean(metrics["validation_accuracy"]))
    line = f"validation accuracy {mean:.4f} over {config.holdouts} hold-outs with {chosen}"
    if config.test:
        line += f", test accuracy {np.mean(metrics['test_accuracy']):.4f}"
    print(f"{line}, on {data.title}; record in {folder.path}")


if __name__ == "__main__":
    cli.main(lambda: run(cli.parse(Config, description=__doc__)))
