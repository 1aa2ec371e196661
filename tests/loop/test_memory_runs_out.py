"""The loop under back pressure where memory runs out: the step is retried with fewer tasks, and none is lost or repeated."""

from __future__ import annotations

import asyncio
import json
import threading

import pytest

from retrain.algorithms import credit
from retrain.config.schema import Backpressure
from retrain.environments.single_turn import build as single_turn
from retrain.errors import OutOfMemory, is_out_of_memory
from retrain.fakes import FakeBackend, FakeEngine, FakeRenderer, FakeReward, FakeSink, FakeTasks
from retrain.tracking.run_log import RunLog
from retrain.training.backpressure import BackPressure
from retrain.training.build import sampling_of
from retrain.training.checkpoint import Checkpoints
from retrain.training.loop import Parts, train
from retrain.training.rollout import EventLoop

GROUP = 8


class SmallEngine(FakeEngine):
    """Has room for so many requests at once, and for ``step_room`` until it is told to release what it holds."""

    def __init__(self, room=10**9, step_room=10**9):
        super().__init__()
        self.room, self.step_room = room, step_room
        self.live = self.held = self.ran_out = self.released = 0

    async def generate(self, prompt_ids, n, sampling):
        self.live += 1
        self.held += 1
        try:
            await asyncio.sleep(0.005)
            if self.live > self.room or self.held > self.step_room:
                raise OutOfMemory("memory ran out in sampling (fake).")
            return await super().generate(prompt_ids, n, sampling)
        except OutOfMemory:
            self.ran_out += 1
            raise
        finally:
            self.live -= 1

    def release(self):
        self.released += 1
        self.held = 0


class SmallBackend(FakeBackend):
    """Has room for so many rows; with ``at`` it runs out in that update alone, counted from 1."""

    def __init__(self, room=10**9, at=0):
        super().__init__(positions=1)
        self.room, self.at = room, at
        self.ran_out = self.calls = 0

    def train_step(self, batch, optim):
        self.calls += 1
        if len(batch.rows) > self.room or self.calls == self.at:
            self.ran_out += 1
            raise OutOfMemory("memory ran out in learning (fake).")
        return super().train_step(batch, optim)


@pytest.fixture
def run_it(tmp_path, make_config):
    opened = []

    def run(engine=None, backend=None, *, steps=12, settings=None, resume=None, **training):
        training = {
            "max_steps": steps, "batch_size": 1, "group_size": GROUP, "max_tokens": 1, "lr": 1e-5, "save_every": 4, **training,
        }  # fmt: skip
        backpressure = {"enabled": True, "max_batch_size": 32, "warmup_steps": 6, **(settings or {})}
        config = make_config(training=training, backpressure=backpressure, loss={"kl": 0.1})
        directory = tmp_path / "run"
        renderer, events = FakeRenderer(), EventLoop()
        log = RunLog(directory, renderer, [FakeSink()], generations=0, store=None)
        opened.append((log, events))
        sizer = None
        if config.backpressure.enabled:
            sizer = BackPressure(config.backpressure, batch_size=training["batch_size"], group_size=GROUP)
        parts = Parts(
            backend=backend or SmallBackend(), engine=engine or SmallEngine(), environment=single_turn(config, renderer),
            reward=FakeReward(), tasks=FakeTasks(), algorithm=credit.build(config, renderer),
            schedule=credit.build_schedule(config), sampling=sampling_of(config, renderer, temperature=1.0), evaluator=None,
            checkpoints=Checkpoints(directory, keep=9), log=log, events=events, sizer=sizer,
        )  # fmt: skip
        if resume is not None:
            state = json.loads((directory / f"checkpoints/step_{resume:06d}/state.json").read_text())
            for name, part in parts.stateful.items():
                part.load_state_dict(state[name])
        train(config, parts, threading.Event())
        rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
        steps_ = [json.loads(line) for line in (directory / "emergence/steps.jsonl").read_text().splitlines()]
        return rows, [[t["draw"] for t in s["tasks"]] for s in steps_], parts

    yield run
    for log, events in opened:
        log.close()
        events.close()


def test_memory_that_runs_out_in_sampling_halves_the_step_once_and_for_all(run_it):
    engine = SmallEngine(room=10)
    rows, draws, parts = run_it(engine, steps=20)
    sizes = [r["batch_size"] for r in rows]
    assert [d for step in draws for d in step] == list(range(sum(sizes)))
    ran_out = [r["bp_out_of_memory"] for r in rows]
    assert sum(ran_out) == 1
    at = ran_out.index(1)
    assert sizes[at] == 8
    assert rows[at]["bp_put_back"] == 8
    assert {r["bp_ceiling"] for r in rows[at:]} == {8}
    assert max(sizes) == 8
    assert engine.released >= 21
    assert parts.tasks.state_dict() == {"draw": sum(sizes)}
    # The time of a step that was begun twice is no measurement.
    assert len(parts.sizer.state_dict()["points"]) == len(rows) - 2


class SlowEngine(FakeEngine):
    """The first to ask beyond its room fails at once, while the others' requests would go on for long."""

    def __init__(self):
        super().__init__()
        self.live = 0

    async def generate(self, prompt_ids, n, sampling):
        self.live += 1
        try:
            if self.live > 5:
                raise OutOfMemory("memory ran out in sampling (fake).")
            await asyncio.sleep(0.2)
            return await super().generate(prompt_ids, n, sampling)
        finally:
            self.live -= 1


def test_a_step_that_is_begun_again_shares_the_engine_with_nothing_of_the_first_attempt(run_it):
    rows, draws, _ = run_it(SlowEngine(), steps=2, batch_size=8, settings={"warmup_steps": 0})
    assert [r["batch_size"] for r in rows] == [4, 4]
    assert [r["bp_out_of_memory"] for r in rows] == [1, 0]
    assert [d for step in draws for d in step] == list(range(8))


def test_memory_that_runs_out_in_learning_trains_the_first_half_of_what_was_sampled(run_it):
    engine, backend = SmallEngine(), SmallBackend(room=5 * GROUP)
    rows, draws, _ = run_it(engine, backend, steps=20)
    sizes = [r["batch_size"] for r in rows]
    assert backend.ran_out == 1
    assert [d for step in draws for d in step] == list(range(sum(sizes)))
    at = [r["bp_out_of_memory"] for r in rows].index(1)
    assert (sizes[at], rows[at]["bp_put_back"], rows[at]["num_datums"]) == (4, 4, 4 * GROUP)
    # Nothing was sampled a second time in that step, and the tasks left over were the next step's first.
    assert draws[at][-1] + 1 == draws[at + 1][0]
    assert max(sizes) == 4


def test_oversampled_groups_are_halved_with_the_step(run_it):
    backend = SmallBackend(room=13 * GROUP)
    still = {"warmup_steps": 0}
    rows, draws, _ = run_it(backend=backend, steps=3, batch_size=8, min_signal=1.0, max_oversample=3.0, settings=still)
    assert [d for step in draws for d in step] == list(range(sum(len(step) for step in draws)))
    assert rows[0]["bp_out_of_memory"] == 1
    assert (rows[0]["batch_size"], rows[0]["bp_put_back"]) == (12, 12)


def test_updates_before_memory_ran_out_stand(run_it):
    backend = SmallBackend(at=3)
    rows, draws, _ = run_it(backend=backend, steps=4, batch_size=8, updates_per_batch=4, settings={"warmup_steps": 0})
    assert rows[0]["num_updates"] == 2
    assert [r["num_updates"] for r in rows[1:]] == [4, 4, 4]
    assert [r["batch_size"] for r in rows] == [8, 4, 4, 4]
    assert [d for step in draws for d in step] == list(range(20))


def test_a_step_in_which_a_later_update_ran_out_is_no_measurement(run_it):
    # Steps of four updates: the seventh is the second step's third.
    backend = SmallBackend(at=7)
    rows, _, parts = run_it(backend=backend, steps=4, batch_size=8, updates_per_batch=4, settings={"warmup_steps": 0})
    assert [r["batch_size"] for r in rows] == [8, 8, 4, 4]
    assert [r["bp_out_of_memory"] for r in rows] == [0, 1, 0, 0]
    assert [r["bp_put_back"] for r in rows] == [0, 0, 0, 0]
    assert [p for p, _ in parts.sizer.state_dict()["points"]] == [4 * GROUP] * 2
    assert rows[1]["bp_throughput"] is None
    assert rows[2]["bp_throughput"] is not None


def test_a_sizer_is_told_to_skip_a_step_in_which_memory_ran_out(run_it, monkeypatch):
    told, observe = [], BackPressure.observe
    monkeypatch.setattr(BackPressure, "observe", lambda self, seen: told.append(seen.skipped) or observe(self, seen))
    run_it(
        backend=SmallBackend(at=7), steps=4, batch_size=8, updates_per_batch=4, settings={"warmup_steps": 0}
    )
    assert told == [False, True, False, False]


def test_tasks_of_every_round_of_a_step_count_as_put_back(run_it):
    # Rounds of 8 tasks: the second is the one that runs out. With 4 a third is, with 2 all three fit.
    engine, still = SmallEngine(step_room=10), {"warmup_steps": 0}
    rows, draws, parts = run_it(engine, steps=2, batch_size=8, min_signal=1.0, max_oversample=3.0, settings=still)
    assert [d for step in draws for d in step] == list(range(sum(len(step) for step in draws)))
    assert rows[0]["bp_out_of_memory"] == 2
    assert rows[0]["bp_put_back"] == 16 - len(draws[0])
    assert parts.tasks.state_dict() == {"draw": sum(len(step) for step in draws)}


@pytest.mark.parametrize("settings", [{"enabled": False}, {"min_batch_size": 4}])
def test_where_nothing_smaller_is_allowed_the_run_ends_with_a_checkpoint_of_its_last_step(run_it, settings, tmp_path):
    backend = SmallBackend(at=3)
    with pytest.raises(OutOfMemory, match="memory ran out in learning"):
        run_it(backend=backend, batch_size=4, settings=settings)
    state = json.loads((tmp_path / "run/checkpoints/step_000002/state.json").read_text())
    assert state["tasks"] == {"draw": 8}
    assert state["counters"]["step"] == 2


def test_what_was_learned_about_sizes_is_there_after_a_resume(run_it):
    rows, _, parts = run_it(SmallEngine(room=10), steps=16)
    kept = parts.sizer.state_dict()
    assert kept["ceiling"] == 8
    engine = SmallEngine(room=10)
    more, draws, _ = run_it(engine, steps=20, resume=16)
    assert [d for step in draws for d in step] == list(range(sum(r["batch_size"] for r in more)))
    assert engine.ran_out == 0
    assert [r["step"] for r in more] == list(range(20))
    assert [r["batch_size"] for r in more[:16]] == [r["batch_size"] for r in rows]


class OutOfMemoryError(RuntimeError):
    """What torch calls it, known by its name."""


@pytest.mark.parametrize(
    ("error", "known"),
    [
        (MemoryError(), True),
        (OutOfMemoryError("CUDA"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), True),
        (OutOfMemory("x"), True),
        (RuntimeError("shapes do not match"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_errors_of_memory_are_told_from_others(error, known):
    assert is_out_of_memory(error) is known


def test_the_defaults_are_those_of_the_documentation():
    assert Backpressure().model_dump() == {
        "enabled": False, "controller": "usl", "warmup_steps": 10, "ema_decay": 0.9, "throttle_margin": 0.85,
        "increase_margin": 0.5, "min_batch_size": 1, "max_batch_size": 64, "peak_gflops": 0.0, "peak_bw_gb_s": 0.0,
    }  # fmt: skip
