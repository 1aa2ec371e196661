"""Campaigns as processes: what befalls a run or the campaign stops nothing else, and rerunning finishes what is missing."""

from __future__ import annotations

import json
import logging
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from retrain.campaign import child, launchers, run
from retrain.campaign.launchers import Ended, Job, Processes
from retrain.errors import RunError

sys.path.insert(0, str(Path(__file__).with_name("light")))

import campaigns

FOUR = ["grpo+none_s1", "grpo+none_s2", "maxrl+none_s1", "maxrl+none_s2"]
TWO_AT_ONCE = 'launcher = "processes"\nmax_workers = 2'


@pytest.mark.slow
def test_every_run_has_a_process_and_a_rerun_of_what_is_done_starts_none(tmp_path):
    campaigns.write(tmp_path, more=TWO_AT_ONCE)
    code, said = campaigns.run(tmp_path, "campaign.toml")
    assert code == 0, said
    directory = campaigns.campaign(tmp_path)
    assert campaigns.states(directory) == dict.fromkeys(FOUR, "done")
    used = campaigns.rows(directory / "processes.jsonl")
    assert sorted(row["name"] for row in used) == FOUR
    assert all(row["code"] == 0 and row["cpu_s"] > 0.1 and row["peak_bytes"] > 1 << 20 for row in used)
    assert len({json.loads((directory / "runs" / name / "run.json").read_text())["pid"] for name in FOUR}) == 4
    events = (directory / "events.log").read_text()
    assert all(f"Started {name}" in events and f"] {name}:" in events for name in FOUR)
    before = {p: p.read_bytes() for p in (directory / "runs").rglob("*") if p.is_file()}
    code, said = campaigns.run(tmp_path, "--resume", str(directory))
    assert (code, "4 of 4 runs are done already" in said) == (0, True)
    assert campaigns.rows(directory / "processes.jsonl") == used
    assert {p: p.read_bytes() for p in (directory / "runs").rglob("*") if p.is_file()} == before


def test_flags_change_the_campaign_as_its_file_would(tmp_path):
    campaigns.write(tmp_path, more=TWO_AT_ONCE)
    code, said = campaigns.run(
        tmp_path, "campaign.toml", "--max-steps", "2", "--seeds", "7", "--launcher", "serial", "--max-workers", "0",
        "--lr", "0.5",
    )  # fmt: skip
    assert code == 0, said
    directory = campaigns.campaign(tmp_path)
    declared = json.loads((directory / "manifest.json").read_text())["declared"]
    assert (declared["seeds"], declared["max_steps"]) == ([7], 2)
    assert {name: campaigns.steps(directory, name) for name in campaigns.states(directory)} == {
        "grpo+none_s7": [0, 1],
        "maxrl+none_s7": [0, 1],
    }
    rows = campaigns.rows(directory / "runs/maxrl+none_s7/metrics.jsonl")
    assert {row["lr"] for row in rows} == {0.5}
    ends = [row["time"] - row["seconds"] for row in campaigns.rows(directory / "processes.jsonl")]
    # One after the other: the second began when the first had ended.
    assert ends[1] >= campaigns.rows(directory / "processes.jsonl")[0]["time"] - 0.2


@pytest.mark.slow
def test_a_run_that_is_killed_breaks_or_is_refused_stops_no_other_and_is_told_with_its_last_words(tmp_path):
    campaigns.write(tmp_path, seeds=(1, 2, 3), more=TWO_AT_ONCE)
    signs = tmp_path / "signs"
    (signs / "grpo+none_s1").write_text("kill 1")
    (signs / "maxrl+none_s1").write_text("raise 1")
    (signs / "grpo+none_s2").write_text("refuse 0")
    code, said = campaigns.run(tmp_path, "campaign.toml")
    assert code == 1, said
    directory = campaigns.campaign(tmp_path)
    assert {campaigns.states(directory)[name] for name in ("maxrl+none_s2", "grpo+none_s3", "maxrl+none_s3")} == {"done"}
    ends = {row["name"]: row for row in campaigns.rows(directory / "processes.jsonl")}
    assert ends["grpo+none_s1"]["code"] == -signal.SIGKILL
    assert "killed by SIGKILL, as when memory runs out; the last it said: about to be killed" in said
    assert ends["maxrl+none_s1"]["code"] == 1
    assert "this run always breaks here" in ends["maxrl+none_s1"]["why"]
    assert ends["grpo+none_s2"]["code"] == 2
    assert "light: this run is refused" in said
    assert "3 of 6 runs are not done" in said
    for name in ("grpo+none_s1", "grpo+none_s2"):
        (signs / name).unlink()
    done = {p: p.read_bytes() for p in (directory / "runs/maxrl+none_s3").rglob("*") if p.is_file()}
    code, said = campaigns.run(tmp_path, "--resume", str(directory))
    assert code == 1
    states = campaigns.states(directory)
    assert states.pop("maxrl+none_s1") == "failed"
    assert list(states.values()) == ["done"] * 5
    assert campaigns.steps(directory, "grpo+none_s1") == [0, 1, 2]
    assert done == {p: p.read_bytes() for p in (directory / "runs/maxrl+none_s3").rglob("*") if p.is_file()}
    again = [row["name"] for row in campaigns.rows(directory / "processes.jsonl")[6:]]
    assert sorted(again) == ["grpo+none_s1", "grpo+none_s2", "maxrl+none_s1"]


def test_where_the_first_runs_are_all_refused_alike_no_further_one_is_started(tmp_path):
    campaigns.write(tmp_path, seeds=(1, 2, 3), more='launcher = "serial"')
    for path in [tmp_path / "signs" / f"{mode}+none_s{seed}" for mode in ("grpo", "maxrl") for seed in (1, 2, 3)]:
        path.write_text("refuse 0")
    code, said = campaigns.run(tmp_path, "campaign.toml")
    directory = campaigns.campaign(tmp_path)
    assert (code, len(campaigns.rows(directory / "processes.jsonl"))) == (1, 4), said
    assert "the first 4 runs were refused alike, so no further one is started: retrain: light: this run is refused" in said
    assert f"retrain --resume {directory}" in said.replace("\n", "")


def test_refusals_that_differ_or_come_later_stop_no_campaign():
    for reasons, jobs in ((["a", "a", "b", "a"], 9), (["", "a", "a", "a"], 9), (["a"] * 4, 4), (["a"] * 5, 9)):
        run._check_alike(Path("c"), reasons, jobs)
    with pytest.raises(RunError, match="no further one is started: a"):
        run._check_alike(Path("c"), ["a"] * 4, 5)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_signal_saves_every_run_and_a_resume_counts_no_step_twice(tmp_path, number):
    campaigns.write(tmp_path, seeds=(1,), steps=40, step_s=0.1, more=TWO_AT_ONCE)
    process = campaigns.begin(tmp_path, "campaign.toml")
    campaigns.wait_for(lambda: list((tmp_path / "logs").glob("campaign_*")))
    directory = campaigns.campaign(tmp_path)
    names = ["grpo+none_s1", "maxrl+none_s1"]
    campaigns.wait_for(lambda: all(len(campaigns.steps(directory, name)) > 1 for name in names))
    process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "Finishing this step and saving" in said
    assert campaigns.states(directory) == dict.fromkeys(names, "interrupted")
    assert campaigns.alive(directory) == []
    reached = {name: len(campaigns.steps(directory, name)) for name in names}
    assert all(1 < n < 40 for n in reached.values())
    code, said = campaigns.run(tmp_path, "--resume", str(directory))
    assert code == 0, said
    assert all(campaigns.steps(directory, name) == list(range(40)) for name in names)
    for name in names:
        draws = [t["draw"] for row in campaigns.rows(directory / "runs" / name / "emergence/steps.jsonl") for t in row["tasks"]]
        assert draws == list(range(80))


def test_a_second_ctrl_c_ends_everything_at_once(tmp_path):
    campaigns.write(tmp_path, seeds=(1,), steps=3, step_s=60, more=TWO_AT_ONCE)
    process = campaigns.begin(tmp_path, "campaign.toml")
    campaigns.wait_for(lambda: list((tmp_path / "logs").glob("campaign_*/runs/*/run.json")))
    directory = campaigns.campaign(tmp_path)
    campaigns.wait_for(lambda: len(campaigns.alive(directory)) == 2)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=30)
    assert (process.returncode, time.monotonic() - began < 10) == (130, True), said
    campaigns.wait_for(lambda: not campaigns.alive(directory), 10)


@pytest.mark.slow
def test_runs_outlive_a_killed_campaign_only_to_save_and_the_next_one_waits_for_them(tmp_path):
    campaigns.write(tmp_path, seeds=(1,), steps=6, step_s=1.0, more=TWO_AT_ONCE)
    process = campaigns.begin(tmp_path, "campaign.toml")
    names = ["grpo+none_s1", "maxrl+none_s1"]
    campaigns.wait_for(lambda: list((tmp_path / "logs").glob("campaign_*")))
    directory = campaigns.campaign(tmp_path)
    campaigns.wait_for(lambda: all(campaigns.steps(directory, name) for name in names))
    process.kill()
    process.communicate(timeout=60)
    assert len(campaigns.alive(directory)) == 2
    code, said = campaigns.run(tmp_path, "--resume", str(directory))
    assert code == 0, said
    assert all(campaigns.steps(directory, name) == list(range(6)) for name in names)
    pids = [json.loads((directory / "runs" / name / "run.json").read_text())["pid"] for name in names]
    assert len(set(pids)) == 2
    for name in names:
        draws = [t["draw"] for row in campaigns.rows(directory / "runs" / name / "emergence/steps.jsonl") for t in row["tasks"]]
        assert draws == list(range(12))


def test_a_second_process_may_not_run_the_same_campaign(tmp_path):
    campaigns.write(tmp_path, seeds=(1,), steps=30, step_s=0.3, more=TWO_AT_ONCE)
    process = campaigns.begin(tmp_path, "campaign.toml")
    campaigns.wait_for(lambda: list((tmp_path / "logs").glob("campaign_*/runs/*/run.json")))
    directory = campaigns.campaign(tmp_path)
    code, said = campaigns.run(tmp_path, "--resume", str(directory))
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert (code, "another process is running the campaign" in said) == (2, True)
    assert len(campaigns.rows(directory / "processes.jsonl")) == 2


@pytest.mark.slow
def test_a_directory_that_was_deleted_is_run_again_and_half_a_line_costs_no_record(tmp_path):
    campaigns.write(tmp_path, seeds=(1,))
    assert campaigns.run(tmp_path, "campaign.toml")[0] == 0
    directory = campaigns.campaign(tmp_path)
    table = (directory / "runs/grpo+none_s1/adapter/table.json").read_bytes()
    shutil.rmtree(directory / "runs/grpo+none_s1")
    with (directory / "processes.jsonl").open("a") as file:
        file.write('{"name": "maxrl+no')
    code, said = campaigns.run(tmp_path, "--resume", str(directory))
    assert (code, "1 of 2 runs are done already" in said) == (0, True), said
    assert (directory / "runs/grpo+none_s1/adapter/table.json").read_bytes() == table
    lines = (directory / "processes.jsonl").read_text().splitlines()
    assert lines[2] == '{"name": "maxrl+no'
    assert json.loads(lines[3])["name"] == "grpo+none_s1"


def test_a_full_disk_starts_no_further_run_and_says_so(tmp_path, monkeypatch):
    class Silent:
        def ended(self, ended):
            self.last = ended

    shown, job = Silent(), Job("a_s1", tmp_path / "a.toml", tmp_path / "a", tmp_path / "a.txt")
    run._note(tmp_path, Ended(job, 1, 1.0, note="No space left on device"), shown)
    monkeypatch.setattr(run.shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    # A run that ended well, or that was asked to end, is no sign of a full disk.
    run._note(tmp_path, Ended(job, 0, 1.0), shown)
    with pytest.raises(RunError, match="the disk is full, so no further run is started"):
        run._note(tmp_path, Ended(job, 1, 1.0, note="No space left on device"), shown)
    assert [row["code"] for row in campaigns.rows(tmp_path / "processes.jsonl")] == [1, 0, 1]


def scripted(monkeypatch, text):
    monkeypatch.setattr(launchers, "command", lambda job: [sys.executable, "-c", text, str(job.directory)])


def started(tmp_path, names, launcher, stop=None):
    jobs = [Job(name, tmp_path / f"{name}.toml", tmp_path / name, tmp_path / f"{name}.txt") for name in names]
    begun, ends = [], []
    launcher.run(
        jobs, stop=stop or threading.Event(),
        begun=lambda job: begun.append((job.name, time.monotonic())), ended=ends.append, tick=lambda: None,
    )  # fmt: skip
    return begun, ends


def test_devices_threads_and_stagger_of_parallel_runs(tmp_path, monkeypatch):
    scripted(
        monkeypatch, "import os, time; print(os.environ['CUDA_VISIBLE_DEVICES'], os.environ['OMP_NUM_THREADS']); time.sleep(1)"
    )
    launcher = Processes(workers=2, threads=3, devices=["4", "6"], stagger_s=0.4)
    begun, ends = started(tmp_path, ["a", "b", "c"], launcher)
    times = [at for _, at in begun]
    assert [name for name, _ in begun] == ["a", "b", "c"]
    assert times[1] - times[0] >= 0.4
    assert {e.job.name: e.job.output.read_text().split() for e in ends if e.job.name != "c"} == {"a": ["4", "3"], "b": ["6", "3"]}
    # The third takes the place, and so the device, of the first that ended.
    first = ends[0].job.output.read_text()
    assert ends[-1].job.output.read_text() == first


def test_a_process_that_cannot_start_stops_no_other(tmp_path, monkeypatch):
    scripted(monkeypatch, "print('well')")
    (tmp_path / "a.txt").mkdir()
    begun, ends = started(tmp_path, ["a", "b"], Processes(workers=1, threads=1))
    assert [name for name, _ in begun] == ["b"]
    assert [(e.job.name, e.code) for e in ends] == [("a", 1), ("b", 0)]
    assert "could not be started" in ends[0].why


def test_megabytes_of_errors_stop_no_run_and_are_told_in_a_line(tmp_path, monkeypatch):
    scripted(
        monkeypatch,
        "import sys; name = sys.argv[1].rpartition('/')[2]; end = chr(10) if name == 'a' else ''\n"
        "for i in range(4000): sys.stderr.write('x' * 1000 + end)\n"
        "sys.stderr.write(end and 'the last word'); sys.exit(3)",
    )
    _, ends = started(tmp_path, ["a", "b"], Processes(workers=2, threads=1))
    assert {end.job.name: (end.code, end.why) for end in ends} == {"a": (3, "the last word"), "b": (3, "x" * 300)}
    assert all(end.job.output.stat().st_size >= 4_000_000 for end in ends)


def test_a_run_that_is_let_go_before_it_began_writes_nothing(tmp_path):
    stop = threading.Event()
    stop.set()
    assert child.run(tmp_path / "none.toml", tmp_path / "run", stop) == 130
    assert list(tmp_path.iterdir()) == []


def test_the_log_of_a_campaign_keeps_what_ended_it(tmp_path, capsys):
    def broken():
        with run._logging(tmp_path):
            logging.getLogger("retrain").info("began")
            raise RunError("it broke.", fix="mend it.")

    with pytest.raises(RunError):
        broken()
    said = (tmp_path / "events.log").read_text()
    assert "began" in said
    assert "it broke. Fix: mend it." in said
    assert "it broke" not in capsys.readouterr().out
