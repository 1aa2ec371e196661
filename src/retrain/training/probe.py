"""A few tasks sampled with the real model before a run: how many groups would carry no signal, how long answers are, how
many are cut. The run's own parts do it, in a temporary folder, and nothing is trained."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from retrain.config.schema import Config
from retrain.training.build import Check, build
from retrain.training.evaluate import interval
from retrain.training.rollout import RewardErrors, collect
from retrain.types import ScoredGroup

_Z95 = 1.959963984540054


@dataclass(frozen=True, slots=True)
class Range:
    """A value with its 95 % interval over tasks."""

    value: float
    low: float
    high: float

    def to_json(self) -> dict[str, float]:
        """The three numbers by name."""
        return {"value": self.value, "low": self.low, "high": self.high}


@dataclass(frozen=True, slots=True)
class Probe:
    """What ``tasks`` groups showed: shares in [0, 1], lengths in tokens. ``correct`` is None where the reward does not
    say what is correct; ``prompt`` is the mean length of a prompt; ``seconds`` what sampling and scoring took."""

    tasks: int
    rollouts: int
    silent: Range
    truncated: Range
    length: Range
    median: float
    p95: float
    prompt: float
    reward: Range
    errors: int
    seconds: float


def probe(config: Config, tasks: int, check: Check) -> Probe:
    """Sample the first ``tasks`` tasks of the run, ``training.group_size`` answers each; RetrainError as a run raises it."""
    config = _without_traces(config)
    with (
        tempfile.TemporaryDirectory(prefix="retrain-probe-") as folder,
        build(config, Path(folder), clear=False, plain=True, check=check) as parts,
    ):
        parts.engine.load(parts.backend.publish())
        got = collect(
            parts.events, parts.tasks.take(tasks), config.training.group_size, parts.environment, parts.reward,
            parts.engine, parts.sampling, seed=max(0, config.training.seed), step=0,
            deadline_s=config.training.phase_timeout_s, errors=RewardErrors(config.reward.max_error_rate),
        )  # fmt: skip
        return summary(got.groups_P, got.sample_time_s + got.score_time_s)


def _without_traces(config: Config) -> Config:
    """Nothing that leaves the machine, or stays on it."""
    logging = config.logging.model_copy(update={"wandb_project": "", "trackers": (), "rollouts": False})
    held_out = config.eval.model_copy(update={"source": "", "suites": ()})
    return config.model_copy(update={"logging": logging, "eval": held_out})


def summary(groups: Sequence[ScoredGroup], seconds: float) -> Probe:
    """The numbers of some groups."""
    silent: list[list[bool]] = []
    cut: list[list[bool]] = []
    lengths: list[list[int]] = []
    rewards: list[list[float]] = []
    prompts: list[int] = []
    errors = 0
    for group in groups:
        valid = group.valid_G
        errors += int(len(valid) - sum(valid))
        seen = [s.reward for s, v in zip(group.scores_G, valid, strict=True) if v]
        answers = [r for r, v in zip(group.rollouts_G, valid, strict=True) if v]
        silent.append([len(set(seen)) <= 1])
        if not answers:
            continue
        cut.append([r.stop == "length" for r in answers])
        lengths.append([r.num_sampled for r in answers])
        rewards.append(seen)
        prompts += [len(r.token_ids_T) - r.num_sampled for r in answers[:1]]
    flat = np.array([n for row in lengths for n in row] or [0])
    return Probe(
        len(groups), sum(len(g.rollouts_G) for g in groups),
        Range(*interval(silent)), Range(*interval(cut)) if cut else Range(0.0, 0.0, 1.0),
        _mean(lengths), float(np.median(flat)), float(np.percentile(flat, 95)),
        float(np.mean(prompts)) if prompts else 0.0, _mean(rewards), errors, seconds,
    )  # fmt: skip


def _mean(rows: Sequence[Sequence[float]]) -> Range:
    """The mean of the tasks' means, with the error that their spread implies."""
    means = np.array([np.mean(row) for row in rows if row], dtype=np.float64)
    if not len(means):
        return Range(0.0, 0.0, 0.0)
    value = float(means.mean())
    half = (
        _t95(len(means) - 1) * float(means.std(ddof=1)) / len(means) ** 0.5 if len(means) > 1 else abs(value)
    )
    return Range(value, value - half, value + half)


def _t95(freedom: int) -> float:
    """Student's 97.5 % quantile from the normal one (Cornish and Fisher's expansion, to a percent from 3 degrees on)."""
    z = _Z95
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
