"""Attention over a flat axis of tokens in padded blocks: sequences of similar lengths, each alone or after the keys of a
prefix that several share."""

# torch is only partly typed: what it returns is Any here.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from retrain.attention import attention

_CHUNK = 1024
"""Queries of one call where each needs a mask: a whole mask of 16k by 16k would fill a small device."""


@dataclass(frozen=True, slots=True)
class Block:
    """B sequences that lie on the axis one after the other from ``start`` on, padded on the right to T queries and S keys.

    Sequence b has ``own`` tokens and sees before them ``prefix`` keys that lie elsewhere on the axis. ``queries_BT`` and
    ``keys_BS`` say which token of the axis stands in each place (any token in padding: no real query sees it, and its own
    output is dropped), ``own_n`` and ``own_keys_n`` in which place each token of the block stands; None where that is the
    identity. ``shared`` says how the gradients of prefix keys find their tokens.
    """

    start: int
    tokens: int
    rows: int
    length: int
    width: int
    prefix: int | None
    queries_BT: torch.Tensor | None
    own_n: torch.Tensor | None
    keys_BS: torch.Tensor | None
    own_keys_n: torch.Tensor | None
    shared: Shared | None
    prefix_B: torch.Tensor
    masks: dict[tuple[int | None, int], torch.Tensor] = field(
        default_factory=dict[tuple[int | None, int], torch.Tensor]
    )

    @classmethod
    def of(
        cls,
        *,
        start: int,
        own: Sequence[int],
        prefix: Sequence[int],
        prefix_start: Sequence[int],
        device: torch.device,
    ) -> Block:
        """The block of these sequences, the longest first."""
        owns, prefixes = np.asarray(own), np.asarray(prefix)
        length, width = int(owns.max()), int((owns + prefixes).max())
        begins = start + np.cumsum(owns) - owns

        def on_device(values: npt.NDArray[np.int64] | None) -> torch.Tensor | None:
            return None if values is None else torch.as_tensor(values, dtype=torch.int64, device=device)

        at = np.arange(length)
        real = at < owns[:, None]
        full = bool(real.all())
        queries = np.where(real, begins[:, None] + at, start).ravel()
        places = np.flatnonzero(real.ravel())
        keys = own_keys = None
        if prefixes.any():
            at = np.arange(width)
            behind = at - prefixes[:, None]
            mine = (behind >= 0) & (behind < owns[:, None])
            keys = np.where(mine, begins[:, None] + behind, start)
            keys = np.where(behind < 0, np.asarray(prefix_start)[:, None] + at, keys).ravel()
            own_keys = np.flatnonzero(mine.ravel())
        return cls(
            start=start,
            tokens=int(owns.sum()),
            rows=len(owns),
            length=length,
            width=width,
            prefix=int(prefixes[0]) if (prefixes == prefixes[0]).all() else None,
            queries_BT=None if full else on_device(queries),
            own_n=None if full else on_device(places),
            keys_BS=on_device(keys),
            own_keys_n=on_device(own_keys),
            shared=Shared.of(prefixes, np.asarray(prefix_start), device) if keys is not None else None,
            prefix_B=torch.as_tensor(prefixes, device=device),
        )

    def mask(self, first: int, last: int, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """What is added to the scores of queries ``first`` to ``last``: 0 or -inf, broadcastable to (B, 1, T, S).

        Made once: every layer's backward pass keeps the mask that its forward pass was given.
        """
        key = (window, first)
        if key not in self.masks:
            device = self.prefix_B.device
            # A number that is not a multiple of 8 makes CUDA's kernel copy the mask at each call.
            keys = torch.arange(-(-self.width // 8) * 8, device=device)
            query = torch.arange(first, last, device=device)[:, None]
            prefix = self.prefix_B[:, None, None, None] if self.prefix is None else self.prefix_B[0]
            sees = keys <= prefix + query
            if window:
                # A padded query far behind its sequence would see nothing at all, which is NaN: it sees the last key.
                sees = sees & (keys > (prefix + query - window).clamp_max(self.width - 2))
            made = torch.zeros(sees.shape, dtype=dtype, device=device).masked_fill_(~sees, float("-inf"))
            self.masks[key] = made
        return self.masks[key][..., : self.width]

    def attend(
        self,
        q_BTHD: torch.Tensor,
        k_BSKD: torch.Tensor,
        v_BSKD: torch.Tensor,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        """(B, T, H, D) outputs."""
        q, k, v = (x.transpose(1, 2) for x in (q_BTHD, k_BSKD, v_BSKD))
        window = window if window and window < self.width else None
        cuda = q.device.type == "cuda"
        plain = window is None and self.prefix == 0
        if cuda and q.shape[1] != k.shape[1] and not (plain and q.dtype != torch.float32):
            # There only the flash kernel knows grouped heads, and it takes neither masks nor float32.
            times = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(times, 1), v.repeat_interleave(times, 1)
        if plain:
            return attention(q, k, v, scale=scale, causal=True).transpose(1, 2)
        if cuda and window is None and self.prefix is not None and q.dtype != torch.float32:
            from torch.nn.attention.bias import causal_lower_right

            bias: Any = causal_lower_right(self.length, self.width)
            return attention(q, k, v, scale=scale, mask=bias).transpose(1, 2)
        dtype = q.dtype if cuda else torch.float32
        if self.length <= _CHUNK:
            mask = self.mask(0, self.length, window, dtype)
            return attention(q, k, v, scale=scale, mask=mask).transpose(1, 2)
        prefix = self.prefix
        parts: list[torch.Tensor] = []
        for first in range(0, self.length, _CHUNK):
            last = min(first + _CHUNK, self.length)
            start = max(0, prefix + first - window + 1) if window and prefix is not None else 0
            stop = self.width if prefix is None else min(self.width, prefix + last)
            mask = self.mask(first, last, window, dtype)[..., start:stop]
            parts.append(
                attention(
                    q[:, :, first:last], k[:, :, start:stop], v[:, :, start:stop], scale=scale, mask=mask
                )
            )
        return torch.cat(parts, 2).transpose(1, 2)


@dataclass(frozen=True, slots=True)
class Shared:
    """How the gradients of a block's prefix keys, (B, S) places, add up into the tokens of the prefixes they are of: the
    rows of a prefix are summed by a product with ``member_FB``, then place ``from_p`` of (F, P) goes to token ``to_p``."""

    width: int
    member_FB: torch.Tensor
    from_p: torch.Tensor
    to_p: torch.Tensor

    @classmethod
    def of(cls, prefix: npt.NDArray[Any], start: npt.NDArray[Any], device: torch.device) -> Shared:
        """Of rows with ``prefix`` keys from ``start`` on the axis on; rows of prefix 0 have none."""
        named = sorted({(int(s), int(p)) for s, p in zip(start, prefix, strict=True) if p})
        starts, lengths = np.array([s for s, _ in named]), np.array([p for _, p in named])
        width = int(lengths.max())
        member = (starts[:, None] == start) & (prefix > 0)
        real = np.arange(width) < lengths[:, None]
        to = (starts[:, None] + np.arange(width))[real]
        return cls(
            width,
            torch.as_tensor(member, dtype=torch.float32, device=device),
            torch.as_tensor(np.flatnonzero(real.ravel()), device=device),
            torch.as_tensor(to, dtype=torch.int64, device=device),
        )

    def add(self, into_ND: torch.Tensor, slopes_BSD: torch.Tensor) -> None:
        """Add the gradients to those of the tokens."""
        picked = slopes_BSD[:, : self.width].reshape(slopes_BSD.shape[0], -1)
        sums = (self.member_FB.to(picked.dtype) @ picked).view(-1, into_ND.shape[1])
        # No token twice, so the order of the sums cannot vary.
        into_ND[self.to_p] += sums.index_select(0, self.from_p)


class Padding:
    """``Attend`` over blocks that together are the whole axis, in order."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        self.blocks = tuple(blocks)

    def __call__(
        self,
        layer: int,
        q_NHD: torch.Tensor,
        k_NKD: torch.Tensor,
        v_NKD: torch.Tensor,
        *,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        """Outputs (N, H, D)."""
        del layer
        padded: Any = _Padded.apply(q_NHD, k_NKD, v_NKD, self.blocks)
        parts: list[torch.Tensor] = []
        for i, block in enumerate(self.blocks):
            q, k, v = padded[3 * i : 3 * i + 3]
            parts.append(block.attend(q, k, v, scale, window))
        out: Any = _Flattened.apply(self.blocks, len(q_NHD), *parts)
        return out


class _Padded(torch.autograd.Function):
    """Queries, keys and values of the axis to those of each block. As an operation of its own because autograd's gradient
    of an index adds slot by slot into a whole axis for each block; here each token's slots are known."""

    @staticmethod
    def forward(
        ctx: Any, q_NHD: torch.Tensor, k_NKD: torch.Tensor, v_NKD: torch.Tensor, blocks: tuple[Block, ...]
    ) -> tuple[torch.Tensor, ...]:
        ctx.blocks, ctx.tokens = blocks, len(q_NHD)
        out: list[torch.Tensor] = []
        for block in blocks:
            for x, index, width in (
                (q_NHD, block.queries_BT, block.length),
                (k_NKD, block.queries_BT if block.keys_BS is None else block.keys_BS, block.width),
                (v_NKD, block.queries_BT if block.keys_BS is None else block.keys_BS, block.width),
            ):
                here = (
                    x[block.start : block.start + block.tokens] if index is None else x.index_select(0, index)
                )
                out.append(here.reshape(block.rows, width, *x.shape[1:]))
        return tuple(out)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        blocks: tuple[Block, ...] = ctx.blocks
        made: list[torch.Tensor] = []
        for kind in range(3):
            parts: list[torch.Tensor] = []
            for block, slope in zip(blocks, grads[kind::3], strict=True):
                index = block.own_n if kind == 0 or block.keys_BS is None else block.own_keys_n
                flat = slope.reshape(-1, *slope.shape[2:])
                parts.append(flat if index is None else flat.index_select(0, index))
            out = torch.cat(parts) if len(parts) > 1 else parts[0]
            if kind:
                flat_out = out.view(len(out), -1)
                for block, slope in zip(blocks, grads[kind::3], strict=True):
                    if block.shared is not None:
                        block.shared.add(flat_out, slope.reshape(*slope.shape[:2], -1))
            made.append(out)
        return (*made, None)


class _Flattened(torch.autograd.Function):
    """The blocks' outputs (B, T, H, D) to the axis."""

    @staticmethod
    def forward(ctx: Any, blocks: tuple[Block, ...], tokens: int, *parts: torch.Tensor) -> torch.Tensor:
        ctx.blocks = blocks
        made: list[torch.Tensor] = []
        for block, part in zip(blocks, parts, strict=True):
            flat = part.reshape(-1, *part.shape[2:])
            made.append(flat if block.own_n is None else flat.index_select(0, block.own_n))
        if not made:
            raise ValueError("an axis without tokens has no attention")
        return torch.cat(made) if len(made) > 1 else made[0]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        blocks: tuple[Block, ...] = ctx.blocks
        slope = grads[0]
        made: list[torch.Tensor] = []
        for block in blocks:
            here = slope[block.start : block.start + block.tokens]
            if block.own_n is not None:
                # Padded queries must pass no gradient on.
                padded = here.new_zeros(block.rows * block.length, *here.shape[1:])
                here = padded.index_copy_(0, block.own_n, here)
            made.append(here.reshape(block.rows, block.length, *here.shape[1:]))
        return (None, None, *made)
