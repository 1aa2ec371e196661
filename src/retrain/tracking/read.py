"""Reads a run directory as it stands: finished, running, or broken off in the middle of a line.

Needs neither torch nor numpy nor pydantic, so that a look at fifty runs is quick.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import platform
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

from retrain.errors import ConfigError, UsageError
from retrain.tracking import layout
from retrain.tracking.vitals import is_evaluation

State: TypeAlias = Literal["done", "failed", "interrupted", "running", "silent", "hung", "dead", "unknown"]
"""``dead``: it says it runs and its process is gone. ``silent``: its process is there and has not beaten for a while.
``hung``: it beats, but what it does has not moved for much longer than usual. A slow run is ``running``."""

SILENT_S = 30.0
"""Seconds without a heartbeat, which comes every two, after which a run of this machine counts as silent."""
SILENT_ELSEWHERE_S = 180.0
"""The same for a run of another machine, whose clock differs and whose files arrive late."""
HUNG_S = 120.0
"""Seconds without any progress before a run can count as hung,"""
_HUNG_TIMES = 4.0
"""and so many times the longest that this phase took of late,"""
_HUNG_FIRST_S = 1800.0
"""or this where the phase has not ended before: the default of training.phase_timeout_s."""
_TAIL = 1 << 15
_DEPTH = 4


@dataclass(frozen=True)
class RunRecord:
    """One run directory. Everything is read when it is asked for; a torn last line is left out."""

    path: Path

    @classmethod
    def at(cls, path: str | os.PathLike[str]) -> RunRecord:
        """The run in a directory; UsageError when it holds none."""
        directory = Path(path)
        if not layout.holds_run(directory):
            raise UsageError(f"{directory} holds no run.", fix="name a run directory, such as logs/train.")
        return cls(directory)

    @cached_property
    def facts(self) -> dict[str, Any]:
        """run.json; empty where there is none. While a start loads its model, what its heartbeat says instead of what
        an earlier start has left there."""
        facts = _record(self.path / layout.RUN)
        if not self.is_starting:
            return facts
        now = {key: self._pulse.get(key) for key in ("pid", "host", "started", "max_steps")}
        return {**facts, **now, "status": "running", "heartbeat": self._pulse.get("time")}

    @cached_property
    def _pulse(self) -> dict[str, Any]:
        return _record(self.path / layout.HEARTBEAT)

    @cached_property
    def is_starting(self) -> bool:
        """Does a process load what it needs to begin this run, or to go on with it? ``run.json`` is not its own yet."""
        pulse, host = self._pulse, platform.node()
        said = pulse.get("time")
        if pulse.get("starting") is not True or not isinstance(said, int | float):
            return False
        if pulse.get("host", host) == host:
            return is_locked(self.path / layout.LOCK) is not False
        return time.time() - said < SILENT_ELSEWHERE_S

    @cached_property
    def beat(self) -> dict[str, Any]:
        """The last heartbeat of this start: see ``heartbeat.Pulse.look``; empty where there is none."""
        beat = self._pulse
        # What an earlier start has left says nothing about this one.
        same = all(beat.get(key) == self.facts.get(key) for key in ("pid", "started"))
        return beat if same else {}

    @property
    def is_here(self) -> bool:
        """Does, or did, the run's process belong to this machine?"""
        host = platform.node()
        return self.facts.get("host", host) == host

    @cached_property
    def state(self) -> State:
        """What became of the run, as far as its files and this machine can tell."""
        status = self.facts.get("status")
        if status in ("done", "failed", "interrupted"):
            return cast("State", status)
        if status != "running":
            return "unknown"
        if self.is_here and is_locked(self.path / layout.LOCK) is False:
            return "dead"
        if self.heartbeat_age > (SILENT_S if self.is_here else SILENT_ELSEWHERE_S):
            return "silent"
        return "hung" if self.still_s > self.patience_s else "running"

    @property
    def why_silent(self) -> str:
        """What this machine knows about a silent run's process, in words; "" where it knows nothing."""
        pid = self.facts.get("pid")
        if not self.is_here or not isinstance(pid, int):
            return f"it ran on {self.facts.get('host')}" if not self.is_here else ""
        try:
            stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
        except OSError:
            if Path("/proc/self/stat").exists():
                return f"process {pid} is gone, but another one holds the directory"
            return ""
        # The name in brackets may hold anything, also brackets.
        code = stat.rpartition(")")[2].split()[0]
        if code in "Tt":
            return f"process {pid} is stopped: kill -CONT {pid} lets it go on"
        if code == "D":
            return f"process {pid} waits for a disk or a device"
        return f"process {pid} is there and does not answer"

    @property
    def heartbeat_age(self) -> float:
        """Seconds since the run last said that it lives; infinite when it never has."""
        beats = [
            b for b in (self.beat.get("time"), self.facts.get("heartbeat")) if isinstance(b, int | float)
        ]
        return max(0.0, time.time() - max(beats)) if beats else math.inf

    @property
    def still_s(self) -> float:
        """Seconds for which nothing had moved when the run last beat; 0 where that is unknown."""
        beat = self.beat
        moved, said = beat.get("moved"), beat.get("time")
        if not (isinstance(moved, int | float) and isinstance(said, int | float)):
            return 0.0
        return max(0.0, float(said) - float(moved))

    @property
    def patience_s(self) -> float:
        """Seconds without progress that are still usual for what the run does now."""
        usual = self.beat.get("usual_s")
        if not isinstance(usual, int | float):
            return _HUNG_FIRST_S
        return max(HUNG_S, _HUNG_TIMES * usual)

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """Every line of metrics.jsonl, training steps and evaluations."""
        return list(lines(self.path / layout.METRICS))

    @property
    def steps(self) -> list[dict[str, Any]]:
        """The training steps of metrics.jsonl."""
        return [row for row in self.rows if not is_evaluation(row)]

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """The evaluations of metrics.jsonl; ``step`` counts completed steps there."""
        return [row for row in self.rows if is_evaluation(row)]

    def tail(self, limit: int = _TAIL) -> list[dict[str, Any]]:
        """The lines that lie whole in the last ``limit`` bytes of metrics.jsonl: enough for a status."""
        path = self.path / layout.METRICS
        try:
            with path.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - limit))
                data = file.read()
        except OSError:
            return []
        if size > limit:
            data = data.partition(b"\n")[2]
        return list(_parsed(data.split(b"\n")))

    def task_outcomes(self) -> Iterator[dict[str, Any]]:
        """Lines of emergence/steps.jsonl: per step every task with its outcome, rewards and lengths."""
        return lines(self.path / layout.STEPS)

    def generations(self) -> Iterator[dict[str, Any]]:
        """Lines of emergence/generations.jsonl: rollouts as text with token-level credit."""
        return lines(self.path / layout.GENERATIONS)


def find_runs(root: str | os.PathLike[str]) -> list[RunRecord]:
    """Runs at or below a folder (a run, a campaign, a folder of both), by path; not those inside other runs."""
    found: list[RunRecord] = []

    def look(directory: Path, depth: int) -> None:
        run = RunRecord(directory)
        if layout.holds_run(directory) or run.is_starting:
            found.append(run)
            return
        if depth == 0:
            return
        try:
            inner = sorted(p for p in directory.iterdir() if p.is_dir() and not p.name.startswith("."))
        except OSError as error:
            if error.errno in (errno.EACCES, errno.ENOENT):
                return
            raise
        for child in inner:
            # One folder that may not be read hides no other run.
            with contextlib.suppress(ConfigError, PermissionError):
                look(child, depth - 1)

    look(Path(root), _DEPTH)
    return found


def _record(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return cast("dict[str, Any]", found) if isinstance(found, dict) else {}


def lines(path: Path) -> Iterator[dict[str, Any]]:
    """Records of a JSON-lines file; none where there is no file, and without what a crash left torn."""
    try:
        file = path.open("rb")
    except OSError:
        return
    with file:
        yield from _parsed(file)


def _parsed(raw: Any) -> Iterator[dict[str, Any]]:
    for line in raw:
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, Mapping):
            yield cast("dict[str, Any]", found)


def is_locked(path: Path) -> bool | None:
    """Does a live process hold the run's lock? None where that cannot be seen."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    try:
        with path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                return True
            fcntl.flock(file, fcntl.LOCK_UN)
            return False
    except OSError:
        return None if path.exists() else False
