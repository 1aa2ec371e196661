"""Every built-in name that a configuration may hold, and which of them this version builds.

A name in ``LATER`` is known and refused with "not in this version" before a model loads. A test keeps the
built names equal to the plug-in table.
"""

from __future__ import annotations

BUILT: dict[str, tuple[str, ...]] = {
    "backend": ("local",),
    "engine": ("pytorch",),
    "advantage": ("grpo", "maxrl"),
    "transform": ("none", "gtpo", "gtpo_hicra", "gtpo_sepa"),
    "uncertainty": ("surprisal", "predictive_variance", "shannon_entropy"),
    "detector": ("regex",),
    "reward": ("match", "custom"),
    "source": ("arithmetic", "jsonl", "gsm8k"),
    "environment": ("single_turn",),
    "loss": ("importance_sampling",),
    "truncated": ("score",),
    "lr_schedule": ("constant",),
    "sink": ("console",),
}

LATER: dict[str, tuple[str, ...]] = {
    "backend": ("tinker", "distributed", "trl", "verl"),
    "engine": ("max", "vllm", "sglang", "mlx", "openai"),
    "advantage": ("grpo_std", "rloo", "reinforce_pp"),
    "transform": ("gtpo_sepa_amp", "gtpo_sepa_amp_c", "entropy_mask"),
    "uncertainty": (),
    "detector": ("semantic",),
    "reward": ("math", "judge", "composite", "environment"),
    "source": ("math", "hf", "reasoning_gym"),
    "environment": ("verifiers", "tools"),
    "loss": ("ppo", "gspo", "cispo"),
    "truncated": ("mask", "soft"),
    "lr_schedule": ("linear", "cosine"),
    "sink": ("wandb", "trackio", "tensorboard"),
}

ALIASES: dict[str, dict[str, str]] = {
    "uncertainty": {
        "token_surprisal": "surprisal",
        "nll": "surprisal",
        "pred_var": "predictive_variance",
        "bernoulli_variance": "predictive_variance",
        "entropy": "shannon_entropy",
        "token_entropy": "shannon_entropy",
    },
}

CONDITIONS: tuple[tuple[str, str], ...] = (
    ("grpo", "none"),
    ("maxrl", "none"),
    ("maxrl", "gtpo"),
    ("maxrl", "gtpo_hicra"),
    ("maxrl", "gtpo_sepa"),
)
"""The five standard conditions: (advantage_mode, transform_mode)."""

TINY_MODEL = "retrain/tiny"
"""The model that ships inside the package."""
