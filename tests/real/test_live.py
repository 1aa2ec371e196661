"""Real runs watched: the live view in a pseudo-terminal, and processes that are slow, stopped, hang, or are killed."""

from __future__ import annotations

import contextlib
import fcntl
import io
import itertools
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from retrain import live, runner
from retrain.config.load import Override, load
from retrain.errors import ModelError
from retrain.sinks import ConsoleSink
from retrain.tracking import layout, read
from retrain.tracking.read import RunRecord

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
max_steps = 4
batch_size = 2
group_size = 4
max_tokens = 16
temperature = 1.0
[data]
source = "arithmetic"
[reward]
type = "match"
[eval]
source = "arithmetic"
every = 0
examples = 4
[logging]
log_dir = "run"
"""


class Terminal:
    """What a terminal shows: lines so far, with the cursor moves, erasures and returns that rich uses."""

    def __init__(self):
        self.lines, self.at, self.column = [""], 0, 0
        self.raw = ""

    def feed(self, text):
        self.raw += text
        for piece in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+|\x1b", text):
            if piece == "\n":
                self.at += 1
                if self.at == len(self.lines):
                    self.lines.append("")
            elif piece == "\r":
                self.column = 0
            elif piece.endswith("A") and piece.startswith("\x1b["):
                self.at = max(0, self.at - int(piece[2:-1] or 1))
            elif piece == "\x1b[2K":
                self.lines[self.at] = ""
            elif not piece.startswith("\x1b"):
                line = self.lines[self.at].ljust(self.column)
                self.lines[self.at] = line[: self.column] + piece + line[self.column + len(piece) :]
                self.column += len(piece)

    @property
    def shown(self):
        return "\n".join(self.lines)


class Running:
    """A run in a pseudo-terminal."""

    def __init__(self, folder, *words, columns=110):
        self.folder, self.screen = folder, Terminal()
        self.master, slave = pty.openpty()
        self.resize(columns)
        environment = {
            "TERM": "xterm-256color",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONIOENCODING": "utf-8",
        }
        dropped = ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES", "CI")
        self.child = subprocess.Popen(
            [sys.executable, "-m", "retrain", *words],
            cwd=folder, env={**{k: v for k, v in os.environ.items() if k not in dropped}, **environment},
            stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
        )  # fmt: skip
        os.close(slave)
        self._bytes = b""

    def resize(self, columns):
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))

    def read_until(self, found, seconds=120.0):
        """Feed the screen until ``found(screen)`` or the end of the run."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if found(self.screen):
                return True
            if select.select([self.master], [], [], 0.1)[0]:
                try:
                    new = os.read(self.master, 65536)
                except OSError:  # the other end is closed
                    return found(self.screen)
                self._bytes += new
                with contextlib.suppress(UnicodeDecodeError):
                    self.screen.feed(self._bytes.decode())
                    self._bytes = b""
            elif self.child.poll() is not None:
                return found(self.screen)
        raise AssertionError(f"not seen in {seconds} s:\n{self.screen.shown[-3000:]}")

    def finish(self):
        """Everything to the end; the exit code."""
        self.read_until(lambda screen: False)
        return self.child.wait(timeout=60)

    def close(self):
        if self.child.poll() is None:
            self.child.kill()
        self.child.wait()
        os.close(self.master)


@pytest.fixture
def start(tmp_path):
    open_runs = []

    def start(config=CONFIG, *words, **settings):
        (tmp_path / "retrain.toml").write_text(config)
        open_runs.append(Running(tmp_path, "retrain.toml", *words, **settings))
        return open_runs[-1]

    yield start
    for run in open_runs:
        run.close()


FRAME = re.compile(r"step \d+/\d+ [━╌]+")
SLOW = CONFIG.replace(
    'type = "match"', 'type = "custom"\ncustom_module = "slow"\ncustom_function = "score"\ntimeout_s = 600.0'
)


def test_the_view_stays_below_the_lines_and_leaves_nothing_behind(start):
    run = start()
    assert run.read_until(lambda s: FRAME.search(s.shown) and "rollouts" in s.shown)
    assert run.finish() == 0
    shown = run.screen.shown
    assert len(re.findall(r"(?m)^Step \d+ \[", shown)) == 4
    assert not FRAME.search(shown), shown
    assert "time: sampling" not in shown
    assert "\x1b[?25l" not in run.screen.raw
    # What was drawn meanwhile: progress, learning, the split of the time, memory.
    for said in ("left", "reward ", "correct ", "tokens/s", "time: sampling", "memory "):
        assert said in run.screen.raw, said
    assert shown.rstrip().endswith("eval, export.")


def test_a_frame_drawn_while_a_line_is_printed_leaves_nothing_of_itself(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    out = io.StringIO()
    out.isatty = lambda: True
    monkeypatch.setattr(sys, "stdout", out)
    heights = itertools.cycle((1, 4, 2, 6))
    monkeypatch.setattr(live.LiveView, "lines", lambda self, width: ["step 1/2 ━━"] * next(heights))
    monkeypatch.setattr(live, "_EVERY_S", 0.0005)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        sink = ConsoleSink(total_steps=2, plain=False)
        for number in range(300):
            print(f"line {number}")
            if number % 3 == 0:
                sink.log(0, {})
        sink.close()
    finally:
        sys.setswitchinterval(interval)
    screen = Terminal()
    screen.feed(out.getvalue())
    assert not FRAME.search(screen.shown)
    assert len(re.findall(r"(?m)^line \d+$", screen.shown)) == 300


@pytest.mark.slow
def test_a_terminal_that_becomes_narrow_gets_short_lines(start):
    run = start(CONFIG.replace("max_steps = 4", "max_steps = 8"))
    run.read_until(lambda s: FRAME.search(s.shown))
    run.resize(50)
    assert run.finish() == 0
    assert not FRAME.search(run.screen.shown)
    last = [piece for piece in run.screen.raw.split("\r\n") if "step 8/8" in piece or "step 7/8" in piece]
    assert last
    assert all(len(re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", piece)) < 110 for piece in last)


def test_ctrl_c_finishes_the_step_and_says_so_above_the_view(start):
    run = start(CONFIG.replace("max_steps = 4", "max_steps = 400"))
    run.read_until(lambda s: FRAME.search(s.shown) and "Step 1 " in s.shown)
    os.kill(run.child.pid, signal.SIGINT)
    assert run.finish() == 130
    shown = run.screen.shown
    assert re.search(r"(?m)^Finishing this step and saving\.", shown)
    assert "Continue with: " in shown
    assert not FRAME.search(shown), shown


def test_an_error_leaves_the_terminal_clean(start, tmp_path):
    (tmp_path / "slow.py").write_text("def score(response, reference):\n    raise ValueError('bad')\n")
    run = start(SLOW + '[plugins]\nsearch_paths = ["."]\n')
    assert run.finish() == 1
    assert not FRAME.search(run.screen.shown)
    assert "rewards of this step failed" in run.screen.shown


@pytest.mark.slow
def test_plain_prints_lines_and_alarms_once(start, tmp_path):
    config = CONFIG.replace("max_steps = 4", "max_steps = 12").replace("max_tokens = 16", "max_tokens = 4")
    run = start(config, "--plain")
    assert run.finish() == 0
    assert not FRAME.search(run.screen.raw)
    assert "\x1b[" not in run.screen.raw
    said = re.findall(r"(?m)^alarm: .*$", run.screen.shown)
    assert any("were cut at training.max_tokens" in line for line in said)
    assert len(said) == len(set(said))
    events = (tmp_path / "run/events.log").read_text()
    assert events.count("WARNING alarm: ") == len(said)


def wait_for(found, seconds=90.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found():
            return
        time.sleep(0.1)
    raise AssertionError("waited in vain")


def phase_of(folder):
    try:
        return json.loads((folder / "run/heartbeat.json").read_text())["phase"]
    except (OSError, ValueError):
        return ""


@pytest.mark.slow
def test_slow_stopped_hanging_and_killed_are_told_apart(start, tmp_path, monkeypatch):
    """A reward that sleeps: the run beats in the middle of its step, whatever that takes."""
    (tmp_path / "slow.py").write_text(
        "import time\ndef score(response, reference):\n    time.sleep(300)\n    return 0.0\n"
    )
    config = re.sub(r"\[eval\][^\[]*", "", SLOW) + '[plugins]\nsearch_paths = ["."]\n'
    run = start(config, "--plain")
    wait_for(lambda: phase_of(tmp_path) == "scoring")

    def state():
        return RunRecord(tmp_path / "run").state

    monkeypatch.setattr(read, "SILENT_S", 6.0)
    time.sleep(7)
    record = RunRecord(tmp_path / "run")
    assert record.state == "running"
    assert record.heartbeat_age < 6
    assert record.still_s > 4
    assert record.beat["asked"] is None
    assert record.beat["memory"]["resident"] > 1 << 26
    with monkeypatch.context() as patch:
        patch.setattr(read, "_HUNG_FIRST_S", 3.0)
        assert state() == "hung"
    os.kill(run.child.pid, signal.SIGSTOP)
    wait_for(lambda: state() == "silent", 15)
    assert "is stopped: kill -CONT" in RunRecord(tmp_path / "run").why_silent
    os.kill(run.child.pid, signal.SIGCONT)
    wait_for(lambda: state() == "running", 15)
    os.kill(run.child.pid, signal.SIGKILL)
    run.child.wait()
    assert state() == "dead"
    done = subprocess.run(
        [sys.executable, "-m", "retrain", "status"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout == "No runs in logs.\n"
    done = subprocess.run(
        [sys.executable, "-m", "retrain", "status", "."],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "its process is gone, and no checkpoint is there; start it again with --overwrite" in done.stdout


def test_a_run_is_seen_while_it_loads_and_one_that_is_refused_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.toml").write_text(CONFIG.replace("max_steps = 4", "max_steps = 1"))
    make, seen, refuse = runner.build, [], []

    @contextlib.contextmanager
    def watched(config, directory, **more):
        (found,) = read.find_runs(tmp_path)
        seen.append((found.state, found.beat["phase"], found.facts["max_steps"], layout.holds_run(directory)))
        if refuse:
            raise ModelError("no such model.", fix="write another.")
        with make(config, directory, **more) as parts:
            yield parts

    monkeypatch.setattr(runner, "build", watched)

    def execute(**changes):
        return runner.execute(load("c.toml", [Override.of(k, v) for k, v in changes.items()]), plain=True)

    refuse.append(True)
    with pytest.raises(ModelError):
        execute()
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    with pytest.raises(ModelError):
        execute()
    # A folder that was there stays, and blocks no second try.
    assert {p.name for p in (tmp_path / "run").iterdir()} == {layout.LOCK, layout.EVENTS}
    refuse.clear()
    execute()
    assert seen == [("running", "starting", 1, False)] * 3
    first = RunRecord(tmp_path / "run")
    assert (first.state, first.beat["phase"]) == ("done", "saving")
    steps_s = sum(r.get("step_time_s", 0) + r.get("eval/time_s", 0) for r in first.rows)
    assert first.facts["spent_s"] == pytest.approx(steps_s, abs=0.01)
    refuse.append(True)
    resume = {"resume.from": str(tmp_path / "run")}
    with pytest.raises(ModelError):
        execute(**resume)
    assert seen[-1] == ("running", "starting", 1, True)
    assert RunRecord(tmp_path / "run").beat == first.beat
    refuse.clear()
    execute(**resume)
    assert RunRecord(tmp_path / "run").facts["spent_s"] == pytest.approx(steps_s, abs=0.01)


def test_every_key_that_a_run_writes_is_on_the_page(start, tmp_path):
    from retrain.tracking import keys

    assert start(CONFIG, "--plain").finish() == 0
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    written = {key for row in rows for key in row if "eval/accuracy" not in row}
    assert written <= {key for key, _, _ in keys.STEP_KEYS}
    evaluated = {re.sub(r"@\d+$", "@N", key) for row in rows for key in row if "eval/accuracy" in row}
    assert evaluated <= {re.sub("@<.>", "@N", key) for key, _, _ in keys.EVALUATION_KEYS}


def test_the_page_of_metrics_is_made_from_the_table():
    from retrain.tracking import keys

    page = Path(__file__).resolve().parents[2] / "docs/metrics.md"
    assert page.read_text(encoding="utf-8") == keys.page(), "python -m retrain.tracking.keys docs/metrics.md"


def test_top_on_a_terminal_leaves_with_q_and_gives_the_screen_back(tmp_path):
    run = Running(tmp_path, "top", "--interval", "0.2")
    try:
        assert run.read_until(lambda s: "No runs in logs." in s.shown)
        os.write(run.master, b"q")
        assert run.finish() == 0
        assert run.screen.raw.rstrip().endswith("\x1b[?1049l")
        assert "\x1b[?25h" in run.screen.raw
    finally:
        run.close()


def test_memory_of_a_device_is_told_where_torch_has_touched_one(monkeypatch):
    cuda = SimpleNamespace(
        is_initialized=lambda: True, device_count=lambda: 3, memory_reserved=lambda d: (0, 5, 7)[d],
        max_memory_reserved=lambda d: (0, 6, 9)[d], get_device_properties=lambda d: SimpleNamespace(total_memory=100),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    assert live.device_memory() == {"device": 12, "device_peak": 15, "device_total": 200}
    cuda.is_initialized = lambda: False
    assert live.device_memory() == {}
    monkeypatch.delitem(sys.modules, "torch")
    assert live.device_memory() == {}


@pytest.mark.parametrize("command", ["status", "top"])
def test_ctrl_c_leaves_a_watch(tmp_path, command):
    run = Running(tmp_path, command, "--interval", "0.2", *(["--watch"] if command == "status" else []))
    try:
        assert run.read_until(lambda s: "No runs in logs." in s.shown)
        os.kill(run.child.pid, signal.SIGINT)
        assert run.finish() == 0
        assert run.screen.raw.rstrip().endswith("\x1b[?1049l")
        assert "Traceback" not in run.screen.raw
    finally:
        run.close()
