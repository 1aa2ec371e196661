"""``retrain man`` and ``--help``: bundled text, with blocks that ``--sync`` generates from the code."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib import import_module

from retrain.cli.commands import COMMANDS
from retrain.config.templates import ASSETS
from retrain.errors import RunError, UsageError

HELP = os.path.join(ASSETS, "help.txt")
MANUAL = os.path.join(ASSETS, "manual.md")

USAGE = {
    "man": """\
Usage: retrain man [--topic NAME] [--list-topics] [--format text|json|html] [--path] [--check | --sync]

Shows the manual, or one topic of it.

  --topic NAME      only this topic, or the one that describes the command NAME
  --list-topics     names of the topics
  --format F        text, json, or html: one page that stands alone
  --json            the same as --format json
  --path            where the manual's file is
  --check           exit code 1 when the bundled text is not what the code says
  --sync            write it anew
""",
    "schema": """\
Usage: retrain schema [--output FILE] [--json]

Prints a JSON Schema of the configuration, from which editors complete and check TOML files, and says how to use it.

  --output FILE     write it to FILE, again over an older one
  --json            print the schema and nothing else
""",
    "completion": """\
Usage: retrain completion bash|zsh|fish

Prints a script that completes commands, flags, names and files. To use it in every new shell:

  bash    echo 'eval "$(retrain completion bash)"' >> ~/.bashrc
  zsh     echo 'eval "$(retrain completion zsh)"' >> ~/.zshrc      (after compinit)
  fish    retrain completion fish > ~/.config/fish/completions/retrain.fish
""",
    "demo": """\
Usage: retrain demo [--flag value ...]

Trains the model that ships inside the package on sums of two digits, on the CPU, in a few minutes: the same steps as a
large run. The run directory is logs/demo, the next free name where that is taken. It needs no network.

  --log-dir DIR     another run directory
  --plain           plain lines, as when the output is not a terminal
Every setting of a run has its usual flag: retrain demo --transform-mode none --seed 1 --max-steps 20.
`retrain init --template tiny` writes its configuration.
""",
}

_BEGIN, _END = "<!-- generated: ", "<!-- end -->"
FORMATS = ("text", "json", "html")
_ALONE = ("--path", "--check", "--sync")
"""Flags of ``man`` that show nothing of the manual."""


def print_help(words: Sequence[str] = ()) -> int:
    """The help text, or that of the command that ``words`` hold; UsageError where it holds something else.

    A flag or a configuration is no command: the line is a run, which the general text explains.
    """
    if len(words) > 1:
        raise UsageError(f"unexpected argument {words[1]!r}.", fix=f"retrain help {words[0]}.")
    word = words[0] if words else ""
    usage = usage_of(word)
    is_run = word in ("", "help") or word.startswith("-") or word.endswith(".toml") or os.path.exists(word)
    if not usage and not is_run and os.path.basename(word) == word:
        raise _no_command(word)
    print(usage or _read(HELP), end="")
    return 0


def _no_command(word: str) -> UsageError:
    import difflib

    from retrain.cli.commands import LATER

    if word in LATER:
        return UsageError(f"retrain {word} is not in this version.", fix="`retrain --help` lists what is.")
    if word in ("train", "run", "resume"):
        return UsageError(f"there is no command {word!r}: a run needs none.", fix="`retrain --help` says how to start one.")
    near = difflib.get_close_matches(word, COMMANDS, n=1)
    hint = f"did you mean retrain help {near[0]}?" if near else "`retrain --help` lists the commands."
    return UsageError(f"there is no command {word!r}.", fix=hint)


def usage_of(command: str) -> str:
    """Help text of a command, "" where there is none."""
    if command in USAGE:
        return USAGE[command]
    if command not in COMMANDS:
        return ""
    usage: str | Mapping[str, str] | None = getattr(import_module(COMMANDS[command][0].partition(":")[0]), "USAGE", None)
    return usage if isinstance(usage, str) else (usage or {}).get(command, "")


def man(arguments: Sequence[str]) -> int:
    """The command ``man``."""
    from retrain.cli.verb import own_flags

    own, rest = own_flags("man", arguments, values=("--topic", "--format"), switches=("--json", *_ALONE, "--list-topics"))
    if rest:
        raise UsageError(f"unexpected argument {rest[0]!r}.", fix="`retrain man --topic NAME`.")
    _check_together(own)
    form = "json" if "--json" in own else _one_of(own.get("--format", "text"), FORMATS, "--format")
    topic = _topic(own["--topic"]) if "--topic" in own else ""
    if "--check" in own or "--sync" in own:
        return _sync(write="--sync" in own)
    if "--path" in own:
        print(MANUAL)
    elif form == "json":
        print(_json(topic, listed="--list-topics" in own))
    elif "--list-topics" in own:
        print("\n".join(topics()))
    elif form == "html":
        from retrain.cli.manual_page import page

        print(page([(name, topic_text(name)) for name in ([topic] if topic else topics())]), end="")
    else:
        print(topic_text(topic) if topic else _text(), end="")
    return 0


def _check_together(own: Mapping[str, str]) -> None:
    """UsageError for two flags of which one would be ignored."""
    given, forms = list(own), [f for f in own if f in ("--json", "--format")]
    clashes = [
        *((f, other) for f in given if f in _ALONE for other in given if other != f),
        *([(forms[0], forms[1])] if len(forms) == 2 else []),
    ]
    if "--list-topics" in own:
        clashes += [("--list-topics", "--topic")] if "--topic" in own else []
        clashes += [("--list-topics", "--format html")] if own.get("--format") == "html" else []
    if clashes:
        one, two = sorted(clashes[0], key=lambda flag: given.index(flag.partition(" ")[0]))
        raise UsageError(f"{one} and {two} exclude each other.", fix="give one of them.")


def schema(arguments: Sequence[str]) -> int:
    """The command ``schema``."""
    from retrain.cli.editors import write_schema

    return write_schema(arguments)


def completion(arguments: Sequence[str]) -> int:
    """The command ``completion``."""
    from retrain.cli.completion import SHELLS, Texts, script

    if len(arguments) != 1 or arguments[0] not in SHELLS:
        given = f"not {arguments[0]!r}" if len(arguments) == 1 else "and nothing else" if arguments else "which one?"
        raise UsageError(
            f"completion takes the name of a shell, {given}.", fix=f"retrain completion {' or '.join(SHELLS)}."
        )
    print(script(arguments[0], Texts(usage_of, topics(), FORMATS)), end="")
    return 0


def topics() -> list[str]:
    """Names of the manual's parts, in order."""
    return [line[2:].strip() for line in _text().splitlines() if line.startswith("# ")]


def topic_text(name: str) -> str:
    """One part of the manual, with its heading."""
    text = _text()
    start = text.index(f"# {name}\n")
    end = text.find("\n# ", start)
    return text[start : end + 1 if end >= 0 else None]


def _topic(name: str) -> str:
    """The topic ``name``, or the one that a command of that name is described in; UsageError where there is neither."""
    if name in topics() or name not in COMMANDS:
        return _one_of(name, topics(), "the manual's topics")
    before, found, _ = _read(MANUAL).partition(f"{_BEGIN}usage {name} -->\n")
    headings = [line[2:].strip() for line in before.splitlines() if line.startswith("# ")]
    return headings[-1] if found else "commands"


def _one_of(name: str, known: Sequence[str], what: str) -> str:
    if name in known:
        return name
    import difflib

    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there is {', '.join(known)}."
    if what == "--format":
        raise UsageError(f"--format {name} is unknown.", fix=hint)
    raise UsageError(f"the manual has no topic {name!r}.", fix=hint)


def _json(topic: str, *, listed: bool) -> str:
    import json

    if listed:
        return json.dumps({"topics": topics()})
    parts = [{"name": n, "text": topic_text(n).partition("\n")[2].strip("\n")} for n in ([topic] if topic else topics())]
    return json.dumps({"topics": parts}, indent=2, ensure_ascii=False)


def _text() -> str:
    lines = _read(MANUAL).splitlines(keepends=True)
    return "".join(line for line in lines if not line.startswith((_BEGIN, _END)))


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except OSError as error:
        raise RunError(
            f"{path}: cannot be read: {error.strerror or error}.", fix="it is a part of the package: install retrain again."
        ) from error


def _write(path: str, text: str) -> None:
    try:
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise RunError(
            f"{path}: cannot be written: {error.strerror or error}.", fix="use --sync in a checkout of the source that is yours."
        ) from error


def _sync(*, write: bool) -> int:
    texts = generated()
    stale = [path for path, text in texts.items() if not os.path.exists(path) or _read(path) != text]
    for path in stale:
        if write:
            _write(path, texts[path])
        print(f"{'wrote' if write else 'stale'}: {path}")
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
            "  retrain COMMAND [...]                 retrain COMMAND --help says more",
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
    if not LATER:
        return "\n".join(rows)
    rest = textwrap.fill(", ".join(LATER), width=100, initial_indent="  ", subsequent_indent="  ")
    return "\n".join([*rows, "  Known, and not in this version:", rest])


def _usage_block(command: str) -> str:
    lines = usage_of(command).removeprefix("Usage: ").rstrip().splitlines()
    return "\n".join(f"    {line}".rstrip() for line in lines)


def _filled(manual: str) -> str:
    from retrain.cli.create import listing
    from retrain.config import describe

    blocks = {
        "commands": _commands(),
        "switches": describe.switches(),
        "options": describe.options(),
        "templates": listing(),
        **{f"usage {command}": _usage_block(command) for command in COMMANDS},
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
