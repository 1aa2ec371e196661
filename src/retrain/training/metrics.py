"""What a step's rollouts and the learner's report say, as the keys of metrics.jsonl."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from retrain.algorithms.credit import correct
from retrain.training.rollout import Collected
from retrain.types import CreditedGroup, StepReport, TrainBatch

log = logging.getLogger("retrain.groups")

_SHOWN_GROUPS = 2


def rollout_metrics(got: Collected) -> dict[str, Any]:
    """Rewards, lengths, truncation and error shares of a step; means are over valid rollouts."""
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
    }


def learner_metrics(batch: TrainBatch, report: StepReport | None) -> dict[str, Any]:
    """The learner's report; nulls for a step that had nothing to train on."""
    return {
        "num_datums": len(batch.rows),
        "loss": report.loss if report else None,
        "loss_is_placeholder": report.loss_is_placeholder if report else False,
        "grad_norm": report.grad_norm if report else None,
        "grad_clipped": report.grad_clipped if report else False,
        "ratio_mean": report.ratio_mean if report else None,
        "ratio_min": report.ratio_min if report else None,
        "ratio_max": report.ratio_max if report else None,
        "approx_kl": report.approx_kl if report else None,
        "num_microbatches": report.num_microbatches if report else 0,
        "skipped_update": bool(report and report.update_skipped),
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
