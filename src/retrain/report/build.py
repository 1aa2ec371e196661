"""Builds a report: one HTML file that works offline and a Markdown twin, of one run or of a folder of runs."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

from retrain import __version__
from retrain.errors import UsageError
from retrain.report import figures, markdown, page
from retrain.report.gather import RunData, gather
from retrain.report.rollouts import choose
from retrain.tracking import layout
from retrain.tracking.read import find_runs
from retrain.tracking.run_log import write_atomically

DEFAULT_MB = 15
LEAST_MB = 7
_FIXED = 3_000_000
"""Bytes of the page besides rollouts: plotly, packed, and at most a million for curves and tables."""
_MOST_RUNS = 64
_OURS = {
    ".html": re.compile(rb'<meta name="generator" content="retrain '),
    ".md": re.compile(rb"\A# [^\n]*\n\nMade by retrain \S+ on \d{4}-"),
}
"""What shows that a file is a report: only such a one is written over."""
_HEAD = 8192

_OVERLAID = {
    "correct_rate": ("Correct rate in training", True, ""),
    "mean_reward": ("Mean reward", False, ""),
    "mean_length": ("Completion length", False, "tokens"),
    "max_token_hit_rate": ("Truncated rollouts", True, ""),
    "entropy_mean": ("Entropy", False, "nats per token"),
    "grad_norm": ("Gradient norm", False, ""),
    "approx_kl": ("KL, sampler to learner", False, "nats per token"),
    "tokens_per_second": ("Sampling speed", False, "tokens/s"),
}


def write(path: Path, out: Path | None = None, *, megabytes: int = DEFAULT_MB) -> dict[str, Any]:
    """Write the report of a run, or of every run below a folder, and say what was written.

    ``out`` is the HTML file or a folder for it; by default ``report.html`` in ``path``. ``megabytes`` bounds the file,
    at least ``LEAST_MB``. UsageError where there is no run, the files cannot be written, or one of them exists and is no
    report.
    """
    found = find_runs(path)
    if not found:
        raise UsageError(
            f"{path} holds no run.", fix="name a run directory, such as logs/train, or a folder of runs."
        )
    target = target_of(path, out)
    twin = target.with_suffix(".md")
    runs: list[RunData] = [gather(record) for record in found[:_MOST_RUNS]]
    made = f"Made by retrain {__version__} on {time.strftime('%Y-%m-%d %H:%M:%S UTC', time.gmtime())}"
    record: dict[str, Any] = {
        "runs": [str(run.record.path) for run in runs],
        "left_out": len(found) - len(runs),
    }
    if len(found) == 1:
        data = runs[0]
        plots = figures.plots(data)
        setting = data.setting("reward.correct_at")
        shown = choose(
            data.record.path / layout.GENERATIONS,
            budget=megabytes * 1_000_000 - _FIXED,
            correct_at=float(setting) if isinstance(setting, int | float) else None,
            urgent=[alarm.step for alarm in data.alarms[:40]],
        )
        made += f", after {data.done:,} steps; the run was {data.state}."
        text = page.run(data, plots, shown, twin=twin.name, made=made)
        twin_text = markdown.run(data, shown, page=target.name, made=made)
        record |= {
            "steps": data.done,
            "rollouts": len(shown.rows),
            "rollouts_stored": shown.total,
            "alarms": len(data.alarms),
        }
    else:
        plots = figures.overlay(runs, _OVERLAID)
        note = (
            "Curves side by side, without statistics: whether one condition is better than another is not judged here. "
            "`retrain report` on one of these runs shows its evaluation, rollouts and settings in full."
        )
        if record["left_out"]:
            note += f" {record['left_out']} more runs are left out: the first {len(runs)} by path are shown."
        title = path.absolute().name
        made += "."
        text = page.several(runs, plots, title=title, note=note, twin=twin.name, made=made)
        twin_text = markdown.several(runs, title=title, note=note, made=made)
    return {**put(target, text, twin_text), "plots": len(plots), **record}


def target_of(path: Path, out: Path | None) -> Path:
    """Where the report of ``path`` goes: ``out``, a file or a folder for it, or ``path`` itself. UsageError where that or the
    Markdown beside it is a file that is no report."""
    target = _target(path, out)
    _keep_others(target, ".html")
    _keep_others(target.with_suffix(".md"), ".md")
    return target


def put(target: Path, text: str, twin_text: str) -> dict[str, Any]:
    """Write the page and the Markdown beside it, and say where and how large; UsageError where that fails."""
    twin = target.with_suffix(".md")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(target, text, durable=False)
        write_atomically(twin, twin_text, durable=False)
    except OSError as error:
        raise UsageError(
            f"{error.filename or target} cannot be written: {error.strerror or error}.",
            fix="make room, correct the permissions, or name another file with --out.",
        ) from error
    return {"html": str(target), "markdown": str(twin), "bytes": target.stat().st_size}


def _keep_others(path: Path, kind: str) -> None:
    """UsageError where the file exists and is no report of ours."""
    try:
        if path.is_file():
            with path.open("rb") as file:
                if _OURS[kind].search(file.read(_HEAD)):
                    return
        elif not path.exists():
            return
    except OSError as error:
        raise UsageError(
            f"{path} cannot be read: {error.strerror or error}.", fix="name another file with --out."
        ) from error
    raise UsageError(
        f"{path} exists and is no report of retrain, so it stays as it is.",
        fix="name another file with --out (the Markdown goes beside it under the same name), or move this one away.",
    )


def _target(path: Path, out: Path | None) -> Path:
    if out is None:
        return path / "report.html"
    if out.is_dir():
        return out / "report.html"
    if out.suffix.lower() not in (".html", ".htm"):
        raise UsageError(
            f"--out {out} is not an HTML file.", fix="end its name in .html; the Markdown goes beside it."
        )
    return out
