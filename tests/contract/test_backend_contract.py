"""Every backend: a step changes weights, save and restore are equal, an empty batch is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from retrain.fakes import FakeBackend
from retrain.protocols import Backend
from retrain.types import OptimStep, TrainBatch, TrainRow

OPTIM = OptimStep(1e-3, 0.0, 0.9, 0.95, 1e-8, 1.0)


@pytest.fixture(params=["fake", "local"])
def make(request, make_config, random_model):
    if request.param == "fake":
        return lambda: FakeBackend(positions=6)
    from retrain.backends import local

    model = str(random_model())
    return lambda: local.build(make_config(model={"model": model, "lora_rank": 4}), None)


def a_batch():
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(4):
        ids = rng.integers(1, 30, 8).astype(np.int32)
        sampled = np.arange(8) >= 3
        old = np.where(sampled, -3.5, np.nan).astype(np.float32)
        rows.append(TrainRow(ids, sampled, old, np.where(sampled, rng.normal(), 0).astype(np.float32)))
    return TrainBatch(tuple(rows), 20, 4, 64, 1.0)


def test_it_is_a_backend(make):
    backend = make()
    assert isinstance(backend, Backend)
    assert backend.capabilities.loop
    assert backend.facts()["device"]
    backend.close()
    backend.close()


def test_a_step_changes_weights_and_version(make):
    backend = make()
    before = backend.publish()
    report = backend.train_step(a_batch(), OPTIM)
    after = backend.publish()
    assert after.version == before.version + 1
    assert after.fingerprint != before.fingerprint
    assert report.loss is None or np.isfinite(report.loss)


def test_a_gradients_hash_is_told_only_when_asked_and_is_the_same_from_the_same_weights(make):
    assert make().train_step(a_batch(), OPTIM).gradient_hash == ""
    asked = replace(OPTIM, hash_gradient=True)
    a, b = (make().train_step(a_batch(), asked).gradient_hash for _ in range(2))
    assert a == b
    assert len(a) in (0, 64)


def test_publishing_twice_is_the_same_weights(make):
    backend = make()
    assert backend.publish().fingerprint == backend.publish().fingerprint


def test_an_empty_batch_is_refused(make):
    with pytest.raises(ValueError, match="at least one row"):
        make().train_step(TrainBatch((), 0, 0, 64, 1.0), OPTIM)


def test_restore_equals_save_and_the_next_step_too(make, tmp_path):
    backend, other = make(), make()
    backend.train_step(a_batch(), OPTIM)
    backend.save(tmp_path)
    assert (tmp_path / "adapter").is_dir()
    other.restore(tmp_path)
    assert other.publish().fingerprint == backend.publish().fingerprint
    backend.train_step(a_batch(), OPTIM)
    other.train_step(a_batch(), OPTIM)
    assert other.publish().fingerprint == backend.publish().fingerprint
    assert other.publish().version == backend.publish().version
