"""The policy: a Hugging Face causal model with a LoRA adapter, one copy of the base weights for sampling and
learning. Leaves out: sampling itself, the loss, the optimizer."""

# torch, peft and safetensors are only partly typed: what they return is Any here.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from retrain.adapter import Mode, attach, merge_into, read_adapter, write_adapter
from retrain.adapter_settings import (
    LORA_TARGETS,
    SETTINGS,
    check_start_adapter,
    read_settings,
    start_directory,
)
from retrain.attention import Attend, one_sequence
from retrain.config.schema import Config
from retrain.decoder import Decoder
from retrain.decoder import build as build_decoder
from retrain.errors import ConfigError, ModelError
from retrain.head import Head, SelectedLogprobs
from retrain.memory import merged_copies_fit
from retrain.renderer import model_path
from retrain.types import Canary, IntArray

log = logging.getLogger("retrain")


def resolve_device(devices: str) -> torch.device:
    """The torch device of ``backend.devices`` (``gpu:N`` or ``cpu``); a missing GPU falls back to CPU and says so."""
    if devices == "cpu":
        return torch.device("cpu")
    index = int(devices.partition(":")[2] or 0)
    if not torch.cuda.is_available():
        log.warning("No CUDA device here: %s is not available, using the CPU instead.", devices)
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


def _check_attention(kernel: str, device: torch.device, dtype: torch.dtype) -> None:
    """PyTorch picks its FlashAttention kernel by itself where device, dtype and mask allow it; ``flash`` refuses a
    device and a dtype that never do."""
    if kernel == "default":
        return
    if kernel != "flash":
        raise ConfigError(
            f"inference.attention_kernel = {kernel!r} does not exist in the in-process engine.",
            fix='use "default" or "flash".',
        )
    if device.type != "cuda" or dtype != torch.bfloat16:
        raise ConfigError(
            'inference.attention_kernel = "flash" needs a CUDA device and bf16.',
            fix='use attention_kernel = "default" here.',
        )


class Policy:
    """A causal language model with one LoRA adapter.

    ``adapter`` maps PEFT's names to the trainable float32 parameters. ``forward`` runs the backbone in the
    current mode; ``selected_logprobs`` scores chosen positions without a full logits tensor.
    """

    def __init__(self, model: Any, lora: Any, seed: int) -> None:
        self.model = model
        embedding: torch.Tensor = model.get_input_embeddings().weight
        self.device: torch.device = embedding.device
        self.dtype: torch.dtype = embedding.dtype
        self._mode = Mode()
        self.peft_config = lora
        self.parameters_total = int(model.num_parameters())
        model.requires_grad_(False)
        self.head = Head(model.get_output_embeddings())
        self._check_head()
        self.layers, self.adapter = attach(model, lora, seed, self._mode)
        self._decoder: Decoder = build_decoder(model, self.layers, self._mode)
        self._check_untouched()

    @property
    def trainable(self) -> int:
        """Number of adapter parameters."""
        return sum(p.numel() for p in self.adapter.values())

    @contextmanager
    def mode(self, kind: Literal["adapter", "merged", "base"]) -> Generator[None]:
        """Run the forward with the adapter, with what ``merge`` prepared, or without any adapter."""
        before, self._mode.kind = self._mode.kind, kind
        try:
            yield
        finally:
            self._mode.kind = before

    @contextmanager
    def dropout(self, share: float, seed: int) -> Generator[None]:
        """Drop that share of the adapter's inputs in forwards in here, drawn from ``seed``; nothing else sees the draw."""
        if not share:
            yield
            return
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(seed)
            self._mode.dropout = share
            try:
                yield
            finally:
                self._mode.dropout = 0.0

    def merge(self) -> bool:
        """Prepare ``merged`` mode from the untouched base: merged weights where products are float32, else (rounding
        would eat small updates) the adapter's factors as they are multiplied. False where the copies would not fit the
        device's memory class: sample in ``adapter`` mode then."""
        if self._decoder.mergeable and not merged_copies_fit(self.parameters_total, self.device, self.dtype):
            return False
        self._decoder.merge()
        return True

    def recompute_activations(self) -> None:
        """Trade time for memory: recompute activations in the backward pass of a training-mode forward."""
        self._decoder.recompute_activations()

    def forward(self, ids_N: torch.Tensor, positions_N: torch.Tensor, attend: Attend) -> torch.Tensor:
        """Final hidden states (N, H) of N tokens on one flat axis, in the current mode, differentiable; ``positions_N`` are
        their places in their own sequences, and ``attend`` knows which token sees which."""
        return self._decoder(ids_N, positions_N, attend)

    def selected_logprobs(
        self, hidden_NH: torch.Tensor, targets_N: torch.Tensor, temperature: float, chunk: int
    ) -> torch.Tensor:
        """Temperature-scaled logprobs (N,) float32 of ``targets_N`` after hidden states (N, H), differentiable."""
        out: Any = SelectedLogprobs.apply(hidden_NH, self.head, targets_N, temperature, chunk, False)
        return out[0]

    def selected_logprobs_and_entropies(
        self, hidden_NH: torch.Tensor, targets_N: torch.Tensor, temperature: float, chunk: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Also the entropies (N,) in nats of the whole distributions at ``temperature``, differentiable too."""
        out: Any = SelectedLogprobs.apply(hidden_NH, self.head, targets_N, temperature, chunk, True)
        return out

    def sequence_logprobs(self, ids_T: IntArray, temperature: float = 1.0) -> torch.Tensor:
        """Logprobs (T - 1,) of a sequence's tokens from the second on, in the current mode, without gradient."""
        ids = torch.as_tensor(ids_T, dtype=torch.long, device=self.device)
        with torch.no_grad():
            out = self.forward(ids, torch.arange(len(ids), device=self.device), one_sequence)[:-1]
            return self.selected_logprobs(out, ids[1:], temperature, 1024)

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
                bits = (
                    p.detach()
                    .flatten()
                    .view({1: torch.int8, 2: torch.int16, 4: torch.int32}[p.element_size()])
                )
                sums = (int(bits.sum(dtype=torch.int64)), int(bits[::2].sum(dtype=torch.int64)))
                digest.update(f"{name} {tuple(p.shape)} {sums}".encode())
                # Four-bit codes mean nothing without the scales of their blocks.
                scales: Any = getattr(getattr(p, "quant_state", None), "absmax", None)
                if scales is not None:
                    digest.update(scales.cpu().numpy().tobytes())
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
        write_adapter(directory, self.adapter, self.peft_config)

    def load_adapter(self, directory: Path) -> None:
        """Read what ``save_adapter`` wrote; ModelError when it belongs to another model or rank."""
        read_adapter(
            directory,
            self.adapter,
            "resume with the model, lora_rank and adapter that the run was started with.",
        )

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
        with torch.no_grad():
            theirs = self.model(input_ids=ids, use_cache=False).logits[0].float()
            backbone: Any = getattr(self.model, self.model.base_model_prefix)
            ours = self.head.logits(backbone(input_ids=ids, use_cache=False).last_hidden_state[0])
        bound = 1e-3 if self.dtype == torch.float32 else 0.05 * float(theirs.abs().max())
        if float((theirs - ours).abs().max()) > bound:
            raise self._changed_logits()

    def _changed_logits(self) -> ModelError:
        return ModelError(
            f"the model type {self.model.config.model_type!r} changes its logits after the output head.",
            fix="use a model whose logits are the plain head product (Qwen, Llama, Mistral, SmolLM and most others).",
        )


def _quantization(config: Config, device: torch.device, dtype: torch.dtype) -> Any:
    """The 4-bit settings of ``model.quantization``, None without; ConfigError where this machine cannot honour them."""
    kind = config.model.quantization
    if not kind:
        return None
    stated = f"model.quantization = {kind!r}"
    if device.type != "cuda":
        raise ConfigError(
            f"{stated} needs a CUDA device: its 4-bit weights are expanded by CUDA kernels.",
            fix="leave it empty here.",
        )
    if dtype != torch.bfloat16:
        raise ConfigError(
            f"{stated} computes in bf16, not in float32.", fix='use inference.dtype = "auto" or "bf16".'
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"{stated} needs the package bitsandbytes, which is not installed.",
            fix='pip install "retrain[qlora]".',
        )
    from transformers import BitsAndBytesConfig

    # QLoRA (2305.14314): the constants of the quantisation are quantised too; the head keeps its precision.
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["lm_head"],
    )


def _load_model(config: Config, **how: Any) -> Any:
    """The base model as transformers loads it; ModelError names it and the fix."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as hf_logging

    hf_logging.disable_progress_bar()
    auto: Any = AutoModelForCausalLM
    name = config.model.model
    try:
        return auto.from_pretrained(
            model_path(name),
            revision=config.model.revision or None,
            trust_remote_code=False,
            use_safetensors=True,
            **how,
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"model.model = {name!r} cannot be loaded: {reason}",
            fix='name a folder that holds a Hugging Face model, an id on the Hub, or "retrain/tiny".',
        ) from error


def _same_model(a: str, b: str) -> bool:
    """Whether two values of ``model.model`` name one id or one folder."""
    one, other = model_path(a), model_path(b)
    return one == other or (Path(one).exists() and Path(other).exists() and Path(one).samefile(other))


def load_policy(config: Config, *, seed: int) -> Policy:
    """Load base model and fresh adapter as the configuration says; ModelError names the model and the fix."""
    device = resolve_device(config.backend.devices)
    dtype = resolve_dtype(config.inference.dtype, device)
    _check_attention(config.inference.attention_kernel, device, dtype)
    if config.inference.kv_cache_dtype == "bf16" and dtype != torch.bfloat16:
        raise ConfigError(
            'inference.kv_cache_dtype = "bf16" with float32 compute would let the sampler differ from the learner.',
            fix='use "auto", or inference.dtype = "bf16" as well.',
        )
    quantized = _quantization(config, device, dtype)
    start = check_start_adapter(config)
    name = config.model.model
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from peft import LoraConfig

    log.info("Loading train model: %s on %s...", name, device)
    placed: dict[str, Any] = (
        {"quantization_config": quantized, "device_map": {"": device}} if quantized else {}
    )
    model = _load_model(config, dtype=dtype, **placed)
    if not quantized:
        model.to(device)
    model.eval()
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
    policy = Policy(model, lora, seed)
    if start is not None:
        recorded = str(start.get("base_model_name_or_path") or "")
        if recorded and not _same_model(recorded, name):
            log.warning(
                "lora.init_from = %r was trained on %s by its own account, this run trains on %s.",
                config.lora.init_from,
                recorded,
                name,
            )
        fix = "set model.model to the model that it was trained on."
        read_adapter(start_directory(config), policy.adapter, fix)
    total = policy.parameters_total + policy.trainable
    log.info(
        "trainable params: %s || all params: %s || trainable%%: %.4f",
        f"{policy.trainable:,}",
        f"{total:,}",
        100 * policy.trainable / total,
    )
    return policy


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Number formats that ``export`` writes."""


def export(config: Config, adapter: Path, out: Path, *, merged: bool, dtype: str = "auto") -> None:
    """Write a trained adapter for other programs into the new folder ``out``.

    ``merged``: a whole transformers model with its tokenizer, each weight computed as ``W + scale B A`` in float32 and
    rounded once, to ``dtype`` (fp32, bf16, fp16, or auto: the model's own format). The weights are the model's own, also
    where it was trained over a 4-bit copy. Otherwise a copy of the PEFT adapter that names the model by its id or whole
    path. ModelError or ConfigError, before anything is written, when ``adapter`` is none or ``out`` holds files.
    """
    settings = read_settings(adapter, "the adapter")
    if dtype not in ("auto", *DTYPES):
        raise ConfigError(f"{dtype!r} is no number format to export.", fix=f"use auto, {', '.join(DTYPES)}.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} already holds files.", fix="name a new folder.")
    path = model_path(config.model.model)
    named = str(Path(path).resolve()) if Path(path).is_dir() else path
    if not merged:
        out.mkdir(parents=True, exist_ok=True)
        for file in sorted(adapter.iterdir()):
            if file.is_file() and file.name != SETTINGS:
                shutil.copyfile(file, out / file.name)
        settings |= {"base_model_name_or_path": named, "revision": config.model.revision or None}
        text = json.dumps(settings, indent=2, sort_keys=True)
        (out / SETTINGS).write_text(text + "\n", encoding="utf-8")
        return
    from transformers import AutoTokenizer

    model = _load_model(config, dtype="auto")
    merge_into(model, adapter, settings, DTYPES.get(dtype))
    model.save_pretrained(out)
    tokenizer: Any = AutoTokenizer
    tokenizer.from_pretrained(path, revision=config.model.revision or "main").save_pretrained(out)
