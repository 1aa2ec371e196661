"""The paired change of accuracy: its known formula, how often its interval holds, and what has no pair."""

from __future__ import annotations

import math

import numpy as np
import pytest

from retrain.training.evaluate import paired_interval


def answers(rows: list[list[bool]]) -> dict[tuple[str, str], list[bool]]:
    return {("eval", str(i)): row for i, row in enumerate(rows)}


def test_single_answers_are_agresti_and_mins() -> None:
    both, lost, won, neither = 31, 5, 9, 15
    before = [[True]] * (both + lost) + [[False]] * (won + neither)
    after = [[True]] * both + [[False]] * lost + [[True]] * won + [[False]] * neither
    mean, low, high, n = paired_interval(answers(before), answers(after))
    # The naive twin: half a task in each cell of the table.
    total = both + lost + won + neither + 2
    b, c = lost + 0.5, won + 0.5
    centre, half = (
        (c - b) / total,
        1.959964 * math.sqrt((b + c) / total - ((c - b) / total) ** 2) / math.sqrt(total),
    )
    assert (mean, n) == (pytest.approx((won - lost) / 60), 60)
    assert (low, high) == pytest.approx((centre - half, centre + half), abs=1e-6)


def test_no_difference_is_no_certainty_and_the_limits_stay_in_range() -> None:
    same = answers([[True, False]] * 20)
    mean, low, high, _ = paired_interval(same, same)
    assert mean == 0
    assert -0.15 < low < -0.05
    assert high == -low
    worse = paired_interval(answers([[True]] * 3), answers([[False]] * 3))
    assert worse[0] == -1
    assert -1 <= worse[1] <= worse[2] <= 1
    assert paired_interval({}, {})[3] == 0


def test_only_tasks_of_both_sides_count() -> None:
    before, after = answers([[True]] * 5), answers([[True]] * 3)
    assert paired_interval(before, after)[3] == 3


@pytest.mark.parametrize(
    ("tasks", "samples", "drop"), [(40, 1, 0.1), (40, 4, 0.05), (150, 2, 0.02), (60, 1, 0.0)]
)
def test_the_interval_holds_in_nineteen_of_twenty(tasks: int, samples: int, drop: float) -> None:
    rng = np.random.default_rng(tasks + samples)
    held = 0
    for _ in range(600):
        level = rng.beta(1.5, 1.5, tasks)
        noise = rng.random((tasks, samples))
        fresh = np.where(
            rng.random((tasks, samples)) < 0.7, noise, rng.random((tasks, samples))
        )  # shared for the most part
        before, after = noise < level[:, None], fresh < np.clip(level - drop, 0, 1)[:, None]
        _, low, high, _ = paired_interval(answers(before.tolist()), answers(after.tolist()))
        # What holds over tasks, not for these alone: the mean of clip(level - drop) - level under the beta distribution.
        held += low <= TRUE[drop] <= high
    assert held / 600 > 0.93


_LEVELS = np.random.default_rng(0).beta(1.5, 1.5, 2_000_000)
TRUE = {d: float((np.clip(_LEVELS - d, 0, 1) - _LEVELS).mean()) for d in (0.1, 0.05, 0.02, 0.0)}
