"""Where tasks come from: the embedded arithmetic, JSONL files and GSM8K, and the cursor that deals them out.

A source is a function ``(data, split) -> list[Task]``; a plug-in adds one by its dotted path.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, Protocol, cast

import numpy as np

from retrain import plugins
from retrain.environments.arithmetic import LEVELS, SPLITS, TINY_INSTRUCTION, problems
from retrain.errors import DataError, PluginError, ResumeError
from retrain.protocols import State
from retrain.types import Message, Task

log = logging.getLogger("retrain")

DEFAULT_INSTRUCTION = "Reason step by step, then give the final answer inside \\boxed{}."
"""What follows a problem where neither ``data.instruction`` nor the source says otherwise."""


class DataSettings(Protocol):
    """What a source reads from [data] (or from [eval] laid over it)."""

    @property
    def source(self) -> str:
        """Name of the source."""
        ...

    @property
    def path(self) -> str:
        """Local file or folder, "" for none."""
        ...

    @property
    def levels(self) -> Sequence[int]:
        """Levels of the arithmetic source."""
        ...

    @property
    def fields(self) -> Mapping[str, str]:
        """question, answer, id -> the file's own names."""
        ...

    @property
    def instruction(self) -> str:
        """Text after each problem, "" for the source's own."""
        ...

    @property
    def system(self) -> str:
        """System message, "" for none."""
        ...


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
            messages=_prompt(data, problem.question, TINY_INSTRUCTION, "\n"),
            reference=problem.answer,
            source="arithmetic",
            draw=0,
            info={"level": problem.level},
        )
        for problem in problems(data.levels, split)
    ]


def jsonl(data: DataSettings, split: str) -> list[Task]:
    """One task per line of ``data.path``, a file, or a folder that holds ``<split>.jsonl``.

    ``data.fields`` maps question, answer and id to the file's names. Answers may be texts or numbers; rows
    with an empty answer are dropped and counted. Other fields travel in ``Task.info``. DataError with file
    and line for anything else.
    """
    if not data.path:
        raise DataError('data.source = "jsonl" needs a file.', fix='set data.path = "problems.jsonl".')
    unknown = [key for key in data.fields if key not in ("question", "answer", "id")]
    if unknown:
        raise DataError(f"data.fields.{unknown[0]} means nothing.", fix="use question, answer and id.")
    names = {"question": "question", "answer": "answer", "id": "id"} | dict(data.fields)
    tasks: list[Task] = []
    dropped: list[int] = []
    where_id: dict[str, int] = {}
    path = _split_file(data.path, split)
    for line, row in _rows(path):
        for ours in ("question", "answer", *(["id"] if "id" in data.fields else [])):
            if names[ours] not in row:
                present = ", ".join(map(repr, row)) or "none"
                raise DataError(
                    f"{path}:{line}: no field {names[ours]!r} for the {ours}; the row has {present}.",
                    fix=f'name it: data.fields = {{ {ours} = "..." }}.',
                )
        question, answer = row[names["question"]], _as_text(row[names["answer"]])
        if not isinstance(question, str) or not question.strip():
            _wrong(path, line, names["question"], question, "a text that is not empty")
        if answer is None:
            _wrong(path, line, names["answer"], row[names["answer"]], "a text or a number")
        if not answer.strip():
            dropped.append(line)
            continue
        key = str(len(where_id) + len(dropped))
        if names["id"] in row:
            found = _as_text(row[names["id"]])
            if not found:
                _wrong(path, line, names["id"], row[names["id"]], "a text or a number")
            key = found
        if key in where_id:
            raise DataError(
                f"{path}:{line}: the id {key!r} is already that of line {where_id[key]}.",
                fix="make ids unique, or map data.fields.id to a field that is.",
            )
        where_id[key] = line
        tasks.append(
            Task(
                id=f"jsonl/{split}/{key}",
                messages=_prompt(data, question, DEFAULT_INSTRUCTION, "\n\n"),
                reference=answer,
                source="jsonl",
                draw=0,
                info={k: v for k, v in row.items() if k not in (names["question"], names["answer"])},
            )
        )
    _report_dropped(str(path), dropped)
    return _not_empty(tasks, str(path))


def gsm8k(data: DataSettings, split: str) -> list[Task]:
    """GSM8K, ``train`` (7,473) or ``test`` (1,319), with the number after ``####`` as the reference.

    Read from ``data.path`` (a file, or a folder that holds ``<split>.jsonl`` in OpenAI's layout), else from
    Hugging Face.
    """
    if data.path:
        path = _split_file(data.path, split)
        place, rows = str(path), ((f"{path}:{line}", row) for line, row in _rows(path))
    else:
        place, rows = "openai/gsm8k", _gsm8k_from_hub(split)
    tasks: list[Task] = []
    for index, (where, row) in enumerate(rows):
        question, answer = row.get("question"), row.get("answer")
        if not isinstance(question, str) or not isinstance(answer, str) or "####" not in answer:
            raise DataError(
                f'{where}: not a GSM8K row (a question, and an answer that ends in "#### N").',
                fix='use source = "jsonl" for other files.',
            )
        tasks.append(
            Task(
                id=f"gsm8k/{split}/{index}",
                messages=_prompt(data, question, DEFAULT_INSTRUCTION, "\n\n"),
                reference=answer.rpartition("####")[2].strip().replace(",", ""),
                source="gsm8k",
                draw=0,
                info={"solution": answer},
            )
        )
    return _not_empty(tasks, place)


def load_tasks(data: DataSettings, split: str, max_examples: int = 0) -> list[Task]:
    """Every task of ``data.source`` in ``split``, at most ``max_examples`` (0 = all), in the source's order.

    DataError for missing or malformed data; PluginError when a plug-in source returns something else than
    tasks with unique ids.
    """
    tasks = cast("object", plugins.load("source", data.source)(data, split))
    items = cast("list[object]", tasks) if isinstance(tasks, list) else None
    if items is None or not all(isinstance(task, Task) for task in items):
        raise PluginError(
            f"source {data.source!r} did not return a list of Task.", fix="correct the plug-in."
        )
    found = cast("list[Task]", items)
    _not_empty(found, f"data.source = {data.source!r}, split {split!r}")
    seen: set[str] = set()
    for task in found:
        if task.id in seen:
            raise PluginError(
                f"source {data.source!r} has two tasks {task.id!r}.", fix="make their ids unique."
            )
        seen.add(task.id)
    return found[:max_examples] if max_examples else found


class TaskCursor:
    """An endless, resumable TaskSource over a list of tasks.

    The order of an epoch is a function of ``seed`` and the epoch's number alone; without ``shuffle`` it is
    the list's own order. DataError when there is no task.
    """

    def __init__(self, tasks: Sequence[Task], *, seed: int, shuffle: bool) -> None:
        self._tasks = tuple(_not_empty(list(tasks), "the data"))
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


def _prompt(data: DataSettings, question: str, instruction: str, joint: str) -> tuple[Message, ...]:
    user = Message("user", question.strip() + joint + (data.instruction or instruction))
    return (Message("system", data.system), user) if data.system else (user,)


def _not_empty(tasks: list[Task], place: str) -> list[Task]:
    if not tasks:
        raise DataError(f"{place} holds no task.", fix="name a source, path or split that does.")
    return tasks


def _split_file(path: str, split: str) -> Path:
    try:
        place = Path(path).expanduser()
    except RuntimeError as error:
        raise DataError(
            f"data.path = {path!r}: there is no such home directory.", fix="write the path in full."
        ) from error
    # os.path answers False where Path raises: no permission, a name that is too long.
    if os.path.isdir(place):
        file = place / f"{split}.jsonl"
        if not os.path.isfile(file):
            held = ", ".join(sorted(p.name for p in place.glob("*.jsonl"))) or "no .jsonl file"
            raise DataError(
                f"{place} has no {split}.jsonl; it holds {held}.", fix="correct the split or the path."
            )
        return file
    if not os.path.isfile(place):
        raise DataError(f"data.path = {path!r}: there is no such file or folder.", fix="correct data.path.")
    return place


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is no JSON")

    try:
        with path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line, parse_constant=refuse)
                    if "\\u" in line:
                        json.dumps(row, ensure_ascii=False).encode()
                except UnicodeEncodeError as error:
                    # JSON can spell half a character; a tokenizer or a log would fail on it hours later.
                    half = f"\\u{ord(error.object[error.start]):04x}"
                    raise DataError(
                        f"{path}:{number}: {half} is half of a surrogate pair and no character.",
                        fix="correct the line.",
                    ) from error
                except (ValueError, RecursionError) as error:
                    raise DataError(
                        f"{path}:{number}: invalid JSON: {error}.", fix="correct the line."
                    ) from error
                if not isinstance(row, dict):
                    raise DataError(f"{path}:{number}: not a JSON object.", fix="write one {...} per line.")
                yield number, cast("dict[str, Any]", row)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: {error.reason}.", fix="save the file as UTF-8.") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.", fix="check its permissions.") from error


def _as_text(value: object) -> str | None:
    """A reference as text: null is empty, None for what is neither text nor number."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    return str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _wrong(path: Path, line: int, field: str, value: object, wanted: str) -> NoReturn:
    shown = json.dumps(value)
    shown = shown if len(shown) <= 40 else shown[:37] + "..."
    raise DataError(f"{path}:{line}: field {field!r} is {shown}, not {wanted}.", fix="correct the line.")


def _report_dropped(place: str, lines: Sequence[int]) -> None:
    if lines:
        shown = ", ".join(map(str, lines[:5])) + (", ..." if len(lines) > 5 else "")
        rows = "row" if len(lines) == 1 else "rows"
        log.warning("%s: dropped %d %s without an answer (line %s).", place, len(lines), rows, shown)


def _gsm8k_from_hub(split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if split not in ("train", "test"):
        raise DataError(f"gsm8k has no split {split!r}.", fix="use train or test.")
    fix = "connect once to download it, or set data.path to a folder with train.jsonl and test.jsonl."
    try:
        from datasets import load_dataset  # pyright: ignore[reportMissingTypeStubs, reportUnknownVariableType]
    except ImportError as error:
        raise DataError(
            "gsm8k without data.path needs the package datasets, which is not installed.",
            fix='pip install "retrain[local]", or set data.path.',
        ) from error
    try:
        rows = cast("Any", load_dataset)("openai/gsm8k", "main", split=split)
    except Exception as error:  # the download fails with the exception types of several HTTP libraries
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise DataError(f"gsm8k cannot be loaded from Hugging Face: {reason}", fix=fix) from error
    for index, row in enumerate(rows):
        yield f"openai/gsm8k {split} row {index}", dict(row)
