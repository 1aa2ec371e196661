"""Singular values, reconstruction, recommended ranks and scales against naive float64 twins that form the whole product."""

from __future__ import annotations

import json
import math
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from retrain.errors import ConfigError
from retrain.squeeze.analysis import analyse
from retrain.squeeze.compress import compress
from retrain.squeeze.spectrum import effective_rank, retained, spectrum, truncated

_made = runpy.run_path(str(Path(__file__).with_name("made.py")))
factors, write, products = (_made[name] for name in ("factors", "write", "products"))


def relative(found: torch.Tensor, true: torch.Tensor) -> float:
    return float((found.double() - true.double()).norm() / true.double().norm())


@pytest.mark.parametrize("shape", [(96, 40), (40, 96), (7, 300), (300, 7), (16, 16)])
@pytest.mark.parametrize("rank", [1, 5, 16])
def test_singular_values_are_those_of_the_whole_product(shape: tuple[int, int], rank: int) -> None:
    made = torch.Generator().manual_seed(rank)
    rows, columns = shape
    a, b = torch.randn(rank, columns, generator=made), torch.randn(rows, rank, generator=made)
    found = spectrum(a, b).values_R
    true = torch.linalg.svdvals(b.double() @ a.double())
    n = min(rank, rows, columns)
    assert found.shape == (rank,)
    assert float(((found[:n] - true[:n]) / true[:n]).abs().max()) < 1e-5
    assert float(found[n:].abs().sum()) == 0


def test_small_singular_values_are_as_exact_as_large_ones() -> None:
    values = [10.0 ** (-i / 2) for i in range(16)]  # over seven and a half decades
    a, b = factors(values, 80, 60)
    found = spectrum(a, b).values_R
    assert float(((found - torch.tensor(values)) / torch.tensor(values)).abs().max()) < 1e-5


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 40), columns=st.integers(1, 40), rank=st.integers(1, 12), cut=st.integers(1, 12),
    factor=st.floats(1e-3, 1e3), dead=st.integers(0, 12), seed=st.integers(0, 1000),
)  # fmt: skip
def test_truncated_factors_are_the_best_approximation(
    rows: int, columns: int, rank: int, cut: int, factor: float, dead: int, seed: int
) -> None:
    made = torch.Generator().manual_seed(seed)
    a, b = torch.randn(rank, columns, generator=made), torch.randn(rows, rank, generator=made)
    b[:, : min(dead, rank)] = 0
    cut = min(cut, rank)
    found = spectrum(a, b)
    new_a, new_b = truncated(a, b, found, cut, factor)
    assert new_a.shape == (cut, columns)
    assert new_b.shape == (rows, cut)
    whole = b.double() @ a.double()
    u, s, vh = torch.linalg.svd(whole, full_matrices=False)
    best = (u[:, :cut] * s[:cut]) @ vh[:cut]
    # The best approximation is unique in its error, not in itself where singular values are equal.
    error = float((factor * whole - new_b @ new_a).norm())
    assert error == pytest.approx(
        factor * float((whole - best).norm()), rel=1e-6, abs=1e-9 * factor * float(1 + s[0])
    )
    assert bool(new_a.isfinite().all())
    assert bool(new_b.isfinite().all())
    # Balanced: both factors carry the same share of every direction.
    for i in range(min(cut, int((s > 1e-6 * s[0]).sum()))):
        assert float(new_a[i].norm()) == pytest.approx(float(new_b[:, i].norm()), rel=1e-6)


def test_a_direction_without_update_can_still_learn() -> None:
    a, b = torch.randn(6, 20), torch.zeros(30, 6)
    b[:, :2] = torch.randn(30, 2)
    new_a, new_b = truncated(a, b, spectrum(a, b), 4, 1.0)
    assert relative(new_b @ new_a, b.double() @ a.double()) < 1e-12
    assert bool((new_b[:, 2:] == 0).all())
    assert bool((new_a[2:].norm(dim=1) > 0.1).all())


def test_shares_and_effective_rank_of_known_spectra() -> None:
    assert retained(
        torch.tensor([3.0, 4.0, 0.0]).double().sort(descending=True).values
    ).tolist() == pytest.approx([16 / 25, 1, 1])
    assert retained(torch.zeros(4).double()).tolist() == [1, 1, 1, 1]
    assert effective_rank(torch.zeros(4).double()) == 0
    assert effective_rank(torch.ones(8).double()) == pytest.approx(8)
    assert effective_rank(torch.tensor([5.0, 0, 0]).double()) == pytest.approx(1)


SPECTRA: list[tuple[list[list[float]], float, int]] = [
    ([[1.0] + [0.0] * 15], 0.95, 1),
    ([[1.0] * 16], 0.95, 16),
    ([[1.0] * 16], 0.5, 8),
    ([[1.0] * 4 + [1e-4] * 12], 0.95, 4),
    ([[1.0] * 3 + [0.0] * 13], 0.95, 4),
    ([[1.0] * 3 + [0.0] * 13], 1.0, 4),
    # Two layers: the mean decides. At rank 2: (1 + 0.5) / 2, at rank 4: (1 + 1) / 2.
    ([[1.0] * 2 + [0.0] * 14, [1.0] * 4 + [0.0] * 12], 0.75, 2),
    ([[1.0] * 2 + [0.0] * 14, [1.0] * 4 + [0.0] * 12], 0.76, 4),
    ([[2.0**-i for i in range(16)]], 0.95, 4),  # 1 - 4^-k: 0.9375 at rank 2
    ([[0.0] * 16], 0.95, 1),
]


@pytest.mark.parametrize(("spectra", "wanted", "rank"), SPECTRA)
def test_recommended_rank_of_known_spectra(
    tmp_path: Path, spectra: list[list[float]], wanted: float, rank: int
) -> None:
    layers = {
        f"model.layers.{i}.self_attn.q_proj": tuple(x.float() for x in factors(values, 40, 30, seed=i))
        for i, values in enumerate(spectra)
    }
    found = analyse(write(tmp_path / "a", layers), wanted=wanted)
    assert found.recommended == rank
    assert [row.rank for row in found.table] == [1, 2, 4, 8, 16]
    for row in found.table:
        shares = [
            sum(v * v for v in s[: row.rank]) / (sum(v * v for v in s) or 1) if any(s) else 1.0
            for s in spectra
        ]
        assert (row.mean, row.min, row.max) == pytest.approx(
            (sum(shares) / len(shares), min(shares), max(shares)), abs=1e-6
        )


def test_table_of_chosen_ranks_and_what_they_may_be(tmp_path: Path) -> None:
    values = [1.0, 0.9, 0.8, 0.7, 0.6, 0.5]
    folder = write(tmp_path / "a", {"model.layers.0.q_proj": factors(values, 20, 20)})
    found = analyse(folder, target_ranks=[5, 3, 3])
    assert [row.rank for row in found.table] == [3, 5, 6]  # none of the two keeps enough: the adapter's own
    assert found.recommended == 6
    assert [row.rank for row in analyse(folder, target_ranks=[5, 3], wanted=0.9).table] == [3, 5]
    assert [row.rank for row in analyse(folder).table] == [1, 2, 4, 6]
    with pytest.raises(ConfigError, match=r"target_ranks holds 7, and the adapter has rank 6\. Fix"):
        analyse(folder, target_ranks=[7])
    with pytest.raises(ConfigError, match=r"source_rank = 5, and the adapter .* has rank 6\. Fix"):
        analyse(folder, source_rank=5)


def compressed(folder: Path, rank: int, out: Path, **options: Any) -> tuple[Any, dict[str, Any]]:
    made = compress(analyse(folder, keep=options.pop("keep", True)), rank, out, **options)
    return made, json.loads((out / "adapter_config.json").read_text())


def scale(settings: dict[str, Any]) -> Any:
    root = math.sqrt if settings.get("use_rslora") else float
    alphas = settings.get("alpha_pattern") or {}

    def of(name: str, rank: int) -> float:
        own = next((v for k, v in alphas.items() if name.endswith(k.lstrip("^"))), settings["lora_alpha"])
        return own / root(rank)

    return of


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("alpha", [32, 7, 0.37])
def test_full_rank_reconstructs_the_update(
    tmp_path: Path, dtype: torch.dtype, rslora: bool, alpha: float
) -> None:
    layers = {
        f"model.layers.{i}.{name}": (
            torch.randn(12, 40, dtype=dtype) / 6,
            torch.randn(50, 12, dtype=dtype) * 1e-3,
        )
        for i in range(2)
        for name in ("self_attn.q_proj", "mlp.up_proj")
    }
    folder = write(tmp_path / "a", layers, lora_alpha=alpha, use_rslora=rslora)
    for i, options in enumerate(({}, {"keep_alpha": True}, {"keep": False})):
        _, settings = compressed(folder, 12, tmp_path / f"out{i}", **options)
        before = products(folder, scale({"lora_alpha": alpha, "use_rslora": rslora}))
        after = products(tmp_path / f"out{i}", scale(settings))
        assert before.keys() == after.keys()
        for name, update in before.items():
            assert relative(after[name], update) < 1e-6
        tensors = load_file(tmp_path / f"out{i}" / "adapter_model.safetensors")
        assert {t.dtype for t in tensors.values()} == {dtype}


@pytest.mark.parametrize(
    ("alpha", "rank", "rslora", "keep", "written", "folded"),
    [
        (128, 16, False, False, 32, False),
        (128, 16, False, True, 32, False),
        (10, 16, False, False, 2, True),  # 2.5, of which Python rounds to the even
        (10, 16, False, True, 2.5, False),
        (1, 8, False, False, 1, True),  # an eighth: no whole alpha is near, and 0 would be none
        (128, 16, True, False, 64, False),
        (100, 8, True, True, 100 * math.sqrt(8 / 64), False),
        (100, 8, True, False, 35, True),
    ],
)
def test_alpha_keeps_the_scale(
    tmp_path: Path, alpha: float, rank: int, rslora: bool, keep: bool, written: float, folded: bool
) -> None:
    values = [0.5**i for i in range(64)]
    a, b = factors(values, 90, 80)
    folder = write(tmp_path / "a", {"model.layers.0.q_proj": (a, b)}, lora_alpha=alpha, use_rslora=rslora)
    made, settings = compressed(folder, rank, tmp_path / "out", keep_alpha=keep)
    assert settings["lora_alpha"] == pytest.approx(written)
    assert isinstance(settings["lora_alpha"], int) == (float(written).is_integer())
    assert (made.folded, made.patterns, settings["r"]) == (folded, False, rank)
    before = products(folder, scale({"lora_alpha": alpha, "use_rslora": rslora}))["model.layers.0.q_proj"]
    after = products(tmp_path / "out", scale(settings))["model.layers.0.q_proj"]
    # What is lost is what the discarded singular values hold, and nothing else.
    assert relative(after, before) == pytest.approx(2.0**-rank, rel=1e-3, abs=1e-6)


def test_the_predicted_error_is_that_of_the_whole_update(tmp_path: Path) -> None:
    layers = {
        f"model.layers.{i}.q_proj": (torch.randn(16, 30 + i), (i + 1) * torch.randn(40, 16)) for i in range(4)
    }
    folder = write(tmp_path / "a", layers)
    found = analyse(folder)
    for row in found.table:
        _, settings = compressed(folder, row.rank, tmp_path / f"r{row.rank}")
        before, after = (
            products(folder, scale({"lora_alpha": 32})),
            products(tmp_path / f"r{row.rank}", scale(settings)),
        )
        lost = math.sqrt(sum(float((before[n] - after[n]).square().sum()) for n in before))
        whole = math.sqrt(sum(float(before[n].square().sum()) for n in before))
        assert lost / whole == pytest.approx(row.error, rel=1e-4, abs=1e-6)
        assert row.parameters == sum(
            t.numel() for t in load_file(tmp_path / f"r{row.rank}/adapter_model.safetensors").values()
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_half_precision(tmp_path: Path, dtype: torch.dtype) -> None:
    a, b = (x.to(dtype) for x in factors([1.0, 0.5, 0.25, 0.125], 60, 50))
    folder = write(tmp_path / "a", {"model.layers.0.q_proj": (a, b)})
    _, settings = compressed(folder, 4, tmp_path / "out")
    assert {t.dtype for t in load_file(tmp_path / "out/adapter_model.safetensors").values()} == {dtype}
    before, after = products(folder, scale({"lora_alpha": 8})), products(tmp_path / "out", scale(settings))
    assert (
        relative(after["model.layers.0.q_proj"], before["model.layers.0.q_proj"]) < 2 * torch.finfo(dtype).eps
    )
