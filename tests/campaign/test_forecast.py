"""What is told before a campaign: counts, time, fit of the runs at once, and what its design can see."""

from __future__ import annotations

import json
import math
import os
import runpy
import statistics
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

from retrain import cards, machine
from retrain.campaign import forecast, plan, sight
from retrain.campaign.statistics import detectable
from retrain.cards import Device
from retrain.cli.main import main
from retrain.config.load import load
from retrain.errors import ConfigError

_made = runpy.run_path(str(Path(__file__).with_name("made_campaigns.py")))
write_campaign, declared, write_run = _made["write_campaign"], _made["declared"], _made["write_run"]

TINY = """\
[model]
model = "retrain/tiny"
lora_rank = 4
[backend]
devices = "cpu"
[data]
source = "arithmetic"
[training]
batch_size = 2
group_size = 4
max_tokens = 16
[eval]
source = "arithmetic"
examples = 8
[campaign]
seeds = [11, 12, 13, 14, 15, 16, 17, 18]
max_steps = 10
"""
BIG = (
    TINY.replace("retrain/tiny", "Qwen/Qwen3-4B-Instruct-2507")
    .replace('"cpu"', '"gpu:0"')
    .replace('"arithmetic"', '"gsm8k"')
)
GIB = 2**30


@pytest.fixture
def here(monkeypatch):
    """A machine of four cores and 16 GiB, without a GPU."""

    def make(gpus=(), gib=16):
        monkeypatch.setattr(machine, "usable_processors", lambda: 4.0)
        monkeypatch.setattr(cards, "_host_bytes", lambda: gib * GIB)
        monkeypatch.setattr(cards, "_swap_bytes", lambda: 0)
        monkeypatch.setattr(cards, "_cpu_flops", lambda: 100e9)
        monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
        monkeypatch.setattr(cards, "visible", lambda: [str(i) for i in range(len(gpus))])
        monkeypatch.setattr(cards, "_cuda", lambda index: gpus[index] if index < len(gpus) else None)
        monkeypatch.setenv("OMP_NUM_THREADS", "4")
        monkeypatch.delenv("RAY_ADDRESS", raising=False)

    make()
    return make


def planned(text, **more):
    path = tomllib.loads(text)
    path["campaign"].update(more)
    return plan.plan(plan.anchored(load(path)), name="c")


def told(text, **more):
    return forecast.forecast(planned(text, **more))


def said(text, **more):
    design = planned(text, **more)
    return " ".join(forecast.lines(forecast.forecast(design), design.loaded.config))


def test_runs_steps_and_time_add_up(here):
    one_by_one, at_once = told(TINY), told(TINY, parallel=True, max_workers=2, threads=1)
    assert (one_by_one.runs, one_by_one.steps, one_by_one.workers, one_by_one.threads) == (40, 10, 1, 4)
    assert (at_once.runs, at_once.workers, at_once.threads, at_once.devices) == (40, 2, 1, 0)
    assert one_by_one.wall.low == pytest.approx(one_by_one.spent.low)
    assert one_by_one.wall.high == pytest.approx(one_by_one.spent.high)
    # Equal runs, an even number of them: two at once take half, and a run of one thread at least as long as one of four.
    assert at_once.wall.low == pytest.approx(at_once.spent.low / 2, rel=1e-6)
    assert at_once.spent.low >= one_by_one.spent.low
    rollouts = 40 * (10 * 2 * 4 + 2 * 8)
    assert at_once.tokens.high == rollouts * 16
    late = told(TINY, parallel=True, max_workers=2, threads=1, stagger_seconds=100.0)
    assert late.wall.low >= 39 * 100


def test_every_process_has_to_start_and_those_that_start_together_wait_for_each_other(here):
    alone = told(TINY)
    assert alone.start.low >= forecast._START.low
    assert alone.wall.low >= 40 * alone.start.low
    assert alone.wall.high >= 40 * alone.start.high
    # Twelve at once on four processors: each import takes three times as long, at the least and at the most.
    many = told(TINY, launcher="processes", max_workers=12, threads=1)
    few = told(TINY, launcher="processes", max_workers=4, threads=1)
    weights = forecast._starts(many.estimates, 1.0, 1.0)["grpo+none"].low - forecast._START.low
    assert few.start.low == pytest.approx(alone.start.low)
    assert many.start.low - weights == pytest.approx(3 * forecast._START.low)
    assert many.start.high == pytest.approx(few.start.high + 2 * forecast._START.high)
    # Four rounds of twelve, ten of four.
    assert many.wall.low >= 4 * many.start.low
    text = said(TINY, launcher="processes", max_workers=12, threads=1)
    assert "In it each of 40 processes takes 9 s to 45 s to start with 12 at once (imports, weights)" in text
    trials = said(TINY, tune={"lr": [1e-4, 1e-3], "seeds": [1], "max_steps": 5})
    assert "In it each of 50 processes takes 3 s to 15 s to start (imports" in trials
    assert forecast.record(many)["start"]["high"] == pytest.approx(many.start.high, rel=0.01)
    assert told(TINY.replace("retrain/tiny", "somebody/else")).start is None


def test_a_busy_machine_is_told_with_what_it_makes_of_the_times(here, monkeypatch):
    monkeypatch.setattr(os, "getloadavg", lambda: (10.0, 0.0, 0.0))
    busy = "Other programs use the processors now (load 10.0 on 4): the times are those of an idle machine, and about 3.0 times"
    assert busy in said(TINY, launcher="processes", max_workers=2, threads=1)
    monkeypatch.setattr(os, "getloadavg", lambda: (0.5, 0.0, 0.0))
    assert "Other programs" not in said(TINY, launcher="processes", max_workers=2, threads=1)


def test_trials_are_counted_with_their_own_steps(here):
    found = told(TINY, tune={"lr": [1e-4, 1e-3], "seeds": [1, 2, 3], "max_steps": 5})
    assert (found.trials, found.trial_steps) == (5 * 2 * 3, 5)
    assert found.tokens.high == 16 * (40 * (80 + 16) + 30 * (40 + 16))
    assert found.spent.low > told(TINY).spent.low


def test_times_of_places():
    assert forecast._makespan([3, 1, 1, 1], 2, 0) == 3
    assert forecast._makespan([1, 1, 1], 2, 0) == 2
    assert forecast._makespan([1, 1, 1], 3, 2) == 5
    assert forecast._makespan([], 2, 0) == 0


def test_runs_at_once_are_as_many_as_the_memory_holds(here):
    assert told(TINY, parallel=True).workers == 4
    here(gib=1)
    found = told(TINY, parallel=True)
    # 478 MiB each.
    assert found.workers == 2
    assert forecast.workers(planned(TINY, parallel=True)) == 2
    assert "2 runs at once, not 4: more do not fit the memory." in found.announced


def test_answers_that_no_run_has_positions_for_are_refused_before_any_begins(here):
    design = planned(TINY.replace("max_tokens = 16", "max_tokens = 2048"))
    with pytest.raises(ConfigError, match=r"condition grpo\+none: .*max_tokens = 2048 does not fit: .* has 512 positions"):
        forecast.refuse_unfit(design, forecast.forecast(design))


def test_too_many_runs_at_once_are_refused_with_a_number_that_fits(here, tmp_path):
    here(gib=1)
    path = tmp_path / "c.toml"
    path.write_text(TINY + 'launcher = "processes"\nmax_workers = 9\n')
    design = plan.plan(plan.anchored(load(path)), name="c")
    with pytest.raises(ConfigError) as caught:
        forecast.refuse_unfit(design, forecast.forecast(design))
    text = str(caught.value)
    assert text.startswith(f"{path}:19: 9 runs at once do not fit: 9 of them share CPU with 1.0 GiB")
    most = int(text.split("campaign.max_workers to at most ")[1].split(",")[0])
    design = planned(TINY, launcher="processes", max_workers=most)
    found = forecast.forecast(design)
    forecast.refuse_unfit(design, found)
    # They run for certain, and perhaps not at their peak.
    assert any("one may run out" in line for line in found.announced)


def test_runs_on_gpus(here):
    def card(gib):
        return Device("H100", "cuda", gib * GIB, 989e12, 67e12, 3350e9, True, "data sheet")

    here(gpus=(card(79), card(40)))
    alone = told(BIG)
    assert (alone.workers, alone.device.bytes) == (1, 79 * GIB)
    both = told(BIG, launcher="processes")
    assert (both.workers, both.devices, both.room.together, both.threads) == (2, 2, 1, 2)
    assert both.device.bytes == 40 * GIB  # the weakest decides
    crowded = told(BIG, launcher="processes", max_workers=4)
    assert crowded.room.together == 2
    assert any("4 runs at once share 2 GPUs" in line for line in crowded.announced)
    design = planned(BIG, launcher="processes", max_workers=40)
    with pytest.raises(ConfigError, match="20 of them share H100"):
        forecast.refuse_unfit(design, forecast.forecast(design))
    here(gpus=(card(4),))
    design = planned(BIG, launcher="processes")
    with pytest.raises(ConfigError, match=r"condition grpo\+none: this run cannot fit on H100 with 4\.0 GiB"):
        forecast.refuse_unfit(design, forecast.forecast(design))


def test_threads_beyond_the_cores_are_announced(here):
    assert "4 runs of 3 threads on 4 processors wait for each other." in said(
        TINY, launcher="processes", max_workers=4, threads=3
    )
    assert "wait for each other" not in said(TINY, launcher="processes", max_workers=4, threads=1)


def test_a_model_that_is_not_here_leaves_time_open_and_nothing_else(here):
    found = told(TINY.replace("retrain/tiny", "somebody/else"))
    assert (found.wall, found.room, found.runs) == (None, None, 40)
    assert "not on this machine" in found.unknown[0]
    json.dumps(forecast.record(found), allow_nan=False)


def test_of_ray_nodes_elsewhere_nothing_is_claimed(here):
    here(gib=1)
    small = TINY.replace("retrain/tiny", "Qwen/Qwen3-4B-Instruct-2507").replace('"arithmetic"', '"gsm8k"')
    alone, theirs = planned(small, launcher="ray"), planned(small, launcher="ray", ray_address="10.0.0.5:6379")
    with pytest.raises(ConfigError, match="this run cannot fit on CPU"):
        forecast.refuse_unfit(alone, forecast.forecast(alone))
    found = forecast.forecast(theirs)
    forecast.refuse_unfit(theirs, found)
    assert "The devices of the Ray cluster: time and memory are those of CPU here." in found.unknown


def test_ray_on_a_machine_without_a_gpu_tells_that_it_uses_the_cpu(here):
    missing = "none was found here for gpu:0; a run without one uses the CPU."
    assert missing in told(BIG, launcher="ray").announced
    assert missing not in told(BIG, launcher="ray", ray_address="10.0.0.5:6379").announced


def test_ray_decides_by_itself(here):
    found = told(TINY, launcher="ray")
    assert (found.wall, found.room) == (None, None)
    assert any("Ray cluster decides" in line for line in found.unknown)


def test_a_stated_deviation_gives_the_smallest_difference(here):
    seen = told(TINY, deviation=0.02).sight
    assert seen.level == pytest.approx(0.05 / 4)
    assert seen.difference == pytest.approx(detectable(0.02, 8, 0.0125))
    assert seen.seeds_needed is not None
    assert (
        detectable(0.02, seen.seeds_needed, 0.0125) <= 0.02 < detectable(0.02, seen.seeds_needed - 1, 0.0125)
    )
    text = said(TINY, deviation=0.02)
    assert f"differences of at least {100 * seen.difference:.2g} points" in text
    assert f"that takes {seen.seeds_needed} seeds" in text
    paired = told(TINY, deviation=0.02, test="paired").sight
    assert paired.difference == pytest.approx(detectable(0.02 * math.sqrt(2), 8, 0.0125, paired=True))


def test_without_a_deviation_it_is_told_in_deviations(here):
    seen = told(TINY).sight
    assert (seen.difference, seen.equivalence, seen.seeds_needed) == (None, None, None)
    assert seen.deviations == pytest.approx(detectable(1.0, 8, 0.0125))
    assert f"{seen.deviations:.2f} standard deviations over seeds" in said(TINY)
    # What the equivalence needs, found again by stating it.
    at = told(TINY, deviation=round(seen.equivalence_at, 6)).sight
    assert at.equivalence == pytest.approx(0.8, abs=0.001)


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"seeds": [1, 2, 3, 4]}, "4 seeds: the exact sign-flip test cannot give a p below 0.125"),
        ({"seeds": [1, 2]}, "2 seeds: the exact sign-flip test cannot give a p below 0.5"),
        ({"seeds": [1]}, "1 seed an arm: no variance can be estimated, so no verdict is possible."),
        ({"deviation": 0.05}, "Equivalence within 2 points would be shown almost never"),
        ({"looks": [2, 8]}, "The look at 2 seeds is judged at 0.00625"),
        ({"looks": [4, 5, 6, 7, 8]}, "5 looks share alpha: the last one sees differences"),
        ({"conditions": [{"lr": 1e-3}]}, "One condition has nothing to be compared with"),
    ],
)
def test_designs_that_cannot_show_what_they_are_for_are_named(here, more, expected):
    assert expected in said(TINY, **more)


def test_a_good_design_is_not_scolded(here):
    found = told(TINY, deviation=0.005)
    assert found.sight.shortfalls == ()
    assert "not seen reliably" not in said(TINY, deviation=0.005)


def test_a_pilot_campaign_gives_its_pooled_deviation(here, tmp_path):
    values = {("grpo+none", seed): 0.4 + 0.01 * i for i, seed in enumerate((1, 2, 3))}
    values |= {("maxrl+none", seed): 0.5 + 0.02 * i for i, seed in enumerate((1, 2, 3))}
    design = declared(conditions=("grpo+none", "maxrl+none"), seeds=(1, 2, 3), steps=10)
    pilot = write_campaign(tmp_path / "pilot", design, values=values)
    seen = told(TINY, pilot=str(pilot)).sight
    assert seen.deviation.value == pytest.approx(math.sqrt((0.01**2 + 0.02**2) / 2))
    assert seen.deviation.source == "of 6 runs of the pilot"
    assert seen.deviation.low < seen.deviation.value < seen.deviation.high
    # 256 tasks there, 8 here: what evaluation alone adds is another.
    assert "The pilot's runs have 256 held-out tasks, those of this campaign 8." in seen.deviation.notes
    paired = told(TINY, pilot=str(pilot), test="paired").sight
    gaps = [0.1, 0.11, 0.12]
    assert paired.deviation.value == pytest.approx(statistics.stdev(gaps))
    assert "3 pairs" in paired.deviation.source


def test_a_pilot_may_be_a_folder_of_runs(here, tmp_path):
    for seed, value in ((1, 0.4), (2, 0.44), (3, 0.42)):
        write_run(
            tmp_path / f"runs/{seed}",
            "grpo+none",
            seed,
            10,
            10,
            "done",
            0.5,
            0,
            5,
            {},
            value,
            "eval/accuracy",
        )
        (tmp_path / f"runs/{seed}/config.toml").write_text(
            f"[training]\nseed = {seed}\nlr = 0.1\n[logging]\nlog_dir = '{seed}'\n"
        )
    # Another learning rate is another condition, and one run alone has no deviation.
    write_run(tmp_path / "runs/4", "grpo+none", 4, 10, 10, "done", 0.5, 0, 5, {}, 0.9, "eval/accuracy")
    (tmp_path / "runs/4/config.toml").write_text("[training]\nseed = 4\nlr = 0.2\n")
    seen = told(TINY, pilot=str(tmp_path / "runs")).sight
    assert seen.deviation.value == pytest.approx(statistics.stdev([0.4, 0.44, 0.42]))
    assert seen.deviation.source == "of 3 runs of the pilot"


def test_a_pilot_that_says_nothing_is_refused(here, tmp_path):
    with pytest.raises(ConfigError, match=r"there is no such folder\. Fix: "):
        told(TINY, pilot=str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds no two runs of one condition that are done"):
        told(TINY, pilot=str(tmp_path / "empty"))


def test_a_pilot_beside_the_toml_is_found(here, tmp_path, monkeypatch):
    values = {(label, seed): 0.4 + 0.01 * seed for label in ("grpo+none", "maxrl+none") for seed in (1, 2)}
    write_campaign(
        tmp_path / "there/pilot",
        declared(conditions=("grpo+none", "maxrl+none"), seeds=(1, 2), steps=10),
        values=values,
    )
    (tmp_path / "there/c.toml").write_text(TINY + 'pilot = "pilot"\n')
    monkeypatch.chdir(tmp_path)
    design = plan.plan(plan.anchored(load(tmp_path / "there/c.toml")), name="c")
    assert design.campaign.pilot == str(tmp_path / "there/pilot")
    assert sight.deviation(design).value == pytest.approx(float(np.std([0.41, 0.42], ddof=1)))


def test_explain_tells_it(here, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("c.toml").write_text(TINY + "deviation = 0.02\n")
    assert main(["explain", "c.toml", "--json", "--max-workers", "2", "--launcher", "processes"]) == 0
    found = json.loads(capsys.readouterr().out)["campaign"]
    assert (found["runs"], found["workers"], found["sees"]["comparisons"]) == (40, 2, 4)
    assert found["sees"]["difference"] == pytest.approx(detectable(0.02, 8, 0.0125))
    assert main(["explain", "c.toml"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 100
    assert "5 conditions x 8 seeds = 40 runs of 10 steps" in text
    assert "logs/campaign_<time>: a new campaign" in text
    here(gib=1)
    assert main(["explain", "c.toml", "--max-workers", "9", "--launcher", "processes"]) == 2
    got = capsys.readouterr()
    assert "9 runs at once do not fit" in got.err
    assert "40 runs" in got.out


def test_explain_of_a_campaign_needs_no_torch(tmp_path):
    (tmp_path / "c.toml").write_text(TINY)
    code = (
        "import sys; from retrain.cli.main import main; code = main(['explain', 'c.toml', '--json']); "
        "assert code == 0; assert not {'torch', 'transformers', 'peft', 'ray', 'scipy.optimize'} & set(sys.modules)"
    )
    subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=120, stdout=subprocess.DEVNULL
    )
