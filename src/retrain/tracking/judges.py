"""What is wrong with a core metric, in words: judgements of its newest values, of two levels of it, and of a fall from
the best level that a run has reached.

What the newest steps say of themselves is not enough: a policy that collapsed in its first steps is the same ever since.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, TypeAlias

Row: TypeAlias = Mapping[str, Any]
"""One line of metrics.jsonl."""

WINDOW = 20
"""Steps that a judgement looks back on at most."""
_START = (2, 8)
"""Steps and groups that the level at the start is the mean of, at least."""
_ENOUGH = (5, 30)
"""The same for the best level and for the newest one."""
_SURE_OF_START = 3.5
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
            for level, sure in ((self._best, _SURE_OF_BEST), (self._start if early else None, _SURE_OF_START)):
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


Judge: TypeAlias = Callable[[Sequence[float], Sequence[Row]], str]
"""(values, rows) -> what is wrong in words, "" for healthy."""
Drift: TypeAlias = Callable[[float, float], str]
"""(level before, level now) -> what has moved too far in words, "" for nothing."""

BASE = WINDOW // 2
"""Steps at the window's beginning that the newest are compared with."""
SETTLED = 5
"""Steps before a share is judged, and the newest ones of a comparison."""
ENOUGH_ROLLOUTS = 64
ENOUGH_GROUPS = 30
"""Rollouts, or groups, over which a share is judged; where a step has few, this takes up to ``WINDOW`` steps."""
_SURE = 4.0
"""Standard errors by which two means must differ."""


def read(key: str) -> Callable[[Row], float | None]:
    return lambda row: number(row, key)


_SILENT = ("all_correct", "all_wrong", "equal_rewards")


def silent_share(row: Row) -> float | None:
    groups = number(row, "batch_size")
    return sum(number(row, f"skipped_{why}") or 0.0 for why in _SILENT) / groups if groups else None


def ratio_gap(row: Row) -> float | None:
    """The largest |log ratio| of a token: the same for a factor of 2 up and down."""
    ends = [number(row, key) for key in ("ratio_min", "ratio_max")]
    known = [abs(math.log(end)) if end > 0 else math.inf for end in ends if end is not None]
    return max(known) if known else None


def moved_kl(row: Row) -> float | None:
    # With one update a step there is no movement to see, and approx_kl says the same.
    return number(row, "moved_kl") if (number(row, "num_updates") or 0) > 1 else None


def share_of_time(key: str) -> Callable[[Row], float | None]:
    def share(row: Row) -> float | None:
        whole, part = number(row, "step_time_s"), number(row, key)
        return part / whole if whole and part is not None else None

    return share


def _groups(row: Row) -> float:
    return max(1.0, number(row, "batch_size") or 1.0)


def _rollouts(row: Row) -> float:
    return _groups(row) * max(1.0, number(row, "group_size") or 1.0)


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _middle(values: Sequence[float]) -> float:
    ordered = sorted(values)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def _recent(
    values: Sequence[float], rows: Sequence[Row], weight: Callable[[Row], float], enough: float
) -> tuple[float, int] | None:
    """Weighted mean over the newest steps, as many as hold ``enough`` or fill the window; None before that."""
    total = weighted = 0.0
    steps = 0
    for value, row in zip(reversed(values), reversed(rows), strict=True):
        w = weight(row)
        total, weighted, steps = total + w, weighted + w * value, steps + 1
        if steps >= WINDOW or (steps >= SETTLED and total >= enough):
            return weighted / total, steps
    return None


def change(values: Sequence[float]) -> tuple[float, float] | None:
    """Means of the window's beginning and of its newest steps where they differ by more than noise, else None.

    The noise is that of successive values: neither a trend nor a single step of it counts as much.
    """
    if len(values) < BASE + SETTLED:
        return None
    before, now = mean(values[:BASE]), mean(values[-SETTLED:])
    jumps = sum((b - a) ** 2 for a, b in pairwise(values))
    noise = math.sqrt(jumps / (2 * (len(values) - 1)))
    sure = abs(now - before) > _SURE * noise * math.sqrt(1 / BASE + 1 / SETTLED)
    return (before, now) if sure else None


def drifting(drift: Drift) -> Judge:
    def judge(values: Sequence[float], rows: Sequence[Row]) -> str:
        del rows
        levels = change(values)
        said = drift(*levels) if levels else ""
        return said and f"{said} within {len(values)} steps."

    return judge


def fine(values: Sequence[float], rows: Sequence[Row]) -> str:
    del values, rows
    return ""


def falling(before: float, now: float) -> str:
    return f"The correct rate fell from {before:.0%} to {now:.0%}" if now < before / 2 else ""


def reward_falling(before: float, now: float) -> str:
    far = before - now > 0.5 * max(abs(before), abs(now))
    return f"The mean reward fell from {before:.3g} to {now:.3g}" if far else ""


def reward(values: Sequence[float], rows: Sequence[Row]) -> str:
    last = _recent(values, rows, _rollouts, ENOUGH_ROLLOUTS)
    if last is not None:
        steps = last[1]
        silent = all((silent_share(row) or 0.0) >= 1.0 for row in rows[-steps:])
        if silent and max(values[-steps:]) == min(values[-steps:]):
            return f"Every rollout of the last {steps} steps got the same reward, {values[-1]:g}."
    # Where rewards say what is correct, the correct rate tells of a fall.
    if any(row.get("correct_rate") is not None for row in rows):
        return ""
    return drifting(reward_falling)(values, rows)


def silence(values: Sequence[float], rows: Sequence[Row]) -> str:
    last = _recent(values, rows, _groups, ENOUGH_GROUPS)
    # With one reward for all there is more to say: see reward.
    if last is None or not 0.8 < last[0] < 1.0:
        return ""
    seen = rows[-last[1] :]
    kinds = {
        why.replace("_", " "): sum(number(row, f"skipped_{why}") or 0.0 for row in seen) for why in _SILENT
    }
    what = ", ".join(f"{count:.0f} {why}" for why, count in kinds.items() if count)
    return f"{last[0]:.0%} of the groups of the last {last[1]} steps taught nothing, their rewards being equal ({what})."


def cut(values: Sequence[float], rows: Sequence[Row]) -> str:
    last = _recent(values, rows, _rollouts, ENOUGH_ROLLOUTS)
    if last is None or last[0] <= 0.3:
        return ""
    return f"{last[0]:.0%} of the rollouts of the last {last[1]} steps were cut at training.max_tokens."


def length(before: float, now: float) -> str:
    if now > 2 * before + 8:
        return f"Completions grew from {before:.0f} to {now:.0f} tokens"
    if 2 * now + 8 < before:
        return f"Completions shrank from {before:.0f} to {now:.0f} tokens"
    return ""


def explore(values: Sequence[float], rows: Sequence[Row]) -> str:
    if len(values) < SETTLED:
        return ""
    now = _middle(values[-SETTLED:])
    correct = [rate for row in rows[-SETTLED:] if (rate := number(row, "correct_rate")) is not None]
    # Who answers nearly everything correctly may well be sure of it.
    solved = bool(correct) and _middle(correct) > 0.9
    if now < 0.02 and not solved:
        return f"Entropy is {now:.2g} nats a token: the rollouts of a group are nearly the same."
    levels = change(values)
    return "" if solved and levels and levels[1] < levels[0] else drifting(entropy)(values, rows)


def entropy(before: float, now: float) -> str:
    if now < before / 4 and now < 0.3:
        return f"Entropy fell from {before:.2g} to {now:.2g} nats a token"
    if now > 2 * before + 0.5:
        return f"The policy dissolves: entropy rose from {before:.2g} to {now:.2g} nats a token"
    return ""


def worse(values: Sequence[float], rows: Sequence[Row]) -> str:
    """Evaluations after training against the one before the first step, where there was one."""
    first = rows[0]
    low = number(first, "eval/accuracy_low")
    if first.get("step") != 0 or low is None or len(rows) < 2 or values[-1] >= low:
        return ""
    # A single one may be below by chance; two in a row, or one whose interval is, hardly.
    high = number(rows[-1], "eval/accuracy_high")
    if (high is None or high >= low) and (len(rows) < 3 or values[-2] >= low):
        return ""
    return (
        f"Held-out accuracy after {rows[-1].get('step')} steps is {values[-1]:.1%}, below the 95 % interval of the untrained "
        f"model's {values[0]:.1%} ({low:.1%} or more)."
    )


def _usual(values: Sequence[float]) -> float | None:
    """The median of what came before the newest value, None while that is little."""
    return _middle(values[:-1]) if len(values) > SETTLED else None


def mismatch(values: Sequence[float], rows: Sequence[Row]) -> str:
    del rows
    gap, usual = values[-1], _usual(values)
    factor = f"{math.exp(gap):.3g}" if gap < 700 else "more than e^700"
    if gap > 1.5:
        return f"A token's probability differs between sampler and learner by a factor of {factor}."
    if usual is not None and gap > 0.05 and gap > 10 * usual:
        return (
            f"A token's probability differs between sampler and learner by a factor of {factor}, "
            f"usual are {math.exp(usual):.4g}."
        )
    return ""


def divergence(values: Sequence[float], rows: Sequence[Row]) -> str:
    del rows
    kl, usual = values[-1], _usual(values)
    if kl > 0.01:
        return f"Sampler and learner differ by {kl:.2g} nats a token (k3)."
    if usual is not None and kl > 1e-4 and kl > 100 * abs(usual):
        return f"Sampler and learner differ by {kl:.2g} nats a token (k3), usual are {usual:.2g}."
    return ""


def moved(values: Sequence[float], rows: Sequence[Row]) -> str:
    del rows
    if values[-1] <= 0.05:
        return ""
    return f"The updates of one batch moved the policy by {values[-1]:.2g} nats a token (k3)."


def norm(values: Sequence[float], rows: Sequence[Row]) -> str:
    trained = [bool(row.get("num_datums")) for row in rows[-3:]]
    if len(values) >= 3 and not any(values[-3:]) and all(trained):
        return "The gradient was exactly 0 for 3 steps that had rollouts to train on."
    if len(values) <= BASE:
        return ""
    usual, most = _middle(values[:-1]), max(values[:-1])
    # Few groups with a signal make small gradients: what has been before is not a jump.
    if usual > 0 and values[-1] > 10 * usual and values[-1] > 3 * most:
        return f"The gradient norm jumped to {values[-1]:.3g}, {values[-1] / usual:.0f} times its median."
    return ""


def failing(what: str) -> Judge:
    def judge(values: Sequence[float], rows: Sequence[Row]) -> str:
        last, seen = values[-SETTLED:], rows[-SETTLED:]
        failed = sum(value * _rollouts(row) for value, row in zip(last, seen, strict=True))
        of = sum(_rollouts(row) for row in seen)
        # A few failures in small batches are an accident: 2 % of so many vary by the square root.
        if failed < 0.02 * of + 2 * math.sqrt(0.02 * of) + 1 or not values[-1]:
            return ""
        return (
            f"{failed:.0f} of the {of:.0f} rollouts of the last {len(last)} steps: {what}; they do not train."
        )

    return judge


def skipped(values: Sequence[float], rows: Sequence[Row]) -> str:
    del rows
    return "The update was skipped: loss or gradient was not finite." if values[-1] else ""


def slower(values: Sequence[float], rows: Sequence[Row]) -> str:
    # Below that the clock measures everything but the sampler.
    if _middle([number(row, "sample_time_s") or 0.0 for row in rows]) < 2:
        return ""
    return drifting(speed)(values, rows)


def speed(before: float, now: float) -> str:
    return f"Sampling fell from {before:.0f} to {now:.0f} tokens/s" if now < before / 2 else ""


def waiting(values: Sequence[float], rows: Sequence[Row]) -> str:
    if len(values) < SETTLED or _middle([number(row, "step_time_s") or 0.0 for row in rows]) < 2:
        return ""
    share = _middle(values[-SETTLED:])
    return f"{share:.0%} of a step is waiting for rewards after sampling is over." if share > 0.4 else ""
