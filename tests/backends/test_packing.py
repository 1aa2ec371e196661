"""Rows packed on one axis, prompts computed once: against each row alone."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from retrain.attention import attention
from retrain.backends import packing, padding
from retrain.backends.packing import Family, families, pack_rows, plan_microbatches
from retrain.backends.padding import Block, Padding
from retrain.types import TrainRow

torch.set_num_threads(1)

CPU = torch.device("cpu")


def row(prompt, own, sampled, rng):
    """A row of ``prompt`` ids and ``own`` more, sampled where ``sampled`` says (one flag per own token)."""
    ids = np.concatenate([prompt, rng.integers(2, 250, own)]).astype(np.int32)
    flags = np.concatenate([np.zeros(len(prompt), bool), np.asarray(sampled, bool)])
    old = np.where(flags, -5.0, np.nan).astype(np.float32)
    return TrainRow(ids, flags, old, np.where(flags, rng.normal(), 0).astype(np.float32))


@st.composite
def microbatches(draw):
    """Groups that share a prompt and rows that do not, with unsampled tokens in the middle and at the end."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows = []
    for _ in range(draw(st.integers(1, 4))):
        prompt = rng.integers(2, 250, draw(st.integers(1, 12)))
        for _ in range(draw(st.integers(1, 4))):
            own = draw(st.integers(1, 20))
            rest = draw(st.lists(st.booleans(), min_size=own - 1, max_size=own - 1))
            rows.append(row(prompt, own, [True, *rest], rng))
    order = draw(st.permutations(range(len(rows))))
    return [rows[i] for i in order]


def weights(rows):
    return [r.sampled_T / 7.0 for r in rows]


@pytest.fixture(scope="module")
def policy(make_config, random_model):
    from retrain.models import load_policy

    folder = str(random_model(scale=2.0, heads=4, kv_heads=2, head_dim=16))
    made = load_policy(make_config(model={"model": folder, "lora_rank": 4}), seed=1)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, p in made.adapter.items():
            if "lora_B" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.02)
    return made


def alone(policy, rows):
    """Logprobs of the sampled tokens, row by row, each row whole and alone."""
    from retrain.attention import one_sequence

    out = []
    for r in rows:
        ids = torch.as_tensor(r.token_ids_T, dtype=torch.long)
        hidden = policy.forward(ids, torch.arange(len(ids)), one_sequence)
        at = torch.as_tensor(np.flatnonzero(r.sampled_T))
        out.append(policy.selected_logprobs(hidden[at - 1], ids[at], 0.9, 64))
    return torch.cat(out)


def packed(policy, rows):
    piece = pack_rows(rows, weights(rows), CPU)
    hidden = policy.forward(piece.ids_N, piece.positions_N, piece.attend)
    return piece, policy.selected_logprobs(hidden[piece.before_M], piece.targets_M, 0.9, 64)


def gradient(policy, values, slopes):
    found = torch.autograd.grad(values, list(policy.adapter.values()), slopes)
    return torch.cat([g.flatten().double() for g in found])


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=microbatches(), worth=st.sampled_from([0, 50, 1 << 15]), mixed=st.sampled_from([0, 1 << 22]))
def test_values_and_gradients_are_those_of_each_row_alone(policy, rows, worth, mixed):
    before = dict(packing._CALL_WORTH), packing._MIXED_UP_TO
    packing._CALL_WORTH["cpu"], packing._MIXED_UP_TO = worth, mixed
    try:
        piece, values = packed(policy, rows)
    finally:
        packing._CALL_WORTH.update(before[0])
        packing._MIXED_UP_TO = before[1]
    expected = alone(policy, rows)
    torch.testing.assert_close(values, expected, atol=1e-5, rtol=1e-5)
    slopes = torch.randn(len(values), generator=torch.Generator().manual_seed(1))
    ours, theirs = (gradient(policy, v, slopes) for v in (values, expected))
    assert float((ours - theirs).norm()) <= 1e-5 * float(theirs.norm())
    flat = [a[r.sampled_T] for r in rows for a in (r.advantages_T,)]
    np.testing.assert_array_equal(piece.advantages_M.numpy(), np.concatenate(flat))
    np.testing.assert_array_equal(
        piece.row_M.numpy(), np.concatenate([np.full(int(r.sampled_T.sum()), i) for i, r in enumerate(rows)])
    )
    np.testing.assert_allclose(
        piece.weights_M.numpy(),
        np.concatenate([w[r.sampled_T] for w, r in zip(weights(rows), rows, strict=True)]),
    )


@settings(deadline=None, max_examples=60)
@given(rows=microbatches())
def test_the_axis_holds_each_needed_token_once(rows):
    made = families(rows)
    assert sorted(i for f in made for i in f.rows) == list(range(len(rows)))
    piece = pack_rows(rows, weights(rows), CPU)
    assert len(piece.ids_N) == len(piece.positions_N) == sum(f.tokens for f in made)
    for family in made:
        if family.prompt:
            assert len(family.rows) > 1
            assert len({rows[i].token_ids_T[: family.prompt].tobytes() for i in family.rows}) == 1


@settings(deadline=None, max_examples=60)
@given(
    block=st.lists(st.tuples(st.integers(1, 9), st.sampled_from([0, 3, 5])), min_size=1, max_size=5),
    window=st.sampled_from([None, 1, 2, 4, 30]),
    chunk=st.sampled_from([3, 1024]),
    seed=st.integers(0, 9),
)
def test_windows_and_prefixes_equal_the_naive_softmax(block, window, chunk, seed):
    """Float32 kernels against float64 sums over the keys that each token may see, values and gradients."""
    block.sort(key=lambda s: -s[0])
    generator = torch.Generator().manual_seed(seed)
    # Two prefixes lie first on the axis: three tokens, then five.
    made = Padding(
        [
            Block.of(start=0, own=[5, 3], prefix=[0, 0], prefix_start=[0, 0], device=CPU),
            Block.of(
                start=8,
                own=[n for n, _ in block],
                prefix=[p for _, p in block],
                prefix_start=[0 if p == 5 else 5 for _, p in block],
                device=CPU,
            ),
        ]
    )
    total = 8 + sum(n for n, _ in block)
    q, k, v = (torch.randn(total, h, 8, generator=generator).requires_grad_() for h in (4, 2, 2))
    before, padding._CHUNK = padding._CHUNK, chunk
    try:
        out = made(0, q, k, v, scale=0.4, window=window)
    finally:
        padding._CHUNK = before
    slope = torch.randn(out.shape, generator=generator)
    found = torch.autograd.grad(out, (q, k, v), slope)
    q64, k64, v64 = (x.detach().double().requires_grad_() for x in (q, k, v))
    rows, places = [], []
    for start, n in ((0, 5), (5, 3)):
        places += [(list(range(start, start + n)), t, t + 1) for t in range(n)]
    at = 8
    for n, p in block:
        keys = list(range(0 if p == 5 else 5, (0 if p == 5 else 5) + p)) + list(range(at, at + n))
        places += [(keys, p + t, p + t + 1) for t in range(n)]
        at += n
    for i, (keys, last, count) in enumerate(places):
        first = 0 if window is None else max(0, last - window + 1)
        index = torch.tensor(keys[first:count])
        heads = []
        for h in range(4):
            scores = 0.4 * k64[index, h // 2] @ q64[i, h]
            heads.append(torch.softmax(scores, 0) @ v64[index, h // 2])
        rows.append(torch.stack(heads))
    expected = torch.stack(rows)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
    for got, want in zip(found, torch.autograd.grad(expected, (q64, k64, v64), slope.double()), strict=True):
        torch.testing.assert_close(got.double(), want, atol=2e-5, rtol=1e-5)


def lone(*lengths):
    return [Family((i,), 0, (n,)) for i, n in enumerate(lengths)]


def test_a_microbatch_plan_covers_every_row_once_longest_first():
    lengths = (5, 40, 12, 12, 9, 33, 40)
    plan = plan_microbatches(lone(*lengths), 80)
    assert sorted(i for m in plan for i in m) == list(range(7))
    assert plan[0][0] == 1
    assert all(len(m) == 1 or sum(lengths[i] for i in m) <= 80 for m in plan)
    assert plan_microbatches(lone(100), 10) == [[0]]
    assert plan_microbatches([], 10) == []


def test_a_family_stays_together_where_it_fits_and_is_cut_where_it_does_not():
    made = [Family((0, 2), 10, (30, 20)), Family((1, 3, 4), 10, (40, 35, 15)), Family((5,), 0, (12,))]
    assert [f.tokens for f in made] == [40, 70, 12]
    assert plan_microbatches(made, 200) == [[1, 3, 4, 0, 2, 5]]
    assert plan_microbatches(made, 72) == [[1, 3, 4], [0, 2, 5]]
    cut = plan_microbatches(made, 50)
    assert cut[0] == [1]
    assert sorted(i for m in cut for i in m) == [0, 1, 2, 3, 4, 5]


def test_one_call_where_padding_is_cheap_and_several_where_it_is_not():
    rng = np.random.default_rng(0)
    prompt = rng.integers(2, 250, 20)
    short = [row(prompt, n, [True] * n, rng) for n in (60, 58, 61, 59)]
    assert len(pack_rows(short, weights(short), CPU).attend.blocks) == 1
    uneven = [row(rng.integers(2, 250, 3), n, [True] * n, rng) for n in (2000, 100, 90, 1900)]
    made = pack_rows(uneven, weights(uneven), CPU).attend.blocks
    assert [b.rows for b in made] == [1, 1, 2]
    assert all(b.prefix == 0 for b in made)


def test_attention_is_the_kernel_underneath():
    """A block without padding and prefix is a view: no copy, and the same bits as one call on the rows."""
    q, k, v = (torch.randn(12, h, 8) for h in (4, 2, 2))
    made = Padding([Block.of(start=0, own=[4, 4, 4], prefix=[0] * 3, prefix_start=[0] * 3, device=CPU)])
    rows = [x.view(3, 4, *x.shape[1:]).transpose(1, 2) for x in (q, k, v)]
    expected = attention(*rows, scale=0.3, causal=True).transpose(1, 2).reshape(12, 4, 8)
    assert torch.equal(made(0, q, k, v, scale=0.3, window=None), expected)
