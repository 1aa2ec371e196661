"""What this device reaches now, measured in a second or two: matrix products and memory traffic, with the threads that
torch may use."""

# torch is only partly typed: what it returns is Any here.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

from retrain.roofline import Peaks

P = ParamSpec("P")
R = TypeVar("R")

_CPU_SHAPES = ((512, 512, 512), (1024, 1024, 1024), (256, 1024, 4096))
_CUDA_SHAPES = ((4096, 4096, 4096), (8192, 8192, 8192), (16384, 4096, 4096))
_MOST_BYTES = 2**28
"""A buffer of 256 MiB is past the caches of most processors; a larger one only takes longer."""


def _best(work: Callable[[], object], device: torch.device, seconds: float) -> float:
    """The shortest of the runs that fit into ``seconds``, at least three after one to warm up."""
    cuda = device.type == "cuda"

    def once() -> float:
        if cuda:
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        work()
        if cuda:
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    once()
    found: list[float] = []
    until = time.perf_counter() + seconds
    while len(found) < 3 or (time.perf_counter() < until and len(found) < 1000):
        found.append(once())
    return min(found)


def matmul_flops(
    device: torch.device, dtype: torch.dtype, *, seconds: float = 0.5, hopeless: float = 0.0
) -> float:
    """Operations per second of the best of a few product shapes; only the first of them when that stays below
    ``hopeless``, as a type does that the processor has to emulate."""
    shapes = _CUDA_SHAPES if device.type == "cuda" else _CPU_SHAPES
    best = 0.0
    for m, k, n in shapes:
        a, b = (torch.ones(size, device=device, dtype=dtype) for size in ((m, k), (k, n)))
        out = torch.empty((m, n), device=device, dtype=dtype)
        took = _best(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), device, seconds / len(shapes))
        best = max(best, 2.0 * m * k * n / took)
        if best < hopeless:
            break
    return best


def bandwidth(device: torch.device, size: int, *, seconds: float = 0.5) -> float:
    """Bytes per second of reading or copying ``size`` bytes (at most 256 MiB on a CPU): what stays in a cache between
    two passes is read as fast as that cache allows."""
    least, most = 2**16, 2**31 if device.type == "cuda" else _MOST_BYTES
    count = min(max(size, least), most) // 4
    source = torch.ones(count, device=device)
    target = torch.empty_like(source)
    weights, ones = source[: count // 256 * 256].view(-1, 256), torch.ones(256, device=device)
    out = torch.empty(len(weights), device=device)
    ways: tuple[tuple[Callable[[], object], int], ...] = (
        (lambda: target.copy_(source), 8 * count),
        (lambda: source.sum(), 4 * count),
        (lambda: torch.mv(weights, ones, out=out), 4 * weights.numel()),
    )
    return max(moved / _best(work, device, seconds / len(ways)) for work, moved in ways)


def measure(device: torch.device, dtype: torch.dtype, weights_bytes: int) -> tuple[Peaks, dict[str, float]]:
    """The device's roof for a model of ``weights_bytes``, and each measurement by name.

    Whoever computes in ``dtype`` may as well compute in float32, so the higher of the two peaks is the roof.
    """
    found = {"matmul_fp32": matmul_flops(device, torch.float32)}
    if dtype != torch.float32:
        name = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, str(dtype))
        found[f"matmul_{name}"] = matmul_flops(device, dtype, hopeless=0.5 * found["matmul_fp32"])
    roof = Peaks(max(found.values()), bandwidth(device, weights_bytes))
    return roof, {**found, "bandwidth": roof.bandwidth}


class MemoryWatch:
    """Peak memory in bytes: of the process on a CPU; on CUDA of the allocator, apart for learning and for all else."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._peaks: dict[str, int] = {}

    def learning(self, step: Callable[P, R]) -> Callable[P, R]:
        """``step`` with its own peak: what came before it since the last one is sampling's."""
        if self._device.type != "cuda":
            return step

        def watched(*arguments: P.args, **keywords: P.kwargs) -> R:
            self._note("sampler")
            done = step(*arguments, **keywords)
            self._note("learner")
            return done

        return watched

    def _note(self, who: str) -> None:
        self._peaks[who] = max(self._peaks.get(who, 0), torch.cuda.max_memory_allocated(self._device))
        torch.cuda.reset_peak_memory_stats(self._device)

    def record(self) -> dict[str, int | None]:
        """Bytes by name, None where this device does not tell."""
        resident = None
        with contextlib.suppress(ImportError):  # Windows has no such module
            import resource

            used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            resident = used if sys.platform == "darwin" else used * 1024
        return {
            "resident_peak": resident,
            "sampler_peak": self._peaks.get("sampler"),
            "learner_peak": self._peaks.get("learner"),
        }
