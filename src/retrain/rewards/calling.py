"""A user's reward function: found by name, checked, called, and its answer checked. Shared by both ways to
run one, in a child process and in this one, so it imports nothing but the standard library."""

from __future__ import annotations

import importlib
import inspect
import math
import numbers
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

EXTRAS = ("task", "info", "rollout")
"""What a function may ask for by parameter name, besides response and reference."""

_MAX_TRACEBACK = 8000


class FunctionRefused(Exception):
    """The function cannot be used: why, and what to do."""

    def __init__(self, reason: str, fix: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.fix = fix


@dataclass(frozen=True, slots=True)
class Answer:
    """What a call came to: a finite reward with its parts, or an ``error`` of one line with its traceback."""

    reward: float = math.nan
    passed: bool | None = None
    parts: Mapping[str, float] = field(default_factory=dict[str, float])
    error: str = ""
    traceback: str = ""


@dataclass(frozen=True, slots=True)
class RewardFunction:
    """An imported function with the extras it asks for; ``by_name`` when it names response and reference."""

    function: Callable[..., Any]
    extras: tuple[str, ...]
    by_name: bool
    is_async: bool

    def __call__(self, response: str, reference: str, extras: Mapping[str, Any]) -> Any:
        """Call it; what comes back is unchecked, and a coroutine where the function is async."""
        wanted = {name: extras[name] for name in self.extras}
        if self.by_name:
            return self.function(response=response, reference=reference, **wanted)
        return self.function(response, reference, **wanted)


def find(module: str, name: str) -> RewardFunction:
    """Import ``module`` and check its function ``name``; FunctionRefused says what is wrong with it."""
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and (module == error.name or module.startswith(error.name + ".")):
            path = (
                " Write the module's name, not its file's." if module.endswith(".py") or "/" in module else ""
            )
            raise FunctionRefused(
                f"there is no module {error.name!r}.",
                f"put it into a folder of plugins.search_paths, or install it.{path}",
            ) from error
        raise FunctionRefused(
            f"it imports {error.name!r}, which is not installed.", "install it, or drop the import."
        ) from error
    except (Exception, SystemExit) as error:
        raise FunctionRefused(f"it fails on import: {summary(error)}.", "correct the module.") from error
    for part in name.split("."):
        found = getattr(found, part, None)
    if found is None:
        public = [k for k in vars(importlib.import_module(module)) if not k.startswith("_")]
        raise FunctionRefused(
            f"it has no {name!r}; it has {', '.join(sorted(public)[:12]) or 'nothing'}.",
            "set reward.custom_function.",
        )
    if not callable(found):
        raise FunctionRefused(
            f"its {name!r} is a {type(found).__name__}, not a function.", "set reward.custom_function."
        )
    function = cast("Callable[..., Any]", found)
    extras, by_name = _signature(function, name)
    call = getattr(type(function), "__call__", None)  # noqa: B004  an object with an async __call__
    is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(call)
    return RewardFunction(function, extras, by_name, is_async)


def _signature(function: Callable[..., Any], name: str) -> tuple[tuple[str, ...], bool]:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return (), False  # written in C: there is nothing to check before the first call
    parameters = signature.parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    extras = tuple(e for e in EXTRAS if open_ended or e in parameters)
    named = {"response", "reference"} <= set(parameters)
    by_name = named and all(
        parameters[n].kind is not inspect.Parameter.POSITIONAL_ONLY for n in ("response", "reference")
    )
    try:
        wanted = dict.fromkeys(extras)
        if by_name:
            signature.bind(response="", reference="", **wanted)
        else:
            signature.bind("", "", **wanted)
    except TypeError as error:
        raise FunctionRefused(
            f"{name}{signature} cannot be called with (response, reference): {error}.",
            f"write def {name}(response, reference), with task, info and rollout if you need them.",
        ) from error
    return extras, by_name


def checked(value: object) -> Answer:
    """The answer that a function's value stands for.

    A bool is pass or fail; a finite number is the reward; a mapping holds named finite parts, whose
    ``reward`` entry is the reward, or their sum where there is none. Anything else is an error.
    """
    if isinstance(value, Mapping):
        return _checked_parts(cast("Mapping[object, object]", value))
    number = _number(value)
    if isinstance(number, str):
        return Answer(error=f"the function returned {number}")
    return Answer(reward=float(number), passed=number if isinstance(number, bool) else None)


def _checked_parts(value: Mapping[object, object]) -> Answer:
    if not value:
        return Answer(error="the function returned an empty mapping")
    parts: dict[str, float] = {}
    passed: bool | None = None
    for key, entry in value.items():
        if not isinstance(key, str):
            return Answer(error=f"the function returned a mapping with the key {key!r}, not a text")
        number = _number(entry)
        if isinstance(number, str):
            return Answer(error=f"the function returned {number} as {key!r}")
        parts[key] = float(number)
        if key == "reward" and isinstance(number, bool):
            passed = number
    reward = parts.pop("reward") if "reward" in parts else sum(parts.values())
    if not math.isfinite(reward):
        return Answer(error="the function returned parts whose sum is not finite")
    return Answer(reward=reward, passed=passed, parts=parts)


def _number(value: object) -> float | bool | str:
    """A finite float or a bool; a str says what the value is instead."""
    if not isinstance(value, numbers.Real) and callable(item := getattr(value, "item", None)):
        try:
            value = item()  # a numpy bool or an array or tensor of one element
        except (TypeError, ValueError, RuntimeError):
            return f"a {type(value).__name__} of several elements, not a number"
    if isinstance(value, bool):
        return value
    if not isinstance(value, numbers.Real):
        return "None" if value is None else f"a {type(value).__name__}, not a number"
    try:
        number = float(value)
    except (OverflowError, ValueError):
        return "a number beyond the range of floats"
    return number if math.isfinite(number) else f"{number}"


def failure(error: BaseException) -> Answer:
    """What an exception from the user's function stands for."""
    own = error.__traceback__
    while own is not None and own.tb_frame.f_code.co_filename in _OWN_FILES:
        own = own.tb_next
    text = "".join(traceback.format_exception(type(error), error, own))
    if len(text) > _MAX_TRACEBACK:
        text = text[: _MAX_TRACEBACK // 2] + "\n...\n" + text[-_MAX_TRACEBACK // 2 :]
    return Answer(error=summary(error), traceback=text)


_OWN_FILES = {str(Path(__file__).with_name(name)) for name in ("calling.py", "custom.py", "sandbox_child.py")}


def summary(error: BaseException) -> str:
    """One line: the exception's type and first line, and where it was raised."""
    frames = traceback.extract_tb(error.__traceback__, limit=-8)
    # A tracker puts its own function in sys.exit's place, and another one may put its own around that.
    while isinstance(error, SystemExit) and len(frames) > 1 and frames[-1].name == "exit":
        frames.pop()
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}{': ' + text[:300] if text else ''}{where}"
