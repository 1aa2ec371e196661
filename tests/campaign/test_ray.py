"""Campaigns on Ray: a cluster of two nodes of which one dies, a cluster of this machine alone, and what can be wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from retrain.campaign import ray_cluster, ray_launcher
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


def test_what_killed_campaigns_left_goes_and_what_others_hold_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(ray_cluster, "_short_folder", lambda: str(tmp_path))
    left, old = tmp_path / f"{ray_cluster._SESSION}left", tmp_path / ".seen-0123"
    for folder in (left, old):
        folder.mkdir()
    (left / ray_cluster._HELD).touch()
    mine = tmp_path / "mine"
    mine.mkdir()
    (tmp_path / f"{ray_cluster._SESSION}link").symlink_to(mine)
    with ray_cluster._session() as one, ray_cluster._session() as two, ray_launcher._marker(tmp_path) as (seen, _):
        assert {path.name for path in tmp_path.iterdir()} == {
            "mine", f"{ray_cluster._SESSION}link", *(Path(path).name for path in (one, two, seen)),
        }  # fmt: skip
    assert {path.name for path in tmp_path.iterdir()} == {"mine", f"{ray_cluster._SESSION}link"}


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

    def __init__(self, *answers, cpus=2.0, folder=None):
        self.answers, self.cpus, self.asked, self.folder = list(answers), cpus, [], folder
        self.has_room = True

    def remote(self, function):
        ray = self

        class Remote:
            def options(self, **settings):
                ray.settings = settings
                return self

            def remote(self, job, sign, *rest):
                ray.asked.append(job.name)
                if ray.folder is not None and ray.has_room:
                    (ray.folder / sign).write_text("far")
                return len(ray.asked) - 1

        return Remote()

    def nodes(self):
        return [{"Alive": True, "Resources": {"CPU": self.cpus}}, {"Alive": False, "Resources": {"CPU": 64.0}}]

    def wait(self, refs, **_):
        return (refs, []) if self.has_room else ([], refs)

    def get(self, ref):
        answer = self.answers[ref]
        if isinstance(answer, Exception):
            raise answer
        return answer

    def cancel(self, ref, **_):
        pass


def tasks_of(tmp_path, fake, names=("a", "b"), patience_s=0.0, **settings):
    """The tasks of a campaign, and what it is told of them."""
    jobs = [ray_launcher.Job(n, tmp_path / n, tmp_path / n, tmp_path / f"{n}.txt") for n in names]
    begun, ends = [], []
    what = ray_launcher.RayTasks(tmp_path, threads=1, **settings)
    marker = (str(fake.folder or tmp_path), "word")
    tasks = ray_launcher._Tasks(
        what, fake, marker, lambda job: begun.append(job.name), ends.append, patience_s=patience_s
    )
    tasks.waiting.extend((job, 1) for job in jobs)
    return tasks, begun, ends


def collected(tmp_path, fake, names=("a", "b"), **settings):
    tasks, _, ends = tasks_of(tmp_path, fake, names, **settings)
    for _ in range(20):
        tasks.submit()
        tasks.collect()
    return ends


def test_a_run_whose_worker_is_lost_every_time_is_reported_and_the_rest_finish(tmp_path):
    lost, well = FakeRay.exceptions.WorkerCrashedError("the worker died."), ray_launcher._Told("n", 0, 1.0)
    fake = FakeRay(lost, well, lost, lost, folder=tmp_path)
    ends = collected(tmp_path, fake)
    assert fake.asked == ["a", "b", "a", "a"]
    # Every start counts in the cost, as one that did not end by itself.
    assert [(e.job.name, e.code, e.host) for e in ends] == [
        ("a", -9, "far"), ("b", 0, "n"), ("a", -9, "far"), ("a", -9, "far"),
    ]  # fmt: skip
    assert ends[0].why == (
        "its node or worker was lost (the worker died): it goes on elsewhere from its newest checkpoint, start 2 of at most 3"
    )
    assert ends[3].why == "its node or worker was lost 3 times: the worker died"
    assert fake.settings["num_gpus"] == 0


def test_a_worker_that_is_lost_before_its_run_began_is_no_start_of_the_run(tmp_path, caplog):
    lost, well = FakeRay.exceptions.WorkerCrashedError("the worker died."), ray_launcher._Told("n", 0, 1.0)
    ends = collected(tmp_path, FakeRay(lost, well), names=("a",))
    assert [(e.job.name, e.code) for e in ends] == [("a", 0)]
    assert "a: its node or worker was lost (the worker died): it goes on elsewhere" in caplog.text


def test_a_run_has_begun_when_its_node_says_so_and_a_full_queue_is_told_once(tmp_path, caplog):
    caplog.set_level("INFO")
    well = ray_launcher._Told("n", 0, 1.0)
    fake = FakeRay(well, well, folder=tmp_path)
    fake.has_room = False
    tasks, begun, ends = tasks_of(tmp_path, fake, queued_s=0.05)
    tasks.submit()
    tasks.collect()
    assert (fake.asked, begun, caplog.messages) == (["a", "b"], [], [])
    time.sleep(0.06)
    for _ in range(5):
        tasks.submit()
        tasks.collect()
    assert caplog.messages == ["No run has begun: 2 wait in Ray's queue until a node has 1 CPU free."]
    (tmp_path / "b.1").write_text("far")
    tasks.collect()
    tasks.collect()
    assert begun == ["b"]
    # What ended before anything of it was seen has begun all the same.
    fake.has_room = True
    tasks.collect()
    assert (begun, [(e.job.name, e.code) for e in ends]) == (["b", "a"], [("a", 0), ("b", 0)])


def test_what_still_waits_in_the_queue_when_the_campaign_stops_has_not_ended(tmp_path):
    fake = FakeRay(FakeRay.exceptions.TaskCancelledError(), FakeRay.exceptions.TaskCancelledError())
    fake.has_room = False
    tasks, begun, ends = tasks_of(tmp_path, fake)
    tasks.submit()
    tasks.cancel()
    fake.has_room = True
    tasks.collect()
    assert (begun, ends, tasks.running, len(tasks.waiting)) == ([], [], {}, 0)


def test_a_cluster_without_room_is_told_at_once_and_waited_for(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(ray_launcher, "_LOOK_S", 0.0)
    fake = FakeRay(ray_launcher._Told("n", 0, 1.0), cpus=0.0)
    tasks, _, ends = tasks_of(tmp_path, fake, names=("a",), patience_s=300.0)
    for _ in range(3):
        tasks.submit()
        tasks.collect()
    assert caplog.messages == ["No node of the Ray cluster has 1 CPU: waiting up to 5 min 00 s for it to grow."]
    assert (fake.asked, ends) == ([], [])
    fake.cpus = 1.0
    tasks.submit()
    tasks.collect()
    assert [e.code for e in ends] == [0]


def test_what_no_node_can_take_and_what_its_task_raises_is_reported(tmp_path):
    ends = collected(tmp_path, FakeRay(), gpus=1)
    said = (
        "no node of the Ray cluster has 1 CPU and 1 GPU: add one that has, or use --launcher processes, and go on with --resume"
    )
    assert [(e.code, e.why) for e in ends] == [(1, said)] * 2
    wrong = FakeRay.exceptions.RayTaskError("No module named 'retrain'")
    ends = collected(tmp_path, FakeRay(wrong, wrong))
    assert {e.why for e in ends} == {"its task failed: No module named 'retrain'"}
    with pytest.raises(ConfigError, match=r"node far of the Ray cluster does not see .*all nodes share"):
        collected(tmp_path, FakeRay(ray_launcher._Told("far", None)), names=("a",))


def test_a_run_asks_for_a_gpu_where_there_may_be_one(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray_cluster.cards, "visible", lambda: [])
    assert ray_cluster.gpus("gpu:0", "") == 0
    assert ray_cluster.gpus("gpu:0", "10.0.0.5:6379") == 1
    assert ray_cluster.gpus("cpu", "10.0.0.5:6379") == 0
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.5:6379")
    assert ray_cluster.gpus("gpu:0", "") == 1
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert ray_cluster.gpus("gpu:0", "") == 0
    monkeypatch.setattr(ray_cluster.cards, "visible", lambda: ["0"])
    assert ray_cluster.gpus("gpu:0", "") == 1


def test_ray_that_is_missing_is_said_in_a_line(monkeypatch):
    before = signal.getsignal(signal.SIGTERM), dict(os.environ)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"retrain\[ray\]"), ray_cluster.cluster("", 1, 0):
        pass
    with pytest.raises(ConfigError, match=r"retrain\[ray\]"):
        ray_cluster.check("")
    assert (signal.getsignal(signal.SIGTERM), dict(os.environ)) == before


def test_a_campaign_without_ray_begins_no_directory(tmp_path):
    campaigns.write(tmp_path, more='launcher = "ray"')
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    (blocked / "ray.py").write_text("raise ModuleNotFoundError('No module named ray', name='ray')\n")
    path = os.pathsep.join(filter(None, (str(blocked), os.environ.get("PYTHONPATH", ""))))
    code, said = campaigns.run(tmp_path, "campaign.toml", PYTHONPATH=path, RAY_ADDRESS="")
    assert code == 2, said
    (line,) = said.strip().splitlines()
    assert 'pip install "retrain[ray]"' in line
    assert not (tmp_path / "logs").exists() or not list((tmp_path / "logs").iterdir())


def test_an_address_without_a_cluster_is_a_mistake_of_the_configuration(tmp_path):
    campaigns.write(tmp_path, more='launcher = "ray"')
    code, said = campaigns.run(tmp_path, "campaign.toml", "--ray-address", "127.0.0.1:1")
    assert code == 2, said
    assert "no Ray cluster answers at 127.0.0.1:1" in said
    assert "Traceback" not in said
    assert not (tmp_path / "logs").exists() or not list((tmp_path / "logs").iterdir())


def test_an_address_that_fails_a_campaign_which_goes_on_names_the_way_to_go_on(tmp_path):
    jobs = ray_launcher.RayTasks(tmp_path, threads=1, address="127.0.0.1:1")
    none = lambda *_: None  # noqa: E731
    with pytest.raises(ConfigError, match="no Ray cluster answers") as raised:
        jobs.run([], stop=threading.Event(), begun=none, ended=none, tick=none)
    assert raised.value.fix.endswith(f"Then go on with: retrain --resume {tmp_path}")
