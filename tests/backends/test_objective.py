"""The whole objective in the learner: policy loss, correction for the sampler, KL and entropy, over several updates."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from retrain.backends import local
from retrain.backends.objective import Objective
from retrain.config.schema import Loss
from retrain.errors import ConfigError, LearnerError, PluginError, RunError
from retrain.training.batch import pack
from retrain.types import CreditedGroup, Message, OptimStep, Rollout, Score, ScoredGroup, Task

torch.set_num_threads(1)

OPTIM = OptimStep(5e-3, 0.0, 0.9, 0.95, 1e-8, 0.0)
CUTS = {"clip_low": 0.05, "clip_high": 0.08}

OBJECTIVES = {
    "importance_sampling": {},
    "importance_sampling, capped": {"tis_cap": 1.05},
    "ppo": CUTS,
    "ppo, dual clip": {**CUTS, "clip_high": 0.3, "dual_clip": 1.1},
    "gspo": {"clip_low": 0.01, "clip_high": 0.02},
    "cispo": CUTS,
    "ppo, capped": {**CUTS, "tis_cap": 1.05},
    "gspo, capped": {"clip_low": 0.01, "clip_high": 0.02, "tis_cap": 1.05},
    "cispo, capped": {**CUTS, "tis_cap": 1.05},
    "importance_sampling, k1": {"kl": 0.3, "kl_kind": "k1"},
    "importance_sampling, k2": {"kl": 0.3, "kl_kind": "k2"},
    "importance_sampling, k3": {"kl": 0.3, "kl_kind": "k3"},
    "importance_sampling, entropy": {"entropy": 0.2},
    "gspo, all terms": {"clip_low": 0.01, "clip_high": 0.02, "tis_cap": 1.05, "kl": 0.3, "entropy": -0.1},
}
ACTING = [name for name in OBJECTIVES if name.startswith(("ppo", "gspo", "cispo")) or "capped" in name]


def section(name, **more):
    return {"kind": name.partition(",")[0], **OBJECTIVES[name], **more}


def flat(backend):
    return torch.cat([p.grad.flatten().double() for p in backend.policy.adapter.values()])


def flat_gradient(backend, batch):
    return backend.gradient(batch), flat(backend)


def distance(a, b):
    return float((a - b).norm() / b.norm())


class Twin:
    """The objective in float64, token by token, over full logits; slopes by hand, only the model by autograd."""

    def __init__(self, backend):
        self.backend, self.loss = backend, backend._config.loss
        model = backend.policy.model.double()
        self.model, self.first = model, None

        def plainly(layer):
            return lambda x: torch.nn.functional.linear(
                x, layer.base.weight + (layer.delta() if self.adapted else 0.0)
            )

        for layer in backend.policy.layers.values():
            layer.forward = plainly(layer)

    def scores(self, batch, adapted=True):
        """Per row the logprobs and entropies of its sampled tokens, with graph."""
        self.adapted = adapted
        out = []
        for row in batch.rows:
            ids = torch.tensor(row.token_ids_T.tolist())
            logits = self.model(input_ids=ids[None], use_cache=False).logits[0] / batch.temperature
            all_ = torch.log_softmax(logits, -1)
            at = np.flatnonzero(row.sampled_T)
            logprobs = torch.stack([all_[t - 1, ids[t]] for t in at])
            entropies = torch.stack([-(all_[t - 1].exp() * all_[t - 1]).sum() for t in at])
            out.append((logprobs, entropies))
        return out

    def __call__(self, batch):
        """(value, gradient) of one pass; the first pass over a batch fixes what the learner was."""
        loss = self.loss
        scored = self.scores(batch)
        base = [b.detach() for b, _ in self.scores(batch, adapted=False)]
        new = [s.detach() for s, _ in scored]
        self.first = new if self.first is None else self.first
        value, leaf = 0.0, torch.zeros((), dtype=torch.float64)
        self.cut, self.nearest = [], math.inf
        for i, row in enumerate(batch.rows):
            sampler = row.old_logprobs_T[row.sampled_T].astype(np.float64)
            proximal = loss.kind != "importance_sampling"
            old = self.first[i].numpy() if proximal else sampler
            row_ratio = math.exp(float(np.mean(new[i].numpy() - old)))
            for t, a in enumerate(row.advantages_T[row.sampled_T].astype(np.float64)):
                lp = float(new[i][t])
                r = math.exp(lp - old[t])
                low, high = 1 - (loss.clip_low or 0), 1 + (loss.clip_high or 0)
                term, slope, cut = -r * a, -r * a, False
                if loss.kind == "importance_sampling" and loss.tis_cap:
                    w = min(r, loss.tis_cap)
                    term, slope = -w * a * lp, -w * a
                elif loss.kind == "cispo":
                    w = min(max(r, low), high)
                    term, slope, cut = -w * a * lp, -w * a, w != r
                elif loss.kind in ("ppo", "gspo"):
                    s = row_ratio if loss.kind == "gspo" else r
                    cut = s > high if a > 0 else s < low or bool(loss.dual_clip and s > loss.dual_clip)
                    bound = high if a > 0 else low if s < low else loss.dual_clip
                    term, slope = (-bound * a, 0.0) if cut else (-s * a, -s * a)
                    self.nearest = min([self.nearest, abs(s - low), abs(s - high)])
                if proximal and loss.tis_cap:
                    factor = min(math.exp(float(self.first[i][t]) - sampler[t]), loss.tis_cap)
                    term, slope = term * factor, slope * factor
                if loss.kl:
                    x = float(base[i][t]) - lp
                    term += loss.kl * {"k1": -x, "k2": x * x / 2, "k3": math.exp(x) - 1 - x}[loss.kl_kind]
                    slope += loss.kl * {"k1": 1.0, "k2": -x, "k3": 1 - math.exp(x)}[loss.kl_kind]
                term -= loss.entropy * float(scored[i][1][t].detach())
                count = int(row.sampled_T.sum())
                weight = {
                    "token_mean": 1 / batch.num_tokens,
                    "sequence_mean": 1 / count / batch.num_rollouts,
                    "fixed": 1 / batch.fixed_tokens,
                }[loss.agg]
                value += weight * term
                leaf = leaf + weight * (slope * scored[i][0][t] - loss.entropy * scored[i][1][t])
                self.cut.append(cut)
        for p in self.backend.policy.adapter.values():
            p.grad = None
        leaf.backward()
        return value, flat(self.backend)


@pytest.mark.parametrize(
    ("name", "agg"),
    [(name, "token_mean") for name in OBJECTIVES]
    + [(n, a) for n in ("ppo, capped", "gspo, all terms") for a in ("sequence_mean", "fixed")],
)
def test_value_and_gradient_equal_the_float64_twin(make_backend, make_batch, name, agg):
    backend = make_backend(loss=section(name, agg=agg))
    batch = make_batch(backend=backend, rows=4)
    stats, gradient = flat_gradient(backend, batch)
    twin = Twin(backend)
    value, expected = twin(batch)
    assert abs(stats["loss"] - value) <= 2e-5 * max(1, abs(value))
    assert distance(gradient, expected) < 2e-5
    if backend._config.loss.kind != "importance_sampling":
        assert stats["clip_share"] == np.mean(twin.cut) == 0
    else:
        assert stats["clip_share"] is None


@pytest.mark.parametrize(
    ("name", "lr"),
    [
        ("ppo", 5e-4),
        ("ppo, dual clip", 2e-3),
        ("gspo", 3e-5),
        ("cispo", 5e-4),
        ("ppo, capped", 5e-4),
        ("gspo, capped", 3e-5),
        ("cispo, capped", 5e-4),
        ("gspo, all terms", 3e-5),
    ],
)
def test_the_second_update_of_a_batch_equals_the_twin(make_backend, make_batch, name, lr):
    """The weights have moved since the first: what is capped and what the ratio is taken against must not have."""
    backend = make_backend(loss=section(name))
    other = make_backend(loss=section(name))
    batch = make_batch(backend=backend, rows=4)
    twin = Twin(other)
    twin(batch)
    assert not backend.train_step(batch, replace(OPTIM, lr=lr)).update_skipped
    with torch.no_grad():
        for p, q in zip(backend.policy.adapter.values(), other.policy.adapter.values(), strict=True):
            q.copy_(p)
    stats, gradient = flat_gradient(backend, batch)
    value, expected = twin(batch)
    assert twin.nearest > 1e-6
    assert abs(stats["loss"] - value) <= 2e-5 * max(1, abs(value))
    assert distance(gradient, expected) < 2e-5
    assert 0 < np.mean(twin.cut) < 1
    assert stats["clip_share"] == pytest.approx(np.mean(twin.cut))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_gradient_depends_neither_on_microbatches_nor_on_order(make_backend, make_batch, name):
    backend = make_backend(loss=section(name))
    batch = make_batch(backend=backend, rows=7)
    _, expected = flat_gradient(backend, batch)
    rng = np.random.default_rng(1)
    for limit in (1, 90, 10**6):
        backend._microbatch_tokens = limit
        shuffled = replace(batch, rows=tuple(batch.rows[i] for i in rng.permutation(len(batch.rows))))
        _, gradient = flat_gradient(backend, shuffled)
        assert distance(gradient, expected) <= 1e-5


@pytest.mark.parametrize(
    "name", [n for n in OBJECTIVES if "k" not in n.partition(",")[2] and "t" not in n.partition(",")[2]]
)
def test_leaving_out_silent_rows_changes_no_gradient(make_backend, make_batch, name):
    backend = make_backend(loss=section(name))
    batch = make_batch(backend=backend, rows=8)
    silent = [
        replace(row, advantages_T=np.zeros_like(row.advantages_T)) if i % 2 else row
        for i, row in enumerate(batch.rows)
    ]
    _, kept = flat_gradient(backend, replace(batch, rows=tuple(silent)))
    _, left = flat_gradient(backend, replace(batch, rows=tuple(silent[::2])))
    assert distance(left, kept) <= 1e-6


@pytest.mark.parametrize("name", ["importance_sampling, k3", "importance_sampling, entropy"])
def test_silent_rows_train_on_the_terms_that_need_no_advantage(make_backend, make_batch, name):
    backend = make_backend(loss=section(name))
    batch = make_batch(backend=backend, rows=3)
    silent = tuple(replace(row, advantages_T=np.zeros_like(row.advantages_T)) for row in batch.rows)
    stats, gradient = flat_gradient(backend, replace(batch, rows=silent))
    assert float(gradient.norm()) > 1e-5
    term = -0.2 * stats["entropy"] if "entropy" in name else 0.3 * stats["kl_base"]
    tokens = sum(int(r.sampled_T.sum()) for r in silent)
    assert stats["loss"] == pytest.approx(term * tokens / batch.num_tokens, rel=1e-4)


def credited(rewards, errors, skipped):
    rollouts, scores, advantages = [], [], []
    for member, reward in enumerate(rewards):
        sampled = np.arange(5) >= 2
        rollouts.append(
            Rollout("t", member, np.arange(5, dtype=np.int32), sampled,
                    np.where(sampled, -1.0, np.nan).astype(np.float32), None, "", "stop", 0)
        )  # fmt: skip
        scores.append(Score.failed("broke") if member in errors else Score(reward, None))
        advantages.append(np.zeros(5, np.float32))
    task = Task("t", (Message("user", "?"),), "1", "test", 0)
    blank = tuple(np.zeros(5, dtype=bool) for _ in rewards)
    zero = tuple(np.zeros(5, dtype=np.float32) for _ in rewards)
    return CreditedGroup(
        ScoredGroup(task, tuple(rollouts), tuple(scores)), tuple(advantages), zero, blank, skipped
    )


def test_packing_keeps_silent_groups_on_demand_and_never_a_broken_member():
    groups = [credited([1, 1, 1], (), "all correct"), credited([0, 1], (1,), "errors")]
    kept = pack(groups, temperature=1.0, fixed_tokens=60, keep_silent=True)
    left = pack(groups, temperature=1.0, fixed_tokens=60)
    assert (len(kept.rows), len(left.rows)) == (4, 0)
    assert (kept.num_tokens, kept.num_rollouts) == (left.num_tokens, left.num_rollouts) == (12, 4)
    assert not any(row.advantages_T.any() for row in kept.rows)


def test_entropy_and_its_gradient_are_those_of_dense_autograd(make_backend):
    policy = make_backend().policy
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(23, 64, generator=generator)
    targets = torch.randint(0, 250, (23,), generator=generator)
    pull = torch.randn(2, 23, generator=generator, dtype=torch.float64)
    dense = hidden.double().requires_grad_()
    logprobs = torch.log_softmax(dense @ policy.head.weight.double().T / 0.7, -1)
    chosen, entropies = logprobs[torch.arange(23), targets], -(logprobs.exp() * logprobs).sum(-1)
    (chosen * pull[0] + entropies * pull[1]).sum().backward()
    for chunk in (1, 7, 23, 100):
        ours = hidden.clone().requires_grad_()
        values, found = policy.selected_logprobs_and_entropies(ours, targets, 0.7, chunk)
        (values * pull[0].float() + found * pull[1].float()).sum().backward()
        torch.testing.assert_close(values.detach().double(), chosen.detach(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.detach().double(), entropies.detach(), rtol=1e-5, atol=1e-5)
        assert distance(ours.grad.double(), dense.grad) < 1e-5


def test_the_entropy_of_a_certain_policy_is_zero_and_has_no_nan(make_backend):
    policy = make_backend().policy
    hidden = (policy.head.weight[7] * 1e6)[None].detach().clone().requires_grad_()
    _, found = policy.selected_logprobs_and_entropies(hidden, torch.tensor([7]), 1.0, 4)
    found.sum().backward()
    assert float(found.detach()) == 0
    assert bool(torch.isfinite(hidden.grad).all())


def test_an_entropy_bonus_raises_entropy_and_a_kl_term_pulls_to_the_base(make_backend, make_batch):
    for loss, key in (({"entropy": 0.5}, "entropy"), ({"kl": 1.0, "kl_kind": "k2"}, "kl_base")):
        backend = make_backend(loss=loss)
        batch = make_batch(backend=backend, rows=4)
        rows = tuple(replace(r, advantages_T=np.zeros_like(r.advantages_T)) for r in batch.rows)
        batch = replace(batch, rows=rows)
        seen = [getattr(backend.train_step(batch, replace(OPTIM, lr=1e-3)), key) for _ in range(6)]
        assert seen[-1] > seen[0] if key == "entropy" else seen[-1] < 0.7 * seen[0]


def test_clipping_acts_from_the_second_update_of_an_on_policy_batch(make_backend, make_batch):
    backend = make_backend(loss={"kind": "ppo", "clip_low": 0.01, "clip_high": 0.01})
    batch = make_batch(backend=backend, off_policy=0.0)
    first, second = (backend.train_step(batch, OPTIM) for _ in range(2))
    assert first.clip_share == 0
    assert second.clip_share > 0.05
    assert first.approx_kl < 1e-8 < second.approx_kl
    assert backend.publish().version == 2


def overheard(backend):
    """What the loss is handed, call by call."""
    calls, function = [], backend._objective._function

    def listen(tokens, settings):
        calls.append(tokens)
        return function(tokens, settings)

    backend._objective._function = listen
    return calls


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["ppo", "gspo", "cispo"])
def test_at_the_first_update_the_ratio_is_one_however_far_the_sampler_is(
    make_backend, make_batch, kind, dropout
):
    """Bounds of zero clip whatever is not exactly 1; every loss is then REINFORCE on the same forward pass."""
    made = {"lora": {"dropout": dropout}}
    backend = make_backend(loss={"kind": kind, "clip_low": 0.0, "clip_high": 0.0}, **made)
    batch = make_batch(backend=backend, rows=5, off_policy=0.3)
    calls = overheard(backend)
    backend._microbatch_tokens = 90
    stats, gradient = flat_gradient(backend, batch)
    assert len(calls) > 1
    assert all(torch.equal(tokens.old_N, tokens.new_N.detach()) for tokens in calls)
    assert stats["clip_share"] == 0
    assert stats["ratio_max"] > 1.2  # reported against the sampler all the same
    plain = make_backend(**made)
    plain._microbatch_tokens = 90
    plain._objective._function = lambda t, _: (-t.advantages_N * t.new_N, t.new_N > 1)
    assert distance(gradient, flat_gradient(plain, batch)[1]) < 1e-5
    # Asked again before anything has moved: the same.
    again, same = flat_gradient(backend, batch)
    assert (again, torch.equal(same, gradient)) == (stats, True)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("cap", [0.0, 1.05])
def test_later_updates_meet_the_learner_of_the_first_without_dropout(make_backend, make_batch, dropout, cap):
    backend = make_backend(loss={"kind": "ppo", "tis_cap": cap}, lora={"dropout": dropout})
    batch = make_batch(backend=backend, rows=4)
    calls = overheard(backend)
    order = sorted(batch.rows, key=lambda row: -len(row.token_ids_T))
    with backend.policy.mode("adapter"):
        learner = [
            backend.policy.sequence_logprobs(row.token_ids_T, batch.temperature)[
                torch.tensor(row.sampled_T[1:])
            ]
            for row in order
        ]
    first, second, third = (backend.train_step(batch, OPTIM) for _ in range(3))
    assert len(calls) == 3
    assert first.clip_share == 0 < second.clip_share
    for tokens in calls[1:]:
        torch.testing.assert_close(tokens.old_N, torch.cat(learner), rtol=1e-4, atol=1e-4)
        assert float((tokens.new_N.detach() - tokens.old_N).abs().max()) > 1e-2
    shares = {report.tis_capped for report in (first, second, third)}
    assert shares == {None} if not cap else len(shares) == 1


def test_importance_sampling_keeps_its_ratio_to_the_sampler(make_backend, make_batch):
    backend = make_backend()
    batch = make_batch(backend=backend, rows=3)
    calls = overheard(backend)
    for _ in range(2):
        backend.train_step(batch, OPTIM)
    order = sorted(batch.rows, key=lambda row: -len(row.token_ids_T))
    sampler = np.concatenate([row.old_logprobs_T[row.sampled_T] for row in order])
    assert [tokens.old_N.tolist() for tokens in calls] == [sampler.tolist()] * 2


@pytest.mark.parametrize("kind", ["importance_sampling", "ppo", "gspo", "cispo"])
def test_a_gap_between_sampler_and_learner_is_capped(make_backend, make_batch, kind):
    """A sampler whose logprobs are 1 nat low on a third of the tokens: their weight is e, capped at 2."""
    backend = make_backend(loss={"kind": kind, "tis_cap": 2.0})
    batch = make_batch(backend=backend, off_policy=0.0, rows=6)
    rng = np.random.default_rng(0)
    rows, hit = [], []
    for row in batch.rows:
        low = rng.random(len(row.token_ids_T)) < 1 / 3
        hit += low[row.sampled_T].tolist()
        rows.append(replace(row, old_logprobs_T=(row.old_logprobs_T - low).astype(np.float32)))
    gapped = replace(batch, rows=tuple(rows))
    report = backend.train_step(gapped, replace(OPTIM, lr=1e-9))
    assert report.tis_capped == pytest.approx(np.mean(hit))
    assert report.ratio_max == pytest.approx(math.e, rel=1e-3)
    if kind != "importance_sampling":
        assert report.clip_share == 0  # against the learner's own policy the ratio is 1
    # On the first update each loss is then the same: the capped weight times A grad log pi.
    _, gradient = flat_gradient(backend, gapped)
    doubled = [
        replace(r, advantages_T=np.where(r.sampled_T & (g.old_logprobs_T < r.old_logprobs_T - 0.5), 2, 1) * r.advantages_T)
        for r, g in zip(batch.rows, rows, strict=True)
    ]  # fmt: skip
    plain = make_backend(loss={"kind": "importance_sampling"})
    _, expected = flat_gradient(plain, replace(batch, rows=tuple(doubled)))
    assert distance(gradient, expected) < 1e-3


def test_reported_terms_are_null_where_the_loss_has_none(make_backend, make_batch):
    backend = make_backend()
    report = backend.train_step(make_batch(backend=backend, rows=3), OPTIM)
    assert (report.clip_share, report.tis_capped, report.kl_base, report.entropy) == (None, None, None, None)
    backend = make_backend(loss={"kind": "cispo", "tis_cap": 2.0, "kl": 0.1, "entropy": 0.1})
    report = backend.train_step(make_batch(backend=backend, rows=3), OPTIM)
    assert None not in (report.clip_share, report.tis_capped, report.kl_base, report.entropy)


def test_dropout_is_drawn_anew_for_each_update_and_the_ratio_is_measured_without(make_backend, make_batch):
    plain, dropped = make_backend(), make_backend(lora={"dropout": 0.3})
    batch = make_batch(backend=plain)
    (without, expected), (stats, first) = flat_gradient(plain, batch), flat_gradient(dropped, batch)
    assert distance(first, expected) > 0.05
    for key in ("ratio_mean", "ratio_min", "ratio_max", "approx_kl"):
        assert stats[key] == pytest.approx(without[key], rel=1e-6)
    _, again = flat_gradient(dropped, batch)
    assert torch.equal(first, again)
    dropped._version += 1
    assert distance(flat_gradient(dropped, batch)[1], first) > 0.05


def test_dropout_is_pefts_on_the_adapters_inputs_alone(make_backend):
    """B A of a mask times x / (1 - share), the base product untouched: as PEFT computes it from the same draw."""
    policy = make_backend(lora={"dropout": 0.4}).policy
    layer = next(iter(policy.layers.values()))
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), policy.dropout(0.4, 11):
        found = layer(x)
    torch.manual_seed(11)
    with torch.no_grad():
        kept = torch.nn.functional.dropout(x, 0.4)
        assert np.unique(np.round((kept / x).numpy(), 3)).tolist() == pytest.approx([0.0, 1 / 0.6], abs=1e-3)
        expected = x @ layer.base.weight.T + layer.scale * (kept @ layer.a.T @ layer.b.T)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_dropout_disturbs_no_other_random_numbers_and_never_the_sampler(make_backend, make_batch):
    backend = make_backend(lora={"dropout": 0.5})
    batch = make_batch(backend=backend, rows=3)
    canary = backend.publish().canary.logprobs_T
    torch.manual_seed(3)
    backend.gradient(batch)
    drawn = torch.rand(4)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(4))
    np.testing.assert_array_equal(backend.publish().canary.logprobs_T, canary)


def test_dropout_draws_the_same_when_activations_are_recomputed(make_backend, make_batch):
    backend = make_backend(lora={"dropout": 0.3})
    batch = make_batch(backend=backend)
    _, expected = flat_gradient(backend, batch)
    backend._plan = replace(backend._plan, checkpointing=True)
    backend.policy.recompute_activations()
    _, gradient = flat_gradient(backend, batch)
    assert distance(gradient, expected) <= 1e-6


def test_resume_with_dropout_and_all_terms_is_exact(make_backend, make_batch, tmp_path):
    loss = {"kind": "ppo", "tis_cap": 1.05, "kl": 0.1, "entropy": 0.01}
    backend = make_backend(loss=loss, lora={"dropout": 0.2})
    first, second = (make_batch(seed=s, backend=backend, rows=4) for s in (0, 1))
    backend.train_step(first, OPTIM)
    backend.save(tmp_path)
    other = make_backend(loss=loss, lora={"dropout": 0.2})
    other.restore(tmp_path)
    for _ in range(2):
        reports = [b.train_step(second, OPTIM) for b in (backend, other)]
        assert reports[0] == reports[1]
    for p, q in zip(backend.policy.adapter.values(), other.policy.adapter.values(), strict=True):
        assert p.detach().numpy().tobytes() == q.detach().numpy().tobytes()


PLUGINS = """
import torch
def same_as_ppo(tokens, settings):
    from retrain.backends.loss import ppo
    return ppo(tokens, settings)
def one_argument(tokens): return tokens
def no_tuple(tokens, settings): return -tokens.new_N
def a_scalar(tokens, settings): return (-tokens.new_N).sum(), torch.zeros_like(tokens.new_N, dtype=torch.bool)
def floats(tokens, settings): return -tokens.new_N, torch.zeros_like(tokens.new_N)
def no_gradient(tokens, settings): return -tokens.old_N, torch.zeros_like(tokens.new_N, dtype=torch.bool)
def raises(tokens, settings):
    raise ValueError("boom\\nsecond line")
def ends(tokens, settings):
    raise SystemExit(3)
def stops(tokens, settings):
    from retrain.errors import LearnerError
    raise LearnerError("enough", fix="rest.")
"""


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    (tmp_path / "own_losses.py").write_text(PLUGINS)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "own_losses"


def test_a_loss_of_ones_own_is_one_function(make_backend, make_batch, plugin):
    own, known = (
        make_backend(loss={"kind": kind, "tis_cap": 1.05}) for kind in (f"{plugin}.same_as_ppo", "ppo")
    )
    batch = make_batch(backend=known, rows=4)
    (a, left), (b, right) = flat_gradient(own, batch), flat_gradient(known, batch)
    assert torch.equal(left, right)
    assert a == b
    assert a["tis_capped"] > 0


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("no_tuple", "returned Tensor, not two tensors"),
        ("a_scalar", r"returned \(\) torch.float32"),
        ("floats", "torch.float32 for"),
        ("no_gradient", "has no gradient"),
    ],
)
def test_a_loss_of_the_wrong_shape_is_named(make_backend, make_batch, plugin, name, says):
    backend = make_backend(loss={"kind": f"{plugin}.{name}"})
    with pytest.raises(PluginError, match=says):
        backend.gradient(make_batch(backend=backend, rows=2))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("raises", "raised ValueError: boom (own_losses.py:12)."),
        ("ends", "raised SystemExit: 3 (own_losses.py:14)."),
    ],
)
def test_a_loss_that_raises_is_named_with_its_line(make_backend, make_batch, plugin, name, says):
    backend = make_backend(loss={"kind": f"{plugin}.{name}"})
    with pytest.raises(RunError) as caught:
        backend.gradient(make_batch(backend=backend, rows=2))
    assert str(caught.value) == f"loss '{plugin}.{name}' {says} Fix: correct the plug-in."


def test_an_error_of_ours_that_a_loss_raises_passes_as_it_is(make_backend, make_batch, plugin):
    backend = make_backend(loss={"kind": f"{plugin}.stops"})
    with pytest.raises(LearnerError, match="enough Fix: rest"):
        backend.gradient(make_batch(backend=backend, rows=2))


def test_a_loss_that_cannot_be_called_is_found_before_the_model_loads(make_config, plugin, monkeypatch):
    monkeypatch.setattr(local, "load_policy", lambda *_, **__: pytest.fail("the model was loaded"))
    with pytest.raises(PluginError, match="cannot be called with"):
        local.build(make_config(loss={"kind": f"{plugin}.one_argument"}), None)
    with pytest.raises(ConfigError, match="dual_clip"):
        Objective(Loss(kind="ppo", dual_clip=0.5))
