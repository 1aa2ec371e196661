"""``retrain status`` and ``retrain top``: how runs are doing."""

from __future__ import annotations

from collections.abc import Sequence

from retrain.errors import NotInThisVersion

USAGE = {"status": "Usage: retrain status\n", "top": "Usage: retrain top\n"}


def status(arguments: Sequence[str]) -> int:
    """The command ``status``."""
    raise NotInThisVersion("retrain status is not in this version.", fix="leave it out.")


def top(arguments: Sequence[str]) -> int:
    """The command ``top``."""
    raise NotInThisVersion("retrain top is not in this version.", fix="leave it out.")

