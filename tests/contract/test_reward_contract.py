"""Every reward: one score per rollout in order, finite or an error; the reference answer passes."""

from __future__ import annotations

import asyncio
import math

import numpy as np
import pytest

from retrain import plugins
from retrain.config.names import BUILT
from retrain.protocols import Reward
from retrain.rewards.generated import Generated
from retrain.types import Message, Rollout, Task

# For reasoning_gym, a recipe whose answer is 42.
RECIPE = {"generator": "count_primes", "config": {"seed": 587, "size": 1}, "index": 0}
TASK = Task("t/0", (Message("user", "6*7?"),), "42", "t", 0, {"recipe": RECIPE})


def rollout(text: str, error: str = "") -> Rollout:
    ids, sampled, logprobs = (
        np.array([1, 2], np.int32),
        np.array([False, True]),
        np.array([np.nan, -1], np.float32),
    )
    stop = "error" if error else "stop"
    return Rollout("t/0", 0, ids, sampled, logprobs, None, text, stop, 0, error=error)


VARIANTS = {"custom, unprotected": "custom", "routed to math": "routed", "routed, soft": "routed"}
"""Further forms of a reward, besides every built-in name."""

PARTS = [
    {"type": "match"},
    {"type": "length", "unit": "characters", "max": 10**9, "weight": 0.0, "gate": True},
    {"type": "penalize_text_containing", "texts": ["never written"]},
]


@pytest.fixture(params=[*BUILT["reward"], *VARIANTS])
def reward(request, tmp_path, monkeypatch, make_config):
    (tmp_path / "contract_reward.py").write_text(
        "def score(response, reference):\n    return float(f'\\\\boxed{{{reference}}}' in response)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    name = VARIANTS.get(request.param, request.param)
    settings = {
        "type": "match" if name == "routed" else name,
        "custom_module": "contract_reward",
        "timeout_s": 20.0,
        "isolate": request.param == "custom",
        "parts": PARTS if name == "composite" else [],
    }
    sections = {"reward": settings}
    if request.param == "routed to math":
        sections["data"] = {"source": "mixture", "mixture": [{"source": "t", "reward": "math"}]}
    if request.param == "routed, soft":
        sections["training"] = {"truncated": "soft"}
    made = plugins.load("reward", name)(make_config(**sections), None)
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
    rewards = [s.reward for s in scores]
    if isinstance(reward, Generated):
        assert 0.0 < rewards[3] < 0.5  # generators give something for an answer that holds the right one
        rewards[3] = 0.0
    assert rewards == [1.0, 0.0, 0.0, 0.0, 0.0, 1.0]
    assert all(math.isfinite(s.reward) and not s.error for s in scores)
    assert score(reward, []) == []


def test_a_broken_rollout_is_never_scored(reward):
    scores = score(reward, [rollout("", error="it broke"), rollout("\\boxed{42}")])
    assert [s.error for s in scores] == ["it broke", ""]
    assert math.isnan(scores[0].reward)


def test_it_says_its_range_and_keeps_it(reward):
    if reward.bounds is not None:
        low, high = reward.bounds
        assert all(low <= s.reward <= high for s in score(reward, [rollout("\\boxed{42}"), rollout("")]))
    assert getattr(reward, "first_traceback", "") == ""


def test_groups_may_be_scored_at_once(reward):
    async def both():
        return await asyncio.gather(*(reward.score(TASK, [rollout(t)] * 3) for t in ("\\boxed{42}", "x")))

    assert [[s.reward for s in g] for g in asyncio.run(both())] == [[1.0] * 3, [0.0] * 3]
