"""Mixtures: exact proportions after any number of draws, exact resume from any of them, labels and mistakes."""

from __future__ import annotations

import json
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrain.config.schema import Config
from retrain.environments.mixture import MixtureCursor, training_tasks
from retrain.environments.shares import Shares
from retrain.environments.sources import TaskCursor, load_tasks
from retrain.errors import DataError, ResumeError
from retrain.types import Message, Task

WEIGHTS = st.lists(st.sampled_from((0.1, 0.3, 0.5, 1.0, 2.0, 7.0, 1000.0)), min_size=1, max_size=5)


def group(label: str, n: int) -> list[Task]:
    return [Task(f"{label}/train/{i}", (Message("user", f"{label}{i}"),), str(i), label, 0) for i in range(n)]


def cursor(weights, sizes=(3, 5, 2, 7, 4), seed=1) -> MixtureCursor:
    groups = {f"s{i}": group(f"s{i}", sizes[i]) for i in range(len(weights))}
    return MixtureCursor(groups, weights, seed=seed, shuffle=True)


@settings(max_examples=100, deadline=None)
@given(WEIGHTS, st.integers(1, 400))
def test_no_source_is_ever_far_from_its_share(weights, draws):
    shares, exact = Shares(weights), [Fraction(str(w)) for w in weights]
    for draw in range(1, draws + 1):
        shares.next()
        assert sum(shares.counts) == draw
        for count, weight in zip(shares.counts, exact, strict=True):
            over = count - weight / sum(exact) * draw
            assert -(len(weights) - 1) < over < 1 or over == 0


def test_whole_periods_are_exact():
    shares = Shares([0.1, 0.2, 0.7])
    dealt = [shares.next() for _ in range(50)]
    assert shares.counts == [5, 10, 35]
    assert dealt[:10] == dealt[10:20]


@settings(max_examples=60, deadline=None)
@given(WEIGHTS, st.lists(st.integers(0, 9), max_size=6), st.integers(0, 20))
def test_it_resumes_from_any_draw(weights, takes, after):
    one = cursor(weights)
    parts = [t for n in takes for t in one.take(n)]
    assert parts == cursor(weights).take(sum(takes))
    assert [t.draw for t in parts] == list(range(len(parts)))
    fresh = cursor(weights)
    fresh.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert fresh.take(after) == one.take(after)
    assert fresh.state_dict() == one.state_dict()


def test_each_source_keeps_the_order_of_its_own_cursor():
    taken = cursor([1.0, 3.0]).take(40)
    for i, size in ((0, 3), (1, 5)):
        own = [t.id for t in taken if t.source == f"s{i}"]
        alone = TaskCursor(group(f"s{i}", size), seed=1, shuffle=True).take(len(own))
        assert own == [t.id for t in alone]
    assert len(cursor([1.0, 3.0])) == 8


@pytest.mark.parametrize("weights", [[1.0, 2.0], [1.0], [1.0, 1.0, 1.0]])
def test_another_mixture_is_not_resumed(weights):
    state = cursor([1.0, 1.0]).state_dict()
    with pytest.raises(
        ResumeError, match=r"the checkpoint's mixture is \['s0', 's1'\] with weights \[1\.0, 1\.0\]"
    ):
        cursor(weights).load_state_dict(state)


def test_other_tasks_or_another_order_are_not_resumed():
    state = cursor([1.0, 1.0]).state_dict()
    with pytest.raises(ResumeError, match="tasks are not those"):
        cursor([1.0, 1.0], sizes=(3, 6)).load_state_dict(state)
    with pytest.raises(ResumeError, match="ordered by seed 1"):
        cursor([1.0, 1.0], seed=2).load_state_dict(state)


@pytest.mark.parametrize("weight", [0.0, -1.0])
def test_a_weight_of_nothing_is_refused(weight):
    with pytest.raises(DataError, match="the weight of 's1' is"):
        cursor([1.0, weight])
    with pytest.raises(ValueError, match="above 0"):
        Shares([1.0, weight])


def test_a_configuration_becomes_labelled_tasks(tmp_path):
    (tmp_path / "mine.jsonl").write_text(
        '{"question": "1+1?", "answer": "2"}\n{"question": "1+2?", "answer": "3"}\n'
    )
    config = Config.model_validate({"data": {"source": "mixture", "instruction": "Now.", "mixture": [
        {"source": "jsonl", "name": "mine", "path": str(tmp_path / "mine.jsonl"), "weight": 1.0},
        {"source": "arithmetic", "levels": [1], "weight": 3.0, "max_examples": 9, "instruction": "Own."},
        {"source": "arithmetic", "name": "other", "split": "validation", "levels": [1], "system": "Be brief."},
    ]}})  # fmt: skip
    found, source = training_tasks(config)
    assert found == load_tasks(config.data, "train")
    assert [t.id for t in found[:3]] == ["mine/train/0", "mine/train/1", found[2].id]
    assert sum(t.source == "arithmetic" for t in found) == 9
    assert all(t.id.startswith(f"{t.source}/") for t in found)
    assert {t.id.split("/")[1] for t in found if t.source == "other"} == {"validation"}
    assert found[0].messages[-1].content == "1+1?\n\nNow."
    assert found[2].messages[-1].content.endswith("\nOwn.")
    assert [m.role for m in found[-1].messages] == ["system", "user"]
    assert isinstance(source, MixtureCursor)
    assert source.labels == ("mine", "arithmetic", "other")
    assert [t.source for t in source.take(5)].count("arithmetic") == 3


def test_the_configured_name_is_the_source_whatever_a_plug_in_says(tmp_path, monkeypatch):
    (tmp_path / "claims.py").write_text(
        "from retrain.types import Message, Task\n"
        "def tasks(data, split): return [Task('a', (Message('user', 'q'),), '1', 'arithmetic', 0)]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    alone, cursor = training_tasks(Config.model_validate({"data": {"source": "claims.tasks"}}))
    assert [t.source for t in (*alone, *cursor.take(1))] == ["claims.tasks"] * 2
    assert alone[0].id == "a"
    config = Config.model_validate({"data": {"source": "mixture", "mixture": [
        {"source": "claims.tasks"}, {"source": "claims.tasks", "name": "mine"}, {"source": "arithmetic"},
    ]}})  # fmt: skip
    found, _ = training_tasks(config)
    assert [(t.id, t.source) for t in found[:2]] == [("claims.tasks/a", "claims.tasks"), ("mine/a", "mine")]


def test_a_mistake_in_a_table_names_it():
    config = Config.model_validate(
        {
            "data": {
                "source": "mixture",
                "mixture": [{"source": "jsonl", "name": "mine", "path": "no-such.jsonl"}],
            }
        }
    )
    with pytest.raises(
        DataError, match=r"data\.mixture 'mine': path = 'no-such\.jsonl': there is no such file"
    ):
        training_tasks(config)
    with pytest.raises(DataError, match=r"needs data\.mixture"):
        training_tasks(Config.model_validate({"data": {"source": "mixture"}}))
