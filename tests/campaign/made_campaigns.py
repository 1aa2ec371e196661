"""Campaign directories made up for tests: as large, as unfinished and as broken as a test asks, written as real runs write."""

from __future__ import annotations

import json
import platform
import random
import time
from pathlib import Path

from retrain.campaign import manifest
from retrain.campaign.manifest import Declared, Manifest

FIVE = ("grpo+none", "maxrl+none", "maxrl+gtpo", "maxrl+gtpo_hicra", "maxrl+gtpo_sepa")
SEEDS = (42, 101, 202, 303, 404, 505, 606, 707)
FACTS = {
    "retrain": "0.1.0", "python": "3.11.7", "machine": "x86_64 Some(R) Processor", "torch": "2.13.0+cpu",
    "transformers": "5.23.0", "peft": "0.21.2", "code": "711b473d2f7810f0", "git": "8dc6fd791e36", "eval_tasks": "82" * 32,
    "train_tasks": "15" * 32, "reward_code": "", "plugins": "", "device": "cpu", "threads": "1", "weights": "00761358ca795939",
    "dtype": "float32",
}  # fmt: skip
CONFIG = """\
[model]
model = "retrain/tiny"
lora_rank = 16
[training]
max_steps = {steps}
lr = 0.001
[data]
source = "arithmetic"
[eval]
source = "arithmetic"
examples = 256
[campaign]
max_steps = {steps}
"""


def declared(conditions=FIVE, seeds=SEEDS, steps=40, **changes):
    """A design as the manifest holds it; the two modes are the settings of each condition."""
    given = {
        "name": "campaign_20261121T120000Z", "created": "2026-11-21T12:00:00+00:00",
        "conditions": {
            label: dict(zip(("algorithm.advantage_mode", "algorithm.transform_mode"), label.split("+"), strict=True))
            for label in conditions
        },
        "baseline": conditions[0], "seeds": tuple(seeds), "max_steps": steps, "outcome": "eval/accuracy",
        "evaluation": {"source": "arithmetic", "split": "test", "tasks": 256, "samples": 1, "seed": 0, "digest": "82" * 32},
        "alpha": 0.05, "smallest_effect": 0.02, "test": "welch", "looks": (len(seeds),), "threshold": None, "threads": 1,
        "tune": None, "versions": {"retrain": "0.1.0", "torch": "2.13.0+cpu"},
    }  # fmt: skip
    return Declared(**{**given, **changes})


def write_campaign(
    directory: Path, design=None, *, effects=(), noise=0.02, every=10, states=None, added=(), chosen=None, left_out=(),
    facts=None, values=None, base=0.4,
):  # fmt: skip
    """Write a campaign. ``effects`` are added to the final accuracy of each condition in order; ``states`` maps (condition,
    seed) to a state and the steps done, "waiting" leaving the run out; ``values`` maps (condition, seed) to an accuracy that
    all evaluations have; ``facts`` changes what single runs recorded."""
    design = design or declared()
    directory.mkdir(parents=True)
    manifest.write(directory, Manifest(design, chosen or {}, tuple(added)))
    (directory / "config.toml").write_text(CONFIG.format(steps=design.max_steps))
    with (directory / "processes.jsonl").open("w") as processes:
        for seed in (*design.seeds, *added):
            for index, label in enumerate(design.conditions):
                state, done = (states or {}).get((label, seed), ("done", design.max_steps))
                if state == "waiting" or (label, seed) in left_out:
                    continue
                final = base + (effects[index] if index < len(effects) else 0.0)
                write_run(
                    directory / f"runs/{label}_s{seed}", label, seed, design.max_steps, done, state, final, noise, every,
                    (facts or {}).get((label, seed), {}), (values or {}).get((label, seed)), design.outcome,
                )  # fmt: skip
                code = {"done": 0, "failed": 1}.get(state, 137)
                row = {
                    "name": f"{label}_s{seed}", "code": code, "seconds": 12.5, "cpu_s": 11.0, "peak_bytes": 3 * 2**28,
                    "time": 1.0, "why": "" if code == 0 else "killed by signal 9",
                }  # fmt: skip
                processes.write(json.dumps(row) + "\n")
    return directory


def write_run(path, label, seed, steps, done, state, final, noise, every, facts, value, outcome):  # fmt: skip
    """One run of ``done`` of ``steps`` steps: run.json, metrics.jsonl, heartbeat, events.log."""
    draw = random.Random(f"{label}/{seed}")
    end = final + draw.gauss(0, noise)
    path.mkdir(parents=True)
    (path / ".lock").touch()
    modes = label.split("+")
    rows = []
    for step in range(done + 1):
        share = step / steps
        if outcome == "eval/accuracy" and (step % every == 0 or step == steps) and (step < done or state != "interrupted"):
            accuracy = 0.2 + (end - 0.2) * share if value is None else value
            rows.append({
                "step": step, "eval/source": "arithmetic/test", "eval/accuracy": accuracy, "eval/accuracy_low": accuracy - 0.06,
                "eval/accuracy_high": accuracy + 0.06, "eval/tasks": 256, "eval/samples": 1, "eval/mean_reward": accuracy,
                "eval/mean_length": 24.4, "eval/max_token_hit_rate": 0.01, "eval/errors": 0, "eval/time_s": 0.3,
                "eval/mean@1": accuracy, "eval/pass@1": accuracy,
            })  # fmt: skip
        if step == done:
            break
        rate = min(max(0.2 + (end - 0.2) * share + draw.gauss(0, 0.04), 0), 1)
        rows.append({
            "step": step, "condition": label, "advantage_mode": modes[0], "transform_mode": modes[1], "batch_size": 8,
            "group_size": 16, "mean_reward": rate, "correct_rate": rate, "mean_length": 20 + 10 * share + draw.random(),
            "max_token_hit_rate": 0.0, "entropy_mean": 0.5 - 0.3 * share + 0.02 * draw.random(),
            "grad_norm": 0.2 + 0.1 * draw.random(), "approx_kl": 1e-5, "step_time_s": 0.3, "tokens_sampled": 2500,
            "tokens_per_second": 8000.0 + 100 * draw.random(), "gradient_hash": None,
        })  # fmt: skip
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    last = next(({"step": r["step"], "accuracy": r["eval/accuracy"]} for r in reversed(rows) if "eval/accuracy" in r), None)
    now, host = time.time(), "elsewhere" if state == "running" else platform.node()
    beat = {
        "pid": 1, "host": host, "started": 1.0, "max_steps": steps, "alarms": 0, "evaluation": last, "time": now, "step": done,
        "tokens": 2500 * done, "phase": "saving", "phase_since": now, "moved": now, "usual_s": 0.1, "memory": {},
    }  # fmt: skip
    run = {
        "facts": {**FACTS, **facts}, "started_at_step": 0, "max_steps": steps, "host": host, "started": 1.0, "step": done,
        "status": "running" if state == "dead" else state, "pid": 1, "heartbeat": now, "spent_s": 0.3 * done,
    }  # fmt: skip
    (path / "run.json").write_text(json.dumps(run))
    (path / "heartbeat.json").write_text(json.dumps(beat))
    if state == "failed":
        (path / "events.log").write_text(
            "2026-11-21 12:00:05,000 ERROR BackendError: the loss is not finite at step 12.\n"
        )
