"""The report in a real browser: it opens offline, its plots have marks, its filter filters, and hostile text stays text."""

from __future__ import annotations

import json
import os
import random
import runpy
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from retrain.cli.main import main

_made = runpy.run_path(str(Path(__file__).with_name("report_runs.py")))
fabricate, generation, HOSTILE = (_made[name] for name in ("fabricate", "generation", "HOSTILE"))

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))),
    None,
)
FLAGS = [
    "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update",
    "--disable-sync",
]  # fmt: skip


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium of this machine."""
    if CHROMIUM is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    api = pytest.importorskip("playwright.sync_api", reason="needs the playwright package")
    with api.sync_playwright() as playwright:
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=[*FLAGS, *sandbox])
        yield started
        started.close()


class Opened:
    """A page with everything that it asked for and complained about."""

    def __init__(self, browser, path, **options):
        self.requests, self.refused, self.complaints = [], [], []
        self.page = browser.new_page(**options)
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("requestfailed", lambda request: self.refused.append((request.url, request.failure)))
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.goto(path.as_uri())
        self.page.wait_for_selector("html[data-drawn]", state="attached")

    def count(self, selector):
        return self.page.locator(selector).count()

    def listed(self):
        """The first line of every rollout in the list."""
        return self.page.locator("#rollout-list button[data-number] .what").all_inner_texts()

    def clean(self, path):
        """Nothing but the file itself was asked for, and nothing complained."""
        assert self.requests == [path.as_uri()]
        assert self.complaints == []


def report(capsys, *arguments):
    """Run the command and return what it says as JSON."""
    assert main(["report", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A real run of the embedded model: three steps, two evaluations."""
    folder = tmp_path_factory.mktemp("trained")
    command = [
        sys.executable, "-m", "retrain", "demo", "--max-steps", "3", "--batch-size", "2", "--group-size", "8",
        "--eval-examples", "16", "--log-dir", "run", "--plain",
    ]  # fmt: skip
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder / "run"


def test_a_real_run_opens_offline_with_marks_in_every_plot(browser, trained, capsys):
    made = report(capsys, trained)
    path = Path(made["html"])
    assert path == trained / "report.html"
    opened = Opened(browser, path)
    assert opened.count(".plot") == made["plots"] >= 9
    for plot in opened.page.locator(".plot").all():
        marks = plot.locator(".scatterlayer path.js-line, .scatterlayer path.point, .barlayer .point path")
        assert marks.count() > 0, plot.get_attribute("id")
        assert all("NaN" not in (mark.get_attribute("d") or "") for mark in marks.all())
    assert opened.count("#plot-evaluation .errorbar path.yerror") == 2
    assert len(opened.listed()) == made["rollouts"] == 3 * 8
    rows = [json.loads(line) for line in (trained / "emergence/generations.jsonl").read_text().splitlines()]
    assert {row["correct"] for row in rows} <= {True, False}
    assert opened.count("#rollout-list .correct") == sum(row["correct"] for row in rows)
    assert "earlier version" not in opened.page.inner_text("#rollouts")
    text = opened.page.inner_text("#result")
    assert "3 of 3" in text
    assert "retrain/tiny" in text
    assert "95 % interval" in text
    opened.clean(path)


def test_a_real_rollout_shows_its_tokens_in_colour_and_their_numbers(browser, trained, capsys):
    path = Path(report(capsys, trained)["html"])
    rows = [json.loads(line) for line in (trained / "emergence/generations.jsonl").read_text().splitlines()]
    number = next(i for i, row in enumerate(rows) if len(set(row["credit"]["advantages"])) > 1)
    row = rows[number]
    opened = Opened(browser, path)
    opened.page.locator(f'#rollout-list [data-number="{number}"]').click()
    tokens = opened.page.locator(".tokens span[data-i]")
    assert tokens.count() == len(row["credit"]["texts"])
    shown = "".join(tokens.all_text_contents()).replace("↵\n", "\n").replace("·", "")
    assert shown == "".join(row["credit"]["texts"])

    def colours():
        return tokens.evaluate_all("spans => spans.map(s => s.style.backgroundColor)")

    by_advantage = colours()
    largest = max(range(len(by_advantage)), key=lambda i: abs(row["credit"]["advantages"][i]))
    blue_or_orange = "rgba(59, 130, 246, 0.55)", "rgba(232, 113, 10, 0.55)"
    assert by_advantage[largest] == blue_or_orange[row["credit"]["advantages"][largest] < 0]
    opened.page.check("input[value=logprobs]")
    assert colours() != by_advantage
    opened.page.check("input[value=uncertainty]")
    assert len(set(colours())) > 1
    tokens.nth(1).hover()
    readout = opened.page.inner_text(".readout")
    assert f"Token 2 of {len(row['credit']['texts'])}" in readout
    assert "logprob" in readout
    opened.page.focus(".tokens")
    opened.page.keyboard.press("ArrowRight")
    assert "Token 3 of" in opened.page.inner_text(".readout")
    opened.clean(path)


def test_the_filter_filters_by_everything_it_offers(browser, tmp_path, capsys):
    draw = random.Random(1)
    extra = [
        generation(
            3,
            90,
            draw,
            completion="Eureka </b> it is \\boxed{7}",
            reward=0.25,
            stop="length",
            skipped="all cut",
        ),
        generation(3, 91, draw, completion="nothing", reward=None, error="Traceback: boom", stop="error"),
    ]
    run = fabricate(tmp_path / "run", 6, generations=4, extra=extra)
    path = Path(report(capsys, run)["html"])
    opened = Opened(browser, path)
    everything = opened.listed()
    assert len(everything) == 6 * 4 + 2

    def after(**fields):
        opened.page.click("#filters button[type=reset]")
        for name, value in fields.items():
            element = opened.page.locator(f"#filters [name={name}]")
            if element.evaluate("e => e.tagName") == "SELECT":
                element.select_option(value)
            else:
                element.fill(value)
        opened.page.wait_for_timeout(250)
        found = opened.listed()
        assert opened.page.inner_text("#rollout-count") == f"{len(found)} of {len(everything)} rollouts"
        return found

    steps = after(**{"from": "2", "to": "3"})
    assert len(steps) == 2 * 4 + 2
    assert all(line.startswith(("step 2,", "step 3,")) for line in steps)
    right, wrong, failed = (after(verdict=v) for v in ("correct", "wrong", "failed"))
    assert all("correct 1" in line for line in right)
    assert len(right) + len(wrong) + len(failed) == len(everything)
    assert len(failed) == 1
    assert len(after(least="0.2", most="0.3")) == 1
    assert len(after(stop="length")) == 1
    assert len(after(skipped="all cut")) == 1
    assert len(after(skipped="trained")) == len(everything) - 1
    assert len(after(task="arithmetic/5")) == 4
    assert after(text="eureka </b>") == [line for line in everything if "#90" in line]
    assert after(text="no such words") == []
    assert len(after()) == len(everything)
    opened.page.locator("#rollout-list button").first.focus()
    opened.page.keyboard.press("ArrowDown")
    assert opened.page.locator('#rollout-list [aria-current="true"]').get_attribute("data-number") == "1"
    opened.page.keyboard.press("n")
    assert opened.page.locator('#rollout-list [aria-current="true"]').get_attribute("data-number") == "2"
    opened.page.keyboard.press("/")
    assert opened.page.evaluate("() => document.activeElement.name") == "text"
    opened.clean(path)


def test_hostile_text_stays_text(browser, tmp_path, capsys):
    draw = random.Random(2)
    evil = generation(
        0, 7, draw, completion=HOSTILE, prompt=HOSTILE, reference=HOSTILE, task=HOSTILE, stop=HOSTILE, skipped=HOSTILE,
        error=HOSTILE, parts={HOSTILE: 1.0},
    )  # fmt: skip
    whole = {**evil, "member": 8, "credit": None}
    config = (
        _made["CONFIG"]
        .format(steps=2)
        .replace('"retrain/tiny"', json.dumps("</title><script>window.owned=4</script>"))
    )
    events = f"2026-01-01 00:00:00,000 WARNING {HOSTILE.splitlines()[0]}\n"
    run = fabricate(
        tmp_path / "a<b>&\"'", 2, generations=1, extra=[evil, whole], config=config,
        events=events.encode("utf-8", "replace").decode(),
        facts={"facts": {HOSTILE: HOSTILE}, "origins": {"model.model": HOSTILE}},
    )  # fmt: skip
    path = Path(report(capsys, run)["html"])
    opened = Opened(browser, path)
    for number in (1, 2):
        opened.page.locator(f'#rollout-list [data-number="{number}"]').click()
        text = opened.page.inner_text("#rollout-opened")
        assert "</script><script>window.owned = 1</script><img src=x" in text
        assert "⟨U+202E⟩evil⟨U+202C⟩ ⟨U+0000⟩⟨U+001B⟩[31m⟨U+FEFF⟩⟨U+2028⟩ 日本語" in text
        assert "\u202e" not in opened.page.evaluate("() => document.body.innerText")
    assert opened.page.evaluate("() => window.owned") is None
    assert opened.count("img") == 0
    assert opened.count("main script") == 0
    assert "</title><script>window.owned=4</script>" in opened.page.inner_text("#result")
    twin = path.with_suffix(".md").read_text()
    assert "<script>" not in twin.replace("\\<", "")
    assert "\u202e" not in twin
    opened.clean(path)


def test_nothing_but_its_own_scripts_may_run_or_be_fetched(browser, tmp_path, capsys):
    path = Path(report(capsys, fabricate(tmp_path / "run", 2))["html"])
    text = path.read_text().replace(
        "</main>", '</main><script>window.owned = 1</script><img src="http://127.0.0.1:9/x.png">'
    )
    path.write_text(text)
    opened = Opened(browser, path)
    assert opened.page.evaluate("() => window.owned") is None
    assert opened.refused == [("http://127.0.0.1:9/x.png", "csp")]
    assert len(opened.complaints) == 2
    assert all("Content Security Policy" in line for line in opened.complaints)


def test_ten_thousand_steps(browser, tmp_path, capsys):
    run = fabricate(
        tmp_path / "run", 10_000, every=500, generations=2, tokens=100, spike=6000, suites=("hard",)
    )
    started = time.process_time()
    made = report(capsys, run)
    assert time.process_time() - started < 60
    path = Path(made["html"])
    assert path.stat().st_size == made["bytes"] < 15e6
    assert 500 < made["rollouts"] < made["rollouts_stored"] == 20_000
    assert made["alarms"] >= 1
    opened = Opened(browser, path)
    points = opened.page.evaluate(
        "() => document.getElementById('plot-correct_rate').data.map(t => t.x.length)"
    )
    assert points == [1000, 500]
    norms = opened.page.evaluate("() => document.getElementById('plot-grad_norm').data[0].y")
    assert max(norms) == 1000
    assert opened.count("#plot-grad_norm .shapelayer path") == 1
    assert opened.count("#plot-evaluation .errorbar") == 2 * 21
    note = opened.page.inner_text("#rollouts .note >> nth=0")
    assert f"{made['rollouts']:,} of 20,000 stored rollouts" in note
    assert "generations.jsonl" in note
    assert len(opened.listed()) == 100
    opened.page.locator("#rollout-list .more").click()
    assert len(opened.listed()) == 200
    opened.page.fill("#filters [name=from]", "9999")
    opened.page.wait_for_timeout(250)
    assert len(opened.listed()) == 2
    opened.clean(path)


@pytest.mark.parametrize("width", [360, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_and_can_be_read_in_both_schemes(browser, tmp_path, capsys, width, scheme):
    run = fabricate(tmp_path / "run", 30, every=10, spike=25)
    path = Path(report(capsys, run)["html"])
    opened = Opened(browser, path, viewport={"width": width, "height": 800}, color_scheme=scheme)
    assert opened.page.evaluate("() => document.documentElement.scrollWidth") <= width
    contrasts = opened.page.evaluate(_CONTRASTS)
    assert min(contrasts.values()) >= 4.5, contrasts
    nameless = opened.page.evaluate(
        "() => [...document.querySelectorAll('#filters input, #filters select')]"
        ".filter(e => !e.labels.length && !e.ariaLabel).length"
    )
    assert nameless == 0
    opened.clean(path)


_CONTRASTS = """() => {
  const channel = v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const parse = c => c.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  const behind = e => {
    const layers = [];
    for (; e; e = e.parentElement) layers.unshift(parse(getComputedStyle(e).backgroundColor));
    return layers.reduce((under, [r, g, b, a = 1]) => [r, g, b].map((v, i) => v * a + under[i] * (1 - a)), [255, 255, 255]);
  };
  const found = {};
  const all = "h1, h2, p, dt, dd, td, th, a, summary, figcaption, .list span, .tokens span, .readout, kbd, .xtick text, "
    + ".legendtext";
  for (const e of document.querySelectorAll(all)) {
    if (!e.textContent.trim() || !e.getClientRects().length) continue;
    const style = getComputedStyle(e);
    const [ink, back] = [light(parse(e.ownerSVGElement ? style.fill : style.color)), light(behind(e))];
    const ratio = (Math.max(ink, back) + 0.05) / (Math.min(ink, back) + 0.05);
    const name = `${e.tagName}.${e.getAttribute("class") ?? ""}`;
    found[name] = Math.min(found[name] ?? 99, ratio);
  }
  return found;
}"""


def test_several_runs_lie_over_each_other(browser, tmp_path, capsys):
    for seed in (1, 2, 3):
        config = _made["CONFIG"].format(steps=40).replace("seed = 42", f"seed = {seed}")
        fabricate(tmp_path / f"runs/seed{seed}", 40, every=20, seed=seed, config=config)
    made = report(capsys, tmp_path / "runs")
    path = Path(made["html"])
    assert path == tmp_path / "runs/report.html"
    opened = Opened(browser, path)
    assert opened.count("#runs tbody tr") == 3
    assert opened.count("#plot-correct_rate .scatterlayer path.js-line") == 3
    assert "training.seed" in opened.page.inner_text("#settings")
    assert "without statistics" in opened.page.inner_text("#runs")
    opened.clean(path)
