"""Reads a run directory as it stands: finished, running, or broken off in the middle of a line.

Needs neither torch nor numpy nor pydantic, so that a look at fifty runs is quick.
"""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

from retrain.errors import UsageError
from retrain.tracking import layout
from retrain.tracking.vitals import is_evaluation

State: TypeAlias = Literal["done", "failed", "interrupted", "running", "silent", "dead", "unknown"]
"""``silent``: its process lives but has not beaten for a while; ``dead``: it says it runs and its process is gone."""

SILENT_S = 60.0
"""Seconds without a heartbeat after which a run counts as silent."""
_TAIL = 1 << 16
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
        """run.json; empty where there is none."""
        try:
            found = json.loads((self.path / layout.RUN).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return cast("dict[str, Any]", found) if isinstance(found, dict) else {}

    @property
    def state(self) -> State:
        """What became of the run, as far as its files and this machine can tell."""
        status = self.facts.get("status")
        if status in ("done", "failed", "interrupted"):
            return cast("State", status)
        if status != "running":
            return "unknown"
        here = self.facts.get("host", os.uname().nodename) == os.uname().nodename
        if here and not _is_locked(self.path / layout.LOCK):
            return "dead"
        return "silent" if self.heartbeat_age > SILENT_S else "running"

    @property
    def heartbeat_age(self) -> float:
        """Seconds since the run last said that it lives; infinite when it never has."""
        beat = self.facts.get("heartbeat")
        return max(0.0, time.time() - beat) if isinstance(beat, int | float) else float("inf")

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
        if layout.holds_run(directory):
            found.append(RunRecord(directory))
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
            look(child, depth - 1)

    look(Path(root), _DEPTH)
    return found


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


def _is_locked(path: Path) -> bool:
    """Does a live process of this machine hold the run's lock? True where that cannot be seen."""
    try:
        import fcntl
    except ImportError:  # Windows
        return True
    try:
        with path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                return True
            fcntl.flock(file, fcntl.LOCK_UN)
            return False
    except OSError:
        return path.exists()
