"""Long curves made short without hiding anything: the extremes of every bucket, means of buckets, and a trailing mean."""

from __future__ import annotations

from itertools import pairwise
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Series: TypeAlias = npt.NDArray[np.float64]
"""Shape (S,): one value per step, NaN where the run does not say."""


def envelope(x_S: Series, y_S: Series, points: int) -> tuple[Series, Series]:
    """The curve in at most ``points`` points: of every bucket of steps its lowest and its highest value, in the order
    in which they occurred, so that no spike is lost and none is invented. A curve that is short enough stays as it is;
    a bucket without a known value is one NaN, which breaks the line there. ``points`` is at least 2.
    """
    if len(x_S) <= points:
        return x_S, y_S
    keep: list[int] = []
    for start, end in _buckets(len(x_S), points // 2):
        part = y_S[start:end]
        known = np.flatnonzero(~np.isnan(part))
        if not len(known):
            keep.append(start)
            continue
        low, high = known[np.argmin(part[known])], known[np.argmax(part[known])]
        keep += [start + int(i) for i in sorted({low, high})]
    chosen = np.array(keep)
    return x_S[chosen], y_S[chosen]


def every_nth(x_S: Series, y_S: Series, points: int) -> tuple[Series, Series]:
    """At most ``points`` points of a curve that is smooth already: the last of every bucket."""
    if len(x_S) <= points:
        return x_S, y_S
    chosen = np.array([end - 1 for _, end in _buckets(len(x_S), points)])
    return x_S[chosen], y_S[chosen]


def bucket_means(x_S: Series, y_S: Series, points: int) -> tuple[Series, Series]:
    """Means of at most ``points`` buckets of steps, each at its bucket's first step: for shares that are stacked."""
    if len(x_S) <= points:
        return x_S, y_S
    edges = _buckets(len(x_S), points)
    return np.array([x_S[a] for a, _ in edges]), np.array([known_mean(y_S[a:b]) for a, b in edges])


def trailing_mean(y_S: Series, window: int) -> Series:
    """Mean of the known values among the last ``window`` steps; NaN where there is none."""
    known = ~np.isnan(y_S)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, y_S, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    first = np.maximum(np.arange(len(y_S)) + 1 - window, 0)
    after = np.arange(len(y_S)) + 1
    count = counts[after] - counts[first]
    # Where nothing is known both sums are equal, and 0 / 1 is masked away.
    return np.where(count > 0, (sums[after] - sums[first]) / np.maximum(count, 1), np.nan)


def window_of(steps: int) -> int:
    """Steps that a smoothed curve looks back on: a twentieth of the run, at least 5 and at most 100."""
    return min(max(steps // 20, 5), 100)


def spark(y_S: Series, width: int = 24) -> str:
    """The curve as a line of at most ``width`` block characters, from its lowest to its highest bucket mean; a space
    where nothing is known."""
    _, means = bucket_means(np.arange(len(y_S), dtype=np.float64), y_S, width)
    known = means[~np.isnan(means)]
    if not len(known):
        return ""
    low, high = float(known.min()), float(known.max())
    scale = 7 / (high - low) if high > low else 0.0
    return "".join(" " if np.isnan(m) else "▁▂▃▄▅▆▇█"[round((m - low) * scale)] for m in means)


def _buckets(length: int, count: int) -> list[tuple[int, int]]:
    edges = np.linspace(0, length, max(count, 1) + 1).astype(int)
    return [(int(a), int(b)) for a, b in pairwise(edges) if b > a]


def known_mean(values: Series) -> float:
    """Mean of the known values; NaN where there is none."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")
