"""The single-turn environment: what a rollout holds, which failures are data and which are not."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from retrain.environments.single_turn import SingleTurn, build
from retrain.errors import EngineError
from retrain.types import Completion, Message, NoiseKey, Sampling, Task

TASK = Task("t/0", (Message("user", "5+5"),), "10", "t", 0)
SAMPLING = Sampling(1.0, 1.0, 8, (0,), (), True, NoiseKey(1, 2, 3))


class Letters:
    """A character is its code point; 0 ends."""

    stop_ids = (0,)

    def encode(self, messages):
        if any(m.role == "system" for m in messages):
            raise ValueError("no system role")
        return np.array([ord(c) for m in messages for c in m.content], dtype=np.int32)

    def decode(self, token_ids):
        return "".join(chr(i) for i in token_ids if i)

    def offsets(self, token_ids):
        raise NotImplementedError


class Scripted:
    """An engine that answers "a", "bb", "ccc", ... with logprobs -1, -2, ...; the last one is cut short."""

    def __init__(self, fail: Exception | None = None, entropies: bool = True, missing: int = 0):
        self.fail, self.entropies, self.missing = fail, entropies, missing
        self.asked: list[tuple[list[int], int, Sampling]] = []

    def load(self, weights):
        raise NotImplementedError

    async def generate(self, prompt_ids, n, sampling):
        self.asked.append((prompt_ids.tolist(), n, sampling))
        if self.fail:
            raise self.fail
        made = []
        for i in range(n - self.missing):
            cut = i == n - 1
            ids = np.array([97 + i] * (i + 1) + ([] if cut else [0]), dtype=np.int32)
            logprobs = -np.arange(1, len(ids) + 1, dtype=np.float32)
            entropies = np.full(len(ids), 0.5, dtype=np.float32) if self.entropies else None
            made.append(Completion(ids, logprobs, entropies, "length" if cut else "stop", weights_version=4))
        return made

    def close(self):
        pass


def attempt(engine, *, task=TASK, n=3, environment=None, sampling=SAMPLING):
    return asyncio.run((environment or SingleTurn(Letters())).attempt(task, n, engine, sampling))


def test_a_rollout_is_the_prompt_and_what_was_sampled():
    engine = Scripted()
    rollouts = attempt(engine)
    assert engine.asked == [([53, 43, 53], 3, SAMPLING)]
    assert [r.text for r in rollouts] == ["a", "bb", "ccc"]
    assert [r.stop for r in rollouts] == ["stop", "stop", "length"]
    assert [r.member for r in rollouts] == [0, 1, 2]
    for r in rollouts:
        assert (r.task_id, r.weights_version, r.error) == ("t/0", 4, "")
        assert r.token_ids_T[:3].tolist() == [53, 43, 53]
        assert r.sampled_T.tolist() == [False] * 3 + [True] * (len(r.token_ids_T) - 3)
        assert np.isnan(r.logprobs_T[:3]).all()
        assert np.isnan(r.entropies_T[:3]).all()
        assert r.logprobs_T[3:].tolist() == [-1.0, -2.0, -3.0][: r.num_sampled]
        assert (r.token_ids_T.dtype, r.sampled_T.dtype, r.logprobs_T.dtype, r.entropies_T.dtype) == (
            np.int32, np.bool_, np.float32, np.float32,
        )  # fmt: skip


def test_entropies_are_only_there_when_the_engine_gave_them():
    assert all(r.entropies_T is None for r in attempt(Scripted(entropies=False)))


def test_members_follow_the_noise_key():
    late = replace(SAMPLING, noise=replace(SAMPLING.noise, member=5))
    assert [r.member for r in attempt(Scripted(), sampling=late)] == [5, 6, 7]
    refused = replace(TASK, messages=(Message("system", "x"),))
    assert [r.member for r in attempt(Scripted(), sampling=late, task=refused)] == [5, 6, 7]


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ((Message("system", "x"), Message("user", "y")), "cannot be rendered: no system role"),
        ((Message("user", ""),), "no tokens"),
        ((Message("user", "x" * 10),), "10 tokens fill the model's context of 10"),
    ],
)
def test_a_tasks_own_failure_is_data(messages, said):
    engine = Scripted()
    environment = SingleTurn(Letters(), context_length=10)
    rollouts = attempt(engine, task=replace(TASK, messages=messages), environment=environment)
    assert [r.stop for r in rollouts] == ["error"] * 3
    assert all(said in r.error for r in rollouts)
    assert not engine.asked


@pytest.mark.parametrize("error", [EngineError("it died"), ValueError("shapes"), KeyError("x")])
def test_what_the_engine_raises_stops_the_run(error):
    with pytest.raises(type(error)):
        attempt(Scripted(fail=error))


def test_a_missing_completion_is_a_bug_and_says_so():
    with pytest.raises(RuntimeError, match="2 completions instead of 3"):
        attempt(Scripted(missing=1))


def test_build_takes_the_context_from_the_renderer():
    renderer = Letters()
    renderer.context_length = 3
    rollouts = attempt(Scripted(), environment=build(SimpleNamespace(), renderer))
    assert rollouts[0].stop == "error"
    assert attempt(Scripted(), environment=build(SimpleNamespace(), Letters()))[0].stop == "stop"
