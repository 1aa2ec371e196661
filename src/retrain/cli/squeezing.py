"""Held-out accuracy of an adapter before and after it was squeezed, and what its command shows meanwhile."""

from __future__ import annotations

import contextlib
import copy
import sys
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from retrain.config.load import LoadedConfig, Override
    from retrain.config.schema import Squeeze
    from retrain.squeeze.analysis import Analysis
    from retrain.subject import Subject

_CLEAR = "\r\033[K"


@dataclass(frozen=True, slots=True)
class Job:
    """What is to be done: the adapter's folder, the run it is of (None for an adapter alone), and the flags."""

    adapter: Path
    run: Subject | None
    loaded: LoadedConfig
    flags: Mapping[str, str]
    more: tuple[Override, ...]
    """Settings of the evaluation and of the training after it."""
    answers: dict[str, dict[tuple[str, str], list[bool]]] = field(
        default_factory=dict[str, dict[tuple[str, str], list[bool]]]
    )
    """Each evaluated side's answers."""

    @property
    def settings(self) -> Squeeze:
        """The section [squeeze]."""
        assert self.loaded.config.squeeze is not None  # the job is one
        return self.loaded.config.squeeze


Evaluated = tuple[dict[str, Any], dict[tuple[str, str], list[bool]]]


def evaluate(job: Job, found: Analysis, rank: int, record: dict[str, Any], temporary: Path) -> None:
    """Accuracy before and after, on the same tasks and noise."""
    from retrain.squeeze.compress import compress
    from retrain.subject import find, with_its_run

    device = job.settings.device
    with line_cleared():
        # Our own forward has one rank and one scale for all layers: copies that say the same in that form.
        after = compress(found, rank, temporary / "after", uniform=True, device=device, progress=progress())
        before = job.adapter
        if job.run is None and not (found.source.is_uniform and float(found.source.alpha).is_integer()):
            before = temporary / "before"
            compress(found, found.source.rank, before, uniform=True, device=device, progress=progress())
    subject = job.run or with_its_run(find(str(before)), job.adapter)
    model = job.loaded.config.model
    if job.run is None and "model" in model.model_fields_set:
        own = {**subject.settings, "model": {**subject.settings["model"], "model": model.model}}
        subject = replace(subject, settings=own)
    settings = cast("dict[str, dict[str, Any]]", copy.deepcopy(dict(subject.settings)))
    settings.setdefault("model", {})["lora_rank"] = rank
    settings.setdefault("lora", {}).update(alpha=int(after.alpha), rslora=found.source.rslora)
    sides = {"before": subject, "after": replace(subject, adapter=after.directory, settings=settings)}
    _compared(job, record, sides)


def _compared(job: Job, record: dict[str, Any], sides: Mapping[str, Subject]) -> None:
    """Evaluate each side and record its accuracy, and its difference from the first one."""
    kept: dict[str, Any] = record.setdefault("eval", {})
    held = job.answers
    for side, subject in sides.items():
        found, held[side] = _accuracy_of(job, subject, side)
        kept[side] = {k: found["metrics"][k] for k in found["metrics"] if k.startswith("eval/")}
        kept.setdefault("tasks", found["tasks"])
        kept.setdefault("settings", found["settings"])
    from retrain.training.evaluate import paired_interval

    for side in [s for s in held if s != "before"]:
        prefixes = dict.fromkeys(prefix for prefix, _ in held["before"])
        for prefix in prefixes:
            parts = [{k: v for k, v in held[s].items() if k[0] == prefix} for s in ("before", side)]
            mean, low, high, tasks = paired_interval(*parts)
            kept.setdefault("difference", {}).setdefault(side, {})[prefix] = {
                "mean": mean, "low": low, "high": high, "tasks": tasks,
                "changed_tasks": sum(parts[0][k] != parts[1][k] for k in parts[0] if k in parts[1]),
            }  # fmt: skip


def _accuracy_of(job: Job, subject: Subject, side: str) -> Evaluated:
    from retrain import opened
    from retrain.subject import configure

    of_ours = [o for o in job.more if ".".join(o.path).startswith(opened.EVAL_KEYS)]
    overrides = of_ours if "--cont" in job.flags else list(job.more)
    loaded = configure(subject, overrides, opened.EVAL_KEYS, "squeeze")
    answers: dict[tuple[str, str], list[bool]] = {}

    def counted(done: int, total: int, seconds: float) -> None:
        show(f"evaluating {side}: {done} of {total}, {seconds:.0f} s")

    with line_cleared():
        found = opened.evaluate(
            subject, loaded.config, search_paths=loaded.search_paths, progress=counted, answers=answers
        )
    return found, answers


def evaluate_again(job: Job, record: dict[str, Any], directory: Path) -> None:
    from retrain.subject import find

    _compared(job, record, {"continued": find(str(directory))})


def accuracies(record: Mapping[str, Any]) -> list[str]:
    found: Mapping[str, Any] = record["eval"]
    sides = [side for side in ("before", "after", "continued") if side in found]
    lines: list[str] = []
    for prefix in (k.removesuffix("/accuracy") for k in found["before"] if k.endswith("/accuracy")):
        lines.append(f"held-out accuracy, {found['before'][f'{prefix}/source']}")
        for side in sides:
            m = found[side]
            if m[f"{prefix}/accuracy"] is None:
                lines.append(f"  {side:<12}unknown: rewards outside [0, 1] need --correct-at")
                continue
            low, high = m[f"{prefix}/accuracy_low"], m[f"{prefix}/accuracy_high"]
            text = f"  {side:<12}{m[f'{prefix}/accuracy']:>7.1%}  [{low:.1%}, {high:.1%}]"
            change = found["difference"].get(side, {}).get(prefix)
            if change is not None:
                text += f"   change {100 * change['mean']:+.1f} points [{100 * change['low']:+.1f}, {100 * change['high']:+.1f}]"
            lines.append(text)
    lines.append("Intervals are 95 %; the change is paired by task, on the same noise.")
    return lines


def progress() -> Callable[[str, int, int], None]:
    """In place on a terminal; elsewhere a line every half minute."""
    said = time.monotonic()

    def counted(what: str, done: int, total: int) -> None:
        nonlocal said
        show(f"{what} {done} of {total} layers")
        if not sys.stderr.isatty() and time.monotonic() - said >= 30:
            said = time.monotonic()
            print(f"{what} {done} of {total} layers", file=sys.stderr, flush=True)

    return counted


def show(text: str) -> None:
    """A line that the next one replaces, on a terminal only."""
    if sys.stderr.isatty():
        print(f"{_CLEAR}{text} ", end="", file=sys.stderr, flush=True)


@contextlib.contextmanager
def line_cleared() -> Generator[None]:
    try:
        yield
    finally:
        if sys.stderr.isatty():
            print(_CLEAR, end="", file=sys.stderr, flush=True)
