"""Every source, and the cursor over it: the same tasks every time, unique ids, exact resume."""

from __future__ import annotations

import json
from typing import Any

import pytest

from retrain.config.names import BUILT
from retrain.config.schema import Config
from retrain.environments.mixture import training_tasks
from retrain.environments.sources import TaskCursor, load_tasks
from retrain.protocols import Stateful, TaskSource

GENERATORS = {"chain_sum": {"weight": 2.0, "max_terms": 3}, "gcd": {}}


def rows(source: str) -> list[dict[str, Any]]:
    if source == "math":
        return [
            {
                "problem": f"{i}+0?",
                "level": "Level 1",
                "type": "Number Theory",
                "solution": f"It is \\boxed{{{i}}}.",
            }
            for i in range(11)
        ]
    answer = "so it is\n#### 2" if source == "gsm8k" else "2"
    return [{"question": f"{i}+0?", "answer": answer} for i in range(11)]


@pytest.fixture(params=BUILT["source"])
def config(request, tmp_path, monkeypatch):
    source = request.param
    if source == "hf":
        pytest.importorskip("datasets")
        import datasets

        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    if source == "reasoning_gym":
        pytest.importorskip("reasoning_gym")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows(source)))
    data: dict[str, Any] = {"source": source}
    if source in ("math", "gsm8k", "jsonl", "hf"):
        data["path"] = str(tmp_path / "data")
    elif source == "arithmetic":
        data["levels"] = [1]
    elif source == "reasoning_gym":
        data |= {"generators": GENERATORS, "size": 12}
    else:
        data["mixture"] = [
            {"source": "jsonl", "name": "mine", "path": str(tmp_path / "data")},
            {"source": "arithmetic", "levels": [1], "weight": 3.0},
        ]
    return Config.model_validate({"data": data})


def with_data(config: Config, **values: Any) -> Config:
    return config.model_copy(update={"data": config.data.model_copy(update=values)})


def test_tasks_are_the_same_every_time(config):
    data = config.data
    first = load_tasks(data, "train")
    assert first == load_tasks(data, "train")
    assert len({t.id for t in first}) == len(first)
    labels = {"mine", "arithmetic"} if data.source == "mixture" else {data.source}
    assert {t.source for t in first} == labels
    assert all(t.id.startswith(f"{t.source}/train/") and t.draw == 0 for t in first)
    assert all(t.reference and t.messages[-1].role == "user" for t in first)
    assert load_tasks(data, "train", 3) == first[:3]
    json.dumps([dict(t.info) for t in first])  # a reward in another process must get it


def test_the_instruction_and_the_system_message_are_the_users(config):
    config = with_data(config, instruction="Say it plainly.", system="Be brief.")
    for task in load_tasks(config.data, "train", 3):
        assert [m.role for m in task.messages] == ["system", "user"]
        assert task.messages[0].content == "Be brief."
        assert task.messages[1].content.endswith("Say it plainly.")


def test_the_cursor_resumes_where_it_stood(config):
    found, cursor = training_tasks(config)
    assert isinstance(cursor, TaskSource)
    assert isinstance(cursor, Stateful)
    assert len(cursor) == len(found)
    before = cursor.take(2 * len(found) + 3)
    assert [t.draw for t in before] == list(range(len(before)))
    _, fresh = training_tasks(config)
    fresh.load_state_dict(json.loads(json.dumps(cursor.state_dict())))
    assert fresh.take(9) == cursor.take(9)
    assert fresh.state_dict() == cursor.state_dict()
    _, whole = training_tasks(config)
    assert whole.take(len(before)) == before


def test_shuffling_is_the_seeds(config):
    def ids(**training: Any) -> list[str]:
        other = config.model_copy(update={"training": config.training.model_copy(update=training)})
        found, cursor = training_tasks(other)
        assert config.data.source == "mixture" or isinstance(cursor, TaskCursor)
        return [t.id for t in cursor.take(len(found))]

    assert ids(seed=1) == ids(seed=1) != ids(seed=2)
