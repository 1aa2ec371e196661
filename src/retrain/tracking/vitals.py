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

from retrain.tracking import judges
from retrain.tracking.judges import WINDOW, Drift, Fall, Judge, Past, Row, number

WELL = 5
"""Healthy steps in a row that end an episode."""


@dataclass(frozen=True, slots=True)
class Vital:
    """One core metric.

    ``value`` reads it from a row, None where the row does not say. ``judge`` gets the metric's known values and their
    rows, oldest first, the newest last and at most ``WINDOW`` + 1 of them. What ``drift`` says of two levels holds until
    the first of them is reached again. ``healthy`` is the range in words and ``advice`` what to do outside it. A metric
    ``of_evaluations`` is read from their rows and no others; the first of them stays among those judged. ``unit`` is ""
    for plain numbers; shares are in [0, 1] and shown in percent (unit "%").
    """

    name: str
    title: str
    unit: str
    healthy: str
    advice: str
    value: Callable[[Row], float | None]
    judge: Judge
    drift: Drift | None = None
    of_evaluations: bool = False

    def read(self, row: Row) -> float | None:
        """The value in a row of either kind, None where it is not of this one's."""
        return self.value(row) if self.of_evaluations is is_evaluation(row) else None

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


VITALS: tuple[Vital, ...] = (
    Vital(
        "correct_rate", "correct rate", "%", "rises, never below half its best; most is learned at 10 % to 90 %",
        "Too large an update is the usual cause: lower training.lr and start again, or from the last good checkpoint "
        "(lora.init_from = its adapter folder). Look at the newest completions.",
        judges.read("correct_rate"), judges.drifting(judges.falling), judges.falling,
    ),
    Vital(
        "mean_reward", "mean reward", "", "rises; not the same for all rollouts",
        "Look at some completions with `retrain sample RUN --index 0`: is the reward right, is the task within reach?",
        judges.read("mean_reward"), judges.reward, judges.reward_falling,
    ),
    Vital(
        "held_out", "held-out accuracy", "%", "not below the interval of the evaluation before the first step",
        "What was learned does not help on other tasks: lower training.lr, and compare completions with `retrain eval` and "
        "`retrain sample`.",
        judges.read("eval/accuracy"), judges.worse, of_evaluations=True,
    ),
    Vital(
        "silent_share", "groups without signal", "%", "below 80 %",
        "All wrong: easier tasks or a larger training.group_size; all correct: harder tasks; training.min_signal samples "
        "past both.",
        judges.silent_share, judges.silence,
    ),
    Vital(
        "truncated_share", "truncated", "%", "below 30 %",
        'Raise training.max_tokens, or set training.truncated = "mask" or "soft".',
        judges.read("max_token_hit_rate"), judges.cut,
    ),
    Vital(
        "mean_length", "completion length", "tokens", "does not double or halve within 20 steps",
        "Read some completions: growth may be padding, shrinking a shortcut that the reward allows.",
        judges.read("mean_length"), judges.drifting(judges.length), judges.length,
    ),
    Vital(
        "entropy", "entropy", "nats/token",
        "above 0.02 until 90 % are correct; no fall by 3/4 or doubling in 20 steps",
        "Lower training.lr; against a fall also training.temperature = 1.0, a higher loss.clip_high, or loss.entropy.",
        judges.read("entropy_mean"), judges.explore, judges.entropy,
    ),
    Vital(
        "ratio_gap", "largest |log ratio|", "",
        "below 0.05 or 10 times its median, and below 1.5 (float32: about 1e-5, bf16: 0.01 and more)",
        "One token is harmless if approx_kl is small; loss.tis_cap bounds such weights.", judges.ratio_gap, judges.mismatch,
    ),
    Vital(
        "approx_kl", "sampler-learner KL", "nats/token",
        "below 0.01, and 1e-4 or 100 times its median (float32: about 1e-12, bf16: 1e-7 to 1e-3)",
        "What is sampled is not the trained policy: check inference.dtype, inference.kv_cache_dtype and training.top_p.",
        judges.read("approx_kl"), judges.divergence,
    ),
    Vital(
        "moved_kl", "KL moved by a batch", "nats/token", "below 0.05",
        "Lower training.lr or training.updates_per_batch.", judges.moved_kl, judges.moved,
    ),
    Vital(
        "grad_norm", "gradient norm", "", "within ten times its median; not 0",
        "One jump is harmless (loss.grad_clip cuts it), repeated ones ask for a lower training.lr; 0 says that no "
        "advantage reached the loss.",
        judges.read("grad_norm"), judges.norm,
    ),
    Vital(
        "reward_errors", "reward errors", "%", "below 2 %",
        "events.log has the first traceback; reward.timeout_s is the deadline.",
        judges.read("reward_error_rate"), judges.failing("the reward failed"),
    ),
    Vital(
        "rollout_errors", "broken rollouts", "%", "below 2 %",
        "emergence/steps.jsonl says of every rollout why it broke.",
        judges.read("rollout_error_rate"), judges.failing("broken"),
    ),
    Vital(
        "skipped_update", "skipped update", "", "never",
        'Lower training.lr or set inference.dtype = "fp32"; three in a row end the run.',
        judges.read("skipped_update"), judges.skipped,
    ),
    Vital(
        "tokens_per_second", "sampling speed", "tokens/s", "does not halve within 20 steps",
        "Something else uses the device, or a few long completions leave it idle.",
        judges.read("tokens_per_second"), judges.slower, judges.speed,
    ),
    Vital(
        "sampling_share", "share of time in sampling", "%", "40 % to 90 % is usual",
        "`retrain bench` shows what bounds the step.", judges.share_of_time("sample_time_s"), judges.fine,
    ),
    Vital(
        "scoring_share", "share of time waiting for rewards", "%", "below 40 %",
        "Make the reward faster, or its calls concurrent.", judges.share_of_time("score_time_s"), judges.waiting,
    ),
)  # fmt: skip
"""In the order in which people read them."""

BY_NAME: Mapping[str, Vital] = {vital.name: vital for vital in VITALS}


@dataclass(slots=True)
class Watch:
    """Raises alarms over a run's rows, one after the other; none about what is not among ``vitals``."""

    vitals: Sequence[Vital] = VITALS
    _seen: dict[str, tuple[list[float], list[Row]]] = field(
        default_factory=dict[str, "tuple[list[float], list[Row]]"]
    )
    _ill: dict[str, int] = field(default_factory=dict[str, int])
    """Metrics outside their range, and for how many steps they have been back inside."""
    _before: dict[str, tuple[float, float | None]] = field(
        default_factory=dict[str, "tuple[float, float | None]"]
    )
    """Of those that drifted: their level before it, and the mean reward at that time."""
    _past: Past = field(default_factory=Past)
    _fall: Fall | None = None
    _collapse_told: bool = False
    _silent: bool = False

    def observe(self, row: Row) -> list[Alarm]:
        """Alarms that a row of a training step or of an evaluation raises."""
        evaluated = is_evaluation(row)
        if not evaluated:
            self._fall = self._past.observe(row)
        raised: list[Alarm] = []
        for vital in self.vitals:
            value = vital.value(row) if vital.of_evaluations is evaluated else None
            if value is None:
                continue
            values, rows = self._seen.setdefault(vital.name, ([], []))
            values.append(value)
            rows.append(row)
            if len(values) > WINDOW + 1:
                oldest = 1 if vital.of_evaluations else 0
                del values[oldest], rows[oldest]
            wrong = self._wrong(vital, values, rows)
            if wrong:
                if self._is_collapse_news(vital) or vital.name not in self._ill:
                    # An evaluation counts completed steps, an alarm names the last of them.
                    step = max(0, int(row["step"]) - evaluated)
                    raised.append(Alarm(step, vital.name, wrong, vital.advice))
                self._ill[vital.name] = 0
            elif vital.name in self._ill:
                self._ill[vital.name] += 1
                if self._ill[vital.name] >= (1 if vital.of_evaluations else WELL):
                    del self._ill[vital.name]
                    self._before.pop(vital.name, None)
                    self._collapse_told = self._collapse_told and vital.name != "correct_rate"
        if not evaluated:
            self._silent = judges.silent_share(row) == 1.0
        return raised

    def _is_collapse_news(self, vital: Vital) -> bool:
        """Did a fall that has been said turn out to be a collapse?"""
        if vital.name != "correct_rate" or self._fall is None or not self._fall.collapsed:
            return False
        told, self._collapse_told = self._collapse_told, True
        return not told

    def _wrong(self, vital: Vital, values: Sequence[float], rows: Sequence[Row]) -> str:
        """What is wrong with a metric now, "" for nothing: a drift also where it happened before the window."""
        if vital.name == "correct_rate" and self._fall is not None:
            return self._fall.message
        said = vital.judge(values, rows)
        if vital.drift is None:
            return said
        if said:
            change = judges.change(values)
            if vital.name not in self._before and change and vital.drift(*change):
                self._before[vital.name] = (change[0], _reward_of(rows[: judges.BASE]))
            return said
        if vital.name not in self._before:
            return ""
        before, reward = self._before[vital.name]
        if vital.name in ("mean_length", "entropy"):
            # Where rewards are as good as then or better, this is how the run is now.
            now = _reward_of(rows[-judges.SETTLED:])
            if reward is None or now is None or now >= reward:
                return ""
        return vital.drift(before, judges.mean(values[-judges.SETTLED:]))

    @property
    def ill(self) -> list[str]:
        """Names of the metrics that are outside their range now, in the table's order."""
        marked = set(self._ill)
        # What the alarm of another metric names needs no alarm of its own.
        if "correct_rate" in self._ill and self._fall is not None:
            marked |= set(self._fall.moved)
        if "mean_reward" in self._ill and self._silent:
            marked.add("silent_share")
        return [vital.name for vital in VITALS if vital.name in marked]


def _reward_of(rows: Sequence[Row]) -> float | None:
    known = [value for row in rows if (value := number(row, "mean_reward")) is not None]
    return judges.mean(known) if known else None


def is_evaluation(row: Row) -> bool:
    """Is this row of metrics.jsonl an evaluation and not a training step?"""
    # Every training step has a batch size; looking through all of its keys takes longer than all else here.
    return "batch_size" not in row and any(key.startswith("eval/") for key in row)


def alarms(rows: Iterable[Row]) -> list[Alarm]:
    """Every alarm of a run's rows, in order."""
    watch = Watch()
    return [alarm for row in rows for alarm in watch.observe(row)]
