"""The pieces of a decoder layer with hand-written backward passes: adapted linear layers of one input as one product,
root-mean-square norm, rotation of queries and keys, gated unit.

Frozen weights need no gradient, so each piece keeps one tensor per token and input; nothing here is in place on what
it is given. Where the model computes in bf16 on the CPU, products run in float32 on what bf16 holds exactly, and each
output is rounded once.
"""

# torch is only partly typed: what it returns is Any here.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportIncompatibleMethodOverride=false

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from retrain.adapter import AdaptedLinear, Mode
from retrain.head import few_rows

_NATIVE_WIDTH = 256
"""Inputs below this are too narrow for the CPU's bf16 units to win over float32."""


def has_bf16_units() -> bool:
    """Does this CPU multiply bf16 in hardware? Emulated products are several times slower than float32."""
    cpu: Any = torch.cpu
    probes = (getattr(cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return any(probe is not None and bool(probe()) for probe in probes)


@dataclass(frozen=True, slots=True)
class _Part:
    """One of the linear layers: its rows of the fused output and its columns of the fused A product."""

    layer: AdaptedLinear
    out: slice
    rank: slice


@dataclass(frozen=True, slots=True)
class Norm:
    """A frozen root-mean-square norm."""

    weight: torch.Tensor
    eps: float


class FusedLinear:
    """Adapted linear layers that read the same input, as one product: q, k, v; gate, up; or a single one.

    The base weights of the layers become views of one tensor (no copy stays), and so do their A matrices. The adapter's
    product is added before the only rounding. With dropout or a base in 4 bits each layer runs for itself. ``norm`` is
    the norm that the input comes through: merged float32 weights carry its factors.
    """

    def __init__(
        self,
        layers: Sequence[AdaptedLinear],
        mode: Mode,
        *,
        norm: Norm | None = None,
        native: bool | None = None,
    ) -> None:
        first = layers[0].base.weight
        self._mode = mode
        self._norm = norm
        self._floor: torch.Tensor | None = None
        self._layers = tuple(layers)
        self.plain = any(layer.quantized for layer in layers)
        self.merged: torch.Tensor | None = None
        self._split: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
        if self.plain:
            return
        self._dtype = first.dtype
        if native is None:
            native = first.device.type != "cpu" or (has_bf16_units() and first.shape[1] >= _NATIVE_WIDTH)
        # float32 products of bf16 weights: exact sums of exact products, rounded once.
        self._wide = first.dtype != torch.float32 and not native
        self._weight = _joined([layer.base for layer in layers])
        if self._wide:
            self._weight = self._weight.float()
        self._a = _joined_parameters([layer.a for layer in layers])
        biases = [cast("torch.Tensor | None", layer.base.bias) for layer in layers]
        self._bias: torch.Tensor | None = None
        if any(b is not None for b in biases):
            pieces = [
                torch.zeros(layer.base.out_features, dtype=first.dtype, device=first.device)
                if b is None
                else b
                for layer, b in zip(layers, biases, strict=True)
            ]
            self._bias = torch.cat([p.detach().float() for p in pieces])
        self._parts: list[_Part] = []
        rows = ranks = 0
        for layer in layers:
            n, r = layer.base.out_features, layer.a.shape[0]
            self._parts.append(_Part(layer, slice(rows, rows + n), slice(ranks, ranks + r)))
            rows, ranks = rows + n, ranks + r

    @property
    def mergeable(self) -> bool:
        """May sampling use merged weights? Only where the products are float32."""
        return not self.plain and self._weight.dtype == torch.float32

    @torch.no_grad()
    def merge(self) -> None:
        """Prepare sampling from the untouched base: a merged copy where products are float32, else the factors in the
        form that the products take."""
        if self.plain:
            return
        if not self.mergeable:
            self._split = self._factors()
            return
        merged = self.merged = torch.empty_like(self._weight) if self.merged is None else self.merged
        for part in self._parts:
            layer = part.layer
            torch.addmm(self._weight[part.out], layer.b, layer.a, alpha=layer.scale, out=merged[part.out])
        if self._norm is not None and self._dtype == torch.float32:
            width = merged.shape[1]
            merged *= self._norm.weight * width**0.5
            if self._floor is None:
                self._floor = merged.new_tensor((width * self._norm.eps) ** 0.5)

    def normed(self, x_NI: torch.Tensor) -> torch.Tensor:
        """The product of the normed input."""
        assert self._norm is not None
        if self._mode.kind == "merged" and self._floor is not None:
            # x / sqrt(|x|^2 + width eps); the rest of the norm is in the weights.
            length = torch.linalg.vector_norm(x_NI, dim=-1, keepdim=True)
            return self(x_NI / torch.hypot(length, self._floor))
        return self(rms_norm(x_NI, self._norm.weight, self._norm.eps))

    def __call__(self, x_NI: torch.Tensor, residual_NO: torch.Tensor | None = None) -> torch.Tensor:
        """(N, in) to (N, sum of outs), the layers' outputs side by side, plus ``residual_NO``."""
        kind = self._mode.kind
        if self.plain or self._mode.dropout:
            out = torch.cat([layer(x_NI) for layer in self._layers], dim=-1)
            return out if residual_NO is None else out + residual_NO
        if kind == "adapter" or (kind == "merged" and self.merged is None):
            if torch.is_grad_enabled():
                factors = [w for part in self._parts for w in (part.layer.a, part.layer.b)]
                made: Any = _Adapted.apply(x_NI, residual_NO, self, *factors)
                return made
            return self._adapted(x_NI, residual_NO)[0]
        weight = self.merged if kind == "merged" and self.merged is not None else self._weight  # else: "base"
        x = x_NI.to(weight.dtype)
        if x.dtype == torch.float32 and not torch.is_grad_enabled():
            out = few_rows(x, weight)
            if residual_NO is not None:
                out += residual_NO
            if self._bias is not None:
                out += self._bias
            return out.to(x_NI.dtype)
        if residual_NO is None:
            out = F.linear(x, weight, None if self._bias is None else self._bias.to(weight.dtype))
            return out.to(x_NI.dtype)
        out = torch.addmm(residual_NO.to(weight.dtype), x, weight.T)
        if self._bias is not None:
            out += self._bias
        return out.to(x_NI.dtype)

    def _adapted(
        self, x_NI: torch.Tensor, residual_NO: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The output, and A x of all layers side by side in float32."""
        if self._wide or self._dtype == torch.float32:
            x = x_NI.float()
            ax = x @ self._a.T
            out = (
                x @ self._weight.T
                if residual_NO is None
                else torch.addmm(residual_NO.float(), x, self._weight.T)
            )
            if self._bias is not None:
                out += self._bias
            for part in self._parts:
                out[:, part.out].addmm_(ax[:, part.rank], part.layer.b.T, alpha=part.layer.scale)
            return out.to(x_NI.dtype), ax
        delta, ax = self._delta(x_NI)
        # The adapter's product is the addend of the base product, so that the sum is rounded once. Nothing else joins it
        # there: beside a bias or a residual, which are on the coarser grid of bf16, a small update would be rounded away.
        out = torch.addmm(delta, x_NI, self._weight.T)
        if self._bias is not None:
            out += self._bias.to(out.dtype)
        if residual_NO is not None:
            out += residual_NO
        return out, ax

    def _delta(self, x_NI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The adapter's product (N, outs) and A x (N, ranks) in bf16."""
        prepared = self._split if self._mode.kind == "merged" else None
        a_both, b_high, b_low = prepared or self._factors()
        ax = (x_NI @ a_both.T).view(len(x_NI), 2, -1).sum(1)
        return torch.addmm(ax @ b_low.T, ax, b_high.T), ax

    @torch.no_grad()
    def _factors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A and scaled B of all layers for bf16 products. bf16 alone would round them, so each is split into two parts:
        A's (2 ranks, in) one below the other; B's (outs, ranks) twice, zero between layers."""
        b = torch.zeros(self._weight.shape[0], self._a.shape[0], device=self._a.device)
        for part in self._parts:
            torch.mul(part.layer.b, part.layer.scale, out=b[part.out, part.rank])
        return torch.cat(_halves(self._a)), *_halves(b)

    def _slope(
        self, grad_NO: torch.Tensor, x_NI: torch.Tensor, ax_NR: torch.Tensor, need_x: bool
    ) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
        """Gradients of the input and of every A and B, from the output's."""
        exact = self._wide or self._dtype == torch.float32
        grad = grad_NO.float() if exact else grad_NO
        x = x_NI.float() if exact else x_NI
        back = torch.empty(len(grad), self._a.shape[0], dtype=grad.dtype, device=grad.device)
        factors: list[torch.Tensor] = []
        for part in self._parts:
            layer, piece = part.layer, grad[:, part.out]
            torch.mul(piece @ layer.b.to(grad.dtype), layer.scale, out=back[:, part.rank])
            grad_b = _float_product(piece.T, ax_NR[:, part.rank]).mul_(layer.scale)
            factors += [torch.empty(0), grad_b]
        grad_a = _float_product(back.T, x)
        for i, part in enumerate(self._parts):
            factors[2 * i] = grad_a[part.rank]
        if not need_x:
            return None, factors
        grad_x = torch.addmm(grad @ self._weight, back, self._a.to(grad.dtype))
        return grad_x.to(x_NI.dtype), factors


def _halves(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two bf16 tensors whose sum is a float32 one to 16 bits."""
    high = x.to(torch.bfloat16)
    return high, (x - high.float()).to(torch.bfloat16)


def _float_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a b in float32."""
    if a.dtype != torch.float32 and a.device.type == "cuda":
        return torch.mm(a, b.to(a.dtype), out_dtype=torch.float32)
    return a.float() @ b.float()


def _joined(bases: Sequence[nn.Linear]) -> torch.Tensor:
    """The weights (outs, in) one below the other; with several, each layer's becomes a view of the result."""
    if len(bases) == 1:
        return bases[0].weight.detach()
    whole = torch.cat([base.weight.detach() for base in bases])
    row = 0
    for base in bases:
        rows = base.weight.shape[0]
        base.weight.data = whole[row : row + rows]
        row += rows
    return whole


def _joined_parameters(parameters: Sequence[nn.Parameter]) -> torch.Tensor:
    """The A matrices (ranks, in) one below the other; an update of one is an update of the result."""
    if len(parameters) == 1:
        return parameters[0].detach()
    whole = torch.cat([p.detach() for p in parameters])
    row = 0
    for p in parameters:
        rows = p.shape[0]
        p.data = whole[row : row + rows]
        row += rows
    return whole


class _Adapted(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_NI: torch.Tensor,
        residual_NO: torch.Tensor | None,
        fused: FusedLinear,
        *factors: torch.Tensor,
    ) -> torch.Tensor:
        out, ax = fused._adapted(x_NI, residual_NO)  # pyright: ignore[reportPrivateUsage]
        ctx.fused, ctx.residual = fused, residual_NO is not None
        ctx.save_for_backward(x_NI, ax)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        x, ax = ctx.saved_tensors
        grad_x, factors = ctx.fused._slope(grads[0], x, ax, ctx.needs_input_grad[0])
        return (grad_x, grads[0] if ctx.residual else None, None, *factors)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, computed in float32."""
    if torch.is_grad_enabled() and x.requires_grad:
        made: Any = _Norm.apply(x, weight, eps)
        return made
    return _normed(x, weight, eps)[0]


def _normed(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    wide = x.float()
    size = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    inverse = size.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (wide * inverse).mul_(weight).to(x.dtype), inverse


def _norm_slope(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, inverse: torch.Tensor
) -> torch.Tensor:
    wide = x.float()
    scaled = grad * weight
    along = (scaled * wide).sum(-1, keepdim=True).mul_(inverse).mul_(inverse).div_(-x.shape[-1])
    return torch.addcmul(scaled, wide, along).mul_(inverse).to(x.dtype)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        out, inverse = _normed(x, weight, eps)
        ctx.save_for_backward(x, weight, inverse)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        x, weight, inverse = ctx.saved_tensors
        return _norm_slope(grads[0].float(), x, weight, inverse), None, None


@dataclass(frozen=True, slots=True)
class Heads:
    """How a fused q, k, v product splits: ``queries`` + ``keys`` + ``keys`` heads of ``width``; ``weight_HD`` holds the
    norm of every query and key head, None for a model without."""

    queries: int
    keys: int
    width: int
    weight_HD: torch.Tensor | None
    eps: float


def split_heads(
    qkv_NO: torch.Tensor, cos_N1D: torch.Tensor, sin_N1D: torch.Tensor, heads: Heads
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries (N, H, D), keys and values (N, K, D): queries and keys normed per head and rotated by their positions
    (2104.09864, halves against each other). The first half of ``sin_N1D`` comes negated."""
    if torch.is_grad_enabled() and qkv_NO.requires_grad:
        made: Any = _Split.apply(qkv_NO, cos_N1D, sin_N1D, heads)
        return made
    return _split(qkv_NO, cos_N1D, sin_N1D, heads)[0]


def _split(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: Heads
) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor | None]:
    every = qkv.view(len(qkv), heads.queries + 2 * heads.keys, heads.width)
    turned, v = every[:, : -heads.keys], every[:, -heads.keys :]
    inverse = None
    if heads.weight_HD is not None:
        turned, inverse = _normed(turned, heads.weight_HD, heads.eps)
    turned = turned.float()
    qk = (turned * cos).addcmul_(turned.roll(heads.width // 2, -1), sin).to(qkv.dtype)
    return (qk[:, : heads.queries], qk[:, heads.queries :], v), inverse


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: Heads
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        out, inverse = _split(qkv, cos, sin, heads)
        ctx.heads = heads
        ctx.save_for_backward(None if inverse is None else qkv, cos, sin, inverse)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        qkv, cos, sin, inverse = ctx.saved_tensors
        heads: Heads = ctx.heads
        out = torch.empty(
            (len(grads[0]), heads.queries + 2 * heads.keys, heads.width),
            dtype=grads[0].dtype,
            device=grads[0].device,
        )
        out[:, -heads.keys :] = grads[2]
        grad = torch.cat((grads[0], grads[1]), dim=1).float()
        grad = (grad * cos).add_((grad * sin).roll(heads.width // 2, -1))
        if heads.weight_HD is not None:
            turned = qkv.view(out.shape)[:, : -heads.keys]
            grad = _norm_slope(grad, turned, heads.weight_HD, inverse)
        out[:, : -heads.keys] = grad
        return out.view(len(out), -1), None, None, None


def gated(both_NI: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up for gate and up side by side (N, 2 I): (N, I)."""
    if torch.is_grad_enabled() and both_NI.requires_grad:
        made: Any = _Gated.apply(both_NI)
        return made
    gate, up = both_NI.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, both: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(both)
        gate, up = both.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        (both,) = ctx.saved_tensors
        gate, up = both.chunk(2, dim=-1)
        width = gate.shape[-1]
        out = torch.empty_like(both)
        torch.mul(F.silu(gate), grads[0], out=out[:, width:])
        out[:, :width] = torch.ops.aten.silu_backward(grads[0] * up, gate)
        return out
