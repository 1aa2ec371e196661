"""Where the variance between runs comes from, evaluation or training, and which of the two to buy more of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from scipy import special  # pyright: ignore[reportMissingTypeStubs]

from retrain.campaign.procedure import Values, moments

_LITTLE = 0.3
"""Below this share even a perfect evaluation would shrink what is visible by less than a sixth."""


@dataclass(frozen=True, slots=True)
class VarianceSplit:
    """Variance of the outcome over seeds, within conditions and pooled, in squared units of the outcome.

    ``low`` and ``high`` are its 95 % interval under normality (chi-square). ``evaluation`` is an upper bound of the part
    that finitely many held-out tasks and samples cause, ``seed`` what is left of ``total`` (at least 0), ``share`` is
    ``evaluation`` / ``total``, at most 1.
    """

    total: float
    low: float
    high: float
    evaluation: float
    seed: float
    share: float
    advice: str


def split_variance(arms: Sequence[Values], evaluation: float | None) -> VarianceSplit | None:
    """The variance of ``arms`` (each the outcomes [n] of a condition's runs, n >= 2) split with ``evaluation``, the mean
    sampling variance of one outcome; None where that is unknown or nothing varies.

    The sampling variance that comes from an evaluation's own interval is an upper bound: differences in difficulty between
    tasks count in it, though all runs are evaluated on the same tasks and share them.
    """
    df = sum(len(arm) - 1 for arm in arms)
    total = math.fsum((len(arm) - 1) * float(moments(arm)[1]) for arm in arms) / df
    if evaluation is None or total == 0:
        return None
    share = min(1.0, evaluation / total)
    low = df * total / float(cast("Any", special).chdtri(df, 0.025))
    high = df * total / float(cast("Any", special).chdtri(df, 0.975))
    return VarianceSplit(
        total, low, high, evaluation, max(0.0, total - evaluation), share, _advice(total, evaluation, share)
    )


def _advice(total: float, evaluation: float, share: float) -> str:
    bound = f"{100 * share:.0f} %"
    found = (
        f"Over seeds the outcome's standard deviation is {100 * math.sqrt(total):.2g} points; evaluation accounts for at "
        f"most {bound} of its variance. "
    )
    if share < _LITTLE:
        perfect = f"{100 * (1 - math.sqrt(1 - share)):.0f} %"
        return found + (
            f"Buy seeds: even a perfect evaluation would shrink the visible difference by at most {perfect}, twice the "
            "seeds shrink it by 29 %."
        )
    halved = f"{100 * (1 - math.sqrt(1 - share / 2)):.0f} %"
    return found + (
        f"Buy evaluation first, it costs no training: twice the held-out tasks shrink the visible difference by up to {halved}, "
        "twice the seeds by 29 %. It is a bound, because tasks that differ in difficulty count in it though all runs share them."
    )
