"""Rows of a study over several sittings: which runs are kept, and which rows are not judged together."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import pytest

_made = runpy.run_path(str(Path(__file__).with_name("made_campaigns.py")))
declared, write_campaign = (_made[k] for k in ("declared", "write_campaign"))
study = runpy.run_path(str(Path(__file__).parents[2] / "benches/study_rows.py"))
A, B = TWO = ("grpo+none", "maxrl+none")
TOML = """\
[training]
seed = 1
[eval]
source = "arithmetic"
[campaign]
seeds = [1, 2, 3]
max_steps = 10
[[campaign.conditions]]
advantage_mode = "grpo"
transform_mode = "none"
[[campaign.conditions]]
advantage_mode = "maxrl"
transform_mode = "none"
"""


@pytest.fixture
def collected(tmp_path):
    """A configuration, and the rows of its campaign, of which one run failed."""
    states = {(B, 2): ("failed", 6)}
    made = write_campaign(tmp_path / "c", declared(TWO, (1, 2, 3), steps=10), states=states, every=5)
    (tmp_path / "c.toml").write_text(TOML)
    assert study["collect"](made, tmp_path / "rows.jsonl") == 6
    assert study["collect"](made, tmp_path / "rows.jsonl") == 0
    return tmp_path / "c.toml", tmp_path / "rows.jsonl"


def test_failed_runs_are_kept_and_named(collected):
    row = next(r for r in study["rows"](collected[1]) if (r["condition"], r["seed"]) == (B, 2))
    assert (row["state"], row["steps"], row["value"]) == ("failed", 6, row["curve"][-1][1])
    told = study["judge"](*collected)
    assert (told["rows"], told["broke_off"]) == (6, [f"{B}_s2"])
    assert told["torch"] == {"2.13.0+cpu": 6}
    assert row["value"] in told["arms"][1]["values"]


@pytest.mark.parametrize(("change", "said"), [
    ({"evaluation": "other"}, "2 sets of tasks"),
    ({"steps": 7}, f"{A}_s1: another number of steps"), ({}, f"{A}_s1: more than one row"),
])  # fmt: skip
def test_rows_of_no_one_study_are_refused(collected, change, said):
    rows = study["rows"](collected[1])
    if not change:
        rows.append({**rows[0], "value": 0.9})
    rows[0].update(change)
    collected[1].write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(SystemExit, match=re.escape(said)):
        study["judge"](*collected)


def test_the_page_of_the_five_conditions_says_what_its_rows_say():
    root = Path(__file__).parents[2]
    told = study["judge"](root / "examples/five-conditions/retrain.toml", root / "examples/five-conditions/rows.jsonl")
    page = (root / "docs/five-conditions.md").read_text(encoding="utf-8")
    cells = {line.split("|")[1].strip(" `"): line for line in page.splitlines() if line.startswith("| `")}
    assert list(cells) == [arm["label"] for arm in told["arms"]]
    assert (told["rows"], told["broke_off"], told["look"]) == (320, [], 1)
    for arm in told["arms"]:
        mean, low, high = (f"{100 * arm[key]:.1f}" for key in ("mean", "low", "high"))
        assert f"| {mean} % ({low} to {high}) |" in cells[arm["label"]]
    for found in told["comparisons"]:
        low, high = (f"{100 * found[end]:+.2f}" for end in ("low", "high"))
        assert f"| {100 * found['difference']:+.2f} | {low} to {high} |" in cells[found["label"]]
        assert cells[found["label"]].endswith(f"| {found['verdict']} |")
