"""Steps until a run reaches a threshold, with runs that never did: censored, never dropped; intervals and no verdict.

Kaplan and Meier (1958); the restricted mean, which exists whatever was censored, as in Royston and Parmar (2013).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from retrain.campaign.procedure import t_critical


@dataclass(frozen=True, slots=True)
class Reach:
    """One condition's runs. ``reached`` of ``n`` crossed the threshold by ``horizon`` steps.

    ``mean`` is the restricted mean: steps to the threshold, a run that needs more than ``horizon`` counting ``horizon``;
    ``low`` and ``high`` its t interval, which without censoring before the horizon is that of the plain mean, cut to
    0..``horizon``: no true mean lies beyond. ``median`` is
    Kaplan and Meier's, None where fewer than half reached. ``broke_off`` runs were lost before the horizon without it.
    NaN where there are too few runs.
    """

    n: int
    reached: int
    broke_off: int
    horizon: int
    median: int | None
    mean: float
    error: float
    low: float
    high: float


def reach(reached: Sequence[int | None], ended: Sequence[int], horizon: int, alpha: float = 0.05) -> Reach:
    """Estimates from one condition's runs.

    ``reached[i]`` is the number of steps at which run i first stood at the threshold (None: never), ``ended[i]`` the number
    of steps that it was watched for, ``horizon`` the steps that every run was meant to have. Runs that broke off count as
    lost from sight, which is fair only when they did not break off because they were learning badly: ``broke_off`` counts
    them, so that a reader can judge. ValueError for sequences of different lengths.
    """
    pairs = [
        (min(horizon, end), False) if at is None or at > horizon else (at, True)
        for at, end in zip(reached, ended, strict=True)
    ]
    n = len(pairs)
    broke_off = sum(not event and at < horizon for at, event in pairs)
    survival, steps = 1.0, [(0, 1.0)]
    hazards: list[tuple[int, int, int]] = []
    for at in sorted({at for at, event in pairs if event}):
        at_risk = sum(other >= at for other, _ in pairs)
        events = sum(event and other == at for other, event in pairs)
        survival *= 1 - events / at_risk
        steps.append((at, survival))
        hazards.append((at, at_risk, events))
    median = next((at for at, left in steps if left <= 0.5 + 1e-12), None)
    mean = _area(steps, 0, horizon) if n else math.nan
    square = 0.0
    for at, at_risk, events in hazards:
        if at_risk > events:
            square += _area(steps, at, horizon) ** 2 * events / (at_risk * (at_risk - events))
    # Greenwood's sum divides by n where an unbiased variance divides by n - 1.
    error = math.sqrt(square * n / (n - 1)) if n >= 2 else math.nan
    half = float(t_critical(alpha / 2, float(n - 1))) * error if n >= 2 else math.nan
    low, high = (min(max(end, 0.0), float(horizon)) for end in (mean - half, mean + half))
    return Reach(n, sum(event for _, event in pairs), broke_off, horizon, median, mean, error, low, high)


def reach_difference(a: Reach, b: Reach, alpha: float = 0.05) -> tuple[float, float, float]:
    """Restricted mean of ``a`` minus that of ``b``, with the ends of its interval (degrees of freedom as Welch's)."""
    square = a.error**2 + b.error**2
    difference = a.mean - b.mean
    if math.isnan(square) or square == 0:
        return difference, difference + 0 * square, difference + 0 * square
    df = square**2 / (a.error**4 / (a.n - 1) + b.error**4 / (b.n - 1))
    half = float(t_critical(alpha / 2, df)) * math.sqrt(square)
    return difference, difference - half, difference + half


def _area(steps: Sequence[tuple[int, float]], start: int, end: int) -> float:
    """Area under the survival steps from ``start`` to ``end``."""
    total = 0.0
    for (at, left), (until, _) in zip(steps, [*steps[1:], (end, 0.0)], strict=True):
        total += left * max(0, min(until, end) - max(at, start))
    return total
