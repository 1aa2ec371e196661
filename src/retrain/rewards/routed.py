"""The reward of a run: which reward scores which task, and what is added to every score."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from retrain import plugins
from retrain.protocols import Renderer

if TYPE_CHECKING:
    from retrain.config.schema import Config


def build(config: Config, renderer: Renderer) -> Any:
    """The reward that ``reward.type`` names."""
    return plugins.load("reward", config.reward.type)(config, renderer)
