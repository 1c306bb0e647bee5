"""Model cards: accuracy by group with intervals, calibration, and the text around them.

A card in the sense of Mitchell et al. (2019) says what a model is, what it was trained on, what it
is for and what it is not for, and how well it does in parts of its test split. ``measure`` makes
the numbers of a card from a model's answers, ``card`` the text.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.special import ndtri

BINS = 10
PAIRS = 10  # confusions that a card lists
NEGATIONS = frozenset(
    "no not never none nobody nothing nowhere neither nor cannot without".split()
)  # and every word that ends in n't

# One group of examples: its name, and which ones they are, bool [N].
Group = tuple[str, np.ndarray]


class Scored(NamedTuple):
    """A model's answers to a test split of N examples and C classes.

    Attributes:
      label: int [N] in [0, C).
      probabilities: float64 [N, C].
      classes: the C names of the classes.
      groups: title → groups of examples.
    """

    label: np.ndarray
    probabilities: np.ndarray
    classes: Sequence[str]
    groups: Mapping[str, Sequence[Group]]

    @property
    def predicted(self) -> np.ndarray:
        """The most probable class, the first of equal ones; int [N]."""
        return np.argmax(self.probabilities, axis=1)

    @property
    def correct(self) -> np.ndarray:
        """Whether it is the right one; bool [N]."""
        return self.predicted == self.label


class Text(NamedTuple):
    """What only people can say of a model.

    Attributes:
      task: what it does, in one sentence.
      unit: what examples are called.
      use: what it is for.
      limits: sentences on what it is not for, or what was not measured.
      command: how it is used.
    """

    task: str
    unit: str
    use: str
    limits: Sequence[str]
    command: str


# ---- numbers ------------------------------------------------------------------------------------


def wilson(correct: int, count: int, level: float = 0.95) -> tuple[float, float]:
    """The interval of a share, k of n (Wilson, 1927).

        (k + z²/2 ± z √(k (n − k)/n + z²/4)) / (n + z²),   z the (1 + level)/2 normal quantile

    Args:
      correct: k, 0 <= k <= n.
      count: n >= 1.
      level: 0 < level < 1.

    Returns:
      ``(low, high)`` in [0, 1].

    Raises:
      ValueError: no example, more right ones than there are, or a ``level`` outside (0, 1).
    """
    if count < 1:
        raise ValueError(f"count: got {count}, expected at least 1")
    if not 0 <= correct <= count:
        raise ValueError(f"correct: got {correct}, expected 0 to {count}")
    if not 0 < level < 1:
        raise ValueError(f"level: got {level!r}, expected 0 < level < 1")
    z = ndtri((1 + level) / 2)
    centre = correct + z**2 / 2
    half = z * np.sqrt(correct * (count - correct) / count + z**2 / 4)
    # Of none or all, one end is 0 or 1 but for round-off.
    low = 0.0 if correct == 0 else (centre - half) / (count + z**2)
    high = 1.0 if correct == count else (centre + half) / (count + z**2)
    return float(low), float(high)


def calibration(
    confidence: np.ndarray, correct: np.ndarray, bins: int = BINS
) -> tuple[float, list[dict[str, Any]]]:
    """The expected calibration error, and its bins (Guo et al., 2017).

        ECE = Σₘ |Bₘ|/N · |accuracy(Bₘ) − mean confidence(Bₘ)|,   Bₘ: (m − 1)/M < confidence <= m/M

    Args:
      confidence: [N] in [0, 1], the probability of the class that was predicted.
      correct: bool [N].
      bins: M.

    Returns:
      ``(error, bins)``: of each bin that is not empty its ``low`` and ``high`` end, ``count``,
      ``correct`` and mean ``confidence``.

    Raises:
      ValueError: no example, or not as many answers as confidences.
    """
    confidence, correct = np.asarray(confidence, np.float64), np.asarray(correct, bool)
    if confidence.ndim != 1 or confidence.shape != correct.shape or confidence.size == 0:
        got = f"{list(confidence.shape)} and {list(correct.shape)}"
        raise ValueError(f"confidence, correct: got {got}, expected [N] twice, N at least 1")
    # Compared with the ends themselves: 10 * 0.7 is not quite what 0.7 is to 7/10.
    place = np.searchsorted(np.arange(1, bins) / bins, confidence, side="left")
    error, found = 0.0, []
    for m in range(bins):
        own = place == m
        if own.any():
            mean = float(confidence[own].mean())
            error += float(own.mean()) * abs(float(correct[own].mean()) - mean)
            ends = {"low": m / bins, "high": (m + 1) / bins}
            right = {"count": int(own.sum()), "correct": int(correct[own].sum())}
            found.append({**ends, **right, "confidence": mean})
    return error, found


def quartiles(values: np.ndarray, form: str = ",.0f") -> list[Group]:
    """Four groups of about equal size, from the smallest values to the largest.

    Equal values are in one group, so that sizes may differ; a group that is empty is left out.

    Args:
      values: [N].
      form: of the values in a group's name, "12 to 80".
    """
    ends = np.quantile(values, (0.25, 0.5, 0.75), method="inverted_cdf")
    place = np.searchsorted(ends, values, side="left")
    masks = [place == k for k in range(4)]
    return [
        (f"{values[own].min():{form}} to {values[own].max():{form}}", own)
        for own in masks
        if own.any()
    ]


def halves(mask: np.ndarray) -> list[Group]:
    """The examples that have something, and those that have not."""
    return [("yes", mask), ("no", ~mask)]


def negated(words: Iterable[str]) -> bool:
    """Whether one of some words, in lower case, is a negation: ``NEGATIONS``, or one in n't."""
    return any(word in NEGATIONS or word.endswith(("n't", "n’t")) for word in words)


def confusions(label: np.ndarray, predicted: np.ndarray, most: int = PAIRS) -> list[dict[str, int]]:
    """The pairs of a class and what it is taken for that occur most.

    Args:
      label: int [N].
      predicted: int [N].
      most: how many pairs at most.

    Returns:
      ``{"label", "predicted", "wrong", "count"}``, the last one the examples of that class; those
      that occur most first, equal ones in the order of their classes.
    """
    wrong = label != predicted
    pairs, counts = np.unique(
        np.stack([label[wrong], predicted[wrong]]), axis=1, return_counts=True
    )
    order = np.argsort(-counts, kind="stable")[:most]
    return [
        {
            "label": int(pairs[0, k]),
            "predicted": int(pairs[1, k]),
            "wrong": int(counts[k]),
            "count": int((label == pairs[0, k]).sum()),
        }
        for k in order
    ]


def measure(scored: Scored) -> dict[str, Any]:
    """All numbers of a card, in JSON's types.

    Returns:
      ``{"count", "correct", "groups": {title: [{"name", "count", "correct"}, …]}, "ece", "bins",
      "confusions"}``; groups without an example are left out.
    """
    correct = scored.correct
    confidence = scored.probabilities[np.arange(len(correct)), scored.predicted]
    error, bins = calibration(confidence, correct)
    groups = {
        title: [
            {"name": name, "count": int(own.sum()), "correct": int(correct[own].sum())}
            for name, own in found
            if own.any()
        ]
        for title, found in scored.groups.items()
    }
    return {
        "count": len(correct),
        "correct": int(correct.sum()),
        "groups": groups,
        "ece": error,
        "bins": bins,
        "confusions": confusions(scored.label, scored.predicted),
    }


# ---- text ---------------------------------------------------------------------------------------


def share(correct: int, count: int) -> str:
    """`0.8321 | 0.8274 to 0.8367`: a share and its interval, as two cells of a table."""
    low, high = wilson(correct, count)
    return f"{correct / count:.4f} | {low:.4f} to {high:.4f}"


def table(heading: str, rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown; ``heading`` and rows are cells joined by |."""
    names = heading.split(" | ")
    lines = [f"| {heading} |", "|---" * len(names) + "|"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def tables(measured: Mapping[str, Any], classes: Sequence[str], unit: str) -> str:
    """The measured biases: a table for each kind of group, and the confusions."""
    parts = []
    for title, cells in measured["groups"].items():
        rows = [
            (cell["name"], f"{cell['count']:,}", share(cell["correct"], cell["count"]))
            for cell in cells
        ]
        parts.append(table(f"{title} | {unit} | accuracy | 95 % interval", rows))
    if len(classes) > 2 and measured["confusions"]:
        rows = [
            (
                f"{classes[pair['label']]} as {classes[pair['predicted']]}",
                f"{pair['wrong']:,} of {pair['count']:,}",
                share(pair["wrong"], pair["count"]),
            )
            for pair in measured["confusions"]
        ]
        parts.append(table(f"taken for another | {unit} | share | 95 % interval", rows))
    return "\n\n".join(parts)


def calibration_text(measured: Mapping[str, Any], unit: str) -> str:
    """The calibration error and its bins."""
    rows = [
        (
            f"{one['low']:.1f} to {one['high']:.1f}",
            f"{one['count']:,}",
            f"{one['confidence']:.4f}",
            share(one["correct"], one["count"]),
        )
        for one in measured["bins"]
    ]
    heading = f"confidence | {unit} | mean confidence | accuracy | 95 % interval"
    return (
        f"Expected calibration error in {BINS} bins of equal width: **{measured['ece']:.4f}**. "
        "Confidence is the probability of the class that was predicted.\n\n" + table(heading, rows)
    )


HOW = (
    "The numbers below, and the test accuracy above, were computed by `python experiments/card.py "
    "make` from the answers of the finished model to the whole test split. These looks at the test "
    "split choose nothing: weights and settings were fixed before. Intervals are Wilson's (1927), "
    "of 95 %: they say how far a share of so many examples is known, and hold for one group at a "
    "time. Groups are not corrected for one another."
)
SOURCES = (
    "Mitchell et al. (2019), Model Cards for Model Reporting. Guo et al. (2017), On Calibration of "
    "Modern Neural Networks. Wilson (1927), Probable Inference, the Law of Succession, and "
    "Statistical Inference."
)


def card(
    title: str,
    text: Text,
    facts: Mapping[str, Mapping[str, str]],
    results: str,
    classes: Sequence[str],
    measured: Mapping[str, Any],
) -> str:
    """A model card in Markdown.

    Args:
      title: the model's name.
      text: what people say of it.
      facts: heading → name → what stands there: model, data, training.
      results: sentences on its accuracy and on seeds.
      classes: the names of its classes.
      measured: of ``measure``.
    """
    parts = [f"# Model card: {title}", text.task]
    for heading, pairs in facts.items():
        rows = [(name, _cell(value)) for name, value in pairs.items()]
        parts += [f"## {heading}", table(f"{heading.lower()} | ", rows)]
    low, high = wilson(measured["correct"], measured["count"])
    accuracy = (
        f"Test accuracy **{measured['correct'] / measured['count']:.4f}** "
        f"({measured['correct']:,} of {measured['count']:,} {text.unit}, 95 % interval {low:.4f} "
        f"to {high:.4f}). {results}"
    )
    limits = "\n".join(f"- {limit}" for limit in text.limits)
    parts += ["## Results", accuracy, "## Intended use", text.use, f"    {text.command}"]
    parts += ["## Limits", limits, "## Measured by group", HOW]
    parts += [tables(measured, classes, text.unit), "## Calibration"]
    parts += [calibration_text(measured, text.unit), "## Sources", SOURCES]
    return "\n\n".join(parts) + "\n"


def _cell(text: str) -> str:
    """Text that stays within a cell of a table."""
    return " ".join(str(text).split()).replace("|", "\\|")
