"""When a configuration is a squeeze, the analysis of an adapter's rank, and what may stand in it then."""

from __future__ import annotations

from collections.abc import Iterator

from retrain.config.problems import Problem
from retrain.config.schema import Config
from retrain.errors import UsageError

_TRAINS = ("campaign", "training", "algorithm", "data", "environment", "reward")
"""Sections that make a configuration a run or a campaign, whatever else it says."""

_BESIDE = {
    "model": ("model", "revision", "lora_rank"),
    "logging": ("log_dir", "wandb_project", "wandb_run_name", "wandb_entity", "wandb_group", "wandb_tags", "trackers"),
}
"""Sections that may stand beside [squeeze], and their settings that act there."""


def is_squeeze(config: Config) -> bool:
    """True for [squeeze] without a section that trains."""
    return config.squeeze is not None and config.model_fields_set.isdisjoint(_TRAINS)


def refuse(config: Config, command: str) -> None:
    """UsageError for a squeeze where a command looks at training."""
    if is_squeeze(config):
        raise UsageError(
            f"this configuration is a squeeze, which retrain {command} does not take.", fix="retrain squeeze CONFIG."
        )


def check(config: Config) -> Iterator[Problem]:
    """What [squeeze] may not stand beside."""
    if config.squeeze is None:
        return
    if config.campaign is not None:
        if config.squeeze.adapter_path:
            yield Problem(
                ("squeeze", "adapter_path"),
                "squeeze.adapter_path does nothing in a campaign: the first run that is done is analysed.",
                "leave it out.",
            )
    elif not is_squeeze(config):
        fix = "remove it, and squeeze the run when it is done: retrain squeeze RUN."
        if config.squeeze.model_fields_set == {"device"}:
            fix = "--devices names the device of a run."
        yield Problem(("squeeze",), "[squeeze] does nothing in a training run.", fix)
    else:
        yield from _beside(config)


def _beside(config: Config) -> Iterator[Problem]:
    for section in sorted(config.model_fields_set - {"squeeze"}):
        if section not in _BESIDE:
            yield Problem(
                (section,), f"[{section}] does nothing in a squeeze.", "remove it; [model] and [logging] may stand here."
            )
            continue
        for name in sorted(getattr(config, section).model_fields_set - set(_BESIDE[section])):
            yield Problem((section, name), f"{section}.{name} does nothing in a squeeze.", "remove it.")
    for index, tracker in enumerate(config.logging.trackers):
        if tracker != "wandb":
            yield Problem(
                ("logging", "trackers", index), f'logging.trackers: "{tracker}" takes no squeeze.', 'leave "wandb" alone.'
            )
