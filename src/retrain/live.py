"""The live view of a run: a few lines that stay below everything else on a terminal, and follow the run's heartbeat.

Leaves the terminal as it was however the run ends: the cursor is never hidden, and the last frame is wiped when there
is time for it. Drawn by rich in a thread of its own, so that a step of many minutes shows its progress too.
"""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from retrain.tracking.summary import duration, memory_text, sparkline, time_left, time_split
from retrain.tracking.vitals import Alarm, Row, is_evaluation, number

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

_KEPT = 200
"""Rows that the view looks back on."""
_EVERY_S = 0.25

_shown: list[LiveView] = []


def say(text: str) -> bool:
    """Show a line above the live view, soon; False where there is none. Safe in a signal handler: it only appends."""
    if not _shown:
        return False
    _shown[-1].pending.append(text)
    return True


def device_memory() -> dict[str, Any]:
    """Bytes of CUDA memory that torch holds in this process, over all its devices: ``device`` now, ``device_peak`` and
    ``device_total``; empty where torch has not been loaded or has not touched a device."""
    torch: Any = sys.modules.get("torch")
    # Nothing below calls the driver, which another thread may be recording a graph on.
    if not hasattr(torch, "cuda") or not torch.cuda.is_initialized():
        return {}
    devices = [d for d in range(torch.cuda.device_count()) if torch.cuda.memory_reserved(d)]
    if not devices:
        return {}
    return {
        "device": sum(torch.cuda.memory_reserved(d) for d in devices),
        "device_peak": sum(torch.cuda.max_memory_reserved(d) for d in devices),
        "device_total": sum(torch.cuda.get_device_properties(d).total_memory for d in devices),
    }


class LiveView:
    """Lines below a console's output. ``log`` and ``alarm`` feed it, ``look`` (a heartbeat) tells it what goes on now."""

    every_s = _EVERY_S
    """Seconds between two frames."""

    def __init__(self, console: Console, *, total_steps: int) -> None:
        self._console = console
        self._total = total_steps
        self._rows: deque[Row] = deque(maxlen=_KEPT)
        self._step = 0
        self._alarm: Alarm | None = None
        self._evaluation: Row | None = None
        self._live: Live | None = None
        self._thread: threading.Thread | None = None
        self._end = threading.Event()
        self._width = console.width
        self._drawn: list[str] = []
        self._plain = not (getattr(console.file, "encoding", "") or "").lower().startswith("utf")
        self.pending: deque[str] = deque()
        self.look: Callable[[], Mapping[str, Any]] | None = None

    def start(self) -> None:
        """Begin to draw."""
        from rich.live import Live

        # What other code prints goes above the view: rich takes over both streams meanwhile.
        self._live = Live(
            get_renderable=self._frame,
            console=self._console,
            auto_refresh=False,
            transient=True,
            vertical_overflow="crop",
        )
        # A hidden cursor would stay hidden after a kill.
        self._console.show_cursor = lambda show=True: False
        self._live.start()
        self._thread = threading.Thread(target=self._draw, name="retrain-live", daemon=True)
        self._thread.start()
        _shown.append(self)

    def _draw(self) -> None:
        while not self._end.wait(self.every_s):
            try:
                self.refresh()
            except Exception:  # noqa: BLE001 - a view that cannot be drawn must not end a run
                return

    def refresh(self) -> None:
        """Draw a frame, below what there is to say."""
        live = self._live
        if live is None:
            return
        while self.pending:
            self._console.print(self.pending.popleft())
        # The console before the view's own lock, in the order in which a print takes them.
        with self._console, live._lock:  # pyright: ignore[reportPrivateUsage]
            self._rewrapped(live)
            live.refresh()

    def _rewrapped(self, live: Live) -> None:
        """A terminal that became narrower has wrapped the last frame: it takes more lines than were drawn."""
        width = max(1, self._console.width)
        drawn: Any = getattr(live, "_live_render", None)
        shape: Any = getattr(drawn, "_shape", None)
        if shape is not None and width < self._width:
            wrapped = sum(max(1, -(-len(line) // width)) for line in self._drawn)
            drawn._shape = (shape[0], max(shape[1], wrapped))
        self._width = width

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """A step's or an evaluation's row."""
        row = {"step": step, **metrics}
        self._rows.append(row)
        if is_evaluation(row):
            self._evaluation = row
        else:
            self._step = step + 1

    def alarm(self, alarm: Alarm) -> None:
        """The last alarm stays in view."""
        self._alarm = alarm

    def stop(self) -> None:
        """Wipe the view; safe to call twice."""
        if self._live is None:
            return
        self._end.set()
        if self._thread is not None:
            self._thread.join(timeout=2)
        live, self._live = self._live, None
        if self in _shown:
            _shown.remove(self)
        with self._console:
            self._rewrapped(live)
            live.stop()
        while self.pending:
            self._console.print(self.pending.popleft())

    def _frame(self) -> Text:
        from rich.text import Text

        self._drawn = self.lines(max(20, self._console.width - 1))
        text = Text("\n".join(self._drawn), no_wrap=True, overflow="crop")
        text.highlight_regex(r"(?m)^alarm .*$", "yellow")
        return text

    def lines(self, width: int) -> list[str]:
        """The view in lines of at most ``width`` characters: the run, its learning, what it does now, its last alarm."""
        beat: Mapping[str, Any] = self.look() if self.look is not None else {}
        rows = list(self._rows)
        steps = [row for row in rows if not is_evaluation(row)]
        step = max(self._step, int(beat.get("step") or 0))
        left = time_left(rows, self._total - step)
        head = f"step {step}/{self._total} "
        tail = f" {step / self._total if self._total else 1:.0%}" + (
            f", {duration(left)} left" if left is not None else ""
        )
        lines = [head + self._bar(step, max(5, min(40, width - len(head) - len(tail)))) + tail]
        if steps:
            lines.append(self._learning(steps, width))
        now = self._now(beat)
        if now:
            lines.append(now)
        spent = ", ".join(f"{name} {part:.0%}" for name, part in time_split(steps).items())
        lines.append(_fitting([spent and f"time: {spent}", memory_text(beat.get("memory") or {})], width))
        if self._alarm is not None:
            lines.append(f"alarm at step {self._alarm.step}: {self._alarm.message}")
        return [line[:width] for line in lines if line]

    def _bar(self, step: int, width: int) -> str:
        full, empty = ("#", ".") if self._plain else ("━", "╌")
        done = min(width, step * width // self._total) if self._total else width
        return full * done + empty * (width - done)

    def _learning(self, steps: list[Row], width: int) -> str:
        last = steps[-1]
        parts: list[str] = []
        if (reward := number(last, "mean_reward")) is not None:
            parts.append(f"reward {reward:.3f}")
        correct = [value for row in steps if (value := number(row, "correct_rate")) is not None]
        if correct:
            parts.append(
                f"correct {correct[-1]:.1%} {sparkline(correct, max(5, min(30, width // 5)), plain=self._plain)}"
            )
        if (speed := number(last, "tokens_per_second")) is not None:
            parts.append(f"{speed:,.0f} tokens/s")
        if (
            self._evaluation is not None
            and (accuracy := number(self._evaluation, "eval/accuracy")) is not None
        ):
            parts.append(f"held-out {accuracy:.1%} after {self._evaluation['step']}")
        return _fitting(parts, width)

    @staticmethod
    def _now(beat: Mapping[str, Any]) -> str:
        phase, since, now = beat.get("phase"), beat.get("phase_since"), beat.get("time")
        if not phase or since is None or now is None:
            return ""
        text = str(phase)
        if beat.get("asked"):
            text += f" {beat.get('done') or 0}/{beat['asked']} rollouts"
        text += f", {duration(max(0.0, now - since))}"
        if drawn := beat.get("drawn"):
            text += f", {drawn:,} tokens"
            if now - since >= 1:
                text += f" ({drawn / (now - since):,.0f}/s)"
        return text


def _fitting(parts: Sequence[str], width: int) -> str:
    """The parts in one line, as many as fit whole."""
    line = ""
    for part in parts:
        longer = f"{line}   {part}" if line else part
        if part and len(longer) <= width:
            line = longer
    return line
