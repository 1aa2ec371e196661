"""A campaign as ``status`` and ``top`` show it: how far it is, and every run in a few characters.

Needs neither numpy nor the whole of any run's metrics, so that a look at hundreds of runs is quick.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from retrain.campaign import manifest, outcomes
from retrain.campaign.manifest import Declared, Manifest
from retrain.campaign.outcomes import run_name
from retrain.tracking import layout
from retrain.tracking.read import RunRecord, find_runs
from retrain.tracking.summary import Summary, duration, recent, summarize
from retrain.tracking.vitals import number

_STATES = ("done", "running", "silent", "hung", "failed", "dead", "interrupted", "unknown", "waiting")
_GOING = ("running", "silent", "hung")
_STOPPED = ("failed", "dead", "interrupted", "unknown")
_NAMED = 20
"""Runs that have stopped which are named one by one."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One planned run: its state ("waiting" before it begins), completed steps, newest value of the outcome's metric, seconds
    left and spent where they are known, and why it stopped."""

    name: str
    condition: str
    seed: int
    state: str
    step: int
    value: float | None
    left_s: float | None
    spent_s: float | None
    why: str


@dataclass(frozen=True)
class Progress:
    """A campaign as it stands; ``summaries`` are of the runs that go on, ``trials`` counts states of runs that choose a
    setting, ``broken`` are those of them that have stopped before their end."""

    directory: Path
    manifest: Manifest
    cells: tuple[Cell, ...]
    summaries: Mapping[str, Summary]
    trials: Mapping[str, int]
    broken: tuple[Cell, ...] = ()

    @property
    def counts(self) -> dict[str, int]:
        """Runs by state, those that occur."""
        found = Counter(cell.state for cell in self.cells)
        return {state: found[state] for state in _STATES if found[state]}

    @property
    def going(self) -> list[Summary]:
        """The runs that have a process."""
        return [self.summaries[cell.name] for cell in self.cells if cell.state in _GOING]

    @property
    def left_s(self) -> float | None:
        """Seconds until the last run is done if as many as now go on at once; None where that cannot be told."""
        going = [cell for cell in self.cells if cell.state in _GOING]
        usual = [cell.spent_s for cell in self.cells if cell.state == "done" and cell.spent_s]
        waiting = sum(cell.state in ("waiting", "interrupted", "dead") for cell in self.cells)
        if not going or (waiting and not usual):
            return None
        mean = sum(usual) / len(usual) if usual else 0.0
        known = [cell.left_s if cell.left_s is not None else mean for cell in going]
        return (sum(known) + waiting * mean) / len(going)

    def awaited(self) -> tuple[int, int, int]:
        """(seeds, ended runs, runs) of the first declared look that is not complete; of the last where all are."""
        declared = self.manifest.declared
        for count in declared.looks:
            used = set(declared.seeds[:count])
            runs = [cell for cell in self.cells if cell.seed in used]
            ended = sum(cell.state in ("done", "failed") and cell.value is not None for cell in runs)
            if ended < len(runs) or count == declared.looks[-1]:
                return count, ended, len(runs)
        return 0, 0, 0

    def record(self) -> dict[str, Any]:
        """As JSON."""
        seeds, ended, runs = self.awaited()
        return {
            "path": str(self.directory),
            "name": self.manifest.declared.name,
            "counts": self.counts,
            "planned": len(self.cells),
            "left_s": self.left_s,
            "look": {"seeds": seeds, "ended": ended, "runs": runs},
            "trials": dict(self.trials),
            "stopped_trials": [asdict(cell) for cell in self.broken],
            "cells": [asdict(cell) for cell in self.cells],
        }


def look(directory: Path) -> Progress:
    """The campaign in ``directory``; ResumeError where its manifest is missing or was changed."""
    found = manifest.read(directory)
    ended = outcomes.processes(directory)
    cells: list[Cell] = []
    summaries: dict[str, Summary] = {}
    for seed in found.seeds:
        for label in found.declared.conditions:
            name = run_name(label, seed)
            run = RunRecord(directory / layout.CAMPAIGN_RUNS / name)
            begun = layout.holds_run(run.path) or run.is_starting
            if begun and run.state in _GOING:
                summaries[name] = summarize(run)
            cells.append(_cell(run, begun, label, seed, found.declared, summaries.get(name), ended.get(name, ())))
    trials, broken = _trials(directory, found, ended)
    return Progress(directory, found, tuple(cells), summaries, trials, broken)


def _trials(
    directory: Path, found: Manifest, ended: Mapping[str, outcomes.Ends]
) -> tuple[Mapping[str, int], tuple[Cell, ...]]:
    """How many trials are in each state, those that a process was started for; and those that have stopped."""
    tune: Mapping[str, Any] = found.declared.tune or {}
    root = directory / layout.CAMPAIGN_TRIALS
    if not tune and not root.is_dir():
        return {}, ()
    fixed = replace(found.declared, max_steps=tune.get("max_steps", found.declared.max_steps), threshold=None)
    own = {run_name(label, seed) for seed in found.seeds for label in found.declared.conditions}
    runs = {run.path.name: run for run in (find_runs(root) if root.is_dir() else [])}
    # One that was killed or refused before its first record has no directory that says so.
    runs |= {name: RunRecord(root / name) for name in ended if tune and name not in own and name not in runs}
    states, broken = Counter[str](), list[Cell]()
    for name, run in runs.items():
        label, _, seed = name.rpartition("_s")
        begun = layout.holds_run(run.path) or run.is_starting
        if begun and run.state in (*_GOING, "done"):
            states[run.state] += 1
            continue
        cell = _cell(run, begun, label, int(seed) if seed.isdecimal() else 0, fixed, None, ended.get(name, ()))
        states[cell.state] += 1
        if cell.state in _STOPPED or cell.why:
            broken.append(replace(cell, name=name))
    return states, tuple(broken)


def _cell(
    run: RunRecord, begun: bool, label: str, seed: int, declared: Declared, summary: Summary | None, ended: outcomes.Ends
) -> Cell:
    name, why = run_name(label, seed), str(ended[-1].get("why") or "") if ended else ""
    if summary is not None:
        value = summary.correct if declared.outcome != "eval/accuracy" else _accuracy(summary.evaluation)
        return Cell(name, label, seed, summary.state, summary.step, value, summary.left_s, summary.lasted_s, "")
    step, spent = int(number(run.facts, "step") or 0), number(run.facts, "spent_s")
    is_done = begun and run.state == "done" and step == declared.max_steps
    # Only runs that have stopped are read whole: whether they count, and why they stopped, is the report's to say.
    found = None if is_done else outcomes.outcome(run.path, label, seed, declared, ended)
    if found is not None and (not begun or found.state == "failed" or found.misfit):
        return Cell(name, label, seed, found.state, step, found.value, None, spent, found.error or why)
    if declared.outcome != "eval/accuracy":
        value = recent([row for row in run.tail() if "batch_size" in row], declared.outcome)
    else:
        # A finished run's last heartbeat has its last evaluation; the end of its metrics has it where that is lost.
        value = _accuracy(run.beat.get("evaluation"))
        if value is None:
            known = [number(row, declared.outcome) for row in run.tail()]
            value = next((v for v in reversed(known) if v is not None), None)
    return Cell(name, label, seed, run.state, step, value, None, spent, why if run.state in _STOPPED else "")


def _accuracy(evaluation: Mapping[str, Any] | None) -> float | None:
    return number(evaluation, "accuracy") if evaluation else None


def header(progress: Progress) -> list[str]:
    """How far the campaign is, in a few lines."""
    declared, counts = progress.manifest.declared, progress.counts
    others = ", ".join(f"{n} {state}" for state, n in counts.items() if state != "done")
    left = progress.left_s
    told = f"{counts.get('done', 0)} of {len(progress.cells)} runs done" + (f", {others}" if others else "")
    lines = [f"{progress.directory}: {told}" + (f"; about {duration(left)} left" if left is not None else "")]
    looks = ", ".join(map(str, declared.looks))
    added = f" and {len(progress.manifest.added)} added ones" if progress.manifest.added else ""
    lines.append(
        f"  {len(declared.conditions)} conditions x {len(declared.seeds)} seeds{added}, {declared.max_steps} steps each; "
        f"baseline {declared.baseline}; {'look' if len(declared.looks) == 1 else 'looks'} at {looks} seeds"
    )
    seeds, ended, runs = progress.awaited()
    if ended < runs:
        lines.append(f"  no verdict is read before {seeds} seeds of every condition are done ({ended} of {runs} runs are)")
    else:
        place = shlex.quote(str(progress.directory))
        lines.append(f"  all runs of the declared seeds have ended: retrain report {place} has the verdicts")
    if progress.trials:
        lines.append(f"  trials: {', '.join(f'{n} {state}' for state, n in sorted(progress.trials.items()))}")
    return lines


def grid(progress: Progress) -> tuple[tuple[str, ...], list[tuple[str, ...]], list[str]]:
    """Head, rows (a seed each, its runs by condition) and what was left out of the rows: many seeds of which all runs are
    done, or none has begun, are counted instead."""
    labels = tuple(progress.manifest.declared.conditions)
    by_seed = {seed: [c for c in progress.cells if c.seed == seed] for seed in progress.manifest.seeds}
    total = progress.manifest.declared.max_steps
    same = {seed: {cell.state for cell in cells} for seed, cells in by_seed.items()}
    left: list[str] = []
    hidden: set[int] = set()
    for state, words in (("done", "are done in every condition"), ("waiting", "wait in every condition")):
        seeds = [seed for seed, states in same.items() if states == {state}]
        # The newest done ones and the next to come stay, for orientation.
        fold = seeds[:-4] if state == "done" else seeds[2:]
        if len(by_seed) > 12 and len(fold) > 1:
            hidden |= set(fold)
            left.append(f"{len(fold)} more seeds {words}")
    rows = [
        (str(seed), *(text(cell, total) for cell in cells)) for seed, cells in by_seed.items() if seed not in hidden
    ]
    return ("seed", *labels), rows, left


def text(cell: Cell, total: int) -> str:
    """A run in a few characters: ``41.2%`` done, ``17/40 31.0%`` going on, ``dead 12/40``."""
    value = "" if cell.value is None else f"{cell.value:.1%}"
    if cell.state == "done":
        return value or "done"
    if cell.state == "waiting":
        return "-"
    where = f"{cell.step}/{total}"
    return " ".join(filter(None, (where, value) if cell.state == "running" else (cell.state, where, value)))


def stopped(progress: Progress) -> list[str]:
    """Runs that have stopped before their end, by name with the reason, and what goes on with them; before them the trials,
    as long as there is something to choose."""
    cells = [c for c in progress.cells if c.state in _STOPPED or (c.state == "waiting" and c.why)]
    trials = () if progress.manifest.chosen else progress.broken
    if not cells and not trials:
        return []
    tune: Mapping[str, Any] = progress.manifest.declared.tune or {}
    told = [
        *(f"trial {_told(cell, tune.get('max_steps', 0))}" for cell in trials),
        *(_told(cell, progress.manifest.declared.max_steps) for cell in cells),
    ]
    more = [f"... and {len(told) - _NAMED} more"] if len(told) > _NAMED else []
    return [*told[:_NAMED], *more, *_again(len(told), progress)]


def _told(cell: Cell, total: int) -> str:
    where = "not begun" if cell.state == "waiting" else f"{cell.state} at step {cell.step}/{total}"
    return f"{cell.name}: {where}" + (f", {cell.why}" if cell.why else "")


def _again(count: int, progress: Progress) -> list[str]:
    return [f"retrain --resume {shlex.quote(str(progress.directory))} goes on with {'it' if count == 1 else 'them'}"]
