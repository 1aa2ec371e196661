"""Held-out evaluation: the same tasks and the same noise every time, accuracy with a clustered 95 % interval."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from retrain.algorithms.credit import correct
from retrain.protocols import Engine, Environment, Reward
from retrain.training.rollout import EventLoop, collect
from retrain.types import Sampling, Task

EVALUATION_STEP = -1
"""The step number in evaluation noise: a stream that no training step uses."""

_Z95 = 1.959963984540054


def interval(correct_by_task: Sequence[Sequence[bool]]) -> tuple[float, float, float]:
    """Mean accuracy with a 95 % Wilson interval whose sample size is corrected for clustering by task.

    The variance of the task means gives the number of independent draws that would be as informative (Miller,
    "Adding error bars to evals", 2411.00640, for the clustered error); with every answer equal it is the number
    of tasks. Values in [0, 1].
    """
    means = np.array([np.mean(c) for c in correct_by_task], dtype=np.float64)
    n = len(means)
    p = float(means.mean())
    spread = float(means.var(ddof=1)) / n if n > 1 else 0.0
    effective = p * (1 - p) / spread if spread > 0 else float(n)
    centre = (p + _Z95**2 / (2 * effective)) / (1 + _Z95**2 / effective)
    half = (
        _Z95 * math.sqrt(p * (1 - p) / effective + _Z95**2 / (4 * effective**2)) / (1 + _Z95**2 / effective)
    )
    return p, max(0.0, centre - half), min(1.0, centre + half)


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased chance that one of ``k`` samples is correct when ``c`` of ``n`` were (2107.03374)."""
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def noise_number(task_id: str) -> int:
    """The task's number in evaluation noise: a stable hash of its id."""
    return int.from_bytes(hashlib.blake2b(task_id.encode(), digest_size=7).digest(), "little")


@dataclass(frozen=True, slots=True)
class Evaluator:
    """Runs one fixed set of tasks. A rollout or reward that failed is left out and reported, never scored 0."""

    tasks: tuple[Task, ...]
    samples: int
    sampling: Sampling
    seed: int
    correct_at: float | None
    name: str

    def run(
        self, loop: EventLoop, environment: Environment, reward: Reward, engine: Engine,
        *, deadline_s: float, max_error_rate: float,
    ) -> tuple[dict[str, Any], int]:  # fmt: skip
        """Metrics ``eval/...`` of the engine's present weights, and how many rewards failed.

        Accuracy, interval and pass@k are None where a reward does not say what is correct (outside [0, 1]
        without ``reward.correct_at``).
        """
        tasks = [replace(t, draw=noise_number(t.id)) for t in self.tasks]
        got = collect(
            loop, tasks, self.samples, environment, reward, engine, self.sampling, seed=self.seed,
            step=EVALUATION_STEP, deadline_s=deadline_s, max_error_rate=max_error_rate,
        )  # fmt: skip
        verdicts: list[list[bool | None]] = []
        rewards: list[float] = []
        lengths: list[int] = []
        cut = errors = 0
        for group in got.groups_P:
            row: list[bool | None] = []
            for rollout, score, valid in zip(group.rollouts_G, group.scores_G, group.valid_G, strict=True):
                if not valid:
                    errors += 1
                    continue
                row.append(correct(score, self.correct_at))
                rewards.append(score.reward)
                lengths.append(rollout.num_sampled)
                cut += rollout.stop == "length"
            if row:
                verdicts.append(row)
        judged = bool(verdicts) and all(v is not None for row in verdicts for v in row)
        marks = [[v is True for v in row] for row in verdicts]
        accuracy, low, high = interval(marks) if judged else (None, None, None)
        metrics: dict[str, Any] = {
            "eval/source": self.name,
            "eval/accuracy": accuracy,
            "eval/accuracy_low": low,
            "eval/accuracy_high": high,
            "eval/tasks": len(tasks),
            "eval/samples": self.samples,
            "eval/mean_reward": float(np.mean(rewards)) if rewards else None,
            "eval/mean_length": float(np.mean(lengths)) if lengths else None,
            "eval/max_token_hit_rate": cut / len(lengths) if lengths else None,
            "eval/errors": errors,
            "eval/time_s": got.sample_time_s + got.score_time_s,
        }
        k = 1
        while k <= self.samples:
            whole = [m for m in marks if len(m) >= k]
            known = judged and whole
            metrics[f"eval/pass@{k}"] = (
                float(np.mean([pass_at_k(len(m), sum(m), k) for m in whole])) if known else None
            )
            k *= 2
        return metrics, got.reward_errors
