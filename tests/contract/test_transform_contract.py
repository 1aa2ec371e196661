"""Every token transform and uncertainty of the plug-in table, as ``credit`` calls them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from retrain import plugins
from retrain.algorithms.advantages import grpo
from retrain.algorithms.credit import Algorithm, Context, credit
from retrain.protocols import TransformContext
from retrain.types import Message, Rollout, Score, ScoredGroup, Task

TRANSFORMS = list(plugins.TABLE["transform"])
UNCERTAINTIES = list(plugins.TABLE["uncertainty"])
PARAMS = {"beta": 0.1, "alpha": 0.2, "rho": 0.4}


def a_rollout(member: int) -> Rollout:
    """Two turns with a tool's tokens between them, of a length of its own."""
    rng = np.random.default_rng(member)
    n = 12 + 5 * member
    sampled = (np.arange(n) >= 4) & ~((np.arange(n) >= 7) & (np.arange(n) < 9))
    logprobs = np.where(sampled, -rng.exponential(size=n), np.nan).astype(np.float32)
    entropies = np.where(sampled, rng.exponential(size=n), np.nan).astype(np.float32)
    return Rollout("t", member, np.arange(n, dtype=np.int32), sampled, logprobs, entropies, "", "stop", 0)


def a_group(members: Sequence[int] = range(4)) -> ScoredGroup:
    task = Task("t", (Message("user", "q"),), "1", "s", 0)
    return ScoredGroup(task, tuple(a_rollout(i) for i in members), tuple(Score(i / 3) for i in members))


def an_algorithm(transform: str = "none", uncertainty: str = "surprisal", params: Any = PARAMS) -> Algorithm:
    return Algorithm(
        advantage=grpo,
        advantage_name="grpo",
        transform=plugins.load("transform", transform),
        transform_name=transform,
        uncertainty=plugins.load("uncertainty", uncertainty),
        uncertainty_name=uncertainty,
        detector=lambda text, offsets: np.arange(len(offsets)) % 3 == 1,
        detector_name="every third",
        offsets=lambda ids: ("x" * len(ids), [(i, i + 1) for i in range(len(ids))]),
        params=params,
    )


@pytest.fixture(params=TRANSFORMS)
def transform(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("uncertainty", UNCERTAINTIES)
@pytest.mark.parametrize("sepa_lambda", [0.0, 0.5, 1.0])
def test_credit_is_finite_and_only_where_sampled(
    transform: str, uncertainty: str, sepa_lambda: float
) -> None:
    group = a_group()
    got = credit(group, an_algorithm(transform, uncertainty), sepa_lambda)
    assert got.skipped == ""
    for rollout, a_T in zip(group.rollouts_G, got.advantages_G_T, strict=True):
        assert a_T.dtype == np.float32
        assert a_T.shape == rollout.token_ids_T.shape
        assert np.isfinite(a_T).all()
        assert not a_T[~rollout.sampled_T].any()


def test_members_are_treated_alike(transform: str) -> None:
    order = [2, 0, 3, 1]
    first = credit(a_group(), an_algorithm(transform), 0.5)
    second = credit(a_group(order), an_algorithm(transform), 0.5)
    for to, source in enumerate(order):
        np.testing.assert_allclose(
            second.advantages_G_T[to], first.advantages_G_T[source], rtol=1e-6, atol=1e-7
        )


def test_no_advantage_stays_none(transform: str) -> None:
    group = a_group()
    algorithm = an_algorithm(transform)
    context = Context(
        [algorithm.uncertainty(r) for r in group.rollouts_G],
        [r.sampled_T.copy() for r in group.rollouts_G],
        0.5,
        PARAMS,
    )
    zeros = [np.zeros(len(r.token_ids_T), np.float32) for r in group.rollouts_G]
    assert not any(a.any() for a in algorithm.transform(group, zeros, context))


def test_neutral_parameters_leave_the_advantage(transform: str) -> None:
    neutral = an_algorithm(transform, params={"beta": 0.0, "alpha": 0.0, "rho": 1.0})
    got, plain = credit(a_group(), neutral, 0.0), credit(a_group(), an_algorithm(), 0.0)
    for a, b in zip(got.advantages_G_T, plain.advantages_G_T, strict=True):
        np.testing.assert_array_equal(a, b)


def test_tokens_that_were_not_sampled_have_no_influence(transform: str) -> None:
    group = a_group()
    changed = ScoredGroup(
        group.task,
        tuple(replace(r, token_ids_T=np.where(r.sampled_T, r.token_ids_T, 7)) for r in group.rollouts_G),
        group.scores_G,
    )
    first, second = (credit(g, an_algorithm(transform), 0.5) for g in (group, changed))
    for a, b in zip(first.advantages_G_T, second.advantages_G_T, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("uncertainty", UNCERTAINTIES)
def test_an_uncertainty_is_finite_where_sampled_and_nan_elsewhere(uncertainty: str) -> None:
    for rollout in a_group().rollouts_G:
        got = plugins.load("uncertainty", uncertainty)(rollout)
        assert got.dtype == np.float32
        assert got.shape == rollout.sampled_T.shape
        np.testing.assert_array_equal(np.isfinite(got), rollout.sampled_T)
        assert np.isnan(got[~rollout.sampled_T]).all()
        assert (got[rollout.sampled_T] >= 0).all()


def test_a_context_has_what_the_protocol_promises() -> None:
    context: TransformContext = Context([], [], 0.25, {"beta": 1.0})
    assert (context.sepa_lambda, dict(context.params)) == (0.25, {"beta": 1.0})
