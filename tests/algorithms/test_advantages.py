"""Episode advantages against naive float64 loops, on known cases of the formulas, and as properties."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrain.algorithms.advantages import grpo, maxrl
from retrain.errors import RunError

rewards = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20)
shares = st.lists(st.floats(0, 1), min_size=1, max_size=20)


def naive_grpo(r: list[float]) -> list[float]:
    mean = 0.0
    for x in r:
        mean += x / len(r)
    return [0.0 if max(r) == min(r) else x - mean for x in r]


def naive_maxrl(r: list[float]) -> list[float]:
    mean = 0.0
    for x in r:
        mean += x / len(r)
    if max(r) == min(r) or mean <= 1e-6:
        return [0.0 for _ in r]
    return [(x - mean) / (mean + 1e-6) for x in r]


@given(rewards)
def test_grpo_equals_its_twin_and_sums_to_zero(r: list[float]) -> None:
    scale = max(abs(x) for x in r) + 1.0
    got = grpo(np.array(r))
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, naive_grpo(r), atol=1e-12 * scale, rtol=0)
    assert abs(got.sum()) <= 1e-12 * scale * len(r)


@given(shares.filter(lambda r: abs(sum(r) / len(r) - 1e-6) > 1e-9))
def test_maxrl_equals_its_twin(r: list[float]) -> None:
    np.testing.assert_allclose(maxrl(np.array(r)), naive_maxrl(r), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("fn", [grpo, maxrl])
@given(r=shares, seed=st.integers(0, 1000))
def test_permuting_the_group_permutes_the_advantages_bit_for_bit(fn, r: list[float], seed: int) -> None:
    order = np.random.default_rng(seed).permutation(len(r))
    np.testing.assert_array_equal(fn(np.array(r))[order], fn(np.array(r)[order]))


@given(st.integers(2, 64).flatmap(lambda g: st.tuples(st.integers(1, g - 1), st.just(g))))
def test_maxrl_of_k_successes_among_g(k_of_g: tuple[int, int]) -> None:
    k, g = k_of_g
    got = maxrl(np.array([1.0] * k + [0.0] * (g - k)))
    # The 1e-6 in the denominator is worth at most 1e-6 * G of the value.
    np.testing.assert_allclose(got[:k], (g - k) / k, rtol=1e-6 * g)
    np.testing.assert_allclose(got[k:], -1.0, rtol=1e-6 * g)


@pytest.mark.parametrize("fn", [grpo, maxrl])
@pytest.mark.parametrize("r", [[0.1] * 6, [0.0] * 4, [1.0] * 4, [0.3], [1 / 3] * 7])
def test_equal_rewards_have_exactly_no_advantage(fn, r: list[float]) -> None:
    assert fn(np.array(r)).tolist() == [0.0] * len(r)


@pytest.mark.parametrize("fn", [grpo, maxrl])
def test_empty_in_empty_out(fn) -> None:
    got = fn(np.array([], dtype=np.float64))
    assert got.shape == (0,)
    assert got.dtype == np.float64


def test_maxrl_gives_nothing_below_its_smallest_mean() -> None:
    assert maxrl(np.array([4e-6, 0.0, 0.0, 0.0])).tolist() == [0.0] * 4
    assert maxrl(np.array([4.1e-6, 0.0, 0.0, 0.0]))[0] > 1.0


@pytest.mark.parametrize("r", [[1.5, 0.0], [-0.1, 1.0], [2.0, 2.0], [float("nan"), 0.0]])
def test_maxrl_refuses_rewards_outside_its_range_and_says_what_to_do(r: list[float]) -> None:
    with pytest.raises(RunError, match='advantage_mode = "grpo"') as caught:
        maxrl(np.array(r))
    assert caught.value.exit_code == 1


@pytest.mark.parametrize("fn", [grpo, maxrl])
def test_the_rewards_are_left_alone(fn) -> None:
    r = np.array([0.0, 1.0, 0.5])
    fn(r)
    assert r.tolist() == [0.0, 1.0, 0.5]
