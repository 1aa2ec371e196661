"""Chooses one setting for each condition before a campaign's own runs: trials on seeds and held-out tasks of their own, with
the same budget for every condition, so that a comparison does not compare how well each was tuned.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from retrain.campaign import outcomes, plan
from retrain.campaign.manifest import Declared, Manifest
from retrain.campaign.outcomes import RunOutcome, run_name
from retrain.campaign.plan import Plan, PlannedRun
from retrain.config import campaigns
from retrain.config.schema import Config
from retrain.environments.sources import digest_of
from retrain.errors import ConfigError, DataError, RunError
from retrain.tracking import layout
from retrain.training import dry

_LEVEL = 1e-12
"""Means that differ by less are equal: sums in floating point do not tell them apart."""


@dataclass(frozen=True, slots=True)
class Tried:
    """One value in one condition: its trials in the order of the seeds, each with the primary outcome on the trials' own
    tasks (of one that failed, or whose process is gone, its last evaluation; None where there is none), and their mean
    where every trial has ended (one that came to no evaluation counts 0)."""

    condition: str
    value: Any
    seeds: tuple[int, ...]
    states: tuple[str, ...]
    outcomes: tuple[float | None, ...]
    mean: float | None
    chosen: bool


def declared(planned: Plan) -> dict[str, Any] | None:
    """What the manifest fixes about tuning, None where nothing is tuned; reads the tasks, and loads no model. ConfigError
    where the held-out tasks are too few for tasks of the trials' own, or these are not their own."""
    campaign = planned.campaign
    field, values = campaigns.tuned(campaign)
    if not values:
        return None
    trials = planned_trials(planned)
    trial = trials[0].config
    digest = _own_tasks(trials, planned)
    return {
        "field": field,
        "values": list(values),
        "seeds": list(campaign.tune.seeds),
        "max_steps": trial.training.max_steps,
        "evaluation": {**plan.evaluation(trial), "skip": trial.eval.skip, "digest": digest},
    }


def _own_tasks(trials: Sequence[PlannedRun], planned: Plan) -> str:
    """Digest of the tasks that trials choose on; ConfigError where they are too few, not their own, not the same for all, or
    trained on by any run that there may be."""
    place = planned.loaded.where("campaign", "tune")
    where = f"{place}: " if place else ""
    base = planned.runs[0].config
    with dry.parts(base) as parts:
        judged = parts.held_out
    digest, seen = "", list[Config]()
    for trial in trials:
        if any(plan.same_tasks(trial.config, other) for other in seen):
            continue
        seen.append(trial.config)
        chosen, training = (), set[str]()
        too_few = contextlib.nullcontext() if planned.campaign.tune.split else contextlib.suppress(DataError)
        with too_few, dry.parts(trial.config) as parts:
            chosen, training = parts.held_out, {plan.text_of(task) for task in parts.tasks}
        if len(chosen) < min(base.eval.examples, len(judged)) and not planned.campaign.tune.split:
            raise ConfigError(
                f"{where}after the {len(judged)} held-out tasks of the evaluation {len(chosen)} are left for trials to choose "
                "on.",
                fix=f"set eval.examples to at most {(len(judged) + len(chosen)) // 2}, or name another part of the data as "
                "campaign.tune.split.",
            )
        own = {plan.text_of(task) for task in chosen}
        for others, what in (
            ({plan.text_of(task) for task in judged}, "evaluated on as well"),
            (training, f"trained on as well (by {trial.condition})" if seen[1:] else "trained on as well"),
        ):
            if shared := own & others:
                raise ConfigError(
                    f"{where}{len(shared)} of the {len(chosen)} tasks for trials to choose on are {what}.",
                    fix="name another part of the data as campaign.tune.split, or remove what the data holds twice.",
                )
        digest = digest or digest_of(chosen)
    return digest


def trial_label(condition: str, field: str, value: Any, values: Sequence[Any] = ()) -> str:
    """Name of the trials of one of ``values`` in one condition, without their seed."""
    return campaigns.labelled(condition, field, value, values)


def planned_trials(planned: Plan) -> tuple[PlannedRun, ...]:
    """Every trial, seed by seed and in each the conditions with their values in order, so that trials that are stopped
    early are balanced; none where nothing is tuned. ConfigError with every problem of every value."""
    campaign, loaded = planned.campaign, planned.loaded
    field, values = campaigns.tuned(campaign)
    budget: dict[str, Any] = {"training.max_steps": campaign.tune.max_steps or campaign.max_steps}
    if campaign.tune.split:
        budget["eval.split"] = campaign.tune.split
    else:
        budget["eval.skip"] = loaded.config.eval.skip + loaded.config.eval.examples
    arms: dict[tuple[str, str], Config] = {}
    with plan.Problems() as problems:
        for condition in planned.conditions:
            for value in values:
                label = trial_label(condition.label, field, value, values)
                with problems.of(label):
                    made = plan.arm(loaded, condition, {**condition.settings, **budget, field: value})
                    arms[condition.label, label] = made.config
    names = {label.casefold() for _, label in arms}
    assert len(names) == len(planned.conditions) * len(values), "every trial has a directory of its own"
    return tuple(
        PlannedRun(run_name(label, seed), condition, seed, plan.seeded(config, "trial", label, seed))
        for seed in campaign.tune.seeds
        for (condition, label), config in arms.items()
    )


def trials(directory: Path, manifest: Manifest) -> tuple[Tried, ...]:
    """Every value of every condition as its trials stand, conditions and values in order; empty where nothing is tuned."""
    fixed = manifest.declared
    if not fixed.tune:
        return ()
    return tuple(
        _tried(directory / layout.CAMPAIGN_TRIALS, fixed, condition, value, manifest.chosen)
        for condition in fixed.conditions
        for value in fixed.tune["values"]
    )


def states(directory: Path, manifest: Manifest) -> dict[str, str]:
    """The state of every trial by its name."""
    tune: Mapping[str, Any] = manifest.declared.tune or {}
    return {
        run_name(
            trial_label(each.condition, tune["field"], each.value, tune["values"]), seed
        ): state
        for each in trials(directory, manifest)
        for seed, state in zip(each.seeds, each.states, strict=True)
    }


def _tried(root: Path, fixed: Declared, condition: str, value: Any, chosen: Mapping[str, Any]) -> Tried:
    tune: Mapping[str, Any] = fixed.tune or {}
    label = trial_label(condition, tune["field"], value, tune["values"])
    runs = [outcome(root / run_name(label, seed), label, seed, fixed) for seed in tune["seeds"]]
    ended = all(run.state in ("done", "failed", "dead") for run in runs)
    values = [run.curve[-1][1] if run.state == "dead" and run.curve else run.value for run in runs]
    mean = math.fsum(0.0 if v is None else v for v in values) / len(values) if ended else None
    return Tried(
        condition, value, tuple(tune["seeds"]), tuple(run.state for run in runs), tuple(values), mean,
        condition in chosen and chosen[condition] == value,
    )  # fmt: skip


def outcome(path: Path, label: str, seed: int, fixed: Declared) -> RunOutcome:
    """The trial in ``path`` as it stands."""
    tune: Mapping[str, Any] = fixed.tune or {}
    return outcomes.outcome(path, label, seed, replace(fixed, max_steps=tune["max_steps"], threshold=None))


def choose(tried: Sequence[Tried]) -> dict[str, Any]:
    """For each condition the value with the best mean outcome; of equal ones the smaller, or the first where they are no
    numbers. RunError where trials are not done, or a condition has none with an evaluation."""
    found: dict[str, Any] = {}
    for condition in dict.fromkeys(each.condition for each in tried):
        arms = [each for each in tried if each.condition == condition]
        if any(arm.mean is None for arm in arms):
            raise RunError(
                f"the trials of {condition} are not done.", fix="go on with the campaign: --resume DIR."
            )
        if all(value is None for arm in arms for value in arm.outcomes):
            raise RunError(
                f"no trial of {condition} came to an evaluation, so nothing can be chosen.",
                fix="see what they printed, in the campaign's folder output.",
            )
        best = max(arm.mean or 0.0 for arm in arms)
        level = [arm.value for arm in arms if best - (arm.mean or 0.0) <= _LEVEL]
        numbers = [value for value in level if isinstance(value, int | float) and not isinstance(value, bool)]
        found[condition] = min(numbers) if len(numbers) == len(level) else level[0]
    return found
