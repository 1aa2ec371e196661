"""The core metrics of a run: what each means, where it is healthy, and what to do when it is not.

Defined once: the console's alarms, ``status``, ``top``, the report and the docs all read this table. An alarm is raised
when a metric leaves its healthy range, and again only after it has been back inside for ``WELL`` steps. Judgements look
at the run's own recent past where a fixed limit would fit one model, task or number format and no other, and they wait
until what they have seen is more than noise: a run of eight rollouts a step is judged over more steps than one of 512.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, TypeAlias

Row: TypeAlias = Mapping[str, Any]
"""One line of metrics.jsonl."""
Judge: TypeAlias = Callable[[Sequence[float], Sequence[Row]], str]
"""(values, rows) -> what is wrong in words, "" for healthy."""

WINDOW = 20
"""Steps that a judgement of drift looks back on."""
WELL = 5
"""Healthy steps in a row that end an episode."""
_BASE = WINDOW // 2
"""Steps at the window's beginning that the newest are compared with."""
SETTLED = 5
"""Steps before a share is judged, and the newest ones of a comparison."""
ENOUGH_ROLLOUTS = 64
ENOUGH_GROUPS = 30
"""Rollouts, or groups, over which a share is judged; where a step has few, this takes up to ``WINDOW`` steps."""
_SURE = 4.0
"""Standard errors by which two means must differ."""


@dataclass(frozen=True, slots=True)
class Vital:
    """One core metric.

    ``value`` reads it from a row, None where the row does not say. ``judge`` gets the metric's known values and their
    rows, oldest first, the newest last and at most ``WINDOW`` + 1 of them. ``healthy`` is the range in words and
    ``advice`` what to do outside it. ``unit`` is "" for plain numbers; shares are in [0, 1] and shown in percent (unit
    "%").
    """

    name: str
    title: str
    unit: str
    healthy: str
    advice: str
    value: Callable[[Row], float | None]
    judge: Judge

    def text(self, value: float | None) -> str:
        """The value with its unit, for people."""
        if value is None:
            return "n/a"
        if self.unit == "%":
            return f"{value:.1%}"
        if not math.isfinite(value):
            return str(value)
        plain = f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
        return f"{plain} {self.unit}".strip()


@dataclass(frozen=True, slots=True)
class Alarm:
    """A metric that left its healthy range at a 0-based step: what was seen, and what to do."""

    step: int
    vital: str
    message: str
    advice: str

    @property
    def line(self) -> str:
        """The alarm in one line."""
        return f"{self.message} {self.advice}"


def number(row: Row, key: str) -> float | None:
    """A finite number of a row, None where it holds none."""
    found = row.get(key)
    return float(found) if isinstance(found, int | float) and math.isfinite(found) else None


def _read(key: str) -> Callable[[Row], float | None]:
    return lambda row: number(row, key)


_SILENT = ("all_correct", "all_wrong", "equal_rewards")


def _silent_share(row: Row) -> float | None:
    groups = number(row, "batch_size")
    return sum(number(row, f"skipped_{why}") or 0.0 for why in _SILENT) / groups if groups else None


def _ratio_gap(row: Row) -> float | None:
    """The largest |log ratio| of a token: the same for a factor of 2 up and down."""
    ends = [number(row, key) for key in ("ratio_min", "ratio_max")]
    known = [abs(math.log(end)) if end > 0 else math.inf for end in ends if end is not None]
    return max(known) if known else None


def _moved_kl(row: Row) -> float | None:
    # With one update a step there is no movement to see, and approx_kl says the same.
    return number(row, "moved_kl") if (number(row, "num_updates") or 0) > 1 else None


def _share_of_time(key: str) -> Callable[[Row], float | None]:
    def share(row: Row) -> float | None:
        whole, part = number(row, "step_time_s"), number(row, key)
        return part / whole if whole and part is not None else None

    return share


def _groups(row: Row) -> float:
    return max(1.0, number(row, "batch_size") or 1.0)


def _rollouts(row: Row) -> float:
    return _groups(row) * max(1.0, number(row, "group_size") or 1.0)


def _mean(values: Sequence[float]) -> float:
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


def _change(values: Sequence[float]) -> tuple[float, float] | None:
    """Means of the window's beginning and of its newest steps where they differ by more than noise, else None.

    The noise is that of successive values: neither a trend nor a single step of it counts as much.
    """
    if len(values) < _BASE + SETTLED:
        return None
    before, now = _mean(values[:_BASE]), _mean(values[-SETTLED:])
    jumps = sum((b - a) ** 2 for a, b in pairwise(values))
    noise = math.sqrt(jumps / (2 * (len(values) - 1)))
    sure = abs(now - before) > _SURE * noise * math.sqrt(1 / _BASE + 1 / SETTLED)
    return (before, now) if sure else None


def _steps(values: Sequence[float]) -> str:
    return f"within {len(values)} steps"


def _fine(values: Sequence[float], rows: Sequence[Row]) -> str:
    del values, rows
    return ""


def _falling(values: Sequence[float], rows: Sequence[Row]) -> str:
    del rows
    change = _change(values)
    if change and change[1] < change[0] / 2:
        return f"The correct rate fell from {change[0]:.0%} to {change[1]:.0%} {_steps(values)}."
    return ""


def _reward(values: Sequence[float], rows: Sequence[Row]) -> str:
    last = _recent(values, rows, _rollouts, ENOUGH_ROLLOUTS)
    if last is not None:
        steps = last[1]
        silent = all((_silent_share(row) or 0.0) >= 1.0 for row in rows[-steps:])
        if silent and max(values[-steps:]) == min(values[-steps:]):
            return f"Every rollout of the last {steps} steps got the same reward, {values[-1]:g}."
    # Where rewards say what is correct, the correct rate tells of a fall.
    change = _change(values) if all(row.get("correct_rate") is None for row in rows) else None
    if change and change[0] - change[1] > 0.5 * max(abs(change[0]), abs(change[1])):
        return f"The mean reward fell from {change[0]:.3g} to {change[1]:.3g} {_steps(values)}."
    return ""


def _silence(values: Sequence[float], rows: Sequence[Row]) -> str:
    last = _recent(values, rows, _groups, ENOUGH_GROUPS)
    # With one reward for all there is more to say: see _reward.
    if last is None or not 0.8 < last[0] < 1.0:
        return ""
    seen = rows[-last[1] :]
    kinds = {why.replace("_", " "): sum(number(row, f"skipped_{why}") or 0.0 for row in seen) for why in _SILENT}
    what = ", ".join(f"{count:.0f} {why}" for why, count in kinds.items() if count)
    return (
        f"{last[0]:.0%} of the groups of the last {last[1]} steps taught nothing, their rewards being equal ({what})."
    )


def _cut(values: Sequence[float], rows: Sequence[Row]) -> str:
    last = _recent(values, rows, _rollouts, ENOUGH_ROLLOUTS)
    if last is None or last[0] <= 0.3:
        return ""
    return f"{last[0]:.0%} of the rollouts of the last {last[1]} steps were cut at training.max_tokens."


def _drift(values: Sequence[float], rows: Sequence[Row]) -> str:
    del rows
    change = _change(values)
    if not change:
        return ""
    before, now = change
    if now > 2 * before + 8:
        return f"Completions grew from {before:.0f} to {now:.0f} tokens {_steps(values)}."
    if 2 * now + 8 < before:
        return f"Completions shrank from {before:.0f} to {now:.0f} tokens {_steps(values)}."
    return ""


def _explore(values: Sequence[float], rows: Sequence[Row]) -> str:
    if len(values) < SETTLED:
        return ""
    now = _middle(values[-SETTLED:])
    correct = [rate for row in rows[-SETTLED:] if (rate := number(row, "correct_rate")) is not None]
    # Who answers nearly everything correctly may well be sure of it.
    solved = bool(correct) and _middle(correct) > 0.9
    if now < 0.02 and not solved:
        return f"Entropy is {now:.2g} nats a token: the rollouts of a group are nearly the same."
    change = _change(values)
    if not change:
        return ""
    before, now = change
    if now < before / 4 and now < 0.3 and not solved:
        return f"Entropy fell from {before:.2g} to {now:.2g} nats a token {_steps(values)}."
    if now > 2 * before + 0.5:
        return f"Entropy rose from {before:.2g} to {now:.2g} nats a token {_steps(values)}: the policy dissolves."
    return ""


def _usual(values: Sequence[float]) -> float | None:
    """The median of what came before the newest value, None while that is little."""
    return _middle(values[:-1]) if len(values) > SETTLED else None


def _mismatch(values: Sequence[float], rows: Sequence[Row]) -> str:
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


def _divergence(values: Sequence[float], rows: Sequence[Row]) -> str:
    del rows
    kl, usual = values[-1], _usual(values)
    if kl > 0.01:
        return f"Sampler and learner differ by {kl:.2g} nats a token (k3)."
    if usual is not None and kl > 1e-4 and kl > 100 * abs(usual):
        return f"Sampler and learner differ by {kl:.2g} nats a token (k3), usual are {usual:.2g}."
    return ""


def _moved(values: Sequence[float], rows: Sequence[Row]) -> str:
    del rows
    if values[-1] <= 0.05:
        return ""
    return f"The updates of one batch moved the policy by {values[-1]:.2g} nats a token (k3)."


def _norm(values: Sequence[float], rows: Sequence[Row]) -> str:
    trained = [bool(row.get("num_datums")) for row in rows[-3:]]
    if len(values) >= 3 and not any(values[-3:]) and all(trained):
        return "The gradient was exactly 0 for 3 steps that had rollouts to train on."
    if len(values) <= _BASE:
        return ""
    usual, most = _middle(values[:-1]), max(values[:-1])
    # Few groups with a signal make small gradients: what has been before is not a jump.
    if usual > 0 and values[-1] > 10 * usual and values[-1] > 3 * most:
        return f"The gradient norm jumped to {values[-1]:.3g}, {values[-1] / usual:.0f} times its median."
    return ""


def _failing(what: str) -> Judge:
    def judge(values: Sequence[float], rows: Sequence[Row]) -> str:
        last, seen = values[-SETTLED:], rows[-SETTLED:]
        failed = sum(value * _rollouts(row) for value, row in zip(last, seen, strict=True))
        of = sum(_rollouts(row) for row in seen)
        # A few failures in small batches are an accident: 2 % of so many vary by the square root.
        if failed < 0.02 * of + 2 * math.sqrt(0.02 * of) + 1 or not values[-1]:
            return ""
        return f"{failed:.0f} of the {of:.0f} rollouts of the last {len(last)} steps: {what}; they do not train."

    return judge


def _skipped(values: Sequence[float], rows: Sequence[Row]) -> str:
    del rows
    return "The update was skipped: loss or gradient was not finite." if values[-1] else ""


def _slower(values: Sequence[float], rows: Sequence[Row]) -> str:
    change = _change(values)
    if not change or change[1] >= change[0] / 2:
        return ""
    # Below that the clock measures everything but the sampler.
    if _middle([number(row, "sample_time_s") or 0.0 for row in rows]) < 2:
        return ""
    return f"Sampling fell from {change[0]:.0f} to {change[1]:.0f} tokens/s {_steps(values)}."


def _waiting(values: Sequence[float], rows: Sequence[Row]) -> str:
    if len(values) < SETTLED or _middle([number(row, "step_time_s") or 0.0 for row in rows]) < 2:
        return ""
    share = _middle(values[-SETTLED:])
    return f"{share:.0%} of a step is waiting for rewards after sampling is over." if share > 0.4 else ""


VITALS: tuple[Vital, ...] = (
    Vital(
        "correct_rate", "correct rate", "%", "rises, never halves within 20 steps; most is learned at 10 % to 90 %",
        "Look at the newest completions, and lower training.lr: too large an update is the usual cause.",
        _read("correct_rate"), _falling,
    ),
    Vital(
        "mean_reward", "mean reward", "", "rises; not the same for all rollouts",
        "Look at some completions with `retrain sample RUN --index 0`: is the reward right, is the task within reach?",
        _read("mean_reward"), _reward,
    ),
    Vital(
        "silent_share", "groups without signal", "%", "below 80 %",
        "All wrong: easier tasks or a larger training.group_size; all correct: harder tasks; training.min_signal samples "
        "past both.",
        _silent_share, _silence,
    ),
    Vital(
        "truncated_share", "truncated", "%", "below 30 %",
        'Raise training.max_tokens, or set training.truncated = "mask" or "soft".',
        _read("max_token_hit_rate"), _cut,
    ),
    Vital(
        "mean_length", "completion length", "tokens", "does not double or halve within 20 steps",
        "Read some completions: growth may be padding, shrinking a shortcut that the reward allows.",
        _read("mean_length"), _drift,
    ),
    Vital(
        "entropy", "entropy", "nats/token",
        "above 0.02 until 90 % are correct; no fall by 3/4 or doubling in 20 steps",
        "Lower training.lr; against a fall also training.temperature = 1.0, a higher loss.clip_high, or loss.entropy.",
        _read("entropy_mean"), _explore,
    ),
    Vital(
        "ratio_gap", "largest |log ratio|", "",
        "below 0.05 or 10 times its median, and below 1.5 (float32: about 1e-5, bf16: 0.01 and more)",
        "One token is harmless if approx_kl is small; loss.tis_cap bounds such weights.", _ratio_gap, _mismatch,
    ),
    Vital(
        "approx_kl", "sampler-learner KL", "nats/token",
        "below 0.01, and 1e-4 or 100 times its median (float32: about 1e-12, bf16: 1e-7 to 1e-3)",
        "What is sampled is not the trained policy: check inference.dtype, inference.kv_cache_dtype and training.top_p.",
        _read("approx_kl"), _divergence,
    ),
    Vital(
        "moved_kl", "KL moved by a batch", "nats/token", "below 0.05",
        "Lower training.lr or training.updates_per_batch.", _moved_kl, _moved,
    ),
    Vital(
        "grad_norm", "gradient norm", "", "within ten times its median; not 0",
        "One jump is harmless (loss.grad_clip cuts it), repeated ones ask for a lower training.lr; 0 says that no "
        "advantage reached the loss.",
        _read("grad_norm"), _norm,
    ),
    Vital(
        "reward_errors", "reward errors", "%", "below 2 %",
        "events.log has the first traceback; reward.timeout_s is the deadline.",
        _read("reward_error_rate"), _failing("the reward failed"),
    ),
    Vital(
        "rollout_errors", "broken rollouts", "%", "below 2 %",
        "emergence/steps.jsonl says of every rollout why it broke.",
        _read("rollout_error_rate"), _failing("broken"),
    ),
    Vital(
        "skipped_update", "skipped update", "", "never",
        'Lower training.lr or set inference.dtype = "fp32"; three in a row end the run.',
        _read("skipped_update"), _skipped,
    ),
    Vital(
        "tokens_per_second", "sampling speed", "tokens/s", "does not halve within 20 steps",
        "Something else uses the device, or a few long completions leave it idle.",
        _read("tokens_per_second"), _slower,
    ),
    Vital(
        "sampling_share", "share of time in sampling", "%", "40 % to 90 % is usual",
        "`retrain bench` shows what bounds the step.", _share_of_time("sample_time_s"), _fine,
    ),
    Vital(
        "scoring_share", "share of time waiting for rewards", "%", "below 40 %",
        "Make the reward faster, or its calls concurrent.", _share_of_time("score_time_s"), _waiting,
    ),
)  # fmt: skip
"""In the order in which people read them."""

BY_NAME: Mapping[str, Vital] = {vital.name: vital for vital in VITALS}


@dataclass(slots=True)
class Watch:
    """Raises alarms over a run's rows, one after the other."""

    _seen: dict[str, tuple[list[float], list[Row]]] = field(
        default_factory=dict[str, "tuple[list[float], list[Row]]"]
    )
    _ill: dict[str, int] = field(default_factory=dict[str, int])
    """Metrics outside their range, and for how many steps they have been back inside."""

    def observe(self, row: Row) -> list[Alarm]:
        """Alarms that this row of a training step raises; a row of an evaluation raises none."""
        if is_evaluation(row):
            return []
        raised: list[Alarm] = []
        for vital in VITALS:
            value = vital.value(row)
            if value is None:
                continue
            values, rows = self._seen.setdefault(vital.name, ([], []))
            values.append(value)
            rows.append(row)
            if len(values) > WINDOW + 1:
                del values[0], rows[0]
            wrong = vital.judge(values, rows)
            if wrong:
                if vital.name not in self._ill:
                    raised.append(Alarm(int(row["step"]), vital.name, wrong, vital.advice))
                self._ill[vital.name] = 0
            elif vital.name in self._ill:
                self._ill[vital.name] += 1
                if self._ill[vital.name] >= WELL:
                    del self._ill[vital.name]
        return raised

    @property
    def ill(self) -> list[str]:
        """Names of the metrics that are outside their range now, in the table's order."""
        return [vital.name for vital in VITALS if vital.name in self._ill]


def is_evaluation(row: Row) -> bool:
    """Is this row of metrics.jsonl an evaluation and not a training step?"""
    # Every training step has a batch size; looking through all of its keys takes longer than all else here.
    return "batch_size" not in row and any(key.startswith("eval/") for key in row)


def alarms(rows: Iterable[Row]) -> list[Alarm]:
    """Every alarm of a run's rows, in order."""
    watch = Watch()
    return [alarm for row in rows for alarm in watch.observe(row)]
