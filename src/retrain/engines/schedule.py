"""The rows being sampled: who joins at a step, what is computed once for several, and how one step runs.

Everything here is a function of the requests and of the order they came in; nothing reads a clock but the timings.
"""

# torch is only partly typed: what it returns is Any here.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from retrain.engines.arena import Arena, Decode, Job, Prefill
from retrain.engines.graphs import Graphs, bucket, row_bucket
from retrain.engines.lanes import Lanes
from retrain.engines.noise import uniforms
from retrain.engines.prefixes import ParkingLot, shared_beginnings
from retrain.memory import MemoryPlan
from retrain.models import Policy
from retrain.types import Completion, IntArray, Sampling

_SPAN = 64
"""Capacity and static spans are multiples of this."""


@dataclass(slots=True)
class Request:
    """``n`` completions of one prompt, and who waits for them."""

    prompt_ids: IntArray
    n: int
    sampling: Sampling
    future: asyncio.Future[list[Completion]]
    admitted: int = 0
    done: dict[int, Completion] = field(default_factory=dict)

    @property
    def longest(self) -> int:
        """Most tokens that one of its rows may come to hold."""
        return len(self.prompt_ids) + self.sampling.max_tokens

    @property
    def abandoned(self) -> bool:
        """Does nobody wait for it any more? A deadline, a caller that went away, an event loop that was closed."""
        return self.future.done() or self.future.get_loop().is_closed()

    def results(self) -> list[Completion]:
        """All completions in the members' order."""
        return [self.done[i] for i in range(self.n)]


@dataclass(slots=True)
class _Row:
    request: Request
    member: int


@dataclass(frozen=True, slots=True)
class Limits:
    """What bounds a batch: ``kv_tokens`` cache entries over all rows and parked sequences, ``rows``, and
    ``prefill_tokens`` in one forward pass. ``exact_rows`` sets the number of rows whatever their length (0: by kv_tokens).
    """

    kv_tokens: int
    rows: int
    prefill_tokens: int
    exact_rows: int = 0

    @classmethod
    def of(cls, plan: MemoryPlan, exact_rows: int) -> Limits:
        """The memory plan's."""
        return cls(plan.kv_tokens, plan.sample_rows, plan.prefill_tokens, exact_rows)

    def fits(self, longest: int, static: bool) -> int:
        """How many rows of ``longest`` tokens may live at once, at least 1."""
        if self.exact_rows:
            return self.exact_rows
        rows = max(1, min(self.kv_tokens // _rounded(longest), self.rows))
        while static and row_bucket(rows) * _rounded(longest) > self.kv_tokens and rows > 1:
            rows -= 1
        return rows


def _rounded(length: int) -> int:
    return -(-length // _SPAN) * _SPAN


class Timings(dict[str, float]):
    """Cumulative seconds of ``prefill`` and ``decode`` (the model's layers) and of ``draw`` (its head and the draw, of first
    tokens too), and counts of tokens and steps.

    On CUDA they are what the host spent, and a recorded step counts as ``decode`` as a whole.
    """

    def __init__(self) -> None:
        names = ("prefill", "decode", "draw", "prefill_tokens", "decode_tokens", "decode_steps")
        super().__init__(dict.fromkeys(names, 0.0))


class Batch:
    """Live rows 0..B-1 of the arena, the requests that wait for room, and the steps between.

    A step first lets waiting members join, first come first served, as far as the limits allow: every row is counted
    with the longest it may become, so no row that has joined is ever thrown out. A row that ends is overwritten by the
    last one. ``static`` pads rows and spans to buckets, which is what CUDA graphs need and computes the same.
    """

    def __init__(
        self,
        policy: Policy,
        limits: Limits,
        *,
        version: int,
        share: bool,
        static: bool,
        eight_bit: bool,
        parked: ParkingLot,
        timings: Timings,
        stopped: Callable[[IntArray, Sequence[str]], bool],
    ) -> None:
        self._policy, self._limits, self._version = policy, limits, version
        self._share, self._static, self._stopped = share, static, stopped
        self._parked, self._timings = parked, timings
        self._arena = Arena(eight_bit)
        self._lanes = Lanes(policy.device)
        self._graphs = Graphs(policy.device)
        self._open: dict[int, Request] = {}
        self._waiting: deque[Request] = deque()
        self._rows: list[_Row] = []
        # Of every row: where its next token stands, how many were drawn, and which.
        self._positions = np.zeros(0, dtype=np.int64)
        self._counts = np.zeros(0, dtype=np.int64)
        self._tokens = np.zeros((0, 0), dtype=np.int32)
        self._texts = False
        self._traits: _Traits | None = None
        self.ended = 0
        """Rows that have ended so far."""

    @property
    def busy(self) -> bool:
        """Is anything live or waiting?"""
        return bool(self._rows or self._waiting)

    @property
    def bytes(self) -> int:
        """KV memory held by live rows."""
        return self._arena.bytes

    def requests(self) -> list[Request]:
        """All that are not finished."""
        return list(self._open.values())

    def add(self, requests: Iterable[Request]) -> None:
        """Queue."""
        for request in requests:
            self._open[id(request)] = request
            self._waiting.append(request)

    def step(self) -> list[Request]:
        """Let rows leave and join, then draw one more token for every row; the requests that this finished.

        Where joining already finishes some (a first token may be the last), the draw is left to the next step.
        """
        self._forget_abandoned()
        done = self._admit()
        if done or not self._rows:
            return done
        rows = len(self._rows)
        traits = self._traits = self._traits or _Traits.of(self._rows, self._positions[:rows])
        longest = int(self._positions[0]) + traits.ahead
        started = time.perf_counter()
        if longest >= self._arena.capacity:
            self._resize(rows, longest + 1, rows)
        if self._static:
            rows = min(row_bucket(rows), self._arena.rows)
            span = min(bucket(longest + 1, _SPAN), self._arena.capacity)
            shape = (rows, span, traits.entropy, traits.top_p)
            if traits.top_p:  # the cut waits for the host, which no recording can
                self._compute(rows, span, True, traits)
            else:
                self._graphs.run(shape, lambda: self._compute(rows, span, True, traits), self._lanes.live)
        else:
            step = 1 if self._policy.device.type == "cpu" else 8
            span = min(-(-(longest + 1) // step) * step, self._arena.capacity)
            drawing = self._compute(rows, span, not traits.equal or span > longest + 1, traits)
            self._timings["draw"] += drawing
            started += drawing
        live = len(self._rows)
        self._positions[:live] += 1
        ids, ended = self._lanes.report(0, live)
        self._timings["decode"] += time.perf_counter() - started
        self._timings["decode_tokens"] += live
        self._timings["decode_steps"] += 1
        return self._record(0, ids, ended)

    def _compute(self, rows: int, span: int, masked: bool, traits: _Traits) -> float:
        """One decode step on the device; the seconds that its draw took."""
        ids, positions = self._lanes.tokens(rows)
        hidden = self._policy.forward(ids, positions, Decode(self._arena, positions, span, masked))
        started = time.perf_counter()
        self._lanes.advance(rows)
        self._lanes.draw(
            hidden,
            self._policy.head,
            0,
            None if self._static else traits.temperature,
            traits.top_p,
            traits.entropy,
        )
        return time.perf_counter() - started

    def _record(self, first: int, ids: np.ndarray, ended: np.ndarray) -> list[Request]:
        """Take down what rows from ``first`` on have drawn, let those that end leave; the requests this finished."""
        end = first + len(ids)
        self._tokens[np.arange(first, end), self._counts[first:end]] = ids
        self._counts[first:end] += 1
        stops: dict[int, bool] = {first + int(i): True for i in np.flatnonzero(ended)}
        if self._texts:
            for i in range(first, end):
                texts = self._rows[i].request.sampling.stop
                if texts and self._stopped(self._tokens[i, : self._counts[i]], texts):
                    stops[i] = False
        if not stops:
            return []
        leaving = sorted(stops)
        longest = int(self._counts[leaving].max())
        entropy = any(self._rows[i].request.sampling.want_entropy for i in leaving)
        logprobs, entropies = self._lanes.drawn(leaving, longest, entropy)
        finished: list[Request] = []
        for at, i in enumerate(leaving):
            row, by_id = self._rows[i], stops[i]
            request, sampling, n = row.request, row.request.sampling, int(self._counts[i])
            last = int(self._tokens[i, n - 1])
            cut = by_id and last not in sampling.stop_ids
            request.done[row.member] = Completion(
                self._tokens[i, :n].copy(),
                logprobs[at, :n].copy(),
                entropies[at, :n].copy() if entropies is not None and sampling.want_entropy else None,
                "length" if cut else "stop",
                self._version,
            )
            if sampling.extended and self._share:
                self._park(i, row, n)
            if len(request.done) == request.n:
                finished.append(self._open.pop(id(request)))
        self.ended += len(leaving)
        self._leave(leaving)
        live = len(self._rows)
        if (
            self._arena.rows * self._arena.capacity + self._parked.tokens > self._limits.kv_tokens
            and self._parked.tokens
        ):
            # What was parked lives where rows have left.
            self._resize(live, int(self._positions[:live].max(initial=0)) + 1, live)
        return finished

    def _leave(self, leaving: Sequence[int]) -> None:
        """Fill the holes with the last rows."""
        gone = set(leaving)
        live = len(self._rows) - len(leaving)
        targets = [i for i in leaving if i < live]
        sources = [i for i in range(live, len(self._rows)) if i not in gone]
        if targets:
            self._arena.move(sources, targets, int(self._positions[sources].max()))
            self._lanes.move(sources, targets)
            for array in (self._positions, self._counts, self._tokens):
                array[targets] = array[sources]
            for source, target in zip(sources, targets, strict=True):
                self._rows[target] = self._rows[source]
        del self._rows[live:]
        self._lanes.vacate(live)
        self._traits = None

    def _park(self, i: int, row: _Row, count: int) -> None:
        """Keep the row's keys and values, of all tokens but the last, whose were never computed."""
        held = np.concatenate([row.request.prompt_ids, self._tokens[i, : count - 1]]).astype(np.int32)
        others = [r for j, r in enumerate(self._rows) if j != i]
        reserved = len(others) * _rounded(max((r.request.longest for r in others), default=0))
        if len(held) <= self._limits.kv_tokens - reserved:
            self._parked.shrink(self._limits.kv_tokens - reserved - len(held))
            self._parked.add(self._arena.park(i, held))

    def _forget_abandoned(self) -> None:
        abandoned = {i for i, r in self._open.items() if r.abandoned}
        if not abandoned:
            return
        for i in abandoned:
            del self._open[i]
        # As they were judged above: the loop may cancel one more at any moment.
        self._waiting = deque(r for r in self._waiting if id(r) not in abandoned)
        leaving = [i for i, row in enumerate(self._rows) if id(row.request) in abandoned]
        if leaving:
            self._leave(leaving)

    def _admit(self) -> list[Request]:
        """Let members of waiting requests join while there is room, compute their prompts and draw their first tokens."""
        if not self._waiting:
            return []
        new: list[_Row] = []
        longest = max((row.request.longest for row in self._rows), default=0)
        while self._waiting:
            request = self._waiting[0]
            live, needed = len(self._rows) + len(new), max(longest, request.longest)
            room = min(self._limits.fits(needed, self._static) - live, request.n - request.admitted)
            if room <= 0 and live:
                break
            room, longest = max(room, 1), needed
            for member in range(request.admitted, request.admitted + room):
                new.append(_Row(request, member))
            request.admitted += room
            if request.admitted == request.n:
                self._waiting.popleft()
        if not new:
            return []
        started = time.perf_counter()
        first = len(self._rows)
        self._make_room(new, longest)
        hidden, source = self._prefill(first, new)
        drawing = self._start(first, new, hidden, source)
        self._timings["draw"] += drawing
        ids, ended = self._lanes.report(first, len(self._rows))
        self._timings["prefill"] += time.perf_counter() - started - drawing
        return self._record(first, ids, ended)

    def _make_room(self, new: Sequence[_Row], longest: int) -> None:
        """Rows, capacity and buffers for these beside the live ones; parked sequences that they go on from stay."""
        first, total = len(self._rows), len(self._rows) + len(new)
        for request in {id(row.request): row.request for row in new}.values():
            self._parked.find(request.prompt_ids)
        self._parked.shrink(self._limits.kv_tokens - total * _rounded(longest))
        live = [int(p) for p in self._positions[:first]]
        needed = max(*live, *(len(row.request.prompt_ids) for row in new), 0) + 1
        if total > self._arena.rows or needed > self._arena.capacity:
            self._resize(total, needed, first, longest)

    def _resize(self, rows: int, needed: int, live: int, longest: int = 0) -> None:
        """Room for ``rows`` rows of ``needed`` tokens, and for some growth up to the longest there may be."""
        self._graphs.clear()
        longest = _rounded(max(longest, *(r.request.longest for r in self._rows[:live]), needed))
        capacity = min(bucket(needed + max(_SPAN, needed // 4), _SPAN), longest)
        held = int(self._positions[:live].max()) if live else 0
        rows = row_bucket(rows) if self._static else rows
        self._arena.resize(rows, capacity, live, held)

    def _prefill(self, first: int, new: Sequence[_Row]) -> tuple[torch.Tensor, list[int]]:
        """Compute the new rows' prompts; last hidden states, and which of them each new row has."""
        numbers: dict[object, int] = {}
        source: list[int] = []
        prompts: list[IntArray] = []
        rows_of: list[list[int]] = []
        for i, row in enumerate(new):
            key = row.request.prompt_ids.tobytes() if self._share else i
            if key not in numbers:
                numbers[key] = len(prompts)
                prompts.append(row.request.prompt_ids)
                rows_of.append([])
            source.append(numbers[key])
            rows_of[numbers[key]].append(first + i)
        past = [0] * len(prompts)
        early: list[Job] = []
        if self._share:
            self._reuse(first, prompts, rows_of, past)
            fresh = [i for i, p in enumerate(past) if not p]
            for length, members in shared_beginnings([prompts[i] for i in fresh]):
                group = [fresh[m] for m in members]
                rows = tuple(r for i in group for r in rows_of[i])
                early.append(Job(prompts[group[0]][:length], 0, rows, -1))
                for i in group:
                    past[i] = length
        late = [Job(p[past[i] :], past[i], tuple(rows_of[i]), i) for i, p in enumerate(prompts)]
        hidden: dict[int, torch.Tensor] = {}
        for jobs in (early, late):
            for piece in _pieces(jobs, self._limits.prefill_tokens):
                attend = Prefill(self._arena, piece, self._policy.device)
                ids = attend.ids_N
                out = self._policy.forward(ids, attend.positions_N, attend)
                places, asked = attend.last()
                hidden.update(zip(asked, out[places], strict=True))
                self._timings["prefill_tokens"] += len(ids)
        return torch.stack([hidden[i] for i in range(len(prompts))]), source

    def _reuse(
        self, first: int, prompts: Sequence[IntArray], rows_of: Sequence[Sequence[int]], past: list[int]
    ) -> None:
        """Start from what is there: a live row with the same prompt, or a parked sequence that the prompt goes on from."""
        live = {row.request.prompt_ids.tobytes(): i for i, row in enumerate(self._rows[:first])}
        used = []
        for i, prompt in enumerate(prompts):
            # The last token is computed in any case: what follows it is drawn from its hidden state.
            if (row := live.get(prompt.tobytes())) is not None:
                past[i] = len(prompt) - 1
                if past[i]:
                    self._arena.copy(row, rows_of[i], past[i])
            elif (parked := self._parked.find(prompt)) is not None:
                past[i] = min(len(parked.token_ids_T), len(prompt) - 1)
                if past[i]:
                    self._arena.restore(parked, rows_of[i], past[i])
                used.append(parked)
        for parked in used:
            self._parked.take(parked)

    def _start(self, first: int, new: Sequence[_Row], hidden: torch.Tensor, source: Sequence[int]) -> float:
        """Make the new rows live and draw their first tokens; the seconds that the draw took."""
        samplings = [row.request.sampling for row in new]
        total = first + len(new)
        length = max(s.max_tokens for s in samplings)
        stops = max(len(s.stop_ids) for s in samplings)
        if not self._lanes.fits(total, length, stops):
            self._graphs.clear()
            lanes = self._lanes
            rows = max(row_bucket(total) if self._static else total, lanes.rows)
            lanes.resize(rows, max(length, lanes.length), max(stops, lanes.stops), first)
            self._positions, self._counts = (
                np.concatenate([a[:first], np.zeros(rows - first, np.int64)])
                for a in (self._positions, self._counts)
            )
            grown = np.zeros((rows, lanes.length), np.int32)
            grown[:first, : self._tokens.shape[1]] = self._tokens[:first]
            self._tokens = grown
        noise = [
            uniforms(replace(s.noise, member=s.noise.member + row.member), 1, s.max_tokens)[0]
            for row, s in zip(new, samplings, strict=True)
        ]
        lengths = [len(row.request.prompt_ids) for row in new]
        self._lanes.put(first, samplings, lengths, noise)
        self._positions[first:total] = lengths
        self._counts[first:total] = 0
        self._rows.extend(new)
        self._texts = any(row.request.sampling.stop for row in self._rows)
        self._traits = None
        traits = _Traits.of(new, self._positions[first:total])
        hidden = hidden[torch.as_tensor(source, device=hidden.device)]
        started = time.perf_counter()
        self._lanes.draw(hidden, self._policy.head, first, traits.temperature, traits.top_p, traits.entropy)
        return time.perf_counter() - started


@dataclass(frozen=True, slots=True)
class _Traits:
    """What holds for all rows until one joins or leaves: their one temperature (None: several), whether any cuts by
    top-p or wants entropies, how far the longest is ahead of the first, and whether all have one length."""

    temperature: float | None
    top_p: bool
    entropy: bool
    ahead: int
    equal: bool

    @classmethod
    def of(cls, rows: Sequence[_Row], positions_B: np.ndarray) -> _Traits:
        samplings = [row.request.sampling for row in rows]
        temperatures = {s.temperature for s in samplings}
        ahead = int(positions_B.max() - positions_B[0])
        return cls(
            temperatures.pop() if len(temperatures) == 1 else None,
            any(s.top_p < 1 for s in samplings),
            any(s.want_entropy for s in samplings),
            ahead,
            bool((positions_B == positions_B[0]).all()),
        )


def _pieces(jobs: Sequence[Job], limit: int) -> Iterable[list[Job]]:
    """The jobs in forward passes of at most ``limit`` tokens; a longer one is computed in several."""
    piece: list[Job] = []
    size = 0
    for whole in jobs:
        job = whole
        while len(job.token_ids_T) > limit:
            if piece:
                yield piece
                piece, size = [], 0
            yield [Job(job.token_ids_T[:limit], job.past, job.rows, -1)]
            job = Job(job.token_ids_T[limit:], job.past + limit, job.rows, job.number)
        if size + len(job.token_ids_T) > limit:
            yield piece
            piece, size = [], 0
        piece.append(job)
        size += len(job.token_ids_T)
    if piece:
        yield piece
