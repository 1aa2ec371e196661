"""Standard streams of a command whose stdout is its result: prompts that come in as lines, and results that go out alone."""

from __future__ import annotations

import codecs
import contextlib
import io
import json
import os
import sys
from collections.abc import Generator
from contextlib import contextmanager
from typing import TextIO

from retrain.errors import RunError, UsageError


class Results:
    """Where a command's results go. What the stream's encoding lacks is written as an escape."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def record(self, text: str) -> None:
        """Write one JSON object, in which everything that is not ASCII stands in strings."""
        try:
            text.encode(self._stream.encoding or "utf-8")
        except UnicodeEncodeError:
            text = json.dumps(json.loads(text))
        self.line(text)

    def line(self, text: str) -> None:
        """Write a line and hand it on at once; RunError where that fails, BrokenPipeError where nobody reads."""
        text += "\n"
        try:
            try:
                self._stream.write(text)
            except UnicodeEncodeError:
                encoding = self._stream.encoding or "utf-8"
                self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
            self._stream.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise RunError(
                f"the result cannot be written: {error.strerror or error}.",
                fix="make room, or write it elsewhere.",
            ) from error


@contextmanager
def results(*, alone: bool) -> Generator[Results]:
    """The stream of results. ``alone``: whatever else prints meanwhile (a reward, a plug-in, a library, a child process)
    writes to stderr, through ``print`` and through file descriptor 1 alike."""
    out = sys.stdout
    if not alone:
        yield Results(out)
        return
    out.flush()
    try:
        number = out.fileno()
    except (OSError, ValueError):  # no file: a test's or a notebook's stream
        with contextlib.redirect_stdout(sys.stderr):
            yield Results(out)
        return
    kept = os.dup(number)
    stream = open(kept, "w", encoding=out.encoding, closefd=False)  # noqa: SIM115  closed below
    try:
        _send(number, "stderr")
        with contextlib.redirect_stdout(sys.stderr):
            yield Results(stream)
    finally:
        with contextlib.suppress(OSError):
            stream.close()
        _flush_c()
        os.dup2(kept, number)
        os.close(kept)


def _send(number: int, name: str) -> None:
    try:
        os.dup2(getattr(sys, name).fileno(), number)
    except (OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, number)
        os.close(nowhere)


def _flush_c() -> None:
    """What C code printed waits in its own buffer, which must not be emptied behind the results."""
    with contextlib.suppress(Exception):
        import ctypes

        ctypes.CDLL(None).fflush(None)


def finish() -> None:
    """Nothing is a result any more: what threads and exit handlers still print goes to stderr."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        _send(sys.stdout.fileno(), "stderr")


def is_terminal() -> bool:
    """Whether a person types; UsageError for a closed stdin."""
    try:
        return sys.stdin.isatty()
    except (AttributeError, ValueError) as error:
        raise UsageError(
            "stdin is closed, and no prompt was given.", fix="give one: --prompt TEXT."
        ) from error


def lines() -> Generator[tuple[int, str, bool]]:
    """Lines of stdin without their ends: number from 1, text, and whether it was valid text (bytes that are none are
    escapes in it). Blank ones are left out. UsageError when stdin cannot be read."""
    encoding = getattr(sys.stdin, "encoding", None) or "utf-8"
    if codecs.lookup(encoding).name == "ascii":
        encoding = "utf-8"  # which holds all of ASCII
    binary = getattr(sys.stdin, "buffer", None) or io.BytesIO(sys.stdin.read().encode(errors="surrogatepass"))
    try:
        for number, line in enumerate(binary, start=1):
            raw: bytes = line.rstrip(b"\r\n")
            if not raw.strip():
                continue
            try:
                text, valid = raw.decode(encoding), True
            except UnicodeDecodeError:
                text, valid = raw.decode(encoding, "backslashreplace"), False
            yield number, text, valid
    except OSError as error:
        raise UsageError(
            f"stdin cannot be read: {error.strerror or error}.", fix="give a --prompt, or a pipe."
        ) from error
