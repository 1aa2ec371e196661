"""Episode advantages against naive float64 loops, on known cases of the formulas, and as properties."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrain.algorithms.advantages import grpo, grpo_std, maxrl, reinforce_pp, rloo
from retrain.errors import RunError

rewards = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20)
shares = st.lists(st.floats(0, 1), min_size=1, max_size=20)
steps = st.lists(st.lists(st.floats(-100, 100), max_size=6), max_size=6)
PER_GROUP = [grpo, maxrl, grpo_std, rloo]


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


@pytest.mark.parametrize("fn", PER_GROUP)
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


@pytest.mark.parametrize("fn", PER_GROUP)
@pytest.mark.parametrize("r", [[0.1] * 6, [0.0] * 4, [1.0] * 4, [0.3], [1 / 3] * 7])
def test_equal_rewards_have_exactly_no_advantage(fn, r: list[float]) -> None:
    assert fn(np.array(r)).tolist() == [0.0] * len(r)


@pytest.mark.parametrize("fn", PER_GROUP)
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


@pytest.mark.parametrize("fn", PER_GROUP)
def test_the_rewards_are_left_alone(fn) -> None:
    r = np.array([0.0, 1.0, 0.5])
    fn(r)
    assert r.tolist() == [0.0, 1.0, 0.5]


# With a standard deviation, with the others as baseline, over a whole step.


def naive_grpo_std(r: list[float]) -> list[float]:
    if max(r) == min(r):
        return [0.0 for _ in r]
    mean = math.fsum(r) / len(r)
    std = math.sqrt(math.fsum((x - mean) ** 2 for x in r) / (len(r) - 1))
    return [(x - mean) / (std + 1e-6) for x in r]


def naive_rloo(r: list[float]) -> list[float]:
    if max(r) == min(r):
        return [0.0 for _ in r]
    return [x - math.fsum(r[:i] + r[i + 1 :]) / (len(r) - 1) for i, x in enumerate(r)]


def naive_reinforce_pp(step: list[list[float]]) -> list[list[float]]:
    centred = []
    for r in step:
        mean = math.fsum(r) / len(r) if r else 0.0
        centred.append([0.0 if max(r) == min(r) else x - mean for x in r])
    pooled = [d for group in centred for d in group]
    if len(pooled) < 2:
        return centred
    middle = math.fsum(pooled) / len(pooled)
    std = math.sqrt(math.fsum((d - middle) ** 2 for d in pooled) / (len(pooled) - 1))
    return [[d / (std + 1e-6) for d in group] for group in centred]


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=20))
def test_grpo_std_equals_its_twin(r: list[float]) -> None:
    np.testing.assert_allclose(grpo_std(np.array(r)), naive_grpo_std(r), rtol=1e-6, atol=1e-6)


@given(shares.filter(lambda r: np.std(r) > 1e-3))
def test_grpo_std_gives_every_group_the_same_spread(r: list[float]) -> None:
    assert np.std(grpo_std(np.array(r)), ddof=1) == pytest.approx(1.0, abs=2e-3)


def test_grpo_std_of_one_success_among_four() -> None:
    # mean 1/4, unbiased standard deviation 1/2
    np.testing.assert_allclose(grpo_std(np.array([1.0, 0, 0, 0])), [1.5, -0.5, -0.5, -0.5], rtol=1e-5)


@given(rewards)
def test_rloo_equals_its_twin(r: list[float]) -> None:
    scale = max(abs(x) for x in r) + 1.0
    np.testing.assert_allclose(rloo(np.array(r)), naive_rloo(r), atol=1e-11 * scale, rtol=0)


def test_rloo_of_one_success_among_four() -> None:
    np.testing.assert_allclose(rloo(np.array([1.0, 0, 0, 0])), [1.0, -1 / 3, -1 / 3, -1 / 3], rtol=1e-15)


@given(steps)
def test_reinforce_pp_equals_its_twin(step: list[list[float]]) -> None:
    got = reinforce_pp([np.array(r, dtype=np.float64) for r in step])
    for a, want, r in zip(got, naive_reinforce_pp(step), step, strict=True):
        np.testing.assert_allclose(a, want, rtol=1e-6, atol=1e-6)
        if len(set(r)) < 2:
            assert a.tolist() == [0.0] * len(r)


def test_reinforce_pp_divides_by_the_spread_of_the_step() -> None:
    # d = 1/2, -1/2, 0, 0: two groups, the second without a signal; the variance is 1/2 over n - 1 = 3.
    got = reinforce_pp([np.array([1.0, 0.0]), np.array([0.3, 0.3])])
    np.testing.assert_allclose(got[0], [0.5 / math.sqrt(1 / 6), -0.5 / math.sqrt(1 / 6)], rtol=1e-5)
    assert got[1].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("step", [[], [[]], [[0.5]], [[0.1] * 6, [], [1.0] * 3]])
def test_reinforce_pp_of_a_step_without_signal_is_exactly_nothing(step: list[list[float]]) -> None:
    assert [a.tolist() for a in reinforce_pp([np.array(r) for r in step])] == [[0.0] * len(r) for r in step]
