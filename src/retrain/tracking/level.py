"""The best level that a run has reached, and whether it has fallen from it since.

What the newest steps say of themselves is not enough: a policy that collapsed in its first steps is the same ever since.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

Row: TypeAlias = Mapping[str, Any]
"""One line of metrics.jsonl."""

WINDOW = 20
"""Steps that a judgement looks back on at most."""
_START = (2, 8)
"""Steps and groups that the level at the start is the mean of, at least."""
_ENOUGH = (5, 30)
"""The same for the best level and for the newest one."""
_SURE = 3.5
"""Standard errors by which the newest must differ from the start, each group counting as one answer;"""
_SURE_OF_BEST = 5.5
"""and from the best: that one was lucky among many."""
_COMPANIONS = {"mean_length": "mean_length", "entropy": "entropy_mean"}
"""Core metrics that move when a policy collapses, and their keys."""


def number(row: Row, key: str) -> float | None:
    """A finite number of a row, None where it holds none."""
    found = row.get(key)
    return float(found) if isinstance(found, int | float) and math.isfinite(found) else None


@dataclass(frozen=True, slots=True)
class Level:
    """Means over steps ``first`` to ``last`` (0-based) with ``groups`` groups; correct rates in [0, 1]."""

    first: int
    last: int
    groups: float
    rate: float
    solvable: float | None
    """Share of groups with a correct answer, None where the rows do not say."""
    companions: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Fall:
    """The correct rate is below half of an earlier level: in words, the core metrics that moved with it, and whether
    so much is gone that the policy counts as collapsed."""

    message: str
    moved: tuple[str, ...]
    collapsed: bool


@dataclass(slots=True)
class Past:
    """Follows a run's correct rate, step by step."""

    _rows: deque[Row] = field(default_factory=lambda: deque[Row](maxlen=WINDOW))
    _start: Level | None = None
    _best: Level | None = None
    _lost: Level | None = None
    """The level that the run fell from and has not come back to."""

    def observe(self, row: Row) -> Fall | None:
        """Take in a training step; the fall in which the run is now, None where there is none.

        It begins when the difference is more than chance, and ends at half of the level that was lost.
        """
        rate, groups = number(row, "correct_rate"), number(row, "batch_size")
        if rate is None or groups is None or groups < 1:
            return None
        self._rows.append(row)
        self._start = self._start or self._mean(*_START)
        now = self._mean(*_ENOUGH)
        if now is None:
            return None
        if self._best is None or now.rate >= self._best.rate:
            self._best = now
        if self._lost is None:
            early = self._start is not None and now.last <= self._start.last + WINDOW
            for level, sure in ((self._best, _SURE_OF_BEST), (self._start if early else None, _SURE)):
                if level is not None and level.last < now.first and _fell(level, now, sure):
                    self._lost = level
                    break
        if self._lost is not None and now.rate >= self._lost.rate / 2:
            self._lost = None
        return _fall(self._lost, now) if self._lost is not None else None

    def _mean(self, steps: int, groups: int) -> Level | None:
        """The level of the newest steps, as many as it takes; None before that."""
        count = total = 0
        for row in reversed(self._rows):
            count, total = count + 1, total + int(number(row, "batch_size") or 0)
            if count == WINDOW or (count >= steps and total >= groups):
                return _level(list(self._rows)[-count:])
        return None


def _level(rows: list[Row]) -> Level:
    def mean(key: str) -> float | None:
        known = [
            (w, v) for w, v in zip(weights, (number(row, key) for row in rows), strict=True) if v is not None
        ]
        return sum(w * v for w, v in known) / sum(w for w, _ in known) if known else None

    weights = [number(row, "batch_size") or 1.0 for row in rows]
    wrong = [number(row, "skipped_all_wrong") for row in rows]
    known = [count for count in wrong if count is not None]
    means = {name: mean(key) for name, key in _COMPANIONS.items()}
    return Level(
        first=int(rows[0]["step"]),
        last=int(rows[-1]["step"]),
        groups=sum(weights),
        rate=mean("correct_rate") or 0.0,
        solvable=1 - sum(known) / sum(weights) if len(known) == len(wrong) else None,
        companions={name: value for name, value in means.items() if value is not None},
    )


def _surely_below(before: float, now: float, groups: tuple[float, float], sure: float) -> bool:
    """Do two shares of independent groups differ by more than chance?"""
    share = (before * groups[0] + now * groups[1]) / sum(groups)
    spread = share * (1 - share) * (1 / groups[0] + 1 / groups[1])
    return before - now > sure * math.sqrt(max(0.0, spread))


def _fell(before: Level, now: Level, sure: float) -> bool:
    if now.rate >= before.rate / 2:
        return False
    groups = (before.groups, now.groups)
    if _surely_below(before.rate, now.rate, groups, sure):
        return True
    # Of a low correct rate the groups that hold a correct answer at all say more than their mean.
    with_any = (before.solvable, now.solvable)
    return (
        with_any[0] is not None
        and with_any[1] is not None
        and with_any[1] < with_any[0] / 2
        and _surely_below(with_any[0], with_any[1], groups, sure)
    )


def _fall(best: Level, now: Level) -> Fall:
    pairs = {name: (best.companions.get(name), now.companions.get(name)) for name in _COMPANIONS}
    moved = {
        name: (a, b) for name, (a, b) in pairs.items() if a and b is not None and (b > 2 * a or b < a / 2)
    }  # fmt: skip
    what = f"correct rate from {best.rate:.0%} (steps {best.first} to {best.last}) to {now.rate:.0%}"
    collapsed = bool(moved) or (best.rate >= 0.1 and now.rate < best.rate / 8)
    if "mean_length" in moved:
        what += ", completions from {:.0f} to {:.0f} tokens".format(*moved["mean_length"])
    if "entropy" in moved:
        what += ", entropy from {:.2g} to {:.2g} nats a token".format(*moved["entropy"])
    said = "has collapsed" if collapsed else "fell"
    return Fall(f"The policy {said}: {what}.", tuple(moved), collapsed)
