"""The other side of ``equal_learning.py``: one training run of retrain, the tasks of a run, and the evaluation of both.

python benches/learn_our.py '{"do": "train" | "tasks" | "evaluate", ...}'
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any


def configuration(job: dict[str, Any], folder: Path) -> Any:
    """The template ``tiny`` with the plain advantage and no transform, as every run of the comparison has it."""
    from retrain.config.load import load

    return load(
        {
            "model": {"model": "retrain/tiny", "lora_rank": job["rank"]},
            "lora": {"alpha": 2 * job["rank"]},
            "backend": {"devices": "cpu"},
            "data": {"source": "arithmetic", "levels": [2]},
            "reward": {"type": "match"},
            "algorithm": {"advantage_mode": "grpo", "transform_mode": "none"},
            "training": {
                "seed": job["seed"], "max_steps": job["steps"], "batch_size": job["groups"],
                "group_size": job["members"], "max_tokens": job["max_tokens"], "temperature": 1.0, "lr": job["lr"],
                "warmup_steps": job["warmup"], "save_every": 0,
            },
            "eval": {"source": "arithmetic", "examples": 256, "every": 0},
            "logging": {"log_dir": str(folder)},
        }
    ).config  # fmt: skip


def tasks(job: dict[str, Any]) -> None:
    """Write the tasks that this seed's run draws, step by step, as ids and references."""
    from retrain import plugins
    from retrain.environments.mixture import training_tasks

    config = configuration(job, Path(job["out"]))
    renderer = plugins.load("renderer", "chat")(config.model.model, revision="", template_args={})
    _, source = training_tasks(config)
    steps = [
        [
            {"ids": renderer.encode(t.messages).tolist(), "reference": t.reference}
            for t in source.take(job["groups"])
        ]
        for _ in range(job["steps"])
    ]
    Path(job["tasks"]).write_text(json.dumps(steps), encoding="utf-8")


def parts_of(job: dict[str, Any], folder: Path) -> Any:
    """Everything of a run, made by the package's own constructor."""
    from retrain.training.build import build

    folder.mkdir(parents=True, exist_ok=True)
    config = configuration(job, folder)
    return config, build(config, folder, clear=False, plain=True, check=lambda *_: None)


def train_run(job: dict[str, Any]) -> None:
    """Train one seed; adapters every few steps, and the CPU seconds of every step without the saving."""
    from retrain.training.loop import train

    out = Path(job["out"])
    config, made = parts_of(job, out / "run")
    with made as parts:
        parts.evaluator = None
        cpu: list[float] = []
        clock = {"startup": 0.0, "begun": -1.0}

        class Watch(threading.Event):
            """The loop asks ``is_set`` before every step."""

            def is_set(self) -> bool:
                visit()
                return False

        def visit() -> None:
            if clock["begun"] >= 0:
                cpu.append(time.process_time() - clock["begun"])
            else:
                clock["startup"] = time.process_time()
            step = parts.counters.step
            if step and step % job["every"] == 0:
                folder = out / f"step-{step}"
                folder.mkdir(parents=True, exist_ok=True)
                parts.backend.policy.save_adapter(folder)  # type: ignore[attr-defined]
            clock["begun"] = time.process_time()

        checkpoints = parts.checkpoints
        save = checkpoints.save

        def last(*given: Any, **named: Any) -> Any:
            visit()
            return save(*given, **named)

        checkpoints.save = last  # type: ignore[method-assign]
        train(config, parts, Watch())
    rows = (out / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rewards = [json.loads(row).get("mean_reward") for row in rows]
    facts = {
        "seed": job["seed"],
        "startup_cpu_s": round(clock["startup"], 3),
        "cpu_s": [round(c, 4) for c in cpu[: job["steps"]]],
        "rewards": [round(r, 5) for r in rewards if r is not None],
    }
    (out / "times.json").write_text(json.dumps(facts), encoding="utf-8")


def evaluate(job: dict[str, Any]) -> None:
    """Accuracy of every adapter folder on the same held-out tasks with the same noise, by the same function."""
    config, made = parts_of({**job, "seed": 0}, Path(job["out"]))
    found: dict[str, float] = {}
    with made as parts:
        evaluator = replace(parts.evaluator, samples=job["samples"])  # type: ignore[type-var]

        def accuracy() -> float:
            parts.engine.load(parts.backend.publish())
            metrics, _ = evaluator.run(
                parts.events, parts.environment, parts.reward, parts.engine,
                deadline_s=config.training.phase_timeout_s, max_error_rate=0.0,
            )  # fmt: skip
            return float(metrics["eval/accuracy"])

        found[""] = accuracy()
        for folder in job["adapters"]:
            parts.backend.policy.load_adapter(Path(folder))  # type: ignore[attr-defined]
            found[folder] = accuracy()
    Path(job["found"]).write_text(json.dumps(found), encoding="utf-8")


def main() -> None:
    job = json.loads(sys.argv[1])
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    import torch

    torch.set_num_threads(1)
    {"tasks": tasks, "train": train_run, "evaluate": evaluate}[job["do"]](job)


if __name__ == "__main__":
    main()
