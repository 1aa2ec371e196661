"""The arithmetic problems: right answers, splits that never overlap, the same problems everywhere."""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import subprocess
import sys

import pytest

from retrain.environments.arithmetic import LEVELS, SPLITS, TINY_INSTRUCTION, Problem, problems

ALL = {(level, split): problems([level], split) for level in LEVELS for split in SPLITS}


def _fact(problem: Problem) -> tuple[str, tuple[int, ...]]:
    """What is asked, regardless of the order of commuting operands."""
    numbers = [int(n) for n in re.findall(r"\d+", problem.question)]
    operators = "".join(re.findall(r"[-+*]", problem.question))
    if operators != "-":
        numbers[:2] = sorted(numbers[:2])
    return operators, tuple(numbers)


def test_splits_do_not_overlap_at_any_level() -> None:
    facts = {split: {_fact(p) for level in LEVELS for p in ALL[level, split]} for split in SPLITS}
    ids = {split: {p.id for level in LEVELS for p in ALL[level, split]} for split in SPLITS}
    for one, other in itertools.combinations(SPLITS, 2):
        assert not facts[one] & facts[other]
        assert not ids[one] & ids[other]


@pytest.mark.parametrize("level", LEVELS)
def test_splits_are_about_80_10_10(level: int) -> None:
    counts = [len(ALL[level, split]) for split in SPLITS]
    slack = 0.1 if level == 1 else 0.02  # 155 problems do not come out even
    for count, share in zip(counts, (0.8, 0.1, 0.1), strict=True):
        assert abs(count / sum(counts) - share) < slack


def test_level_sizes() -> None:
    totals = [sum(len(ALL[level, split]) for split in SPLITS) for level in LEVELS]
    assert totals[:2] == [155, 12195]
    assert 13_000 < totals[2] < 15_000
    assert totals[3] == 16_200
    assert len(ALL[2, "test"]) >= 256
    assert len(ALL[2, "validation"]) >= 256


@pytest.mark.parametrize("level", LEVELS)
def test_answers_are_right_and_never_negative(level: int) -> None:
    for problem in itertools.chain.from_iterable(ALL[level, split] for split in SPLITS):
        left, _, right = problem.question.partition(" = ")
        assert right == "?"
        tokens = left.split()
        value = int(tokens[0])
        for operator, number in zip(tokens[1::2], map(int, tokens[2::2]), strict=True):
            value = {"+": value + number, "-": value - number, "*": value * number}[operator]
        assert problem.answer == str(value)
        assert value >= 0
        assert problem.level == level


def test_digits_grow_with_the_level() -> None:
    for level, (low, high) in {1: (0, 9), 2: (10, 99), 3: (100, 999), 4: (10, 99)}.items():
        numbers = {int(n) for p in ALL[level, "train"] for n in re.findall(r"\d+", p.question)}
        assert min(numbers) == low
        assert max(numbers) == high


def test_a_prefix_is_a_fair_sample() -> None:
    first = problems([2], "test")[:256]
    assert 0.5 < sum("+" in p.question for p in first) / 256 < 0.83
    assert 35 < sum(int(p.question.split()[0]) for p in first) / 256 < 80


def test_levels_mix_and_repeats_count_once() -> None:
    mixed = problems([2, 1, 2], "test")
    assert len(mixed) == len(ALL[1, "test"]) + len(ALL[2, "test"])
    assert len({p.id for p in mixed}) == len(mixed)
    assert list(mixed) == list(problems((1, 2), "test"))


def _digest() -> str:
    joined = "\n".join(f"{p.id} {p.question} {p.answer}" for p in problems(LEVELS, "test"))
    return hashlib.sha256(joined.encode()).hexdigest()


def test_the_same_problems_under_another_hash_seed() -> None:
    code = (
        "import hashlib; from retrain.environments.arithmetic import LEVELS, problems; "
        "print(hashlib.sha256('\\n'.join(f'{p.id} {p.question} {p.answer}' "
        "for p in problems(LEVELS, 'test')).encode()).hexdigest())"
    )
    env = {**os.environ, "PYTHONHASHSEED": "12345"}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == _digest()


def test_published_problems_stay_as_they_are() -> None:
    # Held-out accuracies are only comparable over versions while this holds.
    assert _digest() == "2ae47a08638360b8b7fea8ccda693ba9dd1d210dfe5b69a7e48cce515302ac4c"


@pytest.mark.parametrize(("levels", "split"), [([2], "dev"), ([5], "test"), ([], "test"), ([0, 1], "train")])
def test_unknown_levels_and_splits_are_named(levels: list[int], split: str) -> None:
    with pytest.raises(ValueError, match=r"split|level"):
        problems(levels, split)


def test_the_instruction_asks_for_a_box() -> None:
    assert "\\boxed{}" in TINY_INSTRUCTION
