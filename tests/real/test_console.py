"""Standard output is only a view of a run: a reader that leaves or an encoding that lacks characters ends nothing."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys

import pytest
from rich.console import Console

from retrain.sinks import ConsoleHandler, ConsoleSink, Output

CONFIG = """
[model]
model = "retrain/tiny"
lora_rank = 4
[backend]
devices = "cpu"
[algorithm]
advantage_mode = "grpo"
transform_mode = "none"
[training]
seed = 3
max_steps = 3
batch_size = 2
group_size = 4
max_tokens = 16
temperature = 1.0
[data]
source = "arithmetic"
[reward]
type = "match"
[logging]
log_dir = "run"
"""


def start(folder, **environment):
    return subprocess.Popen(
        [sys.executable, "-m", "retrain", "retrain.toml"],
        cwd=folder, env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def steps(folder):
    return [json.loads(x)["step"] for x in (folder / "run/metrics.jsonl").read_text().splitlines()]


def test_a_reader_that_leaves_after_a_line_ends_nothing(tmp_path):
    (tmp_path / "retrain.toml").write_text(CONFIG)
    child = start(tmp_path)
    assert child.stdout is not None
    assert child.stderr is not None
    assert child.stdout.readline()
    child.stdout.close()
    said = child.stderr.read().decode()
    child.stderr.close()
    assert child.wait(timeout=120) == 0, said
    assert "Error" not in said
    assert steps(tmp_path) == [0, 1, 2]
    assert "Adapter:" in (tmp_path / "run/events.log").read_text()


def test_an_encoding_that_lacks_characters_ends_nothing(tmp_path):
    rows = [{"question": f"{a} + 1 = ?", "answer": "½é"} for a in range(4)]
    (tmp_path / "½é.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    text = CONFIG.replace('source = "arithmetic"', 'source = "jsonl"\npath = "½é.jsonl"')
    (tmp_path / "retrain.toml").write_text(text.replace('"run"', '"run"\ngenerations = 1'), encoding="utf-8")
    child = start(tmp_path, PYTHONIOENCODING="ascii")
    out, err = child.communicate(timeout=120)
    assert child.returncode == 0, err.decode()
    assert steps(tmp_path) == [0, 1, 2]
    assert b"\\xbd\\xe9" in out
    assert out.decode("ascii").count("Step ") == 3


class Broken(io.StringIO):
    encoding = "utf-8"

    def __init__(self, error):
        super().__init__()
        self.error = error

    def isatty(self):
        return True

    def write(self, text):
        raise self.error


@pytest.mark.parametrize("error", [BrokenPipeError(32, "gone"), OSError(28, "full"), ValueError("closed")])
@pytest.mark.parametrize("plain", [True, False])
def test_whatever_standard_output_raises_stays_inside(monkeypatch, error, plain):
    monkeypatch.setattr(sys, "stdout", Broken(error))
    handler, sink = ConsoleHandler(), ConsoleSink(total_steps=2, plain=plain)
    for step in range(2):
        handler.emit(logging.makeLogRecord({"msg": "½é", "levelno": logging.WARNING}))
        sink.log(step, {"mean_reward": 0.5})
    sink.close()


def test_a_missing_standard_output_is_silent(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    ConsoleHandler().emit(logging.makeLogRecord({"msg": "x", "levelno": logging.INFO}))
    sink = ConsoleSink(total_steps=1, plain=False)
    sink.log(0, {})
    sink.close()


def test_what_the_encoding_lacks_is_escaped():
    raw = io.BytesIO()
    output = Output(io.TextIOWrapper(raw, encoding="ascii"))
    output.write("a ½é \ud800\n")
    Console(file=output, highlight=False).print("½")
    output.flush()
    assert raw.getvalue() == b"a \\xbd\\xe9 \\ud800\n\\xbd\n"
