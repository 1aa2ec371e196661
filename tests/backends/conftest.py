"""Learners over random models, and batches of any shape for them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from retrain.backends import local
from retrain.types import TrainBatch, TrainRow


@pytest.fixture
def make_backend(make_config, random_model):
    made = []

    def make(folder=None, rank=4, **sections):
        if folder is None:
            if not made:
                made.append(str(random_model(scale=2.0)))
            folder = made[0]
        config = make_config(**sections, model={"model": folder, "lora_rank": rank})
        backend = local.build(config, None)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for name, p in backend.policy.adapter.items():
                if "lora_B" in name:
                    p.copy_(torch.randn(p.shape, generator=generator) * 0.02)
        return backend

    return make


@pytest.fixture
def make_batch():
    def make(seed=0, rows=12, temperature=0.7, vocab=250, off_policy=0.1, backend=None):
        """Rows of mixed lengths, some with unsampled tokens in the middle, old logprobs near the policy's."""
        rng = np.random.default_rng(seed)
        made = []
        for i in range(rows):
            prompt, total = int(rng.integers(1, 9)), int(rng.integers(12, 40))
            ids = rng.integers(2, vocab, total).astype(np.int32)
            sampled = np.arange(total) >= prompt
            if i % 3 == 0:
                sampled[prompt + 2 : prompt + 4] = False
            old = np.full(total, np.nan, np.float32)
            old[sampled] = -5.0
            if backend is not None:
                with backend.policy.mode("adapter"):
                    scored = backend.policy.sequence_logprobs(ids, temperature).numpy()
                old[1:][sampled[1:]] = scored[sampled[1:]] + rng.normal(
                    0, off_policy, int(sampled[1:].sum())
                ).astype(np.float32)
            advantages = np.where(sampled, rng.normal(), 0).astype(np.float32)
            made.append(TrainRow(ids, sampled, old, advantages))
        tokens = sum(int(r.sampled_T.sum()) for r in made)
        return TrainBatch(tuple(made), tokens + 17, rows + 2, 4 * 4 * 40, temperature)

    return make
