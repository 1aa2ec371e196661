"""Arrays of tables inside a section, each with a model of its own: parts of a composite reward, sources of a
mixture, further evaluation suites."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar

from pydantic import Field, ValidationError

from retrain.config.problems import KeyPath, Problem
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


def check_tables(config: Config) -> Iterator[Problem]:
    """What is wrong inside the tables of the three arrays, key by key."""
    yield from _check(("data", "mixture"), config.data.mixture, MixtureTable)
    yield from _check(("eval", "suites"), config.eval.suites, SuiteTable)
    yield from _check(("reward", "parts"), config.reward.parts, PartTable)


def _check(path: KeyPath, tables: Sequence[Mapping[str, Any]], model: type[T]) -> Iterator[Problem]:
    labels: dict[str, int] = {}
    for index, table in enumerate(tables):
        try:
            label = str(getattr(model.model_validate(table), "label"))  # noqa: B009  every model here has one
        except ValidationError as error:
            for detail in error.errors():
                yield _problem((*path, index), model, detail["loc"], detail["msg"], detail["type"])
            continue
        if label in labels:
            yield Problem(
                (*path, index),
                f"{'.'.join(map(str, path))}: two tables are called {label!r}.",
                "give each a name of its own.",
            )
        if "/" in label or not label.isprintable() or not label.strip():
            yield Problem((*path, index, "name"), f"{label!r} cannot name a curve.", "use a plain word.")
        labels[label] = index


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
    return Problem(place, f"{shown}.{'.'.join(map(str, loc))}: {message}.", "correct the value.")
