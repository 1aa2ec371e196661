"""What settings alone say of SEPA's schedule, held against the schedule itself."""

from __future__ import annotations

import pytest

from retrain import preflight
from retrain.algorithms.credit import build_schedule
from retrain.training import ahead
from retrain.types import StepStats


def config_of(make_config, max_steps, mode="gtpo_sepa", **sepa):
    return make_config(training={"max_steps": max_steps}, algorithm={"transform_mode": mode}, sepa=sepa)


def largest(config):
    """The largest lambda of a run whose gate is open from the start and whose variance falls as fast as it can."""
    schedule, found = build_schedule(config), 0.0
    for step in range(config.training.max_steps):
        found = max(found, schedule.lambda_at(step))
        schedule.observe(StepStats(correct_rate=1.0, exec_variance=1.0 if step == 0 else 0.0))
    return found


@pytest.mark.parametrize(
    ("max_steps", "sepa"),
    [
        (6, {"steps": 4}), (51, {"steps": 4}), (52, {"steps": 4}), (6, {"steps": 4, "delay_steps": 5}),
        (7, {"steps": 4, "delay_steps": 5}), (9, {"steps": 0, "delay_steps": 0}),
        (6, {"schedule": "auto", "warmup_updates": 5, "ema_decay": 0.5}),
        (7, {"schedule": "auto", "warmup_updates": 5, "ema_decay": 0.1}),
    ],
)  # fmt: skip
def test_a_run_too_short_for_sepa_is_known_beforehand(make_config, max_steps, sepa):
    config = config_of(make_config, max_steps, **sepa)
    found = ahead.lambdas(config)
    assert found.never == (largest(config) == 0)
    assert ("0 at all" in ahead.note(config)) == found.never
    assert (ahead.note(config) in preflight.advice(config, (), (), {})) == bool(ahead.note(config))


def test_the_note_names_what_keeps_lambda_at_0(make_config):
    assert ahead.note(config_of(make_config, 6, steps=4)) == (
        "SEPA's lambda is 0 at all 6 steps (it begins to rise after sepa.delay_steps = 50, takes sepa.steps = 4 from there, and "
        "the run has 6): the run computes plain gtpo."
    )
    assert "sepa.steps = 0 switches the ramp off" in ahead.note(config_of(make_config, 600, steps=0))
    assert "0.00, 0.00 and 0.10 at the first" in ahead.note(config_of(make_config, 100, steps=500))
    assert ahead.note(config_of(make_config, 100, steps=50, delay_steps=0)) == ""
    assert ahead.lambdas(config_of(make_config, 6, mode="gtpo")) is None
