"""What each run of a campaign came to: its state and its primary outcome, read from its directory as it stands."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from retrain.campaign.manifest import LAST_SHARE, Declared, Manifest
from retrain.tracking import layout
from retrain.tracking.read import RunRecord
from retrain.tracking.vitals import number

State: TypeAlias = Literal["waiting", "running", "done", "failed", "interrupted", "dead"]
"""``waiting``: not begun. ``dead``: it says it runs and its process is gone; a rerun goes on with it, as with
``interrupted``."""


@dataclass(frozen=True, slots=True)
class RunOutcome:
    """One run (the unit of every test).

    ``value`` is the primary outcome in [0, 1]: the mean over the evaluations of the last 20 % of steps; of a run that
    broke off, its last evaluation (``is_last``); None where there is none yet. ``curve`` holds (completed steps, outcome
    metric) of every evaluation; ``variance`` the mean sampling variance of one of the evaluations in ``value``, None where
    unknown. ``reached`` is the number of completed steps at the first evaluation at or above the threshold, None when it
    was not reached (censored at ``step``). ``error`` is why it failed, one line.
    """

    name: str
    condition: str
    seed: int
    state: State
    step: int
    value: float | None
    is_last: bool
    curve: tuple[tuple[int, float], ...]
    variance: float | None
    reached: int | None
    seconds: float | None
    tokens: int | None
    error: str
    path: str


def run_name(label: str, seed: int) -> str:
    """Name of a run's directory and of the run at trackers."""
    return f"{label}_s{seed}"


def gather(directory: Path, manifest: Manifest) -> tuple[RunOutcome, ...]:
    """Every planned run, seed by seed and in each the conditions in order."""
    return tuple(
        outcome(directory / layout.CAMPAIGN_RUNS / run_name(label, seed), label, seed, manifest.declared)
        for seed in manifest.seeds
        for label in manifest.declared.conditions
    )


def outcome(path: Path, label: str, seed: int, declared: Declared) -> RunOutcome:
    """The run in ``path`` as it stands."""
    name = run_name(label, seed)
    if not layout.holds_run(path) and not RunRecord(path).is_starting:
        return RunOutcome(name, label, seed, "waiting", 0, None, False, (), None, None, None, None, "", str(path))
    run = RunRecord(path)
    curve = _curve(run, declared)
    late = [(at, row) for at, row in curve if at >= (1 - LAST_SHARE) * declared.max_steps]
    state = _state(run)
    counted = late if state == "done" and late else curve[-1:] if state in ("done", "failed") else []
    values = [value for _, (value, _) in counted]
    variances = [v for _, (_, v) in counted if v is not None]
    reached = None
    if declared.threshold is not None:
        reached = next((at for at, (value, _) in curve if value >= declared.threshold), None)
    facts = run.facts
    return RunOutcome(
        name=name, condition=label, seed=seed, state=state, step=_whole(facts.get("step")) or 0,
        value=math.fsum(values) / len(values) if values else None,
        is_last=bool(counted) and counted != late,
        curve=tuple((at, value) for at, (value, _) in curve),
        variance=math.fsum(variances) / len(variances) if variances else None,
        reached=reached,
        seconds=number(facts, "spent_s"),
        tokens=_whole(run.beat.get("tokens")),
        error=_why(run) if state == "failed" else "",
        path=str(path),
    )  # fmt: skip


def _state(run: RunRecord) -> State:
    state = run.state
    if state in ("done", "failed", "interrupted", "dead"):
        return state
    return "running" if state in ("running", "silent", "hung") else "interrupted"


def _curve(run: RunRecord, declared: Declared) -> list[tuple[int, tuple[float, float | None]]]:
    """(completed steps, (value, sampling variance)) of each evaluation; of each step where training's rate is compared."""
    if declared.outcome == "eval/accuracy":
        rows = [(int(row["step"]), row) for row in run.evaluations]
    else:
        rows = [(int(row["step"]) + 1, row) for row in run.steps]
    found: list[tuple[int, tuple[float, float | None]]] = []
    for at, row in rows:
        value = number(row, declared.outcome)
        if value is not None:
            found.append((at, (value, _variance(row))))
    return found


def _variance(row: Mapping[str, Any]) -> float | None:
    """Sampling variance of an evaluation's accuracy, from its 95 % interval."""
    low, high = number(row, "eval/accuracy_low"), number(row, "eval/accuracy_high")
    return None if low is None or high is None else ((high - low) / (2 * 1.959963984540054)) ** 2


def _why(run: RunRecord) -> str:
    """The last error in events.log, as one line."""
    try:
        lines = (run.path / layout.EVENTS).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    said = [line.split(" ", 3)[-1] for line in lines if " ERROR " in line or " bug: " in line or " DEBUG " in line]
    return said[-1][:300] if said else ""


def _whole(value: object) -> int | None:
    return int(value) if isinstance(value, int | float) and math.isfinite(value) else None


def counts(outcomes: Sequence[RunOutcome]) -> dict[str, int]:
    """How many runs are in each state that occurs."""
    found: dict[str, int] = {}
    for each in outcomes:
        found[each.state] = found.get(each.state, 0) + 1
    return found
