"""Everything knowable before a device is spent: which directory a run may use, what a resume may change and
whether it will be byte-exact, what the data and the sampler's settings imply."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from retrain.config.schema import Config
from retrain.errors import ConfigError, ResumeError
from retrain.tracking import layout
from retrain.types import Task

NEUTRAL_ON_RESUME = (
    "training.max_steps",
    "training.save_every",
    "training.keep_checkpoints",
    "training.phase_timeout_s",
    "reward.timeout_s",
    "reward.max_error_rate",
    "backend.adapter_path",
    "plugins.",
    "logging.",
    "resume.",
)
"""Settings that may differ between a run and its continuation: they do not change what a step computes."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a run writes, and whether it starts there or continues."""

    directory: Path
    how: Literal["new", "resume"]
    note: str = ""


def choose_directory(config: Config, *, overwrite: bool, fork: bool) -> Place:
    """The run directory; a directory that already holds a run is refused unless the user said what to do."""
    if config.resume.from_:
        if overwrite or fork:
            raise ConfigError("--resume continues a run and cannot be combined with --overwrite or --fork.", fix="give one of them.")
        directory = Path(config.resume.from_)
        if not layout.holds_run(directory):
            raise ResumeError(f"{directory} holds no run.", fix="name the log_dir of an earlier run.")
        return Place(directory, "resume")
    directory = Path(config.logging.log_dir)
    if not layout.holds_run(directory):
        return Place(directory, "new")
    if fork:
        number = 2
        while layout.holds_run(directory.with_name(f"{directory.name}-{number}")):
            number += 1
        forked = directory.with_name(f"{directory.name}-{number}")
        return Place(forked, "new", f"{directory} holds a run: starting a new one in {forked}.")
    if overwrite:
        return Place(directory, "new", f"Overwriting the run in {directory}.")
    raise ConfigError(
        f"logging.log_dir = {str(directory)!r} already holds a run.",
        fix=f"continue it with --resume {directory}, start beside it with --fork, replace it with --overwrite, "
        "or give another --log-dir.",
    )


def check_writable(directory: Path) -> None:
    """Make the directory; ConfigError when it cannot be written."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / ".probe"
        probe.write_text("", encoding="utf-8")
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"logging.log_dir = {str(directory)!r} cannot be written: {error.strerror}.",
            fix="give another --log-dir or change its permissions.",
        ) from error


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of the settings that differ between two nested configurations."""
    changed: list[str] = []
    for key in sorted({*before, *now}):
        a, b = before.get(key), now.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            changed += changed_settings(a, b, f"{prefix}{key}.")  # pyright: ignore[reportUnknownArgumentType]
        elif a != b:
            changed.append(f"{prefix}{key}")
    return changed


def check_resume(before: Config, now: Config, completed: int) -> None:
    """ResumeError when a setting differs that changes what a step computes, or max_steps lies behind."""
    changed = changed_settings(before.model_dump(), now.model_dump())
    barred = [name for name in changed if not name.startswith(NEUTRAL_ON_RESUME)]
    if barred:
        raise ResumeError(
            f"{', '.join(barred)} differ(s) from the run that is to be resumed.",
            fix="resume without these changes, or start a new run with another --log-dir.",
        )
    if now.training.max_steps < completed:
        raise ResumeError(
            f"training.max_steps = {now.training.max_steps} but the run has already completed {completed} steps.",
            fix=f"set training.max_steps to {completed} or more.",
        )


def inexact_because(config: Config, before: Mapping[str, Any], now: Mapping[str, Any], reward_errors: int) -> list[str]:
    """Why a resumed run may differ from an uninterrupted one in the last bits; empty when it will not."""
    reasons: list[str] = []
    names = {"machine": "the processor", "device": "the device", "threads": "the thread count", "code": "retrain's own code"}
    for key in sorted({*before, *now} - {"git"}):
        if before.get(key) != now.get(key):
            what = names.get(key, f"the version of {key}" if key not in ("dtype", "deterministic") else key)
            reasons.append(f"{what} was {before.get(key) or 'unknown'} and is {now.get(key) or 'unknown'}")
    if now.get("deterministic") != "yes":
        reasons.append("CUDA kernels are not held to deterministic ones (training.deterministic = true does)")
    if config.reward.type == "custom" and reward_errors:
        reasons.append(f"{reward_errors} rewards failed or passed their deadline, which the clock decides")
    return reasons


def check_lengths(longest_prompt: int, config: Config, context: int | None) -> None:
    """ConfigError when a prompt and its completion cannot fit the model's positions."""
    needed = longest_prompt + config.training.max_tokens
    if context and needed > context:
        raise ConfigError(
            f"the longest prompt has {longest_prompt} tokens; with training.max_tokens = {config.training.max_tokens} a rollout "
            f"may need {needed} positions, but {config.model.model} has {context}.",
            fix=f"set training.max_tokens to at most {max(1, context - longest_prompt)}.",
        )


def advice(config: Config, tasks: Sequence[Task], ignored_generation_settings: Mapping[str, Any]) -> list[str]:
    """Plain sentences about what the settings imply for this data and model."""
    found: list[str] = []
    if ignored_generation_settings:
        listed = ", ".join(f"{k} = {v}" for k, v in sorted(ignored_generation_settings.items()))
        found.append(f"The model's generation_config wants {listed}: not used, sampling is what the configuration says.")
    if config.training.top_p < 1:
        found.append("top_p < 1 samples from a truncated policy; logprobs and the ratio describe the whole one.")
    if config.reward.type == "match":
        odd = sum(re.fullmatch(r"-?\d+", t.reference.strip()) is None for t in tasks)
        if odd > 0.05 * len(tasks):
            found.append(
                f"{odd / len(tasks):.0%} of the references are not plain integers: string match will miss equal answers "
                'that are written differently (reward type "math" will compare them symbolically).'
            )
    if config.algorithm.transform_mode == "gtpo_sepa" and config.sepa.schedule == "linear":
        steps = config.training.max_steps
        last = 0.0 if config.sepa.steps <= 0 else min(1.0, max(0.0, (steps - 1 - config.sepa.delay_steps) / config.sepa.steps))
        if last < 0.5:
            found.append(
                f"SEPA's lambda reaches only {last:.2f} at the last step (delay_steps = {config.sepa.delay_steps}, steps = "
                f"{config.sepa.steps}, max_steps = {steps}): the run is close to plain gtpo."
            )
    return found


def cpu_count() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
