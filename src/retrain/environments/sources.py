"""Where tasks come from: the embedded arithmetic and JSONL files, and the cursor that deals tasks out.

A source is a function ``(data, split) -> list[Task]``; a plug-in adds one by its dotted path.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import numpy as np

from retrain import plugins
from retrain.environments.arithmetic import LEVELS, SPLITS, TINY_INSTRUCTION, problems
from retrain.environments.reading import DataSettings, not_empty, prompt, row_tasks, rows, split_file
from retrain.errors import DataError, PluginError, ResumeError
from retrain.protocols import State
from retrain.types import Task


def arithmetic(data: DataSettings, split: str) -> list[Task]:
    """The embedded problems of ``data.levels``; splits train, validation and test never overlap."""
    for level in data.levels:
        if level not in LEVELS:
            known = ", ".join(map(str, LEVELS))
            raise DataError(f"data.levels: the arithmetic source has no level {level}.", fix=f"use {known}.")
    if not data.levels:
        raise DataError("data.levels is empty.", fix="name at least one level, such as [2].")
    if split not in SPLITS:
        raise DataError(f"the arithmetic source has no split {split!r}.", fix=f"use {', '.join(SPLITS)}.")
    # One newline, because the embedded model was pre-trained on that form.
    return [
        Task(
            id=f"arithmetic/{split}/{problem.id}",
            messages=prompt(data, problem.question, TINY_INSTRUCTION, "\n"),
            reference=problem.answer,
            source="arithmetic",
            draw=0,
            info={"level": problem.level},
        )
        for problem in problems(data.levels, split)
    ]


def jsonl(data: DataSettings, split: str) -> list[Task]:
    """One task per line of ``data.path``, a file, or a folder that holds ``<split>.jsonl``.

    ``data.fields`` maps question, answer and id to the file's names; see ``reading.row_tasks``.
    """
    if not data.path:
        raise DataError('data.source = "jsonl" needs a file.', fix='set data.path = "problems.jsonl".')
    path = split_file(data.path, split)
    return row_tasks(data, split, rows(path), str(path))


def load_tasks(data: DataSettings, split: str, max_examples: int = 0) -> list[Task]:
    """Every task of ``data.source`` in ``split``, at most ``max_examples`` (0 = all), in the source's order.

    ``Task.source`` is ``data.source`` whatever a plug-in says, for rewards and curves go by it; only the tasks of a
    mixture keep their tables' names.
    DataError for missing or malformed data; PluginError when a plug-in source returns something else than
    tasks with unique ids.
    """
    tasks = cast("object", plugins.make("source", data.source, data, split))
    items = cast("list[object]", tasks) if isinstance(tasks, list) else None
    if items is None or not all(isinstance(task, Task) for task in items):
        raise PluginError(
            f"source {data.source!r} did not return a list of Task.", fix="correct the plug-in."
        )
    found = cast("list[Task]", items)
    not_empty(found, f"data.source = {data.source!r}, split {split!r}")
    seen: set[str] = set()
    for task in found:
        if task.id in seen:
            raise PluginError(
                f"source {data.source!r} has two tasks {task.id!r}.", fix="make their ids unique."
            )
        seen.add(task.id)
    found = found[:max_examples] if max_examples else found
    if data.source == "mixture":
        return found
    return [t if t.source == data.source else replace(t, source=data.source) for t in found]


class TaskCursor:
    """An endless, resumable TaskSource over a list of tasks.

    The order of an epoch is a function of ``seed`` and the epoch's number alone; without ``shuffle`` it is
    the list's own order. DataError when there is no task.
    """

    def __init__(self, tasks: Sequence[Task], *, seed: int, shuffle: bool) -> None:
        self._tasks = tuple(not_empty(list(tasks), "the data"))
        self._seed = seed
        self._shuffle = shuffle
        self._draw = 0
        self._order: tuple[int, list[int]] = (-1, [])
        self._digest = digest_of(self._tasks)

    def __len__(self) -> int:
        return len(self._tasks)

    @property
    def digest(self) -> str:
        """sha256 over every task's id, messages, reference and info, in the list's order."""
        return self._digest

    def take(self, n: int) -> list[Task]:
        """The next ``n`` tasks, each with its running draw number; epochs follow each other without a gap."""
        if n < 0:
            raise ValueError(f"cannot take {n} tasks")
        taken: list[Task] = []
        for draw in range(self._draw, self._draw + n):
            epoch, position = divmod(draw, len(self._tasks))
            taken.append(replace(self._tasks[self._epoch_order(epoch)[position]], draw=draw))
        self._draw += n
        return taken

    def state_dict(self) -> State:
        """The next draw number, and what it is a position in."""
        return {"draw": self._draw, "seed": self._seed, "shuffle": self._shuffle, "tasks": self._digest}

    def load_state_dict(self, state: State) -> None:
        """Continue at a stored position; ResumeError when the tasks or their order are others."""
        if state["tasks"] != self._digest:
            raise ResumeError(
                "the tasks are not those of the checkpoint (ids, prompts or answers differ).",
                fix="restore the data file and [data] as they were, or start a new run.",
            )
        if (state["seed"], state["shuffle"]) != (self._seed, self._shuffle):
            raise ResumeError(
                f"the checkpoint's tasks are ordered by seed {state['seed']}, shuffle {state['shuffle']}.",
                fix="set training.seed and data.shuffle as they were, or start a new run.",
            )
        self._draw = int(state["draw"])

    def _epoch_order(self, epoch: int) -> list[int]:
        if self._order[0] != epoch:
            count = len(self._tasks)
            order = list(range(count))
            if self._shuffle:
                # Ranks of raw Philox words: numpy promises this stream, but not that of its permutation().
                key = np.array([self._seed % 2**64, epoch], dtype=np.uint64)
                order = np.argsort(np.random.Philox(key=key).random_raw(count), kind="stable").tolist()
            self._order = (epoch, order)
        return self._order[1]


def digest_of(tasks: Sequence[Task]) -> str:
    """sha256 over ids, messages, references and info; equal means the same tasks in the same order."""
    digest = hashlib.sha256()
    for task in tasks:
        row = [task.id, [[m.role, m.content] for m in task.messages], task.reference]
        # Info counts as well: custom rewards see it.
        info = json.dumps(dict(task.info), sort_keys=True, default=_steady)
        digest.update(json.dumps(row, ensure_ascii=True).encode() + info.encode() + b"\n")
    return digest.hexdigest()


def _steady(value: object) -> object:
    """What JSON lacks in a form that is the same in every process: no addresses, no order of a set."""
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, cast("set[object]", value)))
    return re.sub(r" at 0x[0-9a-fA-F]+", "", str(value))
