"""The live table of a campaign: what it shows, that it fits, what it costs, and the terminal it leaves behind."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import runpy
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
from rich.console import Console

from retrain.campaign import table
from retrain.campaign.launchers import Ended, Job
from retrain.campaign.outcomes import run_name
from retrain.tracking import layout

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE / "light")]

import campaigns  # noqa: E402
from made_campaigns import FIVE, SEEDS, declared, write_campaign  # noqa: E402

Terminal = runpy.run_path(str(HERE.parent / "real" / "test_live.py"))["Terminal"]


def made(directory, *, seeds=SEEDS, states=None, width=80, height=24, conditions=FIVE):
    """A table of a campaign of 40 steps; runs in ``states`` go on or wait, all others are done."""
    write_campaign(directory, declared(conditions=conditions, seeds=seeds), states=states or {})
    names = {(c, s): run_name(c, s) for s in seeds for c in conditions}
    config = SimpleNamespace(training=SimpleNamespace(max_steps=40))
    runs = [SimpleNamespace(name=name, condition=c, seed=s, config=config) for (c, s), name in names.items()]
    done = [name for key, name in names.items() if key not in (states or {})]
    console = Console(file=io.StringIO(), width=width, height=height, force_terminal=True)
    shown = table.Table(console, directory / layout.CAMPAIGN_RUNS, runs, done)
    for key, (state, _) in (states or {}).items():
        if state == "running":
            shown.begun(job(directory, names[key]))
    shown._frame()
    return shown


def job(directory, name):
    return Job(name, directory / f"{name}.toml", directory / layout.CAMPAIGN_RUNS / name, directory / f"output/{name}.txt")


def test_every_run_has_a_cell_and_every_run_that_goes_on_a_line(tmp_path):
    states = {(FIVE[0], 707): ("running", 12), (FIVE[1], 707): ("running", 8), (FIVE[2], 707): ("waiting", 0)}
    shown = made(tmp_path / "c", states=states)
    lines = shown.lines(79)
    assert lines[0].startswith("37/40 runs done, 2 running, 1 waiting")
    assert re.search(r" 9\d%, .* left$", lines[0]), lines[0]
    assert lines[1].split() == ["seed", *map(str, SEEDS)]
    grid = {line.split()[0]: line.split()[1:] for line in lines[2:7]}
    assert list(grid) == list(FIVE)
    assert all(re.fullmatch(r"\d+\.\d%", cell) for cell in grid[FIVE[4]])
    assert grid[FIVE[0]][-1] == ">12"
    assert grid[FIVE[2]][-1] in (".", "·")
    going = next(line for line in lines if line.startswith(f"{FIVE[0]}_s707"))
    assert "12/40" in going
    assert "held-out" in going
    assert "left" in going
    assert max(map(len, lines)) <= 79


def test_failures_stay_in_sight_and_what_ends_well_is_counted(tmp_path):
    states = {(FIVE[0], 707): ("running", 12), (FIVE[1], 707): ("running", 8)}
    shown = made(tmp_path / "c", states=states)
    shown.ended(Ended(job(tmp_path / "c", f"{FIVE[0]}_s707"), -9, 3.0))
    shown.ended(Ended(job(tmp_path / "c", f"{FIVE[1]}_s707"), 0, 3.0))
    lines = shown.lines(79)
    assert lines[0].startswith("39/40 runs done, 1 failed")
    assert lines[-1] == f"failed: {FIVE[0]}_s707: killed by SIGKILL, as when memory runs out"
    assert next(line for line in lines if line.startswith(FIVE[0])).split()[-1] == "failed"


def test_what_was_asked_to_stop_is_no_failure_and_is_said_once(tmp_path, caplog):
    states = {(FIVE[0], 707): ("running", 12), (FIVE[1], 707): ("running", 8)}
    shown = made(tmp_path / "c", states=states)
    with caplog.at_level("INFO", logger="retrain"):
        for condition in FIVE[:2]:
            shown.ended(Ended(job(tmp_path / "c", f"{condition}_s707"), 130, 3.0))
        shown.close()
        shown.close()
    assert [(r.levelname, r.getMessage()) for r in caplog.records if r.levelname != "DEBUG"] == [
        ("INFO", f"Interrupted, and saved: {FIVE[0]}_s707, {FIVE[1]}_s707.")
    ]
    lines = shown.lines(79)
    assert next(line for line in lines if line.startswith(FIVE[0])).split()[-1] == "saved"
    assert "(saved: stopped, goes on with --resume; % outcome)" in lines


def test_signs_in_cells_are_explained_where_there_is_room(tmp_path):
    states = {(FIVE[0], 707): ("running", 12), (FIVE[2], 707): ("waiting", 0)}
    legend = re.compile(r"\(>12 running, at that step; [.·] waiting; % outcome\)")
    assert sum(bool(legend.fullmatch(line)) for line in made(tmp_path / "c", states=states).lines(79)) == 1
    small = made(tmp_path / "d", states=states, height=9).lines(79)
    assert not any(map(legend.search, small))
    assert any("12/40" in line for line in small)


@pytest.mark.parametrize("height", [4, 8, 12, 24])
def test_five_conditions_of_64_seeds_fit_the_terminal(tmp_path, height):
    seeds = tuple(range(64))
    states = {(c, s): ("running", s % 40) for c in FIVE for s in (60, 61, 62, 63)}
    shown = made(tmp_path / "c", seeds=seeds, states=states, height=height)
    shown.ended(Ended(job(tmp_path / "c", f"{FIVE[0]}_s60"), 1, 3.0, note="x" * 300))
    lines = shown.lines(79)
    assert len(lines) <= height - 1 or height == 4
    assert max(map(len, lines)) <= 79
    assert lines[0].startswith("300/320 runs done, 19 running, 1 failed")
    if height == 24:
        assert re.search(rf"(?m)^{re.escape(FIVE[0])} +60/64 +3 +1 +\d+\.\d%$", "\n".join(lines))
        assert any(line.startswith("and ") and line.endswith(" more running") for line in lines)
    if height > 4:
        assert any("/40" in line for line in lines)


def test_a_frame_reads_the_runs_that_go_on_and_no_other(tmp_path, monkeypatch):
    states = {(FIVE[0], s): ("running", 12) for s in (60, 61)}
    shown = made(tmp_path / "c", seeds=tuple(range(64)), states=states)
    read = []
    summarize = table.summarize
    monkeypatch.setattr(table, "summarize", lambda run: read.append(run.path.name) or summarize(run))
    began = time.process_time()
    for _ in range(20):
        shown._frame()
    # A frame every 1.5 s: below a hundredth of a core.
    assert (time.process_time() - began) / 20 < 0.1
    assert sorted(set(read)) == [f"{FIVE[0]}_s60", f"{FIVE[0]}_s61"]
    assert len(read) == 40


@pytest.mark.slow
def test_on_a_terminal_the_table_stays_below_the_lines_and_leaves_nothing_behind(tmp_path):
    campaigns.write(tmp_path, seeds=(1, 2), steps=6, step_s=0.4, more='launcher = "processes"\nmax_workers = 2')
    (tmp_path / "signs/maxrl+none_s1").write_text("raise 2")
    screen, code, height = on_terminal(tmp_path)
    assert code == 1
    assert re.search(r"seed +1 +2", height["seen"]), height["seen"]
    assert re.search(r"grpo\+none_s1  \d/6", height["seen"])
    shown = screen.shown
    assert shown.count("did not finish") == 1
    assert len(re.findall(r"(?m)^\[\d/4\] ", shown)) == 3
    assert not re.search(r"seed +1 +2|runs done, ", shown), shown
    assert "\x1b[?25l" not in screen.raw
    assert "1 of 4 runs are not done" in shown


def test_in_a_pipe_there_are_lines_alone(tmp_path):
    campaigns.write(tmp_path, seeds=(1,), steps=2)
    code, said = campaigns.run(tmp_path, "campaign.toml")
    assert code == 0
    assert "\x1b" not in said
    assert [line for line in said.splitlines() if line.startswith(("Started", "["))][0::2] == [
        "Started grpo+none_s1.",
        "Started maxrl+none_s1.",
    ]
    assert len(re.findall(r"(?m)^\[[12]/2\] \S+: \d+\.\d% in ", said)) == 2


def on_terminal(folder):
    """The screen and the exit status of a campaign in a terminal of 80 x 24, and what was on it before its last line."""
    master, slave = pty.openpty()
    fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    before = termios.tcgetattr(slave)
    dropped = ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES", "CI")
    settings = {"TERM": "xterm-256color", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    child = subprocess.Popen(
        [sys.executable, str(campaigns.LIGHT), "campaign.toml"], cwd=folder, stdin=slave, stdout=slave, stderr=slave,
        env={**{k: v for k, v in os.environ.items() if k not in dropped}, **settings}, start_new_session=True,
    )  # fmt: skip
    screen, seen, data = Terminal(), [], b""
    end = time.monotonic() + 120
    try:
        while time.monotonic() < end:
            if select.select([master], [], [], 0.1)[0]:
                data += os.read(master, 65536)
                try:
                    screen.feed(data.decode())
                except UnicodeDecodeError:
                    continue
                data = b""
                seen.append(screen.shown)
            elif child.poll() is not None:
                break
        code = child.wait(timeout=10)
        assert termios.tcgetattr(slave) == before
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        os.close(slave)
        os.close(master)
    return screen, code, {"seen": "\n".join(seen)}
