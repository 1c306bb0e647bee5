"""What model cards say of reviews and of digits: how runs are read and scored, and the text.

An experiment whose runs can be released (experiments/card.py) has a ``Subject`` in ``SUBJECTS``,
and its script has ``Config``, ``check``, ``make_model`` and ``load``.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.special import expit

from lstmjax import cards, digits_reader, finished, reviewer, whole_reviewer
from lstmjax.data import mnist, offline, prepared
from lstmjax.data import text as words_of
from lstmjax.records import RunError


class Subject(NamedTuple):
    """What the runs of an experiment are about.

    Attributes:
      read: ``read(script, folder, which)``: the trained run.
      score: ``score(script, trained, settings, limit)``: its answers to the first test examples.
      text: ``text(experiment, settings)``.
      files: ``files(settings)``: further files of a run's folder that a release needs.
    """

    read: Callable
    score: Callable[..., cards.Scored]
    text: Callable[..., cards.Text]
    files: Callable[..., tuple[str, ...]]


# ---- reviews ------------------------------------------------------------------------------------


def read_review_run(script: Any, folder: Path, which: str | None) -> reviewer.Trained:
    """The run in a folder, as ``predict`` reads it; ``which`` of several weights."""
    return reviewer.read(folder, script.Config, script.check, script.make_model, which)


def score_reviews(
    script: Any, trained: reviewer.Trained, settings: Any, limit: int | None
) -> cards.Scored:
    """The answers to the test reviews (the first ``limit``), by length, negation and class."""
    test = {name: array[:limit] for name, array in script.load(settings).splits["test"].items()}
    ids = test["ids"]
    mask = ids != words_of.PADDING if settings.mask else None
    logits = finished.outputs(trained, ids, mask)[:, 0]
    if not np.isfinite(logits).all():
        raise RunError(f"{trained.folder} is damaged: its weights give no number")
    positive = expit(logits)
    texts = [words_of.words(one) for one in test_reviews(settings.data)[: len(ids)]]
    most = settings.max_length
    given = [one[-most:] if settings.truncating == "pre" else one[: most - 1] for one in texts]
    label = test["label"]
    return cards.Scored(
        label,
        np.stack([1 - positive, positive], axis=1),
        ("negative", "positive"),
        {
            **classes_and_lengths(label, texts),
            "negation in the words that the model is given": negations(given),
            "negation anywhere in the review": negations(texts),
        },
    )


def classes_and_lengths(
    label: np.ndarray, texts: Sequence[Sequence[str]]
) -> dict[str, list[cards.Group]]:
    """Groups of reviews by their label and by how many words they have."""
    return {
        "true class": [("negative", label == 0), ("positive", label == 1)],
        "words of the review, quartiles": cards.quartiles(np.array([len(one) for one in texts])),
    }


def negations(texts: Sequence[Sequence[str]]) -> list[cards.Group]:
    """The reviews with and without a negation among some of their words."""
    return cards.halves(np.array([cards.negated(one) for one in texts]))


def test_reviews(source: str) -> list[str]:
    """The texts of the test reviews, in their order."""
    folder = prepared.locate("imdb_reviews", source)
    return (offline.reviews() if folder is None else prepared.read_reviews(folder))["test"][0]


NOT_MEASURED = (
    "Nothing was measured on other texts than the reviews of this data set: not on other "
    "kinds of text, on other languages, or on texts of a few words.",
    "There are two classes: a neutral review is called positive or negative, too.",
    "What it says was not examined by who writes, or by what a review is about.",
    f"A negation is one of {', '.join(sorted(cards.NEGATIONS))}, or a word in n't, wherever it "
    "stands: whether it negates what decides was not looked at.",
)


def reviews_text(experiment: str, settings: Any) -> cards.Text:
    """What a card says of a model of reviews beside its numbers."""
    end = "last" if settings.truncating == "pre" else "first"
    known = settings.vocabulary_size - words_of.INDEX_FROM - 1
    return cards.Text(
        "Tells positive reviews of films from negative ones.",
        "reviews",
        "Comparison with other models of this data set under the same protocol, and teaching.",
        [
            f"It reads the {end} {settings.max_length} words of a review and no others. It knows "
            f"the most frequent words of the training reviews, {known:,} at most; all others are "
            "one unknown word to it.",
            *NOT_MEASURED,
        ],
        f'python experiments/{experiment}.py predict "not bad at all, I loved it" --run DIR',
    )


# ---- whole reviews ------------------------------------------------------------------------------


def read_whole_review_run(script: Any, folder: Path, which: str | None) -> whole_reviewer.Trained:
    """The run in a folder, as ``predict`` reads it; ``which`` is None."""
    return whole_reviewer.read(folder, script.Config, script.check, script.make_model, which)


def score_whole_reviews(
    script: Any, trained: whole_reviewer.Trained, settings: Any, limit: int | None
) -> cards.Scored:
    """The answers to the test reviews (the first ``limit``), by class, length and negation."""
    test = script.load(settings).splits["test"]
    label = test["label"][:limit]
    z = whole_reviewer.logits(trained, test["ids"], test["offsets"], len(label))
    positive = whole_reviewer.positive(settings, z)
    texts = [words_of.words(one) for one in test_reviews(settings.data)[: len(label)]]
    return cards.Scored(
        label,
        np.stack([1 - positive, positive], axis=1),
        ("negative", "positive"),
        classes_and_lengths(label, texts) | {"negation anywhere in the review": negations(texts)},
    )


def whole_reviews_text(experiment: str, settings: Any) -> cards.Text:
    """What a card says of a model of whole reviews beside its numbers."""
    known = settings.vocabulary_size - words_of.INDEX_FROM - 1
    runs = "pairs" if settings.path_order == 2 else "pairs and triples"
    pairs = f" It knows {runs} of neighbours, too." if whole_reviewer.knows_runs(settings) else ""
    begun = settings.pretrained_sha256
    told = [
        (
            settings.pairs == "path",
            f"Beside its recurrent layer it has a wide path, a linear classifier of the words and "
            f"{runs} of a review: its accuracy is not that of the layer alone.",
        ),
        (
            settings.ratio_inputs,
            "Its recurrent layer reads, beside each word, how much more often positive training "
            "reviews have it and the words before it: of what they do not have, nothing.",
        ),
        (
            settings.loss == "squared",
            "It was trained to give 1 or -1; its probability is (1 + z) / 2 of what it gives, "
            "within 0 and 1.",
        ),
        (settings.unlabelled, "It has learned from reviews without labels, too."),
        (
            settings.teacher is not None,
            "Those had the labels that an earlier run gave them with a probability of at least "
            f"{settings.confidence:g}: params_sha256 {settings.teacher_sha256}.",
        ),
        (
            settings.pretrained is not None,
            "It was begun with the weights of another run, which learned to tell words from those "
            f"around them: params_sha256 {begun}.",
        ),
    ]
    return cards.Text(
        "Tells positive reviews of films from negative ones.",
        "reviews",
        "Comparison with other models of this data set, and teaching.",
        [
            f"It reads the last {whole_reviewer.longest(settings):,} tokens of a review and no "
            f"others. It knows the most frequent tokens of the training reviews, {known:,} at "
            f"most; all others are one unknown token to it.{pairs}",
            *(sentence for holds, sentence in told if holds),
            *NOT_MEASURED,
        ],
        f'python experiments/{experiment}.py predict "not bad at all, I loved it" --run DIR',
    )


# ---- digits -------------------------------------------------------------------------------------


def read_digit_run(script: Any, folder: Path, which: str | None) -> digits_reader.Trained:
    """The run in a folder, as ``predict`` reads it; ``which`` of several weights."""
    return digits_reader.read(
        folder, script.Config, script.check, script.make_model, script.inputs, which
    )


def score_digits(
    script: Any, trained: digits_reader.Trained, settings: Any, limit: int | None
) -> cards.Scored:
    """The answers to the test images (the first ``limit``), by digit and by ink."""
    whole = mnist.load(settings.data, validation_size=settings.validation_size)
    test = whole.first(settings.limit).splits["test"]
    images, label = test["image"][:limit], test["label"][:limit]
    ink = images.mean(axis=(1, 2)) / 255
    return cards.Scored(
        label,
        digits_reader.probabilities(trained, images),
        tuple("0123456789"),
        {
            "digit": [(str(digit), label == digit) for digit in range(10)],
            "ink (mean brightness, 0 to 1), quartiles": cards.quartiles(ink, ".3f"),
        },
    )


def digits_text(experiment: str, settings: Any) -> cards.Text:
    """What a card says of a model of digits beside its numbers."""
    odd = getattr(settings, "loss", None) == "double_softmax"
    return cards.Text(
        "Tells handwritten digits apart.",
        "images",
        "Comparison with other models of this data set under the same protocol, and teaching.",
        [
            "An image is 28 x 28 grey pixels, white on black, with one digit in the middle, as "
            "MNIST has them; images of other kinds were not measured.",
            "It names a digit whatever an image shows: what it says of images without one was not "
            "measured.",
            "How it does on other people's handwriting than that of the test images was not "
            "measured.",
            *(["Probabilities are one softmax of its outputs; it was trained with two."] * odd),
        ],
        f"python experiments/{experiment}.py predict four.png --run DIR",
    )


REVIEWS = Subject(
    read_review_run, score_reviews, reviews_text, lambda settings: ("vocabulary.txt",)
)
WHOLE_REVIEWS = Subject(
    read_whole_review_run, score_whole_reviews, whole_reviews_text, whole_reviewer.file_names
)
DIGITS = Subject(read_digit_run, score_digits, digits_text, lambda settings: ())
SUBJECTS = {"imdb": REVIEWS, "reviews": WHOLE_REVIEWS, "mnist": DIGITS, "smnist": DIGITS}
