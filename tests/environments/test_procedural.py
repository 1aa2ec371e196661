"""Generated tasks: every generator, the same tasks in every process, splits that do not overlap, mistakes by name."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from retrain.config.schema import Data
from retrain.environments import procedural
from retrain.environments.procedural import INSTRUCTION
from retrain.environments.sources import digest_of, load_tasks
from retrain.errors import DataError
from retrain.types import Message

pytest.importorskip("reasoning_gym")

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "generator_check.py"
SUMS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
UNSTEADY = ("isomorphic_strings", "polynomial_multiplication", "ransom_note", "word_ladder")
"""Generators whose entries depend on the process's hash seed."""
WITHOUT_ANSWER = ("boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour")


def data(size=12, seed=0, **generators) -> Data:
    return Data(source="reasoning_gym", generators=generators, size=size, seed=seed)


def test_a_task_holds_what_makes_and_scores_it():
    import reasoning_gym

    (task, *_) = found = load_tasks(data(size=5, chain_sum={"max_terms": 3}), "train")
    assert len(found) == 5
    recipe, entry = task.info["recipe"], task.info["entry"]
    made = reasoning_gym.create_dataset(recipe["generator"], **recipe["config"])
    again = made[recipe["index"]]
    assert (entry["question"], entry["answer"]) == (again["question"], again["answer"])
    assert task.reference == again["answer"]
    assert made.score_answer(task.reference, again) == 1.0
    assert task.messages == (Message("user", f"{again['question']}\n{INSTRUCTION}"),)
    assert task.id == f"reasoning_gym/train/chain_sum/{recipe['index']}"
    assert recipe["config"]["max_terms"] == 3
    json.dumps(dict(task.info))


def test_weights_are_exact_proportions_and_interleaved():
    found = load_tasks(data(size=16, chain_sum={"weight": 5}, gcd={"weight": 2.0}, count_bits={}), "train")
    names = [t.info["recipe"]["generator"] for t in found]
    assert {n: names.count(n) for n in set(names)} == {"chain_sum": 10, "gcd": 4, "count_bits": 2}
    assert {n: names[:8].count(n) for n in set(names)} == {"chain_sum": 5, "gcd": 2, "count_bits": 1}


def test_splits_and_seeds_hold_other_questions():
    def questions(split, seed=0):
        found = load_tasks(data(size=60, seed=seed, chain_sum=SUMS), split)
        asked = [t.messages for t in found]
        assert len(set(asked)) == len(asked)
        return set(asked)

    train, test = questions("train"), questions("test")
    assert len(train) == len(test) == 60  # of 200 there are
    assert not train & test
    assert not train & questions("validation")
    assert len(train & questions("train", seed=1)) < 40


def test_where_questions_run_out_it_says_so(caplog):
    assert 90 < len(load_tasks(data(size=150, chain_sum=SUMS), "train")) <= 150
    left = load_tasks(data(size=150, chain_sum=SUMS), "test")
    assert 0 < len(left) <= 60
    assert (
        "questions for the split test instead of 150: the others repeat or are training tasks" in caplog.text
    )
    with pytest.raises(DataError, match="every question of the split test is a training task"):
        load_tasks(data(size=1000, chain_sum=SUMS), "test")


def test_the_tasks_are_the_same_in_every_process():
    code = (
        "from retrain.config.schema import Data\nfrom retrain.environments.sources import digest_of, load_tasks\n"
        f"names = {UNSTEADY!r}\n"
        "d = Data(source='reasoning_gym', generators={n: {} for n in names}, size=8)\n"
        "print(digest_of(load_tasks(d, 'train')))"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    here = load_tasks(data(size=8, **{name: {} for name in UNSTEADY}), "train")
    assert said == {f"{digest_of(here)}\n".encode()}


def test_tasks_without_a_reference_stay():
    found = load_tasks(data(size=5, **{name: {} for name in WITHOUT_ANSWER}), "train")
    assert [t.info["recipe"]["generator"] for t in found] == list(WITHOUT_ANSWER)
    assert all(t.reference == "" and t.info["entry"]["answer"] is None for t in found)


@pytest.mark.parametrize(
    ("generators", "said"),
    [
        ({}, "needs data.generators"),
        ({"chain_sm": {}}, "no generator 'chain_sm'. Fix: did you mean 'chain_sum'"),
        ({"composite": {}}, "no generator 'composite'"),
        (
            {"chain_sum": {"mn_terms": 2}},
            "chain_sum has no setting 'mn_terms'. Fix: did you mean 'min_terms'",
        ),
        ({"chain_sum": {"min_terms": 0}}, "chain_sum: min_terms must be positive"),
        ({"chain_sum": {"seed": 3}}, "chain_sum.seed is not the generator's own here. Fix: set data.seed"),
        ({"chain_sum": {"weight": 0}}, "chain_sum.weight is 0"),
        ({"chain_sum": {"weight": "2"}}, "chain_sum.weight is '2'"),
        ({"chain_sum": 3}, "chain_sum is 3, not a table"),
    ],
)
def test_mistakes_are_named(generators, said):
    with pytest.raises(DataError) as caught:
        load_tasks(Data(source="reasoning_gym", generators=generators, size=3), "train")
    assert said in str(caught.value)
    assert caught.value.fix


def test_without_the_package_it_names_the_install_line(monkeypatch):
    monkeypatch.setattr(procedural.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r'pip install "retrain\[tasks\]"'):
        load_tasks(data(size=3, chain_sum={"max_terms": 5}), "train")


def test_a_child_that_dies_is_one_line(monkeypatch):
    monkeypatch.setattr(procedural.sys, "executable", "/bin/false")
    with pytest.raises(DataError, match="reasoning_gym failed: its process ended with 1"):
        load_tasks(data(size=3, chain_sum={"max_terms": 6}), "train")


SAMPLE = (
    "arc_1d", "basic_arithmetic", "boxnet", "countdown", "dice", "figlet_font", "gcd", "group_anagrams", "jugs",
    "knights_knaves", "list_functions", "number_sequence", "rearc", "rotate_matrix", "spell_backward", "word_ladder",
)  # fmt: skip


def test_a_sample_of_generators_loads_and_scores_its_own_answers():
    check = runpy.run_path(str(SCRIPT))["check"]
    found = check(SAMPLE, 2)
    assert {name: row["verdict"] for name, row in found.items()} == {
        name: "no answer" if name in WITHOUT_ANSWER else "ok" for name in SAMPLE
    }


@pytest.mark.slow
def test_every_generator_loads_and_scores_its_own_answers():
    made = runpy.run_path(str(SCRIPT))
    names = made["names"]()
    assert len(names) == 105
    found = made["check"](names, 2)
    assert {n for n, row in found.items() if row["verdict"] == "no answer"} == set(WITHOUT_ANSWER)
    assert {n for n, row in found.items() if row["verdict"] == "ok"} == set(names) - set(WITHOUT_ANSWER)
