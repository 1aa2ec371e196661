"""The KV arena: keys and values of the sequences being sampled, and the two kinds of attention over them.

Each layer has planes of shape (R rows, K heads, C capacity, D); row r holds one sequence from position 0 on. Leaves out:
which sequence is in which row, and when to grow; that is the schedule's.
"""

# torch is only partly typed: what it returns is Any here.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from retrain.attention import attention
from retrain.types import IntArray

_FLOAT8_MAX = 448.0
_CELLS = 2**26
"""Most entries of one prefill mask."""
_QUERIES = 1024
"""Queries of one call where each needs a mask."""
_KEYS = 2**16
"""Most keys that are gathered from rows of the arena at once."""


@dataclass(frozen=True, slots=True)
class Parked:
    """A sequence taken out of the arena: its tokens, and per layer its planes (K, length, .)."""

    token_ids_T: IntArray
    planes: tuple[tuple[torch.Tensor, ...], ...]

    @property
    def bytes(self) -> int:
        """Memory held."""
        return sum(p.numel() * p.element_size() for planes in self.planes for p in planes)


def _squeeze(x_NKD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, K, D) as bits of float8_e4m3fn and their scales (N, K, 1), one a token and head."""
    x = x_NKD.float()
    scale = x.abs().amax(-1, keepdim=True).clamp_min_(1e-12) / _FLOAT8_MAX
    bits = (x / scale).clamp_(-_FLOAT8_MAX, _FLOAT8_MAX).to(torch.float8_e4m3fn).view(torch.uint8)
    return bits, scale


def _spread(bits: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (bits.view(torch.float8_e4m3fn).float() * scale).to(dtype)


class Arena:
    """Keys and values of at most ``rows`` sequences of at most ``capacity`` tokens each.

    ``eight_bit`` stores float8 (e4m3) with a float32 scale for every token and head: half the memory of bf16, and
    samples from a slightly different model than the learner trains.
    """

    def __init__(self, eight_bit: bool = False) -> None:
        self.rows = self.capacity = 0
        self._eight_bit = eight_bit
        self._layers: dict[int, list[torch.Tensor]] = {}

    @property
    def bytes(self) -> int:
        """Memory held."""
        return sum(p.numel() * p.element_size() for planes in self._layers.values() for p in planes)

    def resize(self, rows: int, capacity: int, live: int, length: int) -> None:
        """Reallocate, one layer at a time, keeping the first ``length`` tokens of the first ``live`` rows."""
        self.rows, self.capacity = rows, capacity
        for planes in self._layers.values():
            for i, old in enumerate(planes):
                new = self._plane(old, old.shape[1], old.shape[3])
                new[:live, :, :length] = old[:live, :, :length]
                planes[i] = new

    def _plane(self, like: torch.Tensor, heads: int, width: int) -> torch.Tensor:
        # Zeros: what is masked is still multiplied, and memory as it comes may hold NaN.
        return like.new_zeros((self.rows, heads, self.capacity, width))

    def move(self, sources: Sequence[int], targets: Sequence[int], length: int) -> None:
        """Copy whole rows onto others that hold nothing of use."""
        for planes in self._layers.values():
            for plane in planes:
                source = torch.as_tensor(sources, device=plane.device)
                target = torch.as_tensor(targets, device=plane.device)
                plane[target, :, :length] = plane[source, :, :length]

    def copy(self, source: int, targets: Sequence[int], length: int) -> None:
        """The first ``length`` tokens of one row into others."""
        for planes in self._layers.values():
            for plane in planes:
                target = torch.as_tensor(targets, device=plane.device)
                plane[target, :, :length] = plane[source, :, :length]

    def park(self, row: int, token_ids_T: IntArray) -> Parked:
        """A copy of the row's first tokens, which are ``token_ids_T``."""
        length = len(token_ids_T)
        return Parked(
            token_ids_T,
            tuple(tuple(p[row, :, :length].clone() for p in self._layers[i]) for i in sorted(self._layers)),
        )

    def restore(self, parked: Parked, rows: Sequence[int], length: int) -> None:
        """The first ``length`` tokens of what was parked into rows."""
        for layer, kept in enumerate(parked.planes):
            if layer not in self._layers:
                self._layers[layer] = [self._plane(p, p.shape[0], p.shape[2]) for p in kept]
            for plane, part in zip(self._layers[layer], kept, strict=True):
                plane[torch.as_tensor(rows, device=plane.device), :, :length] = part[:, :length]

    def write(self, layer: int, places: torch.Tensor, k_MKD: torch.Tensor, v_MKD: torch.Tensor) -> None:
        """Store M tokens at ``places`` (M * K), numbered over (row, head, position)."""
        parts = [k_MKD, v_MKD]
        if self._eight_bit:
            (k, k_scale), (v, v_scale) = _squeeze(k_MKD), _squeeze(v_MKD)
            parts = [k, v, k_scale, v_scale]
        if layer not in self._layers:
            self._layers[layer] = [self._plane(p, p.shape[1], p.shape[2]) for p in parts]
        for plane, part in zip(self._layers[layer], parts, strict=True):
            width = part.shape[-1]
            plane.view(-1, width).index_copy_(0, places, part.reshape(-1, width))

    def read(
        self, layer: int, rows: slice | torch.Tensor, span: int, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (B, K, span, D) of rows."""
        planes = [p[rows, :, :span] for p in self._layers[layer]]
        if self._eight_bit:
            return _spread(planes[0], planes[2], dtype), _spread(planes[1], planes[3], dtype)
        return planes[0], planes[1]


class Decode:
    """``Attend`` of one decode step: token b is row b's next one, at ``position_B``, and sees its row up to itself.

    ``span`` is above every position. Without ``masked`` every row must fill it: position = span - 1.
    """

    def __init__(self, arena: Arena, position_B: torch.Tensor, span: int, masked: bool) -> None:
        self._arena, self._position_B, self._span, self._masked = arena, position_B, span, masked
        self._places: torch.Tensor | None = None
        self._masks: dict[int | None, torch.Tensor | None] = {}

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
        """(N, H, D)."""
        count, groups, width = k_NKD.shape
        if self._places is None:
            first = torch.arange(count * groups, device=q_NHD.device).view(count, groups)
            self._places = (first * self._arena.capacity + self._position_B[:, None]).view(-1)
        self._arena.write(layer, self._places, k_NKD, v_NKD)
        if window is not None and window >= self._span:
            window = None
        cpu = q_NHD.device.type == "cpu"
        keys, values = self._arena.read(layer, slice(0, count), self._span, q_NHD.dtype)
        if window not in self._masks:
            mask = self._mask(window, torch.float32 if cpu else q_NHD.dtype)
            if cpu and mask is not None:
                mask = mask.expand(count, groups, 1, self._span).reshape(-1, 1, self._span)
            self._masks[window] = mask
        mask = self._masks[window]
        if not cpu:
            return attention(q_NHD[:, :, None], keys, values, scale=scale, mask=mask)[:, :, 0]
        # Plain products beat the fused kernel here: it handles every pair of a row and a head on its own.
        pairs = count * groups
        q = q_NHD.reshape(pairs, -1, width).float()
        keys, values = (x.flatten(0, 1).float() for x in (keys, values))
        addend, beta = (mask, 1) if mask is not None else (q[:, :, :1], 0)
        scores = torch.baddbmm(addend, q, keys.transpose(1, 2), beta=beta, alpha=scale)
        out = torch.bmm(torch.softmax(scores, -1), values)
        return out.view(q_NHD.shape).to(q_NHD.dtype)

    def _mask(self, window: int | None, dtype: torch.dtype) -> torch.Tensor | None:
        """(B, 1, 1, span): 0 where a row's token sees, -inf elsewhere."""
        if not self._masked and window is None:
            return None
        at = torch.arange(self._span, device=self._position_B.device)
        hidden = at > self._position_B[:, None]
        if window is not None:
            hidden |= at <= self._position_B[:, None] - window
        mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
        return mask.masked_fill_(hidden, float("-inf"))[:, None, None]


def folded_attention(
    q_BHWD: torch.Tensor, k_BKSD: torch.Tensor, v_BKSD: torch.Tensor, *, scale: float, mask: torch.Tensor
) -> torch.Tensor:
    """``attention`` with the heads of a group as further queries of their one key head; ``mask`` (B, 1, W, S).

    On CUDA only the flash kernel knows grouped heads, and it takes no mask and no float32: without this, all scores of
    all heads would be written out, or every key copied for each of its heads.
    """
    batch, heads, width, size = q_BHWD.shape
    groups = k_BKSD.shape[1]
    times = heads // groups
    q = q_BHWD.reshape(batch, groups, times * width, size)
    out = attention(q, k_BKSD, v_BKSD, scale=scale, mask=mask.repeat(1, 1, times, 1))
    return out.reshape(q_BHWD.shape)


@dataclass(frozen=True, slots=True)
class Job:
    """Tokens to compute: ``token_ids_T`` come after ``past`` tokens that row ``rows[0]`` holds; their keys and values go
    to all of ``rows``. ``number`` tells the caller whose last hidden state this is, -1 nobody's."""

    token_ids_T: IntArray
    past: int
    rows: tuple[int, ...]
    number: int


@dataclass(frozen=True, slots=True)
class _Run:
    """Jobs of similar length that attend as one padded batch: ``at_BW`` places on the flat axis, padding repeated;
    ``flat_N`` those of them that are tokens, as indices into B * W."""

    at_BW: torch.Tensor
    tokens_N: torch.Tensor
    flat_N: torch.Tensor
    past_B: torch.Tensor
    rows: slice | torch.Tensor
    least: int  # of past_B
    most: int
    span: int  # 0: nothing came before


class Prefill:
    """``Attend`` of one forward pass over several jobs, laid end to end on the flat axis in the order given."""

    def __init__(self, arena: Arena, jobs: Sequence[Job], device: torch.device) -> None:
        self._arena, self._jobs, self._device = arena, jobs, device
        self._grouped = device.type == "cpu"  # every kernel knows grouped heads
        self._starts = np.cumsum([0, *(len(j.token_ids_T) for j in jobs)])
        self._written: tuple[torch.Tensor, torch.Tensor] | None = None
        self._runs = [self._run(group) for group in self._groups()]
        self._masks: dict[tuple[int, int | None], torch.Tensor] = {}

    @property
    def ids_N(self) -> torch.Tensor:
        """Token ids of the flat axis."""
        ids = np.concatenate([j.token_ids_T for j in self._jobs]).astype(np.int64)
        return torch.as_tensor(ids, device=self._device)

    @property
    def positions_N(self) -> torch.Tensor:
        """Each token's place in its own sequence."""
        parts = [np.arange(j.past, j.past + len(j.token_ids_T)) for j in self._jobs]
        return torch.as_tensor(np.concatenate(parts), device=self._device)

    def last(self) -> tuple[torch.Tensor, list[int]]:
        """Places of the last tokens that somebody asked for, and their numbers."""
        asked = [
            (end - 1, j.number) for end, j in zip(self._starts[1:], self._jobs, strict=True) if j.number >= 0
        ]
        return self._tensor(np.array([a for a, _ in asked], dtype=np.int64)), [n for _, n in asked]

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
        """(N, H, D)."""
        if self._written is None:
            self._written = self._places(k_NKD.shape[1])
        taken, places = self._written
        self._arena.write(layer, places, k_NKD[taken], v_NKD[taken])
        out = torch.empty_like(q_NHD)
        for i, run in enumerate(self._runs):
            q = q_NHD[run.at_BW].transpose(1, 2)
            if run.span:
                k, v = self._arena.read(layer, run.rows, run.span, q.dtype)
            else:
                k, v = k_NKD[run.at_BW].transpose(1, 2), v_NKD[run.at_BW].transpose(1, 2)
            got = self._attend(i, q, k, v, scale, window)
            out[run.tokens_N] = got.transpose(1, 2).flatten(0, 1)[run.flat_N]
        return out

    def _attend(
        self,
        number: int,
        q_BHWD: torch.Tensor,
        k_BKSD: torch.Tensor,
        v_BKSD: torch.Tensor,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        """(B, H, W, D) of run ``number``: plainly causal, or where each query needs a mask one piece of them after the other."""
        run = self._runs[number]
        (batch, heads, width, _), span = q_BHWD.shape, k_BKSD.shape[2]
        if window is not None and window >= span:
            window = None
        plain = not run.span and window is None
        groups = k_BKSD.shape[1]
        if plain:
            if not self._grouped and heads != groups and q_BHWD.dtype == torch.float32:
                k_BKSD, v_BKSD = (x.repeat_interleave(heads // groups, 1) for x in (k_BKSD, v_BKSD))
            return attention(q_BHWD, k_BKSD, v_BKSD, scale=scale, causal=True)
        masked, times = (
            (attention, 1) if self._grouped or heads == groups else (folded_attention, heads // groups)
        )
        size = max(1, min(_QUERIES, _CELLS // (batch * span * times)))
        parts: list[torch.Tensor] = []
        for first in range(0, width, size):
            last = min(first + size, width)
            start = max(0, run.least + first - window + 1) if window is not None else 0
            stop = min(span, run.most + last)
            key = (number, window)
            mask = self._masks.get(key)
            if mask is None:
                mask = self._mask(run, window, (first, last), (start, stop))
                if size >= width:
                    # The pieces of a longer one are made anew in every layer: together they may be large.
                    self._masks[key] = mask
            k, v = k_BKSD[:, :, start:stop], v_BKSD[:, :, start:stop]
            parts.append(masked(q_BHWD[:, :, first:last], k, v, scale=scale, mask=mask))
        return torch.cat(parts, 2) if len(parts) > 1 else parts[0]

    def _places(self, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Which tokens are stored (M), once for every row they go to, and where (M * K)."""
        taken: list[np.ndarray] = []
        places: list[np.ndarray] = []
        heads = np.arange(groups)
        for start, job in zip(self._starts, self._jobs, strict=False):
            inside = np.arange(len(job.token_ids_T))
            rows = np.asarray(job.rows)
            taken.append(np.tile(start + inside, len(rows)))
            at = (rows[:, None, None] * groups + heads) * self._arena.capacity + (job.past + inside)[:, None]
            places.append(at.reshape(-1))
        return (
            torch.as_tensor(np.concatenate(taken), device=self._device),
            torch.as_tensor(np.concatenate(places), device=self._device),
        )

    def _groups(self) -> list[list[int]]:
        """Numbers of jobs that share a padded batch: none or all have a past, and padding at most doubles the work."""
        groups: list[list[int]] = []
        order = sorted(
            range(len(self._jobs)), key=lambda i: (self._jobs[i].past > 0, len(self._jobs[i].token_ids_T))
        )
        for i in order:
            job = self._jobs[i]
            length, span = len(job.token_ids_T), job.past + len(job.token_ids_T)
            if groups:
                first = self._jobs[groups[-1][0]]
                widest = max(span, *(self._jobs[g].past + len(self._jobs[g].token_ids_T) for g in groups[-1]))
                cells = (len(groups[-1]) + 1) * length * widest
                near = length <= max(32, 1.5 * len(first.token_ids_T)) and cells <= _CELLS
                near &= not job.past or (len(groups[-1]) + 1) * widest <= _KEYS
                if near and (first.past > 0) == (job.past > 0):
                    groups[-1].append(i)
                    continue
            groups.append([i])
        return groups

    def _run(self, group: Sequence[int]) -> _Run:
        jobs = [self._jobs[i] for i in group]
        lengths = np.array([len(j.token_ids_T) for j in jobs])
        starts = self._starts[list(group)]
        inside = np.minimum(np.arange(lengths.max())[None], lengths[:, None] - 1)
        valid = np.arange(lengths.max())[None] < lengths[:, None]
        at = starts[:, None] + inside
        rows = [j.rows[0] for j in jobs]
        most = max(j.past for j in jobs)
        span = max(j.past + len(j.token_ids_T) for j in jobs) if most else 0
        return _Run(
            self._tensor(at),
            self._tensor(at[valid]),
            self._tensor(np.flatnonzero(valid)),
            self._tensor(np.array([j.past for j in jobs])),
            # One row is read where it lies.
            self._tensor(np.array(rows)) if len(rows) > 1 else slice(rows[0], rows[0] + 1),
            min(j.past for j in jobs),
            most,
            span,
        )

    def _tensor(self, values: np.ndarray) -> torch.Tensor:
        return torch.as_tensor(values, device=self._device)

    def _mask(
        self, run: _Run, window: int | None, queries: tuple[int, int], keys: tuple[int, int]
    ) -> torch.Tensor:
        """(B, 1, queries, keys) bool of half-open ranges of the run's queries and keys, True where a token sees."""
        at = torch.arange(*keys, device=self._device)
        place = run.past_B[:, None] + torch.arange(*queries, device=self._device)
        back = place[:, :, None] - at
        seen = back >= 0
        if window is not None:
            seen &= back < window
        return seen[:, None]
