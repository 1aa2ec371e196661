"""bf16 must not round small adapter updates away: what one update moves is what float32 says it moves."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
import torch

from retrain.backends import local
from retrain.engines import torch_engine
from retrain.types import NoiseKey, OptimStep, Sampling, TrainBatch, TrainRow

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model(random_model):
    """Hidden 512, 8 layers, weights that bf16 holds exactly, so that both dtypes start from one model."""
    from transformers import AutoModelForCausalLM

    folder = random_model(hidden=512, layers=8, heads=8, kv_heads=2, head_dim=64, scale=1.5)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    loaded.save_pretrained(folder)
    return str(folder)


def scores(backend, rows):
    """Learner logprobs of every token of every row."""
    with backend.policy.mode("adapter"):
        out = [backend.policy.sequence_logprobs(np.asarray(row, np.int32)) for row in rows]
    return torch.cat(out).double().numpy()


@pytest.mark.slow
def test_one_update_moves_bf16_logprobs_as_far_as_float32(make_config, model):
    slopes = []
    for seed in range(3):
        pair = {}
        for dtype in ("bf16", "fp32"):
            config = make_config(
                model={"model": model, "lora_rank": 32},
                lora={"alpha": 64},
                inference={"dtype": dtype},
                training={"seed": seed},
            )
            pair[dtype] = local.build(config, None)
        rng = np.random.default_rng(seed)
        rows = rng.integers(2, 250, (44, 96)).astype(np.int32)
        half, single = pair["bf16"], pair["fp32"]
        assert half.policy.dtype == torch.bfloat16
        assert all(p.dtype == torch.float32 for p in half.policy.adapter.values())
        before = {name: scores(backend, rows) for name, backend in pair.items()}
        sampled = np.arange(96) >= 8
        train = []
        for i, ids in enumerate(rows[:4]):
            old = np.full(96, np.nan, np.float32)
            old[sampled] = before["bf16"].reshape(44, 95)[i][7:]
            train.append(TrainRow(ids, sampled, old, np.where(sampled, rng.normal(), 0).astype(np.float32)))
        report = half.train_step(
            TrainBatch(tuple(train), 4 * 88, 4, 1, 1.0), OptimStep(4e-5, 0.0, 0.9, 0.95, 1e-8, 1.0)
        )
        assert not report.update_skipped
        with torch.no_grad():
            for p, q in zip(single.policy.adapter.values(), half.policy.adapter.values(), strict=True):
                p.copy_(q)
        moved = {name: scores(backend, rows) - before[name] for name, backend in pair.items()}
        x, y = moved["fp32"], moved["bf16"]
        assert len(x) >= 4096
        slopes.append(float((x * y).sum() / (x * x).sum()))
    assert 0.95 <= np.mean(slopes) <= 1.05, slopes


def test_the_bf16_sampler_agrees_with_the_bf16_learner(make_config, model):
    config = make_config(model={"model": model}, inference={"dtype": "bf16"})
    backend, engine = local.build(config, None), torch_engine.build(config, None)
    with torch.no_grad():
        for name, p in backend.policy.adapter.items():
            if "lora_B" in name:
                p.normal_(0, 0.01)
    engine.load(backend.publish())
    prompt = np.arange(5, 15, dtype=np.int32)
    sampling = Sampling(1.0, 1.0, 32, (), (), False, NoiseKey(0, 0, 0))
    got = asyncio.run(engine.generate(prompt, 8, sampling))
    engine.close()
    gaps = []
    for completion in got:
        with backend.policy.mode("adapter"):
            scored = backend.policy.sequence_logprobs(
                np.concatenate([prompt, completion.token_ids_T])
            ).numpy()
        gaps.append(scored[len(prompt) - 1 :] - completion.logprobs_T)
    gap = np.concatenate(gaps)
    assert np.abs(gap).mean() < 0.05
    assert np.square(gap).mean() / 2 < 0.01  # the field's gate on mismatch KL
