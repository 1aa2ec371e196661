"""``retrain init`` and ``retrain man``, and the freshness of everything generated."""

from __future__ import annotations

import json
import os
from html.parser import HTMLParser
from pathlib import Path

import pytest

from retrain.cli import manual
from retrain.cli.commands import COMMANDS
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
        (["--template", "tinny"], "there is no template 'tinny'. Fix: did you mean tiny?"),
        (["--template"], "--template needs a value. Fix: "),
        (["--template=", "b.toml"], "--template needs a name. Fix: one of default, "),
        (["--template", "tiny", "--template", "default"], "--template is given twice. Fix: "),
        (["--interactive", "--interactive"], "--interactive is given twice. Fix: "),
        (["--interactive=1"], "--interactive takes no value. Fix: "),
        ([""], "the name of the file is empty. Fix: name one, or leave it out for retrain.toml."),
        (["--list", "--nosuch"], "--nosuch is not an option of init. Fix: "),
        (["a.toml", "--list"], "--list shows the templates and takes no 'a.toml'. Fix: "),
        (["--list", "--template", "tiny"], "--list shows the templates and takes no '--template'. Fix: "),
        (["--interactive", "--template", "tinny"], "there is no template 'tinny'. Fix: did you mean tiny?"),
        (["--bad"], "--bad is not an option of init. Fix: "),
        (["a", "b"], "unexpected argument 'b'. Fix: "),
        (["no/such/folder.toml"], "no/such/folder.toml: cannot be written: No such file or directory. Fix: "),
    ],
)
def test_mistakes_of_init(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", *words]) == 2
    out = capsys.readouterr()
    assert out.err.startswith(message)
    assert out.out == ""
    assert os.listdir() == []


def test_init_lists_the_templates(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "--list"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in (*templates.TEMPLATES, *templates.LATER))


@pytest.mark.parametrize(
    ("command", "topic"),
    [("eval", "use"), ("sample", "use"), ("top", "status"), ("resume-check", "doctor"), ("demo", "commands")],
)
def test_man_finds_the_topic_of_a_command(command: str, topic: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["man", "--topic", command]) == 0
    assert capsys.readouterr().out == manual.topic_text(topic)


def test_man_shows_topics_and_hides_its_markers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["man"]) == 0
    whole = capsys.readouterr().out
    assert "<!--" not in whole
    assert main(["man", "--list-topics"]) == 0
    topics = capsys.readouterr().out.split()
    assert topics == [
        "overview", "quickstart", "commands", "options", "campaigns", "explain", "trace", "doctor", "status", "report",
        "diff", "why", "replay", "use", "bench", "init", "plugins", "editors", "environment", "exit-codes",
    ]  # fmt: skip
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
        (["--topic"], "--topic needs a value. Fix: "),
        (["--topic="], "the manual has no topic ''. Fix: "),
        (["--format", "pdf"], "--format pdf is unknown. Fix: there is text, json, html."),
        (["--format"], "--format needs a value. Fix: "),
        (["--format", "json", "--format", "text"], "--format is given twice. Fix: "),
        (["--format", "json", "--json"], "--format and --json exclude each other. Fix: "),
        (["--json", "--path"], "--json and --path exclude each other. Fix: "),
        (["--path", "--json"], "--path and --json exclude each other. Fix: "),
        (["--sync", "--topic", "status"], "--sync and --topic exclude each other. Fix: "),
        (["--list-topics", "--format", "html"], "--list-topics and --format html exclude each other. Fix: "),
        (["--topic", "status", "--list-topics"], "--topic and --list-topics exclude each other. Fix: "),
        (["--check", "--sync"], "--check and --sync exclude each other. Fix: "),
        (["--path=x"], "--path takes no value. Fix: "),
        (["quickstart"], "unexpected argument 'quickstart'. Fix: "),
    ],
)
def test_mistakes_of_man(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["man", *words]) == 2
    assert capsys.readouterr().err.startswith(message)


def test_the_manual_as_json_and_as_a_page(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["man", "--json"]) == 0
    topics = json.loads(capsys.readouterr().out)["topics"]
    assert [t["name"] for t in topics] == manual.topics()
    assert all(t["text"] and "<!--" not in t["text"] for t in topics)
    assert main(["man", "--format=json", "--topic", "status"]) == 0
    (one,) = json.loads(capsys.readouterr().out)["topics"]
    assert one in topics
    assert main(["man", "--list-topics", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"topics": manual.topics()}
    assert main(["man", "--format", "html"]) == 0
    page = capsys.readouterr().out
    seen = _Page()
    seen.feed(page)
    assert seen.open == []
    assert seen.ids == manual.topics()
    assert seen.links == [f"#{name}" for name in manual.topics()]
    assert not {"script", "img", "link", "iframe"} & seen.tags
    assert "http" not in page.partition("</head>")[0]
    # Nothing of the text is lost, whatever stands in its angle brackets.
    assert "".join("".join(seen.text).split()).count("<log_dir>/adapter") == 1
    for line in manual.topic_text("quickstart").splitlines()[1:]:
        assert "".join(line.replace("`", "").split()) in "".join("".join(seen.text).split())


class _Page(HTMLParser):
    """Tags that are open, ids, links and text of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: set[str] = set()
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag != "meta":
            self.open.append(tag)
        self.ids += [value or "" for name, value in attrs if name == "id"]
        self.links += [value or "" for name, value in attrs if name == "href"]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


GOLDEN = Path(__file__).parent / "golden" / "man.txt"
SHOWN = [
    ["--list-topics"], ["--topic", "quickstart"], ["--topic", "explain"], ["--topic", "editors"], ["--topic", "environment"],
    ["--topic", "exit-codes", "--json"], ["--topic", "exit-codes", "--format", "html"],
]  # fmt: skip


def test_the_manual_reads_as_agreed(capsys: pytest.CaptureFixture[str]) -> None:
    said = ""
    for words in SHOWN:
        assert main(["man", *words]) == 0
        said += f"$ retrain man {' '.join(words)}\n{capsys.readouterr().out}\n"
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(said, encoding="utf-8")
    assert said == GOLDEN.read_text(encoding="utf-8")


def test_every_command_has_a_help_text_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    for command in COMMANDS:
        assert main([command, "--help"]) == 0
        text = capsys.readouterr().out
        assert text.startswith(f"Usage: retrain {command}"), command
        assert len(text.splitlines()) > 2, command
        assert manual.usage_of(command) == text
        assert all(len(line) <= 130 for line in text.splitlines()), command


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


@pytest.mark.parametrize("words", [[], ["--check"], ["--sync"], ["--topic", "status"], ["--list-topics", "--json"]])
def test_a_manual_that_is_gone_is_one_line(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = tmp_path / "manual.md"
    monkeypatch.setattr(manual, "MANUAL", str(gone))
    assert main(["man", *words]) == 1
    out = capsys.readouterr()
    assert out.err == (
        f"{gone}: cannot be read: No such file or directory. Fix: it is a part of the package: install retrain again.\n"
    )
    assert out.out == ""


def test_sync_where_nothing_can_be_written_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    place = tmp_path / "file" / "help.txt"
    monkeypatch.setattr(manual, "generated", lambda: {str(place): "fresh\n"})
    assert main(["man", "--sync"]) == 1
    out = capsys.readouterr()
    assert out.err.startswith(f"{place}: cannot be written: Not a directory. Fix: ")
    assert out.err.count("\n") == 1
    assert out.out == ""
