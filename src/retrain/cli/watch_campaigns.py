"""Campaigns in a folder of runs, as ``retrain status`` shows them: a line each, with what to do about all of its runs."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Sequence
from pathlib import Path

from retrain.errors import RetrainError
from retrain.tracking import layout
from retrain.tracking.read import RunRecord


def apart(paths: Sequence[Path], runs: Sequence[RunRecord]) -> tuple[list[RunRecord], list[Path]]:
    """Runs by themselves, and the campaigns at or in ``paths``. A campaign's run counts as one by itself where a folder inside
    of its campaign is what was named."""
    named = [path.resolve() for path in paths]
    campaigns: dict[Path, Path] = {}
    for path in paths:
        # One that has not begun a run holds none that would tell of it.
        for place in (path, *sorted(inner for inner in path.glob("*") if inner.is_dir())):
            with contextlib.suppress(RetrainError):
                if layout.holds_campaign(place):
                    campaigns[place.resolve()] = place
    alone: list[RunRecord] = []
    for run in runs:
        campaign = layout.campaign_of(run.path)
        if campaign is None or any(campaign.resolve() in place.parents for place in named):
            alone.append(run)
        else:
            campaigns.setdefault(campaign.resolve(), campaign)
    return alone, sorted(campaigns.values())


def line(directory: Path) -> str:
    """One campaign: how far it is, and what to do."""
    from retrain.campaign import progress

    try:
        found = progress.look(directory)
    except RetrainError as error:
        return str(error)
    place = shlex.quote(str(directory))
    trials = ", ".join(f"{n} {state}" for state, n in sorted(found.trials.items()))
    if found.going or any(found.trials.get(state) for state in ("running", "silent", "hung")):
        todo = f"retrain status {place} shows its runs"
    elif found.counts.get("done", 0) == len(found.cells):
        todo = f"retrain report {place} has the verdicts"
    else:
        todo = f"retrain --resume {place} goes on with it"
    return f"{progress.header(found)[0]}{f' (trials: {trials})' if trials else ''}; {todo}."
