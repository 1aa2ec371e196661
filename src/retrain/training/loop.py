"""The training loop: sample, score, credit, pack, train, log, evaluate, save. Start reading here.

It knows protocols only: which model, engine, reward or algorithm runs was decided in ``training/build.py``.
Synchronous and on-policy; overlapped sampling would be a second loop, not a flag in this one.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from retrain.algorithms.credit import Algorithm, credit_step
from retrain.algorithms.sepa import SepaSchedule
from retrain.algorithms.statistics import step_stats
from retrain.config.schema import Config
from retrain.errors import OutOfMemory, RetrainError
from retrain.protocols import Backend, Engine, Environment, Reward, Sizer, State, Stateful, TaskSource
from retrain.tracking.run_log import RunLog
from retrain.training.batch import pack
from retrain.training.checkpoint import Checkpoints
from retrain.training.counters import NO_SIGNAL, Counters
from retrain.training.evaluate import Evaluator, Suites
from retrain.training.metrics import (
    announce_groups,
    condition_metrics,
    learner_metrics,
    rollout_metrics,
    sampled,
    time_metrics,
)
from retrain.training.optim import optim_at
from retrain.training.rollout import Collected, EventLoop, collect_signal
from retrain.types import OptimStep, Sampling, StepReport, TrainBatch

log = logging.getLogger("retrain")


@dataclass(slots=True)
class Parts:
    """Everything a run consists of; tests pass their own."""

    backend: Backend
    engine: Engine
    environment: Environment
    reward: Reward
    tasks: TaskSource
    algorithm: Algorithm
    schedule: SepaSchedule
    sampling: Sampling
    evaluator: Evaluator | Suites | None
    checkpoints: Checkpoints
    log: RunLog
    events: EventLoop
    sizer: Sizer | None = None
    """Chooses each step's batch size; None: ``training.batch_size``."""
    facts: State = field(default_factory=dict[str, Any])
    """Versions, device and threads of this start: stored with every checkpoint, compared on resume."""
    counters: Counters = field(default_factory=Counters)
    loaded: int = -1
    """Version of the weights that the present step samples with."""

    @property
    def stateful(self) -> dict[str, Stateful]:
        """Everything with memory besides the backend: exact resume is this list."""
        parts: dict[str, Any] = {
            "counters": self.counters, "tasks": self.tasks, "schedule": self.schedule, "engine": self.engine, "log": self.log,
            "sizer": self.sizer,
        }  # fmt: skip
        return {name: part for name, part in parts.items() if isinstance(part, Stateful)}


def train(config: Config, parts: Parts, stop: threading.Event) -> Literal["done", "interrupted"]:
    """Run from ``parts.counters.step`` to ``training.max_steps``; ``stop`` ends the run after its present step.

    A RetrainError leaves a checkpoint of the last completed step behind before it is raised.
    """
    parts.log.follow(parts.engine, parts.counters)
    parts.events.announce = parts.log.collecting
    with parts.checkpoints:
        return _train(config, parts, stop)


def _train(config: Config, parts: Parts, stop: threading.Event) -> Literal["done", "interrupted"]:
    counters, training = parts.counters, config.training
    saved_at = counters.step if counters.step else -1
    if counters.evaluated_at < counters.step and _evaluation_due(config, parts):
        _evaluate(config, parts)
    while counters.step < training.max_steps and not stop.is_set():
        parts.checkpoints.check()
        before = _state(parts)
        accuracy = None
        try:
            _step(config, parts)
            done = counters.step
            last = done == training.max_steps
            if _evaluation_due(config, parts):
                accuracy = _evaluate(config, parts)
        except RetrainError:
            # A step that broke before its update leaves the learner where the step began; one that broke
            # after it has been counted.
            unfinished = counters.step == before["counters"]["step"]
            written = parts.checkpoints.settle()
            if unfinished and parts.backend.publish().version != parts.loaded:
                # Some of a step's updates were made: what the learner is now belongs to no completed step.
                log.warning(
                    "Step %d broke between its updates: resuming starts at an earlier checkpoint.",
                    counters.step,
                )
            elif not (unfinished and written and saved_at == counters.step):
                _save_in_spite(parts, before if unfinished else _state(parts))
            raise
        if last or (training.save_every and done % training.save_every == 0):
            _save(parts, _state(parts), accuracy=accuracy)
            saved_at = done
    if saved_at != counters.step:
        _save(parts, _state(parts), accuracy=None)
    if counters.step and not counters.steps_with_signal:
        log.warning(NO_SIGNAL)
    return "done" if counters.step >= training.max_steps else "interrupted"


def _step(config: Config, parts: Parts) -> None:
    counters, training = parts.counters, config.training
    step, size = counters.step, parts.sizer.next() if parts.sizer else training.batch_size
    parts.log.phase("sampling", of=size * training.group_size)
    started = time.perf_counter()
    weights = parts.backend.publish()
    parts.loaded = weights.version
    parts.engine.load(weights)
    synced = time.perf_counter()
    sepa_lambda, gate_open = parts.schedule.lambda_at(step), parts.schedule.gate_open
    fixed = training.batch_size * training.group_size * training.max_tokens
    keep_silent = config.loss.kl != 0 or config.loss.entropy != 0
    optim = optim_at(config, step)
    first, got, most, cut = parts.tasks.state_dict(), None, 0, False
    while True:
        try:
            got = got or _collect(config, parts, size)
            parts.log.phase("learning")
            groups_P = credit_step(got.groups_P, parts.algorithm, sepa_lambda)
            stats = step_stats(groups_P, parts.algorithm)
            batch = pack(groups_P, temperature=training.temperature, fixed_tokens=fixed, keep_silent=keep_silent)
            trained = time.perf_counter()
            reports, cut = _learn(config, parts, batch, optim, size)
            break
        except OutOfMemory as error:
            if not parts.sizer or not (smaller := parts.sizer.out_of_memory(size)):
                raise
            # What was sampled is kept; the tasks left over are the next step's first.
            drawn = len(got.groups_P) if got else error.drawn or size
            kept = max(1, drawn * smaller // size) if got else smaller
            parts.tasks.load_state_dict(first)
            if got:
                parts.tasks.take(kept)
                got = replace(got, groups_P=got.groups_P[:kept])
            log.warning("Step %d: %s It goes on with %d of %d tasks.", step, error.message, kept, drawn)
            size, most = smaller, max(most, drawn)
    parts.schedule.observe(stats.observed)
    counters.add(got.reward_errors, batch.num_tokens, groups_P, stats.observed.correct_rate)
    metrics = {
        **condition_metrics(config),
        "batch_size": len(groups_P),
        "group_size": training.group_size,
        "sepa_lambda": sepa_lambda,
        "sepa_gate_open": gate_open,
        "running_correct_rate": counters.running_correct_rate,
        **rollout_metrics(got, getattr(parts.tasks, "labels", ()), config.reward.correct_at),
        **stats.metrics,
        **learner_metrics(batch, reports),
        "lr": optim.lr,
        **time_metrics(got, batch, started=started, synced=synced, trained=trained, finished=time.perf_counter()),
    }
    if parts.sizer:
        metrics |= parts.sizer.observe(sampled(got, batch, size, training.group_size, parts.engine, most, cut=cut))
    announce_groups(groups_P, config.reward.correct_at)
    parts.log.step(step, metrics, groups_P)
    counters.check_updates(reports)


def _collect(config: Config, parts: Parts, size: int) -> Collected:
    training = config.training
    return collect_signal(
        parts.events, parts.tasks, size, training.group_size,
        parts.environment, parts.reward, parts.engine, parts.sampling,
        seed=training.seed, step=parts.counters.step, deadline_s=training.phase_timeout_s,
        max_error_rate=config.reward.max_error_rate, min_signal=training.min_signal,
        max_oversample=training.max_oversample, mask_truncated=parts.algorithm.mask_truncated,
    )  # fmt: skip


def _learn(
    config: Config, parts: Parts, batch: TrainBatch, optim: OptimStep, size: int
) -> tuple[list[StepReport], bool]:
    reports: list[StepReport] = []
    while not batch.is_empty and len(reports) < config.training.updates_per_batch:
        try:
            reports.append(parts.backend.train_step(batch, optim))
        except OutOfMemory as error:
            if not reports or not parts.sizer or not parts.sizer.out_of_memory(size):
                raise
            log.warning("%s The batch's %d updates before that stand.", error.message, len(reports))
            return reports, True
        if reports[-1].update_skipped:
            break  # the next one would compute the same
    return reports, False


def _evaluation_due(config: Config, parts: Parts) -> bool:
    step, every = parts.counters.step, config.eval.every
    if parts.evaluator is None:
        return False
    return step in (0, config.training.max_steps) or bool(every and step % every == 0)


def _evaluate(config: Config, parts: Parts) -> float | None:
    if parts.evaluator is None:
        raise ValueError("no evaluator")
    parts.log.phase("evaluating")
    parts.engine.load(parts.backend.publish())
    metrics, errors = parts.evaluator.run(
        parts.events, parts.environment, parts.reward, parts.engine,
        deadline_s=config.training.phase_timeout_s, max_error_rate=config.reward.max_error_rate,
    )  # fmt: skip
    parts.log.evaluation(parts.counters.step, metrics)
    parts.counters.reward_errors += errors
    parts.counters.evaluated_at = parts.counters.step
    return metrics["eval/accuracy"]


def _state(parts: Parts) -> State:
    return {**{name: part.state_dict() for name, part in parts.stateful.items()}, "facts": parts.facts}


def _save(parts: Parts, state: State, *, accuracy: float | None) -> None:
    parts.log.phase("saving")
    parts.log.sync()
    step = state["counters"]["step"]
    selected_on = parts.evaluator.name if parts.evaluator else ""
    parts.checkpoints.save(step, parts.backend, state, accuracy=accuracy, selected_on=selected_on)


def _save_in_spite(parts: Parts, state: State) -> None:
    """Save where another error is the one to show."""
    try:
        _save(parts, state, accuracy=None)
    except (OSError, RetrainError) as failure:
        log.warning("A checkpoint could not be written: %s", failure)
