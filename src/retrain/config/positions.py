"""The line of every key in a TOML text, found by walking tomlkit's document, which keeps all whitespace."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TypeAlias, cast

import tomlkit
from tomlkit.exceptions import TOMLKitError
from tomlkit.items import AoT, Array, InlineTable, Item, Key, Table

Path: TypeAlias = tuple[str | int, ...]


def line_numbers(text: str) -> dict[Path, int]:
    """1-based line of every key, table header and array element of a valid TOML text.

    Empty where tomlkit cannot read what the standard library could: places are a help, never a condition.
    """
    try:
        document = tomlkit.parse(text)
    except (TOMLKitError, RecursionError, ValueError, TypeError, AttributeError):
        return {}
    walk = _Walk()
    walk.body(document.body, (), 1)
    return walk.lines


class _Walk:
    """Adds up line breaks in the order in which tomlkit writes a document back."""

    def __init__(self) -> None:
        self.lines: dict[Path, int] = {}
        self._tables_seen: Counter[Path] = Counter()

    def body(self, entries: Sequence[tuple[Key | None, Item]], prefix: Path, line: int) -> int:
        for key, item in entries:
            if key is None:
                line += _breaks(item)
                continue
            path = (*prefix, key.key)
            if isinstance(item, AoT):
                for table in item.body:
                    line = self._table(table, (*path, self._tables_seen[path]), line)
                    self._tables_seen[path] += 1
            elif isinstance(item, Table):
                line = self._table(item, path, line)
            else:
                line += item.trivia.indent.count("\n")
                self.lines.setdefault(path, line)
                self._inside(item, path, line)
                line += _breaks(item) + item.trivia.trail.count("\n")
        return line

    def _table(self, table: Table, path: Path, line: int) -> int:
        line += table.trivia.indent.count("\n")
        self.lines.setdefault(path, line)
        if not table.is_super_table():
            line += table.trivia.trail.count("\n")
        return self.body(table.value.body, path, line)

    def _inside(self, item: object, path: Path, line: int) -> None:
        if isinstance(item, Array):
            text, position = item.as_string(), 1
            for index, element in enumerate(cast("list[object]", list(item))):
                # The elements' own whitespace is private to tomlkit, their text is not.
                shown = element.as_string() if isinstance(element, Item) else str(element).lower()
                position = max(position, text.find(shown, position))
                start = line + text.count("\n", 0, position)
                self.lines[(*path, index)] = start
                self._inside(element, (*path, index), start)
                position += len(shown)
        elif isinstance(item, InlineTable):
            for key, value in item.value.body:
                if key is not None:
                    self.lines.setdefault((*path, key.key), line)
                    self._inside(value, (*path, key.key), line)
                line += _breaks(value)


def _breaks(item: Item) -> int:
    return item.as_string().count("\n")
