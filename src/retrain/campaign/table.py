"""What shows a campaign while it runs: a table that stays below the lines on a terminal, and lines alone elsewhere.

The table reads the heartbeats of the runs that go on, once in a while and of no other run, in the thread that draws it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from retrain.campaign.launchers import Ended, Job
from retrain.campaign.plan import PlannedRun
from retrain.live import LiveView
from retrain.sinks import console, shows_views
from retrain.tracking.read import RunRecord
from retrain.tracking.summary import Summary, duration, summarize
from retrain.tracking.vitals import is_evaluation, number

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

log = logging.getLogger("retrain")

_EVERY_S = 1.5
_CELL = 7
"""Characters of a run in the grid: ``41.2%``, or the step it is at."""
_LABEL = 26
_FAILURES = 3
_INTERRUPTED = 130
"""Exit status of a run that saved and left because it was asked to."""
_FEWEST = 30
"""A narrower terminal is treated as one of this width."""


class View(Protocol):
    """What shows a campaign's progress; told in the thread of the campaign."""

    def begun(self, job: Job) -> None:
        """A run's process has started."""
        ...

    def ended(self, ended: Ended) -> None:
        """A run's process has ended."""
        ...

    def tick(self) -> None:
        """Some time has passed."""
        ...

    def close(self) -> None:
        """Leave the terminal as it was; safe to call twice."""
        ...


def view(root: Path, runs: Sequence[PlannedRun], done: Sequence[str], *, plain: bool) -> View:
    """What shows ``runs``, whose directories are below ``root`` and of which those in ``done`` need nothing more."""
    screen = console()
    if plain or not shows_views(screen):
        return Lines(len(runs), len(done))
    table = Table(screen, root, runs, done)
    table.start()
    return table


class Lines:
    """A line for each run that starts, and one for each that ends."""

    def __init__(self, total: int, finished: int, *, level: int = logging.INFO) -> None:
        self._total, self._done, self._level = total, finished, level
        self._stopped: list[str] = []

    def begun(self, job: Job) -> None:
        """See ``View``."""
        log.log(self._level, "Started %s.", job.name)

    def ended(self, ended: Ended) -> None:
        """See ``View``."""
        self._done += ended.code == 0
        where = f" on {ended.host}" if ended.host else ""
        if ended.code == _INTERRUPTED:
            self._stopped.append(ended.job.name)
            log.debug("%s was interrupted (its output: %s).", ended.job.name, ended.job.output)
            return
        if ended.code:
            output = f" (its output: {ended.job.output})" if ended.job.output.exists() else ""
            log.warning("%s did not finish: %s%s.", ended.job.name, ended.why.rstrip("."), output)
            return
        value = outcome_now(RunRecord(ended.job.directory))
        said = f" {value:.1%}" if value is not None else ""
        log.info(
            "[%d/%d] %s:%s in %s%s.", self._done, self._total, ended.job.name, said, duration(ended.seconds), where
        )

    def tick(self) -> None:
        """See ``View``."""

    def close(self) -> None:
        """Say once what was stopped because it was asked for."""
        if self._stopped:
            log.info("Interrupted, and saved: %s.", ", ".join(self._stopped))
        self._stopped = []


def outcome_now(run: RunRecord) -> float | None:
    """Accuracy of the run's last evaluation, else the correct rate of its last step; None without either."""
    rows = run.tail()
    last = [row for row in rows if is_evaluation(row)][-1:] + rows[-1:]
    known = (number(row, key) for row in last for key in ("eval/accuracy", "correct_rate"))
    return next((value for value in known if value is not None), None)


@dataclass(slots=True)
class _Shown:
    """One run of the table."""

    name: str
    condition: str
    seed: int
    steps: int
    state: Literal["waiting", "running", "done", "failed", "stopped"] = "waiting"
    value: float | None = None
    seconds: float | None = None
    summary: Summary | None = None

    @property
    def share(self) -> float:
        """How much of it is behind it."""
        if self.state in ("done", "failed"):
            return 1.0
        return min(1.0, self.summary.step / self.steps) if self.summary and self.steps else 0.0


@dataclass(slots=True)
class _Known:
    """What the thread of the campaign writes and the one that draws reads."""

    runs: dict[str, _Shown]
    failures: list[str] = field(default_factory=list[str])
    at_once: int = 1


class Table(LiveView):
    """Conditions by seeds, the runs that go on, total progress, and the last failures; as tall as the terminal at most."""

    every_s = _EVERY_S

    def __init__(self, console: Console, root: Path, runs: Sequence[PlannedRun], done: Sequence[str]) -> None:
        super().__init__(console, total_steps=0)
        self._root = root
        self._lines = Lines(len(runs), len(done), level=logging.DEBUG)
        self._known = _Known(
            {run.name: _Shown(run.name, run.condition, run.seed, run.config.training.max_steps) for run in runs}
        )
        self._conditions = list(dict.fromkeys(run.condition for run in runs))
        self._seeds = list(dict.fromkeys(run.seed for run in runs))
        for name in done:
            record = RunRecord(root / name)
            shown = self._known.runs[name]
            shown.state, shown.value, shown.seconds = "done", outcome_now(record), number(record.facts, "spent_s")

    def begun(self, job: Job) -> None:
        """See ``View``."""
        self._known.runs[job.name].state = "running"
        self._known.at_once = max(self._known.at_once, len(self._in("running")))
        self._lines.begun(job)

    def ended(self, ended: Ended) -> None:
        """See ``View``."""
        shown = self._known.runs[ended.job.name]
        record = RunRecord(ended.job.directory)
        shown.value, shown.summary = outcome_now(record), None
        shown.seconds = number(record.facts, "spent_s") or ended.seconds
        shown.state = "done" if ended.code == 0 else "stopped" if ended.code == _INTERRUPTED else "failed"
        if shown.state == "failed":
            self._known.failures.append(f"{shown.name}: {ended.why}")
        self._lines.ended(ended)

    def tick(self) -> None:
        """See ``View``."""

    def close(self) -> None:
        """See ``View``."""
        self.stop()
        self._lines.close()

    def _in(self, state: str) -> list[_Shown]:
        return [run for run in list(self._known.runs.values()) if run.state == state]

    def _frame(self) -> Text:
        for run in self._in("running"):
            run.summary = summarize(RunRecord(self._root / run.name))
        return super()._frame()

    def lines(self, width: int) -> list[str]:
        """The table, cut to ``width`` and to the terminal's height."""
        width, height = max(_FEWEST, width), max(4, self._console.height - 1)
        grid = self._grid(width)
        failures = [f"failed: {text}" for text in self._known.failures[-_FAILURES:]]
        going = self._in("running")
        room = height - 1 - len(grid) - len(failures)
        if room < min(2, len(going)) and len(failures) > 1:
            room, failures = room + len(failures) - 1, failures[-1:]
        if room < min(2, len(going)):
            grid, room = grid[: max(0, len(grid) - (min(2, len(going)) - room))], min(2, len(going))
        legend = self._legend(grid)
        if legend and room > len(going):
            grid.append(legend)
        found = [self._head(width), *grid, *self._running(going, room), *failures]
        return [line[:width] for line in found[:height]]

    def _head(self, width: int) -> str:
        runs = list(self._known.runs.values())
        count = {state: len(self._in(state)) for state in ("done", "running", "failed", "stopped", "waiting")}
        share = sum(run.share for run in runs) / max(1, len(runs))
        parts = [f"{count['done']}/{len(runs)} runs done"]
        parts += [f"{count[state]} {state}" for state in ("running", "waiting", "failed", "stopped") if count[state]]
        left = self._left(runs)
        tail = f" {share:.0%}" + (f", {duration(left)} left" if left is not None else "")
        head = ", ".join(parts) + "  "
        room = width - len(head) - len(tail)
        if room < 5:
            return head.rstrip() + tail
        full, empty = ("#", ".") if self._plain else ("━", "╌")
        size = min(30, room)
        return head + full * round(share * size) + empty * (size - round(share * size)) + tail

    def _left(self, runs: Sequence[_Shown]) -> float | None:
        """Seconds until the last run ends, as long as runs take what they took; None while none has said."""
        took = [run.seconds for run in runs if run.state == "done" and run.seconds]
        going = [run.summary for run in runs if run.state == "running" and run.summary]
        paces = [s.step_s * s.total for s in going if s.step_s and s.total]
        known: list[float] = took or paces
        if not known:
            return None
        each = sum(known) / len(known)
        left = [s.left_s if s.left_s is not None else each for s in going]
        left += [each] * sum(run.state == "waiting" or (run.state == "running" and not run.summary) for run in runs)
        return max([sum(left) / self._known.at_once, *left], default=0.0)

    def _grid(self, width: int) -> list[str]:
        longest = max(map(len, self._conditions), default=0)
        first = min(longest, _LABEL, max(10, width // 3)) + 1
        if first + _CELL * len(self._seeds) > width:
            return self._by_condition(first)
        by_place = {(run.condition, run.seed): run for run in self._known.runs.values()}
        found = ["seed".ljust(first) + "".join(str(seed)[-_CELL + 1 :].rjust(_CELL) for seed in self._seeds)]
        for condition in self._conditions:
            cells = [self._cell(by_place.get((condition, seed))).rjust(_CELL) for seed in self._seeds]
            found.append(_cut(condition, first - 1).ljust(first) + "".join(cells))
        return found

    def _cell(self, run: _Shown | None) -> str:
        if run is None:
            return ""
        if run.state == "done":
            return f"{run.value:.1%}" if run.value is not None else "done"
        if run.state == "running":
            return f">{run.summary.step}" if run.summary else ">"
        return {"failed": "failed", "stopped": "saved"}.get(run.state, "." if self._plain else "·")

    def _legend(self, grid: Sequence[str]) -> str:
        """What the signs in the cells mean, those that occur; "" where the grid counts instead."""
        if not grid or not grid[0].startswith("seed"):
            return ""
        now, waits = self._in("running"), "." if self._plain else "·"
        told = [f"{self._cell(now[0])} running, at that step"] if now and now[0].summary else ["> running"] if now else []
        told += [f"{waits} waiting"] if self._in("waiting") else []
        told += ["saved: stopped, goes on with --resume"] if self._in("stopped") else []
        told += ["% outcome"] if any(run.value is not None for run in self._in("done")) else []
        return f"({'; '.join(told)})" if told else ""

    def _by_condition(self, first: int) -> list[str]:
        found = ["".ljust(first) + "  done  now  failed    mean"]
        for condition in self._conditions:
            runs = [run for run in self._known.runs.values() if run.condition == condition]
            states: Mapping[str, int] = {s: sum(r.state == s for r in runs) for s in ("done", "running", "failed")}
            values = [run.value for run in runs if run.state == "done" and run.value is not None]
            mean = f"{sum(values) / len(values):.1%}" if values else "-"
            done = f"{states['done']}/{len(runs)}"
            found.append(
                _cut(condition, first - 1).ljust(first)
                + f"{done:>6}{states['running']:>5}{states['failed']:>8}{mean:>8}"
            )
        return found

    def _running(self, going: Sequence[_Shown], room: int) -> list[str]:
        if len(going) > room:
            shown = going[: max(0, room - 1)]
            return [_going(run) for run in shown] + [f"and {len(going) - len(shown)} more running"] * (room > 0)
        return [_going(run) for run in going]


def _going(run: _Shown) -> str:
    """A run that goes on: where it stands, how well it does, what it does now, and for how long."""
    summary = run.summary
    if summary is None or summary.total is None:
        return f"{run.name}  starting"
    parts = [f"{run.name}  {summary.step}/{summary.total}"]
    if summary.evaluation and (accuracy := number(summary.evaluation, "accuracy")) is not None:
        parts.append(f"held-out {accuracy:.1%}")
    elif summary.reward is not None:
        parts.append(f"reward {summary.reward:.3f}")
    if summary.state in ("silent", "hung", "dead"):
        parts.append(summary.state)
    elif summary.phase:
        parts.append(summary.phase)
    if summary.left_s is not None:
        parts.append(f"{duration(summary.left_s)} left")
    return "  ".join(parts)


def _cut(text: str, width: int) -> str:
    """The text in at most ``width`` characters; labels differ at their ends."""
    return text if len(text) <= width else f"{text[: width // 2]}~{text[len(text) - (width - width // 2 - 1) :]}"


