"""A report as Markdown: the same words and tables, and curves in block characters."""

from __future__ import annotations

import re
from collections.abc import Sequence

from retrain.report import content
from retrain.report.content import Table
from retrain.report.gather import RunData
from retrain.report.parts import Block, Facts, Items, Note, Plots, Section
from retrain.report.rollouts import Shown
from retrain.report.visible import visible

_SPECIAL = re.compile(r"([\\`*_\[\]<>|#~])")


def run(data: RunData, shown: Shown, *, page: str, made: str) -> str:
    """One run. ``page`` is the name of the HTML file beside this one, ``made`` says when and by which version."""
    lines = [f"# {plain(data.title)}", "", made, ""]
    for fact in content.headline(data):
        lines.append(
            f"- **{plain(fact.label)}**: {plain(fact.value)}{f' ({plain(fact.note)})' if fact.note else ''}"
        )
    lines += ["", "## Alarms", ""]
    alarms = content.alarm_lines(data)
    for alarm in alarms:
        still = "outside now" if alarm.now else "over"
        lines.append(
            f"- **{plain(alarm.title)}** ({alarm.when}; {still}): {plain(alarm.message)} {plain(alarm.advice)}"
        )
    if not alarms:
        lines.append("None.")
    chosen, left = content.settings(data)
    for title, table in (
        ("Evaluation", content.evaluations(data)), ("Curves", content.curves(data)), ("Time", content.timing(data)),
        ("Core metrics", content.vitals(data)), ("Settings", chosen), ("Settings left at their defaults", left),
        ("Resumes", content.resumes(data)), ("Warnings", content.warnings(data)), ("Recorded", content.machine(data)),
    ):  # fmt: skip
        lines += ["", f"## {title}", "", *table_lines(table)]
    if data.events.error:
        lines += [
            "",
            "## Last error",
            "",
            *(f"    {line}" for line in visible(data.events.error).splitlines()),
        ]
    text = (
        f"{len(shown.rows):,} of {shown.total:,} stored as text are in {page}."
        if shown.total
        else "None were stored as text."
    )
    text = " ".join(filter(None, [text, content.rollouts_note(shown)]))
    return "\n".join([*lines, "", "## Rollouts", "", text, ""])


def several(runs: Sequence[RunData], *, title: str, note: str, made: str) -> str:
    """Several runs side by side."""
    lines = [f"# {plain(title)}", "", made, "", note, "", "## Runs", "", *table_lines(content.several(runs))]
    lines += ["", "## Settings that differ", "", *table_lines(content.differing(runs))]
    return "\n".join([*lines, ""])


def sections(shown: Sequence[Section], *, title: str, made: str) -> str:
    """A report that is given as sections; of plots it holds what their captions say."""
    lines = [f"# {plain(title)}", "", made]
    for part in shown:
        lines += ["", f"## {plain(part.heading)}"] if part.heading else []
        for block in part.blocks:
            lines += _block(block)
    return "\n".join([*lines, ""])


def _block(block: Block) -> list[str]:
    if isinstance(block, Note):
        return ["", plain(block.text)]
    if isinstance(block, Facts):
        notes = [f" ({plain(fact.note)})" if fact.note else "" for fact in block.facts]
        return [
            "",
            *(f"- **{plain(fact.label)}**: {plain(fact.value)}{n}" for fact, n in zip(block.facts, notes, strict=True)),
        ]
    if isinstance(block, Items):
        return ["", *(f"- **{plain(item.title)}**: {plain(item.text)}" for item in block.items)]
    if isinstance(block, Plots):
        return ["", *(f"- **{plain(plot.title)}** (plot): {plain(plot.caption)}" for plot in block.plots)]
    if not block.table.rows:
        return []
    return [*(["", f"### {plain(block.heading)}"] if block.heading else []), "", *table_lines(block.table)]


def table_lines(table: Table | None) -> list[str]:
    """A table; "None." where there is nothing to show."""
    if table is None or not table.rows:
        return ["None."]
    rule = ["---:" if i in table.numeric else "---" for i in range(len(table.columns))]
    rows = [
        f"| {' | '.join(plain(column) for column in table.columns)} |",
        f"| {' | '.join(rule)} |",
        *(f"| {' | '.join(plain(cell) for cell in row)} |" for row in table.rows),
    ]
    return [*rows, *(["", plain(table.note)] if table.note else [])]


def plain(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    return _SPECIAL.sub(r"\\\1", visible(" ".join(text.split("\n")))).strip()
