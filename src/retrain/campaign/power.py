"""What a design can show before any run: the effect it sees, the odds of showing equivalence, the least p of its exact test."""

from __future__ import annotations

import math
from typing import Any, cast

import numpy as np
from scipy import special  # pyright: ignore[reportMissingTypeStubs]

from retrain.campaign.procedure import Values, crossing, t_critical

_TAILS: Values = (np.arange(4000, dtype=np.float64) + 0.5) / 4000
"""Midpoints of 4,000 equal shares of probability. A mean over a variable's quantiles at them is its expectation; so the
noncentral t is had from the normal distribution, also far out, where scipy's own returns NaN."""


def shift_seen(df: float, alpha: float, power: float = 0.8) -> float:
    """The least noncentrality (true difference in standard errors) at which a two-sided t test of ``alpha`` with ``df``
    degrees of freedom rejects with probability ``power``. Infinite without degrees of freedom."""
    if not df > 0:
        return math.inf
    thresholds = float(t_critical(alpha / 2, df)) * _relative_errors(df)

    def lacking(shift: float) -> float:
        return float((_below(shift - thresholds) + _below(-shift - thresholds)).mean()) - power

    most = 10.0
    while lacking(most) < 0:
        most *= 2
        if most > 1e12:
            return math.inf
    return crossing(lacking, 0.0, most)


def _relative_errors(df: float) -> Values:
    """Quantiles of an estimated standard error over the true one: the root of a chi-square over its ``df``."""
    return np.sqrt(np.asarray(cast("Any", special).chdtri(df, _TAILS), np.float64) / df)


def _below(z: Values) -> Values:
    return np.asarray(cast("Any", special).ndtr(z), np.float64)


def detectable(deviation: float, n: int, alpha: float, power: float = 0.8, *, paired: bool = False) -> float:
    """The smallest true difference of two arms that a two-sided t test at ``alpha`` sees with ``power``.

    ``n`` runs in each arm, each arm with standard deviation ``deviation`` over seeds; with ``paired``, ``deviation`` is
    that of the differences between two runs of one seed. In the unit of ``deviation``; infinite for fewer than 2 runs.
    For a campaign, ``alpha`` is that of one look divided by the number of comparisons: Holm's first step, which is where
    a single true difference among null ones is found.
    """
    if n < 2:
        return math.inf
    if deviation == 0:
        return 0.0
    df, error = (n - 1, deviation / math.sqrt(n)) if paired else (2 * n - 2, deviation * math.sqrt(2 / n))
    return shift_seen(df, alpha, power) * error


def visible(error: float, df: float, alpha: float, power: float = 0.8) -> float:
    """As ``detectable``, from the standard error and the (Welch-Satterthwaite) degrees of freedom that were found."""
    return 0.0 if error == 0 else shift_seen(df, alpha, power) * error


def seeds_for(
    effect: float,
    deviation: float,
    alpha: float,
    power: float = 0.8,
    *,
    paired: bool = False,
    most: int = 100_000,
) -> int | None:
    """The fewest runs an arm with which ``detectable`` is at most ``effect``; None when ``most`` are too few."""
    low, high = 1, 2
    while detectable(deviation, high, alpha, power, paired=paired) > effect:
        low, high = high, 2 * high
        if low > most:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        if detectable(deviation, middle, alpha, power, paired=paired) > effect:
            low = middle
        else:
            high = middle
    return high


def attainable(n: int, paired: bool) -> float:
    """The smallest two-sided p that an exact permutation test of ``n`` runs an arm can give, whatever the data.

    ``paired``: signs of ``n`` differences are flipped, 2 / 2^n. Otherwise 2n runs are dealt into two arms, 2 / C(2n, n).
    A design whose level lies below can never reject by that test: 4 seeds with sign flips stop at 0.125.
    """
    if n < 1:
        return 1.0
    return min(1.0, 2.0 ** (1 - n) if paired else 2.0 / math.comb(2 * n, n))


def equivalence_power(
    deviation: float, n: int, margin: float, alpha: float, *, paired: bool = False
) -> float:
    """Probability that two one-sided tests at ``alpha`` each show |difference| < ``margin`` when the difference is 0.

    Arguments as in ``detectable``. Given the estimated error s, the tests succeed when the estimated difference lies
    within margin - t s of 0; the mean of that probability over the chi distribution of s is exact up to its 4,000
    quantiles (about 1e-4).
    """
    if n < 2:
        return 0.0
    if deviation == 0:
        return 1.0
    df, error = (n - 1, deviation / math.sqrt(n)) if paired else (2 * n - 2, deviation * math.sqrt(2 / n))
    room = margin / error - float(t_critical(alpha, df)) * _relative_errors(df)
    return float((2 * _below(np.maximum(room, 0.0)) - 1).mean())


def shortfalls(
    conditions: int,
    n: int,
    *,
    alpha: float,
    margin: float,
    paired: bool = False,
    deviation: float | None = None,
) -> tuple[str, ...]:
    """What a design cannot show, one sentence each; empty when nothing stands in its way.

    ``conditions`` with ``n`` runs each; ``alpha`` of one look; ``margin`` is the smallest effect of interest, in [0, 1].
    ``deviation`` over seeds (of the differences with ``paired``), None where unknown: then only what holds for any.
    """
    if conditions < 2:
        return ("One condition has nothing to be compared with: no verdict is possible.",)
    if n < 2:
        return (f"{n} seed{'s' * (n != 1)} an arm: no variance can be estimated, so no verdict is possible.",)
    found: list[str] = []
    level = alpha / (conditions - 1)
    least = attainable(n, paired=True)
    if least > level:
        enough = math.ceil(1 - math.log2(level))
        found.append(
            f"{n} seeds: the exact sign-flip test cannot give a p below {least:.3g}, and with "
            f"{conditions - 1} comparison{'s' * (conditions > 2)} a difference needs {level:.3g}. It can never support one; "
            f"{enough} seeds could. The t test decides."
        )
    if deviation is None:
        return tuple(found)
    seen = detectable(deviation, n, level, paired=paired)
    if seen > 1:
        found.append(
            f"{n} seeds at a deviation of {100 * deviation:.3g} points see no difference below 100 points with 80 % power."
        )
    chance = equivalence_power(deviation, n, margin, alpha, paired=paired)
    if chance < 0.8:
        rarely = "almost never" if chance < 0.01 else f"in {100 * chance:.0f} % of campaigns"
        found.append(
            f"Equivalence within {100 * margin:.3g} points would be shown {rarely} even if there were no difference "
            f"at all ({n} seeds, deviation {100 * deviation:.3g} points)."
        )
    return tuple(found)
