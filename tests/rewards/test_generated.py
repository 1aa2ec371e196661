"""Reward reasoning_gym: the generator's own judgement, of every generator, in a process that can be killed."""

from __future__ import annotations

import importlib.util
import json
import math
import time
import warnings

import pytest

from retrain.errors import ConfigError
from retrain.rewards import generated

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    gym = pytest.importorskip("reasoning_gym")
    from retrain.rewards import generated_child


def task_of(generator: str, index: int = 1, **config):
    config = {"size": 4, "seed": 7, **config}
    entry = gym.create_dataset(generator, **config)[index]
    recipe = {"generator": generator, "config": config, "index": index}
    reference = "" if entry["answer"] is None else str(entry["answer"])
    return reference, {"recipe": recipe}, entry


@pytest.fixture(scope="module")
def reward(make_config):
    made = generated.build(make_config(reward={"type": "reasoning_gym"}), None)
    yield made
    made.close()
    made.close()


@pytest.mark.parametrize("generator", ["chain_sum", "spell_backward", "gcd", "propositional_logic"])
def test_the_generator_judges(reward, score_all, generator):
    reference, info, entry = task_of(generator)
    answer = reference or str(entry["metadata"]["example_answer"])
    texts = [
        f"I think <answer> {answer} </answer>",
        f"It is \\boxed{{{answer}}}.",
        f"so\n{answer}\n",
        "no idea",
    ]
    *right, wrong = score_all(reward, reference, *texts, info=info)
    assert [(s.error, s.reward, s.passed) for s in right] == [("", 1.0, True)] * 3
    assert (wrong.error, wrong.passed) == ("", False)
    assert 0.0 <= wrong.reward < 0.3
    assert reward.bounds == (0.0, 1.0)


def test_half_an_answer_earns_its_part_and_does_not_pass(reward, score_all):
    reference, info, entry = task_of("spell_backward")
    close = reference[:-1] + ("x" if reference[-1] != "x" else "y")
    (got,) = score_all(reward, reference, f"<answer>{close}</answer>", info=info)
    direct = gym.create_dataset("spell_backward", size=4, seed=7).score_answer(close, entry)
    assert got.reward == pytest.approx(direct)
    assert 0.0 < got.reward < 1.0
    assert got.passed is False


@pytest.mark.parametrize("text", ["I do not know", "2 x three", "²"])
def test_an_exception_of_the_generator_is_an_error_and_no_zero(reward, score_all, text):
    reference, info, entry = task_of("prime_factorization")
    with pytest.raises(ValueError, match="invalid literal"):
        gym.create_dataset("prime_factorization", size=4, seed=7).score_answer(text, entry)
    wrong, right = score_all(reward, reference, f"<answer>{text}</answer>", f"<answer>{reference}</answer>", info=info)
    assert "ValueError: invalid literal" in wrong.error
    assert math.isnan(wrong.reward)
    assert (right.error, right.reward) == ("", 1.0)


class Broken:
    """A data set whose scoring raises, always or for all answers but the reference."""

    def __init__(self, error: Exception, *, always: bool, answer="5", value=1.0):
        self.error, self.always, self.answer, self.value = error, always, answer, value

    def __getitem__(self, index):
        return {"question": "q", "answer": self.answer, "metadata": {}}

    def score_answer(self, answer, entry):
        if self.always or answer != "5":
            raise self.error
        return self.value


@pytest.fixture
def child(monkeypatch):
    def with_dataset(dataset, answer: str, reference="5", **info):
        monkeypatch.setattr(generated_child, "_made", lambda g, c, i: dataset[i])
        monkeypatch.setattr(generated_child, "_dataset", lambda g, c: dataset)
        recipe = {"generator": "g", "config": {}, "index": 0}
        return generated_child.score(answer, reference, {"recipe": recipe, **info})

    return with_dataset


@pytest.mark.parametrize("error", [ValueError("x"), KeyError("x"), ZeroDivisionError(), MemoryError(), OSError("disk")])
def test_every_exception_goes_on(child, error):
    assert child(Broken(error, always=False), "5") == 1.0
    with pytest.raises(type(error)):
        child(Broken(error, always=False), "six")


@pytest.mark.parametrize("value", [1.5, -0.1, float("nan")])
def test_a_score_outside_the_promised_range_is_an_error(child, value):
    with pytest.raises(RuntimeError, match="outside"):
        child(Broken(ValueError(), always=False, value=value), "5")


def test_a_task_that_is_made_differently_here_is_not_scored_by_the_wrong_answer(child):
    dataset = Broken(ValueError(), always=False)
    with pytest.raises(RuntimeError, match=r"made another task here.*PYTHONHASHSEED"):
        child(dataset, "5", reference="7")
    seen = []
    dataset.score_answer = lambda answer, entry: seen.append(entry) or 0.5
    assert child(dataset, "5", reference="7", entry={"question": "q", "answer": "7", "metadata": {}}) == 0.5
    assert seen[0]["answer"] == "7"


def test_outer_spaces_of_an_answer_do_not_count(child):
    seen = []
    dataset = Broken(ValueError(), always=False, answer="  5 ")
    dataset.score_answer = lambda answer, entry: seen.append(answer) or 1.0
    assert child(dataset, "5", reference="  5 ") == 1.0
    assert seen == ["  5 "]


def test_tasks_that_depend_on_the_hash_seed_are_the_sources_own(reward, score_all, make_config):
    from retrain.environments.procedural import reasoning_gym

    names = ("isomorphic_strings", "polynomial_multiplication", "ransom_note")
    data = make_config(
        data={"source": "reasoning_gym", "generators": {n: {} for n in names}, "size": 6},
        reward={"type": "reasoning_gym"},
    ).data
    for task in reasoning_gym(data, "train"):
        info = {"recipe": task.info["recipe"]}  # without the entry: it must be made again, alike
        (got,) = score_all(reward, task.reference, f"<answer>{task.reference}</answer>", info=info)
        assert (got.error, got.reward) == ("", 1.0)


def test_a_task_of_another_source_is_an_error(reward, score_all):
    for info in ({}, {"recipe": None}, {"recipe": {"generator": "gcd"}}, {"recipe": "gcd"}):
        (failed,) = score_all(reward, "5", "5", info=info)
        assert failed.error == "task 't/0' was not made by a generator of reasoning_gym"


def test_an_unknown_generator_is_an_error_with_its_traceback(reward, score_all):
    info = {"recipe": {"generator": "no_such", "config": {"seed": 1, "size": 1}, "index": 0}}
    (failed,) = score_all(reward, "5", "5", info=info)
    assert "no_such" in failed.error
    assert "no_such" in reward.first_traceback


def test_a_hang_is_cut_at_the_deadline(make_config, score_all):
    reward = generated.build(make_config(reward={"type": "reasoning_gym", "timeout_s": 0.5}), None)
    try:
        reference, info, _ = task_of("gcd")
        assert score_all(reward, reference, reference, info=info)[0].reward == 1.0
        # The generator factors by trial division, and this number is a prime.
        prime = {"min_value": 10**18 + 9, "max_value": 10**18 + 9, "seed": 1, "size": 1}
        endless = {"recipe": {"generator": "prime_factorization", "config": prime, "index": 0}}
        started = time.monotonic()
        (failed,) = score_all(reward, "?", "x", info=endless)
        assert time.monotonic() - started < 5
        assert failed.error == "no result within reward.timeout_s = 0.5 seconds"
        assert score_all(reward, reference, reference, info=info)[0].reward == 1.0
    finally:
        reward.close()


def test_a_missing_package_is_one_line(make_config, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n == "reasoning_gym" else find(n, *a)
    )
    with pytest.raises(ConfigError, match=r'reasoning-gym.*pip install "retrain\[tasks\]"') as caught:
        generated.build(make_config(reward={"type": "reasoning_gym"}), None)
    assert "\n" not in str(caught.value)


JUNK = ("", "I do not know", "{", "[1, 2", "-1", "1/0", "1 2\n3 4", '{"a": 1}', "²", "nan", "(" * 300)
SLOW = {"composite", "knight_swap", "arc_agi", "rearc", "codeio", "figlet_font", "intermediate_integration"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_generator_scores_its_own_answer_and_junk_never_as_right():
    from reasoning_gym.factory import DATASETS

    assert len(DATASETS) > 100
    wrong, raising = [], set()
    for name in sorted(set(DATASETS) - SLOW):
        reference, info, entry = task_of(name, size=2)
        info = json.loads(json.dumps(info))
        for text in JUNK:
            try:
                assert 0.0 <= generated_child.score(text, reference, info) <= 1.0
            except Exception:  # noqa: BLE001  what a generator raises is for the reward an error
                raising.add(name)
        if entry["answer"] is not None and generated_child.score(entry["answer"], reference, info) < 1.0:
            wrong.append(name)
    assert wrong == []
    assert "prime_factorization" in raising
    assert len(raising) < 12, raising
