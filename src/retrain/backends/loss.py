"""Per-token policy losses and the weights that aggregate them. Denominators come with the batch, so tokens of
groups that were not packed count too."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from retrain.types import TrainBatch


def importance_sampling(new_N: torch.Tensor, old_N: torch.Tensor, advantages_N: torch.Tensor) -> torch.Tensor:
    """Loss of each sampled token: ``- exp(new - old) * A`` (N,), differentiable in ``new_N``.

    The gradient at new = old is that of REINFORCE; off it, the ratio corrects for the sampler (Sutton and
    Barto's importance-weighted policy gradient, unclipped).
    """
    return -torch.exp(new_N - old_N) * advantages_N


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
