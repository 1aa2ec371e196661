"""``.env``: fills what is unset, overrides nothing, prints no value."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from retrain.cli import dotenv

TEXT = """\
# a comment
PLAIN=one
export EXPORTED = two  # a comment
QUOTED="three \\"x\\" # no comment\\n"  # a comment
SINGLE='four \\n'
EMPTY=
KEPT=other
URL=http://host/#anchor
"""


@pytest.fixture(autouse=True)
def _clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "environ", {"KEPT": "mine"})


def test_fills_only_what_is_unset(capsys: pytest.CaptureFixture[str]) -> None:
    Path(".env").write_text(TEXT, encoding="utf-8")
    names = dotenv.load()
    assert names == ["PLAIN", "EXPORTED", "QUOTED", "SINGLE", "EMPTY", "URL"]
    assert os.environ["PLAIN"] == "one"
    assert os.environ["EXPORTED"] == "two"
    assert os.environ["QUOTED"] == 'three "x" # no comment\n'
    assert os.environ["SINGLE"] == "four \\n"
    assert os.environ["EMPTY"] == ""
    assert os.environ["KEPT"] == "mine"
    assert os.environ["URL"] == "http://host/#anchor"
    assert capsys.readouterr().out == "Loaded .env\n"


def test_can_be_turned_off(capsys: pytest.CaptureFixture[str]) -> None:
    Path(".env").write_text(TEXT, encoding="utf-8")
    os.environ["RETRAIN_NO_DOTENV"] = "1"
    assert dotenv.load() == []
    assert "PLAIN" not in os.environ
    assert capsys.readouterr().out == ""


def test_bad_lines_are_said_by_number_only(capsys: pytest.CaptureFixture[str]) -> None:
    Path(".env").write_text('GOOD=1\nsecret value\nOPEN="secret\n2X=secret\nNUL=secret\0\n', encoding="utf-8")
    assert dotenv.load() == ["GOOD"]
    captured = capsys.readouterr()
    assert [line.split(" ")[0] for line in captured.err.splitlines()] == [
        ".env:2:",
        ".env:3:",
        ".env:4:",
        ".env:5:",
    ]
    assert "secret" not in captured.err + captured.out


def test_no_file_a_folder_and_other_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    assert dotenv.load() == []
    Path("folder").mkdir()
    assert dotenv.load(Path("folder")) == []
    Path("bytes").write_bytes(b"A=\xff")
    assert dotenv.load(Path("bytes")) == []
    assert "cannot be read as UTF-8" in capsys.readouterr().err
