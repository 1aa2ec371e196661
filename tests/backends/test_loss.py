"""Every loss and term as a function: value and gradient against the formula written token by token, in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retrain.backends import loss as losses
from retrain.backends.loss import LossSettings, LossTokens, kl_estimate, settings_of, token_weights
from retrain.config.schema import Loss
from retrain.types import TrainBatch, TrainRow

torch.set_num_threads(1)

KINDS = ["importance_sampling", "ppo", "gspo", "cispo"]


def twin(kind, new, old, advantages, row, s):
    """(value, d value / d new, cut) per token: the formulas with their derivatives done by hand."""
    out = []
    for t in range(len(new)):
        r, a = math.exp(new[t] - old[t]), advantages[t]
        if kind == "gspo":
            mine = [j for j in range(len(new)) if row[j] == row[t]]
            r = math.exp(sum(new[j] - old[j] for j in mine) / len(mine))
        if kind == "importance_sampling":
            # With a cap the weight is a constant in front of log pi, so the value is not the ratio's.
            w = min(r, s.tis_cap)
            out.append((-w * a * new[t], -w * a, False) if s.tis_cap else (-r * a, -r * a, False))
        elif kind == "cispo":
            w = min(max(r, 1 - s.clip_low), 1 + s.clip_high)
            out.append((-w * a * new[t], -w * a, w != r))
        else:
            inside = min(r * a, min(max(r, 1 - s.clip_low), 1 + s.clip_high) * a)
            best = max(inside, s.dual_clip * a) if s.dual_clip and a < 0 else inside
            moves = best == r * a
            out.append((-best, -r * a if moves else 0.0, not moves))
    return out


def rows_of(lengths):
    return np.repeat(np.arange(len(lengths)), lengths)


@st.composite
def tokens(draw):
    lengths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    n = sum(lengths)
    number = st.floats(-2.5, 2.5, allow_nan=False)
    gap = draw(st.lists(number, min_size=n, max_size=n))
    old = draw(st.lists(st.floats(-8, -0.01), min_size=n, max_size=n))
    advantages = draw(st.lists(st.one_of(st.just(0.0), number), min_size=n, max_size=n))
    return np.array(old) + np.array(gap), np.array(old), np.array(advantages), rows_of(lengths)


cuts = st.builds(
    LossSettings,
    clip_low=st.floats(0.01, 1.0),
    clip_high=st.floats(0.01, 4.0),
    dual_clip=st.one_of(st.just(0.0), st.floats(1.5, 6.0)),
    tis_cap=st.one_of(st.just(0.0), st.floats(0.5, 4.0)),
)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(tokens(), cuts)
def test_value_gradient_and_cut_are_those_of_the_formula(kind, made, chosen):
    new, old, advantages, row = made
    leaf = torch.tensor(new, requires_grad=True)
    given_ = LossTokens(leaf, torch.tensor(old), torch.tensor(advantages), torch.tensor(row))
    value, clipped = getattr(losses, kind)(given_, chosen)
    value.sum().backward()
    expected = twin(kind, new, old, advantages, row, chosen)
    np.testing.assert_allclose(value.detach().numpy(), [e[0] for e in expected], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(leaf.grad.numpy(), [e[1] for e in expected], rtol=1e-12, atol=1e-12)
    # At a denormal advantage r A and its bound are one number: nothing can tell which of them was taken.
    acts = abs(advantages) > 1e-300  # where the advantage is 0 there is no gradient to cut
    assert clipped.numpy()[acts].tolist() == [e[2] for e, on in zip(expected, acts, strict=True) if on]


@pytest.mark.parametrize("kind", KINDS)
def test_on_policy_every_loss_has_the_gradient_of_reinforce_and_cuts_nothing(kind):
    new = torch.tensor([-1.0, -2.0, -0.5], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([2.0, -3.0, 0.7], dtype=torch.float64)
    given_ = LossTokens(new, new.detach(), advantages, torch.tensor([0, 0, 1]))
    value, clipped = getattr(losses, kind)(given_, settings_of(Loss(kind=kind)))
    value.sum().backward()
    torch.testing.assert_close(new.grad, -advantages, rtol=1e-14, atol=0)
    assert not clipped.any()


@pytest.mark.parametrize(
    ("kind", "low", "high"),
    [("ppo", 0.2, 0.2), ("gspo", 3e-4, 4e-4), ("cispo", 1.0, 4.0), ("my.own", 0.2, 0.2)],
)
def test_unset_clips_are_those_of_the_kind(kind, low, high):
    made = settings_of(Loss(kind=kind))
    assert (made.clip_low, made.clip_high) == (low, high)
    made = settings_of(Loss(kind=kind, clip_low=0.0, clip_high=0.28))
    assert (made.clip_low, made.clip_high) == (0.0, 0.28)


def test_gspo_with_one_advantage_per_row_is_the_sequence_objective():
    """min(s A, clip(s) A) averaged over rows, differentiated as it stands in the paper."""
    rng = np.random.default_rng(3)
    lengths = [4, 7, 2, 9]
    row = torch.tensor(rows_of(lengths))
    old = torch.tensor(rng.uniform(-5, -1, 22))
    new = (old + torch.tensor(rng.normal(0, 0.4, 22))).requires_grad_()
    per_row = torch.tensor([1.0, -0.5, 2.0, -1.0], dtype=torch.float64)
    chosen = LossSettings(clip_low=0.1, clip_high=0.1)
    value, _ = losses.gspo(LossTokens(new, old, per_row[row], row), chosen)
    weights = torch.tensor([1 / n / 4 for n in lengths], dtype=torch.float64)[row]
    total = (value * weights).sum()
    (gradient,) = torch.autograd.grad(total, new)
    direct = torch.zeros((), dtype=torch.float64)
    for i in range(4):
        s = torch.exp((new - old)[row == i].mean())
        direct = direct - torch.minimum(s * per_row[i], s.clamp(0.9, 1.1) * per_row[i]) / 4
    (expected,) = torch.autograd.grad(direct, new)
    torch.testing.assert_close(total, direct, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-15)
    assert bool((expected == 0).any())
    assert bool((expected != 0).any())


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.floats(-9, -0.01), st.floats(-3, 3)), min_size=1, max_size=8))
def test_kl_estimators_and_their_slopes(pairs):
    new = torch.tensor([n for n, _ in pairs], dtype=torch.float64, requires_grad=True)
    x = np.array([x for _, x in pairs])
    base = new.detach() + torch.tensor(x)
    formulas = {
        "k1": (-x, np.ones_like(x)),
        "k2": (x**2 / 2, -x),
        "k3": (np.exp(x) - 1 - x, 1 - np.exp(x)),
    }
    for kind, (value, slope) in formulas.items():
        made = kl_estimate(new, base, kind)
        (gradient,) = torch.autograd.grad(made.sum(), new)
        np.testing.assert_allclose(made.detach().numpy(), value, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(gradient.numpy(), slope, rtol=1e-9, atol=1e-12)


def test_in_expectation_k2_has_the_gradient_of_the_divergence_and_k1_none():
    """Summed over a whole small vocabulary instead of sampled, so that expectations are exact."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(9, generator=generator, dtype=torch.float64, requires_grad=True)
    base = torch.log_softmax(torch.randn(9, generator=generator, dtype=torch.float64), -1)
    logprobs = torch.log_softmax(logits, -1)
    mass = logprobs.detach().exp()
    (exact,) = torch.autograd.grad((logprobs.exp() * (logprobs - base)).sum(), logits, retain_graph=True)
    expected = {k: (mass * kl_estimate(logprobs, base, k)).sum() for k in ("k1", "k2", "k3")}
    slopes = {k: torch.autograd.grad(v, logits, retain_graph=True)[0] for k, v in expected.items()}
    torch.testing.assert_close(slopes["k2"], exact, rtol=1e-10, atol=1e-14)
    assert float(slopes["k1"].abs().max()) < 1e-14
    assert float((slopes["k3"] - exact).norm() / exact.norm()) > 0.05
    divergence = float((mass * (logprobs.detach() - base)).sum())
    assert abs(float(expected["k1"].detach()) - divergence) < 1e-12
    assert abs(float(expected["k3"].detach()) - divergence) < 1e-12


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(0, 30), st.integers(0, 3))
def test_the_weights_are_the_three_means(lengths, more_tokens, more_rollouts):
    rows = []
    for n in lengths:
        sampled = np.arange(n + 2) >= 2
        old = np.where(sampled, -1.0, np.nan).astype(np.float32)
        rows.append(TrainRow(np.arange(n + 2, dtype=np.int32), sampled, old, sampled.astype(np.float32)))
    n_tokens, n_rollouts = sum(lengths) + more_tokens, len(lengths) + more_rollouts
    batch = TrainBatch(tuple(rows), n_tokens, n_rollouts, 640, 1.0)
    values = [np.arange(n, dtype=np.float64) + i for i, n in enumerate(lengths)]
    expected = {
        "token_mean": sum(float(v.sum()) for v in values) / n_tokens,
        "sequence_mean": sum(float(v.mean()) for v in values) / n_rollouts,
        "fixed": sum(float(v.sum()) for v in values) / 640,
    }
    for agg, total in expected.items():
        weights = token_weights(batch, agg)
        assert all(not w[:2].any() for w in weights)
        got = sum(float((w[2:] * v).sum()) for w, v in zip(weights, values, strict=True))
        assert got == pytest.approx(total, rel=1e-12)
