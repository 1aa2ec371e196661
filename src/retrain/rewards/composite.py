"""Reward ``composite``: a weighted sum of named parts, some of which may be gates."""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import hashlib
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from retrain import plugins
from retrain.config import tables
from retrain.errors import ConfigError, PluginError
from retrain.protocols import Renderer, Reward
from retrain.rewards import custom
from retrain.rewards.checks import CHECKS
from retrain.rewards.own import make_reward
from retrain.types import Rollout, Score, Task

if TYPE_CHECKING:
    from retrain.config.schema import Config

log = logging.getLogger("retrain")

Bounds: TypeAlias = tuple[float, float] | None

_NESTED = ("composite", "routed")
_SHARED_KEYS = ("name", "type", "weight", "gate")


@dataclass(frozen=True, slots=True)
class Part:
    """One named part: its value times ``weight`` goes into the sum, and a ``gate`` must pass."""

    name: str
    reward: Reward
    weight: float = 1.0
    gate: bool = False

    @property
    def bounds(self) -> Bounds:
        """Smallest and largest value, None where the reward does not say."""
        return bounds_of(self.reward)


class Composite:
    """The weighted sum of all parts, or ``penalty`` where a gate failed or broke.

    A gate fails when its score says that it did not pass; where it does not say, when its value is below 0 (for
    a part that cannot be above 0) or at most 0.5 (for any other). An error of a part that is no gate is a failed
    Score, unless a gate has decided already or the part's weight is 0. ``parts`` holds the raw value of every part
    that has one, and as ``<part>/<sub>`` what that part itself consists of.

    ``passed``: every part whose score says so passed, and no gate failed. None where no part says so, or where
    ``decided_by_number``.
    """

    def __init__(
        self, parts: Sequence[Part], *, penalty: float = 0.0, decided_by_number: bool = False
    ) -> None:
        self._parts = tuple(parts)
        self._penalty = penalty
        self._decided_by_number = decided_by_number
        self._broke: Counter[str] = Counter()
        self.bounds = _sum_bounds(self._parts, penalty)
        self.code_digest = digest_of(p.reward for p in self._parts)

    @property
    def first_traceback(self) -> str:
        """The first failure's traceback of the first part that has one, "" without any."""
        return first_traceback(p.reward for p in self._parts)

    async def score(self, task: Task, rollouts_G: Sequence[Rollout]) -> list[Score]:
        """One score per rollout, in order; the parts are scored at once."""
        by_part = await asyncio.gather(*(p.reward.score(task, rollouts_G) for p in self._parts))
        for part, scores in zip(self._parts, by_part, strict=True):
            if len(scores) != len(rollouts_G):
                reason = f"part {part.name!r} returned {len(scores)} scores for {len(rollouts_G)} rollouts"
                return [Score.failed(reason) for _ in rollouts_G]
        return [
            Score.failed(rollout.error) if rollout.stop == "error" else self._combine(scores)
            for rollout, *scores in zip(rollouts_G, *by_part, strict=True)
        ]

    def _combine(self, scores: Sequence[Score]) -> Score:
        pairs = list(zip(self._parts, scores, strict=True))
        values: dict[str, float] = {}
        for part, score in pairs:
            if not score.error:
                values[part.name] = score.reward
                values |= {f"{part.name}/{sub}": value for sub, value in score.parts.items()}
        failed = [part.name for part, score in pairs if part.gate and _fails(part, score)]
        for part, score in pairs:
            if score.error and (part.gate or not part.weight):
                self._announce(part, score.error)
        passed = None
        if not self._decided_by_number:
            verdicts = [score.passed for _, score in pairs if score.passed is not None]
            passed = all(verdicts) and not failed if verdicts else None
        if failed:
            return Score(reward=self._penalty, passed=passed, parts=values)
        for part, score in pairs:
            if score.error and part.weight:
                return Score.failed(f"{part.name}: {score.error}")
        return Score(
            reward=sum(part.weight * score.reward for part, score in pairs if not score.error),
            passed=passed,
            parts=values,
        )

    def _announce(self, part: Part, error: str) -> None:
        self._broke[part.name] += 1
        if self._broke[part.name] > 1:
            return
        if part.gate:
            log.warning("reward.parts: the gate %r broke, which gives reward.penalty: %s", part.name, error)
        else:
            log.warning(
                "reward.parts: %r broke; its weight is 0, so the reward goes on without it: %s",
                part.name,
                error,
            )

    def close(self) -> None:
        """Close every part, and say how often those broke that do not fail a score; safe to call twice."""
        if self._broke:
            counts = ", ".join(f"{name} {count}" for name, count in self._broke.items())
            log.warning("reward.parts: gates and parts of weight 0 that broke, times: %s", counts)
            self._broke.clear()
        for part in self._parts:
            close(part.reward)


def _fails(part: Part, score: Score) -> bool:
    if score.error:
        return True
    if score.passed is not None:
        return not score.passed
    is_penalty = part.bounds is not None and part.bounds[1] <= 0
    return score.reward < 0 if is_penalty else score.reward <= 0.5


def _sum_bounds(parts: Sequence[Part], penalty: float) -> Bounds:
    low = high = 0.0
    for part in parts:
        if part.bounds is None:
            return None
        ends = sorted(part.weight * end for end in part.bounds)
        low, high = low + ends[0], high + ends[1]
    if any(part.gate for part in parts):
        return min(low, penalty), max(high, penalty)
    return low, high


def bounds_of(reward: Reward) -> Bounds:
    """What a reward says about its range; None where it says nothing."""
    found: Any = getattr(reward, "bounds", None)
    return None if found is None else (float(found[0]), float(found[1]))


def digest_of(rewards: Iterable[Reward]) -> str:
    """One digest of several rewards' code, "" where none has one; a single one's own."""
    digests = [str(getattr(reward, "code_digest", "")) for reward in rewards]
    if not any(digests):
        return ""
    return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()[:16]


def first_traceback(rewards: Iterable[Reward]) -> str:
    """The first traceback that one of the rewards keeps, "" without any."""
    return next((t for reward in rewards if (t := str(getattr(reward, "first_traceback", "")))), "")


def close(reward: Reward) -> None:
    """Close a reward that can be closed."""
    end: Any = getattr(reward, "close", None)
    if end is not None:
        end()


def build(config: Config, renderer: Renderer) -> Composite:
    """The reward of ``reward.parts``; ConfigError or PluginError names the part that cannot be made."""
    found = tables.parts(config)
    if not found:
        raise ConfigError(
            'reward.type = "composite" has no parts.',
            fix='add [[reward.parts]] tables, each with type = "math" or another reward or constraint.',
        )
    if config.training.truncated == "soft" and any("overlong" in (t.label, t.type) for t in found):
        raise ConfigError(
            'reward.parts has a part overlong, and training.truncated = "soft" adds one to every reward.',
            fix="remove one of the two (or give a part that measures something else another name).",
        )
    with contextlib.ExitStack() as made:
        parts: list[Part] = []
        for index, table in enumerate(found):
            where = f"reward.parts[{index}] ({table.label})"
            reward = _make(table, config, renderer, where)
            made.callback(close, reward)
            parts.append(Part(table.label, reward, table.weight, table.gate))
        composite = Composite(
            parts, penalty=config.reward.penalty, decided_by_number=config.reward.correct_at is not None
        )
        made.pop_all()
        return composite


def _make(table: tables.PartTable, config: Config, renderer: Renderer, where: str) -> Reward:
    kind = table.type
    maker, reads = CHECKS.get(kind, (None, ("module", "function") if kind == "custom" else ()))
    idle = [k for k in sorted(table.model_fields_set) if k not in (*_SHARED_KEYS, *reads)]
    if idle:
        raise ConfigError(
            f"{where}: {idle[0].rstrip('_')} does nothing with type = {kind!r}.",
            fix=f"remove it; this type reads {', '.join(k.rstrip('_') for k in reads) or 'no settings'}.",
        )
    if maker is not None:
        return maker(table, config, where)
    if kind == "custom":
        if not table.module:
            raise ConfigError(f"{where} needs a module.", fix='set module = "my_rewards".')
        return custom.of_function(
            config,
            table.module,
            table.function,
            f"{where}: module = {table.module!r}, function = {table.function!r}",
        )
    known = [n for n in (*plugins.names("reward"), *CHECKS) if n not in _NESTED]
    if kind in _NESTED or not (kind in known or plugins.is_dotted(kind)):
        near = difflib.get_close_matches(kind, known, n=1)
        raise ConfigError(
            f"{where}: {kind!r} is no reward or constraint.",
            fix=(f"did you mean {near[0]!r}? " if near else "") + f"Known: {', '.join(known)}.",
        )
    try:
        return make_reward(kind, config, renderer)
    except PluginError as error:
        raise PluginError(f"{where}: {error.message}", fix=error.fix) from error
    except ConfigError as error:
        raise ConfigError(f"{where}: {error.message}", fix=error.fix) from error
