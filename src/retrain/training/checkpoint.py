"""Checkpoints: a directory renamed into place with its manifest written last, so that a torn one is never read.

Leaves out what goes inside: the backend writes its files, the loop hands over one state mapping. A backend that can
copy itself in memory (``snapshot``) is written by a thread while the run goes on; the checkpoint counts when its last
byte is on disk.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any

from retrain.errors import ResumeError
from retrain.protocols import Backend, State
from retrain.tracking import layout
from retrain.tracking.run_log import write_atomically

log = logging.getLogger("retrain")

FORMAT = 1


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Checkpoints:
    """The checkpoints of one run directory; the newest ``keep`` and the best evaluated one stay.

    As a context it waits at its end for a checkpoint that is still being written.
    """

    def __init__(self, run_dir: Path, *, keep: int) -> None:
        self._run = run_dir
        self._root = run_dir / layout.CHECKPOINTS
        self._keep = keep
        self._best: dict[str, Any] | None = None
        self._writing: Future[None] | None = None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.wait()
        else:
            self.settle()

    def save(
        self, step: int, backend: Backend, state: State, *, accuracy: float | None, selected_on: str
    ) -> None:
        """Write the checkpoint of ``step`` completed steps and point ``trainer_state.json`` at it.

        ``accuracy`` is this step's evaluation if there was one; the highest so far is kept as "best", with a
        note that this selects on evaluation data. Returns when everything that may change is copied, or, for a
        backend without ``snapshot``, when all is written. The checkpoint before this one is waited for.
        """
        self.wait()
        name = layout.checkpoint_name(step)
        best = self._best
        if accuracy is not None and (best is None or accuracy > best["accuracy"]):
            best = {
                "checkpoint": name,
                "accuracy": accuracy,
                "note": f"selected on evaluation data ({selected_on})",
            }
        self._best = best
        text = (
            json.dumps({"format": FORMAT, "step": step, "best": best, **state}, indent=1, sort_keys=True)
            + "\n"
        )
        snapshot: Callable[[], Callable[[Path], None]] | None = getattr(backend, "snapshot", None)
        if snapshot is None:
            self._write(step, backend.save, text, best)
            return
        write, done = snapshot(), Future[None]()

        def work() -> None:
            try:
                self._write(step, write, text, best)
            except BaseException as failure:  # noqa: BLE001 - raised again by the thread that waits
                done.set_exception(failure)
            else:
                done.set_result(None)

        threading.Thread(target=work, name="retrain-checkpoint").start()
        self._writing = done

    def wait(self) -> None:
        """Wait until the checkpoint in flight is complete; raises what kept it from becoming so."""
        if self._writing is not None:
            # Not by joining the thread: a join that Ctrl-C interrupts takes the thread for ended (Python 3.11).
            failure = self._writing.exception()
            self._writing = None
            if failure is not None:
                raise failure

    def check(self) -> None:
        """Raise what kept the checkpoint in flight from completion, if that is known by now."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def settle(self) -> bool:
        """Wait like ``wait``, where another error is the one to show: what kept the checkpoint in flight from completion
        is logged, and the answer False."""
        try:
            self.wait()
        except Exception as failure:  # noqa: BLE001 - whatever it is, it came second
            log.warning("A checkpoint could not be written: %s", failure)
            return False
        return True

    def _write(
        self, step: int, write: Callable[[Path], None], state: str, best: Mapping[str, Any] | None
    ) -> None:
        self._root.mkdir(parents=True, exist_ok=True)
        name = layout.checkpoint_name(step)
        temporary = self._root / f".{name}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        write(temporary)
        (temporary / layout.STATE).write_text(state, encoding="utf-8")
        files = {}
        for path in sorted(p for p in temporary.rglob("*") if p.is_file()):
            _sync(path)
            files[str(path.relative_to(temporary))] = {"bytes": path.stat().st_size, "sha256": _digest(path)}
        manifest = temporary / layout.MANIFEST
        manifest.write_text(
            json.dumps({"format": FORMAT, "step": step, "files": files}, indent=1) + "\n", encoding="utf-8"
        )
        _sync(manifest)
        _sync(temporary)
        final = self._root / name
        if final.exists():
            # Only a checkpoint that was found torn, or a repeat of the same step, can stand here.
            shutil.rmtree(final)
        temporary.replace(final)
        _sync(self._root)
        pointer = {"format": FORMAT, "step": step, "checkpoint": f"{layout.CHECKPOINTS}/{name}", "best": best}
        write_atomically(self._run / layout.TRAINER_STATE, json.dumps(pointer, indent=2) + "\n")
        self._prune(best["checkpoint"] if best else "")

    def _prune(self, best: str) -> None:
        found = sorted(
            (s, p) for p in self._root.iterdir() if (s := layout.checkpoint_step(p.name)) is not None
        )
        for _, path in found[: -self._keep]:
            if path.name != best:
                shutil.rmtree(path)

    def newest(self) -> tuple[Path, State]:
        """The newest intact checkpoint and its state; torn or damaged ones are reported and left behind."""
        found: list[tuple[int, Path]] = []
        if self._root.is_dir():
            for path in self._root.iterdir():
                number = layout.checkpoint_step(path.name)
                if number is not None:
                    found.append((number, path))
        for _, path in sorted(found, reverse=True):
            wrong = damage(path)
            if not wrong:
                state = json.loads((path / layout.STATE).read_text(encoding="utf-8"))
                self._best = state.get("best")
                return path, state
            log.warning("Checkpoint %s is damaged (%s): using the one before it.", path, wrong)
        raise ResumeError(
            f"{self._run} holds no intact checkpoint.",
            fix="name a run directory with checkpoints/, or start anew with --overwrite.",
        )

    def discard_after(self, step: int) -> None:
        """Remove checkpoints of more than ``step`` completed steps (damaged ones) and unfinished writes."""
        if not self._root.is_dir():
            return
        for path in self._root.iterdir():
            number = layout.checkpoint_step(path.name)
            if path.name.endswith(".tmp") or (number is not None and number > step):
                shutil.rmtree(path)


def damage(path: Path) -> str:
    """What is wrong with a checkpoint directory, "" when every file matches its manifest."""
    try:
        manifest = json.loads((path / layout.MANIFEST).read_text(encoding="utf-8"))
        for name, facts in manifest["files"].items():
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != facts["bytes"] or _digest(file) != facts["sha256"]:
                return f"{name} does not match its checksum"
        if layout.STATE not in manifest["files"]:
            return f"{layout.STATE} is not in its manifest"
    except FileNotFoundError:
        return f"no {layout.MANIFEST}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{layout.MANIFEST} cannot be read"
    return ""
