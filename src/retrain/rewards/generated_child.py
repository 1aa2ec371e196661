"""The child side of reward ``reasoning_gym``: a generator's own judgement of one answer."""

from __future__ import annotations

import functools
import importlib
import json
from collections.abc import Mapping
from typing import Any

_gym: Any = importlib.import_module("reasoning_gym")


@functools.lru_cache(maxsize=64)
def _dataset(generator: str, config: str) -> Any:
    return _gym.create_dataset(generator, **json.loads(config))


@functools.lru_cache(maxsize=1024)
def _made(generator: str, config: str, index: int) -> Any:
    return _dataset(generator, config)[index]


def _entry(info: Mapping[str, Any], reference: str, generator: str, config: str) -> Any:
    """The task's entry, made again; where that is another one, the one that the task carries.

    A few generators draw from sets, whose order follows the hash seed. And not every entry survives JSON (tuples
    become lists), so the one made here comes first.
    """
    made = _made(generator, config, int(info["recipe"]["index"]))
    if made["answer"] is None or str(made["answer"]).strip() == reference.strip():
        return made
    if isinstance(info.get("entry"), Mapping):
        return info["entry"]
    raise RuntimeError(
        f"{generator} made another task here than in the run (with PYTHONHASHSEED=0): its answer is "
        f"{str(made['answer'])[:80]!r}, not {reference[:80]!r}"
    )


def score(response: str, reference: str, info: Mapping[str, Any]) -> float:
    """The generator's score, in [0, 1], of an answer to the task of ``info["recipe"]``: generator, config, index.

    Whatever the generator raises goes on: it is an error, which masks the rollout, and never a 0.
    """
    recipe = info["recipe"]
    generator, config = str(recipe["generator"]), json.dumps(recipe["config"], sort_keys=True)
    entry = _entry(info, reference, generator, config)
    dataset = _dataset(generator, config)
    answer = entry["answer"]
    if answer is not None and response.strip() == str(answer).strip():
        response = answer  # outer spaces may count for the generator, and never reach this place
    value = float(dataset.score_answer(answer=response, entry=entry))
    if not 0.0 <= value <= 1.0:
        raise RuntimeError(f"{generator} scored {value}, which is outside [0, 1]")
    return value
