"""What the commands beside a run share: flags of their own, a quiet start, and an end at Ctrl-C."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager

from retrain.errors import UsageError


def own_flags(
    command: str, arguments: Sequence[str], *, values: Sequence[str], switches: Sequence[str]
) -> tuple[dict[str, str], list[str]]:
    """The command's own flags with their values ("" for a switch), and the rest of the line."""
    own: dict[str, str] = {}
    rest: list[str] = []
    words = list(arguments)
    while words:
        word = words.pop(0)
        flag, equals, text = word.partition("=")
        if flag in ("--overwrite", "--fork", "--plain") and flag not in switches:
            raise UsageError(
                f"{flag} is not an option of {command}.", fix=f"leave it out; retrain {command} --help."
            )
        if flag not in (*values, *switches):
            rest.append(word)
            # The next word may be its value, which must not be read as a flag of ours.
            continue
        if flag in own:
            raise UsageError(f"{flag} is given twice.", fix="give it once.")
        if flag in switches:
            if equals:
                raise UsageError(f"{flag} takes no value.", fix=f"write {flag} alone.")
            text = ""
        elif not equals:
            if not words or (words[0].startswith("--") and flag != "--prompt"):
                raise UsageError(f"{flag} needs a value.", fix=f"{flag} VALUE, or retrain {command} --help.")
            text = words.pop(0)
        own[flag] = text
    return own, rest


def whole_number(text: str, flag: str, *, least: int) -> int:
    """A flag's value as a number; UsageError where it is none, or too small."""
    if not text.isdecimal() or int(text) < least:
        raise UsageError(
            f"{flag} {text} is not a whole number of at least {least}.",
            fix=f"for example {flag} {least + 3}.",
        )
    return int(text)


@contextmanager
def quiet_loading() -> Generator[None]:
    """Warnings of the package go to stderr, so that stdout holds the result alone."""
    log, handler = logging.getLogger("retrain"), logging.StreamHandler(sys.stderr)
    handler.setLevel(logging.WARNING)
    handler.setFormatter(logging.Formatter("warning: %(message)s"))
    before, log.propagate = log.propagate, False
    log.addHandler(handler)
    try:
        yield
    finally:
        log.propagate = before
        log.removeHandler(handler)


@contextmanager
def at_once_on_interrupt() -> Generator[None]:
    """Ctrl-C ends the process at once: nothing is half written, and a running kernel would keep exit handlers waiting."""
    try:
        yield
    except KeyboardInterrupt:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            os.write(2, b"\nInterrupted.\n")
        os._exit(130)
