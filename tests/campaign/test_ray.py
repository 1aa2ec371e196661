"""Campaigns on Ray: a cluster of two nodes of which one dies, a cluster of this machine alone, and what can be wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from retrain.campaign import ray_launcher
from retrain.errors import ConfigError

pytest.importorskip("ray")

sys.path.insert(0, str(Path(__file__).with_name("light")))

import campaigns


@pytest.mark.slow
def test_a_cluster_of_two_nodes_runs_a_campaign_and_finishes_one_of_which_a_node_dies(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder, steps, step_s in ((whole, 2, 0.0), (broken, 25, 0.3)):
        folder.mkdir()
        campaigns.write(folder, seeds=(1,), steps=steps, step_s=step_s, more='launcher = "ray"')
    script = Path(__file__).with_name("light") / "two_nodes.py"
    with tempfile.TemporaryDirectory(prefix="rr-", dir="/tmp") as short:
        done = subprocess.run(
            [sys.executable, str(script), str(whole), str(broken)],
            env={**os.environ, "RAY_TMPDIR": short}, capture_output=True, text=True, timeout=400, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = map(json.loads, [line for line in done.stdout.splitlines() if line.startswith("{")])
    names = ["grpo+none_s1", "maxrl+none_s1"]
    assert (first["code"], first["states"]) == (0, dict.fromkeys(names, "done")), first["said"]
    assert [row["code"] for row in first["processes"]] == [0, 0]
    assert all(row["host"] and row["cpu_s"] > 0.1 for row in first["processes"])
    assert (second["code"], second["states"]) == (0, dict.fromkeys(names, "done")), second["said"]
    assert second["steps"] == {name: list(range(25)) for name in names}
    assert second["said"].count("it goes on elsewhere from its newest checkpoint, start 2 of at most 3") == 1
    assert first["left"] == second["left"] == []


@pytest.mark.slow
def test_a_cluster_of_this_machine_is_reached_by_no_other_and_ends_with_the_campaign(tmp_path):
    campaigns.write(tmp_path, seeds=(1,), steps=60, step_s=0.3, more='launcher = "ray"')
    short = Path(tempfile.mkdtemp(prefix="rr-", dir="/tmp"))
    process = campaigns.begin(tmp_path, "campaign.toml", RAY_ADDRESS="", TMPDIR=str(short))
    campaigns.wait_for(lambda: list((tmp_path / "logs").glob("campaign_*/runs/*/metrics.jsonl")))
    directory = campaigns.campaign(tmp_path)
    campaigns.wait_for(lambda: all(campaigns.steps(directory, name) for name in campaigns.states(directory)))
    ours = descendants(process.pid)
    assert any("raylet" in words for words in ours.values())
    assert reachable(set(ours)) == []
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert set(campaigns.states(directory).values()) == {"interrupted"}
    campaigns.wait_for(lambda: not [pid for pid in ours if Path(f"/proc/{pid}").exists()], 20)
    assert not list(directory.glob(".seen*"))
    # Nothing is left: this fails where the folder holds anything.
    short.rmdir()


def descendants(pid: int) -> dict[int, str]:
    """Command lines of a process and all below it."""
    parents, words = {}, {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words[int(path.name)] = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            parents[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found, new = {pid}, {pid}
    while new:
        new = {child for child, parent in parents.items() if parent in new}
        found |= new
    return {each: words[each] for each in found if each in words}


def reachable(pids: set[int]) -> list[str]:
    """Addresses other than the loopback ones at which any of the processes listens."""
    sockets = set()
    for pid in pids:
        for path in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                sockets.add(os.readlink(path))
            except OSError:
                continue
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            parts = line.split()
            # 0A: listening.
            if parts[3] == "0A" and f"socket:[{parts[9]}]" in sockets:
                found.append(parts[1].partition(":")[0])
    return [a for a in found if a not in ("0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000")]


def test_a_node_that_does_not_see_the_directory_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(ray_launcher.time, "sleep", lambda seconds: None)
    with ray_launcher._marker(tmp_path) as (path, word):
        assert ray_launcher._is_seen((path, word))
        assert not ray_launcher._is_seen((path, "another"))
        assert not ray_launcher._is_seen((str(tmp_path / "elsewhere"), word))
    assert list(tmp_path.iterdir()) == []


class FakeRay:
    """What the launcher asks of Ray, and answers that a test prepares: a value or an error per start."""

    class exceptions:
        class RayError(Exception):
            pass

        class TaskCancelledError(RayError):
            pass

        class RayTaskError(RayError):
            cause = None

        class WorkerCrashedError(RayError):
            pass

    def __init__(self, *answers, cpus=2.0):
        self.answers, self.cpus, self.asked = list(answers), cpus, []

    def remote(self, function):
        ray = self

        class Remote:
            def options(self, **settings):
                ray.settings = settings
                return self

            def remote(self, job, *rest):
                ray.asked.append(job.name)
                return len(ray.asked) - 1

        return Remote()

    def nodes(self):
        return [{"Alive": True, "Resources": {"CPU": self.cpus}}, {"Alive": False, "Resources": {"CPU": 64.0}}]

    def wait(self, refs, **_):
        return refs, []

    def get(self, ref):
        answer = self.answers[ref]
        if isinstance(answer, Exception):
            raise answer
        return answer

    def cancel(self, ref, **_):
        pass


def collected(tmp_path, fake, names=("a", "b"), **settings):
    jobs = [ray_launcher.Job(n, tmp_path / n, tmp_path / n, tmp_path / f"{n}.txt") for n in names]
    ends = []
    what = ray_launcher.RayTasks(tmp_path, threads=1, **settings)
    tasks = ray_launcher._Tasks(what, fake, ("", ""), lambda job: None, ends.append, patience_s=0.0)
    tasks.waiting.extend((job, 1) for job in jobs)
    for _ in range(20):
        tasks.submit()
        tasks.collect()
    return ends


def test_a_run_whose_worker_is_lost_every_time_is_reported_and_the_rest_finish(tmp_path):
    lost, well = FakeRay.exceptions.WorkerCrashedError("the worker died."), ray_launcher._Told("n", 0, 1.0)
    fake = FakeRay(lost, well, lost, lost)
    ends = collected(tmp_path, fake)
    assert fake.asked == ["a", "b", "a", "a"]
    assert [(e.job.name, e.code) for e in ends] == [("b", 0), ("a", 1)]
    assert ends[1].why == "its node or worker was lost 3 times: the worker died"
    assert fake.settings["num_gpus"] == 0


def test_what_no_node_can_take_and_what_its_task_raises_is_reported(tmp_path):
    ends = collected(tmp_path, FakeRay(), gpus=1)
    assert [(e.code, e.why) for e in ends] == [(1, "no node of the Ray cluster has 1 CPUs and 1 GPUs")] * 2
    wrong = FakeRay.exceptions.RayTaskError("No module named 'retrain'")
    ends = collected(tmp_path, FakeRay(wrong, wrong))
    assert {e.why for e in ends} == {"its task failed: No module named 'retrain'"}
    with pytest.raises(ConfigError, match=r"node far of the Ray cluster does not see .*all nodes share"):
        collected(tmp_path, FakeRay(ray_launcher._Told("far", None)), names=("a",))


def test_ray_that_is_missing_or_does_not_answer_is_said_in_a_line(monkeypatch):
    before = signal.getsignal(signal.SIGTERM), dict(os.environ)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"retrain\[ray\]"), ray_launcher._cluster("", 1, 0):
        pass
    assert (signal.getsignal(signal.SIGTERM), dict(os.environ)) == before


def test_an_address_without_a_cluster_is_a_mistake_of_the_configuration(tmp_path):
    campaigns.write(tmp_path, more='launcher = "ray"')
    code, said = campaigns.run(tmp_path, "campaign.toml", "--ray-address", "127.0.0.1:1")
    assert code == 2, said
    assert "no Ray cluster answers at 127.0.0.1:1" in said
    assert "Traceback" not in said
