"""The other side of ``against_trl.py``: retrain's own loop over its own parts, step by step.

    python benches/our_step.py '{"case": ..., "model": ..., "settings": {...}}'

The parts come from ``training.build``; tasks, environment and reward are replaced by ones that bring the given prompts,
forced lengths and rewards. The loop is ``training.loop.train`` with everything it does in a run: metrics, the files
of the run directory, its stored rollouts. Checkpoints and evaluation are off on both sides.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from worker import Pipe


class Gate(threading.Event):
    """The loop asks ``is_set`` once before each step: there it waits for its turn."""

    def __init__(self, pipe: Pipe, now: dict[str, Any]) -> None:
        super().__init__()
        self._pipe, self._now = pipe, now

    def is_set(self) -> bool:
        message = self._pipe.next()
        if message is None:
            os._exit(0)
        self._now.clear()
        self._now.update(message["work"])
        return False


def main() -> None:
    job = json.loads(sys.argv[1])
    pipe = Pipe()
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", TOKENIZERS_PARALLELISM="false")
    import numpy as np
    import torch

    torch.set_num_threads(job["threads"])

    from retrain.config.load import load
    from retrain.protocols import Engine
    from retrain.tracking.rollouts import RolloutStore
    from retrain.tracking.run_log import RunLog
    from retrain.training.build import build
    from retrain.training.loop import train
    from retrain.types import Completion, IntArray, Message, Rollout, Sampling, Score, Task

    now: dict[str, Any] = {}

    class Tasks:
        """The step's prompts."""

        drawn = 0

        def __len__(self) -> int:
            return 2**31

        def take(self, n: int) -> list[Task]:
            made = [
                Task(f"case/train/{self.drawn + g}", (Message("user", "given"),), "", "case", self.drawn + g, {
                    "ids": np.asarray(now["prompts"][g], dtype=np.int32),
                    "lengths": now["lengths"][g], "rewards": now["rewards"][g],
                })
                for g in range(n)
            ]  # fmt: skip
            self.drawn += n
            return made

        def state_dict(self) -> dict[str, Any]:
            return {"drawn": self.drawn}

        def load_state_dict(self, state: Mapping[str, Any]) -> None:
            self.drawn = int(state["drawn"])

    class Forced:
        """Completions of the given lengths. Members of one length are one request, as in every run; else each is its
        own, because a request has one limit."""

        def __init__(self, renderer: Any) -> None:
            self._renderer = renderer

        async def attempt(self, task: Task, n: int, engine: Engine, sampling: Sampling) -> list[Rollout]:
            prompt, lengths = task.info["ids"], task.info["lengths"]

            def forced(member: int) -> Sampling:
                noise = replace(sampling.noise, member=member)
                return replace(sampling, max_tokens=lengths[member], stop_ids=(), stop=(), noise=noise)

            if len(set(lengths)) == 1:
                asked = [await engine.generate(prompt, n, forced(0))]
            else:
                asked = await asyncio.gather(*(engine.generate(prompt, 1, forced(m)) for m in range(n)))
            completions = [c for group in asked for c in group]
            if [len(c.token_ids_T) for c in completions] != lengths:
                raise SystemExit("a completion has not its forced length")
            return [self._rollout(task, m, prompt, c) for m, c in enumerate(completions)]

        def _rollout(self, task: Task, member: int, prompt: IntArray, c: Completion) -> Rollout:
            before = np.full(len(prompt), np.nan, dtype=np.float32)
            entropies = None if c.entropies_T is None else np.concatenate([before, c.entropies_T])
            return Rollout(
                task_id=task.id, member=member,
                token_ids_T=np.concatenate([prompt, c.token_ids_T]).astype(np.int32),
                sampled_T=np.repeat([False, True], [len(prompt), len(c.token_ids_T)]),
                logprobs_T=np.concatenate([before, c.logprobs_T]), entropies_T=entropies,
                text=self._renderer.decode(c.token_ids_T), stop=c.stop, weights_version=c.weights_version,
            )  # fmt: skip

    class Given:
        """The given rewards."""

        async def score(self, task: Task, rollouts_G: Sequence[Rollout]) -> list[Score]:
            return [Score(r, r > 0.5) for r in task.info["rewards"]]

    class Times:
        """What the loop itself reports of a step's parts."""

        def log(self, step: int, metrics: Mapping[str, Any]) -> None:
            names = {"sync_time_s": "sync", "sample_time_s": "sample", "train_time_s": "train"}
            pipe.parts.update({names[k]: float(metrics[k]) for k in names if metrics.get(k) is not None})

        def close(self) -> None:
            pass

    folder = Path(tempfile.mkdtemp(prefix="retrain-")) / "run"
    settings: dict[str, Any] = {
        "model": {"model": job["model"], "lora_rank": job["rank"]},
        "lora": {"alpha": 2 * job["rank"]},
        "backend": {"devices": job.get("device", "cpu")},
        "data": {"source": "arithmetic"},
        "algorithm": {"advantage_mode": "grpo", "transform_mode": "none"},
        "training": {
            "seed": 1, "max_steps": 1_000_000, "batch_size": job["groups"], "group_size": job["members"],
            "max_tokens": job["longest"], "temperature": 1.0, "lr": job["lr"], "save_every": 0,
        },
        "inference": {"dtype": job["dtype"]},
        "logging": {"log_dir": str(folder)},
    }  # fmt: skip
    for section, values in job["settings"].items():
        settings.setdefault(section, {}).update(values)
    config = load(settings).config
    folder.mkdir(parents=True)
    import logging

    logging.getLogger("retrain").setLevel(logging.INFO)
    with build(config, folder, clear=False, plain=True, check=lambda *_: None) as parts:
        renderer = parts.environment._renderer  # type: ignore[attr-defined]
        log = RunLog(
            folder,
            renderer,
            [Times()],
            generations=config.logging.generations,
            store=RolloutStore(folder) if config.logging.rollouts else None,
        )
        parts.tasks, parts.environment, parts.reward, parts.log = Tasks(), Forced(renderer), Given(), log
        train(config, parts, Gate(pipe, now))


if __name__ == "__main__":
    main()
