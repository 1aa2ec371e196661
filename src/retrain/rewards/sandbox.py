"""Child processes that run a user's reward function and can be killed when it hangs, crashes or eats memory.

It guards the run against bugs, not against malice: a child has the user's own rights on files and network.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, NoReturn, cast

from retrain.rewards.calling import Answer, FunctionRefused

PASSED_ON = (
    "CUDA_VISIBLE_DEVICES",
    "HF_DATASETS_CACHE",
    "HF_HOME",
    "HF_HUB_CACHE",
    "HF_HUB_OFFLINE",
    "HOME",
    "LANG",
    "LANGUAGE",
    "LC_ALL",
    "LC_CTYPE",
    "LD_LIBRARY_PATH",
    "LOGNAME",
    "PATH",
    "PYTHONHASHSEED",
    "SSL_CERT_DIR",
    "SSL_CERT_FILE",
    "TMPDIR",
    "TRANSFORMERS_OFFLINE",
    "TZ",
    "USER",
    "VIRTUAL_ENV",
    "XDG_CACHE_HOME",
)
"""Environment variables that a child gets. Keys and tokens are not among them."""

_START_S = 120.0  # importing the user's module may take long; it is not part of a call's deadline
_TAIL_BYTES = 8192
_MAX_REPLY_BYTES = 1 << 20
_BOOT = (
    "import json, sys; hello = json.loads(sys.stdin.buffer.readline()); sys.path[:] = hello['path']; "
    "from retrain.rewards.sandbox_child import main; main(hello)"
)


class _Lost(Exception):
    """The child cannot be used any more; ``output`` is the end of what it printed. ``unanswered``: it died without
    a byte of an answer."""

    def __init__(self, reason: str, output: str, *, unanswered: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.output = output
        self.unanswered = unanswered


class _Gone(Exception):
    """A child that had been idle died before it answered anything."""


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")


class _Child:
    """One child process with its three pipes. Only one thread talks to it; any thread may ``kill`` it."""

    def __init__(self, env: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _BOOT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            env=dict(env),
            # Ctrl-C at the terminal is the trainer's alone, and one signal reaches the whole group.
            start_new_session=True,
        )
        self._lock = threading.Lock()
        self._killed = False
        self._reaped = False
        self._requests = 0
        self._tail = b""
        for pipe in self._pipes():
            os.set_blocking(pipe.fileno(), False)

    @property
    def pid(self) -> int:
        return self._process.pid

    def _pipes(self) -> tuple[IO[bytes], IO[bytes], IO[bytes]]:
        return cast(
            "tuple[IO[bytes], IO[bytes], IO[bytes]]",
            (self._process.stdin, self._process.stdout, self._process.stderr),
        )

    def ask(self, message: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        """Send one request and wait for its answer; _Lost when there is none in time."""
        self._tail = b""
        self._requests += 1
        line = json.dumps({**message, "id": self._requests}).encode() + b"\n"
        raw = self._exchange(line, time.monotonic() + timeout_s)
        try:
            answer = json.loads(raw, parse_constant=_refuse)
        except (ValueError, RecursionError) as error:
            raise _Lost("the reward's process broke its own protocol", self._output()) from error
        if not isinstance(answer, dict):
            raise _Lost("the reward's process broke its own protocol", self._output())
        return cast("dict[str, Any]", answer)

    def asked(self) -> int:
        """Number of the last request."""
        return self._requests

    def _exchange(self, line: bytes, deadline: float) -> bytes:
        stdin, stdout, stderr = self._pipes()
        to_write = memoryview(line)
        got = b""
        with selectors.DefaultSelector() as waiting:
            waiting.register(stdin, selectors.EVENT_WRITE)
            waiting.register(stdout, selectors.EVENT_READ)
            waiting.register(stderr, selectors.EVENT_READ)
            while True:
                left = deadline - time.monotonic()
                if left <= 0 or self._killed:
                    raise _Lost("" if left <= 0 else "the run ended", self._output())
                # A grandchild can keep a pipe open after a kill: look up now and then.
                for key, _ in waiting.select(min(left, 0.5)):
                    pipe = key.fileobj
                    if pipe is stdin:
                        try:
                            to_write = to_write[os.write(stdin.fileno(), to_write[:65536]) :]
                        except BlockingIOError:
                            continue
                        except BrokenPipeError:
                            to_write = to_write[:0]
                        if not to_write:
                            waiting.unregister(stdin)
                        continue
                    chunk = os.read(key.fd, 65536)
                    if pipe is stderr:
                        self._tail = (self._tail + chunk)[-_TAIL_BYTES:]
                        if not chunk:
                            waiting.unregister(stderr)
                        continue
                    if not chunk:
                        self._drain(stderr)
                        reason = f"the reward's process died: {self._end()}"
                        raise _Lost(reason, self._output(), unanswered=not got)
                    got += chunk
                    if b"\n" in got:
                        return got.partition(b"\n")[0]
                    if len(got) > _MAX_REPLY_BYTES:
                        raise _Lost("the reward's answer is longer than a mebibyte", self._output())

    def _drain(self, stderr: IO[bytes]) -> None:
        with contextlib.suppress(BlockingIOError):
            while chunk := os.read(stderr.fileno(), 65536):
                self._tail = (self._tail + chunk)[-_TAIL_BYTES:]

    def _output(self) -> str:
        return self._tail.decode(errors="replace").strip()

    def _end(self) -> str:
        """How the process ended. A process that is already ending keeps its own exit status under a kill."""
        self.kill()
        code = self._reap()
        if code is None or code == -signal.SIGKILL:
            return "killed, perhaps by the system for want of memory"
        if code < 0:
            return f"killed by {signal.Signals(-code).name}"
        return f"exit code {code}"

    def lives(self) -> bool:
        """Whether the process still runs. One that has ended is left to ``close``."""
        with self._lock:
            if self._killed or self._reaped:
                return False
            if hasattr(os, "waitid"):  # unlike a poll it does not reap, so the number stays the process's own
                with contextlib.suppress(ChildProcessError):
                    return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
            self._reaped = self._process.poll() is not None
            return not self._reaped

    def kill(self) -> None:
        """Kill the process and everything it started in its group; from any thread."""
        with self._lock:
            self._killed = True
            # Before the process is reaped its number cannot belong to anybody else.
            if not self._reaped:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(self._process.pid, signal.SIGKILL)

    def _reap(self) -> int | None:
        # Called after a kill only, so the wait under the lock is short.
        with self._lock, contextlib.suppress(subprocess.TimeoutExpired):
            code = self._process.wait(timeout=10)
            self._reaped = True
            return code
        return None

    def close(self) -> None:
        """Kill, reap and close the pipes."""
        self.kill()
        self._reap()
        for pipe in self._pipes():
            pipe.close()


class _Pool:
    """The children of one sandbox and who is idle."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.live: set[_Child] = set()
        self.idle: list[_Child] = []
        self.closed = False


class Sandbox:
    """Up to ``workers`` children (0 = as many as cores, at most 4) that each run one call at a time.

    Children start when first needed. A child may hold its share of 80 % of the memory, and at most
    ``memory_bytes`` where that is not 0; ``environment`` adds to the variables that it gets. A sandbox belongs to
    no event loop, and ``close`` may come from any thread.
    """

    def __init__(
        self,
        module: str,
        function: str,
        *,
        timeout_s: float,
        workers: int = 0,
        memory_bytes: int = 0,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._module = module
        self._function = function
        self._timeout_s = timeout_s
        self._workers = workers or max(1, min(4, _cores()))
        self._most_memory = memory_bytes
        self._environment = dict(environment or {})
        self._pool = _Pool()
        # Linux ends a child with the thread that started it, so these threads start them and live as long.
        self._threads = ThreadPoolExecutor(self._workers, thread_name_prefix="retrain-reward")
        self._finalizer = weakref.finalize(self, _close, self._pool, self._threads)
        self._extras: tuple[str, ...] | None = None

    def check(self) -> tuple[str, ...]:
        """Start a child; the extras that the function asks for, or FunctionRefused."""
        return self._threads.submit(self._check).result()

    def pids(self) -> tuple[int, ...]:
        """Process numbers of the live children."""
        with self._pool.lock:
            return tuple(sorted(child.pid for child in self._pool.live))

    async def call(self, request: Mapping[str, Any]) -> Answer:
        """One call of the function: ``response``, ``reference`` and the extras that ``check`` returned."""
        try:
            work = self._threads.submit(self._call, request)
        except RuntimeError:  # the threads have shut down
            return Answer(error="the run ended")
        return await asyncio.wrap_future(work)

    def close(self) -> None:
        """Kill all children and wait for them; safe to call twice."""
        self._finalizer()

    def _check(self) -> tuple[str, ...]:
        try:
            child, _ = self._take()
        except _Lost as error:
            detail = error.output.strip().splitlines()
            raise FunctionRefused(
                error.reason + (f" ({detail[-1]})" if detail else "") + ".",
                "make the module importable on its own.",
            ) from error
        self._give(child)
        return self._extras or ()

    def _call(self, request: Mapping[str, Any]) -> Answer:
        try:
            return self._attempt(request, fresh=False)
        except _Gone:
            # It may have been killed as the first of all, for want of memory, and not by this call.
            return self._attempt(request, fresh=True)

    def _attempt(self, request: Mapping[str, Any], *, fresh: bool) -> Answer:
        """The answer of one child; _Gone when one that had been idle died before it said anything."""
        try:
            child, had_been_idle = self._take(fresh=fresh)
        except FunctionRefused as error:
            return Answer(
                error=f"{self._module}.{self._function} could be used before, but now {error.reason}"
            )
        except _Lost as error:
            return Answer(error=error.reason, traceback=error.output)
        try:
            message = child.ask(request, self._timeout_s)
            if message.get("id") != child.asked():
                raise _Lost("the reward's process broke its own protocol", "")
            answer = _read(message)
        except _Lost as error:
            self._drop(child)
            if had_been_idle and error.unanswered:
                raise _Gone from error
            late = f"no result within reward.timeout_s = {self._timeout_s:g} seconds"
            reason = error.reason or late
            return Answer(error=reason, traceback=f"{reason}\n{error.output}".rstrip())
        except (TypeError, ValueError) as error:
            self._drop(child)
            return Answer(error=f"this task cannot be handed to a child process: {error}")
        self._give(child)
        return answer

    def _take(self, *, fresh: bool = False) -> tuple[_Child, bool]:
        """A child for one call, and whether it had been idle. ``fresh``: a new one."""
        while (idle := self._idle(fresh)) is not None:
            if idle.lives():
                return idle, True
            self._drop(idle)
        child = _Child(_environment() | self._environment)
        with self._pool.lock:
            self._pool.live.add(child)
            ended = self._pool.closed
        try:
            if ended:
                raise _Lost("the run ended", "")
            hello = {
                "path": [entry or str(Path.cwd()) for entry in sys.path],
                "module": self._module,
                "function": self._function,
                "timeout_s": self._timeout_s,
                "memory_bytes": self._memory_bytes(),
                "parent": os.getpid(),
            }
            ready = child.ask(hello, max(_START_S, self._timeout_s))
            if "refused" in ready:
                raise FunctionRefused(str(ready["refused"]), str(ready.get("fix", "")))
            self._extras = tuple(ready["extras"])
        except (_Lost, FunctionRefused) as error:
            self._drop(child)
            if isinstance(error, _Lost) and not error.reason:
                raise _Lost(
                    f"the module took longer than {_START_S:g} seconds to import", error.output
                ) from error
            raise
        return child, False

    def _idle(self, fresh: bool) -> _Child | None:
        with self._pool.lock:
            if self._pool.closed:
                raise _Lost("the run ended", "")
            return None if fresh or not self._pool.idle else self._pool.idle.pop()

    def _memory_bytes(self) -> int:
        share = _memory_bytes() * 8 // 10 // self._workers
        return min(share, self._most_memory) if self._most_memory else share

    def _give(self, child: _Child) -> None:
        with self._pool.lock:
            if not self._pool.closed:
                self._pool.idle.append(child)

    def _drop(self, child: _Child) -> None:
        with self._pool.lock:
            self._pool.live.discard(child)
        child.close()


def _close(pool: _Pool, threads: ThreadPoolExecutor) -> None:
    with pool.lock:
        pool.closed = True
        children = list(pool.live)
    for child in children:
        child.kill()
    threads.shutdown(wait=True, cancel_futures=True)
    for child in children:
        child.close()


def _read(message: Mapping[str, Any]) -> Answer:
    """A child's answer, checked again: nothing that is not a finite number may pass for a reward."""
    if error := message.get("error"):
        return Answer(error=str(error), traceback=str(message.get("traceback", "")))
    reward, passed, parts = message.get("reward"), message.get("passed"), message.get("parts")
    values = [reward, *cast("dict[str, object]", parts).values()] if isinstance(parts, dict) else [None]
    for value in values:
        if not isinstance(value, float) or not math.isfinite(value):
            raise _Lost("the reward's process broke its own protocol", "")
    return Answer(
        reward=cast("float", reward),
        passed=passed if isinstance(passed, bool) else None,
        parts=cast("dict[str, float]", parts),
    )


def _environment() -> dict[str, str]:
    kept = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    # The cores belong to the learner, and there are several children.
    return {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"} | kept


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory_bytes() -> int:
    """Memory of the machine, or of the container where that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):
        return min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return total
