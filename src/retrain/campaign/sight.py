"""What a campaign's design can show, told before its first run: from a stated deviation between seeds, or a pilot's."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from retrain.campaign import manifest, outcomes
from retrain.campaign.manifest import Declared
from retrain.campaign.plan import Plan
from retrain.campaign.procedure import Values, crossing, moments
from retrain.campaign.statistics import detectable, equivalence_power, seeds_for, shortfalls, split_variance
from retrain.config.schema import Config
from retrain.errors import ConfigError
from retrain.tracking import layout
from retrain.tracking.read import find_runs

_BLIND = 5.0
"""A look that needs a difference of more deviations than this to see it has no use."""


@dataclass(frozen=True, slots=True)
class Deviation:
    """Standard deviation of the primary outcome over seeds, in [0, 1]; with a paired test, of the difference between two
    runs of one seed. ``source`` in words; ``low`` and ``high``: 95 % interval, NaN for a stated one; ``notes``: what a
    pilot does not have in common with this design, and what its variance is made of."""

    value: float
    source: str
    low: float = math.nan
    high: float = math.nan
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Sight:
    """What the last look of a design can see.

    ``level``: alpha of one comparison. ``deviations``: the smallest true difference seen with 80 % power, in standard
    deviations over seeds; ``difference``: the same in the outcome's unit, None where no deviation is known. ``equivalence``:
    the probability that two equal conditions are shown to be, None likewise; ``equivalence_at``: the largest deviation at
    which it is 80 %. ``seeds_needed``: the fewest seeds that see ``campaign.smallest_effect``. ``shortfalls``: what the design
    cannot show, a sentence each.
    """

    seeds: int
    comparisons: int
    level: float
    deviations: float
    deviation: Deviation | None
    difference: float | None
    equivalence: float | None
    equivalence_at: float
    seeds_needed: int | None
    shortfalls: tuple[str, ...]


def sight(planned: Plan) -> Sight:
    """What the design of ``planned`` can show; reads the pilot where there is one, and raises ConfigError for one that says
    nothing."""
    campaign = planned.campaign
    n, conditions, by_seed = len(planned.seeds), len(planned.conditions), campaign.test == "paired"
    looks = campaign.looks or (n,)
    alpha = campaign.alpha / len(looks)
    level = alpha / max(1, conditions - 1)
    known = deviation(planned)
    value = known.value if known else None
    margin = campaign.smallest_effect
    short = list(shortfalls(conditions, n, alpha=alpha, margin=margin, paired=by_seed, deviation=value))
    if conditions > 1:
        short += _thin_looks(looks, level, campaign.alpha / (conditions - 1), paired=by_seed)
    return Sight(
        seeds=n,
        comparisons=conditions - 1,
        level=level,
        deviations=detectable(1.0, n, level, paired=by_seed),
        deviation=known,
        difference=None if value is None else detectable(value, n, level, paired=by_seed),
        equivalence=None if value is None else equivalence_power(value, n, margin, alpha, paired=by_seed),
        equivalence_at=_equivalence_at(n, margin, alpha, paired=by_seed),
        seeds_needed=None if not value else seeds_for(margin, value, level, paired=by_seed),
        shortfalls=tuple(short),
    )


def _thin_looks(looks: Sequence[int], level: float, undivided: float, *, paired: bool) -> list[str]:
    """Looks that can see nothing, and what several of them cost the last one."""
    found: list[str] = []
    for count in looks[:-1]:
        seen = detectable(1.0, count, level, paired=paired)
        if seen > _BLIND:
            found.append(
                f"The look at {count} seeds is judged at {level:.3g} and sees with 80 % power only differences above "
                f"{seen:.2g} standard deviations: it takes its share of alpha for nothing."
            )
    last, alone = (detectable(1.0, looks[-1], a, paired=paired) for a in (level, undivided))
    if len(looks) > 1 and math.isfinite(last) and last / alone > 1.1:
        found.append(
            f"{len(looks)} looks share alpha: the last one sees differences {100 * (last / alone - 1):.0f} % larger than "
            f"a single look at {looks[-1]} seeds would."
        )
    return found


def _equivalence_at(n: int, margin: float, alpha: float, *, paired: bool) -> float:
    """The largest deviation at which equal conditions are shown to be equivalent in 80 % of campaigns."""
    if n < 2:
        return 0.0
    return crossing(
        lambda d: 0.8 - equivalence_power(d, n, margin, alpha, paired=paired), margin * 1e-3, margin * n
    )


def deviation(planned: Plan) -> Deviation | None:
    """The deviation that the configuration states, or that of its pilot; None where it has neither."""
    campaign = planned.campaign
    by_seed = campaign.test == "paired"
    if campaign.deviation:
        if by_seed:
            unrelated = "Runs of one seed are taken to be unrelated: a pilot would tell."
            return Deviation(campaign.deviation * math.sqrt(2), "stated", notes=(unrelated,))
        return Deviation(campaign.deviation, "stated")
    return piloted(planned, paired=by_seed) if campaign.pilot else None


@dataclass(frozen=True, slots=True)
class _Pilot:
    """Outcomes by condition and seed, the variances of their evaluations, and what each run was like, in words."""

    values: Mapping[str, Mapping[int, float]]
    variances: Sequence[float | None]
    steps: set[int]
    tasks: set[int]


def piloted(planned: Plan, *, paired: bool) -> Deviation:
    """The pooled deviation of an earlier campaign, or of the runs in a folder, that are done; of two runs of one condition
    that differ in their seed alone. ConfigError where there are none."""
    directory = Path(planned.campaign.pilot).expanduser()
    place = planned.loaded.where("campaign", "pilot")
    where = f"{place}: " if place else ""
    if not directory.is_dir():
        raise ConfigError(
            f"{where}campaign.pilot = {planned.campaign.pilot!r}: there is no such folder.",
            fix="name an earlier campaign or a folder of runs, or state campaign.deviation.",
        )
    design = planned.runs[0].config
    pilot = _campaign(directory) if layout.holds_campaign(directory) else _runs(directory, design)
    arms = [np.array(list(arm.values()), np.float64) for arm in pilot.values.values() if len(arm) > 1]
    if not arms:
        raise ConfigError(
            f"{where}campaign.pilot = {planned.campaign.pilot!r} holds no two runs of one condition that are done.",
            fix="name another, or state campaign.deviation.",
        )
    count = sum(map(len, arms))
    gaps = _differences(list(pilot.values.values())) if paired else []
    if gaps:
        value, source = (
            _pooled(gaps),
            f"of differences by seed in {sum(map(len, gaps))} pairs of runs of the pilot",
        )
        return Deviation(value, source, notes=_notes(pilot, design))
    value, notes = _pooled(arms), list(_notes(pilot, design))
    split = split_variance(arms, _mean(pilot.variances))
    low = high = math.nan
    if split is not None:
        low, high = math.sqrt(split.low), math.sqrt(split.high)
        notes.append(split.advice)
    scale = math.sqrt(2) if paired else 1.0
    return Deviation(value * scale, f"of {count} runs of the pilot", low * scale, high * scale, tuple(notes))


def _campaign(directory: Path) -> _Pilot:
    known = manifest.read(directory)
    runs = [
        run
        for run in outcomes.gather(directory, known)
        if run.state in ("done", "failed") and run.value is not None
    ]
    values: dict[str, dict[int, float]] = {}
    for run in runs:
        values.setdefault(run.condition, {})[run.seed] = cast("float", run.value)
    tasks = known.declared.evaluation.get("tasks")
    return _Pilot(
        values,
        [run.variance for run in runs],
        {known.declared.max_steps},
        {tasks} if isinstance(tasks, int) else set(),
    )


def _runs(directory: Path, design: Config) -> _Pilot:
    """Runs of a folder; those whose configurations differ in the seed alone are one condition."""
    values: dict[str, dict[int, float]] = {}
    variances: list[float | None] = []
    steps, tasks = set[int](), set[int]()
    for run in find_runs(directory):
        told, most = _settings(run.path), run.facts.get("max_steps")
        if run.state != "done" or not isinstance(most, int):
            continue
        seed = told.get("training", {}).pop("seed", None)
        for section in ("logging", "resume", "plugins"):
            told.pop(section, None)
        found = outcomes.outcome(run.path, "", 0, _as_declared(most, design))
        if found.value is None:
            continue
        values.setdefault(json.dumps(told, sort_keys=True, default=str), {})[int(seed or 0)] = found.value
        variances.append(found.variance)
        steps.add(most)
        if isinstance(count := told.get("eval", {}).get("examples"), int):
            tasks.add(count)
    return _Pilot(values, variances, steps, tasks)


def _settings(run: Path) -> dict[str, Any]:
    try:
        return tomllib.loads((run / layout.CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _as_declared(max_steps: int, design: Config) -> Declared:
    """A design of one run, for its primary outcome."""
    outcome = "eval/accuracy" if design.eval.source else "correct_rate"
    return Declared("", "", {}, "", (), max_steps, outcome, {}, 0.05, 0.02, "welch", (), None, 1, None)


def _pooled(arms: Sequence[Values]) -> float:
    """Standard deviation within the arms."""
    df = sum(len(arm) - 1 for arm in arms)
    return math.sqrt(math.fsum((len(arm) - 1) * float(moments(arm)[1]) for arm in arms) / df)


def _differences(arms: Sequence[Mapping[int, float]]) -> list[Values]:
    """Every condition minus the first, by the seeds that both have; those with at least two."""
    found: list[Values] = []
    for arm in arms[1:]:
        shared = [seed for seed in arms[0] if seed in arm]
        if len(shared) > 1:
            found.append(np.array([arm[seed] - arms[0][seed] for seed in shared], np.float64))
    return found


def _mean(variances: Sequence[float | None]) -> float | None:
    known = [v for v in variances if v is not None]
    return math.fsum(known) / len(known) if known and len(known) == len(variances) else None


def _notes(pilot: _Pilot, design: Config) -> tuple[str, ...]:
    """In what the pilot differs from the design in ways that change a deviation."""
    found: list[str] = []
    for theirs, ours, what in (
        (pilot.steps, design.training.max_steps, "steps"),
        (pilot.tasks, design.eval.examples if design.eval.source else None, "held-out tasks"),
    ):
        if theirs and ours is not None and theirs != {ours}:
            found.append(
                f"The pilot's runs have {', '.join(map(str, sorted(theirs)))} {what}, those of this campaign {ours}."
            )
    return tuple(found)


def describe(seen: Sight, config: Config) -> list[str]:
    """What a design can see, in sentences."""
    campaign, known = config.campaign, seen.deviation
    if campaign is None or seen.comparisons < 1 or seen.seeds < 2:
        return list(seen.shortfalls)
    effect = f"{100 * campaign.smallest_effect:.3g} points"
    if known is None or seen.difference is None:
        found = [
            f"With 80 % power the design sees differences of at least {seen.deviations:.2f} standard deviations over seeds, and "
            f"can show equivalence within {effect} where that deviation is at most {100 * seen.equivalence_at:.2g} points. How "
            "much runs differ from seed to seed is not known: state campaign.deviation, or name a campaign.pilot."
        ]
        return [*found, *seen.shortfalls]
    interval = ""
    if not math.isnan(known.high):
        interval = f", 95 % interval {100 * known.low:.2g} to {100 * known.high:.2g}"
    found = [
        f"With 80 % power the design sees differences of at least {100 * seen.difference:.2g} points (deviation over seeds "
        f"{100 * known.value:.2g} points{interval}, {known.source}; {seen.comparisons} "
        f"comparison{'s' * (seen.comparisons > 1)} at {seen.level:.3g} each)."
    ]
    if seen.difference > campaign.smallest_effect:
        needed = f"{seen.seeds_needed:,}" if seen.seeds_needed else "more than 100,000"
        found.append(
            f"A difference of {effect}, the smallest that matters, is not seen reliably: that takes {needed} seeds."
        )
    return [*found, *known.notes, *seen.shortfalls]
