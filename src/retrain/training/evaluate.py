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
from retrain.training.rollout import EventLoop, RewardErrors, collect
from retrain.types import Sampling, Task

EVALUATION_STEP = -1
"""The step number in evaluation noise: a stream that no training step uses."""

_Z95 = 1.959963984540054

Answers = dict[tuple[str, str], list[bool]]
"""Which answers were correct, by suite (the prefix of its metrics) and id of the task."""


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


def paired_interval(before: Answers, after: Answers) -> tuple[float, float, float, int]:
    """Mean change of accuracy over the tasks that both hold, its 95 % interval, and their number.

    The unit is the task, whose answers of both sides share their noise: its difference of mean accuracies takes part once,
    however often it was sampled. Half a task is added to each of the four outcomes, two tasks in all, as Agresti and Min do
    for single answers (Statistics in Medicine 2005), so that few or no differing tasks give no empty interval.
    """
    shared = [key for key in before if key in after]
    changes = np.array([np.mean(after[k]) - np.mean(before[k]) for k in shared], dtype=np.float64)
    n = len(changes) + 2
    centre = float(changes.sum()) / n
    half = _Z95 * math.sqrt(((float((changes**2).sum()) + 1) / n - centre**2) / n)
    mean = float(changes.mean()) if len(changes) else 0.0
    return mean, max(-1.0, centre - half), min(1.0, centre + half), len(changes)


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased chance that one of ``k`` samples is correct when ``c`` of ``n`` were (2107.03374)."""
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def noise_number(task_id: str) -> int:
    """The task's number in evaluation noise: a stable hash of its id."""
    return int.from_bytes(hashlib.blake2b(task_id.encode(), digest_size=7).digest(), "little")


@dataclass(frozen=True, slots=True)
class Evaluator:
    """Runs one fixed set of tasks. A rollout or reward that failed is left out and reported, never scored 0.

    ``prefix`` begins the names of its metrics: ``eval`` for the main set, ``eval/<name>`` for a further one.
    """

    tasks: tuple[Task, ...]
    samples: int
    sampling: Sampling
    seed: int
    correct_at: float | None
    name: str
    prefix: str = "eval"

    def run(
        self, loop: EventLoop, environment: Environment, reward: Reward, engine: Engine,
        *, deadline_s: float, max_error_rate: float, errors_of: RewardErrors | None = None, answers: Answers | None = None,
    ) -> tuple[dict[str, Any], int]:  # fmt: skip
        """Metrics ``<prefix>/...`` of the engine's present weights, and how many rewards failed.

        ``errors_of`` judges failed rewards where this is one of several suites. ``answers`` is told every task's.

        Accuracy, interval, mean@n and pass@k are None where a reward does not say what is correct (outside [0, 1]
        without ``reward.correct_at``). mean@n and pass@k are over the tasks with n and k valid samples.
        """
        tasks = [replace(t, draw=noise_number(t.id)) for t in self.tasks]
        got = collect(
            loop, tasks, self.samples, environment, reward, engine, self.sampling, seed=self.seed,
            step=EVALUATION_STEP, deadline_s=deadline_s, errors=errors_of or RewardErrors(max_error_rate),
        )  # fmt: skip
        verdicts: list[list[bool | None]] = []
        rewards: list[float] = []
        lengths: list[int] = []
        cut = errors = 0
        for task, group in zip(tasks, got.groups_P, strict=True):
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
            if answers is not None and row and None not in row:
                answers[self.prefix, task.id] = [v is True for v in row]
        judged = bool(verdicts) and all(v is not None for row in verdicts for v in row)
        marks = [[v is True for v in row] for row in verdicts]
        accuracy, low, high = interval(marks) if judged else (None, None, None)
        metrics: dict[str, Any] = {
            "source": self.name,
            "accuracy": accuracy,
            "accuracy_low": low,
            "accuracy_high": high,
            "tasks": len(tasks),
            "samples": self.samples,
            "mean_reward": float(np.mean(rewards)) if rewards else None,
            "mean_length": float(np.mean(lengths)) if lengths else None,
            "max_token_hit_rate": cut / len(lengths) if lengths else None,
            "errors": errors,
            "time_s": got.sample_time_s + got.score_time_s,
        }
        whole = [m for m in marks if len(m) == self.samples]
        known = judged and whole
        metrics[f"mean@{self.samples}"] = float(np.mean(whole)) if known else None
        k = 1
        while k <= self.samples:
            whole = [m for m in marks if len(m) >= k]
            known = judged and whole
            metrics[f"pass@{k}"] = (
                float(np.mean([pass_at_k(len(m), sum(m), k) for m in whole])) if known else None
            )
            k *= 2
        return {f"{self.prefix}/{key}": value for key, value in metrics.items()}, got.reward_errors


def macro_average(parts: Sequence[tuple[float, float, float]]) -> tuple[float, float, float]:
    """Mean of independent accuracies with the 95 % interval that theirs imply.

    Each is (accuracy, low, high). The distances to the limits add in squares (the method of variance estimates
    recovery; Zou and Donner, Statistics in Medicine 2008), so limits stay in [0, 1] and no normality is assumed.
    """
    p, low, high = np.array(parts, dtype=np.float64).T
    mean = float(p.mean())
    down, up = float(np.sqrt(((p - low) ** 2).sum())), float(np.sqrt(((high - p) ** 2).sum()))
    return mean, max(0.0, mean - down / len(p)), min(1.0, mean + up / len(p))


@dataclass(frozen=True, slots=True)
class Suites:
    """Several evaluations as one: the main one, if there is one, and the suites, in one row of metrics.

    Without a main one ``eval/accuracy`` is the plain mean of the suites' accuracies, whatever their sizes.
    """

    main: Evaluator | None
    suites: tuple[Evaluator, ...]

    @property
    def _parts(self) -> tuple[Evaluator, ...]:
        return (*((self.main,) if self.main else ()), *self.suites)

    @property
    def tasks(self) -> tuple[Task, ...]:
        """The held-out tasks of all of them."""
        return tuple(task for part in self._parts for task in part.tasks)

    @property
    def name(self) -> str:
        """What ``eval/accuracy`` was measured on."""
        return self.main.name if self.main else f"mean of {', '.join(p.name for p in self.suites)}"

    def run(
        self, loop: EventLoop, environment: Environment, reward: Reward, engine: Engine,
        *, deadline_s: float, max_error_rate: float, answers: Answers | None = None,
    ) -> tuple[dict[str, Any], int]:  # fmt: skip
        """The metrics of all of them, and how many rewards failed."""
        found: list[dict[str, Any]] = []
        failed = 0
        together = RewardErrors(max_error_rate, sum(len(part.tasks) * part.samples for part in self._parts))
        for part in self._parts:
            metrics, errors = part.run(
                loop, environment, reward, engine, deadline_s=deadline_s, max_error_rate=max_error_rate, errors_of=together,
                answers=answers,
            )
            found.append(metrics)
            failed += errors
        merged = {key: value for metrics in found for key, value in metrics.items()}
        if self.main:
            return merged, failed
        keys = ("accuracy", "accuracy_low", "accuracy_high")
        each = [tuple(merged[f"{part.prefix}/{key}"] for key in keys) for part in self.suites]
        judged = all(value is not None for part in each for value in part)
        accuracy = macro_average([(p, low, high) for p, low, high in each]) if judged else (None, None, None)
        rewards = [merged[f"{part.prefix}/mean_reward"] for part in self.suites]
        whole = {
            "eval/source": self.name,
            **dict(zip((f"eval/{key}" for key in keys), accuracy, strict=True)),
            "eval/tasks": len(self.tasks),
            "eval/samples": self.suites[0].samples if len({part.samples for part in self.suites}) == 1 else None,
            "eval/mean_reward": None if None in rewards else float(np.mean(rewards)),
            "eval/errors": sum(merged[f"{part.prefix}/errors"] for part in self.suites),
            "eval/time_s": sum(merged[f"{part.prefix}/time_s"] for part in self.suites),
        }
        return {**whole, **merged}, failed
