"""The memory plan: how much work one forward pass may hold on a device of a given size.

Imports no torch, so that an estimate follows the very plan that a run will follow: devices and number formats may be
torch's own or the two small types here.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol

_MEMORY_CLASSES_GB = (8, 12, 15, 16, 22, 24, 32, 40, 44, 48, 80, 96, 141, 178, 192)
"""GiB. 22, 44 and 178: what cards with error correction leave of 24, 48 and 192."""
_REACHED = 0.95
"""Share of a class that a device must show. A driver tells up to 3 % more than torch for the same card, and no known card
has a class's edge between the two."""
_CPU_BUDGET_GB = 8
_CEILING_TOKENS = {"cuda": 16384, "cpu": 2048}
"""Tokens of a microbatch past which products gain nothing: only memory would grow."""
_ENOUGH_TOKENS = 4096
"""Tokens of one pass that fill a CUDA device: where fewer fit in a microbatch, recomputing activations pays, and a
sampler's pass over prompts needs no more."""


class Device(Protocol):
    """What the plan asks of a device: ``cuda`` or ``cpu``. A torch.device is one."""

    @property
    def type(self) -> str: ...


class NumberFormat(Protocol):
    """What the plan asks of a number format: bytes per number. A torch.dtype is one."""

    @property
    def itemsize(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Card:
    """A device that need not be here: ``type`` cuda or cpu, ``total_memory`` in bytes."""

    type: str
    total_memory: int


@dataclass(frozen=True, slots=True)
class Format:
    """A number format: bytes per number."""

    itemsize: int


def class_of(total_bytes: float) -> int:
    """The memory class, in GiB, of a device with so many bytes, as its driver, torch or a table of cards tells them."""
    total = total_bytes / 2**30
    return max((c for c in _MEMORY_CLASSES_GB if c * _REACHED <= total), default=_MEMORY_CLASSES_GB[0])


def _class_gb(device: Device) -> int:
    if isinstance(device, Card):
        total = device.total_memory
    elif device.type == "cuda":
        # By name: whoever holds a torch device has imported torch, everyone else must do without.
        cuda: Any = import_module("torch.cuda")
        total = cuda.get_device_properties(device).total_memory
    else:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return class_of(total)


def merged_copies_fit(parameters: int, device: Device, dtype: NumberFormat) -> bool:
    """May sampling hold merged float32 copies beside the base? Where both leave 40 % of the memory class. A bf16 base
    whose products are float32 is held in both formats."""
    held = 4 if dtype.itemsize == 4 else 4 + dtype.itemsize
    return (held + 4) * parameters <= 0.6 * _class_gb(device) * 2**30


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """How much work one forward pass may hold. A function of the configuration, the model's shape and the
    device's memory class, never of the memory free at the moment, so that a resumed run cuts the same pieces.

    ``kv_tokens``: cache entries of all rows sampled together, ``sample_rows`` their number;
    ``microbatch_tokens``: tokens of one learner microbatch, shared prompts counted once; ``head_tokens``: most positions
    that pass the output head at once; ``checkpointing``: recompute activations in the backward pass; ``prefill_tokens``:
    prompt tokens of one of the sampler's passes, beside a full cache. The cache, and what is parked of it, is given back
    before the learner runs, so each of the two may have what the other had.
    """

    kv_tokens: int
    sample_rows: int
    microbatch_tokens: int
    head_tokens: int
    checkpointing: bool
    prefill_tokens: int = _ENOUGH_TOKENS

    @classmethod
    def for_model(
        cls, config: Any, device: Device, dtype: NumberFormat, parameters: int, longest: int
    ) -> MemoryPlan:
        """Plan for a model of ``parameters`` weights and rows of at most ``longest`` tokens."""
        gigabytes = _class_gb(device) if device.type == "cuda" else _CPU_BUDGET_GB
        size = dtype.itemsize
        copies = 2 if size == 4 and merged_copies_fit(parameters, device, dtype) else 1
        weights = copies * parameters * size if device.type == "cuda" else 0
        room = max(gigabytes * 2**30 * 0.9 - weights, gigabytes * 2**30 * 0.1)
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        cuda = device.type == "cuda"
        hidden, layers = config.hidden_size, config.num_hidden_layers
        kv_bytes = 2 * layers * heads * head_dim * size
        # The arena grows one layer at a time, so beside the cache there is one layer's old half at most.
        kv_tokens = int(room * (0.85 if cuda else 0.5) / (kv_bytes * (1 + 0.5 / layers)))
        # Drawing a token holds about six numbers per row and vocabulary entry, some of them 8 bytes wide.
        sample_rows = max(1, int(room * 0.1 / (config.vocab_size * 40)))
        layer = layer_bytes(config, heads, head_dim, size, cuda)
        kept_bytes = layer * layers
        budget = room * 0.6
        # Beside what all layers keep stand the gradients of the layer that the backward pass is in.
        tokens = budget / (kept_bytes + layer)
        checkpointing = cuda and tokens < max(longest, _ENOUGH_TOKENS)
        if checkpointing:
            tokens = budget / (size * hidden * layers + 2 * layer)
        head_tokens = max(16, min(4096, int(room * 0.02 / (hidden * 16))))
        ceiling = _CEILING_TOKENS["cuda" if cuda else "cpu"]
        # What is left beside cache and draw. A layer holds at most what it would keep for a backward pass.
        prefill_tokens = max(64, int(min(room * 0.05 / layer, _ENOUGH_TOKENS, ceiling)))
        microbatch_tokens = max(int(min(tokens, ceiling)), longest)
        return cls(kv_tokens, sample_rows, microbatch_tokens, head_tokens, checkpointing, prefill_tokens)


def layer_bytes(config: Any, kv_heads: int, head_dim: int, size: int, cuda: bool) -> float:
    """Bytes that one layer keeps of a token for its backward pass: residual and normed inputs of both halves; queries, keys and
    values before and after the rotation and once more padded; the attention's output twice; gate, up and their product."""
    queries = config.num_attention_heads * head_dim
    heads = queries + 2 * kv_heads * head_dim
    width = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    # On the CPU attention runs in float32 whatever the model's format is.
    attended = size if cuda else 4
    return size * (4 * config.hidden_size + 2 * heads + queries + 3 * width) + attended * (heads + queries)
