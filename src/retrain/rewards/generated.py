"""Reward ``reasoning_gym``: the score that the generator of a task gives, from child processes."""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
from collections.abc import Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any

from retrain.errors import ConfigError
from retrain.protocols import Renderer
from retrain.rewards.calling import Answer, FunctionRefused
from retrain.rewards.extract import stated_answer
from retrain.rewards.sandbox import Sandbox
from retrain.types import Rollout, Score, Task

if TYPE_CHECKING:
    from retrain.config.schema import Config

_FULL = 1.0 - 1e-9


class Generated:
    """A number in [0, 1]; a rollout passes with a full 1.

    The task says in ``info["recipe"]`` how it was made: ``generator``, ``config`` (with seed and size) and
    ``index``; ``info["entry"]`` may hold what was made. What is scored is ``extract.stated_answer``: the last
    ``<answer>``, else the last box, else the last line. Whatever the generator raises, a hang and a crash are failed
    Scores, never a 0.
    """

    bounds = (0.0, 1.0)

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox
        self._running = 0
        self._first_traceback = ""
        version = metadata.version("reasoning-gym")
        self.code_digest = hashlib.sha256(f"reasoning-gym=={version}".encode()).hexdigest()[:16]
        """Of the package's version: says whether a resume scores alike."""

    @property
    def first_traceback(self) -> str:
        """The first failure's traceback since scoring was last idle, "" without one."""
        return self._first_traceback

    async def score(self, task: Task, rollouts_G: Sequence[Rollout]) -> list[Score]:
        """One score per rollout, in order; equal answers of a group are scored once."""
        if self._running == 0:
            self._first_traceback = ""
        self._running += 1
        try:
            texts = [None if r.stop == "error" else stated_answer(r.text) for r in rollouts_G]
            unique = list(dict.fromkeys(text for text in texts if text is not None))
            found = await asyncio.gather(*(self._ask(task, text) for text in unique))
            answers = dict(zip(unique, found, strict=True))
            return [
                Score.failed(rollout.error) if text is None else self._score(answers[text])
                for rollout, text in zip(rollouts_G, texts, strict=True)
            ]
        finally:
            self._running -= 1

    async def _ask(self, task: Task, text: str) -> Answer:
        recipe: Any = task.info.get("recipe")
        try:
            made: dict[str, Any] = {
                "generator": recipe["generator"],
                "config": dict(recipe["config"]),
                "index": recipe["index"],
            }
        except (TypeError, KeyError, ValueError):
            return Answer(error=f"task {task.id!r} was not made by a generator of reasoning_gym")
        info = {"recipe": made, **({"entry": task.info["entry"]} if "entry" in task.info else {})}
        return await self._sandbox.call({"response": text, "reference": task.reference, "info": info})

    def _score(self, answer: Answer) -> Score:
        if answer.error:
            self._first_traceback = self._first_traceback or answer.traceback or answer.error
            return Score.failed(answer.error)
        return Score(reward=answer.reward, passed=answer.reward >= _FULL)

    def close(self) -> None:
        """End the child processes; safe to call twice."""
        self._sandbox.close()


def build(config: Config, renderer: Renderer) -> Generated:
    """The reward of a configuration; ConfigError when reasoning_gym is missing or cannot be imported."""
    if importlib.util.find_spec("reasoning_gym") is None:
        raise ConfigError(
            'reward.type = "reasoning_gym" needs the package reasoning-gym, which is not installed.',
            fix='pip install "retrain[tasks]".',
        )
    sandbox = Sandbox(
        "retrain.rewards.generated_child",
        "score",
        timeout_s=config.reward.timeout_s,
        # Some generators iterate over sets: the source makes its tasks with this hash seed.
        environment={"PYTHONHASHSEED": "0"},
    )
    try:
        sandbox.check()
        return Generated(sandbox)
    except FunctionRefused as error:
        sandbox.close()
        raise ConfigError(
            f'reward.type = "reasoning_gym" cannot use the package: {error.reason}',
            fix='pip install "retrain[tasks]".',
        ) from error
    except BaseException:
        sandbox.close()
        raise
