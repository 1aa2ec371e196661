"""Starts the runs of a campaign, each in a process of its own, on this machine: one after the other, or several at once with
a device each."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

_POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class Job:
    """One run to start: its configuration, its directory, and the file that takes what its process prints."""

    name: str
    config: Path
    directory: Path
    output: Path


@dataclass(frozen=True, slots=True)
class Ended:
    """How a run's process ended. ``code`` is its exit status, negative for a signal; ``cpu_s`` processor seconds and
    ``peak_bytes`` memory of the process and the children it waited for, None where the system does not say."""

    job: Job
    code: int
    seconds: float
    cpu_s: float | None = None
    peak_bytes: int | None = None
    note: str = ""

    @property
    def why(self) -> str:
        """In words, "" for a run that came to its end."""
        if self.note or self.code == 0:
            return self.note
        if self.code == 130:
            return "interrupted, and saved"
        if self.code < 0:
            name = signal.Signals(-self.code).name if -self.code in set(signal.Signals) else f"signal {-self.code}"
            memory = ", as when memory runs out" if -self.code == signal.SIGKILL else ""
            return f"killed by {name}{memory}"
        return last_line(self.job.output) or f"exit status {self.code}"


class Launcher(Protocol):
    """Brings jobs to their end. ``stop`` ends all of them cleanly; one that fails stops no other."""

    def run(
        self,
        jobs: Sequence[Job],
        *,
        stop: threading.Event,
        begun: Callable[[Job], None],
        ended: Callable[[Ended], None],
        tick: Callable[[], None],
    ) -> None:
        """Return when every job has ended, or when ``stop`` was set and every started one has. ``begun`` and ``ended`` are
        called as jobs start and end, ``tick`` several times a second between, all in the calling thread."""
        ...


@dataclass(slots=True)
class _Running:
    job: Job
    process: subprocess.Popen[bytes]
    slot: int
    since: float


_children: list[_Running] = []


def kill_all() -> None:
    """End every run at once; what is left of each is its newest checkpoint. Safe in a signal handler."""
    for running in list(_children):
        with contextlib.suppress(OSError):
            os.killpg(running.process.pid, signal.SIGKILL)


@dataclass(slots=True)
class Processes:
    """At most ``workers`` processes at once. ``devices`` are names for CUDA_VISIBLE_DEVICES, dealt out to the slots in
    turn; none: the environment stays as it is. ``threads`` of each process; ``stagger_s`` between two starts."""

    workers: int
    threads: int
    devices: Sequence[str] = ()
    stagger_s: float = 0.0
    environment: Mapping[str, str] = field(default_factory=dict[str, str])

    def run(
        self,
        jobs: Sequence[Job],
        *,
        stop: threading.Event,
        begun: Callable[[Job], None],
        ended: Callable[[Ended], None],
        tick: Callable[[], None],
    ) -> None:
        """See ``Launcher``."""
        waiting, running = list(jobs), list[_Running]()
        last, let_go = -float("inf"), False
        try:
            while (waiting and not stop.is_set()) or running:
                for done in [r for r in running if _has_ended(r)]:
                    running.remove(done)
                    ended(_reap(done))
                if stop.is_set() and not let_go:
                    let_go = True
                    for each in running:
                        _let_go(each)
                free = sorted(set(range(self.workers)) - {r.slot for r in running})
                if waiting and free and not stop.is_set() and time.monotonic() - last >= self.stagger_s:
                    job, last = waiting.pop(0), time.monotonic()
                    running.append(self._start(job, free[0]))
                    begun(job)
                    continue
                tick()
                time.sleep(_POLL_S)
        finally:
            # A failure of the campaign itself: the runs save and end.
            for each in running:
                _let_go(each)
            for each in running:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    each.process.wait(timeout=600)
                if each in _children:
                    _children.remove(each)

    def _start(self, job: Job, slot: int) -> _Running:
        environment = {**os.environ, **limits(self.threads), **self.environment}
        if self.devices:
            environment["CUDA_VISIBLE_DEVICES"] = self.devices[slot % len(self.devices)]
        job.output.parent.mkdir(parents=True, exist_ok=True)
        with job.output.open("ab") as output:
            # In a session of its own, so that Ctrl-C reaches the campaign alone.
            process = subprocess.Popen(
                command(job), stdin=subprocess.PIPE, stdout=output, stderr=output, env=environment, start_new_session=True
            )
        running = _Running(job, process, slot, time.monotonic())
        _children.append(running)
        return running


def command(job: Job) -> list[str]:
    """What runs a job."""
    return [sys.executable, "-u", "-m", "retrain.campaign.child", str(job.config), str(job.directory)]


def limits(threads: int) -> dict[str, str]:
    """Environment that holds a process to ``threads`` CPU threads."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")
    return {**dict.fromkeys(names, str(threads)), "TOKENIZERS_PARALLELISM": "false"}


def _let_go(running: _Running) -> None:
    """Close the run's lifeline: it finishes its step and saves."""
    if running.process.stdin is not None:
        with contextlib.suppress(OSError):
            running.process.stdin.close()


def _has_ended(running: _Running) -> bool:
    if not hasattr(os, "waitid"):
        return running.process.poll() is not None
    # Seen and left to be reaped with its use of the processor.
    return os.waitid(os.P_PID, running.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _reap(running: _Running) -> Ended:
    _children.remove(running)
    cpu, peak = None, None
    if hasattr(os, "wait4"):
        _, status, usage = os.wait4(running.process.pid, 0)
        running.process.returncode = os.waitstatus_to_exitcode(status)
        cpu = usage.ru_utime + usage.ru_stime
        peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    code = running.process.wait()
    _let_go(running)
    return Ended(running.job, code, time.monotonic() - running.since, cpu, peak)


def last_line(path: Path) -> str:
    """The last line that a process printed, at most 300 characters."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 4096))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return ""
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "")
