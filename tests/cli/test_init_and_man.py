"""``retrain init`` and ``retrain man``, and the freshness of everything generated."""

from __future__ import annotations

from pathlib import Path

import pytest

from retrain.cli import manual
from retrain.cli.main import main
from retrain.config import templates
from retrain.config.load import load_config


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", templates.TEMPLATES)
def test_init_writes_a_configuration_that_loads(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "--template", name]) == 0
    assert "Wrote retrain.toml" in capsys.readouterr().out
    load_config("retrain.toml")
    assert Path("retrain.toml").read_text(encoding="utf-8") == templates.read(name)


def test_init_never_overwrites(capsys: pytest.CaptureFixture[str]) -> None:
    Path("retrain.toml").write_text("mine", encoding="utf-8")
    assert main(["init"]) == 2
    assert "never overwrites. Fix: " in capsys.readouterr().err
    assert Path("retrain.toml").read_text(encoding="utf-8") == "mine"
    assert main(["init", "other.toml", "--template=tiny"]) == 0
    assert "retrain other.toml" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--template", "campaign"], "template 'campaign' is not in this version. Fix: "),
        (["--template", "tinny"], "there is no template 'tinny'. Fix: did you mean tiny?"),
        (["--template"], "--template needs a name. Fix: "),
        (["--interactive"], "retrain init --interactive is not in this version. Fix: "),
        (["--bad"], "--bad is not an option of init. Fix: "),
        (["a", "b"], "unexpected argument 'b'. Fix: "),
        (["no/such/folder.toml"], "no/such/folder.toml: cannot be written: No such file or directory. Fix: "),
    ],
)
def test_mistakes_of_init(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", *words]) == 2
    assert capsys.readouterr().err.startswith(message)


def test_init_lists_the_templates(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "--list"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in (*templates.TEMPLATES, *templates.LATER))


def test_man_shows_topics_and_hides_its_markers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["man"]) == 0
    whole = capsys.readouterr().out
    assert "<!--" not in whole
    assert main(["man", "--list-topics"]) == 0
    topics = capsys.readouterr().out.split()
    assert topics == ["overview", "quickstart", "commands", "options", "environment", "exit-codes"]
    parts: list[str] = []
    for topic in topics:
        assert main(["man", f"--topic={topic}"]) == 0
        parts.append(capsys.readouterr().out)
    assert "".join(parts) == whole
    assert "max_tokens = 2048    --max-tokens" in whole
    assert main(["man", "--path"]) == 0
    assert Path(capsys.readouterr().out.strip()).is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--topic", "optoins"], "the manual has no topic 'optoins'. Fix: did you mean options?"),
        (["--topic"], "--topic needs a name. Fix: "),
        (["--json"], "retrain man --json is not in this version. Fix: "),
        (["quickstart"], "unexpected argument 'quickstart'. Fix: "),
    ],
)
def test_mistakes_of_man(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["man", *words]) == 2
    assert capsys.readouterr().err.startswith(message)


def test_help_manual_and_reference_page_are_fresh() -> None:
    for path, text in manual.generated().items():
        assert Path(path).read_text(encoding="utf-8") == text, f"{path} is stale: run `retrain man --sync`"


def test_check_and_sync(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "help.txt"
    monkeypatch.setattr(manual, "generated", lambda: {str(file): "fresh\n"})
    assert main(["man", "--check"]) == 1
    assert "stale: " in capsys.readouterr().out
    assert main(["man", "--sync"]) == 0
    assert file.read_text(encoding="utf-8") == "fresh\n"
    assert main(["man", "--check"]) == 0
