"""The configurations that ship with the package, as text. Imports nothing heavy: ``init`` must start fast."""

from __future__ import annotations

import os

TEMPLATES = {
    "default": "a full run on one GPU: Qwen3-4B on competition mathematics, 500 steps",
    "quickstart": "a smoke test on one GPU: 20 short steps",
    "experiment": "a long run on one GPU with every setting of SEPA written out",
    "robust": "a starting point for real runs, to sweep from",
    "campaign": "two conditions with eight seeds each, compared: one run per GPU",
    "tiny": "the embedded model on the CPU, what `retrain demo` runs",
}
"""Name and purpose of every template."""

LATER: tuple[str, ...] = ()
"""Names of templates that this version does not hold."""

ASSETS = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "assets")


def path_of(name: str) -> str:
    """File of a template in ``TEMPLATES``."""
    return os.path.join(ASSETS, "templates", f"{name}.toml")


def read(name: str) -> str:
    """Text of a template in ``TEMPLATES``."""
    with open(path_of(name), encoding="utf-8") as file:
        return file.read()
