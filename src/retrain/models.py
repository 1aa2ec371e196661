"""The policy: a Hugging Face causal model with a LoRA adapter, one copy of the base weights for sampling and
learning. Leaves out: sampling itself, the loss, the optimizer."""

# torch, peft and safetensors are only partly typed: what they return is Any here.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from retrain.config.schema import Config
from retrain.errors import ConfigError, ModelError
from retrain.memory import merged_copies_fit
from retrain.renderer import model_path
from retrain.types import Canary, IntArray

log = logging.getLogger("retrain")

LORA_TARGETS = ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")
"""The linear layers that carry an adapter, sorted: PEFT writes them in hash order, which differs per process."""


def resolve_device(devices: str) -> torch.device:
    """The torch device of ``backend.devices`` (``gpu:N`` or ``cpu``); a missing GPU falls back to CPU and says so."""
    if devices == "cpu":
        return torch.device("cpu")
    index = int(devices.partition(":")[2] or 0)
    if not torch.cuda.is_available():
        log.warning("No CUDA device here: %s is not available, training on the CPU instead.", devices)
        return torch.device("cpu")
    if index >= torch.cuda.device_count():
        raise ConfigError(
            f"backend.devices = {devices!r}: this machine has {torch.cuda.device_count()} CUDA device(s).",
            fix='use "gpu:0" or another index below that.',
        )
    return torch.device("cuda", index)


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The compute dtype of ``inference.dtype``: auto is bf16 on CUDA and float32 on the CPU."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[name]


def _resolve_attention(kernel: str, device: torch.device, dtype: torch.dtype) -> str:
    if kernel == "default":
        return "sdpa"
    if kernel == "flash":
        if device.type != "cuda" or dtype != torch.bfloat16:
            raise ConfigError(
                'inference.attention_kernel = "flash" needs a CUDA device and bf16.',
                fix='use attention_kernel = "default" here.',
            )
        from transformers.utils.import_utils import is_flash_attn_2_available

        if not is_flash_attn_2_available():
            raise ConfigError(
                'inference.attention_kernel = "flash" needs the package flash-attn, which is not installed.',
                fix='pip install flash-attn, or use attention_kernel = "default".',
            )
        return "flash_attention_2"
    raise ConfigError(
        f"inference.attention_kernel = {kernel!r} does not exist in the in-process engine.",
        fix='use "default" or "flash".',
    )


class _SelectedLogprobs(torch.autograd.Function):
    """Logprobs of chosen tokens from final hidden states, in chunks.

    The head is frozen, so d logprob / d hidden = (W[target] - p W) / temperature is computed together with
    the value and stored instead of the logits: no (tokens, vocabulary) tensor outlives its chunk.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_NH: torch.Tensor, head: Head, targets_N: torch.Tensor, temperature: float, chunk: int
    ) -> torch.Tensor:
        values = torch.empty(len(targets_N), dtype=torch.float32, device=hidden_NH.device)
        slopes = torch.empty_like(hidden_NH) if ctx.needs_input_grad[0] else None
        for start in range(0, len(targets_N), chunk):
            part = slice(start, start + chunk)
            targets = targets_N[part]
            logprobs = torch.log_softmax(head.logits(hidden_NH[part]) / temperature, dim=-1)
            values[part] = logprobs.gather(1, targets[:, None]).squeeze(1)
            if slopes is not None:
                delta = logprobs.exp_().neg_()
                delta[torch.arange(len(targets), device=delta.device), targets] += 1.0
                slopes[part] = head.transposed(delta / temperature).to(slopes.dtype)
        ctx.slopes = slopes
        return values

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        slopes: torch.Tensor = ctx.slopes
        return grads[0][:, None].to(slopes.dtype) * slopes, None, None, None, None


class Head:
    """The frozen output projection. Logits come out in float32: rounding them to bf16 would add noise of
    1/256 of their size to every logprob."""

    def __init__(self, layer: nn.Module) -> None:
        self.weight: torch.Tensor = layer.weight  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
        self.bias: torch.Tensor | None = getattr(layer, "bias", None)
        # The CPU has no bf16 product with a float32 result; a float32 copy of the head is the exact stand-in.
        cpu_bf16 = self.weight.device.type == "cpu" and self.weight.dtype != torch.float32
        self._dense = self.weight.detach().float() if cpu_bf16 else self.weight.detach()

    def logits(self, hidden_NH: torch.Tensor) -> torch.Tensor:
        """(N, H) hidden states to (N, vocabulary) float32 logits; takes no gradient."""
        with torch.no_grad():
            if self._dense.dtype == torch.float32:
                out = hidden_NH.float() @ self._dense.T
            else:
                out = torch.mm(hidden_NH, self._dense.T, out_dtype=torch.float32)
            return out if self.bias is None else out + self.bias.float()

    def transposed(self, delta_NV: torch.Tensor) -> torch.Tensor:
        """(N, vocabulary) times the weight: (N, H)."""
        return delta_NV.to(self._dense.dtype) @ self._dense


@dataclass(slots=True)
class _Mode:
    """Which forward the adapted layers run; shared by all of them."""

    kind: Literal["adapter", "merged", "base"] = "adapter"


class AdaptedLinear(nn.Module):
    """A frozen linear layer plus ``scale * B A``, in place of PEFT's own forward.

    In float32 the update may be merged into a separate tensor for sampling. In bf16 it never is, and the
    float32 product of the adapter is added to the base product before the only rounding: rounding the base
    product first would lose most of a small update.
    """

    def __init__(self, base: nn.Linear, a: nn.Parameter, b: nn.Parameter, scale: float, mode: _Mode) -> None:
        super().__init__()
        self.base = base
        self.a, self.b = a, b
        self.scale = scale
        self._mode = mode
        self.merged: torch.Tensor | None = None

    def delta(self) -> torch.Tensor:
        """The update (out, in) in float32."""
        return (self.b @ self.a) * self.scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) to (..., out) in the dtype of ``x``."""
        base = self.base
        if self._mode.kind == "merged" and self.merged is not None:
            return F.linear(x, self.merged, base.bias)
        if self._mode.kind == "base":
            return F.linear(x, base.weight, base.bias)
        delta = F.linear(F.linear(x.float(), self.a), self.b * self.scale)
        bias = cast("torch.Tensor | None", base.bias)
        if bias is not None:
            delta = delta + bias.float()
        flat = torch.addmm(
            delta.reshape(-1, delta.shape[-1]).to(x.dtype), x.reshape(-1, x.shape[-1]), base.weight.T
        )
        return flat.reshape(*x.shape[:-1], flat.shape[-1])


class Policy:
    """A causal language model with one LoRA adapter.

    ``adapter`` maps PEFT's names to the trainable float32 parameters. ``hidden`` runs the backbone in the
    current mode; ``selected_logprobs`` scores chosen positions without a full logits tensor.
    """

    def __init__(self, model: Any, lora: Any, seed: int, attention: str) -> None:
        self.model = model
        self.attention = attention
        self.device: torch.device = next(model.parameters()).device
        self.dtype: torch.dtype = next(model.parameters()).dtype
        self._mode = _Mode()
        self.peft_config = lora
        self.parameters_total = sum(p.numel() for p in model.parameters())
        model.requires_grad_(False)
        self.layers, self.adapter = _attach(model, lora, seed, self._mode)
        self.backbone: Any = getattr(model, model.base_model_prefix)
        self.head = Head(model.get_output_embeddings())
        self._check_head()
        self._check_untouched()

    @property
    def trainable(self) -> int:
        """Number of adapter parameters."""
        return sum(p.numel() for p in self.adapter.values())

    @contextmanager
    def mode(self, kind: Literal["adapter", "merged", "base"]) -> Generator[None]:
        """Run the forward with the adapter, with merged weights (float32 only), or without any adapter."""
        before, self._mode.kind = self._mode.kind, kind
        try:
            yield
        finally:
            self._mode.kind = before

    def merge(self) -> bool:
        """Rebuild the merged sampling copies from the untouched base; False where that is forbidden (bf16) or
        would not fit the device's memory class."""
        if self.dtype != torch.float32 or not merged_copies_fit(self.parameters_total, self.device):
            return False
        with torch.no_grad():
            for layer in self.layers.values():
                if layer.merged is None:
                    layer.merged = torch.empty_like(layer.base.weight)
                torch.add(layer.base.weight, layer.delta(), out=layer.merged)
        return True

    def recompute_activations(self) -> None:
        """Trade time for memory: recompute activations in the backward pass of a training-mode forward."""
        model = self.model
        # Renamed within transformers 5; the old name warns.
        enable = (
            getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        )
        enable({"use_reentrant": False})

    def hidden(self, ids_BT: torch.Tensor, mask_BT: torch.Tensor, **kwargs: Any) -> Any:
        """Backbone output for (B, T) ids; ``last_hidden_state`` is (B, T, H)."""
        return self.backbone(input_ids=ids_BT, attention_mask=mask_BT, **kwargs)

    def selected_logprobs(
        self, hidden_NH: torch.Tensor, targets_N: torch.Tensor, temperature: float, chunk: int
    ) -> torch.Tensor:
        """Temperature-scaled logprobs (N,) float32 of ``targets_N`` after hidden states (N, H), differentiable."""
        out: Any = _SelectedLogprobs.apply(hidden_NH, self.head, targets_N, temperature, chunk)
        return out

    def sequence_logprobs(self, ids_T: IntArray, temperature: float = 1.0) -> torch.Tensor:
        """Logprobs (T - 1,) of a sequence's tokens from the second on, in the current mode, without gradient."""
        ids = torch.as_tensor(ids_T, dtype=torch.long, device=self.device)[None]
        with torch.no_grad():
            out = self.hidden(ids, torch.ones_like(ids), use_cache=False).last_hidden_state[0, :-1]
            return self.selected_logprobs(out, ids[0, 1:], temperature, 1024)

    def canary(self) -> Canary:
        """Sixteen fixed tokens as the learner scores them now."""
        ids = (np.arange(1, 17, dtype=np.int64) * 2654435761 % int(self.model.config.vocab_size)).astype(
            np.int32
        )
        with self.mode("adapter"):
            values = self.sequence_logprobs(ids).cpu().numpy()
        return Canary(ids, values, 1e-3 if self.dtype == torch.float32 else 0.1)

    def fingerprint(self) -> str:
        """A cheap digest of the adapter: changes when any tensor's sum or sum of squares does."""
        sums = torch.stack(
            [
                torch.stack((p.detach().double().sum(), p.detach().double().square().sum()))
                for p in self.adapter.values()
            ]
        )
        return hashlib.sha256(sums.cpu().numpy().tobytes()).hexdigest()[:16]

    def base_digest(self) -> str:
        """A digest of the frozen weights that is cheap enough for every start and equal on every device: exact
        integer sums of each tensor's bits, and of every second element."""
        digest = hashlib.sha256()
        trained = {id(p) for p in self.adapter.values()}
        for name, p in sorted(self.model.named_parameters()):
            if id(p) not in trained:
                bits = p.detach().flatten().view({1: torch.int8, 2: torch.int16, 4: torch.int32}[p.element_size()])
                sums = (int(bits.sum(dtype=torch.int64)), int(bits[::2].sum(dtype=torch.int64)))
                digest.update(f"{name} {tuple(p.shape)} {sums}".encode())
        return digest.hexdigest()[:16]

    def base_checksum(self) -> str:
        """sha256 over every frozen weight: proof that neither merging nor training touched the base."""
        digest = hashlib.sha256()
        trained = {id(p) for p in self.adapter.values()}
        for name, p in sorted(self.model.named_parameters()):
            if id(p) not in trained:
                digest.update(name.encode())
                digest.update(p.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def save_adapter(self, directory: Path) -> None:
        """Write ``adapter_model.safetensors`` and ``adapter_config.json`` as PEFT reads them, byte-stable."""
        from safetensors.torch import save_file

        directory.mkdir(parents=True, exist_ok=True)
        tensors = {name: p.detach().cpu().contiguous() for name, p in self.adapter.items()}
        save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
        config = {k: sorted(v) if isinstance(v, set) else v for k, v in self.peft_config.to_dict().items()}
        config["inference_mode"] = True
        text = json.dumps(config, indent=2, sort_keys=True, default=str)
        (directory / "adapter_config.json").write_text(text + "\n", encoding="utf-8")

    def load_adapter(self, directory: Path) -> None:
        """Read what ``save_adapter`` wrote; ModelError when it belongs to another model or rank."""
        from safetensors.torch import load_file

        tensors = load_file(directory / "adapter_model.safetensors")
        for name, p in self.adapter.items():
            found = tensors.get(name)
            if found is None or found.shape != p.shape:
                what = (
                    "is missing" if found is None else f"has shape {tuple(found.shape)}, not {tuple(p.shape)}"
                )
                raise ModelError(
                    f"{directory}: the adapter does not fit this model: {name} {what}.",
                    fix="resume with the model, lora_rank and adapter that the run was started with.",
                )
        extra = sorted(set(tensors) - set(self.adapter))
        if extra:
            raise ModelError(
                f"{directory}: the adapter holds {len(extra)} tensors that this model lacks, such as {extra[0]}.",
                fix="resume with the model that the run was started with.",
            )
        with torch.no_grad():
            for name, p in self.adapter.items():
                p.copy_(tensors[name])

    def _check_untouched(self) -> None:
        """A fresh adapter must score as the base model does: otherwise every later comparison is void."""
        canary = self.canary()
        with self.mode("base"):
            base = self.sequence_logprobs(canary.token_ids_T).cpu().numpy()
        gap = float(np.abs(base - canary.logprobs_T).max())
        if not gap <= canary.tolerance:
            raise ModelError(
                f"the untouched adapter changes the model's logprobs by {gap:.3g} nats.",
                fix="this is a defect of the adapter's forward, please report it with the model's config.json.",
            )

    def _check_head(self) -> None:
        """Refuse models that rescale or cap their logits: the chunked head would score another distribution."""
        if getattr(self.model.config, "final_logit_softcapping", None):
            raise self._changed_logits()
        ids = torch.arange(1, 5, device=self.device)[None] % int(self.model.config.vocab_size)
        with torch.no_grad(), self.mode("base"):
            theirs = self.model(input_ids=ids, use_cache=False).logits[0].float()
            ours = self.head.logits(
                self.hidden(ids, torch.ones_like(ids), use_cache=False).last_hidden_state[0]
            )
        bound = 1e-3 if self.dtype == torch.float32 else 0.05 * float(theirs.abs().max())
        if float((theirs - ours).abs().max()) > bound:
            raise self._changed_logits()

    def _changed_logits(self) -> ModelError:
        return ModelError(
            f"the model type {self.model.config.model_type!r} changes its logits after the output head.",
            fix="use a model whose logits are the plain head product (Qwen, Llama, Mistral, SmolLM and most others).",
        )


def _attach(
    model: Any, lora: Any, seed: int, mode: _Mode
) -> tuple[dict[str, AdaptedLinear], dict[str, nn.Parameter]]:
    """Let PEFT place and initialise the adapter, then put our forward in place of its layers."""
    from peft import inject_adapter_in_model
    from peft.tuners.lora.layer import Linear as PeftLinear

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(lora, model)
        modules: dict[str, Any] = {n: m for n, m in model.named_modules() if isinstance(m, PeftLinear)}
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


def load_policy(config: Config, *, seed: int) -> Policy:
    """Load base model and fresh adapter as the configuration says; ModelError names the model and the fix."""
    device = resolve_device(config.backend.devices)
    dtype = resolve_dtype(config.inference.dtype, device)
    attention = _resolve_attention(config.inference.attention_kernel, device, dtype)
    if config.inference.kv_cache_dtype == "bf16" and dtype != torch.bfloat16:
        raise ConfigError(
            'inference.kv_cache_dtype = "bf16" with float32 compute would let the sampler differ from the learner.',
            fix='use "auto", or inference.dtype = "bf16" as well.',
        )
    name = config.model.model
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as hf_logging

    log.info("Loading train model: %s on %s...", name, device)
    hf_logging.disable_progress_bar()
    auto: Any = AutoModelForCausalLM
    try:
        model = auto.from_pretrained(
            model_path(name),
            revision=config.model.revision or None,
            dtype=dtype,
            attn_implementation=attention,
            trust_remote_code=False,
            use_safetensors=True,
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"model.model = {name!r} cannot be loaded: {reason}",
            fix='name a folder that holds a Hugging Face model, an id on the Hub, or "retrain/tiny".',
        ) from error
    model.to(device).eval()
    for module in model.modules():
        # Recomputing activations needs training mode, in which dropout would part learner and sampler.
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            setattr(module, "attention_dropout", 0.0)  # noqa: B010  an attribute torch does not declare
    rank = config.model.lora_rank
    present = {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    targets = [t for t in LORA_TARGETS if t in present]
    if len(targets) != len(LORA_TARGETS):
        missing = ", ".join(t for t in LORA_TARGETS if t not in present)
        raise ModelError(
            f"model.model = {name!r} has no linear layers named {missing}.",
            fix="use a model of the Llama or Qwen family layout.",
        )
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=name,
        r=rank,
        lora_alpha=config.lora.alpha or 2 * rank,
        lora_dropout=config.lora.dropout,
        use_rslora=config.lora.rslora,
        target_modules=targets,
        bias="none",
    )
    policy = Policy(model, lora, seed, attention)
    total = policy.parameters_total + policy.trainable
    log.info(
        "trainable params: %s || all params: %s || trainable%%: %.4f",
        f"{policy.trainable:,}",
        f"{total:,}",
        100 * policy.trainable / total,
    )
    return policy
