"""A campaign with [squeeze]: the first run that is done is analysed, once, and what was found stands in the manifest."""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from retrain.campaign import launchers, manifest, rank, run
from retrain.config.load import load
from retrain.config.schema import Squeeze
from retrain.errors import ConfigError

sys.path.insert(0, str(Path(__file__).with_name("light")))

import campaigns

declared = runpy.run_path(str(Path(__file__).with_name("made_campaigns.py")))["declared"]

CONFIG = """
[model]
model = "retrain/tiny"
lora_rank = 8
[backend]
devices = "cpu"
[training]
batch_size = 2
group_size = 4
max_tokens = 8
[data]
source = "arithmetic"
[reward]
type = "match"
[eval]
source = "arithmetic"
examples = 4
[logging]
log_dir = "logs"
[squeeze]
min_variance_retention = 0.9
[campaign]
seeds = [1]
max_steps = 1
threads = 1
[[campaign.conditions]]
advantage_mode = "grpo"
transform_mode = "none"
[[campaign.conditions]]
advantage_mode = "maxrl"
transform_mode = "none"
"""


@pytest.mark.slow
def test_the_first_run_that_is_done_is_analysed_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.toml").write_text(CONFIG)
    result = run.execute(load("c.toml"), plain=True)
    assert result.status == "done"
    found = manifest.read(result.directory).squeeze
    assert found is not None
    assert found["run"] == "grpo+none_s1"
    assert found["recommended_rank"] in (1, 2, 4, 8)
    assert len(found["table"]) == 4
    path = result.directory / "squeeze" / "analysis.json"
    assert json.loads(path.read_text())["recommended_rank"] == found["recommended_rank"]

    # Going on with a campaign that has its analysis makes no second one.
    path.unlink()
    stored = load(result.directory / "config.toml", {"resume.from": str(result.directory)})
    assert run.execute(stored, plain=True).status == "done"
    assert not path.exists()
    assert manifest.read(result.directory).squeeze == found

    # Which run it was stands beside it, for a campaign that is killed meanwhile.
    assert (result.directory / "squeeze/run.txt").read_text() == "grpo+none_s1\n"


def test_a_campaign_is_refused_where_its_squeeze_would_overwrite_something(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "adapter_model.safetensors").write_text("mine")
    (tmp_path / "c.toml").write_text(CONFIG.replace("[squeeze]", '[squeeze]\noutput_path = "precious"'))
    with pytest.raises(ConfigError, match=r"output_path = .*precious' is not empty"):
        run.execute(load("c.toml"), plain=True)
    assert not list((tmp_path / "logs").iterdir())


def analysis(folder, monkeypatch, text, keep=None):
    """Of the adapters of two runs, by a process that runs ``text``."""
    for name in ("a", "b"):
        (folder / "runs" / name / "adapter").mkdir(parents=True, exist_ok=True)
    monkeypatch.setattr(rank, "COMMAND", [sys.executable, "-c", text])
    return rank.Analysis(folder, Squeeze(), 1, keep or (lambda found: None))


WRITES = "import json, sys; json.dump({'recommended_rank': 2, 'table': []}, open(sys.argv[2], 'w'))"
WAITS = "import sys; sys.stdin.read()"


def test_what_was_found_is_kept_at_once_and_the_next_start_takes_the_same_run(tmp_path, monkeypatch):
    kept = []
    found = analysis(tmp_path, monkeypatch, WAITS, kept.append)
    assert found.begun_with() == ""
    found.begin(tmp_path / "runs/b")
    found.begin(tmp_path / "runs/a")
    found.stop()
    assert kept == []
    again = analysis(tmp_path, monkeypatch, WRITES, kept.append)
    assert again.begun_with() == "b"
    again.begin(tmp_path / "runs/b")
    assert again.wait(threading.Event())
    assert kept == [{"run": "b", "recommended_rank": 2, "table": []}]
    assert not again.poll()
    assert launchers.besides == []


def test_an_earlier_analysis_is_not_taken_for_one_that_failed(tmp_path, monkeypatch, caplog):
    kept = []
    first = analysis(tmp_path, monkeypatch, WRITES, kept.append)
    first.begin(tmp_path / "runs/a")
    assert first.wait(threading.Event())
    second = analysis(tmp_path, monkeypatch, "pass", kept.append)
    second.begin(tmp_path / "runs/b")
    assert not second.wait(threading.Event())
    assert len(kept) == 1
    assert "The rank analysis of b failed" in caplog.text
    # No other run takes its place: which one is analysed is not a matter of what broke.
    second.begin(tmp_path / "runs/a")
    assert second.run == "b"
    assert not second.wait(threading.Event())


def test_a_stop_ends_the_wait_and_a_second_ctrl_c_the_analysis(tmp_path, monkeypatch):
    stop, found = threading.Event(), analysis(tmp_path, monkeypatch, WAITS)
    found.begin(tmp_path / "runs/a")
    threading.Timer(0.3, stop.set).start()
    began = time.monotonic()
    assert not found.wait(stop)
    assert time.monotonic() - began < 20
    launchers.kill_all()
    process = found._process
    assert process is not None
    assert process.wait(timeout=30) == -signal.SIGKILL
    found.stop()


def test_an_analysis_ends_with_the_campaign_that_waits_for_it(tmp_path, monkeypatch):
    # The real process, which would wait forever for an adapter that is a pipe.
    (tmp_path / "adapter").mkdir()
    os.mkfifo(tmp_path / "adapter/adapter_config.json")
    process = subprocess.Popen([*rank.COMMAND, *(str(tmp_path / n) for n in ("adapter", "out.json"))], stdin=subprocess.PIPE)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=1)
    launchers.let_go(process)
    assert process.wait(timeout=60) == 130


def test_a_campaign_keeps_what_was_found_at_once_and_goes_on_with_the_run_it_began_with(tmp_path, monkeypatch, caplog):
    made = manifest.Manifest(declared())
    manifest.write(tmp_path, made)
    planned = SimpleNamespace(
        runs=[SimpleNamespace(name=name, config=SimpleNamespace(training=SimpleNamespace(max_steps=1))) for name in ("a", "b")],
        loaded=SimpleNamespace(config=SimpleNamespace(squeeze=Squeeze())),
    )
    done = set()
    monkeypatch.setattr(run, "is_done", lambda path, steps: path.name in done)

    def trained(text, runs):
        analysis(tmp_path, monkeypatch, text)
        monkeypatch.setattr(run, "run_all", runs)
        return run._train(tmp_path, planned, made, plain=True, stop=threading.Event())

    assert trained(WAITS, lambda *_, **__: None).squeeze is None
    assert "No run is done, so there is no adapter" in caplog.text

    def ends_first_and_breaks(*_, analysis, **__):
        analysis.begin(tmp_path / "runs/b")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        trained(WAITS, ends_first_and_breaks)
    assert manifest.read(tmp_path).squeeze is None
    done |= {"a", "b"}

    def breaks_later(*_, analysis, **__):
        assert analysis.wait(threading.Event())
        raise RuntimeError

    with pytest.raises(RuntimeError):
        trained(WRITES, breaks_later)
    assert manifest.read(tmp_path).squeeze["run"] == "b"


@pytest.mark.slow
def test_first_runs_that_break_or_are_refused_and_a_failed_analysis_stop_no_campaign(tmp_path):
    """Light runs have no weights to analyse: the analysis of the first that is done fails, too, and that is said."""
    campaigns.write(tmp_path, seeds=(1, 2), steps=1, more="[squeeze]\nmin_variance_retention = 0.9\n")
    (tmp_path / "signs/grpo+none_s1").write_text("raise 0")
    (tmp_path / "signs/maxrl+none_s1").write_text("refuse 0")
    code, said = campaigns.run(tmp_path, "campaign.toml", "--plain")
    directory = campaigns.campaign(tmp_path)
    assert code == 1
    assert campaigns.states(directory) == {"grpo+none_s1": "failed", "grpo+none_s2": "done", "maxrl+none_s2": "done"}
    assert "The rank analysis of grpo+none_s2 failed: retrain: " in said
    assert "Going on with the campaign makes it again" in said
    assert manifest.read(directory).squeeze is None
