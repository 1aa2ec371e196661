"""CUDA graphs: a decode step recorded once per shape and replayed, so that its hundreds of launches cost one.

Recordings live as long as the buffers that they were made over: until rows or capacity grow, and no longer than one
burst of sampling, whose cache is given back to the learner at its end. The next burst records anew.
"""

# torch is only partly typed: what it returns is Any here.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from typing import Any

import torch

log = logging.getLogger("retrain")


def bucket(n: int, least: int) -> int:
    """The next size of a static shape: multiples of ``least`` (a power of two), four to an octave from 4 * least on."""
    step = least
    while 8 * step <= n:
        step *= 2
    return -(-n // step) * step


def row_bucket(n: int) -> int:
    """Rows of a static shape: 1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64, 80, ..."""
    return bucket(n, 8) if n > 4 else (1, 1, 2, 4, 4)[n]


class Graphs:
    """Recorded steps by shape. They read and write the buffers that they were recorded over: ``clear`` before those
    are reallocated."""

    def __init__(self, device: torch.device) -> None:
        self.works = device.type == "cuda"
        self._device = device
        self._graphs: dict[Hashable, Any] = {}
        self._pool: Any = None

    def clear(self) -> None:
        """Forget all and give their memory back."""
        self._graphs.clear()
        self._pool = None

    def run(self, key: Hashable, work: Callable[[], object], live: torch.Tensor) -> None:
        """Do ``work``, whose shapes ``key`` names. Recording takes a warm-up, done with ``live`` all 0 so that no row
        moves. Where recording fails this is said once, and from then on the work is done plainly."""
        if not self.works:
            work()
            return
        if key not in self._graphs:
            try:
                self._graphs[key] = self._record(work, live)
            except RuntimeError as error:
                self.works = False
                log.warning(
                    "The decode step cannot be recorded as a CUDA graph, sampling is slower: %s", error
                )
                torch.cuda.synchronize(self._device)
                self.clear()
                work()
                return
        self._graphs[key].replay()

    def _record(self, work: Callable[[], object], live: torch.Tensor) -> Any:
        before = live.clone()
        live.zero_()
        try:
            side: Any = torch.cuda.Stream(self._device)
            side.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(side):
                work()
            torch.cuda.current_stream(self._device).wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, stream=side):
                work()
        finally:
            live.copy_(before)
        self._pool = self._pool or graph.pool()
        return graph
