"""Failures while groups are sampled and scored side by side."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from retrain.errors import EngineError, RewardError
from retrain.rewards.calling import Answer
from retrain.rewards.custom import CustomReward
from retrain.training.rollout import EventLoop, RewardErrors, collect
from retrain.types import Message, NoiseKey, Rollout, Sampling, Score, Task

SAMPLING = Sampling(1.0, 1.0, 4, (), (), False, NoiseKey(0, 0, 0))
TASKS = [Task(str(i), (Message("user", "q"),), "", "toy", i) for i in range(4)]


@pytest.fixture
def events():
    made = EventLoop()
    yield made
    made.close()


def rollouts_of(task: Task, n: int) -> list[Rollout]:
    ids, sampled = np.array([1, 2], np.int32), np.array([False, True])
    logprobs = np.array([np.nan, -1.0], np.float32)
    return [Rollout(task.id, m, ids, sampled, logprobs, None, "x", "stop", 0) for m in range(n)]


class Staggered:
    """An environment whose group p is there when p groups have been scored; ``broken`` raises instead."""

    def __init__(self, broken: int = -1) -> None:
        self.broken, self.scored, self.ended = broken, 0, 0
        self.turn = asyncio.Condition()

    async def attempt(self, task: Task, n: int, engine: Any, sampling: Sampling) -> list[Rollout]:
        if task.draw == self.broken:
            await asyncio.sleep(0.1)
            raise EngineError("the engine died")
        if self.broken >= 0:
            try:
                await asyncio.sleep(30)
            finally:
                self.ended += 1
        async with self.turn:
            await asyncio.wait_for(self.turn.wait_for(lambda: self.scored == task.draw), 30)
        return rollouts_of(task, n)

    async def one_more(self) -> None:
        async with self.turn:
            self.scored += 1
            self.turn.notify_all()


class Runner:
    """Calls fail in tasks 0 and 1 with a traceback that names the task."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    async def run(self, task: Task, rollouts: Sequence[Rollout]) -> list[Answer]:
        self.asked.append(task.id)
        if task.draw < 2:
            return [Answer(error="ZeroDivisionError", traceback=f"of task {task.id}") for _ in rollouts]
        return [Answer(reward=1.0) for _ in rollouts]

    def close(self) -> None: ...


def collected(events, environment, reward, errors):
    return collect(
        events, TASKS, 2, environment, reward, None, SAMPLING, seed=0, step=0, deadline_s=30, errors=errors
    )


def test_the_first_failure_is_shown_although_groups_are_scored_one_after_the_other(events):
    environment, inner = Staggered(), CustomReward(Runner())

    class Reward:
        @property
        def first_traceback(self) -> str:
            return inner.first_traceback

        async def score(self, task: Task, rollouts_G: Sequence[Rollout]) -> list[Score]:
            scores = await inner.score(task, rollouts_G)
            # The next group is sampled once this one's scores are back.
            asyncio.get_running_loop().call_later(0.02, lambda: asyncio.ensure_future(environment.one_more()))
            return scores

    with pytest.raises(RewardError, match=r"2 of 8 rewards .*\nof task 0\n"):
        collected(events, environment, Reward(), RewardErrors(0.1))
    assert inner.first_traceback == ""  # it has forgotten by now, so this is no test of the reward


def test_after_an_engine_error_the_other_attempts_are_ended_and_no_group_is_scored(events):
    environment, runner = Staggered(broken=0), Runner()
    with pytest.raises(EngineError, match="the engine died"):
        collected(events, environment, CustomReward(runner), RewardErrors(0.1))
    assert (environment.ended, runner.asked) == (len(TASKS) - 1, [])
