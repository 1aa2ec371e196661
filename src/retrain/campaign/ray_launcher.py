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
import socket
import tempfile
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path
from typing import Any

from retrain import cards, machine
from retrain.campaign.launchers import Ended, Job, has_ended, let_go, limits, reap, start
from retrain.errors import ConfigError

log = getLogger("retrain")

STARTS = 3
"""How often a run is started whose node or worker is lost."""
_POLL_S = 0.2
_LOOK_S = 5.0
"""Seconds between two looks at what the cluster offers."""
_PATIENCE_S = 300.0
"""Seconds to wait for a node that could take a run: a cluster that grows by itself needs a while."""
_STORE_BYTES = 80 << 20
"""Shared memory of a local cluster; a task returns a few numbers."""
_ITS_OWN = ("RAY_", "CUDA_", "NVIDIA_", "SLURM_", "LD_")
"""Variables of one machine, which mean nothing on another."""
_ALONE = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DISABLE_USAGE_STATS_PROMPT": "1"}
_LOCAL = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_kill_child_processes_on_worker_exit": "false"}
"""Of a cluster of our own: Ray's switch, on every system, for nodes that no other machine reaches; and runs that a worker
leaves behind are not killed, because they save and end by themselves."""


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
    job: Job
    since: float
    starts: int


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

    def run(
        self,
        jobs: Sequence[Job],
        *,
        stop: threading.Event,
        begun: Callable[[Job], None],
        ended: Callable[[Ended], None],
        tick: Callable[[], None],
    ) -> None:
        """See ``Launcher``. ConfigError where Ray is missing, no cluster answers, or a node does not see the directory."""
        with _cluster(self.address, self.threads, self.gpus) as (ray, is_own), _marker(self.directory) as marker:
            tasks = _Tasks(self, ray, marker, begun, ended, patience_s=0.0 if is_own else self.patience_s)
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
        self._cancelled: set[Any] = set()

    def submit(self) -> None:
        """Hand on as many runs as there is room for; a run that no node can take has ended."""
        now = time.monotonic()
        if now - self._looked >= _LOOK_S:
            self._room, self._looked = self._fitting(), now
        if self._room:
            self._fitted = now
        elif now - self._fitted >= self._patience_s:
            self._give_up()
        most = min(self._room, self._what.workers or self._room)
        while self.waiting and len(self.running) < most and time.monotonic() - self._last >= self._what.stagger_s:
            job, starts = self.waiting.popleft()
            self._last = time.monotonic()
            self.running[self._remote.remote(job, *self._same)] = _Task(job, self._last, starts)
            self._begun(job)

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
        asks = f"{self._what.threads} CPUs" + (f" and {self._what.gpus} GPUs" if self._what.gpus else "")
        note = f"no node of the Ray cluster has {asks}"
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
        done, _ = self._ray.wait(list(self.running), num_returns=len(self.running), timeout=0, fetch_local=True)
        for ref in done:
            task = self.running.pop(ref)
            end = self._end(ref, task)
            if end is not None and not quietly:
                self._ended(end)

    def _end(self, ref: Any, task: _Task) -> Ended | None:
        """How a task ended; None where its run is to be started once more."""
        errors, lasted = self._ray.exceptions, time.monotonic() - task.since
        try:
            told: _Told = self._ray.get(ref)
        except errors.TaskCancelledError:
            return Ended(task.job, 130, lasted)
        except errors.RayTaskError as error:
            # What the task's own code raised, such as a node without this package.
            return Ended(task.job, 1, lasted, note=f"its task failed: {_line(error.cause or error)}")
        except errors.RayError as error:
            if ref in self._cancelled:
                return Ended(task.job, 130, lasted)
            if task.starts >= STARTS:
                return Ended(task.job, 1, lasted, note=f"its node or worker was lost {STARTS} times: {_line(error)}")
            log.warning(
                "%s lost its node or worker (%s): it goes on elsewhere from its newest checkpoint, start %d of at most %d.",
                task.job.name, _line(error), task.starts + 1, STARTS,
            )  # fmt: skip
            self._looked = -float("inf")
            self.waiting.appendleft((task.job, task.starts + 1))
            return None
        if told.code is None:
            raise ConfigError(
                f"node {told.host} of the Ray cluster does not see {self._what.directory}.",
                fix="give a --log-dir on a file system that all nodes share.",
            )
        return Ended(task.job, told.code, told.seconds, told.cpu_s, told.peak_bytes, host=told.host)

    def cancel(self) -> None:
        """Ask every run to finish its step and save; those not begun stay so."""
        for ref in [ref for ref in self.running if ref not in self._cancelled]:
            self._cancelled.add(ref)
            with contextlib.suppress(Exception):
                self._ray.cancel(ref, force=False)


def attend(
    job: Job, marker: tuple[str, str], threads: int, settings: Mapping[str, str], folder: str
) -> _Told:
    """The task, on its node: run the job's process and say how it ended. Ray's cancel, which comes as SIGINT, and the end
    of the worker close the process's lifeline. ``settings`` are the campaign's environment, for what is unset here."""
    stop = threading.Event()
    before = signal.signal(signal.SIGINT, lambda number, frame: stop.set())
    try:
        host, since = platform.node(), time.monotonic()
        if not _is_seen(marker):
            return _Told(host, None)
        with contextlib.suppress(OSError):
            os.chdir(folder)
        process = start(job, {**settings, **os.environ, **limits(threads)})
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
    """A file that says to a node that it sees the campaign's directory and no other of that name."""
    path, word = directory / f".seen-{secrets.token_hex(4)}", secrets.token_hex(8)
    path.write_text(word, encoding="ascii")
    try:
        yield str(path), word
    finally:
        with contextlib.suppress(OSError):
            path.unlink()


def _is_seen(marker: tuple[str, str]) -> bool:
    # A file that another machine has just written may take a moment.
    for _ in range(20):
        with contextlib.suppress(OSError):
            if Path(marker[0]).read_text(encoding="ascii") == marker[1]:
                return True
        time.sleep(0.1)
    return False


@contextlib.contextmanager
def _cluster(address: str, threads: int, gpus: int) -> Generator[tuple[Any, bool]]:
    """Ray, connected, and whether the cluster is this campaign's own."""
    given = address or os.environ.get("RAY_ADDRESS", "")
    variables = _ALONE | ({} if given else _LOCAL)
    environment = {key: os.environ.get(key) for key in variables}
    # Ray puts handlers of its own in the place of those of the campaign, which save the runs.
    in_main = threading.current_thread() is threading.main_thread()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)} if in_main else {}
    os.environ.update(variables)
    session = "" if given else tempfile.mkdtemp(prefix="retrain-ray-", dir=_short_folder())
    ray: Any = None
    is_theirs = False
    try:
        try:
            import ray
        except ImportError as error:
            raise ConfigError(
                'campaign.launcher = "ray" needs the package ray, which is not installed.', fix='pip install "retrain[ray]".'
            ) from error
        is_theirs = ray.is_initialized()
        if not is_theirs:
            _connect(ray, given, session, threads, gpus)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        yield ray, not given
    finally:
        if ray is not None and not is_theirs:
            with contextlib.suppress(Exception):
                ray.shutdown()
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for key, value in environment.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value
        if session:
            shutil.rmtree(session, ignore_errors=True)


def _connect(ray: Any, given: str, session: str, threads: int, gpus: int) -> None:
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if given:
            try:
                _knock(given)
                ray.init(address=given, **quiet)
            except Exception as error:
                raise ConfigError(
                    f"no Ray cluster answers at {given}: {_line(error)}.",
                    fix="correct campaign.ray_address or RAY_ADDRESS, or leave both empty for a cluster on this machine.",
                ) from error
            return
        log.info("Starting a Ray cluster on this machine ...")
        try:
            ray.init(
                address="local",
                num_cpus=max(threads, int(machine.usable_processors())),
                num_gpus=len(cards.visible()) if gpus else 0,
                include_dashboard=False,
                object_store_memory=_STORE_BYTES,
                _temp_dir=session,
                **quiet,
            )
        except Exception as error:
            raise ConfigError(
                f"Ray could not start on this machine: {_line(error)}.", fix='use campaign.launcher = "processes".'
            ) from error


def _knock(address: str) -> None:
    """OSError where nothing listens at HOST:PORT: Ray itself would end the process."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def _short_folder() -> str:
    """Where sockets can lie: their paths may hold 107 bytes."""
    folder = tempfile.gettempdir()
    return folder if len(folder) < 30 else "/tmp"


def _line(error: BaseException) -> str:
    """An error as one line without its end mark."""
    said = " ".join(str(error).split()) or type(error).__name__
    return said[:200].rstrip(". ")
