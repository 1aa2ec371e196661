"""The comparison's own arithmetic: the same work for both sides, its ratios and intervals, and the page that quotes it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
BENCHES = ROOT / "benches"

if not BENCHES.is_dir():
    pytest.skip("benches are part of the repository only", allow_module_level=True)

sys.path.insert(0, str(BENCHES))

import against_trl  # noqa: E402
import equal_learning  # noqa: E402
import speed_page  # noqa: E402
import step_overhead  # noqa: E402
from cases import CASES, work  # noqa: E402


@pytest.mark.parametrize("name", sorted(CASES))
def test_exactly_half_of_the_groups_carry_a_signal_and_a_step_is_a_function_of_its_number(name: str) -> None:
    case = CASES[name]
    for step in range(8):
        made = work(case, step)
        mixed = [min(row) < max(row) for row in made.rewards]
        assert sum(mixed) * 2 == case.groups
        assert made == work(case, step)
        assert made != work(case, step + 1)
        assert all(case.prompt[0] <= len(p) <= case.prompt[1] for p in made.prompts)
        assert all(0 <= i < case.vocabulary for p in made.prompts for i in p)
        assert np.array(made.lengths).shape == (case.groups, case.members)


def test_lengths_are_log_normal_with_the_stated_median_and_percentile() -> None:
    case = CASES["medium-lognormal"]
    drawn = np.array([work(case, step).lengths for step in range(400)]).ravel()
    assert np.median(drawn) == pytest.approx(case.length, rel=0.03)
    assert drawn.min() >= 1
    assert drawn.max() == case.cap
    # What lies above the cap is cut to it: a twentieth of the draws.
    assert float((drawn == case.cap).mean()) == pytest.approx(0.05, abs=0.008)


def record(theirs: list[float], ours: list[float]) -> dict:
    sides = {}
    for name, values in (("TRL", theirs), ("retrain", ours)):
        sides[name] = {
            "all_wall_s": values,
            "all_cpu_s": [2 * v for v in values],
            "peak_bytes": 100 if name == "TRL" else 40,
        }
    return {"sides": sides}


def test_a_ratio_of_medians_with_an_interval_that_grows_with_the_noise() -> None:
    rng = np.random.default_rng(0)
    calm = against_trl.ratios(record(list(10 + 0.1 * rng.random(9)), list(2 + 0.01 * rng.random(9))))
    wild = against_trl.ratios(record(list(10 + 5 * rng.random(9)), list(2 + rng.random(9))))
    assert calm["wall"] == calm["cpu"] == pytest.approx(5, rel=0.02)
    assert calm["peak"] == 0.4
    for found in (calm, wild):
        assert found["wall_interval"][0] <= found["wall"] <= found["wall_interval"][1]
    width = [f["wall_interval"][1] - f["wall_interval"][0] for f in (calm, wild)]
    assert width[0] < 0.1 < width[1]


def test_the_crossing_lies_on_the_line_between_two_evaluations() -> None:
    assert equal_learning.crossing([0, 10, 20], [0.2, 0.6, 1.0], 0.8) == pytest.approx(15)
    assert equal_learning.crossing([0, 10, 20], [0.2, 0.8, 0.7], 0.8) == pytest.approx(10)
    assert equal_learning.crossing([0, 10, 20], [0.9, 0.7, 0.8], 0.8) == pytest.approx(20)
    assert equal_learning.crossing([0, 10], [0.1, 0.79], 0.8) is None


def test_welch_is_scipys() -> None:
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(1)
    a, b = rng.normal(0.86, 0.03, 16).tolist(), rng.normal(0.84, 0.05, 11).tolist()
    gap, error, freedom = equal_learning.welch(a, b)
    theirs = stats.ttest_ind(a, b, equal_var=False)
    assert gap / error == pytest.approx(theirs.statistic, rel=1e-12)
    assert freedom == pytest.approx(theirs.df, rel=1e-12)


@pytest.mark.parametrize(("shift", "verdict"), [(0.0, True), (0.02, True), (0.05, False), (-0.05, False)])
def test_equivalence_needs_the_whole_interval_inside_the_margin(shift: float, verdict: bool) -> None:
    pytest.importorskip("scipy.stats")
    base = np.linspace(-0.01, 0.01, 16)

    def rows(centre: float, pace: float) -> list[dict]:
        return [
            {"accuracy": [0.3, centre + e], "cpu_s": [0.0, pace + 100 * abs(e)], "startup_cpu_s": 5.0}
            for e in base
        ]

    found = equal_learning.summary({"trl": rows(0.9, 100.0), "retrain": rows(0.9 + shift, 20.0)}, 0.8)
    assert found["difference"] == pytest.approx(shift, abs=1e-12)
    assert found["equivalent"] is verdict
    assert (max(found["p_not_worse"], found["p_not_better"]) < 0.05) is verdict
    text = "\n".join(
        speed_page.learning(
            {
                "summary": found,
                "shape": equal_learning.SHAPE,
                "steps": [0, 60],
                "commit": "c",
                "evaluation": {"tasks": 256, "samples": 1},
            }
        )
    )
    assert ("**equivalent**" in text) is verdict
    assert f"{100 * shift:+.1f} points" in text
    reached = found["cpu_s_to_goal"]
    assert reached["trl"]["reached"] == reached["retrain"]["reached"] == 16
    assert reached["ratio_interval"][0] <= reached["ratio"] <= reached["ratio_interval"][1]
    # Start-up costs both sides the same here, so that it draws the ratio towards 1.
    assert 1 < found["cpu_s_to_goal_with_startup"]["ratio"] < reached["ratio"]


def test_the_page_quotes_the_stored_results() -> None:
    stored = against_trl.read(str(against_trl.RESULTS))
    if not stored["runs"]:
        pytest.skip("nothing measured yet")
    written = against_trl.written(str(against_trl.RESULTS))
    assert against_trl.PAGE.read_text(encoding="utf-8") == written, "run benches/against_trl.py --page"
    for run in stored["runs"].values():
        assert (
            run["pairs"]
            == len(run["sides"]["TRL"]["all_wall_s"])
            == len(run["sides"]["retrain"]["all_wall_s"])
        )
        shown = f"{run['ratios']['wall']:.2f}"
        assert (f"**{shown}**" if run["pairs"] >= 5 else f"| {shown} |") in written
        again = against_trl.ratios(run)
        assert again == run["ratios"], "a stored ratio is not that of the stored steps"
        assert json.dumps(run["versions"]["trl"]["trl"]).strip('"') in written


def test_the_overhead_of_a_step_says_how_a_checkpoint_is_in_it() -> None:
    stored = json.loads((BENCHES / "results" / "step_overhead.json").read_text(encoding="utf-8"))
    waited = stored["parts"]["checkpoint, what the loop waits"]["median_s"]
    said = stored["checkpoint_in_overhead"]
    assert said == step_overhead.checkpoint_share(waited, said["save_every"])
    assert stored["overhead_s"] == pytest.approx(stored["step"]["median_s"] + waited / said["save_every"])
    assert step_overhead.checkpoint_share(None, 20)["per_step_s"] is None
