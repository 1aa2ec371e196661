"""What a campaign's report says of a run besides its primary outcome: curves on one grid for all runs, means over the last
steps, and what the run recorded of its machine and code. Bounded in time and memory however long a run was.
"""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from retrain.campaign.manifest import LAST_SHARE, Declared
from retrain.campaign.outcomes import RunOutcome
from retrain.report.thinning import Series, window_of
from retrain.tracking import layout
from retrain.tracking.read import RunRecord
from retrain.tracking.vitals import is_evaluation, number

CURVES: Mapping[str, tuple[str, str]] = {
    "correct_rate": ("Correct rate in training", "share"),
    "mean_reward": ("Mean reward in training", ""),
    "mean_length": ("Completion length", "tokens"),
    "max_token_hit_rate": ("Truncated rollouts", "share"),
    "entropy_mean": ("Entropy", "nats per token"),
    "grad_norm": ("Gradient norm", ""),
    "approx_kl": ("KL, sampler to learner", "nats per token"),
    "tokens_per_second": ("Sampling speed", "tokens/s"),
}
"""Metrics of training steps: title, and "share" or the unit."""

ROUNDING: Mapping[str, float] = {"approx_kl": 1e-9}
"""Metrics of which values below this are what is left by rounding in float32, and say nothing of a condition."""
GRID = 80
"""Points of a curve."""
_PARSED = 1000
"""Training steps of a run that are read before its last ones; of a longer run an even sample."""
_EVALUATED = 64
"""Metrics of evaluations that are kept: a plug-in's suites may hold any number."""
_NO_RESULT = ("_low", "_high", "/tasks", "/samples", "/errors", "/time_s", "/pass@1", "/mean@1")


@dataclass(frozen=True, slots=True)
class Reading:
    """One run. ``curves`` maps a metric to its values at the steps of ``grid``, shape (G,), NaN where the run has not been
    yet: means of the last ``window`` steps. ``late`` are means over the last fifth of the run's steps, ``evaluated`` over
    the evaluations that count. ``facts`` are what run.json records. Of the steps that were read: ``most_lambda`` is the
    largest lambda of SEPA, ``gate_shut`` whether its gate never opened, ``has_planning`` whether any token counted as
    planning; None where the run does not record it."""

    curves: Mapping[str, Series]
    late: Mapping[str, float]
    evaluated: Mapping[str, float]
    facts: Mapping[str, str]
    most_lambda: float | None = None
    gate_shut: bool | None = None
    has_planning: bool | None = None


def is_rounding(name: str, values: Iterable[float]) -> bool:
    """Are all ``values`` of a metric, NaN aside, no more than rounding leaves? True of none."""
    limit = ROUNDING.get(name)
    return limit is not None and all(abs(value) < limit for value in values if not math.isnan(value))


def grid(max_steps: int) -> Series:
    """Numbers of completed steps at which every run's curves are read, shape (G,)."""
    return np.unique(np.rint(np.linspace(1, max_steps, min(GRID, max_steps))))


def read(outcome: RunOutcome, declared: Declared) -> Reading:
    """What the run's files say as they stand."""
    path, most = Path(outcome.path), declared.max_steps
    each = max(1, math.ceil(most / _PARSED))
    late_from = (1 - LAST_SHARE) * most
    done = array("d")
    columns = {name: array("d") for name in CURVES}
    evaluations: list[dict[str, Any]] = []
    most_lambda: float | None = None
    gate_shut: bool | None = None
    has_planning: bool | None = None
    for index, row in _rows(path / layout.METRICS, each, int(late_from)):
        if index is None:
            evaluations.append(row)
            continue
        at = number(row, "step")
        done.append(index + 1.0 if at is None else at + 1.0)
        for name, column in columns.items():
            value = row.get(name)
            column.append(value if isinstance(value, int | float) and math.isfinite(value) else math.nan)
        if (strength := number(row, "sepa_lambda")) is not None:
            most_lambda = max(strength, most_lambda or 0.0)
        if "sepa_gate_open" in row:
            gate_shut = gate_shut is not False and not row["sepa_gate_open"]
        if "plan_surprisal_mean" in row:
            has_planning = bool(has_planning) or row["plan_surprisal_mean"] is not None
    steps = np.array(done)
    known = {name: np.array(column) for name, column in columns.items()}
    broke_off = outcome.state == "failed"
    # As for the outcome: nothing beyond the declared steps counts, and of ten steps the last fifth are two.
    until = min(most, steps[-1]) if len(steps) and broke_off else most
    last = (steps > (1 - LAST_SHARE) * until) & (steps <= most)
    facts: Any = RunRecord(path).facts.get("facts")
    return Reading(
        curves={name: on_grid(steps, values, most, hold=broke_off) for name, values in known.items()},
        late={name: mean for name, values in known.items() if not math.isnan(mean := _mean(values[last]))},
        evaluated=_evaluated(evaluations, late_from, most, broke_off=broke_off),
        facts={str(k): str(v) for k, v in cast("dict[Any, Any]", facts).items()} if isinstance(facts, dict) else {},
        most_lambda=most_lambda,
        gate_shut=gate_shut,
        has_planning=has_planning,
    )


def on_grid(steps: Series, values: Series, max_steps: int, *, hold: bool) -> Series:
    """Trailing means of ``values`` after ``steps`` completed steps, at the grid's, shape (G,). Beyond the last step they
    are NaN, or with ``hold`` what the last one was: a run that broke off stays in the mean of its condition."""
    at, window = grid(max_steps), window_of(max_steps)
    known = ~np.isnan(values)
    if not known.any():
        return np.full(len(at), np.nan)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    reach = np.minimum(at, steps[-1]) if hold else at
    first = np.searchsorted(steps, reach - window, side="right")
    after = np.searchsorted(steps, reach, side="right")
    count = counts[after] - counts[first]
    means = (sums[after] - sums[first]) / np.maximum(count, 1)
    return np.where((count > 0) & ((at <= steps[-1]) | hold), means, np.nan)


def _rows(path: Path, each: int, late_from: int) -> Iterable[tuple[int | None, dict[str, Any]]]:
    """Training steps with their place in the file, every ``each``-th before ``late_from``; evaluations with None."""
    try:
        file = path.open("rb")
    except OSError:
        return
    index = -1
    with file:
        for line in file:
            # Rows that no curve needs are not parsed: that is where the time goes.
            if b'"batch_size"' in line:
                index += 1
                if index % each and index + 1 < late_from:
                    continue
            try:
                row: Any = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                found = cast("dict[str, Any]", row)
                yield (None if is_evaluation(found) else index), found


def _evaluated(rows: list[dict[str, Any]], late_from: float, most: int, *, broke_off: bool) -> dict[str, float]:
    """Means of what evaluations say, over those that count for the primary outcome."""
    rows = [row for row in rows if (at := number(row, "step")) is not None and at <= most]
    counted = [row for row in rows if (number(row, "step") or 0) >= late_from]
    if broke_off:
        counted = rows[-1:]
    names = dict.fromkeys(
        key for row in counted for key in row if key.startswith("eval/") and not key.endswith(_NO_RESULT)
    )
    found: dict[str, float] = {}
    for name in list(names)[:_EVALUATED]:
        values = [value for row in counted if (value := number(row, name)) is not None]
        if values:
            found[name] = math.fsum(values) / len(values)
    return found


def _mean(values: Series) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else math.nan
