"""What is said about references before a run starts."""

from __future__ import annotations

import logging

import pytest

from retrain import preflight
from retrain.errors import ConfigError
from retrain.training import references
from retrain.types import Message, Task


def tasks(source: str, *answers: str) -> list[Task]:
    return [
        Task(f"{source}/{i}", (Message("user", f"{source} {i}"),), a, source, 0)
        for i, a in enumerate(answers)
    ]


@pytest.fixture
def warned(caplog):
    def said(config, training, held_out=()):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="retrain"):
            references.check(config, training, held_out)
        return [r.getMessage() for r in caplog.records]

    return said


@pytest.mark.parametrize("kind", ["match", "math"])
def test_tasks_without_a_reference_are_counted_and_named(make_config, warned, kind):
    config = make_config(reward={"type": kind})
    assert warned(config, tasks("arithmetic", "1", "2")) == []
    (line,) = warned(config, tasks("arithmetic", "1", *[" "] * 7))
    assert "7 of 8 training tasks of 'arithmetic' have no reference" in line
    assert line.endswith("arithmetic/1, arithmetic/2, arithmetic/3, arithmetic/4, arithmetic/5, ...")
    (line,) = warned(config, tasks("arithmetic", "1"), tasks("arithmetic", "", "1"))
    assert "1 of 2 evaluation tasks" in line


def test_a_source_without_any_reference_is_refused(make_config):
    config = make_config(reward={"type": "match"})
    with pytest.raises(ConfigError, match="no training task of 'arithmetic' has a reference"):
        preflight.advice(config, tasks("arithmetic", "", ""), (), {})
    with pytest.raises(ConfigError, match="no evaluation task of 'held'"):
        preflight.advice(config, tasks("arithmetic", "1"), tasks("held", ""), {})


def test_only_rewards_that_compare_need_one(make_config, warned):
    mixture = {"source": "mixture", "mixture": [
        {"source": "reasoning_gym", "name": "gym", "reward": "reasoning_gym", "generators": {"gcd": {}}},
        {"source": "arithmetic"},
    ]}  # fmt: skip
    config = make_config(data=mixture, reward={"type": "match"})
    assert warned(config, [*tasks("gym", "", ""), *tasks("arithmetic", "1")]) == []
    with pytest.raises(ConfigError, match="no training task of 'arithmetic'"):
        references.check(config, [*tasks("gym", "1"), *tasks("arithmetic", "")], ())
    assert warned(make_config(reward={"type": "reasoning_gym"}), tasks("gym", "")) == []


def test_empty_references_are_not_counted_as_odd(make_config):
    config = make_config(reward={"type": "match"})
    plain, odd = tasks("arithmetic", "1", "", "", ""), tasks("arithmetic", "1", "1/2", "", "")
    assert "plain integers" not in " ".join(preflight.advice(config, plain, (), {}))
    assert "50% of the references are not plain integers" in " ".join(preflight.advice(config, odd, (), {}))


def test_copying_the_question_is_said_where_math_scores_sums(make_config):
    def said(training, **sections):
        found = preflight.advice(make_config(**sections), training, (), {})
        return [line for line in found if "copying the question" in line]

    sums = tasks("arithmetic", "5")
    composite = {"type": "composite", "parts": [{"type": "math"}]}
    for reward in ({"type": "math"}, composite):
        (line,) = said(sums, reward=reward, data={"source": "arithmetic"})
        assert "on arithmetic copying" in line
    assert said(sums, reward={"type": "match"}, data={"source": "arithmetic"}) == []
    tables = [{"source": "arithmetic", "name": "sums", "reward": "math"}, {"source": "gsm8k"}]
    mixture = {"source": "mixture", "mixture": tables}
    (line,) = said(tasks("sums", "5"), reward={"type": "match"}, data=mixture)
    assert "on sums copying" in line
    tables[0]["reward"] = "match"
    assert said(tasks("sums", "5"), reward={"type": "math"}, data=mixture) == []
