"""Shell completion, asked of the shells themselves."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from retrain.cli import completion, manual, scaffold
from retrain.cli.commands import COMMANDS
from retrain.cli.main import main
from retrain.config.fields import settings
from retrain.config.flags import flags
from retrain.config.load import Override, load
from retrain.config.options import value_of
from retrain.errors import ConfigError

TEXTS = completion.Texts(manual.usage_of, manual.topics(), manual.FORMATS)
LINES: list[tuple[str, set[str]]] = [
    ("retrain in", {"init", "init-plugin"}),
    ("retrain my.toml --advantage-m", {"--advantage-mode"}),
    ("retrain my.toml --training.warm", {"--training.warmup_steps"}),
    ("retrain my.toml --transform-mode gtpo_h", {"gtpo_hicra"}),
    ("retrain my.toml --algorithm.transform_mode ent", {"entropy_mask"}),
    ("retrain my.toml --shuffle f", {"false"}),
    ("retrain explain --gp", {"--gpu"}),
    ("retrain explain --loss.kl_k", {"--loss.kl_kind"}),
    ("retrain init --template ti", {"tiny"}),
    ("retrain init-plugin --kind ", set(scaffold.KINDS)),
    ("retrain completion ", {"bash", "zsh", "fish"}),
    ("retrain man --format ", {"text", "json", "html"}),
    ("retrain sample logs --checkpoint b", {"best"}),
    ("retrain init --advantage-m", set()),
    ("retrain my.toml --lr ", set()),
    ("retrain my.toml --attention-kernel ", {"default", "flash"}),
    ("retrain my.toml --inference.dtype ", {"auto", "bf16", "fp32"}),
    ("retrain my.toml --kv-cache-dtype ", {"auto", "bf16", "fp8"}),
    ("retrain my.toml --eval-source mix", set()),
    ("retrain my.toml --data-source mix", {"mixture"}),
    ("retrain my.toml --trust-remote-code ", {"false"}),
    ("retrain eval logs --source mix", set()),
    ("retrain eval logs --source gsm", {"gsm8k"}),
    ("retrain eval logs --path my.to", {"my.toml"}),
    ("retrain my.to", {"my.toml"}),
    ("retrain status lo", {"logs"}),
]
"""A line up to the cursor, and everything that may be offered there (for paths: everything that begins like it)."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "logs").mkdir()
    (tmp_path / "my.toml").touch()
    (tmp_path / "my.txt").touch()
    for shell in completion.SHELLS:
        (tmp_path / f"c.{shell}").write_text(completion.script(shell, TEXTS))
    return tmp_path


def shell(name: str, folder: Path, code: str, *arguments: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed")
    env = {**os.environ, "HOME": str(folder), "LC_ALL": "C.UTF-8"}
    options = {"bash": ["--norc", "--noprofile"], "zsh": ["-f"], "fish": ["--no-config"]}[name]
    done = subprocess.run(
        [path, *options, "-c", code, *arguments], cwd=folder, env=env, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


BASH = """
source c.bash
complete -p retrain > /dev/null || exit 3
ask() { COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)); _retrain; printf '%s\\n' "${COMPREPLY[@]}"; }
"""

ZSH = """
compdef() { :; }
compadd() { shift; print -l -- $@; }
_describe() { print -l -- ${${(P)@[-1]}%%:*}; }
_files() { [[ $1 == -/ ]] && print -l -- *(/) || print -l -- ${~2:-*} *(/); }
source c.zsh
ask() { words=("$@") CURRENT=$#; _retrain; }
"""

FISH = """
source c.fish
function ask; complete -C "$argv"; end
"""


def asked(name: str, folder: Path, lines: list[list[str]]) -> list[set[str]]:
    """What a shell offers for the last word of each line: one process for all of them."""
    start = {"bash": BASH, "zsh": ZSH, "fish": FISH}[name]
    calls = [f"echo @@; ask {' '.join(shlex.quote(word) for word in words)}" for words in lines]
    parts = shell(name, folder, "\n".join([start, *calls])).split("@@\n")[1:]
    assert len(parts) == len(lines)
    return [{word.partition("\t")[0].rstrip("/") for word in part.splitlines() if word} for part in parts]


@pytest.mark.parametrize("name", completion.SHELLS)
def test_every_shell_offers_what_fits(name: str, folder: Path) -> None:
    found = asked(name, folder, [line.split(" ") for line, _ in LINES])
    for (line, wanted), offered in zip(LINES, found, strict=True):
        last = line.rpartition(" ")[2]
        assert {word for word in offered if word.startswith(last)} == wanted, line


def test_bash_splits_at_an_equals_sign(folder: Path) -> None:
    one, two, three = asked(
        "bash", folder, [["retrain", "--loss-kind", "=", "gs"], ["retrain", "--kl-kind", "="], ["retrain", ""]]
    )
    assert one == {"gspo"}
    assert two == {"k1", "k2", "k3"}
    assert three >= {*COMMANDS, "my.toml", "logs"}
    assert "my.txt" not in three


def test_what_is_offered_is_what_the_commands_take() -> None:
    every = {command.name: command for command in completion.commands(TEXTS)}
    assert set(every) == {*COMMANDS, "run"}
    assert {flag.dotted for flag in completion.setting_flags()} <= set(flags())
    assert {"--json", "--checkpoint", "--merged"} <= {flag.name for flag in every["export"].flags}
    assert not every["export"].takes_settings
    assert every["eval"].takes_settings
    for command in every.values():
        assert len({flag.name for flag in command.flags}) == len(command.flags)
        assert not {"--flag"} & {flag.name for flag in command.flags}


def test_every_value_that_is_offered_is_accepted_alone() -> None:
    needs_more = {
        "data.source": ("jsonl", "hf", "mixture", "reasoning_gym"),
        "eval.source": ("jsonl", "hf", "reasoning_gym"),
        "reward.type": ("custom", "composite", "reasoning_gym"),
        "model.quantization": ("nf4", "fp4"),
    }
    usual = {
        "model": {"model": "retrain/tiny"}, "data": {"source": "arithmetic"}, "algorithm": {"advantage_mode": "grpo"},
    }  # fmt: skip
    for flag in completion.setting_flags():
        setting = settings()[flag.dotted.removeprefix("--")]
        for value in (flag.values or "").split():
            if value.startswith("<") or value in needs_more.get(setting.key, ()):
                continue
            said = ""
            try:
                load(usual, [Override.of(setting.key, value_of(setting, value), "it")])
            except ConfigError as error:
                said = str(error)
            # Idle beside other settings, which is for those to change.
            assert not said or "does nothing" in said, (setting.key, value, said)


def test_a_script_is_plain_text_without_expansions(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "bash"]) == 0
    assert capsys.readouterr().out == completion.script("bash", TEXTS)
    for values in {flag.values for c in completion.commands(TEXTS) for flag in (*c.flags, *completion.setting_flags())}:
        assert values is None or all(ch.isalnum() or ch in " _-.:<>|@" for ch in values), values


@pytest.mark.parametrize("words", [[], ["powershell"], ["bash", "zsh"], ["--json"]])
def test_mistakes(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", *words]) == 2
    assert "Fix: retrain completion bash or zsh or fish." in capsys.readouterr().err
