"""The fit of the universal scalability law: exact on exact data, equal to a plain solver, honest about what it knows."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from retrain.training.usl import SURE, fit, quantile, throughput

SIZES = (8, 16, 32, 64, 128, 256, 512)


def law(sigma: float, kappa: float, rate: float = 1.0, sizes: tuple[int, ...] = SIZES) -> list[tuple[float, float]]:
    return [(p, throughput(p, sigma=sigma, kappa=kappa, rate=rate)) for p in sizes]


def noisy(points: list[tuple[float, float]], seed: int, noise: float = 0.05) -> list[tuple[float, float]]:
    rng = np.random.default_rng(seed)
    return [(p, x * math.exp(noise * rng.normal())) for p, x in points]


@given(
    st.floats(1e-3, 0.9), st.floats(1e-6, 1e-2), st.floats(1e-2, 1e6),
    st.lists(st.integers(1, 600), min_size=4, max_size=9, unique=True),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_exact_data_give_the_parameters_back(sigma: float, kappa: float, rate: float, sizes: list[int]) -> None:
    found = fit(law(sigma, kappa, rate, tuple(sizes)))
    if found is None:
        # Only where sizes so close together say nothing about a single rollout.
        assert max(sizes) < 100 * min(sizes)
        return
    spread = max(sizes) / min(sizes)
    if spread > 4:
        assert found.sigma.low - 1e-6 <= sigma <= found.sigma.high + 1e-6
        assert found.kappa.low <= kappa * (1 + 1e-6)
        assert found.kappa.high >= kappa * (1 - 1e-6)
    for p in sizes:
        assert found.throughput(p) == pytest.approx(throughput(p, sigma=sigma, kappa=kappa, rate=rate), rel=1e-5)


def test_it_is_weighted_least_squares_as_numpy_solves_it() -> None:
    points = noisy(law(0.05, 1e-4, 300.0) * 3, 0)
    p = np.array([a for a, _ in points], dtype=float)
    y = p / np.array([b for _, b in points])
    a, b, c = np.linalg.lstsq(np.stack([p**0, p, p**2], 1) / y[:, None], np.ones_like(p), rcond=None)[0]
    found = fit(points)
    assert found is not None
    total = a + b + c
    assert found.sigma.value == pytest.approx(min(1, max(0, (b + c) / total)), rel=1e-6)
    assert found.kappa.value == pytest.approx(max(0, c / total), rel=1e-6)
    assert found.rate == pytest.approx(1 / total, rel=1e-6)
    assert found.p_star.value == pytest.approx(math.sqrt(a / c), rel=1e-6)
    assert found.p_star.value == pytest.approx(math.sqrt((1 - found.sigma.value) / found.kappa.value), rel=1e-6)


def test_weights_lessen_the_error_of_the_peak() -> None:
    truth = math.sqrt(0.9 / 2e-5)
    errors = {"weighted": [], "plain": []}
    for seed in range(150):
        points = noisy(law(0.1, 2e-5) * 3, seed)
        p = np.array([a for a, _ in points], dtype=float)
        y = p / np.array([b for _, b in points])
        found = fit(points)
        assert found is not None
        a, _, c = np.linalg.lstsq(np.stack([p**0, p, p**2], 1), y, rcond=None)[0]
        for name, (first, last) in {"weighted": found.coefficients[::2], "plain": (a, c)}.items():
            errors[name].append(abs(math.sqrt(first / last) / truth - 1) if first / last > 0 else math.inf)
    assert np.median(errors["weighted"]) < 0.85 * np.median(errors["plain"])


@pytest.mark.parametrize("points", [[], law(0.1, 0.0, sizes=(8, 16)) * 9])
def test_without_three_concurrencies_there_is_no_fit(points: list[tuple[float, float]]) -> None:
    assert fit(points) is None


def test_coefficients_that_are_no_law_are_no_fit() -> None:
    # y falls towards p = 1 so steeply that it would be negative there.
    assert fit([(100, 100.0 / 1.0), (101, 101.0 / 4.0), (102, 102.0 / 7.0), (103, 103 / 10.0)]) is None


def test_three_points_have_no_noise_and_intervals_without_end() -> None:
    found = fit(law(0.1, 1e-3, sizes=(1, 10, 100)))
    assert found is not None
    assert found.kappa.value == pytest.approx(1e-3, rel=1e-6)
    assert math.isnan(found.noise)
    assert (found.kappa.low, found.kappa.high) == (0, math.inf)
    assert found.p_star.value == math.inf
    assert not found.peaked


def test_a_peak_that_is_not_surely_there_keeps_its_interval() -> None:
    found = fit([(1, 5.0), (2, 4.0), (4, 2.0), (8, 1.0)])
    assert found is not None
    assert not found.peaked
    assert found.p_star.value == math.inf
    assert found.p_star.high < 2


def test_without_kappa_the_peak_is_infinitely_far() -> None:
    found = fit(law(0.05, 0.0))
    assert found is not None
    assert found.p_star.value == found.p_star.high == math.inf
    assert found.floor > 512


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(3)
    held = np.zeros(3)
    for trial in range(300):
        sigma = math.exp(rng.uniform(math.log(1e-3), math.log(0.3)))
        kappa = (1 - sigma) / math.exp(rng.uniform(math.log(20), math.log(400))) ** 2
        found = fit(noisy(law(sigma, kappa) * 3, trial), level=0.9)
        assert found is not None
        truths = (sigma, kappa, math.sqrt((1 - sigma) / kappa))
        held += [r.low <= t <= r.high for r, t in zip((found.sigma, found.kappa, found.p_star), truths, strict=True)]
    # Two sides of a binomial at 300: 0.9 +- 3 * 0.0173.
    assert (held / 300 >= 0.848).all()
    assert (held / 300 <= 0.952).all()


@pytest.mark.parametrize("freedom", [1, 2, 5, 40])
@pytest.mark.parametrize("level", [0.5, 0.95, SURE])
def test_the_quantile_is_students(freedom: int, level: float) -> None:
    assert quantile(level, freedom) == pytest.approx(stats.t.ppf(0.5 + level / 2, freedom), rel=1e-9)
