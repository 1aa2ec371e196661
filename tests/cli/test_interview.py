"""``retrain init --interactive``, answered line by line, and on a real terminal."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from retrain import cards
from retrain.cli import interview
from retrain.cli.main import main
from retrain.config.load import load
from retrain.environments.sources import load_tasks
from retrain.errors import ModelError
from retrain.preflight import anchored

OWN = '{"problem": "1 + 1", "solution": "2"}\n'


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def answer(monkeypatch: pytest.MonkeyPatch, *lines: str) -> list[str]:
    """Answers in order, then Ctrl-D; returns the list of questions that were asked."""
    left, asked = list(lines), list[str]()

    def given(prompt: str = "") -> str:
        asked.append(prompt)
        if not left:
            raise EOFError
        return left.pop(0)

    monkeypatch.setattr("builtins.input", given)
    return asked


SAID: list[tuple[list[str], dict[str, Any]]] = [
    (["", "", "", ""], {"model.model": "retrain/tiny", "training.max_steps": 60, "logging.log_dir": "logs/demo"}),
    (["demo", "5", "tensorboard", "runs/a"], {"training.max_steps": 5, "logging.trackers": ("tensorboard",)}),
    (["2", "", "", "", "7", "", ""], {"training.max_steps": 7, "training.group_size": 8, "reward.type": "math"}),
    (["exp", "Qwen/Qwen3-0.6B", "gpu:1", "match", "", "", ""], {"model.model": "Qwen/Qwen3-0.6B", "reward.type": "match"}),
    (
        ["own", "retrain/tiny", "cpu", "own.jsonl", "", "", "", "custom", "my_reward", "20", "wandb", ""],
        {
            "data.source": "jsonl", "data.path": "own.jsonl", "eval.source": "", "reward.custom_module": "my_reward",
            "data.fields": {"question": "problem", "answer": "solution"}, "logging.log_dir": "logs/own",
        },
    ),
]  # fmt: skip


@pytest.mark.parametrize(("lines", "wanted"), SAID)
def test_answers_become_a_configuration_that_loads(
    lines: list[str], wanted: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("own.jsonl").write_text(OWN)
    answer(monkeypatch, *lines)
    assert main(["init", "--interactive", "mine.toml"]) == 0
    assert "Wrote mine.toml.\nNext: retrain explain mine.toml" in capsys.readouterr().out
    loaded = load(Path("mine.toml"))
    for key, value in wanted.items():
        section, name = key.split(".")
        assert getattr(getattr(loaded.config, section), name) == value, key


@pytest.mark.parametrize("place", ["own.jsonl", "in/own.jsonl", "in"])
def test_it_reads_a_file_as_the_run_does(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = Path("in/train.jsonl" if place == "in" else place)
    file.parent.mkdir(exist_ok=True)
    file.write_text(OWN, encoding="utf-8-sig")
    # The path is looked for beside the TOML, then in the working directory.
    Path("deep").mkdir()
    answer(monkeypatch, "own", "retrain/tiny", "cpu", place, "", "", "none", "match", "1", "", "")
    assert main(["init", "--interactive", "deep/mine.toml"]) == 0
    config = anchored(load(Path("deep/mine.toml")).config, Path("deep/mine.toml"))
    assert config.data.fields == {"question": "problem", "answer": "solution"}
    (task,) = load_tasks(config.data, "train")
    assert task.reference == "2"


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("nodir/x.toml", "nodir/x.toml: cannot be written: No such file or directory. Fix: "),
        ("a-file/x.toml", "a-file/x.toml: cannot be written: Not a directory. Fix: "),
        ("x" * 300, "cannot be written: File name too long. Fix: "),
    ],
)
def test_it_asks_nothing_where_it_could_not_write(
    path: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("a-file").touch()
    asked = answer(monkeypatch)
    assert main(["init", "--interactive", path]) == 2
    assert said in capsys.readouterr().err
    assert asked == []
    assert os.listdir() == ["a-file"]


def test_answers_are_shown_where_the_place_went_away_meanwhile(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("place").mkdir()
    left = ["demo", "5", "", ""]

    def given(prompt: str = "") -> str:
        if len(left) == 1:
            Path("place").rmdir()
        return left.pop(0)

    monkeypatch.setattr("builtins.input", given)
    assert main(["init", "--interactive", "place/x.toml"]) == 2
    out = capsys.readouterr()
    assert "max_steps = 5\n" in out.out
    assert "cannot be written" in out.err


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["7"], "answer with a number from 1 to 5, or a name."),
        (["demo", "0"], "training.max_steps must be an integer of at least 1, not 0."),
        (["demo", "many"], "training.max_steps must be an integer of at least 1"),
        (["own", "a b"], "that is neither an id"),
        (["own", "./none"], "there is no folder ./none"),
        (["own", "empty"], "empty holds no config.json, so it is no model."),
        (["robust", "retrain/tiny"], "retrain/tiny only knows short sums"),
        (["own", "retrain/tiny", "cpu", "own.jsonl", "", "", "./own.jsonl"], "that is the file that is trained on"),
        (["own", "retrain/tiny", "cpu", "own.jsonl", "", "", "other.jsonl"], "the first row has no problem and no solution."),
        (["own", "retrain/tiny", "cpu", "own.jsonl", "", "", "none.jsonl"], "there is no such file or folder."),
        (["own", "retrain/tiny", "cuda"], 'for example "gpu:0"'),
        (["own", "retrain/tiny", "cpu", "none.jsonl"], "'none.jsonl': there is no such file or folder."),
        (["own", "retrain/tiny", "cpu", "bad.jsonl"], "bad.jsonl:1: invalid JSON: "),
        (["own", "retrain/tiny", "cpu", "list.jsonl"], "list.jsonl:2: not a JSON object."),
        (["own", "retrain/tiny", "cpu", "blank.jsonl"], "blank.jsonl holds no row."),
        (["own", "retrain/tiny", "cpu", "own.jsonl", "zzz"], "the first row has problem, solution."),
        (["own", "retrain/tiny", "cpu", "own.jsonl", "", "", "", "custom", "a-b"], "that is no name of a module"),
        (["demo\x1b[A"], "characters that cannot be shown"),
    ],
)
def test_a_wrong_answer_is_said_and_asked_again(
    lines: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("own.jsonl").write_text(OWN)
    Path("other.jsonl").write_text('{"q": "1"}\n')
    Path("bad.jsonl").write_text("no\n")
    Path("list.jsonl").write_text("\n[1]\n")
    Path("blank.jsonl").write_text("\n\n")
    Path("empty").mkdir()
    before = sorted(os.listdir())
    asked = answer(monkeypatch, *lines)
    assert main(["init", "--interactive"]) == 130
    out = capsys.readouterr()
    assert said in out.out
    assert asked[-1] == asked[-2]
    assert "Nothing was written." in out.err
    assert sorted(os.listdir()) == before


def test_it_asks_nothing_where_a_file_stands(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    Path("retrain.toml").write_text("mine")
    asked = answer(monkeypatch)
    assert main(["init", "--interactive"]) == 2
    assert "never overwrites" in capsys.readouterr().err
    assert asked == []
    assert Path("retrain.toml").read_text() == "mine"


def test_a_template_answers_the_first_question(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answer(monkeypatch, "3", "", "")
    assert main(["init", "--interactive", "--template", "tiny"]) == 0
    assert load(Path("retrain.toml")).config.training.max_steps == 3
    assert len(asked) == 3


@pytest.mark.parametrize("goal", interview.GOALS)
def test_every_goal_keeps_its_template_s_comments(goal: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("own.jsonl").write_text('{"question": "1", "answer": "1"}\n')
    own = ["own.jsonl", ""] if goal == "own" else []
    model = [] if goal == "demo" else ["", "", *own, ""]
    answer(monkeypatch, goal, *model, "", "", "")
    assert main(["init", "--interactive"]) == 0
    assert Path("retrain.toml").read_text().count("#") > 5


def local_model(positions: int) -> str:
    """A folder with the config.json of a model that can hold so many tokens."""
    Path("model").mkdir()
    Path("model/config.json").write_text(json.dumps({"max_position_embeddings": positions}))
    return "model"


GOALS = [*(goal for goal in interview.GOALS if goal != "demo"), "default"]
MODELS = [512, 4096, 40960, "Qwen/Qwen3-0.6B", "nobody/knows"]


@pytest.mark.parametrize(("goal", "model"), [("own", "retrain/tiny"), *((g, m) for g in GOALS for m in MODELS)])
def test_sizes_fit_every_model_that_is_offered(goal: str, model: str | int, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = "" if isinstance(model, int) else "7"
    Path("own.jsonl").write_text('{"question": "1", "answer": "1"}\n')
    name = local_model(model) if isinstance(model, int) else model
    template = ["--template", goal] if goal not in interview.GOALS else []
    first = [] if template else [goal]
    answer(monkeypatch, *first, name, "", *(["own.jsonl", ""] if goal == "own" else []), "", steps, "", "")
    assert main(["init", "--interactive", *template]) == 0
    loaded = load(Path("retrain.toml"))
    with contextlib.suppress(ModelError):  # nobody/knows
        assert loaded.config.training.max_tokens < cards.look_up(name).config.max_position_embeddings
    assert [said for said in loaded.announcements if "sepa." in said or "warmup" in said] == []
    header = Path("retrain.toml").read_text().partition("\n[")[0]
    assert f"# {name} on " in header
    assert f", {steps or loaded.config.training.max_steps} steps on {loaded.config.backend.devices}." in header
    assert name != "retrain/tiny" or "billion" not in header


def test_the_embedded_model_trains_on_own_problems_as_written(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("own.jsonl").write_text("".join(f'{{"question": "{n} + 12 = ?", "answer": {n + 12}}}\n' for n in range(10, 18)))
    Path("held.jsonl").write_text('{"question": "33 + 12 = ?", "answer": 45}\n')
    answer(monkeypatch, "own", "retrain/tiny", "", "own.jsonl", "held.jsonl", "", "1", "", "")
    assert main(["init", "--interactive"]) == 0
    assert main([]) == 0
    lines = [json.loads(line) for line in Path("logs/own/metrics.jsonl").read_text().splitlines()]
    assert any("eval/accuracy" in line for line in lines)


def test_held_out_problems_become_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("both").mkdir()
    Path("both/train.jsonl").write_text(OWN)
    Path("both/test.jsonl").write_text(OWN.replace("1 + 1", "1 + 2"))
    answer(monkeypatch, "own", "Qwen/Qwen3-0.6B", "", "both", "", "", "", "", "", "", "")
    assert main(["init", "--interactive", "a.toml"]) == 0
    found = load(Path("a.toml")).config
    assert (found.eval.source, found.eval.path, found.eval.every) == ("jsonl", "both", 50)
    answer(monkeypatch, "quickstart", "", "", "", "", "", "")
    assert main(["init", "--interactive", "b.toml"]) == 0
    assert load(Path("b.toml")).config.eval.source == "math"


@pytest.mark.parametrize(("kind", "device"), [("cuda", "gpu:0"), ("cpu", "cpu")])
def test_it_offers_the_device_that_is_here(
    kind: str, device: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here = replace(cards.card("L4"), kind=kind, here=True)
    monkeypatch.setattr(cards, "present", lambda *_, **__: here)
    asked = answer(monkeypatch, "robust", "", "", "", "", "", "")
    assert main(["init", "--interactive"]) == 0
    assert f"Device (gpu:0 or cpu) [{device}]: " in asked
    assert load(Path("retrain.toml")).config.backend.devices == device
    out = capsys.readouterr().out
    assert ("No GPU was found here." in out) == ("large models are slow" in out) == (kind == "cpu")


@pytest.mark.parametrize("sent", [b"\x04", b"\x03"])
def test_a_key_on_a_real_terminal_leaves_nothing(sent: bytes, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-m", "retrain", "init", "--interactive"],
        cwd=tmp_path, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(theirs)
    seen, end = b"", time.monotonic() + 120
    while b"Your choice" not in seen and time.monotonic() < end:
        seen += os.read(ours, 4096)
    try:
        # A key between the question and the wait for its answer is lost on a busy machine: people press it again.
        while child.poll() is None and time.monotonic() < end:
            os.write(ours, sent)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(timeout=2)
        assert child.returncode == 130
    finally:
        if child.poll() is None:
            child.send_signal(signal.SIGKILL)
        os.close(ours)
    assert list(tmp_path.iterdir()) == []
