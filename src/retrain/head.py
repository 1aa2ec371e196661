"""The frozen output projection: logits, and logprobs and entropies of chosen positions with their slopes, in chunks."""

# torch is only partly typed: what it returns is Any here.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from typing import Any

import torch
from torch import nn


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


class SelectedLogprobs(torch.autograd.Function):
    """Logprobs of chosen tokens, and on demand the entropies of their distributions, from final hidden states, in chunks.

    The head is frozen, so with p the distribution at the temperature, d logprob / d hidden = (W[target] - p W) /
    temperature and d entropy / d hidden = - (p (log p + entropy)) W / temperature are computed together with the values
    and stored instead of the logits: no (tokens, vocabulary) tensor outlives its chunk.
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
        values = torch.empty(count, dtype=torch.float32, device=device)
        entropies = torch.empty(count if entropy else 0, dtype=torch.float32, device=device)
        slopes = torch.empty_like(hidden_NH) if ctx.needs_input_grad[0] else None
        bends = torch.empty_like(hidden_NH) if ctx.needs_input_grad[0] and entropy else None
        for start in range(0, count, chunk):
            part = slice(start, start + chunk)
            targets = targets_N[part]
            logprobs = torch.log_softmax(head.logits(hidden_NH[part]) / temperature, dim=-1)
            values[part] = logprobs.gather(1, targets[:, None]).squeeze(1)
            if entropy:
                # A token of probability 0 adds nothing; 0 * -inf would add NaN.
                logprobs.clamp_min_(-1e4)
                mass = logprobs.exp()
                entropies[part] = -(mass * logprobs).sum(-1)
                if bends is not None:
                    logprobs.add_(entropies[part][:, None]).mul_(mass).neg_()
                    bends[part] = head.transposed(logprobs / temperature).to(bends.dtype)
            else:
                mass = logprobs.exp_()
            if slopes is not None:
                delta = mass.neg_()
                delta[torch.arange(len(targets), device=device), targets] += 1.0
                slopes[part] = head.transposed(delta / temperature).to(slopes.dtype)
        ctx.slopes, ctx.bends = slopes, bends
        return values, entropies

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None, None]:
        slopes: torch.Tensor = ctx.slopes
        out = grads[0][:, None].to(slopes.dtype) * slopes
        if ctx.bends is not None:
            out = out + grads[1][:, None].to(slopes.dtype) * ctx.bends
        return out, None, None, None, None, None
