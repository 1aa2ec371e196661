"""Sampler and learner are the same policy: the ratio of every trained token is 1 up to float32 numerics."""

from __future__ import annotations

import json

import pytest
import torch

from retrain.config.load import load
from retrain.runner import execute

torch.set_num_threads(1)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_the_ratio_is_one_over_a_run_that_moves(tmp_path, temperature):
    made = {
        "backend": {"devices": "cpu"},
        "model": {"model": "retrain/tiny", "lora_rank": 16},
        "lora": {"alpha": 32},
        "algorithm": {"advantage_mode": "maxrl", "transform_mode": "gtpo_hicra"},
        "training": {
            "seed": 5,
            "max_steps": 5,
            "batch_size": 6,
            "group_size": 8,
            "max_tokens": 64,
            "temperature": temperature,
            "lr": 2e-3,
        },
        "data": {"source": "arithmetic"},
        "reward": {"type": "match"},
        "logging": {"log_dir": str(tmp_path / "run")},
    }
    execute(load(made))
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    trained = [r for r in rows if r["num_datums"]]
    assert len(trained) == 5
    assert max(max(r["ratio_max"] - 1, 1 - r["ratio_min"]) for r in trained) < 1e-4
    assert all(abs(r["approx_kl"]) < 1e-6 for r in trained)
