"""Adapters as files: what a run starts from, what it exports, how they are scaled, and 4-bit bases."""

from __future__ import annotations

import json
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch

from retrain import models
from retrain.adapter import AdaptedLinear, Mode, merge_into
from retrain.adapter_settings import check_start_adapter
from retrain.backends import local
from retrain.errors import ConfigError, ModelError
from retrain.training import build

torch.set_num_threads(1)

IDS = torch.tensor([[5, 6, 7, 8, 9, 40, 41]])


def trained(backend, folder) -> Path:
    backend.policy.save_adapter(folder)
    return folder


def logits(policy):
    with torch.no_grad(), policy.mode("adapter"):
        return policy.model(input_ids=IDS).logits


def peft_logits(model, adapter):
    from peft import PeftModel

    with warnings.catch_warnings():
        # PEFT still asks transformers for an attribute by its old name.
        warnings.simplefilter("ignore", FutureWarning)
        theirs = PeftModel.from_pretrained(model, str(adapter))
    with torch.no_grad():
        return theirs(input_ids=IDS).logits


def plain(folder, **how):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **how)


def change(folder, **settings):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def test_rslora_scales_by_the_root_of_the_rank_as_peft_does(make_backend, tmp_path):
    backend = make_backend(rank=16, lora={"alpha": 8, "rslora": True})
    assert {layer.scale for layer in backend.policy.layers.values()} == {8 / 4}
    adapter = trained(backend, tmp_path / "a")
    base = plain(backend._config.model.model)
    torch.testing.assert_close(logits(backend.policy), peft_logits(base, adapter), atol=1e-4, rtol=1e-4)
    assert {layer.scale for layer in make_backend(rank=16, lora={"alpha": 8}).policy.layers.values()} == {0.5}


def test_a_run_starts_from_another_runs_adapter(make_backend, make_config, tmp_path):
    backend = make_backend()
    adapter = trained(backend, tmp_path / "a")
    model = backend._config.model.model
    made = make_config(model={"model": model, "lora_rank": 4}, lora={"init_from": str(adapter)})
    started = local.build(made, None)
    assert started.publish().fingerprint == backend.publish().fingerprint
    assert started.publish().version == 0
    torch.testing.assert_close(logits(started.policy), logits(backend.policy), rtol=0, atol=0)
    fresh = local.build(make_config(model={"model": model, "lora_rank": 4}), None)
    assert fresh.publish().fingerprint != backend.publish().fingerprint


def test_an_adapter_that_peft_itself_wrote_is_one_to_start_from(make_backend, make_config, tmp_path):
    from peft import LoraConfig, get_peft_model

    model = make_backend()._config.model.model
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        lora_alpha=32,
        init_lora_weights=False,
        target_modules=list(models.LORA_TARGETS),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        theirs = get_peft_model(plain(model), lora)
        theirs.save_pretrained(str(tmp_path / "a"))
    with torch.no_grad():
        expected = theirs(input_ids=IDS).logits
    made = make_config(model={"model": model, "lora_rank": 4}, lora={"init_from": str(tmp_path / "a")})
    torch.testing.assert_close(logits(local.build(made, None).policy), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"r": 8}, r"has rank 8, not 4. Fix: set model.lora_rank = 8"),
        ({"lora_alpha": 16}, r"has alpha 16, not 32. Fix: set lora.alpha = 16\.$"),
        ({"lora_alpha": 16.0}, r"has alpha 16.0, not 32. Fix: set lora.alpha = 16\.$"),
        (
            {"lora_alpha": 12.5},
            r"has alpha 12.5, not 32. Fix: this version takes whole alphas above 0: merge it",
        ),
        ({"lora_alpha": 0}, r"has alpha 0, not 32. Fix: this version takes whole alphas above 0"),
        ({"use_rslora": True}, r"set lora.rslora = true"),
        ({"target_modules": ["q_proj", "v_proj"]}, r"adapts q_proj, v_proj; here it must be down_proj"),
        ({"use_dora": True}, r"DoRA rescales"),
        ({"bias": "all"}, r"it trained biases \(bias = 'all'\)"),
        ({"modules_to_save": ["lm_head"]}, r"whole modules"),
        ({"rank_pattern": {"q_proj": 2}}, r"differ in rank"),
        ({"peft_type": "IA3"}, r"is not a LoRA adapter"),
    ],
)
def test_an_adapter_that_this_run_would_not_have_made_is_refused_in_one_line(
    make_backend, make_config, tmp_path, settings, says
):
    backend = make_backend()
    adapter = trained(backend, tmp_path / "a")
    change(adapter, **settings)
    made = make_config(
        model={"model": backend._config.model.model, "lora_rank": 4}, lora={"init_from": str(adapter)}
    )
    # The whole build, and the check that asks before any model is loaded.
    for check in (lambda c: local.build(c, None), check_start_adapter):
        with pytest.raises(ModelError, match=says) as caught:
            check(made)
        assert "\n" not in str(caught.value)


def test_an_adapter_of_another_model_or_no_adapter_is_refused(
    make_backend, make_config, random_model, tmp_path
):
    adapter = trained(make_backend(), tmp_path / "a")
    other = str(random_model(hidden=128))
    for path, says in (
        (adapter, "does not fit this model"),
        (tmp_path / "none", "holds no adapter_config.json"),
    ):
        made = make_config(model={"model": other, "lora_rank": 4}, lora={"init_from": str(path)})
        with pytest.raises(ModelError, match=says):
            local.build(made, None)


def test_an_adapter_to_start_from_is_checked_before_anything_is_loaded_and_without_torch(tmp_path):
    code = (
        "import sys\n"
        "from retrain.adapter_settings import check_start_adapter\n"
        "from retrain.config.schema import Config\n"
        "try:\n"
        f"    check_start_adapter(Config.model_validate({{'lora': {{'init_from': {str(tmp_path)!r}}}}}))\n"
        "except Exception as error:\n"
        "    print(error)\n"
        "print('torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "holds no adapter_config.json" in out
    assert out.endswith("False\n")


def test_a_run_refuses_its_start_before_the_tokenizer_is_loaded(make_config, tmp_path):
    made = make_config(
        model={"model": str(tmp_path / "no-model")}, lora={"init_from": str(tmp_path / "none")}
    )
    with (
        pytest.raises(ModelError, match=r"lora.init_from = .* holds no adapter_config.json"),
        build.build(made, tmp_path / "run", clear=False, plain=True, check=lambda *_: None),
    ):
        pytest.fail("it was built")


@pytest.mark.parametrize("kept", [0, 5, 2000, -1])
def test_a_damaged_adapter_is_one_line_wherever_it_is_read(make_backend, make_config, tmp_path, kept):
    backend = make_backend()
    adapter = trained(backend, tmp_path / "a")
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept])
    made = make_config(
        model={"model": backend._config.model.model, "lora_rank": 4}, lora={"init_from": str(adapter)}
    )
    for merged in (True, False):
        with pytest.raises(ModelError, match="is damaged"):
            models.export(backend._config, adapter, tmp_path / "out", merged=merged)
        assert not (tmp_path / "out").exists()
    for check in (
        lambda: check_start_adapter(made),
        lambda: local.build(made, None),
        lambda: backend.policy.load_adapter(adapter),
        lambda: merge_into(backend.policy.model, adapter, {}, None),
    ):
        with pytest.raises(ModelError, match=r"adapter_model\.safetensors is damaged: \w") as caught:
            check()
        assert "\n" not in str(caught.value)
        assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("recorded", "told"),
    [("meta-llama/Other", True), ("", False), (None, False), ("the same", False), ("by another way", False)],
)
def test_an_adapter_of_another_base_model_is_announced_and_taken(
    make_backend, make_config, tmp_path, caplog, recorded, told
):
    backend = make_backend()
    adapter = trained(backend, tmp_path / "a")
    model = backend._config.model.model
    (tmp_path / "link").symlink_to(model, target_is_directory=True)
    same = {"the same": model, "by another way": str(tmp_path / "link")}
    change(adapter, base_model_name_or_path=same.get(recorded, recorded))
    made = make_config(model={"model": model, "lora_rank": 4}, lora={"init_from": str(adapter)})
    with caplog.at_level("WARNING", "retrain"):
        started = local.build(made, None)
    assert started.publish().fingerprint == backend.publish().fingerprint
    lines = [r.getMessage() for r in caplog.records if "was trained on" in r.getMessage()]
    assert len(lines) == told
    assert all(recorded in line and model in line and "\n" not in line for line in lines)


def test_a_resumed_run_needs_not_what_it_started_from(make_backend, make_config, tmp_path):
    model = make_backend()._config.model.model
    made = make_config(
        model={"model": model, "lora_rank": 4},
        lora={"init_from": str(tmp_path / "gone")},
        resume={"from": "run"},
    )
    assert local.build(made, None).publish().version == 0


@pytest.mark.parametrize("rslora", [False, True])
def test_an_exported_model_is_the_policy(make_backend, tmp_path, rslora):
    backend = make_backend(lora={"rslora": rslora})
    adapter = trained(backend, tmp_path / "a")
    models.export(backend._config, adapter, tmp_path / "out", merged=True, dtype="fp32")
    expected = logits(backend.policy)
    with torch.no_grad():
        found = plain(tmp_path / "out")(input_ids=IDS).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    untouched = plain(backend._config.model.model)(input_ids=IDS).logits.detach()
    assert float((untouched - expected).abs().max()) > 1e-2
    from transformers import AutoTokenizer

    theirs, ours = (AutoTokenizer.from_pretrained(p) for p in (backend._config.model.model, tmp_path / "out"))
    assert theirs.encode("2 + 3 =") == ours.encode("2 + 3 =")
    assert theirs.chat_template == ours.chat_template


def test_an_exported_weight_is_rounded_once(make_backend, tmp_path):
    backend = make_backend()
    adapter = trained(backend, tmp_path / "a")
    models.export(backend._config, adapter, tmp_path / "out", merged=True, dtype="bf16")
    found = plain(tmp_path / "out", dtype="auto")
    assert {p.dtype for p in found.parameters()} == {torch.bfloat16}
    weights = dict(found.named_parameters())
    for name, layer in backend.policy.layers.items():
        expected = (layer.base.weight + layer.delta()).detach().to(torch.bfloat16)
        assert torch.equal(weights[f"{name}.weight"], expected), name
    models.export(backend._config, adapter, tmp_path / "own", merged=True, dtype="auto")
    assert {p.dtype for p in plain(tmp_path / "own", dtype="auto").parameters()} == {torch.float32}


def test_an_exported_adapter_names_its_model(make_backend, tmp_path):
    backend = make_backend()
    adapter = trained(backend, tmp_path / "a")
    change(adapter, base_model_name_or_path="somewhere/else")
    models.export(backend._config, adapter, tmp_path / "out", merged=False, dtype="auto")
    named = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert Path(named).is_absolute()
    torch.testing.assert_close(
        peft_logits(plain(named), tmp_path / "out"), logits(backend.policy), atol=1e-4, rtol=1e-4
    )


def test_the_embedded_model_is_exported_with_a_path_that_others_can_load(make_config, tmp_path):
    config = make_config(model={"lora_rank": 4})
    adapter = trained(local.build(config, None), tmp_path / "a")
    models.export(config, adapter, tmp_path / "out", merged=False)
    named = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert (Path(named) / "model.safetensors").is_file()


def test_what_cannot_be_exported_is_said_before_anything_is_written(make_backend, random_model, tmp_path):
    backend = make_backend()
    adapter = trained(backend, tmp_path / "a")
    out = tmp_path / "out"
    with pytest.raises(ModelError, match="holds no adapter_config"):
        models.export(backend._config, tmp_path / "none", out, merged=True)
    with pytest.raises(ConfigError, match="no number format"):
        models.export(backend._config, adapter, out, merged=True, dtype="int3")
    with pytest.raises(ConfigError, match="already holds files"):
        models.export(backend._config, adapter, tmp_path, merged=False)
    other = make_backend(folder=str(random_model(hidden=128)))
    with pytest.raises(ModelError, match="does not fit this model"):
        models.export(other._config, adapter, out, merged=True)
    change(adapter, use_dora=True)
    with pytest.raises(ModelError, match="cannot be merged"):
        models.export(backend._config, adapter, out, merged=True)
    assert not out.exists()


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bits_on_a_cpu_are_refused_before_the_model_loads(make_config, monkeypatch, kind):
    monkeypatch.setattr(models, "_load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    with pytest.raises(ConfigError, match="needs a CUDA device"):
        local.build(make_config(model={"quantization": kind}), None)


def test_four_bits_compute_in_bf16_and_need_their_package(make_config, monkeypatch):
    device = torch.device("cuda")
    made = make_config(model={"quantization": "nf4"})
    with pytest.raises(ConfigError, match="computes in bf16"):
        models._quantization(made, device, torch.float32)
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="retrain\\[qlora\\]"):
        models._quantization(made, device, torch.bfloat16)


def test_a_quantised_base_is_expanded_for_each_product_and_not_kept(monkeypatch):
    """The package's expansion is replaced by a table; the real one is checked on CUDA (tests/gpu)."""
    dense = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    calls = []

    def expand(packed, state):
        calls.append(state)
        return dense.clone()

    functional = types.ModuleType("bitsandbytes.functional")
    functional.dequantize_4bit = expand
    package = types.ModuleType("bitsandbytes")
    package.functional = functional
    monkeypatch.setitem(sys.modules, "bitsandbytes", package)
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", functional)
    base = torch.nn.Linear(8, 6)
    base.weight = torch.nn.Parameter(torch.zeros(24, 1, dtype=torch.uint8), requires_grad=False)
    base.weight.quant_state = "state"
    base.bias.requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.nn.Parameter(torch.randn(s, generator=generator)) for s in ((2, 8), (6, 2)))
    mode = Mode()
    layer = AdaptedLinear(base, a, b, 0.5, mode)
    x = torch.randn(3, 4, 8, generator=generator, requires_grad=True)
    out = layer(x)
    stored = [t for t in (out.grad_fn, *(f for f, _ in out.grad_fn.next_functions)) if t is not None]
    assert all(
        dense.shape != getattr(s, "shape", None) for f in stored for s in getattr(f, "saved_tensors", ())
    )
    pull = torch.randn(out.shape, generator=generator)
    out.backward(pull)
    assert calls == ["state", "state"]
    found = [t.grad.clone() for t in (x, a, b)]
    for t in (x, a, b):
        t.grad = None
    expected = x @ (dense + 0.5 * b @ a).T + base.bias
    expected.backward(pull)
    torch.testing.assert_close(out, expected)
    for ours, t in zip(found, (x, a, b), strict=True):
        torch.testing.assert_close(ours, t.grad)
    mode.kind = "base"
    torch.testing.assert_close(layer(x), x @ dense.T + base.bias)


def test_the_digest_of_the_base_sees_every_element_type(make_backend):
    policy = make_backend().policy
    name, p = next((n, p) for n, p in policy.model.named_parameters() if n.endswith("base.weight"))
    before = policy.base_digest(), policy.base_checksum()
    codes = torch.nn.Parameter(torch.arange(24, dtype=torch.uint8).reshape(24, 1), requires_grad=False)
    codes.quant_state = types.SimpleNamespace(absmax=torch.ones(3))
    owner = policy.model.get_submodule(name.removesuffix(".weight"))
    owner.weight = codes
    packed = policy.base_digest()
    policy.base_checksum()
    codes.quant_state.absmax = torch.tensor([1.0, 2.0, 1.0])
    rescaled = policy.base_digest()
    owner.weight = p
    assert len({before[0], packed, rescaled}) == 3
    assert (policy.base_digest(), policy.base_checksum()) == before


def test_the_base_stays_as_it_was_through_training_with_every_term(make_backend, make_batch):
    from retrain.types import OptimStep

    backend = make_backend(
        loss={"kind": "ppo", "kl": 0.1, "entropy": 0.1, "tis_cap": 2.0}, lora={"dropout": 0.1}
    )
    before = backend.policy.base_checksum()
    batch = make_batch(backend=backend, rows=3)
    for _ in range(2):
        backend.train_step(batch, OptimStep(1e-2, 0.0, 0.9, 0.95, 1e-8, 1.0))
        assert backend.policy.merge()
    assert backend.policy.base_checksum() == before
