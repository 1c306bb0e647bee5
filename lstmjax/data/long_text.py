"""The words at one end of a text of any length, in little memory.

A model looks at the last (or the first) few words of a text. They are found here piece by piece,
and are those that `ngrams.TOKENS` finds in the whole text. Only lower case may depend on what
stands before and after (the Greek Σ at the end of a word is ς), so a text is cut at blanks, or
marks, that end a word for that rule, too. Only one without any such blank in `PIECE` characters is
cut elsewhere, and a word as long as that is cut off: no vocabulary has it.
"""

import codecs
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import BinaryIO, NamedTuple

from lstmjax.data import ngrams, text

PIECE = 2**20  # characters
MOST_BYTES = 2**30
# "Case-ignorable" to Unicode (3.13): the rule for Σ looks across these.
_LOOKED_ACROSS = ".:^`"
_BLANKS = "".join(set(text.FILTERS + " ") - set(_LOOKED_ACROSS))
_BREAK = re.compile("<br />", re.IGNORECASE)  # the only blank of more than one character


class _Kind(NamedTuple):
    """How a text is divided: into tokens; behind which characters it may be cut, and behind which
    if need be; whether `<br />` is a blank."""

    tokens: Callable[[str], list[str]]
    blanks: str
    looked_across: str
    breaks: bool


_KINDS = {
    "words": _Kind(ngrams.TOKENS["words"], _BLANKS, _LOOKED_ACROSS, False),
    "punctuation": _Kind(
        ngrams.TOKENS["punctuation"],
        "".join(filter(str.isspace, map(chr, range(0x3001)))) + ',"()!?;',
        ".:",
        True,
    ),
}


def decoded(file: BinaryIO) -> Iterator[str]:
    """The pieces of a text in UTF-8; bytes that are none become U+FFFD, as in the data sets.

    Raises:
      ValueError: it has more than `MOST_BYTES`: it may be one without an end.
    """
    decoder = codecs.getincrementaldecoder("utf-8-sig")("replace")
    total = 0
    while content := file.read(PIECE):
        total += len(content)
        if total > MOST_BYTES:
            raise ValueError(f"text: got more than {MOST_BYTES:,} bytes, expected fewer")
        yield decoder.decode(content)
    yield decoder.decode(b"", final=True)


def words_at_end(
    pieces: Iterable[str], count: int, truncating: str = "pre", tokens: str = "words"
) -> list[str]:
    """The words of a text that are left when it is cut to `count` words.

    Args:
      pieces: the text, in pieces of any size.
      count: how many words at most, >= 1.
      truncating: `"pre"` keeps the last words, `"post"` the first; then no more pieces are taken
        than are needed.
      tokens: what counts as a word, one of `ngrams.TOKENS`.

    Returns:
      The words.
    """
    kind = _KINDS[tokens]
    found = _words(_without_breaks(pieces) if kind.breaks else pieces, kind)
    return list(deque(found, maxlen=count) if truncating == "pre" else islice(found, count))


def _without_breaks(pieces: Iterable[str]) -> Iterator[str]:
    """The pieces with a line's end for every `<br />`, which no other one can come of."""
    rest = ""
    for piece in pieces:
        rest = _BREAK.sub("\n", rest + piece)
        done = max(len(rest) - len("<br /"), 0)
        yield rest[:done]
        rest = rest[done:]
    yield rest


def _words(pieces: Iterable[str], kind: _Kind) -> Iterator[str]:
    rest = ""
    for piece in pieces:
        for start in range(0, len(piece), PIECE):
            rest += piece[start : start + PIECE]
            cut = _last(rest, kind.blanks)
            if cut < 0 and len(rest) > PIECE:
                cut = _last(rest, kind.looked_across)
                rest = rest[:PIECE] if cut < 0 else rest
            yield from kind.tokens(rest[: cut + 1])
            rest = rest[cut + 1 :]
    yield from kind.tokens(rest)


def _last(text: str, characters: str) -> int:
    """Where the last of some characters stands in a text; -1 where there is none."""
    return max(map(text.rfind, characters))
