"""Singular values of ``B A`` and its best approximation of lower rank, through QR of both factors: the product itself,
which has the size of the base weight, is never formed. All in float64."""

# torch is only partly typed: what it returns is Any here.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from dataclasses import dataclass

import torch

_DEAD = 1e-12
"""Directions below this share of the largest singular value are rounding: float64 leaves about 1e-14."""


@dataclass(frozen=True, slots=True)
class Spectrum:
    """Singular values of ``B A`` without its scale, (rank,), falling, on the CPU; and the maps (rank, rank) that turn the
    factors into balanced ones: ``B @ into_b[:, :k]`` and ``into_a[:k] @ A``."""

    values_R: torch.Tensor
    into_b_RR: torch.Tensor
    into_a_RR: torch.Tensor


def spectrum(a_RI: torch.Tensor, b_OR: torch.Tensor) -> Spectrum:
    """The spectrum of ``B A`` for A (rank, in) and B (out, rank).

    With ``A^T = Q_A R_A`` and ``B = Q_B R_B`` the core ``R_B R_A^T = U S V^T`` has the singular values of the product. The
    balanced factors ``Q_B U sqrt(S)`` and ``sqrt(S) V^T Q_A^T`` are ``B R_A^T V / sqrt(S)`` and ``U^T R_B A / sqrt(S)``, so
    neither Q is needed; the error of their product stays that of float64, since each term's is its own share of it.
    """
    a, b = a_RI.double(), b_OR.double()
    rank = a.shape[0]
    r_a, r_b = torch.linalg.qr(a.T, mode="r").R, torch.linalg.qr(b, mode="r").R
    u, s, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    alive = s > _DEAD * s[:1]
    inverse = torch.where(alive, s, torch.ones_like(s)).rsqrt() * alive
    values, into_b, into_a = (
        torch.zeros(shape, dtype=torch.float64) for shape in ((rank,), (rank, rank), (rank, rank))
    )
    n = s.shape[0]  # less than the rank where a side of the matrix is shorter
    values[:n] = s.cpu()
    into_b[:, :n] = ((r_a.T @ vh.T) * inverse).cpu()
    into_a[:n] = ((u.T @ r_b) * inverse[:, None]).cpu()
    return Spectrum(values, into_b, into_a)


def truncated(
    a_RI: torch.Tensor, b_OR: torch.Tensor, found: Spectrum, rank: int, factor: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """A' (rank, in) and B' (out, rank) whose product is ``factor`` times the best approximation of ``B A`` of that rank.

    A direction that the adapter does not use begins as LoRA does: a row of A beside a zero column of B, which adds nothing
    and can still learn. ``rank`` may exceed the factors': the further directions are such ones.
    """
    device, root = a_RI.device, factor**0.5
    a, b = a_RI.double(), b_OR.double()
    held = min(rank, a.shape[0])
    new_b = torch.zeros(b.shape[0], rank, dtype=torch.float64, device=device)
    new_b[:, :held] = (b @ found.into_b_RR[:, :held].to(device)) * root
    new_a = torch.empty(rank, a.shape[1], dtype=torch.float64, device=device)
    new_a[:held] = (found.into_a_RR[:held].to(device) @ a) * root
    alive = found.values_R > _DEAD * found.values_R[:1]
    for i in range(rank):
        if i >= held or not alive[i]:
            new_a[i] = a[i % a.shape[0]]
    return new_a, new_b


def retained(values_R: torch.Tensor) -> torch.Tensor:
    """(rank,): share of the sum of squared singular values in the first k, for k from 1; 1 where the sum is 0."""
    squares = values_R.square()
    total = squares.sum()
    if total == 0:
        return torch.ones_like(squares)
    found = squares.cumsum(0) / total
    found[-1] = 1.0
    return found.clamp_max(1.0)


def effective_rank(values_R: torch.Tensor) -> float:
    """Exponential of the entropy of the normalised singular values (Roy and Vetterli, EUSIPCO 2007): from 1 to the rank,
    0 for a zero update."""
    total = values_R.sum()
    if total == 0:
        return 0.0
    p = values_R / total
    return float(torch.special.entr(p).sum().exp())
