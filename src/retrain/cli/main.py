"""The command line's entry: looks at the first word and imports only what that command needs."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from retrain.cli.commands import COMMANDS, LATER

_QUICK = ("explain", "status", "diff", "why", "plugins", "backends")
"""Commands that only read and print."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns 0 done, 1 failed, 2 wrong usage or configuration, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started us
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  open to the end
    try:
        code = _dispatch(arguments)
        sys.stdout.flush()
        if argv is None and "--json" in arguments:
            from retrain.cli import streams

            streams.finish()
        if argv is None and arguments[:1] and arguments[0] in _QUICK:
            # Taking thousands of objects apart would cost a tenth of their time, and they leave nothing else to end.
            sys.stderr.flush()
            os._exit(code)
    except BrokenPipeError:
        # The reader of our output went away, as in `retrain man | head`.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130
    except Exception as error:
        from retrain.errors import RetrainError

        if not isinstance(error, RetrainError):
            raise
        if "--debug" in arguments:
            import traceback

            traceback.print_exc()
        print(error, file=sys.stderr)
        return error.exit_code
    return code


def _dispatch(arguments: list[str]) -> int:
    first = arguments[0] if arguments else ""
    if first in ("--version", "-V"):
        from retrain import __version__

        print(f"retrain {__version__}")
        return 0
    asked = [a for a in arguments if a in ("--help", "-h")]
    if first == "help" or asked:
        from retrain.cli.manual import print_help

        words = [a for a in arguments[first == "help" :] if a not in asked]
        return print_help(words[:1] if first != "help" else words)
    if first in COMMANDS:
        from importlib import import_module

        module, _, attribute = COMMANDS[first][0].partition(":")
        return getattr(import_module(module), attribute)(arguments[1:])
    if first in LATER:
        from retrain.errors import UsageError

        raise UsageError(f"retrain {first} is not in this version.", fix="`retrain --help` lists what is.")
    if sys.stdin is None:  # closed: nobody answers questions
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115  open to the end
    from retrain.cli.run import run

    return run(arguments)
