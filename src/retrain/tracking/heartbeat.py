"""A run's heartbeat: a small file that says every few seconds what the run is doing, also in the middle of a long step.

A thread of its own writes it, so that whoever looks from outside can tell a slow run (it beats, and something moves)
from one that hangs (it beats, and nothing moves) and from one that is gone. A beat that fails is left out: no run ends
because of it, and nothing of it is part of a checkpoint.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, TypeAlias

from retrain.tracking.vitals import Alarm

Phase: TypeAlias = Literal["starting", "sampling", "scoring", "learning", "evaluating", "saving"]

EVERY_S = 2.0
"""Seconds between two beats."""
_USUAL = 20
"""How many durations of a phase count as its usual time."""
_COUNTED = ("sampling", "evaluating")
"""Phases in which the engine's counts of rollouts are the progress."""


class Pulse:
    """What a run is doing, for the file and for a live view in the same process.

    ``memory`` tells of memory besides the process's own, by name in bytes, such as a device's; it is asked at every beat.
    """

    def __init__(self, path: Path, *, memory: Callable[[], Mapping[str, Any]]) -> None:
        self._path = path
        self._memory = memory
        self._engine: object = None
        self._counters: object = None
        self._facts: dict[str, Any] = {}
        self._usual: dict[str, deque[float]] = {}
        self._name: Phase = "starting"
        self._since = self._moved = time.time()
        self._of = 0
        self._before = (0, 0)
        self._drawn_before = 0.0
        self._mark: tuple[Any, ...] = ()
        self._lock = threading.Lock()
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, facts: Mapping[str, Any]) -> None:
        """Begin to beat. ``facts`` are written with every beat: pid, host, start time and total steps."""
        self._facts |= facts
        self._since = self._moved = time.time()
        self.beat()
        self._thread = threading.Thread(target=self._run, name="retrain-heartbeat", daemon=True)
        self._thread.start()

    def follow(self, engine: object, counters: object) -> None:
        """Whose counts to show: ``asked`` and ``finished`` rollouts and ``timings`` of an engine that has them, the
        run's ``step`` and ``tokens``."""
        self._engine, self._counters = engine, counters

    def note(self, **facts: Any) -> None:
        """Further facts for every beat from now on."""
        self._facts |= facts

    @property
    def name(self) -> Phase:
        """The present phase."""
        return self._name

    def phase(self, name: Phase, *, of: int = 0) -> None:
        """A phase begins; ``of`` is the number of rollouts it will ask for, 0 where that is unknown."""
        now = time.time()
        with self._lock:
            if name == self._name:
                return
            self._usual.setdefault(self._name, deque(maxlen=_USUAL)).append(now - self._since)
            self._name, self._since, self._moved, self._of = name, now, now, of
            # What the engine has counted so far belongs to an earlier call.
            self._before, self._drawn_before = self._rollouts(), self._drawn()

    def _rollouts(self) -> tuple[int, int]:
        return getattr(self._engine, "finished", 0), getattr(self._engine, "asked", 0)

    def _drawn(self) -> float:
        timings: object = getattr(self._engine, "timings", None)
        return float(timings.get("decode_tokens", 0)) if isinstance(timings, Mapping) else 0.0  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType]

    def look(self) -> dict[str, Any]:
        """What the run is doing now; times in seconds since 1970, memory in bytes.

        ``done`` of ``asked`` rollouts and ``drawn`` tokens are the phase's, None where they say nothing; ``moved`` is
        when something last changed; ``usual_s`` the longest of the phase's last durations, None for its first.
        """
        with self._lock:
            now = time.time()
            done = asked = drawn = None
            if self._name in _COUNTED and hasattr(self._engine, "asked"):
                counted = self._rollouts()
                done, asked = counted if counted != self._before else (0, self._of)
                drawn = int(max(0.0, self._drawn() - self._drawn_before))
            mark = (self._name, self._since, done, drawn)
            if mark != self._mark:
                self._mark, self._moved = mark, now
            usual = self._usual.get(self._name)
            return {
                **self._facts,
                "time": now,
                "step": getattr(self._counters, "step", self._facts.get("step", 0)),
                "tokens": getattr(self._counters, "tokens", 0),
                "phase": self._name,
                "phase_since": self._since,
                "moved": self._moved,
                "usual_s": max(usual) if usual else None,
                "done": done,
                "asked": asked or None,
                "drawn": drawn,
                "memory": {**resident(), **self._memory()},
            }

    def beat(self) -> None:
        """Write the file once; whatever goes wrong is left for the next time."""
        # Not only OSError: the numbers come from parts that are not ours.
        with suppress(Exception):
            text = json.dumps(self.look(), default=str)
            temporary = self._path.with_name(f".{self._path.name}.tmp")
            with self._lock:
                temporary.write_text(text + "\n", encoding="utf-8")
                temporary.replace(self._path)

    def _run(self) -> None:
        while not self._end.wait(EVERY_S):
            self.beat()

    def stop(self) -> None:
        """Beat once more, and no more; safe to call twice."""
        if self._thread is None or self._end.is_set():
            return
        self._end.set()
        self._thread.join(timeout=EVERY_S)
        self.beat()


def alarm_record(alarm: Alarm) -> dict[str, Any]:
    """An alarm as JSON: the step, the metric's name, what was seen, what to do."""
    return {
        "step": alarm.step,
        "vital": alarm.vital,
        "message": alarm.message,
        "advice": alarm.advice,
    }


def resident() -> dict[str, int]:
    """Memory of this process in bytes: ``resident`` now, and ``peak``; each only where the system says."""
    found: dict[str, int] = {}
    with suppress(OSError, ValueError, IndexError):
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        found["resident"] = pages * os.sysconf("SC_PAGE_SIZE")
    with suppress(ImportError):
        import resource
        import sys

        unit = 1 if sys.platform == "darwin" else 1024
        found["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return found
