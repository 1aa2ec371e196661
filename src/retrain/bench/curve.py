"""A sweep as text, as an SVG and as a page: measured throughput over concurrency, with the fitted law."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

_BAR = 36
_EIGHTHS = " ▏▎▍▌▋▊▉"


def report(record: Mapping[str, Any]) -> str:
    """The record for people: a bar per size with the fit's place in it, the fit, and the line for the TOML."""
    points: Sequence[Mapping[str, Any]] = record["points"]
    fit: Mapping[str, Any] | None = record["fit"]
    settings, weights = record["settings"], record["weights"]
    curve: Sequence[float | None] = fit["tokens_per_second"] if fit else [None] * len(points)
    most = max([p["tokens_per_second"] for p in points] + [c for c in curve if c is not None])
    lines = [
        f"model      {record['model']}, rank {settings['lora_rank']}, {weights.get('dtype', '')} on "
        f"{weights.get('device', '')}, {weights.get('threads', '?')} threads",
        f"work       groups of {settings['group_size']}, prompts of {settings['prompt_tokens']}, {settings['trace']}, "
        f"each size {settings['steps']} times",
        "",
        f"{'batch':>7}{'rollouts':>10}{'sampled/s':>12}{'whole step':>12}  " + ("measured, and ┃ the fit" if fit else "measured"),
    ]
    for point, fitted in zip(points, curve, strict=True):
        whole = point["step_tokens_per_second"]
        lines.append(
            f"{point['batch_size']:>7}{point['concurrency']:>10}{point['tokens_per_second']:>12,.0f}"
            f"{'' if whole is None else f'{whole:,.0f}':>12}  {_bar(point['tokens_per_second'] / most, fitted, most)}"
        )
    lines += ["", *_told(record)]
    return "\n".join(line.rstrip() for line in lines)


def _bar(share: float, fitted: float | None, most: float) -> str:
    eighths = round(share * _BAR * 8)
    text = "█" * (eighths // 8) + (_EIGHTHS[eighths % 8] if eighths % 8 else "")
    if fitted is None:
        return text
    at = min(_BAR, max(0, round(fitted / most * _BAR)))
    text = text.ljust(_BAR + 1)
    return f"{text[:at]}┃{text[at + 1 :]}"


def _told(record: Mapping[str, Any]) -> list[str]:
    fit: Mapping[str, Any] | None = record["fit"]
    chosen: Mapping[str, Any] = record["recommended"]
    lines: list[str] = []
    if fit is None:
        lines.append("fit        none: it takes three sizes, and throughput that grows from the first on")
    else:
        lines += [
            f"sigma      {_range(fit['sigma'])}, the share of work that waits its turn",
            f"kappa      {_range(fit['kappa'])}, the cost of keeping pairs in step",
            f"peak       {_peak(fit['p_star'])}",
            f"noise      {'unknown' if fit['noise'] is None else format(fit['noise'], '.1%')} from step to step",
        ]
    if record["ran_out_at"]:
        lines.append(f"memory     ran out at batch_size = {record['ran_out_at']}")
    why = {
        "peak": f"{record['settings']['throttle_margin']:.0%} of the peak",
        "largest": "the largest measured: throughput has no peak below it",
        "fastest": "the fastest measured: a peak is not told from noise",
    }[chosen["because"]]
    return [
        *lines, "",
        f"Put into the TOML ({why}; 95 % interval {chosen['low']} to {chosen['high']}):", "",
        "[training]", f"batch_size = {chosen['batch_size']}", *_further(record),
    ]  # fmt: skip


def _further(record: Mapping[str, Any]) -> list[str]:
    """What another sweep would tell: beyond the largest size tried, and through the noise."""
    chosen, last = record["recommended"], record["points"][-1]["batch_size"]
    lines: list[str] = []
    if chosen["batch_size"] == last and not record["ran_out_at"]:
        lines.append(f"It is the largest size tried: --max-batch-size {4 * last} shows whether throughput still grows.")
    if chosen["because"] == "fastest":
        steps = record["settings"]["steps"]
        lines.append(f"It is no more than the fastest here: --steps {max(2 * steps, 5)} measures each size more often.")
    return ["", *lines] if lines else []


def _range(found: Mapping[str, float | None]) -> str:
    value, low = (format(found[end] or 0.0, ".3g") for end in ("value", "low"))
    high = "infinity" if found["high"] is None else format(found["high"], ".3g")
    return f"{value} (95 % interval {low} to {high})"


def _peak(star: Mapping[str, float | None]) -> str:
    low = format(star["low"] or 0.0, ",.0f")
    if star["value"] is None and star["high"] is not None:
        return f"not told from noise; the 95 % interval is {low} to {star['high']:,.0f} rollouts at once"
    if star["value"] is None:
        return f"none is told from noise; above {low} rollouts at once"
    high = "infinity" if star["high"] is None else format(star["high"], ",.0f")
    return f"at {star['value']:,.0f} rollouts at once (95 % interval {low} to {high})"


def write(record: Mapping[str, Any], path: Path) -> None:
    """Draw the record into ``path``, an SVG or, by its name, a page. OSError where it cannot be written."""
    path.write_text(html(record) if path.suffix in (".html", ".htm") else svg(record), encoding="utf-8")


def _fitted(record: Mapping[str, Any], count: int = 120) -> list[tuple[float, float]]:
    """The fitted curve, from the smallest concurrency to the largest in even steps of its logarithm."""
    if record["fit"] is None:
        return []
    a, b, c = record["fit"]["coefficients"]
    first, last = (float(record["points"][i]["concurrency"]) for i in (0, -1))
    xs = [first * (last / first) ** (i / (count - 1)) for i in range(count)]
    return [(x, x / time) for x in xs if (time := a + b * x + c * x * x) > 0]


def _each(record: Mapping[str, Any]) -> list[tuple[float, float]]:
    return [(float(p["concurrency"]), rate) for p in record["points"] for rate in p["each"]]


def _title(record: Mapping[str, Any]) -> str:
    return f"{record['model']}: sampled tokens per second over rollouts at once"


_W, _H, _LEFT, _RIGHT, _TOP, _BOTTOM = 720, 420, 76, 20, 44, 52


def svg(record: Mapping[str, Any]) -> str:
    """The curve as an SVG text, concurrency on a logarithmic axis."""
    dots, line = _each(record), _fitted(record)
    low, high = (math.log(record["points"][i]["concurrency"]) for i in (0, -1))
    top = 1.08 * max(rate for _, rate in [*dots, *line])

    def place(p: float, rate: float) -> str:
        x = _LEFT + (_W - _LEFT - _RIGHT) * (math.log(p) - low) / max(high - low, 1e-9)
        return f"{x:.1f},{_H - _BOTTOM - (_H - _TOP - _BOTTOM) * rate / top:.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_W} {_H}" font-family="sans-serif" font-size="12">',
        f'<rect width="{_W}" height="{_H}" fill="#fff"/>',
        f'<text x="{_LEFT}" y="24" font-size="14">{escape(_title(record))}</text>',
    ]
    for i in range(5):
        x, y = place(math.exp(low), top * i / 4).split(",")
        parts.append(f'<path d="M{x},{y}H{_W - _RIGHT}" stroke="#ddd"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y}" dy="4" text-anchor="end">{top * i / 4:,.0f}</text>')
    for point in record["points"]:
        x, y = place(point["concurrency"], 0.0).split(",")
        parts.append(f'<text x="{x}" y="{y}" dy="18" text-anchor="middle">{point["concurrency"]}</text>')
    chosen = record["recommended"]["batch_size"] * record["settings"]["group_size"]
    x, y = place(chosen, 0.0).split(",")
    parts.append(f'<path d="M{x},{y}V{_TOP}" stroke="#888" stroke-dasharray="4 3"/>')
    parts.append(f'<text x="{x}" y="{y}" dy="38" text-anchor="middle">batch_size = {record["recommended"]["batch_size"]}</text>')
    if line:
        parts.append(f'<polyline points="{" ".join(place(*at) for at in line)}" fill="none" stroke="#c33" stroke-width="2"/>')
    for at in dots:
        x, y = place(*at).split(",")
        parts.append(f'<circle cx="{x}" cy="{y}" r="4" fill="#26c" fill-opacity="0.6"/>')
    return "\n".join([*parts, "</svg>", ""])


def html(record: Mapping[str, Any]) -> str:
    """The curve as a page that needs nothing else."""
    go: Any = importlib.import_module("plotly.graph_objects")
    dots, line = _each(record), _fitted(record)
    figure = go.Figure()
    figure.add_scatter(x=[p for p, _ in dots], y=[rate for _, rate in dots], mode="markers", name="measured")
    figure.add_scatter(x=[p for p, _ in line], y=[rate for _, rate in line], mode="lines", name="fit")
    chosen = record["recommended"]["batch_size"]
    figure.add_vline(
        x=chosen * record["settings"]["group_size"], line_dash="dash", annotation_text=f"batch_size = {chosen}"
    )
    figure.update_layout(title=escape(_title(record)), xaxis_title="rollouts at once", yaxis_title="sampled tokens per second")
    figure.update_xaxes(type="log")
    figure.update_yaxes(rangemode="tozero")
    return str(figure.to_html(include_plotlyjs=True, full_html=True))
