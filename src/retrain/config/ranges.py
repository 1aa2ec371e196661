"""Types of settings with the range of values that each accepts; ``schema`` is written in these words."""

from __future__ import annotations

import json
from typing import Annotated, Any, TypeAlias

from pydantic import AfterValidator, BeforeValidator, Field

from retrain.config.names import ALIASES


def _as_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]


def _one_or_many(value: object) -> object:
    return (value,) if isinstance(value, str) else _as_tuple(value)


def _json_table(value: object) -> object:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else {}
    except (ValueError, RecursionError) as error:
        raise ValueError("must be a table or a JSON object; this text is not valid JSON") from error


def _canonical_uncertainty(value: str) -> str:
    return ALIASES["uncertainty"].get(value, value)


AsTuple = BeforeValidator(_as_tuple)

Name: TypeAlias = Annotated[str, Field(min_length=1)]
Count: TypeAlias = Annotated[int, Field(ge=1, le=2**31 - 1)]
Limit: TypeAlias = Annotated[int, Field(ge=0, le=2**31 - 1)]
Size: TypeAlias = Annotated[int, Field(ge=1, le=65536)]
Rank: TypeAlias = Annotated[int, Field(ge=1, le=4096)]
RankOrAuto: TypeAlias = Annotated[int, Field(ge=0, le=4096)]
Seed: TypeAlias = Annotated[int, Field(ge=0, le=2**63 - 1)]
SeedOrDrawn: TypeAlias = Annotated[int, Field(ge=-1, le=2**63 - 1)]
Level: TypeAlias = Annotated[int, Field(ge=1, le=4)]
Share: TypeAlias = Annotated[float, Field(ge=0, le=1)]
PositiveShare: TypeAlias = Annotated[float, Field(gt=0, le=1)]
SignedShare: TypeAlias = Annotated[float, Field(ge=-1, le=1)]
Alpha: TypeAlias = Annotated[float, Field(gt=0, le=0.5)]
Decay: TypeAlias = Annotated[float, Field(ge=0, lt=1)]
Weight: TypeAlias = Annotated[float, Field(ge=0, le=1000)]
SignedWeight: TypeAlias = Annotated[float, Field(ge=-1000, le=1000)]
Temperature: TypeAlias = Annotated[float, Field(gt=0, le=10)]
Seconds: TypeAlias = Annotated[float, Field(gt=0, le=604_800)]
Peak: TypeAlias = Annotated[float, Field(ge=0, le=1e12)]
Oversample: TypeAlias = Annotated[float, Field(ge=1, le=100)]
Bound: TypeAlias = Annotated[float, Field(ge=-1e9, le=1e9)]

Strings: TypeAlias = Annotated[tuple[str, ...], AsTuple]
Names: TypeAlias = Annotated[tuple[Name, ...], AsTuple]
StringOrStrings: TypeAlias = Annotated[tuple[str, ...], BeforeValidator(_one_or_many)]
Seeds: TypeAlias = Annotated[tuple[Seed, ...], AsTuple, Field(min_length=1)]
Levels: TypeAlias = Annotated[tuple[Level, ...], AsTuple, Field(min_length=1)]
LevelsOrInherited: TypeAlias = Annotated[tuple[Level, ...], AsTuple]
Counts: TypeAlias = Annotated[tuple[Count, ...], AsTuple]
Values: TypeAlias = Annotated[tuple[str | bool | int | float, ...], AsTuple]
Ranks: TypeAlias = Annotated[tuple[Rank, ...], AsTuple]
Rates: TypeAlias = Annotated[tuple[PositiveShare, ...], AsTuple]
Uncertainty: TypeAlias = Annotated[str, Field(min_length=1), AfterValidator(_canonical_uncertainty)]
Table: TypeAlias = dict[str, Any]
TableOrJson: TypeAlias = Annotated[dict[str, Any], BeforeValidator(_json_table)]
Tables: TypeAlias = Annotated[tuple[dict[str, Any], ...], AsTuple]
