"""The forward pass of a decoder over one flat axis of tokens, without padding, with the attention that the caller
brings: our own for the layout of Llama, Mistral and Qwen, and for every other model the modules that transformers built.

Which one runs is decided by result: our pass is used where it reproduces the modules' hidden states.
"""

# torch and transformers are only partly typed: what they return is Any here.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
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
    pluggable and whose layers mix tokens by nothing else."""

    def __init__(self, model: Any, layers: Mapping[str, AdaptedLinear]) -> None:
        from transformers import AttentionInterface

        interface: Any = AttentionInterface
        interface.register(_NAME, _attention)
        model.set_attn_implementation(_NAME)
        self._model = model
        self._layers = layers
        self._recompute = False
        self._backbone: Any = getattr(model, model.base_model_prefix)
        self.attend: Attend | None = None
        """What the modules attend with during a pass, and where activations are recomputed until the next one: the
        backward pass attends again."""
        for module in model.modules():
            if hasattr(module, "layer_idx"):
                module.retrain_decoder = self

    def __call__(self, ids_N: torch.Tensor, positions_N: torch.Tensor, attend: Attend) -> torch.Tensor:
        """Hidden states (N, H)."""
        self.attend = attend
        again = self._recompute and torch.is_grad_enabled()
        # transformers recomputes in training mode only; dropout is switched off in every module.
        self._model.train(again)
        try:
            out = self._backbone(input_ids=ids_N[None], position_ids=positions_N[None], use_cache=False)
        finally:
            self._model.eval()
            if not again:
                self.attend = None
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
    for what, name in (("softcap", "caps its attention scores"), ("s_aux", "attends to learned sinks")):
        if how.get(what) is not None and how[what] is not False:
            raise ModelError(
                f"the model {name} ({what}), which no kernel here does.",
                fix="use a model of the Qwen, Llama or Mistral family.",
            )
    attend: Attend | None = module.retrain_decoder.attend
    if attend is None:
        # Somebody runs the model itself: one whole sequence needs nobody who knows which token sees which.
        if len(query) > 1 or query.shape[2] != key.shape[2]:
            raise RuntimeError("outside of a decoder's pass a model with an adapter runs one whole sequence only")
        attend = one_sequence
    scale, window = how.get("scaling"), how.get("sliding_window")
    out = attend(
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


class _Watch:
    """``Attend`` of a check: two sequences beside each other, the first ``split`` tokens long, or the rest of one after
    what an earlier pass has kept. Records how each layer attends."""

    def __init__(self, split: int, past: _Watch | None = None) -> None:
        self.layers: dict[int, tuple[float, int | None]] = {}
        self.calls = 0
        self._split, self._past = split, past
        self.kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __call__(
        self,
        layer: int,
        q_NHD: torch.Tensor,
        k_NKD: torch.Tensor,
        v_NKD: torch.Tensor,
        *,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        """(N, H, D)."""
        self.layers[layer] = (scale, window)
        self.calls += 1
        how: dict[str, Any] = {"scale": scale, "window": window}
        if self._past is None:
            self.kept[layer] = k_NKD, v_NKD
            cuts = [slice(0, self._split)]
            if len(q_NHD) > self._split:
                cuts.append(slice(self._split, None))
            return torch.cat([one_sequence(layer, q_NHD[c], k_NKD[c], v_NKD[c], **how) for c in cuts])
        keys, values = self._past.kept[layer]
        at = len(keys)
        q = torch.cat([q_NHD.new_zeros((at, *q_NHD.shape[1:])), q_NHD])
        return one_sequence(layer, q, torch.cat([keys, k_NKD]), torch.cat([values, v_NKD]), **how)[at:]


def _gap(theirs: torch.Tensor, ours: torch.Tensor) -> float:
    return float((theirs.float() - ours.float()).norm() / theirs.float().norm())


@torch.no_grad()
def _agrees(
    run: Decoder, ids_N: torch.Tensor, split: int, theirs: Sequence[torch.Tensor], bound: float
) -> str:
    """Why a pass is not the model's: "" where two sequences side by side, and one whose end comes later, get the hidden
    states that the model's own pass gave each of them."""
    first, second = ids_N[:split], ids_N[split:]
    at = torch.arange(len(ids_N), device=ids_N.device)
    out = run(ids_N, torch.cat([at[:split], at[: len(second)]]), _Watch(split))
    if (gap := max(_gap(t, o) for t, o in zip(theirs, out.split((split, len(second))), strict=True))) > bound:
        return f"hidden states differ by {gap:.2g} of their norm"
    early = _Watch(split - 3)
    run(first[:-3], at[: split - 3], early)
    late = run(first[-3:], at[split - 3 : split], _Watch(3, early))
    if (gap := _gap(theirs[0][-3:], late)) > bound:
        return f"tokens that come later differ by {gap:.2g}: something besides attention remembers"
    return ""


@torch.no_grad()
def build(
    model: Any, layers: Mapping[str, AdaptedLinear], mode: Mode, *, native: bool | None = None
) -> Decoder:
    """Our own pass where the model's layers have the known layout and it reproduces the modules, else the modules;
    ModelError where they do not reproduce themselves with a plugged attention: their layers mix tokens by more than that.

    Reproducing is to give the hidden states of the model's own pass, to 1e-4 of their norm (0.1 in bf16, where both round
    at different places). ``native`` overrides whether products run in bf16.
    """
    config = model.config
    rope: Any = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if rope.get("rope_type") in ("dynamic", "longrope"):
        raise ModelError(
            f"the model's rotations are of type {rope['rope_type']}: they change with the longest sequence in a pass, and with "
            "them what every other sequence means.",
            fix='use a model whose rope_type is "default", "linear", "llama3" or "yarn".',
        )
    backbone: Any = getattr(model, model.base_model_prefix)
    embedding: torch.Tensor = model.get_input_embeddings().weight
    bound = 1e-4 if embedding.dtype == torch.float32 else 0.1
    split = 24
    ids = torch.arange(3, 3 + split + 17, device=embedding.device) * 7919 % int(config.vocab_size)
    before, mode.kind = mode.kind, "base"
    try:
        # Before anything is plugged in.
        theirs = [
            backbone(input_ids=part[None], use_cache=False).last_hidden_state[0]
            for part in (ids[:split], ids[split:])
        ]
        stock = StockDecoder(model, layers)
        watch = _Watch(split)
        stock(ids[:split], torch.arange(split, device=ids.device), watch)
        depth = int(config.num_hidden_layers)
        wrong = _agrees(stock, ids, split, theirs, bound)
        if watch.calls != depth or sorted(watch.layers) != list(range(depth)):
            wrong = f"{watch.calls} of its {depth} layers attend by the interface of transformers"
        if wrong:
            raise ModelError(
                f"the model type {config.model_type!r} cannot be run here: {wrong}.",
                fix="use a model whose layers mix tokens by attention alone (Qwen, Llama, Mistral, Gemma, OLMo and most others).",
            )
        blocks = list(getattr(backbone, "layers", ()))
        known = bool(blocks) and all(type(b).__name__ in _FAMILIES for b in blocks)
        if not (known and config.hidden_act == "silu"):
            log.info("Model type %s runs on transformers' own modules.", config.model_type)
            return stock
        lean = LeanDecoder(model, watch.layers, mode, native=native)
        wrong = _agrees(lean, ids, split, theirs, bound)
    finally:
        mode.kind = before
    if not wrong:
        return lean
    log.warning(
        "Model type %s: the fast forward pass is not the model's (%s); using transformers' modules, which are slower.",
        config.model_type,
        wrong,
    )
    return stock
