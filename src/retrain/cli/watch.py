"""``retrain status`` and ``retrain top``: how runs are doing."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrain.cli import streams
from retrain.cli.verb import own_flags
from retrain.errors import UsageError

if TYPE_CHECKING:
    from retrain.campaign.progress import Progress
    from retrain.tracking.read import RunRecord
    from retrain.tracking.summary import Detail, Summary

USAGE = {
    "status": """\
Usage: retrain status [PATH ...] [--watch] [--interval S] [--json]

How runs are doing. PATH is a run directory, a campaign or a folder of runs; without one: logs. A single run directory
shows more: what it does now, every core metric with its healthy range, alarms, evaluations, checkpoints. A single
campaign shows how far it is, its runs by seed and condition, those that go on, and those that stopped with the reason; in a
folder of runs it is one line.

  --watch          refresh until Ctrl-C
  --interval S     seconds between two refreshes (default 2)
  --json           print one JSON object

States: running; silent (its process is there and has not beaten for half a minute); hung (it beats, and nothing has moved
for much longer than usual); dead (its process is gone); done, failed, interrupted. Reward, correct rate and tokens/s are
means over the last 5 steps; an evaluation stands with its 95 % interval.
""",
    "top": """\
Usage: retrain top [PATH ...] [--interval S] [--json]

The runs that are going on, live; q or Ctrl-C leaves. PATH is as for status. From a pipe: printed once.

  --interval S     seconds between two refreshes (default 2)
  --json           print one JSON object, once
""",
}

_DEFAULT = "logs"
_COLORS = {
    "running": "32", "failed": "31", "dead": "31", "hung": "31", "silent": "33", "interrupted": "33", "unknown": "33",
}  # fmt: skip
_GOING = ("running", "silent", "hung", "dead")
_CURVE = 24


def status(arguments: Sequence[str]) -> int:
    """The command ``status``."""
    own, paths = own_flags(
        "status", arguments, values=("--interval",), switches=("--json", "--watch", "--debug")
    )
    every = _interval(own.get("--interval"))
    if "--watch" in own and "--json" in own:
        raise UsageError("--watch prints for people.", fix="leave out --watch or --json.")
    if "--interval" in own and "--watch" not in own:
        raise UsageError("--interval is that of --watch.", fix="add --watch.")
    with streams.results(alone="--json" in own) as out:
        if "--json" in own:
            out.record(_document(paths))
        elif "--watch" in own:
            _refresh(lambda: _shown(paths), every, out, keys=False)
        else:
            out.line(_shown(paths))
    return 0


def top(arguments: Sequence[str]) -> int:
    """The command ``top``."""
    own, paths = own_flags("top", arguments, values=("--interval",), switches=("--json", "--debug"))
    every = _interval(own.get("--interval"))
    with streams.results(alone="--json" in own) as out:
        if "--json" in own:
            out.record(_document(paths, going=True))
        elif sys.stdout.isatty() and sys.stdin.isatty():
            _refresh(lambda: _going(paths, shutil.get_terminal_size().columns), every, out, keys=True)
        else:
            out.line(_going(paths, None))
    return 0


def _interval(text: str | None) -> float:
    try:
        seconds = 2.0 if text is None else float(text)
    except ValueError:
        seconds = 0.0
    if not 0.1 <= seconds <= 86400:
        raise UsageError(
            f"--interval {text} is not a number of seconds from 0.1 to 86400.", fix="--interval 2"
        )
    return seconds


def _runs(paths: Sequence[str]) -> list[RunRecord]:
    from retrain.tracking.read import find_runs

    for path in paths:
        if path.startswith("-"):
            raise UsageError(f"unknown option {path}.", fix="retrain status --help lists them.")
        if not os.path.isdir(path):
            raise UsageError(
                f"{path} is no folder.", fix="name a run directory or a folder of runs, such as logs."
            )
    found = {run.path.resolve(): run for path in (paths or [_DEFAULT]) for run in find_runs(path)}
    return list(found.values())


def _single(paths: Sequence[str]) -> RunRecord | None:
    """The run, where exactly one run directory is named."""
    from retrain.tracking import layout
    from retrain.tracking.read import RunRecord

    if len(paths) != 1 or not os.path.isdir(paths[0]):
        return None
    run = RunRecord(Path(paths[0]))
    return run if layout.holds_run(run.path) or run.is_starting else None


def _campaign(paths: Sequence[str]) -> Progress | None:
    """The campaign, where exactly one campaign's directory is named."""
    from retrain.tracking import layout

    if len(paths) != 1 or not os.path.isdir(paths[0]) or not layout.holds_campaign(Path(paths[0])):
        return None
    from retrain.campaign import progress

    return progress.look(Path(paths[0]))


def campaign_text(found: Progress) -> str:
    """A campaign: how far it is, its runs by seed and condition, those that go on, and those that stopped."""
    from retrain.campaign import progress

    head, rows, left = progress.grid(found)
    shown = [*progress.header(found), "", *_aligned(head, rows, right=()), *left]
    if found.going:
        shown += ["", table_text(found.going)]
    stopped = progress.stopped(found)
    return "\n".join([*shown, *([""] if stopped else []), *stopped])


def _document(paths: Sequence[str], *, going: bool = False) -> str:
    import json

    from retrain.tracking.summary import examine, summarize

    runs: list[dict[str, object]] = []
    single = None if going else _single(paths)
    for run in [single] if single else _runs(paths):
        summary = summarize(run)
        if not going or summary.state in _GOING:
            runs.append({**summary.record(), **(examine(run).record() if single else {})})
    campaign = _campaign(paths)
    more = {"campaign": campaign.record()} if campaign else {}
    return json.dumps({"time": time.time(), "runs": runs, **more}, ensure_ascii=False)


def _shown(paths: Sequence[str]) -> str:
    from retrain.tracking.summary import examine, summarize

    single = _single(paths)
    if single is not None:
        return detail_text(summarize(single), examine(single), single)
    campaign = _campaign(paths)
    if campaign is not None:
        return campaign_text(campaign)
    from retrain.cli.watch_campaigns import apart, line

    runs, campaigns = apart([Path(path) for path in paths or [_DEFAULT]], _runs(paths))
    parts = [table_text([summarize(run) for run in runs])] if runs else []
    parts += ["\n".join(map(line, campaigns))] if campaigns else []
    return "\n\n".join(parts) or _nothing(paths)


def _nothing(paths: Sequence[str]) -> str:
    return f"No runs in {', '.join(paths) or _DEFAULT}."


def table_text(runs: Sequence[Summary]) -> str:
    """Runs as a table, and below it a line for each that needs somebody."""
    from retrain.tracking.summary import duration

    now = time.time()
    head = (
        "run",
        "state",
        "step",
        "reward",
        "correct",
        "evaluation",
        "tokens/s",
        "time",
        "alarms",
        "updated",
    )
    rows = [
        (
            run.path,
            run.state,
            _progress(run),
            "-" if run.reward is None else f"{run.reward:.3f}",
            "-" if run.correct is None else f"{run.correct:.1%}",
            _evaluated(run.evaluation),
            "-" if run.tokens_per_second is None else f"{run.tokens_per_second:,.0f}",
            _time(run),
            str(run.alarms or "-"),
            "-" if run.updated is None else f"{duration(max(0.0, now - run.updated))} ago",
        )
        for run in runs
    ]
    lines = _aligned(head, rows, right=(2, 3, 4, 6))
    notes = [f"{run.path} is {run.state}: {run.todo}." for run in runs if run.todo]
    notes += [
        f"{run.path}: alarm at step {run.alarm['step']}: {run.alarm['message']}"
        for run in runs
        if run.alarm and run.state in _GOING
    ]
    return "\n".join([*lines, *([""] if notes else []), *notes])


def _going(paths: Sequence[str], width: int | None) -> str:
    from retrain.tracking.summary import duration, size, summarize

    everything = [(run, summarize(run)) for run in _runs(paths)]
    runs = [(run, s) for run, s in everything if s.state in _GOING]
    others = len(everything) - len(runs)
    ended = f", {others} ended" if others else ""
    clock = time.strftime("%H:%M:%S", time.localtime(time.time()))
    lines = [f"{clock}   {len(runs)} going{ended}" + ("   q leaves" if width else "")]
    campaign = _campaign(paths)
    if campaign is not None:
        from retrain.campaign import progress

        lines += progress.header(campaign)
    elif not everything:
        lines.append(_nothing(paths))
    if runs:
        head = ("run", "state", "now", "step", "left", "reward", "correct", "", "tokens/s", "memory", "alarm")
        rows: list[tuple[str, ...]] = []
        for run, s in runs:
            memory = s.memory.get("device") or s.memory.get("resident")
            curve = [v for row in run.tail() if isinstance(v := row.get("correct_rate"), int | float)]
            rows.append(
                (
                    s.path,
                    s.state,
                    _now(s),
                    _progress(s),
                    duration(s.left_s),
                    "-" if s.reward is None else f"{s.reward:.3f}",
                    "-" if s.correct is None else f"{s.correct:.1%}",
                    _spark(curve, 12),
                    "-" if s.tokens_per_second is None else f"{s.tokens_per_second:,.0f}",
                    size(memory) if isinstance(memory, int) else "-",
                    f"step {s.alarm['step']}: {s.alarm['message']}" if s.alarm else "",
                )
            )
        lines += _aligned(head, rows, right=(3, 5, 6, 8, 9), width=width)
    return "\n".join(lines)


def _now(s: Summary) -> str:
    from retrain.tracking.summary import duration

    if not s.phase:
        return "-"
    rollouts = f" {s.done or 0}/{s.asked}" if s.asked else ""
    return f"{s.phase}{rollouts} {duration(s.phase_s)}"


def _progress(run: Summary) -> str:
    return f"{run.step}/{run.total}" if run.total is not None else str(run.step)


def _time(run: Summary) -> str:
    from retrain.tracking.summary import duration

    if run.left_s is not None:
        return f"{duration(run.left_s)} left"
    return "-" if run.state in _GOING else duration(run.lasted_s)


def _evaluated(known: Mapping[str, Any] | None) -> str:
    """``41.8% (35.9 to 47.9) @12``."""
    if known is None:
        return "-"
    after = f"@{known.get('step')}"
    accuracy, low, high = (known.get(key) for key in ("accuracy", "accuracy_low", "accuracy_high"))
    if accuracy is None:
        reward = known.get("mean_reward")
        return f"reward {reward:.3f} {after}" if reward is not None else f"unknown {after}"
    interval = f" ({low * 100:.1f} to {high * 100:.1f})" if low is not None and high is not None else ""
    return f"{accuracy:.1%}{interval} {after}"


def detail_text(run: Summary, more: Detail, record: RunRecord) -> str:
    """One run: where it stands, what it does, and every core metric with its healthy range."""
    from retrain.tracking.summary import duration, memory_text

    now = time.time()
    facts: list[tuple[str, str]] = []
    share = f" ({run.step / run.total:.0%})" if run.total else ""
    pace = f", {duration(run.step_s)} a step" if run.step_s is not None else ""
    left = f", {duration(run.left_s)} left" if run.left_s is not None else ""
    facts.append(("step", f"{_progress(run)}{share}{pace}{left}"))
    if run.phase:
        usual = record.beat.get("usual_s")
        facts.append(("now", _now(run) + (f" (lately up to {duration(usual)})" if usual is not None else "")))
    started, host, pid = (record.facts.get(key) for key in ("started", "host", "pid"))
    if isinstance(started, int | float):
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(started))
        facts.append(("started", f"{when}{f' on {host}' if host else ''}, process {pid}"))
    if run.updated is not None:
        facts.append(("updated", f"{duration(max(0.0, now - run.updated))} ago"))
    if run.lasted_s:
        facts.append(("took", f"{duration(run.lasted_s)} so far" if run.phase else duration(run.lasted_s)))
    split = {
        "sampling": run.sampling_share, "waiting for rewards": run.scoring_share, "learning": run.learning_share,
    }  # fmt: skip
    if any(part is not None for part in split.values()):
        facts.append(
            ("time", ", ".join(f"{name} {part:.0%}" for name, part in split.items() if part is not None))
        )
    if memory := memory_text(run.memory).removeprefix("memory "):
        facts.append(("memory", memory))
    if run.tokens:
        facts.append(("tokens", f"{run.tokens:,} sampled"))
    facts += [("evaluation" if i == 0 else "", _evaluated(e)) for i, e in enumerate(more.evaluations[-3:])]
    if more.checkpoints:
        best = f"; best {more.best}{more.best_note}" if more.best else ""
        facts.append(("checkpoints", ", ".join(more.checkpoints) + best))
    lines = [f"{run.path}: {_painted(run.state)}", *([f"  {run.todo}."] if run.todo else []), ""]
    lines += [f"  {name:<12}{value}" for name, value in facts]
    vitals = [
        (
            ("! " if r.ill else "  ") + r.vital.title,
            r.vital.text(r.value),
            _spark(r.curve[-_CURVE * 4 :], _CURVE),
            r.vital.healthy,
        )
        for r in more.vitals
        if r.value is not None
    ]
    if vitals:
        lines += ["", *_aligned(("  metric", "last", "", "healthy"), vitals, right=(1,))]
    if more.alarms:
        lines += ["", f"  alarms ({len(more.alarms)})"]
        lines += [f"    step {a.step}: {a.message}\n      {a.advice}" for a in more.alarms[-5:]]
    return "\n".join(lines)


def _spark(values: Sequence[float], width: int) -> str:
    from retrain.tracking.summary import sparkline

    encoding = (getattr(sys.stdout, "encoding", None) or "").lower()
    return sparkline(values, width, plain=not encoding.startswith("utf"))


def _painted(state: str) -> str:
    color = _COLORS.get(state.strip())
    if color is None or not sys.stdout.isatty() or os.environ.get("NO_COLOR"):
        return state
    return f"\033[{color}m{state}\033[0m"


def _aligned(
    head: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int], width: int | None = None
) -> list[str]:
    """A table as lines, each cut to ``width``; the state's color is put on last, so that it counts for nothing."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]

    def line(row: Sequence[str]) -> str:
        cells = [
            cell.rjust(size) if i in right else cell.ljust(size)
            for i, (cell, size) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join(cells)[:width].rstrip()

    lines = [line(head)]
    for row in rows:
        text = line(row)
        if "state" in head:
            at = sum(widths[: head.index("state")]) + 2 * head.index("state")
            end = at + len(row[head.index("state")])
            text = text[:at] + _painted(text[at:end]) + text[end:]
        lines.append(text)
    return lines


def _refresh(text: Callable[[], str], every: float, out: streams.Results, *, keys: bool) -> None:
    """Show what ``text()`` returns again and again, until Ctrl-C or, with ``keys``, q."""
    terminal = sys.stdout.isatty()
    with (
        contextlib.suppress(KeyboardInterrupt),
        _screen() if terminal else contextlib.nullcontext(),
        _keys(keys),
    ):
        while True:
            shown = text()
            if terminal:
                height = shutil.get_terminal_size().lines
                kept = shown.split("\n")[: max(1, height - 1)]
                # Line by line over what stood there: a cleared screen would flicker.
                shown = "\033[H" + "".join(f"{line}\033[K\n" for line in kept) + "\033[J"
                sys.stdout.write(shown)
                sys.stdout.flush()
            else:
                out.line(shown)
            if _waits(every, keys=keys):
                return


@contextlib.contextmanager
def _screen() -> Generator[None]:
    """The terminal's other screen, without a cursor and without wrapping; what stood there comes back."""
    sys.stdout.write("\033[?1049h\033[?25l\033[?7l")
    try:
        yield
    finally:
        sys.stdout.write("\033[?7h\033[?25h\033[?1049l")
        sys.stdout.flush()


@contextlib.contextmanager
def _keys(wanted: bool) -> Generator[None]:
    """Keys arrive without Enter, and are not shown."""
    if not wanted:
        yield
        return
    try:
        import termios
        import tty
    except ImportError:  # Windows
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    tty.setcbreak(sys.stdin)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def _waits(seconds: float, *, keys: bool) -> bool:
    """Wait; True when somebody pressed q meanwhile."""
    if not keys or os.name != "posix":
        time.sleep(seconds)
        return False
    import select

    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        if select.select([sys.stdin], [], [], left)[0] and os.read(sys.stdin.fileno(), 64) in (
            b"q",
            b"Q",
            b"",
        ):
            return True
    return False
