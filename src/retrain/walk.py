"""One task followed through a whole step without a model: read, rendered, answered by made-up completions, scored,
credited and packed by the code of a run, so that reward, template and algorithm are seen at work before a device is.

What is made up: the completions, which stand for an answer that is right, wrong, without a form or cut; their logprobs
and entropies, which are a fixed hash of token and place; and the number of rollouts, which is that of the answers.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from retrain import plugins, preflight
from retrain.algorithms import transforms
from retrain.algorithms.credit import Algorithm, correct, credit_step
from retrain.algorithms.transforms import SEPA_TRANSFORMS
from retrain.config.load import LoadedConfig
from retrain.config.schema import Config
from retrain.config.tables import rewards_by_source
from retrain.errors import UsageError
from retrain.protocols import Renderer
from retrain.training import dry
from retrain.training.batch import pack
from retrain.training.build import check_bounds, sampling_of
from retrain.training.optim import optim_at
from retrain.training.rollout import EventLoop, RewardErrors, collect
from retrain.training.self_check import responses
from retrain.types import (
    Completion,
    CreditedGroup,
    FloatArray,
    IntArray,
    Rollout,
    Sampling,
    ScoredGroup,
    Task,
)

_THOUGHT = "Wait, let me check that again. "
_PLAIN = 42
_DIGITS = 6


@dataclass(frozen=True, slots=True)
class Answer:
    """A made-up completion: what it stands for, and its text. ``endless`` goes on to the token limit."""

    name: str
    text: str
    endless: bool = False


@dataclass(frozen=True, slots=True)
class Token:
    """A sampled token: its text on a screen, made-up logprob, uncertainty (nats, or the configured kind's unit),
    whether it is a planning token, and its advantage."""

    id: int
    text: str
    logprob: float
    uncertainty: float
    planning: bool
    advantage: float


@dataclass(frozen=True, slots=True)
class Member:
    """One answer on its way through the step. ``reward`` is None where the reward failed (``error``), ``correct`` where
    nothing says; ``advantage`` is the episode's, before the transform (None under an algorithm of one's own)."""

    name: str
    text: str
    stop: str
    reward: float | None
    correct: bool | None
    parts: Mapping[str, float]
    error: str
    advantage: float | None
    tokens: tuple[Token, ...]


@dataclass(frozen=True, slots=True)
class Walk:
    """Everything that a step does with one task. ``batch`` counts what would be trained and names the denominator;
    ``notes`` are sentences about what looks wrong, or what was assumed."""

    task: Mapping[str, Any]
    prompt: Mapping[str, Any]
    sampling: Mapping[str, Any]
    algorithm: Mapping[str, Any]
    members: tuple[Member, ...]
    skipped: str
    batch: Mapping[str, Any]
    notes: tuple[str, ...]


def follow(loaded: LoadedConfig, wanted: str = "", step: int | None = None) -> Walk:
    """Follow a task: ``wanted`` is its id, or its number in the data's order; "" is the first that the run would draw.

    Schedules stand as at the 0-based ``step`` (None: the run's last). UsageError for a task that is not there; errors of
    configuration, data, model and plug-ins are those of a run.
    """
    config = loaded.config
    if config.training.seed < 0:
        # A drawn seed would deal another task each time.
        config = config.model_copy(update={"training": config.training.model_copy(update={"seed": 0})})
    plugins.add_search_paths(loaded.search_paths)
    steps = config.training.max_steps
    step = steps - 1 if step is None else step
    if step >= steps:
        has = "one step" if steps == 1 else f"{steps} steps"
        raise UsageError(f"--step {step}: the run has {has}, counted from 0.", fix=f"a number below {steps}.")
    with dry.parts(config) as parts:
        renderer: Any = parts.renderer
        preflight.check_lengths(config, renderer, (*parts.tasks, *parts.held_out), renderer.context_length)
        check_bounds(config, getattr(parts.reward, "bounds", None))
        task = _task(parts, wanted)
        loop = EventLoop()
        try:
            return _follow(
                config, parts, task, step, loop, drawn=loaded.config.training.seed < 0 and not wanted
            )
        finally:
            loop.close()


def _follow(config: Config, parts: dry.Parts, task: Task, step: int, loop: EventLoop, *, drawn: bool) -> Walk:
    sampling = sampling_of(config, parts.renderer, temperature=config.training.temperature)
    reward_name = rewards_by_source(config).get(task.source, config.reward.type)
    form, refusal = _form(config, parts, task, reward_name, sampling, loop)
    answers = _answers(task, reward_name, form)
    scored = _scored(config, parts, task, answers, sampling, step, loop)
    sepa_lambda = parts.schedule.linear_lambdas([step])[0]
    credited = credit_step([scored], parts.algorithm, sepa_lambda)[0]
    fixed = config.training.batch_size * config.training.group_size * config.training.max_tokens
    keep_silent = config.loss.kl != 0 or config.loss.entropy != 0
    batch = pack([credited], temperature=sampling.temperature, fixed_tokens=fixed, keep_silent=keep_silent)
    members = _members(parts, answers, credited, _episode(scored, parts.algorithm))
    return Walk(
        task={
            "id": task.id,
            "source": task.source,
            "draw": task.draw,
            "reference": task.reference,
            "messages": [{"role": m.role, "content": m.content} for m in task.messages],
            "info": dict(task.info),
            "tasks": len(parts.tasks),
        },
        prompt=_prompt(parts.renderer, task, scored),
        sampling={
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_tokens,
            "stop_ids": list(sampling.stop_ids),
            "stop": list(sampling.stop),
        },
        algorithm=_algorithm(config, parts, step, sepa_lambda),
        members=members,
        skipped=credited.skipped,
        batch={
            "rows": len(batch.rows),
            "row_tokens": [len(row.token_ids_T) for row in batch.rows],
            "trained_tokens": sum(int(row.sampled_T.sum()) for row in batch.rows),
            "tokens_with_advantage": sum(int(np.count_nonzero(row.advantages_T)) for row in batch.rows),
            "loss": config.loss.kind,
            "agg": config.loss.agg,
            "denominator": {
                "token_mean": batch.num_tokens,
                "sequence_mean": batch.num_rollouts,
                "fixed": batch.fixed_tokens,
            }[config.loss.agg],
            "num_tokens": batch.num_tokens,
            "num_rollouts": batch.num_rollouts,
            "fixed_tokens": batch.fixed_tokens,
            "lr": optim_at(config, step).lr,
            "step_rollouts": config.training.batch_size * config.training.group_size,
        },
        notes=tuple(_notes(config, parts, task, members, credited, refusal, drawn=drawn)),
    )


def _task(parts: dry.Parts, wanted: str) -> Task:
    if not wanted:
        return parts.source.take(1)[0]
    by_id = {task.id: task for task in parts.tasks}
    if wanted in by_id:
        return by_id[wanted]
    count = len(parts.tasks)
    if wanted.isdecimal():
        if int(wanted) < count:
            return parts.tasks[int(wanted)]
        there = "is one task" if count == 1 else f"are {count} tasks"
        raise UsageError(f"--task {wanted}: there {there}.", fix=f"a number below {count}, or a task's id.")
    near = difflib.get_close_matches(wanted, by_id, n=1) or [parts.tasks[0].id]
    raise UsageError(
        f"--task {wanted}: there is no task of that id.",
        fix=f"for example {near[0]}, or a number below {count}.",
    )


def _form(
    config: Config, parts: dry.Parts, task: Task, reward_name: str, sampling: Sampling, loop: EventLoop
) -> tuple[int, str]:
    """Which form of the reference the reward likes best (its place in ``responses``), and why it does not accept it, ""
    where it does."""
    texts = responses(_with_reference(task), reward_name)
    tried = [Answer("", text) for text in texts]
    # Whole, whatever the limit: that an answer is cut says nothing about the reward.
    renderer: Any = parts.renderer
    longest = max(len(renderer.encode_answer(text)) for text in texts) + 1
    sampling = replace(sampling, max_tokens=max(sampling.max_tokens, longest))
    scored = _scored(config, parts, task, tried, sampling, 0, loop)
    rewards = [-np.inf if s.error else s.reward for s in scored.scores_G]
    best = int(np.argmax(rewards))
    score = scored.scores_G[best]
    if score.error:
        why = score.error.strip().rpartition("\n")[2]
        return best, f"The reward failed on the task's own reference ({why})"
    if correct(score, config.reward.correct_at) is False:
        return best, "The reward does not accept the task's own reference in any form tried"
    return best, ""


def _with_reference(task: Task) -> Task:
    return task if task.reference.strip() else replace(task, reference=str(_PLAIN))


def _answers(task: Task, reward_name: str, form: int) -> list[Answer]:
    right = _with_reference(task)
    text = right.reference.strip()
    wrong = str(int(text) + 1) if text.lstrip("-").isdecimal() else "something else"
    stated = responses(right, reward_name)[form]
    other = responses(replace(right, reference=wrong), reward_name)[form]
    name = "reference" if task.reference.strip() else f"{_PLAIN}, for want of a reference"
    return [
        Answer(name, stated),
        Answer("reference, after a thought", f"{_THOUGHT}The answer is {stated}"),
        Answer("wrong answer", other),
        Answer("no box", f"The answer is {text}, I think."),
        Answer("cut at the limit", _THOUGHT, endless=True),
    ]


class _MadeUp:
    """An Engine that gives the answers, one per member, whatever it is asked."""

    def __init__(self, renderer: Renderer, answers: Sequence[Answer]) -> None:
        self._renderer: Any = renderer
        self._answers = answers

    def load(self, weights: object) -> None:
        """There are no weights."""

    def close(self) -> None:
        """Nothing to stop."""

    async def generate(self, prompt_ids: IntArray, n: int, sampling: Sampling) -> list[Completion]:
        """The answers of members from ``sampling.noise.member`` on."""
        first = sampling.noise.member
        return [
            self._completion(self._answers[m % len(self._answers)], sampling) for m in range(first, first + n)
        ]

    def _completion(self, answer: Answer, sampling: Sampling) -> Completion:
        ids: IntArray = self._renderer.encode_answer(answer.text)
        limit = sampling.max_tokens
        if answer.endless:
            ids = np.resize(ids, limit)
        elif sampling.stop_ids:
            ids = np.append(ids, np.int32(sampling.stop_ids[-1]))
        cut = answer.endless or len(ids) > limit
        ids = ids[:limit].astype(np.int32)
        u_T = _hashed(ids)
        return Completion(
            token_ids_T=ids,
            logprobs_T=-3 * u_T,
            entropies_T=2 * _hashed(ids + 1) if sampling.want_entropy else None,
            stop="length" if cut else "stop",
            weights_version=0,
        )


def _hashed(ids_T: npt.NDArray[Any]) -> FloatArray:
    """Numbers in [0, 1) that look like chance and are a function of each token and its place alone."""
    mixed = (ids_T.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= (np.arange(len(ids_T), dtype=np.uint64) + np.uint64(1)) * np.uint64(0xC2B2AE3D27D4EB4F)
    mixed ^= mixed >> np.uint64(29)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    # Sixteen bits, so that float32 holds them exactly everywhere.
    return ((mixed >> np.uint64(48)).astype(np.float32) / np.float32(2**16)).astype(np.float32)


def _scored(
    config: Config, parts: dry.Parts, task: Task, answers: Sequence[Answer], sampling: Sampling, step: int, loop: EventLoop
) -> ScoredGroup:  # fmt: skip
    # A failing reward is shown here, not counted.
    got = collect(
        loop, [task], len(answers), parts.environment, parts.reward, _MadeUp(parts.renderer, answers), sampling,
        seed=config.training.seed, step=step, deadline_s=config.training.phase_timeout_s, errors=RewardErrors(1.0),
    )  # fmt: skip
    return got.groups_P[0]


def _episode(scored: ScoredGroup, algorithm: Algorithm) -> CreditedGroup | None:
    """Credit as the estimator alone gives it; None where one algorithm does both."""
    if algorithm.whole is not None:
        return None
    alone = replace(
        algorithm, transform=transforms.none, transform_name="none", params={}, mask_truncated=False
    )
    return credit_step([scored], alone, 0.0)[0]


def _members(
    parts: dry.Parts, answers: Sequence[Answer], credited: CreditedGroup, episode: CreditedGroup | None
) -> tuple[Member, ...]:
    group = credited.scored
    found: list[Member] = []
    for i, (answer, rollout, score) in enumerate(zip(answers, group.rollouts_G, group.scores_G, strict=True)):
        alone = None if episode is None else episode.advantages_G_T[i][rollout.sampled_T]
        found.append(
            Member(
                name=answer.name,
                text=rollout.text,
                stop=rollout.stop,
                reward=None if score.error else _number(score.reward),
                correct=correct(score, parts.algorithm.correct_at),
                parts={name: _number(value) for name, value in score.parts.items()},
                error=rollout.error or score.error.strip().rpartition("\n")[2],
                advantage=_number(alone[0]) if alone is not None and len(alone) else None,
                tokens=_tokens(parts.renderer, rollout, credited, i),
            )
        )
    return tuple(found)


def _tokens(renderer: Any, rollout: Rollout, credited: CreditedGroup, member: int) -> tuple[Token, ...]:
    return tuple(
        Token(
            id=int(rollout.token_ids_T[t]),
            text=renderer.shown(int(rollout.token_ids_T[t])),
            logprob=_number(rollout.logprobs_T[t]),
            uncertainty=_number(credited.uncertainty_G_T[member][t]),
            planning=bool(credited.planning_G_T[member][t]),
            advantage=_number(credited.advantages_G_T[member][t]),
        )
        for t in np.flatnonzero(rollout.sampled_T).tolist()
    )


def _number(value: Any) -> float:
    """Without the digits in which machines differ, and without a negative zero."""
    return float(f"{float(value):.{_DIGITS}g}") + 0.0


def _prompt(renderer: Any, task: Task, scored: ScoredGroup) -> dict[str, Any]:
    rollout = scored.rollouts_G[0]
    if rollout.stop == "error":
        ids: list[int] = []
    else:
        first = int(np.flatnonzero(rollout.sampled_T)[0])
        ids = [int(i) for i in rollout.token_ids_T[:first]]
    return {
        "tokens": len(ids),
        "ids": ids,
        "text": "".join(renderer.shown(i) for i in ids),
        "chat_template": bool(renderer.has_template),
        "context": renderer.context_length,
        "stop_tokens": {str(i): renderer.shown(i) for i in renderer.stop_ids},
        "error": rollout.error,
    }


def _algorithm(config: Config, parts: dry.Parts, step: int, sepa_lambda: float) -> dict[str, Any]:
    algorithm = parts.algorithm
    return {
        "advantage": None if algorithm.whole is not None else algorithm.advantage_name,
        "transform": None if algorithm.whole is not None else algorithm.transform_name,
        "algorithm": algorithm.whole_name or None,
        "params": {
            k: v for k, v in algorithm.params.items() if isinstance(v, str | int | float | bool | None)
        },
        "uncertainty": algorithm.uncertainty_name,
        "planning": algorithm.detector_name,
        "truncated": config.training.truncated,
        "step": step,
        "sepa_lambda": sepa_lambda if _uses_sepa(config, algorithm) else None,
    }


def _uses_sepa(config: Config, algorithm: Algorithm) -> bool:
    piece = algorithm.transform if algorithm.whole is None else algorithm.whole
    own = bool(getattr(piece, "uses_sepa", False))
    return own or (algorithm.whole is None and config.algorithm.transform_mode in SEPA_TRANSFORMS)


def _notes(
    config: Config, parts: dry.Parts, task: Task, members: Sequence[Member], credited: CreditedGroup, refusal: str,
    *, drawn: bool,
) -> list[str]:  # fmt: skip
    found = [
        "No model was asked: the answers are made up, and their logprobs and entropies are a fixed hash."
    ]
    if drawn:
        found.append("training.seed = -1 draws a seed for each run; here it is 0.")
    if not task.reference.strip():
        found.append("The task has no reference.")
    elif refusal:
        found.append(f"{refusal}: retrain doctor --tasks tells for how many tasks that is so.")
    verdicts = {m.name: m.correct for m in members}
    if task.reference.strip() and verdicts.get("wrong answer"):
        found.append("The reward takes the wrong answer for correct.")
    if credited.skipped:
        found.append(f"Such a group would not train: {credited.skipped}.")
    if not parts.renderer.stop_ids and not config.training.stop:
        found.append("The model names no end token: every answer runs to training.max_tokens.")
    for member, rollout in zip(members, credited.scored.rollouts_G, strict=True):
        if rollout.stop == "length" and member.name != "cut at the limit":
            found.append(
                f'"{member.name}" needs more than training.max_tokens = {config.training.max_tokens} tokens and was cut.'
            )
    if _uses_sepa(config, parts.algorithm):
        found.append("SEPA's lambda is that of its linear ramp, with the gate taken as open.")
    return found
