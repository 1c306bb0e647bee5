"""Data made on the spot for machines without the real thing: reviews from a grammar, drawn digits.

Neither is IMDB nor MNIST and nothing trained on them may be called so; the names
`offline_reviews` and `offline_digits` say which data it was.

**Reviews.** A review is a few opinions about aspects of a film, small talk, and one sentence of
contrast that holds a concession and the verdict; the label is that of the verdict:
"the plot was dull, but in the end i loved it" is positive, "i loved it, even though the plot was
dull" too, "the plot was not good at all, yet the cast was far from dull" as well. Concession and
verdict are drawn from the same clauses with opposite signs, and any clause may be negated, so a
bag of words sees little of the label: order decides. The texts are the same on every machine: only
`random.Random.random` is used, a stream that Python promises to keep.

**Digits.** The digits of matplotlib's own fonts, drawn once by Pillow, then distorted by random
affine maps and dimmed in NumPy. The drawn glyphs depend on the versions of FreeType (in Pillow)
and of the fonts (in matplotlib); the rest on the seed alone, up to the last bit of sine and cosine.
"""

import hashlib
import os
import random
from collections.abc import Sequence

import numpy as np

Labelled = dict[str, tuple[list[str], np.ndarray]]

REVIEW_SIZES = {"train": 20000, "test": 5000}
_REVIEW_SEED = 20150814
_UNLABELLED_SIZE = 10_000
REVIEWS_VERSION = f"grammar 1 {REVIEW_SIZES} {_REVIEW_SEED}"  # of the text; part of cache keys

DIGIT_SIZES = {"train": 20000, "test": 4000}
_DIGIT_SEED = 19980101

_GOOD = "good great wonderful brilliant moving charming clever gripping superb delightful".split()
_BAD = "bad dull awful boring clumsy tedious weak silly painful lifeless".split()
_LOVED = "loved enjoyed admired adored liked".split()
_HATED = "hated disliked regretted loathed despised".split()
_ASPECTS = (
    "plot", "acting", "music", "script", "ending", "beginning", "camera work", "cast", "pacing",
    "dialogue", "story", "leading man", "second half", "first half", "humour", "whole thing",
)  # fmt: skip
_THINGS = (
    "it",
    "this film",
    "the film",
    "the movie",
    "every scene",
    "the lot",
    "the story",
)
_ADVERBS = ("really", "truly", "quite", "simply", "honestly", "rather", "very", "so")
_SMALL_TALK = (
    "i watched it with my brother on a rainy evening",
    "my sister had read the book before",
    "we saw it on a saturday in a small cinema",
    "the film runs for about two hours",
    "it was made in the seventies, as far as i know",
    "a friend had lent me the disc",
    "there are trains, a harbour and a lot of snow",
    "most of it takes place in one house",
    "the director had made three films before this one",
    "it is set in a village near the sea",
    "the credits say that it was shot in nine weeks",
    "people in the row behind us talked all the time",
    "i had seen the poster at the station",
    "a detective comes to town and asks questions",
    "there is a long scene in a kitchen",
    "two brothers inherit a farm and a debt",
)
# No conjunction is in both lists: with the punctuation gone it alone says which clause is which.
_CONCEDING_FIRST = (
    "{no}, but {yes}",
    "{no}, yet {yes}",
    "{no}. Still, {yes}",
    "although {no}, {yes}",
)
_VERDICT_FIRST = ("{yes}, even though {no}", "{yes}, though {no}")


class _Dice:
    """Choices from the one stream of `random.Random` that is promised never to change."""

    def __init__(self, seed: int):
        self._draw = random.Random(seed).random

    def below(self, count: int) -> int:
        return int(self._draw() * count)

    def one_of(self, options: Sequence[str]) -> str:
        return options[self.below(len(options))]

    def happens(self, probability: float) -> bool:
        return self._draw() < probability


def _clause(dice: _Dice, positive: bool) -> str:
    """One opinion of the given sign, negated one time in four."""
    negated = dice.happens(0.25)
    if dice.happens(0.5):
        word = dice.one_of(_GOOD if positive != negated else _BAD)
        subject = f"the {dice.one_of(_ASPECTS)} was"
        if negated:
            pattern = dice.one_of(("not {} at all", "never {}", "hardly {}", "far from {}"))
            return f"{subject} {pattern.format(word)}"
        return f"{subject} {dice.one_of(_ADVERBS)} {word}"
    word = dice.one_of(_LOVED if positive != negated else _HATED)
    thing = dice.one_of(_THINGS)
    if negated:
        return f"{dice.one_of(('i never', 'nobody here', 'i can not say i'))} {word} {thing}"
    return f"{dice.one_of(('i', 'in the end i', 'all of us', 'i must say i'))} {word} {thing}"


def _review(dice: _Dice, positive: bool) -> str:
    """One review of about 15 to 110 words whose verdict has the given sign."""
    sentences = [
        _clause(dice, positive if dice.happens(0.8) else not positive) for _ in range(dice.below(7))
    ]
    sentences += [dice.one_of(_SMALL_TALK) for _ in range(1 + dice.below(5))]
    for last in range(len(sentences) - 1, 0, -1):  # shuffle
        other = dice.below(last + 1)
        sentences[last], sentences[other] = sentences[other], sentences[last]
    order = dice.one_of(_CONCEDING_FIRST if dice.happens(0.7) else _VERDICT_FIRST)
    contrast = order.format(yes=_clause(dice, positive), no=_clause(dice, not positive))
    place = len(sentences) - min(dice.below(3), len(sentences) - 1)
    sentences.insert(place, contrast)
    return " ".join(sentence[0].upper() + sentence[1:] + "." for sentence in sentences)


def reviews(sizes: dict[str, int] | None = None, seed: int = _REVIEW_SEED) -> Labelled:
    """Generated film reviews, half of each split positive.

    Args:
      sizes: reviews per split; `REVIEW_SIZES` by default.
      seed: of the whole text; each split has a stream of its own.

    Returns:
      Split name → (texts, int32 labels `[N]`: 0 negative, 1 positive).
    """
    splits = {}
    for number, (split, size) in enumerate((sizes or REVIEW_SIZES).items()):
        dice = _Dice(1000 * seed + number)
        labels = np.arange(size, dtype=np.int32) % 2
        for last in range(size - 1, 0, -1):
            other = dice.below(last + 1)
            labels[[last, other]] = labels[[other, last]]
        splits[split] = [_review(dice, bool(label)) for label in labels], labels
    return splits


def unlabelled() -> list[str]:
    """Further reviews of the same grammar, without their labels."""
    return reviews({"unlabelled": _UNLABELLED_SIZE}, _REVIEW_SEED + 1)["unlabelled"][0]


_FONTS = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSansMono-Bold",
    "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "STIXGeneral", "STIXGeneralBol",
    "STIXGeneralItalic", "cmr10", "cmss10", "cmtt10", "cmb10",
)  # fmt: skip
_GLYPH = 64  # side of the canvas that a glyph is drawn on
_SIDE = 28


def glyphs() -> np.ndarray:
    """The ten digits in each font, float32 `[F, 10, 32, 32]` in [0, 255], centred by their box.

    Drawn white on black at twice the size and averaged, for edges as soft as those of a pen.
    """
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    folder = os.path.join(matplotlib.get_data_path(), "fonts", "ttf")
    drawn = np.empty((len(_FONTS), 10, _GLYPH // 2, _GLYPH // 2), np.float32)
    for f, name in enumerate(_FONTS):
        font = ImageFont.truetype(os.path.join(folder, f"{name}.ttf"), 56)
        for digit in range(10):
            canvas = Image.new("L", (_GLYPH, _GLYPH))
            draw = ImageDraw.Draw(canvas)
            left, top, right, bottom = draw.textbbox((0, 0), str(digit), font=font)
            corner = ((_GLYPH - right - left) / 2, (_GLYPH - bottom - top) / 2)
            draw.text(corner, str(digit), fill=255, font=font)
            twice = np.asarray(canvas, np.float32).reshape(_GLYPH // 2, 2, _GLYPH // 2, 2)
            drawn[f, digit] = twice.mean(axis=(1, 3))
    return drawn


def digits_key(drawn: np.ndarray) -> str:
    """Hash of all that `digits` depends on, for the cache."""
    options = f"affine 1 {DIGIT_SIZES} {_DIGIT_SEED} {drawn.shape}"
    return hashlib.sha256(options.encode() + drawn.tobytes()).hexdigest()


def digits(
    drawn: np.ndarray, sizes: dict[str, int] | None = None, seed: int = _DIGIT_SEED
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Distorted digits, as many of each class as of any other.

    Args:
      drawn: float32 `[F, 10, 32, 32]` from `glyphs`.
      sizes: images per split; `DIGIT_SIZES` by default.
      seed: of classes, fonts and distortions.

    Returns:
      Split name → (uint8 images `[N, 28, 28]`, int32 labels `[N]`).
    """
    random_state = np.random.RandomState(seed)  # its streams are frozen, a Generator's are not
    splits = {}
    for split, size in (sizes or DIGIT_SIZES).items():
        labels = random_state.permutation(np.arange(size) % 10).astype(np.int32)
        fonts = random_state.randint(len(drawn), size=size)
        images = np.empty((size, _SIDE, _SIDE), np.uint8)
        for begin in range(0, size, 1000):  # a thousand at a time bounds the memory
            part = slice(begin, begin + 1000)
            images[part] = _distort(drawn, fonts[part], labels[part], random_state)
        splits[split] = images, labels
    return splits


def _distort(
    drawn: np.ndarray, fonts: np.ndarray, labels: np.ndarray, random_state: np.random.RandomState
) -> np.ndarray:
    """uint8 `[N, 28, 28]`: pixel u of the image shows the glyph at centre + A⁻¹(u − shift)."""
    count = len(labels)
    each = (count, 1, 1)
    angle = random_state.uniform(-0.35, 0.35, each)
    shear = random_state.uniform(-0.35, 0.35, each)
    height = random_state.uniform(0.65, 1.1, each)  # of a glyph that is about 22 pixels high
    width = height * random_state.uniform(0.75, 1.25, each)
    shift = random_state.uniform(-2.5, 2.5, (count, 2, 1, 1))
    brightness = random_state.uniform(0.7, 1.0, each)

    grid = np.stack(np.mgrid[:_SIDE, :_SIDE]) - (_SIDE - 1) / 2  # [2, 28, 28]: down, right
    down, right = np.moveaxis(grid[None] - shift, 1, 0)  # [N, 28, 28] each
    cos, sin = np.cos(angle), np.sin(angle)
    down, right = cos * down - sin * right, sin * down + cos * right
    right = right + shear * down
    source = drawn[fonts, labels]
    centre = (source.shape[-1] - 1) / 2
    image = _bilinear(source, down / height + centre, right / width + centre)
    return np.rint(image * brightness).astype(np.uint8)


def _bilinear(source: np.ndarray, down: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Values of `source [N, S, S]` at fractional places `[N, 28, 28]`; outside counts as edge."""
    down = np.clip(down, 0, source.shape[1] - 1.001)
    right = np.clip(right, 0, source.shape[2] - 1.001)
    y, x = down.astype(np.intp), right.astype(np.intp)
    dy, dx = down - y, right - x
    n = np.arange(len(source))[:, None, None]
    upper = source[n, y, x] * (1 - dx) + source[n, y, x + 1] * dx
    lower = source[n, y + 1, x] * (1 - dx) + source[n, y + 1, x + 1] * dx
    return upper * (1 - dy) + lower * dy
