"""Chooses one setting for each condition before a campaign's own runs: trials on seeds and held-out tasks of their own, with
the same budget for every condition, so that a comparison does not compare how well each was tuned.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
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
    where every trial has ended (one that came to no evaluation counts 0). ``why`` says of each why it failed or is not done."""

    condition: str
    value: Any
    seeds: tuple[int, ...]
    states: tuple[str, ...]
    outcomes: tuple[float | None, ...]
    mean: float | None
    chosen: bool
    why: tuple[str, ...] = ()


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
    ended = outcomes.processes(directory)
    return tuple(
        _tried(directory / layout.CAMPAIGN_TRIALS, fixed, condition, value, manifest.chosen, ended)
        for condition in fixed.conditions
        for value in fixed.tune["values"]
    )


def unfinished(directory: Path, manifest: Manifest) -> set[str]:
    """Names of the trials to start: those that have not ended, and all of a condition where none came to an evaluation, as
    what stopped them may be gone by now."""
    tried, found = trials(directory, manifest), set[str]()
    for each in tried:
        mute = all(value is None for other in tried if other.condition == each.condition for value in other.outcomes)
        found |= {
            name for name, state in zip(_names(each, manifest.declared), each.states, strict=True)
            if state != "done" and (mute or state != "failed")
        }  # fmt: skip
    return found


def _names(tried: Tried, fixed: Declared) -> list[str]:
    tune: Mapping[str, Any] = fixed.tune or {}
    label = trial_label(tried.condition, tune["field"], tried.value, tune["values"])
    return [run_name(label, seed) for seed in tried.seeds]


def told(directory: Path, manifest: Manifest) -> list[str]:
    """A line for each trial that failed, or came to no evaluation that is a number: what happened, and how it counts."""
    lines: list[str] = []
    for each in trials(directory, manifest):
        for name, state, value, why in zip(
            _names(each, manifest.declared), each.states, each.outcomes, each.why, strict=True
        ):
            if state == "done" and value is not None:
                continue
            what = "done, but none of its last evaluations is a number" if state == "done" else state
            counts = "counts 0" if value is None else f"counts at its last evaluation, {value:.1%}"
            lines.append(f"Trial {name}: {what}{f' ({why})' if why else ''}; it {counts}.")
    return lines


def _tried(
    root: Path, fixed: Declared, condition: str, value: Any, chosen: Mapping[str, Any], ended: Mapping[str, outcomes.Ends]
) -> Tried:
    tune: Mapping[str, Any] = fixed.tune or {}
    label = trial_label(condition, tune["field"], value, tune["values"])
    names = [run_name(label, seed) for seed in tune["seeds"]]
    runs = [
        outcome(root / name, label, seed, fixed, ended.get(name, ()))
        for name, seed in zip(names, tune["seeds"], strict=True)
    ]
    states = ["failed" if _is_refused(run, ended.get(run.name, ())) else run.state for run in runs]
    # Of one that broke off the last evaluation counts, and what came to none has no outcome, unlike one that reached 0.
    values = [run.value if state == "done" else run.curve[-1][1] if run.curve and state in _ENDED else None
              for run, state in zip(runs, states, strict=True)]  # fmt: skip
    has_ended = all(state in _ENDED for state in states)
    mean = math.fsum(0.0 if v is None else v for v in values) / len(values) if has_ended else None
    return Tried(
        condition, value, tuple(tune["seeds"]), tuple(states), tuple(values), mean,
        condition in chosen and chosen[condition] == value, tuple(run.error or _why(ended.get(run.name, ())) for run in runs),
    )  # fmt: skip


def _why(ended: outcomes.Ends) -> str:
    return str(ended[-1].get("why") or "") if ended else ""


_ENDED = ("done", "failed", "dead")


def _is_refused(run: RunOutcome, ended: outcomes.Ends) -> bool:
    """Was a trial refused as often as is enough? Its value is then one that no run can have. A campaign starts a refused
    trial once, so whoever went on with it had read why."""
    last = ended[-outcomes.GIVEN_UP :]
    is_refused = [row.get("code") == outcomes.REFUSED for row in last]
    return run.state not in _ENDED and len(last) == outcomes.GIVEN_UP and all(is_refused)


def outcome(path: Path, label: str, seed: int, fixed: Declared, ended: outcomes.Ends = ()) -> RunOutcome:
    """The trial in ``path`` as it stands, after its processes ``ended``."""
    tune: Mapping[str, Any] = fixed.tune or {}
    return outcomes.outcome(path, label, seed, replace(fixed, max_steps=tune["max_steps"], threshold=None), ended)


def choose(tried: Sequence[Tried]) -> dict[str, Any]:
    """For each condition the value with the best mean outcome; of equal ones the smaller, or the first where they are no
    numbers, and one without any evaluation is never taken. RunError where trials are not done, or a condition has none with an
    evaluation."""
    found: dict[str, Any] = {}
    for condition in dict.fromkeys(each.condition for each in tried):
        arms = [each for each in tried if each.condition == condition]
        if any(arm.mean is None for arm in arms):
            first = next(_open(arms), "")
            raise RunError(
                f"the trials of {condition} are not done{first}.",
                fix="remove what stops them, then go on with: --resume DIR; one that is refused again counts 0.",
            )
        if all(value is None for arm in arms for value in arm.outcomes):
            told = ((arm.value, seed, why) for arm in arms for seed, why in zip(arm.seeds, arm.why, strict=False) if why)
            first = next((f" (seed {seed} of {value}: {why})" for value, seed, why in told), "")
            raise RunError(
                f"no trial of {condition} came to an evaluation, so nothing can be chosen{first}.",
                fix="see what they printed, in the campaign's folder output; --resume DIR tries them again.",
            )
        best = max(arm.mean or 0.0 for arm in arms)
        equal = [arm for arm in arms if best - (arm.mean or 0.0) <= _LEVEL]
        # One that came to an evaluation of 0 was at least trained with.
        tried_out = [arm for arm in equal if any(value is not None for value in arm.outcomes)]
        level = [arm.value for arm in tried_out or equal]
        numbers = [value for value in level if isinstance(value, int | float) and not isinstance(value, bool)]
        found[condition] = min(numbers) if len(numbers) == len(level) else level[0]
    return found


def _open(arms: Sequence[Tried]) -> Iterator[str]:
    """In words, each trial that has not ended; those first that say why."""
    for is_told in (True, False):
        for arm in arms:
            for seed, state, why in zip(arm.seeds, arm.states, arm.why or ("",) * len(arm.seeds), strict=True):
                if state not in _ENDED and bool(why) is is_told:
                    yield f": seed {seed} of {arm.value} is {state}" + (f" ({why.rstrip('.')})" if why else "")
