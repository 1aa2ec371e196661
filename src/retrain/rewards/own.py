"""A reward of the user's own, named by a dotted path: made, and held to the protocol while it runs."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from retrain import plugins
from retrain.errors import PluginError, RetrainError, RewardError
from retrain.protocols import Renderer, Reward
from retrain.rewards import calling
from retrain.types import Rollout, Score, Task

if TYPE_CHECKING:
    from retrain.config.schema import Config

log = logging.getLogger("retrain")


class OwnReward:
    """Passes scores on. What the reward raises becomes a failed score of every rollout of that task.

    RewardError when it returns something else than one ``Score`` per rollout. ``bounds`` and ``close`` are the
    reward's own where it has them.
    """

    def __init__(self, name: str, reward: Any) -> None:
        self._name = name
        self._reward = reward
        self._first_traceback = ""
        self.bounds: tuple[float, float] | None = getattr(reward, "bounds", None)
        self.code_digest: str = str(getattr(reward, "code_digest", ""))

    @property
    def first_traceback(self) -> str:
        """The first failure's traceback, "" without one."""
        return self._first_traceback or str(getattr(self._reward, "first_traceback", ""))

    async def score(self, task: Task, rollouts_G: Sequence[Rollout]) -> list[Score]:
        """One score per rollout, in order."""
        try:
            given = cast("object", await self._reward.score(task, rollouts_G))
        except RetrainError:
            raise
        except (Exception, SystemExit) as error:  # noqa: BLE001  whatever the user's code raises is data
            answer = calling.failure(error)
            self._first_traceback = self._first_traceback or answer.traceback
            return [Score.failed(plugins.summary(error)) for _ in rollouts_G]
        scores = cast("list[object]", given) if isinstance(given, list | tuple) else None
        if scores is None or len(scores) != len(rollouts_G) or not all(isinstance(s, Score) for s in scores):
            what = f"a {type(cast('object', given)).__name__}" if scores is None else f"{len(scores)} values"
            raise RewardError(
                f"reward {self._name!r} returned {what} for {len(rollouts_G)} rollouts, not one Score for each.",
                fix="return [Score(reward=...), ...] from retrain.types.",
            )
        return cast("list[Score]", list(scores))

    def close(self) -> None:
        """Close the reward, where it can be closed; what it raises is a warning."""
        close = getattr(self._reward, "close", None)
        if close is not None:
            try:
                close()
            except (Exception, SystemExit) as error:  # noqa: BLE001  whatever the user's code raises
                why = plugins.raised("reward", self._name, error)
                log.warning("%s This was while it was closed, and changes no result.", why)


def make_reward(name: str, config: Config, renderer: Renderer) -> Reward:
    """The reward ``name``: a built-in one as it is, one's own under guard."""
    reward = plugins.make("reward", name, config, renderer)
    if not plugins.is_own("reward", name):
        return reward
    score = getattr(reward, "score", None)
    if inspect.isfunction(getattr(score, "__func__", score)) and not inspect.iscoroutinefunction(score):
        raise PluginError(f"reward {name!r}: its score is not async.", fix="write async def score(self, task, rollouts_G).")
    return OwnReward(name, reward)
