"""Rules across settings: what is refused, what is announced, and what this version does not build."""

from __future__ import annotations

from typing import Any

import pytest

from retrain import plugins
from retrain.config import names
from retrain.config.load import load
from retrain.config.rules import NAMED
from retrain.errors import ConfigError, NotInThisVersion

BASE: dict[str, Any] = {"data": {"source": "arithmetic"}}


def source_with(key: str, value: Any) -> dict[str, Any]:
    section, _, name = key.partition(".")
    source = {k: dict(v) for k, v in BASE.items()}
    source.setdefault(section, {})[name] = value
    return source


def test_names_equal_the_plug_in_table() -> None:
    for kind in sorted(set(names.BUILT) & set(plugins.TABLE)):
        assert set(names.BUILT[kind]) == set(plugins.TABLE[kind]), kind
    for kind, later in names.LATER.items():
        assert set(later).isdisjoint(names.BUILT[kind])


@pytest.mark.parametrize(("key", "kind"), list(NAMED.items()))
def test_names_that_a_later_version_builds(key: str, kind: str) -> None:
    for name in names.LATER[kind]:
        with pytest.raises(NotInThisVersion) as caught:
            load(source_with(key, name))
        assert f'{key} = "{name}" is not in this version. Fix: ' in str(caught.value)


@pytest.mark.parametrize(("key", "kind"), list(NAMED.items()))
def test_unknown_and_dotted_names(key: str, kind: str) -> None:
    if kind in names.OPEN:
        load(source_with(key, "my_module.thing"))
    else:
        with pytest.raises(ConfigError) as caught:
            load(source_with(key, "my_module.thing"))
        assert "of your own is not in this version" in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        load(source_with(key, "zzzz"))
    assert f'{key} = "zzzz" is unknown. Fix: ' in str(caught.value)


def test_a_near_name_is_suggested() -> None:
    with pytest.raises(
        ConfigError, match=r'advantage_mode = "gropo" is unknown\. Fix: did you mean "grpo"\?'
    ):
        load(source_with("algorithm.advantage_mode", "gropo"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("backend.devices", "gpu:0,gpu:1"),
        ("environment.provider", "verifiers"),
    ],
)
def test_settings_that_a_later_version_builds(key: str, value: Any) -> None:
    with pytest.raises(NotInThisVersion, match=r"not in this version\. Fix: "):
        load(source_with(key, value))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("backend.devices", "cuda:1", r'"cuda:1" is not gpu:N or cpu\. Fix: for example "gpu:1"\.'),
        ("backend.devices", "tpu", r'"tpu" is not gpu:N or cpu\. Fix: for example "cpu"\.'),
        ("backend.devices", "gpu:0,", r'"gpu:0," is not gpu:N or cpu'),
        ("model.trust_remote_code", True, "would run code that ships with the model"),
        (
            "inference.dtype",
            "fp8",
            r'inference.dtype = "fp8" does not work with inference.engine = "pytorch"',
        ),
        ("inference.dtype", "fp4", "does not work with"),
        ("inference.kv_cache_dtype", "int8", "does not work with"),
        ("inference.attention_kernel", "triton", "does not work with"),
        ("inference.url", "http://x", r'inference.url does nothing with inference.engine = "pytorch"'),
        ("model.base_url", "http://x", r'does nothing with backend.backend = "local"'),
        ("backend.options", {"a": 1}, r'does nothing with backend.backend = "local"'),
        ("data.path", "x", r'data.path does nothing with data.source = "arithmetic"'),
        ("data.fields", {"id": "x"}, "data.fields does nothing"),
        ("data.subjects", "all", "data.subjects does nothing"),
        ("data.source", "jsonl", r'data.source = "jsonl" needs data.path'),
        ("eval.source", "jsonl", r'eval.source = "jsonl" needs eval.path'),
        ("eval.every", 5, r'eval.every does nothing with eval.source = ""'),
        ("reward.type", "custom", r'reward.type = "custom" needs reward.custom_module'),
        ("reward.custom_module", "m", r'reward.custom_module does nothing with reward.type = "match"'),
        ("reward.judge_model", "m", "reward.judge_model does nothing"),
        ("environment.id", "m", "environment.id does nothing"),
        ("algorithm.advantage_params", {"a": 1}, r'does nothing with algorithm.advantage_mode = "maxrl"'),
        ("algorithm.transform_params", {"a": 1}, "does nothing with algorithm.transform_mode"),
        ("algorithm.params", {"a": 1}, "does nothing with algorithm.algorithm_mode"),
        ("loss.clip_low", 0.1, r'does nothing with loss.kind = "importance_sampling"'),
        ("loss.dual_clip", 3.0, r'loss.dual_clip does nothing with loss.kind = "importance_sampling"'),
        ("data.subset", "x", r'data.subset does nothing with data.source = "arithmetic"'),
        ("data.generators", {"gcd": {}}, r'data.generators does nothing with data.source = "arithmetic"'),
        ("data.mixture", [{"source": "gsm8k"}], r'data.mixture does nothing with data.source = "arithmetic"'),
        ("data.source", "mixture", r'data.source = "mixture" needs data.mixture'),
        ("data.source", "hf", r'data.source = "hf" needs data.path'),
        ("eval.source", "mixture", r"eval.source cannot be a mixture itself"),
        ("reward.type", "composite", r'reward.type = "composite" needs reward.parts'),
        ("reward.type", "reasoning_gym", r"scores tasks of the source reasoning_gym only"),
        ("reward.parts", [{"type": "match"}], r'reward.parts does nothing with reward.type = "match"'),
        ("training.truncated", "soft", r'advantage_mode = "maxrl" needs them in \[0, 1\]'),
        ("training.soft_tokens", 5, r'training.soft_tokens does nothing with training.truncated = "score"'),
        ("training.lr_final_share", 0.5, r'lr_final_share does nothing with training.lr_schedule = "constant"'),
        ("logging.trackers", ["console"], r'logging.trackers: "console" is unknown'),
        ("logging.trackers", ["wandbb"], r'did you mean "wandb"'),
        ("backpressure.min_batch_size", 65, "is above max_batch_size = 64"),
    ],
)
def test_settings_that_cannot_act_are_refused(key: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load(source_with(key, value))
    assert all(" Fix: " in line for line in str(caught.value).splitlines())


def test_levels_without_arithmetic_are_refused() -> None:
    with pytest.raises(ConfigError, match=r'data.levels does nothing with data.source = "gsm8k"'):
        load({"data": {"source": "gsm8k", "levels": [1]}})
    load({"data": {"source": "gsm8k", "levels": [1]}, "eval": {"source": "arithmetic"}})


def test_flash_attention_on_the_cpu_is_refused() -> None:
    source = {**BASE, "inference": {"attention_kernel": "flash"}}
    load(source)
    with pytest.raises(ConfigError, match=r'needs CUDA, and backend.devices = "cpu"'):
        load({**source, "backend": {"devices": "cpu"}})


@pytest.mark.parametrize(
    ("source", "announcement"),
    [
        (
            {"algorithm": {"transform_mode": "none"}, "sepa": {"steps": 5, "delay_steps": 1}},
            'sepa.steps, sepa.delay_steps do nothing with algorithm.transform_mode = "none".',
        ),
        ({"sepa": {"threshold": 0.5}}, 'sepa.threshold does nothing with sepa.schedule = "linear".'),
        ({"hicra": {"alpha": 0.5}}, 'hicra.alpha does nothing with algorithm.transform_mode = "gtpo_sepa".'),
        (
            {"planning": {"threshold": 0.5}},
            'planning.threshold does nothing with planning.detector = "regex".',
        ),
        ({"backpressure": {"max_batch_size": 9}}, "does nothing with backpressure.enabled = false."),
        (
            {"logging": {"wandb_tags": "a"}},
            'logging.wandb_tags does nothing with logging.wandb_project = "".',
        ),
        (
            {"reward": {"custom_function": "score"}},
            'custom_function does nothing with reward.type = "match".',
        ),
        (
            {"backend": {"devices": "cpu"}, "training": {"deterministic": True}},
            'training.deterministic does nothing with backend.devices = "cpu".',
        ),
        (
            {"eval": {"source": "", "every": 5}},
            'eval.every does nothing with eval.source = "".',
        ),
        (
            {"loss": {"kind": "ppo"}},
            'loss.kind = "ppo" clips nothing with training.updates_per_batch = 1',
        ),
        ({"training": {"updates_per_batch": 2}}, "nothing bounds the ratio of the later updates"),
        (
            {"loss": {"tis_cap": 2.0}},
            "loss.tis_cap caps nothing with the in-process engine: it compares the learner before the update",
        ),
        (
            {"loss": {"kind": "ppo", "tis_cap": 2.0}, "training": {"updates_per_batch": 4}},
            "loss.tis_cap caps nothing with the in-process engine",
        ),
        (
            {"algorithm": {"transform_mode": "none", "uncertainty_kind": "entropy"}, "logging": {"generations": 0}},
            'algorithm.uncertainty_kind does nothing with algorithm.transform_mode = "none".',
        ),
        (
            {"reward": {"correct_at": 0.3}, "eval": {"suites": [{"source": "gsm8k", "reward": "math"}]}},
            "reward.correct_at does nothing with the rewards in use: match, math.",
        ),
        (
            {"reward": {"type": "math"}, "data": {"source": "mixture", "mixture": [{"source": "gsm8k", "reward": "match"}]}},
            "reward.type does nothing with tables that all name a reward of their own.",
        ),
        ({"loss": {"kl": 0.1, "kl_kind": "k1"}}, "its gradient is zero on average"),
        ({"lora": {"dropout": 0.1}}, "measured with dropout off"),
        ({"training": {"max_oversample": 2.0}}, "max_oversample does nothing with training.min_signal = 0.0"),
        (
            {"algorithm": {"algorithm_mode": "mine.x", "advantage_mode": "grpo"}},
            'algorithm.advantage_mode does nothing with algorithm.algorithm_mode = "mine.x"',
        ),
        ({"training": {"warmup_steps": 500}}, "the learning rate reaches lr in the last step or never."),
        (
            {"backpressure": {"enabled": True, "min_batch_size": 5, "max_batch_size": 6}},
            "leave fewer than the three sizes that a fit takes: the batch size follows no measurement.",
        ),
        (
            {"backpressure": {"enabled": True, "min_batch_size": 2, "max_batch_size": 2}},
            "the batch size is always 2.",
        ),
        ({"eval": {"source": "arithmetic", "split": "train"}}, "the evaluation uses the training tasks"),
    ],
)
def test_settings_that_do_nothing_are_announced(source: dict[str, Any], announcement: str) -> None:
    announced = load({**BASE, **source}).announcements
    assert len(announced) == 1
    assert announcement in announced[0]


@pytest.mark.parametrize(
    "source",
    [
        BASE,
        {**BASE, "loss": {"tis_cap": 2.0}, "training": {"updates_per_batch": 2}},
        {**BASE, "algorithm": {"transform_mode": "none", "uncertainty_kind": "entropy"}},
        {**BASE, "reward": {"timeout_s": 5.0}, "eval": {"suites": [{"source": "gsm8k", "reward": "math"}]}},
        {
            "data": {"source": "mixture", "mixture": [{"source": "arithmetic", "reward": "mine.reward"}]},
            "reward": {"timeout_s": 5.0, "correct_at": 1.5},
        },
        {
            "data": {"source": "mixture", "mixture": [{"source": "arithmetic", "reward": "math"}, {"source": "gsm8k"}]},
            "reward": {"type": "match", "timeout_s": 5.0},
        },
        {
            "data": {"source": "mixture", "mixture": [{"source": "arithmetic", "reward": "math"}]},
            "reward": {"type": "match"},
            "eval": {"source": "arithmetic"},
        },
        {**BASE, "reward": {"type": "composite", "penalty": -1.0, "parts": [{"type": "match", "gate": True}]}},
        {**BASE, "algorithm": {"algorithm_mode": "mine.x", "params": {"a": 1}}},
    ],
)
def test_nothing_is_announced_without_a_reason(source: dict[str, Any]) -> None:
    assert load(source).announcements == ()


def test_rewards_of_unused_names_do_not_count() -> None:
    """reward.type is no reward in use where every table names its own and nothing else is evaluated."""
    source = {
        "data": {"source": "mixture", "mixture": [{"source": "gsm8k", "reward": "match"}]},
        "reward": {"type": "math", "timeout_s": 5.0},
    }
    assert any("reward.timeout_s does nothing with the rewards in use: match." in a for a in load(source).announcements)
    evaluated = load({**source, "eval": {"source": "arithmetic"}}).announcements
    assert evaluated == ()


@pytest.mark.parametrize(
    "source",
    [
        {"data": {"source": "mine.tasks", "levels": [3], "fields": {"prompt": "p"}, "subset": "x", "size": 5, "path": "p"}},
        {"data": {"source": "gsm8k", "levels": [3], "fields": {"prompt": "p"}}, "eval": {"source": "mine.tasks"}},
        {"data": {"source": "gsm8k"}, "eval": {"source": "mine.tasks", "levels": [3], "path": "p"}},
        {"data": {"source": "mixture", "mixture": [{"source": "mine.tasks", "levels": [3], "fields": {"prompt": "p"}}]}},
    ],
)
def test_a_source_of_ones_own_reads_any_key_of_its_section(source: dict[str, Any]) -> None:
    assert load(source).announcements == ()


def test_fields_of_ones_own_stay_wrong_where_a_built_in_source_reads_them() -> None:
    data = {"source": "jsonl", "path": "x.jsonl", "fields": {"prompt": "p"}}
    for held_out in ({}, {"source": "mine.tasks"}):
        with pytest.raises(ConfigError, match=r"data\.fields\.prompt is not one of our fields"):
            load({"data": data, "eval": held_out})


@pytest.mark.parametrize("key", ["advantage_params", "transform_params"])
def test_parameters_of_modes_that_an_algorithm_replaces_are_refused(key: str) -> None:
    modes = {"algorithm_mode": "mine.x", "advantage_mode": "mine.a", "transform_mode": "mine.t"}
    with pytest.raises(ConfigError) as caught:
        load({**BASE, "algorithm": {**modes, key: {"a": 1}}})
    assert str(caught.value).count(f"algorithm.{key} does nothing with algorithm.algorithm_mode") == 1


def test_a_penalty_without_a_gate_is_refused() -> None:
    reward = {"type": "composite", "penalty": -1.0, "parts": [{"type": "match"}]}
    with pytest.raises(ConfigError, match=r"reward\.penalty does nothing with parts of which none is a gate"):
        load({**BASE, "reward": reward})


def test_quantization_in_fp32_is_refused() -> None:
    source = {**BASE, "model": {"quantization": "nf4"}, "inference": {"dtype": "bf16"}}
    load(source)
    with pytest.raises(ConfigError, match=r'inference\.dtype = "fp32"'):
        load({**source, "inference": {"dtype": "fp32"}})


READS = {
    "arithmetic": {"levels"},
    "gsm8k": {"path"},
    "math": {"path", "subjects"},
    "jsonl": {"path", "fields"},
    "hf": {"path", "subset", "fields"},
    "reasoning_gym": {"generators", "size", "seed"},
}
VALUES: dict[str, Any] = {
    "path": "x", "subset": "x", "levels": [3], "subjects": ["algebra"], "fields": {"question": "q"},
    "generators": {"gcd": {}}, "size": 4, "seed": 4,
}  # fmt: skip


@pytest.mark.parametrize(("source", "reads"), READS.items())
@pytest.mark.parametrize(("key", "value"), VALUES.items())
def test_a_table_refuses_what_its_source_does_not_read_as_data_does(
    source: str, reads: set[str], key: str, value: Any
) -> None:
    needed = {"path": "x"} if "path" in reads else {}
    table = {**needed, "source": source, key: value}
    for place, sections in (
        ("data.mixture[0]", {"data": {"source": "mixture", "mixture": [table]}}),
        ("eval.suites[0]", {**BASE, "eval": {"suites": [table]}}),
        ("data", {"data": table}),
    ):
        if key in reads:
            assert not [a for a in load(sections).announcements if "does nothing" in a]
            continue
        with pytest.raises(ConfigError) as caught:
            load(sections)
        (line,) = str(caught.value).splitlines()
        name = "source" if "[" in place else "data.source"
        assert f'{place}.{key} does nothing with {name} = "{source}". Fix: remove it, or change {name}.' in line


def test_a_default_that_a_table_states_in_vain_is_announced() -> None:
    table = {"source": "gsm8k", "size": 1000}
    (said,) = load({"data": {"source": "mixture", "mixture": [table]}}).announcements
    assert said == 'data.mixture[0].size does nothing with source = "gsm8k".'


def test_a_single_file_has_no_splits() -> None:
    table = {"source": "jsonl", "path": "x.jsonl", "split": "dev"}
    with pytest.raises(ConfigError, match=r'eval\.suites\[0\]\.split does nothing with path = "x\.jsonl"'):
        load({**BASE, "eval": {"suites": [table]}})
    load({**BASE, "eval": {"suites": [{**table, "path": "folder"}]}})


def test_shannon_entropy_needs_the_in_process_engine() -> None:
    source = {**BASE, "algorithm": {"uncertainty_kind": "entropy"}}
    load(source)
    with pytest.raises(ConfigError, match="which only the in-process engine has"):
        load({**source, "inference": {"engine": "vllm", "url": "http://x"}})


def test_soft_punishment_must_leave_something_of_max_tokens() -> None:
    with pytest.raises(ConfigError, match="leaves nothing of max_tokens = 80"):
        load(
            {
                **BASE,
                "algorithm": {"advantage_mode": "grpo"},
                "training": {"truncated": "soft", "soft_tokens": 80, "max_tokens": 80},
            }
        )


def test_dual_clip_bounds_from_above_one() -> None:
    load({**BASE, "loss": {"kind": "ppo", "dual_clip": 3.0}})
    with pytest.raises(ConfigError, match=r"loss\.dual_clip = 0\.5 must be above 1"):
        load({**BASE, "loss": {"kind": "ppo", "dual_clip": 0.5}})


def test_quantization_on_the_cpu_is_refused_with_the_reason() -> None:
    source = {**BASE, "model": {"quantization": "nf4"}}
    load(source)
    with pytest.raises(ConfigError, match="needs CUDA: on the CPU its 4-bit kernels"):
        load({**source, "backend": {"devices": "cpu"}})


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            {"data": {"source": "mixture", "mixture": [{"source": "gsm8k", "wieght": 2}]}},
            "data.mixture[0] has no key 'wieght'. Fix: did you mean weight?",
        ),
        (
            {"data": {"source": "mixture", "mixture": [{"weight": 2.0}]}},
            "data.mixture[0] lacks source. Fix: add source = ...",
        ),
        (
            {"data": {"source": "mixture", "mixture": [{"source": "gsm8k"}, {"source": "gsm8k"}]}},
            "data.mixture: two tables are called 'gsm8k'. Fix: give each a name of its own.",
        ),
        (
            {"reward": {"type": "composite", "parts": [{"type": "regex", "weight": "much"}]}, **BASE},
            "reward.parts[0].weight:",
        ),
        (
            {"eval": {"suites": [{"source": "gsm8k", "name": "a/b"}]}, **BASE},
            "'a/b' cannot name a curve.",
        ),
    ],
)
def test_mistakes_inside_a_table_of_an_array_name_their_place(source: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(source)
    assert message in str(caught.value)


def test_the_checks_are_those_of_the_composite_reward() -> None:
    from retrain.rewards.checks import CHECKS

    assert set(names.CHECKS) == set(CHECKS)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            {**BASE, "reward": {"type": "composite", "parts": [{"type": "formt"}]}},
            'reward.parts[0].type = "formt" is unknown. Fix: did you mean \'format\'?',
        ),
        (
            {"data": {"source": "mixture", "mixture": [{"source": "gsmk8"}]}},
            'data.mixture[0].source = "gsmk8" is unknown. Fix: did you mean \'gsm8k\'?',
        ),
        (
            {**BASE, "eval": {"suites": [{"source": "gsm8k", "reward": "maths"}]}},
            'eval.suites[0].reward = "maths" is unknown. Fix: did you mean \'math\'?',
        ),
        (
            {**BASE, "reward": {"type": "composite", "parts": [{"type": "format", "tags": "think"}]}},
            "reward.parts[0].tags: must be an array, such as [...].",
        ),
        (
            {**BASE, "reward": {"type": "composite", "parts": [{"type": "format", "gate": 1}]}},
            "reward.parts[0].gate: must be true or false.",
        ),
    ],
)
def test_names_and_types_inside_a_table_are_checked_before_anything_loads(source: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(source)
    assert message in str(caught.value)
