"""The command line's options: which flag sets which setting, and how a flag's text becomes a value."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from retrain.config.fields import Setting, settings
from retrain.config.flags import flags, flags_of
from retrain.config.load import Override
from retrain.errors import UsageError

SWITCHES = {
    "--overwrite": "Replace the run that the log_dir holds.",
    "--fork": "Start beside the run that the log_dir holds, in the next free folder.",
    "--plain": "Print plain lines, as when the output is not a terminal.",
    "--debug": "Show tracebacks and debug lines.",
}
"""Flags that set nothing in the configuration."""

_NONE: Mapping[str, str] = MappingProxyType({})
_NOT_BOOLEANS = ("yes", "no", "on", "off", "0", "1", "True", "False", "TRUE", "FALSE")


@dataclass(slots=True)
class CommandLine:
    """A parsed command line: at most one positional, overrides in order, and the switches that were given."""

    config: str | None = None
    overrides: list[Override] = field(default_factory=list[Override])
    switches: set[str] = field(default_factory=set[str])


def parse(
    arguments: Sequence[str], aliases: Mapping[str, str] = _NONE, *, positional: str = "configuration"
) -> CommandLine:
    """Read a run's command line; UsageError with a line for each thing that is wrong.

    ``aliases`` are flags that mean another one here, such as ``--source`` for ``--eval.source``;
    ``positional`` is what the one positional argument is.
    """
    result, wrong = CommandLine(), list[str]()
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-") or word == "-":
            if result.config is None:
                result.config = word
            else:
                wrong.append(
                    f"unexpected argument {word!r}. Fix: one {positional}; settings are --flag value."
                )
            continue
        flag, equals, text = word.partition("=")
        if flag in SWITCHES:
            if equals:
                wrong.append(f"{flag} takes no value. Fix: write {flag} alone.")
            result.switches.add(flag)
            continue
        target = _target(aliases.get(flag, flag))
        if target is None:
            if not equals and rest and not rest[0].startswith("-"):
                rest.pop(0)
            wrong.append(_unknown(flag))
            continue
        setting, inner = target
        if not equals:
            taken = _next_value(setting, rest)
            if taken is None:
                wrong.append(f"{flag} needs a value, {setting.accepts}. Fix: {flag} VALUE or {flag}=VALUE.")
                continue
            text = taken
        for override in _overrides(setting, inner, text, flag):
            if any(o.path == override.path for o in result.overrides):
                wrong.append(f"{flag}: {'.'.join(override.path)} is given twice. Fix: give it once.")
            result.overrides.append(override)
    if wrong:
        raise UsageError("\n".join(wrong))
    return result


def _target(flag: str) -> tuple[Setting, tuple[str, ...]] | None:
    """The setting of a flag, with the key inside a table for ``--data.fields.question``."""
    key = flags().get(flag)
    if key is not None:
        return settings()[key], ()
    parts = flag.removeprefix("--").split(".")
    for length in range(len(parts) - 1, 1, -1):
        setting = settings().get(".".join(parts[:length]))
        if setting is not None and setting.type == "table" and all(parts):
            return setting, tuple(parts[length:])
    return None


_ELSEWHERE = {
    "learning-rate": "--lr",
    "epochs": "--max-steps",
    "num-epochs": "--max-steps",
    "num-train-epochs": "--max-steps",
    "steps": "--max-steps",
    "num-generations": "--group-size",
    "n": "--group-size",
    "max-completion-length": "--max-tokens",
    "max-new-tokens": "--max-tokens",
    "output-dir": "--log-dir",
    "output": "--log-dir",
    "dataset": "--data-source",
    "dataset-name": "--data-source",
    "device": "--devices",
    "gpu": "--devices",
    "rank": "--lora-rank",
    "model-name": "--model",
    "model-name-or-path": "--model",
    "config": "CONFIG (the path alone, without a flag)",
    **dict.fromkeys(("dry-run", "dryrun", "estimate"), "retrain explain CONFIG (retrain doctor CONFIG tries its parts)"),
}
"""What other trainers call our settings and commands."""


def _unknown(flag: str) -> str:
    built = list(settings().values())
    known = [*flags(), *SWITCHES]
    dashed = flag.replace("_", "-")
    if (usual := _ELSEWHERE.get(dashed.removeprefix("--"))) is not None:
        return f"{flag} is not a flag. Fix: here it is called {usual}."
    near = [(flags_of(s.key) or [f"--{s.key}"])[0] for s in built if f"--{s.name.replace('_', '-')}" == dashed]
    near = near or [max((k for k in known if dashed.startswith(f"{k}-")), key=len, default="")]
    near = [n for n in near if n] or difflib.get_close_matches(dashed, known, n=1, cutoff=0.75)
    hint = f"did you mean {' or '.join(near)}?" if near else "`retrain man --topic options` lists every flag."
    return f"{flag} is not a flag. Fix: {hint}"


def _next_value(setting: Setting, rest: list[str]) -> str | None:
    if setting.type == "boolean":
        is_value = bool(rest) and (rest[0] in ("true", "false") or rest[0] in _NOT_BOOLEANS)
        return rest.pop(0) if is_value else "true"
    if not rest or rest[0].startswith("--"):
        return None
    return rest.pop(0)


def _overrides(setting: Setting, inner: tuple[str, ...], text: str, flag: str) -> Iterator[Override]:
    path = (*setting.key.split("."), *inner)
    if inner:
        yield Override(path, _free(setting, text), flag)
    elif setting.type == "table" and not text.lstrip().startswith("{"):
        name, equals, value = text.partition("=")
        # Without a name the text goes on as it is, and the schema says that a table is needed.
        yield (
            Override((*path, name.strip()), _free(setting, value), flag)
            if equals and name.strip()
            else Override(path, text, flag)
        )
    else:
        yield Override(path, value_of(setting, text), flag)


def _free(setting: Setting, text: str) -> Any:
    return text if setting.key == "data.fields" else _toml(text)


def value_of(setting: Setting, text: str) -> Any:
    """A flag's text as a value: verbatim for strings, else a TOML value; the text itself where it is none.

    One item may stand for an array of one.
    """
    if setting.type == "string":
        return text
    if setting.is_list and not text.lstrip().startswith("["):
        return [text if setting.type == "array of strings" else _toml(text)]
    return _toml(text)


def _toml(text: str) -> Any:
    if "\n" in text or "\r" in text:
        return text
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    return parsed["value"] if len(parsed) == 1 else text
