"""``.env`` in the working directory: fills environment variables that are unset, never prints a value."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

_LINE = re.compile(r"(?:export\s+)?([A-Za-z_][A-Za-z0-9_]*)\s*=\s*(.*)")
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", '"': '"', "\\": "\\", "$": "$"}


def load(path: Path = Path(".env")) -> list[str]:
    """Set the variables of a file that the environment lacks; returns their names.

    Lines are NAME=value, with optional quotes; what cannot be read is said on stderr, by line number only.
    """
    if os.environ.get("RETRAIN_NO_DOTENV") == "1" or not path.is_file():
        return []
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError):
        print(f"{path} is not used: it cannot be read as UTF-8 text.", file=sys.stderr)
        return []
    loaded: list[str] = []
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        match = _LINE.fullmatch(text)
        value = _value(match[2]) if match else None
        if match is None or value is None or "\0" in value:
            print(f"{path}:{number}: skipped, this is not NAME=value.", file=sys.stderr)
        elif match[1] not in os.environ:
            os.environ[match[1]] = value
            loaded.append(match[1])
    if loaded:
        print(f"Loaded {path}")
    return loaded


def _value(text: str) -> str | None:
    """The value of a line; None when its quotes do not close."""
    if text[:1] not in ("'", '"'):
        return re.split(r"\s+#", text, maxsplit=1)[0].strip()
    quote = text[0]
    body = re.match(r"'([^']*)'" if quote == "'" else r'"((?:[^"\\]|\\.)*)"', text)
    if body is None or not re.fullmatch(r"\s*(#.*)?", text[body.end() :]):
        return None
    if quote == "'":
        return body[1]
    return re.sub(r"\\(.)", lambda m: _ESCAPES.get(m[1], m[0]), body[1])
