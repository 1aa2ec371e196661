"""The manifest of a campaign: what was declared before the first run, and what was found since.

``declared`` fixes everything that a verdict depends on; it is written before the first run, its digest is checked at every
later start, and it never changes. ``found`` holds what could not be known then: the tuned values, seeds that were added.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from retrain.errors import ResumeError
from retrain.tracking import layout

FORMAT = 1
LAST_SHARE = 0.2
"""The primary outcome is the mean over the evaluations of this last share of a run's steps."""


@dataclass(frozen=True, slots=True)
class Declared:
    """What was fixed before the first run.

    ``conditions`` maps a label to the settings of that arm. ``outcome`` is the metric whose mean over the evaluations of
    the last 20 % of steps is compared: "eval/accuracy", or "correct_rate" (of training) without held-out tasks.
    ``evaluation`` names the held-out tasks with ``digest``. ``looks`` are numbers of seeds, the last all of ``seeds``;
    each is judged at ``alpha / len(looks)``. ``threads`` of every run: results are byte-equal for one number only.
    ``tune`` is None, or field, values, seeds, max_steps and the digest of the tasks that trials choose on.
    """

    name: str
    created: str
    conditions: Mapping[str, Mapping[str, Any]]
    baseline: str
    seeds: tuple[int, ...]
    max_steps: int
    outcome: Literal["eval/accuracy", "correct_rate"]
    evaluation: Mapping[str, Any]
    alpha: float
    smallest_effect: float
    test: Literal["welch", "paired"]
    looks: tuple[int, ...]
    threshold: float | None
    threads: int
    tune: Mapping[str, Any] | None
    versions: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True, slots=True)
class Manifest:
    """``declared``, and what was found since: ``chosen`` maps a condition's label to its tuned value, ``added`` are seeds
    beyond the declared ones (every verdict that uses them is exploratory), ``squeeze`` the rank analysis."""

    declared: Declared
    chosen: Mapping[str, Any] = field(default_factory=dict[str, Any])
    added: tuple[int, ...] = ()
    squeeze: Mapping[str, Any] | None = None

    @property
    def seeds(self) -> tuple[int, ...]:
        """Declared seeds, then added ones."""
        return (*self.declared.seeds, *self.added)


def digest(declared: Declared) -> str:
    """Digest of what was declared."""
    text = json.dumps(asdict(declared), sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def write(directory: Path, manifest: Manifest) -> None:
    """Write ``manifest.json``; what was declared may not differ from what stands there. ResumeError if it does."""
    # numpy comes with it, and whoever only looks at a campaign needs none.
    from retrain.tracking.run_log import write_atomically

    path = directory / layout.CAMPAIGN
    if path.exists() and read(directory).declared != manifest.declared:
        raise ResumeError(
            f"{path}: what was declared before the first run may not change.", fix="start a new campaign."
        )
    record = {
        "format": FORMAT,
        "digest": digest(manifest.declared),
        "declared": asdict(manifest.declared),
        "found": {"chosen": dict(manifest.chosen), "added": list(manifest.added), "squeeze": manifest.squeeze},
    }
    write_atomically(path, json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def read(directory: Path) -> Manifest:
    """The manifest of a campaign's directory; ResumeError when it is missing, damaged or was changed by hand."""
    path = directory / layout.CAMPAIGN
    try:
        record = cast("dict[str, Any]", json.loads(path.read_text(encoding="utf-8")))
        told = cast("dict[str, Any]", record["declared"])
        for key in ("seeds", "looks"):
            told[key] = tuple(told[key])
        declared = Declared(**told)
        found = cast("dict[str, Any]", record["found"])
        manifest = Manifest(declared, found["chosen"], tuple(found["added"]), found["squeeze"])
        said = record["digest"]
    except FileNotFoundError as error:
        raise ResumeError(f"{directory} holds no campaign.", fix="name the folder of one, such as logs/campaign_...") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ResumeError(
            f"{path} is no manifest of a campaign that this version reads: {error}.", fix="restore the file."
        ) from error
    if said != digest(declared):
        raise ResumeError(
            f"{path}: what was declared has been changed since it was written.",
            fix="restore the file; another design is another campaign.",
        )
    return manifest
