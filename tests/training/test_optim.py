"""Learning-rate schedules against their formulas, step by step."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrain.config.load import load_config
from retrain.training.optim import optim_at, rate_at


def config(**training):
    return load_config({"data": {"source": "arithmetic"}, "training": training})


def twin(step: int, *, lr: float, warm: int, total: int, kind: str, final: float) -> float:
    """The formulas written out a second time, by cases."""
    if step < warm:
        return lr * (step + 1) / warm
    if kind == "constant":
        return lr
    share = (step - warm) / (total - warm)
    low = final * lr
    if kind == "linear":
        return lr + (low - lr) * share
    return low + (lr - low) * (1 + math.cos(math.pi * share)) / 2


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
@given(total=st.integers(2, 60), warm=st.integers(0, 20), final=st.floats(0, 1), lr=st.floats(1e-7, 1e-1))
def test_every_step_follows_the_formula(kind, total, warm, final, lr):
    given_final = {"lr_final_share": final} if kind != "constant" else {}
    made = config(max_steps=total, warmup_steps=warm, lr=lr, lr_schedule=kind, **given_final)
    for step in range(total):
        expected = twin(step, lr=lr, warm=warm, total=total, kind=kind, final=final)
        assert rate_at(made, step) == pytest.approx(expected, rel=1e-12, abs=1e-18)
        assert 0 < rate_at(made, step) <= lr * (1 + 1e-12)


def test_the_last_step_still_moves_and_the_end_is_the_final_share():
    made = config(max_steps=10, lr=1.0e-2, lr_schedule="linear")
    assert rate_at(made, 9) == pytest.approx(1e-3)
    made = config(max_steps=10, lr=1.0e-2, lr_schedule="cosine", lr_final_share=0.25)
    assert rate_at(made, 10) == pytest.approx(2.5e-3)
    rates = [rate_at(made, step) for step in range(11)]
    assert rates == sorted(rates, reverse=True)


def test_everything_else_is_the_same_at_every_step():
    made = config(max_steps=4, lr=1e-3, lr_schedule="cosine", weight_decay=0.1)
    first, last = optim_at(made, 0), optim_at(made, 3)
    assert (first.weight_decay, first.beta1, first.beta2, first.eps, first.grad_clip) == (
        0.1,
        0.9,
        0.95,
        1e-8,
        1.0,
    )
    assert first.lr > last.lr


@pytest.mark.parametrize(("every", "hashed"), [(0, [0]), (1, [0, 1, 2, 3, 4, 5, 6]), (3, [0, 3, 6])])
def test_gradients_are_hashed_where_a_step_begins_at_a_checkpoint(every, hashed):
    made = config(save_every=every, max_steps=7)
    assert [step for step in range(7) if optim_at(made, step).hash_gradient] == hashed
