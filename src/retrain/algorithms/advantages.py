"""Episode advantages: pure functions from the rewards of one task's group to one number per member.

Everything is float64. Sums are exactly rounded, so that permuting a group permutes its advantages bit for
bit.
"""

from __future__ import annotations

import math

import numpy as np

from retrain.errors import RunError
from retrain.protocols import Float64Array

MAXRL_EPS = 1e-6
"""Both the mean below which MaxRL gives no credit and the term that keeps its division finite."""


def _without_signal(rewards_G: Float64Array) -> bool:
    # Decided before any arithmetic: six rewards of 0.1 have a mean that is off by an ulp, and r - mean(r)
    # would then push the policy with advantages of 1e-17.
    return rewards_G.size == 0 or bool(rewards_G.max() == rewards_G.min())


def _mean(rewards_G: Float64Array) -> float:
    return math.fsum(rewards_G.tolist()) / rewards_G.size


def grpo(rewards_G: Float64Array) -> Float64Array:
    """GRPO without the division by the standard deviation: ``A_i = r_i - mean(r)``.

    Paper: GRPO, arXiv 2402.03300; leaving out the standard deviation is the correction of Dr. GRPO,
    arXiv 2503.20783. ``rewards_G`` is (G,) and finite, of any range; the result is (G,) and sums to 0 up to
    rounding. Equal rewards give exactly 0, an empty group an empty array.
    """
    rewards_G = np.asarray(rewards_G, dtype=np.float64)
    if _without_signal(rewards_G):
        return np.zeros_like(rewards_G)
    return rewards_G - _mean(rewards_G)


def maxrl(rewards_G: Float64Array) -> Float64Array:
    """MaxRL: ``A_i = (r_i - m) / (m + 1e-6)`` with ``m = mean(r)``; all zeros where ``m <= 1e-6``.

    Paper: MaxRL, arXiv 2602.02710. With K successes among G pass/fail rewards a success gets (G - K)/K and a
    failure -1: the rarer a success, the larger its credit. ``rewards_G`` is (G,) in [0, 1], the result is
    (G,). Equal rewards give exactly 0. RunError for a reward outside [0, 1], where the formula means nothing.
    """
    rewards_G = np.asarray(rewards_G, dtype=np.float64)
    outside = rewards_G[~((rewards_G >= 0.0) & (rewards_G <= 1.0))]
    if outside.size:
        raise RunError(
            f"maxrl is derived for pass/fail rewards and got {outside[0]:g}, which is outside [0, 1].",
            fix='set advantage_mode = "grpo" under [algorithm], or scale the reward into [0, 1].',
        )
    if _without_signal(rewards_G):
        return np.zeros_like(rewards_G)
    mean = _mean(rewards_G)
    if mean <= MAXRL_EPS:
        return np.zeros_like(rewards_G)
    return (rewards_G - mean) / (mean + MAXRL_EPS)
