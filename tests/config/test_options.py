"""Flags: their names, values and mistakes."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrain.config import fields
from retrain.config.flags import flags, flags_of
from retrain.config.options import parse
from retrain.errors import UsageError

SEED_TABLE = {
    "--advantage-mode": "algorithm.advantage_mode",
    "--transform-mode": "algorithm.transform_mode",
    "--seed": "training.seed",
    "--lr": "training.lr",
    "--batch-size": "training.batch_size",
    "--group-size": "training.group_size",
    "--max-steps": "training.max_steps",
    "--lora-rank": "model.lora_rank",
    "--log-dir": "logging.log_dir",
    "--wandb-project": "logging.wandb_project",
    "--wandb-entity": "logging.wandb_entity",
    "--wandb-group": "logging.wandb_group",
    "--wandb-tags": "logging.wandb_tags",
    "--wandb-run-name": "logging.wandb_run_name",
    "--resume": "resume.from",
}


def values(*words: str) -> dict[str, Any]:
    return {".".join(o.path): o.value for o in parse(words).overrides}


def test_the_documented_flags() -> None:
    assert {flag: flags()[flag] for flag in SEED_TABLE} == SEED_TABLE


@pytest.mark.parametrize("key", fields.settings())
def test_every_setting_has_a_flat_and_a_dotted_flag(key: str) -> None:
    assert flags()[f"--{key}"] == key
    assert flags_of(key) or key.count(".") > 1


def test_values_are_texts_or_toml() -> None:
    assert values("--lr", "1e-4", "--seed=-1", "--model", "5", "--top-p=0.9") == {
        "training.lr": 1e-4,
        "training.seed": -1,
        "model.model": "5",
        "training.top_p": 0.9,
    }
    assert values("--instruction", "= # [x]", "--data.system=--a b") == {
        "data.instruction": "= # [x]",
        "data.system": "--a b",
    }
    assert values("--lr", "fast") == {"training.lr": "fast"}
    assert values("--lr", "1\nseed = 2") == {"training.lr": "1\nseed = 2"}


def test_true_or_false() -> None:
    assert values("--rslora") == {"lora.rslora": True}
    assert values("--rslora", "--shuffle", "false") == {"lora.rslora": True, "data.shuffle": False}
    assert values("--shuffle=false") == {"data.shuffle": False}
    assert values("--shuffle", "no") == {"data.shuffle": "no"}
    line = parse(["--deterministic", "my.toml"])
    assert line.config == "my.toml"


def test_arrays_and_tables() -> None:
    assert values("--data-levels", "[1, 2]", "--eval-levels", "3") == {
        "data.levels": [1, 2],
        "eval.levels": [3],
    }
    assert values("--stop", "[x", "--trackers=wandb")["logging.trackers"] == ["wandb"]
    assert values("--stop", "a, b") == {"training.stop": ["a, b"]}
    assert values("--algorithm-param", "a=1", "--algorithm-param", "b=x y") == {
        "algorithm.params.a": 1,
        "algorithm.params.b": "x y",
    }
    assert values("--backend-opt", "a=true", "--advantage-param", "k=[1]", "--transform-param=k=1.5") == {
        "backend.options.a": True,
        "algorithm.advantage_params.k": [1],
        "algorithm.transform_params.k": 1.5,
    }
    assert values("--fields", "question=1", "--data.fields.answer", "2") == {
        "data.fields.question": "1",
        "data.fields.answer": "2",
    }
    assert values("--template-args", "{ a = 1 }") == {"data.template_args": {"a": 1}}
    assert values("--environment.args.a.b", "1") == {"environment.args.a.b": 1}


def test_config_and_switches() -> None:
    line = parse(["a.toml", "--overwrite", "--fork", "--debug", "--plain"])
    assert line.config == "a.toml"
    assert line.switches == {"--overwrite", "--fork", "--debug", "--plain"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a.toml", "b"], "unexpected argument 'b'. Fix: "),
        (["--lr_rate", "1"], "--lr_rate is not a flag. Fix: did you mean --lr?"),
        (["--batch_size", "1"], "--batch_size is not a flag. Fix: did you mean --batch-size?"),
        (["--levels", "1"], "--levels is not a flag. Fix: did you mean --data-levels or --eval-levels?"),
        (["--training.lrr=1"], "--training.lrr is not a flag. Fix: did you mean --training.lr?"),
        (["--zzzzzzzz"], "--zzzzzzzz is not a flag. Fix: `retrain man --topic options` lists every flag."),
        (["--dry-run"], "--dry-run is not a flag. Fix: here it is called retrain explain CONFIG"),
        (["-x"], "-x is not a flag. Fix: "),
        (["--lr"], "--lr needs a value, a number above 0 and at most 1. Fix: --lr VALUE or --lr=VALUE."),
        (["--lr", "--seed", "1"], "--lr needs a value"),
        (
            ["--lr", "1", "--training.lr", "2"],
            "--training.lr: training.lr is given twice. Fix: give it once.",
        ),
        (["--plain=1"], "--plain takes no value. Fix: write --plain alone."),
    ],
)
def test_mistakes(words: list[str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(words)
    assert any(line.startswith(message) for line in str(caught.value).splitlines()), str(caught.value)


def test_all_mistakes_at_once_and_no_value_is_printed() -> None:
    with pytest.raises(UsageError) as caught:
        parse(["a", "--api-key", "sk-secret", "--token=secret", "--lr"])
    assert len(str(caught.value).splitlines()) == 3
    assert "secret" not in str(caught.value)


WORDS = st.sampled_from(
    [*flags(), "--plain", "--lr=", "-", "--", "a=b", "[1", "1e-4", "true", "="]
) | st.text(max_size=6)


@given(st.lists(WORDS, max_size=6))
@settings(max_examples=200, deadline=None)
def test_any_words_parse_or_are_refused_with_a_fix(words: list[str]) -> None:
    lines: list[str] = []
    try:
        parse(words)
    except UsageError as error:
        lines = str(error).split("\n")
    assert all(" Fix: " in line for line in lines)
