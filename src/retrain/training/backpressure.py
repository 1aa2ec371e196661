"""Back pressure: a batch size that follows measured throughput, by the universal scalability law and the device's roof.

A sweep of the first steps measures throughput at growing batch sizes; from then on each step's measurement refines the fit
of ``usl.py``, and the next step's size moves towards a share of the concurrency at which throughput peaks. Leaves out: how a
step is retried when memory runs out (``training/loop.py``).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from retrain import estimate
from retrain.config.schema import Backpressure, Config
from retrain.errors import ModelError
from retrain.protocols import State
from retrain.roofline import Peaks, Shape, Work, decode, prefill
from retrain.training import usl
from retrain.types import Sampled

log = logging.getLogger("retrain")

WINDOW = 100
"""Measurements that a fit looks back on."""
_LEAST_SWEEP = 4
"""Steps of the shortest sweep: one more than a fit has parameters."""
_FALLEN = 0.8
"""Share of the best throughput below which a sweep has seen the far side of the peak."""
_SLACK, _ALARM, _CAP = 0.75, 8.0, 4.0
"""Of the cumulative sum that notices drift, in standard deviations: drift that is let pass in each step, the sum that raises
the alarm, and the most that one step adds."""
_CLEAR = 4.0
"""Standard errors between two sizes' mean throughputs that are no chance."""
_SETTLED = 20
"""Measurements from which on a fit is good enough to blame the system and not itself."""
_LEAST_NOISE = 0.02
"""Relative noise that drift is judged by at least: no machine repeats itself better."""
_BLURRED = 3.0
"""Ratio of the ends of p*'s interval beyond which the size does not follow it: a window that has come to hold little but
one size places the peak anywhere."""
_FULL = 0.9
"""Share of a server's cache at which it is about to preempt."""

Action = Literal["warm-up", "grow", "throttle", "hold", "probe", "back off"]


@dataclass(frozen=True, slots=True)
class Roof:
    """What is needed to count a step's sampling: the model's shape, bytes per weight, and weights of an adapter that is
    read beside them; ``peaks`` are the user's, 0 where unknown."""

    shape: Shape
    itemsize: int
    adapter: int
    peaks: Peaks

    def work(self, rows: list[tuple[int, int]], group: int) -> Work:
        """The least that sampling these (prompt, completion) lengths takes, each group's prompt computed once."""
        prompts, lengths = [p for p, _ in rows], [n for _, n in rows]
        first = prefill(self.shape, prompts[::group], self.itemsize, adapter=self.adapter)
        return sum(decode(self.shape, prompts, lengths, self.itemsize, adapter=self.adapter), first)


class BackPressure:
    """The controller. Sizes are numbers of tasks; concurrency p is tasks times ``group_size``, and throughput sampled tokens
    per second of sampling.

    While it warms up it sweeps sizes upwards, at most one doubling at a time. Then, with a fit, its target is
    ``throttle_margin`` of p*: above it the size falls to it at once, below it grows by at most a doubling until it was
    reached, and later only from below ``increase_margin`` of it. Without a fit it holds, or follows an engine's queue.
    """

    def __init__(
        self, settings: Backpressure, *, batch_size: int, group_size: int, roof: Roof | None = None
    ) -> None:
        """``batch_size``: where it starts, brought into the limits of ``settings``."""
        self._settings = settings
        self._group = group_size
        self._roof = roof
        self._sizes = sweep_sizes(settings.min_batch_size, settings.max_batch_size, batch_size)
        self._steps = max(settings.warmup_steps, _LEAST_SWEEP) if settings.warmup_steps else 0
        start = min(max(batch_size, settings.min_batch_size), settings.max_batch_size)
        self._size = self._sizes[0] if self._steps else start
        self._done = 0
        """Steps of the sweep that are over."""
        self._again = False
        """Was the sweep made once more, or is there no need to?"""
        self._top = len(self._sizes) - 1
        """Index of the largest size that the sweep still goes to."""
        self._points: list[tuple[int, float]] = []
        self._reached = False
        self._ceiling = 0
        """Largest size after memory ran out, 0 before."""
        self._probes: list[int] = []
        self._law: tuple[float, float, float, float] | None = None
        """Coefficients and noise of the last fit, which drift is measured against."""
        self._drift = [0.0, 0.0]
        self._ema: float | None = None
        self._cold = True
        self._ran_out = 0

    @property
    def limit(self) -> int:
        """The largest size allowed."""
        most = self._settings.max_batch_size
        return min(most, self._ceiling) if self._ceiling else most

    def next(self) -> int:
        """Tasks of the coming step."""
        return self._size

    def out_of_memory(self, batch_size: int) -> int:
        """Half of ``batch_size``, which is never exceeded again; 0 when that is the smallest already."""
        least = self._settings.min_batch_size
        if batch_size <= least:
            return 0
        half = max(least, batch_size // 2)
        self._ceiling = min(half, self._ceiling or half)
        self._size = half
        self._ran_out += 1
        self._probes = []
        return half

    def observe(self, seen: Sampled) -> dict[str, Any]:
        """Take in a completed step, decide the next size, and say why. Steps without signal, those in which memory ran out and
        the first step of a process, which loads and compiles, do not enter the fit; the latter two not the average either."""
        now = seen.batch_size
        p = now * self._group
        rate = seen.tokens / seen.seconds if seen.seconds > 0 and seen.tokens > 0 else 0.0
        clean = rate > 0 and not self._cold and not self._ran_out and not seen.put_back
        counts = clean and not seen.skipped
        drifted = False
        if clean:
            decay = self._settings.ema_decay
            self._ema = rate if self._ema is None else decay * self._ema + (1 - decay) * rate
        if counts:
            drifted = self._has_drifted(p, rate)
            if drifted:
                self._forget(now)
            else:
                self._points = [*self._points, (p, rate)][-WINDOW:]
        fitted = usl.fit(self._points)
        if fitted is not None and not self._warming:
            self._again = True
        if fitted is not None and fitted.points >= _SETTLED:
            self._law = (*fitted.coefficients, fitted.noise)
        action, size = ("warm-up", now) if self._cold else self._decide(now, fitted, seen.queue)
        # Whatever a rule wants: one doubling at most, and never past what memory or the user allows.
        self._size = max(1, min(size, 2 * now, self.limit))
        self._cold = False
        ran_out, self._ran_out = self._ran_out, 0
        return {
            "bp_action": action,
            "bp_batch_size": self._size,
            **_of_fit(fitted),
            "bp_throughput": self._ema,
            **self._of_roof(seen),
            "bp_drifted": drifted,
            "bp_out_of_memory": ran_out,
            "bp_put_back": seen.put_back,
            "bp_ceiling": self._ceiling or None,
        }

    @property
    def _warming(self) -> bool:
        return self._done < self._steps

    def _decide(self, now: int, fitted: usl.Fit | None, queue: Mapping[str, float]) -> tuple[Action, int]:
        if queue and (fitted is None or self._warming):
            self._done += 1
            return self._by_queue(now, queue)
        if self._warming:
            size = self._sweep(now)
            if self._warming:
                return "warm-up", size
        if self._probes:
            return "probe", self._probes.pop(0)
        if fitted is None:
            return self._without_fit(now)
        action, size = self._by_law(now, fitted)
        return ("hold", now) if action == "grow" and _pressed(queue) else (action, size)

    def _sweep(self, now: int) -> int:
        """The sweep's next size: the list's sizes in order, each as often as the steps allow; once throughput has clearly
        fallen, those around the best one instead."""
        self._done += 1
        means = self._means()
        best = max(means, key=lambda p: means[p][0], default=0)
        worse = [p for p in means if p > best and means[p][0] < _FALLEN * means[best][0]]
        here = max((i for i, s in enumerate(self._sizes) if s <= now), default=0)
        if len(worse) >= 2 and len(means) >= usl.LEAST:
            self._top = min(self._top, here)
        while self._top and self._sizes[self._top] > self.limit:
            self._top -= 1
        if self._top < len(self._sizes) - 1 and here >= self._top:
            middle = max((i for i, s in enumerate(self._sizes) if s * self._group <= best), default=0)
            self._sizes = self._sizes[: self._top + 1]
            around = [min(max(0, middle + d), self._top) for d in (-1, 0, 1)]
            self._probes = [self._sizes[around[i % 3]] for i in range(self._steps - self._done)]
            self._done = self._steps
            return now
        count = len(self._sizes)
        index = self._done if count >= self._steps else self._done * count // self._steps
        return self._sizes[min(index, self._top)]

    def _without_fit(self, now: int) -> tuple[Action, int]:
        """Hold; but a sweep whose steps carried too little signal for a fit is made once more."""
        known = {p for p, _ in self._points}
        if self._steps and not self._again and len(known) < usl.LEAST <= self._top + 1:
            self._again, self._done = True, 0
            return "warm-up", self._sizes[0]
        return "hold", now

    def _by_law(self, now: int, fitted: usl.Fit) -> tuple[Action, int]:
        settings, group = self._settings, self._group
        p, limit = now * group, self.limit
        star = fitted.p_star
        finite = math.isfinite(star.value) and star.high <= _BLURRED * star.low
        best = settings.throttle_margin * star.value if finite else math.inf
        target = limit if best >= limit * group else max(settings.min_batch_size, int(best / group + 1e-9))
        if finite and p > best and now > target:
            self._reached = True
            return "throttle", target
        if not finite:
            lower, worse_above = self._measured(now, fitted)
            if lower < now:
                return "throttle", lower
            if worse_above:
                return "hold", now
        self._reached |= now >= target
        if not self._reached:
            return "grow", min(target, 2 * now)
        if finite:
            grows = p < settings.increase_margin * min(best, limit * group)
        else:
            # Where p* is unknown because little is, more is not known to be better. A window with little but this size
            # in it places the peak anywhere, so it has to be surer.
            others = sum(size != p for size, _ in self._points)
            least = star.low if others > usl.LEAST else fitted.floor
            grows = now < limit and p <= settings.throttle_margin * least
        return ("grow", min(target, 2 * now)) if grows and now < target else ("hold", now)

    def _measured(self, now: int, fitted: usl.Fit) -> tuple[int, bool]:
        """Where the fit does not place the peak, what was measured has to do: the size to fall to (``now`` to stay) because
        a smaller one was clearly faster, and whether a larger one was clearly slower."""
        found, here = self._means(), now * self._group
        if here not in found:
            return now, False
        rate, times = found[here]
        if math.isnan(fitted.noise):
            return now, False

        def differs(p: int) -> float:
            other, count = found[p]
            return (other / rate - 1) / (fitted.noise * math.sqrt(1 / times + 1 / count))

        best = max(found, key=lambda p: found[p][0])
        worse_above = any(p > here and differs(p) < -_CLEAR for p in found)
        if best >= here or differs(best) < _CLEAR:
            return now, worse_above
        # At the edge of what was measured the peak may lie further down.
        size = best // self._group if best > min(found) else best // self._group // 2
        return max(self._settings.min_batch_size, size), worse_above

    def _by_queue(self, now: int, queue: Mapping[str, float]) -> tuple[Action, int]:
        """Additive increase, multiplicative decrease (Chiu and Jain, 1989)."""
        least = self._settings.min_batch_size
        if _pressed(queue):
            return "back off", max(least, now // 2)
        return ("grow", now + max(1, least)) if now < self.limit else ("hold", now)

    def _has_drifted(self, p: int, rate: float) -> bool:
        """Two-sided cumulative sum (Page, 1954) of how far measurements lie from the fit before them."""
        if self._law is None or self._warming or self._probes:
            return False
        a, b, c, noise = self._law
        time = a + b * p + c * p * p
        if time <= 0 or math.isnan(noise):
            return False
        off = math.log(rate * time / p) / max(noise, _LEAST_NOISE)
        off = max(-_CAP, min(_CAP, off))
        self._drift = [max(0.0, s + sign * off - _SLACK) for s, sign in zip(self._drift, (1, -1), strict=True)]
        return max(self._drift) > _ALARM

    def _forget(self, now: int) -> None:
        """What was measured so far describes another system: measure anew, around here."""
        log.info("Back pressure: throughput is no longer what the fit says; measuring anew around %d tasks.", now)
        self._points, self._drift, self._law, self._reached = [], [0.0, 0.0], None, False
        # From far below on: only so does a fit know what a single rollout costs, however far the peak has moved.
        low = max(self._settings.min_batch_size, min(now // 8, self.limit // 16))
        around = sweep_sizes(low, min(self.limit, max(16 * low, 2 * now)), low)
        self._probes = around * 2

    def _means(self) -> dict[int, tuple[float, int]]:
        """Mean throughput and number of measurements by concurrency, in order."""
        found: dict[int, list[float]] = {}
        for p, rate in self._points:
            found.setdefault(p, []).append(rate)
        return {p: (sum(rates) / len(rates), len(rates)) for p, rates in sorted(found.items())}

    def _of_roof(self, seen: Sampled) -> dict[str, Any]:
        """Which of the given peaks sampling came closer to, and how close, as a share of it."""
        if self._roof is None or not seen.rows or seen.seconds <= 0:
            return {"bp_regime": None, "bp_utilization": None}
        work, peaks = self._roof.work(list(seen.rows), self._group), self._roof.peaks
        shares = {
            bound: done / seen.seconds / peak
            for bound, done, peak in (("compute", work.flops, peaks.flops), ("memory", work.bytes, peaks.bandwidth))
            if peak
        }
        bound = max(shares, key=lambda k: shares[k])
        return {"bp_regime": bound if len(shares) == 2 else None, "bp_utilization": shares[bound]}

    def state_dict(self) -> State:
        """Everything that it has learned."""
        return {
            "size": self._size, "done": self._done, "again": self._again, "sizes": list(self._sizes), "top": self._top,
            "points": [list(point) for point in self._points], "reached": self._reached, "ceiling": self._ceiling,
            "probes": list(self._probes), "law": None if self._law is None else list(self._law),
            "drift": list(self._drift), "ema": self._ema,
        }  # fmt: skip

    def load_state_dict(self, state: State) -> None:
        """Continue; the first step of the new process is cold again."""
        self._size, self._done, self._again = int(state["size"]), int(state["done"]), bool(state["again"])
        self._sizes, self._top = [int(s) for s in state["sizes"]], int(state["top"])
        self._points = [(int(p), float(rate)) for p, rate in state["points"]]
        self._reached, self._ceiling = bool(state["reached"]), int(state["ceiling"])
        self._probes = [int(size) for size in state["probes"]]
        law = state["law"]
        self._law = None if law is None else (float(law[0]), float(law[1]), float(law[2]), float(law[3]))
        self._drift = [float(s) for s in state["drift"]]
        self._ema = None if state["ema"] is None else float(state["ema"])
        self._cold = True


def _pressed(queue: Mapping[str, float]) -> bool:
    """Does the engine take in more than it can work on? It preempts, its cache is full, or more waits than runs."""
    waiting, running = queue.get("waiting", 0.0), queue.get("running", math.inf)
    return queue.get("preemptions", 0.0) > 0 or queue.get("kv_use", 0.0) >= _FULL or waiting > running


def _of_fit(fitted: usl.Fit | None) -> dict[str, float | None]:
    """The fit as metrics; null without one, and where p* is infinite."""
    found: dict[str, float | None] = {}
    for name in ("p_star", "sigma", "kappa"):
        range_ = None if fitted is None else getattr(fitted, name)
        for suffix, end in (("", "value"), ("_low", "low"), ("_high", "high")):
            value = None if range_ is None else float(getattr(range_, end))
            found[f"bp_{name}{suffix}"] = value if value is not None and math.isfinite(value) else None
    noise = math.nan if fitted is None else fitted.noise
    found["bp_noise"] = noise if math.isfinite(noise) else None
    return found


def sweep_sizes(least: int, most: int, start: int) -> list[int]:
    """Sizes that a sweep visits, upwards: doublings from ``start``, or from below it where fewer than four would fit
    under ``most``, and ``most`` itself. Three at least where the limits hold so many."""
    low = min(max(start, least), most)
    while low > least and low * 2 ** (_LEAST_SWEEP - 1) > most:
        low = max(least, low // 2)
    sizes = [low]
    while sizes[-1] * 2 <= most:
        sizes.append(sizes[-1] * 2)
    if sizes[-1] < most:
        sizes.append(most)
    if len(sizes) < _LEAST_SWEEP and most - low >= 2:
        spread = np.unique(np.round(np.geomspace(low, most, _LEAST_SWEEP)).astype(int)).tolist()
        sizes = [int(size) for size in (spread if len(spread) >= usl.LEAST else [low, low + 1, most])]
    return sizes


def build(config: Config) -> BackPressure:
    """The controller ``usl`` of a configuration."""
    return BackPressure(
        config.backpressure,
        batch_size=config.training.batch_size,
        group_size=config.training.group_size,
        roof=_roof(config),
    )


def _roof(config: Config) -> Roof | None:
    """None without a peak, and for a model whose operations are not counted."""
    settings = config.backpressure
    if not (settings.peak_gflops or settings.peak_bw_gb_s) or config.model.quantization:
        return None
    try:
        shape = estimate.model_of(config).shape
    except ModelError as error:
        log.warning("No roofline: %s", error)
        return None
    kind = "cpu" if config.backend.devices == "cpu" else "cuda"
    itemsize = estimate.itemsize_of(config, kind)
    # In float32 the adapter is merged, and read as part of the weights.
    adapter = 0 if itemsize == 4 else shape.adapter_weights(config.model.lora_rank)
    return Roof(shape, itemsize, adapter, Peaks(settings.peak_gflops * 1e9, settings.peak_bw_gb_s * 1e9))
