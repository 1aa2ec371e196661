"""What a command is pointed at (a run, an adapter folder or a model), and the configuration to use it with."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

from retrain.config.idle import idle
from retrain.config.load import LoadedConfig, Override, load
from retrain.config.names import TINY_MODEL
from retrain.config.schema import Config
from retrain.errors import ConfigError, ModelError, ResumeError, UsageError
from retrain.squeeze.folder import RECORD
from retrain.tracking import layout
from retrain.training.checkpoint import Checkpoints, damage

_ADAPTER_SETTINGS = "adapter_config.json"
_CANNOT = {
    "use_dora": "DoRA rescales the base weights",
    "rank_pattern": "its layers differ in rank",
    "alpha_pattern": "its layers differ in alpha",
    "modules_to_save": "it holds whole modules besides the adapter",
    "fan_in_fan_out": "its matrices are transposed",
}
"""Settings of PEFT that our forward has no counterpart for."""

_SQUEEZES = 8
"""How many squeezes of squeezes are followed back to a run."""


@dataclass(frozen=True, slots=True)
class Subject:
    """Weights and the settings that go with them.

    ``settings`` is a nested mapping to load a configuration from. ``adapter`` is None for a plain model, ``step`` the
    number of completed steps where a run's checkpoint says it, ``facts`` what that checkpoint recorded about model
    and tokenizer. ``selected`` says that the checkpoint was chosen by its evaluation, ``settings_of`` names the run whose
    settings an adapter folder has taken (``with_its_run``).
    """

    kind: Literal["run", "adapter", "model"]
    name: str
    settings: Mapping[str, Any]
    directory: Path | None = None
    adapter: Path | None = None
    checkpoint: str = ""
    step: int | None = None
    facts: Mapping[str, Any] = field(default_factory=dict[str, Any])
    selected: str = ""
    settings_of: str = ""

    @property
    def title(self) -> str:
        """What it is, in words."""
        if self.kind == "run":
            return f"{self.directory} ({self.checkpoint or 'final adapter'})"
        here = (
            self.kind == "adapter" or self.name == TINY_MODEL or os.path.isdir(Path(self.name).expanduser())
        )
        return f"{self.kind} {self.name}" + ("" if here else " (no folder here, so a model on Hugging Face)")


def find(name: str, checkpoint: str = "") -> Subject:
    """The run, checkpoint folder, adapter folder, model folder or model id called ``name``.

    ``checkpoint`` chooses among a run's: "" or newest, best, or a number of completed steps. UsageError and ModelError
    say in one line what is missing.
    """
    try:
        place = Path(name).expanduser()
    except RuntimeError as error:
        raise UsageError(
            f"{name}: there is no such home directory.", fix="write the path in full."
        ) from error
    if not name:
        raise UsageError("the name is empty.", fix="name a run directory, an adapter folder or a model.")
    # os.path answers False where Path raises: no permission, a name that is too long.
    if name != TINY_MODEL and os.path.isdir(place):
        if _is_run(place):
            return _run(name, place, checkpoint)
        if layout.checkpoint_step(place.name) is not None and _is_run(place.resolve().parents[1]):
            if checkpoint:
                raise UsageError(
                    f"{name} is one checkpoint.", fix="name the run directory, or leave --checkpoint out."
                )
            return _run(name, place.resolve().parents[1], place.name)
    if checkpoint:
        raise UsageError(f"--checkpoint chooses among a run's, and {name} is no run.", fix="leave it out.")
    if name == TINY_MODEL:
        return _plain(name)
    if not os.path.exists(place):
        if name.startswith((".", "/", "~")) or name.rstrip("/").count("/") != 1 or name.endswith("/"):
            raise UsageError(
                f"{name}: there is no such folder.", fix="name a run directory, an adapter folder or a model."
            )
        return _plain(name)
    if os.path.isfile(place):
        raise UsageError(
            f"{name} is a file.",
            fix="name the run directory (its logging.log_dir), an adapter folder or a model.",
        )
    if os.path.isfile(place / _ADAPTER_SETTINGS):
        return _adapter(name, place)
    if os.path.isfile(place / "config.json"):
        return _plain(name)
    if layout.holds_campaign(place):
        raise _is_a_campaign(name, place)
    raise UsageError(
        f"{name} holds neither a run (config.toml with checkpoints), nor an adapter ({_ADAPTER_SETTINGS}), nor a model "
        "(config.json).",
        fix="name such a folder, a model id on Hugging Face, or retrain/tiny.",
    )


def _is_a_campaign(name: str, place: Path) -> UsageError:
    runs = sorted(p for p in (place / layout.CAMPAIGN_RUNS).glob("*") if _is_run(p))
    done = next((run for run in runs if os.path.isfile(run / layout.ADAPTER / _ADAPTER_SETTINGS)), None)
    named = f"{name.rstrip('/')}/{layout.CAMPAIGN_RUNS}/"
    fix = f"name one of its runs: {named}{done.name}" if done else f"none is done; later, name one: {named}LABEL_sSEED"
    return UsageError(f"{name} is a campaign, which holds several runs.", fix=f"{fix}.")


def _is_run(place: Path) -> bool:
    held = (layout.RUN, layout.METRICS, layout.TRAINER_STATE, layout.CHECKPOINTS, layout.ADAPTER)
    return os.path.isfile(place / layout.CONFIG) and any(os.path.exists(place / name) for name in held)


def run_around(place: Path) -> Path | None:
    """The run directory that the absolute path is or lies in."""
    held = (layout.RUN, layout.METRICS, layout.TRAINER_STATE, layout.CHECKPOINTS)
    for folder in (place, *place.parents):
        if os.path.isfile(folder / layout.CONFIG) and any(os.path.exists(folder / name) for name in held):
            return folder
    return None


def is_text(text: str) -> bool:
    """False when it holds bytes that were no UTF-8 on the command line or in a pipe."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _plain(name: str) -> Subject:
    # Rank 1 is the smallest adapter; untouched, it adds exactly nothing.
    return Subject("model", name, {"model": {"model": name, "lora_rank": 1}, "reward": {"type": "math"}})


def _run(name: str, place: Path, checkpoint: str) -> Subject:
    config = load(place / layout.CONFIG).config
    settings = _settings_of_run(config)

    def of(path: Path, state: Mapping[str, Any], selected: str = "") -> Subject:
        return Subject(
            "run", name, settings, place, path / layout.ADAPTER, path.name, int(state["step"]), state["facts"], selected
        )  # fmt: skip

    if checkpoint in ("", "newest"):
        try:
            return of(*Checkpoints(place, keep=1).newest())
        except ResumeError as error:
            final = Path(config.backend.adapter_path or place / layout.ADAPTER)
            if not checkpoint and os.path.isfile(final / _ADAPTER_SETTINGS):
                return Subject("run", name, settings, place, final)
            raise ModelError(
                f"{place} holds no intact checkpoint and no adapter.",
                fix="a run writes the first one after training.save_every steps, and one when it is stopped.",
            ) from error
    selected = ""
    if checkpoint == "best":
        checkpoint, selected = _best(place)
    number = int(checkpoint) if checkpoint.isdecimal() else layout.checkpoint_step(checkpoint)
    path = place / layout.CHECKPOINTS / layout.checkpoint_name(number or 0)
    if number is None or not os.path.isdir(path):
        raise ModelError(
            f"{place} has no checkpoint {checkpoint!r}.",
            fix=f"it has {_listed(place)}; newest and best work too.",
        )
    if wrong := damage(path):
        raise ModelError(f"{path} is damaged: {wrong}.", fix=f"choose another: {_listed(place)}.")
    return of(path, json.loads((path / layout.STATE).read_text(encoding="utf-8")), selected)


def _settings_of_run(config: Config) -> dict[str, Any]:
    settings = config.model_dump(exclude_unset=True, exclude_none=True, by_alias=True, exclude={"resume"})
    # What the adapter started from is part of the checkpoint, and may be gone.
    settings.get("lora", {}).pop("init_from", None)
    return settings


def with_its_run(subject: Subject, folder: Path | None = None) -> Subject:
    """An adapter that was squeezed, with the settings of the run that it comes from, so that both are evaluated alike. Nothing
    changes where no run is named in ``folder`` (its own by default), or the run is not there any more."""
    place = folder or subject.adapter
    run = _origin(place) if subject.kind == "adapter" and place is not None else None
    if run is None:
        return subject
    try:
        settings = _settings_of_run(load(run / layout.CONFIG).config)
    except ConfigError:  # of another version, or damaged
        return subject
    own = {key: {**settings.get(key, {}), **subject.settings[key]} for key in ("model", "lora")}
    return replace(subject, settings={**settings, **own}, settings_of=str(run))


def _origin(place: Path) -> Path | None:
    """The run at the beginning of squeezes of squeezes."""
    for _ in range(_SQUEEZES):
        try:
            found: object = json.loads((place / RECORD).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return None
        named = cast("dict[str, Any]", found).get("squeezed_from") if isinstance(found, dict) else None
        if not isinstance(named, str) or not os.path.isabs(named):
            return None
        place = Path(named)
        if (run := run_around(place)) is not None:
            return run
    return None


def _best(place: Path) -> tuple[str, str]:
    try:
        best = json.loads((place / layout.TRAINER_STATE).read_text(encoding="utf-8")).get("best")
    except (OSError, ValueError, AttributeError):
        best = None
    if not best:
        raise ModelError(
            f"{place} has no best checkpoint: none was saved at an evaluation.",
            fix="use --checkpoint newest.",
        )
    return str(best["checkpoint"]), str(best["note"])


def _listed(place: Path) -> str:
    try:
        found = sorted(p.name for p in (place / layout.CHECKPOINTS).iterdir())
    except OSError:
        found = []
    steps = [str(s) for n in found if (s := layout.checkpoint_step(n)) is not None]
    return ", ".join(steps) or "none"


def _adapter(name: str, place: Path) -> Subject:
    where, fix = place / _ADAPTER_SETTINGS, "name a folder of a PEFT LoRA adapter."
    try:
        raw = json.loads(where.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{where} cannot be read: {error}.", fix=fix) from error
    found = cast("dict[str, Any]", raw if isinstance(raw, dict) else {})
    if found.get("peft_type") != "LORA":
        raise ModelError(f"{place} is not a LoRA adapter.", fix=fix)
    why = next((f"{text} ({key})" for key, text in _CANNOT.items() if found.get(key)), "")
    if not why and found.get("bias", "none") != "none":
        why = f"it trained biases (bias = {found['bias']!r})"
    rank, alpha = found.get("r"), found.get("lora_alpha")
    if not isinstance(rank, int) or not isinstance(alpha, int | float) or alpha != int(alpha) or alpha <= 0:
        why = why or f"its rank and alpha are {rank!r} and {alpha!r}, not whole numbers above 0"
    if why:
        raise ModelError(
            f"{place} cannot be used as an adapter here: {why}.", fix="merge it with PEFT and name the model."
        )
    base = str(found.get("base_model_name_or_path") or "")
    if not base:
        raise ModelError(
            f"{where} does not name its base model.", fix="write base_model_name_or_path into it."
        )
    if base != TINY_MODEL and not os.path.isdir(base) and os.path.isdir(place / base):
        base = str(place / base)
    model: dict[str, Any] = {"model": base, "lora_rank": rank}
    if found.get("revision") and base != TINY_MODEL and not os.path.isdir(base):
        model["revision"] = str(found["revision"])
    lora = {"alpha": int(cast("int", alpha)), "rslora": bool(found.get("use_rslora"))}
    return Subject("adapter", name, {"model": model, "lora": lora, "reward": {"type": "math"}}, adapter=place)


def configure(
    subject: Subject, overrides: Sequence[Override], acting: Sequence[str], command: str
) -> LoadedConfig:
    """The subject's settings with ``overrides`` laid over them.

    ``acting`` are the prefixes of keys that the command looks at: a flag for any other would do nothing and is a
    UsageError. Settings of the run that do nothing beside the overrides are left out rather than refused.
    """
    idle_flags = [o.flag for o in overrides if not ".".join(o.path).startswith(tuple(acting))]
    if idle_flags:
        raise UsageError(
            f"{idle_flags[0]} does nothing in retrain {command}.",
            fix=f"leave it out; retrain {command} --help.",
        )
    for o in overrides:
        path = isinstance(o.value, str) and os.path.exists(o.value)  # names of files may be any bytes
        if not path and not is_text(json.dumps(o.value, ensure_ascii=False, default=str)):
            raise UsageError(f"{o.flag}: its value is not valid UTF-8.", fix="correct its bytes.")
    settings = cast("dict[str, dict[str, Any]]", copy.deepcopy(dict(subject.settings)))
    given = {".".join(o.path[:2]): o.value for o in overrides}
    if "eval.source" in given:
        held_out = settings.setdefault("eval", {})
        # Other tasks: what the run said about its own does not describe them.
        names = (
            ("suites",)
            if given["eval.source"] == held_out.get("source")
            else ("suites", "path", "split", "levels")
        )
        for name in names:
            held_out.pop(name, None)
    if "reward.type" in given and given["reward.type"] != settings.get("reward", {}).get("type"):
        settings.get("reward", {}).pop("correct_at", None)
    if subject.kind != "run" and given.get("eval.source") == "reasoning_gym":
        settings["reward"] = {"type": "reasoning_gym"}
    probe = copy.deepcopy(settings)
    for override in overrides:
        section = probe.setdefault(override.path[0], {})
        if len(override.path) == 2:
            section[override.path[1]] = override.value
    try:
        silent = idle(Config.model_validate(probe))
    except (ValueError, TypeError):  # the flags hold a wrong value, which load names
        silent = dict[str, str]()
    for key in silent:
        section, _, name = key.partition(".")
        if key not in given:
            settings.get(section, {}).pop(name, None)
    return load(settings, overrides)
