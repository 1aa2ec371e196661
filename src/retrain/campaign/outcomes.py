"""What each run of a campaign came to: its state and its primary outcome, read from its directory as it stands."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from retrain.campaign.manifest import LAST_SHARE, Declared, Manifest
from retrain.tracking import layout
from retrain.tracking.read import RunRecord, lines
from retrain.tracking.vitals import number

State: TypeAlias = Literal["waiting", "running", "done", "failed", "interrupted", "dead"]
"""``waiting``: not begun. ``dead``: it says it runs and its process is gone; a rerun goes on with it, as with
``interrupted``."""


GIVEN_UP = 2
"""A run whose process ended abnormally so many times in a row without getting further counts as failed."""
_SAVED, REFUSED = 130, 2
"""Exit statuses of a run that was interrupted and saved, and of one that was refused before it began."""
Ends: TypeAlias = Sequence[Mapping[str, Any]]
"""Rows of processes.jsonl of one run, oldest first."""


@dataclass(frozen=True, slots=True)
class RunOutcome:
    """One run (the unit of every test).

    ``value`` is the primary outcome in [0, 1]: the mean over the evaluations of the last 20 % of the declared steps; of a
    run that broke off, its last evaluation (``is_last``), and 0 where its process ended abnormally again and again before
    there was one; None where there is none yet. ``curve`` holds (completed steps, outcome metric) of every evaluation up to
    the declared steps; ``variance`` the mean sampling variance of one of the evaluations in ``value``, None where unknown.
    ``reached`` is the number of completed steps at the first evaluation at or above the threshold, None when it was not
    reached (censored at ``step``). ``error`` is why it failed or is not done, one line.

    Of the evaluations that count, ``lost`` of ``asked`` rollouts failed, so that they are about fewer tasks; ``null`` evaluations
    have no outcome. ``skipped`` rows of metrics.jsonl do not say at which step they were. ``retried``: it had ended by an
    error of its own and was started again. ``misfit``: it is done, at another number of steps than declared.
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
    lost: int = 0
    asked: int = 0
    null: int = 0
    skipped: int = 0
    retried: bool = False
    misfit: bool = False

    @property
    def broke_off(self) -> bool:
        """Does it count although it did not come to its end?"""
        return self.state == "failed" and self.value is not None


def run_name(label: str, seed: int) -> str:
    """Name of a run's directory and of the run at trackers."""
    return f"{label}_s{seed}"


def gather(directory: Path, manifest: Manifest) -> tuple[RunOutcome, ...]:
    """Every planned run, seed by seed and in each the conditions in order."""
    ended = processes(directory)
    return tuple(
        outcome(
            directory / layout.CAMPAIGN_RUNS / run_name(label, seed), label, seed, manifest.declared,
            ended.get(run_name(label, seed), ()),
        )
        for seed in manifest.seeds
        for label in manifest.declared.conditions
    )  # fmt: skip


def processes(directory: Path) -> dict[str, list[Mapping[str, Any]]]:
    """How each run's processes ended, by the run's name, oldest first."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in lines(directory / layout.CAMPAIGN_PROCESSES):
        found.setdefault(str(row.get("name")), []).append(row)
    return found


def outcome(path: Path, label: str, seed: int, declared: Declared, ended: Ends = ()) -> RunOutcome:
    """The run in ``path`` as it stands, after its processes ``ended``."""
    name, why = run_name(label, seed), str(ended[-1].get("why") or "") if ended else ""
    if not layout.holds_run(path) and not RunRecord(path).is_starting:
        gone = _is_given_up(ended)
        state, value = ("failed", 0.0) if gone else ("waiting", None)
        return RunOutcome(name, label, seed, state, 0, value, gone, (), None, None, None, None, why, str(path))
    run = RunRecord(path)
    facts = run.facts
    step, state = _whole(facts.get("step")) or 0, _state(run)
    rows, skipped = _rows(run, declared)
    error = _why(run) if state == "failed" else ""
    misfit = state == "done" and step != declared.max_steps
    if misfit:
        state, error = "interrupted", f"done at step {step:,}, and {declared.max_steps:,} are declared"
    known = [(at, value, row) for at, row in rows if (value := number(row, declared.outcome)) is not None]
    gone = state in ("dead", "interrupted", "failed") and not misfit and _is_given_up(ended, step)
    if gone:
        state, error = "failed", error or why
    is_late = _late(declared)
    late = [each for each in known if is_late(each[0])]
    counted = late if state == "done" else known[-1:] if state == "failed" else []
    value = math.fsum(each[1] for each in counted) / len(counted) if counted else 0.0 if gone else None
    variances = [v for *_, row in counted if (v := _variance(row)) is not None]
    reached = None
    if declared.threshold is not None:
        reached = next((at for at, value, _ in known if value >= declared.threshold), None)
    without = [at for at, row in rows if number(row, declared.outcome) is None]
    return RunOutcome(
        name=name, condition=label, seed=seed, state=state, step=step, value=value,
        is_last=state == "failed" and value is not None,
        curve=tuple((at, value) for at, value, _ in known),
        variance=math.fsum(variances) / len(variances) if variances else None,
        reached=reached,
        seconds=number(facts, "spent_s"),
        tokens=_whole(run.beat.get("tokens")),
        error=error,
        path=str(path),
        lost=sum(_whole(row.get("eval/errors")) or 0 for *_, row in counted),
        asked=sum((_whole(row.get("eval/tasks")) or 0) * (_whole(row.get("eval/samples")) or 1) for *_, row in counted),
        null=sum(map(is_late, without)) if state == "done" else len(without),
        skipped=skipped,
        retried=len(ended) > 1 and any(_failed_itself(row) for row in ended[:-1]),
        misfit=misfit,
    )  # fmt: skip


def _is_given_up(ended: Ends, step: int = 0) -> bool:
    """Did the last processes of a run, which stands at ``step``, all end abnormally, and none got further than the one
    before?"""
    last = ended[-GIVEN_UP:]
    abnormal = [row for row in last if row.get("code") not in (0, None, _SAVED, REFUSED) and number(row, "seconds") != 0]
    steps = [_whole(row.get("step")) for row in last]
    if None in steps:
        # Older versions did not record it: then only a run that got nowhere is known to have got no further.
        return len(abnormal) == GIVEN_UP and step == 0
    return len(abnormal) == GIVEN_UP and (steps[0] or 0) >= (steps[-1] or 0)


def _failed_itself(row: Mapping[str, Any]) -> bool:
    """Did a process end by an error of its own: neither stopped, nor refused, nor killed?"""
    return row.get("code") == 1 and number(row, "seconds") != 0


def _late(declared: Declared) -> Callable[[int], bool]:
    """Does what was found after so many completed steps lie in the last share of them? An evaluation after 80 % of the
    steps does; of training steps, the one that ends there is the last of the share before."""
    first, is_evaluated = (1 - LAST_SHARE) * declared.max_steps, declared.outcome == "eval/accuracy"
    return lambda at: first <= at if is_evaluated else first < at


def _state(run: RunRecord) -> State:
    state = run.state
    if state in ("done", "failed", "interrupted", "dead"):
        return state
    return "running" if state in ("running", "silent", "hung") else "interrupted"


def _rows(run: RunRecord, declared: Declared) -> tuple[list[tuple[int, Mapping[str, Any]]], int]:
    """(completed steps, row) of each evaluation up to the declared steps, of each step where training's rate is compared;
    and how many rows do not say their step."""
    is_evaluated = declared.outcome == "eval/accuracy"
    rows = run.evaluations if is_evaluated else run.steps
    placed = [(at + (not is_evaluated), row) for row in rows if (at := _whole(row.get("step"))) is not None]
    return [(at, row) for at, row in placed if at <= declared.max_steps], len(rows) - len(placed)


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
