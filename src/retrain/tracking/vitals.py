"""The core metrics of a run: what each means, where it is healthy, and what to do when it is not.

Defined once: the console's alarms, ``status``, ``top``, the report and the docs all read this table. An alarm is raised
when a metric leaves its healthy range and again only after it has been back inside.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

Row: TypeAlias = Mapping[str, Any]
"""One line of metrics.jsonl."""

WINDOW = 20
"""Steps that a judgement of drift looks back on."""
_SETTLED = 5
"""Steps before a share is judged: the first ones are noise."""


@dataclass(frozen=True, slots=True)
class Vital:
    """One core metric.

    ``value`` reads it from a row, None where the row does not say. ``judge`` gets the metric's known values, oldest
    first, the newest last and at most ``WINDOW`` + 1 of them, and answers with what is wrong in words, "" for healthy.
    ``unit`` is "" for plain numbers; shares are in [0, 1] and shown in percent (unit "%").
    """

    name: str
    title: str
    unit: str
    healthy: str
    advice: str
    value: Callable[[Row], float | None]
    judge: Callable[[Sequence[float]], str]

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


def _read(key: str) -> Callable[[Row], float | None]:
    def value(row: Row) -> float | None:
        found = row.get(key)
        return float(found) if isinstance(found, int | float) and math.isfinite(found) else None

    return value


def _silent_share(row: Row) -> float | None:
    groups = row.get("batch_size")
    if not groups:
        return None
    silent = (row.get(f"skipped_{why}", 0) or 0 for why in ("all_correct", "all_wrong", "equal_rewards"))
    return sum(silent) / groups


def _ratio_gap(row: Row) -> float | None:
    ends = [row.get(key) for key in ("ratio_min", "ratio_max")]
    known = [abs(e - 1) for e in ends if isinstance(e, int | float) and math.isfinite(e)]
    return max(known) if known else None


def _sampling_share(row: Row) -> float | None:
    whole, sampling = row.get("step_time_s"), row.get("sample_time_s")
    return sampling / whole if whole and sampling is not None else None


def _settled(values: Sequence[float]) -> list[float]:
    return list(values[-_SETTLED:]) if len(values) >= _SETTLED else []


def _fine(values: Sequence[float]) -> str:
    del values
    return ""


def _silence(values: Sequence[float]) -> str:
    last = _settled(values)
    mean = statistics.fmean(last) if last else 0.0
    return (
        f"{mean:.0%} of the last {len(last)} steps' groups had equal rewards and taught nothing."
        if mean > 0.8
        else ""
    )


def _cut(values: Sequence[float]) -> str:
    last = _settled(values)
    mean = statistics.fmean(last) if last else 0.0
    return (
        f"{mean:.0%} of the last {len(last)} steps' rollouts were cut at their token limit."
        if mean > 0.3
        else ""
    )


def _collapse(values: Sequence[float]) -> str:
    if len(values) <= WINDOW // 2:
        return ""
    before, now = statistics.median(values[: WINDOW // 2]), statistics.median(values[-3:])
    if now < 0.02 and before >= 0.02:
        return f"Entropy fell to {now:.3g} nats a token: the policy hardly explores any more."
    if now < before / 4:
        return f"Entropy fell from {before:.3g} to {now:.3g} nats a token within {len(values)} steps."
    return ""


def _drift(values: Sequence[float]) -> str:
    if len(values) <= WINDOW // 2:
        return ""
    before, now = statistics.median(values[: WINDOW // 2]), statistics.median(values[-3:])
    if now > 2 * before + 8:
        return f"Completions grew from {before:.0f} to {now:.0f} tokens within {len(values)} steps."
    if 2 * now + 8 < before:
        return f"Completions shrank from {before:.0f} to {now:.0f} tokens within {len(values)} steps."
    return ""


def _mismatch(values: Sequence[float]) -> str:
    last = values[-1]
    return (
        f"A token's probability differs between sampler and learner by a factor of {1 + last:.3g}."
        if last > 0.5
        else ""
    )


def _divergence(values: Sequence[float]) -> str:
    last = values[-1]
    return f"Sampler and learner differ by {last:.2g} nats a token (k3)." if last > 0.01 else ""


def _moved(values: Sequence[float]) -> str:
    last = values[-1]
    return f"The updates of one batch moved the policy by {last:.2g} nats a token (k3)." if last > 0.1 else ""


def _norm(values: Sequence[float]) -> str:
    if len(values) <= WINDOW // 2:
        return ""
    before = statistics.median(values[:-1])
    if before > 0 and values[-1] > 10 * before:
        return f"The gradient norm jumped to {values[-1]:.3g}, {values[-1] / before:.0f} times its median."
    return ""


def _errors(values: Sequence[float]) -> str:
    return (
        f"{values[-1]:.1%} of the step's rewards failed; their rollouts are masked."
        if values[-1] > 0.02
        else ""
    )


def _broken(values: Sequence[float]) -> str:
    return f"{values[-1]:.1%} of the step's rollouts broke; they are masked." if values[-1] > 0.02 else ""


def _skipped(values: Sequence[float]) -> str:
    return "The update was skipped: loss or gradient was not finite." if values[-1] else ""


def _slower(values: Sequence[float]) -> str:
    if len(values) <= WINDOW // 2:
        return ""
    before, now = statistics.median(values[: WINDOW // 2]), statistics.median(values[-3:])
    return f"Sampling fell from {before:.0f} to {now:.0f} tokens/s." if now < before / 2 else ""


def _falling(values: Sequence[float]) -> str:
    if len(values) <= WINDOW // 2:
        return ""
    before, now = statistics.median(values[: WINDOW // 2]), statistics.median(values[-3:])
    return (
        f"The correct rate fell from {before:.0%} to {now:.0%} within {len(values)} steps."
        if now < before / 2
        else ""
    )


VITALS: tuple[Vital, ...] = (
    Vital(
        "correct_rate", "correct rate", "%", "rises; between 10 % and 90 % there is most to learn",
        "Lower training.lr, or look at the completions: a reward that is gamed pays for something else.",
        _read("correct_rate"), _falling,
    ),
    Vital(
        "mean_reward", "mean reward", "", "rises",
        "Look at the parts of the reward: one may have taken over.", _read("mean_reward"), _fine,
    ),
    Vital(
        "silent_share", "groups without signal", "%", "below 80 %",
        "Use tasks nearer to what the model can do, a larger training.group_size, or training.min_signal.",
        _silent_share, _silence,
    ),
    Vital(
        "truncated_share", "truncated", "%", "below 30 %",
        'Raise training.max_tokens, or set training.truncated = "mask" or "soft".',
        _read("max_token_hit_rate"), _cut,
    ),
    Vital(
        "mean_length", "completion length", "tokens", "changes slowly",
        "Read some completions: growth may be padding, shrinking may be a shortcut the reward allows.",
        _read("mean_length"), _drift,
    ),
    Vital(
        "entropy", "entropy", "nats/token", "above 0.02 and not falling by three quarters within 20 steps",
        "Lower training.lr, raise training.temperature to 1.0, or set loss.entropy or loss.clip_high.",
        _read("entropy_mean"), _collapse,
    ),
    Vital(
        "ratio_gap", "largest |ratio - 1|", "", "below 0.5; below 0.001 in float32",
        "The sampler is not quite the trained policy: see approx_kl; loss.tis_cap bounds its weight.",
        _ratio_gap, _mismatch,
    ),
    Vital(
        "approx_kl", "sampler-learner KL", "nats/token", "below 0.01",
        "The sampler is not the trained policy: check inference.kv_cache_dtype, dtype and top_p.",
        _read("approx_kl"), _divergence,
    ),
    Vital(
        "moved_kl", "KL moved by a batch", "nats/token", "below 0.1",
        "Lower training.lr or training.updates_per_batch.", _read("moved_kl"), _moved,
    ),
    Vital(
        "grad_norm", "gradient norm", "", "within ten times its median",
        "One such step is harmless (loss.grad_clip cuts it); if it repeats, lower training.lr.",
        _read("grad_norm"), _norm,
    ),
    Vital(
        "reward_errors", "reward errors", "%", "below 2 %",
        "events.log has the first traceback; reward.timeout_s is the deadline.",
        _read("reward_error_rate"), _errors,
    ),
    Vital(
        "rollout_errors", "broken rollouts", "%", "below 2 %",
        "events.log says why they broke.", _read("rollout_error_rate"), _broken,
    ),
    Vital(
        "skipped_update", "skipped update", "", "never",
        'Lower training.lr or set inference.dtype = "fp32"; three in a row end the run.',
        _read("skipped_update"), _skipped,
    ),
    Vital(
        "tokens_per_second", "sampling speed", "tokens/s", "steady",
        "Something else uses the device, or completions grew longer.", _read("tokens_per_second"), _slower,
    ),
    Vital(
        "sampling_share", "share of time in sampling", "%", "40 % to 90 % is usual",
        "`retrain bench` shows what bounds the step.", _sampling_share, _fine,
    ),
)  # fmt: skip
"""In the order in which people read them."""

BY_NAME: Mapping[str, Vital] = {vital.name: vital for vital in VITALS}


@dataclass(slots=True)
class Watch:
    """Raises alarms over a run's rows, one after the other."""

    _seen: dict[str, deque[float]] = field(default_factory=dict[str, "deque[float]"])
    _ill: set[str] = field(default_factory=set[str])

    def observe(self, row: Row) -> list[Alarm]:
        """Alarms that this row of a training step raises; a row of an evaluation raises none."""
        if is_evaluation(row):
            return []
        raised: list[Alarm] = []
        for vital in VITALS:
            value = vital.value(row)
            if value is None:
                continue
            seen = self._seen.setdefault(vital.name, deque(maxlen=WINDOW + 1))
            seen.append(value)
            wrong = vital.judge(list(seen))
            if wrong and vital.name not in self._ill:
                raised.append(Alarm(int(row["step"]), vital.name, wrong, vital.advice))
            (self._ill.add if wrong else self._ill.discard)(vital.name)
        return raised

    @property
    def ill(self) -> list[str]:
        """Names of the metrics that are outside their range now, in the table's order."""
        return [vital.name for vital in VITALS if vital.name in self._ill]


def is_evaluation(row: Row) -> bool:
    """Is this row of metrics.jsonl an evaluation and not a training step?"""
    return any(key.startswith("eval/") for key in row)


def alarms(rows: Iterable[Row]) -> list[Alarm]:
    """Every alarm of a run's rows, in order."""
    watch = Watch()
    return [alarm for row in rows for alarm in watch.observe(row)]
