"""What is wrong with a core metric, in words: judgements of its newest values, or of two levels of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TypeAlias

from retrain.tracking.level import WINDOW, Row, number

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
