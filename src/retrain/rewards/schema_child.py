"""The child side of constraint ``json_schema``: the JSON of one response, validated."""

from __future__ import annotations

import functools
import importlib
import json
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

from retrain.rewards.extract import after_thinking

_jsonschema: Any = importlib.import_module("jsonschema")
_registry: Any = importlib.import_module("referencing").Registry()
_regex: Any = importlib.import_module("regex")

_FENCE = "```"
_BEGIN = re.compile(r"(?:json\b)?\s*", re.I)
_SPACE = re.compile(r"\s*")


class _Searches:
    """Stands for the module ``re`` where the validator searches by it: every search has a deadline."""

    def __init__(self) -> None:
        self.timeout_s = 0.0

    def search(self, pattern: str, text: str) -> Any:
        """As ``re.search``; TimeoutError past the deadline."""
        try:
            return _regex.search(pattern, text, timeout=self.timeout_s)
        except TimeoutError:
            raise TimeoutError(f"the pattern found no end within {self.timeout_s:g} seconds") from None

    def __getattr__(self, name: str) -> Any:
        return getattr(re, name)


_searches = _Searches()


def _guard() -> None:
    # pattern, patternProperties and additionalProperties search in several modules; where one is missed, the
    # deadline of the whole call remains.
    for name, module in list(sys.modules.items()):
        if name.startswith("jsonschema.") and getattr(module, "re", None) is re:
            setattr(module, "re", _searches)  # noqa: B010


_guard()


def score(response: str, reference: str, info: Mapping[str, Any]) -> float:
    """1.0 where what ``found`` finds satisfies ``info["schema"]``, else 0.0 (also where it finds nothing).

    ``info["regex_s"]``: seconds for one search. Whatever the validator raises goes on: it is an error, no 0.
    """
    _searches.timeout_s = float(info["regex_s"])
    validator = _validator(json.dumps(info["schema"]))
    return float(any(validator.is_valid(value) for value in found(response)))


@functools.lru_cache(maxsize=4)
def _validator(schema: str) -> Any:
    given = json.loads(schema)
    kind = _jsonschema.validators.validator_for(given, default=_jsonschema.Draft202012Validator)
    return kind(given, registry=_registry)  # an empty registry: nothing is fetched


def found(response: str) -> Iterator[Any]:
    """The JSON of a response, at most one value: all that follows the last ``</think>`` where that is JSON, else
    the last fenced block there, marked json in any case of letters or not at all, that is."""
    text = after_thinking(response)
    try:
        yield json.loads(text, parse_constant=_no_json)
        return
    except (ValueError, RecursionError):
        pass
    last: list[Any] = []
    begin = text.find(_FENCE)
    while begin >= 0:
        body = _skip(_BEGIN, text, begin + len(_FENCE))
        try:
            value, end = _decoder.raw_decode(text, body)
        except (ValueError, RecursionError):
            end = text.find(_FENCE, body)
        else:
            # A block that the length limit cut off behind its JSON counts as closed.
            end = _skip(_SPACE, text, end)
            if end == len(text) or text.startswith(_FENCE, end):
                last = [value]
            else:
                end = text.find(_FENCE, body)
        begin = text.find(_FENCE, end + len(_FENCE)) if end >= 0 else -1
    yield from last


def _skip(pattern: re.Pattern[str], text: str, at: int) -> int:
    match = pattern.match(text, at)
    return at if match is None else match.end()


def _no_json(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")


_decoder = json.JSONDecoder(parse_constant=_no_json)
