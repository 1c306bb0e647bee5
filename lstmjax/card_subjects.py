"""What model cards say of reviews and of digits: how runs are read and scored, and the text.

An experiment whose runs can be released (experiments/card.py) has a ``Subject`` in ``SUBJECTS``,
and its script has ``Config``, ``check``, ``make_model`` and ``load``.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.special import expit

from lstmjax import cards, digits_reader, finished, reviewer
from lstmjax.data import mnist, offline, prepared
from lstmjax.data import text as words_of
from lstmjax.records import RunError


class Subject(NamedTuple):
    """What the runs of an experiment are about.

    Attributes:
      read: ``read(script, folder, which)``: the trained run.
      score: ``score(script, trained, settings, limit)``: its answers to the first test examples.
      text: ``text(experiment, settings)``.
      files: further files of a run's folder that a release needs.
    """

    read: Callable
    score: Callable[..., cards.Scored]
    text: Callable[..., cards.Text]
    files: tuple[str, ...]


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
            "true class": [("negative", label == 0), ("positive", label == 1)],
            "words of the review, quartiles": cards.quartiles(np.array([len(o) for o in texts])),
            "negation in the words that the model is given": cards.halves(
                np.array([cards.negated(one) for one in given])
            ),
            "negation anywhere in the review": cards.halves(
                np.array([cards.negated(one) for one in texts])
            ),
        },
    )


def test_reviews(source: str) -> list[str]:
    """The texts of the test reviews, in their order."""
    folder = prepared.locate("imdb_reviews", source)
    return (offline.reviews() if folder is None else prepared.read_reviews(folder))["test"][0]


def reviews_text(experiment: str, settings: Any) -> cards.Text:
    """What a card says of a model of reviews beside its numbers."""
    end = "last" if settings.truncating == "pre" else "first"
    known = settings.vocabulary_size - words_of.INDEX_FROM - 1
    negations = ", ".join(sorted(cards.NEGATIONS))
    return cards.Text(
        "Tells positive reviews of films from negative ones.",
        "reviews",
        "Comparison with other models of this data set under the same protocol, and teaching.",
        [
            f"It reads the {end} {settings.max_length} words of a review and no others. It knows "
            f"the most frequent words of the training reviews, {known:,} at most; all others are "
            "one unknown word to it.",
            "Nothing was measured on other texts than the reviews of this data set: not on other "
            "kinds of text, on other languages, or on texts of a few words.",
            "There are two classes: a neutral review is called positive or negative, too.",
            "What it says was not examined by who writes, or by what a review is about.",
            f"A negation is one of {negations}, or a word in n't, wherever it stands: whether it "
            "negates what decides was not looked at.",
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


REVIEWS = Subject(read_review_run, score_reviews, reviews_text, ("vocabulary.txt",))
DIGITS = Subject(read_digit_run, score_digits, digits_text, ())
SUBJECTS = {"imdb": REVIEWS, "mnist": DIGITS, "smnist": DIGITS}
