"""The forward pass of a decoder over one flat axis of tokens, without padding, with the attention that the caller
brings: our own for the layout of Llama, Mistral and Qwen, and for every other model the modules that transformers built.

Which one runs is decided by result: our pass is used where it reproduces the modules' hidden states.
"""

# torch and transformers are only partly typed: what they return is Any here.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from retrain.adapter import AdaptedLinear, Mode
from retrain.attention import Attend, one_sequence
from retrain.errors import ModelError
from retrain.fused import FusedLinear, Heads, Norm, gated, rms_norm, split_heads

log = logging.getLogger("retrain")

_NAME = "retrain"
_FAMILIES = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")
_attends: dict[int, Attend] = {}
"""What the modules of a model attend with, by the id of its configuration. It stays until the next forward pass: where
activations are recomputed, the backward pass attends again."""


class Decoder(Protocol):
    """A backbone: token ids to final hidden states."""

    def __call__(self, ids_N: torch.Tensor, positions_N: torch.Tensor, attend: Attend) -> torch.Tensor:
        """Hidden states (N, H) after the last norm, in the adapter's current mode, differentiable."""
        ...

    @property
    def mergeable(self) -> bool:
        """Are products float32, so that the adapter may be merged for sampling?"""
        ...

    def merge(self) -> None:
        """Rebuild what sampling runs on from the untouched base."""
        ...

    def recompute_activations(self) -> None:
        """Keep only each layer's input and run the layer again in the backward pass."""
        ...


class StockDecoder:
    """The modules that transformers built, run as one row of N tokens; works for every model whose attention is
    pluggable."""

    def __init__(self, model: Any, layers: Mapping[str, AdaptedLinear]) -> None:
        from transformers import AttentionInterface

        interface: Any = AttentionInterface
        interface.register(_NAME, _attention)
        model.set_attn_implementation(_NAME)
        self._model = model
        self._layers = layers
        self._recompute = False
        self._backbone: Any = getattr(model, model.base_model_prefix)

    def __call__(self, ids_N: torch.Tensor, positions_N: torch.Tensor, attend: Attend) -> torch.Tensor:
        """Hidden states (N, H)."""
        _attends[id(self._model.config)] = attend
        # transformers recomputes in training mode only; dropout is switched off in every module.
        self._model.train(self._recompute and torch.is_grad_enabled())
        try:
            out = self._backbone(input_ids=ids_N[None], position_ids=positions_N[None], use_cache=False)
        finally:
            self._model.eval()
        return out.last_hidden_state[0]

    @property
    def mergeable(self) -> bool:
        """True for a float32 base."""
        return all(
            layer.base.weight.dtype == torch.float32 and not layer.quantized
            for layer in self._layers.values()
        )

    @torch.no_grad()
    def merge(self) -> None:
        """Merge every layer."""
        for layer in self._layers.values():
            if layer.quantized or layer.base.weight.dtype != torch.float32:
                continue
            if layer.merged is None:
                layer.merged = torch.empty_like(layer.base.weight)
            torch.add(layer.base.weight, layer.delta(), out=layer.merged)

    def recompute_activations(self) -> None:
        """transformers' own checkpointing."""
        self._recompute = True
        # Renamed within transformers 5; the old name warns.
        enable = (
            getattr(self._model, "activation_checkpointing_enable", None)
            or self._model.gradient_checkpointing_enable
        )
        enable({"use_reentrant": False})


def _attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **how: Any
) -> tuple[torch.Tensor, None]:
    """What transformers calls in every layer, for one row: (1, heads, N, D) each."""
    if how.get("softcap"):
        raise ModelError(
            "the model caps its attention scores (softcap), which no kernel here does.",
            fix="use a model of the Qwen, Llama or Mistral family.",
        )
    scale, window = how.get("scaling"), how.get("sliding_window")
    out = _attends.get(id(module.config), one_sequence)(
        module.layer_idx,
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        scale=query.shape[-1] ** -0.5 if scale is None else scale,
        window=window,
    )
    return out[None], None


@dataclass(frozen=True, slots=True)
class _Layer:
    """One decoder layer: fused products, two of them with the norm before, and how its attention is scaled and bounded."""

    number: int
    qkv: FusedLinear
    heads: Heads
    out: FusedLinear
    gate_up: FusedLinear
    down: FusedLinear
    scale: float
    window: int | None

    def __call__(
        self, x_NH: torch.Tensor, cos_N1D: torch.Tensor, sin_N1D: torch.Tensor, attend: Attend
    ) -> torch.Tensor:
        q, k, v = split_heads(self.qkv.normed(x_NH), cos_N1D, sin_N1D, self.heads)
        seen = attend(self.number, q, k, v, scale=self.scale, window=self.window)
        x_NH = self.out(seen.reshape(len(seen), -1), x_NH)
        return self.down(gated(self.gate_up.normed(x_NH)), x_NH)


class LeanDecoder:
    """Llama's layout with fused products and hand-written slopes: few calls, no temporaries, no padding."""

    def __init__(
        self, model: Any, seen: Mapping[int, tuple[float, int | None]], mode: Mode, *, native: bool | None
    ) -> None:
        backbone: Any = getattr(model, model.base_model_prefix)
        self._embedding: torch.Tensor = backbone.embed_tokens.weight
        self._rotary: Any = backbone.rotary_emb
        self._norm: torch.Tensor = backbone.norm.weight
        self._eps = float(backbone.norm.variance_epsilon)
        self._recompute = False
        self._tables: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._layers = [
            _layer(module, number, mode, *seen[number], native=native)
            for number, module in enumerate(backbone.layers)
        ]
        self._linears = [
            linear for layer in self._layers for linear in (layer.qkv, layer.out, layer.gate_up, layer.down)
        ]

    def __call__(self, ids_N: torch.Tensor, positions_N: torch.Tensor, attend: Attend) -> torch.Tensor:
        """Hidden states (N, H)."""
        x = F.embedding(ids_N, self._embedding)
        cos, sin = self._turns(positions_N)
        for layer in self._layers:
            if self._recompute and torch.is_grad_enabled():
                made: Any = checkpoint(layer, x, cos, sin, attend, use_reentrant=False)
                x = made
            else:
                x = layer(x, cos, sin, attend)
        return rms_norm(x, self._norm, self._eps)

    @property
    def mergeable(self) -> bool:
        """True where products are float32."""
        return all(linear.mergeable for linear in self._linears)

    @torch.no_grad()
    def merge(self) -> None:
        """Merge every product."""
        for linear in self._linears:
            linear.merge()

    def recompute_activations(self) -> None:
        """From now on, wherever gradients are taken."""
        self._recompute = True

    def _turns(self, positions_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines (N, 1, D) from tables of at least twice the length seen, so that a CUDA graph recorded now
        still reads inside them when its rows have grown. Outgrown tables stay: such a graph may read them."""
        recording = positions_N.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if not self._tables or not recording:
            length = int(positions_N.max()) + 1
            if not self._tables or 2 * length > len(self._tables[-1][0]):
                self._tables.append(self._rotations(max(1024, 2 << (length - 1).bit_length())))
        cos, sin = self._tables[-1]
        return cos[positions_N], sin[positions_N]

    @torch.no_grad()
    def _rotations(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        device = self._embedding.device
        cos, sin = self._rotary(
            torch.zeros(1, 1, 1, device=device), torch.arange(length, device=device)[None]
        )
        half = sin.shape[-1] // 2
        sin = torch.cat((-sin[..., :half], sin[..., half:]), dim=-1)
        return cos[0, :, None].contiguous(), sin[0, :, None].contiguous()


def _layer(
    module: Any, number: int, mode: Mode, scale: float, window: int | None, *, native: bool | None
) -> _Layer:
    attn, mlp = module.self_attn, module.mlp
    width = int(attn.head_dim)
    queries, keys = (p.base.out_features // width for p in (attn.q_proj, attn.k_proj))
    norms: tuple[Any, Any] = getattr(attn, "q_norm", None), getattr(attn, "k_norm", None)
    weight = eps = None
    if norms[0] is not None:
        weight = torch.cat(
            [n.weight.detach().expand(h, width) for n, h in zip(norms, (queries, keys), strict=True)]
        ).contiguous()
        eps = float(norms[0].variance_epsilon)
    before, between = (
        Norm(n.weight, float(n.variance_epsilon))
        for n in (module.input_layernorm, module.post_attention_layernorm)
    )
    return _Layer(
        number=number,
        qkv=FusedLinear((attn.q_proj, attn.k_proj, attn.v_proj), mode, norm=before, native=native),
        heads=Heads(queries, keys, width, weight, eps or 0.0),
        out=FusedLinear((attn.o_proj,), mode, native=native),
        gate_up=FusedLinear((mlp.gate_proj, mlp.up_proj), mode, norm=between, native=native),
        down=FusedLinear((mlp.down_proj,), mode, native=native),
        scale=scale,
        window=window,
    )


def build(
    model: Any, layers: Mapping[str, AdaptedLinear], mode: Mode, *, native: bool | None = None
) -> Decoder:
    """Our own pass where the model's layers have the known layout and it reproduces the modules on a few tokens, to
    1e-4 of the hidden states' norm (0.1 in bf16); else the modules. ``native`` overrides whether products run in bf16."""
    stock = StockDecoder(model, layers)
    backbone: Any = getattr(model, model.base_model_prefix)
    blocks = list(getattr(backbone, "layers", ()))
    known = bool(blocks) and all(type(b).__name__ in _FAMILIES for b in blocks)
    config = model.config
    rope: Any = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    fixed = rope.get("rope_type", "default") in ("default", "linear", "llama3", "yarn")
    if not (known and fixed and config.hidden_act == "silu"):
        log.info("Model type %s runs on transformers' own modules.", config.model_type)
        return stock
    device = backbone.embed_tokens.weight.device
    ids = torch.arange(3, 27, device=device) * 7919 % int(config.vocab_size)
    positions = torch.arange(len(ids), device=device)
    seen: dict[int, tuple[float, int | None]] = {}

    def watch(
        layer: int,
        q_NHD: torch.Tensor,
        k_NKD: torch.Tensor,
        v_NKD: torch.Tensor,
        *,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        seen[layer] = (scale, window)
        return one_sequence(layer, q_NHD, k_NKD, v_NKD, scale=scale, window=window)

    before, mode.kind = mode.kind, "base"
    try:
        with torch.no_grad():
            theirs = stock(ids, positions, watch).float()
            lean = LeanDecoder(model, seen, mode, native=native)
            ours = lean(ids, positions, one_sequence).float()
    finally:
        mode.kind = before
    # In bf16 both round, at different places; another layout or a forgotten term is off by far more than this.
    bound = 1e-4 if backbone.embed_tokens.weight.dtype == torch.float32 else 0.1
    gap = float((theirs - ours).norm() / theirs.norm())
    if gap <= bound:
        return lean
    log.warning(
        "Model type %s: the fast forward pass differs from transformers' by %.2g of the hidden states' norm; using "
        "transformers' modules, which are slower.",
        config.model_type,
        gap,
    )
    return stock
