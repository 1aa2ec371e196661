"""The frozen output projection: logits, and logprobs and entropies of chosen positions with their slopes, in tiles."""

# torch is only partly typed: what it returns is Any here.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

_WIDE = 1 << 20
"""Entries of a head from which the CPU's product with few rows is worth a form of its own."""
_FEW = range(5, 49)
"""Numbers of rows for which the CPU's plain product x W^T is far from its peak."""


def few_rows(x_NI: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
    """x W^T without gradient; on the CPU the other way round at few rows, where that is up to twice as fast."""
    if x_NI.device.type == "cpu" and len(x_NI) in _FEW:
        return torch.mm(weight_OI, x_NI.T).T.contiguous()
    return torch.mm(x_NI, weight_OI.T)


class FewRows:
    """x W^T of few rows and a frozen float32 weight on the CPU, for many calls: at the CPU's peak where PyTorch has MKL's
    packed products, for the price of a second copy of the weight, else by ``few_rows``."""

    def __init__(self, weight_OI: torch.Tensor) -> None:
        self._weight = weight_OI
        self._packed: torch.Tensor | None = None
        self._rows = 0
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        self._packs = hasattr(torch.ops.mkl, "_mkl_linear") and 4 * weight_OI.numel() <= pages // 20

    def __call__(self, x_NI: torch.Tensor) -> torch.Tensor:
        """(N, in) to (N, out)."""
        count, mkl = len(x_NI), torch.ops.mkl
        if not self._packs or count not in _FEW:
            return few_rows(x_NI, self._weight)
        if count > self._rows:
            # Packed once for the most rows seen: fewer are filled up, which costs less than packing again.
            self._rows = -(-count // 8) * 8
            packed = self._packed = mkl._mkl_reorder_linear_weight(self._weight, self._rows)
            got = mkl._mkl_linear(
                F.pad(x_NI, (0, 0, 0, self._rows - count)), packed, self._weight, None, self._rows
            )
            # Not a documented operation of PyTorch: trusted only as far as it computes the same.
            if not torch.allclose(got[:count], few_rows(x_NI, self._weight), rtol=1e-3, atol=1e-3):
                self._packs, self._packed = False, None
                return few_rows(x_NI, self._weight)
            return got[:count]
        filled = x_NI if count == self._rows else F.pad(x_NI, (0, 0, 0, self._rows - count))
        out: torch.Tensor = mkl._mkl_linear(filled, self._packed, self._weight, None, self._rows)
        return out[:count]


class Head:
    """The frozen output projection. Logits come out in float32: rounding them to bf16 would add noise of
    1/256 of their size to every logprob."""

    def __init__(self, layer: nn.Module) -> None:
        self.weight: torch.Tensor = layer.weight  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
        self.bias: torch.Tensor | None = getattr(layer, "bias", None)
        # The CPU has no bf16 product with a float32 result; a float32 copy of the head is the exact stand-in.
        cpu_bf16 = self.weight.device.type == "cpu" and self.weight.dtype != torch.float32
        self._dense = self.weight.detach().float() if cpu_bf16 else self.weight.detach()
        wide = self._dense.device.type == "cpu" and self._dense.numel() >= _WIDE
        self._few = FewRows(self._dense) if wide else None

    def logits(self, hidden_NH: torch.Tensor) -> torch.Tensor:
        """(N, H) hidden states to (N, vocabulary) float32 logits; takes no gradient."""
        with torch.no_grad():
            if self._few is not None:
                out = self._few(hidden_NH.float())
            elif self._dense.dtype == torch.float32:
                out = hidden_NH.float() @ self._dense.T
            else:
                out = torch.mm(hidden_NH, self._dense.T, out_dtype=torch.float32)
            return out if self.bias is None else out + self.bias.float()

    def tile(
        self, hidden_NH: torch.Tensor, first: int, last: int, temperature: float, out: torch.Tensor | None
    ) -> torch.Tensor:
        """Float32 logits (N, last - first) of a range of the vocabulary, over the temperature; into ``out`` where hidden
        states come in float32, which then carry the temperature already."""
        weight = self._dense[first:last]
        if out is not None:
            torch.mm(hidden_NH, weight.T, out=out)
        else:
            out = torch.mm(hidden_NH, weight.T, out_dtype=torch.float32).div_(temperature)
        if self.bias is not None:
            out.add_(self.bias[first:last].float(), alpha=1.0 / temperature)
        return out

    def add_transposed(self, into_NH: torch.Tensor, mass_NV: torch.Tensor, first: int, last: int) -> None:
        """Add (N, last - first) times that range of the weight to float32 (N, H)."""
        weight = self._dense[first:last]
        if weight.dtype == torch.float32:
            into_NH.addmm_(mass_NV, weight)
        else:
            into_NH.add_(torch.mm(mass_NV.to(weight.dtype), weight, out_dtype=torch.float32))

    def rows(self, tokens_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | float]:
        """Weight rows (N, H) in float32 of some tokens, and their biases (N,)."""
        bias = 0.0 if self.bias is None else self.bias.index_select(0, tokens_N).float()
        return self._dense.index_select(0, tokens_N).float(), bias

    @property
    def dense(self) -> torch.Tensor:
        """The weight (vocabulary, H) that the products run on."""
        return self._dense


_TILE = {"cpu": (1 << 19, 1024), "cuda": (1 << 25, 4096)}
"""Logits of one tile and its most positions. On the CPU a tile stays in a core's second cache between its product, its
exponentials and the product with the weight; on CUDA it is large enough that launches do not count."""

_RISE = 8.0
"""Nats that a later tile's largest logit may exceed the reference of its row by before the sums are rescaled."""


class SelectedLogprobs(torch.autograd.Function):
    """Logprobs of chosen tokens, and on demand the entropies of their distributions, from final hidden states, in tiles.

    The head is frozen, so with p the distribution at the temperature, d logprob / d hidden = (W[target] - p W) /
    temperature and d entropy / d hidden = - (p (log p + entropy)) W / temperature are computed together with the values
    and stored instead of the logits. One pass over the vocabulary keeps per position a reference, the sum of exponentials
    above it and their product with W (the online softmax of 1805.02867), so a logit lives as long as its tile.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: torch.Tensor,
        head: Head,
        targets_N: torch.Tensor,
        temperature: float,
        chunk: int,
        entropy: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        count, device = len(targets_N), hidden_NH.device
        graded = bool(ctx.needs_input_grad[0])
        values = torch.empty(count, dtype=torch.float32, device=device)
        entropies = torch.empty(count if entropy else 0, dtype=torch.float32, device=device)
        slopes = torch.empty_like(hidden_NH) if graded else None
        bends = torch.empty_like(hidden_NH) if graded and entropy else None
        size, most = _TILE.get(device.type, _TILE["cuda"])
        chunk = max(1, min(chunk, most, count))
        for start in range(0, count, chunk):
            part = slice(start, min(start + chunk, count))
            sums = _Sums(head, hidden_NH[part], temperature, size, graded, entropy)
            at, bias = head.rows(targets_N[part])
            # A product of its own, rounded otherwise than the tiles': at a share of 1 it may exceed them by an ulp.
            own = (sums.hidden.float() * at).sum(1)
            if not sums.scaled:
                own = own / temperature
            values[part] = (own + bias / temperature - sums.lse).clamp_max_(0.0)
            if entropy:
                entropies[part] = sums.entropy
            if slopes is not None:
                slopes[part] = at.sub_(sums.mean()).div_(temperature)
            if bends is not None:
                bends[part] = sums.bend().div_(temperature)
        ctx.slopes, ctx.bends = slopes, bends
        return values, entropies

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None, None]:
        slopes: torch.Tensor = ctx.slopes
        out = grads[0][:, None].to(slopes.dtype) * slopes
        if ctx.bends is not None:
            out.addcmul_(grads[1][:, None].to(slopes.dtype), ctx.bends)
        return out, None, None, None, None, None


class _Sums:
    """One pass over the vocabulary for some positions: with y = logit / temperature - reference, the sums of e^y and of
    e^y y (N,), and with ``graded`` of e^y W and e^y y W (N, H), all float32."""

    def __init__(
        self, head: Head, hidden_NH: torch.Tensor, temperature: float, size: int, graded: bool, entropy: bool
    ) -> None:
        weight = head.dense
        rows, vocabulary = len(hidden_NH), len(weight)
        self.scaled = weight.dtype == torch.float32
        # Where hidden states are float32 anyway they carry the temperature: one pass less over every tile.
        self.hidden = hidden_NH.float() / temperature if self.scaled else hidden_NH
        width = min(vocabulary, max(64, size // rows // 64 * 64))
        float32: dict[str, Any] = {"dtype": torch.float32, "device": hidden_NH.device}
        logits = torch.empty(rows * width, **float32) if self.scaled else None
        mass = torch.empty(rows * width, **float32) if entropy else None
        cpu = hidden_NH.device.type == "cpu"
        self._reference = torch.zeros(rows, 1, **float32)
        self._sum = torch.zeros(rows, 1, **float32)
        self._moment = torch.zeros(rows, 1, **float32) if entropy else None
        self._product = torch.zeros(rows, weight.shape[1], **float32) if graded else None
        self._bent = torch.zeros_like(self._product) if self._product is not None and entropy else None
        for first in range(0, vocabulary, width):
            last = min(first + width, vocabulary)
            shape = (rows, last - first)
            buffer = None if logits is None else logits[: shape[0] * shape[1]].view(shape)
            tile = head.tile(self.hidden, first, last, temperature, buffer)
            top = tile.amax(1, keepdim=True)
            if not first:
                self._reference = top
            elif not cpu or bool((top > self._reference + _RISE).any()):
                self._raise_to(torch.maximum(top, self._reference))
            tile.sub_(self._reference)
            if mass is None or self._moment is None:
                share = tile.exp_()
            else:
                # A token of probability 0 adds nothing; 0 * -inf would add NaN.
                tile.clamp_min_(-1e4)
                share = torch.exp(tile, out=mass[: shape[0] * shape[1]].view(shape))
                tile.mul_(share)
                self._moment += tile.sum(1, keepdim=True)
                if self._bent is not None:
                    head.add_transposed(self._bent, tile, first, last)
            self._sum += share.sum(1, keepdim=True)
            if self._product is not None:
                head.add_transposed(self._product, share, first, last)

    def _raise_to(self, reference: torch.Tensor) -> None:
        rise = reference - self._reference
        factor = torch.exp(-rise)
        for moment, mass in ((self._moment, self._sum), (self._bent, self._product)):
            if moment is not None and mass is not None:
                moment.addcmul_(mass, rise, value=-1).mul_(factor)
        self._sum.mul_(factor)
        if self._product is not None:
            self._product.mul_(factor)
        self._reference = reference

    @property
    def lse(self) -> torch.Tensor:
        """log of the sum of exponentials (N,)."""
        return (self._reference + self._sum.log()).squeeze(1)

    @property
    def entropy(self) -> torch.Tensor:
        """Entropies (N,) in nats."""
        assert self._moment is not None
        return (self._sum.log() - self._moment / self._sum).squeeze(1)

    def mean(self) -> torch.Tensor:
        """p W (N, H)."""
        assert self._product is not None
        return self._product / self._sum

    def bend(self) -> torch.Tensor:
        """- (p (log p + entropy)) W (N, H): minus the covariance of y and W under p."""
        assert self._moment is not None
        assert self._product is not None
        assert self._bent is not None
        mean = self._moment / self._sum
        return self._product.mul(mean).sub_(self._bent).div_(self._sum)
