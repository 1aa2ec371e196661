"""retrain: reinforcement learning with verifiable rewards for language models. Imports nothing heavy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from retrain.config.load import load_config as load_config
    from retrain.config.schema import Config as Config
    from retrain.runner import run as run

_PUBLIC = {"run": "retrain.runner", "load_config": "retrain.config.load", "Config": "retrain.config.schema"}

__all__ = ["Config", "__version__", "load_config", "run"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        from importlib import import_module

        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'retrain' has no attribute {name!r}")
