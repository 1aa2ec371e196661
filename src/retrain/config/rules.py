"""What one setting means for another: names, what this version builds, and settings that do nothing here.

A setting that cannot act is refused where its author must have meant something else, and announced where
switching it off is ordinary.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from retrain.config import names
from retrain.config.fields import literal, settings
from retrain.config.problems import KeyPath, Problem
from retrain.config.schema import Config
from retrain.config.tables import check_tables

NAMED = {
    "backend.backend": "backend",
    "inference.engine": "engine",
    "algorithm.advantage_mode": "advantage",
    "algorithm.transform_mode": "transform",
    "algorithm.algorithm_mode": "algorithm",
    "algorithm.uncertainty_kind": "uncertainty",
    "planning.detector": "detector",
    "reward.type": "reward",
    "data.source": "source",
    "eval.source": "source",
    "environment.provider": "environment",
    "loss.kind": "loss",
    "training.truncated": "truncated",
    "training.lr_schedule": "lr_schedule",
}
"""Settings that hold a name, and the kind of name in ``names``."""

_INTERNAL = {"environment": "single_turn", "reward": "routed"}
"""Names that the plug-in table holds and no configuration writes."""


def get(config: Config, key: str) -> Any:
    """The value of a dotted key; None inside a section that is absent."""
    value: Any = config
    for part in key.split("."):
        value = getattr(value, "from_" if part == "from" else part, None)
    return value


def is_given(config: Config, key: str) -> bool:
    """True when the user wrote the setting, rather than leaving it at its default."""
    section, _, name = key.partition(".")
    model = getattr(config, section)
    return model is not None and ("from_" if name == "from" else name) in model.model_fields_set


def check(config: Config) -> Iterator[Problem]:
    """Every finding across settings, refusals and announcements."""
    yield from _names(config)
    yield from check_tables(config)
    yield from _not_yet(config)
    yield from _combinations(config)
    yield from _idle_findings(config)


def _path(key: str) -> KeyPath:
    return tuple(key.split("."))


def _stated(config: Config, key: str) -> str:
    default = "" if is_given(config, key) else " (the default)"
    return f"{key} = {literal(get(config, key))}{default}"


def _names(config: Config) -> Iterator[Problem]:
    for key, kind in NAMED.items():
        if get(config, key):
            yield from _name(config, key, kind, get(config, key))
    for index, tracker in enumerate(config.logging.trackers):
        yield from _name(config, "logging.trackers", "sink", tracker, index)


def _name(config: Config, key: str, kind: str, value: str, index: int | None = None) -> Iterator[Problem]:
    built = [n for n in names.BUILT[kind] if n != _INTERNAL.get(kind)]
    if value in built:
        return
    path = _path(key) if index is None else (*_path(key), index)
    stated = _stated(config, key) if index is None else f"{key}: {literal(value)}"
    use = " or ".join(f"{key} = {literal(n)}" for n in built) if index is None else "leave it out"
    if value in names.LATER[kind]:
        yield Problem(
            path,
            f"{stated} is not in this version.",
            f"write {use}." if built else "leave it out.",
            later=True,
        )
    elif ("." in value or ":" in value) and kind in names.OPEN:
        return
    elif "." in value or ":" in value:
        yield Problem(
            path, f"{stated}: a {kind} of your own is not in this version.", f"write {use}.", later=True
        )
    elif kind == "algorithm":
        yield Problem(
            path,
            f"{stated} is unknown: it takes the dotted path of your own algorithm.",
            'for example "my_module.my_algorithm", or use advantage_mode and transform_mode.',
        )
    else:
        near = difflib.get_close_matches(value, [*built, *names.LATER[kind]], n=1, cutoff=0.6)
        known = ", ".join(built) or "none in this version"
        yield Problem(
            path, f"{stated} is unknown.", f"did you mean {literal(near[0])}?" if near else f"known: {known}."
        )


def _not_yet(config: Config) -> Iterator[Problem]:
    """Settings whose effect a later version builds."""
    wanted: list[tuple[str, bool, str]] = [
        ("backpressure.enabled", config.backpressure.enabled, "set it to false."),
    ]
    for key, is_wanted, fix in wanted:
        if is_wanted:
            yield Problem(_path(key), f"{_stated(config, key)} is not in this version.", fix, later=True)
    if config.campaign is not None:
        yield Problem(
            ("campaign",),
            "[campaign] is not in this version.",
            "remove it and start one run per condition and seed.",
            later=True,
        )
    if config.squeeze is not None:
        yield Problem(("squeeze",), "[squeeze] is not in this version.", "remove the section.", later=True)
    if re.fullmatch(r"\s*(gpu:\d+|cpu)(\s*,\s*(gpu:\d+|cpu))+\s*", config.backend.devices):
        yield Problem(
            ("backend", "devices"),
            f"{_stated(config, 'backend.devices')}: more than one device is not in this version.",
            f"name one: {literal(config.backend.devices.split(',')[0].strip())}.",
            later=True,
        )


def _combinations(config: Config) -> Iterator[Problem]:
    devices = config.backend.devices
    if "," not in devices and not re.fullmatch(r"cpu|gpu:\d{1,3}", devices):
        near = {"cuda": "gpu:0", "gpu": "gpu:0", "mps": "cpu", "auto": "gpu:0"}.get(
            devices.partition(":")[0].lower(), "cpu"
        )
        near = (
            devices.lower().replace("cuda", "gpu") if re.fullmatch(r"cuda:\d{1,3}", devices.lower()) else near
        )
        yield Problem(
            ("backend", "devices"),
            f"{_stated(config, 'backend.devices')} is not gpu:N or cpu.",
            f"for example {literal(near)}.",
        )
    elif "," in devices and not re.fullmatch(r"\s*(gpu:\d+|cpu)(\s*,\s*(gpu:\d+|cpu))+\s*", devices):
        yield Problem(
            ("backend", "devices"),
            f"{_stated(config, 'backend.devices')} is not gpu:N or cpu.",
            'for example "gpu:0".',
        )
    if config.model.trust_remote_code:
        yield Problem(
            ("model", "trust_remote_code"),
            "model.trust_remote_code = true would run code that ships with the model.",
            "set it to false and use a model that transformers supports itself.",
        )
    yield from _engine(config)
    if config.reward.type == "custom" and not config.reward.custom_module:
        yield Problem(
            ("reward", "type"),
            'reward.type = "custom" needs reward.custom_module.',
            'name your module, for example custom_module = "my_rewards".',
        )
    for name in config.data.fields:
        if name not in ("question", "answer", "id"):
            yield Problem(
                ("data", "fields", name),
                f"data.fields.{name} is not one of our fields.",
                "use question, answer and id.",
            )
    yield from _data(config)
    low, high = config.backpressure.min_batch_size, config.backpressure.max_batch_size
    if low > high:
        yield Problem(
            ("backpressure", "min_batch_size"),
            f"backpressure.min_batch_size = {low} is above max_batch_size = {high}.",
            "set it to at most that.",
        )
    if config.training.warmup_steps >= config.training.max_steps:
        yield Problem(
            ("training", "warmup_steps"),
            f"training.warmup_steps = {config.training.warmup_steps} and max_steps = "
            f"{config.training.max_steps}: the learning rate reaches lr in the last step or never.",
            note=True,
        )


def _engine(config: Config) -> Iterator[Problem]:
    inference = config.inference
    if config.algorithm.uncertainty_kind == "shannon_entropy" and inference.engine != "pytorch":
        yield Problem(
            ("algorithm", "uncertainty_kind"),
            'algorithm.uncertainty_kind = "shannon_entropy" needs the whole distribution of every token, '
            "which only the in-process engine has.",
            'write inference.engine = "pytorch", or uncertainty_kind = "surprisal".',
            because="inference.engine",
        )
    if inference.engine != "pytorch":
        return
    refused: list[tuple[str, tuple[str, ...], str]] = [
        (
            "dtype",
            ("fp8", "fp4"),
            'it computes in bf16 or fp32; write "auto", "bf16" or "fp32".',
        ),
        (
            "kv_cache_dtype",
            ("fp8", "int8"),
            'it caches in the model\'s format; write "auto".',
        ),
        ("attention_kernel", ("triton", "tk", "cutlass"), 'it has "default" and "flash".'),
    ]
    for name, values, fix in refused:
        if getattr(inference, name) in values:
            key = f"inference.{name}"
            yield Problem(
                _path(key),
                f'{_stated(config, key)} does not work with inference.engine = "pytorch".',
                fix,
                because="inference.engine",
            )
    if inference.attention_kernel == "flash" and config.backend.devices == "cpu":
        yield Problem(
            ("inference", "attention_kernel"),
            'inference.attention_kernel = "flash" needs CUDA, and backend.devices = "cpu".',
            'write attention_kernel = "default".',
            because="backend.devices",
        )


def _data(config: Config) -> Iterator[Problem]:
    data, held_out = config.data, config.eval
    if data.source == "jsonl" and not data.path:
        yield Problem(
            ("data", "source"),
            'data.source = "jsonl" needs data.path.',
            'name the file, for example path = "problems.jsonl".',
        )
    path = held_out.path or (data.path if held_out.source == data.source else "")
    if held_out.source == "jsonl" and not path:
        yield Problem(
            ("eval", "source"),
            'eval.source = "jsonl" needs eval.path.',
            'name the file, for example path = "held-out.jsonl".',
        )
    shared = held_out.source == data.source and path == data.path
    if shared and (held_out.split == data.split or path.endswith(".jsonl")):
        yield Problem(
            ("eval", "source"),
            "the evaluation uses the training tasks, so its accuracy is not a held-out one.",
            note=True,
        )


@dataclass(frozen=True, slots=True)
class _Idle:
    """Settings that do nothing while ``when`` holds; ``refuse`` makes a value but the default an error.

    A key that the user emptied (``eval.source = ""``) was switched off on purpose: then nothing is refused.
    """

    keys: tuple[str, ...]
    when: Callable[[Config], bool]
    because: str
    refuse: bool = True


def _section(name: str, *without: str) -> tuple[str, ...]:
    return tuple(k for k in settings() if k.startswith(f"{name}.") and k not in without)


def _idle_rules() -> tuple[_Idle, ...]:
    def arithmetic_only(c: Config) -> bool:
        return c.data.source != "arithmetic" and c.eval.source != "arithmetic"

    def uses_jsonl(c: Config) -> bool:
        return "jsonl" in (c.data.source, c.eval.source)

    return (
        _Idle(("data.levels",), arithmetic_only, "data.source"),
        _Idle(("data.path",), lambda c: c.data.source == "arithmetic", "data.source"),
        _Idle(("data.fields",), lambda c: not uses_jsonl(c), "data.source"),
        _Idle(("data.subjects",), lambda c: c.data.source != "math", "data.source"),
        _Idle(
            ("data.split",),
            lambda c: c.data.source == "jsonl" and c.data.path.endswith(".jsonl"),
            "data.path",
        ),
        _Idle(_section("eval", "eval.source"), lambda c: not c.eval.source, "eval.source"),
        _Idle(("eval.levels",), lambda c: c.eval.source not in ("", "arithmetic"), "eval.source"),
        _Idle(("eval.path",), lambda c: c.eval.source == "arithmetic", "eval.source"),
        _Idle(
            ("reward.custom_module", "reward.custom_function"),
            lambda c: c.reward.type != "custom",
            "reward.type",
        ),
        _Idle(
            ("reward.timeout_s", "reward.isolate"),
            lambda c: c.reward.type == "match",
            "reward.type",
            refuse=False,
        ),
        _Idle(("reward.correct_at",), lambda c: c.reward.type == "match", "reward.type", refuse=False),
        _Idle(("reward.judge_model",), lambda c: c.reward.type != "judge", "reward.type"),
        _Idle(
            _section("environment", "environment.provider"),
            lambda c: not c.environment.provider,
            "environment.provider",
        ),
        _Idle(("algorithm.params",), lambda c: not c.algorithm.algorithm_mode, "algorithm.algorithm_mode"),
        _Idle(
            ("algorithm.advantage_params",),
            lambda c: c.algorithm.advantage_mode in names.BUILT["advantage"],
            "algorithm.advantage_mode",
        ),
        _Idle(
            ("algorithm.transform_params",),
            lambda c: c.algorithm.transform_mode in names.BUILT["transform"],
            "algorithm.transform_mode",
        ),
        _Idle(
            ("loss.clip_low", "loss.clip_high"), lambda c: c.loss.kind == "importance_sampling", "loss.kind"
        ),
        _Idle(("loss.kl_kind",), lambda c: c.loss.kl == 0, "loss.kl", refuse=False),
        _Idle(("inference.url",), lambda c: c.inference.engine == "pytorch", "inference.engine"),
        _Idle(
            ("model.base_url", "backend.options"), lambda c: c.backend.backend == "local", "backend.backend"
        ),
        _Idle(
            ("backend.max_concurrent",),
            lambda c: c.backend.backend == "local",
            "backend.backend",
            refuse=False,
        ),
        _Idle(("model.revision",), lambda c: c.model.model == names.TINY_MODEL, "model.model"),
        _Idle(
            _section("sepa"),
            lambda c: not c.algorithm.transform_mode.startswith("gtpo_sepa"),
            "algorithm.transform_mode",
            refuse=False,
        ),
        _Idle(
            ("sepa.ema_decay", "sepa.threshold", "sepa.warmup_updates"),
            lambda c: c.algorithm.transform_mode == "gtpo_sepa" and c.sepa.schedule != "auto",
            "sepa.schedule",
            refuse=False,
        ),
        _Idle(
            ("gtpo.beta",),
            lambda c: c.algorithm.transform_mode == "none",
            "algorithm.transform_mode",
            refuse=False,
        ),
        _Idle(
            ("hicra.alpha",),
            lambda c: c.algorithm.transform_mode != "gtpo_hicra",
            "algorithm.transform_mode",
            refuse=False,
        ),
        _Idle(
            ("planning.model", "planning.threshold"),
            lambda c: c.planning.detector == "regex",
            "planning.detector",
            refuse=False,
        ),
        _Idle(
            _section("backpressure", "backpressure.enabled"),
            lambda c: not c.backpressure.enabled,
            "backpressure.enabled",
            refuse=False,
        ),
        _Idle(
            tuple(f"logging.wandb_{n}" for n in ("run_name", "entity", "group", "tags")),
            lambda c: not c.logging.wandb_project and "wandb" not in c.logging.trackers,
            "logging.wandb_project",
            refuse=False,
        ),
        _Idle(
            ("training.deterministic",), lambda c: c.backend.devices == "cpu", "backend.devices", refuse=False
        ),
    )


def idle(config: Config) -> Mapping[str, str]:
    """Settings that do nothing in this configuration, with the key whose value makes them so."""
    return {key: rule.because for rule in _idle_rules() if rule.when(config) for key in rule.keys}


def _idle_findings(config: Config) -> Iterator[Problem]:
    for rule in _idle_rules():
        if not rule.when(config):
            continue
        given = [key for key in rule.keys if is_given(config, key)]
        switched_off = is_given(config, rule.because) and not get(config, rule.because)
        refuse = rule.refuse and not switched_off
        meant = [key for key in given if refuse and get(config, key) != settings()[key].default]
        state = f"{rule.because} = {literal(get(config, rule.because))}"
        for key in meant:
            yield Problem(
                _path(key),
                f"{key} does nothing with {state}.",
                f"remove it, or change {rule.because}.",
                because=rule.because,
            )
        rest = [key for key in given if key not in meant]
        if rest:
            verb = "does" if len(rest) == 1 else "do"
            yield Problem(
                _path(rest[0]),
                f"{', '.join(rest)} {verb} nothing with {state}.",
                because=rule.because,
                note=True,
            )
