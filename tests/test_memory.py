"""The memory plan: what it promises for the shapes that the project names."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from retrain import memory
from retrain.memory import MemoryPlan

QWEN3_4B = SimpleNamespace(
    hidden_size=2560, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8, head_dim=128,
    intermediate_size=9728, vocab_size=151936,
)  # fmt: skip
WEIGHTS = 4_022_000_000


def plan(monkeypatch, gigabytes, longest, config=QWEN3_4B, parameters=WEIGHTS):
    monkeypatch.setattr(memory, "_class_gb", lambda device: gigabytes)
    return MemoryPlan.for_model(config, torch.device("cuda"), torch.bfloat16, parameters, longest)


def test_a_24_gb_card_holds_the_cache_of_39_long_sequences_of_a_4b_model(monkeypatch):
    made = plan(monkeypatch, 24, 2200)
    assert made.kv_tokens >= 39 * 2200
    cache = made.kv_tokens * 144 * 1024
    assert cache + 2 * WEIGHTS + 66_060_288 * 16 < 24 * 2**30


@pytest.mark.parametrize("gigabytes", [12, 16, 24, 80, 141])
def test_prompts_are_computed_beside_a_full_cache_and_a_draw(monkeypatch, gigabytes):
    made = plan(monkeypatch, gigabytes, 16384)
    cache = made.kv_tokens * 144 * 1024
    draw = made.sample_rows * 151936 * 40
    prompts = made.prefill_tokens * memory.layer_bytes(QWEN3_4B, 8, 128, 2, True)
    assert 2 * WEIGHTS + cache + draw + prompts < 0.9 * gigabytes * 2**30
    assert 1024 <= made.prefill_tokens <= 4096


@pytest.mark.parametrize("gigabytes", [24, 80, 141])
def test_16k_tokens_of_a_4b_model_stay_within_18_gb(monkeypatch, gigabytes):
    made = plan(monkeypatch, gigabytes, 16384)
    assert made.checkpointing
    assert made.microbatch_tokens == 16384
    layer = memory.layer_bytes(QWEN3_4B, 8, 128, 2, True)
    kept = made.microbatch_tokens * (2 * 2560 * 36 + 2 * layer)
    assert 2 * WEIGHTS + kept + 66_060_288 * 16 < 18e9


def test_activations_are_kept_where_they_fit(monkeypatch):
    assert not plan(monkeypatch, 80, 2200).checkpointing
    assert plan(monkeypatch, 24, 2200).checkpointing


def test_the_plan_knows_what_a_layer_keeps(make_config, random_model):
    """Against the tensors that autograd really holds after a forward pass."""
    from retrain.attention import one_sequence
    from retrain.models import load_policy

    folder = str(random_model(hidden=128, heads=4, kv_heads=2, head_dim=32))
    policy = load_policy(make_config(model={"model": folder, "lora_rank": 4}), seed=1)
    held = {p.untyped_storage().data_ptr() for p in policy.model.parameters()}
    total = 0

    def keep(tensor):
        nonlocal total
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            held.add(storage.data_ptr())
            total += storage.nbytes()
        return tensor

    ids = torch.arange(256) % 200 + 2
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        out = policy.forward(ids, torch.arange(256), one_sequence)
    assert out.requires_grad
    config = policy.model.config
    planned = memory.layer_bytes(config, 2, 32, 4, False) * config.num_hidden_layers
    assert 0.5 * planned < total / 256 < 1.2 * planned
