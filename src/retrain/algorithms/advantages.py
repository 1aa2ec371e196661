"""Episode advantages: pure functions from the rewards of one task's group to one number per member.

``reinforce_pp`` alone looks at all groups of a step at once. Everything is float64. Sums are exactly rounded,
so that permuting a group permutes its advantages bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from retrain.errors import RunError
from retrain.protocols import Float64Array

MAXRL_EPS = 1e-6
"""Both the mean below which MaxRL gives no credit and the term that keeps its division finite."""

STD_EPS = 1e-6
"""Added to a standard deviation before dividing by it."""


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


def grpo_std(rewards_G: Float64Array) -> Float64Array:
    """GRPO as published: ``A_i = (r_i - mean(r)) / (std(r) + 1e-6)``, std unbiased (divided by G - 1).

    Paper: GRPO, arXiv 2402.03300. The division gives every group the same spread, so that nearly solved and
    nearly unsolved tasks weigh as much as the others (the bias that Dr. GRPO, arXiv 2503.20783, takes out).
    ``rewards_G`` is (G,) and finite, of any range; the result is (G,). Equal rewards give exactly 0.
    """
    centred_G = grpo(rewards_G)
    return centred_G / (_unbiased_std(centred_G, centred_G.size) + STD_EPS)


def rloo(rewards_G: Float64Array) -> Float64Array:
    """RLOO: ``A_i = r_i - mean of the other rewards``.

    Paper: Ahmadian et al., arXiv 2402.14740, after Kool et al. 2019. It equals ``grpo`` times G / (G - 1),
    which is how it is computed: the baseline leaves a member's own reward out and is therefore unbiased.
    ``rewards_G`` is (G,) and finite, of any range; the result is (G,). Equal rewards, one reward included,
    give exactly 0.
    """
    centred_G = grpo(rewards_G)
    count = centred_G.size
    return centred_G * (count / (count - 1)) if count > 1 else centred_G


def reinforce_pp(rewards_P_G: Sequence[Float64Array]) -> list[Float64Array]:
    """REINFORCE++ with a group baseline: ``A_i = d_i / (std(d) + 1e-6)`` with ``d_i = r_i - mean of its group``.

    Paper: arXiv 2501.03262. The standard deviation is over the d of every valid rollout of the step, those of
    groups without a signal included (their d are 0), unbiased; the mean of all d is 0 by construction and is
    not subtracted again. Over rollouts, where some implementations pool tokens: a long rollout counts once.
    Arguments and results hold one array per group, finite, of any range. Equal rewards give exactly 0.
    """
    centred_P_G = [grpo(rewards_G) for rewards_G in rewards_P_G]
    pooled = np.concatenate(centred_P_G) if centred_P_G else np.zeros(0)
    scale = _unbiased_std(pooled, pooled.size) + STD_EPS
    return [centred_G / scale for centred_G in centred_P_G]


reinforce_pp.batch_level = True  # type: ignore[attr-defined]


def _unbiased_std(centred: Float64Array, count: int) -> float:
    """Standard deviation of values whose mean is already 0; 0 for fewer than two."""
    if count < 2:
        return 0.0
    return math.sqrt(math.fsum((centred * centred).tolist()) / (count - 1))
