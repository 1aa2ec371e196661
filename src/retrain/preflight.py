"""Everything knowable before a device is spent: which directory a run may use, what a resume may change and
whether it will be byte-exact, what the data and the sampler's settings imply."""

from __future__ import annotations

import contextlib
import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from retrain import cards, estimate, plugins
from retrain.config.own import named_plugins
from retrain.config.schema import Config, Sepa
from retrain.config.tables import rewards_by_source
from retrain.errors import ConfigError, ModelError, PluginError, ResumeError
from retrain.tracking import layout
from retrain.training import ahead, references

if TYPE_CHECKING:
    from retrain.protocols import Renderer
    from retrain.types import Task

NEUTRAL_ON_RESUME = (
    "training.max_steps",
    "training.save_every",
    "training.keep_checkpoints",
    "training.phase_timeout_s",
    "reward.timeout_s",
    "reward.max_error_rate",
    "backend.adapter_path",
    "plugins.search_paths",
    "logging.log_dir",
    "logging.wandb_",
    "logging.trackers",
    "logging.generations",
    "logging.rollouts",
    "resume.",
)
"""Settings that may differ between a run and its continuation: they do not change what a step computes."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a run writes, and whether it starts there or continues."""

    directory: Path
    how: Literal["new", "overwrite", "resume"]
    note: str = ""


def expanded(path: str, key: str) -> Path:
    """The path that the setting ``key`` names, its ``~`` expanded; ConfigError for an unknown user."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{key} = {path!r}: {error}", fix="write the whole path.") from error


def choose_directory(config: Config, *, overwrite: bool, fork: bool) -> Place:
    """The run directory; a directory that already holds a run is refused unless the user said what to do."""
    if config.resume.from_:
        if overwrite or fork:
            raise ConfigError(
                "--resume continues a run and cannot be combined with --overwrite or --fork.",
                fix="give one of them.",
            )
        directory = expanded(config.resume.from_, "resume.from")
        if not layout.holds_run(directory):
            raise ResumeError(f"{directory} holds no run.", fix="name the log_dir of an earlier run.")
        return Place(directory, "resume")
    if overwrite and fork:
        raise ConfigError(
            "--fork starts beside the run that the log_dir holds, --overwrite replaces it.", fix="give one of them."
        )
    directory = expanded(config.logging.log_dir, "logging.log_dir")
    if not layout.holds_run(directory):
        taken = layout.would_be_replaced(directory)
        if taken:
            raise ConfigError(
                f"logging.log_dir = {str(directory)!r} holds no run, but {', '.join(taken)}, which a run would write over.",
                fix="give another --log-dir, or move these away.",
            )
        return Place(directory, "new")
    if fork:
        number = 2
        while layout.holds_run(directory.with_name(f"{directory.name}-{number}")):
            number += 1
        forked = directory.with_name(f"{directory.name}-{number}")
        return Place(forked, "new", f"{directory} holds a run: starting a new one in {forked}.")
    if _came_to_nothing(directory):
        return Place(directory, "overwrite", f"{directory} holds a run that failed in its first step: replacing it.")
    if overwrite:
        return Place(directory, "overwrite", f"Overwriting the run in {directory}.")
    raise ConfigError(
        f"logging.log_dir = {str(directory)!r} already holds a run.",
        fix=f"continue it with --resume {directory}, start beside it with --fork, replace it with --overwrite, "
        "or give another --log-dir.",
    )


def _came_to_nothing(directory: Path) -> bool:
    """Did the run there fail before it completed a step? Then there is nothing to keep."""
    try:
        facts = json.loads((directory / layout.RUN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return facts.get("status") == "failed" and facts.get("step") == 0


def anchored(config: Config, toml: Path | None) -> Config:
    """Paths of inputs made absolute, looked for beside the TOML and then in the working directory, so that the
    recorded configuration finds them from any folder; ids of models and what does not exist stay as they are, but for
    ``lora.init_from``: a folder in any case, which may be gone when the run is resumed."""

    def anchor(value: str) -> str:
        # What cannot be looked at is left to the part that reads it, which names it in its error.
        with contextlib.suppress(OSError, RuntimeError):
            for root in (toml.parent if toml else Path.cwd(), Path.cwd()):
                path = root / Path(value).expanduser()
                if value and path.exists():
                    return str(path.resolve())
        return value

    config = _with(config, "data", path=anchor(config.data.path))
    config = _with(config, "eval", path=anchor(config.eval.path))
    for section, key in (("data", "mixture"), ("eval", "suites")):
        tables = [dict(table) for table in getattr(getattr(config, section), key)]
        for table in tables:
            if isinstance(table.get("path"), str):
                table["path"] = anchor(table["path"])
        config = _with(config, section, **{key: tuple(tables)})
    init_from = anchor(config.lora.init_from)
    with contextlib.suppress(OSError, RuntimeError):
        if init_from:
            init_from = str(((toml.parent if toml else Path.cwd()) / Path(init_from).expanduser()).resolve())
    config = _with(config, "lora", init_from=init_from)
    config = _with(config, "planning", model=anchor(config.planning.model))
    if not config.model.model.startswith("retrain/"):
        config = _with(config, "model", model=anchor(config.model.model))
    if config.backend.adapter_path:
        target = expanded(config.backend.adapter_path, "backend.adapter_path").absolute()
        config = _with(config, "backend", adapter_path=str(target))
    return config


def _with(config: Config, section: str, **values: Any) -> Config:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})


def check_writable(directory: Path, key: str, *, make: bool = True) -> None:
    """Make the directory that the setting ``key`` names; ConfigError when it cannot be written. Without ``make`` nothing
    stays: one that is not there is tried by a folder, made and removed, in the nearest one above it."""
    try:
        if make:
            directory.mkdir(parents=True, exist_ok=True)
        elif not directory.is_dir():
            above = next(p for p in directory.absolute().parents if p.exists())
            tempfile.TemporaryDirectory(dir=above, prefix=".retrain-").cleanup()
            return
        probe = directory / ".probe"
        probe.write_text("", encoding="utf-8")
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"{key} = {str(directory)!r} cannot be written: {error.strerror}.",
            fix=f"give another {key} or change its permissions.",
        ) from error


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What differs between two nested configurations: dotted names with both values."""
    changed: list[str] = []
    for key in sorted({*before, *now}):
        a, b = before.get(key), now.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            changed += changed_settings(a, b, f"{prefix}{key}.")  # pyright: ignore[reportUnknownArgumentType]
        elif a != b:
            changed.append(f"{prefix}{key} was {a!r} and is {b!r}")
    return changed


def check_plugins(config: Config) -> None:
    """Import what the configuration names by dotted path or entry point, before anything slow.

    PluginError for the one that cannot be used, ConfigError with a line each for several.
    """
    found: list[PluginError] = []
    for kind, name in named_plugins(config):
        try:
            plugins.load(kind, name)
        except PluginError as error:
            found.append(error)
    if len(found) == 1:
        raise found[0]
    if found:
        raise ConfigError("the plug-ins have problems.", problems=[str(error) for error in found])


def check_resume(before: Config, now: Config) -> None:
    """ResumeError when a setting differs that changes what a step computes."""
    changed = changed_settings(before.model_dump(), now.model_dump())
    neutral = NEUTRAL_ON_RESUME
    began, given = Path(before.lora.init_from), Path(now.lora.init_from)
    if began.name == given.name and not began.exists() and not given.exists():
        # Where a folder stood that is gone cannot be found again; a resumed run has its own adapter.
        neutral = (*neutral, "lora.init_from")
    barred = [name for name in changed if not name.startswith(neutral)]
    if barred:
        raise ResumeError(
            f"the run that is to be resumed has other settings: {', '.join(barred)}.",
            fix="resume without these changes, or start a new run with another --log-dir.",
        )


def check_steps(now: Config, completed: int) -> None:
    """ResumeError when the run has already gone further than it is told to."""
    if now.training.max_steps < completed:
        raise ResumeError(
            f"training.max_steps = {now.training.max_steps} but the run has already completed {completed} steps.",
            fix=f"set training.max_steps to {completed} or more.",
        )


def check_model(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """ResumeError when files behind the run's model or evaluation are not those it was started with."""
    same_dtype = before.get("dtype") == now.get("dtype")
    for key, what in (
        ("weights", "the base model's weights"),
        ("tokenizer", "the model's tokenizer or chat template"),
        ("eval_tasks", "the evaluation tasks"),
    ):
        if before.get(key) != now.get(key) and (same_dtype or key != "weights"):
            raise ResumeError(
                f"{what} are not those of the run that is to be resumed.",
                fix="restore the files (or model.revision) as they were, or start a new run.",
            )


def inexact_because(
    config: Config, before: Mapping[str, Any], now: Mapping[str, Any], reward_errors: int
) -> list[str]:
    """Why a resumed run may differ from an uninterrupted one in the last bits; empty when it will not.

    What an earlier resume of the same run had to say stays true and is said again.
    """
    reasons: list[str] = list(before.get("inexact", ()))
    names = {
        "reward_code": "the reward's code",
        "planning": "what the planning detector compares with",
        "plugins": "a plug-in's code",
        "schedule_steps": "the step at which the learning-rate schedule ends",

        "machine": "the processor",
        "device": "the device",
        "threads": "the thread count",
        "code": "retrain's own code",
    }
    # Other training tasks are refused, by the cursor that reads its position in them.
    apart = {"git", "weights", "model_commit", "tokenizer", "train_tasks", "eval_tasks", "inexact"}
    for key in sorted({*before, *now} - apart):
        if before.get(key) != now.get(key):
            what = names.get(key, f"the version of {key}" if key not in ("dtype", "deterministic") else key)
            reasons.append(f"{what} was {before.get(key) or 'unknown'} and is {now.get(key) or 'unknown'}")
    if now.get("deterministic") != "yes":
        reasons.append("CUDA kernels are not held to deterministic ones (training.deterministic = true does)")
    if config.backpressure.enabled:
        reasons.append("back pressure reads the clock")
    if reward_errors:
        reasons.append(f"{reward_errors} rewards failed or passed their deadline, which the clock decides")
    return reasons


def inexact_on_resume(
    config: Config,
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    *,
    step: int,
    evaluated_at: int,
    reward_errors: int,
) -> list[str]:
    """``inexact_because`` for a run that goes on after ``step`` completed steps and was last evaluated after
    ``evaluated_at``; each reason once."""
    reasons = inexact_because(config, before, now, reward_errors)
    due = step == 0 or (config.eval.every and step % config.eval.every == 0)
    if evaluated_at == step < config.training.max_steps and not due:
        reasons.append(f"the evaluation after step {step} was due only at the shorter run's end")
    return list(dict.fromkeys(reasons))


def check_room(config: Config, model: estimate.Model, prompt: int = 0) -> None:
    """ConfigError where answers, or answers after a prompt of ``prompt`` tokens, do not fit the model's positions."""
    context, longest = model.context, config.training.max_tokens
    if context is None or prompt + longest + (not prompt) <= context:
        return
    said = f"with the longest prompt of {prompt} tokens " if prompt else ""
    raise ConfigError(
        f"training.max_tokens = {longest} {said}does not fit: {model.name} has {context} positions"
        + (", and a prompt needs some." if not prompt else "."),
        fix=f"set training.max_tokens to at most {context - prompt}." if 0 < prompt < context
        else f"set training.max_tokens below {context}, less what the longest prompt takes." if not prompt
        else "use other tasks, a shorter data.instruction or data.system, or another model.",
    )  # fmt: skip


def gib(number: float) -> str:
    """Bytes in words."""
    return f"{number / 2**30:,.1f} GiB" if number >= 2**30 else f"{number / 2**20:,.0f} MiB"


def check_fit(config: Config, device: cards.Device | None = None) -> None:
    """ConfigError, with what would fit, where the device (None: the one of ``backend.devices``) cannot hold what no
    rollout can avoid: weights, adapter, optimizer. Says nothing about a model, a backend or a GPU that it does not know."""
    if config.backend.backend != "local":
        return
    try:
        model = estimate.model_of(config)
    except ModelError:
        return
    device = device or cards.present(config.backend.devices, speed=False)
    refuse_unfit(config, estimate.estimate(config, model, device))


def refuse_unfit(config: Config, made: estimate.Estimate) -> None:
    """``check_fit`` for an estimate that is there."""
    device, memory = made.device, made.memory
    if memory.certain <= device.bytes + device.swap or device.guessed:
        return
    adapter = 16 * made.trainable
    fixes = [*estimate.that_fit(config, made.model, device)]
    if device.kind == "cuda":
        larger = estimate.cards_that_fit(int(memory.certain / 0.8))
        fixes += [f"a larger card ({', '.join(larger[:3])})"] if larger else []
    fixes.append("a smaller model")
    raise ConfigError(
        f"this run cannot fit on {device.name} with {gib(device.bytes)}: it needs at least {gib(memory.certain)} "
        f"(weights {gib(memory.kept['weights'])}, adapter and optimizer {gib(adapter)}, and the runtime).",
        fix=f"any one of: {'; '.join(fixes)}.",
    )


def fit_advice(made: estimate.Estimate) -> list[str]:
    """What to know where a run fits, but perhaps not at its longest."""
    device, memory = made.device, made.memory
    if memory.certain > device.bytes + device.swap or memory.high <= device.bytes:
        return []
    over = "is expected to need" if memory.peak > device.bytes else "may need up to"
    size = memory.peak if memory.peak > device.bytes else memory.high
    return [
        f"The run {over} {gib(size)} where every answer reaches training.max_tokens, and {device.name} has "
        f"{gib(device.bytes)}: lower training.max_tokens, training.microbatch_tokens or inference.max_rows if it runs out."
    ]


def check_lengths(config: Config, renderer: Renderer, tasks: Sequence[Task], context: int | None) -> None:
    """ConfigError when the longest prompt and its completion cannot fit the model's positions."""
    if not context:
        return
    # Encoding every prompt takes seconds; the longest by characters hold the longest by tokens, near enough.
    longest = sorted(tasks, key=lambda t: -sum(len(m.content) for m in t.messages))[:16]
    prompt, which = max(((len(renderer.encode(t.messages)), t.id) for t in longest), default=(0, ""))
    if prompt >= context:
        raise ConfigError(
            f"the longest prompt ({which}) has {prompt} tokens and does not fit: {config.model.model} has {context} "
            "positions.",
            fix="use other tasks, a shorter data.instruction or data.system, or another model.",
        )
    for key, most in (("training", config.training.max_tokens), ("eval", config.eval.max_tokens)):
        if prompt + most > context:
            raise ConfigError(
                f"the longest prompt ({which}) has {prompt} tokens; with {key}.max_tokens = {most} a "
                f"rollout may need {prompt + most} positions, but {config.model.model} has {context}.",
                fix=f"set {key}.max_tokens to at most {context - prompt}.",
            )


def ignored_settings(generation: Mapping[str, Any]) -> dict[str, Any]:
    """What a generation_config.json holds and is not allowed to set, as the renderer of a run tells it."""
    return {
        key: value
        for key, value in sorted(generation.items())
        if value is not None
        and not key.startswith("_")
        and not key.endswith("_token_id")
        and key != "transformers_version"
    }


def advice(
    config: Config, tasks: Sequence[Task], held_out: Sequence[Task], ignored: Mapping[str, Any]
) -> list[str]:
    """Plain sentences about what the settings imply for this data and model; ``ignored`` is what the model's
    generation_config was not allowed to set."""
    found: list[str] = []
    same = {
        "do_sample": True,
        "temperature": config.training.temperature,
        "top_p": config.training.top_p,
        "top_k": 0,
        "min_p": 0,
        "repetition_penalty": 1,
    }
    other = {k: v for k, v in ignored.items() if k not in same or same[k] != v}
    if other:
        listed = ", ".join(f"{k} = {v}" for k, v in sorted(other.items()))
        used = " and ".join(
            f"{k} = {same[k]}{'' if k in config.training.model_fields_set else ' (default)'}"
            for k in ("temperature", "top_p")
        )
        found.append(f"The model's generation_config sets {listed}: not used. Sampling is with {used} alone.")
    if config.training.top_p < 1:
        found.append(
            "top_p < 1 samples from a truncated policy; logprobs and the ratio describe the whole one."
        )
    if config.inference.kv_cache_dtype == "fp8" and config.inference.engine == "pytorch":
        found.append(
            'inference.kv_cache_dtype = "fp8" rounds what the sampler remembers: it samples from a policy that differs a '
            "little from the one that is trained. The ratio shows by how much; loss.tis_cap bounds its weight."
        )
    seen = {key for t in tasks for key in _same_problem(config, t)}
    leaked = sum(not seen.isdisjoint(_same_problem(config, t)) for t in held_out)
    if leaked:
        found.append(
            f"{leaked} of {len(held_out)} evaluation tasks are training tasks as well: their accuracy is not held out."
        )
    by_source = rewards_by_source(config)
    matched = [
        t for t in tasks if t.reference.strip() and by_source.get(t.source, config.reward.type) == "match"
    ]
    odd = sum(re.fullmatch(r"-?\d+", t.reference.strip()) is None for t in matched)
    if odd > 0.05 * len(matched):
        key = "reward.type" if config.reward.type == "match" else "reward"
        found.append(
            f"{odd / len(matched):.0%} of the references are not plain integers: match misses equal answers that are "
            f'written differently; {key} = "math" compares their values.'
        )
    if told := ahead.note(config):
        found.append(told)
    return [*found, *references.check(config, tasks, held_out), *_idle_advice(config)]


def _idle_advice(config: Config) -> list[str]:
    """What does nothing, where only a plug-in or the disk can tell."""
    found: list[str] = []
    mode = config.algorithm.algorithm_mode
    kind, name = ("algorithm", mode) if mode else ("transform", config.algorithm.transform_mode)
    default = Sepa()
    changed = [f"sepa.{k}" for k in Sepa.model_fields if getattr(config.sepa, k) != getattr(default, k)]
    if changed and plugins.is_own(kind, name) and not getattr(plugins.load(kind, name), "uses_sepa", False):
        verb = "does" if len(changed) == 1 else "do"
        found.append(
            f"{', '.join(changed)} {verb} nothing: {kind} {name!r} has no attribute uses_sepa = True, which asks for "
            "the schedule."
        )
    if config.model.revision and Path(config.model.model).is_dir():
        found.append(f"model.revision does nothing: {config.model.model} is a local folder, used as it is.")
    return found


@cache
def _instructions() -> tuple[str, ...]:
    """What the sources put after a problem."""
    from retrain.environments.arithmetic import TINY_INSTRUCTION
    from retrain.environments.procedural import INSTRUCTION
    from retrain.environments.reading import DEFAULT_INSTRUCTION

    return DEFAULT_INSTRUCTION, TINY_INSTRUCTION, INSTRUCTION


def _same_problem(config: Config, task: Task) -> tuple[object, object]:
    """Two keys of which equal tasks share at least one: what the model reads, and the question without system message
    and instruction, with its reference."""
    tables = (*config.data.mixture, *config.eval.suites)
    own = [config.data.instruction, *(str(t.get("instruction") or "") for t in tables)]
    text = "\n".join(m.content for m in task.messages if m.role != "system").strip()
    for instruction in sorted({*own, *_instructions()}, key=len, reverse=True):
        rest = text.removesuffix(instruction.strip()).strip()
        if rest and rest != text:
            text = rest
            break
    return task.messages, (text, task.reference.strip())
