"""The loop with fakes: it learns, accounts for every task, survives what it should and stops where it must."""

from __future__ import annotations

import json
import threading
from dataclasses import replace

import numpy as np
import pytest

from retrain.algorithms import credit
from retrain.environments.single_turn import build as single_turn
from retrain.errors import EngineError, LearnerError, RewardError, RunError
from retrain.fakes import FakeBackend, FakeEngine, FakeRenderer, FakeReward, FakeSink, FakeTasks
from retrain.tracking import rollouts
from retrain.tracking.rollouts import RolloutStore
from retrain.tracking.run_log import RunLog
from retrain.training.build import sampling_of
from retrain.training.checkpoint import Checkpoints
from retrain.training.evaluate import Evaluator
from retrain.training.loop import Parts, train
from retrain.training.rollout import EventLoop
from retrain.types import Score


@pytest.fixture
def make_parts(tmp_path):
    opened = []

    def make(config, *, directory="run", **changes):
        renderer = FakeRenderer()
        run = tmp_path / directory
        sink = FakeSink()
        log = RunLog(run, renderer, [sink], generations=4, store=RolloutStore(run))
        events = EventLoop()
        parts = Parts(
            backend=FakeBackend(positions=1),
            engine=FakeEngine(),
            environment=single_turn(config, renderer),
            reward=FakeReward(),
            tasks=FakeTasks(),
            algorithm=credit.build(config, renderer),
            schedule=credit.build_schedule(config),
            sampling=sampling_of(config, renderer, temperature=1.0),
            evaluator=None,
            checkpoints=Checkpoints(run, keep=2),
            log=log,
            events=events,
            facts={"device": "fake"},
        )
        for name, value in changes.items():
            setattr(parts, name, value)
        opened.append((log, events))
        return parts, run, sink

    yield make
    for log, events in opened:
        log.close()
        events.close()


@pytest.fixture
def config(make_config):
    return make_config(
        training={
            "max_steps": 30,
            "batch_size": 4,
            "group_size": 16,
            "max_tokens": 1,
            "save_every": 10,
            "lr": 1e-2,
        }
    )


def rows_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_the_sampler_gives_its_memory_back_after_a_steps_sampling_and_before_its_update(
    make_config, make_parts
):
    """Not between the rounds of one step: what a round has sampled may still be gone on from in the next."""
    order = []

    class Engine(FakeEngine):
        async def generate(self, prompt_ids, n, sampling):
            order.append("sample")
            return await super().generate(prompt_ids, n, sampling)

        def release(self):
            order.append("release")

    class Backend(FakeBackend):
        def train_step(self, batch, optim):
            order.append("train")
            return super().train_step(batch, optim)

    config = make_config(
        training={
            "max_steps": 2, "batch_size": 2, "group_size": 64, "max_tokens": 1, "min_signal": 1.0, "max_oversample": 2.0,
        }
    )  # fmt: skip
    silent = Silent(every=2)
    parts, _, _ = make_parts(config, engine=Engine(), backend=Backend(positions=1), reward=silent)
    assert train(config, parts, threading.Event()) == "done"
    assert order == 2 * [*4 * ["sample"], "release", "train"]


class Silent:
    """Rewards differ in the groups of every so many tasks only."""

    bounds = (0.0, 1.0)

    def __init__(self, every):
        self._every = every

    async def score(self, task, rollouts_G):
        mixed = task.draw % self._every == 0
        return [Score(float(mixed and r.member % 2 == 0)) for r in rollouts_G]


def test_the_fake_policy_really_learns(config, make_parts):
    parts, run, sink = make_parts(config)
    assert train(config, parts, threading.Event()) == "done"
    rows = rows_of(run)
    assert [r["step"] for r in rows] == list(range(30))
    first, last = (
        np.mean([r["correct_rate"] for r in rows[:5]]),
        np.mean([r["correct_rate"] for r in rows[-5:]]),
    )
    assert first < 0.2
    assert last > 0.8
    assert len(sink.rows) == 30


def test_every_task_is_accounted_for(config, make_parts):
    parts, run, _ = make_parts(config)
    train(config, parts, threading.Event())
    steps = [json.loads(line) for line in (run / "emergence/steps.jsonl").read_text().splitlines()]
    draws = [t["draw"] for s in steps for t in s["tasks"]]
    assert draws == list(range(30 * 4))
    assert {t["outcome"] for s in steps for t in s["tasks"]} <= {"trained", "dropped"}
    assert all(bool(t["why"]) == (t["outcome"] == "dropped") for s in steps for t in s["tasks"])
    generations = [
        json.loads(line) for line in (run / "emergence/generations.jsonl").read_text().splitlines()
    ]
    assert len(generations) == 30 * 4
    stored = rollouts.read(run, 3)
    assert [len(g.rollouts_G) for g in stored.groups_P] == [16] * 4
    assert [g.task.draw for g in stored.groups_P] == [12, 13, 14, 15]


def test_checkpoints_keep_the_newest_and_name_completed_steps(config, make_parts):
    parts, run, _ = make_parts(config)
    train(config, parts, threading.Event())
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step_000020", "step_000030"]
    assert json.loads((run / "trainer_state.json").read_text())["checkpoint"] == "checkpoints/step_000030"


def test_a_step_without_signal_counts_logs_saves_and_advances(config, make_parts):
    class Nothing(FakeReward):
        async def score(self, task, rollouts_G):
            return [Score(0.0, False) for _ in rollouts_G]

    short = config.model_copy(
        update={"training": config.training.model_copy(update={"max_steps": 3, "save_every": 1})}
    )
    parts, run, _ = make_parts(short, reward=Nothing())
    assert train(short, parts, threading.Event()) == "done"
    rows = rows_of(run)
    assert [r["num_datums"] for r in rows] == [0, 0, 0]
    assert all(r["loss"] is None and r["skipped_all_wrong"] == 4 for r in rows)
    assert parts.backend.version == 0
    assert (run / "checkpoints/step_000003").is_dir()


def test_a_few_failed_rewards_are_masked_and_counted(config, make_parts):
    class Shaky(FakeReward):
        async def score(self, task, rollouts_G):
            scores = await super().score(task, rollouts_G)
            return [Score.failed("broke"), *scores[1:]]

    parts, run, _ = make_parts(config, reward=Shaky())
    train(config, parts, threading.Event())
    rows = rows_of(run)
    assert all(r["reward_error_rate"] == pytest.approx(1 / 16) for r in rows)
    assert rows[-1]["correct_rate"] > 0.8


def test_too_many_failed_rewards_end_the_run_with_a_checkpoint(config, make_parts):
    class Broken(FakeReward):
        calls = 0

        async def score(self, task, rollouts_G):
            Broken.calls += 1
            if Broken.calls > 8:
                return [Score.failed("ZeroDivisionError: division by zero") for _ in rollouts_G]
            return await super().score(task, rollouts_G)

    parts, run, _ = make_parts(config, reward=Broken())
    with pytest.raises(RewardError, match="ZeroDivisionError"):
        train(config, parts, threading.Event())
    path, state = parts.checkpoints.newest()
    assert path.name == "step_000002"
    assert state["tasks"]["draw"] == 8
    assert len(rows_of(run)) == 2


def test_three_skipped_updates_in_a_row_end_the_run(config, make_parts):
    class Sick(FakeBackend):
        def train_step(self, batch, optim):
            return replace(
                super().train_step(batch, replace(optim, lr=0.0)), loss=None, update_skipped="the loss is nan"
            )

    parts, _, _ = make_parts(config, backend=Sick(positions=1))
    with pytest.raises(LearnerError, match="3 updates in a row"):
        train(config, parts, threading.Event())
    assert parts.checkpoints.newest()[1]["step"] == parts.counters.step
    assert parts.counters.skipped_updates == 3


def test_stop_ends_after_the_present_step_and_saves(config, make_parts):
    stop = threading.Event()

    class Stopping(FakeReward):
        calls = 0

        async def score(self, task, rollouts_G):
            Stopping.calls += 1
            if Stopping.calls == 5:
                stop.set()
            return await super().score(task, rollouts_G)

    parts, run, _ = make_parts(config, reward=Stopping())
    assert train(config, parts, stop) == "interrupted"
    assert len(rows_of(run)) == 2
    assert parts.checkpoints.newest()[1]["step"] == 2


def test_a_phase_that_hangs_is_named(config, make_parts):
    import asyncio

    class Hanging(FakeReward):
        async def score(self, task, rollouts_G):
            await asyncio.sleep(60)
            return []

    quick = config.model_copy(
        update={"training": config.training.model_copy(update={"phase_timeout_s": 0.3})}
    )
    parts, _, _ = make_parts(quick, reward=Hanging())
    with pytest.raises(RunError, match=r"scoring took longer than training\.phase_timeout_s"):
        train(quick, parts, threading.Event())


def test_a_sink_that_fails_late_only_warns(config, make_parts, caplog):
    parts, run, sink = make_parts(config)

    def broken(step, metrics):
        raise OSError("disk full")

    sink.log = broken
    with caplog.at_level("WARNING", logger="retrain"):
        assert train(config, parts, threading.Event()) == "done"
    assert len(rows_of(run)) == 30
    assert sum("FakeSink failed" in r.message for r in caplog.records) == 1


def test_evaluation_is_repeatable_due_when_said_and_kept_as_best(config, make_parts):
    due = config.model_copy(update={"eval": config.eval.model_copy(update={"every": 10})})
    parts, run, _ = make_parts(due)
    tasks = tuple(FakeTasks().take(3))
    parts.evaluator = Evaluator(tasks, 8, parts.sampling, 0, None, "fake/test")
    train(due, parts, threading.Event())
    evaluations = [r for r in rows_of(run) if "eval/accuracy" in r]
    assert [r["step"] for r in evaluations] == [0, 10, 20, 30]
    last = evaluations[-1]
    assert last["eval/accuracy"] > evaluations[0]["eval/accuracy"] + 0.5
    assert last["eval/accuracy_low"] <= last["eval/accuracy"] <= last["eval/accuracy_high"]
    assert last["eval/pass@8"] >= last["eval/pass@1"] == pytest.approx(last["eval/accuracy"])
    again, _ = parts.evaluator.run(
        parts.events, parts.environment, parts.reward, parts.engine, deadline_s=60, max_error_rate=0.1
    )
    assert again["eval/accuracy"] == last["eval/accuracy"]
    best = json.loads((run / "trainer_state.json").read_text())["best"]
    assert "selected on evaluation data" in best["note"]


def test_an_evaluation_of_rewards_that_do_not_say_what_is_correct_is_unknown(config, make_parts):
    class Points(FakeReward):
        async def score(self, task, rollouts_G):
            return [Score(10.0 if r.text == task.reference else 0.8) for r in rollouts_G]

    parts, run, _ = make_parts(config, reward=Points())
    parts.evaluator = Evaluator(tuple(FakeTasks().take(3)), 32, parts.sampling, 0, None, "fake/test")
    train(config, parts, threading.Event())
    last = [r for r in rows_of(run) if "eval/accuracy" in r][-1]
    assert last["eval/accuracy"] is None
    assert last["eval/pass@1"] is None
    assert last["eval/mean_reward"] > 5


def test_rewards_that_fail_in_an_evaluation_end_the_run_too(config, make_parts):
    class Broken(FakeReward):
        async def score(self, task, rollouts_G):
            return [Score.failed("judge is down") for _ in rollouts_G]

    parts, _, _ = make_parts(config, reward=Broken())
    parts.evaluator = Evaluator(tuple(FakeTasks().take(3)), 8, parts.sampling, 0, None, "fake/test")
    with pytest.raises(RewardError, match="judge is down"):
        train(config, parts, threading.Event())


def test_an_evaluation_that_failed_is_made_up_for_on_resume(config, make_parts):
    short = config.model_copy(update={"training": config.training.model_copy(update={"max_steps": 2})})
    parts, run, _ = make_parts(short)
    real = Evaluator(tuple(FakeTasks().take(3)), 4, parts.sampling, 0, None, "fake/test")

    class FailsOnceAtTheEnd:
        name = real.name
        failed = False

        def run(self, *arguments, **options):
            if parts.counters.step == 2 and not self.failed:
                self.failed = True
                raise RewardError("the judge is down")
            return real.run(*arguments, **options)

    parts.evaluator = FailsOnceAtTheEnd()
    with pytest.raises(RewardError):
        train(short, parts, threading.Event())
    assert parts.checkpoints.newest()[1]["step"] == 2
    assert train(short, parts, threading.Event()) == "done"
    assert [r["step"] for r in rows_of(run) if "eval/accuracy" in r] == [0, 2]


class Copying(FakeBackend):
    """Its checkpoints are written by a thread, and only once the next step has begun to sample."""

    def __init__(self, **options):
        super().__init__(**options)
        self.sampling = threading.Event()
        self.overlapped = 0

    def publish(self):
        self.sampling.set()
        return super().publish()

    def snapshot(self):
        frozen = FakeBackend(positions=1)
        frozen.table, frozen.version = self.table.copy(), self.version
        self.sampling.clear()

        def write(directory):
            self.overlapped += self.sampling.wait(0.5)
            frozen.save(directory)

        return write


def test_checkpoints_are_written_while_the_next_step_samples(config, make_parts):
    plain, run_a, _ = make_parts(config, directory="a")
    train(config, plain, threading.Event())
    behind, run_b, _ = make_parts(config, directory="b", backend=Copying(positions=1))
    train(config, behind, threading.Event())
    assert behind.backend.overlapped == 2  # after 10 and 20 steps; nothing follows the last one
    assert sorted(p.name for p in (run_b / "checkpoints").iterdir()) == ["step_000020", "step_000030"]
    for name in ("step_000020", "step_000030"):
        for file in ("adapter/table.json", "state.json"):
            a, b = (json.loads((run / "checkpoints" / name / file).read_text()) for run in (run_a, run_b))
            if file == "state.json":
                # Lines of metrics hold timings, whose digits differ.
                a["log"]["bytes"].pop("metrics.jsonl"), b["log"]["bytes"].pop("metrics.jsonl")
            assert a == b


def test_a_checkpoint_that_cannot_be_written_ends_the_run_at_the_next_step(config, make_parts):
    class Full(FakeBackend):
        def snapshot(self):
            def write(directory):
                raise OSError(28, "No space left on device", str(directory))

            return write

    parts, run, _ = make_parts(config, backend=Full(positions=1))
    real = parts.checkpoints.save

    def save(*arguments, **options):
        real(*arguments, **options)
        parts.checkpoints._writing.exception(30)

    parts.checkpoints.save = save
    with pytest.raises(OSError, match="No space left"):
        train(config, parts, threading.Event())
    assert len(rows_of(run)) == 10


class BreaksIn(FakeReward):
    """Fails from one step on, and says so before."""

    def __init__(self, step):
        self.calls, self.step, self.broken = 0, step, threading.Event()

    async def score(self, task, rollouts_G):
        self.calls += 1
        if self.calls > 4 * self.step:
            self.broken.set()
            return [Score.failed("the reward broke") for _ in rollouts_G]
        return await super().score(task, rollouts_G)


@pytest.mark.parametrize("step", [2, 3])
def test_a_write_that_failed_hides_no_error_and_costs_no_checkpoint(config, make_parts, caplog, step):
    reward = BreaksIn(step)

    class Hiccup(FakeBackend):
        tries = 0

        def snapshot(self):
            self.tries += 1
            first, frozen = self.tries == 1, FakeBackend(positions=1)
            frozen.table, frozen.version = self.table.copy(), self.version

            def write(directory):
                if first:
                    assert reward.broken.wait(30)
                    raise OSError(5, "hiccup", str(directory))
                frozen.save(directory)

            return write

    often = config.model_copy(update={"training": config.training.model_copy(update={"save_every": 2})})
    parts, run, _ = make_parts(often, backend=Hiccup(positions=1), reward=reward)
    with pytest.raises(RewardError, match="the reward broke"):
        train(often, parts, threading.Event())
    assert sum("hiccup" in r.message for r in caplog.records) == 1
    assert [p.name for p in (run / "checkpoints").iterdir() if p.suffix != ".tmp"] == [f"step_00000{step}"]
    assert parts.checkpoints.newest()[1]["tasks"]["draw"] == 4 * step


@pytest.mark.parametrize("behind", [True, False])
def test_a_disk_that_stays_full_does_not_hide_the_error_of_the_step(config, make_parts, caplog, behind):
    class Full(FakeBackend):
        def save(self, directory):
            raise OSError(28, "No space left on device", str(directory))

    class FullBehind(Full):
        def snapshot(self):
            return self.save

    backend = (FullBehind if behind else Full)(positions=1)
    parts, _, _ = make_parts(config, backend=backend, reward=BreaksIn(3))
    with pytest.raises(RewardError, match="the reward broke"):
        train(config, parts, threading.Event())
    assert sum("No space left" in r.message for r in caplog.records) == 1


def test_groups_are_scored_while_others_are_sampled(config, make_parts):
    import asyncio

    order = []
    scored = asyncio.Event()

    class Slow(FakeEngine):
        """The last request of a step waits until a group has been scored."""

        requests = 0

        async def generate(self, prompt_ids, n, sampling):
            self.requests += 1
            if self.requests % 4 == 0:
                await asyncio.wait_for(scored.wait(), 30)
                scored.clear()
                order.append("sampled")
            return await super().generate(prompt_ids, n, sampling)

    class Noting(FakeReward):
        async def score(self, task, rollouts_G):
            order.append("scored")
            scored.set()
            return await super().score(task, rollouts_G)

    short = config.model_copy(update={"training": config.training.model_copy(update={"max_steps": 2})})
    plain, run_a, _ = make_parts(short, directory="a")
    train(short, plain, threading.Event())
    parts, run_b, _ = make_parts(short, directory="b", engine=Slow(), reward=Noting())
    train(short, parts, threading.Event())
    assert order.index("scored") < order.index("sampled")
    np.testing.assert_array_equal(plain.backend.table, parts.backend.table)
    tasks = [(run / "emergence/steps.jsonl").read_text() for run in (run_a, run_b)]
    assert tasks[0] == tasks[1]


def test_sampling_that_breaks_gives_up_on_scores_and_is_the_error(config, make_parts):
    import asyncio

    given_up = threading.Event()

    class Dying(FakeEngine):
        requests = 0

        async def generate(self, prompt_ids, n, sampling):
            self.requests += 1
            if self.requests == 4:
                await asyncio.sleep(0.1)
                raise EngineError("the engine died")
            return await super().generate(prompt_ids, n, sampling)

    class Hanging(FakeReward):
        async def score(self, task, rollouts_G):
            try:
                await asyncio.sleep(60)
            finally:
                given_up.set()

    parts, _, _ = make_parts(config, engine=Dying(), reward=Hanging())
    with pytest.raises(EngineError, match="the engine died"):
        train(config, parts, threading.Event())
    assert given_up.wait(10)


def test_a_broken_reward_is_judged_when_all_rollouts_are_there(config, make_parts):
    class Counting(FakeEngine):
        requests = 0

        async def generate(self, prompt_ids, n, sampling):
            import asyncio

            await asyncio.sleep(0.02 * self.requests)
            self.requests += 1
            return await super().generate(prompt_ids, n, sampling)

    class Broken(FakeReward):
        async def score(self, task, rollouts_G):
            return [Score.failed("always") for _ in rollouts_G]

    parts, _, _ = make_parts(config, engine=Counting(), reward=Broken())
    with pytest.raises(RewardError, match=r"\d+ of 64 rewards of this step failed"):
        train(config, parts, threading.Event())
    assert parts.engine.requests == 4


def test_fakes_resume_to_the_same_bytes(config, make_parts):
    whole, run_a, _ = make_parts(config, directory="a")
    train(config, whole, threading.Event())
    short = config.model_copy(update={"training": config.training.model_copy(update={"max_steps": 10})})
    first, run_b, _ = make_parts(short, directory="b")
    train(short, first, threading.Event())
    first.log.close()
    second, _, _ = make_parts(config, directory="b")
    path, state = second.checkpoints.newest()
    second.backend.restore(path)
    for name, part in second.stateful.items():
        part.load_state_dict(state[name])
    train(config, second, threading.Event())
    np.testing.assert_array_equal(whole.backend.table, second.backend.table)

    def timeless(run):
        return [
            {k: v for k, v in r.items() if not k.endswith("_s") and k != "tokens_per_second"}
            for r in rows_of(run)
        ]

    assert timeless(run_a) == timeless(run_b)
