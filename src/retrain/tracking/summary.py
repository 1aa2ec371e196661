"""A run in a few numbers, as ``status``, ``top`` and the live view show them: where it stands, how fast it goes, how long
it will take, and what is wrong.

Reads run.json, the heartbeat and the end of metrics.jsonl, never a whole run.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from retrain.tracking import layout
from retrain.tracking.read import RunRecord, State
from retrain.tracking.vitals import VITALS, Alarm, Row, Vital, Watch, alarms, is_evaluation, number

RECENT = 5
"""Steps whose mean is shown."""
_PACE = 20
"""Steps that the time left is told from."""
_BARS = "▁▂▃▄▅▆▇█"
_PLAIN_BARS = "_.-=+*#@"


@dataclass(frozen=True, slots=True)
class Summary:
    """One run. What is unknown is None; shares in [0, 1], times in seconds, ``updated`` in seconds since 1970.

    ``reward``, ``correct`` and ``tokens_per_second`` are means over the last ``RECENT`` steps. ``left_s`` is there while
    the run goes on, ``lasted_s`` is the time in steps and evaluations over all starts (where a run does not record it, from
    its last start to its last sign of life). ``todo`` says what to do.
    """

    path: str
    state: State
    todo: str
    step: int
    total: int | None
    phase: str | None
    done: int | None
    asked: int | None
    phase_s: float | None
    reward: float | None
    correct: float | None
    evaluation: Mapping[str, Any] | None
    tokens_per_second: float | None
    step_s: float | None
    sampling_share: float | None
    scoring_share: float | None
    learning_share: float | None
    tokens: int | None
    memory: Mapping[str, Any]
    left_s: float | None
    lasted_s: float | None
    alarms: int
    alarm: Mapping[str, Any] | None
    updated: float | None

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def summarize(run: RunRecord) -> Summary:
    """The run as it stands now."""
    rows = [row for row in run.tail() if isinstance(row.get("step"), int)]
    steps = [row for row in rows if not is_evaluation(row)]
    beat, facts, state = run.beat, run.facts, run.state
    going = state in ("running", "silent", "hung")
    total = _whole(facts.get("max_steps"))
    step = max(_whole(beat.get("step")) or 0, _whole(facts.get("step")) or 0)
    if not step and steps:
        step = int(steps[-1]["step"]) + 1
    raised = [] if "alarms" in beat else alarms(rows)
    signs = [t for t in (beat.get("time"), facts.get("heartbeat")) if isinstance(t, int | float)]
    updated = max(signs) if signs else None
    started = facts.get("started")
    lasted = max(0.0, updated - started) if updated and isinstance(started, int | float) else None
    spent = facts.get("spent_s")
    since = beat.get("phase_since")
    split = time_split(steps)
    return Summary(
        path=str(run.path),
        state=state,
        todo=_todo(run, state),
        step=step,
        total=total,
        phase=beat.get("phase") if going else None,
        done=beat.get("done") if going else None,
        asked=beat.get("asked") if going else None,
        phase_s=max(0.0, time.time() - since) if going and isinstance(since, int | float) else None,
        reward=recent(steps, "mean_reward"),
        correct=recent(steps, "correct_rate"),
        evaluation=beat.get("evaluation") or _last_evaluation(rows),
        tokens_per_second=recent(steps, "tokens_per_second"),
        step_s=pace(steps),
        sampling_share=split.get("sampling"),
        scoring_share=split.get("scoring"),
        learning_share=split.get("learning"),
        tokens=_whole(beat.get("tokens")),
        memory=beat.get("memory") or {},
        left_s=time_left(rows, total - step) if going and total is not None else None,
        lasted_s=float(spent) if isinstance(spent, int | float) else lasted,
        alarms=(_whole(beat.get("alarms")) or 0) + len(raised),
        alarm=beat.get("alarm") or (asdict(raised[-1]) if raised else None),
        updated=updated,
    )


def _whole(value: object) -> int | None:
    return int(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _todo(run: RunRecord, state: State) -> str:
    """What a reader can do about a run that does not go on by itself."""
    again = _again(run) if state in ("dead", "interrupted", "failed") else ""
    campaign = layout.campaign_of(run.path) if state in ("dead", "interrupted", "failed") else None
    if campaign is not None:
        why = f"{run.path / 'events.log'} says why; " if state == "failed" else ""
        return f"{why}it is part of a campaign, and retrain --resume {campaign} goes on with all of it"
    if state == "dead" and again:
        return f"its process is gone, and no checkpoint is there; {again}"
    if state == "interrupted" and again:
        return f"no checkpoint is there; {again}"
    if state == "failed" and again:
        return f"{run.path / 'events.log'} says why, and no checkpoint is there; fix the cause, then {again}"
    if state == "dead":
        return f"its process is gone; retrain --resume {run.path} goes on from the newest checkpoint"
    if state == "interrupted":
        return f"retrain --resume {run.path} goes on"
    if state == "failed":
        return f"{run.path / 'events.log'} says why; then retrain --resume {run.path}"
    if state == "silent":
        age = duration(run.heartbeat_age) if run.heartbeat_age != float("inf") else "ever"
        why = f" ({run.why_silent})" if run.why_silent else ""
        return f"no heartbeat for {age}{why}"
    if state == "hung":
        pid = run.facts.get("pid")
        return (
            f"{run.beat.get('phase')} has not moved for {duration(run.still_s)}, usual are at most "
            f"{duration(run.patience_s)}; stop process {pid} and resume, or wait for training.phase_timeout_s"
        )
    return ""


def _again(run: RunRecord) -> str:
    """How to start a run anew that cannot be resumed, having no checkpoint; "" for one that has."""
    if _names(run.path / layout.CHECKPOINTS):
        return ""
    # What failed in its first step is replaced without asking.
    nothing = run.facts.get("status") == "failed" and run.facts.get("step") == 0
    return "start it again" if nothing else "start it again with --overwrite"


def recent(steps: Sequence[Row], key: str) -> float | None:
    """Mean over the last steps that know it."""
    known = [value for row in steps[-RECENT:] if (value := number(row, key)) is not None]
    return sum(known) / len(known) if known else None


def pace(steps: Sequence[Row]) -> float | None:
    """Seconds a step takes of late: the mean without the slowest and the fastest tenth."""
    known = sorted(value for row in steps[-_PACE:] if (value := number(row, "step_time_s")) is not None)
    if not known:
        return None
    cut = (len(known) + 5) // 10 if len(known) > 2 else 0
    kept = known[cut : len(known) - cut] or known
    return sum(kept) / len(kept)


def time_left(rows: Sequence[Row], steps_left: int) -> float | None:
    """Seconds that the steps left will take at the present pace, evaluations at their present rate included."""
    steps = [row for row in rows if not is_evaluation(row)]
    each = pace(steps)
    if each is None:
        return None
    # The one before the first step is not part of the rate.
    evaluating = sum(
        number(row, "eval/time_s") or 0.0 for row in rows if is_evaluation(row) and row.get("step")
    )
    return max(0, steps_left) * (each + evaluating / len(steps))


def time_split(steps: Sequence[Row]) -> dict[str, float]:
    """Shares of the last steps' time in sampling, in waiting for rewards and in learning; empty without any."""
    parts = {"sampling": "sample_time_s", "scoring": "score_time_s", "learning": "train_time_s"}
    last = steps[-_PACE:]
    whole = sum(number(row, "step_time_s") or 0.0 for row in last)
    if not whole:
        return {}
    return {name: sum(number(row, key) or 0.0 for row in last) / whole for name, key in parts.items()}


def _last_evaluation(rows: Sequence[Row]) -> dict[str, Any] | None:
    return next((_evaluation(row) for row in reversed(rows) if is_evaluation(row)), None)


def _evaluation(row: Row) -> dict[str, Any]:
    keys = ("accuracy", "accuracy_low", "accuracy_high", "mean_reward", "source")
    return {"step": row.get("step"), **{key: row.get(f"eval/{key}") for key in keys}}


def duration(seconds: float | None) -> str:
    """``8.4 s``, ``3 min 20 s``, ``2 h 05 min`` or ``3 d 04 h``; ``-`` where it is unknown."""
    if seconds is None:
        return "-"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600:02d} h"


def size(count: float) -> str:
    """Bytes for people: ``512 MiB``, ``12.3 GiB``."""
    if count < 1 << 30:
        return f"{count / (1 << 20):.0f} MiB"
    return f"{count / (1 << 30):.1f} GiB"


def memory_text(memory: Mapping[str, Any]) -> str:
    """``memory 1.2 GiB, device 40.1 of 139.8 GiB (peak 97.0)``; "" where nothing is known."""
    parts: list[str] = []
    if isinstance(here := memory.get("resident"), int):
        parts.append(f"memory {size(here)}")
    if isinstance(there := memory.get("device"), int):
        whole = memory.get("device_total")
        of = f" of {size(whole)}" if isinstance(whole, int) else ""
        peak = memory.get("device_peak")
        parts.append(f"device {size(there)}{of}" + (f" (peak {size(peak)})" if isinstance(peak, int) else ""))
    return ", ".join(parts)


def sparkline(values: Sequence[float], width: int, *, plain: bool = False) -> str:
    """The values as one character each, low to high, in at most ``width`` characters: means of neighbours where there are
    more; ``plain`` uses ASCII."""
    if not values or width < 1:
        return ""
    count = min(width, len(values))
    edges = [i * len(values) // count for i in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    bars = _PLAIN_BARS if plain else _BARS
    if high - low <= 1e-12 * max(abs(low), abs(high)):
        return bars[len(bars) // 2 - 1] * count
    return "".join(bars[min(len(bars) - 1, int((m - low) / (high - low) * len(bars)))] for m in means)


@dataclass(frozen=True, slots=True)
class Detail:
    """More about one run, from all of its metrics."""

    vitals: tuple[Reading, ...]
    alarms: tuple[Alarm, ...]
    evaluations: tuple[Mapping[str, Any], ...]
    checkpoints: tuple[str, ...]
    best: str | None
    best_note: str = ""
    """What a reader must know of it."""

    def record(self) -> dict[str, Any]:
        """As JSON, the readings without their curves."""
        return {
            "vitals": [
                {
                    "name": r.vital.name, "title": r.vital.title, "unit": r.vital.unit, "value": r.value,
                    "healthy": r.vital.healthy, "ill": r.ill, "advice": r.vital.advice,
                }
                for r in self.vitals
            ],
            "alarm_list": [asdict(alarm) for alarm in self.alarms],
            "evaluations": list(self.evaluations),
            "checkpoints": list(self.checkpoints),
            "best_checkpoint": self.best,
            "best_note": self.best_note.removeprefix(", ") or None,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Reading:
    """A core metric of a run: its newest value, its curve, and whether it is outside its range now."""

    vital: Vital
    value: float | None
    curve: tuple[float, ...]
    ill: bool


def examine(run: RunRecord) -> Detail:
    """Everything that the status of a single run shows beside its summary."""
    watch, raised = Watch(), list[Alarm]()
    rows = [row for row in run.rows if isinstance(row.get("step"), int)]
    for row in rows:
        raised += watch.observe(row)
    readings: list[Reading] = []
    for vital in VITALS:
        curve = tuple(value for row in rows if (value := vital.read(row)) is not None)
        readings.append(Reading(vital, curve[-1] if curve else None, curve, vital.name in watch.ill))
    evaluations = tuple(_evaluation(row) for row in run.evaluations if isinstance(row.get("step"), int))
    names = _names(run.path / layout.CHECKPOINTS)
    best: str | None = None
    with suppress(OSError, ValueError, KeyError, TypeError):
        state: Any = json.loads((run.path / layout.TRAINER_STATE).read_text(encoding="utf-8"))
        best = str(state["best"]["checkpoint"])
    return Detail(tuple(readings), tuple(raised), evaluations, names, best, _below_start(evaluations, best))


def _below_start(evaluations: Sequence[Mapping[str, Any]], best: str | None) -> str:
    """Whether the model before its first step was better than the best checkpoint, in words."""
    accuracies = {row["step"]: row["accuracy"] for row in evaluations if row.get("accuracy") is not None}
    start, step = accuracies.get(0), layout.checkpoint_step(best or "")
    if start is None or not step or (kept := accuracies.get(step)) is None or kept >= start:
        return ""
    return f", at {kept:.1%} below the {start:.1%} before the first step"


def _names(folder: Path) -> tuple[str, ...]:
    try:
        return tuple(sorted(p.name for p in folder.iterdir() if layout.checkpoint_step(p.name) is not None))
    except OSError:
        return ()
