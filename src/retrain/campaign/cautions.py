"""What a reader of a campaign's report must know before believing it: what runs did otherwise than was declared, or than each
other, and which of them count for less than a whole run.
"""

from __future__ import annotations

import tomllib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from retrain.campaign.manifest import Declared, Manifest, settings_digest
from retrain.campaign.outcomes import RunOutcome
from retrain.campaign.reading import Reading
from retrain.errors import RetrainError
from retrain.tracking import layout

_SAME = {
    "retrain": "versions of retrain", "code": "states of the code", "plugins": "states of plug-ins",
    "reward_code": "states of the reward's code",
    "torch": "versions of torch", "transformers": "versions of transformers", "peft": "versions of peft",
    "device": "devices", "threads": "numbers of threads", "dtype": "number types", "machine": "machines",
    "weights": "weights of the model", "model_commit": "commits of the model", "tokenizer": "tokenizers",
    "train_tasks": "sets of training tasks",
}  # fmt: skip
"""What ought to be the same in all runs, as run.json names it, and in words."""
_MAY_BE_SET = {
    "dtype": ("model.", "inference."), "weights": ("model.",), "model_commit": ("model.",), "tokenizer": ("model.",),
    "reward_code": ("reward.", "environment."), "device": ("backend.",), "train_tasks": ("data.", "environment."),
    "plugins": ("",),
}  # fmt: skip
"""Of these what a condition may set itself: the settings that would change it. Then it is to be the same within each
condition. Any setting may name a plug-in."""
EVALUATION_TASKS = "eval_tasks"


def warnings(
    directory: Path, found: Manifest, runs: Sequence[RunOutcome], readings: Mapping[str, Reading]
) -> list[str]:
    """Every warning, those that touch what is compared first."""
    declared = found.declared
    said: list[str] = []
    if found.added:
        said.append(
            f"Seeds {', '.join(map(str, found.added))} were added to the {len(declared.seeds)} declared ones: whatever uses "
            "them is exploratory. The declared verdicts use the declared seeds alone."
        )
    planned = {run.name for run in runs}
    strange = sorted(
        path.name
        for path in _folders(directory / layout.CAMPAIGN_RUNS)
        if path.name not in planned and layout.holds_run(path)
    )
    if strange:
        said.append(
            f"{_names(strange)} in {layout.CAMPAIGN_RUNS}/ belong to no declared condition and seed: they count nowhere."
        )
    said += [*_steps(declared, runs), *_settings(declared, runs), *_tasks(declared, readings)]
    said += [*_ended(declared, runs), *_evaluations(declared, runs), *at_edge(declared, found.chosen)]
    conditions = {run.name: run.condition for run in runs}
    for key, words in _SAME.items():
        said += _same(declared, key, words, conditions, readings)
    threads = {used for reading in readings.values() if (used := reading.facts.get("threads"))}
    others = threads - {str(declared.threads)}
    if len(threads) == 1 and others:
        said.append(
            f"The runs used {others.pop()} threads, and {declared.threads} were declared: they repeat byte for byte only with "
            "the number that they used."
        )
    return said


def at_edge(declared: Declared, chosen: Mapping[str, Any]) -> list[str]:
    """Of conditions that chose the smallest or the largest value that was tried, numbers alone: the best may lie beyond."""
    tune: Mapping[str, Any] = declared.tune or {}
    values: list[Any] = list(tune.get("values", ()))
    if len(set(values)) < 2 or not all(_is_number(value) for value in values):
        return []
    said: list[str] = []
    for end, words, beyond in ((min(values), "smallest", "smaller"), (max(values), "largest", "larger")):
        if at := [label for label in declared.conditions if _is_number(value := chosen.get(label)) and value == end]:
            said.append(
                f"{_names(at)} chose {tune['field']} = {end:g}, the {words} of the values that were tried: {beyond} ones may be "
                f"better. Widen the list (campaign.tune) by {beyond} values in a new campaign."
            )
    return said


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def broken(runs: Sequence[RunOutcome], labels: Sequence[str]) -> str:
    """Which of the runs of these conditions count although they broke off, as sentences; "" where none does."""
    said: list[str] = []
    for label in labels:
        of = [run for run in runs if run.condition == label]
        off = [run for run in of if run.broke_off]
        if off:
            nothing = sum(not run.curve for run in off)
            at_last = len(off) - nothing
            counted = [f"{'they count' if at_last > 1 else 'it counts'} at {'their' if at_last > 1 else 'its'} last evaluation"]
            if nothing:
                counted = [f"{at_last} at the last evaluation"] * bool(at_last) + [f"{nothing} as 0 for want of one"]
                counted[0] = f"counted {counted[0]}"
            said.append(f"{len(off)} of {runs_of(len(of))} of {label} broke off; {', '.join(counted)}.")
    return " ".join(said)


def _steps(declared: Declared, runs: Sequence[RunOutcome]) -> list[str]:
    said: list[str] = []
    short = [run for run in runs if run.misfit and run.step < declared.max_steps]
    if short:
        said.append(
            f"{_at(short)} {'is' if len(short) == 1 else 'are'} done before the {declared.max_steps:,} declared steps: not "
            "finished, and without an outcome until the campaign goes on with --resume."
        )
    long = [run for run in runs if run.misfit and run.step > declared.max_steps]
    if long:
        said.append(
            f"{_at(long)} went on beyond the {declared.max_steps:,} declared steps: no run of this design, and without an "
            "outcome. Move the folder away, and the campaign's --resume runs it as declared."
        )
    return said


def _ended(declared: Declared, runs: Sequence[RunOutcome]) -> list[str]:
    """Of runs that broke off, and of those that were tried again after they had."""
    said: list[str] = []
    if text := broken(runs, tuple(declared.conditions)):
        said.append(
            f"{text} The campaign's --resume tries them again, which changes what a verdict is made of after it could be seen: "
            "do so before a look is complete, or not at all."
        )
    if untrained := [run for run in runs if run.broke_off and run.curve and run.curve[-1][0] == 0]:
        said.append(f"{_listed(untrained)} broke off before any evaluation of a trained model: the untrained one counts.")
    if nothing := [run for run in runs if run.broke_off and not run.curve]:
        said.append(
            f"{_listed(nothing)} ended abnormally again and again without a single evaluation, and "
            f"{'counts' if len(nothing) == 1 else 'count'} 0."
        )
    if again := [run for run in runs if run.state == "done" and run.retried]:
        said.append(
            f"{runs_of(len(again))} ended by an error of {'its' if len(again) == 1 else 'their'} own, and "
            f"{'was' if len(again) == 1 else 'were'} tried again until done: {_listed(again)}. If that was decided after "
            "outcomes could be seen, the verdicts are a second look that was not declared."
        )
    return said


def _evaluations(declared: Declared, runs: Sequence[RunOutcome]) -> list[str]:
    """Of evaluations that are about fewer tasks than declared, about none, or cannot be placed."""
    said: list[str] = []

    def by_condition(count: Callable[[RunOutcome], int], words: Callable[[int, list[RunOutcome]], str]) -> str:
        of = {label: [run for run in runs if run.condition == label] for label in declared.conditions}
        return "; ".join(
            f"{label} {words(n, [r for r in each if count(r)])}" for label, each in of.items() if (n := sum(map(count, each)))
        )

    lost = by_condition(
        lambda run: run.lost,
        lambda n, some: f"{n:,} of {sum(r.asked for r in some):,} in {runs_of(len(some))}",
    )
    if lost:
        said.append(
            f"Evaluations that count lost rollouts to errors: {lost}. Their accuracy is that of the others, so conditions may "
            "not have been judged on the same tasks."
        )
    null = by_condition(lambda run: run.null, lambda n, some: f"{n:,} in {runs_of(len(some))}")
    if null:
        said.append(f"Evaluations without an outcome, which count nowhere: {null}.")
    if nowhere := [run for run in runs if run.state == "done" and run.value is None]:
        said.append(
            f"{_listed(nowhere)} {'is' if len(nowhere) == 1 else 'are'} done without an outcome in the last steps, so no look "
            "with them can be read. Mend what kept the evaluation from an outcome, move the folder away, and the campaign's "
            "--resume runs it again."
        )
    if skipped := [run for run in runs if run.skipped]:
        said.append(
            f"{sum(run.skipped for run in skipped)} rows of {layout.METRICS} do not say at which step they were, and count "
            f"nowhere: {_listed(skipped)}."
        )
    return said


def _settings(declared: Declared, runs: Sequence[RunOutcome]) -> list[str]:
    """Of runs that were not configured as their condition and seed say."""
    tuned = str((declared.tune or {}).get("field", ""))
    digests: dict[str, str | None] = {}
    others: list[RunOutcome] = []
    foreign: list[str] = []
    for run in runs:
        text = _text(Path(run.path) / layout.CONFIG)
        if not text:
            continue
        seed, own = _own(text)
        if seed is not None and seed != run.seed:
            foreign.append(f"{run.name} (seed {seed})")
        wanted = declared.settings.get(run.condition)
        if wanted is None:
            continue
        # The runs of a condition differ in their own lines alone: each condition is loaded once.
        if own not in digests:
            digests[own] = _digest(text, tuned)
        if digests[own] not in (wanted, None):
            others.append(run)
    said: list[str] = []
    if foreign:
        said.append(
            f"{_names(foreign)} trained with another seed than the folder's name says, as a copied folder would. Move it away, "
            "and the campaign's --resume runs the declared one."
        )
    if others:
        said.append(
            f"{_listed(others)} ran with other settings than the manifest declares ({layout.CONFIG} in the run's folder). "
            f"{'Its outcome is' if len(others) == 1 else 'Their outcomes are'} not what was declared."
        )
    return said


def _digest(text: str, tuned: str) -> str | None:
    # Loading a configuration takes pydantic, which a look at a campaign has no need of.
    from retrain.config.load import load_config

    try:
        return settings_digest(load_config(tomllib.loads(text)), tuned)
    except (RetrainError, ValueError):
        # Of another version, or with a plug-in that is not there.
        return None


def _own(text: str) -> tuple[int | None, str]:
    """The seed of training that a run's configuration states, and its text without what is the run's own."""
    section, seed = "", None
    kept: list[str] = []
    for line in text.splitlines():
        name, _, value = (part.strip() for part in line.partition("="))
        if line.startswith("["):
            section = line.strip()
        if section == "[training]" and name == "seed" and value.lstrip("-").isdigit():
            seed = int(value)
        elif section != "[logging]":
            kept.append(line)
    return seed, "\n".join(kept)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""


def _tasks(declared: Declared, readings: Mapping[str, Reading]) -> list[str]:
    known = {name: tasks for name, reading in readings.items() if (tasks := reading.facts.get(EVALUATION_TASKS))}
    wanted = str(declared.evaluation.get("digest") or "")
    said: list[str] = []
    if len(set(known.values())) > 1:
        said.append(
            f"The runs were not evaluated on the same tasks: {len(set(known.values()))} different sets by digest. Their outcomes "
            "cannot be compared."
        )
    other = sorted(name for name, tasks in known.items() if wanted and tasks != wanted)
    if other:
        said.append(
            f"{_names(other)}: evaluated on other tasks than the manifest declares (digest {_value(wanted)}). Their outcomes are "
            "not what was declared."
        )
    return said


def _same(
    declared: Declared, key: str, words: str, conditions: Mapping[str, str], readings: Mapping[str, Reading]
) -> list[str]:
    """Of a recorded fact that is not the same in all runs, in those of a condition where conditions may set it, or not what
    it was when the design was declared."""
    of_runs = {name: value for name, reading in readings.items() if (value := reading.facts.get(key, ""))}
    sets = {name for settings in declared.conditions.values() for name in settings}
    if any(name.startswith(_MAY_BE_SET.get(key, ())) for name in sets):
        said: list[str] = []
        for label in declared.conditions:
            counted = Counter(value for name, value in of_runs.items() if conditions[name] == label)
            if len(counted) > 1:
                said.append(
                    f"The runs of {label} used {len(counted)} different {words}: {_told(counted)}. They do not repeat one "
                    "condition."
                )
        return said
    counted = Counter(of_runs.values())
    if len(counted) > 1:
        return [
            f"The runs used {len(counted)} different {words}: {_told(counted)}. A difference between conditions may be theirs."
        ]
    declaring = declared.versions.get(key, "")
    if counted and declaring and declaring not in counted:
        return [
            f"The runs used other {words} than the design was declared with: {_value(next(iter(counted)))}, declared "
            f"{_value(declaring)}."
        ]
    return []


def _told(counted: Counter[str]) -> str:
    return "; ".join(f"{_value(value)} ({runs_of(n)})" for value, n in counted.most_common(4))


def runs_of(count: int) -> str:
    """``1 run``, ``2 runs``."""
    return f"{count:,} run{'' if count == 1 else 's'}"


def _at(runs: Sequence[RunOutcome]) -> str:
    return _names([f"{run.name} (at step {run.step:,})" for run in runs])


def _listed(runs: Sequence[RunOutcome]) -> str:
    return _names([run.name for run in runs])


def _names(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _value(text: str) -> str:
    return f"{text[:16]}..." if len(text) > 40 else text


def _folders(root: Path) -> list[Path]:
    try:
        return [path for path in root.iterdir() if path.is_dir()]
    except OSError:
        return []
