"""A campaign of the real tiny model, killed twice and rerun, ends as one that nobody touched: to the byte."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

BENCHES = Path(__file__).resolve().parents[2] / "benches"

if not BENCHES.is_dir():
    pytest.skip("benches are part of the repository only", allow_module_level=True)

sys.path.insert(0, str(BENCHES))

import killed_campaign  # noqa: E402


@pytest.mark.slow
def test_two_kills_change_no_byte_of_adapters_and_metrics_and_count_no_task_twice(tmp_path):
    record = killed_campaign.measure(2, 1, 30, random.Random(1), tmp_path)
    assert record["differing"] == []
    assert len(record["kills"]) == 2
    assert [kill["with_runs"] for kill in record["kills"]] == [False, True]
    assert all(kill["running"] == 2 and 0 < kill["steps"] < 60 for kill in record["kills"])
    assert len(record["runs"]) == 2
    for run in record["runs"].values():
        assert (run["state"], run["steps"], run["tasks_twice"]) == ("done", "30", "0")
    # The comparison sees a difference where there is one.
    one, other = record["runs"].values()
    assert one["adapter"] != other["adapter"]
    assert one["metrics"] != other["metrics"]
