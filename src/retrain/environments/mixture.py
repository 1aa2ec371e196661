"""Several sources in one run, in exact proportions: each with its own cursor, dealt by a rule without chance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from retrain.config.tables import MixtureTable, SourceTable
from retrain.environments.shares import Shares
from retrain.environments.sources import TaskCursor, load_tasks
from retrain.errors import DataError, ResumeError
from retrain.protocols import State, TaskSource
from retrain.types import Task

if TYPE_CHECKING:
    from retrain.config.schema import Config, Data


class MixtureCursor:
    """An endless, resumable TaskSource over several lists of tasks.

    The source of a draw is the one furthest behind its share; within a source the order is that of its own
    cursor, epochs included. Draw numbers run over all sources. DataError when a weight is not above 0.
    """

    def __init__(
        self, tasks: Mapping[str, Sequence[Task]], weights: Sequence[float], *, seed: int, shuffle: bool
    ) -> None:
        for label, weight in zip(tasks, weights, strict=True):
            if weight <= 0:
                raise DataError(
                    f"data.mixture: the weight of {label!r} is {weight:g}.",
                    fix="use one above 0, or leave it out.",
                )
        self.labels = tuple(tasks)
        self._weights = [float(w) for w in weights]
        self._shares = Shares(self._weights)
        self._cursors = [TaskCursor(group, seed=seed, shuffle=shuffle) for group in tasks.values()]

    def __len__(self) -> int:
        return sum(len(cursor) for cursor in self._cursors)

    def take(self, n: int) -> list[Task]:
        """The next ``n`` tasks, each with its running draw number over all sources."""
        if n < 0:
            raise ValueError(f"cannot take {n} tasks")
        first = sum(self._shares.counts)
        return [
            replace(self._cursors[self._shares.next()].take(1)[0], draw=draw)
            for draw in range(first, first + n)
        ]

    def state_dict(self) -> State:
        """How many draws each source has had, with each cursor's own state and the weights behind the counts."""
        return {
            "labels": list(self.labels),
            "weights": list(self._weights),
            "counts": list(self._shares.counts),
            "cursors": [cursor.state_dict() for cursor in self._cursors],
        }

    def load_state_dict(self, state: State) -> None:
        """Continue at a stored position; ResumeError when the sources, weights, tasks or order are others."""
        mine = {"labels": list(self.labels), "weights": list(self._weights)}
        if {key: state.get(key) for key in mine} != mine:
            raise ResumeError(
                f"the checkpoint's mixture is {state.get('labels')} with weights {state.get('weights')}, this one is "
                f"{mine['labels']} with {mine['weights']}.",
                fix="restore data.mixture as it was, or start a new run.",
            )
        for cursor, kept in zip(self._cursors, state["cursors"], strict=True):
            cursor.load_state_dict(kept)
        self._shares.counts[:] = [int(count) for count in state["counts"]]


def table_tasks(table: SourceTable, split: str, data: Data, place: str, max_examples: int = 0) -> list[Task]:
    """The tasks of one table under its own label, which is their source and begins their ids.

    What the table leaves empty of instruction and system message is that of [data]. ``place`` names the table in
    errors.
    """
    settings = table.model_copy(
        update={"instruction": table.instruction or data.instruction, "system": table.system or data.system}
    )
    try:
        found = load_tasks(settings, split, max_examples)
    except DataError as error:
        # The sources know one section; these settings come from a table.
        raise DataError(
            f"{place} {table.label!r}: {error.message.replace('data.', '')}",
            fix=error.fix.replace("data.", ""),
        ) from error
    prefix = f"{table.source}/"
    return [
        replace(task, id=f"{table.label}/{task.id.removeprefix(prefix)}", source=table.label)
        for task in found
    ]


def _tables(data: Data) -> list[MixtureTable]:
    if not data.mixture:
        raise DataError(
            'data.source = "mixture" needs data.mixture.',
            fix='add a table per source: [[data.mixture]] with source = "gsm8k" and weight = 1.0.',
        )
    return [MixtureTable.model_validate(table) for table in data.mixture]


def tasks(data: Any, split: str) -> list[Task]:
    """Every task of every source, one source after the other; each table has a split of its own."""
    return [
        task
        for table in _tables(data)
        for task in table_tasks(table, table.split, data, "data.mixture", table.max_examples)
    ]


def training_tasks(config: Config) -> tuple[list[Task], TaskSource]:
    """Every training task of a configuration, for checks, and the source that deals them out."""
    data, seed = config.data, config.training.seed
    if data.source != "mixture":
        found = load_tasks(data, data.split, config.training.max_examples)
        return found, TaskCursor(found, seed=seed, shuffle=data.shuffle)
    tables = _tables(data)
    by_label = {
        table.label: table_tasks(table, table.split, data, "data.mixture", table.max_examples)
        for table in tables
    }
    cursor = MixtureCursor(by_label, [table.weight for table in tables], seed=seed, shuffle=data.shuffle)
    return [task for group in by_label.values() for task in group], cursor
