"""What only a CUDA device can show: bf16 by default, small updates that act, a ratio near 1, repeatable steps."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from retrain.backends import local
from retrain.config.load import load
from retrain.runner import execute
from retrain.types import OptimStep, TrainBatch, TrainRow

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: scripts/gpu-tests"),
]


@pytest.fixture(scope="module")
def model(random_model):
    from transformers import AutoModelForCausalLM

    folder = random_model(hidden=512, layers=8, heads=8, kv_heads=2, head_dim=64, scale=1.5)
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    return str(folder)


def scores(backend, rows):
    with backend.policy.mode("adapter"):
        out = [backend.policy.sequence_logprobs(np.asarray(row, np.int32)) for row in rows]
    return torch.cat(out).double().cpu().numpy()


def test_one_update_moves_bf16_logprobs_as_far_as_float32(make_config, model):
    slopes = []
    for seed in range(3):
        pair = {
            dtype: local.build(
                make_config(
                    backend={"devices": "gpu:0"}, model={"model": model, "lora_rank": 32}, lora={"alpha": 64},
                    inference={"dtype": dtype}, training={"seed": seed},
                ),
                None,
            )
            for dtype in ("auto", "fp32")
        }  # fmt: skip
        half, single = pair["auto"], pair["fp32"]
        assert half.policy.dtype == torch.bfloat16
        rng = np.random.default_rng(seed)
        rows = rng.integers(2, 250, (48, 96)).astype(np.int32)
        before = {name: scores(backend, rows) for name, backend in pair.items()}
        sampled = np.arange(96) >= 8
        train = []
        for i, ids in enumerate(rows[:16]):
            old = np.full(96, np.nan, np.float32)
            old[sampled] = before["auto"].reshape(48, 95)[i][7:]
            train.append(TrainRow(ids, sampled, old, np.where(sampled, rng.normal(), 0).astype(np.float32)))
        half.train_step(TrainBatch(tuple(train), 16 * 88, 16, 1, 1.0), OptimStep(4e-5, 0.0, 0.9, 0.95, 1e-8, 1.0))
        with torch.no_grad():
            for p, q in zip(single.policy.adapter.values(), half.policy.adapter.values(), strict=True):
                p.copy_(q)
        x, y = (scores(pair[name], rows) - before[name] for name in ("fp32", "auto"))
        slopes.append(float((x * y).sum() / (x * x).sum()))
    assert 0.95 <= np.mean(slopes) <= 1.05, slopes


def config(run, dtype, **training):
    return load(
        {
            "backend": {"devices": "gpu:0"},
            "model": {"model": "retrain/tiny", "lora_rank": 16},
            "lora": {"alpha": 32},
            "algorithm": {"advantage_mode": "maxrl", "transform_mode": "gtpo"},
            "inference": {"dtype": dtype},
            "training": {
                "seed": 5, "max_steps": 4, "batch_size": 8, "group_size": 16, "max_tokens": 64, "temperature": 0.7,
                "lr": 1e-3, **training,
            },
            "data": {"source": "arithmetic"},
            "reward": {"type": "match"},
            "logging": {"log_dir": str(run)},
        }
    )  # fmt: skip


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("dtype", "bound"), [("fp32", 1e-4), ("bf16", 0.5)])
def test_the_ratio_is_near_one(tmp_path, dtype, bound):
    execute(config(tmp_path / "run", dtype))
    got = [r for r in rows(tmp_path / "run") if r["num_datums"]]
    assert got
    assert max(max(r["ratio_max"] - 1, 1 - r["ratio_min"]) for r in got) < bound
    assert max(r["approx_kl"] for r in got) < 0.01


def test_deterministic_mode_repeats_a_run_to_the_byte(tmp_path):
    for name in ("a", "b"):
        execute(config(tmp_path / name, "bf16", deterministic=True))
    files = [(tmp_path / name / "adapter/adapter_model.safetensors").read_bytes() for name in ("a", "b")]
    torch.use_deterministic_algorithms(False)
    assert files[0] == files[1]
