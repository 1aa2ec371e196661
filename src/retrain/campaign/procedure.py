"""The declared procedure on arrays: t tests against a baseline, Holm, two one-sided tests, and the verdict that follows.

Everything works over leading axes, so that one analysis and ten thousand simulated ones run the same code
(benches/null_campaigns.py). Welch (1947), Holm (1979), Schuirmann (1987).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, cast

import numpy as np
import numpy.typing as npt
from scipy import special  # pyright: ignore[reportMissingTypeStubs]

Values = npt.NDArray[np.float64]
Verdict: TypeAlias = Literal[
    "improvement", "degradation", "equivalent", "not enough evidence", "identical", "constant", "incomplete"
]
VERDICTS: tuple[Verdict, ...] = (
    "improvement",
    "degradation",
    "equivalent",
    "not enough evidence",
    "identical",
    "constant",
)
"""What a code of ``Decided.verdict`` stands for."""

_ROUNDING = 1e-12
"""Values that differ by less than this share of the largest are equal: sums in floating point do not tell them apart."""


@dataclass(frozen=True, slots=True)
class Tested:
    """Differences [...] with their standard errors, degrees of freedom, two-sided p values and t intervals.

    Where nothing varies ``error`` is 0, ``df`` and ``p`` are NaN and the interval is the difference itself.
    """

    difference: Values
    error: Values
    df: Values
    p: Values
    low: Values
    high: Values


@dataclass(frozen=True, slots=True)
class Decided:
    """Every comparison [..., conditions - 1] of one look: the tests, what they come to, and codes into ``VERDICTS``."""

    tested: Tested
    p_holm: Values
    p_equivalence: Values
    verdict: npt.NDArray[np.int64]

    @property
    def improvement(self) -> npt.NDArray[np.bool_]:
        """Where the verdict is an improvement."""
        return self.verdict == VERDICTS.index("improvement")


def t_tail(t: Values, df: Values | float) -> Values:
    """P(T > t) of Student's t."""
    return np.asarray(cast("Any", special).stdtr(df, -t), np.float64)


def t_critical(tail: float, df: Values | float) -> Values:
    """The t that is exceeded with probability ``tail``."""
    return -np.asarray(cast("Any", special).stdtrit(df, tail), np.float64)


def crossing(rising: Callable[[float], float], low: float, high: float) -> float:
    """Where ``rising`` becomes positive between ``low`` and ``high``, to 1e-15 of their distance.

    By halving; scipy.optimize would need fewer calls, and half a second to be imported.
    """
    for _ in range(50):
        middle = (low + high) / 2
        if rising(middle) > 0:
            high = middle
        else:
            low = middle
    return (low + high) / 2


def moments(values: Values) -> tuple[Values, Values]:
    """Mean and variance (n - 1) over the last axis; exactly (value, 0) where all are equal up to rounding."""
    largest, least = values.max(axis=-1), values.min(axis=-1)
    equal = largest - least <= _ROUNDING * np.abs(values).max(axis=-1)
    mean = np.where(equal, values[..., 0], values.mean(axis=-1))
    variance = np.where(equal, 0.0, values.var(axis=-1, ddof=1))
    return mean, variance


def welch(a: Values, b: Values, alpha: float) -> Tested:
    """mean(a) - mean(b) over the last axes [..., n] and [..., m] (at least 2 each); intervals cover 1 - ``alpha``."""
    (mean_a, var_a), (mean_b, var_b) = moments(a), moments(b)
    n, m = a.shape[-1], b.shape[-1]
    part_a, part_b = var_a / n, var_b / m
    square = part_a + part_b
    # Shares first: squares of variances leave the range of floating point long before variances do.
    share = np.divide(part_a, square, out=np.full_like(square, np.nan), where=square > 0)
    df = 1 / (share**2 / (n - 1) + (1 - share) ** 2 / (m - 1))
    difference = np.where(np.abs(mean_a - mean_b) <= _ROUNDING * np.abs(mean_a), 0.0, mean_a - mean_b)
    return _t_test(difference, np.sqrt(square), df, alpha)


def paired(a: Values, b: Values, alpha: float) -> Tested:
    """Mean of a - b over the last axis [..., n], both in the same order of seeds; intervals cover 1 - ``alpha``."""
    gaps = a - b
    scale = np.maximum(np.abs(a).max(axis=-1), np.abs(b).max(axis=-1))
    equal = gaps.max(axis=-1) - gaps.min(axis=-1) <= _ROUNDING * scale
    mean = gaps.mean(axis=-1)
    error = np.where(equal, 0.0, gaps.std(axis=-1, ddof=1) / np.sqrt(gaps.shape[-1]))
    df = np.where(equal, np.nan, float(gaps.shape[-1] - 1))
    return _t_test(np.where(np.abs(mean) <= _ROUNDING * scale, 0.0, mean), error, df, alpha)


def _t_test(difference: Values, error: Values, df: Values, alpha: float) -> Tested:
    tested = ~np.isnan(df)
    ratio = np.divide(np.abs(difference), error, out=np.full_like(error, np.nan), where=tested)
    half = np.where(tested, t_critical(alpha / 2, df) * error, 0.0)
    return Tested(
        difference=difference,
        error=error,
        df=df,
        p=np.minimum(2 * t_tail(ratio, df), 1.0),
        low=difference - half,
        high=difference + half,
    )


def holm(p: Values) -> Values:
    """Holm's adjusted p values over the last axis, in the order given. NaN (no test) stays NaN and keeps its place in
    the number of comparisons, so that what was planned decides the correction."""
    count = p.shape[-1]
    order = np.argsort(p, axis=-1, kind="stable")  # numpy sorts NaN last
    ranked = np.take_along_axis(p, order, axis=-1) * np.arange(count, 0, -1, dtype=np.float64)
    risen: Values = np.minimum(np.maximum.accumulate(ranked, axis=-1), 1.0)
    adjusted = np.empty_like(p)
    np.put_along_axis(adjusted, order, risen, axis=-1)
    return adjusted


def equivalence_p(tested: Tested, margin: float) -> Values:
    """p of the two one-sided tests that |difference| < ``margin``; NaN where there is no test."""
    room = margin - np.abs(tested.difference)
    ratio = np.divide(room, tested.error, out=np.full_like(room, np.nan), where=tested.error > 0)
    return t_tail(ratio, tested.df)


def decide(arms: Sequence[Values], alpha: float, margin: float, *, by_seed: bool) -> Decided:
    """Every other arm against ``arms[0]``, at ``alpha`` of this look.

    ``arms`` are [..., n] with the seeds in one order (numbers of runs may differ unless ``by_seed``, which takes the
    paired t). Differences share ``alpha`` by Holm; equivalence is judged per comparison, uncorrected, and wins over a
    significant difference, because a difference inside the margin was declared not to matter.
    """
    test = paired if by_seed else welch
    rows = [test(arm, arms[0], alpha) for arm in arms[1:]]
    tested = Tested(
        difference=np.stack([row.difference for row in rows], axis=-1),
        error=np.stack([row.error for row in rows], axis=-1),
        df=np.stack([row.df for row in rows], axis=-1),
        p=np.stack([row.p for row in rows], axis=-1),
        low=np.stack([row.low for row in rows], axis=-1),
        high=np.stack([row.high for row in rows], axis=-1),
    )
    p_holm, p_equivalence = holm(tested.p), equivalence_p(tested, margin)
    untested = np.isnan(tested.df)
    significant = p_holm <= alpha
    names: list[tuple[Verdict, npt.NDArray[np.bool_]]] = [
        ("identical", untested & (tested.difference == 0)),
        ("constant", untested),
        ("equivalent", p_equivalence <= alpha),
        ("improvement", significant & (tested.difference > 0)),
        ("degradation", significant & (tested.difference < 0)),
    ]
    verdict = np.select(
        [where for _, where in names],
        [np.int64(VERDICTS.index(name)) for name, _ in names],
        np.int64(VERDICTS.index("not enough evidence")),
    )
    return Decided(tested, p_holm, p_equivalence, verdict)
