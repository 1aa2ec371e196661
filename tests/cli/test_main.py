"""Dispatch: help, unknown commands, errors and exit codes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from retrain import __version__
from retrain.cli.commands import COMMANDS, LATER
from retrain.cli.main import main
from retrain.errors import RunError


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["help"], ["my.toml", "--help"], ["--lr", "1", "-h"]])
def test_help(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "Usage:" in out
    assert all(name in out for name in (*COMMANDS, *LATER))


@pytest.mark.parametrize("words", [["help", "trace"], ["--help", "trace"], ["trace", "-h"], ["help", "trace", "--help"]])
def test_help_of_a_command_however_it_is_asked(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0
    assert capsys.readouterr().out.startswith("Usage: retrain trace ")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["help", "nosuch"], "there is no command 'nosuch'. Fix: `retrain --help` lists the commands.\n"),
        (["help", "statsu"], "there is no command 'statsu'. Fix: did you mean retrain help status?\n"),
        (["--help", "statsu"], "there is no command 'statsu'. Fix: did you mean retrain help status?\n"),
        (["statsu", "--help"], "there is no command 'statsu'. Fix: did you mean retrain help status?\n"),
        (["train", "-h"], "there is no command 'train': a run needs none. Fix: `retrain --help` says how to start one.\n"),
        (["help", "trace", "init"], "unexpected argument 'init'. Fix: retrain help trace.\n"),
    ],
)
def test_help_of_what_is_no_command(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert capsys.readouterr().err == said


def test_help_of_commands_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "--help"]) == 0
    assert "--template NAME" in capsys.readouterr().out
    assert main(["man", "-h"]) == 0
    assert "--topic NAME" in capsys.readouterr().out
    assert main(["demo", "--help"]) == 0
    assert capsys.readouterr().out.startswith("Usage: retrain demo [--flag value ...]")
    for command in ("eval", "sample", "export"):
        assert main([command, "--help"]) == 0
        assert capsys.readouterr().out.startswith(f"Usage: retrain {command} RUN_OR_")
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"retrain {__version__}\n"


def test_a_command_of_a_later_version(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retrain.cli.main.LATER", ("fuse",))
    assert main(["fuse", "x"]) == 2
    assert capsys.readouterr().err.startswith("retrain fuse is not in this version. Fix: ")


def test_a_word_that_is_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["statsu"]) == 2
    assert (
        capsys.readouterr().err
        == "there is no command and no file 'statsu'. Fix: did you mean retrain status?\n"
    )


def test_without_a_configuration_it_says_how_to_start(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert all(way in err for way in ("retrain demo", "retrain init", "path/to/config.toml", "retrain man"))


def test_a_user_mistake_shows_a_traceback_only_with_debug(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["no.toml"]) == 2
    assert capsys.readouterr().err.startswith("no.toml: there is no such file. Fix: ")
    assert main(["no.toml", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_exit_codes_of_errors(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(error: BaseException) -> None:
        def broken(arguments: list[str]) -> int:
            raise error

        monkeypatch.setattr("retrain.cli.manual.man", broken)

    fail(RunError("it broke.", fix="mend it."))
    assert main(["man"]) == 1
    assert capsys.readouterr().err == "it broke. Fix: mend it.\n"
    fail(KeyboardInterrupt())
    assert main(["man"]) == 130
    fail(ZeroDivisionError("a bug"))
    with pytest.raises(ZeroDivisionError):
        main(["man"])


def test_a_reader_that_goes_away_is_no_traceback() -> None:
    code = "import sys; from retrain.cli.main import main; sys.exit(main(['man']))"
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.close()
    assert child.stderr is not None
    assert child.stderr.read() == b""
    child.stderr.close()
    child.wait(30)
