"""Adapters as PEFT writes them: patterns, rslora, variants that are refused, and what PEFT and our engine compute with
the compressed one."""

from __future__ import annotations

import json
import math
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from retrain.errors import ModelError
from retrain.renderer import model_path
from retrain.squeeze.analysis import analyse
from retrain.squeeze.compress import compress
from retrain.squeeze.source import matched, open_source

_made = runpy.run_path(str(Path(__file__).with_name("made.py")))
write = _made["write"]

FROM_PEFT = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
"""PEFT itself uses names that transformers has renamed."""

NAMES = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.self_attn.q_proj",
    "model.layers.11.mlp.up_proj",
    "lm_head",
]


def simple(folder: Path, **settings: Any) -> Path:
    return write(folder, {"model.layers.0.q_proj": (torch.randn(4, 10), torch.randn(12, 4))}, **settings)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"use_dora": True}, r"DoRA .*\(use_dora\)"),
        ({"modules_to_save": ["lm_head"]}, "whole modules"),
        ({"lora_bias": True}, "biases"),
        ({"bias": "all"}, "biases"),
        ({"target_parameters": ["experts"]}, "no linear layers"),
        ({"trainable_token_indices": [1]}, "embeddings"),
        ({"use_qalora": True}, "QA-LoRA"),
        ({"alora_invocation_tokens": [1, 2]}, "a part of the tokens"),
        ({"init_lora_weights": "pissa_niter_4"}, "base weights that were changed"),
        ({"init_lora_weights": "olora"}, "base weights that were changed"),
        ({"init_lora_weights": "loftq"}, "base weights that were changed"),
        ({"use_some_new_variant": True}, "use_some_new_variant is a variant that is not known"),
        ({"peft_type": "ADALORA"}, "is not a LoRA adapter"),
        ({"lora_alpha": 0}, "not numbers above 0"),
        ({"lora_alpha": True}, "not numbers above 0"),
        ({"alpha_pattern": {"q_proj": -1}}, "must map layers to numbers above 0"),
        ({"alpha_pattern": {"q_proj(": 3}}, "an expression that is none"),
    ],
)
def test_what_is_no_plain_lora_is_refused_with_the_reason(
    tmp_path: Path, given: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ModelError, match=rf"{reason}[^\n]* Fix: ") as caught:
        open_source(simple(tmp_path / "a", **given))
    assert str(tmp_path / "a") in str(caught.value)


@pytest.mark.parametrize("kind", ["gaussian", "eva", "orthogonal", False])
def test_ways_to_begin_that_leave_the_base_alone_are_taken(tmp_path: Path, kind: Any) -> None:
    found = analyse(simple(tmp_path / "a", init_lora_weights=kind))
    compress(found, 2, tmp_path / "out")
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["init_lora_weights"] is True


def test_files_that_hold_something_else_are_refused(tmp_path: Path) -> None:
    folder = simple(tmp_path / "a")
    file, name = folder / "adapter_model.safetensors", "base_model.model.model.layers.0.q_proj"
    whole = load_file(file)

    def refused(reason: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, file)
        with pytest.raises(ModelError, match=reason):
            analyse(folder)

    refused("lora_B.weight is missing", {k: v for k, v in whole.items() if "lora_A" in k})
    refused(
        "lora_magnitude_vector, which is no part", {**whole, f"{name}.lora_magnitude_vector": torch.ones(12)}
    )
    refused("rank 4, and its partner 3", {**whole, f"{name}.lora_B.weight": torch.ones(12, 3)})
    refused("adapts no linear layer", {**whole, f"{name}.lora_A.weight": torch.ones(4, 10, 1, 1)})
    refused("held as I64", {**whole, f"{name}.lora_A.weight": torch.ones(4, 10, dtype=torch.int64)})
    refused("it is empty", {})
    refused(
        "numbers that are not finite", {**whole, f"{name}.lora_B.weight": torch.full((12, 4), float("nan"))}
    )
    save_file(whole, file)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match="is damaged"):
        analyse(folder)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"holds no adapter_model\.safetensors"):
        analyse(folder)


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(NAMES),
    patterns=st.lists(
        st.sampled_from(["q_proj", "layers.1.self_attn.q_proj", r"layers\.\d+\.mlp.*", "^model.*", "proj", "lm_head", ".*_proj"]),
        max_size=4, unique=True,
    ),
)  # fmt: skip
def test_patterns_match_as_in_peft(name: str, patterns: list[str]) -> None:
    from peft.utils.other import get_pattern_key

    theirs = get_pattern_key(patterns, name)
    assert matched(patterns, name) == (theirs if theirs in patterns else None)


def tiny(adapter: Path | None = None) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_path("retrain/tiny"), dtype=torch.float32)
    return (PeftModel.from_pretrained(model, str(adapter)) if adapter else model).eval()


def tiny_adapter(folder: Path, spread: float = 1.0, **settings: Any) -> Path:
    """A random adapter of the tiny model that PEFT itself places, sizes by its patterns, and saves."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    given = {
        "r": 16,
        "lora_alpha": 24,
        "target_modules": ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "k_proj"],
    }
    model = get_peft_model(tiny(), LoraConfig(task_type="CAUSAL_LM", **{**given, **settings}))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                # Falling directions, so that a cut leaves something and loses something.
                p.copy_(torch.randn_like(p) * spread * 0.05 * 0.7 ** torch.arange(p.shape[1]))
    model.save_pretrained(str(folder))
    return folder


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits.double()


IDS = torch.arange(4 * 24).reshape(4, 24) * 7 % 50 + 5


@FROM_PEFT
@pytest.mark.parametrize(
    "given",
    [
        {},
        {"lora_alpha": 10},
        {"use_rslora": True},
        {
            "rank_pattern": {"q_proj": 5, r"layers.1.mlp.up_proj": 12},
            "alpha_pattern": {"v_proj": 7, "^model.layers.2.*": 40},
        },
        {"rank_pattern": {".*mlp.*": 3}, "use_rslora": True, "alpha_pattern": {"o_proj": 3.5}},
    ],
    ids=["plain", "alpha", "rslora", "patterns", "both"],
)
@pytest.mark.parametrize(
    "options", [{}, {"keep_alpha": True}, {"uniform": True}], ids=["folded", "kept", "uniform"]
)
def test_peft_computes_the_same_at_full_rank(
    tmp_path: Path, given: dict[str, Any], options: dict[str, Any]
) -> None:
    folder = tiny_adapter(tmp_path / "a", **given)
    found = analyse(folder)
    made = compress(found, found.source.rank, tmp_path / "out", **options)
    before, after, base = (logits(tiny(f), IDS) for f in (folder, tmp_path / "out", None))
    assert float((before - base).norm() / base.norm()) > 0.05
    assert float((after - before).norm() / (before - base).norm()) < 1e-5
    written = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert written["target_modules"] == sorted(written["target_modules"])
    assert bool(written["rank_pattern"]) == ("rank_pattern" in given and "uniform" not in options)
    assert bool(written["alpha_pattern"]) == (
        "keep_alpha" in options and bool({"alpha_pattern", "rank_pattern"} & given.keys())
    )
    assert made.patterns == bool(written["rank_pattern"] or written["alpha_pattern"])


@FROM_PEFT
def test_a_layers_output_changes_by_the_predicted_error(tmp_path: Path) -> None:
    folder = tiny_adapter(tmp_path / "a")
    found = analyse(folder)
    name = "model.layers.1.mlp.up_proj"
    layer = next(la for la in found.layers if la.pair.name == name)
    x = torch.randn(4000, layer.pair.columns, generator=torch.Generator().manual_seed(1))

    def change(model: Any) -> torch.Tensor:
        module = model.get_submodule(f"base_model.model.{name}")
        with torch.no_grad():
            return (module(x) - module.base_layer(x)).double()

    whole = change(tiny(folder))
    for rank in (1, 2, 4, 8):
        compress(found, rank, tmp_path / f"r{rank}")
        error = float((change(tiny(tmp_path / f"r{rank}")) - whole).norm())
        # For inputs without a preferred direction the mean squared error is the squared norm of what is left out.
        assert error / math.sqrt(len(x)) == pytest.approx(
            layer.norm * math.sqrt(1 - layer.kept(rank)), rel=0.05
        )
        # For any input it is at most the next singular value times its length.
        worst = (change(tiny(tmp_path / f"r{rank}")) - whole).norm(dim=1) / x.double().norm(dim=1)
        assert float(worst.max()) <= layer.pair.scale * float(layer.values_R[rank]) * (1 + 1e-4)


@FROM_PEFT
def test_logits_change_by_about_the_predicted_error(tmp_path: Path) -> None:
    folder = tiny_adapter(tmp_path / "a", spread=0.2)
    found = analyse(folder)
    before, base = logits(tiny(folder), IDS), logits(tiny(), IDS)
    errors: list[float] = []
    for rank in (1, 2, 4, 8, 16):
        compress(found, rank, tmp_path / f"r{rank}")
        after = logits(tiny(tmp_path / f"r{rank}"), IDS)
        errors.append(float((after - before).norm() / (before - base).norm()))
        predicted = found.row(rank).error
        # Of a small update the logits are a linear function: its lost share shows in them up to how layers add up.
        assert errors[-1] == pytest.approx(predicted, rel=0.5, abs=1e-5)
    assert errors == sorted(errors, reverse=True)


def test_a_relative_base_folder_is_found_from_the_new_place(tmp_path: Path) -> None:
    folder = simple(tmp_path / "a", base_model_name_or_path="../base")
    (tmp_path / "base").mkdir()
    compress(analyse(folder), 2, tmp_path / "deep/er")
    written = json.loads((tmp_path / "deep/er/adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == str((tmp_path / "base").resolve())


def test_the_file_is_the_same_every_time_and_others_read_it(tmp_path: Path) -> None:
    folder = simple(tmp_path / "a")
    for name in ("one", "two"):
        compress(analyse(folder), 3, tmp_path / name)
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    tensors = load_file(tmp_path / "one/adapter_model.safetensors")
    assert {tuple(t.shape) for t in tensors.values()} == {(3, 10), (12, 3)}


def test_an_embeddings_adapter_is_squeezed_too(tmp_path: Path) -> None:
    a, b = torch.randn(6, 50), torch.randn(20, 6)
    folder = simple(tmp_path / "a", r=6)
    name = "base_model.model.model.embed_tokens"
    save_file(
        {f"{name}.lora_embedding_A": a, f"{name}.lora_embedding_B": b}, folder / "adapter_model.safetensors"
    )
    found = analyse(folder)
    assert found.layers[0].values_R.tolist() == pytest.approx(
        torch.linalg.svdvals(b.double() @ a.double())[:6].tolist()
    )
    compress(found, 6, tmp_path / "out", keep_alpha=True)
    out = load_file(tmp_path / "out/adapter_model.safetensors")
    before, after = b @ a * 8 / 6, out[f"{name}.lora_embedding_B"] @ out[f"{name}.lora_embedding_A"] * 8 / 6
    assert float((after - before).norm() / before.norm()) < 1e-6
