"""What a report is made of: thinning that hides nothing, a sample of rollouts within its budget, and runs in any state."""

from __future__ import annotations

import json
import os
import random
import runpy
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrain.cli.main import main
from retrain.errors import UsageError
from retrain.report import content, figures, rollouts
from retrain.report.build import write
from retrain.report.gather import gather
from retrain.report.thinning import bucket_means, envelope, every_nth, spark, trailing_mean
from retrain.report.visible import visible
from retrain.tracking.read import RunRecord

_made = runpy.run_path(str(Path(__file__).parents[1] / "real/report_runs.py"))
fabricate, generation, step_row = (_made[name] for name in ("fabricate", "generation", "step_row"))

VALUES = st.lists(st.one_of(st.just(float("nan")), st.floats(-1e6, 1e6)), min_size=1, max_size=400)


@settings(deadline=None)
@given(VALUES, st.integers(2, 60))
def test_an_envelope_keeps_the_extremes_and_invents_no_point(values, points):
    y = np.array(values)
    x = np.arange(len(y), dtype=np.float64)
    thin_x, thin_y = envelope(x, y, points)
    assert len(thin_x) <= max(points, len(y) if len(y) <= points else points)
    assert (np.diff(thin_x) > 0).all()
    np.testing.assert_array_equal(thin_y, y[thin_x.astype(int)])
    if not np.isnan(y).all():
        assert np.nanmax(thin_y) == np.nanmax(y)
        assert np.nanmin(thin_y) == np.nanmin(y)


def test_short_curves_stay_as_they_are_and_gaps_stay_gaps():
    x = np.arange(100.0)
    y = np.where((x >= 40) & (x < 60), np.nan, x)
    assert envelope(x, y, 100)[1] is y
    thin_x, thin_y = envelope(x, y, 20)
    assert np.isnan(thin_y[(thin_x >= 40) & (thin_x < 60)]).all()
    assert np.isnan(thin_y).sum() == 2


def test_a_trailing_mean_is_the_mean_of_the_known_values_it_looks_back_on():
    y = np.array([1.0, np.nan, 3.0, 5.0, np.nan, np.nan, np.nan, 2.0])
    np.testing.assert_allclose(trailing_mean(y, 3), [1, 1, 2, 4, 4, 5, np.nan, 2])
    draw = np.random.default_rng(0).normal(size=200)
    expected = [draw[max(0, i - 6) : i + 1].mean() for i in range(200)]
    np.testing.assert_allclose(trailing_mean(draw, 7), expected)


def test_bucket_means_keep_the_mean_and_every_nth_ends_at_the_last_step():
    x, y = np.arange(1000.0), np.random.default_rng(1).random(1000)
    starts, means = bucket_means(x, y, 100)
    assert len(means) == 100
    assert means.mean() == pytest.approx(y.mean())
    assert starts[0] == 0
    assert every_nth(x, y, 30)[0][-1] == 999


def test_sparks():
    assert spark(np.array([0.0, 0.5, 1.0, np.nan])) == "▁▅█ "
    assert spark(np.full(500, 2.0)) == "▁" * 24
    assert spark(np.array([np.nan])) == ""


def test_unseen_characters_are_written_out_and_others_left():
    assert visible("a\u202eb\x00\u2066") == "a⟨U+202E⟩b⟨U+0000⟩⟨U+2066⟩"
    kept = "line\n\ttab 日本語 مرحبا 👩‍🔬 é"
    assert visible(kept) == kept


@given(st.sets(st.integers(0, 3000), max_size=300), st.lists(st.integers(0, 3000), max_size=5))
def test_every_step_has_its_turn_ends_first(steps, urgent):
    order = rollouts.spread(list(steps), urgent)
    assert sorted(order) == sorted(steps)
    if len(steps) > 1:
        assert order[:2] == [min(steps), max(steps)]
        here = {step for step in urgent if step in steps} - set(order[:2])
        assert set(order[2 : 2 + len(here)]) == here


def test_wherever_the_budget_ends_the_steps_before_lie_evenly():
    order = rollouts.spread(range(10_000))
    for count in (10, 100, 1000):
        gaps = np.diff(sorted(order[:count]))
        assert gaps.max() <= 4 * 10_000 / count


def write_generations(path, rows, torn=""):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + torn)
    return path


def test_rollouts_fit_their_budget_and_say_what_is_left_out(tmp_path):
    draw = random.Random(0)
    rows = [generation(step, m, draw, tokens=80) for step in range(200) for m in range(4)]
    path = write_generations(tmp_path / "g.jsonl", rows, torn='{"step": 200, "task": "half')
    shown = rollouts.choose(path, budget=300_000, correct_at=None, urgent=[77])
    assert shown.total == 800
    assert shown.steps_total == 200
    steps = [row[0] for row in shown.rows]
    assert steps == sorted(steps)
    assert {0, 77, 199} <= set(steps)
    size = len("".join(rollouts.elements(shown)).encode())
    assert 200_000 < size <= 300_000
    everything = rollouts.choose(path, budget=10**9, correct_at=None)
    assert len(everything.rows) == 800
    assert len(everything.prompts) == 200


def test_a_rollout_keeps_its_numbers_to_four_digits(tmp_path):
    row = generation(0, 0, random.Random(3), tokens=50)
    shown = rollouts.choose(write_generations(tmp_path / "g.jsonl", [row]), budget=10**6, correct_at=None)
    body = json.loads(shown.bodies[0])
    for name in ("advantages", "uncertainty", "logprobs"):
        np.testing.assert_allclose(body["credit"][name], row["credit"][name], rtol=5e-4)
    assert body["credit"]["texts"] == row["credit"]["texts"]
    assert body["credit"]["planning"] == [1, 2]
    assert shown.prompts[body["prompt"]] == row["prompt"]


def test_of_a_very_long_rollout_the_middle_is_left_out_and_counted(tmp_path):
    row = generation(0, 0, random.Random(4), tokens=10_000)
    shown = rollouts.choose(write_generations(tmp_path / "g.jsonl", [row]), budget=10**7, correct_at=None)
    credit = json.loads(shown.bodies[0])["credit"]
    assert credit["count"] == 10_000
    assert len(credit["texts"]) == len(credit["logprobs"]) == 4000
    assert credit["gap"] == [3000, 6000]
    assert credit["texts"][-1] == row["credit"]["texts"][-1]


def test_correct_is_judged_as_the_run_judged_it(tmp_path):
    draw = random.Random(5)
    inside = [generation(0, m, draw, reward=r) for m, r in enumerate((0.0, 0.6, None))]
    path = write_generations(tmp_path / "g.jsonl", inside)
    place = rollouts.FIELDS.index("correct")
    assert [row[place] for row in rollouts.choose(path, budget=10**6, correct_at=None).rows] == [0, 1, None]
    assert [row[place] for row in rollouts.choose(path, budget=10**6, correct_at=0.7).rows] == [0, 0, None]
    outside = write_generations(tmp_path / "o.jsonl", [*inside, generation(0, 3, draw, reward=-1.0)])
    assert [row[place] for row in rollouts.choose(outside, budget=10**6, correct_at=None).rows] == [None] * 4


def test_the_runs_own_verdict_decides_and_a_guessed_one_is_said(tmp_path):
    draw = random.Random(5)
    own = [generation(0, m, draw, reward=0.4, correct=c) for m, c in enumerate((True, False, None))]
    old = generation(0, 3, draw, reward=0.9)
    place = rollouts.FIELDS.index("correct")
    for name, rows, verdicts, said in (
        ("own", own, [1, 0, None], ""),
        ("mixed", [*own, old], [1, 0, None, 1], "An earlier version wrote 1 of these"),
        ("old", [old], [1], "An earlier version wrote these"),
    ):
        shown = rollouts.choose(write_generations(tmp_path / name, rows), budget=10**6, correct_at=0.5)
        assert [row[place] for row in shown.rows] == verdicts
        assert content.rollouts_note(shown).startswith(said)
        assert bool(content.rollouts_note(shown)) == bool(said)
    run = fabricate(tmp_path / "run", 2)
    made = write(run)
    assert all("An earlier version wrote these" in Path(made[k]).read_text() for k in ("html", "markdown"))


@pytest.mark.parametrize("where", ["completion", "prompt", "tokens", "token"])
def test_one_huge_rollout_is_cut_in_place_and_hides_no_other(tmp_path, where):
    run = fabricate(tmp_path / "run", 10, generations=8)
    path = run / "emergence/generations.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    text = "<" * 8_000_000
    if where in ("completion", "prompt"):
        rows[0][where] = text
    elif where == "token":
        rows[0]["credit"]["texts"][0] = text
    else:
        rows[0] = generation(0, 0, random.Random(1), tokens=150_000)
    write_generations(path, rows)
    made = write(run, megabytes=7)
    assert made["rollouts"] == made["rollouts_stored"] == 80
    assert made["bytes"] < 7e6
    page = Path(made["html"]).read_text()
    if where in ("completion", "prompt"):
        assert "characters left out; generations.jsonl has them]" in page
    elif where == "tokens":
        body = json.loads(rollouts.choose(path, budget=10**6, correct_at=None).bodies[0])
        left = body["credit"]["gap"][1]
        assert len(body["credit"]["texts"]) + left == body["credit"]["count"] == 150_000
        assert "left out" in body["completion"]


def test_a_rollout_that_cannot_be_cut_is_left_out_and_counted(tmp_path):
    draw = random.Random(1)
    vast = generation(0, 0, draw, parts={f"part {i}": 0.5 for i in range(50_000)})
    path = write_generations(tmp_path / "g.jsonl", [vast, generation(0, 1, draw)])
    shown = rollouts.choose(path, budget=10**6, correct_at=None)
    assert [row[rollouts.FIELDS.index("member")] for row in shown.rows] == [1]
    assert shown.total == 2


def test_embedded_json_cannot_end_its_element():
    hostile = {"a": "</script><!--<script>\u2028&", "b": "\ud800"}
    text = rollouts.encode(hostile)
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == hostile
    text.encode()


EVENTS = """\
2026-01-01 10:00:00,000 INFO Loading
2026-01-01 10:05:00,000 INFO Resuming logs/x after 5 steps from step_000005.
2026-01-01 10:05:00,001 INFO byte-exact: no, because threads were 2 and are 1.
2026-01-01 10:06:00,000 WARNING slow disk
2026-01-01 10:07:00,000 WARNING slow disk
2026-01-01 10:08:00,000 DEBUG too many rewards failed. Fix: look at them.
Traceback (most recent call last):
  File "x.py", line 1
RewardError: too many rewards failed.
"""


def test_a_failed_and_resumed_run_says_so(tmp_path):
    run = fabricate(tmp_path / "run", 8, status="failed", events=EVENTS, spike=None)
    made = write(run)
    twin = Path(made["markdown"]).read_text()
    page = Path(made["html"]).read_text()
    for text in (
        "failed",
        "too many rewards failed",
        "RewardError",
        "no, because threads were 2 and are 1",
        "slow disk",
    ):
        assert text in twin
        assert text in page
    assert "resumed 1 time" in twin
    data = gather(RunRecord.at(run))
    assert data.events.warnings == {"slow disk": 2}
    assert [(r.step, r.exact) for r in data.events.resumes] == [(5, "no, because threads were 2 and are 1")]
    assert "held-out accuracy was not measured" in twin


def test_an_empty_a_dead_and_a_torn_run_have_reports(tmp_path):
    empty = fabricate(tmp_path / "empty", 0, status="running")
    made = write(empty)
    assert made["plots"] == 0
    assert "0 of 0" in Path(made["markdown"]).read_text()
    assert "dead" in Path(made["markdown"]).read_text()
    torn = fabricate(tmp_path / "torn", 5)
    with (torn / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "mean_rew')
    (torn / "run.json").unlink()
    (torn / "config.toml").write_text("broken = [")
    (torn / "events.log").unlink()
    assert write(torn)["steps"] == 5
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "metrics.jsonl").write_text("")
    assert write(bare)["rollouts"] == 0
    one = fabricate(tmp_path / "one", 1)
    assert write(one)["plots"] > 5


def test_a_run_that_goes_on_is_shown_as_running(tmp_path):
    import fcntl

    run = fabricate(tmp_path / "run", 4, status="running")
    with (run / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "**Status**: running" in Path(write(run)["markdown"]).read_text()
    assert "**Status**: dead" in Path(write(run)["markdown"]).read_text()


def test_nulls_and_strange_values_break_nothing(tmp_path):
    run = fabricate(tmp_path / "run", 3)
    row = dict.fromkeys(step_row(3, 4, random.Random(0)))
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({**row, "step": 3, "mine/new": 1.5, "rewards/<b>": 2}) + "\n")
        file.write('{"step": 4, "mean_reward": NaN, "condition": 7}\n[1]\n{"no": "step"}\n')
    data = gather(RunRecord.at(run))
    assert data.done == 5
    assert np.isnan(data.columns["mine/new"][:3]).all()
    assert write(run)["steps"] == 5


def test_settings_that_nobody_chose_are_folded_away(tmp_path):
    origins = {"training.lr": "retrain.toml:12", "training.seed": "--seed", "model.lora_rank": "default"}
    run = fabricate(tmp_path / "run", 2, facts={"origins": origins})
    chosen, left = content.settings(gather(RunRecord.at(run)))
    assert ("training.lr", "0.001", "retrain.toml:12") in chosen.rows
    assert ("training.seed", "42", "--seed") in chosen.rows
    assert ("model.lora_rank", "16") in left.rows
    assert len(chosen.rows) == 2
    (run / "run.json").write_text("{}")
    chosen, left = content.settings(gather(RunRecord.at(run)))
    assert left is None
    assert "did not record" in chosen.note


def test_a_secret_that_a_run_holds_is_not_published(tmp_path):
    config = _made["CONFIG"].format(steps=2) + '[backend]\noptions = {deep = [{authorization = "q9q9_mine"}], x = 1}\n'
    made = write(fabricate(tmp_path / "run", 2, config=config))
    for name in ("html", "markdown"):
        text = Path(made[name]).read_text()
        assert "q9q9_mine" not in text
        assert "hidden: it holds what looks like a secret" in text


def test_phases_add_up_to_the_step(tmp_path):
    data = gather(RunRecord.at(fabricate(tmp_path / "run", 20)))
    found = figures.phases(data)
    assert [label for label, _ in found] == ["weights over", "sample", "score", "train", "rest"]
    np.testing.assert_allclose(np.sum([s for _, s in found], axis=0), data.columns["step_time_s"])


def test_the_file_stays_within_the_size_that_was_asked_for(tmp_path):
    run = fabricate(tmp_path / "run", 300, generations=4, tokens=200)
    made = write(run, megabytes=7)
    assert made["bytes"] < 7e6
    assert 0 < made["rollouts"] < made["rollouts_stored"]


@pytest.mark.parametrize("lines", [1, 3, 40])
def test_a_spike_of_one_step_in_ten_thousand_is_drawn_as_high_as_it_was(tmp_path, lines):
    steps = 10_000
    parts = [f"rewards/{i}" for i in range(lines)]
    names = (
        "entropy_mean",
        "exec_entropy_mean",
        "plan_entropy_mean",
        "exec_surprisal_mean",
        "plan_surprisal_mean",
        *parts,
    )
    (tmp_path / "metrics.jsonl").write_text(
        "".join(
            json.dumps({"step": i, **dict.fromkeys(names, 9.0 if i == 6007 else 0.5)}) + "\n"
            for i in range(steps)
        )
    )
    drawn = {plot.name: plot for plot in figures.plots(gather(RunRecord.at(tmp_path)))}
    for name, count in (("entropy", 3), ("surprisal", 2), ("reward_parts", lines)):
        data = drawn[name].figure.data
        assert sum(max(trace.y) == 9.0 for trace in data) == count
        assert sum(len(trace.x) for trace in data) <= max(count, 3) * 1500
        assert "Faint: the lowest and the highest" in drawn[name].caption


def test_an_evaluation_without_an_interval_is_still_the_last_one(tmp_path):
    run = fabricate(tmp_path / "run", 10, every=5)
    row = {"step": 12, "eval/accuracy": 0.9, "eval/accuracy_low": None, "eval/accuracy_high": None}
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    data = gather(RunRecord.at(run))
    fact = next(fact for fact in content.headline(data) if fact.label == "Last evaluation")
    assert (fact.value, fact.note) == ("90.0%", "no interval, after 12 steps")
    table = content.evaluations(data)
    assert table.rows[-1][:4] == ("12", "arithmetic/test", "90.0%", "no interval")
    assert content.several([data]).rows[0][6:8] == ("90.0%", "no interval")
    drawn = next(plot for plot in figures.plots(data) if plot.name == "evaluation").figure.data[0]
    assert drawn.y[-1] == 0.9
    assert drawn.customdata[-1][0] == "no interval"
    assert "NaN" not in write(run)["html"]
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({**row, "step": 20, "eval/accuracy": None}) + "\n")
    fact = next(f for f in content.headline(gather(RunRecord.at(run))) if f.label == "Last evaluation")
    assert fact.note == "no interval, after 12 steps; the one after 20 steps has no accuracy"


@pytest.mark.parametrize("name", ["README.md", "README.html"])
def test_a_file_that_is_no_report_is_never_written_over(tmp_path, capsys, name):
    run = fabricate(tmp_path / "run", 2)
    mine = tmp_path / name
    mine.write_text("# Mine\n\nMade by hand\n")
    before = set(tmp_path.iterdir())
    assert main(["report", str(run), "--out", str(tmp_path / "README.html")]) == 2
    error = capsys.readouterr().err
    assert f"{mine} exists and is no report of retrain" in error
    assert "Fix: name another file with --out" in error
    assert len(error.splitlines()) == 1
    assert mine.read_text().startswith("# Mine")
    assert set(tmp_path.iterdir()) == before
    mine.unlink()
    for _ in range(2):
        assert main(["report", str(run), "--out", str(tmp_path / "README.html")]) == 0
    assert (tmp_path / "README.md").read_text().splitlines()[2].startswith("Made by retrain ")


def test_the_reports_of_a_folder_of_runs_are_written_over_and_a_folder_is_not(tmp_path):
    for name in ("a", "b"):
        fabricate(tmp_path / name, 2)
    for _ in range(2):
        assert write(tmp_path)["plots"] > 0
    (tmp_path / "report.md").unlink()
    (tmp_path / "report.md").mkdir()
    with pytest.raises(UsageError, match=r"report\.md exists and is no report"):
        write(tmp_path)


def test_runs_of_one_name_are_told_apart_and_one_without_results_is_shown(tmp_path):
    for place in ("a/run", "b/run"):
        fabricate(tmp_path / place, 3)
    (tmp_path / "c").mkdir()
    (tmp_path / "c/metrics.jsonl").write_text(
        '{"step": 0, "batch_size": 0, "skipped_errors": 1, "approx_kl": 0.0, "correct_rate": null}\n'
        '{"step": 1, "correct_rate": 0.5}\n' + '{"step": 2, "correct_rate": null}\n' * 30
    )
    made = write(tmp_path)
    twin = Path(made["markdown"]).read_text()
    assert "| a/run |" in twin
    assert "| b/run |" in twin
    assert write(tmp_path / "c")["plots"] > 0


def test_the_command_says_where_it_wrote_and_refuses_what_it_cannot_do(tmp_path, capsys):
    run = fabricate(tmp_path / "run", 2)
    assert main(["report", str(run), "--out", str(tmp_path / "deep/er/x.html")]) == 0
    assert f"Wrote {tmp_path / 'deep/er/x.html'}" in capsys.readouterr().out
    assert (tmp_path / "deep/er/x.md").exists()
    assert not (run / "report.html").exists()
    for arguments, said in (
        (["report"], "needs a run directory"),
        (["report", "a", "b"], "takes one"),
        (["report", str(run), "--wat"], "--wat is not an option"),
        (["report", str(run), "--max-mb", "2"], "at least 7"),
        (["report", str(run), "--out", "x.pdf"], "not an HTML file"),
        (["report", str(tmp_path / "none")], "holds no run"),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert said in error
        assert "Fix:" in error
    with pytest.raises(UsageError, match="cannot be written"):
        write(run, Path("/proc/nothing/x.html"))


def test_it_imports_no_heavy_package_and_is_quick(tmp_path):
    run = fabricate(tmp_path / "run", 50)
    code = (
        "import sys; from retrain.cli.main import main; "
        f"main(['report', {str(run)!r}]); "
        "print([m for m in ('torch', 'transformers', 'pydantic', 'pandas', 'tomlkit') if m in sys.modules])"
    )
    import subprocess
    import sys

    before = os.times()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    after = os.times()
    assert done.stdout.splitlines()[-1] == "[]"
    assert after.children_user - before.children_user < 10
