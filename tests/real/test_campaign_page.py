"""A campaign's report in a real browser, and of a campaign that really ran."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from retrain.cli.main import main

_page = runpy.run_path(str(Path(__file__).with_name("test_report.py")))
browser, Opened, _CONTRASTS = _page["browser"], _page["Opened"], _page["_CONTRASTS"]
_made = runpy.run_path(str(Path(__file__).parents[1] / "campaign/made_campaigns.py"))
declared, write_campaign, FIVE, SEEDS = (_made[k] for k in ("declared", "write_campaign", "FIVE", "SEEDS"))
EFFECTS = (0.0, 0.06, 0.005, -0.05, 0.02)


def report(capsys, *arguments):
    """Run the command and return what it says as JSON."""
    assert main(["report", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def opened(browser, tmp_path, capsys):
    """The page of five conditions by eight seeds, one of which failed, opened with the options asked for."""
    states = {("maxrl+gtpo", 202): ("failed", 25)}
    campaign = write_campaign(tmp_path / "full", declared(threshold=0.35), effects=EFFECTS, states=states)
    path = Path(report(capsys, campaign)["html"])

    def open_(**options):
        page = Opened(browser, path, **options)
        page.path = path
        return page

    return open_


def test_the_forest_has_the_intervals_the_margin_and_the_verdicts(opened):
    page = opened()
    assert page.count("#plot-forest .errorbar path.xerror") == 4
    texts = page.page.locator("#plot-forest .annotation-text").all_text_contents()
    assert [text.split(":")[0] for text in texts] == list(FIVE[1:])
    assert "improvement, +" in texts[0]
    assert "degradation, \u2212" in texts[2]
    shapes = page.page.evaluate("() => document.getElementById('plot-forest').layout.shapes.map(s => [s.type, s.x0, s.x1])")
    assert shapes == [["rect", -2, 2], ["line", 0, 0]]
    assert page.count("#plot-forest .shapelayer path") == 2
    assert page.count("#plot-strip .scatterlayer path.point") == 40 + 5
    page.clean(page.path)


def test_colours_are_one_per_condition_and_single_seeds_come_on_demand(opened):
    page = opened()
    colours = page.page.evaluate(
        "() => ['plot-outcome', 'plot-correct_rate', 'plot-entropy_mean'].map(id => Object.fromEntries("
        "document.getElementById(id).data.filter(t => t.mode.startsWith('lines') && t.name && t.name.includes('+'))"
        ".map(t => [t.name, t.line.color])))"
    )
    assert colours[0] == colours[1] == colours[2]
    assert list(colours[0]) == list(FIVE)
    assert len(set(colours[0].values())) == 5
    lines = "#plot-outcome .scatterlayer path.js-line"
    before = page.count(lines)
    page.page.locator("#plot-outcome .legendtoggle").first.click()
    page.page.wait_for_function(f"() => document.querySelectorAll('{lines}').length > {before}")
    assert page.count(lines) >= before + 5


@pytest.mark.parametrize("width", [400, 1200])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_and_can_be_read_in_both_schemes(opened, width, scheme):
    page = opened(viewport={"width": width, "height": 900}, color_scheme=scheme)
    assert page.page.evaluate("() => document.documentElement.scrollWidth") <= width
    contrasts = page.page.evaluate(_CONTRASTS.replace('".legendtext"', '".legendtext, .annotation-text, .alarms strong"'))
    assert min(contrasts.values()) >= 4.5, contrasts
    cut = page.page.evaluate(
        "() => [...document.querySelectorAll('#comparison .annotation-text')].filter(t => { const a = t.getBoundingClientRect(), "
        "b = t.closest('.plot').getBoundingClientRect(); return a.left < b.left || a.right > b.right; }).length"
    )
    assert cut == 0
    page.clean(page.path)


def test_labels_with_markup_stay_text(browser, tmp_path, capsys):
    evil = "grpo+</script><script>window.owned=1</script><img src=x onerror=window.owned=2>"
    design = declared(("grpo+none", "maxrl+none"), seeds=SEEDS[:2])
    # No configuration makes such a label; a manifest by another hand might.
    settings = {"grpo+none": {"a.b": evil}, "maxrl+none": {"a.b": "<b>"}}
    changed = replace(design, conditions=settings, name=evil)
    path = Path(report(capsys, write_campaign(tmp_path / "c", changed))["html"])
    page = Opened(browser, path)
    assert page.page.evaluate("() => window.owned") is None
    assert page.count("main img") == 0
    assert "</script><script>window.owned=1" in page.page.inner_text("#settings")
    page.clean(path)


def test_a_label_with_markup_is_no_markup_in_a_plot():
    from retrain.campaign.figures import named

    assert named("<b>x</b>&\u202e") == "&lt;b&gt;x&lt;/b&gt;&amp;\u27e8U+202E\u27e9"


CAMPAIGN = """\
[model]
model = "retrain/tiny"
[backend]
devices = "cpu"
[data]
source = "arithmetic"
levels = [1]
[reward]
type = "match"
[training]
batch_size = 2
group_size = 4
max_tokens = 24
[eval]
source = "arithmetic"
examples = 16
[campaign]
seeds = [1, 2]
max_steps = 2
launcher = "processes"
max_workers = 2
threads = 1
[[campaign.conditions]]
advantage_mode = "grpo"
transform_mode = "none"
[[campaign.conditions]]
advantage_mode = "maxrl"
transform_mode = "none"
"""


@pytest.mark.slow
def test_a_campaign_that_ran_has_a_report_and_a_status(browser, tmp_path, capsys):
    (tmp_path / "campaign.toml").write_text(CAMPAIGN)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "retrain", "campaign.toml", "--plain"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    (campaign,) = (tmp_path / "logs").iterdir()
    assert main(["status", str(campaign)]) == 0
    assert "4 of 4 runs done" in capsys.readouterr().out
    made = report(capsys, campaign)
    assert made["counts"] == {"done": 4}
    assert made["look"] == 1
    assert [c["label"] for c in made["analysis"]["comparisons"]] == ["maxrl+none"]
    # Only the code of this checkout may have changed meanwhile; the runs saw the same tasks, versions and machine.
    assert not [w for w in made["warnings"] if "code" not in w and "sign-flip" not in w]
    assert all(run["tokens"] > 0 and run["seconds"] > 0 and run["process"]["peak_bytes"] > 1e8 for run in made["runs"])
    evaluated = [
        json.loads(line)["eval/accuracy"]
        for line in (campaign / "runs/maxrl+none_s2/metrics.jsonl").read_text().splitlines()
        if "eval/accuracy" in line
    ]
    run = next(r for r in made["runs"] if r["name"] == "maxrl+none_s2")
    assert run["value"] == evaluated[-1]
    path = Path(made["html"])
    page = Opened(browser, path)
    assert page.count(".plot") == made["plots"]
    assert page.count("#plot-forest") == 1
    assert "arithmetic" in page.page.inner_text("#design")
    page.clean(path)
