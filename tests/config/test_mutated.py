"""2,000 configurations with something wrong or unusual in them: each is an error that names the place and the fix, or a
configuration that holds what was written. Never a traceback, never a value that is silently ignored."""

from __future__ import annotations

import math
import random
import re
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from retrain.config import templates
from retrain.config.fields import key_text, literal, settings
from retrain.config.load import LoadedConfig, Override, load
from retrain.config.names import ALIASES
from retrain.config.options import parse
from retrain.errors import ConfigError, UsageError

ROOT = Path(__file__).resolve().parents[2]
TOTAL = 2000
TEXTS = {
    **{name: templates.read(name) for name in templates.TEMPLATES},
    **{path.parent.name: path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("examples/*/retrain.toml"))},
}
STRANGE: list[Any] = [
    0, 1, -1, 2, 7, 2**31, 2**63, 10**30, -(2**63), 0.0, -0.5, 0.5, 1.5, 1e300, 1e-300, math.nan, math.inf, -math.inf,
    True, False, "", " ", "x", "1", "true", "cpu", "grpo", "a.b", "a:b", "..", "ünïcödé", "\u202e", "\x7f", "\t", "a\nb",
    "🙂" * 40, "x" * 5000, "sk-" + "a" * 24, "{}", "{", "[1]", [], [1], [""], ["a", "a"], [[]], [1, "a"], [{}],
    [{"source": "gsm8k"}], {}, {"a": 1}, {"a": {"b": [1, {"c": math.nan}]}}, {"": ""}, {"weight": 1, "type": "math"},
]  # fmt: skip


def plain(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A deep copy."""
    return {k: plain(v) if isinstance(v, dict) else list(v) if isinstance(v, list) else v for k, v in tree.items()}


def written(tree: Mapping[str, Any]) -> str:
    """A TOML text of a nested table: values first, then tables."""
    lines = [f"{key_text(k)} = {shown(v)}" for k, v in tree.items() if not isinstance(v, dict)]
    for name, table in tree.items():
        if isinstance(table, dict):
            inner = [f"{key_text(k)} = {shown(v)}" for k, v in table.items()]
            lines += [f"[{key_text(name)}]", *inner]
    return "\n".join(lines) + "\n"


def shown(value: Any) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key_text(k)} = {shown(v)}" for k, v in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(shown(v) for v in value) + "]"
    return literal(value)


def misspelt(rng: random.Random, word: str) -> str:
    """The word with a letter dropped, doubled, swapped or replaced."""
    at = rng.randrange(len(word))
    return rng.choice([
        word[:at] + word[at + 1 :], word[:at] + word[at] + word[at:], word[:at] + rng.choice("xz_9é-") + word[at + 1 :],
        word[: at - 1] + word[at : at + 1] + word[at - 1 : at] + word[at + 1 :] if at else word + "s", word.upper(), word + ".x",
    ])  # fmt: skip


Change = tuple[tuple[str, ...], Any]
"""A key in parts, and the value that was written there."""


def table_of(tree: dict[str, Any], *path: str) -> dict[str, Any]:
    """The table at a path; whatever else stood there is replaced."""
    for part in path:
        if not isinstance(tree.get(part), dict):
            tree[part] = {}
        tree = tree[part]
    return tree


def a_value(rng: random.Random, tree: dict[str, Any]) -> list[Change]:
    """A known key gets a strange value."""
    key = rng.choice(list(settings()))
    section, *rest = key.split(".")
    value = rng.choice(STRANGE)
    table_of(tree, section, *rest[:-1])[rest[-1]] = value
    return [((section, *rest), value)]


def a_fitting_value(rng: random.Random, tree: dict[str, Any]) -> list[Change]:
    """A known key gets a value of its type, often one that is accepted."""
    setting = rng.choice(list(settings().values()))
    if setting.name.count("."):
        return a_value(rng, tree)
    by_type: dict[str, list[Any]] = {
        "integer": [0, 1, 2, 3, 8, 64, 4097, 70000], "float": [0.0, 1e-5, 0.5, 1, 2.0, 3, 1000.5], "boolean": [True, False],
        "string": [*setting.choices, "auto", "gtpo", "my_module.thing", "some text", "plain"],
    }  # fmt: skip
    value = rng.choice(by_type.get(setting.type, STRANGE))
    table_of(tree, setting.section)[setting.name] = value
    return [((setting.section, setting.name), value)]


def an_unknown_key(rng: random.Random, tree: dict[str, Any]) -> list[Change]:
    """A key that does not exist, at any depth, often nearly one that does."""
    key = rng.choice(list(settings()))
    section, _, name = key.rpartition(".")
    name = rng.choice([misspelt(rng, name), "zzz", "", "a b", "learning_rate", "ü", name])
    top = section.partition(".")[0]
    path = rng.choice([(misspelt(rng, top), name), (top, name), (name,), (top, "x", name)])
    value = rng.choice(STRANGE)
    table = tree
    for part in path[:-1]:
        inner = table.setdefault(part, {})
        if not isinstance(inner, dict):
            return a_value(rng, tree)
        table = inner
    if path[-1] in table:
        return a_value(rng, tree)
    table[path[-1]] = value
    return [(path, value)]


def a_scalar_section(rng: random.Random, tree: dict[str, Any]) -> list[Change]:
    """A section that is no table, or an array of tables."""
    section = rng.choice([*tree, "loss", "sepa"])
    value = rng.choice([1, "x", [], [1], True, math.nan, [{"a": 1}], [tree.get(section, {"b": 2})]])
    tree[section] = value
    return [((section,), value)]


def a_table_inside(rng: random.Random, tree: dict[str, Any]) -> list[Change]:
    """Rows of an array of tables, with keys that are right, wrong or missing."""
    section, key = rng.choice([("reward", "parts"), ("data", "mixture"), ("eval", "suites")])
    if rng.random() < 0.8:
        table_of(tree, "reward").update({"type": "composite"} if key == "parts" else {})
        table_of(tree, "data").update({"source": "mixture"} if key == "mixture" else {})
    good: dict[str, list[Any]] = {
        "parts": ["type", "weight", "gate", "name", "module", "pattern", "texts", "max", "unit", "schema"],
        "mixture": ["source", "weight", "name", "levels", "reward", "split", "size"],
        "suites": ["source", "examples", "name", "samples", "temperature", "split", "path"],
    }
    rows: list[dict[str, Any]] = []
    for _ in range(rng.randint(1, 3)):
        first = rng.choice(["math", "match", "arithmetic", "gsm8k", "length", "zzz", "a.b", 3])
        row: dict[str, Any] = {good[key][0]: first}
        for _ in range(rng.randint(0, 2)):
            row[rng.choice([*good[key], misspelt(rng, rng.choice(good[key]))])] = rng.choice(STRANGE)
        if rng.random() < 0.1:
            row.pop(good[key][0])
        rows.append(row)
    table_of(tree, section)[key] = rows
    return [((section, key), rows)]


SHAPES: list[Callable[[random.Random, dict[str, Any]], list[Change]]] = [
    a_value, a_value, a_fitting_value, a_fitting_value, a_fitting_value,
    an_unknown_key, an_unknown_key, a_scalar_section, a_table_inside,
]  # fmt: skip


def one_line_errors(error: ConfigError | UsageError) -> list[str]:
    """The lines of an error, each of which must name a fix."""
    text = str(error)
    lines = [line for line in text.splitlines() if line.strip() and line != "the configuration has problems."]
    assert lines, text
    for line in lines:
        assert "Fix: " in line, text
        assert len(line) < 2500, text
        assert "Traceback" not in line
        assert "pydantic" not in line.lower()
        assert not re.search(r"<class|NoneType|object at 0x", line), text
        assert "sk-aaaa" not in line, "a secret is never printed"
    return lines


def named(key: tuple[str, ...], text: str, lines: list[str]) -> bool:
    """Does a line name the key, or the line on which it stands?"""
    # Of a path into nowhere the first part that is wrong is what has to be named.
    known = [k for k in settings() if k.startswith(".".join(key[:2]))]
    wrong = key[-1] if known or len(key) < 3 else key[1]
    if key[0] in ("campaign", "squeeze") or not any(k.startswith(f"{key[0]}.") for k in settings()):
        wrong = key[0]
    heads = (f"{key_text(wrong)} =", f"[{key_text(wrong)}]")
    places = [n for n, line in enumerate(text.splitlines(), 1) if line.startswith(heads)]
    return any((wrong and wrong in line) or any(f".toml:{n}:" in line for n in places) for line in lines)


def same(value: Any, kept: Any) -> bool:
    """Is what was written what the configuration holds?"""
    if isinstance(value, (list, tuple)) and isinstance(kept, (list, tuple)):
        return len(value) == len(kept) and all(map(same, value, kept))
    if isinstance(value, dict) and isinstance(kept, dict):
        return value.keys() == kept.keys() and all(same(v, kept[k]) for k, v in value.items())
    if isinstance(value, float) and math.isnan(value):
        return isinstance(kept, float) and math.isnan(kept)
    if isinstance(value, bool) is not isinstance(kept, bool):
        return False
    return value == kept


def value_at(loaded: LoadedConfig, key: tuple[str, ...]) -> Any:
    value: Any = loaded.config.model_dump(by_alias=True)
    for part in key:
        value = value[part]
    return value


def check_kept(loaded: LoadedConfig, changes: list[Change]) -> None:
    for key, value in changes:
        assert ".".join(key) in settings(), f"{key} was accepted and is no setting"
        kept = value_at(loaded, key)
        meant = ALIASES["uncertainty"].get(value, value) if key[-1] == "uncertainty_kind" else value
        if key == ("data", "subjects") and isinstance(value, str):
            meant = [value]
        if key == ("environment", "args") and isinstance(value, str):
            meant = {}
        assert same(meant, kept), f"{'.'.join(key)} = {value!r} became {kept!r}"
        assert loaded.origins[".".join(key)].kind != "default"


def mutated(number: int) -> tuple[str, list[Change]]:
    rng = random.Random(number)
    tree = plain(tomllib.loads(TEXTS[rng.choice(list(TEXTS))]))
    changes: dict[tuple[str, ...], Any] = {}
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        for key, value in rng.choice(SHAPES)(rng, tree):
            # A later change may replace a section that holds an earlier one, or what an earlier one put there.
            changes = {k: v for k, v in changes.items() if k[: len(key)] != key and key[: len(k)] != k}
            changes[key] = value
    return written(tree), list(changes.items())


@pytest.mark.parametrize("part", range(8))
def test_trees(part: int, tmp_path: Path) -> None:
    path, accepted, refused = tmp_path / "c.toml", 0, 0
    for number in range(part, 1400, 8):
        text, changes = mutated(number)
        path.write_text(text, encoding="utf-8", newline="")
        try:
            loaded = load(path)
        except ConfigError as error:
            lines = one_line_errors(error)
            told = any(named(key, text, lines) for key, _ in changes)
            assert told, f"{number}: {changes}\n{lines}"
            refused += 1
            continue
        except BaseException as error:
            raise AssertionError(f"mutation {number}:\n{text}") from error
        check_kept(loaded, changes)
        accepted += 1
    assert accepted > 8
    assert refused > 60


def broken(rng: random.Random, text: str) -> bytes:
    """A text with something wrong as text: cut, doubled, bad characters, bad bytes."""
    lines = text.splitlines()
    at = rng.randrange(len(lines))
    kind = rng.randrange(9)
    if kind == 0:
        return text[: rng.randrange(len(text))].encode()
    if kind == 1:
        odd = ["[training]", "[[training]]", "[training.lr]", "[[reward.parts.x]]", "[", "]", "= 3", "x", "[a]b"]
        lines.insert(at, rng.choice(odd))
    elif kind == 2:
        lines.append(lines[at])
    elif kind == 3:
        data = bytearray(text.encode())
        data[rng.randrange(len(data))] = rng.choice([0, 0x7F, 0x80, 0xFF, 0xC3, 0x0D])
        return bytes(data)
    elif kind == 4:
        lines[at] = lines[at].replace("=", rng.choice(["==", ":", "", "=["]))
    elif kind == 5:
        return rng.choice([b"\xef\xbb\xbf", b"\xff\xfe", b"\x00"]) + text.encode()
    elif kind == 6:
        lines[at] += rng.choice([" }", ' "', "'''", " # ok", ",", "\\"])
    elif kind == 7:
        return text.replace("\n", rng.choice(["\r\n", "\r", "\n\n"])).encode()
    else:
        lines.insert(at, f"{rng.choice(['x', 'training.lr', '[x'])} = {'[' * 200}{']' * 200}")
    return "\n".join(lines).encode()


def test_texts(tmp_path: Path) -> None:
    path, refused = tmp_path / "c.toml", 0
    for number in range(300):
        rng = random.Random(10_000 + number)
        text = TEXTS[rng.choice(list(TEXTS))]
        data = broken(rng, text)
        path.write_bytes(data)
        try:
            loaded = load(path)
        except ConfigError as error:
            for line in one_line_errors(error):
                assert re.match(rf"{re.escape(str(path))}(:\d+|: )", line), f"{number}: {line}"
            refused += 1
            continue
        except BaseException as error:
            raise AssertionError(f"text {number}: {data!r}") from error
        # What was accepted is what the file says, as the standard library reads it.
        for section, table in tomllib.loads(data.decode("utf-8-sig")).items():
            check_kept(loaded, [((section, k), v) for k, v in table.items()])
    assert refused > 150


def test_flags() -> None:
    accepted = refused = 0
    for number in range(400):
        rng = random.Random(20_000 + number)
        setting = rng.choice(list(settings().values()))
        flat = setting.name.replace("_", "-")
        name = rng.choice([f"--{setting.key}", f"--{flat}", f"--{misspelt(rng, setting.name)}"])
        plain_texts = ["1", "0.5", "true", "x", "gtpo", "", "-1", "a=1", "=", "--lr"]
        value = shown(rng.choice(STRANGE)) if rng.random() < 0.7 else rng.choice(plain_texts)
        words = [f"{name}={value}"] if rng.random() < 0.5 else [name, value]
        try:
            line = parse(words)
            if not line.overrides:
                assert line.config is not None or line.switches
                continue
            loaded = load({"model": {"model": "retrain/tiny"}}, line.overrides)
        except (ConfigError, UsageError) as error:
            lines = one_line_errors(error)
            told = " ".join(lines)
            found = name in told or setting.key in told or (value and value in told)
            assert found, f"{words}: {told}"
            refused += 1
            continue
        except BaseException as error:
            raise AssertionError(f"flags {words}") from error
        for override in line.overrides:
            key = ".".join(override.path[:2])
            assert loaded.origins[key].kind == "flag"
            check_flag(loaded, override)
        accepted += 1
    assert accepted > 30
    assert refused > 100


def check_flag(loaded: LoadedConfig, override: Override) -> None:
    path = override.path
    if ".".join(path) in settings():
        check_kept(loaded, [(path, override.value)])
    else:
        assert same(override.value, value_at(loaded, path)), override


def test_there_are_two_thousand() -> None:
    assert sum((1400, 300, 300)) == TOTAL
