"""One question, one answer: a prompt is rendered once, and each group member is one completion."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from retrain.protocols import Engine, Renderer
from retrain.types import Completion, IntArray, Rollout, Sampling, Task

if TYPE_CHECKING:
    from retrain.config.schema import Config


class SingleTurn:
    """Environment without turns.

    Only two things become error rollouts, because only they are the task's own: the renderer refuses the
    messages (ValueError of ``encode``), or the prompt leaves no room in the model's context. Whatever the
    engine raises passes through: a dead engine stops the run, and a bug is never taken for bad luck.
    ``context_length`` is in tokens, None where unknown.
    """

    def __init__(self, renderer: Renderer, *, context_length: int | None = None) -> None:
        self._renderer = renderer
        self._context_length = context_length

    async def attempt(self, task: Task, n: int, engine: Engine, sampling: Sampling) -> list[Rollout]:
        """``n`` rollouts, member i the engine's completion i under the noise of member i."""
        members = range(sampling.noise.member, sampling.noise.member + n)
        try:
            prompt = self._renderer.encode(task.messages)
        except ValueError as error:
            return self._failed(task, members, f"the prompt cannot be rendered: {error}")
        if len(prompt) == 0:
            return self._failed(task, members, "the prompt renders to no tokens")
        if self._context_length is not None and len(prompt) >= self._context_length:
            room = f"the prompt's {len(prompt)} tokens fill the model's context of {self._context_length}"
            return self._failed(task, members, room)
        completions = await engine.generate(prompt, n, sampling)
        if len(completions) != n:
            raise RuntimeError(f"the engine returned {len(completions)} completions instead of {n}")
        return [self._rollout(task, m, prompt, c) for m, c in zip(members, completions, strict=True)]

    def _rollout(self, task: Task, member: int, prompt: IntArray, completion: Completion) -> Rollout:
        unknown = np.full(len(prompt), np.nan, dtype=np.float32)
        entropies = completion.entropies_T
        sampled = np.zeros(len(prompt) + len(completion.token_ids_T), dtype=np.bool_)
        sampled[len(prompt) :] = True
        return Rollout(
            task_id=task.id,
            member=member,
            token_ids_T=np.concatenate([prompt, completion.token_ids_T]).astype(np.int32),
            sampled_T=sampled,
            logprobs_T=np.concatenate([unknown, completion.logprobs_T]).astype(np.float32),
            entropies_T=None
            if entropies is None
            else np.concatenate([unknown, entropies]).astype(np.float32),
            text=self._renderer.decode(completion.token_ids_T),
            stop=completion.stop,
            weights_version=completion.weights_version,
        )

    def _failed(self, task: Task, members: range, why: str) -> list[Rollout]:
        return [
            Rollout(
                task_id=task.id,
                member=member,
                token_ids_T=np.zeros(0, dtype=np.int32),
                sampled_T=np.zeros(0, dtype=np.bool_),
                logprobs_T=np.zeros(0, dtype=np.float32),
                entropies_T=None,
                text="",
                stop="error",
                weights_version=-1,
                error=why,
            )
            for member in members
        ]


def build(config: Config, renderer: Renderer) -> SingleTurn:
    """The environment of a configuration; the renderer says how long the model's context is, if it knows."""
    return SingleTurn(renderer, context_length=getattr(renderer, "context_length", None))
