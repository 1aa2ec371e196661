"""What stands beside a verdict and never decides it: sign flips, interquartile means, and signs that Welch's test may be off.

Sign flips are exact for differences that are symmetric about 0 (Fisher 1935). Interquartile mean and its stratified
bootstrap follow Agarwal et al., "Deep RL at the edge of the statistical precipice" (2108.13264) and agree with rliable.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from scipy import special  # pyright: ignore[reportMissingTypeStubs]

from retrain.campaign.procedure import crossing

Values = npt.NDArray[np.float64]

EXACT_PAIRS = 16
"""Up to so many pairs every one of the 2^n sign patterns is tried; beyond, ``DRAWS`` random ones."""
DRAWS = 100_000
BOOTSTRAPS = 20_000
LEAST_SKEW = 0.5
"""Less pooled skewness than this does not count, however many runs show it."""
LEAST_RATIO = 1.5
"""A smaller ratio of the largest to the smallest standard deviation does not count, however many runs show it."""


def sign_flip(gaps: Values, draws: int = DRAWS) -> tuple[float, float]:
    """Two-sided p of the mean of ``gaps`` [n] (paired differences) under random signs, and the least p that they allow.

    Exact up to ``EXACT_PAIRS`` pairs, where the least p is 2 / 2^k with k differences other than 0; beyond, the share of
    ``draws`` patterns (from a fixed seed) with the seen one counted among them, and the least p is 1 / (draws + 1) or
    2 / 2^k, whichever is larger. NaN for no pairs.
    """
    n = len(gaps)
    if n == 0:
        return math.nan, math.nan
    least = min(1.0, 2.0 ** (1 - int(np.count_nonzero(gaps))))
    # Sums of the same terms in another order differ by rounding; a tie must count as one.
    seen = abs(float(gaps.sum())) - 1e-12 * float(np.abs(gaps).sum())
    if n <= EXACT_PAIRS:
        codes = np.arange(2**n, dtype=np.int64)[:, None] >> np.arange(n, dtype=np.int64)
        signs = 1.0 - 2.0 * (codes & 1)
        return float((np.abs(signs @ gaps) >= seen).mean()), least
    generator = np.random.default_rng(0)
    hits = 0
    for start in range(0, draws, 10_000):
        signs = generator.integers(0, 2, (min(10_000, draws - start), n)) * 2.0 - 1.0
        hits += int((np.abs(signs @ gaps) >= seen).sum())
    return (hits + 1) / (draws + 1), max(least, 1 / (draws + 1))


def iqm(values: Values) -> float:
    """Interquartile mean of ``values`` [n]: a quarter of the runs, rounded down, is left out at each end."""
    return float(_iqm_rows(values[None])[0])


def _iqm_rows(values: Values) -> Values:
    """Interquartile mean over the last axis."""
    n = values.shape[-1]
    cut = int(0.25 * n)
    return np.sort(values, axis=-1)[..., cut : n - cut].mean(axis=-1)


def iqm_difference(
    a: Values, b: Values, alpha: float, *, draws: int = BOOTSTRAPS, seed: int = 0
) -> tuple[float, float, float]:
    """IQM of ``a`` [n] minus that of ``b`` [m], with the ends of a percentile bootstrap interval of 1 - ``alpha``.

    Stratified by arm: runs are drawn with replacement inside each. The interval is about another quantity than the test:
    the mean of the middle half, on which a collapsed run has no weight.
    """
    generator = np.random.default_rng(seed)
    drawn = [_iqm_rows(arm[generator.integers(0, len(arm), (draws, len(arm)))]) for arm in (a, b)]
    low, high = np.quantile(drawn[0] - drawn[1], [alpha / 2, 1 - alpha / 2])
    return iqm(a) - iqm(b), float(low), float(high)


def pooled_skewness(arms: Sequence[Values]) -> Values:
    """Skewness [...] of all arms' runs [..., n], each arm centred and scaled by itself, so that means and deviations
    that differ between arms add nothing. Runs of a constant arm are left out; 0 where nothing is left."""
    total, count = np.zeros(arms[0].shape[:-1]), np.zeros(arms[0].shape[:-1])
    for arm in arms:
        gaps = arm - arm.mean(axis=-1, keepdims=True)
        scale = np.sqrt((gaps**2).mean(axis=-1, keepdims=True))
        varies = scale > 1e-12 * np.abs(arm).max(axis=-1, keepdims=True)
        total += (np.divide(gaps, scale, out=np.zeros_like(gaps), where=varies) ** 3).sum(axis=-1)
        count += np.where(varies[..., 0], arm.shape[-1], 0)
    return np.divide(total, count, out=np.zeros_like(total), where=count > 0)


def skewed_and_unequal(arms: Sequence[Values]) -> npt.NDArray[np.bool_]:
    """Whether all ``arms`` [..., n] of an analysis together show what breaks Welch's test: skew, and unequal variances.

    The pooled skew counts beyond two standard errors of its own under normality, the ratio of the largest to the smallest
    variance beyond the 95 % point that it has under normality (Hartley 1950), both only where they matter at all. All arms
    are judged at once, because the comparison that misleads is the one that shows least: an arm with rare bad runs looks
    better and steadier than it is exactly when it drew none. False with fewer than three runs an arm or two arms. Hit and
    false-alarm rates are in docs/statistics.md.
    """
    runs = np.array([arm.shape[-1] for arm in arms], np.float64)
    if len(arms) < 2 or runs.min() < 3:
        return np.zeros(arms[0].shape[:-1], np.bool_)
    # Variance of one normal sample's skewness is 6 (n - 2) / ((n + 1) (n + 3)); arms weigh as they have runs.
    variances = 6 * (runs - 2) / ((runs + 1) * (runs + 3))
    skew_limit = max(LEAST_SKEW, 2 * math.sqrt(float((runs**2 * variances).sum())) / float(runs.sum()))
    ratio_limit = max(LEAST_RATIO**2, largest_ratio(len(arms), int(runs.min()) - 1))
    spread = np.stack([arm.var(axis=-1, ddof=1) for arm in arms], axis=-1)
    size = np.stack([np.abs(arm).max(axis=-1) for arm in arms], axis=-1).max(axis=-1)
    largest, smallest = spread.max(axis=-1), spread.min(axis=-1)
    unequal = (largest > ratio_limit * smallest) & (largest > (1e-12 * size) ** 2)
    return np.asarray((np.abs(pooled_skewness(arms)) > skew_limit) & unequal)


@functools.cache
def largest_ratio(arms: int, df: int, level: float = 0.05) -> float:
    """The ratio of the largest to the smallest of ``arms`` (at least 2) variances with ``df`` degrees of freedom each that
    normal runs of one variance exceed with probability ``level``."""
    shares = (np.arange(4000, dtype=np.float64) + 0.5) / 4000
    smallest = np.asarray(cast("Any", special).chdtri(df, 1 - shares), np.float64)

    def covered(logarithm: float) -> float:
        inside = (
            np.asarray(cast("Any", special).chdtr(df, smallest * math.exp(logarithm)), np.float64) - shares
        )
        return float((arms * np.maximum(inside, 0.0) ** (arms - 1)).mean()) - (1 - level)

    return math.exp(crossing(covered, 0.0, 40.0))
