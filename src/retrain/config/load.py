"""From a TOML file, a mapping or nothing, with overrides, to a checked ``Config`` with origins.

All problems of a configuration are reported at once, one line each, with place and fix. Nothing is
silently ignored: a setting that is accepted acts, or is announced in ``LoadedConfig.announcements``.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

from pydantic import ValidationError

from retrain.config import campaigns, idle, problems, rules
from retrain.config.fields import key_text, literal, sections, settings
from retrain.config.positions import line_numbers
from retrain.config.problems import KeyPath, Problem
from retrain.config.schema import Config
from retrain.errors import ConfigError, NotInThisVersion

Source: TypeAlias = Path | str | Mapping[str, Any] | Config | None


@dataclass(frozen=True, slots=True)
class Override:
    """One value that wins over the file: ``path`` is the key in parts, ``flag`` what the user typed."""

    path: tuple[str, ...]
    value: Any
    flag: str = ""

    @classmethod
    def of(cls, key: str, value: Any, flag: str = "") -> Override:
        """An override from a dotted key."""
        return cls(tuple(key.split(".")), value, flag)


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a value came from; ``where`` is its place in words, such as ``retrain.toml:12`` or ``--lr``."""

    kind: Literal["default", "file", "flag", "mapping"]
    where: str
    line: int = 0


@dataclass(frozen=True, slots=True)
class LoadedConfig:
    """A checked configuration with the origin of every setting.

    ``announcements`` name what is accepted and does nothing here. ``path`` is the TOML, None without one. ``places`` are
    the origins of everything that was written, also inside tables, by its key in parts.
    """

    config: Config
    origins: Mapping[str, Origin]
    announcements: tuple[str, ...] = ()
    path: Path | None = None
    places: Mapping[KeyPath, Origin] = field(default_factory=dict[KeyPath, Origin])

    def where(self, *path: str | int) -> str:
        """The place of a key, or of the nearest table around it, in words; "" where nothing of it was written in a file."""
        return _where(self.places, path, self.path)

    @property
    def search_paths(self) -> tuple[Path, ...]:
        """Folders of the user's own modules: relative to the TOML's folder, then to the working directory."""
        listed = [_home_expanded(p) for p in self.config.plugins.search_paths]
        starts = ([self.path.parent] if self.path is not None else []) + [Path.cwd()]
        return tuple(dict.fromkeys((start / p).absolute() for p in listed for start in starts))


def _home_expanded(path: str) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ConfigError(
            f"plugins.search_paths holds {path!r}: there is no such home directory.",
            fix="write the path in full.",
        ) from error


DEFAULT = Origin("default", "default")


def load_config(source: Source = None, overrides: Sequence[Override] | Mapping[str, Any] = ()) -> Config:
    """The configuration of a path, mapping or nothing; ConfigError with every problem when it is wrong.

    ``overrides`` maps dotted keys to values: ``{"training.lr": 1e-4}``.
    """
    return load(source, overrides).config


def load(
    source: Source = None,
    overrides: Sequence[Override] | Mapping[str, Any] = (),
    *,
    label: str = "",
    places: Mapping[KeyPath, Origin] | None = None,
) -> LoadedConfig:
    """Like ``load_config``, with the origin of every value and what is to be announced.

    ``label`` stands for the file's path where the file is not the user's own, such as a template. ``places`` says where
    the values of a mapping come from.
    """
    raw, origins, path = _read(source, label)
    origins |= places or {}
    listed = (
        overrides if not isinstance(overrides, Mapping) else [Override.of(k, v) for k, v in overrides.items()]
    )
    is_campaign = isinstance(raw.get("campaign"), dict)
    for override in listed:
        if is_campaign and override.path == ("training", "max_steps"):
            # The runs of a campaign have no number of steps of their own.
            override = replace(override, path=("campaign", "max_steps"))
        _apply(override, raw, origins)
    found = problems.unknown_and_secret(raw)
    found += problems.not_toml(raw)
    for problem in found:
        _drop(raw, problem.path)
    config, more = _validate(raw)
    found += more
    independent = [f for f in rules.check(config) if not f.follows_from(found)]
    found += [f for f in independent if not f.note]
    if found:
        raise _error(found, origins, path)
    return LoadedConfig(
        config=config,
        origins={key: origins.get(tuple(key.split(".")), DEFAULT) for key in settings()},
        announcements=tuple(f.line(_where(origins, f.path, path)) for f in independent),
        path=path,
        places=origins,
    )


def dump_toml(config: Config) -> str:
    """The resolved configuration as TOML that loads back equal.

    Left out are settings that are unset, and defaults that would be refused as not applying.
    """
    lines: list[str] = []
    unstated = {**idle.idle(config), **campaigns.implied(config)}
    for section in sections():
        model = getattr(config, section)
        if model is None:
            continue
        lines += ["", f"[{section}]"]
        lines += _dump(section, model.model_dump(by_alias=True), unstated)
    return "\n".join(lines).lstrip("\n") + "\n"


def _dump(prefix: str, values: Mapping[str, Any], unstated: Mapping[str, str]) -> Iterable[str]:
    for name, value in values.items():
        key = f"{prefix}.{name}"
        setting = settings().get(key)
        if value is None or (key in unstated and setting is not None and value == setting.default):
            continue
        yield f"{key_text(name)} = {literal(value)}"


def _read(source: Source, label: str) -> tuple[dict[str, Any], dict[KeyPath, Origin], Path | None]:
    if source is None:
        return {}, {}, None
    if isinstance(source, Config):
        source = source.model_dump(exclude_unset=True, by_alias=True)
    if isinstance(source, Mapping):
        raw = _plain(source)
        return raw, {p: Origin("mapping", "") for p in _paths(raw, ())}, None
    path = Path(source)
    text = _read_text(path)
    try:
        raw = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise _not_toml(path, error) from error
    lines, place = line_numbers(text), label or str(path)
    origins = {
        p: Origin("file", f"{place}:{lines[p]}" if p in lines else place, lines.get(p, 0))
        for p in _paths(raw, ())
    }
    return raw, origins, None if label else path


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: there is no such file.", fix=_other_files(path)) from error
    except IsADirectoryError as error:
        raise ConfigError(f"{path}: this is a folder.", fix="name the TOML file itself.") from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ConfigError(
            f"{path}: cannot be read: {reason}.", fix="check the path and its permissions."
        ) from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: not UTF-8 text.", fix="save the file as UTF-8.") from error


def _other_files(path: Path) -> str:
    try:
        near = sorted(p.name for p in path.parent.glob("*.toml"))[:5]
    except OSError:
        near = []
    if near:
        return f"in that folder there is {', '.join(near)}."
    return "correct the path, or write a configuration with `retrain init`."


def _not_toml(path: Path, error: Exception) -> ConfigError:
    if isinstance(error, RecursionError):
        return ConfigError(f"{path}: not valid TOML: too deeply nested.", fix="nest fewer values.")
    text = str(error)
    place = re.search(r" \(at line (\d+), column (\d+)\)", text)
    at = f":{place[1]}:{place[2]}" if place else ""
    reason = text.replace(place[0], "") if place else text
    return ConfigError(f"{path}{at}: not valid TOML: {reason.rstrip('.')}.", fix="correct that place.")


def _plain(value: Any) -> Any:
    """Own copy of a mapping's contents in plain types, so that later changes do not reach the caller's."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in cast("Mapping[Any, Any]", value).items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in cast("list[Any]", value)]
    return os.fspath(cast("os.PathLike[str]", value)) if isinstance(value, os.PathLike) else value


def _paths(value: Any, prefix: KeyPath) -> Iterable[KeyPath]:
    if prefix:
        yield prefix
    if isinstance(value, Mapping):
        for key, inner in cast("Mapping[str, Any]", value).items():
            yield from _paths(inner, (*prefix, key))
    elif isinstance(value, (list, tuple)):
        for index, inner in enumerate(cast("list[Any]", value)):
            yield from _paths(inner, (*prefix, index))


def _apply(override: Override, raw: dict[str, Any], origins: dict[KeyPath, Origin]) -> None:
    origin = Origin("flag", override.flag) if override.flag else Origin("mapping", "")
    table = raw
    for depth, part in enumerate(override.path[:-1], start=1):
        inner = table.setdefault(part, {})
        if not isinstance(inner, dict):
            return  # The file has a value where a section must be; that is reported.
        origins.setdefault(override.path[:depth], origin)
        table = cast("dict[str, Any]", inner)
    table[override.path[-1]] = _plain(override.value)
    n = len(override.path)
    for stale in [p for p in origins if p[:n] == override.path]:
        del origins[stale]
    for path in _paths(table[override.path[-1]], override.path):
        origins[path] = origin


def _drop(raw: dict[str, Any], path: KeyPath) -> None:
    table: Any = raw
    for part in path[:-1]:
        if not isinstance(table, dict) or part not in table:
            return
        table = cast("Any", table[part])
    if isinstance(table, dict):
        cast("dict[Any, Any]", table).pop(path[-1], None)


def _validate(raw: dict[str, Any]) -> tuple[Config, list[Problem]]:
    """A config in any case: values that are wrong are reported and replaced by their defaults."""
    found: list[Problem] = []
    while True:
        try:
            return Config.model_validate(raw), found
        except ValidationError as error:
            before = len(found)
            for detail in error.errors(include_url=False):
                problem = problems.from_pydantic(detail)
                found.append(problem)
                _drop(raw, problem.path[:2])
            if len(found) == before:
                raise


def _origin(origins: Mapping[KeyPath, Origin], path: KeyPath) -> Origin | None:
    """Origin of a key, else of the nearest table around it."""
    return next((origins[path[:n]] for n in range(len(path), 0, -1) if path[:n] in origins), None)


def _where(origins: Mapping[KeyPath, Origin], path: KeyPath, file: Path | None) -> str:
    origin = _origin(origins, path)
    return origin.where if origin is not None else str(file or "")


def _error(found: Sequence[Problem], origins: Mapping[KeyPath, Origin], file: Path | None) -> ConfigError:
    def order(problem: Problem) -> tuple[bool, int]:
        origin = _origin(origins, problem.path)
        return (origin.kind == "flag", origin.line) if origin is not None else (False, 0)

    lines = list(dict.fromkeys(p.line(_where(origins, p.path, file)) for p in sorted(found, key=order)))
    kind = NotInThisVersion if all(p.later for p in found) else ConfigError
    return kind("the configuration has problems.", problems=lines)
