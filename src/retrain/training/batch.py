"""From credited groups to one batch: which rows train, and the denominators that count the rest too."""

from __future__ import annotations

from collections.abc import Sequence

from retrain.types import CreditedGroup, TrainBatch, TrainRow


def pack(groups_P: Sequence[CreditedGroup], *, temperature: float, fixed_tokens: int, keep_silent: bool = False) -> TrainBatch:
    """Rows of the groups that carry a signal; ``num_tokens`` and ``num_rollouts`` count every valid rollout of
    the step, so that leaving a group out changes no gradient. ``keep_silent`` keeps the others as rows with advantage 0,
    for loss terms that need no advantage (KL, entropy)."""
    rows: list[TrainRow] = []
    tokens = rollouts = 0
    for group in groups_P:
        members = zip(group.scored.rollouts_G, group.scored.valid_G, group.advantages_G_T, strict=True)
        for rollout, valid, advantages_T in members:
            if not valid:
                continue
            tokens += rollout.num_sampled
            rollouts += 1
            if keep_silent or not group.skipped:
                rows.append(
                    TrainRow(rollout.token_ids_T, rollout.sampled_T, rollout.logprobs_T, advantages_T)
                )
    return TrainBatch(tuple(rows), tokens, rollouts, fixed_tokens, temperature)
