"""Reward match: the last balanced box, against a naive twin, and every real reference."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrain.rewards.match import Match, last_boxed
from retrain.types import Message, Rollout, Task


def rollout(text: str) -> Rollout:
    ids, sampled, logprobs = (
        np.array([1, 2], np.int32),
        np.array([False, True]),
        np.array([np.nan, -1], np.float32),
    )
    return Rollout("t", 0, ids, sampled, logprobs, None, text, "stop", 0)


def score(text: str, reference: str):
    task = Task("t", (Message("user", "q"),), reference, "s", 0)
    return asyncio.run(Match().score(task, [rollout(text)]))[0]


@pytest.mark.parametrize(
    ("text", "box"),
    [
        (r"so \boxed{5}", "5"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{1} then \boxed{2", "1"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\fbox{7}", "7"),
        (r"\boxed {7}", "7"),
        (r"$\boxed 5$", "5"),
        (r"\boxed 5.", "5"),
        (r"\boxed -1,234.5.", "-1,234.5"),
        (r"\boxed \frac{1}{2}$", r"\frac{1}{2}"),
        (r"\boxed A.", "A"),
        (r"\boxed{ 5 }", " 5 "),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{a\\}", r"a\\"),
        (r"\\boxed{5}", "5"),
        (r"\boxed{}", ""),
        (r"} \boxed{5} {", "5"),
        (r"\boxed\boxed{5", None),
        (r"the \boxed command", None),
        (r"\boxed", None),
        (r"\boxed{5", None),
        (r"\boxedx{5}", None),
        ("boxed{5}", None),
        ("", None),
    ],
)
def test_the_last_box(text, box):
    assert last_boxed(text) == box


def naive_last_boxed(text: str) -> str | None:
    """Look at every place where a box could begin, the last first, and walk to its closing brace."""
    for at in range(len(text) - 1, -1, -1):
        for word in ("\\boxed", "\\fbox"):
            begin = at + len(word)
            if not text.startswith(word, at) or text[begin : begin + 1].isalpha():
                continue
            while text[begin : begin + 1].isspace():
                begin += 1
            if text[begin : begin + 1] in ("4", "7"):
                return text[begin]
            if text[begin : begin + 1] != "{":
                continue
            i, depth = begin + 1, 1
            while i < len(text):
                pair = text[i : i + 2]
                boxed_next = text.startswith(("boxed", "fbox"), i + 2)
                if pair in ("\\{", "\\}") or (pair == "\\\\" and not boxed_next):
                    i += 2
                    continue
                depth += {"{": 1, "}": -1}.get(text[i], 0)
                if depth == 0:
                    return text[begin + 1 : i]
                i += 1
    return None


PIECES = st.sampled_from(
    ["\\boxed", "\\boxed{", "\\fbox{", "{", "}", "\\", " ", "4", "\n", "é", "\\boxed 7 "]
)


@settings(max_examples=1500, deadline=None)
@given(st.lists(PIECES, max_size=14).map("".join).filter(lambda t: "44" not in t))
def test_boxes_against_a_naive_twin(text):
    assert last_boxed(text) == naive_last_boxed(text)


def test_many_unclosed_boxes_are_one_pass():
    import time

    started = time.perf_counter()
    assert last_boxed("\\boxed{" * 20_000) is None
    assert last_boxed("\\boxed " * 20_000 + "{" * 50_000) is None
    assert time.perf_counter() - started < 2


def test_a_match_is_equality_after_trimming():
    assert score(r"\boxed{ 5 }", "5 ").reward == 1.0
    assert score(r"\boxed{ 5 }", "5 ").passed is True
    assert score(r"\boxed{5.0}", "5").reward == 0.0
    assert score(r"5", "5").passed is False


@pytest.mark.parametrize("reference", ["", "  "])
def test_an_empty_reference_is_never_matched(reference):
    assert score(r"\boxed{}", reference).passed is False
    assert score(r"\boxed{ }", reference).passed is False


@pytest.mark.shared_data
def test_every_gsm8k_reference_passes(shared):
    from types import SimpleNamespace

    from retrain.environments.hub_sources import gsm8k

    data = SimpleNamespace(path=str(shared / "data" / "gsm8k"), instruction="", system="")
    tasks = gsm8k(data, "train")
    assert len(tasks) == 7473
    assert len(gsm8k(data, "test")) == 1319
    for task in tasks:
        assert last_boxed(f"Reasoning \\boxed{{x}}. So \\boxed{{{task.reference}}}.") == task.reference
        float(task.reference)


@pytest.mark.shared_data
def test_every_math_solution_gives_its_answer(shared):
    import json

    rows = [json.loads(r) for r in (shared / "data" / "math" / "math_train.jsonl").read_text().splitlines()]
    wrong = [
        r
        for r in rows
        if r["answer"].strip() and (last_boxed(r["solution"]) or "").strip() != r["answer"].strip()
    ]
    assert not wrong
