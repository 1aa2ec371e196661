"""The heartbeat: what it says of phases and progress, that it never ends a run, and what a reader concludes."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from retrain.fakes import FakeRenderer, FakeSink
from retrain.tracking import heartbeat, layout, read
from retrain.tracking.heartbeat import Pulse
from retrain.tracking.read import RunRecord
from retrain.tracking.run_log import RunLog


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    return now


def test_progress_is_the_engines_and_never_an_earlier_calls(tmp_path, clock):
    engine = SimpleNamespace(asked=32, finished=32, timings={"decode_tokens": 500.0})
    counters = SimpleNamespace(step=3, tokens=12345)
    pulse = Pulse(tmp_path / "beat.json", memory=lambda: {"device": 5})
    pulse.follow(engine, counters)
    pulse.phase("sampling", of=48)
    first = pulse.look()
    assert (first["done"], first["asked"], first["drawn"]) == (0, 48, 0)
    assert (first["step"], first["tokens"], first["memory"]["device"]) == (3, 12345, 5)
    engine.asked, engine.finished, engine.timings["decode_tokens"] = 48, 7, 900.0
    seen = pulse.look()
    assert (seen["done"], seen["asked"], seen["drawn"]) == (7, 48, 400)
    pulse.phase("learning")
    later = pulse.look()
    assert (later["phase"], later["done"], later["asked"], later["drawn"]) == ("learning", None, None, None)


def test_an_engine_without_counts_is_fine(tmp_path, clock):
    pulse = Pulse(tmp_path / "beat.json", memory=dict)
    pulse.follow(object(), object())
    pulse.phase("sampling", of=8)
    assert pulse.look()["done"] is None


def test_moved_and_usual(tmp_path, clock):
    engine = SimpleNamespace(asked=0, finished=0, timings={"decode_tokens": 0.0})
    pulse = Pulse(tmp_path / "beat.json", memory=dict)
    pulse.follow(engine, None)
    for duration in (5.0, 9.0, 7.0):
        pulse.phase("sampling", of=8)
        clock[0] += duration
        pulse.phase("learning")
        clock[0] += 1
    pulse.phase("sampling", of=8)
    start = clock[0]
    assert pulse.look()["usual_s"] == 9.0
    clock[0] += 30
    assert pulse.look()["moved"] == start
    engine.timings["decode_tokens"] = 10.0
    assert pulse.look()["moved"] == clock[0]


def test_a_beat_that_fails_ends_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(heartbeat, "EVERY_S", 0.01)

    def broken():
        raise RuntimeError("no device")

    pulse = Pulse(tmp_path / "gone" / "beat.json", memory=broken)
    pulse.start({"pid": 1})
    time.sleep(0.1)
    assert pulse._thread.is_alive()
    pulse.stop()
    assert not pulse._thread.is_alive()
    assert not (tmp_path / "gone").exists()


def test_readers_never_see_half_a_beat(tmp_path, monkeypatch):
    monkeypatch.setattr(heartbeat, "EVERY_S", 0.0005)
    path = tmp_path / "beat.json"
    pulse = Pulse(path, memory=lambda: {"filler": "x" * 20000})
    pulse.start({"pid": 1})
    end, seen = time.monotonic() + 1.0, set()
    while time.monotonic() < end:
        seen.add(json.loads(path.read_text())["time"])
    pulse.stop()
    assert len(seen) > 10
    assert [p.name for p in tmp_path.iterdir()] == ["beat.json"]


def test_a_run_log_beats_raises_alarms_once_and_recalls_them(tmp_path, caplog):
    class Sink(FakeSink):
        alarms: list
        look = None

        def follow(self, look):
            self.look = look

        def alarm(self, alarm):
            self.alarms.append(alarm)

        def device_memory(self):
            return {"device": 77}

    def opened():
        sink = Sink()
        sink.alarms = []
        return RunLog(tmp_path, FakeRenderer(), [sink], generations=0, store=None), sink

    def beat():
        return json.loads((tmp_path / layout.HEARTBEAT).read_text())

    log, sink = opened()
    log.begin({"max_steps": 9})
    assert beat()["memory"]["device"] == 77
    assert (beat()["phase"], beat()["host"], beat()["pid"]) == ("starting", platform.node(), os.getpid())
    metrics = {"batch_size": 8, "group_size": 16, "max_token_hit_rate": 0.9, "mean_reward": 0.5}
    for step in range(8):
        log.step(step, metrics, [])
    log.evaluation(8, {"eval/accuracy": 0.5, "eval/source": "x"})
    assert sink.look()["ill"] == ["truncated_share"]
    state = log.state_dict()
    log.status("interrupted", step=8)
    log.close()
    assert [alarm.step for alarm in sink.alarms] == [4]
    assert [r.getMessage() for r in caplog.records if "alarm: " in r.getMessage()] == [
        f"alarm: {sink.alarms[0].line}"
    ]
    assert (beat()["alarms"], beat()["alarm"]["step"], beat()["evaluation"]["accuracy"]) == (1, 4, 0.5)

    log, sink = opened()
    log.load_state_dict(state)
    log.begin({"max_steps": 9})
    log.step(8, metrics, [])
    log.status("done", step=9)
    log.close()
    assert sink.alarms == []
    assert (beat()["alarms"], beat()["alarm"]["step"], beat()["evaluation"]["accuracy"]) == (1, 4, 0.5)


def state_of(folder):
    return RunRecord(folder).state


@pytest.mark.parametrize(
    ("still", "usual", "state"),
    [
        (100, 1.0, "running"), (130, 1.0, "hung"), (390, 100.0, "running"), (410, 100.0, "hung"),
        (1700, None, "running"), (1900, None, "hung"),
    ],
)  # fmt: skip
def test_hung_is_much_longer_than_usual(tmp_path, clock, still, usual, state):
    facts = {
        "status": "running",
        "pid": os.getpid(),
        "started": 5.0,
        "host": platform.node(),
        "heartbeat": 10.0,
    }
    beat = {
        "pid": os.getpid(),
        "started": 5.0,
        "time": 999.0 + 9e5,
        "moved": 999.0 + 9e5 - still,
        "usual_s": usual,
    }
    clock[0] = 1000.0 + 9e5
    (tmp_path / layout.RUN).write_text(json.dumps(facts))
    (tmp_path / layout.HEARTBEAT).write_text(json.dumps(beat))
    with (tmp_path / layout.LOCK).open("a") as lock:
        assert state_of(tmp_path) == "dead"
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert state_of(tmp_path) == state
        clock[0] += read.SILENT_S
        assert state_of(tmp_path) == "silent"


def test_why_a_run_is_silent(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])

    def why(pid, host=None):
        facts = {"status": "running", "pid": pid, "host": host or platform.node()}
        (tmp_path / layout.RUN).write_text(json.dumps(facts))
        return RunRecord(tmp_path).why_silent

    try:
        assert "does not answer" in why(child.pid)
        child.send_signal(19)
        time.sleep(0.2)
        assert why(child.pid) == f"process {child.pid} is stopped: kill -CONT {child.pid} lets it go on"
        assert why(child.pid, "there") == "it ran on there"
    finally:
        child.kill()
        child.wait()
    assert "is gone" in why(child.pid)
