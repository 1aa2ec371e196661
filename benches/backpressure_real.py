"""A real run under back pressure, from batch size 1, against the best fixed batch size that a sweep finds.

    python benches/backpressure_real.py --out benches/results/backpressure_real.json

The embedded model trains on the embedded arithmetic. First every fixed size of the sweep runs, in rounds that go up through
all sizes, so that what else the machine does hits all alike; then a run that starts at 1 chooses for itself; then the fixed
sizes run once more. Compared is the median throughput of sampling (tokens per second) over the last steps of the run with
that of the fixed sizes; the same is stated for the size that it ended at, measured as a fixed one, which leaves out what the
machine did meanwhile. Processor seconds stand beside wall seconds, because others may use the machine.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from retrain.config.load import load
from retrain.runner import execute
from retrain.training.backpressure import sweep_sizes

GROUP = 8


def train(folder: Path, *, steps: int, batch_size: int, seed: int, most: int, follow: bool) -> list[dict[str, Any]]:
    """A run's rows of metrics.jsonl, with ``cpu_s`` of the whole process per step on average."""
    config = {
        "model": {"model": "retrain/tiny", "lora_rank": 8},
        "backend": {"devices": "cpu"},
        "data": {"source": "arithmetic", "levels": [2]},
        "reward": {"type": "match"},
        "algorithm": {"advantage_mode": "grpo", "transform_mode": "none"},
        "training": {
            "seed": seed, "max_steps": steps, "batch_size": batch_size, "group_size": GROUP, "max_tokens": 48,
            "lr": 1e-6, "save_every": 0,
        },
        "backpressure": {"enabled": follow, "max_batch_size": most} if follow else {},
        "logging": {"log_dir": str(folder), "generations": 0, "rollouts": False},
    }  # fmt: skip
    began = time.process_time()
    execute(load(config), plain=True)
    spent = time.process_time() - began
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{**row, "cpu_s": spent / len(rows)} for row in rows]


def rate(rows: list[dict[str, Any]]) -> float:
    """Median tokens per second of sampling; a process's first step loads and is left out."""
    return statistics.median(row["tokens_per_second"] for row in rows)


def main() -> None:
    """Measure, and write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--steps", type=int, default=60, help="steps of the run under back pressure")
    parser.add_argument("--last", type=int, default=20, help="of its last steps the throughput is taken")
    parser.add_argument("--fixed", type=int, default=6, help="steps of a fixed size in each round, after one to warm up")
    parser.add_argument("--rounds", type=int, default=2, help="rounds over the fixed sizes, before the run and after it")
    parser.add_argument("--most", type=int, default=64)
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    sizes = sweep_sizes(1, options.most, 1)
    fixed: dict[int, list[float]] = {size: [] for size in sizes}

    def measure(root: Path, name: str, more: tuple[int, ...] = ()) -> None:
        for number in range(options.rounds):
            for size in sorted({*sizes, *more}):
                folder = root / f"{name}-{number}-{size}"
                rows = train(
                    folder, steps=options.fixed + 1, batch_size=size, seed=number, most=options.most, follow=False
                )
                fixed.setdefault(size, []).extend(row["tokens_per_second"] for row in rows[1:])

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        measure(root, "before")
        rows = train(root / "run", steps=options.steps, batch_size=1, seed=1, most=options.most, follow=True)
        ended = rows[-1]["batch_size"]
        measure(root, "after", (ended,))
    medians = {size: statistics.median(rates) for size, rates in sorted(fixed.items())}
    best = max(medians, key=lambda size: medians[size])
    reached = rate(rows[-options.last :])
    keys = ("step", "batch_size", "tokens_per_second", "bp_action", "bp_p_star", "bp_p_star_low", "bp_p_star_high", "bp_noise")
    record = {
        "group_size": GROUP, "threads": torch.get_num_threads(), "load": os.getloadavg()[0],
        "fixed_tokens_per_second": medians, "fixed_each": fixed, "best_fixed_batch_size": best,
        "ended_at": ended, "tokens_per_second_of_last_steps": reached,
        "share_of_best_fixed": reached / medians[best],
        "share_of_best_fixed_by_size": medians[ended] / medians[best],
        "largest_growth": max(b["batch_size"] / a["batch_size"] for a, b in itertools.pairwise(rows)),
        "cpu_s_per_step": rows[0]["cpu_s"],
        "run": [{key: row.get(key) for key in keys} for row in rows],
    }  # fmt: skip
    text = json.dumps(record, indent=1) + "\n"
    if options.out:
        options.out.write_text(text, encoding="utf-8")
    print(json.dumps({k: v for k, v in record.items() if k not in ("run", "fixed_each")}, indent=1))


if __name__ == "__main__":
    main()
