"""What the files of a LoRA adapter say about it, read without torch, and whether a run can start from it. Leaves out: its
tensors, whose names and shapes need the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from retrain.config.schema import Config
from retrain.errors import ModelError

LORA_TARGETS = ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")
"""The linear layers that carry an adapter, sorted: PEFT writes them in hash order, which differs per process."""

WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"
"""PEFT's file names."""

REFUSED = {
    "use_dora": "DoRA rescales the base weights, which our forward leaves untouched",
    "modules_to_save": "it trained whole modules besides the adapter",
    "lora_bias": "it trained biases",
    "fan_in_fan_out": "its matrices are transposed",
    "rank_pattern": "its layers differ in rank",
    "alpha_pattern": "its layers differ in alpha",
    "target_parameters": "it adapts parameters that are no linear layers",
    "trainable_token_indices": "it trained embeddings",
}
"""Settings of PEFT that change what an adapter is, and why a run cannot start from it."""

_MERGE = "merge it into a model and train on that."


def read_settings(directory: Path, key: str) -> dict[str, Any]:
    """``adapter_config.json`` of a PEFT LoRA adapter; ModelError naming the setting ``key`` where there is none, or
    where the header of its tensors and their file do not agree."""
    fix = f"{key} names a folder with {WEIGHTS} and {SETTINGS}, such as the adapter/ of a run."
    for name in (SETTINGS, WEIGHTS):
        if not (directory / name).is_file():
            raise ModelError(f"{key} = {str(directory)!r} holds no {name}.", fix=fix)
    try:
        found = json.loads((directory / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{key}: {directory / SETTINGS} is not valid JSON: {error}.", fix=fix) from error
    if not isinstance(found, dict) or cast("dict[str, Any]", found).get("peft_type") != "LORA":
        raise ModelError(f"{key} = {str(directory)!r} is not a LoRA adapter.", fix=fix)
    _check_header(directory / WEIGHTS)
    return cast("dict[str, Any]", found)


def _check_header(file: Path) -> None:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        return  # the backend says what to install
    try:
        with safe_open(file, framework="numpy"):
            pass
    except (SafetensorError, OSError) as error:
        raise damaged(file, error) from error


def damaged(file: Path, error: Exception) -> ModelError:
    """The one line for an adapter's tensors that cannot be read."""
    reason = str(error).strip().partition("\n")[0].rstrip(".")
    return ModelError(f"{file} is damaged: {reason}.", fix="copy it again, or name another adapter.")


def check_start_adapter(config: Config) -> dict[str, Any] | None:
    """The settings of the adapter that ``lora.init_from`` names; None without one, and for a resumed run, which brings its
    own: the one that it began with may be gone.

    ModelError, with the setting to change, when it is none that this configuration would have made, as far as its files
    say so without the model.
    """
    if not config.lora.init_from or config.resume.from_:
        return None
    directory = start_directory(config)
    found = read_settings(directory, "lora.init_from")
    where = f"lora.init_from = {str(directory)!r}"
    for name, why in REFUSED.items():
        if found.get(name):
            raise ModelError(f"{where} cannot be continued: {why} ({name}).", fix=_MERGE)
    if found.get("bias", "none") != "none":
        raise ModelError(
            f"{where} cannot be continued: it trained biases (bias = {found['bias']!r}).", fix=_MERGE
        )
    _check_scale(config, found, where)
    targets = found.get("target_modules")
    if isinstance(targets, list) and set(cast("list[str]", targets)) != set(LORA_TARGETS):
        listed = ", ".join(sorted(map(str, cast("list[Any]", targets))))
        raise ModelError(
            f"{where} adapts {listed}; here it must be {', '.join(LORA_TARGETS)}.",
            fix="start from an adapter of all linear layers, or leave lora.init_from empty.",
        )
    return found


def start_directory(config: Config) -> Path:
    """The folder of ``lora.init_from``, its ``~`` expanded; ModelError for an unknown user."""
    try:
        return Path(config.lora.init_from).expanduser()
    except RuntimeError as error:
        raise ModelError(
            f"lora.init_from = {config.lora.init_from!r}: {error}", fix="write the whole path."
        ) from error


def _check_scale(config: Config, found: dict[str, Any], where: str) -> None:
    """ModelError when rank, alpha or the rule that joins them are not the configuration's."""
    rank, alpha = found.get("r"), found.get("lora_alpha")
    if rank != config.model.lora_rank:
        raise ModelError(
            f"{where} has rank {rank}, not {config.model.lora_rank}.", fix=f"set model.lora_rank = {rank}."
        )
    expected = config.lora.alpha or 2 * config.model.lora_rank
    if alpha != expected:
        fix = f"this version takes whole alphas above 0: {_MERGE}"
        if isinstance(alpha, int | float) and alpha > 0 and float(alpha).is_integer():
            fix = f"set lora.alpha = {int(alpha)}."
        raise ModelError(f"{where} has alpha {alpha}, not {expected}.", fix=fix)
    if bool(found.get("use_rslora")) != config.lora.rslora:
        raise ModelError(
            f"{where} and the configuration differ in rslora.",
            fix=f"set lora.rslora = {str(not config.lora.rslora).lower()}.",
        )
