"""[campaign]: labels, every rule with the file and line at fault, what is announced, and dumps that load back equal."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest

from retrain.campaign import plan
from retrain.config import campaigns
from retrain.config.json_schema import json_schema
from retrain.config.load import Override, dump_toml, load, load_config
from retrain.errors import ConfigError

BASE = """\
[backend]
devices = "cpu"
[data]
source = "arithmetic"
[eval]
source = "arithmetic"
[campaign]
seeds = [11, 12]
max_steps = 4
"""
ARM = "[[campaign.conditions]]\n"
TWO = ARM + 'transform_mode = "none"\n' + ARM


@pytest.fixture
def file(tmp_path):
    def write(text: str) -> Any:
        (tmp_path / "retrain.toml").write_text(text)
        return tmp_path / "retrain.toml"

    return write


def refused(path: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        plan.plan(load(path), name="c")
    text = str(caught.value)
    assert all(" Fix: " in line for line in text.splitlines()), text
    return text.replace(str(path), "retrain.toml")


def labels(text: str) -> list[str]:
    return [condition.label for condition in campaigns.conditions(load_config(tomllib.loads(text)))]


def test_without_conditions_there_are_the_five():
    expected = ["grpo+none", "maxrl+none", "maxrl+gtpo", "maxrl+gtpo_hicra", "maxrl+gtpo_sepa"]
    assert labels(BASE) == expected
    assert campaigns.baseline(load_config(tomllib.loads(BASE))) == "grpo+none"


def test_a_label_names_modes_and_what_else_differs():
    text = (
        BASE
        + ARM
        + 'transform_mode = "none"\n'
        + ARM
        + "lr = 1e-3\nsepa.steps = 30\n[campaign.conditions.loss]\nkind = 'cispo'\n"
    )
    assert labels(text) == ["maxrl+none", "maxrl+gtpo_sepa~lr=0.001~steps=30~kind=cispo"]
    assert labels(BASE + ARM + '"training.lr" = 1e-3\n' + ARM + "training_lr = 1e-2\n") == [
        "maxrl+gtpo_sepa~lr=0.001",
        "maxrl+gtpo_sepa~lr=0.01",
    ]
    # Folders and command lines take the label.
    assert (
        labels(BASE + ARM + 'data.instruction = "Think: a/b?"\n')[0]
        == "maxrl+gtpo_sepa~instruction=Think-a-b-6a0496"
    )


def test_values_that_read_alike_make_labels_of_their_own():
    def of(*values: str) -> list[str]:
        return labels(BASE + "".join(ARM + f"data.instruction = '{value}'\n" for value in values))

    for pair in (("Think!", "Think?"), ("think", "Think"), ("x" * 300 + "1", "x" * 300 + "2")):
        one, two = of(*pair)
        assert one.casefold() != two.casefold()
        assert max(map(len, (one, two))) <= 130
    values = ("go", "Go", "stay")
    told = [campaigns.labelled("a", "data.instruction", value, values) for value in values]
    assert (len({each.casefold() for each in told}), told[2]) == (3, "a~instruction=stay")


@pytest.mark.parametrize(
    ("shared", "condition", "expected"),
    [
        ("", "max_tokens = 9", "evaluations sample with training.max_tokens"),
        ("max_tokens = 8\n", "max_tokens = 9", ""),
        ("", "training.temperature = 0.3", "Fix: state eval.temperature: it holds for all conditions."),
        ("temperature = 0.5\n", "training.temperature = 0.3", ""),
        ("", "top_p = 0.5", "evaluations sample with training.top_p"),
        ("", "stop = ['x']", "evaluations sample with training.stop"),
        ("", "stop = []", ""),
        ("", "reward.type = 'math'", "it also decides which held-out answers are correct"),
        ("", "reward.type = 'match'", ""),
        ("", "reward.correct_at = 0.1", "it also decides which held-out answers are correct"),
        ("", "truncated = 'mask'", ""),
        ("none", "eval.max_tokens = 9", "eval.max_tokens cannot differ"),
        ("none", "data.levels = [3]", "the outcome is counted on the tasks that are trained on"),
        ("none", "max_tokens = 9", "Fix: set [eval] source and state eval.max_tokens"),
    ],
)
def test_conditions_are_measured_alike(file, shared, condition, expected):
    held_out = '[eval]\nsource = "arithmetic"\n'
    path = file(BASE.replace(held_out, held_out + shared if shared != "none" else "") + TWO + condition + "\n")
    if expected:
        assert expected in refused(path)
    else:
        assert len(plan.plan(load(path), name="c").conditions) == 2


def test_what_is_tuned_is_measured_alike(file):
    tune = "tune = { field = 'training.temperature', values = [0.5, 1.0], seeds = [1] }\n"
    assert "campaign.tune would choose training.temperature for each condition by itself" in refused(file(BASE + tune))
    fixed = BASE.replace("[campaign]", "temperature = 0.5\n[campaign]")
    assert plan.plan(load(file(fixed + tune)), name="c")


def test_looks_end_at_the_declared_seeds_when_a_campaign_goes_on(file):
    path = file(BASE.replace("[11, 12]", "[11, 12, 13]") + "looks = [2]\n")
    assert "must grow from at least 2 to the number of seeds, 3" in refused(path)
    assert load(path, [Override.of("resume.from", "there")]).config.campaign


def test_the_runs_of_a_campaign(file):
    text = BASE + "[training]\nlr = 1e-3\n" + ARM + 'transform_mode = "none"\n' + ARM + "lr = 1e-2\n"
    planned = plan.plan(load(file(text)), name="c")
    assert [run.name for run in planned.runs] == [
        "maxrl+none_s11", "maxrl+gtpo_sepa~lr=0.01_s11", "maxrl+none_s12", "maxrl+gtpo_sepa~lr=0.01_s12",
    ]  # fmt: skip
    assert [run.config.training.lr for run in planned.runs[:2]] == [1e-3, 1e-2]
    assert [run.config.training.seed for run in planned.runs] == [11, 11, 12, 12]
    assert {run.config.training.max_steps for run in planned.runs} == {4}
    assert planned.runs[0].config.campaign is None


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (TWO + "lrr = 1\n", "retrain.toml:13: condition 2: lrr is not a setting. Fix: did you mean lr?"),
        (TWO + "[campaign.conditions.sepa]\nstep = 1\n", "retrain.toml:14: condition 2: sepa.step is not a setting."),
        (TWO + "lr = 1e-3\ntraining.lr = 1e-2\n", "retrain.toml:14: condition 2 sets training.lr twice."),
        (TWO + "seed = 3\n", "retrain.toml:13: condition 2: training.seed cannot differ between conditions: campaign.seeds"),
        (TWO + "eval.examples = 3\n", "eval.examples cannot differ between conditions: every run is evaluated on the same"),
        (TWO + "log_dir = 'x'\n", "retrain.toml:13: condition 2: logging.log_dir cannot differ"),
        (TWO + "transform_mode = 'none'\n", "retrain.toml:12: condition maxrl+none stands there 2 times."),
        (TWO + "lr = 7\n", "retrain.toml:13 (condition maxrl+gtpo_sepa~lr=7): training.lr must be a number above 0"),
        (TWO + "transform_mode = 'gtpoo'\n", "retrain.toml:13 (condition maxrl+gtpoo): algorithm.transform_mode = \"gtpoo\""),
        (TWO + "transform_params = { top_share = 0.1 }\n", "retrain.toml:13 (condition "),
        ("baseline = 'grpo'\n", 'retrain.toml:10: campaign.baseline = "grpo" is none of the conditions.'),
        ("looks = [2, 3]\n", "retrain.toml:10: campaign.looks = [2, 3] must grow from at least 2 to the number of seeds, 2."),
        ("parallel = true\nlauncher = 'serial'\n", "retrain.toml:11: campaign.parallel = true and launcher"),
        ("ray_address = 'auto'\n", 'retrain.toml:10: campaign.ray_address does nothing with launcher = "serial".'),
        ("deviation = 0.02\npilot = 'x'\n", "retrain.toml:11: campaign.deviation and campaign.pilot say the same thing."),
        ("tune.lr = [1e-3, 1e-3]\n", "retrain.toml:10: campaign.tune.lr = [0.001, 0.001] holds a value twice."),
        ("tune.lr = [1e-3]\n", "campaign.tune.lr holds one value: nothing is chosen."),
        ("tune.lr = [1e-3, 7]\n", "campaign.tune.lr"),
        ("tune = { lr = [1e-3, 1e-2], seeds = [11] }\n", "retrain.toml:10: seed 11 is one of campaign.seeds"),
        ("tune = { lr = [1e-3, 1e-2], seeds = [1, 1] }\n", "campaign.tune.seeds holds 1 2 times."),
        ("tune = { lr = [1e-3, 1e-2], field = 'sepa.steps', values = [1, 2] }\n", "campaign.tune tries one setting"),
        ("tune = { field = 'sepa.steps' }\n", "campaign.tune.field and values go together."),
        ("tune = { field = 'sepa.stepz', values = [1, 2] }\n", 'campaign.tune.field = "sepa.stepz" is not a setting.'),
        ("tune = { field = 'eval.every', values = [1, 2] }\n", 'campaign.tune.field = "eval.every" cannot differ'),
        ("tune = { field = 'transform_mode', values = ['none', 'gtpo'] }\n", "is what makes a condition."),
        ("tune.split = 'validation'\n", "retrain.toml:10: campaign.tune.split does nothing: no values to try."),
        ("tune = { lr = [1e-3, 1e-2], split = 'test' }\n", "is the split that is evaluated."),
        ("tune = { lr = [1e-3, 1e-2], split = 'train' }\n", "is the split that is trained on."),
        ("tune.lr = [1e-3, 1e-2]\n" + TWO + "lr = 1e-4\n", "retrain.toml:14: condition maxrl+gtpo_sepa~lr=0.0001 sets"),
    ],
)  # fmt: skip
def test_what_is_wrong_names_its_place(file, more, expected):
    assert expected in refused(file(BASE + more))


def test_a_seed_twice_is_refused(file):
    path = file(BASE.replace("[11, 12]", "[11, 11]"))
    assert "retrain.toml:8: campaign.seeds holds 11 2 times." in refused(path)


def test_a_gpu_by_number_is_refused_where_each_run_is_given_one(file):
    text = BASE.replace('"cpu"', '"gpu:1"') + "parallel = true\n"
    assert 'retrain.toml:2: backend.devices = "gpu:1": each run sees only the GPU' in refused(file(text))
    load(file(text.replace("parallel = true\n", "")))
    arm = BASE + "parallel = true\n" + ARM + 'transform_mode = "none"\n' + ARM + 'devices = "gpu:1"\n'
    assert 'retrain.toml:14: backend.devices = "gpu:1": each run sees only the GPU' in refused(file(arm))
    load(file(arm.replace("parallel = true\n", "")))
    tuned = 'tune = { field = "backend.devices", values = ["gpu:0", "gpu:2"], seeds = [1] }\nparallel = true\n'
    assert 'retrain.toml:10: backend.devices = "gpu:2": each run sees only the GPU' in refused(file(BASE + tuned))


def test_what_is_wrong_for_all_conditions_is_said_once_with_its_line(file):
    text = refused(file(BASE + TWO + "[training]\ngroup_size = 1\n"))
    assert text.count("group_size") == text.count("\n") + 2  # the setting, and the example
    assert text.startswith("retrain.toml:14: training.group_size")


def test_what_a_shared_setting_means_to_one_condition_names_both(file):
    more = (
        TWO
        + "transform_mode = 'entropy_mask'\n[algorithm]\n"
        + "transform_params = { top_share = 0.2 }\ntransform_mode = 'entropy_mask'\n"
    )
    text = refused(file(BASE + more))
    assert (
        'retrain.toml:15: algorithm.transform_params does nothing with algorithm.transform_mode = "none"'
        in text
    )
    assert "(Of maxrl+none.)" in text


def announced(path: Any, *overrides: Override) -> list[str]:
    lines = plan.plan(plan.anchored(load(path, overrides)), name="c").announcements
    return [line.replace(str(path), "retrain.toml") for line in lines]


def test_what_a_campaign_decides_is_announced(file):
    more = '[training]\nseed = 3\nmax_steps = 9\n[logging]\nwandb_run_name = "a"\nwandb_group = "b"\nwandb_project = "p"\n'
    assert announced(file(BASE + more)) == [
        "retrain.toml:11: training.seed does nothing in a campaign: campaign.seeds lists the seeds of the runs.",
        "retrain.toml:12: training.max_steps does nothing in a campaign: every run takes campaign.max_steps.",
        "retrain.toml:14: logging.wandb_run_name does nothing in a campaign: a run is named by its condition and seed.",
        "retrain.toml:15: logging.wandb_group does nothing in a campaign: a run's group is its condition.",
    ]


def test_a_shared_setting_that_no_condition_uses_is_announced_once(file):
    sepa = "[sepa]\nsteps = 9\n"
    both = ARM + 'transform_mode = "none"\n' + ARM + 'transform_mode = "gtpo"\n'
    assert announced(file(BASE + TWO + sepa)) == []
    (line,) = announced(file(BASE + both + sepa))
    assert line == "retrain.toml:15: sepa.steps does nothing in any condition."


RATES = ARM + "lr = 1e-3\n" + ARM + "training.lr = 1e-4\n"
MODES = ARM + 'advantage_mode = "grpo"\n' + ARM + 'advantage_mode = "maxrl"\n'
TUNED = "tune = { lr = [1e-3, 1e-2], seeds = [1], max_steps = 2 }\n"


@pytest.mark.parametrize(
    ("more", "flag", "expected"),
    [
        (RATES, ("training.lr", 0.5, "--lr"), ["--lr: training.lr does nothing: every condition sets it."]),
        (RATES + "[training]\nlr = 0.5\n", (), ["retrain.toml:15: training.lr does nothing: every condition sets it."]),
        (
            TUNED + TWO, ("training.lr", 0.5, "--lr"),
            ["--lr: training.lr does nothing: campaign.tune chooses it for every condition."],
        ),
        (
            "", ("algorithm.transform_mode", "gtpo", "--transform-mode"),
            ["--transform-mode: algorithm.transform_mode does nothing: the five standard conditions set it."],
        ),
        # The transform is that of both conditions, the advantage of none.
        (
            MODES + '[algorithm]\nadvantage_mode = "grpo"\ntransform_mode = "gtpo"\n', (),
            ["retrain.toml:15: algorithm.advantage_mode does nothing: every condition sets it."],
        ),
        (RATES + ARM, ("training.lr", 0.5, "--lr"), []),
        (TWO, ("algorithm.transform_mode", "gtpo", "--transform-mode"), []),
    ],
)  # fmt: skip
def test_a_shared_setting_that_every_condition_overrides_is_announced_with_its_place(file, more, flag, expected):
    said = announced(file(BASE + more), *([Override.of(*flag)] if flag else []))
    assert [line.partition(" Fix: ")[0] for line in said] == expected


def test_conditions_that_compute_the_same_are_announced(file):
    arms = ARM + ARM + "lr = 4e-5\n" + ARM + "save_every = 3\n" + ARM + "lr = 1e-3\n"
    first, second = announced(file(BASE + arms))
    assert first.startswith(
        "retrain.toml:12: conditions maxrl+gtpo_sepa and maxrl+gtpo_sepa~lr=4e-05 compute the same"
    )
    assert second.startswith("retrain.toml:14: conditions maxrl+gtpo_sepa and maxrl+gtpo_sepa~save_every=3")


def test_conditions_with_models_of_one_name_in_two_folders_are_not_the_same(file, tmp_path):
    folders = [tmp_path / "a/final", tmp_path / "b/final"]
    for folder in folders:
        folder.mkdir(parents=True)
    assert announced(file(BASE + "".join(f'{ARM}model = "{folder}"\n' for folder in folders))) == []


def test_what_a_condition_sets_to_no_effect_is_announced_with_its_name(file):
    (line,) = announced(file(BASE + TWO + 'loss.kind = "ppo"\n'))
    assert line.startswith("retrain.toml:13 (condition maxrl+gtpo_sepa~kind=ppo): loss.kind")


def test_one_condition_one_seed_and_no_evaluation_are_announced(file):
    text = BASE.replace("[11, 12]", "[11]").replace('[eval]\nsource = "arithmetic"\n', "") + ARM
    said = " ".join(announced(file(text)))
    assert "one condition has nothing to be compared with" in said
    assert "one seed says nothing" in said
    assert "compared by the correct rate of training" in said


def test_settings_of_parallel_runs_are_announced_where_runs_follow_each_other(file):
    said = announced(file(BASE + "max_workers = 2\nstagger_seconds = 1.0\n"))
    assert [line.partition(": ")[2].split(" does")[0] for line in said] == [
        "campaign.max_workers",
        "campaign.stagger_seconds",
    ]


EVERY = """\
parallel = true
max_workers = 2
threads = 1
baseline = "maxrl+none"
alpha = 0.01
looks = [2]
threshold = 0.5
deviation = 0.02
tune = { field = "training.batch_size", values = [4, 8], seeds = [1], max_steps = 2, split = "validation" }
[[campaign.conditions]]
transform_mode = "none"
[[campaign.conditions]]
lr = 1e-3
sepa = { steps = 30, schedule = "auto" }
"loss.kind" = "cispo"
"""


def test_a_campaign_dumps_and_loads_back_equal(file, tmp_path):
    config = load(file(BASE + EVERY)).config
    copy = tmp_path / "copy.toml"
    copy.write_text(dump_toml(config))
    again = load(copy).config
    assert again == config
    assert campaigns.conditions(again) == campaigns.conditions(config)
    assert dump_toml(again) == dump_toml(config)


def test_flags_reach_the_campaign(file):
    from retrain.config.options import parse

    line = parse(
        [
            str(file(BASE)),
            "--max-steps",
            "9",
            "--seeds",
            "[4, 5, 6]",
            "--campaign.tune.lr",
            "[1e-3, 1e-2]",
            "--lr",
            "1e-3",
        ]
    )
    config = load(line.config, line.overrides).config
    assert (config.campaign.max_steps, config.campaign.seeds, config.campaign.tune.lr) == (
        9,
        (4, 5, 6),
        (1e-3, 1e-2),
    )  # type: ignore[union-attr]
    assert config.training.lr == 1e-3


def test_the_json_schema_knows_conditions():
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft7Validator(json_schema())

    def wrong(text: str) -> list[str]:
        return [error.message for error in validator.iter_errors(tomllib.loads(BASE + text))]

    assert wrong(EVERY) == []
    assert (
        wrong(
            ARM
            + 'training.lr = 1e-3\ntraining_lr = 1e-3\n"sepa.steps" = 3\n[campaign.conditions.model]\nlora_rank = 4\n'
        )
        == []
    )
    for bad in (
        "lrr = 1\n",
        "lr = 7\n",
        "seed = 3\n",
        'transform_mode = "gtpoo"\n',
        "sepa.step = 3\n",
        "log_dir = 'x'\n",
    ):
        assert wrong(ARM + bad), bad


def test_tasks_can_be_passed_over(tmp_path):
    from retrain.errors import DataError
    from retrain.training import dry

    base = {"model": {"model": "retrain/tiny"}, "data": {"source": "arithmetic", "levels": [1]}}

    def held_out(**keys: Any) -> list[str]:
        config = load_config({**base, "eval": {"source": "arithmetic", **keys}})
        with dry.parts(config) as parts:
            return [task.id for task in parts.held_out]

    every = held_out(examples=11)
    assert len(set(every)) == 11
    assert held_out(examples=4) == every[:4]
    assert held_out(examples=4, skip=4) == every[4:8]
    assert held_out(examples=4, skip=9) == every[9:]
    with pytest.raises(DataError, match=r"eval\.skip = 11 passes over all 11 held-out tasks"):
        held_out(skip=11)
