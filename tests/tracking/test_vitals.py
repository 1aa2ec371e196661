"""Judgements on synthetic histories: silent on healthy runs of any size, loud on sick ones, and once per episode."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrain.tracking import vitals
from retrain.tracking.judges import Past
from retrain.tracking.vitals import BY_NAME, VITALS, Watch, alarms


def healthy(step, *, seed=0, batch=8, group=16, dtype="float32", **changes):
    """A step of a run that learns, with the noise that so many rollouts have."""
    draw = random.Random(f"{seed} {step}")
    rate = 0.25 + 0.5 * min(1.0, step / 200)
    n = batch * group
    correct = sum(draw.random() < draw.choice((rate / 2, rate, min(1.0, rate * 1.5))) for _ in range(n)) / n
    gap = {"float32": 1e-5, "bf16": 0.3}[dtype] * draw.uniform(0.5, 2.0)
    kl = {"float32": 1e-11, "bf16": 4e-4}[dtype] * draw.uniform(0.3, 3.0)
    silent = sum(draw.random() < 0.35 for _ in range(batch))
    return {
        "step": step, "batch_size": batch, "group_size": group, "mean_reward": correct, "correct_rate": correct,
        "skipped_all_wrong": silent, "skipped_all_correct": 0, "skipped_equal_rewards": 0,
        "max_token_hit_rate": sum(draw.random() < 0.1 for _ in range(n)) / n,
        "mean_length": 400 * (1 + step / 400) * draw.uniform(0.85, 1.15),
        "entropy_mean": 0.3 * math.exp(-step / 400) * draw.uniform(0.85, 1.15),
        "ratio_min": math.exp(-gap), "ratio_max": math.exp(gap * 0.9), "approx_kl": kl,
        "moved_kl": kl, "num_updates": 1, "num_datums": (batch - silent) * group,
        "grad_norm": 0.1 * draw.lognormvariate(0, 0.5) if silent < batch else None,
        "reward_error_rate": (draw.random() < 0.01) / n, "rollout_error_rate": 0.0, "skipped_update": False,
        "tokens_per_second": 5000 * draw.uniform(0.8, 1.2), "step_time_s": 20.0, "sample_time_s": 12.0,
        "score_time_s": 1.0, "train_time_s": 7.0,
        **changes,
    }  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bf16"])
@pytest.mark.parametrize(("batch", "group"), [(2, 4), (2, 8), (8, 16), (64, 8)])
@pytest.mark.parametrize("seed", range(3))
def test_healthy_runs_of_any_size_and_number_format_raise_nothing(batch, group, dtype, seed):
    rows = [healthy(step, seed=seed, batch=batch, group=group, dtype=dtype) for step in range(200)]
    assert alarms(rows) == []


@given(st.integers(0, 2**32), st.sampled_from([0.1, 0.25, 1.0]))
@settings(max_examples=25, deadline=None)
def test_noise_alone_is_no_drift(seed, spread):
    draw = random.Random(seed)
    for vital in ("mean_length", "tokens_per_second", "entropy"):
        values = [5.0 * draw.lognormvariate(0, spread) for _ in range(vitals.WINDOW + 1)]
        rows = [{"sample_time_s": 10.0, "correct_rate": 0.5}] * len(values)
        said = BY_NAME[vital].judge(values, rows)
        # Of values that differ by factors of two and a half nothing is sure; smaller noise must never reach a limit.
        assert not said or spread == 1.0


SICK = {
    "correct_rate": ({"correct_rate": 0.05, "mean_reward": 0.05}, "fell from"),
    "mean_reward": ({"correct_rate": 0.0, "mean_reward": 0.0, "skipped_all_wrong": 8}, "same reward, 0."),
    "silent_share": ({"skipped_all_wrong": 7}, "all wrong"),
    "truncated_share": ({"max_token_hit_rate": 0.6}, "cut at"),
    "mean_length": ({"mean_length": 4000.0}, "grew from"),
    "entropy": ({"entropy_mean": 0.01}, "nearly the same"),
    "ratio_gap": ({"ratio_max": 1.2}, "factor of 1.2, usual are"),
    "approx_kl": ({"approx_kl": 0.02}, "0.02 nats"),
    "moved_kl": ({"moved_kl": 0.3, "num_updates": 4}, "0.3 nats"),
    "grad_norm": ({"grad_norm": 50.0}, "jumped to 50"),
    "reward_errors": ({"reward_error_rate": 0.1}, "the reward failed"),
    "rollout_errors": ({"rollout_error_rate": 0.1}, "broken"),
    "skipped_update": ({"skipped_update": True}, "not finite"),
    "tokens_per_second": ({"tokens_per_second": 1000.0}, "Sampling fell"),
    "scoring_share": ({"score_time_s": 15.0}, "waiting for rewards"),
}


@pytest.mark.parametrize("name", SICK)
def test_a_sick_run_is_called_sick_soon_and_once(name):
    sick, said = SICK[name]
    rows = [healthy(step) for step in range(40)]
    rows += [healthy(step, **sick) for step in range(40, 52)]
    raised = alarms(rows)
    mine = [alarm for alarm in raised if alarm.vital == name]
    assert len(mine) == 1, raised
    assert said in mine[0].message
    assert 40 <= mine[0].step <= 50
    assert mine[0].advice == BY_NAME[name].advice
    # One cause, one alarm, but where two metrics see the same thing.
    also = {"silent_share"} if name == "mean_reward" else set()
    assert {a.vital for a in raised} <= {name, "correct_rate", "mean_reward", *also}


def test_every_core_metric_but_one_can_raise_an_alarm():
    assert {vital.name for vital in VITALS} - set(SICK) == {"sampling_share", "held_out"}
    assert len(BY_NAME) == len(VITALS)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (lambda s: {"mean_length": 400.0 if s < 40 else 60.0}, "shrank from"),
        (lambda s: {"entropy_mean": 0.3 if s < 40 else 0.06}, "Entropy fell from"),
        (lambda s: {"entropy_mean": 0.3 if s < 40 else 2.5}, "dissolves"),
        (lambda s: {"grad_norm": 0.0}, "exactly 0"),
        (lambda s: {"ratio_min": 0.1}, "factor of 10"),
        (lambda s: {"ratio_min": 0.0}, "more than"),
        (lambda s: {"approx_kl": 1e-12 if s < 40 else 5e-3}, "usual are"),
        (lambda s: {"correct_rate": None, "mean_reward": 8.0 if s < 40 else 2.0}, "mean reward fell"),
    ],
)
def test_further_ways_of_being_sick(changes, said):
    rows = [healthy(step, **changes(step)) for step in range(55)]
    assert [said in alarm.message for alarm in alarms(rows)] == [True]


def test_sure_answers_are_no_collapse_once_the_tasks_are_solved():
    def ends(rate):
        rows = [healthy(step) for step in range(30)]
        return rows + [
            healthy(s, entropy_mean=0.005, correct_rate=rate, mean_reward=rate) for s in range(30, 50)
        ]

    assert alarms(ends(0.97)) == []
    assert {alarm.vital for alarm in alarms(ends(0.5))} == {"entropy"}


def test_a_single_failure_in_a_small_batch_is_an_accident():
    rows = [healthy(step, batch=2, group=4) for step in range(30)]
    for step in (10, 12):
        rows[step] |= {"reward_error_rate": 1 / 8}
    assert alarms(rows) == []
    for step in (11, 13):
        rows[step] |= {"reward_error_rate": 1 / 8}
    assert [(a.step, a.vital) for a in alarms(rows)] == [(13, "reward_errors")]


def test_an_alarm_comes_again_only_after_enough_healthy_steps():
    def raised(gap):
        bad = {20, 21, 22 + gap}
        rows = [healthy(s, skipped_update=s in bad) for s in range(60)]
        return [alarm.step for alarm in alarms(rows) if alarm.vital == "skipped_update"]

    assert raised(0) == [20]
    assert raised(vitals.WELL - 1) == [20]
    assert raised(vitals.WELL) == [20, 22 + vitals.WELL]


@given(
    st.lists(
        st.dictionaries(
            st.sampled_from(
                [
                    "batch_size", "group_size", "mean_reward", "correct_rate", "skipped_all_wrong", "max_token_hit_rate",
                    "mean_length", "entropy_mean", "ratio_min", "ratio_max", "approx_kl", "moved_kl", "num_updates",
                    "num_datums", "grad_norm", "reward_error_rate", "rollout_error_rate", "skipped_update",
                    "tokens_per_second", "step_time_s", "sample_time_s", "score_time_s",
                ]
            ),
            st.one_of(st.none(), st.booleans(), st.floats(), st.integers(0, 100), st.text(max_size=2)),
        ),
        max_size=40,
    )
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_whatever_a_row_holds_is_judged_and_each_episode_is_said_once(rows):
    watch, open_episodes = Watch(), {}
    for step, row in enumerate(rows):
        for alarm in watch.observe({"step": step, **row}):
            # Only that a fall has become a collapse is said again.
            assert alarm.vital not in open_episodes or "collapsed" in alarm.message, "said twice in one episode"
            assert alarm.message
            open_episodes[alarm.vital] = step
        open_episodes = {name: s for name, s in open_episodes.items() if name in watch.ill}
        # What another metric's alarm names is marked without one of its own.
        named = {"mean_length", "entropy"} if "correct_rate" in open_episodes else set()
        named |= {"silent_share"} if "mean_reward" in open_episodes else set()
        assert set(open_episodes) <= set(watch.ill) <= set(open_episodes) | named


def evaluated(step, accuracy, spread=0.05):
    low, high = max(0.0, accuracy - spread), accuracy + spread
    return {"step": step, "eval/accuracy": accuracy, "eval/accuracy_low": low, "eval/accuracy_high": high}


def test_evaluations_are_not_judged_as_steps():
    assert alarms([{"step": s, "eval/accuracy": 0.0, "mean_reward": 0.0} for s in range(30)]) == []


@pytest.mark.parametrize(
    ("accuracies", "at"),
    [
        ([0.3, 0.1], [9]),  # its interval lies below the start's
        ([0.3, 0.22, 0.23, 0.22], [19]),  # two in a row below the start's, which overlap it
        ([0.3, 0.22, 0.31, 0.22], []),
        ([0.3, 0.28, 0.27, 0.26], []),
        ([0.3, 0.1, 0.3, 0.1], [9, 29]),
        ([0.3, *[0.5] * 30, 0.1], [309]),  # the start is never forgotten
    ],
)
def test_held_out_accuracy_is_held_against_the_untrained_model(accuracies, at):
    rows = [evaluated(10 * i, accuracy) for i, accuracy in enumerate(accuracies)]
    watch = Watch()
    raised = [alarm for row in rows for alarm in watch.observe(row)]
    assert [alarm.step for alarm in raised] == at
    assert watch.ill == (["held_out"] if accuracies[-1] < 0.25 and at else [])
    # A run whose start was not evaluated has nothing to be held against.
    assert alarms(rows[1:]) == []


def sick_for_good(step, at=40):
    sick = {"correct_rate": 0.0, "mean_reward": 0.0, "mean_length": 1500.0, "entropy_mean": 2.5, "skipped_all_wrong": 8}
    return healthy(step, **(sick if step >= at else {}))


@pytest.mark.parametrize("at", [2, 4, 40])
def test_a_collapse_is_named_and_stays_marked_long_after_its_fall(at):
    watch = Watch()
    raised = [alarm for step in range(at + 80) for alarm in watch.observe(sick_for_good(step, at))]
    (named,) = [alarm for alarm in raised if "collapsed" in alarm.message]
    assert at < named.step <= at + 10
    assert named.vital == "correct_rate"
    assert "tokens" in named.message
    assert "entropy" in named.message
    assert "training.lr" in named.advice
    assert {"correct_rate", "mean_reward", "silent_share", "mean_length", "entropy"} <= set(watch.ill)
    for step in range(200, 240):
        watch.observe(healthy(step))
    assert watch.ill == []


def test_a_drift_stays_marked_until_it_is_undone_or_rewards_are_as_good_again():
    def ill(length, **changes):
        watch = Watch()
        for step in range(120):
            watch.observe(healthy(step, **({} if step < 40 else {"mean_length": length(step), **changes})))
        return watch.ill

    worse = {"correct_rate": 0.2, "mean_reward": 0.2}
    assert ill(lambda step: 2000.0, **worse) == ["mean_length"]
    assert ill(lambda step: 2000.0 if step < 80 else 420.0, **worse) == []
    assert ill(lambda step: 2000.0) == []


@pytest.mark.parametrize("batch", [2, 8, 32])
def test_tasks_of_very_different_difficulty_are_no_collapse(batch):
    """Every task is nearly always solved or nearly never: the correct rate of a step is mostly which tasks it drew."""
    for seed in range(3):
        draw = random.Random(seed)
        past = Past()
        for step in range(300):
            solved = [sum(draw.random() < p for _ in range(8)) for p in draw.choices((0.03, 0.9), (3, 1), k=batch)]
            row = {
                "step": step, "batch_size": batch, "correct_rate": sum(solved) / batch / 8,
                "skipped_all_wrong": solved.count(0), "mean_length": 100.0,
            }  # fmt: skip
            assert past.observe(row) is None


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("correct_rate", 0.4567, "45.7%"), ("mean_length", 1234.5, "1234 tokens"), ("entropy", 0.123456, "0.1235 nats/token"),
        ("approx_kl", 2.198e-12, "2.198e-12 nats/token"), ("loss", None, ""), ("grad_norm", math.inf, "inf"),
        ("grad_norm", None, "n/a"),
    ],
)  # fmt: skip
def test_values_for_people(name, value, text):
    if name in BY_NAME:
        assert BY_NAME[name].text(value) == text


RECORDED = Path(__file__).parent / "recorded_runs.jsonl"


def test_recorded_runs_of_the_tiny_model_that_learned_raise_nothing_and_those_that_broke_do():
    """Real rows: the template's run of 60 steps, and with learning rates of 1e-2 and 3e-2, at which it collapses; some
    with a quarter of the rollouts."""
    runs = [json.loads(line) for line in RECORDED.read_text(encoding="utf-8").splitlines()]
    assert {run["label"] for run in runs} == {"healthy", "collapsed"}
    for run in runs:
        watch = Watch()
        raised = [alarm for row in run["rows"] for alarm in watch.observe(row)]
        if run["label"] == "healthy":
            assert raised == []
        else:
            (named,) = [alarm for alarm in raised if "collapsed" in alarm.message]
            assert (named.vital, named.step < 12) == ("correct_rate", True)
            assert {"correct_rate", "mean_reward", "silent_share", "truncated_share"} <= set(watch.ill)
