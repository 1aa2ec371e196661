"""The in-process sampler: batches every request of a step on one thread, over the learner's own weights.

Group members share their prompt's prefill, finished rows leave the batch, and every token's logprob (and
entropy, when asked) comes from the temperature-scaled distribution before top-p. Leaves out: rows that join
a running batch, and any kernel of our own.
"""

# torch, peft and safetensors are only partly typed: what they return is Any here.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
import torch

from retrain.config.schema import Config
from retrain.engines.noise import uniforms
from retrain.errors import EngineError
from retrain.memory import MemoryPlan
from retrain.models import Policy
from retrain.protocols import Renderer
from retrain.types import Completion, FloatArray, IntArray, Sampling, SharedWeights, Weights

log = logging.getLogger("retrain")


@dataclass(slots=True)
class _Request:
    prompt_ids: IntArray
    n: int
    sampling: Sampling
    future: asyncio.Future[list[Completion]]


@dataclass(frozen=True, slots=True)
class _Row:
    """One completion to sample: its request's number, its member inside the request, its uniforms."""

    request: int
    member: int
    noise: np.ndarray[Any, np.dtype[np.float64]]


def sample_tokens(
    logits_BV: torch.Tensor,
    temperature_B: torch.Tensor,
    top_p_B: torch.Tensor,
    uniform_B: torch.Tensor,
    entropy: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Draw one token per row by inverse CDF; returns ids, their tempered logprobs and entropies (nats).

    Top-p keeps the smallest set of most likely tokens whose mass reaches ``top_p``; logprobs and entropies
    always describe the distribution before that cut. ``uniform_B`` is float64 in [0, 1).
    """
    logprobs = torch.log_softmax(logits_BV.float() / temperature_B[:, None], dim=-1)
    mass = logprobs.exp()
    entropies = None
    if entropy:
        # A token of probability 0 adds nothing; 0 * -inf would add NaN.
        entropies = -(mass * logprobs.clamp_min(-1e4)).sum(-1)
    # Whole numbers add up exactly in any order: the draw is the same on every device, and CUDA has no
    # deterministic running sum of floats. A token below one part in 2**40 is out of reach.
    parts = (mass * _ONE).long()
    if bool((top_p_B < 1).any()):
        ordered, order = parts.sort(dim=-1, descending=True, stable=True)
        kept = ordered.cumsum(-1) - ordered < (top_p_B[:, None].double() * _ONE).long()
        parts = torch.zeros_like(parts).scatter_(1, order, torch.where(kept, ordered, 0))
    cumulative = parts.cumsum(-1)
    target = (uniform_B[:, None] * cumulative[:, -1:]).long()
    ids = torch.searchsorted(cumulative, target, right=True)
    return ids.squeeze(1), logprobs.gather(1, ids).squeeze(1), entropies


_ONE = float(2**40)
_MOVED = 1e-4
"""Nats by which the learner's canary must have moved before an unmoved sampler is an error and not rounding."""


class TorchEngine:
    """Engine over a ``Policy`` in this process."""

    def __init__(self, config: Config, renderer: Renderer) -> None:
        self._renderer = renderer
        self._share_prefill = config.inference.prefix_caching
        self._max_rows = config.inference.max_rows
        self._longest = config.training.max_tokens
        self._policy: Policy | None = None
        self._plan: MemoryPlan | None = None
        self._version = -1
        self._loaded = ""
        self._canary: tuple[FloatArray, FloatArray] | None = None  # the learner's and ours, at the last load
        self._merged = False
        self._waiting: list[_Request] = []
        self.asked = self.finished = 0
        """Rollouts of the present call, and how many of them have ended: for whoever shows progress."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="retrain-engine")

    def load(self, weights: Weights) -> None:
        """Take over the learner's weights and prove by the canary that they are what will be sampled."""
        if not isinstance(weights, SharedWeights):
            raise EngineError(
                "the in-process engine samples only from a learner in the same process.",
                fix='use backend = "local".',
            )
        if self._loaded == weights.fingerprint and self._policy is weights.policy:
            self._version = weights.version
            return
        policy: Policy = weights.policy
        self._policy = policy
        self._merged = policy.merge()
        with policy.mode(self._kind):
            seen = policy.sequence_logprobs(weights.canary.token_ids_T).cpu().numpy()
        gap = float(np.abs(seen - weights.canary.logprobs_T).max())
        if not gap <= weights.canary.tolerance:
            raise EngineError(
                f"the sampler is not the trained policy: at weights version {weights.version} fixed tokens differ by "
                f"{gap:.3g} nats (allowed {weights.canary.tolerance:g}).",
                fix="this is a defect of the weight hand-over, please report it with events.log.",
            )
        if self._canary is not None:
            expected, got = (
                float(np.abs(now - then).max())
                for now, then in zip((weights.canary.logprobs_T, seen), self._canary, strict=True)
            )
            if expected > _MOVED and got == 0:
                raise EngineError(
                    f"the weights changed at version {weights.version} and moved the learner's logprobs by {expected:.3g} nats, "
                    "but the sampler's did not move.",
                    fix="this is a defect of the weight hand-over, please report it with events.log.",
                )
        self._canary = (weights.canary.logprobs_T, seen)
        self._version, self._loaded = weights.version, weights.fingerprint

    @property
    def _kind(self) -> Any:
        return "merged" if self._merged else "adapter"

    async def generate(self, prompt_ids: IntArray, n: int, sampling: Sampling) -> list[Completion]:
        """Queue the request; everything queued in the same turn of the event loop is sampled as one batch."""
        loop = asyncio.get_running_loop()
        request = _Request(prompt_ids, n, sampling, loop.create_future())
        self._waiting.append(request)
        if len(self._waiting) == 1:
            # Runs after every attempt that was started together has queued its request, so the batch does
            # not depend on timing.
            loop.call_soon(self._flush, loop)
        return await request.future

    def _flush(self, loop: asyncio.AbstractEventLoop) -> None:
        requests, self._waiting = self._waiting, []
        done = loop.run_in_executor(self._thread, self._sample, requests)

        def deliver(result: asyncio.Future[list[list[Completion]]]) -> None:
            for i, request in enumerate(requests):
                if request.future.done():
                    continue
                if result.cancelled():
                    request.future.cancel()
                elif (error := result.exception()) is not None:
                    request.future.set_exception(error)
                else:
                    request.future.set_result(result.result()[i])

        done.add_done_callback(deliver)

    def _sample(self, requests: Sequence[_Request]) -> list[list[Completion]]:
        policy = self._policy
        if policy is None:
            raise EngineError("the engine was asked to sample before it was given weights.")
        rows = [
            _Row(i, m, noise)
            for i, r in enumerate(requests)
            for m, noise in enumerate(uniforms(r.sampling.noise, r.n, r.sampling.max_tokens))
        ]
        results: list[list[Completion | None]] = [[None] * r.n for r in requests]
        self.asked, self.finished = len(rows), 0
        with torch.no_grad(), policy.mode(self._kind):
            for chunk in self._chunks(policy, requests, rows):
                for row, completion in zip(chunk, self._run(policy, requests, chunk), strict=True):
                    results[row.request][row.member] = completion
        return [[c for c in group if c is not None] for group in results]

    def _chunks(self, policy: Policy, requests: Sequence[_Request], rows: list[_Row]) -> list[list[_Row]]:
        """Cut the rows where their caches would outgrow the memory plan, keeping groups together where they fit."""
        longest = max(len(r.prompt_ids) + r.sampling.max_tokens for r in requests)
        if self._plan is None:
            self._plan = MemoryPlan.for_model(
                policy.model.config, policy.device, policy.dtype, policy.parameters_total, longest
            )
        limit = self._max_rows or max(1, min(self._plan.kv_tokens // longest, self._plan.sample_rows))
        chunks: list[list[_Row]] = [[]]
        for i, request in enumerate(requests):
            group = [row for row in rows if row.request == i]
            if chunks[-1] and len(chunks[-1]) + request.n > limit:
                chunks.append([])
            for row in group:
                if len(chunks[-1]) >= limit:
                    chunks.append([])
                chunks[-1].append(row)
        return [c for c in chunks if c]

    def _run(self, policy: Policy, requests: Sequence[_Request], rows: Sequence[_Row]) -> list[Completion]:
        device = policy.device
        samplings = [requests[row.request].sampling for row in rows]
        numbers = (
            list(dict.fromkeys(row.request for row in rows))
            if self._share_prefill
            else [row.request for row in rows]
        )
        prompts = [requests[i].prompt_ids for i in numbers]
        source = (
            [numbers.index(row.request) for row in rows] if self._share_prefill else list(range(len(rows)))
        )

        from transformers import DynamicCache

        width = max(len(p) for p in prompts)
        ids = np.zeros((len(prompts), width), dtype=np.int64)
        mask = np.zeros((len(prompts), width), dtype=np.int64)
        for i, p in enumerate(prompts):
            ids[i, width - len(p) :] = p
            mask[i, width - len(p) :] = 1
        mask_BT = torch.as_tensor(mask, device=device)
        position_BT = (mask_BT.cumsum(1) - 1).clamp_min(0)
        cache: Any = DynamicCache(config=policy.model.config)
        out = policy.hidden(
            torch.as_tensor(ids, device=device),
            mask_BT,
            position_ids=position_BT,
            past_key_values=cache,
            use_cache=True,
        )
        picked = torch.as_tensor(source, device=device)
        cache = out.past_key_values
        cache.batch_select_indices(picked)
        hidden = out.last_hidden_state[:, -1][picked]
        mask_BT = mask_BT[picked]
        position = position_BT[picked, -1]

        temperature = torch.tensor([s.temperature for s in samplings], dtype=torch.float32, device=device)
        top_p = torch.tensor([s.top_p for s in samplings], dtype=torch.float32, device=device)
        length = max(s.max_tokens for s in samplings)
        noise = torch.zeros((len(rows), length), dtype=torch.float64)
        for i, row in enumerate(rows):
            noise[i, : len(row.noise)] = torch.from_numpy(row.noise)
        noise = noise.to(device)
        want_entropy = any(s.want_entropy for s in samplings)

        tokens = np.zeros((len(rows), length), dtype=np.int32)
        logprobs = np.zeros((len(rows), length), dtype=np.float32)
        entropies = np.zeros((len(rows), length), dtype=np.float32)
        ended: list[tuple[int, Any] | None] = [None] * len(rows)
        before = self.finished
        alive = list(range(len(rows)))  # batch position -> row, finished rows included until compaction
        for t in range(length):
            live = torch.as_tensor(alive, device=device)
            got, lp, ent = sample_tokens(
                policy.head.logits(hidden), temperature[live], top_p[live], noise[live, t], want_entropy
            )
            host, host_lp = got.tolist(), lp.cpu().numpy()
            host_ent = ent.cpu().numpy() if ent is not None else None
            for b, row in enumerate(alive):
                if ended[row] is not None:
                    continue
                tokens[row, t], logprobs[row, t] = host[b], host_lp[b]
                if host_ent is not None:
                    entropies[row, t] = host_ent[b]
                s = samplings[row]
                if host[b] in s.stop_ids or (s.stop and self._stopped(tokens[row, : t + 1], s.stop)):
                    ended[row] = (t + 1, "stop")
                elif t + 1 >= s.max_tokens:
                    ended[row] = (t + 1, "length")
            running = [b for b, row in enumerate(alive) if ended[row] is None]
            self.finished = before + len(rows) - len(running)
            if not running:
                break
            # Leaving costs a copy of the cache: pay it when a quarter of the batch is idle.
            if len(running) <= 0.75 * len(alive):
                keep = torch.as_tensor(running, device=device)
                cache.batch_select_indices(keep)
                mask_BT, position, got = mask_BT[keep], position[keep], got[keep]
                alive = [alive[b] for b in running]
            position = position + 1
            mask_BT = torch.cat([mask_BT, mask_BT.new_ones((len(alive), 1))], dim=1)
            out = policy.hidden(
                got[:, None], mask_BT, position_ids=position[:, None], past_key_values=cache, use_cache=True
            )
            hidden = out.last_hidden_state[:, -1]

        done: list[Completion] = []
        for i, end in enumerate(ended):
            if end is None:
                raise EngineError("a row left the sampler without an end; this is a bug.")
            n, stop = end
            entropy = entropies[i, :n].copy() if samplings[i].want_entropy else None
            done.append(
                Completion(tokens[i, :n].copy(), logprobs[i, :n].copy(), entropy, stop, self._version)
            )
        return done

    def _stopped(self, ids_T: IntArray, stop: Sequence[str]) -> bool:
        """Does the last token complete one of the stop texts? The tail is long enough for any of them."""
        # A token holds at least one byte of it.
        tail = ids_T[-(max(len(s.encode()) for s in stop) + 8) :]
        text = self._renderer.decode(tail)
        before = self._renderer.decode(tail[:-1])
        return any(s in text and s not in before for s in stop)

    def state_dict(self) -> dict[str, Any]:
        """The memory plan, so that a resumed run cuts its batches the same way."""
        return {"plan": None if self._plan is None else astuple(self._plan)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with a stored memory plan."""
        if state.get("plan"):
            self._plan = MemoryPlan(*state["plan"])

    def close(self) -> None:
        """Stop the sampling thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)


def build(config: Config, renderer: Renderer) -> TorchEngine:
    """The in-process engine of a configuration."""
    return TorchEngine(config, renderer)
