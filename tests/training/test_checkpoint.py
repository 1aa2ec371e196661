"""Checkpoints under every failure: a process that dies anywhere while saving loses nothing that was saved."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from retrain.errors import ResumeError
from retrain.fakes import FakeBackend
from retrain.training.checkpoint import Checkpoints, damage


class Copying(FakeBackend):
    """A fake that is written from a copy, by a thread; ``gate`` holds the writer back."""

    def __init__(self, *, gate=None, broken="", **options):
        super().__init__(**options)
        self.gate, self.broken, self.writers = gate, broken, []

    def snapshot(self):
        frozen = FakeBackend()
        frozen.table, frozen.version = self.table.copy(), self.version

        def write(directory):
            self.writers.append(threading.current_thread())
            if self.gate is not None:
                assert self.gate.wait(30)
            if self.broken:
                raise OSError(errno.ENOSPC, self.broken)
            frozen.save(directory)

        return write


def save(run, step, accuracy=None, keep=3):
    Checkpoints(run, keep=keep).save(
        step, FakeBackend(seed=step), {"value": step}, accuracy=accuracy, selected_on="x"
    )


DYING = """
import os, sys
from pathlib import Path
from retrain.fakes import FakeBackend
from retrain.training.checkpoint import Checkpoints
import retrain.training.checkpoint as module, retrain.tracking.run_log as writer

limit, calls = int(sys.argv[2]), 0

def counted(function):
    def wrapper(*args, **kwargs):
        global calls
        calls += 1
        if calls > limit:
            os.kill(os.getpid(), 9)
        return function(*args, **kwargs)
    return wrapper

os.fsync = counted(os.fsync)
Path.replace = counted(Path.replace)
Path.write_text = counted(Path.write_text)
Path.mkdir = counted(Path.mkdir)
import shutil
shutil.rmtree = counted(shutil.rmtree)

class Copying(FakeBackend):
    def snapshot(self):
        return self.save

backend = (Copying if sys.argv[3] == "behind" else FakeBackend)(seed=2)
with Checkpoints(Path(sys.argv[1]), keep=1) as checkpoints:
    checkpoints.save(2, backend, {"value": 2}, accuracy=None, selected_on="")
"""


@pytest.mark.parametrize("how", ["before", "behind"])
def test_a_kill_at_every_write_point_leaves_a_whole_checkpoint(tmp_path, how):
    script = tmp_path / "dying.py"
    script.write_text(DYING)
    outcomes = []
    for limit in range(60):
        run = tmp_path / f"run{limit}"
        save(run, 1)
        done = subprocess.run(
            [sys.executable, str(script), str(run), str(limit), how], check=False, env={**os.environ}
        )
        path, state = Checkpoints(run, keep=1).newest()
        assert state["value"] == state["step"] == int(path.name[-6:])
        assert damage(path) == ""
        pointer = json.loads((run / "trainer_state.json").read_text())
        assert pointer["step"] in (1, 2)
        outcomes.append(state["step"])
        if done.returncode == 0:
            break
        assert done.returncode == -9
    assert done.returncode == 0
    assert outcomes == sorted(outcomes)
    assert {1, 2} == set(outcomes)


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda p: (p / "manifest.json").unlink(), "no manifest.json"),
        (lambda p: (p / "manifest.json").write_text("{"), "cannot be read"),
        (lambda p: (p / "manifest.json").write_text("[]"), "cannot be read"),
        (lambda p: (p / "state.json").unlink(), "state.json is missing"),
        (lambda p: (p / "state.json").write_text("{}"), "does not match its checksum"),
        (lambda p: (p / "adapter/table.json").write_bytes(b"x"), "does not match its checksum"),
    ],
)
def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_used(tmp_path, caplog, harm, says):
    save(tmp_path, 1)
    save(tmp_path, 2)
    harm(tmp_path / "checkpoints/step_000002")
    with caplog.at_level("WARNING", logger="retrain"):
        path, state = Checkpoints(tmp_path, keep=3).newest()
    assert path.name == "step_000001"
    assert state["value"] == 1
    assert says in caplog.text


def test_no_checkpoint_at_all_is_one_clear_line(tmp_path):
    with pytest.raises(ResumeError, match="no intact checkpoint"):
        Checkpoints(tmp_path, keep=3).newest()


def test_the_newest_and_the_best_stay(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step, accuracy in ((1, 0.2), (2, 0.9), (3, 0.5), (4, None), (5, 0.4)):
        checkpoints.save(step, FakeBackend(), {"value": step}, accuracy=accuracy, selected_on="fake/test")
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["step_000002", "step_000004", "step_000005"]
    best = json.loads((tmp_path / "trainer_state.json").read_text())["best"]
    assert best["checkpoint"] == "step_000002"
    assert "fake/test" in best["note"]
    # The best is known again after a restart, so it is not pruned then either.
    again = Checkpoints(tmp_path, keep=2)
    again.newest()
    again.save(6, FakeBackend(), {"value": 6}, accuracy=0.1, selected_on="fake/test")
    assert (tmp_path / "checkpoints/step_000002").is_dir()


def test_leftovers_of_dead_writers_are_removed_on_resume(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2)
    (tmp_path / "checkpoints/.step_000003.tmp").mkdir()
    checkpoints = Checkpoints(tmp_path, keep=3)
    checkpoints.discard_after(1)
    assert sorted(p.name for p in Path(tmp_path / "checkpoints").iterdir()) == ["step_000001"]


def test_a_checkpoint_written_behind_the_run_holds_what_was_and_counts_when_complete(tmp_path):
    gate = threading.Event()
    backend = Copying(seed=1, gate=gate)
    state = {"value": 1, "inner": {"list": [1]}}
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        checkpoints.save(1, backend, state, accuracy=None, selected_on="")
        # What the run does next changes nothing of it.
        kept, backend.table = backend.table, backend.table + 1.0
        state["inner"]["list"].append(2)
        checkpoints.check()
        with pytest.raises(ResumeError, match="no intact checkpoint"):
            Checkpoints(tmp_path, keep=3).newest()
        assert not (tmp_path / "trainer_state.json").exists()
        gate.set()
    assert backend.writers[0] is not threading.current_thread()
    path, stored = Checkpoints(tmp_path, keep=3).newest()
    assert stored["inner"] == {"list": [1]}
    backend.restore(path)
    assert (backend.table == kept).all()
    assert json.loads((tmp_path / "trainer_state.json").read_text())["step"] == 1


def test_one_checkpoint_is_in_flight_at_most(tmp_path):
    gate = threading.Event()
    backend = Copying(gate=gate)
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        checkpoints.save(1, backend, {}, accuracy=None, selected_on="")
        second = threading.Thread(
            target=checkpoints.save, args=(2, backend, {}), kwargs={"accuracy": None, "selected_on": ""}
        )
        second.start()
        second.join(0.2)
        assert second.is_alive()
        assert len(backend.writers) <= 1
        gate.set()
        second.join(30)
        assert not second.is_alive()
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step_000001", "step_000002"]


@pytest.mark.parametrize("asked", ["check", "wait", "save", "end"])
def test_a_checkpoint_that_cannot_be_written_is_an_error_wherever_one_asks(tmp_path, asked):
    backend = Copying(broken="no room")
    checkpoints = Checkpoints(tmp_path, keep=3)
    checkpoints.save(1, backend, {}, accuracy=None, selected_on="")

    def end():
        with checkpoints:
            pass

    def save_another():
        checkpoints.save(2, backend, {}, accuracy=None, selected_on="")

    checkpoints._writing.exception(30)
    with pytest.raises(OSError, match="no room"):
        {"check": checkpoints.check, "wait": checkpoints.wait, "save": save_another, "end": end}[asked]()
    checkpoints.wait()  # said once


def test_the_first_error_is_the_one_that_is_raised(tmp_path, caplog):
    checkpoints = Checkpoints(tmp_path, keep=3)

    def run():
        with checkpoints:
            checkpoints.save(1, Copying(broken="no room"), {}, accuracy=None, selected_on="")
            raise ValueError("the step broke")

    with pytest.raises(ValueError, match="the step broke"):
        run()
    assert "no room" in caplog.text


INTERRUPTED = """
import os, signal, sys, threading, time
from pathlib import Path
from retrain.training.checkpoint import Checkpoints

gate, kept = threading.Event(), threading.Event()

class Slow:
    def snapshot(self):
        def write(directory):
            assert gate.wait(30)
            (directory / "x").write_text("a")
        return write

def interrupt():
    time.sleep(0.3)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.3)
    gate.set()

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have had it ignored
run = Path(sys.argv[1])
try:
    with Checkpoints(run, keep=1) as checkpoints:
        checkpoints.save(1, Slow(), {}, accuracy=None, selected_on="")
        threading.Thread(target=interrupt).start()
        checkpoints.wait()
except KeyboardInterrupt:
    print("interrupted, written:", (run / "trainer_state.json").exists())
"""


def test_ctrl_c_while_waiting_leaves_the_writer_to_its_end(tmp_path):
    script = tmp_path / "interrupted.py"
    script.write_text(INTERRUPTED)
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "run")],
        check=False, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "interrupted, written: True\n"), done.stderr


def test_what_kept_a_checkpoint_from_completion_is_logged_where_another_error_counts(tmp_path, caplog):
    checkpoints = Checkpoints(tmp_path, keep=3)
    checkpoints.save(1, Copying(broken="no room"), {}, accuracy=None, selected_on="")
    checkpoints.settle()
    assert "no room" in caplog.text
    checkpoints.save(2, Copying(), {}, accuracy=None, selected_on="")
    checkpoints.wait()
    assert checkpoints.newest()[0].name == "step_000002"
