"""Causal attention over flat token axes: what a model's layers call, and the one product underneath.

A forward pass here has one axis of tokens and no padding; which token sees which is the business of the ``Attend`` that
goes with it: a cache in the sampler, rows that share a prompt in the learner, one plain sequence below.
"""

# torch is only partly typed: what it returns is Any here.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F


class Attend(Protocol):
    """One layer's attention for all tokens of a forward pass."""

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
        """Outputs (N, H, D) of ``H`` query heads over ``K`` key heads, in the dtype of ``q_NHD``.

        Queries and keys come rotated. ``layer`` counts from 0 and is called once per pass (again where activations are
        recomputed). With ``window`` a token sees itself and the ``window - 1`` before it, None: all before it.
        """
        ...


def attention(
    q_BHTD: torch.Tensor,
    k_BKSD: torch.Tensor,
    v_BKSD: torch.Tensor,
    *,
    scale: float,
    causal: bool = False,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(scale q k^T) v, (B, H, T, D): ``causal`` for T = S, or ``mask`` (bool, True = sees, broadcastable to
    (B, H, T, S); with T = 1 it has one head), or neither, where everything is seen.

    H is a multiple of K. On the CPU bf16 is computed in float32 and rounded once: its own kernel is several times slower.
    """
    dtype = q_BHTD.dtype
    if dtype != torch.float32 and q_BHTD.device.type == "cpu":
        q_BHTD, k_BKSD, v_BKSD = q_BHTD.float(), k_BKSD.float(), v_BKSD.float()
    batch, heads, length, width = q_BHTD.shape
    groups = k_BKSD.shape[1]
    if length == 1 and heads != groups:
        # One query per head: the heads of a group are rows of one product, so no key is read twice.
        q_BHTD = q_BHTD.reshape(batch, groups, heads // groups, width)
        out = F.scaled_dot_product_attention(q_BHTD, k_BKSD, v_BKSD, attn_mask=mask, scale=scale)
        return out.reshape(batch, heads, 1, width).to(dtype)
    return F.scaled_dot_product_attention(
        q_BHTD, k_BKSD, v_BKSD, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=heads != groups
    ).to(dtype)


def band(length: int, window: int, device: torch.device) -> torch.Tensor:
    """(length, length) bool: a token sees itself and the ``window - 1`` before it."""
    at = torch.arange(length, device=device)
    back = at[:, None] - at[None, :]
    return (back >= 0) & (back < window)


def one_sequence(
    layer: int,
    q_NHD: torch.Tensor,
    k_NKD: torch.Tensor,
    v_NKD: torch.Tensor,
    *,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """``Attend`` for a pass whose tokens are one plain sequence."""
    del layer
    mask = band(len(q_NHD), window, q_NHD.device) if window and window < len(q_NHD) else None
    q, k, v = (x.transpose(0, 1)[None] for x in (q_NHD, k_NKD, v_NKD))
    return attention(q, k, v, scale=scale, causal=mask is None, mask=mask)[0].transpose(0, 1)
