"""Measure what the documents claim and write docs/proofs.md: the demo on five seeds, the five conditions, curves.

Runs real command lines, two at a time with one thread each, into logs/proofs; finished runs are not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RUNS = ROOT / "logs" / "proofs"
PAGE = ROOT / "docs" / "proofs.md"
FACTS = ROOT / "docs" / "proofs.json"
CONDITIONS = (
    ("grpo", "none"),
    ("maxrl", "none"),
    ("maxrl", "gtpo"),
    ("maxrl", "gtpo_hicra"),
    ("maxrl", "gtpo_sepa"),
)
SEEDS = (1, 2, 3, 4, 5)
OTHER_SEEDS = (1, 2)


def read(run: Path) -> list[dict]:
    """Rows of a run's metrics."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def train(condition: tuple[str, str], seed: int) -> dict:
    """Run ``retrain demo`` under a condition and seed, unless that run is finished."""
    advantage, transform = condition
    run = RUNS / f"{advantage}+{transform}_s{seed}"
    status = run / "run.json"
    if not (status.exists() and json.loads(status.read_text())["status"] == "done"):
        command = [
            sys.executable, "-m", "retrain", "demo", "--plain", "--overwrite", "--seed", str(seed),
            "--advantage-mode", advantage, "--transform-mode", transform, "--log-dir", str(run),
        ]  # fmt: skip
        started = time.perf_counter()
        env = {**os.environ, "OMP_NUM_THREADS": "1", "RETRAIN_NO_DOTENV": "1"}
        done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
        (run / "seconds").write_text(str(time.perf_counter() - started))
        print(f"{run.name}: {time.perf_counter() - started:.0f} s", flush=True)
    rows = read(run)
    evaluations = [r for r in rows if "eval/accuracy" in r]
    steps = [r for r in rows if "condition" in r]
    return {
        "condition": f"{advantage}+{transform}",
        "seed": seed,
        "before": evaluations[0]["eval/accuracy"],
        "after": evaluations[-1]["eval/accuracy"],
        "low": evaluations[-1]["eval/accuracy_low"],
        "high": evaluations[-1]["eval/accuracy_high"],
        "tasks": evaluations[-1]["eval/tasks"],
        "steps": len(steps),
        "curve": [r["correct_rate"] for r in steps],
        "lambda": [r["sepa_lambda"] for r in steps],
        "ratio_error": max(
            max(r["ratio_max"] - 1, 1 - r["ratio_min"]) for r in steps if r["ratio_max"] is not None
        ),
        "seconds": float((run / "seconds").read_text()),
        "training_seconds": sum(r["step_time_s"] for r in steps),
    }


def plot(results: list[dict], path: Path) -> None:
    """Correct rate of sampled rollouts per step: one panel per condition, one line per seed."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "retrain"
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(CONDITIONS), figsize=(15, 3.2), sharey=True, layout="constrained")
    for axis, (advantage, transform) in zip(axes, CONDITIONS, strict=True):
        name = f"{advantage}+{transform}"
        for result in (r for r in results if r["condition"] == name):
            smooth = [
                statistics.fmean(result["curve"][max(0, i - 4) : i + 1]) for i in range(result["steps"])
            ]
            axis.plot(smooth, linewidth=1.2, label=f"seed {result['seed']}")
        if transform == "gtpo_sepa":
            axis.plot(
                next(r["lambda"] for r in results if r["condition"] == name),
                "k:",
                linewidth=1,
                label="SEPA's lambda",
            )
        axis.set(title=name, xlabel="step", ylim=(0, 1.02))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7, loc="lower right")
    axes[0].set_ylabel("correct rate (mean of 5 steps)")
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def page(results: list[dict], default: str) -> str:
    """The Markdown page."""
    demo = [r for r in results if r["condition"] == default]
    versions = ", ".join(f"{p} {metadata.version(p)}" for p in ("torch", "transformers", "peft", "numpy"))
    lines = [
        "# Proofs",
        "",
        "Written by `make proofs` from real runs of `retrain demo`, two at a time with one thread each.",
        f"Python {platform.python_version()}, {versions}; {os.cpu_count()} processors. Seconds are of a shared machine.",
        "",
        f"## The demo (`{default}`) on five seeds",
        "",
        f"Sampled accuracy at temperature 1.0 on {demo[0]['tasks']} held-out test problems, before and after",
        f"{demo[0]['steps']} steps.",
        "",
        "| seed | before | after | 95 % interval | gain | training seconds |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['seed']} | {r['before']:.1%} | {r['after']:.1%} | {r['low']:.1%} to {r['high']:.1%} "
        f"| {100 * (r['after'] - r['before']):+.1f} points | {r['training_seconds']:.0f} |"
        for r in demo
    ]
    lines += [
        "",
        "## The five conditions",
        "",
        f"Seeds {', '.join(map(str, OTHER_SEEDS))}, five for the demo's own condition. This shows that each one trains; it is no",
        "comparison: so few seeds cannot tell the conditions apart, and no difference is claimed.",
        "",
        "| condition | before | after, mean | after, lowest | smallest gain | last lambda | largest abs(ratio - 1) |",
        "|---|---|---|---|---|---|---|",
    ]
    for advantage, transform in CONDITIONS:
        rows = [r for r in results if r["condition"] == f"{advantage}+{transform}"]
        lines.append(
            f"| {advantage}+{transform} | {statistics.fmean(r['before'] for r in rows):.1%} "
            f"| {statistics.fmean(r['after'] for r in rows):.1%} | {min(r['after'] for r in rows):.1%} "
            f"| {100 * min(r['after'] - r['before'] for r in rows):+.1f} points | {rows[0]['lambda'][-1]:.2f} "
            f"| {max(r['ratio_error'] for r in rows):.1e} |"
        )
    lines += ["", "![Correct rate per step under each condition](proofs.svg)", ""]
    return "\n".join(lines)


def main() -> None:
    """Run what is missing and write page, facts and plots."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parallel", type=int, default=2)
    arguments = parser.parse_args()
    from retrain.config import templates
    from retrain.config.load import load_config

    config = load_config(Path(templates.path_of("tiny")))
    default = f"{config.algorithm.advantage_mode}+{config.algorithm.transform_mode}"
    RUNS.mkdir(parents=True, exist_ok=True)
    chosen = tuple(default.split("+"))
    jobs = [(c, s) for c in CONDITIONS for s in (SEEDS if c == chosen else OTHER_SEEDS)]
    with ThreadPoolExecutor(arguments.parallel) as pool:
        results = list(pool.map(lambda job: train(*job), jobs))
    FACTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    plot(results, ROOT / "docs" / "proofs.svg")
    PAGE.write_text(page(results, default), encoding="utf-8")
    demo = [r for r in results if r["condition"] == default]
    example = {
        "condition": default,
        "runs": [{k: r[k] for k in ("seed", "before", "after", "curve")} for r in demo],
    }
    (ROOT / "examples" / "tiny" / "expected.json").write_text(
        json.dumps(example, indent=1) + "\n", encoding="utf-8"
    )
    print(PAGE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
