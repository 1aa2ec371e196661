"""The head's tiles against float64 over whole logits."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from retrain import head as module
from retrain.head import FewRows, Head, SelectedLogprobs, few_rows

torch.set_num_threads(1)


def case(rows, hidden, vocabulary, seed=0, *, bias=False, sharpness=4.0, rising=False):
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(hidden, vocabulary, bias=bias).requires_grad_(False)
    layer.weight.copy_(torch.randn(vocabulary, hidden, generator=generator) * sharpness / hidden**0.5)
    if rising:
        # Each later token scores higher, so that the reference rises with every tile.
        layer.weight[:, 0] = torch.linspace(-60.0, 60.0, vocabulary)
    if bias:
        layer.bias.copy_(torch.randn(vocabulary, generator=generator))
    x = torch.randn(rows, hidden, generator=generator)
    if rising:
        x[:, 0] = 1.0
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    return layer, x.requires_grad_(), targets


def twin(layer, x, targets, temperature):
    """(logprobs, entropies) in float64 with graph, from whole logits."""
    leaf = x.detach().double().requires_grad_()
    logits = nn.functional.linear(
        leaf, layer.weight.double(), None if layer.bias is None else layer.bias.double()
    )
    logprobs = torch.log_softmax(logits / temperature, -1)
    return leaf, logprobs.gather(1, targets[:, None]).squeeze(1), -(logprobs.exp() * logprobs).sum(-1)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize(
    ("rows", "vocabulary", "chunk", "size", "how"),
    [
        (33, 384, 1024, 1 << 18, {}),
        (33, 1000, 7, 7 * 128, {}),
        (20, 1000, 16, 1, {"bias": True}),
        (5, 777, 5, 5 * 64, {"rising": True}),
        (9, 130, 9, 9 * 64, {"sharpness": 40.0}),
        (1, 3, 4, 64, {}),
    ],
)
def test_values_and_slopes_equal_float64(
    monkeypatch, rows, vocabulary, chunk, size, how, temperature, entropy
):
    monkeypatch.setitem(module._TILE, "cpu", (size, 1024))
    layer, x, targets = case(rows, 48, vocabulary, **how)
    values, entropies = SelectedLogprobs.apply(x, Head(layer), targets, temperature, chunk, entropy)
    leaf, logprobs, spread = twin(layer, x, targets, temperature)
    torch.testing.assert_close(values.detach().double(), logprobs.detach(), atol=2e-5, rtol=1e-5)
    assert float(values.detach().max()) <= 0.0
    generator = torch.Generator().manual_seed(3)
    weigh = torch.randn(2, rows, generator=generator)
    ours, theirs = (values * weigh[0]).sum(), (logprobs * weigh[0].double()).sum()
    if entropy:
        torch.testing.assert_close(entropies.detach().double(), spread.detach(), atol=2e-5, rtol=1e-5)
        ours, theirs = ours + (entropies * weigh[1]).sum(), theirs + (spread * weigh[1].double()).sum()
    got, want = torch.autograd.grad(ours, x)[0], torch.autograd.grad(theirs, leaf)[0]
    # A slope is the difference of two rows of the weight, and rounded as they are.
    scale = float(layer.weight.norm(dim=1).max()) / temperature
    assert float((got.double() - want).norm()) <= 1e-5 * float(want.norm()) + 1e-6 * scale


def test_the_tiles_of_a_large_vocabulary_do_not_show():
    """The sizes in use, a vocabulary that is no multiple of a tile, and several tiles of positions."""
    layer, x, targets = case(1300, 64, 5003)
    values, _ = SelectedLogprobs.apply(x, Head(layer), targets, 0.9, 8192, False)
    _, logprobs, _ = twin(layer, x, targets, 0.9)
    torch.testing.assert_close(values.double(), logprobs, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("entropy", [False, True])
def test_a_banned_token_has_no_share_and_no_nan(entropy):
    layer, x, targets = case(6, 16, 200, bias=True)
    layer.bias[5:9] = float("-inf")
    values, entropies = SelectedLogprobs.apply(x, Head(layer), targets.clamp_min(9), 1.0, 6, entropy)
    total = values.sum() + entropies.sum()
    slope = torch.autograd.grad(total, x)[0]
    assert bool(torch.isfinite(total))
    assert bool(torch.isfinite(slope).all())


def test_scoring_without_gradient_computes_the_same_values_and_no_slope(monkeypatch):
    layer, x, targets = case(12, 32, 300)
    head = Head(layer)
    graded, _ = SelectedLogprobs.apply(x, head, targets, 0.8, 5, False)

    def never(*_):
        raise AssertionError("a slope was computed")

    monkeypatch.setattr(Head, "add_transposed", never)
    plain, _ = SelectedLogprobs.apply(x.detach(), head, targets, 0.8, 5, False)
    assert torch.equal(plain, graded)


def test_bf16_hidden_states_score_as_their_float32_copies():
    layer, x, targets = case(10, 32, 300)
    half = layer.bfloat16()
    values, _ = SelectedLogprobs.apply(x.detach().bfloat16(), Head(half), targets, 0.8, 5, False)
    _, logprobs, _ = twin(half.float(), x.detach().bfloat16(), targets, 0.8)
    torch.testing.assert_close(values.double(), logprobs, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", [1, 4, 5, 8, 17, 32, 48, 49])
def test_few_rows_give_the_plain_product(rows):
    """Also in any order of row counts, and where the packed form is not to be had."""
    weight, x = torch.randn(1031, 64), torch.randn(rows, 64)
    expected = x.double() @ weight.double().T
    product = FewRows(weight)
    plain = FewRows(weight)
    plain._packs = False
    for once in (product, plain, lambda x: few_rows(x, weight)):
        got = once(x)
        assert got.is_contiguous()
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-4)
    for other in (12, 40, 7):
        y = torch.randn(other, 64)
        torch.testing.assert_close(product(y), y @ weight.T, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(product(x).double(), expected, rtol=1e-5, atol=1e-4)


def test_a_packed_product_that_computes_something_else_is_not_used(monkeypatch):
    weight, x = torch.randn(1031, 64), torch.randn(16, 64)
    product = FewRows(weight)
    if not product._packs:
        pytest.skip("this PyTorch has no packed products")
    packs = torch.ops.mkl._mkl_reorder_linear_weight
    wrong = SimpleNamespace(
        _mkl_reorder_linear_weight=packs, _mkl_linear=lambda *a: torch.ops.aten.linear(a[0], a[2]) * 1.5
    )
    monkeypatch.setattr(module.torch.ops, "mkl", wrong)
    torch.testing.assert_close(product(x), x @ weight.T, rtol=1e-4, atol=1e-4)
    assert not product._packs
    torch.testing.assert_close(product(x), x @ weight.T, rtol=1e-4, atol=1e-4)
