"""``retrain man`` and ``--help``: bundled text, with blocks that ``--sync`` generates from the code."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib import import_module

from retrain.cli.commands import COMMANDS
from retrain.config.templates import ASSETS
from retrain.errors import NotInThisVersion, UsageError

HELP = os.path.join(ASSETS, "help.txt")
MANUAL = os.path.join(ASSETS, "manual.md")

USAGE = {
    "man": """\
Usage: retrain man [--topic NAME] [--list-topics] [--path] [--check | --sync]

Shows the manual. --check fails when the bundled text is stale, --sync writes it anew.
""",
    "schema": "Usage: retrain schema\n",
    "completion": "Usage: retrain completion bash|zsh|fish\n",
}

_BEGIN, _END = "<!-- generated: ", "<!-- end -->"


def print_help(command: str = "") -> int:
    """The help text, or that of one command."""
    usage: str | Mapping[str, str] | None = None
    if command in COMMANDS and command != "demo":  # whose module is that of a run
        module = import_module(COMMANDS[command][0].partition(":")[0])
        usage = getattr(module, "USAGE", None)
    text = usage.get(command) if isinstance(usage, Mapping) else usage
    if text:
        print(text, end="")
    else:
        print(_read(HELP), end="")
    return 0


def man(arguments: Sequence[str]) -> int:
    """The command ``man``."""
    rest, topic = list(arguments), ""
    while rest:
        word, equals, value = rest.pop(0).partition("=")
        if word == "--topic":
            if not equals and not rest:
                raise UsageError("--topic needs a name.", fix=f"one of {', '.join(topics())}.")
            topic = value if equals else rest.pop(0)
        elif word == "--list-topics":
            print("\n".join(topics()))
            return 0
        elif word == "--path":
            print(MANUAL)
            return 0
        elif word in ("--check", "--sync"):
            return _sync(write=word == "--sync")
        elif word in ("--json", "--format"):
            raise UsageError(f"retrain man {word} is not in this version.", fix="leave it out.")
        else:
            raise UsageError(f"unexpected argument {word!r}.", fix="`retrain man --topic NAME`.")
    print(_topic(topic) if topic else _text(), end="")
    return 0


def schema(arguments: Sequence[str]) -> int:
    """The command ``schema``."""
    raise NotInThisVersion("retrain schema is not in this version.", fix="leave it out.")


def completion(arguments: Sequence[str]) -> int:
    """The command ``completion``."""
    raise NotInThisVersion("retrain completion is not in this version.", fix="leave it out.")


def topics() -> list[str]:
    """Names of the manual's parts, in order."""
    return [line[2:].strip() for line in _text().splitlines() if line.startswith("# ")]


def _topic(name: str) -> str:
    if name not in topics():
        import difflib

        near = difflib.get_close_matches(name, topics(), n=1)
        hint = f"did you mean {near[0]}?" if near else f"topics are {', '.join(topics())}."
        raise UsageError(f"the manual has no topic {name!r}.", fix=hint)
    start = _text().index(f"# {name}\n")
    end = _text().find("\n# ", start)
    return _text()[start : end + 1 if end >= 0 else None]


def _text() -> str:
    lines = _read(MANUAL).splitlines(keepends=True)
    return "".join(line for line in lines if not line.startswith((_BEGIN, _END)))


def _read(path: str) -> str:
    with open(path, encoding="utf-8") as file:
        return file.read()


def _sync(*, write: bool) -> int:
    texts = generated()
    stale = [path for path, text in texts.items() if not os.path.exists(path) or _read(path) != text]
    for path in stale:
        print(f"{'wrote' if write else 'stale'}: {path}")
        if write:
            with open(path, "w", encoding="utf-8") as file:
                file.write(texts[path])
    if stale and not write:
        print("Fix: retrain man --sync")
    return 1 if stale and not write else 0


def generated() -> dict[str, str]:
    """Path and text of every generated file; the reference page only in a source checkout."""
    from retrain.config import describe

    files = {HELP: _help(), MANUAL: _filled(_read(MANUAL))}
    root = os.path.dirname(os.path.dirname(os.path.dirname(ASSETS)))
    if os.path.exists(os.path.join(root, "pyproject.toml")):
        files[os.path.join(root, "docs", "configuration.md")] = describe.reference()
    return files


def _help() -> str:
    from retrain.config import describe

    return "\n\n".join(
        (
            "retrain: train language models by reinforcement learning with verifiable rewards.",
            "Usage:\n"
            "  retrain [CONFIG] [--flag value ...]   train as CONFIG says (./retrain.toml)\n"
            "  retrain COMMAND [...]",
            f"Commands:\n{_commands()}",
            f"A run:\n{describe.switches()}",
            "Settings, which win over the TOML (all of them: retrain man --topic options):\n"
            + describe.frequent_flags(),
            "Start with: retrain demo, then retrain init.\n",
        )
    )


def _commands() -> str:
    import textwrap

    from retrain.cli.commands import COMMANDS, LATER

    rows = [f"  {name:<26}{meaning}" for name, (_, meaning) in COMMANDS.items()]
    rest = textwrap.fill(", ".join(LATER), width=100, initial_indent="  ", subsequent_indent="  ")
    return "\n".join([*rows, "  Known, and not in this version:", rest])


def _filled(manual: str) -> str:
    from retrain.cli.create import listing
    from retrain.config import describe

    blocks = {
        "commands": _commands(),
        "switches": describe.switches(),
        "options": describe.options(),
        "templates": listing(),
    }
    lines: list[str] = []
    skipping = False
    for line in manual.splitlines():
        if line.startswith(_BEGIN):
            name = line.removeprefix(_BEGIN).removesuffix(" -->")
            lines += [line, blocks[name]]
            skipping = True
        elif line.startswith(_END):
            skipping = False
        if not skipping:
            lines.append(line)
    return "\n".join(lines) + "\n"
