"""A condition whose method never acted in its runs: said in the report, in the verdict and at the top."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

from retrain.campaign import report

_made = runpy.run_path(str(Path(__file__).with_name("made_campaigns.py")))
declared, write_campaign, SEEDS = _made["declared"], _made["write_campaign"], _made["SEEDS"]
SEPA = ("grpo+none", "maxrl+gtpo_sepa")


def write(path, label, row_of, *, shared="", own=None, states=None, steps=6):
    """A campaign of a baseline and one condition, whose training rows ``row_of(seed, step)`` adds to."""
    design = declared(("grpo+none", label), seeds=(1, 2, 3, 4), steps=steps)
    design.conditions[label].update(own or {})
    campaign = write_campaign(path / "c", design, every=2, noise=0.02, states=states)
    with (campaign / "config.toml").open("a") as file:
        file.write(shared)
    for metrics in campaign.glob(f"runs/{label}_s*/metrics.jsonl"):
        seed = int(metrics.parent.name.rpartition("_s")[2])
        rows = [json.loads(line) for line in metrics.read_text().splitlines()]
        for row in rows:
            if "batch_size" in row:
                row.update(row_of(seed, row["step"]))
        metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return campaign


LATE = '[sepa]\nsteps = 500\ndelay_steps = 50\nschedule = "linear"\ncorrect_rate_gate = 0.1\n'


def test_sepa_whose_lambda_never_left_0_is_said_beside_its_verdict_and_at_the_top(tmp_path):
    campaign = write(
        tmp_path, SEPA[1], lambda seed, step: {"sepa_lambda": 0.0, "sepa_gate_open": True}, shared=LATE,
        own={"sepa.steps": 4},
    )  # fmt: skip
    made = report.write(campaign)
    said = (
        "SEPA acted in none of 4 runs: its lambda was 0 in all 6 steps, as it begins to rise after sepa.delay_steps = 50 steps "
        "and takes sepa.steps = 4 from there. It trained as gtpo: what is said of it is said of that, not of SEPA."
    )
    assert made["warnings"][0] == f"maxrl+gtpo_sepa: {said}"
    (comparison,) = made["analysis"]["comparisons"]
    assert comparison["text"].endswith(said)
    twin = Path(made["markdown"]).read_text().replace("\\_", "_")
    assert twin.count(said) == 2


@pytest.mark.parametrize(
    ("shared", "row", "expected"),
    [
        ("[sepa]\nsteps = 4\ndelay_steps = 0\ncorrect_rate_gate = 0.9\n", {"sepa_lambda": 0.0, "sepa_gate_open": False},
         "as no step's correct rate reached sepa.correct_rate_gate = 0.9. It trained as gtpo"),
        ("[sepa]\nsteps = 0\ndelay_steps = 0\n", {"sepa_lambda": 0.0, "sepa_gate_open": True},
         "as sepa.steps = 0 switches it off"),
        ("[gtpo]\nbeta = 0\n", {"sepa_lambda": 1.0, "sepa_gate_open": True}, "With gtpo.beta = 0 what SEPA pools weighs nothing"),
    ],
)  # fmt: skip
def test_the_reason_is_named(tmp_path, shared, row, expected):
    (first, *_) = report.write(write(tmp_path, SEPA[1], lambda seed, step: row, shared=shared))["warnings"]
    assert expected in first


def test_runs_in_which_it_acted_at_times_are_counted(tmp_path):
    def rows(seed, step):
        return {"sepa_lambda": 0.25 * (step > 1) * (seed > 1), "sepa_gate_open": seed > 1}

    (first, *_) = report.write(write(tmp_path, SEPA[1], rows, shared=LATE.replace("50", "1")))["warnings"]
    assert first.startswith("maxrl+gtpo_sepa: SEPA did not act in 1 of 4 runs: its lambda was 0 in all 6 steps, as no step's")
    assert first.endswith("It trained as gtpo.")


def test_sepa_that_acted_and_conditions_without_it_are_not_scolded(tmp_path):
    made = report.write(write(tmp_path, SEPA[1], lambda seed, step: {"sepa_lambda": step / 6, "sepa_gate_open": True}))
    assert not any("SEPA" in text for text in made["warnings"])
    # Lambda is 0 in every condition that has no SEPA.
    other = report.write(write(tmp_path / "b", "maxrl+gtpo", lambda seed, step: {"sepa_lambda": 0.0}, shared=LATE))
    assert not any("SEPA" in text for text in other["warnings"])


def test_runs_that_go_on_may_still_come_to_it(tmp_path):
    states = {("maxrl+gtpo_sepa", seed): ("running", 3) for seed in (1, 2, 3, 4)}
    made = report.write(write(tmp_path, SEPA[1], lambda seed, step: {"sepa_lambda": 0.0}, shared=LATE, states=states))
    assert not any("SEPA" in text for text in made["warnings"])


@pytest.mark.parametrize("mean", [None, 0.4])
def test_hicra_without_planning_tokens_is_gtpo(tmp_path, mean):
    made = report.write(write(tmp_path, "maxrl+gtpo_hicra", lambda seed, step: {"plan_surprisal_mean": mean}))
    said = [text for text in made["warnings"] if "HICRA acted in none of 4 runs: no planning token was found in 6 steps" in text]
    assert len(said) == (mean is None)
