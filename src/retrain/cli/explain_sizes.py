"""What ``retrain explain`` says of a run whose batch size follows the clock: its sizes, and what the largest needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from retrain import preflight
from retrain.cli.explained import memory_record, time_record
from retrain.config.schema import Config
from retrain.estimate import Estimate


def sizes_record(config: Config, made: Estimate | None, at: Callable[[Config], Estimate]) -> dict[str, Any] | None:
    """None without back pressure. ``made`` is the estimate at ``training.batch_size``, ``at`` that of another configuration."""
    settings, training = config.backpressure, config.training
    if not settings.enabled:
        return None
    largest = None
    if made is not None:
        wide = training.model_copy(update={"batch_size": settings.max_batch_size})
        largest = at(config.model_copy(update={"training": wide}))
    return {
        "least": settings.min_batch_size, "most": settings.max_batch_size, "group_size": training.group_size,
        "warmup": _warmup(config), "own": settings.controller != "usl",
        "memory": largest and memory_record(largest),
        "time": largest and time_record(config, largest, measured=False),
        "advice": [] if largest is None else preflight.fit_advice(largest),
    }  # fmt: skip


def _warmup(config: Config) -> list[int]:
    """Sizes that the built-in controller measures first, in order."""
    settings = config.backpressure
    if settings.controller != "usl" or not settings.warmup_steps:
        return []
    from retrain.training.backpressure import sweep_sizes

    return list(sweep_sizes(settings.min_batch_size, settings.max_batch_size, config.training.batch_size))
