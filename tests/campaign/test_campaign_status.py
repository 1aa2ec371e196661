"""``retrain status`` and ``retrain top`` on a campaign's directory."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from retrain.campaign import progress
from retrain.cli.main import main

_made = runpy.run_path(str(Path(__file__).with_name("made_campaigns.py")))
declared, write_campaign, SEEDS = (_made[k] for k in ("declared", "write_campaign", "SEEDS"))
TWO = ("grpo+none", "maxrl+none")
STATES = {(label, seed): ("waiting", 0) for label in TWO for seed in SEEDS[4:]} | {
    ("grpo+none", 303): ("running", 17), ("maxrl+none", 202): ("failed", 25), ("maxrl+none", 303): ("dead", 12),
}  # fmt: skip


@pytest.fixture
def campaign(tmp_path):
    """Half done: one run goes on, one failed, one is dead, eight wait."""
    return write_campaign(tmp_path / "half", declared(TWO, looks=(4, 8)), states=STATES)


def said(capsys, *words):
    """What a command prints."""
    assert main([*map(str, words)]) == 0
    return capsys.readouterr().out


def test_status_shows_seeds_by_conditions_and_names_what_stopped(campaign, capsys):
    text = said(capsys, "status", campaign)
    lines = text.splitlines()
    assert lines[0].startswith(f"{campaign}: 5 of 16 runs done, 1 running, 1 failed, 1 dead, 8 waiting; about ")
    assert "baseline grpo+none; looks at 4, 8 seeds" in lines[1]
    assert lines[2] == "  no verdict is read before 4 seeds of every condition are done (6 of 8 runs are)"
    rows = {line.split()[0]: line for line in lines if line[:1].isdigit()}
    assert list(rows) == [str(seed) for seed in SEEDS]
    assert "17/40" in rows["303"]
    assert "dead 12/40" in rows["303"]
    assert "failed 25/40" in rows["202"]
    assert rows["404"].split() == ["404", "-", "-"]
    assert "maxrl+none_s202: failed at step 25/40, BackendError: the loss is not finite at step 12." in text
    assert "maxrl+none_s303: dead at step 12/40, killed by signal 9" in text
    assert lines[-1] == f"retrain --resume {campaign} goes on with them"
    # The one that goes on stands in the table of runs as ever.
    assert "runs/grpo+none_s303  running  17/40" in text


def test_a_finished_campaign_points_to_its_report_and_judges_nothing(tmp_path, capsys):
    campaign = write_campaign(tmp_path / "done", declared(TWO), effects=(0, 0.2))
    text = said(capsys, "status", campaign)
    assert f"retrain report {campaign} has the verdicts" in text
    assert "improvement" not in text
    assert "goes on with" not in text


def test_many_seeds_are_folded(tmp_path, capsys):
    states = {(label, seed): ("waiting", 0) for label in TWO for seed in range(41, 65)}
    text = said(capsys, "status", write_campaign(tmp_path / "c", declared(TWO, seeds=range(1, 65)), states=states))
    assert "36 more seeds are done in every condition" in text
    assert "22 more seeds wait in every condition" in text
    assert len(text.splitlines()) < 16


def test_top_and_json_know_the_campaign(campaign, capsys):
    text = said(capsys, "top", campaign)
    assert "5 of 16 runs done" in text
    assert "grpo+none_s303" in text
    assert "maxrl+none_s101" not in text
    record = json.loads(said(capsys, "status", campaign, "--json"))
    assert record["campaign"]["counts"] == {"done": 5, "running": 1, "failed": 1, "dead": 1, "waiting": 8}
    assert len(record["campaign"]["cells"]) == 16
    assert len(record["runs"]) == 8
    assert "campaign" not in json.loads(said(capsys, "status", campaign / "runs", "--json"))


def test_time_left_shares_what_waits_among_those_that_go_on(campaign):
    found = progress.look(campaign)
    done = [cell.spent_s for cell in found.cells if cell.state == "done"]
    assert done == [12.0] * 5
    going = next(cell for cell in found.cells if cell.state == "running")
    assert found.left_s == pytest.approx(going.left_s + 9 * 12.0)


def test_a_look_at_a_campaign_needs_neither_numpy_nor_pydantic(campaign):
    code = (
        "import sys; from retrain.cli.main import main; main(['status', sys.argv[1]]); "
        "print(sorted({'numpy', 'pydantic', 'torch', 'scipy', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(campaign)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_changed_manifest_is_one_line(campaign, capsys):
    path = campaign / "manifest.json"
    path.write_text(path.read_text().replace('"alpha": 0.05', '"alpha": 0.1'))
    assert main(["status", str(campaign)]) == 2
    error = capsys.readouterr().err
    assert "changed since it was written" in error
    assert "Traceback" not in error
