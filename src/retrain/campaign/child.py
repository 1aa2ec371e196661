"""The process of one run of a campaign: ``python -m retrain.campaign.child CONFIG DIRECTORY``.

Its standard input is a lifeline that the campaign holds open: when it closes, because the campaign stops or is gone, the
run finishes its step, saves, and ends as interrupted, so that no run goes on unseen.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from retrain.config.load import Override, load
from retrain.errors import ResumeError, RetrainError
from retrain.tracking import layout
from retrain.tracking.read import is_locked
from retrain.training.checkpoint import Checkpoints

_PATIENCE_S = 600.0
"""How long a run waits for the process of an earlier campaign that still finishes its step in the same directory."""


def main(arguments: Sequence[str]) -> int:
    """Run, or go on with, one run; exit codes as of ``retrain``."""
    config, directory = Path(arguments[0]), Path(arguments[1])
    stop = threading.Event()
    threading.Thread(target=_until_let_go, args=(stop,), daemon=True).start()
    signal.signal(signal.SIGTERM, lambda number, frame: stop.set())
    # Ctrl-C reaches every process of a terminal; the campaign decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The daemon thread sits in a read of standard input, which the interpreter's own end would wait for.
    code = _guarded(config, directory, stop)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _until_let_go(stop: threading.Event) -> None:
    while os.read(0, 4096):
        pass
    stop.set()


def _guarded(config: Path, directory: Path, stop: threading.Event) -> int:
    try:
        return run(config, directory, stop)
    except RetrainError as error:
        print(f"retrain: {error}", file=sys.stderr)
        return error.exit_code
    except Exception:  # noqa: BLE001 - a bug ends this run alone; its trace stands in the run's output
        traceback.print_exc()
        return 1


def run(config: Path, directory: Path, stop: threading.Event) -> int:
    """Bring the run in ``directory`` to its end, from its newest checkpoint where it has one."""
    from retrain.runner import execute

    _wait_for_others(directory, stop)
    # Before the directory is taken: a campaign that starts anew right after this one was killed finds it free.
    if stop.is_set():
        return 130
    how = begin(directory)
    overrides = [Override.of("resume.from", str(directory))] if how == "resume" else []
    # --resume reads what the run recorded; the file of the campaign says the same.
    result = execute(load(config, overrides), overwrite=how == "overwrite", plain=True, stop=stop, for_campaign=True)
    return {"done": 0, "failed": 1, "interrupted": 130}[result.status]


def begin(directory: Path) -> str:
    """"new", "resume" from a checkpoint that is whole, or "overwrite" what came to nothing."""
    if not layout.holds_run(directory):
        # Killed before its first record: what stands there is ours.
        if directory.is_dir():
            layout.clear(directory)
        return "new"
    try:
        Checkpoints(directory, keep=1).newest()
    except ResumeError:
        return "overwrite"
    return "resume"


def _wait_for_others(directory: Path, stop: threading.Event) -> None:
    end, lock = time.monotonic() + _PATIENCE_S, directory / layout.LOCK
    has_waited = False
    while time.monotonic() < end and not stop.is_set() and lock.exists() and is_locked(lock):
        if not has_waited:
            print(f"Waiting for the process of an earlier start to leave {directory} ...", flush=True)
        has_waited = True
        time.sleep(0.2)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
