"""Campaigns on a Ray cluster that others use: what waits says so, what is lost is counted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

pytest.importorskip("ray")

sys.path.insert(0, str(Path(__file__).with_name("light")))

import campaigns


@pytest.mark.slow
def test_a_campaign_waits_for_a_busy_cluster_and_counts_the_start_of_a_lost_worker(tmp_path):
    busy, large = tmp_path / "busy", tmp_path / "large"
    for folder in (busy, large):
        folder.mkdir()
        path = campaigns.write(folder, seeds=(1,), steps=12, step_s=0.3, more='launcher = "ray"')
    path.write_text(path.read_text().replace("threads = 1", "threads = 2"))
    script = Path(__file__).with_name("light") / "busy_cluster.py"
    with tempfile.TemporaryDirectory(prefix="rb-", dir="/tmp") as short:
        done = subprocess.run(
            [sys.executable, str(script), str(busy), str(large)],
            env={**os.environ, "RAY_TMPDIR": short}, capture_output=True, text=True, timeout=500, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["stopped"] == 130
    assert "No node of the Ray cluster has 2 CPUs: waiting up to 5 min 00 s for it to grow." in told["large"]
    assert "Started" not in told["large"]
    assert "No run has begun: 1 waits in Ray's queue until a node has 1 CPU free." in told["early"]
    assert "Started" not in told["early"]
    first = told["processes"][0]
    assert told["busy"].count(f"Started {first['name']}.") == 2
    assert (told["code"], set(told["states"].values())) == (0, {"done"}), told["busy"]
    assert set(map(tuple, told["steps"].values())) == {tuple(range(12))}
    assert [row["code"] for row in told["processes"]] == [-9, 0, 0]
    assert first["seconds"] > 0.3
    assert first["host"] == told["processes"][1]["host"]
    assert "it goes on elsewhere from its newest checkpoint, start 2 of at most 3" in first["why"]
