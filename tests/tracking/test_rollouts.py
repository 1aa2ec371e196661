"""The store of rollouts: everything comes back exactly, it stays within its limit, and a bad file is named."""

from __future__ import annotations

import logging
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrain.algorithms import transforms
from retrain.config import names
from retrain.errors import UsageError
from retrain.tracking import layout, rollouts
from retrain.types import CreditedGroup, Message, Rollout, Score, ScoredGroup, Task

TEXT = st.text(st.characters(codec="utf-8"), max_size=6)
BITS = st.integers(0, 2**32 - 1)
FINITE = st.floats(-1e6, 1e6, width=32)


def floats(draw, n, *, finite):
    """Float32 values, in any bit pattern where they need not be finite."""
    if finite:
        return np.array(draw(st.lists(FINITE, min_size=n, max_size=n)), dtype=np.float32)
    return np.array(draw(st.lists(BITS, min_size=n, max_size=n)), dtype=np.uint32).view(np.float32)


def spaced(sampled, values):
    out = np.full(len(sampled), np.nan, dtype=np.float32)
    out[sampled] = values
    return out


@st.composite
def groups(draw):
    top = draw(st.sampled_from([200, 60000, 2**31 - 1]))
    ids = st.integers(0, top)
    prompt = draw(st.lists(ids, max_size=5))
    members, scores, advantages, uncertainties, planning = [], [], [], [], []
    for member in range(draw(st.integers(1, 4))):
        broken = draw(st.integers(0, 4)) == 0
        lead = prompt if draw(st.booleans()) else draw(st.lists(ids, max_size=3))
        tail = draw(st.lists(st.tuples(ids, st.booleans()), max_size=6))
        if not broken:
            tail = [*tail, (draw(ids), True)]
        tokens = np.array([*lead, *(i for i, _ in tail)], dtype=np.int32)
        sampled = np.array([False] * len(lead) + [s for _, s in tail], dtype=np.bool_)
        n = int(sampled.sum())
        entropies = spaced(sampled, floats(draw, n, finite=not broken)) if draw(st.booleans()) else None
        members.append(
            Rollout(
                task_id=draw(st.sampled_from(["t", "other"])),
                member=member,
                token_ids_T=tokens,
                sampled_T=sampled,
                logprobs_T=spaced(sampled, floats(draw, n, finite=not broken)),
                entropies_T=entropies,
                text="not stored",
                stop="error" if broken else draw(st.sampled_from(["stop", "length"])),
                weights_version=draw(st.integers(-1, 2**40)),
                error=draw(TEXT.filter(bool)) if broken else "",
                rewards=draw(st.dictionaries(TEXT, st.floats(allow_nan=False), max_size=2)),
            )
        )
        if draw(st.integers(0, 3)) == 0:
            scores.append(Score.failed(draw(TEXT.filter(bool))))
        else:
            parts = draw(st.dictionaries(TEXT, st.floats(allow_nan=False), max_size=2))
            reward = draw(st.floats(allow_nan=False, allow_infinity=False))
            scores.append(Score(reward, draw(st.sampled_from([None, True, False])), parts))
        advantages.append(np.where(sampled, spaced(sampled, floats(draw, n, finite=True)), np.float32(0)))
        uncertainties.append(spaced(sampled, floats(draw, n, finite=False)))
        planning.append(
            sampled
            & np.array(draw(st.lists(st.booleans(), min_size=len(tokens), max_size=len(tokens))), bool)
        )
    task = Task("t", (Message("user", "?"),), draw(TEXT), draw(TEXT), draw(st.integers(0, 2**40)))
    skipped = draw(st.sampled_from(["", "errors", "all wrong"]))
    scored = ScoredGroup(task, tuple(members), tuple(scores))
    return CreditedGroup(scored, tuple(advantages), tuple(uncertainties), tuple(planning), skipped)


def bits(array):
    return None if array is None else (array.dtype, array.tobytes())


def same(a, b):
    """Equal in every field and every bit but the text and the prompt's messages."""
    for name in ("token_ids_T", "sampled_T", "logprobs_T", "entropies_T"):
        assert bits(getattr(a, name)) == bits(getattr(b, name)), name
    for name in ("task_id", "member", "stop", "weights_version", "error"):
        assert getattr(a, name) == getattr(b, name), name
    assert list(a.rewards.items()) == list(b.rewards.items())


@given(st.lists(groups(), max_size=3), st.sampled_from(["surprisal", "mine:own"]), st.floats(0, 1))
def test_arbitrary_groups_come_back_exactly(tmp_path_factory, groups_P, kind, sepa_lambda):
    run = tmp_path_factory.mktemp("store")
    row = {"sepa_lambda": sepa_lambda, "uncertainty_kind": kind}
    rollouts.RolloutStore(run, temperature=0.7).write(3, groups_P, row)
    found = rollouts.read(run, 3)
    assert (found.step, found.sepa_lambda, found.temperature, found.uncertainty_kind) == (
        3,
        sepa_lambda,
        0.7,
        kind,
    )
    assert found.credit_digest == rollouts.digest_of(groups_P)
    assert found.skipped_P == tuple(g.skipped for g in groups_P)
    assert (found.uncertainty_P_G_T is None) == (kind == "surprisal")
    for p, group in enumerate(groups_P):
        got, scored = found.groups_P[p], group.scored
        for name in ("id", "reference", "source", "draw"):
            assert getattr(got.task, name) == getattr(scored.task, name)
        for i, (rollout, score) in enumerate(zip(scored.rollouts_G, scored.scores_G, strict=True)):
            same(got.rollouts_G[i], rollout)
            assert bits(found.planning_P_G_T[p][i]) == bits(group.planning_G_T[i])
            again = got.scores_G[i]
            assert (again.passed, again.error, list(again.parts.items())) == (
                score.passed, score.error, list(score.parts.items()),
            )  # fmt: skip
            assert again.reward == score.reward or (math.isnan(again.reward) and math.isnan(score.reward))
            if found.uncertainty_P_G_T is not None:
                assert bits(found.uncertainty_P_G_T[p][i]) == bits(group.uncertainty_G_T[i])


def credited(seed=0, members=8, tokens=400, vocabulary=150_000, prompt=100):
    """A group whose numbers look like a real one's."""
    random = np.random.default_rng(seed)
    head = random.integers(0, vocabulary, prompt)
    made = []
    for member in range(members):
        ids = np.concatenate([head, random.integers(0, vocabulary, tokens)]).astype(np.int32)
        sampled = np.arange(len(ids)) >= prompt
        values = -random.exponential(0.5, tokens).astype(np.float32)
        made.append(
            Rollout(
                "t",
                member,
                ids,
                sampled,
                spaced(sampled, values),
                spaced(sampled, -values * 2),
                "",
                "stop",
                0,
            )
        )
    task = Task("t", (Message("user", "?"),), "7", "arithmetic", 0)
    scored = ScoredGroup(task, tuple(made), tuple(Score(float(m % 2)) for m in range(members)))
    zeros = tuple(np.zeros(len(r.token_ids_T), dtype=np.float32) for r in made)
    masks = tuple(np.zeros(len(r.token_ids_T), dtype=np.bool_) for r in made)
    return CreditedGroup(scored, zeros, zeros, masks, "")


def test_a_token_with_random_numbers_costs_less_than_twelve_bytes_and_a_prompt_is_stored_once(tmp_path):
    """An upper bound: nothing here compresses but the exponents."""
    store = rollouts.RolloutStore(tmp_path)
    store.write(0, [credited(prompt=0), credited(1, prompt=0)])
    store.write(1, [credited(prompt=1000), credited(1, prompt=1000)])
    small, large = ((tmp_path / layout.rollout_file(s)).stat().st_size for s in (0, 1))
    assert small < 12 * 2 * 8 * 400
    assert large - small < 2 * 1000 * 4


def test_equal_steps_make_equal_files(tmp_path):
    for name in ("a", "b"):
        rollouts.RolloutStore(tmp_path / name).write(0, [credited()])
    a, b = ((tmp_path / name / layout.rollout_file(0)).read_bytes() for name in ("a", "b"))
    assert a == b


def test_every_built_in_uncertainty_follows_from_what_is_stored(tmp_path):
    assert set(names.BUILT["uncertainty"]) == rollouts.RECOMPUTED
    group = credited()
    rollouts.RolloutStore(tmp_path).write(0, [group])
    (read,) = rollouts.read(tmp_path, 0).groups_P
    for name in rollouts.RECOMPUTED:
        function = getattr(transforms, name)
        for before, after in zip(group.scored.rollouts_G, read.rollouts_G, strict=True):
            assert bits(function(before)) == bits(function(after))


def test_texts_come_from_a_decoder_and_from_nowhere_else(tmp_path):
    rollouts.RolloutStore(tmp_path).write(0, [credited(members=1, tokens=2, prompt=3)])
    bare = rollouts.read(tmp_path, 0).groups_P[0]
    assert (bare.rollouts_G[0].text, bare.task.messages[0].content) == ("", "")
    told = rollouts.read(tmp_path, 0, decode=lambda ids: f"{len(ids)} tokens").groups_P[0]
    assert (told.rollouts_G[0].text, told.task.messages[0].content) == ("2 tokens", "3 tokens")


def test_the_oldest_steps_go_where_the_limit_is_reached(tmp_path, caplog):
    group = credited(tokens=2000)
    probe = rollouts.RolloutStore(tmp_path / "probe")
    probe.write(0, [group])
    size = (tmp_path / "probe" / layout.rollout_file(0)).stat().st_size
    run = tmp_path / "run"
    (run / layout.CHECKPOINTS / layout.checkpoint_name(2)).mkdir(parents=True)
    copies = math.ceil(1e6 / size / 5)  # five steps fill the megabyte, about
    store = rollouts.RolloutStore(run, limit_mb=1)
    with caplog.at_level(logging.WARNING, logger="retrain"):
        for step in range(12):
            store.write(step, [group] * copies)
    kept = rollouts.stored_steps(run)
    assert {0, 2, 11} <= set(kept)
    assert kept == [0, 2, *range(14 - len(kept), 12)]
    assert 4 <= len(kept) < 7
    assert sum((run / layout.rollout_file(s)).stat().st_size for s in kept) <= 1e6
    assert [r.message.count("logging.rollouts_mb = 1") for r in caplog.records] == [1]


def test_a_limit_that_one_step_exceeds_keeps_the_newest(tmp_path):
    store = rollouts.RolloutStore(tmp_path, limit_mb=1)
    for step in range(4):
        store.write(step, [credited(members=64, tokens=2000)])
    assert rollouts.stored_steps(tmp_path) == [0, 3]


def test_a_resumed_store_counts_what_was_cut(tmp_path):
    """The same files stay as in a run that nobody interrupted."""
    groups_P = [credited(tokens=2000) for _ in range(3)]

    def write(run, steps):
        store = rollouts.RolloutStore(run, limit_mb=1)
        for step in steps:
            store.write(step, groups_P)

    write(tmp_path / "whole", range(9))
    write(tmp_path / "cut", range(7))
    rollouts.RolloutStore(tmp_path / "cut", limit_mb=1)
    rollouts.cut(tmp_path / "cut", 5)
    write(tmp_path / "cut", range(5, 9))
    assert rollouts.stored_steps(tmp_path / "cut") == rollouts.stored_steps(tmp_path / "whole")
    assert len(rollouts.stored_steps(tmp_path / "whole")) < 9


def test_what_cannot_be_read_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"no rollouts of step 3\. Fix: logging\.rollouts = true"):
        rollouts.read(tmp_path / "empty", 3)
    store = rollouts.RolloutStore(tmp_path)
    for step in (1, 4):
        store.write(step, [credited(tokens=4)])
    with pytest.raises(UsageError, match="stored are steps 1 to 4, 2 of them"):
        rollouts.read(tmp_path, 3)
    path = tmp_path / layout.rollout_file(1)
    data = path.read_bytes()
    for broken in (data[: len(data) // 2], b"", b"nothing of the kind", data.replace(b"meta", b"mete")):
        path.write_bytes(broken)
        with pytest.raises(UsageError, match=r"step_000001\.npz"):
            rollouts.read(tmp_path, 1)
    np.savez_compressed(path, token_ids=np.zeros(3, np.int32))
    with pytest.raises(UsageError, match="older version"):
        rollouts.read(tmp_path, 1)
    np.savez_compressed(path, meta=np.frombuffer(b'{"format": 9}', dtype=np.uint8))
    with pytest.raises(UsageError, match="format 9"):
        rollouts.read(tmp_path, 1)
    np.savez_compressed(path, meta=np.array([{"a": 1}], dtype=object))
    with pytest.raises(UsageError, match="cannot be read"):
        rollouts.read(tmp_path, 1)
