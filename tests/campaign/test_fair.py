"""What a campaign refuses so that its conditions can be compared, and what it declares so that nobody changes it later."""

from __future__ import annotations

import datetime
import errno
import json
import os
import runpy
import shutil
import threading
import tomllib
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from retrain import cards
from retrain.campaign import forecast, manifest, plan, tune
from retrain.campaign.manifest import Manifest, settings_digest
from retrain.campaign.run import execute, stored
from retrain.cli import run as cli
from retrain.config.load import Override, dump_toml, load
from retrain.errors import ConfigError, ResumeError

_made = runpy.run_path(str(Path(__file__).with_name("made_campaigns.py")))
declared = _made["declared"]

TINY = """\
[model]
model = "retrain/tiny"
[backend]
devices = "cpu"
[data]
source = "arithmetic"
levels = [1]
[training]
max_tokens = 16
[eval]
source = "arithmetic"
examples = 8
[campaign]
seeds = [11, 12]
max_steps = 2
threads = 1
{more}
[[campaign.conditions]]
transform_mode = "none"
[[campaign.conditions]]
transform_mode = "none"
"""


def planned(text):
    return plan.plan(plan.anchored(load(tomllib.loads(text))), name="c")


def test_a_condition_that_trains_on_held_out_tasks_is_refused():
    design = planned(TINY.format(more="") + 'data.split = "test"\n')
    with pytest.raises(ConfigError, match=r"trains on 8 of the 8 held-out tasks, maxrl\+none on 0"):
        plan.declare(design, "c", threads=1)
    both = TINY.format(more="").replace("levels = [1]", 'levels = [1]\nsplit = "test"') + "lr = 1e-3\n"
    plan.declare(planned(both), "c", threads=1)


def test_trials_do_not_choose_on_what_any_condition_trains_on():
    tuned = 'tune = { lr = [1e-3, 1e-4], seeds = [1], split = "validation" }'
    with pytest.raises(ConfigError, match=r"tasks for trials to choose on are trained on as well \(by maxrl"):
        tune.declared(planned(TINY.format(more=tuned) + 'data.split = "validation"\n'))


def test_what_evaluations_sample_and_score_with_is_declared():
    text = TINY.format(more="").replace("examples = 8", "examples = 8\nmax_tokens = 5") + "max_tokens = 9\n"
    told = plan.declare(planned(text), "c", threads=1).declared.evaluation
    assert (told["max_tokens"], told["temperature"], told["top_p"], told["reward"]) == (5, 0.7, 1.0, "match")


def test_the_digest_of_settings_is_of_what_a_step_computes(tmp_path):
    config = load({"data": {"source": "jsonl", "path": "/a/tasks.jsonl"}, "training": {"lr": 1e-3, "seed": 1}}).config
    first = settings_digest(config)

    def changed(section, **values):
        return settings_digest(config.model_copy(update={section: getattr(config, section).model_copy(update=values)}))

    (tmp_path / "c.toml").write_text(dump_toml(config))
    assert settings_digest(load(tmp_path / "c.toml").config) == first
    assert changed("training", seed=2, save_every=1) == first
    assert changed("logging", log_dir="elsewhere", wandb_group="g") == first
    assert changed("data", path="/b/tasks.jsonl") == first
    others = [
        changed("data", path="/a/others.jsonl"), changed("training", lr=1e-4), changed("training", max_steps=3),
        changed("logging", strategic_grams="so"), changed("loss", kind="cispo"),
    ]  # fmt: skip
    assert len({first, *others}) == 6
    assert settings_digest(config, "training.lr") == changed("training", lr=4e-5)


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    """A folder with a configuration, and the campaign of it that was stopped before its first run."""
    root = tmp_path_factory.mktemp("once")
    (root / "c.toml").write_text(TINY.format(more="looks = [2]") + "lr = 1e-3\n")
    stop = threading.Event()
    stop.set()
    execute(load(root / "c.toml", [Override.of("logging.log_dir", str(root / "logs"))]), plain=True, stop=stop)
    return root


@pytest.fixture
def stopped(once, tmp_path):
    """The directory of that campaign, in a copy of the folder."""
    shutil.copytree(once, tmp_path, dirs_exist_ok=True)
    (directory,) = (tmp_path / "logs").glob("campaign_*")
    return directory


def go_on(directory, *overrides):
    stop = threading.Event()
    stop.set()
    return execute(stored(directory, [Override.of("resume.from", str(directory)), *overrides]), plain=True, stop=stop)


def test_a_configuration_that_was_edited_is_not_gone_on_with(stopped):
    assert go_on(stopped).status == "interrupted"
    config = stopped / "config.toml"
    text = config.read_text()
    config.write_text(text.replace("group_size = 16", "group_size = 8"))
    with pytest.raises(ResumeError, match=r"config.toml: condition maxrl\+none is not what it was"):
        go_on(stopped)
    config.write_text(text.replace('"lr" = 0.001', '"lr" = 0.01').replace("lr = 0.001", "lr = 0.01"))
    with pytest.raises(ResumeError, match="condition maxrl"):
        go_on(stopped)
    config.write_text(text)
    # Declared looks do not stand in the way of more seeds.
    assert go_on(stopped, Override.of("campaign.seeds", (11, 12, 13))).counts == {"waiting": 6}
    assert manifest.read(stopped).added == (13,)
    assert go_on(stopped).counts == {"waiting": 6}


def test_a_manifest_without_settings_reads_and_is_not_checked(stopped):
    path = stopped / "manifest.json"
    record = json.loads(path.read_text())
    assert set(record["declared"]["settings"]) == {"maxrl+none", "maxrl+none~lr=0.001"}
    known = manifest.read(stopped).declared
    del record["declared"]["settings"]
    record["digest"] = manifest.digest(replace(known, settings={}))
    path.write_text(json.dumps(record))
    config = stopped / "config.toml"
    config.write_text(config.read_text().replace("group_size = 16", "group_size = 8"))
    assert go_on(stopped).counts == {"waiting": 4}


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({"added": [1]}, "the added seed 1 stands there already"),
        ({"added": [9, 9]}, "the added seed 9 stands there already"),
        ({"chosen": {"grpo+none": 0.5}}, "what grpo.none chose is none of the values"),
    ],
)
def test_what_was_found_must_fit_what_was_declared(tmp_path, found, said):
    design = declared(conditions=("grpo+none", "maxrl+none"), seeds=(1, 2))
    manifest.write(tmp_path, Manifest(design))
    path = tmp_path / "manifest.json"
    record = json.loads(path.read_text())
    assert record["declared"] == json.loads(json.dumps(asdict(design)))
    record["found"].update(found)
    path.write_text(json.dumps(record))
    with pytest.raises(ResumeError, match=said):
        manifest.read(tmp_path)


def test_no_more_runs_go_at_once_than_there_are():
    text = TINY.format(more='launcher = "processes"\nmax_workers = 64') + "lr = 1e-3\n"
    assert forecast.workers(planned(text)) == 4


def test_an_evaluation_may_have_a_length_of_its_own():
    from retrain.fakes import FakeRenderer
    from retrain.training.build import evaluator

    def length(**keys):
        base = {"data": {"source": "arithmetic"}, "training": {"max_tokens": 9}, "model": {"model": "retrain/tiny"}}
        return evaluator(load({**base, "eval": {"source": "arithmetic", **keys}}).config, FakeRenderer()).sampling.max_tokens

    assert (length(), length(max_tokens=5), length(max_tokens=20)) == (9, 5, 20)


EDITS = (
    ("alpha", "0.2", "campaign.alpha was 0.05 and is 0.2"),
    ("smallest_effect", "0.3", "campaign.smallest_effect was 0.02 and is 0.3"),
    ("test", '"paired"', "campaign.test was 'welch' and is 'paired'"),
    ("threads", "2", "campaign.threads was 1 and is 2"),
    ("max_steps", "3", "campaign.max_steps was 2 and is 3"),
    ("baseline", '"maxrl+none~lr=0.001"', "campaign.baseline was 'maxrl+none' and is 'maxrl+none~lr=0.001'"),
    ("threshold", "0.5", "campaign.threshold was None and is 0.5"),
)


def test_an_edited_design_is_not_gone_on_with(stopped):
    config = stopped / "config.toml"
    text = config.read_text()
    head, _, tail = text.partition("[campaign]\n")

    def edited(**values):
        kept = [line for line in tail.splitlines() if not line.startswith(tuple(f"{key} = " for key in values))]
        config.write_text("\n".join([f"{head}[campaign]", *(f"{key} = {value}" for key, value in values.items()), *kept]))

    for key, value, said in EDITS:
        edited(**{key: value})
        with pytest.raises(ResumeError) as caught:
            go_on(stopped)
        assert f"config.toml: {said};" in str(caught.value)
    # What was declared in other words.
    edited(looks="[]", threads="0")
    assert go_on(stopped).counts == {"waiting": 4}


def resumed_with(path, directory, *overrides):
    stop = threading.Event()
    stop.set()
    loaded = load(path, [Override.of("resume.from", str(directory), "--resume"), *overrides])
    return execute(loaded, plain=True, stop=stop)


def test_a_file_beside_resume_must_be_of_the_same_design(stopped, tmp_path):
    path = tmp_path / "c.toml"
    text = path.read_text()
    # What any resume may change may differ, and acts.
    path.write_text(text.replace("[training]", "[training]\nsave_every = 1"))
    assert resumed_with(path, stopped).counts == {"waiting": 4}
    for old, new, said in (
        ("[training]", "[training]\nlr = 0.5", "training.lr was 4e-05 and is 0.5;"),
        ("lr = 1e-3", "lr = 1e-2", "condition maxrl.none~lr=0.001 is not what it was"),
        ("max_steps = 2", "max_steps = 3", "campaign.max_steps was 2 and is 3;"),
        ("threads = 1", "threads = 1\nalpha = 0.1", "campaign.alpha was 0.05 and is 0.1;"),
        ("threads = 1", 'threads = 1\ntune = { lr = [1e-3, 1e-2], seeds = [1] }', "campaign.tune"),
    ):
        arm = 'advantage_mode = "grpo"\n' if "tune" in new else "lr = 1e-3\n"
        path.write_text(text.replace("lr = 1e-3\n", arm).replace(old, new))
        with pytest.raises(ResumeError, match=said) as caught:
            resumed_with(path, stopped)
        assert str(caught.value).startswith(str(path))
        assert "--resume DIR alone" in str(caught.value)
    path.write_text(text)
    with pytest.raises(ResumeError, match=r"training.lr was 4e-05 and is 0.5"):
        resumed_with(path, stopped, Override.of("training.lr", 0.5, "--lr"))


def test_added_seeds_stay_unless_the_command_line_names_others(stopped, tmp_path):
    assert go_on(stopped, Override.of("campaign.seeds", (11, 12, 13), "--seeds")).counts == {"waiting": 6}
    with pytest.raises(ResumeError, match="has the seeds 11, 12, 13: they stay"):
        go_on(stopped, Override.of("campaign.seeds", (11, 12), "--seeds"))
    assert resumed_with(tmp_path / "c.toml", stopped).counts == {"waiting": 6}
    assert "The added seeds 13 stay." in (stopped / "events.log").read_text()


def test_other_held_out_tasks_are_noticed_before_any_run(tmp_path):
    tasks = tmp_path / "tasks.jsonl"

    def write(first):
        rows = [{"question": f"{first + i} + 1 ?", "answer": str(first + i + 1)} for i in range(24)]
        tasks.write_text("".join(json.dumps(row) + "\n" for row in rows))

    tuned = "tune = { lr = [1e-3, 1e-2], seeds = [1], max_steps = 1 }"
    source = f'[eval]\nsource = "jsonl"\npath = "{tasks}"\n'
    text = TINY.format(more=tuned).replace('[eval]\nsource = "arithmetic"\n', source)
    (tmp_path / "c.toml").write_text(text.removesuffix('[[campaign.conditions]]\ntransform_mode = "none"\n'))
    stop = threading.Event()
    stop.set()
    write(0)
    loaded = load(tmp_path / "c.toml", [Override.of("logging.log_dir", str(tmp_path / "logs"))])
    directory = execute(loaded, plain=True, stop=stop).directory
    write(50)
    with pytest.raises(ResumeError, match=r"the 8 held-out tasks \(source 'jsonl'\) are not those"):
        go_on(directory)
    # The first eight are what is evaluated on, the next what trials choose on; one edit of those reaches the trials alone.
    write(0)
    assert go_on(directory).counts == {"waiting": 2}
    known = manifest.read(directory)
    told = known.declared.tune["evaluation"]
    with pytest.raises(ResumeError, match="the 8 tasks that trials choose on"):
        plan.check_tasks(told, {**told, "digest": "another"}, "tasks that trials choose on")


def test_more_runs_at_once_than_fit_are_refused_when_a_campaign_goes_on(stopped, monkeypatch):
    monkeypatch.setattr(cards, "_host_bytes", lambda: 2**30)
    monkeypatch.setattr(cards, "_swap_bytes", lambda: 0)
    many = [Override.of("campaign.launcher", "processes", "--launcher"), Override.of("campaign.max_workers", 4, "--max-workers")]
    seeds = Override.of("campaign.seeds", (11, 12, *range(20, 40)), "--seeds")
    with pytest.raises(ConfigError, match=r"--max-workers: \d+ runs at once do not fit"):
        go_on(stopped, many[0], replace(many[1], value=40), seeds)
    assert go_on(stopped, *many[:1], replace(many[1], value=1)).counts == {"waiting": 4}


def test_campaigns_that_begin_in_the_same_second_have_folders_of_their_own(tmp_path, monkeypatch):
    path = tmp_path / "c.toml"
    path.write_text(TINY.format(more="") + "lr = 1e-3\n")

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2026, 1, 2, 3, 4, 5, tzinfo=tz)

    monkeypatch.setattr("retrain.campaign.run.datetime.datetime", Clock)
    begun = []
    check = forecast.refuse_unfit

    def another_begins_meanwhile(design, told):
        check(design, told)
        if not begun:
            begun.append(None)
            begun[0] = begin()

    def begin():
        stop = threading.Event()
        stop.set()
        return execute(
            load(path, [Override.of("logging.log_dir", str(tmp_path / "logs"))]), plain=True, stop=stop
        ).directory

    monkeypatch.setattr(forecast, "refuse_unfit", another_begins_meanwhile)
    second = begin()
    assert [begun[0].name, second.name] == ["campaign_20260102T030405Z", "campaign_20260102T030405Z-2"]
    assert [manifest.read(each).declared.name for each in (begun[0], second)] == [begun[0].name, second.name]


def test_a_folder_that_cannot_be_locked_says_why(stopped, monkeypatch):
    lock = stopped / ".lock"

    def held(number):
        def flock(*_):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr("retrain.campaign.run.fcntl.flock", flock)

    held(errno.ENOLCK)
    with pytest.raises(ConfigError, match=r"its file system gives no file locks: No locks available"):
        go_on(stopped)
    held(errno.EWOULDBLOCK)
    with pytest.raises(ConfigError, match="another process is running the campaign"):
        go_on(stopped)
    lock.unlink()
    lock.mkdir()  # as little to be opened for writing as in a folder that may only be read
    with pytest.raises(ConfigError, match=r"cannot be written: Is a directory"):
        go_on(stopped)


def test_the_command_line_takes_the_file_beside_resume(stopped, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "c.toml"
    path.write_text(path.read_text().replace("[training]", "[training]\nlr = 0.5"))
    with pytest.raises(ResumeError, match=r"training.lr was 4e-05 and is 0.5;"):
        cli.run(["c.toml", "--resume", str(stopped), "--plain"])
    # The campaign's own file, by whatever path: then flags may not change the design.
    with pytest.raises(ResumeError, match="--lr: a campaign that goes on keeps its design"):
        cli.run(["--resume", str(stopped.relative_to(tmp_path)), "--lr", "0.5"])
