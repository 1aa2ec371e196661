"""What a step's credit adds up to: correct rate, skipped groups, and moments of uncertainty on planning and
execution tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from retrain.algorithms.credit import SKIP_REASONS, Algorithm, correct
from retrain.algorithms.transforms import surprisal
from retrain.types import BoolArray, CreditedGroup, FloatArray, Rollout, Score, SkipReason, StepStats


@dataclass(frozen=True, slots=True)
class Moments:
    """Mean and population variance of ``count`` values; None for none."""

    count: int
    mean: float | None
    variance: float | None

    @classmethod
    def of(cls, values: Sequence[FloatArray]) -> Moments:
        """Pool the arrays, in float64."""
        pooled = np.concatenate(values).astype(np.float64) if values else np.zeros(0)
        if not pooled.size:
            return cls(0, None, None)
        return cls(int(pooled.size), float(pooled.mean()), float(pooled.var()))


@dataclass(frozen=True, slots=True)
class CreditStats:
    """What a step's valid rollouts show, pooled over their sampled tokens.

    ``correct_rate`` is None when any of them cannot be judged, or there is none. ``skipped`` counts groups
    by reason. Surprisals and entropies are in nats, entropies empty unless every valid rollout carries them;
    ``exec_uncertainty`` is of the configured uncertainty, which SEPA follows.
    """

    correct_rate: float | None
    skipped: Mapping[SkipReason, int]
    exec_uncertainty: Moments
    exec_surprisal: Moments
    plan_surprisal: Moments
    exec_entropy: Moments
    plan_entropy: Moments
    entropy_mean: float | None

    @property
    def observed(self) -> StepStats:
        """What schedules observe."""
        return StepStats(correct_rate=self.correct_rate, exec_variance=self.exec_uncertainty.variance)

    @property
    def metrics(self) -> dict[str, float | int | None]:
        """correct_rate, skipped_*, entropy_mean, {exec,plan}_{surprisal,entropy}_{mean,var}.

        Null where there was nothing to average.
        """
        named = {
            "exec_surprisal": self.exec_surprisal,
            "plan_surprisal": self.plan_surprisal,
            "exec_entropy": self.exec_entropy,
            "plan_entropy": self.plan_entropy,
        }
        found: dict[str, float | int | None] = {"correct_rate": self.correct_rate}
        found |= {f"skipped_{reason.replace(' ', '_')}": count for reason, count in self.skipped.items()}
        found["entropy_mean"] = self.entropy_mean
        for name, moments in named.items():
            found[f"{name}_mean"] = moments.mean
            found[f"{name}_var"] = moments.variance
        return found


def step_stats(groups_P: Sequence[CreditedGroup], algorithm: Algorithm) -> CreditStats:
    """Pool a step's groups, skipped ones included; members that are not valid are left out."""
    members = list(_valid_members(groups_P))
    verdicts = [correct(score, algorithm.correct_at) for _, score, _, _ in members]
    sampled = _flat([rollout.sampled_T for rollout, _, _, _ in members], np.bool_)
    planning = _flat([planning_T for _, _, _, planning_T in members], np.bool_)
    execution, planned = sampled & ~planning, sampled & planning
    u = _flat([u_T for _, _, u_T, _ in members], np.float32)
    surprisals = _flat([surprisal(rollout) for rollout, _, _, _ in members], np.float32)
    carried = [r.entropies_T for r, _, _, _ in members if r.entropies_T is not None]
    exec_entropy = plan_entropy = np.zeros(0, dtype=np.float32)
    if len(carried) == len(members):
        # A mean over the rollouts that happen to carry entropies would describe another population.
        entropies = _flat(carried, np.float32)
        exec_entropy, plan_entropy = entropies[execution], entropies[planned]
    known = [v for v in verdicts if v is not None]
    return CreditStats(
        correct_rate=sum(known) / len(known) if known and len(known) == len(verdicts) else None,
        skipped={reason: sum(g.skipped == reason for g in groups_P) for reason in SKIP_REASONS},
        exec_uncertainty=Moments.of([u[execution]]),
        exec_surprisal=Moments.of([surprisals[execution]]),
        plan_surprisal=Moments.of([surprisals[planned]]),
        exec_entropy=Moments.of([exec_entropy]),
        plan_entropy=Moments.of([plan_entropy]),
        entropy_mean=Moments.of([exec_entropy, plan_entropy]).mean,
    )


def _flat(arrays: Sequence[npt.NDArray[Any]], dtype: type[np.generic]) -> npt.NDArray[Any]:
    return np.concatenate(arrays) if arrays else np.zeros(0, dtype=dtype)


def _valid_members(
    groups_P: Sequence[CreditedGroup],
) -> Iterator[tuple[Rollout, Score, FloatArray, BoolArray]]:
    for group in groups_P:
        scored = group.scored
        for i in np.flatnonzero(scored.valid_G).tolist():
            yield scored.rollouts_G[i], scored.scores_G[i], group.uncertainty_G_T[i], group.planning_G_T[i]
