"""Every environment: n attempts in member order, only model tokens marked sampled, errors become rollouts."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from retrain import plugins
from retrain.config.names import BUILT
from retrain.errors import EngineError
from retrain.fakes import FakeBackend, FakeEngine, FakeRenderer
from retrain.protocols import Environment
from retrain.types import Message, NoiseKey, Sampling, Task

TASK = Task("t/0", (Message("user", "1+1="),), "2", "t", 0)
SAMPLING = Sampling(1.0, 1.0, 6, (0,), (), True, NoiseKey(1, 0, 0))


@pytest.fixture(params=BUILT["environment"])
def environment(request):
    return plugins.load("environment", request.param)(SimpleNamespace(), FakeRenderer())


@pytest.fixture
def engine():
    made = FakeEngine()
    made.load(FakeBackend(positions=6).publish())
    yield made
    made.close()


def attempt(environment, engine, n=5, **changes):
    return asyncio.run(environment.attempt(TASK, n, engine, replace(SAMPLING, **changes)))


def test_it_is_an_environment(environment):
    assert isinstance(environment, Environment)


def test_it_makes_n_attempts_in_member_order(environment, engine):
    rollouts = attempt(environment, engine)
    assert [r.member for r in rollouts] == [0, 1, 2, 3, 4]
    assert {r.task_id for r in rollouts} == {TASK.id}
    assert {r.stop for r in rollouts} <= {"stop", "length"}


def test_only_what_the_model_wrote_is_sampled(environment, engine):
    prompt = FakeRenderer().encode(TASK.messages)
    for r in attempt(environment, engine):
        assert not r.sampled_T[: len(prompt)].any()
        assert r.token_ids_T[: len(prompt)].tolist() == prompt.tolist()
        assert np.isnan(r.logprobs_T[~r.sampled_T]).all()
        assert np.isfinite(r.logprobs_T[r.sampled_T]).all()
        assert np.isfinite(r.entropies_T[r.sampled_T]).all()
        assert r.num_sampled <= SAMPLING.max_tokens
        assert r.text == FakeRenderer().decode(r.token_ids_T[r.sampled_T])


def test_it_repeats_itself_under_the_same_noise(environment, engine):
    first, second = attempt(environment, engine), attempt(environment, engine)
    assert all(np.array_equal(a.token_ids_T, b.token_ids_T) for a, b in zip(first, second, strict=True))
    other = attempt(environment, engine, noise=NoiseKey(1, 1, 0))
    assert any(not np.array_equal(a.token_ids_T, b.token_ids_T) for a, b in zip(first, other, strict=True))


def test_a_prompt_that_cannot_be_rendered_becomes_error_rollouts(environment, engine, monkeypatch):
    def refuse(_self, _messages):
        raise ValueError("no such role")

    monkeypatch.setattr(FakeRenderer, "encode", refuse)
    rollouts = attempt(environment, engine)
    assert [r.stop for r in rollouts] == ["error"] * 5
    assert all("no such role" in r.error for r in rollouts)


def test_a_dead_engine_stops_the_run(environment, engine, monkeypatch):
    async def dead(*_args):
        raise EngineError("it died")

    monkeypatch.setattr(engine, "generate", dead)
    with pytest.raises(EngineError):
        attempt(environment, engine)
