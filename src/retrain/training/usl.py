"""The universal scalability law (Gunther): throughput as a function of concurrency, fitted with its uncertainty.

X(p) = rate * p / (1 + sigma (p - 1) + kappa p (p - 1)): sigma is the share of work that waits its turn, kappa the cost of
keeping pairs in step, which makes throughput fall beyond p* = sqrt((1 - sigma) / kappa). y = p / X is quadratic in p,
A + B p + C p^2, so the fit is one weighted least-squares problem and every quantity a ratio of its coefficients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

LEAST = 3
"""Distinct concurrencies below which nothing is fitted: the law has three parameters."""
SURE = 0.9999
"""Two-sided confidence at which kappa counts as above 0; below it p* is infinite. A controller asks in every step."""
_QUIET = 1e-6
"""Relative noise below which no measurement is believed to be: it keeps rounding from looking significant."""


@dataclass(frozen=True, slots=True)
class Range:
    """An estimate with its confidence interval; ends may be infinite."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Fit:
    """A fitted law. ``sigma`` in [0, 1], ``kappa`` >= 0, ``p_star`` > 0 and infinite where there is no telling: kappa might be
    0 at ``SURE``, or throughput falls from the first size on and A is not above 0. Its interval, at the level that was asked
    for, is kept, and may then end below the value. ``rate`` = X(1) in the unit of the throughputs; ``noise`` is the relative
    standard deviation of one measurement, ``points`` how many there were. ``peaked``: kappa is surely above 0, and ``floor`` is
    what p* is surely above (``SURE``, where the intervals are at the level that was asked for)."""

    sigma: Range
    kappa: Range
    p_star: Range
    rate: float
    noise: float
    points: int
    peaked: bool
    floor: float
    coefficients: tuple[float, float, float]

    def throughput(self, p: float) -> float:
        """X(p) of the fitted curve; NaN where the polynomial is not positive."""
        a, b, c = self.coefficients
        time = a + b * p + c * p * p
        return p / time if time > 0 else math.nan


def throughput(p: float, *, sigma: float, kappa: float, rate: float = 1.0) -> float:
    """The law itself."""
    return rate * p / (1 + sigma * (p - 1) + kappa * p * (p - 1))


def fit(points: Sequence[tuple[float, float]], *, level: float = 0.95) -> Fit | None:
    """Fit (concurrency, throughput) pairs, all positive, each measured with the same relative noise.

    None with fewer than three distinct concurrencies, and where the coefficients are no law (their sum, 1 / rate, is not
    positive). Intervals are Fieller's, for ratios of two correlated normal estimates, at ``level``: unlike the delta
    method's they may be infinite, as they must where the denominator is not told from 0. With three points there is
    nothing to tell noise from, and they are as wide as the parameters' ranges.
    """
    p = np.array([c for c, _ in points], dtype=np.float64)
    if len(set(p.tolist())) < LEAST:
        return None
    y = p / np.array([x for _, x in points], dtype=np.float64)
    # Powers of p relative to the largest: p^2 alone would lose half of the digits.
    scale = float(p.max())
    u = p / scale
    design = np.stack([np.ones_like(u), u, u * u], axis=1) / y[:, None]
    q, r = np.linalg.qr(design)
    if abs(np.diag(r)).min() < 1e-12 * abs(np.diag(r)).max():
        return None
    inverse = np.linalg.inv(r)
    scaled = inverse @ (q.T @ np.ones_like(u))
    freedom = len(p) - LEAST
    left = float(((design @ scaled - 1) ** 2).sum())
    noise = max(math.sqrt(left / freedom), _QUIET) if freedom else math.inf
    units = np.array([1.0, 1 / scale, 1 / scale**2])
    beta = scaled * units
    a, b, c = (float(v) for v in beta)
    total = a + b + c
    if not total > 0 or not np.isfinite(beta).all():
        return None
    shape = (inverse @ inverse.T) * np.outer(units, units)
    ones = np.ones(3)
    first, last = np.array([1.0, 0.0, 0.0]), np.array([0.0, 0.0, 1.0])
    q2 = quantile(level, freedom) ** 2 * noise**2 if freedom else math.inf
    waits = _ratio(beta, shape, (b + c) / total, ones - first, ones, q2)
    costs = _ratio(beta, shape, c / total, last, ones, q2)
    sure = freedom > 0 and c > quantile(SURE, freedom) * noise * math.sqrt(float(shape[2, 2]))
    low, high = _peak(beta, shape, first, last, q2)
    # A below 0 is noise too: the law's A is (1 - sigma) / rate.
    value = math.sqrt(a / c) if sure and a > 0 else math.inf
    return Fit(
        sigma=_clipped(waits, 0.0, 1.0),
        kappa=_clipped(costs, 0.0, math.inf),
        p_star=Range(value, low, high),
        rate=1 / total,
        noise=noise if freedom else math.nan,
        points=len(p),
        peaked=sure,
        floor=_peak(beta, shape, first, last, quantile(SURE, freedom) ** 2 * noise**2 if freedom else math.inf)[0],
        coefficients=(a, b, c),
    )


def quantile(level: float, freedom: int) -> float:
    """Student's t that a share ``level`` of the distribution lies within, both sides counted."""
    from scipy.special import stdtrit  # pyright: ignore[reportMissingTypeStubs, reportUnknownVariableType]

    return float(stdtrit(freedom, 0.5 + level / 2))  # pyright: ignore[reportUnknownArgumentType]


_Vector = npt.NDArray[np.float64]


def _roots(
    beta: _Vector, shape: _Vector, top: _Vector, bottom: _Vector, q2: float
) -> tuple[float, float, float] | None:
    """Leading coefficient and sorted roots of Fieller's quadratic for (top . beta) / (bottom . beta): the ratios that are
    not refuted lie between the roots where it is positive and outside them where it is negative. None where no ratio is
    refuted."""
    if not math.isfinite(q2):
        return None
    n, d = float(top @ beta), float(bottom @ beta)
    nn, nd, dd = (float(v) for v in (top @ shape @ top, top @ shape @ bottom, bottom @ shape @ bottom))
    lead, middle, last = d * d - q2 * dd, n * d - q2 * nd, n * n - q2 * nn
    inside = middle * middle - lead * last
    if lead == 0 or inside < 0:
        return None
    ends = sorted((middle + sign * math.sqrt(inside)) / lead for sign in (-1.0, 1.0))
    return lead, ends[0], ends[1]


def _ratio(
    beta: _Vector, shape: _Vector, value: float, top: _Vector, bottom: _Vector, q2: float
) -> Range:
    found = _roots(beta, shape, top, bottom, q2)
    if found is None or found[0] <= 0:
        return Range(value, -math.inf, math.inf)
    return Range(value, found[1], found[2])


def _peak(
    beta: _Vector, shape: _Vector, first: _Vector, last: _Vector, q2: float
) -> tuple[float, float]:
    """Ends of p* = sqrt(A / C), where C <= 0 stands for infinity."""
    found = _roots(beta, shape, first, last, q2)
    if found is None:
        return 0.0, math.inf
    lead, low, high = found
    if lead > 0:
        return math.sqrt(max(0.0, low)), math.sqrt(max(0.0, high))
    # Outside the roots: beyond the upper one, through infinity, into the negative ratios of a kappa below 0.
    return math.sqrt(max(0.0, high)), math.inf


def _clipped(found: Range, least: float, most: float) -> Range:
    return Range(*(min(most, max(least, v)) for v in (found.value, found.low, found.high)))
