"""The local learner against a naive float64 twin, and what its gradient must not depend on."""

from __future__ import annotations

import hashlib
import json
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from retrain.backends import local
from retrain.backends.loss import LossSettings, LossTokens, importance_sampling, token_weights
from retrain.backends.objective import Objective
from retrain.errors import ResumeError
from retrain.types import OptimStep

torch.set_num_threads(1)

OPTIM = OptimStep(1e-3, 0.0, 0.9, 0.95, 1e-8, 1.0)


def flat_gradient(backend, batch):
    stats = backend.gradient(batch)
    return stats, torch.cat([p.grad.flatten().double() for p in backend.policy.adapter.values()])


def distance(a, b):
    return float((a - b).norm() / b.norm())


def naive(backend, batch, agg):
    """The same loss token by token in float64: full logits, no chunks, no batching, adapter applied by hand."""
    policy = backend.policy
    model = policy.model.double()

    def plainly(layer):
        return lambda x: torch.nn.functional.linear(x, layer.base.weight + layer.delta())

    for layer in policy.layers.values():
        layer.forward = plainly(layer)
    parameters = list(policy.adapter.values())
    total = torch.zeros((), dtype=torch.float64)
    for row in batch.rows:
        ids = torch.tensor(row.token_ids_T.tolist())
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
        count = int(row.sampled_T.sum())
        for t in range(1, len(ids)):
            if not row.sampled_T[t]:
                continue
            logprob = torch.log_softmax(logits[t - 1] / batch.temperature, -1)[ids[t]]
            ratio = torch.exp(logprob - float(row.old_logprobs_T[t]))
            term = -ratio * float(row.advantages_T[t])
            if agg == "token_mean":
                total = total + term / batch.num_tokens
            elif agg == "sequence_mean":
                total = total + term / count / batch.num_rollouts
            else:
                total = total + term / batch.fixed_tokens
    for p in parameters:
        p.grad = None
    total.backward()
    return float(total.detach()), torch.cat([p.grad.flatten().double() for p in parameters])


@pytest.mark.parametrize("agg", ["token_mean", "sequence_mean", "fixed"])
def test_loss_and_gradient_equal_the_float64_twin(make_backend, agg, make_batch):
    backend = make_backend(loss={"agg": agg})
    batch = make_batch(backend=backend, rows=5)
    stats, gradient = flat_gradient(backend, batch)
    loss, expected = naive(backend, batch, agg)
    assert abs(stats["loss"] - loss) <= 1e-5 * max(1, abs(loss))
    assert distance(gradient, expected) < 1e-5


def test_the_gradient_does_not_depend_on_order_microbatches_or_padding(make_backend, make_batch):
    backend = make_backend()
    batch = make_batch(backend=backend)
    _, expected = flat_gradient(backend, batch)
    rng = np.random.default_rng(1)
    for limit in (1, 60, 100, 10**6):
        backend._microbatch_tokens = limit
        shuffled = replace(batch, rows=tuple(batch.rows[i] for i in rng.permutation(len(batch.rows))))
        _, gradient = flat_gradient(backend, shuffled)
        assert distance(gradient, expected) <= 1e-5


def test_the_head_may_be_cut_into_any_chunks(make_backend, make_batch):
    backend = make_backend()
    batch = make_batch(backend=backend)
    _, expected = flat_gradient(backend, batch)
    backend._plan = replace(backend._plan, head_tokens=7)
    _, gradient = flat_gradient(backend, batch)
    assert distance(gradient, expected) <= 1e-6


def test_leaving_out_rows_without_signal_changes_no_gradient(make_backend, make_batch):
    backend = make_backend()
    batch = make_batch(backend=backend)
    silent = [
        replace(row, advantages_T=np.zeros_like(row.advantages_T)) if i % 2 else row
        for i, row in enumerate(batch.rows)
    ]
    _, kept = flat_gradient(backend, replace(batch, rows=tuple(silent)))
    _, left = flat_gradient(backend, replace(batch, rows=tuple(silent[::2])))
    assert distance(left, kept) <= 1e-6


def test_checkpointing_gives_the_same_gradient(make_backend, make_batch):
    backend = make_backend()
    batch = make_batch(backend=backend)
    _, expected = flat_gradient(backend, batch)
    backend._plan = replace(backend._plan, checkpointing=True)
    backend.policy.recompute_activations()
    _, gradient = flat_gradient(backend, batch)
    assert distance(gradient, expected) <= 1e-6


def test_importance_sampling_is_reinforce_on_policy():
    new = torch.tensor([-1.0, -2.0], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([2.0, -3.0], dtype=torch.float64)
    tokens = LossTokens(new, new.detach(), advantages, torch.zeros(2, dtype=torch.long))
    importance_sampling(tokens, LossSettings())[0].sum().backward()
    torch.testing.assert_close(new.grad, -advantages)


def test_weights_are_zero_off_the_sampled_tokens_and_sum_as_promised(make_batch):
    batch = make_batch()
    for agg, total in (("token_mean", None), ("sequence_mean", 12 / 14), ("fixed", None)):
        weights = token_weights(batch, agg)
        assert all(not w[~r.sampled_T].any() for w, r in zip(weights, batch.rows, strict=True))
        if total is not None:
            assert abs(sum(w.sum() for w in weights) - total) < 1e-12


def test_a_non_finite_update_is_skipped_and_changes_nothing(make_backend, make_batch):
    backend = make_backend()
    batch = make_batch(backend=backend)
    before = {n: p.detach().clone() for n, p in backend.policy.adapter.items()}
    rows = list(batch.rows)
    old = rows[0].old_logprobs_T.copy()
    old[rows[0].sampled_T] = -1e30
    rows[0] = replace(rows[0], old_logprobs_T=old)
    report = backend.train_step(replace(batch, rows=tuple(rows)), OPTIM)
    assert report.update_skipped
    assert report.loss is None
    for name, p in backend.policy.adapter.items():
        torch.testing.assert_close(p.detach(), before[name], rtol=0, atol=0)
    good = backend.train_step(batch, OPTIM)
    assert not good.update_skipped
    assert good.grad_norm is not None


def test_the_gradient_is_clipped_to_the_norm(make_backend, make_batch):
    backend = make_backend()
    batch = make_batch(backend=backend)
    norm = float(flat_gradient(backend, batch)[1].norm())
    report = backend.train_step(batch, replace(OPTIM, grad_clip=norm / 10))
    assert report.grad_clipped
    assert abs(report.grad_norm - norm) < 1e-6 * norm
    assert not backend.train_step(batch, replace(OPTIM, grad_clip=norm * 100)).grad_clipped


def test_save_and_restore_continue_the_very_same_steps(make_backend, tmp_path, make_batch):
    backend = make_backend()
    batch = make_batch(backend=backend)
    backend.train_step(batch, OPTIM)
    backend.save(tmp_path)
    names = sorted(p.name for p in tmp_path.rglob("*") if p.is_file())
    assert names == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "learner.json",
        "optimizer.safetensors",
    ]
    backend.train_step(batch, OPTIM)
    other = make_backend()
    other.restore(tmp_path)
    other.train_step(batch, OPTIM)
    for (name, p), q in zip(backend.policy.adapter.items(), other.policy.adapter.values(), strict=True):
        assert p.detach().numpy().tobytes() == q.detach().numpy().tobytes(), name
    assert backend.publish().version == other.publish().version == 2


def test_the_adapter_of_another_model_is_refused_by_name(make_backend, random_model, tmp_path):
    backend = make_backend()
    backend.save(tmp_path)
    other = make_backend(folder=str(random_model(hidden=128)))
    with pytest.raises(ResumeError, match="does not fit this model"):
        other.restore(tmp_path)
    wider = make_backend(rank=8)
    with pytest.raises(ResumeError, match="has shape"):
        wider.restore(tmp_path)


def test_the_saved_adapter_is_what_peft_itself_computes(make_backend, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    backend = make_backend()
    backend.save(tmp_path)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(config["target_modules"])
    base = AutoModelForCausalLM.from_pretrained(config["base_model_name_or_path"])
    with warnings.catch_warnings():
        # PEFT still asks transformers for an attribute by its old name.
        warnings.simplefilter("ignore", FutureWarning)
        theirs = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad(), backend.policy.mode("adapter"):
        ours = backend.policy.model(input_ids=ids).logits
        torch.testing.assert_close(ours, theirs(input_ids=ids).logits, atol=1e-4, rtol=1e-4)


def test_one_seed_is_one_adapter(make_config, random_model):
    model = str(random_model())
    made = [local.build(make_config(model={"model": model}, training={"seed": s}), None) for s in (3, 3, 4)]
    prints = [b.publish().fingerprint for b in made]
    assert prints[0] == prints[1] != prints[2]


def test_masked_rows_are_scored_without_gradient_and_change_nothing(make_backend, make_batch):
    """A row whose advantages are all 0 counts in the ratio, the loss and the tokens, and costs no backward pass."""
    backend = make_backend()
    batch = make_batch(backend=backend, rows=6)
    masked = tuple(
        replace(row, advantages_T=np.zeros_like(row.advantages_T)) if i < 2 else row
        for i, row in enumerate(batch.rows)
    )
    kept = replace(batch, rows=masked)
    stats, gradient = flat_gradient(backend, kept)
    backend._objective.needs_advantage = False
    before, expected = flat_gradient(backend, kept)
    assert stats["microbatches"] == before["microbatches"] + 1
    assert distance(gradient, expected) <= 1e-6
    for name in ("loss", "ratio_mean", "ratio_min", "ratio_max", "approx_kl"):
        assert abs(stats[name] - before[name]) < 1e-6, name
    silent = replace(
        batch, rows=tuple(replace(r, advantages_T=np.zeros_like(r.advantages_T)) for r in batch.rows)
    )
    backend._objective.needs_advantage = True
    assert float(flat_gradient(backend, silent)[1].abs().max()) == 0.0


@pytest.mark.parametrize(
    ("loss", "needs"), [({}, True), ({"kind": "gspo"}, True), ({"kl": 0.1}, False), ({"entropy": 0.1}, False)]
)
def test_only_a_loss_that_is_a_multiple_of_the_advantage_skips_masked_rows(make_config, loss, needs):
    assert Objective(make_config(loss=loss).loss).needs_advantage is needs


def test_the_parts_of_a_step_are_timed_and_their_tokens_counted(make_backend, make_batch):
    backend = make_backend()
    batch = make_batch(backend=backend)
    backend.train_step(batch, OPTIM)
    timings = dict(backend.timings)
    assert set(timings) == {"forward", "head", "backward", "optimizer", "trained_tokens", "packed_tokens"}
    assert all(value > 0 for value in timings.values())
    assert timings["trained_tokens"] == sum(int(r.sampled_T.sum()) for r in batch.rows)
    # The last token of a row needs no pass: nothing is drawn after it.
    assert timings["packed_tokens"] == sum(len(r.token_ids_T) - 1 for r in batch.rows)
    backend.train_step(batch, OPTIM)
    assert backend.timings["trained_tokens"] == 2 * timings["trained_tokens"]


def test_the_first_gradient_of_a_batch_is_hashed_when_asked_and_before_it_is_clipped(make_backend, make_batch):
    backend = make_backend()
    batch = make_batch(backend=backend)
    flat_gradient(backend, batch)
    found = hashlib.sha256()
    for name in sorted(backend.policy.adapter):
        found.update(name.encode() + b"\0" + backend.policy.adapter[name].grad.numpy().tobytes())
    asked = replace(OPTIM, hash_gradient=True, grad_clip=1e-9)
    report = backend.train_step(batch, asked)
    assert report.grad_clipped
    assert report.gradient_hash == found.hexdigest()
    assert backend.train_step(batch, asked).gradient_hash == ""
    other = replace(batch, rows=batch.rows[::-1])
    assert backend.train_step(other, OPTIM).gradient_hash == ""
    assert backend.train_step(replace(batch), asked).gradient_hash not in ("", found.hexdigest())
