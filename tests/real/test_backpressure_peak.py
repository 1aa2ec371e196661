"""Back pressure in real runs, on an engine that really takes the time of a known law: it ends near a peak that lies inside
its limits, and a run that is killed in the middle and resumed loses no task and counts none twice."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from retrain.config.load import load
from retrain.runner import execute

GROUP, PEAK, SIGMA = 2, 24.0, 0.02

ENGINE = '''
"""Made-up answers, which take as long as the law says for so many rollouts at once."""
import asyncio, os, pathlib, signal, time

import numpy as np

from retrain.types import Completion

TOKENS, RATE, SIGMA, KAPPA, ROOM = 4, 40.0, {sigma}, {kappa}, {room}
HERE = pathlib.Path(__file__).parent


class Lawful:
    def __init__(self):
        self.live = 0

    def load(self, weights):
        self.version = weights.version

    def close(self):
        pass

    async def generate(self, prompt_ids, n, sampling):
        if not self.live:
            self.rollouts = 0
        self.live += 1
        self.rollouts += n
        began = time.perf_counter()
        try:
            if self.rollouts > ROOM:
                (HERE / "ran_out").write_text("")
                raise MemoryError
            if (HERE / "ran_out").exists() and not (HERE / "killed").exists():
                (HERE / "killed").write_text("")
                os.kill(os.getpid(), signal.SIGKILL)
            await asyncio.sleep(0.01)  # by then all of the step have asked
            p = self.rollouts
            takes = TOKENS * (1 + SIGMA * (p - 1) + KAPPA * p * (p - 1)) / RATE
            await asyncio.sleep(takes - (time.perf_counter() - began))
            ids, sure = np.full(TOKENS, 5, np.int32), np.full(TOKENS, -1.0, np.float32)
            return [Completion(ids, sure, sure * -1, "length", self.version) for _ in range(n)]
        finally:
            self.live -= 1


def make_engine(config, renderer):
    return Lawful()
'''


def config(folder: Path, *, room: int = 10**9, **changes: Any) -> dict[str, Any]:
    """A run in ``folder`` whose throughput peaks at PEAK rollouts at once; memory holds ``room``."""
    plugin = folder / "plugins" / "lawful.py"
    plugin.parent.mkdir(exist_ok=True)
    if not plugin.exists():
        plugin.write_text(ENGINE.format(sigma=SIGMA, kappa=(1 - SIGMA) / PEAK**2, room=room))
    made: dict[str, Any] = {
        "model": {"model": "retrain/tiny", "lora_rank": 4},
        "backend": {"devices": "cpu"},
        "inference": {"engine": "lawful.make_engine"},
        "data": {"source": "arithmetic", "levels": [1]},
        "reward": {"type": "match"},
        "algorithm": {"advantage_mode": "grpo", "transform_mode": "none"},
        "training": {
            "seed": 3, "max_steps": 26, "batch_size": 1, "group_size": GROUP, "max_tokens": 4, "lr": 1e-9, "save_every": 4,
        },
        "loss": {"kl": 0.01},
        "backpressure": {"enabled": True, "max_batch_size": 32, "warmup_steps": 6},
        "logging": {"log_dir": str(folder / "run"), "generations": 0},
        "plugins": {"search_paths": [str(plugin.parent)]},
    }  # fmt: skip
    for section, values in changes.items():
        made[section] = {**made.get(section, {}), **values}
    return made


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_real_run_ends_near_a_peak_inside_its_limits(tmp_path: Path) -> None:
    execute(load(config(tmp_path)), plain=True)
    made = rows(tmp_path / "run")
    sizes = [row["batch_size"] for row in made]
    best = PEAK / GROUP
    # The first step of a process is measured again: it loads.
    assert [size for size, _ in itertools.groupby(sizes)][:5] == [1, 2, 4, 8, 16]
    assert all(b <= 2 * a for a, b in itertools.pairwise(sizes))
    # It leaves the sweep's last size, which lies far above the peak, as soon as noise lets it tell, and then never goes
    # above the peak again.
    fell = next(i for i, row in enumerate(made) if row["bp_action"] == "throttle")
    assert fell <= 16
    assert max(sizes[fell + 1 :]) <= 1.1 * best
    assert all(0.5 * best <= size <= best for size in sizes[-8:])
    assert math.isclose(made[-1]["bp_p_star"], PEAK, rel_tol=0.3)
    assert made[-1]["bp_p_star_low"] < made[-1]["bp_p_star"] < made[-1]["bp_p_star_high"]


def test_a_run_killed_in_the_middle_loses_no_task_and_counts_none_twice(tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = config(tmp_path, room=20, training={"max_steps": 14})
    resumed = {"config": {**first, "resume": {"from": str(run)}}}
    # The engine kills the first process where the step in which memory ran out has begun again; the second one is
    # killed somewhere in the step after the eighth.
    jobs = tmp_path / "jobs.json"
    jobs.write_text(json.dumps([{"config": first}, {**resumed, "kill_at": 8}, resumed]))
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("resume_jobs.py")), str(jobs)],
        env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert [r["status"] for r in results] == [-9, -9, 0], results[-1]["output"]
    assert (tmp_path / "plugins/killed").exists()
    for said in (r["output"] for r in results[1:]):
        assert "byte-exact: no, because " in said
        assert "back pressure reads the clock" in said

    made = [row for row in rows(run) if "condition" in row]
    assert [row["step"] for row in made] == list(range(14))
    assert sum(row["bp_out_of_memory"] for row in made) == 1
    steps = [json.loads(line) for line in (run / "emergence/steps.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == list(range(14))
    assert [len(step["tasks"]) for step in steps] == [row["batch_size"] for row in made]
    taken = [task for step in steps for task in step["tasks"]]
    assert [task["draw"] for task in taken] == list(range(len(taken)))
    newest = run / json.loads((run / "trainer_state.json").read_text())["checkpoint"]
    state = json.loads((newest / "state.json").read_text())
    assert state["tasks"]["draw"] == len(taken)
    assert [task["task"] for task in taken] == _uninterrupted(tmp_path / "whole", len(taken))


def _uninterrupted(folder: Path, count: int) -> list[str]:
    """Ids of the first ``count`` tasks in the order of a run that nothing stops and whose batch size is fixed."""
    folder.mkdir()
    whole = config(folder, training={"max_steps": -(-count // 8), "batch_size": 8}, backpressure={"enabled": False})
    whole["inference"] = {}
    execute(load(whole), plain=True)
    steps = [json.loads(line) for line in (folder / "run/emergence/steps.jsonl").read_text().splitlines()]
    return [task["task"] for step in steps for task in step["tasks"]][:count]
