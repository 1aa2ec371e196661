"""Where metrics go besides files: the console. Trackers join this table by name."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import IO, Any, Self, TextIO, cast

from rich.console import Console

from retrain import live
from retrain.tracking.vitals import Alarm


def step_line(step: int, m: Mapping[str, Any]) -> str:
    """One training step as one line, in the product's order of fields."""

    def number(key: str, form: str, none: str = "n/a") -> str:
        value = m.get(key)
        return none if value is None else format(value, form)

    loss = number("loss", ".4f", "none")
    if m.get("loss_is_placeholder"):
        loss += " (placeholder)"
    parts = [
        f"Step {step} [{m.get('condition', '')}]",
        f"loss={loss}",
        f"reward={number('mean_reward', '.3f')}",
        f"correct={number('correct_rate', '.1%')}",
        f"datums={m.get('num_datums', 0)}",
        f"bs={m.get('batch_size')}",
        f"gs={m.get('group_size')}",
        f"sepa_l={number('sepa_lambda', '.4f')}",
        f"time={number('step_time_s', '.1f')}s",
        f"len={number('mean_length', '.1f')}",
        f"cut={number('max_token_hit_rate', '.1%')}",
        f"ent={number('entropy_mean', '.3f')}",
    ]
    skipped = {
        k.removeprefix("skipped_"): v
        for k, v in m.items()
        if k.startswith("skipped_") and k != "skipped_update" and v
    }
    if skipped:
        parts.append("skipped=" + ", ".join(f"{v} {k.replace('_', ' ')}" for k, v in skipped.items()))
    return " | ".join(parts)


def evaluation_line(step: int, m: Mapping[str, Any]) -> str:
    """One evaluation as one line, and one more per suite."""
    places = [key.removesuffix("/accuracy") for key in m if key.startswith("eval/") and key.endswith("/accuracy")]
    return "\n".join(_evaluated(step, m, place) for place in places)


def _evaluated(step: int, m: Mapping[str, Any], place: str) -> str:
    of = {key: m.get(f"{place}/{key}") for key in ("source", "tasks", "samples", "mean_reward", "errors")}
    samples = "" if of["samples"] is None else f" x {of['samples']}"
    line = f"Eval after {step} steps [{of['source']}, {of['tasks']} tasks{samples}] | "
    accuracy = m[f"{place}/accuracy"]
    if accuracy is None:
        return line + f"reward={of['mean_reward']} | accuracy unknown: set reward.correct_at"
    low, high = m[f"{place}/accuracy_low"], m[f"{place}/accuracy_high"]
    line += f"accuracy={accuracy:.1%} (95% interval {low:.1%} to {high:.1%})"
    return line + (f" | errors={of['errors']}" if of["errors"] else "")


class Output:
    """A text stream to write to that never ends a run: what its encoding lacks is written as an escape, and once it
    fails (its reader went away, it was closed) it stays silent, because events.log has every line."""

    def __init__(self, stream: TextIO | None) -> None:
        self.stream = stream
        self._silent = stream is None

    @property
    def encoding(self) -> str:
        """What rich asks before it draws its bar."""
        return getattr(self.stream, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        """Is it a terminal that is still there?"""
        try:
            return self.stream is not None and self.stream.isatty()
        except (OSError, ValueError):
            return False

    def write(self, text: str) -> int:
        """Write what can be written."""
        if self.stream is not None and not self._silent:
            try:
                self._write(self.stream, text)
            except (OSError, ValueError):
                self._give_up(self.stream)
        return len(text)

    def flush(self) -> None:
        """Hand on what is buffered."""
        if self.stream is not None and not self._silent:
            try:
                self.stream.flush()
            except (OSError, ValueError):
                self._give_up(self.stream)

    def _write(self, stream: TextIO, text: str) -> None:
        try:
            stream.write(text)
        except UnicodeEncodeError:
            stream.write(text.encode(self.encoding, "backslashreplace").decode(self.encoding))

    def _give_up(self, stream: TextIO) -> None:
        self._silent = True
        if stream is not sys.__stdout__:
            return
        # What is left in its buffer would fail once more when the process flushes it at its end.
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            try:
                os.dup2(nowhere, stream.fileno())
            finally:
                os.close(nowhere)


class _OneAtATime(Console):
    """A console that one thread at a time writes to. rich works out how far up the view's last frame began some time
    before it writes; a frame of another height that is drawn in between would leave a line of itself behind."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._turn = threading.RLock()

    def __enter__(self) -> Self:
        self._turn.acquire()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        try:
            super().__exit__(*error)
        finally:
            self._turn.release()


def console() -> Console:
    """Standard output, for lines and a view below them."""
    # Guarded below rich, because rich ends the process when a pipe breaks.
    made = _OneAtATime(file=cast("IO[str]", Output(sys.stdout)), highlight=False, soft_wrap=True, markup=False)
    # A terminal breaks long lines between fields; a pipe gets each as one line.
    made.soft_wrap = not made.is_terminal
    return made


def shows_views(console: Console) -> bool:
    """Can the console draw over what it has drawn?"""
    return console.is_terminal and not console.is_dumb_terminal


class ConsoleSink:
    """Prints one line per step and evaluation; on a terminal the live view stays below them."""

    def __init__(self, *, total_steps: int, plain: bool) -> None:
        self._console = console()
        self._view: live.LiveView | None = None
        if shows_views(self._console) and not plain:
            self._view = live.LiveView(self._console, total_steps=total_steps)
            self._view.start()

    def follow(self, look: Callable[[], Mapping[str, Any]]) -> None:
        """Where the live view sees what the run does now."""
        if self._view is not None:
            self._view.look = look

    def device_memory(self) -> dict[str, Any]:
        """What the heartbeat says of a device's memory."""
        return live.device_memory()

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Print a step's or an evaluation's line."""
        if self._view is not None:
            self._view.log(step, metrics)
        if "eval/accuracy" in metrics:
            self._console.print(evaluation_line(step, metrics))
            return
        self._console.print(step_line(step, metrics))
        self._console.file.flush()

    def alarm(self, alarm: Alarm) -> None:
        """The log has printed it; the live view keeps it in sight."""
        if self._view is not None:
            self._view.alarm(alarm)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._view is not None:
            self._view.stop()
            self._view = None


class ConsoleHandler(logging.Handler):
    """Shows the package's log lines as bare text; above the live view while there is one, because rich then
    redirects ``sys.stdout``."""

    def __init__(self) -> None:
        super().__init__()
        self._output: Output | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record; warnings are marked, and alarms are marked by themselves."""
        is_alarm = str(record.msg).startswith("alarm: ")
        mark = "warning: " if record.levelno >= logging.WARNING and not is_alarm else ""
        if self._output is None or self._output.stream is not sys.stdout:
            self._output = Output(sys.stdout)
        self._output.write(mark + self.format(record) + "\n")
        self._output.flush()
