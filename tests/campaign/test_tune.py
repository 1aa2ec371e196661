"""[campaign.tune]: what it chooses from made-up trials, what it refuses, and one real campaign that is stopped while tuning."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
import threading
import time
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from retrain.campaign import account, findings, manifest, plan, progress, tune
from retrain.campaign.manifest import Manifest
from retrain.campaign.run import execute, stored
from retrain.campaign.tune import Tried
from retrain.config.load import Override, load
from retrain.errors import ConfigError, RunError
from retrain.training import dry

sys.path.insert(0, str(Path(__file__).with_name("light")))

import campaigns

_made = runpy.run_path(str(Path(__file__).with_name("made_campaigns.py")))
declared, write_run = _made["declared"], _made["write_run"]

TINY = """\
[model]
model = "retrain/tiny"
lora_rank = 4
[backend]
devices = "cpu"
[data]
source = "arithmetic"
levels = [2]
[training]
batch_size = 2
group_size = 4
max_tokens = 16
[eval]
source = "arithmetic"
examples = 8
[logging]
rollouts = false
[campaign]
seeds = [11]
max_steps = 2
threads = 1
tune = { lr = [1e-3, 1e-4], seeds = [1], max_steps = 1 }
[[campaign.conditions]]
advantage_mode = "grpo"
transform_mode = "none"
[[campaign.conditions]]
advantage_mode = "maxrl"
transform_mode = "none"
"""
TWO = ("grpo+none", "maxrl+none")
TUNE = {
    "field": "training.lr",
    "values": [1e-4, 1e-3, 1e-2],
    "seeds": [1, 2],
    "max_steps": 20,
    "evaluation": {},
}


def planned(text=TINY, changes=()):
    source = tomllib.loads(text)
    for section, values in changes:
        source[section].update(values)
    return plan.plan(plan.anchored(load(source)), name="c")


def made(folder, values, states=None):
    """The trials of two conditions, three values and two seeds, each with a held-out accuracy."""
    for (condition, value, seed), accuracy in values.items():
        label = tune.trial_label(condition, "training.lr", value)
        state, done = (states or {}).get((condition, value, seed), ("done", 20))
        write_run(
            folder / f"trials/{label}_s{seed}",
            label,
            seed,
            20,
            done,
            state,
            0.5,
            0,
            5,
            {},
            accuracy,
            "eval/accuracy",
        )
    return Manifest(declared(conditions=TWO, steps=40, tune=TUNE))


def grid(grpo, maxrl):
    """Accuracies (seed 1, seed 2) by value, for both conditions."""
    return {
        (condition, value, seed): pair[seed - 1]
        for condition, pairs in zip(TWO, (grpo, maxrl), strict=True)
        for value, pair in zip(TUNE["values"], pairs, strict=True)
        for seed in TUNE["seeds"]
    }


def test_each_condition_takes_the_value_with_the_best_mean(tmp_path):
    found = made(tmp_path, grid([(0.1, 0.3), (0.5, 0.1), (0.2, 0.2)], [(0.4, 0.4), (0.3, 0.45), (0.9, 0.1)]))
    tried = tune.trials(tmp_path, found)
    assert [round(each.mean, 6) for each in tried] == [0.2, 0.3, 0.2, 0.4, 0.375, 0.5]
    assert tune.choose(tried) == {"grpo+none": 1e-3, "maxrl+none": 1e-2}
    chosen = tune.trials(tmp_path, replace(found, chosen=tune.choose(tried)))
    assert [(each.condition, each.value) for each in chosen if each.chosen] == [
        ("grpo+none", 1e-3),
        ("maxrl+none", 1e-2),
    ]
    assert chosen[0].outcomes == (0.1, 0.3)


def test_of_equal_values_the_smaller_is_taken(tmp_path):
    # 0.1 + 0.2 and 0.15 + 0.15 differ in floating point.
    found = made(tmp_path, grid([(0.0, 0.0), (0.15, 0.15), (0.1, 0.2)], [(0.3, 0.3)] * 3))
    assert tune.choose(tune.trials(tmp_path, found)) == {"grpo+none": 1e-3, "maxrl+none": 1e-4}


def test_of_equal_values_that_are_no_numbers_the_first_is_taken():
    def arm(value, mean):
        return Tried("a", value, (1,), ("done",), (mean,), mean, False)

    assert tune.choose([arm("ppo", 0.1), arm("gspo", 0.3), arm("cispo", 0.3)]) == {"a": "gspo"}
    assert tune.choose([arm(True, 0.3), arm(False, 0.3)]) == {"a": True}
    # A value that no trial survived is not as good as one that was evaluated at 0.
    assert tune.choose([Tried("a", 1, (1,), ("failed",), (None,), 0.0, False), arm(2, 0.0)]) == {"a": 2}


def test_a_trial_that_failed_counts_at_its_last_evaluation_or_as_nothing(tmp_path):
    values = grid([(0.3, 0.3), (0.9, 0.4), (0.2, 0.2)], [(0.3, 0.3)] * 3)
    states = {("grpo+none", 1e-3, 1): ("failed", 10), ("grpo+none", 1e-2, 1): ("dead", 10)}
    found = made(tmp_path, values, states)
    tried = tune.trials(tmp_path, found)
    assert (tried[1].outcomes, tried[1].states) == ((0.9, 0.4), ("failed", "done"))
    assert tried[2].outcomes == (0.2, 0.2)
    # Failed before its first evaluation: nothing was reached.
    metrics = tmp_path / "trials/grpo+none~lr=0.001_s1/metrics.jsonl"
    metrics.write_text("")
    tried = tune.trials(tmp_path, found)
    assert (tried[1].outcomes, tried[1].mean) == ((None, 0.4), 0.2)
    assert tune.choose(tried)["grpo+none"] == 1e-4


def test_nothing_is_chosen_while_trials_are_missing_or_say_nothing(tmp_path):
    values = grid([(0.3, 0.3)] * 3, [(0.3, 0.3)] * 3)
    found = made(tmp_path, values, {("maxrl+none", 1e-2, 2): ("interrupted", 10)})
    with pytest.raises(RunError, match=r"the trials of maxrl\+none are not done"):
        tune.choose(tune.trials(tmp_path, found))
    assert tune.trials(tmp_path, found)[-1].states == ("done", "interrupted")
    silent = [
        Tried("a", 1, (1,), ("failed",), (None,), 0.0, False),
        Tried("a", 2, (1,), ("failed",), (None,), 0.0, False),
    ]
    with pytest.raises(RunError, match="no trial of a came to an evaluation"):
        tune.choose(silent)


def gone(folder, name, *codes):
    """A trial of which nothing but the ends of its processes is left."""
    shutil.rmtree(folder / "trials" / name)
    rows = [
        {"name": name, "code": code, "seconds": 2.0, "step": 0, "why": "refused: no such value" if code == 2 else "killed"}
        for code in codes
    ]
    with (folder / "processes.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def test_a_trial_that_never_lived_to_its_first_record_counts_0_and_blocks_nothing(tmp_path):
    found = made(tmp_path, grid([(0.3, 0.3)] * 3, [(0.3, 0.3), (0.2, 0.2), (0.9, 0.9)]))
    killed, refused = "maxrl+none~lr=0.01_s2", "grpo+none~lr=0.0001_s1"
    gone(tmp_path, killed, -9)
    gone(tmp_path, refused, 2)
    manifest.write(tmp_path, found)
    assert tune.unfinished(tmp_path, found) == {killed, refused}
    with pytest.raises(RunError, match=r"of grpo\+none are not done: seed 1 of 0.0001 is waiting \(refused: no such value\)"):
        tune.choose(tune.trials(tmp_path, found))
    looked = progress.look(tmp_path)
    assert looked.trials == {"done": 10, "waiting": 2}
    assert progress.stopped(looked)[:2] == [
        f"trial {killed}: not begun, killed", f"trial {refused}: not begun, refused: no such value",
    ]  # fmt: skip
    (tmp_path / "trials" / killed).mkdir()
    (tmp_path / "trials" / refused).mkdir()
    gone(tmp_path, killed, -9)
    gone(tmp_path, refused, 2)
    tried = tune.trials(tmp_path, found)
    assert (tried[5].states, tried[5].outcomes, tried[5].mean) == (("done", "failed"), (0.9, None), 0.45)
    assert (tried[0].states, tried[0].outcomes, tried[0].mean) == (("failed", "done"), (None, 0.3), 0.15)
    assert tune.choose(tried) == {"grpo+none": 1e-3, "maxrl+none": 1e-2}
    assert tune.unfinished(tmp_path, found) == set()
    assert tune.told(tmp_path, found) == [
        f"Trial {refused}: failed (refused: no such value); it counts 0.", f"Trial {killed}: failed (killed); it counts 0.",
    ]  # fmt: skip


def test_where_no_trial_of_a_condition_says_anything_all_of_them_are_tried_again(tmp_path):
    found = made(tmp_path, grid([(0.3, 0.3)] * 3, [(0.3, 0.3)] * 3))
    names = {f"maxrl+none~lr={value}_s{seed}" for value in (0.0001, 0.001, 0.01) for seed in (1, 2)}
    for name in names:
        gone(tmp_path, name, -9, -9)
    with pytest.raises(RunError, match=r"no trial of maxrl\+none came to an evaluation.*\(seed 1 of 0.0001: killed\)"):
        tune.choose(tune.trials(tmp_path, found))
    assert tune.unfinished(tmp_path, found) == names


@pytest.mark.parametrize("word", ["NaN", "null"])
def test_an_evaluation_that_is_no_number_is_told_and_counts_0(tmp_path, word):
    found = made(tmp_path, grid([(0.3, 0.3)] * 3, [(0.3, 0.3), (0.2, 0.2), (0.9, 0.9)]))
    metrics = tmp_path / "trials/maxrl+none~lr=0.01_s2/metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"eval/accuracy": 0.9,', f'"eval/accuracy": {word},'))
    tried = tune.trials(tmp_path, found)
    assert (tried[5].states, tried[5].outcomes, tried[5].mean) == (("done", "done"), (0.9, None), 0.45)
    assert tune.choose(tried)["maxrl+none"] == 1e-2
    assert tune.told(tmp_path, found) == [
        "Trial maxrl+none~lr=0.01_s2: done, but none of its last evaluations is a number; it counts 0."
    ]


@pytest.mark.slow
def test_a_value_that_no_trial_survives_or_that_is_refused_blocks_no_campaign(tmp_path):
    """A tuned campaign with looks, of light runs: one value is killed while it loads, another refused."""
    (tmp_path / "held.jsonl").write_text("".join(f'{{"question": "held {i} ?", "answer": "7"}}\n' for i in range(8)))
    more = f"""tune = {{ lr = [1e-4, 1e-3], seeds = [77], max_steps = 1 }}
looks = [2, 3]
[eval]
source = "jsonl"
path = "{tmp_path}/held.jsonl"
examples = 4
"""
    campaigns.write(tmp_path, seeds=(1, 2, 3), steps=1, more=more)
    (tmp_path / "signs/maxrl+none_s77~0.0001").write_text("die 0")
    (tmp_path / "signs/grpo+none_s77~0.001").write_text("refuse 0")
    code, said = campaigns.run(tmp_path, "campaign.toml", "--plain")
    directory = campaigns.campaign(tmp_path)
    assert code == 1
    assert "grpo+none are not done: seed 77 of 0.001 is waiting (retrain: light: this run is refused." in said
    assert "one that is refused again counts 0" in said
    told = progress.stopped(progress.look(directory))
    assert told[0].startswith("trial grpo+none~lr=0.001_s77: not begun, retrain: light: this run is refused.")
    assert told[1].startswith("trial maxrl+none~lr=0.0001_s77: failed at step 0/1, killed by SIGKILL")
    ends = [(row["name"], row["code"]) for row in campaigns.rows(directory / "processes.jsonl")]
    assert ends.count(("maxrl+none~lr=0.0001_s77", -9)) == 2
    assert ends.count(("grpo+none~lr=0.001_s77", 2)) == 1

    code, said = campaigns.run(tmp_path, "--resume", str(directory), "--plain")
    assert code == 0, said
    found = manifest.read(directory)
    assert found.chosen == {"grpo+none": 1e-4, "maxrl+none": 1e-3}
    assert "grpo+none chose training.lr = 0.0001, the smallest of the values that were tried" in said
    assert "Trial grpo+none~lr=0.001_s77: failed (retrain: light: this run is refused." in said
    assert "Trial maxrl+none~lr=0.0001_s77: failed (killed by SIGKILL" in said
    assert set(campaigns.states(directory).values()) == {"done"}
    # Tuned or not, the first look comes where it was declared.
    assert progress.look(directory).awaited() == (3, 6, 6)
    assert findings.gather(directory).manifest.declared.looks == (2, 3)


def test_every_arm_has_the_same_budget_and_tasks_of_its_own():
    design = planned()
    trials = tune.planned_trials(design)
    assert [run.name for run in trials] == [
        "grpo+none~lr=0.001_s1", "grpo+none~lr=0.0001_s1", "maxrl+none~lr=0.001_s1", "maxrl+none~lr=0.0001_s1",
    ]  # fmt: skip
    assert {(r.config.training.max_steps, r.config.eval.skip, r.config.eval.examples) for r in trials} == {
        (1, 8, 8)
    }
    assert [r.config.training.lr for r in trials] == [1e-3, 1e-4, 1e-3, 1e-4]
    fixed = tune.declared(design)
    assert (fixed["field"], fixed["values"], fixed["seeds"], fixed["max_steps"]) == (
        "training.lr",
        [1e-3, 1e-4],
        [1],
        1,
    )
    assert fixed["evaluation"]["digest"] != plan.evaluation(design.runs[0].config)["digest"]
    with dry.parts(trials[0].config) as ours, dry.parts(design.runs[0].config) as theirs:
        assert not {t.id for t in ours.held_out} & {t.id for t in theirs.held_out}
        assert len(ours.held_out) == 8


def test_another_split_may_be_named():
    design = planned(changes=[("campaign", {"tune": {"lr": [1e-3, 1e-4], "split": "validation"}})])
    fixed = tune.declared(design)
    assert (fixed["evaluation"]["split"], fixed["evaluation"]["skip"], fixed["max_steps"]) == (
        "validation",
        0,
        2,
    )
    assert tune.declared(planned(changes=[("campaign", {"tune": {}})])) is None


@pytest.mark.parametrize("examples", [8, 11, 256])
def test_too_few_tasks_are_refused_with_a_number_that_is_enough(examples):
    # Level 1 has 11 held-out problems.
    changes = [("data", {"levels": [1]}), ("eval", {"examples": examples})]
    with pytest.raises(ConfigError) as caught:
        tune.declared(planned(changes=changes))
    assert "are left for trials to choose on" in str(caught.value)
    enough = int(str(caught.value).split("eval.examples to at most ")[1].split(",")[0])
    assert (
        tune.declared(planned(changes=[changes[0], ("eval", {"examples": enough})]))["evaluation"]["tasks"]
        == enough
    )


def test_tasks_that_are_evaluated_on_as_well_are_refused(tmp_path):
    rows = [{"question": f"What is {i % 12}+1?", "answer": str(i % 12 + 1)} for i in range(24)]
    (tmp_path / "held.jsonl").write_text("\n".join(map(json.dumps, rows)))
    changes = [("eval", {"source": "jsonl", "path": str(tmp_path / "held.jsonl"), "examples": 12})]
    with pytest.raises(
        ConfigError, match=r"of the 12 tasks for trials to choose on are evaluated on as well\. Fix: "
    ):
        tune.declared(planned(changes=changes))


def test_a_value_that_no_run_can_have_names_its_line(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text(
        TINY.replace("tune = { lr = [1e-3, 1e-4]", 'tune = { field = "group_size", values = [1, 4]')
    )
    design = plan.plan(load(path), name="c")
    with pytest.raises(ConfigError) as caught:
        tune.planned_trials(design)
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"{path}:22: training.group_size must be an integer from 2")
    assert line.endswith("(Of grpo+none~group_size=1, maxrl+none~group_size=1.)")


@pytest.fixture(scope="module")
def campaign(tmp_path_factory):
    """A campaign that was stopped after its first trial, and gone on with: its directory, and how both starts ended."""
    root = tmp_path_factory.mktemp("tuned")
    (root / "c.toml").write_text(TINY)
    loaded = load(root / "c.toml", [Override.of("logging.log_dir", str(root / "logs"))])
    stop = threading.Event()

    def stop_after_one():
        while not list(root.glob("logs/*/processes.jsonl")):
            time.sleep(0.05)
        stop.set()

    watcher = threading.Thread(target=stop_after_one, daemon=True)
    watcher.start()
    first = execute(loaded, plain=True, stop=stop)
    watcher.join(timeout=60)
    before = manifest.read(first.directory)
    again = stored(first.directory, [Override.of("resume.from", str(first.directory))])
    second = execute(again, plain=True)
    return first, before, second


def test_a_campaign_that_is_stopped_while_tuning_goes_on(campaign):
    first, before, second = campaign
    assert (first.status, first.counts, before.chosen) == ("interrupted", {"waiting": 2}, {})
    assert (second.status, second.counts) == ("done", {"done": 2})
    directory = first.directory
    found = manifest.read(directory)
    assert found.declared == before.declared
    tried = tune.trials(directory, found)
    assert [each.states for each in tried] == [("done",)] * 4
    assert found.chosen == tune.choose(tried)
    assert sum(each.chosen for each in tried) == 2
    # Nothing that was done ran twice.
    rows = [json.loads(line) for line in (directory / "processes.jsonl").read_text().splitlines()]
    done = [row["name"] for row in rows if row["code"] == 0]
    assert len(done) == len(set(done)) == 6
    assert all("~lr=" in name for name in done[:4])


def test_the_runs_have_what_their_condition_chose(campaign):
    directory = campaign[0].directory
    found = manifest.read(directory)
    for label in TWO:
        config = tomllib.loads((directory / f"runs/{label}_s11/config.toml").read_text())
        assert config["training"]["lr"] == found.chosen[label]
        assert (config["training"]["max_steps"], config["eval"]["skip"]) == (2, 0)
        facts = json.loads((directory / f"runs/{label}_s11/run.json").read_text())["facts"]
        assert facts["eval_tasks"] == found.declared.evaluation["digest"]
    trial = json.loads((directory / "trials/grpo+none~lr=0.001_s1/run.json").read_text())
    assert trial["facts"]["eval_tasks"] == found.declared.tune["evaluation"]["digest"]


def test_the_report_shows_every_arm(tmp_path):
    values = grid([(0.1, 0.3), (0.5, 0.1), (0.2, 0.2)], [(0.4, 0.4), (0.3, 0.45), (0.9, 0.1)])
    found = made(tmp_path, values, {("grpo+none", 1e-3, 1): ("failed", 10)})
    manifest.write(tmp_path, replace(found, chosen=tune.choose(tune.trials(tmp_path, found))))
    told = findings.gather(tmp_path)
    _, _, table = account.tuning(told)
    assert table.columns == ("Condition", "training.lr", "Seed 1", "Seed 2", "Mean", "95 % interval", "")
    # Of two seeds: t is 12.7.
    assert table.rows[1] == ("grpo+none", "0.001", "50.0%*", "10.0%", "30.0%", "0.0% to 100.0%", "chosen")
    assert table.rows[2] == ("grpo+none", "0.01", "20.0%", "20.0%", "20.0%", "20.0% to 20.0%", "")
    assert table.rows[4] == ("maxrl+none", "0.001", "30.0%", "45.0%", "37.5%", "0.0% to 100.0%", "")
    arms = findings.record(told)["tuning"]
    assert [arm["value"] for arm in arms if arm["chosen"]] == [1e-3, 1e-2]


def test_a_condition_that_changes_the_held_out_tasks_is_refused(tmp_path):
    levels = TINY + "data.levels = [3]\n"
    (tmp_path / "c.toml").write_text(levels)
    design = plan.plan(load(tmp_path / "c.toml"), name="c")
    with pytest.raises(ConfigError) as caught:
        plan.declare(design, "c", threads=1)
    assert str(caught.value).startswith(
        f"{tmp_path}/c.toml:29: condition maxrl+none~data.levels=3 sets data.levels, which also"
    )
    assert "state eval.levels for all of them" in str(caught.value)
    (tmp_path / "c.toml").write_text(levels.replace("examples = 8", "examples = 8\nlevels = [2]"))
    plan.declare(plan.plan(load(tmp_path / "c.toml"), name="c"), "c", threads=1)
