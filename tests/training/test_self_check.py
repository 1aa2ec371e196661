"""The references of the data, judged by the rewards: real data, rewards that refuse, rewards that break."""

from __future__ import annotations

import asyncio

import pytest

from retrain.config.schema import Data
from retrain.environments.sources import load_tasks
from retrain.rewards.match import Match
from retrain.training.self_check import check_references
from retrain.types import Message, Score, Task


def task(reference: str, name: str = "t/0", **info) -> Task:
    return Task(name, (Message("user", "q"),), reference, "t", 0, info)


def check(tasks, reward, reward_type="match", **options):
    return asyncio.run(check_references(tasks, reward, reward_type, **options))


@pytest.mark.shared_data
def test_match_accepts_every_reference_of_gsm8k(shared):
    found = load_tasks(Data(source="gsm8k", path=str(shared / "data" / "gsm8k")), "test")
    report = check(found, Match())
    assert report.ok
    assert (report.tasks, report.accepted, report.without_reference) == (1319, 1319, 0)
    assert report.lines() == ["The reward accepts 1319 of 1319 references."]


def test_what_is_refused_fails_or_has_no_reference_is_told_apart():
    class Odd(Match):
        async def score(self, task, rollouts_G):
            if task.reference == "broken":
                return [Score.failed("Traceback\nno judge") for _ in rollouts_G]
            return await super().score(task, rollouts_G)

    report = check([task("1"), task("{", "t/1"), task("broken", "t/2"), task(" ", "t/3")], Odd())
    assert not report.ok
    assert (report.tasks, report.accepted, report.without_reference) == (4, 1, 1)
    assert [(f.task_id, f.reward) for f in report.refused] == [("t/1", 0.0)]
    assert [(f.task_id, f.reward) for f in report.failed] == [("t/2", None)]
    assert report.lines() == [
        "The reward accepts 1 of 3 references.",
        "1 tasks have no reference: only their own scorer can judge them.",
        "refused: t/1 with '{' (reward 0).",
        "could not be scored: t/2 with 'broken' (no judge).",
    ]
    many = check([task("{", f"t/{i}") for i in range(8)], Match())
    assert many.lines()[-1] == "refused: 3 more."


@pytest.mark.parametrize(
    ("accepts", "reward_type"),
    [("7", "custom"), ("\\boxed{7}", "custom"), ("<answer>7</answer>", "my.reward"), ("\\boxed{7}", "math")],
)
def test_one_form_of_the_reference_is_enough(accepts, reward_type):
    class Picky:
        async def score(self, task, rollouts_G):
            return [Score(float(r.text == accepts)) for r in rollouts_G]

    assert check([task("7")], Picky(), reward_type).ok


def test_generated_tasks_are_answered_in_tags_and_numbers_have_a_threshold():
    seen = []

    class Half:
        async def score(self, task, rollouts_G):
            seen.extend(r.text for r in rollouts_G)
            return [Score(0.4) for _ in rollouts_G]

    made = task("3", recipe={"generator": "gcd"})
    assert not check([made], Half(), "reasoning_gym").ok
    assert seen[0] == "<answer>3</answer>"
    assert check([made], Half(), "reasoning_gym", threshold=0.3).ok


def test_sources_have_rewards_of_their_own_and_progress_is_told():
    seen, told = {}, []

    class Any(Match):
        async def score(self, task, rollouts_G):
            seen[task.id] = [r.text for r in rollouts_G]
            return [Score(1.0) for _ in rollouts_G]

    tasks = [task("1"), Task("m/0", (Message("user", "q"),), "2", "m", 0), task("", "t/2")]
    options = {"by_source": {"m": "match"}, "progress": lambda done, of: told.append((done, of))}
    assert check(tasks, Any(), "custom", **options).accepted == 2
    assert seen == {"t/0": ["1", "\\boxed{1}", "<answer>1</answer>"], "m/0": ["\\boxed{2}"]}
    assert sorted(told) == [(1, 3), (2, 3), (3, 3)]


def test_at_most_eight_tasks_are_scored_at_once():
    running, most = 0, []

    class Slow(Match):
        async def score(self, task, rollouts_G):
            nonlocal running
            running += 1
            most.append(running)
            await asyncio.sleep(0.001)
            running -= 1
            return [Score(1.0) for _ in rollouts_G]

    assert check([task("1", f"t/{i}") for i in range(30)], Slow()).ok
    assert max(most) == 8
