"""What squeezing costs in accuracy: the tiny model trained at rank 64 with several seeds, each run squeezed to its recommended
rank, and held-out accuracy before and after.

    python benches/squeeze_accuracy.py                        # five runs of the template tiny, then benches/results
    python benches/squeeze_accuracy.py --seeds 1 --steps 2    # a quick trial

Before and after share tasks and sampling noise. Each seed's change has an interval paired by task; over seeds it is the t
interval of the mean change, with the run as the unit. Runs that are there already (--runs) are not trained again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

from scipy.stats import t

HERE = Path(__file__).resolve().parent


def retrain(*words: str) -> str:
    """One command; what it printed."""
    command = [sys.executable, "-m", "retrain", *words]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def one(place: Path, template: Path, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Train, squeeze and evaluate one seed."""
    run = place / f"rank{args.rank}_s{seed}"
    if not (run / "adapter/adapter_config.json").exists():
        words = ["--lora-rank", str(args.rank), "--lora.alpha", "0", "--seed", str(seed), "--log-dir", str(run), "--plain"]
        retrain(str(template), *words, "--overwrite", *(["--max-steps", str(args.steps)] if args.steps else []))
    words = ["--examples", str(args.examples), "--samples", str(args.samples), "--min-variance-retention", str(args.keep)]
    found = json.loads(retrain("squeeze", str(run), "--eval", "--json", *words))
    change = found["eval"]["difference"]["after"]["eval"]
    row = next(r for r in found["table"] if r["recommended"])
    sides = {
        side: {k: found["eval"][side][f"eval/{k}"] for k in ("accuracy", "accuracy_low", "accuracy_high", "tasks", "samples")}
        for side in ("before", "after")
    }
    return {
        "seed": seed, "rank": found["rank"], "recommended_rank": found["recommended_rank"], "least_rank": found["least_rank"],
        "retained": row["mean"], "predicted_error": row["predicted_error"], **sides, "change": change,
        "table": found["table"],
    }  # fmt: skip


def main() -> None:
    """Measure and write."""
    from retrain.config import templates

    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--steps", type=int, default=0, help="training steps; the template's without it")
    parser.add_argument("--keep", type=float, default=0.95)
    parser.add_argument("--examples", type=int, default=256)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--runs", type=Path, help="folder that keeps the runs; a temporary one without it")
    parser.add_argument("--out", type=Path, default=HERE / "results/squeeze_accuracy.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        place = args.runs or Path(temporary)
        place.mkdir(parents=True, exist_ok=True)
        rows = [one(place, Path(templates.path_of("tiny")), seed, args) for seed in args.seeds]
    changes = [row["change"]["mean"] for row in rows]
    mean = statistics.fmean(changes)
    half = float(t.ppf(0.975, len(rows) - 1)) * statistics.stdev(changes) / len(rows) ** 0.5 if len(rows) > 1 else None
    record = {
        "keep": args.keep, "rows": rows, "mean_change": mean, "low": None if half is None else mean - half,
        "high": None if half is None else mean + half, "cores": os.cpu_count(), "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("torch", "transformers", "numpy")},
    }  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    for row in rows:
        change = row["change"]
        print(
            f"seed {row['seed']}: rank {row['rank']} -> {row['recommended_rank']}, "
            f"{row['before']['accuracy']:.1%} -> {row['after']['accuracy']:.1%}, change {100 * change['mean']:+.1f} "
            f"[{100 * change['low']:+.1f}, {100 * change['high']:+.1f}] points"
        )
    interval = "" if half is None else f" [{100 * (mean - half):+.2f}, {100 * (mean + half):+.2f}]"
    print(f"mean change over {len(rows)} seeds: {100 * mean:+.2f}{interval} points")


if __name__ == "__main__":
    main()
