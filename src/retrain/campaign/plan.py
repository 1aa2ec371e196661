"""From one configuration to the runs of a campaign: every condition checked as a run of its own before any starts."""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Generator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from retrain import cards, machine, preflight
from retrain.campaign import rank
from retrain.campaign.manifest import Declared, Manifest, settings_digest
from retrain.campaign.outcomes import run_name
from retrain.config import campaigns, fields
from retrain.config.load import LoadedConfig, Origin, Override, load
from retrain.config.problems import KeyPath
from retrain.config.schema import Campaign, Config
from retrain.environments.sources import digest_of
from retrain.errors import ConfigError, ResumeError
from retrain.training import build, dry
from retrain.types import Task


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
    holds balanced results. ``loaded`` is the whole configuration, with paths made absolute. ``announcements`` name what is
    accepted and does nothing: in no run at all, or against what a condition sets."""

    loaded: LoadedConfig
    conditions: tuple[campaigns.Condition, ...]
    seeds: tuple[int, ...]
    runs: tuple[PlannedRun, ...]
    announcements: tuple[str, ...] = ()

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
    arms: dict[str, LoadedConfig] = {}
    with Problems() as problems:
        for condition in conditions:
            settings = dict(condition.settings)
            if chosen and condition.label in chosen:
                settings[key] = chosen[condition.label]
            with problems.of(condition.label):
                arms[condition.label] = arm(loaded, condition, settings)
    seeds = seeds or campaign.seeds
    assert len({label.casefold() for label in arms}) == len(arms), "every run has a directory of its own"
    runs = tuple(
        PlannedRun(run_name(label, seed), label, seed, seeded(arms[label].config, name, label, seed))
        for seed in seeds
        for label in arms
    )
    return Plan(loaded, conditions, seeds, runs, _announcements(loaded, arms))


class Problems:
    """Collects what is wrong with several configurations, and raises it as one ConfigError at the end of the block. What
    is wrong with all of them is said once, without the name of one."""

    def __init__(self) -> None:
        self._found: dict[str, list[str]] = {}
        self._tried: list[str] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None and self._found:
            said = [
                line if len(names) == len(self._tried) or f"({_OF} " in line else f"{line} (Of {', '.join(names)}.)"
                for line, names in self._found.items()
            ]
            raise ConfigError("the conditions have problems.", problems=said)

    @contextlib.contextmanager
    def of(self, name: str) -> Generator[None]:
        """Inside, a ConfigError is kept, as one of the configuration ``name``."""
        self._tried.append(name)
        try:
            yield
        except ConfigError as error:
            for line in error.problems or [str(error)]:
                self._found.setdefault(line, []).append(name)


def _announcements(loaded: LoadedConfig, arms: Mapping[str, LoadedConfig]) -> tuple[str, ...]:
    """What the campaign's own section announces, what holds for the runs of every condition, and what is about some of them
    alone, with their names. That a shared setting does nothing in some conditions is what conditions are for."""
    alone = set(without_campaign(loaded).announcements)
    said: dict[str, list[str]] = {}
    names: dict[str, list[str]] = {}
    for label, each in arms.items():
        for line in each.announcements:
            # The mode that makes a setting idle may be another in each condition.
            said.setdefault(line.partition(" nothing with ")[0], []).append(line)
            names.setdefault(line, []).append(label)
    found = [line for line in loaded.announcements if line not in alone]
    found += _overridden(loaded)
    for head, lines in said.items():
        if len(lines) == len(arms):
            found.append(lines[0] if len(set(lines)) == 1 else f"{head} nothing in any condition.")
        else:
            found += [
                line if f"({_OF} " in line else f"{line} (Of {', '.join(names[line])}.)"
                for line in lines
                if f"({_OF} " in line or " does nothing" not in line
            ]
    found += _alike(loaded, arms)
    return tuple(dict.fromkeys(found))


def _overridden(loaded: LoadedConfig) -> list[str]:
    """Shared settings that were written and act in no run, because every condition has a value of its own."""
    config, campaign = loaded.config, loaded.config.campaign or Campaign()
    tuned, values = campaigns.tuned(campaign)
    arms = [campaigns.own(condition, campaign) for condition in campaigns.conditions(config)]
    found: list[str] = []
    for key in fields.settings():
        path = tuple(key.split("."))
        # The launcher reads the shared device as well.
        if path[0] == "campaign" or key == "backend.devices" or path not in loaded.places:
            continue
        if values and key == tuned:
            why, fix = "campaign.tune chooses it for every condition", "leave it out, or put the value among those tried"
        elif all(key in arm for arm in arms):
            why, fix = "every condition sets it", "leave it out, or change it there"
            if not campaign.conditions:
                why, fix = "the five standard conditions set it", "leave it out, or list [[campaign.conditions]] of your own"
        else:
            continue
        place = loaded.where(*path)
        found.append(f"{place}{': ' if place else ''}{key} does nothing: {why}. Fix: {fix}.")
    return found


def _alike(loaded: LoadedConfig, arms: Mapping[str, LoadedConfig]) -> list[str]:
    """Conditions whose runs compute the same as those of an earlier one: they may be meant as a test of the comparison
    itself, and cost the others sensitivity."""
    campaign = loaded.config.campaign or Campaign()
    conditions = {condition.label: condition for condition in campaigns.conditions(loaded.config)}
    found: list[str] = []
    for at, (label, each) in enumerate(arms.items()):
        for other in list(arms)[:at]:
            if not _differing(arms[other].config, each.config):
                keys = list(conditions[label].settings)
                place = loaded.where(*campaigns.path_of(conditions[label], campaign, keys[-1]))
                found.append(
                    f"{place}{': ' if place else ''}conditions {other} and {label} compute the same: what they set differently "
                    "changes no step. Their comparison is one of equal runs, and counts among those that share alpha. "
                    "Fix: remove one, unless you mean to test the comparison itself."
                )
                break
    return found


def _differing(one: Config, other: Config) -> list[str]:
    """What differs between two configurations and changes what a step computes: dotted names with both values."""
    neutral = tuple(key for key in preflight.NEUTRAL_ON_RESUME if key != "training.max_steps")
    changed = preflight.changed_settings(one.model_dump(by_alias=True), other.model_dump(by_alias=True))
    return [name for name in changed if not name.startswith((*neutral, "training.seed", "campaign", "squeeze"))]


_OF = "condition"


def anchored(loaded: LoadedConfig) -> LoadedConfig:
    """The configuration with paths of inputs made absolute, so that the campaign's own copy works from any folder."""
    config = preflight.anchored(loaded.config, loaded.path)
    paths = tuple(str(p.resolve()) for p in loaded.search_paths)
    config = config.model_copy(update={"plugins": config.plugins.model_copy(update={"search_paths": paths})})
    if config.campaign is not None and config.campaign.pilot:
        pilot = _found(config.campaign.pilot, loaded.path)
        config = config.model_copy(update={"campaign": config.campaign.model_copy(update={"pilot": pilot})})
    if config.squeeze is not None:
        config = config.model_copy(update={"squeeze": rank.anchored(config.squeeze)})
    return replace(loaded, config=config)


def _found(path: str, toml: Path | None) -> str:
    """The path made absolute where it exists beside the TOML or in the working directory."""
    for root in (toml.parent if toml else Path.cwd(), Path.cwd()):
        with contextlib.suppress(OSError, RuntimeError):
            if (place := root / Path(path).expanduser()).exists():
                return str(place.resolve())
    return path


def arm(loaded: LoadedConfig, condition: campaigns.Condition, settings: Mapping[str, Any]) -> LoadedConfig:
    """The configuration of one condition's runs, checked as a run's. Its errors name the file and line of each value, and
    the condition where it is the condition that sets it."""
    campaign = loaded.config.campaign or Campaign()
    base, places = _shared(loaded)
    base["training"] = {**base.get("training", {}), "max_steps": campaign.max_steps}
    places[("training", "max_steps")] = Origin("file", loaded.where("campaign", "max_steps"))
    overrides: list[Override] = []
    for key, value in settings.items():
        path = campaigns.path_of(condition, campaign, key)
        # What is tuned is the same for all conditions.
        named = "" if path[:2] == ("campaign", "tune") else f"({_OF} {condition.label})"
        overrides.append(Override.of(key, value, f"{loaded.where(*path)} {named}".strip()))
    return load(base, overrides, places=places)


def without_campaign(loaded: LoadedConfig) -> LoadedConfig:
    """The same configuration as that of one run."""
    base, places = _shared(loaded)
    return load(base, places=places)


def _shared(loaded: LoadedConfig) -> tuple[dict[str, Any], dict[KeyPath, Origin]]:
    """What all conditions share, as it was written, and where."""
    config = loaded.config.model_copy(update={"campaign": None})
    dump: dict[str, Any] = config.model_dump(exclude_unset=True, by_alias=True)
    for section in ("campaign", "resume", "squeeze"):
        dump.pop(section, None)
    decided = {"training.seed", "training.max_steps", "logging.wandb_run_name", "logging.wandb_group"}
    base: dict[str, Any] = {}
    for section, table in dump.items():
        # Making paths absolute leaves settings behind that nobody wrote.
        base[section] = {
            name: value
            for name, value in table.items()
            if f"{section}.{name}" not in decided
            and ((section, name) in loaded.places or value != fields.settings()[f"{section}.{name}"].default)
        }
    return base, {path: origin for path, origin in loaded.places.items() if path[0] != "campaign"}


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
    rank.check(config.squeeze)
    _check_tasks(planned)
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
            settings=settings_of(planned),
        )
    )


def _check_tasks(planned: Plan) -> None:
    """ConfigError where a condition's data changes which held-out tasks its runs are evaluated on, or makes its runs train on
    held-out tasks that others do not see. Their prompts may differ."""
    if not planned.loaded.config.eval.source:
        return
    first: tuple[list[tuple[str, str]], set[int]] | None = None
    seen: list[Config] = []
    for condition, run in zip(planned.conditions, planned.runs, strict=False):
        if any(same_tasks(run.config, other) for other in seen):
            continue
        seen.append(run.config)
        with dry.parts(run.config) as parts:
            trained = {text_of(task) for task in parts.tasks}
            tasks = [(task.id, task.reference) for task in parts.held_out]
            shared = {i for i, task in enumerate(parts.held_out) if text_of(task) in trained}
        first = first or (tasks, shared)
        own = [key for key in condition.settings if key.startswith("data.") or key == "training.max_examples"]
        if tasks != first[0]:
            raise ConfigError(
                f"{_placed(planned, condition, own)}condition {condition.label} sets {', '.join(own)}, which also changes the "
                "tasks that it is evaluated on: its results could not be compared.",
                fix=f"state {own[0].replace('data.', 'eval.')} for all of them, or leave it out of the condition.",
            )
        if shared != first[1]:
            raise ConfigError(
                f"{_placed(planned, condition, own)}condition {condition.label} trains on {len(shared)} of the {len(tasks)} "
                f"held-out tasks, {planned.conditions[0].label} on {len(first[1])}: its results could not be compared.",
                fix="train all of them on data without the held-out tasks, or evaluate on other tasks.",
            )


def same_tasks(one: Config, other: Config) -> bool:
    """Do both train and are both evaluated on the same tasks, as far as settings tell?"""
    return (one.data, one.eval, one.environment, one.training.max_examples) == (
        other.data, other.eval, other.environment, other.training.max_examples,
    )  # fmt: skip


def text_of(task: Task) -> str:
    """What a task asks; two with the same text are the same one, whatever their ids."""
    return "\n".join(f"{message.role}: {message.content}" for message in task.messages)


def _placed(planned: Plan, condition: campaigns.Condition, keys: list[str]) -> str:
    place = planned.loaded.where(*campaigns.path_of(condition, planned.campaign, keys[0])) if keys else ""
    return f"{place}: " if place else ""


def settings_of(planned: Plan) -> dict[str, str]:
    """The digest of what every condition's runs compute with, but for what is tuned."""
    key, values = campaigns.tuned(planned.campaign)
    arms = zip(planned.conditions, planned.runs, strict=False)
    return {c.label: settings_digest(run.config, key if values else "") for c, run in arms}


def check_unchanged(planned: Plan, declared: Declared, before: Config | None = None) -> None:
    """ResumeError where the configuration is not that of the campaign's first start. ``before`` is the configuration that the
    campaign keeps, where ``planned`` is of another file: the error then names the settings."""
    now, kept = settings_of(planned), declared.settings
    labels = [label for label in (*declared.conditions, *now) if (label in now) != (label in declared.conditions)]
    changed = labels or [label for label in now if kept and now[label] != kept.get(label)]
    differing = _changed_design(planned, declared, is_same=not labels)
    if not changed and not differing:
        return
    said = differing
    if changed and not any(line.startswith("campaign.max_steps") for line in differing):
        shared = _differing(before, planned.loaded.config) if before is not None and not labels else []
        said = [*(shared or [f"condition {changed[0]} is not what it was"]), *differing]
    what = ", ".join(said)
    if all(line.endswith(" is not what it was") for line in said):
        what += " when the campaign began"
    raise ResumeError(
        f"{planned.loaded.path or 'the configuration'}: {what}; the campaign's remaining runs could not be compared with those "
        "that are done.",
        fix="restore the file; another design is another campaign."
        if before is None
        else "go on without the file (--resume DIR alone), or start a new campaign for another design.",
    )


def _changed_design(planned: Plan, declared: Declared, *, is_same: bool) -> list[str]:
    """What [campaign] says otherwise than was declared: keys with both values. ``is_same``: the conditions are the same."""
    campaign, tune = planned.campaign, declared.tune
    pairs: dict[str, tuple[Any, Any]] = {
        "max_steps": (declared.max_steps, campaign.max_steps),
        "alpha": (declared.alpha, campaign.alpha),
        "smallest_effect": (declared.smallest_effect, campaign.smallest_effect),
        "test": (declared.test, campaign.test),
        "looks": (list(declared.looks), list(campaign.looks or (len(declared.seeds),))),
        "threshold": (declared.threshold, campaign.threshold),
        # 0 leaves the number to what was declared.
        "threads": (declared.threads, campaign.threads or declared.threads),
    }
    if is_same:
        pairs["baseline"] = (declared.baseline, campaigns.baseline(planned.loaded.config))
    found = [f"campaign.{key} was {was!r} and is {now!r}" for key, (was, now) in pairs.items() if was != now]
    field, values = campaigns.tuned(campaign)
    if bool(tune) != bool(values):
        return [*found, "campaign.tune is not what it was"]
    steps = campaign.tune.max_steps or campaign.max_steps
    if tune and [field, *values, steps, *campaign.tune.seeds] != [
        tune["field"], *tune["values"], tune["max_steps"], *tune["seeds"],
    ]:  # fmt: skip
        found.append("campaign.tune is not what it was")
    return found


def check_tasks(declared: Mapping[str, Any], now: Mapping[str, Any], what: str) -> None:
    """ResumeError where an ``evaluation`` is not of the tasks of the one that was declared."""
    if declared.get("digest") not in (None, now.get("digest")):
        raise ResumeError(
            f"the {declared['tasks']} {what} (source {declared['source']!r}) are not those of the campaign's first start: its "
            "remaining runs could not be compared with those that are done.",
            fix="restore the data that they are read from; other tasks are another campaign.",
        )


def evaluation(config: Config) -> dict[str, Any]:
    """The held-out tasks of a run's configuration: what they are, the digest of their contents, and what its answers are
    sampled and scored with."""
    if not config.eval.source:
        return {}
    section, training = config.eval, config.training
    scored = config.reward.model_dump(mode="json", exclude_defaults=True)
    with dry.parts(config) as parts:
        return {
            "source": section.source,
            "split": section.split,
            "tasks": len(parts.held_out),
            "samples": section.samples,
            "seed": section.seed,
            "every": section.every,
            "digest": digest_of(parts.held_out),
            "max_tokens": section.max_tokens or training.max_tokens,
            "temperature": section.temperature or training.temperature,
            "top_p": training.top_p,
            **({"stop": list(training.stop)} if training.stop else {}),
            "reward": config.reward.type,
            **{f"reward.{key}": value for key, value in scored.items() if key != "type"},
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
