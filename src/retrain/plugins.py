"""One table from (kind, name) to the object that implements it, as "module:attribute" strings.

Nothing is imported before it is asked for. A name with a dot or a colon is a user's own dotted path,
looked up on the plug-in search paths; installed packages add names through the entry-point group
``retrain.<kind>``.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

from retrain.errors import PluginError

TABLE: dict[str, dict[str, str]] = {
    "backend": {"local": "retrain.backends.local:build"},
    "engine": {"pytorch": "retrain.engines.torch_engine:build"},
    "renderer": {"chat": "retrain.renderer:load_renderer"},
    "environment": {"single_turn": "retrain.environments.single_turn:build"},
    "source": {
        "math": "retrain.environments.hub_sources:math",
        "gsm8k": "retrain.environments.hub_sources:gsm8k",
        "arithmetic": "retrain.environments.sources:arithmetic",
        "jsonl": "retrain.environments.sources:jsonl",
        "hf": "retrain.environments.hub_sources:hf",
        "reasoning_gym": "retrain.environments.procedural:reasoning_gym",
        "mixture": "retrain.environments.mixture:tasks",
    },
    "reward": {
        "match": "retrain.rewards.match:build",
        "math": "retrain.rewards.math:build",
        "custom": "retrain.rewards.custom:build",
        "composite": "retrain.rewards.composite:build",
        "reasoning_gym": "retrain.rewards.generated:build",
        "routed": "retrain.rewards.routed:build",
    },
    "advantage": {
        "grpo": "retrain.algorithms.advantages:grpo",
        "maxrl": "retrain.algorithms.advantages:maxrl",
        "grpo_std": "retrain.algorithms.advantages:grpo_std",
        "rloo": "retrain.algorithms.advantages:rloo",
        "reinforce_pp": "retrain.algorithms.advantages:reinforce_pp",
    },
    "transform": {
        "none": "retrain.algorithms.transforms:none",
        "gtpo": "retrain.algorithms.transforms:gtpo",
        "gtpo_hicra": "retrain.algorithms.transforms:gtpo_hicra",
        "gtpo_sepa": "retrain.algorithms.transforms:gtpo_sepa",
        "gtpo_sepa_amp": "retrain.algorithms.transforms:gtpo_sepa_amp",
        "gtpo_sepa_amp_c": "retrain.algorithms.transforms:gtpo_sepa_amp_c",
        "entropy_mask": "retrain.algorithms.transforms:entropy_mask",
    },
    "algorithm": {},
    "uncertainty": {
        "surprisal": "retrain.algorithms.transforms:surprisal",
        "predictive_variance": "retrain.algorithms.transforms:predictive_variance",
        "shannon_entropy": "retrain.algorithms.transforms:shannon_entropy",
    },
    "detector": {
        "regex": "retrain.algorithms.planning:build",
        "semantic": "retrain.algorithms.semantic:build",
    },
    "loss": {
        "importance_sampling": "retrain.backends.loss:importance_sampling",
        "ppo": "retrain.backends.loss:ppo",
        "gspo": "retrain.backends.loss:gspo",
        "cispo": "retrain.backends.loss:cispo",
    },
    "sink": {
        "console": "retrain.sinks:ConsoleSink",
        "wandb": "retrain.sinks:WandbSink",
        "trackio": "retrain.sinks:TrackioSink",
        "tensorboard": "retrain.sinks:TensorboardSink",
    },
}


def is_dotted(name: str) -> bool:
    """True when ``name`` is a user's own path rather than a built-in or entry-point name."""
    return "." in name or ":" in name


def add_search_paths(paths: Iterable[Path]) -> None:
    """Make modules in existing ``paths`` importable, after everything that is installed."""
    for path in paths:
        text = str(path)
        if path.is_dir() and text not in sys.path:
            sys.path.append(text)


def names(kind: str) -> list[str]:
    """Names of a kind: built-in ones, then those that installed packages add."""
    return [*TABLE[kind], *(e.name for e in metadata.entry_points(group=f"retrain.{kind}"))]


def load(kind: str, name: str) -> Any:
    """Import and return the object called ``name``; PluginError with the nearest name or the import's cause."""
    target = TABLE[kind].get(name)
    if target is None:
        for entry in metadata.entry_points(group=f"retrain.{kind}"):
            if entry.name == name:
                target = entry.value
    if target is None and is_dotted(name):
        target = name if ":" in name else ":".join(name.rsplit(".", 1))
    if target is None:
        near = difflib.get_close_matches(name, names(kind), n=1)
        raise PluginError(
            f"unknown {kind} {name!r}.",
            fix=(f"did you mean {near[0]!r}? " if near else "") + f"Known: {', '.join(names(kind))}.",
        )
    module_name, _, attribute = target.partition(":")
    try:
        found = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or module_name
        extra = {"torch": "local", "transformers": "local", "peft": "local"}.get(missing.split(".")[0])
        raise PluginError(
            f"{kind} {name!r} needs the module {missing!r}, which is not installed.",
            fix=f'pip install "retrain[{extra}]".'
            if extra
            else "install it, or add its folder to [plugins] search_paths.",
        ) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise PluginError(
                f"{kind} {name!r}: {module_name} has no {part!r}.", fix="correct the dotted path."
            )
        found = getattr(found, part)
    if not callable(found):
        raise PluginError(
            f"{kind} {name!r} is a {type(found).__name__}, not something to call.",
            fix="name a function or class.",
        )
    return found
