"""What a tracker is told: names, values, configuration, and what it already holds."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrain import trackers
from retrain.config.schema import Config
from retrain.tracking import layout

NAMES = {
    "loss": "train/loss",
    "lr": "train/lr",
    "mean_reward": "train/mean_reward",
    "correct_rate": "train/correct_rate",
    "running_correct_rate": "train/running_correct_rate",
    "rewards/math": "train/rewards/math",
    "rewards/format": "train/rewards/format",
    "entropy_mean": "train/entropy_mean",
    "policy_entropy": "train/policy_entropy",
    "exec_entropy_mean": "train/entropy/exec_entropy_mean",
    "exec_entropy_var": "train/entropy/exec_entropy_var",
    "exec_surprisal_mean": "train/entropy/exec_surprisal_mean",
    "exec_surprisal_var": "train/entropy/exec_surprisal_var",
    "plan_entropy_mean": "train/entropy/plan_entropy_mean",
    "plan_entropy_var": "train/entropy/plan_entropy_var",
    "plan_surprisal_mean": "train/entropy/plan_surprisal_mean",
    "plan_surprisal_var": "train/entropy/plan_surprisal_var",
    "bp_action": "train/backpressure/action",
    "bp_batch_size": "train/backpressure/batch_size",
    "skipped_all_wrong": "train/skipped_all_wrong",
    "sepa_gate_open": "train/sepa_gate_open",
    "step_time_s": "train/step_time_s",
    "eval/accuracy": "eval/accuracy",
    "eval/pass@4": "eval/pass@4",
    "eval/hard/accuracy": "eval/hard/accuracy",
}


@pytest.mark.parametrize(("key", "name"), NAMES.items())
def test_names(key, name):
    assert trackers.tracker_key(key) == name


def test_only_finite_numbers_and_bools_are_sent():
    row = {
        "loss": 0.1, "num_datums": 3, "sepa_gate_open": True, "grad_clipped": False, "condition": "grpo+none",
        "ratio_mean": None, "ratio_max": math.inf, "approx_kl": math.nan, "eval/source": "x",
    }  # fmt: skip
    sent = trackers.numbers(row)
    assert sent == {
        "train/loss": 0.1,
        "train/num_datums": 3,
        "train/sepa_gate_open": 1,
        "train/grad_clipped": 0,
    }
    assert [type(v) for v in sent.values()] == [float, int, int, int]


@given(
    st.dictionaries(
        st.text(min_size=1), st.one_of(st.floats(), st.integers(), st.booleans(), st.none(), st.text())
    )
)
def test_a_number_is_never_changed_and_no_two_keys_meet(row):
    sent = trackers.numbers(row)
    kept = {k: v for k, v in row.items() if isinstance(v, int | float) and math.isfinite(v)}
    if not any(k.startswith(("bp_", "backpressure/", "entropy/", "train/", "eval/")) for k in row):
        assert len(sent) == len(kept)
    for key, value in kept.items():
        assert trackers.tracker_key(key) in sent
        if not key.startswith(("bp_", "backpressure/", "entropy/", "train/", "eval/")):
            assert sent[trackers.tracker_key(key)] == value


def test_kinds_of_rows():
    assert trackers.kind_of({"eval/accuracy": None}) == "eval"
    assert trackers.kind_of({"loss": 0.1, "rewards/eval": 1.0}) == "train"


def test_the_configuration_goes_along_without_secrets():
    made = Config.model_validate(
        {
            "algorithm": {
                "transform_params": {"api_key": "s3cret-one", "rho": 0.5, "deep": {"hf_token": "s3cret-two"}}
            },
            "environment": {
                "args": {"url": "https://me:s3cret-three@host/x", "list": [{"password": "s3cret-four"}]}
            },
        }
    )
    shown = trackers.shown_config(made)
    assert "s3cret" not in json.dumps(shown)
    assert shown["algorithm"]["transform_params"] == {"rho": 0.5, "deep": {}}
    assert shown["condition"] == "maxrl+gtpo_sepa"
    assert shown["training"]["lr"] == 4e-5


def test_a_table_of_generations_holds_json_and_no_nan():
    row = {name: name for name in trackers.COLUMNS} | {"parts": {"a": 1.0}, "reward": math.nan, "credit": {}}
    (made,) = trackers.table([row])
    assert list(made) == list(trackers.COLUMNS)
    assert made["parts"] == '{"a": 1.0}'
    assert made["reward"] is None


def held(run, **changes):
    return trackers.Held(run, "one", **changes)


def test_what_is_held_survives_a_restart(tmp_path):
    first = held(tmp_path)
    assert not first.continues
    assert not first.holds("train", 0)
    first.sent("eval", 0)
    first.sent("train", 0)
    first.sent("train", 1)
    trackers.Held(tmp_path, "other").sent("train", 7)
    again = held(tmp_path)
    assert (again.id, again.records, again.continues) == (first.id, 3, True)
    assert [again.holds("train", s) for s in (0, 1, 2)] == [True, True, False]
    assert [again.holds("eval", s) for s in (0, 2)] == [True, False]
    assert json.loads((tmp_path / layout.TRACKERS).read_text())["other"]["train"] == 7


def test_what_was_just_sent_does_not_count_as_held_until_it_settled(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(trackers.time, "monotonic", lambda: now[0])
    first = held(tmp_path, settle_s=1.0)
    first.sent("train", 0)
    now[0] += 0.9
    first.sent("train", 1)
    assert not held(tmp_path).holds("train", 0)
    now[0] += 0.2
    first.sent("train", 2)
    again = held(tmp_path)
    assert (again.records, again.holds("train", 0), again.holds("train", 1)) == (1, True, False)
    first.settle(all_of_them=True)
    again = held(tmp_path)
    assert (again.records, again.holds("train", 2), again.holds("train", 3)) == (3, True, False)


@pytest.mark.parametrize(
    ("every", "steps", "due"), [(20, 45, [0, 19, 39, 44]), (0, 5, [0, 4]), (1, 3, [0, 1, 2]), (9, 1, [0])]
)
def test_when_generations_are_shown(make_config, every, steps, due):
    pace = trackers.Pace(make_config(training={"save_every": every, "max_steps": steps}))
    assert [step for step in range(steps) if pace.due(step)] == due


def test_only_the_trackers_of_a_run_are_replaced(tmp_path):
    folder = tmp_path / layout.TRACKER_FILES
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    layout.set_trackers_aside(tmp_path)
    layout.forget_trackers(tmp_path)
    assert (folder / "mine.txt").exists()
    (tmp_path / layout.TRACKERS).write_text("{}")
    layout.set_trackers_aside(tmp_path)
    assert not folder.exists()
    folder.mkdir()
    (folder / "new.txt").write_text("of a run that never came to be")
    layout.put_trackers_back(tmp_path)
    assert sorted(p.name for p in folder.iterdir()) == ["mine.txt", "trackers.json"]
    layout.set_trackers_aside(tmp_path)
    layout.forget_trackers(tmp_path)
    layout.put_trackers_back(tmp_path)
    assert list(tmp_path.iterdir()) == []
