"""Evaluation's numbers: the clustered interval and pass@k."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from retrain.errors import DataError
from retrain.sinks import evaluation_line
from retrain.training import build
from retrain.training.evaluate import Evaluator, Suites, interval, macro_average, noise_number, pass_at_k
from retrain.training.metrics import rollout_metrics
from retrain.training.rollout import Collected, EventLoop
from retrain.types import Message, NoiseKey, Rollout, Sampling, Score, ScoredGroup, Task


def test_with_one_sample_per_task_it_is_the_wilson_interval():
    for correct, n in ((3, 20), (0, 12), (12, 12), (100, 256)):
        marks = [[i < correct] for i in range(n)]
        p, low, high = interval(marks)
        # The variance of the mean uses n - 1, so the interval is Wilson's with one draw fewer, except at the ends.
        size = n if correct in (0, n) else n - 1
        z = stats.norm.ppf(0.975)
        centre = (p + z * z / (2 * size)) / (1 + z * z / size)
        half = z * np.sqrt(p * (1 - p) / size + z * z / (4 * size * size)) / (1 + z * z / size)
        assert (low, high) == pytest.approx((max(0, centre - half), min(1, centre + half)), abs=1e-12)


def test_repeating_the_same_answers_does_not_narrow_it():
    rng = np.random.default_rng(0)
    single = [[bool(x)] for x in rng.random(80) < 0.4]
    repeated = [marks * 8 for marks in single]
    assert interval(repeated) == pytest.approx(interval(single))


def test_independent_samples_do_narrow_it():
    rng = np.random.default_rng(1)
    wide = interval([[bool(x)] for x in rng.random(80) < 0.4])
    narrow = interval([(rng.random(16) < 0.4).tolist() for _ in range(80)])
    assert narrow[2] - narrow[1] < 0.5 * (wide[2] - wide[1])


def test_coverage_with_clusters():
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(400):
        rates = rng.beta(1.2, 1.8, 60)
        _p, low, high = interval([(rng.random(4) < r).tolist() for r in rates])
        covered += low <= 1.2 / 3.0 <= high
    assert 0.92 <= covered / 400 <= 0.98


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 7).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_equals_counting_every_subset(case):
    n, c, k = case
    marks = [i < c for i in range(n)]
    subsets = list(itertools.combinations(marks, k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(any(s) for s in subsets) / len(subsets))


def test_a_task_keeps_its_noise_wherever_it_stands():
    assert noise_number("arithmetic/test/3") == noise_number("arithmetic/test/3")
    assert noise_number("arithmetic/test/3") != noise_number("arithmetic/test/4")
    assert 0 <= noise_number("x") < 2**56


def test_the_average_of_suites_has_an_interval_between_theirs():
    one, other = (0.2, 0.1, 0.35), (0.8, 0.65, 0.9)
    mean, low, high = macro_average([one, other])
    assert mean == pytest.approx(0.5)
    assert (low, high) == pytest.approx((0.5 - np.hypot(0.1, 0.15) / 2, 0.5 + np.hypot(0.15, 0.1) / 2))
    assert macro_average([one]) == pytest.approx(one)
    assert macro_average([(0.0, 0.0, 0.1), (1.0, 0.9, 1.0)])[1:] == pytest.approx((0.45, 0.55))


def test_the_average_of_suites_covers():
    rng = np.random.default_rng(3)
    covered = 0
    for _ in range(400):
        parts = [
            interval([[bool(x)] for x in rng.random(n) < p]) for n, p in ((40, 0.15), (80, 0.5), (60, 0.9))
        ]
        _mean, low, high = macro_average(parts)
        covered += low <= (0.15 + 0.5 + 0.9) / 3 <= high
    assert 0.92 <= covered / 400 <= 0.985


class Answers:
    """Says the reference on members below the number in ``task.info``, else something wrong."""

    async def attempt(self, task, n, engine, sampling):
        asked.append((task.id, sampling.temperature, sampling.noise.seed, n))
        return [rollout(task, m, task.reference if m < task.info["right"] else "wrong") for m in range(n)]


asked: list[tuple] = []


def rollout(task, member, text):
    return Rollout(
        task_id=task.id, member=member, token_ids_T=np.zeros(2, dtype=np.int32), sampled_T=np.array([False, True]),
        logprobs_T=np.array([np.nan, 0.0], dtype=np.float32), entropies_T=None, text=text, stop="stop", weights_version=0,
    )  # fmt: skip


class Equal:
    async def score(self, task, rollouts_G):
        return [
            Score.failed("broken")
            if task.info.get("broken", 99) == r.member
            else Score(float(r.text == task.reference))
            for r in rollouts_G
        ]


def evaluator(name, prefix, right, samples=4, temperature=1.0, **info):
    tasks = tuple(
        Task(f"{name}/{i}", (Message("user", "q"),), "1", name, 0, {"right": r, **info})
        for i, r in enumerate(right)
    )
    sampling = Sampling(temperature, 1.0, 8, (0,), (), False, NoiseKey(0, 0, 0))
    return Evaluator(tasks, samples, sampling, 5, None, name, prefix)


@pytest.fixture
def run():
    events = EventLoop()

    def go(made):
        asked.clear()
        return made.run(events, Answers(), Equal(), None, deadline_s=30, max_error_rate=0.5)

    yield go
    events.close()


def test_suites_share_one_row_with_the_main_evaluation(run):
    main = evaluator("main/test", "eval", [4, 2, 0])
    suites = (
        evaluator("hard", "eval/hard", [1, 0], samples=2, temperature=0.5),
        evaluator("easy", "eval/easy", [1, 1], samples=1),
    )
    row, errors = run(Suites(main, suites))
    assert errors == 0
    assert row["eval/source"] == "main/test"
    assert row["eval/accuracy"] == row["eval/mean@4"] == row["eval/pass@1"] == pytest.approx(0.5)
    assert row["eval/pass@4"] == pytest.approx(2 / 3)
    assert (row["eval/hard/accuracy"], row["eval/hard/mean@2"], row["eval/hard/pass@2"]) == (0.25, 0.25, 0.5)
    assert (row["eval/easy/accuracy"], row["eval/easy/tasks"], row["eval/easy/samples"]) == (1.0, 2, 1)
    assert "eval/hard/mean@4" not in row
    assert {(i.split("/")[0], t, s, n) for i, t, s, n in asked} == {
        ("main", 1.0, 5, 4), ("hard", 0.5, 5, 2), ("easy", 1.0, 5, 1),
    }  # fmt: skip
    untimed = {k: v for k, v in row.items() if not k.endswith("time_s")}
    assert untimed == {k: v for k, v in run(Suites(main, suites))[0].items() if not k.endswith("time_s")}
    alone, _ = run(main)
    assert {k: v for k, v in alone.items() if k != "eval/time_s"}.items() <= row.items()
    lines = evaluation_line(3, row).splitlines()
    assert [line.partition("]")[0] for line in lines] == [
        "Eval after 3 steps [main/test, 3 tasks x 4",
        "Eval after 3 steps [hard, 2 tasks x 2",
        "Eval after 3 steps [easy, 2 tasks x 1",
    ]


def test_suites_alone_are_averaged_whatever_their_sizes(run):
    made = Suites(None, (evaluator("a", "eval/a", [4] * 9), evaluator("b", "eval/b", [0], broken=0)))
    row, errors = run(made)
    assert row["eval/accuracy"] == pytest.approx(0.5)
    assert row["eval/accuracy_low"] < 0.5 < row["eval/accuracy_high"]
    assert (row["eval/source"], row["eval/tasks"], row["eval/samples"]) == ("mean of a, b", 10, 4)
    assert errors == row["eval/errors"] == row["eval/b/errors"] == 1
    assert row["eval/b/mean@4"] is None  # no task has all four samples
    assert row["eval/b/pass@2"] == 0.0
    assert evaluation_line(0, row).startswith(
        "Eval after 0 steps [mean of a, b, 10 tasks x 4] | accuracy=50.0%"
    )
    assert len(made.tasks) == 10


def test_a_configuration_makes_its_suites(make_config):
    class Renderer:
        stop_ids = (0,)

    suites = [
        {
            "source": "arithmetic",
            "name": "easy",
            "levels": [1],
            "examples": 7,
            "samples": 2,
            "temperature": 0.25,
        },
        {"source": "arithmetic", "levels": [3], "split": "validation", "examples": 5},
    ]
    config = make_config(eval={"source": "arithmetic", "examples": 6, "suites": suites, "seed": 3})
    made = build.evaluator(config, Renderer())
    assert isinstance(made, Suites)
    assert made.main is not None
    assert [
        (e.name, e.prefix, len(e.tasks), e.samples, e.sampling.temperature, e.seed)
        for e in (made.main, *made.suites)
    ] == [
        ("arithmetic/test", "eval", 6, 1, 1.0, 3),
        ("easy", "eval/easy", 7, 2, 0.25, 3),
        ("arithmetic", "eval/arithmetic", 5, 1, 1.0, 3),
    ]
    assert all(t.source == "easy" and t.id.startswith("easy/test/1/") for t in made.suites[0].tasks)
    only = build.evaluator(make_config(eval={"suites": suites}), Renderer())
    assert isinstance(only, Suites)
    assert only.main is None
    assert build.evaluator(make_config(), Renderer()) is None
    assert isinstance(build.evaluator(make_config(eval={"source": "arithmetic"}), Renderer()), Evaluator)
    wrong = make_config(eval={"suites": [{"source": "jsonl", "name": "x", "path": "none.jsonl"}]})
    with pytest.raises(DataError, match=r"eval\.suites 'x': path = 'none\.jsonl': there is no such file"):
        build.evaluator(wrong, Renderer())


def test_a_mixtures_sources_have_curves_of_their_own():
    def scored(label, *scores):
        task = Task(f"{label}/0", (Message("user", "q"),), "1", label, 0)
        return ScoredGroup(task, tuple(rollout(task, i, "") for i in range(len(scores))), scores)

    got = Collected(
        (
            scored("a", Score(1.0), Score(0.0)),
            scored("a", Score(1.0), Score.failed("x")),
            scored("b", Score(3.0), Score(5.0)),
        ),
        1.0,
        1.0,
    )
    row = rollout_metrics(got, ("a", "b", "c"))
    assert row["sources/a/mean_reward"] == row["sources/a/correct_rate"] == pytest.approx(2 / 3)
    assert row["sources/a/groups"] == 2
    assert (row["sources/b/mean_reward"], row["sources/b/correct_rate"]) == (4.0, None)
    assert rollout_metrics(got, ("b",), 4.0)["sources/b/correct_rate"] == 0.5
    assert (row["sources/c/mean_reward"], row["sources/c/correct_rate"], row["sources/c/groups"]) == (
        None,
        None,
        0,
    )
    assert not [key for key in rollout_metrics(got) if key.startswith("sources/")]
