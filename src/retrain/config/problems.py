"""What can be wrong with single keys and values, as lines that name the place and the fix."""

from __future__ import annotations

import datetime
import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

from pydantic_core import ErrorDetails

from retrain.config.fields import Setting, literal, sections, settings
from retrain.config.secret import is_secret_name, looks_secret, secrets

KeyPath: TypeAlias = tuple[str | int, ...]

RENAMED = {
    "resume_from": "resume.from",
    "resume.resume_from": "resume.from",
    "training.resume_from": "resume.from",
    "logging.resume_from": "resume.from",
}
"""Old dotted keys and their successors."""

ELSEWHERE = {
    "training.learning_rate": "training.lr",
    "optimizer.learning_rate": "training.lr",
    "optimizer.lr": "training.lr",
    "training.steps": "training.max_steps",
    "training.num_steps": "training.max_steps",
    "training.num_generations": "training.group_size",
    "training.max_new_tokens": "training.max_tokens",
    "training.max_completion_length": "training.max_tokens",
    "lora.rank": "model.lora_rank",
    "lora.r": "model.lora_rank",
    "model.name": "model.model",
    "model.id": "model.model",
    "model.path": "model.model",
    "backend.name": "backend.backend",
    "backend.device": "backend.devices",
    "data.dataset": "data.source",
    "algorithm.advantage": "algorithm.advantage_mode",
    "algorithm.transform": "algorithm.transform_mode",
    "inference.backend": "inference.engine",
    "logging.output_dir": "logging.log_dir",
}
"""What other trainers call a setting."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One finding about the key ``path``: what is wrong, and the fix.

    ``because`` names another key that the finding depends on. ``later`` marks what this version does not
    build, ``note`` what is announced and not refused, ``unknown`` a key that is not a setting.
    """

    path: KeyPath
    message: str
    fix: str = ""
    because: str = ""
    later: bool = False
    note: bool = False

    unknown: bool = False

    def follows_from(self, others: Sequence[Problem]) -> bool:
        """True when this finding may vanish once the others are corrected, so that it would only confuse."""
        keys = {dotted(self.path), self.because}
        touched = {key.partition(".")[0] for key in keys if key}
        return any(
            dotted(other.path[:2]) in keys
            or (other.unknown and not self.later and (len(other.path) == 1 or other.path[0] in touched))
            for other in others
        )

    def line(self, where: str) -> str:
        """The finding on one line."""
        place = f"{where}: " if where else ""
        return " ".join(f"{place}{self.message}{' Fix: ' + self.fix if self.fix else ''}".split("\n"))


def dotted(path: KeyPath) -> str:
    """A key path as users write it."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += ("." if text else "") + shown_key(part)
    return text


def shown_key(name: str) -> str:
    """A key that is safe to print on one line."""
    short = name if len(name) <= 60 else name[:57] + "..."
    return short if short.isprintable() and short and " " not in short else literal(short)


def shown(value: Any) -> str:
    """A value that is safe to print on one line: never a secret, never long."""
    if isinstance(value, Mapping):
        return "a table"
    if isinstance(value, (list, tuple)):
        return "an array"
    if isinstance(value, str) and looks_secret(value):
        return "a secret"
    text = "null" if value is None else literal(value)
    return text if len(text) <= 60 else text[:57] + "..."


def unknown_and_secret(raw: Mapping[str, Any]) -> list[Problem]:
    """Keys that are not settings, sections that are not tables, and secrets at any depth."""
    found: list[Problem] = []
    for section, values in raw.items():
        if section not in sections():
            found.append(_unknown((section,), values))
        elif isinstance(values, Mapping):
            _walk((section,), cast("Mapping[str, Any]", values), found)
    return found


def _walk(prefix: KeyPath, table: Mapping[str, Any], found: list[Problem]) -> None:
    for name, value in table.items():
        path = (*prefix, name)
        key = ".".join(map(str, path))
        if key in settings():
            found += [_secret(place) for place in secrets(path, value, known=True)]
        elif isinstance(value, Mapping) and any(k.startswith(key + ".") for k in settings()):
            _walk(path, cast("Mapping[str, Any]", value), found)
        elif not any(k.startswith(key + ".") for k in settings()):
            found.append(_unknown(path, value))


def _secret(path: KeyPath) -> Problem:
    name = next((str(p) for p in reversed(path) if isinstance(p, str)), "key")
    return Problem(
        path,
        f"{dotted(path)} holds what looks like a secret, which does not belong into a configuration.",
        f"remove it here (and replace the key if this file was shared); set an environment variable such as "
        f"{_variable(name)}, or put that into .env.",
    )


def _variable(name: str) -> str:
    text = re.sub(r"\W", "_", name).upper()
    return text if is_secret_name(text) and len(text) <= 40 else "OPENAI_API_KEY or HF_TOKEN"


def _unknown(path: KeyPath, value: Any) -> Problem:
    leaf = str(path[-1])
    if is_secret_name(leaf) or (isinstance(value, str) and looks_secret(value)):
        return _secret(path)
    what = "section" if len(path) == 1 and isinstance(value, Mapping) else "setting"
    key = ".".join(map(str, path))
    if key in RENAMED:
        return Problem(
            path, f"{dotted(path)} is not a setting.", f"it was renamed; write {RENAMED[key]}.", unknown=True
        )
    near = nearest(key, section_only=what == "section")
    return Problem(
        path,
        f"{dotted(path)} is not a {what}.",
        f"did you mean {near}?" if near else f"remove it; {_known(path)}",
        unknown=True,
    )


def nearest(key: str, *, section_only: bool = False) -> str:
    """The known dotted key (or section) that a wrong one most likely means, or nothing."""
    if section_only:
        return _first(difflib.get_close_matches(key, sections(), n=1, cutoff=0.6), "[{}]")
    if key in ELSEWHERE:
        return ELSEWHERE[key]
    section, _, name = key.rpartition(".")
    here = [s.name for s in settings().values() if s.section == section]
    inside = difflib.get_close_matches(name, here, n=1, cutoff=0.6)
    if inside:
        return f"{section}.{inside[0]}"
    same = [s.key for s in settings().values() if s.name == name]
    if same:
        return " or ".join(same[:3])
    return _first(difflib.get_close_matches(key, settings(), n=1, cutoff=0.7), "{}")


def _first(matches: list[str], pattern: str) -> str:
    return pattern.format(matches[0]) if matches else ""


def _known(path: KeyPath) -> str:
    section = str(path[0])
    if section not in sections():
        return f"sections are {', '.join(sections())}."
    prefix = ".".join(map(str, path[:-1])) + "."
    return f"[{section}] has {', '.join(k.removeprefix(prefix) for k in settings() if k.startswith(prefix))}."


def not_toml(raw: Mapping[str, Any]) -> list[Problem]:
    """Values inside free tables that a TOML file could not hold: they could not be recorded with the run."""
    found: list[Problem] = []
    for key, setting in settings().items():
        section = raw.get(setting.section)
        if setting.type in ("table", "array of tables") and isinstance(section, Mapping):
            value = cast("Mapping[str, Any]", section).get(setting.name)
            found += _not_toml(tuple(key.split(".")), value) if isinstance(value, (Mapping, list)) else []
    return found


def _not_toml(path: KeyPath, value: Any) -> list[Problem]:
    if isinstance(value, Mapping):
        return [p for k, v in cast("Mapping[str, Any]", value).items() for p in _not_toml((*path, k), v)]
    if isinstance(value, list):
        return [p for i, v in enumerate(cast("list[Any]", value)) for p in _not_toml((*path, i), v)]
    if isinstance(value, (str, bool, int, float, datetime.date, datetime.time)):
        return []
    kind = "null" if value is None else f"a {type(value).__name__}"
    return [
        Problem(
            path, f"{dotted(path)} is {kind}, which TOML cannot hold.", "leave it out, or write it as text."
        )
    ]


def from_pydantic(detail: ErrorDetails) -> Problem:
    """One validation error in our words."""
    path: KeyPath = detail["loc"]
    value, context = detail["input"], detail.get("ctx", {})
    if len(path) == 1:
        return Problem(
            path,
            f"{path[0]} is a section, not {shown(value)}.",
            f"write its settings below a line [{path[0]}].",
        )
    setting, length = _setting_of(path)
    if setting is None:
        return Problem(path, f"{dotted(path)}: {detail['msg']}.", "correct the value.")
    if detail["type"] == "value_error":
        return Problem(path[:length], f"{setting.key} {context.get('error')}.", "write it as a TOML table.")
    if length < len(path):
        inner = f"; {dotted(path[length - 1 :])} is {shown(value)}"
        accepts = "a table of strings that are not empty" if setting.type == "table" else setting.accepts
        return Problem(path, f"{setting.key} must be {accepts}{inner}.", _example(setting, None))
    limit = ""
    if (
        detail["type"] == "less_than_equal"
        and "at most" not in setting.accepts
        and " to " not in setting.accepts
    ):
        limit = f" and at most {context.get('le')}"
    return Problem(
        path[:length],
        f"{setting.key} must be {setting.accepts}{limit}, not {shown(value)}.",
        _example(setting, value),
    )


def _setting_of(path: KeyPath) -> tuple[Setting | None, int]:
    for length in range(len(path), 1, -1):
        setting = settings().get(".".join(map(str, path[:length])))
        if setting is not None:
            return setting, length
    return None, 0


def _example(setting: Setting, value: Any) -> str:
    name = setting.key.rpartition(".")[2]
    if (
        isinstance(value, str)
        and setting.type in ("integer", "float", "boolean")
        and _would_fit(setting, value)
    ):
        return f"write it without quotes: {name} = {value.strip()}."
    if setting.choices:
        near = difflib.get_close_matches(str(value), setting.choices, n=1, cutoff=0.6)
        return (
            f"did you mean {literal(near[0])}?"
            if near
            else f"for example {name} = {literal(setting.default)}."
        )
    if setting.type == "string" and isinstance(value, (int, float)):
        return f"put it in quotes: {name} = {literal(literal(value))}."
    if setting.is_list and isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return f"write an array: {name} = [{shown(value)}]."
    if setting.default in (None, "", (), {}):
        return "correct the value, or leave the setting out."
    return f"for example {name} = {literal(setting.default)}."


def _would_fit(setting: Setting, text: str) -> bool:
    kinds = {"integer": r"[+-]?\d+", "float": r"[+-]?\d+(\.\d+)?([eE][+-]?\d+)?", "boolean": "true|false"}
    return re.fullmatch(kinds[setting.type], text.strip()) is not None
