"""Adapters made for tests: factors with known singular values, and folders as PEFT writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

BASE = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "retrain/tiny", "bias": "none",
    "target_modules": ["q_proj", "v_proj"], "use_rslora": False, "use_dora": False, "init_lora_weights": True,
}  # fmt: skip


def factors(values: list[float], rows: int, columns: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A (rank, columns) and B (rows, rank), neither orthogonal, whose product has these singular values, in float64."""
    made = torch.Generator().manual_seed(seed)
    rank = len(values)
    q_b = torch.linalg.qr(torch.randn(rows, rank, dtype=torch.float64, generator=made)).Q
    q_a = torch.linalg.qr(torch.randn(columns, rank, dtype=torch.float64, generator=made)).Q
    mix = torch.linalg.qr(torch.randn(rank, rank, dtype=torch.float64, generator=made)).Q
    mix = mix @ torch.diag(torch.logspace(-0.5, 0.5, rank, dtype=torch.float64))
    s = torch.tensor(values, dtype=torch.float64)
    return torch.linalg.inv(mix) @ q_a.T, q_b @ torch.diag(s) @ mix


def write(folder: Path, layers: dict[str, tuple[torch.Tensor, torch.Tensor]], **settings: Any) -> Path:
    """A folder of an adapter: layers by name, each A and B."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, torch.Tensor] = {}
    for name, (a, b) in layers.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = a.contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = b.contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    rank = max((a.shape[0] for a, _ in layers.values()), default=1)
    (folder / "adapter_config.json").write_text(
        json.dumps({**BASE, "r": rank, "lora_alpha": 2 * rank, **settings})
    )
    return folder


def products(folder: Path, scale_of: Any) -> dict[str, torch.Tensor]:
    """The naive twin: each layer's whole update in float64."""
    tensors = load_file(folder / "adapter_model.safetensors")
    found: dict[str, torch.Tensor] = {}
    for key in tensors:
        if key.endswith("lora_A.weight"):
            name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            a, b = tensors[key].double(), tensors[key.replace("lora_A", "lora_B")].double()
            found[name] = scale_of(name, a.shape[0]) * (b @ a)
    return found
