"""The conditions of a campaign: their labels, what each sets, and what a campaign's configuration may not say."""

from __future__ import annotations

import difflib
import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal, cast

from retrain.config.fields import literal, settings
from retrain.config.flags import SPECIAL, flags
from retrain.config.idle import is_given
from retrain.config.problems import KeyPath, Problem, dotted, shown_key
from retrain.config.schema import Campaign, Config

STANDARD = (
    ("grpo", "none"),
    ("maxrl", "none"),
    ("maxrl", "gtpo"),
    ("maxrl", "gtpo_hicra"),
    ("maxrl", "gtpo_sepa"),
)
"""Advantage and transform of the five conditions that a campaign without conditions runs."""

_ADVANTAGE, _TRANSFORM = "algorithm.advantage_mode", "algorithm.transform_mode"
_SAME_FOR_ALL = {
    "training.seed": "campaign.seeds lists the seeds",
    "training.max_steps": "every run takes campaign.max_steps",
    "eval": "every run is evaluated on the same tasks in the same way",
    "campaign": "a campaign holds no other",
    "squeeze": "an analysis is the campaign's, not a condition's",
    "resume": "--resume continues the whole campaign",
    "logging": "every run has a directory of its own inside the campaign's",
    "backend.adapter_path": "every run has an adapter of its own",
    "plugins": "plug-ins are found for all runs alike",
}
"""What a condition may not set, and why."""


def why_same(key: str) -> str:
    """Why no condition may set a dotted key, "" where one may."""
    return next((_SAME_FOR_ALL[k] for k in (key, key.partition(".")[0]) if k in _SAME_FOR_ALL), "")


@dataclass(frozen=True, slots=True)
class Condition:
    """One arm. ``settings`` are dotted keys with their values, the two modes first; ``index`` its place in the TOML, -1 for
    one of the standard five."""

    label: str
    settings: Mapping[str, Any]
    index: int = -1


def launcher(campaign: Campaign) -> Literal["serial", "processes", "ray"]:
    """What starts the runs: ``parallel`` alone asks for processes."""
    return "processes" if campaign.parallel and campaign.launcher == "serial" else campaign.launcher


def implied(config: Config) -> Mapping[str, str]:
    """Settings whose defaults contradict what the configuration says, with the key that says it: no file states them."""
    campaign = config.campaign
    return {"campaign.launcher": "campaign.parallel"} if campaign is not None and campaign.parallel else {}


def conditions(config: Config) -> tuple[Condition, ...]:
    """The conditions of ``config.campaign`` in order, those that ``check`` would refuse left out."""
    campaign = config.campaign or Campaign()
    if not campaign.conditions:
        return tuple(
            Condition(f"{advantage}+{transform}", {_ADVANTAGE: advantage, _TRANSFORM: transform})
            for advantage, transform in STANDARD
        )
    found = [_condition(config, index, table) for index, table in enumerate(campaign.conditions)]
    # Every label names a folder, also where file systems do not tell upper case from lower case.
    alike: dict[str, set[str]] = {}
    for each in found:
        alike.setdefault(each.label.casefold(), set()).add(_literal(each.settings))
    return tuple(
        replace(each, label=_told_apart(each.label, _literal(each.settings)))
        if len(alike[each.label.casefold()]) > 1
        else each
        for each in found
    )


def _literal(given: Mapping[str, Any]) -> str:
    return literal(dict(sorted(given.items())))


def baseline(config: Config) -> str:
    """Label of the condition that the others are compared with."""
    campaign = config.campaign or Campaign()
    return campaign.baseline or conditions(config)[0].label


def _condition(config: Config, index: int, table: Mapping[str, Any]) -> Condition:
    given = {key: value for key, value, _ in _flat(table) if key}
    modes = {
        _ADVANTAGE: given.pop(_ADVANTAGE, config.algorithm.advantage_mode),
        _TRANSFORM: given.pop(_TRANSFORM, config.algorithm.transform_mode),
    }
    label = _plain(f"{modes[_ADVANTAGE]}+{modes[_TRANSFORM]}")
    if len(label) > _LONGEST:
        label = _told_apart(label[: _LONGEST - 7], label)
    for key, value in given.items():
        label = labelled(label, key, value)
    return Condition(label, modes | given, index)


def labelled(label: str, key: str, value: Any, others: Sequence[Any] = ()) -> str:
    """A label with one more setting; it names folders and is typed on command lines. Six digits of a hash follow where the
    value does not survive as it is, or reads as another of ``others`` does, the values that make the other labels."""
    text = _text(value)
    plain = _plain(text)
    is_alone = sum(_plain(_text(other)).casefold() == plain.casefold() for other in others) < 2
    made = f"{label}~{_plain(_short(key))}={plain}"
    if plain != text or not is_alone:
        made = _told_apart(made, literal(value))
    return made if len(made) <= _LONGEST else _told_apart(made[: _LONGEST - 7], made)


_LONGEST = 120
"""Characters of a label. With a seed and the suffix of a file it stays within the 255 bytes of a file name."""


def _text(value: Any) -> str:
    items = cast("Sequence[Any]", value) if isinstance(value, list | tuple) else (value,)
    return ",".join(each if isinstance(each, str) else literal(each) for each in items)


def _plain(text: str) -> str:
    return re.sub(r"[^\w.+~=,-]+", "-", text, flags=re.ASCII)


def _told_apart(label: str, by: str) -> str:
    return f"{label.rstrip('-')}-{hashlib.sha256(by.encode()).hexdigest()[:6]}"


def path_of(condition: Condition, campaign: Campaign, key: str) -> KeyPath:
    """Where the configuration sets ``key`` for a condition's runs, or for the trials of one."""
    if condition.index >= 0:
        for given, _, path in _flat(campaign.conditions[condition.index]):
            if given == key:
                return ("campaign", "conditions", condition.index, *path)
    if key in (_ADVANTAGE, _TRANSFORM):
        return ("campaign",) if condition.index < 0 else tuple(key.split("."))
    if key == tuned(campaign)[0]:
        return ("campaign", "tune", "lr" if campaign.tune.lr else "values")
    return ("campaign", "tune", {"training.max_steps": "max_steps"}.get(key, "split"))


def own(condition: Condition, campaign: Campaign) -> frozenset[str]:
    """The dotted keys that a condition states itself: modes that it leaves out are those that all share."""
    if condition.index < 0:
        return frozenset(condition.settings)
    return frozenset(key for key, _, _ in _flat(campaign.conditions[condition.index]))


def _flat(table: Mapping[str, Any]) -> Iterator[tuple[str, Any, KeyPath]]:
    """(dotted key, value, path inside the table) of every setting; the key is "" where there is no such setting."""
    for written, value in table.items():
        key = _key_of(written)
        # Some sections are called as one of their settings is: [model] and model.model.
        if key and not (isinstance(value, Mapping) and settings()[key].type != "table"):
            yield key, value, (written,)
        elif isinstance(value, Mapping):
            for inner, deep in cast("Mapping[str, Any]", value).items():
                dotted = f"{written}.{inner}"
                yield dotted if dotted in settings() else "", deep, (written, inner)
        else:
            yield "", value, (written,)


@cache
def written_names() -> Mapping[str, str]:
    """Every name that a condition may give a setting, dotted or flat, with its dotted key."""
    return {flag[2:].replace("-", "_"): key for flag, key in flags().items() if flag not in SPECIAL}


def _key_of(written: str) -> str:
    """The dotted key that a dotted or flat name means; "" for none."""
    return written_names().get(written, "")


def _short(key: str) -> str:
    name = key.rpartition(".")[2]
    return name if _key_of(name) == key else key


def check(config: Config) -> Iterator[Problem]:
    """What is wrong with ``[campaign]`` itself; whether each condition makes a run is seen where its runs are planned."""
    campaign = config.campaign
    if campaign is None:
        return
    for index, table in enumerate(campaign.conditions):
        yield from _check_condition(index, table)
    labels = [condition.label for condition in conditions(config)]
    for label, count in Counter(labels).items():
        if count > 1:
            index = len(labels) - 1 - labels[::-1].index(label)
            yield Problem(
                ("campaign", "conditions", index), f"condition {label} stands there {count} times.",
                "remove one, or set something in it that differs.",
            )  # fmt: skip
    if campaign.baseline and campaign.baseline not in labels:
        yield Problem(
            ("campaign", "baseline"), f"campaign.baseline = {literal(campaign.baseline)} is none of the conditions.",
            f"name one of {', '.join(labels)}.",
        )  # fmt: skip
    if len(labels) < 2:
        yield Problem(
            ("campaign", "conditions"), "one condition has nothing to be compared with.",
            "its runs give a mean over seeds and no verdict.", note=True,
        )  # fmt: skip
    for seed, count in Counter(campaign.seeds).items():
        if count > 1:
            yield Problem(
                ("campaign", "seeds"), f"campaign.seeds holds {seed} {count} times.",
                "a seed counts once: equal runs are no replication.",
            )  # fmt: skip
    yield from _check_looks(campaign, goes_on=bool(config.resume.from_))
    yield from _check_measure(config, campaign)
    yield from _check_launch(config, campaign)
    yield from _check_tune(config, campaign)
    yield from _idle(config)
    if config.backend.adapter_path:
        yield Problem(
            ("backend", "adapter_path"), "backend.adapter_path is one folder, and every run of a campaign has an adapter.",
            "leave it out: each run keeps its own in its directory.",
        )  # fmt: skip
    if not config.eval.source:
        yield Problem(
            ("eval", "source"), "eval.source is empty: conditions are compared by the correct rate of training.",
            "set [eval] source to compare them on held-out tasks.", note=True,
        )  # fmt: skip


def _idle(config: Config) -> Iterator[Problem]:
    """Settings of one run that a campaign decides for each of its runs."""
    uses_wandb = bool(config.logging.wandb_project) or "wandb" in config.logging.trackers
    for key, instead, matters in (
        ("training.seed", "campaign.seeds lists the seeds of the runs", True),
        ("training.max_steps", "every run takes campaign.max_steps", True),
        ("logging.wandb_run_name", "a run is named by its condition and seed", uses_wandb),
        ("logging.wandb_group", "a run's group is its condition", uses_wandb),
    ):
        section, _, name = key.partition(".")
        if matters and is_given(config, key):
            yield Problem((section, name), f"{key} does nothing in a campaign: {instead}.", note=True)


def _check_condition(index: int, table: Mapping[str, Any]) -> Iterator[Problem]:
    seen: set[str] = set()
    for key, _, path in _flat(table):
        place: KeyPath = ("campaign", "conditions", index, *path)
        if not key:
            name = ".".join(map(str, path))
            near = difflib.get_close_matches(name, written_names(), n=1, cutoff=0.7)
            yield Problem(
                place, f"condition {index + 1}: {shown_key(name)} is not a setting.",
                f"did you mean {near[0]}?" if near else "name one as in its own section, such as lr or training.lr.",
                unknown=True,
            )  # fmt: skip
            continue
        if key in seen:
            yield Problem(place, f"condition {index + 1} sets {key} twice.", "set it once.")
        seen.add(key)
        if why := why_same(key):
            yield Problem(place, f"condition {index + 1}: {key} cannot differ between conditions: {why}.", "leave it out.")


_MEASURED = {
    "training.max_tokens": "eval.max_tokens",
    "training.temperature": "eval.temperature",
    "training.top_p": "",
    "training.stop": "",
}
"""Settings that evaluations sample with, and those of [eval] that state another value for all conditions."""
_SCORES_ALIKE = ("reward.timeout_s", "reward.max_error_rate", "reward.isolate")
_SAME_TASKS = ("data.shuffle", "data.instruction", "data.system", "data.template_args")


def measures(config: Config, key: str) -> str:
    """Why a setting that differs between conditions would change what their outcome measures, "" where it does not. What the
    policy is (its model, number format, prompt) is compared; by what it is measured may not differ."""
    has_eval = bool(config.eval.source)
    section, _, name = key.partition(".")
    if key in _MEASURED:
        stated = _MEASURED[key]
        if has_eval and stated and getattr(config.eval, stated.partition(".")[2]):
            return ""
        return f"evaluations sample with {key}" if has_eval else "the outcome is counted on the rollouts that it shapes"
    if section == "reward" and key not in _SCORES_ALIKE:
        return "it also decides which held-out answers are correct" if has_eval else "it decides which answers are correct"
    if section == "environment" and name != "auto_install":
        return "the outcome is measured in the same environment"
    if not has_eval and (key == "training.max_examples" or (section == "data" and key not in _SAME_TASKS)):
        return "without held-out tasks the outcome is counted on the tasks that are trained on"
    return ""


def _check_measure(config: Config, campaign: Campaign) -> Iterator[Problem]:
    """Outcomes are compared only where all conditions are measured alike."""
    arms = conditions(config)
    found = [(key, arm, arm.settings) for arm in arms for key in arm.settings]
    told: set[str] = set()
    for key, arm, given in found:
        why = "" if key in told else measures(config, key)
        if not why:
            continue
        section, _, name = key.partition(".")
        shared = getattr(getattr(config, section), name)
        if len({literal(_listed(other.settings.get(key, shared))) for other in arms}) > 1:
            told.add(key)
            yield Problem(
                path_of(arm, campaign, key),
                f"condition {arm.label} sets {key} = {literal(given[key])}, which other conditions do not: {why}, so a "
                "difference would say nothing about the training.",
                _measure_fix(config, key),
            )  # fmt: skip
    key, values = tuned(campaign)
    if values and key and (why := measures(config, key)):
        yield Problem(
            ("campaign", "tune", "field"), f"campaign.tune would choose {key} for each condition by itself: {why}, so values and "
            "conditions could not be compared.", _measure_fix(config, key),
        )  # fmt: skip


def _measure_fix(config: Config, key: str) -> str:
    if not config.eval.source and key.startswith(("data.", "training.max_examples")):
        return "set [eval] source to compare the conditions on held-out tasks."
    stated = _MEASURED.get(key, "")
    if stated:
        first = "" if config.eval.source else "set [eval] source and "
        return f"{first}state {stated} for all conditions." if first else f"state {stated}: it holds for all conditions."
    return "set it for all conditions alike."


def _listed(value: Any) -> Any:
    return list(cast("Sequence[Any]", value)) if isinstance(value, tuple) else value


def _check_looks(campaign: Campaign, *, goes_on: bool) -> Iterator[Problem]:
    looks = campaign.looks
    # Seeds may follow the declared ones when a campaign goes on; its manifest holds what the looks must end at.
    is_whole = bool(looks) and (looks[-1] <= len(campaign.seeds) if goes_on else looks[-1] == len(campaign.seeds))
    if looks and (sorted(set(looks)) != list(looks) or not is_whole or looks[0] < 2):
        yield Problem(
            ("campaign", "looks"),
            f"campaign.looks = {literal(list(looks))} must grow from at least 2 to the number of seeds, "
            f"{len(campaign.seeds)}.",
            f"for example {literal([max(2, len(campaign.seeds) // 2), len(campaign.seeds)])}.",
        )  # fmt: skip
    if len(campaign.seeds) < 2:
        yield Problem(
            ("campaign", "seeds"), "one seed says nothing about how much results differ from seed to seed.",
            "the campaign runs and gives no verdict; use at least 4 seeds, better 8.", note=True,
        )  # fmt: skip


def _check_launch(config: Config, campaign: Campaign) -> Iterator[Problem]:
    given, how = campaign.model_fields_set, launcher(campaign)
    if campaign.parallel and "launcher" in given and campaign.launcher == "serial":
        yield Problem(
            ("campaign", "launcher"), 'campaign.parallel = true and launcher = "serial" contradict each other.',
            'write launcher = "processes", or parallel = false.',
        )  # fmt: skip
    if how == "serial" and not campaign.parallel:
        for key in ("max_workers", "stagger_seconds"):
            if getattr(campaign, key):
                yield Problem(
                    ("campaign", key), f"campaign.{key} does nothing while the runs go one after the other.",
                    "set parallel = true, or leave it out.", note=True,
                )  # fmt: skip
    if how != "serial":
        yield from _check_devices(config, campaign, how)
    if campaign.deviation and campaign.pilot:
        yield Problem(
            ("campaign", "pilot"), "campaign.deviation and campaign.pilot say the same thing.", "give one of them."
        )
    if campaign.ray_address and how != "ray":
        yield Problem(
            ("campaign", "ray_address"), f'campaign.ray_address does nothing with launcher = "{how}".',
            'write launcher = "ray", or leave it out.',
        )  # fmt: skip


def _check_devices(config: Config, campaign: Campaign, how: str) -> Iterator[Problem]:
    key = "backend.devices"
    stated: list[tuple[KeyPath, Any]] = [(("backend", "devices"), config.backend.devices)]
    stated += [
        (path_of(arm, campaign, key), arm.settings[key]) for arm in conditions(config) if key in arm.settings
    ]
    name, values = tuned(campaign)
    stated += [(("campaign", "tune", "values"), value) for value in values if name == key]
    for place, devices in stated:
        if isinstance(devices, str) and re.fullmatch(r"gpu:0*[1-9]\d*", devices):
            yield Problem(
                place, f"backend.devices = {literal(devices)}: each run sees only the GPU that it is given by "
                f'launcher = "{how}".', 'write "gpu:0"; CUDA_VISIBLE_DEVICES says which GPUs runs may have.',
            )  # fmt: skip


def _check_tune(config: Config, campaign: Campaign) -> Iterator[Problem]:
    tune = campaign.tune
    if tune.lr and (tune.values or tune.field):
        yield Problem(
            ("campaign", "tune", "lr"), "campaign.tune tries one setting: lr, or the values of field.", "remove one."
        )
    if bool(tune.field) != bool(tune.values):
        yield Problem(
            ("campaign", "tune"), "campaign.tune.field and values go together.",
            'for example field = "sepa.steps" and values = [20, 40].',
        )  # fmt: skip
    if tune.field and _key_of(tune.field) == "":
        yield Problem(
            ("campaign", "tune", "field"), f"campaign.tune.field = {literal(tune.field)} is not a setting.",
            "name one by its dotted key.",
        )  # fmt: skip
    key, values = tuned(campaign)
    used = sorted(set(tune.seeds) & set(campaign.seeds))
    if values and used:
        yield Problem(
            ("campaign", "tune", "seeds"), f"seed {used[0]} is one of campaign.seeds: trials need seeds of their own.",
            "use others for the trials.",
        )  # fmt: skip
    for other in ("split", "max_steps"):
        if not values and getattr(tune, other):
            yield Problem(
                ("campaign", "tune", other), f"campaign.tune.{other} does nothing: no values to try.", "list lr = [...]."
            )
    if not values:
        return
    place: KeyPath = ("campaign", "tune", "lr" if tune.lr else "values")
    if not config.eval.source:
        yield Problem(
            ("campaign", "tune"), "campaign.tune chooses by held-out accuracy, and eval.source is empty.",
            "set [eval] source.",
        )  # fmt: skip
    if len(set(map(literal, values))) < len(values):
        yield Problem(place, f"{dotted(place)} = {literal(list(values))} holds a value twice.", "list it once.")
    elif len(values) == 1:
        yield Problem(place, f"{dotted(place)} holds one value: nothing is chosen.", "list at least two.")
    for seed, count in Counter(tune.seeds).items():
        if count > 1:
            yield Problem(("campaign", "tune", "seeds"), f"campaign.tune.seeds holds {seed} {count} times.", "list it once.")
    why = why_same(key)
    if why and tune.field:
        yield Problem(
            ("campaign", "tune", "field"), f"campaign.tune.field = {literal(tune.field)} cannot differ between conditions: "
            f"{why}.", "name another setting.",
        )  # fmt: skip
    elif key in (_ADVANTAGE, _TRANSFORM):
        yield Problem(
            ("campaign", "tune", "field"), f"campaign.tune.field = {literal(tune.field)} is what makes a condition.",
            "list the modes as conditions.",
        )  # fmt: skip
    for condition in conditions(config):
        if key in condition.settings and key not in (_ADVANTAGE, _TRANSFORM):
            yield Problem(
                path_of(condition, campaign, key),
                f"condition {condition.label} sets {key}, which campaign.tune chooses for every condition.",
                "remove one of them.",
            )  # fmt: skip
    if tune.split and tune.split == config.eval.split:
        yield Problem(
            ("campaign", "tune", "split"), f"campaign.tune.split = {literal(tune.split)} is the split that is evaluated.",
            "leave it out: trials then choose on the tasks that follow the evaluation's own.",
        )  # fmt: skip
    elif tune.split and config.eval.source == config.data.source and tune.split == config.data.split:
        yield Problem(
            ("campaign", "tune", "split"), f"campaign.tune.split = {literal(tune.split)} is the split that is trained on.",
            "name one that is not, or leave it out.",
        )  # fmt: skip


def tuned(campaign: Campaign) -> tuple[str, tuple[Any, ...]]:
    """The dotted key that is tuned and the values that are tried; none are, where there is nothing to tune."""
    tune = campaign.tune
    if tune.lr:
        return "training.lr", tune.lr
    return (_key_of(tune.field), tune.values) if tune.field else ("training.lr", ())
