"""Which plug-ins a configuration names: what installed packages add, and every dotted path of the user's own."""

from __future__ import annotations

from importlib import metadata

from retrain.config import names
from retrain.config.idle import get
from retrain.config.schema import Config

SETTINGS: tuple[tuple[str, str], ...] = (
    ("algorithm", "algorithm.algorithm_mode"),
    ("advantage", "algorithm.advantage_mode"),
    ("transform", "algorithm.transform_mode"),
    ("uncertainty", "algorithm.uncertainty_kind"),
    ("detector", "planning.detector"),
    ("reward", "reward.type"),
    ("source", "data.source"),
    ("source", "eval.source"),
    ("environment", "environment.provider"),
    ("engine", "inference.engine"),
    ("loss", "loss.kind"),
    ("backend", "backend.backend"),
    ("backpressure", "backpressure.controller"),
)
"""Kinds of plug-ins, and the settings that name one."""


def installed(kind: str) -> list[str]:
    """Names that installed packages add to an open kind, through the entry-point group ``retrain.<kind>``."""
    return [entry.name for entry in metadata.entry_points(group=f"retrain.{kind}")]


def named_plugins(config: Config) -> list[tuple[str, str]]:
    """(kind, name) of everything that the configuration names and that is not built in, each once.

    An ``algorithm_mode`` stands in for both modes, which are then left out.
    """
    replaced = ("advantage", "transform") if config.algorithm.algorithm_mode else ()
    replaced = replaced if config.backpressure.enabled else (*replaced, "backpressure")
    found = [(kind, str(get(config, key))) for kind, key in SETTINGS if kind not in replaced]
    found += [("sink", name) for name in config.logging.trackers]
    for table in (*config.data.mixture, *config.eval.suites):
        found += [("source", str(table.get("source", ""))), ("reward", str(table.get("reward", "")))]
    found += [("reward", str(table.get("type", ""))) for table in config.reward.parts]
    other = dict.fromkeys((k, n) for k, n in found if n and n not in names.BUILT[k])
    # What is installed is asked last: it reads the metadata of every package.
    return [(k, n) for k, n in other if "." in n or ":" in n or n in installed(k)]
