"""``retrain explain``: what a configuration will do, need and cost, before anything runs."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from retrain.errors import ConfigError, ModelError, UsageError

if TYPE_CHECKING:
    from retrain.cards import Device
    from retrain.cli.explain_campaign import Told
    from retrain.config.load import LoadedConfig
    from retrain.config.options import CommandLine
    from retrain.estimate import Estimate
    from retrain.training.probe import Probe

USAGE = {
    "explain": """\
Usage: retrain explain [CONFIG] [--gpu NAME] [--probe N] [--json] [--flag value ...]

Says what a run of CONFIG (./retrain.toml) would do, need and cost: settings and where they come from, a step's
arithmetic, memory by part, time, disk, and what is worth knowing before it starts. Loads no model and no data.

  --gpu NAME        estimate for this card and not for this machine, such as "RTX 4090" or H100
  --probe N         sample N tasks with the real model: groups without a signal, lengths, cut answers, and time again
  --data            read the training data as well: its longest prompt, what its references mean for the reward
  --template NAME   explain a template that ships with the package
  --all             show every setting, defaults too
  --json            print one JSON object
Every setting of a run has its usual flag: retrain explain --batch-size 4 --gpu H100. Ends with code 2 where the device
cannot hold the run, or the model's positions its answers.
"""
}

_ENVIRONMENT = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "HF_HOME", "HF_HUB_OFFLINE")
_QUICK_BYTES = 4 * 2**20
"""A JSONL file up to this size is read without being asked to."""


@dataclass(frozen=True, slots=True)
class _Asked:
    """What was asked on the command line, and what it led to; of a campaign ``loaded`` has the configuration of one run."""

    loaded: LoadedConfig
    campaign: Told | None
    line: CommandLine
    label: str
    gpu: str
    probe: int
    data: bool
    all: bool


def explain(arguments: Sequence[str]) -> int:
    """The command ``explain``."""
    # A short command: collecting garbage, starting numpy's threads and looking for plug-ins of pydantic would cost a third
    # of its time.
    if not any(word.startswith("--probe") for word in arguments):
        gc.disable()
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    from retrain.cli import streams
    from retrain.cli.verb import at_once_on_interrupt, own_flags, quiet_loading, whole_number

    values, switches = (
        ("--gpu", "--probe", "--template"),
        ("--json", "--data", "--all", "--overwrite", "--fork"),
    )
    own, rest = own_flags("explain", arguments, values=values, switches=switches)
    tasks = whole_number(own["--probe"], "--probe", least=1) if "--probe" in own else 0
    if not own.get("--gpu", "any").strip():
        raise UsageError("--gpu names no card.", fix='give its name, such as --gpu "RTX 4090".')
    if tasks and "--gpu" in own:
        raise UsageError("--probe samples on this machine, and --gpu names another.", fix="give one of them.")
    with streams.results(alone="--json" in own) as out, quiet_loading(), at_once_on_interrupt():
        loaded, line, label = _loaded(rest, own.get("--template", ""))
        line.switches |= {s for s in ("--overwrite", "--fork") if s in own}
        asked = _Asked(loaded, None, line, label, own.get("--gpu", ""), tasks, "--data" in own, "--all" in own)
        record, refusal = _record(asked)
        if "--json" in own:
            from retrain.tracking.run_log import to_json

            out.record(to_json(record))
        else:
            from retrain.cli.explained import text

            out.line(text(record))
    if refusal is not None:
        raise refusal
    return 0


def _loaded(rest: Sequence[str], template: str) -> tuple[LoadedConfig, CommandLine, str]:
    from retrain.cli import dotenv
    from retrain.config import squeezes, templates
    from retrain.config.load import load
    from retrain.config.options import parse
    from retrain.tracking import layout

    line = parse(rest)
    with contextlib.redirect_stdout(sys.stderr):
        dotenv.load()
    if template:
        if template not in templates.TEMPLATES or line.config is not None:
            raise UsageError(
                f"--template {template}: give one of {', '.join(templates.TEMPLATES)}, and no CONFIG.",
                fix="retrain init --list describes them.",
            )
        label = f"template {template}"
        return load(Path(templates.path_of(template)), line.overrides, label=label), line, label
    resumed = next((str(o.value) for o in line.overrides if o.path == ("resume", "from")), "")
    source = Path(line.config or "retrain.toml")
    if line.config is None and resumed:
        source = Path(resumed) / layout.CONFIG
    elif line.config is None and not source.exists():
        raise UsageError(
            "no configuration: there is no retrain.toml here and none was named.",
            fix="retrain explain CONFIG, or retrain explain --template tiny.",
        )
    loaded = load(source, line.overrides)
    squeezes.refuse(loaded.config, "explain")
    return loaded, line, str(source)


def _record(asked: _Asked) -> tuple[dict[str, Any], ConfigError | None]:
    """Everything that is known, JSON-serialisable, and the refusal where the device cannot hold the run."""
    from retrain import cards, estimate, plugins, preflight
    from retrain.cli import explained
    from retrain.cli.explain_sizes import sizes_record

    plugins.add_search_paths(asked.loaded.search_paths)
    written = asked.loaded
    if written.config.campaign is not None:
        from retrain.cli import explain_campaign

        told = explain_campaign.told(written, asked.gpu, data=asked.data)
        written = told.written
        asked = replace(asked, campaign=told, loaded=replace(written, config=told.shown.config))
    loaded, config, campaign = asked.loaded, asked.loaded.config, asked.campaign
    preflight.check_plugins(config)
    unknown: list[str] = []
    advice: list[str] = []
    model, made, refusal, verdict = None, None, None, ""
    device = cards.card(asked.gpu) if asked.gpu else cards.present(config.backend.devices)
    try:
        model = estimate.model_of(config, loaded.path.parent if loaded.path else None)
    except ModelError as error:
        unknown.append(f"Parameters, memory and time: {error.message}")
    tasks, references = _references(asked)
    prompt = _longest_prompt(asked, model, tasks)
    if config.backend.backend != "local":
        unknown.append(f"Memory and time: they are those of backend {config.backend.backend!r}.")
    elif model is not None:
        made = estimate.estimate(config, model, device, prompt=prompt)
        verdict = _verdict(made)
        try:
            preflight.check_room(config, model, prompt)
            preflight.refuse_unfit(config, made)
        except ConfigError as error:
            refusal = error
            verdict = "cannot" if verdict == "cannot" else "too long"
        advice += preflight.fit_advice(made)
    refusal = refusal or (campaign.refusal if campaign else None)
    ignored = preflight.ignored_settings((model.generation if model else None) or {})
    advice += preflight.advice(config, tasks, (), ignored)
    if campaign is not None:
        advice = [*campaign.notes(ignored), *(line for line in advice if line not in preflight.advice(config, (), (), ignored))]
    sizes = sizes_record(config, made, lambda wide: estimate.estimate(wide, cast("Any", model), device, prompt=prompt))
    if sizes and (wide := sizes.pop("advice")):
        advice.append(f"At backpressure.max_batch_size = {sizes['most']}: {wide[0]}")
    found = None
    if asked.probe and refusal is None:
        found = _probe(asked, advice)
        if made is not None and model is not None:
            made = _again(config, model, device, found)
            verdict = _verdict(made)
    unknown += _unknown(config, model, made, asked, prompt)
    record: dict[str, Any] = {
        "configuration": asked.label,
        "settings": _settings(written, all_of_them=asked.all),
        "environment": {n: os.environ[n] for n in _ENVIRONMENT if os.environ.get(n)},
        "model": model and {
            "name": model.name, "parameters": model.parameters, "layers": model.shape.layers, "hidden": model.shape.hidden,
            "context": model.context, "source": model.source,
        },
        "trainable_parameters": made.trainable if made else model and model.shape.adapter_weights(config.model.lora_rank),
        "device": explained.device_record(device),
        "step": _step(config, made, "probe" if found else "data" if prompt else "assumed"),
        "memory": made and explained.memory_record(made),
        "time": made and explained.time_record(config, made, measured=found is not None and found.length.low is not None),
        "sizes": sizes,
        "disk": explained.disk_record(config, made),
        "campaign": campaign and campaign.record,
        "sepa": explained.sepa_record(config),
        "references": references,
        "generation_config_not_used": None if model is None or model.generation is None else dict(ignored),
        "probe": found and explained.probed_record(found),
        "run_directory": _place(asked, written),
        "announcements": list(campaign.announcements if campaign else loaded.announcements),
        "advice": advice,
        "unknown": unknown,
        "fits": made and {"verdict": verdict, "why": refusal and refusal.message, "fix": refusal and refusal.fix},
    }  # fmt: skip
    return record, refusal


def _again(config: Any, model: Any, device: Device, found: Probe) -> Estimate:
    """The estimate for what a probe saw; for one task, which gives no interval, only its prompt is taken."""
    from retrain.estimate import Interval, estimate

    lengths, trained, length, silent = None, None, found.length, found.silent
    if length.low is not None and length.high is not None:
        lengths = Interval(max(1.0, length.low), max(1.0, min(length.high, config.training.max_tokens)))
    if silent.low is not None and silent.high is not None:
        trained = Interval(1 - silent.high, 1 - silent.low)
    return estimate(config, model, device, prompt=round(found.prompt), lengths=lengths, trained=trained)


def _longest_prompt(asked: _Asked, model: Any, tasks: Sequence[Any]) -> int:
    """Tokens of the longest prompt where the data was asked for and the tokenizer's files are here, otherwise 0."""
    if not asked.data or not tasks or model is None or model.folder is None:
        return 0
    if not (model.folder / "tokenizer.json").is_file():
        return 0
    from retrain.training.probe import longest_prompt

    config = asked.loaded.config
    here = config.model.model_copy(update={"model": str(model.folder), "revision": ""})
    with contextlib.suppress(ModelError):
        return longest_prompt(config.model_copy(update={"model": here}), tasks)
    return 0


def _verdict(made: Estimate) -> str:
    size, memory = made.device.bytes, made.memory
    if memory.certain > size + made.device.swap:
        return "unknown" if made.device.guessed else "cannot"
    return "yes" if memory.high <= size else "perhaps" if memory.low <= size else "not at its longest"


def _settings(written: LoadedConfig, *, all_of_them: bool) -> list[dict[str, Any]]:
    from retrain.config.fields import settings

    config, origins = written.config, written.origins
    found: list[dict[str, Any]] = []
    for key, setting in settings().items():
        origin = origins[key]
        section, _, name = key.partition(".")
        value: Any = getattr(config, section)
        for part in name.split("."):
            # A TOML key that is a word of Python has an underscore in the schema.
            value = None if value is None else getattr(value, part, getattr(value, f"{part}_", None))
        if value is None and section in ("campaign", "squeeze"):
            continue
        if all_of_them or origin.kind != "default":
            found.append({
                "key": key, "value": value, "default": setting.default,
                "origin": origin.where or origin.kind, "kind": origin.kind,
            })  # fmt: skip
    return found


def _step(config: Any, made: Estimate | None, prompts: str) -> dict[str, Any]:
    training = config.training
    rollouts = training.batch_size * training.group_size
    found = {
        "tasks": training.batch_size, "group_size": training.group_size, "rollouts": rollouts,
        "max_tokens": training.max_tokens, "sampled_tokens_at_most": rollouts * training.max_tokens,
        "updates": training.updates_per_batch, "steps": training.max_steps,
        "oversampled_rollouts_at_most": int(rollouts * training.max_oversample) if training.min_signal else rollouts,
    }  # fmt: skip
    if made is not None:
        found |= {
            "prompt_tokens": made.step.prompt, "prompt_from": prompts, "microbatches_at_most": made.step.microbatches,
            "microbatch_tokens": training.microbatch_tokens or made.plan.microbatch_tokens,
            "rows_at_once": made.rows, "checkpointing": made.plan.checkpointing,
        }  # fmt: skip
    return found


def _references(asked: _Asked) -> tuple[Sequence[Any], dict[str, Any]]:
    """The training tasks where they are quickly read or asked for, and what their references are."""
    config = asked.loaded.config
    if not asked.data and not _quick(asked.loaded):
        why = "they are whole numbers" if config.data.source == "arithmetic" else "--data reads the data"
        return (), {"read": False, "note": why}
    import re

    from retrain.environments.mixture import training_tasks
    from retrain.preflight import anchored

    tasks, _ = training_tasks(anchored(config, asked.loaded.path))
    plain = sum(re.fullmatch(r"-?\d+", t.reference.strip()) is not None for t in tasks)
    return tasks, {"read": True, "tasks": len(tasks), "whole_numbers": plain, "note": ""}


def _quick(loaded: LoadedConfig) -> bool:
    """Is the data one small file on the disk?"""
    data = loaded.config.data
    if data.source != "jsonl" or not data.path:
        return False
    with contextlib.suppress(OSError, RuntimeError):
        for root in (loaded.path.parent if loaded.path else Path.cwd(), Path.cwd()):
            path = root / Path(data.path).expanduser()
            if path.is_file():
                return path.stat().st_size <= _QUICK_BYTES
    return False


def _probe(asked: _Asked, advice: list[str]) -> Probe:
    from retrain import preflight
    from retrain.training.probe import probe

    config = preflight.anchored(asked.loaded.config, asked.loaded.path)

    def check(renderer: Any, tasks: Sequence[Any], held_out: Sequence[Any]) -> None:
        preflight.check_lengths(config, renderer, (*tasks, *held_out), renderer.context_length)
        more = preflight.advice(config, tasks, held_out, renderer.ignored_generation_settings)
        advice.extend(line for line in more if line not in advice)

    def say(line: str) -> None:
        print(f"probe: {line}", file=sys.stderr, flush=True)

    return probe(config, asked.probe, check, say)


def _place(asked: _Asked, written: LoadedConfig) -> dict[str, Any]:
    """Where the run would write, and what stands there."""
    from retrain import preflight
    from retrain.tracking import layout

    config = written.config
    directory = preflight.expanded(config.resume.from_ or config.logging.log_dir, "logging.log_dir")
    if asked.campaign is not None:
        given = "log_dir" in config.logging.model_fields_set
        root = directory if given or config.resume.from_ else Path("logs")
        place = str(root) if config.resume.from_ else f"{root}/campaign_<time>"
        return {"path": place, "how": "resume" if config.resume.from_ else "new", "note": ""}
    found: dict[str, Any] = {"path": str(directory), "how": "", "note": ""}
    try:
        place = preflight.choose_directory(
            config, overwrite="--overwrite" in asked.line.switches, fork="--fork" in asked.line.switches
        )
        found |= {"path": str(place.directory), "how": place.how, "note": place.note}
    except ConfigError as error:
        found |= {"how": "refused", "note": str(error)}
    if layout.holds_run(directory):
        from retrain.tracking.read import RunRecord

        run = RunRecord.at(directory)
        found["holds"] = {
            "state": run.state,
            "step": run.facts.get("step"),
            "max_steps": run.facts.get("max_steps"),
        }
    return found


_SLOW_REWARDS: Mapping[str, str] = {
    "custom": "how long your reward function takes",
    "judge": "how long the judge takes",
    "composite": "how long the parts of the reward take",
}


def _unknown(config: Any, model: Any, made: Estimate | None, asked: _Asked, prompt: int) -> list[str]:
    """What stays open, in plain words."""
    found: list[str] = []
    if not asked.probe and made is not None:
        found.append("How long answers get and how many groups train: --probe N measures both.")
        if not prompt:
            by = "its tokenizer is not on this machine" if asked.data else "--data measures them"
            found.append(f"How long prompts are: {made.step.prompt} tokens is assumed; {by}.")
    if made is not None and made.seconds is None:
        why = (
            "4-bit weights"
            if config.model.quantization
            else f"{made.device.name}: {made.device.note or 'its speed'}"
        )
        found.append(f"Time: there is no figure for {why}.")
    if made is not None and made.device.kind == "cuda":
        found.append("Memory and time on CUDA come from sizes and data sheets; they were not measured.")
    if slow := _SLOW_REWARDS.get(config.reward.type):
        found.append(f"Scoring: {slow} is not in the time.")
    if config.environment.provider:
        found.append("Tools and environments: their answers' time and length are not in the time.")
    if model is not None and model.generation is None:
        found.append("What the model's generation_config says: its files are not on this machine.")
    if config.backend.devices != "cpu" and made is not None and made.device.kind == "cpu":
        found.append(f"The GPU: {made.device.note}. --gpu NAME estimates for a card.")
    return found
