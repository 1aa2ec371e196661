"""What a step's rollouts and the learner's report say, as the keys of metrics.jsonl."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from retrain.algorithms.credit import correct
from retrain.config.schema import Config
from retrain.protocols import Engine
from retrain.training.rollout import Collected
from retrain.types import CreditedGroup, Sampled, StepReport, TrainBatch

log = logging.getLogger("retrain.groups")

_SHOWN_GROUPS = 2


def condition_metrics(config: Config) -> dict[str, Any]:
    """What is compared when runs are: the algorithm by name."""
    algorithm = config.algorithm
    return {
        "condition": algorithm.algorithm_mode or f"{algorithm.advantage_mode}+{algorithm.transform_mode}",
        "advantage_mode": algorithm.advantage_mode,
        "transform_mode": algorithm.transform_mode,
        "uncertainty_kind": algorithm.uncertainty_kind,
    }


def sampled(
    got: Collected, batch: TrainBatch, batch_size: int, group_size: int, engine: Engine, drawn: int, *, cut: bool
) -> Sampled:
    """A step as whoever chooses the next one's size sees it; rollouts that failed have no lengths and are left out.
    ``drawn``: tasks when memory ran out, before any went back; 0 where it sufficed. ``cut``: updates were left out for it."""
    rollouts = [r for g in got.groups_P for r in g.rollouts_G if r.num_sampled]
    queue = getattr(engine, "queue", None)
    return Sampled(
        batch_size=batch_size,
        group_size=group_size,
        tokens=batch.num_tokens,
        seconds=got.sample_time_s,
        # Where memory ran out, the time is not that of what was sampled in the end, or the size not one that fits.
        skipped=batch.is_empty or drawn > 0 or cut,
        rows=[(len(r.token_ids_T) - r.num_sampled, r.num_sampled) for r in rollouts],
        put_back=max(0, drawn - len(got.groups_P)),
        queue={} if queue is None else dict(queue()),
    )


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


def time_metrics(
    got: Collected, batch: TrainBatch, *, started: float, synced: float, trained: float, finished: float
) -> dict[str, float]:
    """Seconds of a step's phases: weights were handed over from ``started`` to ``synced``, and the learner ran from
    ``trained`` to ``finished``."""
    return {
        "step_time_s": finished - started,
        "sync_time_s": synced - started,
        "sample_time_s": got.sample_time_s,
        "score_time_s": got.score_time_s,
        "train_time_s": finished - trained,
        "tokens_sampled": batch.num_tokens,
        "tokens_per_second": batch.num_tokens / max(got.sample_time_s, 1e-9),
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
