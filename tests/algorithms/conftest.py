"""Makers of rollouts, groups and algorithms over a toy tokenizer of pieces of text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import settings

from retrain.algorithms import advantages, transforms
from retrain.algorithms.credit import Algorithm
from retrain.algorithms.planning import RegexDetector
from retrain.types import IntArray, Message, Rollout, Score, ScoredGroup, Task

PIECES = (
    "<prompt>", "<end>", "wa", "it", ",", " let", " me", " the", " sum", " is", " 12", "\n", "that", "'", "s",
    " not", " ri", "ght", " so",
)  # fmt: skip
# The same examples in every run, and no clock: machines that are busy are slow, not wrong.
settings.register_profile("retrain", deadline=None, derandomize=True, database=None)
settings.load_profile("retrain")

END = PIECES.index("<end>")


def toy_offsets(token_ids: IntArray) -> tuple[str, list[tuple[int, int]]]:
    """Text and ranges of pieces; the end token has no width."""
    text, spans = "", []
    for i in token_ids.tolist():
        start = len(text)
        text += "" if i == END else PIECES[i]
        spans.append((start, len(text)))
    return text, spans


@pytest.fixture(scope="session")
def toy() -> Callable[[IntArray], tuple[str, list[tuple[int, int]]]]:
    """The toy tokenizer's offsets."""
    return toy_offsets


@pytest.fixture(scope="session")
def make_rollout() -> Callable[..., Rollout]:
    """A rollout with ``prompt`` prompt tokens and sampled ``words`` (or ``n`` random pieces) from a seed."""

    def make(
        seed: int = 0, *, prompt: int = 3, n: int = 12, words: Sequence[str] = (), entropies: bool = True,
        sampled: Sequence[bool] = (), error: str = "", member: int = 0,
    ) -> Rollout:  # fmt: skip
        rng = np.random.default_rng(seed)
        own = [PIECES.index(w) for w in words] or rng.integers(2, len(PIECES), size=n).tolist()
        ids = np.array([0] * prompt + own + [END], dtype=np.int32)
        sampled_T = np.arange(len(ids)) >= prompt
        if len(sampled):
            sampled_T[prompt:-1] = sampled
        values = rng.exponential(size=len(ids)).astype(np.float32)
        entropy = rng.exponential(size=len(ids)).astype(np.float32)
        return Rollout(
            task_id="t", member=member, token_ids_T=ids, sampled_T=sampled_T,
            logprobs_T=np.where(sampled_T, -values, np.float32(np.nan)),
            entropies_T=np.where(sampled_T, entropy, np.float32(np.nan)) if entropies else None,
            text="", stop="error" if error else "stop", weights_version=0, error=error,
        )  # fmt: skip

    return make


@pytest.fixture(scope="session")
def make_group(make_rollout: Callable[..., Rollout]) -> Callable[..., ScoredGroup]:
    """A group of random rollouts with the given rewards; None is a reward that failed."""

    def make(
        rewards: Sequence[float | None], *, seed: int = 0, passed: bool | None = None, **kind: Any
    ) -> ScoredGroup:
        rollouts = tuple(make_rollout(100 * seed + i, n=8 + i, member=i, **kind) for i in range(len(rewards)))
        scores = tuple(Score.failed("broke") if r is None else Score(r, passed=passed) for r in rewards)
        return ScoredGroup(Task("t", (Message("user", "q"),), "12", "toy", 0), rollouts, scores)

    return make


@pytest.fixture(scope="session")
def make_algorithm() -> Callable[..., Algorithm]:
    """grpo + none over the toy tokenizer, changed by keyword."""

    def make(**changed: Any) -> Algorithm:
        parts: dict[str, Any] = {
            "advantage": advantages.grpo, "advantage_name": "grpo",
            "transform": transforms.none, "transform_name": "none",
            "uncertainty": transforms.surprisal, "uncertainty_name": "surprisal",
            "detector": RegexDetector(), "detector_name": "regex",
            "offsets": toy_offsets, "params": {"beta": 0.1, "alpha": 0.2, "rho": 0.2}, "correct_at": None,
        }  # fmt: skip
        return Algorithm(**{**parts, **changed})

    return make
