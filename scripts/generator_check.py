"""Loads every generator of reasoning_gym as a source and lets its scorer judge its own answers.

    python scripts/generator_check.py [--tasks 3] [--write docs/generators.md]

Each generator gives a few tasks through the source ``reasoning_gym``; in a process with another hash seed its scorer
must give the task's own reference 1, from the entry that the recipe makes there, or the one that the task carries.
Five generators know no answer and are scored by their own check only.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from retrain.config.schema import Data
from retrain.environments.sources import load_tasks


def names() -> list[str]:
    """Every generator but ``composite``, which only mixes the others."""
    factory = importlib.import_module("reasoning_gym.factory")
    return sorted(set(factory.DATASETS) - {"composite"})


def judge() -> None:
    """The child: tasks on stdin, for each the generator's score of its own reference."""
    score = importlib.import_module("retrain.rewards.generated_child").score
    answers, sys.stdout = sys.stdout, sys.stderr
    found: list[Any] = []
    for task in json.load(sys.stdin):
        try:
            found.append(score(task["reference"], task["reference"], task["info"]))
        except Exception as error:  # noqa: BLE001  whatever a generator raises is its verdict here
            found.append(f"{type(error).__name__}: {error}")
    json.dump(found, answers)


def check(generators: Sequence[str], tasks: int) -> dict[str, dict[str, Any]]:
    """Per generator: its ``tasks``, their ``scores``, and the ``verdict``: ok, no answer, or what went wrong."""
    data = Data(
        source="reasoning_gym", generators={name: {} for name in generators}, size=tasks * len(generators)
    )
    made: dict[str, dict[str, Any]] = {name: {"tasks": []} for name in generators}
    for task in load_tasks(data, "train"):
        made[task.info["recipe"]["generator"]]["tasks"].append(task)
    asked = [
        {"reference": t.reference, "info": dict(t.info)}
        for row in made.values()
        for t in row["tasks"]
        if t.reference
    ]
    done = subprocess.run(
        [sys.executable, __file__, "--judge"],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "77"},
    )
    scores = iter(json.loads(done.stdout))
    for row in made.values():
        row["scores"] = [next(scores) for t in row["tasks"] if t.reference]
        wrong = [s for s in row["scores"] if s != 1.0]
        row["verdict"] = (
            "no task"
            if len(row["tasks"]) < tasks
            else "no answer"
            if not row["scores"]
            else f"scored {wrong[0]}"
            if wrong
            else "ok"
        )
    return made


def page(found: dict[str, dict[str, Any]], tasks: int) -> str:
    """The report as a page."""
    ok = [n for n, row in found.items() if row["verdict"] == "ok"]
    none = [n for n, row in found.items() if row["verdict"] == "no answer"]
    bad = [f"- `{n}`: {row['verdict']}" for n, row in found.items() if n not in (*ok, *none)]
    return "\n".join(
        [
            "# Generators of reasoning_gym",
            "",
            f"Written by `scripts/generator_check.py` with reasoning-gym {metadata.version('reasoning-gym')}: "
            f"{tasks} tasks of each of {len(found)} generators, through the source `reasoning_gym`; the generator's "
            "scorer, in a process with another hash seed, judged each task's own reference.",
            "",
            f"- {len(ok)} load and give their own references 1.",
            f"- {len(none)} know no reference answer and are scored by their own check: {', '.join(f'`{n}`' for n in none)}.",
            f"- {len(bad)} fail." if bad else "- None fails.",
            *bad,
            "",
            "Names: " + ", ".join(f"`{n}`" for n in found) + ".",
            "",
        ]
    )


def main() -> None:
    """Check all, print the report, and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", type=int, default=3)
    parser.add_argument("--write", type=Path)
    parser.add_argument("--judge", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.judge:
        judge()
        return
    text = page(check(names(), arguments.tasks), arguments.tasks)
    print(text)
    if arguments.write:
        arguments.write.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
