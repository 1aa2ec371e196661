"""What a step's rollouts and the learner's report say, as the keys of metrics.jsonl."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from retrain.algorithms.credit import correct
from retrain.training.rollout import Collected
from retrain.types import CreditedGroup, StepReport, TrainBatch

log = logging.getLogger("retrain.groups")

_SHOWN_GROUPS = 2


def rollout_metrics(
    got: Collected, labels: Sequence[str] = (), correct_at: float | None = None
) -> dict[str, Any]:
    """Rewards, lengths, truncation and error shares of a step; means are over valid rollouts.

    ``labels`` are the sources of a mixture, each of which gets curves of its own, null in a step without it.
    """
    pairs = [
        (r, s) for g in got.groups_P for r, s, v in zip(g.rollouts_G, g.scores_G, g.valid_G, strict=True) if v
    ]
    total = sum(len(g.rollouts_G) for g in got.groups_P)
    parts: dict[str, list[float]] = {}
    for _, score in pairs:
        for name, value in score.parts.items():
            parts.setdefault(name, []).append(value)
    return {
        "mean_reward": float(np.mean([s.reward for _, s in pairs])) if pairs else None,
        "mean_length": float(np.mean([r.num_sampled for r, _ in pairs])) if pairs else None,
        "max_token_hit_rate": float(np.mean([r.stop == "length" for r, _ in pairs])) if pairs else None,
        "reward_error_rate": got.reward_errors / total,
        "rollout_error_rate": sum(r.stop == "error" for g in got.groups_P for r in g.rollouts_G) / total,
        **{f"rewards/{name}": float(np.mean(values)) for name, values in sorted(parts.items())},
        **{key: value for label in labels for key, value in _of_source(got, label, correct_at).items()},
    }


def _of_source(got: Collected, label: str, correct_at: float | None) -> dict[str, Any]:
    groups = [g for g in got.groups_P if g.task.source == label]
    scores = [s for g in groups for s, valid in zip(g.scores_G, g.valid_G, strict=True) if valid]
    verdicts = [correct(s, correct_at) for s in scores]
    known = [v for v in verdicts if v is not None]
    return {
        f"sources/{label}/mean_reward": float(np.mean([s.reward for s in scores])) if scores else None,
        f"sources/{label}/correct_rate": float(np.mean(known)) if known and len(known) == len(verdicts) else None,
        f"sources/{label}/groups": len(groups),
    }


def learner_metrics(batch: TrainBatch, reports: Sequence[StepReport]) -> dict[str, Any]:
    """The learner's reports of one step, one per update; nulls for a step that had nothing to train on.

    Loss, gradient norm and ratio are the first update's: there the ratio compares learner and sampler. ``moved_kl``
    is the approximate KL divergence that the updates before the last one have moved the policy from the sampler;
    shares and terms are means over the updates.
    """
    first, last = (reports[0], reports[-1]) if reports else (None, None)

    def mean(values: Sequence[float | None]) -> float | None:
        known = [v for v in values if v is not None]
        return math.fsum(known) / len(known) if known else None

    return {
        "num_datums": len(batch.rows),
        "loss": first.loss if first else None,
        "loss_is_placeholder": first.loss_is_placeholder if first else False,
        "grad_norm": first.grad_norm if first else None,
        "grad_clipped": any(r.grad_clipped for r in reports),
        "gradient_hash": (first.gradient_hash or None) if first else None,
        "ratio_mean": first.ratio_mean if first else None,
        "ratio_min": first.ratio_min if first else None,
        "ratio_max": first.ratio_max if first else None,
        "approx_kl": first.approx_kl if first else None,
        "moved_kl": last.approx_kl if last else None,
        "clip_share": mean([r.clip_share for r in reports]),
        "tis_capped": mean([r.tis_capped for r in reports]),
        "kl_base": mean([r.kl_base for r in reports]),
        "policy_entropy": mean([r.entropy for r in reports]),
        "num_updates": len(reports),
        "num_microbatches": first.num_microbatches if first else 0,
        "skipped_update": any(r.update_skipped for r in reports),
    }


def announce_groups(groups_P: Sequence[CreditedGroup], correct_at: float | None) -> None:
    """One line per group: how many were correct, the reference, and why it did not train if it did not. The
    console shows a step's first groups, events.log all."""
    for i, group in enumerate(groups_P):
        scored = group.scored
        marks = [
            v and correct(s, correct_at) is True for s, v in zip(scored.scores_G, scored.valid_G, strict=True)
        ]
        note = f" | skipped ({group.skipped})" if group.skipped else ""
        level = logging.INFO if i < _SHOWN_GROUPS else logging.DEBUG
        log.log(
            level, "  group: %d/%d correct | answer=%s%s", sum(marks), len(marks), scored.task.reference, note
        )
