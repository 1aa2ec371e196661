"""Back pressure against simulated systems whose law is known: is p* found, are its intervals honest, does the size behave?

    python benches/usl_simulation.py --out benches/results/usl_simulation.json

Every system obeys the universal scalability law with its own sigma, kappa and rate, and multiplies each measurement by
log-normal noise; the controller of ``training/backpressure.py`` chooses the sizes and sees nothing else. Needs numpy and
scipy, no model; some seconds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from retrain.config.schema import Backpressure
from retrain.training.backpressure import BackPressure
from retrain.training.usl import fit, throughput
from retrain.types import Sampled

GROUP = 8
NOISE = 0.05


@dataclass(frozen=True)
class System:
    """What the controller does not know. ``memory`` is the largest size that fits, 0 for all."""

    sigma: float
    kappa: float
    rate: float = 100.0
    noise: float = NOISE
    memory: int = 0

    @property
    def p_star(self) -> float:
        """Concurrency of the highest throughput."""
        return math.sqrt((1 - self.sigma) / self.kappa) if self.kappa else math.inf

    def at(self, size: int) -> float:
        """True throughput of a size."""
        return throughput(size * GROUP, sigma=self.sigma, kappa=self.kappa, rate=self.rate)


@dataclass
class Step:
    """A simulated step: its size, what it logged, and at which sizes memory ran out before."""

    size: int
    metrics: dict[str, Any]
    ran_out: list[int]


def run(
    system: System | Callable[[int], System], steps: int, *, seed: int = 0, **settings: Any
) -> Iterator[Step]:
    """Steps under back pressure with ``settings`` of [backpressure], from batch size 1; a function gives step's system."""
    rng = np.random.default_rng(seed)
    controller = BackPressure(Backpressure(enabled=True, **settings), batch_size=1, group_size=GROUP)
    for step in range(steps):
        now = system(step) if callable(system) else system
        size, ran_out = controller.next(), []
        while now.memory and size > now.memory:
            ran_out.append(size)
            size = controller.out_of_memory(size)
        rate = now.at(size) * math.exp(now.noise * rng.normal())
        tokens = size * GROUP * 100
        yield Step(size, controller.observe(Sampled(size, GROUP, tokens, tokens / rate)), ran_out)


def draw(rng: np.random.Generator, most: int) -> System:
    """sigma log-uniform from 0.001 to 0.3; p* log-uniform from 3 groups to 0.8 of the largest concurrency."""
    sigma = math.exp(rng.uniform(math.log(1e-3), math.log(0.3)))
    best = math.exp(rng.uniform(math.log(3 * GROUP), math.log(0.8 * most * GROUP)))
    return System(sigma, (1 - sigma) / best**2, rate=math.exp(rng.uniform(2, 9)))


def doublings(sizes: list[int]) -> float:
    """The largest factor between one size and the next."""
    return max((b / a for a, b in itertools.pairwise(sizes)), default=1.0)


def many(count: int, *, steps: int = 60, most: int = 64, noise: float = NOISE, seed: int = 0) -> dict[str, Any]:
    """The controller on ``count`` random systems."""
    rng = np.random.default_rng(seed)
    errors, growth, kept = [], [], []
    covered = dict.fromkeys(("sigma", "kappa", "p_star"), 0)
    for number in range(count):
        system = draw(rng, most)
        system = System(system.sigma, system.kappa, system.rate, noise)
        made = list(run(system, steps, seed=1000 * seed + number, max_batch_size=most))
        last = made[-1].metrics
        errors.append(abs(last["bp_p_star"] / system.p_star - 1) if last["bp_p_star"] else math.inf)
        growth.append(doublings([s.size for s in made]))
        best = max(system.at(size) for size in range(1, most + 1))
        kept.append(system.at(made[-1].size) / best)
        for name in covered:
            low, high = last[f"bp_{name}_low"], last[f"bp_{name}_high"]
            covered[name] += (low or 0.0) <= getattr(system, name) <= (math.inf if high is None else high)
    finite = [e for e in errors if math.isfinite(e)]
    return {
        "systems": count, "steps": steps, "noise": noise, "largest_batch_size": most, "group_size": GROUP,
        "p_star_error": {"median": _rank(errors, 0.5), "p75": _rank(errors, 0.75), "p90": _rank(errors, 0.9)},
        "p_star_called_infinite": 1 - len(finite) / count,
        "coverage_of_95": {name: n / count for name, n in covered.items()},
        "largest_growth": max(growth),
        "throughput_of_best": {"median": _rank(kept, 0.5), "p10": _rank(kept, 0.1), "lowest": min(kept)},
    }  # fmt: skip


def _rank(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def fixed_design(count: int, *, noise: float = NOISE, seed: int = 0) -> dict[str, Any]:
    """Coverage of the fit's intervals where sizes do not follow the measurements: 1 to 64, each four times."""
    rng = np.random.default_rng(seed)
    covered = dict.fromkeys(("sigma", "kappa", "p_star"), 0)
    for _ in range(count):
        system = draw(rng, 64)
        points = [
            (float(size * GROUP), system.at(size) * math.exp(noise * rng.normal()))
            for size in (1, 2, 4, 8, 16, 32, 64) * 4
        ]
        found = fit(points)
        for name in covered:
            range_ = getattr(found, name)
            covered[name] += found is not None and range_.low <= getattr(system, name) <= range_.high
    return {"systems": count, "coverage_of_95": {name: n / count for name, n in covered.items()}}


def no_kappa(count: int, *, steps: int = 150) -> dict[str, Any]:
    """Systems without a peak: do they grow to the ceiling and stay there?"""
    rng = np.random.default_rng(7)
    stayed, reached = 0, []
    for number in range(count):
        sigma = 0.0 if number % 4 == 0 else math.exp(rng.uniform(math.log(1e-3), math.log(0.3)))
        sizes = [s.size for s in run(System(sigma, 0.0), steps, seed=number)]
        # The sweep comes to the ceiling first; what counts is what the fit decides afterwards.
        after = sizes[15:]
        reached.append(15 + after.index(64) if 64 in after else steps)
        stayed += 64 in after and set(after[after.index(64) :]) == {64}
    return {"systems": count, "steps": steps, "stayed_at_the_ceiling": stayed / count, "reached_by_step": max(reached)}


def drifting(count: int, *, steps: int = 200, at: int = 80, factor: float = 4.0) -> dict[str, Any]:
    """p* falls, or rises, by ``factor`` at step ``at``: is the new one found, and how soon is it noticed?"""
    found: dict[str, Any] = {}
    for name, change in (("falls", 1 / factor), ("rises", factor)):
        rng = np.random.default_rng(11)
        errors, noticed, kept, false = [], [], [], 0
        for number in range(count):
            sigma = math.exp(rng.uniform(math.log(1e-3), math.log(0.1)))
            first = math.exp(rng.uniform(math.log(80.0), math.log(130.0))) * (1 if change > 1 else 2.5)
            second = first * change

            def system(step: int, sigma: float = sigma, first: float = first, second: float = second) -> System:
                return System(sigma, (1 - sigma) / (first if step < at else second) ** 2)

            made = list(run(system, steps, seed=number))
            alarms = [i for i, s in enumerate(made) if s.metrics["bp_drifted"]]
            false += any(i < at for i in alarms)
            after = [i for i in alarms if i >= at]
            noticed.append(after[0] - at if after else steps - at)
            # Once the window holds one size alone there is no fit any more: the last one counts.
            stars = [s.metrics["bp_p_star"] for s in made[at + 20 :] if s.metrics["bp_p_star"]]
            errors.append(abs(stars[-1] / second - 1) if stars else math.inf)
            now = system(steps)
            kept.append(now.at(made[-1].size) / max(now.at(size) for size in range(1, 65)))
        found[name] = {
            "p_star_error_median": _rank(errors, 0.5),
            "steps_to_notice": {"median": _rank(noticed, 0.5), "p90": _rank(noticed, 0.9)},
            "alarms_before_the_drift": false / count,
            "throughput_of_best": {"median": _rank(kept, 0.5), "p10": _rank(kept, 0.1), "lowest": min(kept)},
        }
    return {"systems": count, "steps": steps, "at": at, "factor": factor, **found}


def with_memory(count: int, *, steps: int = 120) -> dict[str, Any]:
    """A memory that holds so many tasks and no more: how often does it run out, and is it exceeded again?"""
    rng = np.random.default_rng(13)
    times, shares = [], []
    for number in range(count):
        memory = int(rng.integers(1, 63))
        made = list(run(System(0.01, 0.0, memory=memory), steps, seed=number))
        times.append(sum(len(s.ran_out) for s in made))
        shares.append(max(s.size for s in made[20:]) / memory)
    return {
        "systems": count, "steps": steps, "times_memory_ran_out": {"median": _rank(times, 0.5), "most": max(times)},
        "share_of_what_fits": {"lowest": min(shares), "median": _rank(shares, 0.5)},
    }  # fmt: skip


def main() -> None:
    """Run everything and write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--systems", type=int, default=200)
    arguments = parser.parse_args()
    n = arguments.systems
    record = {
        "systems": many(n),
        "systems_at_10_percent_noise": many(n, noise=0.10, seed=1),
        "fixed_design": fixed_design(10 * n),
        "kappa_0": no_kappa(n),
        "drift": drifting(n),
        "memory": with_memory(n),
    }
    text = json.dumps(record, indent=1) + "\n"
    print(text, end="")
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
