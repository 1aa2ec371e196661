"""The plots of a report, built with plotly's Python API; colours that depend on the reader's scheme are set in the page."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from retrain.report.gather import RunData, labels
from retrain.report.thinning import (
    Series,
    bucket_means,
    envelope,
    every_nth,
    known_mean,
    trailing_mean,
    window_of,
)
from retrain.tracking.vitals import BY_NAME

# plotly carries no types.
_go: Any = importlib.import_module("plotly.graph_objects")

POINTS = 1000
"""Points of a raw curve; a longer one is drawn by the extremes of its buckets."""
_SMOOTH_POINTS = 500
_FEW = 3
"""Lines of a plot that have all these points; more of them share as many."""
_FEWEST = 60
_BARS = 120
_MARKED = 20
"""Alarms that are marked in one plot: more would hide the curve."""

PALETTE = ("#3b82f6", "#e8710a", "#16a34a", "#db2777", "#8b5cf6", "#0d9488", "#b45309", "#ef4444")
"""Each has a contrast of at least 3 to 1 against white and against near-black."""
QUIET = "#808080"


@dataclass(frozen=True, slots=True)
class Plot:
    """A plot with what a reader who cannot see it needs: its title and a caption with the main numbers."""

    name: str
    title: str
    caption: str
    figure: Any
    group: str

    @property
    def json(self) -> str:
        """The figure as plotly's JSON."""
        return str(self.figure.to_json())


@dataclass(frozen=True, slots=True)
class Line:
    """A metric in a plot: what it is called there, and its values of shape (S,)."""

    label: str
    values: Series


def plots(data: RunData) -> list[Plot]:
    """Every plot of a run for which it has numbers, in the order of the page."""
    made = [
        *_learning(data), *_evaluation(data), *_parts(data), *_sources(data), *_text(data), *_policy(data), *_signal(data),
        *_time(data),
    ]  # fmt: skip
    return [plot for plot in made if plot.figure.data]


def _learning(data: RunData) -> list[Plot]:
    correct, reward = data.curve("correct_rate"), data.curve("mean_reward")
    same = (
        correct is not None and reward is not None and bool(np.array_equal(correct, reward, equal_nan=True))
    )
    note = " The mean reward is the same curve: rewards are 1 for correct and 0 for wrong." if same else ""
    made = _curve(
        data, "correct_rate", "Correct rate in training", "learning",
        [_line("correct rate", correct)], share=True, vitals=("correct_rate",), note=note,
    )  # fmt: skip
    if not same:
        made += _curve(
            data,
            "mean_reward",
            "Mean reward",
            "learning",
            [_line("mean reward", reward)],
            vitals=("mean_reward",),
        )
    return made


def _evaluation(data: RunData) -> list[Plot]:
    figure = empty(share=True)
    said: list[str] = []
    for i, suite in enumerate(data.suites):
        rows = [(row, data.accuracy(row, suite)) for row in data.evaluations]
        known = [(float(row["step"]), found) for row, found in rows if found is not None]
        if not known:
            continue
        each = math.ceil(len(known) / POINTS)
        known = [known[i] for i in sorted({*range(0, len(known), each), len(known) - 1})]
        y = [found[0] for _, found in known]
        name = suite_name(data, suite)
        figure.add_trace(
            _go.Scatter(
                x=[step for step, _ in known], y=rounded(y), name=name, mode="lines+markers",
                line={"color": PALETTE[i % len(PALETTE)], "width": 2}, marker={"size": 6},
                error_y={
                    "type": "data", "symmetric": False, "thickness": 1.2, "width": 3,
                    "array": rounded([high - p for _, (p, _, high) in known]),
                    "arrayminus": rounded([p - low for _, (p, low, _) in known]),
                },
                customdata=[[interval(found, label="")] for _, found in known],
                hovertemplate="%{y:.1%} (%{customdata[0]})<extra>%{fullData.name}</extra>",
            )
        )  # fmt: skip
        said.append(f"{name}: {y[0]:.1%} at first, {y[-1]:.1%} at last.")
    caption = (
        f"Held-out accuracy after so many steps, with 95 % intervals clustered by task. {' '.join(said)}"
    )
    return [Plot("evaluation", "Evaluation", caption, figure, "learning")]


def interval(found: tuple[float, float, float], *, label: str = "95 % interval ") -> str:
    """The interval of an accuracy in words: see ``RunData.accuracy``."""
    return "no interval" if math.isnan(found[1]) else f"{label}{found[1]:.1%} to {found[2]:.1%}"


def suite_name(data: RunData, suite: str) -> str:
    """What a suite of evaluations was measured on."""
    for row in reversed(data.evaluations):
        if isinstance(row.get(f"{suite}/source"), str):
            named = suite.removeprefix("eval").strip("/")
            source = str(row[f"{suite}/source"])
            return f"{named} ({source})" if named and named != source else source
    return suite


def _parts(data: RunData) -> list[Plot]:
    found = [
        Line(key.removeprefix("rewards/"), curve)
        for key in sorted(data.columns)
        if key.startswith("rewards/") and (curve := data.curve(key)) is not None
    ]
    return _curve(data, "reward_parts", "Parts of the reward", "learning", found)


def _sources(data: RunData) -> list[Plot]:
    made: list[Plot] = []
    for what, title in (("correct_rate", "Correct rate by source"), ("mean_reward", "Mean reward by source")):
        found = [
            Line(key.removeprefix("sources/").removesuffix(f"/{what}"), curve)
            for key in sorted(data.columns)
            if key.startswith("sources/")
            and key.endswith(f"/{what}")
            and (curve := data.curve(key)) is not None
        ]
        share = what == "correct_rate"
        made += _curve(data, f"sources_{what}", title, "learning", found, share=share)
        if made:
            break
    return made


def _text(data: RunData) -> list[Plot]:
    return [
        *_curve(
            data, "length", "Completion length", "policy", [_line("mean length", data.curve("mean_length"))],
            unit="tokens", vitals=("mean_length",),
        ),
        *_curve(
            data, "truncation", "Truncated rollouts", "policy", [_line("truncated", data.curve("max_token_hit_rate"))],
            share=True, vitals=("truncated_share",),
        ),
    ]  # fmt: skip


def _policy(data: RunData) -> list[Plot]:
    gap, norm = data.vital_curve("ratio_gap"), data.curve("grad_norm")
    moved, approx = data.curve("moved_kl"), data.curve("approx_kl")
    if moved is not None and approx is not None and np.array_equal(moved, approx, equal_nan=True):
        moved = None  # one update per batch: nothing moved in between
    return [
        *_curve(
            data, "entropy", "Entropy", "policy",
            [
                _line("all tokens", data.curve("entropy_mean")),
                _line("execution", data.curve("exec_entropy_mean")),
                _line("planning", data.curve("plan_entropy_mean")),
            ],
            unit="nats per token", vitals=("entropy",),
        ),
        *_curve(
            data, "mismatch", "Sampler against learner", "policy",
            [
                _line(BY_NAME["ratio_gap"].title, gap), _line("KL, sampler to learner", approx),
                _line("KL moved by the batch", moved), _line("KL to the base model", data.curve("kl_base")),
            ],
            log=True, vitals=("ratio_gap", "approx_kl", "moved_kl"),
            note=" The first update of a batch should see a ratio of 1 and a KL of 0 up to numerics.",
        ),
        *_curve(
            data, "grad_norm", "Gradient norm", "policy", [_line("gradient norm", norm)],
            log=_spiked(norm), zero=not _spiked(norm), vitals=("grad_norm",), note=" Before clipping.",
        ),
        *_curve(
            data, "lr", "Learning rate", "policy", [_line("learning rate", data.curve("lr"))], smooth=False, zero=True
        ),
        *_curve(
            data, "sepa_lambda", "SEPA's lambda", "policy",
            [_line("lambda", data.curve("sepa_lambda"))] if _varies(data.curve("sepa_lambda")) else [], smooth=False,
        ),
        *_curve(
            data, "surprisal", "Surprisal of planning and execution", "policy",
            [_line("execution", data.curve("exec_surprisal_mean")), _line("planning", data.curve("plan_surprisal_mean"))],
            unit="nats per token",
        ),
    ]  # fmt: skip


_REASONS = {
    "all_correct": "all correct", "all_wrong": "all wrong", "equal_rewards": "equal rewards", "all_cut": "all cut",
    "errors": "errors",
}  # fmt: skip


def _signal(data: RunData) -> list[Plot]:
    groups = data.curve("batch_size")
    if groups is None:
        return []
    figure = empty(share=True)
    shares: list[tuple[str, Series]] = []
    for key, label in _REASONS.items():
        found = data.curve(f"skipped_{key}")
        if found is not None and np.nansum(found) > 0:
            shares.append((label, found / np.where(groups > 0, groups, np.nan)))
    silent = np.nansum(np.array([share for _, share in shares]), axis=0) if shares else np.zeros(len(groups))
    for i, (label, share) in enumerate([("trained", 1 - silent), *shares]):
        colour = PALETTE[(i + 1) % len(PALETTE)] if i else PALETTE[0]
        _bars(figure, data, label, share, colour, "%{y:.1%}")
    figure.update_layout(barmode="stack", bargap=0, yaxis_range=[0, 1])
    mean = known_mean(silent)
    said = ", ".join(f"{label} {known_mean(share):.1%}" for label, share in shares) or "none"
    caption = f"Share of each step's groups that trained, and why the rest did not: {mean:.1%} without signal ({said})."
    _mark(figure, data, ("silent_share",))
    return [Plot("signal", "Groups without signal", caption + _thinned(data), figure, "policy")]


_PHASES = (
    ("sync", "sync_time_s", "weights over"), ("sample", "sample_time_s", "sample"), ("score", "score_time_s", "score"),
    ("train", "train_time_s", "train"),
)  # fmt: skip


def phases(data: RunData) -> list[tuple[str, Series]]:
    """Seconds of every step by phase, each of shape (S,), the rest last; empty where the run does not say."""
    whole = data.curve("step_time_s")
    if whole is None:
        return []
    found = [(label, np.nan_to_num(c)) for _, key, label in _PHASES if (c := data.curve(key)) is not None]
    known = np.sum([c for _, c in found], axis=0) if found else np.zeros(len(whole))
    return [*found, ("rest", np.maximum(np.nan_to_num(whole) - known, 0.0))]


def _time(data: RunData) -> list[Plot]:
    made: list[Plot] = []
    found = phases(data)
    if found:
        figure = empty(unit="seconds")
        for i, (label, seconds) in enumerate(found):
            colour = QUIET if label == "rest" else PALETTE[i % len(PALETTE)]
            _bars(figure, data, label, seconds, colour, "%{y:.3~s}s")
        figure.update_layout(barmode="stack", bargap=0)
        total = sum(float(s.sum()) for _, s in found) or 1.0
        said = ", ".join(f"{label} {float(s.sum()) / total:.1%}" for label, s in found)
        made.append(
            Plot(
                "timing",
                "Time of a step",
                f"Seconds by phase. Over the run: {said}.{_thinned(data)}",
                figure,
                "time",
            )
        )
    made += _curve(
        data, "speed", "Sampling speed", "time", [_line("tokens/s", data.curve("tokens_per_second"))],
        unit="tokens/s", zero=True, vitals=("tokens_per_second",),
    )  # fmt: skip
    return made


def _line(label: str, values: Series | None) -> Line | None:
    return None if values is None else Line(label, values)


def _bars(figure: Any, data: RunData, label: str, values: Series, colour: str, form: str) -> None:
    """Add one layer of a stack: every step, or the mean of every bucket of steps, as wide as what it stands for."""
    x, y = bucket_means(data.steps_S, values, _BARS)
    width = np.diff(x, append=data.steps_S[-1] + 1)
    figure.add_trace(
        _go.Bar(
            x=x.tolist(), y=rounded(y), width=width.tolist(), offset=0 if len(x) < len(data.steps_S) else None, name=label,
            marker={"color": colour, "line": {"width": 0}}, hovertemplate=form,
        )
    )  # fmt: skip


def _varies(values: Series | None) -> bool:
    return values is not None and float(np.nanmax(values)) > 0


def _spiked(values: Series | None) -> bool:
    """Would the highest value flatten all others against the axis?"""
    return values is not None and float(np.nanmax(values)) > 20 * float(np.nanmedian(values)) > 0


def _thinned(data: RunData) -> str:
    each = math.ceil(len(data.steps_S) / _BARS)
    return f" Each bar is the mean of {each} steps." if each > 1 else ""


def _curve(
    data: RunData, name: str, title: str, group: str, lines: Sequence[Line | None], *, share: bool = False,
    log: bool = False, zero: bool = False, unit: str = "", smooth: bool = True,
    vitals: Sequence[str] = (), note: str = "",
) -> list[Plot]:  # fmt: skip
    """Raw values, faint, under their trailing mean. Many lines have fewer points each, and fainter ones: the extremes of
    every bucket are drawn all the same.
    """
    known = [line for line in lines if line is not None]
    if not known:
        return []
    steps = data.steps_S
    figure = empty(share=share, log=log, unit=unit)
    if zero:
        figure.update_yaxes(rangemode="tozero")
    window = window_of(len(steps))
    smooth = smooth and len(steps) > window
    form = ":.1%" if share else ":.4g"
    few = len(known) <= _FEW
    points, smooth_points = (
        n if few else max(n * _FEW // len(known), _FEWEST) for n in (POINTS, _SMOOTH_POINTS)
    )
    for i, line in enumerate(known):
        colour = PALETTE[i % len(PALETTE)]
        values = np.where(line.values > 0, line.values, np.nan) if log else line.values
        if np.isnan(values).all():
            continue
        x, y = envelope(steps, values, points)
        # Of thinned points only some steps could be pointed at.
        blind = smooth and (len(x) < len(steps) or len(known) > 1)
        figure.add_trace(
            _go.Scatter(
                x=x.tolist(), y=rounded(y), name=f"{line.label}, each step" if smooth else line.label,
                mode="lines" if len(x) > 1 else "markers", legendgroup=line.label, showlegend=not smooth and len(known) > 1,
                line={"color": colour, "width": 1 if smooth else 1.8}, opacity=1 if not smooth else 0.35 if few else 0.2,
                hoverinfo="skip" if blind else None, hovertemplate=None if blind else f"%{{y{form}}}",
            )
        )  # fmt: skip
        if smooth:
            x, y = every_nth(steps, trailing_mean(values, window), smooth_points)
            figure.add_trace(
                _go.Scatter(
                    x=x.tolist(), y=rounded(y), name=line.label, mode="lines", legendgroup=line.label, showlegend=len(known) > 1,
                    line={"color": colour, "width": 2}, hovertemplate=f"%{{y{form}}}",
                )
            )  # fmt: skip
    _mark(figure, data, vitals)
    how = f" Bold: mean of the last {window} steps." if smooth else ""
    if len(steps) > points:
        each = math.ceil(len(steps) / (points // 2))
        how += f" Faint: the lowest and the highest of every {each} steps." if smooth else ""
    if log:
        how += " Logarithmic; zeros are not drawn."
    said = " ".join(_said(line, share, unit, many=len(known) > 1) for line in known)
    return [Plot(name, title, f"{said}{note}{how}", figure, group)]


def _said(line: Line, share: bool, unit: str, *, many: bool) -> str:
    known = line.values[~np.isnan(line.values)]
    first, last, low, high = (
        number(float(v), share=share) for v in (known[0], known[-1], known.min(), known.max())
    )
    name = f"{line.label[:1].upper()}{line.label[1:]}: " if many else ""
    text = f"{name}first {first}, last {last}, from {low} to {high}{f' {unit}' if unit else ''}."
    return text if many else text[:1].upper() + text[1:]


def number(value: float | None, *, share: bool = False) -> str:
    """A number for people: four digits, a share in percent, "n/a" for None and NaN."""
    if value is None or math.isnan(value):
        return "n/a"
    if share:
        return f"{value:.1%}"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.4g}"


def _mark(figure: Any, data: RunData, vitals: Sequence[str]) -> None:
    """A dotted line where an alarm of one of these metrics was raised."""
    for alarm in [a for a in data.alarms if a.vital in vitals][:_MARKED]:
        figure.add_shape(
            type="line", x0=alarm.step, x1=alarm.step, y0=0, y1=1, yref="paper",
            line={"color": "#ef4444", "width": 1.2, "dash": "dot"},
        )  # fmt: skip


def empty(*, share: bool = False, log: bool = False, unit: str = "") -> Any:
    """A figure without marks, as every plot of a report begins; see ``Plot``."""
    figure = _go.Figure()
    figure.update_layout(
        template="none", height=260, margin={"l": 52, "r": 12, "t": 8, "b": 44}, hovermode="x unified",
        paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)", font={"size": 12},
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "xanchor": "left"},
        xaxis={"title": {"text": "step", "standoff": 8}, "zeroline": False, "tickformat": "d"},
        yaxis={
            "zeroline": False, "automargin": True, "type": "log" if log else "linear",
            "tickformat": ".0%" if share else ".0e" if log else None,
            "autorangeoptions": {"clipmin": 0, "clipmax": 1} if share else None,
            "title": {"text": unit, "standoff": 6} if unit else None,
        },
    )  # fmt: skip
    if log:
        figure.update_yaxes(dtick=None, nticks=6, exponentformat="power")
    return figure


def rounded(values: Any) -> list[float | None]:
    """Six digits, and null where nothing is known, which breaks the line."""
    return [None if value is None or math.isnan(value) else float(f"{value:.6g}") for value in values]


def overlay(runs: Sequence[RunData], metrics: Mapping[str, tuple[str, bool, str]]) -> list[Plot]:
    """The same metric of several runs in one plot: trailing means, one colour a condition.

    ``metrics`` maps a key of metrics.jsonl to its title, whether it is a share, and its unit.
    """
    colours = _colours(runs)
    made: list[Plot] = []
    figure = empty(share=True)
    for run, label, (colour, dash) in zip(runs, labels(runs), colours, strict=True):
        known = [(row, found) for row in run.evaluations if (found := run.accuracy(row)) is not None]
        if known:
            figure.add_trace(
                _go.Scatter(
                    x=[row["step"] for row, _ in known], y=rounded([p for _, (p, _, _) in known]),
                    name=label,
                    mode="lines+markers", line={"color": colour, "width": 1.8, "dash": dash}, marker={"size": 5},
                    hovertemplate="%{y:.1%}",
                )
            )  # fmt: skip
    if figure.data:
        text = "Held-out accuracy after so many steps. The table has the intervals."
        made.append(Plot("evaluation", "Evaluation", text, figure, "learning"))
    for key, (title, share, unit) in metrics.items():
        figure = empty(share=share, unit=unit)
        for run, label, (colour, dash) in zip(runs, labels(runs), colours, strict=True):
            values = run.curve(key)
            if values is None:
                continue
            window = window_of(len(run.steps_S))
            x, y = every_nth(run.steps_S, trailing_mean(values, window), _SMOOTH_POINTS // 2)
            figure.add_trace(
                _go.Scatter(
                    x=x.tolist(), y=rounded(y), name=label, mode="lines" if len(x) > 1 else "markers",
                    line={"color": colour, "width": 1.8, "dash": dash},
                    hovertemplate="%{y:.1%}" if share else "%{y:.4g}",
                )
            )  # fmt: skip
        if figure.data:
            text = "Means of the last twentieth of a run's steps (at least 5, at most 100)."
            made.append(Plot(key, title, text, figure, "learning"))
    return made


def _colours(runs: Sequence[RunData]) -> list[tuple[str, str]]:
    """A colour for each condition where several runs share one, else one for each run; dashes when colours run out."""
    conditions = list(dict.fromkeys(run.condition for run in runs))
    shared = 1 < len(conditions) < len(runs)
    numbers = [conditions.index(run.condition) if shared else i for i, run in enumerate(runs)]
    dashes = ("solid", "dash", "dot", "dashdot")
    return [(PALETTE[n % len(PALETTE)], dashes[n // len(PALETTE) % len(dashes)]) for n in numbers]
