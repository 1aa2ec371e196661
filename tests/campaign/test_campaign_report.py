"""The report of a campaign: what it reads, what it says, and what it keeps to itself until the declared seeds are done."""

from __future__ import annotations

import json
import math
import runpy
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from retrain.campaign import cautions, figures, findings, manifest, reading, report
from retrain.cli.main import main
from retrain.errors import ResumeError, UsageError

_made = runpy.run_path(str(Path(__file__).with_name("made_campaigns.py")))
declared, write_campaign, FIVE, SEEDS = (_made[k] for k in ("declared", "write_campaign", "FIVE", "SEEDS"))
TWO = ("grpo+none", "maxrl+none")
EFFECTS = (0.0, 0.06, 0.005, -0.05, 0.02)


def both(made):
    """The page and its Markdown twin."""
    return Path(made["html"]).read_text(), Path(made["markdown"]).read_text()


def of(campaign, label, seeds=SEEDS):
    """Outcomes of a condition, computed here from what the runs wrote."""
    found = []
    for seed in seeds:
        lines = (campaign / f"runs/{label}_s{seed}/metrics.jsonl").read_text().splitlines()
        rows = [row for row in map(json.loads, lines) if "eval/accuracy" in row]
        late = [row["eval/accuracy"] for row in rows if row["step"] >= 32]
        found.append(np.mean(late) if late else rows[-1]["eval/accuracy"])
    return np.array(found)


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """Five conditions and eight seeds, all done but for one run that failed."""
    states = {("maxrl+gtpo", 202): ("failed", 25)}
    design = declared(threshold=0.35)
    return write_campaign(tmp_path_factory.mktemp("made") / "full", design, effects=EFFECTS, states=states)


@pytest.fixture(scope="module")
def told(full):
    """Its report as JSON."""
    return report.write(full)


def test_the_verdicts_are_those_of_the_declared_test_on_what_the_runs_wrote(full, told):
    base = of(full, "grpo+none")
    assert [c["label"] for c in told["analysis"]["comparisons"]] == list(FIVE[1:])
    for each in told["analysis"]["comparisons"]:
        expected = stats.ttest_ind(of(full, each["label"]), base, equal_var=False)
        low, high = expected.confidence_interval(0.95)
        np.testing.assert_allclose((each["p"], each["low"], each["high"]), (expected.pvalue, low, high), rtol=1e-9)
    verdicts = {c["label"]: c["verdict"] for c in told["analysis"]["comparisons"]}
    assert verdicts["maxrl+none"] == "improvement"
    assert verdicts["maxrl+gtpo_hicra"] == "degradation"
    page, twin = both(told)
    for each in told["analysis"]["comparisons"]:
        assert each["text"].replace(">", "&gt;") in page
        assert each["text"] in twin
        row = next(line for line in twin.splitlines() if line.startswith(f"| {each['label']} ".replace("_", "\\_")))
        assert each["verdict"] in row


def test_a_failed_run_counts_at_its_last_evaluation_and_is_named_with_what_continues_it(full, told):
    run = next(r for r in told["runs"] if r["name"] == "maxrl+gtpo_s202")
    assert (run["state"], run["is_last"], run["step"]) == ("failed", True, 25)
    arm = next(a for a in told["analysis"]["arms"] if a["label"] == "maxrl+gtpo")
    assert run["value"] in arm["values"]
    assert arm["n"] == 8
    page, twin = both(told)
    for text in (page, twin.replace("\\_", "_")):
        assert "BackendError: the loss is not finite at step 12." in text
        assert f"retrain --resume {full}" in text
        assert f"{run['value']:.1%} (its last)" in text


def test_every_section_of_a_finished_campaign_is_there(told):
    page, twin = both(told)
    for name in (
        "result", "comparison", "curves", "metrics", "variance", "threshold", "runs", "design", "tuning", "settings", "cost",
        "record",
    ):  # fmt: skip
        assert f'<section id="{name}"' in page
    for heading in ("Verdicts", "Sensitivity, which decides nothing", "Pairs without the baseline", "What all runs share"):
        assert heading in page
        assert heading in twin
    assert 'id="plot-forest"' in page
    assert 'id="plot-strip"' in page
    assert told["plots"] == page.count('class="plot"')
    assert "| Least p that flips allow | " in twin
    assert "2 / 2^k with k seeds at which the two conditions differ" in twin.replace("\\^", "^")
    assert "| Skewed and unequal |" in twin


def test_nothing_is_judged_before_the_first_declared_look_is_complete(tmp_path):
    states = {(label, seed): ("waiting", 0) for label in FIVE for seed in SEEDS[3:]}
    states |= {("grpo+none", 303): ("running", 17), ("maxrl+none", 303): ("dead", 12)}
    design = declared(looks=(4, 8), threshold=0.3)
    campaign = write_campaign(tmp_path / "half", design, effects=EFFECTS, states=states)
    made = report.write(campaign)
    said = "No verdict is read before 4 seeds of every condition are done (15 of 20 runs are)."
    page, twin = both(made)
    for text in (page, twin):
        assert said in text
        for word in ("improvement", "degradation", "equivalent", "not enough evidence", "Holm p", "Sign-flip", "Minus baseline"):
            assert word not in text
    assert 'id="plot-forest"' not in page
    assert 'id="plot-strip"' not in page
    assert 'id="plot-outcome"' in page
    assert made["look"] == 0
    assert made["analysis"] is None
    assert (made["metrics"], made["pairs"], made["steps_to_threshold"]) == ([], [], {})
    assert "running at 17/40" in twin
    assert "dead at 12/40" in twin


@pytest.mark.parametrize(("seeds_done", "look"), [(4, 1), (7, 1), (8, 2)])
def test_the_latest_complete_look_is_read_with_its_seeds_alone_at_its_share_of_alpha(tmp_path, seeds_done, look):
    states = {("maxrl+none", seed): ("running", 39) for seed in SEEDS[seeds_done:]}
    design = declared(TWO, looks=(4, 8))
    made = report.write(write_campaign(tmp_path / "c", design, effects=(0, 0.1), states=states))
    used = SEEDS[: 4 * look]
    assert made["look"] == look
    assert tuple(made["analysis"]["seeds"]) == used
    expected = stats.ttest_ind(*(of(tmp_path / "c", label, used) for label in TWO[::-1]), equal_var=False)
    (each,) = made["analysis"]["comparisons"]
    low, high = expected.confidence_interval(0.975)
    np.testing.assert_allclose((each["low"], each["high"]), (low, high), rtol=1e-9)
    _, twin = both(made)
    assert "97.5 % interval" in twin
    assert (f"The next declared look is at 8 seeds ({8 + seeds_done} of 16 runs are done)." in twin) is (look == 1)
    assert ("Look 1 (4 seeds) had said maxrl+none: improvement." in twin) is (look == 2)


def test_a_run_that_failed_before_its_first_evaluation_holds_the_look_back_and_is_named(tmp_path):
    campaign = write_campaign(tmp_path / "c", declared(TWO), states={("maxrl+none", 42): ("failed", 0)})
    metrics = campaign / "runs/maxrl+none_s42/metrics.jsonl"
    metrics.write_text("")
    made = report.write(campaign)
    assert made["look"] == 0
    assert (made["awaited"]["finished"], made["awaited"]["runs"]) == (15, 16)
    row = next(line for line in both(made)[1].splitlines() if line.startswith("| maxrl+none_s42".replace("_", "\\_")))
    assert "nothing yet" in row


def test_a_process_that_died_before_its_run_began_is_named_with_its_reason(tmp_path):
    campaign = write_campaign(tmp_path / "c", declared(TWO), left_out=[("maxrl+none", 707)])
    with (campaign / "processes.jsonl").open("a") as file:
        file.write(json.dumps({"name": "maxrl+none_s707", "code": -9, "seconds": 1, "cpu_s": 1, "why": "out of memory"}) + "\n")
    made = report.write(campaign)
    row = next(line for line in both(made)[1].splitlines() if line.startswith("| maxrl+none_s707".replace("_", "\\_")))
    assert "out of memory" in row
    assert "waiting" in row


def test_what_makes_runs_incomparable_is_said_at_the_top(tmp_path):
    facts = {
        ("maxrl+none", 42): {"eval_tasks": "99" * 32}, ("grpo+none", 101): {"device": "NVIDIA H200"},
        ("grpo+none", 202): {"code": "0123456789abcdef"},
    }  # fmt: skip
    campaign = write_campaign(tmp_path / "c", declared(TWO), facts=facts)
    write_campaign(tmp_path / "other", declared(TWO, seeds=(1, 2)))
    (tmp_path / "other/runs/maxrl+none_s1").rename(campaign / "runs/maxrl+none_s1")
    said = "\n".join(report.write(campaign)["warnings"])
    assert "not evaluated on the same tasks: 2 different sets" in said
    assert "maxrl+none_s42: evaluated on other tasks than the manifest declares" in said
    assert "2 different devices: cpu (15 runs); NVIDIA H200 (1 run)" in said
    assert "2 different states of the code" in said
    assert "maxrl+none_s1 in runs/ belong to no declared condition and seed" in said
    page, _ = both(report.write(campaign))
    assert page.index("not evaluated on the same tasks") < page.index('<section id="comparison"')


def test_equal_runs_warn_of_nothing_and_a_condition_may_set_what_it_is_about(tmp_path):
    design = declared(TWO)
    settings = {**design.conditions, "maxrl+none": {**design.conditions["maxrl+none"], "model.dtype": "bfloat16"}}
    facts = {("maxrl+none", seed): {"dtype": "bfloat16"} for seed in SEEDS}
    campaign = write_campaign(tmp_path / "c", replace(design, conditions=settings), facts=facts, noise=0.03)
    assert report.write(campaign)["warnings"] == []


def test_added_seeds_never_change_the_declared_verdict_and_theirs_is_exploratory(tmp_path):
    campaign = write_campaign(tmp_path / "c", declared(TWO), effects=(0, 0.02), added=(808, 909))
    made = report.write(campaign)
    expected = stats.ttest_ind(*(of(campaign, label) for label in TWO[::-1]), equal_var=False)
    assert made["analysis"]["comparisons"][0]["p"] == pytest.approx(expected.pvalue, rel=1e-9)
    assert not made["analysis"]["comparisons"][0]["exploratory"]
    assert made["exploratory"]["comparisons"][0]["exploratory"]
    assert len(made["exploratory"]["seeds"]) == 10
    page, _ = both(made)
    assert "With the added seeds, 10 in all, exploratory:" in page
    assert "808 (added)" in page
    assert any("Seeds 808, 909 were added" in warning for warning in made["warnings"])


def test_skewed_and_unequal_runs_are_warned_of(tmp_path):
    values = {("grpo+none", seed): 0.4 + 0.001 * i for i, seed in enumerate(range(16))}
    values |= {("maxrl+none", seed): 0.5 - (0.4 if i in (3, 7) else 0.002 * i) for i, seed in enumerate(range(16))}
    made = report.write(write_campaign(tmp_path / "c", declared(TWO, seeds=range(16)), values=values))
    assert made["analysis"]["comparisons"][0]["skewed_and_unequal"]
    assert any("skewed" in warning for warning in made["warnings"])
    twin = both(made)[1]
    (row,) = [line for line in twin[twin.index("### Sensitivity") :].splitlines()[:6] if line.startswith("| maxrl")]
    assert row.endswith("| yes |")


def test_equal_outcomes_are_called_identical_and_break_nothing(tmp_path):
    values = {(label, seed): 0.25 for label in TWO for seed in SEEDS}
    made = report.write(write_campaign(tmp_path / "c", declared(TWO), values=values))
    assert made["analysis"]["comparisons"][0]["verdict"] == "identical"
    assert "NaN" not in json.dumps(made)


def test_one_condition_has_a_mean_and_no_verdict(tmp_path):
    made = report.write(write_campaign(tmp_path / "c", declared(TWO[:1])))
    assert made["analysis"]["comparisons"] == []
    page, twin = both(made)
    assert "One condition has nothing to be compared with" in twin
    assert 'id="plot-forest"' not in page
    assert 'id="plot-strip"' in page


def test_without_held_out_tasks_the_correct_rate_of_training_is_compared(tmp_path):
    design = declared(TWO, outcome="correct_rate", evaluation={})
    made = report.write(write_campaign(tmp_path / "c", design, effects=(0, 0.2)))
    assert made["analysis"]["comparisons"][0]["verdict"] == "improvement"
    page, twin = both(made)
    assert 'id="plot-outcome"' not in page
    assert 'id="plot-correct_rate"' in page
    assert "none: the correct rate of training is compared" in twin


def test_the_paired_test_is_used_where_it_is_declared(tmp_path):
    campaign = write_campaign(tmp_path / "c", declared(TWO, test="paired"), effects=(0, 0.02))
    expected = stats.ttest_rel(of(campaign, "maxrl+none"), of(campaign, "grpo+none"))
    made = report.write(campaign)
    assert made["analysis"]["comparisons"][0]["p"] == pytest.approx(expected.pvalue, rel=1e-9)
    assert "paired t by seed" in both(made)[1]


def test_other_metrics_have_welch_intervals_and_no_verdict(full, told):
    rows = {(m["name"], m["condition"]): m for m in told["metrics"]}
    assert "p" not in rows["entropy_mean", "maxrl+none"]
    values = {}
    for label in ("maxrl+none", "grpo+none"):
        runs = [(full / f"runs/{label}_s{seed}/metrics.jsonl").read_text().splitlines() for seed in SEEDS]
        late = [[r["entropy_mean"] for r in map(json.loads, run) if "batch_size" in r and r["step"] >= 32] for run in runs]
        values[label] = [np.mean(v) for v in late]
    expected = stats.ttest_ind(*values.values(), equal_var=False).confidence_interval(0.95)
    found = rows["entropy_mean", "maxrl+none"]
    np.testing.assert_allclose((found["difference_low"], found["difference_high"]), expected, rtol=1e-9)
    assert math.isclose(found["mean"], np.mean(values["maxrl+none"]), rel_tol=1e-9)
    # Equal in all runs, or only the correct rate once more: nothing to look at.
    assert not {"approx_kl", "mean_reward", "eval/accuracy", "eval/mean_length"} & {m["name"] for m in told["metrics"]}


def test_steps_to_the_threshold_count_the_censored(told):
    reached = [r for r in told["runs"] if r["condition"] == "maxrl+gtpo_hicra" and r["reached"] is not None]
    found = told["steps_to_threshold"]["maxrl+gtpo_hicra"]
    assert (found["n"], found["reached"]) == (8, len(reached))
    assert 0 < found["reached"] < 8
    assert f"{len(reached)} of 8" in both(told)[1]


def test_cost_adds_up_what_processes_and_runs_recorded(told):
    _, twin = both(told)
    line = next(line for line in twin.splitlines() if line.startswith("| All |"))
    assert "| 40 | 7 min 56 s |" in line
    assert "| 3,962,500 | 7 min 20 s | 0.75 GB | 40 |" in line


def test_what_was_tuned_is_said_with_every_choice_and_trial(tmp_path):
    tune = {"field": "training.lr", "values": [1e-4, 1e-3], "seeds": [1, 2], "max_steps": 40, "digest": "ab"}
    chosen = {"grpo+none": 1e-3, "maxrl+none": 1e-4}
    campaign = write_campaign(tmp_path / "c", declared(TWO, tune=tune), chosen=chosen)
    write_campaign(tmp_path / "other", declared(TWO, seeds=(1,)))
    (tmp_path / "other/runs").rename(campaign / "trials")
    made = report.write(campaign)
    assert {trial["name"] for trial in made["trials"]} == {"grpo+none_s1", "maxrl+none_s1"}
    _, twin = both(made)
    assert "training.lr was chosen for each condition" in twin.replace("\\", "")
    assert "| maxrl+none | 0.0001 |" in twin
    assert "| training.lr | 0.001 | 0.0001 |" in twin
    for label, said in (
        ("grpo+none", "training.lr = 0.001, the largest of the values that were tried: larger ones may be better."),
        ("maxrl+none", "training.lr = 0.0001, the smallest of the values that were tried: smaller ones may be better."),
    ):
        assert any(text.startswith(f"{label} chose {said} Widen the list") for text in made["warnings"])
    assert twin.count("Widen the list (campaign.tune) by larger values in a new campaign.") == 2


@pytest.mark.parametrize(
    ("values", "chosen"),
    [([1e-4, 1e-3, 1e-2], 1e-3), (["linear", "auto"], "auto"), ([False, True], True), ([1e-3], 1e-3), ([1e-4, 1e-3], None)],
)
def test_a_choice_inside_the_list_or_of_no_numbers_or_not_made_is_not_at_an_edge(values, chosen):
    design = declared(TWO, tune={"field": "x.y", "values": values, "seeds": [1], "max_steps": 4})
    assert cautions.at_edge(design, {} if chosen is None else {"grpo+none": chosen}) == []


def test_settings_that_look_like_secrets_are_hidden(tmp_path):
    campaign = write_campaign(tmp_path / "c", declared(TWO))
    with (campaign / "config.toml").open("a") as file:
        file.write('[backend]\noptions = {authorization = "not_for_others"}\n')
    for text in both(report.write(campaign)):
        assert "not_for_others" not in text
        assert "hidden: it holds what looks like a secret" in text


FULL = """[model]
model = "retrain/tiny"
[algorithm]
advantage_mode = "maxrl"
transform_mode = "gtpo_sepa"
[training]
seed = -1
max_steps = 500
lr = 0.001
[sepa]
steps = 500
delay_steps = 2
"""


def test_settings_name_what_runs_had_and_a_dash_where_a_condition_does_not_use_it(tmp_path):
    design = declared(("grpo+none", "maxrl+gtpo_sepa"), seeds=(1, 2))
    design.conditions["maxrl+gtpo_sepa"]["sepa.steps"] = 4
    campaign = write_campaign(tmp_path / "c", design)
    (campaign / "config.toml").write_text(FULL)
    _, twin = both(report.write(campaign))
    assert "| sepa.steps | \u2013 | 4 |" in twin.replace("\\_", "_")
    settings = twin[twin.index("## Settings") : twin.index("## Cost")].replace("\\_", "_")
    assert "\u2013: the condition does not use it." in settings
    assert "| training.max_steps" not in settings
    assert "| training.seed" not in settings
    assert "Each run has its own training.seed (2 seeds) and 40 steps, as declared." in settings
    assert "| training.lr | 0.001 |" in settings
    assert "| sepa.delay_steps | 2 |" in settings


def test_no_interval_of_a_speed_reaches_below_0_and_rounding_is_not_drawn(tmp_path):
    campaign = write_campaign(tmp_path / "c", declared(TWO, seeds=(1, 2)))
    for k, metrics in enumerate(sorted(campaign.glob("runs/*/metrics.jsonl"))):
        rows = [json.loads(line) for line in metrics.read_text().splitlines()]
        for row in rows:
            if "batch_size" in row:
                row |= {"tokens_per_second": 100.0 if k % 2 else 3000.0, "approx_kl": 3e-12 * (1 + 0.1 * k)}
        metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = report.write(campaign)
    _, twin = both(made)
    assert next(m for m in made["metrics"] if m["name"] == "tokens_per_second")["low"] < 0
    (line,) = [line for line in twin.splitlines() if line.startswith("- **Sampling speed** (plot)")]
    assert "(0 to " in line
    assert "-" not in line.removeprefix("- ")
    row = next(line for line in twin.splitlines() if line.startswith("| Sampling speed"))
    assert "| 0 to " in row
    assert all(m["name"] != "approx_kl" for m in made["metrics"])
    assert "KL, sampler to learner** (plot)" not in twin
    assert "KL, sampler to learner: at most 3.9e-12 nats per token, which is rounding, and not drawn." in twin


def test_a_changed_manifest_is_refused_in_one_line(tmp_path, capsys):
    campaign = write_campaign(tmp_path / "c", declared(TWO))
    path = campaign / "manifest.json"
    path.write_text(path.read_text().replace('"smallest_effect": 0.02', '"smallest_effect": 0.2'))
    with pytest.raises(ResumeError, match="changed since"):
        report.write(campaign)
    assert main(["report", str(campaign)]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_torn_and_missing_files_of_runs_break_nothing(tmp_path):
    campaign = write_campaign(tmp_path / "c", declared(TWO))
    with (campaign / "runs/maxrl+none_s42/metrics.jsonl").open("a") as file:
        file.write('[1]\n{"step": 41, "batch_size": "many", "correct_rate": null}\n{"step": 42, "eval/accu')
    (campaign / "runs/grpo+none_s42/run.json").unlink()
    (campaign / "runs/grpo+none_s101/metrics.jsonl").unlink()
    (campaign / "config.toml").write_text("not = [toml")
    made = report.write(campaign)
    assert made["look"] == 0
    assert made["awaited"]["finished"] == 14


def test_the_report_writes_over_its_own_and_over_nothing_else(tmp_path):
    campaign = write_campaign(tmp_path / "c", declared(TWO))
    first = report.write(campaign)
    assert report.write(campaign)["html"] == first["html"] == str(campaign / "report.html")
    mine = tmp_path / "mine.html"
    mine.write_text("<p>mine</p>")
    with pytest.raises(UsageError, match="is no report of retrain"):
        report.write(campaign, mine)
    (tmp_path / "out").mkdir()
    assert report.write(campaign, tmp_path / "out")["html"] == str(tmp_path / "out/report.html")


def test_the_command_says_verdicts_and_where_they_lie(tmp_path, capsys):
    campaign = write_campaign(tmp_path / "c", declared(TWO), effects=(0, 0.1))
    assert main(["report", str(campaign)]) == 0
    said = capsys.readouterr().out
    assert "maxrl+none: improvement: +" in said
    assert str(campaign / "report.html") in said
    assert main(["report", str(campaign), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["counts"] == {"done": 16}
    assert main(["report", str(campaign), "--max-mb", "20"]) == 2


def test_a_band_is_the_t_interval_of_the_runs_that_are_known():
    values = np.array([[0.1, 0.2, np.nan], [0.3, 0.5, 0.6], [0.2, np.nan, np.nan]])
    mean, low, high, count = figures.band(values)
    np.testing.assert_array_equal(count, [3, 2, 1])
    np.testing.assert_allclose(mean, [0.2, 0.35, 0.6])
    for i in (0, 1):
        known = values[~np.isnan(values[:, i]), i]
        expected = stats.t.interval(0.95, len(known) - 1, known.mean(), stats.sem(known))
        np.testing.assert_allclose((low[i], high[i]), expected)
    assert np.isnan([low[2], high[2]]).all()


def test_a_run_that_broke_off_stays_in_its_curve_and_one_that_goes_on_ends_where_it_is():
    steps, values = np.arange(1.0, 11.0), np.linspace(0.1, 1.0, 10)
    held, going = (reading.on_grid(steps, values, 20, hold=hold) for hold in (True, False))
    at = reading.grid(20)
    np.testing.assert_allclose(held[at > 10], values[5:].mean())
    assert np.isnan(going[at > 10]).all()
    np.testing.assert_allclose(going[at == 10], values[5:].mean())
    np.testing.assert_allclose(held[at == 3], values[:3].mean())


def test_long_runs_are_sampled_and_their_last_fifth_is_read_whole(tmp_path):
    design = declared(TWO[:1], seeds=(1, 2), steps=6000)
    campaign = write_campaign(tmp_path / "c", design, every=1000)
    run = findings.gather(campaign).outcomes[0]
    rows = [json.loads(line) for line in (Path(run.path) / "metrics.jsonl").read_text().splitlines()]
    late = [r["correct_rate"] for r in rows if "batch_size" in r and r["step"] + 1 > 4800]
    found = reading.read(run, design)
    assert found.late["correct_rate"] == pytest.approx(np.mean(late), rel=1e-12)
    rates = np.array([r["correct_rate"] for r in rows if "batch_size" in r])
    at = reading.grid(6000)
    near = np.array([rates[max(0, int(g) - 100) : int(g)].mean() for g in at])
    assert np.abs(found.curves["correct_rate"] - near)[1:].max() < 0.03


def test_five_conditions_by_64_seeds_are_quick_and_small(tmp_path):
    design = declared(seeds=range(1, 65), threshold=0.35)
    campaign = write_campaign(tmp_path / "c", design, effects=EFFECTS, every=5)
    began = time.process_time()
    made = report.write(campaign)
    assert time.process_time() - began < 20
    assert made["bytes"] < 3e6
    assert made["awaited"]["finished"] == 320


def test_the_manifest_stays_as_it_was(full, told):
    assert told["digest"] == manifest.digest(declared(threshold=0.35))
    assert told["digest"] in both(told)[0]
    assert manifest.read(full).declared == declared(threshold=0.35)
