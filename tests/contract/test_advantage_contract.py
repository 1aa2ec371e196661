"""Every advantage of the plug-in table: a finite float64 per member, equal treatment, no signal no credit.

One that looks at a whole step (``batch_level``) is asked about a step of one group; more groups further down.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrain import plugins

# Rewards in [0, 1] are what every advantage must take; a wider range is each one's own business.
rewards = st.lists(st.floats(0, 1), min_size=2, max_size=16)


@pytest.fixture(scope="module", params=list(plugins.TABLE["advantage"]))
def advantage(request: pytest.FixtureRequest) -> Any:
    function = plugins.load("advantage", request.param)
    return (lambda r: function([r])[0]) if getattr(function, "batch_level", False) else function


@settings(deadline=None, derandomize=True, database=None)
@given(rewards)
def test_one_finite_float64_per_member(advantage: Any, r: list[float]) -> None:
    given_r = np.array(r)
    got = advantage(given_r)
    assert got.shape == (len(r),)
    assert got.dtype == np.float64
    assert np.isfinite(got).all()
    assert given_r.tolist() == r


@settings(deadline=None, derandomize=True, database=None)
@given(rewards, st.integers(0, 1000))
def test_members_are_treated_alike(advantage: Any, r: list[float], seed: int) -> None:
    order = np.random.default_rng(seed).permutation(len(r))
    np.testing.assert_array_equal(advantage(np.array(r)[order]), advantage(np.array(r))[order])


def test_a_better_member_is_never_credited_less(advantage: Any) -> None:
    got = advantage(np.array([0.0, 0.25, 0.5, 1.0]))
    assert (np.diff(got) >= 0).all()
    assert got[-1] > got[0]


@pytest.mark.parametrize("r", [[0.1] * 6, [0.0] * 4, [1.0] * 4])
def test_equal_rewards_get_exactly_nothing(advantage: Any, r: list[float]) -> None:
    assert advantage(np.array(r)).tolist() == [0.0] * len(r)


def test_empty_in_empty_out(advantage: Any) -> None:
    assert advantage(np.zeros(0)).shape == (0,)


def test_the_same_rewards_get_the_same_advantages(advantage: Any) -> None:
    r = np.random.default_rng(0).random(16)
    np.testing.assert_array_equal(advantage(r), advantage(r))


BATCH_LEVEL = [
    n for n in plugins.TABLE["advantage"] if getattr(plugins.load("advantage", n), "batch_level", False)
]
steps = st.lists(st.lists(st.floats(0, 1), max_size=6), max_size=6)


@pytest.mark.parametrize("name", BATCH_LEVEL)
@settings(deadline=None, derandomize=True, database=None)
@given(steps, st.integers(0, 1000))
def test_groups_of_a_step_are_treated_alike(name: str, step: list[list[float]], seed: int) -> None:
    function = plugins.load("advantage", name)
    rng = np.random.default_rng(seed)
    groups = [np.array(r, dtype=np.float64) for r in step]
    got = function(groups)
    assert [a.shape for a in got] == [r.shape for r in groups]
    assert [r.tolist() for r in groups] == step
    order = rng.permutation(len(groups)).tolist()
    inner = [rng.permutation(len(groups[i])) for i in order]
    moved = function([groups[i][p] for i, p in zip(order, inner, strict=True)])
    for a, i, p in zip(moved, order, inner, strict=True):
        assert a.dtype == np.float64
        assert np.isfinite(a).all()
        np.testing.assert_array_equal(a, got[i][p])
        if len(set(step[i])) < 2:
            assert not a.any()
