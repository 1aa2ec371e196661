"""Constraints: small rewards that look at a response's form. They are parts of ``composite``.

Each scores 1 when it is met and 0 when not, but for two penalties in [-1, 0]. None says that a rollout is correct:
``Score.passed`` stays None.
"""

from __future__ import annotations

import asyncio
import difflib
import functools
import importlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from retrain.boxed import last_boxed
from retrain.errors import ConfigError
from retrain.rewards import schema
from retrain.rewards.calling import summary
from retrain.rewards.schema import JsonSchema
from retrain.types import Rollout, Score, Task

if TYPE_CHECKING:
    from retrain.config.schema import Config
    from retrain.config.tables import PartTable

Value = Callable[[Rollout], float]

_REGEX_S = 2.0
"""Longest search of one response, where ``reward.timeout_s`` is not shorter still."""

_FEWEST_LETTERS = 20


class Check:
    """Applies one function to every rollout. An exception is a failed Score for that rollout alone.

    ``threaded``: the function may take long, so it runs beside the event loop. ``bounds`` are those of the value.
    """

    def __init__(
        self, value: Value, *, bounds: tuple[float, float] = (0.0, 1.0), threaded: bool = False
    ) -> None:
        self._value = value
        self._threaded = threaded
        self.bounds = bounds

    async def score(self, task: Task, rollouts_G: Sequence[Rollout]) -> list[Score]:
        """One score per rollout, in order; a rollout that broke keeps its error."""
        if self._threaded:
            return await asyncio.to_thread(lambda: [self._one(r) for r in rollouts_G])
        return [self._one(r) for r in rollouts_G]

    def _one(self, rollout: Rollout) -> Score:
        if rollout.stop == "error":
            return Score.failed(rollout.error)
        try:
            return Score(reward=float(self._value(rollout)))
        except Exception as error:  # noqa: BLE001  a check that breaks is data: a failed score
            return Score.failed(summary(error))

    def close(self) -> None:
        """Nothing to release."""


def soft_punishment(length: int, max_tokens: int, cache: int) -> float:
    """DAPO's soft overlong punishment (2503.14476, equation 13), in [-1, 0].

    ``length`` sampled tokens cost nothing up to ``max_tokens - cache``, then linearly more, 1 at ``max_tokens``.
    """
    return -min(1.0, max(0.0, (length - (max_tokens - cache)) / cache))


def cache_tokens(tokens: int, max_tokens: int, where: str) -> int:
    """Tokens before the limit where the punishment begins, 0 standing for a fifth of ``max_tokens``."""
    if tokens > max_tokens:
        raise ConfigError(
            f"{where} = {tokens} is more than training.max_tokens = {max_tokens}.",
            fix="set it to at most that.",
        )
    return tokens or max(1, max_tokens // 5)


def overlong(part: PartTable, config: Config, where: str) -> Check:
    """0 while short, falling to -1 at training.max_tokens."""
    limit = config.training.max_tokens
    cache = cache_tokens(part.tokens, limit, f"{where}: tokens")
    return Check(lambda rollout: soft_punishment(rollout.num_sampled, limit, cache), bounds=(-1.0, 0.0))


def penalize_text_containing(part: PartTable, config: Config, where: str) -> Check:
    """-1 where the response holds one of the texts as written, else 0."""
    texts = part.texts
    if not texts or not all(texts):
        _refuse(f"{where} needs texts.", 'name them, for example texts = ["As an AI"].')
    return Check(lambda rollout: -float(any(text in rollout.text for text in texts)), bounds=(-1.0, 0.0))


def length(part: PartTable, config: Config, where: str) -> Check:
    """1 where the response has from ``min`` to ``max`` sampled tokens, words or characters."""
    low, high, unit = part.min, part.max, part.unit
    if not low and not high:
        _refuse(f"{where} limits nothing.", "set max, min or both.")
    if high and low > high:
        _refuse(f"{where}: min = {low} is above max = {high}.", "set it to at most that.")
    measures: Mapping[str, Callable[[Rollout], int]] = {
        "tokens": lambda rollout: rollout.num_sampled,
        "words": lambda rollout: len(rollout.text.split()),
        "characters": lambda rollout: len(rollout.text),
    }
    measure = measures[unit]
    return Check(lambda rollout: low <= (n := measure(rollout)) and (not high or n <= high))


def regex(part: PartTable, config: Config, where: str) -> Check:
    """1 where the pattern is found. A search past its deadline is an error: some patterns never end."""
    if not part.pattern:
        _refuse(f"{where} needs a pattern.", r"for example pattern = '\\boxed\{\d+\}'.")
    package = _package("regex", where)
    try:
        pattern = package.compile(part.pattern)
    except (package.error, OverflowError, RecursionError) as error:
        _refuse(f"{where}: {part.pattern!r} is no pattern: {_line(error)}.", "correct it.")
    search = functools.partial(_search, pattern, min(_REGEX_S, config.reward.timeout_s))
    return Check(lambda rollout: search(rollout.text), threaded=True)


def _search(pattern: Any, timeout_s: float, text: str) -> bool:
    try:
        return pattern.search(text, timeout=timeout_s, concurrent=True) is not None
    except TimeoutError:
        raise TimeoutError(f"the pattern found no end within {timeout_s:g} seconds") from None


_TAG = re.compile(r"[A-Za-z][\w.-]*")


def format(part: PartTable, config: Config, where: str) -> Check:
    """1 where every tag stands once, closed, in order and side by side; with ``boxed`` also a closed box."""
    tags, boxed = part.tags, part.boxed
    if not tags and not boxed:
        _refuse(f"{where} asks for nothing.", 'set tags = ["think", "answer"], boxed = true or both.')
    for tag in tags:
        if not _TAG.fullmatch(tag):
            _refuse(f"{where}: {tag!r} is no name of a tag.", 'write it without brackets, such as "think".')
    if len(set(tags)) < len(tags):
        _refuse(f"{where}: a tag is named twice.", "name each once.")

    def value(rollout: Rollout) -> bool:
        return _in_order(rollout.text, tags) and (not boxed or last_boxed(rollout.text) is not None)

    return Check(value)


def _in_order(text: str, tags: Sequence[str]) -> bool:
    at = 0
    for tag in tags:
        for mark in (f"<{tag}>", f"</{tag}>"):
            found = text.find(mark, at)
            if found < 0 or text.count(mark) != 1:
                return False
            at = found + len(mark)
    return True


_NO_PROSE = re.compile(r"```.*?```|\$\$[^$]*\$\$|\$[^$]*\$|\\[A-Za-z]+|</?[A-Za-z][\w.-]*>", re.S)


def language(part: PartTable, config: Config, where: str) -> Check:
    """1 where py3langid takes the prose for that language. Code, formulas and tags are left out; fewer than 20
    letters say nothing and are accepted."""
    if not part.language:
        _refuse(f"{where} needs a language.", 'write its ISO 639-1 code, for example language = "en".')
    identifier = _identifier(where)
    known: list[str] = sorted(identifier.labels)
    if part.language not in known:
        near = difflib.get_close_matches(part.language.lower(), known, n=1)
        _refuse(
            f"{where}: {part.language!r} is no known language.",
            f'did you mean "{near[0]}"?' if near else f"known: {', '.join(known)}.",
        )

    def value(rollout: Rollout) -> bool:
        prose = _NO_PROSE.sub(" ", rollout.text)
        if sum(c.isalpha() for c in prose) < _FEWEST_LETTERS:
            return True
        return str(identifier.classify(prose)[0]) == part.language

    return Check(value, threaded=True)


def _identifier(where: str) -> Any:
    found = _package("py3langid.langid", where)
    return found.LanguageIdentifier.from_model_file(found.MODEL_FILE)


def json_schema(part: PartTable, config: Config, where: str) -> JsonSchema:
    """1 where the JSON of the response satisfies the schema; see ``schema_child.found`` for what that is.
    References to other documents are not fetched: such a schema is an error."""
    if not part.schema_:
        _refuse(
            f"{where} needs a schema.", 'for example schema = { type = "object", required = ["answer"] }.'
        )
    package = _package("jsonschema", where)
    for name in ("referencing", "regex"):
        _package(name, where)
    given = dict(part.schema_)
    try:
        package.validators.validator_for(given, default=package.Draft202012Validator).check_schema(given)
        json.dumps(given)
    except package.SchemaError as error:
        place = "".join(f".{p}" for p in error.path)
        _refuse(f"{where}: schema{place} is no JSON Schema: {_line(error)}.", "correct it.")
    except TypeError as error:
        _refuse(f"{where}: the schema cannot be written as JSON: {_line(error)}.", "write dates as texts.")
    timeout_s = config.reward.timeout_s
    return schema.of_schema(given, timeout_s=timeout_s, regex_s=min(_REGEX_S, timeout_s), where=where)


Maker = Callable[["PartTable", "Config", str], Check | JsonSchema]

CHECKS: Mapping[str, tuple[Maker, tuple[str, ...]]] = {
    "penalize_text_containing": (penalize_text_containing, ("texts",)),
    "length": (length, ("min", "max", "unit")),
    "regex": (regex, ("pattern",)),
    "format": (format, ("tags", "boxed")),
    "language": (language, ("language",)),
    "json_schema": (json_schema, ("schema_",)),
    "overlong": (overlong, ("tokens",)),
}
"""Per constraint: its maker (part, configuration, what errors begin with) and the keys of a part that it reads."""


def _package(name: str, where: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise ConfigError(
            f"{where} needs the package {package}, which is not installed or does not load: {_line(error)}.",
            fix='pip install "retrain[checks]".',
        ) from error


def _line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__


def _refuse(message: str, fix: str) -> NoReturn:
    raise ConfigError(message, fix=fix)
