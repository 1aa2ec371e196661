"""The A/A test in small: the stored outcomes of 256 real runs of one condition, dealt out to made-up conditions."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
SPEC = importlib.util.spec_from_file_location("same_condition", ROOT / "benches" / "same_condition.py")
assert SPEC is not None
assert SPEC.loader is not None
aa = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(aa)


@pytest.fixture(scope="module")
def values() -> np.ndarray:
    rows = [json.loads(line) for line in aa.ROWS.read_text(encoding="utf-8").splitlines()]
    assert len({row["seed"] for row in rows}) == len(rows) >= 256
    assert {row["state"] for row in rows} == {"done"}
    return np.array([row["value"] for row in rows])


def test_a_deal_uses_every_run_at_most_once(values):
    numbered = np.arange(len(values), dtype=np.float64)
    dealt = aa.deals(numbered, 5, 8, 3, np.random.default_rng(0))
    assert dealt.shape == (18, 5, 8)
    for deal in dealt.reshape(3, -1):
        assert len(set(deal)) == 240


@pytest.mark.parametrize(("conditions", "seeds"), [(2, 8), (5, 8)])
def test_runs_of_one_condition_differ_no_more_often_than_declared(values, conditions, seeds):
    found = aa.rates(aa.deals(values, conditions, seeds, 150, np.random.default_rng(1)))
    assert found["either"] < 0.07
    assert 0.93 < found["covered"] < 0.97
    stored = json.loads((ROOT / "benches/results/same_condition.json").read_text())
    assert stored["holds"]
    assert stored["runs"] == len(values)


def test_a_shift_of_two_deviations_is_seen(values):
    dealt = aa.deals(values, 2, 8, 50, np.random.default_rng(2)).copy()
    dealt[:, 1] += 2 * values.std()
    assert aa.rates(dealt)["improvement"] > 0.9


def test_a_procedure_that_errs_twice_as_often_does_not_hold(values, monkeypatch):
    monkeypatch.setattr(
        aa, "decide", lambda arms, alpha, margin, by_seed: DECIDE(arms, 3 * alpha, margin, by_seed=by_seed)
    )
    record = aa.judge(values, conditions=2, seeds=8, count=200, resamples=40, seed=0)
    assert not aa.holds(record)


DECIDE = aa.decide
