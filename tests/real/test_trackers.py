"""The real trackers beside a real run: every number is that of metrics.jsonl, each step is there once after a kill,
nothing leaves the machine when offline, and no key is written anywhere."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import socket
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from retrain import plugins, trackers
from retrain.cli.main import main
from retrain.config.load import load
from retrain.errors import ModelError, PluginError, RunError
from retrain.preflight import choose_directory
from retrain.runner import execute

_reader = runpy.run_path(str(Path(__file__).with_name("trackers_read.py")))
tensorboard_scalars, trackio_logs, wandb_pieces = (
    _reader[name] for name in ("tensorboard_scalars", "trackio_logs", "wandb_pieces")
)

KEY = "fake-key-0123456789abcdef0123456789abcdef"

SHOWN = (0, 1, 3, 5, 6)
"""Steps whose generations are shown: the first, every second and the last of seven."""

AUDIT = """
import os, sys
def note(event, args):
    if event == "socket.connect" and isinstance(args[1], tuple) or event == "socket.getaddrinfo":
        with open(os.environ["AUDIT"], "a") as file:
            file.write(f"{event} {args[1:]}\\n")
sys.addaudithook(note)
"""


def config(run: Path, **changes):
    made = {
        "backend": {"devices": "cpu"},
        "model": {"model": "retrain/tiny", "lora_rank": 4},
        "training": {
            "seed": 5, "max_steps": 7, "batch_size": 2, "group_size": 6, "max_tokens": 40, "temperature": 1.0,
            "lr": 1e-3, "save_every": 2,
        },
        "data": {"source": "arithmetic", "levels": [1]},
        "reward": {"type": "match"},
        "eval": {"source": "arithmetic", "split": "validation", "examples": 4, "every": 2},
        "logging": {
            "log_dir": str(run), "trackers": ["wandb", "trackio", "tensorboard"], "wandb_project": "checks",
            "wandb_tags": "one, two", "wandb_group": "together", "generations": 2,
        },
    }  # fmt: skip
    for section, values in changes.items():
        made[section] = {**made.get(section, {}), **values}
    return made


def environment(tmp_path: Path, **more: str) -> dict[str, str]:
    """No home, no proxy but a recorder, offline, a key that must not be found again."""
    left_out = ("WANDB_", "TRACKIO_", "HF_TOKEN")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(left_out)}
    home = tmp_path / "home"
    home.mkdir(exist_ok=True)
    return {
        **kept,
        "HOME": str(home),
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "offline",
        "WANDB_API_KEY": KEY,
        **more,
    }


def run_jobs(tmp_path, jobs, env):
    path = tmp_path / f"jobs-{len(list(tmp_path.glob('jobs-*.json')))}.json"
    path.write_text(json.dumps(jobs))
    script = Path(__file__).with_name("resume_jobs.py")
    done = subprocess.run(
        [sys.executable, str(script), str(path)],
        env=env,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One run from its start to its end, and one that is killed twice; with a recorder of every connection."""
    tmp_path = tmp_path_factory.mktemp("trackers")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(AUDIT)
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        proxy.settimeout(0.1)
        url = f"http://127.0.0.1:{proxy.getsockname()[1]}"
        names = ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
        env = environment(
            tmp_path,
            AUDIT=str(tmp_path / "audit"),
            PYTHONPATH=str(tmp_path / "site"),
            **dict.fromkeys(names, url),
        )
        resumed = {"config": config(cut, resume={"from": str(cut)})}
        jobs = [
            {"config": config(whole)},
            {"config": config(cut), "kill_at": 2},
            {**resumed, "kill_at": 4},
            resumed,
        ]
        results = run_jobs(tmp_path, jobs, env)
        with pytest.raises(TimeoutError):
            proxy.accept()
    assert [r["status"] for r in results] == [0, -9, -9, 0], results[-1]["output"]
    return types.SimpleNamespace(
        whole=whole, cut=cut, results=results, audit=tmp_path / "audit", tmp=tmp_path
    )


@pytest.mark.slow
def test_offline_nothing_is_sent_or_looked_up(runs):
    assert not runs.audit.exists(), runs.audit.read_text()


@pytest.mark.slow
def test_no_file_of_a_run_holds_the_key_and_all_files_lie_in_the_run_directory(runs):
    files = [p for p in runs.tmp.rglob("*") if p.is_file()]
    assert any(p.suffix == ".wandb" for p in files)
    assert [p for p in files if KEY.encode() in p.read_bytes()] == []
    assert all(KEY not in r["output"] for r in runs.results)
    # What lies elsewhere is the log of wandb's service, and what it was copying when its run was killed.
    elsewhere = {p.relative_to(runs.tmp) for p in files} - {
        p.relative_to(runs.tmp) for run in (runs.whole, runs.cut) for p in run.rglob("*")
    }
    ours = [p for p in elsewhere if p.parts[0] not in ("home", "site") and not p.name.startswith("jobs-")]
    assert ours == []
    own = (Path("home/.cache/wandb/logs"), Path("home/.local/share/wandb/artifacts/staging"))
    assert [
        p
        for p in elsewhere
        if p.parts[0] == "home" and not p.is_relative_to(own[0]) and not p.is_relative_to(own[1])
    ] == []


@pytest.mark.slow
def test_wandb_holds_the_numbers_of_metrics_jsonl(runs):
    (piece,) = wandb_pieces(runs.whole)
    assert (piece["project"], piece["name"], piece["group"]) == ("checks", "maxrl+gtpo_sepa", "together")
    assert (sorted(piece["tags"]), piece["exit"]) == (["one", "two"], 0)
    assert piece["config"]["condition"] == "maxrl+gtpo_sepa"
    assert piece["config"]["training"]["lr"] == 1e-3
    rows = metrics(runs.whole)
    assert [r["_step"] for r in piece["rows"]] == list(range(len(rows)))
    for row, sent in zip(rows, piece["rows"], strict=True):
        step = row.pop("step")
        kind = trackers.kind_of(row)
        extra = {k for k in sent if k.startswith(("_", "generations"))}
        assert {k: v for k, v in sent.items() if k not in extra} == {
            f"{kind}/step": step,
            **trackers.numbers(row),
        }
        shown = kind == "train" and step in SHOWN
        assert ("generations" in {k.split("/")[0] for k in extra}) == shown
    assert len(trackers.numbers(rows[1])) > 30
    made = list(runs.whole.glob("trackers/wandb/offline-run-*/files/media/table/*.json"))
    assert len(made) == len(SHOWN)
    tables = [json.loads(p.read_text()) for p in made]
    assert all(t["columns"] == list(trackers.COLUMNS) and len(t["data"]) == 2 for t in tables)


@pytest.mark.slow
def test_trackio_holds_the_numbers_of_metrics_jsonl(runs):
    logs, stored, ids = trackio_logs(runs.whole, "checks")
    assert len(ids) == 1
    assert stored["condition"] == "maxrl+gtpo_sepa"
    shown = [r for r in logs if "generations" in r]
    assert [r["step"] for r in shown] == list(SHOWN)
    rows = metrics(runs.whole)
    assert [r for r in logs if "generations" not in r] == [
        {"step": row["step"], **trackers.numbers({k: v for k, v in row.items() if k != "step"})}
        for row in rows
    ]


@pytest.mark.slow
def test_tensorboard_holds_the_nearest_float32_of_every_number(runs):
    scalars, texts = tensorboard_scalars(runs.whole)
    expected: dict = {}
    for row in metrics(runs.whole):
        step = row.pop("step")
        for key, value in trackers.numbers(row).items():
            expected.setdefault(key, {})[step] = [float(np.float32(value))]
    assert scalars == expected
    assert sorted(texts["generations"]) == list(SHOWN)
    assert "max_steps = 7" in texts["config"][0]


@pytest.mark.slow
def test_after_two_kills_every_step_is_there_once_with_the_values_of_an_uninterrupted_run(runs):
    def plain(row):
        return {k: v for k, v in row.items() if not k.endswith("_s") and "tokens_per_second" not in k}

    expected = [
        (row["step"], plain(trackers.numbers({k: v for k, v in row.items() if k != "step"})))
        for row in metrics(runs.whole)
    ]
    logs, _, ids = trackio_logs(runs.cut, "checks")
    assert len(ids) == 1
    found = [(r.pop("step"), plain(r)) for r in logs if "generations" not in r]
    assert found == expected

    scalars, _ = tensorboard_scalars(runs.cut)
    assert len(list(runs.cut.glob("trackers/tensorboard/*"))) == 3
    assert {s: len(v) for s, v in scalars["train/mean_reward"].items()} == dict.fromkeys(range(7), 1)
    assert {s: len(v) for s, v in scalars["eval/accuracy"].items()} == dict.fromkeys((0, 2, 4, 6, 7), 1)

    pieces = wandb_pieces(runs.cut)
    assert len(pieces) == 3
    assert len({p["id"] for p in pieces}) == 1
    assert pieces[-1]["exit"] == 0
    # What was on its way when the process died may be there twice, under one number and with equal values.
    rows: dict[int, dict] = {}
    for row in (row for piece in pieces for row in piece["rows"]):
        kept = plain({k: v for k, v in row.items() if not k.startswith(("_", "generations"))})
        assert rows.setdefault(row["_step"], kept) == kept
    numbers = [rows[i] for i in sorted(rows)]
    assert sorted(rows) == list(range(len(expected)))
    for (step, values), row in zip(expected, numbers, strict=True):
        kind = "eval" if "eval/step" in row else "train"
        assert row == {f"{kind}/step": step, **values}


@pytest.mark.slow
def test_replacing_a_run_replaces_its_trackers(runs, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(runs.whole, copy)
    before = json.loads((copy / "trackers/trackers.json").read_text())
    again = config(
        copy, logging={"trackers": ["tensorboard"], "wandb_project": ""}, training={"max_steps": 1}
    )
    again["logging"] = {k: v for k, v in again["logging"].items() if k in ("log_dir", "trackers")}
    execute(load(again), overwrite=True)
    after = json.loads((copy / "trackers/trackers.json").read_text())
    assert list(after) == ["tensorboard"]
    assert after["tensorboard"]["id"] != before["tensorboard"]["id"]
    assert len(list((copy / "trackers/tensorboard").iterdir())) == 1
    assert not (copy / "trackers/wandb").exists()


def small(run, *names, **changes):
    made = config(run, training={"max_steps": 1, "max_tokens": 8}, **changes)
    made["logging"] = {"log_dir": str(run), "trackers": list(names)}
    return made


def test_a_run_that_cannot_start_leaves_the_replaced_ones_trackers(tmp_path, monkeypatch):
    run = tmp_path / "run"
    execute(load(small(run, "tensorboard")))
    kept = {p: p.read_bytes() for p in run.glob("trackers/**/*") if p.is_file()}
    assert len(kept) == 2
    real = plugins.load

    def broken(kind, name):
        if kind == "backend":
            raise ModelError("no such model.")
        return real(kind, name)

    monkeypatch.setattr(plugins, "load", broken)
    with pytest.raises(ModelError):
        execute(load(small(run, "tensorboard")), overwrite=True)
    assert {p: p.read_bytes() for p in run.glob("trackers/**/*") if p.is_file()} == kept
    assert (
        choose_directory(load({"resume": {"from": str(run)}}).config, overwrite=False, fork=False).how
        == "resume"
    )


def test_a_tracker_that_joins_at_a_resume_gets_the_earlier_steps_too(tmp_path):
    run = tmp_path / "run"
    made = small(run)
    made["training"] |= {"max_steps": 3, "save_every": 1}
    execute(load(made))
    made["logging"]["trackers"] = ["tensorboard"]
    made["training"]["max_steps"] = 4
    execute(load({**made, "resume": {"from": str(run)}}))
    scalars, texts = tensorboard_scalars(run)
    rows = [r for r in metrics(run) if "lr" in r]
    assert scalars["train/mean_reward"] == {r["step"]: [float(np.float32(r["mean_reward"]))] for r in rows}
    assert len(rows) == 4
    assert sorted(scalars["eval/accuracy"]) == [r["step"] for r in metrics(run) if "lr" not in r]
    assert sorted(texts["generations"]) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("name", "module"), [("wandb", "wandb"), ("trackio", "trackio"), ("tensorboard", "tensorboard")]
)
def test_a_missing_package_names_its_install_line(tmp_path, monkeypatch, capsys, name, module):
    for loaded in [m for m in sys.modules if m.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, module, None)
    toml = tmp_path / "retrain.toml"
    toml.write_text(
        '[model]\nmodel = "retrain/tiny"\n[backend]\ndevices = "cpu"\n[training]\nmax_tokens = 8\n'
        '[data]\nsource = "arithmetic"\n[reward]\ntype = "match"\n'
        f'[logging]\nlog_dir = "{tmp_path / "run"}"\ntrackers = ["{name}"]\n'
    )
    monkeypatch.chdir(tmp_path)
    assert main([str(toml)]) == 2
    out, err = capsys.readouterr()
    assert err.strip() == (
        f"tracker '{name}' needs the module '{module}', which is not installed. Fix: pip install \"retrain[{name}]\"."
    )
    assert "Loading train model" not in out


def test_whatever_a_tracker_raises_at_its_start_is_one_line(tmp_path, make_config, monkeypatch):
    (tmp_path / "trackers").mkdir()
    (tmp_path / "trackers/tensorboard").write_text("a file where a folder must be")
    with pytest.raises(RunError, match=r"^tracker 'tensorboard' could not start: [^\n]+$") as caught:
        trackers.TensorboardSink(make_config(), tmp_path)
    assert caught.value.exit_code == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "code", "says"),
    [
        (
            "",
            2,
            "tracker 'wandb' is not logged in. Fix: run wandb login, set WANDB_API_KEY, or set WANDB_MODE=offline",
        ),
        ("0123456789" * 4, 1, "tracker 'wandb' could not start: "),
    ],
)
def test_wandb_online_without_a_login_or_a_server_stops_before_the_model_loads(tmp_path, key, code, says):
    job = {"config": small(tmp_path / "run", "wandb")}
    env = environment(tmp_path, WANDB_MODE="online", WANDB_API_KEY=key, WANDB_BASE_URL="http://127.0.0.1:9")
    (result,) = run_jobs(
        tmp_path, [job], env if key else {k: v for k, v in env.items() if k != "WANDB_API_KEY"}
    )
    assert result["status"] == code, result["output"]
    last = result["output"].strip().splitlines()[-1]
    assert last.startswith(says)
    assert "Fix: " in last
    assert "Loading train model" not in result["output"]
    assert not key or key not in result["output"]


def test_a_tracker_that_breaks_during_a_run_is_switched_off_and_the_run_completes(tmp_path, monkeypatch):
    run = tmp_path / "run"
    real = trackers.TensorboardSink.log

    def full(self, step, row):
        if step == 1:
            raise OSError(28, "No space left on device")
        real(self, step, row)

    monkeypatch.setattr(trackers.TensorboardSink, "log", full)
    made = small(run, "tensorboard")
    made["training"] |= {"max_steps": 4}
    del made["eval"]
    assert execute(load(made)).status == "done"
    events = (run / "events.log").read_text()
    assert events.count("TensorboardSink failed and is off for the rest of the run: [Errno 28]") == 1
    assert [r["step"] for r in metrics(run)] == [0, 1, 2, 3]
    assert list(
        tensorboard_scalars(run)[0]["train/loss" if metrics(run)[0]["loss"] is not None else "train/lr"]
    ) == [0]


def test_a_sink_of_ones_own_is_built_the_same_way(tmp_path, monkeypatch):
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins/my_sink_ab.py").write_text(
        "class Mine:\n"
        "    def __init__(self, config, run_dir):\n"
        "        self.file = (run_dir / 'mine.txt').open('w')\n"
        "    def log(self, step, metrics):\n"
        "        self.file.write(f'{step} {len(metrics)}\\n')\n"
        "    def close(self):\n"
        "        self.file.close()\n"
        "def broken(config, run_dir):\n"
        "    raise KeyError('token')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path / "plugins"))
    made = small(tmp_path / "run", "my_sink_ab.Mine", plugins={"search_paths": [str(tmp_path / "plugins")]})
    execute(load(made))
    assert [line.split()[0] for line in (tmp_path / "run/mine.txt").read_text().splitlines()] == [
        "0",
        "0",
        "1",
    ]
    made = small(
        tmp_path / "other", "my_sink_ab.broken", plugins={"search_paths": [str(tmp_path / "plugins")]}
    )
    with pytest.raises(PluginError, match=r"my_sink_ab.py:\d+") as caught:
        execute(load(made))
    assert caught.value.exit_code == 2
