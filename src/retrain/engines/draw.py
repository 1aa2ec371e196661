"""The sampling kernel: one token a row by inverse CDF, with its exact logprob and entropy, in few passes.

The vocabulary is cut into blocks: exponentials once, the mass of every block, a running sum over the blocks,
and a second running sum inside the one block that was picked.
"""

# torch is only partly typed: what it returns is Any here.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

_BLOCK = 512
"""Tokens a block."""
_NARROW = 1024
"""Up to this vocabulary every token is its own block: the second level's calls would cost more than it saves."""
_WIDE = 16_384
"""From this vocabulary the CPU goes row by row: a row stays in its cache from the first pass to the last."""
_LEAST, _MOST = 1e-18, 1 - 2.0**-53
"""Bounds of a uniform. Uniforms come in steps of 2**-53 (1.1e-16), so the lower one moves only an exact 0, past
tokens whose mass a float32 cannot hold."""
_UNITS = 2.0**52
_SLACK = 2.0**-20
"""Relative rounding within which a mass has reached top_p: half of four equal tokens is two tokens."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """One drawn token a row: ids (int64), logprobs (float32, nats), entropies (float32, nats; None unless asked)."""

    ids_B: torch.Tensor
    logprobs_B: torch.Tensor
    entropies_B: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class _Table:
    """What the passes over all logits leave: the mass of each block, the entropies, the way to any logprob."""

    blocks_BK: torch.Tensor
    """In any unit."""
    entropies_B: torch.Tensor | None
    logits_BV: torch.Tensor
    """Logprobs already where ``frame`` is None."""
    temperature: torch.Tensor | float
    frame: tuple[torch.Tensor, torch.Tensor] | None
    """Peak and log total, (B, 1) each: a logprob is (logit - peak) / temperature - log total."""

    def logprobs(self, ids_BN: torch.Tensor) -> torch.Tensor:
        """Logprobs (float32 or float64) of some ids of each row."""
        found_BN = self.logits_BV.gather(1, ids_BN)
        if self.frame is None:
            return found_BN
        peak_B1, log_total_B1 = self.frame
        return _warmed(found_BN - peak_B1, self.temperature) - log_total_B1

    def row(self, i: int) -> _Table:
        """The table of one row."""
        own, warmth, frame = slice(i, i + 1), self.temperature, self.frame
        return _Table(
            self.blocks_BK[own],
            None,
            self.logits_BV[own],
            warmth[own] if isinstance(warmth, torch.Tensor) else warmth,
            None if frame is None else (frame[0][own], frame[1][own]),
        )


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
    On CUDA nothing waits for the device.
    """
    vocabulary = logits_BV.shape[1]
    by_rows = logits_BV.device.type == "cpu" and vocabulary >= _WIDE
    table = (_by_rows if by_rows else _at_once)(logits_BV, temperature_B, entropy)
    return _finish(table, top_p_B, uniform_B, by_rows)


def _finish(table: _Table, top_p_B: torch.Tensor | None, uniform_B: torch.Tensor, by_rows: bool) -> Drawn:
    vocabulary = table.logits_BV.shape[1]
    uniform_B1 = uniform_B.unsqueeze(1).clamp_min(_LEAST)
    ids_B1 = (_one_level if vocabulary <= _NARROW else _two_levels)(table, uniform_B1)
    if top_p_B is not None:
        ids_B1 = (_truncated_by_rows if by_rows else _truncated)(table, top_p_B, uniform_B1, ids_B1)
    # Only a row of NaN points past the end.
    ids_B1 = ids_B1.clamp_max_(vocabulary - 1)
    return Drawn(ids_B1.squeeze(1), table.logprobs(ids_B1).squeeze(1).float(), table.entropies_B)


def _warmed(x: torch.Tensor, temperature: torch.Tensor | float) -> torch.Tensor:
    if isinstance(temperature, torch.Tensor):
        return x.div_(temperature.unsqueeze(1))
    return x if temperature == 1.0 else x.div_(temperature)


def _at_once(logits_BV: torch.Tensor, temperature: torch.Tensor | float, entropy: bool) -> _Table:
    """Every pass over all rows: few calls."""
    rows, vocabulary = logits_BV.shape
    logprobs_BV = torch.log_softmax(_warmed(logits_BV, temperature), 1)
    if vocabulary <= _NARROW:
        mass_BV = logprobs_BV.exp()
        blocks_BK = mass_BV.double()
    else:
        count = -(-vocabulary // _BLOCK)
        padded = logprobs_BV.new_empty(rows, count * _BLOCK)
        padded[:, vocabulary:] = 0
        mass_BV = padded[:, :vocabulary].copy_(logprobs_BV).exp_()
        blocks_BK = padded.view(rows, count, _BLOCK).sum(2).double()
    # A token of probability 0 adds nothing; 0 * -inf is NaN and is passed over.
    entropies_B = mass_BV.mul_(logprobs_BV).nansum(1).neg_() if entropy else None
    return _Table(blocks_BK, entropies_B, logprobs_BV, 1.0, None)


def _by_rows(logits_BV: torch.Tensor, temperature: torch.Tensor | float, entropy: bool) -> _Table:
    """Pass after pass over one row, on two scratch rows that never leave the cache."""
    rows, vocabulary = logits_BV.shape
    count = -(-vocabulary // _BLOCK)
    x_V = logits_BV.new_empty(vocabulary)
    mass_KN = logits_BV.new_zeros(count, _BLOCK)
    mass_V = mass_KN.view(-1)[:vocabulary]
    blocks_BK, peak_B = logits_BV.new_empty(rows, count), logits_BV.new_empty(rows)
    heat_B = logits_BV.new_empty(rows) if entropy else None
    each = temperature.tolist() if isinstance(temperature, torch.Tensor) else [temperature] * rows
    heats = [None] * rows if heat_B is None else heat_B.unbind()
    for row_V, peak, blocks_K, heat, warmth in zip(logits_BV, peak_B, blocks_BK, heats, each, strict=True):
        torch.amax(row_V, 0, out=peak)
        torch.sub(row_V, peak, out=x_V)
        if warmth != 1.0:
            x_V.div_(warmth)
        torch.exp(x_V, out=mass_V)
        torch.sum(mass_KN, 1, out=blocks_K)
        if heat is not None:
            torch.dot(mass_V, x_V, out=heat)
    total_B = blocks_BK.sum(1, dtype=torch.float64)
    log_total_B, entropies_B = total_B.log(), None
    if heat_B is not None:
        for i in heat_B.isnan().nonzero().flatten().tolist():
            # 0 * -inf: rare enough to pay for it only then.
            torch.sub(logits_BV[i], peak_B[i], out=x_V).div_(each[i])
            heat_B[i] = torch.exp(x_V, out=mass_V).mul_(x_V).nansum()
        # x is never above 0, so both terms are at least 0 and nothing cancels.
        entropies_B = (log_total_B - heat_B / total_B).float()
    return _Table(
        blocks_BK.double(),
        entropies_B,
        logits_BV,
        temperature,
        (peak_B.unsqueeze(1), log_total_B.unsqueeze(1)),
    )


def _running(mass_BN: torch.Tensor) -> torch.Tensor:
    """Running sums of float64 masses: rising, and without a step where there is no mass. On CUDA as shares."""
    if mass_BN.device.type == "cpu":
        return mass_BN.cumsum(1)
    # CUDA has no deterministic running sum of floats; whole numbers add up exactly in any order.
    parts_BN = (mass_BN / mass_BN.sum(1, keepdim=True) * _UNITS).long()
    return parts_BN.cumsum(1) / _UNITS


def _first_above(running_BN: torch.Tensor, uniform_B1: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first entry whose running sum is above the uniform's share of the last one, and that share.

    An entry without mass is never the first above anything, and a uniform below 1 times a float64 is below it.
    """
    target_B1 = uniform_B1 * running_BN[:, -1:]
    return torch.searchsorted(running_BN, target_B1, right=True), target_B1


def _one_level(table: _Table, uniform_B1: torch.Tensor) -> torch.Tensor:
    return _first_above(_running(table.blocks_BK), uniform_B1)[0]


def _two_levels(table: _Table, uniform_B1: torch.Tensor) -> torch.Tensor:
    vocabulary, last = table.logits_BV.shape[1], table.blocks_BK.shape[1] - 1
    running_BK = _running(table.blocks_BK)
    block_B1, target_B1 = _first_above(running_BK, uniform_B1)
    block_B1.clamp_max_(last)
    after_B1 = running_BK.gather(1, block_B1)
    before_B1 = running_BK.gather(1, (block_B1 - 1).clamp_min_(0)).masked_fill_(block_B1 == 0, 0.0)
    # The block's own running sum is rounded otherwise than its sum: carry the position over as a share.
    inside_B1 = ((target_B1 - before_B1) / (after_B1 - before_B1)).clamp_(_LEAST, _MOST)
    first_B1 = block_B1 * _BLOCK
    ids_BN = first_B1 + torch.arange(_BLOCK, device=first_B1.device)
    mass_BN = table.logprobs(ids_BN.clamp_max(vocabulary - 1)).double().exp_()
    if vocabulary % _BLOCK:
        mass_BN.masked_fill_(ids_BN >= vocabulary, 0.0)
    return first_B1 + _first_above(_running(mass_BN), inside_B1)[0]


def _truncated(
    table: _Table, top_p_B: torch.Tensor, uniform_B1: torch.Tensor, ids_B1: torch.Tensor
) -> torch.Tensor:
    """New ids for the rows whose top_p is below 1, from all rows at once."""
    top_p_B1 = top_p_B.unsqueeze(1)
    kept_BV = _nucleus(table.logits_BV, top_p_B1)
    return torch.where(top_p_B1 < 1, _first_above(_running(kept_BV), uniform_B1)[0], ids_B1)


def _truncated_by_rows(
    table: _Table, top_p_B: torch.Tensor, uniform_B1: torch.Tensor, ids_B1: torch.Tensor
) -> torch.Tensor:
    """New ids for the rows whose top_p is below 1, sorting only the tokens that may be kept."""
    assert table.frame is not None
    peak_B1, log_total_B1 = table.frame
    vocabulary = table.logits_BV.shape[1]
    for i, top_p in enumerate(top_p_B.tolist()):
        if not top_p < 1:
            continue
        row = table.row(i)
        warmth = row.temperature.item() if isinstance(row.temperature, torch.Tensor) else row.temperature
        # All tokens below this floor together have less than 1 - top_p: the others reach it without them.
        floor = math.log((1 - top_p) / vocabulary) + log_total_B1[i].item()
        cut = peak_B1[i].item() + warmth * (floor - 1e-3)
        ids_N = torch.nonzero(table.logits_BV[i] >= cut).flatten()
        if len(ids_N):
            kept_BN = _nucleus(row.logprobs(ids_N.unsqueeze(0)), top_p_B[i].reshape(1, 1))
            pick_B1, _ = _first_above(_running(kept_BN), uniform_B1[i : i + 1])
            ids_B1[i] = ids_N[pick_B1[0]]
    return ids_B1


def _nucleus(logprobs_BN: torch.Tensor, top_p_B1: torch.Tensor) -> torch.Tensor:
    """Masses (float64), those outside the smallest set that reaches top_p set to 0."""
    ordered_BN = _descending(logprobs_BN)
    running_BN = _running(ordered_BN.double().exp())
    rank_B1 = torch.searchsorted(running_BN, top_p_B1.double() * (1 - _SLACK))
    last_B1 = ordered_BN.gather(1, rank_B1.clamp_max_(ordered_BN.shape[1] - 1))
    above_BN, level_BN = logprobs_BN > last_B1, logprobs_BN == last_B1
    spare_B1 = rank_B1 + 1 - above_BN.sum(1, keepdim=True)
    kept_BN = above_BN | (level_BN & (level_BN.cumsum(1) <= spare_B1))
    return torch.where(kept_BN, logprobs_BN.double().exp(), 0.0)


def _descending(values_BN: torch.Tensor) -> torch.Tensor:
    """The values of each row from the largest to the smallest."""
    if values_BN.device.type == "cpu":
        # Many times faster than torch's sort there, which moves ids along.
        return torch.from_numpy(np.sort(values_BN.neg().numpy(), axis=1)).neg_()
    return values_BN.sort(dim=1, descending=True).values
