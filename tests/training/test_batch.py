"""Packing: what trains, and denominators that count what does not."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from retrain.training.batch import pack
from retrain.types import CreditedGroup, Message, Rollout, Score, ScoredGroup, Task


def group(draw, lengths, errors, skipped):
    """A credited group whose members sampled ``lengths`` tokens after a prompt of two."""
    rollouts, scores, advantages = [], [], []
    for member, (n, wrong) in enumerate(zip(lengths, errors, strict=True)):
        sampled = np.arange(n + 2) >= 2
        logprobs = np.where(sampled, -1.0, np.nan).astype(np.float32)
        ids = np.arange(n + 2, dtype=np.int32)
        rollouts.append(Rollout(f"t{draw}", member, ids, sampled, logprobs, None, "", "stop", 0))
        scores.append(Score.failed("broke") if wrong else Score(float(member), None))
        advantages.append(np.where(sampled & (not wrong), 0.5, 0.0).astype(np.float32))
    task = Task(f"t{draw}", (Message("user", "?"),), "1", "test", draw)
    blank = tuple(np.zeros(len(r.token_ids_T), dtype=bool) for r in rollouts)
    u = tuple(np.zeros(len(r.token_ids_T), dtype=np.float32) for r in rollouts)
    return CreditedGroup(ScoredGroup(task, tuple(rollouts), tuple(scores)), tuple(advantages), u, blank, skipped)


members = st.lists(st.tuples(st.integers(1, 9), st.booleans()), min_size=1, max_size=6)
groups = st.lists(st.tuples(members, st.sampled_from(["", "all wrong", "equal rewards", "errors"])), max_size=6)


@settings(max_examples=100, deadline=None)
@given(groups)
def test_every_valid_token_is_counted_and_only_groups_with_signal_are_packed(made):
    credited = [
        group(i, [n for n, _ in rows], [wrong for _, wrong in rows], why) for i, (rows, why) in enumerate(made)
    ]
    batch = pack(credited, temperature=0.7, fixed_tokens=640)
    valid = [(n, why) for rows, why in made for n, wrong in rows if not wrong]
    assert batch.num_tokens == sum(n for n, _ in valid)
    assert batch.num_rollouts == len(valid)
    assert [len(r.token_ids_T) - 2 for r in batch.rows] == [n for n, why in valid if not why]
    assert batch.fixed_tokens == 640
    assert batch.is_empty == (not batch.rows)
    for row in batch.rows:
        assert np.isnan(row.old_logprobs_T[~row.sampled_T]).all()
        assert not row.advantages_T[~row.sampled_T].any()
