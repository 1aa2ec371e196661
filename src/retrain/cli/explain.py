"""``retrain explain``: what a configuration will do, need and cost, before anything runs."""

from __future__ import annotations

from collections.abc import Sequence

from retrain.errors import NotInThisVersion

USAGE = {"explain": "Usage: retrain explain\n"}


def explain(arguments: Sequence[str]) -> int:
    """The command ``explain``."""
    raise NotInThisVersion("retrain explain is not in this version.", fix="leave it out.")

