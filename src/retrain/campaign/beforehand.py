"""What the settings of a campaign's conditions imply before any run, above all where a condition will not do what it is named
for: its runs then compute another method, and a verdict on it would be about that one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from retrain import preflight
from retrain.campaign.plan import Plan
from retrain.config.schema import Config
from retrain.training import ahead

_NEUTRAL = (*preflight.NEUTRAL_ON_RESUME, "algorithm.transform_mode", "sepa.", "training.seed")


def notes(planned: Plan, ignored: Mapping[str, Any] | None = None) -> list[str]:
    """Sentences about the conditions, each with their names where it is about some of them alone; those about a method that
    never acts first. ``ignored`` is what the model's generation_config was not allowed to set, where that is known."""
    arms = configurations(planned)
    said: dict[str, list[str]] = {}
    first: list[str] = []
    for label, config in arms.items():
        found, never = ahead.lambdas(config), ahead.note(config)
        if found is None or not found.never:
            never = ""
        else:
            first.append(
                f"condition {label}: {never}{_twin(label, arms)} What is said of it will not be about SEPA. {_FIX}"
            )
        for line in preflight.advice(config, (), (), ignored or {}):
            if line != never:
                said.setdefault(line, []).append(label)
    others = [line if len(of) == len(arms) else f"{line} (Of {', '.join(of)}.)" for line, of in said.items()]
    return [*first, *others]


_FIX = "Fix: smaller sepa.delay_steps and sepa.steps, or more steps (campaign.max_steps)."


def configurations(planned: Plan) -> dict[str, Config]:
    """A run's configuration of each condition."""
    return {run.condition: run.config for run in planned.runs[: len(planned.conditions)]}


def _twin(label: str, arms: Mapping[str, Config]) -> str:
    """The conditions whose runs compute the same once SEPA never acts."""
    mine = arms[label]
    same = [
        other
        for other, config in arms.items()
        if other != label and _is_gtpo(config) and _alike(mine, config)
    ]
    return (
        f" So {'does' if len(same) == 1 else 'do'} {' and '.join(same)}." if _is_gtpo(mine) and same else ""
    )


def _is_gtpo(config: Config) -> bool:
    mode, found = config.algorithm.transform_mode, ahead.lambdas(config)
    is_built_in = not config.algorithm.algorithm_mode and (mode == "gtpo" or mode.startswith("gtpo_sepa"))
    return is_built_in and (found is None or found.never)


def _alike(one: Config, other: Config) -> bool:
    changed = preflight.changed_settings(one.model_dump(by_alias=True), other.model_dump(by_alias=True))
    return all(name.startswith(_NEUTRAL) and not name.startswith("training.max_steps") for name in changed)
