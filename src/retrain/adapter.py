"""The LoRA adapter: the layer that adds it to a frozen linear one, its placement in a model, and its tensors
in PEFT's format. Leaves out: which model, and when which forward runs."""

# torch, peft and safetensors are only partly typed: what they return is Any here.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import nn

from retrain.adapter_settings import REFUSED, SETTINGS, WEIGHTS, damaged
from retrain.errors import ModelError


@dataclass(slots=True)
class Mode:
    """Which forward the adapted layers run, and the share of the adapter's inputs dropped; shared by all of them."""

    kind: Literal["adapter", "merged", "base"] = "adapter"
    dropout: float = 0.0


class AdaptedLinear(nn.Module):
    """A frozen linear layer plus ``scale * B A``, in place of PEFT's own forward.

    In float32 the update may be merged into a separate tensor for sampling. In bf16 it never is, and the
    float32 product of the adapter is added to the base product before the only rounding: rounding the base
    product first would lose most of a small update. A base in 4 bits is read, never written: each forward and each
    backward expands it anew and keeps no copy.
    """

    def __init__(self, base: nn.Linear, a: nn.Parameter, b: nn.Parameter, scale: float, mode: Mode) -> None:
        super().__init__()
        self.base = base
        self.a, self.b = a, b
        self.scale = scale
        self._mode = mode
        self.merged: torch.Tensor | None = None

    @property
    def quantized(self) -> bool:
        """True when the base weight is held in 4 bits."""
        return getattr(self.base.weight, "quant_state", None) is not None

    def delta(self) -> torch.Tensor:
        """The update (out, in) in float32."""
        return (self.b @ self.a) * self.scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) to (..., out) in the dtype of ``x``."""
        base, mode = self.base, self._mode
        bias = cast("torch.Tensor | None", base.bias)
        if mode.kind == "merged" and self.merged is not None:
            return F.linear(x, self.merged, bias)
        if mode.kind == "base":
            return F.linear(x, dense_weight(base, x.dtype), bias)
        inputs = x.float()
        if mode.dropout:
            inputs = F.dropout(inputs, mode.dropout)
        delta = F.linear(F.linear(inputs, self.a), self.b * self.scale)
        rows, added = x.reshape(-1, x.shape[-1]), delta.reshape(-1, delta.shape[-1]).to(x.dtype)
        flat: Any = (
            _QuantizedProduct.apply(added, rows, base)
            if self.quantized
            else torch.addmm(added, rows, base.weight.T)
        )
        if bias is not None:
            # Not with the adapter's product: beside a bias on the coarse grid of bf16 a small update would be lost.
            flat = flat + bias
        return flat.reshape(*x.shape[:-1], flat.shape[-1])


def dense_weight(base: nn.Linear, dtype: torch.dtype) -> torch.Tensor:
    """The frozen weight (out, in), expanded to ``dtype`` where it is held in 4 bits."""
    state: Any = getattr(base.weight, "quant_state", None)
    if state is None:
        return base.weight
    import bitsandbytes.functional as bits  # pyright: ignore[reportMissingImports]

    functions: Any = bits
    return functions.dequantize_4bit(base.weight.data, state).to(dtype)


class _QuantizedProduct(torch.autograd.Function):
    """``added + x W^T`` for a frozen W in 4 bits: the backward expands W again instead of keeping the expanded one."""

    @staticmethod
    def forward(ctx: Any, added: torch.Tensor, x: torch.Tensor, base: nn.Linear) -> torch.Tensor:
        ctx.base = base
        return torch.addmm(added, x, dense_weight(base, x.dtype).T)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        needed = ctx.needs_input_grad[1]
        return grads[0], grads[0] @ dense_weight(ctx.base, grads[0].dtype) if needed else None, None


def attach(
    model: Any, lora: Any, seed: int, mode: Mode
) -> tuple[dict[str, AdaptedLinear], dict[str, nn.Parameter]]:
    """Let PEFT place and initialise the adapter, then put our forward in place of its layers."""
    from peft import inject_adapter_in_model
    from peft.tuners.lora.layer import LoraLayer

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(lora, model)
        modules: dict[str, Any] = {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer)}
        # PEFT draws A in the module's dtype and on its device; drawing float32 on the CPU keeps one seed one
        # adapter everywhere.
        for module in modules.values():
            a: torch.Tensor = module.lora_A["default"].weight
            fresh = torch.empty(a.shape, dtype=torch.float32)
            nn.init.kaiming_uniform_(fresh, a=5**0.5)
            a.data = fresh.to(a.device)
            module.lora_B["default"].weight.data = torch.zeros_like(
                module.lora_B["default"].weight, dtype=torch.float32
            )
    layers: dict[str, AdaptedLinear] = {}
    adapter: dict[str, nn.Parameter] = {}
    for name, module in modules.items():
        a_weight, b_weight = module.lora_A["default"].weight, module.lora_B["default"].weight
        layer = AdaptedLinear(module.base_layer, a_weight, b_weight, float(module.scaling["default"]), mode)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer)
        layers[name] = layer
        for part, weight in (("lora_A", a_weight), ("lora_B", b_weight)):
            weight.requires_grad_(True)
            adapter[f"base_model.model.{name}.{part}.weight"] = weight
    return layers, dict(sorted(adapter.items()))


def write_adapter(directory: Path, adapter: Mapping[str, torch.Tensor], settings: Any) -> None:
    """Write the tensors and PEFT's settings into ``directory``, byte-stable."""
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: p.detach().cpu().contiguous() for name, p in adapter.items()}
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    config = {k: sorted(v) if isinstance(v, set) else v for k, v in settings.to_dict().items()}
    config["inference_mode"] = True
    text = json.dumps(config, indent=2, sort_keys=True, default=str)
    (directory / SETTINGS).write_text(text + "\n", encoding="utf-8")


def _tensors(directory: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(directory / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise damaged(directory / WEIGHTS, error) from error


def read_adapter(directory: Path, adapter: Mapping[str, torch.Tensor], fix: str) -> None:
    """Copy a directory's tensors into ``adapter``; ModelError when their file is damaged, and with ``fix`` when names or
    shapes differ."""
    tensors = _tensors(directory)
    for name, p in adapter.items():
        found = tensors.get(name)
        if found is None or found.shape != p.shape:
            what = "is missing" if found is None else f"has shape {tuple(found.shape)}, not {tuple(p.shape)}"
            raise ModelError(f"{directory}: the adapter does not fit this model: {name} {what}.", fix=fix)
    extra = sorted(set(tensors) - set(adapter))
    if extra:
        raise ModelError(
            f"{directory}: the adapter holds {len(extra)} tensors that this model lacks, such as {extra[0]}.",
            fix=fix,
        )
    with torch.no_grad():
        for name, p in adapter.items():
            p.copy_(tensors[name])


def merge_into(model: Any, directory: Path, settings: dict[str, Any], dtype: torch.dtype | None) -> None:
    """Add a LoRA adapter to a plain model's weights, in float32, and round each weight once, to ``dtype`` (None: its
    own); ModelError when they do not belong together. PEFT reads the adapter, so that patterns of rank and alpha count."""
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora.layer import LoraLayer

    for name in ("use_dora", "modules_to_save", "lora_bias", "target_parameters", "trainable_token_indices"):
        if settings.get(name):
            raise ModelError(
                f"{directory} cannot be merged: {REFUSED[name]} ({name}).", fix="merge it with PEFT itself."
            )
    tensors = _tensors(directory)
    config: Any = LoraConfig
    inject_adapter_in_model(config.from_pretrained(str(directory)), model)
    used: set[str] = set()
    with torch.no_grad():
        for name, module in list(model.named_modules()):
            if not isinstance(module, LoraLayer):
                continue
            layer: Any = module
            base: Any = layer.base_layer
            parts = [f"base_model.model.{name}.{part}.weight" for part in ("lora_A", "lora_B")]
            a, b = (tensors.get(part) for part in parts)
            shape = tuple(base.weight.shape)
            if a is None or b is None or (b.shape[0], a.shape[1]) != shape or a.shape[0] != b.shape[1]:
                raise ModelError(
                    f"{directory}: the adapter does not fit this model: {name} is missing or differs in shape.",
                    fix="export with the model that it was trained on.",
                )
            used.update(parts)
            update = (b.float() @ a.float()) * float(layer.scaling["default"])
            base.weight.data = (base.weight.float() + update).to(dtype or base.weight.dtype)
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, base)
    extra = sorted(set(tensors) - used)
    if extra:
        raise ModelError(
            f"{directory}: the adapter holds {len(extra)} tensors that this model lacks, such as {extra[0]}.",
            fix="export with the model that it was trained on.",
        )
    if dtype is not None:
        model.to(dtype)
