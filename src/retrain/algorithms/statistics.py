"""What a step's credit adds up to: correct rate, skipped groups, and moments of uncertainty on planning and
execution tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

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
    verdicts: list[bool | None] = []
    exec_u: list[FloatArray] = []
    surprisals: tuple[list[FloatArray], list[FloatArray]] = ([], [])
    entropies: tuple[list[FloatArray], list[FloatArray]] = ([], [])
    every_entropy = True
    for rollout, score, u_T, planning_T in _valid_members(groups_P):
        verdicts.append(correct(score, algorithm.correct_at))
        masks = (rollout.sampled_T & ~planning_T, rollout.sampled_T & planning_T)
        exec_u.append(u_T[masks[0]])
        surprisal_T = surprisal(rollout)
        every_entropy = every_entropy and rollout.entropies_T is not None
        for i, mask_T in enumerate(masks):
            surprisals[i].append(surprisal_T[mask_T])
            if rollout.entropies_T is not None:
                entropies[i].append(rollout.entropies_T[mask_T])
    if not every_entropy:
        # A mean over the rollouts that happen to carry entropies would describe another population.
        entropies = ([], [])
    known = [v for v in verdicts if v is not None]
    return CreditStats(
        correct_rate=sum(known) / len(known) if known and len(known) == len(verdicts) else None,
        skipped={reason: sum(g.skipped == reason for g in groups_P) for reason in SKIP_REASONS},
        exec_uncertainty=Moments.of(exec_u),
        exec_surprisal=Moments.of(surprisals[0]),
        plan_surprisal=Moments.of(surprisals[1]),
        exec_entropy=Moments.of(entropies[0]),
        plan_entropy=Moments.of(entropies[1]),
        entropy_mean=Moments.of([*entropies[0], *entropies[1]]).mean,
    )


def _valid_members(
    groups_P: Sequence[CreditedGroup],
) -> Iterator[tuple[Rollout, Score, FloatArray, BoolArray]]:
    for group in groups_P:
        scored = group.scored
        for i in np.flatnonzero(scored.valid_G).tolist():
            yield scored.rollouts_G[i], scored.scores_G[i], group.uncertainty_G_T[i], group.planning_G_T[i]
