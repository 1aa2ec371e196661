"""From one configuration to the runs of a campaign: every condition checked as a run of its own before any starts."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retrain import cards, machine, preflight
from retrain.campaign.manifest import Declared, Manifest
from retrain.campaign.outcomes import run_name
from retrain.config import campaigns
from retrain.config.load import LoadedConfig, Override, load
from retrain.config.schema import Campaign, Config
from retrain.environments.sources import digest_of
from retrain.errors import ConfigError
from retrain.training import build, dry

@dataclass(frozen=True, slots=True)
class PlannedRun:
    """One run to be: ``config`` is complete but for its directory (``logging.log_dir``)."""

    name: str
    condition: str
    seed: int
    config: Config


@dataclass(frozen=True, slots=True)
class Plan:
    """The runs of a campaign, seed by seed and in each the conditions in order, so that a campaign that is stopped early
    holds balanced results. ``loaded`` is the whole configuration, with paths made absolute."""

    loaded: LoadedConfig
    conditions: tuple[campaigns.Condition, ...]
    seeds: tuple[int, ...]
    runs: tuple[PlannedRun, ...]

    @property
    def campaign(self) -> Campaign:
        """The section ``[campaign]``."""
        return self.loaded.config.campaign or Campaign()


def plan(
    loaded: LoadedConfig, *, name: str, seeds: tuple[int, ...] = (), chosen: Mapping[str, Any] | None = None
) -> Plan:
    """The runs of the campaign ``name``. ``seeds`` instead of the configuration's; ``chosen`` maps a condition's label to
    the tuned value. ConfigError with every problem of every condition."""
    config = loaded.config
    campaign = config.campaign or Campaign()
    conditions = campaigns.conditions(config)
    key, _ = campaigns.tuned(campaign)
    wrong: list[str] = []
    arms: dict[str, Config] = {}
    for condition in conditions:
        settings = dict(condition.settings)
        if chosen and condition.label in chosen:
            settings[key] = chosen[condition.label]
        try:
            arms[condition.label] = arm(loaded, condition, settings)
        except ConfigError as error:
            wrong += error.problems or [str(error)]
    if wrong:
        raise ConfigError("the conditions have problems.", problems=tuple(dict.fromkeys(wrong)))
    seeds = seeds or campaign.seeds
    runs = tuple(
        PlannedRun(run_name(label, seed), label, seed, seeded(arms[label], name, label, seed))
        for seed in seeds
        for label in arms
    )
    return Plan(loaded, conditions, seeds, runs)


def anchored(loaded: LoadedConfig) -> LoadedConfig:
    """The configuration with paths of inputs made absolute, so that the campaign's own copy works from any folder."""
    config = preflight.anchored(loaded.config, loaded.path)
    paths = tuple(str(p.resolve()) for p in loaded.search_paths)
    config = config.model_copy(update={"plugins": config.plugins.model_copy(update={"search_paths": paths})})
    return LoadedConfig(config, loaded.origins, loaded.announcements, loaded.path)


def arm(loaded: LoadedConfig, condition: campaigns.Condition, settings: Mapping[str, Any]) -> Config:
    """The configuration of one condition's runs, checked as a run's; its errors name the condition."""
    config = loaded.config
    campaign = config.campaign or Campaign()
    base = config.model_copy(update={"campaign": None}).model_dump(exclude_unset=True, by_alias=True)
    base.pop("campaign", None)
    base["training"] = {**base.get("training", {}), "max_steps": campaign.max_steps}
    at = loaded.origins.get("campaign.conditions")
    where = f"{at.where if at and at.where else 'campaign.conditions'} ({condition.label})"
    overrides = [Override.of(key, value, where) for key, value in settings.items()]
    return load(base, overrides).config


def seeded(config: Config, name: str, label: str, seed: int) -> Config:
    """The configuration of the run of one seed, with its names at trackers."""
    tags = [tag.strip() for tag in config.logging.wandb_tags.split(",") if tag.strip()]
    tags += [tag for tag in (*label.split("~")[0].split("+"), f"seed={seed}", name) if tag not in tags]
    uses_wandb = bool(config.logging.wandb_project) or "wandb" in config.logging.trackers
    named = {"wandb_run_name": run_name(label, seed), "wandb_group": label, "wandb_tags": ",".join(tags)}
    return _with(_with(config, "training", seed=seed), "logging", **(named if uses_wandb else {}))


def declare(planned: Plan, name: str, *, threads: int, tune: Mapping[str, Any] | None = None) -> Manifest:
    """What is fixed before the first run; reads the held-out tasks for their digest, and loads no model."""
    config, campaign = planned.loaded.config, planned.campaign
    return Manifest(
        Declared(
            name=name,
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            conditions={c.label: dict(c.settings) for c in planned.conditions},
            baseline=campaigns.baseline(config),
            seeds=planned.seeds,
            max_steps=campaign.max_steps,
            outcome="eval/accuracy" if config.eval.source else "correct_rate",
            evaluation=evaluation(planned.runs[0].config),
            alpha=campaign.alpha,
            smallest_effect=campaign.smallest_effect,
            test=campaign.test,
            looks=campaign.looks or (len(planned.seeds),),
            threshold=campaign.threshold,
            threads=threads,
            tune=tune,
            versions={key: str(value) for key, value in build.facts().items()},
        )
    )


def evaluation(config: Config) -> dict[str, Any]:
    """The held-out tasks of a run's configuration: what they are, and the digest of their contents."""
    if not config.eval.source:
        return {}
    with dry.parts(config) as parts:
        section = config.eval
        return {
            "source": section.source,
            "split": section.split,
            "tasks": len(parts.held_out),
            "samples": section.samples,
            "seed": section.seed,
            "every": section.every,
            "digest": digest_of(parts.held_out),
        }


def workers(config: Config) -> int:
    """How many runs go at once: what the configuration says, or one for each visible device (CPU: each core)."""
    campaign = config.campaign or Campaign()
    if campaigns.launcher(campaign) == "serial":
        return 1
    if campaign.max_workers:
        return campaign.max_workers
    gpus = [] if config.backend.devices == "cpu" else cards.visible()
    return len(gpus) or max(1, int(machine.usable_processors()))


def threads_of(config: Config) -> int:
    """CPU threads of each run: what the configuration says, or the cores shared among the runs at once."""
    campaign = config.campaign or Campaign()
    return campaign.threads or max(1, int(machine.usable_processors()) // workers(config))


def placed(run: PlannedRun, directory: Path) -> Config:
    """The run's configuration with its directory."""
    return _with(run.config, "logging", log_dir=str(directory))


def _with(config: Config, section: str, **values: Any) -> Config:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})
