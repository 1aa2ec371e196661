"""Two runs, configurations or folders of runs side by side: settings, code, data, results, and where they part."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

from retrain import plugins
from retrain.config.fields import settings
from retrain.config.idle import get, idle
from retrain.config.load import LoadedConfig, load
from retrain.config.schema import Config
from retrain.errors import UsageError
from retrain.tracking import layout
from retrain.tracking.intact import intact
from retrain.tracking.read import RunRecord, find_runs
from retrain.training.recredit import silent_settings

_ALWAYS_OWN = ("logging.log_dir", "resume.from")
"""Settings that two runs never share."""

_ANCHORED = ("plugins.search_paths",)
"""Settings that a run records as absolute paths."""

_GIVEN = (
    "condition",
    "advantage_mode",
    "transform_mode",
    "uncertainty_kind",
    "lr",
    "sepa_lambda",
    "sepa_gate_open",
)
"""Keys of metrics.jsonl that follow from the configuration and are no outcome."""

_POINTS = 8
"""Steps of a curve that are shown."""

_FACTS: Mapping[str, tuple[str, ...]] = {
    "code": ("retrain", "code", "git", "plugins", "reward_code"),
    "machine": ("machine", "device", "threads", "dtype", "deterministic", "python"),
    "data": ("train_tasks", "eval_tasks", "tokenizer", "weights", "model_commit", "planning", "schedule_steps"),
}
"""Facts of a run by what they are about; all others are versions of packages."""

_MEANING = {
    "retrain": "version",
    "code": "source digest",
    "plugins": "plug-ins' digests",
    "reward_code": "reward's digest",
    "train_tasks": "training tasks",
    "eval_tasks": "evaluation tasks",
    "weights": "base weights",
    "planning": "planning phrases",
    "schedule_steps": "end of the schedule",
}


@dataclass(frozen=True)
class Side:
    """One of the two: a run, a TOML file, or a folder of runs."""

    name: str
    kind: Literal["run", "config", "folder"]
    runs: tuple[RunRecord, ...] = ()

    @classmethod
    def of(cls, name: str) -> Side:
        """What a path names; UsageError where it is nothing that can be compared."""
        path = Path(name).expanduser()
        if path.is_file():
            return cls(name, "config")
        if not path.exists():
            raise UsageError(
                f"{name}: there is no such file or folder.",
                fix="name a run directory, a TOML file or a folder of runs.",
            )
        if layout.holds_run(path):
            return cls(name, "run", (intact(RunRecord.at(path)),))
        runs = tuple(intact(run) for run in find_runs(path))
        if not runs:
            raise UsageError(
                f"{name} holds no run.", fix="name a run directory, a TOML file or a folder of runs."
            )
        return cls(name, "folder", runs)

    @property
    def run(self) -> RunRecord | None:
        """The run, where it is one."""
        return self.runs[0] if self.kind == "run" else None

    @cached_property
    def loaded(self) -> LoadedConfig | None:
        """Its one configuration; None for a folder, and for a run without config.toml."""
        if self.kind == "folder":
            return None
        path = Path(self.name).expanduser() if self.kind == "config" else self.runs[0].path / layout.CONFIG
        return load(path) if path.is_file() else None

    @cached_property
    def configs(self) -> tuple[Config, ...]:
        """The configurations of everything in it."""
        return tuple(loaded.config for loaded in self.all_loaded)

    @cached_property
    def all_loaded(self) -> tuple[LoadedConfig, ...]:
        """The same with their origins."""
        if self.loaded is not None:
            return (self.loaded,)
        paths = [run.path / layout.CONFIG for run in self.runs]
        return tuple(load(path) for path in paths if path.is_file())

    def ignores(self, key: str) -> bool:
        """Does the setting do nothing in any of its configurations, by the code of their plug-ins too?"""
        for loaded in self.all_loaded:
            plugins.add_search_paths(loaded.search_paths)
        return all(key in silent_settings(config) for config in self.configs)

    def origin(self, key: str) -> str:
        """Where a setting's value came from, in words; "" where nothing recorded it."""
        if self.kind == "config":
            return self.loaded.origins[key].where if self.loaded is not None else ""
        if self.run is None:
            return ""
        recorded = self.run.facts.get("origins")
        found = cast("Mapping[str, Any]", recorded).get(key) if isinstance(recorded, Mapping) else None
        if isinstance(found, Mapping):
            found = cast("Mapping[str, Any]", found).get("where")
        return str(found) if found else ""


def difference(a: Side, b: Side) -> dict[str, Any]:
    """Everything that differs, as one JSON object.

    ``settings`` lists keys with both values; ``facts`` what the runs recorded of code, machine, packages and data;
    ``results`` is None unless both sides are runs, ``runs`` unless one of them is a folder. ``notes`` say what cannot be
    compared, and what cannot be concluded.
    """
    notes: list[str] = []
    record: dict[str, Any] = {
        "a": {"name": a.name, "kind": a.kind},
        "b": {"name": b.name, "kind": b.kind},
        "settings": _settings(a, b),
        "facts": _facts(a.run, b.run, notes) if a.run and b.run else [],
        "results": _results(a.run, b.run, notes) if a.run and b.run else None,
        "runs": [_members(s) for s in (a, b)] if "folder" in (a.kind, b.kind) and "config" not in (a.kind, b.kind) else None,
    }  # fmt: skip
    if record["runs"]:
        notes.append(
            "No verdict is given here: a difference between methods is tested over seeds that were fixed before the runs."
        )
    return {**record, "notes": notes}


def _settings(a: Side, b: Side) -> list[dict[str, Any]]:
    """Keys that differ; settings that do nothing on either side are left out."""
    silent = set(settings())
    for config in (*a.configs, *b.configs):
        silent &= set(idle(config))
    found: list[dict[str, Any]] = []
    for key in settings():
        if key in silent or key in _ALWAYS_OWN or (a.kind != b.kind and key in _ANCHORED):
            continue
        values = [_values(side.configs, key) for side in (a, b)]
        # A plug-in's code is asked only where its answer matters.
        if values[0] == values[1] or (key.startswith("sepa.") and all(side.ignores(key) for side in (a, b))):
            continue
        shown = [
            v[0] if len(v) == 1 and side.kind != "folder" else v
            for v, side in zip(values, (a, b), strict=True)
        ]
        found.append(
            {"key": key, "a": shown[0], "b": shown[1], "a_origin": a.origin(key), "b_origin": b.origin(key)}
        )
    return found


def _values(configs: Iterable[Config], key: str) -> list[Any]:
    """The different values of a setting, in the order of their text."""
    found: dict[str, Any] = {}
    for config in configs:
        value = cast("object", get(config, key))
        text = repr(value)
        found[text] = list(cast("Sequence[Any]", value)) if isinstance(value, tuple) else value
    return [found[text] for text in sorted(found)]


def _facts(a: RunRecord, b: RunRecord, notes: list[str]) -> list[dict[str, Any]]:
    recorded = [cast("Mapping[str, Any]", run.facts.get("facts") or {}) for run in (a, b)]
    for run, facts in zip((a, b), recorded, strict=True):
        if not facts:
            notes.append(f"{run.path} recorded nothing about code, versions and data.")
    if not all(recorded):
        return []
    kind_of = {key: kind for kind, keys in _FACTS.items() for key in keys}
    found: list[dict[str, Any]] = []
    for key in sorted({*recorded[0], *recorded[1]} - {"inexact"}):
        x, y = (facts.get(key) for facts in recorded)
        if x != y:
            kind = kind_of.get(key, "packages")
            found.append({"about": kind, "what": _MEANING.get(key, key), "key": key, "a": x, "b": y})
    order = ("code", "packages", "machine", "data")
    return sorted(found, key=lambda fact: order.index(fact["about"]))


def _results(a: RunRecord, b: RunRecord, notes: list[str]) -> dict[str, Any]:
    notes.append(
        "One run each: whatever differs here may be the seed. It is no evidence of a difference between methods."
    )
    return {
        "state": {"a": a.state, "b": b.state},
        "steps": {"a": len(a.steps), "b": len(b.steps)},
        "evaluations": _evaluations(a, b, notes),
        "curves": _curves(a, b),
        "diverged": divergence(a.rows, b.rows),
        "time": {"a": _time(a), "b": _time(b)},
    }


def prefixes(row: Mapping[str, Any]) -> list[str]:
    """The suites that an evaluation's row holds: ``eval``, ``eval/hard``."""
    return [key.removesuffix("/accuracy") for key in row if key.endswith("/accuracy")]


def _evaluations(a: RunRecord, b: RunRecord, notes: list[str]) -> list[dict[str, Any]]:
    """The last evaluation of each suite on both sides, and at the last step after which both were evaluated the
    difference, where both are of the same tasks."""
    last_a, last_b = (run.evaluations[-1] if run.evaluations else {} for run in (a, b))
    by_step = [{row["step"]: row for row in run.evaluations} for run in (a, b)]
    digests = [cast("Mapping[str, Any]", run.facts.get("facts") or {}).get("eval_tasks") for run in (a, b)]
    same = bool(digests[0]) and digests[0] == digests[1]
    found: list[dict[str, Any]] = []
    for prefix in dict.fromkeys([*prefixes(last_a), *prefixes(last_b)]):
        x, y = _accuracy(last_a, prefix), _accuracy(last_b, prefix)
        pairs = (
            (_accuracy(by_step[0][step], prefix), _accuracy(by_step[1][step], prefix))
            for step in sorted(by_step[0].keys() & by_step[1].keys(), reverse=True)
        )
        common = next(((m, n) for m, n in pairs if m and n), None)
        gap = _gap(*common) if same and common else None
        found.append(
            {
                "suite": prefix, "a": x, "b": y,
                "common": {"a": common[0], "b": common[1]} if common else None, "difference": gap,
            }
        )  # fmt: skip
    apart = next((e for e in found if e["a"] and e["b"] and e["a"]["step"] != e["b"]["step"]), None)
    if apart and same:
        common = apart["common"]
        so = f"compared are those after {common['a']['step']}" if common else "no step is common, so they are not compared"
        notes.append(f"The runs were last evaluated after {apart['a']['step']} and {apart['b']['step']} steps: {so}.")
    if last_a and last_b and not same:
        notes.append(
            "The runs were evaluated on different tasks (or did not record which): their accuracies are not compared."
        )
    elif any(entry["difference"] for entry in found):
        notes.append(
            "The interval of the difference follows from the two intervals as if they were independent; on the same tasks it "
            "is rather too wide. It speaks of these two policies, not of what made them."
        )
    return found


def _accuracy(row: Mapping[str, Any], prefix: str) -> dict[str, Any] | None:
    if row.get(f"{prefix}/accuracy") is None:
        return None
    return {
        "step": row["step"],
        "accuracy": row[f"{prefix}/accuracy"],
        "low": row.get(f"{prefix}/accuracy_low"),
        "high": row.get(f"{prefix}/accuracy_high"),
        "tasks": row.get(f"{prefix}/tasks"),
    }


def _gap(x: Mapping[str, Any], y: Mapping[str, Any]) -> dict[str, float] | None:
    """B minus A with an interval put together from the two (the squares of the arms add up)."""
    if None in (x["low"], x["high"], y["low"], y["high"]):
        return None
    d = y["accuracy"] - x["accuracy"]
    low = d - math.hypot(y["accuracy"] - y["low"], x["high"] - x["accuracy"])
    high = d + math.hypot(y["high"] - y["accuracy"], x["accuracy"] - x["low"])
    return {"value": d, "low": low, "high": high}


def _curves(a: RunRecord, b: RunRecord) -> list[dict[str, Any]]:
    """Reward and correct rate at a few steps that both have, the first and the last among them."""
    rows_a, rows_b = ({int(r["step"]): r for r in run.steps} for run in (a, b))
    common = sorted(rows_a.keys() & rows_b.keys())
    if len(common) > _POINTS:
        common = [common[round(i * (len(common) - 1) / (_POINTS - 1))] for i in range(_POINTS)]
    return [
        {
            "step": s,
            **{
                key: {"a": rows_a[s].get(key), "b": rows_b[s].get(key)}
                for key in ("mean_reward", "correct_rate")
            },
        }
        for s in common
    ]


def divergence(rows_a: Iterable[Mapping[str, Any]], rows_b: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Where two runs' numbers part: clock readings, and what only repeats the configuration (lr, lambda), are left out.

    ``identical``: how many rows at the start are equal (training steps and evaluations); ``step`` and ``evaluation`` say
    which row is the first that is not, None where all common rows are equal; ``values`` holds its keys that differ, in the
    order in which a step computes them.
    """
    by_place = [{(int(r["step"]), "condition" not in r): r for r in rows} for rows in (rows_a, rows_b)]
    # A step's evaluation comes before the step: both are counted by completed steps.
    common = sorted(by_place[0].keys() & by_place[1].keys(), key=lambda place: (place[0], not place[1]))
    for identical, place in enumerate(common):
        x, y = by_place[0][place], by_place[1][place]
        values = {
            key: {"a": x[key], "b": y[key]} for key in x if key in y and _counts(key) and x[key] != y[key]
        }
        if values:
            return {
                "identical": identical, "common": len(common), "step": place[0], "evaluation": place[1], "values": values,
            }  # fmt: skip
    return {
        "identical": len(common),
        "common": len(common),
        "step": None,
        "evaluation": False,
        "values": {},
    }


def _counts(key: str) -> bool:
    return not key.endswith("_s") and "per_second" not in key and key not in _GIVEN


def _time(run: RunRecord) -> dict[str, Any]:
    steps, evaluations = run.steps, run.evaluations

    def total(rows: Iterable[Mapping[str, Any]], key: str) -> float:
        return math.fsum(row.get(key) or 0.0 for row in rows)

    seconds, sampling = total(steps, "step_time_s"), total(steps, "sample_time_s")
    tokens = int(total(steps, "tokens_sampled"))
    return {
        "steps_s": seconds,
        "evaluations_s": total(evaluations, "eval/time_s"),
        "tokens": tokens,
        "tokens_per_second": tokens / sampling if sampling else None,
    }


def _members(side: Side) -> dict[str, Any]:
    """Every run of a folder with its last accuracy, and their mean by condition."""
    found: list[dict[str, Any]] = []
    for run in side.runs:
        last = run.evaluations[-1] if run.evaluations else {}
        row = run.steps[-1] if run.steps else {}
        path = run.path / layout.CONFIG
        found.append(
            {
                "run": str(run.path),
                "condition": row.get("condition"),
                "seed": load(path).config.training.seed if path.is_file() else None,
                "state": run.state,
                "steps": len(run.steps),
                "accuracy": last.get("eval/accuracy"),
            }
        )
    by_condition: dict[str, list[float]] = {}
    for entry in found:
        if entry["accuracy"] is not None:
            by_condition.setdefault(str(entry["condition"]), []).append(entry["accuracy"])
    means = {
        name: {"runs": len(values), "mean": statistics.fmean(values), "low": min(values), "high": max(values)}
        for name, values in sorted(by_condition.items())
    }
    return {"runs": found, "conditions": means}
