"""Reward ``custom``: a user's own function, by default in child processes that can be killed."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import importlib.util
import inspect
import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from retrain.errors import ConfigError
from retrain.protocols import Renderer
from retrain.rewards import calling
from retrain.rewards.calling import Answer, FunctionRefused, RewardFunction
from retrain.rewards.sandbox import Sandbox
from retrain.types import FloatArray, Rollout, Score, Task

if TYPE_CHECKING:
    from retrain.config.schema import Config

log = logging.getLogger("retrain")


class _Runner(Protocol):
    async def run(self, task: Task, rollouts: Sequence[Rollout]) -> list[Answer]: ...

    def close(self) -> None: ...


class CustomReward:
    """Scores every rollout by the function; see ``calling.checked`` for what it may return.

    The function gets ``(response, reference)`` and, by parameter name, ``task``, ``info`` (the task's) and
    ``rollout``. An exception, a value that is no finite number, a crash or ``timeout_s`` seconds without an
    answer give a failed Score for that rollout alone. ``bounds`` is None: a function says nothing about its
    range.
    """

    bounds: tuple[float, float] | None = None

    def __init__(self, runner: _Runner, code_digest: str = "") -> None:
        self._runner = runner
        self._running = 0
        self._first_traceback = ""
        self.code_digest = code_digest
        """sha256 of the function's module file, "" where there is none: says whether a resume scores alike."""

    @property
    def first_traceback(self) -> str:
        """The first failure's traceback (or last output) since scoring was last idle, "" without one."""
        return self._first_traceback

    async def score(self, task: Task, rollouts_G: Sequence[Rollout]) -> list[Score]:
        """One score per rollout, in order, whatever order the calls end in."""
        if self._running == 0:
            self._first_traceback = ""
        self._running += 1
        try:
            sound = [r for r in rollouts_G if r.stop != "error"]
            answers = iter(await self._runner.run(task, sound))
            return [
                Score.failed(r.error) if r.stop == "error" else self._score(next(answers)) for r in rollouts_G
            ]
        finally:
            self._running -= 1

    def _score(self, answer: Answer) -> Score:
        if answer.error:
            self._first_traceback = self._first_traceback or answer.traceback or answer.error
            return Score.failed(answer.error)
        return Score(reward=answer.reward, passed=answer.passed, parts=answer.parts)

    def close(self) -> None:
        """End the child processes; safe to call twice."""
        self._runner.close()


class _Isolated:
    """Calls in child processes, as many at once as there are children."""

    def __init__(self, sandbox: Sandbox, extras: Sequence[str]) -> None:
        self._sandbox = sandbox
        self._wants_task = "task" in extras or "info" in extras
        self._wants_rollout = "rollout" in extras

    async def run(self, task: Task, rollouts: Sequence[Rollout]) -> list[Answer]:
        shared: dict[str, Any] = {"reference": task.reference}
        if self._wants_task:
            shared["task"] = _task_facts(task)
        return await asyncio.gather(*(self._one(shared, r) for r in rollouts))

    async def _one(self, shared: dict[str, Any], rollout: Rollout) -> Answer:
        own = {"rollout": _rollout_facts(rollout)} if self._wants_rollout else {}
        return await self._sandbox.call({**shared, **own, "response": rollout.text})

    def close(self) -> None:
        self._sandbox.close()


class _InProcess:
    """Calls in this process: async functions at once, others one after the other in threads of their own."""

    def __init__(self, function: RewardFunction, timeout_s: float) -> None:
        self._function = function
        self._timeout_s = timeout_s

    async def run(self, task: Task, rollouts: Sequence[Rollout]) -> list[Answer]:
        if self._function.is_async:
            return await asyncio.gather(*(self._one(task, r) for r in rollouts))
        return [await self._one(task, r) for r in rollouts]

    async def _one(self, task: Task, rollout: Rollout) -> Answer:
        extras = {"task": task, "info": task.info, "rollout": rollout}

        def call() -> Any:
            return self._function(rollout.text, task.reference, extras)

        deadline = asyncio.timeout(self._timeout_s)
        try:
            async with deadline:
                value = call() if self._function.is_async else await _in_thread(call)
                if inspect.isawaitable(value):
                    value = await value
                return calling.checked(value)
        except (Exception, SystemExit) as error:  # noqa: BLE001  whatever the user's code raises is data
            if isinstance(error, TimeoutError) and deadline.expired():
                return Answer(error=f"no result within reward.timeout_s = {self._timeout_s:g} seconds")
            return calling.failure(error)

    def close(self) -> None:
        """Nothing to end: a thread that hangs cannot be ended from outside."""


async def _in_thread(call: Callable[[], Any]) -> Any:
    # A thread of a pool would be joined when the interpreter ends, so a hang would outlive the run.
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Any] = loop.create_future()

    def settle(value: Any, error: BaseException | None) -> None:
        if done.done():
            return
        if error is None:
            done.set_result(value)
        else:
            done.set_exception(error)

    def work() -> None:
        value, failed = None, None
        try:
            value = call()
        except BaseException as error:  # noqa: BLE001  the awaiting side decides what it means
            # A future refuses StopIteration, which would also end whatever iterates over it.
            failed = RuntimeError("StopIteration") if isinstance(error, StopIteration) else error
        with contextlib.suppress(RuntimeError):  # the loop has closed: nobody waits any more
            loop.call_soon_threadsafe(settle, value, failed)

    threading.Thread(target=work, name="retrain-reward", daemon=True).start()
    return await done


def _task_facts(task: Task) -> dict[str, Any]:
    return {
        "id": task.id,
        "messages": [[m.role, m.content] for m in task.messages],
        "reference": task.reference,
        "source": task.source,
        "draw": task.draw,
        "info": dict(task.info),
    }


def _rollout_facts(rollout: Rollout) -> dict[str, Any]:
    def floats(values: FloatArray | None) -> list[float] | None:
        return None if values is None else values.tolist()

    return {
        "task_id": rollout.task_id,
        "member": rollout.member,
        "token_ids_T": rollout.token_ids_T.tolist(),
        "sampled_T": rollout.sampled_T.tolist(),
        "logprobs_T": floats(rollout.logprobs_T),
        "entropies_T": floats(rollout.entropies_T),
        "text": rollout.text,
        "stop": rollout.stop,
        "weights_version": rollout.weights_version,
        "error": rollout.error,
        "rewards": dict(rollout.rewards),
    }


def build(config: Config, renderer: Renderer) -> CustomReward:
    """The reward of a configuration; ConfigError when the function cannot be imported or called."""
    module, function = config.reward.custom_module, config.reward.custom_function
    if not module:
        raise ConfigError(
            'reward.type = "custom" needs a module.', fix='set reward.custom_module = "my_rewards".'
        )
    return of_function(
        config, module, function, f"reward.custom_module = {module!r}, custom_function = {function!r}"
    )


def of_function(config: Config, module: str, function: str, where: str) -> CustomReward:
    """The reward of one function; ConfigError, beginning with ``where``, when it cannot be imported or called."""
    settings = config.reward
    runner: _Runner
    try:
        if settings.isolate:
            sandbox = Sandbox(module, function, timeout_s=settings.timeout_s)
            try:
                runner = _Isolated(sandbox, sandbox.check())
            except BaseException:
                sandbox.close()
                raise
        else:
            runner = _InProcess(calling.find(module, function), settings.timeout_s)
            log.warning(
                "reward.isolate = false: %s.%s runs unprotected in this process; a call that "
                "hangs or crashes can take the run with it.",
                module,
                function,
            )
    except FunctionRefused as error:
        raise ConfigError(f"{where}: {error.reason}", fix=error.fix) from error
    return CustomReward(runner, _code_digest(module))


def _code_digest(module: str) -> str:
    """sha256 of a module's file, found without importing it, "" where there is none."""
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return ""
    path = Path(found.origin) if found is not None and found.origin else None
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path is not None and path.is_file() else ""
