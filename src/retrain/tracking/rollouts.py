"""Every rollout of a step in one compressed file: what a replay needs and no text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retrain.tracking import layout
from retrain.types import CreditedGroup


class RolloutStore:
    """Writes ``rollouts/step_000003.npz`` and its like below a run directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        (directory / layout.ROLLOUTS).mkdir(parents=True, exist_ok=True)

    def write(self, step: int, groups_P: Sequence[CreditedGroup]) -> None:
        """Store a 0-based step's rollouts."""
        _write(self._directory / layout.rollout_file(step), groups_P)


def cut(directory: Path, step: int) -> None:
    """Delete a run's stored rollouts of 0-based steps from ``step`` on, whether or not it still stores them."""
    for path in (directory / layout.ROLLOUTS).glob("step_*.npz"):
        number = layout.checkpoint_step(path.stem)
        if number is not None and number >= step:
            path.unlink()


def _write(path: Path, groups_P: Sequence[CreditedGroup]) -> None:
    """All rollouts of a step as flat arrays: ids, logprobs, masks and rewards, with one offset per rollout."""
    rollouts = [r for g in groups_P for r in g.scored.rollouts_G]
    scores = [s for g in groups_P for s in g.scored.scores_G]
    arrays: dict[str, Any] = {
        "offsets": np.cumsum([0, *(len(r.token_ids_T) for r in rollouts)]).astype(np.int64),
        "token_ids": np.concatenate([r.token_ids_T for r in rollouts]),
        "sampled": np.packbits(np.concatenate([r.sampled_T for r in rollouts])),
        "planning": np.packbits(np.concatenate([p for g in groups_P for p in g.planning_G_T])),
        "logprobs": np.concatenate([r.logprobs_T for r in rollouts]),
        "rewards": np.array([s.reward for s in scores], dtype=np.float64),
        "valid": np.concatenate([g.scored.valid_G for g in groups_P]),
        "draw": np.array([g.scored.task.draw for g in groups_P for _ in g.scored.rollouts_G], dtype=np.int64),
        "member": np.array([r.member for r in rollouts], dtype=np.int32),
        "weights_version": np.array([r.weights_version for r in rollouts], dtype=np.int64),
    }
    entropies = [r.entropies_T for r in rollouts if r.entropies_T is not None]
    if len(entropies) == len(rollouts):
        arrays["entropies"] = np.concatenate(entropies)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)
    temporary.replace(path)
