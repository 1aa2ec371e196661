"""What analysis and compression refuse, what rounding costs, and modules that share a cell of the heat map."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

from retrain.errors import ConfigError, ModelError
from retrain.squeeze.analysis import analyse, module_of, number_of
from retrain.squeeze.compress import compress
from retrain.squeeze.show import grid, heat_map, page
from retrain.squeeze.source import open_source

_made = runpy.run_path(str(Path(__file__).with_name("made.py")))
write, products, factors = (_made[name] for name in ("write", "products", "factors"))


def layers(rank: int = 4, dtype: torch.dtype = torch.float32, **sizes: float) -> dict[str, Any]:
    made = torch.Generator().manual_seed(7)
    sizes = sizes or {"q_proj": 1.0, "v_proj": 3.0}
    return {
        f"model.layers.0.{name}": (
            (torch.randn(rank, 24, generator=made).clamp(-3, 3) * size).to(dtype),
            (torch.randn(32, rank, generator=made).clamp(-3, 3) * size).to(dtype),
        )
        for name, size in sizes.items()
    }


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"target_ranks": (0,)}, "target_ranks holds 0, which is no whole number above 0"),
        ({"target_ranks": (2, -1)}, "target_ranks holds -1"),
        ({"target_ranks": (5,)}, "target_ranks holds 5, and the adapter has rank 4"),
        ({"wanted": 1.1}, r"min_variance_retention = 1\.1 is no share"),
        ({"wanted": 0.0}, r"min_variance_retention = 0\.0 is no share"),
        ({"wanted": float("nan")}, "min_variance_retention = nan is no share"),
    ],
)
def test_arguments_from_python_are_checked(tmp_path: Path, given: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=rf"{reason}[^\n]* Fix: "):
        analyse(write(tmp_path / "a", layers()), **given)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"r": 5}, r"has rank 4, and adapter_config\.json says 5"),
        ({"rank_pattern": {"v_proj": 2}}, r"v_proj\.lora_A\.weight has rank 4, and adapter_config\.json says 2"),
        ({"rank_pattern": {"v_proj(": 4}}, "rank_pattern holds an expression that is none"),
        ({"lora_alpha": 1e300}, "alpha: 1e-9 to 1e9"),
        ({"alpha_pattern": {"q_proj": 1e-300}}, "alpha: 1e-9 to 1e9"),
        ({"r": True}, "not numbers above 0"),
    ],
)
def test_settings_that_the_tensors_do_not_bear_out_are_refused(
    tmp_path: Path, given: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ModelError, match=rf"{reason}[^\n]* Fix: "):
        open_source(write(tmp_path / "a", layers(), **given))


def test_numbers_that_the_format_does_not_hold_are_not_written(tmp_path: Path) -> None:
    # Four equal directions become one, of twice their size.
    pair = (torch.full((4, 24), 6e4), torch.full((32, 4), 6e4))
    name = "model.layers.0.q_proj"
    found = analyse(write(tmp_path / "a", {name: (pair[0].half(), pair[1].half())}))
    with pytest.raises(ModelError, match=r"q_proj\.lora_A\.weight .* beyond F16, which ends at 6\.55e\+04\. Fix: "):
        compress(found, 2, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
    wide = write(tmp_path / "wide", {name: pair})
    assert compress(analyse(wide), 2, tmp_path / "out").rounding < 1e-6


@pytest.mark.parametrize(
    ("dtype", "least", "most"),
    [(torch.bfloat16, 1e-3, 1e-2), (torch.float16, 1e-4, 1e-3), (torch.float32, 1e-9, 1e-7), (torch.float64, 0, 0)],
)
@pytest.mark.parametrize("alpha", [8, 5])
def test_rounding_is_what_the_written_format_costs(
    tmp_path: Path, dtype: torch.dtype, least: float, most: float, alpha: int
) -> None:
    folder = write(tmp_path / "a", layers(dtype=dtype), lora_alpha=alpha)
    found = analyse(folder)
    made = compress(found, 4, tmp_path / "out")
    assert least <= made.rounding <= most
    before, after = (products(f, lambda _, rank: alpha / rank) for f in (folder, tmp_path / "out"))
    lost = sum(float((after[n] - before[n]).square().sum()) for n in before)
    total = sum(float(p.square().sum()) for p in before.values())
    assert made.rounding == pytest.approx((lost / total) ** 0.5, rel=0.02, abs=1e-14)
    # With a cut the two errors add in squares, as the written record says.
    cut = compress(found, 2, tmp_path / "two")
    settings = json.loads((tmp_path / "two/adapter_config.json").read_text())
    after = products(tmp_path / "two", lambda _, rank: settings["lora_alpha"] / rank)
    lost = sum(float((after[n] - before[n]).square().sum()) for n in before)
    assert (lost / total) ** 0.5 == pytest.approx((found.row(2).error ** 2 + cut.rounding**2) ** 0.5, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "number", "kind"),
    [
        ("model.layers.3.self_attn.q_proj", 3, "self_attn.q_proj"),
        ("model.layers.3.mlp.experts.12.up_proj", 3, "mlp.experts.*.up_proj"),
        ("towers.1.blocks.7.mlp.fc1", 7, "mlp.fc1"),
        ("transformer.h.0.attn.c_attn", 0, "attn.c_attn"),
        ("encoder.block.2.layer.0.SelfAttention.q", 2, "layer.*.SelfAttention.q"),
        ("stages.4.proj", 4, "proj"),
        ("lm_head", None, "lm_head"),
    ],
)
def test_layer_and_kind_of_a_module(name: str, number: int | None, kind: str) -> None:
    assert (number_of(name), module_of(name)) == (number, kind)


def test_modules_that_share_a_cell_show_the_largest_and_say_so(tmp_path: Path) -> None:
    flat, steep = [1.0] * 8, [1.0] + [1e-6] * 7
    # The one that needs least comes last, as a map that overwrites would show it.
    made = {
        f"model.layers.0.mlp.experts.{i}.up_proj": factors(values, 24, 16, seed=i)
        for i, values in enumerate((flat, flat, steep))
    }
    made["model.layers.0.self_attn.q_proj"] = factors(steep, 24, 16, seed=9)
    record = analyse(write(tmp_path / "a", made)).record()
    assert [la["needed_rank"] for la in record["layers"]] == [8, 8, 1, 1]
    assert grid(record, "needed_rank") == (["0"], ["self_attn.q_proj", "mlp.experts.*.up_proj"], [[1, 8]])
    title, _, row, mean, effective, norm, shades, _ = heat_map(record)
    assert title.endswith("(largest of up to 3 modules of a type)")
    assert re.findall(r"\d+", row) == ["0", "1", "8"]
    assert mean.split() == ["mean", "1.0", "5.7"]
    # Eight equal directions twice and one direction: 8, 8 and 1; norms sqrt(8), sqrt(8) and 1, by the settings' scale.
    assert effective.split() == ["eff.", "1.0", f"{17 / 3:.1f}"]
    scale = record["layers"][3]["norm"]
    assert norm.split() == ["norm", f"{scale:.2g}", f"{scale * (2 * 8**0.5 + 1) / 3:.2g}"]
    assert shades == "shades: up to ░ 2, ▒ 4, ▓ 6, █ 8 of rank 8"
    pytest.importorskip("plotly")
    assert "largest of up to 3 modules" in page(record)
