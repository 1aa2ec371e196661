"""The schema as JSON Schema, for editors that complete and check TOML.

Draft-07 without references: the newest that all of Taplo (the language server behind Even Better TOML), Tombi and
jsonschema read. What one setting means for another is not in it; the loader says that.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

from retrain.config import names, own
from retrain.config.campaigns import why_same, written_names
from retrain.config.fields import sections, settings
from retrain.config.rules import FIELDS, NAMED, PYTORCH_LACKS, written
from retrain.config.schema import Section
from retrain.config.tables import MixtureTable, PartTable, SuiteTable

DRAFT = "http://json-schema.org/draft-07/schema#"
TITLE = "retrain configuration"

_DOTTED = r"^[^\W\d]\w*([.:][^\W\d]\w*)+$"
_CURVE = r"^$|^[^/\x00-\x1f\x7f]*[^/\s\x00-\x1f\x7f][^/\x00-\x1f\x7f]*$"
_TABLES: Mapping[str, type[Section]] = {
    "data.mixture": MixtureTable,
    "eval.suites": SuiteTable,
    "reward.parts": PartTable,
}
_IN_TABLES = {"source": "source", "reward": "reward", "type": "reward"}
_KEPT = (
    "type", "enum", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "minLength", "minItems", "items",
    "properties", "required", "additionalProperties", "anyOf", "default",
)  # fmt: skip


def json_schema() -> dict[str, Any]:
    """The whole schema; names of installed plug-ins are among those it offers."""
    found: dict[str, Any] = {}
    for name, model in sections().items():
        found[name] = _section(name, model)
    return {
        "$schema": DRAFT,
        "title": TITLE,
        "description": "Everything has a default; a file says what differs from it.",
        "type": "object",
        "additionalProperties": False,
        "properties": found,
        "allOf": _conditions(),
    }


def _conditions() -> list[dict[str, Any]]:
    """What the loader refuses unless an engine, or a source, of one's own may know better."""
    inference = {key.partition(".")[2]: {"not": {"enum": list(lacks)}} for key, (lacks, _) in PYTORCH_LACKS.items()}
    of_ours = {"properties": {"fields": {"propertyNames": {"enum": list(FIELDS)}}}}
    built = ["", *names.BUILT["source"]]
    both_ours = {key: {"properties": {"source": {"enum": built}}} for key in ("data", "eval")}
    reads_fields = [
        {"required": [key], "properties": {key: {"required": ["source"], "properties": {"source": {"enum": ["jsonl", "hf"]}}}}}
        for key in ("data", "eval")
    ]
    pytorch = {"properties": {"inference": {"properties": {"engine": {"enum": ["pytorch"]}}}}}
    return [
        {"if": pytorch, "then": {"properties": {"inference": {"properties": inference}}}},
        {"if": {"anyOf": [{"properties": both_ours}, *reads_fields]}, "then": {"properties": {"data": of_ours}}},
    ]


def _section(prefix: str, model: type[Section]) -> dict[str, Any]:
    raw = model.model_json_schema(by_alias=True)
    definitions = cast("Mapping[str, Any]", raw.get("$defs", {}))
    schema = cast("dict[str, Any]", _plain(raw, definitions))
    schema["description"] = inspect.getdoc(model) or ""
    properties = cast("dict[str, dict[str, Any]]", schema["properties"])
    for name, field in model.model_fields.items():
        key = f"{prefix}.{field.alias or name}"
        spec = properties[field.alias or name]
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            properties[field.alias or name] = _section(key, field.annotation)
            continue
        if field.description:
            spec["description"] = field.description
        properties[field.alias or name] = _special(key, spec)
    return schema


def _plain(value: Any, definitions: Mapping[str, Any]) -> Any:
    """Without references, titles and nulls, which TOML has not."""
    if isinstance(value, list):
        return [_plain(item, definitions) for item in cast("list[Any]", value)]
    if not isinstance(value, Mapping):
        return value
    spec = cast("Mapping[str, Any]", value)
    if "$ref" in spec:
        return _plain({**definitions[str(spec["$ref"]).rpartition("/")[2]], **_without(spec, "$ref")}, definitions)
    if "anyOf" in spec:
        left = [s for s in spec["anyOf"] if s.get("type") != "null"]
        if len(left) == 1:
            return _plain({**_without(spec, "anyOf"), **left[0]}, definitions)
    out: dict[str, Any] = {}
    for key, inner in spec.items():
        if key == "properties":
            out[key] = {str(k): _plain(v, definitions) for k, v in inner.items()}
        elif key == "default":
            if inner is not None:
                out[key] = inner
        elif key in ("items", "anyOf", "additionalProperties"):
            out[key] = _plain(inner, definitions)
        elif key == "minLength" and spec.get("type") == "array":
            out["minItems"] = inner
        elif key in _KEPT:
            out[key] = inner
    return out


def _without(spec: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {k: v for k, v in spec.items() if k != key}


def _special(key: str, spec: dict[str, Any]) -> dict[str, Any]:
    """What the types alone do not say: names, tables with keys of their own, and second ways of writing a value."""
    section, _, name = key.rpartition(".")
    if key in NAMED:
        return _named(spec, _known(NAMED[key], key), is_open=NAMED[key] in names.OPEN, may_be_empty=_may_be_empty(key))
    if key == "logging.trackers":
        spec["items"] = _named(spec["items"], _known("sink"), is_open=True)
    elif key in _TABLES:
        spec["items"] = _section(key, _TABLES[key])
    elif section in _TABLES and name in _IN_TABLES:
        return _named(spec, _known_in_tables(section, name), is_open=True, may_be_empty=spec.get("default") == "")
    elif key == "campaign.conditions":
        spec["items"] = _condition()
    elif key == "data.subjects" or (section in _TABLES and name == "subjects"):
        return _either(spec, {"type": "string", "minLength": 1})
    elif key == "environment.args":
        return _either(spec, {"type": "string", "pattern": r"^\s*(\{[\s\S]*\}\s*)?$"})
    elif key == "backend.devices":
        return {**spec, "pattern": "^(cpu|gpu:[0-9]{1,3})$", "examples": ["gpu:0", "cpu"]}
    elif key == "model.trust_remote_code":
        return {**spec, "const": False}
    elif section in _TABLES and name == "name":
        return {**spec, "pattern": _CURVE}
    elif key == "data.fields":
        spec["propertyNames"] = {"minLength": 1}
    return spec


def _may_be_empty(key: str) -> bool:
    return settings()[key].default == "" or key == "environment.provider"


def _known(kind: str, key: str = "") -> list[str]:
    return [*written(kind, key), *names.ALIASES.get(kind, {}), *(own.installed(kind) if kind in names.OPEN else ())]


def _known_in_tables(section: str, name: str) -> list[str]:
    kind = _IN_TABLES[name]
    known = [n for n in _known(kind) if n not in ("mixture", "composite")]
    return [*known, *names.CHECKS] if section == "reward.parts" else known


def _named(
    spec: Mapping[str, Any], known: Sequence[str], *, is_open: bool, may_be_empty: bool = False
) -> dict[str, Any]:
    """A built-in name, or where ``is_open`` the dotted path of one's own."""
    kept = {k: v for k, v in spec.items() if k in ("description", "default")}
    choices = [*([""] if may_be_empty else []), *known]
    if not is_open:
        return {**kept, "type": "string", "enum": choices}
    dotted = {"type": "string", "pattern": _DOTTED, "description": "Your own: my_module.my_object."}
    if not choices:
        return {**kept, **dotted}
    return {**kept, "anyOf": [{"type": "string", "enum": choices}, dotted]}


def _either(spec: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    outer = {k: v for k, v in spec.items() if k in ("description", "default")}
    inner = {k: v for k, v in spec.items() if k not in outer}
    return {**outer, "anyOf": [inner, dict(other)]}


def _condition() -> dict[str, Any]:
    """One condition of a campaign: any setting that may differ between conditions, by its flat or its dotted name, or inside
    a table of its section."""
    found: dict[str, Any] = {}
    for name, model in sections().items():
        table = {} if name in ("campaign", "squeeze") else cast("dict[str, Any]", _section(name, model)["properties"])
        allowed = {key: _bare(spec) for key, spec in table.items() if not why_same(f"{name}.{key}")}
        if allowed:
            found[name] = {"type": "object", "properties": allowed, "additionalProperties": False}
        for flat, key in written_names().items():
            setting = key.partition(".")[2]
            if key.partition(".")[0] == name and setting in allowed:
                spec = allowed[setting]
                found[flat] = {"anyOf": [found[flat], spec]} if flat in found else spec
    return {"type": "object", "properties": found, "additionalProperties": False}


def _bare(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Without its default, which a condition takes from the sections, and without words that stand there."""
    return {key: value for key, value in spec.items() if key not in ("default", "description")}


def use(path: str) -> str:
    """How a TOML file names its schema at ``path``: a line that Taplo and Tombi read, and a comment for all others."""
    plain = re.match(r"(\.{0,2}/|[A-Za-z]:|\w+://)", path) is not None
    return f"#:schema {path if plain else './' + path}"
