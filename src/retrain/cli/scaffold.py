"""``retrain init-plugin``: writes a plug-in that runs as it is."""

from __future__ import annotations

from collections.abc import Sequence

from retrain.errors import NotInThisVersion

USAGE = {"init-plugin": "Usage: retrain init-plugin\n"}


def init_plugin(arguments: Sequence[str]) -> int:
    """The command ``init-plugin``."""
    raise NotInThisVersion("retrain init-plugin is not in this version.", fix="leave it out.")

