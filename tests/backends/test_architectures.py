"""Other families than Qwen3: the sampler, with its padding and cache, is the learner's policy for each of them."""

from __future__ import annotations

import asyncio
import shutil

import numpy as np
import pytest
import torch
from transformers.models.gemma2.modeling_gemma2 import Gemma2PreTrainedModel

from retrain.backends import local
from retrain.engines import torch_engine
from retrain.errors import ModelError
from retrain.renderer import load_renderer
from retrain.types import NoiseKey, Sampling, TrainBatch, TrainRow

torch.set_num_threads(1)

SHAPE = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 32,
    "max_position_embeddings": 512, "bos_token_id": None,
}  # fmt: skip
FAMILIES = {
    "llama": ("Llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 2, "tie_word_embeddings": False}),
    "mistral": ("Mistral", {"sliding_window": 8, "num_key_value_heads": 1, "tie_word_embeddings": False}),
    "qwen2": ("Qwen2", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "gemma2": ("Gemma2", {"num_key_value_heads": 1, "final_logit_softcapping": 3.0}),
    "granite": ("Granite", {"num_key_value_heads": 1, "logits_scaling": 4.0}),
}  # fmt: skip
# Lengths differ, so that all but the longest are padded; the longest is beyond Mistral's window before it starts.
PROMPTS = [[5, 9, 30], [8, 21, 7, 40, 20, 21, 9, 60, 61, 33, 12], [4], [60, 61, 62, 63, 64, 65]]


@pytest.fixture
def family(random_model, tmp_path):
    def make(name) -> str:
        import transformers

        source, (prefix, changes) = random_model(), FAMILIES[name]
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(source / file, tmp_path / file)
        known = transformers.AutoConfig.from_pretrained(source)
        ids = {"vocab_size": known.vocab_size, "eos_token_id": known.eos_token_id, "pad_token_id": known.pad_token_id}
        torch.manual_seed(2)
        config = getattr(transformers, prefix + "Config")(**SHAPE, **ids, **changes)
        model = getattr(transformers, prefix + "ForCausalLM")(config)
        with torch.no_grad():
            for key, p in model.named_parameters():
                # Biases start at zero: shaken too, or a forward that drops them would pass.
                p.copy_(torch.randn_like(p) * 0.1) if key.endswith("bias") else p.mul_(2.0)
        model.save_pretrained(tmp_path)
        return str(tmp_path)

    return make


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2"])
def test_the_ratio_is_one_for_padded_prompts_and_a_trained_adapter(make_config, family, name):
    config = make_config(model={"model": family(name), "lora_rank": 4})
    renderer = load_renderer(config.model.model)
    backend, engine = local.build(config, renderer), torch_engine.build(config, renderer)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, p in backend.policy.adapter.items():
            if "lora_B" in key:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.05)
    backend._version += 1
    engine.load(backend.publish())

    async def sample():
        asked = [Sampling(0.7, 1.0, 24, (1,), (), True, NoiseKey(7, 3, i)) for i in range(len(PROMPTS))]
        return await asyncio.gather(
            *(engine.generate(np.asarray(p, np.int32), 2, s) for p, s in zip(PROMPTS, asked, strict=True))
        )

    rows = []
    for prompt, group in zip(PROMPTS, asyncio.run(sample()), strict=True):
        for completion in group:
            n = len(completion.token_ids_T)
            ids = np.concatenate([np.asarray(prompt, np.int32), completion.token_ids_T])
            sampled = np.arange(len(ids)) >= len(prompt)
            old = np.concatenate([np.full(len(prompt), np.nan, np.float32), completion.logprobs_T])
            rows.append(TrainRow(ids, sampled, old.astype(np.float32), sampled.astype(np.float32)))
            with torch.no_grad(), backend.policy.mode("adapter"):
                scored = backend.policy.sequence_logprobs(ids, 0.7).numpy()[-n:]
            assert np.abs(np.expm1(scored - completion.logprobs_T)).max() < 1e-4
    engine.close()
    tokens = sum(int(r.sampled_T.sum()) for r in rows)
    assert tokens > 8 * 8
    stats = backend.gradient(TrainBatch(tuple(rows), tokens, len(rows), len(rows) * 24, 0.7))
    assert max(stats["ratio_max"] - 1, 1 - stats["ratio_min"]) < 1e-4
    assert all(bool(p.grad.abs().sum() > 0) for key, p in backend.policy.adapter.items() if "lora_A" in key)


@pytest.mark.parametrize("name", ["gemma2", "granite"])
def test_a_model_that_caps_or_rescales_its_logits_is_refused(make_config, family, monkeypatch, name):
    config = make_config(model={"model": family(name), "lora_rank": 4})
    renderer = load_renderer(config.model.model)
    if name == "gemma2":
        # This version of transformers refuses its attention first; a later one will not.
        with pytest.raises(ModelError):
            local.build(config, renderer)
        monkeypatch.setattr(Gemma2PreTrainedModel, "_supports_sdpa", True)
    with pytest.raises(ModelError, match=f"'{name}' changes its logits"):
        local.build(config, renderer)
