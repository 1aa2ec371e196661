"""One real campaign of the tiny model: what two conditions share for one seed, and how wandb, offline, knows the runs."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "light"))

import campaigns  # noqa: E402

wandb_pieces = runpy.run_path(str(HERE.parent / "real" / "trackers_read.py"))["wandb_pieces"]

CONFIG = """
[model]
model = "retrain/tiny"
lora_rank = 4
[backend]
devices = "cpu"
[training]
batch_size = 3
group_size = 8
max_tokens = 24
temperature = 1.0
lr = 3e-3
[data]
source = "arithmetic"
levels = [1]
[reward]
type = "match"
[logging]
log_dir = "logs"
wandb_project = "checks"
wandb_tags = "mine"
[campaign]
seeds = [11]
max_steps = 2
threads = 1
launcher = "processes"
max_workers = 2
[[campaign.conditions]]
advantage_mode = "grpo"
transform_mode = "none"
[[campaign.conditions]]
advantage_mode = "maxrl"
transform_mode = "gtpo"
lr = 1e-2
"""
NAMES = ("grpo+none_s11", "maxrl+gtpo~lr=0.01_s11")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    pytest.importorskip("wandb")
    folder = tmp_path_factory.mktemp("common")
    (folder / "campaign.toml").write_text(CONFIG)
    (folder / "home").mkdir()
    kept = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    done = subprocess.run(
        [sys.executable, "-m", "retrain", "campaign.toml"], cwd=folder, capture_output=True, text=True, timeout=400,
        env={**kept, "HOME": str(folder / "home"), "WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return campaigns.campaign(folder)


@pytest.mark.slow
def test_conditions_of_one_seed_meet_the_same_tasks_and_the_same_noise_until_they_have_learned(directory):
    runs = [directory / "runs" / name for name in NAMES]
    drawn = [
        [[(t["task"], t["draw"]) for t in row["tasks"]] for row in campaigns.rows(run / "emergence/steps.jsonl")]
        for run in runs
    ]
    assert drawn[0] == drawn[1]
    assert [len(step) for step in drawn[0]] == [3, 3]
    first, second = ([dict(np.load(run / f"rollouts/step_00000{step}.npz")) for run in runs] for step in (0, 1))
    same = ("ids", "sampled", "logprobs")
    for key in same:
        np.testing.assert_array_equal(first[0][key], first[1][key], err_msg=key)
    # They have learned from the first step, and differently, so that equality above is no accident of idle runs.
    adapters = [(run / "adapter/adapter_model.safetensors").read_bytes() for run in runs]
    assert adapters[0] != adapters[1]
    assert any(not np.array_equal(second[0][key], second[1][key]) for key in same)


@pytest.mark.slow
def test_wandb_knows_each_run_by_condition_and_seed(directory):
    for name in NAMES:
        label = name.removesuffix("_s11")
        (piece,) = wandb_pieces(directory / "runs" / name)
        assert (piece["name"], piece["group"], piece["project"], piece["exit"]) == (name, label, "checks", 0)
        assert piece["tags"] == ["mine", *label.split("~")[0].split("+"), "seed=11", directory.name]
