"""Arithmetic problems that need no data set: four levels, cut into splits by a hash of the problem itself.

The problems are a pure function of level and split. No seed and no file takes part, so the test split of one
machine and version is the test split of every other one, and pre-training can leave it out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

LEVELS = (1, 2, 3, 4)
SPLITS = ("train", "validation", "test")

TINY_INSTRUCTION = "Put the answer in \\boxed{}."
"""What follows the question, on a line of its own, in the prompts the embedded model was pre-trained on."""

_LEVEL_3_PARTNERS = 8


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem: ``id`` is unique and permanent, ``answer`` a decimal integer and never negative."""

    id: str
    question: str
    answer: str
    level: int


def problems(levels: Sequence[int], split: str) -> Sequence[Problem]:
    """Every problem of the given levels in one split, ordered by hash so that any prefix is a fair sample.

    Level 1 holds sums and differences of one digit (155), level 2 those of two digits (12,195), level 3
    about 14,000 of three digits, level 4 products of two digits and ``a + b - c`` (about 16,000). About 80 %
    are ``train``, 10 % ``validation`` and 10 % ``test``. Operands of a sum or product share a split in both
    orders. Repeated levels count once. ValueError when a level or the split is unknown, or no level is given.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; there are {', '.join(SPLITS)}")
    if not levels:
        raise ValueError("at least one level is needed")
    for level in levels:
        if level not in LEVELS:
            raise ValueError(f"unknown level {level!r}; there are {', '.join(map(str, LEVELS))}")
    return _problems(tuple(sorted(set(levels))), split)


@lru_cache(maxsize=16)
def _problems(levels: tuple[int, ...], split: str) -> tuple[Problem, ...]:
    chosen = {p.id: p for level in levels for p, key in _LEVEL[level]() if _split_of(key) == split}
    return tuple(sorted(chosen.values(), key=lambda p: (_hash(p.id), p.id)))


def _hash(text: str) -> int:
    # Not hash(): that one differs from process to process.
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _split_of(key: str) -> str:
    bucket = _hash(f"split {key}") % 10
    return "train" if bucket < 8 else SPLITS[bucket - 7]


def _two(level: int, a: int, operator: str, b: int) -> tuple[Problem, str]:
    answer = {"+": a + b, "-": a - b, "*": a * b}[operator]
    # a + b and b + a are one fact: were they cut apart, the test split would be half known.
    low, high = (b, a) if operator == "-" else (min(a, b), max(a, b))
    problem = Problem(f"{level}/{a}{operator}{b}", f"{a} {operator} {b} = ?", str(answer), level)
    return problem, f"{low}{operator}{high}"


def _sums_and_differences(level: int, first: int, last: int) -> Iterator[tuple[Problem, str]]:
    for a in range(first, last + 1):
        for b in range(first, last + 1):
            yield _two(level, a, "+", b)
            if b <= a:
                yield _two(level, a, "-", b)


def _level_1() -> Iterator[tuple[Problem, str]]:
    return _sums_and_differences(1, 0, 9)


def _level_2() -> Iterator[tuple[Problem, str]]:
    return _sums_and_differences(2, 10, 99)


def _level_3() -> Iterator[tuple[Problem, str]]:
    # All pairs would be 1.2 million; a few hashed partners for every first operand cover the range as well.
    for a in range(100, 1000):
        for k in range(_LEVEL_3_PARTNERS):
            yield _two(3, a, "+", 100 + _hash(f"3 {a} + {k}") % 900)
            yield _two(3, a, "-", 100 + _hash(f"3 {a} - {k}") % (a - 99))


def _level_4() -> Iterator[tuple[Problem, str]]:
    for a in range(10, 100):
        for b in range(10, 100):
            yield _two(4, a, "*", b)
            c = 10 + _hash(f"4 {a} {b}") % (min(99, a + b) - 9)
            problem = Problem(f"4/{a}+{b}-{c}", f"{a} + {b} - {c} = ?", str(a + b - c), 4)
            yield problem, f"{min(a, b)}+{max(a, b)}-{c}"


_LEVEL = {1: _level_1, 2: _level_2, 3: _level_3, 4: _level_4}
