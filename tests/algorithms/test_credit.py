"""credit() and step_stats(): who is credited, who is skipped and why, what is logged, and broken plug-ins."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrain.algorithms import advantages, transforms
from retrain.algorithms.credit import Algorithm, Context, correct, credit, credit_step, has_signal
from retrain.algorithms.statistics import step_stats
from retrain.errors import ConfigError, PluginError, RewardError, RunError
from retrain.types import CreditedGroup, Rollout, Score, ScoredGroup, StepStats

MODES = list(transforms.PARAMETERS)
MEAN_KEPT = ("none", "gtpo", "gtpo_sepa", "gtpo_sepa_amp")


@pytest.mark.parametrize(
    ("score", "correct_at", "want"),
    [
        (Score(0.0, passed=True), None, True),
        (Score(9.0, passed=False), 1.0, False),
        (Score(0.5), None, False),
        (Score(0.51), None, True),
        (Score(1.0), None, True),
        (Score(1.01), None, None),
        (Score(-0.01), None, None),
        (Score(1.01), 1.0, True),
        (Score(1.0), 1.0, False),
        (Score(-3.0), -4.0, True),
        (Score.failed("x"), None, None),
        (Score.failed("x"), 0.5, None),
    ],
)
def test_correct(score: Score, correct_at: float | None, want: bool | None) -> None:
    assert correct(score, correct_at) is want


@pytest.mark.parametrize("mode", MODES)
@given(
    rewards=st.lists(st.one_of(st.none(), st.sampled_from([0.0, 0.1, 0.5, 1.0])), min_size=1, max_size=7),
    seed=st.integers(0, 50),
    lam=st.floats(0, 1),
)
def test_invariants(
    mode: str, rewards: list[float | None], seed: int, lam: float,
    make_group: Callable[..., ScoredGroup], make_algorithm: Callable[..., Algorithm],
) -> None:  # fmt: skip
    group = make_group(rewards, seed=seed)
    algorithm = make_algorithm(transform=getattr(transforms, mode), transform_name=mode)
    got = credit(group, algorithm, lam)
    known = [r for r in rewards if r is not None]
    if len(known) < 2:
        assert got.skipped == "errors"
    elif max(known) == min(known):
        assert got.skipped == ("all correct" if known[0] > 0.5 else "all wrong")
    else:
        assert got.skipped == ""
    for reward, rollout, a_T, u_T, p_T in zip(
        rewards, group.rollouts_G, got.advantages_G_T, got.uncertainty_G_T, got.planning_G_T, strict=True
    ):
        assert (a_T.dtype, u_T.dtype, p_T.dtype) == (np.float32, np.float32, np.bool_)
        assert not a_T[~rollout.sampled_T].any()
        assert not p_T[~rollout.sampled_T].any()
        if reward is None:
            assert not u_T.any()
            assert not p_T.any()
        else:
            np.testing.assert_array_equal(u_T, transforms.surprisal(rollout))
        if got.skipped or reward is None:
            assert not a_T.any()
    if not got.skipped and mode in MEAN_KEPT:
        mean = sum(known) / len(known)
        for reward, rollout, a_T in zip(rewards, group.rollouts_G, got.advantages_G_T, strict=True):
            if reward is not None:
                # These transforms move credit between tokens; beta 0.1 floors no weight at 0.
                assert a_T[rollout.sampled_T].mean() == pytest.approx(reward - mean, abs=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_permuting_the_group_permutes_the_credit(
    mode: str, make_group: Callable[..., ScoredGroup], make_algorithm: Callable[..., Algorithm]
) -> None:
    group = make_group([0.0, 1.0, None, 0.3, 1.0], seed=3)
    algorithm = make_algorithm(transform=getattr(transforms, mode), advantage=advantages.maxrl)
    order = [3, 0, 2, 4, 1]
    moved = ScoredGroup(
        group.task, tuple(group.rollouts_G[i] for i in order), tuple(group.scores_G[i] for i in order)
    )
    first, second = credit(group, algorithm, 0.5), credit(moved, algorithm, 0.5)
    for to, source in enumerate(order):
        np.testing.assert_array_equal(second.advantages_G_T[to], first.advantages_G_T[source])


def test_errored_members_leave_before_the_advantage(
    make_group: Callable[..., ScoredGroup],
    make_rollout: Callable[..., Rollout],
    make_algorithm: Callable[..., Algorithm],
) -> None:
    group = make_group([0.0, 1.0, None, 1.0])
    broken = make_rollout(9, error="the tool hung", member=3)
    group = ScoredGroup(group.task, (*group.rollouts_G[:3], broken), group.scores_G)
    got = credit(group, make_algorithm(), 0.0)
    firsts = [float(a[r.sampled_T][0]) for a, r in zip(got.advantages_G_T, group.rollouts_G, strict=True)]
    assert firsts == [-0.5, 0.5, 0.0, 0.0]
    assert not got.uncertainty_G_T[3].any()


def test_a_rollout_that_broke_before_its_first_token(
    make_group: Callable[..., ScoredGroup], make_algorithm: Callable[..., Algorithm]
) -> None:
    group = make_group([0.0, 1.0, None])
    empty = np.zeros(0, np.float32)
    broken = Rollout(
        "t", 2, empty.astype(np.int32), empty.astype(bool), empty, None, "", "error", 0, error="refused"
    )
    got = credit(
        ScoredGroup(group.task, (*group.rollouts_G[:2], broken), group.scores_G), make_algorithm(), 0.0
    )
    assert got.skipped == ""
    assert got.advantages_G_T[2].shape == (0,)


@pytest.mark.parametrize(
    ("rewards", "passed", "correct_at", "skipped"),
    [
        ([0.1] * 6, None, None, "all wrong"),
        ([0.1] * 6, True, None, "all correct"),
        ([1.0] * 3, None, None, "all correct"),
        ([2.0] * 3, None, None, "equal rewards"),
        ([2.0] * 3, None, 1.0, "all correct"),
        ([2.0] * 3, None, 2.0, "all wrong"),
        ([1.0, None, None], None, None, "errors"),
        ([None, None], None, None, "errors"),
    ],
)
def test_why_a_group_is_skipped(
    rewards: list[float | None], passed: bool | None, correct_at: float | None, skipped: str,
    make_group: Callable[..., ScoredGroup], make_algorithm: Callable[..., Algorithm],
) -> None:  # fmt: skip
    got = credit(make_group(rewards, passed=passed), make_algorithm(correct_at=correct_at), 0.5)
    assert got.skipped == skipped
    assert not any(a.any() for a in got.advantages_G_T)


def test_equal_rewards_of_mixed_correctness(
    make_group: Callable[..., ScoredGroup], make_algorithm: Callable[..., Algorithm]
) -> None:
    group = make_group([0.4, 0.4])
    group = ScoredGroup(group.task, group.rollouts_G, (Score(0.4, passed=True), Score(0.4, passed=False)))
    assert credit(group, make_algorithm(), 0.0).skipped == "equal rewards"


def test_maxrl_refuses_a_reward_outside_its_range_through_credit(
    make_group: Callable[..., ScoredGroup], make_algorithm: Callable[..., Algorithm]
) -> None:
    with pytest.raises(RunError, match="grpo"):
        credit(make_group([0.0, 2.0]), make_algorithm(advantage=advantages.maxrl), 0.0)


def test_planning_is_looked_for_in_sampled_tokens_of_one_turn_only(
    make_group: Callable[..., ScoredGroup],
    make_rollout: Callable[..., Rollout],
    make_algorithm: Callable[..., Algorithm],
) -> None:
    words = ["wa", "it", ",", " let", " me", " is"]
    whole = make_rollout(1, words=words)
    # The same text, its middle written by a tool: neither part is a phrase.
    torn = make_rollout(2, words=words, sampled=[True, True, False, True, True, True])
    group = make_group([0.0, 1.0])
    calls: list[int] = []
    algorithm = make_algorithm()

    def counted(ids: Any) -> Any:
        calls.append(len(ids))
        return algorithm.offsets(ids)

    got = credit(
        ScoredGroup(group.task, (whole, torn), group.scores_G),
        dataclasses.replace(algorithm, offsets=counted),
        0.0,
    )
    assert got.planning_G_T[0].tolist() == [False] * 3 + [True] * 5 + [False, False]
    assert not got.planning_G_T[1].any()
    assert calls == [7, 2, 4]


def test_a_reward_of_absurd_size_is_refused(
    make_group: Callable[..., ScoredGroup], make_algorithm: Callable[..., Algorithm]
) -> None:
    with pytest.raises(RewardError, match="1e\\+300"):
        credit(make_group([0.0, 1e300]), make_algorithm(), 0.0)


# Plug-ins that break their contract.


def group_wide(out: Callable[[list[np.ndarray]], Any]) -> Callable[..., Any]:
    return lambda group, advantages_G_T, context: out([a.copy() for a in advantages_G_T])


def spoil(value: float, where: int) -> Callable[[list[np.ndarray]], Any]:
    def change(arrays: list[np.ndarray]) -> list[np.ndarray]:
        arrays[0][where] = value
        return arrays

    return change


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"advantage": lambda r: r[:-1]}, "advantage 'mine' returned shape"),
        ({"advantage": lambda r: r * np.nan}, "advantage 'mine' returned .*nan"),
        ({"advantage": lambda r: r * 1e39}, "advantage 'mine' returned .*inf"),
        ({"advantage": lambda r: r.astype(int)}, "advantage 'mine' returned int64"),
        ({"advantage": lambda r: None}, "advantage 'mine' returned shape"),
        ({"transform": group_wide(lambda a: a[:-1])}, "transform 'mine' returned 2 arrays"),
        ({"transform": group_wide(lambda a: [x[:-1] for x in a])}, "transform 'mine' returned shape"),
        ({"transform": group_wide(lambda a: [x > 0 for x in a])}, "transform 'mine' returned bool"),
        ({"transform": group_wide(spoil(math.nan, -1))}, "transform 'mine' .*not finite"),
        ({"transform": group_wide(spoil(1.0, 0))}, "transform 'mine' .*not sampled"),
        ({"transform": group_wide(lambda a: [np.float64(1e40) + x for x in a])}, "transform .mine. .*finite"),
        ({"uncertainty": lambda r: np.zeros(2, np.float32)}, "uncertainty 'mine' returned shape"),
        ({"uncertainty": lambda r: np.where(r.sampled_T, np.inf, np.nan)}, "uncertainty 'mine' .*not finite"),
        ({"uncertainty": lambda r: np.zeros(len(r.sampled_T))}, "uncertainty 'mine' must be NaN"),
        ({"detector": lambda text, offsets: np.zeros(1, bool)}, "detector 'mine' returned shape"),
        ({"detector": lambda text, offsets: np.zeros(len(offsets))}, "detector 'mine' returned float64"),
    ],
)  # fmt: skip
def test_a_broken_plug_in_is_named(
    changed: dict[str, Any], message: str,
    make_group: Callable[..., ScoredGroup], make_algorithm: Callable[..., Algorithm],
) -> None:  # fmt: skip
    kind = next(iter(changed))
    with pytest.raises(PluginError, match=message):
        credit(make_group([0.0, 1.0, 0.5]), make_algorithm(**changed, **{f"{kind}_name": "mine"}), 0.0)


def test_a_plug_in_is_not_asked_about_a_group_without_signal(
    make_group: Callable[..., ScoredGroup], make_algorithm: Callable[..., Algorithm]
) -> None:
    def never(*_: Any) -> Any:
        raise AssertionError

    assert credit(make_group([1.0, 1.0]), make_algorithm(advantage=never, transform=never), 0.0).skipped


def test_a_transform_cannot_change_what_is_logged(
    make_group: Callable[..., ScoredGroup], make_algorithm: Callable[..., Algorithm]
) -> None:
    def meddle(group: ScoredGroup, advantages_G_T: Any, context: Context) -> Any:
        context.uncertainty_G_T[0][:] = 0
        return advantages_G_T

    with pytest.raises(ValueError, match="read-only"):
        credit(make_group([0.0, 1.0]), make_algorithm(transform=meddle), 0.0)


# What a step is logged as.


def naive_moments(values: list[float]) -> tuple[float | None, float | None]:
    if not values:
        return None, None
    mean = math.fsum(values) / len(values)
    return mean, math.fsum((v - mean) ** 2 for v in values) / len(values)


def test_statistics_equal_loops_over_tokens(
    make_group: Callable[..., ScoredGroup], make_algorithm: Callable[..., Algorithm]
) -> None:
    algorithm = make_algorithm(
        uncertainty=transforms.predictive_variance,
        detector=lambda text, offsets: np.arange(len(offsets)) % 3 == 0,
    )
    scored = [
        make_group(r, seed=i) for i, r in enumerate([[0.0, 1.0, None], [1.0, 1.0], [0.0, 0.0], [None, 1.0]])
    ]
    groups = [credit(g, algorithm, 0.0) for g in scored]
    got = step_stats(groups, algorithm)
    pools: dict[str, list[float]] = {k: [] for k in ("pu", "eu", "ps", "es", "pe", "ee")}
    for group in groups:
        for i, rollout in enumerate(group.scored.rollouts_G):
            if group.scored.scores_G[i].error:
                continue
            for t in range(len(rollout.token_ids_T)):
                if rollout.sampled_T[t]:
                    kind = "p" if group.planning_G_T[i][t] else "e"
                    pools[kind + "u"].append(float(group.uncertainty_G_T[i][t]))
                    pools[kind + "s"].append(min(-float(rollout.logprobs_T[t]), 50.0))
                    pools[kind + "e"].append(float(rollout.entropies_T[t]))
    metrics = got.metrics
    for key, pool in (
        ("plan_surprisal", "ps"),
        ("exec_surprisal", "es"),
        ("plan_entropy", "pe"),
        ("exec_entropy", "ee"),
    ):
        mean, variance = naive_moments(pools[pool])
        assert metrics[f"{key}_mean"] == pytest.approx(mean, rel=1e-12)
        assert metrics[f"{key}_var"] == pytest.approx(variance, rel=1e-12)
    assert metrics["entropy_mean"] == pytest.approx(naive_moments(pools["pe"] + pools["ee"])[0], rel=1e-12)
    assert got.observed.exec_variance == pytest.approx(naive_moments(pools["eu"])[1], rel=1e-12)
    assert got.observed.correct_rate == metrics["correct_rate"] == 4 / 7
    assert {k: v for k, v in metrics.items() if k.startswith("skipped")} == {
        "skipped_errors": 1, "skipped_all_correct": 1, "skipped_all_wrong": 1, "skipped_equal_rewards": 0,
        "skipped_all_cut": 0,
    }  # fmt: skip


def test_what_is_unknown_is_null(
    make_group: Callable[..., ScoredGroup], make_algorithm: Callable[..., Algorithm]
) -> None:
    algorithm = make_algorithm(detector=lambda text, offsets: np.zeros(len(offsets), bool))
    mixed = [
        credit(make_group([0.0, 2.0], entropies=False), algorithm, 0.0),
        credit(make_group([0.0, 1.0]), algorithm, 0.0),
    ]
    got = step_stats(mixed, algorithm).metrics
    assert got["correct_rate"] is None
    assert got["plan_surprisal_mean"] is None
    assert got["exec_surprisal_mean"] is not None
    assert [got[k] for k in ("entropy_mean", "exec_entropy_mean", "exec_entropy_var")] == [None] * 3
    assert step_stats(mixed[1:], algorithm).metrics["entropy_mean"] is not None


def test_a_step_in_which_everything_broke(
    make_group: Callable[..., ScoredGroup], make_algorithm: Callable[..., Algorithm]
) -> None:
    algorithm = make_algorithm()
    for groups in ([], [credit(make_group([None, None]), algorithm, 0.0)]):
        got = step_stats(groups, algorithm)
        assert got.observed == StepStats(None, None)
        assert got.metrics["entropy_mean"] is None


def test_entropy_as_uncertainty_without_entropies_is_a_configuration_error(
    make_group: Callable[..., ScoredGroup], make_algorithm: Callable[..., Algorithm]
) -> None:
    with pytest.raises(ConfigError, match="shannon_entropy"):
        credit(
            make_group([0.0, 1.0], entropies=False),
            make_algorithm(uncertainty=transforms.shannon_entropy),
            0.0,
        )


def test_the_result_is_a_credited_group(
    make_group: Callable[..., ScoredGroup], make_algorithm: Callable[..., Algorithm]
) -> None:
    group = make_group([0.0, 1.0])
    got = credit(group, make_algorithm(), 0.0)
    assert isinstance(got, CreditedGroup)
    assert got.scored is group


# Several groups at once, masks, and algorithms that replace the pipeline.


def first_credit(group: CreditedGroup) -> list[float]:
    """The advantage of each member's first sampled token."""
    rollouts = group.scored.rollouts_G
    return [float(a[r.sampled_T][0]) for a, r in zip(group.advantages_G_T, rollouts, strict=True)]


def test_a_batch_level_advantage_sees_the_valid_rewards_of_the_whole_step(
    make_group: Callable[..., ScoredGroup], make_algorithm: Callable[..., Algorithm]
) -> None:
    seen: list[list[float]] = []

    def batch(rewards_P_G: Any) -> Any:
        seen.extend(r.tolist() for r in rewards_P_G)
        return [np.full(len(r), float(i)) for i, r in enumerate(rewards_P_G)]

    batch.batch_level = True  # type: ignore[attr-defined]
    step = [
        make_group(r, seed=i) for i, r in enumerate([[1.0, None, 0.0], [1.0, 1.0], [None, None], [0.0, 1.0]])
    ]
    got = credit_step(step, make_algorithm(advantage=batch), 0.0)
    # The group without a valid member is not asked about, and the others keep their places.
    assert seen == [[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]]
    assert [g.skipped for g in got] == ["", "all correct", "errors", ""]
    # Skipped groups get nothing, whatever the advantage says about them.
    assert [first_credit(g) for g in got] == [[0.0, 0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [2.0, 2.0]]


def test_reinforce_pp_through_a_step_and_through_one_group(
    make_group: Callable[..., ScoredGroup], make_algorithm: Callable[..., Algorithm]
) -> None:
    rewards = [[1.0, 0.0, 0.0], [1.0, 1.0], [0.2, None, 0.7]]
    step = [make_group(r, seed=i) for i, r in enumerate(rewards)]
    algorithm = make_algorithm(advantage=advantages.reinforce_pp, advantage_name="reinforce_pp")
    want = advantages.reinforce_pp([np.array([x for x in r if x is not None]) for r in rewards])
    got = credit_step(step, algorithm, 0.0)
    assert first_credit(got[0]) == pytest.approx(want[0].tolist(), rel=1e-6)
    assert first_credit(got[2]) == pytest.approx([want[2][0], 0.0, want[2][1]], rel=1e-6)
    alone = credit(step[0], algorithm, 0.0)
    assert first_credit(alone) == pytest.approx(advantages.reinforce_pp([np.array(rewards[0])])[0], rel=1e-6)


@pytest.mark.parametrize("name", ["grpo", "maxrl", "grpo_std", "rloo"])
def test_a_step_is_its_groups_where_the_advantage_looks_at_groups(
    name: str, make_group: Callable[..., ScoredGroup], make_algorithm: Callable[..., Algorithm]
) -> None:
    algorithm = make_algorithm(advantage=getattr(advantages, name), transform=transforms.gtpo)
    step = [make_group(r, seed=i) for i, r in enumerate([[1.0, 0.0], [1.0, 1.0], [0.2, None, 0.7]])]
    for whole, group in zip(credit_step(step, algorithm, 0.0), step, strict=True):
        alone = credit(group, algorithm, 0.0)
        assert whole.skipped == alone.skipped
        for a, b in zip(whole.advantages_G_T, alone.advantages_G_T, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (lambda r: r[:-1], "returned 1 arrays for a step of 2"),
        (lambda r: None, "returned a NoneType, not a list of arrays"),
        (lambda r: [x[:-1] for x in r], "returned shape"),
        (lambda r: [x * np.nan for x in r], "returned .*nan"),
    ],
)
def test_a_broken_batch_level_advantage_is_named(
    out: Any, message: str, make_group: Callable[..., ScoredGroup], make_algorithm: Callable[..., Algorithm]
) -> None:
    def batch(rewards_P_G: Any) -> Any:
        return out(rewards_P_G)

    batch.batch_level = True  # type: ignore[attr-defined]
    step = [make_group([0.0, 1.0]), make_group([1.0, 0.0])]
    with pytest.raises(PluginError, match=f"advantage 'mine' {message}"):
        credit_step(step, make_algorithm(advantage=batch, advantage_name="mine"), 0.0)


@pytest.mark.parametrize(
    ("rewards", "want"),
    [
        ([0.0, 1.0], True),
        ([0.0, 0.0], False),
        ([0.0, None, 1.0], True),
        ([0.0, None, None], False),
        ([None, None], False),
        ([0.1] * 6, False),
        ([3.0, -3.0], True),
    ],
)
def test_has_signal_agrees_with_credit(
    rewards: list[float | None], want: bool,
    make_group: Callable[..., ScoredGroup], make_algorithm: Callable[..., Algorithm],
) -> None:  # fmt: skip
    group = make_group(rewards)
    assert has_signal(group) is want
    assert (credit(group, make_algorithm(), 0.0).skipped == "") is want


def cut(group: ScoredGroup, *members: int) -> ScoredGroup:
    """The group with these members stopped at their token limit."""
    rollouts = [
        dataclasses.replace(r, stop="length" if i in members else r.stop)
        for i, r in enumerate(group.rollouts_G)
    ]
    return ScoredGroup(group.task, tuple(rollouts), group.scores_G)


@pytest.mark.parametrize("mode", MODES)
def test_a_masked_rollout_counts_for_the_others_and_gets_nothing(
    mode: str, make_group: Callable[..., ScoredGroup], make_algorithm: Callable[..., Algorithm]
) -> None:
    whole = make_group([0.0, 1.0, 1.0, 0.0], seed=2)
    algorithm = make_algorithm(transform=getattr(transforms, mode), transform_name=mode)
    masks = dataclasses.replace(algorithm, mask_truncated=True)
    plain, got = credit(whole, algorithm, 0.5), credit(cut(whole, 1, 3), masks, 0.5)
    for i in (0, 2):
        np.testing.assert_array_equal(got.advantages_G_T[i], plain.advantages_G_T[i])
    for i in (1, 3):
        assert not got.advantages_G_T[i].any()
        np.testing.assert_array_equal(got.uncertainty_G_T[i], plain.uncertainty_G_T[i])
    first, second = step_stats([plain], algorithm), step_stats([got], masks)
    assert first.metrics == second.metrics
    unmasked = credit(cut(whole, 1, 3), algorithm, 0.5)
    for a, b in zip(unmasked.advantages_G_T, plain.advantages_G_T, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_group_of_which_all_valid_members_are_masked_is_skipped(
    make_group: Callable[..., ScoredGroup], make_algorithm: Callable[..., Algorithm]
) -> None:
    algorithm = make_algorithm(mask_truncated=True)
    got = credit(cut(make_group([0.0, None, 1.0]), 0, 2), algorithm, 0.0)
    assert got.skipped == "all cut"
    assert step_stats([got], algorithm).metrics["skipped_all_cut"] == 1
    assert credit(cut(make_group([0.0, 0.0]), 0, 1), algorithm, 0.0).skipped == "all wrong"


def flat(value: float) -> Callable[..., Any]:
    return lambda group, context: [
        np.where(r.sampled_T, np.float32(value), np.float32(0)) for r in group.rollouts_G
    ]


@pytest.mark.parametrize(
    ("whole", "message"),
    [
        (lambda group, context: flat(1.0)(group, context)[:-1], "returned 1 arrays for a group of 2"),
        (lambda group, context: None, "returned a NoneType, not a list of arrays"),
        (lambda group, context: flat(math.inf)(group, context), "not finite"),
        (lambda group, context: [np.ones(len(r.token_ids_T)) for r in group.rollouts_G], "not sampled"),
    ],
)
def test_a_broken_algorithm_is_named(
    whole: Any, message: str, make_group: Callable[..., ScoredGroup], make_algorithm: Callable[..., Algorithm]
) -> None:
    with pytest.raises(PluginError, match=f"algorithm 'mine.all' .*{message}"):
        credit(make_group([0.0, 1.0, None]), make_algorithm(whole=whole, whole_name="mine.all"), 0.0)


@pytest.mark.parametrize("kind", ["advantage", "transform", "uncertainty", "detector", "whole"])
def test_a_plug_in_that_raises_is_named_with_its_line(
    kind: str, make_group: Callable[..., ScoredGroup], make_algorithm: Callable[..., Algorithm]
) -> None:
    def broken(*_: Any) -> Any:
        raise ZeroDivisionError("no such luck\nsecond line")

    named = "algorithm" if kind == "whole" else kind
    with pytest.raises(RunError) as caught:
        credit(make_group([0.0, 1.0]), make_algorithm(**{kind: broken, f"{kind}_name": "mine.broken"}), 0.0)
    assert caught.value.message.startswith(
        f"{named} 'mine.broken' raised ZeroDivisionError: no such luck (test_credit.py:"
    )
    assert "\n" not in str(caught.value)

    def leaves(*_: Any) -> Any:
        raise SystemExit(3)

    with pytest.raises(RunError, match=rf"{named} 'mine\.broken' raised SystemExit: 3 \(test_credit\.py:"):
        credit(make_group([0.0, 1.0]), make_algorithm(**{kind: leaves, f"{kind}_name": "mine.broken"}), 0.0)
    if kind != "whole":
        with pytest.raises(ZeroDivisionError):  # a built-in that raises is a bug, and keeps its traceback
            credit(make_group([0.0, 1.0]), make_algorithm(**{kind: broken}), 0.0)
