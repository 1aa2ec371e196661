"""Every source, and the cursor over it: the same tasks every time, unique ids, exact resume."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from retrain.config.names import BUILT
from retrain.environments.sources import TaskCursor, load_tasks
from retrain.protocols import Stateful, TaskSource


@pytest.fixture(params=BUILT["source"])
def data(request, tmp_path):
    answer = "so it is\n#### 2" if request.param == "gsm8k" else "2"
    rows = [{"question": f"{i}+0?", "answer": answer} for i in range(11)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    path = "" if request.param == "arithmetic" else str(tmp_path)
    return SimpleNamespace(source=request.param, path=path, levels=(1,), fields={}, instruction="", system="")


def test_tasks_are_the_same_every_time(data):
    first = load_tasks(data, "train")
    assert first == load_tasks(data, "train")
    assert len({t.id for t in first}) == len(first)
    assert all(
        t.id.startswith(f"{data.source}/train/") and t.source == data.source and t.draw == 0 for t in first
    )
    assert all(t.reference and t.messages[-1].role == "user" for t in first)
    assert load_tasks(data, "train", 3) == first[:3]


def test_the_instruction_and_the_system_message_are_the_users(data):
    data.instruction, data.system = "Say it plainly.", "Be brief."
    for task in load_tasks(data, "train", 3):
        assert [m.role for m in task.messages] == ["system", "user"]
        assert task.messages[0].content == "Be brief."
        assert task.messages[1].content.endswith("Say it plainly.")


def test_the_cursor_resumes_where_it_stood(data):
    made = load_tasks(data, "train", 7)
    cursor = TaskCursor(made, seed=1, shuffle=True)
    assert isinstance(cursor, TaskSource)
    assert isinstance(cursor, Stateful)
    assert len(cursor) == 7
    cursor.take(10)
    fresh = TaskCursor(load_tasks(data, "train", 7), seed=1, shuffle=True)
    fresh.load_state_dict(json.loads(json.dumps(cursor.state_dict())))
    assert fresh.take(9) == cursor.take(9)
    assert fresh.state_dict() == cursor.state_dict()
