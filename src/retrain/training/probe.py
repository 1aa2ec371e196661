"""A few tasks sampled with the real model before a run: how many groups would carry no signal, how long answers are, how
many are cut. The run's own parts do it, in a temporary folder, and nothing is trained."""

from __future__ import annotations

import contextlib
import tempfile
import threading
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from retrain.config.schema import Config
from retrain.training.build import Check, build
from retrain.training.dry import load_renderer, without_torch
from retrain.training.evaluate import interval
from retrain.training.rollout import RewardErrors, collect
from retrain.types import ScoredGroup, Task

_T95 = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281, 2.2010, 2.1788, 2.1604, 2.1448, 2.1314,
)  # fmt: skip
"""Student's 97.5 % quantiles from one degree of freedom on."""
_Z95 = 1.959963984540054
_ENCODED = 16
"""Prompts that are encoded to find the longest."""
_TELL_S = 5.0
"""Seconds between two lines of progress."""


@dataclass(frozen=True, slots=True)
class Range:
    """A value with its 95 % interval over tasks; ``low`` and ``high`` are None for a single task, which implies none."""

    value: float
    low: float | None
    high: float | None

    def to_json(self) -> dict[str, float | None]:
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


def probe(config: Config, tasks: int, check: Check, say: Callable[[str], None]) -> Probe:
    """Sample the first ``tasks`` tasks of the run, ``training.group_size`` answers each; fewer where it has fewer. ``say``
    is told how far it is, in lines. RetrainError as a run raises it."""
    config = _without_traces(config)
    say("loading the model")
    with (
        tempfile.TemporaryDirectory(prefix="retrain-probe-") as folder,
        build(config, Path(folder), clear=False, plain=True, check=check) as parts,
    ):
        there = len(parts.tasks)
        if there < tasks:
            say(f"there are {there} tasks, fewer than {tasks}: each is sampled once")
        taken = parts.tasks.take(min(tasks, there))
        parts.engine.load(parts.backend.publish())
        say(f"sampling {len(taken)} x {config.training.group_size} answers")
        with _told(parts.engine, len(taken) * config.training.group_size, say):
            got = collect(
                parts.events, taken, config.training.group_size, parts.environment, parts.reward,
                parts.engine, parts.sampling, seed=max(0, config.training.seed), step=0,
                deadline_s=config.training.phase_timeout_s, errors=RewardErrors(config.reward.max_error_rate),
            )  # fmt: skip
        return summary(got.groups_P, got.sample_time_s + got.score_time_s)


def longest_prompt(config: Config, tasks: Sequence[Task]) -> int:
    """Tokens of the longest prompt of ``tasks``, by the tokenizer and chat template of ``config.model``, without torch
    where nothing else wants it; ModelError where they cannot be loaded."""
    with without_torch():
        renderer = load_renderer(config)
    # The longest by characters hold the longest by tokens, near enough.
    longest = sorted(tasks, key=lambda t: -sum(len(m.content) for m in t.messages))[:_ENCODED]
    return max((len(renderer.encode(t.messages)) for t in longest), default=0)


@contextlib.contextmanager
def _told(engine: Any, answers: int, say: Callable[[str], None]) -> Generator[None]:
    """Meanwhile a line every few seconds, where the engine counts what has ended."""
    over = threading.Event()

    def tell() -> None:
        while not over.wait(_TELL_S):
            if (finished := getattr(engine, "finished", None)) is not None:
                say(f"{finished} of {answers} answers")

    teller = threading.Thread(target=tell, name="retrain-probe", daemon=True)
    teller.start()
    try:
        yield
    finally:
        over.set()
        teller.join()


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
        _share(silent), _share(cut),
        _mean(lengths), float(np.median(flat)), float(np.percentile(flat, 95)),
        float(np.mean(prompts)) if prompts else 0.0, _mean(rewards), errors, seconds,
    )  # fmt: skip


def _share(rows: Sequence[Sequence[bool]]) -> Range:
    """A share of tasks or answers, in [0, 1]."""
    if not rows:
        return Range(0.0, None, None)
    value, low, high = interval(rows)
    return Range(value, low, high) if len(rows) > 1 else Range(value, None, None)


def _mean(rows: Sequence[Sequence[float]]) -> Range:
    """The mean of the tasks' means, with the error that their spread implies."""
    means = np.array([np.mean(row) for row in rows if row], dtype=np.float64)
    value = float(means.mean()) if len(means) else 0.0
    if len(means) < 2:
        return Range(value, None, None)
    half = _t95(len(means) - 1) * float(means.std(ddof=1)) / len(means) ** 0.5
    return Range(value, value - half, value + half)


def _t95(freedom: int) -> float:
    """Student's 97.5 % quantile: of a table, and beyond it from the normal one (Cornish and Fisher's expansion, within
    0.001 there)."""
    if freedom <= len(_T95):
        return _T95[freedom - 1]
    z = _Z95
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
