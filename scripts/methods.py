"""Train the embedded model with every loss, estimator and transform over three seeds and write docs/methods/trained.md.

Real command lines, two at a time with one thread each, into logs/methods; finished runs are not repeated. It shows
that each method trains. It is no comparison: all use the same learning rate, and three seeds cannot tell them apart.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "methods" / "trained.md"
SEEDS = (1, 2, 3)
STEPS = 20
PLAIN = ("--advantage-mode", "grpo", "--transform-mode", "none")
TWICE = (*PLAIN, "--updates-per-batch", "2")

METHODS: dict[str, tuple[str, ...]] = {
    "loss importance_sampling": PLAIN,
    "loss importance_sampling, 2 updates": TWICE,
    "loss importance_sampling, TIS cap 2, 2 updates": (*TWICE, "--tis-cap", "2.0"),
    "loss ppo, 2 updates": (*TWICE, "--loss-kind", "ppo"),
    "loss ppo, clip-higher 0.28, dual clip 3, 2 updates": (
        *TWICE, "--loss-kind", "ppo", "--clip-high", "0.28", "--dual-clip", "3.0",
    ),
    "loss gspo, sequence_mean, 2 updates": (*TWICE, "--loss-kind", "gspo", "--agg", "sequence_mean"),
    "loss cispo, 2 updates": (*TWICE, "--loss-kind", "cispo"),
    "aggregation sequence_mean": (*PLAIN, "--agg", "sequence_mean"),
    "aggregation fixed (Dr. GRPO)": (*PLAIN, "--agg", "fixed"),
    "KL k1, 0.01": (*PLAIN, "--kl", "0.01", "--kl-kind", "k1"),
    "KL k2, 0.01": (*PLAIN, "--kl", "0.01", "--kl-kind", "k2"),
    "KL k3, 0.01": (*PLAIN, "--kl", "0.01", "--kl-kind", "k3"),
    "entropy bonus 0.001": (*PLAIN, "--entropy", "0.001"),
    "advantage grpo_std": ("--advantage-mode", "grpo_std", "--transform-mode", "none"),
    "advantage rloo": ("--advantage-mode", "rloo", "--transform-mode", "none"),
    "advantage reinforce_pp": ("--advantage-mode", "reinforce_pp", "--transform-mode", "none"),
    "advantage maxrl": ("--advantage-mode", "maxrl", "--transform-mode", "none"),
    "transform gtpo": ("--advantage-mode", "maxrl", "--transform-mode", "gtpo"),
    "transform gtpo_hicra": ("--advantage-mode", "maxrl", "--transform-mode", "gtpo_hicra"),
    "transform gtpo_sepa": ("--advantage-mode", "maxrl", "--transform-mode", "gtpo_sepa"),
    "transform gtpo_sepa_amp": ("--advantage-mode", "maxrl", "--transform-mode", "gtpo_sepa_amp"),
    "transform gtpo_sepa_amp_c": ("--advantage-mode", "maxrl", "--transform-mode", "gtpo_sepa_amp_c"),
    "transform entropy_mask": (
        "--advantage-mode", "grpo", "--transform-mode", "entropy_mask", "--uncertainty-kind", "shannon_entropy",
    ),
    "truncated mask": (*PLAIN, "--truncated", "mask"),
    "truncated soft": (*PLAIN, "--truncated", "soft"),
    "dynamic sampling": (*PLAIN, "--min-signal", "1.0", "--max-oversample", "2.0"),
    "learning rate cosine": (*PLAIN, "--lr-schedule", "cosine"),
    "lora dropout 0.05": (*PLAIN, "--dropout", "0.05"),
    "rslora, alpha 8": (*PLAIN, "--rslora", "true", "--lora-alpha", "8"),
}  # fmt: skip
"""What each row adds to the template tiny, as command-line flags."""


def train(runs: Path, name: str, flags: tuple[str, ...], seed: int) -> dict:
    """One run, unless it is finished; what its metrics say."""
    run = runs / f"{name.replace(' ', '_').replace(',', '')}_s{seed}"
    status = run / "run.json"
    if not (status.exists() and json.loads(status.read_text())["status"] == "done"):
        command = [
            sys.executable, "-m", "retrain", "demo", "--plain", "--overwrite", "--seed", str(seed), "--max-steps",
            str(STEPS), "--eval-every", "0", "--examples", "128", "--save-every", "0", "--rollouts", "false",
            "--generations", "0",
            "--log-dir", str(run), *flags,
        ]  # fmt: skip
        env = {**os.environ, "OMP_NUM_THREADS": "1", "RETRAIN_NO_DOTENV": "1"}
        done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    evaluations = [r for r in rows if "eval/accuracy" in r]
    steps = [r for r in rows if "condition" in r]
    result = {
        "method": name,
        "seed": seed,
        "before": evaluations[0]["eval/accuracy"],
        "after": evaluations[-1]["eval/accuracy"],
        "seconds": sum(r["step_time_s"] for r in steps),
        "ratio_error": max(
            max(r["ratio_max"] - 1, 1 - r["ratio_min"]) for r in steps if r["ratio_max"] is not None
        ),
    }
    print(f"{name}, seed {seed}: {result['before']:.1%} -> {result['after']:.1%}", flush=True)
    return result


def page(results: list[dict]) -> str:
    """The Markdown page."""
    versions = ", ".join(f"{p} {metadata.version(p)}" for p in ("torch", "transformers", "peft", "numpy"))
    lines = [
        "# Every method trains",
        "",
        f"Written by `python scripts/methods.py`: the template `tiny` with {STEPS} steps and the flags of each row, seeds "
        f"{', '.join(map(str, SEEDS))}; sampled accuracy on 128 held-out problems before and after.",
        f"Python {platform.python_version()}, {versions}; one thread per run on a shared machine.",
        "",
        "This shows that each method trains. It is no comparison: the learning rate is the template's for all of them, "
        "and three seeds cannot tell methods apart.",
        "",
        "| method | flags | before | after, by seed | smallest gain |",
        "|---|---|---|---|---|",
    ]
    for name, flags in METHODS.items():
        rows = sorted((r for r in results if r["method"] == name), key=lambda r: r["seed"])
        if not rows:
            continue
        after = ", ".join(f"{r['after']:.1%}" for r in rows)
        gain = 100 * min(r["after"] - r["before"] for r in rows)
        before = statistics.fmean(r["before"] for r in rows)
        lines.append(f"| {name} | `{' '.join(flags)}` | {before:.1%} | {after} | {gain:+.1f} points |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Run what is missing and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parallel", type=int, default=2)
    parser.add_argument("--runs", type=Path, default=ROOT / "logs" / "methods")
    parser.add_argument("--page", type=Path, default=PAGE)
    arguments = parser.parse_args()
    arguments.runs.mkdir(parents=True, exist_ok=True)
    jobs = [(name, flags, seed) for seed in SEEDS for name, flags in METHODS.items()]
    with ThreadPoolExecutor(arguments.parallel) as pool:
        results = list(pool.map(lambda job: train(arguments.runs, *job), jobs))
    arguments.page.parent.mkdir(parents=True, exist_ok=True)
    arguments.page.write_text(page(results), encoding="utf-8")
    arguments.page.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(arguments.page.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
