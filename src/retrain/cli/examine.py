"""``retrain trace``, ``doctor``, ``resume-check``, ``backends`` and ``plugins``: what can be known without a run."""

from __future__ import annotations

from collections.abc import Sequence

from retrain.errors import NotInThisVersion

USAGE = {name: f"Usage: retrain {name}\n" for name in ("trace", "doctor", "resume-check", "backends", "plugins")}


def trace(arguments: Sequence[str]) -> int:
    """The command ``trace``."""
    raise NotInThisVersion("retrain trace is not in this version.", fix="leave it out.")


def doctor(arguments: Sequence[str]) -> int:
    """The command ``doctor``."""
    raise NotInThisVersion("retrain doctor is not in this version.", fix="leave it out.")


def resume_check(arguments: Sequence[str]) -> int:
    """The command ``resume-check``."""
    raise NotInThisVersion("retrain resume-check is not in this version.", fix="leave it out.")


def backends(arguments: Sequence[str]) -> int:
    """The command ``backends``."""
    raise NotInThisVersion("retrain backends is not in this version.", fix="leave it out.")


def plugins(arguments: Sequence[str]) -> int:
    """The command ``plugins``."""
    raise NotInThisVersion("retrain plugins is not in this version.", fix="leave it out.")

