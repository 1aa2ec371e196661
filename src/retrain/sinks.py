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

log = logging.getLogger("retrain")


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
    if m.get("bp_action"):
        parts.append(f"bp={_pressure(m)}")
    return " | ".join(parts)


def _pressure(m: Mapping[str, Any]) -> str:
    """What back pressure decided in this step, for the next one, and why."""
    said, size = str(m["bp_action"]), m.get("bp_batch_size")
    if size is not None and size != m.get("batch_size"):
        said += f" to {size}"
    if m.get("bp_out_of_memory"):
        said += ", memory ran out"
    if m.get("bp_drifted"):
        said += ", throughput has changed"
    if m.get("bp_p_star") is not None and m.get("group_size"):
        said += f", peak near {_tasks(m, 'bp_p_star')} tasks"
    elif m.get("bp_sigma") is not None:
        said += ", no peak in sight"
    elif m["bp_action"] not in ("warm-up", "probe"):
        said += ", no fit"
    return said


def _tasks(m: Mapping[str, Any], key: str) -> str:
    return f"{m[key] / m['group_size']:,.3g}"


class BatchSizes:
    """What a run under back pressure measured, for the line at its end."""

    def __init__(self) -> None:
        self._rates: dict[int, list[float]] = {}
        self._last: Mapping[str, Any] | None = None

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Take in a training step. The first of a process loads and compiles, and one in which memory ran out was sampled
        twice: neither says how fast its size is."""
        if not metrics.get("bp_action"):
            return
        size, rate = metrics.get("batch_size"), metrics.get("tokens_per_second")
        if self._last is not None and size and rate and not metrics.get("bp_out_of_memory"):
            self._rates.setdefault(int(size), []).append(float(rate))
        self._last = metrics

    def advice(self) -> str:
        """Which size to use next time, and why; "" for a run without back pressure."""
        last = self._last
        if last is None or last.get("bp_batch_size") is None:
            return ""
        means = {size: sum(rates) / len(rates) for size, rates in sorted(self._rates.items())}
        fastest = max(means, key=lambda size: means[size], default=None)
        tried = f"{', '.join(map(str, means))} task{'s' * (list(means) != [1])}"
        ceiling = f" Memory ran out above {last['bp_ceiling']}." if last.get("bp_ceiling") else ""
        best = "" if fastest is None else f"{fastest} was the fastest, {means[fastest]:,.0f} tokens/s"
        if last["bp_action"] in ("warm-up", "probe"):
            sofar = f" Of {tried} {best} so far." if best else ""
            return f"Back pressure was still measuring: it recommends no batch size yet.{sofar}{ceiling}"
        size = last["bp_batch_size"]
        if last.get("bp_p_star") is not None and last.get("group_size"):
            low, high = (_tasks(last, key) if last.get(key) is not None else "" for key in ("bp_p_star_low", "bp_p_star_high"))
            interval = f" (95 % interval {low} {f'to {high}' if high else 'upwards'})" if low else ""
            why = f"throughput peaks near {_tasks(last, 'bp_p_star')} tasks{interval}"
            if last["bp_action"] == "grow":
                why += ", and the size was still growing towards that"
        elif last.get("bp_sigma") is not None:
            why = f"throughput has no peak in sight up to {max([size, *means])} tasks"
        elif fastest is None:
            return ""
        else:
            size, why = fastest, f"no law fitted what was measured; of {tried} {best}"
        return f"Back pressure: use training.batch_size = {size} next time. Why: {why}.{ceiling}"


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
        self._sizes = BatchSizes()
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
        self._sizes.log(metrics)
        self._console.print(step_line(step, metrics))
        self._console.file.flush()

    def alarm(self, alarm: Alarm) -> None:
        """The log has printed it; the live view keeps it in sight."""
        if self._view is not None:
            self._view.alarm(alarm)

    def close(self) -> None:
        """Leave the terminal as it was, and say what back pressure found."""
        if self._view is not None:
            self._view.stop()
            self._view = None
        if said := self._sizes.advice():
            log.info(said)
        self._sizes = BatchSizes()


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
