"""From tasks to scored groups: the one event loop of a run, and the two phases that run on it under a deadline.

Each group is scored as soon as its own rollouts are there, while others are still sampled; what a reward's failures
mean is decided when all are, as if scoring had begun only then.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from retrain.algorithms.credit import has_signal
from retrain.errors import EngineError, OutOfMemory, RewardError, RunError
from retrain.protocols import Engine, Environment, Reward, TaskSource
from retrain.types import NoiseKey, Rollout, Sampling, Score, ScoredGroup, Task

T = TypeVar("T")

log = logging.getLogger("retrain")


class EventLoop:
    """One asyncio loop on one thread for a whole run; the training loop stays plain."""

    def __init__(self) -> None:
        self.announce: Callable[[str], None] = lambda phase: None
        """Told the name of every phase that begins."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="retrain-async", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T], *, phase: str, deadline_s: float) -> T:
        """Wait for ``work``; past the deadline it is cancelled and a RunError names the phase."""

        async def bounded() -> T:
            async with asyncio.timeout(deadline_s):
                return await work

        self.announce(phase)
        future = asyncio.run_coroutine_threadsafe(bounded(), self._loop)
        try:
            return future.result()
        except TimeoutError as error:
            raise RunError(
                f"{phase} took longer than training.phase_timeout_s = {deadline_s:g} seconds.",
                fix="raise training.phase_timeout_s, or look at events.log for what hangs.",
            ) from error
        except KeyboardInterrupt:
            future.cancel()
            raise

    def close(self) -> None:
        """Cancel what is left and stop the loop; safe to call twice."""
        if self._loop.is_closed():
            return

        async def settle() -> None:
            tasks = [t for t in asyncio.all_tasks() if t is not asyncio.current_task()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(settle(), self._loop).result(timeout=10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)
        self._loop.close()


@dataclass(frozen=True, slots=True)
class Collected:
    """The scored groups of one step; how many seconds sampling took, and how many more scoring added after it."""

    groups_P: tuple[ScoredGroup, ...]
    sample_time_s: float
    score_time_s: float

    @property
    def reward_errors(self) -> int:
        """Rewards that failed, of rollouts that did not."""
        return sum(len(_failures(group.rollouts_G, group.scores_G)) for group in self.groups_P)


def _failures(rollouts_G: Sequence[Rollout], scores_G: Sequence[Score]) -> list[str]:
    """Errors of a group's rewards; a rollout that broke is not the reward's."""
    pairs = zip(rollouts_G, scores_G, strict=True)
    return [score.error for rollout, score in pairs if score.error and rollout.stop != "error"]


async def sample(
    tasks_P: Sequence[Task],
    n: int,
    environment: Environment,
    engine: Engine,
    sampling: Sampling,
    done: Callable[[int, list[Rollout]], None],
) -> list[list[Rollout]]:
    """``n`` attempts at every task; the noise of task p is keyed by its draw number. ``done(p, rollouts)`` is called
    as soon as those of task p are there. Where one attempt breaks, the others are ended before its error is raised."""

    async def attempt(p: int, task: Task) -> list[Rollout]:
        noise = replace(sampling.noise, task=task.draw)
        rollouts = await environment.attempt(task, n, engine, replace(sampling, noise=noise))
        if len(rollouts) != n:
            raise EngineError(
                f"the environment returned {len(rollouts)} attempts at {task.id!r} instead of {n}."
            )
        done(p, rollouts)
        return rollouts

    running = [asyncio.create_task(attempt(p, t)) for p, t in enumerate(tasks_P)]
    try:
        return list(await asyncio.gather(*running))
    except Exception:
        # gather leaves the others running: a step that is begun again would share the engine with them.
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        raise


class RewardErrors:
    """How many rewards have failed in what is judged as one: the rounds of a step, the suites of an evaluation.

    ``total`` is the number of rewards that the rate refers to where it is known before; else it grows with what is
    scored.
    """

    def __init__(self, max_rate: float, total: int = 0) -> None:
        self._max_rate = max_rate
        self._known = total > 0
        self._total = total
        self._failed: list[str] = []
        self._first = ""

    def expect(self, rewards: int) -> None:
        """So many more rewards are about to be computed."""
        if not self._known:
            self._total += rewards

    def see(self, failed: Sequence[str], reward: Reward) -> None:
        """Keep what the reward knows of the first failure; it forgets that when it scores anew."""
        if failed and not self._first:
            self._first = getattr(reward, "first_traceback", "") or failed[0]

    def add(self, failed: Sequence[str]) -> None:
        """Count failures; RewardError as soon as more than the rate's share of all rewards have failed: that is a
        broken reward, not a bad policy, and the rest need not be waited for."""
        self._failed.extend(failed)
        if len(self._failed) > self._max_rate * self._total:
            detail = self._first or self._failed[0]
            raise RewardError(
                f"{len(self._failed)} of {self._total} rewards of this step failed (reward.max_error_rate = "
                f"{self._max_rate:g}). The first one:\n{detail.rstrip()}\n",
                fix="correct the reward, or raise reward.timeout_s or reward.max_error_rate.",
            )


class Scoring:
    """The scores of a step's groups: each is computed from ``begin`` on, and judged in ``results``."""

    def __init__(self, tasks_P: Sequence[Task], reward: Reward, errors: RewardErrors) -> None:
        self._tasks_P = tasks_P
        self._reward = reward
        self._errors = errors
        self._running: dict[int, asyncio.Task[list[Score]]] = {}
        self._stopped = False

    def begin(self, p: int, rollouts: list[Rollout]) -> None:
        """Start to score task p's rollouts, unless all was given up; called on the event loop."""
        if self._stopped:
            return
        self._running[p] = asyncio.create_task(self._score(self._tasks_P[p], rollouts))
        # Asked for its exception in any case: where sampling breaks, nobody waits for the scores.
        self._running[p].add_done_callback(lambda task: task.cancelled() or task.exception())

    async def _score(self, task: Task, rollouts: Sequence[Rollout]) -> list[Score]:
        scores = await self._reward.score(task, rollouts)
        if len(scores) != len(rollouts):
            raise RewardError(f"the reward returned {len(scores)} scores for {len(rollouts)} rollouts.")
        self._errors.see(_failures(rollouts, scores), self._reward)
        return scores

    async def results(self, rollouts_P_G: Sequence[Sequence[Rollout]]) -> list[list[Score]]:
        """Every group's scores, in order, whatever order they complete in; RewardError as ``errors`` decides."""
        self._errors.expect(sum(r.stop != "error" for rollouts in rollouts_P_G for r in rollouts))

        async def one(p: int) -> list[Score]:
            scores = await self._running[p]
            self._errors.add(_failures(rollouts_P_G[p], scores))
            return scores

        try:
            async with asyncio.TaskGroup() as group:
                waiting = [group.create_task(one(p)) for p in range(len(rollouts_P_G))]
        except* RewardError as raised:
            raise raised.exceptions[0] from None
        return [task.result() for task in waiting]

    async def stop(self) -> None:
        """Give up what is still being scored, and what would be from now on."""
        self._stopped = True
        for task in self._running.values():
            task.cancel()


def collect(
    loop: EventLoop,
    tasks_P: Sequence[Task],
    n: int,
    environment: Environment,
    reward: Reward,
    engine: Engine,
    sampling: Sampling,
    *,
    seed: int,
    step: int,
    deadline_s: float,
    errors: RewardErrors,
) -> Collected:
    """Sample and score ``n`` attempts at each task under the noise of (seed, step)."""
    started = time.perf_counter()
    keyed = replace(sampling, noise=NoiseKey(seed=seed, step=step, task=0))
    scoring = Scoring(tasks_P, reward, errors)
    try:
        rollouts = loop.run(
            sample(tasks_P, n, environment, engine, keyed, scoring.begin),
            phase="sampling",
            deadline_s=deadline_s,
        )
    except BaseException:
        loop.run(scoring.stop(), phase="scoring", deadline_s=deadline_s)
        raise
    sampled = time.perf_counter()
    scores = loop.run(scoring.results(rollouts), phase="scoring", deadline_s=deadline_s)
    groups = tuple(
        ScoredGroup(t, tuple(r), tuple(s)) for t, r, s in zip(tasks_P, rollouts, scores, strict=True)
    )
    return Collected(groups, sampled - started, time.perf_counter() - sampled)


def collect_signal(
    loop: EventLoop,
    tasks: TaskSource,
    batch_size: int,
    n: int,
    environment: Environment,
    reward: Reward,
    engine: Engine,
    sampling: Sampling,
    *,
    seed: int,
    step: int,
    deadline_s: float,
    max_error_rate: float,
    min_signal: float,
    max_oversample: float,
    mask_truncated: bool,
) -> Collected:
    """Collect ``batch_size`` tasks and, while fewer than ``min_signal`` of that many groups carry a signal, as many
    more, up to ``max_oversample * batch_size`` in all (dynamic sampling, DAPO, 2503.14476).

    Every group sampled is returned and counts in the loss's denominators; none is thrown away to reach a round number.
    At the end, and where memory runs out, the engine is told to release what it holds.
    """
    # 0.28 * 25 is a little more than 7 in floating point.
    wanted = math.ceil(min_signal * batch_size - 1e-9)
    errors = RewardErrors(max_error_rate)
    most = max(batch_size, math.floor(max_oversample * batch_size + 1e-9))
    got = Collected((), 0.0, 0.0)
    while True:
        more = min(batch_size, most - len(got.groups_P))
        try:
            new = collect(
                loop, tasks.take(more), n, environment, reward, engine, sampling,
                seed=seed, step=step, deadline_s=deadline_s, errors=errors,
            )  # fmt: skip
        except OutOfMemory as error:
            error.drawn = len(got.groups_P) + more
            _release(engine)
            raise
        got = Collected(
            got.groups_P + new.groups_P,
            got.sample_time_s + new.sample_time_s,
            got.score_time_s + new.score_time_s,
        )
        signals = sum(has_signal(group, mask_truncated=mask_truncated) for group in got.groups_P)
        if signals >= wanted or len(got.groups_P) >= most:
            break
    if signals < wanted:
        log.info(
            "Step %d: %d of %d groups carry a signal, fewer than training.min_signal asks for (%d), and "
            "training.max_oversample allows no more.",
            step,
            signals,
            len(got.groups_P),
            wanted,
        )
    _release(engine)
    return got


def _release(engine: Engine) -> None:
    release = getattr(engine, "release", None)
    if release is not None:
        release()
