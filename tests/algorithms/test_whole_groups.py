"""Credit computed for a group at once equals, bit for bit, what each rollout would get alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from retrain.algorithms import transforms
from retrain.algorithms.credit import credit_step
from retrain.algorithms.planning import RegexDetector
from retrain.algorithms.statistics import step_stats
from retrain.algorithms.transforms import gtpo_weigh, hicra_amplify, sepa_amplify, sepa_pool
from retrain.types import Message, Score, ScoredGroup, Task

TURNS = [True, True, False, True, True, True, True, False, False, True, True, True]


@pytest.fixture
def groups(make_rollout):
    """Single turns, turns with gaps, a member that sampled from its first token on, a failure, long and short ones."""

    def make_group(rollouts, rewards):
        scores = tuple(Score(reward) for reward in rewards)
        return ScoredGroup(Task("t", (Message("user", "q"),), "12", "toy", 0), tuple(rollouts), scores)

    phrase = ["wa", "it", ",", " let", " me"]
    return [
        make_group([make_rollout(i, n=5 + 40 * i, prompt=i % 4) for i in range(4)], [0.0, 1.0, 0.5, 0.25]),
        make_group(
            [
                make_rollout(11, sampled=TURNS),
                make_rollout(12, words=[*phrase, "\n", *phrase, " sum"], prompt=0),
                make_rollout(13, error="broke"),
                make_rollout(14, n=300),
            ],
            [1.0, 0.0, 0.0, 0.0],
        ),
    ]


def joined(offsets):
    """``lines`` of a renderer that knows ``offsets`` alone."""

    def lines(ids, counts):
        texts, spans, at, first = [], [], 0, 0
        for count in counts:
            text, found = offsets(ids[first : first + count])
            texts.append(text)
            spans += [(at + a, at + b) for a, b in found]
            at, first = at + len(text) + 1, first + count
        return "\n".join(texts), np.array(spans, dtype=np.int64).reshape(-1, 2)

    return lines


def same(a, b):
    for one, other in zip(a, b, strict=True):
        assert one.skipped == other.skipped
        for name in ("advantages_G_T", "uncertainty_G_T", "planning_G_T"):
            for x, y in zip(getattr(one, name), getattr(other, name), strict=True):
                assert x.dtype == y.dtype
                assert x.tobytes() == y.tobytes()


@pytest.mark.parametrize("name", sorted(transforms.PARAMETERS))
def test_responses_read_as_the_lines_of_one_text_get_the_same_credit(groups, make_algorithm, toy, name):
    params = {"beta": 0.3, "alpha": 0.2, "rho": 0.3}
    apart = make_algorithm(transform=getattr(transforms, name), detector=RegexDetector(), offsets=toy, params=params)
    together = replace(apart, lines=joined(toy))
    found = credit_step(groups, apart, 0.5)
    assert sum(marks.sum() for group in found for marks in group.planning_G_T) >= 10
    same(found, credit_step(groups, together, 0.5))


REFERENCE = {
    "gtpo": lambda a, u, p: gtpo_weigh(a, u, 0.3),
    "gtpo_hicra": lambda a, u, p: hicra_amplify(gtpo_weigh(a, u, 0.3), p, 0.2),
    "gtpo_sepa": lambda a, u, p: gtpo_weigh(a, sepa_pool(u, p, 0.5), 0.3),
    "gtpo_sepa_amp": lambda a, u, p: gtpo_weigh(a, sepa_amplify(u, p, 0.5), 0.3),
    "gtpo_sepa_amp_c": lambda a, u, p: gtpo_weigh(a, sepa_amplify(u, p, 0.5, floored=True), 0.3),
}


@pytest.mark.parametrize("name", sorted(REFERENCE))
def test_every_rollout_is_weighed_by_its_own_means(groups, make_algorithm, toy, name):
    def certain(rollout):
        # One member without any uncertainty, whose weights stay 1.
        return np.where(rollout.sampled_T, np.float32(0), np.float32(np.nan)) if len(rollout.sampled_T) == 46 else (
            transforms.surprisal(rollout)
        )

    algorithm = make_algorithm(
        transform=getattr(transforms, name), uncertainty=certain, detector=RegexDetector(), offsets=toy,
        params={"beta": 0.3, "alpha": 0.2},
    )  # fmt: skip
    plain = credit_step(groups, replace(algorithm, transform=transforms.none), 0.5)
    for group, before in zip(credit_step(groups, algorithm, 0.5), plain, strict=True):
        for i, rollout in enumerate(group.scored.rollouts_G):
            if not group.scored.valid_G[i]:
                continue
            sampled = rollout.sampled_T
            pieces = before.advantages_G_T[i][sampled], group.uncertainty_G_T[i][sampled], group.planning_G_T[i][sampled]
            expected = np.zeros(len(sampled), dtype=np.float32)
            expected[sampled] = REFERENCE[name](*pieces)
            assert group.advantages_G_T[i].tobytes() == expected.tobytes()


def test_moments_are_those_of_the_arrays_put_together_in_order(groups, make_algorithm, toy):
    algorithm = make_algorithm(detector=RegexDetector(), offsets=toy)
    credited = credit_step(groups, algorithm, 0.0)
    stats = step_stats(credited, algorithm)
    members = [
        (r, p) for g in credited for r, p, v in
        zip(g.scored.rollouts_G, g.planning_G_T, g.scored.valid_G, strict=True) if v
    ]  # fmt: skip
    execution = np.concatenate([r.entropies_T[r.sampled_T & ~p] for r, p in members]).astype(np.float64)
    planning = np.concatenate([r.entropies_T[r.sampled_T & p] for r, p in members]).astype(np.float64)
    assert (stats.exec_entropy.mean, stats.exec_entropy.variance) == (execution.mean(), execution.var())
    assert (stats.plan_entropy.mean, stats.plan_entropy.variance) == (planning.mean(), planning.var())
    assert stats.entropy_mean == np.concatenate([execution, planning]).mean()
