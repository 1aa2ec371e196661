"""The sampling kernel: one token a row by inverse CDF, with its exact logprob and entropy, in few passes.

The vocabulary is cut into blocks: exponentials once, the mass of every block, a running sum over the blocks,
and a second running sum inside the one block that was picked. Leaves out: the product that makes the logits.
"""

# torch is only partly typed: what it returns is Any here.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

_BLOCK = 512
"""Tokens a block."""
_WIDE = 16_384
"""From this vocabulary on the CPU goes row by row: a row stays in its cache from the first pass to the last."""
_LEAST = 1e-18
"""The least target. Uniforms come in steps of 2**-53 (1.1e-16), so this moves only an exact 0, and it moves it
past tokens whose mass a float32 can hardly hold."""
_MOST = 1 - 2.0**-53
_UNITS = 2.0**52


@dataclass(frozen=True, slots=True)
class Drawn:
    """One drawn token a row: ids (int64), logprobs (float32, nats), entropies (float32, nats; None unless asked)."""

    ids_B: torch.Tensor
    logprobs_B: torch.Tensor
    entropies_B: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class _Masses:
    """What the passes over all logits leave. With x = (logit - peak) / temperature: the sum of e^x in each block
    (in each token, where there is one block), the sum of x e^x, and x itself or the way to it."""

    blocks_BK: torch.Tensor
    heat_B: torch.Tensor | None
    logits_BV: torch.Tensor
    peak_B1: torch.Tensor | None  # None: the logits hold x already
    temperature: torch.Tensor | float

    def at(self, ids_BN: torch.Tensor) -> torch.Tensor:
        """x of some ids."""
        x_BN = self.logits_BV.gather(1, ids_BN)
        return x_BN if self.peak_B1 is None else _tempered(x_BN - self.peak_B1, self.temperature)


def draw(
    logits_BV: torch.Tensor,
    temperature_B: torch.Tensor | float,
    top_p_B: torch.Tensor | None,
    uniform_B: torch.Tensor,
    entropy: bool,
) -> Drawn:
    """Draw one token per row of float32 logits (which may be overwritten) by inverse CDF in the order of ids.

    ``temperature_B`` is above 0, one for all rows when a float. ``top_p_B`` in (0, 1] keeps the smallest set of
    most likely tokens whose mass reaches it (of equals the lower id first); None truncates nowhere. Logprob and
    entropy describe the tempered distribution before that cut. ``uniform_B`` is float64 in [0, 1). A row's
    result does not depend on the other rows. A row with NaN or without a finite logit has a NaN logprob.
    """
    vocabulary = logits_BV.shape[1]
    by_rows = logits_BV.device.type == "cpu" and vocabulary >= _WIDE
    masses = (_by_rows if by_rows else _at_once)(logits_BV, temperature_B, entropy)
    running_BK, total_B1 = _running(masses.blocks_BK)
    uniform_B1 = uniform_B[:, None]
    ids_B1, inside_B1 = _pick(running_BK, uniform_B1)
    if vocabulary > _BLOCK:
        token_BN = ids_B1 * _BLOCK + torch.arange(_BLOCK, device=ids_B1.device)
        mass_BN = masses.at(token_BN.clamp_max(vocabulary - 1)).exp_()
        if vocabulary % _BLOCK:
            mass_BN.masked_fill_(token_BN >= vocabulary, 0.0)
        ids_B1 = ids_B1 * _BLOCK + _pick(_running(mass_BN)[0], inside_B1)[0]
    if top_p_B is not None:
        ids_B1 = (_truncated_by_rows if by_rows else _truncated_at_once)(
            masses, total_B1, top_p_B, uniform_B1, ids_B1
        )
    # Only a row of NaN points past the end.
    ids_B1 = ids_B1.clamp_max_(vocabulary - 1)
    log_total_B1 = total_B1.log()
    logprobs_B = (masses.at(ids_B1) - log_total_B1).squeeze(1).float()
    if masses.heat_B is None:
        return Drawn(ids_B1.squeeze(1), logprobs_B, None)
    # x is never above 0, so both terms are at least 0 and nothing cancels.
    entropies_B = log_total_B1.squeeze(1) - masses.heat_B / total_B1.squeeze(1)
    return Drawn(ids_B1.squeeze(1), logprobs_B, entropies_B.float())


def _tempered(x: torch.Tensor, temperature: torch.Tensor | float) -> torch.Tensor:
    if isinstance(temperature, torch.Tensor):
        return x.div_(temperature[:, None])
    return x if temperature == 1.0 else x.div_(temperature)


def _at_once(logits_BV: torch.Tensor, temperature: torch.Tensor | float, entropy: bool) -> _Masses:
    """Every pass over all rows: few calls."""
    rows, vocabulary = logits_BV.shape
    x_BV = _tempered(logits_BV.sub_(logits_BV.amax(1, keepdim=True)), temperature)
    count = -(-vocabulary // _BLOCK)
    if count == 1:
        mass_BV = blocks_BK = x_BV.exp()
    else:
        padded = x_BV.new_empty(rows, count * _BLOCK)
        padded[:, vocabulary:] = 0
        mass_BV = torch.exp(x_BV, out=padded[:, :vocabulary])
        blocks_BK = padded.view(rows, count, _BLOCK).sum(2)
    # e^-200 is 0 in float32; 0 * -inf would add NaN.
    heat_B = (mass_BV * x_BV.clamp_min(-200.0)).sum(1) if entropy else None
    return _Masses(blocks_BK, heat_B, x_BV, None, 1.0)


def _by_rows(logits_BV: torch.Tensor, temperature: torch.Tensor | float, entropy: bool) -> _Masses:
    """Pass after pass over one row, on two scratch rows that never leave the cache."""
    rows, vocabulary = logits_BV.shape
    count = -(-vocabulary // _BLOCK)
    x_V = logits_BV.new_empty(vocabulary)
    mass_KN = logits_BV.new_zeros(count, _BLOCK)
    mass_V = mass_KN.view(-1)[:vocabulary]
    blocks_BK = logits_BV.new_empty(rows, count)
    peak_B = logits_BV.new_empty(rows)
    heat_B = logits_BV.new_empty(rows) if entropy else None
    each = temperature.tolist() if isinstance(temperature, torch.Tensor) else [temperature] * rows
    heats = heat_B.unbind() if heat_B is not None else [None] * rows
    for row_V, peak, blocks_K, heat, warmth in zip(logits_BV, peak_B, blocks_BK, heats, each, strict=True):
        torch.amax(row_V, 0, out=peak)
        torch.sub(row_V, peak, out=x_V)
        if warmth != 1.0:
            x_V.div_(warmth)
        torch.exp(x_V, out=mass_V)
        torch.sum(mass_KN, 1, out=blocks_K)
        if heat is not None:
            torch.dot(mass_V, x_V, out=heat)
    if heat_B is not None and bool(heat_B.isnan().any()):
        # Somewhere 0 * -inf: rare enough to pay for it only then.
        for i in heat_B.isnan().nonzero().squeeze(1).tolist():
            torch.sub(logits_BV[i], peak_B[i], out=x_V).div_(each[i])
            heat_B[i] = torch.dot(x_V.exp(), x_V.clamp_min(-200.0))
    return _Masses(blocks_BK, heat_B, logits_BV, peak_B[:, None], temperature)


def _running(mass_BN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Running sums (float64, rising, in any unit) and the total of each row."""
    if mass_BN.device.type == "cpu":
        running_BN = mass_BN.cumsum(1, dtype=torch.float64)
        return running_BN, running_BN[:, -1:]
    # CUDA has no deterministic running sum of floats; whole numbers add up exactly in any order.
    mass_BN = mass_BN.double()
    total_B1 = mass_BN.sum(1, keepdim=True)
    return (mass_BN / total_B1 * _UNITS).long().cumsum(1).double(), total_B1


def _pick(running_BN: torch.Tensor, uniform_B1: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first entry whose running sum is above the uniform's share, and where in it the share falls, in [0, 1).

    An entry without mass is never first above anything; a uniform below 1 times the last sum stays below it.
    """
    target_B1 = (uniform_B1 * running_BN[:, -1:]).clamp_min_(_LEAST)
    pick_B1 = torch.searchsorted(running_BN, target_B1, right=True)
    last = running_BN.shape[1] - 1
    after_B1 = running_BN.gather(1, pick_B1.clamp_max(last))
    before_B1 = running_BN.gather(1, (pick_B1 - 1).clamp_(0, last)).masked_fill_(pick_B1 == 0, 0.0)
    return pick_B1, ((target_B1 - before_B1) / (after_B1 - before_B1)).clamp_(0.0, _MOST)


def _truncated_at_once(
    masses: _Masses,
    total_B1: torch.Tensor,
    top_p_B: torch.Tensor,
    uniform_B1: torch.Tensor,
    ids_B1: torch.Tensor,
) -> torch.Tensor:
    """New ids for the rows whose top_p is below 1: sorts every row."""
    mass_BV = masses.logits_BV.exp()
    ordered_BV, order_BV = mass_BV.sort(dim=1, descending=True, stable=True)
    running_BV, _ = _running(ordered_BV)
    reached_B1 = top_p_B[:, None].double() * running_BV[:, -1:]
    number_B1 = torch.searchsorted(running_BV, reached_B1)
    rank_V = torch.arange(mass_BV.shape[1], device=mass_BV.device)
    kept_BV = torch.zeros_like(mass_BV).scatter_(1, order_BV, ordered_BV * (rank_V <= number_B1))
    new_B1, _ = _pick(_running(kept_BV)[0], uniform_B1)
    return torch.where(top_p_B[:, None] < 1, new_B1, ids_B1)


def _truncated_by_rows(
    masses: _Masses,
    total_B1: torch.Tensor,
    top_p_B: torch.Tensor,
    uniform_B1: torch.Tensor,
    ids_B1: torch.Tensor,
) -> torch.Tensor:
    """New ids for the rows whose top_p is below 1: sorts only tokens that may be kept."""
    assert masses.peak_B1 is not None
    vocabulary = masses.logits_BV.shape[1]
    totals, shares = total_B1.squeeze(1).tolist(), top_p_B.tolist()
    for i, (total, share) in enumerate(zip(totals, shares, strict=True)):
        if not share < 1 or math.isnan(total):
            continue
        row = slice(i, i + 1)
        warmth = (
            masses.temperature[row] if isinstance(masses.temperature, torch.Tensor) else masses.temperature
        )
        x_V = _tempered(masses.logits_BV[row] - masses.peak_B1[row], warmth).squeeze(0)
        # Were everything below this left out, it would be less than 1 - top_p: no kept token is there.
        floor = math.log((1 - share) * total / vocabulary) - 1e-3
        token_N = (x_V >= floor).nonzero().squeeze(1)
        mass_N = x_V[token_N].exp_()
        ordered_N, order_N = mass_N.sort(descending=True, stable=True)
        running_N = ordered_N.cumsum(0, dtype=torch.float64)
        number = int(torch.searchsorted(running_N, share * total)) + 1
        kept_N = order_N[:number].sort().values
        running_BN, _ = _running(mass_N[kept_N][None])
        ids_B1[i] = token_N[kept_N[_pick(running_BN, uniform_B1[row])[0].squeeze()]]
    return ids_B1
