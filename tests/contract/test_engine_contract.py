"""Every engine: logprobs align with ids, the version is echoed, n completions, stop reasons."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest

from retrain.errors import EngineError
from retrain.fakes import FakeBackend, FakeEngine, FakeRenderer
from retrain.protocols import Engine
from retrain.types import NoiseKey, RemoteWeights, Sampling

SAMPLING = Sampling(1.0, 1.0, 6, (0,), (), True, NoiseKey(1, 0, 0))
PROMPT = np.array([3, 4, 5], dtype=np.int32)


@pytest.fixture(params=["fake", "pytorch"])
def pair(request, make_config, random_model):
    if request.param == "fake":
        backend, engine = FakeBackend(positions=6), FakeEngine()
    else:
        from retrain.backends import local
        from retrain.engines import torch_engine

        config = make_config(model={"model": str(random_model()), "lora_rank": 4})
        backend, engine = local.build(config, FakeRenderer()), torch_engine.build(config, FakeRenderer())
    yield backend, engine
    engine.close()
    engine.close()
    backend.close()


def run(engine, n=5, **changes):
    return asyncio.run(engine.generate(PROMPT, n, replace(SAMPLING, **changes)))


def test_it_is_an_engine(pair):
    assert isinstance(pair[1], Engine)


def test_completions_align_and_echo_the_version(pair):
    backend, engine = pair
    engine.load(backend.publish())
    got = run(engine)
    assert len(got) == 5
    for c in got:
        assert len(c.token_ids_T) == len(c.logprobs_T) == len(c.entropies_T) <= 6
        assert (c.logprobs_T <= 0).all()
        assert c.weights_version == backend.publish().version
        assert (c.stop == "stop") == (int(c.token_ids_T[-1]) == 0)
        assert 0 not in c.token_ids_T[:-1]
        assert c.stop == "stop" or len(c.token_ids_T) == 6
        assert c.token_ids_T.dtype == np.int32
        assert c.logprobs_T.dtype == np.float32


def test_entropies_only_when_asked(pair):
    backend, engine = pair
    engine.load(backend.publish())
    assert all(c.entropies_T is None for c in run(engine, want_entropy=False))


def test_the_same_noise_is_the_same_sample_and_another_is_not(pair):
    backend, engine = pair
    engine.load(backend.publish())
    one, same = run(engine), run(engine)
    other = run(engine, noise=NoiseKey(1, 1, 0))
    assert [c.token_ids_T.tolist() for c in one] == [c.token_ids_T.tolist() for c in same]
    assert [c.token_ids_T.tolist() for c in one] != [c.token_ids_T.tolist() for c in other]
    assert len({tuple(c.token_ids_T.tolist()) for c in one}) > 1


def test_sampling_before_loading_is_refused(pair):
    with pytest.raises(EngineError):
        run(pair[1])


def test_weights_of_another_kind_are_refused(pair):
    with pytest.raises(EngineError):
        pair[1].load(RemoteWeights(0, "x", "remote"))
