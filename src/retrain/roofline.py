"""The least work that a step's phases need, in floating point operations and bytes of memory traffic, and how long a
device of given peaks takes for it (Williams et al., Roofline, 2009).

Counts are of a dense decoder with grouped-query attention and a gated MLP. A product of (m, k) and (k, n) is 2 m k n
operations; norms, activations, rotations and softmax are left out, as in every published share of peak. Attention is
causal: a token at 0-based position t sees t + 1 keys.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from retrain.errors import ModelError

Bound = Literal["compute", "memory"]


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a decoder, in numbers; ``intermediate`` is the width of its gated MLP."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool

    @classmethod
    def of(cls, config: Any) -> Shape:
        """From a Hugging Face configuration; ModelError where it is not that of a dense decoder."""
        if getattr(config, "num_experts", 0) or getattr(config, "num_local_experts", 0):
            raise ModelError("the roofline counts dense models, not mixtures of experts.")
        try:
            heads = int(config.num_attention_heads)
            return cls(
                hidden=int(config.hidden_size),
                layers=int(config.num_hidden_layers),
                heads=heads,
                kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
                head_dim=int(getattr(config, "head_dim", None) or config.hidden_size // heads),
                intermediate=int(config.intermediate_size),
                vocab=int(config.vocab_size),
                tied=bool(getattr(config, "tie_word_embeddings", False)),
            )
        except AttributeError as error:
            raise ModelError(
                f"the roofline needs the model's {error.name}, which its configuration lacks."
            ) from error

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of each linear layer of one block."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (self.hidden, q),
            "k_proj": (self.hidden, kv),
            "v_proj": (self.hidden, kv),
            "o_proj": (q, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }

    @property
    def block_weights(self) -> int:
        """Weights of all blocks' linear layers."""
        return self.layers * sum(i * o for i, o in self.linears.values())

    @property
    def head_weights(self) -> int:
        """Weights of the output head."""
        return self.hidden * self.vocab

    @property
    def weights(self) -> int:
        """All weights of linear layers, head and embedding, a tied one counted once."""
        return self.block_weights + self.head_weights * (1 if self.tied else 2)

    def adapter_weights(self, rank: int, targets: Iterable[str] | None = None) -> int:
        """Weights of a LoRA adapter of ``rank`` on the named linear layers (all of them by default)."""
        chosen = self.linears if targets is None else {name: self.linears[name] for name in targets}
        return self.layers * rank * sum(i + o for i, o in chosen.values())

    @property
    def kv_numbers(self) -> int:
        """Numbers that the cache holds per token: keys and values of every layer."""
        return 2 * self.layers * self.kv_heads * self.head_dim

    @property
    def pair_flops(self) -> int:
        """Operations of one query with one key, all heads and layers: score and weighted sum."""
        return 4 * self.layers * self.heads * self.head_dim


@dataclass(frozen=True, slots=True)
class Work:
    """Operations and bytes of memory traffic that cannot be avoided."""

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)


@dataclass(frozen=True, slots=True)
class Peaks:
    """What a device reaches: operations per second of a matrix product, bytes per second of reading or copying."""

    flops: float
    bandwidth: float


@dataclass(frozen=True, slots=True)
class Floor:
    """The shortest time that a device of given peaks needs for some work, and which peak decides it."""

    work: Work
    seconds: float
    bound: Bound

    def share(self, seconds: float) -> float:
        """Share of the roof that a phase of ``seconds`` reached: 1 is as fast as the device can."""
        return self.seconds / seconds if seconds > 0 else 0.0


def floor(pieces: Sequence[Work], peaks: Peaks) -> Floor:
    """Pieces one after the other, each as long as its scarcer resource takes."""
    compute = np.array([w.flops for w in pieces]) / peaks.flops
    memory = np.array([w.bytes for w in pieces]) / peaks.bandwidth
    work = sum(pieces, Work())
    bound: Bound = "compute" if compute.sum() >= memory.sum() else "memory"
    return Floor(work, float(np.maximum(compute, memory).sum()), bound)


def _pairs(start: int, stop: int) -> int:
    """Query-key pairs of the tokens at positions start .. stop - 1."""
    return (stop * (stop + 1) - start * (start + 1)) // 2


def prefill(
    shape: Shape,
    prompts: Sequence[int],
    itemsize: int,
    *,
    kv_itemsize: float | None = None,
    adapter: int = 0,
) -> Work:
    """All prompts of these lengths in one pass, each once, with the head at its last token.

    ``itemsize``: bytes per weight; ``kv_itemsize``: bytes per number in the cache (None: the same); ``adapter``: weights of
    an adapter that is not merged (0: merged).
    """
    tokens = sum(prompts)
    flops = 2.0 * (shape.block_weights + adapter) * tokens + 2.0 * shape.head_weights * len(prompts)
    flops += shape.pair_flops * sum(_pairs(0, p) for p in prompts)
    weights = (shape.block_weights + shape.head_weights + adapter) * itemsize
    return Work(
        flops, float(weights + shape.kv_numbers * (kv_itemsize or itemsize) * tokens) if tokens else 0.0
    )


def decode(
    shape: Shape,
    prompts: Sequence[int],
    lengths: Sequence[int],
    itemsize: int,
    *,
    kv_itemsize: float | None = None,
    adapter: int = 0,
) -> list[Work]:
    """One piece per decode step, for rows that all start together and leave when their length is reached.

    Row i has a prompt of ``prompts[i]`` tokens and samples ``lengths[i]``; its first token comes from the prefill. In
    each step every weight is read once and every live row reads its whole cache.
    """
    kv = shape.kv_numbers * (kv_itemsize or itemsize)
    read = float((shape.block_weights + shape.head_weights + adapter) * itemsize)
    per_row = 2.0 * (shape.block_weights + shape.head_weights + adapter)
    longest = max(lengths, default=0)
    # Sums over the rows still alive in step t = 1 .., from where each of them ends.
    alive, context = np.zeros(longest + 1), np.zeros(longest + 1)
    for p, n in zip(prompts, lengths, strict=True):
        alive[1:n] += 1
        context[1:n] += p
    keys = context + alive * np.arange(longest + 1)
    return [
        Work(per_row * rows + shape.pair_flops * seen, read + kv * seen)
        for rows, seen in zip(alive.tolist()[1:], keys.tolist()[1:], strict=True)
        if rows
    ]


@dataclass(frozen=True, slots=True)
class Row:
    """A row to train on: ``shared`` tokens that an earlier row of its group brings, so they need not be computed again;
    ``tokens`` in all; ``sampled`` of them pass the head."""

    tokens: int
    sampled: int
    shared: int = 0


def learn(shape: Shape, rows: Sequence[Row], itemsize: int, *, adapter: int) -> Work:
    """One update: forward and backward with frozen weights and a trained adapter of ``adapter`` weights.

    Per computed token 2 P forward and 2 P backward through the P frozen weights (they take no gradient), 6 per adapter
    weight, 3 times the forward attention; the head 4 per weight at sampled tokens only. Recomputed activations are no
    work: they cost time and count nothing.
    """
    flops = 0.0
    for row in rows:
        tokens = row.tokens - row.shared
        flops += (4.0 * shape.block_weights + 6.0 * adapter) * tokens
        flops += 3.0 * shape.pair_flops * _pairs(row.shared, row.tokens)
        flops += 4.0 * shape.head_weights * row.sampled
    # Forward and backward each read the weights at least once.
    read = 2.0 * (shape.block_weights + shape.head_weights) * itemsize if rows else 0.0
    return Work(flops, read)
