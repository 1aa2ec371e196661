"""The run path: which configuration, which folder, what is asked, exit codes and signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from retrain.cli.main import main
from retrain.config.load import LoadedConfig, dump_toml, load_config
from retrain.types import RunResult

ARITHMETIC = '[data]\nsource = "arithmetic"\n[model]\nmodel = "retrain/tiny"\n'


class FakeRunner:
    """Stands for ``runner.execute``: remembers its calls and returns a result."""

    def __init__(self) -> None:
        self.calls: list[tuple[LoadedConfig, dict[str, Any]]] = []
        self.status: Any = "done"

    def __call__(self, loaded: LoadedConfig, **options: Any) -> RunResult:
        self.calls.append((loaded, options))
        directory = Path(loaded.config.logging.log_dir)
        directory.mkdir(parents=True, exist_ok=True)
        rows = [
            {"eval/accuracy": a, "eval/accuracy_low": a - 0.1, "eval/accuracy_high": a + 0.1}
            for a in (0.25, 0.75)
        ]
        (directory / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        (directory / "config.toml").write_text(dump_toml(loaded.config), encoding="utf-8")
        return RunResult(self.status, 3, str(directory))

    @property
    def config(self) -> Any:
        return self.calls[-1][0].config


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeRunner:
    fake = FakeRunner()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("retrain.runner.execute", fake)
    return fake


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes stdin and stdout a terminal that answers."""

    def answer(*answers: str) -> None:
        queue = list(answers)
        monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
        monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)

        def read(prompt: str) -> str:
            if not queue:
                raise EOFError
            return queue.pop(0)

        monkeypatch.setattr("builtins.input", read)

    return answer


def test_the_named_file_or_the_one_here(runner: FakeRunner) -> None:
    Path("retrain.toml").write_text(ARITHMETIC + "[training]\nlr = 1e-3\n", encoding="utf-8")
    Path("other.toml").write_text(ARITHMETIC, encoding="utf-8")
    assert main([]) == 0
    assert runner.config.training.lr == 1e-3
    assert main(["other.toml", "--lr", "1e-4", "--overwrite", "--plain"]) == 0
    assert runner.config.training.lr == 1e-4
    options = runner.calls[-1][1]
    assert isinstance(options.pop("stop"), threading.Event)
    assert options == {"overwrite": True, "fork": False, "debug": False, "plain": True}


@pytest.mark.parametrize(("status", "code"), [("done", 0), ("failed", 1), ("interrupted", 130)])
def test_exit_codes(runner: FakeRunner, status: str, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    Path("retrain.toml").write_text(ARITHMETIC, encoding="utf-8")
    runner.status = status
    assert main([]) == code
    out = capsys.readouterr().out
    assert ("retrain --resume logs/train" in out) == (status == "interrupted")


def test_mistakes_are_lines_with_exit_code_2(runner: FakeRunner, capsys: pytest.CaptureFixture[str]) -> None:
    Path("my.toml").write_text(ARITHMETIC + "[training]\nlr_rate = 1\n", encoding="utf-8")
    assert main(["my.toml", "--batch-size", "0"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "my.toml:6: training.lr_rate is not a setting. Fix: did you mean training.lr?",
        "--batch-size: training.batch_size must be an integer from 1 to 65536, not 0. "
        "Fix: for example batch_size = 8.",
    ]
    assert runner.calls == []


def test_resume_alone_uses_what_the_run_recorded(
    runner: FakeRunner, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("retrain.toml").write_text(ARITHMETIC, encoding="utf-8")
    Path("logs/a").mkdir(parents=True)
    recorded = load_config({"data": {"source": "arithmetic"}, "training": {"lr": 3e-4}})
    Path("logs/a/config.toml").write_text(dump_toml(recorded), encoding="utf-8")
    assert main(["--resume", "logs/a", "--max-steps", "600"]) == 0
    assert runner.config.training.lr == 3e-4
    assert runner.config.training.max_steps == 600
    assert runner.config.resume.from_ == "logs/a"
    assert main(["retrain.toml", "--resume", "logs/a"]) == 0
    assert runner.config.training.lr == 4e-5
    assert runner.config.resume.from_ == "logs/a"
    assert main(["--resume", "logs/none"]) == 2
    assert "logs/none holds no run" in capsys.readouterr().err


def test_demo_takes_a_free_folder_and_shows_what_was_learned(
    runner: FakeRunner, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", "--max-steps", "9"]) == 0
    config = runner.config
    assert (config.training.seed, config.training.max_steps, config.logging.log_dir) == (42, 9, "logs/demo")
    assert config.model.model == "retrain/tiny"
    out = capsys.readouterr().out
    assert "before  25.0% [15.0%, 35.0%]" in out
    assert "after   75.0% [65.0%, 85.0%]" in out
    assert "Run directory: logs/demo" in out
    assert main(["demo"]) == 0
    assert runner.config.logging.log_dir == "logs/demo-2"
    assert "logs/demo holds a run already: this one goes to logs/demo-2." in capsys.readouterr().out
    assert main(["demo", "--log-dir", "logs/mine"]) == 0
    assert runner.config.logging.log_dir == "logs/mine"
    assert main(["demo", "--overwrite"]) == 0
    assert runner.config.logging.log_dir == "logs/demo"
    assert main(["demo", "--resume", "logs/demo"]) == 0
    assert runner.config.resume.from_ == "logs/demo"
    assert main(["demo", "my.toml"]) == 2


def test_a_mistake_in_a_demo_override_is_placed(
    runner: FakeRunner, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", "--data-source", "gsm8k", "--eval-source", "gsm8k", "--data-levels", "3"]) == 2
    assert capsys.readouterr().err == (
        '--data-levels: data.levels does nothing with data.source = "gsm8k". '
        "Fix: remove it, or change data.source.\n"
    )
    assert main(["demo", "--backend-options", "a=1"]) == 2
    assert capsys.readouterr().err.startswith("--backend-options: backend.options does nothing")
    assert runner.calls == []


@pytest.mark.parametrize(
    ("answer", "switch"),
    [("f", "fork"), ("o", "overwrite"), ("r", None), ("q", None), ("", None), ("?r", None)],
)
def test_on_a_terminal_it_asks_about_a_used_folder(
    runner: FakeRunner, terminal: Callable[..., None], answer: str, switch: str | None
) -> None:
    Path("retrain.toml").write_text(ARITHMETIC, encoding="utf-8")
    assert main([]) == 0
    terminal(*answer)
    code = main([])
    if answer in ("q", ""):
        assert code == 2
        assert len(runner.calls) == 1
        return
    loaded, options = runner.calls[-1]
    assert {name for name in ("fork", "overwrite") if options[name]} == ({switch} if switch else set())
    assert loaded.config.resume.from_ == ("logs/train" if answer.endswith("r") else "")


def test_elsewhere_it_leaves_a_used_folder_to_the_runner(runner: FakeRunner) -> None:
    Path("retrain.toml").write_text(ARITHMETIC, encoding="utf-8")
    assert main([]) == 0
    assert main([]) == 0
    assert runner.calls[-1][1]["overwrite"] is False


def test_on_a_terminal_it_offers_to_write_a_configuration(
    runner: FakeRunner, terminal: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    terminal("")
    assert main([]) == 2
    assert not Path("retrain.toml").exists()
    terminal("tiny")
    assert main([]) == 0
    assert load_config("retrain.toml").model.model == "retrain/tiny"
    assert runner.calls == []


WAITING_RUN = """
import os, sys, time
import retrain.runner
from retrain.types import RunResult

def execute(loaded, *, stop, **options):
    print("started", flush=True)
    if not stop.wait(60):
        return RunResult("failed", 0, "logs/x")
    if os.environ.get("HANGS"):
        print("hanging", flush=True)
        time.sleep(60)
    return RunResult("interrupted", 1, "logs/x")

retrain.runner.execute = execute
from retrain.cli.main import main
sys.exit(main(["demo"]))
"""


def start(tmp_path: Path, **environment: str) -> subprocess.Popen[str]:
    child = subprocess.Popen(
        [sys.executable, "-c", WAITING_RUN],
        cwd=tmp_path,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "started\n"
    return child


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_ends_the_run_cleanly(tmp_path: Path, number: signal.Signals) -> None:
    with start(tmp_path) as child:
        child.send_signal(number)
        out, err = child.communicate(timeout=30)
    assert child.returncode == 130
    assert "Finishing this step and saving." in err
    assert "retrain --resume logs/x" in out
    assert "Traceback" not in err


def test_the_second_signal_stops_at_once(tmp_path: Path) -> None:
    with start(tmp_path, HANGS="1") as child:
        child.send_signal(signal.SIGINT)
        assert child.stdout is not None
        assert child.stdout.readline() == "hanging\n"
        begun = time.monotonic()
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=30)
    assert child.returncode == 130
    assert time.monotonic() - begun < 10
    assert "Stopped at once" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["train", "my.toml"], "retrain my.toml"),
        (["run"], "retrain my.toml"),
        (["resume", "logs/a"], "retrain --resume logs/a"),
    ],
)
def test_words_of_other_tools_are_answered(words: list[str], hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    error = capsys.readouterr().err
    assert "there is no command" in error
    assert hint in error
    assert error.count("\n") == 1


def test_a_run_in_place_of_a_configuration_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    assert main([str(tmp_path)]) == 2
    assert f"--resume {tmp_path}" in capsys.readouterr().err
