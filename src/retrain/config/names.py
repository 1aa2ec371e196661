"""Every built-in name that a configuration may hold, and which of them this version builds.

A name in ``LATER`` is known and refused with "not in this version" before a model loads. A test keeps the
built names equal to the plug-in table.
"""

from __future__ import annotations

BUILT: dict[str, tuple[str, ...]] = {
    "backend": ("local",),
    "engine": ("pytorch",),
    "advantage": ("grpo", "maxrl", "grpo_std", "rloo", "reinforce_pp"),
    "transform": ("none", "gtpo", "gtpo_hicra", "gtpo_sepa", "gtpo_sepa_amp", "gtpo_sepa_amp_c", "entropy_mask"),
    "algorithm": (),
    "uncertainty": ("surprisal", "predictive_variance", "shannon_entropy"),
    "detector": ("regex", "semantic"),
    "reward": ("match", "math", "custom", "composite", "reasoning_gym", "routed"),
    "source": ("math", "gsm8k", "arithmetic", "jsonl", "hf", "reasoning_gym", "mixture"),
    "environment": ("single_turn",),
    "loss": ("importance_sampling", "ppo", "gspo", "cispo"),
    "truncated": ("score", "mask", "soft"),
    "lr_schedule": ("constant", "linear", "cosine"),
    "sink": ("console", "wandb", "trackio", "tensorboard"),
    "backpressure": ("usl",),
}

LATER: dict[str, tuple[str, ...]] = {
    "backend": ("tinker", "distributed", "trl", "verl"),
    "engine": ("max", "vllm", "sglang", "mlx", "openai"),
    "advantage": (),
    "transform": (),
    "algorithm": (),
    "uncertainty": (),
    "detector": (),
    "reward": ("judge", "environment"),
    "source": (),
    "environment": ("verifiers", "tools"),
    "loss": (),
    "truncated": (),
    "lr_schedule": (),
    "sink": (),
    "backpressure": (),
}

CHECKS = (
    "penalize_text_containing",
    "length",
    "regex",
    "format",
    "language",
    "json_schema",
    "overlong",
)
"""Constraints that a part of a composite reward may be, besides rewards."""

OPEN = (
    "advantage",
    "transform",
    "algorithm",
    "uncertainty",
    "detector",
    "reward",
    "source",
    "environment",
    "engine",
    "loss",
    "backend",
    "sink",
    "backpressure",
)
"""Kinds that also take the dotted path of a plug-in."""

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
