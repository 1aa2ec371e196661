"""The schema as a flat list: every setting with its type, range, default and description in words."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

from pydantic import BaseModel

from retrain.config.schema import Config, Section

_NOUNS = {
    "string": ("a string", "strings"),
    "integer": ("an integer", "integers"),
    "number": ("a number", "numbers"),
    "boolean": ("true or false", "true or false"),
    "object": ("a table", "tables"),
}
_TYPES = {
    "string": "string",
    "integer": "integer",
    "number": "float",
    "boolean": "boolean",
    "object": "table",
}
_UNBOUNDED = 2**31 - 1
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting with its dotted ``key``. What it accepts is worked out when it is asked for: most commands never ask."""

    key: str
    default: Any
    description: str
    model: type[BaseModel]
    """The table that holds it."""

    @property
    def type(self) -> str:
        """A TOML type, such as "integer" or "array of strings"."""
        return _words(self.model, self.name.rpartition(".")[2])[0]

    @property
    def accepts(self) -> str:
        """Completes "must be ..."."""
        return _words(self.model, self.name.rpartition(".")[2])[1]

    @property
    def choices(self) -> tuple[str, ...]:
        """The values that it may have, where they are listed."""
        return _words(self.model, self.name.rpartition(".")[2])[2]

    @property
    def section(self) -> str:
        """Name of the TOML section."""
        return self.key.partition(".")[0]

    @property
    def name(self) -> str:
        """Key inside the section."""
        return self.key.partition(".")[2]

    @property
    def is_list(self) -> bool:
        """True when the setting holds an array."""
        return self.type.startswith("array")


@cache
def settings() -> Mapping[str, Setting]:
    """Every setting by its dotted key, in the order of the schema."""
    found: dict[str, Setting] = {}
    for section, model in sections().items():
        _collect(section, model, found)
    return found


@cache
def sections() -> Mapping[str, type[Section]]:
    """The model of every section, in the order of the schema."""
    found: dict[str, type[Section]] = {}
    for name, field in Config.model_fields.items():
        union = getattr(field.annotation, "__args__", (field.annotation,))
        found[name] = next(a for a in union if isinstance(a, type) and issubclass(a, Section))
    return found


def _collect(prefix: str, model: type[BaseModel], found: dict[str, Setting]) -> None:
    for name, field in model.model_fields.items():
        key = field.alias or name
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            _collect(f"{prefix}.{key}", field.annotation, found)
            continue
        found[f"{prefix}.{key}"] = Setting(
            key=f"{prefix}.{key}",
            default=field.get_default(call_default_factory=True),  # pyright: ignore[reportCallIssue]
            description=field.description or "",
            model=model,
        )


@cache
def _properties(model: type[BaseModel]) -> Mapping[str, Any]:
    return model.model_json_schema()["properties"]


@cache
def _words(model: type[BaseModel], key: str) -> tuple[str, str, tuple[str, ...]]:
    """Type, what is accepted, and the choices of one key of a table."""
    spec: dict[str, Any] = _properties(model)[key]
    if "anyOf" in spec:
        spec = {**spec, **next(s for s in spec["anyOf"] if s.get("type") != "null")}
    kind = f"array of {_item_type(spec)}s" if spec["type"] == "array" else _TYPES[spec["type"]]
    return kind, _accepts(spec), tuple(spec.get("enum", ()))


def _item_type(spec: Mapping[str, Any]) -> str:
    return _TYPES[spec["items"]["type"]] if "type" in spec["items"] else "value"


def _accepts(spec: Mapping[str, Any]) -> str:
    if "enum" in spec:
        return "one of " + ", ".join(literal(choice) for choice in spec["enum"])
    if spec["type"] == "array":
        empty = " with at least one item" if spec.get("minLength") or spec.get("minItems") else ""
        items: Mapping[str, Any] = spec["items"]
        if "type" not in items:
            return f"an array of strings, numbers or booleans{empty}"
        full = " that are not empty" if items["type"] == "string" and items.get("minLength") else ""
        return f"an array of {_NOUNS[items['type']][1]}{full}{_range(items)}{empty}"
    if spec["type"] == "string" and spec.get("minLength"):
        return "a string that is not empty"
    return _NOUNS[spec["type"]][0] + _range(spec)


def _range(spec: Mapping[str, Any]) -> str:
    low, above = spec.get("minimum"), spec.get("exclusiveMinimum")
    high, below = spec.get("maximum"), spec.get("exclusiveMaximum")
    if low is not None and high is not None:
        return (
            f" of at least {_number(low)}"
            if high >= _UNBOUNDED
            else f" from {_number(low)} to {_number(high)}"
        )
    parts = [f"of at least {_number(low)}"] if low is not None else []
    parts += [f"above {_number(above)}"] if above is not None else []
    parts += [f"below {_number(below)}"] if below is not None else []
    parts += [f"at most {_number(high)}"] if high is not None and high < _UNBOUNDED else []
    return " " + " and ".join(parts) if parts else ""


def _number(value: float) -> str:
    return f"{value:g}" if isinstance(value, float) and abs(value) >= 1e6 else f"{value:.15g}"


def key_text(name: str) -> str:
    """A TOML key, quoted when it has to be."""
    return name if _BARE_KEY.fullmatch(name) else literal(name)


def literal(value: Any) -> str:
    """A value as TOML writes it on one line."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, Mapping):
        table = cast("Mapping[str, Any]", value)
        inner = ", ".join(f"{key_text(str(k))} = {literal(v)}" for k, v in table.items())
        return f"{{ {inner} }}" if inner else "{}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(literal(v) for v in cast("list[Any]", value)) + "]"
    if isinstance(value, (datetime.datetime, datetime.date, datetime.time)):
        return value.isoformat()
    return repr(value)
