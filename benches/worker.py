"""The pipe between the driver and one side: a line of JSON in per step, a line of JSON out, and what a step cost.

The worker computes only between the two lines. Its own output goes to standard error, so that nothing a library
prints can be taken for an answer.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any


def peak_bytes() -> int:
    """Largest resident size since the start or the last ``reset_peak``."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return 0


def reset_peak() -> bool:
    """Let the peak start again from what is resident now; False where the kernel does not allow it."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except OSError:
        return False
    return True


class Pipe:
    """``next()`` answers for the step before and waits for the next one; None ends the run."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)
        self._begun: tuple[float, float, dict[str, float]] | None = None
        self.parts: dict[str, float] = {}
        """Seconds of the step's parts, by name: whoever measures one adds it here."""

    def say(self, message: dict[str, Any]) -> None:
        """One line to the driver."""
        self._out.write(json.dumps(message) + "\n")
        self._out.flush()

    def next(self) -> dict[str, Any] | None:
        """Report what the step took, then block until there is another."""
        if self._begun is not None:
            wall, cpu, _ = self._begun
            self.say(
                {
                    "wall_s": time.perf_counter() - wall,
                    "cpu_s": time.process_time() - cpu,
                    "peak_bytes": peak_bytes(),
                    "parts": {k: round(v, 6) for k, v in self.parts.items()},
                }
            )
        else:
            self.say({"ready": True, "peak_bytes": peak_bytes()})
        line = sys.stdin.readline()
        message = json.loads(line) if line.strip() else None
        if message is None or message.get("stop"):
            return None
        if message.get("reset_peak"):
            reset_peak()
        self.parts = {}
        self._begun = (time.perf_counter(), time.process_time(), {})
        return message
