"""An analysis for people: as text in the terminal, and its heat map as a page."""

from __future__ import annotations

import importlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

_ROWS = 48
"""Rows of the heat map in a terminal; a deeper model shows the largest of several layers in one."""

_SHADES = " ░▒▓█"


def report(record: Mapping[str, Any]) -> str:
    """The record (``Analysis.record()``, with what was done after it) as text."""
    layers: Sequence[Mapping[str, Any]] = record["layers"]
    rule = "rslora, " if record["rslora"] else ""
    lines = [
        f"adapter      {record['adapter']}",
        f"             rank {record['rank']}, alpha {record['alpha']:g}, {rule}{len(layers)} layers, analysed in "
        f"{record['seconds']:.1f} s",
        "",
        *table(record),
        "",
        *heat_map(record),
    ]
    lines += [f"note         {note}" for note in record["notes"]]
    return "\n".join(lines)


def table(record: Mapping[str, Any]) -> list[str]:
    """Rank, mean, least and most variance kept in percent, and size, with an arrow at the recommended rank."""
    lines = [
        "variance kept, over layers",
        f"{'rank':>8}{'mean':>9}{'min':>9}{'max':>9}{'parameters':>14}",
    ]
    for row in record["table"]:
        arrow = "  <- recommended" if row["recommended"] else ""
        lines.append(
            f"{row['rank']:>8}{percent(row['mean']):>9}{percent(row['min']):>9}{percent(row['max']):>9}"
            f"{row['parameters']:>14,}{arrow}"
        )
    if record["table"][-1]["mean"] < record["min_variance_retention"]:
        return lines
    lines.append(
        f"recommended: the least rank of the table whose mean is at least {percent(record['min_variance_retention'])}"
    )
    return lines


def percent(share: float) -> str:
    """In percent, rounded down, so that what is not kept whole never reads as 100 %."""
    return f"{math.floor(share * 1e4 + 1e-6) / 100:.2f}%"


def grid(record: Mapping[str, Any], key: str) -> tuple[list[str], list[str], list[list[float | None]]]:
    """Layers, module types, and ``key`` of each layer's record as layers x types (None where a layer lacks the type): the
    largest where a layer has several modules of a type."""
    found: dict[tuple[int, str], float] = {}
    for layer in record["layers"]:
        place = (-1 if layer["layer"] is None else layer["layer"], layer["module"])
        found[place] = max(layer[key], found.get(place, layer[key]))
    numbers = sorted({number for number, _ in found})
    kinds = list(dict.fromkeys(layer["module"] for layer in record["layers"]))
    kinds.sort(key=_usual_order)
    values = [[found.get((number, kind)) for kind in kinds] for number in numbers]
    return [str(number) if number >= 0 else "-" for number in numbers], kinds, values


def sharing(record: Mapping[str, Any]) -> int:
    """The most modules of one type in a layer, such as experts: 1 without any."""
    return max(Counter((layer["layer"], layer["module"]) for layer in record["layers"]).values())


_ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def _usual_order(kind: str) -> tuple[int, str]:
    name = kind.rpartition(".")[2]
    return (_ORDER.index(name) if name in _ORDER else len(_ORDER), kind)


def heat_map(record: Mapping[str, Any]) -> list[str]:
    """The rank that each layer needs by itself, by layer and module type, darker for more of the adapter's rank."""
    names, kinds, values = grid(record, "needed_rank")
    short = _short(kinds)
    width = max(7, *(len(kind) + 2 for kind in short))
    step = -(-len(names) // _ROWS)
    kept = percent(record["min_variance_retention"])
    many = sharing(record)
    largest = [f"{step} layers"] * (step > 1) + [f"up to {many} modules of a type"] * (many > 1)
    lines = [
        f"rank that keeps {kept} of each layer, by itself"
        + (f" (largest of {' and '.join(largest)})" if largest else "")
    ]
    lines.append(f"{'layer':>8}" + "".join(f"{kind:>{width}}" for kind in short))
    for at in range(0, len(names), step):
        several = values[at : at + step]
        cells = [_largest([row[c] for row in several]) for c in range(len(kinds))]
        last = names[min(at + step, len(names)) - 1]
        label = names[at] if step == 1 else f"{names[at]}-{last}"
        lines.append(f"{label:>8}" + "".join(_cell(value, record["rank"], width) for value in cells))
    means = [_mean([la["needed_rank"] for la in record["layers"] if la["module"] == kind]) for kind in kinds]
    lines.append(f"{'mean':>8}" + "".join(f"{m:>{width - 2}.1f}  " for m in means))
    for label, key, form in (("eff.", "effective_rank", ".1f"), ("norm", "norm", ".2g")):
        means = [_mean([la[key] for la in record["layers"] if la["module"] == kind]) for kind in kinds]
        lines.append(f"{label:>8}" + "".join(f"{m:>{width - 2}{form}}  " for m in means))
    lines += _legend(record["rank"])
    return [line.rstrip() for line in lines]


def _legend(rank: int) -> list[str]:
    parts = len(_SHADES) - 1
    shades = ", ".join(f"{_SHADES[i]} {rank * i / parts:g}" for i in range(1, parts + 1))
    return [f"shades: up to {shades} of rank {rank}", "eff.: mean effective rank (entropy); norm: mean norm of the update"]


def _cell(value: float | None, rank: int, width: int) -> str:
    if value is None:
        return " " * width
    shade = _SHADES[min(len(_SHADES) - 1, math.ceil(value / rank * (len(_SHADES) - 1)))]
    return f"{value:>{width - 2}.0f} {shade}"


def _short(kinds: Sequence[str]) -> list[str]:
    """The last part of each name, where those differ."""
    last = [kind.rpartition(".")[2] for kind in kinds]
    return last if len(set(last)) == len(last) else list(kinds)


def _largest(values: Sequence[float | None]) -> float | None:
    return max([value for value in values if value is not None], default=None)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def page(record: Mapping[str, Any]) -> str:
    """Both heat maps and the variance by rank as one HTML page that loads nothing; needs plotly."""
    go: Any = importlib.import_module("plotly.graph_objects")
    subplots: Any = importlib.import_module("plotly.subplots")
    kept = percent(record["min_variance_retention"])
    of = f", largest of up to {many} modules" if (many := sharing(record)) > 1 else ""
    titles = ("Variance kept by rank", f"Rank that keeps {kept} of a layer{of}", f"Effective rank (entropy){of}")
    figure: Any = subplots.make_subplots(
        rows=1, cols=3, subplot_titles=titles, column_widths=[0.3, 0.35, 0.35]
    )
    rows = record["table"]
    ranks = [row["rank"] for row in rows]
    for name in ("max", "mean", "min"):
        shares = [100 * row[name] for row in rows]
        dash = "solid" if name == "mean" else "dot"
        figure.add_trace(go.Scatter(x=ranks, y=shares, name=name, line={"dash": dash}), row=1, col=1)
    figure.add_vline(
        x=record["recommended_rank"], line_dash="dash", annotation_text="recommended", row=1, col=1
    )
    figure.update_xaxes(type="log", tickvals=ranks, title="rank", row=1, col=1)
    figure.update_yaxes(title="% of variance", row=1, col=1)
    for column, key in ((2, "needed_rank"), (3, "effective_rank")):
        names, kinds, values = grid(record, key)
        shown = go.Heatmap(
            x=_short(kinds), y=names, z=values, zmin=0, zmax=record["rank"], coloraxis="coloraxis", texttemplate="%{z:.0f}",
            hovertemplate="layer %{y}, %{x}: %{z:.1f}<extra></extra>",
        )  # fmt: skip
        figure.add_trace(shown, row=1, col=column)
        figure.update_yaxes(type="category", autorange="reversed", row=1, col=column)
    names = grid(record, "needed_rank")[0]
    figure.update_layout(
        title={"text": f"LoRA-Squeeze of {_plain(str(record['adapter']))}: rank {record['rank']}, recommended "
               f"{record['recommended_rank']}"},
        coloraxis={"colorscale": "Viridis", "colorbar": {"title": "rank"}},
        height=max(480, 160 + 22 * len(names)),
        legend={"orientation": "h", "y": -0.12},
    )  # fmt: skip
    return str(figure.to_html(include_plotlyjs=True, full_html=True))


def _plain(text: str) -> str:
    """Without what plotly reads as markup or as a placeholder."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
