"""Our forward pass against the modules that transformers built: same hidden states, same gradients, for each family."""

from __future__ import annotations

import pytest
import torch

from retrain.adapter import Mode, attach
from retrain.adapter_settings import LORA_TARGETS
from retrain.attention import attention, band, one_sequence
from retrain.decoder import LeanDecoder, StockDecoder, build
from retrain.errors import ModelError
from retrain.fused import FusedLinear

torch.set_num_threads(1)

SHAPE = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 120, "max_position_embeddings": 512, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
FAMILIES = {
    "Llama": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    "Mistral": {"sliding_window": 6},
    "Qwen2": {},
    "Qwen3": {"head_dim": 32},
    "Qwen3 with yarn": {
        "rope_parameters": {
            "rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 64,
        }
    },
}  # fmt: skip


def adapted(name: str, dtype: torch.dtype = torch.float32, rank: int = 4):
    """A random model of a family with a shaken adapter; its layers, adapter and mode."""
    import transformers
    from peft import LoraConfig

    torch.manual_seed(3)
    prefix = name.split()[0]
    config = getattr(transformers, prefix + "Config")(**SHAPE, **FAMILIES[name])
    model = getattr(transformers, prefix + "ForCausalLM")._from_config(config, attn_implementation="sdpa")
    with torch.no_grad():
        for key, p in model.named_parameters():
            p.copy_(torch.randn_like(p) * 0.1) if key.endswith("bias") else p.mul_(2.0)
    model.to(dtype).eval().requires_grad_(False)
    mode = Mode()
    lora = LoraConfig(r=rank, lora_alpha=3 * rank, target_modules=list(LORA_TARGETS), lora_dropout=0.0)
    layers, adapter = attach(model, lora, 0, mode)
    with torch.no_grad():
        for key, p in adapter.items():
            if "lora_B" in key:
                p.copy_(torch.randn(p.shape) * 0.05)
    return model, layers, adapter, mode


def slopes(decoder, adapter, length: int = 20) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    ids = torch.arange(length) * 17 % 120
    for p in adapter.values():
        p.grad = None
    out = decoder(ids, torch.arange(length), one_sequence)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(9))
    (out.float() * weights).sum().backward()
    return out.detach().float(), {name: p.grad.clone() for name, p in adapter.items()}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_hidden_states_and_gradients_are_those_of_the_modules(name, recompute):
    model, layers, adapter, mode = adapted(name)
    lean = build(model, layers, mode)
    assert isinstance(lean, LeanDecoder)
    stock = StockDecoder(model, layers)
    theirs, expected = slopes(stock, adapter)
    if recompute:
        lean.recompute_activations()
        stock.recompute_activations()
        again, repeated = slopes(stock, adapter)
        torch.testing.assert_close(again, theirs, rtol=0, atol=0)
        for key in expected:
            torch.testing.assert_close(repeated[key], expected[key], rtol=1e-5, atol=1e-6)
    ours, got = slopes(lean, adapter)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-5)
    for key, value in expected.items():
        assert value.abs().max() > 0
        gap = (got[key] - value).norm() / value.norm()
        assert gap < 1e-5, (key, float(gap))


@pytest.mark.parametrize("name", ["Llama", "Qwen3"])
def test_merged_base_and_adapter_passes_agree_with_their_weights(name):
    model, layers, adapter, mode = adapted(name)
    lean = build(model, layers, mode)
    ids, at = torch.arange(12) * 17 % 120, torch.arange(12)
    assert lean.mergeable
    lean.merge()
    with torch.no_grad():
        unmerged = lean(ids, at, one_sequence)
        mode.kind = "merged"
        merged = lean(ids, at, one_sequence)
        mode.kind = "base"
        base = lean(ids, at, one_sequence)
        for key, p in adapter.items():
            if "lora_B" in key:
                p.zero_()
        mode.kind = "adapter"
        without = lean(ids, at, one_sequence)
    torch.testing.assert_close(merged, unmerged, rtol=1e-5, atol=5e-5)
    torch.testing.assert_close(base, without, rtol=1e-5, atol=1e-5)
    assert (base - unmerged).abs().max() > 1e-2


def test_the_joined_weights_are_the_models_own():
    model, layers, adapter, mode = adapted("Qwen3")
    before = {k: v.detach().clone() for k, v in model.named_parameters()}
    lean = build(model, layers, mode)
    for k, v in model.named_parameters():
        torch.testing.assert_close(v, before[k], rtol=0, atol=0)
    assert isinstance(lean, LeanDecoder)
    # An update in place of one A matrix is seen by the fused product.
    ids, at = torch.arange(8), torch.arange(8)
    with torch.no_grad():
        one = lean(ids, at, one_sequence)
        next(p for k, p in adapter.items() if "k_proj.lora_A" in k).mul_(3.0)
        other = lean(ids, at, one_sequence)
    stock = StockDecoder(model, layers)
    with torch.no_grad():
        torch.testing.assert_close(other, stock(ids, at, one_sequence), rtol=1e-5, atol=2e-5)
    assert (one - other).abs().max() > 1e-3


@pytest.mark.parametrize("native", [True, False])
def test_bf16_rounds_once_and_keeps_small_updates(native):
    """One product over many rows: the change that a small B makes, averaged over rounding, is the exact change."""
    torch.manual_seed(0)
    base = torch.nn.Linear(64, 48, bias=True).to(torch.bfloat16).requires_grad_(False)
    from retrain.adapter import AdaptedLinear

    a = torch.nn.Parameter(torch.randn(4, 64) * 0.1)
    b = torch.nn.Parameter(torch.zeros(48, 4))
    mode = Mode()
    fused = FusedLinear([AdaptedLinear(base, a, b, 2.0, mode)], mode, native=native)
    x = torch.randn(20000, 64).to(torch.bfloat16)
    residual = (torch.randn(20000, 48) * 0.2).to(torch.bfloat16)
    with torch.no_grad():
        for extra in (None, residual):
            b.zero_()
            before = fused(x, extra).double()
            b.copy_(torch.randn(48, 4) * 2e-4)
            after = fused(x, extra).double()
            exact = (x.double() @ a.double().T @ b.double().T) * 2.0
            moved = after - before
            slope = float((moved * exact).sum() / exact.square().sum())
            assert 0.93 < slope < 1.07, (extra is None, slope)
            # The update is far below one step of bf16 at the size of the outputs.
            assert exact.std() < before.std() / 500


@pytest.mark.parametrize("native", [True, False])
def test_bf16_gradients_are_near_float32(native):
    model, layers, adapter, mode = adapted("Qwen3", torch.bfloat16)
    lean = build(model, layers, mode, native=native)
    assert isinstance(lean, LeanDecoder)
    assert lean.mergeable is not native
    _, got = slopes(lean, adapter)
    wide = adapted("Qwen3")
    with torch.no_grad():
        for (_, p), (_, q) in zip(wide[0].named_parameters(), model.named_parameters(), strict=True):
            p.copy_(q.float())
    _, expected = slopes(build(wide[0], wide[1], wide[3]), wide[2])
    for key, value in expected.items():
        assert got[key].dtype == torch.float32
        cosine = torch.nn.functional.cosine_similarity(got[key].flatten(), value.flatten(), dim=0)
        assert cosine > 0.98, (key, float(cosine))


@pytest.mark.parametrize("native", [True, False])
def test_what_bf16_samples_with_follows_an_update(native):
    model, layers, adapter, mode = adapted("Qwen3", torch.bfloat16)
    lean = build(model, layers, mode, native=native)
    ids, at = torch.arange(8), torch.arange(8)
    optimizer = torch.optim.AdamW(list(adapter.values()), lr=0.05, fused=True)
    for p in adapter.values():
        p.grad = torch.ones_like(p)
    with torch.no_grad():
        before = lean(ids, at, one_sequence)
        optimizer.step()  # the fused optimizer tells nobody that it wrote
        after = lean(ids, at, one_sequence)
        lean.merge()
        mode.kind = "merged"
        sampled = lean(ids, at, one_sequence)
        mode.kind = "adapter"
        stock = StockDecoder(model, layers)(ids, at, one_sequence)
    assert (sampled.float() - after.float()).norm() < 0.01 * after.float().norm()
    moved, expected = (x.float() - before.float() for x in (after, stock))
    assert expected.norm() > 0.1
    assert (moved - expected).norm() < 0.2 * expected.norm()


def test_an_unknown_layout_runs_on_the_modules():
    import transformers
    from peft import LoraConfig

    torch.manual_seed(0)
    config = transformers.GemmaConfig(**SHAPE, head_dim=16)
    model = transformers.GemmaForCausalLM._from_config(config, attn_implementation="sdpa").eval()
    model.requires_grad_(False)
    ids = torch.arange(15) * 7 % 120
    with torch.no_grad():
        expected = model.model(ids[None]).last_hidden_state[0]
    mode = Mode()
    layers, _ = attach(model, LoraConfig(r=2, target_modules=list(LORA_TARGETS)), 0, mode)
    made = build(model, layers, mode)
    assert isinstance(made, StockDecoder)
    with torch.no_grad():
        torch.testing.assert_close(made(ids, torch.arange(15), one_sequence), expected, rtol=1e-5, atol=1e-5)
        made.merge()
        mode.kind = "merged"
        torch.testing.assert_close(made(ids, torch.arange(15), one_sequence), expected, rtol=1e-4, atol=1e-4)


REFUSED = {
    "Qwen3_5Text": (
        {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16},
        "side by side|of its 4 layers attend|differ",
    ),
    "Jamba": (
        {"num_experts": 2, "use_mamba_kernels": False, "attn_layer_period": 2, "attn_layer_offset": 1},
        "of its 4 layers attend|differ",
    ),
    "DiffLlama": ({}, "layers attend"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_remembers_by_more_than_attention_is_refused(name):
    import transformers
    from peft import LoraConfig

    changes, message = REFUSED[name]
    torch.manual_seed(0)
    config = getattr(transformers, name + "Config")(**{**SHAPE, "num_hidden_layers": 4}, **changes)
    kind = getattr(transformers, name.removesuffix("Text") + "ForCausalLM")
    model = kind._from_config(config, attn_implementation="eager").eval().requires_grad_(False)
    mode = Mode()
    targets = {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    lora = LoraConfig(r=2, target_modules=[t for t in LORA_TARGETS if t in targets])
    layers, _ = attach(model, lora, 0, mode)
    with pytest.raises(ModelError, match=message):
        build(model, layers, mode)
    assert mode.kind == "adapter"


def test_rotations_that_depend_on_the_other_sequences_are_refused():
    import transformers

    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = transformers.LlamaForCausalLM._from_config(transformers.LlamaConfig(**SHAPE, rope_parameters=rope))
    with pytest.raises(ModelError, match="dynamic"):
        build(model, {}, Mode())


def test_two_models_do_not_share_what_they_attend_with():
    """The second is loaded, used and dropped while the first is in use."""
    first = adapted("Qwen3")
    stock = StockDecoder(first[0], first[1])
    ids, at = torch.arange(9), torch.arange(9)
    with torch.no_grad():
        expected = stock(ids, at, one_sequence)
        other = adapted("Llama")
        build(other[0], other[1], other[3])(ids, at, one_sequence)
        del other
        torch.testing.assert_close(stock(ids, at, one_sequence), expected, rtol=0, atol=0)
    assert stock.attend is None
    with torch.no_grad():
        alone = first[0].model(input_ids=ids[None]).last_hidden_state[0]
    torch.testing.assert_close(alone, expected, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="one whole sequence"):
        first[0](input_ids=ids[None].repeat(2, 1))


@pytest.mark.parametrize("spread", [0.0, 2.0])
def test_one_layer_alone_keeps_small_updates_beside_a_bias_in_bf16(spread):
    from retrain.adapter import AdaptedLinear

    torch.manual_seed(0)
    base = torch.nn.Linear(64, 48, bias=True).to(torch.bfloat16).requires_grad_(False)
    base.bias.copy_(torch.randn(48) * spread)
    b = torch.nn.Parameter(torch.zeros(48, 4))
    layer = AdaptedLinear(base, torch.nn.Parameter(torch.randn(4, 64) * 0.1), b, 2.0, Mode())
    x = torch.randn(20000, 64).to(torch.bfloat16)
    with torch.no_grad():
        before = layer(x).double()
        b.copy_(torch.randn(48, 4) * 2e-4)
        moved = layer(x).double() - before
        exact = (x.double() @ layer.a.double().T @ b.double().T) * 2.0
    slope = float((moved * exact).sum() / exact.square().sum())
    assert 0.93 < slope < 1.07


@pytest.mark.parametrize(("queries", "keys", "length"), [(4, 2, 1), (4, 4, 1), (6, 2, 5), (3, 1, 4)])
def test_attention_against_its_definition(queries, keys, length):
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(2, queries, length, 8, generator=generator)
    k, v = (torch.randn(2, keys, 9, 8, generator=generator) for _ in range(2))
    mask = torch.rand(2, 1, length, 9, generator=generator) > 0.4
    mask[..., 0] = True
    got = attention(q, k, v, scale=0.3, mask=mask)
    wide = (x.double().repeat_interleave(queries // keys, 1) for x in (k, v))
    kk, vv = wide
    scores = (q.double() @ kk.transpose(-1, -2) * 0.3).masked_fill(~mask, -torch.inf)
    torch.testing.assert_close(got.double(), scores.softmax(-1) @ vv, rtol=1e-5, atol=1e-6)


def test_a_band_is_as_wide_as_its_window():
    seen = band(5, 2, torch.device("cpu"))
    assert seen.int().tolist() == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 1, 1]]
