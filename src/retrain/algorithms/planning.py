"""Planning tokens: which tokens of a response belong to a phrase of strategy ("wait, let me ...").

Phrases are searched in the text, and exactly the tokens that overlap a found phrase are marked.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from retrain.errors import ConfigError
from retrain.types import BoolArray, TokenRanges

if TYPE_CHECKING:
    from retrain.config.schema import Config

DEFAULT_GRAMS: tuple[str, ...] = (
    "wait let me",
    "let me think",
    "on second thought",
    "let me check",
    "let me verify",
    "is this right",
    "double check",
    "try another approach",
    "go back and",
    "start over",
    "that's not right",
    "that doesn't work",
    "another way to",
    "or we could",
    "what if we",
    "notice that",
    "the key is",
    "the key insight",
)
"""Phrases searched unless ``logging.strategic_grams`` names others."""

_PLACE = "logging.strategic_grams"
# Words of a phrase stand apart by spaces, commas or hyphens, their non-breaking forms included, never by a
# newline: a new line is a new thought.
_SEPARATOR = "[ \u00a0,\\-\u2010\u2011]+"
_APOSTROPHE = "['\u2019]"
_ASCII = bytes(range(128))


def _words(gram: str) -> list[str]:
    return [word for word in re.split("[\\s\u00a0,\\-\u2010\u2011]+", gram) if word]


def _fold(text: str) -> str:
    # Lower case without a change of length, so that offsets into the text stay valid: U+0130 is the one
    # character that lower() turns into two.
    if not text.isascii():
        # Most other characters of a response have no case (quotes, dashes, signs): bytes are then folded far faster.
        data = text.encode("utf-8", "surrogatepass")
        rest = data.translate(None, delete=_ASCII).decode("utf-8", "surrogatepass")
        if rest == rest.lower():
            return data.lower().decode("utf-8", "surrogatepass")
    return text.replace("\u0130", "i").lower()


def parse_grams(text: str) -> tuple[str, ...]:
    """Read ``logging.strategic_grams``: a JSON array of strings, or comma-separated phrases.

    Blank text means the default phrases, ``[]`` none. A comma inside a phrase needs the JSON form (or CSV
    quotes); it counts as a space between words. ConfigError for anything else.
    """
    stripped = text.strip()
    if not stripped:
        return DEFAULT_GRAMS
    if stripped[0] in "[{":
        try:
            parsed: Any = json.loads(stripped)
        except json.JSONDecodeError as error:
            raise ConfigError(
                f"{_PLACE} opens like JSON and is not: {error}.",
                fix='write ["first phrase", "second phrase"].',
            ) from error
        if not isinstance(parsed, list) or not all(isinstance(g, str) for g in cast("list[Any]", parsed)):
            raise ConfigError(
                f"{_PLACE} must be a JSON array of strings.", fix='write ["first phrase", "second phrase"].'
            )
        found = cast("list[str]", parsed)
    else:
        try:
            rows = list(csv.reader(io.StringIO(stripped), skipinitialspace=True, strict=True))
        except csv.Error as error:
            raise ConfigError(
                f"{_PLACE} is not comma-separated text: {error}.",
                fix='write first phrase, "second, with a comma".',
            ) from error
        found = [cell for row in rows for cell in row if cell.strip()]
    return _checked(found)


def _checked(grams: Iterable[str]) -> tuple[str, ...]:
    checked = [" ".join(_words(gram)) for gram in grams]
    for gram in checked:
        if not re.search(r"\w", gram):
            raise ConfigError(f"{_PLACE} holds a phrase without a word: {gram!r}.", fix="remove it.")
    return tuple(dict.fromkeys(checked))


Offsets: TypeAlias = Sequence[tuple[int, int]] | npt.NDArray[np.int64] | TokenRanges
"""Half-open character ranges of T tokens: pairs in any order, or an array (T, 2) or more in text order."""


class RegexDetector:
    """Marks the tokens of every occurrence of a phrase, on word boundaries and in any letter case.

    Words of a phrase may be separated by spaces, commas or hyphens, not by newlines; apostrophes may be
    straight or typographic. Occurrences may overlap. ConfigError for a phrase without a word.
    """

    reads_lines = True
    """No phrase reaches over a line feed, so that the lines of a text may be those of many responses; and the
    ranges may be an array."""

    def __init__(self, grams: Sequence[str] = DEFAULT_GRAMS) -> None:
        self.grams = _checked(grams)
        self._searches = [self._search(gram) for gram in self.grams]

    @staticmethod
    def _search(gram: str) -> tuple[list[str], re.Pattern[str]]:
        folded = _fold(gram).replace("\u2019", "'")
        # The longest first: it is the least likely to be there.
        pieces = sorted(re.split("[ ']", folded), key=len, reverse=True)
        body = _SEPARATOR.join(re.escape(word).replace("'", _APOSTROPHE) for word in folded.split(" "))
        if re.match(r"\w", folded):
            # The boundary before the phrase is looked for after its first letters: a pattern that begins with
            # letters is found by a plain search for them, one that begins with \b is tried at every character.
            first = re.escape(re.split("[ ']", folded)[0])
            body = f"{first}(?<=\\b{first})" + body.removeprefix(first)
        after = r"\b" if re.search(r"\w$", folded) else ""
        return pieces, re.compile(body + after)

    def _spans(self, text: str) -> Iterator[tuple[int, int]]:
        folded = _fold(text)
        absent: set[str] = set()
        for pieces, pattern in self._searches:
            # Most phrases are absent, and a plain search says so far faster than a pattern.
            if not absent.isdisjoint(pieces):
                continue
            missing = next((piece for piece in pieces if piece not in folded), None)
            if missing is not None:
                absent.add(missing)
                continue
            found = pattern.search(folded)
            while found:
                yield found.span()
                # From the next character on, not from the match's end: a phrase may overlap itself.
                found = pattern.search(folded, found.start() + 1)

    def __call__(self, text: str, offsets: Offsets) -> BoolArray:
        """One bool per token: does its half-open character range overlap a phrase of ``text``?

        ``offsets`` holds T of them; a token of zero width is never marked.
        """
        return overlapping(list(self._spans(text)), len(text), offsets)


def overlapping(spans: Sequence[tuple[int, int]], length: int, offsets: Offsets) -> BoolArray:
    """One bool per token: does its half-open range overlap one of ``spans`` in a text of ``length`` characters?"""
    if isinstance(offsets, TokenRanges):
        return offsets.overlapping(spans)
    mask_T = np.zeros(len(offsets), dtype=np.bool_)
    if not spans or not len(offsets):
        return mask_T
    if isinstance(offsets, np.ndarray):
        ends = np.ascontiguousarray(offsets[:, 1])
        filled = ends > offsets[:, 0]
        # An empty token inside a split character lies at its end, and the tokens after it begin before that.
        starts = np.maximum.accumulate(np.where(filled, offsets[:, 0], 0))
        firsts = np.searchsorted(ends, [start for start, _ in spans], side="right").tolist()
        lasts = np.searchsorted(starts, [end for _, end in spans], side="left").tolist()
        for first, last in zip(firsts, lasts, strict=True):
            mask_T[first:last] = True
        return mask_T & filled
    ranges = np.fromiter(itertools.chain.from_iterable(offsets), dtype=np.int64, count=2 * len(offsets))
    starts, ends = ranges[::2], ranges[1::2]
    # Characters inside a span before each position: a token overlaps one when that count grows over it.
    inside = np.zeros(length + 1, dtype=np.int64)
    for start, end in spans:
        inside[start + 1 : end + 1] = 1
    before = np.cumsum(inside)
    return before[np.clip(ends, 0, length)] > before[np.clip(starts, 0, length)]


def build(config: Config) -> RegexDetector:
    """The detector of ``logging.strategic_grams``."""
    return RegexDetector(parse_grams(config.logging.strategic_grams))
