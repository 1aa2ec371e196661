"""Counts of operations and bytes: against the published arithmetic of a 4B model, and against torch's own counter."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from retrain.errors import ModelError
from retrain.roofline import Floor, Peaks, Row, Shape, Work, decode, floor, learn, prefill

QWEN3_4B = Shape.of(
    SimpleNamespace(
        hidden_size=2560, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8, head_dim=128,
        intermediate_size=9728, vocab_size=151936, tie_word_embeddings=True,
    )
)  # fmt: skip
SMALL = Shape(hidden=64, layers=3, heads=4, kv_heads=2, head_dim=16, intermediate=160, vocab=300, tied=True)


def test_weights_and_cache_of_a_4b_model():
    assert QWEN3_4B.weights * 2 / 1e9 == pytest.approx(8.04, abs=0.005)
    assert QWEN3_4B.kv_numbers * 2 == 144 * 1024


def test_the_learner_costs_what_is_published():
    adapter = QWEN3_4B.adapter_weights(32)
    assert adapter == pytest.approx(66.06e6, rel=1e-3)
    for context, expected in ((2200, 18.4), (16384, 31.0)):
        work = learn(QWEN3_4B, [Row(context, context)], 2, adapter=adapter)
        assert work.flops / context / 1e9 == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize(("kv_itemsize", "expected"), [(2, 18.2e3), (1, 28.8e3)])
def test_the_decode_roof_of_a_4b_model(kv_itemsize, expected):
    batch, prompt, length = 128, 152, 2048
    pieces = decode(QWEN3_4B, [prompt] * batch, [length] * batch, 2, kv_itemsize=kv_itemsize)
    got = floor(pieces, Peaks(flops=790e12, bandwidth=4.3e12))
    assert got.bound == "memory"
    assert batch * (length - 1) / got.seconds == pytest.approx(expected, rel=0.005)


def test_decode_equals_a_count_step_by_step():
    prompts, lengths, adapter = [3, 3, 7, 2], [1, 4, 6, 6], 50
    pieces = decode(SMALL, prompts, lengths, 4, adapter=adapter)
    assert len(pieces) == max(lengths) - 1
    for t, piece in enumerate(pieces, start=1):
        live = [p for p, n in zip(prompts, lengths, strict=True) if n > t]
        weights = SMALL.block_weights + SMALL.head_weights + adapter
        # Step 1 runs the token that the prefill sampled, at position p: it sees p + 1 keys, itself included.
        seen = sum(p + t for p in live)
        assert piece.flops == 2 * weights * len(live) + SMALL.pair_flops * seen
        assert piece.bytes == 4 * weights + 4 * SMALL.kv_numbers * seen


def test_shared_prompts_are_counted_once():
    whole = learn(SMALL, [Row(10, 6), Row(10, 6)], 4, adapter=70)
    shared = learn(SMALL, [Row(10, 6), Row(10, 6, shared=4)], 4, adapter=70)
    saved = (4 * SMALL.block_weights + 6 * 70) * 4 + 3 * SMALL.pair_flops * (1 + 2 + 3 + 4)
    assert whole.flops - shared.flops == saved
    # A row alone, and the rest of it beside a prompt: the same pairs in all.
    assert (
        learn(SMALL, [Row(9, 0), Row(9, 0, shared=9)], 4, adapter=0).flops
        == learn(SMALL, [Row(9, 0)], 4, adapter=0).flops
    )


def test_a_floor_adds_the_scarcer_resource_of_every_piece():
    got = floor([Work(10, 1), Work(1, 30)], Peaks(flops=1, bandwidth=10))
    assert got == Floor(Work(11, 31), 10 + 3, "compute")
    assert got.share(26) == 0.5
    assert floor([], Peaks(1, 1)).seconds == 0
    assert prefill(SMALL, [], 4) == Work()


def test_other_models_are_refused_by_name():
    with pytest.raises(ModelError, match="mixtures"):
        Shape.of(SimpleNamespace(num_experts=8))
    with pytest.raises(ModelError, match="num_attention_heads"):
        Shape.of(SimpleNamespace(hidden_size=8))


@pytest.fixture(scope="module")
def model():
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=SMALL.vocab, hidden_size=SMALL.hidden, intermediate_size=SMALL.intermediate,
        num_hidden_layers=SMALL.layers, num_attention_heads=SMALL.heads, num_key_value_heads=SMALL.kv_heads,
        head_dim=SMALL.head_dim, tie_word_embeddings=True, attn_implementation="eager",
        bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    assert Shape.of(config) == SMALL
    return Qwen3ForCausalLM(config).requires_grad_(False)


def counted(run) -> int:
    """Operations as torch counts them."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


# Torch multiplies all T * T pairs of a dense attention, T * (T + 1) / 2 of which are causal.
def not_causal(T: int) -> int:
    return SMALL.pair_flops * (T * T - T * (T + 1) // 2)


def test_prefill_and_decode_equal_torchs_count(model):
    import torch

    T = 24
    ids = torch.arange(T)[None]
    total = counted(lambda: model(input_ids=ids, logits_to_keep=1, use_cache=False))
    assert total == prefill(SMALL, [T], 4).flops + not_causal(T)

    cache = model(input_ids=ids, use_cache=True).past_key_values
    total = counted(lambda: model(input_ids=torch.tensor([[5]]), past_key_values=cache, use_cache=True))
    one = decode(SMALL, [T], [2], 4)[0]
    assert total == one.flops


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")  # PEFT uses a renamed name
def test_the_learner_equals_torchs_count(model):
    import torch
    from peft import LoraConfig, get_peft_model

    rank, T, sampled = 4, 24, 15
    adapted = get_peft_model(model, LoraConfig(r=rank, target_modules=list(SMALL.linears)))
    adapter = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert adapter == SMALL.adapter_weights(rank)
    assert SMALL.adapter_weights(rank, ["q_proj"]) == SMALL.layers * rank * (64 + 64)

    def update():
        adapted(
            input_ids=torch.arange(T)[None], logits_to_keep=sampled, use_cache=False
        ).logits.sum().backward()

    total = counted(update)
    ours = learn(SMALL, [Row(T, sampled)], 4, adapter=adapter)
    # The embedding is frozen: nothing flows back through the first block's first three layers.
    stops = [SMALL.linears[name] for name in ("q_proj", "k_proj", "v_proj")]
    unneeded = T * sum(2 * i * o + 2 * rank * i for i, o in stops)
    assert total == ours.flops - unneeded + 3 * not_causal(T)
