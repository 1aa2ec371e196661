"""The final answer of a text: what stands in its last box. Rewards read responses with it, sources solutions."""

from __future__ import annotations

import re

# "\\" before a box is a line break, or one more level of escaping: either way the box counts.
_MARKS = re.compile(
    r"(?P<box>\\(?:boxed|fbox)(?![A-Za-z])\s*)|\\\\(?!boxed|fbox)|\\[{}]|(?P<open>\{)|(?P<close>\})"
)
# What a box without braces holds: a number, a command with its arguments, or one letter.
_BARE = re.compile(
    r"[-+]?(?:\d|\.\d)[\d.,/:]*%?|[-+]?\\(?!boxed|fbox)[A-Za-z]+\d*(?:\{[^{}]*\})*|[A-Za-z](?![A-Za-z])",
)


def last_boxed(text: str) -> str | None:
    r"""Content of the last balanced ``\boxed{...}`` or ``\fbox{...}``, or of ``\boxed 5``; None without one.

    "Last" is the one that begins last, so the inner of two nested boxes. Escaped braces do not count; a box
    that is never closed is no box. One pass over the text.
    """
    best: tuple[int, str] | None = None
    opened: list[int] = []  # per open brace: where its box's content begins, or -1 for a plain brace
    end_of_box = -1
    for mark in _MARKS.finditer(text):
        if mark["box"] is not None:
            end_of_box = mark.end()
            bare = _BARE.match(text, mark.end())
            if bare is not None:
                best = (mark.end(), bare[0].rstrip(".,:/"))
        elif mark["open"] is not None:
            opened.append(mark.end() if mark.start() == end_of_box else -1)
        elif mark["close"] is not None and opened:
            begin = opened.pop()
            if begin >= 0 and (best is None or begin > best[0]):
                best = (begin, text[begin : mark.start()])
    return None if best is None else best[1]
