"""The controller against simulated systems: p* found, intervals honest, one doubling at most, drift and memory respected;
and its other senses, a server's queue and the roof, on fakes."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrain.config.load import load
from retrain.config.schema import Backpressure
from retrain.errors import ConfigError
from retrain.roofline import Peaks, Shape, decode, prefill
from retrain.training import backpressure
from retrain.training.backpressure import BackPressure, Roof, build, sweep_sizes
from retrain.types import Sampled

BENCHES = Path(__file__).resolve().parents[2] / "benches"
if not BENCHES.is_dir():
    pytest.skip("benches are part of the repository only", allow_module_level=True)
sys.path.insert(0, str(BENCHES))

import usl_simulation as simulation  # noqa: E402

GROUP = simulation.GROUP
SHAPE = Shape(hidden=64, layers=2, heads=4, kv_heads=2, head_dim=16, intermediate=128, vocab=100, tied=True)


def controller(start: int = 1, roof: Roof | None = None, **values: Any) -> BackPressure:
    return BackPressure(Backpressure(enabled=True, **values), batch_size=start, group_size=GROUP, roof=roof)


def seen(size: int, rate: float = 100.0, **more: Any) -> Sampled:
    return Sampled(size, GROUP, 1000, 1000 / rate, **more)


def test_random_systems_small() -> None:
    found = simulation.many(40, seed=5)
    assert found["p_star_error"]["median"] < 0.1
    assert found["largest_growth"] <= 2
    assert min(found["coverage_of_95"].values()) >= 0.84  # 0.95 - 3 standard errors of 40
    assert found["throughput_of_best"]["p10"] > 0.9


def test_the_stored_figures_are_those_that_are_stated() -> None:
    stored = json.loads((BENCHES / "results" / "usl_simulation.json").read_text())
    assert stored["systems"]["systems"] == 200
    assert stored["systems"]["noise"] == 0.05
    assert stored["systems"]["p_star_error"]["median"] < 0.1
    for part in (stored["systems"], stored["systems_at_10_percent_noise"], stored["fixed_design"]):
        assert all(0.9 <= share <= 0.99 for share in part["coverage_of_95"].values())
    assert stored["systems"]["largest_growth"] <= 2
    assert stored["kappa_0"]["stayed_at_the_ceiling"] >= 0.99
    assert stored["memory"]["times_memory_ran_out"]["most"] == 1
    for way in ("falls", "rises"):
        assert stored["drift"][way]["throughput_of_best"]["p10"] > 0.9


def test_without_kappa_it_grows_to_the_ceiling_and_stays() -> None:
    for sigma in (0.0, 0.05):
        sizes = [s.size for s in simulation.run(simulation.System(sigma, 0.0), 120, seed=2)]
        assert set(sizes[14:]) == {64}


@pytest.mark.parametrize(("before", "after"), [(250.0, 60.0), (100.0, 400.0)])
def test_a_system_that_drifts_is_followed(before: float, after: float) -> None:
    def system(step: int) -> simulation.System:
        return simulation.System(0.01, 0.99 / (before if step < 80 else after) ** 2)

    made = list(simulation.run(system, 130, seed=1))
    assert not any(s.metrics["bp_drifted"] for s in made[:80])
    alarm = next(i for i, s in enumerate(made) if s.metrics["bp_drifted"])
    assert 80 <= alarm <= 95
    for at, star in ((60, before), (129, after)):
        assert made[at].metrics["bp_p_star"] == pytest.approx(star, rel=0.25)
        best = max(system(at).at(size) for size in range(1, 65))
        assert system(at).at(made[at].size) > 0.9 * best
    assert simulation.doublings([s.size for s in made]) <= 2


def test_a_memory_ceiling_is_found_once_and_respected() -> None:
    made = list(simulation.run(simulation.System(0.01, 0.0, memory=23), 100, seed=3))
    assert [size for s in made for size in s.ran_out] == [32]
    first = next(i for i, s in enumerate(made) if s.ran_out)
    assert all(s.size <= 16 for s in made[first:])
    assert {s.metrics["bp_ceiling"] for s in made[first:]} == {16}
    assert made[first].metrics["bp_out_of_memory"] == 1


@given(st.integers(0, 10**6), st.integers(1, 64), st.integers(1, 64), st.integers(0, 20), st.booleans())
@settings(max_examples=25, deadline=None)
def test_whatever_happens_sizes_keep_their_limits(seed: int, start: int, least: int, warmup: int, queued: bool) -> None:
    """Garbage in place of a system: no law, silent steps, no tokens, memory that runs out at random, a server's queue."""
    rng = np.random.default_rng(seed)
    made = controller(start, warmup_steps=warmup, min_batch_size=least, max_batch_size=64)
    before, ceiling = 0, 64
    for _ in range(60):
        size = made.next()
        assert 1 <= size <= ceiling
        assert not before or size <= 2 * before
        if rng.random() < 0.05:
            smaller = made.out_of_memory(size)
            assert smaller == (max(least, size // 2) if size > least else 0)
            if smaller:
                size = ceiling = smaller
        queue = {"running": 5, "waiting": int(rng.integers(0, 9)), "kv_use": float(rng.random())} if queued else {}
        tokens = int(rng.integers(0, 3)) * int(rng.integers(1, 1000))
        metrics = made.observe(
            Sampled(size, GROUP, tokens, float(rng.random()), skipped=bool(rng.random() < 0.3), queue=queue)
        )
        assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics
        assert metrics["bp_batch_size"] == made.next()
        before = size
        state = json.loads(json.dumps(made.state_dict()))
        made = controller(start, warmup_steps=warmup, min_batch_size=least, max_batch_size=64)
        made.load_state_dict(state)
        if rng.random() < 0.7:
            made._cold = False  # pyright: ignore[reportPrivateUsage]


def test_a_resumed_controller_decides_as_the_one_that_went_on() -> None:
    system = simulation.System(0.02, 1e-4)
    one = controller()
    for step in range(40):
        size = one.next()
        one.observe(seen(size, system.at(size) * (1.03 if step % 2 else 0.97)))
        if step == 20:
            two = controller()
            two.load_state_dict(json.loads(json.dumps(one.state_dict())))
            two._cold = False  # pyright: ignore[reportPrivateUsage]
        if step > 20:
            assert two.next() == size
            two.observe(seen(size, system.at(size) * (1.03 if step % 2 else 0.97)))
    assert two.state_dict() == one.state_dict()


def test_the_first_step_of_a_process_and_steps_without_signal_stay_out_of_the_fit() -> None:
    made = controller()
    first = made.observe(seen(1, 3.0))
    assert (first["bp_action"], first["bp_throughput"]) == ("warm-up", None)
    made.observe(seen(1, 50.0, skipped=True))
    made.observe(seen(1, 60.0))
    assert np.array(made.state_dict()["points"]) == pytest.approx(np.array([[GROUP, 60.0]]))


def test_a_step_in_which_memory_ran_out_enters_neither_fit_nor_average() -> None:
    made = controller(8)
    made.observe(seen(1, 3.0))
    made.out_of_memory(8)
    found = made.observe(seen(8, 400.0))
    assert (found["bp_out_of_memory"], found["bp_throughput"]) == (1, None)
    assert made.observe(seen(4, 300.0, put_back=4))["bp_throughput"] is None
    assert made.state_dict()["points"] == []
    assert made.observe(seen(4, 200.0))["bp_throughput"] == pytest.approx(200.0)
    assert len(made.state_dict()["points"]) == 1


@pytest.mark.parametrize("warmup", [1, 2, 3])
def test_fewer_than_four_steps_of_warm_up_act_as_four(warmup: int) -> None:
    short, four = controller(warmup_steps=warmup), controller(warmup_steps=4)
    for _ in range(8):
        assert short.observe(seen(short.next(), 50.0)) == four.observe(seen(four.next(), 50.0))
    description = Backpressure.model_fields["warmup_steps"].description
    assert description is not None
    assert "1 to 3 act as 4" in description


def test_the_moving_average_smooths_what_is_shown_and_nothing_else() -> None:
    made = controller(ema_decay=0.5)
    made.observe(seen(1, 3.0))
    made.observe(seen(1, 100.0))
    assert made.observe(seen(1, 200.0))["bp_throughput"] == pytest.approx(150.0)
    assert np.array(made.state_dict()["points"]) == pytest.approx(np.array([[GROUP, 100.0], [GROUP, 200.0]]))


def test_rules_above_and_below_the_target_on_exact_data() -> None:
    """p* = 99: the target is 10 tasks; above it is throttled, below half of it grown, and between held."""
    system = simulation.System(0.02, 1e-4)
    made = controller(8, warmup_steps=10)
    for _ in range(11):
        made.observe(seen(made.next(), system.at(made.next())))
    assert made.next() == 10
    for now, action, size in ((20, "throttle", 10), (10, "hold", 10), (6, "hold", 6), (4, "grow", 8), (1, "grow", 2)):
        metrics = made.observe(seen(now, system.at(now)))
        assert (now, metrics["bp_action"], metrics["bp_batch_size"]) == (now, action, size)
        assert metrics["bp_p_star"] == pytest.approx(98.99, rel=1e-3)


@pytest.mark.parametrize(
    ("least", "most", "start", "sizes"),
    [
        (1, 64, 1, [1, 2, 4, 8, 16, 32, 64]),
        (1, 64, 8, [8, 16, 32, 64]),
        (1, 64, 64, [8, 16, 32, 64]),
        (1, 48, 1, [1, 2, 4, 8, 16, 32, 48]),
        (4, 64, 1, [4, 8, 16, 32, 64]),
        (8, 16, 8, [8, 10, 13, 16]),
        (1, 3, 1, [1, 2, 3]),
        (5, 5, 9, [5]),
        (1, 2, 1, [1, 2]),
    ],
)
def test_a_sweep_goes_up_by_doublings(least: int, most: int, start: int, sizes: list[int]) -> None:
    assert sweep_sizes(least, most, start) == sizes


def test_a_sweep_does_not_go_on_far_beyond_the_peak() -> None:
    system = simulation.System(0.01, 0.99 / 20.0**2)
    sizes = [s.size for s in simulation.run(system, 12, seed=0, warmup_steps=14)]
    assert max(sizes) == 16
    assert sizes[-1] < 16


def test_a_sweep_of_silent_steps_is_made_once_more_and_no_oftener() -> None:
    made = controller(max_batch_size=8, warmup_steps=4)
    sizes = []
    for _ in range(30):
        sizes.append(made.next())
        made.observe(seen(sizes[-1], skipped=True))
    assert sizes.count(1) == 3
    assert set(sizes[12:]) == {8}


def test_without_a_fit_a_queue_is_followed_additively_up_and_halved() -> None:
    made = controller(8, warmup_steps=10, max_batch_size=64)
    calm, full = {"running": 64, "waiting": 0, "kv_use": 0.3}, {"running": 64, "waiting": 0, "kv_use": 0.95}
    start = made.next()
    made.observe(seen(start, queue=calm))
    sizes = [made.next()]
    for queue in (calm, calm, full, calm, {**calm, "preemptions": 1}, {"waiting": 9, "running": 3}):
        metrics = made.observe(seen(made.next(), queue=queue))
        sizes.append(metrics["bp_batch_size"])
    assert sizes == [start, start + 1, start + 2, (start + 2) // 2, (start + 2) // 2 + 1, ((start + 2) // 2 + 1) // 2, 1]


def test_a_full_queue_keeps_a_fit_from_growing() -> None:
    system = simulation.System(0.02, 1e-4)
    made = controller(8)
    for _ in range(12):
        made.observe(seen(made.next(), system.at(made.next())))
    assert made.observe(seen(2, system.at(2)))["bp_action"] == "grow"
    assert made.observe(seen(2, system.at(2), queue={"kv_use": 0.99}))["bp_action"] == "hold"


def test_the_regime_is_the_peak_that_sampling_came_closer_to() -> None:
    rows = [(10, 20)] * GROUP
    work = sum(decode(SHAPE, [10] * GROUP, [20] * GROUP, 4), prefill(SHAPE, [10], 4))
    for peaks, regime, share in (
        (Peaks(work.flops, 10 * work.bytes), "compute", 0.5),
        (Peaks(10 * work.flops, work.bytes), "memory", 0.5),
        (Peaks(work.flops, 0.0), None, 0.5),
        (Peaks(0.0, 4 * work.bytes), None, 0.125),
    ):
        metrics = controller(roof=Roof(SHAPE, 4, 0, peaks)).observe(Sampled(1, GROUP, 160, 2.0, rows=rows))
        assert metrics["bp_regime"] == regime
        assert metrics["bp_utilization"] == pytest.approx(share)
    assert controller().observe(Sampled(1, GROUP, 160, 2.0, rows=rows))["bp_regime"] is None


def test_peaks_of_the_configuration_are_in_giga(make_config: Any) -> None:
    made = build(make_config(backpressure={"enabled": True, "peak_gflops": 50.0, "peak_bw_gb_s": 10.0}))
    assert made._roof is not None  # pyright: ignore[reportPrivateUsage]
    assert made._roof.peaks == Peaks(50e9, 10e9)  # pyright: ignore[reportPrivateUsage]
    assert build(make_config(backpressure={"enabled": True}))._roof is None  # pyright: ignore[reportPrivateUsage]


def test_the_window_is_bounded() -> None:
    made = controller()
    for _ in range(250):
        made.observe(seen(made.next(), 100 * math.sqrt(made.next())))
    assert len(made.state_dict()["points"]) == backpressure.WINDOW


def test_a_campaign_takes_it_only_where_a_condition_declares_it() -> None:
    base = {"model": {"model": "retrain/tiny"}, "data": {"source": "arithmetic"}, "reward": {"type": "match"}}
    arms = [{"advantage_mode": "grpo"}, {"advantage_mode": "grpo", "backpressure.enabled": True}]
    with pytest.raises(ConfigError, match="batch sizes would follow the clock"):
        load({**base, "campaign": {"max_steps": 2}, "backpressure": {"enabled": True}})
    load({**base, "campaign": {"max_steps": 2, "conditions": arms}})
