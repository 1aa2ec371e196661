"""What the references of the tasks mean for the rewards that compare with them, said before a run starts."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from retrain.config import tables
from retrain.errors import ConfigError
from retrain.types import Task

if TYPE_CHECKING:
    from retrain.config.schema import Config

log = logging.getLogger("retrain")

_COMPARE = ("match", "math")
"""Rewards for which no answer equals an empty reference."""

_NAMED = 5


def check(config: Config, tasks: Sequence[Task], held_out: Sequence[Task]) -> list[str]:
    """Sentences about the references; a warning where match or math can never pass a task, because it has none.

    ConfigError where that is so for every training task, or for every evaluation task, of a source.
    """
    for what, group in (("training", tasks), ("evaluation", held_out)):
        _empty(config, what, group)
    return _copied(config, tasks)


def _reward_of(config: Config, source: str) -> str:
    return tables.rewards_by_source(config).get(source, config.reward.type)


def _empty(config: Config, what: str, tasks: Sequence[Task]) -> None:
    sources = sorted({t.source for t in tasks})
    for source in sources:
        reward = _reward_of(config, source)
        of_source = [t for t in tasks if t.source == source]
        empty = [t.id for t in of_source if not t.reference.strip()]
        if reward not in _COMPARE or not empty:
            continue
        if len(empty) == len(of_source):
            raise ConfigError(
                f"no {what} task of {source!r} has a reference, and without one {reward} passes no answer.",
                fix="use a reward that needs none, such as reasoning_gym for generated tasks or custom.",
            )
        named = ", ".join(empty[:_NAMED]) + (", ..." if len(empty) > _NAMED else "")
        log.warning(
            "%d of %d %s tasks of %r have no reference, and %s passes no answer to them: %s",
            len(empty), len(of_source), what, source, reward, named,
        )  # fmt: skip


def _copied(config: Config, tasks: Sequence[Task]) -> list[str]:
    """Whether a reward that evaluates scores questions that are their own answer."""
    kinds = {config.data.source: config.data.source}
    if config.data.source == "mixture":
        kinds = {t.label: t.source for t in tables.mixture(config)}
    sums = [label for label, kind in kinds.items() if kind == "arithmetic"]
    part = any(t.type == "math" for t in tables.parts(config))
    mathematical = [
        label
        for label in sums
        if (name := _reward_of(config, label)) == "math" or (name == "composite" and part)
    ]
    if not mathematical or not tasks:
        return []
    return [
        f"Reward math takes a calculation for its result: on {', '.join(mathematical)} copying the question into the box "
        'scores 1. Reward "match" wants the number itself.'
    ]
