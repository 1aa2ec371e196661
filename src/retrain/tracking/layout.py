"""The names of every file in a run directory, in one place."""

from __future__ import annotations

import shutil
from pathlib import Path

from retrain.errors import ConfigError

CONFIG = "config.toml"
RUN = "run.json"
HEARTBEAT = "heartbeat.json"
"""Beside it, written every few seconds: what the run is doing."""
METRICS = "metrics.jsonl"
STEPS = "emergence/steps.jsonl"
GENERATIONS = "emergence/generations.jsonl"
ROLLOUTS = "rollouts"
CHECKPOINTS = "checkpoints"
TRAINER_STATE = "trainer_state.json"
ADAPTER = "adapter"
EVENTS = "events.log"
REPORTS = ("report.html", "report.md")
"""What `retrain report` writes unless told otherwise."""
TRACKER_FILES = "trackers"
TRACKERS = f"{TRACKER_FILES}/trackers.json"
"""What each experiment tracker holds of the run."""
LOCK = ".lock"

CAMPAIGN = "manifest.json"
"""At the top of a campaign's directory: what was declared before its first run."""
CAMPAIGN_RUNS = "runs"
CAMPAIGN_TRIALS = "trials"
"""Runs that chose a setting for each condition before the campaign's own."""
CAMPAIGN_OUTPUT = "output"
"""What each run's process printed."""
CAMPAIGN_PROCESSES = "processes.jsonl"
"""How each process of a campaign ended, and what it used."""

MANIFEST = "manifest.json"
"""Inside a checkpoint: sizes and checksums of its files, written last."""
STATE = "state.json"
"""Inside a checkpoint: what the loop needs besides the backend's own files."""


def checkpoint_name(step: int) -> str:
    """``step_000020`` for 20 completed steps."""
    return f"step_{step:06d}"


def checkpoint_step(name: str) -> int | None:
    """The number of completed steps in a checkpoint's name, None for any other name."""
    digits = name.removeprefix("step_")
    return int(digits) if name.startswith("step_") and digits.isdigit() else None


def rollout_file(step: int) -> str:
    """``rollouts/step_000003.npz`` for the rollouts of 0-based step 3."""
    return f"{ROLLOUTS}/step_{step:06d}.npz"


def holds_run(directory: Path) -> bool:
    """Does the directory already hold a run? ConfigError when that cannot be seen."""
    return bool(_present(directory, (RUN, METRICS, TRAINER_STATE, CHECKPOINTS)))


def holds_campaign(directory: Path) -> bool:
    """Is the directory that of a campaign?"""
    return not holds_run(directory) and bool(_present(directory, (CAMPAIGN,)))


def campaign_of(run: Path) -> Path | None:
    """The directory of the campaign that the run directory belongs to; None for a run by itself."""
    place = run.absolute().parent
    if place.name not in (CAMPAIGN_RUNS, CAMPAIGN_TRIALS) or not holds_campaign(place.parent):
        return None
    # As it was named, where that says enough.
    return run.parent.parent if len(run.parts) > 2 else place.parent


def would_be_replaced(directory: Path) -> list[str]:
    """Names in the directory that a run would write over."""
    return _present(directory, (CONFIG, ADAPTER, ROLLOUTS, Path(STEPS).parent.name))


def _present(directory: Path, names: tuple[str, ...]) -> list[str]:
    try:
        return [name for name in names if (directory / name).exists()]
    except OSError as error:
        raise ConfigError(
            f"{str(directory)!r} cannot be read: {error.strerror}.",
            fix="give another directory or change its permissions.",
        ) from error


def clear(directory: Path) -> None:
    """Remove a run's files, and nothing else, from a directory; its events.log goes on."""
    for name in (CONFIG, RUN, HEARTBEAT, METRICS, TRAINER_STATE, *REPORTS):
        (directory / name).unlink(missing_ok=True)
    for name in (CHECKPOINTS, ROLLOUTS, ADAPTER, Path(STEPS).parent.name):
        shutil.rmtree(directory / name, ignore_errors=True)


_ASIDE = f".{TRACKER_FILES}-replaced"


def set_trackers_aside(directory: Path) -> None:
    """Make room for a new run's trackers; what stays of the old ones is decided by one of the two below."""
    # A folder of that name which no tracker of ours has written is the user's.
    if (directory / TRACKERS).is_file():
        (directory / TRACKER_FILES).rename(directory / _ASIDE)


def put_trackers_back(directory: Path) -> None:
    """Undo ``set_trackers_aside`` where the new run never came to be; does nothing after ``forget_trackers``."""
    if (directory / _ASIDE).exists():
        shutil.rmtree(directory / TRACKER_FILES, ignore_errors=True)
        (directory / _ASIDE).rename(directory / TRACKER_FILES)


def forget_trackers(directory: Path) -> None:
    """Remove what ``set_trackers_aside`` moved away: the new run stands."""
    shutil.rmtree(directory / _ASIDE, ignore_errors=True)
