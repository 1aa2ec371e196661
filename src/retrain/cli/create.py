"""``retrain init``: writes a configuration from a template, and never over a file that exists."""

from __future__ import annotations

import os
from collections.abc import Sequence

from retrain.cli.verb import own_flags
from retrain.config import templates
from retrain.errors import UsageError

DEFAULT_PATH = "retrain.toml"

USAGE = """\
Usage: retrain init [PATH] [--template NAME | --interactive] [--list]

Writes a configuration to PATH (./retrain.toml). It never overwrites a file.

  --template NAME    which one (default): `retrain init --list` says what each is for
  --interactive      by a few questions; Ctrl-D leaves and writes nothing
  --list             names of the templates
"""


def init(arguments: Sequence[str]) -> int:
    """The command ``init``."""
    own, rest = own_flags("init", arguments, values=("--template",), switches=("--interactive", "--list"))
    flags = [word for word in rest if word.startswith("-")]
    if flags:
        word = flags[0].partition("=")[0]
        raise UsageError(f"{word} is not an option of init.", fix="use --template NAME, --interactive or --list.")
    if "--list" in own:
        others = [*(flag for flag in own if flag != "--list"), *rest]
        if others:
            raise UsageError(f"--list shows the templates and takes no {others[0]!r}.", fix="give one of them.")
        print(listing())
        return 0
    if len(rest) > 1:
        raise UsageError(f"unexpected argument {rest[1]!r}.", fix="name one file.")
    if rest and not rest[0].strip():
        raise UsageError("the name of the file is empty.", fix=f"name one, or leave it out for {DEFAULT_PATH}.")
    path = rest[0] if rest else DEFAULT_PATH
    if "--template" in own:
        _check_template(own["--template"])
    if "--interactive" in own:
        # Before the first question: whoever has answered them all must get the file.
        _write("", path)
        os.unlink(path)
        from retrain.cli import interview

        return interview.run(path, own.get("--template", ""), lambda text: _write(text, path))
    template = own.get("--template", "default")
    create(template, path)
    print(f"Wrote {path} (template {template}: {templates.TEMPLATES[template]}).")
    print(f"Next: look through it, then start it with: retrain{'' if path == DEFAULT_PATH else ' ' + path}")
    return 0


def listing() -> str:
    """One line per template."""
    rows = [f"  {name:<12}{purpose}" for name, purpose in templates.TEMPLATES.items()]
    rows += [f"  {name:<12}not in this version" for name in templates.LATER]
    return "\n".join(rows)


def create(template: str, path: str) -> None:
    """Write a template to a new file; UsageError when the name is wrong or the file exists."""
    _check_template(template)
    _write(templates.read(template), path)


def _check_template(template: str) -> None:
    if not template:
        raise UsageError("--template needs a name.", fix=f"one of {', '.join(templates.TEMPLATES)}.")
    if template in templates.LATER:
        raise UsageError(
            f"template {template!r} is not in this version.", fix=f"use {' or '.join(templates.TEMPLATES)}."
        )
    if template not in templates.TEMPLATES:
        import difflib

        near = difflib.get_close_matches(template, templates.TEMPLATES, n=1)
        hint = f"did you mean {near[0]}?" if near else f"use {' or '.join(templates.TEMPLATES)}."
        raise UsageError(f"there is no template {template!r}.", fix=hint)


def _exists(path: str) -> UsageError:
    kind = "a folder" if os.path.isdir(path) else "a file"
    return UsageError(
        f"{path}: there already is {kind} of that name, which init never overwrites.",
        fix="name another one: retrain init other.toml.",
    )


def _write(text: str, path: str) -> None:
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise _exists(path) from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UsageError(f"{path}: cannot be written: {reason}.", fix="name another place.") from error
