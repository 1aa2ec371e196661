"""Settings that do nothing beside the others: refused where their author must have meant something else, announced
where switching them off is ordinary."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from retrain.config import names
from retrain.config.fields import literal, settings
from retrain.config.problems import KeyPath, Problem, shown
from retrain.config.schema import Config
from retrain.config.tables import used_rewards


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


def path_of(key: str) -> KeyPath:
    """The parts of a dotted key."""
    return tuple(key.split("."))


def stated(config: Config, key: str) -> str:
    """The setting as one would write it, marked when it is the default."""
    default = "" if is_given(config, key) else " (the default)"
    value = get(config, key)
    return f"{key} = {shown(value) if isinstance(value, str) else literal(value)}{default}"


@dataclass(frozen=True, slots=True)
class _Idle:
    """Settings that do nothing while ``when`` holds; ``refuse`` makes a value but the default an error.

    A key that the user emptied (``eval.source = ""``) was switched off on purpose: then nothing is refused.
    ``state`` says what holds where the value of ``because`` does not say it.
    """

    keys: tuple[str, ...]
    when: Callable[[Config], bool]
    because: str
    refuse: bool = True
    state: Callable[[Config], str] | None = None


def _section(name: str, *without: str) -> tuple[str, ...]:
    return tuple(k for k in settings() if k.startswith(f"{name}.") and k not in without)


def own_source(config: Config) -> bool:
    """True where a source of one's own may read any key of [data], from which that of [eval] inherits."""
    return any(s and s not in names.BUILT["source"] for s in (config.data.source, config.eval.source))


def _rewards(config: Config) -> str:
    """The rewards in use, as a state."""
    used = used_rewards(config)
    if used == frozenset({config.reward.type}):
        return f"reward.type = {literal(config.reward.type)}"
    return f"the rewards in use: {', '.join(sorted(used))}"


def _idle_rules() -> tuple[_Idle, ...]:
    def no_levels(c: Config) -> bool:
        return not uses(c, "arithmetic") and not own_source(c)

    def uses(c: Config, *sources: str) -> bool:
        return c.data.source in sources or c.eval.source in sources

    def uses_sepa(c: Config) -> bool:
        mode = c.algorithm.algorithm_mode or c.algorithm.transform_mode
        return mode.startswith("gtpo_sepa") or mode not in names.BUILT["transform"]

    def plain(c: Config) -> bool:
        return not c.algorithm.algorithm_mode and c.algorithm.transform_mode == "none"

    return (
        _Idle(("data.levels",), no_levels, "data.source"),
        _Idle(
            ("data.path",),
            lambda c: c.data.source in ("arithmetic", "reasoning_gym", "mixture"),
            "data.source",
        ),
        _Idle(("data.fields",), lambda c: not uses(c, "jsonl", "hf") and not own_source(c), "data.source"),
        _Idle(("data.subjects",), lambda c: not uses(c, "math") and not own_source(c), "data.source"),
        _Idle(("data.subset",), lambda c: not uses(c, "hf") and not own_source(c), "data.source"),
        _Idle(
            ("data.generators", "data.size", "data.seed"),
            lambda c: not uses(c, "reasoning_gym") and not own_source(c),
            "data.source",
        ),
        _Idle(("data.mixture",), lambda c: c.data.source != "mixture", "data.source"),
        _Idle(
            ("data.split", "training.max_examples"), lambda c: c.data.source == "mixture", "data.source"
        ),
        _Idle(
            ("data.split",),
            lambda c: c.data.source == "jsonl" and c.data.path.endswith(".jsonl"),
            "data.path",
        ),
        _Idle(
            _section("eval", "eval.source", "eval.suites", "eval.every", "eval.seed", "eval.temperature", "eval.max_tokens"),
            lambda c: not c.eval.source,
            "eval.source",
        ),
        _Idle(
            ("eval.every", "eval.seed", "eval.temperature", "eval.max_tokens"),
            lambda c: not c.eval.source and not c.eval.suites,
            "eval.source",
        ),
        _Idle(
            ("eval.levels",),
            lambda c: c.eval.source in names.BUILT["source"] and c.eval.source != "arithmetic",
            "eval.source",
        ),
        _Idle(("eval.path",), lambda c: c.eval.source in ("arithmetic", "reasoning_gym"), "eval.source"),
        _Idle(
            ("reward.custom_module", "reward.custom_function"),
            lambda c: c.reward.type != "custom",
            "reward.type",
        ),
        _Idle(
            ("reward.type",),
            lambda c: c.reward.type not in used_rewards(c),
            "data.mixture",
            refuse=False,
            state=lambda c: "tables that all name a reward of their own",
        ),
        _Idle(
            ("reward.timeout_s",),
            lambda c: used_rewards(c) <= {"match"},
            "reward.type",
            refuse=False,
            state=_rewards,
        ),
        _Idle(
            ("reward.isolate", "reward.correct_at"),
            lambda c: used_rewards(c) <= {"match", "math", "reasoning_gym"},
            "reward.type",
            refuse=False,
            state=_rewards,
        ),
        _Idle(
            ("reward.penalty",),
            lambda c: c.reward.type == "composite" and not any(part.get("gate") for part in c.reward.parts),
            "reward.parts",
            state=lambda c: "parts of which none is a gate",
        ),
        _Idle(("reward.parts", "reward.penalty"), lambda c: c.reward.type != "composite", "reward.type"),
        _Idle(("reward.judge_model",), lambda c: c.reward.type != "judge", "reward.type"),
        _Idle(
            _section("environment", "environment.provider"),
            lambda c: not c.environment.provider,
            "environment.provider",
        ),
        _Idle(("algorithm.params",), lambda c: not c.algorithm.algorithm_mode, "algorithm.algorithm_mode"),
        _Idle(
            ("algorithm.advantage_params", "algorithm.transform_params"),
            lambda c: bool(c.algorithm.algorithm_mode),
            "algorithm.algorithm_mode",
        ),
        _Idle(
            ("algorithm.uncertainty_kind",),
            # Where generations are written, they show it token by token.
            lambda c: plain(c) and not c.logging.generations,
            "algorithm.transform_mode",
            refuse=False,
        ),
        _Idle(
            ("algorithm.advantage_params",),
            lambda c: not c.algorithm.algorithm_mode
            and c.algorithm.advantage_mode in names.BUILT["advantage"],
            "algorithm.advantage_mode",
        ),
        _Idle(
            ("algorithm.transform_params",),
            lambda c: not c.algorithm.algorithm_mode
            and c.algorithm.transform_mode in names.BUILT["transform"]
            and c.algorithm.transform_mode != "entropy_mask",
            "algorithm.transform_mode",
        ),
        _Idle(
            ("algorithm.advantage_mode", "algorithm.transform_mode", "gtpo.beta", "hicra.alpha"),
            lambda c: bool(c.algorithm.algorithm_mode),
            "algorithm.algorithm_mode",
            refuse=False,
        ),
        _Idle(
            ("loss.clip_low", "loss.clip_high"), lambda c: c.loss.kind == "importance_sampling", "loss.kind"
        ),
        _Idle(("loss.dual_clip",), lambda c: c.loss.kind in ("importance_sampling", "gspo", "cispo"), "loss.kind"),
        _Idle(
            ("training.lr_final_share",), lambda c: c.training.lr_schedule == "constant", "training.lr_schedule"
        ),
        _Idle(("training.soft_tokens",), lambda c: c.training.truncated != "soft", "training.truncated"),
        _Idle(
            ("training.max_oversample",), lambda c: c.training.min_signal == 0, "training.min_signal", refuse=False
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
            lambda c: not uses_sepa(c),
            "algorithm.transform_mode",
            refuse=False,
        ),
        _Idle(
            ("sepa.ema_decay", "sepa.threshold", "sepa.warmup_updates"),
            lambda c: uses_sepa(c) and c.sepa.schedule != "auto",
            "sepa.schedule",
            refuse=False,
        ),
        _Idle(
            ("gtpo.beta",),
            lambda c: not c.algorithm.algorithm_mode and c.algorithm.transform_mode in ("none", "entropy_mask"),
            "algorithm.transform_mode",
            refuse=False,
        ),
        _Idle(
            ("hicra.alpha",),
            lambda c: not c.algorithm.algorithm_mode
            and c.algorithm.transform_mode in names.BUILT["transform"]
            and c.algorithm.transform_mode != "gtpo_hicra",
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


def findings(config: Config) -> Iterator[Problem]:
    """One finding per rule that a configuration meets."""
    for rule in _idle_rules():
        if not rule.when(config):
            continue
        given = [key for key in rule.keys if is_given(config, key)]
        switched_off = is_given(config, rule.because) and not get(config, rule.because)
        refuse = rule.refuse and not switched_off
        meant = [key for key in given if refuse and get(config, key) != settings()[key].default]
        state = rule.state(config) if rule.state else f"{rule.because} = {literal(get(config, rule.because))}"
        for key in meant:
            yield Problem(
                path_of(key),
                f"{key} does nothing with {state}.",
                f"remove it, or change {rule.because}.",
                because=rule.because,
            )
        rest = [key for key in given if key not in meant]
        if rest:
            verb = "does" if len(rest) == 1 else "do"
            yield Problem(
                path_of(rest[0]),
                f"{', '.join(rest)} {verb} nothing with {state}.",
                because=rule.because,
                note=True,
            )
