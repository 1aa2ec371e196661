"""What sources share: the rows of a file with their place, the fields of a row, prompts, and what is wrong by name."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, Protocol, cast

from retrain.errors import DataError
from retrain.types import Message, Task

log = logging.getLogger("retrain")

DEFAULT_INSTRUCTION = "Reason step by step, then give the final answer inside \\boxed{}."
"""What follows a problem where neither ``data.instruction`` nor the source says otherwise."""

FIELDS = ("question", "answer", "id")
"""Our fields of a row, which ``data.fields`` maps to the file's own."""

_ROLES = ("system", "user", "assistant", "tool")


class DataSettings(Protocol):
    """What a source reads from [data], from [eval] laid over it, or from a table of a mixture or a suite."""

    @property
    def source(self) -> str:
        """Name of the source."""
        ...

    @property
    def path(self) -> str:
        """Local file or folder, "" for none; for hf also an id on the Hub."""
        ...

    @property
    def subset(self) -> str:
        """Configuration of an hf data set, "" for its default."""
        ...

    @property
    def levels(self) -> Sequence[int]:
        """Levels of the arithmetic source."""
        ...

    @property
    def subjects(self) -> Sequence[str]:
        """Subjects of the math source, empty for its default."""
        ...

    @property
    def fields(self) -> Mapping[str, str]:
        """question, answer, id -> the file's own names."""
        ...

    @property
    def generators(self) -> Mapping[str, Any]:
        """Generators of reasoning_gym with their settings."""
        ...

    @property
    def size(self) -> int:
        """Number of generated tasks."""
        ...

    @property
    def seed(self) -> int:
        """Seed of generated tasks."""
        ...

    @property
    def instruction(self) -> str:
        """Text after each problem, "" for the source's own."""
        ...

    @property
    def system(self) -> str:
        """System message, "" for none."""
        ...


def prompt(data: DataSettings, question: str, instruction: str, joint: str) -> tuple[Message, ...]:
    """The messages of a question: the instruction follows it after ``joint``."""
    user = Message("user", question + joint + (data.instruction or instruction))
    return (Message("system", data.system), user) if data.system else (user,)


def not_empty(tasks: list[Task], place: str) -> list[Task]:
    """The tasks; DataError when there is none."""
    if not tasks:
        raise DataError(f"{place} holds no task.", fix="name a source, path or split that does.")
    return tasks


def existing(path: str) -> Path:
    """The file or folder that ``data.path`` names; DataError when there is none."""
    try:
        place = Path(path).expanduser()
    except RuntimeError as error:
        raise DataError(
            f"data.path = {path!r}: there is no such home directory.", fix="write the path in full."
        ) from error
    # os.path answers False where Path raises: no permission, a name that is too long.
    if not os.path.isdir(place) and not os.path.isfile(place):
        raise DataError(f"data.path = {path!r}: there is no such file or folder.", fix="correct data.path.")
    return place


def split_file(path: str, split: str, *, names: Sequence[str] = ("{split}.jsonl",)) -> Path:
    """The JSONL file of a split: ``path`` itself, or the first of ``names`` that the folder ``path`` holds."""
    place = existing(path)
    if not os.path.isdir(place):
        return place
    wanted = [name.format(split=split) for name in names]
    for name in wanted:
        if os.path.isfile(place / name):
            return place / name
    held = ", ".join(sorted(p.name for p in place.glob("*.jsonl"))) or "no .jsonl file"
    raise DataError(f"{place} has no {wanted[0]}; it holds {held}.", fix="correct the split or the path.")


def rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every object of a JSONL file with its place, ``file:line``; DataError for a line that is none."""

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
                yield f"{path}:{number}", cast("dict[str, Any]", row)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: {error.reason}.", fix="save the file as UTF-8.") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.", fix="check its permissions.") from error


_ABSENT = object()


def _at(row: Mapping[str, Any], name: str) -> object:
    """The value of a field; ``a.b`` looks inside ``a`` (in a list, a number counts from 0)."""
    if name in row:
        return row[name]
    value: object = row
    for part in name.split("."):
        if isinstance(value, Mapping) and part in value:
            value = cast("Mapping[str, object]", value)[part]
        elif isinstance(value, list) and part.isdigit() and int(part) < len(cast("list[object]", value)):
            value = cast("list[object]", value)[int(part)]
        else:
            return _ABSENT
    return value


def _names_of(row: Mapping[str, Any]) -> list[str]:
    """The names that ``data.fields`` could hold for this row, one level deep."""
    found: list[str] = []
    for name, value in row.items():
        found.append(name)
        if isinstance(value, Mapping):
            found += [f"{name}.{inner}" for inner in cast("Mapping[str, object]", value)]
    return found


def as_text(value: object) -> str | None:
    """A reference as text: null is empty, None for what is neither text nor number."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    return str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _wrong(where: str, field: str, value: object, wanted: str) -> NoReturn:
    shown = json.dumps(value, default=str)
    shown = shown if len(shown) <= 40 else shown[:37] + "..."
    raise DataError(
        f"{where}: field {field!r} is {shown}, not {wanted}.", fix="correct the row or data.fields."
    )


def _messages(
    data: DataSettings, where: str, field: str, question: object, default: str
) -> tuple[Message, ...]:
    """A text becomes one user message; a list of chat messages stays what it is, with the user's own instruction
    and system message only."""
    if isinstance(question, str) and question.strip():
        return prompt(data, question.strip(), default, "\n\n")
    wanted = "a text that is not empty, nor a list of chat messages"
    items = cast("list[object]", question) if isinstance(question, list) else []
    if not items:
        _wrong(where, field, cast("object", question), wanted)
    found: list[Message] = []
    for item in items:
        message: Mapping[str, object] = (
            cast("Mapping[str, object]", item) if isinstance(item, Mapping) else {}
        )
        role, content = message.get("role"), message.get("content")
        if role not in _ROLES or not isinstance(content, str):
            _wrong(
                where,
                field,
                cast("object", item),
                f"a message with a role ({', '.join(_ROLES)}) and a content",
            )
        found.append(Message(cast("str", role), content))
    if found[-1].role == "assistant":
        _wrong(where, field, items, "a conversation that ends before the assistant's answer")
    if data.instruction:
        found[-1] = Message(found[-1].role, f"{found[-1].content}\n\n{data.instruction}")
    if data.system:
        found = [Message("system", data.system), *(m for m in found if m.role != "system")]
    return tuple(found)


def row_tasks(
    data: DataSettings, split: str, placed: Iterable[tuple[str, dict[str, Any]]], place: str
) -> list[Task]:
    """One task per row of a source without a format of its own, under the names of ``data.fields``.

    Answers may be texts or numbers; rows with an empty answer are dropped and counted. What is not question or
    answer travels in ``Task.info``. DataError with the row's place for anything else.
    """
    unknown = [key for key in data.fields if key not in FIELDS]
    if unknown:
        raise DataError(f"data.fields.{unknown[0]} means nothing.", fix="use question, answer and id.")
    names = {key: key for key in FIELDS} | dict(data.fields)
    tasks: list[Task] = []
    dropped: list[str] = []
    where_id: dict[str, str] = {}
    first: dict[bool, str] = {}  # has an id -> the first row of that kind
    for where, row in placed:
        found = {key: _at(row, names[key]) for key in FIELDS}
        for ours in ("question", "answer", *(["id"] if "id" in data.fields else [])):
            if found[ours] is _ABSENT:
                present = ", ".join(map(repr, _names_of(row))) or "none"
                raise DataError(
                    f"{where}: no field {names[ours]!r} for the {ours}; the row has {present}.",
                    fix=f'name it: data.fields = {{ {ours} = "..." }}.',
                )
        messages = _messages(data, where, names["question"], found["question"], DEFAULT_INSTRUCTION)
        answer = as_text(found["answer"])
        if answer is None:
            _wrong(where, names["answer"], found["answer"], "a text or a number")
        if not answer.strip():
            dropped.append(where)
            continue
        has_id = found["id"] is not _ABSENT
        first.setdefault(has_id, where)
        if len(first) == 2:
            raise DataError(
                f"{where}: the row has {'an id' if has_id else 'no id'}, unlike {_short(first[not has_id])}.",
                fix="give every row an id, or none.",
            )
        key = str(len(where_id) + len(dropped))
        if has_id:
            key = as_text(found["id"])
            if not key:
                _wrong(where, names["id"], found["id"], "a text or a number")
        if key in where_id:
            raise DataError(
                f"{where}: the id {key!r} is already that of {_short(where_id[key])}.",
                fix="make ids unique, or map data.fields.id to a field that is.",
            )
        where_id[key] = where
        info = {k: v for k, v in row.items() if k not in (names["question"], names["answer"])}
        tasks.append(Task(f"{data.source}/{split}/{key}", messages, answer, data.source, 0, info))
    report_dropped(place, dropped)
    return not_empty(tasks, place)


def report_dropped(place: str, wheres: Sequence[str]) -> None:
    """Say which rows were left out because they hold no answer."""
    if wheres:
        shown = ", ".join(map(_short, wheres[:5])) + (", ..." if len(wheres) > 5 else "")
        count = "row" if len(wheres) == 1 else "rows"
        log.warning("%s: dropped %d %s without an answer (%s).", place, len(wheres), count, shown)


def _short(where: str) -> str:
    """``line 7`` of ``file:7``, ``row 6`` of ``name row 6``."""
    head, _, number = where.rpartition(":")
    return f"line {number}" if head and number.isdigit() else f"row {where.rpartition(' ')[2]}"
