"""Tasks and rollouts for rewards."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from retrain.types import Message, Rollout, Score, Task


def _rollout(text: str, *, tokens: int = 1, error: str = "", stop: str = "stop") -> Rollout:
    ids = np.arange(tokens + 1, dtype=np.int32)
    sampled = np.array([False] + [True] * tokens)
    logprobs = np.where(sampled, np.float32(-1), np.float32(np.nan)).astype(np.float32)
    return Rollout("t/0", 0, ids, sampled, logprobs, None, text, "error" if error else stop, 0, error=error)


@pytest.fixture(scope="session")
def make_rollout():
    """A maker of rollouts: text, number of sampled tokens, error."""
    return _rollout


@pytest.fixture(scope="session")
def score_all():
    """Scores texts or rollouts of one task: ``(reward, reference, *texts) -> scores``."""

    def score(
        reward: Any,
        reference: str,
        *texts: str | Rollout,
        source: str = "t",
        info: Mapping[str, Any] | None = None,
    ) -> list[Score]:
        task = Task("t/0", (Message("user", "q"),), reference, source, 0, info or {})
        rollouts = [_rollout(t) if isinstance(t, str) else t for t in texts]
        return asyncio.run(reward.score(task, rollouts))

    return score
