"""The child side of the reward sandbox: one JSON request per line in, one JSON answer per line out.

It runs alone in its process, so it may change limits, file descriptors and signals as it likes.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import inspect
import io
import json
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from retrain.rewards import calling

_PR_SET_PDEATHSIG = 1


def main(hello: Mapping[str, Any]) -> None:
    """Serve until standard input ends. ``hello`` names the function, the limits and the parent."""
    _die_with(int(hello["parent"]))
    _limit(int(hello["memory_bytes"]))
    requests, answers = _take_channel()
    # Written by a C thread, so it shows where a call hangs even when that call holds the interpreter.
    warn_after_s = 0.9 * float(hello["timeout_s"])
    faulthandler.enable(file=2)
    try:
        found = calling.find(str(hello["module"]), str(hello["function"]))
    except calling.FunctionRefused as error:
        _send(answers, {"refused": error.reason, "fix": error.fix})
        return
    _send(answers, {"extras": found.extras})
    with asyncio.Runner() as loop:  # one loop for all calls: an async function may keep its connections
        for line in requests:
            request = json.loads(line)
            faulthandler.dump_traceback_later(warn_after_s, file=2)
            answer = _answer(found, request, loop)
            faulthandler.cancel_dump_traceback_later()
            _send(answers, {"id": request["id"], **answer})


def _take_channel() -> tuple[io.BufferedReader, io.BufferedWriter]:
    """Keep the pipes for the protocol alone: prints go to standard error, input() is empty."""
    requests = os.fdopen(os.dup(0), "rb")
    answers = os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    if isinstance(sys.stdout, io.TextIOWrapper):
        cast("io.TextIOWrapper", sys.stdout).reconfigure(line_buffering=True, errors="backslashreplace")
    return requests, answers


def _send(answers: io.BufferedWriter, message: Mapping[str, Any]) -> None:
    answers.write(json.dumps(message, allow_nan=False).encode() + b"\n")
    answers.flush()


def _answer(
    found: calling.RewardFunction, request: Mapping[str, Any], loop: asyncio.Runner
) -> dict[str, Any]:
    try:
        value = found(request["response"], request["reference"], _extras(request))
        if inspect.isawaitable(value):
            value = loop.run(_awaited(value))
        answer = calling.checked(value)
    except BaseException as error:  # noqa: BLE001  sys.exit() in a reward is that reward's failure
        answer = calling.failure(error)
    if answer.error:
        return {"error": answer.error, "traceback": answer.traceback}
    return {"reward": answer.reward, "passed": answer.passed, "parts": dict(answer.parts)}


async def _awaited(value: Any) -> Any:
    return await value


def _extras(request: Mapping[str, Any]) -> dict[str, Any]:
    extras: dict[str, Any] = {}
    if "task" in request:
        from retrain.types import Message, Task

        facts = dict(request["task"])
        facts["messages"] = tuple(Message(role, content) for role, content in facts["messages"])
        extras["task"] = Task(**facts)
        extras["info"] = extras["task"].info
    if "info" in request:  # what our own rewards hand over without a whole task
        extras["info"] = request["info"]
    if "rollout" in request:
        import numpy as np

        from retrain.types import Rollout

        facts = dict(request["rollout"])
        kinds = {
            "token_ids_T": np.int32,
            "sampled_T": np.bool_,
            "logprobs_T": np.float32,
            "entropies_T": np.float32,
        }
        for name, kind in kinds.items():
            if facts[name] is not None:
                facts[name] = np.array(facts[name], dtype=kind)
        extras["rollout"] = Rollout(**facts)
    return extras


def _die_with(parent: int) -> None:
    """End when the parent does, however it ends: also while the user's function holds the interpreter."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    if os.getppid() != parent:
        os._exit(1)


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _limit(memory_bytes: int) -> None:
    """A reward that eats memory gets a MemoryError, or is the first to be killed by the system."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
