"""Line numbers of keys, for every way of writing a key."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrain.config.positions import line_numbers

TEXT = '''# a comment
a.b = 1
x = 2
a.c = [ 1,
  true, # in an array
  {k = 1}, { k = 2 } ]

[t.u]   # a header
q = """
two
lines"""
d.e.f = 1
d."e".g = 2

[[t.rows]]
n = 1
  [t.rows.inner]
  m = 2

[[t.rows]]
n = 2
[o]
l = { a = 1, b.c = 2 }
[[t.rows]]
n = 3
[t.v]
z = 1
'''

LINES = {
    ("a", "b"): 2,
    ("x",): 3,
    ("a", "c"): 4,
    ("a", "c", 1): 5,
    ("a", "c", 2): 6,
    ("a", "c", 3, "k"): 6,
    ("t", "u"): 8,
    ("t", "u", "q"): 9,
    ("t", "u", "d", "e", "f"): 12,
    ("t", "u", "d", "e", "g"): 13,
    ("t", "rows", 0): 15,
    ("t", "rows", 0, "n"): 16,
    ("t", "rows", 0, "inner", "m"): 18,
    ("t", "rows", 1, "n"): 21,
    ("o", "l"): 23,
    ("o", "l", "a"): 23,
    ("t", "rows", 2, "n"): 25,
    ("t", "v"): 26,
    ("t", "v", "z"): 27,
}


@pytest.mark.parametrize("text", [TEXT, TEXT.replace("\n", "\r\n")], ids=["unix", "windows"])
def test_every_key_has_its_line(text: str) -> None:
    found = line_numbers(text)
    assert {path: found[path] for path in LINES} == LINES


def test_a_text_that_cannot_be_read_has_no_lines() -> None:
    assert line_numbers("a = = 1") == {}


BLANKS = st.lists(st.sampled_from(["", "# note", "  "]), max_size=2)
VALUES = st.sampled_from(['"""\na\n"""', "[\n 1,\n # c\n 2 ]", "{ q = 1 }", "3", "'''\n\n'''", "[[1],\n[2]]"])


@st.composite
def documents(draw: st.DrawFn) -> tuple[str, dict[tuple[str, ...], int]]:
    """A TOML text together with the lines of its keys."""
    lines: list[str] = []
    expected: dict[tuple[str, ...], int] = {}
    for table in range(draw(st.integers(0, 4))):
        lines += draw(BLANKS)
        header = draw(st.sampled_from([f"[t{table}]", f"[ t{table} ] # c", f"[super.t{table}]"]))
        prefix = ("super", f"t{table}") if "super" in header else (f"t{table}",)
        expected[prefix] = len(lines) + 1
        lines.append(header)
        for key in range(draw(st.integers(0, 4))):
            lines += draw(BLANKS)
            name = draw(st.sampled_from([(f"k{key}",), ("dot", f"k{key}"), ("dot", "deep", f"k{key}")]))
            expected[(*prefix, *name)] = len(lines) + 1
            lines += f"{'.'.join(name)} = {draw(VALUES)}".split("\n")
    return "\n".join(lines), expected


@given(documents())
def test_lines_of_generated_documents(case: tuple[str, dict[tuple[str, ...], int]]) -> None:
    text, expected = case
    tomllib.loads(text)
    found: dict[Any, int] = line_numbers(text)
    assert {path: found[path] for path in expected} == expected
