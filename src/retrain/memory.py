"""The memory plan: how much work one forward pass may hold on a device of a given size."""

# torch is only partly typed: what it returns is Any here.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch

_MEMORY_CLASSES_GB = (8, 12, 16, 24, 32, 40, 48, 80, 96, 141, 192)
_CPU_BUDGET_GB = 8


def _class_gb(device: torch.device) -> int:
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory / 2**30
    else:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return max((c for c in _MEMORY_CLASSES_GB if c * 0.93 <= total), default=_MEMORY_CLASSES_GB[0])


def merged_copies_fit(parameters: int, device: torch.device) -> bool:
    """May float32 sampling hold merged copies beside the base? Where both leave 40 % of the memory class."""
    return 2 * 4 * parameters <= 0.6 * _class_gb(device) * 2**30


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """How much work one forward pass may hold. A function of the configuration, the model's shape and the
    device's memory class, never of the memory free at the moment, so that a resumed run cuts the same pieces.

    ``kv_tokens``: cache entries of all rows sampled together, ``sample_rows`` their number;
    ``microbatch_tokens``: padded tokens of one learner microbatch; ``head_tokens``: positions that pass the
    output head at once; ``checkpointing``: recompute activations in the backward pass.
    """

    kv_tokens: int
    sample_rows: int
    microbatch_tokens: int
    head_tokens: int
    checkpointing: bool

    @classmethod
    def for_model(
        cls, config: Any, device: torch.device, dtype: torch.dtype, parameters: int, longest: int
    ) -> MemoryPlan:
        """Plan for a model of ``parameters`` weights and rows of at most ``longest`` tokens."""
        gigabytes = _class_gb(device) if device.type == "cuda" else _CPU_BUDGET_GB
        size = dtype.itemsize
        copies = 2 if dtype == torch.float32 and merged_copies_fit(parameters, device) else 1
        weights = copies * parameters * size if device.type == "cuda" else 0
        room = max(gigabytes * 2**30 * 0.9 - weights, gigabytes * 2**30 * 0.1)
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        kv_bytes = 2 * config.num_hidden_layers * heads * head_dim * size
        # Appending to the cache copies one layer at a time, so twice the cache is the bound that always holds.
        kv_tokens = int(room * 0.5 / (2 * kv_bytes))
        # Drawing a token holds about six numbers per row and vocabulary entry, some of them 8 bytes wide.
        sample_rows = max(1, int(room * 0.1 / (config.vocab_size * 40)))
        width = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
        layer_bytes = size * (14 * config.hidden_size + 5 * width)
        kept_bytes = layer_bytes * config.num_hidden_layers
        budget = room * 0.5
        checkpointing = device.type == "cuda" and budget / kept_bytes < 4 * longest
        tokens = (
            (budget - layer_bytes * longest) / (size * config.hidden_size * config.num_hidden_layers)
            if checkpointing
            else budget / kept_bytes
        )
        head_tokens = max(16, min(8192, int(room * 0.05 / (config.vocab_size * 12))))
        ceiling = 65536 if device.type == "cuda" else 8192  # a CPU gains nothing past its caches
        return cls(
            kv_tokens, sample_rows, max(int(min(tokens, ceiling)), longest), head_tokens, checkpointing
        )
