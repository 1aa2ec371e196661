"""Run directories made up for tests of the report: as long, as broken and as hostile as a test asks."""

from __future__ import annotations

import json
import math
import random
import time
from pathlib import Path

HOSTILE = (
    '</script><script>window.owned = 1</script><img src=x onerror="window.owned = 2"> <!-- & " \' ` ${window.owned = 3}'
    " \u202eevil\u202c \x00\x1b[31m\ufeff\u2028 日本語 مرحبا 👩‍🔬 \ud800"
)

CONFIG = """\
[model]
model = "retrain/tiny"
lora_rank = 16
[algorithm]
advantage_mode = "maxrl"
transform_mode = "gtpo_sepa"
[training]
seed = 42
max_steps = {steps}
batch_size = 8
lr = 0.001
[data]
source = "arithmetic"
[reward]
type = "match"
[logging]
log_dir = "somewhere"
"""


def step_row(step, steps, draw, *, spike=False):
    """A training step as metrics.jsonl holds it."""
    done = step / max(steps, 1)
    rate = min(max(0.2 + 0.6 * done + draw.gauss(0, 0.05), 0), 1)
    silent = int(8 * 0.4 * done)
    sample, train = 1.5 + draw.random(), 0.8 + 0.1 * draw.random()
    return {
        "step": step, "condition": "maxrl+gtpo_sepa", "uncertainty_kind": "surprisal", "batch_size": 8, "group_size": 16,
        "sepa_lambda": min(done * 2, 1), "sepa_gate_open": True, "mean_reward": rate + 0.1 * draw.random(),
        "correct_rate": rate, "mean_length": 200 + 100 * done + draw.gauss(0, 10), "max_token_hit_rate": 0.05,
        "reward_error_rate": 0.0, "rollout_error_rate": 0.0, "rewards/correct": rate, "rewards/format": 0.1 * draw.random(),
        "sources/easy/correct_rate": min(rate * 1.3, 1), "sources/hard/correct_rate": rate / 2 if step % 3 else None,
        "sources/easy/groups": 4, "skipped_errors": 0, "skipped_all_correct": silent, "skipped_all_wrong": 1,
        "skipped_equal_rewards": 0, "skipped_all_cut": 0, "entropy_mean": 0.5 * math.exp(-done) + 0.02 * draw.random(),
        "exec_entropy_mean": 0.5, "plan_entropy_mean": 0.6, "exec_surprisal_mean": 0.4, "plan_surprisal_mean": 0.5,
        "grad_norm": 1000.0 if spike else 0.2 + 0.1 * draw.random(), "ratio_mean": 1.0, "ratio_min": 0.99, "ratio_max": 1.02,
        "approx_kl": 1e-5 * (1 + draw.random()), "moved_kl": 1e-3, "skipped_update": False, "lr": 1e-3, "num_datums": 128,
        "loss": -0.5, "step_time_s": sample + train + 0.2, "sync_time_s": 0.01, "sample_time_s": sample,
        "score_time_s": 0.02, "train_time_s": train, "tokens_sampled": 25000, "tokens_per_second": 25000 / sample,
    }  # fmt: skip


def evaluation_row(step, accuracy, suites=()):
    """An evaluation as metrics.jsonl holds it."""
    row = {"step": step}
    for prefix in ("eval", *(f"eval/{name}" for name in suites)):
        row |= {
            f"{prefix}/source": prefix.removeprefix("eval/") if prefix != "eval" else "arithmetic/test",
            f"{prefix}/accuracy": accuracy, f"{prefix}/accuracy_low": max(accuracy - 0.06, 0),
            f"{prefix}/accuracy_high": min(accuracy + 0.06, 1), f"{prefix}/tasks": 256, f"{prefix}/samples": 4,
            f"{prefix}/mean_reward": accuracy, f"{prefix}/mean_length": 210.0, f"{prefix}/max_token_hit_rate": 0.01,
            f"{prefix}/errors": 0, f"{prefix}/time_s": 4.0, f"{prefix}/pass@1": accuracy,
            f"{prefix}/pass@4": min(accuracy * 1.4, 1),
        }  # fmt: skip
    return row


def generation(step, member, draw, *, tokens=60, completion=None, **changes):
    """A rollout as generations.jsonl holds it."""
    correct = draw.random() < 0.5
    words = [f" word{draw.randrange(90)}" for _ in range(tokens - 1)] + [
        " \\boxed{7}" if correct else " \\boxed{8}"
    ]
    if completion is not None:
        words = [completion[i : i + 3] for i in range(0, len(completion), 3)]
    return {
        "step": step, "task": f"arithmetic/{step}", "member": member, "prompt": f"What is {step} - {step} + 7?",
        "completion": "".join(words), "reference": "7", "reward": float(correct), "parts": {"correct": float(correct)},
        "stop": "stop", "error": "", "tokens": len(words), "planning_tokens": 2, "advantage_mean": 0.1, "skipped": "",
        "weights_version": step,
        "credit": {
            "uncertainty_kind": "surprisal", "texts": words,
            "advantages": [float(f"{draw.gauss(0, 0.5):.6g}") for _ in words],
            "uncertainty": [float(f"{abs(draw.gauss(0, 1)):.6g}") for _ in words],
            "planning": [int(i in (1, 2)) for i, _ in enumerate(words)],
            "logprobs": [float(f"{-abs(draw.gauss(0, 1)):.6g}") for _ in words],
        },
        **changes,
    }  # fmt: skip


def fabricate(
    directory: Path, steps: int, *, every=0, generations=8, tokens=60, status="done", spike=None, suites=(), extra=(), seed=0,
    config=None, events="", facts=None,
):  # fmt: skip
    """Write a run of ``steps`` completed steps; ``every`` steps an evaluation; ``extra`` rollouts after the others."""
    draw = random.Random(seed)
    pools = {}
    (directory / "emergence").mkdir(parents=True)
    (directory / ".lock").touch()
    (directory / "config.toml").write_text(config or CONFIG.format(steps=steps))
    run = {
        "facts": {"retrain": "0.1.0", "torch": "2.13.0", "device": "cpu", "dtype": "float32", "git": "31d6e03a"},
        "started_at_step": 0, "max_steps": steps, "step": steps, "status": status, "pid": 1, "heartbeat": time.time(),
    }  # fmt: skip
    (directory / "run.json").write_text(json.dumps({**run, **(facts or {})}))
    (directory / "events.log").write_text(events)
    with (
        (directory / "metrics.jsonl").open("w") as metrics,
        (directory / "emergence/generations.jsonl").open("w") as texts,
    ):
        for step in range(steps):
            if every and step % every == 0:
                metrics.write(json.dumps(evaluation_row(step, 0.3 + 0.4 * step / steps, suites)) + "\n")
            metrics.write(json.dumps(step_row(step, steps, draw, spike=step == spike)) + "\n")
            for member in range(generations):
                # The numbers of a few rollouts serve all: drawing millions would take minutes.
                pool = pools.get((step % 5, member)) or pools.setdefault(
                    (step % 5, member), generation(0, member, draw, tokens=tokens)
                )
                texts.write(
                    json.dumps(
                        {**pool, "step": step, "task": f"arithmetic/{step}", "prompt": f"What is {step} + 7?"}
                    )
                    + "\n"
                )
        if every:
            metrics.write(json.dumps(evaluation_row(steps, 0.7, suites)) + "\n")
        for row in extra:
            texts.write(json.dumps(row) + "\n")
    return directory
