"""Reward ``match``: the last box of a response must equal the reference as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from retrain.boxed import last_boxed
from retrain.protocols import Renderer
from retrain.types import Rollout, Score, Task

if TYPE_CHECKING:
    from retrain.config.schema import Config

__all__ = ["Match", "build", "last_boxed"]


class Match:
    """1.0 for equality after trimming, else 0.0. An empty reference is never matched."""

    bounds = (0.0, 1.0)

    async def score(self, task: Task, rollouts_G: Sequence[Rollout]) -> list[Score]:
        """One score per rollout; a rollout that broke keeps its error."""
        reference = task.reference.strip()
        scores: list[Score] = []
        for rollout in rollouts_G:
            if rollout.stop == "error":
                scores.append(Score.failed(rollout.error))
                continue
            box = last_boxed(rollout.text)
            passed = bool(reference) and box is not None and box.strip() == reference
            scores.append(Score(reward=float(passed), passed=passed))
        return scores

    def close(self) -> None:
        """Nothing to release."""


def build(config: Config, renderer: Renderer) -> Match:
    """The reward of a configuration; it has no settings."""
    return Match()
