"""The sampling kernel against log_softmax + multinomial and a one-level inverse CDF, interleaved in one process.

    python benches/draw.py [--threads 1] [--rounds 15] [--out benches/results/draw.json]

Prints CPU milliseconds a call (minimum over the rounds, after one that warms up) and how many times the kernel's
own they are. Logits are freshly written before every call, as the product that makes them would leave them.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from retrain.engines.draw import draw
from retrain.head import Head


def multinomial(logits_BV: torch.Tensor) -> None:
    """What a plain sampler does: softmax, multinomial, and the logprob of what came out."""
    logprobs_BV = torch.log_softmax(logits_BV, 1)
    logprobs_BV.gather(1, torch.multinomial(logprobs_BV.exp(), 1))


def one_level(logits_BV: torch.Tensor, uniform_B: torch.Tensor) -> None:
    """Inverse CDF by one running sum of whole numbers over the vocabulary, with entropies: the kernel before this."""
    logprobs_BV = torch.log_softmax(logits_BV, 1)
    mass_BV = logprobs_BV.exp()
    (mass_BV * logprobs_BV.clamp_min(-1e4)).sum(1)
    running_BV = (mass_BV * 2.0**40).long().cumsum(1)
    ids_B1 = torch.searchsorted(running_BV, (uniform_B[:, None] * running_BV[:, -1:]).long(), right=True)
    logprobs_BV.gather(1, ids_B1)


def measure(
    calls: dict[str, Callable[[], object]], before: Callable[[], object], rounds: int
) -> dict[str, float]:
    """The least CPU milliseconds of each call, the calls taking turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            before()
            start = time.process_time_ns()
            call()
            times[name].append((time.process_time_ns() - start) / 1e6)
    return {name: min(taken[1:]) for name, taken in times.items()}


def on_logits(rows: int, vocabulary: int, rounds: int) -> dict[str, float]:
    """Every sampler on the same logits."""
    fresh_BV = torch.randn(rows, vocabulary) * 3
    logits_BV = fresh_BV.clone()
    uniform_B = torch.rand(rows, dtype=torch.float64)
    warmth_B, top_p_B = torch.full((rows,), 0.9), torch.full((rows,), 0.9)
    calls: dict[str, Callable[[], object]] = {
        "draw": lambda: draw(logits_BV, 1.0, None, uniform_B, True),
        "draw without entropy": lambda: draw(logits_BV, 1.0, None, uniform_B, False),
        "draw at temperatures": lambda: draw(logits_BV, warmth_B, None, uniform_B, True),
        "draw with top_p 0.9": lambda: draw(logits_BV, 1.0, top_p_B, uniform_B, True),
        "log_softmax + multinomial": lambda: multinomial(logits_BV),
        "one level": lambda: one_level(logits_BV, uniform_B),
    }
    return measure(calls, lambda: logits_BV.copy_(fresh_BV), rounds)


def with_head(rows: int, hidden: int, vocabulary: int, rounds: int) -> dict[str, float]:
    """The head's product as the engine takes it, the plain ones beside it, and the draw after it."""
    layer = nn.Linear(hidden, vocabulary, bias=False)
    layer.requires_grad_(False)
    head = Head(layer)
    hidden_BH, uniform_B = torch.randn(rows, hidden), torch.rand(rows, dtype=torch.float64)
    calls: dict[str, Callable[[], object]] = {
        "product, then draw": lambda: draw(head.logits(hidden_BH), 1.0, None, uniform_B, True),
        "product alone": lambda: head.logits(hidden_BH),
        "plain product": lambda: hidden_BH @ head.dense.T,
        "weight first": lambda: head.dense @ hidden_BH.T,
    }
    return measure(calls, lambda: None, rounds)


def main() -> None:
    """Measure, print, store."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    torch.manual_seed(0)
    found: dict[str, dict[str, float]] = {}
    with torch.no_grad():
        for rows, vocabulary in ((16, 151_936), (32, 151_936), (32, 384), (128, 384)):
            rounds = asked.rounds * (20 if vocabulary < 1000 else 1)
            found[f"{rows} x {vocabulary}"] = on_logits(rows, vocabulary, rounds)
        for rows in (8, 32):
            found[f"{rows} x 512 x 151936"] = with_head(rows, 512, 151_936, asked.rounds)
    for shape, times in found.items():
        first = next(iter(times.values()))
        for name, taken in times.items():
            print(f"{shape:18s} {name:28s} {taken:9.3f} ms  {taken / first:6.2f} x")
    if asked.out is not None:
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
        record = {
            "cpu": cpu,
            "threads": asked.threads,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "cpu_milliseconds": {k: {n: round(t, 3) for n, t in v.items()} for k, v in found.items()},
        }
        asked.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
