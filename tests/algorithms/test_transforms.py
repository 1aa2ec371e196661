"""Uncertainties and token transforms against naive float64 loops over tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrain.algorithms import transforms
from retrain.algorithms.credit import Context
from retrain.algorithms.transforms import gtpo_weigh, hicra_amplify, sepa_amplify, sepa_pool
from retrain.errors import ConfigError
from retrain.types import Rollout, ScoredGroup

values = st.lists(st.tuples(st.floats(0, 50), st.booleans()), min_size=1, max_size=30)


def naive_gtpo(a: float, u: Sequence[float], beta: float) -> list[float]:
    mean = sum(u) / len(u)
    if beta == 0 or mean < 1e-7:
        return [a] * len(u)
    out = []
    for x in u:
        w = 1 + beta * (x / (mean + 1e-8) - 1)
        out.append(a * (w if w > 0 else 0.0))
    return out


def naive_hicra(a: Sequence[float], planning: Sequence[bool], alpha: float) -> list[float]:
    return [x + alpha * abs(x) if p else x for x, p in zip(a, planning, strict=True)]


def naive_sepa(u: Sequence[float], planning: Sequence[bool], lam: float) -> list[float]:
    execution = [x for x, p in zip(u, planning, strict=True) if not p]
    if not execution:
        return list(u)
    mean = sum(execution) / len(execution)
    return [x if p else lam * mean + (1 - lam) * x for x, p in zip(u, planning, strict=True)]


def naive_amp(u: Sequence[float], planning: Sequence[bool], lam: float, floor: bool) -> list[float]:
    execution = [x for x, p in zip(u, planning, strict=True) if not p]
    if not execution or lam == 0:
        return list(u)
    mean = sum(execution) / len(execution)
    out = []
    for x, p in zip(u, planning, strict=True):
        spread = (1 + lam) * x - lam * mean
        out.append(x if p else (0.0 if floor and spread < 0 else spread))
    return out


@given(values, st.floats(-5, 5), st.sampled_from([0.0, 0.1, 1.0, 3.0]))
def test_gtpo_equals_its_twin(tokens: list[tuple[float, bool]], a: float, beta: float) -> None:
    u = [x for x, _ in tokens]
    if abs(sum(u) / len(u) - 1e-7) < 1e-9:
        return  # on the edge the two means may fall on different sides
    got = gtpo_weigh(np.full(len(u), a), np.array(u), beta)
    np.testing.assert_allclose(got, naive_gtpo(a, u, beta), rtol=1e-9, atol=1e-9)
    assert (got * np.sign(a) >= 0).all()


@given(values, st.floats(-5, 5), st.sampled_from([0.0, 0.2, 1.0]))
def test_hicra_equals_its_twin(tokens: list[tuple[float, bool]], shift: float, alpha: float) -> None:
    a, planning = [x + shift for x, _ in tokens], [p for _, p in tokens]
    got = hicra_amplify(np.array(a), np.array(planning), alpha)
    np.testing.assert_allclose(got, naive_hicra(a, planning, alpha), rtol=1e-12)


@given(values, st.floats(0, 1))
def test_sepa_equals_its_twin_and_keeps_planning_and_the_mean(
    tokens: list[tuple[float, bool]], lam: float
) -> None:
    u, planning = np.array([x for x, _ in tokens]), np.array([p for _, p in tokens])
    got = sepa_pool(u, planning, lam)
    np.testing.assert_allclose(got, naive_sepa(u.tolist(), planning.tolist(), lam), rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(got[planning], u[planning])
    np.testing.assert_allclose(got.mean(), u.mean(), rtol=1e-9, atol=1e-12)


def test_sepa_at_its_ends() -> None:
    u, planning = np.array([1.0, 2.0, 6.0, 9.0]), np.array([False, False, False, True])
    assert sepa_pool(u, planning, 0.0).tolist() == u.tolist()
    assert sepa_pool(u, planning, 1.0).tolist() == [3.0, 3.0, 3.0, 9.0]
    assert sepa_pool(u, np.ones(4, dtype=bool), 1.0).tolist() == u.tolist()


@given(values, st.floats(0, 1), st.booleans())
def test_amp_equals_its_twin_and_spreads_what_sepa_pools(
    tokens: list[tuple[float, bool]], lam: float, floor: bool
) -> None:
    u, planning = np.array([x for x, _ in tokens]), np.array([p for _, p in tokens])
    got = sepa_amplify(u, planning, lam, floored=floor)
    want = naive_amp(u.tolist(), planning.tolist(), lam, floor)
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9)
    np.testing.assert_array_equal(got[planning], u[planning])
    if floor:
        assert (got >= 0).all()
    else:
        np.testing.assert_allclose(got.mean(), u.mean(), rtol=1e-9, atol=1e-9)
        pooled = sepa_pool(u, planning, lam)
        np.testing.assert_allclose(got - u, u - pooled, rtol=1e-9, atol=1e-9)


def test_gtpo_leaves_a_certain_rollout_and_beta_0_unchanged() -> None:
    a = np.array([0.7, 0.7])
    assert gtpo_weigh(a, np.array([0.0, 1e-8]), 0.1).tolist() == a.tolist()
    assert gtpo_weigh(a, np.array([1.0, 3.0]), 0.0).tolist() == a.tolist()
    assert gtpo_weigh(a, np.array([0.0, 4.0]), 3.0).tolist() == pytest.approx([0.0, 0.7 * 4])


def test_hicra_rewards_planning_whatever_the_sign() -> None:
    got = hicra_amplify(np.array([1.0, -1.0, -1.0]), np.array([True, True, False]), 0.2)
    assert got.tolist() == pytest.approx([1.2, -0.8, -1.0])


# Uncertainties.


def test_surprisal_is_capped_and_nan_where_nothing_was_sampled(make_rollout: Callable[..., Rollout]) -> None:
    rollout = make_rollout(1, prompt=2, n=3)
    rollout.logprobs_T[2:] = [-60.0, -0.25, 0.0, -50.5]
    got = transforms.surprisal(rollout)
    assert got.dtype == np.float32
    assert np.isnan(got[:2]).all()
    assert got[2:].tolist() == [50.0, 0.25, 0.0, 50.0]
    assert not np.signbit(got[4])


def test_predictive_variance_equals_its_twin(make_rollout: Callable[..., Rollout]) -> None:
    rollout = make_rollout(2, n=20)
    rollout.logprobs_T[5:8] = [-1e-7, 1e-7, -90.0]
    got = transforms.predictive_variance(rollout)
    for t in range(len(got)):
        if not rollout.sampled_T[t]:
            assert np.isnan(got[t])
            continue
        logprob = min(float(rollout.logprobs_T[t]), 0.0)
        assert got[t] == pytest.approx(math.exp(logprob) * -math.expm1(logprob), rel=1e-6)
        assert 0 <= got[t] <= 0.25


def test_shannon_entropy_is_what_the_engine_sent_or_a_configuration_error(
    make_rollout: Callable[..., Rollout],
) -> None:
    rollout = make_rollout(3)
    np.testing.assert_array_equal(transforms.shannon_entropy(rollout), rollout.entropies_T)
    with pytest.raises(ConfigError, match="uncertainty_kind"):
        transforms.shannon_entropy(make_rollout(3, entropies=False))


# Transforms of a whole group.


def context_of(group: ScoredGroup, seed: int, lam: float, **params: Any) -> Context:
    rng = np.random.default_rng(seed)
    planning = [(rng.random(len(r.token_ids_T)) < 0.4) & r.sampled_T for r in group.rollouts_G]
    return Context([transforms.surprisal(r) for r in group.rollouts_G], planning, lam, params)


@pytest.mark.parametrize(
    "name", ["none", "gtpo", "gtpo_hicra", "gtpo_sepa", "gtpo_sepa_amp", "gtpo_sepa_amp_c"]
)
@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("beta", [0.0, 0.1, 2.0])
def test_a_transform_is_the_pieces_in_their_order(
    name: str, lam: float, beta: float, make_group: Callable[..., ScoredGroup]
) -> None:
    group = make_group([0.0, 1.0, 1.0], seed=5)
    context = context_of(group, 5, lam, beta=beta, alpha=0.2)
    episode = (-2.0, 0.5, 1.5)
    before = [
        np.where(r.sampled_T, np.float32(a), np.float32(0))
        for r, a in zip(group.rollouts_G, episode, strict=True)
    ]
    got = getattr(transforms, name)(group, before, context)
    for i, rollout in enumerate(group.rollouts_G):
        positions = [t for t in range(len(rollout.token_ids_T)) if rollout.sampled_T[t]]
        u = [float(context.uncertainty_G_T[i][t]) for t in positions]
        planning = [bool(context.planning_G_T[i][t]) for t in positions]
        if name == "gtpo_sepa":
            u = naive_sepa(u, planning, lam)
        if name.startswith("gtpo_sepa_amp"):
            u = naive_amp(u, planning, lam, floor=name.endswith("_c"))
        a = [episode[i]] * len(u) if name == "none" else naive_gtpo(episode[i], u, beta)
        if name == "gtpo_hicra":
            a = naive_hicra(a, planning, 0.2)
        want = np.zeros(len(rollout.token_ids_T))
        want[positions] = a
        assert got[i].dtype == np.float32
        np.testing.assert_allclose(got[i], want, rtol=1e-6, atol=1e-7)


def test_one_million_tokens_are_fast(make_group: Callable[..., ScoredGroup]) -> None:
    import time

    rng = np.random.default_rng(0)
    n, members = 8192, 128
    rollouts = tuple(
        Rollout(
            "t", i, np.zeros(n, np.int32), np.ones(n, bool), -rng.random(n, np.float32), None, "", "stop", 0
        )
        for i in range(members)
    )
    group = make_group([0.0] * members)
    group = ScoredGroup(group.task, rollouts, group.scores_G)
    context = context_of(group, 1, 0.5, beta=0.1, alpha=0.2)
    before = [np.ones(n, np.float32) for _ in range(members)]
    started = time.process_time()
    transforms.gtpo_sepa(group, before, context)
    # Takes 0.03 s; the bound only catches a loop over tokens, which takes seconds.
    assert time.process_time() - started < 1.0


# entropy_mask.


def group_of(
    u_G: Sequence[Sequence[float]], make_group: Callable[..., ScoredGroup]
) -> tuple[ScoredGroup, Context]:
    """A group whose sampled tokens have these uncertainties; the first token of each member is the prompt."""
    rollouts, u_G_T = [], []
    for i, u in enumerate(u_G):
        n = len(u) + 1
        sampled = np.arange(n) > 0
        logprobs = np.where(sampled, np.float32(-1), np.float32(np.nan)).astype(np.float32)
        rollouts.append(Rollout("t", i, np.zeros(n, np.int32), sampled, logprobs, None, "", "stop", 0))
        u_G_T.append(np.array([np.nan, *u], dtype=np.float32))
    group = make_group([0.0] * len(u_G))
    group = ScoredGroup(group.task, tuple(rollouts), group.scores_G)
    return group, Context(u_G_T, [np.zeros(len(u), bool) for u in u_G_T], 0.0, {})


def masked(
    u_G: Sequence[Sequence[float]], rho: float, make_group: Callable[..., ScoredGroup]
) -> list[list[float]]:
    group, context = group_of(u_G, make_group)
    before = [np.where(r.sampled_T, np.float32(i + 1), np.float32(0)) for i, r in enumerate(group.rollouts_G)]
    context = Context(context.uncertainty_G_T, context.planning_G_T, 0.0, {"rho": rho})
    return [a.tolist() for a in transforms.entropy_mask(group, before, context)]


uncertainties = st.lists(
    st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.5, 2.0, 7.0]), min_size=1, max_size=8), min_size=2, max_size=5
)


@given(uncertainties, st.sampled_from([0.05, 0.2, 0.5, 1.0]))
def test_entropy_mask_equals_its_twin(make_group: Any, u_G: list[list[float]], rho: float) -> None:
    pooled = sorted((x for u in u_G for x in u), reverse=True)
    kept = 1
    while kept < rho * len(pooled) - 1e-9:
        kept += 1
    want = [[0.0] + [i + 1.0 if x >= pooled[kept - 1] else 0.0 for x in u] for i, u in enumerate(u_G)]
    got = masked(u_G, rho, make_group)
    assert got == want
    assert sum(a != 0 for row in got for a in row) >= rho * len(pooled) - 1e-9


@given(uncertainties, st.sampled_from([0.1, 0.2, 0.5]), st.integers(0, 99))
def test_entropy_mask_does_not_depend_on_order(
    make_group: Any, u_G: list[list[float]], rho: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(u_G)).tolist()
    inner = [rng.permutation(len(u_G[i])).tolist() for i in order]
    first = [[bool(a) for a in row[1:]] for row in masked(u_G, rho, make_group)]
    moved = masked([[u_G[i][t] for t in p] for i, p in zip(order, inner, strict=True)], rho, make_group)
    for row, i, p in zip(moved, order, inner, strict=True):
        assert [bool(a) for a in row[1:]] == [first[i][t] for t in p]


def test_entropy_mask_keeps_ties_and_counts_tokens_not_rollouts(make_group: Any) -> None:
    assert masked([[1, 1, 1], [0, 0]], 0.2, make_group) == [[0, 1, 1, 1], [0, 0, 0]]
    assert masked([[5, 4, 3], [2, 1]], 0.4, make_group) == [[0, 1, 1, 0], [0, 0, 0]]
    # 0.1 * 30 is a hair above 3 in floats: three are kept, not four.
    assert sum(a != 0 for a in masked([list(range(30)), [-1.0]], 0.1 * 30 / 31, make_group)[0]) == 3
