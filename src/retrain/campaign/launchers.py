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
    ``peak_bytes`` memory of the process and the children it waited for, None where the system does not say; ``host`` the
    machine that it ran on, "" for this one."""

    job: Job
    code: int
    seconds: float
    cpu_s: float | None = None
    peak_bytes: int | None = None
    note: str = ""
    host: str = ""

    @property
    def why(self) -> str:
        """In words, "" for a run that came to its end."""
        if self.note or self.code == 0:
            return self.note
        if self.code == 130:
            return "interrupted, and saved"
        said = last_line(self.job.output)
        if self.code < 0:
            name = signal.Signals(-self.code).name if -self.code in set(signal.Signals) else f"signal {-self.code}"
            memory = ", as when memory runs out" if -self.code == signal.SIGKILL else ""
            return f"killed by {name}{memory}" + (f"; the last it said: {said}" if said else "")
        return said or f"exit status {self.code}"


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
besides: list[subprocess.Popen[bytes]] = []
"""Processes of the campaign that are no runs, each the first of a session of its own."""


def kill_all() -> None:
    """End every run and what goes on beside them at once; what is left of a run is its newest checkpoint. Safe in a signal
    handler."""
    for process in (*(running.process for running in _children), *besides):
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)


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
        last, stopping = -float("inf"), False
        try:
            while (waiting and not stop.is_set()) or running:
                for done in [r for r in running if has_ended(r.process)]:
                    running.remove(done)
                    ended(_reaped(done))
                if stop.is_set() and not stopping:
                    stopping = True
                    for each in running:
                        let_go(each.process)
                free = sorted(set(range(self.workers)) - {r.slot for r in running})
                if waiting and free and not stop.is_set() and time.monotonic() - last >= self.stagger_s:
                    job, last = waiting.pop(0), time.monotonic()
                    try:
                        running.append(self._start(job, free[0]))
                    except OSError as error:
                        ended(Ended(job, 1, 0.0, note=f"could not be started: {error}"))
                    else:
                        begun(job)
                    continue
                tick()
                time.sleep(_POLL_S)
        finally:
            # A failure of the campaign itself: the runs save and end.
            for each in running:
                let_go(each.process)
            for each in running:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    each.process.wait(timeout=600)
                if each in _children:
                    _children.remove(each)

    def _start(self, job: Job, slot: int) -> _Running:
        environment = {**os.environ, **limits(self.threads), **self.environment}
        if self.devices:
            environment["CUDA_VISIBLE_DEVICES"] = self.devices[slot % len(self.devices)]
        running = _Running(job, start(job, environment), slot, time.monotonic())
        _children.append(running)
        return running


def start(job: Job, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Begin the process of a job; its standard input is its lifeline."""
    job.output.parent.mkdir(parents=True, exist_ok=True)
    with job.output.open("ab") as output:
        # In a session of its own, so that Ctrl-C reaches the campaign alone.
        return subprocess.Popen(
            command(job), stdin=subprocess.PIPE, stdout=output, stderr=output, env=environment, start_new_session=True
        )


def command(job: Job) -> list[str]:
    """What runs a job."""
    return [sys.executable, "-P", "-u", "-m", "retrain.campaign.child", str(job.config), str(job.directory)]


def limits(threads: int) -> dict[str, str]:
    """Environment that holds a process to ``threads`` CPU threads."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")
    return {**dict.fromkeys(names, str(threads)), "TOKENIZERS_PARALLELISM": "false"}


def let_go(process: subprocess.Popen[bytes]) -> None:
    """Close the process's lifeline: its run finishes its step and saves."""
    if process.stdin is not None:
        with contextlib.suppress(OSError):
            process.stdin.close()


def has_ended(process: subprocess.Popen[bytes]) -> bool:
    """Has it, without reaping it where the system can tell?"""
    if not hasattr(os, "waitid"):
        return process.poll() is not None
    # Seen and left to be reaped with its use of the processor.
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def reap(process: subprocess.Popen[bytes]) -> tuple[int, float | None, int | None]:
    """(exit status, CPU seconds, peak bytes of memory) of a process that has ended."""
    cpu, peak = None, None
    if hasattr(os, "wait4"):
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        cpu = usage.ru_utime + usage.ru_stime
        peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    code = process.wait()
    let_go(process)
    return code, cpu, peak


def _reaped(running: _Running) -> Ended:
    _children.remove(running)
    code, cpu, peak = reap(running.process)
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
