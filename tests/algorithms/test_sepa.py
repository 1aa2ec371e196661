"""SEPA's schedule: the linear part, the automatic part, the gate, and states that continue exactly."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrain.algorithms.sepa import SepaSchedule
from retrain.errors import ResumeError, RunError
from retrain.protocols import Stateful
from retrain.types import StepStats


class NaiveSepa:
    """The schedule written a second time, from its description, with the whole history kept."""

    def __init__(
        self, steps: int, auto: bool, delay: int, gate: float, decay: float, threshold: float, warmup: int
    ):
        self.args = steps, auto, delay, gate, decay, threshold, warmup
        self.history: list[StepStats] = []

    def lambda_at(self, step: int) -> float:
        steps, auto, delay, gate, decay, threshold, warmup = self.args
        if gate > 0 and not any(s.correct_rate is not None and s.correct_rate >= gate for s in self.history):
            return 0.0
        linear = 0.0 if steps <= 0 else max(0.0, min(1.0, (step - delay) / steps))
        variances = [s.exec_variance for s in self.history if s.exec_variance is not None]
        if not auto or len(variances) < warmup:
            return linear
        averages = [variances[0]]
        for v in variances[1:]:
            averages.append(decay * averages[-1] + (1 - decay) * v)
        share = averages[-1] / max(averages[warmup - 1], 1e-8) / threshold
        return max(linear, 1 - min(share, 1))


steps_of_a_run = st.lists(
    st.builds(StepStats, st.floats(0, 1), st.one_of(st.none(), st.floats(0, 10))), min_size=1, max_size=12
)
settings_of_a_schedule = st.fixed_dictionaries(
    {
        "steps": st.integers(-1, 8),
        "schedule": st.sampled_from(["linear", "auto"]),
        "delay_steps": st.integers(0, 4),
        "correct_rate_gate": st.sampled_from([-1.0, 0.0, 0.3, 0.9]),
        "ema_decay": st.sampled_from([0.0, 0.5, 0.99]),
        "threshold": st.sampled_from([0.2, 1.0]),
        "warmup_updates": st.integers(1, 4),
    }
)


@given(settings_of_a_schedule, steps_of_a_run)
def test_lambda_equals_its_twin_at_every_step(settings: dict[str, Any], run: list[StepStats]) -> None:
    schedule = SepaSchedule(**settings)
    naive = NaiveSepa(
        steps=settings["steps"],
        auto=settings["schedule"] == "auto",
        delay=settings["delay_steps"],
        gate=settings["correct_rate_gate"],
        decay=settings["ema_decay"],
        threshold=settings["threshold"],
        warmup=settings["warmup_updates"],
    )
    for step, stats in enumerate(run):
        assert 0.0 <= schedule.lambda_at(step) <= 1.0
        assert schedule.lambda_at(step) == pytest.approx(naive.lambda_at(step), abs=1e-12)
        schedule.observe(stats)
        naive.history.append(stats)


@given(settings_of_a_schedule, steps_of_a_run, st.integers(0, 12))
def test_a_state_through_json_continues_exactly(
    settings: dict[str, Any], run: list[StepStats], cut: int
) -> None:
    whole, first, second = (SepaSchedule(**settings) for _ in range(3))
    for stats in run:
        whole.observe(stats)
    for stats in run[:cut]:
        first.observe(stats)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for stats in run[cut:]:
        second.observe(stats)
    assert second.state_dict() == whole.state_dict()
    assert [second.lambda_at(s) for s in range(20)] == [whole.lambda_at(s) for s in range(20)]
    assert second.gate_open == whole.gate_open


def test_delay_1_ramp_4() -> None:
    schedule = SepaSchedule(steps=4, delay_steps=1, correct_rate_gate=0.0)
    assert [schedule.lambda_at(s) for s in range(7)] == [0.0, 0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    assert schedule.linear_lambdas([0, 3, 6]) == [0.0, 0.5, 1.0]


def test_the_defaults_reach_a_tenth_after_100_steps_once_the_gate_is_open() -> None:
    schedule = SepaSchedule()
    assert schedule.lambda_at(100) == 0.0
    assert schedule.linear_lambdas([0, 19, 100, 550, 999]) == [0.0, 0.0, 0.1, 1.0, 1.0]
    schedule.observe(StepStats(0.1, None))
    assert schedule.lambda_at(100) == 0.1


@pytest.mark.parametrize("steps", [0, -5])
def test_no_ramp_stays_at_0(steps: int) -> None:
    schedule = SepaSchedule(steps=steps, delay_steps=0, correct_rate_gate=0.0)
    assert [schedule.lambda_at(s) for s in (0, 1, 1000)] == [0.0, 0.0, 0.0]


def test_the_gate_opens_at_its_rate_and_stays_open() -> None:
    schedule = SepaSchedule(steps=2, delay_steps=0, correct_rate_gate=0.5)
    seen = []
    for step, rate in enumerate([0.0, 0.49, 0.5, 0.0, 0.0]):
        seen.append((schedule.gate_open, schedule.lambda_at(step)))
        schedule.observe(StepStats(rate, 1.0))
    assert seen == [(False, 0.0), (False, 0.0), (False, 0.0), (True, 1.0), (True, 1.0)]


def test_auto_with_a_warm_up_of_2_follows_the_variance_behind_a_closed_gate() -> None:
    schedule = SepaSchedule(
        steps=100,
        schedule="auto",
        delay_steps=100,
        correct_rate_gate=0.5,
        ema_decay=0.5,
        threshold=0.5,
        warmup_updates=2,
    )
    schedule.observe(StepStats(0.0, 4.0))
    assert schedule.state_dict() == {"gate_open": False, "updates": 1, "ema": 4.0, "var_0": None}
    schedule.observe(StepStats(0.0, None))
    schedule.observe(StepStats(0.0, 2.0))
    assert schedule.state_dict() == {"gate_open": False, "updates": 2, "ema": 3.0, "var_0": 3.0}
    assert schedule.lambda_at(5) == 0.0
    schedule.observe(StepStats(0.5, 0.0))
    assert schedule.gate_open
    assert schedule.lambda_at(5) == 0.0  # ema 1.5 of var_0 3: exactly the threshold
    schedule.observe(StepStats(0.0, 0.0))
    assert schedule.lambda_at(5) == 0.5
    assert schedule.state_dict()["var_0"] == 3.0
    schedule.observe(StepStats(0.0, 40.0))
    assert schedule.lambda_at(5) == 0.0  # a variance that grows again takes lambda back
    assert schedule.lambda_at(150) == 0.5  # to the linear part


def test_only_the_linear_part_counts_before_var_0_is_fixed() -> None:
    schedule = SepaSchedule(steps=10, schedule="auto", delay_steps=0, correct_rate_gate=0.0, warmup_updates=3)
    for variance in (1.0, 0.0):
        schedule.observe(StepStats(1.0, variance))
        assert schedule.lambda_at(2) == 0.2


def test_a_var_0_of_0_does_not_divide_by_0() -> None:
    schedule = SepaSchedule(schedule="auto", correct_rate_gate=0.0, warmup_updates=1)
    schedule.observe(StepStats(1.0, 0.0))
    assert schedule.lambda_at(0) == 1.0


def test_a_closed_gate_asks_for_a_correct_rate() -> None:
    schedule = SepaSchedule(correct_rate_gate=0.1)
    with pytest.raises(RunError, match=r"reward\.correct_at"):
        schedule.observe(StepStats(None, 1.0))
    schedule.observe(StepStats(None, None))  # every rollout of the step broke: nothing was seen
    assert schedule.state_dict()["updates"] == 0


def test_an_open_gate_asks_for_nothing() -> None:
    schedule = SepaSchedule(correct_rate_gate=0.0)
    schedule.observe(StepStats(None, 1.0))
    assert schedule.state_dict()["updates"] == 1


def test_a_condition_without_sepa_has_lambda_0_and_still_observes() -> None:
    schedule = SepaSchedule(steps=1, delay_steps=0, schedule="auto", warmup_updates=1, active=False)
    schedule.observe(StepStats(None, 1.0))
    schedule.observe(StepStats(1.0, 0.0))
    assert schedule.gate_open
    assert schedule.lambda_at(10) == 0.0
    assert schedule.linear_lambdas([0, 10]) == [0.0, 0.0]
    assert schedule.state_dict()["updates"] == 2


@pytest.mark.parametrize(
    "wrong",
    [
        {"schedule": "cosine"},
        {"ema_decay": 1.0},
        {"ema_decay": -0.1},
        {"threshold": 0.0},
        {"warmup_updates": 0},
    ],
)
def test_wrong_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SepaSchedule(**wrong)


@pytest.mark.parametrize("variance", [float("nan"), float("inf"), -1.0])
def test_a_variance_that_is_none_is_refused(variance: float) -> None:
    with pytest.raises(ValueError, match="variance"):
        SepaSchedule().observe(StepStats(1.0, variance))


def test_a_foreign_state_is_refused() -> None:
    schedule = SepaSchedule()
    assert isinstance(schedule, Stateful)
    with pytest.raises(ResumeError, match="nothing in it"):
        schedule.load_state_dict({})
