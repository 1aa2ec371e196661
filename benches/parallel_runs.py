"""CPU time of tiny runs side by side against the same runs one by one, and the memory that they take.

Usage: python benches/parallel_runs.py [--runs 8] [--steps 30] [--rounds 3] [--out benches/results/parallel_runs.json]

Both sides start every run as a campaign does, a process with one thread each; the parallel side starts all at once on the
cores that there are. The sides take turns, first one and then the other in front, and each round's ratio is of CPU seconds
as the system counts them for the processes (user and system, from processes.jsonl). The bar: the median of the ratios is
at most 1.15. Run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from retrain.training.build import facts

BAR = 1.15

CONFIG = """
[model]
model = "retrain/tiny"
lora_rank = 16
[backend]
devices = "cpu"
[training]
batch_size = 8
group_size = 8
max_tokens = 48
temperature = 1.0
lr = 1e-3
[data]
source = "arithmetic"
[reward]
type = "match"
[logging]
log_dir = "logs"
[campaign]
seeds = {seeds}
max_steps = {steps}
launcher = "{launcher}"
{workers}
threads = 1
[[campaign.conditions]]
advantage_mode = "grpo"
transform_mode = "none"
[[campaign.conditions]]
advantage_mode = "maxrl"
transform_mode = "gtpo"
"""


def once(folder: Path, runs: int, steps: int, *, parallel: bool) -> dict[str, float]:
    """One campaign: seconds of the clock and of the processor, and bytes of memory of all processes and of the largest."""
    folder.mkdir()
    launcher, workers = ("processes", f"max_workers = {runs}") if parallel else ("serial", "")
    text = CONFIG.format(seeds=list(range(1, runs // 2 + 1)), steps=steps, launcher=launcher, workers=workers)
    (folder / "campaign.toml").write_text(text)
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "retrain", "campaign.toml"], cwd=folder, capture_output=True, text=True, check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"a campaign ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    (used,) = (folder / "logs").glob("campaign_*/processes.jsonl")
    rows = [json.loads(line) for line in used.read_text().splitlines()]
    peaks = [row["peak_bytes"] for row in rows]
    return {
        "wall_s": round(time.monotonic() - began, 2),
        "cpu_s": round(sum(row["cpu_s"] for row in rows), 2),
        "runs": len(rows),
        "peak_bytes_of_one": max(peaks),
        "peak_bytes_at_once": sum(peaks) if parallel else max(peaks),
    }


def measure(runs: int, steps: int, rounds: int, root: Path) -> dict:
    """All rounds as a record."""
    made: list[dict] = []
    for number in range(rounds):
        sides = [True, False] if number % 2 else [False, True]
        pair = {
            "parallel" if side else "serial": once(root / f"{number}-{side}", runs, steps, parallel=side) for side in sides
        }
        made.append(pair | {"ratio": round(pair["parallel"]["cpu_s"] / pair["serial"]["cpu_s"], 4)})
        print(json.dumps(made[-1]), file=sys.stderr, flush=True)
    ratio = statistics.median(pair["ratio"] for pair in made)
    return {
        "design": f"{runs} runs of {steps} steps, 1 thread each: all at once, and one by one",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "rounds": made,
        "ratio": ratio,
        "bar": BAR,
        "passed": ratio <= BAR,
        "peak_bytes_at_once": max(pair["parallel"]["peak_bytes_at_once"] for pair in made),
        "facts": facts(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=8, help="an even number: two conditions")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=None)
    given = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="parallel-") as root:
        record = measure(given.runs, given.steps, given.rounds, Path(root)) | {"load_before": load}
    text = json.dumps(record, indent=1)
    print(text)
    if given.out:
        given.out.write_text(text + "\n", encoding="utf-8")
    return 0 if record["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
