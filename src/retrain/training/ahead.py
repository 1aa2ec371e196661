"""SEPA's schedule as settings alone tell it: what lambda will be, and whether a run is too short for it to do anything."""

from __future__ import annotations

from dataclasses import dataclass

from retrain.config import names
from retrain.config.schema import Config

_SLIGHT = 0.5
"""A lambda that ends below this pools little in most steps."""


@dataclass(frozen=True, slots=True)
class Lambdas:
    """Lambda of the linear part at the first, middle and last step, with the gate taken as open; ``never`` where it is 0 at
    every step, whatever the rewards are: the run computes what it would without SEPA."""

    first: float
    middle: float
    last: float
    never: bool


def lambdas(config: Config) -> Lambdas | None:
    """None where the credit does not read lambda."""
    mode = config.algorithm.transform_mode
    if (
        not config.algorithm.algorithm_mode
        and mode in names.BUILT["transform"]
        and not mode.startswith("gtpo_sepa")
    ):
        return None
    from retrain.algorithms.credit import build_schedule

    schedule, steps, section = build_schedule(config), config.training.max_steps, config.sepa
    if not schedule.active:
        return None
    first, middle, last = schedule.linear_lambdas([0, steps // 2, steps - 1])
    # The automatic part counts after ``warmup_updates`` updates, of which a step makes one at most; right then the variance
    # is still var_0 itself.
    rises_by_itself = section.schedule == "auto" and steps > section.warmup_updates + 1
    return Lambdas(first, middle, last, never=last == 0 and not rises_by_itself)


def note(config: Config) -> str:
    """A sentence about a run that ends before SEPA does anything, or much; "" for any other."""
    found, section, steps = lambdas(config), config.sepa, config.training.max_steps
    if found is None:
        return ""
    own = config.algorithm.algorithm_mode or not config.algorithm.transform_mode.startswith("gtpo_sepa")
    like = "what it would without SEPA" if own else "plain gtpo"
    if found.never:
        return f"SEPA's lambda is 0 at all {steps:,} steps ({_why(config)}): the run computes {like}."
    if found.last < _SLIGHT and section.schedule == "linear" and not own:
        return (
            f"SEPA's lambda is {found.first:.2f}, {found.middle:.2f} and {found.last:.2f} at the first, middle and last step "
            f"(sepa.delay_steps = {section.delay_steps}, sepa.steps = {section.steps}): the run stays close to plain gtpo."
        )
    return ""


def _why(config: Config) -> str:
    """Why lambda never rises, and what would make it."""
    section, steps = config.sepa, config.training.max_steps
    if section.steps <= 0:
        return "sepa.steps = 0 switches the ramp off"
    return (
        f"it begins to rise after sepa.delay_steps = {section.delay_steps}, takes sepa.steps = {section.steps} from there, and "
        f"the run has {steps:,}"
    )
