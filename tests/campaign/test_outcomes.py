"""What counts as a run's outcome, and what a reader is told of runs that did not go as declared."""

from __future__ import annotations

import json
import re
import runpy
from dataclasses import replace
from pathlib import Path

import pytest

from retrain.campaign import findings, outcomes, progress, report
from retrain.campaign.manifest import settings_digest
from retrain.campaign.statistics import reach
from retrain.config.load import dump_toml, load_config

_made = runpy.run_path(str(Path(__file__).with_name("made_campaigns.py")))
declared, write_campaign = (_made[k] for k in ("declared", "write_campaign"))
A, B = TWO = ("grpo+none", "maxrl+none")
SEEDS = (1, 2, 3)


@pytest.fixture
def campaign(tmp_path):
    """Two conditions, three seeds, ten steps, evaluated at 0, 5, 8 and 10, all done."""
    made = write_campaign(tmp_path / "c", declared(TWO, SEEDS, steps=10), effects=(0, 0.02))
    for label in TWO:
        for seed in SEEDS:
            rewrite(made, f"{label}_s{seed}", [(at, 0.5 + 0.01 * seed) for at in (0, 5, 8, 10)])
    return made


def rewrite(campaign, name, points, *, status="done", step=10, **more):
    """Give a run these evaluations, and this end."""
    path = campaign / "runs" / name
    same = {"eval/tasks": 8, "eval/samples": 1, "eval/errors": 0, **more}
    rows = [{"step": at, "eval/accuracy": value, **same} for at, value in points]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = json.loads((path / "run.json").read_text())
    (path / "run.json").write_text(json.dumps({**run, "status": status, "step": step}))


def ends(campaign, name, *codes, step=0):
    """Say how a run's processes ended."""
    with (campaign / "processes.jsonl").open("a") as file:
        for code in codes:
            row = {"name": name, "code": code, "seconds": 3.0, "cpu_s": 1.0, "peak_bytes": 1, "why": f"ended with {code}"}
            row["step"] = step
            file.write(json.dumps(row) + "\n")


def of(campaign, name):
    """The findings, a run and the warnings as one text."""
    found = findings.gather(campaign)
    return found, next(run for run in found.outcomes if run.name == name), "\n".join(found.warnings)


@pytest.mark.parametrize(("step", "points", "said"), [
    (100, [(0, 0.1), (8, 0.5), (10, 0.5), (50, 0.9), (100, 0.9)], "went on beyond the 10 declared steps"),
    (3, [(0, 0.1), (3, 0.3)], "done before the 10 declared steps"),
])  # fmt: skip
def test_a_run_of_another_length_is_not_judged_and_named(campaign, step, points, said):
    rewrite(campaign, f"{B}_s1", points, step=step)
    found, run, warned = of(campaign, f"{B}_s1")
    assert (run.state, run.value, found.is_readable) == ("interrupted", None, False)
    assert f"{B}_s1 (at step {step})" in warned
    assert said in warned
    assert all(at <= 10 for at, _ in run.curve)
    cell = next(cell for cell in progress.look(campaign).cells if cell.name == f"{B}_s1")
    assert (cell.state, cell.value) == ("interrupted", None)


def test_evaluations_after_the_declared_steps_never_count(campaign):
    rewrite(campaign, f"{B}_s1", [(8, 0.4), (10, 0.6), (20, 0.9)])
    assert of(campaign, f"{B}_s1")[1].value == pytest.approx(0.5)


def test_the_last_fifth_of_ten_training_steps_are_two(tmp_path):
    made = write_campaign(tmp_path / "c", declared(TWO, SEEDS, steps=10, outcome="correct_rate", evaluation={}))
    path = made / f"runs/{B}_s1/metrics.jsonl"
    path.write_text("".join(json.dumps({"step": i, "batch_size": 2, "correct_rate": (i + 1) / 10}) + "\n" for i in range(10)))
    assert of(made, f"{B}_s1")[1].value == pytest.approx(0.95)


def test_lost_rollouts_are_said_by_condition(campaign):
    rewrite(campaign, f"{B}_s1", [(8, 0.9), (10, 0.9)], **{"eval/errors": 7})
    _, run, warned = of(campaign, f"{B}_s1")
    assert (run.lost, run.asked) == (14, 16)
    assert f"lost rollouts to errors: {B} 14 of 16 in 1 run." in warned


def test_late_evaluations_without_an_outcome_leave_none(campaign):
    rewrite(campaign, f"{B}_s1", [(0, 0.7), (5, None), (8, None), (10, None)])
    found, run, warned = of(campaign, f"{B}_s1")
    assert (run.state, run.value, run.null, found.is_readable) == ("done", None, 2, False)
    assert f"Evaluations without an outcome, which count nowhere: {B} 2 in 1 run." in warned
    assert f"{B}_s1 is done without an outcome" in warned


@pytest.mark.parametrize("row", [{"eval/accuracy": 0.9}, {"step": None, "eval/accuracy": 0.9}])
def test_rows_without_a_step_are_skipped_and_said(campaign, row):
    with (campaign / f"runs/{B}_s1/metrics.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    _, run, warned = of(campaign, f"{B}_s1")
    assert (run.value, run.skipped) == (pytest.approx(0.51), 1)
    assert f"do not say at which step they were, and count nowhere: {B}_s1." in warned


def test_a_verdict_of_runs_that_broke_off_says_so(campaign):
    for seed in SEEDS:
        rewrite(campaign, f"{B}_s{seed}", [(0, 0.1 + 0.001 * seed)], status="failed", step=0)
    found, _, warned = of(campaign, f"{B}_s1")
    said = f"3 of 3 runs of {B} broke off; they count at their last evaluation."
    (verdict,) = found.analysis.comparisons
    assert verdict.verdict == "degradation"
    assert verdict.text.endswith(said)
    assert said in warned
    assert "the untrained one counts" in warned
    assert A not in said


@pytest.mark.parametrize(("codes", "state", "counts"), [
    ((-9, -9), "failed", True), ((1, 1), "failed", True), ((-9,), "waiting", False), ((2, 2), "waiting", False),
    ((130, -9), "waiting", False), ((), "waiting", False),
])  # fmt: skip
def test_a_run_that_never_began_counts_after_two_abnormal_ends(tmp_path, codes, state, counts):
    made = write_campaign(tmp_path / "c", declared(TWO, SEEDS, steps=10), states={(B, 1): ("waiting", 0)})
    ends(made, f"{B}_s1", *codes)
    found, run, warned = of(made, f"{B}_s1")
    assert (run.state, run.value, found.is_readable) == (state, 0.0 if counts else None, counts)
    assert (f"{B}_s1 ended abnormally again and again without a single evaluation, and counts 0." in warned) is counts
    assert run.error == (f"ended with {codes[-1]}" if codes else "")
    assert progress.look(made).awaited()[1] == (6 if counts else 5)


@pytest.mark.parametrize(("steps", "state"), [((5, 5), "failed"), ((3, 5), "dead")])
def test_a_run_that_is_killed_every_time_counts_once_it_gets_no_further(campaign, steps, state):
    rewrite(campaign, f"{B}_s1", [(0, 0.1), (5, 0.3)], status="running", step=5)
    for step in steps:
        ends(campaign, f"{B}_s1", -9, step=step)
    _, run, _ = of(campaign, f"{B}_s1")
    assert (run.state, run.value) == (state, 0.3 if state == "failed" else None)


@pytest.mark.parametrize(("code", "said"), [(1, True), (130, False), (-9, False), (2, False)])
def test_runs_that_failed_and_were_tried_again_are_named(campaign, code, said):
    (campaign / "processes.jsonl").write_text("")
    ends(campaign, f"{B}_s2", code, 0)
    _, run, warned = of(campaign, f"{B}_s2")
    assert run.retried is said
    assert (f"tried again until done: {B}_s2." in warned) is said


def test_what_a_condition_may_set_is_the_same_within_it(campaign):
    for seed, plugins in zip(SEEDS, ("P1", "P1", "P2"), strict=True):
        change(campaign, f"{B}_s{seed}", plugins=plugins, tokenizer="K2" if seed == 3 else "K1")
    warned = of(campaign, f"{B}_s1")[2]
    assert f"The runs of {B} used 2 different states of plug-ins: P1 (2 runs); P2 (1 run)." in warned
    assert "2 different tokenizers" in warned


def change(campaign, name, **facts):
    """Change what a run recorded."""
    path = campaign / f"runs/{name}/run.json"
    run = json.loads(path.read_text())
    path.write_text(json.dumps({**run, "facts": {**run["facts"], **facts}}))


def test_runs_with_other_settings_or_another_seed_are_named(tmp_path):
    def config(seed, lr):
        return load_config({"training": {"seed": seed, "max_steps": 10, "lr": lr}, "logging": {"log_dir": f"logs/{seed}"}})

    design = replace(declared(TWO, SEEDS, steps=10), settings=dict.fromkeys(TWO, settings_digest(config(1, 1e-3))))
    made = write_campaign(tmp_path / "c", design)
    for label in TWO:
        for seed in SEEDS:
            (made / f"runs/{label}_s{seed}/config.toml").write_text(dump_toml(config(seed, 1e-3)))
    assert "settings" not in of(made, f"{B}_s1")[2]
    (made / f"runs/{B}_s1/config.toml").write_text(dump_toml(config(1, 2e-3)))
    (made / f"runs/{B}_s3/config.toml").write_text(dump_toml(config(2, 1e-3)))
    warned = of(made, f"{B}_s1")[2]
    assert f"{B}_s1 ran with other settings than the manifest declares" in warned
    assert f"{B}_s3 (seed 2) trained with another seed than the folder's name says" in warned


def test_shown_intervals_stay_where_shares_and_steps_can_lie(tmp_path):
    values = {(label, seed): 0.99 if seed != 3 else 0.6 for label in TWO for seed in SEEDS}
    made = report.write(write_campaign(tmp_path / "c", declared(TWO, SEEDS, steps=10), values=values))
    text = Path(made["markdown"]).read_text()
    assert "to 100.0%" in text
    assert not re.search(r"to 1(0[1-9]|[1-9]\d)\.\d%", text)
    found = reach([1, 9, None], [10, 10, 10], 10)
    assert 0 <= found.low <= found.mean <= found.high <= 10
    assert found.high == 10


def test_a_dead_trial_is_not_given_up_by_what_only_reads_it(campaign):
    rewrite(campaign, f"{B}_s1", [(0, 0.1)], status="running", step=0)
    found = outcomes.outcome(campaign / f"runs/{B}_s1", B, 1, declared(TWO, SEEDS, steps=10))
    assert (found.state, found.value) == ("dead", None)
