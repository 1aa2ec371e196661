"""What sets the conditions of a campaign apart, and where that had no effect: a condition whose method never acted in its runs
was trained as another one, and a verdict on it is about that other one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from retrain.campaign.manifest import Declared
from retrain.campaign.outcomes import RunOutcome
from retrain.campaign.reading import Reading
from retrain.config import names
from retrain.errors import RetrainError

OWN = ("campaign", "logging", "resume")
"""Sections of the campaign's own configuration that are no settings of its runs."""


def settings(config: Mapping[str, Any], declared: Declared, chosen: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What the runs of each condition were given, dotted: what the campaign's ``config`` has for all, then the condition's own,
    then what was ``chosen`` for it."""
    tuned = str((declared.tune or {}).get("field", ""))
    shared = {
        f"{section}.{name}": value
        for section, table in config.items()
        if section not in OWN and isinstance(table, dict)
        for name, value in cast("dict[str, Any]", table).items()
    }
    return {
        label: {**shared, **own, **({tuned: chosen[label]} if tuned and label in chosen else {})}
        for label, own in declared.conditions.items()
    }


def unused(given: Mapping[str, Any]) -> frozenset[str]:
    """Which of a condition's settings do nothing beside its others; none where they cannot be read, as with a plug-in that is
    gone."""
    # Loading a configuration takes pydantic, which a look at a campaign has no need of.
    from retrain.config.idle import idle
    from retrain.config.load import load_config

    sections: dict[str, dict[str, Any]] = {}
    for key, value in given.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value
    try:
        return frozenset(idle(load_config(sections)))
    except (RetrainError, ValueError):
        return frozenset()


def without_effect(
    given: Mapping[str, Mapping[str, Any]], declared: Declared, runs: Sequence[RunOutcome], readings: Mapping[str, Reading]
) -> dict[str, str]:
    """By condition, in sentences, which part of its method acted in none of its runs that have ended, or not in all; without
    the conditions of which there is nothing to say. ``given`` are the settings of each condition."""
    found: dict[str, str] = {}
    for label, of in given.items():
        mode = str(of.get("algorithm.algorithm_mode") or of.get("algorithm.transform_mode") or "")
        ended = [r for r in runs if r.condition == label and r.state in ("done", "failed") and r.step and r.name in readings]
        told = _by_settings(mode, of)
        if not told and ended:
            own = mode not in names.BUILT["transform"] and any(k.startswith("sepa.") for k in declared.conditions[label])
            if mode.startswith("gtpo_sepa") or own:
                told = _sepa(mode, of, ended, readings)
            elif mode == "gtpo_hicra":
                told = _hicra(ended, readings)
        if told:
            found[label] = told
    return found


def _by_settings(mode: str, given: Mapping[str, Any]) -> str:
    """What the settings alone switch off."""
    if mode == "gtpo_hicra" and given.get("hicra.alpha") == 0:
        return "With hicra.alpha = 0 HICRA changes nothing: it trained as gtpo."
    if mode == "gtpo" and given.get("gtpo.beta") == 0:
        return "With gtpo.beta = 0 GTPO weighs nothing: it trained as transform none."
    if mode.startswith("gtpo_sepa") and given.get("gtpo.beta") == 0:
        return "With gtpo.beta = 0 what SEPA pools weighs nothing: it trained as transform none."
    return ""


def _sepa(
    mode: str, given: Mapping[str, Any], ended: Sequence[RunOutcome], readings: Mapping[str, Reading]
) -> str:
    told = [(run, most) for run in ended if (most := readings[run.name].most_lambda) is not None]
    off = [run for run, most in told if most == 0]
    if not off:
        return ""
    how = "acted in none" if len(off) == len(told) else f"did not act in {len(off)}"
    text = f"SEPA {how} of {len(told)} run{'s' * (len(told) > 1)}: its lambda was 0 in all {_steps(off)} steps"
    delay, length, gate = (given.get(f"sepa.{name}") for name in ("delay_steps", "steps", "correct_rate_gate"))
    longest = max(run.step for run in off)
    is_linear = given.get("sepa.schedule") != "auto"
    if length == 0 and is_linear:
        text += ", as sepa.steps = 0 switches it off"
    elif is_linear and isinstance(delay, int) and longest <= delay + 1:
        text += f", as it begins to rise after sepa.delay_steps = {delay} steps"
        text += f" and takes sepa.steps = {length} from there" if length else ""
    elif any(readings[run.name].gate_shut for run in off):
        text += ", as no step's correct rate reached sepa.correct_rate_gate" + ("" if gate is None else f" = {gate}")
    like = "gtpo" if mode.startswith("gtpo_sepa") else "the same without SEPA"
    if len(off) == len(told):
        return f"{text}. It trained as {like}: what is said of it is said of that, not of SEPA."
    return f"{text}. {'It' if len(off) == 1 else 'They'} trained as {like}."


def _hicra(ended: Sequence[RunOutcome], readings: Mapping[str, Reading]) -> str:
    told = [(run, planned) for run in ended if (planned := readings[run.name].has_planning) is not None]
    off = [run for run, planned in told if not planned]
    if not off or len(off) < len(told):
        return ""
    return (
        f"HICRA acted in none of {len(told)} run{'s' * (len(told) > 1)}: no planning token was found in {_steps(off)} steps "
        "([planning] says what counts as one). It trained as gtpo: what is said of it is said of that, not of HICRA."
    )


def _steps(runs: Sequence[RunOutcome]) -> str:
    fewest, most = min(run.step for run in runs), max(run.step for run in runs)
    return f"{most:,}" if fewest == most else f"{fewest:,} to {most:,}"
