"""The child side of reward ``math``: one comparison of two answers by math_verify, in the child's main thread.

math_verify cuts itself off by ``signal.alarm``, which works in a main thread only, and swallows every exception
inside a comparison. Here a comparison that ran out of time, memory or stack is raised: it is undecided, and a
quiet False would teach that a right answer is wrong. An answer that the parser cannot read stays wrong.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

_verify: Any = importlib.import_module("math_verify")
_parser: Any = importlib.import_module("math_verify.parser")
_grader: Any = importlib.import_module("math_verify.grader")
_sympy: Any = importlib.import_module("sympy")
_evalf: Any = importlib.import_module("sympy.core.evalf")


class Undecided(BaseException):
    """Passes through the ``except Exception: pass`` of math_verify."""


def _guarded(function: Callable[..., Any], kinds: tuple[type[Exception], ...]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except kinds as error:
            raise Undecided(f"{type(error).__name__} while comparing answers") from error

    return call


def _doit(expression: Any) -> Any:
    """math_verify's ``safe_sympy_doit``, but for want of memory or stack."""
    try:
        return expression.doit()
    except (MemoryError, RecursionError) as error:
        raise Undecided(f"{type(error).__name__} while comparing answers") from error
    except Exception:  # noqa: BLE001  an expression that cannot be evaluated is compared as it stands
        return expression


def _guard() -> None:
    # Too deep to parse is not readable, hence wrong; too deep to compare is undecided.
    for name in ("latex2sympy", "parse_expr"):
        setattr(_parser, name, _guarded(getattr(_parser, name), (MemoryError,)))
    for name in ("simplify", "solve"):
        setattr(_grader, name, _guarded(getattr(_grader, name), (MemoryError, RecursionError)))
    _grader.safe_sympy_doit = _doit
    _evalf.EvalfMixin.evalf = _guarded(_evalf.EvalfMixin.evalf, (MemoryError, RecursionError))


_guard()


def score(response: str, reference: str, info: Mapping[str, Any]) -> bool:
    """Whether two answers, each the content of a box, are equal; ``info["stage_s"]`` whole seconds per stage.

    Raises math_verify's TimeoutException for a stage that took longer, Undecided for want of memory or stack,
    and whatever else math_verify raises.
    """
    stage_s = int(info["stage_s"])
    gold, answer = _read(reference, stage_s), _read(response, stage_s)
    return bool(_verify.verify(gold, answer, timeout_seconds=stage_s, raise_on_error=True))


def _read(text: str, stage_s: int) -> list[Any]:
    """What a text may mean: expressions, then the text itself.

    Without the points at infinity and the undefined, as which math_verify reads "05:00" and which it refuses to
    compare: what is left is the text.
    """
    found = _verify.parse(f"\\boxed{{{text}}}", parsing_timeout=stage_s, raise_on_error=True)
    return [f for f in found if f is not _sympy.nan and f is not _sympy.zoo]
