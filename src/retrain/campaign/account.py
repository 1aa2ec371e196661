"""What a campaign's report accounts for besides its verdicts: every run, the declared design, tuning, settings, cost."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any, cast

from retrain.campaign import cautions, effects, manifest, words
from retrain.campaign import findings as found
from retrain.campaign.cautions import runs_of
from retrain.campaign.findings import Findings
from retrain.campaign.outcomes import RunOutcome, counts
from retrain.report.content import Table, flat
from retrain.report.figures import number
from retrain.report.gather import clock

_LISTED = 40
"""Runs that are listed by name; more of them are counted."""
_OF_A_RUN = ("training.seed", "training.max_steps")
"""Settings that the campaign gives each run; what its configuration says of them no run has."""


def states(campaign: Findings) -> Table:
    """Every run: a row for each seed, a column for each condition."""
    by_key = {(run.condition, run.seed): run for run in campaign.outcomes}
    labels = tuple(campaign.declared.conditions)
    extra = set(campaign.manifest.added)
    rows = tuple(
        (
            f"{seed}{' (added)' if seed in extra else ''}",
            *(cell(by_key[label, seed], campaign.declared.max_steps) for label in labels),
        )
        for seed in campaign.manifest.seeds
    )
    note = "A share is the outcome of a run that is done; * counts at its last evaluation."
    return Table(("Seed", *labels), rows, frozenset(), note)


def cell(run: RunOutcome, max_steps: int) -> str:
    """One run in a few characters."""
    value = "" if run.value is None else f"{run.value:.1%}{'*' if run.is_last else ''}"
    if run.state == "done":
        return value or "done, no outcome"
    if run.state == "waiting":
        return "waiting"
    return f"{run.state} at {run.step}/{max_steps}{f', {value}' if value else ''}"


def by_condition(campaign: Findings) -> Table:
    """How many runs of each condition are in which state."""
    names = list(counts(campaign.outcomes))
    rows = tuple(
        (label, *(str(counts(campaign.of(label)).get(name, 0)) for name in names), f"{_steps(campaign.of(label)):,}")
        for label in campaign.declared.conditions
    )
    return Table(("Condition", *names, "Steps done"), rows, frozenset(range(1, len(names) + 2)))


def failures(campaign: Findings) -> tuple[Table | None, str]:
    """Runs that did not come to their end, by name with the reason, and how to go on with them."""
    rows: list[tuple[str, ...]] = []
    for run in campaign.outcomes:
        process = campaign.processes.get(run.name)
        why = run.error or (process.why if process else "")
        if run.state in ("failed", "dead", "interrupted") or run.is_last or (run.state == "waiting" and why):
            counted = "nothing yet" if run.value is None else f"{run.value:.1%}" + (" (its last)" if run.is_last else "")
            rows.append((run.name, run.state, f"{run.step:,}", counted, why or "not recorded"))
    if not rows:
        return None, ""
    left = len(rows) - _LISTED
    note = f"{left} more are left out here; --json has all." if left > 0 else ""
    advice = (
        "A failed run counts at its last evaluation and is never dropped. To go on with what is not done (each run resumes "
        f"exactly, and nothing is repeated): retrain --resume {shlex.quote(str(campaign.directory))}"
    )
    return Table(("Run", "State", "Steps", "Counts as", "Why"), tuple(rows[:_LISTED]), frozenset({2}), note), advice


def cost(campaign: Findings) -> Table:
    """Time, processor time, memory and tokens by condition."""
    rows: list[tuple[str, ...]] = []
    for label in (*campaign.declared.conditions, ""):
        runs = campaign.of(label) if label else list(campaign.outcomes)
        told = [campaign.processes[run.name] for run in runs if run.name in campaign.processes]
        seconds = [run.seconds for run in runs if run.seconds is not None]
        begun = sum(run.state != "waiting" for run in runs)
        tokens = words.total(run.tokens for run in runs)
        rows.append((
            label or "All", str(begun), clock(sum(seconds)), clock(sum(seconds) / len(seconds)) if seconds else "n/a",
            f"{tokens:,.0f}", clock(sum(p.cpu_s for p in told)) if told else "n/a",
            f"{max(p.peak_bytes for p in told) / 2**30:.2f} GB" if told else "n/a",
            str(sum(p.starts for p in told)) if told else "n/a",
        ))  # fmt: skip
    columns = (
        "Condition", "Runs begun", "Time", "Time of a run", "Tokens sampled", "Processor time", "Most memory", "Starts",
    )  # fmt: skip
    return Table(columns, tuple(rows), frozenset(range(1, 8)), "Without the trials that chose a setting.")


def design(campaign: Findings) -> Table:
    """What was fixed before the first run."""
    declared = campaign.declared
    tasks = declared.evaluation
    held = ", ".join(f"{k} {v}" for k, v in tasks.items() if k != "digest" and v not in ("", None))
    rows = [
        ("Declared", declared.created),
        ("Conditions", ", ".join(declared.conditions)),
        ("Baseline", declared.baseline),
        ("Seeds", ", ".join(map(str, declared.seeds))),
        ("Steps of a run", f"{declared.max_steps:,}"),
        ("Primary outcome", f"{declared.outcome}, {words.outcome_note(campaign)}"),
        ("Evaluation", f"{held}; digest {tasks.get('digest')}" if tasks else "none: the correct rate of training is compared"),
        ("Test", words.test(campaign)),
        ("Alpha", f"{declared.alpha:g} over all comparisons and looks"),
        ("Smallest effect of interest", f"{words.points(declared.smallest_effect, sign=False)} points"),
        ("Looks", f"at {', '.join(map(str, declared.looks))} seeds"),
        ("Threshold", "none" if declared.threshold is None else f"{declared.threshold:.1%}"),
        ("Threads of a run", str(declared.threads)),
        ("Versions", ", ".join(f"{k} {v}" for k, v in declared.versions.items())),
        ("Digest of all this", manifest.digest(declared)),
        ("Seeds added since", ", ".join(map(str, campaign.manifest.added)) or "none"),
    ]
    return Table(("Declared", "Value"), tuple(rows))


def tuning(campaign: Findings) -> tuple[str, Table | None, Table | None]:
    """What was tuned, what each condition chose, and the trials."""
    tune = campaign.declared.tune
    if not tune:
        return (
            "Nothing was tuned: all conditions ran with the same settings but for what makes them conditions, so a comparison "
            "holds at these settings.",
            None,
            None,
        )
    field = str(tune.get("field", "a setting"))
    told = "; ".join(f"{k} {_listed(v)}" for k, v in tune.items() if k not in ("field", "digest", "evaluation"))
    tasks: Mapping[str, Any] = tune.get("evaluation") or {}
    if tasks:
        after = ", those after the evaluation's own" if tasks.get("skip") else ""
        told += f"; {tasks.get('tasks')} tasks of {tasks.get('source')}/{tasks.get('split')}{after}"
    chosen = campaign.manifest.chosen
    rows = tuple((label, _listed(chosen.get(label, "not chosen yet"))) for label in campaign.declared.conditions)
    text = (
        f"{field} was chosen for each condition on seeds and held-out tasks of its own, with the same budget for every "
        f"condition ({told})."
    )
    text = " ".join([text, *cautions.at_edge(campaign.declared, chosen)])
    return (
        text,
        Table(("Condition", f"{field}, chosen"), rows, frozenset({1})),
        _trials(campaign, field),
    )


def _trials(campaign: Findings, field: str) -> Table | None:
    """Every value of every condition with its trials' outcomes; of a design that does not say which, the trials by name."""
    if campaign.tried:
        seeds = campaign.tried[0].seeds
        rows = tuple(
            (
                each.condition,
                _listed(each.value),
                *(
                    state if value is None else f"{value:.1%}{'' if state == 'done' else '*'}"
                    for state, value in zip(each.states, each.outcomes, strict=True)
                ),
                "n/a" if each.mean is None else f"{each.mean:.1%}",
                words.share_interval(*found.interval([v or 0.0 for v in each.outcomes])) if each.mean is not None else "n/a",
                "chosen" if each.chosen else "",
            )
            for each in campaign.tried
        )
        note = (
            "Means over the evaluations of the last fifth of steps, on the trials' own tasks; * counts at its last evaluation, "
            "and what came to none as 0. Intervals are over the trials' seeds"
            + (", and one has none." if len(seeds) < 2 else "; where they overlap, more seeds might choose another value.")
        )
        columns = ("Condition", field, *(f"Seed {seed}" for seed in seeds), "Mean", "95 % interval", "")
        return Table(columns, rows, frozenset(range(1, len(seeds) + 4)), note)
    listed = tuple(
        (each.name, each.state, "n/a" if each.accuracy is None else number(each.accuracy, share=True)) for each in campaign.trials
    )
    return Table(("Trial", "State", "Last accuracy"), listed, frozenset({2})) if listed else None


def configurations(campaign: Findings) -> tuple[Table, Table | None]:
    """What differs between the conditions, with a dash where a condition does not use it, and what all runs share."""
    given = effects.settings(campaign.config, campaign.declared, campaign.manifest.chosen)
    arms = {label: dict(_dotted(one)) for label, one in given.items()}
    own = dict.fromkeys(name for settings in campaign.declared.conditions.values() for name, _ in _dotted(settings))
    own |= dict.fromkeys([str((campaign.declared.tune or {}).get("field", ""))])
    differ = [name for name in own if len({one.get(name) for one in arms.values()}) > 1]
    unused = {label: effects.unused(one) if differ else frozenset[str]() for label, one in given.items()}
    rows = tuple(
        (name, *("\u2013" if name in unused[label] else one.get(name, "as all") for label, one in arms.items()))
        for name in differ
    )
    shared = dict(flat({k: v for k, v in campaign.config.items() if k not in effects.OWN}))
    rest = tuple((name, value) for name, value in shared.items() if name not in differ and name not in _OF_A_RUN)
    note = "\u2013: the condition does not use it." if any("\u2013" in row for row in rows) else ""
    seeds, steps = len(campaign.manifest.seeds), campaign.declared.max_steps
    besides = f"Each run has its own training.seed ({seeds} seeds) and {steps:,} steps, as declared."
    return Table(("Setting", *arms), rows, note=note), Table(("Setting", "Value"), rest, note=besides) if rest else None


def versions(campaign: Findings) -> Table:
    """What the runs recorded of code, versions and machines, each value with the number of runs."""
    told: dict[str, dict[str, int]] = {}
    for reading in campaign.readings.values():
        for key, value in reading.facts.items():
            if value:
                told.setdefault(key, {})
                told[key][value] = told[key].get(value, 0) + 1
    rows = tuple(
        (
            key.replace("_", " "),
            "; ".join(f"{value}{f' ({runs_of(n)})' if len(values) > 1 else ''}" for value, n in values.items()),
        )
        for key, values in told.items()
        if len(values) <= _LISTED
    )
    return Table(("Recorded", "Value"), rows)


def _dotted(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    nested: dict[str, dict[str, Any]] = {}
    for key, value in settings.items():
        section, _, name = key.partition(".")
        nested.setdefault(section, {})[name] = value
    return flat(nested)


def _listed(value: Any) -> str:
    return ", ".join(map(str, cast("Sequence[Any]", value))) if isinstance(value, list | tuple) else str(value)


def _steps(runs: Sequence[RunOutcome]) -> int:
    return sum(run.step for run in runs)
