"""A user's function: which ones are accepted, what they are handed, what their answers mean."""

from __future__ import annotations

import decimal
import fractions
import math
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrain.rewards import calling
from retrain.rewards.calling import FunctionRefused

MODULE = """
import functools
def plain(response, reference): return (response, reference)
def swapped(reference, response): return (response, reference)
def other_names(a, b): return (a, b)
def only_positional(response, reference, /): return (response, reference)
def with_default(response, reference, scale=1.0): return (response, reference)
def keywords(response, reference, **more): return (response, reference, sorted(more))
def wants(response, reference, rollout, *, task): return (response, reference, task, rollout)
async def later(response, reference): return (response, reference)
class Scorer:
    async def __call__(self, response, reference, info): return info
    def method(self, response, reference): return (response, reference)
scorer = Scorer()
partial = functools.partial(wants, task="bound")
def one(response): ...
def three(response, reference, style): ...
def none(): ...
def fails(response, reference): return 1 / 0
number = 5
_hidden = 1
"""


@pytest.fixture(autouse=True)
def modules(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(MODULE)
    (tmp_path / "raises.py").write_text("x = 1\nraise RuntimeError('bad\\nluck')\n")
    (tmp_path / "leaves.py").write_text("import sys\nsys.exit(0)\n")
    (tmp_path / "needs.py").write_text("import not_installed_here\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    for name in ("my_rewards", "raises", "leaves", "needs"):
        sys.modules.pop(name, None)


EXTRAS = {"task": "T", "info": "I", "rollout": "R"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("plain", ("a", "b")),
        ("swapped", ("a", "b")),
        ("other_names", ("a", "b")),
        ("only_positional", ("a", "b")),
        ("with_default", ("a", "b")),
        ("keywords", ("a", "b", ["info", "rollout", "task"])),
        ("wants", ("a", "b", "T", "R")),
        ("scorer.method", ("a", "b")),
        ("partial", ("a", "b", "T", "R")),
    ],
)
def test_what_a_function_is_handed(name, value):
    assert calling.find("my_rewards", name)("a", "b", EXTRAS) == value


def test_async_functions_are_known():
    assert calling.find("my_rewards", "later").is_async
    assert calling.find("my_rewards", "scorer").is_async
    assert calling.find("my_rewards", "scorer").extras == ("info",)
    assert not calling.find("my_rewards", "plain").is_async


@pytest.mark.parametrize(
    ("module", "name", "said"),
    [
        ("no_such_module", "score", "no module 'no_such_module'"),
        ("no_such.module", "score", "no module 'no_such'"),
        ("my_rewards.py", "score", "no module 'my_rewards.py'"),
        ("my_rewards", "score", "no 'score'; it has Scorer"),
        ("my_rewards", "number", "int, not a function"),
        ("my_rewards", "one", r"one\(response\) cannot be called"),
        ("my_rewards", "three", "missing a required argument: 'style'"),
        ("my_rewards", "none", "cannot be called"),
        ("raises", "score", r"fails on import: RuntimeError: bad \(raises.py:2\)"),
        ("leaves", "score", "fails on import: SystemExit"),
        ("needs", "score", "imports 'not_installed_here', which is not installed"),
    ],
)
def test_what_is_refused(module, name, said):
    with pytest.raises(FunctionRefused, match=said) as caught:
        calling.find(module, name)
    assert caught.value.fix
    assert "\n" not in caught.value.reason


@pytest.mark.parametrize(
    ("value", "reward", "passed", "parts"),
    [
        (1, 1.0, None, {}),
        (0.25, 0.25, None, {}),
        (True, 1.0, True, {}),
        (np.bool_(False), 0.0, False, {}),
        (np.float32(0.5), 0.5, None, {}),
        (np.array([2]), 2.0, None, {}),
        (fractions.Fraction(1, 4), 0.25, None, {}),
        ({"a": 1, "b": 0.5}, 1.5, None, {"a": 1.0, "b": 0.5}),
        ({"reward": 3, "a": 1}, 3.0, None, {"a": 1.0}),
        ({"reward": True, "a": False}, 1.0, True, {"a": 0.0}),
    ],
)
def test_what_an_answer_means(value, reward, passed, parts):
    answer = calling.checked(value)
    assert (answer.reward, answer.passed, dict(answer.parts), answer.error) == (reward, passed, parts, "")


@pytest.mark.parametrize(
    "value",
    [
        None, "1.0", b"1", [1.0], (1, 2), {}, {1: 2.0}, {"a": None}, {"a": math.nan}, math.nan, math.inf,
        -math.inf, 1j, 10**400, np.array([1.0, 2.0]), np.float64("nan"), decimal.Decimal("1"), object(),
        {"a": 1e308, "b": 1e308},
    ],
)  # fmt: skip
def test_what_no_answer_is(value):
    answer = calling.checked(value)
    assert answer.error
    assert math.isnan(answer.reward)


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
        lambda v: st.dictionaries(st.text(), v),
    )
)
def test_an_answer_is_finite_or_an_error(value):
    answer = calling.checked(value)
    assert bool(answer.error) == (not math.isfinite(answer.reward))
    assert all(math.isfinite(p) for p in answer.parts.values())


def test_a_failure_shows_the_users_frames_alone():
    try:
        calling.find("my_rewards", "fails")("a", "b", {})
    except ZeroDivisionError as error:
        answer = calling.failure(error)
    assert answer.traceback.startswith("Traceback")
    assert answer.error.startswith("ZeroDivisionError: division by zero (my_rewards.py:")
    assert "in fails" in answer.traceback
    assert "test_calling.py" in answer.traceback


def test_an_endless_traceback_is_cut():
    def endless():
        raise ValueError("x" * 100_000)

    try:
        endless()
    except ValueError as error:
        answer = calling.failure(error)
    assert len(answer.traceback) < 9000
    assert len(answer.error) < 400
