"""The arena's attention against a plain float64 softmax: prefill, what comes after a past, decode, windows, moves."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from retrain.attention import attention
from retrain.engines import arena as arenas
from retrain.engines.arena import Arena, Decode, Job, Prefill, folded_attention
from retrain.engines.prefixes import ParkingLot, shared_beginnings

torch.set_num_threads(1)
H, K, D, SCALE = 6, 2, 8, 0.3


def naive(q_HD, k_TKD, v_TKD, window):
    """The last token's output (H, D) over all T tokens of its sequence."""
    k, v = (x.double().repeat_interleave(H // K, 1)[-window if window else 0 :] for x in (k_TKD, v_TKD))
    weights = torch.softmax(torch.einsum("hd,thd->ht", q_HD.double(), k) * SCALE, -1)
    return torch.einsum("ht,thd->hd", weights, v)


class Sequences:
    """Random queries, keys and values of several sequences, and the arena that has seen part of them."""

    def __init__(self, lengths, window):
        torch.manual_seed(0)
        self.q, self.k, self.v = ([torch.randn(n, heads, D) for n in lengths] for heads in (H, K, K))
        self.window, self.arena, self.grouped = window, Arena(), True
        self.arena.resize(8, 64, 0, 0)

    def check(self, i, out_HD, at):
        want = naive(self.q[i][at], self.k[i][: at + 1], self.v[i][: at + 1], self.window)
        torch.testing.assert_close(out_HD.double(), want, atol=1e-5, rtol=1e-5)

    def prefill(self, parts):
        """(sequence, from, to, rows) each."""
        jobs = [Job(np.arange(a, b, dtype=np.int32), a, rows, i) for i, a, b, rows in parts]
        attend = Prefill(self.arena, jobs, torch.device("cpu"))
        attend._grouped = self.grouped
        flat = [torch.cat([x[i][a:b] for i, a, b, _ in parts]) for x in (self.q, self.k, self.v)]
        assert attend.positions_N.tolist() == [t for _, a, b, _ in parts for t in range(a, b)]
        assert attend.last()[1] == [i for i, *_ in parts]
        for layer in range(2):
            out = attend(layer, *flat, scale=SCALE, window=self.window)
        at = 0
        for i, a, b, _ in parts:
            for t in range(a, b):
                self.check(i, out[at], t)
                at += 1

    def decode(self, positions, span):
        """Row r holds sequence r."""
        picked = [torch.stack([x[i][p] for i, p in enumerate(positions)]) for x in (self.q, self.k, self.v)]
        attend = Decode(
            self.arena, torch.tensor(positions), span, len(set(positions)) > 1 or span > positions[0] + 1
        )
        for layer in range(2):
            out = attend(layer, *picked, scale=SCALE, window=self.window)
        for i, p in enumerate(positions):
            self.check(i, out[i], p)


@pytest.mark.parametrize("window", [None, 1, 5, 100])
def test_every_way_of_attending_equals_a_plain_softmax(window):
    s = Sequences([40, 12, 33, 40], window)
    s.prefill([(0, 0, 20, (0,)), (1, 0, 3, (1, 5)), (2, 0, 30, (2,)), (3, 0, 1, (3,))])
    s.prefill([(0, 20, 25, (0,)), (1, 3, 4, (1,)), (3, 1, 25, (3,))])
    s.decode([25, 4, 30, 25], 31)
    s.decode([26, 5, 31, 26], 64)
    s.arena.resize(6, 48, 6, 32)
    s.decode([27, 6, 32, 27], 33)
    s.decode([28], 29)
    # The copy in row 5 took part in nothing; moved to row 1 it is sequence 1 before its fourth token.
    s.arena.move([5], [1], 3)
    s.arena.copy(3, [0], 28)
    s.q[0], s.k[0], s.v[0] = s.q[3], s.k[3], s.v[3]
    s.decode([28, 3], 29)
    parked = s.arena.park(0, np.arange(28, dtype=np.int32))
    assert parked.bytes == 2 * 2 * K * 28 * D * 4
    other = Sequences([40, 12, 33, 40], window)
    other.arena.restore(parked, [0, 4], 28)
    other.q[0], other.k[0], other.v[0] = s.q[3], s.k[3], s.v[3]
    other.decode([28], 29)


@pytest.mark.parametrize("window", [None, 1, 5, 9])
@pytest.mark.parametrize(("queries", "cells"), [(3, 2**26), (1024, 240), (7, 400)])
@pytest.mark.parametrize("grouped", [True, False])
def test_queries_that_need_masks_are_computed_in_pieces(monkeypatch, window, queries, cells, grouped):
    monkeypatch.setattr(arenas, "_QUERIES", queries)
    monkeypatch.setattr(arenas, "_CELLS", cells)
    monkeypatch.setattr(arenas, "_KEYS", 64)
    seen = []

    def kernel(q, k, v, **how):
        if (mask := how.get("mask")) is not None:
            seen.append((q.shape[2], mask.numel()))
        return attention(q, k, v, **how)

    monkeypatch.setattr(arenas, "attention", kernel)
    s = Sequences([40, 12, 33, 40], window)
    s.grouped = grouped
    s.prefill([(0, 0, 20, (0,)), (1, 0, 3, (1, 5)), (2, 0, 30, (2,)), (3, 0, 1, (3,))])
    s.prefill([(0, 20, 38, (0,)), (1, 3, 4, (1,)), (3, 1, 25, (3,))])
    s.prefill([(0, 38, 40, (0,)), (3, 25, 27, (3,)), (2, 30, 32, (2,))])
    assert max(q for q, _ in seen) <= queries * (1 if grouped else H // K)
    assert max(n for _, n in seen) <= cells


def test_heads_folded_into_queries_attend_as_grouped_ones():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, H, 7, D), torch.randn(3, K, 20, D), torch.randn(3, K, 20, D)
    mask = torch.rand(3, 1, 7, 20) > 0.5
    mask[..., 0] = True
    got, want = (f(q, k, v, scale=SCALE, mask=mask) for f in (folded_attention, attention))
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)


def test_eight_bits_round_by_at_most_a_sixteenth():
    arena = Arena(eight_bit=True)
    arena.resize(2, 8, 0, 0)
    torch.manual_seed(0)
    k, v = torch.randn(3, K, D) * 1e-3, torch.randn(3, K, D) * 1e4
    places = torch.tensor([[0, 8], [1, 9], [2, 10]]).flatten()
    arena.write(0, places, k, v)
    for exact, held in zip((k, v), arena.read(0, slice(0, 1), 3, torch.float32), strict=True):
        gap = (held[0].transpose(0, 1) - exact).abs()
        assert float((gap / exact.abs().amax(-1, keepdim=True)).max()) < 1 / 16
        assert float(gap.max()) > 0
    assert arena.bytes == 2 * 2 * K * 8 * (D + 4)


def test_prompts_that_begin_alike_are_grouped():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 9, 80), rng.integers(0, 9, 200)
    prompts = [[*a, 1, 2], [*a, 1, 3], [7], [*b, 5], [*a], [*b, 5], [*b[:70], *a], [*a[:63], 99]]
    got = shared_beginnings([np.asarray(p, np.int32) for p in prompts])
    assert sorted((n, sorted(g)) for n, g in got) == [(79, [0, 1, 4]), (200, [3, 5])]


def test_the_parking_lot_finds_the_longest_and_forgets_the_oldest():
    def parked(ids):
        return Arena().park(0, np.asarray(ids, np.int32))

    lot = ParkingLot()
    for ids in ([1, 2, 3], [1, 2], [1, 2, 4, 5], [9]):
        lot.add(parked(ids))
    lot.add(parked([1, 2]))
    assert lot.tokens == 10
    assert lot.find(np.array([1, 2, 3, 8], np.int32)).token_ids_T.tolist() == [1, 2, 3]
    assert lot.find(np.array([1, 2, 9], np.int32)).token_ids_T.tolist() == [1, 2]
    assert lot.find(np.array([2, 1, 2], np.int32)) is None
    lot.shrink(6)  # the four tokens were used least recently
    assert lot.find(np.array([1, 2, 4, 5], np.int32)).token_ids_T.tolist() == [1, 2]
    lot.take(lot.find(np.array([9, 9], np.int32)))
    assert lot.tokens == 5
    lot.shrink(0)
    assert lot.tokens == lot.bytes == 0
