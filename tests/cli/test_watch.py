"""``retrain status`` and ``retrain top`` over fabricated run directories with a frozen clock.

After a deliberate change: ``UPDATE_GOLDEN=1 pytest tests/cli/test_watch.py``, and review the diff.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

from retrain.cli.main import main
from retrain.errors import ConfigError
from retrain.tracking import layout

NOW = 1_800_000_000.0
GOLDEN = Path(__file__).parent / "golden"
MAIN = "import sys; from retrain.cli.main import main; main(sys.argv[1:])"


def row(step, **changes):
    return {
        "step": step, "condition": "grpo+none", "batch_size": 8, "group_size": 16, "mean_reward": 0.2 + 0.01 * step,
        "correct_rate": 0.2 + 0.01 * step, "skipped_all_wrong": 2, "mean_length": 300.0 + step, "max_token_hit_rate": 0.05,
        "entropy_mean": 0.4 - 0.005 * step, "ratio_min": 0.99999, "ratio_max": 1.00001, "approx_kl": 1e-11, "num_updates": 1,
        "num_datums": 96, "grad_norm": 0.2, "reward_error_rate": 0.0, "rollout_error_rate": 0.0, "skipped_update": False,
        "tokens_sampled": 40000, "tokens_per_second": 4000.0, "step_time_s": 16.0, "sample_time_s": 10.0,
        "score_time_s": 0.8, "train_time_s": 5.0,
        **changes,
    }  # fmt: skip


def evaluated(step, accuracy):
    return {
        "step": step, "eval/source": "math/test", "eval/accuracy": accuracy, "eval/accuracy_low": accuracy - 0.05,
        "eval/accuracy_high": accuracy + 0.06, "eval/mean_reward": accuracy, "eval/time_s": 20.0,
    }  # fmt: skip


@pytest.fixture
def fabricate(tmp_path, monkeypatch):
    """A maker of run directories under ./logs; those said to live are locked by this test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "time", lambda: NOW)
    monkeypatch.setattr(platform, "node", lambda: "here")
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    locks = []

    def make(
        name, status, steps, *, total=40, lives=False, beat=None, age=1.0, changes=None, every=20, host="here"
    ):
        folder = tmp_path / "logs" / name
        folder.mkdir(parents=True)
        started = NOW - 3600
        rows = [evaluated(0, 0.25)]
        for step in range(steps):
            rows.append(row(step, **(changes(step) if changes else {})))
            if every and (step + 1) % every == 0:
                rows.append(evaluated(step + 1, 0.25 + 0.005 * step))
        (folder / layout.METRICS).write_text(
            "".join(json.dumps(r) + "\n" for r in rows) + '{"step": 99, "torn'
        )
        if steps:
            (folder / layout.CHECKPOINTS / layout.checkpoint_name(steps)).mkdir(parents=True)
        facts = {
            "max_steps": total, "host": host, "started": started, "step": steps, "status": status, "pid": 1,
            "heartbeat": NOW - age,
        }  # fmt: skip
        (folder / layout.RUN).write_text(json.dumps(facts))
        if beat is not None:
            told = {
                "pid": 1, "host": host, "started": started, "max_steps": total, "alarms": 0, "ill": [], "time": NOW - age,
                "step": steps, "tokens": 40000 * steps, "phase": "sampling", "phase_since": NOW - age - 5, "moved": NOW - age,
                "usual_s": 11.0, "done": 40, "asked": 128, "drawn": 9000, "memory": {"resident": 3 << 30, "peak": 4 << 30},
            }  # fmt: skip
            (folder / layout.HEARTBEAT).write_text(json.dumps({**told, **beat}))
        file = (folder / layout.LOCK).open("a")
        if lives:
            fcntl.flock(file, fcntl.LOCK_EX)
        locks.append(file)
        return folder

    yield make
    for file in locks:
        file.close()
    monkeypatch.undo()
    time.tzset()


@pytest.fixture
def zoo(fabricate):
    """A run of every state."""
    alarm = {
        "step": 9,
        "vital": "truncated_share",
        "message": "45% of the rollouts were cut.",
        "advice": "Raise it.",
    }
    device = {"resident": 5 << 30, "device": 41 << 30, "device_peak": 97 << 30, "device_total": 140 << 30}
    fabricate("a-done", "done", 40, age=7200)
    fabricate(
        "b-running",
        "running",
        12,
        lives=True,
        beat={"memory": device, "alarms": 1, "alarm": alarm, "ill": ["truncated_share"]},
    )
    fabricate(
        "c-slow",
        "running",
        2,
        lives=True,
        beat={"moved": NOW - 30, "phase": "learning", "done": None, "asked": None},
    )
    fabricate(
        "d-hung", "running", 12, lives=True, beat={"moved": NOW - 400, "phase_since": NOW - 405, "done": 127}
    )
    fabricate("e-silent", "running", 12, lives=True, beat={}, age=95)
    fabricate("f-dead", "running", 12, beat={}, age=95)
    fabricate("g-elsewhere", "running", 3, beat={}, age=100, host="there")
    fabricate("h-failed", "failed", 3, age=86400 * 3)
    fabricate("i-stopped", "interrupted", 0, age=600, every=0)
    fabricate("campaign/grpo+none_s1", "done", 40, changes=lambda s: {"max_token_hit_rate": 0.5}, age=5)
    return fabricate


def check(name, text):
    path = GOLDEN / name
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("status.txt", ["status"]),
        ("status_run.txt", ["status", "logs/b-running"]),
        ("status_done.txt", ["status", "logs/a-done"]),
        ("status_campaign.txt", ["status", "logs/campaign", "logs/a-done"]),
        ("top.txt", ["top"]),
    ],
)
def test_the_text_is_what_was_agreed(zoo, capsys, name, words):
    assert main(words) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    check(name, shown.out)


@pytest.mark.parametrize(
    ("name", "words"),
    [("status.json", ["status", "--json"]), ("status_run.json", ["status", "logs/b-running", "--json"])],
)
def test_the_json_is_what_was_agreed(zoo, capfd, name, words):
    assert main(words) == 0
    shown = capfd.readouterr()
    assert shown.err == ""
    assert shown.out.count("\n") == 1
    check(name, json.dumps(json.loads(shown.out), indent=1) + "\n")


def test_every_state_is_told_and_only_going_runs_are_in_top(zoo, capfd):
    main(["status", "--json"])
    states = {Path(r["path"]).name: r["state"] for r in json.loads(capfd.readouterr().out)["runs"]}
    assert states == {
        "a-done": "done", "b-running": "running", "c-slow": "running", "d-hung": "hung", "e-silent": "silent",
        "f-dead": "dead", "g-elsewhere": "running", "h-failed": "failed", "i-stopped": "interrupted", "grpo+none_s1": "done",
    }  # fmt: skip
    main(["top", "--json"])
    going = {r["state"] for r in json.loads(capfd.readouterr().out)["runs"]}
    assert going == {"running", "hung", "silent", "dead"}


def test_a_heartbeat_of_an_earlier_start_says_nothing(fabricate, capfd):
    fabricate("again", "running", 5, lives=True, beat={"pid": 7, "phase": "learning", "moved": NOW - 9999})
    main(["status", "--json"])
    (run,) = json.loads(capfd.readouterr().out)["runs"]
    assert (run["state"], run["phase"]) == ("running", None)


@pytest.mark.parametrize(
    ("status", "steps", "said"),
    [
        ("failed", 0, "and no checkpoint is there; fix the cause, then start it again."),
        ("failed", 3, "then start it again with --overwrite."),
        ("interrupted", 3, "no checkpoint is there; start it again with --overwrite."),
        ("running", 3, "its process is gone, and no checkpoint is there; start it again with --overwrite."),
    ],
)
def test_a_run_without_a_checkpoint_is_not_told_to_resume(fabricate, capsys, status, steps, said):
    folder = fabricate("a", status, steps)
    for name in (folder / layout.CHECKPOINTS).glob("*"):
        name.rmdir()
    for words in (["status"], ["status", "logs/a"]):
        main(words)
        shown = capsys.readouterr().out
        assert said in shown
        assert "--resume" not in shown


def test_the_time_is_that_of_all_starts(fabricate, capsys):
    folder = fabricate("a", "done", 40)
    facts = json.loads((folder / layout.RUN).read_text())
    (folder / layout.RUN).write_text(json.dumps(facts | {"started": NOW - 1, "spent_s": 7260.0}))
    main(["status"])
    assert "2 h 01 min" in capsys.readouterr().out
    main(["status", "logs/a"])
    assert "took        2 h 01 min" in capsys.readouterr().out


def test_a_best_checkpoint_below_the_start_is_said_to_be(fabricate, capfd):
    folder = fabricate("a", "done", 20)
    rows = [evaluated(0, 0.25), *(row(s) for s in range(20)), evaluated(20, 0.06)]
    (folder / layout.METRICS).write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / layout.TRAINER_STATE).write_text(json.dumps({"best": {"checkpoint": "step_000020"}}))
    main(["status", "logs/a"])
    shown = capfd.readouterr().out
    assert "best step_000020, at 6.0% below the 25.0% before the first step" in shown
    assert "! held-out accuracy" in shown
    main(["status", "logs/a", "--json"])
    assert json.loads(capfd.readouterr().out)["runs"][0]["best_note"].startswith("at 6.0% below")


def test_a_start_is_seen_before_it_is_a_run_and_over_the_run_that_it_goes_on_with(fabricate, capfd):
    starting = {
        "pid": 7,
        "started": NOW - 2,
        "starting": True,
        "phase": "starting",
        "max_steps": 60,
        "done": None,
        "asked": None,
    }
    new = fabricate("new", "done", 0, lives=True, beat={**starting, "step": 0})
    for name in (layout.RUN, layout.METRICS):
        (new / name).unlink()
    gone = fabricate("gone", "done", 0, beat={**starting, "step": 0})
    for name in (layout.RUN, layout.METRICS):
        (gone / name).unlink()
    fabricate("resumed", "running", 12, lives=True, beat=starting, age=1)
    fabricate("given-up", "failed", 12, beat=starting)
    assert not layout.holds_run(new)
    main(["status", "--json"])
    runs = {Path(r["path"]).name: r for r in json.loads(capfd.readouterr().out)["runs"]}
    told = {name: (r["state"], r["phase"], r["step"], r["total"]) for name, r in runs.items()}
    assert told == {
        "new": ("running", "starting", 0, 60),
        "resumed": ("running", "starting", 12, 60),
        "given-up": ("failed", None, 12, 40),
    }
    main(["top", "logs/new"])
    assert "starting" in capfd.readouterr().out
    main(["status", "logs/new"])
    assert "process 7" in capfd.readouterr().out


def test_folders_without_runs_and_wrong_words(fabricate, capsys, tmp_path):
    assert main(["status"]) == 0
    assert main(["top"]) == 0
    assert capsys.readouterr().out.count("No runs in logs.") == 2
    assert main(["status", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["runs"] == []
    for words, said in [
        (["status", "nowhere"], "nowhere is no folder"),
        (["status", "--wat"], "unknown option --wat"),
        (["status", "--interval", "3"], "add --watch"),
        (["status", "--watch", "--interval", "0"], "--interval 0 is not"),
        (["top", "--interval", "x"], "--interval x is not"),
        (["status", "--watch", "--json"], "leave out --watch or --json"),
    ]:
        assert main(words) == 2, words
        assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "null",
        '{"status": 3}',
        '{"status": "running", "heartbeat": "x", "max_steps": "y"}',
        '{"status": "running", "max_steps": NaN, "step": NaN, "alarms": "q", "tokens": Infinity}',
    ],
)
def test_broken_files_end_nothing(fabricate, capsys, content):
    folder = fabricate("a", "running", 3, beat={})
    for name in (layout.RUN, layout.HEARTBEAT, layout.METRICS, layout.TRAINER_STATE):
        (folder / name).write_text(content)
    assert main(["status"]) == 0
    assert main(["status", "logs/a"]) == 0
    assert main(["top"]) == 0
    assert "logs/a" in capsys.readouterr().out


def test_a_folder_that_may_not_be_read_hides_no_other_run(fabricate, capsys, monkeypatch):
    fabricate("open", "done", 3)
    (Path("logs") / "locked" / "inner").mkdir(parents=True)
    seen = layout.holds_run

    def holds_run(directory):
        if directory.name in ("locked", "inner"):
            raise ConfigError(f"{directory} cannot be read.", fix="change its permissions.")
        return seen(directory)

    monkeypatch.setattr(layout, "holds_run", holds_run)
    assert main(["status"]) == 0
    assert "logs/open" in capsys.readouterr().out


def test_fifty_runs_cost_little_and_load_nothing_heavy(tmp_path):
    """At most thirty times the processor time of bare Python."""
    lines = "".join(json.dumps(row(step)) + "\n" for step in range(1000))
    for i in range(50):
        folder = tmp_path / "logs" / f"run{i}"
        folder.mkdir(parents=True)
        (folder / layout.METRICS).write_text(lines)
        (folder / layout.RUN).write_text(json.dumps({"status": "done", "max_steps": 1000, "step": 1000}))
        (folder / layout.HEARTBEAT).write_text(
            json.dumps({"step": 1000, "alarms": 0, "time": NOW, "tokens": 5})
        )
    heavy = ("torch", "transformers", "pydantic", "numpy", "rich", "tomlkit", "asyncio")
    code = f"{MAIN}\nprint([m for m in {heavy!r} if m in sys.modules])"

    def cost(*arguments):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime, done.stdout

    bare = statistics.median(cost("-c", "pass")[0] for _ in range(7))
    for words in (["status"], ["status", "--json"], ["top"]):
        taken = [cost("-c", code, *words) for _ in range(3)]
        assert taken[0][1].endswith("[]\n")
        assert statistics.median(t for t, _ in taken) <= 30 * bare
