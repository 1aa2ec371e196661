"""Evaluation's numbers: the clustered interval and pass@k."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from retrain.training.evaluate import interval, noise_number, pass_at_k


def test_with_one_sample_per_task_it_is_the_wilson_interval():
    for correct, n in ((3, 20), (0, 12), (12, 12), (100, 256)):
        marks = [[i < correct] for i in range(n)]
        p, low, high = interval(marks)
        # The variance of the mean uses n - 1, so the interval is Wilson's with one draw fewer, except at the ends.
        size = n if correct in (0, n) else n - 1
        z = stats.norm.ppf(0.975)
        centre = (p + z * z / (2 * size)) / (1 + z * z / size)
        half = z * np.sqrt(p * (1 - p) / size + z * z / (4 * size * size)) / (1 + z * z / size)
        assert (low, high) == pytest.approx((max(0, centre - half), min(1, centre + half)), abs=1e-12)


def test_repeating_the_same_answers_does_not_narrow_it():
    rng = np.random.default_rng(0)
    single = [[bool(x)] for x in rng.random(80) < 0.4]
    repeated = [marks * 8 for marks in single]
    assert interval(repeated) == pytest.approx(interval(single))


def test_independent_samples_do_narrow_it():
    rng = np.random.default_rng(1)
    wide = interval([[bool(x)] for x in rng.random(80) < 0.4])
    narrow = interval([(rng.random(16) < 0.4).tolist() for _ in range(80)])
    assert narrow[2] - narrow[1] < 0.5 * (wide[2] - wide[1])


def test_coverage_with_clusters():
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(400):
        rates = rng.beta(1.2, 1.8, 60)
        _p, low, high = interval([(rng.random(4) < r).tolist() for r in rates])
        covered += low <= 1.2 / 3.0 <= high
    assert 0.92 <= covered / 400 <= 0.98


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 7).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_equals_counting_every_subset(case):
    n, c, k = case
    marks = [i < c for i in range(n)]
    subsets = list(itertools.combinations(marks, k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(any(s) for s in subsets) / len(subsets))


def test_a_task_keeps_its_noise_wherever_it_stands():
    assert noise_number("arithmetic/test/3") == noise_number("arithmetic/test/3")
    assert noise_number("arithmetic/test/3") != noise_number("arithmetic/test/4")
    assert 0 <= noise_number("x") < 2**56
