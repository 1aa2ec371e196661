"""A report as one HTML file that asks for nothing: texts escaped, data as JSON, scripts allowed by their digests alone."""

from __future__ import annotations

import base64
import hashlib
import html
import importlib
import zlib
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any

from retrain import __version__
from retrain.report import content
from retrain.report.content import Table
from retrain.report.figures import Plot
from retrain.report.gather import RunData
from retrain.report.parts import Block, Facts, Items, Note, Plots, Section, plots_in
from retrain.report.rollouts import Shown, elements
from retrain.report.visible import visible
from retrain.tracking import layout

_ASSETS = Path(__file__).resolve().parents[1] / "assets" / "report"
_LONG = 28
"""Characters from which a headline's value is set in small type."""


def run(data: RunData, plots: Sequence[Plot], shown: Shown, *, twin: str, made: str) -> str:
    """The page of one run. ``twin`` is the name of the Markdown file beside it."""
    groups = {
        "learning": ("Learning", "Does it get better?"),
        "policy": ("Policy", "Is the training healthy?"),
        "time": ("Time", "Where does the time go?"),
    }
    parts: list[tuple[str, str, str]] = [("result", "", _headline(data)), ("alarms", "Alarms", _alarms(data))]
    for group, (title, question) in groups.items():
        body = plots_of([plot for plot in plots if plot.group == group])
        if group == "learning":
            body += folded("Evaluations as a table", content.evaluations(data))
        if group == "time":
            body += folded("Times as a table", content.timing(data))
        if body:
            parts.append((group, title, f'<p class="note">{question}</p>{body}'))
    chosen, left = content.settings(data)
    parts += [
        ("metrics", "Core metrics", table_of(content.vitals(data))),
        ("rollouts", "Rollouts", _rollouts(data, shown)),
        (
            "settings", "Settings",
            (table_of(chosen) or '<p class="note">config.toml is missing or cannot be read.</p>')
            + folded("Settings left at their defaults", left),
        ),
        ("record", "Record", _record(data)),
    ]  # fmt: skip
    return document(data.title, "retrain run", parts, plots, made=made, twin=twin, more="".join(elements(shown)))


def several(
    runs: Sequence[RunData], plots: Sequence[Plot], *, title: str, note: str, twin: str, made: str
) -> str:
    """The page of several runs."""
    parts = [
        ("runs", "", f'<p class="note">{escaped(note)}</p>{table_of(content.several(runs))}'),
        ("curves", "Curves", plots_of(plots) or '<p class="note">No run has completed a step.</p>'),
        ("settings", "Settings that differ", table_of(content.differing(runs)) or '<p class="note">None.</p>'),
    ]
    return document(title, f"{len(runs)} retrain runs", parts, plots, made=made, twin=twin)


def sections(shown: Sequence[Section], *, title: str, kicker: str, twin: str, made: str) -> str:
    """The page of a report that is given as sections."""
    parts = [(part.name, part.heading, "".join(map(_block, part.blocks))) for part in shown]
    return document(title, kicker, parts, plots_in(shown), made=made, twin=twin)


def _block(block: Block) -> str:
    if isinstance(block, Note):
        return f"<p{'' if block.loud else ' class=note'}>{escaped(block.text)}</p>"
    if isinstance(block, Facts):
        cells = [
            _fact(fact.label, fact.value, fact.note, ["long"] if len(fact.value) > _LONG else [])
            for fact in block.facts
        ]
        return f'<dl class="facts">{"".join(cells)}</dl>'
    if isinstance(block, Items):
        items = [
            f"<li{f' class={item.tone}' if item.tone else ''}><p><strong>{escaped(item.title)}</strong></p>"
            f"<p>{escaped(item.text)}</p></li>"
            for item in block.items
        ]
        return f'<ul class="alarms">{"".join(items)}</ul>' if items else ""
    if isinstance(block, Plots):
        return plots_of(block.plots)
    if block.folded:
        return folded(block.heading, block.table)
    heading = f"<h3>{escaped(block.heading)}</h3>" if block.heading and block.table.rows else ""
    return heading + table_of(block.table)


def document(
    title: str, kicker: str, parts: Sequence[tuple[str, str, str]], plots: Sequence[Plot], *, made: str, twin: str, more: str = ""
) -> str:  # fmt: skip
    """A page of parts: the anchor, heading and markup of each. ``more`` are further elements with data."""
    offline: Any = importlib.import_module("plotly.offline")
    # A browser turns carriage returns into newlines before it takes the digest.
    plotly = str(offline.get_plotlyjs()).replace("\r\n", "\n").replace("\r", "\n")
    script = (_ASSETS / "page.js").read_text(encoding="utf-8")
    data = "".join(
        f'<script type="application/json" id="figure-{p.name}">{_embedded(p.json)}</script>' for p in plots
    )
    sections = "".join(
        f'<section id="{name}" aria-label="{escaped(heading or "Result")}">'
        f"{f'<h2>{escaped(heading)}</h2>' if heading else ''}{body}</section>"
        for name, heading, body in parts
    )
    return Template((_ASSETS / "page.html").read_text(encoding="utf-8")).substitute(
        policy=_policy(plotly, script),
        generator=f"retrain {__version__}",
        title=escaped(title),
        heading=escaped(title),
        kicker=escaped(kicker),
        style=(_ASSETS / "page.css").read_text(encoding="utf-8"),
        nav="".join(f'<a href="#{name}">{escaped(heading or "Result")}</a>' for name, heading, _ in parts),
        body=sections,
        made=f"{escaped(made)} The same as text: {escaped(twin)}, beside this file.",
        data=data + more,
        plotly=base64.b64encode(zlib.compress(plotly.encode(), 6)).decode(),
        script=script,
    )


def _policy(*scripts: str) -> str:
    """Nothing may be fetched, framed or sent; only these scripts run. plotly sets styles, and images from memory."""
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )


def _embedded(json: str) -> str:
    """JSON made by others, so that it may stand inside a ``<script>`` element."""
    for character in "<>&\u2028\u2029":
        json = json.replace(character, f"\\u{ord(character):04x}")
    return json


def escaped(text: str) -> str:
    """Text of others as markup that shows it."""
    return html.escape(visible(text))


def _headline(data: RunData) -> str:
    cells: list[str] = []
    for fact in content.headline(data):
        style = ["long"] if len(fact.value) > _LONG else []
        if fact.label == "Status":
            style.append(f"state-{data.state}")
        cells.append(_fact(fact.label, fact.value, fact.note, style))
    return f'<dl class="facts">{"".join(cells)}</dl>'


def _fact(label: str, value: str, note: str, style: Sequence[str]) -> str:
    by = f'<dd class="by">{escaped(note)}</dd>' if note else ""
    name = f' class="{" ".join(style)}"' if style else ""
    wide = " class=wide" if label == "Where" else ""
    return f"<div{wide}><dt>{escaped(label)}</dt><dd{name}>{escaped(value)}</dd>{by}</div>"


def _alarms(data: RunData) -> str:
    lines = content.alarm_lines(data)
    if not lines:
        return f'<p class="note">{"No step has completed yet." if not data.done else "None was raised."}</p>'
    items = [
        f"<li{' class=now' if line.now else ''}><p><strong>{escaped(line.title)}</strong> "
        f'<span class="when">{escaped(line.when)}{"; outside its range now" if line.now else "; over"}</span></p>'
        f"<p>{escaped(line.message)} {escaped(line.advice)}</p></li>"
        for line in lines
    ]
    return f'<ul class="alarms">{"".join(items)}</ul>'


def plots_of(plots: Sequence[Plot]) -> str:
    """Places where the page draws its plots, with their titles and captions."""
    made = [
        f'<figure aria-labelledby="title-{p.name}" aria-describedby="caption-{p.name}">'
        f'<h3 id="title-{p.name}">{escaped(p.title)}</h3>'
        f'<div class="plot" id="plot-{p.name}" data-figure="figure-{p.name}"></div>'
        f'<figcaption id="caption-{p.name}">{escaped(p.caption)}</figcaption></figure>'
        for p in plots
    ]
    return f'<div class="plots">{"".join(made)}</div>' if made else ""


def table_of(table: Table | None) -> str:
    """A table, "" where there is nothing to show."""
    if table is None or not table.rows:
        return ""

    def cell(i: int, text: str, tag: str) -> str:
        style = (
            "numeric" if i in table.numeric else {"outside now": "now", "was outside": "was"}.get(text, "")
        )
        return f"<{tag}{f' class={style}' if style else ''}>{escaped(text)}</{tag}>"

    head = "".join(cell(i, text, "th") for i, text in enumerate(table.columns))
    rows = "".join(
        f"<tr>{''.join(cell(i, text, 'td') for i, text in enumerate(row))}</tr>" for row in table.rows
    )
    note = f'<p class="note">{escaped(table.note)}</p>' if table.note else ""
    return (
        f'<div class="scroll" role="region" aria-label="Table: {escaped(table.columns[0])}" tabindex="0"><table><thead><tr>{head}'
        f"</tr></thead><tbody>{rows}</tbody></table></div>{note}"
    )


def folded(title: str, table: Table | None) -> str:
    """A table that a reader opens, "" where there is nothing to show."""
    inner = table_of(table)
    return f"<details><summary>{escaped(title)}</summary>{inner}</details>" if inner else ""


def _record(data: RunData) -> str:
    resumes, warnings = content.resumes(data), content.warnings(data)
    made = [f"<h3>Resumes</h3>{table_of(resumes)}" if resumes else '<p class="note">Never resumed.</p>']
    if warnings:
        made.append(f"<h3>Warnings</h3>{table_of(warnings)}")
    if data.events.error:
        made.append(f"<h3>Last error</h3><pre>{escaped(data.events.error)}</pre>")
    machine = table_of(content.machine(data))
    made.append(
        f"<h3>Versions, device and digests</h3>{machine}"
        if machine
        else '<p class="note">run.json is missing.</p>'
    )
    return "".join(made)


def _rollouts(data: RunData, shown: Shown) -> str:
    if not shown.rows:
        return '<p class="note">No rollout was stored as text: logging.generations is 0, or no step has completed yet.</p>'
    left = shown.total - len(shown.rows)
    said = content.rollouts_note(shown)
    verdicts = f'<p class="note">{escaped(said)}</p>' if said else ""
    note = f"All {shown.total:,} rollouts that the run stored as text (the first few of every step)."
    if left:
        note = (
            f"{len(shown.rows):,} of {shown.total:,} stored rollouts, from {shown.steps:,} of {shown.steps_total:,} steps: "
            f"the first, the last, steps with alarms, and an even sample of the others. {left:,} are left out to keep this "
            f"file small; all are in {data.record.path / layout.GENERATIONS}."
        )
    return f"""<p class="note">{escaped(note)} <kbd>n</kbd> and <kbd>p</kbd> go to the next and the previous one,
<kbd>/</kbd> searches, arrow keys walk through the list and through tokens.</p>{verdicts}
<form class="filters" id="filters">
<label>Steps<span class="pair"><input type="number" name="from" min="0" placeholder="from" aria-label="From step">
<input type="number" name="to" min="0" placeholder="to" aria-label="To step"></span></label>
<label>Verdict<select name="verdict"><option value="">any</option><option>correct</option><option>wrong</option>
<option>failed</option></select></label>
<label>Reward<span class="pair"><input type="number" name="least" step="any" placeholder="from" aria-label="Lowest reward">
<input type="number" name="most" step="any" placeholder="to" aria-label="Highest reward"></span></label>
<label>Ended by<select name="stop"><option value="">any</option></select></label>
<label>Group<select name="skipped"><option value="">any</option><option>trained</option></select></label>
<label>Task<input type="search" name="task"></label>
<label>Text of prompt, completion, reference<input type="search" name="text"></label>
<button type="reset">Clear</button>
</form>
<p class="note" id="rollout-count" aria-live="polite"></p>
<div class="browser"><div class="list"><ol id="rollout-list"></ol></div><div class="opened" id="rollout-opened"></div></div>"""
