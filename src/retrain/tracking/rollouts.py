"""Every rollout of a step in one compressed file: all that credit is computed from, exactly, and no text.

Layout of ``rollouts/step_000003.npz`` (numpy arrays, no pickles): ``meta`` is JSON in UTF-8 bytes and holds what there
is once per step, group and rollout; the other arrays hold what there is once per token. Ids and floats are split into
planes of equal bytes (all lowest bytes first), which compress better than whole numbers; ids keep only the planes that
they need. What the rollouts of a group begin with alike is stored once. Values stand for sampled tokens only.
"""

from __future__ import annotations

import hashlib
import json
import logging
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from retrain.errors import UsageError
from retrain.tracking import layout
from retrain.types import (
    BoolArray,
    CreditedGroup,
    FloatArray,
    IntArray,
    Message,
    Rollout,
    Score,
    ScoredGroup,
    SkipReason,
    Task,
)

log = logging.getLogger("retrain")

FORMAT = 2
"""Version of the layout; files without one (format 1) lack what a replay needs."""

RECOMPUTED = frozenset({"surprisal", "predictive_variance", "shannon_entropy"})
"""Uncertainties that follow exactly from what is stored anyway; those of any other kind are stored."""

Decode: TypeAlias = Callable[[IntArray], str]
"""Token ids -> their text, special tokens left out."""

_Bytes: TypeAlias = npt.NDArray[np.uint8]

_NO_METRICS: Mapping[str, Any] = {}
_MB = 10**6


@dataclass(frozen=True, slots=True)
class StoredStep:
    """What a file holds of one 0-based step, with the groups in the order in which they were credited.

    A group's task has id, reference, source and draw number; its one message is the decoded prompt, "" without a
    decoder, as are the rollouts' texts. ``planning_P_G_T`` holds one mask per rollout, ``uncertainty_P_G_T`` one float32
    array, NaN where not sampled, or None where the uncertainty follows from the rollouts. ``skipped_P`` says why each
    group did not train ("" = it did). ``credit_digest`` is ``digest`` of the step's advantages. ``temperature`` is None
    where the writer was not told.
    """

    step: int
    groups_P: tuple[ScoredGroup, ...]
    planning_P_G_T: tuple[tuple[BoolArray, ...], ...]
    uncertainty_P_G_T: tuple[tuple[FloatArray, ...], ...] | None
    skipped_P: tuple[SkipReason, ...]
    sepa_lambda: float
    temperature: float | None
    uncertainty_kind: str
    credit_digest: str


class RolloutStore:
    """Writes ``rollouts/step_000003.npz`` and its like below a run directory, up to ``limit_mb`` (10^6 bytes; 0 = any).

    Where the limit is reached the oldest steps go, except step 0, steps that begin at a checkpoint, and the newest.
    """

    def __init__(self, directory: Path, *, limit_mb: int = 0, temperature: float | None = None) -> None:
        self._directory = directory
        self._limit = limit_mb * _MB
        self._temperature = temperature
        self._sizes: dict[int, int] | None = None
        self._said = False
        (directory / layout.ROLLOUTS).mkdir(parents=True, exist_ok=True)

    def write(
        self, step: int, groups_P: Sequence[CreditedGroup], metrics: Mapping[str, Any] = _NO_METRICS
    ) -> None:
        """Store a 0-based step's rollouts; ``metrics`` is its row, for SEPA's lambda and the kind of uncertainty."""
        path = self._directory / layout.rollout_file(step)
        arrays = _encoded(step, groups_P, metrics, self._temperature)
        temporary = path.with_name(f".{path.name}.tmp")
        # As numpy's savez_compressed, but at the level that takes a third of its time for two percent more bytes.
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            for name, values in arrays.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                    np.lib.format.write_array(file, values, allow_pickle=False)
        temporary.replace(path)
        if self._limit:
            self._make_room(step, path.stat().st_size)

    def _make_room(self, newest: int, size: int) -> None:
        if self._sizes is None:
            # Not at the start: a resume deletes files in between.
            found = {s: self._directory / layout.rollout_file(s) for s in stored_steps(self._directory)}
            self._sizes = {s: path.stat().st_size for s, path in found.items()}
        self._sizes[newest] = size
        excess = sum(self._sizes.values()) - self._limit
        if excess <= 0:
            return
        kept = {0, newest, *checkpointed(self._directory)}
        for step in sorted(self._sizes.keys() - kept):
            if excess <= 0:
                break
            (self._directory / layout.rollout_file(step)).unlink(missing_ok=True)
            excess -= self._sizes.pop(step)
        if not self._said:
            self._said = True
            log.warning(
                "%s/ has reached logging.rollouts_mb = %d: from now on the oldest steps are dropped, except step 0 and "
                "those that begin at a checkpoint.",
                self._directory / layout.ROLLOUTS,
                self._limit // _MB,
            )


def stored_steps(run: Path) -> list[int]:
    """The 0-based steps whose rollouts a run directory holds, in order."""
    numbers = (layout.checkpoint_step(path.stem) for path in (run / layout.ROLLOUTS).glob("step_*.npz"))
    return sorted(number for number in numbers if number is not None)


def checkpointed(run: Path) -> list[int]:
    """The 0-based steps that begin with the weights of a checkpoint in the run directory, in order."""
    numbers = (layout.checkpoint_step(path.name) for path in (run / layout.CHECKPOINTS).glob("step_*"))
    return sorted(number for number in numbers if number is not None)


def cut(directory: Path, step: int) -> None:
    """Delete a run's stored rollouts of 0-based steps from ``step`` on, whether or not it still stores them."""
    for number in stored_steps(directory):
        if number >= step:
            (directory / layout.rollout_file(number)).unlink()


def digest(advantages: Iterable[FloatArray]) -> str:
    """sha256 over float32 advantages, one array after the other: equal exactly when every bit is."""
    found = hashlib.sha256()
    for a_T in advantages:
        found.update(np.ascontiguousarray(a_T, dtype="<f4").tobytes())
    return found.hexdigest()


def digest_of(groups_P: Sequence[CreditedGroup]) -> str:
    """``digest`` of a step's advantages, group by group and member by member."""
    return digest(a_T for group in groups_P for a_T in group.advantages_G_T)


def _encoded(
    step: int, groups_P: Sequence[CreditedGroup], metrics: Mapping[str, Any], temperature: float | None
) -> dict[str, npt.NDArray[Any]]:
    rollouts = [r for g in groups_P for r in g.scored.rollouts_G]
    scores = [s for g in groups_P for s in g.scored.scores_G]
    ids: list[IntArray] = []
    shared: list[int] = []
    prompts: list[int] = []
    for group in groups_P:
        members = group.scored.rollouts_G
        prompt = next((_lead(r) for r in members if len(r.token_ids_T)), members[0].token_ids_T[:0])
        prompts.append(len(prompt))
        ids.append(prompt)
        for r in members:
            alike = _alike(prompt, _lead(r))
            shared.append(alike)
            ids.append(r.token_ids_T[alike:])
    kind = str(metrics.get("uncertainty_kind", ""))
    keep_uncertainty = kind not in RECOMPUTED and bool(kind)
    meta = {
        "format": FORMAT,
        "step": step,
        "sepa_lambda": float(metrics.get("sepa_lambda") or 0.0),
        "temperature": temperature,
        "uncertainty_kind": kind,
        "credit_digest": digest_of(groups_P),
        "groups": {
            "task": [g.scored.task.id for g in groups_P],
            "source": _runs(g.scored.task.source for g in groups_P),
            "reference": [g.scored.task.reference for g in groups_P],
            "draw": [g.scored.task.draw for g in groups_P],
            "skipped": [g.skipped for g in groups_P],
            "members": _runs(len(g.scored.rollouts_G) for g in groups_P),
            "prompt": prompts,
        },
        "rollouts": {
            "member": [r.member for r in rollouts],
            # Only where it is not the group's, which no environment of ours makes.
            "task": _runs(
                "" if r.task_id == g.scored.task.id else r.task_id
                for g in groups_P
                for r in g.scored.rollouts_G
            ),
            "shared": _runs(shared),
            "length": [len(r.token_ids_T) for r in rollouts],
            "entropies": _runs(r.entropies_T is not None for r in rollouts),
            "stop": _runs(r.stop for r in rollouts),
            "version": _runs(r.weights_version for r in rollouts),
            "error": _runs(r.error for r in rollouts),
            "own": _runs(_numbers(r.rewards) for r in rollouts),
            "reward": [None if s.error else float(s.reward) for s in scores],
            "passed": _runs(s.passed for s in scores),
            "parts": [_numbers(s.parts) for s in scores] if any(s.parts for s in scores) else [],
            "failed": _runs(s.error for s in scores),
        },
    }
    tails = [r.sampled_T[k:] for r, k in zip(rollouts, shared, strict=True)]
    arrays: dict[str, npt.NDArray[Any]] = {
        "meta": np.frombuffer(json.dumps(meta, separators=(",", ":")).encode(), dtype=np.uint8),
        "ids": _planes(_flat(ids, np.int32), "<i4", narrow=True),
        "sampled": np.packbits(_flat(tails, np.bool_)),
        "logprobs": _planes(_flat([r.logprobs_T[r.sampled_T] for r in rollouts], np.float32), "<f4"),
        "planning": np.packbits(
            _flat(
                [p[r.sampled_T] for g in groups_P for r, p in zip(g.scored.rollouts_G, g.planning_G_T, strict=True)],
                np.bool_,
            )
        ),
    }  # fmt: skip
    entropies = [r.entropies_T[r.sampled_T] for r in rollouts if r.entropies_T is not None]
    if entropies:
        arrays["entropies"] = _planes(_flat(entropies, np.float32), "<f4")
    if keep_uncertainty:
        values = [
            u[r.sampled_T]
            for g in groups_P
            for r, u in zip(g.scored.rollouts_G, g.uncertainty_G_T, strict=True)
        ]
        arrays["uncertainty"] = _planes(_flat(values, np.float32), "<f4")
    return arrays


def _lead(rollout: Rollout) -> IntArray:
    """The tokens before the first sampled one."""
    sampled = rollout.sampled_T
    return rollout.token_ids_T[: int(np.argmax(sampled)) if sampled.any() else len(sampled)]


def _alike(a: IntArray, b: IntArray) -> int:
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if len(differ) else n


def _numbers(parts: Mapping[str, float]) -> dict[str, float]:
    return {str(name): float(value) for name, value in parts.items()}


def _runs(values: Iterable[Any]) -> list[list[Any]]:
    """Pairs (how often, value): what is mostly the same for every rollout takes next to nothing."""
    return [[len(list(same)), value] for value, same in groupby(values)]


def _spread(runs: Iterable[tuple[int, Any]]) -> list[Any]:
    return [value for count, value in runs for _ in range(count)]


def _flat(arrays: Sequence[npt.NDArray[Any]], dtype: type[np.generic]) -> npt.NDArray[Any]:
    return np.concatenate(arrays) if arrays else np.zeros(0, dtype=dtype)


def _planes(values_N: npt.NDArray[Any], dtype: str, *, narrow: bool = False) -> _Bytes:
    """(bytes, N): row k holds byte k of every value; ``narrow`` leaves out the last rows that are all 0."""
    planes = np.ascontiguousarray(values_N, dtype=dtype).view(np.uint8).reshape(-1, 4).T
    needed = 4
    while narrow and needed > 1 and not planes[needed - 1].any():
        needed -= 1
    return np.ascontiguousarray(planes[:needed])


def _whole(planes: _Bytes, dtype: str) -> npt.NDArray[Any]:
    """The values that ``_planes`` took apart."""
    full = np.zeros((planes.shape[1], 4), dtype=np.uint8)
    full[:, : planes.shape[0]] = planes.T
    return full.view(dtype).reshape(-1)


def read(run: Path, step: int, *, decode: Decode | None = None) -> StoredStep:
    """A stored 0-based step; UsageError where it is not stored, of an older version, or damaged.

    ``decode`` gives tasks and rollouts their texts, which are empty without it.
    """
    path = run / layout.rollout_file(step)
    try:
        # Opened here: numpy leaves a file open that turns out to be none of its own.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {name: cast("npt.NDArray[Any]", archive[name]) for name in archive.files}
    except FileNotFoundError as error:
        raise UsageError(f"{run} holds no rollouts of step {step}.", fix=_what_there_is(run)) from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UsageError(f"{path} cannot be read: {error}.", fix="choose another step.") from error
    if "meta" not in arrays:
        raise UsageError(
            f"{path} was written by an older version and lacks what a replay needs.",
            fix="choose a run of this version.",
        )
    try:
        meta = json.loads(arrays["meta"].tobytes())
        if meta["format"] != FORMAT:
            raise UsageError(
                f"{path} has format {meta['format']}, and this version reads format {FORMAT}.",
                fix="use the version of retrain that wrote it.",
            )
        return _decoded(meta, arrays, decode)
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise UsageError(f"{path} is damaged: {error}.", fix="choose another step.") from error


def _what_there_is(run: Path) -> str:
    steps = stored_steps(run)
    if not steps:
        return "logging.rollouts = true stores them."
    gaps = "" if len(steps) == steps[-1] - steps[0] + 1 else f", {len(steps)} of them"
    return f"stored are steps {steps[0]} to {steps[-1]}{gaps}; logging.rollouts_mb bounds how many stay."


class _Reader:
    """Hands out consecutive pieces of a flat array."""

    def __init__(self, values: npt.NDArray[Any]) -> None:
        self._values, self._at = values, 0

    def take(self, n: int) -> npt.NDArray[Any]:
        piece = self._values[self._at : self._at + n]
        if len(piece) != n:
            raise ValueError("an array ends early")
        self._at += n
        return piece


def _bits(packed: npt.NDArray[Any], count: int) -> BoolArray:
    if len(packed) * 8 < count:
        raise ValueError("a mask ends early")
    return np.unpackbits(packed, count=count).astype(np.bool_)


def _decoded(
    meta: Mapping[str, Any], arrays: Mapping[str, npt.NDArray[Any]], decode: Decode | None
) -> StoredStep:
    groups, each = meta["groups"], meta["rollouts"]
    sizes, sources = _spread(groups["members"]), _spread(groups["source"])
    shared, stops, versions = _spread(each["shared"]), _spread(each["stop"]), _spread(each["version"])
    named, errors, own = _spread(each["task"]), _spread(each["error"]), _spread(each["own"])
    passed, failed, with_entropy = (
        _spread(each["passed"]),
        _spread(each["failed"]),
        _spread(each["entropies"]),
    )
    lengths = each["length"]
    parts: list[dict[str, float]] = each["parts"] or [{} for _ in lengths]
    ids = _Reader(_whole(arrays["ids"], "<i4").astype(np.int32, copy=False))
    sampled = _Reader(_bits(arrays["sampled"], sum(lengths) - sum(shared)))
    logprobs = _Reader(_whole(arrays["logprobs"], "<f4").astype(np.float32, copy=False))
    planning = _Reader(_bits(arrays["planning"], arrays["logprobs"].shape[1]))
    empty = np.zeros((4, 0), dtype=np.uint8)
    entropies = _Reader(_whole(arrays.get("entropies", empty), "<f4").astype(np.float32, copy=False))
    uncertainty = _Reader(_whole(arrays["uncertainty"], "<f4")) if "uncertainty" in arrays else None

    groups_P: list[ScoredGroup] = []
    planning_P: list[tuple[BoolArray, ...]] = []
    uncertainty_P: list[tuple[FloatArray, ...]] = []
    i = 0
    for p, size in enumerate(sizes):
        prompt = ids.take(groups["prompt"][p])
        rollouts: list[Rollout] = []
        scores: list[Score] = []
        masks: list[BoolArray] = []
        uncertainties: list[FloatArray] = []
        for _ in range(size):
            token_ids = np.concatenate([prompt[: shared[i]], ids.take(lengths[i] - shared[i])])
            sampled_T = np.zeros(lengths[i], dtype=np.bool_)
            sampled_T[shared[i] :] = sampled.take(lengths[i] - shared[i])
            count = int(np.count_nonzero(sampled_T))
            mask_T = np.zeros(lengths[i], dtype=np.bool_)
            mask_T[sampled_T] = planning.take(count)
            masks.append(mask_T)
            if uncertainty is not None:
                uncertainties.append(_spaced(sampled_T, uncertainty.take(count)))
            rollouts.append(
                Rollout(
                    task_id=named[i] or groups["task"][p],
                    member=each["member"][i],
                    token_ids_T=token_ids,
                    sampled_T=sampled_T,
                    logprobs_T=_spaced(sampled_T, logprobs.take(count)),
                    entropies_T=_spaced(sampled_T, entropies.take(count)) if with_entropy[i] else None,
                    text=decode(token_ids[sampled_T]) if decode is not None else "",
                    stop=stops[i],
                    weights_version=versions[i],
                    error=errors[i],
                    rewards=own[i],
                )
            )
            reward = float("nan") if each["reward"][i] is None else each["reward"][i]
            scores.append(Score(reward, passed[i], parts[i], failed[i]))
            i += 1
        task = Task(
            id=groups["task"][p],
            messages=(Message("user", decode(prompt) if decode is not None else ""),),
            reference=groups["reference"][p],
            source=sources[p],
            draw=groups["draw"][p],
        )
        groups_P.append(ScoredGroup(task, tuple(rollouts), tuple(scores)))
        planning_P.append(tuple(masks))
        uncertainty_P.append(tuple(uncertainties))
    return StoredStep(
        step=meta["step"],
        groups_P=tuple(groups_P),
        planning_P_G_T=tuple(planning_P),
        uncertainty_P_G_T=tuple(uncertainty_P) if uncertainty is not None else None,
        skipped_P=tuple(groups["skipped"]),
        sepa_lambda=meta["sepa_lambda"],
        temperature=meta["temperature"],
        uncertainty_kind=meta["uncertainty_kind"],
        credit_digest=meta["credit_digest"],
    )


def _spaced(sampled_T: BoolArray, values: npt.NDArray[Any]) -> FloatArray:
    """Values of the sampled tokens at their places, NaN between them."""
    out_T = np.full(len(sampled_T), np.nan, dtype=np.float32)
    out_T[sampled_T] = values
    return out_T
