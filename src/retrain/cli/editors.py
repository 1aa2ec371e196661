"""``retrain schema``: a JSON Schema of the configuration, for editors."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from retrain.cli.verb import own_flags
from retrain.errors import UsageError


def write_schema(arguments: Sequence[str]) -> int:
    """The command ``schema``."""
    own, rest = own_flags("schema", arguments, values=("--output",), switches=("--json",))
    if rest:
        raise UsageError(f"unexpected argument {rest[0]!r}.", fix="`retrain schema --help` lists what there is.")
    if "--output" in own and "--json" in own:
        raise UsageError("--output and --json exclude each other.", fix="give one of them.")
    import json

    from retrain.config.json_schema import json_schema, use

    text = json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"
    if "--output" in own:
        path = own["--output"]
        _write(Path(path), text)
        print(f"Wrote {path}. In a TOML file beside it, the first line turns it on:\n\n  {use(Path(path).name)}")
        return 0
    print(text, end="")
    if "--json" not in own:
        print(
            "To use it: retrain schema --output retrain.schema.json; then, as the first line of a TOML file beside it:\n"
            f"  {use('retrain.schema.json')}",
            file=sys.stderr,
        )
    return 0


def _write(path: Path, text: str) -> None:
    """Write a new file, or over an older schema of ours; UsageError for anything else that is there."""
    from retrain.config.json_schema import TITLE

    try:
        if path.exists() and f'"title": "{TITLE}"' not in path.read_text(encoding="utf-8", errors="replace"):
            raise UsageError(f"{path}: there is a file, and it is no schema of ours.", fix="name another one.")
        path.write_text(text, encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UsageError(f"{path}: cannot be written: {reason}.", fix="name another place.") from error
