"""``retrain report``: a run as one file to look at."""

from __future__ import annotations

from collections.abc import Sequence

from retrain.errors import NotInThisVersion

USAGE = {"report": "Usage: retrain report\n"}


def report(arguments: Sequence[str]) -> int:
    """The command ``report``."""
    raise NotInThisVersion("retrain report is not in this version.", fix="leave it out.")

