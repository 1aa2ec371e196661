"""Tasks that reasoning_gym (2505.24760) generates: any of its generators, alone or weighted, without a file."""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import json
import logging
import os
import subprocess
import sys
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

from retrain.environments.reading import DataSettings, prompt
from retrain.environments.shares import Shares
from retrain.errors import DataError
from retrain.types import Task

log = logging.getLogger("retrain")

INSTRUCTION = "Give the final answer inside \\boxed{}, in the form that the question asks for."
"""What follows a generated question where ``data.instruction`` does not say otherwise."""

_ATTEMPTS = 4
"""Indices that are tried per wanted task, because questions repeat where a generator has few."""

_PASSED_ON = ("PATH", "HOME", "PYTHONPATH", "LANG", "LC_ALL", "TMPDIR", "VIRTUAL_ENV", "SYSTEMROOT")


def reasoning_gym(data: DataSettings, split: str) -> list[Task]:
    """``data.size`` tasks of ``data.generators``, shared out by their weights; any name is a split of its own.

    No question stands twice in a split, and none of ``train`` (of the same settings) stands in another one.
    Where a generator has fewer, so has the source, and says so. ``info["recipe"]`` (generator, config, index)
    makes the task again: ``create_dataset(generator, **config)[index]`` in a process with PYTHONHASHSEED=0.
    ``info["entry"]`` is what it made, as far as JSON carries it (tuples are lists there). The reference is the
    generator's answer, "" where it has none and only its scorer can tell. DataError for unknown generators and
    settings, and where the package is missing.
    """
    names, plans = _plans(data)
    train = _generated(_request(plans, data.seed, "train", {}))
    made = train
    if split != "train":
        questions = {
            name: [e["question"] for e in entries] for name, entries in zip(names, train, strict=True)
        }
        made = _generated(_request(plans, data.seed, split, questions))
    for (name, _config, count), entries in zip(plans, made, strict=True):
        if len(entries) < count:
            log.warning(
                "reasoning_gym: %s has %d questions for the split %s instead of %d: the others repeat%s.",
                name,
                len(entries),
                split,
                count,
                "" if split == "train" else " or are training tasks",
            )
    left = {name: iter(entries) for name, entries in zip(names, made, strict=True)}
    configs = {name: _config_of(config, count, data.seed, name, split) for name, config, count in plans}
    tasks: list[Task] = []
    for name in _order(data):
        entry = next(left[name], None)
        if entry is None:
            continue
        index, answer = entry["index"], entry["answer"]
        tasks.append(
            Task(
                id=f"reasoning_gym/{split}/{name}/{index}",
                # Not stripped: in a drawing of characters the leading blanks count.
                messages=prompt(data, entry["question"], INSTRUCTION, "\n"),
                reference="" if answer is None else str(answer),
                source="reasoning_gym",
                draw=0,
                info={
                    "recipe": {"generator": name, "config": configs[name], "index": index},
                    "entry": {key: entry[key] for key in ("question", "answer", "metadata")},
                },
            )
        )
    if not tasks:
        raise DataError(
            f"reasoning_gym ({', '.join(names)}): every question of the split {split} is a training task.",
            fix="lower data.size, or give the generators settings that allow more questions.",
        )
    return tasks


def _plans(data: DataSettings) -> tuple[list[str], list[tuple[str, dict[str, Any], int]]]:
    """The generators' names, and each with its own settings and number of tasks."""
    if not data.generators:
        raise DataError(
            'data.source = "reasoning_gym" needs data.generators.',
            fix="name one or several: generators = { chain_sum = { weight = 1.0, max_terms = 3 } }.",
        )
    configs: dict[str, dict[str, Any]] = {}
    for name, table in data.generators.items():
        if not isinstance(table, Mapping):
            raise DataError(
                f"data.generators.{name} is {table!r}, not a table of its settings.",
                fix=f"write generators = {{ {name} = {{}} }}.",
            )
        configs[name] = {k: v for k, v in cast("Mapping[str, Any]", table).items() if k != "weight"}
        for key in ("seed", "size"):
            if key in configs[name]:
                raise DataError(
                    f"data.generators.{name}.{key} is not the generator's own here.", fix=f"set data.{key}."
                )
    order = _order(data)
    return list(configs), [(name, config, order.count(name)) for name, config in configs.items()]


def _order(data: DataSettings) -> list[str]:
    """The generator of every task, in exact proportions."""
    weights: list[float] = []
    for name, table in data.generators.items():
        weight = table.get("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < 1e6:
            raise DataError(f"data.generators.{name}.weight is {weight!r}.", fix="use a number above 0.")
        weights.append(weight)
    shares, names = Shares(weights), list(data.generators)
    return [names[shares.next()] for _ in range(data.size)]


def _config_of(config: Mapping[str, Any], count: int, seed: int, name: str, split: str) -> dict[str, Any]:
    # Generators seed entry i with seed + i, so neighbouring seeds share entries: hashes keep splits apart.
    key = hashlib.blake2b(f"{seed} {name} {split}".encode(), digest_size=4).digest()
    return {**config, "seed": int.from_bytes(key, "big") >> 1, "size": _ATTEMPTS * count + 32}


def _request(
    plans: list[tuple[str, dict[str, Any], int]], seed: int, split: str, avoid: Mapping[str, list[str]]
) -> str:
    return json.dumps(
        [
            {
                "generator": name,
                "config": _config_of(config, count, seed, name, split),
                "count": count,
                "avoid": avoid.get(name, []),
            }
            for name, config, count in plans
        ],
        sort_keys=True,
        default=str,
    )


@lru_cache(maxsize=8)
def _generated(request: str) -> list[list[dict[str, Any]]]:
    """The entries of every spec of a request, made in a child with a fixed hash seed."""
    if importlib.util.find_spec("reasoning_gym") is None:
        raise DataError(
            'data.source = "reasoning_gym" needs the package reasoning-gym, which is not installed.',
            fix='pip install "retrain[tasks]".',
        )
    specs = json.loads(request)
    log.info("Generating tasks: %s ...", ", ".join(f"{s['count']} {s['generator']}" for s in specs))
    kept = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("procedural_child.py"))],
        input=request,
        env={**kept, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    if done.returncode:
        reason = done.stderr.strip().rpartition("\n")[2] or f"its process ended with {done.returncode}"
        raise DataError(f"reasoning_gym failed: {reason}.", fix="choose other generators or settings.")
    answers = cast("list[dict[str, Any]]", json.loads(done.stdout))
    for spec, answer in zip(specs, answers, strict=True):
        _refuse(spec["generator"], answer)
    return [answer["entries"] for answer in answers]


def _refuse(name: str, answer: Mapping[str, Any]) -> None:
    if "unknown" in answer:
        near = _near(name, answer["unknown"])
        raise DataError(
            f"data.generators: reasoning_gym has no generator {name!r}.",
            fix=f"did you mean {near!r}?" if near else f"it has {', '.join(answer['unknown'])}.",
        )
    if "key" in answer:
        near = _near(answer["key"], answer["known"])
        raise DataError(
            f"data.generators.{name} has no setting {answer['key']!r}.",
            fix=f"did you mean {near!r}?" if near else f"it has {', '.join(answer['known'])}.",
        )
    if "invalid" in answer:
        raise DataError(f"data.generators.{name}: {answer['invalid']}.", fix="correct its settings.")


def _near(name: str, known: list[str]) -> str:
    return next(iter(difflib.get_close_matches(name, known, n=1)), "")
