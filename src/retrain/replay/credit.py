"""Credit of a run's stored rollouts under another algorithm, compared with the run's own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from retrain import plugins
from retrain.algorithms.statistics import step_stats
from retrain.config.idle import idle
from retrain.config.load import LoadedConfig, Override, load
from retrain.config.schema import Config
from retrain.errors import UsageError
from retrain.preflight import changed_settings
from retrain.replay.differences import (
    Largest,
    StepComparison,
    Tally,
    TokenDifference,
    compared,
    groups_of,
    pairs_of,
)
from retrain.replay.words import Words
from retrain.subject import Subject, configure
from retrain.tracking import layout, rollouts
from retrain.tracking.read import RunRecord
from retrain.tracking.rollouts import StoredStep
from retrain.training.recredit import Creditor, silent_settings
from retrain.types import CreditedGroup, StepStats

ACTING = (
    "algorithm.", "gtpo.", "hicra.", "sepa.", "planning.", "logging.strategic_grams", "reward.correct_at",
    "training.truncated", "plugins.",
)  # fmt: skip
"""Settings that credit is computed from."""

_LARGEST = 10
_VARIANCES = {"surprisal": "exec_surprisal_var", "shannon_entropy": "exec_entropy_var"}
"""Where metrics.jsonl holds the variance that SEPA follows, by the kind of uncertainty."""


@dataclass(frozen=True, slots=True)
class Replay:
    """What a replay found. ``spearman`` of ``total`` is the mean over steps weighted by their tokens; everything else
    there is over all tokens at once, and its ``step`` is -1."""

    run: str
    own: str
    other: str
    changed: tuple[str, ...]
    steps: tuple[StepComparison, ...]
    total: StepComparison
    largest: tuple[TokenDifference, ...]
    notes: tuple[str, ...]

    def record(self) -> dict[str, Any]:
        """As one JSON object."""
        return asdict(self)


def settings(run: RunRecord, overrides: Sequence[Override]) -> tuple[Config, LoadedConfig]:
    """The run's configuration, and that with ``overrides`` laid over it, where what they replace is left out."""
    path = run.path / layout.CONFIG
    if not path.is_file():
        raise UsageError(
            f"{run.path} holds no {layout.CONFIG}.", fix="name a run directory, such as logs/train."
        )
    before = load(path).config
    raw = before.model_dump(exclude_unset=True, exclude_none=True, by_alias=True, exclude={"resume"})
    section = cast("dict[str, Any]", raw.setdefault("algorithm", {}))
    given = {".".join(o.path[:2]) for o in overrides}
    if given & {"algorithm.advantage_mode", "algorithm.transform_mode"}:
        section.pop("algorithm_mode", None)
        section.pop("params", None)
    if "algorithm.algorithm_mode" in given:
        section.pop("params", None)
    for piece in ("advantage", "transform"):
        if f"algorithm.{piece}_mode" in given:
            section.pop(f"{piece}_params", None)
    subject = Subject("run", str(run.path), copy.deepcopy(raw), run.path)
    now = configure(subject, overrides, ACTING, "replay")
    plugins.add_search_paths(now.search_paths)
    if "soft" in (before.training.truncated, now.config.training.truncated) and (
        before.training.truncated != now.config.training.truncated
    ):
        raise UsageError(
            'training.truncated = "soft" is part of the stored rewards and cannot be replayed.',
            fix="leave training.truncated out.",
        )
    return before, now


def announced(now: LoadedConfig, overrides: Sequence[Override]) -> list[str]:
    """Which flags do nothing beside the others, in the words in which a run says it."""
    flags = {".".join(o.path[:2]): o.flag for o in overrides}
    starts = tuple(f"{flag}: " for flag in flags.values())
    found = [line for line in now.announcements if starts and line.startswith(starts)]
    section = now.config.algorithm
    piece = section.algorithm_mode or section.transform_mode
    for key in sorted((silent_settings(now.config) - idle(now.config).keys()) & flags.keys()):
        found.append(f"{flags[key]}: {key} does nothing: {piece!r} has no attribute uses_sepa = True.")
    return found


def steps_in(text: str, run: Path) -> list[int]:
    """The stored steps that ``a..b``, ``a..``, ``..b`` or ``a`` names (both ends included); all for ""."""
    stored = rollouts.stored_steps(run)
    if not stored:
        rollouts.read(run, 0)  # says so
    low, dots, high = text.partition("..")
    if not all(part == "" or part.isdecimal() for part in (low, high)) or (text and not (low or high)):
        raise UsageError(
            f"--steps {text} is no range of steps.", fix="for example --steps 10..20, or --steps 7."
        )
    first = int(low) if low else 0
    last = int(high) if high else (first if text and not dots else max(stored))
    found = [s for s in stored if first <= s <= last]
    if not found:
        what = f"step {first}" if first == last else f"steps {first} to {last}"
        raise UsageError(
            f"{run} holds no rollouts of {what}.",
            fix=f"stored are {len(stored)} steps from {stored[0]} to {stored[-1]}.",
        )
    return found


def label(config: Config) -> str:
    """The algorithm in one word, as metrics.jsonl calls a condition."""
    section = config.algorithm
    return section.algorithm_mode or f"{section.advantage_mode}+{section.transform_mode}"


def _changed(before: Config, now: Config) -> tuple[str, ...]:
    """What differs in the settings of credit, without what does nothing beside the others."""
    silent = silent_settings(now)
    lines = changed_settings(before.model_dump(), now.model_dump())
    return tuple(x for x in lines if x.startswith(ACTING) and x.partition(" ")[0] not in silent)


def replay(
    run: RunRecord, before: Config, now: Config, steps: Sequence[int], *, largest: int = _LARGEST,
    announcements: Sequence[str] = (), progress: Callable[[int, int], None] = lambda done, total: None,
) -> Replay:  # fmt: skip
    """Credit of the stored 0-based ``steps`` under ``before`` (the run's own) and ``now``, compared; ``announcements``
    become the first notes."""
    words = Words(before)
    changed = _changed(before, now)
    own = Creditor.of(before, before)
    other = Creditor.of(now, before, lambda: words.renderer) if changed else own
    decode = words.renderer.decode if own.wants_text or other.wants_text else None
    lambdas = _Lambdas(run, before, other, same=not changed, decode=decode)
    tally, found, nearest = Tally(), list[StepComparison](), Largest(largest)
    for done, number in enumerate(steps):
        progress(done, len(steps))
        stored = rollouts.read(run.path, number, decode=decode)
        a_P = own.credit(stored, stored.sepa_lambda)
        sepa_lambda = lambdas.at(stored)
        b_P = other.credit(stored, sepa_lambda) if changed else a_P
        lambdas.observe(number, b_P)
        pairs = pairs_of(a_P, b_P)
        reproduced = rollouts.digest_of(a_P) == stored.credit_digest
        counts = groups_of(a_P, b_P)
        found.append(compared(number, pairs, counts, stored.sepa_lambda, sepa_lambda, reproduced=reproduced))
        tally.add(pairs, counts, found[-1])
        if changed:
            nearest.look(number, a_P, b_P)
    notes = [*announcements, *lambdas.notes]
    wrong = [c.step for c in found if not c.reproduced]
    if wrong:
        notes.append(
            f"The run's own credit came out differently in {len(wrong)} of {len(found)} steps, first in step {wrong[0]}: "
            "the code of the algorithm or of a plug-in is not what it was."
        )
    differences = nearest.found(words.tokenizer if changed else None)
    return Replay(
        str(run.path), label(before), label(now), changed, tuple(found), tally.total(found), differences,
        (*notes, *words.notes),
    )  # fmt: skip


class _Lambdas:
    """SEPA's lambda of each step under the other algorithm, its schedule fed from what is stored."""

    def __init__(
        self, run: RunRecord, before: Config, other: Creditor, *, same: bool, decode: rollouts.Decode | None
    ) -> None:
        self._run, self._before, self._other, self._decode = run, before, other, decode
        self._same = same
        self._next = 0
        self.notes: list[str] = []
        sepa = other.config.sepa
        self._remembers = other.schedule.active and (sepa.schedule == "auto" or sepa.correct_rate_gate > 0)

    def at(self, stored: StoredStep) -> float:
        """Lambda of the step, from all steps before it."""
        if self._same:
            return stored.sepa_lambda
        if self._remembers:
            for step in range(self._next, stored.step):
                self._catch_up(step)
        return self._other.schedule.lambda_at(stored.step)

    def observe(self, step: int, groups_P: Sequence[CreditedGroup]) -> None:
        """What the step showed."""
        self._next = step + 1
        if self._remembers and not self._same:
            self._other.schedule.observe(step_stats(groups_P, self._other.algorithm).observed)

    def _catch_up(self, step: int) -> None:
        if (self._run.path / layout.rollout_file(step)).is_file():
            earlier = rollouts.read(self._run.path, step, decode=self._decode)
            groups_P = self._other.credit(earlier, self._other.schedule.lambda_at(step))
            self._other.schedule.observe(step_stats(groups_P, self._other.algorithm).observed)
            return
        row = self._rows.get(step, {})
        variance = row.get(_VARIANCES.get(str(self._other.config.algorithm.uncertainty_kind), ""))
        self._other.schedule.observe(StepStats(row.get("correct_rate"), variance))
        if not self.notes:
            self.notes.append(
                f"The rollouts of step {step} and perhaps of others are not stored: there SEPA's schedule follows "
                "what metrics.jsonl says of the run's own algorithm."
            )

    @cached_property
    def _rows(self) -> dict[int, Mapping[str, Any]]:
        return {int(row["step"]): row for row in self._run.steps}
