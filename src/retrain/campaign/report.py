"""The report of a campaign: one HTML file that works offline, and a Markdown twin.

Before the first declared look is complete it holds no verdict, no p value and no comparison.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from retrain import __version__
from retrain.campaign import account, figures, findings, reading, words
from retrain.campaign.figures import Curves
from retrain.campaign.findings import Findings
from retrain.report import build, markdown, page
from retrain.report.figures import Plot, number
from retrain.report.parts import Block, Facts, Items, Note, Plots, Section, Shown, plots_in

_SEEDS_OPEN = 12
"""Seeds up to which the table of every run stands open."""
_ROWS_OPEN = 60
"""Rows up to which the table of other metrics does."""


def write(directory: Path, out: Path | None = None) -> dict[str, Any]:
    """Write the report of the campaign in ``directory`` and return what it says as one JSON document, with the files.

    ``out`` is the HTML file or a folder for it; by default ``report.html`` in ``directory``. ResumeError where the manifest
    is missing or was changed, UsageError where the files cannot be written or are no report.
    """
    target = build.target_of(directory, out)
    campaign = findings.gather(directory)
    made = f"Made by retrain {__version__} on {time.strftime('%Y-%m-%d %H:%M:%S UTC', time.gmtime())}, as the campaign stood."
    shown = sections(campaign)
    name = campaign.declared.name
    text = page.sections(shown, title=name, kicker="retrain campaign", twin=target.with_suffix(".md").name, made=made)
    files = build.put(target, text, markdown.sections(shown, title=name, made=made))
    return {**files, "plots": len(plots_in(shown)), **findings.record(campaign)}


def sections(campaign: Findings) -> list[Section]:
    """The whole report."""
    drawn = figures.looks(list(campaign.declared.conditions))
    made = [
        Section("result", "", tuple(_result(campaign))),
        Section("comparison", "Comparison with the baseline", tuple(_comparison(campaign, drawn))),
        Section("curves", "Learning curves", tuple(_curves(campaign, drawn))),
        Section("metrics", "Other metrics", tuple(_metrics(campaign))),
        Section("variance", "Where the spread comes from", tuple(_variance(campaign))),
        Section("threshold", "Steps to the threshold", tuple(_tables(words.threshold(campaign)))),
        Section("runs", "Runs", tuple(_runs(campaign))),
        Section("design", "Declared before the first run", (Shown(account.design(campaign)),)),
        Section("tuning", "Tuning", tuple(_tuning(campaign))),
        Section("settings", "Settings", tuple(_settings(campaign))),
        Section("cost", "Cost", (Shown(account.cost(campaign)),)),
        Section("record", "Record", (Shown(account.versions(campaign), "Code, versions and machines of the runs", folded=True),)),
    ]
    return [section for section in made if section.blocks]


def _result(campaign: Findings) -> list[Block]:
    blocks: list[Block] = [Facts(words.headline(campaign)), Note(words.conclusion(campaign), loud=True)]
    if campaign.is_readable:
        blocks.append(Items(words.verdicts(campaign.analysis)))
        if said := words.before(campaign):
            blocks.append(Note(said))
    if campaign.exploratory is not None:
        seeds = len(campaign.exploratory.seeds)
        blocks += [
            Note(f"With the added seeds, {seeds} in all, exploratory:", loud=True),
            Items(words.verdicts(campaign.exploratory)),
        ]
    return [*blocks, Items(words.warnings(campaign))] if campaign.warnings else blocks


def _comparison(campaign: Findings, drawn: dict[str, figures.Look]) -> list[Block]:
    if not campaign.is_readable:
        return []
    analysis, declared, level = campaign.analysis, campaign.declared, campaign.level
    forest = figures.forest(
        analysis, drawn, margin=declared.smallest_effect, baseline=declared.baseline, coverage=100 * level
    )
    title = "Every run" if declared.outcome == "eval/accuracy" else "Every run, correct rate in training"
    strip = figures.strip(analysis, campaign.outcomes, drawn, title=title, coverage=100 * level)
    blocks: list[Block] = [Plots(tuple(plot for plot in (forest, strip) if plot is not None))]
    if analysis.comparisons:
        blocks += [
            Shown(words.comparisons(analysis, level), "Verdicts"),
            Shown(words.sensitivity(analysis, level), "Sensitivity, which decides nothing"),
        ]
    blocks.append(Shown(words.arms(analysis, level), "Conditions"))
    if campaign.exploratory is not None:
        blocks.append(
            Shown(words.comparisons(campaign.exploratory, level), "With added seeds, exploratory", folded=True)
        )
    return blocks


def _curves(campaign: Findings, drawn: dict[str, figures.Look]) -> list[Block]:
    plots: list[Plot] = []
    blocks: list[Block] = []
    held_out = campaign.declared.outcome == "eval/accuracy"
    if held_out:
        first = outcome_curves(campaign)
        plot = figures.curves(first, drawn, seeds=True, share=True, marks=True, note="")
        if plot is not None:
            plots.append(plot)
            blocks.append(Shown(words.sparks(first, True), "Held-out accuracy in characters", folded=True))
    rates: Curves | None = None
    agreed = ""
    for name, (title, unit) in reading.CURVES.items():
        metric = training_curves(campaign, name, title, unit)
        if name == "mean_reward" and rates is not None and _equal(metric, rates):
            continue
        known = np.concatenate([values.ravel() for values in metric.values.values()])
        if reading.is_rounding(name, known.tolist()):
            if not np.isnan(known).all():
                most = number(float(np.nanmax(np.abs(known))))
                agreed += f" {title}: at most {most} {unit}, which is rounding, and not drawn."
            continue
        seeds = name == "correct_rate"
        plot = figures.curves(metric, drawn, seeds=seeds, share=unit == "share", marks=False, note="")
        if plot is not None:
            plots.append(plot)
            if seeds:
                rates = metric
                blocks.append(Shown(words.sparks(metric, True), f"{title} in characters", folded=True))
    if not plots:
        return [Note("No run has completed a step.")]
    window = reading.window_of(campaign.declared.max_steps)
    note = (
        "Lines are means over the seeds that have come so far, bands their 95 % t intervals; none of it is a test. A failed run "
        'stays in with its last value. "each seed" in a legend shows every run. '
        f"Curves of training are means of the last {window} steps; metrics that were the same in all runs are left out.{agreed}"
    )
    return [Note(note), Plots(tuple(plots)), *blocks]


def _equal(one: Curves, other: Curves) -> bool:
    return all(np.array_equal(one.values[label], other.values[label], equal_nan=True) for label in one.values)


def outcome_curves(campaign: Findings) -> Curves:
    """The primary outcome's metric at every evaluation."""
    at = sorted({step for run in campaign.outcomes for step, _ in run.curve})
    place = {step: i for i, step in enumerate(at)}
    values: dict[str, Any] = {}
    seeds: dict[str, tuple[int, ...]] = {}
    for label in campaign.declared.conditions:
        runs = [run for run in campaign.of(label) if run.curve]
        matrix = np.full((len(runs), len(at)), np.nan)
        for row, run in zip(matrix, runs, strict=True):
            for step, value in run.curve:
                row[place[step]] = value
            if run.state == "failed":
                row[place[run.curve[-1][0]] :] = run.curve[-1][1]
        values[label], seeds[label] = matrix, tuple(run.seed for run in runs)
    return Curves("outcome", "Held-out accuracy", "share", np.array(at, np.float64), values, seeds)


def training_curves(campaign: Findings, name: str, title: str, unit: str) -> Curves:
    """A metric of training on the grid of all runs."""
    values: dict[str, Any] = {}
    seeds: dict[str, tuple[int, ...]] = {}
    steps = reading.grid(campaign.declared.max_steps)
    for label in campaign.declared.conditions:
        runs = [run for run in campaign.of(label) if run.name in campaign.readings]
        known = [campaign.readings[run.name].curves[name] for run in runs]
        values[label] = np.array(known).reshape(len(known), len(steps))
        seeds[label] = tuple(run.seed for run in runs)
    return Curves(name, title, unit, steps, values, seeds)


def _metrics(campaign: Findings) -> list[Block]:
    table = words.metrics(campaign)
    many = len(table.rows) > _ROWS_OPEN
    blocks: list[Block] = [Shown(table, "Every metric and condition" if many else "", folded=many)] if table.rows else []
    other = words.pairs(campaign)
    if other.rows:
        blocks.append(Shown(other, "Pairs without the baseline", folded=True))
    return blocks


def _variance(campaign: Findings) -> list[Block]:
    if not campaign.is_readable:
        return []
    table, advice = words.variance(campaign)
    return [Note(advice, loud=table is not None), *(_tables(table) if table else [])]


def _runs(campaign: Findings) -> list[Block]:
    blocks: list[Block] = []
    failed, advice = account.failures(campaign)
    if failed is not None:
        blocks += [Shown(failed, "Not come to their end, or counted at their last evaluation"), Note(advice)]
    many = len(campaign.manifest.seeds) > _SEEDS_OPEN
    return [
        *blocks,
        Shown(account.by_condition(campaign), "By condition"),
        Shown(account.states(campaign), "Every run", folded=many),
    ]


def _tuning(campaign: Findings) -> list[Block]:
    text, chosen, trials = account.tuning(campaign)
    blocks: list[Block] = [Note(text)]
    blocks += _tables(chosen) if chosen else []
    return [*blocks, Shown(trials, "Trials", folded=True)] if trials else blocks


def _settings(campaign: Findings) -> list[Block]:
    differ, shared = account.configurations(campaign)
    blocks: list[Block] = [Shown(differ, "What differs between the conditions")]
    if shared is not None:
        blocks.append(Shown(shared, "What all runs share", folded=True))
    return blocks


def _tables(table: Any) -> list[Block]:
    return [Shown(table)] if table.rows else []
