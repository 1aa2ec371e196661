"""Reward ``routed``, what a run uses: ``reward.type`` for every task, but for the sources that name a reward of
their own; and DAPO's soft punishment of length where ``training.truncated`` asks for it."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from retrain import plugins
from retrain.config import tables
from retrain.errors import ConfigError
from retrain.protocols import Renderer, Reward
from retrain.rewards.checks import cache_tokens, soft_punishment
from retrain.rewards.composite import Bounds, bounds_of, close, digest_of, first_traceback
from retrain.rewards.own import make_reward
from retrain.types import Rollout, Score, Task

if TYPE_CHECKING:
    from retrain.config.schema import Config

_OWN = ("match", "math", "reasoning_gym")
"""Rewards without settings of their own, which a source may therefore name."""


class Routed:
    """Scores every task by the reward of its source: ``by_source``, else ``default``.

    ``bounds`` spans the known ranges of ``training``, the rewards of training tasks (None: all of them); one that does
    not say its range may leave it.
    """

    def __init__(
        self, default: Reward, by_source: Mapping[str, Reward], training: Sequence[Reward] | None = None
    ) -> None:
        self._default = default
        self._by_source = dict(by_source)
        self._all: list[Reward] = list({id(r): r for r in (default, *self._by_source.values())}.values())
        self.bounds = _hull([bounds_of(r) for r in (self._all if training is None else training)])
        self.code_digest = digest_of(self._all)

    @property
    def first_traceback(self) -> str:
        """The first failure's traceback of the first reward that has one, "" without any."""
        return first_traceback(self._all)

    async def score(self, task: Task, rollouts_G: Sequence[Rollout]) -> list[Score]:
        """What the source's reward says."""
        return await self._by_source.get(task.source, self._default).score(task, rollouts_G)

    def close(self) -> None:
        """Close every reward once; safe to call twice."""
        for reward in self._all:
            close(reward)


class Punished:
    """A reward plus the soft overlong punishment, which is also the part ``overlong``.

    It applies to every rollout that is scored, those of evaluations included. What is correct is decided before
    it: by the reward's own ``passed``, else by ``reward.correct_at``, else as above 0.5 for a number in [0, 1]; a
    long right answer stays right.
    """

    def __init__(self, reward: Reward, *, max_tokens: int, cache: int, correct_at: float | None) -> None:
        self._reward = reward
        self._max_tokens = max_tokens
        self._cache = cache
        self._correct_at = correct_at
        inner = bounds_of(reward)
        self.bounds: Bounds = None if inner is None else (inner[0] - 1.0, inner[1])
        self.code_digest = digest_of([reward])

    @property
    def first_traceback(self) -> str:
        """The reward's own."""
        return first_traceback([self._reward])

    async def score(self, task: Task, rollouts_G: Sequence[Rollout]) -> list[Score]:
        """The reward's scores, less the punishment; errors stay errors."""
        scores = await self._reward.score(task, rollouts_G)
        if len(scores) != len(rollouts_G):
            return scores  # the caller says so
        return [self._one(r, s) for r, s in zip(rollouts_G, scores, strict=True)]

    def _one(self, rollout: Rollout, score: Score) -> Score:
        if score.error:
            return score
        cost = soft_punishment(rollout.num_sampled, self._max_tokens, self._cache)
        return replace(
            score,
            reward=score.reward + cost,
            passed=self._passed(score),
            parts={**score.parts, "overlong": cost},
        )

    def _passed(self, score: Score) -> bool | None:
        if score.passed is not None:
            return score.passed
        if self._correct_at is not None:
            return score.reward > self._correct_at
        return score.reward > 0.5 if 0.0 <= score.reward <= 1.0 else None

    def close(self) -> None:
        """Close the reward; safe to call twice."""
        close(self._reward)


def _hull(bounds: Sequence[Bounds]) -> Bounds:
    known = [b for b in bounds if b is not None]
    if not known:
        return None
    return min(low for low, _ in known), max(high for _, high in known)


def build(config: Config, renderer: Renderer) -> Reward:
    """The reward of a whole run; ConfigError or PluginError where one of them cannot be made.

    Without a source of its own reward and without punishment it is the reward of ``reward.type`` itself.
    """
    names = _names_by_source(config)
    with contextlib.ExitStack() as made:
        built: dict[str, Reward] = {}
        for name in (config.reward.type, *names.values()):
            if name not in built:
                built[name] = make_reward(name, config, renderer)
                made.callback(close, built[name])
        reward = built[config.reward.type]
        if names:
            training = [built[name] for name in sorted(tables.training_rewards(config))]
            reward = Routed(reward, {label: built[name] for label, name in names.items()}, training)
        settings = config.training
        if settings.truncated == "soft":
            cache = cache_tokens(settings.soft_tokens, settings.max_tokens, "training.soft_tokens")
            reward = Punished(
                reward, max_tokens=settings.max_tokens, cache=cache, correct_at=config.reward.correct_at
            )
        made.pop_all()
        return reward


def _names_by_source(config: Config) -> dict[str, str]:
    """Label of a source -> the reward that its table names, where that is not reward.type."""
    default = config.reward.type
    stated: dict[str, tuple[str, str]] = {}  # label -> the reward, and where that stands
    rows: list[tuple[str, str, str]] = []
    if config.data.source == "mixture":
        rows += [("data.mixture", t.label, t.reward) for t in tables.mixture(config)]
    else:
        rows.append(("data.source", config.data.source, ""))
    if config.eval.source and config.eval.source != "mixture":
        rows.append(("eval.source", config.eval.source, ""))
    rows += [("eval.suites", t.label, t.reward) for t in tables.suites(config)]
    for where, label, own in rows:
        name = own or default
        if own and own != default and own not in _OWN and not plugins.is_dotted(own):
            raise ConfigError(
                f"{where} ({label}): reward = {own!r} cannot be a source's own.",
                fix=f"use {', '.join(_OWN)} or the dotted path of yours.",
            )
        before = stated.setdefault(label, (name, where))
        if before[0] != name:
            raise ConfigError(
                f"{before[1]} and {where} call a source {label!r} each, with the rewards {before[0]!r} and {name!r}.",
                fix=f"give one of them another name, for example name = {label + '-2'!r}.",
            )
    return {label: name for label, (name, _) in stated.items() if name != default}
