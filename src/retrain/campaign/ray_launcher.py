"""Starts the runs of a campaign as Ray tasks, on a running cluster or on one of its own that ends with the campaign.

A task asks for its run's devices, starts the same child process as on one machine, holds its lifeline and waits for it. So
a run is what it is without Ray, and wherever its task goes, it goes on from its newest checkpoint.
"""

from __future__ import annotations

import contextlib
import os
import platform
import secrets
import shutil
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path
from typing import Any

from retrain.campaign import ray_cluster
from retrain.campaign.launchers import Ended, Job, has_ended, let_go, limits, reap, start
from retrain.campaign.ray_cluster import line
from retrain.errors import ConfigError
from retrain.tracking.summary import duration

log = getLogger("retrain")

STARTS = 3
"""How often a run is started whose node or worker is lost."""
_KILLED = -9
"""Exit status of a run whose node or worker is lost: it did not end by itself."""
_POLL_S = 0.2
_LOOK_S = 5.0
"""Seconds between two looks at what the cluster offers."""
_PATIENCE_S = 300.0
"""Seconds to wait for a node that could take a run: a cluster that grows by itself needs a while."""
_QUEUED_S = 30.0
"""Seconds after which it is said that no run has begun because others use the cluster."""
_WORD = ".word"
"""In the marker's folder: what only this campaign wrote."""
_ITS_OWN = ("RAY_", "CUDA_", "NVIDIA_", "SLURM_", "LD_")
"""Variables of one machine, which mean nothing on another."""


@dataclass(frozen=True, slots=True)
class _Told:
    """What a task says at its end; ``code`` is None where its node does not see the campaign's directory."""

    host: str
    code: int | None
    seconds: float = 0.0
    cpu_s: float | None = None
    peak_bytes: int | None = None


@dataclass(slots=True)
class _Task:
    """A run that was handed to Ray; ``since`` it was, or since it began on ``host``, "" while it is queued."""

    job: Job
    since: float
    starts: int
    host: str = ""

    @property
    def sign(self) -> str:
        """Name of the file by which its node says that it began."""
        return f"{self.job.name}.{self.starts}"


@dataclass(slots=True)
class RayTasks:
    """At most ``workers`` tasks at once (0: as many as fit), each with ``threads`` CPUs and ``gpus`` GPUs. ``directory`` is
    the campaign's, which every node must see. ``address`` of a running cluster; empty: RAY_ADDRESS, else a cluster of this
    machine alone. ``patience_s`` as a cluster may need to grow."""

    directory: Path
    threads: int
    gpus: int = 0
    workers: int = 0
    address: str = ""
    stagger_s: float = 0.0
    patience_s: float = _PATIENCE_S
    queued_s: float = _QUEUED_S

    def run(
        self,
        jobs: Sequence[Job],
        *,
        stop: threading.Event,
        begun: Callable[[Job], None],
        ended: Callable[[Ended], None],
        tick: Callable[[], None],
    ) -> None:
        """See ``Launcher``; ``begun`` as the node of a run says that it has. ConfigError where Ray is missing, no cluster
        answers, or a node does not see the directory."""
        with contextlib.ExitStack() as stack:
            try:
                ray, own = stack.enter_context(ray_cluster.cluster(self.address, self.threads, self.gpus))
            except ConfigError as error:
                raise ConfigError(
                    error.message, fix=f"{error.fix} Then go on with: retrain --resume {self.directory}"
                ) from error
            marker = stack.enter_context(_marker(self.directory))
            tasks = _Tasks(self, ray, marker, begun, ended, patience_s=0.0 if own else self.patience_s)
            tasks.waiting.extend((job, 1) for job in jobs)
            try:
                while (tasks.waiting and not stop.is_set()) or tasks.running:
                    tasks.collect()
                    if stop.is_set():
                        tasks.cancel()
                    else:
                        tasks.submit()
                    tick()
                    time.sleep(_POLL_S)
            finally:
                # A failure of the campaign itself: the runs save and end.
                tasks.cancel()
                while tasks.running:
                    tasks.collect(quietly=True)
                    time.sleep(_POLL_S)


class _Tasks:
    """The tasks of one campaign on one cluster."""

    def __init__(
        self, what: RayTasks, ray: Any, marker: tuple[str, str], begun: Callable[[Job], None],
        ended: Callable[[Ended], None], *, patience_s: float,
    ) -> None:  # fmt: skip
        self._what, self._ray, self._begun, self._ended = what, ray, begun, ended
        self.waiting: deque[tuple[Job, int]] = deque()
        self.running: dict[Any, _Task] = {}
        self._patience_s = patience_s
        self._remote = ray.remote(attend).options(
            num_cpus=what.threads, num_gpus=what.gpus, max_retries=0, scheduling_strategy="SPREAD"
        )
        mine = {key: value for key, value in os.environ.items() if not key.startswith(_ITS_OWN)}
        self._same = (marker, what.threads, mine, str(Path.cwd()))
        self._room, self._looked, self._fitted = 0, -float("inf"), time.monotonic()
        self._last = -float("inf")
        self._is_short = self._is_queued = False
        self._cancelled: set[Any] = set()

    def submit(self) -> None:
        """Hand on as many runs as there is room for; a run that no node can take has ended."""
        now = time.monotonic()
        if now - self._looked >= _LOOK_S:
            self._room, self._looked = self._fitting(), now
        if self._room:
            self._fitted, self._is_short = now, False
        elif now - self._fitted >= self._patience_s:
            self._give_up()
        elif not self._is_short:
            self._is_short = True
            log.warning(
                "No node of the Ray cluster has %s: waiting up to %s for it to grow.", self._asks, duration(self._patience_s)
            )
        self._say_queued(now)
        most = min(self._room, self._what.workers or self._room)
        while self.waiting and len(self.running) < most and time.monotonic() - self._last >= self._what.stagger_s:
            job, starts = self.waiting.popleft()
            self._last = time.monotonic()
            task = _Task(job, self._last, starts)
            self.running[self._remote.remote(job, task.sign, *self._same)] = task

    @property
    def _asks(self) -> str:
        """What a run asks of its node, in words."""
        asked = {"CPU": self._what.threads, "GPU": self._what.gpus}
        return " and ".join(f"{n} {name}{'s' * (n > 1)}" for name, n in asked.items() if n)

    def _say_queued(self, now: float) -> None:
        """Say once that nothing goes on because others use the cluster."""
        queued = [task for task in self.running.values() if not task.host]
        if len(queued) < len(self.running) or not queued:
            self._is_queued = False
        elif not self._is_queued and self._room and now - min(task.since for task in queued) >= self._what.queued_s:
            self._is_queued = True
            log.info(
                "No run has begun: %d wait%s in Ray's queue until a node has %s free.",
                len(queued), "s" * (len(queued) == 1), self._asks,
            )  # fmt: skip

    def _see_begun(self) -> None:
        """Take in which runs have begun since the last look."""
        queued = {task.sign: task for task in self.running.values() if not task.host}
        if not queued:
            return
        folder = Path(self._same[0][0])
        with contextlib.suppress(OSError):
            there = set(os.listdir(folder))
            for name, task in queued.items():
                # Of a file that is not yet written the next look reads more.
                if name in there and (host := (folder / name).read_text(encoding="utf-8")):
                    self._has_begun(task, host)

    def _has_begun(self, task: _Task, host: str) -> None:
        task.since, task.host = time.monotonic(), host
        self._begun(task.job)

    def _fitting(self) -> int:
        """How many runs the living nodes could take at once."""
        room = 0
        for node in self._ray.nodes():
            has: dict[str, float] = node["Resources"] if node["Alive"] else {}
            here = has.get("CPU", 0.0) // self._what.threads
            room += int(min(here, has.get("GPU", 0.0) // self._what.gpus) if self._what.gpus else here)
        return room

    def _give_up(self) -> None:
        """No node can take any run: what waits, here or at Ray, ends."""
        note = (
            f"no node of the Ray cluster has {self._asks}: add one that has, or use --launcher processes, and go on with --resume"
        )
        for ref, task in list(self.running.items()):
            with contextlib.suppress(Exception):
                self._ray.cancel(ref, force=True)
            del self.running[ref]
            self._ended(Ended(task.job, 1, 0.0, note=note))
        while self.waiting:
            self._ended(Ended(self.waiting.popleft()[0], 1, 0.0, note=note))

    def collect(self, *, quietly: bool = False) -> None:
        """Take in the tasks that have ended; ``quietly``: and say nothing of them."""
        if not self.running:
            return
        self._see_begun()
        done, _ = self._ray.wait(list(self.running), num_returns=len(self.running), timeout=0, fetch_local=True)
        for ref in done:
            task = self.running.pop(ref)
            end = self._end(ref, task)
            if end is not None and not quietly:
                self._ended(end)

    def _end(self, ref: Any, task: _Task) -> Ended | None:
        """How a task ended; None where its run has not begun: then it still waits, or is not wanted any more."""
        errors, lasted = self._ray.exceptions, time.monotonic() - task.since
        try:
            told: _Told = self._ray.get(ref)
        except errors.TaskCancelledError:
            return Ended(task.job, 130, lasted, host=task.host) if task.host else None
        except errors.RayTaskError as error:
            # What the task's own code raised, such as a node without this package.
            return Ended(task.job, 1, lasted, note=f"its task failed: {line(error.cause or error)}", host=task.host)
        except errors.RayError as error:
            return self._lost(ref, task, error, lasted)
        if told.code is None:
            raise ConfigError(
                f"node {told.host} of the Ray cluster does not see {self._what.directory}.",
                fix="give a --log-dir on a file system that all nodes share.",
            )
        if not task.host:
            self._has_begun(task, told.host)
        return Ended(task.job, told.code, told.seconds, told.cpu_s, told.peak_bytes, host=told.host)

    def _lost(self, ref: Any, task: _Task, error: Exception, lasted: float) -> Ended | None:
        """What becomes of a run whose node or worker is gone: it starts again, unless it did so often or is to stop. What
        it used besides time is not known."""
        if ref in self._cancelled:
            return Ended(task.job, 130, lasted, host=task.host) if task.host else None
        if task.starts >= STARTS:
            note = f"its node or worker was lost {STARTS} times: {line(error)}"
            return Ended(task.job, _KILLED, lasted, note=note, host=task.host)
        self._looked = -float("inf")
        self.waiting.appendleft((task.job, task.starts + 1))
        note = (
            f"its node or worker was lost ({line(error)}): it goes on elsewhere from its newest checkpoint, start "
            f"{task.starts + 1} of at most {STARTS}"
        )
        if not task.host:
            log.warning("%s: %s.", task.job.name, note)
            return None
        return Ended(task.job, _KILLED, lasted, note=note, host=task.host)

    def cancel(self) -> None:
        """Ask every run to finish its step and save; those not begun stay so."""
        for ref in [ref for ref in self.running if ref not in self._cancelled]:
            self._cancelled.add(ref)
            with contextlib.suppress(Exception):
                self._ray.cancel(ref, force=False)


def attend(
    job: Job, sign: str, marker: tuple[str, str], threads: int, settings: Mapping[str, str], folder: str
) -> _Told:
    """The task, on its node: run the job's process and say how it ended. Ray's cancel, which comes as SIGINT, and the end
    of the worker close the process's lifeline. The file ``sign`` beside the marker's word tells the campaign that it began.
    ``settings`` are the campaign's environment, for what is unset here."""
    stop = threading.Event()
    before = signal.signal(signal.SIGINT, lambda number, frame: stop.set())
    try:
        host, since = platform.node(), time.monotonic()
        if not _is_seen(marker):
            return _Told(host, None)
        with contextlib.suppress(OSError):
            os.chdir(folder)
        process = start(job, {**settings, **os.environ, **limits(threads)})
        with contextlib.suppress(OSError):
            (Path(marker[0]) / sign).write_text(host, encoding="utf-8")
        while not has_ended(process):
            if stop.is_set():
                let_go(process)
            time.sleep(_POLL_S)
        code, cpu, peak = reap(process)
        return _Told(host, code, time.monotonic() - since, cpu, peak)
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _marker(directory: Path) -> Generator[tuple[str, str]]:
    """A folder by which a node sees the campaign's directory and no other of that name, and says what has begun; and its word.
    Those of campaigns here that were killed go."""
    for old in directory.glob(".seen-*"):
        shutil.rmtree(old, ignore_errors=True)
    path, word = directory / f".seen-{secrets.token_hex(4)}", secrets.token_hex(8)
    path.mkdir()
    (path / _WORD).write_text(word, encoding="ascii")
    try:
        yield str(path), word
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _is_seen(marker: tuple[str, str]) -> bool:
    # A file that another machine has just written may take a moment.
    for _ in range(20):
        with contextlib.suppress(OSError):
            if (Path(marker[0]) / _WORD).read_text(encoding="ascii") == marker[1]:
                return True
        time.sleep(0.1)
    return False
