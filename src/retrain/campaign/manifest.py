"""The manifest of a campaign: what was declared before the first run, and what was found since.

``declared`` fixes everything that a verdict depends on; it is written before the first run, its digest is checked at every
later start, and it never changes. ``found`` holds what could not be known then: the tuned values, seeds that were added.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from retrain.errors import ResumeError
from retrain.tracking import layout

if TYPE_CHECKING:
    from retrain.config.schema import Config

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
    ``tune`` is None, or field, values, seeds, max_steps and the digest of the tasks that trials choose on. ``settings`` maps
    a label to the ``settings_digest`` of its runs, without what is tuned; empty in manifests that older versions wrote.
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
    settings: Mapping[str, str] = field(default_factory=dict[str, str])


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
    record = asdict(declared)
    if not declared.settings:
        # As versions that declared no settings wrote it.
        del record["settings"]
    return _hashed(record)


def _hashed(record: Mapping[str, Any]) -> str:
    text = json.dumps(record, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def settings_digest(config: Config, tuned: str = "") -> str:
    """Digest of everything in a run's configuration that changes what a step computes: equal for the runs of one condition,
    on any machine. Left out are seeds, folders, names at trackers, what any resume may change, and the dotted key ``tuned``.
    Defaults do not count, so that a setting which a later version adds changes nothing. ``max_steps`` does count."""
    # pydantic comes with them, and whoever only looks at a campaign needs none.
    from retrain.config.fields import settings
    from retrain.preflight import NEUTRAL_ON_RESUME

    neutral = tuple(key for key in NEUTRAL_ON_RESUME if key != "training.max_steps")
    dump = config.model_dump(by_alias=True, mode="json", exclude={"campaign", "squeeze", "resume"})
    told: dict[str, Any] = {}
    for key, setting in settings().items():
        section, _, name = key.partition(".")
        if section not in dump or key in ("training.seed", tuned) or key.startswith(neutral):
            continue
        value = dump[section][name]
        if value is not None and value != _plain(setting.default):
            told[key] = _portable(key, value)
    return _hashed(told)


def _plain(value: Any) -> Any:
    """A value as JSON holds it."""
    return [_plain(each) for each in cast("Sequence[Any]", value)] if isinstance(value, list | tuple) else value


_PATHS = ("data.path", "eval.path", "lora.init_from", "model.model", "planning.model", "path")


def _portable(key: str, value: Any) -> Any:
    """A value with absolute paths reduced to their names: a campaign may be carried to another machine."""
    if isinstance(value, list):
        return [_portable("", each) for each in cast("list[Any]", value)]
    if isinstance(value, Mapping):
        return {each: _portable(each, inner) for each, inner in cast("Mapping[str, Any]", value).items()}
    is_path = key in _PATHS and isinstance(value, str) and Path(value).is_absolute()
    return Path(value).name if is_path else value


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
    _check_found(path, manifest)
    return manifest


def _check_found(path: Path, manifest: Manifest) -> None:
    """ResumeError where what was found since cannot belong to what was declared: the digest does not cover it."""
    declared, wrong = manifest.declared, ""
    twice = [seed for seed in manifest.added if manifest.seeds.count(seed) > 1]
    tried = (declared.tune or {}).get("values", ())
    stray = [label for label, value in manifest.chosen.items() if label not in declared.conditions or value not in tried]
    if twice:
        wrong = f"the added seed {twice[0]} stands there already"
    elif stray:
        wrong = f"what {stray[0]} chose is none of the values that were declared"
    if wrong:
        raise ResumeError(f"{path}: {wrong}.", fix="restore the file.")
