"""Per-token policy losses, the KL estimators, and the weights that aggregate them. Denominators come with the batch,
so tokens of groups that were not packed count too.

Every policy loss, a plug-in's too, is a function ``(tokens, settings) -> (loss_N, clipped_N)``: the loss of each token,
differentiable in ``tokens.new_N``, and a bool per token that says whether the loss cut its gradient. r is the ratio
``exp(new - old)``, A the advantage, sg the stop-gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from retrain.config.schema import Loss
from retrain.types import TrainBatch


@dataclass(frozen=True, slots=True)
class LossTokens:
    """The sampled tokens of whole rows, one after the other; all (N,), logprobs in nats at the training temperature.

    ``old_N`` is the policy that the ratio is taken against: for importance_sampling the sampler, for every other loss
    the learner as it was before the batch's first update. There ``old_N`` equals ``new_N`` exactly, under dropout too,
    so that nothing is clipped; later updates meet that learner without dropout. How far the sampler is from the learner
    is corrected by ``tis_cap`` alone, outside of the loss, and by nothing without it. ``row_N`` numbers the rows from 0.
    """

    new_N: torch.Tensor
    old_N: torch.Tensor
    advantages_N: torch.Tensor
    row_N: torch.Tensor


@dataclass(frozen=True, slots=True)
class LossSettings:
    """What the losses read of [loss]: the ratio may lie in [1 - clip_low, 1 + clip_high]; 0 switches the others off."""

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float = 0.0
    tis_cap: float = 0.0


LossFn: TypeAlias = Callable[[LossTokens, LossSettings], tuple[torch.Tensor, torch.Tensor]]

CLIPS: dict[str, tuple[float, float]] = {"ppo": (0.2, 0.2), "gspo": (3e-4, 4e-4), "cispo": (1.0, 4.0)}
"""What clip_low and clip_high are when unset; a plug-in gets ppo's."""


def settings_of(loss: Loss) -> LossSettings:
    """The section's numbers, with the clips of its kind where they are unset."""
    low, high = CLIPS.get(loss.kind, CLIPS["ppo"])
    return LossSettings(
        clip_low=low if loss.clip_low is None else loss.clip_low,
        clip_high=high if loss.clip_high is None else loss.clip_high,
        dual_clip=loss.dual_clip,
        tis_cap=loss.tis_cap,
    )


def importance_sampling(tokens: LossTokens, settings: LossSettings) -> tuple[torch.Tensor, torch.Tensor]:
    """``- r A``; with ``tis_cap`` C: ``- sg(min(r, C)) A log pi``. Nothing is clipped.

    The gradient at new = old is that of REINFORCE; off it the ratio corrects for the sampler. Truncated importance
    sampling bounds that correction (Ionides 2008; for samplers that are not the learner Yao et al. 2025). The weight
    takes no gradient, because clamping r itself would end the gradient of every capped token.
    """
    ratio = torch.exp(tokens.new_N - tokens.old_N)
    never = torch.zeros_like(ratio, dtype=torch.bool)
    if settings.tis_cap:
        return -ratio.detach().clamp_max(settings.tis_cap) * tokens.advantages_N * tokens.new_N, never
    return -ratio * tokens.advantages_N, never


def ppo(tokens: LossTokens, settings: LossSettings) -> tuple[torch.Tensor, torch.Tensor]:
    """``- min(r A, clip(r, 1 - low, 1 + high) A)``; with ``dual_clip`` c > 1 at A < 0: ``- max(that, c A)``.

    PPO's clipped surrogate (1707.06347) as GRPO uses it (2402.03300), with DAPO's separate upper bound (2503.14476).
    The min lets r leave the interval only where that lowers the objective; there, at A < 0 and large r, the second
    clip bounds it (1912.09729).
    """
    ratio, advantages = torch.exp(tokens.new_N - tokens.old_N), tokens.advantages_N
    return _clipped_surrogate(ratio, advantages, settings)


def _clipped_surrogate(
    ratio_N: torch.Tensor, advantages_N: torch.Tensor, settings: LossSettings
) -> tuple[torch.Tensor, torch.Tensor]:
    low, high = 1.0 - settings.clip_low, 1.0 + settings.clip_high
    clipped = ((advantages_N > 0) & (ratio_N > high)) | ((advantages_N < 0) & (ratio_N < low))
    bounded = ratio_N.detach().clamp(low, high)
    if settings.dual_clip:
        far = (advantages_N < 0) & (ratio_N > settings.dual_clip)
        bounded = torch.where(far, settings.dual_clip, bounded)
        clipped = clipped | far
    return -torch.where(clipped, bounded, ratio_N) * advantages_N, clipped


def gspo(tokens: LossTokens, settings: LossSettings) -> tuple[torch.Tensor, torch.Tensor]:
    """ppo's clip on ``s_t = sg(s) pi_t / sg(pi_t)`` with the row's ratio ``s = exp(mean over the row of (new - old))``.

    GSPO-token (2507.18071, section 4.3): every token of a row has the value s, and its own gradient, so advantages may
    differ within a row. Where they do not, and rows are averaged by ``sequence_mean``, value and gradient are GSPO's:
    grad s = s mean_t(grad log pi_t). ``token_mean`` weighs rows by their length instead. Rows come whole.
    """
    gap = tokens.new_N - tokens.old_N
    rows = int(tokens.row_N.max()) + 1
    sums = torch.zeros(rows, dtype=gap.dtype, device=gap.device).index_add(0, tokens.row_N, gap.detach())
    counts = torch.bincount(tokens.row_N, minlength=rows).clamp_min(1)
    row_ratio = torch.exp(sums / counts)[tokens.row_N]
    ratio = row_ratio * torch.exp(tokens.new_N - tokens.new_N.detach())
    return _clipped_surrogate(ratio, tokens.advantages_N, settings)


def cispo(tokens: LossTokens, settings: LossSettings) -> tuple[torch.Tensor, torch.Tensor]:
    """``- sg(clip(r, 1 - low, 1 + high)) A log pi``.

    CISPO (2506.13585): the weight is clipped, not the update, so that every token keeps a gradient. ``clipped`` marks
    the tokens whose weight was.
    """
    ratio = torch.exp(tokens.new_N.detach() - tokens.old_N)
    weight = ratio.clamp(1.0 - settings.clip_low, 1.0 + settings.clip_high)
    return -weight * tokens.advantages_N * tokens.new_N, weight != ratio


def kl_estimate(new_N: torch.Tensor, base_N: torch.Tensor, kind: str) -> torch.Tensor:
    """Estimate of KL(policy || base) per token (N,) from the logprobs of both, in nats; differentiable in ``new_N``.

    With x = log(base / pi): k1 is -x, k2 is x^2 / 2, k3 is e^x - 1 - x (Schulman 2020; k3 in GRPO, 2402.03300). As a
    term of the loss they differ from what they are as numbers: on-policy the gradient of k2 is that of the KL
    divergence in expectation, that of k3 close to it near the base, and that of k1 zero (2506.09477).
    """
    x = base_N - new_N
    if kind == "k1":
        return -x
    return 0.5 * x.square() if kind == "k2" else torch.expm1(x) - x


def token_weights(batch: TrainBatch, agg: str) -> list[npt.NDArray[np.float64]]:
    """One weight per token of each row, 0 where not sampled: the loss is the weighted sum of token losses.

    ``token_mean``: 1 / sampled tokens of all valid rollouts of the step. ``sequence_mean``: 1 / (tokens of
    the row * valid rollouts). ``fixed``: 1 / (batch_size * group_size * max_tokens), as Dr. GRPO (2503.20783).
    """
    weights: list[npt.NDArray[np.float64]] = []
    for row in batch.rows:
        sampled = row.sampled_T.astype(np.float64)
        if agg == "token_mean":
            weights.append(sampled / batch.num_tokens)
        elif agg == "sequence_mean":
            weights.append(sampled / (sampled.sum() * batch.num_rollouts))
        else:
            weights.append(sampled / batch.fixed_tokens)
    return weights
