"""Sources and the cursor: real data, mistakes named with their place, an order by seed alone."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrain.environments.arithmetic import TINY_INSTRUCTION
from retrain.environments.reading import DEFAULT_INSTRUCTION
from retrain.environments.sources import TaskCursor, digest_of, load_tasks
from retrain.errors import DataError, PluginError, ResumeError
from retrain.types import Message, Task


@dataclass
class Data:
    source: str = "jsonl"
    path: str = ""
    subset: str = ""
    subjects: tuple[str, ...] = ()
    levels: tuple[int, ...] = (2,)
    fields: dict[str, str] = field(default_factory=dict)
    generators: dict[str, dict] = field(default_factory=dict)
    size: int = 20
    seed: int = 0
    instruction: str = ""
    system: str = ""


def tasks(n: int) -> list[Task]:
    return [Task(f"t/{i}", (Message("user", f"q{i}"),), str(i), "t", 0) for i in range(n)]


@pytest.fixture
def file(tmp_path):
    def write(*rows, name="problems.jsonl") -> Data:
        path = tmp_path / name
        path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
        return Data(path=str(path))

    return write


def test_arithmetic_speaks_the_embedded_models_form():
    found = load_tasks(Data("arithmetic"), "test", 3)
    assert len(found) == 3
    assert all(t.messages[0].content.split("\n")[1:] == [TINY_INSTRUCTION] for t in found)
    assert found[0].id.startswith("arithmetic/test/2/")
    assert not {t.id.split("/", 2)[2] for t in load_tasks(Data("arithmetic"), "train")} & {
        t.id.split("/", 2)[2] for t in load_tasks(Data("arithmetic"), "test")
    }


@pytest.mark.parametrize(
    ("levels", "split", "said"), [((9,), "train", "level 9"), ((), "train", "empty"), ((2,), "dev", "'dev'")]
)
def test_arithmetic_names_what_it_does_not_have(levels, split, said):
    with pytest.raises(DataError, match=said):
        load_tasks(Data("arithmetic", levels=levels), split)


def test_jsonl_maps_fields_and_numbers(file):
    rows = {"prompt": " 1+1? ", "gold": 2, "key": "a", "level": 3}, {"prompt": "half", "gold": 0.5, "key": 7}
    data = file(rows[0], "", rows[1])
    data.fields = {"question": "prompt", "answer": "gold", "id": "key"}
    data.instruction, data.system = "Answer.", "Be brief."
    first, second = load_tasks(data, "train")
    assert first.messages == (Message("system", "Be brief."), Message("user", "1+1?\n\nAnswer."))
    assert (first.reference, second.reference) == ("2", "0.5")
    assert (first.id, second.id) == ("jsonl/train/a", "jsonl/train/7")
    assert first.info["level"] == 3


def test_jsonl_asks_for_a_box_by_default(file):
    (task,) = load_tasks(file({"question": "1+1?", "answer": "2"}), "train")
    assert task.messages == (Message("user", f"1+1?\n\n{DEFAULT_INSTRUCTION}"),)
    assert "\\boxed{}" in DEFAULT_INSTRUCTION
    assert task.id == "jsonl/train/0"


def test_jsonl_reads_a_folders_split_and_a_byte_order_mark(file, tmp_path):
    file({"question": "q", "answer": "1"}, name="test.jsonl")
    (tmp_path / "train.jsonl").write_bytes(b"\xef\xbb\xbf" + b'{"question": "first", "answer": "1"}\n')
    assert load_tasks(Data(path=str(tmp_path)), "train")[0].messages[0].content.startswith("first")
    with pytest.raises(DataError, match=r"no validation\.jsonl; it holds test\.jsonl, train\.jsonl"):
        load_tasks(Data(path=str(tmp_path)), "validation")


def test_rows_without_an_answer_are_dropped_and_counted(file, caplog):
    data = file(*({"question": "q", "answer": a} for a in ("1", "", None, " ", "2")))
    with caplog.at_level(logging.WARNING, "retrain"):
        found = load_tasks(data, "train")
    assert [t.id for t in found] == ["jsonl/train/0", "jsonl/train/4"]
    assert "dropped 3 rows without an answer (line 2, line 3, line 4)" in caplog.text


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"question": "q", "solution": "1"},
            r":2: no field 'answer' for the answer; the row has 'question', 'solution'",
        ),
        ({"answer": "1"}, r":2: no field 'question'"),
        ({"question": 3, "answer": "1"}, r":2: field 'question' is 3, not a text"),
        ({"question": " ", "answer": "1"}, r":2: field 'question'"),
        ({"question": "q", "answer": [1]}, r":2: field 'answer' is \[1\], not a text or a number"),
        ({"question": "q", "answer": True}, r":2: field 'answer' is true"),
        ("{", r":2: invalid JSON"),
        ('{"question": "q", "answer": NaN}', r":2: invalid JSON: NaN"),
        ("[" * 100_000, r":2: invalid JSON"),
        ("[1]", r":2: not a JSON object"),
        ({"question": "q", "answer": "1", "id": "0"}, r":2: the row has an id, unlike line 1"),
    ],
)
def test_a_wrong_row_is_named_by_file_and_line(file, row, said):
    data = file({"question": "fine", "answer": "1"}, row)
    with pytest.raises(DataError, match=r"problems\.jsonl" + said) as caught:
        load_tasks(data, "train")
    assert caught.value.fix
    assert "\n" not in str(caught.value)


def test_missing_empty_and_unreadable_files(file, tmp_path):
    for data, said in (
        (Data(), "needs a file"),
        (Data(path=str(tmp_path / "none.jsonl")), "no such file"),
        (file(), "holds no task"),
        (file({"question": "q", "answer": ""}), "holds no task"),
        (replace(file({}, name="any.jsonl"), fields={"answers": "x"}), "means nothing"),
    ):
        with pytest.raises(DataError, match=said):
            load_tasks(data, "train")
    (tmp_path / "latin.jsonl").write_bytes(b'{"question": "\xe9", "answer": "1"}\n')
    with pytest.raises(DataError, match="not UTF-8"):
        load_tasks(Data(path=str(tmp_path / "latin.jsonl")), "train")


def test_gsm8k_takes_the_number_after_the_hashes(file):
    data = file({"question": "q", "answer": "So 1,000 + 234.\n#### 1,234"})
    data.source = "gsm8k"
    assert load_tasks(data, "train")[0].reference == "1234"
    data = file({"question": "q", "answer": "4"})
    data.source = "gsm8k"
    with pytest.raises(DataError, match=r"problems\.jsonl:1: not a GSM8K row"):
        load_tasks(data, "train")


def test_gsm8k_without_a_network_says_what_to_do(monkeypatch):
    import datasets

    def unreachable(*_args, **_settings):
        raise ConnectionError("Couldn't reach the Hub\nand more")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError, match=r"Couldn't reach the Hub Fix: .*data\.path"):
        load_tasks(Data("gsm8k"), "test")
    with pytest.raises(DataError, match="no split 'validation'"):
        load_tasks(Data("gsm8k"), "validation")


@pytest.mark.shared_data
def test_gsm8k_is_all_there(shared):
    data = Data("gsm8k", path=str(shared / "data" / "gsm8k"))
    train, test = load_tasks(data, "train"), load_tasks(data, "test")
    assert (len(train), len(test)) == (7473, 1319)
    assert train[0].id == "gsm8k/train/0"
    assert not any("," in t.reference or not t.reference for t in train + test)


def test_rows_have_ids_or_have_none(file):
    row = {"question": "a", "answer": "1"}
    for first, second, said in (
        ({**row, "id": "1"}, row, r":2: the row has no id, unlike line 1\..*every row an id, or none"),
        (row, {**row, "id": "1"}, r":2: the row has an id, unlike line 1\."),
    ):
        with pytest.raises(DataError, match=said):
            load_tasks(file(first, second), "train")
    with pytest.raises(DataError, match=r":2: the id '1' is already that of line 1"):
        load_tasks(file({**row, "id": 1}, {**row, "id": "1"}), "train")
    unanswered = {"question": "a", "answer": ""}
    assert len(load_tasks(file({**row, "id": "1"}, unanswered, {**row, "id": "2"}), "train")) == 2


def test_a_plugin_source_is_checked(monkeypatch, tmp_path):
    (tmp_path / "my_source.py").write_text(
        "from retrain.types import Message, Task\n"
        "def good(data, split): return [Task('a', (Message('user', 'q'),), '1', 'mine', 0)]\n"
        "def twice(data, split): return good(data, split) * 2\n"
        "def wrong(data, split): return ['q']\n"
        "def empty(data, split): return []\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert load_tasks(Data("my_source.good"), "train")[0].id == "a"
    assert load_tasks(Data("my_source.good"), "train")[0].source == "my_source.good"
    for name, error in (("twice", PluginError), ("wrong", PluginError), ("empty", DataError)):
        with pytest.raises(error):
            load_tasks(Data(f"my_source.{name}"), "train")


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 9), st.lists(st.integers(0, 12), max_size=6), st.integers(-1, 2**63), st.booleans())
def test_the_cursor_deals_every_task_once_per_epoch(n, takes, seed, shuffle):
    cursor = TaskCursor(tasks(n), seed=seed, shuffle=shuffle)
    whole = TaskCursor(tasks(n), seed=seed, shuffle=shuffle).take(sum(takes))
    assert [t for k in takes for t in cursor.take(k)] == whole
    assert [t.draw for t in whole] == list(range(len(whole)))
    for epoch in range(len(whole) // n):
        ids = [t.id for t in whole[epoch * n : (epoch + 1) * n]]
        assert sorted(ids) == sorted(t.id for t in tasks(n))
        assert shuffle or ids == [t.id for t in tasks(n)]


def test_epochs_and_seeds_have_orders_of_their_own():
    cursor = TaskCursor(tasks(50), seed=1, shuffle=True)
    first, second = [t.id for t in cursor.take(50)], [t.id for t in cursor.take(50)]
    other = [t.id for t in TaskCursor(tasks(50), seed=2, shuffle=True).take(50)]
    assert len({tuple(first), tuple(second), tuple(other)}) == 3


def test_the_order_is_fixed_for_all_time():
    assert [t.id for t in TaskCursor(tasks(8), seed=42, shuffle=True).take(8)] == ORDER_OF_SEED_42


ORDER_OF_SEED_42 = ["t/7", "t/1", "t/6", "t/4", "t/3", "t/5", "t/0", "t/2"]


def test_the_order_does_not_depend_on_the_hash_seed():
    code = (
        "from retrain.environments.sources import TaskCursor\nfrom retrain.types import Message, Task\n"
        "made = [Task(f't/{i}', (Message('user', 'q'),), '1', 't', 0) for i in range(40)]\n"
        "c = TaskCursor(made, seed=3, shuffle=True)\nprint(c.digest, [t.id for t in c.take(60)])"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("0", "1")
    }
    assert len(said) == 1


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 7), st.integers(0, 30), st.integers(0, 20))
def test_a_restored_cursor_continues(n, before, after):
    cursor = TaskCursor(tasks(n), seed=5, shuffle=True)
    cursor.take(before)
    state = json.loads(json.dumps(cursor.state_dict()))
    fresh = TaskCursor(tasks(n), seed=5, shuffle=True)
    fresh.load_state_dict(state)
    assert fresh.take(after) == cursor.take(after)


def test_a_cursor_is_not_restored_onto_other_tasks_or_another_order():
    state = TaskCursor(tasks(5), seed=1, shuffle=True).state_dict()
    for other in (tasks(6), tasks(5)[::-1]):
        with pytest.raises(ResumeError, match="tasks are not those"):
            TaskCursor(other, seed=1, shuffle=True).load_state_dict(state)
    with pytest.raises(ResumeError, match="ordered by seed 1"):
        TaskCursor(tasks(5), seed=2, shuffle=True).load_state_dict(state)
    with pytest.raises(ResumeError, match="shuffle"):
        TaskCursor(tasks(5), seed=1, shuffle=False).load_state_dict(state)


def test_a_cursor_needs_tasks_and_takes_no_negative_number():
    with pytest.raises(DataError):
        TaskCursor([], seed=0, shuffle=True)
    with pytest.raises(ValueError, match="-1"):
        TaskCursor(tasks(1), seed=0, shuffle=True).take(-1)


def test_a_digest_covers_what_rewards_see_and_is_the_same_in_every_process():
    def digest(info):
        return digest_of([Task("t", (Message("user", "q"),), "1", "t", 0, info)])

    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1})
    assert len({digest({}), digest({"a": 1}), digest({"a": 2}), digest({"a": {"x"}})}) == 4
    assert digest({"a": object()}) == digest({"a": object()})
    code = (
        "from retrain.environments.sources import digest_of\nfrom retrain.types import Message, Task\n"
        "print(digest_of([Task('t', (Message('user', 'q'),), '1', 't', 0, {'tags': set('abcdefgh'), 'call': lambda: 0})]))"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("0", "1")
    }  # fmt: skip
    assert len(said) == 1


@pytest.mark.parametrize("half", ["\\ud800", "\\uDFFF x", "\\ude00\\ud83d"])
def test_half_a_character_is_refused_with_its_line(file, half):
    good = '{"question": "\\ud83d\\ude00 \\u00e9", "answer": "1"}'
    bad = f'{{"question": "q", "answer": "1", "note": ["{half}"]}}'
    with pytest.raises(DataError, match=r"problems\.jsonl:2: .*surrogate") as caught:
        load_tasks(file(good, bad), "train")
    assert str(caught.value).isascii()
    assert load_tasks(file(good), "train")[0].messages[0].content.startswith("\U0001f600 é")


@pytest.mark.parametrize("path", ["~nosuch-user/x", "a" * 300, "\0"])
def test_a_path_that_the_system_refuses_is_one_line(path):
    with pytest.raises(DataError, match=r"data\.path = "):
        load_tasks(Data(path=path), "train")
