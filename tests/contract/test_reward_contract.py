"""Every reward: one score per rollout in order, finite or an error; the reference answer passes."""

from __future__ import annotations

import asyncio
import math
from types import SimpleNamespace

import numpy as np
import pytest

from retrain import plugins
from retrain.config.names import BUILT
from retrain.protocols import Reward
from retrain.types import Message, Rollout, Task

TASK = Task("t/0", (Message("user", "6*7?"),), "42", "t", 0)


def rollout(text: str, error: str = "") -> Rollout:
    ids, sampled, logprobs = (
        np.array([1, 2], np.int32),
        np.array([False, True]),
        np.array([np.nan, -1], np.float32),
    )
    stop = "error" if error else "stop"
    return Rollout("t/0", 0, ids, sampled, logprobs, None, text, stop, 0, error=error)


@pytest.fixture(params=[*BUILT["reward"], "custom, unprotected"])
def reward(request, tmp_path, monkeypatch):
    (tmp_path / "contract_reward.py").write_text(
        "def score(response, reference):\n    return float(f'\\\\boxed{{{reference}}}' in response)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    settings = SimpleNamespace(
        custom_module="contract_reward",
        custom_function="score",
        timeout_s=20.0,
        isolate=request.param == "custom",
    )
    made = plugins.load("reward", request.param.partition(",")[0])(SimpleNamespace(reward=settings), None)
    yield made
    made.close()
    made.close()


def score(reward, rollouts):
    return asyncio.run(reward.score(TASK, rollouts))


def test_it_is_a_reward(reward):
    assert isinstance(reward, Reward)


def test_the_reference_answer_passes_and_another_does_not(reward):
    right, wrong = score(reward, [rollout("It is \\boxed{42}."), rollout("It is \\boxed{41}.")])
    assert right.reward == 1.0
    assert wrong.reward == 0.0
    assert right.passed in (True, None)


def test_one_finite_score_per_rollout_in_order(reward):
    texts = ["\\boxed{42}", "", "nothing", "\\boxed{42", "\ud800\x00😀", "\\boxed{42}" * 1000]
    scores = score(reward, [rollout(t) for t in texts])
    assert len(scores) == len(texts)
    assert [s.reward for s in scores] == [1.0, 0.0, 0.0, 0.0, 0.0, 1.0]
    assert all(math.isfinite(s.reward) and not s.error for s in scores)
    assert score(reward, []) == []


def test_a_broken_rollout_is_never_scored(reward):
    scores = score(reward, [rollout("", error="it broke"), rollout("\\boxed{42}")])
    assert [s.error for s in scores] == ["it broke", ""]
    assert math.isnan(scores[0].reward)


def test_groups_may_be_scored_at_once(reward):
    async def both():
        return await asyncio.gather(*(reward.score(TASK, [rollout(t)] * 3) for t in ("\\boxed{42}", "x")))

    assert [[s.reward for s in g] for g in asyncio.run(both())] == [[1.0] * 3, [0.0] * 3]
