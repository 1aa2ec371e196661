"""Whether a run's files hold what a run writes, so that a damaged one is named in a line before anything is computed from it."""

from __future__ import annotations

from collections.abc import Mapping

from retrain.errors import UsageError
from retrain.tracking import layout
from retrain.tracking.keys import STEP_KEYS
from retrain.tracking.read import RunRecord

_TEXTS = ("condition", "advantage_mode", "transform_mode", "uncertainty_kind", "gradient_hash")
_NUMBERS = frozenset(key for key, _, _ in STEP_KEYS) - {*_TEXTS}
_ENDINGS = ("/accuracy", "/accuracy_low", "/accuracy_high", "/tasks", "/time_s")
"""Of an evaluation's keys those that are numbers whatever the suite is called."""


def intact(run: RunRecord) -> RunRecord:
    """The run itself; UsageError where run.json or a row of metrics.jsonl holds something that no run writes."""
    facts: object = run.facts.get("facts")
    if facts is not None and not isinstance(facts, Mapping):
        raise UsageError(
            f"{run.path / layout.RUN} is damaged: its facts are {facts!r}.", fix="restore it from a copy."
        )
    for row in run.rows:
        step = row.get("step")
        wrong = {"step": step} if type(step) is not int else {}
        wrong |= {
            key: value
            for key, value in row.items()
            if (key in _NUMBERS or key.endswith(_ENDINGS)) and not isinstance(value, int | float | None)
        }
        for key, value in wrong.items():
            raise UsageError(
                f"{run.path / layout.METRICS} is damaged: a row has {key} = {value!r}.",
                fix="restore it from a copy, or remove that row.",
            )
    return run
