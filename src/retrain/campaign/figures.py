"""The plots of a campaign: learning curves per condition, the differences to the baseline, and every run as a point."""

from __future__ import annotations

import html
import importlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from retrain.campaign import procedure
from retrain.campaign.outcomes import RunOutcome
from retrain.campaign.statistics import Analysis
from retrain.report.figures import PALETTE, QUIET, Plot, empty, number, rounded
from retrain.report.visible import visible

# plotly carries no types.
_go: Any = importlib.import_module("plotly.graph_objects")

_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "star", "hexagon", "triangle-down", "pentagon")
_DASHES = ("solid", "dash", "dot", "dashdot")
_ROW = 72
"""Pixels of a row of the plots that have a row for each condition; its text stands above its marks."""
_ONE_LINE = 36
"""Characters of a row's text that fit a phone beside its numbers; a longer one takes two lines."""
_NOT_NEGATIVE = frozenset({"tokens", "tokens/s", "s", "nats per token"})
"""Units of which no value is below 0."""
_SEED_POINTS = 12_000
"""Points that the lines of single seeds may have in one plot."""
Matrix = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Look:
    """How a condition is drawn everywhere: by colour, and by symbol and dash for those who do not tell colours apart."""

    colour: str
    symbol: str
    dash: str


@dataclass(frozen=True, slots=True)
class Curves:
    """A metric of all runs: ``values`` maps a condition to [runs, G] at ``steps`` (G,), ``seeds`` to the runs' seeds."""

    name: str
    title: str
    unit: str
    steps: Matrix
    values: Mapping[str, Matrix]
    seeds: Mapping[str, tuple[int, ...]]


def looks(conditions: Sequence[str]) -> dict[str, Look]:
    """One look a condition, in their fixed order."""
    return {
        label: Look(
            PALETTE[i % len(PALETTE)], _SYMBOLS[i % len(_SYMBOLS)], _DASHES[i // len(PALETTE) % len(_DASHES)]
        )
        for i, label in enumerate(conditions)
    }


def band(values: Matrix, alpha: float = 0.05) -> tuple[Matrix, Matrix, Matrix, Matrix]:
    """Mean over the runs of ``values`` [runs, G] that are known at each step, the ends of its t interval (NaN for fewer
    than two), and how many there are; each (G,)."""
    known = ~np.isnan(values)
    count = known.sum(axis=0)
    mean = np.where(count > 0, np.where(known, values, 0.0).sum(axis=0) / np.maximum(count, 1), np.nan)
    square = np.where(known, (values - mean) ** 2, 0.0).sum(axis=0) / np.maximum(count - 1, 1)
    # At one run nothing is known of the deviation; 1 keeps the quantile defined and is masked away.
    half = procedure.t_critical(alpha / 2, np.maximum(count - 1, 1)) * np.sqrt(square / np.maximum(count, 1))
    half = np.where(count > 1, half, np.nan)
    return mean, mean - half, mean + half, count.astype(np.float64)


def shown_ends(low: Any, high: Any, unit: str) -> tuple[Any, Any]:
    """Ends of an interval of a metric, numbers or arrays, as they are shown: cut to what its values can be, a share to 0..1, a
    time, a length, a speed or an entropy to 0 and above. The tests use the uncut ones. NaN stays."""
    if unit == "share":
        return np.clip(low, 0.0, 1.0), np.clip(high, 0.0, 1.0)
    return (np.maximum(low, 0.0), high) if unit in _NOT_NEGATIVE else (low, high)


def curves(metric: Curves, drawn: Mapping[str, Look], *, seeds: bool, share: bool, marks: bool, note: str) -> Plot | None:
    """Means over seeds with 95 % t intervals, one colour a condition; ``seeds`` adds every run, hidden until the legend's
    "each seed" is clicked. None where no run has a value, or all have the same."""
    figure = empty(share=share, unit="" if share else metric.unit)
    bands: list[Any] = []
    means: list[Any] = []
    singles: list[Any] = []
    said: list[str] = []
    form = ":.1%" if share else ":.4g"
    for label, look in drawn.items():
        values = metric.values[label]
        if not len(values) or np.isnan(values).all():
            continue
        mean, low, high, count = band(values)
        low, high = shown_ends(low, high, metric.unit)
        at = ~np.isnan(mean)
        x = metric.steps[at]
        inner = at & ~np.isnan(low)
        if inner.any():
            xs = metric.steps[inner]
            bands.append(
                _go.Scatter(
                    x=[*xs.tolist(), *xs[::-1].tolist()], y=rounded([*high[inner], *low[inner][::-1]]), fill="toself",
                    fillcolor=_clear(look.colour, 0.16), line={"width": 0}, mode="lines", hoverinfo="skip", showlegend=False,
                    legendgroup=label,
                )
            )  # fmt: skip
        means.append(
            _go.Scatter(
                x=x.tolist(), y=rounded(mean[at]), name=named(label), legendgroup=label,
                mode="lines+markers" if marks or len(x) < 2 else "lines", marker={"size": 6, "symbol": look.symbol},
                line={"color": look.colour, "width": 2.2, "dash": look.dash},
                customdata=[
                    [_spread(float(a), float(b), share), int(n)]
                    for a, b, n in zip(low[at], high[at], count[at], strict=True)
                ],
                hovertemplate=f"%{{y{form}}} (%{{customdata[0]}}, n = %{{customdata[1]}})",
            )
        )  # fmt: skip
        if seeds:
            sx, sy = _lines(metric.steps, values, max(2, _SEED_POINTS // sum(len(v) for v in metric.values.values())))
            singles.append(
                _go.Scatter(
                    x=sx, y=sy, name="each seed", legendgroup="each seed", mode="lines", visible="legendonly",
                    line={"color": look.colour, "width": 0.8}, opacity=0.5, hoverinfo="skip", showlegend=not singles,
                )
            )  # fmt: skip
        ends = np.flatnonzero(at)[[0, -1]]
        first, last = (number(float(mean[i]), share=share) for i in ends)
        spread = _spread(float(low[ends[1]]), float(high[ends[1]]), share)
        said.append(f"{label}: {first} to {last} ({spread}).")
    known = np.concatenate([values.ravel() for values in metric.values.values()])
    known = known[~np.isnan(known)]
    # Means of equal values differ by rounding.
    if not len(known) or float(np.ptp(known)) <= 1e-9 * float(np.abs(known).max()):
        return None
    for trace in (*singles, *bands, *means):
        figure.add_trace(trace)
    figure.update_layout(height=360 if seeds else 280)
    figure.update_yaxes(exponentformat="power")
    return Plot(metric.name, metric.title, f"From first to last: {' '.join(said)} {note}".strip(), figure, "curves")


def forest(analysis: Analysis, drawn: Mapping[str, Look], *, margin: float, baseline: str, coverage: float) -> Plot | None:
    """Differences to the baseline in points with the test's own intervals, beside what was declared not to matter."""
    rows = analysis.comparisons
    known = [row for row in rows if not math.isnan(row.difference)]
    if not known:
        return None
    long = max(len(row.label) + len(row.verdict) for row in rows) > _ONE_LINE
    figure = _by_row(len(rows), unit=f"points, condition minus {named(baseline)}", tall=long)
    figure.add_shape(
        type="rect", x0=-100 * margin, x1=100 * margin, y0=0, y1=1, yref="paper", fillcolor=_clear(QUIET, 0.22),
        line={"width": 0}, layer="below",
    )  # fmt: skip
    figure.add_shape(type="line", x0=0, x1=0, y0=0, y1=1, yref="paper", line={"color": QUIET, "width": 1.5})
    for i, row in enumerate(rows):
        y = len(rows) - 1 - i
        if math.isnan(row.difference):
            _above(figure, y, f"<b>{named(row.label)}</b>{'<br>' if long else ': '}{row.verdict}")
            continue
        middle, low, high = (100 * v for v in (row.difference, row.low, row.high))
        look = drawn[row.label]
        figure.add_trace(
            _go.Scatter(
                x=rounded([middle]), y=[y], mode="markers", showlegend=False, name=named(row.label),
                marker={"color": look.colour, "size": 12, "symbol": look.symbol},
                error_x={
                    "type": "data", "symmetric": False, "array": rounded([high - middle]), "thickness": 2.5, "width": 7,
                    "arrayminus": rounded([middle - low]), "color": look.colour,
                },
                hovertemplate="%{x:+.2f} points",
            )
        )  # fmt: skip
        digits = 1 if high - low >= 2 else 2
        numbers = f"{middle:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})".replace("-", "\u2212")
        _above(figure, y, f"<b>{named(row.label)}</b>{'<br>' if long else ': '}{row.verdict}, {numbers}")
    ends = [100 * v for row in known for v in (row.low, row.high, row.difference) if not math.isnan(v)]
    far = 1.12 * max(*map(abs, ends), 150 * margin)
    figure.update_xaxes(range=[-far, far], ticksuffix="")
    figure.update_layout(hovermode="closest")
    figure.update_traces(cliponaxis=False)
    text = (
        f"Each bar is the {coverage:.4g} % t interval of the difference in points; grey is the declared smallest effect of "
        f"interest, {100 * margin:.3g} points either way. " + " ".join(f"{row.label}: {row.verdict}." for row in rows)
    )
    return Plot("forest", f"Difference to {baseline}", text, figure, "result")


def strip(
    analysis: Analysis, outcomes: Sequence[RunOutcome], drawn: Mapping[str, Look], *, title: str, coverage: float
) -> Plot:
    """Every run's outcome as a point, in percent, above the mean of its condition with its t interval of ``coverage`` percent."""
    long = max(len(arm.label) for arm in analysis.arms) > _ONE_LINE
    figure = _by_row(len(analysis.arms), unit="percent", tall=long)
    used = set(analysis.seeds)
    for i, arm in enumerate(analysis.arms):
        y, look = len(analysis.arms) - 1 - i, drawn[arm.label]
        runs = [r for r in outcomes if r.condition == arm.label and r.seed in used and r.value is not None]
        runs.sort(key=lambda r: (r.value or 0.0, r.seed))
        for broke_off in (False, True):
            # By rank and the golden ratio: even, the same every time, and no two of equal value lie on each other.
            part = [(r, 0.17 * ((k * 0.618034) % 1 - 0.5)) for k, r in enumerate(runs) if r.is_last is broke_off]
            if part:
                figure.add_trace(
                    _go.Scatter(
                        x=rounded([100 * (r.value or 0.0) for r, _ in part]), y=[round(y + 0.12 + up, 3) for _, up in part],
                        mode="markers", showlegend=False, name=named(arm.label),
                        marker={
                            "color": look.colour, "size": 8, "opacity": 0.75,
                            "symbol": "x-thin" if broke_off else look.symbol,
                            "line": {"width": 2.5 if broke_off else 0, "color": look.colour},
                        },
                        customdata=[f"seed {r.seed}" + (", its last evaluation" if broke_off else "") for r, _ in part],
                        hovertemplate="%{x:.2f} %, %{customdata}",
                    )
                )  # fmt: skip
        if not math.isnan(arm.mean):
            shown = shown_ends(arm.low, arm.high, "share")
            low, high = (arm.mean if math.isnan(v) else float(v) for v in shown)
            figure.add_trace(
                _go.Scatter(
                    x=rounded([100 * arm.mean]), y=[y - 0.14], mode="markers", showlegend=False, name=named(arm.label),
                    marker={"color": look.colour, "size": 13, "symbol": "line-ns-open", "line": {"width": 3}},
                    error_x={
                        "type": "data", "symmetric": False, "array": rounded([100 * (high - arm.mean)]), "thickness": 2.5,
                        "arrayminus": rounded([100 * (arm.mean - low)]), "width": 7, "color": look.colour,
                    },
                    hovertemplate="mean %{x:.2f} %",
                )
            )  # fmt: skip
            spread = _spread(*shown, True)
            _above(figure, y, f"<b>{named(arm.label)}</b>{'<br>' if long else ': '}{arm.mean:.1%} ({spread})")
        else:
            _above(figure, y, f"<b>{named(arm.label)}</b>: no value")
    figure.update_layout(hovermode="closest")
    text = (
        f"Each point is a run, each bar the mean of a condition with its {coverage:.4g} % t interval. Crosses are runs that "
        "broke off and count at their last evaluation."
    )
    return Plot("strip", title, text, figure, "result")


def named(label: str) -> str:
    """A label as plotly's texts take it, which may hold markup."""
    return html.escape(visible(label), quote=False)


def _by_row(rows: int, *, unit: str, tall: bool) -> Any:
    figure = empty()
    figure.update_layout(height=(_ROW + 26 * tall) * rows + 60, margin={"l": 12, "r": 12, "t": 8, "b": 48})
    figure.update_xaxes(title={"text": unit, "standoff": 8}, tickformat=None)
    figure.update_yaxes(range=[-0.5, rows - 0.35], visible=False, fixedrange=True)
    return figure


def _above(figure: Any, y: int, text: str) -> None:
    figure.add_annotation(
        x=0, xref="paper", xanchor="left", y=y + 0.42, yanchor="middle", text=text, showarrow=False, align="left"
    )


def _spread(low: float, high: float, share: bool) -> str:
    if math.isnan(low + high):
        return "no interval"
    return f"{number(low, share=share)} to {number(high, share=share)}"


def _clear(colour: str, opacity: float) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity})"


def _lines(steps: Matrix, values: Matrix, points: int) -> tuple[list[float | None], list[float | None]]:
    """All rows of ``values`` as one line with gaps between them, each in at most ``points`` points."""
    x: list[float | None] = []
    y: list[float | None] = []
    for row in values:
        at = np.flatnonzero(~np.isnan(row))
        if len(at) > points:
            at = at[np.unique(np.rint(np.linspace(0, len(at) - 1, points)).astype(int))]
        x += [*steps[at].tolist(), None]
        y += [*(float(f"{v:.4g}") for v in row[at]), None]
    return x, y
