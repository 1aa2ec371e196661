"""Rows of a microbatch on one axis of tokens without padding, prompts that rows share computed once, and the attention
that knows which token sees which. Leaves out: which rows make a microbatch, and the loss."""

# torch is only partly typed: what it returns is Any here.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from retrain.backends.padding import Block, Padding
from retrain.types import TrainRow

_SHARE_AT = 50
"""A prompt is shared where that saves one token in this many: below, copying its keys to the rows costs as much."""

_CALL_WORTH = {"cpu": 1 << 15, "cuda": 1 << 21}
"""Scores (query times key, of one head) that cost as much as one more attention call."""

_MIXED_UP_TO = 1 << 22
"""Scores up to which blocks may hold prefixes of several lengths: each row then has a mask of its own."""


@dataclass(frozen=True, slots=True)
class Packed:
    """A microbatch on the device. Per token of the axis (N,): ids and positions; per sampled token (M,), row by row in the
    order given: which hidden state comes before it, the token, its row, the sampler's logprob, advantage and weight."""

    ids_N: torch.Tensor
    positions_N: torch.Tensor
    before_M: torch.Tensor
    targets_M: torch.Tensor
    row_M: torch.Tensor
    sampler_M: torch.Tensor
    advantages_M: torch.Tensor
    weights_M: torch.Tensor
    attend: Padding


@dataclass(frozen=True, slots=True)
class Family:
    """Rows (numbers) that share their first ``prompt`` tokens, 0 where each is computed alone; and per row the tokens that
    need a forward pass, those before its last sampled one."""

    rows: tuple[int, ...]
    prompt: int
    needed: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Tokens on the axis."""
        return self.prompt + sum(n - self.prompt for n in self.needed)


@dataclass(frozen=True, slots=True)
class _Segment:
    """A run of tokens on the axis: ``own`` tokens of a row from place ``prefix`` on, after those of family ``family``."""

    row: int
    own: int
    prefix: int = 0
    family: int = -1


def families(rows: Sequence[TrainRow]) -> list[Family]:
    """The rows by the prompt that they share, in order of first appearance; a row that shares none is a family alone."""
    ends = [int(np.flatnonzero(row.sampled_T)[-1]) if row.sampled_T.any() else 0 for row in rows]
    found: dict[bytes, list[int]] = {}
    for i, row in enumerate(rows):
        first = int(row.sampled_T.argmax()) if ends[i] else 0
        # A row without a sampled token is alone: it needs no pass at all.
        key = row.token_ids_T[:first].tobytes() if first else str(i).encode()
        found.setdefault(key, []).append(i)
    made: list[Family] = []
    for members in found.values():
        prompt = int(rows[members[0]].sampled_T.argmax())
        needed = tuple(ends[i] for i in members)
        if len(members) > 1 and (len(members) - 1) * prompt * _SHARE_AT >= sum(needed):
            made.append(Family(tuple(members), prompt, needed))
        else:
            made += [Family((i,), 0, (n,)) for i, n in zip(members, needed, strict=True)]
    return made


def plan_microbatches(made: Sequence[Family], max_tokens: int) -> list[list[int]]:
    """Row numbers per microbatch, longest first (what does not fit fails at once, not after hours), with at most
    ``max_tokens`` tokens on the axis wherever a microbatch holds more than one row. A family is cut only where it
    exceeds a microbatch of its own."""
    plan: list[list[int]] = []
    used = 0
    for family in sorted(made, key=lambda f: (-max(f.needed), f.rows[0])):
        room = bool(plan) and used + family.tokens <= max_tokens
        whole = room or family.tokens <= max_tokens
        if not room:
            plan.append([])
            used = 0
        prompt = family.prompt
        used += prompt
        order = sorted(range(len(family.rows)), key=lambda j: (-family.needed[j], family.rows[j]))
        for j in order:
            own = family.needed[j] - family.prompt
            if not whole and plan[-1] and used + own > max_tokens:
                plan.append([])
                used = prompt
            plan[-1].append(family.rows[j])
            used += own
    return plan


def pack_rows(
    rows: Sequence[TrainRow], weights: Sequence[npt.NDArray[np.float64]], device: torch.device
) -> Packed:
    """The microbatch of these rows; ``weights`` holds one number per token of each row."""
    made = families(rows)
    segments: list[_Segment] = []
    prompts = [f for f in made if f.prompt]
    for number, family in enumerate(prompts):
        segments.append(_Segment(family.rows[0], family.prompt))
        segments += [
            _Segment(i, n - family.prompt, family.prompt, number)
            for i, n in zip(family.rows, family.needed, strict=True)
        ]
    segments += [_Segment(f.rows[0], f.needed[0]) for f in made if not f.prompt]
    blocks = _blocks(segments, _CALL_WORTH.get(device.type, _CALL_WORTH["cuda"]))
    ids: list[npt.NDArray[np.int32]] = []
    positions: list[npt.NDArray[np.int64]] = []
    # Per row: where its own tokens start on the axis, minus their place in the row; per family where its prompt starts.
    shifts = np.zeros(len(rows), dtype=np.int64)
    heads = np.zeros(len(prompts), dtype=np.int64)
    prompt_of = {f.rows[0]: number for number, f in enumerate(prompts)}
    at = 0
    for block in blocks:
        for segment in block:
            stop = segment.prefix + segment.own
            ids.append(rows[segment.row].token_ids_T[segment.prefix : stop])
            positions.append(np.arange(segment.prefix, stop))
            if segment.family < 0 and segment.row in prompt_of:
                heads[prompt_of[segment.row]] = at
            else:
                shifts[segment.row] = at - segment.prefix
            at += segment.own
    before: list[npt.NDArray[np.int64]] = []
    home = {i: number for number, f in enumerate(prompts) for i in f.rows}
    sampled = [np.flatnonzero(row.sampled_T) for row in rows]
    for i, places in enumerate(sampled):
        index = places - 1 + shifts[i]
        if i in home:
            # What comes before the first sampled token is the shared prompt's last one.
            index[0] = heads[home[i]] + prompts[home[i]].prompt - 1
        before.append(index)

    def of_sampled(arrays: Sequence[npt.NDArray[Any]], dtype: Any) -> torch.Tensor:
        picked = [a[s] for a, s in zip(arrays, sampled, strict=True)]
        return torch.as_tensor(np.concatenate(picked).astype(dtype), device=device)

    def whole(arrays: Sequence[npt.NDArray[Any]]) -> torch.Tensor:
        joined = np.concatenate(arrays) if arrays else np.zeros(0)
        return torch.as_tensor(joined.astype(np.int64), device=device)

    return Packed(
        ids_N=whole(ids),
        positions_N=whole(positions),
        before_M=whole(before),
        targets_M=of_sampled([row.token_ids_T for row in rows], np.int64),
        row_M=whole([np.full(len(s), i) for i, s in enumerate(sampled)]),
        sampler_M=of_sampled([row.old_logprobs_T for row in rows], np.float32),
        advantages_M=of_sampled([row.advantages_T for row in rows], np.float32),
        weights_M=of_sampled(weights, np.float32),
        attend=_padding(blocks, heads, device),
    )


def _blocks(segments: Sequence[_Segment], worth: int) -> list[list[_Segment]]:
    """Segments that one attention call computes together: of similar lengths, so that what padding wastes stays below what
    one more call costs."""
    kept = [s for s in segments if s.own]
    small = sum(s.own * (s.own + s.prefix) for s in kept) <= _MIXED_UP_TO
    kept.sort(key=lambda s: (0 if small else s.prefix, -s.own, s.row))
    blocks: list[list[_Segment]] = []
    real = width = 0
    for segment in kept:
        area = segment.own * (segment.own + segment.prefix)
        if blocks and (small or blocks[-1][0].prefix == segment.prefix):
            widest = max(width, segment.own + segment.prefix)
            padded = (len(blocks[-1]) + 1) * blocks[-1][0].own * widest
            if padded - real - area <= worth:
                blocks[-1].append(segment)
                real, width = real + area, widest
                continue
        blocks.append([segment])
        real, width = area, segment.own + segment.prefix
    return blocks


def _padding(
    blocks: Sequence[Sequence[_Segment]], heads: npt.NDArray[np.int64], device: torch.device
) -> Padding:
    made: list[Block] = []
    at = 0
    for block in blocks:
        made.append(
            Block.of(
                start=at,
                own=[s.own for s in block],
                prefix=[s.prefix for s in block],
                prefix_start=[int(heads[s.family]) if s.family >= 0 else 0 for s in block],
                device=device,
            )
        )
        at += sum(s.own for s in block)
    return Padding(made)
