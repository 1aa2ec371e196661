"""The log of a run on a disk without room."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from retrain.errors import RunError
from retrain.runner import _logging
from retrain.tracking import layout

FULL = Path("/dev/full")


@pytest.mark.skipif(not FULL.exists(), reason="needs a device that is always full")
def test_a_log_that_cannot_be_closed_does_not_hide_the_error_of_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(logging, "raiseExceptions", False)
    (tmp_path / layout.EVENTS).symlink_to(FULL)
    closed = logging.FileHandler(tmp_path / layout.EVENTS)
    closed.emit(logging.makeLogRecord({"msg": "x"}))
    with pytest.raises(OSError, match="No space left"):
        closed.close()

    def run():
        with _logging(tmp_path, debug=False):
            raise RunError("metrics.jsonl cannot be written: No space left on device.", fix="make room")

    before = list(logging.getLogger("retrain").handlers)
    with pytest.raises(RunError, match=r"metrics\.jsonl cannot be written"):
        run()
    assert logging.getLogger("retrain").handlers == before
