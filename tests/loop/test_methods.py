"""The loop's methods with fakes: several updates per batch, oversampling, masked and kept groups."""

from __future__ import annotations

import json
import threading
from dataclasses import replace

import numpy as np
import pytest

from retrain.algorithms import credit
from retrain.environments.single_turn import build as single_turn
from retrain.errors import LearnerError, RunError
from retrain.fakes import FakeBackend, FakeEngine, FakeRenderer, FakeSink, FakeTasks
from retrain.tracking.run_log import RunLog
from retrain.training.build import sampling_of
from retrain.training.checkpoint import Checkpoints
from retrain.training.loop import Parts, train
from retrain.training.rollout import EventLoop
from retrain.types import Score


class RecordingBackend(FakeBackend):
    """Remembers the batch and the rate of every update."""

    def __init__(self):
        super().__init__(positions=1)
        self.steps = []

    def train_step(self, batch, optim):
        self.steps.append((batch, optim.lr))
        return super().train_step(batch, optim)


class EveryThird:
    """Rewards differ inside the groups of every third task only."""

    bounds = (0.0, 1.0)

    async def score(self, task, rollouts_G):
        mixed = task.draw % 3 == 0
        return [Score(float(mixed and r.member % 2 == 0)) for r in rollouts_G]


@pytest.fixture
def run_loop(tmp_path, make_config):
    opened = []

    def run(reward=None, backend=None, **changes):
        training = {"max_steps": 4, "batch_size": 4, "group_size": 4, "max_tokens": 1, "lr": 1e-2}
        config = make_config(training={**training, **changes.pop("training", {})}, **changes)
        renderer, directory = FakeRenderer(), tmp_path / f"run{len(opened)}"
        backend = backend or RecordingBackend()
        log = RunLog(directory, renderer, [FakeSink()], generations=0, store=None)
        events = EventLoop()
        opened.append((log, events))
        parts = Parts(
            backend=backend,
            engine=FakeEngine(),
            environment=single_turn(config, renderer),
            reward=reward or EveryThird(),
            tasks=FakeTasks(),
            algorithm=credit.build(config, renderer),
            schedule=credit.build_schedule(config),
            sampling=sampling_of(config, renderer, temperature=1.0),
            evaluator=None,
            checkpoints=Checkpoints(directory, keep=2),
            log=log,
            events=events,
            facts={"device": "fake"},
        )
        assert train(config, parts, threading.Event()) == "done"
        rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
        return backend, parts, rows

    yield run
    for log, events in opened:
        log.close()
        events.close()


def test_every_update_of_a_step_sees_the_whole_batch_at_one_rate(run_loop):
    backend, _, rows = run_loop(
        training={"updates_per_batch": 3, "lr_schedule": "linear"}, loss={"kind": "ppo"}
    )
    assert len(backend.steps) == 12
    for step in range(4):
        batches = {id(batch) for batch, _ in backend.steps[3 * step : 3 * step + 3]}
        rates = {lr for _, lr in backend.steps[3 * step : 3 * step + 3]}
        assert len(batches) == 1
        assert rates == {1e-2 * (4 - step) / 4}
    assert [r["num_updates"] for r in rows] == [3] * 4
    assert [r["lr"] for r in rows] == [1e-2, 7.5e-3, 5e-3, 2.5e-3]
    for row in rows:
        # The first update compares learner and sampler, the last one shows how far the others moved.
        assert row["ratio_max"] == pytest.approx(1, abs=1e-6)
        assert row["moved_kl"] > row["approx_kl"]


def test_oversampling_goes_on_until_enough_groups_carry_a_signal(run_loop):
    backend, parts, rows = run_loop(training={"min_signal": 0.75, "max_oversample": 10.0})
    for row, (batch, _) in zip(rows, backend.steps, strict=True):
        # One task in three carries a signal: three of them need two or three rounds of four.
        assert row["batch_size"] in (8, 12)
        trained = row["batch_size"] - sum(
            v for k, v in row.items() if k.startswith("skipped_") and k != "skipped_update"
        )
        assert trained >= 3
        assert row["num_datums"] == 4 * trained
        # What was sampled in vain still counts in the denominators.
        assert batch.num_rollouts == 4 * row["batch_size"]
        assert batch.fixed_tokens == 4 * 4 * 1
    assert parts.tasks.state_dict()["draw"] == sum(r["batch_size"] for r in rows)


def test_oversampling_is_bounded(run_loop, caplog):
    with caplog.at_level("INFO", logger="retrain"):
        _, _, rows = run_loop(training={"min_signal": 1.0, "max_oversample": 1.5})
    assert [r["batch_size"] for r in rows] == [6] * 4
    assert "training.max_oversample allows no more" in caplog.text


def test_without_a_minimum_nothing_is_oversampled(run_loop):
    _, _, rows = run_loop()
    assert [r["batch_size"] for r in rows] == [4] * 4


@pytest.mark.parametrize(("loss", "kept"), [({}, False), ({"kl": 0.1}, True), ({"entropy": 0.01}, True)])
def test_silent_groups_are_kept_for_terms_that_need_no_advantage(run_loop, loss, kept):
    backend, _, rows = run_loop(loss=loss)
    for row, (batch, _) in zip(rows, backend.steps, strict=True):
        assert (row["num_datums"] == 16) == kept
        silent = [r for r in batch.rows if not r.advantages_T.any()]
        assert bool(silent) == kept
        assert batch.num_rollouts == 16


def test_a_run_without_signal_says_so_also_with_a_kl_term(run_loop, caplog):
    class Same:
        bounds = (0.0, 1.0)

        async def score(self, task, rollouts_G):
            return [Score(0.0) for _ in rollouts_G]

    with caplog.at_level("WARNING", logger="retrain"):
        backend, _, rows = run_loop(reward=Same(), loss={"kl": 0.1})
    assert "No step carried a signal" in caplog.text
    assert len(backend.steps) == 4
    assert all(r["skipped_all_wrong"] == 4 for r in rows)


def test_masked_rollouts_keep_their_place_in_mean_and_denominator(run_loop):
    """max_tokens = 1 cuts every rollout that does not end at once: all of their credit is gone."""

    class Half:
        bounds = (0.0, 1.0)

        async def score(self, task, rollouts_G):
            return [Score(float(r.member % 2)) for r in rollouts_G]

    backend, _, rows = run_loop(reward=Half(), training={"truncated": "mask"})
    scored = run_loop(reward=Half())[0]
    for row, (batch, _), (plain, _) in zip(rows, backend.steps, scored.steps, strict=False):
        assert row["correct_rate"] == 0.5
        assert batch.num_tokens == plain.num_tokens == 16
        cut = [r for r in batch.rows if r.token_ids_T[-1] != 0]
        assert cut
        assert not any(r.advantages_T.any() for r in cut)
        assert any(np.any(r.advantages_T) for r in plain.rows)


def test_a_step_that_breaks_between_its_updates_is_not_saved(tmp_path, run_loop, caplog):
    """The learner has moved, the step is not complete: no checkpoint may claim to be its beginning."""

    class Breaks(RecordingBackend):
        def train_step(self, batch, optim):
            if len(self.steps) == 4:
                raise RunError("broke")
            return super().train_step(batch, optim)

    with caplog.at_level("WARNING", logger="retrain"), pytest.raises(RunError, match="broke"):
        run_loop(backend=Breaks(), training={"updates_per_batch": 3, "save_every": 1}, loss={"kind": "ppo"})
    assert "broke between its updates" in caplog.text
    saved = sorted(p.name for p in (tmp_path / "run0" / "checkpoints").iterdir())
    assert saved == ["step_000001"]
    learner = json.loads((tmp_path / "run0/checkpoints/step_000001/adapter/table.json").read_text())
    assert learner["version"] == 3


def test_a_skipped_update_ends_its_step_and_three_steps_end_the_run(run_loop):
    class Skips(RecordingBackend):
        def train_step(self, batch, optim):
            return replace(super().train_step(batch, optim), update_skipped="the loss is nan")

    backend = Skips()
    with pytest.raises(LearnerError, match="3 updates in a row"):
        run_loop(backend=backend, training={"updates_per_batch": 3}, loss={"kind": "ppo"})
    assert len(backend.steps) == 3
    assert len({id(batch) for batch, _ in backend.steps}) == 3


def test_the_error_rate_is_that_of_the_whole_step(run_loop):
    class OneFails(EveryThird):
        """One reward in the second round fails: one of four there, one of twenty in the step."""

        async def score(self, task, rollouts_G):
            scores = await super().score(task, rollouts_G)
            return [Score.failed("late"), *scores[1:]] if task.draw == 4 else scores

    _, _, rows = run_loop(
        reward=OneFails(), training={"max_steps": 1, "min_signal": 1.0, "max_oversample": 1.25}
    )
    assert rows[0]["batch_size"] == 5
    assert rows[0]["reward_error_rate"] == pytest.approx(1 / 20)
