"""Whether a run can be continued, from which checkpoint and how exactly: what a resume looks at, without resuming.
Nothing is written, and the model is loaded only where that is asked for."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from retrain import machine, plugins, preflight
from retrain.adapter_settings import check_start_adapter
from retrain.config.fields import literal
from retrain.config.load import LoadedConfig, Override, load
from retrain.config.own import named_plugins
from retrain.config.schema import Config
from retrain.environments.sources import digest_of
from retrain.errors import ResumeError, RetrainError
from retrain.tracking import layout
from retrain.tracking.read import RunRecord, is_locked
from retrain.training import build, dry
from retrain.training.checkpoint import damage
from retrain.training.own_parts import make_backend


@dataclass(frozen=True, slots=True)
class CheckpointFacts:
    """A checkpoint directory: ``damage`` is "" where every file matches its checksum; ``used`` where a resume starts."""

    name: str
    step: int
    files: int
    bytes: int
    damage: str
    used: bool = False


@dataclass(frozen=True, slots=True)
class Continuation:
    """Whether a run can be continued: ``because`` says why not ("" = it can), ``inexact`` why the result may differ from
    an uninterrupted run (empty = byte-exact, None = not known because it cannot be continued)."""

    run: str
    state: str
    steps_logged: int
    max_steps: int
    checkpoints: tuple[CheckpointFacts, ...]
    possible: bool
    step: int | None = None
    changed: tuple[str, ...] = ()
    compared: tuple[str, ...] = ()
    not_compared: tuple[str, ...] = ()
    inexact: tuple[str, ...] = ()
    byte_exact: bool | None = None
    because: str = ""
    fix: str = ""
    command: str = ""


@dataclass(slots=True)
class _Findings:
    """What the way to an answer has found so far."""

    changed: list[str] = field(default_factory=list[str])
    compared: list[str] = field(default_factory=list[str])
    not_compared: list[str] = field(default_factory=list[str])
    inexact: list[str] = field(default_factory=list[str])


def look(name: str, overrides: Sequence[Override], *, weights: bool) -> Continuation:
    """Look at the run in ``name`` as ``retrain --resume name`` with ``overrides`` would, and change nothing.

    ``weights``: load the base model and compare it. ResumeError where there is no run, ConfigError for wrong overrides.
    """
    directory = preflight.expanded(name, "RUN")
    if not os.path.isfile(directory / layout.CONFIG):
        raise ResumeError(
            f"{directory} holds no run (there is no {layout.CONFIG} in it).",
            fix="name the log_dir of an earlier run.",
        )
    before = load(directory / layout.CONFIG).config
    loaded = load(
        directory / layout.CONFIG, [*overrides, Override.of("resume.from", str(directory), "--resume")]
    )
    config = _as_the_run_sees_it(loaded, before, directory)
    record = RunRecord(directory)
    checkpoints = _checkpoints(directory)
    used = next((c for c in checkpoints if c.used), None)
    found = _Findings()
    found.changed = [
        line
        for line in preflight.changed_settings(before.model_dump(), config.model_dump())
        if not line.startswith(("resume.", "logging.log_dir", "plugins.search_paths"))
    ]
    because = fix = ""
    try:
        plugins.add_search_paths(loaded.search_paths)
        preflight.check_plugins(config)
        # What run.json says is no sign: it may be of another host, or of the moment before a run has begun.
        if is_locked(directory / layout.LOCK):
            raise ResumeError(
                f"another process is writing the run in {directory}.", fix="wait for it, or stop it."
            )
        preflight.check_resume(before, config)
        if used is None:
            raise ResumeError(
                f"{directory} holds no intact checkpoint.",
                fix="name a run directory with checkpoints/, or start anew with --overwrite.",
            )
        state = json.loads(
            (directory / layout.CHECKPOINTS / used.name / layout.STATE).read_text(encoding="utf-8")
        )
        preflight.check_steps(config, used.step)
        _check_streams(directory, state["log"]["bytes"])
        _compare(config, state, found, weights=weights)
    except RetrainError as error:
        because, fix = (str(error), "") if getattr(error, "problems", ()) else (error.message, error.fix)
    return Continuation(
        run=str(directory),
        state=record.state,
        steps_logged=len(record.steps),
        max_steps=config.training.max_steps,
        checkpoints=tuple(checkpoints),
        possible=not because,
        step=used.step if used else None,
        changed=tuple(found.changed),
        compared=tuple(found.compared),
        not_compared=tuple(found.not_compared),
        inexact=tuple(found.inexact),
        byte_exact=None if because else not found.inexact,
        because=because,
        fix=fix,
        command=_command(directory, overrides),
    )


def _check_streams(directory: Path, lengths: Mapping[str, int]) -> None:
    """ResumeError where a file of lines is shorter than its checkpoint knows: see ``RunLog.load_state_dict``."""
    for name, length in lengths.items():
        path = directory / name
        size = path.stat().st_size if path.exists() else 0
        if size < length:
            raise ResumeError(
                f"{path} has fewer bytes than its checkpoint knows ({size} of {length}).",
                fix="restore the file from a copy, or start a new run.",
            )


def _as_the_run_sees_it(loaded: LoadedConfig, before: Config, directory: Path) -> Config:
    """The configuration after what a run does to it before it compares: a drawn seed, and paths made absolute."""
    config = loaded.config
    if config.training.seed < 0:
        training = config.training.model_copy(update={"seed": before.training.seed})
        config = config.model_copy(update={"training": training})
    for section, key in (
        ("data", "path"),
        ("eval", "path"),
        ("model", "model"),
        ("planning", "model"),
        ("lora", "init_from"),
    ):
        then, now = getattr(getattr(before, section), key), getattr(getattr(config, section), key)
        if then != now and then and now:
            for root in (directory, Path.cwd()):
                with contextlib.suppress(OSError, RuntimeError):
                    if Path(then).exists() and (root / Path(now).expanduser()).samefile(then):
                        part = getattr(config, section).model_copy(update={key: then})
                        config = config.model_copy(update={section: part})
                        break
    return config


def _checkpoints(directory: Path) -> list[CheckpointFacts]:
    """The run's checkpoints, newest first, each verified against its checksums; the newest intact one is ``used``."""
    root = directory / layout.CHECKPOINTS
    found: list[CheckpointFacts] = []
    for path in root.iterdir() if root.is_dir() else ():
        step = layout.checkpoint_step(path.name.removeprefix(".").removesuffix(".tmp"))
        if step is None:
            continue
        wrong = "its writing was cut off" if path.name.endswith(".tmp") else damage(path)
        files: Mapping[str, Any] = {}
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            files = json.loads((path / layout.MANIFEST).read_text(encoding="utf-8"))["files"]
        size = 0 if wrong else sum(f["bytes"] for f in files.values())
        found.append(CheckpointFacts(path.name, step, len(files), size, wrong))
    found.sort(key=lambda c: -c.step)
    newest = next((c for c in found if not c.damage), None)
    return [CheckpointFacts(c.name, c.step, c.files, c.bytes, c.damage, used=c is newest) for c in found]


def _compare(config: Config, state: Mapping[str, Any], found: _Findings, *, weights: bool) -> None:
    """Compare everything that a resume compares; raises where it would, and fills ``found`` in."""
    before: Mapping[str, Any] = state["facts"]
    check_start_adapter(config)
    with dry.held_warnings(), dry.parts(config, model_follows=weights) as parts:
        renderer: Any = parts.renderer
        preflight.check_fit(config)
        preflight.check_lengths(config, renderer, (*parts.tasks, *parts.held_out), renderer.context_length)
        dry.check_trackers(config)
        build.check_bounds(config, getattr(parts.reward, "bounds", None))
        now = {**_facts(config, parts), **_learner_facts(config, parts, before, found, weights=weights)}
        preflight.check_model(before, now)
        for name, part in (("tasks", parts.source), ("schedule", parts.schedule)):
            part.load_state_dict(state[name])
    found.compared += [
        "settings",
        "tokenizer",
        "training tasks and their order",
        "schedules",
        "versions and code",
    ]
    if before.get("eval_tasks"):
        found.compared.append("evaluation tasks")
    counters: Mapping[str, Any] = state["counters"]
    found.inexact = preflight.inexact_on_resume(
        config, before, now,
        step=int(state["step"]), evaluated_at=counters["evaluated_at"], reward_errors=counters["reward_errors"],
    )  # fmt: skip


def _facts(config: Config, parts: dry.Parts) -> dict[str, Any]:
    """What ``training/build.py`` records of a start, but for the learner's part."""
    return {
        **build.facts(),
        "tokenizer": getattr(parts.renderer, "fingerprint", ""),
        "schedule_steps": str(config.training.max_steps) if config.training.lr_schedule != "constant" else "",
        "train_tasks": digest_of(parts.tasks),
        "eval_tasks": digest_of(parts.held_out) if parts.held_out else "",
        "reward_code": getattr(parts.reward, "code_digest", ""),
        "plugins": ", ".join(map(" ".join, plugins.digests(named_plugins(config)).items())),
        "planning": getattr(parts.algorithm.detector, "fingerprint", ""),
    }


def _learner_facts(
    config: Config, parts: dry.Parts, before: Mapping[str, Any], found: _Findings, *, weights: bool
) -> dict[str, Any]:
    """The learner's own facts; without ``weights`` those that torch alone can tell, and the rest taken as they were."""
    if weights:
        learner = make_backend(config, parts.renderer)
        try:
            found.compared.append("the base model's weights")
            return dict(learner.facts())
        finally:
            learner.close()
    found.not_compared.append("the base model's weights: --weights loads and compares them")
    ours = ("device", "threads", "weights", "model_commit", "dtype", "deterministic")
    own = {key: before[key] for key in before if key in ours}
    torch = machine.ask_torch() if config.backend.backend == "local" else {}
    if not torch.get("version"):
        found.not_compared.append("device and thread count: torch cannot be asked")
        return own
    cuda = config.backend.devices != "cpu" and bool(torch["devices"])
    index = int(config.backend.devices.partition(":")[2] or 0) if cuda else 0
    auto = "bf16" if cuda else "fp32"
    dtype = auto if config.inference.dtype == "auto" else config.inference.dtype
    return own | {
        "device": torch["devices"][index]["name"] if cuda and index < len(torch["devices"]) else "cpu",
        "threads": str(torch["threads"]),
        "dtype": {"bf16": "bfloat16", "fp32": "float32"}.get(dtype, dtype),
        "deterministic": "yes" if not cuda or config.training.deterministic else "no",
    }


def _command(directory: Path, overrides: Sequence[Override]) -> str:
    words = ["retrain", "--resume", str(directory)]
    for override in overrides:
        value = override.value if isinstance(override.value, str) else literal(override.value)
        words += [override.flag or f"--{'.'.join(override.path)}", value]
    return shlex.join(words)
