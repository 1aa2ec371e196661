"""Campaigns among other runs: one line each in ``retrain status``, and their runs are not gone on with one by one."""

from __future__ import annotations

import json
import runpy
import shutil
from pathlib import Path

import pytest

from retrain.cli.main import main
from retrain.tracking import layout

_made = runpy.run_path(str(Path(__file__).with_name("made_campaigns.py")))
declared, write_campaign, SEEDS = (_made[k] for k in ("declared", "write_campaign", "SEEDS"))
TWO = ("grpo+none", "maxrl+none")


@pytest.fixture
def logs(tmp_path, monkeypatch, capsys):
    """Two campaigns and a run by itself, which was interrupted; of the first campaign a run was, too."""
    monkeypatch.chdir(tmp_path)
    states = {
        ("maxrl+none", 42): ("interrupted", 12),
        ("grpo+none", 101): ("failed", 3),
        ("maxrl+none", 101): ("waiting", 0),
    }
    first = write_campaign(Path("logs/first"), declared(TWO, seeds=SEEDS[:2]), states=states)
    write_campaign(Path("logs/second"), declared(TWO, seeds=SEEDS[:2]))
    shutil.copytree(first / "runs" / "maxrl+none_s42", "logs/alone")
    for run in ("logs/first/runs/maxrl+none_s42", "logs/alone"):
        Path(run, layout.CHECKPOINTS, layout.checkpoint_name(10)).mkdir(parents=True, exist_ok=True)

    def said(*words):
        assert main([*words]) == 0
        return capsys.readouterr().out

    return said


def test_a_folder_shows_a_line_for_each_campaign_and_its_command(logs):
    text = logs("status", "logs")
    table, _, campaigns = text.partition("\n\nlogs/first")
    assert "logs/alone" in table
    assert "runs/" not in text
    assert "logs/alone is interrupted: retrain --resume logs/alone goes on." in table
    first, second = f"logs/first{campaigns}".splitlines()
    assert first == (
        "logs/first: 1 of 4 runs done, 1 failed, 1 interrupted, 1 waiting; retrain --resume logs/first goes on with it."
    )
    assert second == "logs/second: 4 of 4 runs done; retrain report logs/second has the verdicts."


@pytest.mark.parametrize("path", ["logs/first/runs", "logs/first/runs/maxrl+none_s42"])
def test_a_run_of_a_campaign_is_gone_on_with_by_its_campaign(logs, path):
    text = logs("status", path)
    assert "it is part of a campaign, and retrain --resume logs/first goes on with all of it" in text
    assert "retrain --resume logs/first/runs" not in text
    todo = {run["path"]: run["todo"] for run in json.loads(logs("status", "logs", "--json"))["runs"]}
    assert "retrain --resume logs/first goes on" in todo["logs/first/runs/maxrl+none_s42"]


@pytest.mark.parametrize(
    "words", [["--resume", "RUN"], ["RUN/config.toml", "--log-dir", "RUN", "--overwrite"]]
)
def test_resuming_or_replacing_one_alone_is_refused_with_the_campaigns_command(logs, capsys, words):
    run = Path("logs/first/runs/maxrl+none_s42")
    (run / "config.toml").write_text(
        '[model]\nmodel = "retrain/tiny"\n[training]\nmax_steps = 40\nmax_tokens = 48\n'
    )
    before = (run / "run.json").read_bytes()
    assert main([word.replace("RUN", str(run)) for word in words]) == 2
    said = capsys.readouterr().err
    assert f"{run} is a run of the campaign logs/first, which goes on with it" in said
    assert "Fix: retrain --resume logs/first. To go on with this run alone, copy its folder" in said
    assert (run / "run.json").read_bytes() == before


def test_a_broken_manifest_hides_nothing_else(logs):
    Path("logs/first/manifest.json").write_text("{")
    text = logs("status", "logs")
    assert "logs/second: 4 of 4 runs done" in text
    assert any(line.startswith("logs/first") and "Fix" in line for line in text.splitlines())
