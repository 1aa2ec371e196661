"""Decompositions on a CUDA device equal those of the CPU."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from retrain.squeeze.analysis import analyse
from retrain.squeeze.compress import compress

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: scripts/gpu-tests"),
]

_made = runpy.run_path(str(Path(__file__).parents[1] / "squeeze/made.py"))


def test_cuda_finds_what_the_cpu_finds(tmp_path: Path) -> None:
    layers = {
        f"model.layers.{i}.{name}": (torch.randn(32, 200 + i), torch.randn(300, 32) * 0.8 ** torch.arange(32))
        for i in range(3)
        for name in ("self_attn.q_proj", "mlp.up_proj")
    }
    folder = _made["write"](tmp_path / "a", layers)
    found = {device: analyse(folder, device=device, keep=True) for device in ("cpu", "cuda", "gpu:0")}
    for device in ("cuda", "gpu:0"):
        assert found[device].recommended == found["cpu"].recommended
        for one, other in zip(found[device].layers, found["cpu"].layers, strict=True):
            assert torch.allclose(one.values_R, other.values_R, rtol=1e-9)
    updates = {}
    for device in ("cpu", "cuda"):
        compress(found[device], 8, tmp_path / device, device=device)
        tensors = load_file(tmp_path / device / "adapter_model.safetensors")
        names = [n for n in tensors if "lora_A" in n]
        updates[device] = {
            n: tensors[n.replace("lora_A", "lora_B")].double() @ tensors[n].double() for n in names
        }
    for name, update in updates["cpu"].items():
        assert float((updates["cuda"][name] - update).norm() / update.norm()) < 1e-6
