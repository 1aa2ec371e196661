"""Constraint ``json_schema``: the JSON of a response must satisfy a schema. It is a part of ``composite``."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from retrain.errors import ConfigError
from retrain.rewards.calling import Answer, FunctionRefused
from retrain.rewards.sandbox import Sandbox
from retrain.types import Rollout, Score, Task

_MEMORY_BYTES = 1 << 30


class JsonSchema:
    """1.0 where the JSON of a response satisfies the schema, else 0.0; ``passed`` stays None.

    What counts as the JSON of a response says ``schema_child.found``. Validation runs in child processes, because
    a schema can ask for work without end (a pattern, ``uniqueItems``): past the deadline, or where the validator
    raises, the score has failed. ``regex_s`` bounds one search of one pattern, in seconds.
    """

    bounds = (0.0, 1.0)

    def __init__(self, sandbox: Sandbox, schema: Mapping[str, Any], regex_s: float) -> None:
        self._sandbox = sandbox
        self._info = {"schema": dict(schema), "regex_s": regex_s}
        self._running = 0
        self._first_traceback = ""

    @property
    def first_traceback(self) -> str:
        """The first failure's traceback since scoring was last idle, "" without one."""
        return self._first_traceback

    async def score(self, task: Task, rollouts_G: Sequence[Rollout]) -> list[Score]:
        """One score per rollout, in order; equal responses of a group are checked once."""
        if self._running == 0:
            self._first_traceback = ""
        self._running += 1
        try:
            unique = list(dict.fromkeys(r.text for r in rollouts_G if r.stop != "error"))
            found = await asyncio.gather(*(self._ask(text) for text in unique))
            answers = dict(zip(unique, found, strict=True))
            return [
                Score.failed(r.error) if r.stop == "error" else self._score(answers[r.text])
                for r in rollouts_G
            ]
        finally:
            self._running -= 1

    async def _ask(self, text: str) -> Answer:
        return await self._sandbox.call({"response": text, "reference": "", "info": self._info})

    def _score(self, answer: Answer) -> Score:
        if answer.error:
            self._first_traceback = self._first_traceback or answer.traceback or answer.error
            return Score.failed(answer.error)
        return Score(reward=answer.reward)

    def close(self) -> None:
        """End the child processes; safe to call twice."""
        self._sandbox.close()


def of_schema(schema: Mapping[str, Any], *, timeout_s: float, regex_s: float, where: str) -> JsonSchema:
    """The constraint of a schema that has been checked; ConfigError, beginning with ``where``, when no child starts."""
    sandbox = Sandbox(
        "retrain.rewards.schema_child", "score", timeout_s=timeout_s, memory_bytes=_MEMORY_BYTES
    )
    try:
        sandbox.check()
        return JsonSchema(sandbox, schema, regex_s)
    except FunctionRefused as error:
        sandbox.close()
        raise ConfigError(
            f"{where} cannot use jsonschema: {error.reason}", fix='pip install "retrain[checks]".'
        ) from error
    except BaseException:
        sandbox.close()
        raise
