"""What a report says about one run, read from its directory in one pass over each file and in bounded memory."""

from __future__ import annotations

import math
import os
import re
import time
import tomllib
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np

from retrain.report.thinning import Series
from retrain.tracking import layout
from retrain.tracking.read import RunRecord, State, lines
from retrain.tracking.vitals import VITALS, Alarm, Vital, Watch, is_evaluation

_EVENT = re.compile(
    r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),\d{3} (DEBUG|INFO|WARNING|ERROR|CRITICAL) (.*)", re.DOTALL
)
_RESUMED = re.compile(r"Resuming .* after (\d+) steps from ")
_DISTINCT = 100
"""Different warnings of events.log that are kept."""
_LONGEST = 20_000
"""Characters of one record of events.log that are kept: a traceback, not a flood."""
_KEYS = 500
"""Metrics of one run that are kept: a plug-in may log what it wants, but not without end."""


@dataclass(frozen=True, slots=True)
class VitalLine:
    """One core metric over the whole run: its values of shape (S,), its newest one, median and extremes; None where it
    was never known."""

    vital: Vital
    values_S: Series
    last: float | None
    median: float | None
    low: float | None
    high: float | None
    ill: bool


@dataclass(frozen=True, slots=True)
class Resume:
    """A continuation after ``step`` completed steps. ``exact`` is the run's own words on byte-exactness."""

    step: int
    when: str
    exact: str


@dataclass(slots=True)
class Events:
    """What events.log holds besides progress: when the run began, its resumes, its warnings and its last error."""

    begun: str = ""
    ended: str = ""
    resumes: list[Resume] = field(default_factory=list[Resume])
    warnings: Counter[str] = field(default_factory=Counter[str])
    error: str = ""
    """Message and traceback of the last error."""


@dataclass(frozen=True)
class RunData:
    """One run. ``steps_S`` are its 0-based training steps, ``columns`` its numeric metrics, each of shape (S,)."""

    record: RunRecord
    state: State
    facts: Mapping[str, Any]
    config: Mapping[str, Any]
    origins: Mapping[str, str] | None
    """Where each setting that is no default came from; None for a run that did not record it."""
    condition: str
    uncertainty: str
    steps_S: Series
    columns: Mapping[str, Series]
    evaluations: tuple[Mapping[str, Any], ...]
    alarms: tuple[Alarm, ...]
    vitals: tuple[VitalLine, ...]
    events: Events

    @property
    def done(self) -> int:
        """Completed steps."""
        return int(self.steps_S[-1]) + 1 if len(self.steps_S) else 0

    @property
    def max_steps(self) -> int | None:
        """Steps that the run was asked for, None where nothing says so."""
        asked = self.facts.get("max_steps", self.setting("training.max_steps"))
        return int(asked) if isinstance(asked, int | float) else None

    @property
    def title(self) -> str:
        """The run's directory, as short as it is unambiguous to a reader."""
        path = self.record.path.absolute()
        return f"{path.parent.name}/{path.name}" if path.parent.name else path.name

    @property
    def suites(self) -> list[str]:
        """Prefixes of the evaluations' metrics: ``eval``, and ``eval/<name>`` for a further suite."""
        found = dict.fromkeys(
            key.removesuffix("/accuracy")
            for row in self.evaluations
            for key in row
            if key.endswith("/accuracy")
        )
        return list(found)

    def setting(self, dotted: str) -> Any:
        """The value of a setting, None where config.toml does not hold it."""
        section, _, key = dotted.partition(".")
        table: Any = self.config.get(section)
        return cast("dict[str, Any]", table).get(key) if isinstance(table, dict) else None

    def curve(self, name: str) -> Series | None:
        """A metric of shape (S,), None when the run never reported it."""
        found = self.columns.get(name)
        return None if found is None or bool(np.isnan(found).all()) else found

    def vital_curve(self, name: str) -> Series | None:
        """A core metric of shape (S,), None when the run never said enough to know it."""
        found = next((line for line in self.vitals if line.vital.name == name), None)
        return None if found is None or found.last is None else found.values_S

    def accuracy(self, row: Mapping[str, Any], suite: str = "eval") -> tuple[float, float, float] | None:
        """Accuracy of an evaluation and the ends of its 95 % interval, both NaN where it has none; None where it says
        nothing of its accuracy."""
        found = [row.get(f"{suite}/{key}") for key in ("accuracy", "accuracy_low", "accuracy_high")]
        middle, low, high = (float(v) if isinstance(v, int | float) else math.nan for v in found)
        if math.isnan(middle):
            return None
        return (middle, math.nan, math.nan) if math.isnan(low + high) else (middle, low, high)

    @property
    def seconds(self) -> float:
        """Seconds in steps and evaluations, over all starts; loading and saving come on top."""
        steps = self.curve("step_time_s")
        spent = float(np.nansum(steps)) if steps is not None else 0.0
        return spent + sum(
            float(row["eval/time_s"])
            for row in self.evaluations
            if isinstance(row.get("eval/time_s"), int | float)
        )


def gather(record: RunRecord) -> RunData:
    """Read a run as it stands, also while it is written."""
    columns = _Columns()
    vitals = {vital.name: array("d") for vital in VITALS}
    evaluations: list[Mapping[str, Any]] = []
    raised: list[Alarm] = []
    watch = Watch()
    texts = {"condition": "", "uncertainty_kind": ""}
    for row in lines(record.path / layout.METRICS):
        if not isinstance(row.get("step"), int):
            continue
        evaluated = is_evaluation(row)
        raised += watch.observe(row)
        for vital in VITALS:
            if vital.of_evaluations is evaluated:
                value = vital.value(row)
                vitals[vital.name].append(math.nan if value is None else value)
        if evaluated:
            evaluations.append(row)
            continue
        columns.add(row)
        texts |= {key: str(row[key]) for key in texts if row.get(key)}
    steps, found = columns.finish()
    ill = set(watch.ill)
    config = _config(record.path / layout.CONFIG)
    return RunData(
        record=record,
        state=record.state,
        facts=record.facts,
        config=config,
        origins=_origins(record.facts),
        condition=texts["condition"] or _condition(config),
        uncertainty=texts["uncertainty_kind"],
        steps_S=steps,
        columns=found,
        evaluations=tuple(evaluations),
        alarms=tuple(raised),
        vitals=tuple(_line(vital, vitals[vital.name], vital.name in ill) for vital in VITALS),
        events=read_events(record.path / layout.EVENTS),
    )


def labels(runs: Sequence[RunData]) -> list[str]:
    """A name for each run: its folder's, or the path below the folder that holds them all where names repeat."""
    names = [run.record.path.absolute().name for run in runs]
    if len(set(names)) == len(names):
        return names
    paths = [run.record.path.absolute() for run in runs]
    root = os.path.commonpath(paths)
    return [path.relative_to(root).as_posix() for path in paths]


class _Columns:
    """Numbers of rows, column by column: eight bytes each instead of a dictionary a row."""

    def __init__(self) -> None:
        self._rows = 0
        self._columns: dict[str, array[float]] = {}

    def add(self, row: Mapping[str, Any]) -> None:
        for key, value in row.items():
            if not isinstance(value, int | float) or not math.isfinite(value):
                continue
            column = self._columns.get(key)
            if column is None:
                if len(self._columns) >= _KEYS:
                    continue
                column = self._columns[key] = array("d")
            column.extend([math.nan] * (self._rows - len(column)))
            column.append(float(value))
        self._rows += 1

    def finish(self) -> tuple[Series, dict[str, Series]]:
        for column in self._columns.values():
            column.extend([math.nan] * (self._rows - len(column)))
        made = {key: np.frombuffer(column, dtype=np.float64) for key, column in self._columns.items()}
        return made.pop("step", np.zeros(0)), made


def _line(vital: Vital, values: array[float], ill: bool) -> VitalLine:
    values_S = np.frombuffer(values, dtype=np.float64) if values else np.zeros(0)
    known = values_S[~np.isnan(values_S)]
    if not len(known):
        return VitalLine(vital, values_S, None, None, None, None, ill)
    middle, low, high = float(np.median(known)), float(known.min()), float(known.max())
    return VitalLine(vital, values_S, float(known[-1]), middle, low, high, ill)


def _config(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _condition(config: Mapping[str, Any]) -> str:
    part: Any = config.get("algorithm")
    if not isinstance(part, dict):
        return ""
    settings = cast("dict[str, Any]", part)
    return str(
        settings.get("algorithm_mode")
        or "+".join(str(settings[k]) for k in ("advantage_mode", "transform_mode") if settings.get(k))
    )


def _origins(facts: Mapping[str, Any]) -> dict[str, str] | None:
    found: Any = facts.get("origins")
    if not isinstance(found, dict):
        return None
    return {str(key): str(value) for key, value in cast("dict[Any, Any]", found).items()}


def read_events(path: Path) -> Events:
    """The records of an events.log that a report shows; nothing where there is no such file."""
    events = Events()
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            for when, level, message in _records(file):
                _take(events, when, level, message)
    except OSError:
        return events
    return events


def _take(events: Events, when: str, level: str, message: str) -> None:
    events.begun = events.begun or when
    events.ended = when
    if resumed := _RESUMED.match(message):
        events.resumes.append(Resume(int(resumed[1]), when, ""))
    elif message.startswith("byte-exact: ") and events.resumes:
        last = events.resumes[-1]
        events.resumes[-1] = Resume(last.step, last.when, message.removeprefix("byte-exact: ").rstrip("."))
    elif "\nTraceback (most recent call last)" in message or level in ("ERROR", "CRITICAL"):
        events.error = message
    elif level == "WARNING" and (message in events.warnings or len(events.warnings) < _DISTINCT):
        events.warnings[message] += 1


def _records(file: Iterable[str]) -> Iterable[tuple[str, str, str]]:
    """Records of a log, of which each may go over several lines: time, level, message."""
    current: tuple[str, str, str] | None = None
    for line in file:
        text = line.rstrip("\n")
        if found := _EVENT.fullmatch(text):
            if current:
                yield current
            current = (found[1], found[2], found[3][:_LONGEST])
        elif current and len(current[2]) < _LONGEST:
            current = (current[0], current[1], f"{current[2]}\n{text[:_LONGEST]}")
    if current:
        yield current


def clock(seconds: float) -> str:
    """A duration for people: 42 s, 12 min 5 s, 3 h 7 min."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def moment(epoch: Any) -> str:
    """A time in seconds since the epoch as UTC, "" for anything else."""
    if not isinstance(epoch, int | float) or not 0 < epoch < 1e11:
        return ""
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(epoch))
