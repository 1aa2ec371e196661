"""Throughput against concurrency, measured here and now: the real loop at growing batch sizes, and the law fitted to it.

What back pressure finds while it trains is found here before a run, and printed as the line to put into its TOML.
"""

from __future__ import annotations

import math
import statistics
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from retrain.bench.step import Progress, Settings, configured, opened
from retrain.config.load import LoadedConfig
from retrain.protocols import State
from retrain.training import usl
from retrain.training.backpressure import sweep_sizes
from retrain.types import Sampled


@dataclass(frozen=True, slots=True)
class _Measured:
    """One step: how many tasks at once, and tokens per second of its sampling."""

    size: int
    rate: float


class Sweep:
    """A Sizer that visits ``sizes``, upwards, in ``rounds`` rounds; the first round warms up and is not kept.

    Where memory runs out the sweep goes on below, and the larger sizes are left out. ``stop`` is set after the last step.
    """

    def __init__(self, sizes: Sequence[int], rounds: int, stop: threading.Event) -> None:
        self._sizes = list(sizes)
        self._rounds = rounds
        self._stop = stop
        self._round = self._at = 0
        self._clean = True
        """Has memory sufficed in the step so far?"""
        self.measured: list[_Measured] = []
        self.clean: list[bool] = []
        """Per completed step: did memory suffice all the way?"""
        self.ran_out_at = 0
        """Smallest size that did not fit, 0 where all did."""

    def next(self) -> int:
        """The size that is due."""
        return self._sizes[self._at]

    def observe(self, seen: Sampled) -> Mapping[str, Any]:
        """Keep a step of a round that counts, and go on to the next size."""
        if self._round and self._clean and seen.seconds > 0:
            self.measured.append(_Measured(seen.batch_size, seen.tokens / seen.seconds))
        self.clean.append(self._clean)
        self._clean = True
        # A step that had to be halved was one of the next smaller size.
        self._at += 1
        if self._at >= len(self._sizes):
            self._at, self._round = 0, self._round + 1
        if self._round >= self._rounds:
            self._stop.set()
        return {}

    def out_of_memory(self, batch_size: int) -> int:
        """The largest size below it; all others are left out from now on, and what was measured of them is dropped."""
        self.ran_out_at = min(batch_size, self.ran_out_at or batch_size)
        self._clean = False
        self.measured = [m for m in self.measured if m.size < batch_size]
        fits = [size for size in self._sizes if size < batch_size]
        if fits:
            self._sizes = fits
            self._at = min(self._at, len(fits) - 1)
        return fits[-1] if fits else 0

    def state_dict(self) -> State:
        """Nothing: a sweep is not resumed."""
        return {}

    def load_state_dict(self, state: State) -> None:
        """Nothing."""


def sweep(loaded: LoadedConfig, settings: Settings, *, progress: Progress) -> dict[str, Any]:
    """Measure every size ``settings.steps`` times; a JSON-serialisable record. RetrainError as a run raises it, OutOfMemory
    where not even the smallest size fits.

    Sizes are doublings from ``backpressure.min_batch_size`` to ``max_batch_size``.
    """
    config = configured(loaded)
    limits = config.backpressure
    sizes = sweep_sizes(limits.min_batch_size, limits.max_batch_size, limits.min_batch_size)
    rounds = settings.steps + 1
    stop = threading.Event()
    sizer = Sweep(sizes, rounds, stop)
    with opened(
        config, settings, steps=rounds * len(sizes), tasks=rounds * sum(sizes), progress=progress, sizer=sizer
    ) as bench:
        bench.run(stop)
        memory = bench.watch.record() if bench.watch is not None else None
        told = bench.facts()
        steps = [s for s, clean in zip(bench.log.steps, sizer.clean, strict=True) if clean]
    group = config.training.group_size
    points = _points(sizer.measured, [(s.metrics["batch_size"], s.wall, s.metrics["tokens_sampled"]) for s in steps], group)
    fitted = usl.fit([(m.size * group, m.rate) for m in sizer.measured])
    record = {
        **told,
        "settings": {**told["settings"], "steps": settings.steps, "throttle_margin": limits.throttle_margin},
        "points": points,
        "fit": None if fitted is None else _fit(fitted, points),
        "ran_out_at": sizer.ran_out_at or None,
        "memory": memory,
    }
    record["recommended"] = recommended(points, fitted, group, limits.throttle_margin)
    return record


def _points(
    measured: Sequence[_Measured], steps: Sequence[tuple[int, float, int]], group: int
) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for size in sorted({m.size for m in measured}):
        rates = [m.rate for m in measured if m.size == size]
        # The first of a size warmed it up.
        whole = [tokens / wall for batch, wall, tokens in steps if batch == size and wall > 0][1:]
        found.append(
            {
                "batch_size": size,
                "concurrency": size * group,
                "tokens_per_second": statistics.fmean(rates),
                "each": rates,
                "step_tokens_per_second": statistics.fmean(whole) if whole else None,
            }
        )
    return found


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _fit(fitted: usl.Fit, points: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        **{
            name: {end: _finite(getattr(getattr(fitted, name), end)) for end in ("value", "low", "high")}
            for name in ("sigma", "kappa", "p_star")
        },
        "rate": fitted.rate,
        "noise": _finite(fitted.noise),
        "coefficients": list(fitted.coefficients),
        "tokens_per_second": [_finite(fitted.throughput(p["concurrency"])) for p in points],
    }


def recommended(
    points: Sequence[Mapping[str, Any]], fitted: usl.Fit | None, group: int, margin: float
) -> dict[str, Any]:
    """The batch size to use, the ends of its 95 % interval, and why.

    ``margin`` of the fitted peak, as back pressure would have it, within what was measured; the largest size where
    throughput surely has no peak there; the fastest measured where that cannot be told, or there is no fit.
    """
    sizes = [int(p["batch_size"]) for p in points]

    def inside(p_star: float) -> int:
        return max(sizes[0], min(sizes[-1], int(margin * min(p_star, 2.0**40) / group + 1e-9)))

    best = int(max(points, key=lambda p: p["tokens_per_second"])["batch_size"])
    if fitted is None:
        return {"batch_size": best, "low": sizes[0], "high": sizes[-1], "because": "fastest"}
    star = fitted.p_star
    ends = {"low": inside(star.low), "high": inside(star.high)}
    if inside(star.value) < sizes[-1]:
        return {"batch_size": inside(star.value), **ends, "because": "peak"}
    if ends["low"] == sizes[-1]:
        return {"batch_size": sizes[-1], **ends, "because": "largest"}
    return {"batch_size": best, "low": min(best, ends["low"]), "high": max(best, ends["high"]), "because": "fastest"}
