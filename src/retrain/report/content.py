"""What a report says in words and tables; the page and its Markdown twin are two ways to write it down."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from retrain.config.secret import secrets
from retrain.report.figures import interval, number, phases, suite_name
from retrain.report.gather import RunData, clock, labels, moment
from retrain.report.rollouts import Shown
from retrain.report.thinning import Series, known_mean, spark

_ROWS = 60
"""Evaluations in the table; the plot has them all."""


@dataclass(frozen=True, slots=True)
class Fact:
    """One line of the headline."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of text under column heads. ``numeric`` are the columns that hold numbers."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numeric: frozenset[int] = frozenset()
    note: str = ""


@dataclass(frozen=True, slots=True)
class AlarmLine:
    """All alarms of one metric: the newest message, when, and whether the metric is still outside its range."""

    title: str
    message: str
    when: str
    advice: str
    now: bool


_STATES = {
    "dead": "dead: it says that it runs, and its process is gone", "unknown": "unknown: no run.json says",
}  # fmt: skip


def state(data: RunData) -> str:
    """What became of the run, in words."""
    if data.state == "silent":
        return f"running, but silent: no heartbeat for {clock(data.record.heartbeat_age)}"
    if data.state == "hung":
        return f"hung: it lives, and nothing has moved for {clock(data.record.still_s)}"
    return _STATES.get(data.state, data.state)


def headline(data: RunData) -> list[Fact]:
    """What the run is and what came of it."""
    asked = data.max_steps
    resumed = len(data.events.resumes)
    notes = [f"resumed {resumed} {'time' if resumed == 1 else 'times'}" if resumed else ""]
    steps = f"{data.done:,} of {asked:,}" if asked is not None else f"{data.done:,}"
    facts = [
        Fact("Status", state(data), _why(data)),
        Fact("Steps", steps, "; ".join(filter(None, notes))),
        *_results(data),
        Fact("Condition", data.condition or "n/a", _credit_note(data)),
        Fact("Model", str(data.setting("model.model") or "n/a"), _lora(data)),
        Fact("Tasks", _source(data), f"reward: {data.setting('reward.type') or 'n/a'}"),
    ]
    tokens = data.curve("tokens_sampled")
    sampled = f"{float(np.nansum(tokens)):,.0f} tokens sampled" if tokens is not None else ""
    begun = data.events.begun
    facts.append(Fact("Time in steps and evaluations", clock(data.seconds), sampled))
    beat = moment(time.time() - data.record.heartbeat_age)
    facts.append(
        Fact(
            "When",
            f"began {begun} (local)" if begun else beat or "n/a",
            f"last sign of life {beat}" if beat else "",
        )
    )
    host = data.facts.get("host")
    facts.append(Fact("Where", str(data.record.path.absolute()), f"on {host}" if host else ""))
    return facts


def _why(data: RunData) -> str:
    if data.state == "silent":
        return data.record.why_silent
    return _first_line(data.events.error) if data.state in ("failed", "dead") else ""


def _results(data: RunData) -> list[Fact]:
    known = [
        (int(row["step"]), found) for row in data.evaluations if (found := data.accuracy(row)) is not None
    ]
    if known:
        (first_at, first), (last_at, last) = known[0], known[-1]
        note = f"{interval(last)}, after {last_at:,} steps"
        newest = int(data.evaluations[-1]["step"])
        if newest != last_at:
            note += f"; the one after {newest:,} steps has no accuracy"
        facts = [Fact("Last evaluation", f"{last[0]:.1%}", note)]
        if len(known) > 1:
            gain = 100 * (last[0] - first[0])
            facts.append(
                Fact("First evaluation", f"{first[0]:.1%}", f"{interval(first)}, after {first_at:,} steps")
            )
            facts.append(Fact("Gain", f"{gain:+.1f} points", "one run: other seeds may differ"))
        return facts
    rate = data.curve("correct_rate")
    what = "correct rate"
    if rate is None:
        rate, what = data.curve("mean_reward"), "mean reward"
    if rate is None:
        return [Fact("Evaluation", "none", "this run holds no evaluation and no rewards")]
    tenth = max(1, len(rate) // 10)
    share = what == "correct rate"
    first, last = (number(known_mean(part), share=share) for part in (rate[:tenth], rate[-tenth:]))
    return [
        Fact("Evaluation", "none", "held-out accuracy was not measured"),
        Fact(
            "Training " + what,
            last,
            f"mean of the last {_count(tenth, 'step')}; {first} over the first {tenth}",
        ),
    ]


def rollouts_note(shown: Shown) -> str:
    """What a reader must know of the verdicts of rollouts, "" where the run itself gave them."""
    if not shown.guessed:
        return ""
    return (
        f"An earlier version wrote {'these' if shown.guessed == len(shown.rows) else f'{shown.guessed:,} of these'}, without "
        "what the run counted as correct: their verdicts are made from the reward alone, and may differ from correct_rate."
    )


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def _first_line(text: str) -> str:
    return text.partition("\n")[0]


def _credit_note(data: RunData) -> str:
    return f"uncertainty: {data.uncertainty}" if data.uncertainty else ""


def _lora(data: RunData) -> str:
    rank, dtype = data.setting("model.lora_rank"), _recorded(data).get("dtype")
    return ", ".join(filter(None, [f"LoRA rank {rank}" if rank else "", str(dtype) if dtype else ""]))


def _source(data: RunData) -> str:
    mixture = data.setting("data.mixture")
    if isinstance(mixture, list) and mixture:
        tables = cast("list[dict[str, Any]]", mixture)
        return "mixture of " + ", ".join(str(t.get("name") or t.get("source", "?")) for t in tables)
    return str(data.setting("data.source") or "n/a")


def alarm_lines(data: RunData) -> list[AlarmLine]:
    """The run's alarms, one line a metric, those that still stand first."""
    ill = {line.vital.name for line in data.vitals if line.ill}
    titles = {line.vital.name: line.vital.title for line in data.vitals}
    made: list[AlarmLine] = []
    for name in dict.fromkeys(alarm.vital for alarm in data.alarms):
        own = [alarm for alarm in data.alarms if alarm.vital == name]
        newest = own[-1]
        when = f"step {newest.step:,}"
        if len(own) > 1:
            when = f"{len(own)} times, first at step {own[0].step:,}, last at {newest.step:,}"
        made.append(AlarmLine(titles.get(name, name), newest.message, when, newest.advice, name in ill))
    return sorted(made, key=lambda line: not line.now)


def evaluations(data: RunData) -> Table | None:
    """Every evaluation and suite, with interval, pass@k and length."""
    extra = sorted(
        {
            key.rpartition("/")[2]
            for row in data.evaluations
            for key, value in row.items()
            if key.rpartition("/")[2].startswith(("pass@", "mean@"))
            and not key.endswith("@1")
            and value is not None
        },
        key=lambda key: (key[:4], int(key[5:]) if key[5:].isdigit() else 0),
    )
    rows: list[tuple[str, ...]] = []
    for row in data.evaluations:
        for suite in data.suites:
            if f"{suite}/accuracy" not in row:
                continue
            found = data.accuracy(row, suite)
            accuracy = "n/a" if found is None else f"{found[0]:.1%}"
            spread = "n/a" if found is None else interval(found, label="")
            tasks, samples = row.get(f"{suite}/tasks"), row.get(f"{suite}/samples")
            rows.append((
                f"{row['step']:,}", suite_name(data, suite), accuracy, spread,
                *(_share(row.get(f"{suite}/{k}")) for k in extra),
                _plain(row.get(f"{suite}/mean_reward")), _plain(row.get(f"{suite}/mean_length")),
                _share(row.get(f"{suite}/max_token_hit_rate")), f"{tasks} x {samples}", str(row.get(f"{suite}/errors", "n/a")),
            ))  # fmt: skip
    if not rows:
        return None
    note = ""
    if len(rows) > _ROWS:
        each = math.ceil(len(rows) / _ROWS)
        kept = [rows[i] for i in sorted({*range(0, len(rows), each), len(rows) - 1})]
        note = f"{len(kept)} of {len(rows)} rows, evenly spread; metrics.jsonl has all."
        rows = kept
    columns = (
        "Steps", "Tasks of", "Accuracy", "95 % interval", *extra, "Mean reward", "Length", "Truncated", "Tasks", "Errors",
    )  # fmt: skip
    return Table(columns, tuple(rows), frozenset(range(len(columns))) - {1}, note)


def timing(data: RunData) -> Table | None:
    """Where the time of the steps went."""
    found = phases(data)
    if not found:
        return None
    total = sum(float(seconds.sum()) for _, seconds in found) or 1.0
    rows = tuple(
        (
            label, clock(float(seconds.sum())), f"{float(seconds.sum()) / total:.1%}",
            f"{number(float(np.median(seconds)))} s", f"{number(float(seconds.max()))} s",
        )
        for label, seconds in found
    )  # fmt: skip
    held = sum(
        float(row["eval/time_s"])
        for row in data.evaluations
        if isinstance(row.get("eval/time_s"), int | float)
    )
    note = f"Evaluations took {clock(held)} more." if held else ""
    return Table(
        ("Phase", "Total", "Share", "Median step", "Slowest step"), rows, frozenset({1, 2, 3, 4}), note
    )


def vitals(data: RunData) -> Table:
    """The core metrics with their healthy ranges."""
    rows: list[tuple[str, ...]] = []
    for line in data.vitals:
        show = line.vital.text
        verdict = "outside now" if line.ill else "no data" if line.last is None else "ok"
        if verdict == "ok" and any(alarm.vital == line.vital.name for alarm in data.alarms):
            verdict = "was outside"
        spread = "n/a" if line.low is None else f"{show(line.low)} to {show(line.high)}"
        rows.append(
            (line.vital.title, show(line.last), show(line.median), spread, line.vital.healthy, verdict)
        )
    return Table(
        ("Metric", "Last", "Median", "Lowest to highest", "Healthy", "Verdict"),
        tuple(rows),
        frozenset({1, 2, 3}),
    )


_SPARKED = (
    "correct_rate", "mean_reward", "mean_length", "max_token_hit_rate", "entropy_mean", "approx_kl", "grad_norm",
    "sepa_lambda", "tokens_per_second", "step_time_s",
)  # fmt: skip


def curves(data: RunData) -> Table | None:
    """The main curves in characters, for where there are no plots."""
    more = sorted(
        key
        for key in data.columns
        if key.startswith(("rewards/", "sources/")) and not key.endswith("/groups")
    )
    rows: list[tuple[str, ...]] = []
    for key in (*_SPARKED, *more):
        values = data.curve(key)
        if values is None:
            continue
        share = key.endswith(("_rate", "correct_rate"))
        rows.append((key, *(number(v, share=share) for v in _ends(values)), spark(values)))
    if not rows:
        return None
    return Table(
        ("Metric", "First", "Last", "Lowest", "Highest", "Over the steps"),
        tuple(rows),
        frozenset({1, 2, 3, 4}),
    )


def _ends(values: Series) -> tuple[float, ...]:
    known = values[~np.isnan(values)]
    return float(known[0]), float(known[-1]), float(known.min()), float(known.max())


def settings(data: RunData) -> tuple[Table | None, Table | None]:
    """Settings that someone chose, with where, and those left at their defaults. A run that did not record origins has
    all of them in the first."""
    chosen: list[tuple[str, ...]] = []
    left: list[tuple[str, ...]] = []
    for name, value in flat(data.config):
        if data.origins is None:
            chosen.append((name, value, "not recorded"))
        elif data.origins.get(name, "default") == "default":
            left.append((name, value))
        else:
            chosen.append((name, value, data.origins[name]))
    note = "" if data.origins is not None else "This run did not record where its settings came from."
    return (
        Table(("Setting", "Value", "From"), tuple(chosen), note=note) if chosen else None,
        Table(("Setting", "Default"), tuple(left)) if left else None,
    )


def flat(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Dotted settings with their values as text; what looks like a secret is hidden."""
    found: list[tuple[str, str]] = []
    for section, table in config.items():
        if isinstance(table, dict):
            found += [
                (f"{section}.{key}", _value(value, f"{section}.{key}"))
                for key, value in cast("dict[str, Any]", table).items()
            ]
        else:
            found.append((section, _value(table, section)))
    return found


def _value(value: Any, name: str) -> str:
    # The loader refuses these, and a run of an earlier version may hold one all the same.
    if secrets((name,), value, known=True):
        return "hidden: it holds what looks like a secret"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, float):
        return repr(value)
    return json.dumps(value, ensure_ascii=False, default=str)


def machine(data: RunData) -> Table | None:
    """Versions, device, code and digests, as the run recorded them."""
    rows = tuple(
        (key.replace("_", " "), str(value))
        for key, value in _recorded(data).items()
        if value not in ("", None)
    )
    return Table(("Recorded", "Value"), rows) if rows else None


def _recorded(data: RunData) -> dict[str, Any]:
    """The flat facts of run.json: one value each."""
    found: Any = data.facts.get("facts")
    if not isinstance(found, dict):
        return {}
    facts = cast("dict[str, Any]", found)
    return {key: value for key, value in facts.items() if isinstance(value, str | int | float)}


def resumes(data: RunData) -> Table | None:
    """Every continuation of the run, and whether it is byte-exact."""
    rows = tuple((f"{r.step:,}", r.when, r.exact or "not recorded") for r in data.events.resumes)
    return Table(("After steps", "When (local)", "Byte-exact"), rows, frozenset({0})) if rows else None


def warnings(data: RunData) -> Table | None:
    """Warnings of events.log, each once."""
    rows = tuple((str(count), message) for message, count in data.events.warnings.most_common())
    return Table(("Times", "Warning"), rows, frozenset({0})) if rows else None


def several(runs: Sequence[RunData]) -> Table:
    """One row a run."""
    rows: list[tuple[str, ...]] = []
    for run, label in zip(runs, labels(runs), strict=True):
        known = [found for row in run.evaluations if (found := run.accuracy(row)) is not None]
        rate = run.curve("correct_rate")
        ill = [line.vital.title for line in run.vitals if line.ill]
        rows.append((
            label, run.condition or "n/a", str(run.setting("training.seed")), run.state,
            f"{run.done:,}" + (f" of {run.max_steps:,}" if run.max_steps is not None else ""),
            f"{known[0][0]:.1%}" if known else "n/a", f"{known[-1][0]:.1%}" if known else "n/a",
            interval(known[-1], label="") if known else "n/a",
            number(known_mean(rate[-max(1, len(rate) // 10) :]), share=True) if rate is not None else "n/a",
            clock(run.seconds), ", ".join(ill) or "none",
        ))  # fmt: skip
    columns = (
        "Run", "Condition", "Seed", "Status", "Steps", "First evaluation", "Last evaluation", "95 % interval",
        "Correct rate, last tenth", "Time", "Alarms now",
    )  # fmt: skip
    return Table(columns, tuple(rows), frozenset({2, 4, 5, 6, 7, 8, 9}))


def differing(runs: Sequence[RunData]) -> Table | None:
    """Settings that are not the same in all runs; where a run writes is left out."""
    settings = [dict(flat(run.config)) for run in runs]
    names = dict.fromkeys(name for one in settings for name in one if name != "logging.log_dir")
    rows = [
        (name, *(one.get(name, "unset") for one in settings))
        for name in names
        if len({one.get(name) for one in settings}) > 1
    ]
    return Table(("Setting", *labels(runs)), tuple(rows)) if rows else None


def _share(value: Any) -> str:
    return f"{value:.1%}" if isinstance(value, int | float) else "n/a"


def _plain(value: Any) -> str:
    return number(float(value)) if isinstance(value, int | float) else "n/a"
