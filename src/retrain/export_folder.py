"""The folder that an export writes: what it must not touch, and the marker that lets a later export replace it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, cast

from retrain.errors import UsageError
from retrain.renderer import model_path
from retrain.subject import Subject, run_around
from retrain.tracking.run_log import write_atomically

MARKER = "retrain_export.json"
"""Lists what an export wrote. Only where it lies may a later export delete something, and only what it lists."""


def check(output: Path, subject: Subject, model: str, *, overwrite: bool) -> None:
    """UsageError, before anything is written, when ``output`` (absolute) may not become an export of ``subject``.

    It may neither be, hold nor lie in the base models (``model`` and the subject's own) or the adapter; nor be or lie in
    a run directory; nor hold anything, unless ``overwrite`` and an earlier export's marker is there.
    """
    place = Path(os.path.realpath(output))
    if run := run_around(place):
        raise UsageError(
            f"--output {output} lies in what is exported."
            if subject.directory and _same(run, subject.directory.resolve())
            else f"--output {output} lies in the run directory {run}.",
            fix="name a folder outside of run directories.",
        )
    assert subject.adapter is not None  # what is exported has one
    for kept in (subject.directory, subject.adapter):
        if kept is not None and _overlap(place, kept.resolve()):
            raise UsageError(
                f"--output {output} lies in what is exported, or holds it.", fix="name another folder."
            )
    own = subject.settings.get("model", {}).get("model", "")
    for name in dict.fromkeys((model, str(own))):
        base = Path(model_path(name)) if name else Path()
        if name and base.is_dir() and _uses(base.resolve(), place):
            raise UsageError(
                f"--output {output} is the base model {name}, lies in it or holds files of it.",
                fix="name another folder.",
            )
    try:
        held = sorted(output.iterdir()) if output.exists() else []
    except OSError as error:
        raise UsageError(
            f"--output {output} is no folder to write to: {error.strerror}.", fix="name a new folder."
        ) from error
    if not held:
        return
    if not overwrite:
        raise UsageError(
            f"--output {output} is not empty: it holds {held[0].name}.",
            fix="name a new folder, or add --overwrite to replace an earlier export there.",
        )
    if not os.path.isfile(output / MARKER):
        raise UsageError(
            f"--output {output} holds {held[0].name} and no {MARKER}: no export wrote it.",
            fix="name a new folder, or empty this one.",
        )
    _listed(output)


def place(made: Path, output: Path, facts: Mapping[str, Any]) -> list[str]:
    """Move the export in ``made`` into ``output`` in place of an earlier one there; the names of its files.

    ``facts`` go into the marker. UsageError, with nothing changed, where a file that no export wrote is in the way.
    """
    earlier = _listed(output)
    (made / MARKER).unlink(missing_ok=True)  # of the export that the adapter was read from
    files = sorted(p.relative_to(made).as_posix() for p in made.rglob("*") if p.is_file())
    for name in sorted(set(files) - set(earlier)):
        if os.path.lexists(output / name):
            raise UsageError(
                f"--output {output} holds {name}, which no export wrote and this one would replace.",
                fix="move it away, or name a new folder.",
            )
    # Old and new files are listed before the first is touched: an export that is cut off can be overwritten.
    _mark(output, sorted({*earlier, *files}), facts)
    for name in earlier:
        if not (output / name).is_dir():
            (output / name).unlink(missing_ok=True)
    for name in files:
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).replace(output / name)
    _mark(output, files, facts)
    return files


def _mark(output: Path, files: Sequence[str], facts: Mapping[str, Any]) -> None:
    # ASCII: names of folders may hold bytes that are no UTF-8.
    write_atomically(output / MARKER, json.dumps({**facts, "files": list(files)}, indent=2) + "\n")


def _listed(output: Path) -> list[str]:
    """The files that an earlier export wrote; empty without a marker, UsageError for one that says something else."""
    where = output / MARKER
    if not os.path.isfile(where):
        return []
    try:
        found: object = json.loads(where.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        found = None
    files = cast("dict[str, object]", found).get("files") if isinstance(found, dict) else None
    names = cast("list[object]", files) if isinstance(files, list) else [None]
    inside = [name for name in names if isinstance(name, str) and _is_inside(output, name)]
    if len(inside) != len(names):
        raise UsageError(
            f"{where} is no list of an export's files.", fix="name a new folder, or empty this one."
        )
    return inside


def _is_inside(output: Path, name: str) -> bool:
    path = PurePosixPath(name)
    if not path.parts or path.is_absolute() or ".." in path.parts or "\0" in name:
        return False
    parent, root = (output / name).parent.resolve(), output.resolve()
    return parent == root or root in parent.parents


def _same(a: Path, b: Path) -> bool:
    # Two spellings of one folder: mounted twice, or on a disk that ignores case.
    return a == b or (a.exists() and b.exists() and a.samefile(b))


def _overlap(a: Path, b: Path) -> bool:
    """Whether one of two resolved paths is the other or lies in it."""
    return any(_same(p, b) for p in (a, *a.parents)) or any(_same(p, a) for p in b.parents)


def _uses(base: Path, place: Path) -> bool:
    """Whether the model folder and ``place`` overlap, or files of the model are links to some in ``place``."""
    return _overlap(place, base) or any(place in file.resolve().parents for file in base.iterdir())
