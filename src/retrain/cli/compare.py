"""``retrain diff``, ``why`` and ``replay``: what differs, what a step did, and what another algorithm would have done."""

from __future__ import annotations

from collections.abc import Sequence

from retrain.errors import NotInThisVersion

USAGE = {"diff": "Usage: retrain diff\n", "why": "Usage: retrain why\n", "replay": "Usage: retrain replay\n"}


def diff(arguments: Sequence[str]) -> int:
    """The command ``diff``."""
    raise NotInThisVersion("retrain diff is not in this version.", fix="leave it out.")


def why(arguments: Sequence[str]) -> int:
    """The command ``why``."""
    raise NotInThisVersion("retrain why is not in this version.", fix="leave it out.")


def replay(arguments: Sequence[str]) -> int:
    """The command ``replay``."""
    raise NotInThisVersion("retrain replay is not in this version.", fix="leave it out.")

