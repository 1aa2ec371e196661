"""The folder that a squeeze in a process of its own writes: what it must not touch, and how its files come there whole."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from retrain.errors import ConfigError, RunError
from retrain.tracking.run_log import write_atomically

MARKER = "retrain_export.json"
"""As of ``retrain export``: lists what was written, so that --overwrite replaces it."""

RECORD = "squeeze.json"
"""The analysis, beside the adapter at a smaller rank; ``squeezed_from`` in it is the absolute path of the run or the adapter."""

_TEMPORARY = ".squeeze-"


def check(output: Path, adapter: Path | None = None) -> None:
    """ConfigError where ``output`` is no folder, or holds anything; of ``adapter`` (None: not known yet) its own earlier
    squeeze may be there, also one that was cut off."""
    where = f"squeeze.output_path = {str(output)!r}"
    if adapter is not None:
        own, place = Path(os.path.realpath(adapter)), Path(os.path.realpath(output))
        if any(same(p, own) for p in (place, *place.parents)):
            raise ConfigError(f"{where} is the adapter that is squeezed, or lies in it.", fix="name another folder.")
    try:
        held = sorted(p.name for p in output.iterdir()) if os.path.lexists(output) else []
    except OSError as error:
        raise ConfigError(f"{where} is no folder to write to: {error.strerror}.", fix="name a new folder.") from error
    if not held:
        return
    if adapter is None:
        raise ConfigError(f"{where} is not empty: it holds {held[0]}.", fix="name a new folder, or empty this one.")
    marked = _marked(output)
    if marked.get("adapter") != os.path.realpath(adapter):
        raise ConfigError(
            f"{where} is not empty: it holds {held[0]}, which no squeeze of {adapter} wrote.",
            fix="name a new folder, or empty this one.",
        )


def uncompressed(record: Mapping[str, Any], key: str) -> str:
    """What to say of an adapter that was written at its own rank, with the rank that would do after ``key``; "" of another."""
    made: Mapping[str, Any] | None = record.get("compressed")
    if made is None or made["compresses"]:
        return ""
    least = record["least_rank"]
    share = f"{100 * record['min_variance_retention']:g} % of the variance"
    if least >= record["rank"]:
        return f"nothing is compressed: rank {record['rank']} is the adapter's own, and no lower one keeps {share}."
    return (
        f"nothing is compressed: rank {record['rank']} is the adapter's own; {key} {least} is the least that keeps {share}."
    )


def same(a: Path, b: Path) -> bool:
    """Are both one folder, in whatever spelling?"""
    return a == b or (a.exists() and b.exists() and a.samefile(b))


@contextlib.contextmanager
def placed(output: Path, adapter: Path, facts: Mapping[str, Any]) -> Generator[Path]:
    """A temporary folder inside; its files are in ``output`` afterwards, beside a marker with ``facts``. Nothing of an
    earlier squeeze is touched before that. ConfigError as of ``check``, and where a file that no squeeze wrote is in the
    way; RunError when there is no room."""
    check(output, adapter)
    try:
        output.mkdir(parents=True, exist_ok=True)
        earlier = _files(output)
        # Before anything else, so that a squeeze that is killed can be made again.
        _mark(output, adapter, facts, earlier)
        for left in output.glob(f"{_TEMPORARY}*"):
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=output, prefix=_TEMPORARY) as made:
            yield Path(made)
            files = sorted(p.name for p in Path(made).iterdir())
            for name in sorted(set(files) - set(earlier)):
                if os.path.lexists(output / name):
                    raise ConfigError(
                        f"squeeze.output_path = {str(output)!r} holds {name}, which no squeeze wrote and this one would "
                        "replace.",
                        fix="move it away, or name a new folder.",
                    )
            _mark(output, adapter, facts, sorted({*earlier, *files}))
            for name in files:
                (Path(made) / name).replace(output / name)
            _mark(output, adapter, facts, files)
    except OSError as error:
        raise RunError(
            f"{output} cannot be written: {error.strerror or error}.", fix="make room, or name another folder."
        ) from error


def _mark(output: Path, adapter: Path, facts: Mapping[str, Any], files: Sequence[str]) -> None:
    written = {**facts, "adapter": os.path.realpath(adapter), "files": list(files)}
    write_atomically(output / MARKER, json.dumps(written, indent=2) + "\n")


def _marked(output: Path) -> dict[str, Any]:
    try:
        found: object = json.loads((output / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return cast("dict[str, Any]", found) if isinstance(found, dict) else {}


def _files(output: Path) -> list[str]:
    files: object = _marked(output).get("files")
    return [str(name) for name in cast("list[object]", files)] if isinstance(files, list) else []
