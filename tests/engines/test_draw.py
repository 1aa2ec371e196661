"""The sampling kernel against float64 twins: what it draws, what it reports, and what it must not depend on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from retrain.engines import draw as module
from retrain.engines.draw import draw
from retrain.head import Head

torch.set_num_threads(1)

WIDE = module._WIDE
# One block, a last block of one token, two levels over all rows at once, and row by row with and without a ragged end.
VOCABULARIES = [1, 2, 384, module._NARROW, module._NARROW + 1, 2 * module._BLOCK + 7, WIDE, WIDE + 131]


def twin(logits_BV, temperature, top_p_B):
    """Float64 probabilities before and after the top-p cut."""
    warmth = temperature.double()[:, None] if isinstance(temperature, torch.Tensor) else temperature
    p_BV = torch.softmax(logits_BV.double() / warmth, 1)
    if top_p_B is None:
        return p_BV, p_BV
    kept_BV = torch.zeros_like(p_BV)
    for p_V, row_V, kept_V, top_p in zip(p_BV, logits_BV, kept_BV, top_p_B.tolist(), strict=True):
        order_V = row_V.sort(descending=True, stable=True).indices
        before_V = p_V[order_V].cumsum(0) - p_V[order_V]
        inside_V = order_V[before_V < top_p * (1 - 2**-20)] if top_p < 1 else order_V
        kept_V[inside_V] = p_V[inside_V]
    return p_BV, kept_BV


def uniform(*values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, None), (0.7, None), (1.0, 0.8), (1.3, 0.5)])
@pytest.mark.parametrize("vocabulary", [40, 3000, WIDE])
def test_draws_follow_the_distribution(vocabulary, temperature, top_p):
    generator = torch.Generator().manual_seed(vocabulary)
    # Steep enough that a few tokens hold most of the mass: every cell of the test is filled.
    logits_BV = torch.randn(1, vocabulary, generator=generator) * 4
    n = {40: 20_000, 3000: 3000, WIDE: 600}[vocabulary]
    u_B = torch.rand(n, generator=generator, dtype=torch.float64)
    top_p_B = None if top_p is None else torch.full((n,), top_p)
    ids = draw(logits_BV.repeat(n, 1), temperature, top_p_B, u_B, False).ids_B.numpy()
    kept = twin(logits_BV, temperature, None if top_p is None else torch.tensor([top_p]))[1][0].numpy()
    kept /= kept.sum()
    counts = np.bincount(ids, minlength=vocabulary)
    assert not counts[kept == 0].any()
    live = kept * n >= 5
    observed, expected = list(counts[live]), list(kept[live] * n)
    if (rest := n - sum(expected)) > 1:
        observed, expected = [*observed, n - sum(observed)], [*expected, rest]
    expected = np.array(expected) * n / sum(expected)
    assert stats.chisquare(observed, expected).pvalue > 1e-4


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(VOCABULARIES),
    st.integers(1, 4),
    st.sampled_from([0.01, 1.0, 8.0, 60.0, 3000.0]),
    st.sampled_from([0.0, 80.0, -1e4]),
    st.sampled_from(["one", "float", "rows"]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_ids_logprobs_and_entropies_equal_a_float64_twin(
    vocabulary, rows, scale, offset, warmth, cut, holes, seed
):
    generator = torch.Generator().manual_seed(seed)
    logits_BV = torch.randn(rows, vocabulary, generator=generator) * scale + offset
    if holes and vocabulary > 1:
        logits_BV[torch.rand(rows, vocabulary, generator=generator) < 0.5] = -torch.inf
        logits_BV[:, seed % vocabulary] = offset
    temperature = {"one": 1.0, "float": 0.7, "rows": torch.rand(rows, generator=generator) + 0.5}[warmth]
    top_p_B = torch.rand(rows, generator=generator).clamp_min(0.01) if cut else None
    if top_p_B is not None:
        top_p_B[0] = 1.0
    u_B = torch.rand(rows, generator=generator, dtype=torch.float64)
    got = draw(logits_BV.clone(), temperature, top_p_B, u_B, True)
    assert (got.ids_B.dtype, got.logprobs_B.dtype) == (torch.int64, torch.float32)

    p_BV, kept_BV = twin(logits_BV, temperature, top_p_B)
    warm_B1 = temperature[:, None].double() if warmth == "rows" else temperature
    logprobs_BV = torch.log_softmax(logits_BV.double() / warm_B1, 1)
    # Float32 logits divided by a temperature are known to a part in 2**24 of their size.
    size = float(logits_BV[logits_BV.isfinite()].abs().max()) * 2 + 20
    atol = 1e-6 + size * 2.0**-22
    np.testing.assert_allclose(got.logprobs_B, logprobs_BV.gather(1, got.ids_B[:, None])[:, 0], atol=atol)
    entropies = -(p_BV * logprobs_BV.clamp_min(-1e9)).sum(1)
    assert got.entropies_B is not None
    assert (got.entropies_B >= 0).all()
    np.testing.assert_allclose(got.entropies_B, entropies, atol=2e-5 + 2 * atol)

    # The drawn token's own piece of [0, 1), up to the rounding of float32 probabilities.
    top_B1 = kept_BV.cumsum(1)
    share = 1e-6 + 2 * atol
    for row, token in enumerate(got.ids_B.tolist()):
        total = float(top_B1[row, -1])
        low = float(top_B1[row, token - 1]) / total if token else 0.0
        high = float(top_B1[row, token]) / total
        assert low - share <= u_B[row] <= high + share
        assert p_BV[row, token] > 0


@pytest.mark.parametrize("vocabulary", [384, 5000, WIDE + 3])
@pytest.mark.parametrize("top_p", [None, 0.9])
def test_the_id_is_that_of_a_naive_float64_inverse_cdf(vocabulary, top_p):
    generator = torch.Generator().manual_seed(5)
    rows = 64
    logits_BV = torch.randn(rows, vocabulary, generator=generator) * 3
    u_B = torch.rand(rows, generator=generator, dtype=torch.float64)
    top_p_B = None if top_p is None else torch.full((rows,), top_p)
    got = draw(logits_BV.clone(), 1.0, top_p_B, u_B, False)
    assert got.entropies_B is None
    kept_BV = twin(logits_BV, 1.0, top_p_B)[1]
    running_BV = kept_BV.cumsum(1) / kept_BV.sum(1, keepdim=True)
    naive_B = torch.searchsorted(running_BV, u_B[:, None], right=True)[:, 0]
    clear_B = (running_BV - u_B[:, None]).abs().amin(1) > 1e-6
    assert clear_B.float().mean() > 0.8
    np.testing.assert_array_equal(got.ids_B[clear_B], naive_B[clear_B])


@pytest.mark.parametrize("vocabulary", [3, 384, 389, 1500, WIDE - 1, WIDE, WIDE + 77])
@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_does_not_depend_on_the_others(vocabulary, cut, threads):
    generator = torch.Generator().manual_seed(3)
    rows = 9
    logits_BV = torch.randn(rows, vocabulary, generator=generator) * 3
    logits_BV[4, ::2] = -torch.inf
    warmth_B = torch.rand(rows, generator=generator) + 0.5
    top_p_B = torch.rand(rows, generator=generator).clamp_min(0.05) if cut else None
    if top_p_B is not None:
        top_p_B[::3] = 1.0
    u_B = torch.rand(rows, generator=generator, dtype=torch.float64)
    torch.set_num_threads(threads)
    try:
        together = draw(logits_BV.clone(), warmth_B, top_p_B, u_B, True)
        for part in ([3], [0, 5, 7], list(range(rows))[::-1]):
            picked = None if top_p_B is None else top_p_B[part]
            apart = draw(logits_BV[part], warmth_B[part], picked, u_B[part], True)
            assert torch.equal(apart.ids_B, together.ids_B[part])
            assert torch.equal(apart.logprobs_B, together.logprobs_B[part])
            assert torch.equal(apart.entropies_B, together.entropies_B[part])
        if top_p_B is not None:
            whole = draw(logits_BV.clone(), warmth_B, None, u_B, False)
            assert torch.equal(whole.ids_B[::3], together.ids_B[::3])
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("vocabulary", VOCABULARIES[1:])
@pytest.mark.parametrize("top_p", [None, 0.9])
def test_a_token_without_mass_is_never_drawn(vocabulary, top_p):
    extremes = uniform(0.0, 2.0**-53, 0.5, 1 - 2.0**-53)
    top_p_B = None if top_p is None else torch.full((4,), top_p)
    for kept in ([vocabulary // 2], [0], [vocabulary - 1], [vocabulary // 3, vocabulary // 2]):
        for nothing in (-torch.inf, -200.0):
            logits_BV = torch.full((4, vocabulary), nothing)
            logits_BV[:, kept] = 1.5
            got = draw(logits_BV.clone(), 1.0, top_p_B, extremes, True)
            assert set(got.ids_B.tolist()) <= set(kept)
            count = len(set(kept))
            np.testing.assert_allclose(got.logprobs_B, -np.log(count), atol=1e-6)
            np.testing.assert_allclose(got.entropies_B, np.log(count), atol=1e-6)


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_equal_logits_are_uniform_to_both_ends(vocabulary):
    extremes = uniform(0.0, 0.5, 1 - 2.0**-53)
    got = draw(torch.full((3, vocabulary), -3.25), 0.5, None, extremes, True)
    assert got.ids_B[0] == 0
    assert abs(int(got.ids_B[1]) - vocabulary // 2) <= 1
    assert got.ids_B[2] == vocabulary - 1
    np.testing.assert_allclose(got.logprobs_B, -np.log(vocabulary), atol=2e-6)
    np.testing.assert_allclose(got.entropies_B, np.log(vocabulary), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("vocabulary", [4, 400, 4000, 40_000])
def test_top_p_keeps_the_lower_ids_of_equals_and_at_least_one(vocabulary):
    last = uniform(*[1 - 2.0**-53] * 4)
    top_p_B = torch.tensor([0.5, 1e-9, 1.0, 0.75])
    got = draw(torch.zeros(4, vocabulary), 1.0, top_p_B, last, False)
    assert got.ids_B.tolist() == [vocabulary // 2 - 1, 0, vocabulary - 1, vocabulary * 3 // 4 - 1]


def test_a_row_of_nan_stays_in_range_and_shows():
    for vocabulary in (10, 2000, WIDE):
        logits_BV = torch.zeros(2, vocabulary)
        logits_BV[0] = torch.nan
        for top_p_B in (None, torch.tensor([0.5, 0.5])):
            got = draw(logits_BV.clone(), 1.0, top_p_B, uniform(0.3, 0.3), True)
            assert 0 <= got.ids_B[0] < vocabulary
            assert got.logprobs_B.isnan().tolist() == [True, False]


def head_of(vocabulary, width, bias, seed=0):
    torch.manual_seed(seed)
    layer = torch.nn.Linear(width, vocabulary, bias=bias)
    layer.requires_grad_(False)
    layer.weight.mul_(8)
    return Head(layer)
