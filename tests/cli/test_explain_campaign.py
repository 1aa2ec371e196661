"""``retrain explain`` of a campaign: what its conditions will do, in what order it is told, and how wide."""

from __future__ import annotations

import json

import pytest

from retrain import cards
from retrain.campaign import beforehand, plan
from retrain.cli.main import main
from retrain.config.load import load

CAMPAIGN = """\
[model]
model = "retrain/tiny"

[backend]
devices = "cpu"

[data]
source = "arithmetic"

[training]
max_tokens = 48

[campaign]
seeds = [1, 2, 3, 4]
max_steps = 6

[[campaign.conditions]]
advantage_mode = "grpo"
transform_mode = "none"

[[campaign.conditions]]
transform_mode = "gtpo"

[[campaign.conditions]]
transform_mode = "gtpo_sepa"
sepa.steps = 4
"""


@pytest.fixture
def explained(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(cards, "_cuda", lambda index: None)
    monkeypatch.setattr(cards, "_cpu_flops", lambda: 100e9)

    def run(text, *words):
        (tmp_path / "c.toml").write_text(text)
        assert main(["explain", "c.toml", *words]) == 0
        return capsys.readouterr().out

    return run


def test_a_condition_whose_method_never_acts_is_named_before_it_runs(explained):
    found = json.loads(explained(CAMPAIGN, "--json"))
    assert found["campaign"]["sepa"] == {
        "maxrl+gtpo_sepa~steps=4": {
            "first": 0.0, "middle": 0.0, "last": 0.0, "never": True, "schedule": "linear", "correct_rate_gate": 0.1,
        }
    }  # fmt: skip
    (line,) = [line for line in found["advice"] if "SEPA" in line]
    assert line.startswith(
        "condition maxrl+gtpo_sepa~steps=4: SEPA's lambda is 0 at all 6 steps (it begins to rise after "
    )
    assert "sepa.delay_steps = 50, takes sepa.steps = 4 from there" in line
    assert "plain gtpo. So does maxrl+gtpo. What is said of it will not be about SEPA. Fix: " in line
    out = explained(CAMPAIGN)
    assert "SEPA's lambda      maxrl+gtpo_sepa~steps=4: 0 at all 6 steps: it never acts" in out
    acts = explained(CAMPAIGN.replace("sepa.steps = 4", "sepa.steps = 4\nsepa.delay_steps = 0"))
    assert "never acts" not in acts
    assert "maxrl+gtpo_sepa~steps=4~delay_steps=0: 0.00 at the first step, 0.75 at the" in acts


def test_notes_are_of_each_condition(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text(CAMPAIGN.replace("sepa.steps = 4", "sepa.steps = 40\nsepa.delay_steps = 1"))
    (line,) = beforehand.notes(plan.plan(load(path), name="c"))
    assert line.endswith("the run stays close to plain gtpo. (Of maxrl+gtpo_sepa~steps=40~delay_steps=1.)")
    path.write_text(CAMPAIGN.replace("max_tokens = 48", "max_tokens = 48\ntop_p = 0.9"))
    found = beforehand.notes(plan.plan(load(path), name="c"))
    assert [line for line in found if "top_p" in line] == [
        "top_p < 1 samples from a truncated policy; logprobs and the ratio describe the whole one."
    ]


def test_the_campaign_comes_first_and_no_line_is_too_wide(explained):
    out = explained(CAMPAIGN)
    heads = [line for line in out.splitlines() if line and not line.startswith(" ")]
    assert [head.split()[0] for head in heads[:4]] == ["c.toml:", "Campaign", "Worth", "A"]
    assert max(map(len, out.splitlines())) <= 100
    assert '\n                       { transform_mode = "gtpo_sepa", sepa = { steps = 4 } }\n' in out


def test_the_run_that_is_shown_is_one_of_the_campaign_and_the_largest(explained):
    assert "A step of grpo+none_s1; others need as much memory" in explained(CAMPAIGN)
    found = json.loads(explained(CAMPAIGN + "training.batch_size = 64\n", "--json"))
    assert found["campaign"]["shown"]["condition"].startswith("maxrl+gtpo_sepa~")
    assert found["step"]["tasks"] == 64
    assert found["sepa"]["never"] is True
    assert "which needs the most memory" in explained(CAMPAIGN + "training.batch_size = 64\n")


def test_a_batch_size_that_follows_the_clock_is_told_with_what_the_largest_needs(explained):
    run = CAMPAIGN.partition("[campaign]")[0].replace("max_tokens = 48", "max_tokens = 48\nbatch_size = 1\ngroup_size = 8")
    assert json.loads(explained(run, "--json"))["sizes"] is None
    run += "[backpressure]\nenabled = true\nmax_batch_size = 16\n"
    found = json.loads(explained(run, "--json"))
    assert (found["sizes"]["most"], found["sizes"]["warmup"]) == (16, [1, 2, 4, 8, 16])
    wide = json.loads(explained(run.replace("batch_size = 1\n", "batch_size = 16\n"), "--json"))
    assert found["sizes"]["memory"] == wide["memory"]
    assert found["memory"]["peak"] < wide["memory"]["peak"]
    out = explained(run)
    assert "batch size   1 to 16 tasks (8 to 128 answers) a step: it follows measured throughput" in out
    assert "warm-up      goes up through 1, 2, 4, 8, 16 tasks and measures" in out
    assert max(map(len, out.splitlines())) <= 100
