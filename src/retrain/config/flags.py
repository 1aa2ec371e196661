"""Names of flags: which flag sets which setting, and the flat name of a setting that has one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import cache

from retrain.config.fields import settings

PREFERRED = {
    "seed": "training.seed",
    "lr": "training.lr",
    "max_steps": "training.max_steps",
    "temperature": "training.temperature",
    "max_tokens": "training.max_tokens",
    "model": "model.model",
    "source": "data.source",
    "adapter_path": "backend.adapter_path",
}
"""Names that several sections hold, and the section that a flat flag means."""

SPECIAL = {
    "--resume": "resume.from",
    "--algorithm-param": "algorithm.params",
    "--advantage-param": "algorithm.advantage_params",
    "--transform-param": "algorithm.transform_params",
    "--backend-opt": "backend.options",
}
"""Flags with names of their own."""


@cache
def flags() -> Mapping[str, str]:
    """Every flag that sets something, with its dotted key; a key's first flag is the usual one."""
    count = Counter(setting.name for setting in settings().values())
    found: dict[str, str] = dict(SPECIAL)
    for key, setting in settings().items():
        is_plain = "." not in setting.name and setting.name != "from"
        if is_plain and (count[setting.name] == 1 or PREFERRED.get(setting.name) == key):
            found.setdefault(_kebab(setting.name), key)
    for key, setting in settings().items():
        if "." not in setting.name:
            found.setdefault(_kebab(f"{setting.section}_{setting.name}"), key)
        found[f"--{key}"] = key
    return found


def flags_of(key: str) -> list[str]:
    """Flat flags of one setting, the dotted one left out."""
    return [flag for flag, target in flags().items() if target == key and flag != f"--{key}"]


def _kebab(name: str) -> str:
    return "--" + name.replace("_", "-")
