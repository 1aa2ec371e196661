"""The child that runs reasoning_gym's generators: one JSON request on stdin, one JSON answer on stdout.

It runs with PYTHONHASHSEED=0, because some generators iterate over sets: in a process with another hash seed the
same recipe would be another problem. It imports nothing of this package, so that it can be run by its path.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from typing import Any


def generate(spec: dict[str, Any], avoid: set[str]) -> dict[str, Any]:
    """``spec["count"]`` entries with distinct questions that are not in ``avoid``, or what is wrong with the spec.

    Fewer when ``spec["config"]["size"]`` indices do not hold that many.
    """
    gym: Any = importlib.import_module("reasoning_gym")
    registered: dict[str, Any] = importlib.import_module("reasoning_gym.factory").DATASETS
    name: str = spec["generator"]
    if name not in registered or name == "composite":
        return {"unknown": sorted(set(registered) - {"composite"})}
    known = sorted(field.name for field in dataclasses.fields(registered[name][1]))
    for key in spec["config"]:
        if key not in known:
            return {"key": key, "known": [k for k in known if k not in ("seed", "size")]}
    try:
        dataset = gym.create_dataset(name, **spec["config"])
    except Exception as error:  # noqa: BLE001  each generator checks its settings in its own way
        return {"invalid": str(error) or type(error).__name__}
    entries: list[dict[str, Any]] = []
    seen = set(avoid)
    for index in range(spec["config"]["size"]):
        if len(entries) == spec["count"]:
            break
        entry = dataset[index]
        if entry["question"] not in seen:
            seen.add(entry["question"])
            entries.append({"index": index, **{k: entry[k] for k in ("question", "answer", "metadata")}})
    return {"entries": entries}


def main() -> None:
    """Answer the one request."""
    # Generators may print; the answer must stay alone on its stream.
    answers, sys.stdout = sys.stdout, sys.stderr
    request = json.load(sys.stdin)
    made = [generate(spec, set(spec["avoid"])) for spec in request]
    json.dump(made, answers, default=str)


if __name__ == "__main__":
    main()
