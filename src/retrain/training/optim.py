"""What the optimizer is told at each step: the learning rate's warm-up and schedule, and the constant rest."""

from __future__ import annotations

import math

from retrain.config.schema import Config
from retrain.types import OptimStep


def rate_at(config: Config, step: int) -> float:
    """Learning rate of the 0-based ``step``.

    It rises linearly to ``training.lr`` over the warm-up steps (step 0 already moves), then stays (constant), or falls
    to ``lr_final_share`` of it, which it would reach at step ``max_steps``: linear on a line, cosine on half a wave
    (1608.03983, without restarts). With the final share 0 the last step still moves.
    """
    training = config.training
    warm, total = training.warmup_steps, training.max_steps
    if step < warm:
        return training.lr * (step + 1) / warm
    if training.lr_schedule == "constant" or total <= warm:
        return training.lr
    progress = min(1.0, (step - warm) / (total - warm))
    left = 1.0 - progress if training.lr_schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return training.lr * (training.lr_final_share + (1.0 - training.lr_final_share) * left)


def optim_at(config: Config, step: int) -> OptimStep:
    """Optimizer settings of the 0-based ``step``; every update of one step uses the same."""
    return OptimStep(
        rate_at(config, step),
        config.training.weight_decay,
        config.optimizer.beta1,
        config.optimizer.beta2,
        config.optimizer.eps,
        config.loss.grad_clip,
        hash_gradient=starts_stored(config, step),
    )


def starts_stored(config: Config, step: int) -> bool:
    """Do the weights that the 0-based ``step`` starts from lie in a checkpoint, by the settings alone? Step 0's follow from
    the configuration."""
    every = config.training.save_every
    return step == 0 or (every > 0 and step % every == 0)
