"""Arrays of tables inside a section, each with a model of its own: parts of a composite reward, sources of a
mixture, further evaluation suites."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import entry_points
from typing import Any, Literal, TypeVar

from pydantic import Field, ValidationError

from retrain.config import names
from retrain.config.problems import KeyPath, Problem, dotted, shown
from retrain.config.ranges import (
    Count,
    Levels,
    Limit,
    Name,
    Seed,
    SignedWeight,
    Size,
    StringOrStrings,
    Strings,
    Table,
    Temperature,
    Weight,
)
from retrain.config.schema import Config, Section

T = TypeVar("T", bound=Section)

_OF_SOURCES = ("path", "subset", "levels", "subjects", "fields", "generators", "size", "seed")
"""Keys of a source's table that not every source reads."""

_READ: Mapping[str, tuple[str, ...]] = {
    "arithmetic": ("levels",),
    "gsm8k": ("path",),
    "math": ("path", "subjects"),
    "jsonl": ("path", "fields"),
    "hf": ("path", "subset", "fields"),
    "reasoning_gym": ("generators", "size", "seed"),
}
"""Those that each built-in source reads; one of the user's own may read any."""


class SourceTable(Section):
    """What one source of several is: the keys of [data], for this source alone."""

    name: str = Field(default="", description="What curves and task ids call it; empty: the source's name.")
    source: Name = Field(description="Where its tasks come from.")
    reward: str = Field(
        default="", description="match, math or reasoning_gym for its tasks; empty: reward.type."
    )
    path: str = ""
    subset: str = ""
    levels: Levels = (2,)
    subjects: StringOrStrings = ()
    fields: dict[str, Name] = Field(default_factory=dict)
    generators: Table = Field(default_factory=dict)
    size: Count = 1000
    seed: Seed = 0
    instruction: str = ""
    system: str = ""

    @property
    def label(self) -> str:
        """The name that tells this source from the others."""
        return self.name or self.source


class MixtureTable(SourceTable):
    """One source of ``data.mixture``."""

    weight: Weight = Field(
        default=1.0, description="Share of the tasks that come from here, relative to the others."
    )
    split: Name = "train"
    max_examples: Limit = 0


class SuiteTable(SourceTable):
    """One of ``eval.suites``."""

    split: Name = "test"
    examples: Count = 256
    samples: Size = 1
    temperature: Temperature | None = None


class PartTable(Section):
    """One of ``reward.parts``; which keys act depends on the type."""

    name: str = Field(default="", description="Name of its curve; empty: the type.")
    type: Name = Field(description="A reward or a constraint.")
    weight: SignedWeight = Field(default=1.0, description="Factor of its value in the sum.")
    gate: bool = Field(default=False, description="When it fails or breaks, the reward is reward.penalty.")
    module: str = Field(default="", description="For custom: module of the function.")
    function: Name = Field(default="score", description="For custom: name of the function.")
    texts: Strings = Field(default=(), description="For penalize_text_containing: any of these costs 1.")
    pattern: str = Field(default="", description="For regex: a pattern that must be found.")
    tags: Strings = Field(
        default=(), description="For format: tags that must stand once, closed, in this order."
    )
    boxed: bool = Field(default=False, description="For format: the response must hold a closed box.")
    min: Limit = Field(default=0, description="For length: the least that is accepted.")
    max: Limit = Field(default=0, description="For length: the most that is accepted; 0: no limit.")
    unit: Literal["tokens", "words", "characters"] = Field(default="tokens", description="For length.")
    language: str = Field(default="", description="For language: ISO 639-1 code, such as en.")
    schema_: Table = Field(
        default_factory=dict, alias="schema", description="For json_schema: the JSON Schema."
    )
    tokens: Limit = Field(
        default=0, description="For overlong: where it begins, before max_tokens; 0: a fifth."
    )

    @property
    def label(self) -> str:
        """The name of its curve."""
        return self.name or self.type


def mixture(config: Config) -> tuple[MixtureTable, ...]:
    """``data.mixture``, checked before by ``check_tables``."""
    return tuple(MixtureTable.model_validate(table) for table in config.data.mixture)


def suites(config: Config) -> tuple[SuiteTable, ...]:
    """``eval.suites``, checked before by ``check_tables``."""
    return tuple(SuiteTable.model_validate(table) for table in config.eval.suites)


def parts(config: Config) -> tuple[PartTable, ...]:
    """``reward.parts``, checked before by ``check_tables``."""
    return tuple(PartTable.model_validate(table) for table in config.reward.parts)


def rewards_by_source(config: Config) -> dict[str, str]:
    """Label of a source -> the reward that its table names for its tasks; the other sources have ``reward.type``."""
    tables = (*(config.data.mixture if config.data.source == "mixture" else ()), *config.eval.suites)
    return {str(t.get("name") or t.get("source")): str(t["reward"]) for t in tables if t.get("reward")}


def training_rewards(config: Config) -> frozenset[str]:
    """Names of the rewards that score training tasks."""
    tables = config.data.mixture if config.data.source == "mixture" else ()
    return frozenset(str(t.get("reward") or config.reward.type) for t in tables or ({},))


def used_rewards(config: Config) -> frozenset[str]:
    """Names of the rewards that score training or evaluation tasks."""
    held_out = [str(t.get("reward") or config.reward.type) for t in config.eval.suites]
    held_out += [config.reward.type] if config.eval.source else []
    return training_rewards(config).union(held_out)


def check_tables(config: Config) -> Iterator[Problem]:
    """What is wrong inside the tables of the three arrays, key by key."""
    yield from _check(("data", "mixture"), config.data.mixture, MixtureTable)
    yield from _check(("eval", "suites"), config.eval.suites, SuiteTable)
    yield from _check(("reward", "parts"), config.reward.parts, PartTable)


def _check(path: KeyPath, tables: Sequence[Mapping[str, Any]], model: type[T]) -> Iterator[Problem]:
    labels: dict[str, int] = {}
    for index, table in enumerate(tables):
        try:
            checked = model.model_validate(table)
        except ValidationError as error:
            for detail in error.errors():
                yield _problem((*path, index), model, detail["loc"], detail["msg"], detail["type"])
            continue
        if isinstance(checked, SourceTable):
            yield from _idle((*path, index), checked)
            sources = [n for n in names.BUILT["source"] if n != "mixture"]
            if checked.source != "mixture":
                yield from _unknown((*path, index, "source"), checked.source, "source", sources)
            rewards = [n for n in names.BUILT["reward"] if n not in ("routed", "composite")]
            if checked.reward and checked.reward != "composite":
                yield from _unknown((*path, index, "reward"), checked.reward, "reward", rewards)
        elif isinstance(checked, PartTable) and checked.type not in ("composite", "routed"):
            kinds = [n for n in names.BUILT["reward"] if n not in ("routed", "composite")]
            yield from _unknown((*path, index, "type"), checked.type, "reward", [*kinds, *names.CHECKS])
        label = str(getattr(checked, "label"))  # noqa: B009  every model here has one
        if label in labels:
            yield Problem(
                (*path, index),
                f"{'.'.join(map(str, path))}: two tables are called {label[:60]!r}.",
                "give each a name of its own.",
            )
        if "/" in label or not label.isprintable() or not label.strip():
            yield Problem((*path, index, "name"), f"{label[:60]!r} cannot name a curve.", "use a plain word.")
        labels[label] = index


def _idle(path: KeyPath, table: SourceTable) -> Iterator[Problem]:
    """The keys of a table that its source does not read: refused, but announced where they hold the default."""
    if table.source not in _READ:
        return
    unread = {key: "source" for key in _OF_SOURCES if key not in _READ[table.source]}
    if table.source == "jsonl" and table.path.endswith(".jsonl"):
        unread["split"] = "path"
    fields = type(table).model_fields
    for key, because in unread.items():
        if key not in table.model_fields_set:
            continue
        said = f"{dotted((*path, key))} does nothing with {because} = {shown(getattr(table, because))}."
        default: Any = fields[key].get_default(call_default_factory=True)  # pyright: ignore[reportCallIssue]
        if getattr(table, key) == default:
            yield Problem((*path, key), said, note=True)
        else:
            yield Problem((*path, key), said, f"remove it, or change {because}.")


def _unknown(path: KeyPath, name: str, kind: str, known: Sequence[str]) -> Iterator[Problem]:
    """A name that is neither built in, nor a dotted path, nor an installed package's."""
    if (
        name in known
        or "." in name
        or ":" in name
        or name in {e.name for e in entry_points(group=f"retrain.{kind}")}
    ):
        return
    near = difflib.get_close_matches(name, known, n=1)
    fix = (
        f"did you mean {near[0]!r}?"
        if near
        else f"known: {', '.join(known)}, or your own by its dotted path."
    )
    yield Problem(path, f"{dotted(path)} = {shown(name)} is unknown.", fix)


_PLAIN = {
    "tuple_type": "must be an array, such as [...]",
    "bool_type": "must be true or false",
    "string_type": "must be a text",
    "int_type": "must be an integer",
    "float_type": "must be a number",
    "dict_type": "must be a table",
}
"""What pydantic says in Python's words, in TOML's."""


def _problem(
    path: KeyPath, model: type[Section], loc: Sequence[str | int], message: str, kind: str
) -> Problem:
    place = (*path, *loc)
    shown = f"{path[0]}.{path[1]}[{path[2]}]"
    if kind == "extra_forbidden":
        known = [field.alias or name for name, field in model.model_fields.items()]
        near = difflib.get_close_matches(str(loc[0]), known, n=1)
        fix = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}."
        return Problem(place, f"{shown} has no key {loc[0]!r}.", fix, unknown=True)
    if kind == "missing":
        return Problem(path, f"{shown} lacks {loc[0]}.", f"add {loc[0]} = ...")
    what = _PLAIN.get(kind, message[:1].lower() + message[1:])
    return Problem(
        place, f"{shown}.{'.'.join(map(str, loc))}: {what.removeprefix('input ')}.", "correct the value."
    )
