"""Does the reward accept the data's own answers, and does credit work? Every task's reference, written as a response,
scored by the reward; a made-up group, credited by the algorithm."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from retrain.algorithms.credit import Algorithm, credit_step
from retrain.protocols import Renderer, Reward
from retrain.types import IntArray, Rollout, Score, ScoredGroup, Task

_SHOWN = 5
_AT_ONCE = 8
"""Tasks that are scored at the same time: rewards in child processes take turns otherwise."""

_ANSWERS = ("Wait, let me check that. \\boxed{42}", "\\boxed{41}")

_NONE: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Finding:
    """A task whose own reference was not accepted: the best reward it got, or the ``error`` of the reward."""

    task_id: str
    reference: str
    reward: float | None
    error: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """How the reward judges the references: every task is accepted, refused, failed or without a reference."""

    tasks: int
    accepted: int
    without_reference: int
    refused: tuple[Finding, ...]
    failed: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """True when every reference was accepted."""
        return not self.refused and not self.failed

    def lines(self) -> list[str]:
        """The report in plain sentences, the first few findings by name."""
        judged = self.tasks - self.without_reference
        found = [f"The reward accepts {self.accepted} of {judged} references."]
        if self.without_reference:
            found.append(
                f"{self.without_reference} tasks have no reference: only their own scorer can judge them."
            )
        for what, findings in (("refused", self.refused), ("could not be scored", self.failed)):
            for finding in findings[:_SHOWN]:
                why = finding.error.strip().rpartition("\n")[2] or f"reward {finding.reward:g}"
                found.append(f"{what}: {finding.task_id} with {finding.reference[:60]!r} ({why}).")
            if len(findings) > _SHOWN:
                found.append(f"{what}: {len(findings) - _SHOWN} more.")
        return found


def responses(task: Task, reward_type: str) -> list[str]:
    """The forms in which a perfect response could state the task's reference; one of them must be accepted.

    A box for the built-in rewards, ``<answer>`` tags for a task that a generator made (a grid of braces would end
    a box early), the bare text as well for a reward of one's own, which may read anything.
    """
    boxed, tagged = f"\\boxed{{{task.reference}}}", f"<answer>{task.reference}</answer>"
    if "recipe" in task.info and reward_type not in ("match", "math"):
        return [tagged, boxed]
    return [boxed] if reward_type in ("match", "math") else [task.reference, boxed, tagged]


async def check_references(
    tasks: Sequence[Task],
    reward: Reward,
    reward_type: str,
    *,
    threshold: float = 0.5,
    by_source: Mapping[str, str] = _NONE,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Score every task's own reference. A reference is accepted when one of its forms passes, or is worth more than
    ``threshold`` where the reward gives a number only. ``by_source``: the rewards of sources that have one of their own;
    ``progress`` is called with the number of tasks done and of all."""
    room, done = asyncio.Semaphore(_AT_ONCE), 0

    async def one(task: Task) -> Sequence[Score]:
        nonlocal done
        scores: Sequence[Score] = ()
        if task.reference.strip():
            async with room:
                texts = responses(task, by_source.get(task.source, reward_type))
                scores = await reward.score(task, [_rollout(task, i, text) for i, text in enumerate(texts)])
        done += 1
        if progress is not None:
            progress(done, len(tasks))
        return scores

    scores_P = await asyncio.gather(*(one(task) for task in tasks))
    accepted = without = 0
    refused: list[Finding] = []
    failed: list[Finding] = []
    for task, scores in zip(tasks, scores_P, strict=True):
        if not scores:
            without += 1
            continue
        good = [s for s in scores if not s.error]
        if any(s.passed if s.passed is not None else s.reward > threshold for s in good):
            accepted += 1
        elif good:
            refused.append(Finding(task.id, task.reference, max(s.reward for s in good)))
        else:
            failed.append(Finding(task.id, task.reference, None, scores[0].error))
    return Report(len(tasks), accepted, without, tuple(refused), tuple(failed))


def try_credit(
    algorithm: Algorithm, renderer: Renderer, task: Task, *, members: int, with_entropies: bool
) -> None:
    """Credit made-up answers of ``members`` rollouts as a step does, one group with both rewards and one with 0 alone.

    PluginError where a piece of one's own returns the wrong thing, RunError where it raises.
    """
    some: Any = renderer
    answers = [(text, some.encode_answer(text)) for text in _ANSWERS]

    def group(rewards_G: Sequence[float]) -> ScoredGroup:
        rollouts_G = tuple(
            _sampled(task, i, *answers[i % 2], with_entropies=with_entropies) for i in range(len(rewards_G))
        )
        return ScoredGroup(task, rollouts_G, tuple(Score(reward=r) for r in rewards_G))

    rewards_G = [float(i % 2 == 0) for i in range(members)]
    credit_step([group(rewards_G), group([0.0] * members)], algorithm, 0.5)


def _sampled(task: Task, member: int, text: str, ids_T: IntArray, *, with_entropies: bool) -> Rollout:
    """A rollout of two prompt tokens and ``ids_T``, whose logprobs and entropies rise from token to token."""
    unknown, n = np.full(2, np.nan, dtype=np.float32), len(ids_T)
    ramp_T = np.linspace(0.1, 2.0, n, dtype=np.float32)
    return Rollout(
        task_id=task.id,
        member=member,
        token_ids_T=np.concatenate([ids_T[:1].repeat(2), ids_T]).astype(np.int32),
        sampled_T=np.arange(n + 2) >= 2,
        logprobs_T=np.concatenate([unknown, -ramp_T]),
        entropies_T=np.concatenate([unknown, ramp_T]) if with_entropies else None,
        text=text,
        stop="stop",
        weights_version=0,
    )


def _rollout(task: Task, member: int, text: str) -> Rollout:
    """A finished rollout that says ``text``: one prompt token and one sampled one, because rewards read the text."""
    return Rollout(
        task_id=task.id,
        member=member,
        token_ids_T=np.zeros(2, dtype=np.int32),
        sampled_T=np.array([False, True]),
        logprobs_T=np.array([np.nan, 0.0], dtype=np.float32),
        entropies_T=None,
        text=text,
        stop="stop",
        weights_version=0,
    )
