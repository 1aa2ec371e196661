"""The in-process sampler: continuous batching on one thread, over the learner's own weights.

Requests join and leave a running batch between any two tokens. What a batch is made of at each token, and so every
bit of its results, is a function of the requests as long as environments answer at once: requests of the same turns of
the event loop start together, and after every step that finished a request the engine waits until the loop has run
what the result set off, so that a next turn which needs no real waiting is queued before the next token. A tool with
real latency joins at whatever step its answer comes; ids then stay the same (the noise is keyed, not drawn from a
generator) but for logprobs' last bits and the rare token whose uniform lies on an edge.

Every token's logprob (and entropy, when asked) comes from the temperature-scaled distribution before top-p. Leaves out:
paged memory (a row is one piece of the arena) and an attention kernel of our own.
"""

# torch, peft and safetensors are only partly typed: what they return is Any here.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as StillBusy
from dataclasses import astuple
from typing import Any

import numpy as np
import torch

from retrain.config.schema import Config
from retrain.engines.prefixes import ParkingLot
from retrain.engines.schedule import Batch, Limits, Request, Timings
from retrain.errors import EngineError, OutOfMemory, is_out_of_memory
from retrain.memory import MemoryPlan
from retrain.models import Policy
from retrain.protocols import Renderer
from retrain.types import Completion, FloatArray, IntArray, Sampling, SharedWeights, Weights

_MOVED = 1e-4
"""Nats by which the learner's canary must have moved before an unmoved sampler is an error and not rounding."""
_TURNS = 10
"""Turns of the event loop that what a result sets off may take: a task wakes, gathers, asks again."""
_BUSY_S = 60.0
"""How long ``load`` and ``release`` wait for rows that nobody waits for any more to leave."""


class TorchEngine:
    """Engine over a ``Policy`` in this process.

    ``timings`` adds up over the engine's life. ``static`` pads every step to a bucketed shape, which CUDA graphs need.
    """

    def __init__(self, config: Config, renderer: Renderer) -> None:
        self._renderer = renderer
        self._share_prefill = config.inference.prefix_caching
        self._max_rows = config.inference.max_rows
        self._eight_bit = config.inference.kv_cache_dtype == "fp8"
        self.static: bool | None = None
        """None: on CUDA."""
        self._policy: Policy | None = None
        self._plan: MemoryPlan | None = None
        self._version = -1
        self._loaded = ""
        self._canary: tuple[FloatArray, FloatArray] | None = None  # the learner's and ours, at the last load
        self._merged = False
        self.timings = Timings()
        self.asked = self.finished = 0
        """Rollouts of the present call, and how many of them have ended: for whoever shows progress."""
        self.kv_bytes = self.kv_peak = 0
        """Memory of keys and values, of live rows and parked sequences: now, and at most so far."""
        self._parked = ParkingLot()
        self._batch: Batch | None = None
        self._lock = threading.Lock()
        self._waiting: list[Request] = []  # with the lock
        # With the lock: will the thread look at what waits, and if not, which loops are about to make it? Such a loop
        # may end before it gets there, so that every loop counts its own turns.
        self._running = False
        self._starting: set[asyncio.AbstractEventLoop] = set()
        self._closed = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="retrain-engine")

    def load(self, weights: Weights) -> None:
        """Take over the learner's weights and prove by the canary that they are what will be sampled."""
        if not isinstance(weights, SharedWeights):
            raise EngineError(
                "the in-process engine samples only from a learner in the same process.",
                fix='use backend = "local".',
            )
        self.release()
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

    def release(self) -> None:
        """Give back the memory of parked sequences; a prompt that goes on from one is then computed anew.

        EngineError while something is sampled.
        """
        self._settle_down()
        self._parked.shrink(0)
        self.kv_bytes = self._parked.bytes + (self._batch.bytes if self._batch else 0)

    def _settle_down(self) -> None:
        """Rows that nobody waits for leave at their next step; weights must not change under them."""
        if self._closed or not self._running:
            return
        try:
            self._thread.submit(lambda: None).result(timeout=_BUSY_S)
        except StillBusy:
            raise EngineError("weights or memory were to change while the engine was sampling.") from None

    async def generate(self, prompt_ids: IntArray, n: int, sampling: Sampling) -> list[Completion]:
        """Queue the request: it joins the batch at the next step that has room for it, first come first served."""
        loop = asyncio.get_running_loop()
        request = Request(prompt_ids, n, sampling, loop.create_future())
        with self._lock:
            self._waiting.append(request)
            starts = not self._running and loop not in self._starting
            if starts:
                self._starting.add(loop)
        if starts:
            # Every attempt that was started together has queued its request by then.
            _after_turns(loop, self._start)
        return await request.future

    def _start(self) -> None:
        with self._lock:
            if not self._starting:
                return  # another loop was first
            self._starting.clear()
            self._running = True
        self.asked = self.finished = 0
        try:
            self._thread.submit(self._run)
        except RuntimeError:
            self._fail(EngineError("the engine was asked to sample after it was closed."))

    def _run(self) -> None:
        """The sampling thread's work until nothing is left to sample."""
        try:
            while True:
                done = self._until_idle()
                with self._lock:
                    self._running = bool(self._waiting)
                    going = self._running
                # What waits for the last results may train at once: by now the batch has given everything back.
                self._deliver(done, wait=going)
                if not going:
                    return
        except BaseException as error:  # noqa: BLE001  it belongs to whoever waits
            # Where memory ran out another error stands in, because this one's traceback holds tensors.
            self._fail(_no_memory(error) if is_out_of_memory(error) else error)

    def _until_idle(self) -> list[Request]:
        """Step until nothing is live or waiting; the requests of the last step are left to be delivered."""
        policy = self._policy
        if policy is None:
            raise EngineError("the engine was asked to sample before it was given weights.")
        before = self.finished
        new: list[Request] = []
        try:
            with torch.no_grad(), policy.mode(self._kind):
                done: list[Request] = []
                while not self._closed:
                    with self._lock:
                        new, self._waiting = [r for r in self._waiting if not r.abandoned], []
                    if not new and self._batch is None:
                        break
                    self.asked += sum(r.n for r in new)
                    batch = self._batch = self._batch or self._new_batch(policy, new)
                    batch.add(new)
                    new = []
                    done = batch.step()
                    self.finished = before + batch.ended
                    self.kv_bytes = batch.bytes + self._parked.bytes
                    self.kv_peak = max(self.kv_peak, self.kv_bytes)
                    if not batch.busy:
                        break
                    if done:
                        self._deliver(done, wait=True)
                        done = []
                else:
                    raise EngineError("the engine was closed while it was sampling.")
        finally:
            left = [*(self._batch.requests() if self._batch else []), *new]
            self._batch = None
            self.kv_bytes = self._parked.bytes
            with self._lock:
                self._waiting[:0] = left  # an error is still to reach them
        return done

    def _new_batch(self, policy: Policy, requests: Sequence[Request]) -> Batch:
        if self._plan is None:
            longest = max(r.longest for r in requests)
            self._plan = MemoryPlan.for_model(
                policy.model.config, policy.device, policy.dtype, policy.parameters_total, longest
            )
        return Batch(
            policy,
            Limits.of(self._plan, self._max_rows),
            version=self._version,
            share=self._share_prefill,
            static=policy.device.type == "cuda" if self.static is None else self.static,
            eight_bit=self._eight_bit,
            parked=self._parked,
            timings=self.timings,
            stopped=self._stopped,
        )

    def _deliver(self, requests: Sequence[Request], *, wait: bool) -> None:
        """Hand results to those who wait; with ``wait`` let their event loops run what that sets off."""
        settled = _each_loop(requests, lambda r: r.future.set_result(r.results()))
        for loop, event in settled if wait else ():
            # A loop that was stopped for good never answers.
            while not event.wait(0.1) and not loop.is_closed() and not self._closed:
                pass

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            requests, self._waiting, self._running = self._waiting, [], False
        _each_loop(requests, lambda r: r.future.set_exception(error))

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
        """Stop the sampling thread; what it was sampling fails."""
        self._closed = True
        self._thread.shutdown(wait=False, cancel_futures=True)


def _no_memory(error: BaseException) -> OutOfMemory:
    text = str(error).strip().partition("\n")[0]
    return OutOfMemory(
        f"memory ran out in sampling ({text[:200] or type(error).__name__}).",
        fix="lower training.batch_size, training.max_tokens or inference.max_rows, or set backpressure.enabled = true, "
        "which finds the batch size that fits.",
    )


def _after_turns(loop: asyncio.AbstractEventLoop, then: Callable[[], object], turns: int = _TURNS) -> None:
    """Call it after so many turns of the loop."""

    def turn(left: int) -> None:
        if left:
            loop.call_soon(turn, left - 1)
        else:
            then()

    loop.call_soon(turn, turns)


def _each_loop(
    requests: Sequence[Request], give: Callable[[Request], None]
) -> list[tuple[asyncio.AbstractEventLoop, threading.Event]]:
    """Give every request its answer, in its own loop; the loops, and what is set once they have run what that set off."""
    loops: dict[asyncio.AbstractEventLoop, list[Request]] = {}
    for request in requests:
        loops.setdefault(request.future.get_loop(), []).append(request)
    events: list[tuple[asyncio.AbstractEventLoop, threading.Event]] = []
    for loop, mine in loops.items():
        event = threading.Event()

        def answer(
            loop: asyncio.AbstractEventLoop = loop,
            mine: list[Request] = mine,
            event: threading.Event = event,
        ) -> None:
            for request in mine:
                if not request.future.done():
                    give(request)
            _after_turns(loop, event.set)

        # A closed loop has nobody left who waits.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(answer)
            events.append((loop, event))
    return events


def build(config: Config, renderer: Renderer) -> TorchEngine:
    """The in-process engine of a configuration."""
    return TorchEngine(config, renderer)
