"""The schema in words: the reference page, the options of the manual and the flags of the help text."""

from __future__ import annotations

from collections.abc import Iterator

from retrain.config.fields import Setting, key_text, literal, sections, settings
from retrain.config.flags import flags, flags_of
from retrain.config.options import SWITCHES

FREQUENT = (
    "--model",
    "--devices",
    "--data-source",
    "--reward-type",
    "--advantage-mode",
    "--transform-mode",
    "--seed",
    "--max-steps",
    "--batch-size",
    "--group-size",
    "--max-tokens",
    "--lr",
    "--lora-rank",
    "--log-dir",
)
"""Flags that the help text lists."""

_INTRODUCTION = """\
# Configuration

A run is described by one TOML file: `retrain my.toml`, or `retrain` for `./retrain.toml`. Everything has a
default; a file says what differs from it. Unknown sections and keys, wrong types and values out of range are
errors that name file, line and fix, and all of them are reported at once.

Every setting can be given on the command line instead, where it wins over the file: with the flag listed
below, with `--section-key`, or dotted (`--training.lr 1e-4`). `--flag value` and `--flag=value` are the same.
Texts are taken as they are, other values as TOML writes them. A true-or-false flag may stand alone for true.
An array takes a TOML array or a single item. A table takes `key=value`, as often as needed, or a TOML inline
table; `--data.fields.question prompt` sets one key.

Names are the built-in ones; a name that is known but not built yet is refused with "not in this version".
A setting that cannot act beside the others is refused or announced when the run starts. Where a name says "or your
own", the dotted path of a [plug-in](plugins.md) may stand.

An editor with a TOML language server (Even Better TOML, Taplo, Tombi) completes and checks all of this while you type:
`retrain schema --output retrain.schema.json`, and as the first line of the TOML beside it
`#:schema ./retrain.schema.json`.
"""


def reference() -> str:
    """The page ``docs/configuration.md``."""
    lines = [_INTRODUCTION]
    for name, model in sections().items():
        lines += [f"## `[{name}]`", "", (model.__doc__ or "").strip(), ""]
        lines += ["| Key | Type | Default | Accepts | Meaning |", "|---|---|---|---|---|"]
        lines += [_row(setting) for setting in settings().values() if setting.section == name]
        lines.append("")
    lines += ["## Flags", "", "| Key | Flags |", "|---|---|"]
    for key in settings():
        lines.append(f"| `{key}` | {', '.join(f'`{flag}`' for flag in [*flags_of(key), f'--{key}'])} |")
    return "\n".join(lines) + "\n"


def _row(setting: Setting) -> str:
    cells = (
        f"`{setting.name}`",
        setting.type,
        f"`{default_text(setting)}`",
        setting.accepts,
        setting.description,
    )
    return "| " + " | ".join(cell.replace("|", "\\|").replace("<", "&lt;") for cell in cells) + " |"


def default_text(setting: Setting) -> str:
    """The default as TOML, ``unset`` where there is none."""
    return "unset" if setting.default is None else literal(setting.default)


def options() -> str:
    """Every setting with its flag, default and meaning, section by section, for the manual."""
    lines: list[str] = []
    for name in sections():
        lines += [f"[{name}]"]
        for setting in settings().values():
            if setting.section == name:
                given = ", ".join(flags_of(setting.key)) or f"--{setting.key}"
                lines += [f"  {key_text_of(setting)} = {default_text(setting)}    {given}"]
                lines += [f"      {setting.description} ({setting.accepts[0].upper()}{setting.accepts[1:]}.)"]
        lines.append("")
    return "\n".join(lines).rstrip()


def key_text_of(setting: Setting) -> str:
    """The key as it stands below its section's header."""
    return ".".join(key_text(part) for part in setting.name.split("."))


def frequent_flags() -> str:
    """The flags that most runs need, for the help text."""
    rows = [(flag, settings()[flags()[flag]]) for flag in FREQUENT]
    return "\n".join(
        f"  {f'{flag} {_placeholder(s)}':<26}{s.description} [{default_text(s)}]" for flag, s in rows
    )


def _placeholder(setting: Setting) -> str:
    return {"integer": "N", "float": "X", "boolean": "true|false"}.get(setting.type, "TEXT")


def switches() -> str:
    """The flags that set nothing, for the help text."""
    return "\n".join(_switches())


def _switches() -> Iterator[str]:
    yield f"  {'--resume DIR':<26}Continue the run in DIR."
    for flag, meaning in SWITCHES.items():
        yield f"  {flag:<26}{meaning}"
