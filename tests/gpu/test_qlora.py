"""A base model in 4 bits on CUDA: the adapter trains, sampler and learner agree, the base keeps its bits."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
import torch

from retrain.backends import local
from retrain.engines import torch_engine
from retrain.types import NoiseKey, OptimStep, Sampling, TrainBatch, TrainRow

pytest.importorskip("bitsandbytes", reason='needs bitsandbytes: pip install "retrain[qlora]"')

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: scripts/gpu-tests"),
]


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_an_adapter_trains_over_a_base_in_four_bits(make_config, random_model, kind):
    model = str(random_model(hidden=256, layers=4, heads=4, kv_heads=2, head_dim=64, scale=1.5))
    config = make_config(
        backend={"devices": "gpu:0"}, model={"model": model, "lora_rank": 8, "quantization": kind},
        inference={"dtype": "auto"},
    )  # fmt: skip
    backend, engine = local.build(config, None), torch_engine.build(config, None)
    policy = backend.policy
    assert all(layer.quantized for layer in policy.layers.values())
    assert policy.head.weight.dtype == torch.bfloat16
    before = policy.base_checksum()
    engine.load(backend.publish())
    prompt = np.arange(5, 15, dtype=np.int32)
    got = asyncio.run(engine.generate(prompt, 4, Sampling(1.0, 1.0, 24, (), (), False, NoiseKey(0, 0, 0))))
    rows = []
    for completion in got:
        ids = np.concatenate([prompt, completion.token_ids_T])
        old = np.concatenate([np.full(len(prompt), np.nan, np.float32), completion.logprobs_T])
        sampled = np.arange(len(ids)) >= len(prompt)
        rows.append(TrainRow(ids, sampled, old.astype(np.float32), sampled.astype(np.float32)))
    tokens = sum(int(r.sampled_T.sum()) for r in rows)
    batch = TrainBatch(tuple(rows), tokens, len(rows), tokens, 1.0)
    reports = [backend.train_step(batch, OptimStep(1e-3, 0.0, 0.9, 0.95, 1e-8, 1.0)) for _ in range(4)]
    assert reports[0].approx_kl < 0.01
    assert not any(r.update_skipped for r in reports)
    assert reports[-1].ratio_mean > reports[0].ratio_mean  # what was rewarded became more likely
    engine.load(backend.publish())
    engine.close()
    assert policy.base_checksum() == before
