"""Everything that a campaign's files say, read once: its design, the state of each run, what its look allows one to conclude,
and what a reader must know before believing it.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from retrain.campaign import cautions, effects, manifest, outcomes, procedure, reading, tune
from retrain.campaign.manifest import Declared, Manifest
from retrain.campaign.outcomes import RunOutcome
from retrain.campaign.reading import Reading
from retrain.campaign.statistics import Analysis, Comparison, Design, Reach, analyse, reach
from retrain.tracking import layout
from retrain.tracking.read import find_runs, lines
from retrain.tracking.vitals import number


@dataclass(frozen=True, slots=True)
class Process:
    """All processes that worked on a run: seconds, processor seconds, largest memory, and why the last one failed."""

    starts: int
    seconds: float
    cpu_s: float
    peak_bytes: int
    why: str


@dataclass(frozen=True, slots=True)
class Trial:
    """A run that helped to choose a setting: where it lies below ``trials``, its state and its last held-out accuracy."""

    name: str
    state: str
    accuracy: float | None


@dataclass(frozen=True, slots=True)
class Metric:
    """Another metric in one condition, over the seeds of the look: its mean with a 95 % t interval, and the difference to the
    baseline with its own (Welch, or paired by seed where that is declared); NaN where there are too few."""

    name: str
    title: str
    unit: str
    condition: str
    n: int
    mean: float
    low: float
    high: float
    difference: float
    difference_low: float
    difference_high: float


@dataclass(frozen=True)
class Findings:
    """A campaign as it stands. ``analysis`` is of the declared seeds, with look 0 before the first declared look is complete;
    ``exploratory`` of all seeds, once added ones are done. ``config`` is the campaign's own configuration."""

    directory: Path
    manifest: Manifest
    outcomes: tuple[RunOutcome, ...]
    readings: Mapping[str, Reading]
    analysis: Analysis
    exploratory: Analysis | None
    config: Mapping[str, Any]
    processes: Mapping[str, Process]
    trials: tuple[Trial, ...]
    tried: tuple[tune.Tried, ...]
    warnings: tuple[str, ...]

    @property
    def declared(self) -> Declared:
        """The design that was fixed before the first run."""
        return self.manifest.declared

    @property
    def is_readable(self) -> bool:
        """Is the first declared look complete, so that results may be judged?"""
        return self.analysis.look > 0

    @property
    def level(self) -> float:
        """Coverage of the intervals of a look."""
        return 1 - self.declared.alpha / len(self.declared.looks)

    def awaited(self) -> tuple[int, int, int]:
        """(seeds, runs that have a result, runs) of the first look that is not complete; of the last one where all are."""
        for count in self.declared.looks:
            used = set(self.declared.seeds[:count])
            runs = [run for run in self.outcomes if run.seed in used]
            done = sum(finished(run) for run in runs)
            if done < len(runs) or count == self.declared.looks[-1]:
                return count, done, len(runs)
        return 0, 0, 0

    def of(self, condition: str) -> list[RunOutcome]:
        """The runs of a condition, in the order of the seeds."""
        return [run for run in self.outcomes if run.condition == condition]


def finished(run: RunOutcome) -> bool:
    """Does the run count: has it ended, with an outcome?"""
    return run.state in ("done", "failed") and run.value is not None


def gather(directory: Path) -> Findings:
    """Read the campaign in ``directory``; ResumeError where its manifest is missing or was changed."""
    found = manifest.read(directory)
    declared = found.declared
    runs = outcomes.gather(directory, found)
    readings = {run.name: reading.read(run, declared) for run in runs if run.state != "waiting"}
    config = _config(directory / layout.CONFIG)
    idle = effects.without_effect(effects.settings(config, declared, found.chosen), declared, runs, readings)
    analysis = _analyse(runs, declared, declared.seeds, idle, exploratory=False)
    exploratory = None
    if found.added and all(map(finished, runs)):
        exploratory = _analyse(runs, declared, found.seeds, idle, exploratory=True)
    return Findings(
        directory=directory,
        manifest=found,
        outcomes=runs,
        readings=readings,
        analysis=analysis,
        exploratory=exploratory,
        config=config,
        processes=_processes(directory / layout.CAMPAIGN_PROCESSES),
        trials=tuple(_trials(directory / layout.CAMPAIGN_TRIALS)),
        tried=tune.trials(directory, found) if (declared.tune or {}).get("evaluation") is not None else (),
        warnings=(
            *(f"{label}: {text}" for label, text in idle.items()),
            *cautions.warnings(directory, found, runs, readings),
            *analysis.warnings * bool(analysis.look),
        ),
    )


def _analyse(
    runs: Sequence[RunOutcome], declared: Declared, seeds: Sequence[int], idle: Mapping[str, str], *, exploratory: bool
) -> Analysis:
    """``idle`` says of conditions which part of their method did not act."""
    values: dict[str, dict[int, float | None]] = {label: {} for label in declared.conditions}
    variances: dict[str, dict[int, float | None]] = {label: {} for label in declared.conditions}
    by_key = {(run.condition, run.seed): run for run in runs}
    for label in declared.conditions:
        for seed in seeds:
            run = by_key[label, seed]
            values[label][seed] = run.value if finished(run) else None
            variances[label][seed] = run.variance
    design = Design(
        alpha=declared.alpha,
        margin=declared.smallest_effect,
        paired=declared.test == "paired",
        looks=len(declared.looks),
        at=tuple(declared.looks),
    )
    found = analyse(values, baseline=declared.baseline, design=design, exploratory=exploratory, evaluation=variances)
    if not found.look and not exploratory:
        return found
    used = [run for run in runs if run.seed in found.seeds]
    told: list[Comparison] = []
    for each in found.comparisons:
        both = (each.label, each.baseline)
        said = [each.text, cautions.broken(used, both)]
        said += [idle[label] if label == each.label else f"{label}: {idle[label]}" for label in both if label in idle]
        told.append(replace(each, text=" ".join(filter(None, said))))
    return replace(found, comparisons=tuple(told))


def metrics(findings: Findings) -> list[Metric]:
    """Other metrics of the look's runs; none before there is a look. Those that are the same in all runs, or only repeat the
    outcome or the correct rate, are left out."""
    if not findings.is_readable:
        return []
    used, baseline = findings.analysis.seeds, findings.declared.baseline
    by_key = {(run.condition, run.seed): run for run in findings.outcomes}
    chosen = {label: [by_key[label, seed] for seed in used] for label in findings.declared.conditions}
    found: dict[str, dict[str, list[float]]] = {}
    titles: dict[str, tuple[str, str]] = {}
    for name, (title, unit) in reading.CURVES.items():
        titles[name] = (title, unit)
        found[name] = {label: [_late(findings, run, name) for run in runs] for label, runs in chosen.items()}
    for name in dict.fromkeys(n for r in findings.readings.values() for n in r.evaluated):
        titles[name] = (_title(name), _unit(name))
        found[name] = {
            label: [_reading(findings, run).evaluated.get(name, math.nan) for run in runs]
            for label, runs in chosen.items()
        }
    titles["seconds"], titles["tokens"] = ("Time of a run", "s"), ("Sampled by a run", "tokens")
    for name in ("seconds", "tokens"):
        found[name] = {
            label: [math.nan if (v := getattr(run, name)) is None else float(v) for run in runs]
            for label, runs in chosen.items()
        }
    outcome = {label: [math.nan if run.value is None else run.value for run in runs] for label, runs in chosen.items()}
    made: list[Metric] = []
    for name, arms in found.items():
        known = [value for values in arms.values() for value in values if not math.isnan(value)]
        if name == findings.declared.outcome or arms == outcome or not known or max(known) == min(known):
            continue
        if (name == "mean_reward" and arms == found["correct_rate"]) or reading.is_rounding(name, known):
            continue
        for label in chosen:
            made.append(_metric(name, titles[name], label, arms, baseline, findings.declared.test == "paired"))
    return made


def pairs(findings: Findings) -> list[tuple[str, str, float, float, float]]:
    """(one condition, another, difference of the primary outcome, ends of its 95 % t interval) of the pairs without the
    baseline, for which nothing was declared; none before there is a look."""
    if not findings.is_readable:
        return []
    arms = [arm for arm in findings.analysis.arms if arm.label != findings.declared.baseline]
    made: list[tuple[str, str, float, float, float]] = []
    for i, first in enumerate(arms):
        for second in arms[i + 1 :]:
            told = _between(
                np.array(second.values, np.float64), np.array(first.values, np.float64), findings.declared.test == "paired"
            )
            made.append((second.label, first.label, *told))
    return made


def reaches(findings: Findings) -> dict[str, Reach]:
    """Steps to the declared threshold for each condition, over the runs that have ended; empty where none is declared or there
    is no look yet."""
    if findings.declared.threshold is None or not findings.is_readable:
        return {}
    used = set(findings.analysis.seeds)
    made: dict[str, Reach] = {}
    for label in findings.declared.conditions:
        runs = [run for run in findings.of(label) if run.seed in used]
        made[label] = reach([r.reached for r in runs], [r.step for r in runs], findings.declared.max_steps)
    return made


def record(findings: Findings) -> dict[str, Any]:
    """The findings as one JSON document; null where something is not known."""
    seeds, done, runs = findings.awaited()
    document = {
        "campaign": str(findings.directory),
        "declared": asdict(findings.declared),
        "digest": manifest.digest(findings.declared),
        "chosen": dict(findings.manifest.chosen),
        "added": list(findings.manifest.added),
        "counts": outcomes.counts(findings.outcomes),
        "look": findings.analysis.look,
        "awaited": {"seeds": seeds, "finished": done, "runs": runs},
        "analysis": asdict(findings.analysis) if findings.is_readable else None,
        "exploratory": None if findings.exploratory is None else asdict(findings.exploratory),
        "metrics": [asdict(metric) for metric in metrics(findings)],
        "pairs": [
            dict(zip(("condition", "other", "difference", "low", "high"), each, strict=True)) for each in pairs(findings)
        ],
        "steps_to_threshold": {label: asdict(found) for label, found in reaches(findings).items()},
        "warnings": list(findings.warnings),
        "trials": [asdict(trial) for trial in findings.trials],
        "tuning": [asdict(tried) for tried in findings.tried],
        "runs": [
            {
                **{f.name: getattr(run, f.name) for f in fields(run)},
                "process": asdict(told) if (told := findings.processes.get(run.name)) else None,
            }
            for run in findings.outcomes
        ],
    }
    return cast("dict[str, Any]", _plain(document))


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in cast("Mapping[Any, Any]", value).items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in cast("Sequence[Any]", value)]
    return value


def _reading(findings: Findings, run: RunOutcome) -> Reading:
    return findings.readings.get(run.name) or Reading({}, {}, {}, {})


def _late(findings: Findings, run: RunOutcome, name: str) -> float:
    return _reading(findings, run).late.get(name, math.nan)


def _title(name: str) -> str:
    rest = name.removeprefix("eval/")
    words = rest.rpartition("/")[2].replace("max_token_hit_rate", "truncated").replace("_", " ")
    suite = rest.rpartition("/")[0]
    return f"Evaluation {suite + ' ' if suite else ''}{words}"


def _unit(name: str) -> str:
    last = name.rpartition("/")[2]
    if last in ("accuracy", "max_token_hit_rate") or last.startswith(("pass@", "mean@")):
        return "share"
    return "tokens" if last == "mean_length" else ""


def _metric(
    name: str, told: tuple[str, str], label: str, arms: Mapping[str, Sequence[float]], baseline: str, paired: bool
) -> Metric:
    runs, against = np.array(arms[label], np.float64), np.array(arms[baseline], np.float64)
    known = runs[~np.isnan(runs)]
    mean = float(known.mean()) if len(known) else math.nan
    low, high = interval(known)
    between = (math.nan, math.nan, math.nan) if label == baseline else _between(runs, against, paired)
    return Metric(name, *told, label, len(known), mean, low, high, *between)


def interval(values: Sequence[float] | procedure.Values) -> tuple[float, float]:
    """Ends of the 95 % t interval of the mean of ``values`` [n]; NaN for fewer than two."""
    if len(values) < 2:
        return math.nan, math.nan
    centre, variance = procedure.moments(np.asarray(values, np.float64))
    half = float(procedure.t_critical(0.025, float(len(values) - 1))) * math.sqrt(float(variance) / len(values))
    return float(centre) - half, float(centre) + half


def _between(
    runs: procedure.Values, against: procedure.Values, paired: bool
) -> tuple[float, float, float]:
    """Mean difference with the ends of its 95 % interval, of the runs that are known."""
    if paired:
        both = ~np.isnan(runs) & ~np.isnan(against)
        runs, against = runs[both], against[both]
    else:
        runs, against = runs[~np.isnan(runs)], against[~np.isnan(against)]
    if len(runs) < 2 or len(against) < 2:
        return math.nan, math.nan, math.nan
    tested = (procedure.paired if paired else procedure.welch)(runs, against, 0.05)
    return float(tested.difference), float(tested.low), float(tested.high)


def _config(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _processes(path: Path) -> dict[str, Process]:
    found: dict[str, Process] = {}
    for row in lines(path):
        before = found.get(str(row.get("name")), Process(0, 0.0, 0.0, 0, ""))
        failed = row.get("code") not in (0, None)
        found[str(row.get("name"))] = Process(
            before.starts + 1,
            before.seconds + (number(row, "seconds") or 0.0),
            before.cpu_s + (number(row, "cpu_s") or 0.0),
            max(before.peak_bytes, int(number(row, "peak_bytes") or 0)),
            str(row.get("why") or "") if failed else "",
        )
    return found


def _trials(root: Path) -> list[Trial]:
    made: list[Trial] = []
    for run in find_runs(root) if root.is_dir() else []:
        known = [v for row in run.evaluations if (v := number(row, "eval/accuracy")) is not None]
        made.append(Trial(run.path.relative_to(root).as_posix(), run.state, known[-1] if known else None))
    return made
